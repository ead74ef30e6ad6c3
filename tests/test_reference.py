"""The plain torch reference against the official values and against shapely, scipy and numpy."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.signal
import shapely
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from golden_scenes import OFFICIAL, GoldenScene, load
from irlvla.errors import InputError
from irlvla.ops import reference
from irlvla.types import METRICS, Epdms, Scene

GOLDEN = load(Path(__file__).parent / "golden")
DISCRETE = [i for i, name in enumerate(METRICS) if name not in ("ep", "ec")]
V1 = ("no_at_fault_collisions", "drivable_area_compliance", "ego_progress", "time_to_collision_within_bound", "comfort")
V1 += ("driving_direction_compliance",)

often = settings(max_examples=100)


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- official values ------------------------------------------------------------------------------------------------


def undecidable(golden: GoldenScene) -> np.ndarray:
    """N 9: sub-metrics that noise turns."""
    return golden.fragile


def assert_equal_where(decidable: np.ndarray, found: object, expected: np.ndarray, what: str) -> None:
    wrong = (np.asarray(found) != expected).reshape(len(expected), -1).any(1) & decidable
    assert not wrong.any(), f"{what}: candidates {np.flatnonzero(wrong).tolist()}"


def assert_close_where(decidable: np.ndarray, found: object, expected: np.ndarray, what: str) -> None:
    error = np.abs(np.asarray(found) - expected).reshape(len(expected), -1).max(1, initial=0.0)
    assert (error[decidable] <= 1e-9).all(), f"{what}: off by {error[decidable].max()}"


def states_error(found: torch.Tensor, expected: np.ndarray) -> float:
    difference = found - torch.from_numpy(expected)
    difference[..., 2] = reference.wrap(difference[..., 2])
    return float(difference.abs().max())


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_official_values(golden: GoldenScene) -> None:
    scene, expected = golden.scene, golden.expected
    result = reference.score_scene(scene, torch.from_numpy(golden.candidates), remove_touching=golden.remove_touching, pdms=True)
    raw, values, details = result.raw.numpy(), result.values.numpy(), result.details
    fragile = undecidable(golden)
    filtered = fragile | golden.human_fragile
    clear = ~(filtered.any(1) | expected["pdm_fragile"].any())

    assert states_error(details.states, expected["sim_states"]) < 1e-9
    for i in DISCRETE:
        assert_equal_where(~fragile[:, i], raw[:, i], expected["raw_" + OFFICIAL[i]], "raw " + METRICS[i])
        assert_equal_where(~filtered[:, i], values[:, i], expected[OFFICIAL[i]], METRICS[i])
    steady = {name: ~fragile[:, i] for i, name in enumerate(METRICS)}
    everywhere = ~fragile.any(1)
    assert_close_where(clear, result.values[:, METRICS.index("ep")], expected["ego_progress"], "ep")
    assert_close_where(clear, result.score(), expected["epdms_without_ec"], "score")
    assert_close_where(clear, Epdms(result.raw).score(), expected["pdm_score_no_ec"], "unfiltered score")
    assert_close_where(steady["ep"], details.progress, expected["progress_raw"], "progress")
    assert_close_where(steady["ddc"], details.oncoming_metres, expected["ddc_max_oncoming_m"], "oncoming metres")
    assert_equal_where(steady["nc"], details.collision_step, expected["collision_time_idx"], "collision step")
    assert_equal_where(steady["ttc"], details.ttc_step, expected["ttc_time_idx"], "ttc step")
    assert_equal_where(steady["lk"], details.off_centre_steps, expected["lk_max_consecutive"], "steps off the centre")
    assert_equal_where(steady["hc"], details.comfort, expected["comfort_bits"], "comfort")
    assert_equal_where(everywhere, details.in_intersection, expected["center_in_intersection"], "in intersection")
    areas = torch.stack([details.multiple_lanes, details.off_road, details.off_route], -1)
    assert_equal_where(everywhere, areas, expected["ego_areas"], "areas")
    assert torch.equal(details.red_light.any(-1), result.raw[:, METRICS.index("tlc")] == 0.0)
    for i, name in enumerate(V1):
        assert_close_where(clear, result.pdms.values[:, i], expected["v1_" + name], "v1 " + name)
    assert_close_where(clear, result.pdms.score(), expected["v1_score"], "v1 score")

    assert_extended_comfort(golden, result, clear)
    assert_reference_and_human(golden)


def assert_extended_comfort(golden: GoldenScene, result: Epdms, clear: np.ndarray) -> None:
    scene, plans = golden.scene, torch.from_numpy(golden.previous_candidates)
    count = len(golden.candidates)
    previous = reference.simulate(plans, scene.previous_ego.expand(len(plans), -1), scene.previous_time_us.expand(len(plans)), 0.5)
    for j, states in enumerate(previous):
        ok, rms = reference.extended_comfort(result.details.states, states.expand(count, -1, -1), reference.frame_shift(scene))
        steady = ~golden.expected["ec_fragile"]
        assert_equal_where(steady, ok, golden.expected["extended_comfort"][:, j], "ec")
        assert np.abs(rms.numpy() - golden.expected["ec_rms"][:, j]).max() < 2e-8  # signals are rounded to 1e-8
        values = torch.cat([result.values[:, :-1], ok.double()[:, None]], -1)
        assert_close_where(clear & steady, Epdms(values).score(), golden.expected["epdms"][:, j], "score with ec")


def assert_reference_and_human(golden: GoldenScene) -> None:
    scene, expected = golden.scene, golden.expected
    poses = reference.interpolate_reference(scene.reference, scene.ego, scene.time_us)
    assert np.abs(poses[0].numpy() - expected["pdm_ref_poses"]).max() < 1e-9
    states = reference.reference_states(scene)
    found, _ = reference.measure(scene, states, remove_touching=golden.remove_touching)
    human = reference.human_values(scene, remove_touching=golden.remove_touching)
    assert (human is None) == (not golden.human_filter)
    for i in DISCRETE:
        assert expected["pdm_fragile"][i] or found[0, i] == expected["pdm_" + OFFICIAL[i]], OFFICIAL[i]
        if human is not None:
            assert golden.human_fragile[i] or human[0, i] == expected["human_" + OFFICIAL[i]], OFFICIAL[i]
    samples = reference.history(scene.history_time_us[0], scene.history[0])
    assert samples.shape == expected["history_states"].shape
    assert np.abs(samples.numpy() - expected["history_states"]).max() < 1e-9


# --- options, errors and empty scenes -------------------------------------------------------------------------------


def golden_scene(part: str) -> GoldenScene:
    return next(golden for golden in GOLDEN if part in golden.name)


def without(scene: Scene, group: str) -> Scene:
    """The scene without its agents, polygons (and lights) or lights."""
    empty = {"agent": ["agent"], "polygon": ["polygon", "ring", "point", "light"], "light": ["light"]}[group]
    changes: dict[str, object] = {}
    for f in dataclasses.fields(scene):
        value = getattr(scene, f.name)
        if f.metadata.get("rows") in empty:
            changes[f.name] = value[:0]
        elif f.metadata.get("offsets") in empty:
            changes[f.name] = torch.zeros(2 if f.metadata["parent"] == "scene" else 1, dtype=torch.int64)
    return dataclasses.replace(scene, **changes)


def score(golden: GoldenScene, scene: Scene | None = None, **options: object) -> Epdms:
    return reference.score_scene(scene or golden.scene, torch.from_numpy(golden.candidates), **options)


def test_human_filter_modes() -> None:
    golden = golden_scene("human_fails_all")
    fixed, legacy, none = (score(golden, human_filter=mode) for mode in ("fixed", "legacy", "none"))
    assert torch.equal(fixed.values.nan_to_num(), legacy.values.nan_to_num())
    assert torch.equal(legacy.score(), none.score())
    assert (fixed.score() >= none.score()).all()
    assert (fixed.score() > none.score()).any()
    assert none.raw is None


def test_given_human_values_decide() -> None:
    golden = golden_scene("straight")
    human = torch.ones(1, 9, dtype=torch.float64)
    human[0, METRICS.index("lk")], human[0, METRICS.index("ddc")] = 0.0, 0.5
    result = score(golden, dataclasses.replace(golden.scene, human_values=human))
    assert (result.lk == 1.0).all()
    assert torch.equal(result.ddc, result.raw[:, METRICS.index("ddc")])  # only exactly 0 forgives


def test_previous_states_give_ec() -> None:
    golden = golden_scene("urban")
    scene, count = golden.scene, len(golden.candidates)
    plan = torch.from_numpy(golden.previous_candidates[:1]).expand(count, -1, -1)
    previous = reference.simulate(plan, scene.previous_ego.expand(count, -1), scene.previous_time_us.expand(count), 0.5)
    expected = golden.expected["extended_comfort"][:, 0]
    for mode in ("fixed", "none"):
        assert np.array_equal(score(golden, previous_states=previous, human_filter=mode).ec.numpy(), expected)


def test_candidates_do_not_depend_on_each_other() -> None:
    golden = golden_scene("fourway")
    together = score(golden)
    alone = [reference.score_scene(golden.scene, torch.from_numpy(golden.candidates[i : i + 1])) for i in range(3)]
    torch.testing.assert_close(torch.cat([result.values for result in alone]), together.values[:3], rtol=0, atol=1e-9, equal_nan=True)


def test_denser_plan_of_the_same_motion() -> None:
    golden = golden_scene("straight")
    scene = golden.scene
    ego = torch.zeros_like(scene.ego)
    ego[0, 3] = 8.0
    sparse = torch.stack([torch.arange(1, 9) * 4.0, torch.zeros(8), torch.zeros(8)], -1)[None].double()
    dense = torch.stack([torch.arange(1, 41) * 0.8, torch.zeros(40), torch.zeros(40)], -1)[None].double()
    zero = torch.zeros(1, dtype=torch.int64)
    a, b = reference.simulate(sparse, ego, zero, 0.5), reference.simulate(dense, ego, zero, 0.1)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # truncated time stamps are 1 us apart
    torch.testing.assert_close(a[0, :, 0], torch.arange(41, dtype=torch.float64) * 0.8, rtol=0, atol=1e-2)


@pytest.mark.parametrize("group", ["agent", "polygon", "light"])
def test_empty_groups(group: str) -> None:
    golden = golden_scene("redlight")
    result = score(golden, without(golden.scene, group), human_filter="none", pdms=True)
    full = score(golden, human_filter="none")
    if group == "agent":
        assert ((result.nc == 1.0) & (result.ttc == 1.0)).all()
    elif group == "polygon":
        assert ((result.dac == 0.0) & result.details.off_route.all(-1)).all()
    else:
        assert (result.tlc == 1.0).all()
        assert torch.equal(result.nc, full.nc)


def test_zero_candidates() -> None:
    golden = golden_scene("redlight")
    result = reference.score_scene(golden.scene, torch.zeros(0, 8, 3), pdms=True)
    assert result.values.shape == (0, 9)
    assert result.pdms.values.shape == (0, 6)
    assert result.details.states.shape == (0, 41, 11)


def test_errors() -> None:
    golden = golden_scene("straight")
    scene, plans = golden.scene, torch.from_numpy(golden.candidates)
    with pytest.raises(InputError, match="one scene at a time"):
        reference.score_scene(Scene.cat([scene, scene]), plans)
    with pytest.raises(InputError, match="PDM-Closed"):
        reference.score_scene(dataclasses.replace(scene, reference=scene.reference * math.nan), plans)
    with pytest.raises(InputError, match=r"end at 4\.0 s"):
        reference.score_scene(scene, plans[:, :7])
    short = dataclasses.replace(scene, agent_valid=scene.agent_valid[:, :41], agent_state=scene.agent_state[:, :41])
    assert torch.equal(reference.score_scene(short, plans).nc, reference.score_scene(scene, plans).nc)
    with pytest.raises(InputError, match=r"4\.9 s"):
        reference.score_scene(short, plans, pdms=True)
    with pytest.raises(InputError, match="polyline"):
        reference.project(torch.zeros(1, 2), torch.zeros(0, 2))


# --- tracker and filters --------------------------------------------------------------------------------------------


def test_jerk_matrix_is_not_a_difference() -> None:
    matrix = reference.jerk_matrix(39)
    assert torch.equal(matrix[:-1], -torch.eye(37, 39, dtype=torch.float64))
    assert matrix[-1].nonzero().flatten().tolist() == [37, 38]
    assert matrix[-1, 37:].tolist() == [-1.0, 1.0]


def test_profiles_of_a_circle() -> None:
    angle = torch.arange(41, dtype=torch.float64) * 0.05  # 5 m/s on a radius of 10 m
    poses = torch.stack([10.0 * angle.sin(), 10.0 - 10.0 * angle.cos(), angle], -1)[None]
    velocity = reference.velocity_profile(poses)
    curvature = reference.curvature_profile(poses, velocity)
    torch.testing.assert_close(velocity, torch.full((1, 40), 5.0, dtype=torch.float64), rtol=0, atol=0.05)
    torch.testing.assert_close(curvature, torch.full((1, 40), 0.1, dtype=torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("filters", [(8, 2, 0), (15, 2, 1), (5, 2, 1), (5, 3, 2), (5, 2, 2), (41, 2, 0), (41, 2, 1)])
@pytest.mark.parametrize("samples", [41, 55, 56])
def test_savgol_is_scipys(filters: tuple[int, int, int], samples: int) -> None:
    window, order, derivative = filters
    signal = np.random.default_rng(samples).normal(size=(3, samples))
    found = torch.from_numpy(signal) @ reference.savgol_matrix(samples, window, order, derivative, 0.1).T
    expected = scipy.signal.savgol_filter(signal, window, order, deriv=derivative, delta=0.1)
    assert np.abs(found.numpy() - expected).max() < 1e-10 * max(1.0, np.abs(expected).max())


@often
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12))
def test_unwrap_is_numpys(quarters: list[int]) -> None:
    heading = np.array(quarters) * (math.pi / 4.0)
    assert np.array_equal(reference.unwrap(torch.from_numpy(heading)).numpy(), np.unwrap(heading))


# --- exact predicates against GEOS ----------------------------------------------------------------------------------

halves = st.integers(-12, 12).map(lambda n: n / 2.0)
far = st.sampled_from([0.0, 4_000_000.0])  # offsets as of map coordinates
headings = st.one_of(st.integers(-4, 4).map(lambda n: n * math.pi / 2.0), st.integers(-6, 6).map(lambda n: n / 8.0))
boxes = st.tuples(halves, halves, headings, st.sampled_from([1.0, 2.0, 4.0]), st.sampled_from([1.0, 2.0]))


@often
@given(boxes, boxes, far)
def test_boxes_overlap_is_shapelys(a: tuple[float, ...], b: tuple[float, ...], offset: float) -> None:
    a, b = (tensor(box) + tensor([offset, offset, 0.0, 0.0, 0.0]) for box in (a, b))
    polygons = [shapely.Polygon(reference.box_corners(box).numpy()) for box in (a, b)]
    assert bool(reference.boxes_overlap(a, b)) == shapely.intersects(*polygons)
    assert bool(reference.boxes_overlap(b, a)) == shapely.intersects(*polygons)


@often
@given(st.lists(boxes, min_size=2, max_size=2), st.floats(-math.pi, math.pi))
def test_corners_that_touch_exactly(pair: list[tuple[float, ...]], heading: float) -> None:
    """A box moved so that its rear right corner is, to the bit, the front left corner of another."""
    a = reference.box_corners(tensor([*pair[0][:2], heading, *pair[0][3:]]))
    b = reference.box_corners(tensor([*pair[1][:2], heading, *pair[1][3:]]))
    b = b - b[2] + a[0]
    b[2] = a[0]
    found = bool(reference.quads_touch(a, b))
    assert found == shapely.intersects(shapely.Polygon(a.numpy()), shapely.Polygon(b.numpy()))


@often
@given(boxes, far)
def test_centroids_are_shapelys(box: tuple[float, ...], offset: float) -> None:
    corners = reference.box_corners(tensor(box) + tensor([offset, offset, 0.0, 0.0, 0.0]))
    centroid = shapely.Polygon(corners.numpy()).centroid
    assert reference.box_centroids(corners).tolist() == [centroid.x, centroid.y]


def star(radii: list[int]) -> list[tuple[float, float]]:
    """A ring around the origin with corners on a grid of 0.5."""
    angles = [2.0 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(round(2 * r * math.cos(a)) / 2, round(2 * r * math.sin(a)) / 2) for r, a in zip(radii, angles, strict=True)]


rings = st.lists(st.integers(2, 6), min_size=4, max_size=9).map(star)
holes = st.one_of(st.none(), st.lists(st.integers(0, 2), min_size=4, max_size=4).map(star))


def polygon(ring: list[tuple[float, float]], hole: list[tuple[float, float]] | None) -> tuple[shapely.Polygon, list[torch.Tensor]]:
    """A polygon for shapely, and the arguments of the ops for it and for a small square beside it."""
    shape = shapely.Polygon(ring, [hole] if hole else [])
    parts = [ring, *([hole] if hole else []), [(20.0, 0.0), (21.0, 0.0), (21.0, 1.0), (20.0, 1.0)]]
    point_offsets = torch.tensor([0, *np.cumsum([len(part) for part in parts]).tolist()])
    ring_offsets = torch.tensor([0, len(parts) - 1, len(parts)])
    return shape, [tensor([point for part in parts for point in part]), point_offsets, ring_offsets]


@often
@given(rings, holes, st.lists(st.tuples(halves, halves), min_size=1, max_size=20))
def test_points_in_polygons_is_shapelys(ring: list, hole: list | None, points: list) -> None:
    shape, arguments = polygon(ring, hole)
    assume(shape.is_valid and shape.area > 0)
    points = [*points, *ring, *(hole or [])]
    found = reference.points_in_polygons(tensor(points), *arguments)
    assert found[:, 0].tolist() == shapely.contains_xy(shape, np.array(points)).tolist()
    assert not found[:, 1].any()


@often
@given(rings, holes, st.lists(boxes, min_size=1, max_size=10))
def test_boxes_touch_polygons_is_shapelys(ring: list, hole: list | None, candidates: list) -> None:
    shape, arguments = polygon(ring, hole)
    assume(shape.is_valid and shape.area > 0)
    corners = reference.box_corners(tensor([(x, y, h, length / 4, width / 4) for x, y, h, length, width in candidates]))
    found = reference.boxes_touch_polygons(corners, *arguments)[:, 0].tolist()
    assert found == shapely.intersects(shape, shapely.polygons(corners.numpy())).tolist()


def test_a_box_in_a_hole_or_around_a_polygon() -> None:
    ring, hole = [(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)], [(-2.0, -2.0), (2.0, -2.0), (2.0, 2.0), (-2.0, 2.0)]
    _, arguments = polygon(ring, hole)
    sizes = tensor([(0, 0, 0, 2, 2), (0, 0, 0, 4, 2), (0, 0, 0, 20, 20), (3, 0, 0, 1, 1), (9, 0, 0, 1, 1)])
    found = reference.boxes_touch_polygons(reference.box_corners(sizes), *arguments)
    assert found[:, 0].tolist() == [False, True, True, True, False]


lines = st.lists(st.tuples(halves, halves), min_size=2, max_size=12)  # repeated points and crossings included


@often
@given(lines, st.lists(st.tuples(halves, halves), min_size=1, max_size=20), far)
def test_project_is_shapelys(line: list, points: list, offset: float) -> None:
    polyline, queries = np.array(line) + offset, np.array(points) + offset
    along, distance = reference.project(torch.from_numpy(queries), torch.from_numpy(polyline))
    shape = shapely.LineString(polyline)
    assert distance.tolist() == shapely.distance(shape, shapely.points(queries)).tolist()
    if (polyline != polyline[0]).any():  # GEOS has no answer on a line of no length
        assert along.tolist() == shapely.line_locate_point(shape, shapely.points(queries)).tolist()
    else:
        assert not along.any()


@often
@given(st.lists(boxes, min_size=1, max_size=4), st.sampled_from([0.0, 0.004, 0.006, 1.0, 5.0, -5.0]), headings, st.integers(5, 15))
def test_time_to_collision_is_shapelys(agents: list, speed: float, heading: float, steps: int) -> None:
    states = torch.zeros(1, steps, 11, dtype=torch.float64)
    states[..., 2], states[..., 3], states[..., 0] = heading, speed, torch.arange(steps) * 0.25
    moving = tensor(agents)[:, None].repeat(1, steps, 1)
    moving[..., 1] += torch.arange(steps) * 0.25
    valid = torch.ones(len(agents), steps, dtype=torch.bool)
    valid[0, ::3] = False
    found = reference.time_to_collision(states, moving, valid)[0]
    corners = reference.box_corners(moving)
    for t in range(steps):
        ahead = {f: reference.moved_ahead(states, f)[0, t].numpy() for f in (0, 3, 6, 9) if t + f < steps}
        hits = [
            f * 0.1
            for f, ego in ahead.items()
            for a in range(len(agents))
            if valid[a, t + f] and shapely.Polygon(ego).intersects(shapely.Polygon(corners[a, t + f].numpy()))
        ]
        assert found[t] == (min(hits, default=math.inf) if abs(speed) >= 0.005 else math.inf)


def test_straight_ahead_is_ahead() -> None:
    """Also where rounding lifts the cosine above 1; only an agent on the axle itself has no angle."""
    heading = torch.linspace(-3.0, 3.0, 4001, dtype=torch.float64)
    pose = torch.stack([torch.zeros_like(heading), torch.zeros_like(heading), heading], -1)
    assert (reference.relative_angle(pose, 7.3 * torch.stack([heading.cos(), heading.sin()], -1)) < 1e-7).all()
    assert reference.relative_angle(tensor([1.0, 2.0, 0.0]), tensor([1.0, 2.0])).isnan()
