"""The embedded world without its cameras: roads that join, traffic that obeys, a human who drives well, and scenes that score."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import shapely
import torch
from shapely.geometry import LineString, Polygon

import irlvla
from irlvla.errors import InputError
from irlvla.synthetic import (
    CASES,
    FAMILIES,
    SPLITS,
    UNSEEN,
    World,
    make_world,
    make_worlds,
    split,
    synthetic_scenes,
    to_observation,
    to_scene,
    to_scenes,
)
from irlvla.synthetic.angles import angle_of, cosine_sine, cosine_sine_of, wrap
from irlvla.synthetic.cases import SUITABLE
from irlvla.synthetic.collisions import contacts
from irlvla.synthetic.scenarios import SEEDS, ego_actor
from irlvla.synthetic.world import FUTURE, PAST, STEP, STEPS, Paint
from irlvla.types import METRICS, WHEEL_BASE, Command, Kind, Layer, StateIndex

SEED = 7_000  # of the worlds that the tests look at
NEWER = "X86_V3 X86_V4 AVX2 FMA3 AVX512F AVX512CD AVX512_SKX AVX512_ICL AVX512_SPR"  # instructions that a machine may lack
NOW = slice(PAST, PAST + 41)
ALL_CASES = [(family, case) for family in FAMILIES for case in ("", *SUITABLE[family])]


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    """Ordinary traffic and hard cases, as they come."""
    return list(make_worlds(200, SEED))


@pytest.fixture(scope="module")
def scenes(worlds: list[World]) -> irlvla.Scene:
    return to_scenes(worlds)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_angles_agree_with_numpy() -> None:
    rng = np.random.default_rng(0)
    angle = np.concatenate([rng.uniform(-100.0, 100.0, 20_000), np.arange(-8, 9) * (math.pi / 4)])
    cosine, sine = cosine_sine(angle)
    np.testing.assert_allclose(cosine, np.cos(angle), rtol=0, atol=3e-16)
    np.testing.assert_allclose(sine, np.sin(angle), rtol=0, atol=3e-16)
    x, y = rng.normal(size=(2, 20_000))
    np.testing.assert_allclose(angle_of(x, y), np.arctan2(y, x), rtol=0, atol=1e-15)
    assert angle_of([0.0, 1.0, -1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0, -2.0]).tolist() == [0.0, 0.0, math.pi, math.pi / 2, -math.pi / 2]
    assert [cosine_sine_of(a) for a in angle[:200].tolist()] == list(zip(cosine[:200].tolist(), sine[:200].tolist(), strict=True))
    assert np.abs(wrap(angle)).max() <= math.pi + 1e-12
    np.testing.assert_allclose(np.sin(wrap(angle)), np.sin(angle), rtol=0, atol=1e-12)


# -- roads -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def towns(request: pytest.FixtureRequest) -> list[World]:
    """Some worlds of one family."""
    return [make_world(seed, request.param, case) for seed in range(5) for case in ("", SUITABLE[request.param][0])]


def test_lanes_are_well_formed(towns: list[World]) -> None:
    for world in towns:
        for lane in world.roads.lanes:
            step = np.diff(lane.centerline, axis=0)
            length = np.hypot(step[:, 0], step[:, 1])
            assert length.min() > 0.05
            assert length.max() <= 1.0 + 1e-6
            course = np.arctan2(step[:, 1], step[:, 0])
            assert np.abs(wrap(course - lane.centerline[:-1, 2])).max() < 0.12
            ring = Polygon(lane.polygon)
            assert ring.is_valid
            assert ring.exterior.is_ccw
            assert ring.buffer(1e-6).covers(LineString(lane.centerline[:, :2]))
            assert ring.area == pytest.approx(lane.width * length.sum(), rel=0.01)
            assert lane.speed_limit > 0.0


def test_lanes_join(towns: list[World]) -> None:
    for world in towns:
        lanes = world.roads.lanes
        for index, lane in enumerate(lanes):
            for other in lane.successors:
                gap = lane.centerline[-1] - lanes[other].centerline[0]
                assert np.abs(gap[:2]).max() < 1e-6
                assert abs(wrap(gap[2])) < 1e-6
                assert index in lanes[other].predecessors
            assert all(index in lanes[other].successors for other in lane.predecessors)
            if lane.layer == Layer.LANE_CONNECTOR:
                assert len(lane.successors) == len(lane.predecessors) == 1
        for one, two in zip(world.route, world.route[1:], strict=False):
            assert two in lanes[one].successors


def test_neighbours_are_beside_each_other(towns: list[World]) -> None:
    for world in towns:
        lanes = world.roads.lanes
        for index, lane in enumerate(lanes):
            for name, back in (("left", "right"), ("right", "left")):
                beside = getattr(lane, name)
                if beside is not None:
                    other = lanes[beside]
                    assert getattr(other, back) == index
                    assert other.roadblock == lane.roadblock
                    assert Polygon(lane.polygon).buffer(1e-6).intersects(Polygon(other.polygon))
                    x, y, heading = lane.centerline[0]
                    dx, dy = other.centerline[0, :2] - (x, y)
                    left = dy * math.cos(heading) - dx * math.sin(heading)
                    assert left == pytest.approx(lane.width if name == "left" else -lane.width, abs=1e-6)


def test_polygons_have_their_meaning(towns: list[World]) -> None:
    """Roadblocks cover their lanes, intersections their connectors; what should not overlap does not."""
    for world in towns:
        roads = world.roads
        polygons = [Polygon(lane.polygon) for lane in roads.lanes]
        blocks, junctions, parks = ([Polygon(ring) for ring in group] for group in (roads.roadblocks, roads.intersections, roads.carparks))
        assert all(polygon.is_valid for group in (blocks, junctions, parks) for polygon in group)
        area = shapely.union_all(junctions).buffer(1e-6)
        for lane, polygon in zip(roads.lanes, polygons, strict=True):
            assert (area if lane.layer == Layer.LANE_CONNECTOR else blocks[lane.roadblock].buffer(1e-6)).covers(polygon)
        streets = [polygon for lane, polygon in zip(roads.lanes, polygons, strict=True) if lane.layer == Layer.LANE]
        kinds = [streets, junctions, parks]
        flat = [polygon for group in kinds for polygon in group]
        tree = shapely.STRtree(flat)
        first, second = tree.query(flat, predicate="intersects")
        for one, two in zip(first[first < second], second[first < second], strict=True):
            assert flat[one].intersection(flat[two]).buffer(-0.06).is_empty


def test_paint_and_lamps_are_where_they_are_seen(towns: list[World]) -> None:
    for world in towns:
        roads = world.roads
        surface = shapely.union_all([Polygon(ring) for ring in (*roads.roadblocks, *roads.intersections, *roads.carparks)]).buffer(0.05)
        for kind, points in roads.paint:
            assert len(points) >= 2
            shape = Polygon(points) if kind in (Paint.CROSSING, Paint.ARROW) else LineString(points)
            assert shape.is_valid
            assert surface.covers(shape), kind
            assert kind is not Paint.CROSSING or len(points) == 4
        edges = shapely.union_all([LineString(points) for kind, points in roads.paint if kind is Paint.EDGE])
        assert edges.length > 100.0
        for signal in roads.signals:
            assert not surface.contains(shapely.Point(signal.position[:2]))
            assert signal.position[2] > 2.5  # above the cars
            assert not (signal.red & signal.amber).any()
        governed = {lane.signal for lane in roads.lanes if lane.signal is not None}
        assert governed == set(range(len(roads.signals)))
        for lane in roads.lanes:  # a driver who waits has his lamp ahead of him
            if lane.signal is not None:
                signal, (x, y, heading) = roads.signals[lane.signal], lane.centerline[0]
                dx, dy = signal.position[:2] - (x, y)
                assert dx * math.cos(heading) + dy * math.sin(heading) > 15.0
                assert abs(wrap(signal.heading - heading)) < 1e-6


def test_shapes_that_a_family_promises(towns: list[World]) -> None:
    for world in towns:
        roads = world.roads
        connectors = [lane for lane in roads.lanes if lane.layer == Layer.LANE_CONNECTOR]
        junctions = {"merge": 1, "t_junction": 1, "crossroads": 1, "signals": 1, "car_park": 1}.get(world.family, 0)
        assert len(roads.intersections) == junctions or (world.family == "roundabout" and len(roads.intersections) in (3, 4))
        assert bool(connectors) == bool(roads.intersections)
        assert bool(roads.signals) == (world.family == "signals") or world.family == "t_junction"
        assert roads.carparks or world.family not in ("car_park", "narrow_street")
        if world.family == "merge":
            assert any(len([other for other in roads.lanes if lane.successors[:1] == other.successors[:1]]) > 1 for lane in connectors)


# -- traffic -----------------------------------------------------------------------------------------------------------


def test_nobody_touches_anybody(worlds: list[World]) -> None:
    for world in worlds:
        actors = (ego_actor(world.ego), *world.actors)
        touching = [(actors[a].kind, actors[b].kind) for a, b, _ in contacts(actors)]
        assert not [pair for pair in touching if Kind.VEHICLE in pair], world.token


def test_contacts_are_those_of_shapely() -> None:
    actors = make_world(SEED, "car_park", "").actors[:8]
    rng = np.random.default_rng(1)
    states = [np.column_stack([rng.normal(0.0, 3.0, (STEPS, 2)), rng.uniform(-4, 4, STEPS), np.ones((STEPS, 2))]) for _ in actors]
    actors = [dataclasses.replace(actor, state=state, valid=rng.random(STEPS) < 0.8) for actor, state in zip(actors, states, strict=True)]
    found = {tuple(row) for row in contacts(actors).tolist()}
    boxes = [[_box(actor.state[step], *actor.size[:2]) for step in range(STEPS)] for actor in actors]
    expected = {
        (a, b, step)
        for a, one in enumerate(actors) for b, two in enumerate(actors) for step in range(STEPS)
        if a != b and one.valid[step] and two.valid[step] and boxes[a][step].intersects(boxes[b][step])
    }  # fmt: skip
    assert found == expected
    assert len(found) > 100


def _box(state: np.ndarray, length: float, width: float) -> Polygon:
    along, across = np.array([math.cos(state[2]), math.sin(state[2])]), np.array([-math.sin(state[2]), math.cos(state[2])])
    return Polygon([state[:2] + a * length / 2 * along + b * width / 2 * across for a, b in ((1, 1), (-1, 1), (-1, -1), (1, -1))])


def test_red_lights_are_obeyed(worlds: list[World]) -> None:
    """Nobody's front crosses a stop line at red, but for those who are scripted to."""
    stopped, ran = 0, 0
    for world in [*worlds, *make_worlds(30, SEED, ["signals", "t_junction"]), *make_worlds(3, SEED, ["signals"], ["red_light_runner"])]:
        for lane in world.roads.lanes:
            if lane.signal is None:
                continue
            red = world.roads.signals[lane.signal].red
            x, y, heading = lane.centerline[0]
            for actor in (ego_actor(world.ego), *world.actors):
                if actor.kind != Kind.VEHICLE:
                    continue
                dx, dy = actor.state[:, 0] - x, actor.state[:, 1] - y
                front = dx * math.cos(heading) + dy * math.sin(heading) + 0.5 * actor.size[0]
                aside = np.abs(dy * math.cos(heading) - dx * math.sin(heading))
                turned = np.abs(wrap(actor.state[:, 2] - heading))
                mine = (aside < 0.5 * lane.width) & (turned < 0.3) & actor.valid
                crosses = np.flatnonzero((front[:-1] <= 0.0) & (front[1:] > 0.0) & mine[:-1] & red[1:])
                if actor.role == "red-light runner":
                    ran += len(crosses) > 0
                else:
                    assert not len(crosses), f"{world.token} {actor.name}"
                    stopped += bool((mine & red & (front > -6.0) & (front < 0.0)).any())
    assert stopped > 20
    assert ran >= 3


