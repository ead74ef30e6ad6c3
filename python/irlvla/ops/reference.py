"""The operations of `irlvla.ops` in plain torch: float64, CPU, slow and obvious, one short function per rule.

What each function must return was read from NAVSIM v2.2 (github.com/autonomousvision/navsim, main at 0a380a9) and nuPlan
(github.com/motional/nuplan-devkit, tag nuplan-devkit-v1.2); docstrings name the file and function of the rule, "v1" is
NAVSIM's branch v1.1. Surprising behaviour is the devkit's: published scores depend on it.

Letters: N candidates, T poses of a plan, S steps of agents, A agents, P polygons, R rings, V vertices, L polyline points.
Poses are (x, y, heading), states have the columns of `StateIndex`; metres, radians, seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from irlvla.errors import InputError
from irlvla.types import HORIZON, METRICS, STEP, STEPS, Details, Epdms, Kind, Layer, Pdms, Scene, StateIndex

# Chrysler Pacifica (nuplan vehicle_parameters.py get_pacifica_parameters). Sums are written as there: they decide the last bit.
WIDTH = 1.1485 * 2.0
LENGTH = 4.049 + 1.127
REAR_AXLE_TO_CENTRE = LENGTH / 2.0 - 1.127
WHEEL_BASE = 3.089

# Tracker (navsim batch_lqr.py, __init__)
LOOKAHEAD = 10  # steps
LONGITUDINAL_WEIGHT, LONGITUDINAL_EFFORT = 10.0, 1.0
LATERAL_WEIGHTS, LATERAL_EFFORT = (1.0, 10.0, 0.0), 1.0  # of lateral error, heading error, steering angle
JERK_PENALTY, CURVATURE_RATE_PENALTY, INITIAL_CURVATURE_PENALTY = 1e-4, 1e-2, 1e-10
STOPPING_SPEED, STOPPING_GAIN = 0.2, 0.5

# Bicycle model (navsim batch_kinematic_bicycle.py, __init__)
BICYCLE_STEP = 100_000 * 1e-6  # one bit below 0.1, which the tracker uses
MAX_STEERING = math.pi / 3
ACCELERATION_LAG, STEERING_LAG = 0.2, 0.05  # seconds

# Scorer (navsim pdm_scorer.py PDMScorerConfig)
STANDING_SPEED = 0.05  # m/s: an ego or a track up to this speed stands (NC)
PROJECTED_SPEED = 0.005  # m/s: a slower ego is not projected ahead (TTC)
TTC_OFFSETS = (0, 3, 6, 9)  # steps: np.arange(0, 10, 3), so the "1 s" horizon ends at 0.9 s
AHEAD, BEHIND = math.radians(30.0), math.radians(150.0)
OFF_ROUTE_WINDOW, OFF_ROUTE_LIMITS = 10, (2.0, 6.0)  # steps; metres for half and for no points (DDC)
OFF_CENTRE_LIMIT, OFF_CENTRE_STEPS = 0.5, 20  # metres; steps in a row that fail (LK)
PROGRESS_THRESHOLD = 5.0  # metres: below it progress is not compared (EP)

# Comfort (navsim pdm_comfort_metrics.py): lon acc, lat acc, jerk, lon jerk, yaw acc, yaw rate
COMFORT_BOUNDS = ((-4.05, 2.40), (-4.89, 4.89), (-8.37, 8.37), (-4.13, 4.13), (-1.93, 1.93), (-0.95, 0.95))
EXTENDED_COMFORT_BOUNDS = (0.7, 0.5, 0.1, 0.1)  # rms of the differences in acceleration, jerk, yaw rate, yaw acceleration

LANE_LAYERS = (Layer.LANE, Layer.LANE_CONNECTOR)
DRIVABLE_LAYERS = (Layer.ROADBLOCK, Layer.INTERSECTION, Layer.DRIVABLE_AREA, Layer.CARPARK)
MOVING_KINDS = (Kind.VEHICLE, Kind.PEDESTRIAN, Kind.BICYCLE)  # nuplan AGENT_TYPES


# --- angles and interpolation ---------------------------------------------------------------------------------------


def wrap(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi] (navsim pdm_geometry_utils.py normalize_angle)."""
    return torch.atan2(angle.sin(), angle.cos())


