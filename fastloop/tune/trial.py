# SPDX-License-Identifier: Apache-2.0
"""One trial: a function called in a fresh process, which may crash, hang, print or take all memory.

The process gets a session of its own and a mark in its environment. Whatever it starts has both or at least the mark,
and is ended with it: after an answer, after the timeout, at the memory limit, on Ctrl-C.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any

import torch

from fastloop import machine
from fastloop.tune import child
from fastloop.tune.watch import (
    KEPT_OUTPUT,
    MARK,
    OUT_OF_MEMORY,
    TIMEOUT,
    OnNote,
    Process,
    Watch,
    descendants,
    marked,
    resident_bytes,
)

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
SHARE_OF_MEMORY = 0.8


@dataclass
class Outcome:
    """How a trial ended.

    Attributes:
        status: OK, FAILED, OUT_OF_MEMORY or TIMEOUT.
        result: what the function returned, where it is OK.
        notes: values of `child.note`, also where it is not.
        exit_code: below 0 the signal that ended it; None where it was ended by us.
        peak_bytes: of host memory that all its processes had together; None where the system does not say.
        output: the last of what it printed.
    """

    status: str
    result: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    traceback: str = ""
    exit_code: int | None = None
    seconds: float = 0.0
    peak_bytes: int | None = None
    output: str = ""


def memory_limit() -> int | None:
    """Bytes that a trial may take where nobody says: 80 % of what is available; None where the system does not say."""
    available = machine.available_bytes()
    return None if available is None else int(SHARE_OF_MEMORY * available)


def run(
    function: str,
    arguments: Mapping[str, Any],
    *,
    timeout: float,
    memory_limit: int | None,
    folders: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    on_note: OnNote | None = None,
    renew: bool = True,
) -> Outcome:
    """Call `function(**arguments)` in a fresh process and say how it ended. Nothing of it is left running.

    Args:
        function: "package.module:function"; what it takes and returns is of JSON.
        timeout: seconds, the start of Python and the imports included.
        memory_limit: bytes of host memory of all its processes together; None for no limit.
        folders: go before all others on its import path.
        environment: variables on top of this process's.
        on_note: called with each `child.note` and the peak of memory since the last. What it raises ends the trial.
        renew: the timeout begins anew with each note.
    """
    mark, start = uuid.uuid4().hex, monotonic()
    request = {
        "function": function,
        "arguments": dict(arguments),
        "folders": list(folders),
        "parent": os.getpid(),
        "deadline": start + timeout,  # of a clock that all processes share
        "allowed": timeout if on_note is not None and renew else None,
    }
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answer, _appended() as output:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "fastloop.tune.child", str(asked.fileno()), str(answer.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(asked.fileno(), answer.fileno()),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _import_path(), **(environment or {}), MARK: mark},
        )
        watch = Watch(process, start + timeout, memory_limit, output, answer, on_note, renew)
        try:
            ended_by_us = watch.until_it_ends()
        finally:
            _end(process, mark)
        return _outcome(process, watch, ended_by_us, answer, output, timeout, monotonic() - start)


def run_forked(
    function: Callable[[], Any],
    *,
    timeout: float,
    memory_limit: int | None,
    threads: int = 1,
    on_note: OnNote | None = None,
) -> Outcome:
    """Call a function that no fresh process could import, in a fork of this one; `run` says the rest.

    Args:
        memory_limit: bytes on top of what this process has, whose pages are the fork's, too.
        threads: of torch in the fork. OpenMP's threads do not survive a fork: more than one may hang in it.

    Raises:
        RuntimeError: CUDA is initialised, which does not survive a fork either.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("[tune] this process has started CUDA and cannot fork; name the target as module:function")
    start = monotonic()
    with tempfile.TemporaryFile() as answer, _appended() as output:
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        limit = None if memory_limit is None else memory_limit + resident_bytes(parent)
        pid = os.fork()
        if pid == 0:
            allowed = None if on_note is None else timeout
            child.main_of_fork(function, parent, answer.fileno(), output.fileno(), (start + timeout, allowed), threads)
        process = _Fork(pid)
        watch = Watch(process, start + timeout, limit, output, answer, on_note)
        try:
            ended_by_us = watch.until_it_ends()
        finally:
            _end(process, None)
        return _outcome(process, watch, ended_by_us, answer, output, timeout, monotonic() - start)


