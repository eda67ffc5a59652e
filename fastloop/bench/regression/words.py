# SPDX-License-Identifier: Apache-2.0
"""What a regression report says, in words and numbers: shared by report.md and report.html."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastloop.bench import stats
from fastloop.bench.regression.record import Change, Count, Ratio, Report
from fastloop.bench.report import size
from fastloop.bench.stats import Interval, Verdict

Write = Callable[[str], str]  # text of others (a case's name, a note) made safe for the document

NAMED = 3  # as many cases as the first line names
MINUS, ELLIPSIS = "\u2212", "\u2026"

METHOD = (
    "Head's time over base's, one ratio per pair of samples; the two builds run in two warm processes and take turns "
    "(A B B A ...), in rounds that each start both anew. Shown is the median with its 98 % bootstrap interval. "
    "REGRESSED: median above +5 %, lower end above +2 %, and a fresh rerun agrees. IMPROVED: its mirror image. "
    "PASS: upper end below +5 %. Otherwise INCONCLUSIVE. A control that no change touches runs along; if it moves by "
    "more than 2 % the run is VOID. Counts do not depend on the machine's mood and fail hard."
)


@dataclass(frozen=True)
class Headline:
    """The verdict on the whole report. tone: "wrong", "bad", "void", "ok" or "none"."""

    tone: str
    word: str
    text: str


def clean(text: object, limit: int = 400) -> str:
    """One printable line of at most `limit` characters: no control, direction or lone surrogate characters."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + ELLIPSIS


def percent(ratio: float) -> str:
    """A ratio as its distance from 1: `+12.3 %`."""
    value = round((ratio - 1) * 100, 1)
    if not math.isfinite(value):
        return "n/a"
    return f"{MINUS if value < 0 else '+'}{abs(value):,.1f} %"


def factor(ratio: float) -> str:
    """A ratio to a peer: `1.23x`."""
    return f"{ratio:.3g}x"


def change(value: Interval | None) -> tuple[str, str]:
    """Median and interval of a change, as per cent."""
    return ("", "") if value is None else (percent(value.median), f"{percent(value.low)} to {percent(value.high)}")


def times(value: Interval | None) -> tuple[str, str]:
    """Median and interval of a ratio to a peer."""
    return ("", "") if value is None else (factor(value.median), f"{factor(value.low)} to {factor(value.high)}")


def number(value: float | None) -> str:
    """A count, exact where it is whole; empty for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "n/a"
    whole = value == int(value)
    text = f"{int(value):,}" if whole else f"{value:,.6g}"
    return text.replace("-", MINUS)


def verdict(row: Change | Ratio) -> str:
    if row.wrong:
        return "WRONG"
    return "not judged" if row.verdict is None else row.verdict.value


def outcome(count: Count) -> str:
    """Whether a count holds."""
    if count.failed:
        return "FAILED"
    if count.value is None:
        return "not taken"
    return "holds" if count.allowed is not None else "reported"


def against_base(count: Count) -> str:
    """The difference of a count from the base's."""
    if count.value is None or count.base is None:
        return ""
    if count.value == count.base:
        return "unchanged"
    difference = count.value - count.base
    share = f" ({percent(count.value / count.base)})" if count.base > 0 else ""
    return f"{'+' if difference > 0 else ''}{number(difference)}{share}"


def pairs(row: Change) -> str:
    again = sum(map(len, row.rerun_rounds))
    return f"{row.pairs} + {again}" if again else str(row.pairs)


def by_weight(rows: Sequence[Change]) -> list[Change]:
    """What a reader has to see first; the controls last, unless they void the run."""
    order = [Verdict.REGRESSED, Verdict.VOID, Verdict.INCONCLUSIVE, None, Verdict.IMPROVED, Verdict.PASS]

    def weight(row: Change) -> tuple[int, float]:
        size_of_change = 0.0 if row.interval is None else -abs(math.log(max(row.interval.median, 1e-9)))
        if row.wrong:
            return (-2, size_of_change)
        if row.control:
            return (-1 if row.verdict is Verdict.VOID else len(order), size_of_change)
        return (order.index(row.verdict), size_of_change)

    return sorted(rows, key=weight)


def notable(count: Count) -> bool:
    """Whether a count failed, changed or could not be taken: shown, not folded away."""
    return count.failed or count.value is None or (count.base is not None and count.value != count.base)


def environment(report: Report) -> list[tuple[str, str]]:
    """What was measured where, as (name, text)."""
    known: list[tuple[str, Any]] = [("head", report.head), ("base", report.base or "none")]
    known += [("created", report.created), ("took", f"{report.seconds:.0f} s")]
    for key, value in report.environment.items():
        if key.endswith("_bytes") and isinstance(value, (int, float)):
            known.append((key.removesuffix("_bytes"), size(value)))
        elif isinstance(value, dict):
            known.append((key, "; ".join(f"{name}: {each}" for name, each in value.items())))
        elif value is not None:
            known.append((key, value))
    return [(clean(name.replace("_", " "), 80), clean(text)) for name, text in known]


