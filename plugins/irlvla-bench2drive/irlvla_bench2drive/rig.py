"""The sensors of Bench2Drive, and images and calibration as a policy gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from irlvla import ConfigError
from irlvla.errors import did_you_mean
from irlvla.images import Size, fit
from irlvla_bench2drive import geometry
from irlvla_bench2drive.geometry import REAR_AXLE, Array


def _camera(name: str, x: float, y: float, yaw: float, fov: float = 70.0) -> dict[str, Any]:
    place = {"x": x, "y": y, "z": 1.60, "roll": 0.0, "pitch": 0.0, "yaw": yaw}
    return {"type": "sensor.camera.rgb", "id": name, "width": 1600, "height": 900, "fov": fov, **place}


CAMERAS = {
    camera["id"]: camera
    for camera in (
        _camera("CAM_FRONT", 0.80, 0.0, 0.0),
        _camera("CAM_FRONT_LEFT", 0.27, -0.55, -55.0),
        _camera("CAM_FRONT_RIGHT", 0.27, 0.55, 55.0),
        _camera("CAM_BACK", -2.0, 0.0, 180.0, 110.0),
        _camera("CAM_BACK_LEFT", -0.32, -0.55, -110.0),
        _camera("CAM_BACK_RIGHT", -0.32, 0.55, 110.0),
    )
}
"""Those that Bench2Drive's data was recorded with, and that its public agents use, in CARLA's frame."""

_AT_REAR_AXLE = {"x": REAR_AXLE, "y": 0.0, "z": 0.0, "roll": 0.0, "pitch": 0.0, "yaw": 0.0}
OTHERS = (
    {"type": "sensor.other.imu", "id": "IMU", "sensor_tick": 0.05, **_AT_REAR_AXLE},
    {"type": "sensor.other.gnss", "id": "GPS", "sensor_tick": 0.01, **_AT_REAR_AXLE},
    {"type": "sensor.speedometer", "id": "SPEED", "reading_frequency": 20},
)


class Rig:
    """Some of the cameras, in order, and the size of the images that a policy sees."""

    def __init__(self, names: Sequence[str], size: Size | None) -> None:
        """A size is height and width; None leaves images as CARLA renders them. Raises `ConfigError` for a camera that is not there."""
        for name in names:
            if name not in CAMERAS:
                raise ConfigError(f"cameras: there is no {name!r}. {did_you_mean(name, CAMERAS)}Cameras: {', '.join(CAMERAS)}")
        self.cameras = [CAMERAS[name] for name in names]
        self.size = size
        stored = [geometry.intrinsics(camera) for camera in self.cameras]
        if size is not None:
            stored = [fit(k, (camera["height"], camera["width"]), size) for k, camera in zip(stored, self.cameras, strict=True)]
        self.intrinsics = torch.tensor(np.array(stored), dtype=torch.float32)[None]
        self.camera_to_ego = torch.tensor(np.array([geometry.camera_to_ego(camera) for camera in self.cameras]), dtype=torch.float32)[None]

    @property
    def sensors(self) -> list[dict[str, Any]]:
        """What the leaderboard's agent asks for."""
        return [*self.cameras, *OTHERS]

    def images(self, arrays: Mapping[str, np.ndarray]) -> Tensor:
        """Images "1 C 3 H W" (uint8), scaled and cropped as those of the datasets are, of CARLA's "H W 4" in BGRA, by camera."""
        return torch.stack([self._image(arrays[camera["id"]]) for camera in self.cameras])[None]

    def _image(self, pixels: np.ndarray) -> Tensor:
        colours = np.ascontiguousarray(pixels[..., 2::-1])
        if self.size is not None and pixels.shape[:2] != self.size:
            colours = np.array(
                Image.fromarray(colours).resize(self.size[::-1], Image.Resampling.BILINEAR, box=_kept(pixels.shape[:2], self.size))
            )
        return torch.from_numpy(colours).permute(2, 0, 1).contiguous()


def _kept(stored: tuple[int, ...], size: Size) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what `irlvla.images.fit` keeps of an image."""
    height, width = stored
    moved: Array = fit(np.eye(3), (height, width), size)  # where the corner and the unit of its pixels go
    left, top = ((0.5 * moved[0, 0] - 0.5 - offset) / moved[0, 0] for offset in moved[:2, 2])
    return left, top, left + size[1] / moved[0, 0], top + size[0] / moved[0, 0]
