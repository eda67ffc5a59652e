# SPDX-License-Identifier: Apache-2.0
"""Single samples of data sets: where they come from, read one by one, their labels, their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

Indices = Sequence[int]


def dataset_of(given: Any) -> Any:
    """The data set with an index that a loader or a data set is of; None where there is none."""
    data = given.dataset if isinstance(given, DataLoader) else given
    if isinstance(data, (IterableDataset, Tensor, str, Mapping)):
        return None
    return data if hasattr(data, "__getitem__") and hasattr(data, "__len__") else None


def base_of(data: Any) -> tuple[Any, Indices]:
    """The data set below its Subsets, and which of its samples they have."""
    indices: Indices = range(len(data))
    while isinstance(data, Subset):
        inner = data.indices
        indices = inner if isinstance(indices, range) and len(indices) == len(inner) else [inner[i] for i in indices]
        data = data.dataset
    return data, [int(i) for i in indices] if not isinstance(indices, range) else indices


def evenly(size: int, count: int) -> list[int]:
    """At most `count` indices of `size`, at equal distances, from the first to the last."""
    if size <= count:
        return list(range(size))
    return [round(i * (size - 1) / max(count - 1, 1)) for i in range(count)]


def labels(data: Any, places: Indices) -> list[int] | None:
    """The samples' labels, without reading the samples where the data set has them apart; None where they are none."""
    base, indices = base_of(data)
    chosen = [indices[place] for place in places]
    known = base.tensors[-1] if isinstance(base, TensorDataset) and len(base.tensors) > 1 else None
    if known is None:
        known = getattr(base, "targets", None)
    if isinstance(known, (Tensor, numpy.ndarray, list, tuple)) and len(known) == len(base):
        return _as_labels([known[i] for i in chosen])
    values = []
    for i in chosen:
        sample = base[i]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            return None
        values.append(sample[1])
    return _as_labels(values)


def _as_labels(values: Sequence[Any]) -> list[int] | None:
    found = []
    for value in values:
        if isinstance(value, (Tensor, numpy.ndarray, numpy.generic)):
            if value.ndim != 0 or torch.as_tensor(value).is_floating_point():
                return None
            value = int(value)
        if not isinstance(value, int):
            return None
        found.append(value)
    return found


def input_of(sample: Any) -> Any:
    """The sample's input: its first part, where it has several."""
    return sample[0] if isinstance(sample, (tuple, list)) and len(sample) else sample


def digest(value: Any) -> bytes | None:
    """A hash of a sample's input, the same for equal values; None for something without bytes that are known."""
    made = hashlib.blake2b(digest_size=16)
    return made.digest() if _into(made, value) else None


def _into(made: Any, value: Any) -> bool:
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized:
        array = value.detach().cpu().contiguous()
        made.update(f"{array.dtype}{tuple(array.shape)}".encode())
        made.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (numpy.ndarray, numpy.generic)) and not value.dtype.hasobject:
        made.update(f"{value.dtype}{value.shape}".encode())
        made.update(numpy.ascontiguousarray(value).tobytes())
    elif isinstance(value, (str, int, float, bytes)):
        made.update(f"{type(value).__name__}{value!r}".encode())
    elif isinstance(value, Mapping):
        return all(_into(made, str(key)) and _into(made, value[key]) for key in sorted(value, key=str))
    elif isinstance(value, (tuple, list)):
        return all(_into(made, each) for each in value)
    elif callable(getattr(value, "tobytes", None)) and hasattr(value, "size"):  # an image of PIL
        made.update(f"{value.size}{getattr(value, 'mode', '')}".encode() + value.tobytes())
    else:
        return False
    return True


def is_random(data: Any, places: Indices) -> bool | None:
    """Whether reading a sample twice gives two different inputs; None where that cannot be seen."""
    for place in places:
        first, second = digest(input_of(data[place])), digest(input_of(data[place]))
        if first is None:
            return None
        if first != second:
            return True
    return False
