# SPDX-License-Identifier: Apache-2.0
"""DataLoaders: divided among ranks, told the epoch, rebuilt with other settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from fastloop.loop.own_state import has_state
from fastloop.loop.seeded import SeededDataset
from fastloop.loop.shares import batches_plainly, plain, share_of, tells_order
from fastloop.loop.signals import ShieldedInit
from fastloop.loop.strategy import Ranks

# What a subclass of DataLoader may do in its own way, and a DataLoader built anew would not.
BEHAVIOUR = ("__iter__", "_get_iterator", "__len__", "set_epoch", "state_dict", "load_state_dict")


@dataclass(frozen=True)
class LoaderSettings:
    """How a loader loads, the table `[loader]` of a config; None leaves a setting as it is.

    Raises:
        ValueError: one out of range or of another type.
    """

    batch_size: int | None = None
    num_workers: int | None = None
    prefetch_factor: int | None = None
    pin_memory: bool | None = None
    persistent_workers: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_workers", 0), ("prefetch_factor", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"[loader] {name} must be an integer of at least {least}, got {value!r}")
        for name in ("pin_memory", "persistent_workers"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"[loader] {name} must be True or False, got {value!r}")


# ---- rebuilt


def with_settings(given: Any, settings: Mapping[str, Any]) -> DataLoader[Any]:
    """A DataLoader of the same samples in the same order, loaded with these settings.

    What settings do not name stays: sampler and generator, collate_fn, worker_init_fn, drop_last and the others. With
    num_workers=0 what is only of workers (prefetch_factor, persistent_workers, timeout) falls away.

    Args:
        given: a DataLoader, or a data set: then batch_size is needed, and one with an index is shuffled.
        settings: by the names of `LoaderSettings`.

    Raises:
        TypeError: neither of the two, a loader whose class builds its batches itself, or an unknown setting.
        ValueError: a setting out of range, or one that the loader cannot take.
    """
    unknown = [name for name in settings if name not in LoaderSettings.__dataclass_fields__]
    if unknown:
        raise TypeError(
            f"[loader] settings are {', '.join(LoaderSettings.__dataclass_fields__)}, got {', '.join(unknown)}"
        )
    wanted = {name: value for name, value in asdict(LoaderSettings(**settings)).items() if value is not None}
    size = wanted.pop("batch_size", None)
    if not isinstance(given, DataLoader):
        return _of_dataset(given, size, wanted)
    cls = _class_of(given)
    manner = _for_workers(_manner(given) | wanted, wanted, given.num_workers)
    if cls is not DataLoader:
        manner["snapshot_every_n_steps"] = given.snapshot_every_n_steps  # type: ignore[attr-defined]
    rebuilt_loader: DataLoader[Any] = cls(given.dataset, **_batching(given, size), **manner)
    return rebuilt_loader


def rebuilt(loader: DataLoader[Any], batch_sampler: Any) -> DataLoader[Any]:
    """A DataLoader like `loader` with other batches of indices."""
    copied: DataLoader[Any] = DataLoader(loader.dataset, batch_sampler=batch_sampler, **_manner(loader))
    return copied


def _manner(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader loads, whatever the samples: arguments of DataLoader."""
    more: dict[str, Any] = {"in_order": loader.in_order} if hasattr(loader, "in_order") else {}
    if getattr(loader, "pin_memory_device", ""):
        more["pin_memory_device"] = loader.pin_memory_device
    return {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
        **more,
    }


def _for_workers(manner: dict[str, Any], wanted: Mapping[str, Any], before: int) -> dict[str, Any]:
    """Without what DataLoader takes for workers only, where there are none.

    Raises:
        ValueError: such a setting is asked for, and neither the settings nor the loader say how many workers.
    """
    if manner["num_workers"] > 0:
        return manner
    asked = [name for name in ("prefetch_factor", "persistent_workers") if wanted.get(name)]
    if asked and before == 0 and "num_workers" not in wanted:
        raise ValueError(f"[loader] {asked[0]} is of workers, and the loader has none; give num_workers too, e.g. 2")
    only_of_workers = {
        "prefetch_factor": None, "persistent_workers": False, "timeout": 0, "multiprocessing_context": None
    }  # fmt: skip
    return manner | only_of_workers


def _batching(loader: DataLoader[Any], size: int | None) -> dict[str, Any]:
    """The samples of a batch: arguments of DataLoader."""
    own = loader.batch_size is None and loader.batch_sampler is not None
    if size is not None and loader.batch_size is None:
        what = "a batch_sampler of its own" if own else "batch_size=None: its data set makes the batches"
        raise ValueError(
            f"[loader] batch_size={size} for a loader with {what}; leave batch_size out, or give the DataLoader a "
            "batch_size and a sampler"
        )
    if own:
        return {"batch_sampler": loader.batch_sampler}
    batching: dict[str, Any] = {"batch_size": size or loader.batch_size, "drop_last": loader.drop_last}
    if not isinstance(loader.dataset, IterableDataset):  # which have none, and DataLoader refuses one
        batching["sampler"] = loader.sampler
    return batching


def _class_of(loader: DataLoader[Any]) -> type[DataLoader[Any]]:
    """DataLoader, or torchdata's that keeps its place.

    Raises:
        TypeError: a class with a behaviour of its own, which a DataLoader in its place would lose.
    """
    for cls in type(loader).__mro__:
        if cls is DataLoader or (cls.__name__ == "StatefulDataLoader" and cls.__module__.startswith("torchdata.")):
            return cls
        own = [name for name in BEHAVIOUR if name in vars(cls)]
        if own:
            raise TypeError(
                f"[loader] {type(loader).__name__} has {' and '.join(own)} of its own, which a DataLoader with other "
                "settings would lose; return a torch.utils.data.DataLoader, or give the settings where it is made"
            )
    return DataLoader


