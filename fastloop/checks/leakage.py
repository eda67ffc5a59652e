# SPDX-License-Identifier: Apache-2.0
"""What validation or test data share with the training data: samples, or the statistics of their normalization."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, TensorDataset

from fastloop.checks.samples import base_of, dataset_of, digest, evenly, input_of, is_random
from fastloop.checks.undisturbed import data_kept
from fastloop.findings import Finding

CHEAP = 20_000  # samples of tensors in memory that are hashed
MOST_ELEMENTS = 20_000_000  # of tensors in memory whose statistics are looked at


def check_leakage(train: Any, *others: Any, normalization: Any = None, samples: int = 2000) -> list[Finding]:
    """The same samples in two splits, and normalization by statistics of more than the training split.

    Errors: the same data set, or Subsets of one with indices in common. Warnings: files in common; equal inputs
    among at most `samples` of each, at equal distances (of tensors in memory 20000), unless the training data repeat
    themselves as much; inputs that have mean 0 and deviation 1 only together with the other splits.

    Args:
        train, others: data sets with an index, or loaders of them. What has no index is passed over with a note.
        normalization: with `count`, the samples that its statistics are of, as `fastloop.recipes.Normalization`; an
            error if the training split has fewer.
        samples: read of each at most, one by one. What draws random numbers in reading is put back.

    Raises:
        ValueError: samples below 1.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"[checks] samples must be an integer of at least 1, got {samples!r}")
    data = dataset_of(train)
    if data is None or len(data) == 0:
        return [Finding("note", "leakage", "the training data have no index: shared samples cannot be seen")]
    findings: list[Finding] = []
    with data_kept(train, *others):
        if normalization is not None:
            findings += _statistics_of_more(data, normalization)
        for number, other in enumerate(others):
            name = "the validation data" if len(others) == 1 else f"split {number + 2}"
            other = dataset_of(other)
            if other is None:
                findings.append(Finding("note", "leakage", f"{name} have no index: shared samples cannot be seen"))
            elif len(other):
                findings += _shared(data, other, name, samples)
        findings += _normalized_together(data, [dataset_of(other) for other in others])
    return findings


def _shared(train: Any, other: Any, name: str, samples: int) -> list[Finding]:
    base, indices = base_of(train)
    other_base, other_indices = base_of(other)
    if base is other_base:
        common = set(indices) & set(other_indices)
        if common:
            what = f"{len(common)} of {len(other)} samples of {name} are training samples, as number {min(common)} is"
            return [Finding("error", "leakage", what, "split the data set once: fastloop.recipes.split")]
    files = set(_files(base, indices))
    common_files = [file for file in _files(other_base, other_indices) if file in files]
    if common_files:
        what = f"{len(common_files)} files of {name} are training files, the first is {common_files[0]}"
        return [Finding("warning", "leakage", what, "split the files once")]
    return _equal_inputs(train, other, name, samples)


def _files(base: Any, indices: Any) -> list[str]:
    """Paths of the samples, of a data set that lists them as torchvision's folders do."""
    for name in ("samples", "imgs", "files"):
        known = getattr(base, name, None)
        if isinstance(known, (list, tuple)) and len(known) == len(base) and len(known):
            paths = [each[0] if isinstance(each, (tuple, list)) and each else each for each in known]
            return [str(paths[i]) for i in indices] if isinstance(paths[0], str) else []
    return []


def _equal_inputs(train: Any, other: Any, name: str, samples: int) -> list[Finding]:
    if any(is_random(data, evenly(len(data), 2)) for data in (train, other)):
        return [Finding("note", "leakage", f"inputs are random: whether {name} have training samples cannot be seen")]
    known, seen = _digests(train, samples), _digests(other, samples)
    if not known or not seen:
        return []
    counts = Counter(known)
    shared = sum(each in counts for each in seen)
    repeated = len(known) - len(counts)
    # Data of few values, such as short texts, have equal inputs by chance: the training data repeat themselves then.
    if not shared or shared / len(seen) <= 2 * repeated / len(known):
        return []
    what = f"{shared} of {len(seen)} inputs of {name} that were looked at are equal to training inputs"
    return [Finding("warning", "leakage", what, "remove copies before the split, or split by group: split(groups=...)")]


def _digests(data: Any, samples: int) -> list[bytes]:
    base, _ = base_of(data)
    places = evenly(len(data), max(samples, CHEAP) if isinstance(base, TensorDataset) else samples)
    made = [digest(input_of(data[place])) for place in places]
    return [each for each in made if each is not None]


# ---- normalization


def _statistics_of_more(train: Any, normalization: Any) -> list[Finding]:
    count = getattr(normalization, "count", None)
    if isinstance(count, bool) or not isinstance(count, int):
        return [Finding("note", "normalization", "it has no count: what its statistics are of cannot be seen")]
    if count <= len(train):
        return []
    what = f"its statistics are of {count} samples, and the training split has {len(train)}"
    return [
        Finding("error", "normalization", what, "fit it on the training split alone: fit_normalization(split.train)")
    ]


def _normalized_together(train: Any, others: list[Any]) -> list[Finding]:
    """Mean 0 and deviation 1 of all splits together, to rounding, and not of the training split alone."""
    parts = [_inputs(train), *(_inputs(other) for other in others if other is not None)]
    tensors = [part for part in parts if part is not None and part.is_floating_point()]
    if len(tensors) < 2 or len(tensors) != len(parts) or sum(t.numel() for t in tensors) > MOST_ELEMENTS:
        return []
    if any(t.shape[1:] != tensors[0].shape[1:] or len(t) < 2 for t in tensors):
        return []
    together = torch.cat(tensors)
    for kept in ((0,), (0, *range(2, together.dim())), tuple(range(together.dim()))):
        if _is_standard(together, kept) and not _is_standard(tensors[0], kept):
            what = (
                "inputs have mean 0 and standard deviation 1 over all splits together, and not over the training split"
            )
            remedy = "split first, then normalize all with the training split's: fit_normalization(split.train)"
            return [Finding("warning", "normalization", what, remedy)]
    return []


def _inputs(data: Any) -> Tensor | None:
    """All inputs, where they are in memory."""
    if isinstance(data, ConcatDataset):
        parts = [_inputs(each) for each in data.datasets]
        return torch.cat([p for p in parts if p is not None]) if parts and all(p is not None for p in parts) else None
    base, indices = base_of(data)
    if not isinstance(base, TensorDataset) or base.tensors[0].dim() < 2 or base.tensors[0].numel() > MOST_ELEMENTS:
        return None
    inputs = base.tensors[0].detach().cpu()
    return inputs if isinstance(indices, range) and len(indices) == len(inputs) else inputs[list(indices)]


def _is_standard(values: Tensor, over: tuple[int, ...]) -> bool:
    """Whether mean and deviation are 0 and 1 to fp32's rounding; features that are constant left out."""
    std, mean = torch.std_mean(values.double(), dim=over, correction=0)
    varying = std > 1e-6
    count = values.numel() // max(std.numel(), 1)
    near = (mean.abs() < 1e-5) & ((std - 1).abs() < 1e-5 + 1 / count)  # by n or by n - 1
    return bool(varying.any()) and bool(near[varying].all())
