"""Candidates: plans that a reward is learned from, good and bad ones. All in the ego frame of their scene.

Candidate 0 of a scene is its human's drive. Around it lie drives that people made elsewhere, the human's drive changed (to a
side, in speed, in heading, to a stop), straight drives of constant speed changed alike, and what a policy proposes. Changes are
smooth, and they are made along the way: a car that stands is never moved sideways.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Generator, Tensor
from torch.nn import functional

from irlvla.clusters import kmeans
from irlvla.components import Config
from irlvla.errors import InputError
from irlvla.types import METRICS, Batch, Plan, Trajectory

EASE = 2.0  #: seconds until a change of speed has its full size
STEEPEST = 0.5  #: metres aside per metre ahead, at most, for a change to a side alone
HARDEST = 6.0  #: acceleration that it takes, at most [m/s^2]
TIGHTEST = 0.15  #: greatest curvature of a drift [1/m]
NEAR = 2.0  #: metres: drives of the vocabulary that differ from the human's by so much more are e times less likely to be chosen
REACH = 0.1  #: metres ahead and behind, between which a heading is measured


class Source(IntEnum):
    """How a candidate was made."""

    HUMAN = 0
    VOCABULARY = 1  # a human's drive of another scene
    LATERAL = 2  # the human's drive: to a side
    SPEED = 3  # faster or slower
    HEADING = 4  # turning away
    STOP = 5  # braking, from comfortable to as hard as a car can
    SWERVE = 6  # to a side and back
    MIXED = 7  # several of these at once
    CONSTANT_VELOCITY = 8  # straight on at the present speed, and changed as in MIXED
    POLICY = 9  # what a policy proposed, at some step of its chain


class CandidateConfig(Config):
    """How many candidates of each source a scene gets beside the human's drive, and how far they go."""

    vocabulary: int = Field(6, ge=0, description="human drives of other scenes, half of them near the human's, half any")
    lateral: int = Field(4, ge=0, description="to a side")
    speed: int = Field(4, ge=0, description="faster or slower")
    heading: int = Field(2, ge=0, description="turning away")
    stop: int = Field(3, ge=0, description="braking")
    swerve: int = Field(2, ge=0, description="to a side and back")
    mixed: int = Field(6, ge=0, description="several changes at once")
    constant_velocity: int = Field(4, ge=0, description="straight on at the present speed, with several changes at once")
    offset: float = Field(3.0, ge=0.0, description="greatest offset to a side [m]")
    pace: float = Field(1.6, ge=1.0, description="greatest factor of the speed; its inverse is the least")
    acceleration: float = Field(1.5, ge=0.0, description="greatest acceleration that is added or taken away [m/s^2]")
    turn: float = Field(0.4, ge=0.0, description="greatest change of heading until the end [rad]")
    braking: tuple[float, float] = Field((1.0, 8.0), description="least and greatest deceleration of a stop [m/s^2]")


@dataclass(frozen=True)
class Candidates(Batch):
    """K candidates for each of B scenes, and where they come from."""

    plan: Plan
    source: Int[Tensor, "B K"]  # Source

    def chosen(self, rows: Int[Tensor, "B N"]) -> Candidates:
        """N of the candidates of each scene."""
        return Candidates(Plan(self.plan.poses.take_along_dim(rows[..., None, None], 1), self.plan.dt), self.source.take_along_dim(rows, 1))


