"""Every compiled op against its slow twin, on each device; as torch ops; and whatever callers bring."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from golden_scenes import load, with_baselines
from irlvla import _C, ops
from irlvla.errors import InputError
from irlvla.ops import Prepared, reference
from irlvla.types import STEPS, Scene

GOLDEN = load(Path(__file__).parent / "golden")
often = settings(max_examples=150)

#: Coordinates that meet: half metres, and neighbours of them.
snapped = st.integers(-12, 12).map(lambda i: i / 2)
nudged = st.builds(lambda x, step: float(np.nextafter(x, math.inf * step)) if step else x, snapped, st.sampled_from((-1, 0, 0, 0, 1)))
headings = st.sampled_from((0.0, math.pi / 2, math.pi, -math.pi / 2, 0.3, -2.0))
sizes = st.sampled_from((0.5, 1.0, 2.0, 4.0))
boxes = st.lists(st.tuples(nudged, nudged, headings, sizes, sizes), min_size=1, max_size=12).map(
    lambda rows: torch.tensor(rows, dtype=torch.float64)
)


def random_plans(n: int, seed: int = 0, poses: int = 8) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    step = 4.0 / poses
    speed = (
        12 * torch.rand(n, 1, generator=g, dtype=torch.float64) + torch.randn(n, poses, generator=g, dtype=torch.float64).cumsum(1) * 0.3
    )
    heading = (torch.randn(n, 1, generator=g, dtype=torch.float64) * 0.1 * torch.linspace(0, 4, poses, dtype=torch.float64)).cumsum(
        1
    ) * step
    position = torch.stack([speed * heading.cos(), speed * heading.sin()], -1).cumsum(1) * step
    return torch.cat([position, heading[..., None]], -1)


def random_ego(n: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    ego = torch.zeros(n, 11, dtype=torch.float64)
    ego[:, :2] = torch.randn(n, 2, generator=g, dtype=torch.float64) * 1e3
    ego[:, 2] = (torch.rand(n, generator=g, dtype=torch.float64) - 0.5) * 2 * math.pi
    ego[:, 3] = torch.rand(n, generator=g, dtype=torch.float64) * 15
    ego[:, 4:8] = torch.randn(n, 4, generator=g, dtype=torch.float64) * 0.2
    return ego


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("poses", "dt"), [(8, 0.5), (40, 0.1), (4, 1.0), (80, 0.05)])
def test_simulate_matches_reference(device: str, poses: int, dt: float) -> None:
    n = 21
    plans, ego = random_plans(n, poses=poses), random_ego(n)
    time_us = torch.arange(n) * 49_999 + 1_600_000_000_000_000
    found = ops.simulate(plans.to(device), ego.to(device), time_us.to(device), dt).cpu()
    expected = reference.simulate(plans, ego, time_us, dt)
    difference = found - expected
    difference[..., 2] = reference.wrap(difference[..., 2])
    assert difference.abs().max() < 1e-9


def test_track_matches_reference(device: str) -> None:
    ego = random_ego(9)
    time_us = torch.full((9,), 1_623_000_000_123_457)
    poses = reference.interpolate(random_plans(9), ego, time_us, 0.5)
    expected = reference.track(reference.interpolate_reference(poses, ego, time_us), ego)
    found = ops.track(poses.to(device), ego.to(device), time_us.to(device)).cpu()
    difference = found - expected
    difference[..., 2] = reference.wrap(difference[..., 2])
    assert difference.abs().max() < 1e-9


@given(boxes, boxes)
@often
def test_boxes_overlap_matches_reference(a: torch.Tensor, b: torch.Tensor) -> None:
    assert torch.equal(ops.boxes_overlap(a[:, None], b[None]), reference.boxes_overlap(a[:, None], b[None]))
    assert torch.equal(ops.boxes_overlap(a[:, None], b[None]), ops.boxes_overlap(b[:, None], a[None]).T)


@given(st.lists(st.tuples(snapped, snapped), min_size=3, max_size=8), st.lists(st.tuples(nudged, nudged), min_size=1, max_size=20))
@often
def test_points_in_polygons_matches_reference(ring: list[tuple[float, float]], points: list[tuple[float, float]]) -> None:
    hole = [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)]
    vertices = torch.tensor([*ring, *hole, *hole], dtype=torch.float64)
    ring_offsets, polygon_offsets = torch.tensor([0, len(ring), len(ring) + 4, len(ring) + 8]), torch.tensor([0, 2, 3])
    p = torch.tensor(points, dtype=torch.float64)
    found = ops.points_in_polygons(p, vertices, ring_offsets, polygon_offsets)
    assert torch.equal(found, reference.points_in_polygons(p, vertices, ring_offsets, polygon_offsets))


@given(st.lists(st.tuples(snapped, snapped), min_size=2, max_size=9), st.lists(st.tuples(nudged, nudged), min_size=1, max_size=20))
@often
def test_project_matches_reference(line: list[tuple[float, float]], points: list[tuple[float, float]]) -> None:
    p, polyline = torch.tensor(points, dtype=torch.float64), torch.tensor(line, dtype=torch.float64)
    for found, expected in zip(ops.project(p, polyline), reference.project(p, polyline), strict=True):
        assert torch.equal(found, expected)


def test_time_to_collision_matches_reference(device: str) -> None:
    ego = random_ego(6)
    ego[:, :3] = 0.0
    states = reference.simulate(random_plans(6), ego, torch.zeros(6, dtype=torch.int64), 0.5)
    g = torch.Generator().manual_seed(1)
    agents = torch.rand(12, 51, 5, generator=g, dtype=torch.float64) * torch.tensor([50, 12, 6, 4, 1]) + torch.tensor([0.0, -6, 0, 1, 1])
    valid = torch.rand(12, 51, generator=g) < 0.8
    found = ops.time_to_collision(states.to(device), agents.to(device), valid.to(device)).cpu()
    expected = reference.time_to_collision(states, agents, valid)
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 2, "the test must see hits and misses"


def test_comfort_matches_reference(device: str) -> None:
    states = torch.cat([torch.from_numpy(g.expected["sim_states"]) for g in GOLDEN])
    for v1, twin in ((False, reference.comfort), (True, reference.comfort_v1)):
        expected = twin(states)
        assert torch.equal(ops.comfort(states.to(device), v1=v1).cpu(), expected)
        assert expected.any(0).all()
        assert not expected.all(0).all()


@pytest.mark.parametrize("shift", [1, 3, 5])
def test_extended_comfort_matches_reference(device: str, shift: int) -> None:
    states = torch.cat([torch.from_numpy(g.expected["sim_states"]) for g in GOLDEN[:30]])
    previous = states.roll(1, 0)
    (ok, rms), (expected_ok, expected_rms) = (
        ops.extended_comfort(states.to(device), previous.to(device), shift),
        reference.extended_comfort(states, previous, shift),
    )
    assert (rms.cpu() - expected_rms).abs().max() < 1e-8
    assert torch.equal(ok.cpu(), expected_ok)
    assert 0 < int(expected_ok.sum()) < len(expected_ok)


def test_extended_comfort_mixes_shifts() -> None:
    states = torch.cat([torch.from_numpy(g.expected["sim_states"]) for g in GOLDEN])[:19]
    shift = torch.arange(19) % 5 + 1
    ok, rms = ops.extended_comfort(states, states.flip(0).contiguous(), shift)
    for i in range(19):
        one_ok, one_rms = ops.extended_comfort(states[i : i + 1], states.flip(0)[i : i + 1], int(shift[i]))
        assert bool(one_ok) == bool(ok[i])
        assert torch.equal(one_rms[0], rms[i])


# --- as torch ops -----------------------------------------------------------------------------------------------------


def op_examples(device: str) -> dict[str, tuple[object, ...]]:
    plans, ego, time_us = random_plans(5).to(device), random_ego(5).to(device), torch.zeros(5, dtype=torch.int64, device=device)
    states = ops.simulate(plans, ego, time_us)
    prepared = ops.prepare(with_baselines(GOLDEN[0].scene).to(device), reactive=True)
    world_bytes, masks = int(prepared.world_bytes.max()), torch.zeros(1, 5, dtype=torch.int64, device=device)
    offsets = torch.arange(6, device=device) * len(GOLDEN[0].scene.agent_kind)
    square = torch.tensor([[0.0, 0, 4, 0], [4, 0, 4, 4], [4, 4, 0, 4], [0, 4, 0, 0]], dtype=torch.float64, device=device)
    points = torch.rand(7, 2, dtype=torch.float64, device=device)
    flags = torch.ones(2, 41, dtype=torch.bool, device=device)
    return {
        "simulate": (plans, ego, time_us, 0.5, False),
        "score": (prepared.data, prepared.offsets, time_us, plans, 0, 0.5, True, True, True, states[:1], masks, world_bytes),
        "traffic": (
            prepared.data,
            prepared.offsets,
            time_us,
            states,
            offsets,
            torch.zeros(int(offsets[-1]), 41, 5, dtype=torch.float64, device=device),
            torch.ones(int(offsets[-1]), 41, dtype=torch.bool, device=device),
            world_bytes,
        ),
        "extended_comfort": (states, states, time_us + 5),
        "comfort": (states, False),
        "boxes_overlap": (ego[:, :5].abs(), ego[:, :5].abs()),
        "points_in_polygons": (points, square, torch.tensor([0, 4], device=device)),
        "project": (points, square),
        "time_to_collision": (states, torch.rand(2, 41, 5, dtype=torch.float64, device=device), flags),
    }


@pytest.mark.parametrize(
    "name",
    ["simulate", "score", "extended_comfort", "comfort", "boxes_overlap", "points_in_polygons", "project", "time_to_collision", "traffic"],
)
def test_opcheck(device: str, name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.irlvla, name).default, op_examples(device)[name])


def test_compiles_without_graph_breaks() -> None:
    ego, time_us = random_ego(4), torch.zeros(4, dtype=torch.int64)

    def drive(plans: torch.Tensor) -> torch.Tensor:
        states = ops.simulate(plans, ego, time_us)
        return states[..., :2].sum() + ops.comfort(states).sum()

    plans = random_plans(4)
    assert torch.equal(torch.compile(drive, fullgraph=True, backend="aot_eager")(plans), drive(plans))


# --- callers ----------------------------------------------------------------------------------------------------------


class OnlyDlpack:
    """An array of some other library."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def __dlpack__(self, **kwargs: object) -> object:
        return self._array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)


