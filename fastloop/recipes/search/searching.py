# SPDX-License-Identifier: Apache-2.0
"""The search: asks the study, trains in processes, tells the study."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from fastloop.recipes.search.question import checked, default_space, importing
from fastloop.recipes.search.report import FAILED, OK, PRUNED, SearchReport, SearchTrial, merged
from fastloop.recipes.search.space import Range
from fastloop.recipes.search.study import METHODS, Study, held
from fastloop.recipes.search.trial import FUNCTION, VALUE
from fastloop.tune import trial as trials_of
from fastloop.tune.target import Target, resolve

OF_A_TRIAL = {"progress": False, "curves": False, "save_every_epochs": None}  # where nothing else is said
IN_VAIN = 5  # first trials that fail for one reason, after which no other is begun


class Ended(Exception):
    """A trial that is ended by the search: its status, and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def search(
    target: str | Callable[..., Any] | Target,
    space: Mapping[str, Range] | None = None,
    *,
    method: str = "random",
    trials: int = 30,
    metric: str = "val/loss",
    mode: str = "min",
    folder: str | os.PathLike[str],
    pruning: bool = True,
    timeout: float = 3600.0,
    budget: float | None = None,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    fit: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_trial: Callable[[SearchTrial], None] | None = None,
) -> SearchReport:
    """Train with settings out of a space, and say which are the best.

    Each trial is a process of its own, with its run in folder/trials/NNNN. What crashes, hangs, takes all memory or
    gives a metric that is not finite is a failed trial with its reason. The study is a file in `folder`: the same call
    goes on with it up to `trials` in all, repeats the trial that ran when it was killed, and draws what it would have
    drawn. The method, the number of trials, pruning and the times may differ from call to call. Where the first five
    trials fail for the same reason, the search ends; trials of earlier calls do not count where all of them failed, so
    that the same call begins anew when the mistake is mended.

    Args:
        target: see `fastloop.tune`: "package.module:function", which returns model, optimizer, loss_fn and loaders.
        space: ranges by "arguments.NAME", "loop.NAME", "loader.NAME" or "fit.NAME"; None: those of DEFAULT_SPACE that
            the target takes.
        method: "grid" (all combinations, in a random order), "random" or "bayesian" (Optuna's TPE).
        metric: a name of the log. Of "val/..." the best of a trial's evaluations counts, of others the last row.
        mode: "min" or "max".
        pruning: end a trial whose best evaluation so far is worse than the median of the others at that evaluation,
            from the sixth trial and the second evaluation on.
        timeout: seconds of a trial.
        budget: seconds after which no further trial is begun; None for no bound.
        arguments, options, settings, fit: of the target, of Loop, of the loader and of `Loop.fit`, as far as they are
            not in the space. `fit` or the space has epochs or max_steps.
        seed: of the choice of settings, and of each training where options have none.
        on_trial: called with each trial when it is done.

    Raises:
        MissingExtra: Optuna is not installed.
        ValueError, TypeError: what cannot be, before any trial; a folder with a search of another question.
        RuntimeError: another search is running in the folder.
        KeyboardInterrupt: after Ctrl-C; the study is saved.

    Source: Bergstra and Bengio, "Random Search for Hyper-Parameter Optimization", 2012; Bergstra et al., 2011 (TPE).
    """
    for name, given in (("space", space), ("fit", fit)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"[search] {name} must be a dict, got {given!r}")
    made = resolve(target, arguments=arguments, options=options, settings=settings)
    _check(method, trials, metric, mode, pruning, timeout, budget, seed)
    with importing(made.folders):
        ranges = default_space(made) if space is None else dict(space)
        length = checked(made, ranges, dict(fit or {}), method)
    question = {
        "target": made.function, "arguments": made.arguments, "options": made.options, "settings": made.loader,
        "fit": length, "metric": metric, "seed": seed,
    }  # fmt: skip
    place = Path(folder).absolute()
    with held(place):
        study = Study(place, ranges, method, mode, question, seed)
        report = SearchReport(metric, mode, method, place, [], ranges, made, length, seed)
        end = math.inf if budget is None else monotonic() + budget
        while len(study.ended()) < trials and monotonic() < end:
            asked = study.next()
            if asked is None:
                break
            done = _run(study, *asked, report, timeout=timeout, pruning=pruning)
            if on_trial is not None:
                on_trial(done)
            if _in_vain([_result(study, each) for each in study.ended()]):
                break
        report.trials = [_result(study, each) for each in study.all()]
    return report


