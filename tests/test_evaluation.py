"""The stage `evaluate`: exact scores, honest intervals, tables in the official layout; what fails is told, what was stopped goes on."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

import irlvla
from golden_scenes import load
from irlvla import leaderboard
from irlvla.configuration import read
from irlvla.errors import ConfigError, ContractError, FileError, InputError
from irlvla.registry import build
from irlvla.stages import EvaluateConfig, evaluate, evaluation, results
from irlvla.stages.resampling import differences, intervals
from irlvla.types import METRICS, Epdms, Plan, Scene
from plugins_for_tests import Site, empty_site

SCENES = 11

PLUGIN = '''
"""Components for tests."""
import irlvla
import torch
from pathlib import Path

class Noise(irlvla.Planner):
    """Draws plans at random, some of which it fails to."""

    class Config(irlvla.Config):
        fails: str = ""

    def __init__(self, config, *, width):
        super().__init__(config)

    def loss(self, features, human):
        return {}

    def sample(self, features, k, *, generator=None):
        obs = features.observation
        if self.config.fails == "all" or self.config.fails in obs.token:
            raise RuntimeError("out of paper")
        if self.config.fails == "shape":
            return irlvla.Plan(torch.zeros(len(obs), k, 8, 2))
        steps = torch.arange(1, 9)[:, None] * torch.tensor([4.0, 0.0, 0.0])
        return irlvla.Plan(steps + torch.randn(len(obs), k, 8, 1, generator=generator) * torch.tensor([1.0, 0.2, 0.0]))

class Torn(irlvla.Dataset):
    """Scenes of a file, of which some cannot be read."""

    class Config(irlvla.Config):
        path: str
        torn: list[int]
        error: str = "file"

    def __init__(self, config):
        super().__init__(config)
        self.inner = irlvla.build("dataset", {"name": "scenes", "path": config.path})

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        if index in self.config.torn:
            raise irlvla.FileError("torn apart") if self.config.error == "file" else KeyError("lidar")
        return self.inner[index]

class Flat(irlvla.RewardModel):
    """Says the same of all."""

    def forward(self, obs, scene, plan):
        return irlvla.Epdms(torch.full((*plan.poses.shape[:2], 9), 0.5))

@irlvla.hookimpl
def irlvla_planners():
    return {"acme_noise": Noise}

@irlvla.hookimpl
def irlvla_datasets():
    return {"acme_torn": Torn}

@irlvla.hookimpl
def irlvla_reward_models():
    return {"acme_flat": Flat}
'''


@pytest.fixture(scope="module")
def scenes() -> Scene:
    golden = load(Path(__file__).parent / "golden" / "public.npz")
    return Scene.cat([golden[i].scene for i in range(0, 40, 40 // SCENES)][:SCENES])


@pytest.fixture(scope="module")
def data(scenes: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes.save(tmp_path_factory.mktemp("scenes") / "scenes.safetensors")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    with empty_site(tmp_path, monkeypatch) as made:
        made.add("irlvla-acme", PLUGIN)
        made.scan()
        yield made


@pytest.fixture
def run(site: Site, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Evaluate: run(policies={"straight": "constant_velocity"}). The report has its own tests."""
    monkeypatch.setattr(evaluation, "write_report", lambda *_: None)
    numbers = iter(range(100))

    def run(**settings: Any) -> Path:
        given = {"data": {"name": "scenes", "path": str(data)}, "batch": 4, "resamples": 200, "out": f"run-{next(numbers)}", **settings}
        return evaluate(read(EvaluateConfig, given))

    return run


