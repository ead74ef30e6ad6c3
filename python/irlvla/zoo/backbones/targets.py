"""What there is to see in a `Scene` at t = 0: boxes, map elements and areas, in the ego frame.

Heads learn to predict it, and the `vector` backbone is told it. Nothing here reads what comes after t = 0. All of it is computed
for all scenes at once, on the device of the scenes, in float64; what is returned is float32.

An extent "B 4" says for each scene what is looked at: least x, greatest x, least y, greatest y [m], as `Features.bev_range` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from irlvla.types import Batch, Kind, Layer, Scene
from irlvla.zoo.backbones.geometry import Paths, cross, cut, dense, following, nearest, owners, turned, winding


class Element(IntEnum):
    """Kinds of map elements: the outlines of areas, and the route's centreline in the direction of travel.

    Roadblocks have no outlines here: they are their lanes together.
    """

    LANE = 0
    CONNECTOR = 1
    RED_CONNECTOR = 2  # its light is red
    INTERSECTION = 3
    DRIVABLE_AREA = 4  # with car parks
    CENTRELINE = 5


class Area(IntEnum):
    """Channels of the raster; they overlap."""

    DRIVABLE = 0  # as drivable area compliance takes it
    INTERSECTION = 1
    ROUTE = 2  # lanes and connectors of the route
    RED_LIGHT = 3  # connectors whose light is red
    VEHICLE = 4
    VULNERABLE = 5  # pedestrians and bicycles
    OBJECT = 6  # what stands: cones, barriers, signs


ELEMENT_OF = {
    Layer.LANE: Element.LANE,
    Layer.LANE_CONNECTOR: Element.CONNECTOR,
    Layer.INTERSECTION: Element.INTERSECTION,
    Layer.DRIVABLE_AREA: Element.DRIVABLE_AREA,
    Layer.CARPARK: Element.DRIVABLE_AREA,
}
AREA_OF = {Kind.VEHICLE: Area.VEHICLE, Kind.PEDESTRIAN: Area.VULNERABLE, Kind.BICYCLE: Area.VULNERABLE}  # all others are objects
DRIVABLE = (Layer.ROADBLOCK, Layer.INTERSECTION, Layer.DRIVABLE_AREA, Layer.CARPARK)
SLIVER = 1.0  # map elements of less than this within the extent are left out [m^2]


@dataclass(frozen=True)
class Boxes(Batch):
    """Agents and objects, the nearest first."""

    state: Float[Tensor, "B N 7"]  # x y heading length width vx vy, of the box's centre
    kind: Int[Tensor, "B N"]  # Kind
    valid: Bool[Tensor, "B N"]


@dataclass(frozen=True)
class Elements(Batch):
    """Map elements as points that are evenly spaced along them: the centreline, then outlines, the nearest first.

    Outlines are closed (the first point is not repeated), counter-clockwise, and begin where they are nearest to the ego.
    """

    points: Float[Tensor, "B N P 2"]
    kind: Int[Tensor, "B N"]  # Element
    on_route: Bool[Tensor, "B N"]
    valid: Bool[Tensor, "B N"]


# -- boxes -------------------------------------------------------------------------------------------------------------


def boxes_in(scene: Scene, extent: Float[Tensor, "B 4"], count: int) -> Boxes:
    """The agents and objects whose centres lie in the extent, at most `count` of them, the nearest."""
    owner, state = owners(scene.agent_offsets), _agents_now(scene)
    low, high = _corners(extent.to(state))
    centre = state[:, :2]
    seen = scene.agent_valid[:, 0] & ((centre >= low[owner]) & (centre <= high[owner])).all(1)
    rows = seen.nonzero()[:, 0]
    chosen, places = nearest(centre[rows].norm(dim=1), owner[rows], count)
    rows, shape = rows[chosen], (len(scene), count)
    there = torch.ones_like(places, dtype=torch.bool)
    values = state[rows].float(), scene.agent_kind[rows], there
    return Boxes(*(dense(value, places, shape) for value in values))


def _agents_now(scene: Scene) -> Float[Tensor, "A 7"]:
    """States of all agents at t = 0, as in `Boxes`."""
    pose, now = scene.ego[owners(scene.agent_offsets), :3], scene.agent_state[:, 0]
    turn = now[:, 2] - pose[:, 2]
    heading = torch.atan2(turn.sin(), turn.cos())[:, None]
    centre, velocity = turned(now[:, :2] - pose[:, :2], -pose[:, 2]), turned(now[:, 3:5], -pose[:, 2])
    return torch.cat([centre, heading, scene.agent_size.to(now), velocity], 1)


def corners_of(boxes: Float[Tensor, "... 5"]) -> Float[Tensor, "... 4 2"]:
    """Corners of boxes x y heading length width, counter-clockwise: front left, rear left, rear right, front right."""
    signs = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]).to(boxes)
    return boxes[..., None, :2] + turned(boxes[..., None, 3:5] / 2.0 * signs, boxes[..., 2:3])


# -- map elements ------------------------------------------------------------------------------------------------------


def elements_in(scene: Scene, extent: Float[Tensor, "B 4"], count: int, points: int) -> Elements:
    """What of the map lies in the extent, at most `count` elements, the nearest, of `points` points each.

    Outlines are cut where they leave the extent. The centreline reaches as far back and ahead of the ego, measured along it, as the
    extent does along x; it is left out where its nearest point is outside.
    """
    extent, polygons = extent.to(scene.ego), len(scene.polygon_layer)
    outlines, polygon = _outlines(scene, extent)
    line_owner = owners(scene.centerline_offsets)
    line = _in_ego_frame(scene.centerline[:, :2], scene, line_owner)
    paths = Paths(torch.cat([outlines, line]), torch.cat([polygon, polygons + line_owner]), polygons)

    scenes = torch.arange(len(scene), device=scene.device)
    owner = torch.cat([owners(scene.polygon_offsets), scenes])[paths.name]
    low, high = _corners(extent)
    near = ((paths.nearest >= low[owner]) & (paths.nearest <= high[owner])).all(1) & (paths.length > 0.0)
    rows = torch.where(paths.closed, paths.area.abs() >= SLIVER, near).nonzero()[:, 0]
    distance = torch.where(paths.closed, paths.nearest.norm(dim=1), -1.0)  # the centreline comes first
    chosen, places = nearest(distance[rows], owner[rows], count)

    rows, shape = rows[chosen], (len(scene), count)
    name, there = paths.name[rows], torch.ones_like(places, dtype=torch.bool)
    kind = torch.cat([_elements(scene), torch.full_like(scenes, Element.CENTRELINE)])[name]
    on_route = torch.cat([scene.polygon_on_route, torch.ones_like(scenes, dtype=torch.bool)])[name]
    samples = paths.sample(rows, points, -extent[owner[rows], 0], extent[owner[rows], 1])
    return Elements(*(dense(value, places, shape) for value in (samples.float(), kind, on_route, there)))


def _outlines(scene: Scene, extent: Float[Tensor, "B 4"]) -> tuple[Float[Tensor, "V 2"], Int[Tensor, " V"]]:
    """What lies in the extent of the shells of polygons that are elements, and the polygon of each point."""
    ring = owners(scene.point_offsets)
    polygon = owners(scene.ring_offsets)[ring]
    rows = (_shells(scene)[ring] & (_elements(scene) >= 0)[polygon]).nonzero()[:, 0]
    owner = owners(scene.polygon_offsets)[polygon[rows]]
    return cut(_in_ego_frame(scene.points[rows], scene, owner), polygon[rows], extent[owner])


def _elements(scene: Scene) -> Int[Tensor, " P"]:
    """The `Element` that each polygon is, -1 for none."""
    table = torch.full((max(Layer) + 1,), -1)
    for layer, element in ELEMENT_OF.items():
        table[layer] = element
    kind = table.to(scene.device)[scene.polygon_layer]
    return torch.where(_red(scene) & (kind == Element.CONNECTOR), Element.RED_CONNECTOR, kind)


# -- areas -------------------------------------------------------------------------------------------------------------


def areas_in(scene: Scene, extent: Float[Tensor, "B 4"], size: tuple[int, int]) -> Bool[Tensor, "B 7 X Y"]:
    """Which areas (`Area`) the centre of each cell lies in: X cells along ego x, Y along ego y. For rings that do not cross themselves.

    Exact, but where a centre lies within rounding (1e-9 m) of a border. What is smaller than a cell may lie between centres.
    """
    start, end, turn, slot = (torch.cat(parts) for parts in zip(_polygon_edges(scene), _box_edges(scene), strict=True))
    low, high = _corners(extent.to(start))
    cell, owner = (high - low) / torch.tensor(size).to(start), slot // len(Area)
    start, end = ((edge - low[owner]) / cell[owner] - 0.5 for edge in (start, end))
    # No polygon has a negative winding number, so the union of several is where the sum is positive.
    return winding(start, end, turn, slot, (len(scene) * len(Area), *size)).unflatten(0, (len(scene), len(Area))) > 0


def _polygon_edges(scene: Scene) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Edges of the polygons of the first four areas: from, to, 1 or -1 so that shells run counter-clockwise and holes clockwise, and
    scene x 7 + area.
    """
    layer = scene.polygon_layer
    drivable = torch.isin(layer, torch.tensor(DRIVABLE, device=layer.device))
    lane = (layer == Layer.LANE) | (layer == Layer.LANE_CONNECTOR)
    areas = torch.stack([drivable, layer == Layer.INTERSECTION, lane & scene.polygon_on_route, _red(scene)])

    ring = owners(scene.point_offsets)
    polygon = owners(scene.ring_offsets)[ring]
    owner = owners(scene.polygon_offsets)[polygon]
    points = _in_ego_frame(scene.points, scene, owner)
    after = points[following(ring)]
    total = torch.cat([points.new_zeros(1), cross(points, after).cumsum(0)])[scene.point_offsets].diff()
    turn = torch.where((total > 0.0) == _shells(scene), 1, -1)[ring]
    area, row = areas[:, polygon].nonzero().unbind(1)
    return points[row], after[row], turn[row], owner[row] * len(Area) + area


