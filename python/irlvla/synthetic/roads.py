"""Lines, and the draft from which roads are made: lanes side by side, connectors through junctions, paint.

Traffic keeps to the right. A line is a polyline "L 3" of x, y and heading, at most 1 m apart; its headings are not wrapped, so
that they have no jumps. "Beside" counts metres to the left of a line.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from irlvla.synthetic.angles import Array, angle_of, cosine_sine, cosine_sine_of
from irlvla.synthetic.world import Lane, Paint, Roads, Signal
from irlvla.types import Layer

Line = Float[np.ndarray, "L 3"]
Pose = Sequence[float] | Float[np.ndarray, "3"]
SPACING = 1.0  # of the points of a line [m]
LAP = 0.05  # of a strip where cars park over the lane beside it [m]
FLAT = 0.01  # outlines and paint leave out points, as long as they stay so close to the line [m]
SOLID_BEFORE_JUNCTION = 25.0  # where lanes are changed no more [m]

# -- lines -------------------------------------------------------------------------------------------------------------


def draw(start: Pose, *pieces: tuple[float, float, float], beside: float = 0.0) -> Line:
    """The line from a pose through pieces: length, curvature at its start, curvature at its end (linear in between).

    In bends its points are so dense that those of a parallel `beside` metres away are not further apart than `SPACING` either.
    """
    headings, steps, heading = [np.array([start[2]])], [], float(start[2])
    for length, first, last in pieces:
        stretched = length * (1.0 + beside * max(abs(first), abs(last)))
        count = max(math.ceil(stretched / SPACING - 1e-9), 1)
        s = np.arange(1, 2 * count + 1) * (length / (2 * count))
        headings.append(heading + s * (first + s * ((last - first) / (2.0 * length))))
        heading += length * (0.5 * (first + last))
        steps.append(np.full(count, length / (6 * count)))
    turned = np.concatenate(headings)
    cosine, sine = cosine_sine(turned)
    step = np.concatenate(steps)
    line = np.empty((len(step) + 1, 3))
    line[0] = start
    line[1:, 2] = turned[2::2]
    for column, part in ((0, cosine), (1, sine)):  # Simpson's rule
        line[1:, column] = start[column] + np.cumsum(step * (part[:-2:2] + 4.0 * part[1::2] + part[2::2]))
    return line


def beside(line: Line, left: float | Array) -> Line:
    """The parallel at some metres to the left; for a column "K 1" of metres, the parallels "K L 3"."""
    cosine, sine = cosine_sine(line[:, 2])
    x, y = line[:, 0] - left * sine, line[:, 1] + left * cosine
    return np.stack([x, y, np.broadcast_to(line[:, 2], x.shape)], axis=-1)


def placed(pose: Pose, ahead: float, left: float) -> tuple[float, float, float]:
    """The pose that lies ahead and to the left of another, turned as it is."""
    cosine, sine = cosine_sine_of(float(pose[2]))
    return float(pose[0] + ahead * cosine - left * sine), float(pose[1] + ahead * sine + left * cosine), float(pose[2])


def points_at(pose: Pose, points: Sequence[Sequence[float]]) -> Float[np.ndarray, "N 2"]:
    """Points that lie so far ahead and to the left of a pose."""
    cosine, sine = cosine_sine_of(float(pose[2]))
    ahead, left = np.array(points, dtype=np.float64).T
    return np.stack([pose[0] + ahead * cosine - left * sine, pose[1] + ahead * sine + left * cosine], axis=1)


def backwards(line: Line) -> Line:
    """The same line, driven the other way."""
    return line[::-1] + np.array([0.0, 0.0, math.pi])


def connection(start: Pose, end: Pose, straight: float) -> Line:
    """A line between two poses: `straight` metres, an arc between tangents, and again; a smooth shift where there is no turn."""
    turn = float(end[2] - start[2])
    turn -= round(turn / (2.0 * math.pi)) * 2.0 * math.pi
    cosine, sine = cosine_sine_of(float(start[2]))
    dx, dy = float(end[0] - start[0]), float(end[1] - start[1])
    ahead, left = cosine * dx + sine * dy, cosine * dy - sine * dx
    if abs(turn) < 0.1:
        return _shift(start, end, ahead, left, turn)
    cosine, sine = cosine_sine_of(turn)
    after = left / sine  # the tangents meet so far before the end, and so far behind the start
    before = ahead - after * cosine
    cosine, sine = cosine_sine_of(0.5 * turn)
    reach = min(before, after) - straight  # from where the tangents meet to the ends of the arc
    curvature = sine / cosine / reach
    pieces = (before - reach, 0.0, 0.0), (turn / curvature, curvature, curvature), (after - reach, 0.0, 0.0)
    line = draw(start, *(piece for piece in pieces if piece[0] > 1e-6))
    line[-1, :2] = end[:2]
    return line


def _shift(start: Pose, end: Pose, ahead: float, left: float, turn: float) -> Line:
    """A cubic from one pose to another of nearly the same heading."""
    count = math.ceil(ahead / (0.95 * SPACING))
    u = np.arange(count + 1) / count
    cosine, sine = cosine_sine_of(turn)
    bend = sine / cosine * ahead
    shift = u * u * ((3.0 * left - bend) + u * (bend - 2.0 * left))
    slope = u * (2.0 * (3.0 * left - bend) + 3.0 * u * (bend - 2.0 * left)) / ahead
    cosine, sine = cosine_sine_of(float(start[2]))
    x, y = start[0] + cosine * ahead * u - sine * shift, start[1] + sine * ahead * u + cosine * shift
    line = np.stack([x, y, start[2] + angle_of(1.0, slope)], axis=-1)
    line[-1, :2] = end[:2]
    return line


def lengths(line: Line) -> Array:
    """Distance of each point from the first, along the line [m]."""
    return np.concatenate([[0.0], np.cumsum(_steps(line))])


def _steps(line: Line) -> Array:
    """Distances from one point to the next."""
    dx, dy = line[1:, 0] - line[:-1, 0], line[1:, 1] - line[:-1, 1]
    return np.sqrt(dx * dx + dy * dy)


def corners(line: Line) -> np.ndarray:
    """Indices of the points that an outline needs: the ends, and in bends as many as keep the chords `FLAT`.

    A chord c of a bend of curvature k is off by k c^2 / 8, so there is a point for each sqrt(8 FLAT) of the integral of sqrt(k).
    """
    bent = np.sqrt(np.abs(line[1:, 2] - line[:-1, 2]) * _steps(line))
    count = np.floor(np.cumsum(bent) * (1.0 / math.sqrt(8.0 * FLAT)))
    inner = np.flatnonzero(np.diff(count)) + 1
    return np.concatenate([[0], inner, [len(line) - 1]])


# -- roads -------------------------------------------------------------------------------------------------------------


class Section(NamedTuple):
    """A stretch of road: its lanes along the line (on its right) and against it (on its left), each from the middle outwards."""

    along: list[int]
    against: list[int]


@dataclass
class Draft:
    """Roads in the making."""

    lanes: list[Lane] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)  # of each lane [m]
    ranks: list[int] = field(default_factory=list)  # who gives way where lanes cross: the lower rank
    edges: list[tuple[Array, Array]] = field(default_factory=list)  # of each lane: left and right
    links: list[tuple[int, int]] = field(default_factory=list)  # lane, successor
    opposites: dict[int, int] = field(default_factory=dict)  # lanes to the left of which another is driven the other way
    roadblocks: list[Array] = field(default_factory=list)
    intersections: list[Array] = field(default_factory=list)
    carparks: list[Array] = field(default_factory=list)
    paint: list[tuple[Paint, Array]] = field(default_factory=list)
    signals: list[Signal] = field(default_factory=list)

    def road(
        self,
        line: Line,
        along: int,
        against: int,
        width: float,
        limit: float,
        sections: int = 1,
        *,
        edges: tuple[Paint, Paint] = (Paint.EDGE, Paint.EDGE),
        ends: bool = False,
    ) -> list[Section]:
        """Lanes on both sides of a line, in sections of equal length.

        `edges` are painted on its left and on its right; `ends`: it leads away from a junction.
        """
        halves = range(-2 * against, 2 * along + 1)
        parallels = dict(zip(halves, beside(line, np.array(halves)[:, None] * (-0.5 * width)), strict=True))
        borders = {k: parallels[2 * k][:, :2] for k in range(-against, along + 1)}
        centres = {k: parallels[2 * k + 1] for k in range(-against, along)}
        cuts = [round(i * (len(line) - 1) / sections) for i in range(sections + 1)]
        made = []
        for first, last in itertools.pairwise(cuts):
            span = slice(first, last + 1)
            keep = first + corners(line[span])
            right = self._side([centres[k][span] for k in range(along)], [borders[k][keep] for k in range(along + 1)], width, limit)
            back = [backwards(centres[-k - 1][span]) for k in range(against)]
            left = self._side(back, [borders[-k][keep[::-1]] for k in range(against + 1)], width, limit)
            made.append(Section(right, left))
            if right and left:
                self.opposites |= {right[0]: left[0], left[0]: right[0]}
        for one, two in itertools.pairwise(made):
            self.links += [*zip(one.along, two.along, strict=True), *zip(two.against, one.against, strict=True)]
        self._paint_lines(corners(line), borders, edges, ends=ends)
        return made

    def _side(self, centres: list[Line], borders: list[Array], width: float, limit: float) -> list[int]:
        """The lanes of one direction of a section, from the left to the right: a roadblock."""
        if not centres:
            return []
        block, first = len(self.roadblocks), len(self.lanes)
        for k, centre in enumerate(centres):
            neighbours = first + k - 1 if k else None, first + k + 1 if k + 1 < len(centres) else None
            self._lane(centre, borders[k], borders[k + 1], Layer.LANE, width, limit, block, *neighbours)
        self.roadblocks.append(ring(borders[0], borders[-1]))
        return list(range(first, len(self.lanes)))

    def _lane(
        self, centre: Line, left: Array, right: Array, layer: Layer, width: float, limit: float, block: int,
        left_lane: int | None = None, right_lane: int | None = None, signal: int | None = None, rank: int = 0,
    ) -> int:  # fmt: skip
        self.lanes.append(Lane(centre, ring(left, right), layer, width, limit, block, left=left_lane, right=right_lane, signal=signal))
        self.lengths.append(float(lengths(centre)[-1]))
        self.edges.append((left, right))
        self.ranks.append(rank)
        return len(self.lanes) - 1

    def connect(
        self, pairs: Iterable[tuple[int, int]], straight: float = 0.0, *, signal: int | None = None, ranks: Sequence[int] = (0,)
    ) -> list[int]:
        """Connectors from lanes to lanes, from the left to the right: one roadblock. One rank for all of them, or one for each."""
        block, made = len(self.roadblocks), []
        for (before, after), rank in zip(pairs, itertools.cycle(ranks), strict=False):
            source, target = self.lanes[before], self.lanes[after]
            line = connection(source.centerline[-1], target.centerline[0], straight)
            keep = corners(line)
            left, right = beside(line[keep], np.array([[0.5], [-0.5]]) * source.width)[..., :2]
            kind, limit = Layer.LANE_CONNECTOR, target.speed_limit
            made.append(self._lane(line, left, right, kind, source.width, limit, block, signal=signal, rank=rank))
            self.links += [(before, made[-1]), (made[-1], after)]
        self.roadblocks.append(ring(self.edges[made[0]][0], self.edges[made[-1]][1]))
        return made

    def _paint_lines(self, keep: np.ndarray, borders: dict[int, Array], edges: tuple[Paint, Paint], *, ends: bool) -> None:
        """Lines between lanes: `borders` are numbered from the middle of the road, to the right."""
        for k, border in borders.items():
            if k == min(borders):
                self.paint.append((edges[0], border[keep]))
            elif k == max(borders):
                self.paint.append((edges[1], border[keep]))
            elif k == 0:
                self.paint.append((Paint.CENTRE, border[keep]))
            elif k < 0 and ends:  # towards the junction
                near = round(SOLID_BEFORE_JUNCTION / SPACING)
                self.paint.append((Paint.SOLID, border[[*keep[keep < near], near]]))
                self.paint.append((Paint.DASHED, border[[near, *keep[keep > near]]]))
            else:
                self.paint.append((Paint.DASHED, border[keep]))

    def parking(self, line: Line, inner: float, outer: float) -> None:
        """A strip beside a line where cars park, and its kerb. It reaches a little into the lane: no gap is left between them."""
        keep = corners(line)
        near, far = beside(line[keep], np.array([[inner - math.copysign(LAP, inner)], [outer]]))[..., :2]
        self.carparks.append(ring(near, far) if inner > outer else ring(far, near))
        self.paint.append((Paint.EDGE, far))

    def roads(self) -> Roads:
        """What was drafted, with all links known."""
        successors: list[list[int]] = [[] for _ in self.lanes]
        predecessors: list[list[int]] = [[] for _ in self.lanes]
        for before, after in self.links:
            successors[before].append(after)
            predecessors[after].append(before)
        lanes = [
            dataclasses.replace(lane, successors=tuple(after), predecessors=tuple(before))
            for lane, after, before in zip(self.lanes, successors, predecessors, strict=True)
        ]
        parts = (self.roadblocks, self.intersections, self.carparks, self.paint, self.signals)
        return Roads(tuple(lanes), *map(tuple, parts))  # type: ignore[arg-type]


def ring(left: Array, right: Array) -> Array:
    """The outline between two edges that are driven the same way, counter-clockwise."""
    return np.concatenate([right, left[::-1]])
