"""The stage `score`: the numbers are those of `irlvla.epdms`, whatever plans, however many processes; mistakes leave nothing behind."""

from __future__ import annotations

import csv
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import irlvla
from golden_scenes import load
from irlvla.checkpoint import save_pretrained
from irlvla.components import require_plan
from irlvla.configuration import read
from irlvla.errors import ConfigError, ContractError, FileError, InputError
from irlvla.registry import build, installed
from irlvla.stages import ScoreConfig, score
from irlvla.types import METRICS, Plan, Scene
from plugins_for_tests import Site, empty_site

SCENES = 11  # in batches of 4 they are two whole ones and a rest

PLUGIN = '''
"""Components for tests."""
import irlvla
import torch

class Noise(irlvla.Planner):
    """Learns nothing, and draws plans at random."""

    def __init__(self, config, *, width):
        super().__init__(config)
        self.head = torch.nn.Linear(width, 24)

    def loss(self, features, human):
        return {}

    def sample(self, features, k, *, generator=None):
        plans = self.head(features.status).unflatten(1, (1, 8, 3)).repeat(1, k, 1, 1)
        return irlvla.Plan(plans + torch.randn(plans.shape, generator=generator, device=plans.device))

class Flat(irlvla.Planner):
    """Forgets the heading."""

    def loss(self, features, human):
        return {}

    def __init__(self, config, *, width):
        super().__init__(config)

    def sample(self, features, k, *, generator=None):
        return irlvla.Plan(torch.zeros(len(features.observation), k, 8, 2))

class Odd(irlvla.Metric):
    """Returns what it is told to."""

    class Config(irlvla.Config):
        kind: str = "good"

    def __call__(self, scene, plan):
        b = len(scene)
        known = torch.tensor([token < "e" for token in scene.token])
        return {
            "good": {"early": torch.where(known, 1, torch.nan)} | ({"first": torch.ones(b)} if known[0] else {}),
            "list": [1.0] * b,
            "number": {"odd": 1.0},
            "short": {"odd": torch.zeros(b + 1)},
            "infinite": {"odd": torch.full((b,), torch.inf)},
            "twice": {"ade": torch.zeros(b)},
        }[self.config.kind]

class Empty(irlvla.Dataset):
    """Nothing."""

    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError(index)

@irlvla.hookimpl
def irlvla_datasets():
    return {"acme_empty": Empty}

@irlvla.hookimpl
def irlvla_planners():
    return {"acme_noise": Noise, "acme_flat": Flat}

@irlvla.hookimpl
def irlvla_metrics():
    return {"acme_odd": Odd}
'''


