"""The one way from a recipe (YAML), overrides (`planner.knots=5`) or a dictionary to a checked configuration, and back.

OmegaConf reads and interpolates (`${oc.env:DATA}`, `${steps}`), pydantic checks the fields, and the registry checks the
settings of the components that they choose. `planner=spline` chooses a component and drops what was set for the one before;
`planner.knots=5` and `metrics.0.name=epdms` change one setting and keep the others. `???` marks what must be set elsewhere.

A recipe of several stages holds a section for each, named as its command, and beside them what they share, to which `${...}`
refers. A stage reads its section alone. An override goes there too, unless it begins with another name of the recipe and the stage
has no such field: `irlvla reward RECIPE reward.width=64` sets the field `reward` of the stage.

    images: [96, 256]
    imitate: {data: {train: {name: synthetic, size: "${images}"}}, ...}
    reward: {policy: "${imitate.out}/checkpoints/best/model", ...}
"""

from __future__ import annotations

import math
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from irlvla.benchmarks import completed
from irlvla.components import UNSET, Config
from irlvla.errors import ConfigError, FileError, IrlvlaError, MissingError, collecting, did_you_mean, raise_all
from irlvla.registry import installed, kind_of

C = TypeVar("C", bound=Config)
Recipe = str | os.PathLike[str] | Mapping[str, Any] | None


def read(schema: type[C], recipe: Recipe = None, overrides: Iterable[str] = (), section: str = "") -> C:
    """A checked configuration from a recipe (a path or a dictionary) and overrides, of which the last wins.

    Args:
        section: of a recipe that holds it, the part that is read; of any other, all is.

    Raises:
        FileError: the recipe cannot be read.
        ConfigError: wrong names, fields, types or values: what was given, what is accepted, the nearest name.
        PluginError: a component that is not there, or whose plugin cannot be used.
        ContractError: a component that is not what its kind demands.
    """
    settings = completed(schema, merge(schema, recipe, overrides, section))
    raise_all([MissingError(f"{path}: needs a value; write {path}=...") for path in _unset(settings)])
    return installed().validate(schema, settings)  # type: ignore[return-value]


