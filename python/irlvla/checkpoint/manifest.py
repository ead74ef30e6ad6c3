"""`config.json`, which stands beside the weights of a saved model: what to build, and which packages provide it.

It is plain data. The names in it are looked up among the installed plugins, and nothing in it is executed or interpolated.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import pydantic
from packaging.version import InvalidVersion, Version
from pydantic import ConfigDict, Field
from torch import nn

import irlvla
from irlvla.components import Component, Config, Policy
from irlvla.errors import ContractError, FileError, InputError, IrlvlaError, PluginError
from irlvla.registry import Plugin, installed, kind_of
from irlvla.registry.explanation import names_one

CONFIG = "config.json"
WEIGHTS: Final = "model.safetensors"
FORMAT: Final = 1  #: of config.json; a later irlvla may write a higher one

_Word = Annotated[str, Field(pattern=r"^\w[\w.+!-]*$")]  # these stand in commands that people copy
_Width = Annotated[str, Field(pattern="^width$")]
_Version = Annotated[str, Field(pattern=r"^(\w[\w.+!-]*|sha256:[0-9a-f]{64})$")]


class Weights(Config):
    """The file of the weights, as it must be."""

    model_config = ConfigDict(strict=True)
    file: Literal["model.safetensors"] = WEIGHTS  # another path could lead out of the folder
    bytes: int
    sha256: str


class Manifest(Config):
    """What config.json holds, besides a checksum of all this."""

    model_config = ConfigDict(strict=True)
    format: Literal[1] = FORMAT
    irlvla: _Word = irlvla.__version__
    kind: Literal["policy", "backbone", "reasoner", "planner", "reward_model", "rl_algorithm"]
    spec: dict[str, Any]  # name and settings of a component; of a policy, those of its parts
    runtime: dict[_Width, int]  # what a component is built with besides its settings
    requires: dict[_Word, _Version]  # distributions by their versions, one-file plugins by their checksums
    weights: Weights

    # -- writing -----------------------------------------------------------------------------------------------------
    @classmethod
    def of(cls, model: Policy | Component, weights: Path) -> Self:
        """The manifest of a model whose weights are in a file.

        Raises:
            PluginError: a component is provided by no plugin, so that it could not be found again.
            ContractError: a component has settings that JSON cannot hold.
        """
        specs = {name: _spec(part) for name, part in parts(model).items()}
        plugins = [plugin for part in parts(model).values() for plugin in _plugins(part)]
        one = None if isinstance(model, Policy) else model
        try:
            return cls(
                kind="policy" if one is None else one.kind,  # type: ignore[arg-type]
                spec=specs if one is None else specs[one.kind],
                runtime={} if one is None else dict(one.runtime),
                requires={"irlvla": irlvla.__version__, **dict(sorted(map(_requirement, plugins)))},
                weights=Weights(bytes=weights.stat().st_size, sha256=sha256(weights)),
            )
        except pydantic.ValidationError as error:
            names = " and ".join(map(str, parts(model).values()))
            raise ContractError(f"{names} cannot be saved: {_first(error)}") from error

    def write(self, folder: Path) -> None:
        """Write config.json. Without a line feed at its end: cut off anywhere, it is no JSON."""
        content = self.model_dump(mode="json")
        (folder / CONFIG).write_text(json.dumps({**content, "sha256": _checksum(content)}, indent=2))

    # -- reading -----------------------------------------------------------------------------------------------------
    @classmethod
    def read(cls, folder: Path) -> Self:
        """The manifest of a saved model, whose weights are as it says.

        Raises:
            FileError: there is no saved model; it is truncated, corrupt, or written by a later irlvla.
        """
        file = folder / CONFIG
        content = _json(folder)
        written_by, number = content.get("irlvla"), content.get("format")
        if not isinstance(number, int) or not isinstance(written_by, str):
            raise FileError(f"{file} was not written by irlvla: it has no format")
        if number > FORMAT:
            remedy = "Try: pip install --upgrade irlvla"
            raise FileError(f"{folder} was written by irlvla {written_by:.40} in format {number}, this is {irlvla.__version__}. {remedy}")
        if content.pop("sha256", None) != _checksum(content):
            raise FileError(f"{file} is corrupt or was edited: its content does not match its checksum. {_REMEDY}")
        try:
            manifest = cls.model_validate(content)
        except pydantic.ValidationError as error:
            raise FileError(f"{file} is not as irlvla writes it: {_first(error)}") from error
        _require_whole(folder / WEIGHTS, manifest.weights)
        return manifest

    def build(self, source: str) -> Policy | Component:
        """The model that it describes, not yet with its weights. Warns of plugins that are older than those it was saved with.

        Args:
            source: where it comes from, for messages.

        Raises:
            PluginError: a plugin is missing, or lacks a component.
            FileError: the installed plugins reject its settings.
        """
        for name, version in self.requires.items():
            _require_plugin(source, name, version)
        try:
            if self.kind != "policy":
                return installed().build(self.kind, self.spec, **self.runtime)
            if not {"backbone", "planner"} <= set(self.spec) <= {"backbone", "planner", "reasoner"}:
                raise InputError(f"a policy is of backbone, planner and perhaps reasoner, not of {', '.join(self.spec) or 'nothing'}")
            return installed().build_policy(**self.spec)
        except IrlvlaError as error:
            kind = PluginError if isinstance(error, PluginError) else FileError
            raise kind(f"{source} does not fit what is installed: {error}\n{self.remedy}".rstrip()) from error

    @property
    def remedy(self) -> str:
        """How to get the plugins that the model was saved with; "" if they are these."""
        versions = {plugin.name: plugin.version for plugin in installed().plugins}
        others = [f"{name}=={version}" for name, version in self.requires.items() if versions.get(name, "") not in ("", version)]
        return f"It was saved with others: pip install {' '.join(others)}" if others else ""


def parts(model: Policy | Component) -> dict[str, Component]:
    """The components of a model. Raises `InputError` for what has no weights."""
    if isinstance(model, Policy):
        found = {"backbone": model.backbone, "planner": model.planner, "reasoner": model.reasoner}
        return {name: part for name, part in found.items() if part is not None}
    if not isinstance(model, Component):
        raise InputError(f"a policy or a component is saved, not {type(model).__name__}")
    if not isinstance(model, nn.Module):
        raise InputError(f"{model} has no weights to save; its name and settings are all there is of a {model.kind}")
    return {model.kind: model}


def sha256(file: Path) -> str:
    """Checksum of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@functools.cache
