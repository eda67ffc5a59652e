# SPDX-License-Identifier: Apache-2.0
"""A progress bar that takes at most a hundredth of the time, and a line now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol, TextIO

BAR_SECONDS = 0.1  # between two drawings: more often than ten times a second nobody reads
LINE_SECONDS = 30.0  # between two lines in a log file
GONE = (OSError, ValueError)  # what a terminal that is gone raises, or a closed file: that ends no training
SHARE = 0.01  # of the time that drawing may take: a bar of rich takes milliseconds to draw


class _Display(Protocol):
    def draw(self, step: int, text: str) -> None: ...

    def write(self, line: str) -> None: ...

    def close(self) -> None: ...


class Progress:
    """How far the training is.

    Args:
        enabled: None shows a bar where stderr is a terminal and nothing elsewhere; True a bar there and plain lines
            elsewhere; False nothing.
        total: windows of the whole training; None where nobody knows.
        initial: windows done before, those of the checkpoint that a run goes on from; they do not count for the speed.
        stream: stands in for stderr.
        clock: seconds, for tests.

    The bar is rich's, else tqdm's; without both there is none, and lines are written instead if `enabled` is True.
    Nothing here reads a tensor: fields that are neither numbers nor texts are not shown.
    """

    def __init__(
        self,
        enabled: bool | None = None,
        *,
        total: int | None = None,
        initial: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._stream = stream
        self._display: _Display | None = None
        self._last: tuple[int, Mapping[str, Any]] | None = None
        self._period = BAR_SECONDS
        if enabled is not False:
            terminal = _is_terminal(stream)
            if terminal:
                self._display = _rich_bar(stream, total, initial) or _tqdm_bar(stream, total, initial)
            if self._display is None and enabled:
                self._display, self._period = _Lines(stream, total, initial, clock), LINE_SECONDS
        self._due = clock() if self._display is not None else float("inf")

    @property
    def active(self) -> bool:
        """Whether anything is shown."""
        return self._display is not None

    def update(self, step: int, fields: Mapping[str, Any]) -> None:
        """Shows window `step` and the fields, unless it was done shortly before; the mapping may be the same each time.

        Args:
            step: windows done, skipped ones too.
            fields: what to show beside, numbers and texts by name; read only if it is shown.
        """
        if self._clock() < self._due:
            self._last = (step, fields)
            return
        self._draw(step, fields)

    def write(self, line: str) -> None:
        """Writes a line above the bar, or to stderr if there is none."""
        with suppress(*GONE):
            if self._display is not None:
                self._display.write(line)
            else:
                self._stream.write(line + "\n")
                self._stream.flush()

    def close(self) -> None:
        """Shows the last state and ends the bar; a second call does nothing."""
        if self._display is None:
            return
        if self._last is not None:
            self._draw(*self._last)
        display, self._display = self._display, None
        self._due = float("inf")
        if display is not None:
            with suppress(*GONE):
                display.close()

    def _draw(self, step: int, fields: Mapping[str, Any]) -> None:
        if self._display is None:
            return
        began = self._clock()
        try:
            self._display.draw(step, _text(fields))
        except GONE:
            self._display, self._due = None, float("inf")
            return
        self._last = None
        ended = self._clock()
        self._due = ended + max(self._period, (ended - began) / SHARE)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # replaced by an object of the program, or closed
        return False


def _text(fields: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {_short(value)}" for name, value in fields.items() if isinstance(value, (int, float, str))
    )


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- what is shown -----------------------------------------------------------------------------------


class _RichBar:
    def __init__(self, stream: TextIO, total: int | None, initial: int) -> None:
        rich_progress, console = import_module("rich.progress"), import_module("rich.console")
        self._bar = rich_progress.Progress(
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TaskProgressColumn(),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[text]}", markup=False),
            console=console.Console(file=stream),
            auto_refresh=False,  # no thread: it would take the interpreter from the training at any moment
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("", total=total, completed=initial, text="")
        self._bar.start()

    def draw(self, step: int, text: str) -> None:
        self._bar.update(self._task, completed=step)
        speed = self._bar.tasks[0].speed  # over the last seconds; None at first
        self._bar.update(self._task, text=text if speed is None else f"{speed:.4g} steps/s  {text}", refresh=True)

    def write(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


class _TqdmBar:
    def __init__(self, stream: TextIO, total: int | None, initial: int) -> None:
        tqdm = import_module("tqdm").tqdm
        quiet = type("tqdm", (tqdm,), {"monitor_interval": 0})  # no monitoring thread: drawing has its clock here
        self._stream = stream
        self._bar = quiet(total=total, initial=initial, file=stream, dynamic_ncols=True, unit=" steps")

    def draw(self, step: int, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.n = step
        self._bar.refresh()

    def write(self, line: str) -> None:
        self._bar.write(line, file=self._stream)

    def close(self) -> None:
        self._bar.close()


class _Lines:
    def __init__(self, stream: TextIO, total: int | None, initial: int, clock: Callable[[], float]) -> None:
        self._stream, self._total, self._clock = stream, total, clock
        self._initial, self._began = initial, clock()

    def draw(self, step: int, text: str) -> None:
        seconds = max(self._clock() - self._began, 1e-9)
        speed = (step - self._initial) / seconds
        parts = [f"step {step}"]
        if self._total:
            parts[0] += f"/{self._total} ({100 * step / self._total:.0f} %)"
        if speed > 0:
            parts.append(f"{speed:.4g} steps/s")
            if self._total:
                parts.append(f"{_duration((self._total - step) / speed)} left")
        self.write("  ".join([*parts, text] if text else parts))

    def write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        pass


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _rich_bar(stream: TextIO, total: int | None, initial: int) -> _Display | None:
    try:
        return _RichBar(stream, total, initial)
    except ImportError:
        return None


def _tqdm_bar(stream: TextIO, total: int | None, initial: int) -> _Display | None:
    try:
        return _TqdmBar(stream, total, initial)
    except ImportError:
        return None
