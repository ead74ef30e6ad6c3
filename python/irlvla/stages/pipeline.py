"""Several stages after one another, from one recipe: each section of it is a run, and later ones build on the runs of earlier ones.

    runs: runs/small
    imitate: { ... }
    reward: { policy: "${runs}/imitate/checkpoints/best/model", ... }
    reinforce: { ... }
    reinforce-exact: { ... }
    evaluate: { ... }

A section is named after its stage, with anything after a dash. Its run is the folder of its name in `runs`, unless it sets `out`.
What is finished is left alone, and what was stopped goes on, so the same command again ends where an undisturbed one would.
"""

from __future__ import annotations

import itertools
import json
import pkgutil
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic

from irlvla import configuration
from irlvla.components import Config
from irlvla.errors import ConfigError, did_you_mean
from irlvla.run import RunConfig
from irlvla.run.journal import ENVIRONMENT, read_previous

STAGES = {
    "imitate": "irlvla.stages.imitation:imitate",
    "reward": "irlvla.stages.reward_learning:reward",
    "reinforce": "irlvla.stages.reinforcement:reinforce",
    "evaluate": "irlvla.stages.evaluation:evaluate",
}
FINISHED = "summary.json"  #: what a stage writes last


@dataclass(frozen=True)
class Step:
    """One section of a recipe."""

    name: str
    stage: Callable[[Any], Path]
    config: RunConfig

    @property
    def out(self) -> Path:
        """The directory of its run."""
        assert self.config.out is not None
        return self.config.out

    def is_finished(self) -> bool:
        """Whether its run is complete. Raises `ConfigError` for a run with other settings."""
        previous = read_previous(self.out, self.name.partition("-")[0], self.config, self.config.may_change)
        return previous is not None and (self.out / FINISHED).exists()

    def began(self) -> str | None:
        """When its run began, before it was ever resumed; None if it has not."""
        path = self.out / ENVIRONMENT
        facts = json.loads(path.read_text()) if path.exists() else None
        while facts and facts["previous"]:
            facts = facts["previous"]
        return facts and facts["started"]

    def run(self) -> Path:
        """Do what is left of it."""
        return self.out if self.is_finished() else self.stage(self.config)


def read_steps(recipe: str | Path, overrides: Iterable[str] = ()) -> list[Step]:
    """The sections of a recipe, in its order, checked.

    Args:
        overrides: SECTION.FIELD=VALUE, or NAME=VALUE of what sections share, or FIELD=VALUE for every section whose stage has it.

    Raises:
        FileError, ConfigError, PluginError: as `configuration.read`.
        ConfigError: the recipe has no section of a stage, or a run is older than one that it was made from.
    """
    whole = configuration.merge(Config, recipe, (), "")
    stages = {name: pkgutil.resolve_name(STAGES[kind]) for name in whole if (kind := name.partition("-")[0]) in STAGES}
    if not stages:
        raise ConfigError(f"{recipe} has no section of a stage: {', '.join(STAGES)}. Its sections: {', '.join(whole) or 'none'}")
    schemas = {name: typing.get_type_hints(stage)["config"] for name, stage in stages.items()}
    schema = pydantic.create_model("Recipe", __base__=Config, **{name: (of, ...) for name, of in schemas.items()})  # type: ignore[call-overload]
    whole = configuration.merge(schema, recipe, itertools.chain.from_iterable(_addressed(one, whole, schemas) for one in overrides), "")
    runs = Path(whole.get("runs", Path("runs", Path(recipe).stem)))
    steps = []
    for name, stage in stages.items():
        settings = {"out": str(runs / name), **(whole[name] or {}), "resume": True}
        try:
            steps.append(Step(name, stage, configuration.read(schemas[name], settings)))
        except ConfigError as error:
            raise ConfigError(f"in the section {name}: {error}") from error
    _require_order(steps)
    return steps


def chosen(steps: Sequence[Step], name: str | None) -> Sequence[Step]:
    """All steps, or the one of a name. Raises `ConfigError` if there is none."""
    names = [step.name for step in steps]
    if name is not None and name not in names:
        raise ConfigError(f"the recipe has no section {name!r}. {did_you_mean(name, names)}Sections: {', '.join(names)}")
    return [step for step in steps if name in (None, step.name)]


def _addressed(override: str, whole: dict[str, Any], schemas: dict[str, type[Config]]) -> list[str]:
    """An override with the sections that it is for."""
    field = override.partition("=")[0].partition(".")[0]
    if field in whole:
        return [override]
    if found := [f"{name}.{override}" for name, schema in schemas.items() if field in schema.model_fields]:
        return found
    fields = dict.fromkeys([*whole, *itertools.chain.from_iterable(schema.model_fields for schema in schemas.values())])
    raise ConfigError(f"{override!r}: neither the recipe nor a stage of it has {field!r}. {did_you_mean(field, fields)}".rstrip())


def _require_order(steps: Sequence[Step]) -> None:
    """Raise `ConfigError` for a run that was made from an earlier state of another one, whose folder its settings name."""
    for earlier, later in itertools.combinations(steps, 2):
        first, second = earlier.began(), later.began()
        if second and f"{earlier.out}/" in later.config.model_dump_json() and (first is None or first > second):
            raise ConfigError(
                f"{later.out} was made from another run than the one of {earlier.out}, which is newer or gone. "
                f"Remove {later.out}, or choose another folder with runs=FOLDER"
            )
