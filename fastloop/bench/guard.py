# SPDX-License-Identifier: Apache-2.0
"""The guard of CI: every case's result, allocations that must not grow, and ratios that must not fall below a floor.

A floor is a ratio or a count, never milliseconds. It is set well below what was measured: the guard catches what
broke, `compare` what got slower.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from fastloop.bench import cases, checks, runner, stats
from fastloop.bench.cases import Case
from fastloop.bench.results import Row
from fastloop.bench.stats import Interval, Verdict

SCHEMA = "fastloop-floors/1"
DEFAULT_FLOORS = Path(__file__).resolve().parents[2] / "benchmarks" / "floors.json"
TRIES = 2  # a void run is tried once more
SECONDS = 120.0  # no check or pair starts later: CI waits 3 minutes at most, however busy its machine
ROW_SECONDS = 10.0


class NoBaseline(Exception):
    """There is no file of floors, or it is not one, or it has none for a case that is guarded."""


@dataclass(frozen=True)
class Floor:
    """The least ratio of a case against the headline peer, and the most operations that may allocate in a step."""

    ratio: float
    allocations: int


@dataclass
class Finding:
    """One line of the guard's report."""

    name: str
    verdict: Verdict | None  # None for what was not judged: skipped, or deterministic
    text: str
    wrong: bool = False


def load_floors(path: Path) -> dict[str, Floor]:
    """Read the floors. Raises NoBaseline with what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise NoBaseline(f"[bench] wanted floors of schema {SCHEMA}, got {document['schema']} in {path}")
        return {name: Floor(**floor) for name, floor in document["floors"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoBaseline(f"[bench] no floors in {path}: {type(error).__name__}: {error}; pass --floors FILE") from error


def check_all(
    selection: Sequence[Case], progress: Callable[[str, int], None], deadline: float = math.inf
) -> list[Finding]:
    """Check every case's result; a case that the memory or the time does not hold is reported as skipped."""
    findings = []
    for case in selection:
        progress(f"{case.title}: check", 0)
        reason = "no time left" if perf_counter() > deadline else runner.lacking_memory(case)
        if reason is not None:
            findings.append(Finding(case.name, None, f"result not checked: {reason}"))
            continue
        try:
            runner.build_checked(case)
            findings.append(Finding(case.name, None, "result agrees with the reference"))
        except checks.WrongResult as error:
            findings.append(Finding(case.name, None, str(error), wrong=True))
    return findings


def below_floor(row: Row, floor: Floor) -> Interval:
    """The floor over the ratio, so that more than 1 is slower than allowed and `stats.verdict` applies."""
    return stats.slowdown([floor.ratio] * len(row.ratios), row.ratios)


def _measure(case: Case, pairs: tuple[int, ...], progress: Callable[[str, int], None]) -> Row:
    effort = runner.Effort(pairs, ROW_SECONDS)
    return runner.run_case(case, runner.Plan(effort, effort, every_peer=False, ceilings=False), progress)[0]


def _headline_only(case: Case) -> Case:
    return Case(**{**vars(case), "extra_peers": ()})


def judge_case(case: Case, floor: Floor, progress: Callable[[str, int], None]) -> list[Finding]:
    """Allocations first, which do not depend on the machine's mood, then the ratio with its rerun."""
    row = _measure(_headline_only(case), stats.PAIRS, progress)
    if row.status != "ok":
        return [Finding(case.name, None, row.reason, wrong=row.status == "wrong")]
    findings = []
    memory: dict[str, Any] = row.ours_memory or {}
    if memory["allocations"] > floor.allocations:
        text = f"{memory['allocations']} operations allocate in a step, at most {floor.allocations} may"
        findings.append(Finding(case.name, Verdict.REGRESSED, text))
    change, rerun = below_floor(row, floor), None
    if stats.looks_slower(change):
        rerun = below_floor(_measure(_headline_only(case), (stats.RERUN_PAIRS,), progress), floor)
    verdict = stats.verdict(change, rerun)
    assert row.ratio is not None
    text = f"ratio {row.ratio.median:.3g} ({row.ratio.low:.3g} .. {row.ratio.high:.3g}), floor {floor.ratio:g}"
    findings.append(Finding(case.name, verdict, text))
    return findings


def control(progress: Callable[[str, int], None], case: Case = cases.CONTROL) -> Finding:
    """The control case: VOID if the same code on both sides differs by more than 2 %."""
    row = _measure(case, stats.PAIRS, progress)
    assert row.ratio is not None
    verdict = Verdict.VOID if stats.control_moved(row.ratio) else Verdict.PASS
    return Finding(case.name, verdict, f"{row.ratio.median:.4f} ({row.ratio.low:.4f} .. {row.ratio.high:.4f})")


def guard(
    floors: dict[str, Floor],
    progress: Callable[[str, int], None],
    selection: Sequence[Case] = cases.CASES,
) -> list[Finding]:
    """Results, allocations and ratios of the small cases, and the control; a void run is tried once more."""
    small = [case for case in selection if case.small]
    missing = [case.name for case in small if case.name not in floors]
    if missing:
        raise NoBaseline(f"[bench] no floor for {', '.join(missing)}; add one to the file of floors")
    deadline = perf_counter() + SECONDS
    timed: list[Finding] = []
    for _ in range(TRIES):
        timed = [finding for case in small for finding in judge_case(case, floors[case.name], progress)]
        timed.append(control(progress))
        if timed[-1].verdict is not Verdict.VOID:
            break
    # Small cases first: their results are checked before their timing, the large models' are not timed here.
    large = [case for case in selection if not case.small]
    return [*timed, *check_all(large, progress, deadline)]


def exit_code(findings: Sequence[Finding]) -> int:
    """3 wrong result, else 1 more allocations, else 4 void, else 1 a ratio below its floor, else 0."""
    if any(finding.wrong for finding in findings):
        return 3
    regressed = [finding for finding in findings if finding.verdict is Verdict.REGRESSED]
    if any("allocate" in finding.text for finding in regressed):
        return 1
    if any(finding.verdict is Verdict.VOID for finding in findings):
        return 4
    return 1 if regressed else 0
