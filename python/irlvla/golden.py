"""Golden files: scenes scored by the official NAVSIM v2.2 code, and the comparison of this package with them.

A file is an .npz of plain arrays (never pickles) with several scenes, inputs and official outputs, or the groups of a
two-stage aggregation. The schema is that of tests/golden/README.md. `compare` scores every candidate and reports, for each
metric, how many agree; those that the files mark as fragile (noise of a micrometre flips them) are counted apart.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from irlvla.errors import FileError
from irlvla.types import METRICS, STEPS, Epdms, Kind, Layer, Scene, StateIndex

Arrays = Mapping[str, NDArray[Any]]
Mask = NDArray[np.bool_]

#: Official names of the sub-metrics, in the order of METRICS.
OFFICIAL = (
    "no_at_fault_collisions",
    "drivable_area_compliance",
    "driving_direction_compliance",
    "traffic_light_compliance",
    "ego_progress",
    "time_to_collision_within_bound",
    "lane_keeping",
    "history_comfort",
    "extended_comfort",
)
FILTERABLE = ("nc", "dac", "ddc", "tlc", "ttc", "lk")  #: metrics whose human value can trigger the filter
#: Columns of `Pdms.values`: the metric of EPDMS nearest to each, and its official name.
PDMS = {
    "nc": "no_at_fault_collisions",
    "dac": "drivable_area_compliance",
    "ep": "ego_progress",
    "ttc": "time_to_collision_within_bound",
    "hc": "comfort",
    "ddc": "driving_direction_compliance",
}

# -- the schema --------------------------------------------------------------------------------------------------------

#: Offsets field -> the field whose rows it divides among ("" = scenes).
OFFSETS = {
    "centerline_off": "", "route_off": "", "poly_off": "", "red_off": "", "agent_off": "", "cand_off": "", "prev_off": "",
    "poly_ring_off": "poly_off", "ring_pt_off": "poly_ring_off",
}  # fmt: skip

#: Field -> (offsets of its rows or "" for scenes, kinds of dtype, shape of a row with None for any).
INPUTS: dict[str, tuple[str, str, tuple[int | None, ...]]] = {
    "scene_name": ("", "U", ()), "scene_family": ("", "U", ()), "t0_us": ("", "i", ()), "ego_state0": ("", "f", (11,)),
    "past_times_us": ("", "i", (None,)), "past_states": ("", "f", (None, 8)), "human_future": ("", "f", (None, 3)),
    "human_filter": ("", "b", ()), "t0_removal": ("", "b", ()), "pdm_poses": ("", "f", (41, 3)),
    "prev_t0_us": ("", "i", ()), "prev_ego_state0": ("", "f", (11,)),
    "centerline": ("centerline_off", "f", (3,)), "route_lane_ids": ("route_off", "iU", ()),
    "poly_id": ("poly_off", "iU", ()), "poly_type": ("poly_off", "i", ()), "poly_pts": ("ring_pt_off", "f", (2,)),
    "red_poly": ("red_off", "i", ()), "red_mask": ("red_off", "b", (41,)),
    "agent_token": ("agent_off", "iU", ()), "agent_category": ("agent_off", "i", ()), "agent_size": ("agent_off", "f", (2,)),
    "agent_valid": ("agent_off", "b", (None,)), "agent_state": ("agent_off", "f", (None, 5)),
    "candidates": ("cand_off", "f", (None, 3)), "cand_kind": ("cand_off", "U", ()), "prev_candidates": ("prev_off", "f", (None, 3)),
}  # fmt: skip

PER_CANDIDATE = {*OFFICIAL[:8], *(f"raw_{name}" for name in OFFICIAL[:8]), *(f"v1_{name}" for name in PDMS.values()), "v1_score"} | {
    "multiplicative_metrics_prod", "pdm_score_no_ec", "epdms_without_ec", "progress_raw", "batch_ego_progress", "batch_pdm_score",
    "collision_time_idx", "ttc_time_idx", "comfort_bits", "comfort_minmax", "ddc_max_oncoming_m", "lk_max_consecutive", "ego_areas",
    "center_in_intersection", "centerline_distance", "sim_states", "ref_poses", "velocity_profile", "curvature_profile", "fragile",
    "fragile_f32", "ec_fragile",
}  # fmt: skip
PER_PAIR = {"extended_comfort", "epdms", "ec_rms"}  # of a candidate and a previous plan
PER_PREVIOUS = {"prev_sim_states"}
OWN_OFFSETS = {"history_states": "hist_off", "in_polygons": "inpoly_off"}

TWO_STAGE = (
    "metrics", "ego_simulated_states", "start_time", "endpoint", "start_point", "group_now", "group_prev", "pair_off", "pair_now",
    "pair_prev", "out_two_frame_extended_comfort", "out_weight", "out_score", "out_group_score", "out_combined", "out_stage1", "out_stage2",
)  # fmt: skip


@dataclass(frozen=True)
class GoldenScene:
    """One scene of a golden file: inputs as the types of irlvla, official outputs as arrays.

    `expected` maps names of outputs (without "out_") to arrays: per candidate K ..., per candidate and previous plan K P ...,
    per previous plan P ..., per scene ... It is empty where a file holds inputs only.
    """

    name: str
    family: str
    scene: Scene  # a batch of one
    candidates: NDArray[np.float32]  # K T 3, ego frame
    kinds: tuple[str, ...]  # what each candidate is
    previous_candidates: NDArray[np.float32]  # P T 3, in the previous frame's ego frame
    human: NDArray[np.float64]  # T 3, the human's drive, also where the filter does not apply
    human_filter: bool
    remove_touching: bool  # agents in contact with the ego at t = 0 are removed (log replay), or not (reactive traffic)
    expected: Arrays

    @property
    def traffic(self) -> Literal["log", "replay_all"]:
        """What `irlvla.epdms` is told."""
        return "log" if self.remove_touching else "replay_all"

    @property
    def fragile(self) -> Mask:
        """K 9, METRICS order: decisions that noise of 1e-6 turns (before the human filter)."""
        return np.concatenate([self.expected["fragile"], self.expected["ec_fragile"][:, None]], 1)

    @property
    def human_fragile(self) -> Mask:
        """9, METRICS order: the same of the human's drive."""
        return np.append(self.expected["human_fragile"], False)


