"""Planners whose plans are the end of a chain of Gaussian steps from a noisy anchor: what diffusion and flow have in common."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.distributions import Normal
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from irlvla.types import Features, Plan
from irlvla.zoo.planners.anchored import AnchoredPlanner
from irlvla.zoo.planners.decoder import Memory

RIDGE = 0.1  # white noise beside multiplicative noise, which alone would have no density


class Retraced(NamedTuple):
    """What a planner makes of chains that were drawn, differentiable: what reinforcement learns by."""

    log_prob: Float[Tensor, "B K D"]  # of each step
    score: Float[Tensor, "B K"]  # as in the plan: by it one is chosen, of which `log_prob` tells nothing
    start: Float[Tensor, "B K T 2"]  # positions [m] of the anchor, which is given: no step chooses it


class ChainPlanner(AnchoredPlanner):
    """Proposals begin at noisy anchors and go through D steps; each step is a Gaussian around what the decoder makes of the last.

    `sample` always draws the noise at the anchors. With `explore` it draws every step too, and `log_prob` is the density that the
    steps were drawn from, in coordinates of `Curves`. Without, a step goes to its mean: the way to drive.

    The standard deviation of a step is that of its schedule, but never below `min_sampling_std`; that of `log_prob` is never
    below `min_logprob_std` either. Unless that is larger, or `noise_clip` is set, `log_prob` is exact.
    """

    class Config(AnchoredPlanner.Config):
        noise: Literal["additive", "multiplicative"] = Field(
            "additive", description="of exploration: white in smooth coordinates, or one factor for x and one for y (DiffusionDriveV2)"
        )
        min_sampling_std: float = Field(
            0.04, gt=0.0, description="floor of the standard deviation of a step when exploring (DiffusionDriveV2)"
        )
        min_logprob_std: float = Field(0.0, ge=0.0, description="floor of that in log_prob; 0.1 in DPPO and DiffusionDriveV2, 0 = exact")
        noise_clip: float | None = Field(None, gt=0.0, description="clip the noise of a step at so many deviations; 3 in DPPO")
        score_loss: Literal["cross_entropy", "bce", "focal"] = Field(
            "cross_entropy", description="for the scores of the anchors: one of them is right, DiffusionDrive's, or IRL-VLA's"
        )
        score_weight: float = Field(1.0, ge=0.0, description="of the loss of the scores")
        distance_loss: Literal["coordinates", "metres"] = Field(
            "coordinates",
            description="from the human's drive: in coordinates of `Curves`, all alike, or DiffusionDrive's, where what is far counts most",
        )
        distance_weight: float = Field(20.0, ge=0.0, description="of that loss; 8 per metre in DiffusionDrive")

    scored: int  # the step whose scores are the plan's

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width, chained=True)

    # -- what diffusion and flow differ in -----------------------------------------------------------------------------
    @abstractmethod
    def begin(self, anchors: Float[Tensor, "B N T 2"], noise: Float[Tensor, "B N T 2"]) -> Float[Tensor, "B N T 2"]:
        """Where chains begin: anchors with noise."""

    @abstractmethod
    def time(self, step: int) -> float:
        """What the decoder is told of a step: its time between 0 and 100."""

    @abstractmethod
    def transition(
        self, step: int, state: Float[Tensor, "B N T 2"], end: Float[Tensor, "B N T 2"], anchor: Float[Tensor, "B N T 2"], explore: bool
    ) -> tuple[Float[Tensor, "B N T 2"], float]:
        """Mean and standard deviation of a step from a state, where the decoder expects the chain to end."""

    # -- the contract --------------------------------------------------------------------------------------------------
    def sample(self, features: Features, k: int, *, generator: Generator | None = None) -> Plan:
        """K proposals, the best scored first: of one chain per anchor, or of as many as it takes to have K."""
        anchors = self.starts(len(features), math.ceil(k / len(self.anchors)))
        states, scores = [self.begin(anchors, _randn(anchors, generator))], []
        memory = self.decoder.memory(features)
        for step in range(self.steps):
            mean, std, score = self._step(step, memory, states[-1], anchors, self.explore)
            states.append(mean + self._noise(states[-1], std, generator) if self.explore else mean)
            scores.append(score)
        return self.plan(states, anchors, scores[self.scored], k)

    def log_prob(self, features: Features, plan: Plan) -> Float[Tensor, "B K D"]:
        """Of each step of the plan's chain, as `sample` draws it when exploring. Raises `InputError` for a plan of another planner."""
        return self.retrace(features, plan).log_prob

    def retrace(self, features: Features, plan: Plan) -> Retraced:
        """Log-probability and score of the plan's chain. Raises as `log_prob`."""
        states, anchors = self.trace(plan)
        memory, values, scores = self.decoder.memory(features), [], []
        for step in range(self.steps):
            state, after = states[:, :, step], states[:, :, step + 1]
            mean, std, score = self._step(step, memory, state, anchors, True)
            values.append(self._log_density(after - mean, state, max(std, self.config.min_logprob_std)))
            scores.append(score)
        return Retraced(torch.stack(values, -1), scores[self.scored], self.curves.positions(anchors))

    def _step(
        self, step: int, memory: Memory, state: Float[Tensor, "B N T 2"], anchor: Float[Tensor, "B N T 2"], explore: bool
    ) -> tuple[Float[Tensor, "B N T 2"], float, Float[Tensor, "B N"]]:
        """Mean, standard deviation and score of a step."""
        decoded = self.decoder(memory, anchor, state, state.new_full(state.shape[:2], self.time(step)))
        mean, std = self.transition(step, state, decoded.estimates[-1], anchor, explore)
        return mean, max(std, self.config.min_sampling_std), decoded.scores[-1]

    # -- noise ---------------------------------------------------------------------------------------------------------
    def _noise(self, state: Float[Tensor, "B N T 2"], std: float, generator: Generator | None) -> Float[Tensor, "B N T 2"]:
        clip = self.config.noise_clip or math.inf
        white = _randn(state, generator).clamp(-clip, clip)
        if self.config.noise == "additive":
            return std * white
        factors = _randn(state[:, :, :1], generator).clamp(-clip, clip)
        return std * (factors * self._along(state) + RIDGE * white)

    def _log_density(self, deviation: Float[Tensor, "B K T 2"], state: Float[Tensor, "B K T 2"], std: float) -> Float[Tensor, "B K"]:
        """Logarithm of the density of noise."""
        if self.config.noise == "additive":
            return Normal(0.0, std, validate_args=False).log_prob(deviation).sum((-2, -1))
        # The covariance of an axis is std^2 (ridge^2 I + u u'): inverse and determinant by Sherman and Morrison.
        along, scaled = self._along(state), deviation / std
        weight = 1.0 / (RIDGE**2 + along.square().sum(-2))
        distance = (scaled.square().sum(-2) - weight * (along * scaled).sum(-2).square()) / RIDGE**2
        count = deviation.shape[-2]
        volume = count * math.log(2.0 * math.pi * (std * RIDGE) ** 2) - (weight * RIDGE**2).log()
        return -0.5 * (distance + volume).sum(-1)

    def _along(self, state: Float[Tensor, "B N T 2"]) -> Float[Tensor, "B N T 2"]:
        """How the coordinates change as all x, or all y, of a state grow by their own size."""
        positions = self.curves.positions(state)
        return self.curves.coordinates(positions) - self.curves.coordinates(torch.zeros_like(positions))

    # -- losses --------------------------------------------------------------------------------------------------------
    def score_loss(self, scores: list[Float[Tensor, "B M"]], target: Int[Tensor, " B"], known: Bool[Tensor, " B"]) -> Float[Tensor, ""]:
        """Tell the anchor nearest to the human's drive from the others: mean over layers and scenes."""
        kind, losses = self.config.score_loss, []
        for score in scores:
            wanted = nn.functional.one_hot(target, score.shape[-1]).to(score)
            if kind == "cross_entropy":
                losses.append(cross_entropy(score, target, reduction="none"))
                continue
            loss = binary_cross_entropy_with_logits(score, wanted, reduction="none")
            if kind == "focal":
                loss = loss * (wanted - score.sigmoid()).square() * (0.75 - 0.5 * wanted)  # alpha = 0.25, gamma = 2
            losses.append(loss.mean(-1))
        return self.config.score_weight * (known * torch.stack(losses).mean(0)).mean()

    def distance_loss(
        self, estimates: list[Float[Tensor, "B T 2"]], drives: Float[Tensor, "B T 2"], known: Bool[Tensor, " B"]
    ) -> Float[Tensor, ""]:
        """Distance of x and of y to the human's drive: mean over layers, poses (or coordinates) and scenes."""
        if self.config.distance_loss == "metres":
            distance = (self.curves.positions(torch.stack(estimates)) - drives).abs().sum(-1)
        else:
            distance = (torch.stack(estimates) - self.curves.coordinates(drives)).abs().mean(-1)
        return self.config.distance_weight * (known * distance.mean((0, 2))).mean()


def _randn(like: Tensor, generator: Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device)


def of_anchor(values: list[Float[Tensor, "B M T 2"]], anchor: Int[Tensor, " B"]) -> list[Float[Tensor, "B T 2"]]:
    """The proposals of one anchor of each scene."""
    return [value.take_along_dim(anchor[:, None, None, None], 1).squeeze(1) for value in values]
