// The products of a pixel column with the gradients of its cells, a tile of 16 runs and 16 image rows at a time.
// A class has the sums of one warp, and says what of a tile stands in shared memory, and how.
#pragma once

#include "voxel_pool_device.h"

namespace irlvla {
namespace device {
namespace {

constexpr int kRuns = 16;  // of a tile

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

}  // namespace
}  // namespace device
}  // namespace irlvla
