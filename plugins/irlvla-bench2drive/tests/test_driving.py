"""Frames, localization and control, each by itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from simulated_leaderboard import EARTH_RADIUS, TICK, Car, VehicleControl, to_gps

from irlvla import Command
from irlvla_bench2drive import geometry
from irlvla_bench2drive.control import Follower, Pid
from irlvla_bench2drive.geometry import REAR_AXLE, Projection
from irlvla_bench2drive.localization import Odometer, Route
from irlvla_bench2drive.rig import CAMERAS, Rig

# -- frames ------------------------------------------------------------------------------------------------------------

# What carla.Transform(...).get_matrix() of CARLA 0.9.16 gives for roll, pitch and yaw.
CARLA_MATRICES = {
    (30.0, 10.0, 20.0): [[0.9254165, -0.2146101, -0.3123245], [0.3368241, 0.8434932, 0.4184121], [0.1736482, -0.4924039, 0.8528685]],
    (-5.0, 3.0, 170.0): [[-0.983458, -0.1684954, 0.0664792], [0.1734103, -0.9818524, 0.0767782], [0.052336, 0.0870363, 0.9948294]],
    (0.0, 0.0, -55.0): [[0.5735765, 0.8191521, 0.0], [-0.8191521, 0.5735765, 0.0], [0.0, 0.0, 1.0]],
}


@pytest.mark.parametrize("angles", CARLA_MATRICES)
def test_a_mount_is_carlas_seen_in_a_mirror(angles: tuple[float, float, float]) -> None:
    """A point in front of a camera lies where CARLA's own matrix puts it, y turned round, about the rear axle."""
    roll, pitch, yaw = angles
    sensor = {"x": 1.0, "y": -2.0, "z": 1.5, "roll": roll, "pitch": pitch, "yaw": yaw}
    right, down, ahead = 0.7, -0.4, 5.0
    in_carla = np.array(CARLA_MATRICES[angles]) @ (ahead, right, -down) + (1.0, -2.0, 1.5)
    seen = geometry.camera_to_ego(sensor) @ (right, down, ahead, 1.0)
    np.testing.assert_allclose(seen, [in_carla[0] - REAR_AXLE, -in_carla[1], in_carla[2], 1.0], atol=1e-6)
    assert np.linalg.det(geometry.camera_to_ego(sensor)[:3, :3]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("name", "left"), [("CAM_FRONT_LEFT", 55.0), ("CAM_FRONT_RIGHT", -55.0), ("CAM_BACK_LEFT", 110.0), ("CAM_BACK", 180.0)]
)
def test_cameras_look_where_their_names_say(name: str, left: float) -> None:
    looks = geometry.camera_to_ego(CAMERAS[name])[:3, 2]
    assert math.degrees(math.atan2(looks[1], looks[0])) % 360.0 == pytest.approx(left % 360.0)
    assert geometry.camera_to_ego(CAMERAS["CAM_FRONT"])[:3, 3].tolist() == pytest.approx([2.2, 0.0, 1.6])


def test_a_camera_sees_its_field_of_view() -> None:
    k = geometry.intrinsics(CAMERAS["CAM_FRONT"])
    edge = k @ (math.tan(math.radians(35.0)), 0.0, 1.0)
    assert edge[:2].tolist() == pytest.approx([1599.5, 449.5])  # the right edge of the last pixel, whose centre is 1599


@pytest.mark.parametrize("size", [(96, 256), (256, 704), (60, 30), None])
def test_images_keep_what_their_intrinsics_say(size: tuple[int, int] | None) -> None:
    """A bright spot is where a ray of its pixel goes in the smaller image."""
    rig = Rig(["CAM_FRONT"], size)
    pixels = np.zeros((900, 1600, 4), np.uint8)
    pixels[640:680, 780:820, 0] = 255  # blue, in BGRA
    image = rig.images({"CAM_FRONT": pixels})[0, 0].numpy().astype(float)
    assert image[:2].sum() == 0.0
    rows, columns = np.indices(image.shape[1:])
    found = [float((image[2] * where).sum() / image[2].sum()) for where in (columns, rows)]
    ray = np.linalg.inv(geometry.intrinsics(CAMERAS["CAM_FRONT"])) @ (799.5, 659.5, 1.0)
    assert found == pytest.approx((rig.intrinsics[0, 0].double().numpy() @ ray)[:2].tolist(), abs=0.1)


