"""The fast pieces of the score, and BEV voxel pooling, callable on their own: torch (CPU or CUDA), numpy, or anything with DLPack.

Every function here has a slow, obvious twin of the same name in `irlvla.ops.reference`. Those of the score are exact in
float64; float32 input is widened first. They run as `torch.ops.irlvla.*`, and torch.compile traces through them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from irlvla.errors import InputError
from irlvla.ops._native import as_tensor, get_num_threads, prepare_arrays, set_num_threads
from irlvla.ops.frustums import Grid, depth_bins
from irlvla.ops.pooling import VoxelPoolPlan, voxel_pool
from irlvla.types import HORIZON, STEPS, Batch, Kind, Scene, offsets_of, rows_of

__all__ = [
    "Grid",
    "Prepared",
    "VoxelPoolPlan",
    "as_tensor",
    "boxes_overlap",
    "comfort",
    "depth_bins",
    "extended_comfort",
    "get_num_threads",
    "points_in_polygons",
    "prepare",
    "project",
    "score",
    "set_num_threads",
    "simulate",
    "time_to_collision",
    "track",
    "traffic",
    "voxel_pool",
]

STATE_SIZE = 11
PLANS, POSES, STATES = 0, 1, 2  # what `score` is given


def require_shape(value: Tensor, name: str, *shape: int | None) -> None:
    """Raise `InputError` unless the shape matches; None stands for any size."""
    if value.dim() != len(shape) or any(want not in (None, got) for want, got in zip(shape, value.shape, strict=True)):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise InputError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")


def require_horizon(poses: int, dt: float) -> None:
    """A plan covers exactly the horizon of 4 s."""
    if not abs(poses * dt - HORIZON) <= 1e-9:
        raise InputError(
            f"a plan must cover {HORIZON} s: {poses} poses every {dt} s cover {poses * dt:g} s; e.g. 8 at 0.5 s or 40 at 0.1 s"
        )


def require_offsets(offsets: Tensor, name: str, last: int, what: str) -> None:
    """Offsets rise from 0 to the number of what they divide."""
    o = offsets.cpu().numpy()  # a few numbers: numpy answers sooner
    if o.size == 0 or o[0] != 0 or o[-1] != last or (o[1:] < o[:-1]).any():
        raise InputError(f"{name} must rise from 0 to {last} (the number of {what}), got {o[:9].tolist()}")


# --- motion -------------------------------------------------------------------------------------------------------------


def simulate(
    plans: Float[Tensor, "N T 3"], ego: Float[Tensor, "N 11"], time_us: Int[Tensor, " N"], dt: float = 0.5
) -> Float[Tensor, "N 41 11"]:
    """Drive plans through the tracker and the vehicle model of the devkit (LQR, kinematic bicycle).

    Args:
        plans: poses x, y, heading in the ego frame at dt, 2 dt, ... 4 s.
        ego: initial states (columns of `StateIndex`), one per plan.
        time_us: time stamp of the initial state; the devkit truncates sample times to whole microseconds.
        dt: seconds between the poses of a plan.
    """
    plans = as_tensor(plans, "plans")
    ego, time_us = as_tensor(ego, "ego", device=plans.device), as_tensor(time_us, "time_us", torch.int64, plans.device)
    require_shape(plans, "plans", None, None, 3)
    require_horizon(plans.shape[1], dt)
    require_shape(ego, "ego", plans.shape[0], STATE_SIZE)
    require_shape(time_us, "time_us", plans.shape[0])
    return torch.ops.irlvla.simulate(plans, ego, time_us, dt, False)


def track(poses: Float[Tensor, "N 41 3"], ego: Float[Tensor, "N 11"], time_us: Int[Tensor, " N"] | None = None) -> Float[Tensor, "N 41 11"]:
    """As `simulate`, for plans given as 41 map-frame poses at 0, 0.1, ... 4 s (a PDM-Closed plan)."""
    poses = as_tensor(poses, "poses")
    ego = as_tensor(ego, "ego", device=poses.device)
    require_shape(poses, "poses", None, STEPS, 3)
    require_shape(ego, "ego", poses.shape[0], STATE_SIZE)
    time_us = (
        torch.zeros(poses.shape[0], dtype=torch.int64, device=poses.device)
        if time_us is None
        else as_tensor(time_us, "time_us", torch.int64, poses.device)
    )
    require_shape(time_us, "time_us", poses.shape[0])
    return torch.ops.irlvla.simulate(poses, ego, time_us, 0.1, True)


def comfort(states: Float[Tensor, "N T 11"], *, v1: bool = False) -> Bool[Tensor, "N 6"]:
    """Whether lon acc, lat acc, jerk, lon jerk, yaw acc and yaw rate stay within the limits of nuPlan.

    `states` at 0.1 s, 15 to 65 of them: history samples first for history comfort. `v1` uses the rules of PDMS (rear
    axle, one parabola over all samples) and takes exactly 41.
    """
    states = as_tensor(states, "states")
    require_shape(states, "states", None, STEPS if v1 else None, STATE_SIZE)
    return torch.ops.irlvla.comfort(states, v1)


def extended_comfort(
    states: Float[Tensor, "N 41 11"], previous: Float[Tensor, "N 41 11"], shift: Int[Tensor, " N"] | int = 5
) -> tuple[Bool[Tensor, " N"], Float[Tensor, "N 4"]]:
    """Two-frame comfort: is a plan like the one made `shift` steps of 0.1 s before?

    Returns whether the rms differences of acceleration, jerk, yaw rate and yaw acceleration are within 0.7, 0.5, 0.1
    and 0.1, and the differences.
    """
    states = as_tensor(states, "states")
    previous = as_tensor(previous, "previous", device=states.device)
    require_shape(states, "states", None, STEPS, STATE_SIZE)
    require_shape(previous, "previous", states.shape[0], STEPS, STATE_SIZE)
    if isinstance(shift, int):
        shift = torch.full((states.shape[0],), shift, dtype=torch.int64, device=states.device)
    shift = as_tensor(shift, "shift", torch.int64, states.device)
    require_shape(shift, "shift", states.shape[0])
    return torch.ops.irlvla.extended_comfort(states, previous, shift)


# --- geometry -----------------------------------------------------------------------------------------------------------


def boxes_overlap(a: Float[Tensor, "*n 5"], b: Float[Tensor, "*n 5"]) -> Bool[Tensor, "*n"]:
    """True where two oriented boxes (centre x, y, heading, length, width) share a point; touching counts. Exact, broadcasts."""
    a = as_tensor(a, "a")
    b = as_tensor(b, "b", device=a.device)
    if a.shape[-1:] != (5,) or b.shape[-1:] != (5,):
        raise InputError(f"boxes must have shape (..., 5): x, y, heading, length, width; got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = torch.broadcast_tensors(a, b)
    return torch.ops.irlvla.boxes_overlap(a.reshape(-1, 5).contiguous(), b.reshape(-1, 5).contiguous()).reshape(a.shape[:-1])


def points_in_polygons(
    points: Float[Tensor, "N 2"],
    vertices: Float[Tensor, "V 2"],
    ring_offsets: Int[Tensor, " R+1"],
    polygon_offsets: Int[Tensor, " P+1"] | None = None,
) -> Bool[Tensor, "N P"]:
    """True where a point lies strictly inside a polygon (its boundary is outside, holes are respected). Exact.

    Rings are open point lists `vertices[ring_offsets[r] : ring_offsets[r + 1]]`; polygon p has the rings
    `polygon_offsets[p] : polygon_offsets[p + 1]`, by default one each.
    """
    points = as_tensor(points, "points")
    vertices = as_tensor(vertices, "vertices", device=points.device)
    ring_offsets = as_tensor(ring_offsets, "ring_offsets", torch.int64, points.device)
    require_shape(points, "points", None, 2)
    require_shape(vertices, "vertices", None, 2)
    require_shape(ring_offsets, "ring_offsets", None)
    if polygon_offsets is None:
        polygon_offsets = torch.arange(ring_offsets.shape[0], device=points.device)
    polygon_offsets = as_tensor(polygon_offsets, "polygon_offsets", torch.int64, points.device)
    require_offsets(ring_offsets, "ring_offsets", vertices.shape[0], "vertices")
    require_offsets(polygon_offsets, "polygon_offsets", ring_offsets.shape[0] - 1, "rings")
    following = torch.arange(1, vertices.shape[0] + 1, device=points.device)
    following = following.scatter(0, ring_offsets[1:] - 1, ring_offsets[:-1])
    return torch.ops.irlvla.points_in_polygons(points, torch.cat([vertices, vertices[following]], 1), ring_offsets[polygon_offsets])


def project(points: Float[Tensor, "N 2"], polyline: Float[Tensor, "L 2"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Distance along a polyline of the point nearest to each point, and the distance to it. The first of equals wins (GEOS)."""
    points = as_tensor(points, "points")
    polyline = as_tensor(polyline, "polyline", device=points.device)
    require_shape(points, "points", None, 2)
    require_shape(polyline, "polyline", None, 2)
    if polyline.shape[0] < 2:
        raise InputError(f"a polyline needs at least 2 points, got {polyline.shape[0]}")
    return torch.ops.irlvla.project(points, torch.cat([polyline[:-1], polyline[1:]], 1))


