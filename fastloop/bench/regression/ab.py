# SPDX-License-Identifier: Apache-2.0
"""Two builds in turn: pairs of samples from two processes, in rounds, and a verdict on each case.

Each round starts a fresh process for either build and takes 5 pairs of every case that is not decided yet, in the
order A B B A A ...: only one of the two works at a time. Why rounds: where a process finds its memory moves a case by
some per cent for as long as it lives, and no number of pairs in it shows that (bench: performance notes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from fastloop.bench import measure, stats
from fastloop.bench.regression.builds import Build
from fastloop.bench.regression.process import Process, WorkerError
from fastloop.bench.regression.record import Change
from fastloop.bench.stats import Interval, Verdict

ROUND_PAIRS = 5
FEWEST_ROUNDS = 2
TRIES = 2  # a void run is tried once more
SECONDS = 300.0

Progress = Callable[[str, int], None]


class NoCases(Exception):
    """A file of cases that neither build can load, or a pattern that none of its cases matches."""


@dataclass(frozen=True)
class CaseFile:
    """Cases to load in both builds: head's file, under the module name that it has there."""

    file: Path
    module: str


CONTROL = CaseFile(Path(__file__).resolve().parent / "control.py", "_control")  # beside a project's own


@dataclass
class Sides:
    """Both builds, and head's file of cases; `checkout` is the folder that no module may come from."""

    base: Build
    head: Build
    cases: CaseFile
    checkout: Path


@dataclass
class Taken:
    """What was measured of one case so far, in seconds per call by round."""

    title: str = ""
    control: bool = False
    rounds: list[list[float]] = field(default_factory=list)
    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    error: str = ""
    wrong: bool = False

    def interval(self) -> Interval:
        """Of head's time over base's."""
        return stats.rounds_interval(self.rounds)

    @property
    def decided(self) -> bool:
        """Whether more rounds could not change the verdict."""
        if self.error:
            return True
        if not self.rounds:  # another case ended the processes before it was this one's turn
            return False
        if self.control:  # it runs along; only one that seems to have moved asks for rounds of its own
            return not stats.control_moved(self.interval())
        return stats.decided(self.interval())


@dataclass(frozen=True)
class Remote:
    """A case in a worker, as something that `measure_pairs` can time."""

    process: Process
    case: str


def _sample(remote: Remote, repetitions: int) -> float:
    return float(remote.process.ask("sample", case=remote.case, repetitions=repetitions)["seconds"])


@contextmanager
def _both(sides: Sides, first: int) -> Iterator[tuple[Process, Process, dict[str, Taken]]]:
    """A worker for each build, and the cases that both have; a case that only one has carries an error."""
    with ExitStack() as stack:
        builds = (sides.base, sides.head)
        started = {side: stack.enter_context(Process(builds[side].path)) for side in (first, 1 - first)}
        pair = (started[0], started[1])
        cases: dict[str, Taken] = {}
        for each in (sides.cases, CONTROL):
            answers = _loaded(pair, each, sides)
            for name, answer in zip(("base", "head"), answers, strict=True):
                if "error" in answer and not (name == "base" and "error" not in answers[1]):
                    raise NoCases(f"[bench ab] {each.module} cannot be loaded in {name}: {answer['error']}")
            for found in answers[1]["cases"]:
                error = f"cannot be loaded in base: {answers[0]['error']}" if "error" in answers[0] else ""
                cases[found["name"]] = Taken(found["title"], found["control"], error=error)
        yield pair[0], pair[1], cases


def _loaded(pair: tuple[Process, Process], file: CaseFile, sides: Sides) -> list[dict[str, Any]]:
    """The cases of a file in both processes, which import it at the same time; an answer may be an error."""
    answers = []
    for process in pair:
        with suppress(WorkerError):  # said again when its answer is asked for
            process.send("load", file=str(file.file), module=file.module, outside=str(sides.checkout))
    for process in pair:
        try:
            answers.append(process.receive())
        except WorkerError as error:
            answers.append({"error": str(error)})
    return answers


def _prepared(processes: tuple[Process, Process], name: str, known: Taken) -> bool:
    """Set the case up on both sides, and check it in its first round; what fails is written into `known`."""
    for process in processes:  # both at the same time
        process.send("prepare", case=name, check=not known.rounds)
    base, head = [process.receive() for process in processes]
    if "error" in head:  # base's does not excuse it: what works nowhere is not worth a merge either
        known.error, known.wrong = f"head: {head['error']}", True
    elif "error" in base:
        known.error = f"base: {base['error']}"
    return not known.error


def _take(processes: tuple[Process, Process], name: str, known: Taken, first: int) -> None:
    """One round's pairs of a case; base goes first for `first` 0, head for 1."""
    if not _prepared(processes, name, known):
        return
    remotes = [Remote(process, name) for process in processes]
    pairs = measure.measure_pairs(remotes[first], remotes[1 - first], pairs=(ROUND_PAIRS,), sampler=_sample)
    base, head = (pairs.a, pairs.b) if first == 0 else (pairs.b, pairs.a)
    known.rounds.append([after / before for before, after in zip(base, head, strict=True)])
    known.base += base
    known.head += head
    for process in processes:
        process.ask("drop", case=name)


