# SPDX-License-Identifier: Apache-2.0
"""Every random generator that a training draws from: seeded, captured, put back."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed Python, NumPy and torch on every device, differently for each rank.

    Raises:
        ValueError: a seed outside [0, 2**32).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"[seed_everything] seed must be an integer in [0, 2**32), got {seed!r}; pass e.g. 0")
    if rank == 0:
        python, arrays, tensors = seed, seed, seed
    else:  # far from the other ranks' and from seed + 1's
        python, arrays, tensors = (int(s) for s in numpy.random.SeedSequence([seed, rank]).generate_state(3))
    random.seed(python)
    numpy.random.seed(arrays)
    torch.manual_seed(tensors)


def capture(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, of each CUDA device and of `generators`."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "others": [generator.get_state() for generator in generators],
    }


def restore(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put back what `capture` returned; devices and generators that are no longer there are passed over."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        for device, device_state in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(device_state.cpu(), device)
    for generator, generator_state in zip(generators, state["others"], strict=False):
        generator.set_state(generator_state.cpu())


@contextmanager
def unmoved() -> Iterator[None]:
    """What is drawn inside leaves the states as they were."""
    before = capture()
    try:
        yield
    finally:
        restore(before)


def make_deterministic() -> None:
    """torch's deterministic algorithms; an operation that has none raises when it runs.

    Raises:
        RuntimeError: cuBLAS has started without the workspace that makes it deterministic.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in (":4096:8", ":16:8"):
        if torch.cuda.is_initialized():
            raise RuntimeError(
                "[Loop] deterministic=True needs CUBLAS_WORKSPACE_CONFIG=:4096:8 before CUDA is first used; set it in "
                "the environment, or make the Loop before the model moves to the GPU"
            )
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)  # cuDNN's too
    if torch.backends.cudnn.benchmark:  # may choose another algorithm in each run
        torch.backends.cudnn.benchmark = False
