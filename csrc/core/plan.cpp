// SPDX-License-Identifier: Apache-2.0
#include "core/plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "core/parallel.h"

namespace fastloop {
namespace {

// Hands out 0, 1, ..., n - 1 to whoever asks next: a thread that the system interrupts delays no other.
class Tickets {
 public:
  explicit Tickets(std::int64_t n) : n_(n) {}
  bool next(std::int64_t* i) { return (*i = next_.fetch_add(1, std::memory_order_relaxed)) < n_; }

 private:
  const std::int64_t n_;
  alignas(64) std::atomic<std::int64_t> next_{0};
};

std::int64_t read_step(const Parameter& p) {
  if (p.step_address == nullptr) return p.step;
  // The integer is exact beyond 2^24, where the published float is not; a float that somebody changed wins.
  if (p.step_dtype == DType::kF32) {
    const float published = *static_cast<const float*>(p.step_address);
    return published == static_cast<float>(p.step) ? p.step : static_cast<std::int64_t>(published);
  }
  const double published = *static_cast<const double*>(p.step_address);
  return published == static_cast<double>(p.step) ? p.step : static_cast<std::int64_t>(published);
}

void publish_step(const Parameter& p) {
  if (p.step_address == nullptr) return;
  if (p.step_dtype == DType::kF32) {
    *static_cast<float*>(p.step_address) = static_cast<float>(p.step);
  } else {
    *static_cast<double*>(p.step_address) = static_cast<double>(p.step);
  }
}

double combine(NormKind kind, double a, double b) {
  if (kind == NormKind::kInf) return (b > a || b != b) ? b : a;
  return a + b;
}

}  // namespace

std::vector<Chunk> chunk_map(const std::vector<std::int64_t>& sizes) {
  std::vector<Chunk> chunks;
  for (std::size_t t = 0; t < sizes.size(); ++t) {
    for (std::int64_t offset = 0; offset < sizes[t]; offset += kChunkElements) {
      chunks.push_back({static_cast<std::int64_t>(t), offset, std::min(kChunkElements, sizes[t] - offset)});
    }
  }
  return chunks;
}

std::vector<std::int64_t> claim_runs(const std::vector<Chunk>& chunks) {
  std::vector<std::int64_t> runs = {0};
  std::int64_t elements = 0;
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    elements += chunks[c].count;
    if (elements >= kRunElements) {
      runs.push_back(static_cast<std::int64_t>(c) + 1);
      elements = 0;
    }
  }
  if (runs.back() != static_cast<std::int64_t>(chunks.size())) runs.push_back(static_cast<std::int64_t>(chunks.size()));
  return runs;
}

bool Plan::add(Parameter p) {
  p.update = kernels_.update(p.rule, p.storage);
  p.prepare = kernels_.prepare(p.rule, p.storage.param);
  p.norm = kernels_.norm(NormKind::kL2, p.storage.grad);
  if (p.update == nullptr) return false;
  parameters_.push_back(p);
  return true;
}

void Plan::finish(int rows, int hypers) {
  std::vector<std::int64_t> sizes;
  for (const Parameter& p : parameters_) {
    sizes.push_back(p.count);
    elements_ += p.count;
  }
  chunks_ = chunk_map(sizes);
  runs_ = claim_runs(chunks_);
  partial_.assign(chunks_.size(), 0.0);
  rows_.resize(static_cast<std::size_t>(rows));
  grad_factor_.resize(static_cast<std::size_t>(rows));
  for (Row& row : rows_) row.hyper.resize(static_cast<std::size_t>(hypers));
  prepared_.reserve(parameters_.size());
}

// Parameters of one group that have done the same number of steps share their prepared hyperparameters.
void Plan::prepare() {
  prepared_.clear();
  const Parameter* previous = nullptr;
  for (Parameter& p : parameters_) {
    if (!p.active) continue;
    p.step = read_step(p);
    const bool shared =
        previous != nullptr && previous->row == p.row && previous->step == p.step && previous->prepare == p.prepare;
    if (!shared) {
      prepared_.emplace_back();
      p.prepare(rows_[static_cast<std::size_t>(p.row)].hyper.data(), p.step + 1, prepared_.back().rule);
    }
    p.prepared = static_cast<std::int64_t>(prepared_.size()) - 1;
    previous = &p;
  }
}

void Plan::commit() {
  for (Parameter& p : parameters_) {
    if (!p.active) continue;
    ++p.step;
    publish_step(p);
  }
}

