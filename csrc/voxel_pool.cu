// BEV voxel pooling on a GPU, forward. First weights are brought into the order of the plan, through the softmax if there is one;
// then every cell has one owner, which adds up its runs in a fixed order and writes it once: no atomics, and one bit pattern.
// Here a group of lanes owns a cell, for any numbers; with 16-bit features and many cells, voxel_pool_columns.h does it.
#include "voxel_pool_columns.h"

namespace irlvla {
namespace device {
namespace {

// --- weights --------------------------------------------------------------------------------------------------------

/// Softmax over the bins of a pixel column in shared memory. Lanes are image rows, twice: of even bins and of odd ones.
__device__ void softmax(float* depth, int bins) {
  const int lane = threadIdx.x % 32;
  float most = -INFINITY, total = 0;
  for (int i = lane; i < bins * kRows; i += 32) most = fmaxf(most, depth[i]);
  most = fmaxf(most, __shfl_xor_sync(kWarp, most, kRows));
#pragma unroll 4
  for (int i = lane; i < bins * kRows; i += 32) total += depth[i] = expf(depth[i] - most);
  total += __shfl_xor_sync(kWarp, total, kRows);
  const float scale = 1 / total;
  for (int i = lane; i < bins * kRows; i += 32) depth[i] *= scale;
}

__global__ void __launch_bounds__(32 * kMostColumns) prepare_weights(VoxelPoolTask task, int columns) {
  const ColumnBlock block(task.plan, columns);
  by_type(task.depth_number, [&](auto* type) {
    const auto* depth = static_cast<decltype(type)>(const_cast<void*>(task.depth));
    block.fill(task.depth_strides, [&](int64_t from) { return load_as(depth + from); });
  });
  __syncthreads();
  const int column = threadIdx.x / 32, row = threadIdx.x % kRows;
  if (block.first + column >= block.width) return;
  float* depth = block.depth(column);
  if (task.softmax) softmax(depth, block.bins);
  if (block.row + row >= block.height) return;
  by_type(task.weight_number, [&](auto* type) {
    auto* weights = static_cast<decltype(type)>(task.weights) + block.weight(column) + row;
#pragma unroll 4
    for (int d = threadIdx.x / kRows % 2; d < block.bins; d += 2) store_as(weights + d * block.height, depth[d * kRows + row]);
  });
}

const char* prepare(const VoxelPoolTask& task, void* stream) {
  const size_t bytes = ColumnBlock::pitch(task.plan.bins) * sizeof(float);
  const int columns = columns_per_block(task.plan, task.batch, bytes);
  if (columns == 0) return kTooDeep;
  return launch(prepare_weights, launch_of(task.plan, task.batch, columns, bytes, stream), task, columns);
}

// --- cell by cell ---------------------------------------------------------------------------------------------------

constexpr int kThreads = 256;
constexpr int kBusy = 8;                 // a cell of more runs is the work of a whole block, lest the others wait for it
constexpr int64_t kManyCells = 1 << 17;  // of a batch: enough to keep a GPU busy with fewer, larger shares

/// How pool_cells shares out work: the cells of a sample by their visiting order, V channels to a lane.
struct Shares {
  int batch, blocks, cells;  // samples, blocks per sample, cells per block
  int lanes, groups;         // lanes per cell, cells at a time
};

/// One lane's view of a sample: V channels of its features.
template <class F, class W, int V> struct Source {
  const CellRun* runs;
  const W* weights;
  const char* features;
  uint32_t pixel, row;  // bytes from one feature to the next, and from one image row to the next

  __device__ Source(const VoxelPoolTask& task, int64_t sample, int64_t channel) {
    const PoolPlan& plan = task.plan;
    const int64_t pixels = plan.cameras * plan.height * plan.width;
    runs = plan.cell_runs;
    weights = static_cast<const W*>(task.weights) + sample * pixels * plan.bins;
    features = reinterpret_cast<const char*>(static_cast<const F*>(task.features) + sample * pixels * task.channels + channel);
    pixel = static_cast<uint32_t>(task.channels * sizeof(F)), row = static_cast<uint32_t>(plan.width) * pixel;
  }

  /// sum += runs begin ... end - 1, point after point.
  __device__ void add(int begin, int end, float (&sum)[V]) const {
    constexpr int kAhead = 4;
    if (begin >= end) return;
    Packet<uint32_t, 2> next = run(begin);
    for (int i = begin; i < end; ++i) {
      const auto [first, rest] = next.words;
      if (i + 1 < end) next = run(i + 1);
      const W* weight = weights + first;
      const char* feature = features + uint64_t{rest >> 8} * pixel;
#pragma unroll 1
      for (int left = rest & 255; left > 0; left -= kAhead, weight += kAhead, feature += uint64_t{kAhead} * row) {
        Packet<F, V> values[kAhead];
        float factors[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const uint32_t k = min(j, left - 1);  // beyond the run its last point again, times 0: all loads go out together
          values[j] = Packet<F, V>::at(feature + uint64_t{k} * row);
          factors[j] = Packet<W, 1>::at(weight + k)[0];
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          const float factor = j < left ? factors[j] : 0.0f;
#pragma unroll
          for (int k = 0; k < V; ++k) sum[k] = fmaf(factor, values[j][k], sum[k]);
        }
      }
    }
  }

  __device__ Packet<uint32_t, 2> run(int i) const { return Packet<uint32_t, 2>::at(runs + i); }
};

template <class F, class W, int V> class CellPool {
 public:
  __device__ CellPool(const VoxelPoolTask& task, const Shares& shares)
      : task_(task),
        shares_(shares),
        group_(threadIdx.x / shares.lanes),
        base_(static_cast<int>(blockIdx.y) * shares.lanes * V),
        lane_(static_cast<int>(threadIdx.x) % shares.lanes * V),
        sample_(static_cast<int>(blockIdx.x) % shares.batch),
        share_(static_cast<int>(blockIdx.x) / shares.batch),
        works_(group_ < shares.groups && base_ + lane_ < task.channels),
        source_(task, sample_, base_ + lane_) {
    const int64_t first = task.plan.samples == 1 ? 0 : row_of(0);
    start_ = task.plan.cell_start + first, order_ = task.plan.cell_order + first;
  }

  /// The quiet cells of the block's share, one per group.
  __device__ void add_quiet() const {
    if (!works_) return;
    const int64_t from = static_cast<int64_t>(share_) * shares_.cells, to = from + shares_.cells;
    for (int64_t place = from + group_; place < to && place < task_.plan.cells; place += shares_.groups) {
      const int cell = order_[place], begin = start_[cell], end = start_[cell + 1];
      if (end - begin > kBusy) continue;
      float sum[V] = {};
      source_.add(begin, end, sum);
      store(task_.bev, task_.bev_number, row_of(cell) * task_.channels + base_ + lane_, sum);
    }
  }

  /// The busy cells among those that all blocks take in turn, one after another by all groups: neighbours go to different blocks.
  __device__ void add_busy() const {
    unsigned* const busy = reinterpret_cast<unsigned*>(shared_memory());
    for (int64_t turn = 0; turn * shares_.blocks + share_ < task_.plan.cells; turn += kThreads) {
      const int64_t place = (turn + threadIdx.x) * shares_.blocks + share_;
      const int mine = place < task_.plan.cells ? order_[place] : -1;
      const unsigned found = __ballot_sync(kWarp, mine >= 0 && start_[mine + 1] - start_[mine] > kBusy);
      if (threadIdx.x % 32 == 0) busy[threadIdx.x / 32] = found;
      __syncthreads();
      for (int warp = 0; warp < kThreads / 32; ++warp) {
        for (unsigned rest = busy[warp]; rest; rest &= rest - 1)
          add_together(order_[(turn + 32 * warp + __ffs(static_cast<int>(rest)) - 1) * shares_.blocks + share_]);
      }
      __syncthreads();
    }
  }

 private:
  __device__ int64_t row_of(int cell) const { return sample_ * task_.plan.cells + cell; }

  /// A cell by the whole block: each group adds up a part of its runs.
  __device__ void add_together(int cell) const {
    float* const parts = reinterpret_cast<float*>(shared_memory()) + kThreads / 32;
    const int begin = start_[cell], runs = start_[cell + 1] - begin, channels = shares_.lanes * V;
    if (works_) {
      float sum[V] = {};
      source_.add(begin + runs * group_ / shares_.groups, begin + runs * (group_ + 1) / shares_.groups, sum);
      for (int k = 0; k < V; ++k) parts[group_ * channels + lane_ + k] = sum[k];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels && base_ + c < task_.channels; c += kThreads) {
      float sum = 0;
#pragma unroll 4
      for (int g = 0; g < shares_.groups; ++g) sum += parts[g * channels + c];
      const float total[1] = {sum};
      store(task_.bev, task_.bev_number, row_of(cell) * task_.channels + base_ + c, total);
    }
    __syncthreads();
  }

  const VoxelPoolTask& task_;
  const Shares& shares_;
  int group_, base_, lane_;  // the first channel of the block, and of the lane from there
  int sample_, share_;
  bool works_;
  Source<F, W, V> source_;
  const int32_t *start_, *order_;
};

template <class F, class W, int V> __global__ void __launch_bounds__(kThreads, 4) pool_cells(VoxelPoolTask task, Shares shares) {
  const CellPool<F, W, V> pool(task, shares);
  pool.add_quiet();
  pool.add_busy();
}

template <class F, class W, int V> const char* launch_cells(const VoxelPoolTask& task, void* stream) {
  if (task.plan.width * task.channels * static_cast<int64_t>(sizeof(F)) > UINT32_MAX) return "rows of images are too long";
  Shares shares;
  const int64_t lanes = chunks_of(task.channels, V), parts = chunks_of(lanes, kThreads);
  shares.batch = static_cast<int>(task.batch);
  shares.lanes = static_cast<int>(chunks_of(lanes, parts));
  shares.groups = kThreads / shares.lanes;
  shares.cells = shares.groups * (task.batch * task.plan.cells < kManyCells ? 1 : 4);
  shares.blocks = static_cast<int>(chunks_of(task.plan.cells, shares.cells));
  const size_t shared = kThreads / 32 * sizeof(unsigned) + kThreads * V * sizeof(float);
  return launch(pool_cells<F, W, V>, {shares.blocks * task.batch, kThreads, shared, stream, parts}, task, shares);
}

// --- choice ---------------------------------------------------------------------------------------------------------

bool in_packets(const VoxelPoolTask& task, int numbers) { return task.channels % numbers == 0 && aligned(task.features) && aligned(task.bev); }

/// Whether to go by column: that has few warps with much to do, so it pays where there are many cells.
template <class T, class W> bool by_column(const VoxelPoolTask& task) {
  return in_packets(task, 16) && aligned(task.weights) && task.plan.height % 4 == 0 && Splitting<T, W>::takes(task.softmax) &&
         task.batch * task.plan.cells >= kManyCells;
}

template <class F, class W> const char* pool(const VoxelPoolTask& task, void* stream) {
  constexpr int kWide = 16 / sizeof(F);
  if constexpr (sizeof(F) == 2 && (sizeof(W) == 4 || kNumber<F> == kNumber<W>)) {
    if (by_column<F, W>(task)) return launch_columns<F, W>(task, stream);
  }
  return in_packets(task, kWide) ? launch_cells<F, W, kWide>(task, stream) : launch_cells<F, W, 1>(task, stream);
}

}  // namespace
}  // namespace device

namespace cuda {

const char* voxel_pool(const VoxelPoolTask& task, void* stream) {
  using namespace device;
  if (task.weights != task.depth) {
    if (const char* problem = prepare(task, stream)) return problem;
  }
  if (task.channels == 0 || task.plan.cells == 0) return nullptr;
  return with_type(task.feature_number, [&](auto* feature) {
    return with_type(task.weight_number, [&](auto* weight) {
      return pool<std::remove_pointer_t<decltype(feature)>, std::remove_pointer_t<decltype(weight)>>(task, stream);
    });
  });
}

}  // namespace cuda
}  // namespace irlvla
