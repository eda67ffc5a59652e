# SPDX-License-Identifier: Apache-2.0
"""What `ab` and `ci` show and write of a report."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table
from rich.text import Text

from fastloop.bench import report
from fastloop.bench.commands.shared import style
from fastloop.bench.regression import html, markdown, record, words
from fastloop.bench.stats import Verdict

NOTE = 160  # characters of a note that a table shows; the files have all of it


def write(found: record.Report, folder: Path) -> None:
    """report.md, report.html and result.json."""
    record.save(found, folder / "result.json")
    (folder / "report.md").write_text(markdown.render(found), encoding="utf-8")
    (folder / "report.html").write_text(html.render(found), encoding="utf-8")


def verdict_text(each: record.Change | record.Ratio) -> Text:
    """The verdict in its colour."""
    if each.wrong:
        return Text("WRONG RESULT", style="bold red")
    return Text(each.verdict.value if each.verdict else "-", style=style(each.verdict))


def changes_table(found: record.Report) -> Table:
    """A line for each case."""
    title = f"{found.head} over {found.base}: head's time / base's"
    table = Table("case", "verdict", "median", "98 % interval", "rerun", "pairs", "note", title=title)
    for each in found.changes:
        quiet = each.control and each.verdict is Verdict.PASS
        table.add_row(
            Text(each.case),
            Text("quiet", style=style(each.verdict)) if quiet else verdict_text(each),
            f"{each.interval.median:.3f}" if each.interval else "",
            report.interval(each.interval) if each.interval else "",
            f"{each.rerun.median:.3f}" if each.rerun else "",
            str(each.pairs or ""),
            Text(each.note),
        )
    return table


def ratios_table(found: record.Report) -> Table:
    """A line for each ratio."""
    table = Table(
        "case", "against", "verdict", "ratio", "98 % interval", "floor", "note",
        title="the peer's time over ours", title_justify="left",
    )  # fmt: skip
    for each in found.ratios:
        table.add_row(
            Text(each.case),
            Text(each.peer),
            verdict_text(each),
            words.factor(each.interval.median) if each.interval else "",
            report.interval(each.interval) if each.interval else "",
            f"{each.floor:g}" if each.floor else "",
            Text(words.clean(each.note, NOTE)),
        )
    return table