def _run(
    study: Study, trial: Any, settings: dict[str, Any], report: SearchReport, *, timeout: float, pruning: bool
) -> SearchTrial:
    """Train with the settings, and tell the study how that ended."""
    run_dir = report.folder / "trials" / f"{trial.number:04d}"
    tables = merged(report.target, report.fit, settings, report.seed)
    ours = {**OF_A_TRIAL, **({"monitor": report.metric, "mode": report.mode} if report.metric[:4] == "val/" else {})}
    tables["loop"] = {**ours, **tables["loop"]}
    told = 0

    def listen(values: dict[str, Any], peak: int | None) -> None:
        nonlocal told
        del peak
        if VALUE not in values:  # a note of the target's own
            return
        told += 1
        value = float(values[VALUE])
        if not math.isfinite(value):
            raise Ended(FAILED, f"{report.metric} is {value} at evaluation {told}")
        trial.report(value, told - 1)  # Optuna counts from 0
        if pruning and trial.should_prune():
            raise Ended(PRUNED, f"{report.metric} is worse than the median of evaluation {told}")

    start = monotonic()
    value: float | None = None
    try:
        outcome = trials_of.run(
            FUNCTION, {"tables": tables, "run_dir": str(run_dir), "metric": report.metric}, timeout=timeout,
            memory_limit=trials_of.memory_limit(), folders=report.target.folders, on_note=listen, renew=False,
        )  # fmt: skip
        status, reason = outcome.status, outcome.reason
        if status == OK:
            value = _value(outcome.result["values"], report)
            if not math.isfinite(value):
                status, reason, value = FAILED, f"{report.metric} is {value}", None
        else:
            _keep(run_dir, outcome)
    except Ended as ended:
        status, reason = ended.status, ended.reason
    except BaseException:  # Ctrl-C: the trial is repeated
        study.interrupt(trial)
        raise
    study.tell(trial, status, reason, monotonic() - start, value)
    return next(_result(study, each) for each in study.all() if each.number == trial.number)


def _in_vain(done: list[SearchTrial]) -> bool:
    """Whether the first trials have all raised the same: a mistake that no setting mends."""
    reasons = {trial.reason if trial.status == FAILED and not trial.values else None for trial in done}
    return len(done) == IN_VAIN and len(reasons) == 1 and None not in reasons


def _value(values: list[float], report: SearchReport) -> float:
    if not report.metric.startswith("val/"):
        return values[-1]
    return min(values) if report.mode == "min" else max(values)


def _keep(run_dir: Path, outcome: Any) -> None:
    """What a failed trial has left, for whoever looks for the cause."""
    run_dir.mkdir(parents=True, exist_ok=True)
    parts = [outcome.reason, outcome.traceback, outcome.output]
    (run_dir / "failure.txt").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _result(study: Study, each: Any) -> SearchTrial:
    said = each.user_attrs
    told = each.intermediate_values
    return SearchTrial(
        number=each.number,
        settings=study.settings(each),
        value=each.value if said["status"] == OK else None,
        status=said["status"],
        reason=said["reason"],
        seconds=said.get("seconds", 0.0),
        values=tuple(told[at] for at in sorted(told)),
    )


def _check(
    method: str, trials: int, metric: str, mode: str, pruning: bool, timeout: float, budget: float | None, seed: int
) -> None:
    if method not in METHODS:
        raise ValueError(f"[search] method must be one of {', '.join(METHODS)}, got {method!r}")
    if mode not in ("min", "max"):
        raise ValueError(f'[search] mode must be "min" or "max", got {mode!r}')
    if not isinstance(metric, str) or not metric:
        raise ValueError(f"[search] metric must name a metric of the log, e.g. 'val/loss', got {metric!r}")
    if not isinstance(pruning, bool):
        raise TypeError(f"[search] pruning must be True or False, got {pruning!r}")
    for name, number, least in (("trials", trials, 1), ("seed", seed, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"[search] {name} must be an integer of at least {least}, got {number!r}")
    for name, seconds in (("timeout", timeout), ("budget", budget)):
        if isinstance(seconds, bool) or not ((seconds is None and name == "budget") or _above_zero(seconds)):
            raise ValueError(f"[search] {name} must be a finite number of seconds above 0, got {seconds!r}")


def _above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf
