# SPDX-License-Identifier: Apache-2.0
"""The progress bar: when it draws, what it reads, and what it leaves alone."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from fastloop.loop.progress import BAR_SECONDS, LINE_SECONDS, SHARE, Progress


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    """Counts its calls; `takes` seconds pass with each."""

    def __init__(self, takes: float = 0.0) -> None:
        self.now, self.takes, self.calls = 0.0, takes, 0

    def __call__(self) -> float:
        self.calls += 1
        self.now += self.takes
        return self.now


class Unread(Mapping[str, Any]):
    """Fields that must not be looked at."""

    def __getitem__(self, name: str) -> Any:
        raise AssertionError("read")

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("read")

    def __len__(self) -> int:
        raise AssertionError("read")


BARS = ("rich", "tqdm")


@pytest.fixture(params=BARS)
def bar(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    pytest.importorskip(request.param, reason=f"needs the package {request.param}")
    if request.param == "tqdm":
        monkeypatch.setitem(sys.modules, "rich.progress", None)
    return str(request.param)


def test_a_bar_on_a_terminal(bar: str) -> None:
    stream, clock = Stream(True), Clock()
    progress = Progress(total=200, initial=50, stream=stream, clock=clock)
    assert progress.active
    clock.now = 1.0
    progress.update(100, {"loss": 2.3456789, "epoch": 3, "note": "[red]warm-up[/]"})
    shown = stream.getvalue()
    assert "100/200" in shown
    assert "loss 2.346" in shown
    assert "epoch 3" in shown
    assert "[red]warm-up[/]" in shown  # text, no markup
    progress.write("a line [above]")
    assert "a line [above]\n" in stream.getvalue()
    progress.update(101, {"loss": 1.0})  # too early to be drawn, and so drawn at the end
    assert "101/200" not in stream.getvalue()
    progress.close()
    assert "101/200" in stream.getvalue()
    progress.close()
    assert not progress.active


def test_between_two_drawings_only_the_clock_is_read(bar: str) -> None:
    stream, clock = Stream(True), Clock()
    progress = Progress(total=None, stream=stream, clock=clock)
    progress.update(1, {})
    shown, calls = stream.getvalue(), clock.calls
    clock.now += 0.9 * BAR_SECONDS
    for step in range(2, 100):
        progress.update(step, Unread())
    assert (stream.getvalue(), clock.calls) == (shown, calls + 98)
    clock.now += BAR_SECONDS
    progress.update(100, {"loss": 1.0})
    assert "loss 1" in stream.getvalue()
    progress.close()


def test_drawing_takes_at_most_its_share(bar: str) -> None:
    """Each call of the clock takes 0.25 s here: a drawing, with two of them around it, takes 0.25 s."""
    stream, clock = Stream(True), Clock(takes=0.25)
    progress = Progress(total=10**6, stream=stream, clock=clock)
    progress.update(1, {})
    drawn, began = clock.now, stream.getvalue()
    step = 1
    while stream.getvalue() == began:
        step += 1
        progress.update(step, {"step": step})
    assert clock.now - drawn >= 0.25 / SHARE
    progress.close()


def test_no_tensor_is_read_and_no_thread_started(bar: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("a tensor was read")

    for name in ("item", "__float__", "__format__", "__repr__", "__str__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, read)
    threads = threading.active_count()
    stream = Stream(True)
    progress = Progress(total=10, stream=stream, clock=Clock())
    progress.update(1, {"loss": torch.ones(()), "lr": 0.5})
    assert threading.active_count() <= threads  # one of an earlier test may have ended
    assert "lr 0.5" in stream.getvalue()
    assert "loss" not in stream.getvalue()
    progress.close()


def test_lines_where_there_is_no_terminal() -> None:
    stream, clock = Stream(False), Clock()
    progress = Progress(True, total=400, initial=100, stream=stream, clock=clock)
    clock.now = 10.0
    progress.update(120, {"loss": 0.5})
    assert stream.getvalue() == "step 120/400 (30 %)  2 steps/s  0:02:20 left  loss 0.5\n"
    clock.now += 0.9 * LINE_SECONDS
    progress.update(150, {"loss": 0.4})
    assert stream.getvalue().count("\n") == 1
    progress.write("above")
    progress.close()
    assert stream.getvalue().splitlines()[1:] == ["above", "step 150/400 (38 %)  1.351 steps/s  0:03:05 left  loss 0.4"]


def test_lines_without_a_length() -> None:
    stream, clock = Stream(False), Clock()
    progress = Progress(True, stream=stream, clock=clock)
    clock.now = 2.0
    progress.update(8, {})
    progress.close()
    assert stream.getvalue() == "step 8  4 steps/s\n"


@pytest.mark.parametrize(("enabled", "terminal"), [(None, False), (False, True), (False, False)])
def test_nothing(enabled: bool | None, terminal: bool) -> None:
    stream = Stream(terminal)
    progress = Progress(enabled, total=10, stream=stream)
    assert not progress.active
    progress.update(1, Unread())
    progress.close()
    assert stream.getvalue() == ""
    progress.write("a message")
    assert stream.getvalue() == "a message\n"


@pytest.mark.parametrize(("enabled", "shown"), [(None, ""), (True, "step 1\n")])
def test_without_rich_and_tqdm(enabled: bool | None, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("rich.progress", "rich.console", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    stream = Stream(True)
    progress = Progress(enabled, stream=stream, clock=Clock(), initial=1)
    progress.update(1, {})
    progress.close()
    assert stream.getvalue() == shown


def test_a_terminal_that_goes_away_ends_no_training(bar: str) -> None:
    class Gone(Stream):
        def write(self, text: str) -> int:
            if self.gone:
                raise OSError(5, "Input/output error")
            return super().write(text)

        gone = False

    stream, clock = Gone(True), Clock()
    progress = Progress(total=10, stream=stream, clock=clock)
    progress.update(1, {})
    stream.gone = True
    clock.now += 1.0
    progress.update(2, {})
    if bar == "rich":  # tqdm goes on silently by itself
        assert not progress.active
        progress.update(3, Unread())
    progress.write("nobody reads it")
    progress.close()
