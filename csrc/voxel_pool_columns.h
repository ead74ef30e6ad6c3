// BEV voxel pooling on a GPU by pixel columns, for 16-bit features. A warp owns 16 cells that follow each other along a ray, and
// each pixel column that touches them is one matrix product:
//   sums (channel x cell) += features (channel x image row) weights (image row x cell)
// Weights of cells in which an image row has no points are zero there, so infinite features become NaN in their neighbours too.
#pragma once

#include "voxel_pool_device.h"

namespace irlvla {
namespace device {
namespace {

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

template <class T, class W> const char* launch_columns(const VoxelPoolTask& task, void* stream) {
  const PoolPlan& plan = task.plan;
  const Columns columns = {Divisor(plan.bins * plan.height), Divisor(plan.width), Divisor(plan.height),
                           static_cast<uint32_t>(task.channels * sizeof(T))};
  const int tiles = channel_tiles(task.channels);
  const Launch how = {chunks_of(plan.cells, kStrip * (kStripThreads / 32)) * task.batch, kStripThreads, 0, stream,
                      chunks_of(task.channels, 16 * tiles)};
  return tiles == 4 ? launch(pool_columns<T, W, 4>, how, task, columns) : launch(pool_columns<T, W, 5>, how, task, columns);
}

}  // namespace
}  // namespace device
}  // namespace irlvla
