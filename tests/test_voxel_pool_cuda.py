"""The CUDA kernels of voxel pooling: on the CPU by emulation, thread for thread, and on a GPU where there is one."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from irlvla import ops  # noqa: F401 (registers the ops)

HERE = Path(__file__).parent
FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
NUMBERS = {FLOAT: 0, HALF: 1, BFLOAT: 2}
EPSILON = {FLOAT: 2.0**-23, HALF: 2.0**-10, BFLOAT: 2.0**-7}
ACCURACY = 1e-6  # of sums in float32, relative to the sum of magnitudes


# --- on the CPU ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Sizes and types of a task."""

    channels: int = 80
    batch: int = 1
    samples: int = 1
    cameras: int = 2
    bins: int = 4
    height: int = 16
    width: int = 3
    cells: int = 40
    features: torch.dtype = BFLOAT
    depth: torch.dtype = BFLOAT
    weights: torch.dtype = FLOAT
    bev: torch.dtype = BFLOAT
    softmax: bool = True
    bins_last: bool = False
    in_place: bool = False  # depth lies as weights do, and serves as weights
    by_column: bool = False  # matrix products, however few cells there are
    shift: int = 0  # bytes by which tensors miss alignment
    hot: float = 0.2  # share of the runs in one cell
    seed: int = 0

    def __str__(self) -> str:
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in changed.items()) or "default"


def cells_of(case: Case, rng: np.random.Generator) -> np.ndarray:
    """The cell of each point, -1 for none: "samples cameras width bins height", in runs of random length."""
    shape = (case.samples, case.cameras, case.width, case.bins, case.height)
    cells = rng.integers(-1, case.cells, shape)
    cells[rng.random(shape) < case.hot] = case.cells // 2
    longer = rng.random(shape) < 0.7
    for v in range(1, case.height):
        cells[..., v] = np.where(longer[..., v], cells[..., v - 1], cells[..., v])
    return cells


def plan_of(case: Case, cells: np.ndarray) -> list[np.ndarray]:
    """The tables of csrc/voxel_pool.h PoolPlan, run by run."""
    runs = []
    for sample, camera, u, d in np.ndindex(cells.shape[:4]):
        line, v = cells[sample, camera, u, d], 0
        while v < case.height:
            end = v + 1
            while end < case.height and line[end] == line[v]:
                end += 1
            if line[v] >= 0:
                column = camera * case.width + u
                weight = (column * case.bins + d) * case.height + v
                feature = (camera * case.height + v) * case.width + u
                runs.append((sample, column, d, v, end - v, line[v], weight, feature))
            v = end
    table = np.array(runs, np.int64).reshape(-1, 8)
    sample, column, bins, first, length, cell, weight, feature = table.T
    by_cell = np.lexsort((weight, sample * case.cells + cell))
    cell_counts = np.bincount(sample * case.cells + cell, minlength=case.samples * case.cells)
    column_counts = np.bincount(sample * case.cameras * case.width + column, minlength=case.samples * case.cameras * case.width)
    order = []
    for s in range(case.samples):
        met = dict.fromkeys(cell[sample == s])  # runs come by weight
        order += [*met, *(c for c in range(case.cells) if c not in met)]
    tables = [
        np.concatenate([[0], np.cumsum(cell_counts)]),
        np.array(order),
        np.stack([weight, feature << 8 | length], -1)[by_cell],
        np.concatenate([[0], np.cumsum(column_counts)]),
        np.stack([cell, bins | first << 16 | length << 24], -1),
    ]
    return [t.astype(np.uint32).view(np.int32) for t in tables]


def lay_out(values: Tensor, bins_last: bool) -> Tensor:
    """Depth "B N D H W" with the strides of a case."""
    return values.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3) if bins_last else values.contiguous()


def in_memory(value: Tensor) -> Tensor:
    """The numbers of a dense tensor as they follow each other."""
    return value.as_strided((value.numel(),), (1,))


def nothing(*shape: int, dtype: torch.dtype) -> Tensor:
    """An output that nobody has written yet: NaN."""
    return torch.full(shape, torch.nan, dtype=dtype)


