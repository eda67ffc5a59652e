# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test shares: the backend, the seed, the number of threads, hypothesis' profiles."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from interpreter import replace_the_language_once_a_launch

# Without a GPU the device backends run on CPU tensors: Triton's kernels interpreted, CUDA's in an emulated build
# (csrc/cuda/emulate.h). Triton reads its variable when it is imported.
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("debug", parent=hypothesis.settings.get_profile("default"), print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

BACKENDS = ("cpu", "reference") if HAS_GPU else ("cpu", "reference", "cuda", "triton")
EMULATED = Path(__file__).resolve().parent.parent / "build" / "emulated" / "_cuda.so"


@pytest.fixture(scope="session", autouse=True)
def _emulated_cuda() -> None:
    """backend="cuda" on CPU tensors, where `make test` has built the emulation."""
    from fastloop.ops import cuda

    if not HAS_GPU and EMULATED.exists():
        spec = importlib.util.spec_from_file_location("_cuda", EMULATED)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cuda.emulate(module)


@pytest.fixture(scope="session", autouse=True)
def _interpreted_triton() -> None:
    import fastloop

    if not HAS_GPU and fastloop.backends()["triton"]["available"]:
        replace_the_language_once_a_launch()


# Interpreted kernels take tenths of a second a step. tests/test_triton.py and tests/test_device.py run them every time.
# Of the tests that every backend takes, Triton takes those of the kernels, as slow ones. What is above the kernels is
# the same for both device backends, and emulated CUDA is fast.
INTERPRETED_FILES = ("test_contract.py", "test_numerics.py", "test_master.py", "test_ema.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        triton = params.get("backend") == "triton" and item.get_closest_marker("gpu") is None
        if triton:
            item.add_marker(pytest.mark.slow)
        (dropped if triton and item.path.name not in INTERPRETED_FILES else kept).append(item)
    if dropped and not HAS_GPU:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that serves CPU tensors; skipped, with its reason, where it is missing."""
    import fastloop

    status = fastloop.backends()[request.param]
    if not status["available"]:
        pytest.skip(f"backend {request.param!r} is not available: {status['reason']}")
    return request.param


def pytest_collectstart(collector: pytest.Collector) -> None:
    """What a module draws when it is imported is the same in every run too."""
    del collector
    _seed()


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # what is under test may draw from it
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """The same random numbers for every test, whatever ran before; torch's global settings restored."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    _seed()
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture
def one_thread() -> None:
    """For small layers: two threads that wait for each other would take most of the time."""
    torch.set_num_threads(1)
