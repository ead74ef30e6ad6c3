"""One Argoverse 2 log: the poses of the car, the boxes of everything else, the cameras; city frame, seconds.

`city_SE3_egovehicle.feather` (poses of the rear axle, at about 170 Hz), `annotations.feather` (boxes in the ego frame, 10 Hz),
`calibration/{intrinsics,egovehicle_SE3_sensor}.feather`, `sensors/cameras/CAMERA/NANOSECONDS.jpg`. The last two may be missing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.feather
from numpy.typing import NDArray
from scipy.signal import savgol_filter
from scipy.spatial.transform import Rotation, Slerp

from irlvla import FileError, Kind
from irlvla.types import WHEEL_BASE
from irlvla_av2.roads import Array, Roads, read_roads

POSES = "city_SE3_egovehicle.feather"
RING = tuple(
    f"ring_{place}" for place in ("front_center", "front_left", "side_left", "rear_left", "rear_right", "side_right", "front_right")
)

KINDS = {
    **dict.fromkeys(("BICYCLE", "BICYCLIST", "MOTORCYCLE", "MOTORCYCLIST", "WHEELED_DEVICE", "WHEELED_RIDER"), Kind.BICYCLE),
    **dict.fromkeys(("PEDESTRIAN", "OFFICIAL_SIGNALER", "STROLLER", "WHEELCHAIR", "DOG"), Kind.PEDESTRIAN),
    "CONSTRUCTION_CONE": Kind.TRAFFIC_CONE,
    "CONSTRUCTION_BARREL": Kind.TRAFFIC_CONE,
    "BOLLARD": Kind.BARRIER,
    "STOP_SIGN": Kind.GENERIC,
    "SIGN": Kind.GENERIC,
    "MOBILE_PEDESTRIAN_CROSSING_SIGN": Kind.GENERIC,
    "MESSAGE_BOARD_TRAILER": Kind.GENERIC,
    "TRAFFIC_LIGHT_TRAILER": Kind.GENERIC,
}
"""Categories that are no vehicles; everything else drives."""

MOVING = (Kind.VEHICLE, Kind.BICYCLE, Kind.PEDESTRIAN)
STANDING = 0.5  # below, the steering cannot be told from the drive [m/s]
RATE = 0.1  # grid of the smoothed drive [s]
SMOOTHING = 11, 3  # window and order of the Savitzky-Golay filter that turns poses into velocities and accelerations
SEEN_AGAIN = 0.35  # a track may be missing in two sweeps [s]


@dataclass(frozen=True)
class Track:
    """One object while it was seen."""

    name: str
    kind: Kind
    size: tuple[float, float]  # length, width [m]
    time: Array  # "N" [s]
    state: Array  # "N 5": box centre x y heading vx vy

    def at(self, times: Array) -> tuple[Array, NDArray[np.bool_]]:
        """States at other times, linearly between sightings, and whether it was seen around then."""
        after = np.clip(np.searchsorted(self.time, times), 1, max(len(self.time) - 1, 1))
        gap = np.diff(self.time, append=self.time[-1] + RATE)[after - 1]
        valid = (times >= self.time[0] - 1e-3) & (times <= self.time[-1] + 1e-3) & (gap <= SEEN_AGAIN)
        columns = [np.interp(times, self.time, column) for column in self.state.T]
        return np.column_stack(columns), valid


@dataclass(frozen=True)
class Drive:
    """The car's own drive on a regular grid of 0.1 s."""

    time: Array  # "N" [s]
    state: Array  # "N 11": columns of irlvla.StateIndex, headings unwrapped

    def at(self, times: Array) -> Array:
        """States at other times, linearly."""
        return np.column_stack([np.interp(times, self.time, column) for column in self.state.T])


@dataclass(frozen=True)
class Camera:
    """Calibration of one camera."""

    intrinsics: Array  # "3 3" [pixels]
    distortion: Array  # k1 k2 p1 p2 k3
    to_ego: Array  # "4 4"