class Task:
    """A case with its inputs and the float64 reference, point by point."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        n, self.pixels = case, (case.batch, case.cameras, case.height, case.width)
        cells = cells_of(case, rng)
        self.tables = plan_of(case, cells)
        self.features = torch.from_numpy(rng.normal(size=(*self.pixels, n.channels))).to(case.features)
        depth = torch.from_numpy(rng.normal(size=(n.batch, n.cameras, n.bins, n.height, n.width)) * 2).to(case.depth)
        if not case.softmax:
            depth = depth.abs()
        self.depth = depth = self.ordered(depth).permute(0, 1, 3, 4, 2) if case.in_place else lay_out(depth, case.bins_last)
        self.weights = (depth.double().softmax(2) if case.softmax else depth.double()).to(case.weights)  # B N D H W
        self.bev_grad = torch.from_numpy(rng.normal(size=(n.batch, n.cells, n.channels))).to(case.bev)
        self.weights_grad = torch.from_numpy(rng.normal(size=self.weights.shape)).to(case.weights)
        points = torch.from_numpy(cells).permute(0, 1, 3, 4, 2).expand(n.batch, -1, -1, -1, -1)
        self.inside = points >= 0
        self.owner = (points + torch.arange(n.batch)[:, None, None, None, None] * n.cells).clamp(min=0)

    def ordered(self, values: Tensor) -> Tensor:
        """Values "B N D H W" in the layout of weights."""
        return values.permute(0, 1, 4, 2, 3).contiguous()

    def bev(self, weights: Tensor, features: Tensor) -> Tensor:
        volume = (weights * self.inside)[..., None] * features[:, :, None]
        sums = torch.zeros(self.case.batch * self.case.cells, self.case.channels, dtype=torch.float64)
        return sums.index_add(0, self.owner.flatten(), volume.flatten(0, 4)).view(self.case.batch, self.case.cells, -1)

    def gradients(self, weights: Tensor, features: Tensor, bev_grad: Tensor, weights_grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of features, weights and depth."""
        gathered = bev_grad.flatten(0, 1)[self.owner] * self.inside[..., None]
        of_weights = (gathered * features[:, :, None]).sum(-1) + weights_grad
        of_features = (gathered * weights[..., None]).sum(2)
        if not self.case.softmax:
            return of_features, of_weights, of_weights
        return of_features, of_weights, weights * (of_weights - (weights * of_weights).sum(2, keepdim=True))


