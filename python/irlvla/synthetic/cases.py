"""The scripted hard cases: what each puts on the stage, in the way of the car, around t = 0.

A script returns whether it fits the stage; if not, another stage is set.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from irlvla.synthetic.angles import Array, between
from irlvla.synthetic.layouts import Layout
from irlvla.synthetic.paths import Path
from irlvla.synthetic.roads import placed
from irlvla.synthetic.stage import ALWAYS, TIME, Stage, car_size, straight_on
from irlvla.synthetic.traffic import Change, Mover, Obstacle
from irlvla.synthetic.world import PAST, STEP, STEPS
from irlvla.types import LENGTH, Kind, Layer

CAR = (4.4, 1.8, 1.5)
NOTICE = 0.3  # from when something begins to move until that is seen [s]


def _smooth(share: Array) -> Array:
    """From 0 to 1 with a soft start and end."""
    share = np.clip(share, 0.0, 1.0)
    return share * share * (3.0 - 2.0 * share)


# -- cars that come into the lane --------------------------------------------------------------------------------------


def cut_in(stage: Stage) -> bool:
    """A car comes into the lane, close ahead: from the next lane, from the kerb, or backwards out of a bay."""
    layout = stage.layout
    if layout.zipper and any(layout.is_connector[lane] and layout.ranks[lane] == 0 for lane in stage.path.lanes):
        return False  # nobody comes into a lane that ends
    lane = layout.roads.lanes[stage.path.lane_at(stage.now)[0]]
    sides = [side for side, beside in ((1, lane.left), (-1, lane.right)) if beside is not None]
    if sides:
        return _changes_lane(stage, sides[int(stage.rng.integers(len(sides)))], lane.width)
    if not len(layout.bays):
        return False
    across = abs(math.remainder(layout.bays[0, 2] - stage.pose(stage.now)[2], math.pi)) > 0.5
    return _backs_out(stage) if across else _pulls_out(stage, lane.width)


def _changes_lane(stage: Stage, side: int, width: float) -> bool:
    rng, size = stage.rng, car_size(stage.rng)
    begin, lasts = between(rng, -0.2, 1.5), between(rng, 2.5, 3.5)
    speed = max(stage.speed - between(rng, 0.0, 3.0), 2.0)
    gap = between(rng, 3.0, 7.0) + 0.5 * (LENGTH + size[0]) + 0.4 * stage.speed
    place = stage.first + gap + (stage.speed - speed) * (begin + PAST * STEP)
    script = np.where(begin > TIME, 0.0, np.inf)
    change = Change(place + speed * (begin + PAST * STEP), speed * lasts, side * width, side)
    stage.movers.append(Mover(stage.path, place, size, role="cut-in", speed=speed, script=script, change=change))
    stage.take_path(stage.first - 12.0, place + 25.0 + speed, side)
    stage.take_path(stage.first, place + 35.0 + 2.0 * speed)
    return True


def _pulls_out(stage: Stage, width: float) -> bool:
    """A parked car starts from the kerb."""
    begin = between(stage.rng, -0.5, 1.0)
    place = stage.now + (begin + between(stage.rng, 1.8, 2.8)) * stage.speed + 8.0
    script = np.where(begin > TIME, 0.0, np.where(begin + 3.0 > TIME, 1.3, np.inf))
    change = Change(place + 0.1, 9.0, -(0.5 * width + 1.05), 0)
    stage.movers.append(Mover(stage.path, place, CAR, role="cut-in", speed=0.0, script=script, change=change))
    stage.take_path(stage.first, place + 40.0)
    return True


def _backs_out(stage: Stage) -> bool:
    """A car leaves a bay of a car park, tail first."""
    rng, bays = stage.rng, stage.layout.bays
    ahead = stage.path.poses(stage.now + np.arange(15.0, 28.0))
    dx, dy = bays[:, :1] - ahead[:, 0], bays[:, 1:2] - ahead[:, 1]
    near = np.flatnonzero((dx * dx + dy * dy).min(axis=1) < 36.0)
    if not len(near):
        return False
    bay = bays[near[int(rng.integers(len(near)))]]
    begin, pace, far = between(rng, -0.8, 0.8), between(rng, 0.9, 1.4), between(rng, 3.0, 4.2)
    back = -far * _smooth((TIME - begin) * pace / (1.5 * far))
    stage.let_move(Kind.VEHICLE, straight_on(bay, back), CAR, role="cut-in")
    _block(stage, straight_on(bay, back - 0.5 * CAR[0]), 1.2, begin)
    return True


# -- cars in the lane --------------------------------------------------------------------------------------------------


def hard_brake(stage: Stage) -> bool:
    """The car ahead brakes hard, for no reason that is seen."""
    rng, size = stage.rng, car_size(stage.rng)
    begin, lasts, force = between(rng, -0.3, 1.5), between(rng, 1.0, 4.0), between(rng, 4.5, 6.5)
    script = np.where((begin <= TIME) & (begin + lasts > TIME), -force, np.inf)
    headway = between(rng, 1.1, 1.7)
    place = stage.first + 0.5 * (LENGTH + size[0]) + 2.0 + headway * stage.speed
    stage.movers.append(Mover(stage.path, place, size, role="hard-braking leader", speed=stage.speed, script=script, headway=headway))
    stage.take_path(stage.first, place + 20.0 + 2.0 * stage.speed)
    return True


def stationary_leader(stage: Stage) -> bool:
    """A car stands in the lane."""
    rng, size = stage.rng, car_size(stage.rng)
    place = stage.now + between(rng, 1.8, 3.0) * stage.speed + between(rng, 10.0, 18.0)
    lane, along = stage.path.lane_at(place)
    if stage.layout.roads.lanes[lane].layer != Layer.LANE:
        return False
    stage.put(Kind.VEHICLE, stage.pose(place, between(rng, -0.3, 0.1)), size, role="stationary leader")
    stage.obstacles.append(Obstacle(lane, along, 0.5 * size[0], ALWAYS, stands=True))
    _make_room(stage, place + 15.0)
    return True


def red_light_runner(stage: Stage) -> bool:
    """A car of the crossing road does not stop at its red light."""
    rng, layout = stage.rng, stage.layout
    lanes, signals = layout.roads.lanes, layout.roads.signals
    own = next(lane for lane in stage.path.lanes if layout.is_connector[lane])
    light = lanes[own].signal
    if light is None or signals[light].red.any() or stage.route.junction < stage.now:
        return False
    stopped = [lane for lane, record in enumerate(lanes) if record.signal is not None and signals[record.signal].red[PAST:][:45].all()]
    crossing = [lane for lane in stopped if _crosses(lanes[own].centerline, lanes[lane].centerline)]
    if not crossing:
        return False
    connector = crossing[int(rng.integers(len(crossing)))]
    path = _through(layout, connector)
    begin = float(path.begins[path.lanes.index(connector)])
    arrival = max((stage.route.junction - stage.now) / stage.speed + between(rng, -0.6, 1.2), 0.8)
    speed = between(rng, 9.0, 13.0)
    place = begin - speed * (arrival + PAST * STEP)
    if place < 3.0:
        return False
    role = "red-light runner"
    stage.movers.append(Mover(path, place, car_size(rng), role=role, speed=speed, script=np.zeros(STEPS), lawless=True))
    for lane, first in zip(path.lanes, path.begins.tolist(), strict=True):
        stage.take(lane, place - 10.0 - first, begin + 70.0 - first)
    return True


def _crosses(line: Array, other: Array) -> bool:
    """Whether the other line is straight and starts at about a right angle to the first."""
    turn = abs(float(line[0, 2] - other[0, 2])) % math.pi
    return 0.7 < turn < math.pi - 0.7 and abs(float(other[-1, 2] - other[0, 2])) < 0.3


def _through(layout: Layout, connector: int) -> Path:
    """The path that leads to a connector, over it, and straight on."""
    lanes = [connector]
    while before := layout.roads.lanes[lanes[0]].predecessors:
        lanes.insert(0, before[0])
    while after := layout.roads.lanes[lanes[-1]].successors:
        lanes.append(after[0])
    return Path.of(layout, tuple(lanes))


# -- people and things -------------------------------------------------------------------------------------------------


def jaywalker(stage: Stage) -> bool:
    """Somebody crosses the road where there is no crossing, without looking."""
    rng = stage.rng
    begin, pace = between(rng, -0.6, 1.0), between(rng, 1.2, 2.4)
    stops = max(begin + 0.8, 0.0) * stage.speed + stage.speed * stage.speed / 7.0 + 0.5 * LENGTH  # so far the car goes until it stands
    place = stage.now + stops + 2.0 + between(rng, 0.0, 1.2) * max(stage.speed, 2.5)
    index, _ = stage.path.lane_at(place)
    lane = stage.layout.roads.lanes[index]
    if lane.layer != Layer.LANE:
        return False
    right, left = (0.5 * lane.width + 0.4 + _width_beside(stage.layout, index, side) for side in (-1, 1))
    from_left = rng.random() < 0.35
    x, y, heading = placed(stage.pose(place), 0.0, left if from_left else -right)
    start = np.array([x, y, heading + (-0.5 if from_left else 0.5) * math.pi])
    poses = straight_on(start, np.clip((TIME - begin) * pace, 0.0, left + right))
    stage.let_move(Kind.PEDESTRIAN, poses, role="jaywalker")
    stage.take_path(stage.first, place + 12.0)
    _block(stage, poses, 0.6, begin)
    return True


def _width_beside(layout: Layout, lane: int, side: int) -> float:
    """Of all lanes to the left (1) or right (-1) of a lane, oncoming ones included."""
    lanes, width = layout.roads.lanes, 0.0
    while (beside := lanes[lane].left if side > 0 else lanes[lane].right) is not None:
        width += lanes[beside].width
        lane = beside
    if side > 0 and lane in layout.opposites:
        opposite = layout.opposites[lane]
        width += lanes[opposite].width + _width_beside(layout, opposite, -1)
    return width


def _block(stage: Stage, poses: Array, half: float, begin: float) -> None:
    """Obstacles on every lane that something comes near, from when it is seen to move until it has left."""
    for index, (lane, length) in enumerate(zip(stage.layout.roads.lanes, stage.layout.lengths, strict=True)):
        dx, dy = poses[:, :1] - lane.centerline[:, 0], poses[:, 1:2] - lane.centerline[:, 1]
        square, reach = dx * dx + dy * dy, 0.5 * lane.width + 0.7
        inside = np.flatnonzero(square.min(axis=1) < reach * reach)
        if len(inside):
            when = (begin + NOTICE <= TIME) & (np.arange(STEPS) <= inside[-1])
            nearest = int(square[inside].min(axis=0).argmin())
            stage.obstacles.append(Obstacle(index, nearest / (len(lane.centerline) - 1) * length, half, when))


def blocked_lane(stage: Stage) -> bool:
    """Road works close the lane: a slanting row of cones, a sign, a barrier, more cones."""
    rng = stage.rng
    place = stage.now + between(rng, 2.0, 3.2) * stage.speed + between(rng, 10.0, 20.0)
    (index, along), long = stage.path.lane_at(place), between(rng, 8.0, 18.0)
    lane = stage.layout.roads.lanes[index]
    if lane.layer != Layer.LANE or place + long > stage.path.length - 10.0:
        return False
    reach, role = 0.5 * lane.width - 0.4, "blocked lane"
    closed = reach if lane.left is None and lane.right is not None else -reach  # the side on which the slanting row begins
    for k in range(5):
        stage.put(Kind.TRAFFIC_CONE, stage.pose(place + 1.6 * k, closed * (1.0 - 0.45 * k)), role=role)
    for k in range(int(long / 3.0)):
        stage.put(Kind.TRAFFIC_CONE, stage.pose(place + 8.0 + 3.0 * k, -0.8 * closed), role=role)
    stage.put(Kind.CONSTRUCTION_SIGN, stage.pose(place + 4.0, 0.85 * closed), role=role)
    stage.put(Kind.BARRIER, stage.pose(place + 9.5, 0.3 * closed) + np.array([0.0, 0.0, math.pi / 2]), role=role)
    stage.obstacles.append(Obstacle(index, along + 4.0, 4.0, ALWAYS, stands=True))
    _make_room(stage, place + long + 15.0)
    return True


def _make_room(stage: Stage, last: float) -> None:
    """Mostly, keep the lanes beside the route free up to a place, or the oncoming one where there is no other: one can drive round."""
    first = stage.first
    stage.take_path(first, last)
    if stage.rng.random() < 0.2:
        return
    for side in (1, -1):
        stage.take_path(first - 25.0, last + 25.0, side)
    lane = stage.layout.roads.lanes[stage.path.lane_at(last)[0]]
    stage.may_cross = lane.left is None and lane.right is None
    for other in stage.path.lanes:
        if stage.may_cross and other in stage.layout.opposites:
            stage.take(stage.layout.opposites[other], -np.inf, np.inf)


Script = Callable[[Stage], bool]
CASES: dict[str, Script] = {
    "cut_in": cut_in,
    "hard_brake": hard_brake,
    "stationary_leader": stationary_leader,
    "jaywalker": jaywalker,
    "red_light_runner": red_light_runner,
    "blocked_lane": blocked_lane,
}
#: The cases that can happen in each road family.
SUITABLE: dict[str, tuple[str, ...]] = {
    "straight": ("cut_in", "hard_brake", "stationary_leader", "jaywalker", "blocked_lane"),
    "curve": ("cut_in", "hard_brake", "stationary_leader", "jaywalker", "blocked_lane"),
    "merge": ("cut_in", "hard_brake", "stationary_leader"),
    "t_junction": ("cut_in", "hard_brake", "stationary_leader", "jaywalker"),
    "crossroads": ("hard_brake", "stationary_leader", "jaywalker"),
    "signals": ("cut_in", "hard_brake", "stationary_leader", "jaywalker", "red_light_runner"),
    "roundabout": ("hard_brake", "stationary_leader", "jaywalker"),
    "car_park": ("cut_in", "stationary_leader", "jaywalker"),
    "narrow_street": ("cut_in", "hard_brake", "stationary_leader", "jaywalker", "blocked_lane"),
}
