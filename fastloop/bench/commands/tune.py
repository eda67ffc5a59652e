# SPDX-License-Identifier: Apache-2.0
"""`tune`: find the fastest safe settings of a training on this machine."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastloop.bench.commands.shared import OK, USAGE, fail
from fastloop.extras import MissingExtra
from fastloop.tune import batch, everything, flags, loader, lr, memory
from fastloop.tune.memory import parts_table
from fastloop.tune.report import Report, Trial, check_file, described, trial_cells, unmeasured
from fastloop.tune.target import READY, Target, TargetError, from_config

BROKEN, INTERRUPTED = 6, 130
EXIT_CODES = 'exit codes: 0 an answer (also "keep yours"), 2 wrong use, 6 the target is broken'
KINDS = {
    "loader": (loader, "workers, prefetching, pinned memory"),
    "batch": (batch, "the batch size, or its split into micro-batches"),
    "flags": (flags, "precision, compilation, layouts, threads and the other options of Loop"),
    "memory": (memory, "where memory goes, and what each remedy gives"),
    "lr": (lr, "a learning rate, by a range test"),
    "all": (everything, "all of these, and one answer"),
}
OWN = ("effective_batch", "largest", "low", "high", "steps", "plot", "only", "max_error")  # of one kind each
_STYLES = {"ok": "", "skipped": "dim"}
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def add(commands: Any) -> None:
    tune = commands.add_parser("tune", help="find the fastest safe settings of a training", epilog=EXIT_CODES)
    kinds = tune.add_subparsers(dest="kind", required=True, metavar="|".join(KINDS))
    for kind, (_, what) in KINDS.items():
        parser = kinds.add_parser(kind, help=what, description=f"Find {what}.", epilog=EXIT_CODES)
        _add_common(parser, budget=180.0 if kind == "all" else 120.0)
        _add_own(parser, kind)
        parser.set_defaults(run=_tune)


def _add_common(parser: argparse.ArgumentParser, budget: float) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--target", metavar="MODULE:FUNCTION", help=f"returns what Loop takes; default: the ready {READY}"
    )
    where.add_argument(
        "--config", type=Path, metavar="FILE", help="a TOML file with target, [arguments], [loop] and [loader]"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE",
        help="a value in place of the file's, as in --set loop.precision=bf16; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=seconds, default=budget, metavar="TIME", help=f"of all trials; default: {budget:g}s"
    )
    parser.add_argument("--timeout", type=seconds, default=60.0, metavar="TIME", help="of one trial; default: 60s")
    parser.add_argument(
        "--apply", nargs="?", type=Path, const=True, metavar="FILE",
        help="write the answer into this TOML file; its other keys and comments stay; default: the one of --config",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole report")
    parser.add_argument("--fresh", action="store_true", help="measure, also where an answer of an earlier run holds")


def _add_own(parser: argparse.ArgumentParser, kind: str) -> None:
    if kind == "batch":
        parser.add_argument("--effective-batch", type=int, metavar="N", help="samples of one step; default: as now")
        parser.add_argument("--largest", type=int, metavar="N", help="no batch size above it")
    if kind == "lr":
        parser.add_argument("--low", type=float, metavar="LR", help="default: 1e-7")
        parser.add_argument("--high", type=float, metavar="LR", help="default: 10")
        parser.add_argument("--steps", type=int, metavar="N", help="default: 100")
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curve")
    if kind == "flags":
        parser.add_argument("--only", nargs="+", metavar="NAME", help="try these only")
        parser.add_argument(
            "--max-error", type=float, metavar="E",
            help="largest relative difference of the losses; default: none but rounding",
        )  # fmt: skip


def seconds(text: str) -> float:
    """120, 120s, 2m or 1h as seconds."""
    match = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text.strip())
    try:
        value = float(match[1]) * _UNITS[match[2]] if match else math.nan
    except (ValueError, KeyError):
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"wanted a time such as 90s or 2m, got {text!r}")
    return value


def _tune(console: Console, args: argparse.Namespace) -> int:
    try:
        target = _target(args)
        file = _file_to_apply_to(args, target)
        own = {name: getattr(args, name) for name in OWN if getattr(args, name, None) is not None}
        report = KINDS[args.kind][0](
            target, budget=args.budget, timeout=args.timeout, fresh=args.fresh, on_trial=_Line(), **own
        )
    except TargetError as error:
        if error.traceback:
            fail(error.traceback.rstrip())
        fail(error)
        if error.exit_code:
            fail(f"[tune] its process ended with exit code {error.exit_code}")
        return BROKEN
    except (ValueError, TypeError, OSError, MissingExtra) as error:
        if not isinstance(error, OSError) and not str(error).startswith("["):
            raise  # not one of ours
        fail(error)
        return USAGE
    except KeyboardInterrupt:
        fail("[tune] interrupted; its trials are ended")
        return INTERRUPTED
    show(console, report)
    try:
        return _write(console, report, file, args.json)
    except (ValueError, OSError) as error:
        fail(error)
        return USAGE


def _target(args: argparse.Namespace) -> Target:
    return from_config(args.config or {"target": args.target or READY}, args.set)


def _file_to_apply_to(args: argparse.Namespace, target: Target) -> Path | None:
    """Where the answer goes; asked before minutes are spent on it."""
    if args.apply is None:
        return None
    if args.apply is True and args.config is None:
        raise ValueError("[tune] --apply without a file writes into that of --config, which is not given; name a file")
    file: Path = args.config if args.apply is True else args.apply
    check_file(file, target.function)
    if args.config is None and file.exists():
        text = file.read_text(encoding="utf-8")
        others = unmeasured(text, str(file), target.arguments, target.options, target.loader)
        if others:
            raise ValueError(
                f"[tune] {file} has {', '.join(others)}, with which nothing would be measured; tune with --config "
                f"{file}, or name another file"
            )
    return file


def _write(console: Console, report: Report, file: Path | None, document: Path | None) -> int:
    if document is not None:
        document.parent.mkdir(parents=True, exist_ok=True)
        document.write_text(report.to_json(), encoding="utf-8")
        console.print(Text(f"written: {document}"))
    if file is not None:
        report.apply(file)
        console.print(Text(f"written: {file}"))
    return OK


class _Line:
    """A line on stderr for each trial."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, trial: Trial) -> None:
        self.count += 1
        tuner = trial.extra.get("tuner")
        rate = f"{trial.rate.median:,.0f} samples/s" if trial.rate is not None else ""
        parts = [described(trial.settings), trial.status, rate, trial.reason]
        fail(f"{self.count:3}  {f'{tuner}: ' if tuner else ''}{', '.join(part for part in parts if part)}")