def find(paths: Iterable[str | os.PathLike[str]], only: str | None = None) -> list[Path]:
    """Golden files among files and folders (searched with their sub-folders), in order of name.

    With `only`, those of that set: in a folder of that name, or named so themselves ("public" finds public_00.npz).
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileError(f"{path} does not exist")
        inside = sorted(path.rglob("*.npz")) if path.is_dir() else [path]
        if not inside:
            raise FileError(f"{path} holds no .npz file")
        found += inside
    if only is not None:
        chosen = [path for path in found if only == path.parent.name or only == path.stem.rsplit("_", 1)[0] or only == path.stem]
        if not chosen:
            raise FileError(f"no golden set named {only!r}; found {', '.join(sorted({path.stem.rsplit('_', 1)[0] for path in found}))}")
        return chosen
    return found


def load(path: str | os.PathLike[str]) -> list[GoldenScene]:
    """The scenes of a golden file, or of all scene files in a folder. Raises `FileError` for a file that is not a whole one."""
    files = find([path])
    return [scene for file in files if files == [Path(path)] or not _is_two_stage(file) for scene in _load(file)]


def _load(path: Path) -> list[GoldenScene]:
    arrays = _read(path)
    try:
        _check(arrays)
        return list(_scenes(arrays))
    except (KeyError, IndexError, ValueError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{path} is not a golden file of scenes: {reason}") from error


def _is_two_stage(path: Path) -> bool:
    try:
        with np.load(path, allow_pickle=False) as file:
            return "pair_off" in file.files
    except Exception as error:
        raise FileError(f"{path} is not a golden file: {error or type(error).__name__}") from error


def _read(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """All arrays of a file. A damaged one fails its CRC-32."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise FileError(f"{path} is not a golden file, or a damaged one: {error or type(error).__name__}") from error


