"""Painting polygons over images, pixel by pixel."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Ring = Float[np.ndarray, "V 2"]


def paint(
    images: UInt8[Tensor, "N 3 H W"],
    points: Float[Tensor, "P 2"],
    ring_offsets: Tensor,
    shape_offsets: Tensor,
    image_offsets: Tensor,
    colours: Float[Tensor, "S 4"],
) -> UInt8[Tensor, "N 3 H W"]:
    """As `irlvla.ops.painting.paint`."""
    painted = images.double().numpy()
    corners, rings, shapes, drawn = (np.asarray(a) for a in (points, ring_offsets, shape_offsets, image_offsets))
    for image in range(len(painted)):
        for shape in range(drawn[image], drawn[image + 1]):
            *colour, opacity = np.asarray(colours[shape], dtype=np.float64)
            of_shape = [corners[rings[r] : rings[r + 1]] for r in range(shapes[shape], shapes[shape + 1])]
            share = opacity * coverage(of_shape, *painted.shape[2:])
            painted[image] += share * (np.array(colour)[:, None, None] - painted[image])
    return torch.from_numpy(np.floor(painted + 0.5)).to(torch.uint8)


def coverage(rings: list[Ring], height: int, width: int) -> Float[np.ndarray, "H W"]:
    """The share of every pixel that rings cover."""
    area = [[sum(signed_area(within(ring, u, v)) for ring in rings) for u in range(width)] for v in range(height)]
    return np.minimum(np.abs(np.array(area, dtype=np.float64)), 1.0).reshape(height, width)


def within(ring: Ring, u: int, v: int) -> Ring:
    """The part of a ring in the pixel around (u, v): cut at its four sides, one after the other (Sutherland and Hodgman)."""
    for axis, low in ((0, u - 0.5), (1, v - 0.5)):
        ring = beyond(ring, axis, low, 1.0)
        ring = beyond(ring, axis, low + 1.0, -1.0)
    return ring


def beyond(ring: Ring, axis: int, limit: float, sign: float) -> Ring:
    """The part of a ring on one side of a line."""
    kept = []
    for a, b in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        ahead, after = sign * (a[axis] - limit), sign * (b[axis] - limit)
        if ahead >= 0.0:
            kept.append(a)
        if (ahead >= 0.0) != (after >= 0.0):
            kept.append(a + (b - a) * (ahead / (ahead - after)))
    return np.array(kept).reshape(-1, 2)


def signed_area(ring: Ring) -> float:
    x, y = ring.T
    return float(0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
