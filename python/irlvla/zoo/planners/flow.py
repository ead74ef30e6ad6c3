"""Flow matching from anchors."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from irlvla.types import Features, Trajectory
from irlvla.zoo.planners.anchors import nearest
from irlvla.zoo.planners.chain import ChainPlanner, of_anchor


class FlowPlanner(ChainPlanner):
    """Flows from noisy anchors to drives along straight lines: rectified flow (Liu et al. 2023), as a policy (Flow-GRPO).

    At time t, 1 at the beginning and 0 at the end, a state is (1 - t) drive + t (anchor + `spread` noise); the decoder tells the drive
    from it, and so the velocity. Sampling takes `steps` equal steps of Euler's method. With `explore` it solves the stochastic
    differential equation that has the same densities at all times (Flow-GRPO, 2025), of noise `noise_level` sqrt(t / (1 - t)).
    """

    class Config(ChainPlanner.Config):
        steps: int = Field(4, ge=1, description="steps of sampling")
        spread: float = Field(
            0.1, gt=0.0, description="standard deviation of the noise at the anchors; 1 is twice what is usual for drives"
        )
        noise_level: float = Field(0.7, ge=0.0, description="of a step when exploring, beside min_sampling_std (Flow-GRPO, ReCogDrive)")

    scored = 0  # later states tell where the drive goes: only at the beginning are all anchors judged alike

    @property
    def steps(self) -> int:
        return self.config.steps

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        """Losses at random times with random noise, from torch's global generator. Raises `InputError` as `drives` does."""
        noise = torch.randn_like(self.starts(len(features)))
        return self.flow_loss(features, human, noise, torch.rand(len(features), device=noise.device))

    def flow_loss(
        self, features: Features, human: Trajectory, noise: Float[Tensor, "B M T 2"], time: Float[Tensor, " B"]
    ) -> dict[str, Tensor]:
        """Losses with given noise at each anchor: of all where they begin, and at given times of the one nearest to the human's drive."""
        drives, known = self.drives(human)
        anchors = self.starts(len(drives))
        begin, target = self.begin(anchors, noise), nearest(drives, self.anchors[..., :2])
        (anchor, first) = (of_anchor([value], target)[0][:, None] for value in (anchors, begin))
        t = time[:, None, None, None]
        later = (1.0 - t) * self.curves.coordinates(drives)[:, None] + t * first
        times = torch.cat([torch.ones_like(begin[..., 0, 0]), time[:, None]], 1)
        decoded = self.decoder(self.decoder.memory(features), torch.cat([anchors, anchor], 1), torch.cat([begin, later], 1), 100.0 * times)
        return {
            "score": self.score_loss([score[:, :-1] for score in decoded.scores], target, known),
            "distance": self.distance_loss([estimate[:, -1] for estimate in decoded.estimates], drives, known),
        }

    def begin(self, anchors: Tensor, noise: Tensor) -> Tensor:
        return anchors + self.config.spread * noise

    def time(self, step: int) -> float:
        return 100.0 * (1.0 - step / self.steps)

    def transition(self, step: int, state: Tensor, end: Tensor, anchor: Tensor, explore: bool) -> tuple[Tensor, float]:
        """A step of Euler's method, with `explore` of Euler's and Maruyama's."""
        t, h = 1.0 - step / self.steps, 1.0 / self.steps
        noise = (state - (1.0 - t) * end) / t - anchor  # `spread` times the noise that the state stems from
        ahead = state - h * (noise + anchor - end)
        if not explore:
            return ahead, 0.0
        inside = min(t, 1.0 - h) if self.steps > 1 else 0.5  # it is infinite at t = 1: there as a step later, as Flow-GRPO has it
        level = self.config.noise_level * math.sqrt(inside / (1.0 - inside))
        return ahead - h * level**2 / (2.0 * t) * noise, self.config.spread * level * math.sqrt(h)
