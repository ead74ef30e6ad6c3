// Elementary functions and exact planar predicates: inline, host and device; no allocation, no I/O, no library calls.
//
// Functions templated on R take a double or a pack of doubles (one lane per trajectory). Only +, -, *, /, sqrt and
// comparisons are used and no multiply-add is ever contracted, so every instruction set and the GPU return the same bits.
// (The C library is asked once, for the sines of recorded boxes: scene.cpp.)
#pragma once
#include <stdint.h>

#ifdef __CUDACC__
#define IRLVLA_HD __host__ __device__ inline
#define IRLVLA_HD_CALLED __noinline__ IRLVLA_HD  // too large for a compiler of GPU code to inline wherever it is called
#else
#define IRLVLA_HD inline
#define IRLVLA_HD_CALLED inline
#endif

#ifndef IRLVLA_ISA
#define IRLVLA_ISA baseline
#endif

namespace irlvla {
namespace IRLVLA_ISA {

constexpr double kPi = 3.141592653589793;
constexpr double kHalfPi = 1.5707963267948966;
constexpr double kTwoPi = 6.283185307179586;
constexpr double kInfinity = __builtin_huge_val();

#ifdef __CUDACC__
IRLVLA_HD double not_a_number() { return nan(""); }
IRLVLA_HD double absolute(double x) { return fabs(x); }
IRLVLA_HD double square_root(double x) { return sqrt(x); }
#else
IRLVLA_HD double not_a_number() { return __builtin_nan(""); }
IRLVLA_HD double absolute(double x) { return __builtin_fabs(x); }
IRLVLA_HD double square_root(double x) { return __builtin_sqrt(x); }
#endif
IRLVLA_HD double smaller(double a, double b) { return b < a ? b : a; }
IRLVLA_HD double larger(double a, double b) { return a < b ? b : a; }

IRLVLA_HD int lowest_bit(uint64_t mask) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(mask)) - 1;
#else
  return __builtin_ctzll(mask);
#endif
}

/// Eight bytes, each 0 or 1, as bits.
IRLVLA_HD uint64_t eight_bits(const uint8_t* bytes) {
  uint64_t mask = 0;
#ifdef __CUDA_ARCH__
  for (int k = 0; k < 8; ++k) mask |= static_cast<uint64_t>(bytes[k]) << k;
#else
  __builtin_memcpy(&mask, bytes, 8);
  mask = (mask * 0x0102040810204080ull) >> 56;
#endif
  return mask;
}

#ifndef __CUDACC__
constexpr int kLanes = 8;
typedef double Pack __attribute__((vector_size(8 * kLanes)));
typedef double Pair __attribute__((vector_size(16)));

inline Pack square_root(Pack x) {
  Pack result;
  for (int i = 0; i < kLanes; ++i) result[i] = __builtin_sqrt(x[i]);
  return result;
}
#endif

template <class R> IRLVLA_HD R splat(double value) { return R{} + value; }

/// Nearest integer, ties to even, for |x| < 2^51.
template <class R> IRLVLA_HD R nearest(R x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  return (x + kShift) - kShift;
}

template <class R> IRLVLA_HD R floor_of(R x) {
  const R n = nearest(x);
  return n > x ? n - 1.0 : n;
}

// pi/2 in three parts of 33, 33 and 53 bits: n times the first two is exact for |n| < 2^20 (fdlibm e_rem_pio2).
constexpr double kHalfPi1 = 1.57079632673412561417e+00;
constexpr double kHalfPi2 = 6.07710050630396597660e-11;
constexpr double kHalfPi3 = 2.02226624879595063154e-21;

