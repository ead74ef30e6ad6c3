"""Straight on at the present speed: NAVSIM's simplest baseline."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor

from irlvla.components import Planner
from irlvla.types import Features, Plan, Trajectory


class ConstantVelocityPlanner(Planner):
    """Straight on at the present speed (NAVSIM's ConstantVelocityAgent). Learns nothing; needs no backbone but any."""

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        return {}

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        ego = features.observation.ego[:, -1]
        times = torch.arange(1, 9, device=ego.device, dtype=ego.dtype) * 0.5
        poses = torch.zeros(len(ego), k, len(times), 3, device=ego.device, dtype=ego.dtype)
        poses[..., 0] = torch.linalg.vector_norm(ego[:, 3:5], dim=-1)[:, None, None] * times
        return Plan(poses)
