"""The human's drive as a planner: what to compare with."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor

from irlvla import components
from irlvla.errors import InputError
from irlvla.types import Features, Plan, Trajectory


class HumanPlanner(components.Planner):
    """Drives as the human of the scene did, to the last bit. Learns nothing. It is privileged: it needs `Observation.scene`.

    The human has one opinion: its K proposals are all the same.
    """

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        return {}

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        """Raises `InputError` for an observation without scene, and for a scene of which no drive was recorded."""
        scene = features.observation.scene
        if scene is None:
            raise InputError(
                f"{self} repeats a recorded drive, and these observations have no scene: take a dataset that puts it there; "
                "the built-in 'scenes' does with privileged: true"
            )
        missing = scene.human.isnan().flatten(1).any(1).tolist()
        if unrecorded := [token for token, lacks in zip(scene.token, missing, strict=True) if lacks]:
            raise InputError(f"{self} has no drive to repeat where none was recorded: {', '.join(map(repr, unrecorded))}")
        return Plan(scene.human[:, None].repeat(1, k, 1, 1), scene.human_dt)
