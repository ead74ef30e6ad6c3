// Paths of vehicles and the outlines of strips along them, as GEOS buffers lines. Inline, host and device.
#pragma once
#include "rings.h"
#include "scene.h"

namespace irlvla {
namespace IRLVLA_ISA {

// --- paths --------------------------------------------------------------------------------------------------------------

/// A part of a path: vertices first ... last - 1, perhaps with an interpolated point before and after them.
struct Part {
  int first, last;
  bool has_head, has_tail;
  double head_x, head_y, tail_x, tail_y;

  IRLVLA_HD int size() const { return last - first + has_head + has_tail; }
};

struct Path {
  const PathPoint* at;
  int count;
  const double *corner_x, *corner_y;  // of the outlines of all paths

  IRLVLA_HD double end() const { return at[count - 1].progress; }
  IRLVLA_HD double clamp(double progress) const { return larger(at[0].progress, smaller(progress, end())); }

  /// The first vertex whose progress is not below the given one.
  IRLVLA_HD int lower(double progress) const {
    int low = 0, high = count;
    while (low < high) {
      const int mid = (low + high) / 2;
      if (at[mid].progress < progress) low = mid + 1;
      else high = mid;
    }
    return low;
  }
  IRLVLA_HD int upper(double progress) const {
    int i = lower(progress);
    while (i < count && at[i].progress == progress) ++i;
    return i;
  }

  /// The vertex before a point on the path; at a vertex, the one before it.
  IRLVLA_HD int piece(double progress) const {
    const int hi = lower(progress);
    return hi < 1 ? 0 : hi > count - 1 ? count - 2 : hi - 1;
  }
  /// The same, searched from a piece not far away.
  IRLVLA_HD int walk(int k, double progress) const {
    while (k < count - 2 && at[k + 1].progress < progress) ++k;
    while (k > 0 && at[k].progress >= progress) --k;
    return k;
  }
  IRLVLA_HD void point(int k, double progress, double& x, double& y) const {
    const PathPoint* a = at + k;
    const double passed = progress - a->progress;
    x = a->slope_x * passed + a->x, y = a->slope_y * passed + a->y;
  }
  IRLVLA_HD Pose<double> pose(int k, double progress) const {
    const PathPoint* a = at + k;
    const double passed = progress - a->progress;
    return {a->slope_x * passed + a->x, a->slope_y * passed + a->y, principal(a->slope_heading * passed + a->heading)};
  }
  IRLVLA_HD Pose<double> pose(double progress) const { return pose(piece(progress), progress); }

  IRLVLA_HD Part vertices(int first, int last) const { return {first, last, false, false, 0.0, 0.0, 0.0, 0.0}; }

  /// Points that repeat count once.
  IRLVLA_HD Part trimmed(Part part) const {
    if (part.first < part.last) {
      if (at[part.first].x == part.head_x && at[part.first].y == part.head_y) part.has_head = false;
      if (at[part.last - 1].x == part.tail_x && at[part.last - 1].y == part.tail_y) part.has_tail = false;
    } else if (part.head_x == part.tail_x && part.head_y == part.tail_y) {
      part.has_tail = false;
    }
    return part;
  }

  /// The first vertex beyond a point on a piece.
  IRLVLA_HD int beyond(int k, double progress) const { return at[k + 1].progress > progress ? k + 1 : k + 2; }

  /// From a point on a piece to the end of the path; at the end, its last piece.
  IRLVLA_HD Part ahead(int k, double progress) const {
    const int first = beyond(k, progress);
    if (first == count) return vertices(count - 2, count);
    Part part{first, count, true, false, 0.0, 0.0, 0.0, 0.0};
    point(k, progress, part.head_x, part.head_y);
    return trimmed(part);
  }

  /// Between two points, each on its piece.
  IRLVLA_HD Part between(int k, double from, int l, double to) const {
    if (from >= end()) return vertices(count - 2, count);
    if (to <= at[0].progress) return vertices(0, 2);
    const int first = beyond(k, from), last = l + 1;
    Part part{first, last < first ? first : last, true, true, 0.0, 0.0, 0.0, 0.0};
    point(k, from, part.head_x, part.head_y);
    point(l, to, part.tail_x, part.tail_y);
    return trimmed(part);
  }

