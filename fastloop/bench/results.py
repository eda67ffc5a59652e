# SPDX-License-Identifier: Apache-2.0
"""The result file: one JSON document per run, with every sample or compact enough to be committed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fastloop.bench.stats import Interval, control_moved

SCHEMA = "fastloop-bench/1"


class BadResult(Exception):
    """A file that is not a result of this program, or of another schema."""


@dataclass
class Row:
    """One case against one peer. `ratio` is the peer's time over ours: 2 means twice as fast."""

    case: str
    peer: str
    group: str
    title: str
    status: str = "ok"  # "ok", "skipped" or "wrong"
    reason: str = ""
    tensors: int = 0
    elements: int = 0
    dtype: str = ""
    threads: int = 0
    bytes: int = 0
    ratios: list[float] = field(default_factory=list)
    ratio: Interval | None = None
    stopped: str = ""
    ours_seconds: list[float] = field(default_factory=list)
    peer_seconds: list[float] = field(default_factory=list)
    repetitions: tuple[int, int] = (0, 0)
    ceiling: Interval | None = None  # our bytes per second over the ceiling's
    ceiling_gbps: float | None = None
    ceiling_method: str = ""
    goal: float | None = None
    cost: Interval | None = None  # our time less the peer's, seconds per step
    cost_goal: float | None = None  # at most
    ours_memory: dict[str, int] | None = None
    peer_memory: dict[str, int] | None = None
    norm_error: float | None = None  # relative error of torch's norm of these gradients

    @property
    def key(self) -> str:
        return f"{self.case}/{self.peer}"

    @property
    def gbps(self) -> float:
        """The declared bytes over our median time."""
        return self.bytes / median(self.ours_seconds) * 1e-9

    def reached(self) -> bool | None:
        """Whether the median reaches the goal, of the ratio or the cost; None without a goal or a measurement."""
        if self.cost_goal is not None and self.cost is not None:
            return self.cost.median <= self.cost_goal
        return None if self.goal is None or self.ratio is None else self.ratio.median >= self.goal


@dataclass
class Run:
    """Everything one invocation measured."""

    created: str
    environment: dict[str, Any]
    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    training: dict[str, Any] | None = None
    seconds: float = 0.0
    schema: str = SCHEMA

    @property
    def control(self) -> Row | None:
        return next((row for row in self.rows if row.group == "control" and row.ratio is not None), None)

    @property
    def void(self) -> bool:
        """Whether the control case moved: the machine was not quiet enough to judge by."""
        return self.control is not None and self.control.ratio is not None and control_moved(self.control.ratio)

    @property
    def wrong(self) -> list[str]:
        """Messages of results that differ from the reference."""
        messages = [f"{row.key}: {row.reason}" for row in self.rows if row.status == "wrong"]
        if self.training is not None and self.training.get("status") == "wrong":
            messages.append(f"training: {self.training['reason']}")
        return messages


def _rounded(value: Any) -> Any:
    """Five significant digits: an order finer than any interval here."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value


def to_json(run: Run, *, compact: bool = False) -> str:
    """The document; compact keeps medians, intervals and per-pair ratios and drops the samples."""
    document = asdict(run)
    if compact:
        for row in document["rows"]:
            for side in ("ours_seconds", "peer_seconds"):
                row[side] = [median(row[side])] if row[side] else []
        if document["training"]:
            document["training"].pop("losses", None)
            document["training"].pop("samples", None)
        document = _rounded(document)
        # One row a line: a change to one case is one line of a diff.
        rows = ",\n  ".join(json.dumps(row) for row in document.pop("rows"))
        return json.dumps(document)[:-1] + ',\n "rows": [\n  ' + rows + "\n ]}\n"
    return json.dumps(document, indent=1) + "\n"


def from_json(text: str) -> Run:
    """Read a document back. Raises BadResult if it is not one of this schema."""
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise BadResult(f"[bench] wanted a result of schema {SCHEMA}, got {document['schema']}; measure it anew")
        for row in document["rows"]:
            for name in ("ratio", "ceiling", "cost"):
                row[name] = Interval(**row[name]) if row.get(name) else None
            row["repetitions"] = tuple(row["repetitions"])
        return Run(**{**document, "rows": [Row(**row) for row in document["rows"]]})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BadResult(f"[bench] not a result of this program: {type(error).__name__}: {error}") from error


def save(run: Run, path: Path, *, compact: bool = False) -> None:
    """Write the document, making the folder if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(run, compact=compact), encoding="utf-8")


def load(path: Path) -> Run:
    """Read a saved run. Raises BadResult with the path if it cannot be one."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadResult(f"[bench] cannot read {path}: {error}") from error
    except BadResult as error:
        raise BadResult(f"{error} ({path})") from error
