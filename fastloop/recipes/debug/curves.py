# SPDX-License-Identifier: Apache-2.0
"""What the curves of a run say: each symptom with its remedy."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastloop.findings import Finding, ordered
from fastloop.loop.watch import Spikes
from fastloop.recipes.debug.series import (
    Points,
    blocks,
    change,
    first_of,
    jitter,
    level,
    part,
    series_of,
    since,
    trend,
)  # fmt: skip

AREA = "diagnose_curves"
TRAIN, VAL = ("train/loss", "loss", "train_loss"), ("val/loss", "val_loss")
FEW_ROWS, FEW_EVALUATIONS = 10, 5  # below these no trend is looked for
AT_CHANCE = 0.05  # share of log(classes) around it
WILD, WILD_OF_START = 0.2, 0.1  # jitter over the level, and over the first loss
BACK_UP = 0.1  # share of what it had fallen that a loss has risen again
RISEN = 0.05  # of the validation loss over its least
GAP = 1.5  # validation loss over training loss
HIGH = 0.5  # share of the first loss that is left
SLOW = 0.2  # share of the first loss that a whole run took off
EXPLODING, VANISHING = 100.0, 1e-6  # gradient norm over its median; the median itself


@dataclass
class _Curves:
    train: Points
    val: Points
    norms: Points
    classes: int | None
    odd: dict[str, float]  # first step at which a metric is not finite


def diagnose_curves(
    history_or_run_dir: Mapping[str, Any] | Iterable[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    classes: int | None = None,
) -> list[Finding]:
    """Symptoms in "train/loss", "val/loss" and "grad_norm", the worst first; [] for healthy curves.

    Not finite, oscillating, stuck at log(classes), not falling, falling and rising again, overfitting, underfitting,
    slow, with spikes; exploding and vanishing gradients. Trends are those of Mann and Kendall, so that noise is none.
    Fewer than 10 rows of training, or 5 evaluations, are said to be too few.

    Args:
        history_or_run_dir: what `Loop.fit` returns, rows of metrics, or a run's folder.
        classes: of a classification, so that a loss at log(classes) is known for chance.

    Raises:
        FileNotFoundError: a folder without metrics.jsonl.
        TypeError: something else.
        ValueError: classes below 2, or no training loss.
    """
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 2):
        raise ValueError(f"[{AREA}] classes must be an integer of at least 2, got {classes!r}")
    series = series_of(history_or_run_dir, AREA)
    if not any(series.get(name) for name in TRAIN):
        raise ValueError(f"[{AREA}] wants a training loss ({', '.join(TRAIN)}), got {sorted(series) or 'nothing'}")
    odd = {name: min(bad) for name, points in series.items() if (bad := [s for s, v in points if not math.isfinite(v)])}
    curves = _Curves(first_of(series, TRAIN), first_of(series, VAL), first_of(series, ("grad_norm",)), classes, odd)
    findings = _not_finite(series, curves)
    if len(curves.train) < FEW_ROWS:
        few = f"{len(curves.train)} rows of the training loss are too few for its trend, {FEW_ROWS} are needed"
        findings.append(Finding("note", "train/loss", few, "log more often: Loop(log_every=1)"))
    else:
        findings += [f for look in TRAINING for f in look(curves)]
    if len(curves.val) < FEW_EVALUATIONS:
        if curves.val:
            few = f"{len(curves.val)} evaluations are too few for a trend, {FEW_EVALUATIONS} are needed"
            findings.append(Finding("note", "val/loss", few, "evaluate more often: fit(evaluate_every_steps=...)"))
    else:
        findings += _overfitting(curves)
    return ordered(findings)


def _not_finite(series: Mapping[str, Points], curves: _Curves) -> list[Finding]:
    findings = []
    for name in (*TRAIN, *VAL):
        if name in curves.odd:
            remedy = (
                "clip gradients (max_grad_norm=1.0) and lower the learning rate; look at the data with nonfinite='stop'"
            )
            findings.append(Finding("error", name, f"is not finite from step {curves.odd[name]:g} on", remedy))
    skipped = max((value for _, value in series.get("skipped", [])), default=0.0)
    if skipped:
        what = f"{skipped:g} windows had gradients that are not finite, and changed nothing"
        findings.append(Finding("warning", "skipped", what, "a few are normal with fp16; else lower the learning rate"))
    return findings


# ---- training


def _oscillating(curves: _Curves) -> list[Finding]:
    late = part(curves.train, 0.5)
    noise, usual = jitter(late), abs(level(late))
    if noise <= WILD * usual or noise <= WILD_OF_START * abs(_start(curves.train)):
        return []
    what = f"oscillates: from row to row it moves by {noise:.3g}, around {usual:.3g}"
    return [Finding("warning", "train/loss", what, "lower the learning rate (a tenth), or take larger batches")]


def _stuck(curves: _Curves) -> list[Finding]:
    late = part(curves.train, 0.5)
    if curves.classes is not None:
        chance = math.log(curves.classes)
        if all(abs(value - chance) <= AT_CHANCE * chance for _, value in blocks(late, 20)):
            what = f"stays at log({curves.classes}) = {chance:.3g}, the loss of a guess"
            remedy = (
                "overfit one batch first (overfit_one_batch); then a higher learning rate, a larger model, the labels"
            )
            return [Finding("warning", "train/loss", what, remedy)]
    fallen = _start(curves.train) - level(part(curves.train, 0.8))
    if trend(curves.train) >= 0 and fallen <= 0.01 * abs(_start(curves.train)):
        what = (
            f"does not fall: it begins at {_start(curves.train):.4g} and ends at {level(part(curves.train, 0.8)):.4g}"
        )
        remedy = "call diagnose on a batch; overfit one batch first; try other learning rates (lr_range_test)"
        return [Finding("warning", "train/loss", what, remedy)]
    return []


def _back_up(curves: _Curves) -> list[Finding]:
    smooth = blocks(curves.train, 20)
    least = min(range(len(smooth)), key=lambda i: smooth[i][1])
    fallen = smooth[0][1] - smooth[least][1]
    risen = smooth[-1][1] - smooth[least][1]
    after = since(curves.train, smooth[least][0])
    if least >= 0.9 * len(smooth) or fallen <= 0 or risen <= BACK_UP * fallen or trend(after) <= 0:
        return []
    what = f"falls until step {smooth[least][0]:g} ({smooth[least][1]:.4g}) and rises again to {smooth[-1][1]:.4g}"
    remedy = "the learning rate is too high there: lower it, warm up, or clip gradients; regularization would not help"
    return [Finding("warning", "train/loss", what, remedy)]


def _slow(curves: _Curves) -> list[Finding]:
    start, end = _start(curves.train), level(part(curves.train, 0.9))
    if start <= 0 or trend(curves.train) >= 0 or not 0.01 * start < start - end < SLOW * start:
        return []
    if trend(part(curves.train, 0.5)) >= 0:  # at its end
        return []
    what = f"falls slowly: from {start:.4g} to {end:.4g} in {len(curves.train)} rows, and goes on"
    return [Finding("warning", "train/loss", what, "a higher learning rate (lr_range_test), AdamW, or train longer")]


def _underfitting(curves: _Curves) -> list[Finding]:
    start, late = _start(curves.train), part(curves.train, 0.5)
    end = level(late)
    fallen = start - end
    flat = trend(late) >= 0 or abs(change(late)) < 0.02 * abs(end)
    if start <= 0 or not flat or fallen <= 0.01 * start or end <= HIGH * start:
        return []
    if trend(late) > 0 and change(late) > BACK_UP * fallen:  # it diverges
        return []
    if curves.val and level(part(curves.val, 0.5)) > GAP * end:
        return []
    what = f"is flat at {end:.4g}, {end / start:.0%} of the loss that it began with"
    remedy = (
        "a larger model, a higher learning rate, less regularization, or better inputs: overfit_one_batch tells which"
    )
    return [Finding("warning", "train/loss", f"{what}: underfitting", remedy)]


def _spikes(curves: _Curves) -> list[Finding]:
    watch = Spikes(window=20, least=10)  # of rows, each a mean of windows: a longer one lags behind a falling loss
    steps = [step for step, value in curves.train if watch.update(value)]
    if not steps:
        return []
    what = f"{len(steps)} spike{'s' * (len(steps) > 1)}, the first at step {steps[0]:g}"
    remedy = "clip gradients (max_grad_norm=1.0), warm up, lower the learning rate; look at those batches"
    return [Finding("warning" if len(steps) > 2 else "note", "train/loss", what, remedy)]


def _gradients(curves: _Curves) -> list[Finding]:
    if len(curves.norms) < FEW_ROWS:
        return []
    usual, largest = level(curves.norms), max(value for _, value in curves.norms)
    if usual < VANISHING:
        what = f"is {usual:.3g}: the gradient vanishes"
        remedy = "initialize_weights, residual connections, normalization; diagnose says in which layer"
        return [Finding("warning", "grad_norm", what, remedy)]
    if largest > EXPLODING * usual:
        what = f"rises to {largest:.3g}, {largest / usual:.0f} times its median: the gradient explodes"
        return [Finding("warning", "grad_norm", what, "max_grad_norm=1.0, a lower learning rate, warm-up")]
    return []


TRAINING: tuple[Callable[[_Curves], list[Finding]], ...] = (
    _oscillating, _stuck, _back_up, _slow, _underfitting, _spikes, _gradients
)  # fmt: skip


# ---- validation


def _overfitting(curves: _Curves) -> list[Finding]:
    least = min(curves.val, key=lambda point: point[1])
    after = since(curves.val, least[0])
    training = since(curves.train, least[0])
    end = level(after[-3:])
    risen = (end - least[1]) / max(abs(least[1]), 1e-12)
    falls = len(training) >= 4 and trend(training) < 0
    if risen > RISEN and len(after) >= 3 and _rises(after):
        if falls or (len(training) < 4 and len(curves.train) >= 4 and trend(curves.train) < 0):
            what = (
                f"is least at step {least[0]:g} ({least[1]:.4g}) and rises to {end:.4g}, while the training loss falls"
            )
            remedy = "early stopping (patience=), more data or augmentation, weight decay, dropout, a smaller model"
            return [Finding("warning", "val/loss", f"{what}: overfitting", remedy)]
        what = (
            f"is least at step {least[0]:g} ({least[1]:.4g}) and rises to {end:.4g}, as the training loss does not fall"
        )
        return [Finding("warning", "val/loss", what, "lower the learning rate, and keep the best checkpoint")]
    if not curves.train:
        return []
    trained = level(part(curves.train, 0.8))
    late = part(curves.val, 0.5)
    if trained > 0 and level(late[-3:]) > GAP * trained and trend(late) >= 0:
        what = f"stays at {level(late[-3:]):.4g}, {level(late[-3:]) / trained:.1f} times the training loss: overfitting"
        return [Finding("warning", "val/loss", what, "more data or augmentation, weight decay, dropout")]
    return []


def _rises(points: Points) -> bool:
    """As a trend; of three points, each above the one before."""
    if len(points) >= 4:
        return trend(points) > 0
    return all(b[1] > a[1] for a, b in itertools.pairwise(points))


def _start(points: Points) -> float:
    """The loss that it begins with: the median of the first three rows."""
    return level(points[:3])
