"""What a reader of results needs to compare them with others: of which benchmark, by which settings, with which code."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from irlvla.components import Benchmark
from irlvla.files import write_whole
from irlvla.registry import build, installed
from irlvla.report import OFFICIAL
from irlvla.run.journal import ENVIRONMENT
from irlvla.stages.results import FOLDERS

if TYPE_CHECKING:
    from irlvla.stages.evaluation import EvaluateConfig

FREE = ("size", "cameras", "privileged")  #: of the scenes: what a policy sees


def write_provenance(directory: Path, config: EvaluateConfig, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Write official/provenance.json beside the tables that it is of; return it.

    `changed` names the settings in which the run differs from its benchmark: with any, its numbers are no others' to compare with.
    """
    environment = json.loads((directory / ENVIRONMENT).read_text())
    settings = config.model_dump(mode="json")
    benchmark: Benchmark | None = None if config.benchmark is None else build("benchmark", config.benchmark)
    found = {
        "benchmark": settings["benchmark"],
        "about": settings["about"],
        "changed": [] if benchmark is None else sorted(_changes(benchmark.settings(), settings)),
        "plugin": None if benchmark is None else str(installed().entry_of(benchmark).plugin),
        "human_filter": {folder: human_filter for human_filter, folder in FOLDERS.items()},
        "traffic": settings["traffic"],
        "data": settings["data"],
        "second_stage": settings["second_stage"],
        "policies": {name: {**of["source"], "failed": of["failed"]} for name, of in summary["policies"].items()},
        "scenes": summary["scenes"],
        "seed": settings["seed"],
        "batch": settings["batch"],
        "precision": settings["precision"],
        **{name: environment[name] for name in ("versions", "git", "plugins", "machine")},
    }
    write_whole(directory / OFFICIAL / "provenance.json", json.dumps(found, indent=2) + "\n")
    return found


def _changes(brought: Mapping[str, Any], settings: Any, path: str = "") -> Iterator[str]:
    """Paths of settings that differ from those that a benchmark brings."""
    for name, value in brought.items():
        here, now = f"{path}{name}", settings.get(name) if isinstance(settings, Mapping) else None
        if isinstance(value, Mapping) and isinstance(now, Mapping):
            yield from _changes(value, now, f"{here}.")
        elif now != value and name not in FREE:
            yield here
