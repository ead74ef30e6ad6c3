// The vehicles of reactive traffic around one candidate: where they are, what they occupy, and what lies in their way.
// Inline, host and device. What looks odd in a rule is part of the official score; irlvla.ops.reference.traffic says it plainly.
#pragma once
#include "metrics.h"
#include "outline.h"

namespace irlvla {
namespace IRLVLA_ISA {

constexpr double kTargetSpeed = 10.0, kLeastGap = 1.0, kHeadway = 1.5, kAcceleration = 1.0, kDeceleration = 2.0;
constexpr double kSnap = 3.0, kRadius = 100.0, kLookAhead = 0.5, kStationary = 0.1;

// --- the world of one candidate -----------------------------------------------------------------------------------------

/// A vehicle while it drives. `step` counts the updates it had.
struct Driver {
  double progress, speed, target;
  int step, region_step;
  int gone_at;   // first step without it, or kSteps
  int changed;   // it is not where it is without the ego,
  int since;     // from this step on
  double away;   // how far it is at least, squared, from the one whose way is asked about; infinite: not in that way
  int span_step;             // when it was last known what it spans:
  int rear, middle, front;   // pieces of its path at its ends and its middle,
  int beyond;                // and that its box reaches beyond the path, or it is not there yet
  Pose<double> pose;
  Ring ring[2];         // what it occupies: its box, and a strip
  Bounds bounds;        // of both
  double *room_x, *room_y;
};

/// Working memory of one candidate: drivers, how far and how fast each was, rings, and the agents that the ego changed.
struct World {
  Agent* agent;              // vehicles, then those that stand
  Driver* driver;            // V
  double *progress, *speed;  // V x 41
  uint64_t* standing;        // bit t: a standing vehicle is there at step t
  Ring corridor;
  int now = 0;               // the step that is being taken
  uint64_t changed = 0;      // bit v % 64: the ego changed vehicle v
  uint64_t stirred = 0;      // bit v % 64: vehicle v is changed, or one that may come into its way is
  bool plain_known = true;   // what traffic does without the ego

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
    world.driver[v].room_x = room, world.driver[v].room_y = room + size;
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
    d.step = 0, d.region_step = d.span_step = -1, d.gone_at = kSteps, d.changed = 0;
    d.rear = d.middle = d.front = vehicle.first;
    world.progress[v * kSteps] = d.progress, world.speed[v * kSteps] = d.speed;
  }
}

IRLVLA_HD uint64_t bit_of(int v) { return uint64_t{1} << (v & 63); }

/// From step t on, a vehicle is not where it is without the ego.
IRLVLA_HD void mark_changed(const PackedScene& scene, World& world, int v, int t) {
  Driver& d = world.driver[v];
  if (d.changed) return;
  d.since = t, d.changed = 1;
  world.changed |= bit_of(v), world.stirred |= bit_of(v) | scene.at(scene.vehicle)[v].felt;
}

/// A vehicle that nothing changed is brought to a step only when it is asked for.
IRLVLA_HD Driver& driver_at(const PackedScene& scene, World& world, int v, int step) {
  Driver& d = world.driver[v];
  if (d.step == step || d.changed) return d;
  const double* plain = scene.at(scene.plain) + 2 * v * kSteps;
  d.progress = plain[step], d.speed = plain[kSteps + step], d.step = step;
  return d;
}

/// Progress (0) or speed (1) of a vehicle at a step of the whole rollout.
IRLVLA_HD double history_of(const PackedScene& scene, const World& world, int v, int which, int t) {
  const Driver& d = world.driver[v];
  if (world.plain_known && !(d.changed && t >= d.since)) return scene.at(scene.plain)[(2 * v + which) * kSteps + t];
  return (which ? world.speed : world.progress)[v * kSteps + t];
}

// --- what vehicles occupy -----------------------------------------------------------------------------------------------

/// Find the pieces of its path that a vehicle spans, from those that it spanned before.
IRLVLA_HD void span(const Path& path, const Vehicle& vehicle, Driver& d) {
  if (d.span_step == d.step) return;
  const double rear = d.progress - vehicle.length / 2.0, front = d.progress + vehicle.length / 2.0;
  d.span_step = d.step;
  d.rear = path.walk(d.rear, rear), d.middle = path.walk(d.middle, d.progress), d.front = path.walk(d.front, front + d.speed * kHeadway);
  d.beyond = d.step == 0 || rear < path.at[0].progress || front > path.end() || d.rear < vehicle.first || d.front >= vehicle.last;
}

/// The box and the strip of a vehicle: at first its box on the line of its lane, then its footprint along the path.
IRLVLA_HD void draw(const PackedScene& scene, const Vehicle& vehicle, Driver& d) {
  const Path path = path_of(scene, vehicle);
  span(path, vehicle, d);
  d.pose = path.pose(d.middle, path.clamp(d.progress));
  d.ring[0] = {d.room_x, d.room_y, 0, nothing()}, d.ring[1] = {d.room_x + 4, d.room_y + 4, 0, nothing()};
  if (d.step == 0) {
    put_box(vehicle.box, d.ring[0]);
  } else {
    const double half = vehicle.length / 2.0;
    const double rear = path.clamp(d.progress - half), front = path.clamp(d.progress + half + d.speed * kHeadway);
    buffer(path, path.between(d.rear, rear, d.front, front), vehicle.width / 2.0, d.ring[1]);
    put_box(box_corners(d.pose.x, d.pose.y, d.pose.heading, half, vehicle.width / 2.0), d.ring[0]);
  }
  d.bounds = both(d.ring[0].bounds, d.ring[1].bounds);
}

/// What a vehicle occupies now. What one does that nothing changed was prepared with the scene.
IRLVLA_HD_CALLED void settle(const PackedScene& scene, World& world, int v) {
  Driver& d = world.driver[v];
  if (d.region_step == d.step) return;
  d.region_step = d.step;
  if (d.changed || !world.plain_known) return draw(scene, scene.at(scene.vehicle)[v], d);
  const Footprint& known = scene.at(scene.footprint)[v * kSteps + d.step];
  auto *x = const_cast<double*>(scene.at(scene.ring_x)) + known.begin, *y = const_cast<double*>(scene.at(scene.ring_y)) + known.begin;  // only to read
  d.pose = known.pose, d.bounds = known.bounds;
  d.ring[0] = {x, y, 4, known.box}, d.ring[1] = {x + 4, y + 4, known.size, known.strip, known.tail};
}

/// The bounds of what vehicle u occupies.
IRLVLA_HD const Bounds& extent(const PackedScene& scene, World& world, int u) {
  Driver& other = world.driver[u];
  if (!other.changed && world.plain_known) return scene.at(scene.footprint)[u * kSteps + other.step].bounds;
  settle(scene, world, u);
  return other.bounds;
}

/// Distance between what a vehicle and something else occupy, as far as it is below `most`.
IRLVLA_HD_CALLED double region_distance(const Driver& d, const Ring* other, const Bounds& bounds, double most) {
  if (meets(d.bounds, bounds))
    for (int i = 0; i < 4; ++i)
      if (rings_touch(d.ring[i >> 1], other[i & 1])) return 0.0;
  return rings_distance(d.ring, other, d.pose.x, d.pose.y, most);
}

/// The ego as traffic sees it; the devkit takes its rear axle for the centre of its box.
struct Sight {
  double x, y, heading, speed;
  Corners box;
  Ring ring[2];  // the second has no points
};

// --- what lies in a vehicle's way ---------------------------------------------------------------------------------------

/// The path ahead of a vehicle.
struct Corridor {
  Path path;
  Part ahead;
  double half_width;
  const Bounds* blocks;
};

IRLVLA_HD Corridor corridor_of(const PackedScene& scene, World& world, int v) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  const Path path = path_of(scene, vehicle);
  Driver& d = world.driver[v];
  d.middle = path.walk(d.middle, d.progress);
  return {path, path.ahead(d.middle, path.clamp(d.progress)), vehicle.width / 2.0, scene.at(scene.path_blocks) + vehicle.blocks};
}

