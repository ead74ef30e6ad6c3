"""One way from YAML, dictionaries and overrides to a configuration, and what it says of each mistake."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import hypothesis
import pytest
import yaml
from hypothesis import strategies as st
from pydantic import Field, field_validator, model_validator

from irlvla import Config, Spec, pluggable
from irlvla.components import KINDS
from irlvla.configuration import describe, merge, read, to_yaml
from irlvla.errors import ConfigError, FileError, IrlvlaError, MissingError, Mistakes, PluginError, collecting, raise_all
from plugins_for_tests import HEAD, PLANNER, empty_site, planners

ENSEMBLE = '''
class Ensemble(Planner):
    """The mean of its members."""

    class Config(irlvla.Config):
        members: list[irlvla.Spec] = irlvla.pluggable("planner", ["spline", {"name": "spline", "knots": 8}], "planners that vote")
        judge: irlvla.Spec | None = irlvla.pluggable("planner", None, "who breaks a tie")
        weights: dict[str, float] = Field({"first": 1.0}, description="of the members")


class Plain(Planner):
    class Config(irlvla.Config):
        """No settings."""
'''


class Choice(StrEnum):
    FIRST = "first"
    SECOND = "second"


class Optimizer(Config):
    rate: float = Field(1e-3, gt=0, le=1, description="learning rate")
    schedule: Literal["cosine", "linear"] = "cosine"
    teacher: Spec | None = pluggable("planner", None)


class Recipe(Config):
    data: Path = Field(description="where the scenes are")
    steps: int = Field(100, ge=1, description="training\n  steps")
    note: str = ""
    limit: float | Literal["auto"] | None = None
    either: Optimizer | Literal["none"] = "none"
    choice: Choice = Choice.FIRST
    planner: Spec = pluggable("planner", "spline", "which planner drives")
    extra: Spec | None = pluggable("planner", None)
    metrics: list[Spec] = pluggable("metric", ["epdms"], "what to measure")
    optimizer: Optimizer = Optimizer(schedule="linear")
    stages: list[Optimizer] = Field([])
    table: dict[str, int] = Field({})

    @field_validator("note")
    @classmethod
    def _polite(cls, note: str) -> str:
        if "damn" in note:
            raise ValueError("must be polite")
        return note

    @field_validator("extra")
    @classmethod
    def _known(cls, extra: dict[str, Any] | None) -> dict[str, Any] | None:
        if extra == {"name": "ensemble"}:
            raise ValueError("must be one planner")
        return extra

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.steps > 100 and self.note == "short":
            raise ValueError("a short run has at most 100 steps")
        return self


DATA = {"data": "/data"}
SPLINE = {"name": "spline", "knots": 4, "spread": 0.5}
NAMES = "constant_velocity, diffusion, ensemble, flow, gaussian, human, pdm_closed, plain, spline, vocabulary"
OWNER = "planner 'spline' (irlvla-acme 0.3.1)"


@pytest.fixture(scope="module", autouse=True)
def acme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A plugin whose planners have settings, and one whose settings choose planners."""
    with pytest.MonkeyPatch.context() as monkeypatch, empty_site(tmp_path_factory.mktemp("acme"), monkeypatch) as site:
        targets = {"spline": "spline:Planner", "ensemble": "ensemble:Ensemble", "plain": "ensemble:Plain"}
        source = planners(**{name: f"irlvla_acme.{target}" for name, target in targets.items()})
        site.add("irlvla-acme", source, modules={"ensemble": HEAD + PLANNER + ENSEMBLE})
        yield


def message(recipe: Any = DATA, *overrides: str, kind: type[IrlvlaError] = ConfigError) -> str:
    """What the user is told. Whatever else is raised, or without a text, is a traceback."""
    with pytest.raises(IrlvlaError) as caught:
        read(Recipe, recipe, overrides)
    assert isinstance(caught.value, kind)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


