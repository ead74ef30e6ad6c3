// Packed scenes and candidates in, sub-metrics out. Raw pointers only: no Python, no torch.
#pragma once
#include <vector>

#include "metrics.h"
#include "rows.h"

namespace irlvla {

/// Prepare one scene on the CPU; the result is a PackedScene followed by its arrays.
std::vector<char> prepare_scene(const SceneArrays& arrays, int64_t scene);

/// The kernels of one instruction set.
struct Kernels {
  const char* name;
  void (*simulate)(const SimulateTask& task, int threads);
  void (*score)(const ScoreTask& task, int threads);
  void (*extended_comfort)(const ExtendedComfortTask& task, int threads);
  void (*comfort)(const ComfortTask& task, int threads);
  void (*boxes_overlap)(const BoxesOverlapTask& task, int threads);
  void (*points_in_polygons)(const PointsInPolygonsTask& task, int threads);
  void (*project)(const ProjectTask& task, int threads);
  void (*time_to_collision)(const TimeToCollisionTask& task, int threads);
  void (*traffic)(const TrafficTask& task, int threads);
};

/// The best kernels this machine runs, or those that IRLVLA_ISA names. Chosen once.
const Kernels& kernels();

#ifdef IRLVLA_CUDA
/// The same on a GPU, on `stream` (a cudaStream_t). Returns nullptr, or what went wrong.
namespace cuda {
const char* simulate(const SimulateTask& task, void* stream);
const char* score(const ScoreTask& task, void* stream);
const char* extended_comfort(const ExtendedComfortTask& task, void* stream);
const char* comfort(const ComfortTask& task, void* stream);
const char* boxes_overlap(const BoxesOverlapTask& task, void* stream);
const char* points_in_polygons(const PointsInPolygonsTask& task, void* stream);
const char* project(const ProjectTask& task, void* stream);
const char* time_to_collision(const TimeToCollisionTask& task, void* stream);
const char* traffic(const TrafficTask& task, void* stream);
}  // namespace cuda
#endif

}  // namespace irlvla
