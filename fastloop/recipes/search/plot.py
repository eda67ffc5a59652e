# SPDX-License-Identifier: Apache-2.0
"""The picture of a search."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastloop.drawing import figure, save
from fastloop.recipes.search.space import Choice, Range

ACROSS = 3


def draw(
    trials: Sequence[Any], keys: Sequence[str], space: Mapping[str, Range], metric: str, mode: str,
    path: str | os.PathLike[str],
) -> Path:  # fmt: skip
    """See `SearchReport.plot`."""
    done = [trial for trial in trials if trial.status == "ok"]
    if not done:
        raise ValueError("[search] no trial has come to its end: there is nothing to draw; see the table")
    down = math.ceil((len(keys) + 1) / ACROSS)
    across = min(ACROSS, len(keys) + 1)
    made = figure(3.6 * across, 2.9 * down, "the plot of a search")
    axes = made.subplots(down, across, squeeze=False).flatten()
    _by_trial(axes[0], trials, done, metric, min if mode == "min" else max)
    spread = _logarithmic([trial.value for trial in done])
    for axis, key in zip(axes[1:], keys, strict=False):
        _against(axis, done, key, space[key])
    for axis in axes[: len(keys) + 1]:
        axis.set_yscale("log" if spread else "linear")
        axis.grid(alpha=0.3)
    for axis in axes[len(keys) + 1 :]:
        axis.set_axis_off()
    return save(made, path)


def _by_trial(axis: Any, trials: Sequence[Any], done: Sequence[Any], metric: str, best: Any) -> None:
    numbers = [trial.number for trial in done]
    axis.plot(numbers, [trial.value for trial in done], "o", color="tab:blue", markersize=4, label="trial")
    pruned = [trial for trial in trials if trial.status == "pruned" and trial.values]
    if pruned:
        ends = [best(trial.values) for trial in pruned]
        axis.plot([t.number for t in pruned], ends, "x", color="tab:gray", markersize=5, label="pruned")
    so_far = list(accumulate((trial.value for trial in done), best))
    axis.step(numbers, so_far, where="post", color="tab:orange", label="best so far")
    axis.set_xlabel("trial")
    axis.set_ylabel(metric)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=7)


def _against(axis: Any, done: Sequence[Any], key: str, given: Range) -> None:
    values = [trial.value for trial in done]
    at = [trial.settings[key] for trial in done]
    if isinstance(given, Choice):
        texts = [str(value) for value in given.values]
        at = [texts.index(str(value)) for value in at]
        axis.set_xticks(range(len(texts)), [text if len(text) <= 12 else f"{text[:11]}…" for text in texts], fontsize=7)
        axis.set_xlim(-0.5, len(texts) - 0.5)
    elif given.log:
        axis.set_xscale("log")
    axis.plot(at, values, "o", color="tab:blue", markersize=4)
    axis.set_xlabel(key)


def _logarithmic(values: Sequence[float]) -> bool:
    """Whether the values differ by so much that a linear axis would show the worst one only."""
    return min(values) > 0 and max(values) / min(values) > 30
