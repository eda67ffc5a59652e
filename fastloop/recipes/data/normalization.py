# SPDX-License-Identifier: Apache-2.0
"""Inputs of zero mean and unit variance, by statistics of the training data alone."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastloop.recipes.data.moments import Moments
from fastloop.recipes.data.samples import as_dataset, batches, only_input
from fastloop.recipes.evidence import plain
from fastloop.recipes.results import Result
from fastloop.texts import columns

AREA = "fit_normalization"
DIMS = ("channel", "feature", "all")
ROWS = 20  # of the table


class Normalization(nn.Module, Result):
    """(x - mean) / std, for a sample and for a batch of samples.

    Args:
        mean, std: in the shape in which they broadcast over a sample: [channels, 1, 1] for images by channel. They are
            buffers in fp64; x keeps its dtype, integers become the default floating-point dtype. Computed in at least
            fp32, of integers above 16 bits in fp64: 1.7e9 seconds have no digits left for a day in fp32.
        count: samples that the statistics are of.

    Raises:
        ValueError: of different shapes, or a standard deviation that is not above 0.
    """

    practice: ClassVar[str] = AREA
    mean: Tensor
    std: Tensor
    samples: Tensor
    constant: Tensor

    def __init__(self, mean: Any = 0.0, std: Any = 1.0, count: int = 0, constant: Any = None) -> None:
        super().__init__()
        mean, std = torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(std, dtype=torch.float64)
        if mean.shape != std.shape:
            raise ValueError(f"[{AREA}] mean and std must have one shape, got {[*mean.shape]} and {[*std.shape]}")
        if not (bool((std > 0).all()) and bool(std.isfinite().all()) and bool(mean.isfinite().all())):
            raise ValueError(f"[{AREA}] std must be above 0, and both finite; use 1 where the data are constant")
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("std", std.detach().clone())
        self.register_buffer("samples", torch.tensor(count))
        none = torch.zeros(mean.shape, dtype=torch.bool)
        self.register_buffer("constant", none if constant is None else torch.as_tensor(constant).reshape(mean.shape))

    @property
    def count(self) -> int:
        """Samples that the statistics are of."""
        return int(self.samples)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized, in x's dtype and shape.

        Raises:
            ValueError: another shape than what the statistics are of.
        """
        exact, result = self._dtypes(x)
        self._check(x)
        return ((x.to(exact) - self.mean.to(exact)) / self.std.to(exact)).to(result)

    def inverse(self, x: Tensor) -> Tensor:
        """x*std + mean: what `forward` was given.

        Raises:
            ValueError: another shape than what the statistics are of.
        """
        exact, result = self._dtypes(x)
        self._check(x)
        return (x.to(exact) * self.std.to(exact) + self.mean.to(exact)).to(result)

    def _dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """To compute in, and of the result."""
        if x.is_floating_point():
            return torch.promote_types(x.dtype, torch.float32), x.dtype
        return torch.float64 if x.element_size() > 2 else torch.float32, torch.get_default_dtype()

    def _check(self, x: Tensor) -> None:
        wanted = self.mean.shape
        own = x.shape[x.dim() - len(wanted) :] if x.dim() >= len(wanted) else None
        if own is None or any(w not in (1, size) for w, size in zip(wanted, own, strict=True)):
            raise ValueError(
                f"[{AREA}] the statistics are of samples that end in {[*wanted]} (1: any size), got {[*x.shape]}"
            )
        if wanted and wanted[0] == 1 and len(wanted) > 1 and own[0] != 1:  # one channel: broadcasting hides a mistake
            raise ValueError(f"[{AREA}] the statistics are of samples with 1 channel, got {[*x.shape]}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        for name in ("mean", "std", "constant"):  # of any shape, so that Normalization() can be loaded
            value = state_dict.get(prefix + name)
            if value is not None:
                setattr(self, name, getattr(self, name).new_empty(value.shape))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def extra_repr(self) -> str:
        """Shape of the statistics."""
        return f"shape={[*self.mean.shape]}, samples={self.count}"

    def table(self) -> str:
        """Mean and standard deviation of each column, at most 20 of them; the constant ones are marked."""
        mean, std, constant = (each.flatten().tolist() for each in (self.mean, self.std, self.constant))
        rows = [
            [i, mean[i], std[i], "constant: std taken as 1" if constant[i] else ""] for i in range(min(len(mean), ROWS))
        ]
        more = f"\n... and {len(mean) - ROWS} more" if len(mean) > ROWS else ""
        return columns(["column", "mean", "std", ""], rows) + more + f"\nof {self.count} samples"

    def to_json(self) -> dict[str, Any]:
        """Statistics; the indices of constant columns."""
        constant = self.constant.flatten().nonzero().flatten()
        return {
            "mean": plain(self.mean), "std": plain(self.std), "count": self.count, "constant": plain(constant)
        }  # fmt: skip


def fit_normalization(train: Any, *, dims: str = "channel", batch_size: int = 256) -> Normalization:
    """Mean and standard deviation of the inputs: var = sum((x - mean)**2) / n, in one pass, in fp64.

    Parts are merged by Chan, Golub and LeVeque (1979); one batch is in memory at a time. Where the inputs are constant
    the standard deviation is taken as 1, and `constant` says so.

    Args:
        train: a data set of (input, target) or of inputs, or a pair of tensors; of a `Split` the train part is taken.
            Statistics of validation or test data would leak into the training.
        dims: one mean for each "channel" (dimension 0 of a sample; sizes may differ beyond it), each "feature" (every
            element of a sample), or one for "all".
        batch_size: samples read at once.

    Raises:
        TypeError: a DataLoader, or no data set.
        ValueError: no samples, NaN or infinite inputs, several inputs, or samples of different shapes.
    """
    if dims not in DIMS:
        raise ValueError(f"[{AREA}] dims must be one of {', '.join(DIMS)}, got {dims!r}")
    moments, shape, count = None, torch.Size(), 0
    for inputs, _ in batches(as_dataset(train, AREA), batch_size):
        values = only_input(inputs, AREA)
        for batch in [values] if isinstance(values, Tensor) else [value[None] for value in values]:
            if moments is None:
                shape = _shape(batch.shape[1:], dims)
                moments = Moments(math.prod(shape))
            elif _shape(batch.shape[1:], dims) != shape:
                raise ValueError(
                    f'[{AREA}] samples must have one shape for dims="{dims}", got {[*batch.shape[1:]]} after '
                    f'{[*shape]}; bring them to one size, or use dims="all"'
                )
            moments.add(_columns(_finite(batch, count), dims))
            count += len(batch)
    if moments is None:
        raise ValueError(f"[{AREA}] the data set has no samples; pass one that has")
    constant = moments.constant()
    std = moments.std.where(~constant, 1.0)
    return Normalization(moments.mean.reshape(shape), std.reshape(shape), count, constant)


def _shape(sample: torch.Size, dims: str) -> torch.Size:
    """Of the statistics: what broadcasts over a sample.

    Raises:
        ValueError: channels of samples that are single numbers.
    """
    if dims == "all":
        return torch.Size()
    if dims == "feature":
        return sample
    if not sample:
        raise ValueError(f'[{AREA}] a sample must have a dimension for dims="channel", got single numbers; use "all"')
    return torch.Size([sample[0], *(1 for _ in sample[1:])])


def _columns(batch: Tensor, dims: str) -> Tensor:
    """[rows, columns]: one column for each mean."""
    if dims == "all":
        return batch.reshape(-1, 1)
    return batch.reshape(len(batch), -1) if dims == "feature" else batch.movedim(1, -1).reshape(-1, batch.shape[1])


def _finite(batch: Tensor, before: int) -> Tensor:
    bad = ~batch.isfinite()
    if bool(bad.any()):
        first = int(bad.flatten(1).any(1).nonzero()[0]) if batch.dim() > 1 else int(bad.nonzero()[0])
        raise ValueError(
            f"[{AREA}] inputs must be finite, sample {before + first} has NaN or infinity; repair or leave out such "
            "samples (analyze counts them)"
        )
    return batch
