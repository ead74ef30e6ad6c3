"""Between CARLA's frames and those of irlvla: here alone.

CARLA is left-handed: x forward (east), y right (south), z up; degrees; yaw clockwise as seen from above. Its cars have their origin on the
road below the middle. irlvla is right-handed: x forward, y left, z up; radians; headings counter-clockwise; the car's origin is on
the road below its rear axle. The plane that routes and positions are in here is CARLA's world with y turned round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

REAR_AXLE = -1.4  #: x in the frame of CARLA's car, a Lincoln MKZ [m]; where the public agents mount IMU and GNSS
WHEEL_BASE = 2.85  #: of that car [m]
EARTH_RADIUS = 6378137.0  #: of CARLA's projection [m]
FLIP: Array = np.diag([1.0, -1.0, 1.0])  # from left-handed to right-handed, and back
LENS: Array = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])  # a camera's x, y and z in a car that it looks along


def camera_to_ego(sensor: Mapping[str, Any]) -> Array:
    """The mount "4 4" of a camera, given as the leaderboard's agents give it: x, y, z [m], roll, pitch, yaw [degrees]."""
    roll, pitch, yaw = (math.radians(sensor[name]) for name in ("roll", "pitch", "yaw"))
    pose = np.eye(4)
    pose[:3, :3] = FLIP @ _rotation(roll, pitch, yaw) @ FLIP @ LENS
    pose[:3, 3] = FLIP @ (sensor["x"] - REAR_AXLE, sensor["y"], sensor["z"])
    return pose


def _rotation(roll: float, pitch: float, yaw: float) -> Array:
    """CARLA's rotation matrix [rad]: from the frame of a sensor to that of the car, both left-handed."""
    (cr, sr), (cp, sp), (cy, sy) = ((math.cos(angle), math.sin(angle)) for angle in (roll, pitch, yaw))
    return np.array(
        [
            [cp * cy, cy * sp * sr - sy * cr, -cy * sp * cr - sy * sr],
            [cp * sy, sy * sp * sr + cy * cr, -sy * sp * cr + cy * sr],
            [sp, -cp * sr, cp * cr],
        ]
    )


def intrinsics(sensor: Mapping[str, Any]) -> Array:
    """The pinhole "3 3" of a camera of `width` and `height` [pixels] that sees `fov` degrees across; the first pixel's centre is (0, 0)."""
    width, height = sensor["width"], sensor["height"]
    focal = width / (2.0 * math.tan(math.radians(sensor["fov"]) / 2.0))
    return np.array([[focal, 0.0, width / 2.0 - 0.5], [0.0, focal, height / 2.0 - 0.5], [0.0, 0.0, 1.0]])


def heading(compass: float) -> float:
    """Of CARLA's compass: clockwise from north, which is where y decreases [rad]."""
    return math.remainder(math.pi / 2.0 - compass, math.tau)


def acceleration(imu: Array) -> tuple[float, float]:
    """Forward and to the left [m/s^2], of an IMU's accelerometer (x, y, z), gyroscope (x, y, z) and compass."""
    return float(imu[0]), -float(imu[1])


def yaw_rate(imu: Array) -> float:
    """Counter-clockwise [rad/s]."""
    return -float(imu[5])


def steer(left: float) -> float:
    """CARLA's steering, which is positive to the right, for one that is positive to the left."""
    return -left


def plane(world: Array) -> Array:
    """Places "N 2" of CARLA's world in the plane."""
    return world * (1.0, -1.0)


@dataclass(frozen=True)
class Projection:
    """From latitude and longitude to the plane: Mercator's, as CARLA has it, with the scale and the origin of a map."""

    scale: float
    origin: Array  # what the projection of (0, 0) is in the plane

    @classmethod
    def fit(cls, gps: Array, world: Array) -> Projection:
        """The one that maps places "N 2" (latitude, longitude) [degrees] to CARLA's world "N 2" best.

        Of one place alone, or of several that are one, the scale is that of its latitude.
        """
        projected, places = _mercator(gps), plane(world)
        middle = projected.mean(axis=0), places.mean(axis=0)
        spread = projected - middle[0]
        if (squares := float((spread**2).sum())) > 1.0:
            scale = float((spread * (places - middle[1])).sum()) / squares
        else:
            scale = math.cos(math.radians(float(gps[0, 0])))
        return cls(scale, middle[1] - scale * middle[0])

    def __call__(self, gps: Array) -> Array:
        """Places "N 2" (latitude, longitude) in the plane."""
        return self.origin + self.scale * _mercator(gps)


def _mercator(gps: Array) -> Array:
    latitude, longitude = np.radians(gps).T
    return EARTH_RADIUS * np.column_stack([longitude, np.log(np.tan(math.pi / 4.0 + latitude / 2.0))])
