"""Where the lanes, the intersections and the route lie: outlines and lines from a bird's-eye view."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from irlvla.types import Features, Scene
from irlvla.zoo.backbones.queries import QueryDecoder, assign, class_cost, class_head, class_loss, mean_over_valid, require_bev
from irlvla.zoo.backbones.targets import Element, elements_in


class MapHead(nn.Module):
    """One token for each of some map elements, with points along it and its kind; makes `Features.map`.

    As MapTR: 50 queries of 20 points, and outlines are equal wherever they begin and whichever way round they go; the route's
    centreline is not, its direction is that of travel. Queries are matched by kind and Chamfer distance. Of each layer the loss is
    taken, and its mean.

    Predictions: `map_points` "B L Q P 2" [m, ego frame], `map_kinds` "B L Q 6" (logits by `Element`).
    """

    class Config(QueryDecoder.Config):
        queries: int = Field(50, ge=1, description="how many")
        points: int = Field(20, ge=2, description="of each element")
        class_weight: float = Field(2.0, ge=0.0, description="of the focal loss of kinds")
        points_weight: float = Field(0.25, ge=0.0, description="of the mean L1 distance of points [1/m]")
        threshold: float = Field(0.0, ge=0.0, lt=1.0, description="tokens of elements that are less likely are marked as not valid")

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.config = config
        self.decoder = QueryDecoder(config, width, points=config.points)
        self.kind = class_head(width, len(Element))

    def forward(self, features: Features) -> Features:
        """Raises `InputError` for features without a bird's-eye view."""
        tokens, points = self.decoder(features)
        kinds = self.kind(tokens)
        valid = kinds[:, -1].sigmoid().amax(-1) >= self.config.threshold
        predictions = features.predictions | {"map_kinds": kinds, "map_points": points}
        return dataclasses.replace(features, map=tokens[:, -1], map_valid=valid, predictions=predictions)

    def loss(self, features: Features, scene: Scene) -> dict[str, Tensor]:
        """Means over scenes, of kinds and points against the nearest elements within the grid, as many as there are queries."""
        kinds, points = (features.predictions[name].float().flatten(0, 1) for name in ("map_kinds", "map_points"))
        target = elements_in(scene, require_bev(features)[1], self.config.queries, self.config.points).to(points.device)
        most = max(int(target.valid.sum(1).max()), 1)  # of any scene: distances to the empty rest are the greater part of the work
        parts = (target.points[:, :most], target.kind[:, :most], target.valid[:, :most])
        wanted, kind, valid = (part.repeat_interleave(self.config.layers, 0) for part in parts)
        cost = self.config.points_weight * chamfer(points, wanted) + self.config.class_weight * class_cost(kinds, kind)
        query = assign(cost, valid)
        found = points.take_along_dim(query[..., None, None], 1)
        distance = ordered_distance(found, wanted, kind != Element.CENTRELINE)
        return {
            "map_kinds": self.config.class_weight * class_loss(kinds, query, kind, valid).mean(),
            "map_points": self.config.points_weight * mean_over_valid(distance, valid).mean(),
        }


def chamfer(found: Float[Tensor, "B Q P 2"], wanted: Float[Tensor, "B N P 2"]) -> Float[Tensor, "B Q N"]:
    """Mean L1 distance from each point of one to the nearest of the other, both ways, whatever their order."""
    count = found.shape[2]
    with torch.no_grad():
        apart = torch.cdist(found.flatten(1, 2), wanted.flatten(1, 2), p=1).unflatten(2, (-1, count)).unflatten(1, (-1, count))
        return (apart.amin(4).mean(2) + apart.amin(2).mean(3)) / 2.0


def ordered_distance(
    found: Float[Tensor, "B N P 2"], wanted: Float[Tensor, "B N P 2"], closed: Bool[Tensor, "B N"]
) -> Float[Tensor, "B N"]:
    """Mean L1 distance of points in order; of closed outlines in whichever of the 2 P orders it is least."""
    orders = _orders(wanted.shape[2], wanted.device)
    apart = (found[..., None, :, :] - wanted[..., orders, :]).abs().sum(-1).mean(-1)
    return torch.where(closed, apart.amin(-1), apart[..., 0])


def _orders(count: int, device: torch.device) -> Int[Tensor, "2*count count"]:
    """Where to begin and which way round, as rows of indices; first the one that changes nothing."""
    place = torch.arange(count, device=device)
    onwards = (place[:, None] + place) % count
    return torch.cat([onwards, onwards.flip(1)])
