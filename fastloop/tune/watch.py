# SPDX-License-Identifier: Apache-2.0
"""Watches a process and all that it starts: its deadline, its memory, its notes; reads Linux's /proc."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import IO, Any, Protocol

TIMEOUT, OUT_OF_MEMORY = "timeout", "out of memory"
MARK = "FASTLOOP_TRIAL"
_WATCH_SECONDS = 0.1
_EXACT_SECONDS = 0.5  # between two exact sums over several processes: each walks their page tables
_MOST_OUTPUT = 64 * 2**20
KEPT_OUTPUT = 16_000  # last bytes of it
_PAGE = os.sysconf("SC_PAGE_SIZE")
OnNote = Callable[[dict[str, Any], "int | None"], None]  # the values, bytes of the peak since the last note


class Process(Protocol):
    """What is needed of subprocess.Popen."""

    pid: int
    returncode: Any

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""


class Watch:
    """Looks at a process and what it started ten times a second.

    Args:
        deadline: of `time.monotonic`.
        limit: bytes of memory; None for none.
        output: what it prints, cut where it gets too long.
        answer: what it answers; `on_note` gets each note when it is there and the peak of memory since the last
            one.
        renew: the time until the deadline begins anew with each note.
    """

    def __init__(
        self,
        process: Process,
        deadline: float,
        limit: int | None,
        output: IO[bytes],
        answer: IO[bytes],
        on_note: OnNote | None = None,
        renew: bool = True,
    ) -> None:
        self.process, self.deadline, self.limit, self.output = process, deadline, limit, output
        self.answer, self.on_note = answer, on_note
        self.peak: int | None = None
        self._allowed = deadline - monotonic() if renew else None
        self._exact_at = 0.0
        self._read = 0

    def until_it_ends(self) -> str | None:
        """None when it has ended, else what it is to be ended for: TIMEOUT or OUT_OF_MEMORY."""
        while True:
            try:
                self.process.wait(_WATCH_SECONDS)
                self._take_notes()
                return None
            except subprocess.TimeoutExpired:
                now = monotonic()
            self._look_at_memory(now)
            if self.limit is not None and (self.peak or 0) > self.limit:
                peak = self.peak
                self._take_notes()  # of what was done before
                self.peak = peak
                return OUT_OF_MEMORY
            self._take_notes()
            if now >= self.deadline:
                return TIMEOUT
            self._cut_output()

    def _cut_output(self) -> None:
        """Of a long output only the end stays."""
        file = self.output.fileno()
        size = os.fstat(file).st_size
        if size > _MOST_OUTPUT:
            with _stopped(
                self.process.pid
            ):  # a line written meanwhile would be lost, or stand before the ones it follows
                size = os.fstat(file).st_size
                end = os.pread(file, KEPT_OUTPUT, size - KEPT_OUTPUT)
                os.ftruncate(file, 0)
                os.write(file, end)  # at the end, as all that write into it do

    def _take_notes(self) -> None:
        if self.on_note is None:
            return
        lines = os.pread(self.answer.fileno(), os.fstat(self.answer.fileno()).st_size, self._read).splitlines(True)
        for line in lines:
            if not line.endswith(b"\n"):
                return
            self._read += len(line)
            note = json.loads(line).get("note")
            if note is not None:
                self.on_note(note, self.peak)
                self.peak = None
                if self._allowed is not None:
                    self.deadline = monotonic() + self._allowed

    def _look_at_memory(self, now: float) -> None:
        """Pages that several processes share count once; the sum of what each has is at least that, and cheap."""
        processes = descendants(self.process.pid)
        most = sum(map(resident_bytes, processes))
        if self.limit is not None and len(processes) == 1 and self.on_note is None:
            highest = peak_bytes(processes[0])  # between two looks, too; with notes the peak is that since the last
            if highest > self.limit:
                most = max(most, highest)
        if most <= (self.peak or 0):
            return
        if len(processes) > 1:
            over = self.limit is not None and most > self.limit
            if now < self._exact_at + (_WATCH_SECONDS if over else _EXACT_SECONDS):
                return
            self._exact_at = now
            most = sum(map(proportional_bytes, processes))
        self.peak = max(self.peak or 0, most)


@contextmanager
def _stopped(pid: int) -> Iterator[None]:
    """The process and those of its group stand still for as long as the context lasts."""
    with suppress(OSError):
        os.killpg(pid, signal.SIGSTOP)
    try:
        for _ in range(100):
            if _state(pid) in "TtZX":
                break
            sleep(0.001)
        yield
    finally:
        with suppress(OSError):
            os.killpg(pid, signal.SIGCONT)


def _state(pid: int) -> str:
    """The letter of /proc; X for a process that is gone."""
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() or ["X"])[0]
    except OSError:
        return "X"


def descendants(pid: int) -> list[int]:
    """The process and all that it started, directly or not."""
    found = [pid]
    for each in found:
        for path in Path(f"/proc/{each}/task").glob("*/children"):
            with suppress(OSError):
                found += [int(child) for child in path.read_text().split()]
    return found


def resident_bytes(pid: int) -> int:
    """Memory of the process, pages that it shares included; 0 where it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def peak_bytes(pid: int) -> int:
    """The most that the process had resident so far; 0 where it is gone, or the system does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def proportional_bytes(pid: int) -> int:
    """Memory of the process, of a page that n processes share 1/n; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return resident_bytes(pid)
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def marked(mark: str) -> Iterator[int]:
    """Live processes with the mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (path / "environ").read_bytes().split(b"\0") and _state(int(path.name)) not in "ZX":
                yield int(path.name)
