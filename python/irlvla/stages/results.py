"""From what was measured in each scene to what is told: totals with their intervals, differences, tables."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from irlvla import leaderboard, ops
from irlvla.aggregation import COLUMNS, LONGEST_GAP, TwoStage, TwoStageMapping, comfort_of, endpoints, two_stage
from irlvla.files import write_whole
from irlvla.report import OFFICIAL, PLANS, SCORES, SUMMARY
from irlvla.stages.measurement import Record
from irlvla.stages.resampling import differences, intervals
from irlvla.types import METRICS, Epdms, Pdms, Plan

PDMS = tuple(f"pdms_{name}" for name in ("nc", "dac", "ep", "ttc", "comfort", "ddc"))
Array = NDArray[np.float64]
Filter = Literal["fixed", "legacy"]
FOLDERS: Mapping[Filter, str] = {"fixed": OFFICIAL, "legacy": f"{OFFICIAL}/legacy"}  #: of the official tables, by human filter
SAME = np.array([0.05, 0.5, 0.5])  # what a frame may lie beside the previous one of another: time [s], place [m]


@dataclass(frozen=True)
class Facts:
    """What the results need of the settings."""

    sources: Mapping[str, Mapping[str, Any]]  # of each policy, by name
    baseline: str
    subject: str
    batch: int
    mapping: TwoStageMapping  # empty = one stage
    first: int  # scenes of the first stage


class Drives:
    """What one policy did in N scenes. Where it failed, numbers are NaN.

    Attributes:
        columns: values of the scenes by name, in the order of the tables.
        latency: seconds per scene.
    """

    def __init__(self, records: Sequence[Record], name: str, mapping: TwoStageMapping) -> None:
        self.records = records
        self.found = [record.get("policies", {}).get(name, record) for record in records]
        self.driven = np.array(["error" not in one for one in self.found])
        self.tokens = [record["token"] for record in records]
        self.ec = self._extended_comfort(mapping)
        fixed = self.result("fixed")
        self.columns = {"epdms": fixed.score().numpy(), **dict(zip(METRICS, fixed.values.T.numpy(), strict=True))}
        self.columns["epdms_legacy"] = self.result("legacy").score().numpy()
        if (pdms := self._rows("pdms", len(PDMS))).size and not np.isnan(pdms).all():
            self.columns |= {"pdms": Pdms(torch.from_numpy(pdms)).score().numpy(), **dict(zip(PDMS, pdms.T, strict=True))}
        for metric in dict.fromkeys(metric for one in self.found for metric in one.get("metrics", ())):
            self.columns[metric] = np.array([one.get("metrics", {}).get(metric, np.nan) for one in self.found])
        if not np.isnan(believed := self._rows("believed", len(METRICS))).all():
            self.columns |= {"believed": Epdms(torch.from_numpy(believed)).score().numpy()}
            self.columns |= {f"believed_{metric}": values for metric, values in zip(METRICS, believed.T, strict=True)}
        self.latency = np.array([one.get("seconds", np.nan) for one in self.found])

    def _rows(self, field: str, width: int) -> Array:
        return np.array([one.get(field) or [np.nan] * width for one in self.found], np.float64).reshape(-1, width)

    def result(self, human_filter: Filter) -> Epdms:
        """Sub-metrics "N 9", with extended comfort where the other frame of the pair was driven too."""
        values, raw = (torch.from_numpy(self._rows(field, len(METRICS))) for field in ("values", "raw"))
        for tensor in (values, raw):
            tensor[:, -1] = self.ec
        return Epdms(values, raw=raw, human_filter=human_filter)

    def plan(self) -> Plan:
        """What was driven, "N 1 T 3"."""
        shape = np.array(next(one["poses"] for one in self.found if "poses" in one)).shape
        poses = np.array([one.get("poses") or np.full(shape, np.nan) for one in self.found])
        return Plan(torch.from_numpy(poses)[:, None], next(one["dt"] for one in self.found if "dt" in one))

    def _facts(self, field: str, rows: Any) -> Tensor:
        dtype = torch.int64 if field.endswith("_us") else torch.float64
        return torch.tensor([self.records[row][field] for row in rows], dtype=dtype)

    def _states(self, rows: Any) -> Tensor:
        plan = self.plan()
        return ops.simulate(plan.poses[rows, 0], self._facts("ego", rows), self._facts("time_us", rows), plan.dt)

    def _extended_comfort(self, mapping: TwoStageMapping) -> Tensor:
        """EC "N". In two stages of both frames of a pair of the mapping; in one of a frame whose previous one (0.5 s before) is there."""
        found = np.full(len(self.found), np.nan)
        rows = np.flatnonzero(self.driven).tolist()
        time = self._facts("time_us", rows).double().numpy() * 1e-6
        if mapping:
            place = {self.tokens[row]: number for number, row in enumerate(rows)}
            named = [pair for key, rest in mapping.items() for pair in (key, *rest)]
            pairs = [(place[now], place[then]) for now, then in named if now in place and then in place]
        else:
            links = _previous([self.records[row] for row in rows])
            pairs = [(now, then) for now, then in links.items() if 0.0 < time[now] - time[then] < LONGEST_GAP]
        if pairs:
            tokens = [self.tokens[row] for row in rows]
            comfort = comfort_of(pairs, self._states(rows).numpy(), time, tokens)
            for (now, then), value in zip(pairs, comfort.tolist(), strict=True):
                found[rows[now]] = value
                found[rows[then if mapping else now]] = value
        return torch.from_numpy(found)

    def two_stages(self, mapping: TwoStageMapping, human_filter: Filter) -> tuple[TwoStage, int]:
        """The aggregates over the groups that were driven whole, and how many groups were not.

        Where none was, they are NaN.
        """
        rows = np.flatnonzero(self.driven).tolist()
        known = {self.tokens[row] for row in rows}
        whole = {key: rest for key, rest in mapping.items() if known.issuperset({*key, *itertools.chain(*rest)})}
        named = {token for key, rest in whole.items() for token in {*key, *itertools.chain(*rest)}}
        rows = [row for row in rows if self.tokens[row] in named]
        if not whole:
            nothing = torch.full((len(COLUMNS),), torch.nan, dtype=torch.float64)
            return TwoStage(*(nothing[:0],) * 3, nothing[None, :][:0], *(nothing,) * 3), len(mapping)
        plan, ego = self.plan(), self._facts("ego", rows)
        totals = two_stage(
            whole,
            [self.tokens[row] for row in rows],
            self.result(human_filter)[rows],
            start=ego[:, :2],
            endpoint=endpoints(plan.poses[rows, 0], ego),
        )
        return totals, len(mapping) - len(whole)


def _previous(records: Sequence[Record]) -> dict[int, int]:
    """By place of a frame that of its previous one, where it is there: they know each other by time and place."""
    place = np.array([[record["time_us"] * 1e-6, *record["ego"][:2]] for record in records]).reshape(-1, 3) / SAME
    before = np.array([[record["previous_time_us"] * 1e-6, *record["previous_ego"][:2]] for record in records]).reshape(-1, 3) / SAME
    known = np.flatnonzero(np.isfinite(before).all(1))
    if not len(known):
        return {}
    _, found = cKDTree(place).query(before[known], distance_upper_bound=1.0)
    return {now: then for now, then in zip(known.tolist(), found.tolist(), strict=True) if then not in (now, len(place))}


# -- totals ------------------------------------------------------------------------------------------------------------


def write_results(directory: Path, records: Sequence[Record], facts: Facts, resamples: int, seed: int) -> dict[str, Any]:
    """Write the tables and the plans; return what is told of them, as JSON can hold it."""
    drives = {name: Drives(records, name, facts.mapping) for name in facts.sources}
    columns = list(dict.fromkeys(name for one in drives.values() for name in one.columns))
    tables = {name: _table(one, columns) for name, one in drives.items()}
    summary: dict[str, Any] = {
        "result": _told(directory, records, drives),
        "scenes": len(records),
        "human_filter": "fixed",
        "seed": seed,
        "resamples": resamples,
        "baseline": facts.baseline,
        "subject": facts.subject,
        "policies": {},
        "differences": {},
        "pairs": [],
        "failures": [],
    }
    for name, one in drives.items():
        found = dict(zip(columns, intervals(tables[name], resamples, seed), strict=True))
        stages = _write_tables(directory, name, one, facts)
        summary["policies"][name] = {
            "metrics": {column: of for column, of in found.items() if column in one.columns},
            "latency_ms": {**_latency(one.latency), "batch": facts.batch},
            "failed": int((~one.driven).sum()),
            "source": dict(facts.sources[name]),
            "two_stage": stages,
        }
        if name != facts.baseline:
            found = dict(zip(columns, differences(tables[name], tables[facts.baseline], resamples, seed), strict=True))
            summary["differences"][name] = {column: of for column, of in found.items() if of["count"]}
        summary["failures"] += [
            {"policy": name, "row": record["row"], "token": record["token"], "cause": of["error"]}
            for record, of in zip(records, one.found, strict=True)
            if "error" in of
        ]
    for ours, theirs in itertools.combinations(drives, 2):
        (of,) = differences(tables[ours][:, :1], tables[theirs][:, :1], resamples, seed)
        summary["pairs"].append({"policy": ours, "against": theirs, **of})
    _write_scores(directory / SCORES, drives, columns)
    return summary


def _table(drives: Drives, columns: Iterable[str]) -> Array:
    """Values "N M"; NaN in columns that a policy does not have."""
    nothing = np.full(len(drives.found), np.nan)
    return np.column_stack([drives.columns.get(column, nothing) for column in columns])


def _told(directory: Path, records: Sequence[Record], drives: Mapping[str, Drives]) -> str:
    unread = sum("error" in record for record in records)
    failed = sum(int((~one.driven).sum()) - unread for one in drives.values())
    parts = [f"{len(drives)} policies in {len(records)} scenes"]
    parts += [f"{unread} scenes cannot be read"] if unread else []
    parts += [f"{failed} drives failed, see {SUMMARY}"] if failed else []
    return f"{'; '.join(parts)}. Report: {directory / 'report.html'}"


def _latency(seconds: Array) -> dict[str, float | None]:
    known = seconds[~np.isnan(seconds)] * 1e3
    median, high = np.percentile(known, [50, 90]).tolist() if len(known) else (None, None)
    return {"median": median, "p90": high}


def _write_tables(directory: Path, name: str, drives: Drives, facts: Facts) -> dict[str, Any] | None:
    """The official tables and the plans of a policy; returns two-stage totals, if there are two stages."""
    for folder in (*FOLDERS.values(), PLANS):
        (directory / folder).mkdir(exist_ok=True)
    drives.plan().save(directory / PLANS / f"{name}.safetensors")
    totals: dict[str, Any] = {}
    for human_filter, folder in FOLDERS.items():
        path, result = directory / folder / f"{name}.csv", drives.result(human_filter)
        if not facts.mapping:
            leaderboard.write_results(path, drives.tokens, result)
            continue
        found, left_out = drives.two_stages(facts.mapping, human_filter)
        for stage in ("combined", "stage_one", "stage_two"):
            values = [None if np.isnan(value) else value for value in getattr(found, stage).tolist()]
            totals.setdefault(stage, {})[human_filter] = dict(zip(COLUMNS, values, strict=True))
        totals |= {"groups": len(facts.mapping) - left_out, "left_out": left_out}
        second = [record["row"] >= facts.first for record in drives.records]
        leaderboard.write_two_stages(path, drives.tokens, result, found, second, whole=not left_out)
    return totals or None


def _write_scores(path: Path, drives: Mapping[str, Drives], columns: Sequence[str]) -> None:
    """One table of every scene of every policy."""
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["policy", "row", "token", "valid", *columns, "seconds", "causes"])
    for name, one in drives.items():
        values = np.column_stack([_table(one, columns), one.latency])
        for record, of, row in zip(one.records, one.found, values.tolist(), strict=True):
            cells = ["" if np.isnan(value) else repr(value) for value in row]
            table.writerow([name, record["row"], record["token"], "error" not in of, *cells, of.get("error") or of["causes"]])
    write_whole(path, text.getvalue())
