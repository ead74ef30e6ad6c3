"""What metrics measure of plans in scenes: what all stages that look at plans share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from irlvla.checkpoint import save_pretrained
from irlvla.components import Component, Metric, Policy
from irlvla.errors import ConfigError, ContractError, did_you_mean
from irlvla.files import whole_folder
from irlvla.run import Run
from irlvla.stages.batches import SceneBatch
from irlvla.types import Plan

Record = dict[str, Any]  #: a scene's number in the dataset, its token, and the values of its metrics by name
Summary = dict[str, dict[str, Any]]  #: of each metric the mean, None if it was measured nowhere, and the count of scenes

SCORE = "score.json"  #: of the best model, beside it


def measure_all(run: Run, batches: Iterable[SceneBatch], metrics: Iterable[Metric], drive: Callable[[SceneBatch], Plan]) -> Summary:
    """What the metrics measure in many scenes of how something drives. Of several processes each measures its share."""
    table: dict[int, Record] = {}
    with torch.no_grad():
        for batch in batches:
            records: list[Record] = []
            if len(batch.rows):
                with run.autocast():
                    plan = drive(batch)
                records = measure(metrics, batch, plan)
            table.update((record["row"], record) for record in gather(run, records))
    return summarised(table[row] for row in sorted(table))


def measure(metrics: Iterable[Metric], batch: SceneBatch, plan: Plan) -> list[Record]:
    """What the metrics measure in each scene.

    Raises:
        ConfigError: two metrics measure something of the same name.
        ContractError: a metric returns what it must not.
    """
    records: list[Record] = [{"row": row, "token": token} for row, token in zip(batch.rows.tolist(), batch.scene.token, strict=True)]
    for metric in metrics:
        for name, values in _require_values(metric(batch.scene, plan), metric, len(records)).items():
            if name in records[0]:
                raise ConfigError(f"metrics: there is a column {name!r} already; leave out {metric}, or what else gives it")
            for record, value in zip(records, values.double().tolist(), strict=True):
                record[name] = value
    return records


def _require_values(values: Any, metric: Metric, scenes: int) -> Mapping[str, Tensor]:
    if not isinstance(values, Mapping):
        raise ContractError(f"{metric} must return a mapping of names to tensors, not {type(values).__name__}")
    for name, value in values.items():
        if not isinstance(value, Tensor) or tuple(value.shape) != (scenes,):
            given = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
            raise ContractError(f"{metric}: {name!r} must be a tensor of one value for each of the {scenes} scenes, not {given}")
        if bool(value.isinf().any()):
            raise ContractError(f"{metric}: {name!r} is infinite; what is not measured is NaN")
    return values


def gather(run: Run, records: list[Record]) -> list[Record]:
    """The records of all processes. They travel as JSON, padded with spaces, since `Run.gather` takes tensors of one shape."""
    text = json.dumps(records).encode()
    length = int(run.gather(torch.tensor([len(text)], device=run.device)).max())
    padded = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)[None].to(run.device)
    return [record for row in run.gather(padded).cpu().numpy() for record in json.loads(row.tobytes())]


def summarised(records: Iterable[Record]) -> Summary:
    """The means over the scenes where a metric was measured, and how many these are."""
    found: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("row", "token"):
                values = found.setdefault(name, [])
                values += [] if math.isnan(value) else [value]
    return {name: {"mean": math.fsum(values) / len(values) if values else None, "count": len(values)} for name, values in found.items()}


def means_of(summary: Summary) -> dict[str, float]:
    """What was measured, as it is logged."""
    return {name: of["mean"] for name, of in summary.items() if of["mean"] is not None}


class Best:
    """The best model of a run so far: checkpoints/best/model, and beside it what was measured of it.

    Attributes:
        folder: checkpoints/best.
    """

    def __init__(self, run: Run, name: str) -> None:
        """`name`: of the value that is highest for it."""
        self.run, self.name, self.folder = run, name, run.directory / "checkpoints" / "best"

    def keep(self, step: int, model: nn.Module, found: Summary) -> None:
        """Write the model of a step, unless a better one is there. Raises `ConfigError` if the value was not measured."""
        name = self.name
        if found.get(name, {}).get("mean") is None:
            raise ConfigError(f"validation.best: there is no {name!r}. {did_you_mean(name, found)}Measured: {', '.join(means_of(found))}")
        if self.run.is_main and ((before := self.read()) is None or found[name]["mean"] > before["metrics"][name]["mean"]):
            with whole_folder(self.folder) as folder:
                save_pretrained(cast("Policy | Component", model), folder / "model")
                (folder / SCORE).write_text(json.dumps({"step": step, "metrics": found}, indent=2) + "\n")

    def read(self) -> dict[str, Any] | None:
        """What was measured of it, and of which step it is."""
        path = self.folder / SCORE
        return json.loads(path.read_text()) if path.exists() else None