@dataclass(frozen=True)
class Log:
    """A log folder, read. Times count from `start_ns`."""

    folder: Path
    start_ns: int
    sweeps: Array  # times at which boxes were annotated [s]
    drive: Drive
    tracks: list[Track]
    roads: Roads
    cameras: dict[str, Camera]

    def stamp(self, time: float) -> int:
        """A time as the log's own microseconds."""
        return (self.start_ns + round(time * 1e9)) // 1000

    def image_near(self, camera: str, time: float) -> Path | None:
        """The image of a camera nearest to a time, within half a sweep; None if there is none."""
        stamps, paths = _images(self.folder / "sensors" / "cameras" / camera, self.start_ns)
        if not len(stamps):
            return None
        nearest = int(np.abs(stamps - time).argmin())
        return paths[nearest] if abs(stamps[nearest] - time) <= RATE / 2 else None


@functools.lru_cache(maxsize=64)  # the cameras of the logs that are open
def _images(folder: Path, start_ns: int) -> tuple[Array, list[Path]]:
    """Times and paths of the images in a folder."""
    paths = sorted(folder.glob("*.jpg"))
    return np.array([(int(path.stem) - start_ns) * 1e-9 for path in paths]), paths


def read_log(folder: Path) -> Log:
    """Read a log folder. Raises `FileError` naming the file that is missing or damaged."""
    poses, boxes = _table(folder / POSES), _table(_annotations(folder))
    maps = sorted(folder.glob("map/log_map_archive_*.json"))
    if not maps:
        raise FileError(f"{folder}/map holds no log_map_archive_*.json")
    try:
        start = int(poses["timestamp_ns"].min())
        time, kept = np.unique((poses["timestamp_ns"] - start) * 1e-9, return_index=True)
        turns, places = _rotations(poses)[kept], _places(poses)[kept]
        annotated = (boxes["timestamp_ns"] - start) * 1e-9
        return Log(
            folder=folder,
            start_ns=start,
            sweeps=np.unique(annotated),
            drive=_drive(time, turns, places),
            tracks=_tracks(boxes, annotated, time, turns, places),
            roads=read_roads(maps[0]),
            cameras=_cameras(folder / "calibration"),
        )
    except (KeyError, ValueError, IndexError) as error:
        raise FileError(f"{folder} is no Argoverse 2 log: {type(error).__name__}: {error}") from error


def sweep_times(folder: Path) -> tuple[Array, float, float]:
    """Times of the sweeps of a log, and of its first and last pose, without the rest. Raises `FileError` as `read_log`."""
    poses = _table(folder / POSES, ["timestamp_ns"])["timestamp_ns"]
    boxes = _table(_annotations(folder), ["timestamp_ns"])["timestamp_ns"]
    start, end = int(poses.min()), int(poses.max())
    return (np.unique(boxes) - start) * 1e-9, 0.0, (end - start) * 1e-9 - RATE


def _annotations(folder: Path) -> Path:
    usual = folder / "annotations.feather"
    return usual if usual.exists() else folder / "annotations_with_ego.feather"


def _table(path: Path, columns: list[str] | None = None) -> dict[str, Any]:
    """Columns of a feather file as arrays."""
    try:
        table = pyarrow.feather.read_table(path, columns=columns)
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise FileError(f"{path} is damaged, or no feather file: {error}") from error
    return {name: table[name].to_numpy() for name in table.column_names}


def _rotations(table: dict[str, Any]) -> Rotation:
    return Rotation.from_quat(np.column_stack([table[name] for name in ("qx", "qy", "qz", "qw")]))


def _places(table: dict[str, Any]) -> Array:
    return np.column_stack([table[name] for name in ("tx_m", "ty_m", "tz_m")])


def _yaw(turns: Rotation) -> Array:
    matrix = turns.as_matrix()
    return np.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])


