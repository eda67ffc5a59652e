# SPDX-License-Identifier: Apache-2.0
"""Ranges of settings: what a search may choose from."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from fastloop.extras import need

TABLES = ("arguments", "loop", "loader", "fit")
MOST = 100_000  # combinations of a grid
_SCALARS = (str, int, float, bool, type(None))


def _check_range(given: Any, kinds: Any) -> None:
    name = type(given).__name__
    for end in (given.low, given.high):
        if isinstance(end, bool) or not isinstance(end, kinds) or not math.isfinite(end):
            raise ValueError(f"[search] {name} needs numbers, got {given}")
    if not isinstance(given.log, bool):
        raise ValueError(f"[search] {name}: log must be True or False, got {given.log!r}")
    if given.low >= given.high:
        raise ValueError(
            f"[search] {name} needs low < high, got {given}; for one value alone leave it out of the space"
        )
    if given.log and given.low <= 0:
        raise ValueError(f"[search] {name}: a logarithm needs low above 0, got {given}; begin at a small number")


@dataclass(frozen=True)
class Float:
    """Numbers from low to high, both included; with `log`, their logarithms are drawn uniformly."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self, (int, float))


@dataclass(frozen=True)
class Int:
    """Integers from low to high, both included; with `log`, their logarithms are drawn uniformly."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        _check_range(self, (int,))


@dataclass(frozen=True)
class Choice:
    """One of these values: of JSON, a schedule's table for instance."""

    values: tuple[Any, ...]

    def __init__(self, values: Any) -> None:
        if isinstance(values, (str, bytes, Mapping, Set)) or not hasattr(values, "__iter__"):
            raise ValueError(f"[search] Choice needs a list of values, got {values!r}")
        found = tuple(values)
        try:
            written = [json.dumps(value, sort_keys=True, allow_nan=False) for value in found]
        except (TypeError, ValueError) as error:
            raise ValueError(f"[search] values of a Choice travel to another process as JSON: {error}") from None
        if not found or len(set(written)) < len(written):
            raise ValueError(f"[search] Choice needs values that differ, at least one, got {list(found)!r}")
        object.__setattr__(self, "values", found)


Range = Float | Int | Choice
Space = Mapping[str, Range]

# As the field's tables give them. A weight decay of 0 has no logarithm: the range begins where it no longer matters.
DEFAULT_SPACE: dict[str, Range] = {
    "arguments.lr": Float(1e-5, 1e-1, log=True),
    "loader.batch_size": Choice([16, 32, 64, 128, 256, 512]),
    "arguments.weight_decay": Float(1e-6, 1e-2, log=True),
    "arguments.layers": Int(2, 10),
    "arguments.hidden": Choice([64, 128, 256, 512, 1024]),
    "arguments.dropout": Float(0.0, 0.5),
}

# What to tune first, second and third; without a range here where it depends on the project.
PRIORITIES: tuple[tuple[str, ...], ...] = (
    ("arguments.lr", "loader.batch_size"),
    ("arguments.weight_decay", "arguments.layers", "arguments.hidden", "loop.schedule"),
    ("arguments.dropout", "arguments.optimizer", "arguments.activation"),
)


def to_json(space: Space) -> dict[str, Any]:
    """As it stands in the study, and in what `parsed` reads."""
    return {
        key: json.loads(json.dumps(list(r.values)))
        if isinstance(r, Choice)
        else {**asdict(r), "type": type(r).__name__}
        for key, r in space.items()
    }


def parsed(tables: Mapping[str, Any]) -> dict[str, Range]:
    """The space of a TOML file.

        [arguments]
        lr = {low = 1e-5, high = 1e-1, log = true}    # Float; with two integers Int
        optimizer = ["sgd", "adamw"]                  # Choice

    Raises:
        ValueError: something else.
    """
    found: dict[str, Range] = {}
    for table, keys in tables.items():
        if table not in TABLES or not isinstance(keys, Mapping):
            raise ValueError(f"[search] the tables of a space are {', '.join(TABLES)}, got {table!r}")
        for name, given in keys.items():
            found[f"{table}.{name}"] = _range(f"{table}.{name}", given)
    if not found:
        raise ValueError("[search] the space is empty; write e.g. [arguments] and lr = {low = 1e-5, high = 0.1}")
    return found


def samples(given: Range) -> list[Any]:
    """Values that have to be allowed if the range is: the ends, or all."""
    return list(given.values) if isinstance(given, Choice) else [given.low, given.high]


def grid(space: Space) -> list[dict[str, Any]]:
    """Every combination.

    Raises:
        ValueError: a Float, which has no end of values, or more than MOST combinations.
    """
    axes: list[Sequence[Any]] = []
    for key, given in space.items():
        if isinstance(given, Float):
            middle = math.sqrt(given.low * given.high) if given.log else (given.low + given.high) / 2
            raise ValueError(
                f'[search] method="grid" needs values that can be counted, got {given} for {key}; write e.g. '
                f"Choice([{given.low:g}, {middle:g}, {given.high:g}])"
            )
        axes.append(given.values if isinstance(given, Choice) else range(given.low, given.high + 1))
    count = math.prod(len(axis) for axis in axes)
    if count > MOST:
        raise ValueError(
            f'[search] method="grid" would train {count:,} combinations, {MOST:,} are the most; pass Choice with fewer '
            'values, or method="random"'
        )
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]


def distributions(space: Space) -> dict[str, Any]:
    """As Optuna has them."""
    kinds = need("optuna.distributions", "search", "a search")
    return {
        key: kinds.CategoricalDistribution([_text(value) for value in given.values])
        if isinstance(given, Choice)
        else getattr(kinds, f"{type(given).__name__}Distribution")(given.low, given.high, log=given.log)
        for key, given in space.items()
    }


def encoded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as Optuna's parameters, which are scalars."""
    return {key: _text(value) for key, value in settings.items()}


def decoded(space: Space, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Optuna's parameters as settings, in the order of the space."""
    found = {}
    for key, given in space.items():
        if key in parameters:
            value = parameters[key]
            if isinstance(given, Choice):
                value = next(each for each in given.values if _same(_text(each), value))
            found[key] = value
    return found


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b  # 1, 1.0 and True are three choices


def _text(value: Any) -> Any:
    return value if isinstance(value, _SCALARS) else json.dumps(value, sort_keys=True)


def _range(key: str, given: Any) -> Range:
    if isinstance(given, list):
        return Choice(given)
    if not isinstance(given, Mapping) or not {"low", "high"} <= given.keys() <= {"low", "high", "log"}:
        raise ValueError(
            f"[search] {key} must be a list of values or {{low = ..., high = ..., log = true}}, got {given!r}"
        )
    whole = all(isinstance(given[end], int) for end in ("low", "high"))
    return (Int if whole else Float)(**given)
