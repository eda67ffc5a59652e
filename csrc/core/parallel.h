// SPDX-License-Identifier: Apache-2.0
// Threads: the OpenMP runtime that torch has loaded already, with torch's number of threads.
#pragma once
#include <cstdint>

namespace fastloop {

// As many as torch uses, at most one per kMinElementsPerThread elements; one in a forked child, where the parent's
// OpenMP threads do not exist and a parallel region would wait for them for ever.
int thread_count(std::int64_t elements);

// A second thread costs about 2 us to wake and saves about 1 us per 4 Ki elements (bench: mlp).
constexpr std::int64_t kMinElementsPerThread = 4096;

// Forbids parallel regions in children forked from now on.
void watch_forks();

}  // namespace fastloop
