"""The route and its centreline, as NAVSIM's PDM planner finds them: corrected, then the shortest path over its lanes.

After `route_utils.py`, `bfs_roadblock.py`, `dijkstra.py` and `abstract_pdm_planner.py` of the devkit (v2.2). Scores depend on the
lanes of the corrected route and on every point of the centreline, so the order in which things are searched is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from irlvla import FileError
from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, WIDTH
from irlvla_navsim.maps import Array, Lane, Map

ASKEW, ASIDE = np.pi / 4, 3.0  # a roadblock with a lane nearer than this to the car's pose may be the one that it is on [rad, m]
BACKWARD, FORWARD, AHEAD = 15, 30, 30  # roadblocks searched
LOOP = 1.0  # connectors that overlap by more close a loop [m^2]


@dataclass(frozen=True)
class Route:
    """Where a scene's car is to go."""

    lanes: tuple[str, ...]  # of the corrected route
    lit_lanes: frozenset[str]  # of the route as recorded: only their red lights count
    centerline: Array  # "L 3": x y heading
    speed_limit: float  # of the starting lane [m/s]; NaN = unknown


def find_route(city: Map, recorded: Sequence[str], pose: Array) -> Route:
    """The route of a car at a pose "3" (rear axle). Raises `FileError` if the map has none of the recorded roadblocks."""
    known = [block for block in dict.fromkeys(recorded) if block in city.roadblocks]
    if len(known) < len(set(recorded)) or not known:
        missing = sorted(set(recorded) - set(known))
        raise FileError(f"the route names roadblocks that the map lacks: {', '.join(missing) or 'none at all'}")
    blocks = corrected(city, known, pose)
    lanes = list(dict.fromkeys(lane for block in blocks for lane in city.roadblocks[block].lanes))
    start = _starting_lane(city, lanes, pose)
    path = _shortest_path(city, blocks, lanes, start)
    centerline = np.concatenate([city.lanes[lane].path for lane in path])
    lit = frozenset(lane for block in known for lane in city.roadblocks[block].lanes)
    return Route(tuple(lanes), lit, centerline, city.lanes[start].speed_limit)


# -- correction --------------------------------------------------------------------------------------------------------


def corrected(city: Map, route: list[str], pose: Array) -> list[str]:
    """The route from where the car is, without gaps and without loops."""
    here, candidates = _current_block(city, route, pose)
    if here not in route:
        path = _search(city, route[0], candidates, BACKWARD, forward=False)
        if path:
            route = path[:-1] + route
        elif path := _search(city, here, route[:3], FORWARD, forward=True):
            route = path + route[route.index(path[-1]) + 1 :]
    return _without_loops(city, _without_gaps(city, route))


def _current_block(city: Map, route: list[str], pose: Array) -> tuple[str, list[str]]:
    """The roadblock that the car is most likely on, and all that it may be on; those of the route come first."""
    nearby = city.blocks_near(pose[0], pose[1], 1.0)
    if not nearby:
        nearby = [block for connector in (False, True) if (block := city.nearest_block(pose[0], pose[1], connector)) is not None]
    on_route: list[tuple[float, str]] = []
    off_route: list[tuple[float, str]] = []
    nearest = []
    for block in nearby:
        errors = [_errors(city.lanes[lane], pose) for lane in block.lanes]
        nearest.append(min((distance for distance, _ in errors), default=np.inf))
        fitting = [(distance, block.id) for distance, angle in errors if angle < ASKEW and distance < ASIDE]
        (on_route if block.id in route else off_route).extend(fitting)
    for fits in (on_route, off_route):
        if fits:
            return min(fits, key=lambda item: item[0])[1], [number for _, number in fits]
    return nearby[int(np.argmin(nearest))].id, [block.id for block in nearby]


def _errors(lane: Lane, pose: Array) -> tuple[float, float]:
    """Distance to the nearest point of a lane's baseline, and the angle to it."""
    distances = np.hypot(*(lane.path[:, :2] - pose[:2]).T)
    row = int(distances.argmin())
    return float(distances[row]), _angle(lane.path[row, 2], pose[2])


def _angle(first: float, second: float) -> float:
    difference = first - second
    return float(abs(np.arctan2(np.sin(difference), np.cos(difference))))


