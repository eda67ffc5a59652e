# SPDX-License-Identifier: Apache-2.0
"""`claims`: the figures of training guides, each tried here."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastloop.bench import claims
from fastloop.bench.claims import Row, Verdict
from fastloop.bench.commands.shared import EXIT_CODES, OK, USAGE, WRONG, fail, progress

STYLES = {
    Verdict.HOLDS: "green",
    Verdict.PARTLY: "yellow",
    Verdict.FAILS: "red",
    Verdict.WRONG: "bold red",
    Verdict.ERROR: "bold red",
}


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "claims", help="figures that training guides promise, each tried here", epilog=EXIT_CODES
    )
    parser.add_argument("-k", dest="pattern", metavar="PATTERN", help="part of a claim's name, or a shell pattern")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the environment")
    parser.add_argument(
        "--budget", type=_seconds, default=claims.BUDGET, metavar="SECONDS",
        help=f"after which no further claim is tried; default: {claims.BUDGET:.0f}, for a machine with 2 quiet CPUs",
    )  # fmt: skip
    parser.set_defaults(run=_claims)


def _seconds(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"wanted seconds above 0, e.g. 80, got {text!r}")
    return seconds


def _claims(console: Console, args: argparse.Namespace) -> int:
    chosen = claims.select(args.pattern)
    if not chosen:
        fail(f"[bench claims] no claim matches {args.pattern!r}; claims: {', '.join(c.name for c in claims.CLAIMS)}")
        return USAGE
    if args.json is not None and not args.json.resolve().parent.is_dir():
        fail(f"[bench claims] --json {args.json}: there is no folder {args.json.parent}; make it first")
        return USAGE
    with progress() as tell:
        tell(chosen[0].name, 0)
        done: list[Row] = []

        def on_row(row: Row) -> None:
            done.append(row)
            if len(done) < len(chosen):
                tell(chosen[len(done)].name, len(done))

        rows = claims.run(chosen, on_row, args.budget)
    console.print(table(rows))
    console.print(Text(summary(rows)))
    if args.json is not None:
        args.json.write_text(json.dumps(claims.document(rows), indent=1) + "\n", encoding="utf-8")
        console.print(Text(f"written: {args.json}"))
    return WRONG if any(row.finding.verdict is Verdict.WRONG for row in rows) else OK


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title="claims", title_justify="left", padding=(0, 1), show_lines=False)
    for name in ("claim", "about", "claimed", "measured here", "verdict", "device"):
        shown.add_column(name, no_wrap=name == "claim", overflow="fold")
    for row in rows:
        found = row.finding
        verdict = Text(found.verdict.value, style=STYLES.get(found.verdict, ""))
        note = "" if found.note == row.device else found.note
        words = found.measured if not note else note if found.measured == "-" else f"{found.measured}\n{note}"
        shown.add_row(row.claim.name, row.claim.about, row.claim.claimed, Text(words), verdict, row.device)
    return shown


def summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.finding.verdict.value for row in rows)
    return f"{len(rows)} claims in {sum(row.seconds for row in rows):.0f} s: " + ", ".join(
        f"{count} {name}" for name, count in counts.items()
    )
