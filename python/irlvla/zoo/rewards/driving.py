"""Plans as the car drives them: where it is, how it moves, what its body covers, and whether that is comfortable."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from irlvla import ops
from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, STEP, WIDTH, Observation, Plan

#: Points of the car, from its rear axle [m]: the centre and the corners, which decide whether it is on the road.
FOOTPRINT = [
    (REAR_AXLE_TO_CENTRE + along * LENGTH / 2.0, across * WIDTH / 2.0) for along, across in ((0, 0), (1, 1), (1, -1), (-1, -1), (-1, 1))
]
HISTORY_STEP = 0.5  #: seconds between the frames of an observation


def planned(plan: Plan, times: Float[Tensor, " S"]) -> Float[Tensor, "B K S 3"]:
    """Poses of a plan at times [s]: straight from one to the next, the first from the origin."""
    poses, places = functional.pad(plan.poses, (0, 0, 1, 0)), times / plan.dt
    row = places.floor().long().clamp(0, poses.shape[-2] - 2)
    step = poses.diff(dim=-2)
    step = torch.cat([step[..., :2], torch.atan2(step[..., 2:].sin(), step[..., 2:].cos())], -1)
    return poses[..., row, :] + (places - row)[:, None] * step[..., row, :]


def simulated(obs: Observation, plan: Plan) -> Float[Tensor, "B K 41 11"]:
    """States of the car in the ego frame when the tracker and the vehicle model of the score drive a plan (`irlvla.ops.simulate`).

    The present state is all that they need of a scene, and the observation has it: the states are those of the score.
    """
    with torch.autocast(plan.poses.device.type, enabled=False):
        poses = plan.poses.detach().double()
        now = functional.pad(obs.ego[:, -1, 3:].double(), (3, 3)).repeat_interleave(poses.shape[1], 0)
        states = ops.simulate(poses.flatten(0, 1), now, torch.zeros_like(now[:, 0], dtype=torch.int64), plan.dt)
        return states.unflatten(0, poses.shape[:2])


def driven(plan: Plan, states: Float[Tensor, "B K 41 11"], times: Float[Tensor, " S"]) -> Float[Tensor, "B K S 3"]:
    """Poses of simulated states at times [s], which are multiples of 0.1. Their gradient is that of the planned poses."""
    poses = planned(plan, times).float()
    found = states[..., (times / STEP).round().long(), :3].to(poses)
    return poses + (found - poses).detach()


def comfortable(obs: Observation, states: Float[Tensor, "B K 41 11"]) -> Bool[Tensor, "B K"]:
    """HC of simulated states, with the past that was observed, as the score takes it: at 0.1 s, without its last sample."""
    shape, rows = states.shape[:2], states.flatten(0, 1)
    if obs.ego.shape[1] > 1:
        past, per_frame = obs.ego.double(), round(HISTORY_STEP / STEP)
        places = torch.arange((past.shape[1] - 1) * per_frame - 1, device=past.device, dtype=torch.float64) / per_frame
        row = places.floor().long()
        step = past.diff(dim=1)
        step[..., 2] = torch.atan2(step[..., 2].sin(), step[..., 2].cos())
        past = functional.pad(past[:, row] + (places - row)[:, None] * step[:, row], (0, 3))
        rows = torch.cat([past.repeat_interleave(shape[1], 0), rows], 1)
    return ops.comfort(rows).all(-1).unflatten(0, shape)


def under(poses: Float[Tensor, "... 3"]) -> Float[Tensor, "... 5 2"]:
    """Where the points of the car are [m]."""
    along, across = torch.tensor(FOOTPRINT, device=poses.device, dtype=poses.dtype).unbind(1)
    x, y, heading = poses[..., None].unbind(-2)
    cos, sin = heading.cos(), heading.sin()
    return torch.stack([x + cos * along - sin * across, y + sin * along + cos * across], -1)


def motion(poses: Float[Tensor, "B K S 3"], speed: Float[Tensor, " B"], dt: float) -> Float[Tensor, "B K S 6"]:
    """How the car moves at poses that are `dt` seconds apart: cosine and sine of its heading, speed, acceleration along and
    across, yaw rate; each divided by what is usual."""
    step = functional.pad(poses, (0, 0, 1, 0)).diff(dim=-2)
    turn = torch.atan2(step[..., 2].sin(), step[..., 2].cos()) / dt
    cos, sin = poses[..., 2].cos(), poses[..., 2].sin()
    now = (cos * step[..., 0] + sin * step[..., 1]) / dt
    before = torch.cat([speed.to(now)[:, None, None].expand(*now.shape[:2], 1), now[..., :-1]], -1)
    return torch.stack([cos, sin, now / 10.0, (now - before) / dt / 3.0, now * turn / 3.0, turn / 0.3], -1)
