# SPDX-License-Identifier: Apache-2.0
"""Features as columns, of whatever holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

Array = numpy.ndarray


@dataclass(frozen=True)
class Column:
    """One feature of all samples: fp64, or text with None where it is missing."""

    values: Array
    numbers: bool

    @cached_property
    def present(self) -> Array:
        """What is not missing."""
        if self.numbers:
            return self.values[~numpy.isnan(self.values)]
        return numpy.array([value for value in self.values if value is not None], dtype=str)

    @property
    def missing(self) -> float:
        """Share of the samples without a value."""
        return 1 - len(self.present) / len(self.values)


def columns_of(data: Any, which: str) -> dict[str, Column]:
    """Columns by name; those of an array are "0", "1", ...

    Raises:
        ValueError: no samples, more than two dimensions, columns of different lengths.
        TypeError: another form.
    """
    if hasattr(data, "columns") and hasattr(data, "items"):  # a pandas DataFrame
        data = dict(data.items())
    if isinstance(data, Mapping):
        made = {str(name): _column(values, f"{which} feature {str(name)!r}") for name, values in data.items()}
        lengths = {len(column.values) for column in made.values()}
        if len(lengths) > 1:
            raise ValueError(f"[drift_report] {which}: columns must have one length, got {sorted(lengths)}")
        if not made or lengths == {0}:
            raise ValueError(f"[drift_report] {which} must hold at least one sample and feature, got none")
        return made
    matrix = _matrix(data, which)
    if matrix.ndim == 1:
        matrix = matrix[:, None]
    if matrix.ndim != 2:
        raise ValueError(
            f"[drift_report] {which} must be [n] or [n, features], got {matrix.shape}; of images and sequences "
            "take features first, such as mean and standard deviation by channel, the length, or the model's last "
            "hidden layer"
        )
    if not matrix.size:
        raise ValueError(f"[drift_report] {which} must hold at least one sample and feature, got shape {matrix.shape}")
    return {str(i): _column(matrix[:, i], f"{which} feature {i}") for i in range(matrix.shape[1])}


def _matrix(data: Any, which: str) -> Array:
    if isinstance(data, DataLoader):
        data = data.dataset
    if isinstance(data, Tensor):
        return _array(data)
    if isinstance(data, (numpy.ndarray, list)):
        return numpy.asarray(data)
    if isinstance(data, IterableDataset):
        samples = list(data)
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, tuple)):
        samples = [data[i] for i in range(len(data))]
    else:
        raise TypeError(
            f"[drift_report] {which} must be an array, a tensor, a Dataset or a dict of columns, got "
            f"{type(data).__name__}"
        )
    inputs = [sample[0] if isinstance(sample, (tuple, list)) else sample for sample in samples]
    return (
        numpy.stack([_array(each) if isinstance(each, Tensor) else numpy.asarray(each) for each in inputs])
        if inputs
        else numpy.empty(0)
    )


def _array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def _column(values: Any, where: str) -> Column:
    if isinstance(values, Tensor):
        values = _array(values)
    if isinstance(values, str) or not (isinstance(values, Sequence) or hasattr(values, "__array__")):
        raise TypeError(f"[drift_report] {where} must be a column of values, got {type(values).__name__}")
    array = numpy.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"[drift_report] {where} must be [n], got shape {array.shape}")
    if array.dtype.kind in "iuf":
        found = array.astype(numpy.float64)
    elif array.dtype.kind == "O" and all(value is None or _is_number(value) for value in array.tolist()):
        found = numpy.array([numpy.nan if value is None else float(value) for value in array.tolist()])
    elif array.dtype.kind in "OUSb":
        return Column(numpy.array([_text(value) for value in array.tolist()], dtype=object), False)
    else:
        raise TypeError(f"[drift_report] {where} must be numbers, text or bool, got {array.dtype}")
    if numpy.isinf(found).any():
        raise ValueError(
            f"[drift_report] {where} has {int(numpy.isinf(found).sum())} infinite values; make them NaN to count "
            "as missing"
        )
    return Column(found, True)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _text(value: Any) -> str | None:
    return None if value is None or (isinstance(value, float) and value != value) else str(value)
