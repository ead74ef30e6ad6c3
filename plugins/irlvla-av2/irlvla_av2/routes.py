"""Where the car was going: the lanes that it drove, joined, and led on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from irlvla import FileError
from irlvla.types import REAR_AXLE_TO_CENTRE
from irlvla_av2.logs import Drive
from irlvla_av2.roads import Array, Lane, Roads

EVERY = 5  # steps of the drive between the places that are matched
ASKEW = np.pi / 3  # a lane at a larger angle to the car is not the one that it drives on
JUMP, BESIDE = 10.0, 1.0  # cost of going on in a lane that does not follow, and in one beside [m of lateral distance]
AHEAD = 150.0  # metres of centreline


@dataclass(frozen=True)
class Route:
    """The lanes driven, in order, and all lanes that belong to the route: these, the ones beside them, and what follows."""

    driven: tuple[int, ...]
    lanes: frozenset[int]


def follow(roads: Roads, drive: Drive) -> Route:
    """Match the drive to lanes. Raises `FileError` if it is on none."""
    poses = drive.state[::EVERY, :3].copy()
    poses[:, :2] += REAR_AXLE_TO_CENTRE * np.column_stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])])
    driven = _match(roads, poses)
    if not driven:
        raise FileError("the car is on no lane of the map during this log")
    joined = [driven[0]]
    for number in driven[1:]:
        joined += _between(roads, joined[-1], number)
    while (
        len(joined) < 1000
        and (ahead := roads.lanes[joined[-1]].successors)
        and sum(roads.lanes[n].length for n in joined[len(driven) :]) < AHEAD
    ):
        joined.append(min(ahead, key=lambda number: _bend(roads.lanes[joined[-1]], roads.lanes[number])))
    return Route(tuple(joined), frozenset(_with_neighbours(roads, joined)))


def centerline(roads: Roads, route: Route, pose: Array) -> Array:
    """The middle of the lane at a pose "3" and of what follows it on the route: "L 3", up to 150 m. Raises `FileError` off the road."""
    here = _lane_at(roads, route, pose)
    path, length = [here], roads.lanes[here].length
    while length < AHEAD:
        ahead = [number for number in roads.lanes[path[-1]].successors if number in route.lanes and number not in path]
        if not ahead:
            break
        path.append(min(ahead, key=lambda number: (number not in route.driven, _bend(roads.lanes[path[-1]], roads.lanes[number]))))
        length += roads.lanes[path[-1]].length
    return np.concatenate([roads.lanes[number].centerline for number in path])


def _match(roads: Roads, poses: Array) -> list[int]:
    """The cheapest sequence of lanes under the poses (Viterbi): near their middle, and each following the one before."""
    best: dict[int, tuple[float, list[int]]] = {}
    for pose, inside in zip(poses, roads.lanes_at(poses[:, :2]), strict=True):
        here = {number: _offset(roads.lanes[number], pose) for number in inside if _angle(roads.lanes[number], pose) < ASKEW}
        if not here:
            continue
        ahead = {}
        for number, cost in here.items():
            options = [(total + _change(roads, path[-1], number), path) for total, path in best.values()] or [(0.0, [])]
            total, path = min(options, key=lambda option: option[0])
            ahead[number] = total + cost, path if path and path[-1] == number else [*path, number]
        best = ahead
    return min(best.values(), key=lambda option: option[0])[1] if best else []


def _change(roads: Roads, before: int, after: int) -> float:
    lane = roads.lanes[before]
    if before == after or after in lane.successors or any(after in roads.lanes[number].successors for number in lane.successors):
        return 0.0
    return BESIDE if after in lane.neighbours else JUMP


def _between(roads: Roads, before: int, after: int) -> list[int]:
    """What to append to a route that ends with `before` so that it ends with `after`."""
    lane = roads.lanes[before]
    if after not in lane.successors and after not in lane.neighbours:
        for number in lane.successors:
            if after in roads.lanes[number].successors:
                return [number, after]
    return [after]


def _with_neighbours(roads: Roads, numbers: Iterable[int]) -> set[int]:
    found, ahead = set(), list(numbers)
    while ahead:
        number = ahead.pop()
        if number not in found:
            found.add(number)
            ahead += [] if roads.lanes[number].connector else roads.lanes[number].neighbours
    return found


def _lane_at(roads: Roads, route: Route, pose: Array) -> int:
    """The lane of the route that a pose is on, else the nearest one in its direction."""
    candidates = [number for number in route.lanes if _angle(roads.lanes[number], pose) < ASKEW]
    if not candidates:
        raise FileError("no lane of the route leads the way that the car points")
    (inside,) = roads.lanes_at(pose[None, :2])
    return min(candidates, key=lambda number: (number not in inside, number not in route.driven, _offset(roads.lanes[number], pose)))


def _nearest(lane: Lane, pose: Array) -> NDArray[np.float64]:
    return lane.centerline[np.hypot(*(lane.centerline[:, :2] - pose[:2]).T).argmin()]


def _offset(lane: Lane, pose: Array) -> float:
    """Distance from the middle of a lane [m]."""
    return float(np.hypot(*(_nearest(lane, pose)[:2] - pose[:2])))


def _angle(lane: Lane, pose: Array) -> float:
    return _between_headings(_nearest(lane, pose)[2], pose[2])


def _bend(before: Lane, after: Lane) -> float:
    """By how much the heading changes over the second lane [rad]."""
    return _between_headings(before.centerline[-1, 2], after.centerline[-1, 2])


def _between_headings(first: float, second: float) -> float:
    return float(abs(np.angle(np.exp(1j * (first - second)))))
