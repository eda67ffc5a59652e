#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The native tests under AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/sanitize
cmake -S . -B "$build" -G Ninja -DFASTLOOP_BUILD_MODULE=OFF -DFASTLOOP_BUILD_TESTS=ON -DFASTLOOP_WERROR=ON \
  -DFASTLOOP_SANITIZE=address,undefined
cmake --build "$build"
# libgomp keeps its thread pool until exit, which the leak checker cannot tell from a leak.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
ctest --test-dir "$build" --output-on-failure
