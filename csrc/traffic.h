// Reactive traffic around one candidate: IDM vehicles as the devkit drives them (navsim NavsimIDMTrafficAgents, nuplan idm).
// Inline, host and device. What looks odd in a rule is part of the official score; irlvla.ops.reference.traffic says it plainly.
#pragma once
#include "traffic_agents.h"

namespace irlvla {
namespace IRLVLA_ISA {

/// The one in front: the nearest of those in the way. Of equally near ones the devkit's tree finds that whose middle lies lowest.
struct Lead {
  double gap = kInfinity, middle = kInfinity, speed = 0.0, heading = 0.0;
  int number = 0;  // of vehicles that are alike the first is it
  bool found = false;

  /// Nothing farther than this is of interest.
  IRLVLA_HD double most() const { return found ? gap * (1.0 + 1e-12) + 1e-12 : kInfinity; }

  IRLVLA_HD bool beats(double distance, double its_middle, int its_number) const {
    if (!found || distance != gap) return found && gap < distance;
    return middle < its_middle || (middle == its_middle && number < its_number);
  }

  IRLVLA_HD void consider(int its_number, double distance, const Bounds& bounds, double its_speed, double its_heading) {
    const double its_middle = bounds.y0 + bounds.y1;
    if (beats(distance, its_middle, its_number)) return;
    gap = distance, middle = its_middle, speed = its_speed, heading = its_heading, number = its_number, found = true;
  }
};

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

/// Calls visit(u) for the other vehicles among `bits` (u % 64), in their order, until one returns true.
template <class Visit> IRLVLA_HD bool each_other(const PackedScene& scene, int v, uint64_t bits, Visit visit) {
  for (int base = 0; base < scene.vehicles; base += 64)
    for (uint64_t left = bits; left; left &= left - 1) {
      const int u = base + lowest_bit(left);
      if (u >= scene.vehicles) break;
      if (u != v && visit(u)) return true;
    }
  return false;
}

/// Notes how far the others in a vehicle's way are at least. Returns which are (bit u % 64), and the one that seems nearest.
IRLVLA_HD_CALLED uint64_t look_ahead(const PackedScene& scene, World& world, int v, int& nearest) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  const Driver& d = world.driver[v];
  uint64_t met = 0;
  nearest = -1;
  each_other(scene, v, vehicle.near, [&](int u) {
    Driver& other = world.driver[u];
    other.away = kInfinity;
    if (other.gone_at < kSteps || !vehicle_in_way(scene, world, v, u)) return false;
    met |= bit_of(u);
    settle(scene, world, v);
    other.away = gap2(d.bounds, extent(scene, world, u));
    if (nearest < 0 || other.away < world.driver[nearest].away) nearest = u;
    return false;
  });
  return met;
}

/// One step of a vehicle. Returns which others lie in its way (bit u % 64). `ego`: null where it does not.
IRLVLA_HD_CALLED uint64_t drive(const PackedScene& scene, World& world, int v, const Sight* ego) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  Driver& d = world.driver[v];
  Lead lead;
  const auto ask = [&](int u) {
    Driver& other = world.driver[u];
    const double most = lead.most();
    if (other.away == kInfinity || other.away > most * most) return false;
    settle(scene, world, u);
    const double gap = region_distance(d, other.ring, other.bounds, most);
    lead.consider(u, gap, other.bounds, other.speed, other.pose.heading);
    return false;
  };
  int nearest;
  const uint64_t met = look_ahead(scene, world, v, nearest);
  if (met) {
    ask(nearest);
    each_other(scene, v, met & vehicle.near, [&](int u) { return u != nearest && ask(u); });
  }
  if (ego) {
    settle(scene, world, v);
    const Bounds& bounds = ego->ring[0].bounds;
    lead.consider(scene.vehicles, region_distance(d, ego->ring, bounds, lead.most()), bounds, ego->speed, ego->heading);
  }
  if (lead.found) {
    double sine, cosine;
    sine_cosine(principal(lead.heading - d.pose.heading), sine, cosine);
    advance(vehicle, d, lead.gap, lead.speed * cosine);
  } else {
    advance(vehicle, d, path_of(scene, vehicle).end() - d.progress - vehicle.length / 2.0, 0.0);
  }
  return met;
}