def principal(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi) (nuplan compute.py principal_value)."""
    return torch.remainder(angle + math.pi, 2.0 * math.pi) - math.pi


def unwrap(angle: Float[Tensor, "... K"]) -> Float[Tensor, "... K"]:
    """No jump above pi between neighbours (np.unwrap, which nuplan compute.py AngularInterpolator calls)."""
    change = angle.diff(dim=-1)
    shortest = torch.remainder(change + math.pi, 2.0 * math.pi) - math.pi
    shortest = torch.where((shortest == -math.pi) & (change > 0.0), math.pi, shortest)
    correction = torch.where(change.abs() < math.pi, 0.0, shortest - change)
    return torch.cat([angle[..., :1], angle[..., 1:] + correction.cumsum(-1)], -1)


def interpolate_linearly(query: Int[Tensor, "N Q"], knots: Int[Tensor, "N K"], values: Float[Tensor, "N K C"]) -> Float[Tensor, "N Q C"]:
    """Piecewise linear between knots (scipy interp1d, which nuplan interpolated_trajectory.py calls)."""
    upper = torch.searchsorted(knots, query).clamp(1, knots.shape[1] - 1)
    lower = upper - 1
    start, end = values.take_along_dim(lower[..., None], 1), values.take_along_dim(upper[..., None], 1)
    slope = (end - start) / (knots.gather(1, upper) - knots.gather(1, lower))[..., None]
    return slope * (query - knots.gather(1, lower))[..., None] + start


def resample(query: Int[Tensor, "N Q"], knots: Int[Tensor, "N K"], poses: Float[Tensor, "N K 3"]) -> Float[Tensor, "N Q 3"]:
    """Poses at the query times: position linear, heading along the shorter way (nuplan interpolated_trajectory.py get_state_at_times)."""
    smooth = torch.cat([poses[..., :2], unwrap(poses[..., 2])[..., None]], -1)
    found = interpolate_linearly(query, knots, smooth)
    return torch.cat([found[..., :2], principal(found[..., 2:])], -1)


# --- plan -> reference poses ----------------------------------------------------------------------------------------


def through_centre(poses: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
    """Poses after nuPlan has stored the box centre and derived the rear axle back from it: x, y move by a rounding.

    nuplan car_footprint.py build_from_rear_axle, rear_axle.
    """
    heading = poses[..., 2:]
    offset = REAR_AXLE_TO_CENTRE * torch.cat([heading.cos(), heading.sin()], -1)
    return torch.cat([(poses[..., :2] + offset) - offset, heading], -1)


def to_map_frame(poses: Float[Tensor, "N T 3"], origin: Float[Tensor, "N 3"]) -> Float[Tensor, "N T 3"]:
    """Poses relative to `origin` as poses in its frame (nuplan convert.py relative_to_absolute_poses)."""
    x, y, heading = poses.unbind(-1)
    x0, y0, heading0 = origin[:, None].unbind(-1)
    c, s = heading0.cos(), heading0.sin()
    cosine = c * heading.cos() - s * heading.sin()
    sine = s * heading.cos() + c * heading.sin()
    return torch.stack([c * x - s * y + x0, s * x + c * y + y0, torch.atan2(sine, cosine)], -1)


def seconds(time_us: Int[Tensor, " N"]) -> Float[Tensor, "N 1"]:
    """As nuPlan converts them (state_representation.py TimePoint.time_s)."""
    return time_us.double()[:, None] * 1e-6


def microseconds(seconds: Float[Tensor, "N K"]) -> Int[Tensor, "N K"]:
    """Truncated, so a time stamp near 1.6e15 us may come out 1 us early (nuplan transform_utils.py, navsim pdm_score.py)."""
    return (seconds * 1e6).to(torch.int64)


def step_times(time_us: Int[Tensor, " N"], last_us: Int[Tensor, " N"]) -> Int[Tensor, "N 41"]:
    """Times of the 41 steps, clipped to the plan (navsim pdm_score.py get_trajectory_as_array)."""
    times = microseconds(torch.arange(STEPS, dtype=torch.float64) * STEP + seconds(time_us))
    return times.clamp(time_us[:, None], last_us[:, None])


def interpolate(
    plans: Float[Tensor, "N T 3"], ego: Float[Tensor, "N 11"], time_us: Int[Tensor, " N"], dt: float = 0.5
) -> Float[Tensor, "N 41 3"]:
    """Reference poses in the map frame at 0.1 s: the ego itself, then the plan (navsim pdm_score.py transform_trajectory).

    `plans` are in the ego frame, every `dt` seconds from `dt` on; they end at 4 s.
    """
    if not math.isclose(plans.shape[1] * dt, HORIZON):
        raise InputError(f"a plan must end at {HORIZON} s, but {plans.shape[1]} poses every {dt} s end at {plans.shape[1] * dt} s")
    origin = through_centre(ego[:, :3].double())
    planned = through_centre(to_map_frame(plans.double(), origin))
    offsets = torch.arange(plans.shape[1], dtype=torch.float64) * dt + dt
    knots = torch.cat([time_us[:, None], microseconds(offsets + seconds(time_us))], 1)
    poses = torch.cat([origin[:, None], planned], 1)
    return through_centre(resample(step_times(time_us, knots[:, -1]), knots, poses))


def interpolate_reference(
    poses: Float[Tensor, "N 41 3"], ego: Float[Tensor, "N 11"], time_us: Int[Tensor, " N"]
) -> Float[Tensor, "N 41 3"]:
    """The PDM-Closed plan (map frame, at exactly time_us + k * 0.1 s) as the devkit resamples it (navsim pdm_score.py).

    Its first pose is its own, so `ego` is not read; query times are truncated, so the others may lie 1 us earlier.
    """
    knots = time_us[:, None] + torch.arange(STEPS) * 100_000
    return through_centre(resample(step_times(time_us, knots[:, -1]), knots, through_centre(poses.double())))


# --- tracker and vehicle --------------------------------------------------------------------------------------------


def jerk_matrix(accelerations: int) -> Float[Tensor, "J A"]:
    """What the devkit penalises instead of differences of accelerations (navsim batch_lqr_utils.py _make_banded_difference_matrix).

    Its second assignment overwrites all but one of the ones that the first wrote: every row r is -e_r, and only the
    last is a difference.
    """
    rows = accelerations - 1
    matrix = torch.zeros(rows, accelerations, dtype=torch.float64)
    matrix[:, 1:] = torch.eye(rows)
    matrix[:, :-1] = -torch.eye(rows)
    return matrix


def integrate(initial: Float[Tensor, " N"], rates: Float[Tensor, "N M"]) -> Float[Tensor, "N M+1"]:
    """Values at steps of 0.1 s (navsim batch_lqr_utils.py _generate_profile_from_initial_condition_and_derivatives)."""
    return torch.cat([initial[:, None], initial[:, None] + (rates * STEP).cumsum(-1)], -1)


def velocity_profile(poses: Float[Tensor, "N 41 3"]) -> Float[Tensor, "N 40"]:
    """Speeds that explain the displacements (navsim batch_lqr_utils.py _fit_initial_velocity_and_acceleration_profile) [m/s].

    Regularised least squares; unknowns are the initial speed and the accelerations, rows dx_0, dy_0, dx_1, ...
    """
    count, moves = poses.shape[0], poses.shape[1] - 1
    displacement = poses.diff(dim=1)[..., :2].reshape(count, 2 * moves)
    heading = poses[:, :-1, 2]
    direction = torch.stack([heading.cos(), heading.sin()], -1)
    weight = torch.ones(moves, moves, dtype=torch.float64).tril() * STEP**2
    weight[:, 0] = STEP
    design = (direction[..., None] * weight[:, None]).reshape(count, 2 * moves, moves)
    penalty = torch.zeros(moves - 2, moves, dtype=torch.float64)
    penalty[:, 1:] = jerk_matrix(moves - 1)
    normal = design.mT @ design + JERK_PENALTY * penalty.T @ penalty
    solution = torch.linalg.solve(normal, (design.mT @ displacement[..., None])[..., 0])
    return integrate(solution[:, 0], solution[:, 1:])


def curvature_profile(poses: Float[Tensor, "N 41 3"], velocities: Float[Tensor, "N 40"]) -> Float[Tensor, "N 40"]:
    """Curvatures that explain the turns at those speeds (navsim batch_lqr_utils.py _fit_initial_curvature_and_...) [1/m]."""
    moves = poses.shape[1] - 1
    turn = wrap(poses[..., 2].diff(dim=1))
    weight = torch.ones(moves, moves, dtype=torch.float64).tril() * STEP**2
    weight[:, 0] = STEP
    design = velocities[..., None] * weight
    penalty = CURVATURE_RATE_PENALTY * torch.eye(moves, dtype=torch.float64)
    penalty[0, 0] = INITIAL_CURVATURE_PENALTY
    solution = torch.linalg.solve(design.mT @ design + penalty, (design.mT @ turn[..., None])[..., 0])
    return integrate(solution[:, 0], solution[:, 1:])


def lateral_command(
    state: Float[Tensor, "N 11"], target: Float[Tensor, "N 3"], velocities: Float[Tensor, "N 10"], curvatures: Float[Tensor, "N 10"]
) -> Float[Tensor, " N"]:
    """Steering rate of the one-step LQR on (lateral error, heading error, steering) [rad/s] (batch_lqr.py _lateral_lqr_controller)."""
    x_error, y_error = (state[:, :2] - target[:, :2]).unbind(-1)
    lateral = -x_error * target[:, 2].sin() + y_error * target[:, 2].cos()
    heading, steering = wrap(state[:, StateIndex.HEADING] - target[:, 2]), state[:, StateIndex.STEERING]
    zero = torch.zeros_like(lateral)
    by_rate = (zero, zero, zero)  # what a unit steering rate adds to the three errors
    for velocity, curvature in zip(velocities.unbind(1), curvatures.unbind(1), strict=True):
        moved = velocity * STEP
        lateral, heading = lateral + moved * heading, heading + moved / WHEEL_BASE * steering - moved * curvature
        by_rate = (by_rate[0] + moved * by_rate[1], by_rate[1] + moved / WHEEL_BASE * by_rate[2], by_rate[2] + STEP)
    errors, rate = torch.stack([lateral, wrap(heading), wrap(steering)], -1), torch.stack(by_rate, -1)
    weighted = rate * torch.tensor(LATERAL_WEIGHTS, dtype=torch.float64)
    return -(weighted * errors).sum(-1) / ((weighted * rate).sum(-1) + LATERAL_EFFORT)


def control(
    state: Float[Tensor, "N 11"],
    poses: Float[Tensor, "N 41 3"],
    velocity: Float[Tensor, "N 40"],
    curvature: Float[Tensor, "N 40"],
    step: int,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Acceleration and steering rate at one step (navsim batch_lqr.py track_trajectory) [m/s2, rad/s]."""
    ahead = min(step + LOOKAHEAD, velocity.shape[1] - 1)
    indices = torch.arange(step, step + LOOKAHEAD).clamp(max=ahead)
    speed, target_speed = state[:, StateIndex.VX], velocity[:, ahead]
    stopping = (target_speed <= STOPPING_SPEED) & (speed <= STOPPING_SPEED)  # signed: every reverse speed qualifies

    horizon = LOOKAHEAD * STEP
    gain = -1.0 / (horizon * LONGITUDINAL_WEIGHT * horizon + LONGITUDINAL_EFFORT) * horizon * LONGITUDINAL_WEIGHT
    driving_acceleration = gain * (speed - target_speed)
    velocities = integrate(speed, driving_acceleration[:, None].expand(-1, LOOKAHEAD - 1))
    steering_rate = lateral_command(state, poses[:, step], velocities, curvature[:, indices])

    acceleration = torch.where(stopping, -STOPPING_GAIN * (speed - target_speed), driving_acceleration)
    return acceleration, torch.where(stopping, 0.0, steering_rate)


