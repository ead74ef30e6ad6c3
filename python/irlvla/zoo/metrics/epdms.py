"""EPDMS and its sub-metrics."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from irlvla import components, scoring
from irlvla.types import METRICS, Plan, Scene


class EpdmsMetric(components.Metric):
    """EPDMS of the proposal that is driven, and its nine sub-metrics by name (`irlvla.epdms`); on request also "pdms" (v1).

    With K > 1 proposals also "max_epdms": the best of them, which a perfect choice among them would reach.
    "ec" is NaN, and does not count: it needs the plan of the previous frame.
    """

    class Config(components.Config):
        human_filter: scoring.HumanFilter = Field(
            "fixed", description="what a metric that the human fails means for plans, as in irlvla.epdms"
        )
        traffic: scoring.Traffic = Field("log", description="how the other agents move, as in irlvla.epdms")
        pdms: bool = Field(False, description="also the score of NAVSIM v1; needs scenes with agents over 5 s")

    def __call__(self, scene: Scene, plan: Plan) -> dict[str, Tensor]:
        options = {"human_filter": self.config.human_filter, "traffic": self.config.traffic}
        driven = scoring.epdms(scene, plan.best(), pdms=self.config.pdms, **options)
        values = {"epdms": driven.score(), **dict(zip(METRICS, driven.values.unbind(-1), strict=True))}
        if driven.pdms is not None:
            values["pdms"] = driven.pdms.score()
        if plan.poses.shape[1] > 1:
            values["max_epdms"] = scoring.epdms(scene, plan, **options).score().amax(1)
        return values
