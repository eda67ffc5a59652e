# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.recipes schedule NAME|all`: rows of a schedule as text, and its picture."""

from __future__ import annotations

import argparse
import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastloop import schedules
from fastloop.recipes.schedule.plot import evaluations, plot_schedule, rates_of, resolved
from fastloop.schedules import Schedule
from fastloop.texts import columns

NAME = "schedule"
ALL = "all"
ROWS = 11
EVALUATIONS = 50  # of the example that "plateau" follows


def add(commands: Any) -> None:
    """The sub-parser of this command."""
    parser = commands.add_parser(
        NAME,
        help="show a learning rate schedule as text and as a picture",
        description="Show the learning rate of windows 0 ... STEPS - 1. Arguments that a schedule has no default for "
        "get those of an example.",
    )
    parser.add_argument("name", metavar="NAME|all", help=f"one of {', '.join(schedules.names())}; all for each of them")
    parser.add_argument(
        "arguments", nargs="*", metavar="KEY=VALUE", help="arguments of the schedule, such as gamma=0.5"
    )
    parser.add_argument("--steps", type=int, default=1000, help="windows of the training (default 1000)")
    parser.add_argument("--lr", type=float, default=1.0, help="base learning rate (default 1)")
    parser.add_argument("--plot", type=Path, metavar="FILE|DIR", help="picture to write, or a folder for it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print and draw; returns 0. Wrong arguments raise ValueError or TypeError."""
    if options.name == ALL:
        return _run_all(options)
    made = described(options.name, _parsed(options.arguments), options.steps)
    values = example_values(options.steps) if made.follows_metric else None
    rates = rates_of(made, options.steps, options.lr, values)
    print(made)
    if values is not None:
        print(f"of an example: {len(values)} evaluations of a metric that falls, then stays")
    print(columns(("window", "learning rate"), [(step, rates[step]) for step in shown(rates)]))
    if options.plot is not None:
        path = options.plot / f"{options.name}.png" if options.plot.is_dir() else options.plot
        print(plot_schedule(made, options.steps, path, lr=options.lr, values=values))
    return 0


def _run_all(options: argparse.Namespace) -> int:
    if options.arguments:
        raise ValueError(f"[schedule] all takes no arguments of a schedule, got {' '.join(options.arguments)}")
    if options.plot is not None:
        if options.plot.exists() and not options.plot.is_dir():
            raise ValueError(f"[schedule] --plot must be a folder for all of them, {options.plot} is a file")
        options.plot.mkdir(parents=True, exist_ok=True)
    parts = {"first": 0.0, "10 %": 0.1, "25 %": 0.25, "50 %": 0.5, "75 %": 0.75, "last": 1.0}
    rows = []
    for name in schedules.names():
        made = described(name, {}, options.steps)
        values = example_values(options.steps) if made.follows_metric else None
        rates = rates_of(made, options.steps, options.lr, values)
        rows.append((name, *(rates[round(part * (options.steps - 1))] for part in parts.values())))
        if options.plot is not None:
            plot_schedule(made, options.steps, options.plot / f"{name}.png", lr=options.lr, values=values)
    print(columns(("schedule", *parts), rows))
    if options.plot is not None:
        print(f"{len(rows)} pictures in {options.plot}")
    return 0


def described(name: str, arguments: dict[str, Any], total_steps: int) -> Schedule:
    """The schedule of that name with these arguments; what it has no default for comes from an example."""
    most = max(total_steps, 1)
    examples: dict[str, dict[str, Any]] = {
        "cosine_restarts": {"first_steps": max(most // 4, 1)},
        "cyclic": {"up_steps": max(most // 8, 1)},
        "exponential": {"gamma": 0.01 ** (1 / most)},
        "inverse_sqrt": {"warmup_steps": most // 10},
        "multi_step": {"milestones": [most // 2, most * 3 // 4]},
        "step": {"step_size": max(most // 3, 1)},
        "warmup_constant": {"warmup_steps": most // 10},
        "warmup_cosine": {"warmup_steps": 0.1},
        "warmup_linear": {"warmup_steps": 0.1},
        "warmup_stable_decay": {"warmup_steps": 0.1, "decay_steps": 0.2},
    }
    if "name" in arguments:
        raise ValueError("[schedule] the name is the first argument; leave name=... out")
    made = resolved({"name": name, **examples.get(name, {}), **arguments}, total_steps)
    assert isinstance(made, Schedule)
    return made


def example_values(total_steps: int) -> list[float]:
    """A metric that falls for a quarter of the training and then stays: of up to EVALUATIONS evaluations."""
    count = min(EVALUATIONS, total_steps)
    return [max(math.exp(-8 * (i + 1) / count), math.exp(-2)) for i in range(count)]


def shown(rates: Sequence[float]) -> list[int]:
    """Windows to print: in even distances, with the first, the last and the highest."""
    total = len(rates)
    even = [0, *(step - 1 for step in evaluations(total, min(ROWS - 1, total)))]
    return sorted({*even, max(range(total), key=rates.__getitem__)})


def _parsed(arguments: Sequence[str]) -> dict[str, Any]:
    found = {}
    for each in arguments:
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise ValueError(f"[schedule] arguments must be KEY=VALUE, got {each!r}; pass e.g. gamma=0.5")
        found[key] = _value(value)
    return found


def _value(text: str) -> Any:
    """As Python or JSON writes it; 30,60 is a list; anything else is text."""
    words = {"null": None, "true": True, "false": False}
    try:
        return words[text] if text in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


__all__ = ["NAME", "add"]
