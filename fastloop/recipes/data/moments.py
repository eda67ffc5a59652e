# SPDX-License-Identifier: Apache-2.0
"""Mean and variance of columns in fp64, of data that comes in parts."""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 2**22  # in fp64 at a time: 32 MiB, and a few temporaries of that size


def in_parts(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in pieces of bounded size, so that copies in fp64 stay small."""
    return rows.split(max(1, ELEMENTS // max(1, rows[0].numel()))) if len(rows) else ()


class Moments:
    """Count, mean and sum of squared deviations of each column, of the finite values alone.

    A part's own are merged by Chan, Golub and LeVeque (1979), so nothing but these is kept:
    n = na + nb; d = mb - ma; m = ma + d*nb/n; M = Ma + Mb + d*d*na*nb/n.

    Values are taken relative to the first one of their column: a mean of 1e8 would otherwise cost the deviations their
    last 8 digits.
    """

    def __init__(self, columns: int) -> None:
        self.count = torch.zeros(columns, dtype=torch.float64)
        self.origin = torch.zeros(columns, dtype=torch.float64)
        self.shifted_mean = torch.zeros(columns, dtype=torch.float64)  # of values - origin
        self.squares = torch.zeros(columns, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in values: [rows, columns], of any dtype."""
        for part in in_parts(values.detach().cpu()):
            self._add(part.double())

    def _add(self, values: Tensor) -> None:
        finite = values.isfinite()
        whole = bool(finite.all())
        count = torch.full_like(self.count, len(values)) if whole else finite.sum(0).to(torch.float64)
        begins = (self.count == 0) & (count > 0)
        if bool(begins.any()):
            first = values.gather(0, finite.to(torch.uint8).argmax(0, keepdim=True))[0]
            self.origin = self.origin.where(~begins, first)
        values = values - self.origin
        values = values if whole else values.where(finite, 0.0)
        mean = values.sum(0) / count.clamp_min(1)
        deviations = values - mean
        squares = (deviations if whole else deviations.where(finite, 0.0)).square_().sum(0)
        total = self.count + count
        share = count / total.clamp_min(1)
        difference = mean - self.shifted_mean
        self.shifted_mean += difference * share
        self.squares += squares + difference.square() * self.count * share
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Of the finite values; 0 where there are none."""
        return self.origin + self.shifted_mean

    @property
    def std(self) -> Tensor:
        """Of the population: sqrt(M/n)."""
        return (self.squares / self.count.clamp_min(1)).sqrt()

    def constant(self) -> Tensor:
        """Where all values are the same, so that all are the origin: bool, [columns]."""
        return (self.count > 0) & (self.squares == 0)

    def merged(self) -> Moments:
        """Those of all columns together."""
        one = Moments(1)
        total = self.count.sum()
        one.count[0] = total
        if total > 0:
            one.origin[0] = self.origin[self.count > 0][0]
            means = (self.origin - one.origin) + self.shifted_mean
            one.shifted_mean[0] = (means * self.count).sum() / total
            one.squares[0] = (self.squares + self.count * (means - one.shifted_mean).square()).sum()
        return one
