# SPDX-License-Identifier: Apache-2.0
"""All tuners in turn, each with a share of the budget; what one recommends is the present setting of the next.

Only what leaves the training as it is gets recommended: how data are loaded, a split of the same effective batch, and
options whose numeric error is that of rounding. The learning rate and the remedies for memory are reported. At the end
all changes together are timed against the present settings, in turn: without a gain there, none of them is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fastloop.bench.stats import median_interval
from fastloop.tune import trial
from fastloop.tune.batch import batch
from fastloop.tune.flags import flags
from fastloop.tune.loader import loader, won
from fastloop.tune.lr import lr
from fastloop.tune.memory import memory
from fastloop.tune.report import Report, Trial
from fastloop.tune.session import OnTrial, Session
from fastloop.tune.target import TargetError

# Of what is left when its turn comes. The rest is for the run of all changes together.
SHARES: dict[str, tuple[Callable[..., Report], float]] = {
    "loader": (loader, 0.2),
    "batch": (batch, 0.25),
    "flags": (flags, 0.4),
    "memory": (memory, 0.3),
    "lr": (lr, 0.5),
}
CHANGES = ("loader", "batch", "flags")  # whose recommendation is taken over
RESERVED = 0.1  # of the budget: the last trial of a tuner begins before its share ends, and ends after it
LEAST_SECONDS = 8.0


def everything(
    target: Any = None,
    *,
    budget: float = 180.0,
    timeout: float = 60.0,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    memory_limit: int | None = None,
    fresh: bool = False,
    on_trial: OnTrial | None = None,
) -> Report:
    """Loader, batch, flags, memory and learning rate, and one answer.

    Args:
        target: "package.module:function", a function that can be imported, None for the ready one.
        budget: seconds for all of it. `timeout`: for one trial.
        arguments, options, settings: of the target, of Loop, and of the loader: the present ones.
        memory_limit: bytes of host memory of a trial's processes together; None: 80 % of what is available.
        fresh: measure even where a valid answer of an earlier run is there.
        on_trial: called with each trial when it is done.

    Raises:
        TargetError: the target does not work with its present settings.
        TypeError, ValueError: an argument out of range or of the wrong type.
    """
    session = Session(
        "all", target, budget=budget, timeout=timeout, arguments=arguments, options=options, settings=settings,
        memory_limit=memory_limit, fresh=fresh, on_trial=on_trial,
    )  # fmt: skip
    return session.cached or _All(session, fresh).run()


class _All:
    """The tuners' answers so far: options and loader settings that are to change."""

    def __init__(self, session: Session, fresh: bool) -> None:
        self.session, self.report, self.fresh = session, session.report, fresh
        self.options: dict[str, Any] = {}
        self.loader: dict[str, Any] = {}
        self.of_loader: Report | None = None  # the loader tuner's answer, where it is a change

    def run(self) -> Report:
        """Every tuner, then all changes together."""
        for name, (tuner, share) in SHARES.items():
            self._take(name, tuner, share)
        self._compare()
        return self.session.finish()

    def _left(self) -> float:
        return self.session.left() - RESERVED * self.session.budget

    def _take(self, name: str, tuner: Callable[..., Report], share: float) -> None:
        budget = share * self._left()
        if budget < min(LEAST_SECONDS, share * self.session.budget / 4):
            self.report.findings.append(f"{name}: skipped, the budget is spent.")
            return

        def on_trial(made: Trial) -> None:
            made.extra["tuner"] = name
            self.session.done(made)

        try:
            found = tuner(
                self.session.target.present(self.options, self.loader),
                budget=budget,
                timeout=max(min(self.session.timeout, self._left()), 1.0),
                memory_limit=self.session.memory_limit,
                fresh=self.fresh,
                on_trial=on_trial,
            )
        except TargetError as error:
            if name == "loader":
                raise
            self.report.findings.append(f"{name}: {error}")
            self.session.conclusive = False
            return
        if found.cached:
            for made in found.trials:
                on_trial(made)
        if name == "loader":
            self.report.present = found.present
        self.report.findings += [f"{name}: {text}" for text in found.findings]
        if name in CHANGES and not found.keep:
            self.options |= found.loop
            self.loader |= found.loader
            if name == "loader":
                self.of_loader = found
            self.report.findings.append(f"{name}: {found.summary()}")

    def _compare(self) -> None:
        report, session = self.report, self.session
        report.best = report.present
        if not self.options and not self.loader:
            return
        outcome = self._paired("fastloop.tune.together:two", {"options": self.options, "loader": self.loader})
        no_room = outcome.status == trial.OUT_OF_MEMORY
        if no_room and not self.options:
            outcome = self._paired("fastloop.tune.loading:two", self.loader)  # one loop is enough for them
        made = Trial.of({**self.options, **self.loader}, outcome)
        made.extra["tuner"] = "all together"
        if outcome.status == trial.OK:
            report.gain = median_interval(outcome.result["ratios"])
            if "after" in outcome.result:
                made.rate = median_interval(outcome.result["after"])
            if "before" in outcome.result and report.present is not None:
                before = replace(report.present, rate=median_interval(outcome.result["before"]))
                before.extra = {"tuner": "all together"}
                session.done(before)
                report.present = report.best = before
        session.done(made)
        if report.gain is None and no_room and self.options and self.of_loader is not None:
            self._take_loader(self.of_loader)
        elif report.gain is None:
            report.findings.append(f"The run of all changes together failed ({made.reason}): keep yours.")
            session.conclusive = False
        elif won(report.gain):
            report.best, report.keep = made, False
            report.loop, report.loader = self.options, self.loader
        else:
            report.findings.append(
                f"All changes together have {report.gain.median:.3f} times the samples/s of the present settings (98 % "
                f"interval {report.gain.low:.3f} to {report.gain.high:.3f}): keep yours."
            )

    def _paired(self, function: str, after: Mapping[str, Any]) -> trial.Outcome:
        """The changes against the present settings, in turn, well within the time that a trial has."""
        session, left = self.session, self.session.left()
        limit = max(min(session.timeout, left), 10.0)
        seconds = max(min(0.6 * left - LEAST_SECONDS, 0.5 * limit), 2.0)
        return trial.run(
            function,
            {"spec": session.target.spec(), "before": {}, "after": after, "seconds": seconds},
            timeout=limit,
            memory_limit=session.memory_limit,
            folders=session.target.folders,
        )

    def _take_loader(self, found: Report) -> None:
        """Memory does not hold two trainings: of the changes those of the loader, which one training has timed."""
        report = self.report
        report.best, report.gain, report.keep, report.loader = found.best, found.gain, False, dict(found.loader)
        report.findings.append(
            "Memory does not hold the training twice, so that all changes together could not be timed: only the "
            "loader's are taken, with the gain of their own paired run."
        )
