# SPDX-License-Identifier: Apache-2.0
"""report.html: a regression report as one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fastloop.bench.regression import figures, words
from fastloop.bench.regression.record import Change, Count, Ratio, Report
from fastloop.bench.regression.stylesheet import CSS
from fastloop.bench.stats import Verdict

OPEN = 4  # as many cases show their samples unasked

SIGNS = {
    "WRONG": "\u2716",
    "FAILED": "\u2716",
    "REGRESSED": "\u25b2",
    "IMPROVED": "\u25bc",
    "PASS": "\u2713",
    "holds": "\u2713",
    "INCONCLUSIVE": "?",
    "VOID": "\u2298",
}
ROWS = {
    "WRONG": "bad-row",
    "FAILED": "bad-row",
    "REGRESSED": "bad-row",
    "IMPROVED": "good-row",
    "INCONCLUSIVE": "doubt-row",
}

Cell = tuple[str, str, str]  # label, class, content as HTML


def _safe(text: object) -> str:
    return escape(words.clean(text))


def _case(name: object) -> str:
    return f'<code class="case">{_safe(name)}</code>'


def _state(word: str) -> str:
    sign = SIGNS.get(word)
    return f'<span aria-hidden="true">{sign}</span> {word}' if sign else word


def _note(note: str) -> str:
    return f'<span class="note">{_safe(note)}</span>' if note else ""


def _number(label: str, text: str) -> Cell:
    return (label, "number", escape(text))


def _table(caption: str, rows: Sequence[tuple[str, Sequence[Cell]]], axis: str = "") -> str:
    """Rows of (class, cells); the first cell heads its row. Columns that nothing is in are left out.

    The roles stay where a narrow window shows the rows as cards: a style that changes `display` would drop them.
    """
    kept = [i for i in range(len(rows[0][1])) if any(cells[i][2] for _, cells in rows)]
    heads = [rows[0][1][i] for i in kept]
    columns = "".join(
        f'<th scope="col" role="columnheader" class="{kind}">{label}{axis if "forest" in kind else ""}</th>'
        for label, kind, _ in heads
    )
    lines = []
    for row_class, cells in rows:
        first, *rest = [cells[i] for i in kept]
        line = f'<th scope="row" role="rowheader" class="{first[1]}">{first[2]}</th>'
        line += "".join(
            f'<td role="cell" class="{kind}" data-label="{label}">{_held(text, kind)}</td>'
            for label, kind, text in rest
        )
        lines.append(f'<tr role="row" class="{row_class}">{line}</tr>')
    return (
        f'<div class="box" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="cards" role="table"><caption>{escape(caption)}</caption>'
        f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(lines)}</tbody></table></div>'
    )


def _held(text: str, kind: str) -> str:
    """One box for what is in a cell, so that a card can set it beside its label; an empty cell stays empty."""
    return f"<div>{text}</div>" if text and "plot" not in kind else text


def _key(entries: Iterable[tuple[str, str]]) -> str:
    """What the marks of a plot mean."""
    items = "".join(f'<li><svg aria-hidden="true">{mark}</svg>{text}</li>' for mark, text in entries)
    return f'<ul class="key">{items}</ul>'


def _stroke(kind: str) -> str:
    return f'<line class="{kind}" x1="13" x2="13" y1="0" y2="14"/>'


def _diamond(kind: str) -> str:
    return (
        f'<line class="bar {kind}" x1="1" x2="25" y1="7" y2="7"/>'
        f'<svg x="13" y="7" overflow="visible"><path class="median {kind}" d="M0 -7L6 0L0 7L-6 0Z"/></svg>'
    )


def _dot(kind: str) -> str:
    return f'<path class="dots {kind}" d="M13 7h.01"/>'


MARKS = ((_diamond(""), "median and 98 % interval"), (_diamond("again"), "rerun"), (_stroke("one"), "no change"))
LIMITS = ((_stroke("limit"), "\u00b15 %: median beyond it"), (_stroke("sure"), "\u00b12 %: interval beyond it"))


def _row_class(word: str, void: bool) -> str:
    """Nothing timed has a colour where the machine was not quiet; a wrong result is one all the same."""
    return "" if void and word != "WRONG" else ROWS.get(word, "")


def _change_row(index: int, row: Change, axis: figures.Axis, void: bool) -> tuple[str, list[Cell]]:
    word = words.verdict(row)
    middle, ends = words.change(row.interval)
    again = "".join(f"<span>{text}</span>" for text in words.change(row.rerun) if text)
    control = '<span class="tag">control</span>' if row.control else ""
    title = _note(row.title) if row.title != row.case else ""
    name = _case(row.case)
    if _has_samples(row):
        name = f'<a href="#case-{index}">{name}</a>'
    plot = ""
    if row.interval is not None:
        plot = figures.interval_row(f"change-{index}", words.clean(row.case), axis, row.interval, rerun=row.rerun)
    cells = [
        ("case", "", name + control + title + _note(row.note)),
        ("verdict", "state", _state(word)),
        ("", "plot forest", plot),
        _number("change", middle),
        _number("98 % interval", ends),
        ("rerun", "number", again),
        _number("pairs", words.pairs(row)),
    ]
    return _row_class(word, void), cells


def _has_samples(row: Change) -> bool:
    return any([*row.rounds, *row.rerun_rounds])


def _samples(index: int, row: Change, unfolded: bool) -> str:
    """Every sample of one case, folded."""
    name = words.clean(row.case)
    parts = [
        "<figure><figcaption>Change of every pair in its order, by round. Line: the round's median. "
        "Band: the 98 % interval. Rings: the rerun. Triangle: beyond the axis.</figcaption>"
        + figures.strip(f"strip-{index}", f"Pairs of {name}", row.rounds, row.rerun_rounds, row.interval)
        + "</figure>"
    ]
    if row.base_seconds and row.head_seconds:
        parts.append(
            "<figure><figcaption>Time per call of every sample. Line: the median.</figcaption>"
            + figures.both_times(f"times-{index}", f"Times of {name}", row.base_seconds, row.head_seconds)
            + "</figure>"
        )
    middle = words.change(row.interval)[0]
    summary = f'{_case(row.case)} {_state(words.verdict(row))} <span class="number">{middle}</span>'
    opened = " open" if unfolded else ""
    head = f'<details id="case-{index}"{opened}><summary>{summary}</summary>'
    return f'{head}<div class="pair">{"".join(parts)}</div></details>'


def _changes(report: Report) -> str:
    rows = words.by_weight(report.changes)
    axis = figures.change_axis([each for row in rows for each in (row.interval, row.rerun)])
    void = report.void
    cells = [_change_row(index, row, axis, void) for index, row in enumerate(rows)]
    head = figures.axis_labels("change-axis", axis, "Change of time", True)
    quiet = (Verdict.PASS, None)
    loud = [index for index, row in enumerate(rows) if row.verdict not in quiet or row.wrong]
    unfolded = set(range(len(rows)) if len(rows) <= OPEN else loud[:OPEN])
    samples = [_samples(i, row, i in unfolded) for i, row in enumerate(rows) if _has_samples(row)]
    return (
        '<section id="changes"><h2>Time, head against base</h2>'
        f"<p>Head's time over base's: + is slower, {words.MINUS} is faster.</p>"
        + _key([*MARKS, *LIMITS])
        + _table("Change of each case", cells, head)
        + ("<h3>Samples</h3>" if samples else "")
        + "".join(samples)
        + "</section>"
    )


def _count_row(index: int, count: Count) -> tuple[str, list[Cell]]:
    word = words.outcome(count)
    plot = ""
    if count.value is not None and count.allowed is not None:
        plot = figures.share(f"count-{index}", words.clean(f"{count.case}: {count.what}"), count)
    cells = [
        ("case", "", _case(count.case) + _note(count.note)),
        ("what", "what", _safe(count.what)),
        ("state", "state", _state(word)),
        ("of what is allowed", "plot share", plot),
        _number("value", words.number(count.value)),
        _number("allowed", words.number(count.allowed)),
        _number("against base", words.against_base(count)),
    ]
    return ROWS.get(word, ""), cells


def _counts(report: Report) -> str:
    rows = list(enumerate(sorted(report.counts, key=lambda count: not count.failed)))
    shown = [_count_row(index, count) for index, count in rows if words.notable(count)]
    quiet = [_count_row(index, count) for index, count in rows if not words.notable(count)]
    parts = [
        '<section id="counts"><h2>Counts</h2><p>The same on every run of this build: a machine that is busy '
        "does not change them. Bar: the value; line: what is allowed.</p>"
    ]
    if shown:
        parts.append(_table("Failed, changed or not taken", shown))
    if quiet:
        title = f"{words.plural(len(quiet), 'count')} unchanged or within bounds"
        table = _table("Unchanged or within bounds", quiet)
        parts.append(f"<details{'' if shown else ' open'}><summary>{title}</summary>{table}</details>")
    return "".join(parts) + "</section>"


def _ratio_row(index: int, row: Ratio, axis: figures.Axis, void: bool) -> tuple[str, list[Cell]]:
    word = words.verdict(row)
    middle, ends = words.times(row.interval)
    title = words.clean(f"{row.case} against {row.peer}")
    plot = ""
    if row.interval is not None:
        plot = figures.interval_row(f"ratio-{index}", title, axis, row.interval, floor=row.floor, as_change=False)
    cells = [
        ("case", "", _case(row.case) + _note(row.note)),
        ("against", "", _case(row.peer)),
        ("verdict", "state", _state(word)),
        ("", "plot forest", plot),
        _number("ratio", middle),
        _number("98 % interval", ends),
        _number("floor", "" if row.floor is None else words.factor(row.floor)),
    ]
    return _row_class(word, void), cells


def _ratios(report: Report) -> str:
    floors = [row.floor for row in report.ratios if row.floor is not None]
    axis = figures.ratio_axis([row.interval for row in report.ratios], floors)
    cells = [_ratio_row(index, row, axis, report.void) for index, row in enumerate(report.ratios)]
    head = figures.axis_labels("ratio-axis", axis, "Ratio to the peer", False)
    strips = "".join(
        f"<figure><figcaption>{_case(row.case)} against {_case(row.peer)}</figcaption>"
        + figures.strip(
            f"ratio-strip-{index}",
            words.clean(f"Pairs of {row.case} against {row.peer}"),
            [row.ratios],
            value=row.interval,
            as_change=False,
        )
        + "</figure>"
        for index, row in enumerate(report.ratios)
        if row.ratios
    )
    samples = f'<details><summary>Every pair in its order</summary><div class="pair">{strips}</div></details>'
    key = [MARKS[0], (_stroke("one"), "as fast as the peer"), (_stroke("floor"), "floor")]
    return (
        '<section id="ratios"><h2>Ratios within the run</h2>'
        "<p>The peer's time over the case's, in one process: 2x is twice as fast as the peer.</p>"
        + _key(key)
        + _table("Ratio of each case", cells, head)
        + (samples if strips else "")
        + "</section>"
    )


def _environment(report: Report) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in words.environment(report)
    )
    return (
        f'<section id="environment"><h2>Environment</h2><dl class="list">{rows}</dl>'
        f"<h2>Method</h2><p>{escape(words.METHOD)}</p></section>"
    )


def _notes(report: Report) -> str:
    items = "".join(f"<li>{_safe(note)}</li>" for note in report.notes)
    return f'<section id="notes"><h2>Notes</h2><ul>{items}</ul></section>'


def _verdict(report: Report, sections: Sequence[tuple[str, str]]) -> str:
    headline = words.headline(report, _case, escape)
    facts = [("head", words.commit(report.head)), ("base", words.commit(report.base))]
    facts += [("created", words.clean(report.created, 40)), ("took", f"{report.seconds:.0f} s")]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in sections)
    return (
        f'<header><div class="verdict {headline.tone}"><h1>Performance: '
        f'<span class="word">{headline.word.lower() if headline.word != "OK" else "OK"}</span></h1>'
        f'<p>{headline.text}</p><dl class="facts">{items}</dl></div>'
        f'<nav aria-label="Sections">{links}<a href="result.json">every sample (result.json)</a></nav></header>'
    )


def render(report: Report) -> str:
    """The report as one HTML document; it links to result.json beside it and to nothing else."""
    parts = [
        ("changes", "time", _changes, report.changes),
        ("counts", "counts", _counts, report.counts),
        ("ratios", "ratios", _ratios, report.ratios),
        ("notes", "notes", _notes, report.notes),
    ]
    present = [(name, title, write) for name, title, write, content in parts if content]
    present.append(("environment", "environment", _environment))
    title = f"Performance of {words.commit(report.head)}"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>"
        + _verdict(report, [(name, title) for name, title, _ in present])
        + "\n".join(write(report) for _, _, write in present)
        + "</main></body></html>\n"
    )
