"""The types that everything else passes around.

Letters: B scenes, K proposals, T poses, S time steps (0.1 s), A agents, P polygons, R rings, V vertices,
Q red lights, L centreline points, H history frames, C cameras.

Frames, said once. Metres, radians, seconds; headings counter-clockwise.
  * Plans, trajectories and the human's drive: the **ego frame**, rear axle at t = 0, x forward, y left.
  * The geometry of a `Scene` (agents, polygons, centreline, ego state, reference): one planar **map frame** per scene, in
    float64, as recorded. The official metric rounds there, so moving it would move the last bit; `Scene.ego` is the
    pose of the ego frame in it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Self

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from irlvla.errors import FileError, InputError

STEPS = 41  #: simulated states: 0 ... 4 s at 0.1 s
STEP = 0.1  #: seconds between simulated states
HORIZON = 4.0  #: seconds

METRICS = ("nc", "dac", "ddc", "tlc", "ep", "ttc", "lk", "hc", "ec")  #: order of the last axis of `Epdms.values`


class Layer(IntEnum):
    """Polygon layers of a scene's map (the numbers of nuPlan's SemanticMapLayer)."""

    LANE = 0
    INTERSECTION = 1
    DRIVABLE_AREA = 5
    LANE_CONNECTOR = 11
    CARPARK = 15
    ROADBLOCK = 17


class Kind(IntEnum):
    """Kinds of agents and objects (the numbers of nuPlan's TrackedObjectType)."""

    VEHICLE = 0
    PEDESTRIAN = 1
    BICYCLE = 2
    TRAFFIC_CONE = 3
    BARRIER = 4
    CONSTRUCTION_SIGN = 5
    GENERIC = 6


class StateIndex(IntEnum):
    """Columns of a vehicle state (rear axle; velocity and acceleration in the body frame)."""

    X = 0
    Y = 1
    HEADING = 2
    VX = 3
    VY = 4
    AX = 5
    AY = 6
    STEERING = 7
    STEERING_RATE = 8
    ANGULAR_VELOCITY = 9
    ANGULAR_ACCELERATION = 10


def offsets_of(rows: str, parent: str = "scene") -> Any:
    """A field of row offsets: rows `o[i]:o[i+1]` of group `rows` belong to row `i` of group `parent`."""
    return field(metadata={"offsets": rows, "parent": parent})


def rows_of(group: str) -> Any:
    """A field whose leading axis runs over the rows of a ragged group instead of over scenes."""
    return field(metadata={"rows": group})


@dataclass(frozen=True)
class Batch:
    """A frozen dataclass of tensors (and tuples of strings) that share a leading axis.

    Ragged data is packed, never padded: a field made with `rows_of("agent")` holds the rows of all scenes one after
    the other, and the field made with `offsets_of("agent")` says which belong to whom. Optional fields may be None.
    """

    # -- shape -------------------------------------------------------------------------------------------------------
    @classmethod
    def _groups(cls) -> dict[str, tuple[str, str]]:
        """Ragged groups in dependency order: name -> (parent, name of the offsets field)."""
        found = [(f.metadata["offsets"], f.metadata["parent"], f.name) for f in dataclasses.fields(cls) if "offsets" in f.metadata]
        return {rows: (parent, name) for rows, parent, name in found}

    def __len__(self) -> int:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value is not None and "rows" not in f.metadata and isinstance(value, Tensor | tuple):
                return len(value) - ("offsets" in f.metadata)
        raise InputError(f"{type(self).__name__} holds no data")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the tensor fields that are present."""
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                yield f.name, value

    @property
    def device(self) -> torch.device:
        return next(self.tensors())[1].device

    def _map(self, change: Any) -> Self:
        return dataclasses.replace(self, **{name: change(value) for name, value in self.tensors()})

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As `torch.Tensor.to`; a dtype applies to floating-point fields only."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        return self._map(lambda t: t.to(device, dtype if t.is_floating_point() else None, non_blocking))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    # -- selection ---------------------------------------------------------------------------------------------------
    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Self:
        """Select along the leading axis. An int drops the axis of dense types; of ragged types it keeps a batch of one."""
        if not self._groups():
            return dataclasses.replace(self, **{name: value[index] for name, value in self._fields()})
        scenes = torch.arange(len(self))[[index] if isinstance(index, int) else index]
        chosen, ranges = {"scene": scenes}, {}
        for rows, (parent, name) in self._groups().items():
            bounds = getattr(self, name).cpu()
            starts, sizes = bounds[chosen[parent]], (bounds[1:] - bounds[:-1])[chosen[parent]]
            ranges[name] = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
            chosen[rows] = torch.repeat_interleave(starts - ranges[name][:-1], sizes) + torch.arange(int(sizes.sum()))
        return dataclasses.replace(self, **{name: self._pick(name, value, chosen, ranges) for name, value in self._fields()})

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor | tuple):
                yield f.name, value

    def _pick(self, name: str, value: Any, chosen: Mapping[str, Tensor], ranges: Mapping[str, Tensor]) -> Any:
        if name in ranges:
            return ranges[name].to(value)
        index = chosen[type(self).__dataclass_fields__[name].metadata.get("rows", "scene")]
        return value[index.to(value.device)] if isinstance(value, Tensor) else tuple(value[i] for i in index.tolist())

    @classmethod
    def cat(cls, items: Sequence[Self]) -> Self:
        """Concatenate along the leading axis; ragged groups are re-offset. A field must be present in all or in none."""
        if not items:
            raise InputError(f"{cls.__name__}.cat needs at least one item")
        joined: dict[str, Any] = {}
        for f in dataclasses.fields(cls):
            values = [getattr(item, f.name) for item in items]
            present = [v is not None for v in values]
            if any(present) != all(present):
                raise InputError(f"{cls.__name__}.cat: '{f.name}' is present in some items and missing in others")
            if not all(present) or not isinstance(values[0], Tensor | tuple):
                joined[f.name] = values[0]
            elif "offsets" in f.metadata:
                ends = [v[-1:] for v in values]
                shifts = torch.cat([values[0][:1], *ends]).cumsum(0)
                joined[f.name] = torch.cat([values[0][:1], *(v[1:] + s for v, s in zip(values, shifts, strict=False))])
            else:
                joined[f.name] = torch.cat(values) if isinstance(values[0], Tensor) else sum(values, ())
        return cls(**joined)

    @classmethod
    def stack(cls, items: Sequence[Self]) -> Self:
        """Add a leading axis to dense types; ragged types are always batches, so stacking them is `cat`."""
        if cls._groups():
            return cls.cat(items)
        return cls.cat([item._map(lambda t: t[None]) for item in items])

    # -- files -------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whole or not at all. Strings and numbers go to its metadata as JSON."""
        path = Path(path)
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not isinstance(getattr(self, f.name), Tensor)}
        metadata = {"irlvla": type(self).__name__, "fields": json.dumps(rest)}
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors()}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(safetensors.torch.save(tensors, metadata))
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Self:
        """Read a file written by `save`. Raises `FileError` for anything else: truncated, corrupt, of another type."""
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt", device=str(device)) as stream:
                metadata = stream.metadata() or {}
                if metadata.get("irlvla") != cls.__name__:
                    raise FileError(f"{path} holds {metadata.get('irlvla', 'something else')!r}, not {cls.__name__!r}")
                values = json.loads(metadata["fields"]) | {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        except FileError:
            raise
        except FileNotFoundError as error:
            raise FileError(f"{path} does not exist") from error
        except Exception as error:
            raise FileError(f"{path} is not a whole {cls.__name__} file ({error}); write it again with {cls.__name__}.save") from error
        names = {f.name for f in dataclasses.fields(cls)}
        if names != values.keys():
            raise FileError(f"{path} has the fields {sorted(values)} but {cls.__name__} needs {sorted(names)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class Scene(Batch):
    """B recorded or generated scenes with everything that the score needs, in the map frame, packed.

    The time axis of agents has 41 steps (0 ... 4.0 s at 0.1 s) or 51 (to 5.0 s; PDMS v1 looks further ahead).
    Rings are open (first point not repeated); the first ring of a polygon is its shell, others are holes.
    """

    token: tuple[str, ...]  # B names
    time_us: Int[Tensor, " B"]  # time stamp of the initial ego state [us]
    ego: Float[Tensor, "B 11"]  # initial state, columns of StateIndex
    history_time_us: Int[Tensor, "B H"]
    history: Float[Tensor, "B H 8"]  # logged ego up to t = 0: x y heading vx vy ax ay steering
    human: Float[Tensor, "B T 3"]  # the human's drive, ego frame; NaN = none recorded (no human filter then)
    human_dt: float  # seconds between the human's poses
    human_values: Float[Tensor, "B 9"] | None  # sub-metrics of the human drive, if scored elsewhere; None = score it here
    reference: Float[Tensor, "B 41 3"]  # PDM-Closed plan at 0.1 s, rear axle, map frame; NaN = none (see pdm_closed)
    previous_time_us: Int[Tensor, " B"]  # previous frame, for EC
    previous_ego: Float[Tensor, "B 11"]  # NaN = no previous frame
    speed_limit: Float[Tensor, " B"]  # of the starting lane [m/s]; NaN = unknown

    agent_offsets: Int[Tensor, " B+1"] = offsets_of("agent")
    agent_token: tuple[str, ...] = rows_of("agent")
    agent_kind: Int[Tensor, " A"] = rows_of("agent")  # Kind
    agent_size: Float[Tensor, "A 2"] = rows_of("agent")  # length, width
    agent_valid: Bool[Tensor, "A S"] = rows_of("agent")
    agent_state: Float[Tensor, "A S 5"] = rows_of("agent")  # box centre x y heading vx vy; ignored where not valid

    polygon_offsets: Int[Tensor, " B+1"] = offsets_of("polygon")
    polygon_layer: Int[Tensor, " P"] = rows_of("polygon")  # Layer
    polygon_on_route: Bool[Tensor, " P"] = rows_of("polygon")  # lanes and connectors of the route
    ring_offsets: Int[Tensor, " P+1"] = offsets_of("ring", "polygon")
    point_offsets: Int[Tensor, " R+1"] = offsets_of("point", "ring")
    points: Float[Tensor, "V 2"] = rows_of("point")

    light_offsets: Int[Tensor, " B+1"] = offsets_of("light")
    light_polygon: Int[Tensor, " Q"] = rows_of("light")  # index among the scene's own polygons
    light_red: Bool[Tensor, "Q 41"] = rows_of("light")

    centerline_offsets: Int[Tensor, " B+1"] = offsets_of("centerline")
    centerline: Float[Tensor, "L 3"] = rows_of("centerline")  # x y heading


@dataclass(frozen=True)
class Trajectory(Batch):
    """Poses (x, y, heading) in the ego frame, every `dt` seconds from `dt` on."""

    poses: Float[Tensor, "... T 3"]
    dt: float = 0.5


@dataclass(frozen=True)
class Plan(Batch):
    """K proposals for each scene, as a planner returns them."""

    poses: Float[Tensor, "B K T 3"]
    dt: float = 0.5
    trace: Float[Tensor, "B K D T 3"] | None = None  # the denoising chain, noise first, plan last
    score: Float[Tensor, "B K"] | None = None  # the planner's own preference


@dataclass(frozen=True)
class Details(Batch):
    """Why a candidate scored what it scored. Steps count from 0 at 0.1 s; -1 means it never happened."""

    states: Float[Tensor, "... 41 11"]  # simulated states, map frame, columns of StateIndex
    progress: Float[Tensor, "..."]  # metres along the centreline, >= 0
    reference_progress: Float[Tensor, "..."]  # the same of PDM-Closed, times its own multiplicative metrics
    collision_step: Int[Tensor, "..."]  # first at-fault collision
    collision_agent: Int[Tensor, "..."]  # its agent, an index into the scene's agents
    ttc_step: Int[Tensor, "..."]  # first time-to-collision infraction
    ttc_agent: Int[Tensor, "..."]
    multiple_lanes: Bool[Tensor, "... 41"]  # in several lanes, wholly in none
    off_road: Bool[Tensor, "... 41"]  # a corner lies in no drivable polygon
    off_route: Bool[Tensor, "... 41"]  # the centre lies in no lane of the route (the devkit's "oncoming")
    in_intersection: Bool[Tensor, "... 41"]  # the centre lies in an intersection
    red_light: Bool[Tensor, "... 41"]  # the box touches a red connector; only steps up to the first are marked
    oncoming_metres: Float[Tensor, "..."]  # largest off-route distance within 1.1 s
    off_centre_steps: Int[Tensor, "..."]  # longest run of steps more than 0.5 m off the centreline
    comfort: Bool[Tensor, "... 6"]  # lon acc, lat acc, jerk, lon jerk, yaw acc, yaw rate within bounds


@dataclass(frozen=True)
class Pdms(Batch):
    """NAVSIM v1 sub-metrics of the same candidates: columns nc, dac, ep, ttc, comfort, ddc (ddc does not count)."""

    values: Float[Tensor, "... 6"]

    def score(self) -> Float[Tensor, "..."]:
        """NC * DAC * (5 EP + 5 TTC + 2 C) / 12."""
        nc, dac, ep, ttc, comfort, _ = self.values.unbind(-1)
        return nc * dac * ((5.0 * ep + 5.0 * ttc + 2.0 * comfort) / 12.0)


@dataclass(frozen=True)
class Epdms(Batch):
    """The nine sub-metrics, each in [0, 1], in the order of METRICS. NaN = not measured (EC without a previous frame)."""

    values: Float[Tensor, "... 9"]  # after the human filter
    raw: Float[Tensor, "... 9"] | None = None  # before it; None where no filter was applied
    human_filter: Literal["fixed", "legacy", "none"] = "none"
    details: Details | None = None
    pdms: Pdms | None = None

    nc = property(lambda self: self.values[..., 0], doc="no at-fault collision {0, .5, 1}")
    dac = property(lambda self: self.values[..., 1], doc="drivable area compliance {0, 1}")
    ddc = property(lambda self: self.values[..., 2], doc="driving direction compliance {0, .5, 1}")
    tlc = property(lambda self: self.values[..., 3], doc="traffic light compliance {0, 1}")
    ep = property(lambda self: self.values[..., 4], doc="ego progress relative to PDM-Closed [0, 1]")
    ttc = property(lambda self: self.values[..., 5], doc="time to collision within bound {0, 1}")
    lk = property(lambda self: self.values[..., 6], doc="lane keeping {0, 1}")
    hc = property(lambda self: self.values[..., 7], doc="history comfort {0, 1}")
    ec = property(lambda self: self.values[..., 8], doc="extended (two-frame) comfort {0, 1}")

    def score(self) -> Float[Tensor, "..."]:
        """NC*DAC*DDC*TLC * (5 EP + 5 TTC + 2 LK + 2 HC + 2 EC) / 16, or without EC / 14 where EC is NaN.

        With the `legacy` filter (devkit before 359c7f7) the score is that of the unfiltered values.
        """
        values = self.raw if self.human_filter == "legacy" and self.raw is not None else self.values
        nc, dac, ddc, tlc, ep, ttc, lk, hc, ec = values.unbind(-1)
        # The order of the sums is the devkit's: results agree to the last bit.
        base = 5.0 * ep + 5.0 * ttc + 2.0 * lk + 2.0 * hc
        weighted = torch.where(ec.isnan(), base / 14.0, (base + 2.0 * ec) / 16.0)
        return nc * dac * ddc * tlc * weighted
