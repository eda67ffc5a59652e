// SPDX-License-Identifier: Apache-2.0
// The two kernels of a step, generic over rule and storage types. They read a DeviceTable (core/device_table.h).
//
//   norm     each block takes every n-th chunk of the gradients and writes one pair of partial sums
//   update   every block adds up the partial sums, decides, and takes every n-th chunk, walking backwards: what the
//            norm read last is still in the cache; the block that ends last counts the step
//
// No result depends on timing: sums are added in a fixed order, and whoever ends last does the same work.
#pragma once
#define FASTLOOP_RULE_NAMESPACE device
#include <cstring>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "rules/adam.h"
#include "rules/registry.h"
#include "rules/sgd.h"

namespace fastloop {
namespace device {

// ---- reading the table

FASTLOOP_DEVICE double as_double(Word bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
FASTLOOP_DEVICE T* as_pointer(Word address) {
  return global(reinterpret_cast<T*>(static_cast<std::uintptr_t>(address)));
}

// A scalar that Python made: float32, or float64 where the low bit says so.
FASTLOOP_DEVICE double read_scalar(Word address) {
  if ((address & kIsDouble) != 0) return *as_pointer<const double>(address - kIsDouble);
  return static_cast<double>(*as_pointer<const float>(address));
}

// Updates done. The integer is exact beyond 2^24, where the published float is not; a float that somebody changed wins.
FASTLOOP_DEVICE std::int64_t read_steps(const Word* tensor) {
  const std::int64_t steps = *as_pointer<const std::int64_t>(tensor[kTensorSteps]);
  const Word published = tensor[kTensorStep];
  if (published == 0) return steps;
  const double shown = read_scalar(published);
  const bool is_double = (published & kIsDouble) != 0;
  const double expected = is_double ? static_cast<double>(steps) : static_cast<double>(static_cast<float>(steps));
  return shown == expected ? steps : static_cast<std::int64_t>(shown);
}

FASTLOOP_DEVICE void write_steps(const Word* tensor, std::int64_t steps) {
  *as_pointer<std::int64_t>(tensor[kTensorSteps]) = steps;
  const Word published = tensor[kTensorStep];
  if (published == 0) return;
  if ((published & kIsDouble) != 0) {
    *as_pointer<double>(published - kIsDouble) = static_cast<double>(steps);
  } else {
    *as_pointer<float>(published) = static_cast<float>(steps);
  }
}

struct ChunkPlace {
  std::int64_t tensor, offset;
  int count;
};

FASTLOOP_DEVICE ChunkPlace place_of(const Word* table, const TableLayout& layout, std::int64_t chunk) {
  const Word packed = table[layout.chunk_words() + chunk];
  ChunkPlace place;
  place.tensor = static_cast<std::int64_t>(packed >> 32);
  place.offset = static_cast<std::int64_t>(packed & 0xffffffffu) * kDeviceChunkElements;
  const Word* tensor = table + layout.tensor_words() + place.tensor * kTensorWords;
  const std::int64_t rest = static_cast<std::int64_t>(tensor[kTensorCount]) - place.offset;
  place.count = static_cast<int>(rest < kDeviceChunkElements ? rest : kDeviceChunkElements);
  return place;
}

// ---- pass 1

template <class G>
using ComputeOf = std::conditional_t<std::is_same_v<G, double>, double, float>;

// Squares of floats that are very large or very small leave a float's range: then they are added up in double.
template <class G>
FASTLOOP_DEVICE double squares_in_double(const G* g, int count) {
  double total = 0;
  for (int i = thread_index(); i < count; i += kThreads) {
    const double value = widen(global(g)[i]);
    total += value * value;
  }
  return total;
}

// This thread's share of a chunk's sum of squares: a few squares in a float, their sums in double.
template <class G>
FASTLOOP_DEVICE double squares_in_float(const G* g, int count) {
  using T = ComputeOf<G>;
  constexpr int kLanes = Pack<G>::kCount;
  constexpr int kPacks = 4;  // in flight
  constexpr int kRound = kPacks * kThreads * kLanes;
  double total = 0;
  int done = 0;
  if (is_aligned(g)) {
    for (; done + kRound <= count; done += kRound) {
      T lanes[kPacks][kLanes];
      FASTLOOP_UNROLL
      for (int k = 0; k < kPacks; ++k) load_lanes(lanes[k], g + done + (k * kThreads + thread_index()) * kLanes);
      FASTLOOP_UNROLL
      for (int k = 0; k < kPacks; ++k) {
        T sum = 0;
        FASTLOOP_UNROLL
        for (int e = 0; e < kLanes; ++e) sum += lanes[k][e] * lanes[k][e];
        total += static_cast<double>(sum);
      }
    }
  }
  for (; done < count; done += kPacks * kThreads) {
    T value[kPacks];
    FASTLOOP_UNROLL
    for (int k = 0; k < kPacks; ++k) {
      const int i = done + k * kThreads + thread_index();
      value[k] = i < count ? static_cast<T>(widen(global(g)[i])) : T(0);
    }
    T sum = 0;
    FASTLOOP_UNROLL
    for (int k = 0; k < kPacks; ++k) sum += value[k] * value[k];
    total += static_cast<double>(sum);
  }
  return total;
}

// Every thread with its own share; which elements those are does not matter to the sum over the block, but for its
// rounding: so all threads take the same way.
template <class G>
FASTLOOP_DEVICE double squares_of(const G* g, int count) {
  const double total = squares_in_float(g, count);
  if constexpr (std::is_same_v<G, float> || std::is_same_v<G, BF16>) {
    const bool in_range = thread_index() >= count || (total > 0x1p-90 && total < 0x1p+120);  // without a share: 0
    if (!any_thread(!in_range)) return total;
    return squares_in_double(g, count);
  }
  return total;
}

// kInline: room for words that this launch delivers to the table.
template <int kInline>
struct NormParams {
  NormArgs args;
  int n_words;
  Word words[kInline];
};

template <class G, int kInline>
FASTLOOP_KERNEL(8)
norm(FASTLOOP_PARAMS(NormParams<kInline>) p) {
  const NormArgs& a = p.args;
  // The table's front, as it is or as it will be: nobody reads what this launch writes there.
  const Word* front = a.table;
  if constexpr (kInline > 1) {
    front = p.words;
    for (int i = block_index() * kThreads + thread_index(); i < p.n_words; i += block_count() * kThreads) {
      a.table[i] = p.words[i];
    }
  }
  const Word flags = front[kFlags];
  if ((flags & kMeasure) == 0) return;
  Pair mine = {0, 0};
  for (std::int64_t c = block_index(); c < a.chunks; c += block_count()) {
    const ChunkPlace place = place_of(a.table, a.layout, a.first_chunk + c);
    const Word grad = front[a.layout.grad_words() + place.tensor];
    if (grad == 0) continue;
    const Word* tensor = a.table + a.layout.tensor_words() + place.tensor * kTensorWords;
    const auto row = static_cast<std::int64_t>(tensor[kTensorRow]);
    const bool in_norm = front[a.layout.row_words() + row * kRowWords + kInNorm] != 0;
    if (!in_norm && (flags & kCheckAll) == 0) continue;
    const double squares = squares_of(as_pointer<const G>(grad) + place.offset, place.count);
    (in_norm ? mine.a : mine.b) += squares;
  }
  const Pair total = block_sum(mine);
  if (thread_index() == 0) {
    a.sums[2 * block_index()] = total.a;
    a.sums[2 * block_index() + 1] = total.b;
  }
}

// ---- pass 2

struct Decision {
  double norm, scale, clip;
  bool skip;
};

// The same in every thread of every block.
FASTLOOP_DEVICE Decision decide(const StepArgs& a) {
  const Word flags = a.table[kFlags];
  const Word scale = a.table[kScaleAddress], found = a.table[kFoundInfAddress];
  Decision d = {0, scale == 0 ? 1.0 : read_scalar(scale), 1, found != 0 && read_scalar(found) > 0};
  if ((flags & kMeasure) == 0) return d;
  Pair sum = {0, 0};
  for (std::int64_t i = thread_index(); i < a.n_sums; i += kThreads) {
    sum.a += a.sums[2 * i];
    sum.b += a.sums[2 * i + 1];
  }
  sum = block_sum(sum);
  d.norm = ::sqrt(sum.a) / ::fabs(d.scale);
  d.skip = d.skip || !(is_finite(d.norm) && is_finite(sum.b));
  const double clip = as_double(a.table[kMaxNorm]) / (d.norm + 1e-6);
  d.clip = clip < 1 ? clip : 1;
  return d;
}

template <class Rule>
struct Prepared {
  using T = typename Rule::Compute;
  Rule rule;
  T grad_factor, clip_value, ema_decay, ema_weight;
};

template <class Rule>
FASTLOOP_DEVICE Prepared<Rule> prepare(const Word* row, std::int64_t t, const Decision& d) {
  using T = typename Rule::Compute;
  double hyper[Rule::kHypers];
  FASTLOOP_UNROLL
  for (int k = 0; k < Rule::kHypers; ++k) {
    const Word address = row[kHyperAddress + k];
    hyper[k] = address == 0 ? as_double(row[kHyper + k]) : read_scalar(address);
  }
  Prepared<Rule> prepared;
  prepared.rule = Rule::prepare(hyper, t);
  prepared.grad_factor = static_cast<T>(as_double(row[kSign]) / d.scale * (row[kInNorm] != 0 ? d.clip : 1.0));
  prepared.clip_value = static_cast<T>(as_double(row[kClipValue]));
  prepared.ema_decay = static_cast<T>(as_double(row[kEmaDecay]));
  prepared.ema_weight = static_cast<T>(1.0 - as_double(row[kEmaDecay]));
  return prepared;
}

template <class Rule, class P, class G, class S, bool kHasMaster, bool kHasEma>
struct Update {
  using T = typename Rule::Compute;
  static constexpr int kStates = Rule::kStates;
  static constexpr int kNarrower = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  static constexpr int kNarrowest = kNarrower < static_cast<int>(sizeof(S)) ? kNarrower : sizeof(S);
  static constexpr int kLanes = 16 / kNarrowest;       // every access is 16 bytes or a multiple
  static constexpr int kGroups = kLanes == 4 ? 2 : 1;  // loaded before the first is used
  static constexpr int kRound = kGroups * kThreads * kLanes;
  static constexpr int kStrided = sizeof(T) == 8 ? 2 : 4;  // single elements loaded before the first is used
  // Registers that hold loaded values. The more, the fewer threads are needed to keep memory busy.
  static constexpr int kHeld = kGroups * kLanes * (2 + kStates + kHasEma) * static_cast<int>(sizeof(T) / 4);
  static constexpr int kBlocks = sizeof(T) == 8 ? 4 : kHeld <= 16 ? 8 : kHeld <= 24 ? 6 : kHeld <= 32 ? 5 : 4;

  struct Slots {
    P* param;
    G* grad;
    T* master;
    T* ema;
    S* state[kStates + 1];
  };

  static FASTLOOP_DEVICE Slots slots_of(const Word* tensor, Word grad, std::int64_t offset) {
    Slots s;
    s.param = as_pointer<P>(tensor[kTensorSlot + kParam]) + offset;
    s.grad = as_pointer<G>(grad) + offset;
    s.master = kHasMaster ? as_pointer<T>(tensor[kTensorSlot + kMaster]) + offset : nullptr;
    s.ema = kHasEma ? as_pointer<T>(tensor[kTensorSlot + kEma]) + offset : nullptr;
    FASTLOOP_UNROLL
    for (int k = 0; k < kStates; ++k) s.state[k] = as_pointer<S>(tensor[kTensorSlot + kState + k]) + offset;
    return s;
  }

  static FASTLOOP_DEVICE bool are_aligned(const Slots& s) {
    bool aligned = is_aligned(s.param) && is_aligned(s.grad);
    if constexpr (kHasMaster) aligned = aligned && is_aligned(s.master);
    if constexpr (kHasEma) aligned = aligned && is_aligned(s.ema);
    FASTLOOP_UNROLL
    for (int k = 0; k < kStates; ++k) aligned = aligned && is_aligned(s.state[k]);
    return aligned;
  }

  template <int kCount>
  struct Values {
    T p[kCount], g[kCount], ema[kCount], s[kStates + 1][kCount];
  };

  template <int kCount>
  static FASTLOOP_DEVICE void step(Values<kCount>& v, const Prepared<Rule>& c) {
    FASTLOOP_UNROLL
    for (int e = 0; e < kCount; ++e) {
      T state[kStates + 1];
      FASTLOOP_UNROLL
      for (int k = 0; k < kStates; ++k) state[k] = v.s[k][e];
      c.rule.step(v.p[e], clamp(product(v.g[e], c.grad_factor), c.clip_value), state);
      FASTLOOP_UNROLL
      for (int k = 0; k < kStates; ++k) v.s[k][e] = state[k];
      if constexpr (kHasEma) {  // of the master copy where there is one, else of the parameter as it is stored
        T seen = v.p[e];
        if constexpr (!kHasMaster) {
          P stored;
          narrow(&stored, seen);
          seen = widen(stored);
        }
        v.ema[e] = c.ema_decay * v.ema[e] + product(c.ema_weight, seen);
      }
    }
  }

  // Whole rounds of the block from the chunk's start; returns the first element that is left.
  static FASTLOOP_DEVICE int rounds(const Slots& s, int count, const Prepared<Rule>& c, bool zero_grads) {
    int done = 0;
    for (; done + kRound <= count; done += kRound) {
      Values<kLanes> v[kGroups];
      FASTLOOP_UNROLL
      for (int u = 0; u < kGroups; ++u) {
        const int i = done + (u * kThreads + thread_index()) * kLanes;
        if constexpr (kHasMaster) {
          load_lanes(v[u].p, s.master + i);
        } else {
          load_lanes(v[u].p, s.param + i);
        }
        load_lanes(v[u].g, s.grad + i);
        if constexpr (kHasEma) load_lanes(v[u].ema, s.ema + i);
        FASTLOOP_UNROLL
        for (int k = 0; k < kStates; ++k) load_lanes(v[u].s[k], s.state[k] + i);
      }
      FASTLOOP_UNROLL
      for (int u = 0; u < kGroups; ++u) {
        const int i = done + (u * kThreads + thread_index()) * kLanes;
        step(v[u], c);
        store_lanes(s.param + i, v[u].p);
        if constexpr (kHasMaster) store_lanes(s.master + i, v[u].p);
        if constexpr (kHasEma) store_lanes(s.ema + i, v[u].ema);
        FASTLOOP_UNROLL
        for (int k = 0; k < kStates; ++k) store_lanes(s.state[k] + i, v[u].s[k]);
        if (zero_grads) {
          const T zero[kLanes] = {};
          store_lanes(s.grad + i, zero);
        }
      }
    }
    return done;
  }

  // Single elements: the end of a tensor, and what is not aligned.
  static FASTLOOP_DEVICE void strided(const Slots& s, int done, int count, const Prepared<Rule>& c, bool zero_grads) {
    for (; done < count; done += kStrided * kThreads) {
      Values<kStrided> v = {};
      FASTLOOP_UNROLL
      for (int e = 0; e < kStrided; ++e) {
        const int i = done + e * kThreads + thread_index();
        if (i >= count) continue;
        if constexpr (kHasMaster) {
          v.p[e] = global(s.master)[i];
        } else {
          v.p[e] = widen(global(s.param)[i]);
        }
        v.g[e] = widen(global(s.grad)[i]);
        if constexpr (kHasEma) v.ema[e] = global(s.ema)[i];
        FASTLOOP_UNROLL
        for (int k = 0; k < kStates; ++k) v.s[k][e] = widen(global(s.state[k])[i]);
      }
      step(v, c);
      FASTLOOP_UNROLL
      for (int e = 0; e < kStrided; ++e) {
        const int i = done + e * kThreads + thread_index();
        if (i >= count) continue;
        narrow(&global(s.param)[i], v.p[e]);
        if constexpr (kHasMaster) global(s.master)[i] = v.p[e];
        if constexpr (kHasEma) global(s.ema)[i] = v.ema[e];
        FASTLOOP_UNROLL
        for (int k = 0; k < kStates; ++k) narrow(&global(s.state[k])[i], v.s[k][e]);
        if (zero_grads) narrow(&global(s.grad)[i], T(0));
      }
    }
  }
};

// The block that ends last counts the step: no other reads the counts any more.
FASTLOOP_DEVICE void count_step(const StepArgs& a, const Decision& d) {
  FASTLOOP_SHARED bool last;
  sync_block();
  if (thread_index() == 0) {
    fence();
    last = take_ticket(a.ticket, static_cast<unsigned>(block_count() - 1)) == static_cast<unsigned>(block_count() - 1);
  }
  sync_block();
  if (!last) return;
  if (!d.skip) {
    for (std::int64_t t = thread_index(); t < a.tensors; t += kThreads) {
      const std::int64_t index = a.first_tensor + t;
      if (a.table[a.layout.grad_words() + index] == 0) continue;
      const Word* tensor = a.table + a.layout.tensor_words() + index * kTensorWords;
      write_steps(tensor, read_steps(tensor) + 1);
    }
  }
  if (a.skipped != nullptr && thread_index() == 0) {
    a.result[0] = d.norm;
    a.result[1] = d.skip ? 1 : 0;
    if (d.skip) ++*a.skipped;
  }
}

template <class Rule, class P, class G, class S, bool kHasMaster, bool kHasEma>
FASTLOOP_KERNEL((Update<Rule, P, G, S, kHasMaster, kHasEma>::kBlocks))
update(FASTLOOP_PARAMS(StepArgs) a) {
  using U = Update<Rule, P, G, S, kHasMaster, kHasEma>;
  FASTLOOP_SHARED Decision d;  // in shared memory: registers are for the elements
  FASTLOOP_SHARED Prepared<Rule> shared;
  {
    const Decision mine = decide(a);
    if (thread_index() == 0) d = mine;
    sync_block();
  }
  Prepared<Rule> c = {};
  std::int64_t prepared_row = -1, prepared_steps = -1;
  for (std::int64_t chunk = a.chunks - 1 - block_index(); chunk >= 0; chunk -= block_count()) {
    const ChunkPlace place = place_of(a.table, a.layout, a.first_chunk + chunk);
    const Word grad = a.table[a.layout.grad_words() + place.tensor];
    if (grad == 0) continue;
    const bool zero_grads = (a.table[kFlags] & kZeroGrads) != 0;
    if (d.skip) {
      G* g = as_pointer<G>(grad) + place.offset;
      for (int i = thread_index(); zero_grads && i < place.count; i += kThreads)
        narrow(&global(g)[i], typename U::T(0));
      continue;
    }
    const Word* tensor = a.table + a.layout.tensor_words() + place.tensor * kTensorWords;
    const auto row = static_cast<std::int64_t>(tensor[kTensorRow]);
    const std::int64_t steps = read_steps(tensor);
    if (row != prepared_row || steps != prepared_steps) {  // the same in all threads; rare after the first chunk
      sync_block();
      if (thread_index() == 0) {
        shared = prepare<Rule>(a.table + a.layout.row_words() + row * kRowWords, steps + 1, d);
      }
      sync_block();
      c = shared;
      prepared_row = row;
      prepared_steps = steps;
    }
    const typename U::Slots slots = U::slots_of(tensor, grad, place.offset);
    const int done = U::are_aligned(slots) ? U::rounds(slots, place.count, c, zero_grads) : 0;
    U::strided(slots, done, place.count, c, zero_grads);
  }
  count_step(a, d);
}

}  // namespace device
}  // namespace fastloop
