// Reactive traffic around one candidate: IDM vehicles as the devkit drives them (navsim NavsimIDMTrafficAgents, nuplan idm).
// Inline, host and device. What looks odd in a rule is part of the official score; irlvla.ops.reference.traffic says it plainly.
#pragma once
#include "metrics.h"

namespace irlvla {
namespace IRLVLA_ISA {

constexpr double kTargetSpeed = 10.0, kLeastGap = 1.0, kHeadway = 1.5, kAcceleration = 1.0, kDeceleration = 2.0;
constexpr double kSnap = 3.0, kRadius = 100.0, kLookAhead = 0.5, kStationary = 0.1;

// --- rings --------------------------------------------------------------------------------------------------------------

IRLVLA_HD Bounds nothing() { return {kInfinity, kInfinity, -kInfinity, -kInfinity}; }
IRLVLA_HD bool meets(const Bounds& a, const Bounds& b) { return a.x0 <= b.x1 && b.x0 <= a.x1 && a.y0 <= b.y1 && b.y0 <= a.y1; }
IRLVLA_HD void include(Bounds& b, double x, double y) {
  b.x0 = smaller(b.x0, x), b.x1 = larger(b.x1, x), b.y0 = smaller(b.y0, y), b.y1 = larger(b.y1, y);
}
IRLVLA_HD Bounds both(const Bounds& a, const Bounds& b) {
  return {smaller(a.x0, b.x0), smaller(a.y0, b.y0), larger(a.x1, b.x1), larger(a.y1, b.y1)};
}

/// A closed line, not repeating its first point.
struct Ring {
  double *x, *y;
  int size;
  Bounds bounds;
};

IRLVLA_HD Ring ring_of(Corners& box) {
  Ring ring{box.x, box.y, 4, nothing()};
  for (int k = 0; k < 4; ++k) include(ring.bounds, box.x[k], box.y[k]);
  return ring;
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

IRLVLA_HD double gap2(const Bounds& a, const Bounds& b) {
  const double dx = larger(0.0, larger(a.x0 - b.x1, b.x0 - a.x1)), dy = larger(0.0, larger(a.y0 - b.y1, b.y0 - a.y1));
  return dx * dx + dy * dy;
}

/// Of 64 edges from `first` on, those within `most` of some bounds.
IRLVLA_HD uint64_t edges_near(const Ring& ring, int first, const Bounds& around, double most2) {
  uint64_t mask = 0;
  for (int k = 0; k < 64 && first + k < ring.size; ++k)
    mask |= static_cast<uint64_t>(gap2(bounds_of(edge_of(ring, first + k)), around) <= most2) << k;
  return mask;
}

/// Calls visit(edge of a, edge of b) for pairs that may lie within `most` of each other, until one returns true.
template <class Most, class Visit> IRLVLA_HD bool each_pair(const Ring& a, const Ring& b, Most most2, Visit visit) {
  for (int first = 0; first < b.size; first += 64) {
    const uint64_t near_b = edges_near(b, first, a.bounds, most2());
    for (int start = 0; near_b && start < a.size; start += 64)
      for (uint64_t near_a = edges_near(a, start, b.bounds, most2()); near_a; near_a &= near_a - 1) {
        const Edge e = edge_of(a, start + lowest_bit(near_a));
        const Bounds around = bounds_of(e);
        for (uint64_t left = near_b; left; left &= left - 1) {
          const Edge f = edge_of(b, first + lowest_bit(left));
          if (gap2(around, bounds_of(f)) <= most2() && visit(e, f)) return true;
        }
      }
  }
  return false;
}

/// Two closed regions share a point.
IRLVLA_HD_CALLED bool rings_touch(const Ring& a, const Ring& b) {
  if (a.size == 0 || b.size == 0 || !meets(a.bounds, b.bounds)) return false;
  const bool cross = each_pair(a, b, [] { return 0.0; }, [](const Edge& e, const Edge& f) {
    return segments_touch(e.x0, e.y0, e.x1, e.y1, f.x0, f.y0, f.x1, f.y1);
  });
  return cross || winds(a, b.x[0], b.y[0]) || winds(b, a.x[0], a.y[0]);
}

/// Distance between two regions that share no point, as far as it is below `most`.
IRLVLA_HD_CALLED double rings_distance(const Ring& a, const Ring& b, double most) {
  if (a.size == 0 || b.size == 0 || gap2(a.bounds, b.bounds) > most * most) return most;
  each_pair(a, b, [&] { return most * most; }, [&](const Edge& e, const Edge& f) {
    most = smaller(most, smaller(segment_distance(f, e.x0, e.y0), segment_distance(f, e.x1, e.y1)));
    most = smaller(most, smaller(segment_distance(e, f.x0, f.y0), segment_distance(e, f.x1, f.y1)));
    return false;
  });
  return most;
}

// --- the buffer of a path -----------------------------------------------------------------------------------------------

/// A part of a path: inner vertices first ... last - 1, perhaps with an interpolated point before and after them.
struct Part {
  const PathPoint* path;
  int first, last;
  bool has_head, has_tail;
  double head_x, head_y, tail_x, tail_y;

  IRLVLA_HD int size() const { return last - first + has_head + has_tail; }
  IRLVLA_HD void at(int i, double& x, double& y) const {
    if (has_head && i == 0) {
      x = head_x, y = head_y;
    } else if (has_tail && i == size() - 1) {
      x = tail_x, y = tail_y;
    } else {
      x = path[first + i - has_head].x, y = path[first + i - has_head].y;
    }
  }
};

/// A segment moved to its left.
IRLVLA_HD Edge moved_left(double ax, double ay, double bx, double by, double distance) {
  const double dx = bx - ax, dy = by - ay, size = square_root(dx * dx + dy * dy);
  const double ux = distance * dx / size, uy = distance * dy / size;
  return {ax - uy, ay + ux, bx - uy, by + ux};
}

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

  /// The left side at vertex b.
  IRLVLA_HD void turn(double ax, double ay, double bx, double by, double cx, double cy) {
    const int side = orientation(ax, ay, bx, by, cx, cy);
    if (side == 0) return;
    const Edge p = moved_left(ax, ay, bx, by, distance), q = moved_left(bx, by, cx, cy, distance);
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
};

/// Points that the buffer of a line has at most: four a vertex and side, and fillets.
IRLVLA_HD int ring_room(int points, double turning) { return 10 * points + static_cast<int>(turning / (kPi / 32.0)) + 16; }

/// One side of a line, walked from the given end; repeated points count once.
IRLVLA_HD bool outline_side(const Part& part, bool backwards, Outline& out) {
  const int n = part.size();
  double ax = 0.0, ay = 0.0, bx = 0.0, by = 0.0;
  int seen = 0;
  for (int i = 0; i < n; ++i) {
    const int now = backwards ? n - 1 - i : i, before = backwards ? now + 1 : now - 1;
    double x, y;
    part.at(now, x, y);
    if (seen > 0 && x == bx && y == by) continue;
    if (seen > 1) {
      // Corners between whole pieces of the path are known.
      const bool whole = before > part.has_head && before < n - 1 - part.has_tail && part.path[part.first + before - part.has_head].corners != kManyCorners;
      if (whole) {
        const PathPoint& p = part.path[part.first + before - part.has_head];
        if (backwards && (p.corners & 2)) out.put(p.right_x, p.right_y);
        if (!backwards && (p.corners & 1)) out.put(p.left_x, p.left_y);
      } else {
        out.turn(ax, ay, bx, by, x, y);
      }
    }
    ax = bx, ay = by, bx = x, by = y;
    ++seen;
  }
  if (seen < 2) return false;
  const Edge left = moved_left(ax, ay, bx, by, out.distance), right = moved_left(bx, by, ax, ay, out.distance);
  out.put(left.x1, left.y1);
  out.put(right.x0, right.y0);
  return true;
}

IRLVLA_HD_CALLED void buffer(const Part& part, double distance, Ring& ring) {
  ring.size = 0, ring.bounds = nothing();
  Outline out{ring, distance};
  if (outline_side(part, false, out)) outline_side(part, true, out);
}

// --- paths --------------------------------------------------------------------------------------------------------------

struct Path {
  const PathPoint* at;
  int count;

  IRLVLA_HD double clamp(double progress) const { return larger(at[0].progress, smaller(progress, at[count - 1].progress)); }

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

  /// At a vertex, the end of the piece before it.
  IRLVLA_HD Pose<double> pose(double progress) const {
    int hi = lower(progress);
    hi = hi < 1 ? 1 : hi > count - 1 ? count - 1 : hi;
    const PathPoint &a = at[hi - 1], &b = at[hi];
    const double span = b.progress - a.progress, passed = progress - a.progress;
    return {(b.x - a.x) / span * passed + a.x, (b.y - a.y) / span * passed + a.y, principal((b.heading - a.heading) / span * passed + a.heading)};
  }

  /// From a point on the path to its end; at the end, its last piece.
  IRLVLA_HD Part ahead(double progress) const {
    const int first = upper(progress);
    if (first == count) return {at, count - 2, count, false, false, 0.0, 0.0, 0.0, 0.0};
    const Pose<double> head = pose(progress);
    return {at, first, count, true, false, head.x, head.y, 0.0, 0.0};
  }

  IRLVLA_HD Part between(double start, double end) const {
    if (start >= at[count - 1].progress) return {at, count - 2, count, false, false, 0.0, 0.0, 0.0, 0.0};
    if (end <= at[0].progress) return {at, 0, 2, false, false, 0.0, 0.0, 0.0, 0.0};
    const Pose<double> head = pose(start), tail = pose(end);
    const int first = upper(start), last = lower(end);
    return {at, first, last < first ? first : last, true, true, head.x, head.y, tail.x, tail.y};
  }
};

IRLVLA_HD Path path_of(const PackedScene& scene, const Vehicle& vehicle) { return {scene.at(scene.path) + vehicle.path, vehicle.path_count}; }

// --- the world of one candidate -----------------------------------------------------------------------------------------

/// A vehicle while it drives. `step` counts the updates it had.
struct Driver {
  double progress, speed, target;
  int step, region_step;
  int gone_at;   // first step without it, or kSteps
  int changed;   // it is not where it is without the ego
  Pose<double> pose;
  Corners box;
  Ring strip;    // what it covers beside its box
  Bounds bounds;
};

/// Working memory of one candidate: drivers, how far and how fast each was, rings, and the agents that the ego changed.
struct World {
  Agent* agent;              // vehicles, then those that stand
  Driver* driver;            // V
  double *progress, *speed;  // V x 41
  uint64_t* standing;        // bit t: a standing vehicle is there at step t
  Ring corridor;
  bool plain_known = true;   // what traffic does without the ego
  uint64_t* met = nullptr;   // V x 41, where it is made: which others lay in a vehicle's way

  IRLVLA_HD static int64_t bytes(int vehicles, int standing, int64_t room) {
    const int64_t all = (vehicles + standing) * static_cast<int64_t>(sizeof(Agent)) + standing * static_cast<int64_t>(sizeof(uint64_t)) +
                        vehicles * static_cast<int64_t>(sizeof(Driver) + 2 * kSteps * sizeof(double)) + room * 2 * static_cast<int64_t>(sizeof(double));
    return (all + 64) / 64 * 64;
  }
};

IRLVLA_HD World world_in(const PackedScene& scene, char* memory) {
  const int n = scene.vehicles;
  World world;
  world.agent = reinterpret_cast<Agent*>(memory);
  world.driver = reinterpret_cast<Driver*>(world.agent + n + scene.standing);
  world.progress = reinterpret_cast<double*>(world.driver + n);
  world.speed = world.progress + n * kSteps;
  world.standing = reinterpret_cast<uint64_t*>(world.speed + n * kSteps);
  double* room = reinterpret_cast<double*>(world.standing + scene.standing);
  const Vehicle* vehicles = scene.at(scene.vehicle);
  for (int v = 0; v < n; ++v) {
    const int size = vehicles[v].room;
    world.driver[v].strip = {room, room + size, 0, nothing()};
    room += 2 * size;
  }
  world.corridor = {room, room + scene.corridor_room, 0, nothing()};
  return world;
}

IRLVLA_HD void start(const PackedScene& scene, World& world) {
  for (int v = 0; v < scene.vehicles; ++v) {
    const Vehicle& vehicle = scene.at(scene.vehicle)[v];
    Driver& d = world.driver[v];
    d.progress = vehicle.progress, d.speed = vehicle.speed, d.target = vehicle.target;
    d.step = 0, d.region_step = -1, d.gone_at = kSteps, d.changed = 0;
    world.progress[v * kSteps] = d.progress, world.speed[v * kSteps] = d.speed;
  }
}

/// What a vehicle occupies now: at first its box on the line of its lane, then its footprint along the path.
IRLVLA_HD_CALLED void settle(const PackedScene& scene, const Vehicle& vehicle, Driver& d) {
  if (d.region_step == d.step) return;
  const Path path = path_of(scene, vehicle);
  d.pose = path.pose(path.clamp(d.progress));
  d.region_step = d.step;
  d.strip.size = 0, d.strip.bounds = nothing();
  if (d.step == 0) {
    d.box = vehicle.box;
  } else {
    const double half = vehicle.length / 2.0;
    buffer(path.between(path.clamp(d.progress - half), path.clamp(d.progress + half + d.speed * kHeadway)), vehicle.width / 2.0, d.strip);
    d.box = box_corners(d.pose.x, d.pose.y, d.pose.heading, half, vehicle.width / 2.0);
  }
  d.bounds = both(ring_of(d.box).bounds, d.strip.bounds);
}

/// The one in front: the nearest of those in the way. Of equally near ones the devkit's tree finds that whose middle lies lowest.
struct Lead {
  double gap = kInfinity, middle = kInfinity, speed = 0.0, heading = 0.0;
  bool found = false;

  /// Nothing farther than this is of interest.
  IRLVLA_HD double most() const { return found ? gap * (1.0 + 1e-12) + 1e-12 : kInfinity; }

  IRLVLA_HD void consider(double distance, const Bounds& bounds, double its_speed, double its_heading) {
    const double its_middle = bounds.y0 + bounds.y1;
    if (found && (distance > gap || (distance == gap && its_middle >= middle))) return;
    gap = distance, middle = its_middle, speed = its_speed, heading = its_heading, found = true;
  }
};

IRLVLA_HD_CALLED double region_distance(Driver& a, Corners& box, const Ring& strip, double most) {
  const Ring own = ring_of(a.box), other = ring_of(box);
  if (rings_touch(own, other) || rings_touch(own, strip) || rings_touch(a.strip, other) || rings_touch(a.strip, strip)) return 0.0;
  most = rings_distance(own, other, most);
  most = rings_distance(a.strip, other, most);
  most = rings_distance(own, strip, most);
  return rings_distance(a.strip, strip, most);
}

/// IDMPolicy.solve_forward_euler_idm_policy.
IRLVLA_HD void advance(const Vehicle& vehicle, Driver& d, double gap, double lead_speed) {
  if (vehicle.limit > 0.0) d.target = vehicle.limit;
  const double v = d.speed, share = v / d.target;
  const double wanted = kLeastGap + v * kHeadway + (v * (v - lead_speed)) / (2.0 * square_root(kAcceleration * kDeceleration));
  const double ratio = wanted / larger(gap, kLeastGap);
  const double change = kAcceleration * (1.0 - (share * share) * (share * share) - ratio * ratio);
  d.progress += kStep * v;
  d.speed = larger(v + kStep * smaller(larger(-kDeceleration, change), kAcceleration), 0.0);
}

/// The ego as traffic sees it; the devkit takes its rear axle for the centre of its box.
struct Sight {
  double x, y, heading, speed;
  Corners box;
  Ring ring;
};

/// The bounds of a vehicle's path ahead around the given ones: the first and last piece that come near, or none.
struct Stretch {
  int first, last;
};

IRLVLA_HD Stretch stretch_near(const Part& part, const Bounds& around, double margin) {
  const Bounds wide{around.x0 - margin, around.y0 - margin, around.x1 + margin, around.y1 + margin};
  Stretch found{0, -1};
  double ax, ay, bx, by;
  part.at(0, ax, ay);
  for (int i = 1; i < part.size(); ++i, ax = bx, ay = by) {
    part.at(i, bx, by);
    if (!meets(wide, bounds_of({ax, ay, bx, by}))) continue;
    if (found.last < 0) found.first = i - 1;
    found.last = i;
  }
  return found;
}

/// A point is surely within `distance` of a stretch of a line, and beside one of its pieces.
IRLVLA_HD bool surely_covers(const Part& part, const Stretch& stretch, double distance, double px, double py) {
  double ax, ay, bx, by;
  part.at(stretch.first, ax, ay);
  for (int i = stretch.first + 1; i <= stretch.last; ++i, ax = bx, ay = by) {
    part.at(i, bx, by);
    const double dx = bx - ax, dy = by - ay, length2 = dx * dx + dy * dy, along = (px - ax) * dx + (py - ay) * dy;
    const double across = dx * (py - ay) - dy * (px - ax);
    if (along > 0.01 * length2 && along < 0.99 * length2 && across * across < 0.98 * distance * distance * length2) return true;
  }
  return false;
}

/// A line without what lies far from a stretch of it: two more vertices stay at each end, so that the stretch looks the same.
IRLVLA_HD Part cut(const Part& part, const Stretch& stretch) {
  Part out = part;
  if (stretch.first > 2) out.first = part.first + stretch.first - 2 - part.has_head, out.has_head = false;
  if (stretch.last < part.size() - 3) out.last = part.first + stretch.last + 3 - part.has_head, out.has_tail = false;
  return out;
}

/// What vehicle u occupies, roughly, without making its outline where that is known.
IRLVLA_HD const Bounds& extent(const PackedScene& scene, World& world, int u) {
  Driver& other = world.driver[u];
  if (!other.changed && world.plain_known) return scene.at(scene.plain_bounds)[u * kSteps + other.step];
  settle(scene, scene.at(scene.vehicle)[u], other);
  return other.bounds;
}

IRLVLA_HD bool may_meet(const Vehicle& vehicle, int u) { return (vehicle.near >> (u & 63)) & 1; }

/// Whether a box, or a strip with the same bounds, lies in a vehicle's way: touches the outline of its path ahead.
IRLVLA_HD_CALLED bool in_way(World& world, const Part& ahead, double half_width, const Bounds& bounds, Corners& box, const Ring* strip) {
  const Stretch stretch = stretch_near(ahead, bounds, half_width + 0.01);
  if (stretch.last < 0) return false;
  if (surely_covers(ahead, stretch, half_width, 0.5 * (box.x[0] + box.x[2]), 0.5 * (box.y[0] + box.y[2]))) return true;
  buffer(cut(ahead, stretch), half_width, world.corridor);
  return rings_touch(world.corridor, ring_of(box)) || (strip && rings_touch(world.corridor, *strip));
}

IRLVLA_HD bool vehicle_in_way(const PackedScene& scene, World& world, const Vehicle& vehicle, const Part& ahead, int u) {
  const double half_width = vehicle.width / 2.0;
  if (stretch_near(ahead, extent(scene, world, u), half_width + 0.01).last < 0) return false;
  Driver& other = world.driver[u];
  settle(scene, scene.at(scene.vehicle)[u], other);
  return in_way(world, ahead, half_width, other.bounds, other.box, &other.strip);
}

IRLVLA_HD Part path_ahead(const PackedScene& scene, const World& world, int v) {
  const Path path = path_of(scene, scene.at(scene.vehicle)[v]);
  return path.ahead(path.clamp(world.driver[v].progress));
}

/// One step of a vehicle. Returns which others lie in its way (bit u % 64).
IRLVLA_HD_CALLED uint64_t drive(const PackedScene& scene, World& world, int v, Sight* ego) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  Driver& d = world.driver[v];
  const Path path = path_of(scene, vehicle);
  const Part ahead = path_ahead(scene, world, v);
  uint64_t met = 0;
  Lead lead;
  for (int u = 0; u < scene.vehicles; ++u) {
    Driver& other = world.driver[u];
    if (u == v || !may_meet(vehicle, u) || other.gone_at < kSteps || !vehicle_in_way(scene, world, vehicle, ahead, u)) continue;
    met |= uint64_t{1} << (u & 63);
    settle(scene, vehicle, d);
    lead.consider(region_distance(d, other.box, other.strip, lead.most()), other.bounds, other.speed, other.pose.heading);
  }
  if (ego && in_way(world, ahead, vehicle.width / 2.0, ego->ring.bounds, ego->box, nullptr)) {
    const Ring none{nullptr, nullptr, 0, nothing()};
    settle(scene, vehicle, d);
    lead.consider(region_distance(d, ego->box, none, lead.most()), ego->ring.bounds, ego->speed, ego->heading);
  }
  if (lead.found) {
    double sine, cosine;
    sine_cosine(principal(lead.heading - d.pose.heading), sine, cosine);
    advance(vehicle, d, lead.gap, lead.speed * cosine);
  } else {
    advance(vehicle, d, path.at[path.count - 1].progress - d.progress - vehicle.length / 2.0, 0.0);
  }
  return met;
}

/// Vehicles (bit v % 64) whose path the ego's box may touch.
IRLVLA_HD_CALLED uint64_t watched(const PackedScene& scene, const Sight& ego) {
  const Bounds& b = ego.ring.bounds;
  const double x0 = (b.x0 - scene.watch_x) / kWatchCell, x1 = (b.x1 - scene.watch_x) / kWatchCell;
  const double y0 = (b.y0 - scene.watch_y) / kWatchCell, y1 = (b.y1 - scene.watch_y) / kWatchCell;
  if (!(x0 >= 0.0 && y0 >= 0.0 && x1 < kWatch && y1 < kWatch)) return ~uint64_t{0};
  const uint64_t* cells = scene.at(scene.watch);
  double cx[4], cy[4];
  for (int k = 0; k < 4; ++k) cx[k] = (ego.box.x[k] - scene.watch_x) / kWatchCell, cy[k] = (ego.box.y[k] - scene.watch_y) / kWatchCell;
  uint64_t found = 0;
  for (int row = static_cast<int>(y0); row <= static_cast<int>(y1); ++row) {
    double from = kWatch, to = 0.0;  // the box within the row
    for (int k = 0; k < 4; ++k) {
      const int l = (k + 1) & 3;
      const double low = smaller(cy[k], cy[l]), high = larger(cy[k], cy[l]);
      if (high < row || low > row + 1) continue;
      const double slope = high - low > 1e-9 ? (cx[l] - cx[k]) / (cy[l] - cy[k]) : 0.0;
      const double xa = high - low > 1e-9 ? cx[k] + (larger(low, row) - cy[k]) * slope : cx[k];
      const double xb = high - low > 1e-9 ? cx[k] + (smaller(high, row + 1) - cy[k]) * slope : cx[l];
      from = smaller(from, smaller(xa, xb)), to = larger(to, larger(xa, xb));
    }
    const int first = static_cast<int>(larger(from - 1e-6, 0.0)), last = static_cast<int>(smaller(to + 1e-6, kWatch - 1));
    for (int column = first; column <= last; ++column) found |= cells[row * kWatch + column];
  }
  return found;
}

/// Whether the ego, or what it changed, matters to a vehicle at step t. `changed` and `seen` have a bit for each vehicle, v % 64.
IRLVLA_HD_CALLED bool concerned(const PackedScene& scene, World& world, int v, int t, uint64_t changed, uint64_t seen, Sight& ego) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  if (world.driver[v].changed) return true;
  const uint64_t suspects = vehicle.near & changed;
  const bool sees_ego = (seen >> (v & 63)) & 1;
  if (!suspects && !sees_ego) return false;
  if (scene.at(scene.plain_met)[v * kSteps + t] & suspects) return true;
  const Part ahead = path_ahead(scene, world, v);
  if (sees_ego && in_way(world, ahead, vehicle.width / 2.0, ego.ring.bounds, ego.box, nullptr)) return true;
  for (int u = 0; u < scene.vehicles && suspects; ++u)
    if (world.driver[u].changed && u != v && world.driver[u].gone_at == kSteps && may_meet(vehicle, u) && vehicle_in_way(scene, world, vehicle, ahead, u))
      return true;
  return false;
}

/// Agents farther than 100 m from the ego leave for good.
IRLVLA_HD_CALLED void leave(const PackedScene& scene, World& world, int t, const Sight& ego) {
  const Vehicle* vehicles = scene.at(scene.vehicle);
  for (int v = 0; v < scene.vehicles; ++v) {
    Driver& d = world.driver[v];
    if (d.gone_at < kSteps) continue;
    const Bounds& reach = vehicles[v].reach;
    const double dx = larger(absolute(reach.x0 - ego.x), absolute(reach.x1 - ego.x)), dy = larger(absolute(reach.y0 - ego.y), absolute(reach.y1 - ego.y));
    if (dx * dx + dy * dy < kRadius * kRadius) continue;
    const Path path = path_of(scene, vehicles[v]);
    const Pose<double> pose = path.pose(path.clamp(d.progress));
    const double px = pose.x - ego.x, py = pose.y - ego.y;
    if (square_root(px * px + py * py) > kRadius) d.gone_at = t, d.changed = 1;
  }
}

IRLVLA_HD_CALLED void take_step(const PackedScene& scene, World& world, int t, Sight* ego) {
  const double* plain = scene.at(scene.plain);
  uint64_t changed = 0, seen = 0;
  if (ego) {
    leave(scene, world, t, *ego);
    seen = watched(scene, *ego);
    for (int v = 0; v < scene.vehicles; ++v) changed |= static_cast<uint64_t>(world.driver[v].changed) << (v & 63);
  }
  for (int v = 0; v < scene.vehicles; ++v) {
    Driver& d = world.driver[v];
    if (d.gone_at < kSteps) continue;
    const double *progress = plain + 2 * v * kSteps, *speed = progress + kSteps;
    if (ego && !concerned(scene, world, v, t, changed, seen, *ego)) {
      d.progress = progress[t], d.speed = speed[t];
    } else {
      const uint64_t met = drive(scene, world, v, ego);
      if (world.met) world.met[v * kSteps + t] = met;
      if (ego && (d.progress != progress[t] || d.speed != speed[t])) d.changed = 1, changed |= uint64_t{1} << (v & 63);
    }
    d.step = t;
    world.progress[v * kSteps + t] = d.progress, world.speed[v * kSteps + t] = d.speed;
  }
}

// --- what comes of it ---------------------------------------------------------------------------------------------------

/// Place an agent at step t.
IRLVLA_HD_CALLED void stand(const PackedScene& scene, Agent& agent, int t, double x, double y, double heading) {
  agent.x[t] = x, agent.y[t] = y;
  sine_cosine(heading, agent.sine[t], agent.cosine[t]);
  sine_cosine(heading + kHalfPi, agent.lateral_sine[t], agent.lateral_cosine[t]);
  const double c = absolute(agent.cosine[t]), s = absolute(agent.sine[t]);
  const double ex = c * agent.half_length + s * agent.half_width, ey = s * agent.half_length + c * agent.half_width;
  Envelope& e = agent.envelope;
  outward(x - scene.origin_x - ex, x - scene.origin_x + ex, e.x0[t], e.x1[t]);
  outward(y - scene.origin_y - ey, y - scene.origin_y + ey, e.y0[t], e.y1[t]);
  agent.x0 = e.x0[t] < agent.x0 ? e.x0[t] : agent.x0, agent.x1 = e.x1[t] > agent.x1 ? e.x1[t] : agent.x1;
  agent.y0 = e.y0[t] < agent.y0 ? e.y0[t] : agent.y0, agent.y1 = e.y1[t] > agent.y1 ? e.y1[t] : agent.y1;
}

/// Forget all steps of an agent from `first` on.
IRLVLA_HD void empty(Agent& agent, int first) {
  for (int t = first; t < kFrames; ++t)
    agent.envelope.x0[t] = agent.envelope.y0[t] = 3e38f, agent.envelope.x1[t] = agent.envelope.y1[t] = -3e38f;
  agent.x0 = agent.y0 = 3e38f, agent.x1 = agent.y1 = -3e38f;
  for (int t = 0; t < first; ++t) {
    const Envelope& e = agent.envelope;
    agent.x0 = e.x0[t] < agent.x0 ? e.x0[t] : agent.x0, agent.x1 = e.x1[t] > agent.x1 ? e.x1[t] : agent.x1;
    agent.y0 = e.y0[t] < agent.y0 ? e.y0[t] : agent.y0, agent.y1 = e.y1[t] > agent.y1 ? e.y1[t] : agent.y1;
  }
}

/// The agent that a vehicle has become, from step 1 on; step 0 stays as recorded.
IRLVLA_HD_CALLED void dress(const PackedScene& scene, const World& world, int v, Agent& agent) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  const Path path = path_of(scene, vehicle);
  empty(agent, 1);
  for (int t = 1; t < world.driver[v].gone_at && t < kSteps; ++t) {
    const Pose<double> pose = path.pose(path.clamp(world.progress[v * kSteps + t]));
    stand(scene, agent, t, pose.x, pose.y, pose.heading);
  }
}

