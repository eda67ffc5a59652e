# SPDX-License-Identifier: Apache-2.0
"""The learning-rate range test of a target, in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastloop.tune import child, trial
from fastloop.tune.lr_plot import check
from fastloop.tune.lr_range import LRRange, check_range, sweep
from fastloop.tune.report import Report
from fastloop.tune.session import OnTrial, Session, broken
from fastloop.tune.step import do_not_fork_after_cuda, training

LEFT_OUT = ("schedule", "nonfinite", "cuda_graph")  # the test sets rates, goes beyond, and is too short to be captured


def lr(
    target: Any = None,
    *,
    budget: float = 120.0,
    timeout: float = 60.0,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    plot: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
    fresh: bool = False,
    on_trial: OnTrial | None = None,
) -> Report:
    """Suggest a learning rate for the target: `lr_range_test` with it, in a fresh process.

    The curve, and what was read off it, are in `report.best.extra`, with the names of `LRRange`. A rate is no option
    of Loop: the report says it in its findings and recommends no change of options.

    Args:
        target: "package.module:function", a function that can be imported, None for the ready one.
        budget, timeout: seconds; the test is one trial and ends after the shorter of the two.
        arguments, options, settings: of the target, of Loop, and of the loader: the present ones. A schedule among the
            options is left out: the test sets the rate itself.
        low, high, steps: see `lr_range_test`.
        plot: an image file to draw the curve into.
        memory_limit: bytes of host memory of the trial's processes together; None: 80 % of what is available.
        fresh: measure even where a valid answer of an earlier run is there.
        on_trial: called with the trial when it is done.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
        MissingExtra: `plot` without matplotlib.
        TargetError: the target does not work.
    """
    check_range(low, high, steps)
    if plot is not None:
        check(plot)
    session = Session(
        "lr", target, budget=budget, timeout=min(timeout, budget), arguments=arguments, options=options,
        settings=settings, memory_limit=memory_limit, fresh=fresh, on_trial=on_trial,
        question={"low": low, "high": high, "steps": steps},
    )  # fmt: skip
    report = session.cached or _tested(session, {"low": low, "high": high, "steps": steps})
    if plot is not None:
        found = curve(report)
        if found is None or not found.losses:
            report.findings.append(f"No plot: there are no losses for {os.fspath(plot)}.")
        else:
            found.plot(plot)
    return report


def curve(report: Report) -> LRRange | None:
    """What the range test of a report saw; None where it was not done."""
    made = report.present
    return LRRange(**made.extra["range"]) if made is not None and "range" in made.extra else None


def _tested(session: Session, asked: Mapping[str, Any]) -> Report:
    report = session.report
    made, outcome = session.try_out(asked, "fastloop.tune.lr:in_trial", asked, add=False)
    done = outcome.notes.get("steps", 0)
    if made.status != trial.OK and not done:
        session.done(made)
        raise broken(session.target.function, outcome)
    report.present = report.best = made
    if made.status == trial.OK:
        made.extra["range"] = outcome.result
        _say(report, LRRange(**outcome.result))
    else:
        session.conclusive = False
        made.reason += f"; {done} of {asked['steps']} steps were done"
        report.findings.append(f"No suggestion: {made.status}: {made.reason}.")
    session.done(made)
    return session.finish()


def _say(report: Report, found: LRRange) -> None:
    findings = report.findings
    if "schedule" in report.options:
        findings.append("The schedule was left out: the test sets the rate itself.")
    if found.suggestion is None:
        findings.append(f"{found.note[:1].upper()}{found.note[1:]}.")
        return
    findings.append(f"Learning rate {found.suggestion:.2g}: {found.note}.")
    findings.append(
        f"The loss fell fastest at {found.steepest:.2g}; a tenth of the rate at the lowest loss is "
        f"{found.tenth_of_minimum:.2g}; "
        + ("it did not diverge." if found.diverged_at is None else f"it diverged at {found.diverged_at:.2g}.")
    )
    findings.append(
        "It is the rate of the optimizer's first group, for the present batch size and options: a peak rate with "
        "warm-up, to be checked by a training."
    )


def in_trial(spec: Mapping[str, Any], low: float, high: float, steps: int) -> dict[str, Any]:
    """The range test, in the process of the trial."""
    options = {name: value for name, value in spec["options"].items() if name not in LEFT_OUT}
    made = training({**spec, "options": options})
    do_not_fork_after_cuda(made.train_loader)
    found = sweep(made.loop, made.train_loader, low, high, steps, lambda i, rate, loss: child.note(steps=i + 1))
    return asdict(found)
