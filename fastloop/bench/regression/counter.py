# SPDX-License-Identifier: Apache-2.0
"""Counts what the cases of one build do: calls, operators, allocations, launches; instructions under valgrind.

It runs as a script, in the environment of the build under test, which may be older than this file: it imports
nothing of fastloop by itself. `evidence` and `callgrind` start it and read the lines that it writes.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules must not hide the standard library's

import gc
import importlib.util
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any, TextIO

Call = Callable[[], object]

WARM_UP = 60  # calls before counting: CPython 3.11 and later rewrite a function's code while it is young
COUNTED = 4  # calls; the most that one of them did is the count
REGION = 20  # calls in one region of instructions
HEAVY = 20_000_000  # instructions of a call from which on fewer calls are made: a second of valgrind's time each
HEAVY_REGION = 2
TOO_HEAVY = 400_000_000  # not counted


# ---- evidence


def python_calls(call: Call) -> int:
    """Python functions that a call enters, itself among them."""
    entered = 0

    def look(frame: Any, event: str, argument: Any) -> None:
        nonlocal entered
        entered += event == "call"

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def _host_counts(call: Call, memory: Any) -> dict[str, int]:
    calls = python_calls(call)
    operations = memory.timeline(call)
    peak, allocations = memory.allocated(operations)
    operators = sum("::" in name for name, _ in operations)
    return {"Python calls": calls, "torch operators": operators, "allocations": allocations, "peak bytes": peak}


# What makes the host wait for the device, by the names of CUDA's runtime and driver.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize",
         "cuCtxSynchronize", "cuEventSynchronize", "hipStreamSynchronize", "hipDeviceSynchronize")  # fmt: skip


def device_counts(call: Call, torch: Any) -> dict[str, int]:
    """Kernels, waits and memory of a call that works on a GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held, before = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("counted call"):
            call()
        allocations = torch.cuda.memory_stats()["allocation.all.allocated"] - before
        peak = torch.cuda.max_memory_allocated() - held
        torch.cuda.synchronize()
    kernels, waits = launches_and_waits(profile.events(), torch.autograd.DeviceType)
    return {
        "kernel launches": kernels,
        "host-device syncs": waits,
        "GPU allocations": allocations,
        "GPU peak bytes": peak,
    }


def launches_and_waits(events: Any, device_type: Any) -> tuple[int, int]:
    """Kernels, and waits of the host, among a profile's events; ranges, copies and the end's own wait do not count."""
    (own,) = [each for each in events if each.name == "counted call" and each.device_type == device_type.CPU]
    kernels = [
        each.name
        for each in events
        if each.device_type == device_type.CUDA
        and not each.name.startswith(("Memcpy", "Memset", "counted call", "Optimizer."))
    ]
    waits = [
        each
        for each in events
        if each.device_type == device_type.CPU
        and each.name.startswith(WAITS)
        and own.time_range.start <= each.time_range.start <= own.time_range.end
    ]
    return len(kernels), len(waits)


def counts(call: Call, memory: Any) -> dict[str, int]:
    """What a call does, of several the most; it must have been warmed up."""
    import torch

    takers = [lambda: _host_counts(call, memory)]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        takers.append(lambda: device_counts(call, torch))
    found: dict[str, int] = {}
    for taker in takers:
        for _ in range(COUNTED):
            for what, value in taker().items():
                found[what] = max(found.get(what, 0), value)
    return found


# ---- instructions


