# SPDX-License-Identifier: Apache-2.0
"""`compare`: judge a change by two result files."""

from __future__ import annotations

import argparse
import filecmp
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastloop.bench import compare, env, pytest_json, report, results, session, stats
from fastloop.bench.checks import WrongResult
from fastloop.bench.commands.shared import EXIT_CODES, NO_BASELINE, USAGE, fail, progress, style
from fastloop.bench.measure import FEWEST_PAIRS
from fastloop.bench.results import BadResult, Row, Run


def add(commands: Any) -> None:
    judge = commands.add_parser("compare", help="judge a change by two result files", epilog=EXIT_CODES)
    judge.add_argument("before", type=Path, metavar="A")
    judge.add_argument("after", type=Path, metavar="B")
    judge.add_argument("--confirm", type=Path, metavar="FILE", help="another result of B's build, taken as the rerun")
    judge.add_argument("--no-rerun", action="store_true", help="measure nothing: a change then stays INCONCLUSIVE")
    judge.set_defaults(run=_compare)


def _load_pair(args: argparse.Namespace) -> tuple[Run, Run, Run | None] | int:
    try:
        before = results.load(args.before)
    except BadResult as error:
        fail(error)
        return USAGE if args.before.exists() else NO_BASELINE
    try:
        return before, results.load(args.after), results.load(args.confirm) if args.confirm else None
    except BadResult as error:
        fail(error)
        return USAGE


def _rerun(after: Run, confirm: Run | None, allowed: bool, tell: Callable[[str, int], None]) -> compare.Rerun:
    """Where the 40 pairs that confirm a change come from: a file, this machine if it and the build are B's, nowhere."""
    if confirm is not None:
        quiet = confirm.control is not None and not confirm.void
        enough = [row for row in confirm.rows if quiet and len(row.ratios) >= FEWEST_PAIRS]
        known = {row.key: row.ratios for row in enough}
        return lambda row: known.get(row.key)
    here = env.environment().as_dict()
    if not (allowed and env.same_machine(here, after.environment) and env.same_build(here, after.environment)):
        return lambda row: None

    def measured(row: Row) -> Sequence[float] | None:
        again = session.rerun(row, stats.RERUN_PAIRS, tell)
        if again.status == "wrong":
            raise WrongResult(again.reason)
        return again.ratios or None

    return measured


def _confirms_itself(args: argparse.Namespace) -> bool:
    """Whether the file that shall confirm is one of the two, or a copy of one: then it says nothing new."""
    if args.confirm is None or not args.confirm.is_file():
        return False
    others = [path for path in (args.before, args.after) if path.is_file()]
    return any(filecmp.cmp(args.confirm, path, shallow=False) for path in others)


def _compare(console: Console, args: argparse.Namespace) -> int:
    if _confirms_itself(args):
        fail(f"[bench] --confirm wants another run of B's build, {args.confirm} is the same as A or B")
        return USAGE
    if pytest_json.recognised(args.before) or pytest_json.recognised(args.after):
        return _compare_pytest(console, args)
    loaded = _load_pair(args)
    if isinstance(loaded, int):
        return loaded
    before, after, confirm = loaded
    if not env.same_machine(before.environment, after.environment):
        console.print(
            Text("the two files come from different machines, threads or torch: the ratios may differ for that")
        )
    with progress() as tell:
        judgements = compare.compare(before, after, _rerun(after, confirm, not args.no_rerun, tell))
    _show(console, judgements, "new time / old time, by ratios")
    return compare.exit_code(judgements)


def _compare_pytest(console: Console, args: argparse.Namespace) -> int:
    """Two files of pytest-benchmark, and its kind of --confirm."""
    try:
        before = pytest_json.load(args.before)
    except BadResult as error:
        fail(error)
        return USAGE if args.before.exists() else NO_BASELINE
    try:
        after, confirm = pytest_json.load(args.after), pytest_json.load(args.confirm) if args.confirm else None
    except BadResult as error:
        fail(error)
        return USAGE
    judgements = pytest_json.compare(before, after, confirm)
    _show(console, judgements, "new time / old time, unpaired times of pytest-benchmark")
    return compare.exit_code(judgements)


def _show(console: Console, judgements: Sequence[compare.Judgement], title: str) -> None:
    table = Table("case", "verdict", "B over A", "98 % interval", "rerun", "note", title=title)
    for each in judgements:
        table.add_row(
            Text(each.key),
            Text(each.verdict.value if each.verdict else "-", style=style(each.verdict)),
            f"{each.change.median:.3f}" if each.change else "",
            report.interval(each.change) if each.change else "",
            f"{each.rerun.median:.3f}" if each.rerun else "",
            Text(each.note),
        )
    console.print(table)
