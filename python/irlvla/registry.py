"""Which plugins there are, what they provide, and how a component is built from its name and settings.

Plugins are found by the entry-point group `irlvla`. Discovery is our own: pluggy's lets one broken plugin take the program
down and drops the second of two equal names. Here a plugin that cannot be used (it does not import, was built for another
version, misspells a hook, ...) is set aside whole with the reason, `irlvla plugins` lists it, and who asks for a name
that is missing hears of it.

    IRLVLA_PLUGINS=a,b   load only these plugins (the built-in one always)
    IRLVLA_BLOCK=a,b     load all but these
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pydantic
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import irlvla
from irlvla import hooks
from irlvla.components import KINDS, Backbone, Component, Config, Planner, Policy, Reasoner
from irlvla.errors import ConfigError, ContractError, PluginError, did_you_mean

BUILT_IN = "irlvla"  #: the distribution whose plugin cannot be blocked


@dataclass(frozen=True)
class Plugin:
    """Where a plugin comes from. `problem` says why it is set aside, and what to do; "" = it works."""

    name: str  # of its distribution, or of its file
    version: str
    module: str  # what its entry point names, or the path of its file
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()


@dataclass(frozen=True)
class Entry:
    """A component that a plugin provides."""

    kind: str
    name: str
    target: type | str  # a class, or "module:Class"
    plugin: Plugin

    def __str__(self) -> str:
        return f"{self.kind} {self.name!r} ({self.plugin})"

    def load(self) -> type[Component]:
        """The class. Raises `PluginError` if it cannot be imported, `ContractError` if it is not of its kind."""
        target: Any = self.target
        if isinstance(target, str):
            module, _, name = target.partition(":")
            try:
                target = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            except (Exception, SystemExit) as error:
                raise PluginError(
                    f"{self} cannot be imported from {self.target!r}: {_reason(error)}. {_remedy(error, self.plugin)}"
                ) from error
        contract = KINDS[self.kind]
        if not (isinstance(target, type) and issubclass(target, contract)):
            raise ContractError(
                f"{self} is {target!r}; a {self.kind} must derive from irlvla.{contract.__name__}. {_remedy(None, self.plugin)}"
            )
        return target


@dataclass
class Registry:
    """The plugins that were found and the components that they provide. Get the one of this process from `installed()`."""

    plugins: list[Plugin] = field(default_factory=list)
    manager: pluggy.PluginManager = field(default_factory=lambda: _manager())
    entries: dict[str, dict[str, list[Entry]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    # -- discovery ---------------------------------------------------------------------------------------------------
    def add(self, plugin: Plugin, load: Callable[[], object]) -> Plugin:
        """Load and register a plugin, or set it aside with its problem. Returns it as it is listed then."""
        try:
            module = load()
            entries = _entries(plugin, module)
            self.manager.register(module, name=f"{plugin.name}:{plugin.module}")
            for entry in entries:
                self.entries[entry.kind].setdefault(entry.name, []).append(entry)
        except (Exception, SystemExit) as error:
            problem = str(error) if isinstance(error, PluginError) else f"{_reason(error)}. {_remedy(error, plugin)}"
            plugin = Plugin(plugin.name, plugin.version, plugin.module, problem)
        self.plugins.append(plugin)
        return plugin

    def add_file(self, path: str | os.PathLike[str]) -> Plugin:
        """Register one Python file as a plugin, as `--plugin` does. Raises `PluginError` if it cannot be used."""
        path = Path(path).resolve()
        for plugin in self.plugins:
            if plugin.module == str(path):
                return plugin
        if not path.is_file() or path.suffix != ".py":
            near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
            raise PluginError(f"--plugin needs a Python file, and {path} is none. {near}".rstrip())
        plugin = self.add(Plugin(path.name, "", str(path)), functools.partial(_import_file, path))
        if plugin.problem:
            raise PluginError(f"the plugin {path} cannot be used: {plugin.problem}")
        return plugin

    # -- names -------------------------------------------------------------------------------------------------------
    def names(self, kind: str) -> list[str]:
        """Names of a kind, sorted."""
        return sorted(self.entries[_kind(kind)])

    def find(self, kind: str, name: str) -> Entry:
        """The component of that name. Raises `PluginError` if there is none, or more than one."""
        found = self.entries[_kind(kind)].get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            owners = sorted({str(entry.plugin) for entry in found})
            block = next((entry.plugin.name for entry in found if entry.plugin.name != BUILT_IN), "")
            raise PluginError(
                f"{kind} {name!r} is provided by both {' and '.join(owners)}; uninstall one, or block it with IRLVLA_BLOCK={block}"
                if len(owners) > 1
                else f"{kind} {name!r} is provided twice by {owners[0]}; its author must rename one"
            )
        elsewhere = [other for other in KINDS if name in self.entries[other]]
        raise PluginError(
            f"no {kind} named {name!r}. "
            + (f"There is a {elsewhere[0]} of that name. " if elsewhere else did_you_mean(name, self.names(kind)))
            + f"Installed: {', '.join(self.names(kind)) or 'none'}."
            + "".join(f"\nNot usable: {plugin}: {plugin.problem}" for plugin in self.plugins if plugin.problem)
        )

    def __iter__(self) -> Iterator[Entry]:
        """Every component, by kind and name."""
        for kind in KINDS:
            for name in self.names(kind):
                yield from self.entries[kind][name]

    def entry_of(self, component: Component) -> Entry:
        """The entry that a component was built from. Raises `PluginError` if no plugin provides its class."""
        for entry in self:
            if entry.kind == component.kind and component.label == str(entry):
                return entry
        raise PluginError(
            f"{type(component).__qualname__} is provided by no plugin, so it cannot be found again by name: "
            f"return it from the hook irlvla_{component.kind}s and build it with irlvla.build({component.kind!r}, name)"
        )

    # -- building ----------------------------------------------------------------------------------------------------
    def configure(self, kind: str, spec: Any, where: str = "") -> dict[str, Any]:
        """A spec with every setting filled in and checked: {"name": ..., **settings}.

        Raises:
            PluginError: no such component, or it cannot be used.
            ConfigError: it rejects its settings.
        """
        entry, config = self._config(kind, spec, where)
        return {"name": entry.name, **config.model_dump(mode="json")}

    def build(self, kind: str, spec: Any, **runtime: Any) -> Any:
        """Build a component from "name" or {"name": ..., **settings}, with the live objects that its kind is built with.

        Raises:
            PluginError: no such component, or it cannot be used.
            ConfigError: it rejects its settings.
            ContractError: it is not what its kind demands.
        """
        entry, config = self._config(kind, spec)
        if shadowed := sorted(runtime.keys() & type(config).model_fields.keys()):
            raise ContractError(f"{entry}: its Config must not have a field {shadowed[0]!r}: that is given to every {kind} at run time")
        target = entry.load()
        try:
            component = target(config, **runtime)
        except TypeError as error:
            raise ContractError(f"{entry} cannot be built: {error}. It is built as {target.__name__}(config{_given(runtime)})") from error
        except Exception as error:
            error.add_note(f"while building {entry}")
            raise
        if getattr(component, "config", None) is not config:
            raise ContractError(f"{entry} does not keep its config: its __init__ must call super().__init__(config)")
        component.label = str(entry)
        return component

    def build_policy(self, backbone: Any, planner: Any, reasoner: Any = None) -> Policy:
        """Build a policy from the specs of its parts; the backbone sets the width of the others."""
        sees: Backbone = self.build("backbone", backbone)
        if not isinstance(getattr(sees, "width", None), int):
            raise ContractError(f"{sees} has no width: a backbone must tell the width of its tokens as an int")
        drives: Planner = self.build("planner", planner, width=sees.width)
        thinks: Reasoner | None = None if reasoner is None else self.build("reasoner", reasoner, width=sees.width)
        return Policy(sees, drives, thinks)

    def _config(self, kind: str, spec: Any, where: str = "") -> tuple[Entry, Config]:
        where = where or kind
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ConfigError(
                f"{where}: name a {kind} (one of {', '.join(self.names(kind)) or 'none'}), or give name: and settings; got {spec!r}"
            )
        entry = self.find(kind, spec["name"])
        settings = {name: value for name, value in spec.items() if name != "name"}
        return entry, self.validate(entry.load().Config, settings, where, str(entry))

    def validate(self, schema: type[Config], settings: Mapping[str, Any], where: str = "", owner: str = "") -> Config:
        """An instance of a schema from plain data, with the settings of the components that it chooses checked too.

        Args:
            where: path of the settings, for messages: "planner".
            owner: whose settings they are, for messages.

        Raises:
            ConfigError: listing every wrong field, what it accepts, and the nearest name.
        """
        try:
            config = schema.model_validate(dict(settings))
        except pydantic.ValidationError as error:
            lines = [_explain(schema, problem, where) for problem in error.errors()]
            raise ConfigError("\n  ".join([f"{owner or schema.__qualname__} rejects its settings:", *lines])) from None
        chosen = {}
        for name, info in schema.model_fields.items():
            value, kind = getattr(config, name), kind_of(info)
            if kind and value is not None:
                path = f"{where}.{name}" if where else name
                many = isinstance(value, list | tuple)
                filled = [self.configure(kind, spec, path) for spec in (value if many else [value])]
                chosen[name] = filled if many else filled[0]
        return config.model_copy(update=chosen)


def kind_of(info: pydantic.fields.FieldInfo) -> str | None:
    """The kind of component that a field chooses; None for an ordinary field."""
    extra = info.json_schema_extra
    return extra.get("kind") if isinstance(extra, dict) else None  # type: ignore[return-value]


# -- the registry of this process --------------------------------------------------------------------------------------


@functools.cache
def installed() -> Registry:
    """The plugins of this process; found on the first call. Raises `PluginError` if a variable names one that is not there."""
    found, points = Registry(), list(_entry_points())
    known = {name for plugin, point, _ in points for name in _aliases(plugin, point)}
    only, blocked = _listed("IRLVLA_PLUGINS", known), _listed("IRLVLA_BLOCK", known)
    for plugin, point, needs in points:
        aliases = _aliases(plugin, point)
        if (only is None or plugin.name == BUILT_IN or aliases & only) and not aliases & (blocked or set()):
            found.add(plugin, functools.partial(_import_point, plugin, point, needs))
    return found


def build(kind: str, spec: Any, **runtime: Any) -> Any:
    """Build a component: `irlvla.build("planner", {"name": "acme_spline", "knots": 4}, width=64)`. See `Registry.build`."""
    return installed().build(kind, spec, **runtime)


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    return manager


def _entry_points() -> Iterator[tuple[Plugin, metadata.EntryPoint, list[str]]]:
    """Plugin, entry point and requirements, the built-in plugin first and the others by name."""
    found, seen = [], set()
    for distribution in metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if name in seen:
            continue  # the same distribution again, further down sys.path: what Python would not import
        seen.add(name)
        for point in distribution.entry_points.select(group=hooks.PROJECT):
            title = point.name if name == BUILT_IN else name  # the built-in parts can be blocked one by one
            found.append((Plugin(title, distribution.version, point.value), point, distribution.requires or []))
    if not any(plugin.name == BUILT_IN for plugin, _, _ in found):
        raise PluginError("irlvla is imported but not installed, so its plugins cannot be found: in the source folder, make develop")
    return iter(sorted(found, key=lambda item: (item[0].name != BUILT_IN, item[0].name, item[1].name)))


def _aliases(plugin: Plugin, point: metadata.EntryPoint) -> set[str]:
    """Names by which a plugin may be listed in a variable: its distribution's, with and without the prefix, and its entry point's."""
    return {plugin.name, plugin.name.removeprefix("irlvla-"), canonicalize_name(point.name)}


def _listed(variable: str, known: set[str]) -> set[str] | None:
    """The plugins that a variable names; None = it is not set."""
    if variable not in os.environ:
        return None
    names: set[str] = {canonicalize_name(name) for name in re.split(r"[,\s]+", os.environ[variable]) if name}
    for name in sorted(names - known):
        raise PluginError(
            f"{variable} names {name!r}, which is not installed. {did_you_mean(name, known)}Installed: {', '.join(sorted(known))}"
        )
    return names


def _import_point(plugin: Plugin, point: metadata.EntryPoint, needs: Iterable[str]) -> object:
    """Import a plugin, unless it says that it is for another version."""
    for requirement in map(Requirement, needs):
        if canonicalize_name(requirement.name) == BUILT_IN and not requirement.specifier.contains(irlvla.__version__, prereleases=True):
            newer = any(
                spec.operator in ("<", "<=", "==", "~=") and Version(spec.version.rstrip(".*")) < Version(irlvla.__version__)
                for spec in requirement.specifier
            )
            remedy = f"pip install --upgrade {plugin.name}" if newer else "pip install --upgrade irlvla"
            raise PluginError(f"it needs irlvla{requirement.specifier}, and this is irlvla {irlvla.__version__}. Try: {remedy}")
    return point.load()


def _import_file(path: Path) -> ModuleType:
    name = f"irlvla_plugin_{re.sub(r'[^0-9a-zA-Z]', '_', path.stem)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # there, so that its classes pickle for workers
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _entries(plugin: Plugin, module: object) -> list[Entry]:
    """What a plugin provides. Raises `PluginError` if anything about its hooks is wrong; nothing is registered yet."""
    if module is None:
        raise PluginError(f"{plugin.module!r} is None. {_remedy(None, plugin)}")
    known = [name for name, _ in inspect.getmembers(hooks, inspect.isfunction) if name.startswith("irlvla_")]
    for name, function in inspect.getmembers(module, inspect.isroutine):
        marked = getattr(function, "irlvla_impl", None) is not None
        if name.startswith("irlvla_") and not marked and (getattr(function, "__module__", None) == getattr(module, "__name__", "")):
            raise PluginError(f"{name} lacks its mark: write @irlvla.hookimpl above it. {_remedy(None, plugin)}")
        if marked and name not in known:
            raise PluginError(f"there is no hook {name!r}. {did_you_mean(name, known)}Hooks: {', '.join(known)}. {_remedy(None, plugin)}")
    trial = _manager()
    try:
        trial.register(module, name=plugin.name)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{_one_line(str(error))}. {_remedy(None, plugin)}") from error
    entries = []
    for kind in KINDS:
        for implementation in getattr(trial.hook, f"irlvla_{kind}s").get_hookimpls():
            provided = implementation.function()
            if not isinstance(provided, Mapping):
                raise PluginError(f"irlvla_{kind}s must return a mapping of names to classes, not {provided!r}. {_remedy(None, plugin)}")
            entries += [_entry(kind, name, target, plugin) for name, target in provided.items()]
    return entries


def _entry(kind: str, name: object, target: object, plugin: Plugin) -> Entry:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise PluginError(f"irlvla_{kind}s returns the name {name!r}; use letters, digits, _ and -. {_remedy(None, plugin)}")
    if not isinstance(target, type) and not (isinstance(target, str) and re.fullmatch(r"[\w.]+:[\w.]+", target)):
        raise PluginError(f"irlvla_{kind}s returns {target!r} for {name!r}; it must be a class or 'module:Class'. {_remedy(None, plugin)}")
    return Entry(kind, name, target, plugin)


# -- messages ----------------------------------------------------------------------------------------------------------


def _kind(kind: str) -> str:
    if kind not in KINDS:
        raise PluginError(f"no kind {kind!r}. {did_you_mean(kind, KINDS)}Kinds: {', '.join(KINDS)}")
    return kind


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_one_line(str(error)) or 'without a message'}"


def _one_line(text: str) -> str:
    return re.sub(r"\s*\n\s*", "; ", text.strip()).rstrip(".")


def _remedy(error: BaseException | None, plugin: Plugin) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name and plugin.version:
        return f"Try: pip install {error.name.partition('.')[0]}, or without this plugin: IRLVLA_BLOCK={plugin.name}"
    if not plugin.version:
        return f"Mend {plugin.module}"
    return f"Tell its author, or do without it: IRLVLA_BLOCK={plugin.name}"


def _given(runtime: Mapping[str, Any]) -> str:
    return "".join(f", {name}={value!r}" if isinstance(value, int) else f", {name}=..." for name, value in runtime.items())


def _explain(schema: type[Config], problem: Any, where: str) -> str:
    """One problem that pydantic found, in our words."""
    *outer, last = [where, *map(str, problem["loc"])] if where else [*map(str, problem["loc"])] or [""]
    path = ".".join(filter(None, [*outer, last]))
    inner = schema
    for step in problem["loc"][:-1]:
        annotation = inner.model_fields[step].annotation if step in inner.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, Config)):
            break
        inner = annotation
    if problem["type"] == "extra_forbidden":
        accepted = ", ".join(inner.model_fields) or "none, it has no settings"
        return f"{path}: there is no such field. {did_you_mean(last, inner.model_fields)}Accepted: {accepted}"
    info = inner.model_fields.get(last)
    expected = f" ({info.description})" if info is not None and info.description else ""
    if problem["type"] == "missing":
        return f"{path}: needs a value{expected}; write {path}=..."
    message = problem["msg"].removeprefix("Value error, ")
    return f"{path}: {message[:1].lower()}{message[1:]}, got {problem['input']!r}{expected}"
