"""The report of a reward: its predictions in held-out scenes, with and without images, beside the exact score."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import nn

from irlvla.candidates import CandidateConfig
from irlvla.components import Config
from irlvla.files import write_whole
from irlvla.plots import draw_reliability, draw_scores
from irlvla.run import Run
from irlvla.scoring import epdms
from irlvla.stages.labelling import LabelledBatch
from irlvla.stages.reward_statistics import Comparison
from irlvla.types import METRICS, Epdms, Observation

REPEATS = 3  # of what is timed; the fastest counts
View = Callable[[Observation], Observation]

SIXTY_FOUR = {"vocabulary": 12, "lateral": 8, "speed": 8, "heading": 4, "stop": 6, "swerve": 4, "mixed": 12, "constant_velocity": 9}


class ReportConfig(Config):
    """On what a reward is evaluated."""

    candidates: CandidateConfig = Field(
        CandidateConfig.model_validate(SIXTY_FOUR), description="of each scene; by default 64 with the human's drive"
    )
    policy: str | None = Field(
        None, description="a saved policy that it has not learned from: its proposals are evaluated, not those of `policy`"
    )
    blind: int = Field(64, ge=0, description="scenes that are shown again with black images, and with those of other scenes; 0 = none")


class Predictions(NamedTuple):
    """What a reward predicts of many labelled batches."""

    comparison: Comparison
    predicted: list[Epdms]  # as it said it, by batch
    measured: list[Epdms]


def predict(model: nn.Module, batches: Iterable[LabelledBatch], run: Run, view: View | None = None) -> Predictions:
    """What a reward predicts of all candidates; `view` changes what it sees."""
    compared, predicted, measured = [], [], []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            scenes, plan = batch.scenes, batch.plan.to(run.device)
            obs = scenes.observation.to(run.device)
            with run.autocast():
                found = model(obs if view is None else view(obs), scenes.scene.to(run.device), plan)
            exact = Epdms(batch.labels.values)
            compared.append(Comparison(found.values.float().cpu(), exact.values.float().cpu(), batch.source.cpu()))
            predicted.append(found)
            measured.append(exact.to(run.device))
    return Predictions(Comparison.cat(compared), predicted, measured)


def values_of(comparison: Comparison) -> dict[str, float]:
    """What is watched while a reward learns: AUC by metric (auc_nc, ...), r2_ep, spearman, gain, regret, human_above; if known."""
    found = comparison.summary()
    values = {"spearman": found["spearman"], "human_above": found["human_above"]}
    values |= {name: found["best_of"][name] for name in ("gain", "regret")}
    values |= {f"{what}_{name}": of.get(what) for name, of in found["metrics"].items() for what in ("auc", "r2")}
    return {name: value for name, value in values.items() if value is not None}


# -- without images ----------------------------------------------------------------------------------------------------


def blinded(model: nn.Module, batches: Iterable[LabelledBatch], run: Run) -> dict[str, Any] | None:
    """What it knows of scenes with their images, with black ones, and with those of the scene before. None without images."""
    batches = [batch for batch in batches if len(batch.scenes.rows) > 1]
    if not batches or batches[0].scenes.observation.images is None:
        return None
    views: dict[str, View | None] = {"seeing": None, "blanked": _blanked, "shuffled": _shuffled}
    return {name: values_of(predict(model, batches, run, view).comparison) for name, view in views.items()}


def _blanked(obs: Observation) -> Observation:
    assert obs.images is not None
    return dataclasses.replace(obs, images=torch.zeros_like(obs.images))


def _shuffled(obs: Observation) -> Observation:
    assert obs.images is not None
    return dataclasses.replace(obs, images=obs.images.roll(1, 0))


# -- how quickly -------------------------------------------------------------------------------------------------------


def throughput(model: Any, batch: LabelledBatch, run: Run) -> dict[str, float]:
    """Plans per second: of the whole model, of its heads where features are known (`see` and `judge`), and of the exact score."""
    obs, scene, plan = batch.scenes.observation.to(run.device), batch.scenes.scene, batch.plan
    count = plan.poses.shape[0] * plan.poses.shape[1]
    there = plan.to(run.device)
    with torch.no_grad(), run.autocast():
        found = {"whole model": _fastest(lambda: model(obs, scene.to(run.device), there).values.cpu())}
        if hasattr(model, "see") and hasattr(model, "judge"):
            features = model.see(obs)
            found["heads alone"] = _fastest(lambda: model.judge(features, there).values.cpu())
    found["exact score"] = _fastest(lambda: epdms(dataclasses.replace(scene), plan))  # a new object: nothing of it is known yet
    return {name: count / seconds for name, seconds in found.items()}


def _fastest(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


# -- the report --------------------------------------------------------------------------------------------------------


def write_report(folder: Path, sections: Mapping[str, Comparison], more: Mapping[str, Any]) -> dict[str, Any]:
    """Write report.json, report.md and pictures of predictions. Returns what is in report.json.

    Args:
        more: `calibration`, `blind` and `throughput`, as `reward` has them; each may be left out.
    """
    found = {"sections": {name: comparison.summary() for name, comparison in sections.items()}, **more}
    write_whole(folder / "report.json", json.dumps(found, indent=2) + "\n")
    write_whole(folder / "report.md", "\n\n".join(_told(found)) + "\n")
    for name, comparison in sections.items():
        known = [metric for metric in METRICS if metric in found["sections"][name]["metrics"]]
        draw_reliability({metric: comparison.column(metric) for metric in known}, folder / f"reliability-{name}.png")
        draw_scores(*comparison.scores(), folder / f"scores-{name}.png")
    return found


def _told(found: Mapping[str, Any]) -> Iterable[str]:
    yield "# What the reward knows"
    for name, section in found["sections"].items():
        best = section["best_of"]
        yield f"## {name}: {section['scenes']} scenes, {section['candidates']} candidates in each"
        yield _metrics_told(section["metrics"])
        yield (
            f"Rank correlation of the score within scenes (Spearman): {_number(section['spearman'])}. The human's drive is rated above "
            f"{_number(section['human_above'])} of the others. Exact score of a candidate at random {_number(best['chance'])}, "
            f"of the one rated highest {_number(best['chosen'])}, of the best {_number(best['best'])}: "
            f"regret {_number(best['regret'])}, {_number(best['gain'])} of the possible gain."
        )
        for metric, of in section["metrics"].items():
            if "confusion" in of:
                levels = [("0", 0), ("0.5", 1), ("1", 2)]
                yield f"{metric.upper()}, exact value by row, nearest to what was predicted by column:"
                yield _table(["", *(level for level, _ in levels)], [[level, *map(str, of["confusion"][row])] for level, row in levels])
        yield "AUC (of EP: R2) by the source of candidates:"
        yield _sources_told(section)
    yield from _more_told(found)


def _more_told(found: Mapping[str, Any]) -> Iterable[str]:
    if blind := found.get("blind"):
        yield "## With black images, and with those of other scenes"
        names = [name for name in blind["seeing"] if name.startswith(("auc", "r2", "spearman"))]
        yield _table(["", *names], [[view, *(_number(values.get(name)) for name in names)] for view, values in blind.items()])
    if calibration := found.get("calibration"):
        yield "## Calibration: negative log-likelihood per candidate of the scenes that it was fitted to"
        yield _table(["", "before", "after"], [[name, *map(_number, values)] for name, values in calibration.items()])
    if speeds := found.get("throughput"):
        yield "## Plans per second"
        yield _table(list(speeds), [[f"{value:.0f}" for value in speeds.values()]])


def _metrics_told(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    columns = ("count", "mean", "predicted", "auc", "brier", "ece", "r2")
    return _table(["", *columns], [[name, *(_number(of.get(column)) for column in columns)] for name, of in metrics.items()])


def _sources_told(section: Mapping[str, Any]) -> str:
    names = list(section["metrics"])

    def row(kind: str, of: Mapping[str, Any]) -> list[str]:
        return [kind, *(_number(of.get(name, {}).get("r2" if name == "ep" else "auc")) for name in names)]

    return _table(["", *names], [row(kind, of) for kind, of in section["sources"].items()])


def _number(value: float | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
