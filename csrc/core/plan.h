// SPDX-License-Identifier: Apache-2.0
// A plan: the parameters of one optimizer on the CPU, their addresses and the chunks that threads share.
//
// Built once, run every step. A step allocates nothing and opens one parallel region:
//   pass 1   one partial norm per chunk, added in the order of the chunks
//   pass 2   the update, walking the chunks backwards: what pass 1 read last is still in the cache
// Chunk boundaries depend on sizes alone, so no result depends on the number of threads.
#pragma once
#include <array>
#include <cstdint>
#include <limits>
#include <vector>

#include "core/kernels.h"

namespace fastloop {

struct Chunk {
  std::int64_t tensor, offset, count;
};

// 16 Ki elements: the five streams of a chunk (320 KB) stay within a second-level cache of 512 KB or more.
constexpr std::int64_t kChunkElements = 16 * 1024;

// Cuts every tensor into chunks of at most kChunkElements. Sizes are numbers of elements; empty tensors get none.
std::vector<Chunk> chunk_map(const std::vector<std::int64_t>& sizes);

// Runs of chunks of at least kRunElements in all, that a thread claims at once, so that a thousand small tensors are
// not a thousand atomic operations: run r is chunks [runs[r], runs[r + 1]).
constexpr std::int64_t kRunElements = 4096;  // about 2 us of work
std::vector<std::int64_t> claim_runs(const std::vector<Chunk>& chunks);

struct Parameter {
  std::array<void*, kSlots> slot{};
  std::int64_t count = 0;
  Storage storage{};
  int rule = 0;                  // index in rules/registry.h
  int row = 0;                   // its group's row of hyperparameters
  std::int64_t step = 0;         // updates done
  void* step_address = nullptr;  // torch's scalar copy of `step`, fp32 or fp64; null for rules that publish none
  DType step_dtype = DType::kF32;
  void* steps_address = nullptr;  // on a device: our int64 count of updates
  bool active = false;            // it has a gradient in this step

  // Filled by Plan::add.
  UpdateFn update = nullptr;
  PrepareFn prepare = nullptr;
  NormFn norm = nullptr;
  std::int64_t prepared = 0;  // index of its prepared rule in this step
};

struct Row {
  std::vector<double> hyper;  // in the rule's order
  bool maximize = false;
  bool in_norm = false;  // false: left out of the global norm and of its clipping
  double clip_value = std::numeric_limits<double>::infinity();
  double ema_decay = 0;
};

struct StepControls {
  double max_norm = std::numeric_limits<double>::infinity();
  double grad_scale = 1;
  bool measure = false;         // pass 1 is wanted
  bool check_all = false;       // pass 1 also reads the gradients of rows outside the norm, to find what is not finite
  bool found_inf = false;       // somebody else found it: skip
  bool stop_nonfinite = false;  // leave everything as it is, uncounted, so that the caller can raise
  bool zero_grads = false;
};

struct StepResult {
  double norm = 0;       // total norm of the unscaled gradients before clipping; only if measured
  bool finite = true;    // every gradient that pass 1 read was
  bool skipped = false;  // nothing was updated
};

// Sum of squares of all gradients in the norm, and whether all measured gradients were finite.
struct NormSums {
  double squares = 0;
  bool finite = true;
};

// Work of the calling thread that the others need not wait for. They share out the chunks meanwhile.
struct Aside {
  bool (*during_norm)(void* context);  // false: the plan is stale, do not update
  void (*during_update)(void* context);
  void* context;
};

class Plan {
 public:
  explicit Plan(const Kernels& kernels) : kernels_(kernels) {}

  // False if no kernel serves its storage.
  bool add(Parameter parameter);
  void finish(int rows, int hypers);

  std::vector<Parameter>& parameters() { return parameters_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  std::vector<Row>& rows() { return rows_; }
  std::int64_t elements() const { return elements_; }

  // Pass 1 and pass 2 in one parallel region. With *stale set, nothing was written.
  StepResult step(const StepControls& controls, const Aside* aside = nullptr, bool* stale = nullptr);

  // Pass 2 alone, for a norm that is completed elsewhere (other processes, other backends).
  StepResult update(const StepControls& controls, NormSums total);

 private:
  void prepare();
  void commit();
  StepResult decide(const StepControls& controls, NormSums total);
  void run_norm(std::int64_t run, bool check_all);
  void run_update(std::int64_t run, const StepControls& controls, bool skip);
  void prefetch(std::int64_t chunk) const;
  NormSums reduce(bool check_all) const;

  const Kernels& kernels_;
  std::int64_t elements_ = 0;
  std::vector<Parameter> parameters_;
  std::vector<Row> rows_;
  std::vector<double> grad_factor_;  // per row
  std::vector<Chunk> chunks_;
  std::vector<std::int64_t> runs_;
  std::vector<double> partial_;  // per chunk
  struct alignas(64) Prepared {
    unsigned char rule[kRuleBytes];
  };
  std::vector<Prepared> prepared_;
};

// ---- operations over plain lists of arrays, for clipping without an optimizer

struct Array {
  void* data;
  std::int64_t count;
  DType dtype;
};

// kL2: the sum of squares. kL1, kInf: the norm itself.
double multi_norm(const Kernels& kernels, NormKind kind, const std::vector<Array>& arrays);
void multi_scale(const Kernels& kernels, const std::vector<Array>& arrays, double factor, double clip_value);
double stream(const Kernels& kernels, const std::vector<const float*>& reads, const std::vector<float*>& writes,
              std::int64_t count);

}  // namespace fastloop
