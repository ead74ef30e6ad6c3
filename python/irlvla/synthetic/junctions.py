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
from irlvla.synthetic.layouts import Crossing, Layout, Route
from irlvla.synthetic.roads import Draft, Line, Section, backwards, beside, draw, lengths, placed
from irlvla.synthetic.world import STEPS, Paint, Signal
from irlvla.types import Command

Mask = Bool[np.ndarray, " STEPS"]

ZEBRA = (0.8, 3.8)  # behind the mouth [m]
LAMP_HEIGHT = 5.2  # [m]
AMBER, ALL_RED = 30, 15  # steps
KERB = 1.5  # people wait so far from the road [m]
NEAR, PAST_MOUTH = 55.0, 6.0  # at t = 0 the car is at most so far before the mouth or behind it [m]
LANE_ENDS = {  # outlines of the arrows before a junction: metres ahead and to the left
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


def crossing_roads(rng: np.random.Generator, plan: Plan, lights: Sequence[tuple[Mask, Mask]] = ()) -> tuple[Draft, Layout]:
    """Arms that meet in one intersection; `lights` are red and amber of each arm, none = who gives way is a matter of rank."""
    draft = Draft()
    arms = [_arm(rng, draft, plan, j) for j in range(len(plan.directions))]
    routes: list[Route] = []
    outline: list[Array] = []
    for j, arm in enumerate(arms):
        if lights:
            draft.signals.append(_signal(plan, arms, j, *lights[j]))
        for to, command in _movements(plan.directions, j):
            pairs = _pairs(arm.entering, arms[to].leaving, command, three_ways=len(arms) > 2)
            rank = 10 * (0 if lights else plan.ranks[j]) + {Command.STRAIGHT: 3, Command.RIGHT: 2, Command.LEFT: 1}[command]
            made = draft.connect(pairs, plan.straight, signal=j if lights else None, rank=rank)
            routes += [_route(draft, arm, arms[to], pair, lane, command) for pair, lane in zip(pairs, made, strict=True)]
            if to == (j + 1) % len(arms):
                outline.append(draft.edges[made[-1]][1])
            _arrows(draft, pairs, command)
        if lights or plan.ranks[j] < max(plan.ranks):
            draft.paint.append((Paint.STOP, _across(arm.line, 0.3, 0.0, len(arm.entering) * plan.width)))
    draft.intersections.append(np.concatenate(outline))
    draft.paint += [(Paint.EDGE, kerb) for kerb in outline]
    crossings = [_zebra(draft, arm, plan, lights[j][0] if lights else None) for j, arm in enumerate(arms)] if plan.straight > ZEBRA[1] else []
    pavements = [line for arm in arms for line in _pavements(arm, plan.width)]
    return draft, Layout.of(draft, routes, pavements=tuple(pavements), crossings=tuple(crossings))


def _arm(rng: np.random.Generator, draft: Draft, plan: Plan, j: int) -> Arm:
    cosine, sine = cosine_sine_of(plan.directions[j])
    distance, bend = _mouth(plan, j), between(rng, -plan.bend, plan.bend)
    pieces = (30.0, 0.0, 0.0), (50.0, 0.0, bend), (plan.length - 80.0, bend, bend)
    line = draw((distance * cosine, distance * sine, plan.directions[j]), *pieces)
    return Arm(line, draft.road(line, plan.lanes[j], plan.lanes[j], plan.width, plan.limit, 2, closed=True))


def _mouth(plan: Plan, j: int) -> float:
    """How far from the centre an arm begins: where the kerbs of both of its corners have become straight."""
    count, reach = len(plan.directions), 0.0
    half = [lanes * plan.width for lanes in plan.lanes]
    for other, angle in ((j - 1, plan.directions[j] - plan.directions[j - 1]), ((j + 1) % count, 0.0)):
        angle = angle or plan.directions[other] - plan.directions[j]
        angle %= 2.0 * math.pi
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


def _pairs(entering: list[int], leaving: list[int], command: Command, *, three_ways: bool) -> list[tuple[int, int]]:
    """Which lanes make a turn, and where they lead to. Of three lanes the left one is for turning left only."""
    if command is Command.LEFT:
        return [(entering[0], leaving[0])]
    if command is Command.RIGHT:
        return [(entering[-1], leaving[-1])]
    first = 1 if len(entering) > 2 and three_ways else 0
    return list(zip(entering, leaving, strict=True))[first:]


def _route(draft: Draft, arm: Arm, to: Arm, pair: tuple[int, int], connector: int, command: Command) -> Route:
    way_in = arm.way_in(pair[0])
    mouth = sum(float(lengths(draft.lanes[lane].centerline)[-1]) for lane in way_in)
    return Route((*way_in, connector, *to.way_out(pair[1])), command, mouth - NEAR, mouth + PAST_MOUTH, mouth)


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
        draft.paint.append((Paint.ARROW, np.array([placed(pose, *point)[:2] for point in LANE_ENDS[command]])))


def _across(line: Line, ahead: float, right: float, left: float) -> Array:
    """A segment across the start of a line."""
    return np.array([placed(line[0], ahead, right)[:2], placed(line[0], ahead, left)[:2]])


def _zebra(draft: Draft, arm: Arm, plan: Plan, red: Mask | None, near: float = -ZEBRA[1], far: float = -ZEBRA[0]) -> Crossing:
    """A crossing of an arm between two distances from its mouth; people start on the side of the entering lanes."""
    half = len(arm.entering) * plan.width
    corner = [(near, -half), (far, -half), (far, half), (near, half)]
    draft.paint.append((Paint.CROSSING, np.array([placed(arm.line[0], *point)[:2] for point in corner])))
    middle, lanes = 0.5 * (near + far), []
    for k, (entering, leaving) in enumerate(zip(arm.entering, arm.leaving, strict=True)):
        inner, outer = k * plan.width, (k + 1) * plan.width
        for side, lane in ((-1, entering), (1, leaving)):
            others = [(a if side > 0 else b) for a, b in draft.links if (b if side > 0 else a) == lane] if middle < 0.0 else [lane]
            for other in others:
                length = float(lengths(draft.lanes[other].centerline)[-1])
                along = -middle if side < 0 else length + middle
                along = along if middle < 0.0 else (length - middle if side < 0 else middle)
                lanes.append((other, along, KERB + half + side * inner, KERB + half + side * outer))
    start = placed(arm.line[0], middle, half + KERB)
    ordered = tuple((lane, along, min(a, b), max(a, b)) for lane, along, a, b in lanes)
    return Crossing((start[0], start[1], start[2] - math.pi / 2), 2 * (half + KERB), ordered, np.ones(STEPS, dtype=bool) if red is None else red)


def _pavements(arm: Arm, width: float) -> list[Line]:
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
