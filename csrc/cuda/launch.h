// SPDX-License-Identifier: Apache-2.0
// The launches of a step, as plain C++: what csrc/bindings calls and csrc/cuda/*.cu define.
#pragma once
#include <cstdint>
#include <string>

#include "core/device_table.h"

namespace fastloop {
namespace device {

// Launch 1 of a bucket: partial sums of squares.
struct NormArgs {
  Word* table;
  TableLayout layout;
  std::int64_t first_chunk, chunks;
  double* sums;  // two for each block: squares of what is in the norm, and of what is not
};

// Launch 2 of a bucket: the update.
struct StepArgs {
  const Word* table;
  TableLayout layout;
  std::int64_t first_tensor, tensors, first_chunk, chunks;
  const double* sums;  // pairs to add up
  std::int64_t n_sums;
  unsigned* ticket;       // zero between launches
  double* result;         // norm, and 1 if the step was skipped
  std::int64_t* skipped;  // count of skipped steps; null: another bucket reports
};

// Most words that a norm launch can deliver: its parameters have 32764 bytes.
constexpr int kInlineWords = 4000;

// All return an empty string, or what went wrong, and are for the current device.
std::string launch_norm(DType grad, int blocks, void* stream, const NormArgs& args, const Word* words, int n_words);
std::string launch_update(int rule, const Storage& storage, int blocks, void* stream, const StepArgs& args);

bool serves(int rule, const Storage& storage);

// Blocks that fill the current device, of number `index`, once.
std::string update_blocks(int rule, const Storage& storage, int index, int* blocks);
std::string norm_blocks(int index, int* blocks);

// Whether the kernels can run here, and on the current device.
std::string check_runtime();
std::string check_device();

}  // namespace device
}  // namespace fastloop
