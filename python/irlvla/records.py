"""Scenes as readers make them and files hold them: `pack` builds a `Scene`, `Record` adds the cameras, `RecordDataset` serves both."""

from __future__ import annotations

import dataclasses
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from pydantic import Field
from torch import Tensor

from irlvla import components, ops
from irlvla.errors import ConfigError, InputError, did_you_mean
from irlvla.images import read_image
from irlvla.types import Batch, Command, Kind, Layer, Observation, Scene, Trajectory, offsets_of, rows_of

LOOKAHEAD, TURN = 20.0, 2.0  # a turn is where the route bends this far to a side, this far ahead [m]

# -- packing -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agent:
    """One agent or object of a scene, map frame."""

    token: str
    kind: Kind
    size: tuple[float, float]  # length, width [m]
    valid: Bool[np.ndarray, " S"]
    state: Float[np.ndarray, "S 5"]  # box centre x y heading vx vy


@dataclass(frozen=True)
class Polygon:
    """One polygon of a scene's map, map frame."""

    layer: Layer
    rings: Sequence[Float[np.ndarray, "V 2"]]  # the shell, then holes; open or closed
    on_route: bool = False
    red: Bool[np.ndarray, "41"] | None = None  # when its light is red, for connectors that have one
    speed_limit: float = float("nan")  # of lanes and connectors [m/s]; NaN = unknown
    baseline: Float[np.ndarray, "M 2"] | None = None  # of lanes and connectors: the line that traffic follows


def pack(
    *,
    token: str,
    time_us: int,
    ego: Float[np.ndarray, "11"],
    history_time_us: Int[np.ndarray, " H"],
    history: Float[np.ndarray, "H 8"],
    agents: Sequence[Agent],
    polygons: Sequence[Polygon],
    centerline: Float[np.ndarray, "L 3"],
    human: Float[np.ndarray, "T 3"] | None = None,
    human_dt: float = 0.5,
    reference: Float[np.ndarray, "41 3"] | None = None,
    previous_time_us: int = 0,
    previous_ego: Float[np.ndarray, "11"] | None = None,
    speed_limit: float = float("nan"),
    steps: int = 51,
) -> Scene:
    """A scene, a batch of one, from its parts; `Scene` says what each is. None = none recorded.

    Args:
        steps: S of the agents' states, also where there are no agents.
    """
    rings = [_open_ring(ring) for polygon in polygons for ring in polygon.rings]
    baselines = [np.zeros((0, 2)) if polygon.baseline is None else polygon.baseline for polygon in polygons]
    lit = [(row, polygon.red) for row, polygon in enumerate(polygons) if polygon.red is not None]

    def numbers(values: Any, *shape: int) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.float64).reshape(shape))

    def whole(values: Any) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=np.int64).reshape(-1))

    def flags(values: Any, *shape: int) -> Tensor:
        return torch.from_numpy(np.array(values, dtype=bool).reshape(shape))

    def offsets(sizes: Iterable[int]) -> Tensor:
        return whole(list(itertools.accumulate(sizes, initial=0)))

    nothing = np.full(3, np.nan)
    return Scene(
        token=(token,),
        time_us=whole(time_us),
        ego=numbers(ego, 1, 11),
        history_time_us=whole(history_time_us)[None],
        history=numbers(history, 1, -1, 8),
        human=numbers(np.tile(nothing, (round(4.0 / human_dt), 1)) if human is None else human, 1, -1, 3),
        human_dt=human_dt,
        human_values=None,
        reference=numbers(np.tile(nothing, (41, 1)) if reference is None else reference, 1, 41, 3),
        previous_time_us=whole(previous_time_us),
        previous_ego=numbers(np.full(11, np.nan) if previous_ego is None else previous_ego, 1, 11),
        speed_limit=numbers(speed_limit, 1),
        agent_offsets=offsets([len(agents)]),
        agent_token=tuple(agent.token for agent in agents),
        agent_kind=whole([agent.kind for agent in agents]),
        agent_size=numbers([agent.size for agent in agents], -1, 2),
        agent_valid=flags([agent.valid for agent in agents], -1, steps),
        agent_state=numbers([agent.state for agent in agents], -1, steps, 5),
        polygon_offsets=offsets([len(polygons)]),
        polygon_layer=whole([polygon.layer for polygon in polygons]),
        polygon_on_route=flags([polygon.on_route for polygon in polygons], -1),
        ring_offsets=offsets(len(polygon.rings) for polygon in polygons),
        point_offsets=offsets(map(len, rings)),
        points=numbers(np.concatenate(rings) if rings else [], -1, 2),
        light_offsets=offsets([len(lit)]),
        light_polygon=whole([row for row, _ in lit]),
        light_red=flags([red for _, red in lit], -1, 41),
        centerline_offsets=offsets([len(centerline)]),
        centerline=numbers(centerline, -1, 3),
        polygon_speed_limit=numbers([polygon.speed_limit for polygon in polygons], -1),
        baseline_offsets=offsets(map(len, baselines)),
        baseline=numbers(np.concatenate(baselines) if baselines else [], -1, 2),
    )


