"""How the person means to drive round what stands in the way: how far beside the route to be, and how fast, all along it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from irlvla.synthetic.angles import Array, cosine_sine
from irlvla.synthetic.paths import GRID
from irlvla.synthetic.stage import Stage
from irlvla.synthetic.world import STEP, STEPS, Actor
from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, WIDTH

CLEARANCES = (0.5, 0.25)  # to keep beside a thing, if there is room; at least [m]
OVER_THE_LINE = 0.2  # how far the car may lean over the middle of the road anyhow [m]
CAREFUL, ONCOMING = 0.75, 4.6  # how fast beside it: of the speed; in the oncoming lane [m/s]
TOGETHER = 14.0  # things nearer than this, one behind the other, are driven round at once [m]
AHEAD = 150.0  # things further ahead do not matter yet [m]
NUDGE = 1.0  # what is more than this leads into another lane [m]
RAMP, SHORTEST, LONGEST = 2.6, 12.0, 40.0  # a lane is changed in so much time [s], at least and at most so much way [m]
FRONT, REAR = 0.5 * LENGTH + REAR_AXLE_TO_CENTRE, 0.5 * LENGTH - REAR_AXLE_TO_CENTRE  # from the rear axle [m]


@dataclass(frozen=True)
class Way:
    """At each `GRID` of the route: metres to its left, and the most speed."""

    aside: Float[np.ndarray, " G"]
    pace: Float[np.ndarray, " G"]
    passes: bool = False  # what stands in the lane is driven round


def plan_way(stage: Stage) -> Way:
    """The way past everything that stands; up to the first thing that cannot be passed, or not now."""
    way = Way(np.zeros(int(stage.path.length / GRID) + 1), np.full(int(stage.path.length / GRID) + 1, np.inf))
    if not stage.things:
        return way
    place, left, along, across = _beside_route(stage, stage.things)
    near = (np.abs(left) < across + 0.5 * WIDTH + CLEARANCES[1]) & (place > stage.first + FRONT) & (place < stage.first + AHEAD)
    start, end = place - along, place + along
    for group in _groups([int(i) for i in np.argsort(place, kind="stable") if near[i]], start, end):
        first, last = min(start[i] for i in group), max(end[i] for i in group)
        others = np.flatnonzero((end > first - 2.0) & (start < last + 2.0))
        shift = _shift(_room(stage, 0.5 * (first + last)), left, across, group, others)
        if shift is None or (abs(shift) > NUDGE and not _is_free(stage, 1 if shift > 0.0 else -1, first, last)):
            break
        way = _past(stage, way, first, last, shift)
    return way


def _groups(order: Sequence[int], start: Array, end: Array) -> list[list[int]]:
    """Things, in order, that stand close behind each other."""
    groups: list[list[int]] = []
    for i in order:
        if groups and start[i] < max(end[j] for j in groups[-1]) + TOGETHER:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _past(stage: Stage, way: Way, first: float, last: float, shift: float) -> Way:
    """The way, moved over beside what stands between two places."""
    changes = abs(shift) > NUDGE
    reach = min(max(RAMP * stage.speed, SHORTEST), LONGEST) if changes else SHORTEST
    held = slice(*(max(int(place / GRID), 0) for place in (first - FRONT - 1.0 - 0.5 * reach, last + REAR + 2.0 + 0.5 * reach)))
    aside, pace = np.zeros_like(way.aside), way.pace.copy()
    aside[held] = shift
    aside = _smooth(aside, reach)
    if changes:
        pace[held] = np.minimum(pace[held], ONCOMING if stage.may_cross else CAREFUL * stage.speed)
    return Way(np.where(np.abs(aside) > np.abs(way.aside), aside, way.aside), pace, way.passes or changes)


def _beside_route(stage: Stage, things: Sequence[Actor]) -> tuple[Array, Array, Array, Array]:
    """Of each thing: the place of its centre, metres to the left, and its half extents along the route and across it."""
    line = stage.path.line
    state = np.array([thing.state[0, :3] for thing in things])
    dx, dy = state[:, :1] - line[:, 0], state[:, 1:2] - line[:, 1]
    nearest, rows = (dx * dx + dy * dy).argmin(axis=1), np.arange(len(things))
    dx, dy = dx[rows, nearest], dy[rows, nearest]
    cosine, sine = cosine_sine(line[nearest, 2])
    turned_cosine, turned_sine = np.abs(cosine_sine(state[:, 2] - line[nearest, 2]))
    half_length, half_width = (np.array([0.5 * thing.size[k] for thing in things]) for k in (0, 1))
    along = turned_cosine * half_length + turned_sine * half_width
    across = turned_sine * half_length + turned_cosine * half_width
    return stage.path.along[nearest] + dx * cosine + dy * sine, dy * cosine - dx * sine, along, across


def _room(stage: Stage, place: float) -> tuple[float, float]:
    """How far to the right (negative) and to the left of the route the car's sides may be."""
    lanes, opposites = stage.layout.roads.lanes, stage.layout.opposites
    index, _ = stage.path.lane_at(place)
    left, right = 0.5 * lanes[index].width, -0.5 * lanes[index].width
    last, beside = index, lanes[index].right
    while beside is not None:
        right -= lanes[beside].width
        beside = lanes[beside].right
    beside = lanes[index].left
    while beside is not None:
        left += lanes[beside].width
        last, beside = beside, lanes[beside].left
    if last in opposites:
        left += lanes[opposites[last]].width if stage.may_cross else OVER_THE_LINE
    return right, left