void Plan::run_norm(std::int64_t run, bool check_all) {
  for (std::int64_t c = runs_[static_cast<std::size_t>(run)]; c < runs_[static_cast<std::size_t>(run) + 1]; ++c) {
    const Chunk& chunk = chunks_[static_cast<std::size_t>(c)];
    const Parameter& p = parameters_[static_cast<std::size_t>(chunk.tensor)];
    if (!p.active || !(check_all || rows_[static_cast<std::size_t>(p.row)].in_norm)) continue;
    const auto* grad = static_cast<const unsigned char*>(p.slot[kGrad]) + chunk.offset * size_of(p.storage.grad);
    partial_[static_cast<std::size_t>(c)] = p.norm(grad, chunk.count);
  }
}

NormSums Plan::reduce(bool check_all) const {
  NormSums total;
  for (std::size_t c = 0; c < chunks_.size(); ++c) {
    const Parameter& p = parameters_[static_cast<std::size_t>(chunks_[c].tensor)];
    const bool in_norm = rows_[static_cast<std::size_t>(p.row)].in_norm;
    if (!p.active || !(check_all || in_norm)) continue;
    if (!std::isfinite(partial_[c])) total.finite = false;
    if (in_norm) total.squares += partial_[c];
  }
  return total;
}

// Whether to go on, and each row's multiplier of the gradient.
StepResult Plan::decide(const StepControls& controls, NormSums total) {
  StepResult result;
  result.norm = std::sqrt(total.squares) / std::fabs(controls.grad_scale);
  result.finite = total.finite && (!controls.measure || std::isfinite(result.norm));
  result.skipped = controls.found_inf || (controls.measure && !result.finite);
  const double clip = controls.measure ? std::min(1.0, controls.max_norm / (result.norm + 1e-6)) : 1.0;
  for (std::size_t r = 0; r < rows_.size(); ++r) {
    grad_factor_[r] = (rows_[r].maximize ? -1.0 : 1.0) / controls.grad_scale * (rows_[r].in_norm ? clip : 1.0);
  }
  return result;
}

// The hardware's prefetchers start anew at every tensor. The first lines of the next chunk are asked for meanwhile.
void Plan::prefetch(std::int64_t chunk) const {
  constexpr std::int64_t kLines = 8;
  const Chunk& next = chunks_[static_cast<std::size_t>(chunk)];
  const Parameter& p = parameters_[static_cast<std::size_t>(next.tensor)];
  for (void* slot : p.slot) {
    if (slot == nullptr) continue;
    const auto* start = static_cast<const unsigned char*>(slot) + next.offset * size_of(p.storage.param);
    for (std::int64_t line = 0; line < kLines; ++line) __builtin_prefetch(start + 64 * line);
  }
}

void Plan::run_update(std::int64_t run, const StepControls& controls, bool skip) {
  for (std::int64_t c = runs_[static_cast<std::size_t>(run) + 1] - 1; c >= runs_[static_cast<std::size_t>(run)]; --c) {
    const Chunk& chunk = chunks_[static_cast<std::size_t>(c)];
    const Parameter& p = parameters_[static_cast<std::size_t>(chunk.tensor)];
    if (!p.active) continue;
    const std::int64_t grad_bytes = size_of(p.storage.grad);
    auto at = [&](int slot, std::int64_t element_bytes) -> void* {
      auto* base = static_cast<unsigned char*>(p.slot[static_cast<std::size_t>(slot)]);
      return base == nullptr ? nullptr : base + chunk.offset * element_bytes;
    };
    if (skip) {
      std::memset(at(kGrad, grad_bytes), 0, static_cast<std::size_t>(chunk.count * grad_bytes));
      continue;
    }
    if (c > 0) prefetch(c - 1);
    const Row& row = rows_[static_cast<std::size_t>(p.row)];
    const std::int64_t compute_bytes = p.storage.param == DType::kF64 ? 8 : 4;
    UpdateArgs args;
    args.slot[kParam] = at(kParam, size_of(p.storage.param));
    args.slot[kGrad] = at(kGrad, grad_bytes);
    args.slot[kMaster] = at(kMaster, compute_bytes);
    args.slot[kEma] = at(kEma, compute_bytes);
    for (int k = 0; k < kMaxStates; ++k) args.slot[kState + k] = at(kState + k, size_of(p.storage.state));
    args.count = chunk.count;
    args.rule = prepared_[static_cast<std::size_t>(p.prepared)].rule;
    args.grad_factor = grad_factor_[static_cast<std::size_t>(p.row)];
    args.clip_value = row.clip_value;
    args.ema_decay = row.ema_decay;
    args.zero_grads = controls.zero_grads;
    p.update(args);
  }
}

