"""Building blocks that backbones, planners and reward models share."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from width to width, with a GELU between any two."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def sinusoids(values: Float[Tensor, "... N"], width: int, longest: float = 100.0) -> Float[Tensor, "... N*width"]:
    """Each value as `width` / 2 sines and as many cosines, of wavelengths from 2 to `longest` in its own unit."""
    frequencies = math.pi * (2.0 / longest) ** torch.linspace(0.0, 1.0, width // 2, device=values.device, dtype=torch.float32)
    angles = values.float()[..., None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def sample_bev(
    bev: Float[Tensor, "B D X Y"], bev_range: Float[Tensor, "B 4"], points: Float[Tensor, "B ... 2"]
) -> Float[Tensor, "B ... D"]:
    """The grid at points of the ego frame [m], bilinear between the centres of its cells, zero outside of what it covers."""
    low, high = bev_range[:, 0::2], bev_range[:, 1::2]  # x, y
    flat = points.flatten(1, -2)
    places = ((flat - low[:, None]) / (high - low)[:, None] * 2.0 - 1.0).float()  # in half precision a point would move by decimetres
    # grid_sample calls the last axis x: here that is ego y.
    found = nn.functional.grid_sample(bev.float(), places.flip(-1)[:, :, None], align_corners=False)
    return found[..., 0].transpose(1, 2).unflatten(1, points.shape[1:-1]).to(bev.dtype)


class Attention(nn.Module):
    """Pre-norm attention to other tokens, with a residual. Queries of which no key is valid are left as they are."""

    def __init__(self, width: int, heads: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.norm_keys = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key_value, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(
        self, queries: Float[Tensor, "B Q D"], keys: Float[Tensor, "B N D"], valid: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B Q D"]:
        def split(tokens: Tensor) -> Tensor:
            return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(self.norm_keys(keys)).chunk(2, -1)
        seen = None if valid is None else (valid | ~valid.any(1, keepdim=True))[:, None, None]
        dropout = self.dropout if self.training else 0.0
        heads = (split(self.query(self.norm(queries))), split(key), split(value))
        found = self.out(nn.functional.scaled_dot_product_attention(*heads, seen, dropout).transpose(1, 2).flatten(2))
        return queries + (found if valid is None else found * valid.any(1)[:, None, None])


class FeedForward(nn.Module):
    """Pre-norm feed-forward layer with a residual."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))

    def forward(self, tokens: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return tokens + self.layers(tokens)
