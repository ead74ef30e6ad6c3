"""Boxes, polygons and polylines: their corners, exact answers to what touches or holds what, and projection."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from irlvla.errors import InputError
from irlvla.types import LENGTH, REAR_AXLE_TO_CENTRE, WIDTH, StateIndex

# --- boxes ----------------------------------------------------------------------------------------------------------


def corners_of(
    centre: Float[Tensor, "... 2"], heading: Float[Tensor, "..."], length: Float[Tensor, "..."], width: Float[Tensor, "..."]
) -> Float[Tensor, "... 4 2"]:
    """Corners front left, rear left, rear right, front right: counter-clockwise (navsim pdm_geometry_utils.py translate_lon_and_lat)."""
    sideways = heading + math.pi / 2.0
    forward = torch.stack([heading.cos(), heading.sin()], -1)
    left = torch.stack([sideways.cos(), sideways.sin()], -1)
    lengthwise, crosswise = (length / 2.0)[..., None], (width / 2.0)[..., None]
    signs = ((1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0))
    return torch.stack([centre + ((b * crosswise) * left + (a * lengthwise) * forward) for a, b in signs], -2)


def centres(states: Float[Tensor, "... 11"]) -> Float[Tensor, "... 2"]:
    """Centre of the ego box (navsim pdm_array_representation.py state_array_to_coords_array)."""
    heading = states[..., StateIndex.HEADING]
    return states[..., :2] + torch.stack([REAR_AXLE_TO_CENTRE * heading.cos(), REAR_AXLE_TO_CENTRE * heading.sin()], -1)


def footprints(states: Float[Tensor, "... 11"]) -> Float[Tensor, "... 4 2"]:
    """Corners of the ego box (navsim pdm_array_representation.py state_array_to_coords_array)."""
    states = states.double()
    heading = states[..., StateIndex.HEADING]
    return corners_of(centres(states), heading, torch.full_like(heading, LENGTH), torch.full_like(heading, WIDTH))


def box_corners(boxes: Float[Tensor, "... 5"]) -> Float[Tensor, "... 4 2"]:
    """Corners of boxes (x, y, heading, length, width) (nuplan oriented_box.py all_corners)."""
    boxes = boxes.double()
    return corners_of(boxes[..., :2], boxes[..., 2], boxes[..., 3], boxes[..., 4])


def box_centroids(corners: Float[Tensor, "... 4 2"]) -> Float[Tensor, "... 2"]:
    """Centroid of the polygon, from triangles at its first corner: the sums of GEOS (Centroid::addTriangle).

    Far from the origin they are inexact, and the angle to an agent inherits that.
    """
    base = corners[..., 0, :]
    weighted, double_area = torch.zeros_like(base), torch.zeros_like(base[..., :1])
    for i in range(4):
        p, q = corners[..., i, :], corners[..., (i + 1) % 4, :]
        area = (p[..., 0] - base[..., 0]) * (q[..., 1] - base[..., 1]) - (q[..., 0] - base[..., 0]) * (p[..., 1] - base[..., 1])
        weighted = weighted + area[..., None] * (base + p + q)
        double_area = double_area + area[..., None]
    return weighted / 3.0 / double_area


# --- exact predicates -----------------------------------------------------------------------------------------------


def exact_orientation(a: list[float], b: list[float], c: list[float]) -> int:
    """Sign of the area of (a, b, c) in rational arithmetic."""
    (ax, ay), (bx, by), (cx, cy) = (map(Fraction, point) for point in (a, b, c))
    area = (ax - cx) * (by - cy) - (ay - cy) * (bx - cx)
    return (area > 0) - (area < 0)


def orientation(a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"], c: Float[Tensor, "... 2"]) -> Float[Tensor, "..."]:
    """1 where c lies left of the line a -> b, -1 right, 0 on it: exact for the given doubles, as GEOS decides.

    The rounded determinant is trusted outside GEOS's own bound (CGAlgorithmsDD::orientationIndexFilter).
    """
    a, b, c = torch.broadcast_tensors(a, b, c)
    left = (a[..., 0] - c[..., 0]) * (b[..., 1] - c[..., 1])
    right = (a[..., 1] - c[..., 1]) * (b[..., 0] - c[..., 0])
    sign = (left - right).sign()
    unsure = ((left - right).abs() <= 1e-15 * (left.abs() + right.abs())) & ((left != 0.0) | (right != 0.0))
    if unsure.any():
        triples = zip(a[unsure].tolist(), b[unsure].tolist(), c[unsure].tolist(), strict=True)
        sign[unsure] = torch.tensor([exact_orientation(*triple) for triple in triples], dtype=sign.dtype)
    return sign


def next_corner(corners: Float[Tensor, "... K 2"]) -> Float[Tensor, "... K 2"]:
    """Ends of the edges that start at the corners."""
    return corners.roll(-1, dims=-2)


def edge_separates(a: Float[Tensor, "... K 2"], b: Float[Tensor, "... M 2"]) -> Bool[Tensor, "..."]:
    """Whether all corners of b lie strictly to the right of one edge of a (counter-clockwise)."""
    side = orientation(a[..., :, None, :], next_corner(a)[..., :, None, :], b[..., None, :, :])
    return (side < 0).all(-1).any(-1)


def extents_touch(a: Float[Tensor, "... K 2"], b: Float[Tensor, "... M 2"]) -> Bool[Tensor, "..."]:
    """Whether the axis-aligned extents of two point sets share a point."""
    below = a.amin(-2) <= b.amax(-2)
    above = b.amin(-2) <= a.amax(-2)
    return (below & above).all(-1)


def quads_touch(a: Float[Tensor, "... 4 2"], b: Float[Tensor, "... 4 2"]) -> Bool[Tensor, "..."]:
    """Whether two closed convex counter-clockwise quadrilaterals share a point (shapely intersects)."""
    a, b = torch.broadcast_tensors(a, b)
    touch = extents_touch(a, b)  # most pairs are far apart
    near_a, near_b = a[touch], b[touch]
    touch[touch.clone()] = ~(edge_separates(near_a, near_b) | edge_separates(near_b, near_a))
    return touch


def boxes_overlap(a: Float[Tensor, "... 5"], b: Float[Tensor, "... 5"]) -> Bool[Tensor, "..."]:
    """Whether boxes (x, y, heading, length, width) share a point; touching counts (shapely intersects of their polygons)."""
    return quads_touch(box_corners(a), box_corners(b))


def segments_touch(
    a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"], c: Float[Tensor, "... 2"], d: Float[Tensor, "... 2"]
) -> Bool[Tensor, "..."]:
    """Whether the closed segments a-b and c-d share a point."""
    near = extents_touch(torch.stack([a, b], -2), torch.stack([c, d], -2))
    astride_ab = orientation(a, b, c) * orientation(a, b, d) <= 0
    astride_cd = orientation(c, d, a) * orientation(c, d, b) <= 0
    return near & astride_ab & astride_cd


def in_quad(points: Float[Tensor, "... 2"], corners: Float[Tensor, "... 4 2"]) -> Bool[Tensor, "..."]:
    """Whether points lie in a closed convex counter-clockwise quadrilateral."""
    return (orientation(corners, next_corner(corners), points[..., None, :]) >= 0).all(-1)


def segments_touch_quads(a: Float[Tensor, "N 2"], b: Float[Tensor, "N 2"], corners: Float[Tensor, "N 4 2"]) -> Bool[Tensor, " N"]:
    """Whether the closed segments a-b and closed convex quadrilaterals share a point."""
    a, b = a[:, None].expand_as(corners), b[:, None].expand_as(corners)
    return segments_touch(a, b, corners, next_corner(corners)).any(-1) | in_quad(a[:, 0], corners)


def polygon_rings(
    vertices: Float[Tensor, "V 2"], point_offsets: Int[Tensor, " R+1"], ring_offsets: Int[Tensor, " P+1"]
) -> Iterator[list[Float[Tensor, "K 2"]]]:
    """The rings of each polygon, shell first."""
    points, rings = point_offsets.tolist(), ring_offsets.tolist()
    for first, last in pairwise(rings):
        yield [vertices[points[r] : points[r + 1]].double() for r in range(first, last)]


def points_in_polygons(
    points: Float[Tensor, "N 2"], vertices: Float[Tensor, "V 2"], point_offsets: Int[Tensor, " R+1"], ring_offsets: Int[Tensor, " P+1"]
) -> Bool[Tensor, "N P"]:
    """Whether points lie strictly inside polygons: the boundary, also of a hole, is outside (shapely contains_xy).

    Rings `point_offsets[r]:point_offsets[r + 1]` of `vertices` are open; polygon p has the rings from ring_offsets[p] on.
    """
    points = points.double()
    columns = [in_rings(points, rings) for rings in polygon_rings(vertices, point_offsets, ring_offsets)]
    return torch.stack(columns, -1) if columns else torch.zeros(len(points), 0, dtype=torch.bool)


def in_rings(points: Float[Tensor, "N 2"], rings: list[Float[Tensor, "K 2"]]) -> Bool[Tensor, " N"]:
    """Strictly inside an area bounded by rings: a ray in +x crosses their edges an odd number of times."""
    crossings = torch.zeros(len(points), dtype=torch.int64)
    on_boundary = torch.zeros(len(points), dtype=torch.bool)
    for ring in rings:
        start, end = ring, next_corner(ring)
        low, high = torch.minimum(start, end), torch.maximum(start, end)
        y = points[:, None, 1]
        reached = (low[:, 1] <= y) & (y <= high[:, 1]) & (points[:, None, 0] <= high[:, 0])
        point, edge = reached.nonzero(as_tuple=True)
        side = orientation(start[edge], end[edge], points[point])
        upward, downward = start[edge, 1] < end[edge, 1], start[edge, 1] > end[edge, 1]
        below_end = points[point, 1] < high[edge, 1]  # an edge holds its lower end, not its upper
        crosses = below_end & ((upward & (side > 0)) | (downward & (side < 0)))
        touches = (side == 0) & (low[edge, 0] <= points[point, 0])
        crossings.index_add_(0, point, crosses.long())
        on_boundary[point[touches]] = True
    return (crossings % 2 == 1) & ~on_boundary


def boxes_touch_polygons(
    corners: Float[Tensor, "N 4 2"], vertices: Float[Tensor, "V 2"], point_offsets: Int[Tensor, " R+1"], ring_offsets: Int[Tensor, " P+1"]
) -> Bool[Tensor, "N P"]:
    """Whether closed boxes and closed polygons share a point; a box within a hole does not (shapely intersects)."""
    corners = corners.double()
    inside = points_in_polygons(corners[:, 0], vertices, point_offsets, ring_offsets)
    for p, rings in enumerate(polygon_rings(vertices, point_offsets, ring_offsets)):
        for ring in rings:
            inside[:, p] |= boxes_cross_ring(corners, ring)
        if rings and len(rings[0]):
            inside[:, p] |= in_quad(rings[0][0], corners)
    return inside


def boxes_cross_ring(corners: Float[Tensor, "N 4 2"], ring: Float[Tensor, "K 2"]) -> Bool[Tensor, " N"]:
    """Whether an edge of each box and an edge of the ring share a point."""
    crosses = torch.zeros(len(corners), dtype=torch.bool)
    starts, ends = ring, next_corner(ring)
    edges = torch.stack([starts, ends], -2)
    box, edge = extents_touch(corners[:, None], edges).nonzero(as_tuple=True)
    near = corners[box]
    found = segments_touch(near, next_corner(near), starts[edge, None].expand_as(near), ends[edge, None].expand_as(near)).any(-1)
    crosses[box[found]] = True
    return crosses


# --- polylines ------------------------------------------------------------------------------------------------------


def project(points: Float[Tensor, "N 2"], polyline: Float[Tensor, "L 2"]) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Distance along a polyline of the closest point on it, and the distance to it [m] (shapely line_locate_point, distance).

    The first of equally close segments wins; a segment of no length is a point; ends clamp (GEOS LengthIndexOfPoint,
    Distance::pointToSegment, whose formulas these are).
    """
    points, polyline = points.double(), polyline.double()
    if len(polyline) < 2:
        raise InputError(f"a polyline needs at least 2 points, got {len(polyline)}")
    start, end = polyline[:-1], polyline[1:]
    span = end - start
    squared = span[:, 0] * span[:, 0] + span[:, 1] * span[:, 1]
    from_start = points[:, None] - start  # to the point; GEOS subtracts the other way round, with the same bits
    fraction = ((from_start[..., 0] * span[:, 0] + from_start[..., 1] * span[:, 1]) / squared).nan_to_num(0.0)
    offset = (from_start[..., 1] * span[:, 0] - from_start[..., 0] * span[:, 1]) / squared
    distance = offset.abs() * square_root(squared)
    distance = torch.where(fraction <= 0.0, length_of(from_start), distance)
    distance = torch.where(fraction >= 1.0, length_of(points[:, None] - end), distance)
    closest, segment = distance.min(-1)
    lengths = length_of(span)
    before = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    share = fraction.gather(1, segment[:, None])[:, 0].clamp(0.0, 1.0)
    return before[segment] + share * lengths[segment], closest


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded, which torch's own is not where MKL computes it (sqrt(37.25))."""
    return torch.as_tensor(np.sqrt(values.numpy()))


def length_of(vectors: Float[Tensor, "... 2"]) -> Float[Tensor, "..."]:
    """Euclidean length, without hypot's protection from overflow: as GEOS and np.linalg.norm."""
    return square_root(vectors[..., 0] * vectors[..., 0] + vectors[..., 1] * vectors[..., 1])
