# SPDX-License-Identifier: Apache-2.0
"""Classes of unequal size: weights for the loss, weights for the sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastloop.recipes.data.focal import FocalLoss
from fastloop.recipes.data.labels import as_labels, labels_of
from fastloop.recipes.results import Result
from fastloop.recipes.sampling import EpochSampler, generator_of
from fastloop.texts import columns, number

SCHEMES = ("inverse", "sqrt", "effective")
STRATEGIES = ("weighted_loss", "oversampling", "focal_loss")
BETA = 0.999


def class_weights(labels: Any, *, classes: int | None = None, scheme: str = "inverse", beta: float = BETA) -> Tensor:
    """A weight for each class, the larger the rarer it is; they add up to the number of classes.

    With n samples of a class: "inverse" 1/n; "sqrt" 1/sqrt(n), milder; "effective" (1 - beta)/(1 - beta**n), of Cui et
    al., Class-Balanced Loss Based on Effective Number of Samples (2019).

    Args:
        labels: classes 0 to C-1, of any shape.
        classes: C; None: the largest label and 1.
        beta: of "effective", in [0, 1).

    Returns:
        float32, [C], for `torch.nn.CrossEntropyLoss(weight=...)` and `FocalLoss`.

    Raises:
        TypeError: labels that are no integers.
        ValueError: labels outside of 0 to C-1, a class without samples, beta out of range or of another scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"[class_weights] scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if not 0 <= beta < 1 or (scheme != "effective" and beta != BETA):
        raise ValueError(f'[class_weights] beta must lie in [0, 1) and is of scheme="effective", got {beta}')
    counts = _counts(labels, classes, "class_weights").double()
    if scheme == "effective":
        # 1 - beta**n of a beta near 1 cancels: -expm1(n*log(beta)) does not
        weights = (1 - beta) / -torch.expm1(counts * math.log(beta)) if beta > 0 else torch.ones_like(counts)
    else:
        weights = 1 / (counts if scheme == "inverse" else counts.sqrt())
    return (weights / weights.sum() * len(weights)).float()


def _counts(labels: Any, classes: int | None, area: str) -> Tensor:
    """Samples of each class, at least one."""
    given = as_labels(labels, area).flatten()
    if given.is_floating_point():
        raise TypeError(f"[{area}] labels must be integers, got {given.dtype}; convert them by .long()")
    if len(given) == 0:
        raise ValueError(f"[{area}] there are no labels; pass those of the training data")
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"[{area}] classes must be an integer of at least 1, got {classes!r}")
    number_of = int(given.max()) + 1 if classes is None else classes
    outside = given[(given < 0) | (given >= number_of)]
    if len(outside):
        raise ValueError(
            f"[{area}] labels must lie in 0 to {number_of - 1}, got {int(outside[0])}; map them, or leave out those "
            "that are ignored"
        )
    counts = torch.bincount(given, minlength=number_of)
    if bool((counts == 0).any()):
        raise ValueError(
            f"[{area}] each class must have a sample, class {int(counts.argmin())} of {number_of} has none; map the "
            "labels to 0, 1, 2, ..., or take data that have it"
        )
    return counts


