"""A dataset: straight roads."""

from typing import Any

import irlvla
from irlvla.testing import example_observation
from pydantic import Field


class AcmeRoad(irlvla.Dataset):
    """Generated scenes on a straight road, with cameras that see noise. Read your own data here."""

    class Config(irlvla.Config):
        scenes: int = Field(16, ge=1, description="how many")
        cameras: int = Field(2, ge=0, description="how many cameras the car has")
        seed: int = Field(0, ge=0, description="another seed gives other scenes")

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    def __len__(self) -> int:
        return self.config.scenes

    def __getitem__(self, index: int) -> tuple[irlvla.Observation, irlvla.Scene, irlvla.Trajectory]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self} has {len(self)} scenes, there is none at {index}")
        obs = example_observation(1, self.config.cameras, seed=self.config.seed * len(self) + index)
        assert obs.scene is not None
        return obs, obs.scene, irlvla.Trajectory(obs.scene.human.float(), obs.scene.human_dt)
