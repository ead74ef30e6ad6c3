// The agents that vehicles of reactive traffic become around one candidate. Inline, host and device.
#pragma once
#include "drivers.h"

namespace irlvla {
namespace IRLVLA_ISA {

/// Let the bounds of an agent hold those of a step.
IRLVLA_HD void include(Agent& agent, int t) {
  const Envelope& e = agent.envelope;
  agent.x0 = e.x0[t] < agent.x0 ? e.x0[t] : agent.x0, agent.x1 = e.x1[t] > agent.x1 ? e.x1[t] : agent.x1;
  agent.y0 = e.y0[t] < agent.y0 ? e.y0[t] : agent.y0, agent.y1 = e.y1[t] > agent.y1 ? e.y1[t] : agent.y1;
}

/// Directions and envelopes of an agent whose places are known.
IRLVLA_HD_CALLED void turn_to(const PackedScene& scene, Agent& agent, int first, int last, const double* heading) {
  double lateral[kSteps];
  for (int t = first; t < last; ++t) lateral[t] = heading[t] + kHalfPi;
  sines_cosines(heading + first, last - first, agent.sine + first, agent.cosine + first);
  sines_cosines(lateral + first, last - first, agent.lateral_sine + first, agent.lateral_cosine + first);
  Envelope& e = agent.envelope;
  for (int t = first; t < last; ++t) {
    const double c = absolute(agent.cosine[t]), s = absolute(agent.sine[t]);
    const double x = agent.x[t] - scene.origin_x, y = agent.y[t] - scene.origin_y;
    const double ex = c * agent.half_length + s * agent.half_width, ey = s * agent.half_length + c * agent.half_width;
    outward(x - ex, x + ex, e.x0[t], e.x1[t]);
    outward(y - ey, y + ey, e.y0[t], e.y1[t]);
  }
  for (int t = first; t < last; ++t) include(agent, t);
}

/// Forget all steps of an agent from `first` on.
IRLVLA_HD void empty(Agent& agent, int first) {
  for (int t = first; t < kFrames; ++t)
    agent.envelope.x0[t] = agent.envelope.y0[t] = 3e38f, agent.envelope.x1[t] = agent.envelope.y1[t] = -3e38f;
  agent.x0 = agent.y0 = 3e38f, agent.x1 = agent.y1 = -3e38f;
  for (int t = 0; t < first; ++t) include(agent, t);
}

/// The agent that a vehicle has become from a step on; before it stays as it is.
IRLVLA_HD_CALLED void dress(const PackedScene& scene, const World& world, int v, int first, Agent& agent) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  const Path path = path_of(scene, vehicle);
  empty(agent, first);
  const int last = world.driver[v].gone_at < kSteps ? world.driver[v].gone_at : kSteps;
  double heading[kSteps];
  int piece = vehicle.first;
  for (int t = first; t < last; ++t) {
    const double progress = path.clamp(world.progress[v * kSteps + t]);
    piece = path.walk(piece, progress);
    const Pose<double> pose = path.pose(piece, progress);
    agent.x[t] = pose.x, agent.y[t] = pose.y, heading[t] = pose.heading;
  }
  turn_to(scene, agent, first, last, heading);
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
  const Passage* passages = scene.at(scene.passage);
  const Standing* standing = scene.at(scene.stander);
  const uint64_t* plain = scene.at(scene.stays);
  for (int i = 0; i < scene.standing; ++i) {
    const Corners& own = standing[i].box;
    const Passage* passage = passages + i * scene.vehicles;
    bool same = world.plain_known;
    for (int v = 0; v < scene.vehicles && same; ++v) same = !world.driver[v].changed || passage[v].from > passage[v].to;
    for (int j = 0; j < i && same; ++j) same = world.standing[j] == plain[j] || !overlap(own, standing[j].box);
    world.standing[i] = plain[i];
    if (same) continue;
    uint64_t free = ((uint64_t{1} << kSteps) - 1) & ~uint64_t{1};
    for (int j = 0; j < i; ++j)
      if (overlap(own, standing[j].box)) free &= ~world.standing[j];
    for (int v = 0; v < scene.vehicles; ++v) {
      if (passage[v].from > passage[v].to) continue;
      const Path path = path_of(scene, vehicles[v]);
      for (int t = 1; t < world.driver[v].gone_at && t < kSteps; ++t) {
        const double progress = path.clamp(history_of(scene, world, v, 0, t));
        if (progress < passage[v].from || progress > passage[v].to) continue;
        const Pose<double> pose = path.pose(progress);
        if (overlap(own, box_corners(pose.x, pose.y, pose.heading, vehicles[v].length / 2.0, vehicles[v].width / 2.0))) free &= ~(uint64_t{1} << t);
      }
    }
    world.standing[i] = free;
  }
}

IRLVLA_HD Bounds everywhere() { return {-kInfinity, -kInfinity, kInfinity, kInfinity}; }

/// Where a track may meet someone.
IRLVLA_HD Bounds around(const PackedScene& scene, const Track& track) {
  const double x = scene.origin_x, y = scene.origin_y;
  return {track.x0 + x, track.y0 + y, track.x1 + x, track.y1 + y};
}

/// All that a vehicle has been on, and where it was before it was put on its lane.
IRLVLA_HD Bounds swept(const PackedScene& scene, const World& world, int v) {
  const Vehicle& vehicle = scene.at(scene.vehicle)[v];
  const Path path = path_of(scene, vehicle);
  const int first = path.walk(vehicle.first, vehicle.progress), last = path.walk(first, world.driver[v].progress);
  Bounds b = nothing();
  for (int k = 0; k < 4; ++k) include(b, vehicle.box.x[k], vehicle.box.y[k]);
  for (int k = first; k <= last + 1; ++k) include(b, path.at[k].x, path.at[k].y);
  const double margin = 0.5 * (vehicle.length + vehicle.width) + kSnap + 0.1;
  return {b.x0 - margin, b.y0 - margin, b.x1 + margin, b.y1 + margin};
}

/// Make the agents that the ego changed, as far as they may come within one of two bounds. Those that it did not are the scene's own.
IRLVLA_HD void dress_changed(const PackedScene& scene, World& world, const Bounds& here, const Bounds& there) {
  const Agent* agents = scene.at(scene.agent);
  for (int v = 0; v < scene.vehicles; ++v) {
    if (!world.driver[v].changed) continue;
    const Bounds own = swept(scene, world, v);
    if (meets(own, here) || meets(own, there)) {
      world.agent[v] = agents[scene.at(scene.vehicle)[v].agent];
      dress(scene, world, v, world.driver[v].since, world.agent[v]);
    } else {
      empty(world.agent[v], 0);
    }
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

}  // namespace IRLVLA_ISA
}  // namespace irlvla
