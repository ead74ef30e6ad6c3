"""The vector map of an Argoverse 2 log as the polygons and routes that a `Scene` holds.

    lane segment (VEHICLE, BUS)       LANE, or LANE_CONNECTOR where `is_intersection`
    neighbours of one direction       ROADBLOCK, together
    intersection segments that touch  INTERSECTION, together
    drivable area                     DRIVABLE_AREA

Bike lanes are no lanes for a car; they lie in the drivable area. The maps know neither lights nor speed limits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from irlvla import FileError, Layer

Array = NDArray[np.float64]

SPACING = 1.0  # of centreline points [m]
SAME_WAY = np.pi / 2  # neighbours whose headings differ by less drive in one direction


@dataclass(frozen=True)
class Lane:
    """A lane segment."""

    centerline: Array  # "L 3": x y heading
    polygon: shapely.Polygon
    connector: bool
    successors: tuple[int, ...]
    neighbours: tuple[int, ...]  # of the same direction

    @property
    def length(self) -> float:
        return float(np.hypot(*np.diff(self.centerline[:, :2], axis=0).T).sum())


@dataclass(frozen=True)
class Roads:
    """The map of one log, city frame [m]."""

    lanes: dict[int, Lane]
    roadblocks: list[shapely.Polygon]
    intersections: list[shapely.Polygon]
    drivable: list[shapely.Polygon]

    def lanes_at(self, points: Array) -> list[list[int]]:
        """The lanes that contain each point "N 2"."""
        inside = {number: shapely.contains_xy(lane.polygon, points) for number, lane in self.lanes.items()}
        return [[number for number, rows in inside.items() if rows[row]] for row in range(len(points))]

    def polygons(self) -> Iterable[tuple[Layer, shapely.Polygon, int | None]]:
        """Layer, polygon, and for lanes their number."""
        for number, lane in self.lanes.items():
            yield (Layer.LANE_CONNECTOR if lane.connector else Layer.LANE), lane.polygon, number
        for layer, polygons in (
            (Layer.ROADBLOCK, self.roadblocks),
            (Layer.INTERSECTION, self.intersections),
            (Layer.DRIVABLE_AREA, self.drivable),
        ):
            yield from ((layer, polygon, None) for polygon in polygons)


def read_roads(path: Path) -> Roads:
    """Read a `log_map_archive_*.json`. Raises `FileError` if it is damaged or not of that kind."""
    try:
        archive = json.loads(path.read_text())
        segments = [segment for segment in archive["lane_segments"].values() if segment["lane_type"] in ("VEHICLE", "BUS")]
        drivable = [_polygon(_points(area["area_boundary"])) for area in archive["drivable_areas"].values()]
        lanes = _lanes(segments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} is no Argoverse 2 map archive: {type(error).__name__}: {error}") from error
    return Roads(lanes, _roadblocks(lanes), _intersections(lanes), [part for area in drivable for part in _parts(area)])


def _lanes(segments: list[dict[str, Any]]) -> dict[int, Lane]:
    lanes = {}
    for segment in segments:
        left, right = _points(segment["left_lane_boundary"]), _points(segment["right_lane_boundary"])
        outline = _polygon(np.concatenate([left, right[::-1]]))
        polygon = max(_parts(outline), key=lambda part: part.area)
        neighbours = [segment[f"{side}_neighbor_id"] for side in ("left", "right")]
        successors = tuple(int(number) for number in segment["successors"])
        lanes[int(segment["id"])] = (_centerline(left, right), polygon, bool(segment["is_intersection"]), successors, neighbours)
    built = {}
    for number, (line, polygon, connector, successors, neighbours) in lanes.items():
        beside = tuple(int(other) for other in neighbours if other in lanes and _same_way(line, lanes[other][0]))
        built[number] = Lane(line, polygon, connector, tuple(other for other in successors if other in lanes), beside)
    return built


def _same_way(first: Array, second: Array) -> bool:
    middle = first[len(first) // 2, 2] - second[len(second) // 2, 2]
    return bool(abs(np.angle(np.exp(1j * middle))) < SAME_WAY)


def _centerline(left: Array, right: Array) -> Array:
    """Midway between the boundaries, which are walked at proportional speed."""
    count = max(2, round(max(_lengths(left)[-1], _lengths(right)[-1]) / SPACING) + 1)
    middle = (_resampled(left, count) + _resampled(right, count)) / 2
    step = np.diff(middle, axis=0)
    heading = np.arctan2(step[:, 1], step[:, 0])
    return np.column_stack([middle, np.append(heading, heading[-1])])


def _resampled(line: Array, count: int) -> Array:
    length = _lengths(line)
    at = np.linspace(0.0, length[-1], count)
    return np.column_stack([np.interp(at, length, line[:, 0]), np.interp(at, length, line[:, 1])])


def _lengths(line: Array) -> Array:
    return np.append(0.0, np.hypot(*np.diff(line, axis=0).T).cumsum())


def _roadblocks(lanes: dict[int, Lane]) -> list[shapely.Polygon]:
    groups = _components({number: lane.neighbours for number, lane in lanes.items() if not lane.connector})
    return [part for group in groups for part in _union(lanes[number].polygon for number in group)]


def _intersections(lanes: dict[int, Lane]) -> list[shapely.Polygon]:
    """Unions of the intersection segments, without the holes between them."""
    parts = _union(lane.polygon for lane in lanes.values() if lane.connector)
    return [shapely.Polygon(part.exterior) for part in parts]


def _components(neighbours: dict[int, tuple[int, ...]]) -> list[list[int]]:
    """Groups of lanes that are neighbours of neighbours."""
    left, groups = set(neighbours), []
    for first in neighbours:
        if first not in left:
            continue
        group, ahead = [], [first]
        while ahead:
            number = ahead.pop()
            if number in left:
                left.remove(number)
                group.append(number)
                ahead += neighbours[number]
        groups.append(group)
    return groups


def _union(polygons: Iterable[shapely.Polygon]) -> list[shapely.Polygon]:
    return _parts(shapely.union_all(list(polygons)))


def _polygon(points: Array) -> Any:
    """A valid polygon, or several, of an outline that may cross itself."""
    return shapely.make_valid(shapely.Polygon(points))


def _parts(shape: Any) -> list[shapely.Polygon]:
    return [part for part in shapely.get_parts(shape) if isinstance(part, shapely.Polygon) and part.area > 0]


def _points(points: list[dict[str, float]]) -> Array:
    return np.array([(point["x"], point["y"]) for point in points], dtype=np.float64)
