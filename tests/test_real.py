"""Recorded data and official values of others: each test skips where the data is not there (see conftest.shared_real)."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from irlvla import golden, ops
from irlvla.ops import reference
from irlvla.types import Kind, Layer

METRICS_FOLDER = "nuplan_devkit_testdata/nuplan/planning/metrics/evaluation_metrics/common/test/json"


def doubles(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the tracker -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded_drive(shared_real):
    """A real plan of 41 poses, given as displacements and headings (the system that a pinv is known to get wrong)."""
    with np.load(shared_real / "lqr_case/exact_input/canonical_input.npz", allow_pickle=False) as file:
        steps, headings = file["xy_disp"][0], file["heading_prof"][0]
    xy = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, 0)])
    return torch.from_numpy(np.concatenate([xy, np.append(headings, headings[-1])[:, None]], 1))[None]


def test_velocity_fit_against_200_digits(shared_real, recorded_drive):
    """The 40 x 40 system of the LQR velocity profile, solved by mpmath; the devkit's pinv once gave v0 = -491 m/s here."""
    solution = json.loads((shared_real / "lqr_case/exact_input/high_precision/high_precision_reference.json").read_text())
    v0, *accelerations = map(float, solution["vector_200dps_decimal"])
    velocities = reference.velocity_profile(recorded_drive)[0]
    assert velocities[0].item() == pytest.approx(12.533835468246, abs=1e-11)
    assert (velocities.diff() / 0.1).abs().max().item() == pytest.approx(1.043894481, abs=1e-9)
    torch.testing.assert_close(velocities, v0 + torch.cat([doubles([0.0]), doubles(accelerations).cumsum(0) * 0.1]), rtol=0, atol=1e-12)


def test_tracking_a_recorded_drive(recorded_drive, device):
    ego = torch.zeros(1, 11, dtype=torch.float64)
    ego[0, :3], ego[0, 3] = recorded_drive[0, 0], 12.5338
    states = ops.track(recorded_drive.to(device), ego.to(device)).cpu()
    torch.testing.assert_close(states, reference.track(recorded_drive, ego), rtol=0, atol=1e-10)
    assert (states[0, :, :2] - recorded_drive[0, :, :2]).norm(dim=-1).max() < 0.5


@pytest.mark.parametrize(("name", "dt"), [("trajectory_vocabularies/gtrs_8192", 0.1), ("diffvla/trajectory_anchors_8192", 0.5)])
def test_vocabularies_of_human_drives(shared_real, device, name, dt):
    """16,384 cluster centres of human drives: the car follows them, smoothly, from the speed they start with."""
    plans = torch.from_numpy(np.load(shared_real / f"{name}.npy", allow_pickle=False)).to(device)
    ego = torch.zeros(len(plans), 11, dtype=torch.float64, device=device)
    ego[:, 3] = plans[:, 0, :2].norm(dim=1) / dt
    time_us = torch.full((len(plans),), 1_626_469_646_998_286, device=device)
    states = ops.simulate(plans, ego, time_us, dt)
    assert states.isfinite().all()
    every = round(dt / 0.1)
    error = (states[:, every::every, :2] - plans[..., :2]).norm(dim=-1).amax(1)
    assert error.median() < 0.5
    assert error.quantile(0.99) < 2.5
    assert error.max() < 6
    assert (ops.comfort(states).double().mean(0) > 0.99).all()
    some = torch.arange(0, len(plans), 400, device=device)
    expected = reference.simulate(plans[some].double().cpu(), ego[some].cpu(), time_us[some].cpu(), dt)
    torch.testing.assert_close(states[some].cpu(), expected, rtol=0, atol=1e-9)
    assert torch.equal(ops.simulate(plans[some], ego[some], time_us[some], dt), states[some])


# -- one real navhard scene --------------------------------------------------------------------------------------------


@pytest.fixture
def gallery(shared_real):
    """Drivable polygon, footprints and official sub-scores of three models; in pixels of 1/37 m, rounded to 0.1."""
    return json.loads((shared_real / "navsim_gallery_scene/scene_0005b7348b80106e2.json").read_text())


def box_of(corners):
    """Centre, heading, length, width of four corners FL, RL, RR, FR (rounded, so not quite a rectangle)."""
    fl, rl, rr, fr = np.array(corners)
    along, across = (fl - rl + fr - rr) / 2, (fl - fr + rl - rr) / 2
    return [*np.mean(corners, 0), math.atan2(along[1], along[0]), math.hypot(*along), math.hypot(*across)]


def overlap(a, b, device):
    return ops.boxes_overlap(doubles(box_of(a)).to(device), doubles(box_of(b)).to(device)).item()


def test_gallery_collisions(gallery, device):
    for method in gallery["methods"].values():
        assert method["scores"]["nc"] == 0.5  # a static object
        assert overlap(method["collision"]["ego"], method["collision"]["agent"], device)
        if ttc := method.get("ttc"):
            assert not overlap(ttc["ego"], ttc["agent"], device)
            assert overlap(ttc["ego_projected"], ttc["agent"], device)


