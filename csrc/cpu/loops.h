// SPDX-License-Identifier: Apache-2.0
// The loops over one chunk, generic over rule and storage types. Compiled once per instruction set: see isa_*.cpp.
#pragma once
#define FASTLOOP_RULE_NAMESPACE FASTLOOP_ISA
#include <limits>

#include "core/kernels.h"
#include "cpu/simd.h"
#include "rules/adam.h"
#include "rules/registry.h"
#include "rules/sgd.h"

namespace fastloop {
namespace FASTLOOP_ISA {

template <class T>
FASTLOOP_INLINE T* at(void* slot, std::int64_t i) {
  return static_cast<T*>(slot) + i;
}

// A storage type's value as the reader of the stored bits will see it.
FASTLOOP_INLINE F32 as_stored(F32 v, const float*) { return v; }
FASTLOOP_INLINE Full<double> as_stored(Full<double> v, const double*) { return v; }
FASTLOOP_INLINE F32 as_stored(F32 v, const BF16*) { return bit_cast<F32>(round_to_bf16(v) & 0xffff0000u); }
FASTLOOP_INLINE F32 as_stored(F32 v, const F16*) {
  F16 bits[kF32Lanes];
  store(bits, v);
  return load(bits);
}

// ---- pass 2

template <class Rule, class P, class G, class S, bool kHasMaster, bool kHasEma>
struct Update {
  using T = typename Rule::Compute;
  using V = Full<T>;
  static constexpr int kLanes = kLanesOf<T>;

  struct Scalars {
    Rule rule;
    T grad_factor, clip_value, ema_decay, ema_weight;
    bool clip_by_value, zero_grads;
  };

  // Every input that reaches a bf16 output is a bf16 itself.
  static constexpr bool kAllBF16 =
      std::is_same_v<P, BF16> && std::is_same_v<G, BF16> && std::is_same_v<S, BF16> && !kHasMaster;

  template <class H>
  static FASTLOOP_INLINE void put(H* to, V v) {
    if constexpr (kAllBF16) {
      store_from_16bit(to, v);
    } else {
      store(to, v);
    }
  }

  // slot points at the first of kLanes elements.
  static FASTLOOP_INLINE void vector(void* const* slot, std::int64_t i, const Scalars& c) {
    V p = kHasMaster ? load(at<T>(slot[kMaster], i)) : load(at<P>(slot[kParam], i));
    V g = product(load(at<G>(slot[kGrad], i)), V{} + c.grad_factor);
    if (c.clip_by_value) g = clamp(g, c.clip_value);
    V s[Rule::kStates + 1];
    for (int k = 0; k < Rule::kStates; ++k) s[k] = load(at<S>(slot[kState + k], i));

    c.rule.step(p, g, s);

    for (int k = 0; k < Rule::kStates; ++k) put(at<S>(slot[kState + k], i), s[k]);
    if constexpr (kHasMaster) store(at<T>(slot[kMaster], i), p);
    put(at<P>(slot[kParam], i), p);
    if constexpr (kHasEma) {  // of the master copy where there is one, else of the parameter as it is stored
      if constexpr (!kHasMaster) p = as_stored(p, static_cast<const P*>(nullptr));
      T* ema = at<T>(slot[kEma], i);
      store(ema, c.ema_decay * load(ema) + product(V{} + c.ema_weight, p));
    }
    if (c.zero_grads) std::memset(at<G>(slot[kGrad], i), 0, sizeof(G) * kLanes);
  }

  // Elements behind the last whole vector pass through buffers, so that every element sees the same instructions.
  static __attribute__((noinline)) void tail(void* const* slot, std::int64_t first, std::int64_t count,
                                             const Scalars& c) {
    alignas(kVectorBytes) unsigned char buffer[kSlots][kLanes * sizeof(T)] = {};
    void* padded[kSlots] = {};
    auto copy = [&](int k, std::size_t size, bool in) {
      if (slot[k] == nullptr) return;
      unsigned char* outside = static_cast<unsigned char*>(slot[k]) + static_cast<std::size_t>(first) * size;
      padded[k] = buffer[k];
      const std::size_t bytes = static_cast<std::size_t>(count) * size;
      if (in) {
        std::memcpy(buffer[k], outside, bytes);
      } else {
        std::memcpy(outside, buffer[k], bytes);
      }
    };
    auto copy_all = [&](bool in) {
      copy(kParam, sizeof(P), in);
      if (in || c.zero_grads) copy(kGrad, sizeof(G), in);
      if constexpr (kHasMaster) copy(kMaster, sizeof(T), in);
      if constexpr (kHasEma) copy(kEma, sizeof(T), in);
      for (int k = 0; k < Rule::kStates; ++k) copy(kState + k, sizeof(S), in);
    };
    copy_all(true);
    vector(padded, 0, c);
    copy_all(false);
  }

