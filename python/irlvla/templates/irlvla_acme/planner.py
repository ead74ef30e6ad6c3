"""A planner: constant velocity, corrected by an MLP, with Gaussian noise."""

import irlvla
import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.distributions import Normal

POSES, DT = 8, 0.5  # every DT seconds, to 4 s


class AcmeGaussian(irlvla.Planner):
    """Normally distributed poses; their mean is constant velocity plus what an MLP makes of the status token."""

    class Config(irlvla.Config):
        hidden: int = Field(128, ge=1, description="width of the hidden layer")
        noise: float = Field(0.1, gt=0, description="standard deviation of a pose, per second ahead [m, rad]")

    def __init__(self, config: Config, *, width: int) -> None:
        super().__init__(config)
        self.mlp = nn.Sequential(nn.Linear(width, config.hidden), nn.GELU(), nn.Linear(config.hidden, POSES * 3))

    def distribution(self, features: irlvla.Features) -> Normal:
        """Of the poses "B T 3"."""
        if features.status is None:
            raise irlvla.InputError(f"{self} needs status tokens; take a backbone that makes them")
        speed = features.observation.ego[:, -1, irlvla.StateIndex.VX]
        times = torch.arange(1, POSES + 1, device=speed.device) * DT
        straight = nn.functional.pad((speed[:, None] * times)[..., None], (0, 2))
        deviation = self.config.noise * times[:, None].expand(-1, 3)
        return Normal(straight + self.mlp(features.status).unflatten(1, (POSES, 3)), deviation)

    def loss(self, features: irlvla.Features, human: irlvla.Trajectory) -> dict[str, Tensor]:
        known = ~human.poses.isnan()  # none was recorded where it is NaN
        errors = (self.distribution(features).mean - human.poses.nan_to_num()).abs()
        return {"imitation": (errors * known).sum() / known.sum().clamp(min=1)}

    def sample(self, features: irlvla.Features, k: int, *, generator: Generator | None = None) -> irlvla.Plan:
        poses = self.distribution(features)
        mean = poses.mean[:, None].expand(-1, k, -1, -1)
        return irlvla.Plan(mean + poses.stddev[:, None] * torch.randn(mean.shape, generator=generator, device=mean.device), DT)

    def log_prob(self, features: irlvla.Features, plan: irlvla.Plan) -> Tensor:
        poses = self.distribution(features)
        return Normal(poses.mean[:, None], poses.stddev[:, None]).log_prob(plan.poses).sum((-2, -1))[..., None]  # one step: D = 1