class Emulation:
    """Runs tasks thread for thread."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder = program, folder

    def run(self, kind: int, order: int, task: Task, depth: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
        """`tensors` are those of csrc/voxel_pool.h in order, None where it has a null pointer; the last two are outputs."""
        case = task.case
        numbers = [NUMBERS[t] for t in (case.features, case.depth, case.weights, case.bev)]
        sizes = [case.batch, case.channels, case.samples, case.cameras, case.bins, case.height, case.width, case.cells]
        header = [kind, order, case.shift, case.softmax, *sizes, *numbers, *depth.stride()[1:], case.in_place]
        blobs = [t.tobytes() for t in task.tables]
        blobs += [None if t is None else in_memory(t).view(torch.uint8).numpy().tobytes() for t in tensors]
        with open(self.folder / "task", "wb") as file:
            file.write(np.array(header, np.int64).tobytes())
            for blob in blobs:
                file.write(np.int64(-1 if blob is None else len(blob)).tobytes() + (blob or b""))
        ran = subprocess.run([self.program, self.folder / "task", self.folder / "outputs"], stderr=subprocess.PIPE, text=True)
        if ran.returncode:
            raise RuntimeError(ran.stderr)
        data, at, outputs = bytearray((self.folder / "outputs").read_bytes()), 0, []
        for tensor in tensors[-2:]:
            if tensor is None:
                outputs.append(None)
                continue
            flat = torch.frombuffer(data, dtype=tensor.dtype, offset=at, count=tensor.numel())
            outputs.append(flat.as_strided(tensor.shape, tensor.stride()))
            at += tensor.nbytes
        return outputs

    def forward(self, task: Task, order: int = 0) -> tuple[Tensor, Tensor]:
        """Weights in the layout of depth, and the sums."""
        case = task.case
        weights = nothing(*task.ordered(task.weights).shape, dtype=case.weights)
        bev = nothing(case.batch, case.cells, case.channels, dtype=case.bev)
        weights, bev = self.run(1 if case.by_column else 0, order, task, task.depth, [task.features, task.depth, weights, bev])
        return weights.permute(0, 1, 3, 4, 2), bev

    def backward(self, task: Task, order: int = 0, weights_grad: bool = True, needed: tuple[bool, bool] = (True, True)) -> list[Tensor]:
        """Gradients of features and depth."""
        case = task.case
        features_grad = nothing(*task.features.shape, dtype=case.features) if needed[0] else None
        depth_grad = lay_out(nothing(*task.depth.shape, dtype=case.depth), case.bins_last)
        given = [task.features, task.ordered(task.weights), task.bev_grad, task.ordered(task.weights_grad) if weights_grad else None]
        return self.run(2, order, task, depth_grad, [*given, features_grad, depth_grad if needed[1] else None])


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    compiler = shutil.which("g++")
    version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout if compiler else "0"
    if compiler is None or int(version.split(".")[0]) < 12:
        pytest.skip("needs g++ 12, which has _Float16")
    folder = tmp_path_factory.mktemp("emulation")
    flags = ["-std=c++17", "-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fsanitize=address,alignment", "-fno-sanitize-recover=all"]
    program = folder / "program"
    subprocess.run([compiler, *flags, HERE / "voxel_pool_emulation.cpp", "-o", program], check=True)
    return Emulation(program, folder)


def assert_close(found: Tensor, expected: Tensor, size: Tensor, relative: float = ACCURACY) -> None:
    """Equal up to `relative` of the sum of magnitudes, and rounding to the type of `found`."""
    tiny = 2.0**-25 if found.dtype == HALF else 0.0
    error = (found.double() - expected).abs() - (EPSILON[found.dtype] / 2 * expected.abs() * (1 + 2 * relative) + relative * size + tiny)
    assert not found.isnan().any()
    assert float(error.max()) <= 0


def check_forward(task: Task, weights: Tensor, bev: Tensor, relative: float = ACCURACY) -> None:
    depth = task.depth.double()
    exact = depth.softmax(2) if task.case.softmax else depth
    assert_close(weights, exact, exact)
    values = weights.double(), task.features.double()
    assert_close(bev, task.bev(*values), task.bev(*(value.abs() for value in values)), relative)


def check_backward(task: Task, features_grad: Tensor, depth_grad: Tensor, weights_grad: bool, relative: float = ACCURACY) -> None:
    inputs = [x.double() for x in (task.weights, task.features, task.bev_grad, task.weights_grad * weights_grad)]
    expected, size = task.gradients(*inputs), task.gradients(*(x.abs() for x in inputs))
    assert_close(features_grad, expected[0], size[0], relative)
    of_depth = size[1]
    if task.case.softmax:
        of_depth = 2 * inputs[0] * (size[1] + (inputs[0] * size[1]).sum(2, keepdim=True))
    assert_close(depth_grad, expected[2], of_depth, relative)


FORWARD = [
    Case(),
    Case(features=FLOAT, depth=FLOAT, weights=FLOAT, bev=FLOAT, channels=12, softmax=False),
    Case(features=FLOAT, depth=BFLOAT, weights=BFLOAT, bev=HALF, channels=1100, softmax=False, cells=7, width=1),
    Case(features=HALF, depth=HALF, bev=FLOAT, channels=7, height=3),
    Case(features=BFLOAT, depth=FLOAT, weights=HALF, channels=300, cells=9, bins=2),
    Case(features=HALF, depth=HALF, weights=HALF, bev=HALF, channels=8, softmax=False, in_place=True, cells=300, width=9),
    Case(height=20, width=9, bins=1, channels=24),
    Case(cameras=1, bins=1, height=1, width=1, cells=1, channels=1, features=FLOAT, depth=FLOAT, bev=FLOAT),
    Case(batch=2, height=33, bins=3, channels=16, bins_last=True),
    Case(batch=2, samples=2, channels=40, bins=19, cameras=1, features=FLOAT, depth=HALF),
    Case(shift=2, channels=16, depth=HALF, weights=HALF, softmax=False),
    Case(hot=1.0, channels=64, weights=BFLOAT, softmax=False, bins=11),
    Case(by_column=True),
    Case(by_column=True, channels=64, features=HALF, depth=HALF, bev=FLOAT, bins=9, cells=403, batch=2),
    Case(by_column=True, channels=96, depth=BFLOAT, weights=BFLOAT, softmax=False, in_place=True, cells=200, height=12, bev=FLOAT),
    Case(by_column=True, channels=176, features=HALF, depth=HALF, weights=HALF, softmax=False, samples=2, batch=2, height=20, width=1),
    Case(by_column=True, channels=16, height=20, cameras=3, bins=3, cells=61, bev=FLOAT),
]
BACKWARD = [
    Case(),
    Case(features=FLOAT, depth=FLOAT, bev=FLOAT, channels=12, softmax=False),
    Case(features=FLOAT, depth=BFLOAT, weights=BFLOAT, bev=HALF, channels=100, softmax=False, cells=7, width=2),
    Case(features=HALF, depth=HALF, bev=FLOAT, channels=7, height=3),
    Case(features=HALF, depth=HALF, weights=HALF, bev=HALF, channels=8, softmax=False, width=9),
    Case(features=HALF, depth=HALF, bev=HALF, channels=144, bins=20, cameras=1, width=2, bins_last=True),
    Case(features=HALF, depth=FLOAT, bev=HALF, channels=16, softmax=False),
    Case(height=20, width=9, bins=1, channels=24, batch=2, cameras=1),
    Case(height=17, bins=17, channels=64, depth=BFLOAT, samples=2, batch=2, width=1, cameras=1),
    Case(cameras=1, bins=1, height=1, width=1, cells=1, channels=1, features=FLOAT, depth=FLOAT, bev=FLOAT),
    Case(shift=4, channels=16),
    Case(features=FLOAT, depth=HALF, bev=FLOAT, channels=96, samples=2, batch=2, bins=9, height=18, width=2, cameras=1),
]


@pytest.mark.parametrize("case", FORWARD, ids=str)
def test_forward(case: Case, emulation: Emulation) -> None:
    """Every point is added to its cell, and the order in which threads take turns changes no bit."""
    task = Task(case)
    weights, bev = emulation.forward(task)
    if case.in_place:
        weights = task.weights
    elif case.weights == case.depth and not case.softmax:
        assert torch.equal(weights, task.depth)
    check_forward(task, weights, bev)
    assert torch.equal(emulation.forward(task, order=5)[1], bev)


def test_a_sample_does_not_depend_on_the_others(emulation: Emulation) -> None:
    case = Case(batch=3, cells=300, features=FLOAT, bev=FLOAT)
    task = Task(case)
    _, bev = emulation.forward(task)
    for sample in range(case.batch):
        alone = Task(replace(case, batch=1))
        alone.tables, alone.features, alone.depth = task.tables, task.features[sample : sample + 1], task.depth[sample : sample + 1]
        assert torch.equal(emulation.forward(alone)[1][0], bev[sample])


@pytest.mark.parametrize("case", BACKWARD, ids=str)
def test_backward(case: Case, emulation: Emulation) -> None:
    """Gradients of the reference, with and without one of the weights; each alone is the same."""
    task = Task(case)
    found = emulation.backward(task, weights_grad=False)
    check_backward(task, *found, weights_grad=False)
    assert all(map(torch.equal, emulation.backward(task, order=5, weights_grad=False), found))
    features_grad, _ = emulation.backward(task, needed=(True, False))
    _, depth_grad = emulation.backward(task, needed=(False, True))
    check_backward(task, features_grad, depth_grad, weights_grad=True)
    assert torch.equal(features_grad, found[0])


@pytest.mark.parametrize("by_column", [False, True])
def test_an_empty_plan(by_column: bool, emulation: Emulation) -> None:
    task = Task(Case(by_column=by_column))
    task.tables = plan_of(task.case, np.full((1, 2, 3, 4, 16), -1))
    assert not emulation.forward(task)[1].any()
    features_grad, depth_grad = emulation.backward(task, weights_grad=False)
    assert not features_grad.any()
    assert not depth_grad.any()


def test_columns_that_do_not_fit_are_refused(emulation: Emulation) -> None:
    task = Task(Case(bins=3700, width=1, cameras=1, cells=1, channels=1, height=1))
    for run in (emulation.forward, emulation.backward):
        with pytest.raises(RuntimeError, match="so many depth bins"):
            run(task)


# --- on a GPU -----------------------------------------------------------------------------------------------------------

#: Tensor cores drop digits below the last one where others round.
ON_TENSOR_CORES = 1e-5


def as_an_op_takes_them(task: Task, device: str) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Features, depth and the tables of the plan."""
    return task.features.to(device), task.depth.to(device), [torch.from_numpy(t).to(device) for t in task.tables]


