# SPDX-License-Identifier: Apache-2.0
"""Whether a metric still improves, and why not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fastloop.findings import Finding, listed
from fastloop.recipes.debug.series import Points, change, finite, jitter, level, series_of, since, trend  # fmt: skip
from fastloop.recipes.results import Result
from fastloop.texts import number

AREA = "diagnose_plateau"
FEWEST = 4  # evaluations that can have a trend
GAP_OF_SCORES, GAP_OF_LOSSES = 0.1, 0.2  # absolute for a share such as the accuracy; of the training loss
DECAYED = 0.01  # of its highest: a learning rate that does nothing any more
WILD = 0.2  # jitter over the level of the training loss


@dataclass
class PlateauDiagnosis(Result):
    """Attributes:

    plateaued: the metric improves by less than the tolerance over the window, or by no more than noise.
    cause: "overfitting", "underfitting", "learning rate", or None.
    gap: how much worse validation is than training, of the metric itself where training has it, else of the loss;
        None where neither is logged.
    train_change, val_change: of the training loss and of the metric, over the window: the robust line's.
    """

    practice: ClassVar[str] = AREA
    plateaued: bool
    cause: str | None
    gap: float | None
    train_change: float | None
    val_change: float | None
    findings: list[Finding] = field(default_factory=list)

    def table(self) -> str:
        """The verdict with its numbers, then the findings."""
        verdict = "plateaued" if self.plateaued else "not plateaued"
        head = f"{verdict}{f': {self.cause}' if self.cause else ''}"
        values = (
            ("gap", self.gap),
            ("change of training loss", self.train_change),
            ("change of the metric", self.val_change),
        )
        numbers = ", ".join(f"{name} {number(value)}" for name, value in values if value is not None)
        return "\n".join(line for line in (head, numbers, listed(self.findings, "")) if line)


def diagnose_plateau(
    history_or_run_dir: Mapping[str, Any] | Iterable[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    metric: str = "val/loss",
    mode: str = "min",
    window: int = 10,
    tolerance: float = 1e-3,
) -> PlateauDiagnosis:
    """Whether the last `window` values of a metric have stopped improving, and the likely cause.

    It improves if the robust line through them (Theil and Sen) gains more than `tolerance` of their level over the
    window, and their trend (Mann and Kendall) is no chance. So values that fall steadily by little are not taken
    for a plateau, nor are noisy ones taken for progress.

    Args:
        history_or_run_dir: what `Loop.fit` returns, rows of metrics, or a run's folder.
        metric, mode: "min" or "max" is better.
        window: evaluations, at least 4.
        tolerance: smallest change that counts, as a share of the metric's level.

    Raises:
        FileNotFoundError: a folder without metrics.jsonl.
        TypeError: something else.
        ValueError: a metric that is not there, or an argument out of range.
    """
    if mode not in ("min", "max"):
        raise ValueError(f'[{AREA}] mode must be "min" or "max", got {mode!r}')
    if isinstance(window, bool) or not isinstance(window, int) or window < FEWEST:
        raise ValueError(f"[{AREA}] window must be an integer of at least {FEWEST}, got {window!r}")
    if not tolerance >= 0:
        raise ValueError(f"[{AREA}] tolerance must be at least 0, got {tolerance!r}")
    series = series_of(history_or_run_dir, AREA)
    if not series.get(metric):
        raise ValueError(f"[{AREA}] metric {metric!r} is none of {sorted(series)}; name one of them")
    points = finite(series[metric])[-window:]
    if len(points) < window:
        what = f"has {len(points)} finite values, and the window is {window}: too few to tell"
        return PlateauDiagnosis(
            False, None, None, None, None, [Finding("note", metric, what, "train on, or a smaller window")]
        )
    training = since(finite(series.get("train/loss", [])), points[0][0])
    gained = change(points)
    train_change = change(training) if len(training) >= FEWEST else None
    gap = _gap(series, metric, mode, points[0][0])
    made = PlateauDiagnosis(False, None, None if gap is None else gap[0], train_change, gained)
    improves = trend(points) == (-1 if mode == "min" else 1) and abs(gained) > tolerance * max(
        abs(level(points)), 1e-12
    )
    if improves:
        what = f"still improves, by {abs(gained):.3g} over the last {window} evaluations"
        made.findings.append(Finding("note", metric, what, "train on"))
        return made
    made.plateaued = True
    made.cause, finding = _cause(series, metric, training, gap, train_change)
    made.findings.append(finding)
    return made


def _gap(series: Mapping[str, Points], metric: str, mode: str, start: float) -> tuple[float, bool, str] | None:
    """How much worse validation is, whether that is much, and of what."""
    name = metric.rpartition("/")[2]
    sign = 1 if mode == "min" else -1
    for pair, sense in ((name, sign), ("loss", 1)):
        train, val = (since(finite(series.get(f"{side}/{pair}", [])), start) for side in ("train", "val"))
        if train and val:
            gap = sense * (level(val) - level(train))
            much = gap > (GAP_OF_LOSSES * abs(level(train)) if sense > 0 else GAP_OF_SCORES)
            return gap, much, pair
    return None


def _cause(
    series: Mapping[str, Points],
    metric: str,
    training: Points,
    gap: tuple[float, bool, str] | None,
    moved: float | None,
) -> tuple[str | None, Finding]:
    falls = moved is not None and moved < 0 and trend(training) < 0
    much = gap is not None and gap[1]
    if not much:
        rates = finite(series.get("lr", []))
        if rates and 0 <= rates[-1][1] <= DECAYED * max(rate for _, rate in rates):
            what = f"plateaued, with a learning rate of {rates[-1][1]:.3g}, a hundredth of its highest or less"
            return "learning rate", Finding(
                "warning", metric, what, "the schedule is at its end: a longer one, or stop here"
            )
    if much or falls:
        parts = [f"validation {gap[2]} is worse than training by {gap[0]:.3g}"] if gap is not None else []
        parts += [f"the training loss still falls (by {-moved:.3g})"] if falls and moved is not None else []
        remedy = "early stopping, more data or augmentation, weight decay, dropout, a smaller model"
        return "overfitting", Finding("warning", metric, f"plateaued: {', and '.join(parts)}", remedy)
    if len(training) >= FEWEST and jitter(training) > WILD * abs(level(training)):
        what = f"plateaued, and the training loss oscillates by {jitter(training):.3g} around {level(training):.3g}"
        return "learning rate", Finding("warning", metric, what, "lower the learning rate, or decay it")
    if gap is None and len(training) < FEWEST:
        what = "plateaued; without a training loss its cause cannot be told"
        return None, Finding("warning", metric, what, "log train/loss beside it")
    what = "plateaued, and so has the training loss" + (f"; they differ by {gap[0]:.3g}" if gap is not None else "")
    remedy = "a larger model, another learning rate, a longer schedule; look at the labels of the worst samples"
    return "underfitting", Finding("warning", metric, what, remedy)
