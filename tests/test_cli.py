"""The command line: what it does, and that every mistake gets a message, no traceback, and exit code 2."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner, Result

import irlvla
from golden_scenes import load
from irlvla import cli, zoo
from irlvla.cli.tables import print_table
from irlvla.configuration import read
from irlvla.stages import ScoreConfig
from irlvla.types import Scene
from plugins_for_tests import Site, empty_site, planners

ROOT = Path(__file__).parents[1]

FILE = '''
"""One planner."""
import os
import signal
import irlvla
import torch
from pydantic import Field

class Moody(irlvla.Planner):
    """Does as it is told."""

    class Config(irlvla.Config):
        mood: str = Field("still", description="what it does")

    def __init__(self, config, *, width):
        super().__init__(config)

    def loss(self, features, human):
        return {}

    def sample(self, features, k, *, generator=None):
        if self.config.mood == "raises":
            raise RuntimeError("out of fuel")
        if self.config.mood == "misuses":
            irlvla.Plan.cat([])
        if self.config.mood == "interrupts":
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
            os.kill(os.getpid(), signal.SIGINT)
        return irlvla.Plan(torch.zeros(len(features.observation), k, 8, 3))

@irlvla.hookimpl
def irlvla_planners():
    return {"moody": Moody}
'''


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    golden = load(Path(__file__).parent / "golden" / "public.npz")
    return Scene.cat(one.scene for one in golden[:3]).save(tmp_path_factory.mktemp("scenes") / "scenes.safetensors")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """No plugins but those that a test adds; the current directory is empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with empty_site(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def run(site: Site) -> Callable[..., Result]:
    """A command, in this process: run("score", "planner=spline")."""

    def run(*arguments: object) -> Result:
        site.scan()
        importlib.invalidate_caches()
        return CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, [str(argument) for argument in arguments], prog_name="irlvla")

    return run


