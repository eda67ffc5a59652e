# SPDX-License-Identifier: Apache-2.0
"""Iterators of an epoch that begin in its middle: of a loader that cannot begin anew, and of a batch sampler."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any


class Once:
    """A loader that is its own iterator, in one epoch; batches of the window under way can be given again."""

    def __init__(self, iterator: Iterator[Any], epoch: int) -> None:
        self.iterator, self.epoch = iterator, epoch
        self.given = 0
        self.window: list[Any] = []  # given since the last whole window
        self._again: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = self._again.pop(0) if self._again else next(self.iterator)
        self.given += 1
        return batch

    def has_more(self) -> bool:
        """Whether there is another batch; it is fetched for that."""
        if not self._again:
            self._again = list(itertools.islice(self.iterator, 1))
        return bool(self._again)

    def back_to(self, count: int) -> None:
        """The next batch is the one after the first `count`, which is in the window under way or follows it."""
        behind = self.given - count
        assert 0 <= behind <= len(self.window)
        self._again = self.window[len(self.window) - behind :] + self._again
        self.given = count
        self.window = []


class Rest:
    """The batches of a batch sampler after the first `skipped`, for one epoch."""

    def __init__(self, batch_sampler: Any, skipped: int) -> None:
        self.batch_sampler, self.skipped = batch_sampler, skipped
        self._batches: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        # Samplers draw their order when the first batch is asked for; DataLoader draws a seed of its own before that.
        self._batches = iter(self.batch_sampler)
        return self

    def __next__(self) -> Any:
        self.skip()
        return next(self._batches)

    def skip(self) -> None:
        """Pass over what is to be skipped, if that has not been done."""
        while self.skipped > 0:
            self.skipped -= 1
            next(self._batches, None)

    def __len__(self) -> int:
        return len(self.batch_sampler)
