"""Junctions: crossroads and T-junctions, with and without lights, and roundabouts.

An arm is a road that leads away from the junction: its line starts at the mouth, where the lanes end and the intersection begins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from irlvla.synthetic.angles import Array, between, cosine_sine_of
from irlvla.synthetic.layouts import Crossing, Route
from irlvla.synthetic.roads import Draft, Line, Section, backwards, beside, draw, placed, points_at
from irlvla.synthetic.world import STEPS, Paint, Signal
from irlvla.types import Command

Mask = Bool[np.ndarray, " STEPS"]

ZEBRA = (0.8, 3.8)  # behind the mouth [m]
LAMP_HEIGHT = 3.0  # as beside the road: higher ones leave the image before the car is at the stop line [m]
AMBER, ALL_RED = 30, 15  # steps
KERB = 1.5  # people wait so far from the road [m]
SECTOR = math.radians(30.0)  # of a roundabout's ring, on either side of an arm, that is intersection
NEAR, PAST_MOUTH = 45.0, 6.0  # at t = 0 the car is at most so far before the mouth or behind it [m]
ARROWS = {  # outlines of the arrows before a junction: metres ahead and to the left
    Command.STRAIGHT: ((-2, -0.1), (0.8, -0.1), (0.8, -0.35), (2, 0), (0.8, 0.35), (0.8, 0.1), (-2, 0.1)),
    Command.LEFT: ((-2, -0.1), (1.1, -0.1), (1.1, 0.5), (1.5, 0.5), (0.9, 1.1), (0.3, 0.5), (0.7, 0.5), (0.7, 0.1), (-2, 0.1)),
    Command.RIGHT: ((-2, 0.1), (1.1, 0.1), (1.1, -0.5), (1.5, -0.5), (0.9, -1.1), (0.3, -0.5), (0.7, -0.5), (0.7, -0.1), (-2, -0.1)),
}


@dataclass(frozen=True)
class Plan:
    """What a junction is drafted from."""

    directions: tuple[float, ...]  # of the arms, counter-clockwise [rad]
    lanes: tuple[int, ...]  # of each arm, each way
    width: float
    limit: float  # [m/s]
    radius: float  # of the kerbs at the corners [m]
    straight: float = 4.5  # connectors are straight so far behind the mouth; people cross there [m]
    length: float = 150.0  # of an arm [m]
    bend: float = 0.004  # at most, of an arm [1/m]
    ranks: tuple[int, ...] = (0, 0, 0, 0)  # of the arms: who gives way where there are no lights
    edge: Paint = Paint.EDGE  # of the arms


@dataclass(frozen=True)
class Arm:
    """A road away from a junction, drafted."""

    line: Line
    sections: list[Section]

    @property
    def entering(self) -> list[int]:
        """Lanes that end at the mouth, from the middle of the road outwards."""
        return self.sections[0].against

    @property
    def leaving(self) -> list[int]:
        return self.sections[0].along

    def way_in(self, lane: int) -> list[int]:
        """The lanes through which one arrives in an entering lane."""
        return [section.against[self.entering.index(lane)] for section in reversed(self.sections)]

    def way_out(self, lane: int) -> list[int]:
        return [section.along[self.leaving.index(lane)] for section in self.sections]


# -- crossroads and T-junctions ----------------------------------------------------------------------------------------


def crossing_roads(
    rng: np.random.Generator, plan: Plan, lights: Sequence[tuple[Mask, Mask]] = ()
) -> tuple[Draft, list[Arm], list[Route], list[Crossing]]:
    """Arms that meet in one intersection; `lights` are red and amber of each arm, none = who gives way is a matter of rank."""
    draft = Draft()
    arms = [_arm(rng, draft, plan, j, _mouth(plan, j)) for j in range(len(plan.directions))]
    routes: list[Route] = []
    outline: list[Array] = []
    for j, arm in enumerate(arms):
        if lights:
            draft.signals.append(_signal(plan, arms, j, *lights[j]))
        for to, command in _movements(plan.directions, j):
            pairs = _pairs(arm.entering, arms[to].leaving, command)
            rank = 10 * (0 if lights else plan.ranks[j]) + {Command.STRAIGHT: 3, Command.RIGHT: 2, Command.LEFT: 1}[command]
            made = draft.connect(pairs, plan.straight, signal=j if lights else None, ranks=[rank])
            routes += [_route(draft, arm, arms[to], pair, lane, command) for pair, lane in zip(pairs, made, strict=True)]
            if to == (j + 1) % len(arms):
                outline.append(draft.edges[made[-1]][1])
            _arrows(draft, pairs, command)
        if lights or plan.ranks[j] < max(plan.ranks):
            draft.paint.append((Paint.STOP, points_at(arm.line[0], [(0.3, 0.0), (0.3, len(arm.entering) * plan.width)])))
    draft.intersections.append(np.concatenate(outline))
    draft.paint += [(Paint.EDGE, kerb) for kerb in outline]
    people = plan.straight > ZEBRA[1]
    walks = [red for red, _ in lights] or [np.ones(STEPS, dtype=bool)] * len(arms)
    crossings = [_zebra(draft, arm, plan.width, -sum(ZEBRA) / 2, walk) for arm, walk in zip(arms, walks, strict=True) if people]
    return draft, arms, routes, crossings


def _arm(rng: np.random.Generator, draft: Draft, plan: Plan, j: int, distance: float) -> Arm:
    cosine, sine = cosine_sine_of(plan.directions[j])
    bend, straight = between(rng, -plan.bend, plan.bend), 0.2 * plan.length
    pieces = (straight, 0.0, 0.0), (0.3 * plan.length, 0.0, bend), (0.5 * plan.length, bend, bend)
    line = draw((distance * cosine, distance * sine, plan.directions[j]), *pieces, beside=plan.lanes[j] * plan.width)
    return Arm(line, draft.road(line, plan.lanes[j], plan.lanes[j], plan.width, plan.limit, 2, edges=(plan.edge, plan.edge), ends=True))


def _mouth(plan: Plan, j: int) -> float:
    """How far from the centre an arm begins: where the kerbs of both of its corners have become straight."""
    after, reach = (j + 1) % len(plan.directions), 0.0
    half = [lanes * plan.width for lanes in plan.lanes]
    for other, first, last in ((j - 1, j - 1, j), (after, j, after)):
        angle = (plan.directions[last] - plan.directions[first]) % (2.0 * math.pi)
        if angle < 0.9 * math.pi:
            cosine, sine = cosine_sine_of(angle)
            c, s = cosine_sine_of(0.5 * angle)
            reach = max(reach, (half[other] + half[j] * cosine) / sine + plan.radius * c / s)
    return reach + plan.straight


def _movements(directions: Sequence[float], j: int) -> list[tuple[int, Command]]:
    """The other arms, and which turn leads there."""
    found = []
    for to, direction in enumerate(directions):
        turn = (direction - directions[j]) / math.pi % 2.0
        if to != j:
            found.append((to, Command.RIGHT if turn < 0.75 else Command.LEFT if turn > 1.25 else Command.STRAIGHT))
    return found


def _pairs(entering: list[int], leaving: list[int], command: Command) -> list[tuple[int, int]]:
    """Which lanes make a turn, and where they lead to. Of three lanes the left one is for turning left only."""
    if command is Command.LEFT:
        return [(entering[0], leaving[0])]
    if command is Command.RIGHT:
        return [(entering[-1], leaving[-1])]
    return list(zip(entering, leaving, strict=True))[1 if len(entering) > 2 else 0 :]


def _route(draft: Draft, arm: Arm, to: Arm, pair: tuple[int, int], connector: int, command: Command) -> Route:
    way_in = arm.way_in(pair[0])
    mouth = _length(draft, way_in)
    return Route((*way_in, connector, *to.way_out(pair[1])), command, mouth - NEAR, mouth + PAST_MOUTH, mouth)


def _length(draft: Draft, lanes: Sequence[int]) -> float:
    return sum(draft.lengths[lane] for lane in lanes)


def _signal(plan: Plan, arms: Sequence[Arm], j: int, red: Mask, amber: Mask) -> Signal:
    """A lamp on the far side of the junction, to the right of those who enter."""
    pose = backwards(arms[j].line[:1])[0]
    facing = [to for to, command in _movements(plan.directions, j) if command is Command.STRAIGHT]
    far = _mouth(plan, j) + (_mouth(plan, facing[0]) if facing else max(plan.lanes) * plan.width)
    x, y, heading = placed(pose, far + KERB, -(plan.lanes[j] * plan.width + KERB))
    return Signal(np.array([x, y, LAMP_HEIGHT]), heading, red, amber)


def _arrows(draft: Draft, pairs: list[tuple[int, int]], command: Command) -> None:
    for lane, _ in pairs:
        pose = placed(draft.lanes[lane].centerline[-1], -10.0, 0.0)
        draft.paint.append((Paint.ARROW, points_at(pose, ARROWS[command])))


def _zebra(draft: Draft, arm: Arm, width: float, middle: float, walk: Mask) -> Crossing:
    """A crossing `middle` metres up an arm, or behind its mouth; people start on the side of the entering lanes."""
    half, depth = len(arm.entering) * width, 0.5 * (ZEBRA[1] - ZEBRA[0])
    corner = [(middle - depth, -half), (middle + depth, -half), (middle + depth, half), (middle - depth, half)]
    draft.paint.append((Paint.CROSSING, points_at(arm.line[0], corner)))
    crossed = []
    for sign, own, end in ((-1, arm.entering, 1), (1, arm.leaving, 0)):
        for k, lane in enumerate(own):
            low, high = sorted((KERB + half + sign * k * width, KERB + half + sign * (k + 1) * width))
            for found in [lane] if middle > 0.0 else [link[end] for link in draft.links if link[1 - end] == lane]:
                length = draft.lengths[found]
                from_mouth = middle if middle > 0.0 else -middle
                at_start = (sign > 0) == (middle > 0.0)
                crossed.append((found, from_mouth if at_start else length - from_mouth, low, high))
    x, y, heading = placed(arm.line[0], middle, half + KERB)
    return Crossing(np.array([x, y, heading - math.pi / 2]), 2.0 * (half + KERB), tuple(crossed), walk)


def pavements(arm: Arm, width: float) -> list[Line]:
    """Lines that people walk along, on both sides of an arm."""
    away = len(arm.entering) * width + KERB + 0.5
    return [beside(arm.line[5:], away), beside(arm.line[5:], -away)]


def two_phases(rng: np.random.Generator) -> list[tuple[Mask, Mask]]:
    """Red and amber of two pairs of opposite arms: one has green, and may turn red while we look."""
    change = int(rng.integers(10, STEPS + AMBER)) if rng.random() < 0.5 else 2 * STEPS
    step = np.arange(STEPS)
    first = step >= change, (step >= change - AMBER) & (step < change)
    second = step < change + ALL_RED, np.zeros(STEPS, dtype=bool)
    return [first, second] if rng.random() < 0.6 else [second, first]


# -- roundabouts -------------------------------------------------------------------------------------------------------


def circle_roads(rng: np.random.Generator, plan: Plan, radius: float) -> tuple[Draft, list[Arm], list[Route], list[Crossing]]:
    """A ring of one lane, driven counter-clockwise, with an arm of one lane each way in every direction of the plan.

    Where an arm meets the ring is an intersection; between them the ring is a road.
    """
    draft, count, half = Draft(), len(plan.directions), 0.5 * plan.width
    cosine, sine = cosine_sine_of(SECTOR)
    tangent = (radius * sine - half) / cosine  # of the curves between ring and arm
    mouth = radius * cosine + tangent * (1.0 + sine) + 0.5
    arms = [_arm(rng, draft, plan, j, mouth) for j in range(count)]
    circle = [_ring_lane(draft, plan, radius, j) for j in range(count)]
    entries, passages, exits = [], [], []
    for j, arm in enumerate(arms):
        entries += draft.connect([(arm.entering[0], circle[j])])
        passages += draft.connect([(circle[j - 1], circle[j])], ranks=[3])
        exits += draft.connect([(circle[j - 1], arm.leaving[0])], ranks=[3])
        kerbs = draft.edges[exits[j]][1], draft.edges[entries[j]][1], draft.edges[passages[j]][0]
        draft.intersections.append(np.concatenate([kerbs[0], kerbs[1], kerbs[2][::-1]]))
        draft.paint += [(Paint.EDGE, kerb) for kerb in kerbs]
        draft.paint.append((Paint.STOP, points_at(arm.line[0], [(0.3, 0.0), (0.3, plan.width)])))
    routes = []
    for j, arm in enumerate(arms):
        for to, command in _movements(plan.directions, j):
            passed = [(j + i) % count for i in range(1, (to - j) % count)]
            lanes = [entries[j], circle[j], *(lane for i in passed for lane in (passages[i], circle[i])), exits[to]]
            way_in = arm.way_in(arm.entering[0])
            length = _length(draft, way_in)
            routes.append(Route((*way_in, *lanes, *arms[to].way_out(arms[to].leaving[0])), command, length - NEAR, length + 20.0, length))
    always = np.ones(STEPS, dtype=bool)
    return draft, arms, routes, [_zebra(draft, arm, plan.width, 5.0, always) for arm in arms]


def _ring_lane(draft: Draft, plan: Plan, radius: float, j: int) -> int:
    """The lane of the ring from one arm to the next."""
    first = plan.directions[j] + SECTOR
    turn = (plan.directions[(j + 1) % len(plan.directions)] - SECTOR - first) % (2.0 * math.pi)
    inner = radius - 0.5 * plan.width
    cosine, sine = cosine_sine_of(first)
    line = draw((inner * cosine, inner * sine, first + math.pi / 2), (inner * turn, 1.0 / inner, 1.0 / inner), beside=plan.width)
    return draft.road(line, 1, 0, plan.width, plan.limit)[0].along[0]
