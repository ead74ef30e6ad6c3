// BEV voxel pooling on a GPU, backward, in one launch. A warp owns a pixel column (16 image rows of it): it meets each of its runs
// once, 16 at a time, reads the gradients of their cells, and has both products of them:
//   gradient of weights  (run x image row)     = gradients (run x channel) features (channel x image row)
//   gradient of features (image row x channel) += weights (image row x run) gradients (run x channel)
// Then it takes the weights' gradients back through the softmax. No atomics, no sorting, nothing to clear: one bit pattern.
#include "voxel_pool_products.h"

namespace irlvla {
namespace device {
namespace {

/// What can be read and written in packets.
struct Packing {
  bool rows;     // of features, of cells, and of their gradients
  bool weights;  // half a run of them at once
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
  static constexpr int kPackets = Products::kChannels / Products::kPacket;  // of a row
  static constexpr int kShare = kRuns * kPackets / 32;                      // a lane's of 16 rows
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
    const int64_t cells = block_.sample * task_.plan.cells;
    const char* features = at(task_.features, task_.feature_number, pixel_ * task_.channels + channel);
    const char* gradients = at(task_.bev_grad, task_.bev_number, cells * task_.channels + channel);
    copy(memory_.features, features, task_.feature_number, channel,
         [&](int row) { return block_.row + row < block_.height ? row * block_.width : -1; });
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
