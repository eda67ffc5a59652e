# SPDX-License-Identifier: Apache-2.0
"""The batch size with the highest samples/s that fits, and how a wanted effective batch is split.

effective batch = micro-batch * accumulation steps. What is learned depends on it, so that it stays what it is unless
another one is asked for; the size that is fastest without that bound is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastloop.bench.stats import Interval
from fastloop.tune import batch_words as words
from fastloop.tune import trial
from fastloop.tune.report import Report, Trial
from fastloop.tune.session import OnTrial, Session, broken
from fastloop.tune.sizes import SAME_RATE, Search, Tried, divisors

MEASURE = "fastloop.tune.size_trial:measure_size"
COMPARE = "fastloop.tune.size_trial:compare_sizes"
LONGEST_TRIAL = 2.0  # seconds of samples in one trial,
SHARE_OF_TRIAL = 1 / 60  # and of the budget
SHARE_OF_PAIRS = 0.2  # of the budget, for the paired run at the end
SHARE_OF_SPLITS = 0.5  # of the budget that the search among divisors may take before the free one begins
LONGEST_PAIRS = 20.0

Key = tuple[int, int]  # (batch size, accumulation steps)


def batch(
    target: Any = None,
    *,
    budget: float = 120.0,
    timeout: float = 60.0,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    effective_batch: int | None = None,
    margin: float = 0.10,
    largest: int | None = None,
    memory_limit: int | None = None,
    fresh: bool = False,
    on_trial: OnTrial | None = None,
) -> Report:
    """Find the batch size with the highest samples/s whose peak leaves a margin of the memory.

    Each size is tried in a process of its own, with the optimizer's states and the longest batch that was found.

    Args:
        target, budget, timeout, arguments, options, settings, memory_limit, fresh, on_trial: see `Session`.
        effective_batch: samples of one optimizer step; None: as many as now.
        margin: share of the memory that stays free at the peak.
        largest: no batch size above it.

    Raises:
        TypeError, ValueError: an argument out of range or of the wrong type.
        TargetError: the target cannot be imported, or its first trial fails for another reason than memory.
    """
    _whole("effective_batch", effective_batch)
    _whole("largest", largest)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
        raise ValueError(f"[tune] margin must be a share in [0, 1), got {margin!r}; 0.1 leaves 10 % of the memory free")
    session = Session(
        "batch", target, budget=budget, timeout=timeout, arguments=arguments, options=options, settings=settings,
        memory_limit=memory_limit, fresh=fresh, on_trial=on_trial,
        question={"effective_batch": effective_batch, "margin": margin, "largest": largest},
    )  # fmt: skip
    if session.cached is not None:
        return session.cached
    _Sizes(session, budget, margin, largest).answer(effective_batch)
    return session.finish()


def _whole(name: str, value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"[tune] {name} must be an integer above 0, or None, got {value!r}")


class _Sizes:
    """The trials of one target."""

    def __init__(self, session: Session, budget: float, margin: float, largest: int | None) -> None:
        self.session, self.report, self.budget = session, session.report, budget
        self.margin, self.largest = margin, largest
        self.seconds = min(LONGEST_TRIAL, SHARE_OF_TRIAL * budget)
        self.pair_seconds = min(LONGEST_PAIRS, SHARE_OF_PAIRS * budget)
        self.capacity: int | None = None
        self.done: dict[Key, Trial] = {}
        self.samples: int | None = None  # of the dataset
        self.now: Key = (1, 1)

    @property
    def limit(self) -> float | None:
        return None if self.capacity is None else (1 - self.margin) * self.capacity

    # ---- the answer

    def answer(self, effective_batch: int | None) -> None:
        report = self.report
        fixed = self._present()
        if fixed is not None:
            report.best = report.present
            report.findings.append(
                f"No other batch size can be tried, since the loader makes its batches itself: {fixed}"
            )
            return
        size, steps = self.now
        wanted = effective_batch if effective_batch is not None else self._capped(size) * steps
        report.findings += words.caps(size, self.samples, self.largest, effective_batch)
        share = 1.0 if effective_batch is not None else SHARE_OF_SPLITS
        among = Search(self._capped(size), self._cap(), self.limit, divisors(wanted))
        self._explore(among, lambda micro: wanted // micro, share)
        self._recommend(among, wanted, asked=effective_batch is not None and wanted != size * steps)
        free = None
        if effective_batch is None:
            free = Search(self._capped(size), self._cap(), self.limit)
            self._explore(free, lambda _: steps, 1.0)
            self._say_fastest(free, steps)
        report.findings += words.memory_line(among if free is None else free, self.margin, self.capacity)
        self._pair()

    def _present(self) -> str | None:
        """Try what is there now; returns why no other size can be tried, or None."""
        made, outcome = self.session.try_out({}, MEASURE, self._arguments(None, None), add=False)
        notes = outcome.notes
        if outcome.status not in (trial.OK, trial.OUT_OF_MEMORY) or "batch_samples" not in notes:
            self.session.done(made)
            raise broken(self.session.target.function, outcome)
        self.samples = notes["samples"]
        size = notes["batch_size"] or notes["batch_samples"]
        self.now = (size, notes["accumulation_steps"])
        self._take(self.now, made, outcome)
        self.report.present = made
        self.report.findings.append(f"The batch that each trial begins with: {notes['looked']}.")
        return notes["fixed"]  # type: ignore[no-any-return]

    def _explore(self, search: Search, steps_of: Callable[[int], int], share: float) -> None:
        """Try sizes until there is nothing left to find out, or the share of the budget is spent."""
        reserve = self.pair_seconds + (1 - share) * self.budget
        while (size := search.next()) is not None:
            for hopeless, peak in search.hopeless.items():
                self._skip((hopeless, steps_of(hopeless)), peak)
            key = (size, steps_of(size))
            if key not in self.done:
                if self.session.left() <= reserve:
                    self.report.findings.append("The budget was spent before every size that is worth a trial had one.")
                    return
                self._try(key)
            made = self.done[key]
            rate = made.rate.median if made.rate is not None and made.status == trial.OK else None
            search.tell(Tried(size, rate, made.peak_bytes if rate is not None else None))
            search.limit = self.limit
        for hopeless, peak in search.hopeless.items():
            self._skip((hopeless, steps_of(hopeless)), peak)

    def _try(self, key: Key) -> None:
        made, outcome = self.session.try_out(_settings(key), MEASURE, self._arguments(*key), add=False)
        self._take(key, made, outcome)

    def _arguments(self, size: int | None, steps: int | None) -> dict[str, Any]:
        return {
            "batch_size": size, "accumulation_steps": steps, "seconds": self.seconds,
            "memory_limit": self.session.memory_limit,
        }  # fmt: skip

    def _take(self, key: Key, made: Trial, outcome: trial.Outcome) -> None:
        made.settings = _settings(key)
        made.extra = {"effective_batch": key[0] * key[1], "batch": outcome.notes.get("looked")}
        if outcome.status == trial.OK:
            result = outcome.result
            made.rate = Interval(**result["rate"])
            made.extra["windows"] = result["windows"]
            self._take_peak(made, result["peak"])
        self.done[key] = made
        self.session.done(made)

    def _take_peak(self, made: Trial, peak: Mapping[str, Any]) -> None:
        if peak["bytes"] is not None:
            made.peak_bytes = peak["bytes"]
        made.extra |= {"peak": peak["what"], "capacity": peak["capacity"]}
        self.capacity = peak["capacity"]
        if self.limit is not None and made.peak_bytes is not None and made.peak_bytes > self.limit:
            share = made.peak_bytes / peak["capacity"]
            made.reason = f"its peak is {share:.0%} of the memory, above {1 - self.margin:.0%}"

    def _skip(self, key: Key, peak: int) -> None:
        if key not in self.done:
            limit = self.limit or 0.0
            reason = f"would take about {peak / 2**20:,.0f} MiB, and {limit / 2**20:,.0f} are what may be taken"
            self.done[key] = self.session.skip(_settings(key), reason)

    # ---- bounds

    def _cap(self) -> int | None:
        return min((bound for bound in (self.samples, self.largest) if bound is not None), default=None)

    def _capped(self, size: int) -> int:
        cap = self._cap()
        return size if cap is None else max(1, min(size, cap))

    # ---- what is recommended

    def _fits(self, made: Trial) -> bool:
        within = self.limit is None or made.peak_bytes is None or made.peak_bytes <= self.limit
        return made.status == trial.OK and made.rate is not None and within

    def _recommend(self, among: Search, wanted: int, asked: bool) -> None:
        """The best of the divisors; the present split if that is as fast."""
        report, best = self.report, among.best
        present = self.done[self.now]
        if best is None:
            report.best = present
            report.findings.append(
                f"No split of {wanted} samples fits within {1 - self.margin:.0%} of the memory; see "
                "`python -m fastloop.bench tune memory` for what would make it smaller"
            )
            return
        key = (best.size, wanted // best.size)
        allowed = self.now[0] <= (self._cap() or self.now[0])
        if not asked and allowed and self._fits(present) and _as_fast(present, self.done[key]):
            key = self.now
        report.best = self.done[key]
        report.findings += words.divisors_apart(among, wanted)
        report.keep = key == self.now
        if not report.keep:
            report.loader, report.loop = {"batch_size": key[0]}, {"accumulation_steps": key[1]}

    def _say_fastest(self, free: Search, steps: int) -> None:
        best, present = free.best, self.report.present
        if best is None or present is None:
            return
        made = self.done[best.size, steps]
        if (best.size, steps) == self.now or (self._fits(present) and _as_fast(present, made)):
            self.report.findings.append(words.nothing_faster(self.now[0]))
        else:
            self.report.findings.append(words.fastest(made, present))

    # ---- the paired run

    def _pair(self) -> None:
        """The recommendation against the present settings, in turn in one process."""
        report, best, present = self.report, self.report.best, self.report.present
        if report.keep or best is None or present is None:
            return
        if present.status != trial.OK:
            report.findings.append(f"The present settings do not run ({present.status}): there is no gain to measure.")
            return
        key = (best.settings["batch_size"], best.settings["accumulation_steps"])
        asked = key[0] * key[1] != self.now[0] * self.now[1]
        needed = asked or not self._fits(present) or self.now[0] > (self._cap() or self.now[0])
        report.gain = self._gain_over_present(key)
        won = report.gain is not None and report.gain.low > 1.0 and report.gain.median > 1 + SAME_RATE
        if not needed and not won:
            report.best, report.keep, report.loader, report.loop = present, True, {}, {}

    def _gain_over_present(self, key: Key) -> Interval | None:
        """None where the paired run could not be made; a finding says so."""
        findings, left = self.report.findings, self.session.left()
        if left <= 0:
            findings.append("The budget was spent before the paired run: the gain is not known.")
            self.session.conclusive = False
            return None
        seconds = min(self.pair_seconds, left, 0.5 * self.session.timeout)
        made, outcome = self.session.try_out({}, COMPARE, {"a": self.now, "b": key, "seconds": seconds}, add=False)
        if outcome.status != trial.OK:
            findings.append(f"The paired run ended early ({made.reason or made.status}): the gain is not known.")
            self.session.conclusive = False
            return None
        if self.session.target.options.get("cuda_graph"):
            findings.append("The paired run was without cuda_graph on both sides: a loop keeps a graph of one shape.")
        return Interval(**outcome.result["gain"])


def _as_fast(present: Trial, other: Trial) -> bool:
    assert present.rate is not None
    assert other.rate is not None
    return present.rate.median >= (1 - SAME_RATE) * other.rate.median


def _settings(key: Key) -> dict[str, Any]:
    return {"batch_size": key[0], "accumulation_steps": key[1]}


__all__ = ["batch"]