def _open_ring(ring: Float[np.ndarray, "V 2"]) -> Float[np.ndarray, "V 2"]:
    """A ring without its first point again at the end."""
    ring = np.asarray(ring, dtype=np.float64)
    return ring[:-1] if len(ring) > 1 and (ring[0] == ring[-1]).all() else ring


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record(Batch):
    """B scenes as files hold them: the truth, and the cameras' images by path or as JPEG bytes."""

    scene: Scene
    command: Int[Tensor, " B"]  # Command
    cameras: str  # names of the C cameras, joined by commas; "" = no cameras
    intrinsics: Float[Tensor, "B C 3 3"] | None  # of the image as stored [pixels]
    distortion: Float[Tensor, "B C 5"] | None  # k1 k2 p1 p2 k3, as OpenCV has them; None = pinhole
    camera_to_ego: Float[Tensor, "B C 4 4"] | None
    image_offsets: Int[Tensor, " B+1"] = offsets_of("image")  # C images per scene, or none where cameras is ""
    image_path: tuple[str, ...] = rows_of("image")  # relative to the root of the images; "" = embedded
    jpeg_offsets: Int[Tensor, " I+1"] = offsets_of("byte", "image")
    jpeg: UInt8[Tensor, " N"] = rows_of("byte")  # no bytes where an image has a path


def record(
    scene: Scene,
    cameras: Iterable[str] = (),
    images: Iterable[str | bytes] = (),
    intrinsics: Any = None,
    camera_to_ego: Any = None,
    distortion: Any = None,
    command: int | None = None,
) -> Record:
    """A record of one scene; each image is a path relative to the images' root, or the bytes of a JPEG file.

    Without a recorded command it is derived from the route (`command_of`).

    Raises:
        InputError: the numbers of cameras, images and calibrations differ.
    """
    names, images = list(cameras), list(images)
    arrays = {"intrinsics": (intrinsics, (3, 3)), "camera_to_ego": (camera_to_ego, (4, 4)), "distortion": (distortion, (5,))}
    tensors: dict[str, Tensor | None] = {}
    for name, (value, shape) in arrays.items():
        tensors[name] = None if value is None else torch.as_tensor(np.asarray(value, dtype=np.float64))[None]
        if value is not None and tuple(tensors[name].shape) != (1, len(names), *shape):  # type: ignore[union-attr]
            raise InputError(f"{name} of {len(names)} cameras must have shape {(len(names), *shape)}, got {np.shape(value)}")
    if len(images) not in (0, len(names)):
        raise InputError(f"{len(names)} cameras ({', '.join(names)}) need as many images, got {len(images)}")
    jpegs = [image if isinstance(image, bytes) else b"" for image in images]
    return Record(
        scene=scene,
        command=torch.tensor([command_of(scene) if command is None else command]),
        cameras=",".join(names),
        image_offsets=torch.tensor([0, len(images)]),
        image_path=tuple(image if isinstance(image, str) else "" for image in images),
        jpeg_offsets=torch.tensor(list(itertools.accumulate(map(len, jpegs), initial=0))),
        jpeg=torch.frombuffer(bytearray(b"".join(jpegs)), dtype=torch.uint8) if any(jpegs) else torch.empty(0, dtype=torch.uint8),
        **tensors,
    )


# -- samples -----------------------------------------------------------------------------------------------------------


