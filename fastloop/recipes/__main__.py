# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.recipes COMMAND`: the recipes that answer on a command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastloop.extras import MissingExtra
from fastloop.recipes.checklist import command as checklist
from fastloop.recipes.schedule import command as schedule
from fastloop.recipes.search import command as search

COMMANDS = (checklist, schedule, search)
WRONG_USE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. argparse itself exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m fastloop.recipes", description=(__doc__ or "").partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each in COMMANDS:
        each.add(commands)
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (MissingExtra, ValueError, TypeError, OSError) as error:
        print(error, file=sys.stderr)
        return WRONG_USE


if __name__ == "__main__":
    sys.exit(main())
