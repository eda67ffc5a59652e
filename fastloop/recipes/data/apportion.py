# SPDX-License-Identifier: Apache-2.0
"""A whole number divided by shares."""

from __future__ import annotations

import numpy
from numpy.typing import NDArray

Counts = NDArray[numpy.int64]
Shares = NDArray[numpy.float64]


def apportioned(n: int, shares: Shares) -> Counts:
    """n*shares/sum(shares) in whole numbers by the largest remainder (Hamilton): they add up, none is off by 1."""
    quotas = n * shares / shares.sum()
    counts = numpy.floor(quotas + 1e-9).astype(numpy.int64)  # 0.1*30 may be just below 3
    remainders = numpy.where(shares > 0, quotas - counts, -1.0)
    counts[numpy.argsort(-remainders, kind="stable")[: n - counts.sum()]] += 1
    return counts