def time_to_collision(
    states: Float[Tensor, "N 41 11"], boxes: Float[Tensor, "A S 5"], valid: Bool[Tensor, "A S"] | None = None
) -> Float[Tensor, "N 41"]:
    """Seconds (0, 0.3, 0.6 or 0.9) until the ego box, moving on straight at its speed, touches some agent; inf if none.

    `boxes` are the agents' x, y, heading, length, width at 0.1 s steps; `valid` tells where they exist.
    """
    states = as_tensor(states, "states")
    boxes = as_tensor(boxes, "boxes", device=states.device)
    require_shape(states, "states", None, STEPS, STATE_SIZE)
    require_shape(boxes, "boxes", None, None, 5)
    if valid is None:
        valid = torch.ones(boxes.shape[:2], dtype=torch.bool, device=states.device)
    valid = as_tensor(valid, "valid", torch.bool, states.device)
    require_shape(valid, "valid", *boxes.shape[:2])
    return torch.ops.irlvla.time_to_collision(states, boxes, valid)


# --- scenes -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared(Batch):
    """Scenes ready to score: derived boxes, a grid over the map, all in one block of bytes that moves to a GPU as it is."""

    world_bytes: Int[Tensor, " B"]  # working memory that reactive traffic takes for a candidate; 0 = not prepared for it
    offsets: Int[Tensor, " B+1"] = offsets_of("byte")
    data: UInt8[Tensor, " bytes"] = rows_of("byte")


