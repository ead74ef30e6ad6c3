// BEV voxel pooling on a GPU, forward. First weights are brought into the order of the plan, through the softmax if there is one;
// then every cell has one owner, which adds up its runs in a fixed order and writes it once: no atomics, and one bit pattern.
//
// Two kernels add up. One takes any numbers, a group of lanes per cell, point after point. For 16-bit features there is another: a warp takes 16 cells along a ray, and each pixel column that touches them is one matrix product,
//   sums (channel x cell) += features (channel x image row) weights (image row x cell),
// exact in its products: weights of float32 are several 16-bit numbers each.
#include "voxel_pool_device.h"

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
constexpr int kBusy = 8;                  // a cell of more runs is the work of a whole block, lest the others wait for it
constexpr int64_t kManyCells = 1 << 17;  // of a batch: enough to keep a GPU busy with fewer, larger shares

/// How pool_cells shares out work: the cells of a sample by their visiting order, V channels to a lane.
struct Shares {
  int batch, blocks, cells;  // samples, blocks per sample, cells per block
  int lanes, groups;  // lanes per cell, cells at a time
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

// --- column by column -----------------------------------------------------------------------------------------------

constexpr int kStrip = 16;  // cells of a warp
constexpr int kStripThreads = 128;

/// Division of integers below 2^31 by one that is known before.
struct Divisor {
  explicit Divisor(int64_t by) : by(static_cast<uint32_t>(by)) {
    while ((int64_t{1} << (shift - 31)) < by) ++shift;
    factor = static_cast<uint32_t>(((int64_t{1} << shift) + by - 1) / by);
  }
  __device__ uint32_t operator()(uint32_t value) const { return static_cast<uint32_t>(static_cast<uint64_t>(value) * factor >> shift); }
  uint32_t by, factor;
  int shift = 31;
};

struct Columns {
  Divisor points, width, height;  // points of a pixel column, and the size of the image
  uint32_t pixel;                 // bytes of features
};

/// A pixel column on its way to the sums: what a lane holds of 16 K channels and 16 image rows, and of the weights of 16 cells.
template <class W, int K> struct ColumnStep {
  unsigned touched;             // cells in which it has points; 0: there is no further column
  Packet<uint32_t, 4> wide[4];  // by image row 4 (lane % 4) + i: channels 8 (lane / 4) ...
  uint32_t rest[4];             // if K is 5: channels 64 + 2 (lane / 4) ...
  Packet<W, 4> weights[2];      // of those image rows in cells lane / 4 and 8 + lane / 4
  unsigned inside[2];           // which of them have points there
};

/// A warp's walk through the pixel columns that touch its cells. Lanes l and 16 + l stand for cell l.
template <class T, class W, int K> class StripPool {
 public:
  __device__ StripPool(const VoxelPoolTask& task, const Columns& columns, int64_t sample, int64_t strip, int channel)
      : task_(task), columns_(columns), sample_(sample), channel_(channel), quad_(threadIdx.x % 32 / 4), pair_(threadIdx.x % 4) {
    const PoolPlan& plan = task.plan;
    const int64_t place = strip * kStrip + threadIdx.x % kStrip, first = plan.samples == 1 ? 0 : sample * plan.cells;
    cell_ = place < plan.cells ? plan.cell_order[first + place] : -1;
    begin_ = end_ = plan.cell_runs;
    if (cell_ >= 0) begin_ += plan.cell_start[first + cell_], end_ += plan.cell_start[first + cell_ + 1];
  }

  __device__ void run() {
    for (int row = 0; row < task_.plan.height; row += kRows) {
      look_at(row);
      ColumnStep<W, K> step = take(), next;
      while (step.touched) {  // a column's loads are under way during the products of the one before
        next = take();
        multiply_in(step);
        if (!next.touched) break;
        step = take();
        multiply_in(next);
      }
    }
    write();
  }

 private:
  static constexpr uint32_t kNone = ~0u;
  static constexpr int kParts = Splitting<T, W>::kParts;
  static constexpr float kScale = Splitting<T, W>::kScale;

  /// Start anew with image rows row ... row + 15. Lanes beyond the last row or channel read the first: for cells in which they have
  /// no weight, or for nobody.
  __device__ void look_at(int row) {
    const PoolPlan& plan = task_.plan;
    const int64_t pixels = plan.cameras * plan.height * plan.width, v = row + 4 * pair_ < plan.height ? row + 4 * pair_ : 0;
    const T* features = static_cast<const T*>(task_.features) + (sample_ * pixels + v * plan.width) * task_.channels;
    wide_ = features + (channel_ + 8 * quad_ < task_.channels ? channel_ + 8 * quad_ : 0);
    rest_ = features + (channel_ + 64 < task_.channels ? channel_ + 64 + 2 * quad_ : 0);
    weights_ = static_cast<const W*>(task_.weights) + sample_ * pixels * plan.bins + v;
    keep(wide_), keep(rest_), keep(weights_);
    row_ = row, at_ = begin_;
    fetch(at_ < end_);
  }

  __device__ void fetch(bool more) {
    if (more) run_ = Packet<uint32_t, 2>::at(at_);
    weight_ = more ? run_.words[0] : kNone;
  }

  /// The next column with points in these image rows: that of the first run that is left of any cell.
  __device__ ColumnStep<W, K> take() {
    ColumnStep<W, K> step;
    uint32_t column, start, rows;
    do {
      const uint32_t first = __reduce_min_sync(kWarp, weight_);
      step.touched = 0;
      if (first == kNone) return step;
      column = columns_.points(first);
      const bool here = weight_ - column * columns_.points.by < columns_.points.by;
      start = columns_.height(weight_) * columns_.height.by;
      const int low = static_cast<int>(weight_ - start) - row_, high = low + static_cast<int>(run_.words[1] & 255);
      rows = here ? below(high) & ~below(low) : 0;
      at_ += here;
      if (here) fetch(at_ < end_);
      step.touched = __ballot_sync(kWarp, rows != 0);
    } while (!step.touched);
    load_features(step, column);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t from = __shfl_sync(kWarp, start, 8 * j + quad_);
      step.inside[j] = __shfl_sync(kWarp, rows, 8 * j + quad_) >> 4 * pair_ & 15;
      if (step.inside[j]) step.weights[j] = Packet<W, 4>::at(weights_ + from);
    }
    return step;
  }