def advance(state: Float[Tensor, "N 11"], acceleration: Float[Tensor, " N"], steering_rate: Float[Tensor, " N"]) -> Float[Tensor, "N 11"]:
    """The state 0.1 s later (navsim batch_kinematic_bicycle.py propagate_state).

    Position and heading move with the old speed and steering; speed may become negative.
    """
    x, y, heading, vx, _, ax, _, steering, _, angular_velocity, _ = state.unbind(-1)
    dt = BICYCLE_STEP
    new_ax = dt / (dt + ACCELERATION_LAG) * (acceleration - ax) + ax
    wanted_steering = dt * steering_rate + steering
    lagged_steering = dt / (dt + STEERING_LAG) * (wanted_steering - steering) + steering
    new_rate = (lagged_steering - steering) / dt
    new_vx = vx + new_ax * dt
    new_steering = (steering + new_rate * dt).clamp(-MAX_STEERING, MAX_STEERING)
    new_angular_velocity = new_vx * new_steering.tan() / WHEEL_BASE
    columns = {
        StateIndex.X: x + vx * heading.cos() * dt,
        StateIndex.Y: y + vx * heading.sin() * dt,
        StateIndex.HEADING: principal(heading + vx * steering.tan() / WHEEL_BASE * dt),
        StateIndex.VX: new_vx,
        StateIndex.VY: torch.zeros_like(vx),
        StateIndex.AX: new_ax,
        StateIndex.AY: torch.zeros_like(vx),
        StateIndex.STEERING: new_steering,
        StateIndex.STEERING_RATE: new_rate,  # not limited, unlike the angle
        StateIndex.ANGULAR_VELOCITY: new_angular_velocity,
        StateIndex.ANGULAR_ACCELERATION: (new_angular_velocity - angular_velocity) / dt,
    }
    return torch.stack([columns[index] for index in StateIndex], -1)


def track(poses: Float[Tensor, "N 41 3"], ego: Float[Tensor, "N 11"]) -> Float[Tensor, "N 41 11"]:
    """States of a vehicle that follows the reference poses (navsim pdm_simulator.py simulate_proposals)."""
    poses, ego = poses.double(), ego.double()
    velocity = velocity_profile(poses)
    curvature = curvature_profile(poses, velocity)
    states = [torch.cat([through_centre(ego[:, :3]), ego[:, 3:]], -1)]
    for step in range(STEPS - 1):
        states.append(advance(states[-1], *control(states[-1], poses, velocity, curvature, step)))
    return torch.stack(states, 1)


