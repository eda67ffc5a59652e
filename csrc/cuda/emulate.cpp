// SPDX-License-Identifier: Apache-2.0
#include "cuda/emulate.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

namespace fastloop {
namespace emulation {
namespace {

constexpr std::size_t kStackBytes = 64 * 1024;

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  int barriers = 0;
};

struct State {
  std::vector<Fiber> fibers;
  jmp_buf scheduler;
  int thread = 0, block = 0, blocks = 0;
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
};
State state;

void enter() {
  state.body(state.context);
  state.fibers[static_cast<std::size_t>(state.thread)].done = true;
  _longjmp(state.scheduler, 1);
}

void turn(int thread) {
  Fiber& fiber = state.fibers[static_cast<std::size_t>(thread)];
  if (fiber.done) return;
  state.thread = thread;
  if (_setjmp(state.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void run_block(int threads) {
  for (Fiber& fiber : state.fibers) {
    fiber.started = fiber.done = false;
    fiber.barriers = 0;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStackBytes;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &enter, 0);
  }
  for (bool forwards = true;; forwards = !forwards) {
    for (int i = 0; i < threads; ++i) turn(forwards ? i : threads - 1 - i);
    const Fiber& first = state.fibers.front();
    for (const Fiber& fiber : state.fibers) {
      if (fiber.done != first.done || fiber.barriers != first.barriers) {
        std::fprintf(stderr, "emulated device: the threads of block %d do not meet at one barrier\n", state.block);
        std::abort();
      }
    }
    if (first.done) return;
  }
}

}  // namespace

int thread_index() { return state.thread; }
int block_index() { return state.block; }
int block_count() { return state.blocks; }

void sync_block() {
  Fiber& fiber = state.fibers[static_cast<std::size_t>(state.thread)];
  ++fiber.barriers;
  if (_setjmp(fiber.resume) == 0) _longjmp(state.scheduler, 1);
}

void run(int blocks, int threads, void (*body)(const void*), const void* context) {
  state.fibers.resize(static_cast<std::size_t>(threads));
  for (Fiber& fiber : state.fibers) {
    if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
  }
  state.body = body;
  state.context = context;
  state.blocks = blocks;
  for (state.block = 0; state.block < blocks; ++state.block) run_block(threads);
}

float bf16_to_float(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

std::uint16_t float_to_bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float f16_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  float value;
  if (exponent == 31) {
    value = mantissa == 0 ? INFINITY : NAN;
  } else if (exponent == 0) {
    value = std::ldexp(static_cast<float>(mantissa), -24);
  } else {
    value = std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -value : value;
}

std::uint16_t float_to_f16(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (value != value) return sign | 0x7e00;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent = -13;
  if (size != 0) std::frexp(size, &exponent);
  if (exponent < -13) exponent = -13;                             // subnormal: one fixed step of 2^-24
  const float step = std::ldexp(1.0f, exponent - 11);             // ulp at this size
  const float steps = std::nearbyint(size / step);                // to nearest even; up to 2048
  const int base = exponent == -13 ? 0 : (exponent + 13) * 1024;  // bits of 2^(exponent - 1), less 1024
  return static_cast<std::uint16_t>(sign | (base + static_cast<int>(steps)));
}

}  // namespace emulation
}  // namespace fastloop
