# SPDX-License-Identifier: Apache-2.0
"""A ceiling with as many streams as clip + AdamW has: one read; then four read and three of them written."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements of a program: four 16-byte accesses a thread and stream with 128 threads
STREAMS = 4
BYTES_PER_ELEMENT = 4 * (1 + 4 + 3)


@triton.jit
def read_kernel(x, sums, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + tl.program_id(0), tl.sum(tl.load(x + at, mask=at < n, other=0.0)))


@triton.jit
def update_kernel(g, p, m, v, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    sum_of_four = tl.load(g + at, mask=inside) + tl.load(p + at, mask=inside)
    second, third = tl.load(m + at, mask=inside), tl.load(v + at, mask=inside)
    tl.store(p + at, sum_of_four, mask=inside)
    tl.store(m + at, second + sum_of_four, mask=inside)
    tl.store(v + at, third - sum_of_four, mask=inside)


def build(buffers: list[Tensor]) -> Callable[[], None]:
    """Both passes over four fp32 buffers of one length, a multiple of BLOCK on a device with Triton."""
    n = buffers[0].numel()
    grid = (triton.cdiv(n, BLOCK),)
    sums = torch.empty(grid[0], device=buffers[0].device)

    def run() -> None:
        read_kernel[grid](buffers[0], sums, n, BLOCK=BLOCK)
        update_kernel[grid](*buffers, n, BLOCK=BLOCK)

    return run