def test_takes_what_callers_have() -> None:
    plans, ego, time_us = random_plans(3), random_ego(3), torch.zeros(3, dtype=torch.int64)
    expected = ops.simulate(plans, ego, time_us)
    assert torch.equal(ops.simulate(plans.numpy(), ego.numpy(), time_us.numpy()), expected)
    assert torch.equal(ops.simulate(OnlyDlpack(plans.numpy()), ego, time_us), expected)
    assert torch.equal(ops.simulate(plans.mT.contiguous().mT, ego.repeat(1, 2)[:, :11], time_us), expected)
    assert torch.equal(ops.simulate(plans.float(), ego, time_us), ops.simulate(plans.float().double(), ego, time_us))
    assert torch.equal(ops.simulate(plans.requires_grad_(), ego, time_us), expected)


def test_empty_input() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    assert ops.simulate(none.reshape(0, 8, 3), none.reshape(0, 11), none.long()).shape == (0, STEPS, 11)
    assert ops.boxes_overlap(none.reshape(0, 5), none.reshape(0, 5)).shape == (0,)
    assert ops.points_in_polygons(none.reshape(0, 2), torch.eye(3, 2), torch.tensor([0, 3])).shape == (0, 1)
    states = ops.simulate(random_plans(2), random_ego(2), torch.zeros(2, dtype=torch.int64))
    assert ops.time_to_collision(states, none.reshape(0, 41, 5)).isinf().all()
    assert ops.comfort(states[:0]).shape == (0, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, e, t: ops.simulate(p[..., :2], e, t), r"plans must have shape \(any, any, 3\), got \(3, 8, 2\)"),
        (lambda p, e, t: ops.simulate(p, e[:2], t), r"ego must have shape \(3, 11\), got \(2, 11\)"),
        (lambda p, e, t: ops.simulate(p, e, t, 0.4), r"8 poses every 0.4 s cover 3.2 s; e.g. 8 at 0.5 s"),
        (lambda p, e, t: ops.simulate(p.index_fill(0, torch.tensor(1), math.nan), e, t), r"plans\[1\] holds NaN"),
        (lambda p, e, t: ops.simulate(p, e.index_fill(0, torch.tensor(2), math.inf), t), r"ego\[2\] holds NaN, infinity"),
        (lambda p, e, t: ops.simulate(p * 1e9, e, t), r"plans\[0\] holds NaN, infinity or a value beyond 1e\+08"),
        (lambda p, e, t: ops.simulate("plan", e, t), r"plans: cannot read a str as a tensor"),
        (lambda p, e, t: ops.simulate(p + 1j, e, t), r"plans must be real"),
        (lambda p, e, t: ops.simulate(p.to("meta"), e, t), r"ego is on cpu but is needed on meta"),
        (lambda p, e, t: ops.comfort(torch.zeros(1, 9, 11)), r"15 to 65 states .*, got 9"),
        (
            lambda p, e, t: ops.extended_comfort(torch.zeros(1, 41, 11), torch.zeros(1, 41, 11), 6),
            r"shift .* must lie in 1 \.\.\. 5, got 6",
        ),
        (lambda p, e, t: ops.project(torch.zeros(1, 2), torch.zeros(1, 2)), r"at least 2 points, got 1"),
        (lambda p, e, t: ops.boxes_overlap(torch.zeros(1, 4), torch.zeros(1, 4)), r"boxes must have shape \(\.\.\., 5\)"),
        (
            lambda p, e, t: ops.points_in_polygons(torch.zeros(1, 2), torch.eye(4, 2), torch.tensor([-3, 4])),
            r"ring_offsets must rise from 0 to 4",
        ),
        (
            lambda p, e, t: ops.points_in_polygons(torch.zeros(1, 2), torch.eye(4, 2), torch.tensor([0, 3])),
            r"ring_offsets must rise from 0 to 4",
        ),
        (
            lambda p, e, t: ops.points_in_polygons(p[0, :, :2], p[0, :, :2], torch.tensor([0, 8]), torch.tensor([0, 2])),
            r"polygon_offsets must rise",
        ),
        (lambda p, e, t: ops.simulate(p, e, t + 2**60), r"time_us must lie in"),
        (lambda p, e, t: ops.simulate(p[:, :0], e, t, math.inf), r"a plan must cover 4.0 s"),
        (lambda p, e, t: ops.comfort(torch.full((1, 41, 11), math.nan)), r"states\[0\] holds NaN"),
        (
            lambda p, e, t: ops.time_to_collision(torch.zeros(1, 41, 11), torch.full((1, 41, 5), math.nan)),
            r"boxes \(where valid\)\[0\] holds NaN",
        ),
        (
            lambda p, e, t: torch.ops.irlvla.boxes_overlap(e[:, :5].float(), e[:, :5]),
            r"irlvla::boxes_overlap needs a as torch.float64 on cpu, got torch.float32",
        ),
        (lambda p, e, t: torch.ops.irlvla.comfort(torch.zeros(1, 70, 11, dtype=torch.float64), False), r"15 to 65 states"),
        (lambda p, e, t: ops.set_num_threads(0), r"threads must be at least 1, got 0"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(random_plans(3), random_ego(3), torch.zeros(3, dtype=torch.int64))  # type: ignore[operator]


def test_raw_ops_take_strided_tensors() -> None:
    boxes = torch.rand(6, 10, dtype=torch.float64)
    assert torch.equal(torch.ops.irlvla.boxes_overlap(boxes[:, :5], boxes[:, 5:]), ops.boxes_overlap(boxes[:, :5], boxes[:, 5:]))


def test_prepared_scenes_are_a_batch() -> None:
    golden = GOLDEN[:3]
    prepared = ops.prepare(Scene.cat([g.scene for g in golden]))
    twice = Prepared.cat([prepared, prepared])
    plans, index = random_plans(4), torch.zeros(4, dtype=torch.int64)
    assert len(prepared) == 3
    for i, g in enumerate(golden):
        expected = ops.score(ops.prepare(g.scene), plans, index, pdms=True)
        for found in (ops.score(prepared[[2, i]], plans, index + 1, pdms=True), ops.score(twice, plans, index + i + 3, pdms=True)):
            assert all(torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0)) for a, b in zip(found, expected, strict=True))


def test_build_info() -> None:
    info = _C.build_info()
    assert _C.isa() in info["isas"]
    assert isinstance(info["cuda"], bool)
