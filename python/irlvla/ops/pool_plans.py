"""Plans of voxel pooling: which pixel of a camera at which depth lies in which cell, as runs of points in the order of both."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from irlvla.errors import InputError
from irlvla.ops.frustums import MAX_ROWS, Frustum, Grid, cells_of, rigs_of

CACHE_BYTES = 2**27  #: of plans kept for the next batch
AT_ONCE = {"cpu": 2**19, "cuda": 2**24}  #: points whose cells are found together, at some 25 bytes each


@dataclass(frozen=True, eq=False, repr=False)
class VoxelPoolPlan:
    """Which pixel at which depth lies in which cell, for rigs of N cameras (see csrc/voxel_pool.h).

    It is the same, bit for bit, whichever device built it. `build` keeps the plans of the rigs that it met last, so that to
    build one again costs next to nothing.
    """

    grid: Grid
    samples: int  # 1: shared by all samples of a batch
    cameras: int
    bins: int
    height: int
    width: int
    cell_start: Int[Tensor, " samples*cells+1"]
    cell_order: Int[Tensor, " samples*cells"]  # a sample's cells by `weight` of their first run, empty cells last
    cell_runs: Int[Tensor, "R 2"]  # int32 pairs: CellRun
    column_start: Int[Tensor, " samples*cameras*width+1"]
    column_runs: Int[Tensor, "R 2"]  # int32 pairs: ColumnRun

    @classmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def build(
        cls,
        intrinsics: Float[Tensor, "N 3 3"] | Float[Tensor, "B N 3 3"],
        camera_to_ego: Float[Tensor, "N 4 4"] | Float[Tensor, "B N 4 4"],
        feature_size: tuple[int, int],
        depths: Float[Tensor, " D"] | Sequence[float],
        grid: Grid,
        *,
        image_size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
    ) -> VoxelPoolPlan:
        """The plan of a rig that all samples of a batch share, or of one rig per sample.

        Exact for any pinhole cameras: scaled, cropped, flipped and turned images are other intrinsics; turned or mirrored scenes
        are other poses. Points behind a camera or outside of the grid belong to no cell. Geometry is float64.

        Args:
            intrinsics: (u, v, 1) ~ K (x, y, z); the centre of the first pixel is (0, 0); x right, y down, z forward.
            camera_to_ego: from the frame of each camera to that of the grid. It must keep distances.
            feature_size: height and width of the features.
            depths: metres along the optical axis, one per bin (see `depth_bins`).
            image_size: height and width of the images that the intrinsics refer to: the ray of a feature goes through the middle
                of the patch that it covers. None: they refer to the features themselves.
            device: where the plan is wanted; by default where `intrinsics` are. Matrices on a GPU are waited for.

        Raises:
            InputError: a wrong shape, a value that is not finite, no pinhole camera, a pose that is not rigid, or a size that is
                too large for a plan.
        """
        if device is None:
            device = intrinsics.device if isinstance(intrinsics, Tensor) else "cpu"
        rigs = rigs_of(intrinsics, camera_to_ego)
        frustum = Frustum.of(rigs.shape[1], feature_size, depths, grid, image_size)
        with torch.inference_mode(False):  # a plan that is kept may be differentiated through later
            return _plan(rigs, frustum, _whole(torch.device(device)))

    @property
    def device(self) -> torch.device:
        return self.cell_runs.device

    @property
    def points(self) -> int:
        """How many pairs of a pixel and a depth lie in the grid."""
        return int((self.cell_runs[:, 1] & 0xFF).sum())

    def __len__(self) -> int:
        """How many runs there are."""
        return len(self.cell_runs)

    def __repr__(self) -> str:
        pixels, cells = f"{self.cameras} x {self.height} x {self.width} pixels", f"{self.grid.shape[0]} x {self.grid.shape[1]} cells"
        samples = "one rig" if self.samples == 1 else f"{self.samples} rigs"
        return (
            f"VoxelPoolPlan({pixels} at {self.bins} depths to {cells}, {samples}: {self.points} points in {len(self)} runs, {self.device})"
        )

    def to(self, device: torch.device | str) -> VoxelPoolPlan:
        """The same plan on another device."""
        start, order, runs, column_start, column_runs = (tensor.to(device) for tensor in self.tables)
        return replace(self, cell_start=start, cell_order=order, cell_runs=runs, column_start=column_start, column_runs=column_runs)

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Its tensors, in the order of csrc/voxel_pool.h."""
        return self.cell_start, self.cell_order, self.cell_runs, self.column_start, self.column_runs