def test_actors_move_as_they_say(worlds: list[World]) -> None:
    for world in worlds[:80]:
        limit = max(lane.speed_limit for lane in world.roads.lanes)
        for actor in world.actors:
            assert actor.state.shape == (STEPS, 5)
            assert actor.valid.any()
            x, y, heading, vx, vy = actor.state[actor.valid].T
            if len(x) < 3:
                continue
            np.testing.assert_allclose(np.diff(x) / STEP, 0.5 * (vx[1:] + vx[:-1]), atol=0.8)
            np.testing.assert_allclose(np.diff(y) / STEP, 0.5 * (vy[1:] + vy[:-1]), atol=0.8)
            speed = np.hypot(vx, vy)
            assert speed.max() < (2.5 if actor.kind == Kind.PEDESTRIAN else max(1.15 * limit, 13.5))
            if actor.kind == Kind.VEHICLE:
                assert np.abs(np.diff(speed)).max() / STEP < 9.0
                fast = speed > 1.0
                course = np.abs(wrap(np.arctan2(vy, vx) - heading))[fast]
                assert (np.minimum(course, math.pi - course) < 0.2).all(), actor.name
            if actor.kind in (Kind.TRAFFIC_CONE, Kind.BARRIER, Kind.CONSTRUCTION_SIGN, Kind.GENERIC):
                assert speed.max() == 0.0