def run_here(function: Callable[[], Any], on_note: OnNote | None = None) -> Outcome:
    """Call a function in this process, where nothing can be ended from outside: what it waits for needs a timeout."""
    start = monotonic()
    try:
        with child.notes_to(on_note):
            result = function()
        return Outcome(OK, result, seconds=monotonic() - start)
    except Exception as error:
        found = child.described(error)
        status = OUT_OF_MEMORY if found["out_of_memory"] else FAILED
        return Outcome(status, None, {}, found["reason"], found["traceback"], seconds=monotonic() - start)


class _Fork:
    """What the watch needs of subprocess.Popen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        end = math.inf if timeout is None else monotonic() + timeout
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            elif monotonic() >= end:
                raise subprocess.TimeoutExpired("a fork", timeout or 0.0)
            else:
                sleep(0.005)
        return self.returncode


def _import_path() -> str:
    """This fastloop is the one that the trial imports, from wherever this process has it."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])


@contextmanager
def _appended() -> Iterator[IO[bytes]]:
    """A file without a name whose writers always write at its end, also after it was cut."""
    descriptor, name = tempfile.mkstemp()
    os.close(descriptor)
    with open(name, "a+b") as file:
        os.unlink(name)
        yield file


# ---- the end


def _end(process: Process, mark: str | None) -> None:
    """End the process, its session, and what has left the session but bears the mark."""
    family = descendants(process.pid) if process.returncode is None else []
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in family:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    if mark is None:
        return
    for _ in range(500):  # one that is being ended takes its time, and may have started another
        left = list(marked(mark))
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        sleep(0.01)


def _outcome(
    process: Process,
    watch: Watch,
    ended_by_us: str | None,
    answer: IO[bytes],
    output: IO[bytes],
    timeout: float,
    seconds: float,
) -> Outcome:
    notes, last = _read_answer(answer)
    text = _tail(output)
    found = Outcome(
        FAILED, notes=notes, exit_code=None if ended_by_us else process.returncode, seconds=seconds,
        peak_bytes=watch.peak, output=text,
    )  # fmt: skip
    if "result" in last:
        found.status, found.result = OK, last["result"]
    elif "error" in last:
        error = last["error"]
        found.reason, found.traceback = error["reason"], error["traceback"]
        found.status = OUT_OF_MEMORY if error["out_of_memory"] else FAILED
    elif ended_by_us == TIMEOUT:
        found.status, found.reason = TIMEOUT, f"not done after {timeout if timeout < 1 else round(timeout, 1):g} s"
        found.traceback = _dumped(text)
    elif ended_by_us == OUT_OF_MEMORY:
        limit = watch.limit or 0
        found.status = OUT_OF_MEMORY
        found.reason = f"took {(watch.peak or 0) / 2**20:,.0f} MiB of host memory, {limit / 2**20:,.0f} are allowed"
    else:
        found.status, found.reason = _crashed(process.returncode or 0)
        found.traceback = _dumped(text)
    return found


def _read_answer(answer: IO[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(notes, the last line): {} for what is missing or was cut off."""
    answer.seek(0)
    notes: dict[str, Any] = {}
    last: dict[str, Any] = {}
    for line in answer.read().splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            notes |= row.pop("note", {})
            last = row or last
    return notes, last


def _tail(output: IO[bytes]) -> str:
    size = os.fstat(output.fileno()).st_size
    output.seek(max(size - KEPT_OUTPUT, 0))
    return output.read(KEPT_OUTPUT).decode("utf-8", errors="replace")


def _dumped(text: str) -> str:
    """What faulthandler wrote: where the process was when it crashed or hung; the end of the output without that."""
    beginnings = [match.start() for match in re.finditer(r"^(Fatal Python error|Timeout \()", text, re.MULTILINE)]
    found = text[beginnings[-1] :] if beginnings else text[-2000:]
    return re.sub(r"^Extension modules:.*\n?", "", found, flags=re.MULTILINE)


def _crashed(code: int) -> tuple[str, str]:
    """(status, reason) of a process that ended without an answer."""
    if code == -signal.SIGKILL:
        return OUT_OF_MEMORY, "killed from outside (SIGKILL), as the system does where memory runs out"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return FAILED, f"crashed ({name})"
    return FAILED, f"the target ended the process without an answer, with exit code {code}"
