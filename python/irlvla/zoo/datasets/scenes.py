"""Scenes from files: `Scene.save` writes them, this reads them back."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import safetensors
import torch
from pydantic import Field

from irlvla import components
from irlvla.errors import FileError, did_you_mean
from irlvla.files import files_under
from irlvla.records import command_of
from irlvla.types import Observation, Scene, Trajectory

SUFFIX = ".safetensors"


class SceneFiles(components.Dataset):
    """Recorded or generated scenes without sensors: what the car knows of itself, and the truth.

    A file is read whole when one of its scenes is asked for, and the last one is kept. So write files of few scenes,
    say 16, where they are to be shuffled. At the start only the headers are read.

    An item is (observation, scene, human), each a batch of one; observation and human are float32. The command is derived
    from the route (`command_of`). The human's poses are NaN where none were recorded.
    """

    class Config(components.Config):
        path: Path = Field(description="a file that Scene.save wrote, or a folder with such files (*.safetensors)")
        privileged: bool = Field(True, description="put the scene into the observation, for components that are given the truth")

    def __init__(self, config: Any) -> None:
        """Raises `FileError` where there are no scenes, or other files among them."""
        super().__init__(config)
        self.files = _files(config.path.expanduser())
        self.ends = np.cumsum([_count(file) for file in self.files])  # row after the last scene of each file
        self._kept: tuple[int, Scene] | None = None
        if len(self) == 0:
            raise FileError(f"{config.path} holds no scenes; write some with Scene.save")

    def __getstate__(self) -> dict[str, Any]:
        """Workers read for themselves."""
        return {**self.__dict__, "_kept": None}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: SupportsIndex) -> tuple[Observation, Scene, Trajectory]:
        row = operator.index(index)
        if not -len(self) <= row < len(self):
            raise IndexError(f"{self} has {len(self)} scenes, there is none at {row}")
        row %= len(self)
        number = int(self.ends.searchsorted(row, side="right"))
        scene = self._read(number)[row - int(self.ends[number])]  # counted from the end of its file
        history = torch.cat([scene.in_ego_frame(scene.history[..., :3]), scene.history[..., 3:]], -1)
        command = torch.tensor([command_of(scene)])
        obs = Observation(scene.token, history.float(), command, scene=scene if self.config.privileged else None)
        return obs, scene, Trajectory(scene.human.float(), scene.human_dt)

    def _read(self, number: int) -> Scene:
        """The scenes of a file. Raises `FileError` if it is damaged or has other scenes than at the start."""
        if self._kept is None or self._kept[0] != number:
            self._kept = None  # so that no two files are held at once
            scenes = Scene.load(self.files[number])
            if len(scenes) != np.diff(self.ends, prepend=0)[number]:
                raise FileError(f"{self.files[number]} has changed: it holds {len(scenes)} scenes now")
            self._kept = number, scenes
        return self._kept[1]


def _files(path: Path) -> list[Path]:
    """The file, or those in a folder, in order of name."""
    for part in reversed([path, *path.parents]):
        if not part.exists():
            raise FileError(f"{part} does not exist. {did_you_mean(part.name, (near.name for near in part.parent.glob('*')))}".rstrip())
    files = files_under(path, f"*{SUFFIX}") if path.is_dir() else [path]
    if not files:
        raise FileError(f"{path} holds no {SUFFIX} file; write one with Scene.save")
    return files


def _count(file: Path) -> int:
    """How many scenes a file holds, from its header."""
    try:
        with safetensors.safe_open(file, framework="np") as stream:
            kind = (stream.metadata() or {}).get("irlvla", "").partition(" ")[0] or "something else"
            if kind == Scene.__name__:
                return stream.get_slice("time_us").get_shape()[0]
    except Exception as error:
        raise FileError(f"{file} is not a whole file of scenes ({error}); write it again with Scene.save") from error
    raise FileError(f"{file} holds {kind!r:.80}, not {Scene.__name__!r}; give a path with scenes only")
