"""Plans of voxel pooling against geometry done point by point, and pooling against a plain sum in float64."""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import math
import pickle
import threading
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irlvla import ops
from irlvla.errors import InputError
from irlvla.ops import Grid, VoxelPoolPlan, depth_bins, pool_plans, reference
from irlvla.synthetic.cameras import NAVSIM_RIG, mounted

IMAGE = (256, 704)
SMALL = Grid((-8.0, 8.0, 1.0), (-6.0, 6.0, 1.5), (-2.0, 2.0))


@pytest.fixture(autouse=True)
def empty_cache():
    pool_plans._cache.clear()


# -- rigs --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of VoxelPoolPlan.build."""

    intrinsics: torch.Tensor
    camera_to_ego: torch.Tensor
    feature_size: tuple[int, int]
    depths: torch.Tensor
    grid: Grid = dataclasses.field(default_factory=Grid)
    image_size: tuple[int, int] | None = None

    def build(self, **changes) -> VoxelPoolPlan:
        return VoxelPoolPlan.build(**{**dataclasses.asdict(self), "grid": self.grid, **changes})

    def cells(self) -> torch.Tensor:
        """Of the points "B N D H W", by the reference."""
        matrices = [m if m.dim() == 4 else m[None] for m in (self.intrinsics, self.camera_to_ego)]
        points = [reference.points_of(k, pose, self.feature_size, self.depths, self.image_size) for k, pose in zip(*matrices, strict=True)]
        return reference.cells_of(torch.stack(points), self.grid)


def navsim(depths=None, grid=None, size=(16, 44)) -> Case:
    rig = NAVSIM_RIG.resized(*IMAGE)
    k, pose = torch.from_numpy(rig.intrinsics), torch.from_numpy(rig.camera_to_ego)
    return Case(k, pose, size, depth_bins() if depths is None else depths, grid or Grid(), IMAGE)


