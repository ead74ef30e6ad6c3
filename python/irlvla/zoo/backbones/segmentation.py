"""What each cell of a bird's-eye view is: road, route, cars, people."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from irlvla import components
from irlvla.types import Features, Scene
from irlvla.zoo.backbones.queries import require_bev
from irlvla.zoo.backbones.targets import Area, areas_in


class SegmentationHead(nn.Module):
    """Whether each cell of the grid, or of a finer one, lies in each `Area`. It makes no tokens: it teaches the grid what is where.

    DiffVLA has 7 classes of which each cell is one; here 7 areas overlap, so that a car does not hide the road that it stands on, and
    each is learnt by binary cross-entropy and by Dice loss, which counts small areas as much as large ones. The weight of what is
    there against what is not is that of Lift-Splat.

    Predictions: `areas` "B 7 X Y", logits.
    """

    class Config(components.Config):
        hidden: int = Field(64, ge=1, description="channels of the convolutions")
        upsample: int = Field(1, ge=1, description="how many times finer than the grid, along each side")
        entropy_weight: float = Field(1.0, ge=0.0, description="of the binary cross-entropy")
        dice_weight: float = Field(0.5, ge=0.0, description="of the Dice loss")
        positive_weight: float = Field(2.13, gt=0.0, description="of cells that lie in an area, in the cross-entropy")

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.config = config
        self.reduce = _convolution(width, config.hidden)
        self.refine = _convolution(config.hidden, config.hidden)
        self.classify = nn.Conv2d(config.hidden, len(Area), 1)

    def forward(self, features: Features) -> Features:
        """Raises `InputError` for features without a bird's-eye view."""
        grid = self.reduce(require_bev(features)[0])
        if self.config.upsample > 1:
            grid = functional.interpolate(grid, scale_factor=self.config.upsample, mode="bilinear", align_corners=False)
        return dataclasses.replace(features, predictions=features.predictions | {"areas": self.classify(self.refine(grid))})

    def loss(self, features: Features, scene: Scene) -> dict[str, Tensor]:
        """Means over scenes and areas."""
        logits, wanted = features.predictions["areas"].float(), self.targets(features, scene).float()
        weight = logits.new_tensor(self.config.positive_weight)
        entropy = functional.binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight)
        likely = logits.sigmoid()
        common, total = (likely * wanted).sum((2, 3)), (likely + wanted).sum((2, 3))
        dice = 1.0 - (2.0 * common + 1.0) / (total + 1.0)
        return {"areas_entropy": self.config.entropy_weight * entropy, "areas_dice": self.config.dice_weight * dice.mean()}

    def targets(self, features: Features, scene: Scene) -> Bool[Tensor, "B 7 X Y"]:
        """What the predictions should be."""
        extent, size = require_bev(features)[1], features.predictions["areas"].shape[2:]
        return areas_in(scene, extent, (size[0], size[1])).to(extent.device)


def _convolution(inputs: int, outputs: int) -> nn.Sequential:
    norm = nn.GroupNorm(1, outputs)  # of each scene by itself
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), norm, nn.GELU())


def intersection_over_union(logits: Float[Tensor, "B C X Y"], wanted: Bool[Tensor, "B C X Y"]) -> Float[Tensor, "B C"]:
    """Cells that both say lie in an area over those that either says; NaN where neither does."""
    found = logits > 0.0
    return (found & wanted).sum((2, 3)) / (found | wanted).sum((2, 3))