def test_vehicles_keep_to_lanes(worlds: list[World]) -> None:
    """Vehicles that drive are on the road, near the middle of some lane; those that change lanes are not always."""
    for world in worlds[::4]:
        centres = np.concatenate([lane.centerline[:, :2] for lane in world.roads.lanes])
        for actor in world.actors:
            moving = np.hypot(actor.state[:, 3], actor.state[:, 4]) > 0.5
            if actor.kind == Kind.VEHICLE and moving.any() and not actor.role:
                points = actor.state[actor.valid & moving][::5, :2]
                distance = np.sqrt(((points[:, None] - centres) ** 2).sum(-1).min(axis=1))
                assert distance.max(initial=0.0) < 0.8, f"{world.token} {actor.name}"


def test_everyone_is_about(worlds: list[World]) -> None:
    actors = [actor for world in worlds for actor in world.actors]
    assert {actor.kind for actor in actors} == set(Kind)
    assert {actor.role for actor in actors} >= {"cut-in", "hard-braking leader", "stationary leader", "jaywalker", "blocked lane"}
    assert all(len({actor.name for actor in world.actors}) == len(world.actors) for world in worlds)
    assert {world.command for world in worlds} == {Command.LEFT, Command.STRAIGHT, Command.RIGHT}


# -- the human ---------------------------------------------------------------------------------------------------------


