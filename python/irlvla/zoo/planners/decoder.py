"""The trajectory decoder that planners share: proposals look at tokens and at the bird's-eye view along their way, and are refined."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from irlvla import components
from irlvla.errors import ConfigError, InputError
from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, WIDTH, Features
from irlvla.zoo.layers import Attention, FeedForward, mlp, sample_bev, sinusoids
from irlvla.zoo.planners.curves import Curves

Group = Literal["bev", "agents", "map", "status", "language"]
SEQUENCES = ("agents", "map", "language")

#: Where a proposal looks, from its rear axle [m]: the centre of the car, and its corners, which decide whether it is on the road.
FOOTPRINT = [
    (REAR_AXLE_TO_CENTRE + along * LENGTH / 2.0, across * WIDTH / 2.0) for along, across in ((0, 0), (1, 1), (1, -1), (-1, -1), (-1, 1))
]
SINES = 16  # numbers that a length is encoded as
TIMES = 32  # numbers that a time step is encoded as


class Memory(NamedTuple):
    """What proposals read of the features; the same for all steps of a chain."""

    tokens: Float[Tensor, "B N D"] | None
    valid: Bool[Tensor, "B N"] | None
    bev: Float[Tensor, "B D X Y"] | None
    bev_range: Float[Tensor, "B 4"] | None
    status: Float[Tensor, "B 1 D"] | None


class Decoded(NamedTuple):
    """What each layer makes of proposals, and what the last one knows of them."""

    estimates: list[Float[Tensor, "B K T 2"]]  # coordinates of `Curves`, float32
    scores: list[Float[Tensor, "B K"]]  # logits, float32
    tokens: Float[Tensor, "B K D"]


class TrajectoryDecoder(nn.Module):
    """Scores proposals and refines them, layer by layer (after DiffusionDrive; with residuals, and norms before instead of behind).

    A proposal is one query. None sees another: K decoded together are K decoded alone. In each layer a query

    1. is scaled and shifted by the time step of its chain and by the status (with it the driving command),
    2. attends to agents, map, language and the pooled bird's-eye view,
    3. reads the bird's-eye view under the car's footprint at each of its poses, side by side, so that it is known what was where,
    4. goes through a feed-forward layer; from it come a score and what to add to the proposal.

    Token groups that the features do not have are not attended.
    """

    class Config(components.Config):
        tokens: tuple[Group, ...] = Field(("bev", "agents", "map", "language", "status"), description="token groups that the planner reads")
        layers: int = Field(2, ge=1, description="layers of the decoder")
        heads: int = Field(8, ge=1, description="heads of its attention; they divide the width of the tokens")
        expansion: int = Field(4, ge=1, description="hidden width of its feed-forward layers, in widths of the tokens")
        dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of its attention and feed-forward layers")
        bev_tokens: int = Field(8, ge=0, description="n: n x n pooled tokens of the bird's-eye view to attend to")
        footprint: bool = Field(True, description="look under the car's centre and corners along proposals; false = at its rear axle")
        glance: int = Field(16, ge=1, description="numbers that are read of the bird's-eye view at each of these points")

    footing: Tensor

    def __init__(self, config: Any, width: int, curves: Curves, *, chained: bool = False, refines: bool = True) -> None:
        """With `chained` it is told of states of a chain; without `refines` it only scores.

        Raises `ConfigError` for heads that do not divide the width.
        """
        super().__init__()
        if width % config.heads:
            raise ConfigError(f"heads={config.heads} must divide the width of the tokens, {width}")
        self.config, self.curves = config, curves
        sees = "bev" in config.tokens
        self.encode = mlp(curves.count * (2 * SINES + 4), width, width)
        self.time = mlp(TIMES, width, width) if chained else None
        self.state = nn.Linear(2 * curves.count, width) if chained else None
        self.status = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) if "status" in config.tokens else None
        self.groups = nn.ParameterDict({name: nn.Parameter(0.02 * torch.randn(width)) for name in SEQUENCES if name in config.tokens})
        self.place = nn.Linear(2 * SINES, width) if sees and config.bev_tokens else None
        self.register_buffer("footing", torch.tensor(FOOTPRINT if config.footprint else [(0.0, 0.0)]), persistent=False)
        looks = curves.count * len(self.footing) if sees else 0
        reads = len(self.groups) > 0 or self.place is not None
        conditioned, outputs = chained or self.status is not None, 2 * curves.count if refines else 0
        self.layers = nn.ModuleList(_Layer(config, width, conditioned, reads, looks, outputs) for _ in range(config.layers))

    def memory(self, features: Features) -> Memory:
        """Raises `InputError` for a bird's-eye view that does not say what it covers."""
        bev, extent = (features.bev, features.bev_range) if "bev" in self.config.tokens else (None, None)
        if bev is not None and extent is None:
            raise InputError("these features have bev without bev_range: the backbone must say what its bird's-eye view covers")
        found: list[tuple[Tensor, Tensor | None]] = []
        for name, group in self.groups.items():
            if (tokens := getattr(features, name)) is not None:
                found.append((tokens + group, getattr(features, f"{name}_valid")))
        if bev is not None and extent is not None and self.place is not None:
            found.append((self._pooled(bev, extent), None))
        valid = [tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if there is None else there for tokens, there in found]
        status = None if self.status is None or features.status is None else self.status(features.status)[:, None]
        return Memory(
            torch.cat([tokens for tokens, _ in found], 1) if found else None,
            torch.cat(valid, 1) if any(there is not None for _, there in found) else None,
            None if bev is None else bev.float(),  # places of a bfloat16 grid are known to a quarter of a metre only
            extent,
            status,
        )

    def forward(
        self,
        memory: Memory,
        proposals: Float[Tensor, "B K T 2"],
        states: Float[Tensor, "B K T 2"] | None = None,
        times: Float[Tensor, "B K"] | None = None,
    ) -> Decoded:
        """Proposals in coordinates of `Curves`; of a chain its states too, and their times between 0 and 100."""
        estimate, estimates, scores = proposals.float(), [], []
        tokens, condition = proposals.new_zeros(()), memory.status
        if self.time is not None and self.state is not None and states is not None and times is not None:
            tokens = self.state((states - proposals).flatten(-2))
            time = self.time(sinusoids(times[..., None], TIMES))
            condition = time if condition is None else time + condition
        for layer in self.layers:
            here = estimate.detach()
            poses = self.curves.poses(self.curves.positions(here))
            tokens = tokens + self.encode(_described(here, poses))
            tokens, estimate, score = layer(tokens, estimate, condition, memory, self._look(memory, poses))
            estimates.append(estimate)
            scores.append(score)
        return Decoded(estimates, scores, tokens)

    def _pooled(self, bev: Float[Tensor, "B D X Y"], extent: Float[Tensor, "B 4"]) -> Float[Tensor, "B N D"]:
        """Coarse tokens of the bird's-eye view, each with where it is."""
        assert self.place is not None
        n = self.config.bev_tokens
        steps = (torch.arange(n, device=bev.device) + 0.5) / n
        x, y = (extent[:, i, None] + (extent[:, i + 1] - extent[:, i])[:, None] * steps for i in (0, 2))
        places = torch.stack([x[:, :, None].expand(-1, n, n), y[:, None, :].expand(-1, n, n)], -1).flatten(1, 2)
        pooled = nn.functional.adaptive_avg_pool2d(bev, n).flatten(2).mT
        return pooled + self.place(sinusoids(places, SINES))

    def _look(self, memory: Memory, poses: Float[Tensor, "B K T 3"]) -> Float[Tensor, "B K N D"] | None:
        """The bird's-eye view under the footprint of each pose."""
        if memory.bev is None or memory.bev_range is None:
            return None
        cos, sin = poses[..., 2, None].cos(), poses[..., 2, None].sin()
        along, across = self.footing.unbind(1)
        x = poses[..., 0, None] + cos * along - sin * across
        y = poses[..., 1, None] + sin * along + cos * across
        return sample_bev(memory.bev, memory.bev_range.float(), torch.stack([x, y], -1)).flatten(2, 3)


