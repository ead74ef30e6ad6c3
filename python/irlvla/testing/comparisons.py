"""The checks of benchmarks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from irlvla.components import Benchmark
from irlvla.errors import IrlvlaError
from irlvla.testing.contract import SETTINGS
from irlvla.testing.subject import Broken, Kit, Skip, Subject, require


def _brings_settings(subject: Subject) -> bool:
    return subject.entry.load().settings is not Benchmark.settings  # type: ignore[attr-defined]


def _summarises(subject: Subject) -> bool:
    return subject.entry.load().summarise is not Benchmark.summarise  # type: ignore[attr-defined]


def overrides_one_method(subject: Subject) -> None:
    """Override settings() if the benchmark is driven by irlvla, or summarise() if it is driven elsewhere."""
    which = {(True, True): "both settings() and summarise()", (False, False): "neither settings() nor summarise()"}
    found = which.get((_brings_settings(subject), _summarises(subject)))
    require(found is None, f"it overrides {found}, expected one of them")


def settings_are_data(subject: Subject) -> None:
    """Return from settings() a mapping of fields of `evaluate` to plain data, as a recipe has them; paths as texts."""
    if not _brings_settings(subject):
        raise Skip("it is driven elsewhere")
    brought = subject.build().settings()
    require(isinstance(brought, dict) and bool(brought), f"settings() returns {brought!r:.80}, expected a dict of fields")
    try:
        again = json.loads(json.dumps(brought, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Broken(f"settings() returns what JSON cannot hold: {error}") from error
    require(again == brought, f"settings() comes back from JSON as {again!r:.200}, expected {brought!r:.200}")
    require("policies" not in brought, "settings() brings policies; its user says who drives")


def settings_repeat(subject: Subject) -> None:
    """Let the same config give the same settings(): they are part of a published comparison."""
    if not _brings_settings(subject):
        raise Skip("it is driven elsewhere")
    component = subject.build()
    require(component.settings() == component.settings() == subject.build().settings(), "settings() returns something else the second time")


def settings_choose_scenes(subject: Subject) -> None:
    """Bring `data`: a dataset that is installed, with settings that it accepts."""
    if not _brings_settings(subject):
        raise Skip("it is driven elsewhere")
    brought = subject.build().settings()
    require("data" in brought, f"settings() brings {', '.join(brought)} and no data")
    stages = {"data": brought["data"], "second_stage.data": (brought.get("second_stage") or {}).get("data")}
    for where, spec in stages.items():
        if spec is not None:
            subject.registry.configure("dataset", spec, where)


def tells_of_missing_results(subject: Subject) -> None:
    """Raise irlvla.FileError for a result file that cannot be read, and name the file."""
    if not _summarises(subject):
        raise Skip("it is driven by irlvla")
    component = subject.build()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in {"missing.json": None, "empty.json": b"", "torn.json": b'{"rec', "strange.json": b"[3]"}.items():
            file = Path(folder) / name
            if content is not None:
                file.write_bytes(content)
            try:
                component.summarise([file])
            except IrlvlaError as error:
                require(name in str(error), f"for {name} it says {str(error)!r}, which does not name the file")
                continue
            raise Broken(f"summarise() takes {name}, expected an error")


CHECKS = (overrides_one_method, settings_are_data, settings_repeat, settings_choose_scenes, tells_of_missing_results)
COMPARISON = Kit(lambda component, example: [], None, overrides_one_method, (*SETTINGS, *CHECKS))
