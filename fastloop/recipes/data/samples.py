# SPDX-License-Identifier: Apache-2.0
"""Data sets read in batches, whatever their samples look like: inputs by name, and the target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from fastloop.recipes.data.splits import Split

TARGETS = ("label", "labels", "target", "targets", "y")  # keys of a target, in samples that are dicts
INPUT = "input"


def as_dataset(given: Any, area: str) -> Any:
    """A data set: as it is given, the train part of a `Split`, or made of a pair of tensors (as a batch is a list).

    Raises:
        TypeError: none of these.
        ValueError: tensors of different lengths, or a data set without samples.
    """
    if isinstance(given, DataLoader):
        raise TypeError(
            f"[{area}] the samples must come from a data set, got a DataLoader, which may shuffle, drop and repeat; "
            "pass loader.dataset"
        )
    if isinstance(given, Split):
        given = given.train
    if _are_columns(given):
        tensors = [torch.as_tensor(each) for each in given]
        if len({len(each) for each in tensors}) > 1:
            counts = " and ".join(str(len(each)) for each in tensors)
            raise ValueError(f"[{area}] inputs and targets must be equally many, got {counts}")
        given = TensorDataset(*tensors)
    indexed = hasattr(given, "__getitem__") and hasattr(given, "__len__")
    if isinstance(given, IterableDataset):
        return given
    if isinstance(given, Dataset) and not hasattr(given, "__len__"):
        raise TypeError(
            f"[{area}] the data set must say how many samples it has, {type(given).__name__} has no __len__"
        )
    if isinstance(given, (Mapping, str)) or not indexed:
        raise TypeError(f"[{area}] data must be a data set or a pair of tensors, got {type(given).__name__}")
    if len(given) == 0:
        raise ValueError(f"[{area}] the data set has no samples; pass one that has")
    return given


def _are_columns(given: Any) -> bool:
    """Whether these are inputs and targets of all samples: a tuple of tensors, or a batch as DataLoader makes it.

    A list of two tensors of the same length is one; a longer list of tensors is samples.
    """
    if not isinstance(given, (tuple, list)) or not given:
        return False
    if not all(isinstance(each, (Tensor, numpy.ndarray)) and each.ndim > 0 for each in given):
        return False
    return isinstance(given, tuple) or (len(given) == 2 and len(given[0]) == len(given[1]))


def with_index(dataset: Any, area: str) -> Any:
    """The data set, if its samples have an index.

    Raises:
        TypeError: an IterableDataset.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"[{area}] the data set must give a sample by its index, {type(dataset).__name__} is an IterableDataset; "
            "pass one with __getitem__ and __len__"
        )
    return dataset


def parts(sample: Any) -> tuple[dict[str, Any], Any]:
    """Inputs by name, and the target or None.

    (input, target): the last item is the target, several inputs are input.0, input.1 and so on. A dict: the target is
    under one of `TARGETS`, all else are inputs. Anything else is an input alone.
    """
    if isinstance(sample, Mapping):
        key = next((each for each in TARGETS if each in sample), None)
        inputs = {str(name): value for name, value in sample.items() if name != key}
        return inputs, None if key is None else sample[key]
    if isinstance(sample, (list, tuple)) and len(sample) > 1:
        return _named(sample[0] if len(sample) == 2 else sample[:-1]), sample[-1]
    if isinstance(sample, (list, tuple)) and sample:
        return _named(sample[0]), None
    return {INPUT: sample}, None


def _named(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {str(name): each for name, each in value.items()}
    if isinstance(value, (list, tuple)) and not all(isinstance(each, (int, float)) for each in value):
        return {f"{INPUT}.{i}": each for i, each in enumerate(value)}
    return {INPUT: value}


def tensor_of(value: Any) -> Tensor | None:
    """Numbers as a tensor, a picture as uint8 [channels, height, width]; None for text and other things."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (bool, int, float)):
        return torch.tensor(value)
    if isinstance(value, (list, tuple)):
        return torch.tensor(value) if value and all(isinstance(each, (bool, int, float)) for each in value) else None
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        array = numpy.asarray(value)
        return torch.as_tensor(array) if array.dtype.kind in "biuf" else None
    if hasattr(value, "__array_interface__"):  # PIL
        pixels = torch.from_numpy(numpy.array(value))
        return pixels.movedim(-1, 0) if pixels.dim() == 3 else pixels[None]
    return None


Columns = dict[str, "Tensor | list[Any]"]


def batches(dataset: Any, batch_size: int, indices: Sequence[int] | None = None) -> Iterator[tuple[Columns, Any]]:
    """Inputs by name and the target, of so many samples at a time: a tensor, or a list where shapes or kinds differ.

    Args:
        dataset: as `as_dataset` gives it.
        indices: the samples, in this order; None for all.

    Raises:
        ValueError: samples that have other parts than the ones before, or a batch size below 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"[data] batch_size must be an integer of at least 1, got {batch_size!r}; pass e.g. 256")
    held = _tensors(dataset)
    if held is not None:
        tensors, order = held
        order = order if indices is None else order[torch.as_tensor(indices, dtype=torch.int64)]
        for some in order.split(batch_size):
            yield parts(tuple(tensor[some] for tensor in tensors))
        return
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size, sampler=indices, collate_fn=list, generator=torch.Generator()
    )
    for samples in loader:
        rows = [parts(sample) for sample in samples]
        names = list(rows[0][0])
        if not names:
            raise ValueError(
                "[data] a sample must have an input, got a target alone; pass a data set of (input, target)"
            )
        if any(list(inputs) != names for inputs, _ in rows):
            raise ValueError("[data] every sample must have the same parts; some have others than the first")
        inputs = {name: _together([row[name] for row, _ in rows]) for name in names}
        yield inputs, None if rows[0][1] is None else _together([target for _, target in rows])


def _tensors(dataset: Any) -> tuple[tuple[Tensor, ...], Tensor] | None:
    """Those of a TensorDataset, or of a part of one, and the rows: they need no call for each sample, and no copy."""
    if isinstance(dataset, Tensor):
        return (dataset,), torch.arange(len(dataset))
    if type(dataset) is TensorDataset:
        return dataset.tensors, torch.arange(len(dataset))
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        return dataset.dataset.tensors, torch.as_tensor(dataset.indices, dtype=torch.int64)
    return None


def _together(values: list[Any]) -> Tensor | list[Any]:
    tensors = [tensor_of(value) for value in values]
    known = [tensor for tensor in tensors if tensor is not None]
    if len(known) < len(values):
        return values
    if len({(tensor.shape, tensor.dtype) for tensor in known}) > 1:
        return known
    return torch.stack(known)


def only_input(inputs: Columns, area: str) -> Tensor | list[Tensor]:
    """The one input of a batch: a tensor, or a list of tensors of different shapes.

    Raises:
        ValueError: several inputs, or one that is not numbers.
    """
    if len(inputs) != 1:
        raise ValueError(
            f"[{area}] a sample must have one input, got {', '.join(inputs) or 'none'}; pass a data set of that one "
            "input and its target"
        )
    ((name, values),) = inputs.items()
    if isinstance(values, list) and not all(isinstance(value, Tensor) for value in values):
        raise ValueError(f"[{area}] inputs must be numbers, got {type(values[0]).__name__} in {name!r}")
    return values
