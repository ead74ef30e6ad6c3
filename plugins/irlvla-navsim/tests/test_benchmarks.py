"""The benchmarks: official facts, and a folder in the official layout from the command line to the official table."""

from __future__ import annotations

import csv
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openscene
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

import irlvla
import irlvla_navsim
from irlvla import aggregation
from irlvla.cli import app
from irlvla.configuration import read
from irlvla.errors import FileError
from irlvla.leaderboard import COLUMNS, read_mapping
from irlvla.ops import reference
from irlvla.registry import build
from irlvla.shards import with_reference
from irlvla.stages import EvaluateConfig
from irlvla.testing import benchmark_checks
from irlvla.types import Scene
from irlvla_navsim.dataset import NavsimDataset, SyntheticStageDataset
from irlvla_navsim.pickles import read_pickle
from irlvla_navsim.splits import mapping_of, read_split, second_stage, source

LOG = "2021.05.12.22.00.38_veh-35_01008_01518"
FIRST = {row: f"{row:016x}" for row in (5, 6, 7, 8)}  # tokens of recorded frames, by row of the log
SECOND = {"a" * 16 + "1": (9, 0.2), "a" * 16 + "2": (8, 0.2), "b" * 16 + "1": (9, -0.4), "b" * 16 + "2": (8, -0.4)}  # row, shift
SECOND |= {"c" * 16 + "1": (9, 1.0), "c" * 16 + "2": (8, 1.0)}
GROUPS = [  # now, previous, what continues them
    [FIRST[6], FIRST[5], [["a" * 16 + "1", "a" * 16 + "2"], ["b" * 16 + "1", "b" * 16 + "2"]]],
    [FIRST[8], FIRST[7], [["c" * 16 + "1", "c" * 16 + "2"]]],
]
REAL = Path(os.environ.get("IRLVLA_REAL_DATA", Path(__file__).resolve().parents[4] / "shared" / "real"))
official = pytest.mark.skipif(not REAL.is_dir(), reason=f"needs {REAL} (set IRLVLA_REAL_DATA to another place)")
STRAIGHT = "policies={straight: constant_velocity}"