def _shift(room: tuple[float, float], left: Array, across: Array, group: Sequence[int], others: Int[np.ndarray, " n"]) -> float | None:
    """How far to move over for a group of things among others; None if there is no way past them."""
    low, high = min(left[i] - across[i] for i in group), max(left[i] + across[i] for i in group)
    half = 0.5 * WIDTH
    for clearance in CLEARANCES:
        ways = []
        for shift in (high + clearance + half, low - clearance - half):
            fits = room[0] <= shift - half and shift + half <= room[1]
            if fits and (np.abs(left[others] - shift) >= across[others] + half + 0.5 * clearance).all():
                ways.append(shift)
        if ways:
            return float(min(ways, key=abs))
    return None


def _is_free(stage: Stage, side: int, first: float, last: float) -> bool:
    """Whether nobody is or comes where the car would be in the next lane, if all keep their speed."""
    lanes, opposites = stage.layout.roads.lanes, stage.layout.opposites
    begins: dict[int, tuple[float, float]] = {}  # of the lanes beside the route: where they begin on it, and which way they lead
    for lane, begin in zip(stage.path.lanes, stage.path.begins.tolist(), strict=True):
        beside = lanes[lane].left if side > 0 else lanes[lane].right
        if beside is not None:
            begins[beside] = begin, 1.0
        elif side > 0 and lane in opposites:
            begins[opposites[lane]] = begin + stage.layout.lengths[opposites[lane]], -1.0
    time = np.arange(0, STEPS, 5) * STEP
    car = stage.first + stage.speed * time
    there = (car > first - RAMP * stage.speed - FRONT) & (car < last + FRONT)
    for mover in stage.movers[1:]:
        lane, along = mover.path.lane_at(mover.place)
        if lane in begins:
            begin, way = begins[lane]
            speed = way * lanes[lane].speed_limit * min(mover.factor, 1.0)
            gap = np.abs(begin + way * along + speed * time - car)
            if (there & (gap < LENGTH + 3.0 + 0.5 * stage.speed)).any():
                return False
    return True


def _smooth(values: Array, reach: float) -> Array:
    """A moving average, twice: a ramp of soft ends as long as `reach`."""
    window = max(int(0.5 * reach / GRID) | 1, 3)
    for _ in range(2):
        total = np.cumsum(np.concatenate([np.zeros(window // 2 + 1), values, np.zeros(window // 2)]))
        values = (total[window:] - total[:-window]) / window
    return values
