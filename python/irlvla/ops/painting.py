"""Polygons painted over images: what the cameras of the embedded world draw with.

The slow, obvious twin is `irlvla.ops.reference.painting`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from irlvla.errors import InputError
from irlvla.ops import as_tensor, require_offsets, require_shape
from irlvla.ops._native import paint_over, require_finite


def paint(
    images: UInt8[Tensor, "N 3 H W"],
    points: Float[Tensor, "P 2"],
    ring_offsets: Int[Tensor, " R+1"],
    shape_offsets: Int[Tensor, " S+1"],
    image_offsets: Int[Tensor, " N+1"],
    colours: Float[Tensor, "S 4"],
) -> UInt8[Tensor, "N 3 H W"]:
    """Copies of images with shapes painted over them, in order. On the CPU, images in parallel.

    Every pixel takes a shape's colour for the share of its area that the shape covers, computed exactly: edges are smooth at
    any size, and what is thinner than a pixel fades instead of flickering.

    Args:
        points: u (right) and v (down); the centre of the first pixel is (0, 0).
        ring_offsets: ring r has the points `ring_offsets[r] : ring_offsets[r + 1]`.
        shape_offsets: shape s has the rings `shape_offsets[s] : shape_offsets[s + 1]`. What they cover of a pixel is the absolute
            sum of their signed areas, at most all of it: rings of one orientation join without a seam, opposite ones are holes.
        image_offsets: image n has the shapes `image_offsets[n] : image_offsets[n + 1]`.
        colours: red, green, blue in 0 ... 255, and opacity in 0 ... 1.
    """
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        raise InputError(f"images must be a tensor of uint8, got {getattr(images, 'dtype', type(images).__name__)}")
    images = as_tensor(images, "images", torch.uint8, "cpu")
    points, colours = as_tensor(points, "points", device="cpu"), as_tensor(colours, "colours", torch.float32, "cpu")
    rings, shapes, drawn = (as_tensor(o, "offsets", torch.int64, "cpu") for o in (ring_offsets, shape_offsets, image_offsets))
    require_shape(images, "images", None, 3, None, None)
    require_shape(points, "points", None, 2)
    require_shape(colours, "colours", None, 4)
    require_shape(drawn, "image_offsets", images.shape[0] + 1)
    require_offsets(rings, "ring_offsets", len(points), "points")
    require_offsets(shapes, "shape_offsets", len(rings) - 1, "rings")
    require_offsets(drawn, "image_offsets", len(shapes) - 1, "shapes")
    require_shape(colours, "colours", len(shapes) - 1, 4)
    require_finite(points, "points")
    return paint_over(images.clone(), drawn, colours, shapes, rings, points)