# ---- tables


def show(console: Console, report: Report) -> None:
    """Every trial, what was found, and what to do."""
    title = f"{report.kind}: {report.target}" + (", of an earlier run here (--fresh measures again)" * report.cached)
    table = Table(title=Text(title), title_justify="left")
    tuners = any("tuner" in each.extra for each in report.trials)
    for name in ["tuner"] * tuners + ["settings"]:
        table.add_column(name, overflow="fold")
    for name in ("samples/s", "98 % interval", "waiting", "peak MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", overflow="fold")
    for trial in report.trials:
        head = [str(trial.extra.get("tuner", ""))] * tuners
        table.add_row(*map(Text, [*head, *trial_cells(trial)]), _status(trial, report))
    console.print(table)
    if parts := parts_table(report):
        console.print(Text(f"{parts}\n"))
    for finding in report.findings:
        console.print(Text(f"- {finding}"))
    console.print(Text(report.summary(), style="bold" if report.keep else "bold green"))
    if not report.keep:
        console.print(Text(f"\n{report.snippet()}\n"))
    console.print(Text(f"{report.seconds:.0f} s on {report.fingerprint}", style="dim"))


def _status(trial: Trial, report: Report) -> Text:
    mark = "best" if trial is report.best and not report.keep else "present" if trial is report.present else ""
    words = ": ".join(part for part in (trial.status, trial.reason) if part)
    text = Text(words, style=_STYLES.get(trial.status, "red"))
    return text.append(f"  {mark}", style="bold green" if mark == "best" else "bold") if mark else text
