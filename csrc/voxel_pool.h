// BEV voxel pooling: features and depth weights of camera pixels, summed into the cells of a bird's-eye-view grid.
//
//   bev[cell] = sum of weight(camera, bin, row, column) * feature(camera, row, column) over the points that lie in the cell
//
// Consecutive image rows of one pixel column at one depth bin usually fall in the same cell. A plan therefore holds runs of
// points instead of points; this is exact for any rig, and tilted cameras merely have shorter runs.
// Sums are float32, in the order of the plan, whatever the number of threads.
#pragma once

#include <cstdint>

namespace irlvla {

/// The type of the numbers of a tensor.
enum class Number : int { float32 = 0, float16 = 1, bfloat16 = 2 };

/// A run as the forward pass reads it, by the cell that owns it. Offsets count within a sample.
struct CellRun {
  int32_t weight;    // of its first weight in `weights`: (pixel column * bins + bin) * height + first row
  uint32_t feature;  // of its first feature row << 8 | how many rows it has; the next feature is `width` rows on
};

/// The same run as the backward pass reads it, by the pixel column that owns it.
struct ColumnRun {
  int32_t cell;
  uint16_t bin;
  uint8_t first, length;  // image rows first ... first + length - 1
};

/// Which points lie in which cell. A pixel column is (camera, u): camera * width + u.
/// Cells are visited by the column, then the bin, of their first run (`weight` of it, rising); empty cells last. Cells along a
/// ray then follow each other and read the same features, which stay in the nearest cache. Results do not depend on the order.
struct PoolPlan {
  int64_t samples;  // 1: all samples of a batch share it
  int64_t cameras, bins, height, width, cells;
  const int32_t* cell_start;     // samples * cells + 1: rows of cell_runs
  const int32_t* cell_order;     // samples * cells: a sample's cells (0 ... cells - 1) as they are best visited, see below
  const CellRun* cell_runs;      // in a cell by camera, column, bin, row
  const int32_t* column_start;   // samples * cameras * width + 1: rows of column_runs
  const ColumnRun* column_runs;  // in a column by bin, row
};

/// Strides of depth, in elements; that of a sample is cameras * camera.
struct DepthStrides {
  int64_t camera, bin, row, column;
};

struct VoxelPoolTask {
  PoolPlan plan;
  int64_t batch, channels;
  Number feature_number, depth_number, weight_number, bev_number;
  const void* features;  // batch, camera, row, column, channel
  const void* depth;     // batch, camera, bin, row, column, as `depth_strides` says: weights, or with `softmax` their logits over bins
  DepthStrides depth_strides;
  bool softmax;
  void* weights;  // out: batch, camera, column, bin, row; float32 with `softmax` and on the CPU, else as depth. The address of
                  // `depth`: that is so already, and there is nothing to prepare
  void* bev;      // out: batch, cell, channel; every cell is written
};

struct VoxelPoolBackwardTask {
  PoolPlan plan;
  int64_t batch, channels;
  Number feature_number, depth_number, weight_number, bev_number;
  const void* features;
  const void* weights;       // as the forward pass left them
  const void* bev_grad;      // batch, cell, channel
  const void* weights_grad;  // as weights, and of their type; or nullptr: weights were used by nobody else
  DepthStrides depth_strides;  // of depth_grad
  bool softmax;
  void* features_grad;  // out: as features, every element is written; nullptr: not wanted
  void* depth_grad;     // out: batch, camera, bin, row, column as `depth_strides` says, every element is written; nullptr: not wanted
};

/// The kernels of one instruction set.
struct PoolKernels {
  void (*forward)(const VoxelPoolTask& task, int threads);
  void (*backward)(const VoxelPoolBackwardTask& task, int threads);
};

/// Those of the instruction set that `kernels()` chose.
const PoolKernels& pool_kernels();

#ifdef IRLVLA_CUDA
/// The same on a GPU, on `stream` (a cudaStream_t). Returns nullptr, or what went wrong.
namespace cuda {
const char* voxel_pool(const VoxelPoolTask& task, void* stream);
const char* voxel_pool_backward(const VoxelPoolBackwardTask& task, void* stream);
}  // namespace cuda
#endif

}  // namespace irlvla
