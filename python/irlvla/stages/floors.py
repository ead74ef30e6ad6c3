"""Floors: what a policy was good at stays while it improves at something else."""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from irlvla.components import Config, Policy
from irlvla.stages.batches import SceneBatch, generator_of
from irlvla.stages.measurement import Summary, means_of
from irlvla.stages.rollouts import Judge
from irlvla.types import METRICS, Epdms, Plan


class FloorsConfig(Config):
    """How far a sub-metric may fall, and how it is held."""

    fall: float = Field(0.01, ge=0.0, description="how far the mean of each sub-metric may fall below that of the policy at the start")
    held_out: float = Field(
        0.01, ge=0.0, description="the same in held-out scenes, by the exact score, of a policy that is kept as the best"
    )
    rate: float = Field(0.5, gt=0.0, description="by how much a multiplier grows in a step, per unit that is missing")
    memory: float = Field(0.9, ge=0.0, lt=1.0, description="decay of the moving average by which a fall is told")


class Floors(nn.Module):
    """What counts as reward, so that no sub-metric falls far: the score, and each sub-metric times a multiplier, all divided by the
    sum of the weights.

    A multiplier is 0 at first, and grows while the plans that are driven fall short of the floor of its sub-metric: dual ascent on the
    Lagrangian of "raise the score, subject to the floors" (Tessler et al., ICLR 2019; Ray et al. 2019). How far they fall is told by
    the reward, in the scenes of each step, against what the policy of the start drives there.
    """

    start: Tensor  # "M": means of the policy of the start in held-out scenes; NaN = not measured
    multipliers: Tensor  # "M"
    fallen: Tensor  # "M": moving averages
    weight: Tensor  # "": of what these averages have seen

    def __init__(self, config: FloorsConfig | None, policy: Policy, judge: Judge) -> None:
        """`config`: None = there are none. `policy`: as it is at the start."""
        super().__init__()
        self.config, self.judge = config, judge
        self.register_buffer("start", torch.full((len(METRICS),), torch.nan, dtype=torch.float64))
        self.register_buffer("multipliers", torch.zeros(len(METRICS)))
        self.register_buffer("fallen", torch.zeros(len(METRICS)))
        self.register_buffer("weight", torch.zeros(()))
        self._first = (copy.deepcopy(policy).requires_grad_(False),)  # a tuple hides it: a run that resumes loads it again

    @property
    def first(self) -> Policy:
        """The policy of the start."""
        return self._first[0]

    def reward(self, believed: Epdms) -> Float[Tensor, "B K"]:
        """What plans are worth, in [0, 1]; without a fall the score."""
        multipliers = self.multipliers.to(believed.values)
        return (believed.score() + (believed.values.nan_to_num() * multipliers).sum(-1)) / (1.0 + multipliers.sum())

    def see(self, policy: Policy, batch: SceneBatch, candidates: int, seed: int) -> dict[str, float]:
        """Look at what is driven in some scenes, and adapt the multipliers. Returns what to log."""
        config = self.config
        if config is None:
            return {}
        before, now = (self._driven(one, batch, candidates, seed) for one in (self.first, policy))
        fall = (before - now).nanmean(0).nan_to_num().to(self.fallen)
        self.fallen.lerp_(fall, 1.0 - config.memory)
        self.weight.lerp_(torch.ones_like(self.weight), 1.0 - config.memory)
        told = self.fallen / self.weight
        self.multipliers.add_(config.rate * (told - config.fall)).clamp_(min=0.0)
        values = {f"fall_{name}": value for name, value in zip(METRICS, told.tolist(), strict=True)}
        values |= {f"multiplier_{name}": value for name, value in zip(METRICS, self.multipliers.tolist(), strict=True)}
        return {f"floors/{name}": value for name, value in values.items()}

    def begin(self, found: Summary) -> None:
        """What the policy of the start reaches in held-out scenes."""
        self.start.copy_(_means(found))

    def hold(self, found: Summary) -> bool:
        """Whether a policy may be the best: no sub-metric has fallen too far in held-out scenes."""
        fall = self.start.cpu() - _means(found)
        return self.config is None or not bool((fall > self.config.held_out).any())

    def _driven(self, policy: Policy, batch: SceneBatch, candidates: int, seed: int) -> Float[Tensor, "B M"]:
        """What the plans are worth that a policy drives."""
        with torch.no_grad():
            plan = policy.sample(batch.observation, candidates, generator=generator_of(batch, seed))
            best = Plan(plan.best().poses[:, None], plan.dt)
            return self.judge.believe(batch.observation, batch.scene, best).values[:, 0]


def _means(found: Summary) -> Float[Tensor, " M"]:
    means = means_of(found)
    return torch.tensor([means.get(name, torch.nan) for name in METRICS], dtype=torch.float64)
