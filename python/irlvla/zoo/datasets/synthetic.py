"""The embedded world as a dataset: nothing to download, made as it is asked for."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from irlvla.records import Record, RecordDataset, record, sample
from irlvla.synthetic import FRONT_RIG, NAVSIM_RIG, World, render, split, to_scene
from irlvla.types import Observation, Scene, Trajectory


class SyntheticDataset(RecordDataset):
    """Scenes of the embedded world. An item depends on nothing but its index and the settings."""

    class Config(RecordDataset.Config):
        count: int = Field(1000, ge=1, description="how many scenes")
        split: Literal["train", "val", "test", "unseen"] = Field(
            "train", description="which; no seed is in two, unseen has other road families"
        )
        start: int = Field(0, ge=0, description="of the split, from which scene on")
        rig: Literal["front", "navsim"] = Field("front", description="cameras: three that look ahead, or NAVSIM's eight; with `size` only")

    def __init__(self, config: Any) -> None:
        """Raises `ConfigError` for a camera that the rig does not have."""
        super().__init__(config)
        self.split = split(config.split)
        rig = FRONT_RIG if config.rig == "front" else NAVSIM_RIG
        self.rig = rig.only(*config.cameras) if config.cameras else rig

    @property
    def root(self) -> Path:
        return Path()

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> tuple[Observation, Scene, Trajectory]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self} has {len(self)} scenes, there is none at {index}")
        world = self._world(index % len(self))
        images = {} if self.config.size is None else self._rendered(world)
        return sample(to_scene(world), torch.tensor([world.command]), images, self.config.privileged)

    def record(self, index: int) -> Record:
        world = self._world(index)
        scene = to_scene(world)
        if self.config.size is None:
            return record(scene, command=world.command)
        seen = self._rendered(world)
        images = [_jpeg(image) for image in seen["images"][0]]
        lenses, mounts = seen["intrinsics"][0].numpy(), seen["camera_to_ego"][0].numpy()
        return record(scene, self.rig.names, images, lenses, mounts, command=world.command)

    def _world(self, index: int) -> World:
        (world,) = self.split.worlds(1, self.config.start + index)
        return world

    def _rendered(self, world: World) -> dict[str, Tensor]:
        size = self.config.size
        rig = self.rig.resized(*size)
        lenses, mounts = (torch.as_tensor(array, dtype=torch.float32)[None] for array in (rig.intrinsics, rig.camera_to_ego))
        return {"images": render(world, self.rig, size)[None], "intrinsics": lenses, "camera_to_ego": mounts}


def _jpeg(image: Tensor) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=92)
    return stream.getvalue()
