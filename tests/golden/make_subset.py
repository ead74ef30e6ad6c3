"""Writes the golden files of this folder: a selection of scenes and outputs from the full golden sets (see README.md).

usage: python make_subset.py FOLDER        FOLDER holds public/ and adversarial/ with their npz files
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]

METRICS = ("no_at_fault_collisions", "drivable_area_compliance", "driving_direction_compliance", "traffic_light_compliance")
METRICS += ("time_to_collision_within_bound", "lane_keeping", "history_comfort")

SCENE_KEYS = ["scene_name", "scene_family", "scene_seed", "t0_us", "ego_state0", "past_times_us", "past_states", "human_future"]
SCENE_KEYS += ["human_filter", "t0_removal", "pdm_times_us", "pdm_poses", "prev_t0_us", "prev_ego_state0", "out_pdm_ref_poses"]
SCENE_KEYS += ["out_pdm_progress_raw", "out_pdm_fragile", "out_human_ego_progress", "out_human_fragile"]
SCENE_KEYS += [f"out_{who}_{name}" for who in ("pdm", "human") for name in METRICS]

CANDIDATE_KEYS = ["candidates", "cand_kind", "out_sim_states", "out_ego_progress", "out_multiplicative_metrics_prod", "out_pdm_score_no_ec"]
CANDIDATE_KEYS += ["out_epdms_without_ec", "out_progress_raw", "out_collision_time_idx", "out_ttc_time_idx", "out_ego_areas"]
CANDIDATE_KEYS += ["out_center_in_intersection", "out_lk_max_consecutive", "out_ddc_max_oncoming_m", "out_comfort_bits", "out_fragile"]
CANDIDATE_KEYS += ["out_ec_fragile", *(f"out_{prefix}{name}" for prefix in ("raw_", "") for name in METRICS)]
V1 = (*METRICS[:3], "ego_progress", "time_to_collision_within_bound", "comfort", "score")
CANDIDATE_KEYS += [f"out_v1_{name}" for name in V1]

RAGGED_KEYS = {
    "centerline_off": ["centerline"],
    "route_off": ["route_lane_ids"],
    "poly_off": ["poly_id", "poly_type"],
    "red_off": ["red_poly", "red_mask"],
    "agent_off": ["agent_token", "agent_category", "agent_size", "agent_valid", "agent_state"],
    "cand_off": CANDIDATE_KEYS,
    "prev_off": ["prev_candidates"],
    "cp_off": ["out_extended_comfort", "out_epdms", "out_ec_rms"],
    "hist_off": ["out_history_states"],
}

PUBLIC_PER_FAMILY = 4
#: Adversarial scenes left out: the same case at another magnitude, or large.
REPEATED = set(
    """
    wall_side_gap_1e-9 wall_side_gap_1e-6 wall_side_overlap_1e-6 front_t0_gap_ulp front_t0_overlap_1e-6 front_t4_overlap_1e-6
    agent_inside_ego_t0 ego_inside_agent_t0 dac_consecutive_blocks dac_duplicate_polygons dac_carpark_only cl_figure_eight cl_dense_5000
    cl_two_points cl_ends_under_ego cl_starts_ahead cl_off_route_start speed_60 teleport spin_in_place heading_minus_pi_eps utm_rot
    moving_first_rear_ends oncoming_lane_start lk_0499 red_all red_first_only red_turns_green_20 agents_80_on_path agent_leaves_mid
    agent_tunnels agent_static_then_vehicle ahead_collinear_1 ahead_collinear_2 hist_minus_1us hist_turn_gap_0.2 hist_turn_gap_0.6
    hist_turn_nogap_0.2 hist_turn_nogap_0.6 hist_turn_gap_navsim_steer0_0.2 hist_turn_gap_navsim_steer0_0.6
    hist_turn_nogap_navsim_steer0_0.2 hist_turn_nogap_navsim_steer0_0.6 hist_turn_gap_navsim_steer0_0.4
    hist_turn_nogap_navsim_steer0_0.4 human_fails_no_filter prev_dt_0.5 identical_64 steering_saturated ttc_side_single_lane
    dac_no_route_lane
    """.split()  # noqa: SIM905
)


def read(folder: Path) -> list[Arrays]:
    """Every scene of a set as a file of one scene."""
    scenes = []
    for file in sorted(folder.glob("*.npz")):
        with np.load(file, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        scenes += [one_scene(arrays, i) for i in range(len(arrays["scene_name"]))]
    return scenes


def one_scene(arrays: Arrays, i: int) -> Arrays:
    """Scene i with the outputs that are kept; its offsets start at 0."""
    scene = {key: arrays[key][i : i + 1] for key in SCENE_KEYS}
    for offsets, keys in RAGGED_KEYS.items():
        first, last = arrays[offsets][i : i + 2]
        scene[offsets] = np.array([0, last - first])
        scene |= {key: arrays[key][first:last] for key in keys}
    rings = arrays["poly_ring_off"][arrays["poly_off"][i] : arrays["poly_off"][i + 1] + 1]
    points = arrays["ring_pt_off"][rings[0] : rings[-1] + 1]
    scene |= {"poly_ring_off": rings - rings[0], "ring_pt_off": points - points[0]}
    scene["poly_pts"] = arrays["poly_pts"][points[0] : points[-1]]
    return scene


def join(scenes: Iterable[Arrays]) -> Arrays:
    """One file of several."""
    scenes = list(scenes)
    joined = {}
    for key in scenes[0]:
        parts = [scene[key] for scene in scenes]
        if key.endswith("_off"):
            starts = np.cumsum([0] + [part[-1] for part in parts])
            parts = [np.zeros(1, np.int64), *(part[1:] + start for part, start in zip(parts, starts, strict=False))]
        joined[key] = np.concatenate(parts)
    return joined


def outcomes(scene: Arrays) -> set[tuple[str, float]]:
    """Pairs of a metric and a value that some candidate of the scene has."""
    keys = [f"out_raw_{name}" for name in METRICS] + [f"out_v1_{name}" for name in V1[:-1] if name != "ego_progress"]
    keys += [f"out_human_{name}" for name in METRICS] + ["out_extended_comfort"]
    return {(key, float(value)) for key in keys for value in np.unique(scene[key])}


def select_public(scenes: list[Arrays]) -> list[Arrays]:
    """From each family the scenes that together show most outcomes for their size (greedily)."""
    chosen = []
    for family in sorted({str(scene["scene_family"][0]) for scene in scenes}):
        members = [scene for scene in scenes if scene["scene_family"][0] == family]
        seen: set[tuple[str, float]] = set()
        for _ in range(PUBLIC_PER_FAMILY):
            best = max(members, key=lambda scene: len(outcomes(scene) - seen) / len(scene["candidates"]))
            members = [scene for scene in members if scene is not best]
            seen |= outcomes(best)
            chosen.append(best)
    return chosen


def select_adversarial(scenes: list[Arrays]) -> list[Arrays]:
    return [scene for scene in scenes if scene["scene_family"][0] not in REPEATED]


def main() -> None:
    source, here = Path(sys.argv[1]), Path(__file__).parent
    for name, select in (("public", select_public), ("adversarial", select_adversarial)):
        scenes = select(read(source / name))
        np.savez_compressed(here / f"{name}.npz", **join(scenes))
        print(f"{name}: {len(scenes)} scenes, {(here / f'{name}.npz').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
