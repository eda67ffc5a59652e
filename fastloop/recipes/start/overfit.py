# SPDX-License-Identifier: Apache-2.0
"""Whether a model can learn one batch by heart; where it cannot, training on more is in vain."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastloop
from fastloop.checks import check_output_activation
from fastloop.drawing import figure, save
from fastloop.findings import Finding, listed
from fastloop.loop.probe import Loss, device_of, first_batch, loss_of, moved
from fastloop.loop.restore import restored
from fastloop.recipes.results import Result
from fastloop.recipes.start import causes
from fastloop.recipes.start.causes import Trace
from fastloop.texts import number

AREA = "overfit_one_batch"
LR = 1e-3
SHARE = 0.01  # of the loss at the start, or of the best constant's: reached by heart, without classes


@dataclass
class OverfitResult(Result):
    """Verdict and curve of `overfit_one_batch`."""

    practice: ClassVar[str] = AREA
    passed: bool
    verdict: str
    losses: list[float]  # before each step, and after the last
    accuracies: list[float] | None  # None without classes
    steps: int
    target_loss: float | None
    target_accuracy: float | None
    findings: list[Finding] = field(default_factory=list)

    def table(self) -> str:
        """The verdict, then what was found."""
        return "\n".join([self.verdict, *([listed(self.findings)] if self.findings else [])])

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Loss, and accuracy where there are classes, by step.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        made = figure()
        axes = made.subplots()
        axes.plot(self.losses, label="loss")
        if self.target_loss is not None:
            axes.axhline(self.target_loss, linestyle=":", color="C0", label="loss wanted")
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        if finite and min(finite) > 0:
            axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="loss", title="one batch by heart: " + ("yes" if self.passed else "no"))
        handles, labels = axes.get_legend_handles_labels()
        if self.accuracies is not None:
            other = axes.twinx()
            other.plot(self.accuracies, color="C1", label="accuracy")
            other.set(ylabel="accuracy", ylim=(-0.02, 1.02))
            handles, labels = [*handles, *other.lines], [*labels, "accuracy"]
        axes.legend(handles, labels, loc="center right")
        return save(made, path)


def overfit_one_batch(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float | None = None,
    steps: int = 300,
    target_loss: float | None = None,
    target_accuracy: float = 0.95,
) -> OverfitResult:
    """Train on one batch until it is known by heart; if it does not come to that, say why.

    It ends as soon as the target is reached: with classes the accuracy, and `target_loss` if that is given; without
    them `target_loss`, by default 1 % of the first loss and of the loss of the best constant prediction. The model is
    in train mode, so dropout and normalization do what they do in training. Model, optimizer, gradients and random
    states are afterwards what they were, bit for bit.

    Args:
        model: where it is; the batch is moved there.
        loss_fn: as `Loop` takes it. Of a function the accuracy is the metric "accuracy", if it returns one.
        batch: one, or a loader, whose first one is taken; 16 to 64 samples are plenty.
        optimizer: None: fastloop.AdamW over what requires gradients, without weight decay.
        lr: of that AdamW, 1e-3 by default; not beside an optimizer, which has its own.
        steps: at most.
        target_loss: that the batch counts as learned at.
        target_accuracy: the same, in (0, 1].

    Raises:
        TypeError: a loss_fn, or a result of it, that `Loop` would not take.
        ValueError: numbers out of range, an empty loader, parameters without values.
    """
    _checked(lr, steps, target_loss, target_accuracy, optimizer)
    loss = loss_of(loss_fn)
    batch = moved(first_batch(batch), device_of(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return _told([causes.nothing_trained()], [], None, 0, target_loss, None)
    if optimizer is None:
        optimizer = fastloop.AdamW(trained, lr=LR if lr is None else lr, weight_decay=0.0)
    modules = [model, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])]
    mistaken = check_output_activation(model, loss_fn, batch)
    with restored(modules, optimizer), _outputs_of(model) as outputs:
        model.train()
        trace = Trace(model, loss_fn, batch)
        wanted = target_loss
        accuracies: list[float] = []
        for step in range(steps + 1):
            try:
                value, accuracy = _forward(model, loss, loss_fn, batch, outputs)
            except (RuntimeError, IndexError, TypeError, ValueError):
                if step == 0 and any(each.level == "error" for each in mistaken):  # which say why
                    return _told(mistaken, [], None, 0, target_loss, None)
                raise
            trace.take(value, outputs)
            accuracies += [] if accuracy is None else [accuracy]
            if not math.isfinite(trace.losses[-1]) or not value.requires_grad:
                break
            if wanted is None and accuracy is None:
                wanted = _wanted(trace)
            if _reached(trace.losses, wanted, accuracy, target_accuracy):
                return _passed(trace.losses, accuracies, wanted, target_accuracy, mistaken)
            if step < steps:
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                trace.take_gradients()
                optimizer.step()
        findings = [*mistaken, *trace.findings(optimizer)]
    taken = len(trace.losses) - 1
    return _told(findings, trace.losses, accuracies or None, taken, wanted, target_accuracy if accuracies else None)


def _checked(lr: float | None, steps: int, target_loss: float | None, target_accuracy: float, optimizer: Any) -> None:
    if lr is not None and optimizer is not None:
        raise ValueError(f"[{AREA}] lr is of the optimizer made here, got lr={lr} beside an optimizer; leave one out")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(f"[{AREA}] the optimizer must step without a closure, got LBFGS; pass another, or none")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"[{AREA}] lr must be above 0, got {lr}; pass e.g. 1e-3")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"[{AREA}] steps must be an integer of at least 1, got {steps!r}")
    if not 0 < target_accuracy <= 1:
        raise ValueError(f"[{AREA}] target_accuracy must lie in (0, 1], got {target_accuracy}; pass e.g. 0.95")
    if target_loss is not None and not math.isfinite(target_loss):
        raise ValueError(f"[{AREA}] target_loss must be finite, got {target_loss}")


@contextmanager
def _outputs_of(model: nn.Module) -> Iterator[list[Any]]:
    """What the model's last forward returned is in the list."""
    kept: list[Any] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        kept[:] = [output]

    handle = model.register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


