# SPDX-License-Identifier: Apache-2.0
"""What a tuner found: every trial, the recommendation, and the ways to take it over."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from fastloop.bench.stats import Interval
from fastloop.loop.files import replace_file
from fastloop.tune import toml_edit
from fastloop.tune.target import OF_A_RUN
from fastloop.tune.trial import OK, Outcome

SCHEMA = "fastloop-tune/1"
_INTERVALS = ("rate",)


@dataclass
class Trial:
    """One setting and what came of it."""

    settings: dict[str, Any]
    status: str = OK  # "ok", "failed", "out of memory", "timeout", "skipped"
    reason: str = ""
    traceback: str = ""
    exit_code: int | None = None
    rate: Interval | None = None  # samples/s
    wait_share: float | None = None
    peak_bytes: int | None = None
    seconds: float = 0.0
    startup_seconds: float | None = None
    error: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: Mapping[str, Any], outcome: Outcome) -> Trial:
        """What every kind of trial has from its process; the host's peak where the kind knows no better one."""
        return cls(
            dict(settings), outcome.status, outcome.reason, outcome.traceback, outcome.exit_code,
            peak_bytes=outcome.peak_bytes, seconds=outcome.seconds,
        )  # fmt: skip

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Trial:
        """From JSON."""
        given = dict(row)
        given["rate"] = None if given.get("rate") is None else Interval(**given["rate"])
        return cls(**given)


