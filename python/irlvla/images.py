"""From a camera's JPEG to the pinhole image that a policy sees, with its exact calibration.

Pixels as in OpenCV: the centre of the first pixel is (0, 0), and (u, v) = K (x / z, y / z, 1). An image is scaled until it
covers the wanted size, then cropped: in the middle across, at the top down (that is sky), so that the road stays.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from irlvla.errors import FileError

Size = tuple[int, int]  # height, width [pixels]


def fit(intrinsics: Float[np.ndarray, "3 3"], stored: Size, size: Size) -> Float[np.ndarray, "3 3"]:
    """Intrinsics of an image of `stored` size after it was scaled and cropped to `size`."""
    scale, left, top = _placement(stored, size)
    moved = np.array(intrinsics, dtype=np.float64)
    moved[:2] *= scale
    moved[:2, 2] += 0.5 * scale - 0.5 - np.array([left, top])  # edges of the image scale, not centres of pixels
    return moved


def read_image(
    source: Path | bytes, size: Size, intrinsics: Float[np.ndarray, "3 3"], distortion: Float[np.ndarray, "5"] | None = None
) -> tuple[UInt8[Tensor, "3 H W"], Float[np.ndarray, "3 3"]]:
    """Decode, undistort, scale and crop an image. Returns it with its intrinsics.

    Args:
        source: a file, or the bytes of one.
        distortion: k1 k2 p1 p2 k3 of OpenCV's model; None for a pinhole image.

    Raises:
        FileError: it is missing, or no image, or cut off.
    """
    name = str(source) if isinstance(source, Path) else "an embedded image"
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            stored = image.height, image.width
            scale, left, top = _placement(stored, size)
            image.draft("RGB", (round(stored[1] * scale), round(stored[0] * scale)))  # JPEG decodes at a fraction for less
            decoded = image.convert("RGB")
    except FileNotFoundError as error:
        raise FileError(f"the image {name} does not exist") from error
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise FileError(f"{name} is no whole image: {error}") from error
    if distortion is None or not np.any(distortion):
        ratio = decoded.width / stored[1] / scale
        box = (left * ratio, top * ratio, (left + size[1]) * ratio, (top + size[0]) * ratio)
        pixels = decoded.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=box)
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).contiguous(), fit(intrinsics, stored, size)
    grid = _undistorting_grid(intrinsics.tobytes(), np.asarray(distortion, dtype=np.float64).tobytes(), stored, size)
    source_pixels = torch.from_numpy(np.array(decoded)).permute(2, 0, 1)[None].float()
    seen = torch.nn.functional.grid_sample(source_pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return seen[0].round_().to(torch.uint8), fit(intrinsics, stored, size)


def distort(rays: Float[np.ndarray, "... 2"], distortion: Float[np.ndarray, "5"]) -> Float[np.ndarray, "... 2"]:
    """Normalised image coordinates after Brown's lens distortion (OpenCV's five coefficients k1 k2 p1 p2 k3)."""
    k1, k2, p1, p2, k3 = np.asarray(distortion, dtype=np.float64)
    x, y = rays[..., 0], rays[..., 1]
    r2 = x * x + y * y
    radial = 1.0 + r2 * (k1 + r2 * (k2 + r2 * k3))
    return np.stack([x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x), y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y], axis=-1)


def _placement(stored: Size, size: Size) -> tuple[float, float, float]:
    """Scale, and the left and top of what is kept of the scaled image."""
    scale = max(size[0] / stored[0], size[1] / stored[1])
    return scale, (stored[1] * scale - size[1]) / 2, stored[0] * scale - size[0]


@functools.lru_cache(maxsize=64)  # a rig has one per camera, for a whole log
def _undistorting_grid(intrinsics: bytes, distortion: bytes, stored: Size, size: Size) -> Float[Tensor, "1 H W 2"]:
    """Where each pixel of the pinhole image lies in the distorted one, in torch's coordinates (-1 ... 1 between the edges)."""
    camera = np.frombuffer(intrinsics).reshape(3, 3)
    v, u = np.mgrid[: size[0], : size[1]].astype(np.float64)
    rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(fit(camera, stored, size)).T
    seen = distort(rays[..., :2] / rays[..., 2:], np.frombuffer(distortion)) @ camera[:2, :2].T + camera[:2, 2]
    edges = (2.0 * seen + 1.0) / (stored[1], stored[0]) - 1.0
    return torch.from_numpy(edges).float()[None]