@st.composite
def cases(draw, batch=False) -> Case:
    """Cameras anywhere, looking anywhere, with intrinsics as augmentation leaves them; grids and bins of any shape."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = ([draw(st.integers(2, 4))] if batch else []) + [draw(st.integers(1, 4))]
    height, width, bins = draw(st.integers(1, 12)), draw(st.integers(1, 8)), draw(st.integers(1, 9))
    tilt = draw(st.sampled_from([0.0, 2.0, 180.0]))  # level, as cars are driven, anyhow
    k, poses = np.zeros((*shape, 3, 3)), np.zeros((*shape, 4, 4))
    for index in np.ndindex(*shape):
        focal = rng.uniform(0.3, 2.0, 2) * width * rng.choice([-1.0, 1.0], 2, p=[0.2, 0.8])
        k[index] = [[focal[0], rng.normal() * 0.1, rng.uniform(0, width)], [0, focal[1], rng.uniform(0, height)], [0, 0, 1]]
        if draw(st.booleans()):
            angle = rng.normal() * 0.2
            k[index] = (
                np.array([[np.cos(angle), -np.sin(angle), 1], [np.sin(angle), np.cos(angle), -1], [0.0, 0.1 * rng.normal(), 1]]) @ k[index]
            )
        poses[index] = mounted(rng.uniform(-180, 180), *rng.uniform(-tilt, tilt, 2), *rng.normal(size=3))
    low, step = rng.integers(-8, 0, 2), rng.choice([0.5, 0.75, 2.0], 2)
    x, y = ((float(low[i]), float(low[i] + step[i] * rng.integers(1, 20)), float(step[i])) for i in range(2))
    grid = Grid(x, y, (-draw(st.sampled_from([0.5, 4.0])), 3.0))
    depths = np.sort(rng.uniform(-1.0, 9.0, bins)) if draw(st.booleans()) else 1.0 + np.arange(bins)
    size = draw(st.sampled_from([None, (4 * height, 4 * width)]))
    if size:
        k = np.diag([4.0, 4.0, 1.0]) @ k
    return Case(torch.from_numpy(k), torch.from_numpy(poses), (height, width), torch.from_numpy(depths), grid, size)


# -- what a plan holds -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Runs:
    """Records of a plan, one per run, in the order in which they are stored."""

    sample: np.ndarray
    cell: np.ndarray
    camera: np.ndarray
    column: np.ndarray
    bin: np.ndarray
    row: np.ndarray
    length: np.ndarray

    def table(self, *order: str) -> np.ndarray:
        return np.stack([getattr(self, name) for name in order], 1)

    def cells(self, plan: VoxelPoolPlan) -> np.ndarray:
        """The cell of each point "B N D H W", -1 where it has none; it may not have two."""
        cells = np.full((plan.samples, plan.cameras, plan.bins, plan.height, plan.width), -1)
        for step in range(self.length.max(initial=0)):
            longer = self.length > step
            places = tuple(a[longer] for a in (self.sample, self.camera, self.bin, self.row + step, self.column))
            assert (cells[places] == -1).all()
            cells[places] = self.cell[longer]
        return cells


def runs_by_cell(plan: VoxelPoolPlan) -> Runs:
    record = plan.cell_runs.cpu().numpy()
    owner = np.repeat(np.arange(plan.samples * plan.grid.cells), np.diff(plan.cell_start.cpu().numpy()))
    packed = record[:, 1].view(np.uint32).astype(np.int64)
    line, row = np.divmod(record[:, 0].astype(np.int64), plan.height)
    column, bin = np.divmod(line, plan.bins)
    camera, u = np.divmod(column, plan.width)
    assert np.array_equal(packed >> 8, (camera * plan.height + row) * plan.width + u)
    return Runs(*np.divmod(owner, plan.grid.cells), camera, u, bin, row, packed & 255)


def runs_by_column(plan: VoxelPoolPlan) -> Runs:
    record = plan.column_runs.cpu().numpy()
    owner = np.repeat(np.arange(plan.samples * plan.cameras * plan.width), np.diff(plan.column_start.cpu().numpy()))
    packed = record[:, 1].view(np.uint32).astype(np.int64)
    sample, column = np.divmod(owner, plan.cameras * plan.width)
    return Runs(sample, record[:, 0], *np.divmod(column, plan.width), packed & 0xFFFF, packed >> 16 & 255, packed >> 24)


def check(plan: VoxelPoolPlan, case: Case) -> None:
    """Both tables hold exactly the points of the reference, as the longest runs, in the order that csrc/voxel_pool.h promises."""
    expected = case.cells().numpy()
    assert plan.samples in (1, len(expected))
    expected = expected[: plan.samples]
    assert plan.points == (expected >= 0).sum()
    for table in plan.tables:
        assert table.dtype == torch.int32
        assert table.is_contiguous()
    for runs, order in (
        (runs_by_cell(plan), ("sample", "cell", "camera", "column", "bin", "row")),
        (runs_by_column(plan), ("sample", "camera", "column", "bin", "row")),
    ):
        assert len(runs.cell) == len(plan)
        np.testing.assert_array_equal(runs.cells(plan), expected)
        table = runs.table(*order)
        assert np.array_equal(table, np.unique(table, axis=0))  # strictly rising
    here, before = slice(1, None), slice(None, -1)  # of runs by column, the last ones
    line = runs.table("sample", "camera", "column", "bin", "cell")
    touching = (line[here] == line[before]).all(1) & (runs.row[here] == runs.row[before] + runs.length[before])
    assert (runs.row[here][touching] == 255).all()
    check_order(plan)


def check_order(plan: VoxelPoolPlan) -> None:
    """Cells are visited by their first run, empty ones last."""
    start, runs, order = (t.cpu().numpy() for t in (plan.cell_start, plan.cell_runs, plan.cell_order))
    for sample, visited in enumerate(order.reshape(plan.samples, -1)):
        assert np.array_equal(np.sort(visited), np.arange(plan.grid.cells))
        owner = visited + sample * plan.grid.cells
        empty = start[owner] == start[owner + 1]
        assert np.array_equal(empty, np.sort(empty))
        assert (np.diff(runs[start[owner[~empty]], 0]) > 0).all()


@settings(max_examples=150)
@given(cases())
def test_plan_of_any_rig(case):
    pool_plans._cache.clear()
    check(case.build(), case)


@settings(max_examples=50)
@given(cases(batch=True))
def test_plan_of_rigs_that_differ(case):
    pool_plans._cache.clear()
    plan = case.build()
    assert plan.samples == len(case.intrinsics)
    check(plan, case)


def test_plan_of_navsim(device):
    case = navsim()
    plan = case.build(device=device)
    assert plan.device.type == device
    check(plan, case)
    assert plan.points > 5 * len(plan) > 50_000  # runs pay
    assert repr(plan) == (
        "VoxelPoolPlan(8 x 16 x 44 pixels at 59 depths to 128 x 128 cells, one rig: "
        f"{plan.points} points in {len(plan)} runs, {plan.device})"
    )


def test_every_device_builds_the_same_plan(device):
    case = navsim(depth_bins(0.5, 60.0, 0.5))
    here, there = case.build(), case.build(device=device)
    for a, b in zip(here.tables, there.tables, strict=True):
        assert torch.equal(a, b.cpu())
    assert all(torch.equal(a, b) for a, b in zip(here.to(device).tables, there.tables, strict=True))


def test_points_on_borders():
    """A camera that looks along x from the middle of a cell: depths put points on borders, which belong to the cell above."""
    pose = torch.from_numpy(mounted(0, 0, 0, 0.0, 0.0, 0.0)).round()
    grid = Grid((-1.0, 3.0, 1.0), (-0.5, 0.5, 1.0), (0.0, 1.0))
    plan = VoxelPoolPlan.build(torch.eye(3)[None], pose[None], (1, 1), [0.5, 1.0, 2.0, 2.5, 3.0, 3.5], grid)
    assert runs_by_column(plan).table("bin", "cell").tolist() == [[0, 1], [1, 2], [2, 3], [3, 3]]
    above = VoxelPoolPlan.build(torch.eye(3)[None], pose[None], (1, 1), [0.5], Grid(grid.x, grid.y, (-1.0, 0.0)))
    assert len(above) == 0


def test_points_are_where_pixels_look():
    """Projected back, each point is in the middle of the patch that its feature covers, at its depth."""
    case = navsim()
    k, pose = case.intrinsics, case.camera_to_ego
    points = reference.points_of(k, pose, (16, 44), case.depths, IMAGE)
    seen = torch.einsum("nji,ndhwj->ndhwi", pose[:, :3, :3], points - pose[:, None, None, None, :3, 3])
    torch.testing.assert_close(seen[..., 2], case.depths[:, None, None].expand(8, -1, 16, 44), rtol=0, atol=1e-12)
    pixels = torch.einsum("nij,ndhwj->ndhwi", k, seen / seen[..., 2:])
    u, v = 16.0 * torch.arange(44) + 7.5, 16.0 * torch.arange(16) + 7.5
    torch.testing.assert_close(pixels[..., 0], u.double().expand(8, 59, 16, 44), rtol=0, atol=1e-9)
    torch.testing.assert_close(pixels[..., 1], v.double()[:, None].expand(8, 59, 16, 44), rtol=0, atol=1e-9)


def test_augmented_images_show_the_same_world():
    """Scaled or mirrored images with intrinsics that follow give the points of the original ones, elsewhere in the image."""
    case = navsim()
    cells = case.cells()
    halved = torch.tensor([[0.5, 0, -0.25], [0, 0.5, -0.25], [0, 0, 1]], dtype=torch.float64) @ case.intrinsics
    same = dataclasses.replace(case, intrinsics=halved, image_size=(128, 352))
    assert torch.equal(torch.from_numpy(runs_by_cell(same.build()).cells(same.build())), cells)
    flipped = torch.tensor([[-1.0, 0, 703], [0, 1, 0], [0, 0, 1]], dtype=torch.float64) @ case.intrinsics
    mirrored = dataclasses.replace(case, intrinsics=flipped)
    agree = torch.from_numpy(runs_by_cell(mirrored.build()).cells(mirrored.build())).flip(-1) == cells
    assert agree.double().mean() > 0.9999  # but for what lies on the border of a cell


def test_a_mirrored_scene():
    """A pose that mirrors the ego frame is legal: cells are those of the plain scene, left and right exchanged."""
    case = navsim(depths=depth_bins() + 0.0371)
    mirror = torch.diag(torch.tensor([1.0, -1.0, 1.0, 1.0], dtype=torch.float64))
    mirrored, plain = dataclasses.replace(case, camera_to_ego=mirror @ case.camera_to_ego).cells(), case.cells()
    check(
        dataclasses.replace(case, camera_to_ego=mirror @ case.camera_to_ego).build(),
        dataclasses.replace(case, camera_to_ego=mirror @ case.camera_to_ego),
    )
    assert torch.equal(mirrored >= 0, plain >= 0)
    assert torch.equal((mirrored // 128)[plain >= 0], (plain // 128)[plain >= 0])
    assert torch.equal((mirrored % 128)[plain >= 0], (127 - plain % 128)[plain >= 0])


def test_behind_the_camera():
    """Depths that are not positive, and pixels of a homography that look back."""
    case = navsim(depths=torch.tensor([-5.0, 0.0, 5.0]))
    assert set(runs_by_column(case.build()).bin) == {2}
    check(case.build(), case)
    turn = torch.eye(3, dtype=torch.float64)
    turn[2, 0] = 1.0 / 400.0  # the right part of the image is beyond the horizon of the plane on which it is drawn
    turned = dataclasses.replace(case, intrinsics=turn @ case.intrinsics)
    check(turned.build(), turned)
    assert 20 < runs_by_column(turned.build()).column.max() <= 24
    assert turned.build().points > 0


def test_empty_plan():
    case = navsim(grid=Grid((200.0, 210.0, 1.0), (0.0, 5.0, 1.0)))
    plan = case.build()
    check(plan, case)
    assert (len(plan), plan.points) == (0, 0)
    assert case.build() is plan  # found, though it is empty
    both = case.build(intrinsics=torch.stack([case.intrinsics, 1.1 * case.intrinsics]))
    assert (len(both), both.samples) == (0, 2)


@pytest.mark.parametrize("rows", [1, 254, 255, 256])
def test_longest_runs(rows):
    """A camera whose columns lie in one cell each: runs as long as a byte allows."""
    pose = torch.from_numpy(mounted(0, 0, 0, 0.0, 0.0, 0.0))[None]
    k = torch.tensor([[[2000.0, 0, 1], [0, 2000.0, rows / 2], [0, 0, 1]]])
    case = Case(k, pose, (rows, 3), torch.tensor([4.0, 7.0]), SMALL)
    check(case.build(), case)
    assert sorted(set(runs_by_cell(case.build()).length)) == ([rows] if rows < 256 else [1, 255])


# -- sharing and keeping -----------------------------------------------------------------------------------------------


def test_same_rigs_share_a_plan():
    case = navsim()
    one = case.build()
    assert one.samples == 1
    assert case.build(intrinsics=case.intrinsics.expand(4, -1, -1, -1), camera_to_ego=case.camera_to_ego.expand(4, -1, -1, -1)) is one
    assert case.build(intrinsics=case.intrinsics.numpy(), depths=tuple(case.depths.tolist())) is one
    assert len(pool_plans._cache) == 1


def test_few_rigs_in_random_order(monkeypatch):
    """Rigs met before are not built again, whatever batch they come in, and a batch is its samples' plans after each other."""
    case = navsim(depths=depth_bins(1.0, 21.0, 1.0))
    rigs = torch.stack([scale * case.intrinsics for scale in (1.0, 1.1, 1.2)])
    for i in (2, 0, 1):
        case.build(intrinsics=rigs[i])
    monkeypatch.setattr(pool_plans, "cells_of", None)
    for order in ([0, 1, 2], [2, 2, 0, 1, 0], [1]):
        batch = dataclasses.replace(case, intrinsics=rigs[order], camera_to_ego=case.camera_to_ego[None])
        check(batch.build(), dataclasses.replace(batch, camera_to_ego=case.camera_to_ego.expand(len(order), -1, -1, -1)))


