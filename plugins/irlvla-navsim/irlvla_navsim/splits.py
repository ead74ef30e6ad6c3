"""Which windows of the logs make a split: NAVSIM's official ones, or a scene filter of one's own.

`splits.npz` and `mappings/` hold facts of the devkit's configuration (its scene filters, and which synthetic scenes continue which
recorded ones), at the commit that their entry `source` names. `make_splits.py`, beside the package, writes them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import yaml
from pydantic import Field

from irlvla import Config, FileError
from irlvla.errors import did_you_mean

TwoStageName = Literal["navhard_two_stage", "warmup_two_stage"]
SplitName = Literal["navtrain", "navtrain_train", "navtrain_val", "navtest", "navmini", TwoStageName]
TWO_STAGES: tuple[str, ...] = get_args(TwoStageName)
SPLITS: tuple[str, ...] = get_args(SplitName)
PARTS = {"navtrain_train": "navtrain", "navtrain_val": "navtrain"}  #: splits that are the scenes of another one, from some of its logs
FACTS = Path(__file__).parent


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
    with np.load(FACTS / "splits.npz", allow_pickle=False) as data:
        whole = PARTS.get(name, name)
        history, future, interval = data[f"{whole}_windows"].tolist()
        return SceneFilter(
            num_history_frames=history,
            num_future_frames=future,
            frame_interval=interval or None,
            log_names=tuple(data[f"{name}_logs"].tolist()),
            tokens=frozenset(f"{token:016x}" for token in data[f"{whole}_tokens"].tolist()),
        )


@functools.cache
def folder_of(name: str) -> str:
    """The part of the dataset that a split is cut from: mini, trainval or test."""
    with np.load(FACTS / "splits.npz", allow_pickle=False) as data:
        return str(data[f"{PARTS.get(name, name)}_folder"])


@functools.cache
def source() -> str:
    """Where the facts are from: the devkit's repository and its commit."""
    with np.load(FACTS / "splits.npz", allow_pickle=False) as data:
        return str(data["source"])


def mapping_of(name: str) -> Path:
    """The file of an official two-stage split that says which synthetic scenes continue which recorded ones."""
    return FACTS / "mappings" / f"{name}.json"


def second_stage(name: str) -> frozenset[str]:
    """The synthetic scenes of an official two-stage split."""
    groups: Mapping[str, list[tuple[str, str, list[list[str]]]]] = json.loads(mapping_of(name).read_text())
    return frozenset(token for _, _, pairs in groups["reactive_all_mapping"] for pair in pairs for token in pair)
