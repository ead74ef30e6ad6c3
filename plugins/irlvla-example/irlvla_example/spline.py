"""A planner that drives cubic splines."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.distributions import Normal

import irlvla
from irlvla.types import HORIZON, StateIndex
from irlvla_example.curve import natural_spline

POSES, INTERVAL = 8, 0.5  #: of a plan: how many, and seconds between them
LEAST_SPREAD = 0.05  #: of a knot [m]: a recorded drive is not known better
CREEP = 0.5  #: a car that is slower [m/s] keeps its heading


class SplinePlanner(irlvla.Planner):
    """Natural cubic splines from the car through knots, which are drawn from Gaussians.

    An MLP reads the Gaussians off the status token and, if there are any, the mean of the agents' tokens. It says how far a knot
    is from where the car would be straight on at its present speed.
    """

    class Config(irlvla.Config):
        knots: int = Field(4, ge=2, le=POSES, description="knots of a spline, evenly spaced in time, the last at 4 s")
        spread: float = Field(2.0, gt=0.0, description="standard deviation of the last knot before training [m]; earlier ones have less")

    positions: Tensor
    velocities: Tensor
    knots_of: Tensor

    def __init__(self, config: Config, *, width: int) -> None:
        super().__init__(config)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2 * config.knots * 2))
        positions, velocities = natural_spline(config.knots, torch.arange(1, POSES + 1) * INTERVAL)
        self.register_buffer("positions", positions.float())  # from knots to poses
        self.register_buffer("velocities", velocities.float())
        self.register_buffer("knots_of", torch.linalg.pinv(positions).float())  # and back, by least squares

    def gaussian(self, features: irlvla.Features) -> Normal:
        """The knots "B 1 knots 2" in the ego frame. Raises `InputError` without a status token."""
        if features.status is None:
            raise irlvla.InputError(f"{self} needs a status token, which this backbone does not make; try backbone=status")
        token = features.status
        if (agents := features.agents) is not None:
            valid = agents.new_ones(agents.shape[:2]) if features.agents_valid is None else features.agents_valid.to(agents)
            token = token + (valid[..., None] * agents).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        shift, log_scale = self.mlp(token).unflatten(-1, (2, 1, -1, 2)).unbind(1)
        velocity = features.observation.ego[:, -1, [StateIndex.VX, StateIndex.VY]]
        done = torch.arange(1, self.config.knots + 1, device=token.device)[:, None] / self.config.knots  # of the 4 s, at each knot
        mean = velocity[:, None, None] * HORIZON * done + shift
        return Normal(mean, LEAST_SPREAD + self.config.spread * done * log_scale.exp())

    def loss(self, features: irlvla.Features, human: irlvla.Trajectory) -> dict[str, Tensor]:
        """Negative log-likelihood of the human's drive, where one was recorded. Raises as `log_prob` does."""
        known = human.poses.isfinite().flatten(1).all(1)
        log_prob = self.log_prob(features, irlvla.Plan(human.poses[:, None].nan_to_num(), human.dt))[:, 0, 0]
        return {"nll": -(known * log_prob).sum() / known.sum().clamp(min=1)}

    def sample(self, features: irlvla.Features, k: int, *, generator: Generator | None = None) -> irlvla.Plan:
        """Of the K proposals the likeliest is driven."""
        gaussian = self.gaussian(features)
        noise = torch.randn(gaussian.mean.expand(-1, k, -1, -1).shape, generator=generator, device=gaussian.mean.device)
        knots = gaussian.mean + gaussian.stddev * noise
        return irlvla.Plan(self.poses(knots), INTERVAL, score=gaussian.log_prob(knots).sum((-2, -1)))

    def log_prob(self, features: irlvla.Features, plan: irlvla.Plan) -> Float[Tensor, "B K 1"]:
        """Of the knots whose spline fits the positions best: those of its own plans, exactly.

        Raises `InputError` unless the plan has 8 poses, 0.5 s apart.
        """
        if plan.poses.shape[-2] != POSES or abs(plan.dt - INTERVAL) > 1e-6:
            given = f"{plan.poses.shape[-2]} poses, {plan.dt} s apart"
            raise irlvla.InputError(f"{self} knows plans and drives of {POSES} poses, {INTERVAL} s apart, got {given}")
        knots = self.knots_of @ plan.poses[..., :2].to(self.knots_of)
        return self.gaussian(features).log_prob(knots).sum((-2, -1))[..., None]

    def poses(self, knots: Float[Tensor, "B K knots 2"]) -> Float[Tensor, "B K T 3"]:
        """Poses along splines. The car heads where it goes; where it stands, as it did before."""
        velocity = self.velocities @ knots
        heading = torch.atan2(velocity[..., 1], velocity[..., 0])
        order = torch.arange(1, POSES + 1, device=knots.device)
        last_moving = ((velocity.norm(dim=-1) > CREEP) * order).cummax(-1).values  # 0 = has not moved yet
        heading = nn.functional.pad(heading, (1, 0)).gather(-1, last_moving)
        return torch.cat([self.positions @ knots, heading[..., None]], -1)
