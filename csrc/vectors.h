// Vectors of float32, as wide as the instruction set has them, and how they are read and written as other numbers.
// For kernels that are compiled once per instruction set: everything here is theirs alone.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace irlvla {
namespace IRLVLA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Shorts __attribute__((vector_size(2 * kLanes)));

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

#define IRLVLA_INLINE inline __attribute__((always_inline))

template <class To, class From> IRLVLA_INLINE To as(From value) { return reinterpret_cast<To>(value); }

// Vectors in memory. The compiler copies 64 bytes in halves unless told otherwise.
IRLVLA_INLINE Floats load(const float* from) {
#if defined(__AVX512F__)
  return _mm512_loadu_ps(from);
#else
  Floats value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
#endif
}

IRLVLA_INLINE void store(float* to, Floats value) {
#if defined(__AVX512F__)
  _mm512_storeu_ps(to, value);
#else
  __builtin_memcpy(to, &value, sizeof value);
#endif
}

/// Past the caches; `to` is aligned to vectors.
IRLVLA_INLINE void stream(float* to, Floats value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, value);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, value);
#elif defined(__SSE2__)
  _mm_stream_ps(to, value);
#else
  store(to, value);
#endif
}

/// What was streamed is there for other threads.
IRLVLA_INLINE void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

IRLVLA_INLINE Shorts load_shorts(const void* from) {
  Shorts value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

IRLVLA_INLINE void store_shorts(void* to, Shorts value) { __builtin_memcpy(to, &value, sizeof value); }

IRLVLA_INLINE void stream_shorts(void* to, Shorts value) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(to), as<__m256i>(value));
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(to), as<__m128i>(value));
#else
  store_shorts(to, value);
#endif
}

IRLVLA_INLINE Ints widen(Shorts value) {
#if defined(__AVX512F__)
  return as<Ints>(_mm512_maskz_cvtepu16_epi32(__mmask16{0xffff}, as<__m256i>(value)));
#elif defined(__AVX2__)
  return as<Ints>(_mm256_cvtepu16_epi32(as<__m128i>(value)));
#else
  return __builtin_convertvector(value, Ints);
#endif
}

IRLVLA_INLINE Shorts narrow(Ints value) {  // the lower halves
#if defined(__AVX512F__)
  return as<Shorts>(_mm512_maskz_cvtepi32_epi16(__mmask16{0xffff}, as<__m512i>(value)));
#elif defined(__AVX2__)
  const __m256i lower = as<__m256i>(value & 0xffff), packed = _mm256_packus_epi32(lower, lower);
  return as<Shorts>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#else
  return __builtin_convertvector(value, Shorts);
#endif
}

// bfloat16 is the upper half of a float32.
IRLVLA_INLINE Floats load(const Bfloat* from) { return as<Floats>(widen(load_shorts(from)) << 16); }

IRLVLA_INLINE Shorts bfloats(Floats value) {  // to nearest, ties to even
  const Ints bits = as<Ints>(value), nan = value != value;
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow((~nan & rounded) | (nan & 0x7fc0));
}

#if defined(__AVX512F__)

IRLVLA_INLINE Floats load(const Half* from) { return _mm512_maskz_cvtph_ps(__mmask16{0xffff}, as<__m256i>(load_shorts(from))); }
IRLVLA_INLINE Shorts halves(Floats value) { return as<Shorts>(_mm512_maskz_cvtps_ph(__mmask16{0xffff}, value, _MM_FROUND_TO_NEAREST_INT)); }

#elif defined(__AVX2__)

IRLVLA_INLINE Floats load(const Half* from) { return _mm256_cvtph_ps(as<__m128i>(load_shorts(from))); }
IRLVLA_INLINE Shorts halves(Floats value) { return as<Shorts>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)); }

#else

// The exponent is moved by a multiplication, which makes subnormal numbers normal.
IRLVLA_INLINE Floats load(const Half* from) {
  const Ints h = widen(load_shorts(from)), magnitude = (h & 0x7fff) << 13;
  const Floats scaled = as<Floats>(magnitude) * 0x1p112f;
  const Ints infinite = (magnitude >= (0x7c00 << 13)) & 0x7f800000;  // or NaN
  return as<Floats>(as<Ints>(scaled) | infinite | (h & 0x8000) << 16);
}