@given(cases(batch=True))
@settings(max_examples=30)
def test_rigs_built_together(case):
    """As on a GPU: the plans of all rigs at once are the plans of each."""
    pool_plans._cache.clear()
    one_by_one = case.build()
    for limit in (2**24, 2 * one_by_one.cameras * one_by_one.height * one_by_one.width * one_by_one.bins):
        pool_plans._cache.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(pool_plans.AT_ONCE, "cpu", limit)
            together = case.build()
        assert all(torch.equal(a, b) for a, b in zip(one_by_one.tables, together.tables, strict=True))


def test_anything_else_is_another_plan():
    case = navsim(depths=torch.tensor([5.0, 10.0]))
    moved = case.camera_to_ego.clone()
    moved[7, 2, 3] += 1e-12
    changes = [{}, {"camera_to_ego": moved}, {"depths": [5.0, 10.5]}, {"feature_size": (8, 22)}, {"image_size": (255, 704)}]
    changes += [{"grid": Grid(z=(-5.0, 4.0))}, {"grid": Grid(x=(0.0, 51.2, 0.8))}, {"image_size": None}]
    plans = [case.build(**change) for change in changes]
    assert len({id(plan) for plan in plans}) == len(pool_plans._cache) == len(changes)
    assert [case.build(**change) for change in changes] == plans


