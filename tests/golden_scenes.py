"""Reads golden files: scenes with candidates and what the official NAVSIM v2.2 code says of them.

The schema is described in tests/golden/README.md: flat arrays with offsets, numpy only, no pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from irlvla.types import METRICS, Layer, Scene

#: Official names of METRICS, in that order; the last is not part of `fragile`.
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
#: Offsets of the ragged outputs; others have one row per candidate, or per scene.
OUTPUT_OFFSETS = {
    "out_prev_sim_states": "prev_off",
    "out_extended_comfort": "cp_off",
    "out_epdms": "cp_off",
    "out_ec_rms": "cp_off",
    "out_history_states": "hist_off",
    "out_in_polygons": "inpoly_off",
}


@dataclass(frozen=True)
class GoldenScene:
    """One scene (batch of one) with N candidates, P plans of the previous frame and the official values."""

    name: str
    family: str
    scene: Scene
    candidates: np.ndarray  # N 8 3 float32, ego frame
    previous_candidates: np.ndarray  # P 8 3 float32, frame of the previous ego
    remove_touching: bool  # agents in contact at t = 0 are removed (log replay), or not (reactive traffic)
    human_filter: bool
    expected: dict[str, np.ndarray]  # keys of the schema without "out_"

    @property
    def fragile(self) -> np.ndarray:
        """N 9, METRICS order: decisions of the candidate that noise of 1e-6 turns."""
        return np.concatenate([self.expected["fragile"], self.expected["ec_fragile"][:, None]], 1)

    @property
    def human_fragile(self) -> np.ndarray:
        """9, METRICS order: the same of the human drive."""
        return np.append(self.expected["human_fragile"], False)


def load(path: str | Path) -> list[GoldenScene]:
    """Scenes of one file, or of all files of a directory in the order of their names."""
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    scenes = []
    for file in files:
        with np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        scenes += [unpack(arrays, i) for i in range(len(arrays["scene_name"]))]
    return scenes


def rows(arrays: Mapping[str, np.ndarray], key: str, offsets: str, i: int) -> np.ndarray:
    return arrays[key][arrays[offsets][i] : arrays[offsets][i + 1]]


def unpack(arrays: Mapping[str, np.ndarray], i: int) -> GoldenScene:
    expected = expected_of(arrays, i)
    human_filter, remove_touching = bool(arrays["human_filter"][i]), bool(arrays["t0_removal"][i])
    human = arrays["human_future"][i] if human_filter else np.full_like(arrays["human_future"][i], np.nan)
    own_traffic = human_filter and not remove_touching  # reactive: the human met other traffic than the file holds
    values = [expected["human_" + name] for name in OFFICIAL[:-1]] + [np.nan] if own_traffic else None
    scene = Scene(
        token=(str(arrays["scene_name"][i]),),
        time_us=tensor(arrays["t0_us"][i])[None],
        ego=tensor(arrays["ego_state0"][i])[None],
        history_time_us=tensor(arrays["past_times_us"][i])[None],
        history=tensor(arrays["past_states"][i])[None],
        human=tensor(human)[None],
        human_dt=0.5,
        human_values=None if values is None else tensor(np.array(values, float))[None],
        reference=tensor(arrays["pdm_poses"][i])[None],
        previous_time_us=tensor(arrays["prev_t0_us"][i])[None],
        previous_ego=tensor(arrays["prev_ego_state0"][i])[None],
        speed_limit=torch.full((1,), torch.nan, dtype=torch.float64),
        **agents_of(arrays, i),
        **polygons_of(arrays, i),
        centerline_offsets=spans(len(rows(arrays, "centerline", "centerline_off", i))),
        centerline=tensor(rows(arrays, "centerline", "centerline_off", i)),
    )
    return GoldenScene(
        name=str(arrays["scene_name"][i]),
        family=str(arrays["scene_family"][i]),
        scene=scene,
        candidates=rows(arrays, "candidates", "cand_off", i),
        previous_candidates=rows(arrays, "prev_candidates", "prev_off", i),
        remove_touching=remove_touching,
        human_filter=human_filter,
        expected=expected,
    )


def agents_of(arrays: Mapping[str, np.ndarray], i: int) -> dict[str, object]:
    agent = {key: rows(arrays, f"agent_{key}", "agent_off", i) for key in ("token", "category", "size", "valid", "state")}
    return {
        "agent_offsets": spans(len(agent["token"])),
        "agent_token": tuple(str(token) for token in agent["token"]),
        "agent_kind": tensor(agent["category"].astype(np.int64)),
        "agent_size": tensor(agent["size"]),
        "agent_valid": tensor(agent["valid"]),
        "agent_state": tensor(agent["state"]),
    }


def polygons_of(arrays: Mapping[str, np.ndarray], i: int) -> dict[str, torch.Tensor]:
    first, last = arrays["poly_off"][i], arrays["poly_off"][i + 1]
    rings = arrays["poly_ring_off"][first : last + 1]
    points = arrays["ring_pt_off"][rings[0] : rings[-1] + 1]
    layer = arrays["poly_type"][first:last].astype(np.int64)
    ids, route = arrays["poly_id"][first:last], rows(arrays, "route_lane_ids", "route_off", i)
    on_route = np.isin(layer, (Layer.LANE, Layer.LANE_CONNECTOR)) & np.isin(ids, route)
    lights, red = rows(arrays, "red_poly", "red_off", i), rows(arrays, "red_mask", "red_off", i)
    kept = on_route[lights]  # lights of other connectors never reach the scorer
    return {
        "polygon_offsets": spans(len(layer)),
        "polygon_layer": tensor(layer),
        "polygon_on_route": tensor(on_route),
        "ring_offsets": tensor(rings - rings[0]),
        "point_offsets": tensor(points - points[0]),
        "points": tensor(arrays["poly_pts"][points[0] : points[-1]]),
        "light_offsets": spans(int(kept.sum())),
        "light_polygon": tensor(lights[kept].astype(np.int64)),
        "light_red": tensor(red[kept]),
    }


def expected_of(arrays: Mapping[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    expected = {}
    scenes, candidates = len(arrays["scene_name"]), len(arrays["candidates"])
    count = int(arrays["cand_off"][i + 1] - arrays["cand_off"][i])
    previous = int(arrays["prev_off"][i + 1] - arrays["prev_off"][i])
    for key in (key for key in arrays if key.startswith("out_")):
        name = key.removeprefix("out_")
        if key in OUTPUT_OFFSETS:
            value = rows(arrays, key, OUTPUT_OFFSETS[key], i)
            expected[name] = value.reshape(count, previous, *value.shape[1:]) if OUTPUT_OFFSETS[key] == "cp_off" else value
        elif name.startswith(("pdm_", "human_")) and name != "pdm_score_no_ec":
            assert len(arrays[key]) == scenes
            expected[name] = arrays[key][i]
        else:
            assert len(arrays[key]) == candidates
            expected[name] = rows(arrays, key, "cand_off", i)
    return expected


def spans(count: int) -> torch.Tensor:
    return torch.tensor([0, count])


def tensor(value: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(value))


assert len(OFFICIAL) == len(METRICS)
