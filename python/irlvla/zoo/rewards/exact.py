"""The exact reward: EPDMS itself."""

from __future__ import annotations

from pydantic import Field

from irlvla import components
from irlvla.scoring import HumanFilter, Traffic, epdms
from irlvla.types import Epdms, Observation, Plan, Scene


class ExactReward(components.RewardModel):
    """`irlvla.epdms`, in the place of a learned reward. It ignores the observation, and gives no gradient.

    EC stays NaN, which `Epdms.score` leaves out: it compares with the plan of the previous frame, which a reward does not see.
    """

    class Config(components.Config):
        human_filter: HumanFilter = Field("fixed", description="what a metric that the human fails means for plans, as in irlvla.epdms")
        traffic: Traffic = Field("log", description="how the other agents move, as in irlvla.epdms")

    def forward(self, obs: Observation, scene: Scene, plan: Plan) -> Epdms:
        return epdms(scene, plan, human_filter=self.config.human_filter, traffic=self.config.traffic)
