// SPDX-License-Identifier: Apache-2.0
// The native layer without Python: every instruction set of this machine, every storage type, tails, threads,
// forks. Runs by itself, under sanitizers, and cross-compiled under emulation. Its oracle computes in double,
// in plain loops.
#include <omp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "core/device_table.h"
#include "core/parallel.h"
#include "core/plan.h"
#include "cpu/dispatch.h"

namespace fastloop {
namespace {

int checks = 0;
int failures = 0;

void check(bool good, const char* what, int line, const std::string& context) {
  ++checks;
  if (good) return;
  if (++failures <= 20) std::printf("native_test.cpp:%d: %s [%s]\n", line, what, context.c_str());
}

#define CHECK(condition, context) check((condition), #condition, __LINE__, (context))

const double kInfinity = std::numeric_limits<double>::infinity();
const DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF64};

const char* name_of(DType dtype) {
  const char* const names[] = {"fp32", "bf16", "fp16", "fp64", "none"};
  return names[static_cast<int>(dtype)];
}

// ---- Storage types, by arithmetic instead of by bits
// --------------------------------------------------------------

struct Format {
  int digits, min_exponent, max_exponent;  // of the significand with its leading one; of normal numbers
};

Format format_of(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return {8, -126, 127};
    case DType::kF16:
      return {11, -14, 15};
    case DType::kF32:
      return {24, -126, 127};
    default:
      return {53, -1022, 1023};
  }
}

// Distance of the neighbours of x in the format.
double ulp(DType dtype, double x) {
  const Format f = format_of(dtype);
  const int exponent = x == 0 ? f.min_exponent : std::max(std::ilogb(x), f.min_exponent);
  return std::ldexp(1.0, exponent - f.digits + 1);
}

// x rounded to the nearest value of the format, ties to even.
double rounded(DType dtype, double x) {
  if (dtype == DType::kF64 || !std::isfinite(x)) return x;
  const double unit = ulp(dtype, x);
  const double r = std::nearbyint(x / unit) * unit;
  const bool overflow = std::fabs(r) >= std::ldexp(1.0, format_of(dtype).max_exponent + 1);
  return overflow ? std::copysign(kInfinity, x) : r;
}

double decode16(DType dtype, std::uint16_t bits) {
  const Format f = format_of(dtype);
  const int fraction_bits = f.digits - 1;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 0x7fff >> fraction_bits) {
    return fraction != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * kInfinity;
  }
  const int leading = exponent > 0 ? 1 << fraction_bits : 0;
  return sign * std::ldexp(fraction + leading, std::max(exponent, 1) - 1 + f.min_exponent - fraction_bits);
}