def checksum_of(plugin: Plugin) -> str:
    """Checksum of a one-file plugin when it was first asked for: what was loaded of the file does not change with it."""
    return sha256(Path(plugin.module))


# -- of live components ------------------------------------------------------------------------------------------------


def _spec(component: Component) -> dict[str, Any]:
    name = installed().entry_of(component).name
    try:
        return {"name": name, **component.config.model_dump(mode="json")}
    except ValueError as error:
        raise ContractError(f"{component} cannot be saved: its settings are no plain data: {error}") from error


def _plugins(component: Component) -> Iterator[Plugin]:
    """The plugins of a component and of those that its settings choose."""
    yield installed().entry_of(component).plugin
    yield from _chosen(None, component.config)


def _chosen(kind: str | None, value: Any) -> Iterator[Plugin]:
    if isinstance(value, Config):
        for name, info in type(value).model_fields.items():
            yield from _chosen(kind_of(info), getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _chosen(kind, item)
    elif isinstance(value, Mapping) and not (kind and names_one(value)):
        for item in value.values():
            yield from _chosen(kind, item)
    elif kind is not None and isinstance(value, Mapping):
        entry = installed().find(kind, value["name"])
        yield entry.plugin
        yield from _chosen(None, entry.load().Config.model_validate({name: item for name, item in value.items() if name != "name"}))


def _requirement(plugin: Plugin) -> tuple[str, str]:
    return plugin.name, plugin.version or f"sha256:{checksum_of(plugin)}"


# -- of files ----------------------------------------------------------------------------------------------------------

_REMEDY = "Copy or download it again, or write it again with irlvla.save_pretrained"


def _json(folder: Path) -> dict[str, Any]:
    if folder.is_file():
        raise FileError(f"{folder} is a file; a saved model is a folder with {CONFIG} and {WEIGHTS}")
    try:
        content = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError as error:
        inside = [folder / name for name in ("model", "last/model", "checkpoints/last/model") if (folder / name / CONFIG).is_file()]
        hint = f". Did you mean {inside[0]}?" if inside else ""
        reason = f"is no saved model: it has no {CONFIG}" if folder.is_dir() else "does not exist"
        raise FileError(f"{folder} {reason}{hint}") from error
    except OSError as error:
        raise FileError(f"{folder / CONFIG} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{folder / CONFIG} is truncated or corrupt: {error}. {_REMEDY}") from error
    if not isinstance(content, dict):
        raise FileError(f"{folder / CONFIG} was not written by irlvla: it holds a {type(content).__name__}")
    return content


def _first(error: pydantic.ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_whole(file: Path, weights: Weights) -> None:
    try:
        size = file.stat().st_size
        if size != weights.bytes:
            raise FileError(f"{file} is not whole: it has {size} bytes, and was saved with {weights.bytes}. {_REMEDY}")
        if sha256(file) != weights.sha256:
            raise FileError(f"{file} is corrupt: its content does not match its checksum. {_REMEDY}")
    except FileNotFoundError as error:
        raise FileError(f"{file} does not exist. {_REMEDY}") from error


# -- of plugins --------------------------------------------------------------------------------------------------------


def _require_plugin(source: str, name: str, version: str) -> None:
    found = [plugin for plugin in installed().plugins if plugin.name == name]
    working = [plugin for plugin in found if not plugin.problem]
    one_file = version.startswith("sha256:")
    if found and not working:
        raise PluginError(f"{source} needs {found[0]}, which is set aside: {found[0].problem}")
    if not found and one_file:
        how = f"on the command line --plugin {name}, in Python irlvla.registry.installed().add_file({name!r})"
        raise PluginError(f"{source} needs the one-file plugin {name}, which is not loaded. Get it from its author, then: {how}")
    if not found:
        raise PluginError(f"{source} needs {name} {version}, which is not installed. Try: pip install {name}=={version}")
    if one_file and _requirement(working[0])[1] != version:
        warnings.warn(f"{source} was saved with another {name} than {working[0].module}", stacklevel=2)
    elif not one_file and _older(working[0].version, version):
        remedy = f"If it misbehaves: pip install --upgrade {name}"
        warnings.warn(f"{source} was saved with {name} {version}, and {working[0].version} is installed. {remedy}", stacklevel=2)


def _older(version: str, other: str) -> bool:
    try:
        return Version(version) < Version(other)
    except InvalidVersion:
        return False