def refusal(result: Result) -> str:
    """The message of a command that ended because of its user, and did nothing else."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not Path("runs").exists()
    return result.stderr


# -- mistakes in a configuration ---------------------------------------------------------------------------------------

PLANNERS = ", ".join(sorted(zoo.irlvla_planners()))
MISTAKES = {  # what the message must say: the place, what was given, what is accepted, the nearest name
    "planner=constant_velocty": ["no planner named 'constant_velocty'. Did you mean 'constant_velocity'?", PLANNERS],
    "planner.name=pdm": ["no planner named 'pdm'", PLANNERS],
    "candidats=3": ["candidats: there is no such field. Did you mean 'candidates'? Fields: out, device, seed, "],
    "data.privilegd=true": [
        f"data.privilegd: dataset 'scenes' (irlvla {irlvla.__version__}) has no such field",
        "'privileged'?",
        "path, privileged",
    ],
    "batch=many": ["batch: must be a valid integer", "got 'many'"],
    "batch=0": ["batch: must be greater than or equal to 1, got 0"],
    "batch=[4]": ["batch: must be a valid integer", "got [4]"],
    "workers=null": ["workers: must be a valid integer", "got None"],
    "precision=bf61": ["precision: must be 'no', 'bf16' or 'fp16'", "got 'bf61'", "Did you mean 'bf16'?"],
    "data.privileged=perhaps": ["data.privileged: must be a valid boolean", "got 'perhaps'"],
    "metrics=epdms": ["metrics: must be a list", "displacement, epdms", "got 'epdms'"],
    "metrics=[epdms,displacemnt]": ["metrics.1: no metric named 'displacemnt'. Did you mean 'displacement'?", "displacement, epdms"],
    "metrics=[3]": ["metrics.0: must name one of displacement, epdms", "got 3"],
    "metrics=[{name: epdms, traffic: lgo}]": [
        "metrics.0.traffic: must be 'log', 'replay_all', 'constant_velocity' or 'reactive'",
        "'lgo'",
        "'log'?",
    ],
    "metrics=[{name: epdms, trafic: log}]": ["metrics.0.trafic: metric 'epdms' (irlvla ", "has no such field. Did you mean 'traffic'?"],
}


def as_recipe(override: str, data: Path) -> str:
    """A good recipe, with a field changed as an override does."""
    recipe: dict[str, Any] = {"data": {"name": "scenes", "path": str(data)}, "planner": {"name": "constant_velocity"}}
    path, _, value = override.partition("=")
    *outer, name = path.split(".")
    place = recipe
    for step in outer:
        place = place[step]
    place[name] = yaml.safe_load(value)
    return yaml.safe_dump(recipe)


@pytest.mark.parametrize("override", MISTAKES)
@pytest.mark.parametrize("where", ["command line", "recipe"])
def test_a_mistake_in_the_configuration(run: Callable[..., Result], data: Path, where: str, override: str) -> None:
    if where == "command line":
        told = refusal(run("score", f"data.path={data}", "planner=constant_velocity", override))
    else:
        Path("recipe.yaml").write_text(as_recipe(override, data))
        told = refusal(run("score", "recipe.yaml"))
    assert told.startswith("error: ")
    assert [part for part in MISTAKES[override] if part not in told] == [], told


def test_several_mistakes_at_once(run: Callable[..., Result]) -> None:
    told = refusal(run("score", "data.path=x", "planner=pdm_close", "batch=few", "bach=3"))
    assert told.splitlines()[0] == "error: 3 mistakes in the configuration:"
    assert all(part in told for part in ("Did you mean 'pdm_closed'?", "batch: must be a valid integer", "bach: there is no such field")), (
        told
    )


def test_what_is_missing(run: Callable[..., Result], data: Path) -> None:
    assert "error: data.path: needs a value" in refusal(run("score"))
    assert "give exactly one of policy, planner and plans, got none" in refusal(run("score", f"data.path={data}"))
    told = refusal(run("score", ROOT / "recipes" / "score.yaml"))
    assert "error: data.path: needs a value" in told
    assert "write data.path=..." in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scores.yaml"], "the recipe scores.yaml does not exist. Did you mean 'score.yaml'?"),
        (["score.yaml", "other.yaml"], "'other.yaml' is a second recipe after 'score.yaml'; to set a field, write FIELD=VALUE"),
        (["list.yaml"], "the recipe list.yaml holds a list"),
        (["broken.yaml"], "the recipe broken.yaml, line 3: "),
        (["unset.yaml"], "the environment variable NOT_THERE is not set"),
        (["+batch=4"], "'+batch=4' is no override; write FIELD=VALUE or FIELD.SETTING=VALUE. Fields: out, "),
        (["=4"], "'=4' is no override"),
        (["batch={"], "the value of 'batch={' cannot be read as YAML"),
        (["--batch=4"], "there is no option --batch. A field is set without dashes: batch=VALUE"),
        (["--prin-config"], "there is no option --prin-config. Did you mean '--print-config'? A field is set"),
        (["--plugin", "my_planer.py"], "a plugin must be a Python file (.py), and "),
        (["--plugin", "my_planer.py"], "my_planer.py is none. Did you mean 'my_planner.py'?"),
        (["--plugin", "my_planner.py"], "the plugin my_planner.py cannot be used: SyntaxError: "),
        (["policy=nowhere/model/"], "nowhere/model"),
    ],
)
def test_a_mistake_in_the_arguments(run: Callable[..., Result], data: Path, arguments: list[str], message: str) -> None:
    files = {
        "score.yaml": "batch: 4",
        "list.yaml": "- batch",
        "broken.yaml": "batch: 4\nseed: {\n",
        "unset.yaml": "out: ${oc.env:NOT_THERE}",
        "my_planner.py": "def",
    }
    for name, content in files.items():
        Path(name).write_text(content)
    assert message in refusal(run("score", f"data.path={data}", *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scor"], "No such command 'scor'. Did you mean 'score'"),
        (["plugin"], "No such command 'plugin'. Did you mean 'plugins'?"),
        (["plugins", "chek"], "No such command 'chek'. Did you mean 'check'?"),
        (["plugins", "--jsn"], "No such option: --jsn"),
        (["plugins", "check"], "Missing argument 'package'"),
        (["plugins", "check", "irlvla-acm"], "no plugin 'irlvla-acm'. Did you mean 'irlvla-acme'?"),
        (["plugins", "check", "acme.py"], "a plugin must be a Python file (.py)"),
        (["plugins", "check", "irlvla", "--device", "tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["plugins", "new"], "Missing argument 'name'"),
        (["plugins", "new", "3-d"], "'3-d' cannot be the name of a plugin"),
        (["plugins", "new", "acme", "--kind", "plan"], "no kind 'plan'. Did you mean 'planner'? Kinds: backbone, "),
        (["doctor", "now"], "Got unexpected extra argument"),
    ],
)
def test_a_wrong_command(run: Callable[..., Result], site: Site, arguments: list[str], message: str) -> None:
    site.add("irlvla-acme")
    assert message in refusal(run(*arguments))


def test_a_variable_that_names_no_plugin(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRLVLA_PLUGINS", "acme")
    result = CliRunner().invoke(cli.app, ["plugins"])
    assert "error: IRLVLA_PLUGINS names 'acme', which is not installed" in refusal(result)


# -- score -------------------------------------------------------------------------------------------------------------


def test_score_prints_a_table_and_where_the_files_are(run: Callable[..., Result], data: Path) -> None:
    result = run("score", ROOT / "recipes" / "score.yaml", f"data.path={data}", "out=here", "metrics=[epdms]")
    assert result.exit_code == 0
    header, *rows, rate, files = result.stdout.splitlines()
    summary = json.loads(Path("here/summary.json").read_text())["metrics"]
    assert header.split() == ["metric", "mean", "scenes"]
    assert [row.split() for row in rows] == [
        [name, "-" if of["mean"] is None else f"{of['mean']:.4f}", str(of["count"])] for name, of in summary.items()
    ]
    assert re.fullmatch(r"3 scenes, [0-9.]+ scenes/s", rate)
    assert files.startswith("here: config.yaml, environment.json, metrics.jsonl, scores.csv, summary.json")
    assert "score: 3/3" in result.stderr


def test_fields_override_the_recipe_and_the_last_wins(run: Callable[..., Result], data: Path) -> None:
    recipe = ROOT / "recipes" / "score.yaml"
    fields = [f"data.path={data}", "metrics.1.miss_distance=3.5", "planner=null", "plans=a=b", "seed=1", "seed=7", "batch=${seed}"]
    printed = run("score", recipe, *fields, "--print-config").stdout
    config = read(ScoreConfig, yaml.safe_load(printed))
    assert config == read(ScoreConfig, recipe, fields)
    assert (config.planner, config.plans, config.seed, config.batch) == (None, Path("a=b"), 7, 7)
    assert config.metrics[1]["miss_distance"] == 3.5


def test_print_config_prints_a_recipe_with_its_help(run: Callable[..., Result], data: Path) -> None:
    Path("moody.py").write_text(FILE)
    result = run("score", f"data.path={data}", "planner=moody", "metrics=[displacement]", "--print-config", "--plugin", "moody.py")
    assert (result.exit_code, result.stderr) == (0, "")
    assert not Path("runs").exists()
    lines = result.stdout.splitlines()
    assert any(re.match(r"  mood: still +# str; default still: what it does", line) for line in lines)
    assert any(re.match(r"  (- |  )miss_distance: 2.0 +# float >= 0.0; default 2.0: ", line) for line in lines)
    assert {line.partition(":")[0] for line in lines if re.match(r"\w", line)} == set(ScoreConfig.model_fields)
    Path("printed.yaml").write_text(result.stdout)
    assert run("score", "printed.yaml", "--plugin", "moody.py", "--print-config").stdout == result.stdout
    assert run("score", "printed.yaml", "--plugin", "moody.py", "out=here").exit_code == 0
    assert yaml.safe_load(Path("here/config.yaml").read_text()) == {**yaml.safe_load(result.stdout), "out": "here"}


def test_print_config_while_fields_are_missing(run: Callable[..., Result]) -> None:
    result = run("score", "--print-config")
    assert result.exit_code == 0
    assert re.search(r"^  path: \?\?\? +# path: a file that Scene.save wrote", result.stdout, re.M)
    Path("printed.yaml").write_text(result.stdout)
    assert "data.path: needs a value" in refusal(run("score", "printed.yaml"))
    assert "batch: must be a valid integer" in refusal(run("score", "printed.yaml", "batch=x", "--print-config"))


def test_a_recipe_in_a_folder_whose_name_holds_a_setting(run: Callable[..., Result]) -> None:
    folder = Path("runs/seed=3")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 3")
    assert "seed: 3 " in run("score", folder / "config.yaml", "--print-config").stdout


# -- errors of plugins, interrupts, pipes ------------------------------------------------------------------------------


@pytest.fixture
def moody(site: Site, data: Path) -> list[str]:
    """A command that does as a planner of a file does, but for its mood."""
    Path("moody.py").write_text(FILE)
    return ["score", f"data.path={data}", "planner=moody", "out=here", "--plugin", "moody.py"]


def line_of(code: str) -> int:
    return next(number for number, line in enumerate(FILE.splitlines(), 1) if code in line)


def test_a_failing_plugin_is_named_before_its_traceback(run: Callable[..., Result], moody: list[str]) -> None:
    result = run(*moody, "planner.mood=raises")
    place = f"in the plugin moody.py: {Path('moody.py').resolve()}, line {line_of('out of fuel')}\n"
    assert isinstance(result.exception, RuntimeError)
    assert result.exit_code == 1
    assert result.stderr.endswith(f"error {place}")
    done = subprocess.run(
        [sys.executable, "-m", "irlvla", *moody, "planner.mood=raises", "out=there"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert re.search(rf"error {re.escape(place)}Traceback .*RuntimeError: out of fuel\n$", done.stderr, re.S)


def test_a_failing_package_is_named_too(run: Callable[..., Result], site: Site, data: Path) -> None:
    site.add("irlvla-acme")
    result = run("score", f"data.path={data}", "planner=acme_spline")
    assert isinstance(result.exception, NotImplementedError)
    assert f"error in the plugin irlvla-acme 0.3.1: {site.folder / 'irlvla_acme' / 'spline.py'}, line " in result.stderr


def test_a_plugin_that_misuses_irlvla_is_told_where(run: Callable[..., Result], moody: list[str]) -> None:
    message, place, *_ = [line for line in refusal(run(*moody, "planner.mood=misuses")).splitlines() if "score:" not in line]
    assert message == "error: Plan.cat needs at least one item"
    assert place == f"  in the plugin moody.py: {Path('moody.py').resolve()}, line {line_of('Plan.cat')}"


def test_an_error_of_irlvla_itself_is_blamed_on_nobody(
    run: Callable[..., Result], site: Site, moody: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("irlvla.stages.scoring.measure", broken)
    result = run(*moody)
    assert isinstance(result.exception, ZeroDivisionError)
    assert "plugin" not in result.stderr


def test_an_interrupt_is_one_line(moody: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "irlvla", *moody, "planner.mood=interrupts"], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert [line for line in done.stderr.splitlines() if not line.startswith("score:")] == ["interrupted"]
    assert done.stdout == ""


def test_a_reader_that_goes_away_is_no_error(site: Site) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "irlvla", "plugins", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait() != 0


# -- help --------------------------------------------------------------------------------------------------------------


def commands(group: Any, *path: str) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        yield (*path, name)
        yield from commands(command, *path, name) if hasattr(command, "commands") else ()


COMMANDS = list(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: tuple[str, ...]) -> None:
    result = CliRunner(env={"COLUMNS": "160"}).invoke(cli.app, [*command, "-h"], prog_name="irlvla")
    assert result.exit_code == 0
    if command not in [("plugins",), ("doctor",)]:
        examples = result.stdout.partition("Examples:")[2]
        assert re.search(rf"^ +irlvla {' '.join(command)[: -len(' list')] if 'list' in command else ' '.join(command)}\b", examples, re.M)


def test_there_is_no_command_without_its_stage() -> None:
    names = {name for name, *_ in COMMANDS}
    stages = {"imitate", "reward", "reinforce", "evaluate", "train", "demo"}
    assert names == stages | {"conformance", "convert", "cost", "doctor", "plugins", "probe", "score", "show"}
    assert {rest[0] for name, *rest in COMMANDS if name == "plugins" and rest} == {"list", "check", "new"}


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name, value in {"TERM": "xterm", "COLUMNS": "80"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    print_table(("name", "mean"), [("good", 1), ("[red]bad", "")], bad=[1])
    _, good, bad = terminal.getvalue().splitlines()
    assert good.split() == ["good", "1"]
    assert re.search(r"\x1b\[31m\[red\]bad", bad)


def test_help_imports_no_torch() -> None:
    script = """
