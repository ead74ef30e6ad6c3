"""Benchmarks: what they bring to `evaluate`, what the user sets over it, and what becomes of results from elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from golden_scenes import load
from irlvla import cli
from irlvla.configuration import describe, merge, read
from irlvla.errors import ConfigError, ContractError, MissingError, PluginError
from irlvla.registry import build
from irlvla.stages import EvaluateConfig
from irlvla.types import Scene
from plugins_for_tests import Site, empty_site

PLUGIN = '''
"""Components for tests."""
import json
from pathlib import Path

import irlvla
from pydantic import Field

class Crossing(irlvla.Benchmark):
    """Driven here."""

    class Config(irlvla.Config):
        root: Path = Field(description="where the scenes are")
        second: bool = False

    def settings(self):
        data = {"name": "scenes", "path": str(self.config.root / "scenes.safetensors"), "privileged": True}
        second = {"data": {"name": "scenes", "path": "second.safetensors"}, "mapping": "split.yaml"}
        return {"data": data, "second_stage": second if self.config.second else None, "metrics": ["epdms"], "batch": 3}

class Town(irlvla.Benchmark):
    """Driven elsewhere."""

    class Config(irlvla.Config):
        unit: str = "points"

    def summarise(self, results):
        if self.config.unit == "nothing":
            return [1, 2]
        if self.config.unit == "paths":
            return {"t": [{"a": results[0]}]}
        scores = [json.loads(path.read_text())["score"] for path in results]
        return {"Overall": [{"metric": self.config.unit, "value": sum(scores) / len(scores)}, {"metric": "files", "value": len(scores)}],
                "By file": [{"file": path.name, "score": score, "note": None} for path, score in zip(results, scores)]}

class Vague(irlvla.Benchmark):
    """Brings what there is not."""

    def settings(self):
        return {"scenes": 3}

@irlvla.hookimpl
def irlvla_benchmarks():
    return {"acme_crossing": Crossing, "acme_town": Town, "acme_vague": Vague}
'''
WHO = {"straight": "constant_velocity"}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.chdir(tmp_path)
    with empty_site(tmp_path, monkeypatch) as made:
        made.add("irlvla-acme", PLUGIN)
        made.scan()
        yield made


@pytest.fixture
def run(site: Site) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        site.scan()
        return CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, [str(argument) for argument in arguments], prog_name="irlvla")

    return run


def settings(benchmark: Any = None, **written: Any) -> EvaluateConfig:
    return read(EvaluateConfig, {"benchmark": benchmark or {"name": "acme_crossing", "root": "here"}, "policies": WHO, **written})


# -- settings ----------------------------------------------------------------------------------------------------------


def test_a_benchmark_brings_its_settings(site: Site) -> None:
    config = settings()
    assert config.data == {"name": "scenes", "path": "here/scenes.safetensors", "privileged": True}
    assert (config.batch, config.second_stage) == (3, None)
    assert [metric["name"] for metric in config.metrics] == ["epdms"]
    assert config.benchmark == {"name": "acme_crossing", "root": "here", "second": False}


def test_what_is_written_goes_over_them(site: Site) -> None:
    assert settings(batch=7).batch == 7
    assert settings(metrics=[]).metrics == []
    assert settings(data={"privileged": False}).data == {"name": "scenes", "path": "here/scenes.safetensors", "privileged": False}
    assert settings(data="scenes").data == settings().data
    assert settings(data={"name": "scenes", "path": "p"}).data == {"name": "scenes", "path": "p", "privileged": True}
    assert settings(data={"name": "synthetic", "count": 3}).data["count"] == 3
    assert "path" not in settings(data="synthetic").data
    assert settings(data="???").data == settings().data
    both = {"name": "acme_crossing", "root": "here", "second": True}
    assert settings(both).second_stage is not None
    assert settings(both, second_stage=None).second_stage is None
    changed = settings(both, second_stage={"mapping": "mine.yaml"}).second_stage
    assert changed is not None
    assert (changed.mapping, changed.data["path"]) == (Path("mine.yaml"), "second.safetensors")


def test_a_saved_recipe_gives_the_same_again(site: Site) -> None:
    config = settings(batch=5)
    assert read(EvaluateConfig, config.model_dump(mode="json")) == config


def test_without_a_benchmark_nothing_is_brought(site: Site) -> None:
    with pytest.raises(MissingError, match="data: needs a value"):
        read(EvaluateConfig, {"policies": WHO})


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("acme_crossng", PluginError, "no benchmark named 'acme_crossng'. Did you mean 'acme_crossing'"),
        ("acme_crossing", MissingError, r"benchmark\.root: needs a value for benchmark 'acme_crossing' \(irlvla-acme 0\.3\.1\)"),
        ({"name": "acme_crossing", "rooot": "x", "root": "x"}, ConfigError, r"benchmark\.rooot: .*no such field. Did you mean 'root'"),
        ({"name": "acme_crossing", "root": "???"}, MissingError, r"benchmark\.root: needs a value"),
        ({"root": "x"}, ConfigError, "benchmark: must name one of acme_crossing, acme_town, acme_vague"),
        ("acme_vague", ContractError, "benchmark 'acme_vague' .* brings 'scenes', which is no field of the stage"),
        ("acme_town", ConfigError, r"benchmark 'acme_town' \(irlvla-acme 0\.3\.1\) is driven elsewhere; give its result files"),
    ],
)
def test_mistakes_are_named(site: Site, spec: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        settings(spec)


def test_a_description_shows_what_it_brings_and_what_is_missing(site: Site) -> None:
    text = describe(EvaluateConfig, merge(EvaluateConfig, {}, ["benchmark.name=acme_crossing"]))
    assert "benchmark:  # benchmark | null; one of acme_crossing, acme_town, acme_vague; default null" in text
    assert "  root: ???  # path: where the scenes are" in text
    assert "\ndata: ???" in text
    text = describe(EvaluateConfig, merge(EvaluateConfig, {}, ["benchmark.name=acme_crossing", "benchmark.root=here"]))
    assert "  path: here/scenes.safetensors" in text


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_evaluates_in_a_benchmark(run: Callable[..., Result], tmp_path: Path) -> None:
    golden = load(Path(__file__).parent / "golden" / "public.npz")
    Scene.cat(one.scene for one in golden[:3]).save(tmp_path / "scenes.safetensors")
    Path("recipe.yaml").write_text("evaluate:\n  benchmark: {name: acme_town, root: here}\n  policies: {straight: constant_velocity}\n")
    result = run(
        "evaluate", "recipe.yaml", "--benchmark", "acme_crossing", f"benchmark.root={tmp_path}", "out=run", "resamples=100", "gallery=0"
    )
    assert result.exit_code == 0, result.output
    assert "straight" in result.stdout
    assert f"root: {tmp_path}" in Path("run", "config.yaml").read_text()
    assert len(Path("run", "official", "straight.csv").read_text().splitlines()) == 5


def test_help_and_lists_know_benchmarks(run: Callable[..., Result]) -> None:
    assert "--benchmark" in run("evaluate", "--help").stdout
    assert ["benchmark", "acme_town", "irlvla-acme", "0.3.1"] in [line.split() for line in run("plugins").stdout.splitlines()]
    assert "Driven elsewhere." in run("plugins", "--verbose").stdout
    result = run("evaluate", "--benchmark", "acme_twn")
    assert result.exit_code == 2
    assert "Did you mean 'acme_town'" in result.stderr
    result = run("evaluate", "--bench", "acme_town")
    assert "there is no option --bench. Did you mean '--benchmark'" in result.stderr


# -- driven elsewhere --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for number, score in enumerate((0.25, 1.0)):
        (tmp_path / f"{number}.json").write_text(json.dumps({"score": score}))
    return [Path("0.json"), Path("1.json")]


def test_results_from_elsewhere_are_summed_up(run: Callable[..., Result], files: list[Path]) -> None:
    result = run("evaluate", "--benchmark", "acme_town", *files, "benchmark.unit=marks", "out=town")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["marks", "0.6250"] in lines
    assert ["0.json", "0.2500", "-"] in lines
    summary = json.loads(Path("town", "summary.json").read_text())
    assert summary["benchmark"] == {"name": "acme_town", "unit": "marks"}
    assert summary["plugin"] == "irlvla-acme 0.3.1"
    assert summary["results"]["1.json"] == hashlib.sha256(files[1].read_bytes()).hexdigest()
    assert summary["tables"]["Overall"] == [{"metric": "marks", "value": 0.625}, {"metric": "files", "value": 2}]
    again = run("evaluate", "--benchmark", "acme_town", *files, "out=town")
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    assert run("evaluate", "--benchmark", "acme_town", *files).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "results: "),
        (["2.json"], "2.json is no file"),
        (["0.json", "policies.a=human"], "policies: there is no such field. Fields: benchmark, results, out"),
        (["0.json", "benchmark.unot=a"], "benchmark.unot: benchmark 'acme_town' (irlvla-acme 0.3.1) has no such field. Did you mean"),
        (["0.json", "benchmark.unit=nothing"], "summarise() must return tables by title"),
        (["0.json", "benchmark.unit=paths"], "cannot be written as JSON"),
    ],
)
def test_mistakes_with_results_are_named(run: Callable[..., Result], files: list[Path], arguments: list[str], message: str) -> None:
    result = run("evaluate", "--benchmark", "acme_town", *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_a_benchmark_that_is_driven_here_takes_no_results(site: Site) -> None:
    with pytest.raises(ConfigError, match=r"benchmark 'acme_crossing' .* is driven here and takes no result files; say who drives"):
        build("benchmark", {"name": "acme_crossing", "root": "x"}).summarise([Path("a.json")])
