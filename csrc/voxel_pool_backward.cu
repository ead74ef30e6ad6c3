// BEV voxel pooling on a GPU, backward, in one launch. A warp owns a pixel column (16 image rows of it): it meets each of its runs
// once, 16 at a time, reads the gradients of their cells, and has both products of them:
//   gradient of weights  (run x image row)     = gradients (run x channel) features (channel x image row)
//   gradient of features (image row x channel) += weights (image row x run) gradients (run x channel)
// Then it takes the weights' gradients back through the softmax. No atomics, no sorting, nothing to clear: one bit pattern.
#include "voxel_pool_device.h"

namespace irlvla {
namespace device {
namespace {

constexpr int kRuns = 16;  // of a tile

/// What can be read and written in packets.
struct Packing {
  bool rows;     // of features, of cells, and of their gradients
  bool weights;  // half a run of them at once
};

/// A bit for each of the 16 image rows before this one.
__device__ unsigned below(int row) { return (1u << min(max(row, 0), kRows)) - 1; }

/// The products in float32, for any numbers; 16 K channels at a time. The lane has rows 4 i + lane % 4 of runs lane / 4 and 8 + that.
template <int K> class ExactProducts {
 public:
  static constexpr int kChannels = 16 * K, kPacket = 4, kStride = kChannels + 4, kBlocks = 1;
  using Element = float;
  struct Memory {
    alignas(16) float rows[kRuns * kStride];  // gradients of a tile's cells; in the end those of features
    float features[kRows * kStride];
    alignas(16) float weights[kRuns * kRows];
  };

  static __device__ int row(int i) { return 4 * i + threadIdx.x % 4; }

  static __device__ Packet<float, kPacket> read(const void* from, Number number, int64_t left, bool in_packets) {
    float x[kPacket] = {}, one[1];
    if (in_packets && left > 0) load(from, number, 0, x);
    for (int k = 0; !in_packets && k < kPacket && k < left; ++k) load(from, number, k, one), x[k] = one[0];
    return Packet<float, kPacket>::of(x);
  }
  static __device__ void write(void* to, Number number, int64_t left, bool in_packets, const Packet<float, kPacket>& packet) {
    const float x[kPacket] = {packet[0], packet[1], packet[2], packet[3]};
    if (in_packets && left > 0) store(to, number, 0, x);
    for (int k = 0; !in_packets && k < kPacket && k < left; ++k) store(to, number, k, {x[k]});
  }

  template <int N> static __device__ void read_weights(const void* data, Number number, int64_t i, float (&x)[N]) { load(data, number, i, x); }
  static __device__ void put_weights(Memory& memory, int run, int row, const float (&x)[kRows / 2]) {
    store_as(memory.weights + run * kRows + row, x);
  }

  __device__ void weights_grad(const Memory& memory, float (&dots)[2][4]) const {
    const int run = threadIdx.x % 32 / 4;
#pragma unroll 4
    for (int c = 0; c < kChannels; c += kPacket) {
      float g[2][kPacket], f[4][kPacket];
#pragma unroll
      for (int h = 0; h < 2; ++h) load_as(memory.rows + (8 * h + run) * kStride + c, g[h]);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_as(memory.features + row(i) * kStride + c, f[i]);
#pragma unroll
      for (int k = 0; k < kPacket; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dots[0][i] = fmaf(g[0][k], f[i][k], dots[0][i]), dots[1][i] = fmaf(g[1][k], f[i][k], dots[1][i]);
      }
    }
  }

  __device__ void add_features_grad(const Memory& memory) {
#pragma unroll 2
    for (int run = 0; run < kRuns; ++run) {
      float w[4], g[K][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = memory.weights[run * kRows + row(i)];
#pragma unroll
      for (int k = 0; k < K; ++k) load_as(memory.rows + run * kStride + channel(k), g[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int k = 0; k < K; ++k) sums_[i][k][0] = fmaf(w[i], g[k][0], sums_[i][k][0]), sums_[i][k][1] = fmaf(w[i], g[k][1], sums_[i][k][1]);
      }
    }
  }

  __device__ void put_features_grad(Memory& memory) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int k = 0; k < K; ++k) store_as(memory.rows + row(i) * kStride + channel(k), sums_[i][k]);
    }
  }

 private:
  static __device__ int channel(int k) { return 16 * k + threadIdx.x % 32 / 4 * 2; }