import sys
from typer.testing import CliRunner
from irlvla.cli import app
for line in sys.argv[1:]:
    assert CliRunner().invoke(app, line.split()).exit_code == 0, line
print({"torch", "numpy", "omegaconf", "accelerate", "pluggy"} & set(sys.modules))
"""
    lines = ["--version", "--help", *(f"{' '.join(command)} --help" for command in COMMANDS)]
    done = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- plugins -----------------------------------------------------------------------------------------------------------

TRACKER = "import irlvla\n\n@irlvla.hookimpl\ndef irlvla_log(run, step, values):\n    pass\n"


@pytest.fixture
def several(site: Site) -> None:
    """A good plugin, a tracker, a broken one, and two that provide the same name."""
    site.add("irlvla-acme")
    site.add("irlvla-notes", TRACKER)
    site.add("irlvla-broken", "import not_there")
    site.add("irlvla-one", planners(twin="irlvla_one.spline:Planner"))
    site.add("irlvla-two", planners(twin="irlvla_two.spline:Planner"))


def test_plugins_are_listed(run: Callable[..., Result], several: None) -> None:
    result = run("plugins")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == run("plugins", "list").stdout
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["kind", "name", "plugin", "version"]
    rows = [line.split() for line in lines if not line.startswith("Not usable")]
    assert ["planner", "acme_spline", "irlvla-acme", "0.3.1"] in rows
    assert ["planner", "pdm_closed", "irlvla", irlvla.__version__] in rows
    assert ["tracker", "irlvla_notes", "irlvla-notes", "0.3.1"] in rows
    assert [row[2] for row in rows if row[1] == "twin"] == ["irlvla-one", "irlvla-two"]
    collision, broken = [line for line in lines if line.startswith("Not usable")]
    assert "planner 'twin' is provided by both irlvla-one 0.3.1 and irlvla-two 0.3.1" in collision
    assert "irlvla-broken 0.3.1: ModuleNotFoundError: No module named 'not_there'. Try: pip install not_there" in broken


def test_plugins_as_json(run: Callable[..., Result], several: None) -> None:
    listed = json.loads(run("plugins", "--json").stdout)
    spline = {"kind": "planner", "name": "acme_spline", "plugin": "irlvla-acme", "version": "0.3.1", "problem": ""}
    assert spline in listed["provided"]
    assert [one["problem"][:30] for one in listed["provided"] if one["name"] == "twin"] == ["planner 'twin' is provided by "] * 2
    problems = {plugin["name"]: plugin["problem"] for plugin in listed["plugins"]}
    assert {name for name, problem in problems.items() if problem} == {"irlvla-broken"}
    verbose = json.loads(run("plugins", "--json", "--verbose").stdout)
    assert {**spline, "summary": "Cubic splines."} in verbose["provided"]


def test_plugins_with_summaries(run: Callable[..., Result], site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add("irlvla-lazy", planners(lazy="irlvla_lazy.nowhere:Planner"))
    Path("moody.py").write_text(FILE)
    assert "Not usable" not in run("plugins", "--plugin", "moody.py").stdout  # nothing is imported
    result = run("plugins", "-v", "--plugin", "moody.py")
    assert re.search(r"^planner +moody +moody.py +Does as it is told.$", result.stdout, re.M)
    assert re.search(r"^planner +lazy +irlvla-lazy +0.3.1$", result.stdout, re.M)
    assert re.search(
        r"^Not usable: planner 'lazy' \(irlvla-lazy 0.3.1\) cannot be imported from irlvla_lazy.nowhere:Planner: ", result.stdout, re.M
    )
    monkeypatch.setenv("IRLVLA_BLOCK", "lazy")
    assert "Not usable: irlvla-lazy 0.3.1: it is blocked by IRLVLA_BLOCK" in run("plugins").stdout


METRIC = """
import irlvla