def _of_dataset(data: Any, size: int | None, wanted: Mapping[str, Any]) -> DataLoader[Any]:
    with_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    is_data = isinstance(data, Dataset) or (with_index and not isinstance(data, (list, tuple, Mapping, str)))
    if not is_data:
        raise TypeError(
            f"[loader] settings are for a DataLoader or a data set, got {type(data).__name__}; return one of these as "
            "train_loader, or leave the settings out"
        )
    if size is None:
        raise ValueError(
            f"[loader] train_loader is a data set ({type(data).__name__}), and batch_size is not given; write it in "
            "the table [loader], or return a DataLoader"
        )
    manner = _for_workers({"num_workers": 0, **wanted}, wanted, 0)
    shuffle = None if isinstance(data, IterableDataset) else True
    loader: DataLoader[Any] = DataLoader(data, batch_size=size, shuffle=shuffle, **manner)
    return loader


# ---- what a loader is


def length_of(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def iterate(loader: Any) -> Iterator[Any]:
    """iter(loader); a DataLoader's workers are shielded from the signals that ask the run to save and stop."""
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return iter(loader)
    own = loader.worker_init_fn
    if loader.persistent_workers:
        # Workers that live on would go on with the random states of the epochs before, which a resumed run cannot
        # reach without reading them all again: they start anew with each epoch.
        loader._iterator = None
    if not isinstance(own, ShieldedInit):
        loader.worker_init_fn = ShieldedInit(own)
    try:
        return iter(loader)
    finally:
        loader.worker_init_fn = own


def generators_of(loader: Any) -> list[torch.Generator]:
    """Generators that the user gave to the loader and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found: dict[int, torch.Generator] = {}
    for holder in holders:
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def set_epoch(loader: Any, epoch: int) -> None:
    """Tell whatever goes by the epoch's number: the data set, samplers of the loader, the loader itself."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (  # the data set first: samplers ask for its length
        getattr(loader, "dataset", None), loader, getattr(loader, "sampler", None), batch_sampler,
        getattr(batch_sampler, "sampler", None),
    )  # fmt: skip
    for holder in {id(h): h for h in holders}.values():
        told = getattr(holder, "set_epoch", None)
        if callable(told):
            told(epoch)


def shared_among(loader: Any, ranks: Ranks, seed: int = 0) -> Any:
    """`loader`, or one in its place whose samples are divided among the ranks.

    A DataLoader that shuffles, goes through its data in order, or has a sampler that tells its order (see
    `fastloop.loop.shares`), would give every rank all of the data: it gets a DistributedSampler. A loader with another
    sampler, with an iterable data set, or that is no DataLoader, is taken as one that divides already.

    Raises:
        ValueError: a DataLoader without batches of indices, which would give every rank all of the data.
    """
    if ranks.size == 1 or not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    if loader.batch_sampler is None and (plain(loader.sampler) or tells_order(loader.sampler)):
        raise ValueError(
            f"[Loop] DataLoader(batch_size=None) gives each of the {ranks.size} ranks all of the data; pass it a "
            "batch_size, or sampler=torch.utils.data.DistributedSampler(dataset)"
        )
    if not _divided_here(loader):
        return loader
    sampler: Any = share_of(loader, ranks.size, ranks.rank, seed)
    return rebuilt(loader, torch.utils.data.BatchSampler(sampler, loader.batch_size or 1, loader.drop_last))


def _divided_here(loader: DataLoader[Any]) -> bool:
    return (plain(loader.sampler) or tells_order(loader.sampler)) and batches_plainly(loader)


def divisible(loader: Any) -> bool:
    """Whether it is known what ranks of any number have left of an epoch."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return _divided_here(loader) or (distributed_sampler(loader) is not None and batch_size_of(loader) > 0)


def indivisible(world: int) -> RuntimeError:
    return RuntimeError(
        f"[Loop] the checkpoint was made by {world} ranks in the middle of an epoch; what is left can be divided among "
        "another number of ranks for a DataLoader over a map-style data set only, in batches of one size, that "
        "shuffles, goes in order, or has a DistributedSampler or a sampler with indices(epoch); resume with that "
        "number of ranks, or from the start of an epoch"
    )


def skippable(loader: Any) -> bool:
    """Whether a batch that is not read leaves no trace: its samples have seeds of their own."""
    return (
        isinstance(loader, DataLoader)
        and isinstance(loader.dataset, SeededDataset)
        and loader.batch_sampler is not None
    )


def keeps_own_state(loader: Any) -> bool:
    """Whether the loader's own state brings it back exactly.

    That of torchdata's StatefulDataLoader does not hold what its workers have drawn: over a map-style data set that
    draws, only a replay does. And a sampler that has a state is asked for it in place of being skipped through.
    """
    if not (hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")):
        return False
    if isinstance(loader, DataLoader) and has_state(loader.sampler):
        return False
    if not isinstance(loader, DataLoader) or loader.num_workers == 0:
        return True
    data = loader.dataset
    return isinstance(data, (IterableDataset, SeededDataset)) or hasattr(data, "state_dict")


def distributed_sampler(loader: Any) -> DistributedSampler[Any] | None:
    """The loader's DistributedSampler, if it has one."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    for sampler in (getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None


def batch_size_of(loader: Any) -> int:
    """Samples of a batch of indices; 0 where the loader does not say."""
    return (
        getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None) or 0
    )
