# SPDX-License-Identifier: Apache-2.0
"""A run as tables for the terminal and as Markdown for a file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastloop.bench import saving
from fastloop.bench.contenders import CONTENDERS
from fastloop.bench.loop_cases import GROUP as LOOP
from fastloop.bench.loops import LOOPS
from fastloop.bench.results import Row, Run
from fastloop.bench.stats import Interval

COLUMNS = (
    "case",
    "against",
    "ratio",
    "98 % interval",
    "goal",
    "ours",
    "peer",
    "GB/s",
    "of ceiling",
    "our peak",
    "peer's",
    "ours - peer",
)
TITLES = {
    **{name: each.title for name, each in CONTENDERS.items()},
    **{name: each.title for name, each in LOOPS.items()},
    **saving.TITLES,
}
HOT_BYTES = 2**24  # parameters, gradients and states that a shared cache holds from one step to the next

FOOTNOTE = (
    "ratio: the peer's time over ours, median of paired samples. GB/s: the bytes that the step cannot avoid moving, "
    "over our time. of ceiling: that, over what this machine moved through as many streams in the same run. "
    "our peak, peer's: memory of parameters, gradients, states and temporaries. "
    "hot: the data fit in a cache and are found there."
)


def seconds(value: float) -> str:
    """Three significant digits in a unit that fits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def interval(value: Interval) -> str:
    return f"{value.low:.3g} .. {value.high:.3g}"


def _peak(memory: dict[str, int] | None) -> str:
    return "" if memory is None else size(memory["resident_bytes"] + memory["transient_bytes"])


def peer_lines(rows: Sequence[Row]) -> list[str]:
    """What the names of the peers in `rows` stand for."""
    names = dict.fromkeys(row.peer for row in rows if row.peer in TITLES)
    return [f"{name} = {TITLES[name]}" for name in names]


def _goal(row: Row, void: bool) -> str:
    if row.goal is None and row.cost_goal is None:
        return ""
    goal = f"{row.goal:.3g}x" if row.cost_goal is None else f"under {seconds(row.cost_goal)}"
    return f"{goal} " + ("(void)" if void else "reached" if row.reached() else "MISSED")


def cells(row: Row, void: bool = False) -> tuple[str, ...]:
    """One row as texts under COLUMNS; one without a ratio says why under the third, a void run judges no goal."""
    if row.ratio is None:
        return (row.case, row.peer, row.status, *[""] * (len(COLUMNS) - 3))
    hot = row.ours_memory is not None and row.ours_memory["resident_bytes"] < HOT_BYTES
    ceiling = "" if row.ceiling is None else f"{row.ceiling.median:.0%} of {row.ceiling_gbps:.3g}"
    return (
        row.case,
        row.peer,
        f"{row.ratio.median:.3g}x",
        interval(row.ratio),
        _goal(row, void),
        seconds(median(row.ours_seconds)),
        seconds(median(row.peer_seconds)),
        f"{row.gbps:.3g}" if row.bytes else "",
        f"{ceiling} hot".strip() if hot else ceiling,
        _peak(row.ours_memory),
        _peak(row.peer_memory),
        "" if row.cost is None else f"{seconds(row.cost.median)} ({seconds(row.cost.low)} .. {seconds(row.cost.high)})",
    )


def _style(row: Row) -> str:
    if row.status == "wrong":
        return "bold red"
    if row.ratio is not None and row.ratio.low > 1:
        return "green"
    return "red" if row.ratio is not None and row.ratio.high < 1 else ""


def notes(run: Run) -> list[str]:
    """What a reader of the table has to know: skipped rows, wrong results, a control that moved, torch's norm."""
    skipped: dict[str, list[str]] = {}
    for row in run.rows:
        if row.status == "skipped":
            skipped.setdefault(row.reason, []).append(row.key)
    result = [f"skipped: {', '.join(keys)}: {reason}" for reason, keys in skipped.items()]
    result += [f"WRONG RESULT, not timed: {message}" for message in run.wrong]
    load, cores = run.environment.get("load", 0.0), run.environment.get("cores", 1)
    if load > cores / 2:
        result.append(
            f"the machine was busy when this began: load {load:.1f} on {cores} cores; measure again when quiet"
        )
    result += [
        f"{row.key}: the interval is wide, time was up after {len(row.ratios)} pairs"
        for row in run.rows
        if row.stopped == "deadline"
    ]
    methods = {row.ceiling_method for row in run.rows if row.ceiling_method}
    if "torch" in methods:
        result.append("no native module: the ceiling was measured with torch operations, one stream after another")
    norms = {row.title: row.norm_error for row in run.rows if row.norm_error is not None and row.norm_error > 1e-4}
    result += [
        f"{title}: torch's gradient norm is off by {error:.2%} (fp64 is exact)" for title, error in norms.items()
    ]
    if run.control is not None and run.control.ratio is not None:
        ratio = run.control.ratio
        text = f"control, torch against itself: {ratio.median:.3f} ({interval(ratio)})"
        result.append(text + ("; VOID: it moved by more than 2 %, the machine was not quiet" if run.void else ""))
    return result


