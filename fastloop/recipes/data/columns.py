# SPDX-License-Identifier: Apache-2.0
"""What is known of one input (or of numbers as targets) after every sample was seen once."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from fastloop.recipes.data.moments import Moments, in_parts


@dataclass
class Seen:
    """Shape, dtype and statistics, by element where all samples have one shape, else of all values together."""

    shapes: set[tuple[int, ...]] = field(default_factory=set)
    dtypes: set[str] = field(default_factory=set)
    samples: int = 0
    nan: int = 0
    infinite: int = 0
    bad_samples: int = 0  # with NaN or infinity
    moments: Moments | None = None
    minimum: Tensor = field(default_factory=lambda: torch.empty(0))  # by element, of the finite values
    maximum: Tensor = field(default_factory=lambda: torch.empty(0))

    def add(self, values: Tensor | list[Any]) -> None:
        """Take in a batch: a tensor, or a list of what differs in shape, or is not numbers."""
        if isinstance(values, list):
            for value in values:
                if isinstance(value, Tensor):
                    self._add(value[None])
                else:
                    self.samples += 1
                    self.dtypes.add(type(value).__name__)
            return
        self._add(values)

    def _add(self, batch: Tensor) -> None:
        for part in in_parts(batch.detach().cpu()):
            self._add_part(part)

    def _add_part(self, batch: Tensor) -> None:
        self.samples += len(batch)
        self.shapes.add(tuple(batch.shape[1:]))
        self.dtypes.add(str(batch.dtype).removeprefix("torch."))
        rows = batch.reshape(len(batch), -1).double()
        if len(self.shapes) > 1:
            self._forget_elements()
            rows = rows.reshape(-1, 1)
        if rows.numel() == 0:
            return
        finite = rows.isfinite()
        if not bool(finite.all()):
            self.nan += int(rows.isnan().sum())
            self.infinite += int(rows.isinf().sum())
            self.bad_samples += int((~finite.reshape(len(batch), -1)).any(1).sum())
        if self.moments is None:
            self.moments = Moments(rows.shape[1])
            self.minimum = torch.full((rows.shape[1],), torch.inf, dtype=torch.float64)
            self.maximum = -self.minimum
        self.moments.add(rows)
        self.minimum = self.minimum.minimum(rows.where(finite, torch.inf).amin(0))
        self.maximum = self.maximum.maximum(rows.where(finite, -torch.inf).amax(0))

    def _forget_elements(self) -> None:
        """From the first sample of another shape on: one column for all values."""
        if self.moments is not None and len(self.moments.count) > 1:
            self.moments = self.moments.merged()
            self.minimum, self.maximum = self.minimum.amin()[None], self.maximum.amax()[None]

    @property
    def by_element(self) -> bool:
        """Whether each element of a sample has statistics of its own."""
        return len(self.shapes) == 1 and self.moments is not None

    @property
    def integers(self) -> bool:
        """Whether the values are integers that are no pixels: tokens, counts, indices."""
        return bool(self.dtypes) and self.dtypes <= {"int8", "int16", "int32", "int64"}

    @property
    def numbers(self) -> bool:
        """Whether there were any."""
        return self.moments is not None

    def constant(self) -> list[int]:
        """Elements with one finite value in all samples, of a flattened sample."""
        if not self.by_element or self.samples < 2:
            return []
        return (self.minimum == self.maximum).nonzero().flatten().tolist()

    def summary(self) -> dict[str, float | None]:
        """Mean, std, minimum and maximum of all finite values; None without any."""
        names = ("mean", "std", "minimum", "maximum")
        if self.moments is None or not bool((self.moments.count > 0).any()):
            return dict.fromkeys(names)
        merged = self.moments.merged()
        values = (merged.mean, merged.std, self.minimum.amin(), self.maximum.amax())
        return {name: float(value) for name, value in zip(names, values, strict=True)}


class Fingerprints:
    """8 bytes of each sample, by which equal ones are found without keeping them.

    Two different samples of 10 million share them with a probability of 3e-6.
    """

    def __init__(self) -> None:
        self._inputs = array("Q")
        self._pairs = array("Q")

    def add(self, inputs: dict[str, Any], target: Any, count: int) -> None:
        """Take in a batch of so many samples."""
        columns = [value if isinstance(value, list) else list(value.detach().cpu()) for value in inputs.values()]
        labels = [None] * count if target is None else list(target)
        for i in range(count):
            digest = hashlib.blake2b(digest_size=8)
            for column in columns:
                _take(digest, column[i])
            self._inputs.append(int.from_bytes(digest.digest(), "little"))
            _take(digest, labels[i])
            self._pairs.append(int.from_bytes(digest.digest(), "little"))

    def duplicates(self) -> tuple[int, int]:
        """Samples whose inputs were there before; and among them, those with another target than the others."""
        inputs = numpy.unique(numpy.array(self._inputs, dtype=numpy.uint64))
        pairs = numpy.unique(numpy.array(self._pairs, dtype=numpy.uint64))
        return len(self._inputs) - len(inputs), len(pairs) - len(inputs)


def _take(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        contiguous = value.detach().cpu().contiguous()
        digest.update(f"{contiguous.dtype}{[*contiguous.shape]}".encode())
        digest.update(contiguous.reshape(-1).view(torch.uint8).numpy() if contiguous.numel() else b"")
    else:
        digest.update(repr(value).encode())
