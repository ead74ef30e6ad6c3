"""Queries that find things in a bird's-eye view, as in DETR: their decoder, and how they are compared with what is there."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from irlvla import components
from irlvla.errors import ConfigError, InputError
from irlvla.types import Features
from irlvla.zoo.layers import Attention, FeedForward, mlp, sample_bev, sinusoids

SINES = 32  # of each coordinate
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss
PRIOR = 0.01  # probability of a class at first, so that the many queries that find nothing do not drown the others


class QueryDecoder(nn.Module):
    """Queries, each with K points in the ego frame, which every layer moves: self-attention, cross-attention to the grid, what the
    grid shows at the points, feed-forward.

    Deformable DETR with plain attention instead of deformable: the queries are few. Without a gradient from layer to layer through
    the points, as there.
    """

    class Config(components.Config):
        queries: int = Field(30, ge=1, description="how many")
        layers: int = Field(3, ge=1, description="of the decoder")
        heads: int = Field(8, ge=1, description="of attention; they divide the width")
        hidden: int = Field(2, ge=1, description="width of the feed-forward layers, in widths of the tokens")
        stride: int = Field(2, ge=1, description="cells of the grid along each side that become one key; their mean")
        dropout: float = Field(0.0, ge=0.0, lt=1.0, description="in attention and feed-forward layers")

    def __init__(self, config: Any, width: int, points: int) -> None:
        """Raises `ConfigError` if the heads do not divide the width."""
        super().__init__()
        if width % config.heads:
            raise ConfigError(f"{config.heads} heads do not divide tokens of width {width}; take a divisor of it")
        self.stride = config.stride
        self.content = nn.Parameter(0.1 * torch.randn(config.queries, width))
        angles = torch.arange(points) * (2 * math.pi / points)
        circle = 0.2 * torch.stack([angles.cos(), angles.sin()], -1) * (points > 1)
        self.points = nn.Parameter(torch.rand(config.queries, 1, 2) * 2.0 - 1.0 + circle)  # in halves of what the grid covers
        self.place = nn.Linear(2 * SINES, width)
        self.layers = nn.ModuleList(_Layer(config, width, points) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Features) -> tuple[Float[Tensor, "B L Q D"], Float[Tensor, "B L Q K 2"]]:
        """Tokens and points [m] after each of L layers. Raises `InputError` for features without a bird's-eye view."""
        bev, extent = require_bev(features)
        keys = self._keys(bev, extent)
        low, high = extent[:, None, None, 0::2], extent[:, None, None, 1::2]
        half = (high - low) / 2.0
        tokens = self.content.expand(len(bev), -1, -1)
        points = low + half * (1.0 + self.points)
        found: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            places = self.place(sinusoids(points, SINES))
            tokens, moves = layer(tokens, keys, places, sample_bev(bev, extent, points))
            found.append((self.norm(tokens), points + half * moves))
            points = found[-1][1].detach()
        return torch.stack([tokens for tokens, _ in found], 1), torch.stack([points for _, points in found], 1)

    def _keys(self, bev: Float[Tensor, "B D X Y"], extent: Float[Tensor, "B 4"]) -> Float[Tensor, "B N D"]:
        """The grid in coarser cells as tokens that know where they are."""
        low, high = extent[:, 0::2, None, None], extent[:, 1::2, None, None]
        shares = [(torch.arange(cells, device=bev.device) + 0.5) / cells for cells in bev.shape[2:]]
        centres = low + (high - low) * torch.stack(torch.meshgrid(*shares, indexing="ij"))
        coarse, where = (
            functional.avg_pool2d(grid, self.stride, ceil_mode=True).flatten(2).transpose(1, 2) for grid in (bev, centres.float())
        )
        return coarse + self.place(sinusoids(where, SINES))


