"""Where plugins come from and what they declare: installed packages, by the entry-point group `irlvla`, and single files.

Discovery is our own: pluggy's lets one broken plugin take the program down, and drops the second of two equal names.

    IRLVLA_PLUGINS=a,b   load only these plugins, and the built-in ones
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pluggy
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import irlvla
from irlvla import hooks
from irlvla.components import KINDS, Component
from irlvla.errors import ContractError, IrlvlaError, PluginError, did_you_mean

BUILT_IN = "irlvla"  #: the distribution whose plugins are the built-in ones


@dataclass(frozen=True)
class Plugin:
    """Where components come from. `problem` says why a plugin is set aside, and what to do; "" = it works."""

    name: str  # of its distribution, or of its file
    version: str  # "" = a file
    module: str  # what its entry point names, or the path of its file
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.version}".rstrip()

    @property
    def remedy(self) -> str:
        """What to do about a mistake in it."""
        return f"Try: pip install --upgrade {self.name}, or tell its author" if self.version else f"Mend {self.module}"

    def blame(self, error: BaseException) -> str:
        """What went wrong with it, in one line, and what to do."""
        cause = re.sub(r"\s*\n\s*", "; ", str(error).strip())
        if not isinstance(error, IrlvlaError):
            cause = f"{type(error).__name__}: {cause}".rstrip(": ")
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        own = re.split("[.:]", self.module)[0]
        remedy = f"Try: pip install {missing}" if missing not in ("", own) else self.remedy
        cause = " ".join([cause, *getattr(error, "__notes__", ())])
        return f"{cause}{'' if cause.endswith('.') else '.'} {remedy}"


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
        """The class.

        Raises:
            PluginError: it cannot be imported.
            ContractError: it is not what its kind demands.
        """
        target: Any = self.target
        if isinstance(target, str):
            module, _, name = target.partition(":")
            try:
                target = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            except (Exception, SystemExit) as error:
                raise PluginError(f"{self} cannot be imported from {self.target}: {self.plugin.blame(error)}") from error
        contract = KINDS[self.kind]
        if not (isinstance(target, type) and issubclass(target, contract)):
            raise ContractError(f"{self} is {target!r}, which does not derive from irlvla.{contract.__name__}. {self.plugin.remedy}")
        if missing := sorted(getattr(target, "__abstractmethods__", ())):
            raise ContractError(f"{self} lacks the method {missing[0]}(), see irlvla.{contract.__name__}. {self.plugin.remedy}")
        if "name" in target.Config.model_fields:
            raise ContractError(f"{self}: its Config must not have a field 'name', which names the component. {self.plugin.remedy}")
        return target


# -- installed packages ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidate:
    plugin: Plugin
    load: Callable[[], object]
    aliases: frozenset[str]  # names by which a variable may list it
    built_in: bool = False


def installed_plugins() -> Iterator[tuple[Plugin, Callable[[], object]]]:
    """Every installed plugin and how to load it, the built-in ones first. Loading raises if it cannot or must not be used.

    Raises:
        PluginError: irlvla itself is not installed, or a variable names a plugin that is not there.
    """
    found = sorted(_candidates(), key=lambda one: (not one.built_in, one.plugin.name, one.plugin.module))
    if not any(one.built_in for one in found):
        raise PluginError("irlvla is imported but not installed, so its plugins cannot be found. In the source folder: make develop")
    only, blocked = _listed("IRLVLA_PLUGINS", found), _listed("IRLVLA_BLOCK", found) or set()
    for one in found:
        if one.aliases & blocked:
            yield one.plugin, functools.partial(_refuse, "it is blocked by IRLVLA_BLOCK")
        elif only is not None and not one.built_in and not one.aliases & only:
            yield one.plugin, functools.partial(_refuse, "it is not among IRLVLA_PLUGINS")
        else:
            yield one.plugin, one.load


def _candidates() -> Iterator[_Candidate]:
    seen = set()
    for distribution in metadata.distributions():
        points = _entry_points(distribution)
        if points == []:
            continue
        try:
            about = distribution.metadata
            name, version = canonicalize_name(about["Name"]), str(about["Version"])
        except Exception:  # the remains of a package
            continue
        if name in seen:
            continue  # the same package again, further down sys.path: not what Python would import
        seen.add(name)
        aliases = frozenset({name, name.removeprefix("irlvla-")})
        if points is None:
            reason = f"its entry points cannot be read. Try: pip install --force-reinstall {name}"
            yield _Candidate(Plugin(name, version, "entry_points.txt"), functools.partial(_refuse, reason), aliases)
            continue
        for point in points:
            plugin, alias = Plugin(name, version, point.value), canonicalize_name(point.name)
            if name == BUILT_IN:  # its plugins can be blocked one by one, by their entry points
                yield _Candidate(plugin, point.load, frozenset({alias}), built_in=True)
            else:
                yield _Candidate(plugin, functools.partial(_import_point, plugin, point), aliases | {alias})


def _entry_points(distribution: metadata.Distribution) -> list[metadata.EntryPoint] | None:
    """Those of our group; None if they cannot be read, so that whether it is a plugin cannot be known."""
    try:
        return list(distribution.entry_points.select(group=hooks.PROJECT))
    except Exception:
        return None


def _listed(variable: str, found: list[_Candidate]) -> set[str] | None:
    """The plugins that a variable names; None = it is not set."""
    if variable not in os.environ:
        return None
    accepted = {alias for one in found for alias in one.aliases}
    names: set[str] = {canonicalize_name(name) for name in re.split(r"[,\s]+", os.environ[variable]) if name}
    for name in sorted(names - accepted):
        listed = ", ".join(sorted(accepted))
        raise PluginError(f"{variable} names {name!r}, which is not installed. {did_you_mean(name, accepted)}Accepted: {listed}")
    if variable == "IRLVLA_BLOCK" and BUILT_IN in names:
        raise PluginError("IRLVLA_BLOCK names 'irlvla', which is the program itself and cannot be blocked")
    return names


def _refuse(reason: str) -> object:
    raise PluginError(reason)


def _import_point(plugin: Plugin, point: metadata.EntryPoint) -> object:
    """Import a plugin, unless it says that it is for another version."""
    for text in (point.dist and point.dist.requires) or []:
        need = Requirement(text)
        if canonicalize_name(need.name) != BUILT_IN or (need.marker and not need.marker.evaluate({"extra": ""})):
            continue
        if not need.specifier.contains(irlvla.__version__, prereleases=True):
            raise PluginError(
                f"it needs irlvla{need.specifier}, and this is irlvla {irlvla.__version__}. Try: pip install --upgrade irlvla {plugin.name}"
            )
    return point.load()


# -- single files ------------------------------------------------------------------------------------------------------


def import_file(path: Path) -> object:
    """Import a file by its name, with its folder at the end of `sys.path`.

    So it may import its neighbours, and its classes pickle for workers, however these are started. Raises `PluginError` if
    its name is no module's, or another module's.
    """
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    found = None if "." in path.stem else importlib.util.find_spec(path.stem)
    if found is None:
        raise PluginError(f"{path.stem!r} is no name for a Python module. Rename the file")
    if not found.origin or not os.path.exists(found.origin) or not os.path.samefile(found.origin, path):
        raise PluginError(f"{path.stem!r} is the name of another module ({found.origin}). Rename the file")
    return importlib.import_module(path.stem)


# -- what a plugin declares --------------------------------------------------------------------------------------------

_ARGUMENTS = {
    name: list(inspect.signature(function).parameters)
    for name, function in inspect.getmembers(hooks, lambda member: hasattr(member, "irlvla_spec"))
}


def manager() -> pluggy.PluginManager:
    """A plugin manager that knows the hooks."""
    made = pluggy.PluginManager(hooks.PROJECT)
    made.add_hookspecs(hooks)
    return made


def entries(plugin: Plugin, module: object) -> list[Entry]:
    """The components that a plugin provides.

    Raises:
        ContractError: anything about its hooks is wrong.
        Exception: whatever a hook raises.
    """
    for name, _ in inspect.getmembers(module, lambda member: inspect.isroutine(member) and not hasattr(member, "irlvla_impl")):
        if name.startswith("irlvla_"):  # pluggy would pass it over
            raise ContractError(f"{name} lacks its mark: write @irlvla.hookimpl above it" if name in _ARGUMENTS else _no_hook(name))
    trial = pluggy.PluginManager(hooks.PROJECT)  # knows no hook, so that it takes any
    trial.register(module)
    implemented = trial.get_hookcallers(module)
    if not implemented:
        raise ContractError(f"{plugin.module} implements no hook; mark its hooks with @irlvla.hookimpl")
    for hook in implemented:
        _check(hook)
    made = manager()
    made.register(module)  # raises what else may be wrong
    found: list[Entry] = []
    for kind in KINDS:
        for implementation in getattr(made.hook, f"irlvla_{kind}s").get_hookimpls():
            found += _provided(kind, implementation.function, plugin)
    return found


def _check(hook: pluggy.HookCaller) -> None:
    if hook.name not in _ARGUMENTS:
        raise ContractError(_no_hook(hook.name))
    known = _ARGUMENTS[hook.name]
    for implementation in hook.get_hookimpls():
        for argument in implementation.argnames:
            if argument not in known:
                accepted = f"Arguments: {', '.join(known)}" if known else "It gets none"
                raise ContractError(f"{hook.name} gets no argument {argument!r}. {did_you_mean(argument, known)}{accepted}")


def _no_hook(name: str) -> str:
    return f"there is no hook {name}. {did_you_mean(name, _ARGUMENTS)}Hooks: {', '.join(_ARGUMENTS)}"


def _provided(kind: str, function: Callable[[], object], plugin: Plugin) -> Iterator[Entry]:
    hook = f"irlvla_{kind}s"
    try:
        provided = function()
    except (Exception, SystemExit) as error:
        error.add_note(f"(in {hook})")
        raise
    if not isinstance(provided, Mapping):
        raise ContractError(f"{hook} returns {provided!r}; it must return a mapping of names to classes")
    for name, target in provided.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
            raise ContractError(f"{hook} returns the name {name!r}; a name is of letters, digits, _ and -, and begins with a letter")
        if not isinstance(target, type) and not (isinstance(target, str) and re.fullmatch(r"[\w.]+:[\w.]+", target)):
            raise ContractError(f"{hook} returns {target!r} for {name!r}; it must be a class or 'module:Class'")
        yield Entry(kind, name, target, plugin)
