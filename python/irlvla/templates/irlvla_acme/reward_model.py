"""A learned reward: an MLP."""

import irlvla
import torch
from pydantic import Field
from torch import Tensor, nn

POSES = 8  # of a plan are looked at


class AcmeMlp(irlvla.RewardModel):
    """Sub-metrics from the car's own state and a plan."""

    class Config(irlvla.Config):
        hidden: int = Field(128, ge=1, description="width of the hidden layer")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        outputs = len(irlvla.METRICS)
        self.mlp = nn.Sequential(nn.Linear(8 + POSES * 3, config.hidden), nn.GELU(), nn.Linear(config.hidden, outputs), nn.Sigmoid())

    def forward(self, obs: irlvla.Observation, scene: irlvla.Scene, plan: irlvla.Plan) -> irlvla.Epdms:
        state = obs.ego[:, -1, None].expand(-1, plan.poses.shape[1], -1)
        poses = nn.functional.interpolate(plan.poses.flatten(0, 1).mT, POSES, mode="linear").mT.flatten(1)
        poses = poses.to(state).unflatten(0, plan.poses.shape[:2])
        return irlvla.Epdms(self.mlp(torch.cat([state, poses], -1) / 10))

    def loss(self, predicted: irlvla.Epdms, measured: irlvla.Epdms) -> dict[str, Tensor]:
        known = ~measured.values.isnan()
        target = torch.where(known, measured.values, 0.0).to(predicted.values)
        errors = nn.functional.binary_cross_entropy(predicted.values, target, reduction="none")
        return {"metrics": (errors * known).sum() / known.sum().clamp(1)}