def simulate(
    plans: Float[Tensor, "N T 3"], ego: Float[Tensor, "N 11"], time_us: Int[Tensor, " N"], dt: float = 0.5
) -> Float[Tensor, "N 41 11"]:
    """Simulated states of plans given in the ego frame."""
    return track(interpolate(plans, ego, time_us, dt), ego)


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


# --- agents ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agents:
    """The traffic of one scene: A agents over S steps."""

    corners: Float[Tensor, "A S 4 2"]
    centroids: Float[Tensor, "A S 2"]
    valid: Bool[Tensor, "A S"]
    moving_kind: Bool[Tensor, " A"]  # a vehicle, pedestrian or bicycle
    standing: Bool[Tensor, " A"]  # a static object, or at most 0.05 m/s when FIRST seen (navsim pdm_observation.py unique_objects)


def agents_of(scene: Scene, *, remove_touching: bool) -> Agents:
    """Agents of a scene of one; with `remove_touching`, those in contact with the ego at t = 0 are gone for good.

    navsim log_replay_traffic_agents.py simulate_environment (not in v1, not with reactive traffic).
    """
    state, valid = scene.agent_state.double(), scene.agent_valid.clone()
    boxes = torch.cat([state[..., :3], scene.agent_size.double()[:, None].expand(-1, state.shape[1], -1)], -1)
    corners = box_corners(boxes)
    if remove_touching:
        touching = quads_touch(footprints(scene.ego), corners[:, 0]) & valid[:, 0]
        valid &= ~touching[:, None]
    moving_kind = torch.isin(scene.agent_kind, torch.tensor(MOVING_KINDS))
    first_seen = scene.agent_valid.int().argmax(-1)
    velocity = state[torch.arange(len(state)), first_seen, 3:5]
    standing = ~moving_kind | (torch.hypot(velocity[:, 0], velocity[:, 1]) <= STANDING_SPEED)
    return Agents(corners, box_centroids(corners), valid, moving_kind, standing)


def contacts(
    ego_corners: Float[Tensor, "N T 4 2"], agent_corners: Float[Tensor, "A T 4 2"], valid: Bool[Tensor, "A T"]
) -> Bool[Tensor, "N T A"]:
    """Which agents each ego box touches at each step."""
    return quads_touch(ego_corners[:, :, None], agent_corners.transpose(0, 1)) & valid.T


def relative_angle(pose: Float[Tensor, "... 3"], point: Float[Tensor, "... 2"]) -> Float[Tensor, "..."]:
    """Angle between the heading and the direction to the point, in [0, pi] (nuplan idm/utils.py get_agent_relative_angle).

    NaN, hence neither ahead nor behind, at no distance. Rounding can lift the cosine of an agent exactly in line above 1;
    the devkit's arccos is NaN then, a matter of the last bit of the simulated state. Here the agent is in line.
    """
    vector = point - pose[..., :2]
    direction = vector / length_of(vector)[..., None]
    heading = pose[..., 2]
    return torch.acos((heading.cos() * direction[..., 0] + heading.sin() * direction[..., 1]).clamp(-1.0, 1.0))


def ego_speed(states: Float[Tensor, "... 11"]) -> Float[Tensor, "..."]:
    """Speed without sign [m/s]: a reversing ego counts as driving forwards."""
    return torch.hypot(states[..., StateIndex.VX], states[..., StateIndex.VY])


def moved_ahead(states: Float[Tensor, "N T 11"], offset: int) -> Float[Tensor, "N T 4 2"]:
    """Ego boxes moved straight ahead for `offset` steps at their speed (navsim pdm_scorer.py _calculate_ttc)."""
    speed, heading = ego_speed(states), states[..., StateIndex.HEADING]
    velocity = torch.stack([heading.cos() * speed, heading.sin() * speed], -1)
    return footprints(states) + velocity[..., None, :] * (float(offset) * STEP)


def projected_contacts(
    states: Float[Tensor, "N T 11"], corners: Float[Tensor, "A S 4 2"], valid: Bool[Tensor, "A S"]
) -> Bool[Tensor, "N T 4 A"]:
    """Which agents the ego, moved ahead by each of TTC_OFFSETS, touches where they are by then; none for a standing ego."""
    result = torch.zeros(*states.shape[:2], len(TTC_OFFSETS), len(corners), dtype=torch.bool)
    for i, offset in enumerate(TTC_OFFSETS):
        steps = max(0, min(states.shape[1], corners.shape[1] - offset))
        ahead = slice(offset, offset + steps)
        result[:, :steps, i] = contacts(moved_ahead(states[:, :steps], offset), corners[:, ahead], valid[:, ahead])
    return result & (ego_speed(states) >= PROJECTED_SPEED)[:, :, None, None]


def time_to_collision(states: Float[Tensor, "N 41 11"], boxes: Float[Tensor, "A S 5"], valid: Bool[Tensor, "A S"]) -> Float[Tensor, "N 41"]:
    """Smallest of 0, 0.3, 0.6, 0.9 s after which the ego, moved straight ahead, touches any box of that later step; inf if none.

    No question of fault. Later steps than the boxes have are not looked at; an ego below 0.005 m/s has no collision ahead.
    """
    hit = projected_contacts(states.double(), box_corners(boxes), valid).any(-1)
    seconds = torch.tensor(TTC_OFFSETS, dtype=torch.float64) * STEP
    return torch.where(hit, seconds, math.inf).amin(-1)


# --- areas ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Areas:
    """Where the ego is at each step."""

    multiple_lanes: Bool[Tensor, "N T"]
    off_road: Bool[Tensor, "N T"]
    off_route: Bool[Tensor, "N T"]
    centre_in_intersection: Bool[Tensor, "N T"]
    rear_axle_in_intersection: Bool[Tensor, "N T"]

    @property
    def out_of_lane(self) -> Bool[Tensor, "N T"]:
        """In several lanes or off the road: lateral contacts are then the ego's fault."""
        return self.multiple_lanes | self.off_road