def sample(
    scene: Scene, command: Int[Tensor, "1"], images: Mapping[str, Tensor], privileged: bool
) -> tuple[Observation, Scene, Trajectory]:
    """An item of a dataset, from one scene and, by the names of their fields in `Observation`, its images and their calibration."""
    history = torch.cat([scene.in_ego_frame(scene.history[..., :3]), scene.history[..., 3:]], -1)
    obs = Observation(scene.token, history.float(), command, scene=scene if privileged else None)
    if images:
        seen: dict[str, Any] = dict(images)
        obs = dataclasses.replace(obs, **seen)
    return obs, scene, Trajectory(scene.human.float(), scene.human_dt)


class RecordDataset(components.Dataset):
    """A dataset that makes records: what readers of files derive from. `irlvla convert` stores the records of any such dataset.

    An item is (observation, scene, human), each a batch of one; observation and human are float32. The human's poses are NaN
    where none were recorded.
    """

    class Config(components.Config):
        size: tuple[int, int] | None = Field(None, description="height and width of the images; null = no images")
        cameras: tuple[str, ...] = Field((), description="which cameras, in this order; none named = all")
        images: Path | None = Field(None, description="root of the images that are stored by path; null = the data's own folder")
        privileged: bool = Field(True, description="put the scene into the observation, for components that are given the truth")

    @abstractmethod
    def record(self, index: int) -> Record:
        """One scene, 0 <= index < len(self). Raises `FileError` if its data is missing or damaged."""

    @property
    @abstractmethod
    def root(self) -> Path:
        """The folder that image paths are relative to, unless the config names another."""

    @property
    def image_root(self) -> Path:
        """The folder that image paths are relative to."""
        return Path(self.config.images or self.root)

    def __getitem__(self, index: int) -> tuple[Observation, Scene, Trajectory]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self} has {len(self)} scenes, there is none at {index}")
        found = self.record(index % len(self))
        images = {} if self.config.size is None else self._images(found)
        return sample(found.scene, found.command, images, self.config.privileged)

    def _images(self, found: Record) -> dict[str, Tensor]:
        """Images and calibration of the chosen cameras. Raises `FileError` for an image that cannot be read."""
        names = found.cameras.split(",") if found.cameras else []
        chosen = [_position(name, names) for name in self.config.cameras] or range(len(names))
        if not len(found.image_path) or found.intrinsics is None or found.camera_to_ego is None:
            raise InputError(f"scene {found.scene.token[0]} of {self} has no images; leave `size` out, or convert them too")
        pixels, lenses = [], []
        for camera in chosen:
            path, bounds = found.image_path[camera], found.jpeg_offsets[camera : camera + 2]
            source = self.image_root / path if path else found.jpeg[bounds[0] : bounds[1]].numpy().tobytes()
            distortion = None if found.distortion is None else found.distortion[0, camera].numpy()
            image, lens = read_image(source, self.config.size, found.intrinsics[0, camera].numpy(), distortion)
            pixels.append(image)
            lenses.append(torch.from_numpy(lens))
        return {
            "images": torch.stack(pixels)[None],
            "intrinsics": torch.stack(lenses)[None].float(),
            "camera_to_ego": found.camera_to_ego[:, list(chosen)].float(),
        }


def _position(name: str, names: list[str]) -> int:
    if name not in names:
        raise ConfigError(f"there is no camera {name!r}. {did_you_mean(name, names)}Cameras: {', '.join(names) or 'none'}")
    return names.index(name)


def command_of(scene: Scene) -> Command:
    """Where the route of one scene goes, by the rule of OpenScene, from which NAVSIM has its commands.

    LEFT or RIGHT where the centreline, 20 m after the point nearest to the car, lies 2 m or more to that side of the
    direction that it has here; else STRAIGHT; UNKNOWN without a centreline. One that ends earlier counts up to its end.
    """
    line = scene.centerline.numpy()
    progress = np.append(0.0, np.hypot(*np.diff(line[:, :2], axis=0).T).cumsum())
    if progress[-1] == 0.0:
        return Command.UNKNOWN
    here, _ = ops.project(scene.ego[:, :2], scene.centerline[:, :2])
    columns = line[:, 0], line[:, 1], np.unwrap(line[:, 2])
    x, y, heading = (np.interp([here.item(), here.item() + LOOKAHEAD], progress, column) for column in columns)
    left = np.cos(heading[0]) * (y[1] - y[0]) - np.sin(heading[0]) * (x[1] - x[0])
    return Command.LEFT if left >= TURN else Command.RIGHT if left <= -TURN else Command.STRAIGHT