def summary_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def rows_of(directory: Path) -> list[dict[str, str]]:
    with (directory / "scores.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def means(directory: Path, name: str) -> dict[str, float]:
    return {column: of["mean"] for column, of in summary_of(directory)["policies"][name]["metrics"].items()}


TWO = {"straight": "constant_velocity", "noise": {"planner": "acme_noise", "candidates": 5}}

# -- values ------------------------------------------------------------------------------------------------------------


def test_values_are_those_of_epdms(run: Callable[..., Path], scenes: Scene, data: Path) -> None:
    directory = run(policies={"straight": "constant_velocity"}, reward="exact")
    dataset = build("dataset", {"name": "scenes", "path": str(data)})
    straight = irlvla.registry.build("planner", "constant_velocity", width=1)
    obs = irlvla.Observation.cat([dataset[i][0] for i in range(SCENES)])
    plan = straight.sample(irlvla.Features(obs), 1)
    fixed, legacy = irlvla.epdms(scenes, plan), irlvla.epdms(scenes, plan, human_filter="legacy")
    rows = rows_of(directory)
    assert [row["token"] for row in rows] == list(scenes.token)
    assert [float(row["epdms"]) for row in rows] == fixed.score()[:, 0].tolist()
    assert [float(row["epdms_legacy"]) for row in rows] == legacy.score()[:, 0].tolist()
    assert [float(row["believed"]) for row in rows] == fixed.score()[:, 0].tolist()
    for number, metric in enumerate(METRICS[:8]):
        assert [float(row[metric]) for row in rows] == fixed.values[:, 0, number].tolist()
    assert means(directory, "straight")["epdms"] == pytest.approx(float(fixed.score().mean()), rel=1e-12)
    assert ("pdms" in rows[0]) == (scenes.agent_state.shape[1] > 41)
    assert {"ade", "fde", "seconds", "causes"} <= rows[0].keys()
    driven = Plan.load(directory / "plans" / "straight.safetensors")
    assert torch.equal(driven.poses, plan.poses.double())
    assert any("hits" in row["causes"] for row in rows if float(row["nc"]) == 0.0)


def test_best_of_many_by_the_exact_reward_is_the_best(run: Callable[..., Path]) -> None:
    chosen = {"planner": "acme_noise", "candidates": 5, "reward": "exact"}
    directory = run(policies={**TWO, "best": chosen, "flat": {**chosen, "reward": "acme_flat"}})
    found = {name: [float(row["epdms"]) for row in rows_of(directory) if row["policy"] == name] for name in ("noise", "best", "flat")}
    assert all(best >= first for best, first in zip(found["best"], found["noise"], strict=True))
    assert found["best"] != found["noise"] == found["flat"]  # of equals the first


def test_a_file_of_plans_drives_as_it_was_driven(run: Callable[..., Path]) -> None:
    first = run(policies=TWO)
    again = run(policies={"again": {"plans": str(first / "plans" / "noise.safetensors")}})
    assert means(again, "again")["epdms"] == means(first, "noise")["epdms"]


def test_extended_comfort_compares_with_the_frame_before(site: Site, run: Callable[..., Path], scenes: Scene, tmp_path: Path) -> None:
    """Two frames of one drive among others, the later one first in the data."""
    now = scenes[0]
    before = dataclasses.replace(
        now,
        token=("before",),
        time_us=now.time_us - 500_000,
        ego=now.ego - torch.tensor([3.0] + [0.0] * 10, dtype=torch.float64),
        previous_ego=torch.full_like(now.previous_ego, torch.nan),
    )
    now = dataclasses.replace(now, previous_time_us=before.time_us, previous_ego=before.ego)
    other = dataclasses.replace(scenes[1], previous_ego=torch.full_like(now.previous_ego, torch.nan))
    path = Scene.cat([now, before, other]).save(tmp_path / "log.safetensors")
    directory = run(data={"name": "scenes", "path": str(path)}, policies={"straight": "constant_velocity"})
    plans = Plan.load(directory / "plans" / "straight.safetensors")
    expected = irlvla.epdms(now, plans.poses[:1, 0], previous=plans.poses[1:2, 0])
    found = [row["ec"] for row in rows_of(directory)]
    assert found == [repr(float(expected.ec)), "", ""]
    assert float(rows_of(directory)[0]["epdms"]) == float(expected.score())


# -- statistics --------------------------------------------------------------------------------------------------------


@pytest.fixture
def table() -> np.ndarray:
    values = np.random.default_rng(3).random((40, 3)) ** 3
    values[::7, 1] = np.nan
    return values


def test_intervals_are_those_of_scipy(table: np.ndarray) -> None:
    for column, found in zip(table.T, intervals(table, 5000, seed=1), strict=True):
        known = column[~np.isnan(column)]
        expected = scipy.stats.bootstrap((known,), np.mean, n_resamples=5000, method="percentile", rng=2).confidence_interval
        assert found["mean"] == pytest.approx(known.mean())
        assert found["count"] == len(known)
        assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=0.01)


