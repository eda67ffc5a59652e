# SPDX-License-Identifier: Apache-2.0
"""Loaders: what is shuffled and what not, what is left out, what is random."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from fastloop.checks.leakage import check_leakage
from fastloop.checks.samples import dataset_of, evenly, input_of, is_random, labels
from fastloop.checks.undisturbed import data_kept
from fastloop.findings import Finding
from fastloop.loop.loader import batch_size_of, distributed_sampler, length_of
from fastloop.loop.seeded import SeededDataset

LOOKED_AT = 64  # samples whose labels show whether they are sorted
HASHED = 256  # samples of each split that are compared; more where they are in memory
IMAGE_SIDE = 8  # from which on three dimensions are taken for an image


def check_loader(train_loader: Any, val_loader: Any = None) -> list[Finding]:
    """Unshuffled training data (an error where labels are sorted), shuffled, cut or augmented validation, overlap.

    Loaders are not iterated over. A few samples are read by their index, at most 64 for labels and 256 for the
    overlap, of either; generators and attributes of the data sets are put back. What can be iterated over only, is
    passed over with a note.
    """
    findings = check_order(train_loader)
    with data_kept(train_loader, val_loader):
        findings += _augmentation(train_loader)
        if val_loader is not None:
            findings += _validation(val_loader)
    if val_loader is not None and dataset_of(val_loader) is not None and dataset_of(train_loader) is not None:
        findings += check_leakage(train_loader, val_loader, samples=HASHED)
    return findings


def check_order(loader: Any) -> list[Finding]:
    """Whether training samples come in the data set's own order, and that one is by class."""
    data = dataset_of(loader) if isinstance(loader, DataLoader) else None
    if data is None:
        iterable = isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset)
        kind = "an iterable data set" if iterable else type(loader).__name__
        return [Finding("note", "train_loader", f"{kind}: whether it shuffles cannot be seen")]
    if not _in_order(loader) or len(data) < 2:
        return []
    remedy = "DataLoader(..., shuffle=True)"
    with data_kept(loader):
        found = labels(data, evenly(len(data), LOOKED_AT))
    if (
        found is not None
        and found in (sorted(found), sorted(found, reverse=True))
        and 1 < len(set(found)) <= len(found) / 2
    ):
        what = f"training data are not shuffled, and sorted by label ({found[0]} to {found[-1]}): one class a batch"
        return [Finding("error", "train_loader", what, remedy)]
    return [
        Finding("warning", "train_loader", "training data are not shuffled: each epoch has the same batches", remedy)
    ]


def last_batch(loader: Any) -> int:
    """Samples of the last batch of an epoch, where it is a shorter one; 0 otherwise, or where nobody knows."""
    size = batch_size_of(loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or not size:
        return 0
    if getattr(loader.batch_sampler, "drop_last", loader.drop_last):
        return 0
    return (length_of(_sampler_of(loader)) or 0) % size


def is_image(value: Any) -> bool:
    """A float or byte tensor [1, 3 or 4, height, width]."""
    if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[0] not in (1, 3, 4):
        return False
    return min(value.shape[1:]) >= IMAGE_SIDE


def _in_order(loader: DataLoader[Any]) -> bool:
    shared = distributed_sampler(loader)
    if shared is not None:
        return not shared.shuffle
    return isinstance(_sampler_of(loader), (SequentialSampler, list, tuple))


def shuffles(loader: Any) -> bool:
    """Whether it is known to draw samples at random."""
    if not isinstance(loader, DataLoader) or dataset_of(loader) is None:
        return False
    shared = distributed_sampler(loader)
    if shared is not None:
        return bool(shared.shuffle)
    return isinstance(_sampler_of(loader), (RandomSampler, WeightedRandomSampler))


def _sampler_of(loader: DataLoader[Any]) -> Any:
    """What gives the order: with a batch_sampler of one's own, the loader's sampler is there and not used."""
    if loader.batch_sampler is None:
        return loader.sampler
    return getattr(loader.batch_sampler, "sampler", loader.batch_sampler)


def _augmentation(loader: Any) -> list[Finding]:
    data = dataset_of(loader)
    if data is None or len(data) == 0 or not is_image(input_of(data[0])):
        return []
    if isinstance(loader.dataset, SeededDataset) or is_random(data, evenly(len(data), 2)) is not False:
        return []  # a SeededDataset draws anew for each epoch, and not each time it is read
    what = "training images are the same each time they are read: no augmentation can be seen"
    return [Finding("note", "train_loader", what, "augment them: fastloop.recipes.augmentation")]


def _validation(loader: Any) -> list[Finding]:
    findings = []
    data = dataset_of(loader)
    if data is not None and len(data) and is_random(data, evenly(len(data), 2)):
        what = "validation samples are random: two evaluations of one model differ"
        remedy = "evaluate without augmentation, on a data set of its own"
        if isinstance(data, Subset):
            remedy += ": Subsets of one data set share its transform"
        findings.append(Finding("warning", "val_loader", what, remedy))
    if not isinstance(loader, DataLoader) or data is None:
        return findings
    if isinstance(_sampler_of(loader), RandomSampler):
        findings.append(Finding("note", "val_loader", "validation data are shuffled, which changes no metric"))
    size = batch_size_of(loader)
    if size and getattr(loader.batch_sampler, "drop_last", loader.drop_last) and len(data) % size:
        what = f"drop_last=True leaves {len(data) % size} validation samples out"
        findings.append(Finding("warning", "val_loader", what, "drop_last=False"))
    return findings
