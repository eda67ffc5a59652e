// SPDX-License-Identifier: Apache-2.0
// What a set of kernels offers, whatever it was compiled for: plain pointers to functions over plain structs.
//
// Everything here is POD and holds no inline code that an instruction set could leak through: this header is the one
// thing that translation units with different -m flags share.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core/dtype.h"

namespace fastloop {

// The arrays that a step touches for one parameter. A slot that a parameter does not have is null.
enum Slot : int {
  kParam,   // read and written; only written where there is a master copy
  kGrad,    // read; written when it is to be zeroed
  kMaster,  // compute-dtype copy of a 16-bit parameter
  kEma,     // compute-dtype moving average of the parameter
  kState,   // first state of the rule; the others follow
  kMaxStates = 3,
  kSlots = kState + kMaxStates
};

// One chunk of one parameter in pass 2.
struct UpdateArgs {
  void* slot[kSlots];
  std::int64_t count;
  const void* rule;    // what Kernels::prepare wrote
  double grad_factor;  // sign / grad_scale * clip
  double clip_value;   // bound on |g| after grad_factor; +inf for none
  double ema_decay;
  bool zero_grads;
};

// What a parameter's kernel is chosen by.
struct Storage {
  DType param, grad, state;
  bool master, ema;
};

enum class NormKind : std::uint8_t { kL1, kL2, kInf };

constexpr std::size_t kRuleBytes = 128;  // upper bound of sizeof(Rule), checked where rules are registered

using UpdateFn = void (*)(const UpdateArgs&);
using PrepareFn = void (*)(const double* hyper, std::int64_t step, void* rule);
using NormFn = double (*)(const void* grad, std::int64_t count);
using ScaleFn = void (*)(void* grad, std::int64_t count, double factor, double clip_value);
using StreamFn = double (*)(const float* const* reads, int n_reads, float* const* writes, int n_writes,
                            std::int64_t count);

struct RuleInfo {
  const char* name;
  int states;  // arrays of state per parameter
  int hypers;  // doubles in a row of hyperparameters
};

struct Kernels {
  const char* isa;
  // Null where no kernel serves this storage.
  UpdateFn (*update)(int rule, const Storage& storage);
  PrepareFn (*prepare)(int rule, DType param);
  NormFn (*norm)(NormKind kind, DType grad);
  ScaleFn (*scale)(DType grad);
  StreamFn stream;
};

// Rules by their index in rules/registry.h.
int rule_count();
const RuleInfo& rule_info(int rule);

}  // namespace fastloop
