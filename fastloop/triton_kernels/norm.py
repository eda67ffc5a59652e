# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""Launch 1: partial sums of the squares of the gradients.

Program b of B adds up chunks b, b + B, ... and writes sums[b] = (in the norm, outside it). No atomics, and an order
that depends on sizes alone: the norm is bitwise the same from run to run.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .layout import (
    CHECK_ALL,
    CHUNK_ELEMENTS,
    CONTROL_WORDS,
    FLAGS,
    IN_NORM,
    MEASURE,
    ROW_WORDS,
    TENSOR_COUNT,
    TENSOR_ROW,
    TENSOR_WORDS,
)
from .memory import LANES, elements, load
from .settings import Settings

# Below this, squares that were lost to underflow in fp32 (2^-150 each, 8192 a chunk) could be seen in the sum.
SMALLEST_SUM = tl.constexpr(2.0**-100)


@triton.jit
def sum_of_squares(address, n, GRAD: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """sum g^2 over n elements, as float64. At most 4 * CHUNK_ELEMENTS / BLOCK squares are added in SUM."""
    if ALIGNED:
        n = (n // LANES) * LANES  # nothing changes but what the compiler knows
    grad = elements(address, GRAD, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], SUM)
    start = 0
    while start < n:
        i = start + lanes
        g = load(grad + i, i < n, SUM)
        total += g * g
        start += BLOCK
    fours = tl.sum(tl.reshape(total, [BLOCK // 4, 4]), axis=1)
    return tl.sum(fours.to(tl.float64), axis=0)


@triton.jit(do_not_specialize=["table", "sums", "grad_words", "tensor_words", "chunk_words", "chunks"])
def norm_kernel(
    table,  # int64 [words]
    sums,  # float64 [programs, 2]
    grad_words,  # where the parts of the table begin
    tensor_words,
    chunk_words,  # of the bucket's first chunk
    chunks,  # of the bucket
    GRAD: tl.constexpr,  # dtype
    BLOCK: tl.constexpr,
):
    SUM: tl.constexpr = tl.float64 if GRAD.is_fp64() else tl.float32
    flags = tl.load(table + FLAGS)
    squares = tl.full([], 0.0, tl.float64)
    others = tl.full([], 0.0, tl.float64)
    if (flags & MEASURE) == 0:
        chunks = 0
    c = tl.program_id(0)
    while c < chunks:
        chunk = tl.load(table + chunk_words + c)
        t = chunk >> 32
        grad = tl.load(table + grad_words + t)
        tensor = table + tensor_words + t * TENSOR_WORDS
        row = table + CONTROL_WORDS + tl.load(tensor + TENSOR_ROW) * ROW_WORDS
        in_norm = tl.load(row + IN_NORM) != 0
        if (grad != 0) & (in_norm | ((flags & CHECK_ALL) != 0)):
            first = (chunk & 0xFFFFFFFF) * CHUNK_ELEMENTS
            n = tl.minimum(tl.load(tensor + TENSOR_COUNT) - first, CHUNK_ELEMENTS).to(tl.int32)
            grad += first * (GRAD.primitive_bitwidth // 8)
            aligned = ((grad & 15) == 0) & (n % LANES == 0)
            s = tl.full([], 0.0, tl.float64)
            if aligned:
                s = sum_of_squares(grad, n, GRAD, SUM, BLOCK, True)
            # Unaligned, or beyond the range of fp32 (or not finite): in double, where no square over- or underflows.
            if not (aligned & (s > SMALLEST_SUM) & (s < float("inf"))):
                s = sum_of_squares(grad, n, GRAD, tl.float64, BLOCK // 4, False)
            squares += tl.where(in_norm, s, 0.0)
            others += tl.where(in_norm, 0.0, s)
        c += tl.num_programs(0)
    tl.store(sums + 2 * tl.program_id(0), squares)
    tl.store(sums + 2 * tl.program_id(0) + 1, others)


def norm_constants(grad: tl.dtype, settings: Settings) -> dict[str, Any]:
    """What the kernel is compiled for."""
    return {"GRAD": grad, "BLOCK": settings.norm_block(grad.primitive_bitwidth // 8)}
