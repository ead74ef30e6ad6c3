"""The hooks that a plugin may implement. Each is optional; mark an implementation with `@irlvla.hookimpl`.

A component hook returns its components by name: a class, or "package.module:Class", which is imported only when it is used.
Begin your names with that of your package ("acme_spline"): those of irlvla are reserved, and one that two packages provide is
refused. Run hooks are called in the main process only. An implementation may leave out arguments that it does not use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from irlvla.components import Algorithm, Backbone, Benchmark, Dataset, Metric, Planner, Reasoner, RewardModel
    from irlvla.run import Run

PROJECT = "irlvla"  #: name of the project for pluggy, and of the entry-point group
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def irlvla_backbones() -> Mapping[str, type[Backbone] | str]:
    """Backbones: what the policy sees, as tokens."""


@hookspec
def irlvla_reasoners() -> Mapping[str, type[Reasoner] | str]:
    """Reasoners: semantic reasoning, as language tokens."""


@hookspec
def irlvla_planners() -> Mapping[str, type[Planner] | str]:
    """Planners: from tokens to trajectories."""


@hookspec
def irlvla_reward_models() -> Mapping[str, type[RewardModel] | str]:
    """Reward models: sub-metrics of plans, measured or learned."""


@hookspec
def irlvla_rl_algorithms() -> Mapping[str, type[Algorithm] | str]:
    """RL algorithms: how a policy improves by its rewards."""


@hookspec
def irlvla_datasets() -> Mapping[str, type[Dataset] | str]:
    """Datasets: observations, scenes and the human's drives."""


@hookspec
def irlvla_metrics() -> Mapping[str, type[Metric] | str]:
    """Metrics: what `evaluate` measures of a plan."""


@hookspec
def irlvla_benchmarks() -> Mapping[str, type[Benchmark] | str]:
    """Benchmarks: what `evaluate` is set to for a published comparison."""


@hookspec
def irlvla_run_started(run: Run) -> None:
    """A run begins; its directory and its configuration stand."""


@hookspec
def irlvla_log(run: Run, step: int, values: Mapping[str, float]) -> None:
    """Values at a step, as metrics.jsonl gets them."""


@hookspec
def irlvla_run_finished(run: Run, error: BaseException | None) -> None:
    """A run ends: `error` is what ended it, None if it is complete."""
