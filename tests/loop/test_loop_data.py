# SPDX-License-Identifier: Apache-2.0
"""Loaders that are no plain DataLoader: generators, samplers of one's own, those that keep their own state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler, SequentialSampler, TensorDataset

import fastloop
from fastloop.loop import random_state
from fastloop.loop.data import END, Feed, Position, rebuilt
from fastloop.loop.strategy import Ranks

CPU = torch.device("cpu")
NUMBERS = list(range(20))


def rank_of(rank: int, size: int) -> Ranks:
    ranks = Ranks(CPU)
    ranks.rank, ranks.size = rank, size
    return ranks


def looped(**settings: Any) -> fastloop.Loop:
    model = torch.nn.Linear(1, 1)
    return fastloop.Loop(model, fastloop.AdamW(model.parameters()), device="cpu", **settings)


def numbers(count: int = 20) -> Iterator[torch.Tensor]:
    for i in range(count):
        yield torch.tensor([[float(i)]])


def train(loop: fastloop.Loop, loader: Any, leave_at: int | None = None, **length: Any) -> list[int]:
    """What the windows held; the window of batch `leave_at` is left after it."""
    seen = []
    for window in loop.windows(loader, **length):
        for batch in window:
            seen.append(int(batch))
            loop.backward(loop.model(batch).mean())
            if seen[-1] == leave_at:
                return seen
        loop.step()
    return seen


def read(feed: Feed, count: int = 1000) -> list[Any]:
    found: list[Any] = []
    while len(found) < count and (batch := feed.next()) is not END:
        found.append(batch)
    feed.batches_before = feed.batches
    return found


def samples(feed: Feed, count: int = 1000) -> list[int]:
    return [int(i) for batch in read(feed, count) for i in batch.flatten()]


# ---- generators


def test_a_generator_goes_on_with_its_next_batch() -> None:
    loop, given = looped(), numbers()
    assert train(loop, given, max_steps=5) == [0, 1, 2, 3, 4]
    assert train(loop, given, max_steps=5) == []
    assert train(loop, given, max_steps=12) == [5, 6, 7, 8, 9, 10, 11]
    assert train(loop, given, epochs=1) == list(range(12, 20))
    with pytest.raises(ValueError, match=r"epoch 1.* can be gone through once; pass a list, a DataLoader or an object"):
        train(loop, given, epochs=2)


def test_a_window_of_a_generator_that_was_left_comes_again() -> None:
    loop, given = looped(accumulation_steps=3), numbers()
    assert train(loop, given, leave_at=4, max_steps=9) == [0, 1, 2, 3, 4]
    assert train(loop, given, leave_at=3, max_steps=9) == [3]
    assert train(loop, given, max_steps=3) == [3, 4, 5, 6, 7, 8]
    assert train(loop, given, leave_at=9, epochs=1) == [9]
    assert train(loop, given, epochs=1) == list(range(9, 20))


def test_a_generator_left_in_its_first_window() -> None:
    loop, given = looped(accumulation_steps=2), numbers(4)
    assert train(loop, given, leave_at=0, epochs=1) == [0]
    assert train(loop, given, epochs=1) == [0, 1, 2, 3]


def test_a_second_epoch_of_a_generator() -> None:
    for given in (numbers(3), iter(list(numbers(3))), map(torch.neg, numbers(3))):
        with pytest.raises(ValueError, match=r"a generator can be gone through once; pass a list"):
            train(looped(), given, epochs=2)


class BeginsAnew:
    """Its own iterator, and reset by __iter__."""

    def __iter__(self) -> BeginsAnew:
        self.left = numbers(3)
        return self

    def __next__(self) -> torch.Tensor:
        return next(self.left)


def test_an_iterator_whose_iter_begins_anew_has_many_epochs() -> None:
    loop, given = looped(), BeginsAnew()
    assert train(loop, given, max_steps=4) == [0, 1, 2, 0]
    assert train(loop, given, epochs=3) == [1, 2, 0, 1, 2]


def test_a_new_process_replays_a_generator(tmp_path: Any) -> None:
    assert train(looped(run_dir=tmp_path), numbers(), max_steps=5) == [0, 1, 2, 3, 4]
    assert train(looped(run_dir=tmp_path), numbers(), max_steps=7) == [5, 6]


# ---- another number of ranks


class EveryOther(Sampler[int]):
    """Divides the data by itself."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 20, 2))

    def __len__(self) -> int:
        return 10