# -- one result, whatever the way ------------------------------------------------------------------------------------------


def test_yaml_dictionary_and_overrides_give_one_result(tmp_path: Path) -> None:
    text = """
        data: /data
        steps: 5
        optimizer: {rate: 3e-4, schedule: linear}
        planner: {name: spline, knots: 6}
        metrics: [displacement, {name: epdms, pdms: true}]
    """
    from_file = read(Recipe, written(tmp_path, text))
    from_dictionary = read(Recipe, yaml.safe_load(text.replace("3e-4", "0.0003")))
    overrides = ["data=/data", "steps=5", "optimizer.rate=3e-4", "planner.knots=6", "metrics=[displacement,epdms]", "metrics.1.pdms=true"]
    from_overrides = read(Recipe, overrides=overrides)
    assert from_file == from_dictionary == from_overrides
    assert from_file.planner == {"name": "spline", "knots": 6, "spread": 0.5}
    assert [metric["name"] for metric in from_file.metrics] == ["displacement", "epdms"]
    assert from_file.metrics[1]["pdms"] is True
    assert (from_file.data, from_file.optimizer.rate) == (Path("/data"), 3e-4)


def test_overrides_win_over_the_recipe_from_left_to_right(tmp_path: Path) -> None:
    recipe = written(tmp_path, "data: /data\nsteps: 5\n")
    assert read(Recipe, str(recipe)).steps == 5
    assert read(Recipe, recipe, ["steps=6"]).steps == 6
    assert read(Recipe, recipe, ["steps=6", "steps=7"]).steps == 7


@pytest.mark.parametrize(
    ("text", "value"),
    [("hello", "hello"), ("'5'", "5"), ('"null"', "null"), ("", ""), ("a=b", "a=b"), ("a b", "a b"), ("./x.yaml", "./x.yaml")],
)
def test_values_of_overrides_are_yaml(text: str, value: str) -> None:
    assert read(Recipe, DATA, [f"note={text}"]).note == value


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("null", None), ("auto", "auto"), ("7", 7.0), (".inf", math.inf)])
def test_numbers_and_null(text: str, value: Any, tmp_path: Path) -> None:
    assert read(Recipe, DATA, [f"limit={text}"]).limit == value
    assert read(Recipe, written(tmp_path, f"data: /data\nlimit: {text}\n")).limit == value


@pytest.mark.parametrize(
    "planner",
    [{"planner": "spline"}, {"planner": {"name": "spline"}}, {}, {"planner": "???"}],
    ids=["name", "name and settings", "default", "still open"],
)
def test_a_setting_of_a_component(planner: dict[str, Any]) -> None:
    overrides = ["planner=spline"] if "???" in planner.values() else []
    assert read(Recipe, {**DATA, **planner}, [*overrides, "planner.knots=5"]).planner == {**SPLINE, "knots": 5}


def test_a_chosen_component_drops_the_settings_of_the_one_before() -> None:
    recipe = {**DATA, "planner": {"name": "spline", "knots": 9}}
    assert read(Recipe, recipe, ["planner=plain"]).planner == {"name": "plain"}
    assert read(Recipe, recipe, ["planner.knots=7", "planner=spline"]).planner == SPLINE
    assert read(Recipe, recipe, ["planner.name=spline"]).planner["knots"] == 9
    assert read(Recipe, recipe, ["planner={name: spline, spread: 2}"]).planner == {**SPLINE, "spread": 2.0}


def test_optional_components() -> None:
    assert read(Recipe, DATA).extra is None
    assert read(Recipe, DATA, ["extra=plain"]).extra == {"name": "plain"}
    assert read(Recipe, {**DATA, "extra": "plain"}, ["extra=null"]).extra is None
    assert read(Recipe, {**DATA, "extra": "plain"}, ["extra=spline", "extra.knots=5"]).extra == {**SPLINE, "knots": 5}


