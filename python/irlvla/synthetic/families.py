"""The road families: each draws its roads at random, and the ways through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from irlvla.synthetic.angles import Array, between
from irlvla.synthetic.junctions import Arm, Plan, circle_roads, crossing_roads, pavements, two_phases
from irlvla.synthetic.layouts import Layout, Route
from irlvla.synthetic.roads import Draft, Line, backwards, beside, draw, lengths, placed, points_at, ring
from irlvla.synthetic.world import Paint
from irlvla.types import Command

Random = np.random.Generator
T = TypeVar("T")

KMH = 1.0 / 3.6
BEHIND = 85.0  # road behind the car at t = 0, at least [m]
STRIP, STRIP_BAY = 2.1, 6  # width of a strip of bays along a road [m], points of its line that each bay takes
BAY = 5.0, 2.6  # depth and width of a bay across an aisle [m]


def _ahead(limit: float) -> float:
    """Road that must lie ahead at t = 0: four seconds' drive, and room to brake for its end, which PDM-Closed takes for a wall [m]."""
    return 4.0 * limit + limit * limit / 6.0 + 2.0 * limit + 20.0


def _choose(rng: Random, *choices: T) -> T:
    return choices[int(rng.integers(len(choices)))]


# -- open roads --------------------------------------------------------------------------------------------------------


def straight(rng: Random, case: str) -> Layout:
    """A motorway, a town's main road or a country road, of one to four lanes each way."""
    kind = _choose(rng, "motorway", "town", "town", "country") if case != "jaywalker" else "town"
    fewest = 2 if case in ("cut_in", "blocked_lane") else 1
    along = {"motorway": max(fewest, int(rng.integers(2, 5))), "town": int(rng.integers(fewest, 4)), "country": fewest}[kind]
    against = 0 if kind == "motorway" else int(rng.integers(0 if kind == "town" and along > 1 else 1, along + 1))
    limit = {"motorway": _choose(rng, 80, 100), "town": _choose(rng, 40, 50, 60), "country": _choose(rng, 70, 80)}[kind] * KMH
    width = between(rng, 3.4, 3.75) if kind == "motorway" else between(rng, 3.2, 3.6)
    line = draw((0.0, 0.0, 0.0), (BEHIND + 60.0 + _ahead(limit), 0.0, 0.0))
    return _open_road(rng, line, along, against, width, limit, town=kind == "town", parked=kind == "town" and rng.random() < 0.3)


def curve(rng: Random, case: str) -> Layout:
    """A bend, or two that turn opposite ways."""
    radius = 28.0 + 270.0 * between(rng, 0.0, 1.0) * between(rng, 0.0, 1.0)
    limit = min(math.floor(math.sqrt(2.8 * radius) / KMH / 10.0) * 10.0, 50.0 if case == "jaywalker" else 80.0) * KMH
    fewest = 2 if case in ("cut_in", "blocked_lane") else 1
    along = int(rng.integers(fewest, 4))
    against = int(rng.integers(0 if along > 1 else 1, along + 1))
    width = between(rng, 3.3, 3.7)
    side, turn = _choose(rng, -1.0, 1.0), between(rng, 0.5, 1.3)
    kappa, entry = side / (radius + along * width), 12.0 + 0.12 * radius
    bend = [(entry, 0.0, kappa), (turn * radius, kappa, kappa), (entry, kappa, 0.0)]
    back = [(length, -first, -last) for length, first, last in bend] if rng.random() < 0.4 else []
    lead = between(rng, 60.0, 100.0)
    pieces = [(lead, 0.0, 0.0), *bend, *back]
    spare = BEHIND + 40.0 + _ahead(limit) - sum(piece[0] for piece in pieces)
    line = draw((0.0, 0.0, 0.0), *pieces, (max(spare, 60.0), 0.0, 0.0), beside=max(along, against) * width)
    return _open_road(rng, line, along, against, width, limit, town=limit <= 60 * KMH, parked=False)


def narrow_street(rng: Random, case: str) -> Layout:
    """One narrow lane each way between parked cars."""
    limit = _choose(rng, 20, 30, 30) * KMH
    bend = between(rng, -0.008, 0.008)
    line = draw((0.0, 0.0, 0.0), (60.0, 0.0, 0.0), (50.0, 0.0, bend), (40.0, bend, 0.0), (80.0, 0.0, 0.0), beside=3.25)
    return _open_road(rng, line, 1, 1, between(rng, 2.95, 3.25), limit, town=True, parked=True)


