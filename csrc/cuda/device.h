// SPDX-License-Identifier: Apache-2.0
// What the kernels use of a device. Compiled by nvcc it is CUDA; with FASTLOOP_CUDA_EMULATED the host compiler makes
// the same kernels run on the CPU, thread by thread, so that the tests reach them on machines without a GPU.
#pragma once
#include <cstdint>

#include "core/dtype.h"

#ifdef FASTLOOP_CUDA_EMULATED
#include "cuda/emulate.h"
#define FASTLOOP_DEVICE inline __attribute__((always_inline))
#define FASTLOOP_SHARED static
#define FASTLOOP_KERNEL(blocks) static void
#define FASTLOOP_UNROLL
#define FASTLOOP_PARAMS(...) const __VA_ARGS__&
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTLOOP_DEVICE __device__ __forceinline__
#define FASTLOOP_SHARED __shared__
// So many blocks fit on a multiprocessor at least: it bounds the registers of a thread.
#define FASTLOOP_KERNEL(blocks) __global__ void __launch_bounds__(kThreads, blocks)
#define FASTLOOP_UNROLL _Pragma("unroll")
#define FASTLOOP_PARAMS(...) const __grid_constant__ __VA_ARGS__
#endif

namespace fastloop {
namespace device {

// ---- threads and memory

#ifdef FASTLOOP_CUDA_EMULATED

constexpr int kThreads = 64;

FASTLOOP_DEVICE int thread_index() { return emulation::thread_index(); }
FASTLOOP_DEVICE int block_index() { return emulation::block_index(); }
FASTLOOP_DEVICE int block_count() { return emulation::block_count(); }
FASTLOOP_DEVICE void sync_block() { emulation::sync_block(); }
FASTLOOP_DEVICE void fence() {}
template <class T>
FASTLOOP_DEVICE T* global(T* pointer) {
  return pointer;
}
FASTLOOP_DEVICE unsigned take_ticket(unsigned* counter, unsigned last) {
  const unsigned ticket = *counter;
  *counter = ticket == last ? 0 : ticket + 1;
  return ticket;
}

#else

constexpr int kThreads = 128;

FASTLOOP_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTLOOP_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FASTLOOP_DEVICE int block_count() { return static_cast<int>(gridDim.x); }
FASTLOOP_DEVICE void sync_block() { __syncthreads(); }
FASTLOOP_DEVICE void fence() { __threadfence(); }
// What the table points to is global memory: said so at each access, it need not look which memory it is (LDG, not LD).
template <class T>
FASTLOOP_DEVICE T* global(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}
// 0, 1, ..., last, and then from 0 again: the counter is ready for the next launch.
FASTLOOP_DEVICE unsigned take_ticket(unsigned* counter, unsigned last) { return atomicInc(counter, last); }

#endif

// Whether the flag is set in any thread of the block.
FASTLOOP_DEVICE bool any_thread(bool flag) {
#ifdef FASTLOOP_CUDA_EMULATED
  static int count;
  if (thread_index() == 0) count = 0;
  sync_block();
  count += flag ? 1 : 0;
  sync_block();
  const bool any = count > 0;
  sync_block();
  return any;
#else
  return __syncthreads_or(flag) != 0;
#endif
}

// Sums of two numbers over the block, in one order; the same in every thread.
struct Pair {
  double a, b;
};

FASTLOOP_DEVICE Pair block_sum(Pair mine) {
  FASTLOOP_SHARED double a[kThreads];
  FASTLOOP_SHARED double b[kThreads];
  const int t = thread_index();
  a[t] = mine.a;
  b[t] = mine.b;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    sync_block();
    if (t < half) {
      a[t] += a[t + half];
      b[t] += b[t + half];
    }
  }
  sync_block();
  const Pair total = {a[0], b[0]};
  sync_block();
  return total;
}

// ---- storage types

struct BF16 {
  std::uint16_t bits;
};
struct F16 {
  std::uint16_t bits;
};

FASTLOOP_DEVICE float widen(float v) { return v; }
FASTLOOP_DEVICE double widen(double v) { return v; }
FASTLOOP_DEVICE void narrow(float* to, float v) { *to = v; }
FASTLOOP_DEVICE void narrow(double* to, double v) { *to = v; }

#ifdef FASTLOOP_CUDA_EMULATED

FASTLOOP_DEVICE float widen(BF16 v) { return emulation::bf16_to_float(v.bits); }
FASTLOOP_DEVICE float widen(F16 v) { return emulation::f16_to_float(v.bits); }
FASTLOOP_DEVICE void narrow(BF16* to, float v) { to->bits = emulation::float_to_bf16(v); }
FASTLOOP_DEVICE void narrow(F16* to, float v) { to->bits = emulation::float_to_f16(v); }

#else

FASTLOOP_DEVICE float widen(BF16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
FASTLOOP_DEVICE float widen(F16 v) { return __half2float(__ushort_as_half(v.bits)); }
FASTLOOP_DEVICE void narrow(BF16* to, float v) { to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(v)); }
FASTLOOP_DEVICE void narrow(F16* to, float v) { to->bits = __half_as_ushort(__float2half_rn(v)); }

#endif

// Sixteen bytes of a storage type: one 128-bit access.
template <class S>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(S);
  S value[kCount];
};

