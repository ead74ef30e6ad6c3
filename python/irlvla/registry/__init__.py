"""The components that there are, by kind and name, and how one is built from its name and settings.

A plugin that cannot be used (it does not import, was built for another version, misspells a hook, ...) is set aside whole:
`irlvla plugins` lists it with the reason, and who asks for a name that is missing hears of it.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pluggy
import pydantic

from irlvla.components import KINDS, Backbone, Component, Config, Planner, Policy, Reasoner
from irlvla.errors import ConfigError, ContractError, IrlvlaError, PluginError, collecting, did_you_mean, raise_all
from irlvla.registry import discovery
from irlvla.registry.discovery import BUILT_IN, Entry, Plugin
from irlvla.registry.explanation import explain, kind_of, nameless, names_one

__all__ = ["BUILT_IN", "Entry", "Plugin", "Registry", "build", "installed", "kind_of"]


@dataclass
class Registry:
    """The plugins that were found and the components that they provide. Get the one of this process from `installed()`."""

    plugins: list[Plugin] = field(default_factory=list)
    manager: pluggy.PluginManager = field(default_factory=discovery.manager)
    entries: dict[str, dict[str, list[Entry]]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    # -- plugins -----------------------------------------------------------------------------------------------------
    def add(self, plugin: Plugin, load: Callable[[], object]) -> Plugin:
        """Load and register a plugin, or set it aside with its problem. Returns it as it is listed then."""
        try:
            self._register(plugin, load)
        except PluginError as error:
            plugin = replace(plugin, problem=str(error))
        self.plugins.append(plugin)
        return plugin

    def add_file(self, path: str | os.PathLike[str]) -> Plugin:
        """Register one Python file as a plugin, as `--plugin` does. Raises `PluginError` if it cannot be used."""
        path = Path(path).expanduser().resolve()
        for plugin in self.plugins:
            if plugin.module == str(path):
                return plugin
        if not path.is_file() or path.suffix != ".py":
            near = did_you_mean(path.name, [file.name for file in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
            raise PluginError(f"a plugin must be a Python file (.py), and {path} is none. {near}".rstrip())
        plugin = Plugin(path.name, "", str(path))
        try:
            self._register(plugin, functools.partial(discovery.import_file, path))
        except PluginError as error:
            raise PluginError(f"the plugin {path.name} cannot be used: {error}") from error
        self.plugins.append(plugin)
        return plugin

    def _register(self, plugin: Plugin, load: Callable[[], object]) -> None:
        """Register a plugin whole, or not at all and raise `PluginError`."""
        try:
            module = load()
            if self.manager.is_registered(module):
                raise ContractError(f"{plugin.module} is a plugin already")
            entries = discovery.entries(plugin, module)
            for entry in entries:
                for other in self.entries[entry.kind].get(entry.name, ()):
                    if other.plugin.name == BUILT_IN:
                        raise ContractError(f"it provides the {entry.kind} {entry.name!r}, a name of irlvla itself; use another name")
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(plugin.blame(error)) from error
        self.manager.register(module, name=f"{plugin.name}:{plugin.module}")
        for entry in entries:
            self.entries[entry.kind].setdefault(entry.name, []).append(entry)

    # -- names -------------------------------------------------------------------------------------------------------
    def names(self, kind: str) -> list[str]:
        """Names of a kind, sorted."""
        if kind not in KINDS:
            raise PluginError(f"no kind {kind!r}. {did_you_mean(kind, KINDS)}Kinds: {', '.join(KINDS)}")
        return sorted(self.entries[kind])

    def find(self, kind: str, name: str) -> Entry:
        """The component of that name. Raises `PluginError` if there is none, or more than one."""
        names = self.names(kind)
        found = self.entries[kind].get(name, [])
        if len(found) == 1:
            return found[0]
        if found:
            raise PluginError(_collision(found))
        elsewhere = [entry for entry in self if entry.name == name]
        near = f"There is {elsewhere[0]}. " if elsewhere else did_you_mean(name, names)
        aside = "".join(f"\nNot usable: {plugin} ({plugin.module}): {plugin.problem}" for plugin in self.plugins if plugin.problem)
        raise PluginError(f"no {kind} named {name!r}. {near}Installed: {', '.join(names) or 'none'}.{aside}")

    def __iter__(self) -> Iterator[Entry]:
        """Every component, by kind and name."""
        for kind in KINDS:
            for name in self.names(kind):
                yield from self.entries[kind][name]

    def entry_of(self, component: Component) -> Entry:
        """The entry that a component was built from. Raises `PluginError` if it was not built by its name."""
        for entry in self:
            if entry.kind == component.kind and component.label == str(entry):
                return entry
        raise PluginError(
            f"{component} was not built by its name, so it cannot be found again: return its class from the hook "
            f"irlvla_{component.kind}s, and build it with irlvla.build({component.kind!r}, NAME)"
        )

    # -- building ----------------------------------------------------------------------------------------------------
    def build(self, kind: str, spec: Any, **runtime: Any) -> Any:
        """Build a component from "name" or {"name": ..., **settings}, with the live objects that its kind is built with.

        Raises:
            PluginError: no such component, or it cannot be used.
            ConfigError: it rejects its settings.
            ContractError: it is not what its kind demands.
        """
        entry, config = self._choose(kind, spec, kind)
        if shadowed := sorted(runtime.keys() & type(config).model_fields.keys()):
            raise ContractError(
                f"{entry}: its Config must not have a field {shadowed[0]!r}, which it is given when it is built. {entry.plugin.remedy}"
            )
        target: Any = entry.load()
        try:
            inspect.signature(target).bind(config, **runtime)
        except TypeError as error:
            call = ", ".join(["config", *(f"{name}={value!r:.20}" for name, value in runtime.items())])
            rule = f"For how a {kind} is built: help(irlvla.{KINDS[kind].__name__})"
            raise ContractError(f"{entry} cannot be built as {target.__name__}({call}): {error}. {rule}") from None
        forgetful = f"{entry} does not keep its config: its __init__ must begin with super().__init__(config). {entry.plugin.remedy}"
        try:
            component = target(config, **runtime)
        except Exception as error:
            if isinstance(error, AttributeError) and "before Module.__init__() call" in str(error):
                raise ContractError(forgetful) from error
            error.add_note(f"while building {entry}")
            raise
        if getattr(component, "built_with", None) is not config:
            raise ContractError(forgetful)
        component.label, component.runtime = str(entry), runtime
        return component

    def build_policy(self, backbone: Any, planner: Any, reasoner: Any = None) -> Policy:
        """Build a policy from the specs of its parts; the backbone sets the width of the others."""
        sees: Backbone = self.build("backbone", backbone)
        if not isinstance(getattr(sees, "width", None), int):
            raise ContractError(f"{sees} has no width: its __init__ must set self.width, the width of its tokens, to an int")
        drives: Planner = self.build("planner", planner, width=sees.width)
        thinks: Reasoner | None = None if reasoner is None else self.build("reasoner", reasoner, width=sees.width)
        return Policy(sees, drives, thinks)

    # -- settings ----------------------------------------------------------------------------------------------------
    def configure(self, kind: str, spec: Any, where: str = "") -> dict[str, Any]:
        """A spec with every setting filled in and checked: {"name": ..., **settings}.

        Raises:
            PluginError: no such component, or it cannot be used.
            ConfigError: it rejects its settings.
            ContractError: it is not what its kind demands.
        """
        entry, config = self._choose(kind, spec, where or kind)
        return {"name": entry.name, **config.model_dump(mode="json")}

    def validate(self, schema: type[Config], settings: Mapping[str, Any], where: str = "", owner: str = "") -> Config:
        """An instance of a schema from plain data, with the settings of the components that it chooses checked and filled in.

        Args:
            where: path of the settings, for messages: "planner".
            owner: whose settings they are, for messages: "planner 'spline' (irlvla-acme 0.3.1)".

        Raises:
            ConfigError: every wrong field, what it accepts, and the nearest name.
            PluginError: it chooses a component that is not there or cannot be used.
            ContractError: it chooses a component that is not what its kind demands.
        """
        errors: list[IrlvlaError] = []
        config = None
        try:
            config = schema.model_validate(dict(settings))
        except pydantic.ValidationError as error:
            errors += explain(schema, settings, error, self.names, where, owner)
        with collecting(errors):
            filled = self._fill_fields(schema, settings if config is None else dict(config), where)
        raise_all(errors)
        assert config is not None
        return config.model_copy(update=filled)

    def _choose(self, kind: str, spec: Any, where: str) -> tuple[Entry, Config]:
        """The component that a spec names, and its settings."""
        if not names_one(spec):
            raise ConfigError(nameless(where, spec, self.names(kind)))
        if isinstance(spec, str):
            spec = {"name": spec}
        try:
            entry = self.find(kind, spec["name"])
            schema = entry.load().Config
        except (PluginError, ContractError) as error:
            raise error if where == kind else type(error)(f"{where}: {error}") from error
        settings = {name: value for name, value in spec.items() if name != "name"}
        return entry, self.validate(schema, settings, where, str(entry))

    def _fill_fields(self, schema: type[Config], data: Mapping[str, Any], where: str) -> dict[str, Any]:
        kinds = {name: kind_of(info) for name, info in schema.model_fields.items()}
        return self._fill_all([(name, kind, data[name]) for name, kind in kinds.items() if name in data], where)

    def _fill_all(self, items: Iterable[tuple[Any, str | None, Any]], where: str) -> dict[Any, Any]:
        filled, errors = {}, list[IrlvlaError]()
        for key, kind, value in items:
            with collecting(errors):
                filled[key] = self._fill(kind, value, f"{where}.{key}" if where else str(key))
        raise_all(errors)
        return filled

    def _fill(self, kind: str | None, value: Any, where: str) -> Any:
        """A value, with the settings of the components that it chooses, however deep, checked and filled in."""
        if type(value) in (list, tuple):
            return type(value)(self._fill_all([(i, kind, item) for i, item in enumerate(value)], where).values())
        if isinstance(value, Config):
            return value.model_copy(update=self._fill_fields(type(value), dict(value), where))
        if kind and names_one(value):
            return self.configure(kind, value, where)
        if isinstance(value, dict):
            return self._fill_all([(key, kind, item) for key, item in value.items()], where)
        return value


# -- the registry of this process --------------------------------------------------------------------------------------


@functools.cache
def installed() -> Registry:
    """The plugins of this process; found on the first call. Raises `PluginError` if a variable names one that is not there."""
    registry = Registry()
    for plugin, load in discovery.installed_plugins():
        registry.add(plugin, load)
    return registry


def build(kind: str, spec: Any, **runtime: Any) -> Any:
    """Build a component: `irlvla.build("planner", {"name": "acme_spline", "knots": 4}, width=64)`. See `Registry.build`."""
    return installed().build(kind, spec, **runtime)


def _collision(found: list[Entry]) -> str:
    entry, *others = found
    owners = sorted({str(other.plugin) for other in found})
    if len(owners) == 1:
        return f"{entry} is provided twice; its author must rename one"
    files = [other.plugin.name for other in others if not other.plugin.version]
    remedy = f"Rename it in {files[0]}" if files else f"Block one, for example IRLVLA_BLOCK={others[-1].plugin.name}, or uninstall it"
    return f"{entry.kind} {entry.name!r} is provided by both {' and '.join(owners)}. {remedy}"
