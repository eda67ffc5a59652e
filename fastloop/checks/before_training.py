# SPDX-License-Identifier: Apache-2.0
"""All checks together, on a training as it is about to begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fastloop.checks.layers import batchnorms, check_layer_order, check_modes, check_normalization
from fastloop.checks.leakage import check_leakage
from fastloop.checks.loaders import check_loader
from fastloop.checks.look import wanted
from fastloop.checks.on_batch import batch_of, check_batches
from fastloop.checks.optimizers import check_optimizer, check_schedule
from fastloop.checks.samples import dataset_of
from fastloop.checks.trying import why_not
from fastloop.checks.values import check_scale, check_values, lowered
from fastloop.findings import Finding, Level, listed, ordered
from fastloop.loop.data import first_tensor, samples_in
from fastloop.loop.strategy import unwrapped

LONG = 20  # epochs from which on early stopping is worth a note


class CheckFailed(ValueError):
    """A check has found an error.

    Attributes:
        findings: all of them, the worst first.
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = ordered(findings)
        errors = sum(finding.level == "error" for finding in findings)
        what = f"{errors} error{'s' * (errors != 1)}" if errors else "another rank has errors, which its output lists,"
        super().__init__(f"[checks] {what} before the training; check=False trains anyway\n{listed(self.findings)}")


def preflight(
    model: nn.Module,
    loss_fn: Any,
    train_loader: Any,
    val_loader: Any = None,
    optimizer: Optimizer | None = None,
    *,
    schedule: Any = None,
    epochs: int | None = None,
    patience: int | None = None,
) -> list[Finding]:
    """The usual mistakes, looked for before a training; errors first.

    Costs a forward and backward of one batch, a forward of up to 64 validation samples, what `check_loader` reads, and
    host memory for a copy of model and optimizer; where that is not free, no batch is tried, and a note says so.

    All is put back bit for bit: model, buffers, optimizer, gradients, random states, the data sets' and samplers'
    attributes and generators, and what the loss function reaches by its attributes, closure and globals, such as a
    discriminator and its optimizer. Files and logs that it writes stay. Batches are made in this process, from samples
    by their index; a loader without an index, which may be gone through once only, is not touched, and a note says so.
    A check that fails by itself is a note too.

    Args:
        model, loss_fn: as `Loop` takes them.
        train_loader, val_loader: DataLoaders, or lists of batches.
        optimizer: whose parameters and settings are looked at.
        schedule, epochs, patience: of the training; None for what it does not have.

    Raises:
        TypeError: a model, loss_fn or optimizer that is none.
        ValueError: a criterion with reduction="sum" or "none", which Loop does not take.
    """
    wanted(model, loss_fn, optimizer)
    found = _Found()
    batch = found.of("train_loader", lambda: batch_of(train_loader), None)
    untried = found.of("model", lambda: why_not(model, loss_fn, batch, optimizer), "that could not be found out")
    return inspect(
        model, loss_fn, batch, train_loader, val_loader, optimizer, schedule=schedule, epochs=epochs, patience=patience,
        untried=untried, found=found,
    )  # fmt: skip


def inspect(
    model: nn.Module,
    loss_fn: Any,
    batch: Any,
    train_loader: Any,
    val_loader: Any,
    optimizer: Optimizer | None,
    *,
    schedule: Any = None,
    epochs: int | None = None,
    patience: int | None = None,
    fresh: bool = True,
    world: int = 1,
    untried: str = "",
    found: _Found | None = None,
) -> list[Finding]:
    """`preflight` on a batch that is there already; None for none.

    Args:
        fresh: the model has not been trained, so that its loss is that of a beginning.
        world: ranks that train together.
        untried: why no batch is to be tried.
    """
    found = _Found() if found is None else found
    inner = unwrapped(model)
    found.all("model", lambda: check_modes(inner))
    found.all("layers", lambda: check_layer_order(inner))
    if optimizer is not None:
        found.all("optimizer", lambda: check_optimizer(inner, optimizer))
        found.all("schedule", lambda: check_schedule(optimizer, schedule))
    found.all("evaluation", lambda: _evaluation(val_loader, epochs, patience))
    found.all("loaders", lambda: check_loader(train_loader, val_loader))
    found.all("normalization", lambda: _normalization(inner, train_loader))
    if batch is not None:
        found.all("normalization", lambda: check_normalization(inner, samples_in(batch) * _together(inner, world)))
    if untried:
        found.note("model", f"no batch is tried: {untried}")
        if batch is not None:  # whether the loss can do with NaN, nobody knows
            found.all("batch", lambda: lowered(check_values(batch), "warning") + check_scale(first_tensor(batch)))
    else:
        found.all(
            "training",
            lambda: check_batches(model, loss_fn, batch, optimizer, train_loader, val_loader, fresh, world),
        )
    return ordered(dict.fromkeys(found.findings))


class _Found:
    """Findings so far; an exception of a check is a note."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    def of(self, where: str, check: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return check()
        except Exception as error:
            self.note(where, f"could not be checked: {type(error).__name__}: {error}".splitlines()[0])
            return otherwise

    def all(self, where: str, check: Callable[[], list[Finding]]) -> None:
        self.findings += self.of(where, check, [])

    def note(self, where: str, what: str) -> None:
        self.findings.append(Finding("note", where, what))


# ---- the rest


def _evaluation(val_loader: Any, epochs: int | None, patience: int | None) -> list[Finding]:
    if val_loader is None:
        level: Level = "note" if epochs == 1 else "warning"
        what = "there are no validation data: overfitting cannot be seen, and no best checkpoint be chosen"
        return [Finding(level, "evaluation", what, "fit(train_loader, val_loader)")]
    if patience is None and epochs is not None and epochs >= LONG:
        what = f"{epochs} epochs without early stopping"
        return [
            Finding("note", "evaluation", what, "Loop(patience=10); keep_best keeps the best checkpoint in any case")
        ]
    return []


def _normalization(model: nn.Module, train_loader: Any) -> list[Finding]:
    """`fastloop.recipes.Normalization` in the model, or as a transform of the data set, against the training split."""
    data = dataset_of(train_loader)
    holders = [
        *model.modules(),
        getattr(data, "transform", None),
        getattr(getattr(data, "dataset", None), "transform", None),
    ]
    known = [each for each in holders if type(each).__name__ == "Normalization" and hasattr(each, "count")]
    return [f for each in known for f in check_leakage(train_loader, normalization=each)] if data is not None else []


def _together(model: nn.Module, world: int) -> int:
    """Ranks whose samples BatchNorm's statistics are of."""
    found = batchnorms(model)
    return world if found and all(isinstance(module, nn.SyncBatchNorm) for _, module in found) else 1
