"""What voxel pooling is measured against: torch operations with planned indices, and BEVDet's kernels where their source is.

Each peer is given what can be known before features are: which points lie in which cell, sorted. Features are "B N H W C" in
memory, as all of them read them.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from irlvla.ops import reference

Pool = Callable[[Tensor, Tensor], Tensor]  # features "B N C H W", depth "B N D H W" to "B C X Y"


@dataclass(frozen=True)
class Points:
    """All points of a batch that lie in the grid, sorted by cell."""

    shape: tuple[int, int]
    cell: Tensor  # numbered through the batch
    bags: reference.Bags

    @classmethod
    def of(cls, cells: Tensor, shape: tuple[int, int]) -> Points:
        count = shape[0] * shape[1]
        bags = reference.bags_of(cells, count)
        numbered = cells + torch.arange(len(cells), device=cells.device)[:, None, None, None, None] * count
        return cls(shape, numbered.flatten()[bags.weight], bags)

    def rows(self, features: Tensor) -> Tensor:
        return features.movedim(2, -1).reshape(-1, features.shape[2])

    def bev(self, sums: Tensor, batch: int) -> Tensor:
        return sums.reshape(batch, *self.shape, -1).permute(0, 3, 1, 2)

    # --- peers --------------------------------------------------------------------------------------------------------

    def bag(self, features: Tensor, depth: Tensor) -> Tensor:
        """embedding_bag, and the gather that brings weights into its order."""
        return self.bag_of_weights(features, depth.reshape(-1)[self.bags.weight])

    def bag_of_weights(self, features: Tensor, weights: Tensor) -> Tensor:
        """embedding_bag alone: weights are in its order already, so that nobody pays for the gather, nor for its gradient."""
        sums = embedding_bag(self.bags.feature, self.rows(features), self.bags.offsets, mode="sum", per_sample_weights=weights)
        return self.bev(sums, len(features))

    def gather(self, features: Tensor, depth: Tensor) -> Tensor:
        """A row per point, multiplied and added."""
        rows = self.rows(features)[self.bags.feature] * depth.reshape(-1)[self.bags.weight][:, None]
        return self._added(rows, len(features))

    def volume(self, features: Tensor, depth: Tensor) -> Tensor:
        """Lift, Splat, Shoot: the whole volume of features times depth, of which some is added."""
        return self._added(self._volume(features, depth), len(features))

    def cumsum(self, features: Tensor, depth: Tensor) -> Tensor:
        """Lift, Splat, Shoot as published: sums over all points up to here, and their differences (`QuickCumsum`)."""
        sums = QuickCumsum.apply(self._volume(features, depth), self.cell)
        last = torch.cat([self.cell[1:] != self.cell[:-1], self.cell.new_ones(1, dtype=torch.bool)])
        bev = sums.new_zeros(self.bags.offsets.shape[0], sums.shape[1])
        return self.bev(bev.index_put((self.cell[last],), sums), len(features))

    def _volume(self, features: Tensor, depth: Tensor) -> Tensor:
        lifted = depth[..., None] * features.movedim(2, -1)[:, :, None]
        return lifted.reshape(-1, features.shape[2])[self.bags.weight]

    def _added(self, rows: Tensor, batch: int) -> Tensor:
        sums = rows.new_zeros(self.bags.offsets.shape[0], rows.shape[1])
        return self.bev(sums.index_add_(0, self.cell, rows), batch)


class QuickCumsum(torch.autograd.Function):
    """Sums of rows of equal, sorted rank (nv-tlabs/lift-splat-shoot, src/tools.py)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Tensor) -> Tensor:
        total = rows.cumsum(0)
        last = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        last[:-1] = ranks[1:] != ranks[:-1]
        ctx.save_for_backward(last)
        total = total[last]
        return torch.cat([total[:1], total[1:] - total[:-1]])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (last,) = ctx.saved_tensors
        back = last.cumsum(0)
        back[last] -= 1
        return grad[back], None


def bevdet(folder: Path, points: Points, grid: tuple[int, int], batch: int) -> Pool:
    """BEVDet's bev_pool_v2 from its public source: `mmdet3d/ops/bev_pool_v2`, compiled here, forward and backward as they are."""
    pool = _bevdet_module(folder).bev_pool_v2
    starts = torch.cat([points.cell.new_ones(1, dtype=torch.bool), points.cell[1:] != points.cell[:-1]]).nonzero()[:, 0]
    lengths = torch.diff(starts, append=starts.new_full((1,), len(points.cell)))
    ranks = [ranks.int() for ranks in (points.bags.weight, points.bags.feature, points.cell)]

    def call(features: Tensor, depth: Tensor) -> Tensor:
        shape = (batch, 1, *grid, features.shape[2])
        return pool(depth, features.movedim(2, -1), *ranks, shape, starts.int(), lengths.int())[:, :, 0]

    return call


def _bevdet_module(folder: Path) -> types.ModuleType:
    """The module bev_pool.py beside the extension that it imports."""
    from torch.utils import cpp_extension

    if "bevdet.bev_pool" not in sys.modules:
        sources = [folder / "src" / name for name in ("bev_pool.cpp", "bev_pool_cuda.cu")]
        package = types.ModuleType("bevdet")
        package.__path__ = [str(folder)]
        sys.modules["bevdet"] = package
        sys.modules["bevdet.bev_pool_v2_ext"] = cpp_extension.load("bev_pool_v2_ext", [str(source) for source in sources])
        package.bev_pool_v2_ext = sys.modules["bevdet.bev_pool_v2_ext"]  # type: ignore[attr-defined]
        spec = importlib.util.spec_from_file_location("bevdet.bev_pool", folder / "bev_pool.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["bevdet.bev_pool"] = module
        spec.loader.exec_module(module)
    return sys.modules["bevdet.bev_pool"]
