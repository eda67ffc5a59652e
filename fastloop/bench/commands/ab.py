# SPDX-License-Identifier: Apache-2.0
"""`ab`: two revisions of a project, built and timed in turn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fastloop.bench import stats
from fastloop.bench.commands.findings import changes_table, write
from fastloop.bench.commands.shared import EXIT_CODES, OUTPUT, USAGE, VOID, fail, progress
from fastloop.bench.regression import ab, builds, revisions


def add(commands: Any) -> None:
    parser = commands.add_parser("ab", help="compare two revisions, built and timed in turn", epilog=EXIT_CODES)
    parser.add_argument("--base", required=True, metavar="REF", help="the revision to compare with")
    parser.add_argument("--head", metavar="REF", help="default: the working tree as it is")
    parser.add_argument("--cases", metavar="MODULE", help="module or file of cases; default: fastloop's own")
    parser.add_argument("-k", dest="pattern", metavar="PATTERN", help="part of a case's name, or a shell pattern")
    parser.add_argument(
        "--pairs", type=pairs, default=stats.PAIRS, metavar="N,N,...",
        help="counts of pairs after which a decided case is done; default: 20,40,80",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=ab.SECONDS, metavar="S", help="for measuring; default: %(default)g"
    )
    parser.add_argument("--no-rerun", action="store_true", help="what looks changed then stays INCONCLUSIVE")
    parser.add_argument("--no-install", action="store_true", help="import the sources, without pip install")
    # argparse would set the default here over what stands before the command.
    parser.add_argument("--output", type=Path, default=argparse.SUPPRESS, metavar="DIR", help=f"default: {OUTPUT}/ab")
    parser.set_defaults(run=_ab)


def pairs(text: str) -> tuple[int, ...]:
    """Counts of pairs, rising. Raises argparse.ArgumentTypeError."""
    try:
        counts = tuple(int(each) for each in text.split(","))
    except ValueError:
        counts = ()
    if not counts or counts[0] < ab.ROUND_PAIRS or list(counts) != sorted(set(counts)):
        raise argparse.ArgumentTypeError(f"wanted rising counts from {ab.ROUND_PAIRS} on, e.g. 20,40,80, got {text!r}")
    return counts


def _ab(console: Console, args: argparse.Namespace) -> int:
    asked = revisions.Asked(
        args.base,
        args.head,
        args.cases,
        args.pattern,
        args.pairs,
        not args.no_rerun,
        not args.no_install,
        args.seconds,
    )
    try:
        with progress() as tell:
            found = revisions.run(asked, OUTPUT.parent / "builds", tell)
    except (ab.NoCases, revisions.WrongUse) as error:
        fail(error)
        return USAGE
    except builds.BuildError as error:
        fail(error)
        return VOID
    console.print(changes_table(found))
    folder = args.output / "ab" if args.output == OUTPUT else args.output
    write(found, folder)
    console.print(Text(f"{found.seconds:.0f} s; report.md, report.html and result.json are in {folder}"))
    for note in found.notes:
        fail(note)
    return found.exit_code()
