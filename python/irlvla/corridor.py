"""The plane geometry of PDM-Closed: paths beside a centreline, the corridors that a car sweeps along them, distances to outlines.

Letters: L points of a path, M objects, E edges of their outlines, K bars that cover them, S segments of a corridor. "Sic"
marks what looks like a slip and is the devkit's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, WIDTH

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

OFFSETS = (0.0, -1.0, 1.0)  # of the paths from the centreline, left is positive [m]
ROUNDING = 1e-9  # of contact with a corridor [m]
HALF_LENGTH, HALF_WIDTH = LENGTH / 2.0, WIDTH / 2.0  # of the car [m]

# -- paths -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paths:
    """The centreline and its parallels: poses "3 L 3" with unwrapped headings, their progress "3 L" [m]."""

    poses: Array
    progress: Array
    slope: Array  # "3 L-1 3", per metre

    @classmethod
    def beside(cls, centerline: Array) -> Paths:
        """Each point is shifted across its own heading; headings are those of the centreline."""
        across = centerline[:, 2] + np.pi / 2
        shift = np.stack([np.cos(across), np.sin(across), np.zeros(len(across))], axis=-1)
        poses = centerline + np.array(OFFSETS)[:, None, None] * shift
        poses[..., 2] = np.unwrap(centerline[:, 2])
        progress = np.zeros(poses.shape[:2])
        progress[:, 1:] = np.linalg.norm(np.diff(poses[..., :2], axis=1), axis=-1).cumsum(axis=-1)
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.diff(poses, axis=1) / np.diff(progress, axis=1)[..., None]
        return cls(poses, progress, slope)

    @property
    def length(self) -> Array:
        """Of each path, "3" [m]; 0 if there are no points."""
        return self.progress[:, -1] if self.progress.size else np.zeros(len(OFFSETS))

    def project(self, point: Array) -> Array:
        """Progress "3" of the nearest point of each path."""
        return np.concatenate([project(point[None], *line) for line in zip(self.poses[..., :2], self.progress, strict=True)])

    def poses_at(self, progress: Array) -> Array:
        """Poses "3 n 3" at a progress "3 n", which is clipped to the path, never quite to its first point."""
        progress = np.minimum(np.maximum(progress, 1e-5), self.length[:, None])
        after = np.stack([line.searchsorted(places) for line, places in zip(self.progress, progress, strict=True)])
        segment = np.maximum(after, 1) - 1
        path = np.arange(len(progress))[:, None]
        beyond = progress - self.progress[path, segment]
        poses: Array = self.slope[path, segment] * beyond[..., None] + self.poses[path, segment]
        poses[..., 2] = wrap(poses[..., 2])
        poses[np.isnan(poses)] = 0.0  # sic: a parallel that shrinks to a point lies at the origin of the map
        return poses

    def substring(self, path: int, start: float, end: float) -> Array:
        """Points "n 2" of the path between two progresses.

        Sic: the vertices between them, without the cut ends; cut exactly only where there are fewer than two.
        """
        points, progress = self.poses[path, :, :2], self.progress[path]
        start, end = min(max(start, 0.0), progress[-1]), min(max(end, 0.0), progress[-1])
        inside = points[(start <= progress) & (progress <= end)]
        if len(inside) > 1:
            return inside
        between = points[(start < progress) & (progress < end)]
        return np.stack([_point_at(points, progress, start), *between, _point_at(points, progress, end)])


def _point_at(points: Array, progress: Array, distance: float) -> Array:
    return np.array([np.interp(distance, progress, points[:, 0]), np.interp(distance, progress, points[:, 1])])


def project(points: Array, line: Array, progress: Array) -> Array:
    """Progress "n" along a polyline "L 2" of the point nearest to each of "n 2"; the first of equals wins.

    The formulas are those of GEOS (Distance::pointToSegment), which decide where a path crosses itself.
    """
    segment = _near_segments(points, line)
    (x0, y0), (x1, y1) = line[segment].T, line[segment + 1].T
    dx, dy = x1 - x0, y1 - y0
    squared = dx * dx + dy * dy
    safe = np.where(squared > 0.0, squared, 1.0)
    from_x, from_y = points[:, :1] - x0, points[:, 1:] - y0
    fraction = (from_x * dx + from_y * dy) / safe
    distance = np.abs((from_x * dy - from_y * dx) / safe) * np.sqrt(squared)
    distance = np.where(fraction <= 0.0, np.sqrt(from_x * from_x + from_y * from_y), distance)
    to_x, to_y = points[:, :1] - x1, points[:, 1:] - y1
    distance = np.where(fraction >= 1.0, np.sqrt(to_x * to_x + to_y * to_y), distance)
    nearest = distance.argmin(axis=-1)
    share = clip(fraction[np.arange(len(points)), nearest], 0.0, 1.0)
    return progress[segment[nearest]] + share * np.sqrt(squared[nearest])


def _near_segments(points: Array, line: Array) -> Indices:
    """Segments of a polyline "L 2" among which is the nearest to each of "n 2" points."""
    some = line[::8]
    x, y = points[:, :1] - some[:, 0], points[:, 1:] - some[:, 1]
    furthest = np.sqrt((x * x + y * y).min(axis=-1).max())
    low, high = points.min(axis=0) - furthest, points.max(axis=0) + furthest
    beyond = (np.maximum(line[:-1], line[1:]) < low) | (np.minimum(line[:-1], line[1:]) > high)
    return np.flatnonzero(~(beyond[:, 0] | beyond[:, 1]))


# -- corridors ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corridor:
    """All points within half the car's width of a polyline, and the half squares beyond its two ends.

    The devkit takes shapely's buffer, whose arcs are polygons and whose line is simplified first: at bends it differs by
    up to about a centimetre. Kept as segments, each with a radius: those of the line, then twice four edges of a square.
    """

    start: Array  # "S 2"
    step: Array  # "S 2"
    radius: Array  # "S"

    @classmethod
    def around(cls, line: Array) -> Corridor:
        squares = np.stack([_end_square(line[::-1], -1.0), _end_square(line, 1.0)])
        start = np.concatenate([line[:-1], squares.reshape(-1, 2)])
        step = np.concatenate([np.diff(line, axis=0), (np.roll(squares, -1, axis=1) - squares).reshape(-1, 2)])
        return cls(start, step, np.append(np.full(len(line) - 1, HALF_WIDTH), np.zeros(8)))

    def contact(self, bars: Array) -> tuple[Array, Array]:
        """How far bars "K 5" have to glide along their headings to touch each part: two "K parts" [m].

        A part is touched while low <= glide <= high; never if low > high. The parts (capsules around the segments, the
        half squares) are convex, so each is touched during one interval, whose ends have a closed form in the frame of
        the bar.
        """
        cosine, sine = np.cos(bars[:, 2, None]), np.sin(bars[:, 2, None])
        from_x, from_y = self.start[:, 0] - bars[:, :1], self.start[:, 1] - bars[:, 1:2]
        x, y = from_x * cosine + from_y * sine, from_y * cosine - from_x * sine
        dx, dy = self.step[:, 0] * cosine + self.step[:, 1] * sine, self.step[:, 1] * cosine - self.step[:, 0] * sine
        half_length, half_width = bars[:, 3, None], bars[:, 4, None]
        high = _furthest(x, y, dx, dy, half_width, self.radius) + half_length
        low = -_furthest(-x, y, -dx, dy, half_width, self.radius) - half_length
        squares_low, squares_high = low[:, -8:].reshape(-1, 2, 4).min(axis=-1), high[:, -8:].reshape(-1, 2, 4).max(axis=-1)
        return np.concatenate([low[:, :-8], squares_low], axis=-1), np.concatenate([high[:, :-8], squares_high], axis=-1)

    def starts_in(self, edges: Array) -> bool:
        """Whether an outline "E 2 2" contains the first point of the polyline."""
        (x0, x1), (y0, y1) = (edges - self.start[0]).T
        return bool(_Seen(x0, y0, x1, y1).crossings().sum() % 2)


def _furthest(x: Array, y: Array, dx: Array, dy: Array, half_width: Array, radius: Array) -> Array:
    """The furthest place on the x axis of a bar across it, |y| <= half_width, within `radius` of (x, y) + s (dx, dy).

    -inf where there is none. From one point of the segment the bar can be sqrt(radius^2 - e^2) further along, with
    e = max(|y| - half_width, 0). The sum is concave in s, so the best s of the whole line, clipped to the segment, is
    the best of the segment.
    """
    length = np.sqrt(dx * dx + dy * dy)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        lean = np.where(length > 0.0, dx * np.sign(dy) / length, 0.0)
        best = (np.copysign(half_width, lean) + radius * lean - y) / dy
    s = clip(np.where(dy == 0.0, dx > 0.0, best), 0.0, 1.0)
    beyond = np.maximum(np.abs(y + s * dy) - half_width, 0.0)
    within = beyond <= radius + ROUNDING
    return np.where(within, x + s * dx + np.sqrt(np.maximum(radius * radius - beyond * beyond, 0.0)), -np.inf)


def _end_square(line: Array, sign: float) -> Array:
    """Corners "4 2" of the half square beyond the last point of a polyline; beside a mere point, of one half of a square."""
    moved = np.flatnonzero((line != line[-1]).any(axis=-1))
    forward = line[-1] - line[moved[-1]] if len(moved) else np.array([sign, 0.0])
    forward = forward / np.hypot(*forward) * HALF_WIDTH
    left = np.array([-forward[1], forward[0]])
    return line[-1] + np.stack([left, left + forward, forward - left, -left])


# -- shapes ------------------------------------------------------------------------------------------------------------


def clearance(poses: Array, edges: Array, first: Indices) -> Array:
    """Distances "... M" between the car at rear-axle poses "... 3" and outlines; 0 where they touch or overlap.

    In the frame of the car: the nearest points of its box and an edge are an end of the edge, or the corner of the box
    that is furthest towards the edge and its foot on it.
    """
    if not len(first):
        return np.zeros((*poses.shape[:-1], 0))
    seen = _Seen.from_car(poses, edges)
    end_x, end_y = np.maximum(np.abs(seen.x0) - HALF_LENGTH, 0.0), np.maximum(np.abs(seen.y0) - HALF_WIDTH, 0.0)
    dx, dy, cross = seen.x1 - seen.x0, seen.y1 - seen.y0, seen.x0 * seen.y1 - seen.x1 * seen.y0
    corner_x, corner_y = np.copysign(HALF_LENGTH, dy * cross) - seen.x0, np.copysign(HALF_WIDTH, -dx * cross) - seen.y0
    foot = clip((corner_x * dx + corner_y * dy) / np.maximum(dx * dx + dy * dy, 1e-300), 0.0, 1.0)
    away_x, away_y = corner_x - foot * dx, corner_y - foot * dy
    squared = np.minimum(end_x * end_x + end_y * end_y, away_x * away_x + away_y * away_y)
    squared *= seen.separation() > 0.0
    outside = ~np.logical_xor.reduceat(seen.crossings(), first, axis=-1)
    return outside * np.sqrt(np.minimum.reduceat(squared, first, axis=-1))


@dataclass(frozen=True)
class _Seen:
    """Edges from (x0, y0) to (x1, y1), each "... E", in frames at the centre of the car."""

    x0: Array
    y0: Array
    x1: Array
    y1: Array

    @classmethod
    def from_car(cls, poses: Array, edges: Array) -> _Seen:
        """Edges "E 2 2" seen from cars at rear-axle poses "... 3"."""
        cosine, sine = np.cos(poses[..., 2]), np.sin(poses[..., 2])
        x, y = (poses[..., 0] + REAR_AXLE_TO_CENTRE * cosine)[..., None], (poses[..., 1] + REAR_AXLE_TO_CENTRE * sine)[..., None]
        cosine, sine = cosine[..., None], sine[..., None]
        ends = []
        for end in (0, 1):
            from_x, from_y = edges[:, end, 0] - x, edges[:, end, 1] - y
            ends += [from_x * cosine + from_y * sine, from_y * cosine - from_x * sine]
        return cls(*ends)

    def separation(self) -> Array:
        """From the box of the car: negative where an edge enters it, 0 where it touches (separating axes)."""
        width, height = np.abs(self.x1 - self.x0), np.abs(self.y1 - self.y0)
        along = np.abs(self.x0 + self.x1) - width - 2.0 * HALF_LENGTH
        across = np.abs(self.y0 + self.y1) - height - 2.0 * HALF_WIDTH
        beside = np.abs(self.x0 * self.y1 - self.x1 * self.y0) - HALF_LENGTH * height - HALF_WIDTH * width
        return np.maximum(np.maximum(along, across), beside)

    def crossings(self) -> Mask:
        """Whether edges cross the positive x axis: an odd number of an outline's edges do if it contains the origin."""
        rising = self.y1 > self.y0
        return ((self.y0 > 0.0) != (self.y1 > 0.0)) & ((self.x0 * self.y1 > self.x1 * self.y0) == rising)


