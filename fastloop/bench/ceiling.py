# SPDX-License-Identifier: Apache-2.0
"""The speed of light of this machine: how fast it moves bytes through as many streams as a case has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastloop.bench.cases import Pass, Traffic

LARGEST_STREAM = 64 * 2**20  # bytes; four such streams are 8 times a large L3 cache


@dataclass(frozen=True)
class Ceiling:
    """A callable that moves `bytes` bytes and computes next to nothing."""

    run: Callable[[], object]
    bytes: int
    method: str  # "native", or "torch" where no native module is built: then fewer streams at once


def _native_stream() -> Any:
    try:
        return getattr(import_module("fastloop._native"), "stream", None)
    except ImportError:
        return None  # built with FASTLOOP_NATIVE=OFF; `Ceiling.method` says how this was measured then


def _native_call(stream: Any, sweep: Pass, buffers: list[Tensor]) -> Callable[[], object]:
    reads = [tensor.data_ptr() for tensor in buffers[: sweep.reads]]
    writes = [tensor.data_ptr() for tensor in buffers[sweep.reads : sweep.reads + sweep.updates]]
    return partial(stream, reads, writes, buffers[0].numel())


def _torch_call(sweep: Pass, buffers: list[Tensor]) -> Callable[[], object]:
    reads, updates = buffers[: sweep.reads], buffers[sweep.reads : sweep.reads + sweep.updates]

    def run() -> None:
        for tensor in reads:
            torch.sum(tensor)
        for tensor in updates:
            tensor.mul_(1.0)

    return run


def build(traffic: Traffic) -> Ceiling:
    """A ceiling for a case: the same passes, streams and bytes, up to 64 MB a stream, in fp32.

    Streams of one pass are separate buffers; passes share them, as a case's gradients are read by both of its
    passes. The native one reads and writes all streams of a pass in one loop; the fallback, plain torch
    operations, goes through them one after another.
    """
    length = max(1, min(traffic.elements * traffic.itemsize, LARGEST_STREAM) // 4)
    width = max(sweep.reads + sweep.updates for sweep in traffic.passes)
    buffers = [torch.ones(length) for _ in range(width)]
    native = _native_stream()
    calls = [
        _native_call(native, sweep, buffers) if native else _torch_call(sweep, buffers) for sweep in traffic.passes
    ]

    def run() -> None:
        for call in calls:
            call()

    # The native calls hold addresses only: the buffers must live as long as the callable.
    run.buffers = buffers  # type: ignore[attr-defined]
    moved = 4 * length * sum(sweep.reads + 2 * sweep.updates for sweep in traffic.passes)
    return Ceiling(run, moved, "native" if native else "torch")


def streams(elements: int = LARGEST_STREAM // 4) -> dict[str, Traffic]:
    """The patterns that `python -m fastloop.bench stream` shows."""
    patterns = {
        "read 1": (Pass(1, 0),),
        "read and write 1": (Pass(0, 1),),
        "read 1, read and write 3": (Pass(1, 3),),
        "clip + AdamW: read 1; read 1, read and write 3": (Pass(1, 0), Pass(1, 3)),
    }
    return {name: Traffic(passes, elements, 4) for name, passes in patterns.items()}