  float sums_[4][K][2] = {};
};

/// The same by matrix instructions, for gradients and features of a 16-bit type: products are exact, sums float32.
/// Weights of float32 are several numbers of that type.
template <class T, class W, int K> class MatrixProducts {
 public:
  static constexpr int kChannels = 16 * K, kPacket = 8, kStride = kChannels + 8, kWeightStride = kRows + 8;  // rows in shifted banks
  static constexpr int kParts = Splitting<T, W>::kParts, kBlocks = 2;
  static constexpr float kScale = Splitting<T, W>::kScale;
  using Element = T;
  struct Memory {
    alignas(16) T rows[kRuns * kStride];  // as above
    T features[kRows * kStride];
    alignas(16) T weights[kParts][kRuns * kWeightStride];
  };

  static __device__ int row(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }

  static __device__ Packet<T, kPacket> read(const void* from, Number, int64_t left, bool) {
    return left > 0 ? Packet<T, kPacket>::at(from) : Packet<T, kPacket>{};
  }
  static __device__ void write(void* to, Number, int64_t left, bool, const Packet<T, kPacket>& packet) {
    if (left > 0) packet.put(to);
  }

  template <int N> static __device__ void read_weights(const void* data, Number, int64_t i, float (&x)[N]) {
    load_as(static_cast<const W*>(data) + i, x);
  }
  static __device__ void put_weights(Memory& memory, int run, int row, const float (&x)[kRows / 2]) {
    float rest[kRows / 2];
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) rest[i] = kScale * x[i];
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const auto part = Packet<T, kRows / 2>::of(rest);
      part.put(memory.weights[p] + run * kWeightStride + row);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) rest[i] -= part[i];
    }
  }

  __device__ void weights_grad(const Memory& memory, float (&dots)[2][4]) const {
    float sums[2][4] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      uint32_t gradients[4], features[4];
      load_matrices<false>(gradients, memory.rows + down_first() * kStride + 16 * k + right_second());
      load_matrices<false>(features, memory.features + down_second() * kStride + 16 * k + right_first());
      multiply<T>(sums[0], gradients, features[0], features[1]);
      multiply<T>(sums[1], gradients, features[2], features[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) dots[0][i] = sums[i / 2][i % 2], dots[1][i] = sums[i / 2][2 + i % 2];
  }

  __device__ void add_features_grad(const Memory& memory) {
    uint32_t weights[kParts][4], gradients[4];
#pragma unroll
    for (int p = 0; p < kParts; ++p) load_matrices<true>(weights[p], memory.weights[p] + down_second() * kWeightStride + right_first());
#pragma unroll
    for (int k = 0; k < K; ++k) {
      load_matrices<true>(gradients, memory.rows + down_first() * kStride + 16 * k + right_second());
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        multiply<T>(sums_[2 * k], weights[p], gradients[0], gradients[1]);
        multiply<T>(sums_[2 * k + 1], weights[p], gradients[2], gradients[3]);
      }
    }
  }

  __device__ void put_features_grad(Memory& memory) const {
    const int quad = threadIdx.x % 32 / 4, pair = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < 2 * K; ++n) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        *reinterpret_cast<uint32_t*>(memory.rows + (8 * h + quad) * kStride + 8 * n + 2 * pair) =
            narrow<T>(sums_[n][2 * h] / kScale, sums_[n][2 * h + 1] / kScale);
    }
  }

 private:
  // Where in a 16 x 16 block the lane's row of `load_matrices` begins: the second of the four matrices lies below the first, or
  // to its right.
  static __device__ int down_first() { return threadIdx.x % 16; }
  static __device__ int right_second() { return threadIdx.x % 32 / 16 * 8; }
  static __device__ int down_second() { return threadIdx.x % 32 / 16 * 8 + threadIdx.x % 8; }
  static __device__ int right_first() { return threadIdx.x % 16 / 8 * 8; }

  float sums_[2 * K][4] = {};
};