_PREPARED_FIELDS: tuple[tuple[str, torch.dtype], ...] = (
    ("time_us", torch.int64),
    ("ego", torch.float64),
    ("history_time_us", torch.int64),
    ("history", torch.float64),
    ("agent_offsets", torch.int64),
    ("agent_kind", torch.int64),
    ("agent_size", torch.float64),
    ("agent_valid", torch.bool),
    ("agent_state", torch.float64),
    ("polygon_offsets", torch.int64),
    ("polygon_layer", torch.int64),
    ("polygon_on_route", torch.bool),
    ("ring_offsets", torch.int64),
    ("point_offsets", torch.int64),
    ("points", torch.float64),
    ("light_offsets", torch.int64),
    ("light_polygon", torch.int64),
    ("light_red", torch.bool),
    ("centerline_offsets", torch.int64),
    ("centerline", torch.float64),
    ("polygon_speed_limit", torch.float64),
    ("baseline_offsets", torch.int64),
    ("baseline", torch.float64),
)  # in the order of csrc/scene.h SceneArrays


def prepare(scenes: Scene, *, reactive: bool = False) -> Prepared:
    """Check scenes and prepare them for scoring: well under a millisecond each, on the CPU, in parallel.

    With `reactive`, vehicles are put on their lanes, and the agents become what they are without an ego.
    """
    arrays = {name: as_tensor(getattr(scenes, name), f"scenes.{name}", dtype).cpu() for name, dtype in _PREPARED_FIELDS}
    _check(scenes, arrays)
    offsets, data, world_bytes = prepare_arrays(arrays, scenes.token, reactive=reactive)
    return Prepared(world_bytes, offsets, data).to(scenes.device)


def _check(scenes: Scene, arrays: dict[str, Tensor]) -> None:
    b, steps = len(scenes.token), arrays["agent_state"].shape[1] if arrays["agent_state"].dim() == 3 else 0
    if steps not in (41, 51):
        raise InputError(f"scenes.agent_state must have 41 or 51 time steps (A, S, 5), got {tuple(arrays['agent_state'].shape)}")
    sizes = {
        "agent": "agent_kind",
        "polygon": "polygon_layer",
        "light": "light_polygon",
        "centerline": "centerline",
        "baseline": "baseline",
    }
    counts = {group: arrays[field].shape[0] for group, field in sizes.items()}
    counts |= {"ring": arrays["point_offsets"].shape[0] - 1, "point": arrays["points"].shape[0]}
    shapes: dict[str, tuple[int | None, ...]] = {
        "time_us": (b,), "ego": (b, STATE_SIZE), "history_time_us": (b, None), "history": (b, arrays["history_time_us"].shape[-1], 8),
        "agent_kind": (None,), "agent_size": (counts["agent"], 2), "agent_valid": (counts["agent"], steps),
        "agent_state": (counts["agent"], steps, 5), "polygon_layer": (None,), "polygon_on_route": (counts["polygon"],), "points": (None, 2),
        "light_polygon": (None,), "light_red": (counts["light"], STEPS), "centerline": (None, 3),
        "polygon_speed_limit": (counts["polygon"],), "baseline": (None, 2),
    }  # fmt: skip
    for name, shape in shapes.items():
        require_shape(arrays[name], f"scenes.{name}", *shape)
    for group, parents, name in (
        ("agent", b, "agent_offsets"), ("polygon", b, "polygon_offsets"), ("ring", counts["polygon"], "ring_offsets"),
        ("point", counts["ring"], "point_offsets"), ("light", b, "light_offsets"), ("centerline", b, "centerline_offsets"),
        ("baseline", counts["polygon"], "baseline_offsets"),
    ):  # fmt: skip
        require_shape(arrays[name], f"scenes.{name}", parents + 1)
        require_offsets(arrays[name], f"scenes.{name}", counts[group], f"{group} rows")
    if arrays["history_time_us"].shape[1] < 2:
        raise InputError(f"scenes.history needs at least 2 frames for history comfort, got {arrays['history_time_us'].shape[1]}")


