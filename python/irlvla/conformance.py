"""The comparison of this package with golden files, and a quick check of one scene.

`compare` scores every candidate and reports, for each metric, how many agree; those that the files mark as fragile (noise of
a micrometre flips them) are counted apart.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from irlvla import ops, scoring
from irlvla.aggregation import two_stage
from irlvla.errors import FileError
from irlvla.golden import (
    HANDMADE_PDMS,
    HANDMADE_PLANS,
    HANDMADE_SCORES,
    HANDMADE_VALUES,
    OFFICIAL,
    PDMS,
    GoldenScene,
    Mask,
    find,
    handmade_scene,
    is_two_stage,
    load,
    load_two_stage,
)
from irlvla.types import METRICS, Epdms, Scene, StateIndex

FILTERABLE = ("nc", "dac", "ddc", "tlc", "ttc", "lk")  #: metrics whose human value can trigger the filter


@dataclass
class Check:
    """How well one quantity agrees. A candidate differs if any of its values is off by more than the tolerance."""

    name: str
    tolerance: float = 0.0
    candidates: int = 0
    mismatches: int = 0  # among candidates that are not fragile
    fragile: int = 0  # candidates that the files mark as undecidable in double precision
    fragile_mismatches: int = 0
    largest_error: float = 0.0  # among candidates that are not fragile
    first: tuple[str, int] | None = None  # scene and candidate of the first mismatch

    def add(self, expected: Any, actual: Any, fragile: Mask, where: Sequence[tuple[str, int]]) -> None:
        """Rows of expected and actual values (NaN equals NaN), whether each is fragile, and its scene and candidate."""
        want = np.asarray(expected, np.float64).reshape(len(where), -1)
        have = (actual.detach().cpu().numpy() if isinstance(actual, Tensor) else np.asarray(actual)).astype(np.float64).reshape(want.shape)
        error = np.where(np.isnan(want) & np.isnan(have), 0.0, np.abs(want - have))
        error = np.nan_to_num(error, nan=np.inf).max(1, initial=0.0)
        wrong = (error > self.tolerance) & ~fragile
        self.candidates += len(where)
        self.fragile += int(fragile.sum())
        self.fragile_mismatches += int(((error > self.tolerance) & fragile).sum())
        self.mismatches += int(wrong.sum())
        self.largest_error = max(self.largest_error, float(error[~fragile].max(initial=0.0)))
        if wrong.any() and self.first is None:
            self.first = where[int(np.argmax(wrong))]


@dataclass
class Report:
    """The comparison of one or more golden files with what this package computes."""

    device: str
    files: list[str] = dataclasses.field(default_factory=list)
    skipped: list[str] = dataclasses.field(default_factory=list)  # files with inputs only
    scenes: int = 0
    candidates: int = 0
    scored: int = 0  # candidates passed through the timed calls of `irlvla.epdms`
    seconds: float = 0.0  # that these calls took, scenes prepared
    checks: dict[str, Check] = dataclasses.field(default_factory=dict)

    @property
    def mismatches(self) -> int:
        return sum(check.mismatches for check in self.checks.values())

    @property
    def rate(self) -> float:
        """Candidates scored per second."""
        return self.scored / self.seconds if self.seconds else math.nan

    def check(self, name: str, tolerance: float = 0.0) -> Check:
        return self.checks.setdefault(name, Check(name, tolerance))

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: a number that is not finite becomes None."""
        checks = [dataclasses.asdict(check) for check in self.checks.values()]
        for check in checks:
            check["largest_error"] = check["largest_error"] if math.isfinite(check["largest_error"]) else None
            check["first"] = None if check["first"] is None else {"scene": check["first"][0], "candidate": check["first"][1]}
        rate = {"candidates_per_second": self.rate if self.seconds else None}
        return {
            "device": self.device, "files": self.files, "skipped": self.skipped, "scenes": self.scenes, "candidates": self.candidates,
            **rate, "mismatches": self.mismatches, "checks": checks,
        }  # fmt: skip


