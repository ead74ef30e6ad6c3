"""irlvla.epdms: the official values, the reference, and what must not change them."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irlvla
from golden_scenes import GoldenScene, load
from irlvla import _C, Epdms, InputError, Plan, Scene, Trajectory, ops
from irlvla.ops import reference
from test_ops import random_plans

GOLDEN = load(Path(__file__).parent / "golden")
BY_NAME = {g.name: g for g in GOLDEN}
PLAIN = [g for g in GOLDEN if "fragile" in g.expected and not g.fragile.any() and not g.human_fragile.any()]


def same(a: Epdms, b: Epdms) -> bool:
    """Equal to the last bit, NaN included."""
    pairs = [(a.values, b.values)] + ([(a.raw, b.raw)] if a.raw is not None else [])
    if a.details is not None and b.details is not None:
        pairs += [(value, getattr(b.details, name)) for name, value in a.details.tensors()]
    return all(torch.equal(x.nan_to_num(-7.0), y.nan_to_num(-7.0)) for x, y in pairs)


def together(golden: list[GoldenScene]) -> tuple[Scene, torch.Tensor, torch.Tensor]:
    """All scenes as one batch, all candidates in a row, and the scene of each."""
    index = torch.repeat_interleave(torch.tensor([len(g.candidates) for g in golden]))
    return Scene.cat([g.scene for g in golden]), torch.cat([torch.as_tensor(g.candidates) for g in golden]), index


# --- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("golden", GOLDEN[::4], ids=lambda g: g.name)
def test_matches_reference_on_random_plans(golden: GoldenScene) -> None:
    plans = random_plans(12, seed=len(golden.name))
    found = irlvla.epdms(golden.scene, plans[None], details=True, pdms=True)
    expected = reference.score_scene(golden.scene, plans, pdms=True)
    assert torch.allclose(found.raw[0], expected.raw, atol=1e-9, equal_nan=True)  # type: ignore[index,arg-type]
    assert torch.allclose(found.values[0], expected.values, atol=1e-9, equal_nan=True)
    assert torch.allclose(found.pdms.values[0], expected.pdms.values, atol=1e-9)  # type: ignore[union-attr]
    for name, value in expected.details.tensors():  # type: ignore[union-attr]
        assert torch.allclose(getattr(found.details, name)[0].double(), value.double(), atol=1e-8), name


def test_previous_frame() -> None:
    golden = next(g for g in PLAIN if len(g.previous_candidates) == 2)
    n = len(golden.candidates)
    previous = torch.as_tensor(golden.previous_candidates)
    one = irlvla.epdms(golden.scene, golden.candidates[None], previous=previous[:1])
    per_plan = irlvla.epdms(golden.scene, golden.candidates[None], previous=previous[:1].expand(n, -1, -1)[None])
    assert same(one, per_plan)
    ec = golden.expected["extended_comfort"].reshape(n, -1)[:, 0]
    assert one.ec[0].tolist() == ec.tolist()
    assert torch.allclose(one.score()[0], torch.as_tensor(golden.expected["epdms"].reshape(n, -1)[:, 0]), atol=1e-9)
    assert irlvla.epdms(golden.scene, golden.candidates[None]).ec.isnan().all()


# --- what must not matter ---------------------------------------------------------------------------------------------


def test_batch_split_threads_and_order_give_the_same_bits(device: str) -> None:
    scenes, plans, index = together(GOLDEN)
    scenes, plans, index = scenes.to(device), plans.to(device), index.to(device)
    whole = irlvla.epdms(scenes, plans, scene_index=index, details=True)
    try:
        for threads in (1, 2, 5):
            ops.set_num_threads(threads)
            fresh = dataclasses.replace(scenes)
            assert same(irlvla.epdms(fresh, plans, scene_index=index, details=True), whole)
    finally:
        ops.set_num_threads(None)
    alone = [irlvla.epdms(g.scene.to(device), torch.as_tensor(g.candidates)[None].to(device), details=True)[0] for g in GOLDEN]
    assert same(Epdms.cat(alone), whole)
    shuffled = torch.randperm(len(plans), generator=torch.Generator().manual_seed(3)).to(device)
    assert same(irlvla.epdms(scenes, plans[shuffled], scene_index=index[shuffled], details=True), whole[shuffled])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("pdms", [False, True])
def test_devices_agree_to_the_bit(pdms: bool) -> None:
    scenes, plans, index = together(GOLDEN)
    cpu, gpu = (ops.score(ops.prepare(scenes.to(d)), plans.to(d), index.to(d), pdms=pdms, states=True) for d in ("cpu", "cuda"))
    for expected, found in zip(cpu, gpu, strict=True):
        assert torch.equal(expected.nan_to_num(-7.0), found.cpu().nan_to_num(-7.0))


def test_instruction_sets_agree_to_the_bit(tmp_path: Path) -> None:
    scenes, plans, index = together(GOLDEN)
    scenes.save(tmp_path / "scenes")
    irlvla.epdms(scenes, plans, scene_index=index, details=True).save(tmp_path / "expected")
    torch.save({"plans": plans, "index": index}, tmp_path / "plans")
    code = (
        "import sys, torch, irlvla; d = sys.argv[1]; p = torch.load(d + '/plans', weights_only=True)\n"
        "r = irlvla.epdms(irlvla.Scene.load(d + '/scenes'), p['plans'], scene_index=p['index'], details=True); r.save(d + '/found')\n"
        "from irlvla import _C; print(_C.isa())"
    )
    isas = _C.build_info()["isas"]
    for isa in isas[: isas.index(_C.isa()) + 1]:
        run = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"IRLVLA_ISA": isa}, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == isa
        assert same(Epdms.load(tmp_path / "found"), Epdms.load(tmp_path / "expected")), isa


def test_unknown_instruction_set_is_an_error() -> None:
    code = "from irlvla import _C; _C.isa()"
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | {"IRLVLA_ISA": "mmx"}, capture_output=True, text=True)
    assert run.returncode != 0
    assert "IRLVLA_ISA=mmx is not an instruction set" in run.stderr


def test_fork_in_the_middle_gives_the_same_bits() -> None:
    golden = GOLDEN[0]
    plans = random_plans(500)[None]
    expected = irlvla.epdms(golden.scene, plans)
    ops.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1) as pool:
            busy = pool.submit(lambda: [irlvla.epdms(golden.scene, plans) for _ in range(20)])
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)  # as DataLoader does: torch's own OpenMP does not survive a fork
                os._exit(0 if same(irlvla.epdms(golden.scene, plans), expected) else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert all(same(result, expected) for result in busy.result())
    finally:
        ops.set_num_threads(None)


def moved(scene: Scene, angle: float, dx: float, dy: float) -> Scene:
    """The scene after a rigid motion of the map frame."""
    c, s = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[c, s], [-s, c]], dtype=torch.float64)

    def poses(value: torch.Tensor) -> torch.Tensor:
        out = value.clone()
        out[..., :2] = value[..., :2] @ turn + torch.tensor([dx, dy])
        out[..., 2] += angle
        return out

    agents = poses(scene.agent_state)
    agents[..., 3:5] = scene.agent_state[..., 3:5] @ turn
    return dataclasses.replace(
        scene, ego=poses(scene.ego), history=poses(scene.history), reference=poses(scene.reference), previous_ego=poses(scene.previous_ego),
        agent_state=agents, points=scene.points @ turn + torch.tensor([dx, dy]), centerline=poses(scene.centerline),
    )  # fmt: skip


@given(
    st.sampled_from([g for g in PLAIN if not g.name.startswith("adv_")]), st.floats(-3.1, 3.1), st.floats(-5e5, 5e5), st.floats(-5e6, 5e6)
)
@settings(max_examples=40)
def test_rigid_motion_does_not_matter(golden: GoldenScene, angle: float, dx: float, dy: float) -> None:
    plans = torch.as_tensor(golden.candidates)[None]
    here, there = irlvla.epdms(golden.scene, plans), irlvla.epdms(moved(golden.scene, angle, dx, dy), plans)
    assert torch.allclose(here.raw[0], there.raw[0], atol=1e-6, equal_nan=True)  # type: ignore[index]


@given(st.permutations(range(10)), st.integers(0, 9))
@settings(max_examples=25)
def test_candidates_do_not_know_of_each_other(order: list[int], only: int) -> None:
    golden, plans = GOLDEN[3], random_plans(10, seed=5)
    whole = irlvla.epdms(golden.scene, plans[None], details=True)[0]
    assert same(irlvla.epdms(golden.scene, plans[order][None], details=True)[0], whole[order])
    assert same(irlvla.epdms(golden.scene, plans[only][None, None], details=True)[0], whole[only : only + 1])


# --- options ----------------------------------------------------------------------------------------------------------


def test_human_filter() -> None:
    golden = next(
        g for g in GOLDEN if g.human_filter and any(g.expected[f"human_{m}"] == 0 for m in ("drivable_area_compliance", "lane_keeping"))
    )
    plans = torch.as_tensor(golden.candidates)[None]
    none, fixed, legacy = (irlvla.epdms(golden.scene, plans, human_filter=f) for f in ("none", "fixed", "legacy"))  # type: ignore[arg-type]
    assert none.raw is None
    assert torch.equal(fixed.raw.nan_to_num(), none.values.nan_to_num())  # type: ignore[union-attr]
    assert torch.equal(fixed.values.nan_to_num(), legacy.values.nan_to_num())
    assert torch.equal(legacy.score(), none.score())
    assert (legacy.score() <= fixed.score()).all()
    assert (fixed.values.nan_to_num() >= none.values.nan_to_num()).all()
    assert (fixed.values != none.values).any()


def test_human_values_given_replace_those_scored_here() -> None:
    golden = next(g for g in GOLDEN if g.human_filter)
    off_road = random_plans(4)[None] * 30.0
    ones = torch.ones(1, 9, dtype=torch.float64)
    given = dataclasses.replace(golden.scene, human_values=ones.index_fill(1, torch.tensor([1]), 0.0))
    assert (irlvla.epdms(given, off_road).dac == 1.0).all()
    assert (irlvla.epdms(dataclasses.replace(golden.scene, human_values=ones), off_road).dac == 0.0).any()


def test_constant_velocity_traffic_moves_agents_straight_on() -> None:
    golden = next(g for g in GOLDEN if len(g.scene.agent_kind) > 3)
    scene = golden.scene
    steps = torch.arange(scene.agent_state.shape[1], dtype=torch.float64)[None, :, None] * 0.1
    state = scene.agent_state[:, :1].repeat(1, scene.agent_state.shape[1], 1)
    state[..., :2] += state[..., 3:5] * steps
    by_hand = dataclasses.replace(scene, agent_state=state, agent_valid=scene.agent_valid[:, :1].expand(-1, scene.agent_valid.shape[1]))
    plans = random_plans(30)[None]
    assert same(irlvla.epdms(scene, plans, traffic="constant_velocity", details=True), irlvla.epdms(by_hand, plans, details=True))


def test_shapes_and_containers() -> None:
    golden = PLAIN[0]
    poses = torch.as_tensor(golden.candidates).double()
    flat = irlvla.epdms(golden.scene, poses, scene_index=torch.zeros(len(poses), dtype=torch.int64))
    assert flat.values.shape == (len(poses), 9)
    for plans in (Plan(poses[None]), poses[None], poses[None].numpy(), poses[None].float(), golden.candidates[None]):
        assert torch.equal(irlvla.epdms(golden.scene, plans).score(), flat.score()[None])
    one = irlvla.epdms(golden.scene, Trajectory(poses[:1]))
    assert one.values.shape == (1, 9)
    assert torch.equal(one.score(), flat.score()[:1])


def test_scenes_changed_in_place_are_prepared_again() -> None:
    scene = dataclasses.replace(PLAIN[0].scene, points=PLAIN[0].scene.points.clone())
    plans = torch.as_tensor(PLAIN[0].candidates)[None]
    before = irlvla.epdms(scene, plans, human_filter="none")
    scene.points.mul_(1e-3)
    after = irlvla.epdms(scene, plans, human_filter="none")
    assert same(after, irlvla.epdms(copy.copy(scene), plans, human_filter="none"))
    assert not same(after, before)
    assert len(pickle.dumps(scene)) == len(pickle.dumps(dataclasses.replace(scene)))


def test_previous_plans_with_scene_index() -> None:
    golden = next(g for g in PLAIN if len(g.previous_candidates) == 2)
    two = Scene.cat([golden.scene, golden.scene])
    index, plans = torch.zeros(2, dtype=torch.int64), torch.as_tensor(golden.candidates)[:2]
    previous = torch.as_tensor(golden.previous_candidates)
    found = irlvla.epdms(two, plans, scene_index=index, previous=previous)
    each = [irlvla.epdms(golden.scene, plans[i][None, None], previous=previous[i : i + 1]).ec for i in range(2)]
    assert found.ec.tolist() == [float(e) for e in each]


def test_ten_hertz_plans() -> None:
    golden = PLAIN[0]
    dense = random_plans(6, poses=40)
    found = irlvla.epdms(golden.scene, dense[None], details=True)
    expected = reference.score_scene(golden.scene, dense, 0.1)
    assert torch.allclose(found.values[0], expected.values, atol=1e-9, equal_nan=True)


def test_nothing_to_score() -> None:
    golden = GOLDEN[0]
    assert irlvla.epdms(golden.scene, torch.zeros(1, 0, 8, 3), details=True).values.shape == (1, 0, 9)
    assert irlvla.epdms(golden.scene, torch.zeros(0, 8, 3), scene_index=torch.zeros(0, dtype=torch.int64)).score().shape == (0,)
    nobody = golden.scene[torch.zeros(0, dtype=torch.int64)]
    assert irlvla.epdms(nobody, torch.zeros(0, 4, 8, 3)).values.shape == (0, 4, 9)


def test_no_agents_no_map() -> None:
    scene = GOLDEN[0].scene
    groups = {"agent": 0, "polygon": 0, "ring": 0, "point": 0, "light": 0, "baseline": 0}
    fields = Scene.__dataclass_fields__
    empty = {n: getattr(scene, n)[:0] for n, f in fields.items() if f.metadata.get("rows") in groups}
    zeros = {n: torch.zeros_like(getattr(scene, n)[:1]) for n in ("ring_offsets", "point_offsets", "baseline_offsets")}
    offsets = {n: torch.zeros_like(getattr(scene, n)) for n in ("agent_offsets", "polygon_offsets", "light_offsets")}
    result = irlvla.epdms(dataclasses.replace(scene, **empty, **zeros, **offsets), random_plans(3)[None])
    assert result.raw is not None
    assert (result.raw[0, :, 0] == 1).all()
    assert (result.raw[0, :, 1] == 0).all(), "off the map is off the road"


# --- mistakes ---------------------------------------------------------------------------------------------------------


def broken(scene: Scene, **changes: object) -> Scene:
    return dataclasses.replace(scene, **changes)  # type: ignore[arg-type]


def poisoned(value: torch.Tensor, number: float = math.nan) -> torch.Tensor:
    out = value.clone()
    out.view(-1)[0] = number
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {"ego": poisoned(s.ego)}, r"scene 0 \('.*'\): the ego state holds NaN"),
        (lambda s: {"points": poisoned(s.points, math.inf)}, r"scene 0 .*: polygon 0 holds NaN, infinity"),
        (lambda s: {"centerline": poisoned(s.centerline)}, r"the centreline holds NaN"),
        (lambda s: {"agent_size": poisoned(s.agent_size, 0.0)}, r"agent 0 has size 0 x .*; both must be positive"),
        (
            lambda s: {"agent_state": torch.full_like(s.agent_state, math.nan)},
            r"agent 0 holds NaN, infinity or a value beyond 1e8 .* at step",
        ),
        (lambda s: {"history": poisoned(s.history)}, r"the history holds NaN"),
        (lambda s: {"history_time_us": s.history_time_us.flip(1)}, r"history_time_us must rise"),
        (lambda s: {"history_time_us": s.history_time_us * 3}, r"the history must span at most 2.4 s"),
        (lambda s: {"agent_state": s.agent_state[:, :30], "agent_valid": s.agent_valid[:, :30]}, r"41 or 51 time steps"),
        (lambda s: {"agent_valid": s.agent_valid[:, :-1]}, r"scenes.agent_valid must have shape"),
        (
            lambda s: {"point_offsets": s.point_offsets.clone().index_fill(0, torch.tensor([1]), 2)},
            r"a ring of polygon 0 has 2 points; it needs 3",
        ),
        (lambda s: {"polygon_offsets": s.polygon_offsets + 1}, r"scenes.polygon_offsets must rise from 0 to"),
        (lambda s: {"centerline": s.centerline[:1], "centerline_offsets": torch.tensor([0, 1])}, r"the centreline has 1 points"),
        (lambda s: {"reference": s.reference[:, :9]}, r"scenes.reference must have shape \(1, 41, 3\)"),
        (lambda s: {"human_dt": 0.3}, r"a plan must cover 4.0 s"),
    ],
)
def test_broken_scene_is_named(change: object, message: str) -> None:
    scene = next(g.scene for g in GOLDEN if g.name.startswith("urban"))
    with pytest.raises(InputError, match=message):
        irlvla.epdms(broken(scene, **change(scene)), random_plans(2)[None])  # type: ignore[operator]


def test_the_right_scene_is_named() -> None:
    scenes = Scene.cat([g.scene for g in GOLDEN[:3]])
    bad = scenes.ego.clone()
    bad[2, 0] = math.nan
    with pytest.raises(InputError, match=rf"scene 2 \('{GOLDEN[2].scene.token[0]}'\)"):
        irlvla.epdms(broken(scenes, ego=bad), torch.zeros(3, 1, 8, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: irlvla.epdms(s, torch.zeros(2, 4, 8, 3)),
            r"1 scenes need plans of shape \(B, K, T, 3\) or \(B, T, 3\) with B = 1, got \(2, 4, 8, 3\)",
        ),
        (lambda s: irlvla.epdms(s, torch.zeros(1, 4, 8, 2)), r"plans must have shape \(B, K, T, 3\)"),
        (
            lambda s: irlvla.epdms(s, torch.zeros(1, 4, 8, 3), traffic="logs"),
            r"traffic='logs' is not known; did you mean 'log'\? Accepted: 'log', 'replay_all'",
        ),
        (
            lambda s: irlvla.epdms(s, torch.zeros(1, 4, 8, 3), human_filter="off"),
            r"human_filter='off' is not known.*Accepted: 'fixed', 'legacy', 'none'",
        ),
        (lambda s: irlvla.epdms(s, Plan(torch.zeros(1, 4, 8, 3)), dt=0.4), r"dt=0.4 contradicts plans.dt=0.5"),
        (lambda s: irlvla.epdms(s, torch.zeros(1, 4, 8, 3), dt=0.4), r"a plan must cover 4.0 s: 8 poses every 0.4 s cover 3.2 s"),
        (lambda s: irlvla.epdms(s, torch.full((1, 4, 8, 3), math.nan)), r"plans\[0\] holds NaN"),
        (
            lambda s: irlvla.epdms(s, torch.zeros(4, 8, 3), scene_index=torch.tensor([0, 0, 0, 1])),
            r"scene_index must lie in 0 \.\.\. 0, got 0 \.\.\. 1",
        ),
        (
            lambda s: irlvla.epdms(s, torch.zeros(4, 8, 3), scene_index=torch.zeros(3)),
            r"with scene_index, plans are \(N, T, 3\) and scene_index \(N,\)",
        ),
        (
            lambda s: irlvla.epdms(
                broken(s, previous_ego=s.previous_ego * math.nan), torch.zeros(1, 4, 8, 3), previous=torch.zeros(1, 8, 3)
            ),
            r"no previous frame",
        ),
        (lambda s: irlvla.epdms(s, torch.zeros(1, 4, 8, 3), previous=torch.zeros(3, 8, 3)), r"previous must have one plan per scene"),
    ],
)
def test_bad_call(call: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(PLAIN[0].scene)  # type: ignore[operator]


def test_pdms_needs_five_seconds() -> None:
    scene = PLAIN[0].scene
    short = broken(scene, agent_state=scene.agent_state[:, :41], agent_valid=scene.agent_valid[:, :41])
    assert irlvla.epdms(short, random_plans(2)[None]).score().shape == (1, 2)
    with pytest.raises(InputError, match="agents need 51 steps, they have 41"):
        irlvla.epdms(short, random_plans(2)[None], pdms=True)


def test_import_is_light() -> None:
    code = "import sys, irlvla; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
    assert np.isclose(len(irlvla.__all__), len(set(irlvla.__all__)))