class _Layer(nn.Module):
    def __init__(self, config: Any, width: int, conditioned: bool, reads: bool, looks: int, outputs: int) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.GELU(), nn.Linear(width, 2 * width)) if conditioned else None
        self.read = Attention(width, config.heads, config.dropout) if reads else None
        self.glance = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.glance)) if looks else None
        self.look = mlp(looks * config.glance, 2 * width, width) if looks else None
        self.feed = FeedForward(width, config.expansion * width, config.dropout)
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        self.change = mlp(width, width, outputs) if outputs else None
        if self.change is not None:  # a new planner drives its proposals
            for parameter in self.change[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: Float[Tensor, "B K D"],
        estimate: Float[Tensor, "B K T 2"],
        condition: Float[Tensor, "B #K D"] | None,
        memory: Memory,
        seen: Float[Tensor, "B K N D"] | None,
    ) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B K T 2"], Float[Tensor, "B K"]]:
        """Tokens, estimates and scores of proposals."""
        if self.modulation is not None and condition is not None:
            scale, shift = self.modulation(condition).chunk(2, -1)
            tokens = tokens * (1.0 + scale) + shift
        if self.read is not None and memory.tokens is not None:
            tokens = self.read(tokens, memory.tokens, memory.valid)
        if self.glance is not None and self.look is not None and seen is not None:
            tokens = tokens + self.look(self.glance(seen).flatten(-2))
        tokens = self.feed(tokens)
        known = self.norm(tokens)
        change = 0.0 if self.change is None else self.change(known).float().view_as(estimate)
        return tokens, estimate + change, self.score(known).squeeze(-1).float()


def _described(coordinates: Float[Tensor, "B K T 2"], poses: Float[Tensor, "B K T 3"]) -> Float[Tensor, "B K N"]:
    """Proposals as numbers for a network: coordinates, places as sinusoids, and directions."""
    heading = poses[..., 2]
    places = sinusoids(poses[..., :2].flatten(-2), SINES)
    return torch.cat([coordinates.flatten(-2), places, heading.cos(), heading.sin()], -1)