test_navtest = benchmark_checks("navtest", root="data")
test_navhard = benchmark_checks("navhard", root="data", size=(96, 256))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the official layout: a log, a city, images, and six scenes of a second stage."""
    root = tmp_path_factory.mktemp("openscene")
    openscene.write_map(root / "maps")
    openscene.write_log(root / "navsim_logs" / "test", 20, LOG)
    openscene.write_images(root / "sensor_blobs" / "test", openscene.frames(20, LOG))
    openscene.write_images(root / "warmup_two_stage" / "sensor_blobs", openscene.frames(20, LOG))
    for token, (row, shift) in SECOND.items():
        openscene.write_synthetic(root / "warmup_two_stage" / "synthetic_scene_pickles", token, row, shift, LOG)
    scenes = {"num_history_frames": 4, "num_future_frames": 8, "frame_interval": 1, "tokens": list(FIRST.values()), "log_names": [LOG]}
    (root / "filter.yaml").write_text(yaml.safe_dump(scenes))
    (root / "mapping.yaml").write_text(yaml.safe_dump({"reactive_all_mapping": GROUPS}))
    return root


def own(root: Path) -> list[str]:
    """Settings that put the scenes of the folder in the place of the official ones."""
    return [
        "--benchmark", "warmup", f"benchmark.root={root}", "data.split=null", f"data.filter={root}/filter.yaml",
        "second_stage.data.split=null", f"second_stage.mapping={root}/mapping.yaml", "traffic=log", "resamples=100", "gallery=0",
    ]  # fmt: skip


@pytest.fixture
def run(root: Path) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", *own(root), *arguments], catch_exceptions=False)

    return run


def table(path: Path) -> dict[str, dict[str, str]]:
    with path.open(newline="") as stream:
        return {row["token"]: row for row in csv.DictReader(stream)}


# -- official facts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split", "folder", "traffic"),
    [
        ("navtest", "navtest", "test", "log"),
        ("navhard", "navhard_two_stage", "test", "reactive"),
        ("warmup", "warmup_two_stage", "test", "reactive"),
        ("navmini", "navmini", "mini", "log"),
        ("navtrain", "navtrain", "trainval", "log"),
        ("navval", "navtrain_val", "trainval", "log"),
    ],
)
def test_a_benchmark_is_what_the_devkit_runs(name: str, split: str, folder: str, traffic: str) -> None:
    brought = build("benchmark", {"name": name, "root": "data", "size": [96, 256]}).settings()
    assert brought["traffic"] == traffic
    assert brought["data"]["split"] == brought["about"]["split"] == split
    assert brought["data"]["logs"] == f"data/navsim_logs/{folder}"
    assert brought["data"]["sensors"] == f"data/sensor_blobs/{folder}"
    assert brought["about"]["devkit"] == source() == "autonomousvision/navsim 0a380a9063d7162ec93d0f51e9990ebac585f720"
    second = brought["second_stage"]
    assert (second is None) == (traffic == "log")
    if second is not None:
        assert second["data"]["scenes"] == f"data/{split}/synthetic_scene_pickles"
        assert second["data"]["size"] == [96, 256]
        assert read_mapping(Path(second["mapping"])) == read_mapping(mapping_of(split))
    else:
        read(EvaluateConfig, {"benchmark": {"name": name, "root": "data"}, "policies": {"a": "human"}})


@pytest.mark.parametrize(("split", "groups", "scenes"), [("navhard_two_stage", 225, 5462), ("warmup_two_stage", 8, 204)])
def test_official_mappings(split: str, groups: int, scenes: int) -> None:
    mapping = read_mapping(mapping_of(split))
    assert len(mapping) == groups
    assert len(second_stage(split)) == scenes
    assert {token for pair in mapping for token in pair} == read_split(split).tokens
    assert {len(token) for token in second_stage(split)} == {17}


@official
def test_the_warmup_mapping_is_the_official_one() -> None:
    assert read_mapping(mapping_of("warmup_two_stage")) == read_mapping(
        REAL / "navsim_v2_warmup_two_stage_cv" / "mapping_warmup_two_stage.yaml"
    )


@official
def test_the_recorded_warmup_result() -> None:
    """The devkit's constant velocity agent, with our mapping: to the last bit."""
    folder = REAL / "navsim_v2_warmup_two_stage_cv"
    one, two = (list(csv.DictReader((folder / f"stage_{name}.csv").open(newline=""))) for name in ("one", "two"))
    tokens = [row["token"] for row in one + two]
    start = np.array([[float(row["start_x"]), float(row["start_y"])] for row in one + two])
    end = np.array([[float(row.get("endpoint_x") or "nan"), float(row.get("endpoint_y") or "nan")] for row in one + two])
    mapping = read_mapping(mapping_of("warmup_two_stage"))
    weight = aggregation.weights(mapping, tokens, start, end)
    score = np.array([[float(row["score"])] for row in one + two])
    _, combined, *stages = aggregation.aggregate(mapping, tokens, score, weight)
    assert combined.item() == 0.1853562745165113
    assert [stage.item() for stage in stages] == [0.46028921296917297, 0.3341286472565139]


@official
@pytest.mark.parametrize(
    "name",
    [
        "diffvla/navhard_two_stage",
        *(f"navsim_v2_scores/{a}_navhard" for a in ("ltf_sim", "diffusiondrive_sim", "gtrs_dense_vov_sim_reward")),
    ],
)
def test_official_navhard_tables_fit_the_mapping(name: str) -> None:
    """Their rows are the scenes of the split, and their stage one is the mean over its groups, in every column."""
    rows = table(REAL / f"{name}.csv")
    expected = rows.pop("extended_pdm_score_stage_one")
    found = {token for token in rows if not token.startswith("extended")}
    assert found == read_split("navhard_two_stage").tokens | second_stage("navhard_two_stage")
    columns = [*(f"{column}_stage_one" for column in COLUMNS), "score"]
    groups = [
        [[float(rows[token][column]) for column in columns] for token in pair] for pair in read_mapping(mapping_of("navhard_two_stage"))
    ]
    mean = np.array(groups).reshape(-1, len(columns)).mean(0)
    np.testing.assert_allclose(mean, [float(expected[column]) for column in columns], rtol=1e-14)


# -- a whole split, or a part ------------------------------------------------------------------------------------------


