"""What an agent of NAVSIM is given: four frames, half a second apart, the last of them the present one.

The classes are the devkit's own where it is installed; else they are those below, which have the same attributes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from irlvla import FileError, InputError, Observation
from irlvla_navsim.clouds import read_cloud
from irlvla_navsim.frames import CAMERAS, yaw_of
from irlvla_navsim.pickles import read_pickle

HISTORY = 4  # frames
NAMES = tuple(name.lower() for name in CAMERAS)  # cam_f0, ...


@dataclass
class Camera:
    """An image "H W 3" uint8 and its calibration; empty where it was not asked for."""

    image: Any = None
    sensor2lidar_rotation: Any = None
    sensor2lidar_translation: Any = None
    intrinsics: Any = None
    distortion: Any = None
    camera_path: Any = None


@dataclass
class Cameras:
    """The eight cameras."""

    cam_f0: Camera
    cam_l0: Camera
    cam_l1: Camera
    cam_l2: Camera
    cam_r0: Camera
    cam_r1: Camera
    cam_r2: Camera
    cam_b0: Camera


@dataclass
class Lidar:
    """Points "6 N" float32: x y z intensity ring lidar_id."""

    lidar_pc: Any = None
    lidar_path: Any = None


@dataclass
class EgoStatus:
    """The car: pose relative to the present one, velocity and acceleration "2", one-hot command "4"."""

    ego_pose: Any
    ego_velocity: Any
    ego_acceleration: Any
    driving_command: Any
    in_global_frame: bool = False


@dataclass
class AgentInput:
    """Of each of the four frames: the car, the cameras, the lidar."""

    ego_statuses: list[Any]
    cameras: list[Any]
    lidars: list[Any]


@functools.cache
def _classes() -> Any:
    """The module of the devkit's dataclasses, or this one."""
    try:
        from navsim.common import dataclasses as theirs  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        import irlvla_navsim.inputs as theirs
    return theirs


def _wanted(config: Any, iteration: int) -> frozenset[str]:
    """The sensors that a sensor config asks for in a frame: each is True, False, or a list of frames."""
    names = [*NAMES, "lidar_pc"]
    asked = {name: getattr(config, name) for name in names}
    return frozenset(name for name, when in asked.items() if when is True or (isinstance(when, Sequence) and iteration in when))


def _agent_input(statuses: list[Any], cameras: list[dict[str, Any]], lidars: list[Any]) -> Any:
    theirs = _classes()
    rigs = [theirs.Cameras(**{name: theirs.Camera(**rig.get(name, {})) for name in NAMES}) for rig in cameras]
    return theirs.AgentInput(statuses, rigs, lidars)


# -- from what policies see here ---------------------------------------------------------------------------------------


def input_of(obs: Observation, config: Any) -> Any:
    """The input of one scene: the car's own past, and the images of the present frame, as pinhole cameras in the frame of the car.

    Commands of the past are not known here: the present one stands for them. Images of the past are left out.

    Raises:
        InputError: the agent wants the lidar, or a camera that the observation does not have.
    """
    theirs, present = _classes(), HISTORY - 1
    rows = obs.ego[0].cpu().numpy().astype(np.float32)
    if len(rows) < HISTORY:
        raise InputError(f"scene {obs.token[0]} has {len(rows)} frames of history; agents of NAVSIM need {HISTORY}")
    command = np.eye(4, dtype=np.int64)[int(obs.command[0])]
    statuses = [theirs.EgoStatus(row[:3], row[3:5], row[5:7], command) for row in rows[-HISTORY:]]
    wanted = _wanted(config, present)
    if "lidar_pc" in wanted:
        raise InputError(f"scene {obs.token[0]}: the agent wants the lidar, which is read from the data alone: set logs and sensors")
    cameras = sorted(wanted)
    if cameras and obs.images is None:
        raise InputError(f"scene {obs.token[0]}: the agent wants {', '.join(cameras)}; give the data a size, or the agent logs and sensors")
    rigs: list[dict[str, Any]] = [{}] * present + [{name: _pinhole(obs, name) for name in cameras}]
    return _agent_input(statuses, rigs, [theirs.Lidar() for _ in range(HISTORY)])


def _pinhole(obs: Observation, name: str) -> dict[str, Any]:
    """A camera of an observation, which holds all eight in their order."""
    assert obs.images is not None
    assert obs.intrinsics is not None
    assert obs.camera_to_ego is not None
    if obs.images.shape[1] != len(NAMES):
        raise InputError(f"scene {obs.token[0]}: the agent wants {name}; the data must have all {len(NAMES)} cameras in NAVSIM's order")
    row = NAMES.index(name)
    image, pose = obs.images[0, row], obs.camera_to_ego[0, row].cpu().numpy()
    pixels = image if not image.is_floating_point() else (image * 255).round().byte()
    return {
        "image": pixels.permute(1, 2, 0).cpu().numpy(),
        "sensor2lidar_rotation": pose[:3, :3],
        "sensor2lidar_translation": pose[:3, 3],
        "intrinsics": obs.intrinsics[0, row].cpu().numpy(),
        "distortion": np.zeros(5),
    }


