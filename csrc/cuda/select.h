// SPDX-License-Identifier: Apache-2.0
// From storage to update kernel. One file per parameter dtype includes this, so that they compile side by side.
#pragma once
#include "cuda/kernels.h"

namespace fastloop {
namespace device {

template <class Rule, class P, class G, class S, bool kHasMaster>
const void* kernel_of(bool ema) {
  return ema ? reinterpret_cast<const void*>(&update<Rule, P, G, S, kHasMaster, true>)
             : reinterpret_cast<const void*>(&update<Rule, P, G, S, kHasMaster, false>);
}

template <class Rule, class P, class G>
const void* select_state(const Storage& s) {
  if constexpr (std::is_same_v<P, double>) {
    return s.state == DType::kF64 && !s.master ? kernel_of<Rule, P, G, double, false>(s.ema) : nullptr;
  } else {
    if (s.master) {
      if constexpr (sizeof(P) == 2) {
        if (s.state == DType::kF32) return kernel_of<Rule, P, G, float, true>(s.ema);
      }
      return nullptr;
    }
    if (s.state == DType::kF32) return kernel_of<Rule, P, G, float, false>(s.ema);
    if (s.state == DType::kBF16) return kernel_of<Rule, P, G, BF16, false>(s.ema);
    return nullptr;
  }
}

// Gs: the dtypes that a gradient of this parameter may have.
template <class P, class... Gs>
struct Select {
  template <class Rule>
  static const void* with(const Storage& s) {
    const void* found = nullptr;
    ((found = s.grad == dtype_of<Gs>() ? select_state<Rule, P, Gs>(s) : found), ...);
    return found;
  }

  template <class G>
  static constexpr DType dtype_of() {
    if constexpr (std::is_same_v<G, float>) return DType::kF32;
    if constexpr (std::is_same_v<G, BF16>) return DType::kBF16;
    if constexpr (std::is_same_v<G, F16>) return DType::kF16;
    if constexpr (std::is_same_v<G, double>) return DType::kF64;
  }

  static const void* find(int rule, const Storage& s) {
    using T = ComputeOf<P>;
    using Finder = const void* (*)(const Storage&);
#define FASTLOOP_WITH(name, ...) &with<__VA_ARGS__>,
    static constexpr Finder kFinders[] = {FASTLOOP_RULES(FASTLOOP_WITH)};
#undef FASTLOOP_WITH
    return kFinders[rule](s);
  }
};

// The kernel as the runtime wants it, null where none serves.
const void* find_update_f32(int rule, const Storage& storage);
const void* find_update_bf16(int rule, const Storage& storage);
const void* find_update_f16(int rule, const Storage& storage);
const void* find_update_f64(int rule, const Storage& storage);

}  // namespace device
}  // namespace fastloop
