"""What is wrong with settings, in the words of the person who wrote them: which field, what it accepts, the nearest name."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic
from pydantic.fields import FieldInfo

from irlvla.components import Config
from irlvla.errors import ConfigError, MissingError, did_you_mean


def kind_of(info: FieldInfo) -> str | None:
    """The kind of component that a field chooses; None for an ordinary field."""
    extra = info.json_schema_extra
    return extra.get("kind") if isinstance(extra, dict) else None  # type: ignore[return-value]


def schemas_in(annotation: Any) -> Iterator[type[Config]]:
    """The schemas in a type: `Optimizer` in `list[Optimizer] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from schemas_in(inner)


def names_one(spec: Any) -> bool:
    """Whether data chooses a component: "spline", or {"name": "spline", ...}."""
    return isinstance(spec, str) or (isinstance(spec, Mapping) and isinstance(spec.get("name"), str))


def explain(
    schema: type[Config],
    settings: Mapping[str, Any],
    rejected: pydantic.ValidationError,
    names: Callable[[str], list[str]],
    where: str = "",
    owner: str = "",
) -> list[ConfigError]:
    """One error for each field that pydantic rejected.

    Args:
        names: the names of a kind, for a field that must choose one.
        where: path of the settings: "planner"; "" = those of the recipe itself.
        owner: whose settings they are: "planner 'spline' (irlvla-acme 0.3.1)".
    """
    found: dict[str, tuple[_Place, list[Any]]] = {}  # a field that accepts several types has a problem with each
    for problem in rejected.errors(include_url=False):
        place = _locate(schema, settings, problem["loc"])
        found.setdefault(place.path, (place, []))[1].append(problem)
    return [_error(place, problems, names, where, owner) for place, problems in found.values()]


def _error(place: _Place, problems: list[Any], names: Callable[[str], list[str]], where: str, owner: str) -> ConfigError:
    path = ".".join(filter(None, [where, place.path])) or "the configuration"
    problems = [problem for problem in problems if problem["type"] != "extra_forbidden"] or problems
    kind, given, reason = place.kind, problems[0]["input"], problems[0]["type"]
    whose = f" for {owner}" if owner else ""
    if reason == "extra_forbidden":
        return ConfigError(f"{path}: {_stranger(place, where, owner)}")
    if reason == "missing":
        choice = f", one of {', '.join(names(kind)) or 'none, as none is installed'}" if kind else ""
        return MissingError(f"{path}: needs a value{choice}{whose}{f' ({place.help})' if place.help else ''}; write {path}=...")
    if kind and reason == "list_type":
        return ConfigError(f"{path}: must be a list of names from {', '.join(names(kind))}, got {given!r:.80}; write {path}=[NAME,...]")
    if kind and not names_one(given):
        return ConfigError(nameless(path, given, names(kind)))
    rules = " or ".join(dict.fromkeys(map(_rule, problems)))
    choices = " ".join(str(problem.get("ctx", {}).get("expected", "")) for problem in problems)
    near = did_you_mean(given, re.findall("'([^']*)'", choices))
    return ConfigError(
        ": ".join(filter(None, [path, f"{rules}, got {given!r:.80}{whose}", place.help])) + f"{near and '. '}{near}".rstrip()
    )


def nameless(path: str, given: object, names: list[str]) -> str:
    """The message for what should choose a component and names none."""
    accepted = ", ".join(names) or "none, as none is installed"
    return f"{path}: must name one of {accepted}, got {given!r:.80}; write {path}=NAME, or name: NAME beside its settings"


@dataclass(frozen=True)
class _Place:
    path: str
    schema: type[Config]  # the innermost one
    info: FieldInfo | None  # of the field there

    @property
    def kind(self) -> str | None:
        return kind_of(self.info) if self.info else None

    @property
    def help(self) -> str:
        return " ".join((self.info.description or "").split()) if self.info else ""


def _locate(schema: type[Config], settings: Any, loc: tuple[int | str, ...]) -> _Place:
    """Where a problem is. pydantic's path also names the branches of a union, which are no part of what was written."""
    steps, schemas, info = [], [schema], None
    for step in loc:
        if step in schemas[0].model_fields:
            info = schemas[0].model_fields[str(step)]
            schema, schemas = schemas[0], list(schemas_in(info.annotation)) or [Config]
        elif isinstance(settings, Mapping) and step in settings:
            schema, info = schemas[0], None
        elif not isinstance(step, int):
            schemas = [one for one in schemas if one.__name__ == step] or schemas
            continue
        steps.append(str(step))
        try:
            settings = settings[step]
        except (TypeError, LookupError):
            settings = None
    return _Place(".".join(steps), schema, info)


def _stranger(place: _Place, where: str, owner: str) -> str:
    fields = list(place.schema.model_fields)
    near = did_you_mean(place.path.rpartition(".")[2], fields)
    accepted = f"Fields: {', '.join(fields)}" if fields else "It has none"
    hint = f". {where}=NAME starts from the defaults of NAME" if owner and not near else ""
    return f"{owner} has no such field. {near}{accepted}{hint}" if owner else f"there is no such field. {near}{accepted}"


def _rule(problem: Any) -> str:
    """What a value must be."""
    if problem["type"] in ("value_error", "assertion_error"):
        return str(problem["ctx"]["error"])
    if problem["type"] == "model_type":
        return "must be fields and their values"
    text = re.sub("^Input should|, unable to parse.*", lambda found: "must" if found[0].startswith("Input") else "", problem["msg"])
    return text[:1].lower() + text[1:]