def _box_edges(scene: Scene) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of the boxes of agents and objects."""
    rows = scene.agent_valid[:, 0].nonzero()[:, 0]
    corners = corners_of(_agents_now(scene)[rows, :5])
    table = torch.tensor([AREA_OF.get(kind, Area.OBJECT) for kind in Kind], device=scene.device)
    slot = owners(scene.agent_offsets)[rows] * len(Area) + table[scene.agent_kind[rows]]
    turn = torch.ones_like(slot)
    return corners.flatten(0, 1), corners.roll(-1, 1).flatten(0, 1), turn.repeat_interleave(4), slot.repeat_interleave(4)


# -- scenes ------------------------------------------------------------------------------------------------------------


def _in_ego_frame(points: Float[Tensor, "V 2"], scene: Scene, owner: Int[Tensor, " V"]) -> Float[Tensor, "V 2"]:
    """Points of the map frame in the ego frame of the scene that each belongs to."""
    return turned(points - scene.ego[owner, :2], -scene.ego[owner, 2])


def _corners(extent: Float[Tensor, "B 4"]) -> tuple[Float[Tensor, "B 2"], Float[Tensor, "B 2"]]:
    """Least and greatest x and y."""
    return extent[:, 0::2], extent[:, 1::2]


def _shells(scene: Scene) -> Bool[Tensor, " R"]:
    """Which rings are the first of their polygon."""
    shell = torch.zeros(len(scene.point_offsets) - 1, dtype=torch.bool, device=scene.device)
    shell[scene.ring_offsets[:-1][scene.ring_offsets.diff() > 0]] = True
    return shell


def _red(scene: Scene) -> Bool[Tensor, " P"]:
    """Polygons whose light is red at t = 0."""
    rows = scene.light_polygon + scene.polygon_offsets[owners(scene.light_offsets)]
    red = torch.zeros_like(scene.polygon_on_route)
    red[rows[scene.light_red[:, 0]]] = True
    return red
