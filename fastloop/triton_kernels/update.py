# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs, disable-error-code="assignment"
"""Launch 2: the update of every parameter of a bucket.

Each program finishes the norm, then walks its chunks backwards: what launch 1 read last is still in the cache.

    g   = grad * sign / scale * clip         then clipped by value
    p, s = rule.step(p, g, s)                p: the master copy where there is one
    ema = decay*ema + (1 - decay)*p          p as it was stored

The program that finishes last counts the step.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .layout import (
    CHUNK_ELEMENTS,
    CLIP_VALUE,
    CONTROL_WORDS,
    EMA,
    EMA_DECAY,
    FLAGS,
    FOUND_INF_ADDRESS,
    IN_NORM,
    IS_DOUBLE,
    MASTER,
    MAX_NORM,
    MEASURE,
    PARAM,
    ROW_WORDS,
    SCALE_ADDRESS,
    SIGN,
    STATE,
    TENSOR_COUNT,
    TENSOR_ROW,
    TENSOR_STEP,
    TENSOR_STEPS,
    TENSOR_WORDS,
    ZERO_GRADS,
)
from .memory import LANES, double, elements, load, narrow, scalar, widen
from .rules import RULES
from .settings import Settings

# Rows of `sums`, or tensors to be counted, that a program takes at once.
MANY = tl.constexpr(256)


@triton.jit
def decide(table, sums, n_sums):
    """(norm, clip factor, 1 / gradient scale, whether to skip), the same in every program."""
    measure = (tl.load(table + FLAGS) & MEASURE) != 0
    n = tl.where(measure, n_sums, 0)
    lanes = tl.arange(0, MANY)
    squares = tl.zeros([MANY], tl.float64)
    others = tl.zeros([MANY], tl.float64)
    start = 0
    while start < n:
        i = start + lanes
        squares += tl.load(sums + 2 * i, mask=i < n, other=0.0)
        others += tl.load(sums + 2 * i + 1, mask=i < n, other=0.0)
        start += MANY
    squares_sum = tl.sum(squares, axis=0)
    others_sum = tl.sum(others, axis=0)
    found_inf = scalar(tl.load(table + FOUND_INF_ADDRESS), 0.0) > 0
    inv_scale = 1.0 / scalar(tl.load(table + SCALE_ADDRESS), 1.0)
    norm = tl.sqrt(squares_sum) * tl.abs(inv_scale)
    infinity = float("inf")
    finite = (squares_sum < infinity) & (others_sum < infinity) & (norm < infinity)  # false for NaN
    skip = found_inf | (measure & (finite == 0))
    bound = double(table + MAX_NORM) / (norm + 1e-6)
    clip = tl.where(measure & (bound < 1.0), bound, 1.0)
    return norm, clip, inv_scale, skip


@triton.jit
def count_of(tensor, inside):
    """Updates done: our count, or torch's `step` where a hand has changed it. Scalars, or vectors of tensors."""
    done = tl.load(tl.load(tensor + TENSOR_STEPS, mask=inside, other=0).to(tl.pointer_type(tl.int64)), mask=inside)
    address = tl.load(tensor + TENSOR_STEP, mask=inside, other=0)
    wide = (address & IS_DOUBLE) != 0
    known = tl.where(wide, done.to(tl.float64), done.to(tl.float32).to(tl.float64))
    published = scalar(address, known)
    return tl.where(published == known, done, published.to(tl.int64))