def _open_road(rng: Random, line: Line, along: int, against: int, width: float, limit: float, *, town: bool, parked: bool) -> Layout:
    """A road without junctions; `parked`: cars may be, by the kerb of one side or of both."""
    draft, length = Draft(), float(lengths(line)[-1])
    kerbs, edges, bays = [against * width, -along * width], [Paint.EDGE, Paint.EDGE], [np.zeros((0, 3))]
    for side in (1, 0) if parked else ():
        if (along, against)[1 - side] and (rng.random() < 0.8 or (side == 0 and len(bays) == 1)):
            bays.append(_parallel_bays(draft, line, kerbs[side]))
            kerbs[side] += math.copysign(STRIP, kerbs[side])
            edges[side] = Paint.BAY
    sections = draft.road(line, along, against, width, limit, max(2, round(length / 90.0)), edges=(edges[0], edges[1]))
    latest = max(length - _ahead(limit), BEHIND)
    routes = [Route(tuple(section.along[k] for section in sections), Command.STRAIGHT, BEHIND, latest) for k in range(along)]
    walks = tuple(beside(line, kerb + math.copysign(2.0, -0.5 if side else 0.5)) for side, kerb in enumerate(kerbs)) if town else ()
    return Layout.of(draft, routes, pavements=walks, bays=np.concatenate(bays), town=town)