def make_candidates(
    human: Trajectory,
    speed: Float[Tensor, " B"],
    config: CandidateConfig,
    generator: Generator,
    *,
    vocabulary: Float[Tensor, "M T 3"] | None = None,
    policy: Float[Tensor, "B S T 3"] | None = None,
) -> Candidates:
    """Candidates for each scene, in the order of `Source`. The same state of the generator gives the same candidates.

    Args:
        human: the drives of the scenes' humans, "B T 3".
        speed: of the car at t = 0 [m/s].
        vocabulary: drives to choose from; see `vocabulary_of`.
        policy: poses that a policy proposed, of any steps of its chains; all of them become candidates.

    Raises:
        InputError: a scene has no human drive, or the vocabulary is too small or of other poses.
    """
    poses = human.poses.float()
    if unknown := poses.isnan().flatten(1).any(1).nonzero()[:, 0].tolist():
        raise InputError(f"scenes {', '.join(map(str, unknown[:5]))} have no human drive to make candidates of; leave them out")
    found, source = [poses[:, None]], [Source.HUMAN]
    if config.vocabulary:
        found.append(_from_vocabulary(poses, vocabulary, config.vocabulary, generator))
        source += [Source.VOCABULARY] * config.vocabulary
    kinds = [kind for kind in Source if Source.LATERAL <= kind <= Source.CONSTANT_VELOCITY for _ in range(_count(config, kind))]
    if kinds:
        found.append(_changed(poses, speed.to(poses), human.dt, kinds, config, generator))
        source += kinds
    if policy is not None:
        found.append(policy.to(poses))
        source += [Source.POLICY] * policy.shape[1]
    sources = torch.tensor(source, device=poses.device).expand(len(poses), -1)
    return Candidates(Plan(torch.cat(found, 1), human.dt), sources)


def _count(config: CandidateConfig, kind: Source) -> int:
    return getattr(config, kind.name.lower())


# -- choosing among candidates and scenes ------------------------------------------------------------------------------


def balanced(values: Float[Tensor, "B K 9"], keep: int, generator: Generator) -> Int[Tensor, "B keep"]:
    """Which candidates of a larger pool to learn from, so that rare failures are among them: the first, one that fails each metric
    where there is such a one, and others by chance, the more likely the fewer fail, or pass, as they do.

    Args:
        values: sub-metrics of the pool; below 1 a metric fails (EP below 0.5), NaN neither fails nor passes.

    Raises:
        InputError: the pool is too small, or so few are kept that not every metric could have its failure.
    """
    if not len(METRICS) < keep <= values.shape[1]:
        raise InputError(f"keep={keep} must be more than the {len(METRICS)} metrics and at most the {values.shape[1]} candidates there are")
    least = torch.tensor([0.5 if name == "ep" else 1.0 for name in METRICS], device=values.device)
    fails, passes = values < least, values >= least
    differ = fails.any(1, keepdim=True) & passes.any(1, keepdim=True)
    shares = [outcome.float() / outcome.sum(1, keepdim=True).clamp(min=1) for outcome in (fails & differ, passes & differ)]
    weight = (shares[0] + shares[1]).sum(-1)
    priority = weight.clamp(min=1e-6).log() + _gumbel(weight.shape, generator, values.device)
    leaders = torch.where(fails, priority[..., None], -torch.inf).argmax(1, keepdim=True)  # B 1 9
    wanted = torch.zeros_like(fails).scatter(1, leaders, True) & fails
    priority = priority.masked_fill(wanted.any(-1), torch.inf)
    priority[:, 0] = torch.inf
    return priority.topk(keep, dim=1).indices.sort(1).values


def hardness(score: Float[Tensor, "B K"]) -> Float[Tensor, " B"]:
    """How much the candidates of each scene differ in their score (its variance, between 0 and 1/4): there is most to learn where
    it matters what one does."""
    return score.var(1, correction=0)


def vocabulary_of(drives: Float[Tensor, "N T 3"], count: int) -> Float[Tensor, "count T 3"]:
    """Human drives that stand for all: those next to the centres of a K-means of positions. Fewer, where fewer differ."""
    known = drives[drives.isfinite().flatten(1).all(1)].cpu()
    points = known[..., :2].flatten(1)
    centres = kmeans(points, min(count, len(torch.unique(points, dim=0))))
    return known[torch.cdist(centres, points).argmin(1)].to(drives)