  IRLVLA_HD void at_of(const Part& part, int i, double& x, double& y) const {
    if (part.has_head && i == 0) {
      x = part.head_x, y = part.head_y;
    } else if (part.has_tail && i == part.size() - 1) {
      x = part.tail_x, y = part.tail_y;
    } else {
      x = at[part.first + i - part.has_head].x, y = at[part.first + i - part.has_head].y;
    }
  }
};

IRLVLA_HD Path path_of(const PackedScene& scene, const Vehicle& vehicle) {
  return {scene.at(scene.path) + vehicle.path, vehicle.path_count, scene.at(scene.corner_x), scene.at(scene.corner_y)};
}

// --- outlines -----------------------------------------------------------------------------------------------------------

/// What leads from a piece to its left side.
struct Across {
  double x, y;
};

IRLVLA_HD Across across(double ax, double ay, double bx, double by, double distance) {
  const double dx = bx - ax, dy = by - ay, size = square_root(dx * dx + dy * dy);
  return {-(distance * dy / size), distance * dx / size};
}

/// Where two pieces meet: a -> b -> c, and to which side they turn.
struct Joint {
  double ax, ay, bx, by, cx, cy;
  Across before, after;
  int side;
};

/// Draws what GEOS makes of a line's buffer with flat ends and round joins, before it removes overlaps (OffsetSegmentGenerator).
struct Outline {
  Ring& ring;
  double distance;

  IRLVLA_HD void put(double x, double y) {
    if (ring.size > 0) {
      const double dx = x - ring.x[ring.size - 1], dy = y - ring.y[ring.size - 1];
      if (dx * dx + dy * dy < distance * distance * 1e-8) return;
    }
    ring.x[ring.size] = x, ring.y[ring.size] = y;
    ++ring.size;
    include(ring.bounds, x, y);
  }

  /// Corners that were drawn before.
  IRLVLA_HD void put_all(const double* x, const double* y, int count) {
    if (count > 0) put(x[0], y[0]);
    for (int i = 1; i < count; ++i) {
      ring.x[ring.size] = x[i], ring.y[ring.size] = y[i];
      ++ring.size;
      include(ring.bounds, x[i], y[i]);
    }
  }

  /// The outside of a turn to the right: points about every pi / 32.
  IRLVLA_HD void fillet(double cx, double cy, const Edge& before, const Edge& after) {
    const double ux = before.x1 - cx, uy = before.y1 - cy, vx = after.x0 - cx, vy = after.y0 - cy;
    const double angle = angle_between(uy * vx - ux * vy, ux * vx + uy * vy);
    const int count = static_cast<int>(angle / (kPi / 32.0) + 0.5);
    for (int i = 1; i < count; ++i) {
      double s, c;
      sine_cosine(i * (angle / count), s, c);
      put(cx + (ux * c + uy * s), cy + (uy * c - ux * s));
    }
  }

  /// The left side at vertex b between two pieces that were moved there; `side`: where they turn to.
  IRLVLA_HD void turn(const Edge& p, const Edge& q, double bx, double by, int side) {
    if (side == 0) return;
    if (side > 0 && segments_touch(p.x0, p.y0, p.x1, p.y1, q.x0, q.y0, q.x1, q.y1)) {
      const double rx = p.x1 - p.x0, ry = p.y1 - p.y0, sx = q.x1 - q.x0, sy = q.y1 - q.y0, across = rx * sy - ry * sx;
      double share = across != 0.0 ? ((q.x0 - p.x0) * sy - (q.y0 - p.y0) * sx) / across : 1.0;
      share = smaller(larger(share, 0.0), 1.0);
      return put(p.x0 + share * rx, p.y0 + share * ry);
    }
    const double gx = p.x1 - q.x0, gy = p.y1 - q.y0;
    put(p.x1, p.y1);
    if (square_root(gx * gx + gy * gy) < distance * 1e-3) return;
    if (side > 0) {
      put((80.0 * p.x1 + bx) / 81.0, (80.0 * p.y1 + by) / 81.0);
      put((80.0 * q.x0 + bx) / 81.0, (80.0 * q.y0 + by) / 81.0);
    } else {
      fillet(bx, by, p, q);
    }
    put(q.x0, q.y0);
  }

