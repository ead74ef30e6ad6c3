"""The records of a run, in its directory: `config.yaml`, `environment.json` and `metrics.jsonl`."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from irlvla import configuration
from irlvla.components import Config
from irlvla.errors import ConfigError, FileError, InputError
from irlvla.files import write_whole
from irlvla.run import environment

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"


def choose_directory(stage: str) -> Path:
    """A directory for a new run, of which there is none yet: runs/STAGE-DATE-TIME."""
    name = f"{stage}-{datetime.now():%Y%m%d-%H%M%S}"
    for again in itertools.count(1):
        directory = Path("runs", name if again == 1 else f"{name}-{again}")
        try:
            directory.mkdir(parents=True)  # made here, so that no other run that starts now takes it
        except FileExistsError:
            if Path("runs").is_dir():
                continue
            raise FileError("the run directory runs cannot be made: it is a file") from None
        except OSError as error:
            raise FileError(f"the run directory {directory} cannot be made: {error.strerror}") from error
        return directory
    raise AssertionError


def read_previous(directory: Path, stage: str, config: Config, free: Collection[str]) -> dict[str, Any] | None:
    """The environment of the run that a directory holds; None = it holds none.

    Args:
        free: fields of the configuration that may have changed.

    Raises:
        ConfigError: it is a run of another stage, or with another configuration.
        FileError: its records cannot be read.
    """
    if not (directory / CONFIG).exists():
        return None
    try:
        previous: dict[str, Any] = json.loads((directory / ENVIRONMENT).read_bytes())
    except (OSError, ValueError) as error:
        raise FileError(f"{directory / ENVIRONMENT} cannot be read: {error}") from error
    if previous.get("stage") != stage:
        raise ConfigError(f"{directory} holds a run of {previous.get('stage')}, which {stage} cannot resume. Choose another out=DIRECTORY")
    before = _flat(configuration.read(type(config), directory / CONFIG).model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    if changed := [name for name in {**before, **now} if before.get(name) != now.get(name) and name.partition(".")[0] not in free]:
        lines = [f"{name}: {now.get(name)!r}, and it began with {before.get(name)!r}" for name in changed]
        remedy = "Resume with what it began with, or choose another out=DIRECTORY"
        raise ConfigError("\n  ".join([f"{directory} cannot be resumed with another configuration. {remedy}", *lines]))
    return previous


def _flat(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """{"planner": {"knots": 4}} as {"planner.knots": 4}."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, Mapping) and value else {f"{path}{name}": value}
    return flat


def write_start(directory: Path, stage: str, config: Config, processes: int, previous: Mapping[str, Any] | None) -> None:
    """Write what is known when a run begins: a recipe of it and its environment, with the one that it resumes. Raises `FileError`."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"the run directory {directory} cannot be made: {error.strerror}") from error
    facts = {"stage": stage, **environment.record(), "processes": processes, "previous": previous}
    write_whole(directory / ENVIRONMENT, json.dumps(facts, indent=2) + "\n")
    write_whole(directory / CONFIG, configuration.to_yaml(config))  # last: it marks that the directory holds a run


def write_metrics(directory: Path, step: int, values: Mapping[str, float]) -> None:
    """Add a line to metrics.jsonl: the step, the time [s since 1970] and the values; NaN and infinities are null."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    with open(directory / METRICS, "a") as stream:
        stream.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")


def cut_metrics(directory: Path, step: int) -> None:
    """Remove what metrics.jsonl holds of later steps, and the part of a line that a kill may have left."""
    if (directory / METRICS).exists():
        write_whole(directory / METRICS, "".join(_lines_until(directory / METRICS, step)))


def _lines_until(metrics: Path, step: int) -> Iterator[str]:
    for line in metrics.read_text(errors="replace").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                yield line
        except ValueError:
            continue


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The values as plain numbers. Raises `InputError` for what is not one number."""
    return {name: _number(name, value) for name, value in values.items()}


def _number(name: str, value: Any) -> float:
    try:
        number = value.item() if hasattr(value, "item") else value
    except (RuntimeError, ValueError):  # more than one
        number = None
    if not isinstance(number, int | float) or name in ("step", "time"):
        raise InputError(f"a value to log is one number, under a name other than step and time; got {name}={value!r:.80}")
    return number
