"""PDM-Closed as a planner: what a rule-based driver does who is told where everything is."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Generator, Tensor

from irlvla import components
from irlvla.errors import InputError
from irlvla.pdm import reference_plans
from irlvla.types import STEP, Features, Plan, Scene, Trajectory


class PdmClosedPlanner(components.Planner):
    """Drives the PDM-Closed plan of the scene: `Scene.reference`, or `irlvla.pdm_closed` where there is none. Learns nothing.

    It is privileged: it needs `Observation.scene`. The plan has all 40 poses of 0.1 s, in float64, because 8 of them
    drive differently once interpolated. It scores as the reference does, but where this begins on the path and not at
    the car (see `pdm_closed`): no plan can say so, and EP may fall short of 1 by half a percent.

    PDM-Closed has one opinion: its K proposals are all the same.
    """

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        return {}

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        """Raises `InputError` for an observation without scene, and for a scene without centreline."""
        scene = features.observation.scene
        if scene is None:
            raise InputError(
                f"{self} plans from the truth, and these observations have no scene: take a dataset that puts it there; "
                "the built-in 'scenes' does with privileged: true"
            )
        poses = scene.in_ego_frame(_reference(scene))[:, 1:]
        return Plan(poses[:, None].repeat(1, k, 1, 1), STEP)


def _reference(scene: Scene) -> Float[Tensor, "B 41 3"]:
    """The PDM-Closed plans in the map frame; computed where the scenes carry none."""
    reference = reference_plans(scene)
    if unroutable := [token for token, plan in zip(scene.token, reference, strict=True) if plan.isnan().any()]:
        raise InputError(f"PDM-Closed has no plan where there is no centreline: {', '.join(map(repr, unroutable))}")
    return reference
