"""nuPlan's vector maps: a GeoPackage per city, read with sqlite3, shapely and pyproj alone.

Geometries are stored as longitude and latitude and moved to the city's UTM zone, as the devkit does [m]. Ids are strings here,
as in the routes of the logs; in the files they are strings, integers or floats.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import shapely
from numpy.typing import NDArray

from irlvla import FileError
from irlvla.errors import did_you_mean

Array = NDArray[np.float64]

ALIASES = {"las_vegas": "us-nv-las-vegas-strip"}  # an old name in the logs
ENVELOPES = {0: 0, 1: 32, 2: 48, 3: 48, 4: 64}  # bytes of a GeoPackage geometry's bounding box, by its kind


@dataclass(frozen=True)
class Lane:
    """A lane, or a connector through a junction."""

    id: str
    polygon: shapely.Polygon
    path: Array  # "L 3": x y heading of the baseline; a heading is that to the next point, the last repeats
    length: float
    speed_limit: float  # [m/s]; NaN = unknown
    roadblock: str  # its lane group, or lane group connector
    connector: bool
    outgoing: list[str] = field(default_factory=list)

    @property
    def baseline(self) -> Array:
        """The points of the baseline "L 2"."""
        return self.path[:, :2]


@dataclass(frozen=True)
class Roadblock:
    """A group of lanes of one direction, or of connectors."""

    id: str
    polygon: shapely.Polygon
    connector: bool
    lanes: list[str] = field(default_factory=list)
    incoming: list[str] = field(default_factory=list)
    outgoing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Map:
    """One city."""

    lanes: dict[str, Lane]
    roadblocks: dict[str, Roadblock]  # and their connectors
    intersections: list[shapely.Polygon]
    carparks: list[shapely.Polygon]

    def blocks_near(self, x: float, y: float, radius: float) -> list[Roadblock]:
        """Roadblocks, then connectors, that touch the square of half side `radius` around a point, in the order of the file."""
        patch = shapely.box(x - radius, y - radius, x + radius, y + radius)
        blocks = list(self.roadblocks.values())
        rows = np.sort(self._tree.query(patch, predicate="intersects"))
        return sorted((blocks[row] for row in rows), key=lambda block: block.connector)

    def nearest_block(self, x: float, y: float, connector: bool) -> Roadblock | None:
        """The roadblock, or connector, nearest to a point."""
        blocks = [block for block in self.roadblocks.values() if block.connector == connector]
        distances = shapely.distance([block.polygon for block in blocks], shapely.Point(x, y))
        return blocks[int(distances.argmin())] if blocks else None

    @functools.cached_property
    def _tree(self) -> shapely.STRtree:
        return shapely.STRtree([block.polygon for block in self.roadblocks.values()])


def find_map(root: Path, name: str) -> Path:
    """The file of a city under a maps folder, as nuPlan lays it out: NAME/VERSION/map.gpkg. Raises `FileError` if there is none."""
    name = ALIASES.get(name, name)
    files = sorted(root.glob(f"{name}/*/map.gpkg"))
    if not files:
        near = did_you_mean(name, {file.parents[1].name for file in root.glob("*/*/map.gpkg")})
        raise FileError(f"there is no map of {name!r} under {root} (looked for {name}/*/map.gpkg). {near}".rstrip())
    return files[-1]


@functools.lru_cache(maxsize=4)  # the cities of nuPlan
def read_map(path: Path) -> Map:
    """Read a `map.gpkg`. Raises `FileError` if it is damaged or lacks a layer or column."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as file:
            layers = _Layers(file)
            lanes = {lane.id: lane for lane in _lanes(layers)}
            blocks = {block.id: block for block in _blocks(layers)}
            carparks = [row["polygon"] for row in layers.rows("carpark_areas")]
            intersections = [row["polygon"] for row in layers.rows("intersections")]
    except (sqlite3.Error, KeyError, ValueError, TypeError, shapely.errors.ShapelyError, pyproj.exceptions.ProjError) as error:
        raise FileError(f"{path} is no nuPlan map: {type(error).__name__}: {error}") from error
    for lane in lanes.values():
        if lane.roadblock in blocks:
            blocks[lane.roadblock].lanes.append(lane.id)
    return Map(lanes, blocks, intersections, carparks)


