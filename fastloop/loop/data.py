# SPDX-License-Identifier: Apache-2.0
"""The batches of a loader: on the device, in an order that a resumed run repeats exactly.

Exact resume has an order. The random states of the epoch's start are put back, then the iterator is made (which draws
from them), then what was consumed is fetched again and dropped, then the current random states are put back. So the
workers' augmentations and the sampler's order are those of the run that was never interrupted.

A batch is fetched when it is asked for, while the device still computes the one before it, and copied on a stream of
its own: it is one ahead of the device without being one ahead of the position that a checkpoint holds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.distributed import DistributedSampler

from fastloop.loop import own_state, random_state
from fastloop.loop.iterators import Once, Rest
from fastloop.loop.loader import (
    batch_size_of,
    distributed_sampler,
    divisible,
    generators_of,
    indivisible,
    iterate,
    keeps_own_state,
    length_of,
    rebuilt,
    set_epoch,
    shared_among,
    skippable,
)
from fastloop.loop.own_state import States
from fastloop.loop.shares import batches_by_epoch, order_of, share_of, tells_order
from fastloop.loop.strategy import Ranks

END = object()  # no batch is left in this epoch


@dataclass
class Position:
    """Where a run is in its data: `batches` of epoch `epoch` are consumed."""

    epoch: int = 0
    batches: int = 0
    padded: int = 0  # micro-batches of weight 0 that this rank has added
    start: dict[str, Any] | None = None  # random states before the epoch's iterator was made
    now: dict[str, Any] | None = None  # and now
    loader: Any = None  # state of a loader that keeps its own (torchdata's StatefulDataLoader)
    consumed: int = 0  # samples of the epoch's permutation that all ranks have consumed together
    world: int = 1
    skip: int = 0  # samples of the epoch that earlier ranks, of another number, consumed
    order: dict[str, Any] | None = None  # random states that the epoch's order was drawn from, if by a loader alone
    own_start: States | None = None  # states of sampler and data set that the epoch was begun with
    own: States | None = None  # and now; without those that `own_start` and the replay make

    def for_ranks(self, size: int) -> Position:
        """The same place for another number of ranks: what is left of the epoch is divided anew.

        Raises:
            RuntimeError: in the middle of an epoch of a loader of which nobody knows what is left.
        """
        if self.batches == 0 and self.skip == 0:
            return Position(self.epoch, own=self.own_now() or None)
        if self.batches > 0 and self.consumed <= self.skip:
            raise indivisible(self.world)
        return Position(
            self.epoch, skip=self.consumed, order=self.order, world=size, own_start=self.own_start, own=self.own
        )

    def own_now(self) -> States:
        """The states of sampler and data set that are known of now, else of the epoch's start."""
        return {**(self.own_start or {}), **(self.own or {})}


