"""Which windows of the logs make a split: NAVSIM's official ones, or a scene filter of one's own.

`splits.npz` holds facts of the devkit's configuration (its scene filters), at the commit that its entry `source` names.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import yaml
from pydantic import Field

from irlvla import Config, FileError
from irlvla.errors import did_you_mean

SplitName = Literal["navtrain", "navtest", "navmini", "navhard_two_stage", "warmup_two_stage"]
SPLITS: tuple[str, ...] = get_args(SplitName)


class SceneFilter(Config):
    """Which windows of the logs: the fields of the devkit's scene filters, so that its YAML files can be given as they are."""

    num_history_frames: int = Field(default=4, ge=4, description="frames up to the present one")
    num_future_frames: int = Field(default=10, ge=8, description="frames after it")
    frame_interval: int | None = Field(default=None, ge=1, description="frames from one window to the next; null = as long as a window")
    has_route: bool = Field(default=True, description="leave out windows without a route")
    max_scenes: int | None = Field(default=None, ge=1, description="at most so many; null = all")
    log_names: tuple[str, ...] | None = Field(default=None, description="only these logs; null = all")
    tokens: frozenset[str] | None = Field(default=None, description="only windows whose present frame is one of these; null = all")

    @property
    def length(self) -> int:
        return self.num_history_frames + self.num_future_frames


def read_filter(path: Path) -> SceneFilter:
    """A scene filter of the devkit (`scene_filter/navtest.yaml`); what does not concern the first stage is ignored."""
    try:
        fields = yaml.safe_load(path.read_text())
        known = {name: value for name, value in fields.items() if name in SceneFilter.model_fields}
        return SceneFilter.model_validate(known)
    except FileNotFoundError as error:
        near = did_you_mean(path.name, (file.name for file in path.parent.glob("*.yaml")))
        raise FileError(f"the scene filter {path} does not exist. {near}".rstrip()) from error
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise FileError(f"{path} is no scene filter: {error}") from error


def read_split(name: str) -> SceneFilter:
    """The windows of an official split; of two-stage ones those of the first stage."""
    with resources.files(__package__).joinpath("splits.npz").open("rb") as stream, np.load(stream, allow_pickle=False) as data:
        history, future, interval = data[f"{name}_windows"].tolist()
        return SceneFilter(
            num_history_frames=history,
            num_future_frames=future,
            frame_interval=interval or None,
            log_names=tuple(data[f"{name}_logs"].tolist()) or None,
            tokens=frozenset(f"{token:016x}" for token in data[f"{name}_tokens"].tolist()),
        )
