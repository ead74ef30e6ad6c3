"""BEV voxel pooling point by point: where each lies, which cell that is, and what it adds there.

The functions to pool differentiate in any type; gradients are checked in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from irlvla.ops.frustums import Grid


def points_of(
    intrinsics: Float[Tensor, "N 3 3"],
    camera_to_ego: Float[Tensor, "N 4 4"],
    feature_size: tuple[int, int],
    depths: Float[Tensor, " D"] | Sequence[float],
    image_size: tuple[int, int] | None = None,
) -> Float[Tensor, "N D H W 3"]:
    """Points in the ego frame; NaN where they are behind their camera.

    One multiplication and addition after the other, in the order in which they are written: where a point lies on the border
    of a cell, the last bit decides.
    """
    (height, width), d = feature_size, torch.as_tensor(depths, dtype=torch.float64)[:, None, None]
    rows, columns = image_size or feature_size
    u = (torch.arange(width, dtype=torch.float64) + 0.5) * (columns / width) - 0.5
    v = (torch.arange(height, dtype=torch.float64)[:, None] + 0.5) * (rows / height) - 0.5
    points = []
    for k, pose in zip(intrinsics.double(), camera_to_ego.double(), strict=True):
        m = inverse(k)
        x, y, z = (m[i][0] * u + m[i][1] * v + m[i][2] for i in range(3))
        x, y = x / z, y / z
        ego = [(pose[i, 0] * x + pose[i, 1] * y + pose[i, 2]) * d + pose[i, 3] for i in range(3)]
        points.append(torch.stack(ego, -1).where(((z > 0) & (d > 0))[..., None], torch.nan))
    return torch.stack(points)


def inverse(m: Float[Tensor, "3 3"]) -> list[list[Tensor]]:
    """Of a matrix, by cofactors."""
    (a, b, c), (d, e, f), (g, h, i) = m
    determinant = a * (e * i - f * h) + b * (f * g - d * i) + c * (d * h - e * g)
    cofactors = [
        [e * i - f * h, c * h - b * i, b * f - c * e],
        [f * g - d * i, a * i - c * g, c * d - a * f],
        [d * h - e * g, b * g - a * h, a * e - b * d],
    ]
    return [[cofactor / determinant for cofactor in row] for row in cofactors]


def cells_of(points: Float[Tensor, "*n 3"], grid: Grid) -> Int[Tensor, "*n"]:
    """The number of the cell in which each point lies, -1 where it lies in none."""
    (x, x_low, x_step), (y, y_low, y_step) = ((p, axis[0], axis[2]) for p, axis in ((points[..., 0], grid.x), (points[..., 1], grid.y)))
    i, j, (nx, ny) = ((x - x_low) / x_step).floor(), ((y - y_low) / y_step).floor(), grid.shape
    k = ((points[..., 2] - grid.z[0]) / (grid.z[1] - grid.z[0])).floor()
    inside = (i >= 0) & (i < nx) & (j >= 0) & (j < ny) & (k == 0)
    return torch.where(inside, i * ny + j, -1.0).long()


def voxel_pool(
    features: Float[Tensor, "B N C H W"],
    depth: Float[Tensor, "B N D H W"],
    cells: Int[Tensor, "B N D H W"],
    shape: tuple[int, int],
    *,
    softmax: bool = False,
) -> Float[Tensor, "B C X Y"]:
    """Every point adds its feature times its weight to its cell (Lift, Splat, Shoot, with a sum over the volume).

    `cells` may have a batch size of 1, `shape` is that of the grid.
    """
    batch, channels = features.shape[0], features.shape[2]
    weights = depth.softmax(2) if softmax else depth
    volume = weights[..., None] * features.movedim(2, -1)[:, :, None]  # B N D H W C
    numbered = numbered_through(cells, batch, shape[0] * shape[1])
    inside = (cells >= 0).expand_as(depth)
    bev = volume.new_zeros(batch * shape[0] * shape[1], channels).index_add(0, numbered[inside], volume[inside])
    return bev.reshape(batch, *shape, channels).permute(0, 3, 1, 2)


def numbered_through(cells: Int[Tensor, "B N D H W"], batch: int, count: int) -> Int[Tensor, "B N D H W"]:
    """Cells numbered through a batch, each sample having `count`."""
    return cells + torch.arange(batch, device=cells.device)[:, None, None, None, None] * count


@dataclass(frozen=True)
class Bags:
    """Points by cell, for `torch.nn.functional.embedding_bag`."""

    offsets: Int[Tensor, " B*cells"]  # first point of each cell
    feature: Int[Tensor, " P"]  # its row among those of features "B N H W C"
    weight: Int[Tensor, " P"]  # its place among depth "B N D H W"


def bags_of(cells: Int[Tensor, "B N D H W"], count: int) -> Bags:
    """Points in cells 0 ... count - 1 of each sample, in bags: what can be done before features are known."""
    batch, _, bins, height, width = cells.shape
    numbered = numbered_through(cells, batch, count).flatten()
    weight = (cells.flatten() >= 0).nonzero()[:, 0]
    weight = weight[numbered[weight].sort(stable=True).indices]
    camera, pixel = weight // (bins * height * width), weight % (height * width)
    sizes = torch.bincount(numbered[weight], minlength=batch * count)
    return Bags(sizes.cumsum(0) - sizes, camera * (height * width) + pixel, weight)


def voxel_pool_in_bags(
    features: Float[Tensor, "B N C H W"], depth: Float[Tensor, "B N D H W"], bags: Bags, shape: tuple[int, int], *, softmax: bool = False
) -> Float[Tensor, "B C X Y"]:
    """The same by torch's fastest operation for it: a cell is a bag of features, and depth their weights."""
    weights = (depth.softmax(2) if softmax else depth).reshape(-1)[bags.weight]
    rows = features.movedim(2, -1).reshape(-1, features.shape[2])
    bev = torch.nn.functional.embedding_bag(bags.feature, rows, bags.offsets, mode="sum", per_sample_weights=weights)
    return bev.reshape(features.shape[0], *shape, -1).permute(0, 3, 1, 2)
