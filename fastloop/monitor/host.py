# SPDX-License-Identifier: Apache-2.0
"""The host: this process and its children, and the machine around them, read from /proc.

The kernel lists a thread's children, which costs 0.06 ms for a process of two threads. psutil looks at every process of
the machine (1.4 ms for 79 of them): it serves where the kernel has no such list.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from fastloop import machine
from fastloop.extras import need
from fastloop.monitor.record import Readings

PROC = Path("/proc")
PSS_SHARE = 0.01  # of the time, that may be spent on proportional set sizes


@dataclass(frozen=True)
class Process:
    """One process of the tree: who it is (a number is used again, together with its start it is not), and its use."""

    pid: int
    start: int
    ticks: int  # of CPU time
    resident: int  # bytes
    shared: int  # of those resident, bytes of files and shared memory


def _process(pid: int) -> Process:
    # The name, in brackets, may hold spaces and brackets itself: fields are counted from the last one.
    fields = (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    pages = (PROC / str(pid) / "statm").read_text().split()
    size = os.sysconf("SC_PAGE_SIZE")
    ticks = int(fields[11]) + int(fields[12])
    return Process(pid, int(fields[19]), ticks, int(pages[1]) * size, int(pages[2]) * size)


def _children(pid: int) -> list[int]:
    """Children of all threads of a process; raises FileNotFoundError where the kernel does not list them."""
    threads = os.listdir(PROC / str(pid) / "task")
    lists = [(PROC / str(pid) / "task" / thread / "children").read_text() for thread in threads]
    return [int(child) for listed in lists for child in listed.split()]


def _kernel_lists_children() -> bool:
    pid = os.getpid()
    return (PROC / str(pid) / "task" / str(pid) / "children").exists()


def tree() -> list[Process]:
    """This process and its children, theirs too. One that ends meanwhile is left out."""
    root = os.getpid()
    if not _kernel_lists_children():
        psutil = need("psutil", "monitor", "the list of this process's children")
        pids = [root] + [child.pid for child in psutil.Process().children(recursive=True)]
        return [each for pid in pids if (each := _alive(pid)) is not None]
    found, pending = [], [root]
    while pending:
        pid = pending.pop()
        process = _alive(pid)
        if process is not None:
            found.append(process)
            try:
                pending += _children(pid)
            except OSError:
                continue  # it, or one of its threads, ended meanwhile
    return found


def _alive(pid: int) -> Process | None:
    try:
        return _process(pid)
    except OSError:
        return None


def _pss(pid: int) -> int:
    for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss")


def _apart(processes: list[Process]) -> int:
    """Without PSS: what each has of its own, and the largest share once. A fork's pages count in each process."""
    return sum(each.resident - each.shared for each in processes) + max(each.shared for each in processes)


def _cpu_times() -> tuple[int, int]:
    """(busy, all) ticks of the CPUs of this process's affinity mask since the machine started."""
    listed = {}
    for line in (PROC / "stat").read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            listed[name] = [int(value) for value in values[:8]]  # guest time is in user time already
    wanted = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    if not wanted <= listed.keys():
        wanted = set(listed)  # a container's own list (LXCFS) numbers its CPUs anew
    ticks = [listed[name] for name in wanted]
    total = sum(map(sum, ticks))
    return total - sum(each[3] + each[4] for each in ticks), total  # idle, waiting for a disk


class Host:
    """Reads the host; rates are those since the reading before, the first one's since this was made."""

    def __init__(self) -> None:
        self._tick = 1 / os.sysconf("SC_CLK_TCK")
        self._at, self._used, self._busy = perf_counter(), self._ticks(), self._times()
        self._next_pss = 0.0
        self._offset: int | None = None  # PSS less resident sizes, when PSS was read last
        self._members: frozenset[int] = frozenset()

    @staticmethod
    def _ticks() -> dict[tuple[int, int], int]:
        try:
            return {(each.pid, each.start): each.ticks for each in tree()}
        except Exception:
            return {}  # the readings say why

    @staticmethod
    def _times() -> tuple[int, int]:
        try:
            return _cpu_times()
        except Exception:
            return 0, 0

    def read(self, into: Readings) -> None:
        """Put every field of the host, or its reason, into `into`. Never raises."""
        now = perf_counter()
        elapsed, self._at = now - self._at, now
        into.ask("host_available_bytes", _available)
        into.ask("cpu_utilization", self._utilization)
        try:
            processes = tree()
            if not processes:
                raise OSError("/proc does not show this process")
        except Exception as error:
            into.reasons |= dict.fromkeys(("host_rss_bytes", "process_cpu"), str(error))
            return
        into.ask("process_cpu", lambda: self._cpus(processes, elapsed))
        into.ask("host_rss_bytes", lambda: self._memory(processes))

    def _utilization(self) -> float:
        before, self._busy = self._busy, _cpu_times()
        busy, total = (after - first for after, first in zip(self._busy, before, strict=True))
        if total <= 0:
            raise ValueError("no CPU time passed since the reading before")
        return min(max(busy / total, 0.0), 1.0)

    def _cpus(self, processes: list[Process], elapsed: float) -> float:
        """A process that started since the reading before counts from its start, one that ended does not count."""
        used = {(each.pid, each.start): each.ticks for each in processes}
        before, self._used = self._used, used
        ticks = sum(now - before.get(key, 0) for key, now in used.items())
        return ticks * self._tick / elapsed

    def _memory(self, processes: list[Process]) -> int:
        resident = sum(each.resident for each in processes)
        if len(processes) == 1:
            return resident
        start, members = perf_counter(), frozenset(each.pid for each in processes)
        if start >= self._next_pss or members != self._members:
            try:
                self._offset = sum(_pss(each.pid) for each in processes) - resident
            except OSError:  # another user's, or one that ended: the next reading may do
                return _apart(processes)
            self._members = members
            end = perf_counter()
            self._next_pss = end + (end - start) / PSS_SHARE
        return resident + (self._offset or 0)


def _available() -> int:
    value = machine.available_bytes()
    if value is None:
        raise OSError("this system does not say how much memory is available")
    return value