def test_gallery_drivable_area(gallery, device):
    shell = doubles(gallery["drivable_area_shell"][:-1])
    rings = torch.tensor([0, len(shell)])

    def corners_inside(footprint):
        return ops.points_in_polygons(doubles(footprint).to(device), shell.to(device), rings.to(device))[:, 0].cpu()

    compliant = [m["collision"]["ego"] for m in gallery["methods"].values() if m["scores"]["dac"] == 1]
    assert len(compliant) == 2
    assert all(corners_inside(footprint).all() for footprint in compliant)
    violation = gallery["methods"]["cmd_tokens_film_stockdino"]["dac"]
    for footprint, depth in zip(violation["ego"], violation["off_road_depth_m"], strict=True):
        outside = ~corners_inside(footprint)
        assert outside.sum() == 1
        _, distance = ops.project(doubles(footprint)[outside].to(device), torch.cat([shell, shell[:1]]).to(device))
        assert distance.item() / 37.0 == pytest.approx(depth, abs=0.015)  # the polygon was simplified by 0.05 m


# -- values that the nuPlan devkit's own tests expect ------------------------------------------------------------------


@pytest.fixture
def devkit(shared_real):
    """A metric scene of the devkit by its path: devkit("ego_jerk/ego_jerk")."""
    return lambda name: json.loads((shared_real / METRICS_FOLDER / f"{name}.json").read_text())


def signal(scene, *path):
    frames = [scene["ego"], *scene["ego_future_states"]]
    return doubles([frame[path[0]][path[1]] for frame in frames])


def test_devkit_comfort_signals(devkit):
    """Smoothing and derivatives of nuPlan's comfort metrics, at 1 s, to the two decimals that are given."""

    def assert_expected(name, values):
        np.testing.assert_array_equal(values.numpy().round(2), devkit(f"{name}/{name}")["expected"]["time_series"]["values"])

    smooth = reference.savgol_matrix(12, 8, 2) @ signal(devkit("ego_lon_acceleration/ego_lon_acceleration"), "acceleration", 0)
    for name in ("ego_lon_acceleration", "ego_acceleration"):  # no lateral part: the magnitude is the same
        assert_expected(name, smooth)
    for name in ("ego_lon_jerk", "ego_jerk"):
        assert_expected(name, reference.savgol_matrix(12, 12, 2, 1) @ smooth)
    lateral = signal(devkit("ego_lat_acceleration/ego_lat_acceleration"), "acceleration", 1)
    assert_expected("ego_lat_acceleration", reference.savgol_matrix(12, 8, 2) @ lateral)
    heading = reference.phase_unwrap(signal(devkit("ego_yaw_rate/ego_yaw_rate"), "pose", 2)[None])[0]
    assert_expected("ego_yaw_rate", reference.savgol_matrix(5, 5, 2, 1) @ heading)
    assert_expected("ego_yaw_acceleration", reference.savgol_matrix(5, 5, 3, 2) @ heading)


KINDS = {"vehicles": Kind.VEHICLE, "bicycles": Kind.BICYCLE, "pedestrians": Kind.PEDESTRIAN, "genericobjects": Kind.GENERIC}


def devkit_scene(recorded, moving=False):
    """A devkit scene without a map, and the ego as states: frame i at step i, agents gone afterwards (or moving straight on)."""
    frames = [(recorded["ego"], recorded["world"])]
    frames += zip(recorded.get("ego_future_states", []), recorded.get("world_future_states", []), strict=True)
    states = torch.zeros(1, 41, 11, dtype=torch.float64)
    for t in range(41):
        ego = frames[min(t, len(frames) - 1)][0]
        states[0, t, :3], states[0, t, 3:5], states[0, t, 5:7] = (
            doubles(ego["pose"]),
            doubles(ego["velocity"]),
            doubles(ego["acceleration"]),
        )
    now = [(kind, agent) for name, kind in KINDS.items() for agent in frames[0][1].get(name, [])]
    agents = {agent["id"]: row for row, (_, agent) in enumerate(now)}
    valid, state = torch.zeros(len(now), 51, dtype=torch.bool), torch.zeros(len(now), 51, 5, dtype=torch.float64)
    for t in range(51 if moving else len(frames)):
        world = frames[0 if moving else t][1]
        for agent in (agent for name in KINDS for agent in world.get(name, [])):
            x, y, heading = agent["box"]["pose"]
            velocity = doubles([math.cos(heading), math.sin(heading)]) * agent["speed"]
            valid[agents[agent["id"]], t] = True
            state[agents[agent["id"]], t] = torch.cat([doubles([x, y]) + velocity * (0.1 * t * moving), doubles([heading]), velocity])
    nothing = torch.zeros(0, dtype=torch.int64)
    scene = dataclasses.replace(
        golden.handmade_scene(),
        ego=states[:, 0],
        centerline=doubles([[*states[0, 0, :2], 0.0], [*(states[0, 0, :2] + 50.0), 0.0]]),
        centerline_offsets=torch.tensor([0, 2]),
        agent_offsets=torch.tensor([0, len(now)]),
        agent_token=tuple(str(agent["id"]) for _, agent in now),
        agent_kind=torch.tensor([kind for kind, _ in now]),
        agent_size=doubles([agent["box"]["size"][::-1] for _, agent in now]).reshape(-1, 2),
        agent_valid=valid,
        agent_state=state,
        polygon_offsets=torch.tensor([0, 0]),
        polygon_layer=nothing,
        polygon_on_route=nothing.bool(),
        ring_offsets=torch.tensor([0]),
        point_offsets=torch.tensor([0]),
        points=torch.zeros(0, 2, dtype=torch.float64),
        polygon_speed_limit=None,
        baseline_offsets=None,
        baseline=None,
    )
    return scene, states


