"""Published comparisons: what a benchmark brings to the settings of a stage, and what it makes of results from elsewhere."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from irlvla.components import UNSET, Benchmark, Config, Spec, pluggable
from irlvla.errors import ContractError, FileError
from irlvla.files import write_whole
from irlvla.registry import installed

FIELD = "benchmark"  #: of a stage: which benchmark its settings are of
SUMMARY = "summary.json"


def completed(schema: type[Config], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a stage, over those that its benchmark brings, if it has one.

    What is written wins, however deep; a component of another name, and null, take the place of the one that the benchmark brings.

    Raises:
        ConfigError, PluginError: there is no such benchmark, or its settings are wrong.
        ContractError: it brings what the stage does not have.
    """
    if FIELD not in schema.model_fields or settings.get(FIELD) is None:
        return dict(settings)
    benchmark: Benchmark = installed().build("benchmark", settings[FIELD])
    brought = benchmark.settings()
    if unknown := sorted(brought.keys() - schema.model_fields.keys()):
        raise ContractError(f"{benchmark} brings {unknown[0]!r}, which is no field of the stage. Fields: {', '.join(schema.model_fields)}")
    return dict(_over(brought, settings))


def _over(brought: Any, written: Any) -> Any:
    if written == UNSET:
        return brought
    if not isinstance(brought, Mapping):
        return written
    if isinstance(written, str) and written == brought.get("name"):
        return brought
    if not isinstance(written, Mapping) or written.get("name", brought.get("name")) != brought.get("name"):
        return written
    return {**brought, **{name: _over(brought[name], value) if name in brought else value for name, value in written.items()}}


class SummariseConfig(Config):
    """Settings of `irlvla evaluate --benchmark NAME RESULTS...`."""

    benchmark: Spec = pluggable("benchmark", description="of which the results are")
    results: list[Path] = Field(min_length=1, description="result files of drives elsewhere")
    out: Path | None = Field(None, description="folder for summary.json; null = none is written")


def is_driven_elsewhere(name: str) -> bool:
    """Whether a benchmark summarises results. Raises `PluginError` if there is none of that name."""
    return installed().find("benchmark", name).load().summarise is not Benchmark.summarise  # type: ignore[attr-defined]


def summarise(config: SummariseConfig) -> dict[str, Any]:
    """What result files come to: `tables`, and of what: the benchmark, its plugin, the digest of each file.

    Raises:
        FileError: a file is missing or damaged, or there is a summary in `out` already.
        ConfigError: the benchmark is driven here.
        ContractError: it returns no tables.
    """
    path = config.out and config.out / SUMMARY
    if path and path.exists():
        raise FileError(f"{path} is there already; choose another folder: out=FOLDER")
    for file in config.results:
        if not file.is_file():
            raise FileError(f"{file} is no file")
    benchmark: Benchmark = installed().build("benchmark", config.benchmark)
    tables = benchmark.summarise(config.results)
    _require_tables(benchmark, tables)
    summary = {
        "benchmark": dict(config.benchmark),
        "plugin": str(installed().entry_of(benchmark).plugin),
        "results": {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in config.results},
        "tables": {title: [dict(row) for row in rows] for title, rows in tables.items()},
    }
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(summary, indent=2) + "\n")
    return summary


def _require_tables(benchmark: Benchmark, tables: Any) -> None:
    fits = isinstance(tables, Mapping) and all(
        isinstance(rows, list | tuple) and all(isinstance(row, Mapping) for row in rows) for rows in tables.values()
    )
    if not fits:
        raise ContractError(f"{benchmark}: summarise() must return tables by title, each a list of rows, each a mapping of cells by column")
    try:
        json.dumps(tables, default=dict)
    except (TypeError, ValueError) as error:
        raise ContractError(f"{benchmark}: the tables of summarise() cannot be written as JSON: {error}") from error