def test_the_drive_is_one_of_a_bicycle(worlds: list[World]) -> None:
    for world in worlds[:60]:
        ego = world.ego
        x, y, heading, speed, sideways, acceleration, _, steering, _, turning, _ = ego.T
        assert ego.shape == (STEPS, len(StateIndex))
        assert (sideways == 0.0).all()
        assert speed.min() >= 0.0
        np.testing.assert_allclose(np.diff(speed), STEP * acceleration[1:], atol=1e-9)
        np.testing.assert_allclose(turning, speed * np.tan(steering) / WHEEL_BASE, atol=1e-12)
        middle = 0.5 * (speed[1:] + speed[:-1])
        course = 0.5 * (heading[1:] + heading[:-1])
        np.testing.assert_allclose(np.diff(x), STEP * middle * np.cos(course), atol=1e-7)
        np.testing.assert_allclose(np.diff(y), STEP * middle * np.sin(course), atol=1e-7)
        curvature = np.tan(steering) / WHEEL_BASE
        np.testing.assert_allclose(np.diff(heading), STEP * middle * 0.5 * (curvature[1:] + curvature[:-1]), atol=1e-9)
        assert np.abs(acceleration).max() <= 8.0 + 1e-9
        assert np.abs(curvature).max() <= 0.2 + 1e-12


def test_the_human_drives_well_but_not_perfectly(scenes: irlvla.Scene) -> None:
    result = irlvla.epdms(scenes, scenes.human, human_filter="none")
    assert 0.9 < result.score().mean() < 0.99
    mean = dict(zip(METRICS, result.values.mean(0).tolist(), strict=True))
    assert min(mean["nc"], mean["dac"], mean["tlc"]) > 0.95
    assert mean["ep"] > 0.85
    assert all(mean[name] < 1.0 for name in ("ep", "ttc", "lk", "hc", "ddc"))


def test_the_human_is_someone_each_time(worlds: list[World]) -> None:
    late = [world.ego[PAST, StateIndex.VX] for world in worlds]
    assert np.std(late) > 3.0
    assert len({round(value, 6) for value in late}) > 150


# -- scenes ------------------------------------------------------------------------------------------------------------


