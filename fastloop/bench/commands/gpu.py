# SPDX-License-Identifier: Apache-2.0
"""`gpu`: the GPU backends on this machine's GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from fastloop.bench import gpu, gpu_record
from fastloop.bench.commands.shared import EXIT_CODES, OK, USAGE, VOID, WRONG, fail, progress


def add(commands: Any) -> None:
    card = commands.add_parser("gpu", help="measure the GPU backends on this machine's GPU", epilog=EXIT_CODES)
    card.add_argument("-k", dest="pattern", metavar="PATTERN", help="part of a row's name")
    card.add_argument("--results", type=Path, default=gpu.RESULTS, metavar="DIR", help="default: benchmarks/results")
    card.add_argument("--commit", metavar="HASH", help="of this build, where the checkout is not a repository")
    card.set_defaults(run=_gpu)


def _gpu(console: Console, args: argparse.Namespace) -> int:
    specs = gpu.select(args.pattern)
    if not specs:
        fail(f"[bench gpu] no row matches {args.pattern!r}; rows: {', '.join(spec.name for spec in gpu.SPECS)}")
        return USAGE
    with progress() as tell:
        bench = gpu.Bench(torch.device("cuda", 0), progress=tell)
        run = gpu.measure_all(bench, args.commit, specs, lambda row: console.print(Text(gpu_record.line(row))))
    console.print(Text(f"{run.seconds:.0f} s; written: {gpu_record.save(run, args.results)}"))
    if run.void:
        fail("[bench gpu] the control moved by more than 2 %: the machine was not quiet, measure again")
    if any(row.status == "wrong" for row in run.rows):
        return WRONG
    return VOID if run.void else OK