def _parallel_bays(draft: Draft, line: Line, inner: float) -> Array:
    """A strip of bays beside the lane that ends `inner` metres to the left of a line; poses of the cars in them."""
    outer = inner + math.copysign(STRIP, inner)
    draft.parking(line, inner, outer)
    for near, far in zip(beside(line[::STRIP_BAY], inner), beside(line[::STRIP_BAY], outer), strict=True):
        draft.paint.append((Paint.BAY, np.stack([near[:2], far[:2]])))
    poses = beside(line[STRIP_BAY // 2 :: STRIP_BAY], 0.5 * (inner + outer))
    poses[:, 2] += math.pi * (inner > 0.0)
    return poses


def merge(rng: Random, case: str) -> Layout:
    """The right lane ends, on a motorway: a slip road came in there, or the road loses a lane."""
    limit, width = _choose(rng, 60, 70, 80) * KMH, between(rng, 3.4, 3.7)
    count, ramp = int(rng.integers(2 if case == "cut_in" else 1, 4)), rng.random() < 0.6
    before, parallel, joining = 130.0, between(rng, 90.0, 130.0), between(rng, 40.0, 60.0)
    bend, joint = between(rng, -0.0015, 0.0015), before + parallel
    line = draw((0.0, 0.0, 0.0), (before, bend, 0.0), (parallel + joining, 0.0, 0.0), (_ahead(limit), 0.0, bend), beside=4.0 * width)
    first, second, third = np.searchsorted(lengths(line), (before - 1e-6, joint - 1e-6, joint + joining - 1e-6)).tolist()
    draft = Draft()
    start = draft.road(line[: first + 1], count if ramp else count + 1, 0, width, limit)[0].along
    beside_it = draft.road(line[first : second + 1], count + 1, 0, width, limit)[0].along
    onwards = draft.road(line[third:], count, 0, width, limit, 2)
    start += _slip_road(rng, draft, line[first], count, width, limit) if ramp else []
    draft.links += zip(start, beside_it, strict=True)
    pairs = zip(beside_it, [*onwards[0].along, onwards[0].along[-1]], strict=True)
    *passing, joins = draft.connect(list(pairs), ranks=[3] * count + [0])
    _merge_paint(draft, passing, joins)
    routes = []
    for k, connector in enumerate((*passing, joins)):
        lanes = start[k], beside_it[k], connector, *(section.along[min(k, count - 1)] for section in onwards)
        routes += [Route(lanes, Command.STRAIGHT, BEHIND + 15.0, joint - 30.0)] * (count if connector == joins else 1)
    return Layout.of(draft, routes, town=False, zipper=True)


def _slip_road(rng: Random, draft: Draft, end: Array, count: int, width: float, limit: float) -> list[int]:
    """A road of one lane that ends beside the right lane of a road of `count` lanes, at a pose of that road's left edge."""
    x, y, heading = placed(end, 0.0, -count * width)
    bend = 1.0 / between(rng, 110.0, 220.0)
    line = draw((x, y, heading - math.pi), (15.0, 0.0, 0.0), (40.0, 0.0, bend), (75.0, bend, bend), beside=width)
    return draft.road(backwards(line), 1, 0, width, min(limit, 60 * KMH))[0].along


def _merge_paint(draft: Draft, passing: list[int], joining: int) -> None:
    left, right = draft.edges[passing[0]][0], draft.edges[joining][1]
    draft.intersections.append(ring(left, right))
    draft.paint += [(Paint.EDGE, left), (Paint.EDGE, right)]
    draft.paint += [(Paint.DASHED, draft.edges[lane][1]) for lane in passing]


# -- junctions ---------------------------------------------------------------------------------------------------------


def _four_ways(rng: Random) -> tuple[float, ...]:
    skew = between(rng, -0.2, 0.2)
    return 0.0, math.pi / 2 + skew, math.pi, 1.5 * math.pi + skew


def _three_ways(rng: Random) -> tuple[float, ...]:
    return 0.0, math.pi, 1.5 * math.pi + between(rng, -0.2, 0.2)


def _town_plan(rng: Random, directions: tuple[float, ...], lanes: tuple[int, ...], ranks: tuple[int, ...] = (0, 0, 0, 0)) -> Plan:
    limit = _choose(rng, 30, 40, 40, 50) * KMH
    return Plan(directions, lanes, between(rng, 3.2, 3.6), limit, between(rng, 7.0, 11.0), ranks=ranks)


def crossroads(rng: Random, case: str) -> Layout:
    """A major and a minor road, without lights."""
    major = int(rng.integers(1, 3))
    return _junction(rng, _town_plan(rng, _four_ways(rng), (major, 1, major, 1), (1, 0, 1, 0)))


def t_junction(rng: Random, case: str) -> Layout:
    """A minor road ends at a major one; now and then with lights."""
    major = 2 if case == "cut_in" else int(rng.integers(1, 3))
    plan = _town_plan(rng, _three_ways(rng), (major, major, 1), (1, 1, 0))
    return _junction(rng, plan, (0, 0, 1) if rng.random() < 0.3 else ())


def signals(rng: Random, case: str) -> Layout:
    """Crossroads with lights, of one to three lanes each way."""
    one, two = (int(n) for n in rng.integers(2 if case in ("cut_in", "blocked_lane") else 1, 4, 2))
    return _junction(rng, _town_plan(rng, _four_ways(rng), (one, two, one, two)), (0, 1, 0, 1))


def _junction(rng: Random, plan: Plan, phases: Sequence[int] = ()) -> Layout:
    phase = two_phases(rng) if phases else []
    draft, arms, routes, crossings = crossing_roads(rng, plan, [phase[i] for i in phases])
    lines = tuple(line for arm in arms for line in pavements(arm, plan.width))
    return Layout.of(draft, routes, pavements=lines, crossings=tuple(crossings))


def roundabout(rng: Random, case: str) -> Layout:
    """A ring of one lane with three or four arms."""
    count = int(rng.integers(3, 5))
    turns = [between(rng, -0.12, 0.12) for _ in range(count)]
    plan = Plan(
        tuple(k * 2.0 * math.pi / count + turn for k, turn in enumerate(turns)), (1,) * count, between(rng, 5.0, 5.8), 30 * KMH, 8.0
    )
    draft, arms, routes, crossings = circle_roads(rng, plan, between(rng, 20.0, 28.0))
    lines = tuple(line for arm in arms for line in pavements(arm, plan.width))
    return Layout.of(draft, routes, pavements=lines, crossings=tuple(crossings))


def car_park(rng: Random, case: str) -> Layout:
    """Aisles between bays, which meet in a T or a cross."""
    four = rng.random() < 0.4
    directions = tuple(k * math.pi / 2 for k in range(4)) if four else (0.0, math.pi, 1.5 * math.pi)
    plan = Plan(directions, (1,) * len(directions), between(rng, 3.1, 3.5), 15 * KMH, 6.5, 0.5, 80.0, 0.0, edge=Paint.BAY)
    draft, arms, routes, _ = crossing_roads(rng, plan)
    bays = np.concatenate([_bays(draft, arm, plan.width, side) for arm in arms for side in (-1.0, 1.0)])
    walks = tuple(beside(arm.line[8:], side * (plan.width + BAY[0] + 1.0)) for arm in arms for side in (-1.0, 1.0))
    return Layout.of(draft, routes, pavements=walks, bays=bays)


def _bays(draft: Draft, arm: Arm, width: float, side: float) -> Array:
    """Bays across one side (1 left, -1 right) of an aisle; poses of the cars in them, nose first."""
    depth, every = BAY
    start = arm.line[8]
    draft.paint.append((Paint.EDGE, beside(arm.line[:9], side * width)[:, :2]))
    count = int((lengths(arm.line)[-1] - 8.0) / every)
    line = draw(start, (count * every, 0.0, 0.0))
    draft.parking(line, side * width, side * (width + depth))
    for k in range(count + 1):
        draft.paint.append((Paint.BAY, points_at(start, [(k * every, side * width), (k * every, side * (width + depth))])))
    middles = points_at(start, [((k + 0.5) * every, side * (width + 0.5 * depth)) for k in range(count)])
    return np.column_stack([middles, np.full(count, start[2] + side * math.pi / 2)])


FAMILIES: dict[str, Callable[[Random, str], Layout]] = {
    "straight": straight,
    "curve": curve,
    "merge": merge,
    "t_junction": t_junction,
    "crossroads": crossroads,
    "signals": signals,
    "roundabout": roundabout,
    "car_park": car_park,
    "narrow_street": narrow_street,
}
