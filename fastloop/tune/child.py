# SPDX-License-Identifier: Apache-2.0
"""The process of one trial: reads what to call, calls it, writes the answer. Started by `trial.run`.

    python -m fastloop.tune.child REQUEST ANSWER        # file descriptors

Both are files, not pipes: an answer of any length can be written while nobody reads, and DataLoader workers that
inherit them keep nobody waiting. The answer has a line of JSON for each note, and a last one for the result or error.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastloop.tune.watch import OnNote

MEMORY_TEXTS = (  # of errors that are no MemoryError and no torch.OutOfMemoryError
    "can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory",
    "is killed by signal: Killed", "unable to allocate",
)  # fmt: skip
TimeLimit = tuple[float, "float | None"]  # the deadline; seconds until the next, if notes begin it anew
_answer: Any = None
_listener: OnNote | None = None  # of a trial in this process
_allowed: float | None = None  # seconds after each note, where they begin anew


def note(**values: Any) -> None:
    """Values that the trial's Outcome has in `notes` even if it fails later. Outside of a trial nothing happens."""
    if _listener is not None:
        _listener(values, None)
    elif _answer is not None:
        _answer.write(json.dumps({"note": values}) + "\n")
        _answer.flush()
        if _allowed is not None:
            _dump_before(time.monotonic() + _allowed)


@contextmanager
def notes_to(listener: OnNote | None) -> Iterator[None]:
    """Notes of a trial in this process go to `listener`."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is about memory of the host or of a device."""
    while error is not None:
        name = type(error).__name__
        if isinstance(error, MemoryError) or name == "OutOfMemoryError":
            return True
        if isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in MEMORY_TEXTS):
            return True
        error = error.__cause__ or error.__context__
    return False


def described(error: BaseException) -> dict[str, Any]:
    """The error as JSON, with a traceback that begins where the trial's own files end."""
    text = str(error)
    if isinstance(error, SystemExit):
        reason = f"the target ended the process: sys.exit({'' if error.code is None else repr(error.code)})"
    elif text.startswith("["):
        reason = text
    else:
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
    lines = traceback.format_exception(type(error), error, _beyond(error.__traceback__))
    trace = "" if type(error).__name__ == "ConfigError" else "".join(lines)  # which says where, and is ours
    return {"reason": reason, "traceback": trace, "out_of_memory": is_out_of_memory(error)}


def _beyond(trace: TracebackType | None) -> TracebackType | None:
    """`trace` from the first frame that is the target's own; all of it where there is none."""
    package = Path(__file__).parent
    own, rest = (str(package), str(package.parent / "loop" / "config.py"), "importlib"), trace
    while rest is not None and any(part in rest.tb_frame.f_code.co_filename for part in own):
        rest = rest.tb_next
    return rest or trace


def _end_with_parent() -> None:
    """The kernel ends this process when the one that started it is gone."""
    set_death_signal = 1
    try:
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
    except (OSError, AttributeError):  # not on Linux
        return


def _dump_before(deadline: float) -> None:
    """Write where every thread is to stderr shortly before the process will be ended."""
    left = deadline - time.monotonic()
    faulthandler.dump_traceback_later(max(min(left - 0.5, 0.9 * left), 0.05), file=sys.stderr)


def main() -> None:
    """Run the request of the first descriptor, answer on the second, end without waiting for anything else."""
    request = json.loads(os.fdopen(int(sys.argv[1]), "rb").read())
    answer = int(sys.argv[2])
    sys.path[:] = list(dict.fromkeys([*request["folders"], *(path for path in sys.path if path)]))
    sys.argv[1:] = []

    def call() -> Any:
        module, _, name = request["function"].partition(":")
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
        return function(**request["arguments"])

    _answer_with(call, request["parent"], answer, (request["deadline"], request["allowed"]))


def main_of_fork(
    function: Callable[[], Any], parent: int, answer: int, output: int, time_limit: TimeLimit, threads: int
) -> None:
    """The same in a fork: a session of its own, output into a file, never back into the caller's code."""
    try:
        os.setsid()
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(threads)
        _answer_with(function, parent, answer, time_limit)
    finally:
        os._exit(70)


def _answer_with(call: Callable[[], Any], parent: int, answer: int, time_limit: TimeLimit) -> None:
    """Call, write the result or the error, and end the process."""
    global _answer, _allowed
    _answer = os.fdopen(answer, "w", encoding="utf-8", closefd=False)
    _end_with_parent()
    if os.getppid() != parent:
        os._exit(1)
    faulthandler.enable(sys.stderr)
    deadline, _allowed = time_limit
    _dump_before(deadline)
    code = 0
    try:
        last = json.dumps({"result": call()})
    except BaseException as error:
        last, code = json.dumps({"error": described(error)}), 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
    faulthandler.cancel_dump_traceback_later()
    _answer.write(last + "\n")
    _answer.flush()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
    os._exit(code & 0xFF)  # no thread, worker or exit handler of the target can keep the answer from being taken


if __name__ == "__main__":
    # Under its own name, so that `note` of whoever imports this module finds the answer's file.
    from fastloop.tune import child

    child.main()
