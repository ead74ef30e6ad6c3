"""What is to be seen in a scene, the heads that learn to see it, and the backbone that is told it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from torch import nn

import irlvla
from irlvla import golden
from irlvla.errors import ConfigError, InputError
from irlvla.records import Agent, Polygon, pack
from irlvla.synthetic import synthetic_scenes
from irlvla.testing import backbone_checks
from irlvla.types import Features, Kind, Layer, Observation, Scene
from irlvla.zoo.backbones.detection import DetectionHead, decode, encode
from irlvla.zoo.backbones.map_elements import MapHead, chamfer, ordered_distance
from irlvla.zoo.backbones.queries import assign, class_cost, class_loss
from irlvla.zoo.backbones.segmentation import SegmentationHead, intersection_over_union
from irlvla.zoo.backbones.targets import AREA_OF, DRIVABLE, ELEMENT_OF, Area, Element, areas_in, boxes_in, corners_of, elements_in

GOLDEN = Path(__file__).parent / "golden"
EXTENT = (-24.0, 40.0, -32.0, 32.0)
LANES = (Layer.LANE, Layer.LANE_CONNECTOR)


def extents(scene: Scene, extent: tuple[float, ...] = EXTENT) -> torch.Tensor:
    return torch.tensor(extent).expand(len(scene), 4)


# -- scenes ------------------------------------------------------------------------------------------------------------


def star(rng: np.random.Generator, centre: np.ndarray, radius: float, count: int) -> np.ndarray:
    """A simple polygon around a point, seldom convex, either way round."""
    angles = (np.arange(count) + rng.uniform(0, 0.9, count)) * (2 * np.pi / count)
    ring = centre + (radius * rng.uniform(0.3, 1.0, count))[:, None] * np.column_stack([np.cos(angles), np.sin(angles)])
    return ring[:: rng.choice([-1, 1])]


def crowded(seed: int) -> Scene:
    """A city at random, of all layers and kinds, with holes, lights and agents that come and go: far from the origin of its map."""
    rng = np.random.default_rng(seed)
    ego = np.zeros(11)
    ego[:3] = *rng.uniform(-5e5, 5e5, 2), rng.uniform(-4, 4)
    polygons = []
    for number in range(60):
        centre = ego[:2] + rng.uniform(-50, 50, 2)
        rings = [star(rng, centre, rng.uniform(2, 40), int(rng.integers(4, 12)))]
        shell = shapely.Polygon(rings[0])
        hole = star(rng, centre, 1.5, 5)
        if number % 5 == 0 and shell.contains_properly(shapely.Polygon(hole)):
            rings.append(hole)
        layer = rng.choice(list(Layer))
        red = rng.random(41) < 0.5 if layer == Layer.LANE_CONNECTOR and rng.random() < 0.5 else None
        polygons.append(Polygon(Layer(layer), rings, bool(layer in LANES and rng.random() < 0.4), red))
    agents = []
    for number in range(50):
        valid = rng.random(51) < 0.7
        state = np.column_stack([ego[:2] + rng.uniform(-45, 45, (51, 2)), rng.uniform(-9, 9, 51), rng.normal(0, 8, (51, 2))])
        size = tuple(rng.uniform(0.3, 8.0, 2))
        agents.append(Agent(str(number), Kind(number % len(Kind)), size, valid, np.where(valid[:, None], state, np.nan)))
    turns = rng.normal(0, 0.15, 80).cumsum() + ego[2]
    ahead = np.array([np.cos(ego[2]), np.sin(ego[2])])
    line = ego[:2] + rng.normal(0, 2, 2) - 20 * ahead + np.column_stack([np.cos(turns), np.sin(turns)]).cumsum(0)
    return pack(
        token=f"crowded-{seed}", time_us=0, ego=ego, history_time_us=np.arange(4), history=np.tile(ego[:8], (4, 1)), agents=agents,
        polygons=polygons, centerline=np.column_stack([line, turns]), human=np.zeros((8, 3)), speed_limit=10.0,
    )  # fmt: skip


def mapped(polygons: list[Polygon], token: str = "mapped") -> Scene:
    """Some polygons, and no agents or route."""
    return pack(
        token=token, time_us=0, ego=np.zeros(11), history_time_us=np.arange(4), history=np.zeros((4, 8)), agents=[], polygons=polygons,
        centerline=np.zeros((0, 3)),
    )  # fmt: skip


def empty() -> Scene:
    return mapped([], "empty")


@pytest.fixture(scope="module")
def scenes() -> Scene:
    """Of the embedded world, of the official reference, at random, and an empty one in between."""
    recorded = [item.scene for item in golden.load(GOLDEN / "public.npz")[::8]]
    return Scene.cat([synthetic_scenes(3), crowded(0), empty(), crowded(1), *recorded])


def moved(scene: Scene, x: float = 3e5, y: float = -4e6, turn: float = 2.5) -> Scene:
    """The same scenes in a map that is turned and shifted."""
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]], dtype=torch.float64)

    def change(values: torch.Tensor) -> torch.Tensor:
        shifted = values[..., :2] @ rotation.T + torch.tensor([x, y], dtype=torch.float64)
        return torch.cat([shifted, values[..., 2:3] + turn, values[..., 3:]], -1)

    changed = {name: change(getattr(scene, name)) for name in ("ego", "points", "centerline", "agent_state")}
    changed["agent_state"][..., 3:5] = changed["agent_state"][..., 3:5] @ rotation.T
    return dataclasses.replace(scene, **changed)


def with_another_future(scene: Scene) -> Scene:
    """The same until t = 0, and what comes after it otherwise."""
    changed = {name: getattr(scene, name).clone() for name in ("agent_state", "agent_valid", "light_red")}
    changed["agent_state"][:, 1:] = changed["agent_state"][:, 1:] * -3.0 + 7.0
    changed["agent_valid"][:, 1:] ^= True
    changed["light_red"][:, 1:] ^= True
    return dataclasses.replace(scene, human=scene.human + 9.0, reference=scene.reference - 5.0, human_values=None, **changed)


# -- a slow, obvious reference -----------------------------------------------------------------------------------------


def in_ego_frame(scene: Scene, points: np.ndarray) -> np.ndarray:
    x, y, heading = scene.ego[0, :3].numpy()
    cos, sin = math.cos(heading), math.sin(heading)
    return (points - [x, y]) @ np.array([[cos, -sin], [sin, cos]])


def polygons_of(scene: Scene) -> list[tuple[Layer, bool, bool, shapely.Polygon]]:
    """Layer, on route, red at t = 0, and the polygon in the ego frame."""
    red = {int(row) for row, lit in zip(scene.light_polygon, scene.light_red[:, 0], strict=True) if lit}
    found = []
    for row, layer in enumerate(scene.polygon_layer.tolist()):
        bounds = scene.point_offsets[scene.ring_offsets[row] : scene.ring_offsets[row + 1] + 1].tolist()
        rings = [in_ego_frame(scene, scene.points[a:b].numpy()) for a, b in itertools.pairwise(bounds)]
        found.append((Layer(layer), bool(scene.polygon_on_route[row]), row in red, shapely.Polygon(rings[0], rings[1:])))
    return found


def box_of(x: float, y: float, heading: float, length: float, width: float) -> shapely.Polygon:
    box = shapely.box(-length / 2, -width / 2, length / 2, width / 2)
    return shapely.affinity.translate(shapely.affinity.rotate(box, heading, (0, 0), use_radians=True), x, y)


def agents_of(scene: Scene) -> list[tuple[Kind, np.ndarray]]:
    """Kind and x y heading length width vx vy in the ego frame of the agents that are there, the nearest first."""
    found = []
    for row, kind in enumerate(scene.agent_kind.tolist()):
        if scene.agent_valid[row, 0]:
            x, y, heading, vx, vy = scene.agent_state[row, 0].tolist()
            centre, tip = (in_ego_frame(scene, np.array(point)) for point in ((x, y), (x + vx, y + vy)))
            heading = math.remainder(heading - scene.ego[0, 2].item(), 2 * math.pi)
            found.append((Kind(kind), np.array([*centre, heading, *scene.agent_size[row].tolist(), *(tip - centre)])))
    return sorted(found, key=lambda agent: np.hypot(*agent[1][:2]))


# -- targets -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 12), (64, 64)], ids=str)
def test_areas_are_what_the_centres_of_cells_lie_in(scenes, size):
    found = areas_in(scenes, extents(scenes), size)
    assert found.shape == (len(scenes), 7, *size)
    x, y = (low + (np.arange(count) + 0.5) * (high - low) / count for low, high, count in ((*EXTENT[:2], size[0]), (*EXTENT[2:], size[1])))
    x, y = np.meshgrid(x, y, indexing="ij")
    for i in range(len(scenes)):
        shapes: dict[Area, list[shapely.Polygon]] = {area: [] for area in Area}
        for layer, on_route, red, polygon in polygons_of(scenes[i]):
            belongs = {
                Area.DRIVABLE: layer in DRIVABLE, Area.INTERSECTION: layer == Layer.INTERSECTION,
                Area.ROUTE: layer in LANES and on_route, Area.RED_LIGHT: red,
            }  # fmt: skip
            for area in (area for area, yes in belongs.items() if yes):
                shapes[area].append(polygon)
        for kind, state in agents_of(scenes[i]):
            shapes[AREA_OF.get(kind, Area.OBJECT)].append(box_of(*state[:5]))
        for area, parts in shapes.items():
            inside = np.any([np.zeros(size, dtype=bool), *(shapely.contains_xy(part, x, y) for part in parts)], axis=0)
            wrong = np.nonzero(found[i, area].numpy() != inside)
            unsure = [shapely.distance(part.boundary, shapely.points(x[wrong], y[wrong])) < 1e-6 for part in parts]
            assert np.any(unsure or [np.zeros(len(wrong[0]))], axis=0).all(), f"{scenes.token[i]} {area.name}"
    assert found.any((0, 2, 3)).all()
    assert not found[scenes.token.index("empty")].any()


def test_a_hole_is_a_hole_only_in_its_own_polygon():
    """A block with a hole, and a car park over half of the hole."""

    def square(x: float, y: float, half: float) -> np.ndarray:
        return np.array([[x - half, y - half], [x + half, y - half], [x + half, y + half], [x - half, y + half]])

    block = Polygon(Layer.ROADBLOCK, [square(0, 0, 4), square(0, 0, 2)])
    park = Polygon(Layer.CARPARK, [square(2, 0, 2)[::-1]])
    scene = mapped([block, park])
    found = areas_in(scene, torch.tensor([[-5.0, 5.0, -5.0, 5.0]]), (10, 10))[0, Area.DRIVABLE]
    expected = torch.zeros(10, 10, dtype=torch.bool)
    expected[1:9, 1:9] = True
    expected[3:5, 3:7] = False
    assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [3, 60])
def test_boxes_are_the_nearest_agents_within_the_extent(scenes, count):
    found = boxes_in(scenes, extents(scenes), count)
    assert found.state.shape == (len(scenes), count, 7)
    for i in range(len(scenes)):
        low_x, high_x, low_y, high_y = EXTENT
        agents = [(k, s) for k, s in agents_of(scenes[i]) if low_x <= s[0] <= high_x and low_y <= s[1] <= high_y][:count]
        assert found.valid[i].tolist() == [True] * len(agents) + [False] * (count - len(agents))
        assert found.kind[i, : len(agents)].tolist() == [kind for kind, _ in agents]
        for row, (_, state) in enumerate(agents):
            np.testing.assert_allclose(found.state[i, row].numpy(), state, atol=1e-4)
        assert not found.state[i, len(agents) :].any()


def test_corners_of_boxes(scenes):
    for box in (torch.tensor([3.0, -2.0, 0.7, 4.0, 2.0]), torch.tensor([0.0, 0.0, -2.0, 1.0, 3.0])):
        expected = box_of(*box.tolist())
        assert shapely.Polygon(corners_of(box).numpy()).symmetric_difference(expected).area < 1e-5
        forward = corners_of(box)[[0, 3]].mean(0) - box[:2]
        torch.testing.assert_close(torch.atan2(forward[1], forward[0]), box[2])


def test_elements_are_what_lies_within_the_extent(scenes):
    """Each outline against the polygon cut by shapely, the centreline against its part."""
    count, points = 100, 16
    found = elements_in(scenes, extents(scenes), count, points)
    window = shapely.box(EXTENT[0], EXTENT[2], EXTENT[1], EXTENT[3])
    compared, origin = 0, shapely.Point(0, 0)
    for i in range(len(scenes)):
        expected = []
        for layer, on_route, red, polygon in polygons_of(scenes[i]):
            part = shapely.Polygon(polygon.exterior).intersection(window)
            if layer in ELEMENT_OF and part.area >= 1.0:
                kind = Element.RED_CONNECTOR if red and layer == Layer.LANE_CONNECTOR else ELEMENT_OF[layer]
                expected.append((kind, on_route, part))
        lines = [kind == Element.CENTRELINE for kind in found.kind[i][found.valid[i]].tolist()]
        outlines = found.points[i][found.valid[i]][sum(lines) :]
        assert sum(found.valid[i]) == len(expected) + sum(lines)
        # Where the cut leaves one part, its order by distance is sure.
        for kind, on_route, part in expected:
            if part.geom_type != "Polygon":
                continue
            ring = shapely.LinearRing(shapely.get_coordinates(shapely.geometry.polygon.orient(part).exterior))
            start = ring.project(origin)
            wanted = [ring.interpolate((start + k / points * ring.length) % ring.length) for k in range(points)]
            wanted = torch.from_numpy(shapely.get_coordinates(wanted)).float()
            apart = (outlines - wanted).abs().amax((1, 2))
            row = sum(lines) + int(apart.argmin())
            assert apart.min() < 1e-3, (scenes.token[i], kind)
            assert (found.kind[i, row], found.on_route[i, row]) == (kind, on_route)
            compared += 1
        starts = outlines[:, 0].norm(dim=1)
        assert (starts.diff() > -1e-4).all()
    assert compared > 100
    assert {int(kind) for kind in found.kind[found.valid]} == set(Element)


def test_the_centreline_is_as_long_as_the_extent(scenes):
    found = elements_in(scenes, extents(scenes), 8, 17)
    back, ahead, compared = -EXTENT[0], EXTENT[1], 0
    for i in range(len(scenes)):
        if len(scenes[i].centerline) < 2:
            assert Element.CENTRELINE not in found.kind[i][found.valid[i]]
            continue
        line = shapely.LineString(in_ego_frame(scenes[i], scenes[i].centerline[:, :2].numpy()))
        here = line.project(shapely.Point(0, 0))
        along = np.linspace(max(here - back, 0.0), min(here + ahead, line.length), 17)
        wanted = shapely.get_coordinates([line.interpolate(metres) for metres in along])
        assert found.kind[i, 0] == Element.CENTRELINE
        assert found.on_route[i, 0]
        np.testing.assert_allclose(found.points[i, 0].numpy(), wanted, atol=1e-3)
        compared += 1
    assert compared == len(scenes) - 1
    beyond = dataclasses.replace(scenes[0], centerline=scenes[0].centerline + torch.tensor([300.0, 0.0, 0.0], dtype=torch.float64))
    assert Element.CENTRELINE not in elements_in(beyond, extents(beyond), 8, 17).kind[:, 0]


def test_an_area_around_everything_is_the_extent():
    scene = mapped([Polygon(Layer.DRIVABLE_AREA, [np.array([[-500.0, -500.0], [-500.0, 500.0], [500.0, 500.0], [500.0, -500.0]])])])
    found = elements_in(scene, torch.tensor([[-10.0, 30.0, -20.0, 20.0]]), 2, 4)
    expected = torch.tensor([[-10.0, 0.0], [10.0, -20.0], [30.0, 0.0], [10.0, 20.0]])  # all around, from the nearest point
    torch.testing.assert_close(found.points[0, 0], expected)
    assert found.valid[0].tolist() == [True, False]


def targets_of(scene: Scene) -> dict[str, torch.Tensor]:
    extent = extents(scene)
    batches = {"boxes": boxes_in(scene, extent, 30), "elements": elements_in(scene, extent, 60, 12)}
    parts = {f"{name}.{field}": value for name, batch in batches.items() for field, value in batch.tensors()}
    return parts | {"areas": areas_in(scene, extent, (31, 29))}


def test_targets_do_not_know_the_future(scenes):
    expected, found = targets_of(scenes), targets_of(with_another_future(scenes))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_targets_do_not_depend_on_the_map_frame(scenes):
    expected, found = targets_of(scenes), targets_of(moved(scenes))
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)
        elif name == "areas":  # a centre may lie on a border to the last bit
            assert (found[name] != value).float().mean() < 1e-5
        else:
            assert torch.equal(found[name], value), name


def test_targets_keep_scenes_apart(scenes):
    together = targets_of(scenes)
    for i in range(len(scenes)):
        for name, value in targets_of(scenes[i]).items():
            torch.testing.assert_close(value[0], together[name][i], rtol=0, atol=1e-5, msg=name)


def test_targets_are_the_same_on_every_device(scenes, device):
    expected, found = targets_of(scenes), targets_of(scenes.to(device))
    for name, value in expected.items():
        assert found[name].device.type == device
        torch.testing.assert_close(found[name].cpu(), value, rtol=0, atol=1e-4, msg=name)


# -- matching ----------------------------------------------------------------------------------------------------------


def test_matching_finds_permutations():
    generator = torch.Generator().manual_seed(0)
    for targets in (0, 1, 5, 9):
        order = torch.stack([torch.randperm(9, generator=generator)[:targets] for _ in range(4)])
        cost = torch.rand(4, 9, targets, generator=generator) + 1.0
        cost.scatter_(1, order[:, None], 0.0)
        assert torch.equal(assign(cost, torch.ones(4, targets, dtype=torch.bool)), order)


def test_matching_is_of_least_total_cost_and_leaves_out_what_is_not_there():
    generator = torch.Generator().manual_seed(1)
    cost = torch.rand(6, 5, 4, generator=generator)
    valid = torch.rand(6, 4, generator=generator) < 0.7
    found = assign(cost, valid)
    for i in range(6):
        there = valid[i].nonzero()[:, 0].tolist()
        orders = itertools.permutations(range(5), len(there))
        totals = {order: sum(cost[i, q, t].item() for q, t in zip(order, there, strict=True)) for order in orders}
        assert tuple(found[i, there].tolist()) == min(totals, key=totals.__getitem__)
    assert not found[~valid].any()


def test_matching_survives_a_network_that_has_diverged():
    assign(torch.full((2, 3, 2), math.nan), torch.ones(2, 2, dtype=torch.bool))


def test_focal_loss_by_hand():
    logits = torch.tensor([[[2.0, -1.0], [0.5, 0.0]]], dtype=torch.float64)
    query, kind, valid = torch.tensor([[1, 0]]), torch.tensor([[0, 1]]), torch.tensor([[True, False]])

    def term(p: float, wanted: bool) -> float:
        return -0.25 * (1 - p) ** 2 * math.log(p) if wanted else -0.75 * p**2 * math.log(1 - p)

    p = logits[0].sigmoid().tolist()
    expected = term(p[0][0], False) + term(p[0][1], False) + term(p[1][0], True) + term(p[1][1], False)
    assert class_loss(logits, query, kind, valid).item() == pytest.approx(expected)
    cost = class_cost(logits, kind)
    assert cost[0, 1, 0].item() == pytest.approx(term(p[1][0], True) - term(p[1][0], False))


def test_outlines_are_equal_wherever_they_begin():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(1, 3, 7, 2, generator=generator)
    closed = torch.tensor([[True, True, False]])
    changed = torch.stack([wanted[0, 0].roll(3, 0), wanted[0, 1].flip(0).roll(-2, 0), wanted[0, 2]])[None]
    assert ordered_distance(changed, wanted, closed).abs().max() == 0.0
    backwards = ordered_distance(wanted.flip(2), wanted, closed)
    assert (backwards[0, :2] == 0.0).all()
    assert backwards[0, 2] == pytest.approx((wanted[0, 2].flip(0) - wanted[0, 2]).abs().sum(-1).mean().item())  # a line has a direction
    noise = wanted + 0.01 * torch.randn(wanted.shape, generator=generator)
    torch.testing.assert_close(ordered_distance(noise.roll(2, 2), wanted, closed)[0, :2], (noise - wanted).abs().sum(-1).mean(-1)[0, :2])


def test_chamfer_by_loops():
    generator = torch.Generator().manual_seed(0)
    found, wanted = torch.randn(2, 4, 5, 2, generator=generator), torch.randn(2, 3, 5, 2, generator=generator)
    result = chamfer(found, wanted)
    for b, q, n in itertools.product(range(2), range(4), range(3)):
        apart = [[(p - t).abs().sum().item() for t in wanted[b, n]] for p in found[b, q]]
        ways = sum(map(min, apart)) / 5, sum(min(column) for column in zip(*apart, strict=True)) / 5
        assert result[b, q, n].item() == pytest.approx(sum(ways) / 2, abs=1e-5)


# -- heads -------------------------------------------------------------------------------------------------------------

WIDTH = 32
HEADS = {
    "agents": (DetectionHead, {"queries": 10, "layers": 2, "heads": 4, "stride": 1, "uncertainty": 0.1}),
    "map": (MapHead, {"queries": 24, "points": 8, "layers": 2, "heads": 4, "stride": 1}),
    "areas": (SegmentationHead, {"hidden": 32, "upsample": 2}),
}
all_heads = pytest.mark.parametrize("name", HEADS)


def head_of(name: str, width: int = WIDTH, **settings) -> nn.Module:
    torch.manual_seed(0)
    head, usual = HEADS[name]
    return head(head.Config(**(usual | settings)), width)


def seen(scene: Scene, bev: torch.Tensor, extent: tuple[float, ...] = EXTENT) -> Features:
    count = len(scene)
    obs = Observation(scene.token, torch.zeros(count, 4, 8), torch.zeros(count).long())
    return Features(obs, bev=bev, bev_range=extents(scene, extent))


def grid(count: int, cells: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, WIDTH, cells, cells, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("name", "cells", "steps"), [("agents", 8, 200), ("map", 8, 200), ("areas", 16, 200)])
def test_heads_learn_four_scenes(name, cells, steps):
    """From a grid that is free to say anything, until every part of the loss is small and the predictions are right."""
    scene, head = synthetic_scenes(4, seed=16), head_of(name)
    bev = nn.Parameter(0.1 * grid(4, cells))
    optimizer = torch.optim.Adam([*head.parameters(), bev])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    first = None
    for _ in range(steps):
        losses = head.loss(head(seen(scene, bev)), scene)
        first = first or {key: value.item() for key, value in losses.items()}
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
    for key, value in losses.items():
        assert value < 0.05 * first[key], key
    LEARNT[name](head, head(seen(scene, bev)), scene)


def agents_are_learnt(head: DetectionHead, features: Features, scene: Scene) -> None:
    wanted = boxes_in(scene, features.bev_range, 10)
    states, likely = decode(features.predictions["agent_boxes"][:, -1]), features.predictions["agent_kinds"][:, -1].sigmoid()
    for i in range(len(scene)):
        sure = likely[i].amax(-1) > 0.5
        there = wanted.valid[i]
        assert sure.sum() == there.sum()
        apart = torch.cdist(wanted.state[i][there][:, :2], states[i][sure][:, :2])
        assert apart.min(1).values.max() < 1.0
        nearest = apart.argmin(1)
        assert torch.equal(likely[i][sure][nearest].argmax(-1), wanted.kind[i][there])
        torch.testing.assert_close(states[i][sure][nearest][:, 3:5], wanted.state[i][there][:, 3:5], rtol=0.3, atol=0.3)


def map_is_learnt(head: MapHead, features: Features, scene: Scene) -> None:
    wanted = elements_in(scene, features.bev_range, 24, 8)
    likely = features.predictions["map_kinds"][:, -1].sigmoid()
    for i in range(len(scene)):
        sure, there = likely[i].amax(-1) > 0.5, wanted.valid[i]
        assert sure.sum() == there.sum()
        apart = chamfer(features.predictions["map_points"][i, -1][sure][None], wanted.points[i][there][None])[0]
        assert apart.amin(0).max() < 1.5


def areas_are_learnt(head: SegmentationHead, features: Features, scene: Scene) -> None:
    wanted = head.targets(features, scene)
    iou = intersection_over_union(features.predictions["areas"], wanted)
    assert torch.equal(iou.isnan(), ~wanted.any(-1).any(-1))
    assert iou.nanmean() > 0.95
    assert features.predictions["areas"].shape[2:] == (32, 32)


LEARNT = {"agents": agents_are_learnt, "map": map_is_learnt, "areas": areas_are_learnt}


@all_heads
def test_losses_are_means_over_scenes(scenes, name):
    head, bev = head_of(name), grid(len(scenes))
    together = head.loss(head(seen(scenes, bev)), scenes)
    assert together
    alone = [head.loss(head(seen(scenes[i], bev[i : i + 1])), scenes[i]) for i in range(len(scenes))]
    for key, value in together.items():
        torch.testing.assert_close(value, torch.stack([losses[key] for losses in alone]).mean(), rtol=1e-4, atol=1e-5, msg=key)
        assert value.ndim == 0
        assert value > 0.0


@all_heads
def test_heads_learn_from_empty_scenes(name):
    scene = Scene.cat([empty(), empty()])
    head, bev = head_of(name), grid(2).requires_grad_()
    losses = head.loss(head(seen(scene, bev)), scene)
    assert all(value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert bev.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters() if parameter.grad is not None)


@all_heads
def test_losses_do_not_know_the_future(scenes, name):
    head = head_of(name)
    features = head(seen(scenes, grid(len(scenes))))
    expected, found = head.loss(features, scenes), head.loss(features, with_another_future(scenes))
    assert {key: value.item() for key, value in found.items()} == {key: value.item() for key, value in expected.items()}


@all_heads
def test_gradients_reach_every_parameter_and_the_grid(scenes, name):
    head, bev = head_of(name).train(), grid(len(scenes)).requires_grad_()
    features = head(seen(scenes, bev))
    tokens = [value.square().sum() for value in (features.agents, features.map) if value is not None]
    (sum(head.loss(features, scenes).values()) + sum(tokens)).backward()
    assert [key for key, parameter in head.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()] == []
    assert (bev.grad != 0.0).any((1, 2, 3)).all()


@all_heads
def test_losses_are_the_same_on_every_device(scenes, name, device):
    """Also where the scenes stay behind."""
    head, bev = head_of(name), grid(len(scenes))
    expected = head.loss(head(seen(scenes, bev)), scenes)
    features = head.to(device)(seen(scenes, bev).to(device))
    for where in (scenes, scenes.to(device)):
        for key, value in head.loss(features, where).items():
            torch.testing.assert_close(value.cpu(), expected[key], rtol=1e-3, atol=1e-3, msg=key)


@all_heads
def test_heads_run_in_bfloat16(scenes, name):
    head, bev = head_of(name), grid(len(scenes))
    with torch.autocast("cpu", torch.bfloat16):
        features = head(seen(scenes, bev.bfloat16()))
        losses = head.loss(features, scenes)
    exact = head.loss(head(seen(scenes, bev)), scenes)
    for key, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[key], rtol=0.05, atol=0.02, msg=key)


@all_heads
@pytest.mark.parametrize("missing", ["bev", "bev_range"])
def test_heads_say_what_they_miss(name, missing):
    features = dataclasses.replace(seen(empty(), grid(1)), **{missing: None})
    with pytest.raises(InputError, match=f"no {missing}: the backbone must make it"):
        head_of(name)(features)


@pytest.mark.parametrize("name", ["agents", "map"])
def test_heads_make_tokens(scenes, name):
    bev = grid(len(scenes))
    features = head_of(name)(seen(scenes, bev))
    tokens, valid = getattr(features, name), getattr(features, f"{name}_valid")
    count = HEADS[name][1]["queries"]
    assert tokens.shape == (len(scenes), count, WIDTH)
    assert valid.all()
    kinds = "agent_kinds" if name == "agents" else "map_kinds"
    likely = features.predictions[kinds][:, -1].sigmoid().amax(-1)
    threshold = likely.median().item()
    valid = getattr(head_of(name, threshold=threshold)(seen(scenes, bev)), f"{name}_valid")
    assert torch.equal(valid, likely >= threshold)
    with pytest.raises(ConfigError, match="4 heads do not divide tokens of width 30"):
        head_of(name, width=30)


def test_heads_take_what_others_made(scenes):
    """One after the other, each keeps the tokens and predictions of those before."""
    features = seen(scenes, grid(len(scenes)))
    for name in HEADS:
        features = head_of(name)(features)
    assert features.agents is not None
    assert features.map is not None
    assert set(features.predictions) == {"agent_kinds", "agent_boxes", "agent_scales", "map_kinds", "map_points", "areas"}
    assert len(features[[0, 2]].predictions["areas"]) == 2


@pytest.mark.parametrize("name", ["agents", "map"])
def test_heads_see_where_things_are(name):
    """Queries that look at a pattern see another one where the pattern is moved."""
    head, scene = head_of(name), empty()
    bev = torch.zeros(1, WIDTH, 16, 16)
    bev[:, :, 2, 3] = grid(1)[:, :, 0, 0]
    tokens = [getattr(head(seen(scene, pattern)), name) for pattern in (bev, bev.roll((9, 7), (2, 3)))]
    assert not torch.allclose(*tokens, atol=1e-4)
    shifted = [getattr(head(seen(scene, bev, extent)), name) for extent in (EXTENT, (0.0, 64.0, -32.0, 32.0))]
    assert not torch.allclose(*shifted, atol=1e-4)  # they know what the grid covers


def test_boxes_are_encoded_and_decoded(scenes):
    boxes = boxes_in(scenes, extents(scenes), 40)
    state = boxes.state[boxes.valid]
    torch.testing.assert_close(decode(encode(state)), state, rtol=1e-5, atol=1e-5)
    code = encode(state)
    code[:, 2:4] *= 3.0
    torch.testing.assert_close(decode(code), state, rtol=1e-5, atol=1e-5)


def perfect(head: DetectionHead, scene: Scene, order: torch.Tensor) -> Features:
    """Predictions that are right, of queries in another order."""
    features = head(seen(scene, grid(len(scene))))
    target = boxes_in(scene, features.bev_range, 10)
    kinds = torch.where(nn.functional.one_hot(target.kind, 7).bool() & target.valid[..., None], 30.0, -30.0)
    codes = torch.where(target.valid[..., None], encode(target.state), 1e3)
    predictions = {"agent_kinds": kinds[:, order], "agent_boxes": codes[:, order]}
    predictions = {key: value[:, None].repeat(1, 2, *[1] * (value.ndim - 1)) for key, value in predictions.items()}
    return dataclasses.replace(features, predictions=features.predictions | predictions)


def test_right_boxes_cost_nothing_in_any_order(scenes):
    head = head_of("agents")
    for seed in range(3):
        order = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
        features = perfect(head, scenes, order)
        losses = head.loss(features, scenes)
        assert losses["agent_kinds"] < 1e-6
        assert losses["agent_boxes"] < 1e-5
    features.predictions["agent_boxes"][..., 0] += 1.0  # a metre off, in both layers
    there = boxes_in(scenes, features.bev_range, 10).valid.any(1).float().mean()
    assert head.loss(features, scenes)["agent_boxes"].item() == pytest.approx(0.25 * there.item(), rel=1e-4)


def test_uncertainty_is_a_likelihood(scenes):
    """Of centres and corners, against torch's own Laplace distribution."""
    head = head_of("agents")
    features = perfect(head, scenes, torch.arange(10))
    features.predictions["agent_boxes"][..., :2] += torch.tensor([0.6, -0.2])
    target = boxes_in(scenes, features.bev_range, 10)
    scales = features.predictions["agent_scales"]
    assert scales.shape == (len(scenes), 2, 10, 10)
    assert (scales > 0.0).all()
    errors = torch.tensor([0.6, -0.2]).expand(len(scenes), 2, 10, 5, 2)
    likely = torch.distributions.Laplace(0.0, scales.unflatten(-1, (5, 2))).log_prob(errors).mean((-2, -1))
    there = target.valid[:, None]
    per_scene = -(likely * there).sum(-1) / there.sum(-1).clamp(min=1)
    expected = 0.1 * per_scene.mean()
    torch.testing.assert_close(head.loss(features, scenes)["agent_scales"], expected, rtol=1e-4, atol=1e-5)
    plain = head_of("agents", uncertainty=0.0)
    assert "agent_scales" not in plain.loss(plain(seen(scenes, grid(len(scenes)))), scenes)


