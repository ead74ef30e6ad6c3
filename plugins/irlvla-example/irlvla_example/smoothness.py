"""How smoothly a plan drives."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

import irlvla


class SmoothnessMetric(irlvla.Metric):
    """Of the proposal that is driven "max_jerk" [m/s^3] and "max_lateral_acceleration" [m/s^2], the largest along its way.

    Both are finite differences of its poses and of the car's at t = 0, so they depend on how far apart these are.
    """

    def __call__(self, scene: irlvla.Scene, plan: irlvla.Plan) -> dict[str, Float[Tensor, " B"]]:
        """Raises `InputError` for plans of fewer than three poses, which have no jerk."""
        driven = plan.best()
        if driven.poses.shape[-2] < 3:
            raise irlvla.InputError(f"{self} needs plans of three poses or more, got {driven.poses.shape[-2]}")
        poses = torch.nn.functional.pad(driven.poses.double(), (0, 0, 1, 0))  # the car is at the origin at t = 0
        acceleration = poses[..., :2].diff(n=2, dim=-2) / driven.dt**2  # at every pose but the first and the last
        jerk = acceleration.diff(dim=-2) / driven.dt
        heading = poses[:, 1:-1, 2]
        lateral = heading.cos() * acceleration[..., 1] - heading.sin() * acceleration[..., 0]
        return {"max_jerk": jerk.norm(dim=-1).amax(-1), "max_lateral_acceleration": lateral.abs().amax(-1)}