def test_lists_of_components() -> None:
    assert read(Recipe, DATA, ["metrics=[]"]).metrics == []
    assert [metric["name"] for metric in read(Recipe, DATA, ["metrics=[displacement,epdms]"]).metrics] == ["displacement", "epdms"]
    assert read(Recipe, DATA, ["metrics.0.pdms=true"]).metrics[0]["pdms"] is True  # of the default
    assert read(Recipe, DATA, ["metrics.0=displacement"]).metrics[0]["name"] == "displacement"


def test_components_of_components() -> None:
    config = read(Recipe, DATA, ["planner=ensemble", "planner.judge=spline", "planner.judge.knots=3", "planner.weights.second=2"])
    assert config.planner == {
        "name": "ensemble",
        "members": [SPLINE, {**SPLINE, "knots": 8}],
        "judge": {**SPLINE, "knots": 3},
        "weights": {"first": 1.0, "second": 2.0},
    }
    deep = ["planner=ensemble", "planner.members=[ensemble]", "planner.members.0.members.1.spread=3"]
    assert read(Recipe, DATA, deep).planner["members"][0]["members"] == [SPLINE, {**SPLINE, "knots": 8, "spread": 3.0}]


def test_nested_fields() -> None:
    config = read(Recipe, DATA, ["optimizer.rate=0.5", "optimizer.teacher=spline", "optimizer.teacher.knots=3"])
    assert config.optimizer == Optimizer(rate=0.5, schedule="linear", teacher={**SPLINE, "knots": 3})  # linear: by the field's default
    config = read(Recipe, {**DATA, "stages": [{"rate": 0.1}, {"teacher": "spline"}]}, ["stages.0.rate=0.2"])
    assert config.stages == [Optimizer(rate=0.2), Optimizer(teacher=SPLINE)]


def test_interpolation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACME_DATA", "/from/here")
    recipe = written(
        tmp_path, "data: ${oc.env:ACME_DATA}/train\nsteps: 7\nnote: run of ${steps}\nplanner: {name: spline, knots: '${steps}'}\n"
    )
    config = read(Recipe, recipe)
    assert (config.data, config.note, config.planner["knots"]) == (Path("/from/here/train"), "run of 7", 7)
    assert read(Recipe, recipe, ["steps=9"]).note == "run of 9"
    assert read(Recipe, recipe, ["note=${oc.env:ACME_NOTHING,otherwise}"]).note == "otherwise"
    assert read(Recipe, recipe, [r"note=\${steps}"]).note == "${steps}"


def test_yaml_anchors(tmp_path: Path) -> None:
    text = "data: /data\nplanner: &mine {name: spline, knots: 6}\nextra: *mine\noptimizer: {teacher: {<<: *mine, spread: 2}}\n"
    config = read(Recipe, written(tmp_path, text))
    assert config.planner == config.extra == {**SPLINE, "knots": 6}
    assert config.optimizer.teacher == {**SPLINE, "knots": 6, "spread": 2.0}


def test_an_empty_recipe(tmp_path: Path) -> None:
    assert read(Recipe, written(tmp_path, ""), ["data=/data"]) == read(Recipe, None, ["data=/data"]) == read(Recipe, DATA)


def test_a_recipe_is_not_changed() -> None:
    recipe = {"data": "/data", "planner": {"name": "spline"}, "metrics": ["epdms"]}
    read(Recipe, recipe, ["planner.knots=3", "metrics.0.pdms=true"])
    read(Recipe, {"data": "/data"}, ["planner.knots=3", "metrics.0.pdms=true", "table.a=1", "optimizer.rate=0.1"])
    assert recipe == {"data": "/data", "planner": {"name": "spline"}, "metrics": ["epdms"]}
    assert read(Recipe, DATA).table == {}
    assert read(Recipe, DATA).metrics[0]["pdms"] is False