class OwnBatches(Sampler[list[int]]):
    """Without a `batch_size`."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[i, i + 1] for i in range(0, 20, 2)])

    def __len__(self) -> int:
        return 10


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(NUMBERS, **({"batch_size": 2} | settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        [torch.tensor([i]) for i in NUMBERS],
        DataLoader(NUMBERS, batch_sampler=OwnBatches()),  # type: ignore[arg-type]
        loader(sampler=EveryOther()),
        loader(batch_size=None, sampler=EveryOther()),
    ],
    ids=["list", "batch sampler", "sampler", "no batches"],
)
def test_nobody_knows_what_other_ranks_have_left(given: Any) -> None:
    feed = Feed(given, rank_of(0, 2))
    feed.begin(Position(3))
    between = feed.position()
    assert between.for_ranks(1) == Position(3)
    read(feed, 3)
    for position in (feed.position(), feed.position_of_last_window()):
        with pytest.raises(RuntimeError, match=r"by 2 ranks.*resume with that number of ranks, or from the start of"):
            position.for_ranks(1)


@pytest.mark.parametrize(
    "settings", [{}, {"shuffle": True}, {"sampler": DistributedSampler(NUMBERS, 2, 0)}], ids=str  # type: ignore[arg-type]
)  # fmt: skip
def test_what_is_left_of_a_loader_that_is_divided(settings: Any) -> None:
    given = loader(**settings)
    feed = Feed(given, rank_of(0, 2), seed=1)
    feed.begin(Position())
    read(feed, 3)
    position = feed.position().for_ranks(1)
    assert position.skip == 12
    alone = Feed(given, rank_of(0, 1), seed=1)
    alone.begin(position)
    assert len(set(samples(alone))) == 8


def test_a_checkpoint_of_an_earlier_fastloop_that_cannot_be_divided() -> None:
    position = Position(batches=3, consumed=6)
    feed = Feed(loader(sampler=EveryOther()), rank_of(0, 2))
    with pytest.raises(RuntimeError, match=r"resume with that number of ranks"):
        feed.begin(position.for_ranks(2))


# ---- loaders with a state of their own


def test_the_state_of_the_loader_in_use() -> None:
    """What is left after resharding comes from a plain DataLoader, which has no state."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
    given = stateful.StatefulDataLoader(NUMBERS, batch_size=2, sampler=DistributedSampler(NUMBERS, 2, 0, False))  # type: ignore[arg-type]
    feed = Feed(given, rank_of(0, 2))
    feed.begin(Position())
    assert samples(feed, 2) == [0, 2, 4, 6]
    assert feed.position().loader is not None
    alone = Feed(given, rank_of(0, 1))
    alone.begin(feed.position().for_ranks(1))
    assert samples(alone, 2) == [8, 9, 10, 11]
    kept = alone.position()
    assert kept.loader is None
    again = Feed(given, rank_of(0, 1))
    again.begin(kept)
    assert samples(again) == list(range(12, 20))


# ---- positions


def test_the_position_of_the_last_window_counts_its_samples_only() -> None:
    feed = Feed(loader(), rank_of(0, 2))
    feed.begin(Position())
    read(feed, 2)
    feed.next()
    assert (feed.position().batches, feed.position().consumed) == (3, 12)
    left = feed.position_of_last_window()
    assert (left.batches, left.consumed) == (2, 8)


# ---- DataLoaders made anew


@pytest.mark.parametrize("in_order", [True, False])
def test_rebuilt_keeps_in_order(in_order: bool) -> None:
    given: DataLoader[Any] = loader(in_order=in_order)
    assert rebuilt(given, BatchSampler(SequentialSampler(NUMBERS), 5, False)).in_order is in_order


def test_a_loader_without_batches_of_indices_is_not_divided() -> None:
    data = TensorDataset(torch.arange(20))
    for shuffle in (False, True):
        given = DataLoader(data, batch_size=None, shuffle=shuffle)
        assert len(list(Feed(given, rank_of(0, 1)).loader)) == 20
        with pytest.raises(ValueError, match=r"batch_size=None. gives each of the 2 ranks all of the data; pass it a"):
            Feed(given, rank_of(0, 2))
    Feed(DataLoader(data, batch_size=None, sampler=DistributedSampler(data, 2, 0)), rank_of(0, 2))


# ---- random states


def test_a_sampler_with_a_generator_of_its_own_is_replayed() -> None:
    """One that draws batch by batch, while the forward draws from the global generator."""
    own = torch.Generator().manual_seed(1)

    def given() -> DataLoader[Any]:
        sampler = torch.utils.data.RandomSampler(NUMBERS, True, 100, generator=own)
        return loader(sampler=sampler, batch_size=10)

    feed = Feed(given(), rank_of(0, 1))
    feed.begin(Position())
    for _ in range(4):
        read(feed, 1)
        torch.rand(3)
    kept = feed.position()
    rest = samples(feed)
    own.manual_seed(7)
    random_state.seed_everything(5)
    resumed = Feed(given(), rank_of(0, 1))
    resumed.begin(kept)
    assert samples(resumed) == rest
