"""Truncated diffusion from anchors."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from irlvla.errors import ConfigError
from irlvla.types import Features, Trajectory
from irlvla.zoo.planners.anchors import nearest
from irlvla.zoo.planners.chain import ChainPlanner, of_anchor


class DiffusionPlanner(ChainPlanner):
    """Denoises anchors: the truncated diffusion of DiffusionDrive (CVPR 2025), as a policy (DPPO, DiffusionDriveV2).

    Training adds a little noise to the anchors, of the first `train_steps` of `schedule_steps`; the one nearest to the human's
    drive shall become that drive. Sampling begins with the noise of step `start` and goes back to none in `steps` steps of DDIM.
    """

    class Config(ChainPlanner.Config):
        schedule_steps: int = Field(1000, ge=1, description="steps of the whole noise schedule")
        beta_start: float = Field(0.0001, gt=0.0, lt=1.0, description="variance of its first step")
        beta_end: float = Field(0.02, gt=0.0, lt=1.0, description="and of its last")
        beta_schedule: str = Field("scaled_linear", description="what lies between, as diffusers' DDIMScheduler names it")
        train_steps: int = Field(50, ge=1, description="training adds the noise of one of so many first steps")
        start: int = Field(8, ge=1, description="sampling begins with the noise of this step")
        steps: int = Field(2, ge=1, description="denoising steps of sampling")
        eta: float = Field(1.0, ge=0.0, le=1.0, description="noise of a step when exploring: 1 = DDPM's, 0 = only min_sampling_std")

    scored = -1

    def __init__(self, config: Any, *, width: int) -> None:
        """Raises `ConfigError` for steps that do not fit into the schedule."""
        super().__init__(config, width=width)
        if not config.steps <= config.start <= config.train_steps <= config.schedule_steps:
            given = ", ".join(f"{name}={getattr(config, name)}" for name in ("steps", "start", "train_steps", "schedule_steps"))
            raise ConfigError(f"expected steps <= start <= train_steps <= schedule_steps, got {given}")
        betas = {"beta_start": config.beta_start, "beta_end": config.beta_end, "beta_schedule": config.beta_schedule}
        self.scheduler: Any = DDIMScheduler(config.schedule_steps, **betas, prediction_type="sample", clip_sample=False)
        # 0 is the first step; before it there is no noise.
        self.timesteps = [config.start * left // config.steps - 1 for left in range(config.steps, -1, -1)]

    @property
    def steps(self) -> int:
        return self.config.steps

    def loss(self, features: Features, human: Trajectory) -> dict[str, Tensor]:
        """Denoising losses at random steps with random noise, from torch's global generator. Raises `InputError` as `drives` does."""
        step = torch.randint(self.config.train_steps, (len(features),), device=self.anchors.device)
        return self.denoising_loss(features, human, torch.randn_like(self.starts(len(features))), step)

    def denoising_loss(
        self, features: Features, human: Trajectory, noise: Float[Tensor, "B M T 2"], step: Int[Tensor, " B"]
    ) -> dict[str, Tensor]:
        """Losses at given steps of the schedule, with given noise at each anchor."""
        drives, known = self.drives(human)
        anchors = self.starts(len(drives))
        noisy = self.scheduler.add_noise(anchors, noise, step)
        times = (100.0 / self.config.train_steps) * step[:, None].expand(noisy.shape[:2])
        decoded = self.decoder(self.decoder.memory(features), anchors, noisy, times)
        target = nearest(drives, self.anchors[..., :2])
        return {
            "score": self.score_loss(decoded.scores, target, known),
            "distance": self.distance_loss(of_anchor(decoded.estimates, target), drives, known),
        }

    def begin(self, anchors: Tensor, noise: Tensor) -> Tensor:
        return self.scheduler.add_noise(anchors, noise, torch.tensor([self.timesteps[0]], device=anchors.device))

    def time(self, step: int) -> float:
        return 100.0 / self.config.train_steps * self.timesteps[step]

    def transition(self, step: int, state: Tensor, end: Tensor, anchor: Tensor, explore: bool) -> tuple[Tensor, float]:
        """A step of DDIM (Song et al. 2021, equations 12 and 16). The scheduler's own returns no deviation, which `log_prob` needs."""
        now, after = (self._alpha(timestep) for timestep in self.timesteps[step : step + 2])
        variance = self.config.eta**2 * (1.0 - after) / (1.0 - now) * (1.0 - now / after) if explore else 0.0
        noise = (state - now**0.5 * end) / (1.0 - now) ** 0.5
        return after**0.5 * end + max(1.0 - after - variance, 0.0) ** 0.5 * noise, variance**0.5

    def _alpha(self, timestep: int) -> float:
        """The part of the variance that is left at a time step."""
        return float(self.scheduler.alphas_cumprod[timestep]) if timestep >= 0 else 1.0
