"""The network that looks at drives: what is under the car, what is around, who it meets, and all of that over time."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from irlvla import components
from irlvla.errors import ConfigError, InputError
from irlvla.types import Features
from irlvla.zoo.layers import Attention, FeedForward, mlp, sample_bev, sinusoids
from irlvla.zoo.rewards.driving import FOOTPRINT, motion, under

Group = Literal["bev", "agents", "map", "status"]
SINES = 16  # numbers that a length or a time is encoded as
LONGEST = 16.0  # wavelength for times [s]
MOTION = 6  # numbers of `motion`
AGENT = 4  # numbers that say where an agent is and how it moves
SCALE = 10.0  # what is usual of them [m, m/s]
NEAR = (4.0, 2.0)  # metres along and across the car, within which the place of an agent is told precisely


class Surroundings(NamedTuple):
    """What the drives of a scene are judged by, the same for all of them. None = the features do not have it."""

    status: Float[Tensor, "B D"] | None
    tokens: Float[Tensor, "B N D"] | None
    valid: Bool[Tensor, "B N"] | None
    bev: Float[Tensor, "B C X Y"] | None
    extent: Float[Tensor, "B 4"] | None
    agents: Float[Tensor, "B A D"] | None
    agents_valid: Bool[Tensor, "B A"] | None


class DriveNetwork(nn.Module):
    """Tokens of drives, one for each moment. No drive sees another.

    A token begins as where the car is and how it moves, the car's status, and the bird's-eye view under its footprint. It meets the
    agents, each at the place where it is expected at that moment. Then, layer by layer, it attends to agents, map and the pooled
    bird's-eye view, and to the other moments of its drive.
    """

    class Config(components.Config):
        tokens: tuple[Group, ...] = Field(("bev", "agents", "map", "status"), description="token groups of the backbone that are read")
        width: int = Field(64, ge=2, description="width of the tokens of drives")
        layers: int = Field(2, ge=1, description="layers of attention to surroundings and over time")
        heads: int = Field(4, ge=1, description="of attention; they divide the width")
        expansion: int = Field(2, ge=1, description="hidden width of feed-forward layers, in widths")
        channels: int = Field(32, ge=1, description="of the bird's-eye view, as it is looked at under the car")
        bev_tokens: int = Field(8, ge=0, description="n: n x n pooled tokens of the bird's-eye view to attend to")
        meetings: int = Field(32, ge=0, description="hidden width in which car and agents are put in relation; 0 = they are not")
        dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of attention and feed-forward layers")

    def __init__(self, config: Any, inputs: int) -> None:
        """Raises `ConfigError` if the heads do not divide the width."""
        super().__init__()
        width = config.width
        if width % config.heads:
            raise ConfigError(f"{config.heads} heads do not divide tokens of width {width}; take a divisor of it")
        self.config = config
        sees = "bev" in config.tokens
        self.pose = mlp(3 * SINES + MOTION, width, width)
        self.status = nn.Linear(inputs, width) if "status" in config.tokens else None
        self.groups = nn.ModuleDict({name: nn.Linear(inputs, width) for name in ("agents", "map") if name in config.tokens})
        self.bev = nn.Conv2d(inputs, config.channels, 1) if sees else None
        self.ground = mlp(config.channels * len(FOOTPRINT), width, width) if sees else None
        self.pool = nn.Linear(inputs, width) if sees and config.bev_tokens else None
        self.place = nn.Linear(2 * SINES, width) if sees and config.bev_tokens else None
        self.meet = Meetings(config) if config.meetings and "agents" in config.tokens else None
        reads = len(self.groups) > 0 or self.pool is not None
        self.layers = nn.ModuleList(_Layer(config, reads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)

    def surroundings(self, features: Features) -> Surroundings:
        """Raises `InputError` for a bird's-eye view that does not say what it covers."""
        bev, extent = (features.bev, features.bev_range) if self.bev is not None else (None, None)
        if bev is not None and extent is None:
            raise InputError("these features have bev without bev_range: the backbone must say what its bird's-eye view covers")
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in self.groups.items():
            tokens, valid = getattr(features, name), getattr(features, f"{name}_valid")
            if tokens is not None and tokens.shape[1]:
                found[name] = layer(tokens), tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if valid is None else valid
        agents, agents_valid = found.get("agents", (None, None))
        if bev is not None and extent is not None and self.pool is not None:
            pooled = self._pooled(bev, extent)
            found["bev"] = pooled, pooled.new_ones(pooled.shape[:2], dtype=torch.bool)
        return Surroundings(
            None if self.status is None or features.status is None else self.status(features.status),
            torch.cat([tokens for tokens, _ in found.values()], 1) if found else None,
            torch.cat([valid for _, valid in found.values()], 1) if found else None,
            None if self.bev is None or bev is None else self.bev(bev).float(),
            extent,
            agents,
            agents_valid,
        )

    def forward(
        self, around: Surroundings, poses: Float[Tensor, "B K S 3"], times: Float[Tensor, " S"], speed: Float[Tensor, " B"]
    ) -> Float[Tensor, "B K S D"]:
        """Tokens of poses at evenly spaced times; `speed` is that at t = 0."""
        clock = sinusoids(times[:, None], SINES, LONGEST)
        moving = motion(poses, speed, float(times[0]))
        tokens = self.pose(torch.cat([sinusoids(poses[..., :2], SINES), moving, clock.expand(*poses.shape[:2], -1, -1)], -1))
        if around.status is not None:
            tokens = tokens + around.status[:, None, None]
        if self.ground is not None and around.bev is not None and around.extent is not None:
            seen = sample_bev(around.bev, around.extent.float(), under(poses))
            tokens = tokens + self.ground(seen.flatten(-2))
        if self.meet is not None and around.agents is not None and around.agents_valid is not None:
            tokens = tokens + self.meet(tokens, poses, around.agents, around.agents_valid, times)
        for layer in self.layers:
            tokens = layer(tokens, around.tokens, around.valid)
        return self.norm(tokens)

    def _pooled(self, bev: Float[Tensor, "B D X Y"], extent: Float[Tensor, "B 4"]) -> Float[Tensor, "B N D"]:
        """Coarse tokens of the bird's-eye view, each with where it is."""
        assert self.pool is not None
        assert self.place is not None
        n = self.config.bev_tokens
        steps = (torch.arange(n, device=bev.device) + 0.5) / n
        x, y = (extent[:, i, None] + (extent[:, i + 1] - extent[:, i])[:, None] * steps for i in (0, 2))
        places = torch.stack([x[:, :, None].expand(-1, n, n), y[:, None, :].expand(-1, n, n)], -1).flatten(1, 2)
        return self.pool(functional.adaptive_avg_pool2d(bev, n).flatten(2).mT) + self.place(sinusoids(places, SINES))


