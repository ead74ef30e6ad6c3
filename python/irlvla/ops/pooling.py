"""BEV voxel pooling: features of camera pixels, weighted by their depth distributions, summed into a bird's-eye-view grid."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """A bird's-eye-view grid in the ego frame: low, high and step along x and y, low and high along z [m]. Cells are half open."""

    x: tuple[float, float, float] = (-51.2, 51.2, 0.8)
    y: tuple[float, float, float] = (-51.2, 51.2, 0.8)
    z: tuple[float, float] = (-5.0, 3.0)


@dataclass(frozen=True)
class VoxelPoolPlan:
    """Which pixel at which depth lies in which cell, for rigs of N cameras (see csrc/voxel_pool.h)."""

    grid: Grid
    samples: int  # 1: shared by all samples of a batch
    cameras: int
    bins: int
    height: int
    width: int
    cell_start: Int[Tensor, " samples*cells+1"]
    cell_runs: Int[Tensor, "R 2"]  # int32 pairs: CellRun
    column_start: Int[Tensor, " samples*cameras*width+1"]
    column_runs: Int[Tensor, "R 2"]  # int32 pairs: ColumnRun