def _search(city: Map, start: str, targets: Sequence[str], depth: int, forward: bool) -> list[str]:
    """Breadth-first from a roadblock to the first of the targets: the path in driving order, or nothing.

    The devkit queues a roadblock once for each way to it. The first of these decides when it is met, the last what it was
    reached from; so both orders are kept, once each.
    """
    first, last = [start], [start]
    parents: list[dict[str, str]] = [{}]
    while first and len(parents) <= depth:
        for found in first:
            if found in targets:
                path = [found]
                for parent in reversed(parents[1:]):
                    path.append(parent[path[-1]])
                return path[::-1] if forward else path
        steps = [(after, block) for block in last for after in _neighbours(city, block, forward)]
        first = list(dict.fromkeys(after for block in first for after in _neighbours(city, block, forward)))
        last = list(dict.fromkeys(after for after, _ in reversed(steps)))[::-1]
        parents.append(dict(steps))
    return []


def _neighbours(city: Map, block: str, forward: bool) -> list[str]:
    found = city.roadblocks[block]
    return [number for number in (found.outgoing if forward else found.incoming) if number in city.roadblocks]


def _without_gaps(city: Map, route: list[str]) -> list[str]:
    """The route with the roadblocks between neighbours that do not join."""
    filled = route[:1]
    for block in route[1:]:
        if filled[-1] not in city.roadblocks[block].incoming:
            filled += _search(city, filled[-1], [block], FORWARD, forward=True)[1:-1]
        filled.append(block)
    return filled


def _without_loops(city: Map, route: list[str]) -> list[str]:
    """The route up to the first connector that lies over an earlier one."""
    crossed: list[shapely.Polygon] = []
    for row, block in enumerate(route):
        if city.roadblocks[block].connector:
            polygon = city.roadblocks[block].polygon
            if any(shapely.intersection(other, polygon).area > LOOP for other in crossed):
                return route[:row]
            crossed.append(polygon)
    return route


# -- centreline --------------------------------------------------------------------------------------------------------


def _starting_lane(city: Map, lanes: list[str], pose: Array) -> str:
    """The lane of the route under the rear axle that points most as the car does; else the one under or nearest to its body."""
    under = [lane for lane in lanes if shapely.intersects_xy(city.lanes[lane].polygon, pose[0], pose[1])]
    if under:
        return min(under, key=lambda lane: _errors(city.lanes[lane], pose)[1])
    forward = np.array([np.cos(pose[2]), np.sin(pose[2])])
    centre = pose[:2] + REAR_AXLE_TO_CENTRE * forward
    for lane in lanes:
        if shapely.contains_xy(city.lanes[lane].polygon, *centre):
            return lane
    along, across = forward * LENGTH / 2, np.array([-forward[1], forward[0]]) * WIDTH / 2
    body = shapely.Polygon([centre + along + across, centre - along + across, centre - along - across, centre + along - across])
    return min(lanes, key=lambda lane: city.lanes[lane].polygon.distance(body))


def _shortest_path(city: Map, blocks: list[str], lanes: list[str], start: str) -> list[str]:
    """Dijkstra over the lanes of the route, to the last of the next 30 roadblocks; if it is out of reach, as many lanes deep as can be."""
    here = city.lanes[start].roadblock
    first = blocks.index(here) if here in blocks else 0
    target = blocks[first : first + AHEAD][-1]
    parent: dict[str, str | None] = {start: None}
    frontier: list[tuple[float, int, str]] = [(1.0, 1, start)]  # cost, depth, lane; in order of discovery
    expanded: list[tuple[float, int, str]] = []
    while frontier:
        cheapest = min(range(len(frontier)), key=lambda row: frontier[row][0])
        cost, depth, lane = node = frontier.pop(cheapest)
        if city.lanes[lane].roadblock == target:
            return _back(parent, lane)
        expanded.append(node)
        for ahead in city.lanes[lane].outgoing:
            if ahead not in lanes or any(ahead == done for _, _, done in expanded):
                continue
            reached = (cost + city.lanes[ahead].length, depth + 1, ahead)
            waiting = [row for row, (_, _, other) in enumerate(frontier) if other == ahead]
            if not waiting:
                frontier.append(reached)
            elif reached[0] < frontier[waiting[0]][0]:
                frontier[waiting[0]] = reached
            else:
                continue
            parent[ahead] = lane
    deepest = max(depth for _, depth, _ in expanded)
    return _back(parent, min((node for node in expanded if node[1] == deepest), key=lambda node: node[0])[2])


def _back(parent: dict[str, str | None], lane: str) -> list[str]:
    path = [lane]
    while (before := parent[path[-1]]) is not None:
        path.append(before)
    return path[::-1]
