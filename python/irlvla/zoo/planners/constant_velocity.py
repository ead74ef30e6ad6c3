"""Straight on at the present speed: NAVSIM's simplest baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from irlvla import components
from irlvla.types import HORIZON, Features, Plan, StateIndex, Trajectory

INTERVAL = 0.5  # seconds between poses


class ConstantVelocityPlanner(components.Planner):
    """Straight ahead at the present speed, whatever its direction (NAVSIM's ConstantVelocityAgent). It learns nothing and reads no tokens.

    Its K proposals are all the same.
    """

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        return {}

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        ego = features.observation.ego[:, -1]
        speed = ego[:, [StateIndex.VX, StateIndex.VY]].norm(dim=-1)
        times = torch.arange(1, round(HORIZON / INTERVAL) + 1, device=ego.device) * INTERVAL
        distance = speed[:, None] * times
        poses = torch.stack([distance, torch.zeros_like(distance), torch.zeros_like(distance)], -1)
        return Plan(poses[:, None].repeat(1, k, 1, 1), INTERVAL)