def test_intersection_over_union_by_hand():
    logits = torch.tensor([[[[1.0, 1.0], [-1.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]]])
    wanted = torch.tensor([[[[True, False], [True, False]], [[False, False], [False, False]]]])
    assert intersection_over_union(logits, wanted)[0, 0].item() == pytest.approx(1 / 3)
    assert intersection_over_union(logits, wanted)[0, 1].isnan()


# -- the privileged backbone -------------------------------------------------------------------------------------------

test_vector = backbone_checks("vector")
test_vector_without_attention = backbone_checks("vector", width=12, heads=3, layers=0, agents=3, elements=2, points=5, frames=1)


def told(scene: Scene) -> Observation:
    history = torch.cat([scene.in_ego_frame(scene.history[..., :3]), scene.history[..., 3:]], -1).float()
    return Observation(scene.token, history, torch.zeros(len(scene)).long(), scene=scene)


def vector(**settings) -> nn.Module:
    torch.manual_seed(0)
    return irlvla.build("backbone", {"name": "vector", **settings}).eval()


def tokens_of(features: Features) -> dict[str, torch.Tensor]:
    return {name: value for name, value in features.tensors() if not name.startswith("observation")}


def test_vector_tells_what_there_is(scenes):
    features, extent = vector()(told(scenes)), (-32.0, 64.0, -40.0, 40.0)
    assert torch.equal(features.agents_valid, boxes_in(scenes, extents(scenes, extent), 32).valid)
    assert torch.equal(features.map_valid, elements_in(scenes, extents(scenes, extent), 64, 20).valid)
    assert all(value.isfinite().all() for value in tokens_of(features).values())
    nothing = scenes.token.index("empty")
    assert not features.agents_valid[nothing].any()
    assert not features.map_valid[nothing].any()
    assert features.status.shape == (len(scenes), 64)
    assert features.bev is None
    bare = vector(agents=0, elements=0)(told(scenes))
    assert bare.agents is None
    assert bare.map is None


def test_vector_does_not_know_the_future_or_the_map_frame(scenes):
    backbone = vector()
    expected = tokens_of(backbone(told(scenes)))
    for name, value in tokens_of(backbone(dataclasses.replace(told(scenes), scene=with_another_future(scenes)))).items():
        assert torch.equal(value, expected[name]), name
    for name, value in tokens_of(backbone(dataclasses.replace(told(scenes), scene=moved(scenes)))).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"agent_state": torch.cat([s.agent_state[:, :1] + torch.tensor([0, 0, 0, 3.0, 0]), s.agent_state[:, 1:]], 1)},
        lambda s: {"agent_size": s.agent_size * 1.5},
        lambda s: {"agent_kind": (s.agent_kind + 1) % 7},
        lambda s: {"polygon_on_route": ~s.polygon_on_route},
        lambda s: {"light_red": ~s.light_red},
        lambda s: {"centerline": s.centerline + torch.tensor([0.5, 0.5, 0.0])},
        lambda s: {"speed_limit": s.speed_limit * 2},
        lambda s: {"speed_limit": s.speed_limit * math.nan},
    ],
    ids=["velocity", "size", "kind", "route", "light", "centreline", "limit", "no limit"],
)
def test_vector_sees_each_part_of_the_scene(change):
    backbone, scene = vector(), crowded(2)
    expected = backbone(told(scene)).status
    other = dataclasses.replace(told(scene), scene=dataclasses.replace(scene, **change(scene)))
    assert (backbone(other).status - expected).abs().max() > 1e-4


def test_vector_learns():
    """To tell, from its status token, how far ahead the nearest agent is."""
    scene = synthetic_scenes(8, seed=3)
    backbone, readout = vector(width=32, layers=1).train(), nn.Linear(32, 1)
    wanted = boxes_in(scene, extents(scene, (-32.0, 64.0, -40.0, 40.0)), 1).state[:, 0, 0] / 10.0
    optimizer = torch.optim.Adam([*backbone.parameters(), *readout.parameters()], 3e-3)
    losses = []
    for _ in range(60):
        losses.append((readout(backbone(told(scene)).status)[:, 0] - wanted).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


def test_vector_says_what_it_misses(scenes):
    obs = dataclasses.replace(told(scenes), scene=None)
    with pytest.raises(InputError, match=r"backbone 'vector' \(irlvla .*have no scene: take a dataset .*privileged: true"):
        vector()(obs)
    with pytest.raises(ConfigError, match="3 heads do not divide tokens of width 64"):
        vector(heads=3)
    with pytest.raises(ConfigError, match="extent must be least x, greatest x"):
        vector(extent=(10.0, -10.0, 0.0, 1.0))