def commit(name: str | None) -> str:
    """A commit short enough for a line; -dirty stays."""
    if name is None:
        return "none"
    head, dash, tail = name.partition("-")
    short = head[:12] if len(head) == 40 and all(c in "0123456789abcdef" for c in head) else head
    return clean(short + dash + tail, 60)


def _more(parts: Sequence[str]) -> str:
    rest = len(parts) - NAMED
    return "; ".join([*parts[:NAMED], *([f"and {rest} more"] if rest > 0 else [])])


def _timed(report: Report) -> list[Change | Ratio]:
    """What a verdict is about: all but the controls."""
    rows: list[Change | Ratio] = [row for row in report.changes if not row.control or row.wrong]
    return rows + list(report.ratios)


def _wrong(report: Report, name: Write, text: Write) -> list[str]:
    rows = [row for row in _timed(report) if row.wrong]
    return [name(row.case) + (f": {text(clean(row.note, 200))}" if row.note else "") for row in rows]


def _worse(report: Report, name: Write, text: Write) -> Iterator[str]:
    for row in by_weight(report.changes):
        if row.verdict is Verdict.REGRESSED and not row.wrong:
            middle, ends = change(row.interval)
            yield f"{name(row.case)} is slower by {middle.lstrip('+')} (98 % interval {ends})"
    for count in report.counts:
        if count.failed:
            limit = f", allowed {number(count.allowed)}" if count.allowed is not None else ""
            yield f"{name(count.case)} {text(clean(count.what, 80))} {number(count.value) or 'not taken'}{limit}"
    for ratio in report.ratios:
        if ratio.verdict is Verdict.REGRESSED and not ratio.wrong:
            floor = f", floor {factor(ratio.floor)}" if ratio.floor is not None else ""
            yield f"{name(ratio.case)} {times(ratio.interval)[0]} of {name(ratio.peer)}{floor}"


def _void(report: Report, name: Write) -> str:
    for row in report.changes:
        if row.control and row.interval is not None and stats.control_moved(row.interval):
            moved = f"the control {name(row.case)} moved by {percent(row.interval.median)}"
            return f"{moved}, so the machine was not quiet and no timing is judged"
    return "a control moved by more than 2 %, so the machine was not quiet and no timing is judged"


def _holds(report: Report) -> list[str]:
    """What there is to say where nothing is worse."""
    timed = Counter(row.verdict for row in report.changes if row.interval is not None and not row.control)
    found = []
    if timed and not report.void:
        found.append(f"{plural(sum(timed.values()), 'case')} against base, none regressed")
        for key, name in ((Verdict.IMPROVED, "improved"), (Verdict.INCONCLUSIVE, "inconclusive"), (None, "not judged")):
            found += [f"{timed[key]} {name}"] if timed[key] else []
    held = sum(count.value is not None and count.allowed is not None and not count.failed for count in report.counts)
    found += [f"{plural(held, 'count')} within bounds"] if held else []
    judged = [row for row in report.ratios if row.verdict not in (None, Verdict.VOID) and not row.wrong]
    kept = sum(row.verdict is Verdict.PASS for row in judged)
    if judged:
        found.append(f"{kept} of {plural(len(judged), 'ratio')} surely above the floor")
    return found


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def headline(report: Report, name: Write, text: Write) -> Headline:
    """One line: what is wrong, worse, void or fine, and by how much. `name` and `text` make strings of others safe."""
    wrong, worse, holds = _wrong(report, name, text), list(_worse(report, name, text)), _holds(report)
    void = f"; timings are void: {_void(report, name)}" if report.void else ""
    if wrong:
        return Headline(
            "wrong", "Wrong result", _more(wrong) + (f"; also worse: {_more(worse)}" if worse else "") + void
        )
    if worse:
        return Headline("bad", "Regressed", _more(worse) + void)
    if report.void:
        return Headline("void", "Void", "; ".join([_void(report, name), *holds]))
    judged = [row.verdict for row in _timed(report) if row.verdict]
    counted = any(count.value is not None and count.allowed is not None for count in report.counts)
    if judged and set(judged) == {Verdict.INCONCLUSIVE} and not counted:
        return Headline(
            "none", "Inconclusive", f"{plural(len(judged), 'case')} measured, no answer: intervals too wide"
        )
    if judged or counted:
        return Headline("ok", "OK", "; ".join(holds))
    notes = [row.note for row in [*_timed(report), *report.counts] if row.note]
    reason = text(clean((report.notes or notes or ["nothing was measured"])[0], 200))
    return Headline("none", "Nothing judged", reason)
