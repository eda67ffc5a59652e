# SPDX-License-Identifier: Apache-2.0
"""`ci`: what a pull request must not make worse."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastloop.bench.commands.findings import NOTE, changes_table, ratios_table, write
from fastloop.bench.commands.shared import EXIT_CODES, NO_BASELINE, OUTPUT, USAGE, VOID, fail, progress
from fastloop.bench.regression import builds, ci, record, words
from fastloop.bench.regression.ab import NoCases
from fastloop.bench.regression.evidence import CountingError, NoEvidence
from fastloop.bench.regression.floors import NoFloors
from fastloop.bench.regression.revisions import WrongUse


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "ci", help="for pull requests: counts, ratios against floors, and the base revision", epilog=EXIT_CODES
    )
    parser.add_argument("--base", metavar="REF", help="also compare with this revision")
    parser.add_argument("--cases", metavar="MODULE", help="module or file of cases; default: fastloop's own")
    parser.add_argument("--floors", type=Path, metavar="FILE", help=f"default: {ci.FLOORS}")
    parser.add_argument("--evidence", type=Path, metavar="FILE", help=f"default: {ci.EVIDENCE}")
    parser.add_argument("--update", action="store_true", help="write the counts into the file of evidence")
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=ci.SECONDS,
        metavar="S",
        help="for timing both revisions; default: %(default)g",
    )
    parser.add_argument("--no-install", action="store_true", help="import both revisions' sources, without pip install")
    # argparse would set the default here over what stands before the command.
    parser.add_argument("--output", type=Path, default=argparse.SUPPRESS, metavar="DIR", help=f"default: {OUTPUT}/ci")
    parser.set_defaults(run=_ci)


def seconds(text: str) -> float:
    """Raises argparse.ArgumentTypeError: not a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted seconds above 0, got {text!r}")
    return value


def _ci(console: Console, args: argparse.Namespace) -> int:
    folder = args.output / "ci" if args.output == OUTPUT else args.output
    request = ci.Request(
        args.base, args.cases, args.floors, args.evidence, args.update, not args.no_install, args.seconds
    )
    try:
        with progress() as tell:
            found = ci.Guard(request, tell).run()
    except (NoEvidence, NoFloors) as error:
        fail(error)
        return NO_BASELINE
    except (NoCases, WrongUse) as error:
        fail(error)
        return USAGE
    except (builds.BuildError, CountingError) as error:
        fail(error)
        return VOID
    show(console, found)
    write(found, folder)
    console.print(Text(f"{found.seconds:.0f} s; report.md, report.html and result.json are in {folder}"))
    return found.exit_code(void=0)


def show(console: Console, found: record.Report) -> None:
    """Tables, notes, and the verdict last."""
    counts = Table("case", "count", "", "value", "allowed", "base", "note", title="counts", title_justify="left")
    for each in sorted(found.counts, key=lambda count: not count.failed):
        look = "bold red" if each.failed else "dim" if each.value is None else ""
        numbers = map(words.number, (each.value, each.allowed, each.base))
        counts.add_row(
            Text(each.case), each.what, Text(words.outcome(each), look), *numbers, Text(words.clean(each.note, NOTE))
        )
    console.print(counts)
    if found.ratios:
        console.print(ratios_table(found))
    if found.changes:
        console.print(changes_table(found))
    for note in found.notes:
        console.print(Text(note))
    headline = words.headline(found, str, str)
    console.print(Text(f"{headline.word}: {headline.text}"))
