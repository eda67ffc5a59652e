# SPDX-License-Identifier: Apache-2.0
"""Judge a change: the speed-ups of two runs, case by case, and what the differences are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastloop.bench import stats
from fastloop.bench.results import Row, Run
from fastloop.bench.stats import Interval, Verdict

Rerun = Callable[[Row], Sequence[float] | None]


@dataclass(frozen=True)
class Judgement:
    """The verdict on one case. `change` is the new time over the old one, None where the old run lacks the row."""

    key: str
    verdict: Verdict | None
    change: Interval | None = None
    rerun: Interval | None = None
    note: str = ""


def change_of(before: Row, after: Row) -> Interval:
    """How much slower `after` is, both measured against the same peer in runs of their own."""
    return stats.slowdown(before.ratios, after.ratios)


def judge(before: Row, after: Row, rerun: Rerun) -> Judgement:
    """Judge one row; a change worth a verdict is confirmed by `rerun` (the after side's ratios, from 40 new pairs)."""
    change = change_of(before, after)
    if not (stats.looks_slower(change) or stats.looks_faster(change)):
        return Judgement(after.key, stats.verdict(change), change)
    ratios = rerun(after)
    if ratios is None:
        note = "looks changed, but no rerun confirms it: compare on the machine and build of B, or pass --confirm"
        return Judgement(after.key, stats.verdict(change), change, note=note)
    again = stats.slowdown(before.ratios, ratios)
    return Judgement(after.key, stats.verdict(change, again), change, again)


def compare(before: Run, after: Run, rerun: Rerun) -> list[Judgement]:
    """Judge every row of `after`. If a control of either run moved, every verdict is VOID."""
    rows = {row.key: row for row in before.rows if row.ratios}
    judgements = []
    void = before.void or after.void
    for row in after.rows:
        if not row.ratios or row.group == "control":
            continue
        if row.key not in rows:
            judgements.append(Judgement(row.key, None, note="not in the first file"))
        elif void:
            note = "the control case moved by more than 2 %"
            judgements.append(Judgement(row.key, Verdict.VOID, change_of(rows[row.key], row), note=note))
        else:
            judgements.append(judge(rows[row.key], row, rerun))
    return judgements


def exit_code(judgements: Sequence[Judgement]) -> int:
    """0 ok or inconclusive, 1 regression, 4 environment void, 5 nothing that both runs measured."""
    verdicts = {judgement.verdict for judgement in judgements}
    if Verdict.VOID in verdicts:
        return 4
    if Verdict.REGRESSED in verdicts:
        return 1
    return 5 if verdicts <= {None} else 0
