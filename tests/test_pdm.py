"""PDM-Closed: what a reader expects of it, its geometry against shapely, and official values of one scene."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import shapely
import torch
from shapely.ops import substring

from irlvla import pdm
from irlvla.corridor import HALF_WIDTH, OFFSETS, Corridor, Paths, _end_square, clearance, project
from irlvla.errors import InputError
from irlvla.types import Kind, Layer, Scene

FRONT = 4.049  # front bumper ahead of the rear axle [m]
KINDS = list(Kind)


def line(start: float = -30.0, end: float = 170.0, spacing: float = 1.0, curvature: float = 0.0) -> np.ndarray:
    """Centreline "L 3" from x = start on, through the origin along +x."""
    s = np.arange(start, end + spacing / 2, spacing)
    heading = curvature * s
    if curvature == 0.0:
        return np.stack([s, np.zeros_like(s), heading], axis=-1)
    return np.stack([np.sin(heading) / curvature, (1.0 - np.cos(heading)) / curvature, heading], axis=-1)


def strip(centerline: np.ndarray, half_width: float = 1.75) -> np.ndarray:
    """Open ring around a centreline."""
    normal = np.stack([-np.sin(centerline[:, 2]), np.cos(centerline[:, 2])], axis=-1) * half_width
    return np.concatenate([centerline[:, :2] - normal, (centerline[:, :2] + normal)[::-1]])


def box(x0: float, x1: float, half_width: float = 1.75) -> np.ndarray:
    return np.array([[x0, -half_width], [x1, -half_width], [x1, half_width], [x0, half_width]])


def agent(
    x: float, y: float = 0.0, heading: float = 0.0, speed: float = 0.0, kind: Kind = Kind.VEHICLE, size: tuple[float, float] = (4.6, 1.9)
) -> tuple:
    return x, y, heading, speed, kind, size


def make_scene(
    *,
    centerline: np.ndarray | None = None,
    pose: tuple[float, float, float] = (0.0, 0.0, 0.0),
    speed: float = 10.0,
    limit: float = 10.0,
    agents: tuple = (),
    lights: tuple[np.ndarray, ...] = (),
    red: bool = True,
    lights_on_route: bool = True,
) -> Scene:
    """One scene: a road three lanes wide, whose middle lane is the route, with red lights on extra polygons."""
    road = line()
    centerline = road if centerline is None else centerline
    around = centerline if len(centerline) > 2 else road
    rings = [strip(around, 5.25), strip(around), *lights]
    count, steps = len(agents), 41
    state = torch.zeros(count, steps, 5, dtype=torch.float64)
    for i, (x, y, heading, v, _, _) in enumerate(agents):
        state[i] = torch.tensor([x, y, heading, v * math.cos(heading), v * math.sin(heading)], dtype=torch.float64)
    ego = torch.tensor([[*pose, speed, *[0.0] * 7]], dtype=torch.float64)
    stamps = torch.tensor([[-1_500_000, -1_000_000, -500_000, 0]]) + 10_000_000
    return Scene(
        token=("scene",),
        time_us=torch.tensor([10_000_000]),
        ego=ego,
        history_time_us=stamps,
        history=torch.cat([ego[:, None, :7], torch.zeros(1, 1, 1)], -1).repeat(1, 4, 1),
        human=torch.full((1, 8, 3), torch.nan, dtype=torch.float64),
        human_dt=0.5,
        human_values=None,
        reference=torch.full((1, 41, 3), torch.nan, dtype=torch.float64),
        previous_time_us=torch.tensor([9_500_000]),
        previous_ego=torch.full((1, 11), torch.nan, dtype=torch.float64),
        speed_limit=torch.tensor([limit], dtype=torch.float64),
        agent_offsets=torch.tensor([0, count]),
        agent_token=tuple(f"agent{i}" for i in range(count)),
        agent_kind=torch.tensor([int(a[4]) for a in agents], dtype=torch.int64),
        agent_size=torch.tensor([a[5] for a in agents], dtype=torch.float64).reshape(count, 2),
        agent_valid=torch.ones(count, steps, dtype=torch.bool),
        agent_state=state,
        polygon_offsets=torch.tensor([0, len(rings)]),
        polygon_layer=torch.tensor([Layer.ROADBLOCK, Layer.LANE, *[Layer.LANE_CONNECTOR] * len(lights)]),
        polygon_on_route=torch.tensor([False, True, *[lights_on_route] * len(lights)]),
        ring_offsets=torch.arange(len(rings) + 1),
        point_offsets=torch.tensor([0, *np.cumsum([len(ring) for ring in rings])]),
        points=torch.from_numpy(np.concatenate(rings)),
        light_offsets=torch.tensor([0, len(lights)]),
        light_polygon=torch.arange(2, 2 + len(lights)),
        light_red=torch.full((len(lights), 41), red),
        centerline_offsets=torch.tensor([0, len(centerline)]),
        centerline=torch.from_numpy(centerline),
    )


def proposals_of(scene: Scene) -> np.ndarray:
    """Proposals "3 5 41 3"."""
    return pdm.proposals(pdm.forecast(scene)).numpy().reshape(3, 5, 41, 3)


def plan_of(scene: Scene) -> np.ndarray:
    return pdm.pdm_closed(scene)[0].numpy()


VARIED = [
    make_scene(),
    make_scene(agents=(agent(25.0), agent(-12.0, 3.5, speed=12.0), agent(30.0, -3.4, math.pi, 8.0)), speed=6.0),
    make_scene(centerline=np.zeros((0, 3))),
    make_scene(lights=(box(32.0, 50.0),), limit=math.nan, agents=(agent(15.0, 2.0, 0.1, kind=Kind.TRAFFIC_CONE, size=(0.4, 0.4)),)),
    make_scene(centerline=line(curvature=0.02), limit=13.4, pose=(0.5, 0.6, 0.05), agents=(agent(22.0, 5.0, 0.5, 5.0),)),
]


class TestPlan:
    def test_free_road(self):
        plan = plan_of(make_scene(speed=9.0, limit=10.0))
        assert plan.shape == (41, 3)
        np.testing.assert_allclose(plan[:, 1:], 0.0, atol=1e-12)
        speed = np.diff(plan[:, 0]) / 0.1
        np.testing.assert_allclose(speed[:2], [9.0, 8.7])  # the devkit brakes in step 1, whatever is ahead
        assert (np.diff(speed[1:]) > -1e-3).all()  # the end of the path counts as something standing
        assert 9.5 < speed[-1] < 10.0

    def test_first_of_equals_wins(self):
        """Nobody gets 5 m far behind a wall, so all that keep still score the same, and the slowest on the centreline is taken."""
        scene = make_scene(speed=0.0, agents=(agent(8.0),))
        np.testing.assert_array_equal(plan_of(scene), proposals_of(scene)[0, 0])

    def test_stops_behind_a_standing_car(self):
        plan = plan_of(make_scene(agents=(agent(30.0),)))
        assert 0.5 < (30.0 - 2.3) - (plan[-1, 0] + FRONT) < 6.0
        assert (np.diff(plan[:, 0]) > -1e-9).all()

    def test_follows_a_moving_car(self):
        plan = plan_of(make_scene(agents=(agent(20.0, speed=6.0),)))
        rear = 20.0 - 2.3 + 6.0 * 0.1 * np.arange(41)
        assert (plan[:, 0] + FRONT < rear).all()
        assert plan[-1, 0] > 20.0

    def test_stops_before_a_red_light(self):
        plan = plan_of(make_scene(lights=(box(30.0, 45.0),)))
        assert plan[-1, 0] + FRONT < 30.0
        assert plan[-1, 0] > 15.0

    @pytest.mark.parametrize("options", [{"red": False}, {"lights_on_route": False}])
    def test_other_lights_do_not_matter(self, options):
        np.testing.assert_array_equal(proposals_of(make_scene(lights=(box(30.0, 45.0),), **options)), proposals_of(make_scene()))

    def test_light_turns_neither_green_nor_red(self):
        scene = make_scene(lights=(box(30.0, 45.0),))
        later = scene.light_red.clone()
        later[:, 1:] = False
        np.testing.assert_array_equal(plan_of(dataclasses.replace(scene, light_red=later)), plan_of(scene))

    def test_car_inside_a_red_connector_drives_on(self):
        inside = proposals_of(make_scene(lights=(box(-5.0, 45.0),)))
        np.testing.assert_array_equal(inside, proposals_of(make_scene()))
        partly = proposals_of(make_scene(lights=(box(2.0, 45.0),)))
        assert partly[0, 4, -1, 0] < 25.0

    def test_what_touches_the_car_is_ignored(self):
        touching = make_scene(agents=(agent(4.0), agent(2.0, 1.5, 0.3, 4.0)))
        np.testing.assert_array_equal(proposals_of(touching), proposals_of(make_scene()))
        assert plan_of(touching)[-1, 0] > 30.0

    def test_takes_the_side_that_is_free(self):
        """A cone on the right edge of the lane: the path 1 m to the left passes it, the centreline does not."""
        cone = agent(25.0, -1.0, kind=Kind.TRAFFIC_CONE, size=(0.4, 0.4))
        scene = make_scene(agents=(cone,))
        ends = proposals_of(scene)[:, 4, -1]
        assert ends[2, 0] > 30.0
        assert (ends[:2, 0] < 25.0).all()

    def test_unknown_speed_limit(self):
        np.testing.assert_array_equal(plan_of(make_scene(limit=math.nan)), plan_of(make_scene(limit=15.0)))

    @pytest.mark.parametrize("limit", [0.0, -3.0])
    def test_impossible_speed_limit(self, limit):
        with pytest.raises(InputError, match="speed_limit must be positive"):
            pdm.pdm_closed(make_scene(limit=limit))


class TestPaths:
    def test_curve(self):
        centerline = line(curvature=0.03)
        scene = make_scene(centerline=centerline)
        paths = [shapely.LineString(centerline[:, :2]).offset_curve(offset) for offset in OFFSETS]
        for path, poses in zip(paths, proposals_of(scene), strict=True):
            assert shapely.distance(shapely.points(poses[..., :2]), path).max() < 5e-3

    def test_car_off_the_centreline(self):
        poses = proposals_of(make_scene(pose=(3.3, 2.4, 0.2)))
        np.testing.assert_allclose(poses[:, :, 0, 0], 3.3)
        np.testing.assert_allclose(poses[..., 1], np.broadcast_to(np.array(OFFSETS)[:, None, None], (3, 5, 41)), atol=1e-12)

    def test_two_points(self):
        two = np.array([[-30.0, 0.0, 0.0], [170.0, 0.0, 0.0]])
        np.testing.assert_allclose(plan_of(make_scene(centerline=two)), plan_of(make_scene()), atol=1e-9)
        behind = plan_of(make_scene(centerline=two, agents=(agent(30.0),)))
        assert 0.5 < (30.0 - 2.3) - (behind[-1, 0] + FRONT) < 6.0

    def test_repeated_points(self):
        twice = np.repeat(line(), 2, axis=0)
        np.testing.assert_allclose(plan_of(make_scene(centerline=twice, agents=(agent(30.0),))), plan_of(make_scene(agents=(agent(30.0),))))

    @pytest.mark.parametrize("centerline", [np.zeros((0, 3)), np.zeros((1, 3)), np.ones((4, 3))])
    def test_no_length(self, centerline):
        scenes = Scene.cat([make_scene(), make_scene(centerline=centerline)])
        plans = pdm.pdm_closed(scenes).numpy()
        np.testing.assert_array_equal(plans[0], plan_of(make_scene()))
        assert np.isnan(plans[1]).all()

    def test_end_of_the_path(self):
        """It stops where the path ends, and one that is already there stays."""
        short = line(-30.0, 20.0)
        assert plan_of(make_scene(centerline=short))[-1, 0] <= 20.0
        np.testing.assert_allclose(proposals_of(make_scene(centerline=short, pose=(25.0, 0.0, 0.0)))[0, :, :, 0], 20.0)

    def test_parallel_without_length(self):
        """The devkit puts a parallel that shrinks to a point at the origin of its map."""
        turn = np.stack([np.sin(a := np.linspace(0.0, 3.0, 20)), 1.0 - np.cos(a), a], axis=-1)
        turn[:, :2] = np.round(turn[:, :2], 12)
        paths = Paths.beside(turn)
        flat = dataclasses.replace(
            paths, progress=paths.progress * np.array([[1.0], [1.0], [0.0]]), slope=np.full_like(paths.slope, np.nan)
        )
        assert (flat.poses_at(np.zeros((3, 1)))[2] == 0.0).all()

    @pytest.mark.parametrize(("start", "end"), [(3.0, 4.0), (12.0, 19.5), (0.0, 5.0), (30.0, 60.0), (60.0, 60.0)])
    def test_substring_within_one_segment(self, start, end):
        points = np.array([[0.0, 0.0, 0.3], [9.0, 3.0, 0.3], [20.0, 7.0, 0.3], [50.0, 10.0, 0.3]])
        length = shapely.LineString(points[:, :2]).length
        found = Paths.beside(points).substring(0, start, end)
        expected = np.array(substring(shapely.LineString(points[:, :2]), min(start, length), min(end, length)).coords)
        np.testing.assert_allclose(found if len(expected) > 1 else found[:1], expected, atol=1e-9)

    def test_project(self):
        rng = np.random.default_rng(1)
        points = np.cumsum(rng.normal(0.4, 1.0, (120, 2)), axis=0)
        points[50:53] = points[50]
        paths = Paths.beside(np.column_stack([points, np.zeros(120)]))
        queries = rng.uniform(points.min() - 5.0, points.max() + 5.0, (300, 2))
        expected = shapely.line_locate_point(shapely.LineString(points), shapely.points(queries))
        np.testing.assert_allclose(project(queries, paths.poses[0, :, :2], paths.progress[0]), expected, atol=1e-9)
        one_by_one = [project(q[None], paths.poses[0, :, :2], paths.progress[0])[0] for q in queries]
        np.testing.assert_array_equal(project(queries, paths.poses[0, :, :2], paths.progress[0]), one_by_one)


class TestBatch:
    def test_equals_one_by_one(self):
        together = pdm.pdm_closed(Scene.cat(VARIED))
        assert together.dtype == torch.float64
        for plan, scene in zip(together, VARIED, strict=True):
            np.testing.assert_array_equal(plan.numpy(), pdm.pdm_closed(scene)[0].numpy())

    def test_deterministic(self):
        scenes = Scene.cat(VARIED)
        np.testing.assert_array_equal(pdm.pdm_closed(scenes).numpy(), pdm.pdm_closed(scenes).numpy())

    def test_order_of_agents_does_not_matter(self):
        agents = (agent(25.0), agent(30.0, 3.0, 0.2, 4.0), agent(15.0, -2.0, kind=Kind.BARRIER), agent(40.0, 1.0, 3.0, 7.0))
        np.testing.assert_array_equal(plan_of(make_scene(agents=agents)), plan_of(make_scene(agents=agents[::-1])))

    def test_empty(self):
        assert pdm.pdm_closed(make_scene()[[]]).shape == (0, 41, 3)

    def test_rigid_motion(self):
        scene = make_scene(agents=(agent(28.0, 0.5), agent(35.0, -3.0, 1.4, 3.0)), lights=(box(40.0, 50.0),))
        turn, shift = 2.1, np.array([300.0, -150.0])
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])

        def moved(poses: torch.Tensor) -> torch.Tensor:
            result = poses.clone()
            result[..., :2] = torch.from_numpy(poses[..., :2].numpy() @ rotation.T + shift)
            result[..., 2:3] += turn
            return result

        state = moved(scene.agent_state)
        state[..., 3:5] = torch.from_numpy(scene.agent_state[..., 3:5].numpy() @ rotation.T)
        changed = dataclasses.replace(
            scene, ego=moved(scene.ego), centerline=moved(scene.centerline), points=moved(scene.points), agent_state=state
        )
        expected = moved(pdm.pdm_closed(scene))[0].numpy()
        np.testing.assert_allclose(plan_of(changed)[:, :2], expected[:, :2], atol=1e-6)


class TestForecast:
    def test_constant_velocity_every_second_step(self):
        forecast = pdm.forecast(make_scene(agents=(agent(20.0, 1.0, 0.5, 8.0),)))
        times = torch.arange(41) // 2 * 2 * 0.1
        expected = torch.tensor([20.0, 1.0]) + 8.0 * times[:, None] * torch.tensor([math.cos(0.5), math.sin(0.5)])
        torch.testing.assert_close(forecast.agent_state[0, :, :2].float(), expected.float())
        assert (forecast.agent_state[0, :, 2] == 0.5).all()

    def test_reversing_and_static(self):
        scene = make_scene(agents=(agent(20.0, 0.0, 0.0, -2.0), agent(30.0, 0.0, 0.0, 5.0, kind=Kind.GENERIC)))
        forecast = pdm.forecast(scene)
        kinds = forecast.agent_kind.tolist()
        assert kinds == [Kind.GENERIC, Kind.VEHICLE]  # static objects come first
        assert forecast.agent_state[0, -1, 0] == 30.0
        assert math.isclose(forecast.agent_state[1, -1, 0], 12.0)

    def test_sideways_velocity_is_taken_along_the_heading(self):
        scene = make_scene(agents=(agent(20.0, 0.0, 0.0, 0.0),))
        scene.agent_state[..., 3:5] = torch.tensor([3.0, 4.0])
        np.testing.assert_allclose(pdm.forecast(scene).agent_state[0, -1, :2], [40.0, 0.0])

    def test_what_is_considered(self):
        """The nearest of each kind within 100 m of the centre of the car, seen at t = 0."""
        many = [agent(-40.0 + 2.0 * i, 20.0, kind=kind) for kind in KINDS for i in range(70)]
        far = agent(1.461 + 100.01, kind=Kind.VEHICLE)
        scene = make_scene(agents=(*many, far))
        valid = scene.agent_valid.clone()
        valid[0, 0] = False
        forecast = pdm.forecast(dataclasses.replace(scene, agent_valid=valid))
        counts = torch.bincount(forecast.agent_kind)
        assert counts[:3].tolist() == [50, 25, 10]
        assert counts[3:].sum() == 50
        assert "agent0" not in forecast.agent_token
        assert f"agent{len(many)}" not in forecast.agent_token
        assert forecast.agent_valid.all()
        assert forecast.agent_offsets.tolist() == [0, 135]

    def test_leaves_the_scene_alone(self):
        scene = make_scene(agents=(agent(20.0, speed=3.0),), lights=(box(30.0, 40.0),))
        before = {name: value.clone() for name, value in scene.tensors()}
        pdm.pdm_closed(scene)
        for name, value in scene.tensors():
            torch.testing.assert_close(value, before[name], rtol=0.0, atol=0.0, equal_nan=True)


def random_line(rng: np.random.Generator) -> np.ndarray:
    """A road-like polyline: 2 to 60 points, curvature up to 0.15 / m."""
    count = int(rng.integers(2, 60))
    heading = rng.uniform(-3.0, 3.0) + np.cumsum(np.cumsum(rng.normal(0.0, 0.02, count)).clip(-0.15, 0.15))
    return np.cumsum(rng.uniform(0.6, 1.4, count)[:, None] * np.stack([np.cos(heading), np.sin(heading)], axis=-1), axis=0)


def polygon_of(edges: np.ndarray) -> shapely.Polygon:
    return shapely.Polygon(edges[:, 0])


class TestGeometry:
    def objects(self, agents: list[tuple], lights: tuple[np.ndarray, ...] = ()) -> pdm._Objects:
        scene = make_scene(agents=tuple(agents), lights=lights, pose=(1e3, 1e3, 0.0))
        return pdm._Objects.of(scene, 0)

    def test_corridor_against_shapely(self):
        """Equal to the exact distance to the line and the end squares; to the buffer up to what shapely rounds off."""
        rng = np.random.default_rng(5)
        exact = close = 0
        for _ in range(60):
            polyline = random_line(rng)
            places = polyline[rng.integers(0, len(polyline), 40)] + rng.normal(0.0, 3.0, (40, 2))
            agents = [
                agent(*place, rng.uniform(-4.0, 4.0), rng.choice([0.0, 6.0, -3.0]), size=tuple(rng.uniform(0.3, [6.0, 2.5])))
                for place in places
            ]
            objects = self.objects(agents)
            touching = objects.touching(Corridor.around(polyline))
            path = shapely.LineString(polyline)
            squares = [shapely.Polygon(_end_square(part, 1.0)) for part in (polyline, polyline[::-1])]
            for update in (0, 7, 19):
                edges = objects.edges + pdm.UPDATE_TIMES[update] * np.repeat(objects.drift, 4, axis=0)[:, None]
                boxes = shapely.polygons(edges[:, 0].reshape(-1, 4, 2))
                distance = np.minimum(
                    shapely.distance(path, boxes) - HALF_WIDTH, np.min([shapely.distance(s, boxes) - 1e-12 for s in squares], axis=0)
                )
                sure = np.abs(distance) > 1e-9
                np.testing.assert_array_equal(touching[update, sure], distance[sure] <= 0.0)
                buffered = shapely.intersects(path.buffer(HALF_WIDTH, cap_style="square"), boxes)
                assert (np.abs(distance[buffered != touching[update]]) < 0.02).all()
                exact += sure.sum()
                close += (buffered == touching[update]).sum()
        assert close > 0.999 * exact

    def test_end_squares(self):
        corridor = Corridor.around(line(0.0, 10.0)[:, :2])
        near = [
            agent(-1.1 - 0.5, 1.1 + 0.5, size=(1.0, 1.0)),
            agent(11.1 + 0.5, -1.1 - 0.5, size=(1.0, 1.0)),
            agent(10.6, 0.9, size=(0.1, 0.1)),
        ]
        far = [agent(-1.2 - 0.5, 0.0, size=(1.0, 1.0)), agent(5.0, 1.2 + 0.5, size=(1.0, 1.0))]
        np.testing.assert_array_equal(self.objects(near + far).touching(corridor)[0], [True, True, True, False, False])

    def test_corridor_of_a_point(self):
        """shapely buffers a point into an upright square."""
        square = shapely.Point(3.0, 4.0).buffer(HALF_WIDTH, cap_style="square")
        for points in ([[3.0, 4.0]], [[3.0, 4.0], [3.0, 4.0]]):
            rng = np.random.default_rng(2)
            agents = [agent(*rng.uniform([0.0, 1.0], [6.0, 7.0]), rng.uniform(-3.0, 3.0), size=(1.0, 0.5)) for _ in range(200)]
            objects = self.objects(agents)
            expected = shapely.intersects(square, shapely.polygons(objects.edges[:, 0].reshape(-1, 4, 2)))
            np.testing.assert_array_equal(objects.touching(Corridor.around(np.array(points)))[0], expected)

    def test_corridor_and_lights(self):
        rng = np.random.default_rng(8)
        seen = set()
        for _ in range(200):
            polyline = random_line(rng)
            shape = np.array([[0.0, 0.0], [1.0, 0.2], [0.7, 0.6], [0.1, 0.5]])
            ring = polyline[rng.integers(0, len(polyline))] + rng.normal(0.0, 6.0, 2) + rng.uniform(0.5, 30.0) * shape
            objects = self.objects([], (ring,))
            distance = min(
                shapely.distance(shapely.LineString(polyline), shapely.Polygon(ring)) - HALF_WIDTH,
                *(shapely.distance(shapely.Polygon(_end_square(p, 1.0)), shapely.Polygon(ring)) for p in (polyline, polyline[::-1])),
            )
            touching = objects.touching(Corridor.around(polyline))[:, 0]
            assert (touching == (distance <= 0.0)).all()
            seen.add(bool(touching[0]))
        assert seen == {True, False}

    def test_clearance(self):
        rng = np.random.default_rng(3)
        agents = [agent(*rng.uniform(-12.0, 12.0, 2), rng.uniform(-3.0, 3.0), size=tuple(rng.uniform(0.2, 8.0, 2))) for _ in range(40)]
        lights = tuple(
            np.array([[0, 0], [9, 1], [6, 4], [8, 9], [1, 6]]) * rng.uniform(0.2, 2.0) + rng.uniform(-12.0, 8.0, 2) for _ in range(20)
        )
        objects = self.objects(agents, lights)
        poses = np.column_stack([rng.uniform(-8.0, 8.0, (30, 2)), rng.uniform(-3.0, 3.0, 30)])
        cars = [
            shapely.affinity.translate(shapely.affinity.rotate(shapely.box(-1.127, -1.1485, 4.049, 1.1485), h, (0, 0), True), x, y)
            for x, y, h in poses
        ]
        shapes = [polygon_of(objects.outline(row)) for row in range(60)]
        expected = np.array([shapely.distance(car, shapes) for car in cars])
        np.testing.assert_allclose(clearance(poses, objects.edges, objects.first), expected, atol=1e-9)
        assert (expected == 0.0).any()

    def test_contains(self):
        ring = np.array([[-3.0, -2.0], [8.0, -2.0], [8.0, 2.0], [-3.0, 2.0]])
        polygon = pdm._red_lights(make_scene(lights=(ring,)), 0)[0]
        assert polygon.contains(np.array([0.0, 0.0, 0.0]))
        assert polygon.contains(np.array([8.0 - 4.049, 0.0, 0.0]))  # its border counts
        assert not polygon.contains(np.array([4.5, 0.0, 0.0]))
        assert not polygon.contains(np.array([0.0, 0.0, 1.0]))
        assert not polygon.contains(np.array([30.0, 0.0, 0.0]))

    def test_centroid_with_a_hole(self):
        shell, hole = box(0.0, 10.0, 4.0), np.array([[6.0, -1.0], [9.0, -1.0], [9.0, 2.0], [6.0, 2.0]])
        for outer in (shell, shell[::-1]):
            for inner in (hole, hole[::-1]):
                scene = make_scene(lights=(outer, inner))
                joined = dataclasses.replace(
                    scene,
                    polygon_offsets=torch.tensor([0, 3]),
                    polygon_layer=scene.polygon_layer[:3],
                    polygon_on_route=scene.polygon_on_route[:3],
                    ring_offsets=torch.tensor([0, 1, 2, 4]),
                    light_offsets=torch.tensor([0, 1]),
                    light_polygon=torch.tensor([2]),
                    light_red=scene.light_red[:1],
                )
                centre = pdm._red_lights(joined, 0)[0].centroid()
                expected = shapely.Polygon(shell, [hole]).centroid
                np.testing.assert_allclose(centre, [expected.x, expected.y], atol=1e-12)

    @pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 30, 57, 100, 101, 140])
    def test_visiting_order(self, count):
        rng = np.random.default_rng(count)
        low = rng.normal(0.0, 30.0, (count, 2))
        high = low + rng.uniform(0.2, 5.0, (count, 2))
        tree = shapely.STRtree(shapely.box(*low.T, *high.T), node_capacity=pdm.TREE_CHILDREN)
        expected = tree.query(shapely.box(-1e3, -1e3, 1e3, 1e3), predicate="intersects")
        np.testing.assert_array_equal(pdm._visiting_order(low, high), expected)


def crowded() -> Scene:
    """A bend with something of everything; poses on a grid of 1/64 m so that the numbers here are exact."""
    bend = np.round(line(spacing=1.5, curvature=0.015) * 64.0) / 64.0
    connector = bend[(bend[:, 0] > 34.0) & (bend[:, 0] < 55.0)]
    return make_scene(
        centerline=bend,
        pose=(0.25, 0.375, 0.03125),
        speed=7.5,
        limit=12.0,
        agents=(
            agent(17.5, 3.5, 0.25, 5.0),
            agent(12.0, -2.25, 0.125, kind=Kind.TRAFFIC_CONE, size=(0.5, 0.5)),
            agent(26.0, 2.5, 1.875, 1.25, kind=Kind.PEDESTRIAN, size=(0.75, 0.75)),
            agent(30.0, 9.0, 3.5, 6.0),
            agent(22.0, 7.0, 0.25, -1.5),
            agent(-9.0, 0.0, -0.125, 9.0, kind=Kind.BICYCLE, size=(1.75, 0.75)),
            agent(3.0, 1.5, 0.0, 0.0),
        ),
        lights=(np.round(strip(connector, 1.75) * 64.0) / 64.0,),
    )


class TestOfficial:
    """Values that NAVSIM v2.2 (PDMObservation, PDMGenerator, PDMSimulator, PDMScorer) returns for `crowded`."""

    ENDS = (
        (10.156746389062, 0.784448152072, 0.153130225148),
        (11.808145994304, 1.056339062199, 0.184776757775),
        (15.738230099047, 1.891704969667, 0.237314088152),
        (16.423428150587, 2.056869126502, 0.251024765060),
        (16.470012944529, 2.069391920572, 0.251525676823),
        (13.584303479231, 0.375398491049, 0.202875712350),
        (19.315605867714, 1.816544304144, 0.292708162651),
        (21.299704413821, 2.444147444480, 0.319734454810),
        (21.598071469983, 2.545787581979, 0.326158326386),
        (21.623878073922, 2.554578722685, 0.326713945065),
        (10.100517975262, 1.786916873999, 0.154154585443),
        (11.428404426824, 2.006285453814, 0.180562585351),
        (12.777840363856, 2.257140095827, 0.198537996622),
        (13.406647973632, 2.383992159519, 0.205297912401),
        (13.448481290129, 2.393341981906, 0.205747625779),
    )
    SCORES = (
        *(0.0, 0.0, 0.558228717599, 0.566094803930, 0.566641222396),
        *(0.741756359634, 0.829334986086, 0.854967382647, 0.856919697852, 0.857142857143),
        *(0.0, 0.0, 0.0, 0.0, 0.0),
    )

    def test_proposals(self):
        np.testing.assert_allclose(proposals_of(crowded()).reshape(15, 41, 3)[:, -1], self.ENDS, atol=1e-9)

    def test_scores(self):
        forecast = pdm.forecast(crowded())
        np.testing.assert_allclose(pdm.score_batch(forecast, pdm.proposals(forecast))[0], self.SCORES, atol=1e-9)

    def test_plan(self):
        np.testing.assert_allclose(plan_of(crowded())[-1], self.ENDS[9], atol=1e-9)
