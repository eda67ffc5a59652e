# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments in, tables and files out, an exit code."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fastloop.bench import (
    aot,
    cases,
    ceiling,
    compare,
    env,
    gpu,
    gpu_record,
    guard,
    measure,
    plots,
    report,
    results,
    session,
    stats,
)
from fastloop.bench.checks import WrongResult
from fastloop.bench.contenders import CONTENDERS
from fastloop.bench.loops import LOOPS
from fastloop.bench.results import BadResult, Row, Run
from fastloop.bench.stats import Verdict

OK, REGRESSION, USAGE, WRONG, VOID, NO_BASELINE = range(6)
EXIT_CODES = (
    "exit codes: 0 ok or inconclusive, 1 regression, 2 usage, 3 wrong result, 4 environment void, 5 no baseline"
)
OUTPUT = Path(".fastloop") / "bench"
WIDTH_OF_A_FILE = 150  # not a terminal: nothing to fold for

_STYLES = {
    Verdict.REGRESSED: "bold red",
    Verdict.VOID: "yellow",
    Verdict.IMPROVED: "bold green",
    Verdict.PASS: "green",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastloop.bench",
        description="Measure clip + optimizer step, and whole loops, on this machine. No command: about a minute.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help=f"default: {OUTPUT}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("env", help="show the environment")
    commands.add_parser("list", help="list cases and peers, and what is missing here")
    commands.add_parser("stream", help="measure the memory ceiling")
    run = commands.add_parser("run", help="measure cases against every peer", epilog=EXIT_CODES)
    run.add_argument("-k", dest="pattern", metavar="PATTERN", help="part of a case's name, or a shell pattern")
    run.add_argument(
        "--quick", action="store_true", help="headline peer only, 20 pairs; small cases unless -k is given"
    )
    run.add_argument("--json", type=Path, metavar="FILE", help="also write the compact result, fit to be committed")
    run.add_argument("--plot", action="store_true", help="write plots too")
    judge = commands.add_parser("compare", help="judge a change by two result files", epilog=EXIT_CODES)
    judge.add_argument("before", type=Path, metavar="A")
    judge.add_argument("after", type=Path, metavar="B")
    judge.add_argument("--confirm", type=Path, metavar="FILE", help="another result of B's build, taken as the rerun")
    judge.add_argument("--no-rerun", action="store_true", help="measure nothing: a change then stays INCONCLUSIVE")
    watch = commands.add_parser(
        "guard", help="results, allocations and ratios against committed floors", epilog=EXIT_CODES
    )
    watch.add_argument("--floors", type=Path, default=guard.DEFAULT_FLOORS, metavar="FILE")
    card = commands.add_parser("gpu", help="measure the GPU backends on this machine's GPU", epilog=EXIT_CODES)
    card.add_argument("-k", dest="pattern", metavar="PATTERN", help="part of a row's name")
    card.add_argument("--results", type=Path, default=gpu.RESULTS, metavar="DIR", help="default: benchmarks/results")
    card.add_argument("--commit", metavar="HASH", help="of this build, where the checkout is not a repository")
    ahead = commands.add_parser(
        "aot", help="GPU kernels compiled without a GPU: registers, spills, 128-bit accesses", epilog=EXIT_CODES
    )
    what = ahead.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail where they are worse than the golden file")
    what.add_argument("--update", action="store_true", help="rewrite the golden file")
    ahead.add_argument("--arch", type=int, nargs="+", default=aot.ARCHITECTURES, metavar="N", help="default: 80 90 100")
    ahead.add_argument("--backend", choices=("cuda", "triton"), nargs="+", default=("cuda", "triton"))
    ahead.add_argument("--golden", type=Path, default=aot.GOLDEN, metavar="FILE")
    return parser


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """A line on the terminal with what is being measured; silent where stderr is not one."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Four times a second: the display is a thread, and must not be what is measured.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=4
    ) as bar:
        task = bar.add_task("starting")
        yield lambda text, count: bar.update(task, description=f"{text}, {count} done" if count else text)


def _fail(message: object) -> None:
    print(message, file=sys.stderr)


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
        _fail(f"[bench] no case matches {options.pattern!r}; `python -m fastloop.bench list` shows them")
        return USAGE
    console.print(report.environment_table(env.environment().as_dict()))
    with _progress() as progress:
        run = session.measure(options, progress)
    console.print(report.render(run))
    folder, missing = _write(run, args.output, plot)
    if getattr(args, "json", None) is not None:
        results.save(run, args.json, compact=True)
    console.print(Text(f"\n{run.seconds:.0f} s; samples, report and plots are in {folder}"))
    for message in run.wrong:
        _fail(message)
    if missing:
        _fail(missing)
    if run.wrong:
        return WRONG
    return USAGE if missing and getattr(args, "plot", False) else OK


def _load_pair(args: argparse.Namespace) -> tuple[Run, Run, Run | None] | int:
    try:
        before = results.load(args.before)
    except BadResult as error:
        _fail(error)
        return USAGE if args.before.exists() else NO_BASELINE
    try:
        return before, results.load(args.after), results.load(args.confirm) if args.confirm else None
    except BadResult as error:
        _fail(error)
        return USAGE


def _rerun(after: Run, confirm: Run | None, allowed: bool, progress: Callable[[str, int], None]) -> compare.Rerun:
    """Where the 40 pairs that confirm a change come from: a file, this machine if it and the build are B's, nowhere."""
    if confirm is not None:
        known = {} if confirm.void else {row.key: row.ratios for row in confirm.rows if row.ratios}
        return lambda row: known.get(row.key)
    here = env.environment().as_dict()
    if not (allowed and env.same_machine(here, after.environment) and env.same_build(here, after.environment)):
        return lambda row: None

    def measured(row: Row) -> Sequence[float] | None:
        again = session.rerun(row, stats.RERUN_PAIRS, progress)
        if again.status == "wrong":
            raise WrongResult(again.reason)
        return again.ratios or None

    return measured


def _compare(console: Console, args: argparse.Namespace) -> int:
    loaded = _load_pair(args)
    if isinstance(loaded, int):
        return loaded
    before, after, confirm = loaded
    if not env.same_machine(before.environment, after.environment):
        console.print(
            Text("the two files come from different machines, threads or torch: the ratios may differ for that")
        )
    with _progress() as progress:
        judgements = compare.compare(before, after, _rerun(after, confirm, not args.no_rerun, progress))
    table = Table(
        "case",
        "verdict",
        "B over A",
        "98 % interval",
        "rerun",
        "note",
        title="new time / old time, by ratios",
    )
    for each in judgements:
        table.add_row(
            each.key,
            Text(
                each.verdict.value if each.verdict else "-",
                style=_STYLES.get(each.verdict, "") if each.verdict else "",
            ),
            f"{each.change.median:.3f}" if each.change else "",
            report.interval(each.change) if each.change else "",
            f"{each.rerun.median:.3f}" if each.rerun else "",
            each.note,
        )
    console.print(table)
    return compare.exit_code(judgements)


def _guard(console: Console, args: argparse.Namespace) -> int:
    with _progress() as progress:
        findings = guard.guard(guard.load_floors(args.floors), progress)
    table = Table("case", "verdict", "what", title="guard", title_justify="left")
    for each in findings:
        verdict = "WRONG RESULT" if each.wrong else each.verdict.value if each.verdict else "-"
        style = "bold red" if each.wrong else _STYLES.get(each.verdict, "") if each.verdict else ""
        table.add_row(each.name, Text(verdict, style=style), Text(each.text))
    console.print(table)
    return guard.exit_code(findings)


def _aot_table(kernels: aot.Kernels, golden: aot.Kernels) -> Table:
    columns = ("registers", "golden", "stack", "local", "128-bit loads", "narrower", "128-bit stores", "narrower")
    table = Table("kernel", *columns, title="machine code", title_justify="left")
    for key, code in kernels.items():
        if aot.is_representative(key):
            before = str(golden[key].registers) if key in golden else ""
            counts = (code.loads_128, code.loads_narrow, code.stores_128, code.stores_narrow)
            table.add_row(Text(key), str(code.registers), before, str(code.stack), str(code.local), *map(str, counts))
    return table


def _aot(console: Console, args: argparse.Namespace) -> int:
    golden, known = aot.load(args.golden) if args.check or args.golden.exists() else ({}, {})
    kernels, compilers = aot.measure(args.backend, args.arch)
    console.print(_aot_table(kernels, golden))
    chosen = {key: code for key, code in kernels.items() if aot.is_representative(key)}
    console.print(Text(f"{len(kernels)} kernels compiled, {len(chosen)} of them shown"))
    bad = list(aot.faults(kernels))
    if args.check:
        others = {name: version for name, version in compilers.items() if known.get(name) != version}
        worse = list(aot.differences(chosen, aot.part(golden, args.backend, args.arch)))
        for message in bad + worse:
            _fail(message)
        if others and worse and not bad:
            _fail(f"[bench aot] the golden file is of {known}, these kernels of {compilers}: not comparable")
            return VOID
        return REGRESSION if bad or worse else OK
    for message in bad:
        _fail(message)
    if args.update and not bad:
        kept = golden.keys() - aot.part(golden, args.backend, args.arch).keys()
        document = aot.to_json({key: golden[key] for key in kept} | chosen, known | compilers)
        args.golden.write_text(document, encoding="utf-8")
        console.print(Text(f"written: {args.golden}"))
    return REGRESSION if bad else OK


def _gpu(console: Console, args: argparse.Namespace) -> int:
    specs = gpu.select(args.pattern)
    if not specs:
        _fail(f"[bench gpu] no row matches {args.pattern!r}; rows: {', '.join(spec.name for spec in gpu.SPECS)}")
        return USAGE
    with _progress() as progress:
        bench = gpu.Bench(torch.device("cuda", 0), progress=progress)
        run = gpu.measure_all(bench, args.commit, specs, lambda row: console.print(Text(gpu_record.line(row))))
    console.print(Text(f"{run.seconds:.0f} s; written: {gpu_record.save(run, args.results)}"))
    if run.void:
        _fail("[bench gpu] the control moved by more than 2 %: the machine was not quiet, measure again")
    if any(row.status == "wrong" for row in run.rows):
        return WRONG
    return VOID if run.void else OK


def _dispatch(console: Console, args: argparse.Namespace) -> int:
    if args.command is None:
        return _measure(console, session.default_options(), args, plot=True)
    if args.command == "run":
        build = session.quick_options if args.quick else session.full_options
        return _measure(console, build(args.pattern), args, plot=args.plot)
    if args.command == "env":
        console.print(report.environment_table(env.environment().as_dict()))
        return OK
    if args.command == "list":
        return _list(console)
    if args.command == "stream":
        return _stream(console)
    if args.command == "aot":
        return _aot(console, args)
    if args.command == "gpu":
        return _gpu(console, args)
    return _compare(console, args) if args.command == "compare" else _guard(console, args)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. argparse itself exits with 2 on wrong usage."""
    args = _parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_FILE)
    try:
        return _dispatch(console, args)
    except WrongResult as error:
        _fail(error)
        return WRONG
    except (guard.NoBaseline, aot.NoGolden) as error:
        _fail(error)
        return NO_BASELINE
    except aot.DoesNotCompile as error:
        _fail(error)
        return REGRESSION
    except (aot.Unavailable, gpu.NoDevice) as error:
        _fail(error)
        return VOID
