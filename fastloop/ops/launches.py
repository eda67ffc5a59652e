# SPDX-License-Identifier: Apache-2.0
"""What a step asks of a device: launches and copies, described and counted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """Parameters of one rule and one combination of dtypes on one device: what one pair of launches serves.

    The table's layout is that of csrc/core/device_table.h.
    """

    device: torch.device
    rule: str
    param: torch.dtype
    grad: torch.dtype
    state: torch.dtype
    master: bool
    ema: bool
    rows: int  # of the whole table, as tensors and chunks
    tensors: int
    chunks: int
    first_tensor: int
    bucket_tensors: int
    first_chunk: int
    bucket_chunks: int
    table: Tensor  # int64 [words]
    sums: Tensor  # float64 [programs, 2]: what the norm launch writes
    ticket: Tensor  # int32 [1], zero between launches
    result: Tensor  # float64 [2]: norm, 1.0 if the step was skipped
    skipped: Tensor | None  # int64 count of skipped steps; None: another bucket reports


class BucketLaunches(Protocol):
    """The two launches of a bucket, ready to go."""

    def norm(self, words: int, n_words: int) -> None:
        """Launch 1: partial norms; delivers `n_words` changed words at host address `words` to the table's front."""

    def update(self, sums: Tensor) -> None:
        """Launch 2: the update, with the norm that the rows of `sums` (float64 [n, 2]) add up to."""


class DeviceBackend(Protocol):
    """A set of device kernels: fastloop.ops.cuda or fastloop.triton_kernels."""

    @property
    def INLINE_WORDS(self) -> int:
        """Words that a norm launch can deliver."""

    def serves(
        self, rule: str, param: torch.dtype, grad: torch.dtype, state: torch.dtype, master: bool, ema: bool
    ) -> bool:
        """Whether there is a kernel for this storage."""

    def bucket(self, spec: BucketSpec) -> BucketLaunches:
        """The launches of one bucket."""

    def blocks(self, device: torch.device) -> int:
        """Programs of one launch, at most."""


# ---- counting


@dataclass(slots=True)
class LaunchCounts:
    """Kernel launches and copies to a device that fastloop asked for."""

    launches: int = 0
    copies: int = 0


_counts = LaunchCounts()


def count_launch() -> None:
    _counts.launches += 1


def count_copy() -> None:
    _counts.copies += 1


@contextmanager
def count_launches() -> Iterator[LaunchCounts]:
    """Count what fastloop launches and copies on a device while the block runs.

    `n.launches` are kernels, `n.copies` asynchronous copies of changed addresses or settings. Both stay 0 on the CPU
    and reference backends. Building a plan (the first step, or one after parameters or settings have changed their
    kind) copies its table once. Contexts may be nested.

    Example:
        >>> with fastloop.count_launches() as n:
        ...     optimizer.step()
        >>> n.launches, n.copies
        (2, 0)
    """
    before = LaunchCounts(_counts.launches, _counts.copies)
    seen = LaunchCounts()
    try:
        yield seen
    finally:
        seen.launches = _counts.launches - before.launches
        seen.copies = _counts.copies - before.copies
