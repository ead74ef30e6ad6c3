// What the CUDA kernels of voxel pooling are made of: numbers of three types, packets of them that move at once, matrix products
// of a warp, launches. g++ compiles it too, and the kernels: tests run them on the CPU (tests/cuda_emulation.h).
#pragma once

#include <type_traits>

#include "voxel_pool.h"

namespace irlvla {
namespace device {
namespace {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

template <class T> constexpr Number kNumber = Number::float32;
template <> constexpr Number kNumber<Half> = Number::float16;
template <> constexpr Number kNumber<Bfloat> = Number::bfloat16;

constexpr unsigned kWarp = ~0u;  // all lanes of a warp

// --- instructions ---------------------------------------------------------------------------------------------------

#ifdef __CUDACC__
__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

/// Keeps an address in registers: left alone, the compiler computes it anew for every use.
template <class T> __device__ void keep(T*& address) { asm volatile("" : "+l"(address)); }

__device__ inline float widen(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

/// Two numbers rounded, the first in the low half.
template <class T> __device__ uint32_t narrow(float first, float second) {
  uint32_t pair;
  if constexpr (kNumber<T> == Number::float16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}

/// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l brings the address of row l % 8 of matrix l / 8.
/// Lane l gets columns 2 (l % 4) and the next of row l / 4 of each; of the transposed ones with `kTransposed`.
template <bool kTransposed> __device__ void load_matrices(uint32_t (&to)[4], const void* row) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
  }
}

/// sums (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4, t = 2 (lane % 4): the lane holds columns t, t + 1 of rows g and
/// g + 8 of the sums; of a those of rows g and g + 8, then t + 8, t + 9 of them; of b rows t, t + 1, then t + 8, t + 9 of column g.
template <class T> __device__ void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kNumber<T> == Number::float16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}
#else
inline char* shared_memory() { return emulation::shared_memory(); }
template <class T> void keep(T*&) {}
inline float widen(Half x) { return emulation::widen_half(x.bits); }
template <class T> uint32_t narrow(float first, float second) {
  const auto one = kNumber<T> == Number::float16 ? emulation::narrow_half : emulation::narrow_bfloat;
  return one(first) | static_cast<uint32_t>(one(second)) << 16;
}
template <bool kTransposed> void load_matrices(uint32_t (&to)[4], const void* row) { emulation::load_matrices(to, row, kTransposed); }
template <class T> void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply(sums, a, b0, b1, kNumber<T> == Number::float16 ? emulation::widen_half : emulation::widen_bfloat);
}
#endif

// --- numbers --------------------------------------------------------------------------------------------------------

__device__ inline float widen(Bfloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
template <class T> __device__ float widen_first(uint32_t pair) { return widen(T{static_cast<uint16_t>(pair)}); }
template <class T> __device__ float widen_second(uint32_t pair) { return widen(T{static_cast<uint16_t>(pair >> 16)}); }

/// Numbers that lie side by side and move in one instruction, as registers hold them.
template <class T, int N> struct alignas(sizeof(T) * N) Packet {
  using Word = std::conditional_t<sizeof(T) * N == 2, uint16_t, uint32_t>;

  static __device__ Packet at(const void* address) { return *static_cast<const Packet*>(address); }
  static __device__ Packet of(const float* x) {
    Packet packet;
    for (int i = 0; i < kWords; ++i) packet.words[i] = word_of(x + i * N / kWords);
    return packet;
  }
  __device__ void put(void* address) const { *static_cast<Packet*>(address) = *this; }
  __device__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    else if constexpr (N == 1) return widen(T{words[0]});
    else return i % 2 ? widen_second<T>(words[i / 2]) : widen_first<T>(words[i / 2]);
  }

  static constexpr int kWords = static_cast<int>(sizeof(T) * N / sizeof(Word));
  Word words[kWords];

 private:
  static __device__ Word word_of(const float* x) {
    if constexpr (sizeof(T) == 4) return __float_as_uint(*x);
    else if constexpr (N == 1) return static_cast<uint16_t>(narrow<T>(*x, 0.0f));
    else return narrow<T>(x[0], x[1]);
  }
};

/// How many of N numbers move at once.
template <class T, int N> constexpr int kAtOnce = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;

template <class T, int N> __device__ void load_as(const T* from, float (&x)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += kAtOnce<T, N>) {
    const auto packet = Packet<T, kAtOnce<T, N>>::at(from + k);
#pragma unroll
    for (int j = 0; j < kAtOnce<T, N>; ++j) x[k + j] = packet[j];
  }
}
template <class T, int N> __device__ void store_as(T* to, const float (&x)[N]) {
#pragma unroll
  for (int k = 0; k < N; k += kAtOnce<T, N>) Packet<T, kAtOnce<T, N>>::of(x + k).put(to + k);
}