# --- building -----------------------------------------------------------------------------------------------------------


def _whole(device: torch.device) -> torch.device:
    """With its index: "cuda" may mean another one tomorrow."""
    if device.type not in AT_ONCE:
        raise InputError(f"device {device} is not supported; use cpu or cuda")
    return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device


def _plan(rigs: Float[Tensor, "B N 25"], frustum: Frustum, device: torch.device) -> VoxelPoolPlan:
    """From the cache, as far as it goes. If all rigs are the same, one plan serves them all."""
    keys = [(frustum, device, rig.numpy().tobytes()) for rig in rigs]
    plans = _cache.find(keys)
    new = {key: rig for key, rig in zip(keys, rigs, strict=True) if key not in plans}
    for key, plan in zip(new, _build(list(new.values()), frustum, device), strict=True):
        plans[key] = _cache.keep(key, plan)
    return _concatenate([plans[key] for key in keys]) if len(plans) > 1 else plans[keys[0]]


def _build(rigs: Sequence[Float[Tensor, "N 25"]], frustum: Frustum, device: torch.device) -> list[VoxelPoolPlan]:
    """The plan of each rig: on a GPU of many at once, as many as memory allows; on a CPU one by one, which stays in its caches."""
    points = frustum.cameras * frustum.height * frustum.width * len(frustum.depths)
    at_once = max(1, AT_ONCE[device.type] // max(points, frustum.grid.cells))
    plans = []
    for first in range(0, len(rigs), at_once):
        some = rigs[first : first + at_once]
        plans += _split(_from_cells(cells_of(torch.cat(list(some)), frustum, device), len(some), frustum))
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # whoever finds them in the cache may be on another stream
    return plans


def _from_cells(cells: Int[Tensor, "samples*N W D H"], samples: int, frustum: Frustum) -> VoxelPoolPlan:
    """A plan from the cell of each point."""
    bins, height, width, columns = len(frustum.depths), frustum.height, frustum.width, frustum.cameras * frustum.width
    bounds = torch.ones_like(cells, dtype=torch.bool)  # where runs start, or what lies between them
    torch.ne(cells[..., 1:], cells[..., :-1], out=bounds[..., 1:])
    bounds[..., MAX_ROWS:] = True
    start = bounds.flatten().nonzero()[:, 0]
    cell, length = cells.flatten()[start], torch.diff(start, append=start.new_full((1,), cells.numel()))
    inside = (cell >= 0).nonzero()[:, 0]
    cell, start, length = cell[inside], start[inside].int(), length[inside].int()
    line = start // height  # of points: a pixel column at a bin
    row, column = start - line * height, line // bins
    sample, bin = column // columns, line - column * bins
    weight, of_sample = start - sample * (columns * bins * height), column - sample * columns
    feature = (of_sample // width * (height - 1) + row) * width + of_sample
    owner = cell + sample * frustum.grid.cells
    order = owner.sort(stable=True).indices
    cell_start = _offsets(owner, samples * frustum.grid.cells)
    return VoxelPoolPlan(
        grid=frustum.grid,
        samples=samples,
        cameras=frustum.cameras,
        bins=bins,
        height=height,
        width=width,
        cell_start=cell_start,
        cell_order=_by_first_run(owner, order, cell_start, frustum.grid.cells),
        cell_runs=torch.stack([weight, feature << 8 | length], -1)[order],
        column_start=_offsets(column, samples * columns),
        column_runs=torch.stack([cell, bin | row << 16 | length << 24], -1),
    )


def _offsets(owner: Int[Tensor, " R"], count: int) -> Int[Tensor, " count+1"]:
    """Where the runs of each owner start."""
    return torch.nn.functional.pad(torch.bincount(owner, minlength=count).cumsum(0), (1, 0)).int()


def _by_first_run(owner: Int[Tensor, " R"], order: Int[Tensor, " R"], start: Int[Tensor, " M+1"], cells: int) -> Int[Tensor, " M"]:
    """The cells of each sample as its runs meet them; those that none meets last."""
    met = start.diff() > 0
    first = torch.zeros_like(owner, dtype=torch.bool)
    first[order[start[:-1][met]]] = True
    visited = torch.cat([owner[first], (~met).nonzero()[:, 0].int()])
    return visited[(visited // cells).sort(stable=True).indices] % cells


def _split(plan: VoxelPoolPlan) -> list[VoxelPoolPlan]:
    """The plan of each sample."""
    if plan.samples == 1:
        return [plan]
    cells, columns = plan.grid.cells, plan.cameras * plan.width
    runs = plan.cell_start[::cells].tolist()

    def one(sample: int) -> VoxelPoolPlan:
        first, last = runs[sample : sample + 2]
        return replace(
            plan,
            samples=1,
            cell_start=plan.cell_start[sample * cells : (sample + 1) * cells + 1] - first,
            cell_order=plan.cell_order[sample * cells : (sample + 1) * cells].clone(),
            cell_runs=plan.cell_runs[first:last].clone(),
            column_start=plan.column_start[sample * columns : (sample + 1) * columns + 1] - first,
            column_runs=plan.column_runs[first:last].clone(),
        )

    return [one(sample) for sample in range(plan.samples)]


def _concatenate(plans: Sequence[VoxelPoolPlan]) -> VoxelPoolPlan:
    """The plan of a batch, from one per sample."""
    runs = [0, *itertools.accumulate(map(len, plans))]
    if runs[-1] >= 2**31:
        raise InputError(f"the plan of a batch has fewer than 2**31 runs, got {runs[-1]}: take smaller batches")
    before = torch.tensor(runs, dtype=torch.int32, device=plans[0].device)

    def shifted(starts: list[Tensor]) -> Tensor:
        return torch.cat([(torch.stack(starts)[:, :-1] + before[:-1, None]).flatten(), before[-1:]])

    return replace(
        plans[0],
        samples=len(plans),
        cell_start=shifted([plan.cell_start for plan in plans]),
        cell_order=torch.cat([plan.cell_order for plan in plans]),
        cell_runs=torch.cat([plan.cell_runs for plan in plans]),
        column_start=shifted([plan.column_start for plan in plans]),
        column_runs=torch.cat([plan.column_runs for plan in plans]),
    )


class _Cache:
    """The plans of single rigs that were used last, up to a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self._plans: OrderedDict[Hashable, VoxelPoolPlan] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._plans)

    def find(self, keys: Iterable[Hashable]) -> dict[Hashable, VoxelPoolPlan]:
        """What there is of them."""
        found = {}
        with self._lock:
            for key in keys:
                if key in self._plans:
                    self._plans.move_to_end(key)
                    found[key] = self._plans[key]
        for plan in found.values():
            if plan.device.type == "cuda":  # it may be forgotten while the stream of this caller still reads it
                for tensor in plan.tables:
                    tensor.record_stream(torch.cuda.current_stream(plan.device))
        return found

    def keep(self, key: Hashable, plan: VoxelPoolPlan) -> VoxelPoolPlan:
        """The plan itself, or that of another thread which was faster."""
        with self._lock:
            if key not in self._plans:
                self._plans[key] = plan
                self.bytes += _bytes(plan)
            kept = self._plans[key]
            while self.bytes > self.limit:
                self.bytes -= _bytes(self._plans.popitem(last=False)[1])
        return kept

    def clear(self) -> None:
        with self._lock:
            self._plans.clear()
            self.bytes = 0


def _bytes(plan: VoxelPoolPlan) -> int:
    return sum(tensor.nbytes for tensor in plan.tables)


_cache = _Cache(CACHE_BYTES)