  static void run(const UpdateArgs& a) {
    Scalars c;
    std::memcpy(&c.rule, a.rule, sizeof c.rule);
    c.grad_factor = static_cast<T>(a.grad_factor);
    c.clip_value = static_cast<T>(a.clip_value);
    c.ema_decay = static_cast<T>(a.ema_decay);
    c.ema_weight = static_cast<T>(1.0 - a.ema_decay);
    c.clip_by_value = a.clip_value < std::numeric_limits<double>::infinity();
    c.zero_grads = a.zero_grads;
    void* slot[kSlots];
    std::memcpy(slot, a.slot, sizeof slot);
    std::int64_t i = 0;
    for (; i + kLanes <= a.count; i += kLanes) vector(slot, i, c);
    if (i < a.count) tail(slot, i, a.count - i, c);
  }
};

// ---- pass 1

// Sixteen double sums, whatever the vector width, added in one order: the norm is bitwise the same for every
// instruction set. Squares of fp32 and narrower are exact in double, so neither fused multiply-add nor overflow
// can make a difference. Sixteen is two 512-bit registers: enough to hide the add at memory speed.
constexpr int kSums = 16;
constexpr int kDoubleLanes = kLanesOf<double>;
constexpr int kSumVectors = kSums / kDoubleLanes;
using F64 = Full<double>;

struct Sums {
  F64 sum[kSumVectors];
};

template <NormKind kKind>
FASTLOOP_INLINE F64 accumulate(F64 sum, F64 g) {
  if constexpr (kKind == NormKind::kL2) return sum + g * g;
  if constexpr (kKind == NormKind::kL1) return sum + abs(g);
  if constexpr (kKind == NormKind::kInf) return max(sum, abs(g));
}

FASTLOOP_INLINE F64 load_doubles(const double* from) { return load(from); }
FASTLOOP_INLINE F64 load_doubles(const float* from) {
  return __builtin_convertvector((load_bytes<Vector<float, kDoubleLanes>>(from)), F64);
}
template <class H>  // BF16, F16: through one register of fp32
FASTLOOP_INLINE void load_doubles(const H* from, F64* low, F64* high) {
  const F32 v = load(from);
  Vector<float, kDoubleLanes> half[2];
  static_assert(sizeof half == sizeof v, "two halves");
  std::memcpy(half, &v, sizeof v);
  *low = __builtin_convertvector(half[0], F64);
  *high = __builtin_convertvector(half[1], F64);
}

template <NormKind kKind, class G>
FASTLOOP_INLINE void accumulate16(Sums& s, const G* g) {
  if constexpr (sizeof(G) == 2) {
    for (int k = 0; k < kSumVectors; k += 2) {
      F64 low, high;
      load_doubles(g + k * kDoubleLanes, &low, &high);
      s.sum[k] = accumulate<kKind>(s.sum[k], low);
      s.sum[k + 1] = accumulate<kKind>(s.sum[k + 1], high);
    }
  } else {
    for (int k = 0; k < kSumVectors; ++k) {
      s.sum[k] = accumulate<kKind>(s.sum[k], load_doubles(g + k * kDoubleLanes));
    }
  }
}

template <NormKind kKind, class G>
double norm(const void* grad, std::int64_t count) {
  const G* g = static_cast<const G*>(grad);
  Sums s = {};
  std::int64_t i = 0;
  for (; i + kSums <= count; i += kSums) accumulate16<kKind>(s, g + i);
  if (i < count) {
    G rest[kSums] = {};  // zeros change none of the three norms
    std::memcpy(rest, g + i, static_cast<std::size_t>(count - i) * sizeof(G));
    accumulate16<kKind>(s, rest);
  }
  double lane[kSums];
  std::memcpy(lane, s.sum, sizeof lane);
  for (int width = kSums / 2; width > 0; width /= 2) {
    for (int k = 0; k < width; ++k) {
      if constexpr (kKind == NormKind::kInf) {
        const double a = lane[k], b = lane[k + width];
        lane[k] = (b > a || b != b) ? b : a;
      } else {
        lane[k] += lane[k + width];
      }
    }
  }
  return lane[0];
}

// ---- gradients changed in place: g = clamp(g * factor)

template <class T, class G>
FASTLOOP_INLINE void scale_vector(G* g, T factor, T clip_value) {
  store(g, clamp(load(g) * factor, clip_value));
}

template <class T, class G>
void scale(void* grad, std::int64_t count, double factor, double clip_value) {
  constexpr int kLanes = kLanesOf<T>;
  G* g = static_cast<G*>(grad);
  const T f = static_cast<T>(factor), c = static_cast<T>(clip_value);
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) scale_vector(g + i, f, c);
  if (i < count) {
    const std::size_t bytes = static_cast<std::size_t>(count - i) * sizeof(G);
    G rest[kLanes] = {};
    std::memcpy(rest, g + i, bytes);
    scale_vector(rest, f, c);
    std::memcpy(g + i, rest, bytes);
  }
}

// ---- the memory ceiling: w = w + tiny * (sum of all streams)

template <int kReads, int kWrites>
double stream_of(const float* const* reads, float* const* writes, std::int64_t count) {
  F32 kept = {};
  for (std::int64_t i = 0; i + kF32Lanes <= count; i += kF32Lanes) {
    F32 sum = {};
    F32 w[kWrites + 1];
    for (int k = 0; k < kReads; ++k) sum += load(reads[k] + i);
    for (int k = 0; k < kWrites; ++k) sum += w[k] = load(writes[k] + i);
    if constexpr (kWrites == 0) kept += sum;
    for (int k = 0; k < kWrites; ++k) store(writes[k] + i, w[k] + 0x1p-60f * sum);
  }
  return static_cast<double>(kept[0]);
}

constexpr int kMaxStreams = 4;  // of each kind

template <int kReads>
double stream_writes(const float* const* reads, float* const* writes, int n_writes, std::int64_t count) {
  switch (n_writes) {
    case 0:
      return stream_of<kReads, 0>(reads, writes, count);
    case 1:
      return stream_of<kReads, 1>(reads, writes, count);
    case 2:
      return stream_of<kReads, 2>(reads, writes, count);
    case 3:
      return stream_of<kReads, 3>(reads, writes, count);
    default:
      return stream_of<kReads, 4>(reads, writes, count);
  }
}

inline double stream(const float* const* reads, int n_reads, float* const* writes, int n_writes, std::int64_t count) {
  switch (n_reads) {
    case 0:
      return stream_writes<0>(reads, writes, n_writes, count);
    case 1:
      return stream_writes<1>(reads, writes, n_writes, count);
    case 2:
      return stream_writes<2>(reads, writes, n_writes, count);
    case 3:
      return stream_writes<3>(reads, writes, n_writes, count);
    default:
      return stream_writes<4>(reads, writes, n_writes, count);
  }
}

// ---- from storage to kernel

template <class Rule, class P, class G>
UpdateFn select_state(const Storage& s) {
  if (s.master) {
    if constexpr (sizeof(P) == 2) {
      if (s.state == DType::kF32) {
        return s.ema ? &Update<Rule, P, G, float, true, true>::run : &Update<Rule, P, G, float, true, false>::run;
      }
    }
    return nullptr;
  }
  if (s.state == DType::kF32) {
    return s.ema ? &Update<Rule, P, G, float, false, true>::run : &Update<Rule, P, G, float, false, false>::run;
  }
  if (s.state == DType::kBF16) {
    return s.ema ? &Update<Rule, P, G, BF16, false, true>::run : &Update<Rule, P, G, BF16, false, false>::run;
  }
  return nullptr;
}

template <class Rule>
UpdateFn select_update(const Storage& s) {
  if constexpr (std::is_same_v<typename Rule::Compute, double>) {
    const bool served = s.grad == DType::kF64 && s.state == DType::kF64 && !s.master;
    if (!served) return nullptr;
    return s.ema ? &Update<Rule, double, double, double, false, true>::run
                 : &Update<Rule, double, double, double, false, false>::run;
  } else {
    if (s.param == DType::kF32) {
      if (s.grad == DType::kF32) return select_state<Rule, float, float>(s);
      if (s.grad == DType::kBF16) return select_state<Rule, float, BF16>(s);
      if (s.grad == DType::kF16) return select_state<Rule, float, F16>(s);
    }
    if (s.param == DType::kBF16) {
      if (s.grad == DType::kBF16) return select_state<Rule, BF16, BF16>(s);
      if (s.grad == DType::kF32) return select_state<Rule, BF16, float>(s);
    }
    if (s.param == DType::kF16) {
      if (s.grad == DType::kF16) return select_state<Rule, F16, F16>(s);
      if (s.grad == DType::kF32) return select_state<Rule, F16, float>(s);
    }
    return nullptr;
  }
}

template <class Rule>
void prepare_rule(const double* hyper, std::int64_t step, void* out) {
  static_assert(sizeof(Rule) <= kRuleBytes && std::is_trivially_copyable_v<Rule>, "a rule is a small POD");
  static_assert(Rule::kStates <= kMaxStates, "raise kMaxStates");
  const Rule rule = Rule::prepare(hyper, step);
  std::memcpy(out, &rule, sizeof rule);
}

#define FASTLOOP_SELECT(name, ...) &select_update<__VA_ARGS__>,
#define FASTLOOP_PREPARE(name, ...) &prepare_rule<__VA_ARGS__>,

template <class T>
UpdateFn update_for(int rule, const Storage& storage) {
  static constexpr UpdateFn (*kSelect[])(const Storage&) = {FASTLOOP_RULES(FASTLOOP_SELECT)};
  return kSelect[rule](storage);
}

template <class T>
PrepareFn prepare_for(int rule) {
  static constexpr PrepareFn kPrepare[] = {FASTLOOP_RULES(FASTLOOP_PREPARE)};
  return kPrepare[rule];
}

#undef FASTLOOP_SELECT
#undef FASTLOOP_PREPARE

template <NormKind kKind>
NormFn norm_of(DType grad) {
  switch (grad) {
    case DType::kF32:
      return &norm<kKind, float>;
    case DType::kBF16:
      return &norm<kKind, BF16>;
    case DType::kF16:
      return &norm<kKind, F16>;
    case DType::kF64:
      return &norm<kKind, double>;
    case DType::kUnsupported:
      break;
  }
  return nullptr;
}

inline UpdateFn find_update(int rule, const Storage& storage) {
  return storage.param == DType::kF64 ? update_for<double>(rule, storage) : update_for<float>(rule, storage);
}

inline PrepareFn find_prepare(int rule, DType param) {
  return param == DType::kF64 ? prepare_for<double>(rule) : prepare_for<float>(rule);
}

inline NormFn find_norm(NormKind kind, DType grad) {
  switch (kind) {
    case NormKind::kL1:
      return norm_of<NormKind::kL1>(grad);
    case NormKind::kL2:
      return norm_of<NormKind::kL2>(grad);
    case NormKind::kInf:
      return norm_of<NormKind::kInf>(grad);
  }
  return nullptr;
}

inline ScaleFn find_scale(DType grad) {
  switch (grad) {
    case DType::kF32:
      return &scale<float, float>;
    case DType::kBF16:
      return &scale<float, BF16>;
    case DType::kF16:
      return &scale<float, F16>;
    case DType::kF64:
      return &scale<double, double>;
    case DType::kUnsupported:
      break;
  }
  return nullptr;
}

extern const Kernels kernels;
const Kernels kernels = {FASTLOOP_ISA_NAME, find_update, find_prepare, find_norm, find_scale, stream};

}  // namespace FASTLOOP_ISA
}  // namespace fastloop