/// The points of a path ahead between which it comes near something, or none.
struct Stretch {
  int first, last;
};

IRLVLA_HD Stretch stretch_near(const Corridor& corridor, const Bounds& around) {
  const double margin = corridor.half_width + 0.01;
  const Bounds wide{around.x0 - margin, around.y0 - margin, around.x1 + margin, around.y1 + margin};
  const Part& part = corridor.ahead;
  const PathPoint* p = corridor.path.at;
  Stretch found{0, -1};
  if (part.has_head && part.size() > 1) {
    double x, y;
    corridor.path.at_of(part, 1, x, y);
    if (meets(wide, bounds_of({part.head_x, part.head_y, x, y}))) found = {0, 1};
  }
  for (int begin = part.first; begin + 1 < part.last;) {
    const int block = begin / kBlock, end = (block + 1) * kBlock < part.last - 1 ? (block + 1) * kBlock : part.last - 1;
    for (int k = meets(wide, corridor.blocks[block]) ? begin : end; k < end; ++k) {
      if (!meets(wide, bounds_of({p[k].x, p[k].y, p[k + 1].x, p[k + 1].y}))) continue;
      if (found.last < 0) found.first = k - part.first + part.has_head;
      found.last = k + 1 - part.first + part.has_head;
    }
    begin = end;
  }
  return found;
}

