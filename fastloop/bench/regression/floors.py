# SPDX-License-Identifier: Apache-2.0
"""Ratios within one run against committed floors, and the results of the cases that are too large to be timed here.

A floor is a ratio, never milliseconds. It is set well below what was measured: it catches what broke, `ab` what got
slower.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter

from fastloop.bench import cases, checks, measure, runner, stats, usercases
from fastloop.bench.cases import Case
from fastloop.bench.regression.record import Ratio
from fastloop.bench.runner import Progress
from fastloop.bench.stats import Interval, Verdict
from fastloop.bench.usercases import UserCase

SCHEMA = "fastloop-floors/2"
TRIES = 2  # a void run is tried once more
SECONDS = 60.0  # no check of a large case starts later, however busy the machine
ROW_SECONDS = 10.0
RERUN_SECONDS = 30.0  # a verdict needs all of its pairs
ITSELF = "itself"

# (counts of pairs, the floor that decides when to stop, seconds) -> what was measured, not judged yet
Take = Callable[[Sequence[int], float | None, float], Ratio]


class NoFloors(Exception):
    """There is no file of floors, or it is not one, or it has none for a case that is guarded."""


def load(path: Path) -> dict[str, float]:
    """Read the floors. Raises NoFloors with what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise NoFloors(f"[bench] wanted floors of schema {SCHEMA}, got {document['schema']} in {path}")
        floors = {name: float(floor) for name, floor in document["floors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoFloors(f"[bench] no floors in {path}: {type(error).__name__}: {error}; pass --floors FILE") from error
    bad = [name for name, floor in floors.items() if not 0 < floor < math.inf]
    if bad:
        raise NoFloors(f"[bench] a floor is a ratio above 0, got {floors[bad[0]]} for {bad[0]} in {path}")
    return floors


# ---- judging


def below(floor: float, interval: Interval) -> bool:
    """Whether a ratio is surely below its floor."""
    return interval.high < floor


def judged(take: Take, floor: float | None) -> Ratio:
    """Measure a ratio and, where there is a floor, judge it; what is surely below it is measured again.

    PASS: surely above. REGRESSED: surely below, and the rerun agrees. Otherwise INCONCLUSIVE.
    """
    found = take(stats.PAIRS, floor, ROW_SECONDS)
    if floor is None or found.interval is None:
        return found
    found.floor = floor
    found.verdict = Verdict.PASS if found.interval.low > floor else Verdict.INCONCLUSIVE
    if below(floor, found.interval):
        again = take((stats.RERUN_PAIRS,), floor, RERUN_SECONDS)
        if again.wrong:
            return again
        if again.interval is None or len(again.ratios) < stats.RERUN_PAIRS:
            why = "below the floor, and was not measured again with as many pairs as that takes"
            _add_note(found, f"{why}: {again.note}" if again.note else why)
        elif below(floor, again.interval):
            found.verdict = Verdict.REGRESSED
    return found


def _add_note(row: Ratio, note: str) -> None:
    row.note = f"{row.note}; {note}" if row.note else note


# ---- cases of fastloop: ours against torch's best


def _own(case: Case, tell: Progress) -> Take:
    def take(pairs: Sequence[int], floor: float | None, seconds: float) -> Ratio:
        # Pairs are taken until the interval leaves out the row's goal, which is the floor here.
        goals = {} if floor is None else dict.fromkeys(case.peers, floor)
        headline = Case(**{**vars(case), "extra_peers": (), "goals": goals})
        effort = runner.Effort(tuple(pairs), seconds)
        row = runner.run_case(headline, runner.Plan(effort, effort, every_peer=False, ceilings=False), tell)[0]
        return Ratio(case.name, row.peer, None, row.ratio, None, row.ratios, row.reason, row.status == "wrong")

    return take


def control(tell: Progress, case: Case | None = None) -> Ratio:
    """The same code on both sides: VOID if it differs by more than 2 %; no verdict where it could not run."""
    case = case or cases.CONTROL
    found = _own(case, tell)(stats.PAIRS, None, ROW_SECONDS)
    found.peer, found.case = ITSELF, f"control ({case.ours})"
    if found.interval is None:
        return found
    found.verdict = Verdict.VOID if stats.control_moved(found.interval) else Verdict.PASS
    return found


def _check(case: Case, tell: Progress, deadline: float) -> Ratio:
    """The result of a case that is not timed; skipped where the memory or the time does not hold it."""
    tell(f"{case.title}: check", 0)
    found = Ratio(case.name, "reference", None)
    reason = "no time left" if perf_counter() > deadline else runner.lacking_memory(case)
    if reason is not None:
        found.note = f"result not checked: {reason}"
        return found
    try:
        runner.build_checked(case)
        found.note = "not timed here; its result agrees with the reference"
    except checks.WrongResult as error:
        found.note, found.wrong = str(error), True
    return found


def _with_control(takes: Mapping[str, tuple[Take, float | None]], tell: Progress) -> list[Ratio]:
    found: list[Ratio] = []
    for _ in range(TRIES):
        found = [judged(take, floor) for take, floor in takes.values()]
        if not any(each.ratios for each in found):
            break
        calm = control(tell)
        _heed(calm, found)
        found.append(calm)
        if calm.verdict is not Verdict.VOID:
            break
    return found


def _heed(calm: Ratio, found: Sequence[Ratio]) -> None:
    """Of a run whose control moved nothing is judged; without a control nothing is called slower."""
    for each in found:
        if each.verdict is not None and calm.verdict is Verdict.VOID:
            each.verdict = Verdict.VOID
            _add_note(each, "the control moved by more than 2 %")
        elif each.verdict is Verdict.REGRESSED and calm.verdict is None:
            each.verdict = Verdict.INCONCLUSIVE
            _add_note(each, "below the floor, and no control says that the machine was quiet")


def own(floors: Mapping[str, float], tell: Progress, selection: Sequence[Case] | None = None) -> list[Ratio]:
    """Ratios of the small cases, the control, and the results of the large ones.

    Raises:
        NoFloors: a small case has none.
    """
    selection = cases.CASES if selection is None else selection
    small = [case for case in selection if case.small]
    missing = [case.name for case in small if case.name not in floors]
    if missing:
        raise NoFloors(f"[bench] no floor for {', '.join(missing)}; add one to the file of floors")
    deadline = perf_counter() + SECONDS
    timed = _with_control({case.name: (_own(case, tell), floors[case.name]) for case in small}, tell)
    # Small cases first: their results are checked before their timing, the large models' are not timed here.
    return [*timed, *(_check(case, tell, deadline) for case in selection if not case.small)]


# ---- cases of a user


def _users(case: UserCase, peer: UserCase, tell: Progress) -> Take:
    def take(pairs: Sequence[int], floor: float | None, seconds: float) -> Ratio:
        found = Ratio(case.name, peer.name, None)
        try:
            ours, theirs = usercases.prepared(case), usercases.prepared(peer)
        except usercases.CaseError as error:
            found.note, found.wrong = str(error), isinstance(error, usercases.WrongCase)
            return found
        measured = measure.measure_pairs(
            theirs, ours, pairs=pairs, deadline=perf_counter() + seconds,
            decided=lambda ratio: runner.decided(case.goal)(ratio) and (floor is None or floor not in ratio),
            on_pair=lambda count: tell(case.title or case.name, count),
        )  # fmt: skip
        found.ratios, found.interval = list(measured.ratios), stats.median_interval(measured.ratios)
        if case.goal is not None:
            found.note = f"goal {case.goal:g}: {'reached' if found.interval.median >= case.goal else 'not reached'}"
        if case.bytes is not None:
            _add_note(found, f"{case.bytes / statistics.median(measured.b) * 1e-9:.3g} GB/s")
        return found

    return take


def users(found: Sequence[UserCase], floors: Mapping[str, float], tell: Progress) -> list[Ratio]:
    """Ratios of the cases that name a peer, in this process; a floor in the file goes before the decorator's.

    Raises:
        NoFloors: the file names a case that is not there, or one that has no peer.
    """
    by_name = {case.name: case for case in found}
    strangers = [name for name in floors if name not in by_name or by_name[name].peer is None]
    if strangers:
        raise NoFloors(f"[bench] a floor for {strangers[0]}, which is no case with a peer; take it from the file")
    takes = {
        case.name: (_users(case, by_name[case.peer], tell), floors.get(case.name, case.floor))
        for case in found
        if case.peer is not None
    }
    return _with_control(takes, tell)