def compare(paths: Iterable[str | os.PathLike[str]], device: str | torch.device = "cpu", only: str | None = None) -> Report:
    """Score every candidate of golden files on a device and compare all that can be compared."""
    report = Report(str(device))
    for path in find(paths, only):
        if is_two_stage(path):
            _compare_two_stage(path, report)
        elif scenes := [scene for scene in load(path) if scene.expected]:
            for group in _alike(scenes):
                report.scenes += len(group)
                report.candidates += sum(len(golden.candidates) for golden in group)
                _compare_group(group, report, device)
        else:
            report.skipped.append(str(path))
            continue
        report.files.append(str(path))
    if not report.files:
        raise FileError(f"{', '.join(report.skipped)}: inputs only, there is nothing to compare with")
    return report


def _alike(scenes: Sequence[GoldenScene]) -> Iterator[list[GoldenScene]]:
    """Scenes that can be scored in one call: of the same shapes and rules."""
    groups: dict[Any, list[GoldenScene]] = defaultdict(list)
    for golden in scenes:
        scene = golden.scene
        plans = (golden.candidates.shape[1:], golden.previous_candidates.shape, golden.human.shape)
        packed = (scene.history.shape, scene.agent_valid.shape[1], scene.human_values is None)
        groups[plans, packed, golden.traffic, frozenset(golden.expected)].append(golden)
    yield from groups.values()


