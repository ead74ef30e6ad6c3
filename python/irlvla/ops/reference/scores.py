"""From simulated states or plans to scores: all sub-metrics of a scene, PDMS v1, EP against PDM-Closed, the human filter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from irlvla.errors import InputError
from irlvla.ops.reference.metrics import (
    OFF_CENTRE_STEPS,
    TTC_OFFSETS,
    agents_of,
    areas_of,
    drivable_area_compliance,
    driving_direction_compliance,
    ego_progress,
    first_red_light,
    longest_off_centre_run,
    no_at_fault_collision,
    oncoming_metres,
    progress_along,
    time_to_collision_within_bound,
)
from irlvla.ops.reference.motion import interpolate_reference, simulate, track
from irlvla.ops.reference.smoothness import comfort_v1, extended_comfort, frame_shift, history_comfort
from irlvla.types import METRICS, PROGRESS_THRESHOLD, STEPS, Details, Epdms, Pdms, Scene


def measure(scene: Scene, states: Float[Tensor, "N 41 11"], *, remove_touching: bool) -> tuple[Float[Tensor, "N 9"], Details]:
    """Sub-metrics in METRICS order, EP and EC missing, and what led to them (navsim pdm_scorer.py score_proposals)."""
    agents, areas = agents_of(scene, remove_touching=remove_touching), areas_of(scene, states)
    collision = no_at_fault_collision(states, agents, areas)
    # The devkit stops where the last projection would leave the 41 steps.
    ttc = time_to_collision_within_bound(states, agents, areas, STEPS - max(TTC_OFFSETS))
    metres = oncoming_metres(states, areas.off_route & ~areas.centre_in_intersection)
    red_light = first_red_light(scene, states)
    off_centre = longest_off_centre_run(scene, states, areas)
    comfortable = history_comfort(scene, states)
    missing = torch.full((len(states),), math.nan, dtype=torch.float64)
    columns = {
        "nc": collision.value,
        "dac": drivable_area_compliance(areas),
        "ddc": driving_direction_compliance(metres),
        "tlc": (~red_light.any(-1)).double(),
        "ep": missing,
        "ttc": ttc.value,
        "lk": (off_centre < OFF_CENTRE_STEPS).double(),
        "hc": comfortable.all(-1).double(),
        "ec": missing,
    }
    details = Details(
        states=states,
        progress=progress_along(scene, states),
        reference_progress=missing,
        collision_step=collision.step,
        collision_agent=collision.agent,
        ttc_step=ttc.step,
        ttc_agent=ttc.agent,
        multiple_lanes=areas.multiple_lanes,
        off_road=areas.off_road,
        off_route=areas.off_route,
        in_intersection=areas.centre_in_intersection,
        red_light=red_light,
        oncoming_metres=metres,
        off_centre_steps=off_centre,
        comfort=comfortable,
    )
    return torch.stack([columns[name] for name in METRICS], -1), details


def multiplier(values: Float[Tensor, "N 9"]) -> Float[Tensor, " N"]:
    """Product of the multiplicative metrics NC, DAC, DDC, TLC."""
    return values[:, :4].prod(-1)


def measure_v1(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Float[Tensor, "N 6"]:
    """PDMS v1 sub-metrics (columns of `Pdms`) with metres along the centreline in place of EP.

    v1 keeps agents in contact at t = 0, has no lights, looks 0.9 s ahead from every step and exempts no intersection.
    """
    if scene.agent_state.shape[1] < STEPS + max(TTC_OFFSETS):
        raise InputError(f"PDMS v1 looks 4.9 s ahead: agents need 50 or more steps of 0.1 s, this scene has {scene.agent_state.shape[1]}")
    agents, areas = agents_of(scene, remove_touching=False), areas_of(scene, states)
    columns = [
        no_at_fault_collision(states, agents, areas).value,
        drivable_area_compliance(areas),
        progress_along(scene, states),
        time_to_collision_within_bound(states, agents, areas, STEPS).value,
        comfort_v1(states).all(-1).double(),
        driving_direction_compliance(oncoming_metres(states, areas.off_route)),
    ]
    return torch.stack(columns, -1)


def score_v1(scene: Scene, states: Float[Tensor, "N 41 11"], reference: Float[Tensor, "1 41 11"]) -> Pdms:
    """PDMS v1 against the reference (v1 pdm_scorer.py _aggregate_scores): violations count above and below the line of EP."""
    values, reference_values = measure_v1(scene, states), measure_v1(scene, reference)
    lawful = values[:, 0] * values[:, 1]
    progress = values[:, 2] * lawful
    best = torch.maximum(progress, reference_values[:, :3].prod(-1))
    values[:, 2] = torch.where(best > PROGRESS_THRESHOLD, progress / best, (lawful != 0.0).double())
    return Pdms(values)


def only_scene(scene: Scene) -> Scene:
    """The scene, in float64 on the CPU; an error if it is a batch of several."""
    if len(scene) != 1:
        raise InputError(f"the reference scores one scene at a time, got {len(scene)}; pick one with scene[i]")
    return scene.to("cpu", torch.float64)


def reference_states(scene: Scene) -> Float[Tensor, "1 41 11"]:
    """The PDM-Closed plan of a scene, simulated."""
    if scene.reference.isnan().any():
        raise InputError("scene.reference is NaN, so there is no PDM-Closed plan to measure progress against; compute it first")
    return track(interpolate_reference(scene.reference, scene.ego, scene.time_us), scene.ego)


def epdms(
    scene: Scene,
    states: Float[Tensor, "N 41 11"],
    *,
    reference: Float[Tensor, "1 41 11"] | None = None,
    remove_touching: bool = True,
    pdms: bool = False,
) -> Epdms:
    """Sub-metrics of N simulated candidates in a scene of one, before any human filter, EC missing (NaN), with details.

    Progress is compared with the simulated `reference`, by default the scene's own PDM-Closed plan.
    """
    scene, states = only_scene(scene), states.double()
    reference = reference_states(scene) if reference is None else reference
    values, details = measure(scene, states, remove_touching=remove_touching)
    reference_values, reference_details = measure(scene, reference, remove_touching=remove_touching)
    lawful_reference = (reference_details.progress * multiplier(reference_values)).expand(len(states))
    values[:, METRICS.index("ep")] = ego_progress(details.progress, multiplier(values), lawful_reference)
    details = replace(details, reference_progress=lawful_reference)
    return Epdms(values, details=details, pdms=score_v1(scene, states, reference) if pdms else None)


def human_values(scene: Scene, *, remove_touching: bool) -> Float[Tensor, "1 9"] | None:
    """Sub-metrics of the human drive, scored alone and without history as the devkit does (navsim pdm_score.py); None if there is none.

    Alone, its EP is 1; without history, its HC is 1.
    """
    if scene.human_values is not None:
        return scene.human_values
    if scene.human.numel() == 0 or scene.human.isnan().any():
        return None
    states = simulate(scene.human, scene.ego, scene.time_us, scene.human_dt)
    values = epdms(scene, states, reference=states, remove_touching=remove_touching).values
    values[:, METRICS.index("hc")] = 1.0
    return values


def filter_by_human(values: Float[Tensor, "N 9"], human: Float[Tensor, "1 9"]) -> Float[Tensor, "N 9"]:
    """1 wherever the human scored exactly 0, EC apart (navsim pdm_score.py human_penalty_filter)."""
    forgiven = human == 0.0
    forgiven[:, METRICS.index("ec")] = False
    return torch.where(forgiven, 1.0, values)


def score_scene(
    scene: Scene,
    plans: Float[Tensor, "N T 3"],
    dt: float = 0.5,
    *,
    remove_touching: bool = True,
    previous_states: Float[Tensor, "N 41 11"] | None = None,
    human_filter: Literal["fixed", "legacy", "none"] = "fixed",
    pdms: bool = False,
) -> Epdms:
    """EPDMS of N plans in a scene of one: simulation, sub-metrics, EP against PDM-Closed, EC, human filter.

    `previous_states` are the simulated states of the previous frame's plan for each candidate. The filter `legacy` is
    that of the devkit before commit 359c7f7, which changed columns but not the score (see `Epdms.score`).
    """
    scene = only_scene(scene)
    ego, time_us = scene.ego.expand(len(plans), -1), scene.time_us.expand(len(plans))
    states = simulate(plans, ego, time_us, dt)
    result = epdms(scene, states, remove_touching=remove_touching, pdms=pdms)
    raw = result.values
    if previous_states is not None:
        raw[:, METRICS.index("ec")] = extended_comfort(states, previous_states, frame_shift(scene))[0].double()
    if human_filter == "none":
        return result
    human = human_values(scene, remove_touching=remove_touching)
    values = raw.clone() if human is None else filter_by_human(raw, human)
    return Epdms(values, raw=raw, human_filter=human_filter, details=result.details, pdms=result.pdms)