def candidates(worlds: list[World]) -> tuple[torch.Tensor, tuple[str, ...]]:
    """Plans around the human's drive, "B K 8 3", and what they are."""
    seconds = np.arange(0.0, 4.01, 0.1)
    shift = {"as the human": 0.0, "left": 1.2, "far left": 3.5, "right": -1.2, "far right": -3.5, "off": -8.0, "wrong side": 6.0}
    pace = {"slow": 0.6, "fast": 1.5, "double speed": 2.0}
    names = (*shift, *pace, "stop", "swerve", "straight on", "stand", "jerk")
    plans = []
    for world in worlds:
        ego = world.ego[PAST:]
        step = np.hypot(*np.diff(ego[:, :2], axis=0).T)
        along = np.concatenate([[0.0], np.cumsum(step)])
        speed, driven = ego[0, StateIndex.VX], along[: len(seconds)]
        soft = np.clip(seconds / 2.0, 0.0, 1.0) ** 2 * (3.0 - 2.0 * np.clip(seconds / 2.0, 0.0, 1.0))
        braked = np.minimum(speed * seconds - 2.0 * seconds**2, speed**2 / 8.0)
        braked = np.where(seconds > speed / 4.0, speed**2 / 8.0, braked)
        made = [_beside(ego, along, driven, left * soft) for left in shift.values()]
        made += [_beside(ego, along, driven * factor, 0.0 * soft) for factor in pace.values()]
        made.append(_beside(ego, along, braked, 0.0 * soft))
        made.append(_beside(ego, along, driven, 1.5 * np.sin(2.0 * seconds)))
        made.append(
            np.column_stack([ego[0, :2] + speed * seconds[:, None] * [math.cos(ego[0, 2]), math.sin(ego[0, 2])], 0 * seconds + ego[0, 2]])
        )
        made.append(np.repeat(ego[:1, :3], len(seconds), axis=0))
        made.append(_beside(ego, along, driven + 2.0 * np.sin(math.pi * seconds), 0.0 * soft))
        plans.append([_in_frame(plan[5::5], ego[0]) for plan in made])
    return torch.tensor(np.array(plans)), names