def _compare_group(group: Sequence[GoldenScene], report: Report, device: str | torch.device) -> None:
    """Scenes of the same shapes: one call for the details, one for each previous plan, one for human and reference."""
    traffic, has = group[0].traffic, group[0].expected.keys()
    scene = Scene.cat([golden.scene for golden in group]).to(device)
    plans = torch.from_numpy(np.concatenate([golden.candidates for golden in group])).to(device)
    previous = torch.from_numpy(np.stack([golden.previous_candidates for golden in group])).to(device)
    scene_of = np.repeat(np.arange(len(group)), [len(golden.candidates) for golden in group])
    index = torch.from_numpy(scene_of).to(device)
    (b, p), n = previous.shape[:2], len(plans)
    candidates = [(golden.name, candidate) for golden in group for candidate in range(len(golden.candidates))]
    scenes = [(golden.name, -1) for golden in group]

    def stack(name: str) -> NDArray[Any]:
        return np.stack([golden.expected[name] for golden in group])

    raw_fragile, human_fragile = np.concatenate([golden.fragile for golden in group]), np.stack([golden.human_fragile for golden in group])
    motion_fragile, reference_fragile = _any(raw_fragile[:, :8]), stack("pdm_fragile")
    yardstick_fragile = _any(reference_fragile[:, :5])[scene_of]  # NC, DAC, DDC, TLC, progress of the reference decide EP
    raw_fragile[:, METRICS.index("ep")] |= yardstick_fragile
    fragile: Mask = raw_fragile | human_fragile[scene_of]
    any_raw, anything, nothing = _any(raw_fragile[:, :8]), _any(fragile[:, :8]), np.zeros(n, bool)

    def check(
        label: str, official: str, actual: Tensor, doubtful: Mask = nothing, tolerance: float = 0.0, before: int | None = None
    ) -> None:
        """Compare a value of each candidate (with previous plan number `before`) with what the files say, if they say it."""
        if official in has:
            expected = np.concatenate([golden.expected[official] for golden in group])
            report.check(label, tolerance).add(expected if before is None else expected[:, before], actual, doubtful, candidates)

    # Everything but extended comfort, with the reasons.
    result = scoring.epdms(scene, plans, scene_index=index, traffic=traffic, details=True, pdms="v1_score" in has)
    raw, details = result.values if result.raw is None else result.raw, result.details
    assert details is not None
    for column, (metric, official) in enumerate(zip(METRICS[:8], OFFICIAL[:8], strict=True)):
        check(metric, official, result.values[:, column], fragile[:, column], 1e-9 if metric == "ep" else 0.0)
        check(f"{metric} unfiltered", f"raw_{official}", raw[:, column], raw_fragile[:, column])
    check("score without ec", "epdms_without_ec", result.score(), anything, 1e-9)
    check("score without ec unfiltered", "pdm_score_no_ec", Epdms(raw).score(), any_raw, 1e-9)
    check("collision step", "collision_time_idx", details.collision_step, raw_fragile[:, 0])
    check("ttc step", "ttc_time_idx", details.ttc_step, raw_fragile[:, 5])
    check("areas", "ego_areas", torch.stack([details.multiple_lanes, details.off_road, details.off_route], -1), motion_fragile)
    check("in intersection", "center_in_intersection", details.in_intersection, motion_fragile)
    check("oncoming metres", "ddc_max_oncoming_m", details.oncoming_metres, raw_fragile[:, 2], 1e-8)
    check("off-centre steps", "lk_max_consecutive", details.off_centre_steps, raw_fragile[:, 6])
    check("comfort bits", "comfort_bits", details.comfort, raw_fragile[:, 7])
    check("progress", "progress_raw", details.progress, raw_fragile[:, 4], 1e-8)
    if result.pdms is not None:
        for column, (metric, official) in enumerate(PDMS.items()):
            decided_by = ("ep", "nc", "dac") if metric == "ep" else (metric,)  # EP of v1 multiplies progress by NC and DAC
            doubtful = _any(raw_fragile[:, [METRICS.index(name) for name in decided_by]])
            check(f"pdms {metric}", f"v1_{official}", result.pdms.values[:, column], doubtful, 1e-9 if metric == "ep" else 0.0)
        check("pdms score", "v1_score", result.pdms.score(), any_raw, 1e-9)

    # With each previous plan: the call of a user, timed (the first call above has prepared the scenes).
    for i in range(p):
        start = _now(scene)
        result = scoring.epdms(scene, plans, scene_index=index, previous=previous[:, i], traffic=traffic)
        report.seconds += _now(scene) - start
        report.scored += n
        check("ec", "extended_comfort", result.ec, raw_fragile[:, 8], 0.0, i)
        check("score", "epdms", result.score(), _any(fragile), 1e-9, i)

    # Simulated states; those of the previous plans, and how they differ.
    before = ops.simulate(previous.flatten(0, 1), scene.previous_ego.repeat_interleave(p, 0), scene.previous_time_us.repeat_interleave(p))
    shift = ((scene.time_us - scene.previous_time_us).double() / 1e5).round().long()
    if "sim_states" in has:
        check(
            "states",
            "sim_states",
            _turned(details.states, np.concatenate([golden.expected["sim_states"] for golden in group])),
            nothing,
            1e-8,
        )
    for i in range(p):
        _, rms = ops.extended_comfort(details.states, before.unflatten(0, (b, p))[index, i], shift[index])
        check("ec differences", "ec_rms", rms, nothing, 1e-8, i)
    if "prev_sim_states" in has:
        expected = np.concatenate([golden.expected["prev_sim_states"] for golden in group])
        plans_before = [(golden.name, i) for golden in group for i in range(p)]
        report.check("previous states", 1e-8).add(expected, _turned(before, expected), np.zeros(b * p, bool), plans_before)

    # The reference (PDM-Closed), and the human, scored alone, as the filter does: his EP and HC are 1 by rule.
    human = torch.from_numpy(np.stack([golden.human for golden in group])).to(device)
    drives = {
        "reference": (ops.track(scene.reference, scene.ego, scene.time_us), "pdm", (*FILTERABLE, "hc"), reference_fragile),
        "human": (ops.simulate(human, scene.ego, scene.time_us, scene.human_dt), "human", FILTERABLE, human_fragile),
    }
    if scene.human_values is not None:
        del drives["human"]  # met traffic of his own
    for label, (states, official, metrics, doubtful) in drives.items():
        values, *_ = ops.score(
            ops.prepare(scene), states, torch.arange(b, device=device), source=ops.STATES, remove_touching=traffic == "log"
        )
        for metric in metrics:
            column = METRICS.index(metric)
            report.check(f"{label} {metric}").add(stack(f"{official}_{OFFICIAL[column]}"), values[:, column], doubtful[:, column], scenes)
        if f"{official}_sim_states" in has:
            expected = stack(f"{official}_sim_states")
            report.check(f"{label} states", 1e-8).add(expected, _turned(states, expected), np.zeros(b, bool), scenes)
    product = np.prod([stack(f"pdm_{name}") for name in OFFICIAL[:4]], 0) * stack("pdm_progress_raw")
    report.check("reference progress", 1e-8).add(product[scene_of], details.reference_progress, yardstick_fragile, candidates)


