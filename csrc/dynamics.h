// From a plan to 41 simulated states: interpolation, LQR tracker, kinematic bicycle. Inline, host and device.
// The rules are those of the NAVSIM v2.2 devkit, its quirks included: the official score depends on them.
#pragma once
#include "geometry.h"

namespace irlvla {
namespace IRLVLA_ISA {

constexpr int kSteps = 41;      // 0 ... 4.0 s
constexpr int kStateSize = 11;  // columns of StateIndex
constexpr double kStep = 0.1;

// Chrysler Pacifica (nuPlan get_pacifica_parameters); the pose of a vehicle is its rear axle.
constexpr double kWheelBase = 3.089;
constexpr double kHalfLength = (4.049 + 1.127) / 2.0;
constexpr double kHalfWidth = (1.1485 * 2.0) / 2.0;
constexpr double kRearToCentre = kHalfLength - 1.127;

template <class R> struct State {
  R x, y, heading, vx, vy, ax, ay, steering, steering_rate, angular_velocity, angular_acceleration;
};

template <class R> struct Pose {
  R x, y, heading;
};

/// nuPlan stores the centre of the box and derives the rear axle from it: the position of state 0 makes a round trip
/// that can cost its last bit (car_footprint.py).
template <class R> IRLVLA_HD void round_trip(State<R>& ego) {
  R s, c;
  sine_cosine(ego.heading, s, c);
  ego.x = (ego.x + kRearToCentre * c) + -kRearToCentre * c;
  ego.y = (ego.y + kRearToCentre * s) + -kRearToCentre * s;
}

// --- 1. reference poses ---------------------------------------------------------------------------------------------

/// Linear interpolation of knots at rising times onto the 41 query times. Time stamps are whole microseconds, truncated:
/// with epochs of 1.6e15 us a key or query can come 1 us early (pdm_score.py get_trajectory_as_array, transform_utils.py).
/// `next(i, knot, time)` yields knot i = 0 ... knots - 1; headings are unwrapped on the way.
template <class Next, class Put> IRLVLA_HD void interpolate(int knots, int64_t time_us, Next next, Put put) {
  const double start_s = static_cast<double>(time_us) * 1e-6;
  Pose<double> low, high;
  double low_time, high_time;
  next(0, high, high_time);
  const double first_time = high_time;
  low = high, low_time = high_time;
  double turns = 0.0, last_heading = high.heading;
  int reached = 0;
  for (int k = 0; k < kSteps; ++k) {
    const double query = larger(static_cast<double>(static_cast<int64_t>((k * kStep + start_s) * 1e6)), first_time);
    while (query >= high_time && reached + 1 < knots) {
      low = high, low_time = high_time;
      next(++reached, high, high_time);
      turns += unwrapping(high.heading - last_heading);
      last_heading = high.heading;
      high.heading += turns;
    }
    if (query >= high_time || reached == 0) {
      put(k, Pose<double>{high.x, high.y, principal(high.heading)});
      continue;
    }
    const double span = high_time - low_time, passed = query - low_time;
    put(k, Pose<double>{(high.x - low.x) / span * passed + low.x, (high.y - low.y) / span * passed + low.y,
                        principal((high.heading - low.heading) / span * passed + low.heading)});
  }
}

/// Plan in the ego frame (n poses x y heading, at step, 2 step, ...) -> 41 reference poses in the map frame. Knot 0 is
/// the measured ego state, not the origin of the plan. `ego` has made its round trip.
template <class Put>
IRLVLA_HD void interpolate_plan(const double* plan, int poses, double step, int64_t time_us, const Pose<double>& ego, Put put) {
  double s, c;
  sine_cosine(ego.heading, s, c);
  interpolate(
      poses + 1, time_us,
      [&](int i, Pose<double>& knot, double& time) {
        if (i == 0) {
          knot = ego, time = static_cast<double>(time_us);
          return;
        }
        const double* p = plan + 3 * (i - 1);
        knot = {c * p[0] - s * p[1] + ego.x, s * p[0] + c * p[1] + ego.y, wrap(ego.heading + p[2])};
        const double seconds = ((i - 1) * step + step) + static_cast<double>(time_us) * 1e-6;
        time = static_cast<double>(static_cast<int64_t>(seconds * 1e6));
      },
      put);
}

/// 41 map-frame poses at t0 + k * 0.1 s (a PDM-Closed plan) -> 41 reference poses at the query times.
template <class Put> IRLVLA_HD void interpolate_poses(const double* poses, int64_t time_us, Put put) {
  interpolate(
      kSteps, time_us,
      [&](int i, Pose<double>& knot, double& time) {
        knot = {poses[3 * i], poses[3 * i + 1], poses[3 * i + 2]};
        time = static_cast<double>(time_us + i * 100000);
      },
      put);
}

// --- 2. velocity and curvature of the reference ---------------------------------------------------------------------

constexpr int kMoves = kSteps - 1;

/// Least-squares velocities v[0..39] of the displacements p[k] (along the heading, metres per 0.1 s).
///
/// batch_lqr_utils.py minimises |dxy - A x|^2 + 1e-4 |R x|^2 over x = (v0, a0 ... a38), and its R is *not* a difference
/// matrix: it is a ridge on a0 ... a36 and one true difference a38 - a37. Written in the velocities themselves
/// (a_k = (v_k+1 - v_k) / 0.1) both weights become 1:
///     sum_k (p_k / 0.1 - v_k)^2 + sum_{k<37} (v_k+1 - v_k)^2 + (v39 - 2 v38 + v37)^2,
/// a chain with one link of three at its end: two sweeps solve it without cancellation (devkit: a pinv of 40 x 40).
template <class R> IRLVLA_HD void fit_velocity(const R* p, R* v) {
  double information[kMoves];
  information[0] = 1.0;
  v[0] = p[0] / kStep;
  for (int k = 0; k < 37; ++k) {
    const double keep = 1.0 / (1.0 + information[k]);
    information[k + 1] = 1.0 + information[k] * keep;
    v[k + 1] = p[k + 1] / kStep + v[k] * keep;
  }
  const R q38 = p[38] / kStep, q39 = p[39] / kStep;
  const R bend = (q39 - 2.0 * q38 + v[37] / information[37]) / (6.0 + 1.0 / information[37]);
  v[37] = (v[37] - bend) / information[37];
  v[38] = q38 + 2.0 * bend;
  v[39] = q39 - bend;
  for (int k = 36; k >= 0; --k) v[k] = (v[k] + v[k + 1]) / (1.0 + information[k]);
}

/// Least-squares curvatures k[0..39] of the heading changes `turn` at the fitted velocities:
///     sum_k (turn_k - 0.1 v_k kappa_k)^2 + sum_k (kappa_k+1 - kappa_k)^2 + 1e-10 kappa_0^2,
/// again a chain; every term of the sweep is positive, so it stays accurate where the car stands.
template <class R> IRLVLA_HD void fit_curvature(const R* turn, const R* v, R* kappa) {
  R information[kMoves];
  R w = v[0] * kStep;
  information[0] = w * w + 1e-10;
  kappa[0] = w * turn[0];
  for (int k = 0; k + 1 < kMoves; ++k) {
    const R keep = 1.0 / (1.0 + information[k]);
    w = v[k + 1] * kStep;
    information[k + 1] = w * w + information[k] * keep;
    kappa[k + 1] = w * turn[k + 1] + kappa[k] * keep;
  }
  kappa[kMoves - 1] = kappa[kMoves - 1] / information[kMoves - 1];
  for (int k = kMoves - 2; k >= 0; --k) kappa[k] = (kappa[k] + kappa[k + 1]) / (1.0 + information[k]);
}

// --- 3. one control step --------------------------------------------------------------------------------------------

constexpr int kHorizon = 10;  // LQR look-ahead, steps

/// Acceleration and steering rate that track reference pose `ref` (batch_lqr.py); `kappa` are the next ten curvatures.
template <class R>
IRLVLA_HD void control(const State<R>& now, const Pose<R>& ref, R ref_sine, R ref_cosine, R ref_velocity, const R* kappa, int known, R& acceleration,
                       R& steering_rate) {
  constexpr double kGain = -1.0 / (1.0 * 10.0 * 1.0 + 1.0) * 1.0 * 10.0;
  const auto stopping = (ref_velocity <= 0.2) & (now.vx <= 0.2);
  const R error = now.vx - ref_velocity;
  acceleration = stopping ? -0.5 * error : kGain * error;

  const R ex = now.x - ref.x, ey = now.y - ref.y;
  R lateral = ey * ref_cosine - ex * ref_sine, heading = wrap(now.heading - ref.heading);
  R b0 = splat<R>(0.0), b1 = b0, gained = b0;
  double b2 = 0.0;
  for (int k = 0; k < kHorizon; ++k) {
    const R move = (now.vx + gained) * kStep;
    lateral = lateral + move * heading;
    heading = heading + move / kWheelBase * now.steering - move * kappa[k < known ? k : known];
    b0 = b0 + move * b1;
    b1 = b1 + move / kWheelBase * b2;
    b2 += kStep;
    gained = gained + acceleration * kStep;
  }
  heading = wrap(heading);
  const R rate = -(b0 * lateral + b1 * 10.0 * heading) / (b0 * b0 + b1 * 10.0 * b1 + 1.0);
  steering_rate = stopping ? splat<R>(0.0) : rate;
}

/// One step of the kinematic bicycle with first-order lag (batch_kinematic_bicycle.py). The position moves with the
/// *old* speed and steering; vx may turn negative; vy and ay are zero from step 1 on. `sine`, `cosine` are of now.heading.
template <class R>
IRLVLA_HD State<R> advance(const State<R>& now, R sine, R cosine, R acceleration, R steering_rate) {
  constexpr double dt = 100000 * 1e-6;  // TimePoint(100000).time_s: one unit in the last place under 0.1
  constexpr double kMaxSteering = kPi / 3.0;
  State<R> next;
  R s, c;
  sine_cosine(now.steering, s, c);
  next.ax = dt / (dt + 0.2) * (acceleration - now.ax) + now.ax;
  const R ideal = dt * steering_rate + now.steering;
  const R updated = dt / (dt + 0.05) * (ideal - now.steering) + now.steering;
  next.steering_rate = (updated - now.steering) / dt;
  next.x = now.x + now.vx * cosine * dt;
  next.y = now.y + now.vx * sine * dt;
  next.heading = principal(now.heading + now.vx * (s / c) / kWheelBase * dt);
  next.vx = now.vx + next.ax * dt;
  next.vy = next.ay = splat<R>(0.0);
  const R steering = now.steering + next.steering_rate * dt;
  next.steering = steering < -kMaxSteering ? splat<R>(-kMaxSteering) : steering > kMaxSteering ? splat<R>(kMaxSteering) : steering;
  sine_cosine(next.steering, s, c);
  next.angular_velocity = next.vx * (s / c) / kWheelBase;
  next.angular_acceleration = (next.angular_velocity - now.angular_velocity) / dt;
  return next;
}

/// Track 41 reference poses from `states[0]` (already set); sine and cosine of each simulated heading are kept.
template <class R> IRLVLA_HD void track(const Pose<R>* ref, State<R>* states, R* sine, R* cosine) {
  R ref_sine[kSteps], ref_cosine[kSteps], move[kMoves], turn[kMoves], velocity[kMoves], kappa[kMoves];
  for (int k = 0; k < kMoves; ++k) {
    sine_cosine(ref[k].heading, ref_sine[k], ref_cosine[k]);
    move[k] = ref_cosine[k] * (ref[k + 1].x - ref[k].x) + ref_sine[k] * (ref[k + 1].y - ref[k].y);
    turn[k] = wrap(ref[k + 1].heading - ref[k].heading);
  }
  fit_velocity(move, velocity);
  fit_curvature(turn, velocity, kappa);
  for (int k = 0; k < kMoves; ++k) {
    const int ahead = k + kHorizon < kMoves ? k + kHorizon : kMoves - 1;
    R acceleration, steering_rate;
    sine_cosine(states[k].heading, sine[k], cosine[k]);
    control(states[k], ref[k], ref_sine[k], ref_cosine[k], velocity[ahead], kappa + k, ahead - k, acceleration, steering_rate);
    states[k + 1] = advance(states[k], sine[k], cosine[k], acceleration, steering_rate);
  }
  sine_cosine(states[kMoves].heading, sine[kMoves], cosine[kMoves]);
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
