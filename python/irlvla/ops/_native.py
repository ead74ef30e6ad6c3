"""Between torch and the compiled core: the only file with `data_ptr` and streams, and where every op is registered.

The ops live in `torch.ops.irlvla` for CPU and CUDA alike, with fake implementations, so torch.compile traces through
them. Values are checked here, outside of any traced graph; shapes are checked by the callers in `irlvla.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from irlvla import _C
from irlvla.errors import BuildError, InputError

STEPS, STATE = 41, 11
LIMIT = 1e8  #: metres; beyond it a double cannot resolve what the exact predicates need
WORLDS_BYTES = 2**31  #: memory on a GPU for the traffic of candidates that are under way at once
TIME_LIMIT = 2**53  #: microseconds; beyond it a double does not hold every one

_threads: int | None = None


def set_num_threads(threads: int | None) -> None:
    """Threads used by the CPU kernels; None (the default) follows torch, the affinity mask and the cgroup quota."""
    global _threads
    if threads is not None and threads < 1:
        raise InputError(f"threads must be at least 1, got {threads}")
    _threads = threads


def get_num_threads() -> int:
    """Threads that the next call on the CPU uses."""
    return _threads if _threads is not None else min(torch.get_num_threads(), _C.available_threads())


def as_tensor(value: Any, name: str, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Tensor:
    """A contiguous tensor of `dtype` from a torch tensor, a numpy array, or anything with DLPack; no copy where none is needed."""
    if not isinstance(value, Tensor):
        try:
            value = (
                torch.utils.dlpack.from_dlpack(value)
                if hasattr(value, "__dlpack__") and not hasattr(value, "__array__")
                else torch.as_tensor(value)
            )
        except Exception as error:
            raise InputError(f"{name}: cannot read a {type(value).__name__} as a tensor ({error})") from error
    if value.is_complex():
        raise InputError(f"{name} must be real, got {value.dtype}")
    if device is not None and value.device != torch.device(device):
        raise InputError(f"{name} is on {value.device} but is needed on {device}; move it with .to({str(device)!r})")
    return value.detach().to(dtype).contiguous()


def require_finite(value: Tensor, name: str) -> None:
    """Raise `InputError`, naming the first bad row, unless every value is finite and below 1e8.

    On a GPU this waits for the value; while a CUDA graph is being captured nothing is checked.
    """
    rows = value.shape[0]
    if value.numel() == 0 or _capturing(value):
        return
    if value.device.type == "cpu":
        row = _C.first_bad_row(value.data_ptr(), rows, value.numel() // rows)
    else:
        good = (value.abs() < LIMIT).reshape(rows, -1).all(1)
        row = -1 if bool(good.all()) else int((~good).nonzero()[0])
    if row >= 0:
        raise InputError(f"{name}[{row}] holds NaN, infinity or a value beyond {LIMIT:g}; fix or drop that row")


def require_range(value: Tensor, name: str, low: int, high: int) -> None:
    """Raise `InputError` unless every integer lies in low ... high; not while a CUDA graph is being captured."""
    if value.numel() == 0 or _capturing(value):
        return
    least, most = torch.stack(torch.aminmax(value)).tolist()
    if least < low or most > high:
        raise InputError(f"{name} must lie in {low} ... {high}, got {least} ... {most}")


def _capturing(value: Tensor) -> bool:
    return value.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def launch(kernel: str, device: torch.device, *args: Any) -> None:
    """Run a kernel of the compiled core on the current stream of a device. Tensors, also those in tuples, become addresses."""
    function, addresses = getattr(_C, kernel), [_address(a) for a in args]
    if device.type == "cpu":
        function(*addresses, get_num_threads(), 0)
    elif device.type == "cuda":
        with torch.cuda.device(device):
            try:
                function(*addresses, -1, torch.cuda.current_stream(device).cuda_stream)
            except RuntimeError as error:
                if "no CUDA" in str(error) or "no kernel image" in str(error):
                    raise BuildError(str(error)) from error
                raise
    else:
        raise InputError(f"device {device} is not supported; use cpu or cuda")


def _address(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return [_address(v) for v in value] if isinstance(value, tuple) else value


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def prepare_arrays(arrays: Mapping[str, Tensor], names: Sequence[str], *, reactive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Byte offsets and bytes of prepared scenes, from the arrays of csrc/scene.h SceneArrays in that order, on the CPU.

    And the bytes of working memory that reactive traffic takes for each candidate of each scene.
    """
    sizes = len(names), arrays["history"].shape[1], arrays["agent_state"].shape[1]
    try:
        data, offsets, world_bytes = _C.prepare(*sizes, [a.data_ptr() for a in arrays.values()], reactive, get_num_threads())
    except ValueError as error:
        scene, _, problem = str(error).partition(":")
        raise InputError(f"scene {scene} ({names[int(scene)]!r}): {problem}") from None
    return torch.from_numpy(offsets), torch.from_numpy(data), torch.from_numpy(world_bytes)