def _beside(ego: np.ndarray, along: np.ndarray, driven: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Poses along a drive (straight on after its end), some metres to its left."""
    x, y, heading = (np.interp(driven, along + 1e-9 * np.arange(len(along)), ego[:, column]) for column in range(3))
    beyond = np.maximum(driven - along[-1], 0.0)
    x, y = x + beyond * np.cos(heading) - left * np.sin(heading), y + beyond * np.sin(heading) + left * np.cos(heading)
    turn = np.arctan2(np.gradient(left), np.maximum(np.gradient(driven), 0.05))
    return np.column_stack([x, y, heading + turn])


def _in_frame(poses: np.ndarray, origin: np.ndarray) -> np.ndarray:
    offset = (poses[:, 0] - origin[0]) + 1j * (poses[:, 1] - origin[1])
    turned = offset * np.exp(-1j * origin[2])
    return np.column_stack([turned.real, turned.imag, wrap(poses[:, 2] - origin[2])])


def test_every_metric_takes_each_of_its_values(worlds: list[World], scenes: irlvla.Scene) -> None:
    plans, _ = candidates(worlds)
    before = torch.tensor(np.array([_in_frame(world.ego[PAST : PAST + 40 : 5, :3], world.ego[PAST - 5]) for world in worlds]))
    values = irlvla.epdms(scenes, plans, previous=before, human_filter="none").values.flatten(0, 1)
    accepted = {name: {0.0, 1.0} for name in METRICS} | {"nc": {0.0, 0.5, 1.0}, "ddc": {0.0, 0.5, 1.0}}
    for column, name in enumerate(METRICS):
        if name != "ep":
            found = {value: int((values[:, column] == value).sum()) for value in accepted[name]}
            assert min(found.values()) >= 5, (name, found)
            assert sum(found.values()) == len(values)
    progress = values[:, METRICS.index("ep")]
    assert progress.min() < 0.3
    assert progress.max() == 1.0
    assert progress.unique().numel() > 500


def test_plans_fail_for_the_reason_that_they_should(worlds: list[World], scenes: irlvla.Scene) -> None:
    plans, names = candidates(worlds)
    values = irlvla.epdms(scenes, plans, human_filter="none").values

    def mean(plan: str, metric: str) -> float:
        return float(values[:, names.index(plan), METRICS.index(metric)].nanmean())

    assert mean("off", "dac") < 0.35 < 0.95 < mean("as the human", "dac")
    assert mean("wrong side", "ddc") < 0.8 < 0.95 < mean("as the human", "ddc")
    assert mean("far left", "lk") < 0.6 < 0.85 < mean("as the human", "lk")
    assert mean("double speed", "nc") < 0.8 < 0.97 < mean("as the human", "nc")
    assert mean("jerk", "hc") < 0.3 < 0.9 < mean("as the human", "hc")
    assert mean("stand", "ep") < 0.6 < 0.85 < mean("as the human", "ep")
    assert mean("double speed", "tlc") < mean("as the human", "tlc")


def test_a_scene_says_what_the_world_is(worlds: list[World]) -> None:
    for world in worlds[:20]:
        scene = to_scene(world, reference=False)
        assert scene.token == (world.token,)
        assert scene.reference.isnan().all()
        np.testing.assert_array_equal(scene.ego[0].numpy(), world.ego[PAST])
        np.testing.assert_array_equal(scene.history[0].numpy(), world.ego[[PAST - 15, PAST - 10, PAST - 5, PAST], :8])
        np.testing.assert_array_equal(scene.previous_ego[0].numpy(), world.ego[PAST - 5])
        assert (scene.history_time_us - scene.time_us).tolist() == [[-1_500_000, -1_000_000, -500_000, 0]]
        assert int(scene.time_us - scene.previous_time_us) == 500_000
        assert scene.agent_state.shape == (len(world.actors), FUTURE + 1, 5)
        np.testing.assert_array_equal(scene.agent_state[0].numpy(), world.actors[0].state[PAST:])
        end = world.ego[PAST + 40]
        turned = scene.human[0, -1, 0] + 1j * scene.human[0, -1, 1]
        assert abs(turned) == pytest.approx(math.hypot(*(end[:2] - world.ego[PAST, :2])), abs=1e-9)
        routed = [row for row, on in enumerate(scene.polygon_on_route.tolist()) if on]
        assert set(world.route) <= set(routed)
        blocks = {world.roads.lanes[lane].roadblock for lane in world.route}
        assert {world.roads.lanes[row].roadblock for row in routed} == blocks
        for light, row in enumerate(scene.light_polygon.tolist()):
            signal = world.roads.signals[world.roads.lanes[row].signal]
            np.testing.assert_array_equal(scene.light_red[light].numpy(), signal.red[NOW])
        first, last = scene.centerline[0, :2].numpy(), scene.centerline[-1, :2].numpy()
        np.testing.assert_array_equal(first, world.roads.lanes[world.route[0]].centerline[0, :2])
        np.testing.assert_array_equal(last, world.roads.lanes[world.route[-1]].centerline[-1, :2])


def test_an_observation_is_in_the_ego_frame(worlds: list[World]) -> None:
    for world in worlds[:20]:
        seen = to_observation(world)
        assert seen.token == (world.token,)
        assert seen.ego.shape == (1, 4, 8)
        assert seen.ego[0, -1, :3].abs().max() < 1e-9
        assert seen.ego[0, :3, 0].max() <= 0.0
        assert seen.ego[0, -1, 3] == world.ego[PAST, StateIndex.VX]
        assert seen.command.tolist() == [world.command]
        assert seen.images is None


def test_scenes_score_with_everything(scenes: irlvla.Scene) -> None:
    some = scenes[:10]
    result = irlvla.epdms(some, some.human, previous=some.human, details=True, pdms=True)
    assert not result.values.isnan().any()
    assert not result.pdms.values.isnan().any()
    again = irlvla.Scene.cat([to_scene(make_world(SEED + i)) for i in range(10)])
    torch.testing.assert_close(
        irlvla.epdms(again, again.human).values, irlvla.epdms(some, some.human).values, rtol=0, atol=0, equal_nan=True
    )


def test_routes_are_long_enough(worlds: list[World], scenes: irlvla.Scene) -> None:
    """PDM-Closed takes the end of the route for a wall: at its speed limit it must not have to brake for it within 4 s."""
    for index in range(len(worlds)):
        scene = scenes[index]
        line = LineString(scene.centerline[:, :2].numpy())
        left = line.length - line.project(shapely.Point(scene.ego[0, :2].numpy()))
        speed = max(float(scene.speed_limit), float(scene.ego[0, StateIndex.VX]))
        assert left > 4.0 * speed + speed * speed / 6.0 + 5.0, scene.token


# -- seeds -------------------------------------------------------------------------------------------------------------


def checksum(worlds: list[World]) -> str:
    """Of every number in some worlds."""
    found = hashlib.sha256()
    for world in worlds:
        found.update(world.token.encode())
        arrays = [world.ego, *(actor.state for actor in world.actors), *(actor.valid for actor in world.actors)]
        arrays += [*(lane.centerline for lane in world.roads.lanes), *(lane.polygon for lane in world.roads.lanes)]
        arrays += [*world.roads.intersections, *world.roads.carparks, *(points for _, points in world.roads.paint)]
        for array in arrays:
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def one_of_each() -> list[World]:
    return [make_world(3, family) for family in FAMILIES] + [make_world(3, None, case) for case in CASES]


def test_worlds_are_the_same_everywhere() -> None:
    """Recorded on another machine. A change here changes every scene that anybody has trained on: it should be meant."""
    assert checksum(one_of_each()) == "4344d5b3cf07b3f5"


def test_worlds_do_not_depend_on_the_process() -> None:
    """Nor on its instruction set, with which numpy's own sine differs."""
    script = "import test_synthetic as t; print(t.checksum(t.one_of_each()[:4]))"
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "5",
        "NPY_DISABLE_CPU_FEATURES": NEWER,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)]),
    }
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == checksum(one_of_each()[:4])