def training_lines(training: dict[str, Any]) -> list[str]:
    """The training in words and numbers."""
    if training["status"] == "skipped":
        return [f"training was skipped: {training['reason']}"]
    step, update, rate = training["step"], training["update"], training["samples_per_second"]
    lines = [
        f"character-level GPT, {training['parameters']:,} parameters in {training['tensors']} tensors, "
        f"{training['steps']} steps of {training['batch']} x {training['context']} characters of the standard library",
    ]
    for name, part in (("whole step", step), ("of it clip + optimizer", update)):
        lines.append(
            f"{name}: torch {seconds(part['torch_seconds'])}, fastloop {seconds(part['fastloop_seconds'])}, "
            f"ratio {part['ratio']:.3g} ({part['low']:.3g} .. {part['high']:.3g})"
        )
    lines.append(f"samples per second: torch {rate['torch']:.0f}, fastloop {rate['fastloop']:.0f}")
    lines.append(
        f"loss {training['first_loss']:.4f} -> torch {training['last_loss']['torch']:.6f}, fastloop "
        f"{training['last_loss']['fastloop']:.6f}; largest difference {training['largest_difference']:.1e}, "
        f"bound at the end {training['bound']:.1e}: " + ("the curves agree" if training["status"] == "ok" else "WRONG")
    )
    return lines if training["status"] == "ok" else [*lines, training["reason"]]


def environment_pairs(environment: dict[str, Any]) -> list[tuple[str, str]]:
    """The environment as (name, text)."""
    texts = {name: str(value) for name, value in environment.items() if name != "backends"}
    for name in ("memory_bytes", "available_bytes"):
        texts[name] = size(environment[name])
    texts["backends"] = "; ".join(f"{name}: {text}" for name, text in environment["backends"].items())
    return [(name.removesuffix("_bytes").replace("_", " "), text) for name, text in texts.items()]


def environment_table(environment: dict[str, Any]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in environment_pairs(environment):
        table.add_row(name, Text(text))
    return table


def shown(run: Run) -> list[Row]:
    """The rows of the table; the control and what was skipped are among the notes."""
    return [row for row in run.rows if row.group != "control" and row.status != "skipped"]


def tables(run: Run) -> Iterator[tuple[str, list[str], list[Row], list[tuple[str, ...]]]]:
    """(title, columns, rows, their cells) of each kind of case, without the columns that nothing is in."""
    for title, loops in (("clip + step", False), ("whole loops", True)):
        rows = [row for row in shown(run) if (row.group == LOOP) is loops]
        lines = [cells(row, run.void) for row in rows]
        kept = [index for index in range(len(COLUMNS)) if any(line[index] for line in lines)]
        if rows:
            yield title, [COLUMNS[i] for i in kept], rows, [tuple(line[i] for i in kept) for line in lines]


def table(
    title: str, columns: Sequence[str], rows: Sequence[Row], lines: Sequence[tuple[str, ...]], void: bool = False
) -> Table:
    """One of `tables`, its rows green where ours is surely faster and red where it is surely slower."""
    result = Table(title=title, title_justify="left")
    for name in columns:
        result.add_column(name, justify="left" if name in COLUMNS[:2] else "right", overflow="fold")
    for row, line in zip(rows, lines, strict=True):
        result.add_row(*(Text(cell) for cell in line), style="" if void and row.ratio else _style(row))
    return result


def render(run: Run) -> RenderableType:
    """The whole report for a terminal."""
    parts: list[RenderableType] = [table(*each, run.void) for each in tables(run)]
    parts += [Text(line, style="dim") for line in [*peer_lines(run.rows), FOOTNOTE]]
    parts += [Text(f"- {note}", style="bold red" if "WRONG" in note or "VOID" in note else "") for note in notes(run)]
    if run.training is not None:
        style = "bold red" if run.training["status"] == "wrong" else ""
        parts += [Text(), *(Text(line, style=style) for line in training_lines(run.training))]
    return Group(*parts)


def markdown(run: Run, plots: Sequence[str] = ()) -> str:
    """The whole report as Markdown; `plots` are file names next to it."""
    lines = [f"# fastloop bench, {run.created}", "", f"{run.seconds:.0f} s in all.", "", "## Environment", ""]
    lines += [f"- {name}: {text}" for name, text in environment_pairs(run.environment)]
    for title, columns, _, contents in tables(run):
        lines += ["", f"## {title.capitalize()}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in contents]
    lines += [
        "",
        textwrap.fill(FOOTNOTE, 110),
        "",
        *(f"- {line}" for line in peer_lines(shown(run))),
        *(f"- {note}" for note in notes(run)),
    ]
    if run.training is not None:
        lines += ["", "## Training", "", *(f"- {line}" for line in training_lines(run.training))]
    lines += [""] + [f"![{name}]({name})" for name in plots]
    return "\n".join(lines).rstrip() + "\n"


def print_stream(console: Console, rows: Sequence[tuple[str, float, str]]) -> None:
    """The measured ceilings: pattern, GB/s, how it was measured."""
    result = Table(title="memory ceiling", title_justify="left")
    for name in ("streams", "GB/s", "measured with"):
        result.add_column(name, justify="right" if name == "GB/s" else "left")
    for pattern, gbps, method in rows:
        result.add_row(pattern, f"{gbps:.3g}", method)
    console.print(result)