def test_missing_scenes_are_told(root: Path) -> None:
    settings: dict[str, Any] = {"logs": root / "navsim_logs" / "test", "maps": root / "maps"}
    folder = root / "warmup_two_stage" / "synthetic_scene_pickles"
    with pytest.raises(FileError, match=r"warmup_two_stage has 204 scenes or logs, of which 204 are missing here: .*partial=true takes"):
        SyntheticStageDataset(SyntheticStageDataset.Config(scenes=folder, maps=root / "maps", split="warmup_two_stage"))
    log = min(read_split("navmini").log_names or ())
    logs = root / "navmini"
    token = min(read_split("navmini").tokens or ())
    if not logs.exists():
        raws = openscene.frames(28, log)
        raws[3]["token"] = token
        logs.mkdir()
        (logs / f"{log}.pkl").write_bytes(pickle.dumps(raws))
    with pytest.raises(FileError, match="navmini has 396 scenes or logs, of which 395 are missing here"):
        NavsimDataset(NavsimDataset.Config(**{**settings, "logs": logs}, split="navmini"))
    part = NavsimDataset(NavsimDataset.Config(**{**settings, "logs": logs}, split="navmini", partial=True))
    assert [part.token(i) for i in range(len(part))] == [token] == list(part[0][1].token)


# -- from the command line to the table --------------------------------------------------------------------------------


def scenes_of(root: Path) -> list[Scene]:
    first = NavsimDataset(NavsimDataset.Config(logs=root / "navsim_logs" / "test", maps=root / "maps", filter=root / "filter.yaml"))
    second = SyntheticStageDataset(
        SyntheticStageDataset.Config(scenes=root / "warmup_two_stage" / "synthetic_scene_pickles", maps=root / "maps")
    )
    return [with_reference(dataset[i][1]) for dataset in (first, second) for i in range(len(dataset))]


def by_hand(scene: Scene, plan: torch.Tensor, previous: tuple[Scene, torch.Tensor]) -> list[float]:
    """Sub-metrics and score of one scene, by the slow plain reference."""
    other, before = previous
    result = reference.score_scene(scene, plan[None])
    now, then = (reference.simulate(poses[None], one.ego, one.time_us, 0.5) for one, poses in ((scene, plan), (other, before)))
    later = scene.time_us > other.time_us
    pair = (now, then) if later else (then, now)
    values = [*result.values[0, :8].tolist(), float(reference.extended_comfort(*pair, torch.tensor([5]))[0])]
    nc, dac, ddc, tlc, ep, ttc, lk, hc, ec = values
    return [*values, nc * dac * ddc * tlc * (5 * ep + 5 * ttc + 2 * lk + 2 * hc + 2 * ec) / 16]


def test_a_folder_evaluates_to_what_plain_python_computes(root: Path, run: Callable[..., Result]) -> None:
    result = run(STRAIGHT, "out=run")
    assert result.exit_code == 0, result.output
    rows = table(Path("run/official/straight.csv"))
    scenes = {scene.token[0]: scene for scene in scenes_of(root)}
    assert list(rows)[:-3] == list(scenes) == [*FIRST.values(), *sorted(SECOND)]
    plans = {token: torch.tensor([[openscene.SPEED * 0.5 * (i + 1), 0.0, 0.0] for i in range(8)]).double() for token in scenes}
    expected: dict[str, list[float]] = {}
    for now, before, pairs in GROUPS:
        for one, other in [(now, before), *pairs]:
            for token, partner in ((one, other), (other, one)):
                expected[token] = by_hand(scenes[token], plans[token], (scenes[partner], plans[partner]))
    for token, values in expected.items():
        stage = "one" if token in FIRST.values() else "two"
        found = [float(rows[token][f"{column}_stage_{stage}"]) for column in COLUMNS] + [float(rows[token]["score"])]
        assert found == pytest.approx(values, abs=1e-9), token
        assert rows[token]["valid"] == "True"
    assert len({tuple(values) for values in expected.values()}) > 3
    totals = []
    for now, before, pairs in GROUPS:
        chains = []
        for recorded, follow_ups in ((now, [a for a, _ in pairs]), (before, [b for _, b in pairs])):
            end = scenes[recorded].ego[0, :2].numpy() + np.array([4 * openscene.SPEED, 0.0])
            kernel = np.array([np.exp(-((end - scenes[token].ego[0, :2].numpy()) ** 2).sum() / 0.2) for token in follow_ups])
            kernel = np.full(len(kernel), 1 / len(kernel)) if np.isclose(kernel.sum(), 0.0) else kernel / kernel.sum()
            chains.append(expected[recorded][-1] * sum(w * expected[token][-1] for w, token in zip(kernel, follow_ups, strict=True)))
        totals.append(sum(chains) / 2)
    assert float(rows["extended_pdm_score_combined"]["score"]) == pytest.approx(np.mean(totals), abs=1e-9)
    assert 0.0 < np.mean(totals) < 1.0