def merge(schema: type[Config], recipe: Recipe, overrides: Iterable[str], section: str = "") -> dict[str, Any]:
    """Recipe and overrides as plain data, interpolated, not yet checked, without what a benchmark brings. Raises as `read` does."""
    try:
        settings: Any = OmegaConf.to_container(_tree(recipe))
        within = section if section in settings else ""
        for override in overrides:
            path, value = _parse(schema, override)
            settings = _override(schema, settings, within, path.split("."), value)
        tree = OmegaConf.create(settings)
        found = tree[within] if within else tree
        if not isinstance(found, DictConfig):
            raise ConfigError(f"{within}: must hold the fields of this stage, each as name: value; got {found!r:.80}")
        return OmegaConf.to_container(found, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        path = re.sub(r"\[(\d+)\]", r".\1", error.full_key or "the recipe")  # OmegaConf writes metrics[0].name
        raise ConfigError(f"{path}: {_cause(error)}") from error


# -- recipes -----------------------------------------------------------------------------------------------------------


def _tree(recipe: Recipe) -> DictConfig:
    if recipe is None or isinstance(recipe, Mapping):
        return OmegaConf.create(dict(recipe or {}))
    if not isinstance(recipe, str | os.PathLike):
        raise ConfigError(f"a recipe is a path or a dictionary, not {recipe!r:.80}")
    path = Path(recipe)
    try:
        tree = OmegaConf.load(path)
    except FileNotFoundError as error:
        near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise FileError(f"the recipe {path} does not exist. {near}".rstrip()) from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise FileError(f"the recipe {path}{line}: {error.problem}") from error
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise FileError(f"the recipe {path} cannot be read: {_cause(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"the recipe {path} holds a list; it must hold fields, each as name: value")
    return tree


def _unset(settings: Any, path: str = "") -> Iterator[str]:
    """Paths of the fields that are marked `???`."""
    items = settings.items() if isinstance(settings, Mapping) else enumerate(settings) if isinstance(settings, list) else ()
    for name, value in items:
        yield from _unset(value, f"{path}.{name}".lstrip("."))
    if settings == UNSET:
        yield path


def _without_unset(settings: Any) -> Any:
    if isinstance(settings, list):
        return [_without_unset(value) for value in settings]
    if isinstance(settings, Mapping):
        return {name: _without_unset(value) for name, value in settings.items() if value != UNSET}
    return settings


def _cause(error: BaseException) -> str:
    """What OmegaConf or the system found wrong, in one line."""
    cause = getattr(error, "strerror", None) or str(error).strip().split("\n")[0]
    for pattern, words in _WORDS.items():
        cause = re.sub(pattern, words, cause)
    return cause


_WORDS = {
    r'^.* while resolving interpolation: "?(.*?)"?$': r"\1",
    r"^Environment variable '(.*)' not found$": r"the environment variable \1 is not set; set it, or write ${oc.env:\1,DEFAULT}",
    r"^Interpolation key '(.*)' not found$": r"the recipe does not set \1, which ${\1} needs",
    r"^no viable alternative at input '(.*)'$": r"'\1' is no interpolation; to mean it as a text, write \\${",
    r"^Value '(.*)' is not a supported primitive type$": r"must be plain data, not \1",
}


# -- overrides ---------------------------------------------------------------------------------------------------------


def _parse(schema: type[Config], override: str) -> tuple[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"\w[\w-]*(\.\w[\w-]*)*", path):
        fields = ", ".join(schema.model_fields)
        raise ConfigError(f"{override!r} is no override; write FIELD=VALUE or FIELD.SETTING=VALUE. Fields: {fields}")
    try:
        parsed: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"the value of {override!r} cannot be read as YAML; if it is a text, write {path}='\"{text}\"'") from error
    return path, parsed["value"] if text else ""


def _override(schema: type[Config], settings: dict[str, Any], section: str, steps: list[str], value: Any) -> dict[str, Any]:
    """A recipe with a value set at a path: in its section, if it has one, or in what its sections share. A field of the stage wins."""
    whole, is_field = FieldInfo(annotation=schema), steps[0] in schema.model_fields
    if not section:
        return _assign(settings, whole, steps, value, settings)
    if steps[0] in settings and steps[0] != section and not is_field:
        return _assign(settings, None, steps, value, settings)
    inner = steps[1:] if steps[0] == section and not is_field else steps
    return {**settings, section: _assign(settings[section], whole, inner, value, settings)}


def _assign(settings: Any, info: FieldInfo | None, steps: list[str], value: Any, recipe: dict[str, Any], where: str = "") -> Any:
    """Settings with a value set at a path. A component that was chosen by its name alone, or by default, gets room for settings.

    Args:
        info: of the field whose value the settings are.
        recipe: all of it, to which settings may refer (`${...}`).
        where: path of the settings, for messages.
    """
    if not steps:
        return value
    (step, *rest), path = steps, f"{where}.{steps[0]}".lstrip(".")
    if isinstance(settings, str) and "${" in settings:
        settings = _referred(settings, recipe)
    if isinstance(settings, list):
        if not re.fullmatch("[0-9]+", step) or int(step) >= len(settings):
            raise ConfigError(f"{path}: {where} has {len(settings)} items, counted from 0; to set all, write {where}=[...]")
        settings[int(step)] = _assign(settings[int(step)], info, rest, value, recipe, path)
        return settings
    if isinstance(settings, str) and info is not None and kind_of(info):
        settings = {"name": settings}
    if settings is None or settings == UNSET:
        settings = {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: {where} is {settings!r:.80}, which has no fields")
    schema = _schema_of(settings, info) if rest and info is not None else None
    inner = schema.model_fields.get(step) if schema is not None else None
    settings[step] = _assign(settings.get(step, _default(inner)), inner, rest, value, recipe, path)
    return settings


def _referred(reference: str, recipe: dict[str, Any]) -> Any:
    """What `${...}` stands for, a copy, in which other references stay as they are."""
    found = OmegaConf.create({**recipe, "_": reference})["_"]
    return OmegaConf.to_container(found) if OmegaConf.is_config(found) else found


def _schema_of(settings: Mapping[str, Any], info: FieldInfo) -> type[Config] | None:
    """The schema of a field's value: its component's, or that of its type."""
    kind, name = kind_of(info), settings.get("name")
    if kind is None:
        return _nested(info.annotation)
    return installed().find(kind, name).load().Config if isinstance(name, str) else None


def _nested(annotation: Any) -> type[Config] | None:
    """The one schema in a type: `Optimizer` in `Optimizer | None` and in `list[Optimizer]`."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    origin = typing.get_origin(annotation)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return None  # its fields are names that the user gives
    found = [schema for schema in map(_nested, typing.get_args(annotation)) if schema is not None]
    return found[0] if len(found) == 1 else None


def _default(info: FieldInfo | None, otherwise: Any = None) -> Any:
    """The default of a field as plain data."""
    default = PydanticUndefined if info is None else info.get_default(call_default_factory=True)
    return otherwise if default is PydanticUndefined else _plain(default)


# -- and back ----------------------------------------------------------------------------------------------------------


def to_yaml(config: Config) -> str:
    """A recipe that gives this configuration again."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(config)))


def _plain(value: Any) -> Any:
    """Plain data for a recipe, with what looks like an interpolation escaped."""
    value = to_jsonable_python(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def describe(schema: type[Config], settings: Mapping[str, Any]) -> str:
    """A recipe of every field with its value and, as comments, its type, default and help; those of the chosen components too.

    A field that still needs a value is shown as `???`. Raises as `read` does for everything else that is wrong.
    """
    errors: list[IrlvlaError] = []
    with collecting(errors):
        settings = completed(schema, settings)
        installed().validate(schema, _without_unset(settings))
    raise_all([error for error in errors if not isinstance(error, MissingError)])
    return "".join(f"{line}\n" for line in _fields(schema, _plain(settings)))


def _fields(schema: type[Config], settings: Mapping[str, Any]) -> Iterator[str]:
    for name, info in schema.model_fields.items():
        value = settings.get(name, _default(info, UNSET))
        help = " ".join((info.description or "").split())
        comment = f"  # {'; '.join(_notes(info))}" + (f": {help}" if help else "")
        blocks = [_block(info, item) for item in (value if isinstance(value, list) else [value])]
        if not blocks or not all(blocks):
            yield f"{name}: {value if value == UNSET else _flow(value)}{comment}"
            continue
        yield f"{name}:{comment}"
        head, indent = ("  - ", "    ") if isinstance(value, list) else ("  ", "  ")
        for first, *rest in blocks:
            yield f"{head}{first}"
            yield from (f"{indent}{line}" for line in rest)


def _block(info: FieldInfo, value: Any) -> list[str]:
    """The fields of a component or of a nested schema, line by line; none if the value has no fields."""
    kind, schema = kind_of(info), _nested(info.annotation)
    if kind and isinstance(value, str) and value != UNSET:
        value = {"name": value}
    if not isinstance(value, Mapping) or (kind is None and schema is None):
        return []
    if kind is None:
        return list(_fields(schema, value)) if schema else []
    entry = installed().find(kind, value["name"])
    target = entry.load()
    summary = (target.__doc__ or "").strip().split("\n")[0]
    return [f"name: {entry.name}  # {entry.plugin}" + (f": {summary}" if summary else ""), *_fields(target.Config, value)]


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _notes(info: FieldInfo) -> Iterator[str]:
    """The type of a field, what it accepts, and its default."""
    kind, default = kind_of(info), _default(info, UNSET)
    bounds = [f" {sign} {getattr(rule, name)}" for rule in info.metadata for name, sign in _SIGNS.items() if hasattr(rule, name)]
    yield _type_name(info.annotation, kind or "mapping") + " and".join(bounds)
    if kind:
        yield f"one of {', '.join(installed().names(kind)) or 'none'}"
    if default != UNSET and (kind or not isinstance(default, Mapping) or _nested(info.annotation) is None):
        yield f"default {_flow(default)}"


def _type_name(annotation: Any, mapping: str) -> str:
    """A type as a person would write it: `int`, `path | null`, `mean | max`. `mapping` is what a dictionary is called."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(args[0], mapping)
    if origin is typing.Literal:
        return " | ".join(map(_flow, args))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_type_name(arg, mapping) for arg in args)
    if origin in (list, tuple, set, frozenset):
        return "list of " + " | ".join(dict.fromkeys(_type_name(arg, mapping) for arg in args if arg is not Ellipsis))
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return " | ".join(_flow(to_jsonable_python(member)) for member in annotation)
    names = {type(None): "null", Path: "path", dict: mapping}
    return names.get(origin or annotation) or str(getattr(annotation, "__name__", annotation))


def _flow(value: Any) -> str:
    """Plain data on one line of YAML, quoted where it would read as something else."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_flow(name)}: {_flow(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", value) and yaml.safe_load(value) == value:
        return value
    style = '"' if isinstance(value, str) else None
    return yaml.safe_dump(value, default_style=style, allow_unicode=True, width=math.inf).removesuffix("...\n").rstrip("\n")
