# SPDX-License-Identifier: Apache-2.0
"""Deterministic evidence: what a call of each case does, counted, against the values that the project has committed.

A count does not depend on the machine's mood, so that more than allowed fails at once. Some depend on versions: a
value is committed together with where it was counted, and holds there; a count of 0 holds everywhere.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastloop.bench import memory, usercases
from fastloop.bench.regression import counter, worker
from fastloop.bench.regression.ab import CaseFile
from fastloop.bench.regression.record import Count

SCHEMA = "fastloop-evidence/1"
SECONDS = 300.0  # for all cases of one build
EVERYWHERE = "anywhere"
TOLERANCE = {"instructions": 0.03}  # relative, by the first word of what is counted; all others are exact
ELSEWHERE = 0.20  # of instructions that the interpreter takes part in, against a committed value
DEVICE = ("kernel launches", "host-device syncs")
DEVICE_KINDS = ("kernel", "host-device", "GPU")  # first words of what depends on the GPU too


class NoEvidence(Exception):
    """There is no file of allowed values, or it is not one, or it has none for a case that is guarded."""


class CountingError(Exception):
    """The process that counts ended before it began, or hung."""


@dataclass(frozen=True)
class Place:
    """Which code, in which environment: one side of a comparison.

    Args:
        cases: file of cases.
        path: folders that come first on sys.path.
        outside: folder that no module may come from; empty: anything goes.
    """

    cases: CaseFile
    path: tuple[str, ...]
    outside: str = ""


@dataclass
class Found:
    """What the counting process said: counts by case, and cases that raised or were found wrong."""

    lines: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def wrong(self) -> dict[str, str]:
        return {case: line["error"] for case, line in self.lines.items() if line.get("wrong")}


# ---- counting


def count(place: Place, only: Sequence[str] = ()) -> Found:
    """Counts of every case, in a process of their own with one thread. Raises CountingError."""
    return run(place, [], {"valgrind": False}, only)


def run(
    place: Place, prefix: Sequence[str], request: dict[str, Any], only: Sequence[str] = (), seconds: float = SECONDS
) -> Found:
    """Run the counting script, behind the words of `prefix`, and read its lines.

    A process that dies or hangs in a case loses that case and those after it: their lines say so.

    Raises:
        CountingError: it wrote nothing at all.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers, said = Path(folder) / "answers", Path(folder) / "said"
        files = {"usercases": usercases, "worker": worker, "memory": memory}
        whole = {
            **request,
            **{name: str(Path(str(module.__file__)).resolve()) for name, module in files.items()},
            "file": str(place.cases.file), "module": place.cases.module, "outside": place.outside,
            "only": list(only), "answers": str(answers),
        }  # fmt: skip
        command = [*prefix, sys.executable, str(Path(counter.__file__).resolve()), json.dumps(whole)]
        ended = _ended(command, _environment(place.path), said, seconds)
        lines = answers.read_text(encoding="utf-8").splitlines() if answers.exists() else []
        found = Found({line["case"]: line for line in map(json.loads, lines)})
        if ended and not found.lines:
            raise CountingError(f"[bench] counting {place.cases.module}: {ended}")
        for line in found.lines.values():
            if line.get("unfinished") and ended:
                line["error"], ended = f"the process ended in this case: {ended}", ""
        return found


def _environment(path: Sequence[str]) -> dict[str, str]:
    """One thread, no randomness, and the build's folders first."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    folders = [*path, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **threads, "PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(folders)}


def _ended(command: Sequence[str], environment: dict[str, str], said: Path, seconds: float) -> str:
    """Run it; empty, or what went wrong."""
    with said.open("wb") as output:
        try:
            done = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"not done within {seconds:.0f} s; it was ended"
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return ""
    return f"exit code {done.returncode}: {said.read_text(encoding='utf-8', errors='replace')[-1500:].strip()}"


# ---- what is allowed


@dataclass(frozen=True)
class Allowed:
    """The most that a case may do where it was counted; there may be one for each environment."""

    case: str
    what: str
    allowed: float
    where: str = EVERYWHERE

    @property
    def key(self) -> tuple[str, str, str]:
        return self.case, self.what, self.where


def versions() -> str:
    """What Python calls, operators and allocations depend on: torch chooses kernels by its build and by the CPU."""
    major, minor = sys.version_info[:2]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"python {major}.{minor}, torch {torch.__version__}, {platform.machine()} {capability}"


def device() -> str:
    """What counts of a GPU depend on beside the versions."""
    if not torch.cuda.is_available():
        return "no GPU"
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def places() -> dict[str, str]:
    """Where counts of this environment hold, as `judge` and `updated` take it; instructions come on top."""
    here = versions()
    return {"": here, **dict.fromkeys(DEVICE_KINDS, f"{here}, {device()}")}


def place_of(each: Count, where: Mapping[str, str]) -> str:
    """Where a count holds: by "case: what", else by the first word of what is counted, else that of ""."""
    return where.get(f"{each.case}: {each.what}", where.get(_kind(each), where[""]))


def _kind(each: Count) -> str:
    return each.what.split()[0].strip(",")


def load(path: Path) -> list[Allowed]:
    """Read the committed values. Raises NoEvidence with what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise NoEvidence(f"[bench] wanted evidence of schema {SCHEMA}, got {document['schema']} in {path}")
        rows = [Allowed(**row) for row in document["allowed"]]
        bad = [row for row in rows if isinstance(row.allowed, bool) or not isinstance(row.allowed, (int, float))]
        if bad:
            raise NoEvidence(f"[bench] wanted a number for {bad[0].case}: {bad[0].what}, got {bad[0].allowed!r}")
        return rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NoEvidence(
            f"[bench] no allowed counts in {path}: {type(error).__name__}: {error}; `ci --update` writes them"
        ) from error


