#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Everything that needs a GPU: build, tests marked gpu, compute-sanitizer, measurements. `make gpu` runs it.
#
# scripts/gpu.sh PYTHON [arguments of `bench gpu`]    PYTHON must have torch, pybind11, cmake, ninja, pytest, hypothesis
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:?usage: scripts/gpu.sh PYTHON [arguments of bench gpu]}
shift

section() { printf '\n==== %s (%d s)\n' "$1" "$SECONDS"; }

section "build"
if "$python" -c 'import setuptools, sys; sys.exit(int(setuptools.__version__.split(".")[0]) < 77)'; then
  FASTLOOP_CUDA=ON "$python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
else # cannot read pyproject.toml, and there is no network to get a newer one: the modules are put in place
  build=build/gpu
  cmake -S . -B $build -G Ninja --log-level=NOTICE -DFASTLOOP_CUDA=ON \
    -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)"
  cmake --build $build --target _native _cuda
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  for module in _native _cuda; do cp $build/$module.so "fastloop/$module$suffix"; done
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
section "collection"
"$python" -m pytest --collect-only -q -m gpu | tail -n 2

section "device"
"$python" - <<'PY'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("make gpu: torch sees no CUDA device here: the build and the collection above are all that could be done.")
import fastloop

print(torch.cuda.get_device_name(), "torch", torch.__version__)
for name, status in fastloop.backends().items():
    print(f"{name}: {status['reason']}")
PY

# All parts run, whatever one of them finds; what failed is told at the end. Tests of one backend have their own limit,
# so that ten minutes are enough for everything.
failed=()
limit=${GPU_TEST_SECONDS:-150}

section "tests of the CUDA kernels"
timeout "$limit" "$python" -m pytest -q -m gpu -k "not triton" || failed+=("CUDA tests")

section "measurements"
"$python" -m fastloop.bench gpu "$@" || failed+=("measurements")

section "tests of the Triton kernels"
timeout "$limit" "$python" -m pytest -q -m gpu -k triton || failed+=("Triton tests")

section "compute-sanitizer"
toolkit=${CUDA_HOME:-/usr/local/cuda}
sanitizer=$(PATH="$PATH:$toolkit/bin:$toolkit/compute-sanitizer" command -v compute-sanitizer || true)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
for tool in memcheck racecheck; do
  # torch's own kernels are not what is asked.
  only=()
  if [ "$tool" = racecheck ]; then only=(--kernel-name "kns=fastloop" --kernel-name "kns=_kernel"); fi
  if [ -z "$sanitizer" ]; then
    echo "skipped: $tool: compute-sanitizer is neither on PATH nor in $toolkit"
  # Every tensor an allocation of its own, so that an access one element too far is seen.
  elif PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 120 "$sanitizer" --tool "$tool" "${only[@]}" --report-api-errors no \
      --error-exitcode 9 "$python" scripts/gpu_sanitize.py >"$log" 2>&1; then
    echo "$tool: $(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$log" || tail -n 1 "$log")"
    grep -E '^(skipped|cuda|triton):' "$log" || true
  elif grep -q "Device not supported" "$log"; then
    echo "skipped: $tool: compute-sanitizer does not support this device here"
  else
    tail -n 60 "$log"
    failed+=("compute-sanitizer $tool")
  fi
done

section "done"
if [ ${#failed[@]} -gt 0 ]; then
  printf 'make gpu: failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
