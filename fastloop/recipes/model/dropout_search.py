# SPDX-License-Identifier: Apache-2.0
"""Which dropout rate validates best, and whether the difference is more than noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from statistics import fmean, stdev
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastloop.findings import Finding, listed
from fastloop.loop import Loop, random_state
from fastloop.loop.restore import process_kept
from fastloop.optim import AdamW
from fastloop.recipes.model.dropout import DROPOUTS
from fastloop.recipes.results import Result
from fastloop.texts import columns

WHERE = "[search_dropout]"

_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # for 1, 2, ... degrees of freedom
_NORMAL = 1.96  # for infinitely many


@dataclass(frozen=True)
class RateScore:
    """Of one rate: the lowest validation loss of each repeat, and the training loss of that epoch."""

    rate: float
    losses: list[float]
    train_losses: list[float]

    @property
    def mean(self) -> float:
        """Of the validation losses."""
        return fmean(self.losses)

    @property
    def spread(self) -> float | None:
        """Their standard deviation over the repeats; None of one repeat."""
        return stdev(self.losses) if len(self.losses) > 1 and math.isfinite(self.mean) else None


@dataclass(frozen=True)
class DropoutSearch(Result):
    """Rates by their validation loss.

    Args:
        best: the rate of the lowest mean validation loss; the lower rate of two that are equal.
        scores: in the order in which the rates were given.
        within_noise: rates that the repeats cannot tell from the best, by a paired t-test at 95 %; all others of a
            search of one repeat, which says nothing of the noise.
        findings: what the numbers do not say.
    """

    practice: ClassVar[str] = "search_dropout"
    best: float
    scores: list[RateScore]
    within_noise: list[float]
    findings: list[Finding]

    def table(self) -> str:
        """A row for each rate, and the findings below."""
        rows = [
            (f"{each.rate:g}", each.mean, each.spread, fmean(each.train_losses), self._verdict(each.rate))
            for each in self.scores
        ]
        table = columns(("rate", "val loss", "spread", "train loss", "verdict"), rows)
        return f"{table}\n\n{listed(self.findings)}"

    def _verdict(self, rate: float) -> str:
        return "best" if rate == self.best else "within the noise" if rate in self.within_noise else "worse"


def search_dropout(
    build: Callable[[float], nn.Module],
    train: Any,
    validation: Any,
    *,
    loss_fn: Any,
    rates: Sequence[float] = (0.0, 0.1, 0.3, 0.5),
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-3,
    repeats: int = 1,
    seed: int = 0,
) -> DropoutSearch:
    """Train a model for each dropout rate, on the same data in the same order; the rate of the lowest validation loss.

    The loss of a model is that of its best epoch, as early stopping would keep it. Repeat r draws weights, order and
    dropout from seed + r, for each rate: differences between rates are taken within a repeat. Random states and
    settings of the process are afterwards what they were.

    Args:
        build: `build(rate)` gives a new model with that dropout rate.
        train, validation: datasets of batches as loss_fn takes them, or pairs of tensors (inputs, targets).
        loss_fn: as `Loop` takes it.
        rates: in [0, 1), at least two.
        epochs, batch_size, lr: of each training, by AdamW.
        repeats: trainings for each rate; from 3 on the spread means something.
        seed: of the first repeat.

    Raises:
        ValueError: an argument out of range, or no rate gave a finite loss.
        TypeError: build gives no nn.Module, or rates that are no numbers.
    """
    rates = _checked(rates, epochs, batch_size, repeats)
    train, validation = _dataset(train), _dataset(validation)
    runs: dict[float, list[tuple[float, float]]] = {rate: [] for rate in rates}
    dropouts: dict[float, list[float]] = {}
    with random_state.unmoved(), process_kept():
        for repeat in range(repeats):
            for rate in rates:
                random_state.seed_everything(seed + repeat)
                model = build(rate)
                if not isinstance(model, nn.Module):
                    raise TypeError(f"{WHERE} build(rate) must give an nn.Module, got {type(model).__name__}")
                dropouts[rate] = _dropouts(model)
                runs[rate].append(_trained(model, train, validation, loss_fn, epochs, batch_size, lr, seed + repeat))
    scores = [RateScore(rate, [v for v, _ in found], [t for _, t in found]) for rate, found in runs.items()]
    return _judged(scores, [rate for rate in rates if list(dropouts.values()).count(dropouts[rate]) > 1])


def _trained(
    model: nn.Module, train: Any, validation: Any, loss_fn: Any, epochs: int, batch_size: int, lr: float, seed: int
) -> tuple[float, float]:
    """(lowest validation loss, training loss of that epoch)."""
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train, batch_size, shuffle=True, generator=order)
    loop = Loop(
        model, AdamW([each for each in model.parameters() if each.requires_grad], lr=lr), loss_fn,
        loggers=(), log_every=len(loader), progress=False, curves=False,
    )  # fmt: skip
    history = loop.fit(loader, DataLoader(validation, batch_size), epochs=epochs)
    value, step = min((value if math.isfinite(value) else math.inf, step) for step, value in history["val/loss"])
    return value, dict(history["train/loss"]).get(step, math.nan)


def _judged(scores: list[RateScore], ignored: list[float]) -> DropoutSearch:
    findings = []
    for each in scores:
        if not math.isfinite(each.mean):
            findings.append(Finding("warning", f"rate {each.rate:g}", "a training diverged", "lower lr"))
    if all(not math.isfinite(each.mean) for each in scores):
        raise ValueError(f"{WHERE} at least one rate must give a finite validation loss, got none; lower lr")
    if ignored:
        what = f"the model has the same dropout modules for the rates {', '.join(f'{rate:g}' for rate in ignored)}"
        remedy = "pass the rate on to nn.Dropout; F.dropout cannot be seen from here"
        findings.append(Finding("warning", "build", what, remedy))
    best = min(scores, key=lambda each: (each.mean, each.rate))
    others = [each for each in scores if each is not best and math.isfinite(each.mean)]
    noise = [each.rate for each in others if not _is_worse(each.losses, best.losses)]
    if len(best.losses) == 1:
        what = "one training for each rate: the differences may be noise"
        findings.append(Finding("note", "", what, "pass repeats=3 or more"))
    elif noise:
        what = f"{', '.join(f'{rate:g}' for rate in noise)} cannot be told from {best.rate:g}: within the noise"
        findings.append(Finding("note", "", what, "take the lower rate, or more repeats"))
    if best.rate == max(each.rate for each in scores) and others:
        findings.append(Finding("note", "", f"the best rate, {best.rate:g}, is the highest one", "try higher ones"))
    return DropoutSearch(best.rate, scores, noise, findings)


def _is_worse(losses: list[float], best: list[float]) -> bool:
    """Whether the mean of the paired differences lies above 0 by a t-test at 95 %; never of a single pair."""
    differences = [a - b for a, b in zip(losses, best, strict=True)]
    if len(differences) < 2:
        return False
    return fmean(differences) > _quantile(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))


def _quantile(freedom: int) -> float:
    """97.5 % of Student's t: beyond the table by the expansion of Cornish and Fisher, to 0.003."""
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def _dropouts(model: nn.Module) -> list[float]:
    """The rates above 0 of its modules: their own or, as of nn.LSTM and nn.MultiheadAttention, `dropout`."""
    found = [each.p if isinstance(each, DROPOUTS) else getattr(each, "dropout", None) for each in model.modules()]
    return [float(each) for each in found if isinstance(each, (int, float)) and each > 0.0]