  /// A bit for each of the 16 image rows before this one.
  static __device__ uint32_t below(int row) { return (1u << min(max(row, 0), kRows)) - 1; }

  __device__ void load_features(ColumnStep<W, K>& step, uint32_t column) const {
    const uint32_t width = columns_.width.by, pixel = column + columns_.width(column) * (columns_.height.by - 1) * width;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint64_t offset = static_cast<uint64_t>(pixel + i * width) * columns_.pixel;
      step.wide[i] = Packet<uint32_t, 4>::at(reinterpret_cast<const char*>(wide_) + offset);
      if constexpr (K == 5) step.rest[i] = *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(rest_) + offset);
    }
  }

  __device__ void multiply_in(const ColumnStep<W, K>& step) {
    uint32_t a[K][4];  // pairs of rows by channel, from pairs of channels by row
#pragma unroll
    for (int m = 0; m < K; ++m) {
      const auto pixel = [&](int i) { return m < 4 ? step.wide[i].words[m % 4] : step.rest[i]; };
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][i] = __byte_perm(pixel(i / 2 * 2), pixel(i / 2 * 2 + 1), i % 2 ? 0x7632 : 0x5410);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (!(step.touched >> 8 * j & 255)) continue;
      uint32_t weights[kParts][2];
      split(step, j, weights);
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int m = 0; m < K; ++m) multiply<T>(sums_[j][m], a[m], weights[p][0], weights[p][1]);
      }
    }
  }

  /// The weights of cell 8 j + lane / 4 in pairs of rows, zero where it has no points.
  __device__ void split(const ColumnStep<W, K>& step, int j, uint32_t (&weights)[kParts][2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has_first = step.inside[j] >> 2 * i & 1, has_second = step.inside[j] >> 2 * i & 2;
      if constexpr (kParts == 1) {
        weights[0][i] = step.weights[j].words[i] & ((has_first ? 0xffff : 0) | (has_second ? 0xffff0000 : 0));
      } else {
        float first = has_first ? kScale * step.weights[j][2 * i] : 0.0f, second = has_second ? kScale * step.weights[j][2 * i + 1] : 0.0f;
#pragma unroll
        for (int p = 0; p < kParts; ++p) {
          weights[p][i] = narrow<T>(first, second);
          first -= widen_first<T>(weights[p][i]), second -= widen_second<T>(weights[p][i]);
        }
      }
    }
  }

  __device__ void write() const {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int cell = __shfl_sync(kWarp, cell_, 8 * j + 2 * pair_ + e);
        if (cell < 0) continue;
        const int64_t to = (sample_ * task_.plan.cells + cell) * task_.channels + channel_;
        float x[8];
#pragma unroll
        for (int m = 0; m < 4; ++m) x[2 * m] = sums_[j][m][e] / kScale, x[2 * m + 1] = sums_[j][m][2 + e] / kScale;
        if (channel_ + 8 * quad_ < task_.channels) store(task_.bev, task_.bev_number, to + 8 * quad_, x);
        if constexpr (K == 5) {
          const float rest[2] = {sums_[j][4][e] / kScale, sums_[j][4][2 + e] / kScale};
          if (channel_ + 64 < task_.channels) store(task_.bev, task_.bev_number, to + 64 + 2 * quad_, rest);
        }
      }
    }
  }

  const VoxelPoolTask& task_;
  const Columns& columns_;
  const int64_t sample_;
  const int channel_, quad_, pair_;  // lane / 4, lane % 4
  int cell_, row_;
  const CellRun *begin_, *end_, *at_;
  Packet<uint32_t, 2> run_ = {};  // a CellRun: the next of the cell
  uint32_t weight_;               // of that, or kNone
  const T *wide_, *rest_;         // of pixel column 0, as ColumnStep has them
  const W* weights_;
  float sums_[2][K][4] = {};  // cells 8 j ... by channels: see `multiply`
};

template <class T, class W, int K> __global__ void __launch_bounds__(kStripThreads) pool_columns(VoxelPoolTask task, Columns columns) {
  const int64_t sample = blockIdx.x % task.batch, strip = blockIdx.x / task.batch * (kStripThreads / 32) + threadIdx.x / 32;
  if (strip * kStrip >= task.plan.cells) return;
  StripPool<T, W, K>(task, columns, sample, strip, blockIdx.y * 16 * K).run();
}

template <class T, class W, int K> const char* launch_columns(const VoxelPoolTask& task, void* stream) {
  const PoolPlan& plan = task.plan;
  const Columns columns = {Divisor(plan.bins * plan.height), Divisor(plan.width), Divisor(plan.height), static_cast<uint32_t>(task.channels * sizeof(T))};
  const int64_t blocks = chunks_of(plan.cells, kStrip * (kStripThreads / 32)) * task.batch;
  return launch(pool_columns<T, W, K>, {blocks, kStripThreads, 0, stream, chunks_of(task.channels, 16 * K)}, task, columns);
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
    if (by_column<F, W>(task)) return channel_tiles(task.channels) == 4 ? launch_columns<F, W, 4>(task, stream) : launch_columns<F, W, 5>(task, stream);
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
