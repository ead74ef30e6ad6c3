"""Worlds as what is scored (`Scene`) and what is seen (`Observation`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from irlvla.pdm import pdm_closed
from irlvla.synthetic.angles import Array, cosine_sine_of, wrap
from irlvla.synthetic.cameras import Rig, render
from irlvla.synthetic.scenarios import make_worlds
from irlvla.synthetic.world import PAST, STEP, Lane, World
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
    agents, centerline = world.actors, route_line(world)
    scene = Scene(
        token=(world.token,),
        time_us=torch.tensor([TIME]),
        ego=_row(now),
        history_time_us=torch.from_numpy(TIME + np.rint((FRAMES - PAST) * (STEP * 1e6)).astype(np.int64))[None],
        history=_row(world.ego[FRAMES, :LOGGED]),
        human=_row(in_frame(world.ego[POSES, :3], now)),
        human_dt=EVERY * STEP,
        human_values=None,
        reference=torch.full((1, SCORED, 3), torch.nan, dtype=torch.float64),
        previous_time_us=torch.tensor([TIME - round(EVERY * STEP * 1e6)]),
        previous_ego=_row(world.ego[PAST - EVERY]),
        speed_limit=torch.tensor([lane_now(world).speed_limit], dtype=torch.float64),
        agent_offsets=torch.tensor([0, len(agents)]),
        agent_token=tuple(actor.name for actor in agents),
        agent_kind=torch.tensor([int(actor.kind) for actor in agents], dtype=torch.int64),
        agent_size=torch.tensor([actor.size[:2] for actor in agents], dtype=torch.float64).reshape(len(agents), 2),
        agent_valid=torch.from_numpy(np.array([actor.valid[PAST:] for actor in agents]).reshape(len(agents), -1)),
        agent_state=torch.from_numpy(np.array([actor.state[PAST:] for actor in agents])),
        centerline_offsets=torch.tensor([0, len(centerline)]),
        centerline=torch.from_numpy(centerline),
        **_map(world),
    )
    return dataclasses.replace(scene, reference=pdm_closed(scene)) if reference else scene


def _map(world: World) -> dict[str, Tensor]:
    """Polygons and lights of a scene. Roadblocks of connectors are not drivable by themselves: the intersection is."""
    roads = world.roads
    blocks = sorted({lane.roadblock for lane in roads.lanes if lane.layer == Layer.LANE})
    layers = {
        Layer.ROADBLOCK: [roads.roadblocks[block] for block in blocks], Layer.INTERSECTION: roads.intersections,
        Layer.CARPARK: roads.carparks,
    }  # fmt: skip
    rings = [*(lane.polygon for lane in roads.lanes), *(ring for group in layers.values() for ring in group)]
    kinds = [*(lane.layer for lane in roads.lanes), *(layer for layer, group in layers.items() for _ in group)]
    route = {roads.lanes[lane].roadblock for lane in world.route}
    routed = [lane.roadblock in route for lane in roads.lanes]
    lights = [(row, roads.signals[lane.signal]) for row, lane in enumerate(roads.lanes) if routed[row] and lane.signal is not None]
    red = np.array([signal.red[PAST : PAST + SCORED] for _, signal in lights], dtype=bool).reshape(len(lights), SCORED)
    return {
        "polygon_offsets": torch.tensor([0, len(rings)]),
        "polygon_layer": torch.tensor([int(kind) for kind in kinds]),
        "polygon_on_route": torch.tensor(routed + [False] * (len(rings) - len(routed))),
        "ring_offsets": torch.arange(len(rings) + 1),
        "point_offsets": torch.tensor([0, *map(len, rings)]).cumsum(0),
        "points": torch.from_numpy(np.concatenate(rings)),
        "light_offsets": torch.tensor([0, len(lights)]),
        "light_polygon": torch.tensor([row for row, _ in lights], dtype=torch.int64),
        "light_red": torch.from_numpy(red),
    }


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
