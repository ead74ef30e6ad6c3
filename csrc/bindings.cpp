// The only file that knows Python: addresses and sizes in, a status out. The caller has checked shapes and types.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "epdms.h"
#include "painting.h"
#include "parallel.h"
#include "voxel_pool.h"

namespace py = pybind11;
using namespace irlvla;

namespace {

using Address = uintptr_t;
template <class T> T* at(Address address) { return reinterpret_cast<T*>(address); }

/// Runs `work` without the interpreter lock. Not py::gil_scoped_release: when the interpreter has ended meanwhile, taking
/// the lock again unwinds this thread, and that must not start inside a destructor.
template <class Work> void without_gil(Work&& work) {
  PyThreadState* state = PyEval_SaveThread();
  std::exception_ptr error;
  try {
    work();
  } catch (...) {
    error = std::current_exception();
  }
  PyEval_RestoreThread(state);
  if (error) std::rethrow_exception(error);
}

/// Where a task runs: on `threads` CPU threads, or (threads < 0) on the current CUDA device and `stream`.
struct Where {
  int threads;
  Address stream;
};

template <class Task> using OnGpu = const char* (*)(const Task&, void*);  // common_type_t below: not deduced, so nullptr fits

template <class Task> void run(const Task& task, Where where, void (*cpu)(const Task&, int), std::common_type_t<OnGpu<Task>> gpu) {
  without_gil([&] {
    if (where.threads >= 0) return cpu(task, where.threads);
    if (!gpu) throw std::runtime_error("this build of irlvla has no CUDA; build it with IRLVLA_CUDA=ON");
    if (const char* error = gpu(task, at<void>(where.stream))) throw std::runtime_error(std::string("CUDA: ") + error);
  });
}

#ifdef IRLVLA_CUDA
#define IRLVLA_GPU(op) cuda::op
#else
#define IRLVLA_GPU(op) nullptr
#endif

/// B prepared scenes, one after the other, the byte offset of each, and the working memory a candidate needs for traffic. Takes the addresses of SceneArrays in order.
py::tuple prepare(int64_t scenes, int64_t history, int64_t agent_steps, const std::vector<Address>& a, bool reactive, int threads) {
  if (a.size() != 23) throw std::invalid_argument("prepare needs the 23 arrays of SceneArrays");
  const SceneArrays arrays{scenes,
                           history,
                           agent_steps,
                           at<const int64_t>(a[0]),
                           at<const double>(a[1]),
                           at<const int64_t>(a[2]),
                           at<const double>(a[3]),
                           at<const int64_t>(a[4]),
                           at<const int64_t>(a[5]),
                           at<const double>(a[6]),
                           at<const uint8_t>(a[7]),
                           at<const double>(a[8]),
                           at<const int64_t>(a[9]),
                           at<const int64_t>(a[10]),
                           at<const uint8_t>(a[11]),
                           at<const int64_t>(a[12]),
                           at<const int64_t>(a[13]),
                           at<const double>(a[14]),
                           at<const int64_t>(a[15]),
                           at<const int64_t>(a[16]),
                           at<const uint8_t>(a[17]),
                           at<const int64_t>(a[18]),
                           at<const double>(a[19]),
                           at<const double>(a[20]),
                           at<const int64_t>(a[21]),
                           at<const double>(a[22]),
                           reactive};
  py::array_t<int64_t> offsets(scenes + 1);
  py::array_t<int64_t> world_bytes(scenes);
  int64_t *bounds = offsets.mutable_data(), *bytes_needed = world_bytes.mutable_data();
  auto block = std::make_unique<std::vector<char>>();
  without_gil([&] {
    std::vector<std::vector<char>> prepared(scenes);
    parallel_for(scenes, threads, [&](int64_t i) {
      try {
        prepared[i] = prepare_scene(arrays, i);
      } catch (const std::invalid_argument& error) {
        throw std::invalid_argument(std::to_string(i) + ":" + error.what());
      }
    });
    bounds[0] = 0;
    for (int64_t i = 0; i < scenes; ++i) {
      bounds[i + 1] = bounds[i] + static_cast<int64_t>(prepared[i].size());
      bytes_needed[i] = reinterpret_cast<const baseline::PackedScene*>(prepared[i].data())->world_bytes;
    }
    if (scenes == 1) return block->swap(prepared[0]);
    block->resize(bounds[scenes]);
    parallel_for(scenes, threads, [&](int64_t i) {
      if (!prepared[i].empty()) std::memcpy(block->data() + bounds[i], prepared[i].data(), prepared[i].size());
    });
  });
  auto* bytes = reinterpret_cast<uint8_t*>(block->data());
  py::capsule owner(block.release(), [](void* memory) { delete static_cast<std::vector<char>*>(memory); });
  return py::make_tuple(py::array_t<uint8_t>({bounds[scenes]}, {1}, bytes, owner), offsets, world_bytes);
}

/// First of `rows` rows with a value that is not finite or beyond the limit; -1: none.
int64_t first_bad_row(Address values, int64_t rows, int64_t columns) {
  const double* v = at<const double>(values);
  int64_t bad = -1;
  without_gil([&] {
    for (int64_t i = 0; i < rows && bad < 0; ++i) {
      bool good = true;
      for (int64_t k = 0; k < columns; ++k) good = good & (__builtin_fabs(v[i * columns + k]) < baseline::kLimit);
      if (!good) bad = i;
    }
  });
  return bad;
}

using PoolSizes = std::array<int64_t, 8>;   // batch, channels, samples, cameras, bins, height, width, cells
using PoolTables = std::array<Address, 5>;  // of PoolPlan, in order

struct Pooled {
  int64_t batch, channels;
  PoolPlan plan;
};

Pooled pool_plan(const PoolSizes& n, const PoolTables& a) {
  return {n[0],
          n[1],
          {n[2], n[3], n[4], n[5], n[6], n[7], at<const int32_t>(a[0]), at<const int32_t>(a[1]), at<const CellRun>(a[2]),
           at<const int32_t>(a[3]), at<const ColumnRun>(a[4])}};
}

Number number(int value) { return static_cast<Number>(value); }

py::dict build_info() {
  py::dict info;
  py::list isas;
  isas.append("baseline");
#ifdef __x86_64__
  isas.append("avx2");
  isas.append("avx512");
#endif
  info["isas"] = isas;
#ifdef IRLVLA_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = IRLVLA_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled core of irlvla. Call it through irlvla.ops, which checks what it is given.";

  m.def("prepare", prepare);
  m.def("simulate", [](int64_t rows, Address plans, int poses, double step, bool map_frame, Address ego, Address time_us, Address states, int threads,
                       Address stream) {
    const SimulateTask task{rows, at<const double>(plans), poses, step, map_frame, at<const double>(ego), at<const int64_t>(time_us), at<double>(states)};
    run(task, {threads, stream}, kernels().simulate, IRLVLA_GPU(simulate));
  });
  m.def("score", [](int64_t candidates, Address scenes, Address scene_offsets, Address scene_index, int input, Address plans, int poses, double step,
                    bool remove_touching, bool pdms, Address metrics, Address events, Address masks, Address states, Address scratch, int64_t held, Address reference,
                    Address reference_masks, int64_t world_bytes, int threads, Address stream) {
    const ScoreTask task{candidates, at<const char>(scenes), at<const int64_t>(scene_offsets), at<const int64_t>(scene_index), static_cast<Input>(input),
                         at<const double>(plans), poses, step, remove_touching, pdms, at<double>(metrics), at<int32_t>(events), at<int64_t>(masks),
                         at<double>(states), at<void>(scratch), held, at<const double>(reference), at<const int64_t>(reference_masks), world_bytes};
    run(task, {threads, stream}, kernels().score, IRLVLA_GPU(score));
  });
  m.def("extended_comfort", [](int64_t rows, Address states, Address previous, Address shift, Address rms, Address comfortable, int threads, Address stream) {
    const ExtendedComfortTask task{rows,           at<const double>(states), at<const double>(previous), at<const int64_t>(shift),
                                   at<double>(rms), at<uint8_t>(comfortable)};
    run(task, {threads, stream}, kernels().extended_comfort, IRLVLA_GPU(extended_comfort));
  });
  m.def("comfort", [](int64_t rows, Address states, int steps, bool plain, Address within, int threads, Address stream) {
    const ComfortTask task{rows, at<const double>(states), steps, plain, at<uint8_t>(within)};
    run(task, {threads, stream}, kernels().comfort, IRLVLA_GPU(comfort));
  });
  m.def("boxes_overlap", [](int64_t rows, Address a, Address b, Address overlaps, int threads, Address stream) {
    const BoxesOverlapTask task{rows, at<const double>(a), at<const double>(b), at<uint8_t>(overlaps)};
    run(task, {threads, stream}, kernels().boxes_overlap, IRLVLA_GPU(boxes_overlap));
  });
  m.def("points_in_polygons", [](int64_t rows, int64_t polygons, Address points, Address edges, Address edge_offsets, Address inside, int threads,
                                 Address stream) {
    const PointsInPolygonsTask task{rows, polygons, at<const double>(points), at<const double>(edges), at<const int64_t>(edge_offsets), at<uint8_t>(inside)};
    run(task, {threads, stream}, kernels().points_in_polygons, IRLVLA_GPU(points_in_polygons));
  });
  m.def("project", [](int64_t rows, Address points, int64_t segments, Address edges, Address along, Address distance, int threads, Address stream) {
    const ProjectTask task{rows, at<const double>(points), segments, at<const double>(edges), at<double>(along), at<double>(distance)};
    run(task, {threads, stream}, kernels().project, IRLVLA_GPU(project));
  });
  m.def("time_to_collision", [](int64_t rows, Address states, int64_t agents, int64_t agent_steps, Address boxes, Address valid, Address seconds, int threads,
                                Address stream) {
    const TimeToCollisionTask task{rows, at<const double>(states), agents, agent_steps, at<const double>(boxes), at<const uint8_t>(valid),
                                   at<double>(seconds)};
    run(task, {threads, stream}, kernels().time_to_collision, IRLVLA_GPU(time_to_collision));
  });

  m.def("traffic", [](int64_t rows, Address scenes, Address scene_offsets, Address scene_index, Address states, Address track_offsets, Address tracks,
                      Address present, Address scratch, int64_t held, int64_t world_bytes, int threads, Address stream) {
    const TrafficTask task{rows, at<const char>(scenes), at<const int64_t>(scene_offsets), at<const int64_t>(scene_index), at<const double>(states),
                           at<const int64_t>(track_offsets), at<double>(tracks), at<uint8_t>(present), at<void>(scratch), held, world_bytes};
    run(task, {threads, stream}, kernels().traffic, IRLVLA_GPU(traffic));
  });

  m.def("voxel_pool", [](const PoolSizes& sizes, const PoolTables& tables, const std::array<int, 4>& numbers, const std::array<int64_t, 4>& strides,
                         bool softmax, Address features, Address depth, Address weights, Address bev, int threads, Address stream) {
    const auto [batch, channels, plan] = pool_plan(sizes, tables);
    const VoxelPoolTask task{plan, batch, channels, number(numbers[0]), number(numbers[1]), number(numbers[2]), number(numbers[3]),
                             at<const void>(features), at<const void>(depth), {strides[0], strides[1], strides[2], strides[3]}, softmax,
                             at<void>(weights), at<void>(bev)};
    run(task, {threads, stream}, pool_kernels().forward, IRLVLA_GPU(voxel_pool));
  });
  m.def("voxel_pool_backward", [](const PoolSizes& sizes, const PoolTables& tables, const std::array<int, 4>& numbers,
                                  const std::array<int64_t, 4>& strides, bool softmax, Address features, Address weights, Address bev_grad,
                                  Address weights_grad, Address features_grad, Address depth_grad, int threads, Address stream) {
    const auto [batch, channels, plan] = pool_plan(sizes, tables);
    const VoxelPoolBackwardTask task{plan, batch, channels, number(numbers[0]), number(numbers[1]), number(numbers[2]), number(numbers[3]),
                                     at<const void>(features), at<const void>(weights), at<const void>(bev_grad), at<const void>(weights_grad),
                                     {strides[0], strides[1], strides[2], strides[3]}, softmax, at<void>(features_grad), at<void>(depth_grad)};
    run(task, {threads, stream}, pool_kernels().backward, IRLVLA_GPU(voxel_pool_backward));
  });

  m.def("paint", [](int64_t images, int height, int width, Address pixels, Address image_offsets, Address colours, Address shape_offsets,
                    Address ring_offsets, Address points, int threads) {
    const PaintTask task{images, height, width, at<uint8_t>(pixels), at<const int64_t>(image_offsets), at<const float>(colours),
                         at<const int64_t>(shape_offsets), at<const int64_t>(ring_offsets), at<const double>(points)};
    without_gil([&] { paint(task, threads); });
  });
  m.def("first_bad_row", first_bad_row);
  m.def("available_threads", available_threads);
  m.def("isa", [] { return kernels().name; });
  m.def("build_info", build_info);
  m.def("parallel_selftest", [](int64_t tasks, int threads) {
    std::vector<int64_t> done(tasks, 0);
    without_gil([&] { parallel_for(tasks, threads, [&](int64_t i) { done[i] += i; }); });
    int64_t sum = 0;
    for (const int64_t value : done) sum += value;
    return sum;
  });
  m.attr("METRICS") = static_cast<int>(kMetrics);
  m.attr("EVENTS") = static_cast<int>(kEvents);
  m.attr("MASKS") = static_cast<int>(kMasks);
  m.attr("MOTION_BYTES") = kMotionBytes;
  m.attr("MOTIONS_HELD") = kMotionsHeld;
}
