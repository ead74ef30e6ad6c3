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
import functools
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

import numpy as np
import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from irlvla.errors import FileError, InputError
from irlvla.files import write_whole

STEPS = 41  #: simulated states: 0 ... 4 s at 0.1 s
STEP = 0.1  #: seconds between simulated states
HORIZON = 4.0  #: seconds

# The ego: Chrysler Pacifica (nuPlan get_pacifica_parameters) [m]. Sums are written as there: they decide the last bit.
WIDTH = 1.1485 * 2.0
LENGTH = 4.049 + 1.127
REAR_AXLE_TO_CENTRE = LENGTH / 2.0 - 1.127
WHEEL_BASE = 3.089

PROGRESS_THRESHOLD = 5.0  #: metres; where neither the plan nor PDM-Closed makes more, EP is 1

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


class Command(IntEnum):
    """Driving commands, in NAVSIM's one-hot order."""

    LEFT = 0
    STRAIGHT = 1
    RIGHT = 2
    UNKNOWN = 3


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


def offsets_of(rows: str, parent: str = "scene", **default: Any) -> Any:
    """A field of row offsets: rows `o[i]:o[i+1]` of group `rows` belong to row `i` of group `parent`."""
    return field(metadata={"offsets": rows, "parent": parent}, **default)


def rows_of(group: str, **default: Any) -> Any:
    """A field whose leading axis runs over the rows of a ragged group instead of over scenes."""
    return field(metadata={"rows": group}, **default)


