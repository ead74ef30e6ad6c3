"""A mixture of Gaussians over drives: the simplest planner with a log-probability."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import cross_entropy

from irlvla.types import Features, Plan, Trajectory
from irlvla.zoo.planners.anchored import AnchoredPlanner
from irlvla.zoo.planners.anchors import nearest
from irlvla.zoo.planners.chain import of_anchor


class GaussianPlanner(AnchoredPlanner):
    """One Gaussian around each anchor, diagonal in coordinates of `Curves`, and how probable it is (after MultiPath, CoRL 2019).

    With `explore`, `sample` draws from the mixture. Without, its proposals are the means; where K is more than there are,
    draws from each follow. `log_prob` is the density of the mixture at any plan, in one step.
    """

    class Config(AnchoredPlanner.Config):
        min_std: float = Field(0.02, gt=0.0, description="least standard deviation of a coordinate; 1 is twice what is usual for drives")
        std: float = Field(0.1, gt=0.0, description="standard deviation of a new planner")
        score_weight: float = Field(1.0, ge=0.0, description="of the cross-entropy of the anchors")
        nll_weight: float = Field(1.0, ge=0.0, description="of the negative log-likelihood of the human's drive, per coordinate")

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width)
        self.log_std = nn.Linear(width, 2 * config.poses)
        nn.init.zeros_(self.log_std.weight)
        nn.init.constant_(self.log_std.bias, math.log(config.std))

    def mixture(self, features: Features) -> tuple[Normal, Float[Tensor, "B M"]]:
        """The Gaussian of each anchor "B M T 2", and the logarithm of its probability."""
        decoded = self.decoder(self.decoder.memory(features), self.starts(len(features)))
        return Normal(decoded.estimates[-1], self._std(decoded.tokens), validate_args=False), decoded.scores[-1].log_softmax(-1)

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        """Of the anchor nearest to the human's drive: its cross-entropy, and the likelihood of the drive under its Gaussian. Means over
        layers and scenes; scenes without a drive count as 0. Raises `InputError` as `drives` does."""
        drives, known = self.drives(human)
        decoded = self.decoder(self.decoder.memory(features), self.starts(len(drives)))
        target = nearest(drives, self.anchors[..., :2])
        score = torch.stack([cross_entropy(score, target, reduction="none") for score in decoded.scores])
        (std,) = of_anchor([self._std(decoded.tokens)], target)
        gaussian = Normal(torch.stack(of_anchor(decoded.estimates, target)), std, validate_args=False)
        nll = -gaussian.log_prob(self.curves.coordinates(drives)).mean((-2, -1))
        return {
            "score": self.config.score_weight * (known * score.mean(0)).mean(),
            "nll": self.config.nll_weight * (known * nll.mean(0)).mean(),
        }

    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        """K proposals, the best first: of highest probability, and nearest to the mean where several are of one Gaussian."""
        gaussian, log_weight = self.mixture(features)
        shape = gaussian.mean.shape
        if self.explore:
            rows = torch.multinomial(log_weight.exp(), k, replacement=True, generator=generator)
            white = torch.randn((shape[0], k, *shape[2:]), generator=generator, device=rows.device)
        else:
            more = max(0, math.ceil(k / shape[1]) - 1) * shape[1]
            rows = torch.arange(shape[1] + more, device=log_weight.device).remainder(shape[1]).expand(shape[0], -1)
            drawn = torch.randn((shape[0], more, *shape[2:]), generator=generator, device=rows.device)
            white = torch.cat([torch.zeros_like(gaussian.mean), drawn], 1)
        mean, std, start = (
            values.take_along_dim(rows[..., None, None], 1) for values in (gaussian.mean, gaussian.stddev, self.starts(len(rows)))
        )
        score = log_weight.gather(1, rows) - white.square().sum((-2, -1)) / 2.0
        return self.plan([start, mean + std * white], start, score, k)

    def log_prob(self, features: Features, plan: Plan) -> Float[Tensor, "B K 1"]:
        """Raises `InputError` for a plan without trace that has no pose at one of the times of its own plans."""
        gaussian, log_weight = self.mixture(features)
        each = torch.stack([gaussian.log_prob(end[:, None]).sum((-2, -1)) for end in self._end(plan).unbind(1)], 1)
        return (log_weight[:, None] + each).logsumexp(-1, keepdim=True)

    def _end(self, plan: Plan) -> Float[Tensor, "B K T 2"]:
        """Coordinates of a plan: from its trace, or of its positions."""
        if plan.trace is not None:
            return self.trace(plan)[0][:, :, -1]
        positions, _ = self.drives(Trajectory(plan.poses.flatten(0, 1), plan.dt))
        return self.curves.coordinates(positions).unflatten(0, plan.poses.shape[:2])

    def _std(self, tokens: Float[Tensor, "B M D"]) -> Float[Tensor, "B M T 2"]:
        return self.config.min_std + self.log_std(tokens).float().exp().unflatten(-1, (-1, 2))