def areas_of(scene: Scene, states: Float[Tensor, "N T 11"]) -> Areas:
    """Areas of the ego (navsim pdm_scorer.py _calculate_ego_area, pdm_occupancy_map.py is_in_layer)."""
    points = torch.cat([footprints(states), centres(states)[..., None, :], states[..., None, :2]], -2)
    inside = points_in_polygons(points.flatten(0, -2), scene.points, scene.point_offsets, scene.ring_offsets)
    inside = inside.unflatten(0, points.shape[:-1])
    corners, centre, rear_axle = inside[..., :4, :], inside[..., 4, :], inside[..., 5, :]
    lane = torch.isin(scene.polygon_layer, torch.tensor(LANE_LAYERS))
    drivable = torch.isin(scene.polygon_layer, torch.tensor(DRIVABLE_LAYERS))
    intersection = scene.polygon_layer == Layer.INTERSECTION
    corners_in_lane = corners[..., lane].sum(-2)
    return Areas(
        # Two consecutive lanes of one street count as several.
        multiple_lanes=((corners_in_lane > 0).sum(-1) > 1) & ~(corners_in_lane == 4).any(-1),
        # Every corner must lie in some polygon, so a corner on an edge that two polygons share is off the road.
        off_road=~corners[..., drivable].any(-1).all(-1),
        # The devkit's "oncoming traffic": nothing looks at the direction of driving.
        off_route=~centre[..., lane & scene.polygon_on_route].any(-1),
        centre_in_intersection=centre[..., intersection].any(-1),
        rear_axle_in_intersection=rear_axle[..., intersection].any(-1),
    )


# --- metrics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """A metric with its first infraction: step and agent, -1 if there was none."""

    value: Float[Tensor, " N"]
    step: Int[Tensor, " N"]
    agent: Int[Tensor, " N"]


def judge(count: int, contact: Int[Tensor, "K 3"], guilty: Bool[Tensor, " K"], value: Float[Tensor, " K"]) -> Event:
    """Contacts (candidate, step, agent) in order of time: one without guilt excuses its agent from then on, the others count."""
    worst, step, agent = [1.0] * count, [-1] * count, [-1] * count
    excused = set()
    for (n, t, a), is_guilty, score in zip(contact.tolist(), guilty.tolist(), value.tolist(), strict=True):
        if (n, a) in excused:
            continue
        if not is_guilty:
            excused.add((n, a))
            continue
        worst[n] = min(worst[n], score)
        if step[n] < 0:
            step[n], agent[n] = t, a
    return Event(torch.tensor(worst, dtype=torch.float64), torch.tensor(step, dtype=torch.int64), torch.tensor(agent, dtype=torch.int64))


def no_at_fault_collision(states: Float[Tensor, "N 41 11"], agents: Agents, areas: Areas) -> Event:
    """NC: 0 after an at-fault contact with a vehicle, pedestrian or bicycle, 0.5 with an object.

    navsim pdm_scorer.py _calculate_no_at_fault_collision, pdm_scorer_utils.py get_collision_type.
    """
    ego = footprints(states)
    contact = contacts(ego, agents.corners[:, :STEPS], agents.valid[:, :STEPS]).nonzero()
    n, t, a = contact.unbind(-1)
    driving = ego_speed(states[n, t]) > STANDING_SPEED
    behind = relative_angle(states[n, t, :3], agents.centroids[a, t]) > BEHIND
    frontal = segments_touch_quads(ego[n, t, 0], ego[n, t, 3], agents.corners[a, t])
    at_fault = driving & (agents.standing[a] | (~behind & (frontal | areas.out_of_lane[n, t])))
    return judge(len(states), contact, at_fault, torch.where(agents.moving_kind[a], 0.0, 0.5))


def time_to_collision_within_bound(states: Float[Tensor, "N 41 11"], agents: Agents, areas: Areas, steps: int) -> Event:
    """TTC: 0 if the ego, moved ahead by up to 0.9 s from one of the first `steps` steps, touches an agent in its way.

    navsim pdm_scorer.py _calculate_ttc. An agent that is touched beside or behind is excused, so that hides a later
    frontal contact.
    """
    found = projected_contacts(states[:, :steps], agents.corners, agents.valid).nonzero()  # by candidate, step, offset, agent
    n, t, i, a = found.unbind(-1)
    angle = relative_angle(states[n, t, :3], agents.centroids[a, t + torch.tensor(TTC_OFFSETS)[i]])
    exposed = (areas.out_of_lane | areas.rear_axle_in_intersection)[n, t]
    in_the_way = (angle < AHEAD) | (exposed & ~(angle > BEHIND))
    return judge(len(states), found[:, [0, 1, 3]], in_the_way, torch.zeros(len(found)))


def drivable_area_compliance(areas: Areas) -> Float[Tensor, " N"]:
    """DAC: 0 if off the road at any step (navsim pdm_scorer.py _calculate_drivable_area_compliance)."""
    return (~areas.off_road.any(-1)).double()


def oncoming_metres(states: Float[Tensor, "N 41 11"], counted: Bool[Tensor, "N 41"]) -> Float[Tensor, " N"]:
    """Most metres driven in counted steps within 11 steps (1.1 s; the devkit's slice is one longer than its 1 s)."""
    moved = torch.zeros(states.shape[:2], dtype=torch.float64)
    moved[:, 1:] = length_of(centres(states).diff(dim=1))
    moved = torch.where(counted, moved, 0.0)
    windows = [moved[:, max(0, t - OFF_ROUTE_WINDOW) : t + 1].sum(-1) for t in range(moved.shape[1])]
    return torch.stack(windows, -1).amax(-1)


