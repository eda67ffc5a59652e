#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The native tests cross-compiled for aarch64 and run under qemu-user: proof for NEON on a machine without it.
set -euo pipefail
cd "$(dirname "$0")/.."

build=build/neon
sysroot=/usr/aarch64-linux-gnu # where Debian's cross packages put the aarch64 runtime libraries
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
  if ! command -v "$tool" >/dev/null; then
    echo "skipped: emulated NEON tests need $tool (apt-get install g++-aarch64-linux-gnu qemu-user)"
    exit 0
  fi
done

cmake -S . -B "$build" -G Ninja -DFASTLOOP_BUILD_MODULE=OFF -DFASTLOOP_BUILD_TESTS=ON -DFASTLOOP_WERROR=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;$sysroot"
cmake --build "$build"
ctest --test-dir "$build" --output-on-failure
