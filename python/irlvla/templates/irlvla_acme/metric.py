"""A metric: how hard a plan corners."""

import math

import irlvla
from torch import Tensor, nn


class AcmeCornering(irlvla.Metric):
    """Largest lateral acceleration of the proposal that is driven [m/s^2]: speed times yaw rate between its poses."""

    def __call__(self, scene: irlvla.Scene, plan: irlvla.Plan) -> dict[str, Tensor]:
        driven = plan.best()
        steps = nn.functional.pad(driven.poses, (0, 0, 1, 0)).diff(dim=-2) / driven.dt  # from the origin on
        speed = steps[..., :2].norm(dim=-1)
        half_turn = math.pi / driven.dt
        yaw_rate = (steps[..., 2] + half_turn).remainder(2 * half_turn) - half_turn
        return {"cornering": (speed * yaw_rate).abs().amax(-1)}