def _from_vocabulary(
    human: Float[Tensor, "B T 3"], vocabulary: Float[Tensor, "M T 3"] | None, count: int, generator: Generator
) -> Float[Tensor, "B count T 3"]:
    shape = None if vocabulary is None else tuple(vocabulary.shape)
    if vocabulary is None or vocabulary.shape[1:] != human.shape[1:] or len(vocabulary) < count:
        raise InputError(f"vocabulary={count} needs at least as many drives of shape {tuple(human.shape[1:])} to choose from, got {shape}")
    vocabulary = vocabulary.to(human)
    distance = (human[:, None, :, :2] - vocabulary[..., :2]).norm(dim=-1).mean(-1)
    near = (_gumbel(distance.shape, generator, human.device) - distance / NEAR).topk((count + 1) // 2, dim=1).indices
    rest = _gumbel(distance.shape, generator, human.device).scatter(1, near, -torch.inf)
    return vocabulary[torch.cat([near, rest.topk(count // 2, dim=1).indices], 1)]


def _gumbel(shape: torch.Size, generator: Generator, device: torch.device) -> Tensor:
    return -torch.empty(shape, device=generator.device).exponential_(generator=generator).log().to(device)


# -- changing drives ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Changes:
    """What is changed of drives, each "B K 1"; 0 = nothing."""

    offset: Tensor  # to the left, from somewhere on [m]
    swerve: Tensor  # to the left and back [m]
    turn: Tensor  # of the heading, until the end [rad]
    pace: Tensor  # logarithm of the factor of the speed
    gain: Tensor  # acceleration that is added [m/s^2]
    braking: Tensor  # deceleration [m/s^2]
    begin: Tensor  # when or where it begins, as a share
    extent: Tensor  # how long it takes, as a share


def _changed(
    human: Float[Tensor, "B T 3"], speed: Float[Tensor, " B"], dt: float, kinds: list[Source], config: CandidateConfig, generator: Generator
) -> Float[Tensor, "B K T 3"]:
    """The human's drive, or for `CONSTANT_VELOCITY` a straight one, changed as each kind says."""
    changes = _draw(len(human), kinds, config, generator, human.device)
    times = torch.arange(1, human.shape[1] + 1, device=human.device) * dt
    straight = functional.pad((speed[:, None] * times)[..., None], (0, 2))
    steady = torch.tensor([kind is Source.CONSTANT_VELOCITY for kind in kinds], device=human.device)[:, None, None]
    base = torch.where(steady, straight[:, None], human[:, None])
    way = _Way.along(base)
    driven = _retimed(way.lengths.diff(dim=-1), times - dt / 2.0, dt, changes)
    length, fastest = driven[..., -1:].clone(), functional.pad(driven, (1, 0)).diff(dim=-1).amax(-1, keepdim=True) / dt

    def place(s: Tensor) -> Float[Tensor, "B K T 2"]:
        point, ahead = way.at(s)
        left = torch.stack([-ahead[..., 1], ahead[..., 0]], -1)
        point = point + _sideways(s, length, fastest, changes)[..., None] * left
        return _rotated(point, (changes.turn / length.clamp(min=5.0)).clamp(-TIGHTEST, TIGHTEST) * s / 2.0)

    forward = place(driven + REACH) - place(driven - REACH)
    return torch.cat([place(driven), torch.atan2(forward[..., 1], forward[..., 0])[..., None]], -1)


def _draw(batch: int, kinds: list[Source], config: CandidateConfig, generator: Generator, device: torch.device) -> _Changes:
    """Changes at random, of each kind its own, and of mixed kinds each with probability 1/2."""
    shape = batch, len(kinds), 1
    kind = torch.tensor(kinds, device=device)[:, None]

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)).to(device)

    def of(which: Source, amount: Tensor) -> Tensor:
        mixed = (kind >= Source.MIXED) & (uniform(0.0, 1.0) < 0.5)
        return torch.where((kind == which) | mixed, amount, 0.0)

    least, greatest = config.braking
    pace = torch.tensor(config.pace).log().item()
    return _Changes(
        offset=of(Source.LATERAL, uniform(-config.offset, config.offset)),
        swerve=of(Source.SWERVE, uniform(-config.offset, config.offset)),
        turn=of(Source.HEADING, uniform(-config.turn, config.turn)),
        pace=of(Source.SPEED, uniform(-pace, pace)),
        gain=of(Source.SPEED, uniform(-config.acceleration, config.acceleration)),
        braking=of(Source.STOP, uniform(least, greatest)) * ((kind == Source.STOP) | (uniform(0.0, 1.0) < 0.3)),
        begin=uniform(0.0, 0.5),
        extent=uniform(0.3, 1.0),
    )


def _retimed(steps: Float[Tensor, "B K T"], times: Float[Tensor, " T"], dt: float, changes: _Changes) -> Float[Tensor, "B K T"]:
    """How far along its way the car is at each pose; `times` are the middles of the steps between them."""
    ease = _smooth(times / EASE)
    speed = steps / dt * (1.0 + (changes.pace.exp() - 1.0) * ease) + changes.gain * ease * times
    begin = changes.begin * times[-1]
    before = torch.where(times <= begin + dt, speed, -torch.inf).amax(-1, keepdim=True)  # the speed that it brakes from
    allowed = before - changes.braking * (times - begin).clamp(min=0.0)
    return (torch.where(changes.braking > 0.0, torch.minimum(speed, allowed), speed).clamp(min=0.0) * dt).cumsum(-1)


def _sideways(
    s: Float[Tensor, "B K T"], length: Float[Tensor, "B K 1"], speed: Float[Tensor, "B K 1"], changes: _Changes
) -> Float[Tensor, "B K T"]:
    """Metres to the left of the way, at places along it, for a drive of a length [m] and a greatest speed."""
    begin, least = changes.begin * length, (changes.extent * length).clamp(min=1.0)
    offset, swerve = changes.offset.abs(), changes.swerve.abs()
    ramp = torch.maximum(least, torch.maximum(1.5 / STEEPEST * offset, speed * (6.0 / HARDEST * offset).sqrt()))
    bump = torch.maximum(least, torch.pi * torch.maximum(swerve / STEEPEST, speed * (2.0 / HARDEST * swerve).sqrt()))
    there = ((s - begin) / bump).clamp(0.0, 1.0)
    return changes.offset * _smooth((s - begin) / ramp) + changes.swerve * (torch.pi * there).sin().square()


def _smooth(share: Tensor) -> Tensor:
    share = share.clamp(0.0, 1.0)
    return share * share * (3.0 - 2.0 * share)


def _rotated(points: Float[Tensor, "... 2"], angle: Float[Tensor, "..."]) -> Float[Tensor, "... 2"]:
    """Points, turned about the origin."""
    cos, sin = angle.cos(), angle.sin()
    x, y = points.unbind(-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


@dataclass(frozen=True)
class _Way:
    """Where drives lead, whatever the speed: cubic between their poses, straight before and behind."""

    points: Float[Tensor, "B K P 2"]  # with the origin
    ahead: Float[Tensor, "B K P 2"]  # unit vectors
    lengths: Float[Tensor, "B K P"]  # how far from the origin

    @classmethod
    def along(cls, poses: Float[Tensor, "B K T 3"]) -> _Way:
        poses = functional.pad(poses, (0, 0, 1, 0))
        points, heading = poses[..., :2], poses[..., 2]
        steps = points.diff(dim=-2).norm(dim=-1)
        lengths = functional.pad(steps.cumsum(-1), (1, 0))
        return cls(points, torch.stack([heading.cos(), heading.sin()], -1), lengths)

    def at(self, s: Float[Tensor, "B K T"]) -> tuple[Float[Tensor, "B K T 2"], Float[Tensor, "B K T 2"]]:
        """Points at lengths along the way, and unit vectors ahead."""
        lengths = self.lengths
        row = (torch.searchsorted(lengths, s.contiguous(), right=True) - 1).clamp(0, lengths.shape[-1] - 2)
        start = lengths.gather(-1, row)
        step = (lengths.gather(-1, row + 1) - start).clamp(min=1e-6)[..., None]
        a, b, from_, to = (
            values.take_along_dim(index[..., None], -2)
            for values, index in ((self.points, row), (self.points, row + 1), (self.ahead, row), (self.ahead, row + 1))
        )
        u = (((s - start)[..., None]) / step).clamp(0.0, 1.0)
        chord, c, d = b - a, from_ * step, to * step
        bend, twist = 3.0 * chord - 2.0 * c - d, c + d - 2.0 * chord
        slope = (c + 2.0 * u * bend + 3.0 * u * u * twist) / step
        ahead = functional.normalize(slope, dim=-1)
        beyond = s.clamp(max=0.0) + (s - lengths[..., -1:]).clamp(min=0.0)
        ahead = torch.where((beyond > 0.0)[..., None], self.ahead[..., -1:, :], ahead)
        return a + u * (c + u * (bend + u * twist)) + beyond[..., None] * ahead, ahead
