"""NAVSIM's metric caches as scenes: what `run_metric_caching.py` of the devkit wrote, read without it.

A cache holds what the score needs and no more: no previous frame (so no EC), no sensors. Its agents stand at 10 Hz already, its
polygons are those around the car, and its PDM-Closed plan is the reference. What reactive traffic follows, the baselines of lanes,
is in the maps alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from irlvla import FileError, Kind, Layer, Scene
from irlvla.records import Agent, Polygon, pack
from irlvla.types import REAR_AXLE_TO_CENTRE
from irlvla_navsim.frames import enum_value, stub_box
from irlvla_navsim.maps import Array, Map, find_map, read_map, rings
from irlvla_navsim.pickles import Stub, read_pickle

STEPS = 41
RED = "red_light_"


def read_cache(path: Path, maps: Path | None = None) -> Scene:
    """The scene of a `metric_cache.pkl`; with nuPlan's maps, its lanes have baselines.

    Raises `FileError` if it is damaged, hostile, or not of that kind, or if its map is missing.
    """
    cache = read_pickle(path)
    try:
        city = None if maps is None else read_map(find_map(maps, str(cache.map_parameters.map_name)))
        return _scene(cache, path.parent.name, city)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} is no metric cache of NAVSIM v2: {type(error).__name__}: {error}") from error


def find_caches(root: Path) -> list[Path]:
    """The caches under a folder, LOG/TYPE/TOKEN/metric_cache.pkl. Raises `FileError` if there are none."""
    files = sorted(root.glob("*/*/*/metric_cache.pkl"))
    if not files:
        raise FileError(f"{root} holds no metric caches (LOG/TYPE/TOKEN/metric_cache.pkl)")
    return files


def _scene(cache: Stub, token: str, city: Map | None) -> Scene:
    ego = _state(cache.ego_state)
    history = cache.past_human_trajectory._arguments[0]
    human = None if cache.human_trajectory is None else np.asarray(cache.human_trajectory.poses, dtype=np.float64)
    boxes = [tracks.tracked_objects.tracked_objects for tracks in [*cache.current_tracked_objects, *cache.future_tracked_objects]]
    return pack(
        token=token,
        time_us=cache.ego_state._time_point.time_us,
        ego=ego,
        history_time_us=np.array([state._time_point.time_us for state in history]),
        history=np.array([_state(state)[:8] for state in history]),
        agents=_agents(boxes[:STEPS]),
        polygons=list(_polygons(cache, city)),
        centerline=np.array([(pose.x, pose.y, pose.heading) for pose in cache.centerline._arguments[0]]),
        human=human,
        human_dt=0.5 if human is None else 4.0 / len(human),
        reference=np.array([_state(state)[:3] for state in cache.trajectory._arguments[0][:STEPS]]),
        steps=STEPS,
    )


def _state(ego: Stub) -> Array:
    """Columns of StateIndex. nuPlan keeps the centre of the car and derives the rear axle."""
    centre, motion = ego._car_footprint._center, ego._dynamic_car_state
    x = centre.x - REAR_AXLE_TO_CENTRE * np.cos(centre.heading)
    y = centre.y - REAR_AXLE_TO_CENTRE * np.sin(centre.heading)
    speed, acceleration = motion._rear_axle_velocity_2d, motion._rear_axle_acceleration_2d
    turning = ego._tire_steering_angle, motion._tire_steering_rate, motion._angular_velocity, motion._angular_acceleration
    return np.array([x, y, centre.heading, speed._x, speed._y, acceleration._x, acceleration._y, *turning], dtype=np.float64)


def _agents(boxes: list[list[Stub]]) -> list[Agent]:
    seen: dict[str, list[tuple[int, Any]]] = {}
    for step, things in enumerate(boxes):
        for thing in things:
            box = stub_box(thing)
            seen.setdefault(box.track, []).append((step, box))
    agents = []
    for name, sightings in seen.items():
        valid, state = np.zeros(STEPS, dtype=bool), np.zeros((STEPS, 5))
        for step, box in sightings:
            valid[step], state[step] = True, box.state
        agents.append(Agent(name, Kind(sightings[0][1].kind), sightings[0][1].size, valid, state))
    return agents


def _polygons(cache: Stub, city: Map | None) -> Iterator[Polygon]:
    tokens, layers, shapes = cache.drivable_area_map._arguments[:3]
    route, red = set(cache.route_lane_ids), _red(cache.observation)
    for token, layer, shape in zip(tokens, layers, shapes, strict=True):
        kind = Layer(enum_value(layer))
        lane = kind in (Layer.LANE, Layer.LANE_CONNECTOR)
        steps = red.pop(token, None) if lane else None
        known = city.lanes.get(str(token)) if city is not None and lane else None
        limit, baseline = (float("nan"), None) if known is None else (known.speed_limit, known.baseline)
        for part in rings(shape):
            yield Polygon(kind, part, lane and token in route, steps, limit, baseline)
    shapes_of_red = {name: shape for maps in cache.observation._occupancy_maps for name, shape in zip(*maps._arguments[:2], strict=True)}
    for token, steps in red.items():  # a red connector further away than the map reaches
        for part in rings(shapes_of_red[f"{RED}{token}"]):
            yield Polygon(Layer.LANE_CONNECTOR, part, True, steps)


def _red(observation: Stub) -> dict[str, Array]:
    """When the connectors of the route are red: id -> "41"."""
    red: dict[str, Array] = {}
    for step, occupied in enumerate(observation._occupancy_maps[:STEPS]):
        for token in occupied._arguments[0]:
            if str(token).startswith(RED):
                red.setdefault(str(token).removeprefix(RED), np.zeros(STEPS, dtype=bool))[step] = True
    return red
