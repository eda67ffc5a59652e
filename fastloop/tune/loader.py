# SPDX-License-Identifier: Apache-2.0
"""How data are loaded fastest: first whether loading limits the training at all, then a search by successive halving.

All settings are tried for a short time, in an order drawn from a fixed seed; the faster half again for twice as long,
until two are left. Among those within 2 % of the best the smallest is taken: fewest workers, then the shortest queue.
It replaces the present setting only if a paired run of both says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fastloop import machine
from fastloop.bench.stats import Interval, median_interval
from fastloop.loop.loader import with_settings
from fastloop.tune import loading, trial
from fastloop.tune.report import Report, Trial, fastest
from fastloop.tune.session import OnTrial, Session
from fastloop.tune.step import SEED, settings_of
from fastloop.tune.watch import OnNote

NEAR = 0.02  # of the best rate: as good as it
NOT_LIMITING = 0.02  # share of the time, or of the rate: less than this cannot be won
PREFETCH = (2, 4)
SECONDS = 1.0  # of a first measurement, with the budget of two minutes
_ORDER = ("num_workers", "prefetch_factor", "pin_memory", "persistent_workers")

Settings = dict[str, Any]
Try = Callable[[list[Settings], float, float, OnNote], trial.Outcome]  # for so many seconds each, until, notes
Pair = Callable[[Settings, float], trial.Outcome]  # this setting against the present one


def loader(
    target: Any = None,
    *,
    budget: float = 120.0,
    timeout: float = 60.0,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    memory_limit: int | None = None,
    fresh: bool = False,
    on_trial: OnTrial | None = None,
) -> Report:
    """Find the loader settings with the highest samples/s of the training, and of those the smallest.

    Args:
        target: "package.module:function", a function that can be imported, None for the ready one; or a Dataset or
            DataLoader: then there is no training, and the loader alone is timed, in forks of this process.
        budget: seconds for all trials; none starts when it is spent. `timeout`: for one.
        arguments, options, settings: of the target, of Loop, and of the loader: the present ones.
        memory_limit: bytes of host memory of a trial's processes together; None: 80 % of what is available.
        fresh: measure even where a valid answer of an earlier run is there.
        on_trial: called with each trial when it is done.

    Raises:
        TargetError: the target cannot be imported, or fails with its present settings.
        TypeError, ValueError: an argument out of range or of the wrong type.
    """
    common: dict[str, Any] = {
        "budget": budget, "timeout": timeout, "memory_limit": memory_limit, "fresh": fresh, "on_trial": on_trial,
    }  # fmt: skip
    if isinstance(target, (DataLoader, Dataset)):
        if arguments or options:
            raise ValueError("[tune] arguments and options are of a target; a DataLoader or Dataset has none")
        given = with_settings(target, settings or {})
        name = f"a {type(target).__name__} of {type(given.dataset).__name__}"
        session = Session("loader", None, settings=settings, name=name, **common)
        return _of_objects(session, given)
    session = Session("loader", target, arguments=arguments, options=options, settings=settings, **common)
    if session.cached is not None:
        return session.cached
    return _of_target(session)


def _of_target(session: Session) -> Report:
    """The bottleneck first; the search where it is the loader."""
    report, seconds = session.report, _seconds(session)
    before, outcome = session.try_out(
        {}, "fastloop.tune.loading:bottleneck", {"seconds": seconds}, must_work=True, add=False
    )
    found = outcome.result
    before.settings = {name: value for name, value in found["settings"].items() if name in _ORDER}
    _fill(before, found["both"])
    parts = {name: median_interval(found[name]["rates"]) for name in ("alone", "cached", "both")}
    before.extra |= {"alone": parts["alone"].median, "cached": parts["cached"].median}
    report.present = report.best = before
    session.done(before)
    waiting = found["both"]["wait_share"] or 0.0
    report.findings.append(
        f"The loader alone gives {parts['alone'].median:,.0f} samples/s, steps on a cached batch take "
        f"{parts['cached'].median:,.0f}, both together {parts['both'].median:,.0f}; "
        f"{100 * waiting:.1f} % of the time is spent waiting for data."
    )
    lost = waiting + found["both"]["startup_share"]
    if lost < NOT_LIMITING or parts["both"].median > (1 - NOT_LIMITING) * parts["cached"].median:
        report.findings.append("The loader is not the bottleneck: keep its settings.")
        return session.finish()
    if not found["settings"]:
        report.findings.append(f"The target's train_loader is a {found['kind']}: only a DataLoader has settings.")
        return session.finish()

    def attempt(settings: list[Settings], seconds: float, until: float, on_note: OnNote) -> trial.Outcome:
        asked = {"settings": settings, "seconds": seconds, "until": until}
        return session.call("fastloop.tune.loading:several", asked, on_note=on_note)

    def pair(settings: Settings, seconds: float) -> trial.Outcome:
        asked = {"before": before.settings, "after": settings, "seconds": seconds}
        return session.call("fastloop.tune.loading:two", asked)

    return _Search(session, before.settings, attempt, pair, before, found["cuda"]).run()


def _of_objects(session: Session, given: DataLoader[Any]) -> Report:
    present = {name: value for name, value in settings_of(given).items() if name in _ORDER}
    wait = session.timeout if torch.cuda.is_initialized() else None
    if wait is not None:
        session.report.findings.append(
            "CUDA runs in this process, which therefore cannot fork: trials run in it, where timeout holds for each "
            "batch of workers alone, and memory_limit does not hold."
        )

    def attempt(settings: list[Settings], seconds: float, until: float, on_note: OnNote) -> trial.Outcome:
        return session.call_here(lambda: loading.several_alone(given, settings, seconds, until, wait), on_note)

    def pair(settings: Settings, seconds: float) -> trial.Outcome:
        return session.call_here(lambda: loading.two_alone(given, present, settings, seconds, wait))

    return _Search(session, present, attempt, pair).run()


class _Search:
    """Successive halving over settings.

    Args:
        present: the present settings.
        attempt, pair: time one setting; time it against the present ones.
        before: the trial of the present settings, if it is made already.
        cuda: batches go to a GPU, so that pinning them can pay.
    """

    def __init__(
        self,
        session: Session,
        present: Settings,
        attempt: Try,
        pair: Pair,
        before: Trial | None = None,
        cuda: bool | None = None,
    ) -> None:
        self.session, self.report = session, session.report
        self.attempt, self.pair = attempt, pair
        self.present, self.before = present, before
        self.cuda = torch.cuda.is_available() if cuda is None else cuda

    def run(self) -> Report:
        """Search, then compare what was found with the present settings."""
        if self.before is None:
            self.before = self._tried([self.present], _seconds(self.session), self.session.left(), must_work=True)[0]
            self.report.present = self.report.best = self.before
        found = self._halved()
        best = smallest_near_best(found.values())
        self.report.best = best
        if best is None or best.settings == self.present:
            self.report.best = self.before
            self.report.findings.append("No other setting was faster than the present one by more than 2 %.")
        else:
            self._compare(best)
        self._note_startup()
        return self.session.finish()

    def _halved(self) -> dict[str, Trial]:
        """The last trial of each setting."""
        seconds = _seconds(self.session)
        left = candidates(self.present, machine.usable_cpus(), self.cuda)
        last: dict[str, Trial] = {}
        for_pair = 0.3 * self.session.left()
        while True:
            for made in self._tried(left, seconds, self.session.left() - for_pair):
                last[str(made.settings)] = made
            ended = [last[str(settings)] for settings in left if str(settings) in last]
            alive = sorted((each for each in ended if each.rate is not None), key=_rate, reverse=True)
            if len(alive) <= 2 or self.session.left() <= for_pair:
                return last
            left = [each.settings for each in alive[: max(2, (len(alive) + 1) // 2)]]
            seconds *= 2

    def _tried(self, settings: list[Settings], seconds: float, budget: float, must_work: bool = False) -> list[Trial]:
        """One process for all of them; where one ends it, another process for the rest. None starts after `budget`."""
        left, found = list(settings), []
        until = monotonic() + budget

        def on_note(note: dict[str, Any], peak: int | None) -> None:
            if "begun" not in note:
                found.append(self._noted(left.pop(0), note, peak, must_work))

        while left and monotonic() < until:
            outcome = self.attempt(left, seconds, until, on_note)
            if outcome.status != trial.OK and left:  # the last one's note may have come before the end
                found.append(self.session.record(left.pop(0), outcome, must_work=must_work))
        for each in left:
            self.session.skip(each, "the budget is spent")
        return found

    def _noted(self, settings: Settings, note: dict[str, Any], peak: int | None, must_work: bool) -> Trial:
        outcome = trial.Outcome(trial.OK, note.get("found"), seconds=note["seconds"], peak_bytes=peak)
        if "failure" in note:
            failure = note["failure"]
            outcome.status = trial.OUT_OF_MEMORY if failure["out_of_memory"] else trial.FAILED
            outcome.reason, outcome.traceback = failure["reason"], failure["traceback"]
        made = self.session.record(settings, outcome, must_work=must_work, add=False)
        if outcome.status == trial.OK:
            _fill(made, outcome.result)
        self.session.done(made)
        return made

    def _compare(self, best: Trial) -> None:
        """Both in turn in one process: only that says what is won."""
        report, findings = self.report, self.report.findings
        outcome = self.pair(best.settings, self._seconds_of_pairs())
        if outcome.status != trial.OK:
            self.session.conclusive = False
            findings.append(f"The paired run against the present settings failed ({outcome.reason}): keep yours.")
            report.best = self.before
            return
        report.gain = median_interval(outcome.result["ratios"])
        if won(report.gain):
            report.keep = False
            report.loader = changed(self.present, best.settings)
            return
        findings.append(
            f"In a paired run {best.settings} had {report.gain.median:.3f} times the samples/s of the present settings "
            f"(98 % interval {report.gain.low:.3f} to {report.gain.high:.3f}): keep yours."
        )
        report.best = self.before

    def _seconds_of_pairs(self) -> float:
        """Well within the time that a trial has."""
        return min(max(0.2 * self.session.left(), 4 * _seconds(self.session)), 0.5 * self.session.timeout)

    def _note_startup(self) -> None:
        best = self.report.best
        if best is None or best.extra.get("startup_share", 0.0) < NEAR:
            return
        seconds, percent = best.startup_seconds or 0.0, 100 * best.extra["startup_share"]
        self.report.findings.append(
            f"Starting the workers takes {seconds:.2f} s, {percent:.0f} % of an epoch. Loop starts them anew with each "
            "epoch, so that a resumed run sees the same data; in a loop of your own persistent_workers=True saves it."
        )


def candidates(present: Settings, cpus: int, cuda: bool) -> list[Settings]:
    """The settings to try, in an order drawn from a fixed seed; those without a long queue come first."""
    workers = sorted({0, *(2**i for i in range(cpus.bit_length()) if 2**i <= cpus), cpus, present["num_workers"]})
    pins = [bool(present["pin_memory"])] if not cuda else [False, True]
    keep = bool(present.get("persistent_workers"))
    groups: dict[int, list[Settings]] = {}
    for count in workers:
        queues = sorted({*PREFETCH, present.get("prefetch_factor") or PREFETCH[0]}) if count else [None]
        for i, queue in enumerate(queues):
            for pin in pins:
                made = dict(zip(_ORDER, (count, queue, pin, keep and count > 0), strict=True))
                groups.setdefault(i, []).append(made)
    order = random.Random(SEED)
    for group in groups.values():
        order.shuffle(group)
    return [settings for _, group in sorted(groups.items()) for settings in group]


def smallest_near_best(trials: Any) -> Trial | None:
    """Of those within 2 % of the highest rate the one with fewest workers, then the shortest queue."""
    rated = [each for each in trials if each.status == trial.OK and each.rate is not None]
    best = fastest(rated)
    if best is None:
        return None
    near = [each for each in rated if _rate(each) >= (1 - NEAR) * _rate(best)]
    return min(near, key=lambda each: tuple(int(each.settings.get(name) or 0) for name in _ORDER))


def changed(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> Settings:
    """What has to be set to go from one to the other."""
    return {name: value for name, value in wanted.items() if value is not None and present.get(name) != value}


def won(gain: Interval) -> bool:
    """Whether a gain is one: surely above 1, and worth it."""
    return gain.low > 1.0 and gain.median >= loading.WON


def _rate(made: Trial) -> float:
    return 0.0 if made.rate is None else made.rate.median


def _fill(made: Trial, found: Mapping[str, Any]) -> None:
    made.rate = median_interval(found["rates"])
    made.wait_share, made.startup_seconds = found["wait_share"], found["startup_seconds"]
    made.extra["startup_share"] = found["startup_share"]


def _seconds(session: Session) -> float:
    """Of a first measurement: a 120th of the budget, within reason."""
    return min(max(session.budget / 120 * SECONDS, 0.2), 2 * SECONDS)