# -- and back --------------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    overrides = [
        "planner=ensemble",
        "planner.judge=spline",
        "optimizer.teacher=plain",
        "stages=[{rate: 1e-7}]",
        "limit=.inf",
        "choice=second",
    ]
    config = read(Recipe, {"data": "data dir/ü", "note": "on", "table": {"a b": 1}}, overrides)
    assert read(Recipe, written(tmp_path, to_yaml(config))) == config


class Values(Config):
    text: str
    texts: dict[str, list[str]]
    number: float
    whole: int
    flag: bool
    path: Path


TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(
        ["null", "~", "yes", "on", "1e-5", "1_000", "0x10", "12:30", "2024-01-01", "=", "<<", "${x}", r"\${x", r"a\\${b}", "$", "#"]
    ),
    st.text("${}\\ab:.", max_size=8),
).filter(lambda text: text != "???")
FLOATS = st.floats(allow_nan=False)


@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(
    config=st.builds(
        Values,
        text=TEXTS,
        texts=st.dictionaries(TEXTS, st.lists(TEXTS, max_size=2), max_size=2),
        number=FLOATS,
        whole=st.integers(-(2**63), 2**63),
        flag=st.booleans(),
        path=TEXTS.map(lambda text: Path(text.replace("\0", ""))),
    )
)
def test_round_trip_of_any_value(config: Values, tmp_path: Path) -> None:
    path = tmp_path / "values.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read(Values, path) == config
    path.write_text(describe(Values, config.model_dump(mode="json")), encoding="utf-8")
    assert read(Values, path) == config


# -- files -----------------------------------------------------------------------------------------------------------------


def test_a_missing_recipe(tmp_path: Path) -> None:
    path = written(tmp_path, "data: /data")
    assert (
        message(tmp_path / "recip.yaml", kind=FileError) == f"the recipe {tmp_path}/recip.yaml does not exist. Did you mean 'recipe.yaml'?"
    )
    assert message(tmp_path / "no" / path.name, kind=FileError) == f"the recipe {tmp_path}/no/recipe.yaml does not exist."


@pytest.mark.parametrize(
    ("text", "kind", "cause"),
    [
        ("data: /data\nmetrics: [a, b\n", FileError, ", line 3: did not find expected ',' or ']'"),
        ("data: /data\nsteps: 1\ndata: /other\n", FileError, ", line 3: found duplicate key data"),
        ("data: /data\n\tsteps: 1\n", FileError, ", line 2: found a tab character that violates indentation"),
        ("data: !!python/object/apply:os.getcwd []\n", FileError, "python/object/apply:os.getcwd'"),
        ("data: *nowhere\n", FileError, ", line 1: found undefined alias"),
        ("data: 1\n---\ndata: 2\n", FileError, ", line 2: but found another document"),
        ("- data\n", ConfigError, " holds a list; it must hold fields, each as name: value"),
        ("data: " + "{a: " * 3000 + "1" + "}" * 3000, FileError, " cannot be read: maximum recursion depth exceeded"),
        ("a: &a [1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a]\nc: [" + "*b," * 1000 + "*b]\n", FileError, " for trusted input."),
        ("5\n", FileError, " cannot be read: Invalid loaded object type: int"),
        ("data\x00: 1\n", FileError, " cannot be read: unacceptable character #x0000: control characters are not allowed"),
    ],
)
def test_a_recipe_that_cannot_be_read(tmp_path: Path, text: str, kind: type[IrlvlaError], cause: str) -> None:
    told = message(written(tmp_path, text), kind=kind)
    assert told.startswith(f"the recipe {tmp_path}/recipe.yaml")
    assert cause in told


def test_a_broken_interpolation_in_a_recipe(tmp_path: Path) -> None:
    told = message(written(tmp_path, "data: /data\noptimizer: {schedule: 'a ${ b'}\n"))
    assert told == r"optimizer.schedule: '${ b' is no interpolation; to mean it as a text, write \${"


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"data: \xff\n")
    assert "cannot be read: " in message(tmp_path / "recipe.yaml", kind=FileError)
    assert message(tmp_path, kind=FileError) == f"the recipe {tmp_path} cannot be read: Is a directory"
    assert message([1]) == "a recipe is a path or a dictionary, not [1]"
    assert message({"data": "/data", "note": object()}) == "note: must be plain data, not object"


