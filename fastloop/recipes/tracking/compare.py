# SPDX-License-Identifier: Apache-2.0
"""Runs of one folder side by side: what differed, and what came of it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fastloop import drawing, texts
from fastloop.loop.description import configured
from fastloop.loop.plain import flattened
from fastloop.recipes.results import Result
from fastloop.recipes.tracking.run_folder import CONFIG, Points, RunFolder, is_run, runs_below

MOST_CURVES = 10  # in one plot


@dataclass
class Outcome:
    """One run.

    Args:
        name: its folder, from the base on.
        config: of config.json, else the loop's, else what run.json says of optimizer, loaders and options; flat.
        best, best_step, last, last_step: of the metric, finite values only; None without any.
        steps: windows done.
        seconds: of training, over all its starts.
        points: (step, value) of the metric.
    """

    name: str
    config: dict[str, Any]
    best: float | None
    best_step: int | None
    last: float | None
    last_step: int | None
    steps: int
    seconds: float | None
    points: Points = field(repr=False, default_factory=list)


@dataclass
class Comparison(Result):
    """Runs, the best first; those without the metric at the end.

    Args:
        metric, mode: what they are compared by, and whether "min" or "max" is the better.
        runs: one `Outcome` each.
    """

    metric: str
    mode: str
    runs: list[Outcome]
    practice: ClassVar[str] = "compare_experiments"

    @property
    def best(self) -> Outcome | None:
        """The best run; None where no run has the metric."""
        return next((run for run in self.runs if run.best is not None), None)

    @property
    def differing(self) -> list[str]:
        """The settings in which any two runs differ, sorted."""
        names = sorted({name for run in self.runs for name in run.config})
        return [name for name in names if len({repr(run.config.get(name, _ABSENT)) for run in self.runs}) > 1]

    def table(self) -> str:
        """As text; of the settings only those in which the runs differ."""
        if not self.runs:
            return "no runs"
        return texts.columns(*self._cells())

    def markdown(self) -> str:
        """The same table in Markdown."""
        return texts.markdown(*self._cells())

    def _cells(self) -> tuple[list[str], list[list[Any]]]:
        names = self.differing
        head = ["run", f"best {self.metric}", "at step", f"last {self.metric}", "steps", "seconds", *names]
        rows = [
            [run.name, run.best, run.best_step, run.last, run.steps, run.seconds, *(run.config.get(n) for n in names)]
            for run in self.runs
        ]
        return head, rows

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """The metric over the steps, a line for each of the best runs, at most 10.

        Raises:
            ValueError: no run has the metric.
            MissingExtra: matplotlib is not installed.
        """
        shown = [run for run in self.runs if run.best is not None][:MOST_CURVES]
        if not shown:
            raise ValueError(f"[compare_experiments] no run has {self.metric!r}; there is nothing to draw")
        made = drawing.figure(what="a comparison of runs")
        axes = made.add_subplot()
        for run in shown:
            steps, values = zip(*((s, v) for s, v in run.points if math.isfinite(v)), strict=True)
            axes.plot(steps, values, marker="." if len(steps) < 30 else None, label=f"{run.name}: {run.best:.4g}")
        axes.set_xlabel("step")
        axes.set_ylabel(self.metric)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        return drawing.save(made, path)


_ABSENT = object()


def compare_experiments(
    base: str | os.PathLike[str] = "experiments", *, metric: str = "val/loss", mode: str = "min"
) -> Comparison:
    """Compare all runs in and below a folder by the best value of a metric.

    Args:
        base: folder of the runs: each folder with a config.json, run.json, metrics.jsonl or checkpoints is one.
        metric: of metrics.jsonl.
        mode: "min" or "max", which is the better.

    Raises:
        ValueError: another mode; no run has the metric (the error names those that there are).
        FileNotFoundError: no such folder.
    """
    if mode not in ("min", "max"):
        raise ValueError(f'[compare_experiments] mode must be "min" or "max", got {mode!r}')
    folder = Path(base)
    if not folder.is_dir():
        raise FileNotFoundError(f"[compare_experiments] base must be a folder of runs, there is no {folder}")
    found = [_tried(path, folder, metric, mode) for path in runs_below(folder)]
    outcomes = [outcome for outcome, _ in found]
    known = sorted({name for _, names in found for name in names if "/" in name})
    if known and all(outcome.best is None for outcome in outcomes):
        raise ValueError(
            f"[compare_experiments] no run in {folder} has the metric {metric!r}; pass one of {', '.join(known)}"
        )
    sign = 1.0 if mode == "min" else -1.0
    outcomes.sort(key=lambda run: (run.best is None, sign * (run.best or 0.0), run.name))
    return Comparison(metric, mode, outcomes)


def _tried(path: Path, base: Path, metric: str, mode: str) -> tuple[Outcome, list[str]]:
    """A file may be whole JSON and still not be as the loop writes it: such a run stands there without values."""
    try:
        return _outcome(path, base, metric, mode)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError):
        return Outcome(_name(path, base), {}, None, None, None, None, 0, None), []


def _name(path: Path, base: Path) -> str:
    name = path.relative_to(base).as_posix()
    return path.absolute().name if name == "." else name


def _outcome(path: Path, base: Path, metric: str, mode: str) -> tuple[Outcome, list[str]]:
    """The run, and the metrics that it has."""
    name = _name(path, base)
    if not is_run(path):  # an experiment that was made and not trained yet
        return Outcome(name, _config_alone(path), None, None, None, None, 0, None), []
    run = RunFolder(path)
    config = run.config or (configured(run.start) if run.start else {})
    points = run.points(metric)
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    best: tuple[int, float] | tuple[None, None] = (None, None)
    if finite:
        best = (min if mode == "min" else max)(finite, key=lambda point: point[1])  # the first of equal ones
    last = finite[-1] if finite else (None, None)
    outcome = Outcome(name, flattened(config), best[1], best[0], last[1], last[0], run.steps, run.seconds, points)
    return outcome, run.metrics


def _config_alone(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return flattened(content) if isinstance(content, dict) else {}
