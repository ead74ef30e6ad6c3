"""All stages of a recipe in one command: each section once, in order; what was stopped goes on, what is finished is left alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import Field
from typer.testing import CliRunner

import irlvla
from irlvla.cli import app, training
from irlvla.components import Spec, pluggable
from irlvla.errors import ConfigError, FileError
from irlvla.run import Run, RunConfig
from irlvla.stages import pipeline
from irlvla.stages.pipeline import chosen, read_steps

ROOT = Path(__file__).parents[1]
RECIPE = """
runs: all
size: 3
imitate: { steps: "${size}", planner: { name: vocabulary } }
reward: { policy: "${runs}/imitate/model", steps: 2 }
reinforce: { policy: "${runs}/imitate/model", reward: exact, steps: 4 }
reinforce-exact: { policy: "${runs}/imitate/model", out: elsewhere }
"""


class StageConfig(RunConfig):
    """Settings of the stages of this file."""

    steps: int = Field(1, ge=0)
    policy: str | None = None
    planner: Spec | None = pluggable("planner", None)
    reward: Spec | None = pluggable("reward_model", None)


class StopsError(Exception):
    """A kill."""


done: list[str] = []  # what was begun, and where it went on
stop: list[str] = []  # in which run a stage is killed


def _stage(kind: str) -> Callable[[StageConfig], Path]:
    def stage(config: StageConfig) -> Path:
        with Run.start(kind, config) as run:
            first = run.restore()
            done.append(f"{run.directory.name} from {first}")
            for step in range(first + 1, config.steps + 1):
                run.log(step, {"value": step})
                if stop == [run.directory.name] and step == 2:
                    raise StopsError
                run.save(step, irlvla.registry.installed().build_policy("status", "constant_velocity"))
            (run.directory / "summary.json").write_text('{"result": "done", "metrics": {}}')
        return run.directory

    return stage


imitate, reward, reinforce, evaluate = (_stage(kind) for kind in ("imitate", "reward", "reinforce", "evaluate"))


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda _: None)
    monkeypatch.setattr(pipeline, "STAGES", {name: f"{__name__}:{name}" for name in pipeline.STAGES})
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    done.clear()
    stop.clear()
    return path


def train(recipe: Path, *overrides: str, only: str | None = None) -> None:
    for step in chosen(read_steps(recipe, overrides), only):
        step.run()


def test_stages_run_in_the_order_of_the_recipe(recipe: Path) -> None:
    steps = read_steps(recipe)
    assert [(step.name, str(step.out)) for step in steps] == [
        ("imitate", "all/imitate"),
        ("reward", "all/reward"),
        ("reinforce", "all/reinforce"),
        ("reinforce-exact", "elsewhere"),
    ]
    assert steps[0].config.steps == 3  # type: ignore[attr-defined]
    train(recipe)
    assert done == ["imitate from 0", "reward from 0", "reinforce from 0", "elsewhere from 0"]
    assert json.loads(Path("all/reinforce/environment.json").read_text())["stage"] == "reinforce"
    train(recipe)
    assert len(done) == 4  # nothing is left


def test_a_recipe_without_runs_names_its_own(recipe: Path) -> None:
    recipe.write_text("imitate: { steps: 1 }\nevaluate:\n")
    assert [str(step.out) for step in read_steps(recipe)] == ["runs/recipe/imitate", "runs/recipe/evaluate"]


@pytest.mark.parametrize("killed", ["imitate", "reinforce"])
def test_what_was_stopped_goes_on(recipe: Path, killed: str) -> None:
    stop.append(killed)
    with pytest.raises(StopsError):
        train(recipe)
    stop.clear()
    train(recipe)
    assert done.count(f"{killed} from 0") == 1
    assert f"{killed} from 1" in done
    assert len(done) == 5
    logged = [json.loads(line)["step"] for line in Path("all", killed, "metrics.jsonl").read_text().splitlines()]
    assert logged == list(range(1, len(logged) + 1))


def test_one_section_alone(recipe: Path) -> None:
    train(recipe, only="imitate")
    assert done == ["imitate from 0"]
    with pytest.raises(ConfigError, match=r"no section 'reinforced'. Did you mean 'reinforce'"):
        train(recipe, only="reinforced")


def test_overrides_reach_the_sections_that_they_are_for(recipe: Path) -> None:
    steps = {step.name: step.config for step in read_steps(recipe, ["seed=7", "imitate.steps=9", "reward.steps=5", "runs=other"])}
    assert {config.seed for config in steps.values()} == {7}
    assert [config.steps for config in steps.values()] == [9, 5, 4, 1]  # type: ignore[attr-defined]
    assert steps["reinforce"].reward == {"name": "exact", "human_filter": "fixed", "traffic": "log"}  # type: ignore[attr-defined]
    assert steps["reward"].policy == "other/imitate/model"  # type: ignore[attr-defined]
    assert {str(config.out) for config in steps.values()} == {"other/imitate", "other/reward", "other/reinforce", "elsewhere"}
    (first, *_) = read_steps(recipe, ["size=8"])
    assert first.config.steps == 8  # type: ignore[attr-defined]
    (first, *_) = read_steps(recipe, ["imitate.planner.tokens=[bev]"])
    assert first.config.planner["tokens"] == ["bev"]  # type: ignore[attr-defined]


def test_mistakes_are_named(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"'sede=7': neither the recipe nor a stage of it has 'sede'. Did you mean 'seed'"):
        read_steps(recipe, ["sede=7"])
    with pytest.raises(ConfigError, match=r"in the section reward: steps: "):
        read_steps(recipe, ["reward.steps=many"])
    with pytest.raises(FileError, match=r"Did you mean 'recipe\.yaml'"):
        read_steps("recipes.yaml")
    recipe.write_text("images: [1, 2]\n")
    with pytest.raises(ConfigError, match=r"no section of a stage: imitate, reward, reinforce, evaluate. Its sections: images"):
        read_steps(recipe)
    assert not Path("all").exists()


def test_other_settings_are_not_mixed_into_a_run(recipe: Path) -> None:
    train(recipe, only="imitate")
    with pytest.raises(ConfigError, match="cannot be resumed with another configuration"):
        train(recipe, "imitate.steps=9")


def test_a_run_that_was_made_from_another_one_is_not_taken_for_it(recipe: Path) -> None:
    train(recipe)
    for path in sorted(Path("all/imitate").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    Path("all/imitate").rmdir()
    with pytest.raises(ConfigError, match="all/reward was made from another run than the one of all/imitate, which is newer or gone"):
        train(recipe)


def test_the_command_says_where_it_is(recipe: Path) -> None:
    first = CliRunner().invoke(app, ["train", str(recipe), "--only", "imitate"], catch_exceptions=False)
    assert first.exit_code == 0
    assert "[1/1] imitate begins: all/imitate" in first.output
    again = CliRunner().invoke(app, ["train", str(recipe), "size=3"], catch_exceptions=False)
    assert "[1/4] imitate is finished: all/imitate" in again.output
    assert "[4/4] reinforce-exact begins: elsewhere" in again.output
    wrong = CliRunner().invoke(app, ["train", str(recipe), "--only", "imitat"])
    assert wrong.exit_code == 2
    assert "Did you mean 'imitate'" in wrong.output


@pytest.mark.parametrize(("package", "recipes"), [("site/irlvla", "site/irlvla/recipes"), ("tree/python/irlvla", "tree/recipes")])
def test_the_demo_finds_its_recipe(package: str, recipes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an installed package it lies within, in the source tree beside `python/`."""
    monkeypatch.undo()
    monkeypatch.setattr(training, "__file__", str(tmp_path / package / "cli" / "training.py"))
    missing = CliRunner().invoke(app, ["demo", "--only", "imitat"])
    assert "demo.yaml is neither" in missing.output
    shutil.copytree(ROOT / "recipes", tmp_path / recipes)
    found = CliRunner().invoke(app, ["demo", "--only", "imitat"])
    assert "Sections: imitate, reward, reinforce, reinforce-exact, evaluate" in found.output


def test_this_package_has_the_recipe_of_the_demo() -> None:
    assert training._demo_recipe().read_text() == (ROOT / "recipes" / "demo.yaml").read_text()


@pytest.mark.parametrize("name", ["demo", "small", "av2"])
def test_recipes_are_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every section is accepted by its stage, and what it names of other sections is where these put it."""
    monkeypatch.undo()
    steps = read_steps(ROOT / "recipes" / f"{name}.yaml")
    assert [step.name for step in steps] == ["imitate", "reward", "reinforce", "reinforce-exact", "evaluate"]
    folders = {str(step.out) for step in steps}
    for step in steps:
        named = [text for text in _texts(step.config.model_dump(mode="json")) if re.fullmatch("runs/.*/model", text)]
        assert {re.sub("(/checkpoints/best)?/model$", "", text) for text in named} <= folders


def _texts(value: object) -> list[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for one in inner for text in _texts(one)]
