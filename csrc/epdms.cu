// The CUDA driver around the same inline code as the CPU's. A thread simulates a candidate and judges its comfort; then
// a warp places it on the map, its lanes taking time steps, agents and lights in turn. Compiled without contraction,
// every result equals the CPU's bit for bit.
#define IRLVLA_ISA device
#include "epdms.h"

namespace irlvla {
namespace device {
namespace {

struct Warp {
  static constexpr int size = 32;
  __device__ int rank() const { return threadIdx.x & 31; }
  __device__ void wait() const { __syncwarp(); }
  __device__ uint64_t either(uint64_t bits) const {
    for (int step = 16; step; step >>= 1) bits |= __shfl_xor_sync(~0u, bits, step);
    return bits;
  }
  __device__ uint64_t least(uint64_t value) const {
    for (int step = 16; step; step >>= 1) {
      const uint64_t other = __shfl_xor_sync(~0u, value, step);
      value = other < value ? other : value;
    }
    return value;
  }
  __device__ float least(float value) const {
    for (int step = 16; step; step >>= 1) value = fminf(value, __shfl_xor_sync(~0u, value, step));
    return value;
  }
};

/// What the second kernel needs of the first, per candidate.
struct Motion {
  double x[kSteps], y[kSteps], heading[kSteps], cosine[kSteps], sine[kSteps], lateral_cosine[kSteps], lateral_sine[kSteps], speed[kSteps];
  uint32_t comfort, plain;
};

static_assert(sizeof(Motion) == kMotionBytes, "callers allocate this much");
constexpr int kThreads = 128;

__device__ uint32_t bits_of(const Comfort<double>& comfort) {
  uint32_t bits = 0;
  for (int k = 0; k < 6; ++k) bits |= static_cast<uint32_t>(comfort.within[k]) << k;
  return bits;
}

__device__ const PackedScene& scene_of(const ScoreTask& task, int64_t i) {
  return *reinterpret_cast<const PackedScene*>(task.scenes + task.scene_offsets[task.scene_index[i]]);
}

__global__ void __launch_bounds__(kThreads) move(ScoreTask task, int64_t first, int64_t count, Motion* motions) {
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (local >= count) return;
  const int64_t i = first + local;
  const PackedScene& scene = scene_of(task, i);
  State<double> states[kSteps];
  double sine[kSteps], cosine[kSteps];
  if (task.input == kStates) {
    for (int t = 0; t < kSteps; ++t) {
      states[t] = load_state(task.plans + (i * kSteps + t) * kStateSize);
      sine_cosine(states[t].heading, sine[t], cosine[t]);
    }
  } else {
    Pose<double> ref[kSteps];
    reference_poses(task.plans + i * task.poses * 3, task.input == kPoses, task.poses, task.step, scene.ego, scene.time_us,
                    [&](int k, const Pose<double>& pose) { ref[k] = pose; });
    states[0] = scene.ego;
    track(ref, states, sine, cosine);
  }
  Motion& out = motions[local];
  for (int t = 0; t < kSteps; ++t) {
    out.x[t] = states[t].x, out.y[t] = states[t].y, out.heading[t] = states[t].heading, out.cosine[t] = cosine[t], out.sine[t] = sine[t];
    out.speed[t] = magnitude(states[t].vx, states[t].vy);
    sine_cosine(states[t].heading + kHalfPi, out.lateral_sine[t], out.lateral_cosine[t]);
    if (task.states) store_state(states[t], task.states + (i * kSteps + t) * kStateSize);
  }
  out.comfort = bits_of(history_comfort(states, scene.history, scene.history_ax, scene.history_ay, scene.history_heading));
  out.plain = task.pdms ? bits_of(plain_comfort(states)) : 0;
}

__device__ char* worlds_of(const ScoreTask& task) { return static_cast<char*>(task.scratch) + task.held * kMotionBytes; }

/// A thread drives the traffic around one candidate.
__global__ void __launch_bounds__(kThreads) surround(ScoreTask task, int64_t first, int64_t count, const Motion* motions) {
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (local >= count) return;
  const PackedScene& scene = scene_of(task, first + local);
  const Motion& motion = motions[local];
  World world = world_in(scene, worlds_of(task) + local * task.world_bytes);
  rollout(scene, world, [&](int t) {
    Sight ego;
    ego.x = motion.x[t], ego.y = motion.y[t], ego.heading = motion.heading[t], ego.speed = motion.speed[t];
    ego.box = box_corners(ego.x, ego.y, motion.cosine[t], motion.sine[t], motion.lateral_cosine[t], motion.lateral_sine[t], kHalfLength, kHalfWidth);
    return ego;
  });
  dress_changed(scene, world, everywhere(), everywhere());
}

__global__ void __launch_bounds__(kThreads) judge(ScoreTask task, int64_t first, int64_t count, const Motion* motions) {
  __shared__ Track tracks[kThreads / 32];
  const Warp warp;
  const int64_t local = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (local >= count) return;
  const Motion& motion = motions[local];
  const PackedScene& scene = scene_of(task, first + local);
  Track& track = tracks[threadIdx.x / 32];
  for (int t = warp.rank(); t < kSteps; t += Warp::size) {
    track.x[t] = motion.x[t], track.y[t] = motion.y[t], track.cosine[t] = motion.cosine[t], track.sine[t] = motion.sine[t];
    track.speed[t] = motion.speed[t];
    place(scene, track, t, motion.lateral_sine[t], motion.lateral_cosine[t]);
  }
  __syncwarp();
  enclose(track, warp);
  __syncwarp();
  World world{};
  if (task.reference) world = world_in(scene, worlds_of(task) + local * task.world_bytes);
  evaluate(task, scene, task.reference ? &world : nullptr, track, motion.comfort, motion.plain, first + local, warp);
  if (!task.reference) return;
  const int64_t index = task.scene_index[first + local];
  __syncwarp();
  place_reference(task, scene, index, track, warp);
  const double nc = reference_collisions(scene, world, track, task.reference_masks + index * kMasks, nullptr, warp);
  if (warp.rank() == 0) task.metrics[(first + local) * kMetrics + kReferenceNc] = nc;
}

__global__ void __launch_bounds__(kThreads) follow(TrafficTask task, int64_t first, int64_t count) {
  const int64_t local = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (local < count) traffic_row(task, first + local, static_cast<char*>(task.scratch) + local * task.world_bytes);
}

template <class Task, void (*row)(const Task&, int64_t)> __global__ void __launch_bounds__(kThreads) each_row(Task task) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < task.rows; i += stride) row(task, i);
}

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

const char* explain(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

template <class Task, void (*row)(const Task&, int64_t)> const char* launch_rows(const Task& task, void* stream) {
  constexpr int64_t kMost = 1 << 20;
  if (task.rows == 0) return nullptr;
  const unsigned blocks = blocks_for(task.rows) < kMost ? blocks_for(task.rows) : static_cast<unsigned>(kMost);
  each_row<Task, row><<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(task);
  return explain(cudaGetLastError());
}

const char* launch_score(const ScoreTask& task, cudaStream_t stream) {
  Motion* motions = static_cast<Motion*>(task.scratch);
  for (int64_t first = 0; first < task.candidates; first += task.held) {
    const int64_t count = task.candidates - first < task.held ? task.candidates - first : task.held;
    move<<<blocks_for(count), kThreads, 0, stream>>>(task, first, count, motions);
    if (task.reference) surround<<<blocks_for(count), kThreads, 0, stream>>>(task, first, count, motions);
    judge<<<blocks_for(count * 32), kThreads, 0, stream>>>(task, first, count, motions);
  }
  return explain(cudaGetLastError());
}

const char* launch_traffic(const TrafficTask& task, cudaStream_t stream) {
  for (int64_t first = 0; first < task.rows; first += task.held) {
    const int64_t count = task.rows - first < task.held ? task.rows - first : task.held;
    follow<<<blocks_for(count), kThreads, 0, stream>>>(task, first, count);
  }
  return explain(cudaGetLastError());
}

}  // namespace
}  // namespace device

