"""Reactive traffic: the kernel against recordings of the official devkit and against its slow twin; what scoring makes of it; errors.

tests/traffic/ holds eight worlds of traffic_scenes.py, how an ego drives in each, and the agents that NavsimIDMTrafficAgents (navsim
0a380a9, nuplan-devkit v1.2, unchanged, shapely 2.2.0) returned for it on a duck-typed map.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irlvla
from golden_scenes import OFFICIAL as OFFICIAL_NAMES
from golden_scenes import GoldenScene, load
from golden_traffic import GRID, lane_graph, roundings
from irlvla import ops
from irlvla.errors import InputError
from irlvla.ops import reference
from irlvla.testing import example_plan, example_scene
from irlvla.types import STEPS, Kind, Scene
from traffic_scenes import traffic_scene

FOLDER = Path(__file__).parent / "traffic"
SCENES = Scene.load(FOLDER / "scenes.safetensors")
with np.load(FOLDER / "official.npz") as file:
    OFFICIAL = {name: torch.from_numpy(file[name]) for name in file.files}
EVERYONE = torch.arange(len(SCENES))


def test_agents_are_those_of_the_devkit() -> None:
    _, tracks, present = ops.traffic(SCENES, OFFICIAL["states"], EVERYONE)
    assert torch.equal(present, OFFICIAL["present"])
    torch.testing.assert_close(tracks[present], OFFICIAL["tracks"][present], rtol=0.0, atol=1e-8)


def test_the_reference_is_the_devkit_too() -> None:
    """The whole chain of rules in plain Python, in the worlds that it is quickest in."""
    for i in (4, 5):
        tracks, present = reference.traffic.rollout(SCENES[i], OFFICIAL["states"][i])
        rows = slice(int(SCENES.agent_offsets[i]), int(SCENES.agent_offsets[i + 1]))
        assert torch.equal(present, OFFICIAL["present"][rows])
        torch.testing.assert_close(tracks[present], OFFICIAL["tracks"][rows][present], rtol=0.0, atol=1e-8)


@pytest.fixture(scope="session")
def golden_reactive(shared_golden: Path) -> list[GoldenScene]:
    records = load(shared_golden / "reactive")
    assert len(records) == 90
    return records


def error(record: GoldenScene, tracks: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """The largest of each column; who is there at which step must be equal."""
    assert torch.equal(present, record.scene.agent_valid[:, :STEPS]), record.name
    off = tracks - record.scene.agent_state[:, :STEPS]
    off[..., 2] = torch.remainder(off[..., 2] + math.pi, 2.0 * math.pi) - math.pi
    return off[present].abs().amax(0)


def simulated_error(record: GoldenScene, scene: Scene) -> torch.Tensor:
    _, tracks, present = ops.traffic(scene, torch.from_numpy(record.expected["sim_states"]), torch.tensor([0]))
    return error(record, tracks, present)


def test_golden_traffic_on_baselines_from_polygons(golden_reactive: list[GoldenScene]) -> None:
    """Vertices a grid cell off at most: so are the agents, and no sub-metric and no event differs. The human meets traffic of his own."""
    for record in golden_reactive:
        scene = dataclasses.replace(lane_graph(record.scene), human_values=None)
        assert simulated_error(record, scene)[:2].max() <= math.sqrt(2.0) * GRID, record.name
        plans = torch.from_numpy(record.candidates).double()[None]
        scored = irlvla.epdms(scene, plans, traffic="reactive", details=True)
        expected = np.array([record.expected[name][0] for name in OFFICIAL_NAMES[:8]])
        np.testing.assert_allclose(scored.values[0, 0, :8], expected, rtol=0.0, atol=1e-9, err_msg=record.name)
        assert scored.details is not None
        assert scored.details.collision_step == record.expected["collision_time_idx"][0]
        assert scored.details.ttc_step == record.expected["ttc_time_idx"][0]


QUEUE = "urban_880002"  # six vehicles with gaps of 1 to 3 m


def test_golden_traffic_on_exact_baselines(golden_reactive: list[GoldenScene]) -> None:
    rounding = roundings()
    assert max(np.abs(units).max() for lanes in rounding.values() for units in lanes.values()) == 1.0
    for record in golden_reactive:
        name = record.name.rsplit("_", 1)[0]
        # What the devkit simplifies by 1e-5 m (below) moves a vehicle of the queue by no more.
        assert simulated_error(record, lane_graph(record.scene, rounding.get(name))).max() <= (1e-5 if name == QUEUE else 1e-6), record.name


def test_golden_queue_with_simplified_outlines(golden_reactive: list[GoldenScene], monkeypatch: pytest.MonkeyPatch) -> None:
    """The devkit simplifies what a vehicle occupies before it measures gaps; nothing else is missing."""
    plain = reference.traffic.Vehicle.footprint

    def simplified(vehicle: reference.traffic.Vehicle) -> list[list[tuple[float, float]]]:
        outline = shapely.union_all([shapely.Polygon(ring) for ring in plain(vehicle)]).simplify(1e-5)
        return [list(outline.exterior.coords)[:-1]]

    monkeypatch.setattr(reference.traffic.Vehicle, "footprint", simplified)
    record = next(record for record in golden_reactive if record.name.startswith(QUEUE))
    scene = lane_graph(record.scene, roundings()[QUEUE])
    tracks, present = reference.traffic.rollout(scene, torch.from_numpy(record.expected["sim_states"][0]))
    assert error(record, tracks, present).max() <= 1e-8


@settings(max_examples=3, deadline=None)
@given(st.integers(100, 10_000))
def test_kernel_equals_reference(seed: int) -> None:
    scene, states = traffic_scene(seed)
    _, tracks, present = ops.traffic(scene, states[None], torch.tensor([0]))
    slow, there = reference.traffic.rollout(scene, states)
    assert torch.equal(present, there)
    torch.testing.assert_close(tracks[present], slow[there], rtol=0.0, atol=1e-8)


def plans_for(scenes: Scene, k: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    speed = 1.5 * scenes.ego[:, None, None, 3] * torch.rand(len(scenes), k, 1, generator=generator, dtype=torch.float64)
    times = torch.arange(1, 9, dtype=torch.float64) * 0.5
    side = torch.randn(len(scenes), k, 1, generator=generator, dtype=torch.float64) * times / 4.0
    return torch.stack([speed * times, side, torch.zeros_like(side)], -1)


def test_scores_are_those_of_the_agents_that_result() -> None:
    """Every candidate, scored as a replay of its own traffic: all sub-metrics, events and the reference's progress."""
    plans = plans_for(SCENES)
    scored = irlvla.epdms(SCENES, plans, traffic="reactive", human_filter="none", details=True)
    assert scored.details is not None
    differ = set()
    for i in range(len(SCENES)):
        for k in range(plans.shape[1]):
            _, tracks, present = ops.traffic(SCENES[i], scored.details.states[i, k][None], torch.tensor([0]))
            replay = dataclasses.replace(SCENES[i], agent_state=tracks, agent_valid=present)
            again = irlvla.epdms(replay, plans[i : i + 1, k : k + 1], traffic="replay_all", human_filter="none", details=True)
            assert again.details is not None
            assert torch.equal(again.values[0, 0].nan_to_num(-1.0), scored.values[i, k].nan_to_num(-1.0))
            for name in ("collision_step", "collision_agent", "ttc_step", "ttc_agent", "reference_progress"):
                assert torch.equal(getattr(again.details, name)[0, 0], getattr(scored.details, name)[i, k]), name
            differ.add(tracks[present].sum().item())
    assert len(differ) > len(SCENES)  # candidates of one scene see different traffic