/// Calls use(T*) with a null pointer to the type that `number` names on the device, around a loop rather than in it.
template <class Use> __device__ void by_type(Number number, Use&& use) {
  switch (number) {
    case Number::float32: return use(static_cast<float*>(nullptr));
    case Number::float16: return use(static_cast<Half*>(nullptr));
    case Number::bfloat16: return use(static_cast<Bfloat*>(nullptr));
  }
}

/// N numbers of a tensor from its i-th on, whatever its type.
template <int N> __device__ void load(const void* data, Number number, int64_t i, float (&x)[N]) {
  by_type(number, [&](auto* type) { load_as(static_cast<decltype(type)>(const_cast<void*>(data)) + i, x); });
}
template <int N> __device__ void store(void* data, Number number, int64_t i, const float (&x)[N]) {
  by_type(number, [&](auto* type) { store_as(static_cast<decltype(type)>(data) + i, x); });
}
template <class T> __device__ float load_as(const T* from) { return Packet<T, 1>::at(from)[0]; }
template <class T> __device__ void store_as(T* to, float x) { Packet<T, 1>::of(&x).put(to); }

__device__ inline int bytes_of(Number number) { return number == Number::float32 ? 4 : 2; }

// --- weights in matrix products -------------------------------------------------------------------------------------

/// How weights of type W become numbers of the 16-bit type T for matrix products: float32 as the sum of several, so that no digit
/// that counts is lost. Half has few small numbers: weights of at most 1 are first made larger, and their sums smaller again.
template <class T, class W> struct Splitting {
  static constexpr int kParts = sizeof(W) == 2 ? 1 : kNumber<T> == Number::float16 ? 2 : 3;
  static constexpr float kScale = sizeof(W) == 4 && kNumber<T> == Number::float16 ? 32768.0f : 1.0f;

  /// Whether it can be done with these weights.
  static bool takes(bool softmax) { return kScale == 1 || softmax; }
};

// --- launches -------------------------------------------------------------------------------------------------------

int64_t chunks_of(int64_t size, int64_t chunk) { return (size + chunk - 1) / chunk; }

/// In how many tiles of 16 channels matrix products take them, 4 or 5: whichever leaves less to be computed in vain.
int channel_tiles(int64_t channels) { return chunks_of(channels, 64) * 64 <= chunks_of(channels, 80) * 80 ? 4 : 5; }

bool aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

/// Calls use(T*) with a null pointer to the type that `number` names.
template <class Use> const char* with_type(Number number, Use&& use) {
  switch (number) {
    case Number::float32: return use(static_cast<float*>(nullptr));
    case Number::float16: return use(static_cast<Half*>(nullptr));
    case Number::bfloat16: return use(static_cast<Bfloat*>(nullptr));
  }
  return "unknown type of numbers";
}

const char* explain(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next to ask would be told
  return cudaGetErrorString(status);
}

struct Launch {
  int64_t blocks;
  int threads;
  size_t shared;  // bytes
  void* stream;
  int64_t parts = 1;  // of each block's work, as blockIdx.y
};