# -- from the data -----------------------------------------------------------------------------------------------------


class RecordedInputs:
    """Inputs as the devkit makes them, from logs and synthetic scenes, by token."""

    def __init__(self, logs: Path | None, sensors: Path | None, scenes: Path | None, scene_sensors: Path | None) -> None:
        """Raises `FileError` if there is no log."""
        self.sensors, self.scenes, self.scene_sensors = sensors, scenes, scene_sensors
        self.unread = sorted(Path(logs).glob("*.pkl")) if logs is not None and Path(logs).is_dir() else [Path(logs)] if logs else []
        if logs is not None and not self.unread:
            raise FileError(f"{logs} holds no log (*.pkl)")
        self.places: dict[str, tuple[Path, int]] = {}  # token -> log, frame

    def read(self, token: str, config: Any) -> Any:
        """The input of one scene. Raises `FileError` if it is not there, or a file is missing or damaged."""
        path = None if self.scenes is None else Path(self.scenes) / f"{token}.pkl"
        if path is not None and path.exists():
            frames = read_pickle(path)["frames"][:HISTORY]
            return self._made(path, [_of_synthetic(frame) for frame in frames], self.scene_sensors, config)
        log, row = self._find(token)
        frames = _log(log)[row - HISTORY + 1 : row + 1]
        return self._made(log, [_of_log(frame) for frame in frames], self.sensors, config)

    def _find(self, token: str) -> tuple[Path, int]:
        while token not in self.places and self.unread:
            path = self.unread.pop(0)
            self.places |= {str(frame["token"]): (path, row) for row, frame in enumerate(_log(path))}
        if self.places.get(token, (None, 0))[1] < HISTORY - 1:
            raise FileError(f"scene {token} is neither in the logs nor among the synthetic scenes that the agent was given")
        return self.places[token]

    def _made(self, path: Path, frames: list[dict[str, Any]], sensors: Path | None, config: Any) -> Any:
        theirs, origin = _classes(), frames[-1]["pose"]
        statuses, rigs, lidars = [], [], []
        for row, frame in enumerate(frames):
            wanted = _wanted(config, row)
            if wanted and sensors is None:
                raise FileError(f"{path}: the agent wants {', '.join(sorted(wanted))}, and its folder of sensors is not set")
            statuses.append(theirs.EgoStatus(_relative(frame["pose"], origin), *frame["motion"], frame["command"]))
            rigs.append({name.lower(): _camera(Path(str(sensors)), raw) for name, raw in frame["cams"].items() if name.lower() in wanted})
            lidar = frame["lidar"] if "lidar_pc" in wanted else None
            lidars.append(theirs.Lidar() if lidar is None else theirs.Lidar(read_cloud(Path(str(sensors)) / lidar), Path(lidar)))
        return _agent_input(statuses, rigs, lidars)


@functools.lru_cache(maxsize=2)
def _log(path: Path) -> list[dict[str, Any]]:
    frames: list[dict[str, Any]] = read_pickle(path)
    return frames


def _of_log(raw: dict[str, Any]) -> dict[str, Any]:
    motion = np.asarray(raw["ego_dynamic_state"], dtype=np.float32)
    pose = np.array([*np.asarray(raw["ego2global_translation"], dtype=np.float64)[:2], yaw_of(raw["ego2global_rotation"])])
    return {
        "pose": pose,
        "motion": (motion[:2], motion[2:]),
        "command": raw["driving_command"],
        "cams": raw["cams"],
        "lidar": raw["lidar_path"],
    }


def _of_synthetic(raw: dict[str, Any]) -> dict[str, Any]:
    status = raw["ego_status"]
    return {
        "pose": np.asarray(status["ego_pose"], dtype=np.float64),
        "motion": (status["ego_velocity"], status["ego_acceleration"]),
        "command": status["driving_command"],
        "cams": raw["camera_dict"],
        "lidar": raw["lidar_path"],
    }


def _relative(pose: Any, origin: Any) -> Any:
    cos, sin = np.cos(origin[2]), np.sin(origin[2])
    x, y, turn = pose - origin
    return np.array([cos * x + sin * y, cos * y - sin * x, np.arctan2(np.sin(turn), np.cos(turn))], dtype=np.float32)


def _camera(root: Path, raw: dict[str, Any]) -> dict[str, Any]:
    if not raw:
        return {}
    path = root / raw["data_path"]
    try:
        with Image.open(path) as image:
            pixels = np.array(image)
    except OSError as error:
        raise FileError(f"the image {path} cannot be read: {error}") from error
    return {
        "image": pixels,
        "sensor2lidar_rotation": raw["sensor2lidar_rotation"],
        "sensor2lidar_translation": raw["sensor2lidar_translation"],
        "intrinsics": raw["cam_intrinsic"],
        "distortion": raw["distortion"],
        "camera_path": raw["data_path"],
    }
