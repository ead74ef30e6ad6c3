// Reactive traffic around one candidate: IDM vehicles as the devkit drives them (navsim NavsimIDMTrafficAgents, nuplan idm).
// Inline, host and device. What looks odd in a rule is part of the official score; irlvla.ops.reference.traffic says it plainly.
#pragma once
#include "traffic_agents.h"

namespace irlvla {
namespace IRLVLA_ISA {

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

/// One step of a vehicle. Returns which others lie in its way (bit u % 64). `ego`: null where it cannot.
IRLVLA_HD_CALLED uint64_t drive(const PackedScene& scene, World& world, int v, Sight* ego) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  Driver& d = world.driver[v];
  uint64_t met = 0;
  Lead lead;
  each_other(scene, v, vehicle.near, [&](int u) {
    Driver& other = world.driver[u];
    if (other.gone_at < kSteps || !vehicle_in_way(scene, world, v, u)) return false;
    met |= uint64_t{1} << (u & 63);
    settle(scene, vehicle, d);
    const double most = lead.most();
    if (gap2(d.bounds, extent(scene, world, u)) > most * most) return false;
    settle(scene, scene.at(scene.vehicle)[u], other);
    lead.consider(region_distance(d, other.box, other.strip, other.bounds, most), other.bounds, other.speed, other.pose.heading);
    return false;
  });
  if (ego && ego_in_way(scene, world, v, *ego)) {
    const Ring none{nullptr, nullptr, 0, nothing()};
    settle(scene, vehicle, d);
    lead.consider(region_distance(d, ego->box, none, ego->ring.bounds, lead.most()), ego->ring.bounds, ego->speed, ego->heading);
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

/// Vehicles (bit v % 64) whose path the ego's box may touch.
IRLVLA_HD_CALLED uint64_t watched(const PackedScene& scene, const Sight& ego) {
  const Bounds& b = ego.ring.bounds;
  const double x0 = (b.x0 - scene.watch_x) / kWatchCell, x1 = (b.x1 - scene.watch_x) / kWatchCell;
  const double y0 = (b.y0 - scene.watch_y) / kWatchCell, y1 = (b.y1 - scene.watch_y) / kWatchCell;
  if (!(x0 >= 0.0 && y0 >= 0.0 && x1 < kWatch && y1 < kWatch)) return ~uint64_t{0};
  const uint64_t *cells = scene.at(scene.watch), *blocks = scene.at(scene.watch_blocks);
  uint64_t possible = 0;
  for (int row = static_cast<int>(y0) / kWatchBlock; row <= static_cast<int>(y1) / kWatchBlock; ++row)
    for (int column = static_cast<int>(x0) / kWatchBlock; column <= static_cast<int>(x1) / kWatchBlock; ++column)
      possible |= blocks[row * kWatchBlocks + column];
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
    for (int column = first; column <= last; ++column) found |= cells[row * kWatch + column];
  }
  return found;
}

/// Whether the ego, or what it changed, matters to a vehicle at step t. `changed` has a bit for each vehicle, v % 64.
IRLVLA_HD_CALLED bool concerned(const PackedScene& scene, World& world, int v, int t, uint64_t changed, Sight* ego) {
  if (world.driver[v].changed) return true;
  const uint64_t suspects = scene.at(scene.vehicle)[v].near & changed;
  if (scene.at(scene.plain_met)[v * kSteps + t] & suspects) return true;
  if (ego && ego_in_way(scene, world, v, *ego)) return true;
  return each_other(scene, v, suspects, [&](int u) {
    return world.driver[u].changed && world.driver[u].gone_at == kSteps && vehicle_in_way(scene, world, v, u);
  });
}

/// Nothing within some bounds is so far from the ego that it leaves.
IRLVLA_HD bool all_within(const Bounds& reach, const Sight& ego) {
  const double dx = larger(absolute(reach.x0 - ego.x), absolute(reach.x1 - ego.x)), dy = larger(absolute(reach.y0 - ego.y), absolute(reach.y1 - ego.y));
  return dx * dx + dy * dy < kRadius * kRadius;
}

/// Agents farther than 100 m from the ego leave for good.
IRLVLA_HD_CALLED void leave(const PackedScene& scene, World& world, int t, const Sight& ego) {
  const Vehicle* vehicles = scene.at(scene.vehicle);
  if (all_within(scene.reach, ego)) return;
  for (int v = 0; v < scene.vehicles; ++v) {
    Driver& d = world.driver[v];
    if (d.gone_at < kSteps || all_within(vehicles[v].reach, ego)) continue;
    const Path path = path_of(scene, vehicles[v]);
    const Pose<double> pose = path.pose(path.clamp(d.progress));
    const double px = pose.x - ego.x, py = pose.y - ego.y;
    if (square_root(px * px + py * py) > kRadius) d.gone_at = t, d.since = d.changed ? d.since : t, d.changed = 1;
  }
}

/// One step of all vehicles, in their order. Without an ego, in a world of its own.
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
    Sight* sees = (seen >> (v & 63)) & 1 ? ego : nullptr;
    if (ego && !concerned(scene, world, v, t, changed, sees)) {
      d.progress = progress[t], d.speed = speed[t];
    } else {
      const uint64_t met = drive(scene, world, v, sees);
      if (world.met) world.met[v * kSteps + t] = met;
      if (ego && (d.progress != progress[t] || d.speed != speed[t])) {
        d.since = d.changed ? d.since : t, d.changed = 1;
        changed |= uint64_t{1} << (v & 63);
      }
    }
    d.step = t;
    world.progress[v * kSteps + t] = d.progress, world.speed[v * kSteps + t] = d.speed;
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

/// The ego at a state.
IRLVLA_HD Sight sight_of(const State<double>& s) {
  Sight ego;
  ego.x = s.x, ego.y = s.y, ego.heading = s.heading, ego.speed = magnitude(s.vx, s.vy);
  ego.box = box_corners(s.x, s.y, s.heading, kHalfLength, kHalfWidth);
  return ego;
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
