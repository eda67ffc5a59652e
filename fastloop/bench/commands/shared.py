# SPDX-License-Identifier: Apache-2.0
"""What several commands share: exit codes, the line that shows progress, how verdicts look."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from fastloop.bench.stats import Verdict

OK, REGRESSION, USAGE, WRONG, VOID, NO_BASELINE = range(6)
EXIT_CODES = (
    "exit codes: 0 ok or inconclusive, 1 regression, 2 usage, 3 wrong result, 4 environment void, 5 no baseline"
)
OUTPUT = Path(".fastloop") / "bench"

STYLES = {
    Verdict.REGRESSED: "bold red",
    Verdict.VOID: "yellow",
    Verdict.IMPROVED: "bold green",
    Verdict.PASS: "green",
}


def style(verdict: Verdict | None) -> str:
    return STYLES.get(verdict, "") if verdict else ""


def fail(message: object) -> None:
    """Say what is wrong, on stderr."""
    print(message, file=sys.stderr)


@contextmanager
def progress() -> Iterator[Callable[[str, int], None]]:
    """A line on the terminal with what is being measured; silent where stderr is not one."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Four times a second: the display is a thread, and must not be what is measured.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=4
    ) as bar:
        task = bar.add_task("starting")
        yield lambda text, count: bar.update(task, description=f"{text}, {count} done" if count else text)
