"""What planners share whose proposals begin at anchors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from irlvla import components
from irlvla.errors import ConfigError, InputError
from irlvla.types import HORIZON, Plan, Trajectory
from irlvla.zoo.planners.anchors import choose, nearest, read_trajectories
from irlvla.zoo.planners.curves import Curves, fan
from irlvla.zoo.planners.decoder import TrajectoryDecoder


class AnchoredPlanner(components.Planner):
    """A planner with anchors: drives that stand for all, from which its proposals begin.

    `fit` takes them from human drives by K-means, or from a file; before it they are a fan of arcs.
    """

    class Config(TrajectoryDecoder.Config):
        poses: int = Field(8, ge=2, description="poses of a plan")
        interval: float = Field(0.5, gt=0.0, description="seconds between them; together they cover 4 s")
        anchors: int = Field(20, ge=1, description="how many anchors")
        anchors_file: Path | None = Field(
            None, description="take them from this .npy file (anchors, poses, 2 or 3) instead of human drives"
        )
        explore: bool = Field(False, description="draw plans from the density that log_prob is of; false = drive what is thought best")

    anchors: Tensor

    def __init__(self, config: Any, *, width: int, chained: bool = False, refines: bool = True) -> None:
        """Raises `ConfigError` for poses that do not cover the horizon, and for heads that do not divide the width."""
        super().__init__(config)
        if abs(config.poses * config.interval - HORIZON) > 1e-6:
            raise ConfigError(f"{config.poses} poses, {config.interval} s apart, do not cover {HORIZON:g} s; take 8 and 0.5, or 40 and 0.1")
        self.explore = config.explore
        curves = Curves(config.poses, config.interval)
        self.decoder = TrajectoryDecoder(config, width, curves, chained=chained, refines=refines)
        self.register_buffer("anchors", self.curves.poses(fan(config.anchors, config.poses, config.interval)))

    @property
    def curves(self) -> Curves:
        """Between positions and the coordinates that are learnt."""
        return self.decoder.curves

    def fit(self, human: Trajectory) -> None:
        """Take coordinates and anchors from human drives; scenes without one (NaN) do not count.

        Raises:
            InputError: there is no drive, or they have other poses than plans.
            ConfigError: `anchors_file` holds another number of anchors.
            FileError: it cannot be read.
        """
        drives, known = self.drives(human)
        if not bool(known.any()):
            raise InputError(f"{self} was given {len(drives)} drives to fit to, none of which was recorded")
        anchors = self._from_file() if self.config.anchors_file else choose(drives[known], self.config.anchors, self.config.interval)
        self.curves.fit(drives[known])
        self.anchors.copy_(anchors if anchors.shape[-1] == 3 else self.curves.poses(anchors.to(self.anchors)))

    def _from_file(self) -> Float[Tensor, "M T columns"]:
        path, count = self.config.anchors_file, self.config.anchors
        found = read_trajectories(path, self.config.poses)
        if len(found) != count:
            raise ConfigError(f"{self}: {path} holds {len(found)} trajectories, but anchors={count}; set anchors={len(found)}")
        return found

    def drives(self, human: Trajectory) -> tuple[Float[Tensor, "B T 2"], Bool[Tensor, " B"]]:
        """Positions of human drives at the times of a plan (0 where none was recorded), and where one was.

        Raises `InputError` for drives that have no pose at one of these times.
        """
        poses, interval = self.config.poses, self.config.interval
        stride = max(1, round(interval / human.dt))
        if abs(stride * human.dt - interval) > 1e-6 or human.poses.shape[-2] < stride * poses:
            given = f"{human.poses.shape[-2]} poses, {human.dt:g} s apart"
            raise InputError(f"{self} learns from drives with a pose every {interval:g} s for {HORIZON:g} s, got {given}")
        positions = human.poses[:, stride - 1 : stride * poses : stride, :2]
        known = positions.isfinite().flatten(1).all(1)
        return torch.where(known[:, None, None], positions, 0.0).float(), known

    def starts(self, batch: int, draws: int = 1) -> Float[Tensor, "B N T 2"]:
        """Coordinates of the anchors, so many times one after the other."""
        return self.curves.coordinates(self.anchors[..., :2]).repeat(draws, 1, 1).expand(batch, -1, -1, -1)

    def anchor_of(self, plan: Plan) -> Int[Tensor, "B K"]:
        """Which anchor each proposal comes from. Raises as `trace` does."""
        _, anchors = self.trace(plan)
        return nearest(self.curves.positions(anchors), self.anchors[..., :2])

    def trace(self, plan: Plan) -> tuple[Float[Tensor, "B K states T 2"], Float[Tensor, "B K T 2"]]:
        """The chain of a plan and the anchors that it comes from, in coordinates.

        Raises `InputError` for a plan without a trace, or with that of another planner.
        """
        expected = (*plan.poses.shape[:2], self.steps + 1, 2, self.config.poses, 2)
        if plan.trace is None or tuple(plan.trace.shape) != expected:
            given = "none" if plan.trace is None else f"one of shape {tuple(plan.trace.shape)}"
            raise InputError(f"{self} needs the trace of its own sample(), of shape {expected}; this plan has {given}")
        states, anchors = plan.trace.float().unbind(3)
        return states, anchors[:, :, 0]

    def chain(self, plan: Plan) -> Float[Tensor, "B K states T 3"]:
        """The poses that the chain of a plan goes through, from the noise to the plan itself. Raises as `trace` does."""
        states, _ = self.trace(plan)
        return self.curves.poses(self.curves.positions(states))

    @property
    def steps(self) -> int:
        """D: steps from where a trace begins to the plan."""
        return 1

    def plan(
        self, states: Sequence[Float[Tensor, "B N T 2"]], anchors: Float[Tensor, "B N T 2"], score: Float[Tensor, "B N"], k: int
    ) -> Plan:
        """The K of N proposals with the highest scores, the best first; traces show their states, each beside its anchor."""
        score, rows = score.topk(k, dim=1)
        trace = torch.stack([torch.stack([state, anchors], 2) for state in states], 2)
        trace = trace.take_along_dim(rows[:, :, None, None, None, None], 1)
        poses = self.curves.poses(self.curves.positions(trace[:, :, -1, 0]))
        return Plan(poses, self.config.interval, trace=trace, score=score)
