// Closed lines in the plane: whether the regions within touch, and how far apart they are. Inline, host and device.
#pragma once
#include "geometry.h"

namespace irlvla {
namespace IRLVLA_ISA {

IRLVLA_HD Bounds nothing() { return {kInfinity, kInfinity, -kInfinity, -kInfinity}; }
IRLVLA_HD bool meets(const Bounds& a, const Bounds& b) { return a.x0 <= b.x1 && b.x0 <= a.x1 && a.y0 <= b.y1 && b.y0 <= a.y1; }
IRLVLA_HD void include(Bounds& b, double x, double y) {
  b.x0 = smaller(b.x0, x), b.x1 = larger(b.x1, x), b.y0 = smaller(b.y0, y), b.y1 = larger(b.y1, y);
}
IRLVLA_HD Bounds both(const Bounds& a, const Bounds& b) {
  return {smaller(a.x0, b.x0), smaller(a.y0, b.y0), larger(a.x1, b.x1), larger(a.y1, b.y1)};
}
IRLVLA_HD double gap2(const Bounds& a, const Bounds& b) {
  const double dx = larger(0.0, larger(a.x0 - b.x1, b.x0 - a.x1)), dy = larger(0.0, larger(a.y0 - b.y1, b.y0 - a.y1));
  return dx * dx + dy * dy;
}

/// A closed line, not repeating its first point.
struct Ring {
  double *x, *y;
  int size;
  Bounds bounds;
  int tail = 0;  // of an outline: the first of two points at the end of its line; the last two are at its beginning
};

IRLVLA_HD void enclose(Ring& ring) {
  ring.bounds = nothing();
  for (int k = 0; k < ring.size; ++k) include(ring.bounds, ring.x[k], ring.y[k]);
}

IRLVLA_HD Ring ring_of(Corners& box) {
  Ring ring{box.x, box.y, 4, nothing()};
  enclose(ring);
  return ring;
}

IRLVLA_HD void put_box(const Corners& box, Ring& ring) {
  for (int k = 0; k < 4; ++k) ring.x[k] = box.x[k], ring.y[k] = box.y[k];
  ring.size = 4;
  enclose(ring);
}

IRLVLA_HD Edge edge_of(const Ring& ring, int i) {
  const int j = i + 1 < ring.size ? i + 1 : 0;
  return {ring.x[i], ring.y[i], ring.x[j], ring.y[j]};
}

IRLVLA_HD Bounds bounds_of(const Edge& e) { return {smaller(e.x0, e.x1), smaller(e.y0, e.y1), larger(e.x0, e.x1), larger(e.y0, e.y1)}; }

/// Whether a ring winds around a point.
IRLVLA_HD bool winds(const Ring& ring, double px, double py) {
  if (ring.size == 0 || !ring.bounds.contains(px, py)) return false;
  int winding = 0;
  for (int i = 0; i < ring.size; ++i) {
    const Edge e = edge_of(ring, i);
    if ((e.y0 > py) == (e.y1 > py)) continue;
    const int side = orientation(e.x0, e.y0, e.x1, e.y1, px, py);
    if (side != 0 && (side > 0) == (e.y1 > e.y0)) winding += side;
  }
  return winding != 0;
}

/// Calls visit(edge of a, edge of b) for pairs that are chosen, 64 edges from `first` on at a time, until one returns true.
template <class ChooseA, class ChooseB, class Visit>
IRLVLA_HD bool each_pair(const Ring& a, const Ring& b, ChooseA choose_a, ChooseB choose_b, Visit visit) {
  for (int first = 0; first < b.size; first += 64) {
    const uint64_t chosen_b = choose_b(first);
    for (int start = 0; chosen_b && start < a.size; start += 64)
      for (uint64_t chosen_a = choose_a(start); chosen_a; chosen_a &= chosen_a - 1) {
        const Edge e = edge_of(a, start + lowest_bit(chosen_a));
        for (uint64_t left = chosen_b; left; left &= left - 1)
          if (visit(e, edge_of(b, first + lowest_bit(left)))) return true;
      }
  }
  return false;
}

/// Of 64 edges from `first` on, those whose bounds meet some others.
IRLVLA_HD uint64_t edges_near(const Ring& ring, int first, const Bounds& around) {
  uint64_t mask = 0;
  for (int k = 0; k < 64 && first + k < ring.size; ++k) mask |= static_cast<uint64_t>(meets(bounds_of(edge_of(ring, first + k)), around)) << k;
  return mask;
}

/// Two closed regions share a point.
IRLVLA_HD_CALLED bool rings_touch(const Ring& a, const Ring& b) {
  if (a.size == 0 || b.size == 0 || !meets(a.bounds, b.bounds)) return false;
  const bool cross = each_pair(
      a, b, [&](int first) { return edges_near(a, first, b.bounds); }, [&](int first) { return edges_near(b, first, a.bounds); },
      [](const Edge& e, const Edge& f) { return segments_touch(e.x0, e.y0, e.x1, e.y1, f.x0, f.y0, f.x1, f.y1); });
  return cross || winds(a, b.x[0], b.y[0]) || winds(b, a.x[0], a.y[0]);
}

// --- distance -----------------------------------------------------------------------------------------------------------

/// Of the ends of two rings the point nearest to another. Returns the squared distance.
IRLVLA_HD double nearest_end(const Ring* rings, double px, double py, double& x, double& y) {
  double least = kInfinity;
  for (int r = 0; r < 2 && rings[r].size > 0; ++r)
    for (int k = 0; k < 4; ++k) {
      const int i = k < 2 ? rings[r].tail + k : rings[r].size - 4 + k;
      const double dx = rings[r].x[i] - px, dy = rings[r].y[i] - py, d2 = dx * dx + dy * dy;
      if (d2 < least) least = d2, x = rings[r].x[i], y = rings[r].y[i];
    }
  return least;
}

/// An origin and a direction of any length. What lies apart along it is at least as far apart.
struct Axis {
  double x, y, dx, dy;
  IRLVLA_HD double along(double px, double py) const { return dx * (px - x) + dy * (py - y); }
};

IRLVLA_HD double least_along(const Ring* rings, const Axis& axis) {
  double least[4] = {kInfinity, kInfinity, kInfinity, kInfinity};  // four at a time
  for (int r = 0; r < 2; ++r) {
    const Ring& ring = rings[r];
    int i = 0;
    for (; i + 4 <= ring.size; i += 4)
      for (int k = 0; k < 4; ++k) least[k] = smaller(least[k], axis.along(ring.x[i + k], ring.y[i + k]));
    for (; i < ring.size; ++i) least[0] = smaller(least[0], axis.along(ring.x[i], ring.y[i]));
  }
  return smaller(smaller(least[0], least[1]), smaller(least[2], least[3]));
}

/// Of 64 edges from `first` on, those that begin before a limit on an axis.
IRLVLA_HD uint64_t edges_before(const Ring& ring, int first, const Axis& axis, double limit) {
  const int count = ring.size - first < 64 ? ring.size - first : 64;
  uint64_t mask = 0;
  if (count <= 0) return mask;
  double along[65];
  uint8_t before[64] = {};
  for (int k = 0; k < count; ++k) along[k] = axis.along(ring.x[first + k], ring.y[first + k]);
  const int next = first + count < ring.size ? first + count : 0;
  along[count] = axis.along(ring.x[next], ring.y[next]);
  for (int k = 0; k < count; ++k) before[k] = smaller(along[k], along[k + 1]) <= limit;
  for (int k = 0; k < count; k += 8) mask |= eight_bits(before + k) << k;
  return mask;
}

IRLVLA_HD double edges_distance(const Edge& e, const Edge& f) {
  return smaller(smaller(segment_distance(f, e.x0, e.y0), segment_distance(f, e.x1, e.y1)),
                 smaller(segment_distance(e, f.x0, f.y0), segment_distance(e, f.x1, f.y1)));
}

/// Distance between two pairs of regions that share no point, as far as it is below `most`; (px, py) is a point in the first pair.
/// Only edges that face each other are measured: along the line between two near corners the others lie too far apart.
IRLVLA_HD_CALLED double rings_distance(const Ring* a, const Ring* b, double px, double py, double most) {
  double ax = px, ay = py, bx = px, by = py;
  nearest_end(b, px, py, bx, by);
  most = smaller(most, square_root(nearest_end(a, bx, by, ax, ay)));
  const Axis ahead{ax, ay, bx - ax, by - ay}, back{ax, ay, ax - bx, ay - by};
  const double reach = most * square_root(ahead.dx * ahead.dx + ahead.dy * ahead.dy) * (1.0 + 1e-9) + 1e-9;
  const double limit_a = reach - least_along(b, ahead), limit_b = reach - least_along(a, back);
  uint64_t facing_a[2], facing_b[2];
  for (int r = 0; r < 2; ++r) facing_a[r] = edges_before(a[r], 0, back, limit_a), facing_b[r] = edges_before(b[r], 0, ahead, limit_b);
  for (int i = 0; i < 4; ++i) {
    const int r = i >> 1, s = i & 1;
    each_pair(
        a[r], b[s], [&](int first) { return first == 0 ? facing_a[r] : edges_before(a[r], first, back, limit_a); },
        [&](int first) { return first == 0 ? facing_b[s] : edges_before(b[s], first, ahead, limit_b); },
        [&](const Edge& e, const Edge& f) {
          if (gap2(bounds_of(e), bounds_of(f)) < most * most) most = smaller(most, edges_distance(e, f));
          return false;
        });
  }
  return most;
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