/// The agent that a standing vehicle is at the steps of `mask`; step 0 stays as recorded.
IRLVLA_HD void remain(uint64_t mask, Agent& agent) {
  empty(agent, 1);
  const Envelope& first = agent.envelope;
  Envelope& e = agent.envelope;
  for (int t = 1; t < kSteps; ++t) {
    if (!((mask >> t) & 1)) continue;
    agent.x[t] = agent.x[0], agent.y[t] = agent.y[0], agent.cosine[t] = agent.cosine[0], agent.sine[t] = agent.sine[0];
    agent.lateral_cosine[t] = agent.lateral_cosine[0], agent.lateral_sine[t] = agent.lateral_sine[0];
    e.x0[t] = first.x0[0], e.x1[t] = first.x1[0], e.y0[t] = first.y0[0], e.y1[t] = first.y1[0];
  }
}

/// Steps at which vehicles that do not drive stay where they were: while no vehicle touches them, in their order.
IRLVLA_HD void stay(const PackedScene& scene, const World& world) {
  const Vehicle* vehicles = scene.at(scene.vehicle);
  const Standing* standing = scene.at(scene.stander);
  const uint64_t* plain = scene.at(scene.stays);
  for (int i = 0; i < scene.standing; ++i) {
    Corners own = standing[i].box;
    const Ring ring = ring_of(own);
    bool same = world.plain_known;
    for (int v = 0; v < scene.vehicles && same; ++v) same = !world.driver[v].changed || !meets(vehicles[v].reach, ring.bounds);
    for (int j = 0; j < i && same; ++j) same = world.standing[j] == plain[j] || !overlap(own, standing[j].box);
    world.standing[i] = plain[i];
    if (same) continue;
    uint64_t free = ((uint64_t{1} << kSteps) - 1) & ~uint64_t{1};
    for (int j = 0; j < i; ++j)
      if (overlap(own, standing[j].box)) free &= ~world.standing[j];
    for (int v = 0; v < scene.vehicles; ++v) {
      if (!meets(vehicles[v].reach, ring.bounds)) continue;
      const Path path = path_of(scene, vehicles[v]);
      for (int t = 1; t < world.driver[v].gone_at && t < kSteps; ++t) {
        const Pose<double> pose = path.pose(path.clamp(world.progress[v * kSteps + t]));
        if (overlap(own, box_corners(pose.x, pose.y, pose.heading, vehicles[v].length / 2.0, vehicles[v].width / 2.0))) free &= ~(uint64_t{1} << t);
      }
    }
    world.standing[i] = free;
  }
}