def test_reactive_traffic_drives_on_the_lanes_of_the_map(root: Path, run: Callable[..., Result]) -> None:
    """In both stages, as irlvla.epdms has it scene by scene."""
    assert run(STRAIGHT, "out=run", "traffic=reactive").exit_code == 0
    rows = table(Path("run/official/straight.csv"))
    ahead = torch.tensor([[[openscene.SPEED * 0.5 * (i + 1), 0.0, 0.0] for i in range(8)]]).double()
    for scene in scenes_of(root):
        token = scene.token[0]
        expected = irlvla.epdms(scene, ahead, traffic="reactive").values[0, :8].tolist()
        stage = "one" if token in FIRST.values() else "two"
        assert [float(rows[token][f"{column}_stage_{stage}"]) for column in COLUMNS[:8]] == pytest.approx(expected, abs=1e-9)
    assert json.loads(Path("run/official/provenance.json").read_text())["changed"] == [
        "data.split",
        "second_stage.data.split",
        "second_stage.mapping",
    ]


def test_results_say_what_they_are(root: Path, run: Callable[..., Result]) -> None:
    assert run(STRAIGHT, "out=run", "seed=4").exit_code == 0
    about = json.loads(Path("run/official/provenance.json").read_text())
    assert about == json.loads(Path("run/summary.json").read_text())["provenance"]
    assert about["about"]["split"] == "warmup_two_stage"
    assert about["about"]["devkit"] == source()
    assert about["changed"] == ["data.split", "second_stage.data.split", "second_stage.mapping", "traffic"]
    assert about["human_filter"] == {"official": "fixed", "official/legacy": "legacy"}
    assert (about["traffic"], about["seed"], about["scenes"]) == ("log", 4, 10)
    assert about["policies"]["straight"]["failed"] == 0
    assert {"irlvla", "torch", "python"} <= about["versions"].keys()
    legacy = table(Path("run/official/legacy/straight.csv"))
    assert legacy.keys() == table(Path("run/official/straight.csv")).keys()


def test_an_agent_of_navsim_drives_in_a_benchmark(root: Path, run: Callable[..., Result]) -> None:
    """Read from the data, of both stages, the devkit's baseline is our own to the last bit."""
    folders = ", ".join(
        [
            f"logs: {root}/navsim_logs/test, sensors: {root}/sensor_blobs/test",
            f"scenes: {root}/warmup_two_stage/synthetic_scene_pickles, scene_sensors: {root}/warmup_two_stage/sensor_blobs",
        ]
    )
    agent = f"{{name: navsim_agent, agent: 'agents_for_tests:RecordingAgent', settings: {{sensors: {{cam_f0: true}}}}, {folders}}}"
    result = run(f"policies={{straight: constant_velocity, agent: {{planner: {agent}}}}}", "out=run")
    assert result.exit_code == 0, result.output
    assert Path("run/official/agent.csv").read_bytes() == Path("run/official/straight.csv").read_bytes()


def test_one_stage_in_both_filters(root: Path, run: Callable[..., Result]) -> None:
    """The columns are the same; the score of the legacy filter is that of what was measured, before it."""
    assert run(STRAIGHT, "out=run", "second_stage=null").exit_code == 0
    fixed, legacy = (table(Path("run", folder, "straight.csv")) for folder in ("official", "official/legacy"))
    assert list(fixed) == [*FIRST.values(), "average_all_frames"]
    for scene in scenes_of(root)[: len(FIRST)]:
        ahead = torch.tensor([[openscene.SPEED * 0.5 * (i + 1), 0.0, 0.0] for i in range(8)]).double()
        for rows, human_filter in ((fixed, "fixed"), (legacy, "legacy")):
            row = rows[scene.token[0]]
            result = reference.score_scene(scene, ahead[None], human_filter=human_filter)
            if not row[COLUMNS[-1]]:  # the first frame has none before it
                assert float(row["score"]) == pytest.approx(result.score().item(), abs=1e-9)
            assert [float(row[column]) for column in COLUMNS[:8]] == pytest.approx(result.values[0, :8].tolist(), abs=1e-9)
    assert [bool(fixed[token][COLUMNS[-1]]) for token in FIRST.values()] == [False, True, True, True]


