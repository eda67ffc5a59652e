# SPDX-License-Identifier: Apache-2.0
"""Labels of a data set, without loading the inputs where the data set knows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, IterableDataset, Subset, TensorDataset

from fastloop.loop.seeded import SeededDataset
from fastloop.recipes.data.samples import TARGETS, as_dataset, batches


def labels_of(dataset: Any) -> Tensor:
    """Targets of all samples, in order: int64 for classes, floating-point for numbers.

    Taken from `.targets` or `.labels` (with the data set's target_transform), from a TensorDataset's last tensor, from
    a column of a Hugging Face data set, also through Subset and ConcatDataset; otherwise every sample is read.

    Raises:
        TypeError: no data set, or targets that are not numbers.
        ValueError: samples without a target, or with targets of different shapes.
    """
    dataset = as_dataset(dataset, "labels_of")
    known = _known(dataset)
    if known is None:
        found = [target for _, target in batches(dataset, 256)]
        if not found or any(target is None for target in found):
            raise ValueError("[labels_of] the samples have no target; pass a data set of (input, target)")
        known = [each for target in found for each in target]
    return as_labels(known, "labels_of")


def as_labels(values: Any, area: str) -> Tensor:
    """A tensor on the CPU: int64 of integers and truth values, floats as they are.

    Raises:
        TypeError: not numbers.
        ValueError: of different shapes.
    """
    if not isinstance(values, Tensor):
        values = _stacked(values, area)
    values = values.detach().cpu()
    return values if values.is_floating_point() else values.to(torch.int64)


def _stacked(values: Any, area: str) -> Tensor:
    try:
        if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
            return torch.stack(list(values))
        array = numpy.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"[{area}] targets must all have the same shape ({error})") from None
    if array.dtype.kind not in "biuf":
        first = next(iter(values), None)
        raise TypeError(
            f"[{area}] labels must be numbers, got {type(first).__name__} ({first!r}); map the names to 0, 1, 2, ..."
        )
    return torch.as_tensor(array)


def _known(dataset: Any) -> Any:
    """What the data set says of its targets itself; None where it says nothing."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[-1] if len(dataset.tensors) > 1 else None
    if isinstance(dataset, IterableDataset):
        return None
    if isinstance(dataset, Subset):
        whole = _known(dataset.dataset)
        if whole is None:
            return None
        if isinstance(whole, (Tensor, numpy.ndarray)):
            return whole[numpy.asarray(dataset.indices, dtype=numpy.int64)]
        return [whole[i] for i in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        each = [_known(one) for one in dataset.datasets]
        return None if any(one is None for one in each) else _joined([as_labels(one, "labels_of") for one in each])
    if isinstance(dataset, SeededDataset):
        return _known(dataset.dataset)
    return _attribute(dataset)


def _joined(each: list[Tensor]) -> Tensor:
    if len({labels.shape[1:] for labels in each}) > 1:
        raise ValueError("[labels_of] targets must all have the same shape; those of the joined data sets differ")
    return torch.cat(each)


def _attribute(dataset: Any) -> Any:
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, (list, tuple)):
        name = next((each for each in TARGETS if each in columns), None)
        return None if name is None else list(dataset[name])
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if isinstance(values, (Tensor, numpy.ndarray, list, tuple)) and len(values) == len(dataset):
            transform: Callable[[Any], Any] | None = getattr(dataset, "target_transform", None)
            # A `transforms` that takes both may change the target; only a read tells.
            joint = getattr(dataset, "transforms", None)
            if joint is not None and not hasattr(joint, "target_transform"):
                return None
            return values if transform is None else [transform(value) for value in values]
    return None