/// Drive all traffic around an ego; see(t) is what it looks like at step t.
template <class See> IRLVLA_HD void rollout(const PackedScene& scene, World& world, See see) {
  start(scene, world);
  for (int t = 1; t < kSteps; ++t) {
    Sight ego = see(t - 1);
    ego.ring = ring_of(ego.box);
    take_step(scene, world, t, &ego);
  }
  stay(scene, world);
}

/// Drive all traffic as if there were no ego. For each vehicle and step: `bounds` of what it occupies, and whom it `met`.
IRLVLA_HD void rollout_alone(const PackedScene& scene, World& world, Bounds* bounds, uint64_t* met) {
  world.plain_known = false, world.met = met;
  start(scene, world);
  for (int t = 0; t < kSteps; ++t) {
    if (t > 0) take_step(scene, world, t, nullptr);
    for (int v = 0; v < scene.vehicles; ++v) {
      settle(scene, scene.at(scene.vehicle)[v], world.driver[v]);
      bounds[v * kSteps + t] = world.driver[v].bounds;
    }
  }
  stay(scene, world);
}

/// Make the agents that the ego changed. Those that it did not are the scene's own.
IRLVLA_HD void dress_changed(const PackedScene& scene, World& world) {
  const Agent* agents = scene.at(scene.agent);
  for (int v = 0; v < scene.vehicles; ++v) {
    if (!world.driver[v].changed) continue;
    world.agent[v] = agents[scene.at(scene.vehicle)[v].agent];
    dress(scene, world, v, world.agent[v]);
  }
  for (int i = 0; i < scene.standing; ++i) {
    if (world.standing[i] == scene.at(scene.stays)[i]) continue;
    world.agent[scene.vehicles + i] = agents[scene.at(scene.stander)[i].agent];
    remain(world.standing[i], world.agent[scene.vehicles + i]);
  }
}

/// An agent of the scene as it is around this candidate.
IRLVLA_HD const Agent& agent_in(const PackedScene& scene, const World* world, int a) {
  const Agent& recorded = scene.at(scene.agent)[a];
  if (!world || recorded.role == 0) return recorded;
  if (recorded.role > 0) return world->driver[recorded.role - 1].changed ? world->agent[recorded.role - 1] : recorded;
  const int i = -recorded.role - 1;
  return world->standing[i] != scene.at(scene.stays)[i] ? world->agent[scene.vehicles + i] : recorded;
}

/// The ego at a state.
IRLVLA_HD Sight sight_of(const State<double>& s) {
  Sight ego;
  ego.x = s.x, ego.y = s.y, ego.heading = s.heading, ego.speed = magnitude(s.vx, s.vy);
  ego.box = box_corners(s.x, s.y, s.heading, kHalfLength, kHalfWidth);
  return ego;
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
