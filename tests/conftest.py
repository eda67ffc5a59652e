# SPDX-License-Identifier: Apache-2.0
"""Fixtures that every test shares: the backend, the seed, the number of threads, hypothesis' profiles."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "default",
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("debug", parent=hypothesis.settings.get_profile("default"), print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

CPU_BACKENDS = ("cpu", "reference")


@pytest.fixture(params=CPU_BACKENDS)
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
