// SPDX-License-Identifier: Apache-2.0
// A plan as kernels on a device read it: one array of 64-bit words, built once, of which the front changes from step to
// step.
//
//   controls | rows | gradient addresses    what a step may change: sent when it did
//   tensors | chunks                        fixed
//
// The layout is shared by csrc/cuda and fastloop/triton_kernels/layout.py (a test compares the two). Doubles are stored
// by their bits.
#pragma once
#include <cstdint>
#include <vector>

#include "core/host_device.h"
#include "core/plan.h"

namespace fastloop {

using Word = std::uint64_t;

// 8 Ki elements: four rounds of a block of 256 threads with eight elements each.
constexpr std::int64_t kDeviceChunkElements = 8 * 1024;

enum ControlWord : int {
  kFlags,            // bits of ControlFlag
  kMaxNorm,          // double; +inf: measured, never clipped
  kScaleAddress,     // scalar that the gradients were multiplied by; 0 for none
  kFoundInfAddress,  // scalar, above 0: skip; 0 for none
  kControlWords
};
enum ControlFlag : Word {
  kMeasure = 1,    // pass 1 is wanted
  kCheckAll = 2,   // pass 1 also reads the gradients of rows outside the norm, to find what is not finite
  kZeroGrads = 4,  // zero the gradients, on a skipped step too
};

constexpr int kMaxHypers = 8;  // of which a rule has at most 7, see TableLayout::scale_word
enum RowWord : int {
  kHyper,                               // kMaxHypers doubles
  kHyperAddress = kHyper + kMaxHypers,  // kMaxHypers addresses of scalars on the device; 0: the number holds
  kSign = kHyperAddress + kMaxHypers,   // double, -1 to maximize
  kInNorm,                              // 1: in the global norm and clipped by it
  kClipValue,                           // double, +inf for none
  kEmaDecay,                            // double
  kRowWords
};
constexpr Word kIsDouble = 1;  // low bit of the address of a float64 scalar; float32 without

enum TensorWord : int {
  kTensorSlot,  // kSlots addresses by Slot, 0 where absent; that of the gradient is elsewhere
  kTensorCount = kTensorSlot + kSlots,
  kTensorRow,
  kTensorStep,   // address of torch's scalar (kIsDouble if float64); 0 for rules that publish none
  kTensorSteps,  // address of our int64 count of updates
  kTensorWords = 12
};
static_assert(kTensorSteps < kTensorWords, "raise kTensorWords");

// The gradient address of a parameter that has a gradient without elements: it is stepped, and never read.
constexpr Word kEmptyGrad = 16;

// A chunk is one word: tensor << 32 | index of the chunk in its tensor. Its offset, index * kDeviceChunkElements, is
// 64 bits wide.
constexpr Word pack_chunk(std::int64_t tensor, std::int64_t index) {
  return static_cast<Word>(tensor) << 32 | static_cast<Word>(index);
}

// Where the parts begin, and where the number is that gradients were multiplied by if it is no tensor: kScaleAddress
// then leads to the first row's last hyperparameter, which no rule has.
struct TableLayout {
  std::int64_t rows, tensors, chunks;

  FASTLOOP_HOST_DEVICE std::int64_t row_words() const { return kControlWords; }
  FASTLOOP_HOST_DEVICE std::int64_t scale_word() const { return row_words() + kHyper + kMaxHypers - 1; }
  FASTLOOP_HOST_DEVICE std::int64_t grad_words() const { return kControlWords + rows * kRowWords; }
  FASTLOOP_HOST_DEVICE std::int64_t tensor_words() const { return grad_words() + tensors; }  // = words that may change
  FASTLOOP_HOST_DEVICE std::int64_t chunk_words() const { return tensor_words() + tensors * kTensorWords; }
  FASTLOOP_HOST_DEVICE std::int64_t all_words() const { return chunk_words() + chunks; }
};

// Parameters of one rule and one combination of dtypes: what one pair of launches serves.
struct Bucket {
  int rule = 0;
  Storage storage{};
  int kind = 0;  // where its norm is summed: parameters of different kinds are never in one bucket
  std::int64_t first_tensor = 0, tensors = 0, first_chunk = 0, chunks = 0;
};

class DeviceTable {
 public:
  // Orders the parameters by bucket (stable). kinds[i] belongs to parameters[i].
  DeviceTable(const std::vector<Parameter>& parameters, const std::vector<int>& kinds, std::int64_t rows);

  const TableLayout& layout() const { return layout_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  const std::vector<Word>& words() const { return words_; }

  // Writes what this step says; controls.grad_scale matters where scale_address leads to scale_word(). Returns whether
  // a word changed since the last call.
  bool refresh(const StepControls& controls, Word scale_address, Word found_inf_address, const std::vector<Row>& rows,
               const std::vector<std::vector<Word>>& hyper_addresses, const std::vector<Parameter>& parameters);

 private:
  TableLayout layout_{};
  std::vector<Bucket> buckets_;
  std::vector<std::int64_t> order_;  // table position -> index in parameters
  std::vector<Word> words_;
  bool fresh_ = true;
};

}  // namespace fastloop
