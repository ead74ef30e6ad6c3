"""The lane graph of the golden reactive scenes, which their files leave out.

The devkit's vehicles stand exactly on the baseline of their lane, so the recorded tracks tell what it was:

- every lane and connector has a speed limit of 11 m/s (what accelerations on a free road say, to 1e-6 m/s);
- a lane runs as the vehicles on it drive (rings of the opposite side of a road run against it);
- a baseline has a vertex at least every metre, also where its polygon is straight and has one every 4 m. This decides most: traffic brakes
  for the last vertex but one, where the devkit's path ends, and with the polygon's own vertices that is 3 m too early;
- the lanes of the route have the vertices of `centerline`. Vertices of the others lay in the middle of their polygon before both were
  rounded to 2^-12 m, which leaves some last bits open. traffic/golden_rounding.npz has those of the lanes with traffic, found by a search:
  recorded poses lie on the line to 1e-8 m, and the traffic that results is the recorded one.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from irlvla.types import Kind, Layer, Scene

LIMIT = 11.0
GRID = 2.0**-12
ROUNDING = Path(__file__).parent / "traffic" / "golden_rounding.npz"

Line = NDArray[np.float64]


def lane_graph(scene: Scene, rounding: dict[int, Line] | None = None) -> Scene:
    """A golden scene with baselines and speed limits. `rounding`: per polygon, what to add to its vertices, in units of the grid."""
    lines = [_baseline(scene, polygon, (rounding or {}).get(polygon)) for polygon in range(len(scene.polygon_layer))]
    return dataclasses.replace(
        scene,
        polygon_speed_limit=torch.full((len(lines),), LIMIT, dtype=torch.float64),
        baseline_offsets=torch.tensor(np.cumsum([0, *map(len, lines)])),
        baseline=torch.from_numpy(np.concatenate(lines)),
    )


def roundings() -> dict[str, dict[int, Line]]:
    """Per scene name without its candidate: the rounding of the lanes that have traffic."""
    with np.load(ROUNDING) as file:
        scenes, polygons, offsets, units = (file[name] for name in ("scene", "polygon", "offset", "units"))
    found: dict[str, dict[int, Line]] = {}
    for i, (name, polygon) in enumerate(zip(scenes.tolist(), polygons.tolist(), strict=True)):
        found.setdefault(name, {})[polygon] = units[offsets[i] : offsets[i + 1]].astype(np.float64)
    return found


def _baseline(scene: Scene, polygon: int, rounding: Line | None) -> Line:
    if scene.polygon_layer[polygon] not in (Layer.LANE, Layer.LANE_CONNECTOR):
        return np.zeros((0, 2))
    ring = ring_of(scene, polygon)
    half = len(ring) // 2
    middle = (ring[:half] + ring[half:][::-1]) / 2.0
    for line in _route(scene):
        if np.abs(line[[0, -1]] - middle[[0, -1]]).max() < 4.0 * GRID:
            return line
    line = np.round(_every_metre(middle) / GRID) * GRID
    line = line[::-1] if _runs_against(scene, ring, line) else line
    return line if rounding is None else line + rounding * GRID


def ring_of(scene: Scene, polygon: int) -> Line:
    first, last = scene.point_offsets[scene.ring_offsets[polygon] : scene.ring_offsets[polygon] + 2]
    return scene.points[first:last].numpy()


def _route(scene: Scene) -> list[Line]:
    """The centre line in pieces, one per lane: the first point of a lane repeats the last of the lane before."""
    points = scene.centerline[:, :2].numpy()
    return np.split(points, np.flatnonzero((np.diff(points, axis=0) == 0.0).all(1)) + 1)


def _every_metre(middle: Line) -> Line:
    """Polygons have all vertices of a bent baseline, or every fourth; of a straight one they have some of their own."""
    steps = np.linalg.norm(np.diff(middle, axis=0), axis=1)
    if steps.max() < 2.0:
        return middle
    share = np.linspace(0.0, 1.0, len(middle))
    straight = np.abs(middle - np.outer(1.0 - share, middle[0]) - np.outer(share, middle[-1])).max() < 4.0 * GRID
    count = math.ceil(steps.sum() - 0.01) if straight else 4 * (len(middle) - 1)
    # Of all vertices together: each was rounded.
    fits = [np.polynomial.Polynomial.fit(share, middle[:, axis], 1 if straight else 7) for axis in (0, 1)]
    return np.stack([fit(np.linspace(0.0, 1.0, count + 1)) for fit in fits], 1)


def _runs_against(scene: Scene, ring: Line, line: Line) -> bool:
    """Whether the vehicles that start inside a ring drive against the line, once they are on it."""
    votes = 0
    for before, after in scene.agent_state[(scene.agent_kind == Kind.VEHICLE) & scene.agent_valid[:, :2].all(1), :2].numpy():
        if _holds(ring, before[:2]):
            k = np.linalg.norm(line[:-1] - before[:2], axis=1).argmin()
            step = line[k + 1] - line[k]
            along = (step @ [math.cos(after[2]), math.sin(after[2])]) / np.linalg.norm(step)
            votes += int(along > 0.99) - int(along < -0.99)
    return votes < 0


def _holds(ring: Line, point: Line) -> bool:
    (x0, y0), (x1, y1) = (ring - point).T, (np.roll(ring, -1, 0) - point).T
    crosses = (y0 > 0.0) != (y1 > 0.0)
    return bool((crosses & ((x0 * y1 > x1 * y0) == (y1 > y0))).sum() % 2)