def test_a_token_names_its_world(worlds: list[World]) -> None:
    for world in worlds[:10]:
        family, case, seed = world.token.rsplit("-", 2)
        assert (family, case.replace("plain", ""), int(seed)) == (world.family, world.case, world.seed)
        assert checksum([make_world(world.seed, world.family, world.case)]) == checksum([world])
    assert len({world.token for world in worlds}) == len(worlds)


@pytest.mark.parametrize(("family", "case"), ALL_CASES)
def test_each_case_can_happen(family: str, case: str) -> None:
    world = make_world(11, family, case)
    assert (world.family, world.case) == (family, case)
    roles = {actor.role for actor in world.actors} - {""}
    assert bool(roles) == bool(case)


def test_families_and_cases_are_drawn_from_those_asked_for() -> None:
    some = list(make_worlds(30, 0, ["curve", "car_park"], ["jaywalker", ""]))
    assert {world.family for world in some} == {"curve", "car_park"}
    assert {world.case for world in some} == {"jaywalker", ""}
    assert {world.family for world in make_worlds(5, 0, None, ["red_light_runner"])} == {"signals"}
    assert len(synthetic_scenes(3, families=["straight"], cases=[""])) == 3


def test_splits_share_no_seed_and_hold_out_families() -> None:
    parts = {name: split(name) for name in SPLITS}
    assert len({part.first for part in parts.values()}) == len(SPLITS)
    assert min(abs(one.first - two.first) for one in parts.values() for two in parts.values() if one is not two) >= SEEDS
    assert parts["unseen"].families == UNSEEN
    assert set(parts["train"].families) == set(FAMILIES) - set(UNSEEN)
    assert parts["train"].families == parts["val"].families == parts["test"].families
    assert next(parts["val"].worlds(1, start=5)).seed == parts["val"].first + 5
    assert split("unseen", ["curve"]).families == ("curve",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "roundabuot"), r"no family 'roundabuot'. Did you mean 'roundabout'\? Accepted: 'straight'"),
        ((0, None, "cutin"), r"no case 'cutin'. Did you mean 'cut_in'\?"),
        ((0, "straight", "red_light_runner"), "'red_light_runner' cannot happen in straight. What can: straight: cut_in"),
        ((-1,), "a seed is an integer from 0 on, not -1"),
        ((1.5,), "not 1.5"),
    ],
)
def test_wrong_wishes(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_world(*arguments)


def test_wrong_splits() -> None:
    with pytest.raises(InputError, match=r"no split 'trian'. Did you mean 'train'\?"):
        split("trian")
    with pytest.raises(InputError, match="no family 'curv'"):
        split("unseen", ["curv"])
    with pytest.raises(InputError, match="no road family left"):
        split("train", FAMILIES)