double get(DType dtype, const unsigned char* from) {
  if (dtype == DType::kF64) {
    double v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  if (dtype == DType::kF32) {
    float v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  std::uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return decode16(dtype, bits);
}

// x must be a value of the format.
void put(DType dtype, unsigned char* to, double x) {
  if (dtype == DType::kF64) {
    std::memcpy(to, &x, sizeof x);
    return;
  }
  const float v = static_cast<float>(x);
  if (dtype == DType::kF32) {
    std::memcpy(to, &v, sizeof v);
    return;
  }
  const Format f = format_of(dtype);
  const int fraction_bits = f.digits - 1;
  int bits;
  if (std::isnan(x)) {
    bits = 0x7fff;
  } else if (std::isinf(x)) {
    bits = (0x7fff >> fraction_bits) << fraction_bits;
  } else {
    const int exponent = x == 0 ? f.min_exponent : std::max(std::ilogb(x), f.min_exponent);
    // A normal number's leading one is the carry into the exponent field.
    bits = ((exponent - f.min_exponent) << fraction_bits) +
           static_cast<int>(std::ldexp(std::fabs(x), fraction_bits - exponent));
  }
  if (std::signbit(x)) bits |= 0x8000;
  const std::uint16_t stored = static_cast<std::uint16_t>(bits);
  std::memcpy(to, &stored, sizeof stored);
}

// An array on the heap that ends where its last element ends, so that a sanitizer sees the first byte beyond
// it, and that starts one element into the allocation, so that it is aligned to nothing but its element.
class Buffer {
 public:
  Buffer(DType dtype, std::int64_t count)
      : dtype_(dtype),
        count_(count),
        bytes_(new unsigned char[static_cast<std::size_t>((count + 1) * size_of(dtype))]) {
    std::memset(bytes_.get(), kGuard, static_cast<std::size_t>((count + 1) * size_of(dtype)));
  }
  unsigned char* data() const { return bytes_.get() + size_of(dtype_); }
  std::size_t size() const { return static_cast<std::size_t>(count_ * size_of(dtype_)); }
  double at(std::int64_t i) const { return get(dtype_, data() + i * size_of(dtype_)); }
  void set(std::int64_t i, double x) { put(dtype_, data() + i * size_of(dtype_), rounded(dtype_, x)); }
  bool guard_holds() const {
    return std::all_of(bytes_.get(), data(), [](unsigned char byte) { return byte == kGuard; });
  }
  DType dtype() const { return dtype_; }
  std::int64_t count() const { return count_; }

 private:
  static constexpr unsigned char kGuard = 0xa5;
  DType dtype_;
  std::int64_t count_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// Values that depend on nothing but the index, in [-1, 1).
double noise(std::int64_t i, int stream) {
  std::uint64_t x = static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(stream + 1);
  for (int round = 0; round < 3; ++round) x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9u;
  return static_cast<double>(x >> 11) * 0x1p-52 - 1.0;
}

void fill(Buffer& array, int stream, double scale = 1.0) {
  for (std::int64_t i = 0; i < array.count(); ++i) array.set(i, scale * noise(i, stream));
}

// ---- Instruction sets
// -----------------------------------------------------------------------------------------------

void test_dispatch() {
  const auto& sets = supported_kernels();
  CHECK(!sets.empty() && std::string(sets.front()->isa) == "baseline", "dispatch");
#if defined(__aarch64__)
  CHECK(std::string(sets.back()->isa) == "neon", "dispatch");
#endif
  std::string error;
  CHECK(select_kernels("", &error) == sets.back(), "best");
  for (const Kernels* set : sets) CHECK(select_kernels(set->isa, &error) == set, set->isa);
  CHECK(error.empty(), error);
  CHECK(select_kernels("sse9", &error) == nullptr, "unknown");
  CHECK(error.find("sse9") != std::string::npos && error.find("baseline") != std::string::npos, error);
}

// ---- Norms
// ------------------------------------------------------------------------------------------------------------

double expected_norm(NormKind kind, const Buffer& g) {
  double total = 0;
  for (std::int64_t i = 0; i < g.count(); ++i) {
    const double x = std::fabs(g.at(i));
    if (kind == NormKind::kInf) {
      total = std::max(total, x);
    } else {
      total += kind == NormKind::kL2 ? x * x : x;
    }
  }
  return total;
}

void test_norm(const Kernels& k) {
  const NormKind kinds[] = {NormKind::kL1, NormKind::kL2, NormKind::kInf};
  for (DType dtype : kDTypes) {
    for (NormKind kind : kinds) {
      const NormFn norm = k.norm(kind, dtype), baseline = supported_kernels().front()->norm(kind, dtype);
      for (std::int64_t count = 0; count <= 67; ++count) {
        const std::string context = std::string(k.isa) + " " + name_of(dtype) + " count " + std::to_string(count);
        Buffer g(dtype, count);
        fill(g, 0);
        const double got = norm(g.data(), count), want = expected_norm(kind, g);
        CHECK(std::fabs(got - want) <= 64 * 0x1p-53 * want, context);  // at most 67 additions in double
        if (dtype != DType::kF64) CHECK(got == baseline(g.data(), count), context);
        CHECK(got == norm(g.data(), count), context);
      }
      for (std::int64_t i = 0; i < 37; ++i) {
        for (double bad : {kInfinity, -kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
          Buffer g(dtype, 37);
          fill(g, 1);
          g.set(i, bad);
          CHECK(!std::isfinite(norm(g.data(), 37)), std::string(k.isa) + " " + name_of(dtype));
        }
      }
    }
    Buffer large(dtype, 5);  // squares that overflow the storage type
    for (std::int64_t i = 0; i < 5; ++i) large.set(i, dtype == DType::kF16 ? 6e4 : 1e30);
    CHECK(std::isfinite(k.norm(NormKind::kL2, dtype)(large.data(), 5)), std::string(k.isa) + " " + name_of(dtype));
  }
}

// ---- Conversions
// ------------------------------------------------------------------------------------------------------

// Every 16-bit pattern, multiplied: the product of fp32 must come back rounded to nearest, ties to even.
void test_sixteen_bits(const Kernels& k) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (float factor : {1.0f, 0.7f, -3.0f, 0x1p-20f, 0x1.8p10f}) {
      std::vector<std::uint16_t> bits(65536);
      for (std::size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<std::uint16_t>(i);
      k.scale(dtype)(bits.data(), static_cast<std::int64_t>(bits.size()), static_cast<double>(factor), kInfinity);
      for (std::size_t i = 0; i < bits.size(); ++i) {
        const float product = static_cast<float>(decode16(dtype, static_cast<std::uint16_t>(i))) * factor;
        const double want = rounded(dtype, static_cast<double>(product)), got = decode16(dtype, bits[i]);
        const bool same = std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want);
        CHECK(same, std::string(k.isa) + " " + name_of(dtype) + " bits " + std::to_string(i) + " times " +
                        std::to_string(factor));
      }
    }
  }
}

void test_scale(const Kernels& k) {
  for (DType dtype : kDTypes) {
    for (std::int64_t count = 0; count <= 35; ++count) {
      const std::string context = std::string(k.isa) + " " + name_of(dtype) + " count " + std::to_string(count);
      Buffer g(dtype, count), original(dtype, count);
      fill(g, 2);
      fill(original, 2);
      k.scale(dtype)(g.data(), count, 1.5, 0.75);
      for (std::int64_t i = 0; i < count; ++i) {
        CHECK(g.at(i) == rounded(dtype, std::clamp(original.at(i) * 1.5, -0.75, 0.75)), context);
      }
      CHECK(g.guard_holds(), context);
    }
  }
}

// ---- Updates
// ----------------------------------------------------------------------------------------------------------

constexpr std::int64_t kStep = 3;
constexpr double kGradFactor = 0.5, kClipValue = 0.375, kEmaDecay = 0.9;

std::vector<double> hyper_of(const std::string& rule) {
  if (rule.rfind("adam", 0) == 0) return {0.01, 0.9, 0.999, 1e-8, 0.1, 1.0};  // lr, b1, b2, eps, decay, decoupled
  return {0.01, 0.9, 0.25, 0.1, 1.0};  // lr, momentum, dampening, decay, nesterov
}

void expected_step(const std::string& rule, const std::vector<double>& h, double& p, double g, double* s) {
  if (rule.rfind("adam", 0) == 0) {
    p *= 1 - h[0] * h[4];
    s[0] += (1 - h[1]) * (g - s[0]);
    s[1] = h[2] * s[1] + (1 - h[2]) * g * g;
    double second = s[1];
    if (rule == "adam_amsgrad") second = s[2] = std::max(s[2], s[1]);
    const double m = s[0] / (1 - std::pow(h[1], kStep));
    p -= h[0] * m / (std::sqrt(second / (1 - std::pow(h[2], kStep))) + h[3]);
    return;
  }
  g += h[3] * p;
  if (rule == "sgd_momentum") {
    s[0] = h[1] * s[0] + (1 - h[2]) * g;
    g += h[1] * s[0];
  }
  p -= h[0] * g;
}

struct Slots {
  std::vector<std::unique_ptr<Buffer>> array;  // by slot, null where there is none

  Slots(const Storage& storage, int states, std::int64_t count) : array(kSlots) {
    const DType compute = storage.param == DType::kF64 ? DType::kF64 : DType::kF32;
    add(kParam, storage.param, count);
    add(kGrad, storage.grad, count);
    if (storage.master) add(kMaster, compute, count);
    if (storage.ema) add(kEma, compute, count);
    for (int k = 0; k < states; ++k) add(kState + k, storage.state, count);
    for (std::int64_t i = 0; i < count; ++i) {  // second moments are positive
      for (int k = 1; k < states; ++k) array[kState + k]->set(i, 0.1 + std::fabs(noise(i, kState + k)));
    }
  }
  void add(int slot, DType dtype, std::int64_t count) {
    array[static_cast<std::size_t>(slot)] = std::make_unique<Buffer>(dtype, count);
    fill(*array[static_cast<std::size_t>(slot)], slot);
  }
};

void run_update(const Kernels& k, int rule, const Storage& storage, Slots& slots, std::int64_t count, bool zero_grads) {
  alignas(64) unsigned char prepared[kRuleBytes];
  const std::vector<double> hyper = hyper_of(rule_info(rule).name);
  k.prepare(rule, storage.param)(hyper.data(), kStep, prepared);
  UpdateArgs args = {};
  for (int s = 0; s < kSlots; ++s) {
    const auto& array = slots.array[static_cast<std::size_t>(s)];
    args.slot[s] = array ? array->data() : nullptr;
  }
  args.count = count;
  args.rule = prepared;
  args.grad_factor = kGradFactor;
  args.clip_value = kClipValue;
  args.ema_decay = kEmaDecay;
  args.zero_grads = zero_grads;
  k.update(rule, storage)(args);
}

bool close(const Buffer& got, std::int64_t i, double want) {
  // One rounding to the storage type, and at most a dozen in the compute type, of values below 2.
  const double compute = got.dtype() == DType::kF64 ? 0x1p-53 : 0x1p-24;
  return std::fabs(got.at(i) - want) <= ulp(got.dtype(), want) + 24 * compute;
}

void check_update(const Kernels& k, int rule, const Storage& storage, const Slots& whole, std::int64_t count) {
  const RuleInfo& info = rule_info(rule);
  const std::string context = std::string(k.isa) + " " + info.name + " param " + name_of(storage.param) + " grad " +
                              name_of(storage.grad) + " state " + name_of(storage.state) +
                              (storage.master ? " master" : "") + (storage.ema ? " ema" : "") + " count " +
                              std::to_string(count);
  const bool zero_grads = count % 2 == 1;
  const Slots before(storage, info.states, count);
  Slots after(storage, info.states, count);
  run_update(k, rule, storage, after, count, zero_grads);

  const int weights = storage.master ? kMaster : kParam;
  for (std::int64_t i = 0; i < count; ++i) {
    double p = before.array[static_cast<std::size_t>(weights)]->at(i);
    const double g = std::clamp(before.array[kGrad]->at(i) * kGradFactor, -kClipValue, kClipValue);
    double s[kMaxStates] = {};
    for (int n = 0; n < info.states; ++n) s[n] = before.array[static_cast<std::size_t>(kState + n)]->at(i);
    expected_step(info.name, hyper_of(info.name), p, g, s);

    CHECK(close(*after.array[static_cast<std::size_t>(weights)], i, p), context);
    CHECK(close(*after.array[kParam], i, p), context);
    for (int n = 0; n < info.states; ++n) {
      CHECK(close(*after.array[static_cast<std::size_t>(kState + n)], i, s[n]), context);
    }
    if (storage.ema) {  // of the weights as they are stored
      const double stored = after.array[static_cast<std::size_t>(weights)]->at(i);
      const double ema = kEmaDecay * before.array[kEma]->at(i) + (1 - kEmaDecay) * stored;
      CHECK(close(*after.array[kEma], i, ema), context);
    }
    CHECK(after.array[kGrad]->at(i) == (zero_grads ? 0 : before.array[kGrad]->at(i)), context);
  }
  for (std::size_t n = 0; n < kSlots; ++n) {
    if (after.array[n] == nullptr) continue;
    CHECK(after.array[n]->guard_holds(), context);
    // An element's result does not depend on whether it is in a vector or in the tail.
    if (n != kGrad) {
      CHECK(std::memcmp(after.array[n]->data(), whole.array[n]->data(), after.array[n]->size()) == 0, context);
    }
  }
}

void test_updates(const Kernels& k) {
  int served = 0;
  for (int rule = 0; rule < rule_count(); ++rule) {
    for (int code = 0; code < 4 * 4 * 4 * 4; ++code) {
      const Storage storage = {kDTypes[code % 4], kDTypes[code / 4 % 4], kDTypes[code / 16 % 4], code / 64 % 2 == 1,
                               code / 128 == 1};
      if (k.update(rule, storage) == nullptr) continue;
      ++served;
      Slots whole(storage, rule_info(rule).states, 64);
      run_update(k, rule, storage, whole, 64, false);
      for (std::int64_t count : {0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64}) {
        check_update(k, rule, storage, whole, count);
      }
    }
  }
  CHECK(served >= 4 * rule_count(), std::string(k.isa) + " serves too few storages");
}

// ---- Plans
// ------------------------------------------------------------------------------------------------------------

void test_chunks() {
  const std::int64_t beyond_int = (std::int64_t{1} << 31) + 12345;
  const std::vector<std::int64_t> sizes = {5, 0, kChunkElements, kChunkElements + 1, beyond_int, 1, 0};
  const std::vector<Chunk> chunks = chunk_map(sizes);
  std::vector<std::int64_t> covered(sizes.size());
  std::int64_t previous = 0;
  for (const Chunk& c : chunks) {
    CHECK(c.tensor >= previous && c.count > 0 && c.count <= kChunkElements, "chunk");
    CHECK(c.offset == covered[static_cast<std::size_t>(c.tensor)], "chunks of a tensor follow each other");
    covered[static_cast<std::size_t>(c.tensor)] += c.count;
    previous = c.tensor;
  }
  CHECK(covered == sizes, "every element is in one chunk");
  const std::vector<std::int64_t> runs = claim_runs(chunks);
  CHECK(runs.front() == 0 && runs.back() == static_cast<std::int64_t>(chunks.size()), "runs");
  CHECK(std::is_sorted(runs.begin(), runs.end()), "runs");
}

// A model of a few odd sizes, trained by one plan.
struct Model {
  std::vector<std::unique_ptr<Slots>> tensors;
  std::vector<float> steps;
  std::unique_ptr<Plan> plan;

  explicit Model(const Kernels& k) {
    const Storage storage = {DType::kF32, DType::kF32, DType::kF32, false, false};
    const std::vector<std::int64_t> sizes = {kChunkElements * 3 + 17, 1, 0, 1000, kChunkElements, 3};
    steps.assign(sizes.size(), 0.0f);
    plan = std::make_unique<Plan>(k);
    for (std::size_t t = 0; t < sizes.size(); ++t) {
      tensors.push_back(std::make_unique<Slots>(storage, rule_info(0).states, sizes[t]));
      Parameter p;
      for (std::size_t s = 0; s < kSlots; ++s) {
        p.slot[s] = tensors[t]->array[s] ? tensors[t]->array[s]->data() : nullptr;
      }
      p.count = sizes[t];
      p.storage = storage;
      p.step_address = &steps[t];
      p.active = true;
      CHECK(plan->add(p), "storage is served");
    }
    plan->finish(1, rule_info(0).hypers);
    plan->rows()[0].hyper = hyper_of(rule_info(0).name);
    plan->rows()[0].in_norm = true;
  }

  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all;
    for (const auto& slots : tensors) {
      for (const auto& array : slots->array) {
        if (array) all.insert(all.end(), array->data(), array->data() + array->size());
      }
    }
    return all;
  }
};

StepControls clipping() {
  StepControls controls;
  controls.measure = true;
  controls.max_norm = 1.0;
  return controls;
}

void test_threads(const Kernels& k) {
  std::vector<unsigned char> expected;
  double norm = 0;
  for (int threads : {1, 2, 3, 1, 4}) {
    omp_set_num_threads(threads);
    Model model(k);
    StepResult result;
    for (int step = 0; step < 3; ++step) result = model.plan->step(clipping());
    const std::string context = std::string(k.isa) + " threads " + std::to_string(threads);
    if (expected.empty()) {
      expected = model.bytes();
      norm = result.norm;
    }
    CHECK(!result.skipped && result.norm == norm, context);
    CHECK(model.bytes() == expected, context);
    for (float step : model.steps) CHECK(step == 3, context);
  }
}

void test_skips(const Kernels& k) {
  omp_set_num_threads(2);
  for (double bad : {kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
    Model model(k);
    model.tensors[0]->array[kGrad]->set(kChunkElements + 3, bad);
    const std::vector<unsigned char> before = model.bytes();
    const StepResult result = model.plan->step(clipping());
    CHECK(result.skipped && !result.finite, k.isa);
    CHECK(model.bytes() == before, k.isa);
    CHECK(std::all_of(model.steps.begin(), model.steps.end(), [](float step) { return step == 0; }), k.isa);

    StepControls zero = clipping();
    zero.zero_grads = true;
    model.plan->step(zero);
    CHECK(expected_norm(NormKind::kInf, *model.tensors[0]->array[kGrad]) == 0, k.isa);
  }
  Model model(k);
  const std::vector<unsigned char> before = model.bytes();
  StepControls found = clipping();
  found.found_inf = true;
  CHECK(model.plan->step(found).skipped && model.bytes() == before, k.isa);
}

// Pass 2 after a norm that was computed elsewhere does what one step does, to the bit.
void test_two_passes(const Kernels& k) {
  omp_set_num_threads(2);
  Model together(k), apart(k);
  const StepResult one = together.plan->step(clipping());
  std::vector<Array> grads;
  for (const auto& slots : apart.tensors) {
    Buffer& grad = *slots->array[kGrad];
    grads.push_back({grad.data(), grad.count(), DType::kF32});
  }
  const StepResult two = apart.plan->update(clipping(), {multi_norm(k, NormKind::kL2, grads), true});
  CHECK(one.norm == two.norm && !two.skipped, k.isa);
  CHECK(together.bytes() == apart.bytes(), k.isa);
}

// A group outside the norm is neither measured nor clipped; what is not finite there is found only if asked for.
void test_group_outside_the_norm(const Kernels& k) {
  Model model(k);
  model.plan->rows()[0].in_norm = false;
  model.tensors[0]->array[kGrad]->set(3, kInfinity);
  StepControls controls = clipping();
  controls.check_all = true;
  CHECK(model.plan->step(controls).skipped, k.isa);
  controls.check_all = false;
  const StepResult result = model.plan->step(controls);
  CHECK(!result.skipped && result.norm == 0, k.isa);
}

void test_lists(const Kernels& k) {
  std::vector<std::unique_ptr<Buffer>> owned;
  std::vector<Array> arrays;
  double squares = 0, largest = 0;
  for (std::int64_t count : {kChunkElements + 5, std::int64_t{0}, std::int64_t{1}, std::int64_t{777}}) {
    for (DType dtype : kDTypes) {
      owned.push_back(std::make_unique<Buffer>(dtype, count));
      fill(*owned.back(), static_cast<int>(arrays.size()));
      arrays.push_back({owned.back()->data(), count, dtype});
      squares += expected_norm(NormKind::kL2, *owned.back());
      largest = std::max(largest, expected_norm(NormKind::kInf, *owned.back()));
    }
  }
  double first = 0;
  for (int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    const double got = multi_norm(k, NormKind::kL2, arrays);
    if (threads == 1) first = got;
    CHECK(got == first && std::fabs(got - squares) <= 1e-11 * squares, k.isa);
  }
  CHECK(multi_norm(k, NormKind::kInf, arrays) == largest, k.isa);
  multi_scale(k, arrays, 0.5, kInfinity);
  CHECK(multi_norm(k, NormKind::kInf, arrays) == largest / 2, k.isa);
}

// A device's table: parameters ordered by bucket, chunks by parameter, offsets beyond 2^31 elements, changes noticed.
void test_device_table() {
  auto parameter = [](DType dtype, std::int64_t count, int row, std::uintptr_t address) {
    Parameter p;
    p.storage = {dtype, dtype, DType::kF32, false, false};
    p.count = count;
    p.row = row;
    p.active = true;
    p.slot[kParam] = reinterpret_cast<void*>(address);
    p.slot[kGrad] = reinterpret_cast<void*>(address + 1024);
    return p;
  };
  const std::int64_t huge = (std::int64_t{1} << 33) + 5;
  std::vector<Parameter> parameters = {
      parameter(DType::kBF16, kDeviceChunkElements + 1, 1, 0x10000),
      parameter(DType::kF32, huge, 0, 0x20000),
      parameter(DType::kBF16, 0, 0, 0x30000),
      parameter(DType::kF32, 7, 1, 0x40000),
  };
  DeviceTable table(parameters, {0, 0, 0, 0}, 2);
  const TableLayout layout = table.layout();
  const std::int64_t huge_chunks = huge / kDeviceChunkElements + 1;
  CHECK(layout.rows == 2 && layout.tensors == 4 && layout.chunks == huge_chunks + 1 + 2, "");
  CHECK(table.buckets().size() == 2, "");
  const Bucket& f32 = table.buckets()[0];
  const Bucket& bf16 = table.buckets()[1];
  CHECK(f32.storage.param == DType::kF32 && f32.first_tensor == 0 && f32.tensors == 2, "");
  CHECK(f32.first_chunk == 0 && f32.chunks == huge_chunks + 1, "");
  CHECK(bf16.first_tensor == 2 && bf16.tensors == 2 && bf16.first_chunk == f32.chunks && bf16.chunks == 2, "");

  auto word = [&](std::int64_t at) { return table.words()[static_cast<std::size_t>(at)]; };
  auto tensor_word = [&](std::int64_t tensor, int k) {
    return word(layout.tensor_words() + tensor * kTensorWords + k);
  };
  CHECK(tensor_word(0, kTensorSlot + kParam) == 0x20000 && tensor_word(1, kTensorSlot + kParam) == 0x40000, "");
  CHECK(tensor_word(2, kTensorSlot + kParam) == 0x10000 && tensor_word(0, kTensorRow) == 0, "");
  CHECK(tensor_word(2, kTensorRow) == 1 && tensor_word(0, kTensorCount) == static_cast<Word>(huge), "");
  const Word last = word(layout.chunk_words() + huge_chunks - 1);
  CHECK(last >> 32 == 0, "");
  const std::int64_t offset = static_cast<std::int64_t>(last & 0xffffffffu) * kDeviceChunkElements;
  CHECK(offset < huge && huge - offset <= kDeviceChunkElements && offset > (std::int64_t{1} << 32), "");
  CHECK(word(layout.chunk_words() + huge_chunks) == pack_chunk(1, 0), "");

  std::vector<Row> rows(2);
  for (Row& row : rows) row.hyper = {1.0, 2.0};
  std::vector<std::vector<Word>> addresses(2, std::vector<Word>(2, 0));
  StepControls controls;
  auto refresh = [&] { return table.refresh(controls, 0, 0, rows, addresses, parameters); };
  CHECK(refresh(), "the first time everything is new");
  CHECK(!refresh(), "");
  CHECK(word(layout.grad_words() + 2) == 0x10000 + 1024 && word(layout.grad_words() + 3) == kEmptyGrad, "");
  parameters[0].active = false;
  CHECK(refresh() && word(layout.grad_words() + 2) == 0, "");
  rows[1].hyper[1] = 3.0;
  CHECK(refresh() && !refresh(), "");
  addresses[0][1] = 0x50000;
  CHECK(refresh() && word(layout.row_words() + kHyperAddress + 1) == 0x50000, "");
  controls.zero_grads = true;
  CHECK(refresh() && word(kFlags) == kZeroGrads, "");
  controls.grad_scale = 2;
  CHECK(refresh() && !refresh() && word(layout.scale_word()) == Word{1} << 62, "the bits of 2.0");

  const DeviceTable kinds(parameters, {1, 0, 0, 1}, 2);
  CHECK(kinds.buckets().size() == 4 && kinds.buckets()[0].kind == 0 && kinds.buckets()[2].kind == 1, "");
}

// The parent's OpenMP threads do not exist in a forked child: a parallel region there would wait for ever.
void test_fork(const Kernels& k) {
  omp_set_num_threads(2);
  Model model(k);
  model.plan->step(clipping());
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    const StepResult result = model.plan->step(clipping());
    _exit(result.skipped ? 1 : 0);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, k.isa);
}

}  // namespace

int run_all() {
  watch_forks();
  test_dispatch();
  test_chunks();
  test_device_table();
  for (const Kernels* set : supported_kernels()) {
    const int before = checks;
    test_norm(*set);
    test_sixteen_bits(*set);
    test_scale(*set);
    test_updates(*set);
    test_threads(*set);
    test_skips(*set);
    test_two_passes(*set);
    test_group_outside_the_norm(*set);
    test_lists(*set);
    test_fork(*set);
    std::printf("%-8s %d checks\n", set->isa, checks - before);
  }
  std::printf("%d checks, %d failed\n", checks, failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace fastloop

int main() { return fastloop::run_all(); }