class Meetings(nn.Module):
    """Which agents are where the car is, at the same time.

    From its token follows where an agent is and how it moves, straight on but for what the network knows better; nobody tells it, it
    is learned from who collides. The place is seen from the car, and the greatest of each channel over all agents is kept: the most
    dangerous one counts.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.width, config.meetings
        self.present, self.deviation = mlp(width, width, AGENT), mlp(width + SINES, width, 2)
        self.who, self.here, self.place = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(6, hidden)
        self.pair = nn.Sequential(nn.GELU(), nn.Linear(hidden, hidden), nn.GELU())
        self.out = nn.Linear(hidden, width)

    def forward(
        self,
        tokens: Float[Tensor, "B K S D"],
        poses: Float[Tensor, "B K S 3"],
        agents: Float[Tensor, "B A D"],
        valid: Bool[Tensor, "B A"],
        times: Float[Tensor, " S"],
    ) -> Float[Tensor, "B K S D"]:
        place, velocity = self._futures(agents, times)
        pairs = self.place(_seen_from(poses, place, velocity)) + self.who(agents)[:, None, None] + self.here(tokens)[..., None, :]
        pairs = self.pair(pairs).masked_fill(~valid[:, None, None, :, None], 0.0)
        return self.out(pairs.amax(-2))

    def _futures(
        self, agents: Float[Tensor, "B A D"], times: Float[Tensor, " S"]
    ) -> tuple[Float[Tensor, "B S A 2"], Float[Tensor, "B 1 A 2"]]:
        """Where agents will be [m], and their velocities [m/s]."""
        place, velocity = (SCALE * self.present(agents).float()).split(2, -1)
        clock = sinusoids(times[:, None], SINES, LONGEST)[:, None].expand(len(agents), -1, agents.shape[1], -1)
        deviation = self.deviation(torch.cat([agents[:, None].expand(-1, len(times), -1, -1), clock], -1)).float()
        there = place[:, None] + times[:, None, None] * (velocity[:, None] + deviation)
        return there, velocity[:, None]


def _seen_from(
    poses: Float[Tensor, "B K S 3"], place: Float[Tensor, "B S A 2"], velocity: Float[Tensor, "B 1 A 2"]
) -> Float[Tensor, "B K S A 6"]:
    """Places and velocities of agents from the centre of the car: ahead and to the left, precise where they are near, and far."""
    cos, sin = poses[..., 2, None].cos(), poses[..., 2, None].sin()

    def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return cos * x + sin * y, cos * y - sin * x

    there = place[:, None]
    along, across = turned(there[..., 0] - poses[..., 0, None], there[..., 1] - poses[..., 1, None])
    along = along - FOOTPRINT[0][0]
    fast, aside = turned(velocity[:, None, ..., 0] / SCALE, velocity[:, None, ..., 1] / SCALE)
    return torch.stack([(along / NEAR[0]).tanh(), (across / NEAR[1]).tanh(), along / 20.0, across / 20.0, fast, aside], -1)


class _Layer(nn.Module):
    def __init__(self, config: Any, reads: bool) -> None:
        super().__init__()
        self.read = Attention(config.width, config.heads, config.dropout) if reads else None
        self.over_time = Attention(config.width, config.heads, config.dropout)
        self.feed = FeedForward(config.width, config.expansion * config.width, config.dropout)

    def forward(
        self, tokens: Float[Tensor, "B K S D"], around: Float[Tensor, "B N D"] | None, valid: Bool[Tensor, "B N"] | None
    ) -> Float[Tensor, "B K S D"]:
        if self.read is not None and around is not None:
            tokens = self.read(tokens.flatten(1, 2), around, valid).view_as(tokens)
        drives = tokens.flatten(0, 1)
        return self.feed(self.over_time(drives, drives).view_as(tokens))