@dataclass(frozen=True)
class Batch:
    """A frozen dataclass of tensors, tuples of strings, dictionaries of tensors and other batches that share a leading axis.

    Ragged data is packed, never padded: a field made with `rows_of("agent")` holds the rows of all scenes one after
    the other, and the field made with `offsets_of("agent")` says which belong to whom. Optional fields may be None;
    numbers and strings describe the whole batch.

    A type of tensors alone is dense: its items have one axis less. A type with names or ragged rows, its own or of a
    batch in it, has no axis to drop: its items are batches of one, and stacking them is `cat`.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Pickled and copied without what was derived from it and is kept with it."""
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    # -- shape -------------------------------------------------------------------------------------------------------
    @classmethod
    @functools.cache
    def _groups(cls) -> dict[str, tuple[str, str]]:
        """Ragged groups in dependency order: name -> (parent, name of the offsets field)."""
        found = [(f.metadata["offsets"], f.metadata["parent"], f.name) for f in dataclasses.fields(cls) if "offsets" in f.metadata]
        return {rows: (parent, name) for rows, parent, name in found}

    @classmethod
    @functools.cache
    def _row_groups(cls) -> tuple[tuple[str, str], ...]:
        """Names of the fields other than offsets, and over the rows of which group each runs."""
        return tuple((f.name, f.metadata.get("rows", "scene")) for f in dataclasses.fields(cls) if "offsets" not in f.metadata)

    def _fields(self) -> Iterator[tuple[str, Any]]:
        """Names and values of what has a leading axis."""
        for name in type(self).__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Tensor | tuple | Batch) or (isinstance(value, dict) and value):
                yield name, value

    def __len__(self) -> int:
        for name, value in self._fields():
            metadata = type(self).__dataclass_fields__[name].metadata
            if "rows" not in metadata:
                first = next(iter(value.values())) if isinstance(value, dict) else value
                if isinstance(first, Tensor) and first.ndim == 0:
                    raise InputError(f"this {type(self).__name__} is a single item: it has no leading axis left")
                return len(first) - ("offsets" in metadata)
        raise InputError(f"{type(self).__name__} holds no data")

    def _dense(self) -> bool:
        """Whether an item has one axis less, instead of being a batch of one."""
        if self._groups():
            return False
        return not any(isinstance(value, tuple) or (isinstance(value, Batch) and not value._dense()) for _, value in self._fields())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the tensors that are present; those of a nested batch as "details.states"."""
        for name, value in self._fields():
            if isinstance(value, Tensor):
                yield name, value
            elif not isinstance(value, tuple):
                inner = value.items() if isinstance(value, dict) else value.tensors()
                yield from ((f"{name}.{key}", tensor) for key, tensor in inner)

    @property
    def device(self) -> torch.device:
        for _, value in self.tensors():
            return value.device
        raise InputError(f"{type(self).__name__} holds no data")

    def _map(self, change: Callable[[Any], Any]) -> Self:
        """Change every tensor, and every batch in this one as a whole."""
        changed = {}
        for name, value in self._fields():
            if not isinstance(value, tuple):
                changed[name] = {key: change(tensor) for key, tensor in value.items()} if isinstance(value, dict) else change(value)
        return dataclasses.replace(self, **changed)

    def to(
        self, device: str | int | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> Self:
        """As `torch.Tensor.to`. A dtype applies to floating-point fields only, and not to a scene that is part of another batch:
        its geometry decides metrics and stays as exact as it is.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        if dtype is not None and not dtype.is_floating_point:
            raise InputError(f"to({dtype}): a floating-point dtype is needed, integer and boolean fields keep theirs")

        def move(value: Any) -> Any:
            keep = bool(value._groups()) if isinstance(value, Batch) else not value.is_floating_point()
            return value.to(device=device, dtype=None if keep else dtype, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> Self:
        return self._map(lambda value: value.pin_memory())

    # -- selection ---------------------------------------------------------------------------------------------------
    def __getitem__(self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> Self:
        """Select along the leading axis. An int drops the axis of dense types; of others it keeps a batch of one."""
        if self._groups() and (span := _span(index, len(self))):
            return self._spanned(*span)
        rows = _rows(index, len(self))
        if isinstance(rows, int) and not self._dense():
            rows = torch.tensor([rows])
        if not self._groups():
            view = index if isinstance(index, slice) and (index.step or 1) > 0 else rows
            return dataclasses.replace(self, **{name: _take(name, value, view) for name, value in self._fields()})
        chosen, picked = {"scene": torch.as_tensor(rows).cpu().numpy()}, {}
        for group, (parent, name) in self._groups().items():
            bounds = getattr(self, name).cpu().numpy()
            starts, ends = bounds[chosen[parent]], bounds[chosen[parent] + 1]
            offsets = np.concatenate([[0], np.cumsum(ends - starts)])
            chosen[group] = np.repeat(starts - offsets[:-1], ends - starts) + np.arange(offsets[-1])
            picked[name] = torch.from_numpy(offsets).to(getattr(self, name))
        indices = {group: torch.from_numpy(index) for group, index in chosen.items()}
        for name, value in self._fields():
            if name not in picked:
                picked[name] = _take(name, value, indices[type(self).__dataclass_fields__[name].metadata.get("rows", "scene")])
        return dataclasses.replace(self, **picked)

    def _spanned(self, first: int, last: int) -> Self:
        """Neighbouring items of a ragged type, as views: what iterating over many scenes spends its time on."""
        spans, values = {"scene": (first, last)}, dict(self.__getstate__())
        for group, (parent, name) in self._groups().items():
            start, end = spans[parent]
            offsets = values[name].cpu().numpy()[start : end + 1]
            spans[group] = int(offsets[0]), int(offsets[-1])
            values[name] = torch.from_numpy(offsets - offsets[0]).to(values[name].device)
        for name, group in self._row_groups():
            start, end = spans[group]
            value = values[name]
            if isinstance(value, Tensor | tuple | Batch):
                values[name] = value[start:end]
            elif isinstance(value, dict):
                values[name] = {key: tensor[start:end] for key, tensor in value.items()}
        item = object.__new__(type(self))
        item.__dict__.update(values)
        return item

    @classmethod
    def cat(cls, items: Iterable[Self]) -> Self:
        """Concatenate along the leading axis; ragged groups are re-offset. A field must be present in all or in none."""
        items = list(items)
        if not items:
            raise InputError(f"{cls.__name__}.cat needs at least one item")
        if strangers := {type(item).__name__ for item in items if not isinstance(item, cls)}:
            raise InputError(f"{cls.__name__}.cat got {', '.join(sorted(strangers))}")
        return cls(**{f.name: _join(cls.__name__, f, [getattr(item, f.name) for item in items]) for f in dataclasses.fields(cls)})

    @classmethod
    def stack(cls, items: Iterable[Self]) -> Self:
        """Put items together: the inverse of selecting them one by one."""
        return cls.cat(_with_axis(item) if item._dense() else item for item in items)

    # -- files -------------------------------------------------------------------------------------------------------
    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whole or not at all; the same batch gives the same bytes.

        Strings and numbers go to its metadata, in one entry (several would be in random order): type, checksum, JSON.
        """
        tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in self.tensors()}
        fields = json.dumps(self._plain())
        metadata = f"{type(self).__name__} {_checksum(fields, tensors)} {fields}"
        return write_whole(path, safetensors.torch.save(tensors, {"irlvla": metadata}))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu", *, mapped: bool = False) -> Self:
        """Read a file written by `save`. Raises `FileError` for anything else: truncated, corrupt, of another type.

        With `mapped`, tensors are views of the file: it is read where and when they are, and its checksum is not looked at.
        """
        try:
            with safetensors.safe_open(os.fspath(path), framework="pt") as stream:
                kind, _, rest = (stream.metadata() or {}).get("irlvla", "").partition(" ")
                # Copies, unless asked otherwise: a map is of a file that another process may shorten.
                tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
                tensors = tensors if mapped else {name: tensor.clone() for name, tensor in tensors.items()}
        except FileNotFoundError as error:
            raise FileError(f"{path} does not exist") from error
        except Exception as error:
            raise FileError(f"{path} is not a whole {cls.__name__} file ({error}); write it again with {cls.__name__}.save") from error
        if kind != cls.__name__:
            raise FileError(f"{path} holds {kind or 'something else'!r:.80}, not {cls.__name__!r}")
        checksum, _, fields = rest.partition(" ")
        if not mapped and checksum != _checksum(fields, tensors):
            raise FileError(f"{path} is corrupt: its content does not match its checksum; write it again with {cls.__name__}.save")
        try:
            return cls._build(json.loads(fields), tensors).to(device)
        except (TypeError, ValueError) as error:
            raise FileError(f"{path} was written by another version of {cls.__name__}: {error}") from error

    def _plain(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON can hold it: batches are dictionaries, and dictionaries of tensors are empty."""
        plain: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if not isinstance(value, Tensor):
                plain[f.name] = value._plain() if isinstance(value, Batch) else {} if isinstance(value, dict) else value
        return plain

    @classmethod
    def _build(cls, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `_plain` and `tensors`."""
        values = {**plain, **{name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in plain}}
        names = {f.name for f in dataclasses.fields(cls)}
        needed = {f.name for f in dataclasses.fields(cls) if not f.metadata or f.default is MISSING}  # ragged rows may be absent
        if not needed <= values.keys() <= names:
            raise ValueError(f"it has the fields {sorted(values)}, {cls.__name__} needs {sorted(needed)}")
        for name, value in plain.items():
            if isinstance(value, list):
                values[name] = tuple(value)
            elif isinstance(value, dict):
                inner = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
                hint = get_type_hints(cls)[name]
                kinds = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Batch)]
                values[name] = kinds[0]._build(value, inner) if kinds else inner
        return cls(**values)


def _rows(index: Any, count: int) -> int | Tensor:
    """An index into `count` rows as one position or as a 1-D tensor of positions, in range and not negative."""
    if isinstance(index, slice):
        return torch.tensor(range(count)[index], dtype=torch.int64)
    try:
        rows = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"an index along the leading axis is an int, a slice, a list or a 1-D tensor, not {index!r}") from error
    if isinstance(index, list) and not index:
        rows = rows.to(torch.int64)
    if rows.ndim == 1 and rows.dtype == torch.bool:
        if len(rows) != count:
            raise IndexError(f"a mask of {len(rows)} for {count} rows")
        return rows.nonzero().squeeze(1)
    if rows.ndim > 1 or isinstance(index, tuple) or rows.dtype.is_floating_point or rows.dtype.is_complex or rows.dtype == torch.bool:
        raise InputError(f"an index along the leading axis is an int, a slice, or 1-D of ints or bools, not {index!r}")
    rows = rows.to(torch.int64)
    if bool(((rows < -count) | (rows >= count)).any()):
        raise IndexError(f"index {index} is out of range for {count} rows")
    rows = torch.where(rows < 0, rows + count, rows)
    return int(rows) if rows.ndim == 0 else rows


def _span(index: Any, count: int) -> tuple[int, int] | None:
    """The range of items that an int or a slice selects; None if they are not neighbours in order, or it is something else."""
    if isinstance(index, slice):
        first, last, step = index.indices(count)
        return (first, max(first, last)) if step == 1 else None
    if isinstance(index, int) and not isinstance(index, bool) and -count <= index < count:
        return index % count, index % count + 1
    return None


def _with_axis(value: Any) -> Any:
    """A dense batch, or a tensor, with a leading axis of one."""
    return value._map(_with_axis) if isinstance(value, Batch) else value[None]


def _take(name: str, value: Any, index: int | slice | Tensor) -> Any:
    """Rows of a field."""
    if isinstance(value, dict):
        return {inner: _take(f"{name}.{inner}", tensor, index) for inner, tensor in value.items()}
    if isinstance(value, Tensor):
        if value.ndim == 0:
            raise InputError(f"'{name}' is a single value: it has no leading axis left to index")
        return value[index.to(value.device) if isinstance(index, Tensor) else index]
    if isinstance(value, tuple) and not isinstance(index, slice):
        return tuple(value[i] for i in torch.as_tensor(index).reshape(-1).tolist())
    return value[index]


def _join(owner: str, field: dataclasses.Field[Any], values: Sequence[Any]) -> Any:
    """One field of several batches, concatenated."""
    label = f"{owner}.cat: '{field.name}'"
    first, present = values[0], [value is not None for value in values]
    if any(present) != all(present):
        raise InputError(f"{label} is present in some items and missing in others")
    if isinstance(first, Batch):
        return type(first).cat(values)
    if isinstance(first, tuple):
        return tuple(itertools.chain.from_iterable(values))
    if isinstance(first, dict):
        if any(value.keys() != first.keys() for value in values):
            raise InputError(f"{label} has other keys in other items: {', '.join(sorted({str(sorted(value)) for value in values}))}")
        return {key: _cat(f"{label[:-1]}.{key}'", [value[key] for value in values]) for key in first}
    if not isinstance(first, Tensor):
        if any(value != first for value in values):
            raise InputError(f"{label} differs between the items ({', '.join(sorted({repr(v) for v in values}))}); it must be the same")
        return first
    if "offsets" in field.metadata:
        starts = list(itertools.accumulate((int(value[-1]) for value in values), initial=0))
        return torch.cat([first[:1], *(value[1:] + start for value, start in zip(values, starts, strict=False))])
    return _cat(label, values)


def _cat(label: str, values: Sequence[Tensor]) -> Tensor:
    try:
        return torch.cat(list(values))
    except RuntimeError as error:
        raise InputError(f"{label} does not fit together: {', '.join(str(tuple(v.shape)) for v in values)} ({error})") from error


def _checksum(fields: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of names, types, shapes and bytes: finds what a truncated or damaged file changed."""
    value = zlib.crc32(fields.encode())
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


@dataclass(frozen=True)
class Scene(Batch):
    """B recorded or generated scenes with everything that the score needs, in the map frame, packed.

    The time axis of agents has 41 steps (0 ... 4.0 s at 0.1 s) or 51 (to 5.0 s; PDMS v1 looks further ahead).
    Rings are open (first point not repeated); the first ring of a polygon is its shell, others are holes.

    Lanes and connectors may carry the line that traffic follows, in driving direction; other polygons have none. Only
    reactive traffic reads baselines and their speed limits, and needs them of every lane and connector: all points of the map's
    baseline path, the last included, in the map's numbers, since its vertices decide how far away things are. Where an agent
    stands in several lanes whose headings fit it equally well, the polygon that comes first wins: keep the map's order. Scenes
    that are made without these fields have no baselines.
    """

    token: tuple[str, ...]  # B names
    time_us: Int[Tensor, " B"]  # time stamp of the initial ego state [us]
    ego: Float[Tensor, "B 11"]  # initial state, columns of StateIndex
    history_time_us: Int[Tensor, "B H"]
    history: Float[Tensor, "B H 8"]  # logged ego up to t = 0, columns of StateIndex up to steering
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

    polygon_speed_limit: Float[Tensor, " P"] = rows_of("polygon", default=None)  # of lanes and connectors [m/s]; NaN = none in the map
    baseline_offsets: Int[Tensor, " P+1"] = offsets_of("baseline", "polygon", default=None)
    baseline: Float[Tensor, "M 2"] = rows_of("baseline", default=None)  # x y

    def __post_init__(self) -> None:
        polygons = self.polygon_layer
        nothing = {
            "polygon_speed_limit": lambda: self.points.new_full((len(polygons),), torch.nan),
            "baseline_offsets": lambda: polygons.new_zeros(len(polygons) + 1),
            "baseline": lambda: self.points.new_zeros((0, 2)),
        }
        for name, make in nothing.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, make())

    def in_ego_frame(self, poses: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N 3"]:
        """Poses of the map frame in the ego frame of their scene."""
        dx, dy, turn = (poses - self.ego[:, None, :3]).unbind(-1)
        cos, sin = self.ego[:, 2:3].cos(), self.ego[:, 2:3].sin()
        return torch.stack([cos * dx + sin * dy, cos * dy - sin * dx, torch.atan2(turn.sin(), turn.cos())], -1)


@dataclass(frozen=True)
class Observation(Batch):
    """What a policy may see in B scenes: sensors, its own state, and where it is told to go."""

    token: tuple[str, ...]  # B names, as in Scene
    ego: Float[Tensor, "B H 8"]  # oldest first, the last at t = 0; columns of StateIndex up to steering, the pose in the ego frame
    command: Int[Tensor, " B"]  # Command
    images: Tensor | None = None  # "B C 3 H W" uint8, or floats in [0, 1]
    intrinsics: Float[Tensor, "B C 3 3"] | None = None  # pinhole, pixels of `images`: x right, y down, z forward
    camera_to_ego: Float[Tensor, "B C 4 4"] | None = None
    prompt: tuple[str, ...] | None = None  # B texts
    scene: Scene | None = None  # privileged: for planners and backbones that are given the truth; None where sensors must do


@dataclass(frozen=True)
class Features(Batch):
    """Tokens of width D, by name, that backbone and reasoner make of an observation. None = not made.

    Of ragged tokens, `_valid` says which exist; None = all.
    """

    observation: Observation
    bev: Float[Tensor, "B D X Y"] | None = None  # bird's-eye-view grid: X along ego x (forward), Y along ego y (left)
    bev_range: Float[Tensor, "B 4"] | None = None  # what it covers: least x, greatest x, least y, greatest y [m, ego frame]
    agents: Float[Tensor, "B N D"] | None = None
    agents_valid: Bool[Tensor, "B N"] | None = None
    map: Float[Tensor, "B M D"] | None = None
    map_valid: Bool[Tensor, "B M"] | None = None
    status: Float[Tensor, "B D"] | None = None
    language: Float[Tensor, "B L D"] | None = None
    language_valid: Bool[Tensor, "B L"] | None = None
    predictions: dict[str, Tensor] = field(default_factory=dict)  # what only the loss of their maker reads

    def merged(self, other: Features) -> Features:
        """The features of both; of one observation. Raises `InputError` if both made the same tokens."""
        mine, theirs = (
            {name: value for name, value in features._fields() if name not in ("observation", "predictions")} for features in (self, other)
        )
        twice = (mine.keys() & theirs.keys()) | (self.predictions.keys() & other.predictions.keys())
        if twice:
            raise InputError(f"both the backbone and the reasoner make {', '.join(sorted(twice))}; one of them must not")
        return dataclasses.replace(self, **theirs, predictions=self.predictions | other.predictions)


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
    trace: Tensor | None = None  # "B K D+1 ...": the chain of D sampling steps, noise first, in the planner's own terms
    score: Float[Tensor, "B K"] | None = None  # the planner's own preference: the highest is driven, without one the first

    def best(self) -> Trajectory:
        """The proposal that would be driven, "B T 3"; of equals the first."""
        if self.score is None:
            return Trajectory(self.poses[..., 0, :, :], self.dt)
        row = self.score.argmax(dim=-1)[..., None, None, None]
        return Trajectory(self.poses.take_along_dim(row, dim=-3).squeeze(-3), self.dt)


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


@dataclass(frozen=True)
class Rollout(Batch):
    """What an RL algorithm learns from: K sampled plans in each of B scenes and how they were rewarded."""

    observation: Observation
    human: Trajectory  # poses "B T 3" of the human's drive, for the imitation anchor; NaN = none recorded
    plan: Plan
    log_prob: Float[Tensor, "B K D"]  # of each sampling step, under the policy that sampled
    reward: Float[Tensor, "B K"]
    values: Float[Tensor, "B K 9"]  # sub-metrics in METRICS order; NaN = not measured
