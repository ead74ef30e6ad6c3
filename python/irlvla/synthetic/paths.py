"""Paths: lanes driven one after the other. A place is the distance of a vehicle's centre along its path [m]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from irlvla.synthetic.angles import Array, wrap
from irlvla.synthetic.layouts import Layout
from irlvla.synthetic.roads import Line, lengths

GRID = 1.0  # spacing of what is tabulated along a path [m]
EASE = 1.5  # deceleration before bends and slower roads [m/s^2]


@dataclass(frozen=True)
class Path:
    """A way through lanes and connectors."""

    lanes: tuple[int, ...]
    begins: Array  # place at which each begins
    along: Array  # place of each point of the line
    line: Line

    @classmethod
    def of(cls, layout: Layout, lanes: tuple[int, ...]) -> Path:
        lines = [layout.roads.lanes[lane].centerline for lane in lanes]
        line = np.concatenate([lines[0], *(other[1:] for other in lines[1:])])
        line[1:, 2] = line[0, 2] + np.cumsum(wrap(np.diff(line[:, 2])))
        along = lengths(line)
        ends = np.cumsum([len(other) - 1 for other in lines])
        return cls(lanes, np.concatenate([[0.0], along[ends[:-1]]]), along, line)

    @property
    def length(self) -> float:
        return float(self.along[-1])

    def poses(self, place: Array) -> Float[np.ndarray, "n 3"]:
        """x, y and heading at places "n"."""
        after = np.clip(np.searchsorted(self.along, place), 1, len(self.along) - 1)
        start, first = self.line[after - 1], self.along[after - 1]
        share = (place - first) / (self.along[after] - first)
        return start + share[:, None] * (self.line[after] - start)

    def lane_at(self, place: float) -> tuple[int, float]:
        """The lane at a place, and the distance along it."""
        index = max(int(np.searchsorted(self.begins, place, side="right")) - 1, 0)
        return self.lanes[index], place - float(self.begins[index])

    def speeds(self, layout: Layout, factor: float, comfort: float, pace: Array | None = None) -> Array:
        """How fast to be at each `GRID`: limits times `factor`, `comfort` [m/s^2] in bends, `pace` at most, and braking in time for all."""
        grid = np.arange(int(self.length / GRID) + 1) * GRID
        piece = np.minimum(np.searchsorted(self.along, grid), len(self.along) - 2)
        bend = np.abs(np.diff(self.line[:, 2])) / np.diff(self.along)
        limits = np.array([layout.roads.lanes[lane].speed_limit for lane in self.lanes]) * factor
        limit = limits[np.searchsorted(self.begins, grid, side="right") - 1]
        limit = limit if pace is None else np.minimum(limit, pace)
        square = np.minimum(limit * limit, comfort / np.maximum(bend[piece], 1e-6)) + 2.0 * EASE * grid
        return np.sqrt(np.minimum.accumulate(square[::-1])[::-1] - 2.0 * EASE * grid)
