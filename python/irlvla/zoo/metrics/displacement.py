"""How far plans are from what the human did."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from irlvla import components
from irlvla.errors import InputError
from irlvla.types import Plan, Scene


class DisplacementMetric(components.Metric):
    """Errors of the proposal that is driven against the human's drive, at the human's times as far as both reach.

    "ade" and "fde": mean and final distance [m]; "ahe" and "fhe": mean and final heading error [rad]; "miss_rate": 1 where
    fde exceeds the limit, else 0. With K > 1 proposals also "min_ade" and "min_fde": each of the proposal that is best at it.
    Between its poses a plan is interpolated linearly. NaN where no human was recorded.
    """

    class Config(components.Config):
        miss_distance: float = Field(2.0, ge=0.0, description="final distance beyond which a plan misses [m]")

    def __call__(self, scene: Scene, plan: Plan) -> dict[str, Tensor]:
        """Raises `InputError` for plans that are not finite, of other scenes, or that end before the human's first pose."""
        if plan.poses.ndim != 4 or len(plan) != len(scene):
            raise InputError(f"{len(scene)} scenes need plans of shape ({len(scene)}, K, T, 3), got {tuple(plan.poses.shape)}")
        if not bool(plan.poses.isfinite().all()):
            raise InputError("the plans hold NaN or infinity")
        distance, turn = (errors[:, 0] for errors in _errors(plan.best().poses[:, None], plan.dt, scene))
        fde = distance[:, -1]
        values = {
            "ade": distance.mean(-1),
            "fde": fde,
            "ahe": turn.mean(-1),
            "fhe": turn[:, -1],
            "miss_rate": torch.where(fde.isnan(), fde, (fde > self.config.miss_distance).to(fde)),
        }
        if plan.poses.shape[1] > 1:
            distance, _ = _errors(plan.poses, plan.dt, scene)
            values |= {"min_ade": distance.mean(-1).amin(1), "min_fde": distance[..., -1].amin(1)}
        return values


def _errors(poses: Float[Tensor, "B K T 3"], dt: float, scene: Scene) -> tuple[Float[Tensor, "B K N"], Float[Tensor, "B K N"]]:
    """Distances [m] and heading errors [rad] to the N poses of the human that both reach."""
    reach = min(poses.shape[-2] * dt, scene.human.shape[-2] * scene.human_dt)
    count = int(reach / scene.human_dt + 1e-6)
    if count == 0:
        raise InputError(f"the plans end after {reach:g} s, before the human's first pose at {scene.human_dt:g} s: nothing can be compared")
    times = torch.arange(1, count + 1, dtype=torch.float64, device=poses.device) * scene.human_dt
    dx, dy, turn = (_poses_at(times, poses.double(), dt) - scene.human[:, None, :count]).unbind(-1)
    return torch.hypot(dx, dy), _wrapped(turn).abs()


def _poses_at(times: Float[Tensor, " N"], poses: Float[Tensor, "*lead T 3"], dt: float) -> Float[Tensor, "*lead N 3"]:
    """Poses in between those of a plan, which starts at the origin at t = 0."""
    knots = torch.nn.functional.pad(poses, (0, 0, 1, 0))
    steps = knots.diff(dim=-2)
    steps = torch.cat([steps[..., :2], _wrapped(steps[..., 2:])], -1)
    place = times / dt
    before = place.long().clamp(max=poses.shape[-2] - 1)
    return knots[..., before, :] + (place - before)[:, None] * steps[..., before, :]


def _wrapped(angle: Tensor) -> Tensor:
    """An angle in [-pi, pi]."""
    return torch.atan2(angle.sin(), angle.cos())
