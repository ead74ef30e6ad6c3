"""Bird's-eye view from cameras: image encoder, lift, heads, and a token of the car's own status; the paper's 3D reasoning."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.errors import InputError
from irlvla.ops import VoxelPoolPlan
from irlvla.types import Command, Features, Observation, Scene
from irlvla.zoo.backbones.augmentation import Augmentation
from irlvla.zoo.backbones.detection import DetectionHead
from irlvla.zoo.backbones.encoders import TimmEncoder
from irlvla.zoo.backbones.lift import Lift, rays_of
from irlvla.zoo.backbones.map_elements import MapHead
from irlvla.zoo.backbones.segmentation import SegmentationHead
from irlvla.zoo.backbones.status import StatusBackbone


class BevBackbone(components.Backbone):
    """Makes `Features.bev` from the images of any number of cameras, `Features.status`, and what its heads make of the grid.

    The default is the scale of the paper: images of 256 x 704, VoVNetV2-99, 128 x 128 cells over 64 x 64 m.
    """

    Encoder: ClassVar[Any] = TimmEncoder
    HEADS: ClassVar[dict[str, Any]] = {"detection": DetectionHead, "map": MapHead, "segmentation": SegmentationHead}

    class Config(components.Config):
        width: int = Field(256, ge=1, description="width of the tokens")
        encoder: TimmEncoder.Config = Field(TimmEncoder.Config.model_validate({}), description="what sees the images")
        lift: Lift.Config = Field(Lift.Config.model_validate({}), description="how the images become a bird's-eye view")
        detection: DetectionHead.Config | None = Field(
            DetectionHead.Config.model_validate({}), description="tokens of agents, taught where they are; null = none"
        )
        map: MapHead.Config | None = Field(
            MapHead.Config.model_validate({}), description="tokens of the map, taught what there is; null = none"
        )
        segmentation: SegmentationHead.Config | None = Field(
            SegmentationHead.Config.model_validate({}), description="teaches the grid what each cell is; null = nobody does"
        )
        frames: int = Field(4, ge=1, description="how many frames of the car's own history are read, up to t = 0")
        command_dropout: float = Field(0.0, ge=0.0, le=1.0, description="how often a command is unknown in training")
        status_dropout: float = Field(
            0.0, ge=0.0, le=1.0, description="how often the car's own history is unknown in training, so that its cameras are looked at"
        )
        augmentation: Augmentation.Config | None = Field(
            Augmentation.Config.model_validate({}), description="how images are changed at random in training; null = not at all"
        )

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.width = config.width
        self.encoder = self.Encoder(config.encoder)
        if self.encoder.config is not config.encoder:  # it began with weights that are in the model from now on
            self.config = config.model_copy(update={"encoder": self.encoder.config})
        self.lift = Lift(config.lift, self.encoder.width, config.width)
        wanted = {name: getattr(config, name) for name in self.HEADS}
        self.heads = nn.ModuleDict({name: self.HEADS[name](head, config.width) for name, head in wanted.items() if head is not None})
        self.status = StatusBackbone(StatusBackbone.Config(width=config.width, frames=config.frames))
        self.unknown = nn.Parameter(torch.zeros(config.width)) if config.status_dropout else None
        self.augmentation = Augmentation(config.augmentation) if config.augmentation else None
        self.register_buffer("range", torch.tensor(self.lift.grid.range), persistent=False)

    range: Tensor

    def forward(self, obs: Observation) -> Features:
        """Raises `InputError` for an observation without calibrated images, or with images of a size that does not fit."""
        images, rays, plan = self.prepare(obs)
        bev = self.see(images, rays, plan)
        features = Features(obs, bev=bev, bev_range=self.range.expand(len(obs), 4), status=self.feel(obs))
        for head in self.heads.values():
            features = head(features)
        return features

    def loss(self, features: Features, scene: Scene) -> dict[str, Tensor]:
        """The losses of the heads."""
        heads: Any = self.heads.values()
        return {name: value for head in heads for name, value in head.loss(features, scene).items()}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def prepare(self, obs: Observation) -> tuple[Tensor, Float[Tensor, "B N 8 h w"], VoxelPoolPlan]:
        """Images, in training changed at random; the rays of the pixels of the maps; and which of them lies where."""
        images, intrinsics, mounts = self._calibrated_images(obs)
        size, stride = (images.shape[-2], images.shape[-1]), self.encoder.stride
        with torch.autocast(images.device.type, enabled=False):  # geometry stays exact
            if self.training and self.augmentation is not None:
                images, intrinsics = self.augmentation(images, intrinsics)
            plan = self.lift.plan(intrinsics, mounts, size, stride)  # it knows what is no camera
            return images, rays_of(intrinsics, mounts, size, stride), plan

    def see(self, images: Tensor, rays: Float[Tensor, "B N 8 h w"], plan: VoxelPoolPlan) -> Float[Tensor, "B D X Y"]:
        """The bird's-eye view; all that it costs, and torch.compile takes it whole."""
        maps = self.encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        return self.lift(maps, rays, plan)

    def feel(self, obs: Observation) -> Float[Tensor, "B D"]:
        """The status token."""
        config, command = self.config, obs.command
        if self.training and config.command_dropout:
            command = command.masked_fill(self._dropped(command, config.command_dropout), Command.UNKNOWN)
        token = self.status(dataclasses.replace(obs, command=command)).status
        if self.training and self.unknown is not None:
            token = torch.where(self._dropped(command, config.status_dropout)[:, None], self.unknown.to(token.dtype), token)
        return token

    def _dropped(self, like: Tensor, probability: float) -> Tensor:
        return torch.rand(len(like), device=like.device) < probability

    def _calibrated_images(self, obs: Observation) -> tuple[Tensor, Tensor, Tensor]:
        images, intrinsics, mounts = obs.images, obs.intrinsics, obs.camera_to_ego
        if images is None or intrinsics is None or mounts is None:
            missing = ", ".join(name for name in ("images", "intrinsics", "camera_to_ego") if getattr(obs, name) is None)
            raise InputError(f"{self} looks at images, and the observation has no {missing}; give the dataset a `size`")
        shape, stride = tuple(images.shape), self.encoder.stride
        if len(shape) != 5 or shape[2] != 3 or not shape[1]:
            raise InputError(f"{self}: images must have shape (B, C, 3, H, W) with one camera at least, got {shape}")
        for name, value, rest in (("intrinsics", intrinsics, (3, 3)), ("camera_to_ego", mounts, (4, 4))):
            if tuple(value.shape) != (*shape[:2], *rest):
                raise InputError(f"{self}: {name} of images {shape} must have shape {(*shape[:2], *rest)}, got {tuple(value.shape)}")
        if shape[3] % stride or shape[4] % stride:
            fits = tuple(max(round(pixels / stride), 1) * stride for pixels in shape[3:])
            raise InputError(f"{self}: height and width of images must be multiples of {stride}, got {shape[3:]}; {fits} would do")
        return images, intrinsics, mounts
