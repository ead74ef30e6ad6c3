"""Scenes for the benches: dense traffic on a curved road of many lanes with a junction. Deterministic, nothing to download.

Each scene has 60 polygons with about 1,900 edges, a centreline of 161 points and a chosen number of agents near the ego.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from irlvla.types import STEP, STEPS, Kind, Layer, Scene

STRETCHES, LANES, LANE_WIDTH, LENGTH = 6, 4, 3.5, 160  # stretches of road one after the other; lanes each way; metres
STEPS_V1 = 51  # agents are known for 5 s, as in recorded scenes
SIZES = {Kind.VEHICLE: (4.8, 2.0), Kind.PEDESTRIAN: (0.7, 0.7), Kind.BICYCLE: (1.8, 0.7), Kind.TRAFFIC_CONE: (0.4, 0.4)}
SHARES = (0.7, 0.12, 0.06, 0.12)


def build(scenes: int, agents: int, seed: int = 0) -> Scene:
    """A batch of `scenes` scenes with `agents` agents each."""
    return Scene.cat([_scene(np.random.default_rng([seed, agents, i]), agents, f"bench-{agents}-{seed}-{i}") for i in range(scenes)])


def plans(scene: Scene, candidates: int, seed: int = 0) -> torch.Tensor:
    """Smooth plans, scenes x candidates x 8 x 3 float32 in the ego frame: accelerations and curvatures that drivers use, some harsh."""
    rng = np.random.default_rng([seed, candidates])
    speed = scene.ego[:, None, 3].numpy()
    shape = (len(scene), candidates)
    fine = np.arange(1, 81) * 0.05
    acceleration = rng.normal(0.0, 1.2, shape)
    curvature = rng.normal(0.0, 0.004, shape)[..., None] + rng.normal(0.0, 0.004, shape)[..., None] * np.sin(fine * 1.5)
    speeds = np.maximum(speed[..., None] + acceleration[..., None] * fine, 0.0)
    heading = np.cumsum(speeds * curvature * 0.05, -1)
    path = np.stack([np.cumsum(speeds * np.cos(heading) * 0.05, -1), np.cumsum(speeds * np.sin(heading) * 0.05, -1), heading], -1)
    return torch.from_numpy(path[..., 9::10, :].astype(np.float32))


def beside(path: np.ndarray, left: np.ndarray | float) -> np.ndarray:
    """The path moved to its left by some metres."""
    x, y, heading = path[..., 0], path[..., 1], path[..., 2]
    return np.stack([x - left * np.sin(heading), y + left * np.cos(heading), heading], -1)


def _scene(rng: np.random.Generator, agents: int, token: str) -> Scene:
    bend = rng.uniform(-0.004, 0.004)
    along = np.arange(-40.0, LENGTH - 39.0)
    heading = rng.uniform(-math.pi, math.pi) + bend * along
    origin = rng.uniform(-500, 500, 2)
    # the middle of the road: arc length -40 ... 120 m, the ego at 0
    steps = np.stack([np.cos(heading), np.sin(heading)], -1)
    road = np.concatenate([origin + np.cumsum(steps, 0), heading[:, None]], -1)

    def at(metres: np.ndarray | float) -> np.ndarray:
        return np.stack([np.interp(metres, along, road[:, column]) for column in range(3)], -1)

    rings, layers, routed, lights = _map(road)
    ego, speed = beside(at(0.0), -1.5 * LANE_WIDTH), rng.uniform(5.0, 14.0)
    speeds = np.array([speed, 0.0, rng.normal(0.0, 0.3), 0.0])
    history_seconds = np.array([-1.5, -1.0, -0.5, 0.0])
    history = np.concatenate([beside(at(speed * history_seconds), -1.5 * LANE_WIDTH), np.tile(speeds, (4, 1)), np.zeros((4, 1))], -1)
    seconds = np.arange(STEPS) * STEP
    time = 1_600_000_000_000_000
    previous = np.concatenate([history[2, :7], np.zeros(4)])
    kinds, sizes, states, valid = _traffic(rng, agents, at, speed)
    human = _to_ego(beside(at(speed * np.arange(1, 9) * 0.5), -1.5 * LANE_WIDTH), ego)
    return Scene(
        token=(token,),
        time_us=torch.tensor([time]),
        ego=_row(np.concatenate([ego, speeds, np.zeros(4)])),
        history_time_us=torch.from_numpy(time + (history_seconds * 1e6).astype(np.int64))[None],
        history=_row(history),
        human=_row(human),
        human_dt=0.5,
        human_values=None,
        reference=_row(beside(at(0.9 * speed * seconds), -1.5 * LANE_WIDTH)),
        previous_time_us=torch.tensor([time - 500_000]),
        previous_ego=_row(previous),
        speed_limit=torch.tensor([15.0], dtype=torch.float64),
        agent_offsets=torch.tensor([0, agents]),
        agent_token=tuple(f"{token}-{i}" for i in range(agents)),
        agent_kind=torch.from_numpy(kinds),
        agent_size=torch.from_numpy(sizes),
        agent_valid=torch.from_numpy(valid),
        agent_state=torch.from_numpy(states),
        polygon_offsets=torch.tensor([0, len(rings)]),
        polygon_layer=torch.tensor(layers),
        polygon_on_route=torch.tensor(routed),
        ring_offsets=torch.arange(len(rings) + 1),
        point_offsets=torch.tensor([0, *(len(ring) for ring in rings)]).cumsum(0),
        points=torch.from_numpy(np.concatenate(rings)),
        light_offsets=torch.tensor([0, len(lights)]),
        light_polygon=torch.tensor(lights),
        light_red=torch.from_numpy(np.repeat(rng.random((len(lights), 9)) < 0.3, 5, 1)[:, :STEPS].copy()),
        centerline_offsets=torch.tensor([0, len(road)]),
        centerline=torch.from_numpy(beside(road, -1.5 * LANE_WIDTH)),
    )


def _map(road: np.ndarray) -> tuple[list[np.ndarray], list[int], list[bool], list[int]]:
    """Rings, layers, route flags, and the polygons that have traffic lights. Lanes on the right of the road's middle are the route."""
    rings: list[np.ndarray] = []
    layers: list[int] = []
    routed: list[bool] = []
    lights: list[int] = []
    for stretch in range(STRETCHES):
        span = np.linspace(stretch * LENGTH / STRETCHES, (stretch + 1) * LENGTH / STRETCHES, 16)
        middle = np.stack([np.interp(span, np.arange(len(road)), road[:, column]) for column in range(3)], -1)
        junction = stretch == 3
        for right in (True, False):
            edges = np.arange(LANES + 1) * LANE_WIDTH * (-1 if right else 1)
            rings.append(_strip(middle, edges[0], edges[-1]))
            layers.append(Layer.INTERSECTION if junction else Layer.ROADBLOCK)
            routed.append(False)
            for lane in range(LANES):
                if junction and right:
                    lights.append(len(rings))
                rings.append(_strip(middle, edges[lane], edges[lane + 1]))
                layers.append(Layer.LANE_CONNECTOR if junction else Layer.LANE)
                routed.append(right)
    return rings, layers, routed, lights


