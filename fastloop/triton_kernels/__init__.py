# SPDX-License-Identifier: Apache-2.0
"""The two launches of a step as Triton kernels: for CUDA, ROCm and XPU devices, with no compiler installed.

The kernels read the table of csrc/core/device_table.h, addresses included. Importing this package imports Triton;
TRITON_INTERPRET=1, set before, runs the kernels on CPU tensors, for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .layout import TableLayout
from .memory import INTERPRETED
from .norm import norm_constants, norm_kernel
from .rules import RULES
from .settings import programs, settings_for
from .update import update_constants, update_kernel

INLINE_WORDS = 0  # words that a norm launch can deliver to the table

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
# param -> grads; float64 apart
GRADS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
}


def _uncounted() -> None:
    """Nobody counts launches."""


# Called at every launch. What lies above sets it, to fastloop.ops.launches.count_launch.
on_launch: Callable[[], None] = _uncounted


def serves(rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype, master: bool, ema: bool) -> bool:
    """Whether there is a kernel for this storage: what csrc/cpu/loops.h serves."""
    if rule not in RULES:
        return False
    if param == torch.float64:
        return grad == state == torch.float64 and not master
    if grad not in GRADS.get(param, ()):
        return False
    if master:
        return param != torch.float32 and state == torch.float32
    return state in (torch.float32, torch.bfloat16)


def blocks(device: torch.device) -> int:
    """Programs of one launch, at most."""
    return programs(device)


def bucket(spec: Any) -> Launches:
    """The launches of one bucket, a fastloop.ops.launches.BucketSpec.

    Raises:
        RuntimeError: kernels that are interpreted, and tensors on a device; or the reverse.
    """
    if INTERPRETED.value != (spec.device.type == "cpu"):  # the table's addresses would be followed all the same
        how = "interpreted, on CPU tensors" if INTERPRETED.value else "compiled"
        raise RuntimeError(f"[triton] the kernels are {how} here (TRITON_INTERPRET), got tensors on {spec.device}")
    return Launches(spec)


class Launches:
    """Everything that a launch needs, prepared once: a step allocates nothing and asks the device for nothing."""

    def __init__(self, spec: Any) -> None:
        settings, options = settings_for(spec.device)
        layout = TableLayout(spec.rows, spec.tensors, spec.chunks)
        parts = (layout.grad_words, layout.tensor_words, layout.chunk_words + spec.first_chunk, spec.bucket_chunks)
        param, grad, state = (DTYPES[dtype] for dtype in (spec.param, spec.grad, spec.state))
        reports = spec.skipped is not None
        skipped = spec.skipped if reports else spec.table  # of its type; never written
        self._device = spec.device
        self._norm = norm_kernel[(len(spec.sums),)]
        self._norm_args = (spec.table, spec.sums, *parts)
        self._norm_constants = norm_constants(grad, settings) | options
        self._update = update_kernel[(max(1, min(spec.bucket_chunks, blocks(spec.device))),)]
        self._update_front = (spec.table,)
        self._update_rest = (spec.ticket, spec.result, skipped)
        self._update_parts = (*parts, spec.first_tensor, spec.bucket_tensors)
        self._update_constants = (
            update_constants(spec.rule, param, grad, state, spec.master, spec.ema, reports, settings) | options
        )

    def _guard(self) -> contextlib.AbstractContextManager[Any]:
        """Triton launches on the current device."""
        if self._device.type == "cpu":
            return contextlib.nullcontext()
        return torch.get_device_module(self._device).device(self._device)

    def norm(self, words: int, n_words: int) -> None:
        """Launch 1: partial sums of squares. Delivers no words."""
        if n_words > INLINE_WORDS:
            raise ValueError(f"[triton] norm() delivers {INLINE_WORDS} words, got {n_words}; copy them to the table")
        on_launch()
        with self._guard():
            self._norm(*self._norm_args, **self._norm_constants)

    def update(self, sums: Tensor) -> None:
        """Launch 2: the update, with the norm that the rows of `sums` (float64 [n, 2]) add up to."""
        on_launch()
        args = (*self._update_front, sums, *self._update_rest, len(sums), *self._update_parts)
        with self._guard():
            self._update(*args, **self._update_constants)
