"""Scenes with known answers: golden files, scored by the official NAVSIM v2.2 code, and one scene written by hand.

A file is an .npz of plain arrays (never pickles) with several scenes, inputs and official outputs, or the groups of a
two-stage aggregation. The schema is that of tests/golden/README.md.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from irlvla.errors import FileError
from irlvla.files import files_under
from irlvla.types import STEPS, Kind, Layer, Scene

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
        inside = files_under(path, "*.npz") if path.is_dir() else [path]
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
    return [scene for file in files if files == [Path(path)] or not is_two_stage(file) for scene in _load(file)]


def is_two_stage(path: Path) -> bool:
    """Whether a golden file holds the groups of a two-stage aggregation, not scenes."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return "pair_off" in file.files
    except Exception as error:
        raise FileError(f"{path} is not a golden file: {error or type(error).__name__}") from error


def load_two_stage(path: Path) -> Arrays:
    """The arrays of a golden file of the two-stage aggregation. Raises `FileError` if any is missing."""
    arrays = _read(path)
    if missing := [name for name in TWO_STAGE if name not in arrays]:
        raise FileError(f"{path} is not a golden file of the two-stage aggregation: it has no {', '.join(missing)}")
    return arrays


def _load(path: Path) -> list[GoldenScene]:
    arrays = _read(path)
    try:
        _check(arrays)
        return list(_scenes(arrays))
    except (KeyError, IndexError, ValueError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{path} is not a golden file of scenes: {reason}") from error


def _read(path: Path) -> dict[str, NDArray[Any]]:
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
