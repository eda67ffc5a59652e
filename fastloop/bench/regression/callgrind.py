# SPDX-License-Identifier: Apache-2.0
"""Instructions of a call, counted by valgrind's callgrind: a slow-down of the host's code that needs no clock.

The code is warmed up before valgrind begins to count; a region without calls is subtracted; one thread.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from importlib import import_module, util
from pathlib import Path
from typing import Any

import torch

from fastloop.bench.regression import evidence
from fastloop.bench.regression.evidence import Found, Place
from fastloop.bench.regression.record import Count

SECONDS = 240.0  # for all cases of one build
WHAT = "instructions"


def unavailable() -> str | None:
    """Why instructions cannot be counted here, or None."""
    for tool in ("valgrind", "vgdb"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (on Debian and Ubuntu: apt-get install valgrind)"
    supported = getattr(torch._C, "_valgrind_supported_platform", None)
    if supported is None or not supported():
        return f"torch {torch.__version__} for {platform.machine()} has no hooks for valgrind"
    return None


def count(place: Place, only: Sequence[str] = ()) -> Found:
    """Instructions of every case, by part. Raises CountingError, also where valgrind is missing."""
    reason = unavailable()
    if reason is not None:
        raise evidence.CountingError(f"[bench] instructions: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        dumps, prefix = f"{folder}/callgrind", f"{folder}/vgdb"
        command = [
            str(shutil.which("valgrind")), "--tool=callgrind", "--quiet", f"--vgdb-prefix={prefix}",
            "--instr-atstart=no", "--collect-atstart=no", f"--callgrind-out-file={dumps}",
        ]  # fmt: skip
        request = {"valgrind": True, "dumps": dumps, "vgdb": shutil.which("vgdb"), "vgdb_prefix": prefix}
        found = evidence.run(place, command, request, only, SECONDS)
        for line in found.lines.values():
            if "dump" in line:
                line["counts"] = _per_call(Path(line["dump"]), Path(line["empty"]), line["calls"])
        return found


def _per_call(dump: Path, empty: Path, calls: int) -> dict[str, float]:
    whole, nothing = by_object(dump.read_text(errors="replace")), by_object(empty.read_text(errors="replace"))
    parts: dict[str, float] = {WHAT: 0.0}
    for path, instructions in whole.items():
        each = (instructions - nothing.get(path, 0)) / calls
        parts[WHAT] += each
        name = _part(path)
        if name:
            parts[f"{WHAT}, {name}"] = parts.get(f"{WHAT}, {name}", 0.0) + each
    return {name: round(value) for name, value in parts.items()}


def _part(path: str) -> str | None:
    """The name under which a shared library's share is shown."""
    name = path.rsplit("/", 1)[-1]
    if name.startswith("_native."):
        return "native"
    return "Python" if re.match(r"(lib)?python\d", name) else None


def by_object(text: str) -> dict[str, int]:
    """Instructions by program or library, from a file of callgrind's.

    Lines "ob=(3) path" name the object of what follows, later as "ob=(3)"; a line of cost is "+2 117"; the line after
    "calls=" is the callee's cost, which is counted there.
    """
    names: dict[str, str] = {}
    costs: dict[str, int] = defaultdict(int)
    current, callee = "", False
    for line in text.splitlines():
        named = re.match(r"c?ob=(\(\d+\))(?: (.+))?$", line)
        if named:
            path = names.setdefault(named[1], named[2] or "")
            current = current if line.startswith("c") else path
        elif line.startswith("calls="):
            callee = True
        elif re.match(r"[+\-*\d]\S* \d+$", line):
            if not callee:
                costs[current] += int(line.split()[1])
            callee = False
    return dict(costs)


def where() -> str:
    """All that instruction counts depend on: interpreter, torch, compilers, C library, instruction set, valgrind."""
    valgrind, version = shutil.which("valgrind"), ""
    if valgrind is not None:
        version = subprocess.run([valgrind, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return ", ".join(
        (
            f"python {platform.python_version()} {' '.join(platform.python_build())} {platform.python_compiler()}",
            f"torch {torch.__version__}",
            f"native by {native_compiler()}",
            " ".join(platform.libc_ver()),
            f"{platform.machine()} {_isa()}",
            version or "no valgrind",
        )
    )


def _isa() -> str:
    package: Any = import_module("fastloop")
    return str(package.backends()["cpu"].get("isa"))


def native_compiler() -> str:
    """What compiled the native module, as the compiler has written into it."""
    try:
        found = util.find_spec("fastloop._native")
    except ImportError:
        found = None
    if found is None or not found.origin:
        return "nothing"
    text = Path(found.origin).read_bytes()
    name = re.search(rb"(GCC: \([^)]*\) [\d.]+|clang version [\d.]+)", text)
    return name[1].decode() if name else f"an unknown compiler, python {sys.version_info[0]}"


def counted(found: Found, base: Found | None = None) -> list[Count]:
    """As `evidence.counted`, but a case that valgrind cannot count is said to be so and does not fail.

    One that has become too heavy to be counted, and was not in the base, is at least what one call took.
    """
    rows = []
    for case, line in found.lines.items():
        before = base.lines.get(case, {}).get("counts", {}) if base else {}
        if "error" in line:
            value = line.get("at_least") if WHAT in before else None
            note = line["error"] if value is None else f"at least: {line['error']}"
            rows.append(Count(case, WHAT, value, base=before.get(WHAT), note=note))
            continue
        rows += [Count(case, what, value, base=before.get(what)) for what, value in line["counts"].items()]
    return rows