@dataclass
class Feed:
    """One loader's epochs.

    Args:
        loader: a DataLoader, or anything that can be iterated over again and again.
        ranks: the processes that share the data.
        channels_last: 4-dimensional tensors come in that layout.
        seed: of the order, where the loop divides the data among ranks; the same on each.
        trains: the states of the loader's sampler and data set belong to the run.
    """

    loader: Any
    ranks: Ranks
    channels_last: bool = False
    seed: int = 0
    trains: bool = False
    epoch: int = 0
    batches: int = 0  # consumed in this epoch, on this rank
    batches_before: int = 0  # the window under way
    padded: int = 0  # micro-batches of weight 0 added to it, because other ranks have more
    wait_seconds: float = 0.0  # spent waiting for the loader, in all
    start: dict[str, Any] | None = None
    skip: int = 0
    order: dict[str, Any] | None = None
    own_start: States | None = None
    resumed: bool = False  # its sampler and data set have the states of the run's position
    begun: bool = False  # `begin` has brought it to where it is
    _iterator: Iterator[Any] | None = None
    _once: Once | None = None  # the same, where the loader can be gone through once only: it outlives `close`
    _spare: Any = None  # the last batch: what a rank that has run out computes on, with weight 0
    _stream: Any = None
    generators: list[torch.Generator] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._given = self.loader
        self.loader = self._current = shared_among(self.loader, self.ranks, self.seed)
        self.generators = generators_of(self.loader)
        self._holders = own_state.of_loader(self._given) if self.trains else {}
        if self.ranks.device.type == "cuda":
            self._stream = _copy_stream(self.ranks.device)

    def begin(self, position: Position) -> None:
        """Make the iterator of the epoch, and bring it to `position`.

        Raises:
            ValueError: a second epoch of a loader that can be gone through once.
        """
        self.begun = False
        self.close()
        self.epoch, self.batches, self.padded = position.epoch, 0, position.padded
        self.skip, self.order = position.skip, position.order
        if self._once is not None and self._once.epoch == position.epoch:
            self._go_on(self._once, position)
            return
        own = self._begin_own(position)
        set_epoch(self.loader, position.epoch)
        loader = self._current = self._remaining(position) if position.skip else self.loader
        if position.start is None:
            if position.now is not None:
                random_state.restore(position.now, self.generators)
            self.start = random_state.capture(self.generators)
            self._iterator = self._iterator_of(loader)
            self.batches_before = 0
        else:
            self._replay_from(position, loader)
        own_state.give(self._holders, own)
        self.begun = self.resumed = True

    def _begin_own(self, position: Position) -> States:
        """Give sampler and data set the states that the epoch is begun with; returns those to be given after it."""
        now, kept, start = own_state.capture(self._holders), position.own or {}, position.own_start or {}
        if position.batches or position.skip:
            self.own_start = {**now, **start}
            after = {name: state for name, state in now.items() if name in kept}
        else:  # what has been changed before the first window counts for it
            self.own_start = {**now, **{name: state for name, state in start.items() if name not in kept}}
            after = {}
        own_state.give(self._holders, self.own_start)
        return after

    def _replay_from(self, position: Position, loader: Any) -> None:
        """Make the iterator with the states of the epoch's start, consume what was consumed, put back those of now."""
        assert position.start is not None
        assert position.now is not None
        random_state.restore(position.start, self.generators)
        self.start = position.start
        if position.loader is not None:
            loader.load_state_dict(position.loader)
        rest = None
        if position.loader is None and skippable(loader):
            unread = position.batches - (self.ranks.size > 1)  # the last one is read: see `repeated`
            rest = Rest(loader.batch_sampler, max(unread, 0))
            loader = rebuilt(loader, rest)
        self._iterator = self._iterator_of(loader)
        if rest is not None:
            rest.skip()
            self._spare = next(self._iterator, None) if self.ranks.size > 1 and position.batches else None
        elif position.loader is None:
            self._replay(position.batches)
        self.batches = self.batches_before = position.batches
        random_state.restore(position.now, self.generators)

    def resume(self, position: Position, is_over: bool = False) -> None:
        """Give the sampler and the data set the states that a checkpoint has of them.

        Where the run `is_over` for this loader the states may be those of a later one's parts, and need not fit.
        """
        states = position.own_now()
        with suppress(Exception) if is_over else nullcontext():
            own_state.give(self._holders, states)
            self.resumed = not (is_over and own_state.missing(self._holders, states))
        if not is_over:
            own_state.warn_of_missing(self._holders, states, "training data's")

    def own(self) -> States | None:
        """The states of the loader's sampler and data set; None without any."""
        return own_state.capture(self._holders) or None

    def _own_unread(self) -> States | None:
        """Of those, what reading batches does not change: the states of samplers that tell their order."""
        still = {name: holder for name, holder in self._holders.items() if tells_order(holder)}
        return own_state.capture(still) or None

    def _iterator_of(self, loader: Any) -> Iterator[Any]:
        iterator = iterate(loader)
        if iterator is not loader:
            return iterator
        once = Once(iterator, self.epoch)
        if self._once is not None and not once.has_more():
            raise ValueError(
                f"[Loop] epoch {self.epoch}: the loader gave no batch: a generator can be gone through once; pass a "
                "list, a DataLoader or an object whose __iter__ begins anew"
            )
        self._once = once
        return once

    def _go_on(self, once: Once, position: Position) -> None:
        """In the epoch under way, with what the iterator gives next: what it gave before it cannot give again."""
        once.back_to(position.batches)
        if position.now is not None:
            random_state.restore(position.now, self.generators)
        self.start = position.start or self.start
        self.own_start = position.own_start or self.own_start
        self._iterator = once
        self.batches = self.batches_before = position.batches
        self.begun = True

    def _replay(self, count: int) -> None:
        assert self._iterator is not None
        for i in range(count):
            batch = next(self._iterator, END)
            if batch is END:
                raise RuntimeError(
                    f"[Loop] the checkpoint was made after {count} batches of epoch {self.epoch}, and the loader has "
                    f"only {i}; the data or the batch size have changed: pass resume=False, or resume from the start "
                    "of an epoch"
                )
            self._spare = batch

    def position(self) -> Position:
        """Where the run is, at the end of a window."""
        divided = distributed_sampler(self.loader) is not None
        return Position(
            epoch=self.epoch,
            batches=self.batches,
            padded=self.padded,
            start=self.start,
            now=random_state.capture(self.generators),
            loader=self._current.state_dict() if keeps_own_state(self._current) else None,
            consumed=self._consumed(self.batches),
            world=self.ranks.size,
            skip=self.skip,
            order=self.order or (None if divided else self.start),
            own_start=self.own_start or None,
            own=self.own(),
        )

    def position_of_last_window(self) -> Position:
        """Where the last whole window ended; inside of one, the random states of now have moved on since."""
        position = self.position()
        if self.batches_before != self.batches:
            position.loader = None  # its own state is beyond the window: it is replayed
            position.own = self._own_unread()  # as are those of its other parts
        position.batches = self.batches_before
        position.consumed = self._consumed(self.batches_before)
        if position.batches == 0:  # the order of the epoch is drawn with the first batch: before that nothing counts
            position.now = self.start
            position.own = self._own_unread()
        return position

    def _consumed(self, batches: int) -> int:
        """Samples of the epoch that all ranks have consumed after `batches`; `skip` where nobody knows."""
        size = batch_size_of(self._current) if divisible(self._given) else 0
        return self.skip + batches * self.ranks.size * size

    def restore_random(self, position: Position) -> None:
        """Put back the random states of `position`, where no iterator will be made."""
        if not self.begun and position.now is not None:
            random_state.restore(position.now, self.generators)

    def also_keep(self, loader: Any) -> None:
        """The states of this other loader's generators belong to the run too."""
        known = {id(g) for g in self.generators}
        self.generators += [g for g in generators_of(loader) if id(g) not in known]

    def position_before(self, epoch: int) -> Position:
        """Where the run is, before the iterator of `epoch` is made."""
        return Position(epoch, now=random_state.capture(self.generators), world=self.ranks.size, own=self.own())

    def _remaining(self, position: Position) -> Any:
        """A loader of the samples of this epoch that ranks of another number left, divided among these ranks."""
        given = self._given
        if not divisible(given):
            raise indivisible(position.world)
        left = self._order(given, position)[position.skip :]
        size, rank = self.ranks.size, self.ranks.rank
        drop_last = bool(getattr(self.loader.batch_sampler, "drop_last", False))
        if drop_last:
            left = left[: len(left) // size * size]
        elif left[rank::size] == [] and left:  # a rank that gets nothing computes on a sample of another's, weight 0
            self._spare = (given.collate_fn or default_collate)([given.dataset[left[0]]])
        batches = torch.utils.data.BatchSampler(left[rank::size], batch_size_of(self.loader), drop_last)
        return rebuilt(given, batches)

    def _order(self, given: DataLoader[Any], position: Position) -> list[int]:
        """All samples of the epoch in the order of the ranks that began it."""
        if tells_order(given.sampler):
            return order_of(given.sampler, position.epoch)
        if position.order is not None:
            kept = random_state.capture(self.generators)
            random_state.restore(position.order, self.generators)
            torch.empty((), dtype=torch.int64).random_(generator=given.generator)  # DataLoader draws its seed first
            order = [index for batch in given.batch_sampler for index in batch]  # type: ignore[union-attr]
            random_state.restore(kept, self.generators)
            return order
        sampler = distributed_sampler(given)
        whole: DistributedSampler[Any] = (
            share_of(given, 1, 0, self.seed)
            if sampler is None
            else DistributedSampler(given.dataset, 1, 0, shuffle=sampler.shuffle, seed=sampler.seed)
        )
        whole.set_epoch(position.epoch)
        return list(whole)

    def next(self) -> Any:
        """The next batch, on the device; END where the epoch has no more."""
        before = perf_counter()
        assert self._iterator is not None
        batch = next(self._iterator, END)
        self.wait_seconds += perf_counter() - before
        if batch is END:
            return END
        if self._once is not None:
            if self.batches == self.batches_before:
                self._once.window.clear()
            self._once.window.append(batch)
        self.batches += 1
        if self.ranks.size > 1:
            self._spare = batch
        return self.moved(batch)

    def repeated(self) -> Any:
        """The last batch again, for a rank that has no more while others have."""
        if self._spare is None:
            raise RuntimeError(
                f"[Loop] rank {self.ranks.rank} has no data in epoch {self.epoch} while others have; every rank "
                "needs at least one batch"
            )
        self.padded += 1
        return self.moved(self._spare)

    def moved(self, batch: Any) -> Any:
        """`batch` on the device; on a GPU by a copy that runs beside the computation under way."""
        device = self.ranks.device
        if self._stream is None:
            if device.type != "cpu" or self.channels_last:
                return map_tensors(batch, self._placed)
            return batch
        main = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._stream):
            moved = map_tensors(batch, lambda t: self._copied(t, main))
        main.wait_stream(self._stream)
        return map_tensors(moved, self._placed) if self.channels_last else moved

    def _copied(self, tensor: Tensor, main: Any) -> Tensor:
        """On the stream of copies, for use on `main`; what is on a device already is `main`'s own."""
        if tensor.device.type != "cpu":
            return tensor.to(self.ranks.device, non_blocking=True)
        if tensor.layout != torch.strided:
            return tensor.to(self.ranks.device)
        pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
        moved = pinned.to(self.ranks.device, non_blocking=True)
        moved.record_stream(main)
        return moved

    def _placed(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.ranks.device)
        if self.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def close(self) -> None:
        """End the iterator and its workers, also one that hangs: they ignore the signal that DataLoader would send."""
        workers = list(getattr(self._iterator, "_workers", ()))
        self._iterator = None
        if getattr(self._current, "persistent_workers", False):
            self._current._iterator = None
        for worker in workers:  # DataLoader has waited for them by now, five seconds for each
            if worker.is_alive():
                worker.kill()

    def is_stateful(self, loader: Any) -> bool:
        """Whether `loader` is this feed's and keeps a place of its own, which another iterator would move."""
        return loader is self._given and keeps_own_state(self._current)

    def windows_of(self, epochs: int, accumulation_steps: int, enough: float = math.inf) -> int | None:
        """Windows of so many whole epochs on this rank (at least `enough`), None where the loader does not know."""
        lengths = batches_by_epoch(self.loader, epochs, enough * accumulation_steps)
        if lengths is None:
            length = length_of(self.loader)
            return None if length is None else epochs * math.ceil(length / accumulation_steps)
        windows = [math.ceil(length / accumulation_steps) for length in lengths]
        return sum(windows) + (epochs - len(windows)) * (windows[-1] if windows else 0)

    def length(self) -> int | None:
        """Batches of the present epoch on this rank, None where the loader does not know."""
        return length_of(self._current)


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    """One for each device: a stream keeps the memory of what was made on it."""
    return torch.cuda.Stream(device)


