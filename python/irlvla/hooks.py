"""The hooks that a plugin may implement. Each is optional; mark an implementation with `@irlvla.hookimpl`.

A component hook returns names and targets: a class, or "package.module:Class", which is imported only when it is used.
Name your components after your package ("acme_spline"): a name that two packages provide is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from irlvla.components import Algorithm, Backbone, Dataset, Metric, Planner, Reasoner, RewardModel
    from irlvla.run import Run

PROJECT = "irlvla"  #: name of the project for pluggy, and of the entry-point group
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def irlvla_backbones() -> Mapping[str, type[Backbone] | str]:
    """Image and scene encoders."""


@hookspec
def irlvla_reasoners() -> Mapping[str, type[Reasoner] | str]:
    """Semantic reasoners."""


@hookspec
def irlvla_planners() -> Mapping[str, type[Planner] | str]:
    """Planners."""


@hookspec
def irlvla_reward_models() -> Mapping[str, type[RewardModel] | str]:
    """Reward models."""


@hookspec
def irlvla_rl_algorithms() -> Mapping[str, type[Algorithm] | str]:
    """RL algorithms."""


@hookspec
def irlvla_datasets() -> Mapping[str, type[Dataset] | str]:
    """Datasets."""


@hookspec
def irlvla_metrics() -> Mapping[str, type[Metric] | str]:
    """Metrics."""


@hookspec
def irlvla_run_started(run: Run) -> None:
    """A run begins: its directory and config stand. Only the main process calls the run hooks."""


@hookspec
def irlvla_log(run: Run, step: int, values: Mapping[str, float]) -> None:
    """Values at a step, as they go to metrics.jsonl."""


@hookspec
def irlvla_run_finished(run: Run, error: BaseException | None) -> None:
    """A run ends: `error` is what ended it, None if nothing did."""
