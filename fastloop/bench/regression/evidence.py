# SPDX-License-Identifier: Apache-2.0
"""Deterministic evidence: what a call of each case does, counted, against the values that the project has committed.

A count does not depend on the machine's mood, so that more than allowed fails at once. Some depend on versions: a
value is committed together with where it was counted, and holds there; a count of 0 holds everywhere.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
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
DEVICE = ("kernel launches", "host-device syncs")


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
    """What Python calls, operators and allocations depend on."""
    major, minor = sys.version_info[:2]
    return f"python {major}.{minor}, torch {torch.__version__.split('+')[0]}"


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


def updated(rows: Iterable[Allowed], counts: Iterable[Count], where: dict[str, str]) -> list[Allowed]:
    """`rows` with what was counted; values of other environments, and what cannot be counted here, stay.

    where: of each kind, by the first word of what is counted, and "" for all others.
    """
    known = {row.key: row for row in rows}
    for each in counts:
        if each.value is None or each.allowed == 0:  # nothing was counted, or the rule is not a file's
            continue
        place = EVERYWHERE if each.value == 0 else where.get(each.what.split()[0].strip(","), where[""])
        if known.get((each.case, each.what, EVERYWHERE), Allowed("", "", 0)).allowed:
            place = EVERYWHERE  # a value above 0 holds everywhere only where someone has written so
        others = [key for key in known if key[:2] == (each.case, each.what) and EVERYWHERE in (place, key[2])]
        for key in others:
            del known[key]
        row = Allowed(each.case, each.what, each.value, place)
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


def judge(counts: Iterable[Count], rows: Sequence[Allowed], where: dict[str, str]) -> None:
    """Compare each count: with the committed value that holds here, else with the base's, else with nothing.

    Raises:
        NoEvidence: a case that no line of the file is about, and no base either.
    """
    counts = [each for each in counts if each.value is not None and not each.failed]
    known = {row.key: row.allowed for row in rows}
    named = {row.case for row in rows}
    strangers = sorted({each.case for each in counts if each.base is None and each.allowed is None} - named)
    if strangers:
        raise NoEvidence(f"[bench] no allowed counts for {', '.join(strangers)}; `ci --update` writes them")
    for each in counts:
        kind = each.what.split()[0].strip(",")
        place = where.get(kind, where[""])
        allowed = known.get((each.case, each.what, place), known.get((each.case, each.what, EVERYWHERE)))
        if each.base is not None and (allowed is None or kind in TOLERANCE):
            allowed, each.note = each.base, each.note or "the base's count"
        if allowed is not None and each.allowed is None:
            each.allowed = math.floor(allowed * (1 + TOLERANCE[kind])) if kind in TOLERANCE else allowed
        if each.allowed is None:
            each.note = each.note or "reported only: no value is committed for these versions"
            continue
        assert each.value is not None
        each.failed = each.value > each.allowed
