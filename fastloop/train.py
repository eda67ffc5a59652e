# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.train config.toml`: trains what a config describes; the same command goes on with the run.

Under torchrun: `torchrun --nproc-per-node 2 -m fastloop.train config.toml`. Exit code: 0 done, 2 wrong use, 130 after
Ctrl-C and 143 after SIGTERM, both with the run saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastloop.loop import Loop
from fastloop.loop.config import Config, ConfigError, Training, build, read

WRONG_USE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    given = _parser().parse_args(arguments)
    try:
        training = _training(_config(given), given.resume)
        training.check()
    except (ConfigError, RuntimeError, FileNotFoundError) as error:
        if not str(error).startswith("["):  # not one of ours: the target's, with its traceback
            raise
        print(error, file=sys.stderr)
        return WRONG_USE
    try:
        history = training.fit()
    except KeyboardInterrupt:
        return INTERRUPTED
    loop = training.loop
    if loop.ranks.rank == 0:
        last = [
            f"{name} {points[-1][1]:.6g}" for name, points in history.items() if name.endswith(("/loss", "/accuracy"))
        ]
        print(f"step {loop.global_step}: {', '.join(last) or 'nothing was logged'}")
    return 0


def _config(given: argparse.Namespace) -> Config:
    config = read(given.config, given.set)
    if not {"epochs", "max_steps"} & config.table("fit").keys():
        raise config.error(("fit",), "how long? write epochs or max_steps in the table [fit]")
    return config


def _training(config: Config, resume: str | None) -> Training:
    if resume is None:
        return build(Loop, config)
    return build(Loop, config, resume=False if resume == "never" else resume)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastloop.train", description="Trains what a config describes.")
    add = parser.add_argument
    add("config", help="a TOML or JSON file; see docs/loop.md")
    add(
        "--set", action="append", default=[], metavar="TABLE.KEY=VALUE",
        help="a value in place of the file's, as in --set loop.precision=bf16; may be given again",
    )  # fmt: skip
    add(
        "--resume", metavar="WHICH",
        help="auto (the newest good checkpoint in run_dir, if any), never, latest, best, final, or a checkpoint's name "
        "or path; default: as the config says, else auto",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
