// SPDX-License-Identifier: Apache-2.0
// Vectors of the compute types and the storage types' way in and out of them.
//
// The compiler's own vector types carry the arithmetic, so the loops and rules above read as scalar code and need no
// luck with auto-vectorization; intrinsics appear only for what the language cannot say (sqrt, fp16). Included once per
// instruction set, inside that set's namespace.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fastloop {
namespace FASTLOOP_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define FASTLOOP_INLINE inline __attribute__((always_inline))

template <class T, int kLanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * kLanes)));
};
template <class T, int kLanes>
using Vector = typename VectorOf<T, kLanes>::type;

template <class T>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using Full = Vector<T, kLanesOf<T>>;

// Storage types by name; 16-bit floats are kept as their bits.
struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

template <class To, class From>
FASTLOOP_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast between types of different size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class P>
FASTLOOP_INLINE V load_bytes(const P* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// ---- compute type -> compute type

FASTLOOP_INLINE Full<float> load(const float* from) { return load_bytes<Full<float>>(from); }
FASTLOOP_INLINE Full<double> load(const double* from) { return load_bytes<Full<double>>(from); }
FASTLOOP_INLINE void store(float* to, Full<float> v) { std::memcpy(to, &v, sizeof v); }
FASTLOOP_INLINE void store(double* to, Full<double> v) { std::memcpy(to, &v, sizeof v); }

// ---- 16-bit floats <-> fp32

constexpr int kF32Lanes = kLanesOf<float>;
using F32 = Full<float>;
using U32 = Full<std::uint32_t>;
using U16 = Vector<std::uint16_t, kF32Lanes>;

// gcc 12 converts half a register at a time where one instruction widens it all.
FASTLOOP_INLINE U32 widen(U16 v) {
#if defined(__AVX512F__)
  return bit_cast<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return bit_cast<U32>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, U32);
#endif
}

FASTLOOP_INLINE F32 load(const BF16* from) { return bit_cast<F32>(widen(load_bytes<U16>(from)) << 16); }

FASTLOOP_INLINE U16 narrow(U32 v) {
#if defined(__AVX512F__)
  return bit_cast<U16>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(v)));
#elif defined(__AVX2__)
  // gcc 12 scalarizes the conversion of eight lanes; the values fit, so the saturating pack is exact.
  const __m256i packed = _mm256_packus_epi32(bit_cast<__m256i>(v), _mm256_setzero_si256());
  return bit_cast<U16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(v, U16);
#endif
}

// Round to nearest even, in the upper half of each lane; the lower half is left over. For numbers, infinities, and NaNs
// without a payload in the lower half: the addition would carry a payload of all ones into the sign.
FASTLOOP_INLINE U32 round_number_to_bf16(F32 v) {
#if defined(__AVX512F__)
  // Two masked additions instead of shift, and, add: the three stores of a bf16 step are what bounds it (bench: bf16).
  const __m512i bits = bit_cast<__m512i>(v);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return bit_cast<U32>(_mm512_mask_add_epi32(up, odd, bits, _mm512_set1_epi32(0x8000)));
#else
  const U32 u = bit_cast<U32>(v);
  return u + (0x7fffu + ((u >> 16) & 1u));
#endif
}

// The same for every NaN: made quiet, it keeps its upper half.
FASTLOOP_INLINE U32 round_to_bf16(F32 v) { return v != v ? (bit_cast<U32>(v) | 0x400000u) : round_number_to_bf16(v); }

FASTLOOP_INLINE void store_upper_halves(BF16* to, U32 rounded) {
#if defined(__AVX512F__)
  // One permutation takes the upper halves: a shift and a narrowing would be three operations.
  const __m512i upper = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17,
                                         15, 13, 11, 9, 7, 5, 3, 1);
  const __m512i halves = _mm512_maskz_permutexvar_epi16(0xffffffff, upper, bit_cast<__m512i>(rounded));
  std::memcpy(to, &halves, sizeof(U16));
#else
  const U16 bits = narrow(rounded >> 16);
  std::memcpy(to, &bits, sizeof bits);
#endif
}

FASTLOOP_INLINE void store(BF16* to, F32 v) { store_upper_halves(to, round_to_bf16(v)); }