/// A warp's pixel column.
template <class Products> class ColumnGradients {
 public:
  using Memory = typename Products::Memory;

  __device__ ColumnGradients(const VoxelPoolBackwardTask& task, const ColumnBlock& block, int column, Memory& memory, const Packing& packing)
      : task_(task), block_(block), depth_(block.depth(column)), weight_(block.weight(column)), memory_(memory), packing_(packing) {
    const PoolPlan& plan = task.plan;
    const int64_t camera = plan.samples == 1 ? block.camera % plan.cameras : block.camera, place = camera * plan.width + block.first + column;
    begin_ = plan.column_start[place], end_ = plan.column_start[place + 1];
    pixel_ = (block.camera * plan.height + block.row) * plan.width + block.first + column;
    lane_ = threadIdx.x % 32;
  }

  __device__ void run() const {
    start();
    for (int channel = 0; channel < task_.channels; channel += Products::kChannels) add(channel);
    if (task_.depth_grad && task_.softmax) undo_softmax();
  }

 private:
  static constexpr int kPackets = Products::kChannels / Products::kPacket, kShare = kRuns * kPackets / 32;  // of a row, and a lane's
  using Element = typename Products::Element;
  using Piece = Packet<Element, Products::kPacket>;

  /// The gradient of weights but for what the cells add to it.
  __device__ void start() const {
    for (int i = lane_; i < block_.bins * kRows; i += 32) depth_[i] = 0;
    if (task_.weights_grad) each_point(task_.weights_grad, [&](float& depth, float weight) { depth = weight; });
  }

  /// visit(value in shared memory, number of this tensor) for all points of the column: lanes are image rows, twice.
  template <class Visit> __device__ void each_point(const void* weights, Visit visit) const {
    const int row = lane_ % kRows;
    if (block_.row + row >= block_.height) return;
    const auto read = [&](int bin) {
      float x[1];
      Products::read_weights(weights, task_.weight_number, weight_ + bin * block_.height + row, x);
      return x[0];
    };
    ColumnBlock::each_second(lane_ / kRows, block_.bins, read, [&](int bin, float x) { visit(depth_[bin * kRows + row], x); });
  }

  /// All that channels channel ... channel + Products::kChannels - 1 contribute.
  __device__ void add(int channel) const {
    Products products;
    const int row = static_cast<int>(task_.channels), apart = block_.width, rows = block_.height - block_.row;
    const int64_t bev = block_.sample * task_.plan.cells;
    copy(memory_.features, at(task_.features, task_.feature_number, pixel_ * row + channel), task_.feature_number, channel,
         [&](int row) { return row < rows ? row * apart : -1; });
    const char* gradients = at(task_.bev_grad, task_.bev_number, bev * row + channel);
    Run next = fetch(begin_);
    for (int tile = begin_; tile < end_; tile += kRuns) {
      const Run run = next;
      next = fetch(tile + kRuns);
      __syncwarp();
      copy(memory_.rows, gradients, task_.bev_number, channel, [&](int row) { return __shfl_sync(kWarp, run.rows ? run.cell : -1, row); });
      put_weights(run);
      __syncwarp();
      if (task_.depth_grad) add_weights_grad(products, run);
      if (task_.features_grad) products.add_features_grad(memory_);
    }
    if (task_.features_grad) write(products, channel);
    __syncwarp();
  }

  /// The run of lane % 16, with a bit for each of the 16 image rows in which it has points.
  struct Run {
    int cell, bin;
    unsigned rows;
  };

  __device__ Run fetch(int tile) const {
    const int i = tile + lane_ % kRuns;
    if (i >= end_) return {-1, 0, 0};
    const auto [cell, rest] = Packet<uint32_t, 2>::at(task_.plan.column_runs + i).words;
    const int low = static_cast<int>(rest >> 16 & 255) - block_.row, high = low + static_cast<int>(rest >> 24);
    return {static_cast<int>(cell), static_cast<int>(rest & 0xffff), below(high) & ~below(low)};
  }

  static __device__ const char* at(const void* data, Number number, int64_t i) { return static_cast<const char*>(data) + i * bytes_of(number); }

  /// 16 rows of a tensor to shared memory, from a channel on at `from`: those that row_of names, zeros where it says -1.
  template <class RowOf> __device__ void copy(Element* to, const char* from, Number number, int channel, RowOf row_of) const {
    Piece pieces[kShare];
    const unsigned bytes = bytes_of(number), row_bytes = static_cast<unsigned>(task_.channels) * bytes;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int place = 32 * i + lane_, c = place % kPackets * Products::kPacket, row = row_of(place / kPackets);
      const char* piece = from + uint64_t{row_bytes} * static_cast<unsigned>(max(row, 0)) + c * bytes;
      pieces[i] = Products::read(piece, number, row < 0 ? 0 : task_.channels - channel - c, packing_.rows);
    }
#pragma unroll
    for (int i = 0; i < kShare; ++i) pieces[i].put(to + place(i));
  }

  /// Where in those rows the lane's i-th piece is.
  __device__ int place(int i) const { return (32 * i + lane_) / kPackets * Products::kStride + (32 * i + lane_) % kPackets * Products::kPacket; }

  /// Each lane puts half of a run's weights, zero where it has no points.
  __device__ void put_weights(const Run& run) const {
    const int of = lane_ / 2, row = lane_ % 2 * (kRows / 2);
    const int bin = __shfl_sync(kWarp, run.bin, of);
    const unsigned rows = __shfl_sync(kWarp, run.rows, of) >> row;
    const int64_t first = weight_ + bin * block_.height + row;
    float x[kRows / 2] = {}, one[1];
    if (packing_.weights) {
      if (rows & 255) Products::read_weights(task_.weights, task_.weight_number, first, x);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) x[i] = rows >> i & 1 ? x[i] : 0.0f;
    } else {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        if (rows >> i & 1) Products::read_weights(task_.weights, task_.weight_number, first + i, one), x[i] = one[0];
      }
    }
    Products::put_weights(memory_, of, row, x);
  }

  __device__ void add_weights_grad(const Products& products, const Run& run) const {
    float dots[2][4] = {};
    products.weights_grad(memory_, dots);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int bin = __shfl_sync(kWarp, run.bin, 8 * h + lane_ / 4);
      const unsigned rows = __shfl_sync(kWarp, run.rows, 8 * h + lane_ / 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (rows >> Products::row(i) & 1) depth_[bin * kRows + Products::row(i)] += dots[h][i];
      }
    }
  }

  __device__ void write(const Products& products, int channel) const {
    __syncwarp();
    products.put_features_grad(memory_);
    __syncwarp();
    const int bytes = bytes_of(task_.feature_number);
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int row = (32 * i + lane_) / kPackets, c = (32 * i + lane_) % kPackets * Products::kPacket;
      const int64_t left = block_.row + row < block_.height ? task_.channels - channel - c : 0;
      char* to = static_cast<char*>(task_.features_grad) + ((pixel_ + row * block_.width) * task_.channels + channel + c) * bytes;
      Products::write(to, task_.feature_number, left, packing_.rows, Piece::at(memory_.rows + place(i)));
    }
  }

  /// From the gradient of weights to that of their logits.
  __device__ void undo_softmax() const {
    float total = 0;
    each_point(task_.weights, [&](float& depth, float weight) { total = fmaf(weight, depth, total); });
    total += __shfl_xor_sync(kWarp, total, kRows);
    each_point(task_.weights, [&](float& depth, float weight) { depth = weight * (depth - total); });
  }

  const VoxelPoolBackwardTask& task_;
  const ColumnBlock& block_;
  float* const depth_;    // the gradient of weights, later of depth: bins of 16 image rows
  const int64_t weight_;  // of the column in tensors
  Memory& memory_;
  const Packing& packing_;
  int begin_, end_, lane_;
  int64_t pixel_;
};