IRLVLA_INLINE Shorts halves(Floats value) {  // to nearest, ties to even
  const Ints bits = as<Ints>(value), magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  const Ints nan = magnitude > 0x7f800000, huge = magnitude >= 0x477ff000, tiny = magnitude < 0x38800000;
  const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves a subnormal half in the last bits, rounded as the addition rounds.
  const Ints subnormal = as<Ints>(as<Floats>(magnitude & tiny) + 0.5f) - 0x3f000000;
  const Ints finite = (tiny & subnormal) | (~tiny & normal), special = 0x7c00 | (nan & 0x200);
  return narrow(sign | (huge & special) | (~huge & finite));
}

#endif

IRLVLA_INLINE void store(Half* to, Floats value) { store_shorts(to, halves(value)); }
IRLVLA_INLINE void store(Bfloat* to, Floats value) { store_shorts(to, bfloats(value)); }
IRLVLA_INLINE void stream(Half* to, Floats value) { stream_shorts(to, halves(value)); }
IRLVLA_INLINE void stream(Bfloat* to, Floats value) { stream_shorts(to, bfloats(value)); }

IRLVLA_INLINE Floats splat(float value) { return value - Floats{}; }

// --- four at a time -------------------------------------------------------------------------------------------------

typedef float Quad __attribute__((vector_size(16)));

/// Sums of every fourth lane.
IRLVLA_INLINE Quad fold(Floats value) {
#if defined(__AVX512F__)
  const auto eight = __builtin_shufflevector(value, value, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(value, value, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  const auto eight = value;
#endif
#if defined(__AVX2__)
  return __builtin_shufflevector(eight, eight, 0, 1, 2, 3) + __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
#else
  return value;
#endif
}

/// Of every four lanes of a and b, the same: 0 to 3 are those of a, 4 to 7 those of b.
template <int k0, int k1, int k2, int k3> IRLVLA_INLINE Quad pick(Quad a, Quad b) { return __builtin_shufflevector(a, b, k0, k1, k2, k3); }

#if defined(__AVX2__)
template <int k0, int k1, int k2, int k3> IRLVLA_INLINE Floats pick(Floats a, Floats b) {
#define IRLVLA_LANE(k, quad) (k % 4 + k / 4 * kLanes + quad * 4)
#define IRLVLA_LANES(quad) IRLVLA_LANE(k0, quad), IRLVLA_LANE(k1, quad), IRLVLA_LANE(k2, quad), IRLVLA_LANE(k3, quad)
#if defined(__AVX512F__)
  return __builtin_shufflevector(a, b, IRLVLA_LANES(0), IRLVLA_LANES(1), IRLVLA_LANES(2), IRLVLA_LANES(3));
#else
  return __builtin_shufflevector(a, b, IRLVLA_LANES(0), IRLVLA_LANES(1));
#endif
}
#endif

/// Quads that lie `stride` apart, as one vector.
template <class Vector> IRLVLA_INLINE Vector load_quads(const float* from, int64_t stride) {
  const auto quad = [&](int64_t i) {
    Quad value;
    __builtin_memcpy(&value, from + i * stride, sizeof value);
    return value;
  };
#if defined(__AVX2__)
  const auto eight = [&](int64_t i) { return __builtin_shufflevector(quad(i), quad(i + 1), 0, 1, 2, 3, 4, 5, 6, 7); };
#endif
#if defined(__AVX512F__)
  if constexpr (sizeof(Vector) == 64) return __builtin_shufflevector(eight(0), eight(2), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  if constexpr (sizeof(Vector) == 32) return eight(0);
#endif
  if constexpr (sizeof(Vector) == 16) return quad(0);
}

template <class Vector> IRLVLA_INLINE void store_quads(float* to, int64_t stride, Vector value) {
  constexpr int kQuads = sizeof(Vector) / sizeof(Quad);
  Quad quads[kQuads];
  __builtin_memcpy(quads, &value, sizeof value);
  for (int i = 0; i < kQuads; ++i) __builtin_memcpy(to + i * stride, &quads[i], sizeof(Quad));
}

/// Every four lanes of four vectors are a matrix of their own.
template <class Vector> IRLVLA_INLINE void transpose(Vector (&v)[4]) {
  const Vector low = pick<0, 4, 1, 5>(v[0], v[1]), high = pick<2, 6, 3, 7>(v[0], v[1]);
  const Vector low2 = pick<0, 4, 1, 5>(v[2], v[3]), high2 = pick<2, 6, 3, 7>(v[2], v[3]);
  v[0] = pick<0, 1, 4, 5>(low, low2), v[1] = pick<2, 3, 6, 7>(low, low2);
  v[2] = pick<0, 1, 4, 5>(high, high2), v[3] = pick<2, 3, 6, 7>(high, high2);
}

}  // namespace
}  // namespace IRLVLA_ISA
}  // namespace irlvla