def paint_over(images: Tensor, *drawing: Tensor) -> Tensor:
    """Paint over images in place: arrays of csrc/painting.h PaintTask in that order, on the CPU."""
    n, _, height, width = images.shape
    _C.paint(n, height, width, images.data_ptr(), *(a.data_ptr() for a in drawing), get_num_threads())
    return images


# --- implementations ----------------------------------------------------------------------------------------------------


def _simulate(plans: Tensor, ego: Tensor, time_us: Tensor, step: float, map_frame: bool) -> Tensor:
    require_finite(plans, "plans")
    require_finite(ego, "ego")
    require_range(time_us, "time_us", 1 - TIME_LIMIT, TIME_LIMIT - 1)
    states = _empty(plans, len(plans), STEPS, STATE)
    launch("simulate", plans.device, len(plans), plans, plans.shape[1], step, map_frame, ego, time_us, states)
    return states


def _score(
    scenes: Tensor,
    scene_offsets: Tensor,
    scene_index: Tensor,
    plans: Tensor,
    source: int,
    step: float,
    remove_touching: bool,
    pdms: bool,
    states: bool,
    reference: Tensor | None,
    reference_masks: Tensor | None,
    world_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require_finite(plans, "plans")
    n = len(plans)
    outputs = _score_outputs(plans, states)
    require_range(scene_index, "scene_index", 0, len(scene_offsets) - 2)
    scratch, held = _scratch(plans, n, _C.MOTION_BYTES, world_bytes)
    metrics, events, masks, simulated = outputs
    launch(
        "score", plans.device, n, scenes, scene_offsets, scene_index, source, plans, plans.shape[1], step, remove_touching, pdms,
        metrics, events, masks, simulated if states else 0, scratch, held,
        0 if reference is None else reference, 0 if reference_masks is None else reference_masks, world_bytes,
    )  # fmt: skip
    return outputs


def _scratch(like: Tensor, candidates: int, bytes_each: int, world_bytes: int) -> tuple[Tensor, int]:
    """Working memory on a GPU, and for how many candidates at once; CPU threads have their own."""
    most = min(_C.MOTIONS_HELD, max(WORLDS_BYTES // world_bytes, 1)) if world_bytes else _C.MOTIONS_HELD
    held = max(min(candidates, most), 1)
    return _empty(like, held * (bytes_each + world_bytes) if like.device.type == "cuda" else 0, dtype=torch.uint8), held


def _traffic(
    scenes: Tensor,
    scene_offsets: Tensor,
    scene_index: Tensor,
    states: Tensor,
    track_offsets: Tensor,
    tracks: Tensor,
    present: Tensor,
    world_bytes: int,
) -> tuple[Tensor, Tensor]:
    require_finite(states, "states")
    require_range(scene_index, "scene_index", 0, len(scene_offsets) - 2)
    tracks, present = tracks.clone(), present.clone()
    scratch, held = _scratch(states, len(states), 0, world_bytes)
    launch(
        "traffic",
        states.device,
        len(states),
        scenes,
        scene_offsets,
        scene_index,
        states,
        track_offsets,
        tracks,
        present,
        scratch,
        held,
        world_bytes,
    )
    return tracks, present


def _score_outputs(plans: Tensor, states: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = plans.shape[0]
    return (
        _empty(plans, n, _C.METRICS),
        _empty(plans, n, _C.EVENTS, dtype=torch.int32),
        _empty(plans, n, _C.MASKS, dtype=torch.int64),
        _empty(plans, n if states else 0, STEPS, STATE),
    )


def _extended_comfort(states: Tensor, previous: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    comfortable, rms = _empty(states, len(states), dtype=torch.bool), _empty(states, len(states), 4)
    require_finite(states, "states")
    require_finite(previous, "previous")
    require_range(shift, "shift [steps of 0.1 s between the two plans]", 1, 5)
    launch("extended_comfort", states.device, len(states), states, previous, shift, rms, comfortable)
    return comfortable, rms


def _comfort(states: Tensor, plain: bool) -> Tensor:
    if not 15 <= states.shape[1] <= 65 or (plain and states.shape[1] != STEPS):
        raise InputError(f"comfort needs 15 to 65 states (v1: {STEPS}), got {states.shape[1]}")
    require_finite(states, "states")
    within = _empty(states, len(states), 6, dtype=torch.bool)
    launch("comfort", states.device, len(states), states, states.shape[1], plain, within)
    return within


def _boxes_overlap(a: Tensor, b: Tensor) -> Tensor:
    require_finite(a, "a")
    require_finite(b, "b")
    overlaps = _empty(a, len(a), dtype=torch.bool)
    launch("boxes_overlap", a.device, len(a), a, b, overlaps)
    return overlaps


def _points_in_polygons(points: Tensor, edges: Tensor, edge_offsets: Tensor) -> Tensor:
    require_finite(points, "points")
    require_finite(edges, "polygons")
    n, polygons = len(points), len(edge_offsets) - 1
    inside = _empty(points, n, polygons, dtype=torch.bool)
    launch("points_in_polygons", points.device, n * polygons, polygons, points, edges, edge_offsets, inside)
    return inside


def _project(points: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    require_finite(points, "points")
    require_finite(edges, "polyline")
    along, distance = _empty(points, len(points)), _empty(points, len(points))
    launch("project", points.device, len(points), points, len(edges), edges, along, distance)
    return along, distance


def _time_to_collision(states: Tensor, boxes: Tensor, valid: Tensor) -> Tensor:
    require_finite(states, "states")
    require_finite(torch.where(valid[..., None], boxes, 0.0), "boxes (where valid)")
    seconds = _empty(states, len(states), STEPS)
    launch("time_to_collision", states.device, len(states) * STEPS, states, boxes.shape[0], boxes.shape[1], boxes, valid, seconds)
    return seconds


# --- registration -------------------------------------------------------------------------------------------------------

library = torch.library.Library("irlvla", "DEF")

#: Integer and boolean arguments; all other tensors are float64.
_DTYPES = dict.fromkeys(
    ("time_us", "scene_offsets", "scene_index", "shift", "edge_offsets", "track_offsets", "reference_masks"), torch.int64
)
_DTYPES |= {"valid": torch.bool, "present": torch.bool, "scenes": torch.uint8}


def _register(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Define an op; whoever calls it past `irlvla.ops` still hands it contiguous tensors of one device, or gets an error."""
    name = schema.split("(")[0]
    names = [argument.split()[1] for argument in schema[schema.index("(") + 1 : schema.index(")")].split(", ")]

    def checked(*args: Any) -> Any:
        for argument, value in zip(names, args, strict=True):
            want = _DTYPES.get(argument, torch.float64)
            if isinstance(value, Tensor) and (value.dtype != want or value.device != args[0].device):
                raise InputError(f"irlvla::{name} needs {argument} as {want} on {args[0].device}, got {value.dtype} on {value.device}")
        return run(*(value.contiguous() if isinstance(value, Tensor) else value for value in args))

    library.define(schema)
    for device in ("CPU", "CUDA"):
        library.impl(name, checked, device)
    torch.library.register_fake(f"irlvla::{name}", fake, lib=library)


_register(
    "simulate(Tensor plans, Tensor ego, Tensor time_us, float step, bool map_frame) -> Tensor",
    _simulate,
    lambda plans, ego, time_us, step, map_frame: _empty(plans, plans.shape[0], STEPS, STATE),
)
_register(
    "score(Tensor scenes, Tensor scene_offsets, Tensor scene_index, Tensor plans, int source, float step, bool remove_touching, "
    "bool pdms, bool states, Tensor? reference, Tensor? reference_masks, int world_bytes) -> (Tensor, Tensor, Tensor, Tensor)",
    _score,
    lambda scenes, scene_offsets, scene_index, plans, source, step, remove_touching, pdms, states, *reactive: _score_outputs(plans, states),
)
_register(
    "traffic(Tensor scenes, Tensor scene_offsets, Tensor scene_index, Tensor states, Tensor track_offsets, Tensor tracks, Tensor present, "
    "int world_bytes) -> (Tensor, Tensor)",
    _traffic,
    lambda scenes, scene_offsets, scene_index, states, track_offsets, tracks, present, world_bytes: (
        torch.empty_like(tracks),
        torch.empty_like(present),
    ),
)
_register(
    "extended_comfort(Tensor states, Tensor previous, Tensor shift) -> (Tensor, Tensor)",
    _extended_comfort,
    lambda states, previous, shift: (_empty(states, states.shape[0], dtype=torch.bool), _empty(states, states.shape[0], 4)),
)
_register(
    "comfort(Tensor states, bool plain) -> Tensor",
    _comfort,
    lambda states, plain: _empty(states, states.shape[0], 6, dtype=torch.bool),
)
_register(
    "boxes_overlap(Tensor a, Tensor b) -> Tensor",
    _boxes_overlap,
    lambda a, b: _empty(a, a.shape[0], dtype=torch.bool),
)
_register(
    "points_in_polygons(Tensor points, Tensor edges, Tensor edge_offsets) -> Tensor",
    _points_in_polygons,
    lambda points, edges, edge_offsets: _empty(points, points.shape[0], edge_offsets.shape[0] - 1, dtype=torch.bool),
)
_register(
    "project(Tensor points, Tensor edges) -> (Tensor, Tensor)",
    _project,
    lambda points, edges: (_empty(points, points.shape[0]), _empty(points, points.shape[0])),
)
_register(
    "time_to_collision(Tensor states, Tensor boxes, Tensor valid) -> Tensor",
    _time_to_collision,
    lambda states, boxes, valid: _empty(states, states.shape[0], STEPS),
)