def test_the_human_meets_traffic_of_its_own() -> None:
    scene = dataclasses.replace(SCENES, human=plans_for(SCENES, 1)[:, 0])
    alone = irlvla.epdms(scene, scene.human[:, None], traffic="reactive", human_filter="none").values[:, 0]
    filtered = irlvla.epdms(scene, plans_for(SCENES), traffic="reactive")
    assert filtered.raw is not None
    failed = alone == 0.0
    failed[:, [4, 7, 8]] = False
    assert bool(failed.any())
    expected = torch.where(failed[:, None], 1.0, filtered.raw)
    assert torch.equal(expected.nan_to_num(-1.0), filtered.values.nan_to_num(-1.0))


def test_any_number_of_threads_gives_the_same() -> None:
    plans, results = plans_for(SCENES, 40), []
    for threads in (1, 2, 3):
        ops.set_num_threads(threads)
        try:
            results.append(irlvla.epdms(dataclasses.replace(SCENES), plans, traffic="reactive").values)
        finally:
            ops.set_num_threads(None)
    assert torch.equal(results[0].nan_to_num(-1.0), results[1].nan_to_num(-1.0))
    assert torch.equal(results[0].nan_to_num(-1.0), results[2].nan_to_num(-1.0))


def test_objects_and_people_stay_as_recorded() -> None:
    scene = example_scene(2)
    states = ops.simulate(example_plan(2, 1).poses[:, 0], scene.ego, scene.time_us)
    offsets, tracks, present = ops.traffic(scene, states, torch.arange(2))
    assert offsets.tolist() == scene.agent_offsets.tolist()
    others = scene.agent_kind != Kind.VEHICLE
    assert torch.equal(tracks[others], scene.agent_state[others, :41])
    assert torch.equal(present[others], scene.agent_valid[others, :41])
    assert not torch.equal(tracks[~others], scene.agent_state[~others, :41])


