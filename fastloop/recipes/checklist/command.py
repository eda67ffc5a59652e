# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.recipes checklist RUN_DIR`: the documents' checklists, answered from a run's folder."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from fastloop.loop.files import replace_file
from fastloop.recipes.checklist.report import checklist
from fastloop.recipes.tracking.run_folder import NoSuchRun

NAME = "checklist"
NO_RUN = 4


def add(commands: Any) -> None:
    """Add the command's own options."""
    parser = commands.add_parser(
        NAME,
        help="the documents' checklists, answered from a run's folder",
        description="Answer each checklist line of the documents from a run's folder. Exits with 4 without such a run.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="of a Loop")
    parser.add_argument("--project", metavar="DIR", help="another folder whose records and exported files count too")
    parser.add_argument("--markdown", metavar="FILE", help="write the answers there as a page")
    parser.add_argument("--json", metavar="FILE", help="write the answers there as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the answers, write what was asked for; the exit code."""
    try:
        answers = checklist(options.run_dir, project=options.project)
    except NoSuchRun as error:
        print(error, file=sys.stderr)
        return NO_RUN
    if options.markdown:
        replace_file(options.markdown, answers.markdown())
    if options.json:
        replace_file(options.json, json.dumps(answers.to_json(), indent=1) + "\n")
    print(answers)
    return 0
