# SPDX-License-Identifier: Apache-2.0
"""The table that a step reads, as csrc/core/device_table.h lays it out (a test compares the two).

  controls | rows | gradient addresses    what a step may change
  tensors | chunks                        fixed

One array of 64-bit words; doubles are stored by their bits. The names are the header's, without their `k`.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton.language as tl

CHUNK_ELEMENTS = tl.constexpr(8 * 1024)

# Controls.
FLAGS = tl.constexpr(0)
MAX_NORM = tl.constexpr(1)
SCALE_ADDRESS = tl.constexpr(2)
FOUND_INF_ADDRESS = tl.constexpr(3)
CONTROL_WORDS = tl.constexpr(4)

# Bits of FLAGS.
MEASURE = tl.constexpr(1)
CHECK_ALL = tl.constexpr(2)
ZERO_GRADS = tl.constexpr(4)

# A row: what a parameter group says.
HYPER = tl.constexpr(0)
MAX_HYPERS = tl.constexpr(8)
HYPER_ADDRESS = tl.constexpr(8)
SIGN = tl.constexpr(16)
IN_NORM = tl.constexpr(17)
CLIP_VALUE = tl.constexpr(18)
EMA_DECAY = tl.constexpr(19)
ROW_WORDS = tl.constexpr(20)
IS_DOUBLE = tl.constexpr(1)

# A tensor: the addresses of its slots, and what belongs to it.
PARAM = tl.constexpr(0)
GRAD = tl.constexpr(1)
MASTER = tl.constexpr(2)
EMA = tl.constexpr(3)
STATE = tl.constexpr(4)
TENSOR_COUNT = tl.constexpr(7)
TENSOR_ROW = tl.constexpr(8)
TENSOR_STEP = tl.constexpr(9)
TENSOR_STEPS = tl.constexpr(10)
TENSOR_WORDS = tl.constexpr(12)
EMPTY_GRAD = tl.constexpr(16)


@dataclass(frozen=True, slots=True)
class TableLayout:
    """Where the parts of a table of so many rows, tensors and chunks begin."""

    rows: int
    tensors: int
    chunks: int

    @property
    def row_words(self) -> int:
        return CONTROL_WORDS.value

    @property
    def grad_words(self) -> int:
        return self.row_words + self.rows * ROW_WORDS.value

    @property
    def tensor_words(self) -> int:
        return self.grad_words + self.tensors

    @property
    def chunk_words(self) -> int:
        return self.tensor_words + self.tensors * TENSOR_WORDS.value

    @property
    def all_words(self) -> int:
        return self.chunk_words + self.chunks
