"""From a plan to simulated states: angles, interpolation, the tracker (LQR) and the vehicle (kinematic bicycle)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from irlvla.errors import InputError
from irlvla.types import HORIZON, REAR_AXLE_TO_CENTRE, STEP, STEPS, WHEEL_BASE, StateIndex

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