@dataclass
class Report:
    """The answer of one tuner.

    Attributes:
        kind: "loader", "batch", "flags", "memory", "lr" or "all". target: its name.
        arguments, options, settings: of the target, of Loop and of the loader, as they were given.
        loop, loader: what is recommended to be changed in options and settings.
    """

    kind: str
    target: str
    fingerprint: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)
    present: Trial | None = None
    best: Trial | None = None
    gain: Interval | None = None
    keep: bool = True
    loop: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    cached: bool = False
    seconds: float = 0.0
    schema: str = SCHEMA

    # ---- JSON

    def to_json(self) -> str:
        """The document; `from_json` reads it. What is no finite number is null."""
        document = asdict(self)
        document = _without_infinities(document)
        for name in ("present", "best"):
            chosen = getattr(self, name)
            where = [i for i, trial in enumerate(self.trials) if trial is chosen]
            document[name] = where[0] if where else document[name]  # an index: they are among the trials
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Raises ValueError for what is no such document."""
        try:
            document = json.loads(text)
            if document.get("schema") != SCHEMA:
                raise ValueError(f"its schema is {document.get('schema')!r}")
            known = {each.name for each in fields(cls)}
            made = cls(**{name: value for name, value in document.items() if name in known})
            made.trials = [Trial.from_dict(row) for row in document["trials"]]
            made.gain = None if document["gain"] is None else Interval(**document["gain"])
            for name in ("present", "best"):
                value = document[name]
                chosen = made.trials[value] if isinstance(value, int) else value and Trial.from_dict(value)
                setattr(made, name, chosen)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"[tune] wanted a report of {SCHEMA}, got something else: {error}") from None
        return made

    # ---- text

    @property
    def importable(self) -> bool:
        """Whether the target has a name that a config can hold."""
        return ":" in self.target and " " not in self.target

    def table(self) -> str:
        """Every trial, one a line."""
        rows = [("settings", "samples/s", "98 % interval", "waiting", "peak MiB", "status")]
        for trial in self.trials:
            chosen = trial is self.best and not self.keep
            mark = " <- best" if chosen else " <- present" if trial is self.present else ""
            rows.append((*trial_cells(trial), trial.status + (f": {trial.reason}" if trial.reason else "") + mark))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
            for row in rows
        )

    def summary(self) -> str:
        """One sentence: what to do, and what it gives."""
        if self.kind == "lr":
            return "A learning rate is no option of Loop: write it into your optimizer, there is nothing to apply."
        runs = self.present is None or self.present.status == OK
        if self.keep and not runs:
            return "The present settings do not run here, and nothing was found to put in their place."
        if self.keep and self.kind == "memory":
            return "Nothing to change: the present settings fit."
        if self.keep:
            return "Keep yours: nothing that can be recommended is faster than the present settings by more than 2 %."
        gives = "" if self.gain is None else f": {self.gain.median:.2f} times the samples/s of the present settings"
        spread = "" if self.gain is None else f" (98 % interval {self.gain.low:.2f} to {self.gain.high:.2f})"
        instead = "" if runs else ": the present settings do not run here"
        return f"Take {described({**self.loop, **self.loader})}{instead}{gives}{spread}."

    def snippet(self) -> str:
        """Python to paste."""
        lines = []
        if self.loader:
            lines.append(f"# in your DataLoader(...): {_arguments({**self.settings, **self.loader})}")
        if self.loop:
            needs = "  # cuda_graph needs fit()" if self.loop.get("cuda_graph") else ""
            lines.append(f"loop = Loop(model, optimizer, loss_fn, {_arguments({**self.options, **self.loop})}){needs}")
        return "\n".join(lines) or "# keep the present settings"

    # ---- TOML

    def tables(self) -> dict[str, dict[str, Any]]:
        """Keys to be set, by table; "" for the top."""
        found: dict[str, dict[str, Any]] = {
            "": {"target": self.target} if self.importable else {},
            "arguments": self.arguments if self.importable else {},
            "loop": {**self.options, **self.loop},
            "loader": {**self.settings, **self.loader},
            "tuned": {"fingerprint": self.fingerprint},
        }
        return {name: {k: v for k, v in keys.items() if v is not None} for name, keys in found.items() if keys}

    def toml(self) -> str:
        """A config for `Loop.from_config`: target, arguments, and the options and settings with this recommendation."""
        return toml_edit.edit("", self.tables())

    def apply(self, path: str | os.PathLike[str]) -> None:
        """Write the recommendation into a TOML file; its other keys and comments stay.

        Where nothing is recommended and the file has settings that were not measured, `[tuned]` is not written.

        Raises:
            ValueError: no TOML, or the config of another target.
            OSError: it cannot be written.
        """
        file = Path(path)
        text = file.read_bytes().decode() if file.exists() else ""  # its ends of lines stay
        tables = self.tables()
        check_file(file, self.target)
        edited = toml_edit.edit(text, tables, str(file))
        if self.keep and unmeasured(edited, str(file), self.arguments, self.options, self.settings):
            edited = toml_edit.edit(text, {name: keys for name, keys in tables.items() if name != "tuned"}, str(file))
        replace_file(file, edited)


def check_file(file: Path, target: str) -> None:
    """Raises ValueError where the file is no TOML, or the config of another target."""
    if not file.exists():
        return
    there = toml_edit.parsed(file.read_text(encoding="utf-8"), str(file)).get("target", target)
    if there != target:
        raise ValueError(f"[tune] {file} is the config of {there}, this answer is for {target}; name another file")


def unmeasured(
    text: str, name: str, arguments: Mapping[str, Any], options: Mapping[str, Any], settings: Mapping[str, Any]
) -> list[str]:
    """Keys of a config, "loop.precision", that a run with these arguments, options and settings did not have."""
    parsed = toml_edit.parsed(text, name)
    had = {"arguments": arguments, "loop": {**options, **dict.fromkeys(OF_A_RUN)}, "loader": settings}
    return [
        f"{table}.{key}"
        for table, keys in had.items()
        for key in (parsed[table] if isinstance(parsed.get(table), dict) else ())
        if key not in keys
    ]


def _without_infinities(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_infinities(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(each) for each in value]
    return value


def described(settings: Mapping[str, Any]) -> str:
    """ "num_workers 4, pin_memory on"."""
    words = {True: "on", False: "off"}
    parts = [f"{k} {words[v] if isinstance(v, bool) else v}" for k, v in settings.items() if v is not None]
    return ", ".join(parts) or "the present settings"


def trial_cells(trial: Trial) -> tuple[str, str, str, str, str]:
    """Settings, samples/s, its interval, share of waiting, peak MiB; "" where there is none."""
    rate, wait, peak = trial.rate, trial.wait_share, trial.peak_bytes
    return (
        described(trial.settings),
        "" if rate is None else f"{rate.median:,.1f}",
        "" if rate is None else f"{rate.low:,.1f} to {rate.high:,.1f}",
        "" if wait is None else f"{100 * wait:.1f} %",
        "" if peak is None else f"{peak / 2**20:,.0f}",
    )


def fastest(trials: Iterable[Trial]) -> Trial | None:
    """The one with the highest rate among those that ended well."""
    rated = [(t.rate.median, -i, t) for i, t in enumerate(trials) if t.status == OK and t.rate is not None]
    return max(rated)[2] if rated else None


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items() if value is not None)
