# SPDX-License-Identifier: Apache-2.0
# `make bench` and `make test` each work alone on a fresh checkout: they make .venv, install, build and run.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PYTEST := $(PY) -m pytest

NATIVE_SOURCES := CMakeLists.txt cmake/nvcc.cmake $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
CPP_FILES      := $(filter csrc/%,$(NATIVE_SOURCES))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build emulated bench perf-guard aot test test-slow test-sanitize test-neon test-all lint format gpu docs wheel clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- Environment: a stamp per stage, so that nothing is installed or built twice --------------------------------

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: fastloop needs Python 3.10 or newer; '$(PYTHON)' is missing or older. Try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "make: '$(PYTHON) -m venv' failed (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: requirements-dev.txt $(VENV)/.created
	$(PY) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed pyproject.toml setup.py fastloop/_version.py $(NATIVE_SOURCES)
	$(PY) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

build: $(VENV)/.built  ## .venv with the pinned dependencies and an editable build

# Configured each time (a second): the folder is shared by the interpreters of different VENVs.
emulated: $(VENV)/.installed  ## the CUDA sources as C++, for tests on a machine without a GPU
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake -S . -B build/emulated -G Ninja --log-level=WARNING \
	  -DPython_EXECUTABLE="$(CURDIR)/$(PY)" -Dpybind11_DIR="$$($(PY) -m pybind11 --cmakedir)" \
	  -DFASTLOOP_BUILD_MODULE=OFF -DFASTLOOP_BUILD_EMULATED=ON -DFASTLOOP_WERROR=ON
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" cmake --build build/emulated --target _cuda_emulated

# ---- Measure ----------------------------------------------------------------------------------------------------

bench: build  ## the benchmark: clip + step of real models, and a real training, against torch
	$(PY) -m fastloop.bench $(ARGS)

perf-guard: build emulated  ## what must not get worse: counts, ratios; BASE=HEAD~1 compares the times of two revisions
	$(PY) -m fastloop.bench ci $(if $(BASE),--base $(BASE)) $(ARGS)

aot: build  ## the GPU kernels' machine code, against benchmarks/aot-golden.json
	$(PY) -m fastloop.bench aot --check

# ---- Test -------------------------------------------------------------------------------------------------------

test: build emulated  ## what a change must pass
	$(PYTEST) -m "not slow" $(ARGS)
	$(PY) -m fastloop.bench aot --check

test-slow: build  ## the tests marked slow
	$(PYTEST) -m slow $(ARGS)

test-sanitize: $(VENV)/.installed  ## native tests with address and undefined-behaviour sanitizers
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/test_sanitize.sh

test-neon: $(VENV)/.installed  ## native tests cross-compiled for aarch64, under emulation
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/test_neon.sh

test-all: test test-slow test-sanitize test-neon  ## everything; CI runs this

# A machine with a GPU has its own torch, and often no network: the Python that has one is used as it is.
GPU_PYTHON ?= $(shell $(PYTHON) -c 'import importlib.util, sys; sys.exit(not importlib.util.find_spec("torch"))' \
                2>/dev/null && echo $(PYTHON) || echo $(PY))

gpu:  ## on a machine with a GPU: build, tests marked gpu, compute-sanitizer, measurements; GPU_PYTHON names the Python
	$(if $(filter $(PY),$(GPU_PYTHON)),@$(MAKE) build)
	@scripts/gpu.sh $(GPU_PYTHON) $(ARGS)

# ---- Check ------------------------------------------------------------------------------------------------------

lint: $(VENV)/.installed  ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.installed  ## rewrites Python and C++ sources in the project's format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

docs: build  ## links resolve, examples run
	$(PY) scripts/check_docs.py
	$(PY) scripts/readme_table.py --check
	$(PY) scripts/gpu_results.py --check

# ---- Ship -------------------------------------------------------------------------------------------------------

wheel: $(VENV)/.installed  ## manylinux wheel of this Python, in dist/
	rm -rf dist build/raw-wheel
	FASTLOOP_CUDA_ARCHITECTURES=wheel $(PY) -m build --no-isolation --outdir build/raw-wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --exclude libgomp.so.1 -w dist build/raw-wheel/*.whl
	cp build/raw-wheel/*.tar.gz dist/
	$(PY) -m auditwheel show dist/*.whl

clean:  ## builds and caches; .venv stays
	rm -rf build dist *.egg-info fastloop/_native*.so fastloop/_cuda*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastloop tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(VENV)/.built