def test_resampling_is_what_a_loop_does(table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws, one by one; in any number of parts."""
    draws = np.random.default_rng(5).integers(len(table), size=(200, len(table)))
    slow = np.array([[np.nanmean(table[rows, column]) for column in range(3)] for rows in draws])
    low, high = np.percentile(slow, [2.5, 97.5], axis=0)
    for limit in (1, 2_000_000):
        monkeypatch.setattr("irlvla.stages.resampling.DRAWS", limit)
        found = intervals(table, 200, seed=5)
        np.testing.assert_allclose([of["low"] for of in found], low, rtol=1e-12)
        np.testing.assert_allclose([of["high"] for of in found], high, rtol=1e-12)


def test_differences_are_paired(table: np.ndarray) -> None:
    """A small gain in every scene is certain, although the scenes differ much more."""
    (gain, *_) = differences(table + 0.01, table, 2000)
    assert gain["mean"] == pytest.approx(0.01)
    assert gain["low"] == pytest.approx(0.01)
    assert gain["p"] == pytest.approx(2 / 2001)
    (same, *_) = differences(table, table, 2000)
    assert (same["mean"], same["p"]) == (0.0, 1.0)
    shuffled = np.random.default_rng(0).permutation(table[:, :1])
    (chance,) = differences(shuffled, table[:, :1], 2000)
    assert chance["p"] > 0.05
    change = (shuffled - table[:, :1])[:, 0]
    draws = np.random.default_rng(0).integers(40, size=(2000, 40))
    below = (change[draws].mean(1) <= 0).sum()
    assert chance["p"] == pytest.approx(2 * (min(below, 2000 - below) + 1) / 2001, abs=2 / 2001)


def test_nothing_measured_has_no_interval() -> None:
    nothing = np.full((4, 1), np.nan)
    assert intervals(nothing, 100) == [{"mean": None, "low": None, "high": None, "count": 0}]
    assert differences(nothing, nothing, 100)[0]["p"] is None


def test_policies_are_compared_with_the_baseline(run: Callable[..., Path]) -> None:
    directory = run(policies={**TWO, "human": "human"}, baseline="human")
    summary = summary_of(directory)
    assert set(summary["differences"]) == {"straight", "noise"}
    assert summary["policies"]["human"]["failed"] == 2  # where none was recorded
    score = {
        name: np.array([float(row["epdms"] or "nan") for row in rows_of(directory) if row["policy"] == name]) for name in (*TWO, "human")
    }
    for name in TWO:
        change = summary["differences"][name]["epdms"]
        assert change["mean"] == pytest.approx(np.nanmean(score[name] - score["human"]))
        assert change["count"] == SCENES - 2
        assert change["low"] <= change["mean"] <= change["high"]
    assert {(of["policy"], of["against"]) for of in summary["pairs"]} == {("straight", "noise"), ("straight", "human"), ("noise", "human")}
    assert summary["policies"]["human"]["metrics"]["ade"]["mean"] == pytest.approx(0.0, abs=1e-6)
    assert summary["policies"]["noise"]["latency_ms"]["p90"] >= summary["policies"]["noise"]["latency_ms"]["median"] > 0.0
    assert summary["policies"]["noise"]["latency_ms"]["batch"] == 4


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_table_is_in_the_official_layout(run: Callable[..., Path], scenes: Scene) -> None:
    directory = run(policies=TWO)
    lines = (directory / "official" / "straight.csv").read_text().splitlines()
    assert lines[0] == (
        ",token,valid,no_at_fault_collisions,drivable_area_compliance,driving_direction_compliance,traffic_light_compliance,"
        "ego_progress,time_to_collision_within_bound,lane_keeping,history_comfort,two_frame_extended_comfort,score"
    )
    assert len(lines) == SCENES + 2
    assert lines[1].startswith(f"0,{scenes.token[0]},True,")
    assert lines[-1].startswith(f"{SCENES},average_all_frames,True,")
    tokens, values, scores = leaderboard.read_results(directory / "official" / "straight.csv")
    rows = rows_of(directory)[:SCENES]
    assert tokens == [row["token"] for row in rows]
    np.testing.assert_array_equal(values[:, 0], [float(row["nc"]) for row in rows])
    np.testing.assert_array_equal(scores, [float(row["epdms"]) for row in rows])
    assert float(lines[-1].rpartition(",")[2]) == pytest.approx(scores.mean())


def test_two_stages_have_their_totals(run: Callable[..., Path], scenes: Scene, tmp_path: Path) -> None:
    """Groups of a recorded pair and one follow-up; a group with a scene that fails is left out, and counted."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"

    def pair(number: int, names: tuple[str, str]) -> Scene:
        now = dataclasses.replace(scenes[number], token=(names[0],), human=torch.full_like(scenes[number].human, torch.nan))
        return Scene.cat([now, dataclasses.replace(now, token=(names[1],), time_us=now.time_us - 500_000)])

    Scene.cat([pair(0, ("a", "a-")), pair(1, ("b", "b-"))]).save(first)
    Scene.cat([pair(2, ("c", "c-")), pair(3, ("d", "d-"))]).save(second)
    mapping = tmp_path / "split.yaml"
    mapping.write_text("reactive_all_mapping:\n- [a, a-, [[c, c-]]]\n- [b, b-, [[d, d-]]]\n")
    stages = {"data": {"name": "scenes", "path": str(second)}, "mapping": str(mapping)}
    failing = {"planner": {"name": "acme_noise", "fails": "d"}}
    directory = run(
        data={"name": "scenes", "path": str(first)}, second_stage=stages, policies={"straight": "constant_velocity", "failing": failing}
    )
    summary = summary_of(directory)
    found = summary["policies"]["straight"]["two_stage"]
    assert (found["groups"], found["left_out"]) == (2, 0)
    with (directory / "official" / "straight.csv").open(newline="") as stream:
        rows = {row["token"]: row for row in csv.DictReader(stream)}
    score = {token: float(row["score"]) for token, row in rows.items()}
    groups = [(score["a"] * score["c"] + score["a-"] * score["c-"]) / 2, (score["b"] * score["d"] + score["b-"] * score["d-"]) / 2]
    assert found["combined"]["fixed"]["score"] == pytest.approx(np.mean(groups)) == score["extended_pdm_score_combined"]
    stages = {token: [bool(rows[token][f"no_at_fault_collisions_stage_{stage}"]) for stage in ("one", "two")] for token in ("a", "c")}
    assert stages == {"a": [True, False], "c": [False, True]}
    assert rows["a"]["two_frame_extended_comfort_stage_one"] != ""
    left = summary["policies"]["failing"]["two_stage"]
    assert (left["groups"], left["left_out"]) == (1, 1)


# -- what fails --------------------------------------------------------------------------------------------------------


def test_a_scene_that_fails_is_told_and_the_others_count(run: Callable[..., Path], scenes: Scene) -> None:
    token = scenes.token[5]
    directory = run(policies={"straight": "constant_velocity", "noise": {"planner": {"name": "acme_noise", "fails": token}}})
    summary = summary_of(directory)
    assert summary["failures"] == [{"policy": "noise", "row": 5, "token": token, "cause": "RuntimeError: out of paper"}]
    assert summary["policies"]["noise"]["failed"] == 1
    assert summary["policies"]["noise"]["metrics"]["epdms"]["count"] == SCENES - 1
    assert summary["policies"]["straight"]["metrics"]["epdms"]["count"] == SCENES
    assert summary["differences"]["noise"]["epdms"]["count"] == SCENES - 1
    assert "1 drives failed" in summary["result"]
    (row,) = [row for row in rows_of(directory) if row["valid"] == "False"]
    assert (row["token"], row["epdms"], row["causes"]) == (token, "", "RuntimeError: out of paper")
    assert f"5,{token},False,,,,,,,,,,\n" in (directory / "official" / "noise.csv").read_text()


@pytest.mark.parametrize(("error", "cause"), [("file", "torn apart"), ("other", "KeyError: 'lidar'")])
def test_a_scene_that_cannot_be_read_is_told(run: Callable[..., Path], data: Path, error: str, cause: str) -> None:
    torn = {"name": "acme_torn", "path": str(data), "torn": [2, 8], "error": error}
    summary = summary_of(run(data=torn, policies=TWO))
    assert [(of["row"], of["policy"]) for of in summary["failures"]] == [(2, "straight"), (8, "straight"), (2, "noise"), (8, "noise")]
    assert all(cause in of["cause"] for of in summary["failures"])
    assert summary["policies"]["noise"]["metrics"]["epdms"]["count"] == SCENES - 2
    assert "2 scenes cannot be read" in summary["result"]


def test_scenes_that_do_not_fit_together_are_a_mistake(run: Callable[..., Path], scenes: Scene, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    scenes[0].save(folder / "a.safetensors")
    dataclasses.replace(scenes[1], human_values=torch.ones(1, 9, dtype=torch.float64)).save(folder / "b.safetensors")
    with pytest.raises(InputError, match="'human_values' is present in some items and missing in others"):
        run(data={"name": "scenes", "path": str(folder)}, policies=TWO)


def test_what_fails_everywhere_is_a_mistake(run: Callable[..., Path], data: Path) -> None:
    with pytest.raises(InputError, match=r"policies\.noise fails in all of the first 11 scenes: RuntimeError: out of paper"):
        run(policies={**TWO, "noise": {"planner": {"name": "acme_noise", "fails": "all"}}})
    with pytest.raises(InputError, match=r"none of the first 11 scenes of .* can be read: torn apart"):
        run(data={"name": "acme_torn", "path": str(data), "torn": list(range(SCENES))}, policies=TWO)
    with pytest.raises(ContractError, match=r"policies\.noise: .* must return poses of shape"):
        run(policies={**TWO, "noise": {"planner": {"name": "acme_noise", "fails": "shape"}}})


# -- going on ----------------------------------------------------------------------------------------------------------


def timeless(directory: Path) -> Any:
    """All that is told but how long it took."""
    summary = summary_of(directory)
    for of in summary["policies"].values():
        del of["latency_ms"]
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in rows_of(directory)]
    return {**summary, "result": None}, rows, (directory / "official" / "noise.csv").read_text()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.77])
