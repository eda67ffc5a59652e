# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What both kernels read and write: scalars and elements at addresses that a table holds."""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import IS_DOUBLE

# Triton's interpreter truncates fp32 to bf16 and misreads denormal bf16: there, integer arithmetic does both.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
# Elements of the widest 16-byte access (16-bit types): the length of a chunk is a multiple, or no access is wide.
LANES = tl.constexpr(8)


@triton.jit
def double(word):
    """The float64 stored at a pointer to a word."""
    return tl.load(word).to(tl.float64, bitcast=True)


@triton.jit
def scalar(address, absent):
    """The float64 or float32 scalar (by the low bit) at `address`, as float64; `absent` where the address is 0."""
    wide = (address & IS_DOUBLE) != 0
    narrow = (address != 0) & ((address & IS_DOUBLE) == 0)
    f64 = tl.load((address - IS_DOUBLE).to(tl.pointer_type(tl.float64)), mask=wide, other=0.0)
    f32 = tl.load(address.to(tl.pointer_type(tl.float32)), mask=narrow, other=0.0)
    return tl.where(wide, f64, tl.where(narrow, f32.to(tl.float64), absent))


@triton.jit
def elements(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from an address. Only a pointer known to be 16-byte aligned is read 16 bytes at a time."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def load(pointer, inside, COMPUTE: tl.constexpr):
    """Elements in the compute dtype; 0 outside."""
    if INTERPRETED and pointer.dtype.element_ty.is_bf16():
        bits = tl.load(pointer.to(tl.pointer_type(tl.uint16)), mask=inside, other=0)
        return (bits.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return tl.load(pointer, mask=inside, other=0.0).to(COMPUTE)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """x rounded to the nearest value of the storage dtype, ties to even."""
    if INTERPRETED and DTYPE.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def widen(x, COMPUTE: tl.constexpr):
    """A stored value in the compute dtype."""
    if INTERPRETED and x.dtype.is_bf16():
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return x.to(COMPUTE)
