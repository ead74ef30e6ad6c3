// CUDA kernels on the CPU: as much of CUDA as the kernels of voxel pooling use. The threads of a block are fibers that take turns;
// each runs until it has to wait for others. Threads that wait for ever end the program, and so does an access outside of an
// allocation where the address sanitizer looks on.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};

// --- fibers ---------------------------------------------------------------------------------------------------------

namespace emulation {

struct Fiber {
  ucontext_t context;
  dim3 thread;
  bool done;
  unsigned shown;  // slots so far
};

struct Barrier {
  unsigned waiting = 0, generation = 0;
};

/// What lanes show each other.
struct Slot {
  uint32_t words[6];
  const void* address;
};

inline int order = 0;  // in which threads take turns: 0 rising, 1 falling, others random
inline std::vector<Fiber> fibers;
inline std::vector<std::unique_ptr<char[]>> stacks;
inline std::vector<Barrier> warps;
inline std::vector<Slot> slots;
inline Barrier block;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::function<void()> work;
inline std::unique_ptr<char[]> memory;  // exactly as much as was asked for
inline bool progress;

constexpr size_t kStack = 64 << 10;

[[noreturn]] inline void fail(const char* problem) {
  std::fprintf(stderr, "emulation: %s\n", problem);
  std::abort();
}

inline void enter() {
  work();
  current->done = true;
}

inline void wait(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  progress = true;
  if (++barrier.waiting == threads) {
    barrier.waiting = 0, ++barrier.generation;
    return;
  }
  do {
    swapcontext(&current->context, &scheduler);
  } while (barrier.generation == generation);
  progress = true;
}

inline unsigned thread() { return current->thread.x; }
inline unsigned lane() { return thread() % 32; }
inline void meet() { wait(warps[thread() / 32], 32); }
/// What a lane shows. There are two sets in turn: nobody writes to one before all have met again, and so have read it.
inline Slot& slot(unsigned of) { return slots[(thread() / 32 * 32 + of) * 2 + current->shown % 2]; }

/// use() when every lane of the warp has shown its slot.
template <class Use> auto exchange(const Slot& mine, Use use) {
  ++current->shown;
  slot(lane()) = mine;
  meet();
  return use();
}

inline void run_block(unsigned threads) {
  if (threads % 32) fail("blocks are whole warps here");
  while (stacks.size() < threads) stacks.emplace_back(new char[kStack]);
  fibers.resize(threads), slots.resize(2 * threads);
  warps.assign(threads / 32, {}), block = {};
  std::vector<unsigned> turns(threads);
  std::iota(turns.begin(), turns.end(), 0u);
  std::mt19937 random(static_cast<unsigned>(order));
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.thread = dim3(t), fiber.done = false, fiber.shown = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[t].get(), fiber.context.uc_stack.ss_size = kStack, fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned left = threads; left;) {
    if (order == 1) std::reverse(turns.begin(), turns.end());
    if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
    progress = false;
    for (const unsigned t : turns) {
      if (fibers[t].done) continue;
      current = &fibers[t];
      swapcontext(&scheduler, &current->context);
      if (current->done) --left, progress = true;
    }
    if (order == 1) std::reverse(turns.begin(), turns.end());
    if (!progress) fail("threads wait for others that have ended or wait elsewhere");
  }
}

inline char* shared_memory() { return memory.get(); }

}  // namespace emulation

// --- the device -----------------------------------------------------------------------------------------------------

inline dim3 blockIdx;
#define threadIdx (emulation::current->thread)

inline void __syncthreads() { emulation::wait(emulation::block, static_cast<unsigned>(emulation::fibers.size())); }
inline void __syncwarp() { emulation::meet(); }

template <class T> T __shfl_sync(unsigned, T value, int from) {
  static_assert(sizeof(T) <= 4);
  emulation::Slot mine = {};
  std::memcpy(mine.words, &value, sizeof value);
  return emulation::exchange(mine, [&] {
    T other;
    std::memcpy(&other, emulation::slot(static_cast<unsigned>(from) % 32).words, sizeof other);
    return other;
  });
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, static_cast<int>(emulation::lane()) ^ bits);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return emulation::exchange({{vote}, nullptr}, [] {
    unsigned votes = 0;
    for (unsigned l = 0; l < 32; ++l) votes |= emulation::slot(l).words[0] << l;
    return votes;
  });
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  return emulation::exchange({{value}, nullptr}, [] {
    unsigned least = ~0u;
    for (unsigned l = 0; l < 32; ++l) least = std::min(least, emulation::slot(l).words[0]);
    return least;
  });
}

inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = low | static_cast<uint64_t>(high) << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

template <class To, class From> To as_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(uint32_t x) { return as_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return as_bits<uint32_t>(x); }

using std::max;
using std::min;

namespace emulation {

inline float widen_half(uint16_t x) { return as_bits<_Float16>(x); }
inline uint16_t narrow_half(float x) { return as_bits<uint16_t>(static_cast<_Float16>(x)); }
inline float widen_bfloat(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
inline uint16_t narrow_bfloat(float x) {
  const auto bits = as_bits<uint32_t>(x);
  return static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void load_matrices(uint32_t (&to)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("a row of a matrix is not aligned");
  const auto number = [](unsigned matrix, unsigned row, unsigned column) -> uint32_t {
    return static_cast<const uint16_t*>(slot(8 * matrix + row).address)[column];
  };
  exchange({{}, row}, [&] {
    const unsigned a = lane() / 4, b = lane() % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) to[i] = transposed ? number(i, b, a) | number(i, b + 1, a) << 16 : number(i, a, b) | number(i, a, b + 1) << 16;
    return 0;
  });
}

inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, float (*widen)(uint16_t)) {
  const auto half = [&](unsigned lane, unsigned word, unsigned k) { return widen(static_cast<uint16_t>(slot(lane).words[word] >> 16 * (k % 2))); };
  exchange({{a[0], a[1], a[2], a[3], b0, b1}, nullptr}, [&] {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
      for (unsigned k = 0; k < 16; ++k) {
        const float from_a = half(row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k), from_b = half(column * 4 + k % 8 / 2, 4 + k / 8, k);
        sums[i] = std::fma(from_a, from_b, sums[i]);
      }
    }
    return 0;
  });
}

}  // namespace emulation

// --- the runtime ----------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace emulation {
inline std::map<const void*, size_t> allowed;  // shared memory by kernel, beyond the usual 48 KB
constexpr int kMostShared = 227 << 10;
}  // namespace emulation

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = emulation::kMostShared, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > emulation::kMostShared) return cudaErrorInvalidValue;
  return emulation::allowed[kernel] = static_cast<size_t>(bytes), cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const size_t shared = config->dynamicSmemBytes;
  if (config->blockDim.x == 0 || config->blockDim.x > 1024 || config->gridDim.x == 0 || config->gridDim.y == 0) return cudaErrorInvalidValue;
  if (shared > std::max<size_t>(48 << 10, emulation::allowed[reinterpret_cast<const void*>(kernel)])) return cudaErrorInvalidValue;
  emulation::work = [&] { kernel(arguments...); };
  for (blockIdx.y = 0; blockIdx.y < config->gridDim.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) {
      emulation::memory.reset(new char[shared]);
      std::memset(emulation::memory.get(), 0xff, shared);  // NaN: shared memory is not cleared
      emulation::run_block(config->blockDim.x);
    }
  }
  return cudaSuccess;
}
