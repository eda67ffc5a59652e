# SPDX-License-Identifier: Apache-2.0
"""What a model said of each sample: its prediction, the probability that it gave, its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

SUM_ERROR = 1e-2  # how far from 1 the sum of probabilities in bf16 may be: 2^-8 relative each


@dataclass
class Outcomes:
    """Of n samples, on the CPU.

    Attributes:
        classes: how many there are; None for numbers.
        target, prediction: int64 [n], or fp64 [n, d] for numbers.
        loss: fp64 [n]: cross-entropy in nats, or the mean squared error of the sample.
        probability: fp64 [n], of the predicted class; None for numbers.
        from_probabilities: the model gives probabilities and not logits.
    """

    classes: int | None
    target: Tensor
    prediction: Tensor
    loss: Tensor
    probability: Tensor | None = None
    from_probabilities: bool = False

    @property
    def right(self) -> Tensor:
        """bool [n], of classes."""
        return self.prediction == self.target


@dataclass
class Collector:
    """Takes outputs and targets batch by batch; keeps a few numbers a sample and not the outputs.

    Whether outputs are logits or probabilities is known at the end only, so both readings are kept until then.
    """

    where: str
    classes: int | None = None  # as the caller says
    seen: int = 0
    _found: int | None = None  # classes of the outputs; 1: a single output for two classes
    _numbers: bool = False
    _probabilities: bool = True  # all outputs so far could be
    _targets: list[Tensor] = field(default_factory=list)
    _readings: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))

    def add(self, output: Any, target: Any) -> None:
        """Take one batch.

        Raises:
            ValueError: shapes that do not fit, targets out of range, outputs that are not finite.
            TypeError: no targets, or no tensor among the outputs.
        """
        output, target = _logits(output, self.where).detach().cpu(), _checked_target(target, self.where)
        if not self._targets:
            self._decide(output, target)
        self._check_finite(output, "outputs")
        if self._numbers:
            self._add_numbers(output, target)
        else:
            self._add_classes(output, target)
        self.seen += len(output)

    def done(self) -> Outcomes:
        """All of them together."""
        target = torch.cat(self._targets)
        chosen = self._readings[int(self._probabilities and not self._numbers)]
        columns = [torch.cat(column) for column in zip(*chosen, strict=True)]
        if self._numbers:
            return Outcomes(None, target, columns[0], columns[1])
        classes = max(2, self._found or 0)
        return Outcomes(classes, target, columns[0], columns[1], columns[2], self._probabilities)

    def _decide(self, output: Tensor, target: Tensor) -> None:
        """Classes or numbers, from the first batch."""
        single = output.dim() == 1 or (output.dim() == 2 and output.shape[1] == 1)
        counted = not target.is_floating_point()
        if single and (
            self.classes == 2 or (self.classes is None and counted and bool(((target == 0) | (target == 1)).all()))
        ):
            self._found = 1
        elif output.dim() == 2 and target.dim() == 1 and counted and not single:
            self._found = output.shape[1]
        elif self.classes is None:
            self._numbers = True
        else:
            raise ValueError(
                f"[{self.where}] classes need outputs [n, classes] (or [n] for two) and integer targets [n], got "
                f"outputs {tuple(output.shape)} and {target.dtype} targets {tuple(target.shape)}; leave "
                "classes= out for numbers"
            )
        if not self._numbers and self.classes not in (None, max(2, self._found or 0)):
            raise ValueError(f"[{self.where}] classes= says {self.classes}, the model gives {self._found} outputs")

    def _add_classes(self, output: Tensor, target: Tensor) -> None:
        logits = output.double().reshape(len(output), -1)
        classes = max(2, logits.shape[1])
        if target.dim() != 1 or len(target) != len(output) or logits.shape[1] != self._found:
            raise ValueError(
                f"[{self.where}] there must be one class a sample, got outputs {tuple(output.shape)} and targets "
                f"{tuple(target.shape)}; give positions as samples of their own"
            )
        if len(target) and not (int(target.min()) >= 0 and int(target.max()) < classes):
            raise ValueError(
                f"[{self.where}] targets must be classes in [0, {classes}), got {int(target.min())} to "
                f"{int(target.max())}; for the regression of whole numbers give float targets"
            )
        if target.is_floating_point() and not bool((target == target.round()).all()):
            raise ValueError(f"[{self.where}] targets of classes must be whole numbers; leave classes= out for numbers")
        target = target.long()
        sums = logits.sum(1) if self._found != 1 else torch.ones(len(logits), dtype=torch.float64)
        self._probabilities &= bool(((logits >= 0) & (logits <= 1)).all() and ((sums - 1).abs() < SUM_ERROR).all())
        self._targets.append(target)
        for reading, logs in zip(self._readings, self._log_probabilities(logits), strict=True):
            best, prediction = logs.max(1)
            reading.append((prediction, -logs.gather(1, target[:, None]).squeeze(1), best.exp()))

    def _log_probabilities(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """fp64 [n, classes] of outputs read as logits, and read as probabilities."""
        if self._found == 1:
            signed = torch.cat([-outputs, outputs], 1)
            return torch.nn.functional.logsigmoid(signed), torch.cat([1 - outputs, outputs], 1).clamp(min=0).log()
        return outputs.log_softmax(1), outputs.clamp(min=0).log()

    def _add_numbers(self, output: Tensor, target: Tensor) -> None:
        if len(output) != len(target) or output.numel() != target.numel():
            raise ValueError(
                f"[{self.where}] outputs and targets must have as many numbers, got {tuple(output.shape)} and "
                f"{tuple(target.shape)} of {target.dtype}; targets of classes are integers"
            )
        self._check_finite(target, "targets")
        wanted, got = (each.double().reshape(len(each), -1) for each in (target, output))
        self._targets.append(wanted)
        self._readings[0].append((got, (got - wanted).square().mean(1)))

    def _check_finite(self, values: Tensor, what: str) -> None:
        bad = (
            ~values.reshape(len(values), -1).isfinite().all(1)
            if values.numel()
            else values.new_zeros(0, dtype=torch.bool)
        )
        if bad.any():
            first = self.seen + int(bad.nonzero()[0])
            raise ValueError(
                f"[{self.where}] {what} must be finite, those of sample {first} are not (and of "
                f"{int(bad.sum()) - 1} more in its "
                "batch); look at that sample, or run diagnose"
            )


def class_names(classes: int | Sequence[str] | None, where: str) -> tuple[int | None, list[str] | None]:
    """(number of classes, their names) of what the caller gave.

    Raises:
        ValueError: fewer than two classes, or a name twice.
        TypeError: neither a number nor names.
    """
    if classes is None:
        return None, None
    if isinstance(classes, int) and not isinstance(classes, bool):
        names = None
        count = classes
    elif isinstance(classes, Sequence) and not isinstance(classes, str):
        names = [str(name) for name in classes]
        count = len(names)
        if len(set(names)) != count:
            raise ValueError(f"[{where}] names of classes must differ, got {names}")
    else:
        raise TypeError(f"[{where}] classes must be a number or names, got {classes!r}")
    if count < 2:
        raise ValueError(f"[{where}] classes must be at least 2, got {count}")
    return count, names


def _logits(output: Any, where: str) -> Tensor:
    """The tensor among what the model gives: itself, `logits`, or the first of several."""
    if isinstance(output, Tensor):
        found: Any = output
    elif isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    else:
        found = output[0] if isinstance(output, (tuple, list)) and output else None
    if not isinstance(found, Tensor):
        raise TypeError(
            f'[{where}] the model must give a tensor, a dict with "logits" or a tuple with the outputs first, got '
            f"{type(output).__name__}; wrap it so that it does"
        )
    if found.dim() == 0:
        raise ValueError(f"[{where}] the model must give outputs for each sample, got a scalar")
    return found


def _checked_target(target: Any, where: str) -> Tensor:
    if not isinstance(target, Tensor):
        got = "none" if target is None else type(target).__name__
        raise TypeError(f"[{where}] each batch must have targets as a tensor, got {got}; give (input, target)")
    if target.dim() == 0:
        raise ValueError(f"[{where}] targets must be [n], got a scalar")
    target = target.detach().cpu()
    return target.squeeze(1) if target.dim() == 2 and target.shape[1] == 1 else target
