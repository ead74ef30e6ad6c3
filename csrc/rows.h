// What each public operator does for one row, candidate or pair: the CPU and CUDA drivers only loop over them.
#pragma once
#include "traffic.h"

namespace irlvla {

/// N plans to N x 41 x 11 states. Plans are poses in the ego frame, or 41 poses in the map frame.
struct SimulateTask {
  int64_t rows;
  const double* plans;  // N T 3
  int poses;
  double step;
  int map_frame;
  const double* ego;       // N 11
  const int64_t* time_us;  // N
  double* states;          // N 41 11
};

enum Input { kPlans, kPoses, kStates };

// Columns of what `score` writes. The first eight metrics stand as in METRICS of irlvla.types, with progress in place of EP.
enum Metric { kNc, kDac, kDdc, kTlc, kProgress, kTtc, kLk, kHc, kOncoming, kNcV1, kTtcV1, kComfortV1, kDdcV1, kReferenceNc, kMetrics };
enum Event { kCollisionStep, kCollisionAgent, kTtcStep, kTtcAgent, kOffCentreRun, kComfortBits, kEvents };
enum Mask { kMultipleLanesMask, kOffRoadMask, kOffRouteMask, kIntersectionMask, kRedLightMask, kMasks };  // bit t: step t

constexpr int64_t kMotionBytes = 2632;      // scratch of a candidate on a GPU
constexpr int64_t kMotionsHeld = 1 << 16;   // candidates that are on their way there at once

struct ScoreTask {
  int64_t candidates;
  const char* scenes;            // prepared scenes, one after the other
  const int64_t* scene_offsets;  // of each, in bytes
  const int64_t* scene_index;    // N; neighbours of one scene share the work
  Input input;
  const double* plans;  // N T 3, N 41 3 or N 41 11
  int poses;
  double step;
  int remove_touching;  // log replay: agents that touch the ego at t = 0 are not there
  int pdms;             // also the metrics of v1
  double* metrics;      // N kMetrics
  int32_t* events;      // N kEvents
  int64_t* masks;       // N kMasks
  double* states;       // N 41 11, or null
  void* scratch;        // on a GPU: kMotionBytes and `world_bytes` for each of `held` candidates
  int64_t held;
  // reactive traffic, in scenes prepared for it; null otherwise
  const double* reference;         // B 41 11: how the reference plan drives; it meets the traffic of each candidate
  const int64_t* reference_masks;  // B kMasks
  int64_t world_bytes;             // at least those of every scene
};

/// The agents of candidates in reactive traffic, as tracks.
struct TrafficTask {
  int64_t rows;
  const char* scenes;
  const int64_t *scene_offsets, *scene_index;
  const double* states;           // N 41 11
  const int64_t* track_offsets;   // N: where the agents of a candidate begin
  double* tracks;                 // R 41 5: x y heading vx vy; vehicles are written from step 1 on
  uint8_t* present;               // R 41
  void* scratch;                  // on a GPU: `world_bytes` for each of `held` candidates
  int64_t held, world_bytes;
};

struct ExtendedComfortTask {
  int64_t rows;
  const double *states, *previous;  // N 41 11
  const int64_t* shift;             // N
  double* rms;                      // N 4
  uint8_t* comfortable;             // N
};

struct ComfortTask {
  int64_t rows;
  const double* states;  // N T 11
  int steps, plain;      // plain: the rules of v1
  uint8_t* within;       // N 6
};

struct BoxesOverlapTask {
  int64_t rows;
  const double *a, *b;  // N 5: x y heading length width
  uint8_t* overlaps;
};

struct PointsInPolygonsTask {
  int64_t rows;  // points * polygons
  int64_t polygons;
  const double* points;         // N 2
  const double* edges;          // E 4
  const int64_t* edge_offsets;  // P + 1
  uint8_t* inside;              // N P
};

struct ProjectTask {
  int64_t rows;
  const double* points;  // N 2
  int64_t segments;
  const double* edges;  // L - 1, 4
  double *along, *distance;
};

struct TimeToCollisionTask {
  int64_t rows;          // N * 41
  const double* states;  // N 41 11
  int64_t agents, agent_steps;
  const double* boxes;   // A S 5
  const uint8_t* valid;  // A S
  double* seconds;       // N 41
};

namespace IRLVLA_ISA {

IRLVLA_HD State<double> load_state(const double* s) { return {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10]}; }

IRLVLA_HD void store_state(const State<double>& s, double* out) {
  const double v[kStateSize] = {s.x,        s.y,  s.heading, s.vx, s.vy, s.ax, s.ay, s.steering, s.steering_rate, s.angular_velocity,
                                s.angular_acceleration};
  for (int i = 0; i < kStateSize; ++i) out[i] = v[i];
}

/// Reference poses of one plan, from whatever frame it comes in.
template <class Put>
IRLVLA_HD void reference_poses(const double* plan, int map_frame, int poses, double step, const State<double>& ego, int64_t time_us, Put put) {
  if (map_frame) interpolate_poses(plan, time_us, put);
  else interpolate_plan(plan, poses, step, time_us, {ego.x, ego.y, ego.heading}, put);
}

IRLVLA_HD void simulate_row(const SimulateTask& task, int64_t i) {
  State<double> states[kSteps];
  Pose<double> ref[kSteps];
  double sine[kSteps], cosine[kSteps];
  states[0] = load_state(task.ego + i * kStateSize);
  round_trip(states[0]);
  reference_poses(task.plans + i * task.poses * 3, task.map_frame, task.poses, task.step, states[0], task.time_us[i],
                  [&](int k, const Pose<double>& pose) { ref[k] = pose; });
  track(ref, states, sine, cosine);
  for (int t = 0; t < kSteps; ++t) store_state(states[t], task.states + (i * kSteps + t) * kStateSize);
}

IRLVLA_HD void extended_comfort_row(const ExtendedComfortTask& task, int64_t i) {
  State<double> now[kSteps], before[kSteps];
  for (int t = 0; t < kSteps; ++t) {
    now[t] = load_state(task.states + (i * kSteps + t) * kStateSize);
    before[t] = load_state(task.previous + (i * kSteps + t) * kStateSize);
  }
  double rms[4];
  comfort_differences(now, before, static_cast<int>(task.shift[i]), rms);
  bool all = true;
  for (int k = 0; k < 4; ++k) task.rms[4 * i + k] = rms[k], all = all && rms[k] <= extended_limit(k);
  task.comfortable[i] = all;
}

IRLVLA_HD void comfort_row(const ComfortTask& task, int64_t i) {
  double lon[kMaxSamples] = {}, lat[kMaxSamples] = {}, total[kMaxSamples] = {}, yaw[kMaxSamples] = {};
  for (int t = 0; t < task.steps; ++t) {
    const State<double> s = load_state(task.states + (i * task.steps + t) * kStateSize);
    lon[t] = task.plain ? s.ax : centre_acceleration(s);
    lat[t] = s.ay, total[t] = magnitude(s.ax, s.ay), yaw[t] = s.heading;
  }
  const Comfort<double> c = task.plain ? comfort<kSteps, kSteps>(lon, lat, total, yaw, task.steps) : comfort<8, 15>(lon, lat, total, yaw, task.steps);
  for (int k = 0; k < 6; ++k) task.within[6 * i + k] = c.within[k];
}

IRLVLA_HD void boxes_overlap_row(const BoxesOverlapTask& task, int64_t i) {
  const double *a = task.a + 5 * i, *b = task.b + 5 * i;
  task.overlaps[i] = overlap(box_corners(a[0], a[1], a[2], a[3] / 2.0, a[4] / 2.0), box_corners(b[0], b[1], b[2], b[3] / 2.0, b[4] / 2.0));
}

IRLVLA_HD void points_in_polygons_row(const PointsInPolygonsTask& task, int64_t i) {
  const int64_t point = i / task.polygons, polygon = i % task.polygons, begin = task.edge_offsets[polygon];
  const Edge* edges = reinterpret_cast<const Edge*>(task.edges) + begin;
  task.inside[i] = locate(edges, static_cast<int>(task.edge_offsets[polygon + 1] - begin), task.points[2 * point], task.points[2 * point + 1]) > 0;
}

IRLVLA_HD void project_row(const ProjectTask& task, int64_t i) {
  const Edge* edges = reinterpret_cast<const Edge*>(task.edges);
  const double x = task.points[2 * i], y = task.points[2 * i + 1];
  double best = kInfinity, along = 0.0, start = 0.0;
  for (int64_t k = 0; k < task.segments; ++k) {
    const double d = segment_distance(edges[k], x, y);
    if (d < best) best = d, along = start + segment_fraction(edges[k], x, y) * length(edges[k]);
    start += length(edges[k]);
  }
  task.along[i] = along, task.distance[i] = best;
}

IRLVLA_HD void time_to_collision_row(const TimeToCollisionTask& task, int64_t i) {
  const int t = static_cast<int>(i % kSteps);
  const State<double> s = load_state(task.states + i * kStateSize);
  const double speed = magnitude(s.vx, s.vy);
  double sine, cosine;
  sine_cosine(s.heading, sine, cosine);
  const Corners here = box_corners(s.x + kRearToCentre * cosine, s.y + kRearToCentre * sine, s.heading, kHalfLength, kHalfWidth);
  double least = kInfinity;
  for (int k = 0; k < kOffsets && least == kInfinity && !(speed < 5e-3); ++k) {
    const int64_t u = t + 3 * k;
    const double ahead = (3 * k) * kStep;
    Corners box = here;
    for (int c = 0; c < 4; ++c) box.x[c] += cosine * speed * ahead, box.y[c] += sine * speed * ahead;
    for (int64_t a = 0; a < task.agents && u < task.agent_steps; ++a) {
      if (!task.valid[a * task.agent_steps + u]) continue;
      const double* b = task.boxes + (a * task.agent_steps + u) * 5;
      if (overlap(box, box_corners(b[0], b[1], b[2], b[3] / 2.0, b[4] / 2.0))) least = ahead;
    }
  }
  task.seconds[i] = least;
}

/// Tracks of one candidate's vehicles.
IRLVLA_HD void traffic_row(const TrafficTask& task, int64_t i, char* memory) {
  const PackedScene& scene = *reinterpret_cast<const PackedScene*>(task.scenes + task.scene_offsets[task.scene_index[i]]);
  World world = world_in(scene, memory);
  const double* states = task.states + i * kSteps * kStateSize;
  rollout(scene, world, [&](int t) { return sight_of(load_state(states + t * kStateSize)); });
  for (int v = 0; v < scene.vehicles; ++v) {
    const Vehicle& vehicle = scene.at(scene.vehicle)[v];
    const Path path = path_of(scene, vehicle);
    const int64_t row = (task.track_offsets[i] + vehicle.agent) * kSteps;
    for (int t = 1; t < world.driver[v].gone_at && t < kSteps; ++t) {
      const Pose<double> pose = path.pose(path.clamp(history_of(scene, world, v, 0, t)));
      const double speed = history_of(scene, world, v, 1, t);
      double sine, cosine, *out = task.tracks + 5 * (row + t);
      sine_cosine(pose.heading, sine, cosine);
      out[0] = pose.x, out[1] = pose.y, out[2] = pose.heading, out[3] = speed * cosine, out[4] = speed * sine;
      task.present[row + t] = 1;
    }
  }
  for (int s = 0; s < scene.standing; ++s) {
    const int64_t row = (task.track_offsets[i] + scene.at(scene.stander)[s].agent) * kSteps;
    for (int t = 1; t < kSteps; ++t) {
      if (!((world.standing[s] >> t) & 1)) continue;
      for (int k = 0; k < 5; ++k) task.tracks[5 * (row + t) + k] = task.tracks[5 * row + k];
      task.present[row + t] = 1;
    }
  }
}

// --- the whole score of one candidate -------------------------------------------------------------------------------

template <class Group> IRLVLA_HD Areas all_areas(const PackedScene& scene, const Track& track, const Group& group) {
  Areas a{0, 0, 0, 0, 0};
  for (int t = group.rank(); t < kSteps; t += Group::size) {
    const uint32_t bits = areas(scene, track, t);
    a.multiple_lanes |= static_cast<uint64_t>((bits & kMultipleLanes) != 0) << t;
    a.off_road |= static_cast<uint64_t>((bits & kOffRoad) != 0) << t;
    a.off_route |= static_cast<uint64_t>((bits & kOffRoute) != 0) << t;
    a.in_intersection |= static_cast<uint64_t>((bits & kInIntersection) != 0) << t;
    a.off_centre |= static_cast<uint64_t>((bits & kOffCentre) != 0) << t;
  }
  return {group.either(a.multiple_lanes), group.either(a.off_road), group.either(a.off_route), group.either(a.in_intersection),
          group.either(a.off_centre)};
}

constexpr uint64_t kNever = ~uint64_t{0};

/// First event over all agents, as (step * 4 + TTC offset) * 2^32 + agent, and whether users or objects are involved.
struct Encounters {
  uint64_t collision = kNever, approach = kNever;
  bool with_object = false, with_user = false;              // at-fault collisions
  bool v1_object = false, v1_user = false, v1_approach = false;
};

IRLVLA_HD uint64_t event_key(const Contact& contact, int agent) {
  return static_cast<uint64_t>(contact.step * kOffsets + contact.ahead) << 32 | static_cast<uint32_t>(agent);
}

IRLVLA_HD void meet(const PackedScene& scene, const World* world, const Track& track, const Areas& areas, int a, bool removed, bool pdms,
                    uint64_t moving, Encounters& e) {
  const Agent& agent = agent_in(scene, world, a);
  if (agent.x1 < track.x0 || track.x1 < agent.x0 || agent.y1 < track.y0 || track.y1 < agent.y0) return;
  removed = removed && agent.touches_ego;
  if (removed && !pdms) return;
  const Contact hit = first_collision(track, areas, agent);
  if (hit.counts) {
    (agent.fixed ? e.v1_object : e.v1_user) = true;
    const uint64_t key = event_key(hit, a);
    if (!removed) {
      (agent.fixed ? e.with_object : e.with_user) = true;
      e.collision = key < e.collision ? key : e.collision;
    }
  }
  const Contact near = first_approach(scene, track, areas, agent, moving);
  if (near.counts) {
    e.v1_approach = true;
    const uint64_t key = event_key(near, a);
    if (!removed && near.step < kTtcSteps) e.approach = key < e.approach ? key : e.approach;
  }
}

template <class Group>
IRLVLA_HD Encounters all_encounters(const PackedScene& scene, const World* world, const Track& track, const Areas& areas, bool removed, bool pdms,
                                    const Group& group) {
  uint64_t moving = 0;
  for (int t = 0; t < (pdms ? kSteps : kTtcSteps); ++t) moving |= static_cast<uint64_t>(!(track.speed[t] < 5e-3)) << t;
  Encounters e;
  for (int a = group.rank(); a < scene.agents; a += Group::size) meet(scene, world, track, areas, a, removed, pdms, moving, e);
  const uint64_t kinds = group.either(e.with_object | e.with_user << 1 | e.v1_object << 2 | e.v1_user << 3 | e.v1_approach << 4);
  e.with_object = kinds & 1, e.with_user = kinds >> 1 & 1, e.v1_object = kinds >> 2 & 1, e.v1_user = kinds >> 3 & 1, e.v1_approach = kinds >> 4 & 1;
  e.collision = group.least(e.collision), e.approach = group.least(e.approach);
  return e;
}

IRLVLA_HD double collision_score(bool with_user, bool with_object) { return with_user ? 0.0 : with_object ? 0.5 : 1.0; }

IRLVLA_HD double progress_of(const ScoreTask& task, const PackedScene& scene, const Track& track) {
  const Edge* line = scene.at(scene.line);
  const double* start = scene.at(scene.line_start);
  const Bounds* blocks = scene.at(scene.line_blocks);
  double distance, begin = scene.progress_start;
  if (task.input == kStates) begin = locate_along(line, start, blocks, scene.segments, track.centre_x[0], track.centre_y[0], distance);
  const double end = locate_along(line, start, blocks, scene.segments, track.centre_x[kSteps - 1], track.centre_y[kSteps - 1], distance);
  return larger(0.0, end - begin);
}

IRLVLA_HD void write_events(const Encounters& met, int run, uint32_t comfort, int32_t* out) {
  out[kCollisionStep] = met.collision == kNever ? -1 : static_cast<int32_t>(met.collision >> 32) / kOffsets;
  out[kCollisionAgent] = met.collision == kNever ? -1 : static_cast<int32_t>(met.collision & 0xffffffffu);
  out[kTtcStep] = met.approach == kNever ? -1 : static_cast<int32_t>(met.approach >> 32) / kOffsets;
  out[kTtcAgent] = met.approach == kNever ? -1 : static_cast<int32_t>(met.approach & 0xffffffffu);
  out[kOffCentreRun] = run;
  out[kComfortBits] = static_cast<int32_t>(comfort);
}

IRLVLA_HD void write_masks(const Areas& areas, uint64_t red, int64_t* out) {
  out[kMultipleLanesMask] = static_cast<int64_t>(areas.multiple_lanes), out[kOffRoadMask] = static_cast<int64_t>(areas.off_road);
  out[kOffRouteMask] = static_cast<int64_t>(areas.off_route), out[kIntersectionMask] = static_cast<int64_t>(areas.in_intersection);
  out[kRedLightMask] = red == kNever ? 0 : static_cast<int64_t>(uint64_t{1} << red);
}

/// The track of the reference plan.
template <class Group> IRLVLA_HD void place_reference(const ScoreTask& task, const PackedScene& scene, int64_t index, Track& track, const Group& group) {
  for (int t = group.rank(); t < kSteps; t += Group::size) {
    const State<double> s = load_state(task.reference + (index * kSteps + t) * kStateSize);
    double ls, lc;
    track.x[t] = s.x, track.y[t] = s.y, track.speed[t] = magnitude(s.vx, s.vy);
    sine_cosine(s.heading, track.sine[t], track.cosine[t]);
    sine_cosine(s.heading + kHalfPi, ls, lc);
    place(scene, track, t, ls, lc);
  }
  group.wait();
  enclose(track, group);
  group.wait();
}

/// What the reference plan collides with in an agent: 1 an object, 2 a road user.
IRLVLA_HD uint8_t reference_hit(const Track& track, const Areas& areas, const Agent& agent) {
  if (agent.x1 < track.x0 || track.x1 < agent.x0 || agent.y1 < track.y0 || track.y1 < agent.y0) return 0;
  return first_collision(track, areas, agent).counts ? agent.fixed ? 1 : 2 : 0;
}

IRLVLA_HD Areas reference_areas(const int64_t* masks) {
  return {static_cast<uint64_t>(masks[kMultipleLanesMask]), static_cast<uint64_t>(masks[kOffRoadMask]), 0, 0, 0};
}

/// NC of the reference plan in the traffic of a candidate. `known`: its hits of the scene's own agents, or null.
template <class Group>
IRLVLA_HD double reference_collisions(const PackedScene& scene, const World& world, const Track& track, const int64_t* masks, const uint8_t* known,
                                      const Group& group) {
  const Areas areas = reference_areas(masks);
  uint64_t hit = 0;
  for (int a = group.rank(); a < scene.agents; a += Group::size) {
    const Agent& agent = agent_in(scene, &world, a);
    hit |= known && &agent == scene.at(scene.agent) + a ? known[a] : reference_hit(track, areas, agent);
  }
  hit = group.either(hit);
  return collision_score(hit & 2, hit & 1);
}

/// Everything about candidate i, whose track is known. `comfort` and `plain` hold the six bits of history comfort and v1;
/// the columns of v1 are NaN where it was not asked for.
template <class Group>
IRLVLA_HD void evaluate(const ScoreTask& task, const PackedScene& scene, const World* world, const Track& track, uint32_t comfort, uint32_t plain,
                        int64_t i, const Group& group) {
  const Areas areas = all_areas(scene, track, group);
  const Encounters met = all_encounters(scene, world, track, areas, task.remove_touching, task.pdms, group);
  uint64_t red = kNever;
  for (int l = group.rank(); l < scene.lights; l += Group::size) {
    const int step = first_red_light(scene, track, scene.at(scene.light)[l]);
    if (step >= 0 && static_cast<uint64_t>(step) < red) red = step;
  }
  red = group.least(red);
  if (group.rank() != 0) return;

  const double oncoming = oncoming_distance(track, areas.off_route, areas.in_intersection);
  const int run = off_centre_run(areas.off_centre, areas.in_intersection);
  double* m = task.metrics + i * kMetrics;
  m[kNc] = collision_score(met.with_user, met.with_object);
  m[kDac] = areas.off_road ? 0.0 : 1.0;
  m[kDdc] = direction_compliance(oncoming);
  m[kTlc] = red == kNever ? 1.0 : 0.0;
  m[kProgress] = progress_of(task, scene, track);
  m[kTtc] = met.approach == kNever ? 1.0 : 0.0;
  m[kLk] = run >= 20 ? 0.0 : 1.0;  // ceil(2.0 / 0.1) samples, which span 1.9 s
  m[kHc] = comfort == 63 ? 1.0 : 0.0;
  m[kOncoming] = oncoming;
  m[kNcV1] = m[kTtcV1] = m[kComfortV1] = m[kDdcV1] = m[kReferenceNc] = not_a_number();
  if (task.pdms) {
    m[kNcV1] = collision_score(met.v1_user, met.v1_object);
    m[kTtcV1] = met.v1_approach ? 0.0 : 1.0;
    m[kComfortV1] = plain == 63 ? 1.0 : 0.0;
    m[kDdcV1] = direction_compliance(oncoming_distance(track, areas.off_route, 0));
  }
  write_events(met, run, comfort, task.events + i * kEvents);
  write_masks(areas, red, task.masks + i * kMasks);
}

}  // namespace IRLVLA_ISA
}  // namespace irlvla