/// Sine and cosine, below one unit in the last place for |x| < 1e6 (polynomials of fdlibm k_sin, k_cos).
template <class R> IRLVLA_HD void sine_cosine(R x, R& sine, R& cosine) {
  const R n = nearest(x * 6.36619772367581382433e-01);
  const R r = x - n * kHalfPi1;
  const R w = n * kHalfPi2;
  const R t = r - w;
  const R tail = n * kHalfPi3 - ((r - t) - w);
  const R y = t - tail, y_low = (t - y) - tail;
  const R z = y * y;
  const R ps = 8.33333333332248946124e-03 +
               z * (-1.98412698298579493134e-04 +
                    z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)));
  const R s = y - ((z * (0.5 * y_low - z * y * ps) - y_low) - z * y * -1.66666666666666324348e-01);
  const R pc = z * (4.16666666666666019037e-02 +
                    z * (-1.38888888888741095749e-03 +
                         z * (2.48015872894767294178e-05 +
                              z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
  const R half = 0.5 * z, top = 1.0 - half;
  const R c = top + (((1.0 - top) - half) + (z * pc - y * y_low));
  const R quadrant = n - 4.0 * nearest(n * 0.25 - 0.375);
  const auto odd = (quadrant == 1.0) | (quadrant == 3.0);
  const R s_abs = odd ? c : s, c_abs = odd ? s : c;
  sine = quadrant >= 2.0 ? -s_abs : s_abs;
  cosine = ((quadrant == 1.0) | (quadrant == 2.0)) ? -c_abs : c_abs;
}

/// Sines and cosines of many angles.
IRLVLA_HD void sines_cosines(const double* angle, int count, double* sine, double* cosine) {
#ifdef __CUDACC__
  for (int i = 0; i < count; ++i) sine_cosine(angle[i], sine[i], cosine[i]);
#else
  for (int i = 0; i < count; i += kLanes) {
    const int bytes = 8 * (count - i < kLanes ? count - i : kLanes);
    Pack a{}, s, c;
    __builtin_memcpy(&a, angle + i, bytes);
    sine_cosine(a, s, c);
    __builtin_memcpy(sine + i, &s, bytes), __builtin_memcpy(cosine + i, &c, bytes);
  }
#endif
}

/// Sine and cosine of a heading and of the direction to its left.
IRLVLA_HD void directions(double heading, double& sine, double& cosine, double& lateral_sine, double& lateral_cosine) {
#ifdef __CUDACC__
  sine_cosine(heading, sine, cosine);
  sine_cosine(heading + kHalfPi, lateral_sine, lateral_cosine);
#else
  Pair s, c;
  sine_cosine(Pair{heading, heading + kHalfPi}, s, c);
  sine = s[0], lateral_sine = s[1], cosine = c[0], lateral_cosine = c[1];
#endif
}

/// atan2(sin a, cos a): the angle in [-pi, pi].
template <class R> IRLVLA_HD R wrap(R a) {
  const R n = nearest(a * 1.59154943091895345608e-01);
  return ((a - n * (4.0 * kHalfPi1)) - n * (4.0 * kHalfPi2)) - n * (4.0 * kHalfPi3);
}

/// (a + pi) mod 2 pi - pi, in [-pi, pi): nuPlan's principal_value, rounding included.
template <class R> IRLVLA_HD R principal(R a) {
  const R t = a + kPi;
  R m = t - floor_of(t * 1.59154943091895345608e-01) * kTwoPi;
  m = m < 0.0 ? m + kTwoPi : m;
  m = m >= kTwoPi ? m - kTwoPi : m;
  return m - kPi;
}

/// What numpy.unwrap adds to all headings from here on, where they jump by `step`.
IRLVLA_HD double unwrapping(double step) {
  if (absolute(step) < kPi) return 0.0;
  const double turn = principal(step);
  return (turn == -kPi && step > 0.0 ? kPi : turn) - step;
}

/// The angle, 0 to pi, whose sine and cosine stand as y to x; y >= 0 (reduction and polynomial of fdlibm s_atan).
IRLVLA_HD double angle_between(double y, double x) {
  const double a = absolute(x), ratio = y / a;
  double high = 0.0, low = 0.0, t = ratio;
  if (!(ratio < 0.4375)) {
    if (ratio < 0.6875) {
      high = 4.63647609000806093515e-01, low = 2.26987774529616870924e-17, t = (2.0 * y - a) / (2.0 * a + y);
    } else if (ratio < 1.1875) {
      high = 7.85398163397448278999e-01, low = 3.06161699786838301793e-17, t = (y - a) / (y + a);
    } else if (ratio < 2.4375) {
      high = 9.82793723247329054082e-01, low = 1.39033110312309984516e-17, t = (y - 1.5 * a) / (a + 1.5 * y);
    } else {
      high = 1.57079632679489655800e+00, low = 6.12323399573676603587e-17, t = -a / y;
    }
  }
  const double z = t * t, w = z * z;
  const double odd = z * (3.33333333333329318027e-01 +
                          w * (1.42857142725034663711e-01 +
                               w * (9.09088713343650656196e-02 +
                                    w * (6.66107313738753120669e-02 + w * (4.97687799461593236017e-02 + w * 1.62858201153657823623e-02)))));
  const double even = w * (-1.99999999998764832476e-01 +
                           w * (-1.11111104054623557880e-01 +
                                w * (-7.69187620504482999495e-02 + w * (-5.83357013379057348645e-02 + w * -3.65315727442169155270e-02))));
  const double angle = high - ((t * (odd + even) - low) - t);
  return x < 0.0 ? kPi - angle : angle;
}

// --- exact orientation ----------------------------------------------------------------------------------------------

IRLVLA_HD void two_sum(double a, double b, double& sum, double& error) {
  const double s = a + b, bb = s - a;
  error = (a - (s - bb)) + (b - bb);
  sum = s;
}

IRLVLA_HD void two_product(double a, double b, double& product, double& error) {
  constexpr double kSplit = 134217729.0;  // 2^27 + 1 (Veltkamp, Dekker)
  const double p = a * b;
  const double ta = kSplit * a, ah = ta - (ta - a), al = a - ah;
  const double tb = kSplit * b, bh = tb - (tb - b), bl = b - bh;
  error = al * bl - (((p - ah * bh) - al * bh) - ah * bl);
  product = p;
}

/// A sum kept exactly as non-overlapping doubles (Shewchuk's grow-expansion).
struct ExactSum {
  double part[16];
  int size = 0;
  IRLVLA_HD void add(double value) {
    for (int i = 0; i < size; ++i) two_sum(value, part[i], value, part[i]);
    part[size++] = value;
  }
  IRLVLA_HD int sign() const {
    for (int i = size - 1; i >= 0; --i)
      if (part[i] != 0.0) return part[i] > 0.0 ? 1 : -1;
    return 0;
  }
};

IRLVLA_HD int exact_orientation(double ax, double ay, double bx, double by, double cx, double cy) {
  double u[2], v[2], w[2], z[2];  // exact differences, each a pair of doubles
  two_sum(ax, -cx, u[0], u[1]);
  two_sum(by, -cy, v[0], v[1]);
  two_sum(ay, -cy, w[0], w[1]);
  two_sum(bx, -cx, z[0], z[1]);
  ExactSum sum;  // the differences of points near each other mostly have no second part
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      double product, error;
      if (u[i] != 0.0 && v[j] != 0.0) two_product(u[i], v[j], product, error), sum.add(product), sum.add(error);
      if (w[i] != 0.0 && z[j] != 0.0) two_product(-w[i], z[j], product, error), sum.add(product), sum.add(error);
    }
  return sum.sign();
}

/// Sign of the area of (a, b, c): 1 if c lies left of a -> b, -1 right, 0 on the line. Exact for the given doubles, barring
/// underflow. GEOS decides what its filter leaves open in double-double, which errs where differences need more than 53
/// bits: in about one of two million points made to lie on edges.
IRLVLA_HD int orientation(double ax, double ay, double bx, double by, double cx, double cy) {
  const double left = (ax - cx) * (by - cy), right = (ay - cy) * (bx - cx);
  const double det = left - right, bound = 1e-15 * (absolute(left) + absolute(right));  // the filter of GEOS
  if (det > bound) return 1;
  if (-det > bound) return -1;
  return exact_orientation(ax, ay, bx, by, cx, cy);
}

// --- boxes ----------------------------------------------------------------------------------------------------------

/// Corners of a box, counter-clockwise: front left, rear left, rear right, front right.
struct Corners {
  double x[4], y[4];
};

/// Oriented box with its direction, for quick decisions.
struct Box {
  double x, y, cosine, sine, half_length, half_width;
};

/// A corner as nuPlan computes it: the lateral axis is cos/sin of (heading + pi/2), so the last bit agrees.
template <class R>
IRLVLA_HD void corner(R x, R y, R cosine, R sine, R lateral_cosine, R lateral_sine, R longitudinal, R lateral, R& cx, R& cy) {
  cx = x + (lateral * lateral_cosine + longitudinal * cosine);
  cy = y + (lateral * lateral_sine + longitudinal * sine);
}

IRLVLA_HD Corners box_corners(double x, double y, double c, double s, double lc, double ls, double half_length, double half_width) {
  Corners out;
  corner(x, y, c, s, lc, ls, half_length, half_width, out.x[0], out.y[0]);
  corner(x, y, c, s, lc, ls, -half_length, half_width, out.x[1], out.y[1]);
  corner(x, y, c, s, lc, ls, -half_length, -half_width, out.x[2], out.y[2]);
  corner(x, y, c, s, lc, ls, half_length, -half_width, out.x[3], out.y[3]);
  return out;
}

IRLVLA_HD Corners box_corners(double x, double y, double heading, double half_length, double half_width) {
  double s, c, ls, lc;
  directions(heading, s, c, ls, lc);
  return box_corners(x, y, c, s, lc, ls, half_length, half_width);
}

/// Largest separation along the four axes of two boxes: positive = apart, negative = overlapping [m].
IRLVLA_HD double separation(const Box& a, const Box& b) {
  const double dx = b.x - a.x, dy = b.y - a.y;
  const double c = absolute(a.cosine * b.cosine + a.sine * b.sine), s = absolute(a.cosine * b.sine - a.sine * b.cosine);
  const double along_a = absolute(dx * a.cosine + dy * a.sine) - (a.half_length + b.half_length * c + b.half_width * s);
  const double across_a = absolute(dy * a.cosine - dx * a.sine) - (a.half_width + b.half_length * s + b.half_width * c);
  const double along_b = absolute(dx * b.cosine + dy * b.sine) - (b.half_length + a.half_length * c + a.half_width * s);
  const double across_b = absolute(dy * b.cosine - dx * b.sine) - (b.half_width + a.half_length * s + a.half_width * c);
  return larger(larger(along_a, across_a), larger(along_b, across_b));
}

/// Beyond this distance from touching, rounding cannot decide (coordinates are below 1e8 m).
constexpr double kCertain = 1e-6;

/// True where some edge of `a` has all of `b` strictly on its right.
IRLVLA_HD bool edge_separates(const Corners& a, const Corners& b) {
  for (int i = 0; i < 4; ++i) {
    const int j = (i + 1) & 3;
    bool apart = true;
    for (int k = 0; k < 4 && apart; ++k) apart = orientation(a.x[i], a.y[i], a.x[j], a.y[j], b.x[k], b.y[k]) < 0;
    if (apart) return true;
  }
  return false;
}

/// Closed convex quadrilaterals share a point (GEOS intersects: touching counts). Exact for the given corners.
IRLVLA_HD bool overlap(const Corners& a, const Corners& b) { return !edge_separates(a, b) && !edge_separates(b, a); }

IRLVLA_HD bool within_bounds(double ax, double ay, double bx, double by, double px, double py) {
  return smaller(ax, bx) <= px && px <= larger(ax, bx) && smaller(ay, by) <= py && py <= larger(ay, by);
}

/// Closed segments a-b and c-d share a point.
IRLVLA_HD bool segments_touch(double ax, double ay, double bx, double by, double cx, double cy, double dx, double dy) {
  if (larger(ax, bx) < smaller(cx, dx) || larger(cx, dx) < smaller(ax, bx)) return false;
  if (larger(ay, by) < smaller(cy, dy) || larger(cy, dy) < smaller(ay, by)) return false;
  const int c = orientation(ax, ay, bx, by, cx, cy), d = orientation(ax, ay, bx, by, dx, dy);
  if (c * d > 0) return false;
  const int a = orientation(cx, cy, dx, dy, ax, ay), b = orientation(cx, cy, dx, dy, bx, by);
  return a * b <= 0;  // with overlapping bounds, collinear segments touch
}

/// The closed segment from corner i to corner j of `a` touches the closed box `b`.
IRLVLA_HD bool side_touches(const Corners& a, int i, int j, const Corners& b) {
  bool inside = true;
  for (int k = 0; k < 4; ++k) {
    const int l = (k + 1) & 3;
    if (segments_touch(a.x[i], a.y[i], a.x[j], a.y[j], b.x[k], b.y[k], b.x[l], b.y[l])) return true;
    inside = inside && orientation(b.x[k], b.y[k], b.x[l], b.y[l], a.x[i], a.y[i]) >= 0;
  }
  return inside;
}

/// Centroid of a box as GEOS sums it (area-weighted triangles from the first corner).
IRLVLA_HD void centroid(const Corners& p, double& x, double& y) {
  double sum_x = 0.0, sum_y = 0.0, area = 0.0;
  for (int i = 1; i < 3; ++i) {
    const double a = -((p.x[i] - p.x[0]) * (p.y[i + 1] - p.y[0]) - (p.x[i + 1] - p.x[0]) * (p.y[i] - p.y[0]));
    sum_x += a * (p.x[0] + p.x[i] + p.x[i + 1]);
    sum_y += a * (p.y[0] + p.y[i] + p.y[i + 1]);
    area += a;
  }
  x = sum_x / 3.0 / area;
  y = sum_y / 3.0 / area;
}

// --- polygons -------------------------------------------------------------------------------------------------------

/// A directed edge of a ring.
struct Edge {
  double x0, y0, x1, y1;
};

/// Where a point lies, by counting crossings of a ray to the right over all edges of all rings: 1 inside (holes
/// respected), 0 on the boundary, -1 outside. Exact (GEOS RayCrossingCounter).
IRLVLA_HD int locate(const Edge* edges, int count, double px, double py) {
  bool inside = false;
  for (int i = 0; i < count; ++i) {
    const Edge e = edges[i];
    if (e.x0 < px && e.x1 < px) continue;
    if (e.x1 == px && e.y1 == py) return 0;
    if (e.y0 == py && e.y1 == py) {
      if (smaller(e.x0, e.x1) <= px && px <= larger(e.x0, e.x1)) return 0;
      continue;
    }
    if ((e.y0 > py) == (e.y1 > py)) continue;
    const int side = orientation(e.x0, e.y0, e.x1, e.y1, px, py);
    if (side == 0) return 0;
    inside ^= (side > 0) == (e.y1 > e.y0);
  }
  return inside ? 1 : -1;
}

/// A closed box and a closed polygon (holes respected) share a point.
IRLVLA_HD bool box_touches_polygon(const Corners& box, const Edge* edges, int count) {
  double x0 = box.x[0], x1 = x0, y0 = box.y[0], y1 = y0;
  for (int k = 1; k < 4; ++k) {
    x0 = smaller(x0, box.x[k]), x1 = larger(x1, box.x[k]);
    y0 = smaller(y0, box.y[k]), y1 = larger(y1, box.y[k]);
  }
  for (int i = 0; i < count; ++i) {
    const Edge e = edges[i];
    if (larger(e.x0, e.x1) < x0 || x1 < smaller(e.x0, e.x1) || larger(e.y0, e.y1) < y0 || y1 < smaller(e.y0, e.y1)) continue;
    bool vertex_inside = true;
    for (int k = 0; k < 4; ++k) {
      const int l = (k + 1) & 3;
      if (segments_touch(e.x0, e.y0, e.x1, e.y1, box.x[k], box.y[k], box.x[l], box.y[l])) return true;
      vertex_inside = vertex_inside && orientation(box.x[k], box.y[k], box.x[l], box.y[l], e.x0, e.y0) > 0;
    }
    if (vertex_inside) return true;
  }
  return locate(edges, count, box.x[0], box.y[0]) > 0;
}

// --- polylines ------------------------------------------------------------------------------------------------------

IRLVLA_HD double length(const Edge& e) {
  const double dx = e.x1 - e.x0, dy = e.y1 - e.y0;
  return square_root(dx * dx + dy * dy);
}

/// Distance from a point to a closed segment, in the form of GEOS (Distance::pointToSegment).
IRLVLA_HD double segment_distance(const Edge& e, double px, double py) {
  const double dx = e.x1 - e.x0, dy = e.y1 - e.y0, length2 = dx * dx + dy * dy;
  const double ax = px - e.x0, ay = py - e.y0, r = (ax * dx + ay * dy) / length2;
  if (length2 == 0.0 || r <= 0.0) return square_root(ax * ax + ay * ay);
  if (r >= 1.0) {
    const double bx = px - e.x1, by = py - e.y1;
    return square_root(bx * bx + by * by);
  }
  const double s = ((e.y0 - py) * dx - (e.x0 - px) * dy) / length2;
  return absolute(s) * square_root(length2);
}

/// Share of the segment, 0 to 1, at which its point nearest to p lies.
IRLVLA_HD double segment_fraction(const Edge& e, double px, double py) {
  const double dx = e.x1 - e.x0, dy = e.y1 - e.y0, length2 = dx * dx + dy * dy;
  if (length2 == 0.0) return 0.0;
  const double r = ((px - e.x0) * dx + (py - e.y0) * dy) / length2;
  return r <= 0.0 ? 0.0 : r >= 1.0 ? 1.0 : r;
}

/// Segments are searched in blocks; a block farther away than a known distance is skipped.
constexpr int kBlock = 16;
struct Bounds {
  double x0, y0, x1, y1;
  IRLVLA_HD double distance2(double px, double py) const {
    const double dx = larger(0.0, larger(x0 - px, px - x1)), dy = larger(0.0, larger(y0 - py, py - y1));
    return dx * dx + dy * dy;
  }
  IRLVLA_HD bool contains(double px, double py) const { return x0 <= px && px <= x1 && y0 <= py && py <= y1; }
};

/// Distance along a polyline of the point nearest to p; among equals the first segment wins (GEOS line_locate_point).
IRLVLA_HD double locate_along(const Edge* segments, const double* start, const Bounds* blocks, int count, double px, double py, double& distance) {
  const int n_blocks = (count + kBlock - 1) / kBlock;
  int nearest_block = 0;
  double least = kInfinity;
  for (int b = 0; b < n_blocks; ++b) {
    const double d2 = blocks[b].distance2(px, py);
    if (d2 < least) least = d2, nearest_block = b;
  }
  double limit = kInfinity;
  for (int i = nearest_block * kBlock; i < count && i < (nearest_block + 1) * kBlock; ++i) limit = smaller(limit, segment_distance(segments[i], px, py));
  const double limit2 = limit * limit * (1.0 + 1e-9) + 1e-12;
  double best = kInfinity, along = 0.0;
  for (int b = 0; b < n_blocks; ++b) {
    if (blocks[b].distance2(px, py) > limit2) continue;
    for (int i = b * kBlock; i < count && i < (b + 1) * kBlock; ++i) {
      const double d = segment_distance(segments[i], px, py);
      if (d < best) {
        best = d;
        along = start[i] + segment_fraction(segments[i], px, py) * length(segments[i]);
      }
    }
  }
  distance = best;
  return along;
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
