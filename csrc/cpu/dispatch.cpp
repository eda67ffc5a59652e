// SPDX-License-Identifier: Apache-2.0
#include "cpu/dispatch.h"

#include <cstring>

#define FASTLOOP_RULE_NAMESPACE registered
#include "rules/adam.h"
#include "rules/registry.h"
#include "rules/sgd.h"

namespace fastloop {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

using namespace registered;  // NOLINT: the registry names rules without their namespace
using T = float;

#define FASTLOOP_INFO(name, ...) {name, __VA_ARGS__::kStates, __VA_ARGS__::kHypers},
constexpr RuleInfo kRules[] = {FASTLOOP_RULES(FASTLOOP_INFO)};
#undef FASTLOOP_INFO

}  // namespace

int rule_count() { return static_cast<int>(sizeof kRules / sizeof kRules[0]); }
const RuleInfo& rule_info(int rule) { return kRules[rule]; }

const std::vector<const Kernels*>& supported_kernels() {
  static const std::vector<const Kernels*> sets = [] {
    std::vector<const Kernels*> found = {&baseline::kernels};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      found.push_back(&avx2::kernels);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&avx512::kernels);
      }
    }
#elif defined(__aarch64__)
    found.push_back(&neon::kernels);  // part of the architecture
#endif
    return found;
  }();
  return sets;
}

const Kernels* select_kernels(const std::string& wanted, std::string* error) {
  const auto& sets = supported_kernels();
  if (wanted.empty()) return sets.back();
  std::string names;
  for (const Kernels* set : sets) {
    if (wanted == set->isa) return set;
    names += (names.empty() ? "" : ", ") + std::string(set->isa);
  }
  *error = "FASTLOOP_ISA must name an instruction set of this build and machine (" + names + "), got '" + wanted + "'";
  return nullptr;
}

}  // namespace fastloop