def _strip(middle: np.ndarray, a: float, b: float) -> np.ndarray:
    return np.concatenate([beside(middle, a)[:, :2], beside(middle, b)[::-1, :2]])


def _traffic(rng: np.random.Generator, agents: int, at, ego_speed: float) -> tuple[np.ndarray, ...]:
    kinds = rng.choice(list(SIZES), agents, p=SHARES).astype(np.int64)
    road_user = (kinds == Kind.VEHICLE) | (kinds == Kind.BICYCLE)
    moving = road_user & (rng.random(agents) < 0.8)
    with_lane = rng.random(agents) < 0.7  # the others come towards the ego
    # who stands or walks keeps to the outermost lane, so that some candidates stay clear of everybody
    lane = np.where(moving, rng.integers(0, LANES, agents), LANES - 1)
    left = np.where(with_lane, -1, 1) * (lane + 0.5) * LANE_WIDTH + rng.normal(0.0, 0.3, agents)
    ahead = rng.uniform(12, 70, agents) * np.where(rng.random(agents) < 0.7, 1.0, -0.5)
    start = np.where(with_lane, ahead, rng.uniform(0, 100, agents))
    speed = np.where(moving, np.abs(rng.normal(ego_speed, 1.0, agents)), np.where(kinds == Kind.PEDESTRIAN, 1.0, 0.0))
    seconds = np.arange(STEPS_V1) * STEP
    direction = np.where(with_lane, 1.0, -1.0)[:, None]
    pose = beside(at(start[:, None] + direction * speed[:, None] * seconds), left[:, None])
    pose[..., 2] += np.where(direction > 0, 0.0, math.pi)
    velocity = speed[:, None, None] * np.stack([np.cos(pose[..., 2]), np.sin(pose[..., 2])], -1)
    first, last = rng.integers(-30, 20, agents), rng.integers(30, 90, agents)  # some enter late or leave early
    step = np.arange(STEPS_V1)
    valid = (step >= first[:, None]) & (step <= last[:, None])
    sizes = np.array([SIZES[Kind(k)] for k in kinds]).reshape(-1, 2) * rng.uniform(0.9, 1.1, (agents, 2))
    return kinds, sizes, np.concatenate([pose, velocity], -1), valid


def _to_ego(poses: np.ndarray, ego: np.ndarray) -> np.ndarray:
    cosine, sine = math.cos(ego[2]), math.sin(ego[2])
    offset = poses[..., :2] - ego[:2]
    x = cosine * offset[..., 0] + sine * offset[..., 1]
    y = cosine * offset[..., 1] - sine * offset[..., 0]
    return np.stack([x, y, poses[..., 2] - ego[2]], -1)


def _row(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value))[None]