class _Layer(nn.Module):
    def __init__(self, config: Any, width: int, points: int) -> None:
        super().__init__()
        self.among, self.to_grid = (Attention(width, config.heads, config.dropout) for _ in range(2))
        self.look = mlp(width, width, width)
        self.feed = FeedForward(width, config.hidden * width, config.dropout)
        self.move = nn.Linear(width, 2 * points)
        nn.init.zeros_(self.move.weight)
        nn.init.zeros_(self.move.bias)

    def forward(
        self, tokens: Float[Tensor, "B Q D"], keys: Float[Tensor, "B N D"], places: Float[Tensor, "B Q K D"], seen: Float[Tensor, "B Q K D"]
    ) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q K 2"]]:
        tokens = tokens + places.mean(2)
        tokens = self.to_grid(self.among(tokens, tokens), keys)
        tokens = self.feed(tokens + self.look(seen + places).mean(2))
        return tokens, self.move(tokens).unflatten(-1, (-1, 2))


def require_bev(features: Features) -> tuple[Float[Tensor, "B D X Y"], Float[Tensor, "B 4"]]:
    """The grid and what it covers; `InputError` where one of them is missing."""
    if features.bev is None or features.bev_range is None:
        missing = "bev" if features.bev is None else "bev_range"
        raise InputError(f"heads look at a bird's-eye view, and these features have no {missing}: the backbone must make it")
    return features.bev, features.bev_range


# -- comparison --------------------------------------------------------------------------------------------------------


def class_head(width: int, classes: int) -> nn.Linear:
    """Logits of classes, all unlikely at first."""
    layer = nn.Linear(width, classes)
    nn.init.constant_(layer.bias, -math.log((1.0 - PRIOR) / PRIOR))
    return layer


def assign(cost: Float[Tensor, "B Q N"], valid: Bool[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """The query of each target, no query twice, of least total cost (Hungarian matching); 0 where the target is not valid."""
    from scipy.optimize import linear_sum_assignment

    # Where a network has diverged, its loss shall say so, not this.
    costs = cost.detach().float().nan_to_num(1e9, 1e9, -1e9).cpu().numpy()
    query = torch.zeros(valid.shape, dtype=torch.int64)
    for row, there in enumerate(valid.cpu()):
        targets = there.nonzero()[:, 0]
        queries, columns = linear_sum_assignment(costs[row][:, targets.numpy()])
        query[row, targets[columns]] = torch.from_numpy(queries)
    return query.to(cost.device)


def class_cost(logits: Float[Tensor, "B Q C"], kind: Int[Tensor, "B N"]) -> Float[Tensor, "B Q N"]:
    """How much the focal loss grows where a query is to be of a target's class (Deformable DETR)."""
    yes, no = _focal(logits)
    return (yes - no).gather(2, kind[:, None].expand(-1, logits.shape[1], -1))


def class_loss(
    logits: Float[Tensor, "B Q C"], query: Int[Tensor, "B N"], kind: Int[Tensor, "B N"], valid: Bool[Tensor, "B N"]
) -> Float[Tensor, " B"]:
    """Focal loss of each scene, in which a query is of the class of its target or of none, per target."""
    wanted = torch.zeros_like(logits, dtype=torch.bool)
    scene = torch.arange(len(query), device=query.device)[:, None].expand_as(query)
    wanted[scene[valid], query[valid], kind[valid]] = True
    return torch.where(wanted, *_focal(logits)).sum((1, 2)) / valid.sum(1).clamp(min=1)


def _focal(logits: Float[Tensor, "B Q C"]) -> tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q C"]]:
    """The focal loss where a class is there, and where it is not."""
    log_yes, log_no = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    return -ALPHA * log_no.exp() ** GAMMA * log_yes, -(1.0 - ALPHA) * log_yes.exp() ** GAMMA * log_no


def mean_over_valid(values: Float[Tensor, "B N"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """The mean of each scene over its targets; zero, of zero gradient, where it has none."""
    return torch.where(valid, values, 0.0).sum(1) / valid.sum(1).clamp(min=1)