class WeightedSampler(EpochSampler):
    """Indices drawn with replacement, each with probability weight/sum(weights); a function of (seed, epoch).

    As `torch.utils.data.WeightedRandomSampler`, but that runs resume exactly without its state, that each rank draws
    its share of the same order, and that there may be more than 2**24 samples. Its weights are fp64.

    Args:
        weights: of each sample, at least 0, not all 0.
        samples: drawn in an epoch, of all ranks together; None: as many as there are weights.
        seed: of the draws.

    Raises:
        ValueError: weights or samples out of range.
    """

    def __init__(self, weights: Tensor | Sequence[float], samples: int | None = None, *, seed: int = 0) -> None:
        super().__init__(seed)
        given = torch.as_tensor(weights, dtype=torch.float64).cpu()
        if given.dim() != 1 or not bool((given >= 0).all()) or not 0 < float(given.sum()) < math.inf:
            raise ValueError(
                "[WeightedSampler] weights must be one finite number of at least 0 for each sample, not all 0, got "
                f"shape {[*given.shape]}"
            )
        self.weights = given
        self.samples = len(given) if samples is None else samples
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"[WeightedSampler] samples must be an integer of at least 1, got {samples!r}")

    def length(self, epoch: int) -> int:
        """Indices in an epoch, of all ranks together: the same in each."""
        del epoch
        return self.samples

    def indices(self, epoch: int) -> Tensor:
        """The draws of an epoch, by inversion of the cumulative weights."""
        bounds = self.weights.cumsum(0)
        generator = generator_of(self.seed, epoch)
        drawn = torch.rand(self.samples, generator=generator, dtype=torch.float64) * bounds[-1]
        # u*sum may round up to the sum itself, which is beyond the last bound.
        below = torch.nextafter(bounds[-1], torch.zeros((), dtype=torch.float64))
        return torch.searchsorted(bounds, drawn.minimum(below), right=True)


def weighted_sampler(labels: Any, *, samples: int | None = None, seed: int = 0) -> WeightedSampler:
    """A sampler that draws each class equally often: weight 1/n for each of the n samples of a class.

    Args:
        labels: the class of each sample; any integers.
        samples: drawn in an epoch; None: as many as there are labels.
        seed: of the draws.

    Raises:
        TypeError: labels that are no integers.
        ValueError: no labels, or several for a sample.
    """
    given = as_labels(labels, "weighted_sampler")
    if given.is_floating_point() or given.dim() != 1 or len(given) == 0:
        raise (TypeError if given.is_floating_point() else ValueError)(
            f"[weighted_sampler] labels must be one integer for each sample, got {given.dtype} of shape "
            f"{[*given.shape]}"
        )
    _, of_class, counts = given.unique(return_inverse=True, return_counts=True)
    return WeightedSampler(1 / counts.double()[of_class], samples, seed=seed)


@dataclass
class Balanced(Result):
    """What `balance` made: a criterion, and a sampler for the DataLoader or None."""

    practice: ClassVar[str] = "balance"
    strategy: str
    loss_fn: nn.Module = field(repr=False)
    sampler: WeightedSampler | None = field(repr=False)
    counts: list[int]
    imbalance: float
    weights: list[float] | None = None

    def table(self) -> str:
        """A row for each class: its samples and its weight in the loss."""
        weights: list[Any] = self.weights or [1.0] * len(self.counts)
        rows = [[label, count, weights[label]] for label, count in enumerate(self.counts)]
        named = f"{self.strategy}: {self.loss_fn}" + (", with a sampler" if self.sampler is not None else "")
        return columns(["class", "samples", "weight"], rows) + f"\nimbalance {number(self.imbalance)}, {named}"


def balance(dataset: Any, strategy: str = "weighted_loss", *, classes: int | None = None) -> Balanced:
    """Criterion and sampler against classes of unequal size; both are for the training alone.

    Args:
        dataset: of the training, with a class for each sample.
        strategy: "weighted_loss": cross entropy with `class_weights`; "oversampling": cross entropy with
            `weighted_sampler`; "focal_loss": `FocalLoss`. One of them at a time: two correct twice.
        classes: how many; None: the largest label and 1.

    Raises:
        TypeError: no data set, or labels that are no integers.
        ValueError: an unknown strategy, or labels as for `class_weights`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"[balance] strategy must be one of {', '.join(STRATEGIES)}, got {strategy!r}")
    labels = labels_of(dataset)
    counts = _counts(labels, classes, "balance")
    weights, sampler = None, None
    loss_fn: nn.Module = nn.CrossEntropyLoss()
    if strategy == "weighted_loss":
        weights = class_weights(labels, classes=classes)
        loss_fn = nn.CrossEntropyLoss(weight=weights)
    elif strategy == "oversampling":
        sampler = weighted_sampler(labels)
    else:
        loss_fn = FocalLoss()
    return Balanced(
        strategy,
        loss_fn,
        sampler,
        counts.tolist(),
        float(counts.max() / counts.min()),
        None if weights is None else weights.tolist(),
    )
