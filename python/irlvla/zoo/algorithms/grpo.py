"""Group relative policy optimisation: plans are compared with the other plans of their scene."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from irlvla.components import Planner
from irlvla.errors import InputError
from irlvla.types import METRICS, Features, Rollout
from irlvla.zoo.algorithms.advantages import columns, weighted, within_groups
from irlvla.zoo.algorithms.objective import PolicyGradient

SAFE = [METRICS.index(name) for name in ("nc", "dac")]


class Grpo(PolicyGradient):
    """GRPO (Shao et al. 2024) over denoising (DiffusionDriveV2, ReCogDrive): without critic, the baseline is the mean of a group.

    With `group: anchor` plans are compared with those from the same anchor of the planner alone, so that a turn does not lose against
    going straight; that takes several plans of each anchor (DiffusionDriveV2 has 4 of each of 20: candidates = 80).
    """

    class Config(PolicyGradient.Config):
        group: Literal["scene", "anchor", "both"] = Field(
            "scene", description="who is compared: all plans of a scene, those of the same anchor, or the mean of both"
        )
        truncate: bool = Field(
            False, description="no advantage below 0, but -1 for plans that collide or leave the road (DiffusionDriveV2)"
        )

    def goals(self, planner: Planner, features: Features, rollout: Rollout) -> dict[str, Tensor]:
        if rollout.reward.shape[1] < 2:
            raise InputError(f"{self} compares plans of a scene, and was given one: candidates must be at least 2")
        measured, weights = columns(rollout, self.config.metrics)
        found = [weighted(within_groups(measured, group), weights) for group in self._groups(planner, rollout)]
        advantage = torch.stack(found).mean(0)
        if self.config.truncate:
            unsafe = (rollout.values[..., SAFE] < 1.0).any(-1)
            advantage = torch.where(unsafe, -1.0, advantage.clamp(min=0.0))
        return {"advantage": advantage}

    def _groups(self, planner: Planner, rollout: Rollout) -> list[Int[Tensor, "B K"]]:
        groups = []
        if self.config.group in ("scene", "both"):
            groups.append(torch.zeros_like(rollout.reward, dtype=torch.long))
        if self.config.group in ("anchor", "both"):
            anchor_of = getattr(planner, "anchor_of", None)
            if anchor_of is None:
                raise InputError(f"{self}: group={self.config.group} needs a planner with anchors, but {planner} has none; set group=scene")
            groups.append(anchor_of(rollout.plan))
        return groups