  IRLVLA_HD void left(const Joint& j) {
    turn({j.ax + j.before.x, j.ay + j.before.y, j.bx + j.before.x, j.by + j.before.y},
         {j.bx + j.after.x, j.by + j.after.y, j.cx + j.after.x, j.cy + j.after.y}, j.bx, j.by, j.side);
  }
  /// The other side, on the way back.
  IRLVLA_HD void right(const Joint& j) {
    turn({j.cx - j.after.x, j.cy - j.after.y, j.bx - j.after.x, j.by - j.after.y},
         {j.bx - j.before.x, j.by - j.before.y, j.ax - j.before.x, j.ay - j.before.y}, j.bx, j.by, -j.side);
  }
};

/// Points that the buffer of a line has at most: four a vertex and side, and fillets.
IRLVLA_HD int ring_room(int points, double turning) { return 10 * points + static_cast<int>(turning / (kPi / 32.0)) + 16; }

IRLVLA_HD Across across_at(const Path& path, int k) { return {path.at[k].across_x, path.at[k].across_y}; }

/// The joint at vertex k of a part whose first and last piece lead `start` and `end` across.
IRLVLA_HD Joint joint_at(const Path& path, const Part& part, int k, const Across& start, const Across& end) {
  const bool from_head = part.has_head && k == part.first, to_tail = part.has_tail && k == part.last - 1;
  const double ax = from_head ? part.head_x : path.at[k - 1].x, ay = from_head ? part.head_y : path.at[k - 1].y;
  const double cx = to_tail ? part.tail_x : path.at[k + 1].x, cy = to_tail ? part.tail_y : path.at[k + 1].y;
  const double bx = path.at[k].x, by = path.at[k].y;
  return {ax, ay, bx, by, cx, cy, from_head ? start : across_at(path, k - 1), to_tail ? end : across_at(path, k), orientation(ax, ay, bx, by, cx, cy)};
}

/// The buffer of a part of a path. Corners between whole pieces were drawn before; those beside an interpolated end were not.
IRLVLA_HD_CALLED void buffer(const Path& path, const Part& part, double distance, Ring& ring) {
  ring.size = 0, ring.bounds = nothing();
  const int n = part.size(), inner = part.last - part.first;
  if (n < 2) return;
  double ax, ay, bx, by, cx, cy, dx, dy;  // the first two points and the last two
  path.at_of(part, 0, ax, ay), path.at_of(part, 1, bx, by), path.at_of(part, n - 2, cx, cy), path.at_of(part, n - 1, dx, dy);
  const Across start = part.has_head || inner < 2 ? across(ax, ay, bx, by, distance) : across_at(path, part.first);
  const Across end = part.has_tail || inner < 2 ? across(cx, cy, dx, dy, distance) : across_at(path, part.last - 2);
  const bool early = part.has_head && inner > 0 && n > 2, late = part.has_tail && inner > 0 && n > 2 && !(early && inner == 1);
  Joint entry{}, exit{};
  if (early) entry = joint_at(path, part, part.first, start, end);
  if (late) exit = joint_at(path, part, part.last - 1, start, end);

  Outline out{ring, distance};
  const int from = part.first + 1, to = part.last - 1;  // corners of these vertices are known
  if (early) out.left(entry);
  if (from < to) out.put_all(path.corner_x + path.at[from].left, path.corner_y + path.at[from].left, path.at[to].left - path.at[from].left);
  if (late) out.left(exit);
  ring.tail = ring.size;
  out.put(dx + end.x, dy + end.y);
  out.put(dx - end.x, dy - end.y);
  if (late) out.right(exit);
  if (from < to) {
    const int begin = path.at[to - 1].right, stop = path.at[from - 1].right;
    out.put_all(path.corner_x + begin, path.corner_y + begin, stop - begin);
  }
  if (early) out.right(entry);
  out.put(ax - start.x, ay - start.y);
  out.put(ax + start.x, ay + start.y);
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