# -- mistakes --------------------------------------------------------------------------------------------------------------

FIELDS = ", ".join(Recipe.model_fields)

MISTAKES: dict[tuple[str, ...], str] = {
    # unknown fields, at every depth
    ("stepz=5",): f"stepz: there is no such field. Did you mean 'steps'? Fields: {FIELDS}",
    ("plannr.knots=5",): f"plannr: there is no such field. Did you mean 'planner'? Fields: {FIELDS}",
    ("optimizer.rat=1",): "optimizer.rat: there is no such field. Did you mean 'rate'? Fields: rate, schedule, teacher",
    ("stages=[{},{rat: 1}]",): "stages.1.rat: there is no such field. Did you mean 'rate'? Fields: rate, schedule, teacher",
    ("planner.knotz=5",): f"planner.knotz: {OWNER} has no such field. Did you mean 'knots'? Fields: knots, spread",
    ("optimizer.teacher=spline", "optimizer.teacher.knotz=5"): (
        f"optimizer.teacher.knotz: {OWNER} has no such field. Did you mean 'knots'? Fields: knots, spread"
    ),
    ("planner=ensemble", "planner.members.1.knotz=5"): (
        f"planner.members.1.knotz: {OWNER} has no such field. Did you mean 'knots'? Fields: knots, spread"
    ),
    ("extra=plain", "extra.knots=5"): (
        "extra.knots: planner 'plain' (irlvla-acme 0.3.1) has no such field. It has none. extra=NAME starts from the defaults of NAME"
    ),
    ("planner.knots=5", "planner.name=ensemble"): (
        "planner.knots: planner 'ensemble' (irlvla-acme 0.3.1) has no such field. Fields: members, judge, weights. "
        "planner=NAME starts from the defaults of NAME"
    ),
    # wrong types and values, at every depth
    ("steps=many",): "steps: must be a valid integer, got 'many': training steps",
    ("steps=1.5",): "steps: must be a valid integer, got a number with a fractional part, got 1.5: training steps",
    ("steps=0",): "steps: must be greater than or equal to 1, got 0: training steps",
    ("steps=null",): "steps: must be a valid integer, got None: training steps",
    ("steps.x=5",): "steps.x: steps is 100, which has no fields",
    ("note=5",): "note: must be a valid string, got 5",
    ("note=damn",): "note: must be polite, got 'damn'",
    ("limit=automatic",): "limit: must be a valid number or must be 'auto', got 'automatic'. Did you mean 'auto'?",
    ("either={rate: fast}",): (
        "2 mistakes in the configuration:\n  either.rate: must be a valid number, got 'fast': learning rate\n"
        "  either: must be 'none', got {'rate': 'fast'}"
    ),
    ("choice=frist",): "choice: must be 'first' or 'second', got 'frist'. Did you mean 'first'?",
    ("optimizer=5",): "optimizer: must be fields and their values, got 5",
    ("optimizer.rate=2",): "optimizer.rate: must be less than or equal to 1, got 2: learning rate",
    ("optimizer.schedule=cosin",): "optimizer.schedule: must be 'cosine' or 'linear', got 'cosin'. Did you mean 'cosine'?",
    ("stages=[{rate: fast}]",): "stages.0.rate: must be a valid number, got 'fast': learning rate",
    ("stages={rate: 1}",): "stages: must be a valid list, got {'rate': 1}",
    ("table.a=x",): "table.a: must be a valid integer, got 'x'",
    ("planner.knots=1",): f"planner.knots: must be greater than or equal to 2, got 1 for {OWNER}: control points per trajectory",
    ("planner=ensemble", "planner.weights.first=big"): (
        "planner.weights.first: must be a valid number, got 'big' for planner 'ensemble' (irlvla-acme 0.3.1)"
    ),
    (
        "steps=200",
        "note=short",
    ): "the configuration: a short run has at most 100 steps, got {'data': '/data', 'steps': 200, 'note': 'short'}",
    # what should choose a component
    ("planner=splin",): f"no planner named 'splin'. Did you mean 'spline'? Installed: {NAMES}.",
    ("extra=splin",): f"extra: no planner named 'splin'. Did you mean 'spline'? Installed: {NAMES}.",
    ("metrics=[epdms,epdm]",): "metrics.1: no metric named 'epdm'. Did you mean 'epdms'? Installed: displacement, epdms.",
    ("planner=epdms",): f"no planner named 'epdms'. There is metric 'epdms' (irlvla 0.1.0). Installed: {NAMES}.",
    ("planner=",): f"no planner named ''. Installed: {NAMES}.",
    ("planner=5",): f"planner: must name one of {NAMES}, got 5; write planner=NAME, or name: NAME beside its settings",
    ("planner=null",): f"planner: must name one of {NAMES}, got None; write planner=NAME, or name: NAME beside its settings",
    ("extra.knots=5",): f"extra: must name one of {NAMES}, got {{'knots': 5}}; write extra=NAME, or name: NAME beside its settings",
    ("extra=ensemble",): "extra: must be one planner, got 'ensemble'",
    ("metrics=epdms",): ("metrics: must be a list of names from displacement, epdms, got 'epdms'; write metrics=[NAME,...]"),
    ("metrics=[5]",): "metrics.0: must name one of displacement, epdms, got 5; write metrics.0=NAME, or name: NAME beside its settings",
    ("metrics.1=displacement",): "metrics.1: metrics has 1 items, counted from 0; to set all, write metrics=[...]",
    ("metrics.name=displacement",): "metrics.name: metrics has 1 items, counted from 0; to set all, write metrics=[...]",
    # overrides and interpolations
    ("steps",): f"'steps' is no override; write FIELD=VALUE or FIELD.SETTING=VALUE. Fields: {FIELDS}",
    ("--steps=5",): f"'--steps=5' is no override; write FIELD=VALUE or FIELD.SETTING=VALUE. Fields: {FIELDS}",
    ("=5",): f"'=5' is no override; write FIELD=VALUE or FIELD.SETTING=VALUE. Fields: {FIELDS}",
    ("note=[a",): "the value of 'note=[a' cannot be read as YAML; if it is a text, write note='\"[a\"'",
    ("note=${steps",): "the value of 'note=${steps' cannot be read as YAML; if it is a text, write note='\"${steps\"'",
    ("note=${oc.env:ACME_NOTHING}",): (
        "note: the environment variable ACME_NOTHING is not set; set it, or write ${oc.env:ACME_NOTHING,DEFAULT}"
    ),
    ("note=${stepz}",): "note: the recipe does not set stepz, which ${stepz} needs",
    ("note=${acme:x}",): "note: Unsupported interpolation type acme",
    ("note=${note}",): "note: Recursive interpolation detected",
    # missing values
    ("data=???",): "data: needs a value; write data=...",
    ("stages=[{rate: '???'}]",): "stages.0.rate: needs a value; write stages.0.rate=...",
}


