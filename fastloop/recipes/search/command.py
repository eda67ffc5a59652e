# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.recipes search`: searches for the best settings of a training, and goes on with a search."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fastloop.loop.config import ConfigError, read
from fastloop.recipes.search.report import SearchTrial
from fastloop.recipes.search.searching import search
from fastloop.recipes.search.space import parsed
from fastloop.recipes.search.study import METHODS
from fastloop.texts import number
from fastloop.tune import toml_edit

NAME = "search"
DONE, NO_VALUE, INTERRUPTED = 0, 1, 130


def add(commands: Any) -> None:
    """The sub-parser of this command."""
    parser = commands.add_parser(
        NAME,
        help="search for the best settings of a training",
        description="Train with settings out of a space, each time in a process of its own. The same command goes on "
        "with the search in its folder. Exit code: 0 done, 1 no trial has come to its end, 2 wrong use, 130 Ctrl-C.",
    )
    give = parser.add_argument
    give("--target", metavar="MODULE:FUNCTION", help="what to train; or")
    give("--config", metavar="FILE", help="a config as of fastloop.train, whose run_dir and resume are left out")
    give("--space", metavar="FILE.toml", help="ranges; without it the default ones of what the target takes")
    give(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE",
        help="a value that is not searched, as --set fit.epochs=5; may be given again",
    )  # fmt: skip
    give("--method", choices=METHODS, default="random")
    give("--trials", type=int, default=30, help="in all, those of earlier calls included (default 30)")
    give("--metric", default="val/loss")
    give("--mode", choices=("min", "max"), default="min")
    give("--folder", required=True, metavar="DIR", help="of the study and of the trials' runs")
    give("--seed", type=int, default=0)
    give("--timeout", type=float, default=3600.0, metavar="SECONDS", help="of a trial (default 3600)")
    give("--budget", type=float, metavar="SECONDS", help="after which no further trial is begun")
    give("--no-pruning", action="store_true", help="train every trial to its end")
    give("--plot", metavar="FILE", help="picture to write")
    give("--json", metavar="FILE", help="the report as JSON")
    give("--toml", metavar="FILE", help="the config of the best trial, for python -m fastloop.train")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Search, print the table and write what was asked for. Wrong use raises ValueError, TypeError or OSError."""
    config = _config(options)
    space = None
    if options.space is not None:
        space = parsed(toml_edit.parsed(Path(options.space).read_text(encoding="utf-8"), options.space))
    try:
        report = search(
            config["target"], space, method=options.method, trials=options.trials, metric=options.metric,
            mode=options.mode, folder=options.folder, pruning=not options.no_pruning, timeout=options.timeout,
            budget=options.budget, arguments=config.get("arguments"), options=config.get("loop"),
            settings=config.get("loader"), fit=config.get("fit"), seed=options.seed, on_trial=_tell,
        )  # fmt: skip
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on with the search in {options.folder}", file=sys.stderr)
        return INTERRUPTED
    except RuntimeError as error:
        if not str(error).startswith("[search]"):
            raise
        raise ValueError(str(error)) from error
    print(report)
    if options.json is not None:
        Path(options.json).write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if report.best is None:
        print(
            f"no trial has come to its end; what they said is in {report.folder / 'trials'}. The same command begins "
            "anew when the mistake is mended",
            file=sys.stderr,
        )
        return NO_VALUE
    if options.toml is not None:
        Path(options.toml).write_text(report.toml(), encoding="utf-8")
    if options.plot is not None:
        print(report.plot(options.plot))
    return DONE


def _config(options: argparse.Namespace) -> dict[str, Any]:
    if (options.target is None) == (options.config is None):
        raise ValueError(
            "[search] what to train? pass --target MODULE:FUNCTION, or --config FILE, and one of them only"
        )
    given = {"target": options.target} if options.config is None else options.config
    config = read(given, options.set)
    if "target" not in config.values:
        raise ConfigError(f'[{config.name}] has no target; write target = "package.module:function" at its top')
    found = {key: value for key, value in config.values.items() if key != "tuned"}
    if options.config is not None:  # the folder of the training itself; each trial has its own
        found["loop"] = {key: value for key, value in found.get("loop", {}).items() if key not in ("run_dir", "resume")}
    return found


def _tell(trial: SearchTrial) -> None:
    what = number(trial.value) if trial.value is not None else f"{trial.status}: {trial.reason}"
    settings = ", ".join(f"{key} {number(value)}" for key, value in trial.settings.items())
    print(f"trial {trial.number}: {what}  ({settings})", file=sys.stderr, flush=True)
