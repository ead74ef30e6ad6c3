"""From a window of frames to a `Scene`, as NAVSIM's metric caching sees it.

Boxes come at 2 Hz and are interpolated to 10 Hz per track: linearly, headings unwrapped, from its first to its last sighting; a track
that was seen once stands there all the time (`metric_cache_processor.py`). A red light holds for its half second. Steering is
not recorded and 0. What is drivable is what lies in a square of 100 m around the middle of the car, at t = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import shapely

from irlvla import FileError, Layer, Scene
from irlvla.records import Agent, Polygon, pack
from irlvla.types import REAR_AXLE_TO_CENTRE
from irlvla_navsim.frames import Box, Frame
from irlvla_navsim.maps import Array, Map, rings
from irlvla_navsim.routes import Route, find_route

KEY, STEP = 0.5, 0.1  # seconds between frames, and between the steps of a scene
HORIZON, LONG_HORIZON = 8, 10  # frames: 4 s; 5 s, which PDMS v1 looks ahead
RADIUS = 100.0  # [m]


@dataclass(frozen=True)
class Window:
    """Frames around a present one, and what is known beyond the last of them."""

    frames: Sequence[Frame]
    present: int  # index of the present frame
    later_boxes: Sequence[tuple[Box, ...]] = ()
    later_lights: Sequence[dict[str, bool]] = ()
    human: bool = True  # whether the frames ahead are a person's drive

    @property
    def now(self) -> Frame:
        return self.frames[self.present]

    def boxes(self) -> list[tuple[Box, ...]]:
        """Annotated objects from t = 0 on. Raises `FileError` where they are missing within 4 s."""
        recorded = [frame.boxes for frame in self.frames[self.present :]]
        known = [*recorded, *self.later_boxes][: LONG_HORIZON + 1]
        if len(known) <= HORIZON or any(boxes is None for boxes in known):
            raise FileError(f"scene {self.now.token} has no annotations for the 4 s ahead (of {HORIZON + 1} frames {len(known)} are there)")
        return [boxes for boxes in known if boxes is not None]

    def lights(self) -> list[dict[str, bool]]:
        """Traffic lights from t = 0 on; none where they are not known."""
        known = [*(frame.lights for frame in self.frames[self.present :]), *self.later_lights]
        return [known[row] if row < len(known) else {} for row in range(HORIZON + 1)]


def make_scene(window: Window, city: Map) -> Scene:
    """Raises `FileError` if annotations are missing or the route is not in the map."""
    now, history = window.now, window.frames[window.present - 3 : window.present + 1]
    if window.present < 3:
        raise FileError(f"scene {now.token} has {window.present} frames before it; 3 are needed")
    boxes = window.boxes()
    route = find_route(city, now.route, now.pose)
    ahead = window.frames[window.present + 1 : window.present + 1 + HORIZON]
    return pack(
        token=now.token,
        time_us=now.time_us,
        ego=_state(now),
        history_time_us=np.array([frame.time_us for frame in history]),
        history=np.array([_state(frame)[:8] for frame in history]),
        agents=_agents(boxes),
        polygons=list(_polygons(city, route, now.pose, window.lights())),
        centerline=route.centerline,
        human=_relative(np.array([frame.pose for frame in ahead]), now.pose) if window.human and len(ahead) == HORIZON else None,
        previous_time_us=window.frames[window.present - 1].time_us,
        previous_ego=_state(window.frames[window.present - 1]),
        speed_limit=route.speed_limit,
        steps=_steps(boxes),
    )


def _state(frame: Frame) -> Array:
    """Columns of StateIndex; what is not recorded is 0, as in the devkit."""
    return np.concatenate([frame.pose, frame.motion, np.zeros(4)])


def _relative(poses: Array, origin: Array) -> Array:
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    x, y = (poses[:, :2] - origin[:2]).T
    angle = poses[:, 2] - origin[2]
    return np.column_stack([cos * x + sin * y, cos * y - sin * x, np.arctan2(np.sin(angle), np.cos(angle))])


# -- agents ------------------------------------------------------------------------------------------------------------


def _steps(boxes: Sequence[tuple[Box, ...]]) -> int:
    return 51 if len(boxes) > LONG_HORIZON else 41


def _agents(boxes: Sequence[tuple[Box, ...]]) -> list[Agent]:
    """Tracks in order of appearance. The first 4 s are what they are without the fifth."""
    short = _tracks(boxes[: HORIZON + 1], 41)
    if _steps(boxes) == 41:
        return list(short.values())
    agents = []
    for name, long in _tracks(boxes, 51).items():
        first = short.get(name, Agent(name, long.kind, long.size, np.zeros(41, dtype=bool), np.zeros((41, 5))))
        valid, state = np.append(first.valid, long.valid[41:]), np.concatenate([first.state, long.state[41:]])
        agents.append(Agent(name, first.kind, first.size, valid, state))
    return agents


def _tracks(boxes: Sequence[tuple[Box, ...]], steps: int) -> dict[str, Agent]:
    seen: dict[str, list[tuple[float, Box]]] = {}
    for row, frame in enumerate(boxes):
        for box in sorted(frame, key=lambda box: box.kind):  # nuPlan lists objects by kind
            seen.setdefault(box.track, []).append((row * KEY, box))
    times = np.arange(steps, dtype=np.float64) * STEP
    tracks = {}
    for name, sightings in seen.items():
        first = sightings[0][1]
        when, states = np.array([time for time, _ in sightings]), np.array([box.state for _, box in sightings])
        if when[0] == when[-1]:
            valid, state = np.ones(steps, dtype=bool), np.tile(first.state, (steps, 1))
        else:
            valid, state = (when[0] <= times) & (times <= when[-1]), _interpolated(when, states, times)
        tracks[name] = Agent(name, first.kind, first.size, valid, np.where(valid[:, None], state, 0.0))
    return tracks


def _interpolated(when: Array, states: Array, times: Array) -> Array:
    """As scipy's interp1d, which the devkit uses: slope times distance from the sighting before."""
    states = np.column_stack([states[:, :2], np.unwrap(states[:, 2]), states[:, 3:]])
    after = np.clip(np.searchsorted(when, times), 1, len(when) - 1)
    slope = (states[after] - states[after - 1]) / (when[after] - when[after - 1])[:, None]
    found = slope * (times - when[after - 1])[:, None] + states[after - 1]
    found[:, 2] = np.arctan2(np.sin(found[:, 2]), np.cos(found[:, 2]))
    return found