def driving_direction_compliance(metres: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """DDC: 1 below 2 m off the route, 0.5 below 6 m, else 0 (navsim pdm_scorer.py _calculate_driving_direction_compliance)."""
    half, none = OFF_ROUTE_LIMITS
    return torch.where(metres < half, 1.0, torch.where(metres < none, 0.5, 0.0)).double()


def first_red_light(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Bool[Tensor, "N 41"]:
    """The first step at which the ego box touches a connector whose light is red, wherever the ego started.

    navsim pdm_scorer.py _calculate_traffic_light_compliance; there is no stop line.
    """
    ego = footprints(states)
    touch = boxes_touch_polygons(ego.flatten(0, 1), *polygons_of(scene, scene.light_polygon))
    red = (touch.unflatten(0, ego.shape[:2]) & scene.light_red.T).any(-1)
    return red & (red.cumsum(-1) == 1)


def polygons_of(scene: Scene, chosen: Int[Tensor, " Q"]) -> tuple[Float[Tensor, "V 2"], Int[Tensor, " R+1"], Int[Tensor, " Q+1"]]:
    """Vertices, point offsets and ring offsets of chosen polygons of a scene of one."""
    polygons = list(polygon_rings(scene.points, scene.point_offsets, scene.ring_offsets))
    selected = [polygons[p] for p in chosen.tolist()]
    rings = [ring for polygon in selected for ring in polygon]
    vertices = torch.cat([*rings, torch.zeros(0, 2, dtype=torch.float64)])
    return vertices, offsets_from([len(ring) for ring in rings]), offsets_from([len(polygon) for polygon in selected])


def offsets_from(sizes: list[int]) -> Int[Tensor, " K+1"]:
    return torch.tensor([0, *sizes]).cumsum(0)


def longest_off_centre_run(scene: Scene, states: Float[Tensor, "N 41 11"], areas: Areas) -> Int[Tensor, " N"]:
    """Longest run of steps more than 0.5 m off the centreline (navsim pdm_scorer.py _calculate_lane_keeping).

    Steps in an intersection neither lengthen nor end a run.
    """
    _, distance = project(centres(states).flatten(0, 1), scene.centerline[:, :2])
    off_centre = (distance > OFF_CENTRE_LIMIT).unflatten(0, states.shape[:2])
    longest = []
    for flags, skipped in zip(off_centre.tolist(), areas.centre_in_intersection.tolist(), strict=True):
        run = best = 0
        for off, skip in zip(flags, skipped, strict=True):
            if skip:
                continue
            run = run + 1 if off else 0
            best = max(best, run)
        longest.append(best)
    return torch.tensor(longest, dtype=torch.int64)


def progress_along(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Float[Tensor, " N"]:
    """Metres along the centreline from first to last step, not below 0 (navsim pdm_scorer.py _calculate_progress)."""
    ends = centres(states[:, [0, -1]])
    along, _ = project(ends.flatten(0, 1), scene.centerline[:, :2])
    start, end = along.unflatten(0, ends.shape[:2]).unbind(-1)
    return (end - start).clamp(min=0.0)


def ego_progress(progress: Tensor, multiplier: Tensor, reference: Tensor) -> Float[Tensor, " N"]:
    """EP: progress over the best collision-free, lawful progress of candidate and reference; 1 if that is at most 5 m.

    navsim pdm_scorer.py _aggregate_pdm_scores. The candidate's own violations count below the line only.
    """
    best = torch.maximum(progress * multiplier, reference)
    return torch.where(best > PROGRESS_THRESHOLD, (progress / best).clamp(0.0, 1.0), 1.0)


# --- comfort --------------------------------------------------------------------------------------------------------


def fit_weights(window: int, order: int, derivative: int, at: float) -> Float[Tensor, " W"]:
    """Weights of `window` samples in a derivative (per sample) at position `at` of their least-squares polynomial."""
    powers = (torch.arange(window, dtype=torch.float64) - at)[:, None] ** torch.arange(order + 1, dtype=torch.float64)
    inverse = torch.linalg.lstsq(powers, torch.eye(window, dtype=torch.float64)).solution
    return inverse[derivative] * math.factorial(derivative)


@cache
def savgol_matrix(samples: int, window: int, order: int, derivative: int = 0, delta: float = 1.0) -> Float[Tensor, "T T"]:
    """The Savitzky-Golay filter as a matrix (scipy.signal.savgol_filter, mode "interp").

    With an even window the devkit's 8 samples reach from i - 3 to i + 4 and the parabola is read at i + 0.5, not at i;
    the first and last window // 2 outputs are read from the fits to the first and last samples, at their own places.
    """
    half = window // 2
    matrix = torch.zeros(samples, samples, dtype=torch.float64)
    for i in range(samples):
        if half <= i < samples - half:
            first, at = i - (window - 1) // 2, (window - 1) / 2.0
        else:
            first = 0 if i < half else samples - window
            at = i - first
        matrix[i, first : first + window] = fit_weights(window, order, derivative, at)
    return matrix / delta**derivative


def smooth(signal: Float[Tensor, "N T"], window: int, order: int = 2, derivative: int = 0) -> Float[Tensor, "N T"]:
    """Filtered or differentiated signal, rounded to 8 decimals (navsim pdm_comfort_metrics.py)."""
    matrix = savgol_matrix(signal.shape[-1], window, order, derivative, STEP)
    return (signal @ matrix.T * 1e8).round() / 1e8


def phase_unwrap(heading: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Headings without jumps of full turns (navsim pdm_comfort_metrics.py _phase_unwrap)."""
    turns = torch.zeros_like(heading)
    turns[..., 1:] = (heading.diff(dim=-1) / (2.0 * math.pi)).round().cumsum(-1)
    return heading - 2.0 * math.pi * turns


def acceleration_magnitude(states: Float[Tensor, "N T 11"]) -> Float[Tensor, "N T"]:
    return torch.hypot(states[..., StateIndex.AX], states[..., StateIndex.AY])


def comfort_signals(states: Float[Tensor, "N T 11"]) -> Float[Tensor, "N 6 T"]:
    """Lon and lat acceleration, jerk, lon jerk, yaw acceleration, yaw rate at 0.1 s (navsim pdm_comfort_metrics.py).

    The shift from rear axle to centre puts both the w^2 and the dw/dt term on the x axis (pdm_geometry_utils.py
    get_acceleration_shifted), so lateral acceleration never contains v * w. Yaw windows are 5: the 15 is not passed on.
    """
    states = states.double()
    spin = states[..., StateIndex.ANGULAR_VELOCITY] ** 2
    lon = states[..., StateIndex.AX] + REAR_AXLE_TO_CENTRE * spin + REAR_AXLE_TO_CENTRE * states[..., StateIndex.ANGULAR_ACCELERATION]
    heading = phase_unwrap(states[..., StateIndex.HEADING])
    signals = [
        smooth(lon, 8),
        smooth(states[..., StateIndex.AY], 8),
        smooth(smooth(acceleration_magnitude(states), 8), 15, derivative=1),
        smooth(smooth(lon, 8), 15, derivative=1),
        smooth(heading, 5, order=3, derivative=2),
        smooth(heading, 5, derivative=1),
    ]
    return torch.stack(signals, 1)


def comfort_signals_v1(states: Float[Tensor, "N 41 11"]) -> Float[Tensor, "N 6 41"]:
    """The same of v1: accelerations of the rear axle, smoothed and differentiated with one parabola over all samples.

    Only the acceleration that is differentiated is smoothed over 8 samples.
    """
    states, whole = states.double(), states.shape[1]
    lon, lat = states[..., StateIndex.AX], states[..., StateIndex.AY]
    heading = phase_unwrap(states[..., StateIndex.HEADING])
    signals = [
        smooth(lon, whole),
        smooth(lat, whole),
        smooth(smooth(acceleration_magnitude(states), 8), whole, derivative=1),
        smooth(smooth(lon, 8), whole, derivative=1),
        smooth(heading, 5, order=3, derivative=2),
        smooth(heading, 5, derivative=1),
    ]
    return torch.stack(signals, 1)


def within_bounds(signals: Float[Tensor, "N 6 T"]) -> Bool[Tensor, "N 6"]:
    """Strictly within COMFORT_BOUNDS at every sample (navsim pdm_comfort_metrics.py _within_bound)."""
    low, high = torch.tensor(COMFORT_BOUNDS, dtype=torch.float64).unbind(-1)
    return ((signals > low[:, None]) & (signals < high[:, None])).all(-1)


def comfort(states: Float[Tensor, "N T 11"]) -> Bool[Tensor, "N 6"]:
    """Which comfort signals stay within bounds (navsim pdm_comfort_metrics.py ego_is_comfortable)."""
    return within_bounds(comfort_signals(states))


def comfort_v1(states: Float[Tensor, "N 41 11"]) -> Bool[Tensor, "N 6"]:
    """The same of PDMS v1: `comfort_v1(states).all(-1)` is its comfort."""
    return within_bounds(comfort_signals_v1(states))


def history(time_us: Int[Tensor, " H"], logged: Float[Tensor, "H 8"]) -> Float[Tensor, "n 11"]:
    """Logged ego states (x y heading vx vy ax ay steering) at 0.1 s up to the present (navsim pdm_scorer.py _calculate_history_comfort).

    The devkit drops the last sample, so after exact time stamps a gap of 0.2 s lies before the first simulated state
    and counts as 0.1 s. Rates of steering and yaw are 0.
    """
    query = torch.arange(int(time_us[0]), int(time_us[-1]), 100_000)[None, :-1]
    knots, logged = time_us[None], logged.double()
    poses = through_centre(resample(query, knots, through_centre(logged[None, :, :3])))[0]
    others = interpolate_linearly(query, knots, logged[None, :, 3:])[0]
    return torch.cat([poses, others, torch.zeros(len(poses), 3, dtype=torch.float64)], -1)


def history_comfort(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Bool[Tensor, "N 6"]:
    """HC, signal by signal: comfort of history and simulation in one (navsim pdm_scorer.py _calculate_history_comfort)."""
    past = history(scene.history_time_us[0], scene.history[0])
    return comfort(torch.cat([past.expand(len(states), -1, -1), states], 1))


def extended_comfort_signals(states: Float[Tensor, "N T 11"]) -> Float[Tensor, "N 4 T"]:
    """Acceleration, jerk, yaw rate, yaw acceleration (navsim pdm_comfort_metrics.py extract_features)."""
    acceleration = smooth(acceleration_magnitude(states), 8)
    heading = phase_unwrap(states[..., StateIndex.HEADING])
    signals = [acceleration, smooth(acceleration, 15, derivative=1), smooth(heading, 5, derivative=1), smooth(heading, 5, derivative=2)]
    return torch.stack(signals, 1)


def extended_comfort(
    states: Float[Tensor, "N 41 11"], previous: Float[Tensor, "N 41 11"], shift: int
) -> tuple[Bool[Tensor, " N"], Float[Tensor, "N 4"]]:
    """EC and the rms differences behind it, where the plans of two frames `shift` steps apart overlap.

    navsim scene_aggregator.py _compute_two_frame_comfort, pdm_comfort_metrics.py ego_is_two_frame_extended_comfort.
    """
    now = extended_comfort_signals(states.double()[:, :-shift])
    before = extended_comfort_signals(previous.double()[:, shift:])
    rms = ((now - before) ** 2).mean(-1).sqrt()
    return (rms <= torch.tensor(EXTENDED_COMFORT_BOUNDS, dtype=torch.float64)).all(-1), rms


def frame_shift(scene: Scene) -> int:
    """Steps between the previous frame and this one (navsim scene_aggregator.py _compute_two_frame_comfort)."""
    return round((int(scene.time_us[0]) * 1e-6 - int(scene.previous_time_us[0]) * 1e-6) / STEP)


# --- scores ---------------------------------------------------------------------------------------------------------


def measure(scene: Scene, states: Float[Tensor, "N 41 11"], *, remove_touching: bool) -> tuple[Float[Tensor, "N 9"], Details]:
    """Sub-metrics in METRICS order, EP and EC missing, and what led to them (navsim pdm_scorer.py score_proposals)."""
    agents, areas = agents_of(scene, remove_touching=remove_touching), areas_of(scene, states)
    collision = no_at_fault_collision(states, agents, areas)
    # The devkit stops where the last projection would leave the 41 steps.
    ttc = time_to_collision_within_bound(states, agents, areas, STEPS - max(TTC_OFFSETS))
    metres = oncoming_metres(states, areas.off_route & ~areas.centre_in_intersection)
    red_light = first_red_light(scene, states)
    off_centre = longest_off_centre_run(scene, states, areas)
    comfortable = history_comfort(scene, states)
    missing = torch.full((len(states),), math.nan, dtype=torch.float64)
    columns = {
        "nc": collision.value,
        "dac": drivable_area_compliance(areas),
        "ddc": driving_direction_compliance(metres),
        "tlc": (~red_light.any(-1)).double(),
        "ep": missing,
        "ttc": ttc.value,
        "lk": (off_centre < OFF_CENTRE_STEPS).double(),
        "hc": comfortable.all(-1).double(),
        "ec": missing,
    }
    details = Details(
        states=states,
        progress=progress_along(scene, states),
        reference_progress=missing,
        collision_step=collision.step,
        collision_agent=collision.agent,
        ttc_step=ttc.step,
        ttc_agent=ttc.agent,
        multiple_lanes=areas.multiple_lanes,
        off_road=areas.off_road,
        off_route=areas.off_route,
        in_intersection=areas.centre_in_intersection,
        red_light=red_light,
        oncoming_metres=metres,
        off_centre_steps=off_centre,
        comfort=comfortable,
    )
    return torch.stack([columns[name] for name in METRICS], -1), details


def multiplier(values: Float[Tensor, "N 9"]) -> Float[Tensor, " N"]:
    """Product of the multiplicative metrics NC, DAC, DDC, TLC."""
    return values[:, :4].prod(-1)


def measure_v1(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Float[Tensor, "N 6"]:
    """PDMS v1 sub-metrics (columns of `Pdms`) with metres along the centreline in place of EP.

    v1 keeps agents in contact at t = 0, has no lights, looks 0.9 s ahead from every step and exempts no intersection.
    """
    if scene.agent_state.shape[1] < STEPS + max(TTC_OFFSETS):
        raise InputError(f"PDMS v1 looks 4.9 s ahead: agents need 50 or more steps of 0.1 s, this scene has {scene.agent_state.shape[1]}")
    agents, areas = agents_of(scene, remove_touching=False), areas_of(scene, states)
    columns = [
        no_at_fault_collision(states, agents, areas).value,
        drivable_area_compliance(areas),
        progress_along(scene, states),
        time_to_collision_within_bound(states, agents, areas, STEPS).value,
        comfort_v1(states).all(-1).double(),
        driving_direction_compliance(oncoming_metres(states, areas.off_route)),
    ]
    return torch.stack(columns, -1)


def score_v1(scene: Scene, states: Float[Tensor, "N 41 11"], reference: Float[Tensor, "1 41 11"]) -> Pdms:
    """PDMS v1 against the reference (v1 pdm_scorer.py _aggregate_scores): violations count above and below the line of EP."""
    values, reference_values = measure_v1(scene, states), measure_v1(scene, reference)
    lawful = values[:, 0] * values[:, 1]
    progress = values[:, 2] * lawful
    best = torch.maximum(progress, reference_values[:, :3].prod(-1))
    values[:, 2] = torch.where(best > PROGRESS_THRESHOLD, progress / best, (lawful != 0.0).double())
    return Pdms(values)


def only_scene(scene: Scene) -> Scene:
    """The scene, in float64 on the CPU; an error if it is a batch of several."""
    if len(scene) != 1:
        raise InputError(f"the reference scores one scene at a time, got {len(scene)}; pick one with scene[i]")
    return scene.to("cpu", torch.float64)


def reference_states(scene: Scene) -> Float[Tensor, "1 41 11"]:
    """The PDM-Closed plan of a scene, simulated."""
    if scene.reference.isnan().any():
        raise InputError("scene.reference is NaN, so there is no PDM-Closed plan to measure progress against; compute it first")
    return track(interpolate_reference(scene.reference, scene.ego, scene.time_us), scene.ego)


def epdms(
    scene: Scene,
    states: Float[Tensor, "N 41 11"],
    *,
    reference: Float[Tensor, "1 41 11"] | None = None,
    remove_touching: bool = True,
    pdms: bool = False,
) -> Epdms:
    """Sub-metrics of N simulated candidates in a scene of one, before any human filter, EC missing (NaN), with details.

    Progress is compared with the simulated `reference`, by default the scene's own PDM-Closed plan.
    """
    scene, states = only_scene(scene), states.double()
    reference = reference_states(scene) if reference is None else reference
    values, details = measure(scene, states, remove_touching=remove_touching)
    reference_values, reference_details = measure(scene, reference, remove_touching=remove_touching)
    lawful_reference = (reference_details.progress * multiplier(reference_values)).expand(len(states))
    values[:, METRICS.index("ep")] = ego_progress(details.progress, multiplier(values), lawful_reference)
    details = replace(details, reference_progress=lawful_reference)
    return Epdms(values, details=details, pdms=score_v1(scene, states, reference) if pdms else None)


def human_values(scene: Scene, *, remove_touching: bool) -> Float[Tensor, "1 9"] | None:
    """Sub-metrics of the human drive, scored alone and without history as the devkit does (navsim pdm_score.py); None if there is none.

    Alone, its EP is 1; without history, its HC is 1.
    """
    if scene.human_values is not None:
        return scene.human_values
    if scene.human.numel() == 0 or scene.human.isnan().any():
        return None
    states = simulate(scene.human, scene.ego, scene.time_us, scene.human_dt)
    values = epdms(scene, states, reference=states, remove_touching=remove_touching).values
    values[:, METRICS.index("hc")] = 1.0
    return values


def filter_by_human(values: Float[Tensor, "N 9"], human: Float[Tensor, "1 9"]) -> Float[Tensor, "N 9"]:
    """1 wherever the human scored exactly 0, EC apart (navsim pdm_score.py human_penalty_filter)."""
    forgiven = human == 0.0
    forgiven[:, METRICS.index("ec")] = False
    return torch.where(forgiven, 1.0, values)


def score_scene(
    scene: Scene,
    plans: Float[Tensor, "N T 3"],
    dt: float = 0.5,
    *,
    remove_touching: bool = True,
    previous_states: Float[Tensor, "N 41 11"] | None = None,
    human_filter: Literal["fixed", "legacy", "none"] = "fixed",
    pdms: bool = False,
) -> Epdms:
    """EPDMS of N plans in a scene of one: simulation, sub-metrics, EP against PDM-Closed, EC, human filter.

    `previous_states` are the simulated states of the previous frame's plan for each candidate. The filter `legacy` is
    that of the devkit before commit 359c7f7, which changed columns but not the score (see `Epdms.score`).
    """
    scene = only_scene(scene)
    ego, time_us = scene.ego.expand(len(plans), -1), scene.time_us.expand(len(plans))
    states = simulate(plans, ego, time_us, dt)
    result = epdms(scene, states, remove_touching=remove_touching, pdms=pdms)
    raw = result.values
    if previous_states is not None:
        raw[:, METRICS.index("ec")] = extended_comfort(states, previous_states, frame_shift(scene))[0].double()
    if human_filter == "none":
        return result
    human = human_values(scene, remove_touching=remove_touching)
    values = raw.clone() if human is None else filter_by_human(raw, human)
    return Epdms(values, raw=raw, human_filter=human_filter, details=result.details, pdms=result.pdms)
