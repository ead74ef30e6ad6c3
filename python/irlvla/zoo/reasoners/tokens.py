"""Commands as language tokens, and what is done about scenes that have none: all reasoners share it."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.errors import InputError
from irlvla.zoo.reasoners.actions import PATHS, SAME_SLOT, SPEEDS


class Config(components.Config):
    """Settings that every reasoner of this package has."""

    dropout: float = Field(0.1, ge=0, lt=1, description="share of the scenes whose commands are unknown in training: a planner must cope")
    merged: bool = Field(
        True, description="speed commands that DiffVLA encodes alike share a token (13 in 11 slots); false = each has its own"
    )


class CommandTokens(nn.Module):
    """A speed token, a path token and, of reasoners with hidden states, one token each. All have a form for "unknown".

    In training a share of the scenes, drawn from torch's global generator, gets the unknown tokens in the place of its own.

    Args:
        width: of the tokens.
        hidden: width of the hidden states; 0 = there are none.
    """

    slots: Tensor

    def __init__(self, config: Config, width: int, hidden: int = 0) -> None:
        super().__init__()
        self.dropout = config.dropout
        rows = [name for name in SPEEDS if not (config.merged and name in SAME_SLOT)]
        slots = [rows.index(SAME_SLOT[name] if name not in rows else name) for name in SPEEDS]
        self.register_buffer("slots", torch.tensor(slots), persistent=False)  # follows from the config
        self.speed, self.path = nn.Embedding(len(rows) + 1, width), nn.Embedding(len(PATHS) + 1, width)
        self.project = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width)) if hidden else None
        self.unknown = nn.Parameter(torch.randn(width)) if hidden else None

    def forward(
        self,
        speed: Float[Tensor, "B 13"],
        path: Float[Tensor, "B 9"],
        hidden: Float[Tensor, "B N H"] | None = None,
        known: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B 2+N D"]:
        """Expected embeddings of the commands, and projections of the hidden states.

        Args:
            speed, path: how likely each command is; of a certain one, one-hot.
            known: scenes that have commands; None = all.
        """
        tables = self.speed.weight[self.slots], self.path.weight
        tokens = torch.stack([speed.to(tables[0].dtype) @ tables[0], path.to(tables[1].dtype) @ tables[1][:-1]], 1)
        unknown = torch.stack([self.speed.weight[-1], self.path.weight[-1]])
        if self.project is not None and self.unknown is not None and hidden is not None:
            tokens = torch.cat([tokens, self.project(hidden.to(tokens.dtype))], 1)
            unknown = torch.cat([unknown, self.unknown.expand(hidden.shape[1], -1)])
        if known is None:
            known = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
        if self.training and self.dropout:
            known = known & (torch.rand(len(tokens), device=tokens.device) >= self.dropout)
        return tokens.where(known[:, None, None], unknown)


def one_hot(numbers: Int[Tensor, " B"], count: int) -> Float[Tensor, "B count"]:
    """Commands by number as distributions; of `UNKNOWN` any."""
    return nn.functional.one_hot(numbers.clamp(min=0), count).float()


class Unanswered:
    """Counts the scenes that have no commands, and warns of the first; or makes it an error.

    Args:
        where: what has none of them: "commands.json".
        policy: what is done about it.
        remedy: what to do instead.
    """

    def __init__(self, where: str, policy: Literal["unknown", "error"], remedy: str) -> None:
        self.where, self.policy, self.remedy = where, policy, remedy
        self.count = 0

    def add(self, token: str) -> None:
        """Raises `InputError` where the policy says so."""
        if self.policy == "error":
            raise InputError(f"{self.where} has no commands for the scene {token!r}. {self.remedy}")
        if not self.count:
            warnings.warn(
                f"{self.where} has no commands for the scene {token!r}, and perhaps for others: they get the unknown tokens. {self.remedy}",
                stacklevel=2,
            )
        self.count += 1
