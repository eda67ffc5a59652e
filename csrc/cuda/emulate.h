// SPDX-License-Identifier: Apache-2.0
// A device on the CPU, for tests: the threads of a block are fibers that take turns at every barrier, the blocks run
// one after the other. A barrier that only some threads reach, or a read that misses its barrier, shows here too: the
// turns go forwards and backwards in alternation.
#pragma once
#include <cmath>
#include <cstdint>

namespace fastloop {
namespace emulation {

int thread_index();
int block_index();
int block_count();
void sync_block();

// Calls body(context) in `threads` fibers for each of `blocks` blocks.
void run(int blocks, int threads, void (*body)(const void* context), const void* context);

float bf16_to_float(std::uint16_t bits);
float f16_to_float(std::uint16_t bits);
std::uint16_t float_to_bf16(float value);  // to nearest even
std::uint16_t float_to_f16(float value);

}  // namespace emulation
}  // namespace fastloop