@pytest.mark.parametrize("overrides", MISTAKES, ids=" ".join)
def test_what_a_mistake_is_answered(overrides: tuple[str, ...]) -> None:
    kind = PluginError if MISTAKES[overrides].find("no planner") + MISTAKES[overrides].find("no metric") > -2 else ConfigError
    told = message(DATA, *overrides, kind=kind)
    assert told.split("\nNot usable")[0] == MISTAKES[overrides]


def test_where_an_override_goes_in_a_recipe_of_several_stages() -> None:
    """A field of the stage that runs comes before what else has its name: a section, or what sections share."""
    recipe: dict[str, Any] = {
        "planner": {**DATA, "steps": 8},
        "optimizer": {"schedule": "cosine"},
        "shared": 4,
        "stage": {**DATA, "planner": {"name": "spline", "knots": "${shared}"}, "note": "${optimizer.schedule}"},
    }

    def stage(*overrides: str) -> Recipe:
        return read(Recipe, {**recipe, "stage": dict(recipe["stage"])}, overrides, "stage")

    assert stage("planner.knots=7").planner["knots"] == 7  # `planner` is a section too
    assert stage("optimizer.rate=0.5").optimizer == Optimizer(rate=0.5, schedule="linear")  # and `optimizer` is shared too
    assert stage("optimizer.schedule=linear").note == "cosine"
    assert stage("stage.planner.knots=6", "stage.steps=9").planner["knots"] == 6
    assert stage("shared=5").planner["knots"] == 5
    own = {"planner": {**DATA, "planner": "spline"}}  # a section with the name of one of its fields
    assert read(Recipe, own, ["planner.knots=7"], "planner").planner["knots"] == 7