def test_a_run_that_was_killed_ends_the_same(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kept: float) -> None:
    whole = run(policies=TWO)
    calls: list[int] = []
    measure = evaluation.Measurement.__call__

    def dies(self: Any, reading: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, reading)

    monkeypatch.setattr(evaluation.Measurement, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        run(policies=TWO, out="killed")
    measured = Path("killed", "scenes.jsonl")
    assert len(measured.read_text().splitlines()) == 8
    measured.write_text(measured.read_text()[: round(kept * measured.stat().st_size)])  # a kill may cut anywhere
    assert not Path("killed", "summary.json").exists()
    run(policies=TWO, out="killed", resume=True)
    assert timeless(Path("killed")) == timeless(whole)
    assert len(calls) > 3
    before = len(calls)
    run(policies=TWO, out="killed", resume=True)  # nothing is left to measure
    assert len(calls) == before


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"policies": {}}, ConfigError, "must name at least one"),
        ({"policies": {"a/b": "human"}}, ConfigError, "'a/b' cannot be"),
        ({"policies": {"a": "constant_velosity"}}, irlvla.PluginError, "Did you mean 'constant_velocity'"),
        ({"policies": {"a": "runs/none/model"}}, FileError, r"policies\.a: runs/none/model"),
        ({"policies": {"a": {"candidates": 2}}}, ConfigError, r"policies\.a: give exactly one of policy, planner and plans"),
        ({"policies": {"a": {"polici": "x/y"}}}, ConfigError, "polici"),
        ({"policies": TWO, "baseline": "noize"}, ConfigError, "baseline: no policy is named 'noize'. Did you mean 'noise'"),
        ({"policies": TWO, "subject": "me"}, ConfigError, "subject: no policy is named 'me'. Named: straight, noise"),
        ({"policies": TWO, "reward": "exakt"}, irlvla.PluginError, "Did you mean 'exact'"),
        ({"policies": TWO, "reward": "exact", "saved_reward": "x/y"}, ConfigError, "reward and saved_reward: give one of them"),
    ],
)
def test_mistakes_are_named(run: Callable[..., Path], settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**settings)
    assert not list(Path().glob("run-*"))


def test_the_previous_frame_is_found_by_time_and_place() -> None:
    def record(time: float, x: float, before: float | None) -> dict[str, Any]:
        previous = [float("nan")] * 11 if before is None else [before, 0.0] + [0.0] * 9
        return {"time_us": int(time * 1e6), "ego": [x] + [0.0] * 10, "previous_time_us": int((time - 0.5) * 1e6), "previous_ego": previous}

    frames = [record(1.0, 10.0, 5.0), record(0.5, 5.0, 0.0), record(0.5, 50.0, None), record(1.01, 60.0, 50.1)]
    assert results._previous(frames) == {0: 1, 3: 2}
    assert results._previous(frames[2:3]) == {}


def test_tables_tell_what_is_not_valid(tmp_path: Path) -> None:
    values = torch.ones(3, 9, dtype=torch.float64)
    values[1] = torch.nan
    path = leaderboard.write_results(tmp_path / "t.csv", ["a", "b", "c"], Epdms(values))
    lines = path.read_text().splitlines()
    assert lines[2] == "1,b,False,,,,,,,,,,"
    assert lines[-1] == "3,average_all_frames,False,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0,1.0"
    assert np.isnan(leaderboard.read_results(path)[2][1])