@pytest.mark.parametrize(
    "name",
    ["active_front", "active_lateral", "active_rear", "multiple", "no", "stopped_ego", "stopped_track"],
)
def test_devkit_collisions(devkit, name):
    """At fault or not, and at which frame. (Off every lane here, which makes side collisions the ego's fault, as expected there.)"""
    recorded = devkit(f"no_ego_at_fault_collision/{name}_collision" + ("s" if name == "multiple" else ""))
    scene, states = devkit_scene(recorded)
    everyone = torch.zeros(len(states), dtype=torch.int64)
    values, *_ = ops.score(ops.prepare(scene), states, everyone, source=ops.STATES, remove_touching=False)
    (_, compliant), (_, at_fault), *_ = recorded["expected"]["statistics"]
    assert values[0, 0].item() == float(compliant)
    boxes = torch.cat([scene.agent_state[:, :, :3], scene.agent_size[:, None].expand(-1, 51, -1)], -1)
    touched = ops.boxes_overlap(ego_boxes(states[0, :3])[None], boxes[:, :3]) & scene.agent_valid[:, :3]
    assert touched.any(1).sum() == {"active_rear": 1, "stopped_ego": 1, "multiple": 3}.get(name, at_fault)


def ego_boxes(states):
    cos, sin = states[:, 2].cos(), states[:, 2].sin()
    centre = states[:, :2] + reference.REAR_AXLE_TO_CENTRE * torch.stack([cos, sin], -1)
    size = doubles([reference.LENGTH, reference.WIDTH]).expand(len(states), 2)
    return torch.cat([centre, states[:, 2:3], size], -1)


@pytest.mark.parametrize(
    "name", ["ego_stopped", "in_collision", "no_collisions", "no_relevant_tracks", "time_to_collision_above_threshold"]
)
def test_devkit_time_to_collision(devkit, name):
    """nuPlan looks 5 s ahead in steps of 0.1 s at the tracks in front and fails below 0.95 s; NAVSIM looks 0.9 s ahead."""
    recorded = devkit(f"time_to_collision_within_bound/{name}")
    scene, states = devkit_scene(recorded, moving=True)
    boxes = torch.cat([scene.agent_state[:, :, :3], scene.agent_size[:, None].expand(-1, 51, -1)], -1)
    ahead = reference.relative_angle(states[:, :1, :3], boxes[None, :, 0, :2])[0] < reference.AHEAD
    seconds = ops.time_to_collision(states, boxes[ahead], scene.agent_valid[ahead])[0, 0].item()
    (_, smallest), (_, within) = recorded["expected"]["statistics"]
    assert seconds == (smallest if smallest <= 0.9 else math.inf)
    assert (seconds >= 0.95) == within


# -- real frames -------------------------------------------------------------------------------------------------------


def test_real_frames(shared_real, device):
    """5 frames of a drive in Las Vegas with about 90 objects each: the vehicle is ours, and it touches nothing."""
    recorded = json.loads((shared_real / "nuplan_devkit_testdata/real_nuplan_frames.json").read_text())
    vehicle = recorded["vehicle_parameters"]
    assert (vehicle["length"], vehicle["width"], vehicle["wheel_base"]) == (reference.LENGTH, reference.WIDTH, reference.WHEEL_BASE)
    assert vehicle["length"] / 2 - vehicle["rear_length"] == reference.REAR_AXLE_TO_CENTRE
    for frame in recorded["frames"]:
        ego = doubles([*frame["ego"]["center"], vehicle["length"], vehicle["width"]]).to(device)
        boxes = doubles([[*item["center"], *item["lwh"][:2]] for item in frame["tracked_objects"]]).to(device)
        assert len(boxes) > 80
        assert not ops.boxes_overlap(ego, boxes).any()
        assert ops.boxes_overlap(boxes, boxes).all()
        apart = ops.boxes_overlap(boxes[:, None], boxes[None])
        assert torch.equal(apart, apart.T)
        widest = boxes.clone()
        widest[:, 3:] += 2 * (boxes[:, :2] - ego[:2]).norm(dim=1).max()
        assert ops.boxes_overlap(ego, widest).all()


def test_layers_are_those_of_nuplan():
    """SemanticMapLayer, as the metric scenes and golden files number it."""
    assert {layer.name: layer.value for layer in Layer} == {
        "LANE": 0, "INTERSECTION": 1, "DRIVABLE_AREA": 5, "LANE_CONNECTOR": 11, "CARPARK": 15, "ROADBLOCK": 17,
    }  # fmt: skip