def _dataset(given: Any) -> Any:
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(each, Tensor) for each in given):
        given = TensorDataset(*given)
    if not hasattr(given, "__getitem__") or not hasattr(given, "__len__"):
        raise TypeError(
            f"{WHERE} train and validation must be datasets with an index or pairs of tensors, got "
            f"{type(given).__name__}; pass loader.dataset for a loader"
        )
    if not len(given):
        raise ValueError(f"{WHERE} train and validation must hold samples, got none")
    return given


def _checked(rates: Sequence[float], epochs: int, batch_size: int, repeats: int) -> list[float]:
    for name, value in {"epochs": epochs, "batch_size": batch_size, "repeats": repeats}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{WHERE} {name} must be an integer of at least 1, got {value!r}; pass e.g. 10")
    if isinstance(rates, (str, Real)) or not all(isinstance(rate, Real) for rate in rates):
        raise TypeError(f"{WHERE} rates must be a list of numbers, got {rates!r}; pass e.g. [0.0, 0.1, 0.3]")
    wanted = [float(rate) for rate in rates]
    if len(set(wanted)) < 2 or len(set(wanted)) < len(wanted) or not all(0.0 <= rate < 1.0 for rate in wanted):
        raise ValueError(f"{WHERE} rates must be two or more different ones in [0, 1), got {list(rates)}")
    return wanted


__all__ = ["DropoutSearch", "RateScore", "search_dropout"]
