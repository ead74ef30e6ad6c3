"""What is around the car, straight from the truth: agents, map and route as tokens, without images."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from irlvla import components
from irlvla.errors import ConfigError, InputError
from irlvla.types import Features, Kind, Observation, Scene
from irlvla.zoo.backbones.status import StatusBackbone
from irlvla.zoo.backbones.targets import Boxes, Element, Elements, boxes_in, elements_in
from irlvla.zoo.layers import Attention, FeedForward, mlp, sinusoids

SINES = 16  # of each coordinate
SCALE = (1.0, 1.0, 5.0, 2.0, 10.0, 10.0)  # usual magnitudes of sine and cosine of the heading, length, width, vx, vy
SPEED = 10.0  # usual speed limit [m/s]
STEP = 10.0  # usual distance from one point of a map element to the next [m]


class VectorBackbone(components.Backbone):
    """Boxes and velocities of agents, outlines of lanes and intersections with their lights, the route's centreline, the speed limit,
    and the car's own status, as they are at t = 0; makes `Features.agents`, `map` and `status`.

    It is privileged: it needs `Observation.scene`. For data without cameras, and as an upper bound of what cameras can tell. Map
    elements are encoded as in VectorNet (an MLP over vectors, the greatest of each channel), and all tokens attend to each other.
    """

    class Config(components.Config):
        width: int = Field(64, ge=1, description="width of the tokens")
        layers: int = Field(2, ge=0, description="of self-attention among all tokens")
        heads: int = Field(4, ge=1, description="of attention; they divide the width")
        dropout: float = Field(0.0, ge=0.0, lt=1.0, description="in attention and feed-forward layers")
        extent: tuple[float, float, float, float] = Field(
            (-32.0, 64.0, -40.0, 40.0), description="what is seen: least x, greatest x (ahead), least y, greatest y (left) [m]"
        )
        agents: int = Field(32, ge=0, description="how many agents at most, the nearest; 0 = no agent tokens")
        elements: int = Field(64, ge=0, description="how many map elements at most, the nearest; 0 = no map tokens")
        points: int = Field(20, ge=2, description="of each map element")
        frames: int = Field(4, ge=1, description="how many frames of the car's own history are read, up to t = 0")

    scale: Tensor

    def __init__(self, config: Any) -> None:
        """Raises `ConfigError` if the heads do not divide the width or the extent is empty."""
        super().__init__(config)
        width = self.width = config.width
        if width % config.heads:
            raise ConfigError(f"{config.heads} heads do not divide tokens of width {width}; take a divisor of it")
        if config.extent[0] >= config.extent[1] or config.extent[2] >= config.extent[3]:
            raise ConfigError(f"extent must be least x, greatest x, least y, greatest y [m], got {config.extent}")
        self.register_buffer("scale", torch.tensor(SCALE))  # a buffer: it is saved with the weights that rely on it
        self.status = StatusBackbone(StatusBackbone.Config(width=width, frames=config.frames))
        self.limit = nn.Linear(2, width)
        self.agent = mlp(2 * SINES + len(SCALE) + len(Kind), width, width)
        self.vector = mlp(2 * SINES + 2, width, width)
        self.element = mlp(width + len(Element) + 1, width, width)
        self.attention = nn.ModuleList(Attention(width, config.heads, config.dropout) for _ in range(config.layers))
        self.feed = nn.ModuleList(FeedForward(width, 2 * width, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, obs: Observation) -> Features:
        """Raises `InputError` for an observation without scene, or with a shorter history than it reads."""
        config, scene = self.config, self._scene(obs)
        extent = torch.tensor(config.extent).expand(len(scene), 4)
        boxes = boxes_in(scene, extent, config.agents).to(self.scale.device)
        elements = elements_in(scene, extent, config.elements, config.points).to(self.scale.device)
        parts = [self._status(obs, scene)[:, None], self._agents(boxes), self._elements(elements)]
        tokens, valid = torch.cat(parts, 1), torch.cat([boxes.valid.new_ones(len(scene), 1), boxes.valid, elements.valid], 1)
        for attention, feed in zip(self.attention, self.feed, strict=True):
            tokens = feed(attention(tokens, tokens, valid))
        status, agents, lines = self.norm(tokens).split([1, config.agents, config.elements], 1)
        features = Features(obs, status=status[:, 0])
        if config.agents:
            features = dataclasses.replace(features, agents=agents, agents_valid=boxes.valid)
        if config.elements:
            features = dataclasses.replace(features, map=lines, map_valid=elements.valid)
        return features

    def _scene(self, obs: Observation) -> Scene:
        if obs.scene is None:
            raise InputError(
                f"{self} sees the truth, and these observations have no scene: take a dataset that puts it there; "
                "the built-in 'scenes', 'cached' and 'synthetic' do with privileged: true"
            )
        return obs.scene

    def _status(self, obs: Observation, scene: Scene) -> Float[Tensor, "B D"]:
        limit = scene.speed_limit.to(self.scale)
        known = ~limit.isnan()
        return self.status(obs).status + self.limit(torch.stack([torch.where(known, limit / SPEED, 0.0), known.to(limit)], -1))

    def _agents(self, boxes: Boxes) -> Float[Tensor, "B N D"]:
        def encode(state: Float[Tensor, "M 7"], kind: Int[Tensor, " M"]) -> Float[Tensor, "M D"]:
            place, heading, motion = state.split([2, 1, 4], -1)
            numbers = torch.cat([heading.sin(), heading.cos(), motion], -1) / self.scale
            return self.agent(torch.cat([sinusoids(place, SINES), numbers, functional.one_hot(kind, len(Kind))], -1))

        return _spread(encode(boxes.state[boxes.valid], boxes.kind[boxes.valid]), boxes.valid)

    def _elements(self, elements: Elements) -> Float[Tensor, "B N D"]:
        """From the vectors from each point to the next: of a closed outline also from the last to the first."""

        def encode(points: Float[Tensor, "M P 2"], kind: Int[Tensor, " M"], on_route: Bool[Tensor, " M"]) -> Float[Tensor, "M D"]:
            step = points.roll(-1, 1) - points
            vectors = self.vector(torch.cat([sinusoids(points, SINES), step / STEP], -1))
            none = torch.zeros_like(vectors[..., 0], dtype=torch.bool)
            none[:, -1] = kind == Element.CENTRELINE
            greatest = vectors.masked_fill(none[..., None], -torch.inf).amax(1)
            return self.element(torch.cat([greatest, functional.one_hot(kind, len(Element)), on_route[:, None]], -1))

        valid = elements.valid
        return _spread(encode(elements.points[valid], elements.kind[valid], elements.on_route[valid]), valid)


def _spread(rows: Float[Tensor, "M D"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, "B N D"]:
    """Rows where they are valid, and zeros elsewhere: what does not exist costs nothing to encode."""
    table = rows.new_zeros(*valid.shape, rows.shape[1])
    table[valid] = rows
    return table