def score(
    prepared: Prepared,
    plans: Float[Tensor, "N ..."],
    scene_index: Int[Tensor, " N"],
    *,
    source: int = PLANS,
    dt: float = 0.5,
    remove_touching: bool = True,
    pdms: bool = False,
    states: bool = False,
    reference: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Raw sub-metrics of N candidates, each of the scene that `scene_index` names (best in rising order).

    `source` says what `plans` holds: PLANS (N T 3, ego frame), POSES (N 41 3, map frame) or STATES (N 41 11, simulated).
    `reference`: simulated states (B 41 11) and masks (B 5) of the plan that progress is measured against. With it, scenes must be
    prepared for reactive traffic; candidates then meet the traffic around them, and so does the reference, one with each.
    Returns metrics (N 14), events (N 6), masks (N 5) and states (N 41 11, or none), laid out as csrc/rows.h says.
    `irlvla.epdms` is the friendly form.
    """
    plans = as_tensor(plans, "plans", device=prepared.data.device)
    scene_index = as_tensor(scene_index, "scene_index", torch.int64, plans.device)
    require_shape(plans, "plans", None, None if source == PLANS else STEPS, STATE_SIZE if source == STATES else 3)
    require_shape(scene_index, "scene_index", plans.shape[0])
    if source == PLANS:
        require_horizon(plans.shape[1], dt)
    driven, masks, world_bytes = None, None, 0
    if reference is not None:
        world_bytes = _world_bytes(prepared)
        driven = as_tensor(reference[0], "reference", device=plans.device)
        masks = as_tensor(reference[1], "reference masks", torch.int64, plans.device)
        require_shape(driven, "reference", len(prepared), STEPS, STATE_SIZE)
        require_shape(masks, "reference masks", len(prepared), 5)
    return torch.ops.irlvla.score(
        prepared.data, prepared.offsets, scene_index, plans, source, dt, remove_touching, pdms, states, driven, masks, world_bytes
    )


def _world_bytes(prepared: Prepared) -> int:
    least, most = torch.stack(torch.aminmax(prepared.world_bytes)).tolist()
    if least == 0:
        raise InputError("these scenes are not prepared for reactive traffic; use prepare(scenes, reactive=True)")
    return int(most)


def traffic(
    scenes: Scene, states: Float[Tensor, "N 41 11"], scene_index: Int[Tensor, " N"], prepared: Prepared | None = None
) -> tuple[Int[Tensor, " N+1"], Float[Tensor, "R 41 5"], Bool[Tensor, "R 41"]]:
    """Reactive traffic around N simulated egos, each in the scene that `scene_index` names.

    Vehicles are driven by IDM along their lanes as the devkit does it; all other agents stay as recorded. `prepared` is
    `prepare(scenes, reactive=True)` and saves making it again.

    Returns offsets (the agents of candidate i are rows o[i]:o[i+1], in the order of its scene), states (box centre x, y, heading,
    vx, vy at 0, 0.1 ... 4 s) and where they exist.
    """
    states = as_tensor(states, "states", device=scenes.device)
    scene_index = as_tensor(scene_index, "scene_index", torch.int64, states.device)
    require_shape(states, "states", None, STEPS, STATE_SIZE)
    require_shape(scene_index, "scene_index", states.shape[0])
    prepared = prepare(scenes, reactive=True) if prepared is None else prepared
    starts, counts = scenes.agent_offsets[:-1][scene_index], scenes.agent_offsets.diff()[scene_index]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = torch.arange(int(offsets[-1]), device=states.device) + (starts - offsets[:-1]).repeat_interleave(counts)
    present = scenes.agent_valid[:, :STEPS].clone()
    present[scenes.agent_kind == Kind.VEHICLE, 1:] = False
    tracks, present = torch.ops.irlvla.traffic(
        prepared.data,
        prepared.offsets,
        scene_index,
        states,
        offsets,
        scenes.agent_state[rows, :STEPS].double(),
        present[rows],
        _world_bytes(prepared),
    )
    return offsets, tracks, present


def __getattr__(name: str) -> Any:
    if name == "reference":
        import importlib

        return importlib.import_module("irlvla.ops.reference")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
