# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test shares: the backend, the seed, the number of threads, hypothesis' profiles."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Interpreted kernels take tenths of a second a step: all that runs on every backend is slow there.

    tests/test_triton.py and tests/test_device.py run them in every test run.
    """
    for item in items:
        if getattr(item, "callspec", None) is not None and item.callspec.params.get("backend") == "triton":
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that serves CPU tensors; skipped, with its reason, where it is missing."""
    import fastloop

    status = fastloop.backends()[request.param]
    if not status["available"]:
        pytest.skip(f"backend {request.param!r} is not available: {status['reason']}")
    return request.param


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """The same random numbers for every test, whatever ran before; torch's global settings restored."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
