# SPDX-License-Identifier: Apache-2.0
"""`aot`: the GPU kernels compiled without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastloop.bench import aot
from fastloop.bench.commands.shared import EXIT_CODES, OK, REGRESSION, VOID, fail


def add(commands: Any) -> None:
    ahead = commands.add_parser(
        "aot", help="GPU kernels compiled without a GPU: registers, spills, 128-bit accesses", epilog=EXIT_CODES
    )
    what = ahead.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="fail where they are worse than the golden file")
    what.add_argument("--update", action="store_true", help="rewrite the golden file")
    ahead.add_argument("--arch", type=int, nargs="+", default=aot.ARCHITECTURES, metavar="N", help="default: 80 90 100")
    ahead.add_argument("--backend", choices=("cuda", "triton"), nargs="+", default=("cuda", "triton"))
    ahead.add_argument("--golden", type=Path, default=aot.GOLDEN, metavar="FILE")
    ahead.set_defaults(run=_aot)


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
            fail(message)
        if others and worse and not bad:
            fail(f"[bench aot] the golden file is of {known}, these kernels of {compilers}: not comparable")
            return VOID
        return REGRESSION if bad or worse else OK
    for message in bad:
        fail(message)
    if args.update and not bad:
        kept = golden.keys() - aot.part(golden, args.backend, args.arch).keys()
        document = aot.to_json({key: golden[key] for key in kept} | chosen, known | compilers)
        args.golden.write_text(document, encoding="utf-8")
        console.print(Text(f"written: {args.golden}"))
    return REGRESSION if bad else OK