@triton.jit
def sweep(
    slots,  # addresses of param, grad, master, ema, states; 0 where absent
    n,
    h,
    grad_factor,
    clip_value,
    ema_decay,
    ema_weight,
    zero_grads,
    STEP: tl.constexpr,
    STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The update of n elements."""
    COMPUTE: tl.constexpr = tl.float64 if PARAM_DTYPE.is_fp64() else tl.float32
    if ALIGNED:
        n = (n // LANES) * LANES  # nothing changes but what the compiler knows
    params = elements(slots[0], PARAM_DTYPE, ALIGNED)
    grads = elements(slots[1], GRAD_DTYPE, ALIGNED)
    masters = elements(slots[2], COMPUTE, ALIGNED)
    emas = elements(slots[3], COMPUTE, ALIGNED)
    lanes = tl.arange(0, BLOCK)
    start = 0
    while start < n:
        i = start + lanes
        inside = i < n
        if HAS_MASTER:
            p = load(masters + i, inside, COMPUTE)
        else:
            p = load(params + i, inside, COMPUTE)
        g = load(grads + i, inside, COMPUTE) * grad_factor
        g = tl.where(g > clip_value, clip_value, g)  # a NaN stays one
        g = tl.where(g < -clip_value, -clip_value, g)
        s = ()
        for k in tl.static_range(STATES):
            s = s + (load(elements(slots[4 + k], STATE_DTYPE, ALIGNED) + i, inside, COMPUTE),)

        p, s = STEP(p, g, s, h)

        for k in tl.static_range(STATES):
            tl.store(elements(slots[4 + k], STATE_DTYPE, ALIGNED) + i, narrow(s[k], STATE_DTYPE), mask=inside)
        stored = narrow(p, PARAM_DTYPE)
        tl.store(params + i, stored, mask=inside)
        if HAS_MASTER:
            tl.store(masters + i, p, mask=inside)
        if HAS_EMA:
            if HAS_MASTER:
                seen = p
            else:
                seen = widen(stored, COMPUTE)
            average = load(emas + i, inside, COMPUTE)
            tl.store(emas + i, ema_decay * average + ema_weight * seen, mask=inside)
        if zero_grads:
            tl.store(grads + i, tl.zeros([BLOCK], GRAD_DTYPE), mask=inside)
        start += BLOCK


@triton.jit
def clear(address, n, GRAD_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """n zeros: all that a skipped step may write."""
    start = 0
    while start < n:
        i = start + tl.arange(0, BLOCK)
        tl.store(elements(address, GRAD_DTYPE, False) + i, tl.zeros([BLOCK], GRAD_DTYPE), mask=i < n)
        start += BLOCK


@triton.jit
def count_steps(table, grad_words, tensor_words, first_tensor, tensors):
    """One update more for every tensor of the bucket that has a gradient."""
    start = 0
    while start < tensors:
        i = start + tl.arange(0, MANY)
        inside = i < tensors
        t = (first_tensor + i).to(tl.int64)
        active = inside & (tl.load(table + grad_words + t, mask=inside, other=0) != 0)
        tensor = table + tensor_words + t * TENSOR_WORDS
        done = count_of(tensor, active) + 1
        steps = tl.load(tensor + TENSOR_STEPS, mask=active, other=0)
        step = tl.load(tensor + TENSOR_STEP, mask=active, other=0)
        wide = (step & IS_DOUBLE) != 0
        tl.debug_barrier()  # where threads share a tensor, all have read its count before one writes it
        tl.store(steps.to(tl.pointer_type(tl.int64)), done, mask=active)
        tl.store((step - IS_DOUBLE).to(tl.pointer_type(tl.float64)), done.to(tl.float64), mask=wide)
        tl.store(step.to(tl.pointer_type(tl.float32)), done.to(tl.float32), mask=(step != 0) & (wide == 0))
        start += MANY


@triton.jit(
    do_not_specialize=[
        *("table", "sums", "ticket", "result", "skipped", "n_sums", "grad_words", "tensor_words", "chunk_words"),
        *("chunks", "first_tensor", "tensors"),
    ]
)
def update_kernel(
    table,  # int64 [words]
    sums,  # float64 [n_sums, 2], what the norm launches wrote
    ticket,  # int32 [1], zero between launches
    result,  # float64 [2]: norm, 1.0 if skipped
    skipped,  # int64: count of skipped steps
    n_sums,
    grad_words,  # where the parts of the table begin
    tensor_words,
    chunk_words,  # of the bucket's first chunk
    chunks,  # of the bucket
    first_tensor,
    tensors,
    PREPARE: tl.constexpr,  # the rule
    STEP: tl.constexpr,
    STATES: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_EMA: tl.constexpr,
    REPORTS: tl.constexpr,  # whether it writes result and skipped
    BLOCK: tl.constexpr,
):
    COMPUTE: tl.constexpr = tl.float64 if PARAM_DTYPE.is_fp64() else tl.float32
    zero_grads = (tl.load(table + FLAGS) & ZERO_GRADS) != 0
    norm, clip, inv_scale, skip = decide(table, sums, n_sums)
    if REPORTS and tl.program_id(0) == 0:  # now: kept for the end, the norm would be spilled
        tl.store(result, norm)
        tl.store(result + 1, skip.to(tl.float64))
        tl.store(skipped, tl.load(skipped) + skip.to(tl.int64))
    c = tl.program_id(0)
    while c < chunks:
        chunk = tl.load(table + chunk_words + (chunks - 1 - c))
        t = chunk >> 32
        grad = tl.load(table + grad_words + t)
        if grad != 0:
            first = (chunk & 0xFFFFFFFF) * CHUNK_ELEMENTS
            tensor = table + tensor_words + t * TENSOR_WORDS
            n = tl.minimum(tl.load(tensor + TENSOR_COUNT) - first, CHUNK_ELEMENTS).to(tl.int32)
            grad += first * (GRAD_DTYPE.primitive_bitwidth // 8)
            if skip:
                if zero_grads:
                    clear(grad, n, GRAD_DTYPE, BLOCK)
            else:
                row = table + CONTROL_WORDS + tl.load(tensor + TENSOR_ROW) * ROW_WORDS
                h = PREPARE(row, count_of(tensor, True) + 1, COMPUTE)
                factor = double(row + SIGN) * inv_scale * tl.where(tl.load(row + IN_NORM) != 0, clip, 1.0)
                clip_value = double(row + CLIP_VALUE)
                ema_decay = double(row + EMA_DECAY)
                compute_bytes = first * (COMPUTE.primitive_bitwidth // 8)
                slots = (
                    tl.load(tensor + PARAM) + first * (PARAM_DTYPE.primitive_bitwidth // 8),
                    grad,
                    tl.load(tensor + MASTER) + compute_bytes if HAS_MASTER else grad * 0,
                    tl.load(tensor + EMA) + compute_bytes if HAS_EMA else grad * 0,
                )
                for k in tl.static_range(STATES):
                    state = tl.load(tensor + STATE + k) + first * (STATE_DTYPE.primitive_bitwidth // 8)
                    slots = slots + (state,)
                low_bits = grad * 0
                for k in tl.static_range(4 + STATES):
                    low_bits |= slots[k]
                aligned = (low_bits % 16 == 0) & (n % LANES == 0)
                if aligned:
                    sweep(
                        *(slots, n, h, factor.to(COMPUTE), clip_value.to(COMPUTE)),
                        *(ema_decay.to(COMPUTE), (1.0 - ema_decay).to(COMPUTE), zero_grads),
                        *(STEP, STATES, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, HAS_MASTER, HAS_EMA, BLOCK),
                        ALIGNED=True,
                    )
                else:
                    sweep(
                        *(slots, n, h, factor.to(COMPUTE), clip_value.to(COMPUTE)),
                        *(ema_decay.to(COMPUTE), (1.0 - ema_decay).to(COMPUTE), zero_grads),
                        *(STEP, STATES, PARAM_DTYPE, GRAD_DTYPE, STATE_DTYPE, HAS_MASTER, HAS_EMA, BLOCK // 2),
                        ALIGNED=False,
                    )
        c += tl.num_programs(0)

    tl.debug_barrier()  # every warp has read the counts that the last program changes
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(ticket, 0)
        if skip == 0:
            count_steps(table, grad_words, tensor_words, first_tensor, tensors)


def update_constants(
    rule: str,
    param: tl.dtype,
    grad: tl.dtype,
    state: tl.dtype,
    master: bool,
    ema: bool,
    reports: bool,
    settings: Settings,
) -> dict[str, Any]:
    """What the kernel is compiled for."""
    compute = tl.float64 if param.is_fp64() else tl.float32
    used = [param, grad] + [state] * (RULES[rule].states > 0) + [compute] * (master or ema)
    return {
        "PREPARE": RULES[rule].prepare,
        "STEP": RULES[rule].step,
        "STATES": RULES[rule].states,
        "PARAM_DTYPE": param,
        "GRAD_DTYPE": grad,
        "STATE_DTYPE": state,
        "HAS_MASTER": master,
        "HAS_EMA": ema,
        "REPORTS": reports,
        "BLOCK": settings.update_block(max(dtype.primitive_bitwidth for dtype in used) // 8),
    }
