"""Small, valid, varied data: scenes on a straight road, what is seen in them, tokens and plans.

The same arguments give the same data. Scene i has the token "example-SEED-i" in all of them, so they belong together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from irlvla.types import HORIZON, STEP, STEPS, Batch, Command, Features, Kind, Layer, Observation, Plan, Scene, StateIndex, Trajectory

ROAD = (-30.0, 130.0)  # from and to [m]
LANE = 3.5  # width [m]
HISTORY = torch.tensor([-1.5, -1.0, -0.5, 0.0], dtype=torch.float64)  # [s]
AGENT_STEPS = 51  # 5 s: PDMS looks that far


@dataclass(frozen=True)
class Example(Batch):
    """All of it for the same B scenes."""

    scene: Scene
    observation: Observation
    features: Features
    plan: Plan
    human: Trajectory


def example(batch: int = 2, width: int = 64, k: int = 3, seed: int = 0) -> Example:
    """Scenes and everything that components are given about them."""
    scene, features = example_scene(batch, seed), example_features(batch, width, seed)
    return Example(scene, features.observation, features, example_plan(batch, k, seed), Trajectory(scene.human.float(), scene.human_dt))


def example_scene(batch: int = 2, seed: int = 0) -> Scene:
    """B scenes on a straight road of two lanes, somewhere in a map, with one to four agents. The human stays in the lane, and
    keeps or gently changes the speed; `irlvla.epdms` scores it."""
    generator = torch.Generator().manual_seed(seed)
    return Scene.cat(_scene(f"example-{seed}-{i}", 1 + i % 4, generator) for i in range(batch))


def example_observation(batch: int = 2, cameras: int = 2, size: tuple[int, int] = (64, 96), seed: int = 0) -> Observation:
    """What is seen in the scenes of `example_scene`: images of noise (B C 3 H W, uint8; None for no cameras), float32, and the
    scene itself."""
    scene, (height, width) = example_scene(batch, seed), size
    generator = torch.Generator().manual_seed(seed)
    intrinsics = torch.tensor([[width / 2.0, 0.0, width / 2.0], [0.0, width / 2.0, height / 2.0], [0.0, 0.0, 1.0]])
    return Observation(
        token=scene.token,
        ego=torch.cat([scene.in_ego_frame(scene.history[..., :3]), scene.history[..., 3:]], -1).float(),
        command=torch.arange(batch) % len(Command),
        images=torch.randint(256, (batch, cameras, 3, height, width), generator=generator, dtype=torch.uint8) if cameras else None,
        intrinsics=intrinsics.repeat(batch, cameras, 1, 1) if cameras else None,
        camera_to_ego=_camera_to_ego(cameras).repeat(batch, 1, 1, 1) if cameras else None,
        prompt=tuple(f"Drive on, {Command(i % len(Command)).name.lower()}." for i in range(batch)),
        scene=scene,
    )


def example_features(batch: int = 2, width: int = 64, seed: int = 0) -> Features:
    """Tokens of every name, of normal noise, float32: a bird's-eye view of 8 x 8 cells over 64 x 64 m, 5 agents, 7 of the map, the status,
    6 words. Of the ragged ones some are not valid, as those of `Features` may be."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def valid(count: int) -> Tensor:
        return torch.arange(count) < 1 + torch.arange(batch)[:, None] % count

    return Features(
        example_observation(batch, seed=seed),
        bev=noise(batch, width, 8, 8),
        bev_range=torch.tensor([-32.0, 32.0, -32.0, 32.0]).repeat(batch, 1),
        agents=noise(batch, 5, width),
        agents_valid=valid(5),
        map=noise(batch, 7, width),
        map_valid=valid(7),
        status=noise(batch, width),
        language=noise(batch, 6, width),
        language_valid=valid(6),
    )


def example_plan(batch: int = 2, k: int = 3, seed: int = 0) -> Plan:
    """K proposals for each scene of `example_scene`, 8 poses of 0.5 s, float32: the human's drive, faster or slower and to a side."""
    generator = torch.Generator().manual_seed(seed)
    human = example_scene(batch, seed).human.float()
    pace, side = torch.randn(2, batch, k, 1, generator=generator)
    progress = torch.linspace(1 / 8, 1, 8)
    x, y = human[:, None, :, 0] * (1 + 0.2 * pace).clamp(0.0), human[:, None, :, 1] + side * progress
    return Plan(torch.stack([x, y, human[:, None, :, 2].expand_as(x)], -1))


# -- one scene, in its ego frame until the end -------------------------------------------------------------------------