def _check(arrays: Arrays) -> None:
    """The inputs have the shapes, dtypes and offsets of the schema."""
    rows = {"": len(arrays["scene_name"])}
    for name, parent in OFFSETS.items():
        offsets = arrays[name]
        if offsets.dtype.kind != "i" or offsets.shape != (rows[parent] + 1,) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise ValueError(f"{name} must be {rows[parent] + 1} rising integers from 0")
        rows[name] = int(offsets[-1])
    for name, (group, kinds, shape) in INPUTS.items():
        array = arrays[name]
        fits = array.ndim == 1 + len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape[1:], strict=True))
        if array.dtype.kind not in kinds or not fits or len(array) != rows[group]:
            raise ValueError(f"{name} has {array.dtype} {array.shape}, it should have {rows[group]} rows of {kinds} {shape}")
    polygons, lights = np.diff(arrays["poly_off"]), np.repeat(np.arange(rows[""]), np.diff(arrays["red_off"]))
    if ((arrays["red_poly"] < 0) | (arrays["red_poly"] >= polygons[lights])).any():
        raise ValueError("red_poly points outside the scene's polygons")
    if arrays["agent_valid"].shape[1] != arrays["agent_state"].shape[1]:
        raise ValueError("agent_valid and agent_state have different numbers of steps")
    if "out_fragile" in arrays:
        for name in ("ec_fragile", "human_fragile", "pdm_fragile"):
            arrays[f"out_{name}"]
        for name, array in arrays.items():
            bare = name.removeprefix("out_")
            want = rows["cand_off"] if bare in PER_CANDIDATE else rows["prev_off"] if bare in PER_PREVIOUS else None
            if bare in PER_PAIR:
                want = int((np.diff(arrays["cand_off"]) * np.diff(arrays["prev_off"])).sum())
            if name.startswith("out_") and want not in (None, len(array)):
                raise ValueError(f"{name} has {len(array)} rows instead of {want}")


def _scenes(arrays: Arrays) -> Iterator[GoldenScene]:
    pairs = np.concatenate([[0], np.cumsum(np.diff(arrays["cand_off"]) * np.diff(arrays["prev_off"]))])
    has_outputs = "out_fragile" in arrays

    def rows(name: str, i: int) -> NDArray[Any]:
        offsets = arrays[INPUTS[name][0]]
        return arrays[name][offsets[i] : offsets[i + 1]]

    for i, name in enumerate(arrays["scene_name"]):
        layer, route = rows("poly_type", i).astype(np.int64), np.isin(rows("poly_id", i), rows("route_lane_ids", i))
        on_route = route & np.isin(layer, (Layer.LANE, Layer.LANE_CONNECTOR))
        red = on_route[rows("red_poly", i)]  # the devkit keeps the lights of the route only
        first, last = arrays["poly_off"][i : i + 2]
        rings = arrays["poly_ring_off"][first : last + 1]
        points = arrays["ring_pt_off"][rings[0] : rings[-1] + 1]
        valid = rows("agent_valid", i)
        filtered, remove_touching = bool(arrays["human_filter"][i]), bool(arrays["t0_removal"][i])
        human = arrays["human_future"][i].astype(np.float64)
        scene = Scene(
            token=(str(name),),
            time_us=_tensor(arrays["t0_us"][i : i + 1], np.int64),
            ego=_tensor(arrays["ego_state0"][i : i + 1]),
            history_time_us=_tensor(arrays["past_times_us"][i : i + 1], np.int64),
            history=_tensor(arrays["past_states"][i : i + 1]),
            human=_tensor(human if filtered else np.full_like(human, np.nan))[None],
            human_dt=4.0 / len(human),
            human_values=_human_values(arrays, i) if has_outputs and not remove_touching else None,
            reference=_tensor(arrays["pdm_poses"][i : i + 1]),
            previous_time_us=_tensor(arrays["prev_t0_us"][i : i + 1], np.int64),
            previous_ego=_tensor(arrays["prev_ego_state0"][i : i + 1]),
            speed_limit=torch.full((1,), math.nan, dtype=torch.float64),
            agent_offsets=torch.tensor([0, len(valid)]),
            agent_token=tuple(map(str, rows("agent_token", i))),
            agent_kind=_tensor(rows("agent_category", i), np.int64),
            agent_size=_tensor(rows("agent_size", i)),
            agent_valid=_tensor(valid, np.bool_),
            agent_state=_tensor(rows("agent_state", i)),
            polygon_offsets=torch.tensor([0, len(layer)]),
            polygon_layer=_tensor(layer, np.int64),
            polygon_on_route=_tensor(on_route, np.bool_),
            ring_offsets=_tensor(rings - rings[0], np.int64),
            point_offsets=_tensor(points - points[0], np.int64),
            points=_tensor(arrays["poly_pts"][points[0] : points[-1]]),
            light_offsets=torch.tensor([0, int(red.sum())]),
            light_polygon=_tensor(rows("red_poly", i)[red], np.int64),
            light_red=_tensor(rows("red_mask", i)[red], np.bool_),
            centerline_offsets=torch.tensor([0, len(rows("centerline", i))]),
            centerline=_tensor(rows("centerline", i)),
        )
        yield GoldenScene(
            name=str(name),
            family=str(arrays["scene_family"][i]),
            scene=scene,
            candidates=rows("candidates", i).astype(np.float32),
            kinds=tuple(map(str, rows("cand_kind", i))),
            previous_candidates=rows("prev_candidates", i).astype(np.float32),
            human=human,
            human_filter=filtered,
            remove_touching=remove_touching,
            expected=_outputs(arrays, i, pairs) if has_outputs else {},
        )