def instrument(vgdb: str, prefix: str) -> None:
    """Begin to count: until here valgrind only translates, so that importing torch is bearable.

    This thread works while vgdb waits: a process that sleeps would have to be traced, which containers forbid.
    """
    command = [vgdb, f"--vgdb-prefix={prefix}", f"--pid={os.getpid()}", "--max-invoke-ms=0", "--wait=10"]
    asked = subprocess.Popen([*command, "instrumentation", "on"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while asked.poll() is None and time.monotonic() < deadline:
        sum(range(1000))
    if asked.returncode != 0:
        asked.kill()
        said = asked.communicate()[1].decode(errors="replace").strip()
        raise RuntimeError(f"vgdb could not start the counting: {said[-300:] or 'no answer within 60 s'}")


class Regions:
    """Regions of instructions; valgrind writes a file for each, numbered from 1."""

    def __init__(self, dumps: str) -> None:
        import torch

        torch_c: Any = torch._C
        self._on, self._off = torch_c._valgrind_toggle, torch_c._valgrind_toggle_and_dump_stats
        self._dumps, self.written = dumps, 0

    def count(self, call: Call | None, times: int) -> str:
        """The file about so many calls in a row; of the loop alone for None."""
        todo = repeat(None, times)
        self._on()
        if call is None:
            for _ in todo:
                pass
        else:
            for _ in todo:
                call()
        self._off()
        self.written += 1
        return f"{self._dumps}.{self.written}"


def total(dump: str) -> int:
    """Instructions in a file of callgrind's."""
    with open(dump, encoding="utf-8", errors="replace") as lines:
        found = [line.split()[1] for line in lines if line.startswith(("summary:", "totals:"))]
    return int(found[0]) if found else 0


def instructions(call: Call, regions: Regions) -> dict[str, Any]:
    """Files about a case and about the empty loop; the case must have been warmed up."""
    one = total(regions.count(call, 1))
    if one > TOO_HEAVY:
        error = f"one call is {one / 1e6:.0f} million instructions; at most {TOO_HEAVY // 10**6} are counted"
        return {"error": error, "at_least": one}
    times = REGION if one < HEAVY else HEAVY_REGION
    return {"calls": times, "empty": regions.count(None, times), "dump": regions.count(call, times)}


# ---- the script


def _load(name: str, file: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _prepared(request: dict[str, Any], answers: TextIO) -> Iterator[tuple[str, Call]]:
    """The cases one after the other, warmed up; one that raises is an answer.

    A line about each comes first, which holds until there is a later one: a case may end the process.
    """
    marks = _load("_fastloop_usercases", request["usercases"])
    worker = _load("_fastloop_worker", request["worker"]).Worker(request["usercases"])
    worker.load(request["file"], request["module"], request["outside"])
    chosen = [each for each in marks.collect(sys.modules[request["module"]]) if not each.control]
    chosen = [each for each in chosen if not request["only"] or each.name in request["only"]]
    for case in chosen:
        _answer(answers, {"case": case.name, "error": "not reached", "unfinished": True})
    for case in chosen:
        try:
            call = _warmed(marks.prepared(case))
        except Exception as error:
            wrong = type(error).__name__ == "WrongCase"
            _answer(answers, {"case": case.name, "error": _sentence(error), "wrong": wrong})
            continue
        gc.collect()
        gc.disable()
        try:
            yield case.name, call
        finally:
            gc.enable()


def _warmed(call: Call) -> Call:
    started = time.perf_counter()
    call()
    # A call that lasts does its work in torch: what the interpreter rewrites is nothing beside it.
    for _ in range(WARM_UP if time.perf_counter() - started < 0.05 else COUNTED):
        call()
    return call


def _sentence(error: Exception) -> str:
    text = str(error)
    return text if text.startswith("[bench]") else f"{type(error).__name__}: {text}"


def _answer(answers: TextIO, line: dict[str, Any]) -> None:
    answers.write(json.dumps(line) + "\n")
    answers.flush()


def main(request: dict[str, Any]) -> None:
    """Write a line for each case into the file that the request names."""
    import torch

    torch.set_num_threads(1)
    with open(request["answers"], "w", encoding="utf-8") as answers:
        (_count_instructions if request["valgrind"] else _count_evidence)(request, answers)


def _evidence(call: Call, memory: Any) -> dict[str, Any]:
    return {"counts": counts(call, memory)}


def _count_evidence(request: dict[str, Any], answers: TextIO) -> None:
    memory = _load("_fastloop_memory", request["memory"])
    for name, call in _prepared(request, answers):
        _answer_with(answers, name, partial(_evidence, call, memory))


def _count_instructions(request: dict[str, Any], answers: TextIO) -> None:
    """All cases are prepared first: what is set up while valgrind counts takes 50 times as long."""
    cases = list(_prepared(request, answers))
    if not cases:
        return
    instrument(request["vgdb"], request["vgdb_prefix"])
    regions = Regions(request["dumps"])
    regions.count(None, 1)  # the first one holds what was under way when counting began
    gc.disable()
    for name, call in cases:
        _answer_with(answers, name, partial(instructions, call, regions))


def _answer_with(answers: TextIO, name: str, take: Callable[[], dict[str, Any]]) -> None:
    try:
        found = take()
    except Exception as error:
        found = {"error": _sentence(error), "wrong": False}
    _answer(answers, {"case": name, **found})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
