# SPDX-License-Identifier: Apache-2.0
"""Messages of the loop: to a file for each rank, and of rank 0 to the console too."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

LOGGER = logging.getLogger("fastloop")


class RankLog:
    """Sends what is logged under "fastloop" (Python's logging) to `run_dir/logs/rank-<rank>.log`, from INFO on.

    Rank 0 also writes it to the console, unless the program has set up logging of its own, which then shows it. Files
    are appended to. `close` takes the handlers away again.

    Args:
        run_dir: folder of the run; None for no file.
        rank: of this process.
        write: takes a line for the console; None is stderr. A progress bar has one that does not break the bar.
    """

    def __init__(self, run_dir: Path | None, rank: int = 0, write: Callable[[str], None] | None = None) -> None:
        self._level = LOGGER.level
        self._handlers: list[logging.Handler] = []
        if rank == 0 and not LOGGER.hasHandlers():
            self._add(_Console(write), "%(levelname)s %(message)s")
        if run_dir is not None:
            folder = Path(run_dir) / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(folder / f"rank-{rank}.log", encoding="utf-8", delay=True)
            self._add(file, "%(asctime)s %(levelname)s %(name)s: %(message)s")
        if self._handlers and LOGGER.getEffectiveLevel() > logging.INFO:
            LOGGER.setLevel(logging.INFO)

    def _add(self, handler: logging.Handler, form: str) -> None:
        handler.setLevel(logging.INFO)
        handler.setFormatter(logging.Formatter(form))
        LOGGER.addHandler(handler)
        self._handlers.append(handler)

    def close(self) -> None:
        while self._handlers:
            handler = self._handlers.pop()
            LOGGER.removeHandler(handler)
            handler.close()
            if not LOGGER.handlers:  # no other run of this process listens
                LOGGER.setLevel(self._level)


class _Console(logging.Handler):
    def __init__(self, write: Callable[[str], None] | None) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if self._write is not None:
                self._write(line)
            else:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        except Exception:  # as every handler of logging: a console that is gone ends no training
            self.handleError(record)
