"""Everybody who is no part of a scripted case: vehicles on every lane, parked cars, people, bicycles, red lights, street furniture."""

from __future__ import annotations

import math

import numpy as np

from irlvla.synthetic.angles import Array, between, cosine_sine
from irlvla.synthetic.layouts import Crossing
from irlvla.synthetic.roads import Line, placed
from irlvla.synthetic.stage import SIZES, Size, Stage, car_size, straight_on
from irlvla.synthetic.traffic import SOON, Mover, Obstacle
from irlvla.synthetic.world import STEP, STEPS
from irlvla.types import Kind, Layer

REACH, NEAR = 130.0, 60.0  # vehicles, people and things further from the car do not matter [m]
MOST = 20  # vehicles that drive
TO_END = 20.0  # of its path, that a vehicle has before it at least [m]
SPACINGS = (12.0, 30.0, 70.0)  # of dense, usual and light traffic [m]
STOP_BEHIND_LINE = 0.8  # where a red light stands in a connector, so that cars stop before it [m]
FURNITURE = (Kind.GENERIC, Kind.CONSTRUCTION_SIGN, Kind.BARRIER, Kind.TRAFFIC_CONE)


def populate(stage: Stage) -> None:
    """Fill the stage around what a scripted case has put on it."""
    _light(stage)
    _park(stage)
    _drive(stage)
    _furnish(stage)
    if stage.layout.town:
        _walk(stage)
        for crossing in stage.layout.crossings:
            if stage.rng.random() < 0.4:
                _cross(stage, crossing)


def _light(stage: Stage) -> None:
    """Red lights, as obstacles."""
    for index, lane in enumerate(stage.layout.roads.lanes):
        if lane.signal is not None:
            signal = stage.layout.roads.signals[lane.signal]
            stage.obstacles.append(Obstacle(index, STOP_BEHIND_LINE, 0.0, signal.red | signal.amber, light=True, patient=True))


# -- vehicles ----------------------------------------------------------------------------------------------------------


def _drive(stage: Stage) -> None:
    """Vehicles on the lanes within reach, the nearest ones if there are too many."""
    rng, layout, here = stage.rng, stage.layout, stage.pose(stage.now)
    spacing, found = SPACINGS[int(rng.integers(3))], []
    for index, (lane, length) in enumerate(zip(layout.roads.lanes, layout.lengths, strict=True)):
        if lane.layer != Layer.LANE:
            continue
        apart = spacing + 0.5 * lane.speed_limit
        along = between(rng, 0.0, apart)
        while along < length:
            size = car_size(rng, trucks=not layout.town)
            x, y, _ = lane.centerline[int(along / length * (len(lane.centerline) - 1))]
            far = (x - here[0]) * (x - here[0]) + (y - here[1]) * (y - here[1])
            before_line = along + 0.5 * size[0] < length - 1.0
            if far < REACH * REACH and before_line and stage.is_free(index, along, 0.5 * size[0] + 2.0):
                found.append((far, index, along, size))
            along += size[0] + 4.0 + apart * between(rng, 0.3, 1.5)
    movers = [_vehicle(stage, index, along, size) for _, index, along, size in sorted(found)[:MOST]]
    stage.movers += [mover for mover in movers if mover.place + TO_END < mover.path.length]


def _vehicle(stage: Stage, first: int, along: float, size: Size) -> Mover:
    """Somebody who starts on a lane and turns where he likes; by the kerb it may be a bicycle."""
    rng, layout = stage.rng, stage.layout
    lane, lanes, length = layout.roads.lanes[first], [first], layout.lengths[first]
    enough = along + 1.2 * lane.speed_limit * STEPS * STEP
    while length < enough and (following := layout.roads.lanes[lanes[-1]].successors):
        lanes.append(following[int(rng.integers(len(following)))])
        length += layout.lengths[lanes[-1]]
    path, headway = stage.path_through(tuple(lanes)), between(rng, 1.0, 1.7)
    if layout.town and lane.right is None and rng.random() < 0.06:
        factor, left = between(rng, 4.0, 6.0) / lane.speed_limit, 0.6 - 0.5 * lane.width
        return Mover(path, along, SIZES[Kind.BICYCLE], Kind.BICYCLE, factor=factor, headway=headway, left=left)
    return Mover(path, along, size, factor=between(rng, 0.85, 1.05), headway=headway, left=between(rng, -0.15, 0.15))