#if defined(__AVX512F__)  // maskz: gcc 12 warns of its own undefined merge source
FASTLOOP_INLINE F32 load(const F16* from) {
  return bit_cast<F32>(_mm512_maskz_cvtph_ps(0xffff, load_bytes<__m256i>(from)));
}
FASTLOOP_INLINE void store(F16* to, F32 v) {
  const __m256i bits = _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof bits);
}
#elif defined(__F16C__)
FASTLOOP_INLINE F32 load(const F16* from) { return bit_cast<F32>(_mm256_cvtph_ps(load_bytes<__m128i>(from))); }
FASTLOOP_INLINE void store(F16* to, F32 v) {
  const __m128i bits = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &bits, sizeof bits);
}
#elif defined(__aarch64__)
FASTLOOP_INLINE F32 load(const F16* from) { return bit_cast<F32>(vcvt_f32_f16(load_bytes<float16x4_t>(from))); }
FASTLOOP_INLINE void store(F16* to, F32 v) {
  const float16x4_t bits = vcvt_f16_f32(bit_cast<float32x4_t>(v));
  std::memcpy(to, &bits, sizeof bits);
}
#else
// No conversion instruction: the exponent is moved by integer shifts and rebiased by one exact multiplication, which
// turns subnormal halves into normal floats on the way.
FASTLOOP_INLINE F32 load(const F16* from) {
  const U32 h = widen(load_bytes<U16>(from));
  const F32 magnitude = bit_cast<F32>((h & 0x7fffu) << 13) * 0x1p112f;
  const U32 special = magnitude >= 65536.0f ? U32{} + 0x7f800000u : U32{};  // inf and NaN keep all exponent bits
  return bit_cast<F32>(bit_cast<U32>(magnitude) | special | ((h & 0x8000u) << 16));
}
FASTLOOP_INLINE void store(F16* to, F32 v) {
  const U32 u = bit_cast<U32>(v);
  const U32 a = u & 0x7fffffffu;
  const U32 normal = (a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // 0.5f has the unit of a subnormal half (2^-24) in its last place, so the addition rounds as the format would.
  const U32 subnormal = bit_cast<U32>(bit_cast<F32>(a) + 0.5f) - 0x3f000000u;
  const U32 special = a > 0x7f800000u ? U32{} + 0x7e00u : U32{} + 0x7c00u;
  const U32 finite = a < 0x38800000u ? subnormal : normal;
  const U16 bits = narrow((a >= 0x47800000u ? special : finite) | ((u >> 16) & 0x8000u));
  std::memcpy(to, &bits, sizeof bits);
}
#endif

// Stores what was computed from 16-bit floats alone: its NaNs, if any, have the payload of one of them.
template <class H, class V>
FASTLOOP_INLINE void store_from_16bit(H* to, V v) {
  if constexpr (std::is_same_v<H, BF16>) {
    store_upper_halves(to, round_number_to_bf16(v));
  } else {
    store(to, v);
  }
}

// ---- functions that rules and loops use

FASTLOOP_INLINE Full<float> sqrt(Full<float> v) {
#if defined(__AVX512F__)
  return bit_cast<F32>(_mm512_maskz_sqrt_ps(0xffff, bit_cast<__m512>(v)));
#elif defined(__AVX2__)
  return bit_cast<F32>(_mm256_sqrt_ps(bit_cast<__m256>(v)));
#elif defined(__x86_64__)
  return bit_cast<F32>(_mm_sqrt_ps(bit_cast<__m128>(v)));
#elif defined(__aarch64__)
  return bit_cast<F32>(vsqrtq_f32(bit_cast<float32x4_t>(v)));
#else
  for (int i = 0; i < kF32Lanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

FASTLOOP_INLINE Full<double> sqrt(Full<double> v) {
#if defined(__AVX512F__)
  return bit_cast<Full<double>>(_mm512_maskz_sqrt_pd(0xff, bit_cast<__m512d>(v)));
#elif defined(__AVX2__)
  return bit_cast<Full<double>>(_mm256_sqrt_pd(bit_cast<__m256d>(v)));
#elif defined(__x86_64__)
  return bit_cast<Full<double>>(_mm_sqrt_pd(bit_cast<__m128d>(v)));
#elif defined(__aarch64__)
  return bit_cast<Full<double>>(vsqrtq_f64(bit_cast<float64x2_t>(v)));
#else
  for (int i = 0; i < kLanesOf<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// a * b, rounded by itself. In a sum of two products the compiler may fuse either one with the addition, and it does
// not choose alike in every copy of a loop: an element's bits would depend on its place in the tensor.
template <class V>
FASTLOOP_INLINE V product(V a, V b) {
  V p = a * b;
#if defined(__x86_64__)
  asm("" : "+v"(p));
#elif defined(__aarch64__)
  asm("" : "+w"(p));
#endif
  return p;
}

// The larger one; NaN if either is NaN, as torch.maximum.
template <class V>
FASTLOOP_INLINE V max(V a, V b) {
  return (b > a) | (b != b) ? b : a;
}

// Bounded to [-limit, limit]; NaN stays NaN, as torch.clamp.
template <class V, class T>
FASTLOOP_INLINE V clamp(V v, T limit) {
  const V high = V{} + limit;
  v = v > high ? high : v;
  return v < -high ? -high : v;
}

template <class V>
FASTLOOP_INLINE V abs(V v) {
  return v < 0 ? -v : v;
}

}  // namespace FASTLOOP_ISA
}  // namespace fastloop
