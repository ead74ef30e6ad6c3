"""Reactive traffic: the kernel against recordings of the official devkit and against its slow twin; what scoring makes of it; errors.

tests/traffic/ holds eight worlds of traffic_scenes.py, how an ego drives in each, and the agents that NavsimIDMTrafficAgents (navsim
0a380a9, nuplan-devkit v1.2, unchanged, shapely 2.2.0) returned for it on a duck-typed map.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import irlvla
from irlvla import ops
from irlvla.errors import InputError
from irlvla.ops import reference
from irlvla.testing import example_plan, example_scene
from irlvla.types import Kind, Scene
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
