"""REINFORCE with a baseline: each plan is compared with the others of its scene, and all have one scale."""

from __future__ import annotations

from torch import Tensor

from irlvla.components import Planner
from irlvla.errors import InputError
from irlvla.types import Features, Rollout
from irlvla.zoo.algorithms.advantages import columns, leave_one_out, standardised, weighted
from irlvla.zoo.algorithms.objective import PolicyGradient


class Reinforce(PolicyGradient):
    """REINFORCE++ (Hu 2025): no critic, the clipped objective, and advantages of mean 0 and deviation 1 over all scenes, so that those
    in which plans hardly differ count little. The baseline leaves one out (RLOO, Ahmadian et al. 2024): it is unbiased.
    """

    def goals(self, planner: Planner, features: Features, rollout: Rollout) -> dict[str, Tensor]:
        if rollout.reward.shape[1] < 2:
            raise InputError(f"{self} compares plans of a scene, and was given one: candidates must be at least 2")
        measured, weights = columns(rollout, self.config.metrics)
        return {"advantage": weighted(standardised(leave_one_out(measured)), weights)}