def pool(task: Task, device: str) -> tuple[Tensor, Tensor]:
    """Weights in the layout of depth, and the sums."""
    features, depth, tables = as_an_op_takes_them(task, device)
    case = task.case
    bev, weights = torch.ops.irlvla.voxel_pool(features, depth, *tables, case.samples, case.cells, case.softmax, case.bev)
    return weights.permute(0, 1, 3, 4, 2).cpu(), bev.cpu()


def differentiate(task: Task, device: str, weights: Tensor) -> list[Tensor]:
    features, _, tables = as_an_op_takes_them(task, device)
    case = task.case
    given = [task.bev_grad, task.ordered(task.weights_grad).to(weights.dtype), features, task.ordered(weights)]
    given = [x.to(device) for x in given]
    about = case.samples, case.cells, case.softmax, case.depth, case.bins_last, True, True
    return [x.cpu() for x in torch.ops.irlvla.voxel_pool_backward(*given, *tables, *about)]


WITH_MANY_CELLS = [
    Case(cells=1 << 17, bins=12, cameras=3, width=9),
    Case(cells=1 << 16, batch=2, channels=128, features=HALF, depth=HALF, bev=HALF, height=20, bins=9, width=5),
    Case(cells=1 << 17, channels=64, bins=9, width=5, softmax=False, bev=FLOAT, height=32),
]