def test_without_baselines() -> None:
    scene = dataclasses.replace(example_scene(1), baseline=None, baseline_offsets=None, polygon_speed_limit=None)
    assert irlvla.epdms(scene, example_plan(1)).values.shape == (1, 3, 9)
    with pytest.raises(InputError, match="reactive traffic needs the baseline of every lane and connector; that of polygon 0 has 0 points"):
        irlvla.epdms(scene, example_plan(1), traffic="reactive")


def test_what_does_not_go_together() -> None:
    scene = example_scene(1)
    with pytest.raises(InputError, match="pdms=True is not measured in reactive traffic"):
        irlvla.epdms(scene, example_plan(1), traffic="reactive", pdms=True)
    with pytest.raises(InputError, match="did you mean 'reactive'"):
        irlvla.epdms(scene, example_plan(1), traffic="reactiv")  # type: ignore[arg-type]
    states = ops.simulate(example_plan(1, 1).poses[:, 0], scene.ego, scene.time_us)
    with pytest.raises(InputError, match=r"prepare\(scenes, reactive=True\)"):
        ops.traffic(scene, states, torch.tensor([0]), ops.prepare(scene))


def test_files_without_baselines_load(tmp_path: Path) -> None:
    """Scenes saved before lanes had baselines have none of the three fields."""
    import safetensors
    import safetensors.torch

    from irlvla.types import _checksum

    scene = example_scene(1)
    path = scene.save(tmp_path / "scene.safetensors")
    with safetensors.safe_open(path, framework="pt") as stream:
        fields = stream.metadata()["irlvla"].split(" ", 2)[2]
        tensors = {name: stream.get_tensor(name) for name in stream.keys() if "baseline" not in name and name != "polygon_speed_limit"}  # noqa: SIM118
    safetensors.torch.save_file(tensors, path, {"irlvla": f"Scene {_checksum(fields, tensors)} {fields}"})
    old = Scene.load(path)
    assert old.baseline.shape == (0, 2)
    assert old.baseline_offsets.tolist() == [0, 0, 0, 0]
    assert bool(old.polygon_speed_limit.isnan().all())
    assert len(Scene.cat([old, scene])) == 2
