# SPDX-License-Identifier: Apache-2.0
"""Train, validation and test: by chance, by class, by group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Subset

from fastloop.recipes.data.apportion import Counts, Shares, apportioned
from fastloop.recipes.data.labels import as_labels, labels_of
from fastloop.recipes.data.samples import as_dataset, with_index
from fastloop.recipes.data.splits import PARTS, Split
from fastloop.recipes.sampling import generator_of

AREA = "split"


def split(
    dataset: Any,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    *,
    labels: Any = None,
    groups: Any = None,
    stratify: bool | None = None,
    seed: int = 0,
) -> Split:
    """Divide a data set into train, validation and test, each sample in one of them, shuffled.

    Sizes are n*fraction rounded by the largest remainder, so that they add up to n. Stratified, each class is divided
    in the same way, has at least one sample in each part, and the sizes of the parts stay the same. With groups (a
    patient, a speaker, copies of one sample) no group is in two parts, and sizes are as near as whole groups allow.

    Args:
        dataset: with an index, or a pair of tensors.
        fractions: of train, validation and, unless 0, test; they add up to 1.
        labels: the class of each sample, as integers.
        groups: the group of each sample: numbers or names.
        stratify: by class; None: if labels are given; True without labels takes `labels_of(dataset)`.
        seed: of the order; torch's own random state is neither read nor changed.

    Raises:
        TypeError: no data set, or one without an index.
        ValueError: fractions that do not add up, labels or groups of another number, a part that would be empty, a
            class with fewer samples than there are parts, fewer groups than parts.
    """
    data = with_index(as_dataset(dataset, AREA), AREA)
    n = len(data)
    shares = _checked(fractions, n)
    if stratify is False and labels is not None:
        raise ValueError(f"[{AREA}] labels are for stratify=True, got stratify=False with labels; leave one out")
    stratified = labels is not None if stratify is None else stratify
    classes, codes = _classes(labels_of(data) if labels is None else labels, n) if stratified else (None, None)
    generator = generator_of(seed)
    if groups is not None:
        part_of = _by_group(_coded(groups, n, "groups"), codes, shares, generator)
    else:
        part_of = _by_sample(numpy.zeros(n, numpy.int64) if codes is None else codes, classes, shares, generator)
    order = torch.randperm(n, generator=generator).numpy()
    indices = [order[part_of[order] == part].tolist() for part in range(3)]
    counted = None
    if classes is not None and codes is not None:
        counted = {
            name: dict(zip(classes, numpy.bincount(codes[indices[part]], minlength=len(classes)).tolist(), strict=True))
            for part, name in enumerate(PARTS)
        }
    train, validation, test = (Subset(data, each) for each in indices)
    return Split(
        train,
        validation,
        test,
        sizes={name: len(each) for name, each in zip(PARTS, indices, strict=True)},
        fractions=tuple(shares.tolist()),
        seed=seed,
        stratified=stratified,
        grouped=groups is not None,
        classes=counted,
    )


def _checked(fractions: Sequence[float], n: int) -> Shares:
    """Three fractions."""
    try:
        shares = numpy.array([*fractions], dtype=numpy.float64)
    except (TypeError, ValueError):
        shares = numpy.empty(0)  # refused with what came
    if shares.shape not in ((2,), (3,)) or not (shares >= 0).all() or abs(shares.sum() - 1) > 1e-6 or shares[0] == 0:
        raise ValueError(
            f"[{AREA}] fractions must be two or three numbers of at least 0 that add up to 1, the first above 0, got "
            f"{fractions!r}; pass e.g. (0.8, 0.1, 0.1)"
        )
    shares = numpy.append(shares, [0.0] * (3 - len(shares)))
    if ((apportioned(n, shares) == 0) & (shares > 0)).any():
        raise ValueError(f"[{AREA}] each part must have a sample, {n} samples are too few for {tuple(fractions)}")
    return shares


def _coded(values: Any, n: int, name: str) -> Counts:
    """0, 1, 2, ... for what is the same."""
    array = values.cpu().numpy() if isinstance(values, Tensor) else numpy.asarray(values)
    if array.shape != (n,):
        raise ValueError(f"[{AREA}] {name} must be one for each of the {n} samples, got shape {[*array.shape]}")
    if array.dtype == object:  # names beside None or numbers, which have no order
        codes: dict[Any, int] = {}
        return numpy.array([codes.setdefault(value, len(codes)) for value in array.tolist()], dtype=numpy.int64)
    return numpy.unique(array, return_inverse=True)[1].astype(numpy.int64)


def _classes(labels: Any, n: int) -> tuple[list[int], Counts]:
    given = as_labels(labels, AREA)
    if given.is_floating_point():
        raise ValueError(
            f"[{AREA}] classes must be integers, got {given.dtype}; for numbers pass their bins, e.g. "
            "labels=torch.bucketize(targets, boundaries), or stratify=False"
        )
    codes = _coded(given, n, "labels")
    return numpy.unique(given.numpy()).tolist(), codes


def _by_sample(codes: Counts, classes: list[int] | None, shares: Shares, generator: torch.Generator) -> Counts:
    """The part of each sample."""
    sizes = apportioned(len(codes), shares)
    counts = numpy.bincount(codes)
    table = sizes[None] if classes is None else _stratified(counts, classes, shares, sizes)
    part_of = numpy.empty(len(codes), numpy.int64)
    order = torch.randperm(len(codes), generator=generator).numpy()
    by_class = order[numpy.argsort(codes[order], kind="stable")]
    part_of[by_class] = numpy.concatenate([numpy.repeat(numpy.arange(3), row) for row in table])
    return part_of


def _stratified(counts: Counts, classes: list[int], shares: Shares, sizes: Counts) -> Counts:
    """Samples of each class in each part: rows add up to the classes' counts, columns to the parts' sizes."""
    wanted = shares > 0
    few = [label for label, count in zip(classes, counts, strict=True) if count < wanted.sum()]
    if few:
        raise ValueError(
            f"[{AREA}] each class must have a sample in each of {wanted.sum()} parts, class {few[0]} has "
            f"{counts[classes.index(few[0])]} in all ({len(few)} such classes); merge rare classes, or pass "
            "stratify=False"
        )
    small = [part for part in numpy.flatnonzero(wanted) if sizes[part] < len(classes)]
    if small:
        raise ValueError(
            f"[{AREA}] each class must have a sample in each part, {PARTS[small[0]]} has room for {sizes[small[0]]} of "
            f"{len(classes)} classes; give it a larger fraction, or pass stratify=False"
        )
    table = numpy.stack([apportioned(int(count), shares) for count in counts])
    for row in table:
        for part in numpy.flatnonzero(wanted & (row == 0)):
            row[row.argmax()] -= 1
            row[part] += 1
    quotas = counts[:, None] * shares
    while (surplus := table.sum(0) - sizes).any():
        # One sample of the class that is nearest to its quota afterwards: |a - q| grows by 1 - 2*(a - q) when a falls.
        source, sink = int(surplus.argmax()), int(surplus.argmin())
        gain = (table - quotas)[:, source] - (table - quotas)[:, sink]
        row = int(numpy.where(table[:, source] > 1, gain, -numpy.inf).argmax())
        table[row, source] -= 1
        table[row, sink] += 1
    return table


def _by_group(groups: Counts, codes: Counts | None, shares: Shares, generator: torch.Generator) -> Counts:
    """The part of each sample; whole groups, the largest first, go where they are missed most.

    To the part where the sum of squares of (count - wanted)/total, over the classes, grows least.
    """
    classes = numpy.zeros_like(groups) if codes is None else codes
    number = int(groups.max()) + 1
    open_parts = numpy.flatnonzero(shares > 0)
    if number < len(open_parts):
        raise ValueError(
            f"[{AREA}] each part must have a group, got {number} groups for {len(open_parts)} parts; pass finer groups "
            "or fewer parts"
        )
    in_order = classes[numpy.argsort(groups, kind="stable")]
    sizes = numpy.bincount(groups)
    ends = sizes.cumsum()
    totals = numpy.bincount(classes)
    missing = shares[open_parts, None] * totals  # what each part still wants of each class
    shuffled = torch.randperm(number, generator=generator).numpy()
    order = shuffled[numpy.argsort(-sizes[shuffled], kind="stable")]
    part_of_group = numpy.full(number, -1, numpy.int64)
    empty = set(range(len(open_parts)))
    for place, group in enumerate(order):
        members = numpy.bincount(in_order[ends[group] - sizes[group] : ends[group]], minlength=len(totals))
        growth = ((members - 2 * missing) * members / totals.astype(numpy.float64) ** 2).sum(1)
        if number - place == len(empty):  # the rest of the groups, one for each part that has none
            growth[[part for part in range(len(open_parts)) if part not in empty]] = numpy.inf
        part = int(growth.argmin())
        empty.discard(part)
        missing[part] -= members
        part_of_group[group] = open_parts[part]
    return part_of_group[groups]