class Comparison:
    """Rounds of measurements, as many as are asked for.

    Args:
        sides: what to compare.
        wanted: whether a case of this name is to be measured; controls always are.
        tell: progress.
    """

    def __init__(self, sides: Sides, wanted: Callable[[str], bool], tell: Progress) -> None:
        self._sides, self._wanted, self._tell = sides, wanted, tell
        self.rounds = 0
        self.taken: dict[str, Taken] = {}

    def round(self, only: Collection[str] | None = None) -> None:
        """A fresh process for either build, and 5 pairs of every case, or of those named."""
        first = self.rounds % 2
        self.rounds += 1
        with _both(self._sides, first) as (base, head, cases):
            for name, fresh in cases.items():
                if fresh.control or self._wanted(name):
                    self.taken.setdefault(name, fresh)
            if all(known.control for known in self.taken.values()):
                raise NoCases(f"[bench ab] no case matches; there are {', '.join(cases)}")
            for name, known in self.taken.items():
                if known.error or (only is not None and name not in only):
                    continue
                try:
                    _take((base, head), name, known, first)
                except WorkerError as error:  # the others go on in the next round's processes
                    known.error, known.wrong = str(error), base.alive
                    return
                self._tell(known.title or name, sum(map(len, known.rounds)))

    def until_decided(self, pairs: Sequence[int], deadline: float) -> None:
        """Rounds up to the first count of pairs; of the undecided ones, up to the next, until the deadline."""
        only: set[str] | None = None
        for limit in pairs:
            while self.rounds < math.ceil(limit / ROUND_PAIRS):
                if self.rounds >= FEWEST_ROUNDS and perf_counter() > deadline:
                    return
                self.round(only)
            only = {name for name, known in self.taken.items() if not known.decided}
            if not only or self.surely_void:
                return
            only |= {name for name, known in self.taken.items() if known.control}

    def _controls(self) -> list[Interval]:
        return [known.interval() for known in self.taken.values() if known.control and known.rounds]

    @property
    def void(self) -> bool:
        """Whether a control moved."""
        return any(map(stats.control_moved, self._controls()))

    @property
    def surely_void(self) -> bool:
        """Whether a control moved and more rounds would not bring it back."""
        moved = stats.CONTROL_MOVED
        return any(found.low > 1 + moved or found.high < 1 - moved for found in self._controls())


def _judged(name: str, known: Taken, void: bool, rerun: Taken | None) -> Change:
    change = Change(name, known.title, known.control, rounds=known.rounds)
    change.base_seconds, change.head_seconds = known.base, known.head
    if known.error or not known.rounds:
        change.note, change.wrong = known.error or "not measured: the processes ended before its turn", known.wrong
        return change
    change.interval = known.interval()
    if known.control:
        change.verdict = Verdict.VOID if void else Verdict.PASS
    elif void:
        change.verdict, change.note = Verdict.VOID, "the control moved by more than 2 %"
    else:
        if rerun is not None and rerun.rounds:
            change.rerun, change.rerun_rounds = rerun.interval(), rerun.rounds
        enough = change.rerun is not None and len(change.rerun_rounds) * ROUND_PAIRS >= stats.RERUN_PAIRS
        change.verdict = stats.verdict(change.interval, change.rerun if enough else None)
        if not enough and _looks_changed(known):
            change.note = "looks changed, and was not measured again with as many pairs as that takes"
    return change


def _looks_changed(known: Taken) -> bool:
    found = known.interval()
    return stats.looks_slower(found) or stats.looks_faster(found)


def compare(
    sides: Sides,
    tell: Progress,
    *,
    pairs: Sequence[int] = stats.PAIRS,
    wanted: Callable[[str], bool] = lambda name: True,
    rerun: bool = True,
    seconds: float = SECONDS,
) -> list[Change]:
    """Measure every case of both builds and judge it; what looks changed is measured once more, in new processes.

    Args:
        pairs: counts after which to stop for a case that is decided.
        wanted: which cases, by name.
        rerun: False leaves what looks changed INCONCLUSIVE.
        seconds: after which no round starts, but for the first two; reruns may take as long again.

    Raises:
        NoCases: nothing to measure.
    """
    start = perf_counter()
    for _ in range(TRIES):
        first = Comparison(sides, wanted, tell)
        first.until_decided(pairs, start + seconds)
        if not first.void or perf_counter() > start + seconds:
            break
    again: dict[str, Taken] = {}
    doubtful = {
        name
        for name, known in first.taken.items()
        if rerun and not first.void and not known.control and known.rounds and not known.error and _looks_changed(known)
    }
    if doubtful:
        second = Comparison(sides, doubtful.__contains__, tell)
        second.until_decided((stats.RERUN_PAIRS, 2 * stats.RERUN_PAIRS), perf_counter() + seconds)
        again = second.taken
    return [_judged(name, known, first.void, again.get(name)) for name, known in first.taken.items()]
