"""Worlds as what is scored (`Scene`) and what is seen (`Observation`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from irlvla.pdm import pdm_closed
from irlvla.records import Agent, Polygon, pack
from irlvla.synthetic.angles import Array, cosine_sine_of, wrap
from irlvla.synthetic.cameras import Rig, render
from irlvla.synthetic.scenarios import make_worlds
from irlvla.synthetic.world import PAST, STEP, STEPS, Lane, World
from irlvla.types import STEPS as SCORED
from irlvla.types import Layer, Observation, Scene, StateIndex

TIME = 1_700_000_000_000_000  # of t = 0 [us]
EVERY = 5  # steps between frames
FRAMES = PAST + EVERY * np.arange(-3, 1)  # of the history
POSES = PAST + EVERY * np.arange(1, 9)  # of the human's drive
LOGGED = StateIndex.STEERING + 1  # columns of a state in the history


def synthetic_scenes(count: int, seed: int = 0, families: Sequence[str] | None = None, cases: Sequence[str] | None = None) -> Scene:
    """Scenes of the embedded world from consecutive seeds, ready to score.

    Args:
        count: how many.
        seed: of the first.
        families: road families to draw from (`irlvla.synthetic.FAMILIES`); None = all.
        cases: hard cases to draw from (`CASES`; "" = ordinary traffic); None = ordinary traffic, and some of all.

    Raises:
        InputError: there is no such family or case, or none of the cases can happen in any of the families.
    """
    return to_scenes(make_worlds(count, seed, families, cases))


def to_scenes(worlds: Iterable[World], *, reference: bool = True) -> Scene:
    """Scenes of many worlds. Without `reference` they carry no PDM-Closed plan: it is computed when they are first scored."""
    scenes = Scene.cat([to_scene(world, reference=False) for world in worlds])
    return dataclasses.replace(scenes, reference=pdm_closed(scenes)) if reference else scenes


def to_scene(world: World, *, reference: bool = True) -> Scene:
    """A batch of one. History and route are as NAVSIM has them; the steering angle is known, which it is not there."""
    now = world.ego[PAST]
    scene = pack(
        token=world.token,
        time_us=TIME,
        ego=now,
        history_time_us=TIME + np.rint((FRAMES - PAST) * (STEP * 1e6)).astype(np.int64),
        history=world.ego[FRAMES, :LOGGED],
        agents=[Agent(actor.name, actor.kind, actor.size[:2], actor.valid[PAST:], actor.state[PAST:]) for actor in world.actors],
        polygons=list(_polygons(world)),
        centerline=route_line(world),
        human=in_frame(world.ego[POSES, :3], now),
        human_dt=EVERY * STEP,
        previous_time_us=TIME - round(EVERY * STEP * 1e6),
        previous_ego=world.ego[PAST - EVERY],
        speed_limit=lane_now(world).speed_limit,
        steps=STEPS - PAST,
    )
    return dataclasses.replace(scene, reference=pdm_closed(scene)) if reference else scene


def _polygons(world: World) -> Iterator[Polygon]:
    """Lanes with the lights of the route, then what is drivable. Roadblocks of connectors are not by themselves: the intersection is."""
    roads = world.roads
    route = {roads.lanes[lane].roadblock for lane in world.route}
    for lane in roads.lanes:
        routed = lane.roadblock in route
        red = roads.signals[lane.signal].red[PAST : PAST + SCORED] if routed and lane.signal is not None else None
        yield Polygon(lane.layer, [lane.polygon], routed, red, lane.speed_limit, lane.centerline[:, :2])
    for block in sorted({lane.roadblock for lane in roads.lanes if lane.layer == Layer.LANE}):
        yield Polygon(Layer.ROADBLOCK, [roads.roadblocks[block]])
    for layer, rings in ((Layer.INTERSECTION, roads.intersections), (Layer.CARPARK, roads.carparks)):
        yield from (Polygon(layer, [ring]) for ring in rings)


def to_observation(world: World, rig: Rig | None = None, size: tuple[int, int] = (256, 704)) -> Observation:
    """What a policy may see, a batch of one in float32: the car's own history, the command, and the images of a rig, if there is one.

    `size` is the height and width of the images.
    """
    history = world.ego[FRAMES, :LOGGED].copy()
    history[:, :3] = in_frame(history[:, :3], world.ego[PAST])
    observation = Observation(token=(world.token,), ego=_row(history).float(), command=torch.tensor([world.command]))
    if rig is None:
        return observation
    seen = rig.resized(*size)
    return dataclasses.replace(
        observation,
        images=render(world, rig, size)[None],
        intrinsics=_row(seen.intrinsics).float(),
        camera_to_ego=_row(seen.camera_to_ego).float(),
    )


def route_line(world: World) -> Float[np.ndarray, "L 3"]:
    """The centreline of the route, from its first lane to its end."""
    lines = [world.roads.lanes[lane].centerline for lane in world.route]
    line = np.concatenate([lines[0], *(other[1:] for other in lines[1:])])
    line[:, 2] = wrap(line[:, 2])
    return line


def lane_now(world: World) -> Lane:
    """The lane of the route that the car is in at t = 0."""
    x, y = world.ego[PAST, :2]

    def distance(lane: Lane) -> float:
        dx, dy = lane.centerline[:, 0] - x, lane.centerline[:, 1] - y
        return float((dx * dx + dy * dy).min())

    return min((world.roads.lanes[lane] for lane in world.route), key=distance)


def in_frame(poses: Float[np.ndarray, "n 3"], origin: Array) -> Float[np.ndarray, "n 3"]:
    """World poses as seen from a pose (the first three columns of `origin`)."""
    cosine, sine = cosine_sine_of(float(origin[2]))
    dx, dy = poses[:, 0] - origin[0], poses[:, 1] - origin[1]
    return np.stack([cosine * dx + sine * dy, cosine * dy - sine * dx, wrap(poses[:, 2] - origin[2])], axis=1)


def _row(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array))[None]
