"""Every hook: what it is for, how it is called, and that a test of its own exists."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from irlvla import hooks, registry
from irlvla.components import KINDS
from irlvla.registry import Plugin, Registry
from plugins_for_tests import Site, empty_site

HOOKS = {name: function for name, function in inspect.getmembers(hooks) if hasattr(function, "irlvla_spec")}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with empty_site(tmp_path, monkeypatch) as made:
        yield made


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test(name: str) -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert re.search(rf"def test_hook_{name}\(", tests)


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_says_what_it_is_for(name: str) -> None:
    assert inspect.getdoc(HOOKS[name])
    signature = inspect.signature(HOOKS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(argument.annotation is not inspect.Parameter.empty for argument in signature.parameters.values())


def test_every_kind_has_a_hook() -> None:
    components = {f"irlvla_{kind}s" for kind in KINDS}
    assert components < HOOKS.keys()
    assert HOOKS.keys() - components == {"irlvla_run_started", "irlvla_log", "irlvla_run_finished"}
    for kind, contract in KINDS.items():
        assert f"type[{contract.__name__}]" in str(inspect.signature(HOOKS[f"irlvla_{kind}s"]).return_annotation)


# -- components --------------------------------------------------------------------------------------------------------


def provides(site: Site, kind: str) -> None:
    """A component that this hook returns is found by its kind and name, and by no other kind."""
    target = "irlvla_acme.things:Thing"
    site.add("irlvla-acme", f"import irlvla\n\n@irlvla.hookimpl\ndef irlvla_{kind}s():\n    return {{'acme_thing': {target!r}}}\n")
    found = site.scan()
    entry = found.find(kind, "acme_thing")
    assert str(entry) == f"{kind} 'acme_thing' (irlvla-acme 0.3.1)"
    assert entry.target == target
    assert [other for other in KINDS if "acme_thing" in found.names(other)] == [kind]


def test_hook_irlvla_backbones(site: Site) -> None:
    provides(site, "backbone")


def test_hook_irlvla_reasoners(site: Site) -> None:
    provides(site, "reasoner")


def test_hook_irlvla_planners(site: Site) -> None:
    provides(site, "planner")


def test_hook_irlvla_reward_models(site: Site) -> None:
    provides(site, "reward_model")


def test_hook_irlvla_rl_algorithms(site: Site) -> None:
    provides(site, "rl_algorithm")


def test_hook_irlvla_datasets(site: Site) -> None:
    provides(site, "dataset")


def test_hook_irlvla_metrics(site: Site) -> None:
    provides(site, "metric")


def test_hook_irlvla_benchmarks(site: Site) -> None:
    provides(site, "benchmark")


# -- runs --------------------------------------------------------------------------------------------------------------


def tracker(site: Site, implementation: str) -> tuple[Any, list[Any]]:
    """The hooks of a registry, and the list in which this implementation, the only one, keeps what it sees."""
    site.add("irlvla-acme", f"import irlvla\n\nseen = []\n\n@irlvla.hookimpl\n{implementation}\n")
    found = Registry()
    added = found.add(Plugin("irlvla-acme", "0.3.1", "irlvla_acme"), lambda: importlib.import_module("irlvla_acme"))
    assert added.problem == ""
    return found.manager.hook, sys.modules["irlvla_acme"].seen


def test_hook_irlvla_run_started(site: Site) -> None:
    hook, seen = tracker(site, "def irlvla_run_started(run):\n    seen.append(run)")
    hook.irlvla_run_started(run="a run")
    assert seen == ["a run"]


def test_hook_irlvla_log(site: Site) -> None:
    hook, seen = tracker(site, "def irlvla_log(run, step, values):\n    seen.append((run, step, values))")
    hook.irlvla_log(run="a run", step=3, values={"loss": 0.5})
    assert seen == [("a run", 3, {"loss": 0.5})]


def test_hook_irlvla_run_finished(site: Site) -> None:
    hook, seen = tracker(site, "def irlvla_run_finished(run, error):\n    seen.append((run, error))")
    error = KeyboardInterrupt()
    hook.irlvla_run_finished(run="a run", error=error)
    hook.irlvla_run_finished(run="a run", error=None)
    assert seen == [("a run", error), ("a run", None)]


# -- evolution: what lets a hook get a new argument, and a plugin be an object -------------------------------------------


def test_an_implementation_may_leave_out_arguments(site: Site) -> None:
    hook, seen = tracker(site, "def irlvla_log(values):\n    seen.append(values)")
    hook.irlvla_log(run="a run", step=3, values={"loss": 0.5})
    assert seen == [{"loss": 0.5}]


def test_an_implementation_may_have_another_name(site: Site) -> None:
    site.add("irlvla-acme", "import irlvla\n\n@irlvla.hookimpl(specname='irlvla_planners')\ndef mine():\n    return {'acme': 'a:B'}\n")
    assert "acme" in site.scan().names("planner")


def test_a_plugin_may_be_an_object(site: Site) -> None:
    source = "class Plugin:\n    @irlvla.hookimpl\n    def irlvla_planners(self):\n        return {'acme': 'a:B'}\n"
    source = f"import irlvla\n\n{source}\nplugin = Plugin()\n"
    site.add("irlvla-acme", source, points={"acme": "irlvla_acme:plugin"})
    assert "acme" in site.scan().names("planner")


def test_the_built_in_plugin_uses_the_same_hooks() -> None:
    registry.installed.cache_clear()
    built_in = [plugin for plugin in registry.installed().plugins if plugin.module == "irlvla.zoo"]
    assert [str(plugin.problem) for plugin in built_in] == [""]
    assert {entry.plugin for entry in registry.installed() if entry.name == "constant_velocity"} == set(built_in)