FASTLOOP_DEVICE bool is_aligned(const void* pointer) { return (reinterpret_cast<std::uintptr_t>(pointer) & 15) == 0; }

// kLanes neighbouring elements; `from` and `to` are aligned to 16 bytes.
template <int kLanes, class T, class S>
FASTLOOP_DEVICE void load_lanes(T (&lanes)[kLanes], const S* from) {
  constexpr int kCount = Pack<S>::kCount;
  static_assert(kLanes % kCount == 0, "whole 16-byte accesses");
  FASTLOOP_UNROLL
  for (int k = 0; k < kLanes / kCount; ++k) {
    const Pack<S> pack = global(reinterpret_cast<const Pack<S>*>(from))[k];
    FASTLOOP_UNROLL
    for (int e = 0; e < kCount; ++e) lanes[k * kCount + e] = widen(pack.value[e]);
  }
}

template <int kLanes, class T, class S>
FASTLOOP_DEVICE void store_lanes(S* to, const T (&lanes)[kLanes]) {
  constexpr int kCount = Pack<S>::kCount;
  static_assert(kLanes % kCount == 0, "whole 16-byte accesses");
  FASTLOOP_UNROLL
  for (int k = 0; k < kLanes / kCount; ++k) {
    Pack<S> pack;
    FASTLOOP_UNROLL
    for (int e = 0; e < kCount; ++e) narrow(&pack.value[e], lanes[k * kCount + e]);
    global(reinterpret_cast<Pack<S>*>(to))[k] = pack;
  }
}

// ---- what rules are written with

FASTLOOP_DEVICE float sqrt(float v) { return ::sqrtf(v); }
FASTLOOP_DEVICE double sqrt(double v) { return ::sqrt(v); }
// a * b, rounded by itself: which of two products is fused with their sum is not left to the compiler.
#ifdef FASTLOOP_CUDA_EMULATED
FASTLOOP_DEVICE float product(float a, float b) {
  volatile float p = a * b;
  return p;
}
FASTLOOP_DEVICE double product(double a, double b) {
  volatile double p = a * b;
  return p;
}
#else
FASTLOOP_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
FASTLOOP_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
#endif
// NaN wins, as torch.maximum.
FASTLOOP_DEVICE float max(float a, float b) { return b > a || b != b ? b : a; }
FASTLOOP_DEVICE double max(double a, double b) { return b > a || b != b ? b : a; }

FASTLOOP_DEVICE bool is_finite(double v) { return v - v == 0; }

// Bounded to [-limit, limit]; NaN stays NaN, as torch.clamp.
template <class T>
FASTLOOP_DEVICE T clamp(T v, T limit) {
  v = v > limit ? limit : v;
  return v < -limit ? -limit : v;
}

}  // namespace device
}  // namespace fastloop
