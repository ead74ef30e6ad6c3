"""Measure plans in every scene of a dataset: what a policy, a planner or a file of plans is worth."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path

import torch
from pydantic import Field

from irlvla.components import Dataset, Metric, Spec, pluggable
from irlvla.errors import ConfigError, InputError
from irlvla.files import write_whole
from irlvla.registry import build
from irlvla.run import Run, RunConfig
from irlvla.stages.batches import checked, in_order
from irlvla.stages.driving import Driver, DriverConfig
from irlvla.stages.measurement import Record, gather, means_of, measure, summarised


class ScoreConfig(DriverConfig, RunConfig):
    """Settings of `score`."""

    data: Spec = pluggable("dataset", "scenes", description="scenes to plan in")
    metrics: list[Spec] = pluggable("metric", ["epdms", "displacement"], description="what is measured")
    batch: int = Field(64, ge=1, description="scenes at once")
    workers: int = Field(0, ge=0, description="processes that read the scenes; 0 = the main one")

    may_change = RunConfig.may_change | {"workers"}


def score(config: ScoreConfig) -> Path:
    """Write scores.csv (every value of every scene) and summary.json (means over what was measured); return their directory.

    Of several processes each measures its share, and the main one writes.

    Raises:
        ConfigError: not exactly one of policy, planner and plans is given, or two metrics measure something of the same name.
        ContractError: a planner or a metric returns what it must not.
        FileError: there is no such data, checkpoint or file of plans.
        InputError: there are no scenes, or plans are not of these.
    """
    twice = {spec["name"] for spec in config.metrics if [other["name"] for other in config.metrics].count(spec["name"]) > 1}
    if twice:
        raise ConfigError(f"metrics: {sorted(twice)[0]} is listed twice, and would give columns of the same names")
    dataset: Dataset = build("dataset", config.data)
    metrics: list[Metric] = [build("metric", spec) for spec in config.metrics]
    if not len(dataset):
        raise InputError(f"{dataset} holds no scenes")
    drive = Driver(config, len(dataset), config.seed)
    table: dict[int, Record] = {}
    with Run.start("score", config) as run, torch.no_grad(), run.progress(len(dataset), "score") as progress:
        run.restore()  # which restores nothing: a run that is resumed begins anew, and so must its log
        drive.to(run.device)
        began = time.perf_counter()
        for batch in checked(run.prepare(in_order(dataset, config.batch, config.workers))):
            with run.autocast():
                plan = drive(batch)
            records = gather(run, measure(metrics, batch, plan))
            before = len(table)
            table.update((record["row"], record) for record in records)  # some again: all processes get equally many batches
            progress.advance(len(table) - before)
        seconds = time.perf_counter() - began
        if run.is_main:
            _write(run, [table[row] for row in sorted(table)], seconds)
    return run.directory


def _write(run: Run, records: list[Record], seconds: float) -> None:
    columns = list(dict.fromkeys(name for record in records for name in record if name != "row"))
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, restval=math.nan, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(records)
    metrics = summarised(records)
    summary = {
        "scenes": len(records),
        "seconds": seconds,
        "scenes_per_second": len(records) / seconds,
        "metrics": metrics,
    }
    write_whole(run.directory / "scores.csv", text.getvalue())
    write_whole(run.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    run.log(len(records), means_of(metrics))
