# SPDX-License-Identifier: Apache-2.0
"""report.md: a regression report fit for a pull-request comment."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastloop.bench.regression import words
from fastloop.bench.regression.record import Count, Ratio, Report

LIMIT = 60_000  # bytes; a comment on GitHub holds 65,536 characters
ROWS = (1000, 300, 100, 50, 20, 8, 3)  # rows of a table, fewer until the whole fits
PLAIN = re.compile(r"[\w .,:;/=+()-]+", re.ASCII)


def text(value: object) -> str:
    """Text of others as literal Markdown: no markup, no HTML, no table cell, no mention."""
    line = str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"[\\`*\[\]|~#!]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)
    return re.sub(r"@(?=\w)", "@\u200b", line)


def code(value: object) -> str:
    """A name in the font of code; one with odd characters as HTML code of character references."""
    name = words.clean(value, 120)
    if PLAIN.fullmatch(name):
        return f"`{name}`"
    escaped = "".join(c if PLAIN.fullmatch(c) or ord(c) > 127 else f"&#{ord(c)};" for c in name)
    return f"<code>{escaped}</code>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], limit: int) -> list[str]:
    """A table without the columns that nothing is in; a column of a name that ends in ">" is set right."""
    kept = [i for i in range(len(columns)) if i == 0 or any(row[i] for row in rows)]
    lines = [
        "| " + " | ".join(columns[i].rstrip(">") for i in kept) + " |",
        "|" + "|".join("---:" if columns[i].endswith(">") else "---" for i in kept) + "|",
        *("| " + " | ".join(row[i] for i in kept) + " |" for row in rows[:limit]),
    ]
    if len(rows) > limit:
        lines += ["", f"{words.ELLIPSIS} and {len(rows) - limit} more rows, left out here: see report.html"]
    return [*lines, ""]


def _details(title: str, lines: Sequence[str]) -> list[str]:
    inner = "\n".join(lines).rstrip()
    return ["<details>", f"<summary>{title}</summary>", "", inner, "", "</details>", ""]


def _notes(rows: Sequence[tuple[str, str]], limit: int) -> list[str]:
    """Notes under a table; cases that share one share a line."""
    cases: dict[str, list[str]] = {}
    for case, note in rows:
        if note:
            cases.setdefault(note, []).append(code(case))
    lines = []
    for note, names in list(cases.items())[:limit]:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        lines.append(f"- {', '.join(names[:5])}{more}: {text(words.clean(note))}")
    if len(cases) > limit:
        lines.append(f"- {words.ELLIPSIS} and {len(cases) - limit} more notes")
    return [*lines, ""] if lines else []


def _bold(word: str) -> str:
    return f"**{word}**" if word in ("REGRESSED", "WRONG", "FAILED", "VOID") else word


def _changes(report: Report, limit: int) -> list[str]:
    rows = []
    for row in words.by_weight(report.changes):
        middle, ends = words.change(row.interval)
        again = "" if row.rerun is None else f"{words.percent(row.rerun.median)} ({words.change(row.rerun)[1]})"
        name = code(row.case) + (" (control)" if row.control else "")
        rows.append((name, _bold(words.verdict(row)), middle, ends, again, words.pairs(row)))
    columns = ("case", "verdict", "change>", "98 % interval>", "rerun>", "pairs>")
    table = _table(columns, rows, limit)
    return [
        "#### Time, head against base",
        "",
        *table,
        *_notes([(row.case, row.note) for row in words.by_weight(report.changes)], limit),
    ]


def _counted(counts: Sequence[Count], limit: int) -> list[str]:
    rows = []
    for count in sorted(counts, key=lambda each: not each.failed):
        what = text(words.clean(count.what, 120))
        numbers = (words.number(count.value), words.number(count.allowed), words.against_base(count))
        rows.append((code(count.case), what, _bold(words.outcome(count)), *numbers))
    table = _table(("case", "what", "state", "value>", "allowed>", "against base>"), rows, limit)
    return [*table, *_notes([(f"{each.case} {each.what}", each.note) for each in counts], limit)]


def _counts(report: Report, limit: int) -> list[str]:
    shown = [count for count in report.counts if words.notable(count)]
    folded = [count for count in report.counts if not words.notable(count)]
    lines = ["#### Counts", ""]
    if shown:
        lines += _counted(shown, limit)
    if folded:
        title = f"{words.plural(len(folded), 'count')} unchanged or within bounds"
        lines += _details(title, _counted(folded, limit))
    return lines


def _ratios(ratios: Sequence[Ratio], limit: int) -> list[str]:
    rows = []
    for row in ratios:
        middle, ends = words.times(row.interval)
        floor = "" if row.floor is None else words.factor(row.floor)
        rows.append((code(row.case), code(row.peer), _bold(words.verdict(row)), middle, ends, floor))
    columns = ("case", "against", "verdict", "ratio>", "98 % interval>", "floor>")
    notes = _notes([(row.case, row.note) for row in ratios], limit)
    lines = ["#### Ratios within the run", "", "The peer's time over the case's: 2x is twice as fast.", ""]
    return [*lines, *_table(columns, rows, limit), *notes]


def _build(report: Report, limit: int) -> str:
    headline = words.headline(report, code, text)
    base = f" against {code(words.commit(report.base))}" if report.base else ", no base"
    lines = [f"**{headline.word}**: {headline.text}", "", f"Head {code(words.commit(report.head))}{base}.", ""]
    if report.changes:
        lines += _changes(report, limit)
    if report.counts:
        lines += _counts(report, limit)
    if report.ratios:
        lines += _ratios(report.ratios, limit)
    notes = [f"- {text(words.clean(note))}" for note in report.notes[:limit]]
    if len(report.notes) > limit:
        notes.append(f"- {words.ELLIPSIS} and {len(report.notes) - limit} more notes")
    lines += ["#### Notes", "", *notes, ""] if notes and len(notes) <= 5 else []
    lines += _details(words.plural(len(report.notes), "note"), notes) if len(notes) > 5 else []
    pairs = words.environment(report)
    where = [f"- {text(name)}: {text(value)}" for name, value in pairs[:limit]]
    lines += _details("Environment, commits, method", [*where, "", text(words.METHOD)])
    lines += ["Plots are in report.html, every sample in result.json."]
    return "\n".join(lines).rstrip() + "\n"


def render(report: Report) -> str:
    """The report as GitHub's Markdown, below 60 KB: rows that do not fit are left out, and it says how many."""
    for limit in ROWS:
        document = _build(report, limit)
        if len(document.encode()) <= LIMIT:
            break
    return document