def check_op(task: Task, device: str, relative: float = ACCURACY) -> None:
    weights, bev = pool(task, device)
    check_forward(task, weights, bev, relative)
    task.weights, task.weights_grad = weights, task.weights_grad.to(weights.dtype)
    check_backward(task, *differentiate(task, device, weights), weights_grad=True, relative=ON_TENSOR_CORES)


@pytest.mark.parametrize("case", [*(case for case in FORWARD if not case.by_column), *BACKWARD[1:]], ids=str)
def test_the_op(case: Case, device: str) -> None:
    check_op(Task(case), device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", WITH_MANY_CELLS, ids=str)
def test_the_op_by_column(case: Case) -> None:
    check_op(Task(case), "cuda", ON_TENSOR_CORES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [Case(bins=40, cameras=3, width=20, cells=5000), WITH_MANY_CELLS[0]], ids=str)
def test_a_thousand_replays_of_a_graph(case: Case) -> None:
    """One bit pattern, that of a call on another stream."""
    task = Task(case)
    features, depth, tables = as_an_op_takes_them(task, "cuda")
    bev_grad = task.bev_grad.cuda()

    def run() -> list[Tensor]:
        bev, weights = torch.ops.irlvla.voxel_pool(features, depth, *tables, case.samples, case.cells, case.softmax, case.bev)
        about = case.samples, case.cells, case.softmax, case.depth, False, True, True
        return [bev, weights, *torch.ops.irlvla.voxel_pool_backward(bev_grad, None, features, weights, *tables, *about)]

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = run()
    stream.synchronize()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(1000):
        for tensor in found:
            tensor.fill_(torch.nan)
        graph.replay()
        assert all(map(torch.equal, found, expected))