# -- map ---------------------------------------------------------------------------------------------------------------


def _polygons(city: Map, route: Route, pose: Array, lights: Sequence[dict[str, bool]]) -> Iterator[Polygon]:
    """Roadblocks, their lanes and connectors, intersections and car parks around the car; red connectors of the route wherever they are."""
    x, y = pose[:2] + REAR_AXLE_TO_CENTRE * np.array([np.cos(pose[2]), np.sin(pose[2])])
    nearby, on_route = city.blocks_near(x, y, RADIUS), set(route.lanes)
    red = _red(lights, route.lit_lanes)
    shown: set[str] = set()
    for block in nearby:
        if not block.connector:
            yield from _parts(Layer.ROADBLOCK, block.polygon)
    for block in nearby:
        for number in block.lanes:
            shown.add(number)
            layer, lane = Layer.LANE_CONNECTOR if block.connector else Layer.LANE, city.lanes[number]
            for part in rings(lane.polygon):
                yield Polygon(layer, part, number in on_route, red.get(number), lane.speed_limit, lane.baseline)
    patch = shapely.box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
    for layer, shapes in ((Layer.INTERSECTION, city.intersections), (Layer.CARPARK, city.carparks)):
        for shape in shapes:
            if shape.intersects(patch):
                yield from _parts(layer, shape)


def _parts(layer: Layer, shape: shapely.Geometry, on_route: bool = False, red: Array | None = None) -> Iterator[Polygon]:
    for part in rings(shape):
        yield Polygon(layer, part, on_route, red)


def _red(lights: Sequence[dict[str, bool]], lanes: frozenset[str]) -> dict[str, Array]:
    """When the lights of the route are red: connector -> "41"."""
    steps = (np.arange(41) // 5).tolist()
    names = {name for frame in lights for name, red in frame.items() if red} & lanes
    return {name: np.array([lights[row].get(name, False) for row in steps]) for name in sorted(names)}
