// The CPU driver, compiled once per instruction set. Eight candidates of a scene share the vector lanes while their
// motion is simulated and their comfort judged; then each is placed on the map on its own.
#include "epdms.h"
#include "parallel.h"

namespace irlvla {
namespace IRLVLA_ISA {
namespace {

double& lane(Pack& pack, int i) { return reinterpret_cast<double*>(&pack)[i]; }

uint32_t lane_bits(const Comfort<Pack>& comfort, int i) {
  uint32_t bits = 0;
  for (int k = 0; k < 6; ++k) bits |= static_cast<uint32_t>(comfort.within[k][i] != 0) << k;
  return bits;
}

State<Pack> broadcast(const State<double>& s) {
  return {splat<Pack>(s.x),  splat<Pack>(s.y),        splat<Pack>(s.heading),       splat<Pack>(s.vx),
          splat<Pack>(s.vy), splat<Pack>(s.ax),       splat<Pack>(s.ay),            splat<Pack>(s.steering),
          splat<Pack>(s.steering_rate), splat<Pack>(s.angular_velocity), splat<Pack>(s.angular_acceleration)};
}

void set_lane(State<Pack>& states, int i, const State<double>& s) {
  lane(states.x, i) = s.x, lane(states.y, i) = s.y, lane(states.heading, i) = s.heading;
  lane(states.vx, i) = s.vx, lane(states.vy, i) = s.vy, lane(states.ax, i) = s.ax, lane(states.ay, i) = s.ay;
  lane(states.steering, i) = s.steering, lane(states.steering_rate, i) = s.steering_rate;
  lane(states.angular_velocity, i) = s.angular_velocity, lane(states.angular_acceleration, i) = s.angular_acceleration;
}

State<double> get_lane(const State<Pack>& s, int i) {
  return {s.x[i], s.y[i], s.heading[i], s.vx[i], s.vy[i], s.ax[i], s.ay[i], s.steering[i], s.steering_rate[i], s.angular_velocity[i],
          s.angular_acceleration[i]};
}

void load_pack(const double* states, int64_t first, int count, State<Pack>* out) {
  for (int i = 0; i < kLanes; ++i) {
    const double* row = states + (first + (i < count ? i : 0)) * kSteps * kStateSize;
    for (int t = 0; t < kSteps; ++t) set_lane(out[t], i, load_state(row + t * kStateSize));
  }
}

void store_pack(const State<Pack>* states, int64_t first, int count, double* out) {
  for (int i = 0; i < count; ++i)
    for (int t = 0; t < kSteps; ++t) store_state(get_lane(states[t], i), out + ((first + i) * kSteps + t) * kStateSize);
}

void set_pose(Pose<Pack>& poses, int i, const Pose<double>& pose) {
  lane(poses.x, i) = pose.x, lane(poses.y, i) = pose.y, lane(poses.heading, i) = pose.heading;
}

// --- simulate -------------------------------------------------------------------------------------------------------

void simulate_pack(const SimulateTask& task, int64_t first, int count) {
  State<Pack> states[kSteps];
  Pose<Pack> ref[kSteps];
  Pack sine[kSteps], cosine[kSteps];
  for (int i = 0; i < kLanes; ++i) {
    const int64_t row = first + (i < count ? i : 0);
    State<double> ego = load_state(task.ego + row * kStateSize);
    round_trip(ego);
    set_lane(states[0], i, ego);
    reference_poses(task.plans + row * task.poses * 3, task.map_frame, task.poses, task.step, ego, task.time_us[row],
                    [&](int k, const Pose<double>& pose) { set_pose(ref[k], i, pose); });
  }
  track(ref, states, sine, cosine);
  store_pack(states, first, count, task.states);
}

/// Rows in packs of eight; how they are cut does not depend on the number of threads.
template <class Task, class Body> void in_packs(const Task& task, int threads, Body body) {
  parallel_for((task.rows + kLanes - 1) / kLanes, threads, [&](int64_t pack) {
    const int64_t first = pack * kLanes;
    body(first, static_cast<int>(task.rows - first < kLanes ? task.rows - first : kLanes));
  });
}

void simulate(const SimulateTask& task, int threads) {
  in_packs(task, threads, [&](int64_t first, int count) { simulate_pack(task, first, count); });
}

void extended_comfort_pack(const ExtendedComfortTask& task, int64_t first, int count) {
  State<Pack> now[kSteps], before[kSteps];
  load_pack(task.states, first, count, now);
  load_pack(task.previous, first, count, before);
  for (int i = 0; i < count; ++i) {  // lanes of one shift together; mostly they all are
    const int shift = static_cast<int>(task.shift[first + i]);
    bool done = false;
    for (int j = 0; j < i; ++j) done = done || task.shift[first + j] == shift;
    if (done) continue;
    Pack rms[4];
    comfort_differences(now, before, shift, rms);
    for (int j = i; j < count; ++j) {
      if (task.shift[first + j] != shift) continue;
      bool all = true;
      for (int k = 0; k < 4; ++k) task.rms[4 * (first + j) + k] = rms[k][j], all = all && rms[k][j] <= extended_limit(k);
      task.comfortable[first + j] = all;
    }
  }
}

void extended_comfort(const ExtendedComfortTask& task, int threads) {
  in_packs(task, threads, [&](int64_t first, int count) { extended_comfort_pack(task, first, count); });
}

// --- score ----------------------------------------------------------------------------------------------------------

void fill_track(const PackedScene& scene, const State<Pack>* states, const Pack* sine, const Pack* cosine, const Pack* lateral_sine,
                const Pack* lateral_cosine, int i, Track& track) {
  for (int t = 0; t < kSteps; ++t) {
    track.x[t] = states[t].x[i], track.y[t] = states[t].y[i];
    track.sine[t] = sine[t][i], track.cosine[t] = cosine[t][i];
    track.speed[t] = magnitude(states[t].vx[i], states[t].vy[i]);
    place(scene, track, t, lateral_sine[t][i], lateral_cosine[t][i]);
  }
  enclose(track, Alone{});
}

void score_pack(const ScoreTask& task, int64_t first, int count) {
  const PackedScene& scene = *reinterpret_cast<const PackedScene*>(task.scenes + task.scene_offsets[task.scene_index[first]]);
  State<Pack> states[kSteps];
  Pack sine[kSteps], cosine[kSteps], lateral_sine[kSteps], lateral_cosine[kSteps];
  if (task.input == kStates) {
    load_pack(task.plans, first, count, states);
    for (int t = 0; t < kSteps; ++t) sine_cosine(states[t].heading, sine[t], cosine[t]);
  } else {
    Pose<Pack> ref[kSteps];
    for (int i = 0; i < kLanes; ++i) {
      const double* plan = task.plans + (first + (i < count ? i : 0)) * task.poses * 3;
      reference_poses(plan, task.input == kPoses, task.poses, task.step, scene.ego, scene.time_us,
                      [&](int k, const Pose<double>& pose) { set_pose(ref[k], i, pose); });
    }
    states[0] = broadcast(scene.ego);
    track(ref, states, sine, cosine);
  }
  for (int t = 0; t < kSteps; ++t) sine_cosine(states[t].heading + kHalfPi, lateral_sine[t], lateral_cosine[t]);
  const Comfort<Pack> comfort = history_comfort(states, scene.history, scene.history_ax, scene.history_ay, scene.history_heading);
  const Comfort<Pack> plain = task.pdms ? plain_comfort(states) : comfort;
  if (task.states) store_pack(states, first, count, task.states);
  Track track, reference;
  const int64_t index = task.scene_index[first];
  char* const memory = thread_memory(task.world_bytes + scene.agents);
  uint8_t* const hits = reinterpret_cast<uint8_t*>(memory) + task.world_bytes;
  if (task.reference) {
    place_reference(task, scene, index, reference, Alone{});
    const Areas areas = reference_areas(task.reference_masks + index * kMasks);
    for (int a = 0; a < scene.agents; ++a) hits[a] = reference_hit(reference, areas, scene.at(scene.agent)[a]);
  }
  for (int i = 0; i < count; ++i) {
    fill_track(scene, states, sine, cosine, lateral_sine, lateral_cosine, i, track);
    if (!task.reference) {
      evaluate(task, scene, nullptr, track, lane_bits(comfort, i), lane_bits(plain, i), first + i, Alone{});
      continue;
    }
    World world = world_in(scene, memory);
    rollout(scene, world, [&](int t) {
      Sight ego;
      ego.x = track.x[t], ego.y = track.y[t], ego.heading = states[t].heading[i], ego.speed = track.speed[t];
      ego.box = box_corners(ego.x, ego.y, track.cosine[t], track.sine[t], lateral_cosine[t][i], lateral_sine[t][i], kHalfLength, kHalfWidth);
      return ego;
    });
    dress_changed(scene, world, around(scene, track), around(scene, reference));
    evaluate(task, scene, &world, track, lane_bits(comfort, i), lane_bits(plain, i), first + i, Alone{});
    task.metrics[(first + i) * kMetrics + kReferenceNc] =
        reference_collisions(scene, world, reference, task.reference_masks + index * kMasks, hits, Alone{});
  }
}

/// One task per block of candidates; a pack ends where the scene changes.
void score(const ScoreTask& task, int threads) {
  constexpr int64_t kChunk = 16;
  parallel_for((task.candidates + kChunk - 1) / kChunk, threads, [&](int64_t chunk) {
    const int64_t end = task.candidates < (chunk + 1) * kChunk ? task.candidates : (chunk + 1) * kChunk;
    for (int64_t first = chunk * kChunk; first < end;) {
      int count = 1;
      while (count < kLanes && first + count < end && task.scene_index[first + count] == task.scene_index[first]) ++count;
      score_pack(task, first, count);
      first += count;
    }
  });
}

// --- the pieces -----------------------------------------------------------------------------------------------------

template <class Task> void each_row(const Task& task, int threads, void (*row)(const Task&, int64_t), int64_t chunk) {
  parallel_for((task.rows + chunk - 1) / chunk, threads, [&](int64_t i) {
    const int64_t end = task.rows < (i + 1) * chunk ? task.rows : (i + 1) * chunk;
    for (int64_t r = i * chunk; r < end; ++r) row(task, r);
  });
}

void comfort_rows(const ComfortTask& task, int threads) { each_row(task, threads, comfort_row, 8); }
void boxes_overlap(const BoxesOverlapTask& task, int threads) { each_row(task, threads, boxes_overlap_row, 1024); }
void points_in_polygons(const PointsInPolygonsTask& task, int threads) { each_row(task, threads, points_in_polygons_row, 256); }
void project(const ProjectTask& task, int threads) { each_row(task, threads, project_row, 64); }
void time_to_collision(const TimeToCollisionTask& task, int threads) { each_row(task, threads, time_to_collision_row, 41); }

void traffic(const TrafficTask& task, int threads) {
  parallel_for(task.rows, threads, [&](int64_t row) { traffic_row(task, row, thread_memory(task.world_bytes)); });
}

#define IRLVLA_STRING(x) #x
#define IRLVLA_NAME(x) IRLVLA_STRING(x)

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels{IRLVLA_NAME(IRLVLA_ISA), simulate,           score,   extended_comfort,  comfort_rows, boxes_overlap,
                       points_in_polygons,      project,            time_to_collision, traffic};

}  // namespace IRLVLA_ISA
}  // namespace irlvla