/// Vehicles (bit v % 64) whose path may touch one of the discs that cover the ego's box, which lies on the grid.
IRLVLA_HD uint64_t watched_by_discs(const PackedScene& scene, const Corners& box) {
  const double x = (0.5 * (box.x[0] + box.x[2]) - scene.watch_x) / kWatchCell;
  const double y = (0.5 * (box.y[0] + box.y[2]) - scene.watch_y) / kWatchCell;
  const double dx = (box.x[0] - box.x[1]) / (3.0 * kWatchCell), dy = (box.y[0] - box.y[1]) / (3.0 * kWatchCell);
  const uint64_t* discs = scene.at(scene.watch_discs);
  uint64_t found = 0;
  for (int k = -1; k <= 1; ++k) found |= discs[static_cast<int>(y + k * dy) * kWatch + static_cast<int>(x + k * dx)];
  return found;
}

/// Vehicles (bit v % 64) whose path the ego's box may touch.
IRLVLA_HD_CALLED uint64_t watched(const PackedScene& scene, const Sight& ego) {
  const Bounds& b = ego.ring[0].bounds;
  const double x0 = (b.x0 - scene.watch_x) / kWatchCell, x1 = (b.x1 - scene.watch_x) / kWatchCell;
  const double y0 = (b.y0 - scene.watch_y) / kWatchCell, y1 = (b.y1 - scene.watch_y) / kWatchCell;
  if (!(x0 >= 0.0 && y0 >= 0.0 && x1 < kWatch && y1 < kWatch)) return ~uint64_t{0};
  const uint64_t possible = watched_by_discs(scene, ego.box);
  if (!possible) return 0;
  const uint64_t* cells = scene.at(scene.watch);
  double cx[4], cy[4];
  for (int k = 0; k < 4; ++k) cx[k] = (ego.box.x[k] - scene.watch_x) / kWatchCell, cy[k] = (ego.box.y[k] - scene.watch_y) / kWatchCell;
  double slope[4];
  for (int k = 0; k < 4; ++k) {
    const double dx = cx[(k + 1) & 3] - cx[k], dy = cy[(k + 1) & 3] - cy[k];
    slope[k] = absolute(dy) > 1e-9 ? dx / dy : 0.0;
  }
  uint64_t found = 0;
  for (int row = static_cast<int>(y0); row <= static_cast<int>(y1) && found != possible; ++row) {
    double from = kWatch, to = 0.0;  // the box within the row
    for (int k = 0; k < 4; ++k) {
      const int l = (k + 1) & 3;
      const double low = smaller(cy[k], cy[l]), high = larger(cy[k], cy[l]);
      if (high < row || low > row + 1) continue;
      const double xa = high - low > 1e-9 ? cx[k] + (larger(low, row) - cy[k]) * slope[k] : cx[k];
      const double xb = high - low > 1e-9 ? cx[k] + (smaller(high, row + 1) - cy[k]) * slope[k] : cx[l];
      from = smaller(from, smaller(xa, xb)), to = larger(to, larger(xa, xb));
    }
    const int first = static_cast<int>(larger(from - 1e-6, 0.0)), last = static_cast<int>(smaller(to + 1e-6, kWatch - 1));
    for (int column = first; column <= last; ++column) found |= cells[row * kWatch + column] & possible;
  }
  return found;
}

/// Whether what the ego changed matters to a vehicle at this step.
IRLVLA_HD_CALLED bool concerned(const PackedScene& scene, World& world, int v) {
  if (world.driver[v].changed) return true;
  const uint64_t suspects = scene.at(scene.vehicle)[v].near & world.changed;
  if (scene.at(scene.plain_met)[v * kSteps + world.now] & suspects) return true;
  return each_other(scene, v, suspects, [&](int u) {
    return world.driver[u].changed && world.driver[u].gone_at == kSteps && vehicle_in_way(scene, world, v, u);
  });
}

/// Nothing within some bounds is ever so far from the ego that it leaves; `trip`: where the ego goes.
IRLVLA_HD bool all_within(const Bounds& reach, const Bounds& trip) {
  const double dx = larger(reach.x1 - trip.x0, trip.x1 - reach.x0), dy = larger(reach.y1 - trip.y0, trip.y1 - reach.y0);
  return dx * dx + dy * dy < kRadius * kRadius;
}

/// Vehicles (bit v % 64) that may leave.
IRLVLA_HD uint64_t leaving(const PackedScene& scene, const Bounds& trip) {
  uint64_t found = 0;
  if (all_within(scene.reach, trip)) return found;
  for (int v = 0; v < scene.vehicles; ++v)
    if (!all_within(scene.at(scene.vehicle)[v].reach, trip)) found |= bit_of(v);
  return found;
}