template <class Products>
__global__ void __launch_bounds__(32 * kMostColumns, Products::kBlocks) pool_backward(VoxelPoolBackwardTask task, int columns, Packing packing) {
  const ColumnBlock block(task.plan, columns);
  const int column = threadIdx.x / 32;
  if (block.first + column < block.width) {
    auto* memory = reinterpret_cast<typename Products::Memory*>(block.depth(columns)) + column;
    ColumnGradients<Products>(task, block, column, *memory, packing).run();
  }
  __syncthreads();
  if (!task.depth_grad) return;
  by_type(task.depth_number, [&](auto* type) {
    auto* depth_grad = static_cast<decltype(type)>(task.depth_grad);
    block.drain(task.depth_strides, [&](int64_t to, float value) { store_as(depth_grad + to, value); });
  });
}

template <class Products> const char* launch_backward(const VoxelPoolBackwardTask& task, bool in_packets, void* stream) {
  const Packing packing = {in_packets, task.plan.height % (kRows / 2) == 0 && aligned(task.weights)};
  const size_t bytes = ColumnBlock::pitch(task.plan.bins) * sizeof(float) + sizeof(typename Products::Memory);
  const int columns = columns_per_block(task.plan, task.batch, bytes);
  if (columns == 0) return kTooDeep;
  return launch(pool_backward<Products>, launch_of(task.plan, task.batch, columns, bytes, stream), task, columns, packing);
}

template <class F, class W> const char* backward(const VoxelPoolBackwardTask& task, void* stream) {
  const bool few = channel_tiles(task.channels) == 4;
  const bool aligned_rows = aligned(task.features) && aligned(task.features_grad) && aligned(task.bev_grad);
  if constexpr (sizeof(F) == 2 && (sizeof(W) == 4 || kNumber<F> == kNumber<W>)) {
    if (aligned_rows && task.channels % 8 == 0 && task.bev_number == kNumber<F> && Splitting<F, W>::takes(task.softmax))
      return few ? launch_backward<MatrixProducts<F, W, 4>>(task, true, stream) : launch_backward<MatrixProducts<F, W, 5>>(task, true, stream);
  }
  const bool in_packets = aligned_rows && task.channels % 4 == 0;
  return few ? launch_backward<ExactProducts<4>>(task, in_packets, stream) : launch_backward<ExactProducts<5>>(task, in_packets, stream);
}

}  // namespace
}  // namespace device

namespace cuda {

const char* voxel_pool_backward(const VoxelPoolBackwardTask& task, void* stream) {
  using namespace device;
  if (!task.features_grad && !task.depth_grad) return nullptr;
  return with_type(task.feature_number, [&](auto* feature) {
    return with_type(task.weight_number, [&](auto* weight) {
      return backward<std::remove_pointer_t<decltype(feature)>, std::remove_pointer_t<decltype(weight)>>(task, stream);
    });
  });
}

}  // namespace cuda
}  // namespace irlvla
