"""The ground of the embedded world as coloured shapes: surfaces, what is painted on them, shadows, haze and the horizon."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from irlvla.synthetic.angles import Array, cosine_sine
from irlvla.synthetic.appearance import Colour, Daylight, Shapes, joined_offsets, to_ego
from irlvla.synthetic.world import Paint, Roads
from irlvla.types import Layer

GRASS: Colour = (106, 130, 78)
PAVEMENT: Colour = (160, 156, 148)
KERB: Colour = (200, 198, 192)
ASPHALT: Colour = (72, 74, 78)
CARPARK: Colour = (94, 91, 90)
YELLOW: Colour = (240, 188, 48)
WHITE: Colour = (240, 240, 236)
TREES: Colour = (84, 108, 76)

PAVEMENT_WIDTH, KERB_WIDTH = 2.5, 0.2
LINE, STOP_LINE, CENTRE_GAP = 0.15, 0.4, 0.12  # widths of paint, and the gap of the double line [m]
DASH, DASH_PERIOD, STRIPE = 3.0, 9.0, 0.5  # lengths of dashes, width of zebra stripes and of the gaps between [m]
SHADOW = 0.4  # opacity in bright sun
HORIZON = 2000.0  # [m]
ROUND = np.stack(cosine_sine(np.arange(40) * (math.pi / 20)), axis=-1)  # a circle
HAZE_STEPS = 20.0 * 1.2 ** np.arange(24)  # distances between which haze is uniform [m]


@dataclass(frozen=True)
class Rings:
    """Polygons, or polylines, one after the other."""

    points: Float[np.ndarray, "P 2"]
    offsets: Int[np.ndarray, " R+1"]

    @classmethod
    def of(cls, parts: Sequence[Array]) -> Rings:
        parts = [part for part in parts if len(part)]
        return cls(np.concatenate([np.zeros((0, 2)), *parts]), np.cumsum([0, *map(len, parts)]))

    @classmethod
    def cat(cls, parts: Sequence[Rings]) -> Rings:
        return cls(np.concatenate([part.points for part in parts]), joined_offsets([part.offsets for part in parts]))

    def sideways(self, *, closed: bool) -> Float[np.ndarray, "P 2"]:
        """How each point moves when all sides move by 1 m to their left (at corners at most by 2 m)."""
        following, previous = np.arange(1, len(self.points) + 1), np.arange(-1, len(self.points) - 1)
        first, last = self.offsets[:-1], self.offsets[1:] - 1
        following[last], previous[first] = (first, last) if closed else (last, first)
        ahead, behind = _unit(self.points[following] - self.points), _unit(self.points - self.points[previous])
        along = ahead + behind
        sides = np.where((ahead == 0.0).all(1) | (behind == 0.0).all(1), 1.0, 2.0)  # 1 at the ends of polylines
        square = np.maximum((along * along).sum(1), 0.25 * sides * sides)
        return np.stack([-along[:, 1], along[:, 0]], axis=-1) * (sides / square)[:, None]

    def outset(self, *distances: float) -> list[Rings]:
        """Counter-clockwise polygons grown outwards by some distances."""
        left = self.sideways(closed=True)
        return [Rings(self.points - distance * left, self.offsets) for distance in distances]

    def strips(self, *sides: tuple[float, float]) -> Rings:
        """The polygons between parallels of polylines: for each pair of distances, the larger first, to the left of them."""
        aside, count = self.sideways(closed=False), np.diff(self.offsets)
        start, count = np.repeat(self.offsets[:-1], 2 * count), np.repeat(count, 2 * count)
        k = np.arange(2 * len(self.points)) - 2 * start
        source = start + np.where(k < count, k, 2 * count - 1 - k)  # there on the right, back on the left
        moves = (np.where(k < count, right, left)[:, None] * aside[source] for left, right in sides)
        return Rings.cat([Rings(self.points[source] + move, 2 * self.offsets) for move in moves])


def surfaces(roads: Roads, pose: Array) -> Shapes:
    """Pavement, kerb, asphalt, car parks and paint, as a car at a pose (x, y, heading) sees them; around them is grass."""
    painted = {paint: [points for kind, points in roads.paint if kind is paint] for paint in Paint}
    drivable = counter_clockwise([*_paved(roads), *roads.intersections, *roads.carparks])
    pavement, kerb = drivable.outset(PAVEMENT_WIDTH, KERB_WIDTH)
    near, far = CENTRE_GAP / 2, CENTRE_GAP / 2 + LINE
    whole = Rings.of([*painted[Paint.EDGE], *painted[Paint.SOLID], *painted[Paint.BAY], *dashes(painted[Paint.DASHED])])
    white = [
        whole.strips((LINE / 2, -LINE / 2)),
        Rings.of(painted[Paint.STOP]).strips((STOP_LINE / 2, -STOP_LINE / 2)),
        counter_clockwise([*stripes(painted[Paint.CROSSING]), *painted[Paint.ARROW]]),
    ]
    layers = [
        (PAVEMENT, pavement),
        (KERB, kerb),
        (ASPHALT, drivable),
        (CARPARK, counter_clockwise(roads.carparks)),
        (YELLOW, Rings.of(painted[Paint.CENTRE]).strips((far, near), (-near, -far))),
        (WHITE, Rings.cat(white)),
    ]
    return Shapes.cat(flat(rings, colour, pose=pose) for colour, rings in layers)


def _paved(roads: Roads) -> list[Array]:
    """The roadblocks that are drivable area of their own: connectors are only where an intersection or a road lies under them."""
    lanes = {lane.roadblock for lane in roads.lanes if lane.layer is Layer.LANE}
    connectors = {lane.roadblock for lane in roads.lanes if lane.layer is Layer.LANE_CONNECTOR}
    return [block for i, block in enumerate(roads.roadblocks) if i in lanes or i not in connectors]


def flat(rings: Rings, colour: Colour | Array, opacity: float = 1.0, pose: Array | None = None) -> Shapes:
    """Rings on the ground as one shape."""
    points = rings.points if pose is None else to_ego(rings.points, pose)
    points = np.concatenate([points, np.zeros((len(points), 1))], axis=1)
    return Shapes(points, rings.offsets, np.array([0, len(rings.offsets) - 1]), np.array([[*colour, opacity]]))


def counter_clockwise(polygons: Iterable[Array]) -> Rings:
    def area(p: Array) -> float:
        x, y = (p - p[0]).T
        return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum())

    return Rings.of([p if area(p) > 0.0 else p[::-1] for p in polygons])


def dashes(lines: Iterable[Array]) -> Iterator[Float[np.ndarray, "3 2"]]:
    """The dashes of broken lines."""
    for line in lines:
        step = np.diff(line, axis=0)
        along = np.concatenate([[0.0], np.cumsum(np.sqrt((step * step).sum(1)))])
        start = np.arange(0.5 * (DASH_PERIOD - DASH), along[-1] - DASH, DASH_PERIOD)
        at = start[:, None] + np.array([0.0, 0.5, 1.0]) * DASH
        yield from np.stack([np.interp(at, along, line[:, 0]), np.interp(at, along, line[:, 1])], axis=-1)


def stripes(outlines: Iterable[Float[np.ndarray, "4 2"]]) -> Iterator[Float[np.ndarray, "4 2"]]:
    """The stripes of zebra crossings: parallel to the first edge of each outline."""
    for a, b, c, d in outlines:
        count = max(1, round(math.dist(b, c) / (2 * STRIPE)))
        low = (np.arange(count)[:, None] + 0.25) / count
        high = low + 0.5 / count
        yield from np.stack([a + (d - a) * low, b + (c - b) * low, b + (c - b) * high, a + (d - a) * high], axis=1)


def shadows(footprints: Float[np.ndarray, "N 4 2"], heights: Float[np.ndarray, "N 2"], light: Daylight) -> Shapes:
    """Shadows of upright boxes, each from one height up to another."""
    away = -light.sun[:2] / light.sun[2]
    low, high = footprints + away * heights[:, None, :1], footprints + away * heights[:, None, 1:]
    between = np.stack([low, np.roll(low, -1, axis=1), np.roll(high, -1, axis=1), high], axis=2).reshape(-1, 4, 2)
    quads = np.concatenate([low, high, between])
    along, across = quads[:, 1] - quads[:, 0], quads[:, 3] - quads[:, 0]
    clockwise = along[:, 0] * across[:, 1] < along[:, 1] * across[:, 0]
    quads[clockwise] = quads[clockwise, ::-1]
    return flat(Rings(quads.reshape(-1, 2), np.arange(len(quads) + 1) * 4), (30, 34, 46), SHADOW * (0.4 + 0.6 * light.strength))


def haze(light: Daylight) -> Shapes:
    """Veils over the ground, thicker with distance."""
    reach = np.concatenate([HAZE_STEPS, [HORIZON]])
    circles = reach[:, None, None] * ROUND
    points = np.stack([circles[1:], circles[:-1, ::-1]], axis=1).reshape(-1, 2)
    rings = np.arange(2 * len(HAZE_STEPS) + 1) * len(ROUND)
    opacity = light.haze(np.sqrt(reach[1:] * reach[:-1]))[:, None]
    colours = np.concatenate([np.broadcast_to(light.horizon, (len(opacity), 3)), opacity], axis=1)
    return Shapes(np.concatenate([points, np.zeros((len(points), 1))], axis=1), rings, np.arange(len(HAZE_STEPS) + 1) * 2, colours)


def horizon(seed: int, heading: float, light: Daylight) -> Shapes:
    """Trees at the end of the world: a skyline that stands still in it, by which turning shows."""
    rng = np.random.default_rng([seed, 0x7EE])
    count = 180
    heights = HORIZON * (0.012 + 0.014 * rng.random(12)).repeat(count // 12) * (0.75 + 0.25 * rng.random(count))
    x, y = cosine_sine(np.arange(count) * (2.0 * math.pi / count) - heading)
    foot = np.stack([HORIZON * x, HORIZON * y, np.zeros(count)], axis=-1)
    top = np.stack([HORIZON * x, HORIZON * y, heights], axis=-1)
    quads = np.stack([foot, np.roll(foot, -1, 0), np.roll(top, -1, 0), top], axis=1)
    colour = np.array(TREES) + 0.55 * (light.horizon - np.array(TREES))
    return Shapes(quads.reshape(-1, 3), np.arange(count + 1) * 4, np.array([0, count]), np.array([[*colour, 1.0]]))


def _unit(vectors: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 2"]:
    length = np.sqrt((vectors * vectors).sum(1, keepdims=True))
    return vectors / np.where(length > 1e-9, length, np.inf)
