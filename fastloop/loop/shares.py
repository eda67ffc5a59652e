# SPDX-License-Identifier: Apache-2.0
"""Epochs whose order or length a sampler or a data set decides: divided among ranks, and counted in advance.

A sampler says its order by three methods, whatever its class:

    set_epoch(epoch)            before each epoch; __iter__ and __len__ are then of that epoch
    indices(epoch) -> indices   of all samples of the epoch in order, a list or an integer tensor; the same on each rank
    length(epoch) -> int        how many these are, without making them

A data set whose length changes has `set_epoch` and `length`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

MOST_EPOCHS = 10_000  # whose lengths are asked for; later ones are taken to be as the last of these


def tells_order(sampler: Any) -> bool:
    """Whether the sampler says what the order of an epoch is, so that others can divide it."""
    if isinstance(sampler, DistributedSampler):  # it divides already
        return False
    return tells_length(sampler) and _of_epoch(sampler, "indices")


def tells_length(source: Any) -> bool:
    """Whether a sampler or a data set says how many samples each epoch has."""
    return callable(getattr(source, "set_epoch", None)) and _of_epoch(source, "length")


def _of_epoch(source: Any, name: str) -> bool:
    """Whether it has a method `name(epoch)`, and not another one of that name."""
    method = getattr(source, name, None)
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(0)
    except (TypeError, ValueError):
        return False
    return True


def plain(sampler: Any) -> bool:
    """Whether it goes through all of the data, shuffled or in order."""
    return isinstance(sampler, (RandomSampler, SequentialSampler))


def batches_plainly(loader: DataLoader[Any]) -> bool:
    """Whether its batches are so many samples of its sampler, one after the other."""
    if type(loader.batch_sampler) is BatchSampler:
        return True
    # torchdata's, which is the same but for its place; of plain samplers it is taken as one that divides already.
    return isinstance(loader.batch_sampler, BatchSampler) and tells_order(loader.sampler) and _is_torchdata(loader)


def _is_torchdata(loader: Any) -> bool:
    return type(loader.batch_sampler).__module__.partition(".")[0] == "torchdata"


class Share(DistributedSampler[int]):
    """What one rank has of each epoch: every n-th sample, and where n ranks cannot share evenly the first ones again.

    As DistributedSampler, but of an epoch in the order of a sampler, or of a data set that changes its length.

    Args:
        source: a data set, or where `ordered` a sampler that tells its order.
        size, rank: as DistributedSampler's num_replicas and rank.
        shuffle, seed: of a data set.
    """

    def __init__(
        self, source: Any, size: int, rank: int, *, ordered: bool = False, shuffle: bool = False, seed: int = 0
    ) -> None:
        self._source, self._ordered = source, ordered
        super().__init__(self._places(0), size, rank, shuffle=shuffle, seed=seed)

    def _places(self, epoch: int) -> Any:
        """What has as many items as the epoch has samples."""
        return range(self._source.length(epoch)) if self._ordered else self._source

    def set_epoch(self, epoch: int) -> None:
        """Also tell the sampler, and count its samples. A data set has been told."""
        super().set_epoch(epoch)
        if self._ordered:
            self._source.set_epoch(epoch)
        self.dataset = self._places(epoch)
        self.num_samples = math.ceil(len(self.dataset) / self.num_replicas)  # type: ignore[arg-type]
        self.total_size = self.num_samples * self.num_replicas

    def length(self, epoch: int) -> int:
        """Samples of this rank in that epoch; as many as any other has."""
        whole = self._source.length(epoch) if tells_length(self._source) else len(self._source)
        return math.ceil(whole / self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        places = list(super().__iter__())
        if not self._ordered:
            return iter(places)
        indices = order_of(self._source, self.epoch)
        return iter([indices[place] for place in places])


def order_of(sampler: Any, epoch: int) -> list[int]:
    """The samples of an epoch, in order.

    Raises:
        ValueError: more or fewer than the sampler has said.
    """
    given, length = sampler.indices(epoch), sampler.length(epoch)
    indices: list[int] = given.tolist() if isinstance(given, Tensor) else [int(index) for index in given]
    if len(indices) != length:
        raise ValueError(
            f"[Loop] {type(sampler).__name__}.indices({epoch}) must be as many as length({epoch}) says, {length}, got "
            f"{len(indices)}"
        )
    return indices


def share_of(loader: DataLoader[Any], size: int, rank: int, seed: int) -> Share:
    """What one of `size` ranks has of the loader's epochs."""
    if tells_order(loader.sampler):
        return Share(loader.sampler, size, rank, ordered=True)
    return Share(loader.dataset, size, rank, shuffle=isinstance(loader.sampler, RandomSampler), seed=seed)


def batches_by_epoch(loader: Any, epochs: int, enough: float = math.inf) -> list[int] | None:
    """Batches of each epoch, until there are `enough` or MOST_EPOCHS, where a sampler or data set tells; else None."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.batch_sampler, BatchSampler):
        return None
    batch_sampler: BatchSampler = loader.batch_sampler
    source: Any = batch_sampler.sampler
    if plain(source) and len(source) == len(loader.dataset):  # type: ignore[arg-type]
        source = loader.dataset
    if not tells_length(source) or not (batches_plainly(loader) or isinstance(source, Share)):
        return None
    found: list[int] = []
    total = 0
    for epoch in range(min(epochs, MOST_EPOCHS)):
        samples = source.length(epoch)
        size = batch_sampler.batch_size
        found.append(samples // size if batch_sampler.drop_last else math.ceil(samples / size))
        total += found[-1]
        if total >= enough:
            break
    return found
