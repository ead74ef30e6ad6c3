"""Images that are moved and tinted at random in training, with calibration that follows: what they show stays where it is."""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from irlvla import components

Scale = Annotated[float, Field(gt=0.0)]
GREY = (0.299, 0.587, 0.114)  # how bright red, green and blue look (ITU-R BT.601)


class Augmentation:
    """Scales, crops, turns and tints each image by itself, as BEVDet does; no mirror images, for cars keep to one side of the road.

    Scaling keeps the lower edge, so that what is cropped is sky; to the sides the crop moves at random. What lies outside of an
    image is black. Random numbers come from torch's global generator, in one draw.
    """

    class Config(components.Config):
        resize: tuple[Scale, Scale] = Field(
            (0.82, 1.18), description="least and greatest scale; (0.38, 0.55) of 1920 pixels for images of 704, relative to its middle"
        )
        rotation: float = Field(5.4, ge=0.0, le=180.0, description="to either side, at most [degrees]")
        brightness: float = Field(0.2, ge=0.0, lt=1.0, description="how much brighter or darker, at most")
        contrast: float = Field(0.2, ge=0.0, lt=1.0, description="how much more or less contrast, at most")
        saturation: float = Field(0.2, ge=0.0, lt=1.0, description="how much more or less colour, at most")

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, images: Tensor, intrinsics: Float[Tensor, "B N 3 3"]) -> tuple[Float[Tensor, "B N 3 H W"], Float[Tensor, "B N 3 3"]]:
        """Images "B N 3 H W" (uint8, or floats in [0, 1]) as floats in [0, 1], and the intrinsics that belong to them."""
        pixels = images if images.is_floating_point() else images.float() / 255.0
        drawn = torch.rand(*images.shape[:2], 6, device=images.device)
        move = self._move(drawn[..., :3], images.shape[-2:])
        moved = _moved(pixels.flatten(0, 1), move.flatten(0, 1)).unflatten(0, images.shape[:2])
        return self._tinted(moved, drawn[..., 3:]), (_centred(move) @ intrinsics.to(move.dtype)).to(intrinsics.dtype)

    def _move(self, drawn: Float[Tensor, "B N 3"], size: torch.Size) -> Float[Tensor, "B N 3 3"]:
        """Where each point goes, in pixels from the upper left corner of the image."""
        height, width = size
        low, high = self.config.resize
        scale = low + (high - low) * drawn[..., 0]
        angle = math.radians(self.config.rotation) * (2.0 * drawn[..., 1] - 1.0)
        shift = (1.0 - scale).abs() * width * (drawn[..., 2] - 0.5)
        # Relative to the middle of the image: scaled, shifted to the side and down to the lower edge, then turned.
        down = (1.0 - scale) * height / 2.0
        cos, sin = angle.cos(), angle.sin()
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        turn = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], -1).unflatten(-1, (3, 3))
        grow = torch.stack([scale, zero, shift, zero, scale, down, zero, zero, one], -1).unflatten(-1, (3, 3))
        middle = torch.eye(3, device=drawn.device)
        middle[:2, 2] = torch.tensor([width / 2.0, height / 2.0])
        return middle @ turn @ grow @ middle.inverse()

    def _tinted(self, images: Float[Tensor, "B N 3 H W"], drawn: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3 H W"]:
        limits = drawn.new_tensor([self.config.brightness, self.config.contrast, self.config.saturation])
        brightness, contrast, saturation = (1.0 + limits * (2.0 * drawn - 1.0))[..., None, None, None].to(images.dtype).unbind(2)
        grey = (images * images.new_tensor(GREY)[:, None, None]).sum(2, keepdim=True)
        images = torch.lerp(grey, images, saturation)
        return (torch.lerp(grey.mean((-2, -1), keepdim=True), images, contrast) * brightness).clamp(0.0, 1.0)


def _centred(move: Float[Tensor, "... 3 3"]) -> Float[Tensor, "... 3 3"]:
    """The same move for coordinates in which the centre of the first pixel is (0, 0)."""
    half = torch.eye(3, dtype=move.dtype, device=move.device)
    half[:2, 2] = 0.5
    return half.inverse() @ move @ half


def _moved(images: Float[Tensor, "M 3 H W"], move: Float[Tensor, "M 3 3"]) -> Float[Tensor, "M 3 H W"]:
    """Images of which each point was moved; bilinear, black outside."""
    height, width = images.shape[-2:]
    pixels = move.new_tensor([[width / 2.0, 0.0, width / 2.0], [0.0, height / 2.0, height / 2.0], [0.0, 0.0, 1.0]])  # of torch's -1 ... 1
    back = pixels.inverse() @ move.inverse() @ pixels
    grid = nn.functional.affine_grid(back[:, :2].to(images.dtype), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, align_corners=False)
