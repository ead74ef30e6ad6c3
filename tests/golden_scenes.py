"""Golden scenes for tests; the loader is the package's own."""

import dataclasses
import itertools
import math
from collections.abc import Iterable

import torch

from irlvla.golden import OFFICIAL, GoldenScene, load
from irlvla.types import Layer, Scene

__all__ = ["OFFICIAL", "GoldenScene", "load", "with_baselines"]


def with_baselines(scene: Scene, limit: float = math.nan, reverse: Iterable[int] = ()) -> Scene:
    """A golden scene with the middles of its lanes as baselines: rings run along one edge of a lane and back along the other.

    `reverse` names polygons whose ring starts at the end of the lane.
    """
    lines = []
    for polygon, layer in enumerate(scene.polygon_layer.tolist()):
        first, last = scene.point_offsets[scene.ring_offsets[polygon] : scene.ring_offsets[polygon] + 2]
        ring, half = scene.points[first:last], int(last - first) // 2
        line = (ring[:half] + ring[half : 2 * half].flip(0)) / 2.0 if layer in (Layer.LANE, Layer.LANE_CONNECTOR) else ring[:0]
        lines.append(line.flip(0) if polygon in reverse else line)
    offsets = torch.tensor([0, *itertools.accumulate(map(len, lines))])
    limits = torch.full((len(lines),), limit, dtype=torch.float64)
    return dataclasses.replace(scene, polygon_speed_limit=limits, baseline_offsets=offsets, baseline=torch.cat(lines))