def _forward(model: nn.Module, loss: Loss, loss_fn: Any, batch: Any, outputs: list[Any]) -> tuple[Tensor, float | None]:
    """The loss, and the accuracy where targets are classes."""
    outputs.clear()
    value, metrics = loss(model, batch)
    given = metrics.get("accuracy")
    if given is not None:
        return value, float(given)
    pair = causes.classified(loss_fn, batch, outputs)
    if pair is None:
        return value, None
    output, target = pair
    counted = target != getattr(loss_fn, "ignore_index", -100)
    right = (output.argmax(dim=1) == target) & counted
    return value, float(right.sum() / counted.sum())


def _wanted(trace: Trace) -> float:
    """1 % of the first loss, and of what the best constant would have where that is known.

    Raises:
        ValueError: a loss below 0, of which a share says nothing.
    """
    if trace.losses[0] < 0:
        raise ValueError(
            f"[{AREA}] target_loss must be given for a loss that can be below 0, it begins at {trace.losses[0]:.4g}; "
            "pass what the batch counts as learned at"
        )
    constant = trace.constant_loss()
    return SHARE * (trace.losses[0] if constant is None else min(trace.losses[0], constant))


def _reached(losses: list[float], wanted: float | None, accuracy: float | None, target_accuracy: float) -> bool:
    if accuracy is None:  # a loss of 0 at the start is of nothing
        return wanted is not None and losses[-1] <= wanted and losses[0] != 0
    # Right by chance before the first step is not learned, and neither is a loss that has not moved.
    learned = len(losses) > 1 and losses[-1] < losses[0]
    return accuracy >= target_accuracy and learned and (wanted is None or losses[-1] <= wanted)


def _passed(
    losses: list[float],
    accuracies: list[float],
    wanted: float | None,
    target_accuracy: float,
    findings: list[Finding],
) -> OverfitResult:
    steps = len(losses) - 1
    known = f"accuracy {number(accuracies[-1])} and loss" if accuracies else "loss"
    verdict = f"passed: {known} {number(losses[-1])} after {steps} steps, from a loss of {number(losses[0])}"
    reached = target_accuracy if accuracies else None
    return OverfitResult(True, verdict, losses, accuracies or None, steps, wanted, reached, findings)


def _told(
    findings: list[Finding],
    losses: list[float],
    accuracies: list[float] | None,
    steps: int,
    wanted: float | None,
    target_accuracy: float | None,
) -> OverfitResult:
    worst = min(findings, key=lambda finding: ("error", "warning", "note").index(finding.level))
    reached = [] if not accuracies else [f"accuracy {number(accuracies[-1])} of {number(target_accuracy)}"]
    if losses:
        reached.append(f"loss {number(losses[-1])}" + ("" if wanted is None else f" of {number(wanted)}"))
    verdict = f"failed after {steps} steps{': ' if reached else ''}{', '.join(reached)}; {worst.what}"
    return OverfitResult(False, verdict, losses, accuracies, steps, wanted, target_accuracy, findings)
