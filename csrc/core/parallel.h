// SPDX-License-Identifier: Apache-2.0
// Threads: the OpenMP runtime that torch has loaded already, with torch's number of threads.
#pragma once
#include <cstdint>

namespace fastloop {

// As many as torch uses, at most one per kMinElementsPerThread elements; one in a forked child, where the parent's
// OpenMP threads do not exist and a parallel region would wait for them for ever.
int thread_count(std::int64_t elements);

// Below this a second thread saves 2 us at best, and costs milliseconds when the system has taken its core: a barrier
// waits for it (bench: mlp, on a busy machine).
constexpr std::int64_t kMinElementsPerThread = 16 * 1024;

// Forbids parallel regions in children forked from now on.
void watch_forks();

}  // namespace fastloop
