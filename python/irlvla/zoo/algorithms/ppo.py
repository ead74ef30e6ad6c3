"""Proximal policy optimisation of the sampling steps of a planner, with a learned critic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from irlvla.components import Planner
from irlvla.types import Features, Rollout
from irlvla.zoo.algorithms.advantages import columns, explained_variance, standardised, weighted
from irlvla.zoo.algorithms.objective import Chains, PolicyGradient, chains_of
from irlvla.zoo.layers import mlp

TOKENS = ("bev", "agents", "map", "status", "language")
POSES = 8  #: of the start of a chain, which the critic reads
METRES = 20.0


class Ppo(PolicyGradient):
    """PPO (Schulman et al. 2017) over denoising (DPPO, Ren et al. 2024): the baseline is a critic's guess of the reward.

    The critic sees the policy's features and where a chain begins; of what it sees no gradient goes to the policy's backbone.
    """

    class Config(PolicyGradient.Config):
        value: float = Field(0.5, ge=0.0, description="weight of the critic's loss")
        value_clip: float | None = Field(None, gt=0.0, description="how far the critic may move in one update; null = as far as it likes")
        normalise: bool = Field(True, description="scale advantages to mean 0 and deviation 1 over all plans of a rollout")

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config, width=width)
        self.critic = Critic(width, max(1, len(config.metrics)))

    def goals(self, planner: Planner, features: Features, rollout: Rollout) -> dict[str, Tensor]:
        measured, weights = columns(rollout, self.config.metrics)
        values = self.critic(features, chains_of(planner, features, rollout.plan))
        advantage = measured - values
        scaled = standardised(advantage) if self.config.normalise else advantage
        return {"advantage": weighted(scaled, weights), "measured": measured, "values": values}

    def losses(self, features: Features, chains: Chains, goals: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = self.critic(features, chains)
        known, measured = ~goals["measured"].isnan(), goals["measured"].nan_to_num()
        error = (values - measured).square()
        if (clip := self.config.value_clip) is not None:
            near = goals["values"] + (values - goals["values"]).clamp(-clip, clip)
            error = torch.maximum(error, (near - measured).square())
        return {"value_loss": self.config.value * 0.5 * (known * error).mean()}

    def told(self, goals: Mapping[str, Tensor]) -> dict[str, float]:
        return {"losses/explained_variance": explained_variance(goals["values"], goals["measured"])}


class Critic(nn.Module):
    """The reward that is to be expected of a plan of a scene, by the mean of each group of tokens."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.read = nn.Linear(len(TOKENS) * width + 2 * POSES, width)
        self.value = nn.Sequential(nn.LayerNorm(width), mlp(width, width, outputs))

    def forward(self, features: Features, chains: Chains) -> Float[Tensor, "B K M"]:
        known = torch.cat([_pooled(features, name) for name in TOKENS], -1)
        batch, k = chains.log_prob.shape[:2]
        # Where a planner draws the start itself it is an action, of which a baseline must know nothing.
        start = known.new_zeros(batch, k, POSES, 2) if chains.start is None else _thinned(chains.start.detach()) / METRES
        return self.value(self.read(torch.cat([known[:, None].expand(-1, k, -1), start.flatten(-2)], -1))).float()


def _pooled(features: Features, name: str) -> Float[Tensor, "B D"]:
    """The mean of a group of tokens, normalised; zeros where there is none."""
    tokens: Tensor | None = getattr(features, name)
    if tokens is None:
        found, other = next((each, known) for each in TOKENS if (known := getattr(features, each)) is not None)
        return other.new_zeros(len(other), other.shape[1 if found == "bev" else -1])
    tokens = tokens.detach()
    valid: Tensor | None = getattr(features, f"{name}_valid", None)
    if name == "bev":
        tokens = tokens.flatten(2).mean(2)
    elif name != "status":
        there = torch.ones_like(tokens[..., 0], dtype=torch.bool) if valid is None else valid
        tokens = (tokens * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
    return nn.functional.layer_norm(tokens, tokens.shape[-1:])


def _thinned(positions: Float[Tensor, "B K T 2"]) -> Float[Tensor, "B K poses 2"]:
    """As many poses as the critic reads, evenly spread, the last among them."""
    count = positions.shape[-2]
    rows = torch.arange(1, POSES + 1, device=positions.device) * count // POSES - 1
    return positions[..., rows.clamp(min=0), :]
