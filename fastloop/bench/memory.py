# SPDX-License-Identifier: Apache-2.0
"""Memory of a step: what it keeps, what it takes on top while it runs, how many operations allocate.

Counted from the allocator's events, not from the process's size: the same on every machine and in every run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Bytes held between steps (parameters, gradients, states), bytes on top during one, allocating operations."""

    resident_bytes: int
    transient_bytes: int
    allocations: int

    @property
    def peak_bytes(self) -> int:
        return self.resident_bytes + self.transient_bytes


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and mappings, in their order; anything else is passed over."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for each in value:
            yield from tensors_in(each)


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of `tensors`."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def _silenced_stderr() -> Iterator[None]:
    """The profiler writes to file descriptor 2 when it starts, stops, and meets memory that is older than it."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def timeline(call: Callable[[], object]) -> list[tuple[str, int]]:
    """(name, bytes allocated less bytes freed) of each operation of `call` on the CPU, in the order of their ends."""
    profiler: Any = torch.autograd.profiler.profile(use_kineto=False, profile_memory=True)
    with _silenced_stderr(), profiler:
        call()
    ordered = sorted(profiler.function_events, key=lambda event: (event.time_range.end, event.self_cpu_memory_usage))
    return [(event.name, event.self_cpu_memory_usage) for event in ordered]


def allocated(operations: Iterable[tuple[str, int]]) -> tuple[int, int]:
    """Of a timeline: bytes on top at the highest point, and how many operations allocate."""
    held = peak = allocations = 0
    for _, change in operations:
        held += change
        peak = max(peak, held)
        allocations += change > 0
    return peak, allocations


def measure(step: Callable[[], object], parameters: list[Tensor], optimizer: Any) -> Memory:
    """Profile one step. Kernels that allocate outside torch's allocator are not seen."""
    peak, allocations = allocated(timeline(step))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    states = list(tensors_in(list(getattr(optimizer, "state", {}).values())))
    return Memory(resident_bytes([*parameters, *gradients, *states]), peak, allocations)