template <class... Parameters> const char* launch(void (*kernel)(Parameters...), const Launch& how, Parameters... arguments) {
  if (how.blocks == 0 || how.parts == 0) return nullptr;
  if (how.blocks > INT32_MAX || how.parts > UINT16_MAX) return "too much work for one launch";
  if (how.shared > 48 << 10) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(how.shared));
    if (status != cudaSuccess) return explain(status);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(how.blocks), static_cast<unsigned>(how.parts));
  config.blockDim = dim3(static_cast<unsigned>(how.threads));
  config.dynamicSmemBytes = how.shared;
  config.stream = static_cast<cudaStream_t>(how.stream);
  return explain(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// --- blocks of pixel columns ----------------------------------------------------------------------------------------

constexpr int kRows = 16;        // image rows that a warp takes of a pixel column
constexpr int kMostColumns = 8;  // adjacent ones of a block, one per warp, so that depth moves in whole sectors

/// A bit for each of the 16 image rows before this one.
__device__ inline unsigned below(int row) { return (1u << min(max(row, 0), kRows)) - 1; }

/// A warp's share of the work on pixel columns, and where a block finds its bins of depth in shared memory.
struct ColumnBlock {
  int bins, height, width, row, first, columns;
  int64_t camera, sample;  // camera counts through the batch

  __device__ ColumnBlock(const PoolPlan& plan, int columns)
      : bins(static_cast<int>(plan.bins)), height(static_cast<int>(plan.height)), width(static_cast<int>(plan.width)), columns(columns) {
    const int across = (width + columns - 1) / columns, slabs = (height + kRows - 1) / kRows, rest = blockIdx.x % (across * slabs);
    camera = blockIdx.x / (across * slabs);
    sample = camera / plan.cameras;
    row = rest / across * kRows;
    first = rest % across * columns;
  }

  static __host__ __device__ int pitch(int64_t bins) { return static_cast<int>(bins) * kRows + 4; }  // of a column: shifted banks
  __device__ float* depth(int column) const { return reinterpret_cast<float*>(shared_memory()) + column * pitch(bins); }
  __device__ int64_t weight(int column) const { return ((camera * width + first + column) * bins) * height + row; }

  /// read(offset in a tensor with these strides) to shared memory for the points of the block, two threads to a pixel.
  template <class Read> __device__ void fill(const DepthStrides& strides, Read read) const {
    each_pixel(strides, [&](int64_t offset, float* values, int d) {
      each_second(d, bins, [&](int bin) { return read(offset + bin * strides.bin); }, [&](int bin, float x) { values[bin * kRows] = x; });
    });
  }

  /// And back: write(offset, value).
  template <class Write> __device__ void drain(const DepthStrides& strides, Write write) const {
    each_pixel(strides, [&](int64_t offset, const float* values, int d) {
#pragma unroll 4
      for (; d < bins; d += 2) write(offset + d * strides.bin, values[d * kRows]);
    });
  }

  /// use(bin, read(bin)) for first, first + 2, ... Reads go out eight at a time, those beyond the last for nothing.
  template <class Read, class Use> static __device__ void each_second(int first, int bins, Read read, Use use) {
    constexpr int kAhead = 8;
    for (; first < bins; first += 2 * kAhead) {
      float x[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) x[i] = read(min(first + 2 * i, bins - 1));
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (first + 2 * i < bins) use(first + 2 * i, x[i]);
      }
    }
  }

 private:
  /// visit(offset of the pixel, its values in shared memory, first bin) for the thread's pixel, if there is such a one.
  template <class Visit> __device__ void each_pixel(const DepthStrides& strides, Visit visit) const {
    const int pixel = threadIdx.x % (kRows * columns), u = pixel % columns, v = pixel / columns;
    if (first + u >= width || row + v >= height) return;
    visit(camera * strides.camera + (row + v) * strides.row + (first + u) * strides.column, depth(u) + v, threadIdx.x / (kRows * columns));
  }
};

/// How many columns a block takes: few where there are few, or where two blocks of many would not fit; 0 if not even one does.
int columns_per_block(const PoolPlan& plan, int64_t batch, size_t bytes_per_column) {
  int device = 0, most = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) return 0;
  const bool many = batch * plan.cameras * plan.width >= 4096 && 2 * kMostColumns * bytes_per_column <= static_cast<size_t>(most);
  int columns = many ? kMostColumns : kMostColumns / 2;
  while (columns && columns * bytes_per_column > static_cast<size_t>(most)) columns /= 2;
  return columns;
}

Launch launch_of(const PoolPlan& plan, int64_t batch, int columns, size_t bytes_per_column, void* stream) {
  const int64_t blocks = batch * plan.cameras * chunks_of(plan.height, kRows) * chunks_of(plan.width, columns);
  return {blocks, 32 * columns, columns * bytes_per_column, stream};
}

constexpr const char* kTooDeep = "a pixel column with so many depth bins does not fit the shared memory of this GPU";

}  // namespace
}  // namespace device
}  // namespace irlvla