# ---- batches


def map_tensors(batch: Any, function: Any) -> Any:
    """`batch` with `function` applied to each tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(value, function) for key, value in batch.items()}
        return mapped if type(batch) is dict else _like(batch, mapped)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def _like(batch: Any, mapped: dict[Any, Any]) -> Any:
    """A mapping of the batch's own class, such as transformers' BatchEncoding, which is made from a dict."""
    try:
        return type(batch)(mapped)
    except TypeError:
        return mapped


def first_tensor(batch: Any) -> Tensor | None:
    """The batch's first tensor, in the order of its items; None without one."""
    if isinstance(batch, Tensor):
        return batch
    items: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        items = batch.values()
    elif isinstance(batch, (list, tuple)):
        items = batch
    for item in items:
        found = first_tensor(item)
        if found is not None:
            return found
    return None


def samples_in(batch: Any) -> int:
    """Size of the first dimension of the batch's first tensor; 1 for a scalar, or without any tensor."""
    tensor = (
        batch[0] if type(batch) in (list, tuple) and batch and isinstance(batch[0], Tensor) else first_tensor(batch)
    )
    return 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]


def sliced(batch: Any, start: int, stop: int) -> Any:
    """Samples start..stop of a batch: each tensor whose first dimension is the batch's is cut."""
    size = samples_in(batch)
    return map_tensors(batch, lambda t: t[start:stop] if t.dim() > 0 and t.shape[0] == size else t)
