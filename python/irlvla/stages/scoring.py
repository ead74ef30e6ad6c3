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

from irlvla.checkpoint import from_pretrained
from irlvla.components import Dataset, Metric, Policy, Spec, pluggable
from irlvla.errors import ConfigError, InputError
from irlvla.files import write_whole
from irlvla.registry import build, installed
from irlvla.run import Run, RunConfig
from irlvla.stages.batches import SceneBatch, checked, generator_of, in_order
from irlvla.stages.measurement import Record, gather, means_of, measure, summarised
from irlvla.types import Plan


class ScoreConfig(RunConfig):
    """Settings of `score`."""

    data: Spec = pluggable("dataset", "scenes", description="scenes to plan in")
    policy: str | None = Field(None, description="a saved policy: its folder, or its name on the Hub (owner/name)")
    planner: Spec | None = pluggable("planner", None, description="instead of a policy: a planner by itself; one that learns is untrained")
    backbone: Spec | None = pluggable("backbone", None, description="what `planner` sees with; null = status")
    reasoner: Spec | None = pluggable("reasoner", None, description="what `planner` thinks with")
    plans: Path | None = Field(None, description="instead of a policy: a file of Plan.save, one row per scene, in the order of the dataset")
    candidates: int = Field(1, ge=1, description="plans per scene (K); the planner's favourite is driven")
    metrics: list[Spec] = pluggable("metric", ["epdms", "displacement"], description="what is measured")
    batch: int = Field(64, ge=1, description="scenes at once")
    workers: int = Field(0, ge=0, description="processes that read the scenes; 0 = the main one")

    may_change = RunConfig.may_change | {"workers"}


def score(config: ScoreConfig) -> Path:
    """Write scores.csv (every value of every scene) and summary.json (means over what was measured); return their directory.

    Of several processes each measures its share, and the main one writes. A planner draws its random numbers for each
    batch anew, from the seed and the place of the batch in the dataset.

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
    source = _source(config, len(dataset))
    table: dict[int, Record] = {}
    with Run.start("score", config) as run, torch.no_grad(), run.progress(len(dataset), "score") as progress:
        run.restore()  # which restores nothing: a run that is resumed begins anew, and so must its log
        if isinstance(source, Policy):
            source.to(run.device).eval()
        began = time.perf_counter()
        for batch in checked(run.prepare(in_order(dataset, config.batch, config.workers))):
            with run.autocast():
                plan = _plan(source, batch, config)
            records = gather(run, measure(metrics, batch, plan))
            before = len(table)
            table.update((record["row"], record) for record in records)  # some again: all processes get equally many batches
            progress.advance(len(table) - before)
        seconds = time.perf_counter() - began
        if run.is_main:
            _write(run, [table[row] for row in sorted(table)], seconds)
    return run.directory


# -- plans -------------------------------------------------------------------------------------------------------------


def _source(config: ScoreConfig, scenes: int) -> Policy | Plan:
    """What plans: a policy, or the plans of a file."""
    given = [name for name in ("policy", "planner", "plans") if getattr(config, name) is not None]
    if len(given) != 1:
        got = f"{' and '.join(given)}; FIELD=null drops one" if given else "none"
        raise ConfigError(f"give exactly one of policy, planner and plans, got {got}")
    if parts := [name for name in ("backbone", "reasoner") if getattr(config, name) is not None and config.planner is None]:
        raise ConfigError(f"{' and '.join(parts)}: it goes with planner, not with {given[0]}")
    if config.plans is not None:
        return _read_plans(config.plans, scenes, config.candidates)
    if config.policy is not None:
        policy = from_pretrained(config.policy)
        if not isinstance(policy, Policy):
            raise ConfigError(f"policy={config.policy} holds {policy} alone; it must hold a whole policy")
        return policy
    torch.manual_seed(config.seed)  # an untrained planner is the same in every process
    return installed().build_policy(config.backbone or "status", config.planner, config.reasoner)


def _read_plans(path: Path, scenes: int, candidates: int) -> Plan:
    plan = Plan.load(path)
    if plan.poses.ndim != 4 or len(plan) != scenes:
        raise InputError(f"{path} holds poses of shape {tuple(plan.poses.shape)}; the {scenes} scenes need ({scenes}, K, T, 3)")
    if bad := (~plan.poses.isfinite()).flatten(2).any(-1).nonzero().tolist():
        raise InputError(f"{path}: plan {bad[0][1]} of scene {bad[0][0]} (both from 0) holds NaN or infinity")
    if plan.score is not None and (plan.score.shape != plan.poses.shape[:2] or bool(plan.score.isnan().any())):
        raise InputError(
            f"{path}: the scores must be of shape {tuple(plan.poses.shape[:2])}, without NaN; they are {tuple(plan.score.shape)}"
        )
    if candidates not in (1, plan.poses.shape[1]):
        raise ConfigError(f"candidates={candidates}: {path} holds {plan.poses.shape[1]} plans per scene, and all are taken")
    return plan


def _plan(source: Policy | Plan, batch: SceneBatch, config: ScoreConfig) -> Plan:
    if isinstance(source, Plan):
        return source[batch.rows.cpu()].to(batch.rows.device)
    return source.sample(batch.observation, config.candidates, generator=generator_of(batch, config.seed))


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
