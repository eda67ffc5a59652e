// SPDX-License-Identifier: Apache-2.0
#include "core/device_table.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <tuple>

namespace fastloop {
namespace {

Word bits_of(double value) {
  Word bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

Word address_of(const void* pointer) { return reinterpret_cast<Word>(pointer); }

auto bucket_key(const Parameter& p, int kind) {
  const Storage& s = p.storage;
  return std::make_tuple(kind, p.rule, s.param, s.grad, s.state, s.master, s.ema);
}

}  // namespace

DeviceTable::DeviceTable(const std::vector<Parameter>& parameters, const std::vector<int>& kinds, std::int64_t rows)
    : order_(parameters.size()) {
  std::iota(order_.begin(), order_.end(), 0);
  auto key = [&](std::int64_t i) {
    return bucket_key(parameters[static_cast<std::size_t>(i)], kinds[static_cast<std::size_t>(i)]);
  };
  std::stable_sort(order_.begin(), order_.end(), [&](std::int64_t a, std::int64_t b) { return key(a) < key(b); });

  std::vector<Word> chunks;
  for (std::size_t t = 0; t < order_.size(); ++t) {
    const Parameter& p = parameters[static_cast<std::size_t>(order_[t])];
    if (t == 0 || key(order_[t]) != key(order_[t - 1])) {
      Bucket next;
      next.rule = p.rule;
      next.storage = p.storage;
      next.kind = kinds[static_cast<std::size_t>(order_[t])];
      next.first_tensor = static_cast<std::int64_t>(t);
      next.first_chunk = static_cast<std::int64_t>(chunks.size());
      buckets_.push_back(next);
    }
    const std::int64_t count = (p.count + kDeviceChunkElements - 1) / kDeviceChunkElements;
    for (std::int64_t c = 0; c < count; ++c) chunks.push_back(pack_chunk(static_cast<std::int64_t>(t), c));
    ++buckets_.back().tensors;
    buckets_.back().chunks += count;
  }
  layout_ = {rows, static_cast<std::int64_t>(order_.size()), static_cast<std::int64_t>(chunks.size())};
  words_.assign(static_cast<std::size_t>(layout_.all_words()), 0);
  std::copy(chunks.begin(), chunks.end(), words_.begin() + layout_.chunk_words());
  for (std::size_t t = 0; t < order_.size(); ++t) {
    const Parameter& p = parameters[static_cast<std::size_t>(order_[t])];
    Word* tensor = words_.data() + layout_.tensor_words() + static_cast<std::int64_t>(t) * kTensorWords;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot != kGrad) tensor[kTensorSlot + slot] = address_of(p.slot[static_cast<std::size_t>(slot)]);
    }
    tensor[kTensorCount] = static_cast<Word>(p.count);
    tensor[kTensorRow] = static_cast<Word>(p.row);
    tensor[kTensorStep] = address_of(p.step_address) | (p.step_dtype == DType::kF64 ? kIsDouble : 0);
    if (p.step_address == nullptr) tensor[kTensorStep] = 0;
    tensor[kTensorSteps] = address_of(p.steps_address);
  }
}

bool DeviceTable::refresh(const StepControls& controls, Word scale_address, Word found_inf_address,
                          const std::vector<Row>& rows, const std::vector<std::vector<Word>>& hyper_addresses,
                          const std::vector<Parameter>& parameters) {
  bool changed = fresh_;
  fresh_ = false;
  auto put = [&](std::int64_t at, Word value) {
    Word& word = words_[static_cast<std::size_t>(at)];
    changed = changed || word != value;
    word = value;
  };
  Word flags = 0;
  if (controls.measure) flags |= kMeasure;
  if (controls.check_all) flags |= kCheckAll;
  if (controls.zero_grads) flags |= kZeroGrads;
  put(kFlags, flags);
  put(kMaxNorm, bits_of(controls.max_norm));
  put(kScaleAddress, scale_address);
  put(kFoundInfAddress, found_inf_address);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const std::int64_t at = layout_.row_words() + static_cast<std::int64_t>(r) * kRowWords;
    for (std::size_t k = 0; k < rows[r].hyper.size(); ++k) {
      const auto offset = static_cast<std::int64_t>(k);
      put(at + kHyper + offset, bits_of(rows[r].hyper[k]));
      put(at + kHyperAddress + offset, hyper_addresses[r][k]);
    }
    put(at + kSign, bits_of(rows[r].maximize ? -1.0 : 1.0));
    put(at + kInNorm, rows[r].in_norm ? 1 : 0);
    put(at + kClipValue, bits_of(rows[r].clip_value));
    put(at + kEmaDecay, bits_of(rows[r].ema_decay));
  }
  put(layout_.scale_word(), bits_of(controls.grad_scale));
  for (std::size_t t = 0; t < order_.size(); ++t) {
    const Parameter& p = parameters[static_cast<std::size_t>(order_[t])];
    const Word grad = p.count == 0 ? kEmptyGrad : address_of(p.slot[kGrad]);
    put(layout_.grad_words() + static_cast<std::int64_t>(t), p.active ? grad : 0);
  }
  return changed;
}

}  // namespace fastloop