/// A vehicle does not leave now: all that it can occupy is near the ego, or what it occupies without the ego.
IRLVLA_HD bool surely_stays(const PackedScene& scene, const World& world, int v, const Sight& ego) {
  const Bounds here{ego.x, ego.y, ego.x, ego.y};
  if (all_within(scene.at(scene.vehicle)[v].reach, here)) return true;
  const int before = world.now - 1;
  return before > 0 && !world.driver[v].changed && all_within(scene.at(scene.footprint)[v * kSteps + before].bounds, here);
}

/// Agents farther than 100 m from the ego leave for good.
IRLVLA_HD_CALLED void leave(const PackedScene& scene, World& world, uint64_t some, const Sight& ego) {
  each_other(scene, -1, some, [&](int v) {
    if (world.driver[v].gone_at < kSteps || surely_stays(scene, world, v, ego)) return false;
    Driver& d = driver_at(scene, world, v, world.now - 1);
    const Path path = path_of(scene, scene.at(scene.vehicle)[v]);
    d.middle = path.walk(d.middle, d.progress);
    const Pose<double> pose = path.pose(d.middle, path.clamp(d.progress));
    const double px = pose.x - ego.x, py = pose.y - ego.y;
    if (square_root(px * px + py * py) > kRadius) d.gone_at = world.now, mark_changed(scene, world, v, world.now);
    return false;
  });
}

/// A vehicle has taken this step.
IRLVLA_HD void record(World& world, int v) {
  Driver& d = world.driver[v];
  d.step = world.now;
  world.progress[v * kSteps + d.step] = d.progress, world.speed[v * kSteps + d.step] = d.speed;
}

/// One step of a vehicle around the ego; null where it cannot be in the way.
IRLVLA_HD_CALLED void react(const PackedScene& scene, World& world, int v, const Sight* ego) {
  const int t = world.now;
  Driver& d = driver_at(scene, world, v, t - 1);
  if (d.gone_at < kSteps) return;
  if (ego && !ego_in_way(scene, world, v, *ego)) ego = nullptr;
  if (!ego && !concerned(scene, world, v)) return;
  drive(scene, world, v, ego);
  const double* plain = scene.at(scene.plain) + 2 * v * kSteps;
  if (d.progress != plain[t] || d.speed != plain[kSteps + t]) mark_changed(scene, world, v, t);
  record(world, v);
}

/// One step of all vehicles, in their order: each of those that the ego, or what it changed, may matter to.
IRLVLA_HD_CALLED void take_step(const PackedScene& scene, World& world, const Sight& ego) {
  const uint64_t seen = watched(scene, ego);
  for (int base = 0; base < scene.vehicles; base += 64) {
    uint64_t ahead = ~uint64_t{0};
    for (uint64_t left = ahead & (seen | world.stirred); left; left = ahead & (seen | world.stirred)) {
      const int k = lowest_bit(left);
      if (base + k >= scene.vehicles) break;
      react(scene, world, base + k, (seen >> k) & 1 ? &ego : nullptr);
      ahead = ~uint64_t{1} << k;
    }
  }
}

/// Drive all traffic around an ego; see(t) is what it looks like at step t.
template <class See> IRLVLA_HD void rollout(const PackedScene& scene, World& world, See see) {
  start(scene, world);
  Bounds trip = nothing();
  for (int t = 0; t + 1 < kSteps; ++t) {
    const Sight ego = see(t);
    include(trip, ego.x, ego.y);
  }
  const uint64_t some = leaving(scene, trip);
  for (world.now = 1; world.now < kSteps; ++world.now) {
    Sight ego = see(world.now - 1);
    ego.ring[0] = ring_of(ego.box), ego.ring[1] = {nullptr, nullptr, 0, nothing()};
    leave(scene, world, some, ego);
    take_step(scene, world, ego);
  }
  stay(scene, world);
}

/// Drive all traffic as if there were no ego. Calls keep(v, t) when a vehicle has taken a step and occupies what it then does;
/// notes whom each `met`.
template <class Keep> IRLVLA_HD void rollout_alone(const PackedScene& scene, World& world, uint64_t* met, Keep keep) {
  world.plain_known = false;
  start(scene, world);
  for (world.now = 0; world.now < kSteps; ++world.now) {
    for (int v = 0; v < scene.vehicles && world.now > 0; ++v) {
      met[v * kSteps + world.now] = drive(scene, world, v, nullptr);
      record(world, v);
    }
    for (int v = 0; v < scene.vehicles; ++v) {
      settle(scene, world, v);
      keep(v, world.now);
    }
  }
  stay(scene, world);
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
