"""The conformance kit: does a component keep the contract of its kind?

In the tests of a plugin one line writes the tests, one for each check and device:

    from irlvla.testing import planner_checks

    test_spline = planner_checks("acme_spline", knots=3)

`irlvla plugins check PACKAGE` makes the same checks of all that a plugin provides, without pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.utils import canonicalize_name

from irlvla import hooks
from irlvla.errors import ContractError, InputError, IrlvlaError, PluginError, did_you_mean
from irlvla.registry import Entry, Plugin, installed
from irlvla.testing import comparisons, data, learning, policies
from irlvla.testing.examples import example_features, example_observation, example_plan, example_scene
from irlvla.testing.subject import Check, Skip, Subject, make

__all__ = [
    "Result",
    "backbone_checks",
    "benchmark_checks",
    "check",
    "check_plugin",
    "dataset_checks",
    "example_features",
    "example_observation",
    "example_plan",
    "example_scene",
    "metric_checks",
    "planner_checks",
    "reasoner_checks",
    "reward_model_checks",
    "rl_algorithm_checks",
]


@dataclass(frozen=True)
class Result:
    """What a check of a component, or of a plugin (kind "plugin"), found."""

    kind: str
    name: str
    check: str
    problem: str = ""  # the component and its package, what is wrong, what to do; "" = nothing is
    skipped: str = ""  # why the check was not made; "" = it was


KITS = {
    "backbone": policies.PERCEPTION,
    "reasoner": policies.PERCEPTION,
    "planner": policies.PLANNING,
    "reward_model": learning.JUDGEMENT,
    "rl_algorithm": learning.IMPROVEMENT,
    "dataset": data.DATA,
    "metric": data.MEASUREMENT,
    "benchmark": comparisons.COMPARISON,
}


# -- without pytest ----------------------------------------------------------------------------------------------------


def check(kind: str, name: str, settings: Mapping[str, Any] | None = None, device: str = "cpu") -> list[Result]:
    """Make all checks of a component with these settings; one that fails does not stop the others.

    Raises:
        PluginError: there is no such component.
    """
    return _check(installed().find(kind, name), settings or {}, device)


def check_plugin(package: str, device: str = "cpu") -> list[Result]:
    """Make all checks of every component of a plugin, with default settings.

    Args:
        package: name of its distribution, with or without "irlvla-", of its module or entry point, or path of its file.

    Raises:
        PluginError: there is no such plugin.
    """
    results = []
    if package.endswith(".py") and Path(package).is_file():
        try:
            package = installed().add_file(package).module
        except PluginError as error:
            return [Result("plugin", Path(package).name, "loads", str(error))]
    for plugin in _find(package):
        results.append(Result("plugin", plugin.name, "loads", f"{plugin}: {plugin.problem}" if plugin.problem else ""))
        for entry in [entry for entry in installed() if entry.plugin == plugin]:
            results += _check_with_defaults(entry, device)
    return results


def _check(entry: Entry, settings: Mapping[str, Any], device: str) -> list[Result]:
    results, subject = [], _subject(entry, settings, device)
    for one in KITS[entry.kind].checks:
        problem = skipped = ""
        try:
            make(one, subject)
        except ContractError as error:
            problem = str(error)
        except Skip as why:
            skipped = str(why)
        results.append(Result(entry.kind, entry.name, one.__name__, problem, skipped))
    return results


def _check_with_defaults(entry: Entry, device: str) -> list[Result]:
    try:
        installed().find(entry.kind, entry.name)
        needed = [name for name, info in entry.load().Config.model_fields.items() if info.is_required()]
    except IrlvlaError as error:
        return [Result(entry.kind, entry.name, "imports", str(error))]
    if needed:
        call = f"{entry.kind}_checks({entry.name!r}, {', '.join(f'{name}=...' for name in needed)})"
        return [Result(entry.kind, entry.name, "builds", skipped=f"needs settings: give them in your tests: {call}")]
    return _check(entry, {}, device)


def _find(package: str) -> list[Plugin]:
    """The plugins of a name; a distribution may have several."""
    known = installed()
    points = {point.name: point.value for point in metadata.entry_points(group=hooks.PROJECT)}
    modules, names = {package, points.get(package)}, {canonicalize_name(package), f"irlvla-{canonicalize_name(package)}"}
    found = [plugin for plugin in known.plugins if plugin.module in modules or plugin.name in names]
    if not found:
        listed = dict.fromkeys(plugin.name for plugin in known.plugins)
        near = did_you_mean(package, [*listed, *(name.removeprefix("irlvla-") for name in listed)])
        raise PluginError(f"no plugin {package!r}. {near}Installed: {', '.join(listed)}; or name a Python file")
    return found


def _subject(entry: Entry, settings: Mapping[str, Any], device: str) -> Subject:
    if device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"device={device!r}: no CUDA device was found; `irlvla doctor` says what was")
    return Subject(installed(), entry, settings, device, KITS[entry.kind])


# -- with pytest -------------------------------------------------------------------------------------------------------


def backbone_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """A test function for a backbone with these settings, one test for each check, on the CPU and, where there is one, CUDA."""
    return _tests("backbone", name, settings)


def reasoner_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """As `backbone_checks`, for a reasoner."""
    return _tests("reasoner", name, settings)


def planner_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """As `backbone_checks`, for a planner."""
    return _tests("planner", name, settings)


def reward_model_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """As `backbone_checks`, for a reward model."""
    return _tests("reward_model", name, settings)


def rl_algorithm_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """As `backbone_checks`, for an RL algorithm."""
    return _tests("rl_algorithm", name, settings)


def dataset_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """As `backbone_checks`, for a dataset; on the CPU only."""
    return _tests("dataset", name, settings)


def metric_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """As `backbone_checks`, for a metric."""
    return _tests("metric", name, settings)


def benchmark_checks(name: str, /, **settings: Any) -> Callable[..., None]:
    """As `backbone_checks`, for a benchmark; on the CPU only."""
    return _tests("benchmark", name, settings)


def _tests(kind: str, name: str, settings: Mapping[str, Any]) -> Callable[..., None]:
    import pytest

    devices = ["cpu", "cuda"] if kind not in ("dataset", "benchmark") and torch.cuda.is_available() else ["cpu"]
    cases = [pytest.param(one, device, id=f"{one.__name__}-{device}") for device in devices for one in KITS[kind].checks]

    @pytest.mark.parametrize(("one", "device"), cases)
    def test(one: Check, device: str) -> None:
        __tracebackhide__ = True
        try:
            make(one, _subject(installed().find(kind, name), settings, device))
        except Skip as why:
            pytest.skip(str(why))
        except ContractError as error:
            if error.__cause__ is not None:
                raise  # its author wants to see where
            problem = str(error)
        else:
            return
        pytest.fail(problem, pytrace=False)

    return test
