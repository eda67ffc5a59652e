# SPDX-License-Identifier: Apache-2.0
"""Signals that ask a training to save and to stop, answered at the end of a window."""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

SAVE_AND_STOP = (signal.SIGTERM, signal.SIGINT)
SAVE = (signal.SIGUSR1,)


class Signals:
    """While active, SIGTERM and Ctrl-C set `stop`, SIGUSR1 sets `save`; a second Ctrl-C interrupts at once.

    Python runs handlers on the main thread alone: elsewhere nothing is installed, and a signal does what it did.
    """

    def __init__(self) -> None:
        self.stop: signal.Signals | None = None
        self.save = False
        self.answered = False  # the run has ended for it
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self.stop, self.save, self.answered = None, False, False
        if threading.current_thread() is threading.main_thread():
            for number in (*SAVE_AND_STOP, *SAVE):
                self._earlier[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._earlier = {}
        if self.stop is not None and not self.answered and kind in (None, GeneratorExit):
            # The loop was left before it could answer. Python ignores what is raised while a generator is closed.
            threading.Thread(target=_send_after, args=(_outer_generator(), self.stop)).start()

    def _received(self, number: int, frame: Any) -> None:
        del frame
        if number in SAVE:
            self.save = True
        elif self.stop is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.stop = signal.Signals(number)


def _outer_generator() -> FrameType:
    """The frame, among the callers of `Signals.__exit__`, of the generator that hands out the windows."""
    frame = found = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_flags & inspect.CO_GENERATOR and frame.f_globals.get("__package__") == __package__:
            found = frame
    return found


def _send_after(closing: FrameType, number: int) -> None:
    """Send the signal when the main thread has left that frame: it may wait there for a save to be written."""
    left = False
    while not left:
        time.sleep(0.02)
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame is not closing:
            frame = frame.f_back
        left = frame is None
    os.kill(os.getpid(), number)


class ShieldedInit:
    """A DataLoader's worker_init_fn that leaves those signals to the main process, and then runs the user's own.

    A signal to the process group would otherwise kill the workers while the main process still needs them to reach
    the end of its window. Workers end when the main process does: DataLoader watches for that.
    """

    def __init__(self, then: Any = None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        for number in (*SAVE_AND_STOP, *SAVE):
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)