def test_what_is_missing() -> None:
    assert message({}, kind=MissingError) == "data: needs a value (where the scenes are); write data=..."
    assert message({"data": "???", "note": "???"}) == (
        "2 mistakes in the configuration:\n  data: needs a value; write data=...\n  note: needs a value; write note=..."
    )


def test_a_field_of_two_schemas() -> None:
    class Left(Config):
        rate: int = 1

    class Right(Config):
        other: int = 1

    class Either(Config):
        side: Right | Left = Left()

    with pytest.raises(Mistakes) as caught:
        read(Either, {"side": {"rate": "fast", "other": 1}})
    assert [str(error) for error in caught.value.errors] == [
        "side.rate: must be a valid integer, got 'fast'",
        "side.other: there is no such field. Fields: rate",
    ]


def test_several_mistakes_are_reported_at_once() -> None:
    told = message(
        {"stepz": 5, "limit": "x", "optimizer": {"rate": 0, "schedul": 1}, "planner": {"name": "spline", "knots": 0, "noise": 1}},
        "metrics=[epdm,{name: epdms, pdms: perhaps}]",
        kind=Mistakes,
    )
    first, *lines = told.split("\n")
    assert first == "9 mistakes in the configuration:"
    assert [line.partition(": ")[0] for line in lines if not line.startswith("   ")] == [
        "  data",
        "  limit",
        "  optimizer.rate",
        "  optimizer.schedul",
        "  stepz",
        "  planner.knots",
        "  planner.noise",
        "  metrics.0",
        "  metrics.1.pdms",
    ]


def test_errors_are_collected_and_raised_together() -> None:
    errors: list[IrlvlaError] = []
    raise_all(errors)
    for error in (ConfigError("a"), Mistakes([MissingError("b"), PluginError("c\nd")])):
        with collecting(errors):
            raise error
    with pytest.raises(KeyError), collecting(errors):
        raise KeyError
    with pytest.raises(Mistakes) as caught:
        raise_all(errors)
    assert str(caught.value) == "3 mistakes in the configuration:\n  a\n  b\n  c\n    d"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as from a worker


# -- describe --------------------------------------------------------------------------------------------------------------


class Small(Config):
    data: Path = Field(description="where the\n  scenes are")
    steps: int = Field(100, ge=1, lt=1000, description="training steps")
    mode: Literal["fast", "null"] = "null"
    scale: Annotated[float | None, "a ratio"] = None
    names: tuple[str, ...] = ("a", "1e5")
    table: dict[str, int] = Field({})
    choice: Choice = Choice.FIRST
    optimizer: Optimizer = Optimizer()
    metrics: list[Spec] = pluggable("metric", [])
    planner: Spec = pluggable("planner", "spline", "which planner drives")
    extra: Spec | None = pluggable("planner", None)