class Metric(irlvla.Metric):
    def __call__(self, scene, plan):
        return {{"x": plan.poses[:, 0, -1, 0] * {factor}}}

@irlvla.hookimpl
def irlvla_metrics():
    return {{"{name}": Metric}}
"""


def test_a_plugin_is_checked(run: Callable[..., Result], site: Site) -> None:
    site.add("irlvla-acme", METRIC.format(name="acme_x", factor=1.0))
    result = run("plugins", "check", "irlvla-acme")
    assert (result.exit_code, result.stderr) == (0, "")
    header, *rows, _, total = result.stdout.splitlines()
    assert header.split() == ["kind", "name", "check", "result"]
    assert ["plugin", "irlvla-acme", "loads", "passed"] in [row.split() for row in rows]
    assert ["metric", "acme_x", "values_fit", "passed"] in [row.split() for row in rows]
    assert total == f"{len(rows)} passed, 0 failed, 0 skipped"
    results = json.loads(run("plugins", "check", "acme", "--json").stdout)
    assert [(one["kind"], one["name"], one["check"]) for one in results] == [tuple(row.split()[:3]) for row in rows]
    assert not any(one["problem"] for one in results)


def test_a_plugin_that_fails_its_checks(run: Callable[..., Result]) -> None:
    Path("bad.py").write_text(METRIC.format(name="bad_x", factor="[1, 2]"))
    result = run("plugins", "check", "bad.py")
    assert result.exit_code == 1
    assert re.search(r"^metric +bad_x +values_fit +FAILED$", result.stdout, re.M)
    assert re.search(r"^values_fit: metric 'bad_x' \(bad.py\)", result.stdout, re.M)
    assert re.search(r"^\d+ passed, [1-9]\d* failed, \d+ skipped$", result.stdout, re.M)
    as_json = run("plugins", "check", "bad.py", "--json")
    assert as_json.exit_code == 1
    assert any(one["problem"] for one in json.loads(as_json.stdout))


def test_a_broken_plugin_is_checked(run: Callable[..., Result], site: Site) -> None:
    site.add("irlvla-broken", "import not_there")
    result = run("plugins", "check", "irlvla-broken")
    assert result.exit_code == 1
    assert "pip install not_there" in result.stdout


def test_a_new_plugin(run: Callable[..., Result]) -> None:
    result = run("plugins", "new", "acme", "--kind", "metric", "--folder", "my plugins")
    assert result.exit_code == 0
    package = Path("my plugins/irlvla-acme")
    assert (package / "irlvla_acme" / "metric.py").is_file()
    assert "pip install -e 'my plugins/irlvla-acme'\n" in result.stdout
    assert "irlvla plugins check irlvla-acme\n" in result.stdout
    assert "my plugins/irlvla-acme/irlvla_acme/metric.py" in result.stdout
    assert "is there already" in refusal(run("plugins", "new", "acme", "--folder", "my plugins"))


def test_the_doctor_knows_the_plugins(run: Callable[..., Result], site: Site) -> None:
    site.add("irlvla-acme")
    site.add("irlvla-broken", "import not_there")
    result = run("doctor")
    assert result.exit_code == 0
    usable = json.loads(run("doctor", "--json").stdout)["plugins"]["usable"]
    assert usable == sum(not plugin.problem for plugin in site.scan().plugins)
    assert re.search(rf"^plugins +usable +{usable}$", result.stdout, re.M)
    assert re.search(r"^plugins +set aside +irlvla-broken 0.3.1: .*pip install not_there$", result.stdout, re.M)
    for package in ("omegaconf", "accelerate", "huggingface-hub"):
        assert re.search(rf"^versions +{package} +\d", result.stdout, re.M)