@pytest.mark.parametrize(
    ("compass", "expected"), [(math.pi / 2, 0.0), (0.0, math.pi / 2), (math.pi, -math.pi / 2), (1.75 * math.pi, 0.75 * math.pi)]
)
def test_headings_count_from_east_the_other_way_round(compass: float, expected: float) -> None:
    assert geometry.heading(compass) == pytest.approx(expected)


def test_left_and_right() -> None:
    imu = np.array([1.0, 2.0, 9.81, 0.1, 0.2, 0.3, 0.0])
    assert geometry.acceleration(imu) == (1.0, -2.0)
    assert geometry.yaw_rate(imu) == -0.3
    assert geometry.steer(0.5) == -0.5


def test_gps_is_unprojected_as_carla_projects_it() -> None:
    world = np.array([[0.0, 0.0], [3000.0, -4000.0], [-500.0, 2500.0], [120.0, 7.5]])
    gps = np.array([to_gps(x, y) for x, y in world])
    projection = Projection.fit(gps[:3], world[:3])
    assert projection.scale == pytest.approx(math.cos(math.radians(35.0)), abs=1e-9)
    np.testing.assert_allclose(projection(gps), world * (1.0, -1.0), atol=1e-4)
    alone = Projection.fit(gps[:1], world[:1])
    np.testing.assert_allclose(alone(gps[3:]), world[3:] * (1.0, -1.0), atol=1e-3)
    assert EARTH_RADIUS == geometry.EARTH_RADIUS


# -- where the car is --------------------------------------------------------------------------------------------------


def circle(seconds: float, noise: float) -> tuple[Odometer, Car]:
    """A car that drives to the left on a circle at 8 m/s, and what the odometer makes of its sensors."""
    random = np.random.default_rng(1)
    car = Car(x=100.0, y=-50.0, speed=8.0)
    world = np.array([[100.0, -50.0], [200.0, -150.0]])
    odometer = Odometer(Projection.fit(np.array([to_gps(x, y) for x, y in world]), world), heading=0.0)
    for i in range(round(seconds / TICK) + 1):
        compass = (car.yaw + math.pi / 2.0) % math.tau if i > 1 else math.nan
        imu = np.array([0.0, car.speed * car.yaw_rate, 9.81, 0.0, 0.0, car.yaw_rate, compass])
        odometer.update(i * TICK, np.array([*to_gps(car.x, car.y), 0.0]) + noise * random.normal(size=3), imu, car.speed, keep=2.0)
        if i < round(seconds / TICK):
            car.yaw_rate = -0.2
            car.yaw += car.yaw_rate * TICK
            middle = car.yaw - car.yaw_rate * TICK / 2.0
            car.x, car.y = car.x + car.speed * TICK * math.cos(middle), car.y + car.speed * TICK * math.sin(middle)
    return odometer, car


def test_the_history_is_of_where_the_car_was() -> None:
    odometer, _ = circle(6.0, noise=0.000005)
    history = odometer.history(4, 0.5)
    angle = -0.2 * np.array([1.5, 1.0, 0.5, 0.0])
    np.testing.assert_allclose(history[:, 0], 40.0 * np.sin(angle), atol=0.01)
    np.testing.assert_allclose(history[:, 1], 40.0 * (1.0 - np.cos(angle)), atol=0.01)
    np.testing.assert_allclose(history[:, 2], angle, atol=1e-6)  # headings grow to the left, through the compass's jump too
    np.testing.assert_allclose(history[:, 3:5], [[8.0, 0.0]] * 4)
    np.testing.assert_allclose(history[:, 6], 1.6, atol=1e-6)  # to the left
    np.testing.assert_allclose(history[:, 7], math.atan(2.85 * 0.2 / 8.0), atol=1e-6)


def test_noise_of_gnss_is_averaged() -> None:
    errors = []
    for seconds in np.arange(5.0, 15.0, 1.0):
        odometer, car = circle(float(seconds), noise=0.000005)  # 0.5 m
        errors.append(np.hypot(*(odometer.place - (car.x, -car.y))))
    assert max(errors) < 0.5
    assert np.mean(errors) < 0.2
    odometer, car = circle(5.0, noise=0.0)
    np.testing.assert_allclose(odometer.place, (car.x, -car.y), atol=0.05)


def test_a_history_begins_where_the_car_was_first() -> None:
    odometer, _ = circle(0.5, noise=0.0)
    history = odometer.history(4, 0.5)
    np.testing.assert_array_equal(history[0], history[1])
    assert history[1, 0] == pytest.approx(history[2, 0])
    assert history[3, 0] == 0.0


