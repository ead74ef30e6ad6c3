// History comfort and two-frame extended comfort, from simulated states alone. Inline, host and device. The rules are
// those of the NAVSIM v2.2 devkit (pdm_comfort_metrics.py, scene_aggregator.py).
#pragma once
#include "scene.h"

namespace irlvla {
namespace IRLVLA_ISA {

constexpr int kMaxSamples = kMaxHistory + kSteps;

/// Gram polynomials of n equally spaced samples: a least-squares fit is the sum of its projections onto them. Positions
/// are measured in samples from the middle of the window.
template <int n> struct Gram {
  static constexpr double n2 = static_cast<double>(n) * n;
  static constexpr double m2 = (n2 - 1.0) / 12.0, m4 = (3.0 * n2 * n2 - 10.0 * n2 + 7.0) / 240.0;  // mean powers of the positions
  static constexpr double m6 = (3.0 * n2 * n2 * n2 - 21.0 * n2 * n2 + 49.0 * n2 - 31.0) / 1344.0;
  static constexpr double c = m4 / m2;

  /// The d-th derivative of polynomial k at x.
  IRLVLA_HD static double at(int k, int d, double x) {
    if (k == 0) return d == 0 ? 1.0 : 0.0;
    if (k == 1) return d == 0 ? x : d == 1 ? 1.0 : 0.0;
    if (k == 2) return d == 0 ? x * x - m2 : d == 1 ? 2.0 * x : 2.0;
    return d == 0 ? x * (x * x - c) : d == 1 ? 3.0 * x * x - c : 6.0 * x;
  }

  /// Sum of the squares of polynomial k over the samples.
  IRLVLA_HD static double norm(int k) { return n * (k == 0 ? 1.0 : k == 1 ? m2 : k == 2 ? m4 - m2 * m2 : m6 - c * m4); }
};

template <class R> IRLVLA_HD R round8(R x) { return nearest(x * 1e8) / 1e8; }

/// The d-th derivative at `half` positions from `first` on of the fit of degree p to the n samples y, per 0.1 s.
template <int n, int p, int d, class R> IRLVLA_HD void fit_end(const R* y, double first, R* out) {
  constexpr double scale = d == 0 ? 1.0 : d == 1 ? 1.0 / kStep : 1.0 / (kStep * kStep);
  R projection[p + 1];
  for (int k = 0; k <= p; ++k) {
    projection[k] = splat<R>(0.0);
    for (int j = 0; j < n; ++j) projection[k] = projection[k] + Gram<n>::at(k, 0, j - (n - 1) / 2.0) * y[j];
  }
  for (int i = 0; i < n / 2; ++i) {
    R value = splat<R>(0.0);
    for (int k = 0; k <= p; ++k) value = value + Gram<n>::at(k, d, first + i) * scale / Gram<n>::norm(k) * projection[k];
    out[i] = round8(value);
  }
}

/// scipy.signal.savgol_filter(mode="interp"), then numpy.round(8). With an even window the middle of the window lies
/// between two samples: output i is the value at i + 1/2.
template <int n, int p, int d, class R> IRLVLA_HD void savgol(const R* y, int count, R* out) {
  constexpr int half = n / 2, lead = (n - 1) / 2;
  constexpr double scale = d == 0 ? 1.0 : d == 1 ? 1.0 / kStep : 1.0 / (kStep * kStep);
  double weight[n];
  for (int j = 0; j < n; ++j) {
    weight[j] = 0.0;
    for (int k = 0; k <= p; ++k) weight[j] += Gram<n>::at(k, 0, j - (n - 1) / 2.0) * Gram<n>::at(k, d, 0.0) * scale / Gram<n>::norm(k);
  }
  for (int i = half; i < count - half; ++i) {
    R sum = splat<R>(0.0);
    for (int j = 0; j < n; ++j) sum = sum + weight[j] * y[i - lead + j];
    out[i] = round8(sum);
  }
  fit_end<n, p, d>(y, -(n - 1) / 2.0, out);
  fit_end<n, p, d>(y + count - n, (n - half) - (n - 1) / 2.0, out + count - half);
}

template <class R> IRLVLA_HD R magnitude(R x, R y) { return square_root(x * x + y * y); }

/// Subtract 2 pi times the rounded turns (_phase_unwrap), in place.
template <class R> IRLVLA_HD void unwrap(R* heading, int count) {
  R turns = splat<R>(0.0), last = heading[0];
  for (int i = 1; i < count; ++i) {
    const R raw = heading[i];
    turns = turns + nearest((raw - last) / kTwoPi);
    last = raw;
    heading[i] = raw - kTwoPi * turns;
  }
}

template <class R> struct Comfort {
  typedef decltype(R{} < R{}) Mask;
  Mask within[6];  // lon acc, lat acc, jerk, lon jerk, yaw acc, yaw rate
};

template <class R> IRLVLA_HD typename Comfort<R>::Mask within(const R* signal, int count, double low, double high) {
  typename Comfort<R>::Mask all = splat<R>(0.0) == 0.0;
  for (int i = 0; i < count; ++i) all = all & ((signal[i] > low) & (signal[i] < high));
  return all;
}

/// The six limits over `count` samples of longitudinal and lateral acceleration, their magnitude, and heading. `n` is
/// the smoothing window, `m` that of the jerks. Overwrites `heading`.
template <int n, int m, class R>
IRLVLA_HD Comfort<R> comfort(const R* lon, const R* lat, const R* total, R* heading, int count) {
  Comfort<R> out;
  R smooth[kMaxSamples], rate[kMaxSamples];
  savgol<n, 2, 0>(lon, count, smooth);
  out.within[0] = within(smooth, count, -4.05, 2.40);
  if (n != 8) savgol<8, 2, 0>(lon, count, smooth);
  savgol<m, 2, 1>(smooth, count, rate);
  out.within[3] = within(rate, count, -4.13, 4.13);
  savgol<n, 2, 0>(lat, count, smooth);
  out.within[1] = within(smooth, count, -4.89, 4.89);
  savgol<8, 2, 0>(total, count, smooth);
  savgol<m, 2, 1>(smooth, count, rate);
  out.within[2] = within(rate, count, -8.37, 8.37);
  unwrap(heading, count);
  savgol<5, 3, 2>(heading, count, rate);
  out.within[4] = within(rate, count, -1.93, 1.93);
  savgol<5, 2, 1>(heading, count, rate);
  out.within[5] = within(rate, count, -0.95, 0.95);
  return out;
}

/// Longitudinal acceleration of the box centre: nuPlan's formula, whose two rotational terms both go to this axis, so the
/// lateral one never contains v w.
template <class R> IRLVLA_HD R centre_acceleration(const State<R>& s) {
  return s.ax + kRearToCentre * (s.angular_velocity * s.angular_velocity) + kRearToCentre * s.angular_acceleration;
}

/// History comfort: the logged samples, then the simulated states.
template <class R>
IRLVLA_HD Comfort<R> history_comfort(const State<R>* states, int samples, const double* ax, const double* ay, const double* heading) {
  R lon[kMaxSamples], lat[kMaxSamples], total[kMaxSamples], yaw[kMaxSamples];
  for (int i = 0; i < samples; ++i) {
    lon[i] = splat<R>(ax[i]), lat[i] = splat<R>(ay[i]), yaw[i] = splat<R>(heading[i]);
    total[i] = magnitude(lon[i], lat[i]);
  }
  for (int t = 0; t < kSteps; ++t) {
    const State<R>& s = states[t];
    const int i = samples + t;
    lon[i] = centre_acceleration(s);
    lat[i] = s.ay, yaw[i] = s.heading;
    total[i] = magnitude(s.ax, s.ay);
  }
  return comfort<8, 15>(lon, lat, total, yaw, samples + kSteps);
}

/// Comfort of PDMS (v1): the simulated states alone, rear-axle accelerations, one parabola over all 41 samples.
template <class R> IRLVLA_HD Comfort<R> plain_comfort(const State<R>* states) {
  R lon[kMaxSamples], lat[kMaxSamples], total[kMaxSamples], yaw[kMaxSamples];
  for (int t = 0; t < kSteps; ++t) {
    lon[t] = states[t].ax, lat[t] = states[t].ay, yaw[t] = states[t].heading;
    total[t] = magnitude(states[t].ax, states[t].ay);
  }
  return comfort<kSteps, kSteps>(lon, lat, total, yaw, kSteps);
}

/// Root mean squares of the differences of acceleration, jerk, yaw rate and yaw acceleration between a plan's states
/// and those of the plan `shift` steps before, over the common 41 - shift steps (scene_aggregator.py). Acceleration is
/// a magnitude: braking and accelerating look alike.
template <class R> IRLVLA_HD void comfort_differences(const State<R>* now, const State<R>* before, int shift, R* rms) {
  const int count = kSteps - shift;
  R signal[2][4][kSteps], total[kSteps], yaw[kSteps];
  for (int f = 0; f < 2; ++f) {
    const State<R>* s = f ? before + shift : now;
    for (int t = 0; t < count; ++t) total[t] = magnitude(s[t].ax, s[t].ay), yaw[t] = s[t].heading;
    savgol<8, 2, 0>(total, count, signal[f][0]);
    savgol<15, 2, 1>(signal[f][0], count, signal[f][1]);
    unwrap(yaw, count);
    savgol<5, 2, 1>(yaw, count, signal[f][2]);
    savgol<5, 2, 2>(yaw, count, signal[f][3]);
  }
  for (int k = 0; k < 4; ++k) {
    R sum = splat<R>(0.0);
    for (int t = 0; t < count; ++t) {
      const R difference = signal[0][k][t] - signal[1][k][t];
      sum = sum + difference * difference;
    }
    rms[k] = square_root(sum / static_cast<double>(count));
  }
}

/// Limits of the four differences.
IRLVLA_HD constexpr double extended_limit(int k) { return k == 0 ? 0.7 : k == 1 ? 0.5 : 0.1; }

}  // namespace IRLVLA_ISA
}  // namespace irlvla
