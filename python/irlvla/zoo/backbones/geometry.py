"""Packed rows of many scenes at once: which belong together; lines and outlines, cut, sampled and painted."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

# -- rows --------------------------------------------------------------------------------------------------------------


def owners(offsets: Int[Tensor, " N+1"]) -> Int[Tensor, " R"]:
    """Which of N parents each row belongs to."""
    return torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())


def following(group: Int[Tensor, " V"]) -> Int[Tensor, " V"]:
    """The next row of the same group, of the last the first; the rows of a group are neighbours."""
    rows = torch.arange(len(group), device=group.device)
    changes, one = group[1:] != group[:-1], torch.ones_like(group[:1], dtype=torch.bool)
    begins, ends = torch.cat([one, changes]), torch.cat([changes, one])
    return torch.where(ends, torch.where(begins, rows, 0).cummax(0).values, rows + 1)


def nearest(distance: Float[Tensor, " R"], owner: Int[Tensor, " R"], count: int) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Of the rows of each owner the `count` of least distance: which, and their places in a table of owners x count.

    Distances [m] count to the millimetre, and of equals the first: lanes that share a border are equally near but for rounding.
    """
    order = distance.round(decimals=3).argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    owner = owner[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(owner, owner)
    kept = rank < count
    return order[kept], (owner * count + rank)[kept]


def dense(values: Tensor, places: Int[Tensor, " M"], shape: tuple[int, int]) -> Tensor:
    """A table that has these rows at these places, and zeros elsewhere."""
    table = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
    table[places] = values
    return table.unflatten(0, shape)


# -- points ------------------------------------------------------------------------------------------------------------


def turned(points: Float[Tensor, "... 2"], angle: Float[Tensor, "..."]) -> Float[Tensor, "... 2"]:
    """Turned counter-clockwise about the origin."""
    (x, y), cos, sin = points.unbind(-1), angle.cos(), angle.sin()
    return torch.stack([cos * x - sin * y, sin * x + cos * y], -1)


def cross(a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"]) -> Float[Tensor, "..."]:
    """Twice the area of the triangle from the origin to a to b, positive if that is counter-clockwise."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def cut(
    points: Float[Tensor, "V 2"], ring: Int[Tensor, " V"], extent: Float[Tensor, "V 4"]
) -> tuple[Float[Tensor, "W 2"], Int[Tensor, " W"]]:
    """What of closed rings lies in extents (least x, greatest x, least y, greatest y), and the ring of each point.

    By Sutherland and Hodgman: a ring that leaves the extent and comes back follows its border in between.
    """
    for column in range(4):
        inwards = -1.0 if column % 2 else 1.0
        depth, after = (points[:, column // 2] - extent[:, column]) * inwards, following(ring)
        inside = depth >= 0.0
        crosses = inside != inside[after]
        share = torch.where(crosses, depth / (depth - depth[after]), 0.0)[:, None]
        crossing = points + share * (points[after] - points)
        kept = torch.stack([inside, crosses], 1).flatten()
        points = torch.stack([points, crossing], 1).flatten(0, 1)[kept]
        ring, extent = ring.repeat_interleave(2)[kept], extent.repeat_interleave(2, 0)[kept]
    return points, ring


class Paths:
    """Packed points in groups, the names of which rise: outlines, closed, and from the name `open_from` on lines.

    Of R paths: `name`, `closed`, `length`, `area` (positive if counter-clockwise), `nearest` (the point nearest to the origin) and how far
    `along` the path that is.
    """

    def __init__(self, points: Float[Tensor, "V 2"], group: Int[Tensor, " V"], open_from: int) -> None:
        self.name, path, sizes = group.unique_consecutive(return_inverse=True, return_counts=True)
        self.last = sizes.cumsum(0) - 1
        self.first = self.last + 1 - sizes
        self.closed = self.name < open_from
        rows = torch.arange(len(points), device=points.device)
        after = torch.where(self.closed[path], following(group), (rows + 1).minimum(self.last[path]))
        self.points, self.step = points, points[after] - points
        lengths = self.step.norm(dim=1)
        self.ends = lengths.cumsum(0)  # of all paths, one behind the other
        self.starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        self.length, self.area = self._total(lengths), self._total(cross(points, points[after])) / 2.0
        self._find_nearest(path, rows)

    def _total(self, values: Float[Tensor, " V"]) -> Float[Tensor, " R"]:
        """Sums over the rows of each path."""
        total = torch.cat([values.new_zeros(1), values.cumsum(0)])
        return total[self.last + 1] - total[self.first]

    def _find_nearest(self, path: Int[Tensor, " V"], rows: Int[Tensor, " V"]) -> None:
        square = self.step.square().sum(1)
        share = torch.where(square > 0.0, -(self.points * self.step).sum(1) / square, 0.0).clamp(0.0, 1.0)
        foot = self.points + share[:, None] * self.step
        distance = foot.square().sum(1)
        least = distance.new_full((len(self.name),), torch.inf).scatter_reduce(0, path, distance, "amin")
        candidates = torch.where(distance == least[path], rows, len(rows))
        row = candidates.new_full((len(self.name),), len(rows)).scatter_reduce(0, path, candidates, "amin")
        self.nearest = foot[row]
        self.along = self.starts[row] + share[row] * (self.ends[row] - self.starts[row]) - self.starts[self.first]

    def sample(
        self, rows: Int[Tensor, " M"], count: int, back: Float[Tensor, " M"], ahead: Float[Tensor, " M"]
    ) -> Float[Tensor, "M count 2"]:
        """Evenly spaced points: of an outline all around, counter-clockwise, from its nearest point; of a line what lies so far back
        and ahead of it.
        """
        along, length = self.along[rows, None], self.length[rows, None]
        share = torch.arange(count, device=rows.device) / along.new_tensor(count)
        around = (along + self.area[rows, None].sign() * share * length).remainder(length)
        begin, end = (along - back[:, None]).clamp(min=0.0), (along + ahead[:, None]).minimum(length)
        onwards = begin + (end - begin) * share * (count / (count - 1))
        at = self.starts[self.first[rows], None] + torch.where(self.closed[rows, None], around, onwards)
        row = torch.searchsorted(self.ends, at, right=True).maximum(self.first[rows, None]).minimum(self.last[rows, None])
        span = self.ends[row] - self.starts[row]
        part = torch.where(span > 0.0, (at - self.starts[row]) / span, 0.0).clamp(0.0, 1.0)
        return self.points[row] + part[..., None] * self.step[row]


# -- grids -------------------------------------------------------------------------------------------------------------


def winding(
    start: Float[Tensor, "E 2"], end: Float[Tensor, "E 2"], turn: Int[Tensor, " E"], slot: Int[Tensor, " E"], shape: tuple[int, int, int]
) -> Int[Tensor, "S X Y"]:
    """How often edges that count `turn` times, each in one of S slots, go around the whole-numbered points (i, j), counter-clockwise.

    Along a row of equal i the winding number changes where an edge crosses the row: note the changes, then add them up. The cost is that
    of the crossings, whatever the number of polygons.
    """
    slots, rows, columns = shape
    rises = (end[:, 0] > start[:, 0])[:, None]
    low, high = torch.where(rises, start, end), torch.where(rises, end, start)
    first, last = (low[:, 0].floor() + 1.0).clamp(0, rows), high[:, 0].floor().clamp(-1, rows - 1)
    counts = (last - first + 1.0).clamp(min=0.0).long()
    edge = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    row = first[edge] + (torch.arange(len(edge), device=edge.device) - (counts.cumsum(0) - counts)[edge])
    slope = (high[:, 1] - low[:, 1]) / (high[:, 0] - low[:, 0])
    crossing = low[edge, 1] + (row - low[edge, 0]) * slope[edge]
    column = (crossing.floor() + 1.0).clamp(0, columns).long()
    changes = torch.zeros(slots * rows * (columns + 1), dtype=torch.int32, device=start.device)
    places = (slot[edge] * rows + row.long()) * (columns + 1) + column
    changes.index_add_(0, places, torch.where(rises[:, 0], turn, -turn)[edge].to(torch.int32))
    return changes.view(slots, rows, columns + 1).cumsum(-1, dtype=torch.int32)[..., :-1]