def test_commands_look_ahead_along_the_route() -> None:
    nodes = np.array([[0.0, 0.0], [50.0, 0.0], [60.0, 10.0], [60.0, 60.0], [60.0, 70.0], [60.0, 100.0]])
    route = Route(nodes, ["LANEFOLLOW", "LEFT", "STRAIGHT", "CHANGELANERIGHT", "LANEFOLLOW", "VOID"])
    found = [
        route.command(np.array(place))
        for place in ([0.0, 1.0], [29.0, 1.0], [31.0, 1.0], [54.0, 5.0], [59.0, 30.0], [61.0, 45.0], [60.0, 80.0])
    ]
    assert found == [Command.STRAIGHT, Command.STRAIGHT, Command.LEFT, Command.LEFT, Command.STRAIGHT, Command.RIGHT, Command.STRAIGHT]
    assert route.command(np.array([0.0, 0.0])) == Command.STRAIGHT  # it does not go back
    assert Route(nodes[:1], ["VOID"]).command(np.zeros(2)) == Command.UNKNOWN
    assert Route(nodes, ["LEFT"] * 6).heading == 0.0
    assert Route(nodes[:1], ["LEFT"]).heading == 0.0
    assert Route(nodes[[2, 2, 3]], ["LEFT"] * 3).heading == pytest.approx(math.pi / 2)


def test_a_route_that_crosses_itself_is_followed_in_order() -> None:
    """A loop to the left: at the crossing the car is first on the first branch, and later on the last."""
    nodes = np.array([[0.0, 0.0], [60.0, 0.0], [60.0, 30.0], [30.0, 30.0], [30.0, -60.0]])
    route = Route(nodes, ["LANEFOLLOW", "LEFT", "LEFT", "RIGHT", "LANEFOLLOW"])
    along = [np.array(place) for place in ((10.0, 0.0), (30.0, 0.0), (60.0, 1.0), (60.0, 29.0), (31.0, 30.0), (30.0, 0.0))]
    found = [(route.command(place), route.progress) for place in along]
    assert [round(progress) for _, progress in found] == [10, 30, 61, 89, 119, 150]
    assert found[1][0] == Command.STRAIGHT
    assert found[-1][0] == Command.RIGHT


# -- control -----------------------------------------------------------------------------------------------------------


def arc(speed: float, curvature: float) -> np.ndarray:
    """A plan of 4 s."""
    turn = curvature * speed * 0.5 * np.arange(1, 9)
    if curvature == 0.0:
        return np.column_stack([speed * 0.5 * np.arange(1, 9), turn, turn])
    return np.column_stack([np.sin(turn) / curvature, (1.0 - np.cos(turn)) / curvature, turn])


def test_a_pid_controller_by_hand() -> None:
    pid = Pid(2.0, 1.0, 0.5, steps=4)
    assert pid.step(1.0) == pytest.approx(2.0 + 1.0 / 4.0 + 0.5)
    assert pid.step(3.0) == pytest.approx(6.0 + 4.0 / 4.0 + 0.5 * 2.0)


def test_pedals() -> None:
    faster = Follower().step(arc(8.0, 0.0), 0.5, speed=5.0)
    assert 0.0 < faster.throttle <= 0.75
    assert faster.brake == 0.0
    assert faster.steer == 0.0
    assert Follower().step(arc(8.0, 0.0), 0.5, speed=9.0).brake == 1.0  # much too fast
    coasting = Follower().step(arc(8.0, 0.0), 0.5, speed=8.5)
    assert coasting.throttle == 0.0
    assert coasting.brake == 0.0
    standing = Follower().step(np.zeros((8, 3)), 0.5, speed=0.0)
    assert standing.brake == 1.0
    assert standing.throttle == 0.0
    assert standing.steer == 0.0
    assert Follower().step(np.full((1, 3), [5.0, 0.0, 0.0]), 1.0, speed=5.0).brake == 0.0  # of one pose alone


@pytest.mark.parametrize("curvature", [0.05, -0.05, 0.0])
def test_a_car_that_follows_its_plans(curvature: float) -> None:
    """Plans from where it is, again and again: it comes to the speed and to the circle that they want, to the same side."""
    car, follower = Car(), Follower()
    for _ in range(400):
        control = follower.step(arc(6.0, curvature), 0.5, car.speed)
        car.move(VehicleControl(control.throttle, control.steer, control.brake))
    assert car.speed == pytest.approx(6.0, abs=0.6)
    assert -car.yaw_rate / car.speed == pytest.approx(curvature, abs=0.03)  # CARLA's yaw is clockwise
    assert math.copysign(1.0, -car.yaw_rate) == math.copysign(1.0, curvature) or curvature == 0.0