/// A point surely lies in a corridor, beside one of the pieces of a stretch.
IRLVLA_HD bool surely_covers(const Corridor& corridor, const Stretch& stretch, double px, double py) {
  double ax, ay, bx, by;
  corridor.path.at_of(corridor.ahead, stretch.first, ax, ay);
  for (int i = stretch.first + 1; i <= stretch.last; ++i, ax = bx, ay = by) {
    corridor.path.at_of(corridor.ahead, i, bx, by);
    const double dx = bx - ax, dy = by - ay, length2 = dx * dx + dy * dy, along = (px - ax) * dx + (py - ay) * dy;
    const double across = dx * (py - ay) - dy * (px - ax);
    if (along > 0.01 * length2 && along < 0.99 * length2 && across * across < 0.98 * corridor.half_width * corridor.half_width * length2) return true;
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

IRLVLA_HD bool may_meet(const Vehicle& vehicle, int u) { return (vehicle.near >> (u & 63)) & 1; }

/// Whether a box or a strip, the second of two rings, touches the outline of a vehicle's path ahead.
IRLVLA_HD_CALLED bool in_way(World& world, const Corridor& corridor, const Bounds& bounds, const Ring* rings) {
  const Stretch stretch = stretch_near(corridor, bounds);
  if (stretch.last < 0) return false;
  if (surely_covers(corridor, stretch, 0.5 * (rings[0].x[0] + rings[0].x[2]), 0.5 * (rings[0].y[0] + rings[0].y[2]))) return true;
  buffer(corridor.path, cut(corridor.ahead, stretch), corridor.half_width, world.corridor);
  return rings_touch(world.corridor, rings[0]) || rings_touch(world.corridor, rings[1]);
}

enum Glance { kClear, kBlocked, kUnsure };

/// Whether vehicle u lies in the way of v, as far as it is known for the pieces of their paths.
IRLVLA_HD_CALLED Glance glance(const PackedScene& scene, World& world, int v, int u) {
  const int32_t begin = scene.at(scene.meeting_of)[v * scene.vehicles + u];
  const Vehicle &own = scene.at(scene.vehicle)[v], &other = scene.at(scene.vehicle)[u];
  Driver& d = world.driver[u];
  if (begin < 0) return kUnsure;
  span(path_of(scene, other), other, d);
  if (d.beyond) return kUnsure;
  const Path path = path_of(scene, own);
  const double from = larger(path.at[0].progress, smaller(world.driver[v].progress, path.at[path.count - 2].progress));
  const Meeting* meeting = scene.at(scene.meeting) + begin - other.first;
  if (from <= meeting[d.middle].sure) return kBlocked;
  for (int k = meeting[d.rear].next; k <= d.front; ++k)
    if (from <= meeting[k].last) return kUnsure;
  return kClear;
}

IRLVLA_HD_CALLED bool vehicle_in_way(const PackedScene& scene, World& world, int v, int u) {
  driver_at(scene, world, u, world.now - (u > v));  // those before it in their order have taken the step already
  const Glance known = glance(scene, world, v, u);
  if (known != kUnsure) return known == kBlocked;
  const Corridor corridor = corridor_of(scene, world, v);
  if (stretch_near(corridor, extent(scene, world, u)).last < 0) return false;
  Driver& other = world.driver[u];
  settle(scene, world, u);
  return in_way(world, corridor, other.bounds, other.ring);
}

IRLVLA_HD bool ego_in_way(const PackedScene& scene, World& world, int v, const Sight& ego) {
  return in_way(world, corridor_of(scene, world, v), ego.ring[0].bounds, ego.ring);
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
