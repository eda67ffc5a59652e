# SPDX-License-Identifier: Apache-2.0
"""What a search has found."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fastloop.recipes.results import Result
from fastloop.recipes.search.importance import importances
from fastloop.recipes.search.plot import draw
from fastloop.recipes.search.space import Range, to_json
from fastloop.texts import columns, number
from fastloop.tune import toml_edit
from fastloop.tune.target import Target

OK, PRUNED, FAILED = "ok", "pruned", "failed"


@dataclass(frozen=True)
class SearchTrial:
    """One training.

    Attributes:
        number: its run is in folder/trials, under this number.
        settings: by key of the space.
        value: of the metric: of "val/..." the best of its evaluations, of others the last; None where it has none.
        status: "ok", "pruned", "failed", "timeout", "out of memory" or "interrupted".
        reason: why it is not ok.
        values: of its evaluations, as far as it came.
    """

    number: int
    settings: dict[str, Any]
    value: float | None
    status: str
    reason: str
    seconds: float
    values: tuple[float, ...] = ()


@dataclass
class SearchReport(Result):
    """The trials of a search, and the best of them.

    Attributes:
        trials: in the order in which they ran, those of earlier calls first.
        space, target, fit: what was searched.
    """

    practice: ClassVar[str] = "search"

    metric: str
    mode: str
    method: str
    folder: Path
    trials: list[SearchTrial]
    space: dict[str, Range] = field(repr=False)
    target: Target = field(repr=False)
    fit: dict[str, Any] = field(repr=False)
    seed: int = 0

    @property
    def best(self) -> SearchTrial | None:
        """The trial with the best value; None where none has come to its end."""
        return next(iter(self.ranked()), None)

    @property
    def importances(self) -> dict[str, float]:
        """By key, how much of the differences between values it explains; the sum is 1. {} with fewer than 4 values."""
        return importances(self._values(), self.space, self.seed)[0]

    @property
    def importance_method(self) -> str:
        """ "fANOVA" (with scikit-learn), "rank correlation", or "" where nothing can be said."""
        return importances(self._values(), self.space, self.seed)[1]

    def ranked(self) -> list[SearchTrial]:
        """Those with a value, the best first."""
        found = [trial for trial in self.trials if trial.status == OK and trial.value is not None]
        sign = 1 if self.mode == "min" else -1
        return sorted(found, key=lambda trial: (sign * (trial.value or 0.0), trial.number))

    def table(self) -> str:
        """Trials with their settings, the best first and those without a value last; then what matters most."""
        ranked = self.ranked()
        rest = [trial for trial in self.trials if trial not in ranked]
        rows = [
            [
                t.number,
                t.status,
                t.value,
                *(_cell(t.settings.get(key)) for key in self.space),
                round(t.seconds, 1),
                t.reason,
            ]
            for t in [*ranked, *rest]
        ]
        names = [key.partition(".")[2] for key in self.space]
        text = columns(("trial", "status", self.metric, *names, "seconds", "reason"), rows)
        found, method = importances(self._values(), self.space, self.seed)
        if found:
            order = sorted(found.items(), key=lambda item: -item[1])
            text += f"\nimportance ({method}): " + ", ".join(f"{key} {number(share, 2)}" for key, share in order)
        return text

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON, with the best trial and the importances."""
        best = self.best
        found = super().to_json()
        shares, method = importances(self._values(), self.space, self.seed)
        return {
            **found,
            "best": None if best is None else next(t for t in found["trials"] if t["number"] == best.number),
            "space": to_json(self.space),
            "target": self.target.function,
            "importances": shares,
            "importance_method": method,
        }

    def tables(self, settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """The config of a training with the best settings, or with these."""
        if settings is None:
            if self.best is None:
                raise ValueError("[search] no trial has come to its end, so there is no best config; see the table")
            settings = self.best.settings
        return merged(self.target, self.fit, settings, self.seed)

    def toml(self) -> str:
        """A config for `python -m fastloop.train` and `Loop.from_config` with the best settings.

        Raises:
            ValueError: no trial has come to its end.
        """
        tables = self.tables()
        known = {"": {"target": tables.pop("target")}, **tables}
        return toml_edit.edit("", {name: _without_none(name, keys) for name, keys in known.items() if keys})

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write a picture: values by trial with the best so far, and the value against each setting.

        Raises:
            ValueError: no trial has a value, or a path that cannot be.
            MissingExtra: matplotlib is not installed.
        """
        return draw(self.trials, list(self.space), self.space, self.metric, self.mode, path)

    def _values(self) -> list[tuple[dict[str, Any], float]]:
        return [(t.settings, t.value) for t in self.trials if t.status == OK and t.value is not None]


def merged(target: Target, fit: dict[str, Any], settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """The tables of a config with the settings in them."""
    tables: dict[str, Any] = {
        "target": target.function,
        "arguments": dict(target.arguments),
        "loop": {"seed": seed, **target.options},
        "loader": dict(target.loader),
        "fit": dict(fit),
    }
    for key, value in settings.items():
        table, _, name = key.partition(".")
        tables[table][name] = value
    return tables


def _without_none(table: str, keys: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null: options say "none", of the others it is the default."""
    if table in ("loop", "fit"):
        return {key: "none" if value is None else value for key, value in keys.items()}
    return {key: value for key, value in keys.items() if value is not None}


def _cell(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) or value is None else toml_edit.value_text(value)