def test_cache_is_bounded(monkeypatch):
    case = navsim(depths=torch.tensor([5.0, 10.0]), grid=Grid((-8.0, 8.0, 0.5), (-8.0, 8.0, 0.5)))
    plan = case.build()
    size = sum(table.nbytes for table in plan.tables)
    monkeypatch.setattr(pool_plans._cache, "limit", int(3.5 * size))
    for shift in range(1, 10):
        case.build(depths=[5.0, 10.0 + 0.001 * shift])
        assert case.build(depths=[5.0, 10.0]) is plan, "what is used stays"
        assert pool_plans._cache.bytes <= pool_plans._cache.limit
    assert len(pool_plans._cache) == 3
    monkeypatch.setattr(pool_plans._cache, "limit", size // 2)
    large = case.build(depths=[6.0])
    assert len(pool_plans._cache) == pool_plans._cache.bytes == 0, "what is too large is not kept"
    assert case.build(depths=[6.0]) is not large


def test_threads_share_the_cache():
    case, found = navsim(), []
    threads = [threading.Thread(target=lambda: found.append(case.build())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert {id(plan) for plan in found} == {id(case.build())}


def test_plans_made_without_gradients_serve_training():
    case = navsim(depths=torch.tensor([5.0, 10.0]))
    with torch.inference_mode():
        case.build()
        case.build(intrinsics=torch.stack([case.intrinsics, 2 * case.intrinsics]))
    for changes in ({}, {"intrinsics": torch.stack([2 * case.intrinsics, case.intrinsics])}):
        assert not any(table.is_inference() for table in case.build(**changes).tables)


# -- errors ------------------------------------------------------------------------------------------------------------


def with_entry(matrix: torch.Tensor, index: tuple[int, ...], value: float) -> torch.Tensor:
    changed = matrix.clone()
    changed[index] = value
    return changed


K, POSE = navsim().intrinsics, navsim().camera_to_ego


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intrinsics": K[0]}, r"intrinsics must have shape \(cameras, 3, 3\) or \(batch, cameras, 3, 3\), got \(3, 3\)"),
        ({"intrinsics": POSE}, r"intrinsics must have shape .* got \(8, 4, 4\)"),
        ({"camera_to_ego": POSE[:, :3]}, r"camera_to_ego must have shape .* got \(8, 3, 4\)"),
        ({"intrinsics": K[:0], "camera_to_ego": POSE[:0]}, r"got \(0, 3, 3\)"),
        ({"camera_to_ego": POSE[:7]}, "intrinsics are of 1 rigs of 8 cameras, camera_to_ego of 1 rigs of 7"),
        ({"intrinsics": K.expand(2, -1, -1, -1), "camera_to_ego": POSE.expand(3, -1, -1, -1)}, "2 rigs of 8 .* 3 rigs of 8"),
        ({"intrinsics": with_entry(K, (3, 0, 2), math.nan)}, "the matrices of camera 3 hold NaN"),
        ({"camera_to_ego": with_entry(POSE, (5, 0, 3), math.inf)}, "the matrices of camera 5 hold NaN, infinity"),
        ({"intrinsics": with_entry(K, (2, 1, 1), 0.0)}, "intrinsics of camera 2 are singular"),
        ({"camera_to_ego": with_entry(POSE, (1, 0, 2), 1.01)}, "camera_to_ego of camera 1 is not rigid"),
        ({"camera_to_ego": 1.05 * POSE}, "camera_to_ego of camera 0 is not rigid"),
        ({"camera_to_ego": POSE.mT}, "camera_to_ego of camera 0 must have the last row 0 0 0 1"),
        ({"feature_size": (0, 44)}, r"feature_size must be \(height, width\) \[pixels\], got \(0, 44\)"),
        ({"feature_size": 16}, "feature_size must be"),
        ({"image_size": (256,)}, "image_size must be"),
        ({"depths": []}, "depths must be finite numbers"),
        ({"depths": [1.0, math.nan]}, "depths must be finite numbers"),
        ({"depths": torch.ones(2, 2)}, "depths must be finite numbers"),
        ({"depths": torch.ones(2**16)}, "a plan has at most 65535 bins, got 65536"),
        ({"feature_size": (257, 4)}, "a plan has at most 256 rows of features, got 257"),
        ({"feature_size": (256, 2**14)}, "a plan has at most 16777216 features of all cameras, got 33554432"),
        ({"feature_size": (256, 2**13), "depths": torch.ones(128)}, "a plan has at most 2147483647 points of all cameras, got 2147483648"),
        ({"grid": (-51.2, 51.2, 0.8)}, "grid must be an irlvla.ops.Grid, got tuple"),
        ({"device": "meta"}, "device meta is not supported; use cpu or cuda"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(InputError, match=message):
        navsim().build(**changes)
    assert len(pool_plans._cache) == 0


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"x": (0.0, 10.0)}, r"a grid needs x as \(low, high, step\) \[m\], got \(0.0, 10.0\)"),
        ({"y": (0.0, math.inf, 1.0)}, "a grid needs y as"),
        ({"z": 3.0}, r"a grid needs z as \(low, high\) \[m\], got 3.0"),
        ({"x": (0.0, 10.0, 0.3)}, "a whole number of steps, at least one; 0 ... 10 in steps of 0.3 is none"),
        ({"x": (10.0, 0.0, 1.0)}, "a whole number of steps"),
        ({"y": (0.0, 10.0, 0.0)}, "a whole number of steps"),
        ({"z": (3.0, 3.0)}, "a whole number of steps"),
        ({"x": (0.0, 5e4, 1.0), "y": (0.0, 5e4, 1.0)}, "fewer than .* 50000 x 50000"),
    ],
)
def test_mistaken_grids(axes, message):
    with pytest.raises(InputError, match=message):
        Grid(**axes)