@pytest.fixture(scope="module")
def scenes() -> Scene:
    golden = load(Path(__file__).parent / "golden" / "public.npz")
    return Scene.cat([golden[i].scene for i in range(0, 40, 40 // SCENES)][:SCENES])


@pytest.fixture(scope="module")
def data(scenes: Scene, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two files."""
    folder = tmp_path_factory.mktemp("scenes")
    scenes[:7].save(folder / "a.safetensors")
    scenes[7:].save(folder / "b.safetensors")
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with empty_site(tmp_path, monkeypatch) as made:
        made.add("irlvla-acme", PLUGIN)
        made.scan()
        yield made


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Score, in a directory of its own: run(planner="constant_velocity")."""
    monkeypatch.chdir(tmp_path)
    numbers = iter(range(100))

    def run(**settings: Any) -> Path:
        return score(
            ScoreConfig(**{"data": {"name": "scenes", "path": str(data)}, "batch": 4, "out": Path(f"run-{next(numbers)}"), **settings})
        )

    return run


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "scores.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def column(directory: Path, name: str) -> torch.Tensor:
    return torch.tensor([float(row[name]) for row in rows(directory)], dtype=torch.float64)


def straight_on(scenes: Scene) -> torch.Tensor:
    """The plans of NAVSIM's constant-velocity agent, from the history alone."""
    speed = scenes.history[:, -1, 3:5].float().norm(dim=-1)
    poses = torch.zeros(len(scenes), 1, 8, 3)
    poses[:, 0, :, 0] = speed[:, None] * torch.arange(1, 9) * 0.5
    return poses


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_the_scores_are_those_of_epdms(run: Callable[..., Path], scenes: Scene, device: str) -> None:
    directory = run(planner="constant_velocity", device=device)
    expected = irlvla.epdms(scenes.to(device), straight_on(scenes).to(device))
    assert [row["token"] for row in rows(directory)] == list(scenes.token)
    assert column(directory, "epdms").tolist() == expected.score()[:, 0].tolist()  # to the last bit
    for name, values in zip(METRICS, expected.values[:, 0].unbind(-1), strict=True):
        torch.testing.assert_close(column(directory, name), values.cpu(), rtol=0, atol=0, equal_nan=True)
    known = ~scenes.human.isnan().flatten(1).any(1)
    distance = (straight_on(scenes)[:, 0, :, :2] - scenes.human[..., :2]).norm(dim=-1)
    assert 0 < known.sum() < len(scenes)
    torch.testing.assert_close(column(directory, "ade")[known], distance.mean(1)[known])
    assert column(directory, "ade")[~known].isnan().all()


def test_the_summary_is_of_what_was_measured(run: Callable[..., Path]) -> None:
    directory = run(planner="constant_velocity")
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["scenes"] == SCENES
    assert summary["scenes_per_second"] == pytest.approx(SCENES / summary["seconds"])
    names = list(rows(directory)[0])
    assert names[:2] == ["token", "epdms"]
    assert list(summary["metrics"]) == names[1:]
    for name, of in summary["metrics"].items():
        values = column(directory, name)
        assert of["count"] == (~values.isnan()).sum()
        assert of["mean"] == (pytest.approx(values.nanmean().item()) if of["count"] else None)
    assert summary["metrics"]["ec"]["count"] == 0
    assert 0 < summary["metrics"]["ade"]["count"] < SCENES
    (logged,) = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    means = {name: of["mean"] for name, of in summary["metrics"].items() if of["count"]}
    assert logged == {"step": SCENES, "time": logged["time"], **means}


def test_plans_from_a_file(run: Callable[..., Path], scenes: Scene, tmp_path: Path) -> None:
    poses = straight_on(scenes) * torch.tensor([0.5, 1.0, 1.5])[:, None, None]
    plan = Plan(poses, score=torch.rand(SCENES, 3, generator=torch.Generator().manual_seed(0)))
    directory = run(plans=plan.save(tmp_path / "plans.safetensors"))
    expected = irlvla.epdms(scenes, plan).score()
    driven = irlvla.epdms(scenes, plan.best()).score()
    assert column(directory, "epdms").tolist() == driven.tolist()
    assert column(directory, "max_epdms").tolist() == expected.amax(1).tolist()
    assert not torch.equal(driven, expected[:, 0])


def test_a_policy_from_a_checkpoint(run: Callable[..., Path], site: Site, tmp_path: Path) -> None:
    policy = installed().build_policy({"name": "status", "width": 8}, "acme_noise")
    with torch.no_grad():
        policy.planner.head.bias += 5.0
    saved = run(policy=str(save_pretrained(policy, tmp_path / "model")), candidates=3)
    untrained = run(planner="acme_noise", backbone={"name": "status", "width": 8}, candidates=3)
    assert "max_epdms" in rows(saved)[0]
    assert not torch.equal(column(saved, "ade"), column(untrained, "ade"))
    again = run(policy=str(tmp_path / "model"), candidates=3)
    assert (saved / "scores.csv").read_bytes() == (again / "scores.csv").read_bytes()
    save_pretrained(policy.backbone, tmp_path / "part")
    with pytest.raises(ConfigError, match=r"holds backbone 'status' \(irlvla .*\) alone; it must hold a whole policy"):
        run(policy=str(tmp_path / "part"))
    with pytest.raises(FileError, match="nowhere"):
        run(policy=str(tmp_path / "nowhere"))


# -- chance, processes, runs -------------------------------------------------------------------------------------------


def test_only_the_seed_decides(run: Callable[..., Path], site: Site) -> None:
    one, same, other = (run(planner="acme_noise", candidates=2, seed=seed) for seed in (3, 3, 4))
    assert (one / "scores.csv").read_bytes() == (same / "scores.csv").read_bytes()
    assert not torch.equal(column(one, "ade"), column(other, "ade"))
    workers = run(planner="acme_noise", candidates=2, seed=3, workers=2)
    assert (one / "scores.csv").read_bytes() == (workers / "scores.csv").read_bytes()


def test_two_processes_measure_the_same(run: Callable[..., Path], site: Site, data: Path, tmp_path: Path) -> None:
    one = run(planner="acme_noise", candidates=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "irlvla", "score", f"data.path={data}", "planner=acme_noise", "candidates=2", "batch=4", "out=two"]
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    search = os.pathsep.join([str(site.folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [*command, "device=cpu"],
            env={**os.environ, **launched, "PYTHONPATH": search, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        (main, errors), (other, more_errors) = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors + more_errors
    assert main.splitlines()[0].split() == ["metric", "mean", "scenes"]
    assert "score: 11/11" in errors
    assert other == ""
    assert json.loads(Path("two/environment.json").read_text())["processes"] == 2
    assert Path("two/scores.csv").read_bytes() == (one / "scores.csv").read_bytes()


def test_a_directory_that_is_taken(run: Callable[..., Path]) -> None:
    directory = run(planner="constant_velocity")
    with pytest.raises(ConfigError, match="holds a run already"):
        run(planner="constant_velocity", out=directory)
    run(planner="constant_velocity", out=directory, resume=True)
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_configuration_of_a_run_gives_it_again(run: Callable[..., Path]) -> None:
    directory = run(planner="pdm_closed", metrics=["epdms"])
    again = score(read(ScoreConfig, directory / "config.yaml", ["out=again"]))
    assert (directory / "scores.csv").read_bytes() == (again / "scores.csv").read_bytes()


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "give exactly one of policy, planner and plans, got none"),
        ({"planner": "constant_velocity", "plans": "x"}, "got planner and plans; FIELD=null drops one"),
        ({"policy": "x", "planner": "pdm_closed", "plans": "x"}, "got policy and planner and plans"),
        ({"policy": "x", "backbone": "status"}, "backbone: it goes with planner, not with policy"),
        ({"plans": "x", "backbone": "status", "reasoner": "x"}, "backbone and reasoner: it goes with planner, not with plans"),
    ],
)
def test_what_plans_must_be_clear(run: Callable[..., Path], tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        run(**settings)
    assert not list(tmp_path.glob("run-*"))


def test_plans_of_other_scenes(run: Callable[..., Path], scenes: Scene, tmp_path: Path) -> None:
    path = tmp_path / "plans.safetensors"
    Plan(straight_on(scenes)[1:]).save(path)
    with pytest.raises(InputError, match=rf"{path} holds poses of shape \(10, 1, 8, 3\); the 11 scenes need \(11, K, T, 3\)"):
        run(plans=path)
    Plan(straight_on(scenes)[:, 0]).save(path)
    with pytest.raises(InputError, match=r"holds poses of shape \(11, 8, 3\)"):
        run(plans=path)
    Plan(straight_on(scenes).repeat(1, 3, 1, 1)).save(path)
    with pytest.raises(ConfigError, match=r"candidates=2: .* holds 3 plans per scene, and all are taken"):
        run(plans=path, candidates=2)
    scenes[:1].save(path)
    with pytest.raises(FileError, match="holds 'Scene', not 'Plan'"):
        run(plans=path)
    with pytest.raises(FileError, match=r"nowhere\.safetensors does not exist"):
        run(plans=tmp_path / "nowhere.safetensors")
    assert not list(tmp_path.glob("run-*"))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"planner": "acme_flat"},
            r"planner 'acme_flat' \(irlvla-acme 0.3.1\): .* must return poses of shape \(4, 1, T, 3\), got \(4, 1, 8, 2\)",
        ),
        (
            {"metrics": [{"name": "acme_odd", "kind": "list"}]},
            r"metric 'acme_odd' \(irlvla-acme 0.3.1\) must return a mapping .*, not list",
        ),
        ({"metrics": [{"name": "acme_odd", "kind": "number"}]}, r"'odd' must be a tensor of one value for each of the 4 scenes, not float"),
        ({"metrics": [{"name": "acme_odd", "kind": "short"}]}, r"'odd' must be a tensor .* the 4 scenes, not of shape \(5,\)"),
        ({"metrics": [{"name": "acme_odd", "kind": "infinite"}]}, r"metric 'acme_odd' .* is infinite; what is not measured is NaN"),
    ],
)
def test_a_component_that_breaks_its_contract(run: Callable[..., Path], site: Site, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ContractError, match=reason):
        run(**{"planner": "constant_velocity", **settings})
    assert not Path("run-0/scores.csv").exists()


def test_two_metrics_of_one_name(run: Callable[..., Path], site: Site) -> None:
    with pytest.raises(ConfigError, match=r"there is a column 'ade' already; leave out metric 'acme_odd'"):
        run(planner="constant_velocity", metrics=["displacement", {"name": "acme_odd", "kind": "twice"}])


def test_a_metric_may_measure_in_some_scenes_only(run: Callable[..., Path], site: Site, scenes: Scene) -> None:
    directory = run(planner="constant_velocity", metrics=["acme_odd"])
    early = [token < "e" for token in scenes.token]
    assert 0 < sum(early) < SCENES
    assert column(directory, "early").isnan().tolist() == [not one for one in early]
    first = [early[row - row % 4] for row in range(SCENES)]
    assert 0 < sum(first) < SCENES
    assert column(directory, "first").isnan().tolist() == [not one for one in first]


def test_no_scenes(run: Callable[..., Path], site: Site, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dataset 'acme_empty' \(irlvla-acme 0.3.1\) holds no scenes"):
        run(data="acme_empty", planner="constant_velocity")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_among_others(run: Callable[..., Path], data: Path, tmp_path: Path, workers: int) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in data.iterdir():
        content = bytearray(file.read_bytes())
        content[-1] ^= 1 if file.name == "b.safetensors" else 0
        (folder / file.name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        run(data={"name": "scenes", "path": str(folder)}, planner="constant_velocity", workers=workers)
    assert "b.safetensors is corrupt" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not Path("run-0/scores.csv").exists()


def test_scores_of_another_shape_are_refused() -> None:
    """They would choose another proposal than the one that the planner means."""
    poses = torch.zeros(2, 3, 8, 3)
    for scores, given in ((torch.zeros(2, 4), "shape (2, 4)"), (torch.full((2, 3), torch.nan), "NaN")):
        with pytest.raises(ContractError, match=re.escape(f"Plan.score must be of shape (2, 3) without NaN, got {given}")):
            require_plan(Plan(poses, score=scores), 2, 3, build("planner", "constant_velocity", width=8))


def test_a_metric_is_listed_once(run: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="epdms is listed twice"):
        run(planner="constant_velocity", metrics=["epdms", "epdms"])
