# SPDX-License-Identifier: Apache-2.0
"""The command line: arguments in, tables and files out, an exit code. Its commands are modules of `commands`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fastloop.bench import aot, gpu
from fastloop.bench.checks import WrongResult
from fastloop.bench.commands import ab, ci, claims, compare, env, measure, tune
from fastloop.bench.commands import aot as aot_command
from fastloop.bench.commands import gpu as gpu_command
from fastloop.bench.commands.shared import EXIT_CODES, NO_BASELINE, OUTPUT, REGRESSION, VOID, WRONG, fail

COMMANDS = (env, measure, tune, claims, compare, ab, ci, aot_command, gpu_command)
WIDTH_OF_A_FILE = 150  # not a terminal: nothing to fold for


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastloop.bench",
        description="Measure clip + optimizer step, and whole loops, on this machine. No command: about a minute.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help=f"default: {OUTPUT}")
    parser.set_defaults(run=measure.default)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for each in COMMANDS:
        each.add(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. argparse itself exits with 2 on wrong usage."""
    args = _parser().parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH_OF_A_FILE)
    try:
        return int(args.run(console, args))
    except WrongResult as error:
        fail(error)
        return WRONG
    except aot.NoGolden as error:
        fail(error)
        return NO_BASELINE
    except aot.DoesNotCompile as error:
        fail(error)
        return REGRESSION
    except (aot.Unavailable, gpu.NoDevice) as error:
        fail(error)
        return VOID