def _park(stage: Stage) -> None:
    """Cars in some of the bays, none quite straight."""
    rng, here, starts = stage.rng, stage.pose(stage.now), stage.starts()
    filled = between(rng, 0.3, 0.9)
    for bay in stage.layout.bays:
        near = max(abs(bay[0] - here[0]), abs(bay[1] - here[1])) < NEAR + 10.0
        if rng.random() < filled and near and _are_apart(bay[None], starts, 3.0):
            x, y, heading = placed(bay, between(rng, -0.15, 0.1), between(rng, -0.1, 0.1))
            length, width, height = car_size(rng)
            pose = np.array([x, y, heading + between(rng, -0.03, 0.03)])
            stage.put(Kind.VEHICLE, pose, (min(length, 4.8), min(width, 1.9), min(height, 1.9)))


# -- people and things -------------------------------------------------------------------------------------------------


def _walk(stage: Stage) -> None:
    """People and bicycles on the pavement."""
    rng, here, lines = stage.rng, stage.pose(stage.now), stage.layout.pavements
    for _ in range(int(rng.integers(0, 7)) if lines else 0):
        line = lines[int(rng.integers(len(lines)))]
        near = np.flatnonzero((np.abs(line[:, 0] - here[0]) < NEAR) & (np.abs(line[:, 1] - here[1]) < NEAR))
        rides, stands = rng.random() < 0.2, rng.random() < 0.15
        pace = between(rng, 3.5, 5.5) if rides else 0.0 if stands else between(rng, 0.8, 1.7)
        room = len(near) - pace * STEPS * STEP - 4.0
        if room > 0.0:
            places = near[0] + 1.0 + between(rng, 0.0, room) + pace * STEP * np.arange(STEPS)
            poses = _along(line, places, between(rng, -0.5, 0.5), back=rng.random() < 0.5)
            if all(_are_apart(poses, thing.state, 2.0) for thing in stage.things):
                stage.let_move(Kind.BICYCLE if rides else Kind.PEDESTRIAN, poses)


def _along(line: Line, places: Array, left: float, *, back: bool) -> Array:
    """Poses at places of a line [points], some metres to its left; `back`: from the last to the first."""
    places = places[::-1] if back else places
    low = places.astype(np.int64)
    poses = line[low] + (places - low)[:, None] * (line[low + 1] - line[low])
    cosine, sine = cosine_sine(poses[:, 2])
    return np.stack([poses[:, 0] - left * sine, poses[:, 1] + left * cosine, poses[:, 2] + (math.pi if back else 0.0)], axis=1)


def _are_apart(one: Array, two: Array, distance: float) -> bool:
    """Whether points of one and the other, taken in pairs, are always this far from each other."""
    dx, dy = one[:, 0] - two[:, 0], one[:, 1] - two[:, 1]
    return bool((dx * dx + dy * dy).min() > distance * distance)


def _cross(stage: Stage, crossing: Crossing) -> None:
    """Somebody crosses, when the lights allow it; vehicles stop for him."""
    rng, step = stage.rng, np.arange(STEPS)
    pace, begin, back = between(rng, 1.1, 1.7), int(rng.integers(-30, 55)), rng.random() < 0.5
    walked = np.clip((step - begin) * (STEP * pace), 0.0, crossing.length)
    if ((walked > 0.0) & (walked < crossing.length) & ~crossing.walk).any():
        return
    stage.let_move(Kind.PEDESTRIAN, straight_on(crossing.start, crossing.length - walked if back else walked, math.pi if back else 0.0))
    for lane, along, low, high in crossing.lanes:
        low, high = (crossing.length - high, crossing.length - low) if back else (low, high)
        comes, gone = begin + (low - 1.0) / (pace * STEP), begin + (high + 0.8) / (pace * STEP)
        stage.obstacles.append(Obstacle(lane, along, 0.8, (step >= comes - SOON / STEP) & (step <= gone), patient=True))


def _furnish(stage: Stage) -> None:
    """Bins, signs, barriers and cones beside the road."""
    rng, here, lines = stage.rng, stage.pose(stage.now), stage.layout.pavements
    for _ in range(int(rng.integers(0, 4)) if lines else 0):
        line = lines[int(rng.integers(len(lines)))]
        pose = line[int(rng.integers(len(line)))]
        if max(abs(pose[0] - here[0]), abs(pose[1] - here[1])) < NEAR and _are_apart(pose[None], stage.starts(), 3.0):
            stage.put(FURNITURE[int(rng.integers(len(FURNITURE)))], pose)
