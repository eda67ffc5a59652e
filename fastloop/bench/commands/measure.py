# SPDX-License-Identifier: Apache-2.0
"""The commands that measure cases: the default, `run`, `list`, `stream`."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastloop.bench import cases, ceiling, env, measure, plots, report, results, session
from fastloop.bench.commands.shared import EXIT_CODES, OK, USAGE, WRONG, fail, progress
from fastloop.bench.contenders import CONTENDERS
from fastloop.bench.loops import LOOPS
from fastloop.bench.results import Run


def add(commands: Any) -> None:
    listing = commands.add_parser("list", help="list cases and peers, and what is missing here")
    listing.set_defaults(run=lambda console, args: _list(console))
    stream = commands.add_parser("stream", help="measure the memory ceiling")
    stream.set_defaults(run=lambda console, args: _stream(console))
    run = commands.add_parser("run", help="measure cases against every peer", epilog=EXIT_CODES)
    run.add_argument("-k", dest="pattern", metavar="PATTERN", help="part of a case's name, or a shell pattern")
    run.add_argument(
        "--quick", action="store_true", help="headline peer only, 20 pairs; small cases unless -k is given"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="also write the compact result, fit to be committed")
    run.add_argument("--plot", action="store_true", help="write plots too")
    run.set_defaults(run=_run)


def default(console: Console, args: argparse.Namespace) -> int:
    """No command: about a minute."""
    return _measure(console, session.default_options(), args, plot=True)


def _run(console: Console, args: argparse.Namespace) -> int:
    build = session.quick_options if args.quick else session.full_options
    return _measure(console, build(args.pattern), args, plot=args.plot)


def _list(console: Console) -> int:
    table = Table("case", "what", "tensors", "elements", "must move", "peers", title="cases", title_justify="left")
    for case in cases.CASES:
        shapes = case.build.args[0] if hasattr(case.build, "args") else ()
        moves = f"{report.size(case.traffic.bytes)}, {case.traffic.bytes_per_element} B each"
        table.add_row(
            case.name, case.title, str(len(shapes)), f"{case.traffic.elements:,}", moves, str(len(case.peers))
        )
    for loop_case in session.LOOP_CASES:
        table.add_row(loop_case.name, loop_case.title, "", "", "", str(len(loop_case.peers)))
    table.add_row(session.TRAINING, "training a character-level GPT", "", "", "", "1")
    console.print(table)
    peers = Table("contender", "what", "here", title="contenders", title_justify="left")
    for contender in CONTENDERS.values():
        peers.add_row(contender.name, Text(contender.title), Text(contender.unavailable(1) or "yes"))
    for loop in LOOPS.values():
        peers.add_row(loop.name, Text(loop.title), Text(loop.unavailable() or "yes"))
    console.print(peers)
    return OK


def _stream(console: Console) -> int:
    rows = []
    for name, traffic in ceiling.streams().items():
        top = ceiling.build(traffic)
        with measure.quiet_interpreter():
            repetitions = measure.calibrate(top.run)
            times = [measure.sample(top.run, repetitions) for _ in range(10)]
        rows.append((name, top.bytes / median(times) * 1e-9, top.method))
    report.print_stream(console, rows)
    return OK


def _write(run: Run, base: Path, plot: bool) -> tuple[Path, str]:
    """Raw samples, Markdown and plots; returns the folder and what is missing from it."""
    folder, names, missing = session.folder(base, run), [], ""
    results.save(run, folder / "result.json")
    if plot:
        try:
            names = plots.write(run, folder)
        except plots.MissingExtra as error:
            missing = str(error)
    (folder / "report.md").write_text(report.markdown(run, names), encoding="utf-8")
    return folder, missing


def _measure(console: Console, options: session.Options, args: argparse.Namespace, *, plot: bool) -> int:
    chosen, train = session.selected(options)
    if not chosen and not train:
        fail(f"[bench] no case matches {options.pattern!r}; `python -m fastloop.bench list` shows them")
        return USAGE
    console.print(report.environment_table(env.environment().as_dict()))
    with progress() as tell:
        run = session.measure(options, tell)
    console.print(report.render(run))
    folder, missing = _write(run, args.output, plot)
    if getattr(args, "json", None) is not None:
        results.save(run, args.json, compact=True)
    console.print(Text(f"\n{run.seconds:.0f} s; samples, report and plots are in {folder}"))
    for message in run.wrong:
        fail(message)
    if missing:
        fail(missing)
    if run.wrong:
        return WRONG
    return USAGE if missing and getattr(args, "plot", False) else OK