class _Layers:
    """The tables of a file, their geometries moved to the UTM zone of the city."""

    def __init__(self, file: sqlite3.Connection) -> None:
        self.file = file
        file.row_factory = sqlite3.Row
        (zone,) = file.execute("SELECT value FROM meta WHERE key = 'projectedCoordSystem'").fetchone()
        self.to_metres = pyproj.Transformer.from_crs("EPSG:4326", zone, always_xy=True)

    def rows(self, layer: str) -> Iterator[dict[str, Any]]:
        """Rows of a layer in order of their id; the geometry as "polygon" (or line)."""
        (geometry,) = self.file.execute("SELECT column_name FROM gpkg_geometry_columns WHERE table_name = ?", (layer,)).fetchone()
        found = [dict(row) for row in self.file.execute(f'SELECT * FROM "{layer}" ORDER BY fid')]
        shapes = shapely.from_wkb([_wkb(row[geometry]) for row in found])
        moved = shapely.transform(shapes, lambda points: np.column_stack(self.to_metres.transform(points[:, 0], points[:, 1])))
        for row, shape in zip(found, moved, strict=True):
            yield {**row, "polygon": shape}


def _lanes(layers: _Layers) -> Iterator[Lane]:
    paths: dict[str, Array] = {}
    for row in layers.rows("baseline_paths"):
        owner = _id(row["lane_fid"]) or _id(row["lane_connector_fid"])
        paths.setdefault(owner, _path(row["polygon"]))
    outlines = {_id(row["lane_connector_fid"]): row["polygon"] for row in layers.rows("gen_lane_connectors_scaled_width_polygons")}
    connectors = list(layers.rows("lane_connectors"))
    outgoing: dict[str, list[str]] = {}
    for row in connectors:  # a connector's "exit lane" is the lane that it leaves, its "entry lane" the one that it enters
        outgoing.setdefault(_id(row["exit_lane_fid"]), []).append(_id(row["fid"]))
    for row in layers.rows("lanes_polygons"):
        number = _id(row["fid"])
        yield _lane(number, row["polygon"], paths, row, _id(row["lane_group_fid"]), False, outgoing.get(number, []))
    for row in connectors:
        number, ahead = _id(row["fid"]), _id(row["entry_lane_fid"])
        yield _lane(number, outlines[number], paths, row, _id(row["lane_group_connector_fid"]), True, [ahead] if ahead else [])


def _lane(
    number: str, polygon: shapely.Polygon, paths: dict[str, Array], row: dict[str, Any], block: str, connector: bool, outgoing: list[str]
) -> Lane:
    limit, path = row["speed_limit_mps"], paths[number]
    length = float(shapely.length(shapely.LineString(path[:, :2])))
    return Lane(number, polygon, path, length, float("nan") if limit is None else float(limit), block, connector, outgoing)


def _blocks(layers: _Layers) -> Iterator[Roadblock]:
    connectors = list(layers.rows("lane_group_connectors"))
    ends = [(_id(row["from_lane_group_fid"]), _id(row["fid"]), _id(row["to_lane_group_fid"])) for row in connectors]
    for row in layers.rows("lane_groups_polygons"):
        number = _id(row["fid"])
        incoming, outgoing = [middle for _, middle, to in ends if to == number], [middle for start, middle, _ in ends if start == number]
        yield Roadblock(number, row["polygon"], False, [], incoming, outgoing)
    for row, (start, number, to) in zip(connectors, ends, strict=True):
        yield Roadblock(number, row["polygon"], True, [], [start], [to])


def _path(line: shapely.LineString) -> Array:
    points = shapely.get_coordinates(line)
    step = np.diff(points, axis=0)
    heading = np.arctan2(step[:, 1], step[:, 0])
    return np.column_stack([points, np.append(heading, heading[-1:])])


def _id(value: Any) -> str:
    """An id as a string; "" for none (null, or the NaN of a table that pandas wrote)."""
    if value is None or value != value or value == "":
        return ""
    return str(int(float(value)))


def _wkb(blob: bytes) -> bytes:
    """The geometry within a GeoPackage blob. Raises `ValueError` if it is none."""
    if blob[:2] != b"GP":
        raise ValueError("a geometry is not in GeoPackage form")
    return blob[8 + ENVELOPES[blob[3] >> 1 & 7] :]


def rings(polygon: Any) -> Iterable[list[Array]]:
    """The rings of a polygon, or of each part of one that has several: shell first, then holes."""
    for part in shapely.get_parts(polygon):
        yield [shapely.get_coordinates(ring) for ring in (part.exterior, *part.interiors)]