def updated(rows: Iterable[Allowed], counts: Iterable[Count], where: Mapping[str, str]) -> list[Allowed]:
    """`rows` with what was counted; values of other environments, and what cannot be counted here, stay.

    where: see `place_of`.
    """
    known = {row.key: row for row in rows}
    for each in counts:
        if each.value is None or each.allowed == 0:  # nothing was counted, or the rule is not a file's
            continue
        row = Allowed(each.case, each.what, each.value, place_of(each, where))
        if row.where == EVERYWHERE:  # by its nature: no environment has a value of its own
            for key in [key for key in known if key[:2] == row.key[:2]]:
                del known[key]
        own, everywhere = known.pop(row.key, None), known.get((each.case, each.what, EVERYWHERE))
        # A value above 0 holds everywhere only where someone has written so; 0 does until a count contradicts it.
        if each.value == 0 or (everywhere is not None and everywhere.allowed > 0):
            row = replace(row, where=EVERYWHERE)
        elif everywhere is not None and own is None:
            del known[everywhere.key]
        known[row.key] = row
    return sorted(known.values(), key=lambda row: row.key)


def save(rows: Sequence[Allowed], path: Path) -> None:
    """One value a line, so that a change to one is one line of a diff."""
    lines = ",\n  ".join(
        json.dumps({"case": row.case, "what": row.what, "allowed": row.allowed, "where": row.where}) for row in rows
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"schema": "{SCHEMA}",\n "allowed": [\n  {lines}\n ]}}\n', encoding="utf-8")


# ---- judging


def counted(found: Found, base: Found | None = None) -> list[Count]:
    """A Count for each thing of each case, not judged yet; a case that raised fails."""
    rows = []
    for case, line in found.lines.items():
        if "error" in line:
            rows.append(Count(case, "cases that cannot be counted", 1, allowed=0, failed=True, note=line["error"]))
            continue
        before = base.lines.get(case, {}).get("counts", {}) if base else {}
        rows += [Count(case, what, value, base=before.get(what)) for what, value in line["counts"].items()]
    return rows


def judge(
    counts: Iterable[Count], rows: Sequence[Allowed], where: Mapping[str, str], before: Sequence[Allowed] | None = None
) -> None:
    """Compare each count: with the committed value that holds here, else with the base's, else with nothing.

    Counts with a tolerance are compared with the base's where there is one; of them a part may grow while the whole
    shrinks.

    Args:
        where: see `place_of`.
        before: the base's committed values, None where they are not known: a line of this environment that allows more
            than they do was meant, and is the limit then.

    Raises:
        NoEvidence: a case that no line of the file is about, and no base either.
    """
    counts = [each for each in counts if each.value is not None and not each.failed]
    named = {row.case for row in rows}
    strangers = sorted({each.case for each in counts if each.base is None and each.allowed is None} - named)
    if strangers:
        raise NoEvidence(f"[bench] no allowed counts for {', '.join(strangers)}; `ci --update` writes them")
    limits = _Limits(rows, where, before)
    shrunk = set()
    for each in sorted(counts, key=lambda count: len(count.what)):  # "instructions" goes before its parts
        assert each.value is not None
        kind, limit = _kind(each), limits.of(each)
        if each.allowed is None and limit is not None:
            each.allowed = math.floor(limit * (1 + _tolerance(each))) if kind in TOLERANCE else limit
        if each.allowed is None:
            each.note = each.note or "reported only: no value is committed for these versions"
            continue
        each.failed = each.value > each.allowed
        if each.what in TOLERANCE and limit is not None and each.value < limit:
            shrunk.add((each.case, each.what))
        if each.failed and (each.case, kind) in shrunk:
            each.failed, each.note = False, f"grew, but all {kind} together are fewer"
            each.allowed = None


def _tolerance(each: Count) -> float:
    """By how much a count may exceed its limit, as a part of it.

    Between two environments of the same versions the native step's instructions are the same, but the interpreter's are
    not: where it is installed was worth 1,700 a call, 9 % of the smallest case's.
    """
    alone = each.base is None and not each.what.endswith("native")
    return ELSEWHERE if alone else TOLERANCE[_kind(each)]


class _Limits:
    """The values that counts are compared with, before their tolerance."""

    def __init__(self, rows: Sequence[Allowed], where: Mapping[str, str], before: Sequence[Allowed] | None) -> None:
        self._known = {row.key: row.allowed for row in rows}
        self._before = None if before is None else {row.key: row.allowed for row in before}
        self._where = where

    def of(self, each: Count) -> float | None:
        """None: there is none. Notes in the count where the limit is not a committed value."""
        key = each.case, each.what, place_of(each, self._where)
        committed = self._known.get(key, self._known.get((each.case, each.what, EVERYWHERE)))
        if each.base is None or (committed is not None and _kind(each) not in TOLERANCE):
            return committed
        if committed is not None and committed > each.base and self._raised(key):
            each.note = each.note or "committed with this change"
            return committed
        each.note = each.note or "the base's count"
        return each.base

    def _raised(self, key: tuple[str, str, str]) -> bool:
        """Whether the line of this environment allows more than the base's, or is new."""
        if self._before is None or key not in self._known:
            return False
        return self._known[key] > self._before.get(key, -math.inf)
