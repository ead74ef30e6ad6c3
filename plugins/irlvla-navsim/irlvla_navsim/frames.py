"""Frames of OpenScene logs and of NAVSIM's synthetic scenes in one form.

A frame is half a second. Poses are of the rear axle, in the UTM frame of the map; boxes and their velocities are stored in the
frame of the car and moved out of it as the devkit does: in the plane, by its heading.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from irlvla import FileError, Kind
from irlvla_navsim.maps import Array
from irlvla_navsim.pickles import Stub, read_pickle

CAMERAS = ("CAM_F0", "CAM_L0", "CAM_L1", "CAM_L2", "CAM_R0", "CAM_R1", "CAM_R2", "CAM_B0")

KINDS = {
    "vehicle": Kind.VEHICLE,
    "pedestrian": Kind.PEDESTRIAN,
    "bicycle": Kind.BICYCLE,
    "traffic_cone": Kind.TRAFFIC_CONE,
    "barrier": Kind.BARRIER,
    "czone_sign": Kind.CONSTRUCTION_SIGN,
    "generic_object": Kind.GENERIC,
}
MOVING = (Kind.VEHICLE, Kind.PEDESTRIAN, Kind.BICYCLE)
RED = 2  # nuPlan's TrafficLightStatusType


@dataclass(frozen=True)
class Box:
    """One annotated object at one time, map frame."""

    track: str
    kind: Kind
    size: tuple[float, float]
    state: Array  # x y heading vx vy


@dataclass(frozen=True)
class Camera:
    """One image and its calibration."""

    path: str  # relative to the sensor blobs
    to_ego: Array  # "4 4"
    intrinsics: Array  # "3 3"
    distortion: Array  # "5"


@dataclass(frozen=True)
class Frame:
    """What was recorded at one time."""

    token: str
    time_us: int
    route: tuple[str, ...]
    lights: dict[str, bool]  # of connectors: is it red
    pose: Array  # x y heading
    motion: Array  # vx vy ax ay, frame of the car
    command: int  # irlvla.Command
    boxes: tuple[Box, ...] | None  # None = not annotated
    cameras: dict[str, Camera]
    map_name: str
    log_name: str


# -- logs --------------------------------------------------------------------------------------------------------------


def read_log(path: Path) -> list[Frame]:
    """The frames of an OpenScene log. Raises `FileError` if it is damaged or lacks a field."""
    frames = read_pickle(path)
    try:
        return [_frame(raw) for raw in frames]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise FileError(f"{path} is no OpenScene log: {type(error).__name__}: {error}") from error


def _frame(raw: dict[str, Any]) -> Frame:
    x, y = np.asarray(raw["ego2global_translation"], dtype=np.float64)[:2]
    pose = np.array([x, y, yaw_of(raw["ego2global_rotation"])])
    annotations = raw.get("anns")
    return Frame(
        token=str(raw["token"]),
        time_us=int(raw["timestamp"]),
        route=tuple(str(block) for block in raw["roadblock_ids"]),
        lights={str(int(connector)): bool(red) for connector, red in raw["traffic_lights"]},
        pose=pose,
        motion=np.asarray(raw["ego_dynamic_state"], dtype=np.float32).astype(np.float64),
        command=int(np.argmax(raw["driving_command"])),
        boxes=None if annotations is None else _boxes(annotations, "gt_boxes", "gt_names", "gt_velocity_3d", pose),
        cameras={
            name: _camera(raw["cams"][name], np.asarray(raw["lidar2ego"], dtype=np.float64)) for name in CAMERAS if raw["cams"].get(name)
        },
        map_name=str(raw["map_location"]),
        log_name=str(raw["log_name"]),
    )


def yaw_of(quaternion: Any) -> float:
    """Heading of a quaternion w x y z, as pyquaternion computes it."""
    w, x, y, z = np.asarray(quaternion, dtype=np.float64) / np.linalg.norm(np.asarray(quaternion, dtype=np.float64))
    return float(np.arctan2(2 * (w * z - x * y), 1 - 2 * (y * y + z * z)))


def _boxes(annotations: dict[str, Any], boxes: str, names: str, velocities: str, pose: Array) -> tuple[Box, ...]:
    cos, sin = np.cos(pose[2]), np.sin(pose[2])
    found = []
    rows = zip(annotations[boxes], annotations[names], annotations[velocities], annotations["track_tokens"], strict=True)
    for box, name, velocity, track in rows:
        x, y, _, length, width, _, yaw = (float(value) for value in box)
        vx, vy = (float(value) for value in velocity[:2])
        kind = KINDS[str(name)]
        moves = kind in MOVING
        state = [x * cos - y * sin + pose[0], x * sin + y * cos + pose[1], _wrap(yaw + pose[2])]
        speed = [vx * cos - vy * sin, vx * sin + vy * cos] if moves else [0.0, 0.0]
        found.append(Box(str(track), kind, (length, width), np.array(state + speed)))
    return tuple(found)


def _wrap(angle: float) -> float:
    return float(np.arctan2(np.sin(angle), np.cos(angle)))


def _camera(raw: dict[str, Any], lidar_to_ego: Array) -> Camera:
    to_lidar = np.eye(4)
    to_lidar[:3, :3], to_lidar[:3, 3] = raw["sensor2lidar_rotation"], raw["sensor2lidar_translation"]
    intrinsics, distortion = (np.asarray(raw[key], dtype=np.float64) for key in ("cam_intrinsic", "distortion"))
    return Camera(str(raw["data_path"]), lidar_to_ego @ to_lidar, intrinsics, distortion)


# -- synthetic scenes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SyntheticScene:
    """A scene of the second stage: its frames, and what follows the last of them."""

    token: str
    original: str  # token of the last frame of the first-stage scene that it belongs to
    history: int  # frames up to the present one
    frames: list[Frame]
    later_boxes: list[tuple[Box, ...]]
    later_lights: list[dict[str, bool]]


def read_synthetic(path: Path) -> SyntheticScene:
    """A synthetic scene, as `Scene.save_to_disk` of the devkit writes it. Raises `FileError` if it is damaged or lacks a field."""
    raw = read_pickle(path)
    try:
        about = raw["scene_metadata"]
        frames = [_synthetic_frame(frame, about) for frame in raw["frames"]]
        return SyntheticScene(
            token=str(about["initial_token"]),
            original=str(about["corresponding_original_scene"]),
            history=int(about["num_history_frames"]),
            frames=frames,
            later_boxes=[
                tuple(map(stub_box, tracks.tracked_objects.tracked_objects)) for tracks in raw["extended_detections_tracks"] or []
            ],
            later_lights=[_stub_lights(lights) for lights in raw["extended_traffic_light_data"] or []],
        )
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FileError(f"{path} is no synthetic scene: {type(error).__name__}: {error}") from error


def _synthetic_frame(raw: dict[str, Any], about: dict[str, Any]) -> Frame:
    status = raw["ego_status"]
    pose = np.asarray(status["ego_pose"], dtype=np.float64)
    motion = np.concatenate([status["ego_velocity"], status["ego_acceleration"]]).astype(np.float32).astype(np.float64)
    cameras = {name: raw["camera_dict"].get(name.lower()) for name in CAMERAS}
    return Frame(
        token=str(raw["token"]),
        time_us=int(raw["timestamp"]),
        route=tuple(str(block) for block in raw["roadblock_ids"]),
        lights={str(int(connector)): bool(red) for connector, red in raw["traffic_lights"]},
        pose=pose,
        motion=motion,
        command=int(np.argmax(status["driving_command"])),
        boxes=_boxes(raw["annotations"], "boxes", "names", "velocity_3d", pose),
        cameras={name: _camera(camera, np.eye(4)) for name, camera in cameras.items() if camera},
        map_name=str(about["map_name"]),
        log_name=str(about["log_name"]),
    )


def stub_box(thing: Stub) -> Box:
    """A tracked object of nuPlan; its box and velocity are in the map frame already."""
    kind = enum_value(thing._tracked_object_type)
    centre = thing._box._center
    speed = [float(thing._velocity._x), float(thing._velocity._y)] if kind in MOVING else [0.0, 0.0]
    state = np.array([centre.x, centre.y, centre.heading, *speed], dtype=np.float64)
    return Box(str(thing._metadata.track_token), Kind(kind), (float(thing._box._length), float(thing._box._width)), state)


def _stub_lights(lights: Stub) -> dict[str, bool]:
    return {str(light.lane_connector_id): enum_value(light.status) == RED for light in lights.traffic_lights}


def enum_value(member: Stub) -> int:
    """The number of an enumeration's member, which pickles as what it was made from."""
    number = member._arguments[0]
    return int(number[0] if isinstance(number, tuple) else number)
