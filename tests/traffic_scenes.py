"""Small random worlds with traffic: bent lanes side by side, a crossing, a parked row, and an ego among them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from irlvla.testing.examples import example_scene
from irlvla.types import STEPS, Kind, Layer, Scene


def _line(rng: np.random.Generator, start: np.ndarray, heading: float, length: float, bend: float, spacing: float) -> np.ndarray:
    """A line of constant bend with vertices at uneven distances."""
    steps = spacing * rng.uniform(0.5, 1.5, max(int(length / spacing), 4))
    headings = heading + bend * np.cumsum(steps)
    return start + np.concatenate([[[0.0, 0.0]], np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1) * steps[:, None], 0)])


def _beside(line: np.ndarray, distance: float) -> np.ndarray:
    along = np.gradient(line, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    return line + distance * np.stack([-along[:, 1], along[:, 0]], 1)


def traffic_scene(seed: int) -> tuple[Scene, torch.Tensor]:
    """A scene of one and the states of an ego in it, 41 x 11, both far from the origin where the seed is odd."""
    rng = np.random.default_rng(seed)
    shift = np.array([664958.0, 3999184.0]) if seed % 2 else np.zeros(2)
    bend, heading = rng.choice([0.0, 0.004, -0.015, 0.06]), rng.uniform(-math.pi, math.pi)
    road = _line(rng, shift, heading, 70.0, bend, rng.choice([1.0, 4.0]))
    middle = road[len(road) // 2]
    crossing = _line(rng, middle - 25.0 * np.array([math.cos(heading + 1.2), math.sin(heading + 1.2)]), heading + 1.2, 50.0, 0.0, 2.0)
    lines = [
        (road, Layer.LANE),
        (_beside(road, 3.5), Layer.LANE),
        (_beside(road, -3.5)[::-1], Layer.LANE),
        (crossing, Layer.LANE_CONNECTOR),
    ]
    rings, layers, baselines = [], [], []
    for line, layer in lines:
        rings.append(np.concatenate([_beside(line, 1.75), _beside(line, -1.75)[::-1]]))
        layers.append(int(layer))
        baselines.append(line)
    rings.append(middle + 9.0 * np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]))
    layers.append(int(Layer.INTERSECTION))
    baselines.append(np.zeros((0, 2)))

    agents = []
    for line, _ in lines:
        for _ in range(rng.integers(0, 4)):
            k = rng.integers(0, len(line) - 1)
            direction = math.atan2(*(line[k + 1] - line[k])[::-1])
            where = line[k] + rng.uniform(0, 1) * (line[k + 1] - line[k]) + rng.normal(0.0, 0.7, 2)
            speed = rng.choice([0.0, rng.uniform(0.0, 14.0)])
            agents.append((*where, direction + rng.normal(0.0, 0.2), speed * math.cos(direction), speed * math.sin(direction)))
    for _ in range(3):
        agents.append((*(road[rng.integers(len(road))] + rng.normal(0.0, 8.0, 2)), rng.uniform(-3, 3), 0.0, 0.0))
    rng.shuffle(agents)
    state = np.repeat(np.array(agents)[:, None], 51, 1)
    sizes = np.stack([rng.uniform(3.5, 9.0, len(agents)), rng.uniform(1.7, 2.7, len(agents))], 1)

    k = len(road) // 3
    speed = rng.uniform(0.0, 12.0)
    headings = heading + bend * np.linspace(0.0, 1.0, STEPS) * 20.0 + rng.normal(0.0, 0.1)
    ego = np.zeros((STEPS, 11))
    ego[:, :2] = road[k] + np.cumsum(0.1 * speed * np.stack([np.cos(headings), np.sin(headings)], 1), 0)
    ego[:, 2], ego[:, 3] = headings, speed

    def double(value: object) -> torch.Tensor:
        return torch.from_numpy(np.array(value, np.float64))

    scene = example_scene(1, seed)
    a, p = len(agents), len(rings)
    limits = double(rng.choice([math.nan, 8.0, 13.9, 0.0], p))
    return dataclasses.replace(
        scene,
        ego=double(ego[:1]),
        agent_offsets=torch.tensor([0, a]),
        agent_token=tuple(f"v{i:03d}" for i in range(a)),
        agent_kind=torch.full((a,), int(Kind.VEHICLE)),
        agent_size=double(sizes),
        agent_valid=torch.ones(a, 51, dtype=torch.bool),
        agent_state=double(state),
        polygon_offsets=torch.tensor([0, p]),
        polygon_layer=torch.tensor(layers),
        polygon_on_route=torch.tensor([layer == Layer.LANE for layer in layers]),
        ring_offsets=torch.arange(p + 1),
        point_offsets=torch.tensor(np.cumsum([0, *map(len, rings)])),
        points=double(np.concatenate(rings)),
        centerline=double(np.column_stack([road, np.zeros(len(road))])),
        centerline_offsets=torch.tensor([0, len(road)]),
        polygon_speed_limit=limits,
        baseline_offsets=torch.tensor(np.cumsum([0, *map(len, baselines)])),
        baseline=double(np.concatenate(baselines)),
    ), double(ego)