def _scene(token: str, agents: int, generator: Generator) -> Scene:
    """One scene; the agents are a car ahead, one in the left lane, a parked one, and someone on foot, as far as they go."""
    speed, gain, heading, east, north = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    v, acceleration = 6.0 + 6.0 * speed, 0.8 * gain - 0.4
    origin = torch.tensor([1000.0 * east, 1000.0 * north, 2 * math.pi * heading - math.pi], dtype=torch.float64)
    times = torch.arange(AGENT_STEPS, dtype=torch.float64) * STEP
    starts = [(25.0, 0.0, v), (10.0, LANE, 0.8 * v), (40.0, -LANE, 0.0), (15.0, -LANE - 1.0, 1.2)][:agents]
    states = torch.stack([_straight(x + vx * times, torch.full_like(times, y), torch.full_like(times, vx)) for x, y, vx in starts])
    lanes = [(-LANE / 2, LANE / 2), (LANE / 2, 1.5 * LANE), (-LANE / 2, 1.5 * LANE)]
    rings = [((ROAD[0], low), (ROAD[1], low), (ROAD[1], high), (ROAD[0], high)) for low, high in lanes]
    line = torch.arange(*ROAD, 2.0, dtype=torch.float64)
    seconds = torch.arange(1, 9, dtype=torch.float64) * 0.5
    ahead = torch.arange(STEPS, dtype=torch.float64) * STEP
    now = 1_000_000_000
    return Scene(
        token=(token,),
        time_us=torch.tensor([now]),
        ego=_ego(origin, torch.zeros(1), v),
        history_time_us=(now + (HISTORY * 1e6).long())[None],
        history=_ego(origin, HISTORY, v)[None, :, : StateIndex.STEERING + 1],
        human=_straight(v * seconds + acceleration / 2 * seconds**2)[None, :, :3],
        human_dt=HORIZON / len(seconds),
        human_values=None,
        reference=_in_map(_straight(v * ahead)[:, :3], origin)[None],
        previous_time_us=torch.tensor([now - 500_000]),
        previous_ego=_ego(origin, torch.tensor([-0.5]), v),
        speed_limit=torch.tensor([13.9], dtype=torch.float64),
        agent_offsets=torch.tensor([0, agents]),
        agent_token=tuple(f"{token}-{name}" for name in ("lead", "left", "parked", "walker")[:agents]),
        agent_kind=torch.tensor([Kind.VEHICLE, Kind.VEHICLE, Kind.VEHICLE, Kind.PEDESTRIAN][:agents]),
        agent_size=torch.tensor([[4.6, 1.9], [4.6, 1.9], [4.6, 1.9], [0.7, 0.7]][:agents], dtype=torch.float64),
        agent_valid=torch.ones(agents, AGENT_STEPS, dtype=torch.bool),
        agent_state=_in_map(states, origin),
        polygon_offsets=torch.tensor([0, len(rings)]),
        polygon_layer=torch.tensor([Layer.LANE, Layer.LANE, Layer.ROADBLOCK]),
        polygon_on_route=torch.tensor([True, True, False]),
        ring_offsets=torch.arange(len(rings) + 1),
        point_offsets=torch.arange(0, 4 * len(rings) + 1, 4),
        points=_in_map(torch.tensor(rings, dtype=torch.float64).flatten(0, 1), origin),
        light_offsets=torch.tensor([0, 0]),
        light_polygon=torch.zeros(0, dtype=torch.int64),
        light_red=torch.zeros(0, STEPS, dtype=torch.bool),
        centerline_offsets=torch.tensor([0, len(line)]),
        centerline=_in_map(_straight(line)[:, :3], origin),
        polygon_speed_limit=torch.tensor([13.9, 13.9, math.nan], dtype=torch.float64),
        baseline_offsets=torch.tensor([0, len(line), 2 * len(line), 2 * len(line)]),
        baseline=_in_map(torch.cat([_straight(line), _straight(line, torch.full_like(line, LANE))])[:, :2], origin),
    )


def _straight(x: Tensor, y: Tensor | None = None, vx: Tensor | None = None) -> Float[Tensor, "N 5"]:
    """States x, y, heading, vx, vy along the road."""
    zeros = torch.zeros_like(x)
    return torch.stack([x, zeros if y is None else y, zeros, zeros if vx is None else vx, zeros], -1)


def _ego(origin: Tensor, times: Tensor, speed: float) -> Float[Tensor, "N 11"]:
    """States of the ego in the map at some times [s], at constant speed; the velocity is in the body frame."""
    states = torch.zeros(len(times), len(StateIndex), dtype=torch.float64)
    states[:, StateIndex.X] = speed * times
    states[:, :3] = _in_map(states[:, :3], origin)
    states[:, StateIndex.VX] = speed
    return states


def _in_map(values: Tensor, origin: Tensor) -> Tensor:
    """Positions x y, poses x y heading or states x y heading vx vy "... 2|3|5" of the ego frame, in the map frame."""
    x, y, heading = origin
    rotation = torch.stack([heading.cos(), heading.sin(), -heading.sin(), heading.cos()]).view(2, 2)
    parts = [values[..., :2] @ rotation + torch.stack([x, y])]
    if values.shape[-1] > 2:
        parts.append(values[..., 2:3] + heading)
    if values.shape[-1] > 3:
        parts.append(values[..., 3:5] @ rotation)
    return torch.cat(parts, -1)


def _camera_to_ego(cameras: int) -> Float[Tensor, "C 4 4"]:
    """Level cameras all around, the first looking ahead: x right, y down, z forward."""
    yaw = torch.arange(cameras) * (2 * math.pi / cameras)
    cos, sin, zero, one = yaw.cos(), yaw.sin(), torch.zeros(cameras), torch.ones(cameras)
    rows = [sin, zero, cos, 1.5 * one, -cos, zero, sin, zero, zero, -one, zero, 1.6 * one, zero, zero, zero, one]
    return torch.stack(rows, -1).view(-1, 4, 4)
