"""The checks of the conformance kit, and what only this plugin promises."""

from __future__ import annotations

import math

import pytest
import torch

import irlvla
from irlvla.testing import example_features, example_plan, example_scene, metric_checks, planner_checks
from irlvla_example.curve import natural_spline

test_spline = planner_checks("example_spline", knots=3)
test_smoothness = metric_checks("example_smoothness")
TIMES = torch.arange(1, 9).double() * 0.5


@pytest.mark.parametrize("knots", [2, 3, 4, 8])
def test_splines_pass_through_their_knots(knots: int) -> None:
    positions, _ = natural_spline(knots, torch.arange(1, knots + 1) * (4.0 / knots))
    torch.testing.assert_close(positions, torch.eye(knots).double())


def test_velocities_are_the_derivative_of_positions() -> None:
    times, step = TIMES[:-1] + 0.1, 1e-4
    before, after = (natural_spline(3, times + shift)[0] for shift in (-step, step))
    _, velocities = natural_spline(3, times)
    torch.testing.assert_close((after - before) / (2 * step), velocities, rtol=0, atol=1e-6)


def test_a_straight_drive_has_a_straight_spline() -> None:
    positions, velocities = natural_spline(4, TIMES)
    knots = 10.0 * torch.arange(1, 5).double()  # 10 m/s
    torch.testing.assert_close(positions @ knots, 10.0 * TIMES)
    torch.testing.assert_close(velocities @ knots, torch.full((8,), 10.0).double())


def test_a_car_that_stands_keeps_its_heading() -> None:
    planner = irlvla.build("planner", {"name": "example_spline", "knots": 8}, width=8)
    seconds = TIMES.clamp(max=2.0).float()
    path = 4.0 * seconds - seconds**2  # brakes until it stands after 2 s
    knots = torch.stack([torch.zeros(8), path], -1)[None, None]
    torch.testing.assert_close(planner.poses(knots)[0, 0, :, 2], torch.full((8,), math.pi / 2))
    assert planner.poses(0.0 * knots).count_nonzero() == 0


def test_a_planner_learns_to_drive_as_the_human() -> None:
    torch.manual_seed(0)
    planner = irlvla.build("planner", "example_spline", width=64)
    features, scene = example_features(4), example_scene(4)
    human = irlvla.Trajectory(scene.human.float(), scene.human_dt)
    human.poses[0] = math.nan  # of one scene no drive was recorded
    optimizer = torch.optim.Adam(planner.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        planner.loss(features, human)["nll"].backward()
        optimizer.step()
    plan = planner.sample(features, 16, generator=torch.Generator().manual_seed(0))
    assert (plan.best().poses - human.poses)[1:, :, :2].norm(dim=-1).max() < 0.5


def test_what_the_planner_cannot_use_is_refused() -> None:
    planner = irlvla.build("planner", "example_spline", width=64)
    features = example_features()
    with pytest.raises(irlvla.InputError, match=r"8 poses, 0\.5 s apart, got 40 poses, 0\.1 s apart"):
        planner.log_prob(features, irlvla.Plan(torch.zeros(2, 1, 40, 3), 0.1))
    with pytest.raises(irlvla.InputError, match="backbone=status"):
        planner.sample(irlvla.Features(features.observation), 1)


def test_smoothness_by_hand() -> None:
    metric = irlvla.build("metric", "example_smoothness")
    scene, plan = example_scene(2), example_plan(2)
    plan.poses[:] = 0.0
    plan.poses[0, ..., 0] = TIMES**3  # x = t^3: its third differences are its third derivative, 6 m/s^3
    plan.poses[1, ..., 1] = TIMES**2  # y = t^2: the second differences are 2 m/s^2, across where the car heads
    values = metric(scene, plan)
    assert values["max_jerk"].tolist() == pytest.approx([6.0, 0.0], abs=1e-4)
    assert values["max_lateral_acceleration"].tolist() == pytest.approx([0.0, 2.0], abs=1e-4)
    with pytest.raises(irlvla.InputError, match="three poses or more, got 2"):
        metric(scene, irlvla.Plan(plan.poses[:, :, :2]))
