// SPDX-License-Identifier: Apache-2.0
#include "core/parallel.h"

#include <omp.h>
#include <pthread.h>

#include <algorithm>

namespace fastloop {
namespace {

bool forked = false;

void mark_forked() { forked = true; }

}  // namespace

void watch_forks() { pthread_atfork(nullptr, nullptr, &mark_forked); }

int thread_count(std::int64_t elements) {
  if (forked || omp_in_parallel()) return 1;
  const std::int64_t useful = std::max<std::int64_t>(1, elements / kMinElementsPerThread);
  return static_cast<int>(std::min<std::int64_t>(omp_get_max_threads(), useful));
}

}  // namespace fastloop