def _drive(time: Array, turns: Rotation, places: Array) -> Drive:
    """Poses on the grid, and what a filter takes for their derivatives. Raises `ValueError` for a drive that is too short."""
    grid = np.arange(time[0], time[-1], RATE)
    heading = np.interp(grid, time, np.unwrap(_yaw(turns)))
    place = np.column_stack([np.interp(grid, time, places[:, axis]) for axis in (0, 1)])

    def derivative(values: Array, order: int) -> Array:
        return savgol_filter(values, *SMOOTHING, deriv=order, delta=RATE, axis=0)

    velocity, acceleration = (_in_body(derivative(place, order), heading) for order in (1, 2))
    turning, turning_faster = derivative(heading, 1), derivative(heading, 2)
    speed = np.hypot(*velocity.T)
    steering = np.where(speed > STANDING, np.arctan2(WHEEL_BASE * turning, np.maximum(speed, STANDING)), 0.0)
    columns = [place, heading, velocity, acceleration, steering, derivative(steering, 1), turning, turning_faster]
    return Drive(grid, np.column_stack(columns))


def _in_body(vectors: Array, heading: Array) -> Array:
    """Vectors "N 2" of the city frame in the frame of the car."""
    cos, sin = np.cos(heading), np.sin(heading)
    return np.column_stack([cos * vectors[:, 0] + sin * vectors[:, 1], cos * vectors[:, 1] - sin * vectors[:, 0]])


def _tracks(boxes: dict[str, Any], annotated: Array, time: Array, turns: Rotation, places: Array) -> list[Track]:
    when = np.clip(annotated, time[0], time[-1])
    ego = Slerp(time, turns)(when)
    centre = ego.apply(_places(boxes)) + np.column_stack([np.interp(when, time, column) for column in places.T])
    heading = _yaw(ego * _rotations(boxes))
    tracks = []
    for name in np.unique(boxes["track_uuid"]):
        rows = np.flatnonzero(boxes["track_uuid"] == name)
        rows = rows[np.argsort(annotated[rows])]
        category = boxes["category"][rows[0]]
        if category != "EGO_VEHICLE":
            kind = KINDS.get(category, Kind.VEHICLE)
            size = float(np.median(boxes["length_m"][rows])), float(np.median(boxes["width_m"][rows]))
            state = _motion(annotated[rows], centre[rows, :2], heading[rows], moves=kind in MOVING)
            tracks.append(Track(str(name), kind, size, annotated[rows], state))
    return tracks


def _motion(time: Array, centre: Array, heading: Array, moves: bool) -> Array:
    """States "N 5" of one track. Velocities are slopes over a second: boxes are drawn by hand, sweep by sweep."""
    velocity = np.zeros_like(centre)
    if moves and len(time) > 1:
        for row, now in enumerate(time):
            near = np.abs(time - now) <= 0.5
            offset = time[near] - time[near].mean()
            velocity[row] = offset @ (centre[near] - centre[near].mean(axis=0)) / max(offset @ offset, 1e-9)
    return np.column_stack([centre, np.unwrap(heading), velocity])


def _cameras(folder: Path) -> dict[str, Camera]:
    """The ring cameras that are calibrated, in order around the car; none where there is no calibration."""
    if not folder.is_dir():
        return {}
    lenses, mounts = _table(folder / "intrinsics.feather"), _table(folder / "egovehicle_SE3_sensor.feather")
    turns, places = _rotations(mounts).as_matrix(), _places(mounts)
    cameras = {}
    for name in RING:
        row, mount = np.flatnonzero(lenses["sensor_name"] == name), np.flatnonzero(mounts["sensor_name"] == name)
        if len(row) and len(mount):
            fx, fy, cx, cy, k1, k2, k3 = (float(lenses[key][row[0]]) for key in ("fx_px", "fy_px", "cx_px", "cy_px", "k1", "k2", "k3"))
            to_ego = np.eye(4)
            to_ego[:3, :3], to_ego[:3, 3] = turns[mount[0]], places[mount[0]]
            cameras[name] = Camera(np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]), np.array([k1, k2, 0.0, 0.0, k3]), to_ego)
    return cameras
