# SPDX-License-Identifier: Apache-2.0
"""Ratios within one run against committed floors, and the results of the cases that are too large to be timed here.

A floor is a ratio, never milliseconds. It is set well below what was measured: it catches what broke, `ab` what got
slower.
"""

from __future__ import annotations

import json
import math
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
ITSELF = "itself"

Take = Callable[[Sequence[int]], Ratio]  # counts of pairs -> what was measured, not judged yet


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


def below(floor: float, ratios: Sequence[float]) -> Interval:
    """The floor over the ratio: more than 1 is slower than allowed, so that `stats.verdict` applies."""
    return stats.slowdown([floor] * len(ratios), ratios)


def judged(take: Take, floor: float | None) -> Ratio:
    """Measure a ratio and, where there is a floor, judge it; what looks too slow is measured again."""
    found = take(stats.PAIRS)
    if floor is None or not found.ratios:
        return found
    found.floor = floor
    change, rerun = below(floor, found.ratios), None
    if stats.looks_slower(change):
        rerun = below(floor, take((stats.RERUN_PAIRS,)).ratios)
    found.verdict = stats.verdict(change, rerun)
    return found


# ---- cases of fastloop: ours against torch's best


def _own(case: Case, tell: Progress) -> Take:
    headline = Case(**{**vars(case), "extra_peers": ()})

    def take(pairs: Sequence[int]) -> Ratio:
        effort = runner.Effort(tuple(pairs), ROW_SECONDS)
        row = runner.run_case(headline, runner.Plan(effort, effort, every_peer=False, ceilings=False), tell)[0]
        return Ratio(case.name, row.peer, None, row.ratio, None, row.ratios, row.reason, row.status == "wrong")

    return take


def control(tell: Progress, case: Case | None = None) -> Ratio:
    """The same code on both sides: VOID if it differs by more than 2 %."""
    case = case or cases.CONTROL
    found = _own(case, tell)(stats.PAIRS)
    assert found.interval is not None
    found.peer, found.case = ITSELF, f"control ({case.ours})"
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
        if any(each.ratios for each in found):
            found.append(control(tell))
        if not any(each.verdict is Verdict.VOID for each in found):
            break
    return found


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
    def take(pairs: Sequence[int]) -> Ratio:
        found = Ratio(case.name, peer.name, None)
        try:
            ours, theirs = usercases.prepared(case), usercases.prepared(peer)
        except usercases.CaseError as error:
            found.note, found.wrong = str(error), isinstance(error, usercases.WrongCase)
            return found
        measured = measure.measure_pairs(
            theirs, ours, pairs=pairs, deadline=perf_counter() + ROW_SECONDS,
            decided=runner.decided(case.goal), on_pair=lambda count: tell(case.title or case.name, count),
        )  # fmt: skip
        found.ratios, found.interval = list(measured.ratios), stats.median_interval(measured.ratios)
        if case.goal is not None:
            found.note = f"goal {case.goal:g}: {'reached' if found.interval.median >= case.goal else 'not reached'}"
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