def _any(flags: NDArray[Any]) -> Mask:
    """Rows with any flag."""
    return np.asarray(flags.any(1), np.bool_)


def _turned(states: Tensor, expected: NDArray[Any]) -> Tensor:
    """States with their headings turned by whole turns to where they are nearest the expected ones."""
    turned = states.detach().cpu().double().reshape(expected.shape).clone()
    heading = turned[..., StateIndex.HEADING]
    heading += 2 * math.pi * torch.round((torch.from_numpy(expected[..., StateIndex.HEADING]) - heading) / (2 * math.pi))
    return turned


def _now(scene: Scene) -> float:
    if scene.device.type == "cuda":
        torch.cuda.synchronize(scene.device)
    return time.perf_counter()


def _compare_two_stage(path: Path, report: Report) -> None:
    arrays = load_two_stage(path)
    try:
        tokens, bounds = [str(i) for i in range(len(arrays["metrics"]))], arrays["pair_off"]
        pairs = [(tokens[a], tokens[b]) for a, b in zip(arrays["pair_now"], arrays["pair_prev"], strict=True)]
        recorded = [(tokens[a], tokens[b]) for a, b in zip(arrays["group_now"], arrays["group_prev"], strict=True)]
        mapping = {key: pairs[first:last] for key, first, last in zip(recorded, bounds, bounds[1:], strict=False)}
        values = np.concatenate([arrays["metrics"], np.full((len(tokens), 1), np.nan)], 1)
        result = two_stage(
            mapping, tokens, values, start=arrays["start_point"], endpoint=arrays["endpoint"], states=arrays["ego_simulated_states"],
            time_us=np.rint(arrays["start_time"] * 1e6),
        )  # fmt: skip
        for name, official, actual, tolerance in (
            ("two-stage ec", "two_frame_extended_comfort", result.ec, 0.0),
            ("two-stage weight", "weight", result.weight, 1e-12),
            ("two-stage score", "score", result.score, 1e-9),
            ("two-stage group", "group_score", result.group[:, -1], 1e-9),
            ("two-stage combined", "combined", result.combined, 1e-9),
            ("two-stage stage one", "stage1", result.stage_one, 1e-9),
            ("two-stage stage two", "stage2", result.stage_two, 1e-9),
        ):
            rows = len(actual)
            report.check(name, tolerance).add(
                arrays[f"out_{official}"], actual, np.zeros(rows, bool), [(path.stem, i) for i in range(rows)]
            )
    except (ValueError, IndexError, TypeError) as error:
        raise FileError(f"{path} is not a golden file of the two-stage aggregation: {error}") from error


def self_check(device: str | torch.device = "cpu") -> list[str]:
    """Score the hand-made scene on a device. What is wrong, one line each; empty if nothing is."""
    plans = torch.tensor(list(HANDMADE_PLANS.values()), dtype=torch.float64, device=device)[None]
    result = scoring.epdms(handmade_scene().to(device), plans, previous=plans[:, 1], pdms=True)
    assert result.pdms is not None
    wrong = []
    for row, plan in enumerate(HANDMADE_PLANS):
        computed = {**dict(zip(METRICS, result.values[0, row].tolist(), strict=True))}
        computed |= {"score": result.score()[0, row].item(), "PDMS": result.pdms.score()[0, row].item()}
        known = dict(zip((*METRICS, "score", "PDMS"), (*HANDMADE_VALUES[row], HANDMADE_SCORES[row], HANDMADE_PDMS[row]), strict=True))
        wrong += [
            f"{plan}: {name} is {computed[name]}, not {known[name]}" for name in known if not abs(computed[name] - known[name]) <= 1e-9
        ]
    return wrong
