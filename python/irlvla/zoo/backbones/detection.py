"""Where the agents and objects are: boxes from a bird's-eye view."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from irlvla.types import Features, Kind, Scene
from irlvla.zoo.backbones.queries import QueryDecoder, assign, class_cost, class_head, class_loss, mean_over_valid, require_bev
from irlvla.zoo.backbones.targets import boxes_in, corners_of
from irlvla.zoo.layers import mlp

CODE = 8  # x, y, sine and cosine of the heading, logarithms of length and width, vx, vy
CODE_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.2)
SCALES = (0.01, 10.0)  # least and greatest scale of an error [m]


def encode(state: Float[Tensor, "... 7"]) -> Float[Tensor, "... 8"]:
    """Boxes (x y heading length width vx vy) as the network predicts them."""
    centre, heading, size, velocity = state.split([2, 1, 2, 2], -1)
    return torch.cat([centre, heading.sin(), heading.cos(), size.clamp(min=1e-3).log(), velocity], -1)


def decode(code: Float[Tensor, "... 8"]) -> Float[Tensor, "... 7"]:
    """The inverse of `encode`; sine and cosine may be of any length."""
    centre, sine, cosine, size, velocity = code.split([2, 1, 1, 2, 2], -1)
    return torch.cat([centre, torch.atan2(sine, cosine), size.exp(), velocity], -1)


class DetectionHead(nn.Module):
    """One token for each of some agents or objects, with its box, velocity and kind; makes `Features.agents`.

    30 agents and 3 decoder layers of 8 heads are those of DiffVLA. Matching costs, focal loss and weights are those of DETR3D.
    Of each layer the loss is taken, and its mean. With `uncertainty` it also predicts how far off, in the mean, the centre and the
    corners of each box are (scales of Laplace distributions, as DiffVLA does), and the tokens tell it.

    Predictions: `agent_boxes` "B L Q 8" (see `encode`), `agent_kinds` "B L Q 7" (logits by `Kind`), `agent_scales` "B L Q 10" [m].
    """

    class Config(QueryDecoder.Config):
        class_weight: float = Field(2.0, ge=0.0, description="of the focal loss of kinds")
        box_weight: float = Field(0.25, ge=0.0, description="of the L1 loss of boxes")
        uncertainty: float = Field(0.0, ge=0.0, description="weight of the Laplace likelihood; 0 = no uncertainty is predicted")
        threshold: float = Field(0.0, ge=0.0, lt=1.0, description="tokens of agents that are less likely are marked as not valid")

    code_weights: Tensor

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.config = config
        self.decoder = QueryDecoder(config, width, points=1)
        self.kind = class_head(width, len(Kind))
        self.box = mlp(width, width, CODE - 2)
        self.scale = mlp(width, width, 10) if config.uncertainty else None
        self.doubt = nn.Linear(10, width) if config.uncertainty else None
        self.register_buffer("code_weights", torch.tensor(CODE_WEIGHTS), persistent=False)

    def forward(self, features: Features) -> Features:
        """Raises `InputError` for features without a bird's-eye view."""
        layers, points = self.decoder(features)
        kinds, boxes = self.kind(layers), torch.cat([points[..., 0, :], self.box(layers).to(points.dtype)], -1)
        predictions = {"agent_kinds": kinds, "agent_boxes": boxes}
        tokens = layers[:, -1]
        if self.scale is not None and self.doubt is not None:
            least, greatest = SCALES
            scales = (least + functional.softplus(self.scale(layers).float())).clamp(max=greatest)
            predictions["agent_scales"] = scales
            tokens = tokens + self.doubt(scales[:, -1].log())
        valid = kinds[:, -1].sigmoid().amax(-1) >= self.config.threshold
        return dataclasses.replace(features, agents=tokens, agents_valid=valid, predictions=features.predictions | predictions)

    def loss(self, features: Features, scene: Scene) -> dict[str, Tensor]:
        """Means over scenes, of kinds and boxes against the nearest agents within the grid, as many as there are queries."""
        kinds, codes = (features.predictions[name].float().flatten(0, 1) for name in ("agent_kinds", "agent_boxes"))
        layers = self.config.layers
        target = boxes_in(scene, require_bev(features)[1], self.config.queries).to(codes.device)
        state, kind, valid = (part.repeat_interleave(layers, 0) for part in (target.state, target.kind, target.valid))
        wanted = encode(state)
        cost = torch.cdist(codes * self.code_weights, wanted * self.code_weights, p=1)
        query = assign(self.config.class_weight * class_cost(kinds, kind) + self.config.box_weight * cost, valid)
        found = codes.take_along_dim(query[..., None], 1)
        distance = ((found - wanted).abs() * self.code_weights).sum(-1)
        losses = {
            "agent_kinds": self.config.class_weight * class_loss(kinds, query, kind, valid).mean(),
            "agent_boxes": self.config.box_weight * mean_over_valid(distance, valid).mean(),
        }
        if self.scale is not None:
            scales = features.predictions["agent_scales"].flatten(0, 1).take_along_dim(query[..., None], 1)
            doubt = _laplace(_extremes(decode(found.detach())), _extremes(state), scales.unflatten(-1, (5, 2)))
            losses["agent_scales"] = self.config.uncertainty * mean_over_valid(doubt, valid).mean()
        return losses


def _extremes(state: Float[Tensor, "... 7"]) -> Float[Tensor, "... 5 2"]:
    """Centre and corners of boxes."""
    return torch.cat([state[..., None, :2], corners_of(state[..., :5])], -2)


def _laplace(found: Float[Tensor, "... 5 2"], wanted: Float[Tensor, "... 5 2"], scale: Float[Tensor, "... 5 2"]) -> Float[Tensor, "..."]:
    """Negative log-likelihood of errors, in the mean."""
    return ((found - wanted).abs() / scale + (2.0 * scale).log()).mean((-2, -1))