def test_describe_shows_everything() -> None:
    assert describe(Small, merge(Small, None, ["planner=ensemble", "planner.members=[spline,plain]"])) == (
        """\
data: ???  # path: where the scenes are
steps: 100  # int >= 1 and < 1000; default 100: training steps
mode: "null"  # fast | "null"; default "null"
scale: null  # float | null; default null
names: [a, "1e5"]  # list of str; default [a, "1e5"]
table: {}  # mapping; default {}
choice: first  # first | second; default first
optimizer:  # Optimizer
  rate: 0.001  # float > 0 and <= 1; default 0.001: learning rate
  schedule: cosine  # cosine | linear; default cosine
  teacher: null  # planner | null; one of NAMES; default null
metrics: []  # list of metric; one of displacement, epdms; default []
planner:  # planner; one of NAMES; default spline: which planner drives
  name: ensemble  # irlvla-acme 0.3.1: The mean of its members.
  members:  # list of planner; one of NAMES; default [spline, {name: spline, knots: 8}]: planners that vote
    - name: spline  # irlvla-acme 0.3.1: Cubic splines.
      knots: 4  # int >= 2; default 4: control points per trajectory
      spread: 0.5  # float; default 0.5: standard deviation of a knot [m]
    - name: plain  # irlvla-acme 0.3.1
  judge: null  # planner | null; one of NAMES; default null: who breaks a tie
  weights: {first: 1.0}  # mapping; default {first: 1.0}: of the members
extra: null  # planner | null; one of NAMES; default null
""".replace("NAMES", NAMES)
    )


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["planner=ensemble", "planner.members.1.spread=2", "optimizer.teacher=spline", "stages=[{rate: 1e-7},{teacher: plain}]"],
        ["metrics=[]", "limit=1e-9", r"note=a \${b} # c: 'd'", "table={'on': 1, a b: 2}", "choice=second"],
    ],
)
def test_a_description_is_a_recipe(tmp_path: Path, overrides: list[str]) -> None:
    text = describe(Recipe, merge(Recipe, DATA, overrides))
    assert set(yaml.safe_load(text)) == set(Recipe.model_fields)
    assert read(Recipe, written(tmp_path, text)) == read(Recipe, DATA, overrides)


def test_a_description_shows_what_is_still_missing(tmp_path: Path) -> None:
    text = describe(Recipe, {})
    assert text.startswith("data: ???  # path: where the scenes are\n")
    assert describe(Recipe, merge(Recipe, written(tmp_path, text), [])) == text
    assert message(tmp_path / "recipe.yaml", kind=MissingError) == "data: needs a value; write data=..."
    assert read(Recipe, tmp_path / "recipe.yaml", ["data=/data"]) == read(Recipe, DATA)


@pytest.mark.parametrize("overrides", [["stepz=1"], ["planner.knotz=1"], ["steps=many"], ["planner=splin"], ["metrics.0.x=1"]])
def test_a_description_of_mistakes_is_refused(overrides: list[str]) -> None:
    with pytest.raises((ConfigError, PluginError)) as caught:
        describe(Recipe, merge(Recipe, {}, overrides))
    assert str(caught.value) == message(DATA, *overrides, kind=IrlvlaError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_pluggable(kind: str) -> None:
    class Any_(Config):
        one: Spec | None = pluggable(kind, None)

    assert read(Any_).one is None
    with pytest.raises(PluginError, match=rf"one: no {kind} named 'nothing'"):
        read(Any_, {"one": "nothing"})


def test_a_flag_is_no_number() -> None:
    """YAML reads a bare yes as true; pydantic alone would take it for 1."""

    class Batches(Config):
        batch: int = 4
        shuffle: bool = False

    assert read(Batches, overrides=["shuffle=yes"]).shuffle
    with pytest.raises(ConfigError, match="batch: must be a number, got True"):
        read(Batches, overrides=["batch=yes"])
