"""From tokens of drives to sub-metrics: a head for each.

All but EP are events: the first failure, at one of the moments of a drive, decides. A metric of C classes (0, 1 or 0, 1/2, 1) has
log-probabilities of them at each moment: what happens then, if nothing has before; the last class is that nothing does (a
discrete-time hazard model of competing risks). So a drive is as good as its worst moment.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from irlvla.types import HORIZON, PROGRESS_THRESHOLD
from irlvla.zoo.layers import Attention, FeedForward, mlp
from irlvla.zoo.rewards.network import Surroundings

SAFE = 4.0  #: logit by which a new network thinks a moment safe: of ten, one in six drives fails
ALONG = 4.0  #: logit of how much of a drive a new network takes to be along the route
DISTANCES = PROGRESS_THRESHOLD * 22.0 ** torch.linspace(0.0, 1.0, 47)  #: that the reference may get [m], each 7 % farther
BELLS = 4
SHIFTS = (-1.0, 0.2)  #: from where the bells of a new network stand to that of constant speed: e times less far, a fifth farther
NARROWEST = 0.03  #: deviation of a bell


class EventHead(nn.Module):
    """What befalls drives, from the tokens of their moments; one more moment stands for what only the whole drive tells."""

    prior: Tensor

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.moment, self.whole = mlp(width, width // 2, classes), mlp(2 * width, width, classes)
        self.register_buffer("prior", SAFE * functional.one_hot(torch.tensor(classes - 1), classes), persistent=False)

    def forward(self, tokens: Float[Tensor, "B K S D"], whole: Float[Tensor, "B K 2*D"]) -> Float[Tensor, "B K S+1 C"]:
        """Log-probabilities of what happens at each moment."""
        logits = torch.cat([self.moment(tokens), self.whole(whole)[..., None, :]], -2)
        return functional.log_softmax(logits.float() + self.prior, -1)


def outcome(moments: Float[Tensor, "*n S C"]) -> Float[Tensor, "*n C"]:
    """Log-probabilities of the classes in the end."""
    failed = (_before(moments)[..., None] + moments[..., :-1]).logsumexp(-2)
    return torch.cat([failed, moments[..., -1].sum(-1, keepdim=True)], -1)


def likelihood(moments: Float[Tensor, "*n S C"], kind: Int[Tensor, "*n"], moment: Int[Tensor, "*n"] | None = None) -> Float[Tensor, "*n"]:
    """Log-likelihood of classes and, where it is known (not negative), of the moment when a failure begins."""
    of_class = outcome(moments).gather(-1, kind[..., None])[..., 0]
    if moment is None:
        return of_class
    known = (moment >= 0) & (kind < moments.shape[-1] - 1)
    of_kind = moments.take_along_dim(kind[..., None, None], -1)[..., 0]
    return torch.where(known, (_before(moments) + of_kind).gather(-1, moment.clamp(min=0)[..., None])[..., 0], of_class)


def _before(moments: Float[Tensor, "*n S C"]) -> Float[Tensor, "*n S"]:
    """Log-probability that nothing happens before a moment."""
    return functional.pad(moments[..., :-1, -1].cumsum(-1), (1, 0))


class ReferenceHead(nn.Module):
    """How far the reference of EP gets in a scene: a query reads the surroundings, and from it come log-probabilities of distances.

    The first stands for at most 5 m, where EP is 1 for everybody. The others are a mixture of bells over the logarithm of the
    distance, each so far from that of constant speed.
    """

    distances: Tensor
    shifts: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.width
        self.query = nn.Parameter(0.02 * torch.randn(width))
        self.read = nn.ModuleList(Attention(width, config.heads, config.dropout) for _ in range(config.layers))
        self.feed = nn.ModuleList(FeedForward(width, config.expansion * width, config.dropout) for _ in range(config.layers))
        self.bells = nn.Sequential(nn.LayerNorm(width), mlp(width, width, 1 + 3 * BELLS))
        self.register_buffer("distances", DISTANCES.log(), persistent=False)
        self.register_buffer("shifts", torch.linspace(*SHIFTS, BELLS), persistent=False)

    def forward(self, around: Surroundings, speed: Float[Tensor, " B"]) -> Float[Tensor, "B N+1"]:
        query = self.query.expand(len(speed), 1, -1)
        if around.status is not None:
            query = query + around.status[:, None]
        for read, feed in zip(self.read, self.feed, strict=True):
            query = feed(query if around.tokens is None else read(query, around.tokens, around.valid))
        none, weight, shift, scale = self.bells(query[:, 0]).float().split([1, BELLS, BELLS, BELLS], -1)
        centre = (HORIZON * speed).clamp(min=PROGRESS_THRESHOLD).log()[:, None] + self.shifts + shift
        scale = NARROWEST + functional.softplus(scale - 1.0)
        away = (self.distances[:, None] - centre[:, None]) / scale[:, None]
        bells = (weight - scale.log())[:, None] - away.square() / 2.0
        return functional.log_softmax(torch.cat([none, bells.logsumexp(-1)], -1), -1)


class ProgressHead(nn.Module):
    """EP: how far a drive gets over how far the reference gets, 1 at most, and 1 where the reference makes next to nothing.

    A drive gets as far as it is long, less what of it is not along the route. EP is the mean over what the reference may do.
    """

    distances: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.share = mlp(2 * width, width, 1)
        self.register_buffer("distances", DISTANCES, persistent=False)

    def forward(
        self, whole: Float[Tensor, "B K 2*D"], length: Float[Tensor, "B K"], reference: Float[Tensor, "B N+1"]
    ) -> Float[Tensor, "B K"]:
        progress = length.float() * (ALONG + self.share(whole).float().squeeze(-1)).sigmoid()
        earned = functional.pad((progress[..., None] / self.distances).clamp(max=1.0), (1, 0), value=1.0)
        return (earned * reference.exp()[:, None]).sum(-1)

    def place(self, metres: Float[Tensor, " B"]) -> Float[Tensor, "B N+1"]:
        """A distance as such a distribution: all of it on the two that are next to it, by their logarithms."""
        low, step = self.distances[0].log(), self.distances.log().diff().mean()
        row = ((metres.clamp(min=1e-3).log() - low) / step).clamp(max=len(self.distances) - 1.0)
        row = torch.where(metres <= PROGRESS_THRESHOLD, 0.0, 1.0 + row)
        return (1.0 - (row[..., None] - torch.arange(len(self.distances) + 1, device=metres.device)).abs()).clamp(min=0.0)
