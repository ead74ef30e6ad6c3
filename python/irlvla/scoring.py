"""`epdms`: from plans to the nine sub-metrics of NAVSIM v2, exactly as its devkit computes them, for many scenes at once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from irlvla import ops
from irlvla.errors import InputError
from irlvla.types import METRICS, PROGRESS_THRESHOLD, STEPS, Details, Epdms, Pdms, Plan, Scene, Trajectory

HumanFilter = Literal["fixed", "legacy", "none"]
Traffic = Literal["log", "replay_all", "constant_velocity", "reactive"]

NC, DAC, DDC, TLC, EP, TTC, LK, HC, EC = range(9)
PROGRESS, ONCOMING, V1, REFERENCE_NC = 4, 8, slice(9, 13), 13  # columns of ops.score's metrics


def epdms(
    scenes: Scene,
    plans: Plan | Trajectory | Float[Tensor, "B K T 3"] | Any,
    *,
    dt: float | None = None,
    scene_index: Int[Tensor, " N"] | None = None,
    previous: Plan | Trajectory | Float[Tensor, "..."] | None = None,
    traffic: Traffic = "log",
    human_filter: HumanFilter = "fixed",
    details: bool = False,
    pdms: bool = False,
) -> Epdms:
    """Score K plans in each of B scenes. Scoring them together or one by one gives the same numbers, bit for bit.

    Args:
        scenes: B scenes. What is derived from them is kept with them: score the same object again and it is free.
        plans: poses x, y, heading in the ego frame, at dt, 2 dt, ... 4 s: shape (B, K, T, 3) or (B, T, 3). With
            `scene_index`, (N, T, 3). Tensors (CPU or CUDA), numpy arrays and anything with DLPack are welcome.
        dt: seconds between poses; by default that of the plan, or 4 s / T.
        scene_index: the scene of each of N plans: any number of plans per scene, without padding; fastest in rising order.
        previous: plans of the previous frame (`Scene.previous_ego`), for EC, in its own ego frame: one per scene
            (B, T, 3), or one per plan (the leading shape of `plans`, which wins where both
            fit). Without it EC is NaN and does not count.
        traffic: `log` replays the recorded agents but for those that touch the ego at t = 0 (the devkit's log replay);
            `replay_all` keeps all; `constant_velocity` moves the agents of t = 0 straight on; `reactive` drives vehicles along
            their lanes as the devkit does (IDM): each candidate meets traffic of its own, and so does the human. It needs the
            lanes' baselines (`Scene.baseline`).
        human_filter: where the human's own drive fails a metric, candidates get 1 in it. `legacy` is the devkit before
            359c7f7, whose score ignored the filtered columns; `none` leaves everything as measured.
        details: also return when, where and why (`Epdms.details`).
        pdms: also return the metrics of NAVSIM v1 (`Epdms.pdms`); needs agents over 5 s (51 steps).

    Returns sub-metrics of shape (B, K, 9), (B, 9) or (N, 9), as `plans` has it.

    Raises:
        InputError: naming what is wrong with a scene, a plan or an option, and what is accepted.
    """
    _require_choice("traffic", traffic, get_args(Traffic))
    _require_choice("human_filter", human_filter, ("fixed", "legacy", "none"))
    poses, dt = _poses(plans, dt, "plans")
    lead, index = _leading(scenes, poses, scene_index)
    if pdms and traffic == "reactive":
        raise InputError("pdms=True is not measured in reactive traffic: NAVSIM v1 has none; use traffic='log'")
    if pdms and scenes.agent_state.shape[1] < 51:
        raise InputError("pdms=True looks 5 s ahead: the scenes' agents need 51 steps, they have 41")
    frame = _frame(scenes, traffic)
    flat = poses.reshape(-1, *poses.shape[-2:])
    metrics, events, masks, states = ops.score(
        frame.prepared, flat, index, dt=dt, remove_touching=_removes_touching(traffic), pdms=pdms,
        states=details or previous is not None, reference=frame.driven,
    )  # fmt: skip
    reference = frame.reference[index]
    if frame.driven is not None:
        reference[:, NC] = metrics[:, REFERENCE_NC]  # the devkit scores both in the traffic of the candidate
    raw = _values(metrics, reference)
    if previous is not None:
        raw[:, EC] = _extended_comfort(scenes, states, previous, index, lead, per_plan=len(lead) == 2 or scene_index is not None)
    values = raw if human_filter == "none" else _filtered(raw, frame.human[index])
    return Epdms(
        values.reshape(*lead, 9),
        raw=None if human_filter == "none" else raw.reshape(*lead, 9),
        human_filter=human_filter,
        details=_details(metrics, events, masks, states, reference, lead) if details else None,
        pdms=_pdms(metrics, reference, lead) if pdms else None,
    )


# --- input ----------------------------------------------------------------------------------------------------------


def _require_choice(name: str, value: object, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        import difflib

        near = difflib.get_close_matches(str(value), accepted, 1, 0.4)
        raise InputError(
            f"{name}={value!r} is not known{f'; did you mean {near[0]!r}?' if near else ''} Accepted: {', '.join(map(repr, accepted))}"
        )


def _poses(plans: Any, dt: float | None, name: str) -> tuple[Tensor, float]:
    if isinstance(plans, Plan | Trajectory):
        if dt is not None and dt != plans.dt:
            raise InputError(f"dt={dt} contradicts {name}.dt={plans.dt}; give one of them")
        plans, dt = plans.poses, plans.dt
    poses = ops.as_tensor(plans, name)
    if poses.dim() < 3 or poses.shape[-1] != 3 or poses.shape[-2] == 0:
        raise InputError(f"{name} must have shape (B, K, T, 3), (B, T, 3) or, with scene_index, (N, T, 3); got {tuple(poses.shape)}")
    dt = 4.0 / poses.shape[-2] if dt is None else dt
    ops.require_horizon(poses.shape[-2], dt)
    return poses, dt


def _leading(scenes: Scene, poses: Tensor, scene_index: Any) -> tuple[tuple[int, ...], Tensor]:
    """The leading shape of the result, and the scene of each plan."""
    lead = tuple(poses.shape[:-2])
    if scenes.device != poses.device:
        raise InputError(f"plans are on {poses.device} but the scenes on {scenes.device}; move one with .to({str(poses.device)!r})")
    if scene_index is not None:
        index = ops.as_tensor(scene_index, "scene_index", torch.int64, poses.device)
        if len(lead) != 1 or index.shape != lead:
            raise InputError(
                f"with scene_index, plans are (N, T, 3) and scene_index (N,); got {tuple(poses.shape)} and {tuple(index.shape)}"
            )
        return lead, index
    if len(lead) > 2 or lead[0] != len(scenes.token):
        raise InputError(
            f"{len(scenes.token)} scenes need plans of shape (B, K, T, 3) or (B, T, 3) with B = {len(scenes.token)}, "
            f"got {tuple(poses.shape)}"
        )
    return lead, torch.arange(lead[0], device=poses.device).repeat_interleave(lead[1] if len(lead) == 2 else 1)


# --- what a scene contributes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """Per scene: the prepared geometry, the metrics of its reference plan, and the human's sub-metrics.

    In reactive traffic also how the reference drives (states, masks), for it meets the traffic of every candidate.
    """

    prepared: ops.Prepared
    reference: Float[Tensor, "B 14"]
    human: Float[Tensor, "B 9"]
    driven: tuple[Float[Tensor, "B 41 11"], Int[Tensor, "B 5"]] | None = None


def _removes_touching(traffic: Traffic) -> bool:
    return traffic not in ("replay_all", "reactive")


def _frame(scenes: Scene, traffic: Traffic) -> _Frame:
    cache = scenes.__dict__.setdefault("_frames", {})
    # A tensor that is changed in place counts up its version: what was derived from it is stale then.
    versions = tuple(t._version for _, t in scenes.tensors() if not t.is_inference())
    if traffic not in cache or cache[traffic][0] != versions:
        frame = _make_frame(_constant_velocity(scenes) if traffic == "constant_velocity" else scenes, traffic)
        if scenes.device.type == "cuda":
            torch.cuda.current_stream(scenes.device).synchronize()  # whoever uses it next may do so on another stream
        cache[traffic] = versions, frame
    return cache[traffic][1]


def _make_frame(scenes: Scene, traffic: Traffic) -> _Frame:
    reactive = traffic == "reactive"
    prepared = ops.prepare(scenes, reactive=reactive)
    reference, human, known = _reference(scenes), ops.as_tensor(scenes.human, "scenes.human"), ~scenes.human.isnan().flatten(1).any(1)
    b = len(scenes.token)
    ops.require_horizon(human.shape[1], scenes.human_dt)
    driven = torch.stack(
        [
            ops.track(reference, scenes.ego, scenes.time_us),
            ops.simulate(torch.where(known[:, None, None], human, 0.0), scenes.ego, scenes.time_us, scenes.human_dt),
        ],
        1,
    ).flatten(0, 1)
    index = torch.arange(b, device=scenes.device).repeat_interleave(2)
    options: dict[str, Any] = {"source": ops.STATES, "remove_touching": _removes_touching(traffic)}
    options["pdms"] = not reactive and scenes.agent_state.shape[1] > STEPS
    metrics, _, masks, _ = ops.score(prepared, driven, index, **options)
    reference_drive = (driven[::2].contiguous(), masks[::2].contiguous()) if reactive else None
    if reactive:
        metrics, *_ = ops.score(prepared, driven, index, **options, reference=reference_drive)
    metrics = metrics.unflatten(0, (b, 2))
    human_values = metrics[:, 1, :9].clone()
    human_values[~known] = 1.0
    if scenes.human_values is not None:
        human_values = torch.where(scenes.human_values.isnan(), human_values, scenes.human_values.double())
    human_values[:, [EP, HC, EC]] = 1.0  # a human scored alone, without history: never filtered
    return _Frame(prepared, metrics[:, 0], human_values, reference_drive)


def _reference(scenes: Scene) -> Tensor:
    """The PDM-Closed plan of each scene; computed for scenes that carry none."""
    reference = ops.as_tensor(scenes.reference, "scenes.reference")
    ops.require_shape(reference, "scenes.reference", len(scenes.token), STEPS, 3)
    from irlvla.pdm import reference_plans

    return reference_plans(scenes)


def _constant_velocity(scenes: Scene) -> Scene:
    """The same scenes with every agent of t = 0 moving straight on, and none that appears later."""
    now = scenes.agent_state[:, :1].clone()
    seconds = torch.arange(scenes.agent_state.shape[1], device=scenes.device, dtype=torch.float64)[None, :, None] * 0.1
    states = now.repeat(1, scenes.agent_state.shape[1], 1)
    states[..., :2] += now[..., 3:5] * seconds
    return dataclasses.replace(scenes, agent_state=states, agent_valid=scenes.agent_valid[:, :1].expand_as(scenes.agent_valid))


# --- from measurements to sub-metrics -------------------------------------------------------------------------------


def _multiplied(metrics: Tensor) -> Tensor:
    return metrics[:, NC] * metrics[:, DAC] * metrics[:, TLC] * metrics[:, DDC]


def _values(metrics: Tensor, reference: Tensor) -> Tensor:
    """Columns of METRICS: EP relative to the reference plan, never to the other candidates (pdm_scorer.py _aggregate_pdm_scores)."""
    progress = metrics[:, PROGRESS]
    norm = torch.maximum(reference[:, PROGRESS] * _multiplied(reference), progress * _multiplied(metrics))
    values = torch.cat([metrics[:, :8], torch.full_like(metrics[:, :1], torch.nan)], 1)
    values[:, EP] = torch.where(norm > PROGRESS_THRESHOLD, (progress / norm).clamp(0.0, 1.0), 1.0)
    return values


def _filtered(raw: Tensor, human: Tensor) -> Tensor:
    """A metric that the human fails (0; a human 0.5 does not count) is 1 for everybody (pdm_score.py)."""
    return torch.where(human == 0.0, 1.0, raw)


def _pdms(metrics: Tensor, reference: Tensor, lead: tuple[int, ...]) -> Pdms:
    """NAVSIM v1: progress counts only where nothing is violated, for the candidate as for the reference."""
    nc, ttc, comfort, ddc = metrics[:, V1].unbind(1)
    allowed = nc * metrics[:, DAC]
    progress, best = metrics[:, PROGRESS] * allowed, reference[:, PROGRESS] * reference[:, 9] * reference[:, DAC]
    norm = torch.maximum(progress, best)
    ep = torch.where(norm > PROGRESS_THRESHOLD, progress / norm, (allowed != 0.0).double())
    return Pdms(torch.stack([nc, metrics[:, DAC], ep, ttc, comfort, ddc], 1).reshape(*lead, 6))


def _extended_comfort(scenes: Scene, states: Tensor, previous: Any, index: Tensor, lead: tuple[int, ...], *, per_plan: bool) -> Tensor:
    poses, dt = _poses(previous, None, "previous")
    if bool(scenes.previous_ego.isnan().any()):
        scene = int(scenes.previous_ego.isnan().any(1).nonzero()[0])
        raise InputError(f"scene {scene} ({scenes.token[scene]!r}) has no previous frame (previous_ego is NaN); score it without previous=")
    shift = ((scenes.time_us - scenes.previous_time_us).double() / 1e5).round().long()
    per_plan = per_plan and tuple(poses.shape[:-2]) == lead
    if not per_plan and tuple(poses.shape[:-2]) != (len(scenes.token),):
        raise InputError(
            f"previous must have one plan per scene ({len(scenes.token)}, T, 3) or per plan "
            f"({', '.join(map(str, lead))}, T, 3), got {tuple(poses.shape)}"
        )
    frame = index if per_plan else torch.arange(len(scenes.token), device=poses.device)
    before = ops.simulate(poses.reshape(-1, *poses.shape[-2:]), scenes.previous_ego[frame], scenes.previous_time_us[frame], dt)
    comfortable, _ = ops.extended_comfort(states, before if per_plan else before[index], shift[index])
    return comfortable.double()


def _details(metrics: Tensor, events: Tensor, masks: Tensor, states: Tensor, reference: Tensor, lead: tuple[int, ...]) -> Details:
    steps = (masks[:, :, None] >> torch.arange(STEPS, device=masks.device)) & 1 != 0
    multiple_lanes, off_road, off_route, in_intersection, red_light = (m.reshape(*lead, STEPS) for m in steps.unbind(1))
    collision_step, collision_agent, ttc_step, ttc_agent, off_centre, bits = (e.long().reshape(lead) for e in events.unbind(1))
    return Details(
        states=states.reshape(*lead, STEPS, ops.STATE_SIZE),
        progress=metrics[:, PROGRESS].reshape(lead),
        reference_progress=(reference[:, PROGRESS] * _multiplied(reference)).reshape(lead),
        collision_step=collision_step,
        collision_agent=collision_agent,
        ttc_step=ttc_step,
        ttc_agent=ttc_agent,
        multiple_lanes=multiple_lanes,
        off_road=off_road,
        off_route=off_route,
        in_intersection=in_intersection,
        red_light=red_light,
        oncoming_metres=metrics[:, ONCOMING].reshape(lead),
        off_centre_steps=off_centre,
        comfort=(bits[..., None] >> torch.arange(6, device=bits.device)) & 1 != 0,
    )


assert METRICS[EC] == "ec"
