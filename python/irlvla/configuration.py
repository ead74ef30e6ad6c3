"""The one way from a recipe (YAML), overrides (`planner.knots=5`) or a dictionary to a checked configuration, and back.

OmegaConf merges and interpolates (`${oc.env:DATA}`), pydantic checks, the registry checks the settings of the chosen components.
`planner=spline` chooses a component and drops the settings of the one before; `planner.knots=5` changes a setting.
"""

from __future__ import annotations

import json
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import omegaconf
import yaml
from omegaconf import DictConfig, OmegaConf
from pydantic_core import PydanticUndefined

from irlvla.components import Config
from irlvla.errors import ConfigError, FileError, did_you_mean
from irlvla.registry import Registry, installed, kind_of

C = TypeVar("C", bound=Config)


def read(schema: type[C], recipe: str | os.PathLike[str] | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()) -> C:
    """A checked configuration from a recipe (a path or a dictionary) and overrides, which win from left to right.

    Raises:
        FileError: the recipe cannot be read.
        ConfigError: a wrong name, field, type or value: what was given, what is accepted, the nearest name.
        PluginError: a component that is not there, or whose plugin cannot be used.
    """
    return installed().validate(schema, merge(schema, recipe, overrides))  # type: ignore[return-value]


def merge(schema: type[Config], recipe: str | os.PathLike[str] | Mapping[str, Any] | None, overrides: Iterable[str]) -> dict[str, Any]:
    """Recipe and overrides as plain data, interpolated, not yet checked."""
    if recipe is None:
        tree = OmegaConf.create()
    elif isinstance(recipe, Mapping):
        tree = OmegaConf.create(dict(recipe))
    else:
        tree = _load(Path(recipe))
    for override in overrides:
        _apply(schema, tree, override)
    try:
        return OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)  # type: ignore[return-value]
    except omegaconf.errors.OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from error


def _load(path: Path) -> DictConfig:
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError as error:
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise FileError(f"the recipe {path} does not exist. {near}".rstrip()) from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError, omegaconf.errors.OmegaConfBaseException) as error:
        raise FileError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(
            f"the recipe {path} must hold fields (name: value), not a {'list' if OmegaConf.is_list(tree) else 'single value'}"
        )
    return tree


def _apply(schema: type[Config], tree: DictConfig, override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", path):
        raise ConfigError(
            f"{override!r} is no override; write FIELD=VALUE or FIELD.SETTING=VALUE. Fields: {', '.join(schema.model_fields)}"
        )
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]
        head, *rest = path.split(".")
        info = schema.model_fields.get(head)
        if info is not None and kind_of(info) and rest:
            if isinstance(spec := tree.get(head), str):
                tree[head] = {"name": spec}
            if head not in tree and not info.is_required() and isinstance(info.default, str | Mapping):
                tree[head] = {"name": info.default} if isinstance(info.default, str) else dict(info.default)
        OmegaConf.update(tree, path, value, merge=False, force_add=True)
    except (omegaconf.errors.OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"the override {override!r} does not fit: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


# -- and back ----------------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """A recipe that gives this configuration again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe(schema: type[Config], settings: Mapping[str, Any]) -> str:
    """A recipe of every field with its value, and as comments its type, default and help; chosen components included.

    The settings are shown as they would be used; a field that still needs a value is shown as `???`.
    """
    return "\n".join(_describe(installed(), schema, settings, "")) + "\n"


def _describe(known: Registry, schema: type[Config], settings: Mapping[str, Any], indent: str) -> Iterator[str]:
    if strangers := [name for name in settings if name not in schema.model_fields and name != "name"]:
        known.validate(schema, {strangers[0]: settings[strangers[0]]})  # raises: there is no such field
    for name, info in schema.model_fields.items():
        default = info.get_default(call_default_factory=True)
        value = settings.get(name, default)
        kind = kind_of(info)
        notes = [_type_name(info.annotation) if kind is None else kind]
        if default is not PydanticUndefined and kind is None:
            notes.append(f"default {_plain(default)}")
        if kind is not None:
            notes.append(f"one of {', '.join(known.names(kind))}")
        comment = f"  # {'; '.join(notes)}" + (f": {info.description}" if info.description else "")
        if kind is None or value is None or value is PydanticUndefined:
            yield f"{indent}{name}: {'???' if value is PydanticUndefined else _plain(value)}{comment}"
        elif isinstance(value, list | tuple):
            yield f"{indent}{name}:{comment}"
            for spec in value:
                first, *rest = _describe_spec(known, kind, spec, indent + "    ")
                yield f"{indent}  - {first.lstrip()}"
                yield from rest
        else:
            yield f"{indent}{name}:{comment}"
            yield from _describe_spec(known, kind, value, indent + "  ")


def _describe_spec(known: Registry, kind: str, spec: Any, indent: str) -> Iterator[str]:
    spec = {"name": spec} if isinstance(spec, str) else dict(spec)
    entry = known.find(kind, spec.get("name", ""))
    target = entry.load()
    summary = (target.__doc__ or "").strip().split("\n")[0]
    yield f"{indent}name: {entry.name}  # {entry.plugin}" + (f": {summary}" if summary else "")
    yield from _describe(known, target.Config, spec, indent)


def _plain(value: Any) -> str:
    if isinstance(value, Config):
        value = value.model_dump(mode="json")
    return (
        json.dumps(value, default=str, ensure_ascii=False)
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_./][\w./-]*", value)
        else value
    )


def _type_name(annotation: Any) -> str:
    """A type as a person would write it: `int`, `path`, `one of "a", "b"`."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(args[0])
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is type(None) else _type_name(arg) for arg in args)
    if origin in (list, tuple, set):
        return "list of " + " or ".join(dict.fromkeys(_type_name(arg) for arg in args if arg is not Ellipsis))
    if annotation is Path:
        return "path"
    return getattr(annotation, "__name__", str(annotation))