def _tensor(array: NDArray[Any], dtype: Any = np.float64) -> Tensor:
    return torch.from_numpy(np.array(array, dtype))


def _human_values(arrays: Arrays, i: int) -> Float[Tensor, "1 9"]:
    """The human's sub-metrics, an input where he met traffic of his own; NaN where the filter does not apply."""
    values = [float(arrays[f"out_human_{name}"][i]) for name in OFFICIAL[:8]] if arrays["human_filter"][i] else [math.nan] * 8
    return torch.tensor([[*values, math.nan]], dtype=torch.float64)


def _outputs(arrays: Arrays, i: int, pairs: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    (c0, c1), (p0, p1) = arrays["cand_off"][i : i + 2], arrays["prev_off"][i : i + 2]
    outputs = {}
    for key, array in arrays.items():
        name = key.removeprefix("out_")
        if not key.startswith("out_"):
            continue
        if name in PER_CANDIDATE:
            outputs[name] = array[c0:c1]
        elif name in PER_PREVIOUS:
            outputs[name] = array[p0:p1]
        elif name in PER_PAIR:
            outputs[name] = array[pairs[i] : pairs[i + 1]].reshape(c1 - c0, p1 - p0, *array.shape[1:])
        elif name in OWN_OFFSETS:
            outputs[name] = array[slice(*arrays[OWN_OFFSETS[name]][i : i + 2])]
        else:
            outputs[name] = array[i]
    if "in_polygons" in outputs:
        shape = (c1 - c0, 41, int(np.diff(arrays["poly_off"])[i]), 5)
        outputs["in_polygons"] = np.unpackbits(outputs["in_polygons"])[: math.prod(shape)].reshape(shape).astype(bool)
    return outputs


# -- the comparison ----------------------------------------------------------------------------------------------------


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
        if _is_two_stage(path):
            _compare_two_stage(path, report)
        elif scenes := [scene for scene in _load(path) if scene.expected]:
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
    from irlvla import ops
    from irlvla.scoring import epdms

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
    result = epdms(scene, plans, scene_index=index, traffic=traffic, details=True, pdms="v1_score" in has)
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
            doubtful, tolerance = raw_fragile[:, METRICS.index(metric)], 1e-9 if metric == "ep" else 0.0
            check(f"pdms {metric}", f"v1_{official}", result.pdms.values[:, column], doubtful, tolerance)
        check("pdms score", "v1_score", result.pdms.score(), any_raw, 1e-9)

    # With each previous plan: the call of a user, timed (the first call above has prepared the scenes).
    for i in range(p):
        start = _now(scene)
        result = epdms(scene, plans, scene_index=index, previous=previous[:, i], traffic=traffic)
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
    from irlvla.aggregation import two_stage

    arrays = _read(path)
    if missing := [name for name in TWO_STAGE if name not in arrays]:
        raise FileError(f"{path} is not a golden file of the two-stage aggregation: it has no {', '.join(missing)}")
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


# -- one scene by hand -------------------------------------------------------------------------------------------------

#: A car parked 30 m ahead on a road of two lanes, at 10 m/s: brake, drive on, leave the road, change lane and pass.
HANDMADE_PLANS = {
    "brake": [(8.0 * t - t * t, 0.0, 0.0) for t in np.arange(0.5, 4.5, 0.5)],
    "drive on": [(10.0 * t, 0.0, 0.0) for t in np.arange(0.5, 4.5, 0.5)],
    "leave the road": [(10.0 * t, -0.4 * t * t, -0.08 * t) for t in np.arange(0.5, 4.5, 0.5)],
    "pass": [
        (10.0 * t, 1.75 - 1.75 * math.cos(math.pi * min(t / 2.5, 1.0)), 0.22 * math.sin(math.pi * min(t / 2.5, 1.0)))
        for t in np.arange(0.5, 4.5, 0.5)
    ],
}


#: Their sub-metrics (order of METRICS; the previous plan is to drive on) and PDMS, from an independent implementation in numpy.
HANDMADE_VALUES = (
    (1.0, 1.0, 1.0, 1.0, 0.9533239915233951, 1.0, 1.0, 1.0, 0.0),
    (0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0),
    (1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0),
    (1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0),
)
HANDMADE_SCORES = (0.8604137473510609, 0.0, 0.0, 0.75)
HANDMADE_PDMS = (0.9805516631347478, 0.0, 0.0, 1.0)


def self_check(device: str | torch.device = "cpu") -> list[str]:
    """Score the hand-made scene on a device. What is wrong, one line each; empty if nothing is."""
    from irlvla.scoring import epdms

    plans = torch.tensor(list(HANDMADE_PLANS.values()), dtype=torch.float64, device=device)[None]
    result = epdms(handmade_scene().to(device), plans, previous=plans[:, 1], pdms=True)
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


def handmade_scene() -> Scene:
    """The scene of HANDMADE_PLANS: small enough to be read here, with an answer in every metric."""
    steps = torch.arange(51) * 0.1
    centerline = torch.stack([torch.arange(-20.0, 121.0, 2.0), torch.zeros(71), torch.zeros(71)], -1).double()
    back = torch.tensor([-1.5, -1.0, -0.5, 0.0], dtype=torch.float64)
    ego = torch.tensor([[0.0, 0.0, 0.0, 10.0, *[0.0] * 7]], dtype=torch.float64)
    parked, walker = torch.zeros(51, 5, dtype=torch.float64), torch.zeros(51, 5, dtype=torch.float64)
    parked[:, 0] = 30.0
    walker[:, 0], walker[:, 1], walker[:, 3] = -10.0 + 1.5 * steps, -5.0, 1.5
    lanes = [(-20.0, -1.75, 120.0, 1.75), (-20.0, 1.75, 120.0, 7.25), (-20.0, -1.75, 120.0, 7.25)]
    reference = torch.zeros(1, STEPS, 3, dtype=torch.float64)
    reference[..., 0] = 9.0 * steps[:STEPS] - 1.125 * steps[:STEPS] ** 2
    return Scene(
        token=("handmade",),
        time_us=torch.tensor([1_000_000_000]),
        ego=ego,
        history_time_us=1_000_000_000 + (back * 1e6).long()[None],
        history=torch.stack([10.0 * back, *[torch.zeros(4)] * 2, torch.full((4,), 10.0), *[torch.zeros(4)] * 4], -1).double()[None],
        human=torch.tensor([HANDMADE_PLANS["brake"]], dtype=torch.float64),
        human_dt=0.5,
        human_values=None,
        reference=reference,
        previous_time_us=torch.tensor([999_500_000]),
        previous_ego=ego - torch.tensor([[5.0, *[0.0] * 10]]),
        speed_limit=torch.full((1,), math.nan, dtype=torch.float64),
        agent_offsets=torch.tensor([0, 2]),
        agent_token=("parked", "walker"),
        agent_kind=torch.tensor([Kind.VEHICLE, Kind.PEDESTRIAN]),
        agent_size=torch.tensor([[4.5, 2.0], [0.7, 0.7]], dtype=torch.float64),
        agent_valid=torch.ones(2, 51, dtype=torch.bool),
        agent_state=torch.stack([parked, walker]),
        polygon_offsets=torch.tensor([0, 3]),
        polygon_layer=torch.tensor([Layer.LANE, Layer.LANE, Layer.ROADBLOCK]),
        polygon_on_route=torch.tensor([True, True, False]),
        ring_offsets=torch.arange(4),
        point_offsets=torch.arange(0, 13, 4),
        points=torch.tensor([(x, y) for x0, y0, x1, y1 in lanes for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))], dtype=torch.float64),
        light_offsets=torch.tensor([0, 0]),
        light_polygon=torch.zeros(0, dtype=torch.int64),
        light_red=torch.zeros(0, STEPS, dtype=torch.bool),
        centerline_offsets=torch.tensor([0, 71]),
        centerline=centerline,
    )
