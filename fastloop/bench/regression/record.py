# SPDX-License-Identifier: Apache-2.0
"""What `ab` and `ci` find, as data: written to result.json with every sample, read by the reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastloop.bench.stats import Interval, Verdict

SCHEMA = "fastloop-regression/1"


@dataclass
class Change:
    """One case, head's time over base's: above 1 head is slower.

    rounds: ratios by pair of processes; a round is one start of both. The interval resamples rounds, then pairs.
    """

    case: str
    title: str = ""
    control: bool = False
    verdict: Verdict | None = None  # None: not judged, `note` says why
    note: str = ""
    wrong: bool = False  # the case's own check failed
    interval: Interval | None = None
    rounds: list[list[float]] = field(default_factory=list)
    rerun: Interval | None = None
    rerun_rounds: list[list[float]] = field(default_factory=list)
    base_seconds: list[float] = field(default_factory=list)  # per call, one a pair
    head_seconds: list[float] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        return sum(map(len, self.rounds))


@dataclass
class Count:
    """Deterministic evidence: a number that does not depend on the machine's mood."""

    case: str
    what: str  # "kernel launches", "host-device syncs", "allocations", "peak bytes", "instructions", ...
    value: float | None  # None: could not be taken here, `note` says why
    allowed: float | None = None  # at most; None: reported only
    base: float | None = None  # of the base revision, where it was counted too
    failed: bool = False
    note: str = ""


@dataclass
class Ratio:
    """A case against its peer in one process: the peer's time over ours, against a committed floor."""

    case: str
    peer: str
    verdict: Verdict | None
    interval: Interval | None = None
    floor: float | None = None
    ratios: list[float] = field(default_factory=list)
    note: str = ""
    wrong: bool = False


@dataclass
class Report:
    """Everything that one `ab` or `ci` found."""

    created: str  # ISO 8601, UTC
    environment: dict[str, Any]
    head: str  # commit, with "-dirty" where the checkout differs from it
    base: str | None = None
    changes: list[Change] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out, and why
    seconds: float = 0.0
    schema: str = SCHEMA

    @property
    def void(self) -> bool:
        """Whether a control moved: what was timed says nothing then; counts still do."""
        return Verdict.VOID in self._verdicts()

    def _verdicts(self) -> list[Verdict | None]:
        return [change.verdict for change in self.changes] + [ratio.verdict for ratio in self.ratios]

    @property
    def wrong(self) -> bool:
        return any(change.wrong for change in self.changes) or any(ratio.wrong for ratio in self.ratios)

    @property
    def regressed(self) -> bool:
        """Whether something timed or counted got worse."""
        return Verdict.REGRESSED in self._verdicts() or any(count.failed for count in self.counts)

    def exit_code(self, void: int = 4) -> int:
        """3 wrong result, 1 regression, `void` if the machine was not quiet, else 0."""
        if self.wrong:
            return 3
        if self.regressed:  # of a void part nothing is called that
            return 1
        return void if self.void else 0


def to_json(report: Report) -> str:
    """The document, one line for each case."""
    document = asdict(report)
    parts = {name: document.pop(name) for name in ("changes", "counts", "ratios")}
    lines = [json.dumps(document, indent=1)[:-2]]
    for name, rows in parts.items():
        lines.append(f',\n "{name}": [' + ",".join(f"\n  {json.dumps(row)}" for row in rows) + "]")
    return "".join(lines) + "\n}\n"


def from_json(text: str) -> Report:
    """Read a document back. Raises ValueError if it is not one of this schema."""
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise ValueError(f"[bench] wanted a report of schema {SCHEMA}, got {document['schema']}")
        document["changes"] = [Change(**_restored(row, ("interval", "rerun"))) for row in document["changes"]]
        document["counts"] = [Count(**row) for row in document["counts"]]
        document["ratios"] = [Ratio(**_restored(row, ("interval",))) for row in document["ratios"]]
        return Report(**document)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"[bench] not a report of this program: {type(error).__name__}: {error}") from error


def _restored(row: dict[str, Any], intervals: Sequence[str]) -> dict[str, Any]:
    for name in intervals:
        row[name] = Interval(**row[name]) if row.get(name) else None
    row["verdict"] = None if row["verdict"] is None else Verdict(row["verdict"])
    return row


def save(report: Report, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(report), encoding="utf-8")


def load(path: Path) -> Report:
    """Raises ValueError (with the path) or OSError."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{error} ({path})") from None