namespace cuda {

const char* simulate(const SimulateTask& task, void* stream) { return device::launch_rows<SimulateTask, device::simulate_row>(task, stream); }
const char* score(const ScoreTask& task, void* stream) { return device::launch_score(task, static_cast<cudaStream_t>(stream)); }
const char* extended_comfort(const ExtendedComfortTask& task, void* stream) {
  return device::launch_rows<ExtendedComfortTask, device::extended_comfort_row>(task, stream);
}
const char* comfort(const ComfortTask& task, void* stream) { return device::launch_rows<ComfortTask, device::comfort_row>(task, stream); }
const char* boxes_overlap(const BoxesOverlapTask& task, void* stream) {
  return device::launch_rows<BoxesOverlapTask, device::boxes_overlap_row>(task, stream);
}
const char* points_in_polygons(const PointsInPolygonsTask& task, void* stream) {
  return device::launch_rows<PointsInPolygonsTask, device::points_in_polygons_row>(task, stream);
}
const char* project(const ProjectTask& task, void* stream) { return device::launch_rows<ProjectTask, device::project_row>(task, stream); }
const char* time_to_collision(const TimeToCollisionTask& task, void* stream) {
  return device::launch_rows<TimeToCollisionTask, device::time_to_collision_row>(task, stream);
}
const char* traffic(const TrafficTask& task, void* stream) { return device::launch_traffic(task, static_cast<cudaStream_t>(stream)); }

}  // namespace cuda
}  // namespace irlvla