def box_edges(state: Array, size: Array) -> Array:
    """Edges "M*4 2 2" of boxes: centre x y and heading "M 5", length and width "M 2"; corners as nuPlan computes them."""
    heading, half_length, half_width = state[:, 2, None], size[:, :1] / 2.0, size[:, 1:] / 2.0
    along = half_length * np.array([1.0, -1.0, -1.0, 1.0])
    across = half_width * np.array([1.0, 1.0, -1.0, -1.0])
    x = state[:, :1] + ((across * np.cos(heading + np.pi / 2)) + (along * np.cos(heading)))
    y = state[:, 1:2] + ((across * np.sin(heading + np.pi / 2)) + (along * np.sin(heading)))
    corners = np.stack([x, y], axis=-1)
    return np.stack([corners, np.roll(corners, -1, axis=1)], axis=2).reshape(-1, 2, 2)


def thin_bars(edges: Array) -> Array:
    """Edges "E 2 2" as boxes of no width "E 5": centre, heading, half length, half width."""
    step = edges[:, 1] - edges[:, 0]
    length = np.hypot(step[:, 0], step[:, 1])
    return np.column_stack([edges.mean(axis=1), np.arctan2(step[:, 1], step[:, 0]), length / 2.0, np.zeros(len(edges))])


@dataclass(frozen=True)
class Polygon:
    """Edges "E 2 2" of all rings; `sign` "E" is 1 for counter-clockwise shells and clockwise holes, else -1."""

    edges: Array
    sign: Array

    def centroid(self) -> Array:
        """Of the area, "2"; of the vertices if there is no area."""
        origin = self.edges[0, 0]
        start, end = self.edges[:, 0] - origin, self.edges[:, 1] - origin
        area = self.sign * (start[:, 0] * end[:, 1] - end[:, 0] * start[:, 1])
        total = area.sum()
        return origin + (((start + end) * area[:, None]).sum(axis=0) / (3.0 * total) if total != 0.0 else start.mean(axis=0))

    def contains(self, pose: Array) -> bool:
        """Whether the whole car at a rear-axle pose lies in it, borders included."""
        seen = _Seen.from_car(pose, self.edges)
        return bool(seen.crossings().sum() % 2) and not bool((seen.separation() < 0.0).any())


def wrap(angle: Array) -> Array:
    return np.arctan2(np.sin(angle), np.cos(angle))


def clip(values: Array, low: float, high: float) -> Array:
    """As np.clip, whose checks take longer than the work on small arrays."""
    return np.minimum(np.maximum(values, low), high)