def test_a_torn_scene_is_a_row_that_is_not_valid(root: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    """A synthetic scene that cannot be read: told with its token and cause, a row of the table, its group left out and counted."""
    torn, good = "b" * 16 + "2", root / "warmup_two_stage" / "synthetic_scene_pickles"
    folder = tmp_path / "scenes"
    folder.mkdir()
    for file in good.glob("*.pkl"):
        (folder / file.name).write_bytes(file.read_bytes()[: None if file.stem != torn else 500])
    assert run(STRAIGHT, "out=run", f"second_stage.data.scenes={folder}").exit_code == 0
    summary = json.loads(Path("run/summary.json").read_text())
    (failure,) = summary["failures"]
    assert failure["token"] == torn
    assert "is damaged, or no pickle" in failure["cause"]
    assert (summary["policies"]["straight"]["two_stage"]["groups"], summary["policies"]["straight"]["two_stage"]["left_out"]) == (1, 1)
    rows = table(Path("run/official/straight.csv"))
    assert (rows[torn]["valid"], rows[torn]["score"]) == ("False", "")
    assert rows["a" * 16 + "1"]["valid"] == "True"
    assert rows["extended_pdm_score_combined"]["valid"] == "False"
    assert len(rows) == len(FIRST) + len(SECOND) + 3


def test_a_submission_is_written(root: Path, run: Callable[..., Result]) -> None:
    who = "benchmark.submission={team_name: t, authors: a, email: e, institution: i, country: c}"
    assert run(STRAIGHT, "out=run", who).exit_code == 0
    submission = read_pickle(Path("run/submission/straight.pkl"))
    assert submission["team_name"] == "t"
    assert set(submission["first_stage_predictions"][0]) == set(FIRST.values())
    assert set(submission["second_stage_predictions"][0]) == set(SECOND)
    np.testing.assert_allclose(submission["first_stage_predictions"][0][FIRST[5]].poses[-1], [4 * openscene.SPEED, 0, 0], rtol=1e-6)


def test_two_processes_write_the_same_tables(root: Path, run: Callable[..., Result], tmp_path: Path) -> None:
    """Byte for byte, and so does a run that was stopped and goes on."""
    assert run(STRAIGHT, "out=alone", "batch=3").exit_code == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    package = Path(irlvla_navsim.__file__).parents[1]
    search = os.pathsep.join([str(Path(__file__).parent), str(package), *sys.path])
    script = (
        "import sys, irlvla_navsim\nfrom irlvla.registry import Plugin, installed\n"
        "if 'navtest' not in installed().names('benchmark'):\n"
        "    installed().add(Plugin('irlvla-navsim', '0.1.0', 'irlvla_navsim'), lambda: irlvla_navsim)\n"
        "from irlvla.cli import app\napp(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", script, "evaluate", *own(root), STRAIGHT, "out=together", "batch=3", "device=cpu"]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **launched, "PYTHONPATH": search, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=600)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert json.loads(Path("together/environment.json").read_text())["processes"] == 2
    measured = Path("alone/scenes.jsonl").read_text().splitlines(keepends=True)
    Path("alone/scenes.jsonl").write_text("".join(measured[:4]) + measured[4][:50])
    assert run(STRAIGHT, "out=alone", "batch=3", "resume=true").exit_code == 0
    for name in ("official/straight.csv", "official/legacy/straight.csv"):
        assert Path("together", name).read_bytes() == Path("alone", name).read_bytes()


def test_lanes_carry_what_reactive_traffic_follows(root: Path) -> None:
    scene = scenes_of(root)[0]
    lanes = [row for row, layer in enumerate(scene.polygon_layer.tolist()) if layer in (0, 11)]
    sizes = scene.baseline_offsets.diff()
    assert [bool(sizes[row]) for row in range(len(sizes))] == [row in lanes for row in range(len(sizes))]
    assert sizes[lanes[0]] == 61  # of a lane of 60 m, a point each metre
    limits = scene.polygon_speed_limit[lanes]
    assert set(limits[~limits.isnan()].tolist()) == {11.0}