StepResult Plan::step(const StepControls& controls, const Aside* aside, bool* stale) {
  const std::int64_t n = static_cast<std::int64_t>(runs_.size()) - 1;
  Tickets norm_runs(controls.measure ? n : 0), update_runs(n);
  StepResult result;
  bool write = false, holds = true;
#pragma omp parallel num_threads(thread_count(elements_)) default(shared)
  {
    std::int64_t i;
#pragma omp master
    if (aside != nullptr) holds = aside->during_norm(aside->context);
    while (norm_runs.next(&i)) run_norm(i, controls.check_all);
#pragma omp barrier
#pragma omp master
    if (holds) {
      result = decide(controls, controls.measure ? reduce(controls.check_all) : NormSums{});
      const bool stop = result.skipped && !result.finite && controls.stop_nonfinite;
      write = !stop && (!result.skipped || controls.zero_grads);
      if (write && !result.skipped) prepare();
    }
#pragma omp barrier
#pragma omp master
    if (aside != nullptr && write && !result.skipped) aside->during_update(aside->context);
    while (write && update_runs.next(&i)) run_update(n - 1 - i, controls, result.skipped);
  }
  if (stale != nullptr) *stale = !holds;
  if (holds && !result.skipped) commit();
  return result;
}

StepResult Plan::update(const StepControls& controls, NormSums total) {
  prepare();
  const StepResult result = decide(controls, total);
  const bool stop = result.skipped && !result.finite && controls.stop_nonfinite;
  if (!stop && (!result.skipped || controls.zero_grads)) {
    const std::int64_t n = static_cast<std::int64_t>(runs_.size()) - 1;
    Tickets runs(n);
#pragma omp parallel num_threads(thread_count(elements_)) default(shared)
    {
      std::int64_t i;
      while (runs.next(&i)) run_update(n - 1 - i, controls, result.skipped);
    }
  }
  if (!result.skipped) commit();
  return result;
}

// ---- plain lists

namespace {

struct Cut {
  std::vector<Chunk> chunks;
  std::vector<std::int64_t> runs;
  std::int64_t elements = 0;
};

Cut cut(const std::vector<Array>& arrays) {
  Cut result;
  std::vector<std::int64_t> sizes;
  for (const Array& a : arrays) {
    sizes.push_back(a.count);
    result.elements += a.count;
  }
  result.chunks = chunk_map(sizes);
  result.runs = claim_runs(result.chunks);
  return result;
}

template <class F>
void for_each_chunk(const Cut& work, const std::vector<Array>& arrays, F f) {
  Tickets runs(static_cast<std::int64_t>(work.runs.size()) - 1);
#pragma omp parallel num_threads(thread_count(work.elements)) default(shared)
  {
    std::int64_t i;
    while (runs.next(&i)) {
      for (std::int64_t c = work.runs[static_cast<std::size_t>(i)]; c < work.runs[static_cast<std::size_t>(i) + 1];
           ++c) {
        const Chunk& chunk = work.chunks[static_cast<std::size_t>(c)];
        const Array& a = arrays[static_cast<std::size_t>(chunk.tensor)];
        f(static_cast<std::size_t>(c), a, static_cast<unsigned char*>(a.data) + chunk.offset * size_of(a.dtype),
          chunk.count);
      }
    }
  }
}

}  // namespace

double multi_norm(const Kernels& kernels, NormKind kind, const std::vector<Array>& arrays) {
  const Cut work = cut(arrays);
  std::vector<double> partial(work.chunks.size());
  for_each_chunk(work, arrays, [&](std::size_t c, const Array& a, const void* data, std::int64_t count) {
    partial[c] = kernels.norm(kind, a.dtype)(data, count);
  });
  double total = 0;
  for (double p : partial) total = combine(kind, total, p);
  return total;
}

void multi_scale(const Kernels& kernels, const std::vector<Array>& arrays, double factor, double clip_value) {
  for_each_chunk(cut(arrays), arrays, [&](std::size_t, const Array& a, void* data, std::int64_t count) {
    kernels.scale(a.dtype)(data, count, factor, clip_value);
  });
}

double stream(const Kernels& kernels, const std::vector<const float*>& reads, const std::vector<float*>& writes,
              std::int64_t count) {
  const std::int64_t n = (count + kChunkElements - 1) / kChunkElements;
  Tickets chunks(n);
  std::atomic<double> kept{0};
#pragma omp parallel num_threads(thread_count(count)) default(shared)
  {
    constexpr std::size_t kMost = 4;
    const float* read[kMost] = {};
    float* write[kMost] = {};
    std::int64_t i;
    while (chunks.next(&i)) {
      const std::int64_t offset = i * kChunkElements;
      for (std::size_t k = 0; k < reads.size(); ++k) read[k] = reads[k] + offset;
      for (std::size_t k = 0; k < writes.size(); ++k) write[k] = writes[k] + offset;
      const double sum = kernels.stream(read, static_cast<int>(reads.size()), write, static_cast<int>(writes.size()),
                                        std::min(kChunkElements, count - offset));
      kept.store(sum, std::memory_order_relaxed);
    }
  }
  return kept.load();
}

}  // namespace fastloop
