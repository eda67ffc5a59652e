# SPDX-License-Identifier: Apache-2.0
# `make bench` and `make test` each work alone on a fresh checkout: they make .venv, install, build and run.

PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PYTEST := $(PY) -m pytest

NATIVE_SOURCES := CMakeLists.txt $(shell find csrc -name '*.h' -o -name '*.cpp' 2>/dev/null)
CPP_FILES      := $(filter csrc/%,$(NATIVE_SOURCES))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build bench perf-guard test test-slow test-sanitize test-neon test-all lint format gpu docs wheel clean

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

# ---- Measure ----------------------------------------------------------------------------------------------------

bench: build  ## the benchmark: clip + step of real models, and a real training, against torch
	$(PY) -m fastloop.bench $(ARGS)

perf-guard: build  ## what must never get worse and does not depend on the machine's mood
	$(PY) -m fastloop.bench guard

# ---- Test -------------------------------------------------------------------------------------------------------

test: build  ## what a change must pass
	$(PYTEST) -m "not slow" $(ARGS)

test-slow: build  ## the tests marked slow
	$(PYTEST) -m slow $(ARGS)

test-sanitize: $(VENV)/.installed  ## native tests with address and undefined-behaviour sanitizers
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/test_sanitize.sh

test-neon: $(VENV)/.installed  ## native tests cross-compiled for aarch64, under emulation
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" scripts/test_neon.sh

test-all: test test-slow test-sanitize test-neon  ## everything; CI runs this

gpu: build  ## tests that need a CUDA device
	@$(PY) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || \
	  { echo "make gpu: torch sees no CUDA device on this machine. This version of fastloop has CPU kernels only;" \
	         "the GPU backends come in later releases." >&2; exit 1; }
	$(PYTEST) -m gpu $(ARGS)

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

# ---- Ship -------------------------------------------------------------------------------------------------------

wheel: $(VENV)/.installed  ## manylinux wheel of this Python, in dist/
	rm -rf dist build/raw-wheel
	$(PY) -m build --no-isolation --outdir build/raw-wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --exclude libgomp.so.1 -w dist build/raw-wheel/*.whl
	cp build/raw-wheel/*.tar.gz dist/
	$(PY) -m auditwheel show dist/*.whl

clean:  ## builds and caches; .venv stays
	rm -rf build dist *.egg-info fastloop/_native*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastloop tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f $(VENV)/.built