def test_grid():
    grid = Grid([-10, 30, 0.5], (-8.0, 8.0, 2.0), (-1, 2))
    assert (grid.shape, grid.cells, grid.range) == ((80, 8), 640, (-10.0, 30.0, -8.0, 8.0))
    assert grid == Grid((-10.0, 30.0, 0.5), (-8.0, 8.0, 2.0), (-1.0, 2.0))
    assert len({grid, Grid()}) == 2
    assert Grid().shape == (128, 128)


def test_depth_bins():
    assert depth_bins(1.0, 60.0, 1.0).tolist() == [1.5 + i for i in range(59)]
    assert len(depth_bins(1.0, 60.0, 0.5)) == 118
    for arguments in ((1.0, 60.0, 0.7), (-1.0, 60.0, 1.0), (5.0, 5.0, 1.0), (1.0, math.nan, 1.0), (1.0, 60.0, 0.0)):
        with pytest.raises(InputError):
            depth_bins(*arguments)


# -- pooling -----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1, 3), (2, 3, 5), (3, 2, 64), (1, 4, 80)]  # batch, cameras, channels


def inputs(case: Case, batch: int, channels: int, seed: int = 0, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cameras, (height, width) = case.intrinsics.shape[-3], case.feature_size
    features = torch.randn(batch, cameras, channels, height, width, generator=generator, dtype=dtype)
    return features, torch.randn(batch, cameras, len(case.depths), height, width, generator=generator, dtype=dtype)


@given(cases(), st.booleans())
@settings(max_examples=20)
def test_reference_sums_points(case, softmax):
    """Point by point, in Python; and torch's embedding_bag says the same."""
    features, depth = (a.double() for a in inputs(case, 2, 3))
    cells = case.cells()
    bev = reference.voxel_pool(features, depth, cells, case.grid.shape, softmax=softmax)
    weights = depth.softmax(2) if softmax else depth
    expected = torch.zeros(2, case.grid.cells, 3, dtype=torch.float64)
    for _, n, d, v, u in (cells >= 0).nonzero().tolist():
        expected[:, cells[0, n, d, v, u]] += weights[:, n, d, v, u, None] * features[:, n, :, v, u]
    torch.testing.assert_close(bev.permute(0, 2, 3, 1).flatten(1, 2), expected)
    bags = reference.bags_of(cells.expand(2, -1, -1, -1, -1), case.grid.cells)
    torch.testing.assert_close(reference.voxel_pool_in_bags(features, depth, bags, case.grid.shape, softmax=softmax), bev)


@pytest.mark.parametrize("softmax", [False, True])
def test_reference_differentiates(softmax):
    case = navsim(depths=torch.tensor([4.0, 11.0, 30.0]), grid=Grid((-32.0, 32.0, 16.0), (-40.0, 40.0, 8.0), (-5.0, 3.0)), size=(3, 4))
    features, depth = (a.double().requires_grad_() for a in inputs(case, 2, 2))
    cells = case.cells()
    assert (cells >= 0).sum() > 100
    assert torch.autograd.gradcheck(lambda f, d: reference.voxel_pool(f, d, cells, case.grid.shape, softmax=softmax), (features, depth))


def pooled(case: Case, features: torch.Tensor, depth: torch.Tensor, plan: VoxelPoolPlan, softmax: bool) -> None:
    """Forward and gradients of the op, against the reference in float64 on the same numbers.

    Errors are relative to the sum of what was added, without signs: 1e-6 in float32, and half a unit in the last place of a
    result that is rounded to fewer bits.
    """
    device, dtype = plan.device, features.dtype
    given = [a.to(device).detach().requires_grad_() for a in (features, depth)]
    exact = [a.detach().double().requires_grad_() for a in (features, depth)]
    bev = ops.voxel_pool(*given, plan, softmax=softmax)
    cells = case.cells()
    expected = reference.voxel_pool(*exact, cells, case.grid.shape, softmax=softmax)
    assert bev.shape == expected.shape
    assert bev.dtype == dtype
    assert bev.is_contiguous(memory_format=torch.channels_last) or not bev.numel()
    signless = [features.detach().double().abs(), depth.detach().double() if softmax else depth.detach().double().abs()]
    rounding = 1e-6 + {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]
    bound = rounding * reference.voxel_pool(*signless, cells, case.grid.shape, softmax=softmax) + 1e-7
    assert ((bev.cpu().double() - expected).abs() <= bound).all()
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    bev.backward(upstream.to(device))
    expected.backward(upstream.double())
    for ours, want in zip(given, exact, strict=True):
        assert ours.grad.dtype == dtype
        scale = want.grad.abs().amax() + 1e-12
        assert (ours.grad.cpu().double() - want.grad).abs().max() <= (2e-6 + 2 * (rounding - 1e-6)) * scale


@given(cases(), st.sampled_from([(1, 1), (2, 5), (1, 8), (3, 67)]), st.booleans())
@settings(max_examples=60)
def test_pooling_of_any_rig(case, sizes, softmax):
    batch, channels = sizes
    pooled(case, *inputs(case, batch, channels), case.build(), softmax)


@given(cases(batch=True), st.booleans())
@settings(max_examples=30)
def test_pooling_of_rigs_that_differ(case, softmax):
    pooled(case, *inputs(case, len(case.intrinsics), 12), case.build(), softmax)


COARSE = depth_bins(1.0, 61.0, 2.0)
RIGS = {
    "8 cameras": navsim(COARSE),
    "one camera": dataclasses.replace(navsim(COARSE), intrinsics=K[2:3], camera_to_ego=POSE[2:3]),
    "one bin": navsim(torch.tensor([12.0])),
    "not square": navsim(COARSE, Grid((-8.0, 56.0, 0.5), (-24.0, 24.0, 1.0), (-3.0, 5.0))),
    "nothing": navsim(COARSE, Grid((200.0, 210.0, 1.0), (0.0, 5.0, 1.0))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RIGS)
def test_pooling_of_real_rigs(name, dtype, device):
    case = RIGS[name]
    plan = case.build(device=device)
    for channels, softmax in ((20, False), (64, True)):
        pooled(case, *(a.to(dtype) for a in inputs(case, 1, channels)), plan, softmax)


# -- a recorded keyframe -----------------------------------------------------------------------------------------------


class OnlyNumbers(pickle.Unpickler):
    """Of what a pickle may call, the constructors of numpy's scalars."""

    CALLS: ClassVar = {
        ("_codecs", "encode"): codecs.encode,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "scalar"): np._core.multiarray.scalar,
    }

    def find_class(self, module, name):
        return self.CALLS[module, name]


@dataclasses.dataclass(frozen=True)
class Keyframe:
    """Six cameras of nuScenes and what the lidar measured, in the ego frame at the time of the lidar."""

    intrinsics: torch.Tensor
    camera_to_ego: torch.Tensor
    points: torch.Tensor


@pytest.fixture(scope="module")
def keyframe(shared_real) -> Keyframe:
    folder = shared_real / "nuscenes_6cam_mmdet3d/demo/data/nuscenes"
    with next(folder.glob("*.pkl")).open("rb") as file:
        frame = OnlyNumbers(file).load()["data_list"][0]
    lidar_to_ego, lidar_to_camera = (
        torch.tensor(m, dtype=torch.float64)
        for m in (frame["lidar_points"]["lidar2ego"], [camera["lidar2cam"] for camera in frame["images"].values()])
    )
    k = torch.tensor([camera["cam2img"] for camera in frame["images"].values()], dtype=torch.float64)
    points = np.fromfile(next(folder.glob("*LIDAR_TOP*.bin")), dtype=np.float32).reshape(-1, 5)[:, :3]
    ego = torch.from_numpy(points).double() @ lidar_to_ego[:3, :3].T + lidar_to_ego[:3, 3]
    return Keyframe(k, lidar_to_ego @ lidar_to_camera.inverse(), ego)


def test_lidar_lifted_through_the_cameras(keyframe, device):
    """Each lidar point, seen by a camera and lifted at its depth, comes to the cell in which the lidar has it.

    A feature stands for a patch of 12 x 16 pixels and a bin for 0.5 m of depth, so it may come out half a patch and half a bin
    away, and no more. Points that are further than that from the borders of their cell must come to the cell itself.
    """
    grid, bins, patch = Grid((-48.0, 48.0, 1.6), (-51.2, 51.2, 1.6), (-5.0, 3.0)), depth_bins(1.0, 60.0, 0.5), (12, 16)
    size = (900 // patch[0], 1600 // patch[1])
    case = Case(keyframe.intrinsics, keyframe.camera_to_ego, size, bins, grid, (900, 1600))
    rotation, origin = case.camera_to_ego[:, :3, :3], case.camera_to_ego[:, :3, 3]
    seen = torch.einsum("nji,npj->npi", rotation, keyframe.points - origin[:, None])
    depth = seen[..., 2]
    u, v = (torch.einsum("nij,npj->npi", case.intrinsics, seen)[..., :2] / depth[..., None] + 0.5).unbind(-1)
    camera, point = ((depth > 1.0) & (depth < 60.0) & (u >= 0) & (u < 1600) & (v >= 0) & (v < 900)).nonzero().T
    bin = (depth[camera, point] - 1.0) // 0.5
    where = (camera, bin.long(), v[camera, point].long() // patch[0], u[camera, point].long() // patch[1])
    assert len(point) > 15_000

    # How far it may come out from where it is, along x, y and z, and which points are sure of their cell even so.
    rays = rotation @ case.intrinsics.inverse()
    middle = torch.stack([where[3] * 16 + 7.5, where[2] * 12 + 5.5, torch.ones(len(point))], -1).double()
    direction = torch.einsum("pij,pj->pi", rays[camera], middle)
    half_patch = rays[camera].abs() @ torch.tensor([8.0, 6.0, 0.0], dtype=torch.float64)
    bound = 0.25 * direction.abs() + depth[camera, point, None] * half_patch + 1e-4
    true = keyframe.points[point]
    cell = reference.cells_of(true, grid)
    corners = [true + bound * torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1, 1), repeat=3)]
    sure = torch.stack([reference.cells_of(corner, grid) == cell for corner in corners]).all(0)
    assert sure.sum() > 5_000
    assert (cell[sure] >= 0).sum() > 3_000
    plan = case.build(device=device)
    assert torch.equal(torch.from_numpy(runs_by_cell(plan).cells(plan))[0][where][sure], cell[sure])

    # The same by pooling whole numbers with weight 1: sums are exact.
    pixel = (camera * size[0] + where[2]) * size[1] + where[3]
    chosen = torch.from_numpy(np.unique(np.where(sure, pixel, -1), return_index=True)[1][1:])
    features = torch.randint(-8, 9, (1, 6, 5, *size), generator=torch.Generator().manual_seed(0)).float()
    weights = torch.zeros(1, 6, len(bins), *size)
    camera, bin, row, column = (index[chosen] for index in where)
    weights[0, camera, bin, row, column] = 1.0
    cell, inside = cell[chosen], cell[chosen] >= 0
    expected = torch.zeros(grid.cells, 5).index_add(0, cell[inside], features[0, camera, :, row, column][inside])
    bev = ops.voxel_pool(features.to(device), weights.to(device), plan)
    assert torch.equal(bev.cpu()[0].flatten(1).T, expected)
    assert inside.sum() > 1_000
