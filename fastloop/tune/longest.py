# SPDX-License-Identifier: Apache-2.0
"""The longest batch of a loader: where samples differ in length, it is the one that memory has to hold."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler

from fastloop.loop.loader import with_settings

SAMPLES = 2000  # at most so many are looked at,
SECONDS = 2.0  # for so long


@dataclass(frozen=True)
class Looked:
    """What was found in a loader.

    Attributes:
        longest, typical: batches; the same one where no sample is longer than another.
        varies: whether some are.
        how: what was done to find it, in words.
    """

    longest: Any
    typical: Any
    varies: bool
    how: str


def elements(value: Any) -> int:
    """Numbers and characters in a sample or a batch."""
    if isinstance(value, Tensor):
        return value.numel()
    if isinstance(value, np.ndarray):
        return int(value.size)
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(elements, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(elements, value))
    return 1


def fixed_batches(loader: Any) -> str | None:
    """Why no other batch size can be tried: the loader makes its batches itself; None where one can."""
    try:
        with_settings(loader, {"batch_size": getattr(loader, "batch_size", None) or 1})
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def look(
    loader: Any, *, most: int = SAMPLES, seconds: float = SECONDS, clock: Callable[[], float] = perf_counter
) -> Looked:
    """Batches of the loader's size, of what can be looked at in a short time, in this process.

    Args:
        loader: a DataLoader: of its dataset samples are looked at, which its own `collate_fn` puts together, the same
            one several times if there was no time for more. A dataset that has `lengths`, one number a sample, tells
            which are the longest. Anything else: the longest of its batches.
        most, seconds: when to stop looking.

    Raises:
        ValueError: a loader without any batch.
    """
    if fixed_batches(loader) is not None:
        return _of_batches(loader, most, seconds, clock)
    dataset, count = loader.dataset, samples_of(loader)
    size = loader.batch_size if count is None else min(loader.batch_size, max(count, 1))
    if size < loader.batch_size and loader.drop_last:
        raise ValueError(
            f"[tune] the loader gives no batch: it has {count} samples, batch_size={loader.batch_size} and drop_last"
        )
    longest: list[tuple[int, int, Any]] = []  # (length, -order, sample): a heap
    typical: list[Any] = []
    seen = shortest = 0
    for sample in _while(_samples(loader, most), seconds, clock):
        length = elements(sample)
        shortest = length if seen == 0 else min(shortest, length)
        entry = (length, -seen, sample)
        seen += 1
        if len(typical) < size:
            typical.append(sample)
            heapq.heappush(longest, entry)
        else:
            heapq.heappushpop(longest, entry)
    if not typical:
        raise ValueError("[tune] the target's dataset gave no sample; it must give at least one")
    told = _by_lengths(dataset, size)
    longest.sort(key=lambda entry: entry[:2], reverse=True)
    varies = shortest != longest[0][0] or told is not None
    average = _collated(loader, typical, size)
    if not varies:
        return Looked(average, average, False, f"all of {seen} samples that were looked at are equally long")
    chosen, how = told or ([sample for _, _, sample in longest], f"the longest of {seen} samples")
    span = f", which are {shortest} to {longest[0][0]} elements long" if told is None else ""
    repeated = f"; {size - len(chosen)} of its {size} are repeated" if len(chosen) < size else ""
    return Looked(_collated(loader, chosen, size), average, True, how + span + repeated)


def samples_of(loader: Any) -> int | None:
    """Samples of an epoch; None where nobody says."""
    iterable = isinstance(getattr(loader, "dataset", None), IterableDataset)
    try:
        return len(loader.dataset if iterable else loader.sampler)
    except (AttributeError, TypeError, NotImplementedError):
        return None


def _by_lengths(dataset: Any, size: int) -> tuple[list[Any], str] | None:
    """The longest samples of a dataset that has `lengths`; None of one that has none or equal ones."""
    lengths = getattr(dataset, "lengths", None)
    try:
        if lengths is None or len(lengths) != len(dataset) or min(lengths) == max(lengths):
            return None
        order = heapq.nlargest(size, range(len(lengths)), key=lambda i: lengths[i])
        return [dataset[i] for i in order], f"the longest of {len(lengths)} samples by dataset.lengths"
    except (TypeError, ValueError):  # something else of that name
        return None


def _collated(loader: Any, samples: list[Any], size: int) -> Any:
    return loader.collate_fn(list(itertools.islice(itertools.cycle(samples), size)))


def _samples(loader: Any, most: int) -> Iterator[Any]:
    """In the order of a sampler of the user's own; of an iterable dataset the first; else spread over all of it."""
    dataset, sampler = loader.dataset, loader.sampler
    if isinstance(dataset, IterableDataset):
        yield from itertools.islice(iter(dataset), most)
    elif isinstance(sampler, (RandomSampler, SequentialSampler)):
        count = len(dataset)
        looked = min(count, most)
        for i in _spread(looked):
            yield dataset[i * (count - 1) // max(looked - 1, 1)]
    else:
        for index in itertools.islice(iter(sampler), most):
            yield dataset[index]


def _spread(count: int) -> Iterator[int]:
    """0..count-1 in an order whose every beginning is spread over all of them: time may be over at any sample."""
    bits = max(count - 1, 0).bit_length()
    for i in range(2**bits):
        place = int(f"{i:0{bits}b}"[::-1], 2) if bits else 0
        if place < count:
            yield place


def _while(values: Iterable[Any], seconds: float, clock: Callable[[], float]) -> Iterator[Any]:
    """`values` until the time is over; the first in any case."""
    end = clock() + seconds
    for value in values:
        yield value
        if clock() >= end:
            return


def _of_batches(loader: Any, most: int, seconds: float, clock: Callable[[], float]) -> Looked:
    first = longest = None
    most_elements = shortest = seen = 0
    for batch in _while(itertools.islice(iter(loader), most), seconds, clock):
        length = elements(batch)
        if seen == 0:
            first, shortest = batch, length
        if seen == 0 or length > most_elements:
            longest, most_elements = batch, length
        shortest = min(shortest, length)
        seen += 1
    if seen == 0:
        raise ValueError("[tune] the target's train_loader gave no batch; it must give at least one")
    varies = shortest != most_elements
    span = f"{shortest} to {most_elements} elements long" if varies else "equally long"
    return Looked(longest, first, varies, f"the longest of {seen} batches, which are {span}")
