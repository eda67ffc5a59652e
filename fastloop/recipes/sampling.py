# SPDX-License-Identifier: Apache-2.0
"""Samplers whose order is a function of the seed and the epoch, divided among the ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import torch
from torch import Tensor
from torch.utils.data import Sampler


def generator_of(seed: int, epoch: int = 0) -> torch.Generator:
    """A generator for one epoch; those of neighbouring seeds and epochs are unrelated.

    Raises:
        ValueError: a seed that is no integer of at least 0.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"[recipes] seed must be an integer of at least 0, got {seed!r}; pass e.g. 0")
    state = numpy.random.SeedSequence([seed, epoch]).generate_state(1, numpy.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


class EpochSampler(Sampler[int]):
    """Base of samplers whose order is a function of the seed and the epoch, which a resumed run repeats.

    Under several ranks each takes every size-th index of the same order, which is filled up from its beginning, so
    that all ranks have equally many: `Loop` divides it itself, by `indices`, also what is left of an epoch for another
    number of ranks, and calls `set_epoch`; other loops have to. See `fastloop.loop.shares`.

    Args:
        seed: of the order, the same on each rank.
    """

    def __init__(self, seed: int = 0) -> None:
        generator_of(seed)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The order of this epoch from the next iteration on."""
        self.epoch = epoch

    def indices(self, epoch: int) -> Tensor:
        """The samples of an epoch in order, of all ranks together: int64 [length(epoch)]."""
        raise NotImplementedError

    def length(self, epoch: int) -> int:
        """How many samples an epoch has, found without making its order."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[int]:
        order = self.indices(self.epoch)
        rank, size = ranks()
        missing = -len(order) % size
        if missing and len(order):
            order = torch.cat([order, order.repeat(-(-missing // len(order)))[:missing]])
        return iter(order[rank::size].tolist())

    def __len__(self) -> int:
        return -(-self.length(self.epoch) // ranks()[1])


def ranks() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
