"""The op of voxel pooling: every type, size, layout, instruction set and number of threads, and whatever torch does to an op."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from irlvla import _C, ops
from irlvla.errors import InputError
from irlvla.ops import Grid, VoxelPoolPlan, reference
from irlvla.synthetic.cameras import mounted

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
TYPES = (FLOAT, HALF, BFLOAT)
#: Half a unit in the last place of a number, relative to it and (for numbers below the least normal one) absolute.
ROUNDING = {FLOAT: (0.0, 0.0), HALF: (2.0**-11, 2.0**-25), BFLOAT: (2.0**-8, 0.0)}
ACCURACY = 1e-6  # of float32 sums, relative to the sum of the magnitudes of what is added


GRID = Grid((-6.0, 6.0, 1.0), (-4.0, 5.0, 1.5), (-1.5, 1.5))


@dataclass(frozen=True)
class Case:
    """Level and tilted cameras, bins finer than cells, rows and columns that fill no vector."""

    batch: int = 2
    cameras: int = 2
    channels: int = 5
    bins: int = 7
    height: int = 6
    width: int = 5
    rigs: int = 1
    grid: Grid = GRID

    def matrices(self) -> tuple[Tensor, Tensor]:
        k = torch.tensor([[0.7 * self.width, 0.0, 0.5 * self.width], [0.0, 0.8 * self.height, 0.5 * self.height], [0.0, 0.0, 1.0]])
        angles = [(77.0 * i, 13.0 * (i % 3), 4.0 * (i % 2), 0.3, 0.1 * i, 0.2) for i in range(self.rigs * self.cameras)]
        poses = torch.stack([torch.from_numpy(mounted(*a)) for a in angles]).unflatten(0, (self.rigs, self.cameras))
        return k.double().expand(self.rigs, self.cameras, 3, 3), poses

    def depths(self) -> Tensor:
        return torch.linspace(0.8, 6.0, self.bins, dtype=torch.float64)

    def plan(self, device: str = "cpu") -> VoxelPoolPlan:
        k, poses = (m if self.rigs > 1 else m[0] for m in self.matrices())
        return VoxelPoolPlan.build(k, poses, (self.height, self.width), self.depths(), self.grid, device=device)

    def cells(self) -> Tensor:
        size = self.height, self.width
        points = [reference.points_of(k, pose, size, self.depths()) for k, pose in zip(*self.matrices(), strict=True)]
        return reference.cells_of(torch.stack(points), self.grid)

    def random(self, *shape: int, seed: int, dtype: torch.dtype = FLOAT, device: str = "cpu") -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    def inputs(self, features: torch.dtype = FLOAT, depth: torch.dtype = FLOAT, device: str = "cpu") -> tuple[Tensor, Tensor]:
        pixels = self.height, self.width
        return (
            self.random(self.batch, self.cameras, self.channels, *pixels, seed=1, dtype=features, device=device).requires_grad_(),
            self.random(self.batch, self.cameras, self.bins, *pixels, seed=2, dtype=depth, device=device).requires_grad_(),
        )


# --- against the reference in float64 -----------------------------------------------------------------------------------


def require_near(found: Tensor, expected: Tensor, magnitude: Tensor, what: str) -> None:
    """Sums of float32, rounded to the type in which they come."""
    relative, absolute = ROUNDING[found.dtype]
    bound = ACCURACY * magnitude + relative * expected.abs() * (1 + 2 * ACCURACY) + absolute
    error = (found.double().cpu() - expected).abs()
    assert (error <= bound).all(), f"{what}: off by {(error - bound).max():.3g} more than allowed"


def check(case: Case, softmax: bool, inputs: tuple[Tensor, Tensor], out: torch.dtype, device: str = "cpu") -> None:
    """Sums and gradients of the op, with those of the distribution over depths."""
    features, depth = inputs
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    cells = case.cells()
    assert (cells >= 0).any()
    bev, weights = ops.voxel_pool(features, depth, case.plan(device), softmax=softmax, dtype=out, return_depth=True)
    expected = reference.voxel_pool(*exact, cells, case.grid.shape, softmax=softmax)
    expected_weights = exact[1].softmax(2) if softmax else exact[1]
    assert bev.dtype == out
    assert weights.dtype == (FLOAT if softmax else depth.dtype)

    # What the sums are made of, without signs: weights, and their gradients before the softmax.
    sizes = exact[0].detach().abs(), expected_weights.detach().abs().requires_grad_()
    magnitude = reference.voxel_pool(*sizes, cells, case.grid.shape)
    require_near(bev, expected, magnitude.detach(), "sums")
    require_near(weights, expected_weights.detach(), expected_weights.detach().abs(), "distribution")

    upstream = case.random(*bev.shape, seed=3, dtype=out)
    on_weights = case.random(*weights.shape, seed=4)
    ours = torch.autograd.grad([bev, weights] if softmax else [bev], inputs, [upstream.to(device), on_weights.to(device)][: 1 + softmax])
    objective = (expected * upstream.double()).sum() + (expected_weights * on_weights.double()).sum() * softmax
    wanted = torch.autograd.grad(objective, exact)
    of_features = reference.voxel_pool(exact[0], sizes[1].detach(), cells, case.grid.shape)
    of_features = torch.autograd.grad(of_features, exact[0], upstream.double().abs())[0]
    of_weights = torch.autograd.grad(magnitude, sizes[1], upstream.double().abs())[0]
    if softmax:
        w, g = expected_weights.detach(), of_weights + on_weights.double().abs()
        of_weights = 2 * w * (g + (w * g).sum(2, keepdim=True))
    require_near(ours[0], wanted[0], of_features, "gradient of features")
    require_near(ours[1], wanted[1], of_weights, "gradient of depth")


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 8, 37, 80, 256, 272])
def test_any_number_of_channels(device: str, channels: int, softmax: bool) -> None:
    case = Case(channels=channels)
    check(case, softmax, case.inputs(device=device), FLOAT, device)


@pytest.mark.parametrize(("features", "depth", "out"), list(itertools.product(TYPES, TYPES, TYPES)))
def test_any_types(device: str, features: torch.dtype, depth: torch.dtype, out: torch.dtype) -> None:
    for channels, softmax in ((21, True), (32, False)):
        case = Case(channels=channels)
        check(case, softmax, case.inputs(features, depth, device), out, device)


SIZES = {
    "one bin": Case(bins=1),
    "one camera": Case(cameras=1, batch=1),
    "one row": Case(height=1),
    "one column": Case(width=1),
    "16 rows": Case(height=16, width=44, channels=16),
    "many bins": Case(bins=118, width=4),
    "rigs that differ": Case(rigs=2),
    "three samples": Case(batch=3, rigs=3, cameras=1),
    "one cell": Case(grid=Grid((-6.0, 6.0, 12.0), (-6.0, 6.0, 12.0), (-3.0, 3.0))),
}


@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_any_sizes(device: str, case: Case) -> None:
    for softmax in (False, True):
        check(case, softmax, case.inputs(device=device), FLOAT, device)


def test_nothing_in_the_grid(device: str) -> None:
    case = Case(grid=Grid((50.0, 60.0, 1.0), (50.0, 60.0, 1.0), (-1.0, 1.0)))
    features, depth = case.inputs(device=device)
    bev, weights = ops.voxel_pool(features, depth, case.plan(device), softmax=True, return_depth=True)
    (bev.sum() + (weights * weights).sum()).backward()
    assert torch.equal(bev, torch.zeros_like(bev))
    assert torch.equal(features.grad, torch.zeros_like(features))
    torch.testing.assert_close(weights, depth.softmax(2))
    assert depth.grad.abs().max() > 0


def test_no_samples(device: str) -> None:
    case = Case(batch=0)
    features, depth = case.inputs(device=device)
    bev = ops.voxel_pool(features, depth, case.plan(device))
    bev.sum().backward()
    assert bev.shape == (0, case.channels, *case.grid.shape)
    assert features.grad.shape == features.shape


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same numbers, one layout after the other."""
    values = x.detach()
    several = torch.cat([values, values + 1], 2)
    return {
        "channels last": values.movedim(2, -1).contiguous().movedim(-1, 2),
        "rows last": values.mT.contiguous().mT,
        "a part of the channels": several[:, :, : values.shape[2]],
        "a part of the last channels": several.movedim(2, -1).contiguous().movedim(-1, 2)[:, :, : values.shape[2]],
        "samples in reverse": values.flip(0).contiguous().flip(0),
        "every second sample": values.repeat_interleave(2, 0)[::2],
        "cameras first": values.transpose(0, 1).contiguous().transpose(0, 1),
        "spread out": torch.stack([values, values], -1)[..., 0],
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1, 1)))
def test_any_layout(device: str, layout: str) -> None:
    case = Case(channels=16, width=9, bins=6)
    plan, inputs = case.plan(device), case.inputs(device=device)
    upstream = case.random(case.batch, case.channels, *case.grid.shape, seed=3, device=device)
    for dtype, softmax in ((FLOAT, False), (BFLOAT, True)):
        results = []
        for given in ([x.detach() for x in inputs], [layouts(x)[layout] for x in inputs]):
            given = [x.to(dtype).requires_grad_() for x in given]
            bev = ops.voxel_pool(*given, plan, softmax=softmax, dtype=FLOAT)
            results.append([bev, *torch.autograd.grad(bev, given, upstream)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert results[0][0].is_contiguous(memory_format=torch.channels_last)


def test_softmax_of_extreme_logits(device: str) -> None:
    """As torch: far apart, infinite, all of them -inf."""
    case = Case(batch=1, bins=4, height=2, width=2, cameras=1)
    features, _ = case.inputs(device=device)
    inf = torch.inf
    logits = torch.tensor([[0.0, 100.0, -100.0, 3e38], [-inf, 0.0, 1.0, -inf], [-inf] * 4, [88.0, -88.0, -87.5, 0.0]], device=device)
    depth = logits.T.reshape(1, 1, 4, 2, 2)
    _, weights = ops.voxel_pool(features, depth, case.plan(device), softmax=True, return_depth=True)
    torch.testing.assert_close(weights, depth.softmax(2), rtol=1e-6, atol=1e-37, equal_nan=True)


def test_numbers_are_rounded_to_nearest() -> None:
    """Sums of one addend each: what comes out is the product, rounded as torch rounds, and what is no number stays none."""
    case = Case(batch=1, cameras=1, channels=64, bins=1, height=1, width=1, grid=Grid((0.0, 2.0, 2.0), (-1.0, 1.0, 2.0), (-1.0, 1.0)))
    features = torch.cat(
        [
            torch.randn(30) * 10.0 ** torch.arange(-12, 18).float(),
            torch.randn(30) * 2.0**-15,
            torch.tensor([65519.9, 65520.0, torch.inf, torch.nan]),
        ]
    )
    depth = torch.ones(1, 1, 1, 1, 1)
    for dtype in (HALF, BFLOAT):
        bev = ops.voxel_pool(features.reshape(1, 1, 64, 1, 1), depth, case.plan(), dtype=dtype)
        torch.testing.assert_close(bev.flatten(), features.to(dtype), rtol=0, atol=0, equal_nan=True)
        bev = ops.voxel_pool(features.to(dtype).reshape(1, 1, 64, 1, 1), depth, case.plan(), dtype=FLOAT)
        torch.testing.assert_close(bev.flatten(), features.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


# --- instruction sets, threads, processes -------------------------------------------------------------------------------


def run(script: str, **environment: str) -> None:
    """In a process of its own."""
    code = textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


ISAS = _C.build_info()["isas"]  # from the least


@pytest.mark.parametrize("isa", ISAS[: ISAS.index(_C.isa())])
def test_other_instruction_sets(isa: str) -> None:
    """All that is tested here of numbers, with kernels that this machine would not choose."""
    names = "any_number_of_channels", "any_types", "any_sizes", "extreme_logits", "rounded_to_nearest", "any_layout", "one_bit_pattern"
    run(
        f"""
        import sys, pytest
        from irlvla import _C
        assert _C.isa() == {isa!r}
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {__file__!r}, "-k", {" or ".join(names)!r}]))
        """,
        IRLVLA_ISA=isa,
    )


@pytest.fixture
def threads():
    """Sets how many threads there are, for one test."""
    yield ops.set_num_threads
    ops.set_num_threads(None)


def test_one_bit_pattern(threads) -> None:
    """A thousand runs, on one, two and four threads."""
    case = Case(channels=19, bins=12, rigs=2, grid=Grid((-6.0, 6.0, 0.75), (-6.0, 6.0, 0.75), (-1.5, 1.5)))
    plan, (features, depth) = case.plan(), case.inputs()
    upstream = case.random(case.batch, case.channels, *case.grid.shape, seed=3)
    seen = set()
    for i in range(1000):
        threads((1, 2, 4)[i % 3])
        bev = ops.voxel_pool(features, depth, plan, softmax=True)
        grads = torch.autograd.grad(bev, [features, depth], upstream)
        seen.add(b"".join(x.detach().numpy().tobytes() for x in (bev.permute(0, 2, 3, 1), *grads)))
    assert len(seen) == 1


def test_forked_children_pool_too() -> None:
    run(
        """
        import multiprocessing, sys
        sys.path.insert(0, TESTS)
        import torch
        from irlvla import ops
        from test_voxel_pool import Case

        case = Case(channels=16)
        ops.set_num_threads(4)

        def pool(seed):
            features, depth = case.inputs()
            bev = ops.voxel_pool(features, depth, case.plan())
            bev.sum().backward()
            return bev.detach().numpy().tobytes(), depth.grad.numpy().tobytes()

        expected = pool(0)
        with multiprocessing.get_context("fork").Pool(3) as workers:
            assert set(workers.map(pool, range(30))) == {expected}
        assert pool(0) == expected
        """.replace("TESTS", repr(os.path.dirname(__file__)))
    )


# --- as a torch op ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "softmax"), [(FLOAT, False), (BFLOAT, True)])
def test_opcheck(device: str, dtype: torch.dtype, softmax: bool) -> None:
    case = Case(rigs=2)
    plan, (features, depth) = case.plan(device), case.inputs(FLOAT, dtype, device)
    about = plan.samples, case.grid.cells, softmax
    rows = features.movedim(2, -1).contiguous().detach().requires_grad_()
    torch.library.opcheck(torch.ops.irlvla.voxel_pool.default, (rows, depth, *plan.tables, *about, FLOAT))
    bev, weights = torch.ops.irlvla.voxel_pool(rows.detach(), depth.detach(), *plan.tables, *about, dtype)
    for on_weights, needed in ((weights, (True, True)), (None, (True, False)), (None, (False, True))):
        arguments = (bev, on_weights, rows.detach(), weights, *plan.tables, *about, dtype, softmax, *needed)
        torch.library.opcheck(torch.ops.irlvla.voxel_pool_backward.default, arguments)


def test_gradients_of_one_input(device: str) -> None:
    case = Case(channels=20)
    plan = case.plan(device)
    for softmax in (False, True):
        features, depth = case.inputs(device=device)
        bev = ops.voxel_pool(features, depth, plan, softmax=softmax)
        upstream = torch.randn_like(bev)
        both = torch.autograd.grad(bev, [features, depth], upstream)
        for given, grad in zip(((features, depth.detach()), (features.detach(), depth)), both, strict=True):
            bev = ops.voxel_pool(*given, plan, softmax=softmax)
            alone = torch.autograd.grad(bev, [x for x in given if x.requires_grad], upstream)
            assert torch.equal(alone[0], grad)
        assert not ops.voxel_pool(features.detach(), depth.detach(), plan, softmax=softmax).requires_grad


def test_gradient_of_the_distribution_alone(device: str) -> None:
    case = Case()
    features, depth = case.inputs(device=device)
    _, weights = ops.voxel_pool(features, depth, case.plan(device), softmax=True, return_depth=True)
    upstream = torch.randn_like(weights)
    (grad,) = torch.autograd.grad(weights, depth, upstream)
    torch.testing.assert_close(grad, torch.autograd.grad(depth.softmax(2), depth, upstream)[0])


def test_no_second_derivative(device: str) -> None:
    case = Case()
    features, depth = case.inputs(device=device)
    bev = ops.voxel_pool(features, depth, case.plan(device))
    grad, *_ = torch.autograd.grad(bev.square().sum(), features, create_graph=True)
    with pytest.raises(InputError, match="voxel_pool has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(device: str, dynamic: bool) -> None:
    case = Case(channels=12)
    plan = case.plan(device)

    def lift(features: Tensor, depth: Tensor) -> Tensor:
        bev, weights = ops.voxel_pool(features * 2, depth + 1, plan, softmax=True, return_depth=True)
        return bev.square().mean() + (weights * depth).sum()

    compiled = torch.compile(lift, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (2, 3):
        inputs = Case(channels=12, batch=batch).inputs(device=device)
        results = []
        for function in (lift, compiled):
            loss = function(*inputs)
            results.append([loss, *torch.autograd.grad(loss, inputs)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_under_autocast(device: str, dtype: torch.dtype) -> None:
    """Features come in 16 bits from a convolution, depth in 32: sums are float32 and come out like the features."""
    case = Case(channels=6, cameras=1, batch=1)
    features, depth = case.inputs(device=device)
    convolution = torch.nn.Conv2d(6, 6, 1, device=device)
    with torch.autocast(device, dtype=dtype):
        made = convolution(features[0])[None]
        bev = ops.voxel_pool(made, depth, case.plan(device), softmax=True)
        loss = bev.float().square().sum()
    loss.backward()
    assert made.dtype == bev.dtype == dtype
    assert torch.equal(bev, ops.voxel_pool(made, depth, case.plan(device), softmax=True))
    assert depth.grad.dtype == convolution.weight.grad.dtype == FLOAT
    assert convolution.weight.grad.isfinite().all()


def test_distributed_data_parallel(tmp_path) -> None:
    class Lift(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(3, case.channels + case.bins, 1)

        def forward(self, images: Tensor) -> Tensor:
            both = self.head(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            return ops.voxel_pool(both[:, :, case.bins :], both[:, :, : case.bins], plan, softmax=True)

    case = Case()
    plan, module = case.plan(), Lift()
    images = case.random(case.batch, case.cameras, 3, case.height, case.width, seed=5)
    module(images).square().sum().backward()
    alone = [p.grad.clone() for p in module.parameters()]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        module.zero_grad()
        parallel = torch.nn.parallel.DistributedDataParallel(module)
        parallel(images).square().sum().backward()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(module.parameters(), alone, strict=True))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_streams_and_graphs() -> None:
    case = Case(channels=16)
    plan, inputs = case.plan("cuda"), [x.detach() for x in case.inputs(HALF, HALF, "cuda")]
    expected = ops.voxel_pool(*inputs, plan, softmax=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        fresh = [x * 1 for x in inputs]
        assert torch.equal(ops.voxel_pool(*fresh, plan, softmax=True), expected)
    given = [torch.zeros_like(x).requires_grad_() for x in inputs]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bev = ops.voxel_pool(*given, plan, softmax=True)
        grads = torch.autograd.grad(bev, given, torch.ones_like(bev))
    for to, x in zip(given, inputs, strict=True):
        to.data.copy_(x)
    graph.replay()
    again = [x.clone().requires_grad_() for x in inputs]
    whole = ops.voxel_pool(*again, plan, softmax=True)
    assert torch.equal(bev, expected)
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(whole, again, torch.ones_like(whole)), strict=True))


# --- mistakes -----------------------------------------------------------------------------------------------------------

OTHER = VoxelPoolPlan.build(*(m[0] for m in Case(cameras=3).matrices()), (6, 5), Case().depths(), GRID)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, d, p: ops.voxel_pool(f.double(), d, p), r"features must be a tensor of float32, float16 or bfloat16, got torch.float64"),
        (lambda f, d, p: ops.voxel_pool(f, d.long(), p), r"depth must be a tensor of float32, float16 or bfloat16, got torch.int64"),
        (lambda f, d, p: ops.voxel_pool(f.numpy(), d, p), r"features must be a tensor .*, got float32"),
        (lambda f, d, p: ops.voxel_pool(f, "depth", p), r"depth must be a tensor .*, got str"),
        (lambda f, d, p: ops.voxel_pool(f[0], d, p), r"features must have shape \(B, N, C, H, W\), got \(2, 5, 6, 5\)"),
        (lambda f, d, p: ops.voxel_pool(f, d[0], p), r"depth must have shape \(B, N, D, H, W\), got \(2, 7, 6, 5\)"),
        (lambda f, d, p: ops.voxel_pool(f.to("meta"), d, p), r"features is on meta and the plan on cpu"),
        (lambda f, d, p: ops.voxel_pool(f, d.to("meta"), p), r"depth is on meta and the plan on cpu"),
        (lambda f, d, p: ops.voxel_pool(f, d, p, dtype=torch.float64), r"dtype must be float32, float16 or bfloat16, got torch.float64"),
        (lambda f, d, p: ops.voxel_pool(f, d, OTHER), r"the plan is for 3 cameras with 6 x 5 features, got .*: 2 cameras, 6 x 5"),
        (lambda f, d, p: ops.voxel_pool(f.mT, d, p), r"the plan is for 2 cameras with 6 x 5 features, got .*: 2 cameras, 5 x 6"),
        (lambda f, d, p: ops.voxel_pool(f, d[:, :, :6], p), r"depth must have shape \(2, 2, 7, 6, 5\) .* the plan's 7 depths, got"),
        (lambda f, d, p: ops.voxel_pool(f, d[:1], p), r"depth must have shape \(2, 2, 7, 6, 5\)"),
        (lambda f, d, p: ops.voxel_pool(f[:, :, :0], d, p), r"features need at least one channel"),
        (lambda f, d, p: ops.voxel_pool(f, d, Case(rigs=3).plan()), r"the plan is for 3 samples .*, got features of 2"),
        (lambda f, d, p: ops.voxel_pool(f, d, p.tables), r"plan must be a VoxelPoolPlan, got tuple"),
        (lambda f, d, p: raw(f, d, p, cells=99), r"irlvla::voxel_pool needs cell_start as int32 of shape \(100,\) on cpu, got"),
        (lambda f, d, p: raw(f, d, p, samples=3), r"irlvla::voxel_pool needs a plan of 1 or 2 samples, got one of 3"),
        (lambda f, d, p: raw(f, d.double(), p), r"irlvla::voxel_pool needs depth in float32, float16 or bfloat16, got torch.float64"),
        (lambda f, d, p: raw(f[:, :1], d, p), r"irlvla::voxel_pool needs features of shape \(2, 2, 6, 5, any\), got \(2, 1, 6, 5, 5\)"),
    ],
)  # fmt: skip
def test_mistakes(call, message: str) -> None:
    case = Case()
    features, depth = (x.detach() for x in case.inputs())
    with pytest.raises(InputError, match=message):
        call(features, depth, case.plan())


def raw(features: Tensor, depth: Tensor, plan: VoxelPoolPlan, samples: int = 1, cells: int = GRID.cells) -> None:
    """Past the function that checks for people."""
    torch.ops.irlvla.voxel_pool(features.movedim(2, -1), depth, *plan.tables, samples, cells, False, FLOAT)
