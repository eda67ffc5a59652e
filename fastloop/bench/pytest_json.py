# SPDX-License-Identifier: Apache-2.0
"""Files of pytest-benchmark, judged by our method as far as it goes: their samples are not paired.

Times of two runs that were not taken in turn call 7 to 25 % of identical code a regression on a noisy machine. So a
change is at most INCONCLUSIVE here, unless a control that was measured along did not move and a second run of the new
code agrees.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from fastloop.bench import stats
from fastloop.bench.compare import Judgement
from fastloop.bench.results import BadResult
from fastloop.bench.stats import Interval, Verdict

BLOCKS = 40  # neighbouring rounds share the machine's mood: their medians are resampled, not they
FEWEST_ROUNDS = 5
MACHINE = ("cpu", "python_version", "machine", "system")


@dataclass(frozen=True)
class Times:
    """Seconds per call of each round."""

    name: str
    seconds: tuple[float, ...]
    control: bool = False


@dataclass
class File:
    """Benchmarks by their full name, and what the file says of the machine."""

    machine: dict[str, Any]
    times: dict[str, Times] = field(default_factory=dict)


def recognised(path: Path) -> bool:
    """Whether it is a file of pytest-benchmark's, good or bad."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and "benchmarks" in document and "machine_info" in document


def load(path: Path) -> File:
    """Read a file. Raises BadResult with what is wrong.

    A control is a benchmark with `benchmark.extra_info["control"] = True`.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        cpu = document["machine_info"].get("cpu") or {}
        machine = {**document["machine_info"], "cpu": cpu.get("brand_raw") if isinstance(cpu, dict) else cpu}
        found = File({key: machine.get(key) for key in MACHINE})
        for each in document["benchmarks"]:
            name, control = str(each["fullname"]), bool(each.get("extra_info", {}).get("control"))
            rounds = each["stats"].get("data")
            if not rounds:
                raise BadResult(
                    f"[bench] {path} has no rounds of {name}; write it with --benchmark-json, or with "
                    "--benchmark-save and --benchmark-save-data"
                )
            found.times[name] = Times(name, tuple(map(float, rounds)), control)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadResult(f"[bench] no file of pytest-benchmark: {path}: {type(error).__name__}: {error}") from error
    return found


def blocks(seconds: Sequence[float]) -> list[float]:
    """The medians of up to 40 blocks of neighbouring rounds."""
    count = min(BLOCKS, len(seconds))
    edges = [round(i * len(seconds) / count) for i in range(count + 1)]
    return [median(seconds[a:b]) for a, b in pairwise(edges)]


def change_of(before: Times, after: Times) -> Interval:
    """New time over old time, the two being resampled independently of each other."""
    return stats.slowdown(blocks(after.seconds), blocks(before.seconds))


def _void(before: File, after: File) -> str:
    """Why nothing can be judged, or nothing."""
    differ = [key for key in MACHINE if before.machine[key] != after.machine[key]]
    if differ:
        return f"the files come from different machines: {differ[0]} differs"
    moved = [name for name in _controls(before, after) if stats.control_moved(_change(before, after, name))]
    return f"the control {moved[0]} moved by more than 2 %" if moved else ""


def _controls(before: File, after: File) -> list[str]:
    return [name for name, times in after.times.items() if times.control and name in before.times]


def _confirming(before: File, confirm: File) -> Mapping[str, Times]:
    """What a second run may confirm: nothing without a control that ran and did not move."""
    enough = {name: times for name, times in confirm.times.items() if len(times.seconds) >= FEWEST_ROUNDS}
    if _void(before, confirm) or not any(name in enough for name in _controls(before, confirm)):
        return {}
    return enough


def _change(before: File, after: File, name: str) -> Interval:
    return change_of(before.times[name], after.times[name])


def _judge(before: Times, after: Times, again: Times | None, control: bool) -> Judgement:
    if min(len(before.seconds), len(after.seconds)) < FEWEST_ROUNDS:
        return Judgement(after.name, Verdict.INCONCLUSIVE, note=f"fewer than {FEWEST_ROUNDS} rounds")
    change = change_of(before, after)
    if not (stats.looks_slower(change) or stats.looks_faster(change)):
        return Judgement(after.name, stats.verdict(change), change)
    if not control:
        note = 'looks changed, and no control says that the machine did not: mark one with extra_info["control"]'
        return Judgement(after.name, Verdict.INCONCLUSIVE, change, note=note)
    if again is None:
        note = (
            f"looks changed, but no second run of B, with a control and {FEWEST_ROUNDS} rounds, says so: --confirm FILE"
        )
        return Judgement(after.name, Verdict.INCONCLUSIVE, change, note=note)
    rerun = change_of(before, again)
    return Judgement(after.name, stats.verdict(change, rerun), change, rerun)


def compare(before: File, after: File, confirm: File | None = None) -> list[Judgement]:
    """Judge every benchmark of `after`; `confirm`: a second run of the same code."""
    void = _void(before, after)
    again = {} if confirm is None else _confirming(before, confirm)
    control, judgements = bool(_controls(before, after)), []
    for name, times in after.times.items():
        if name not in before.times:
            judgements.append(Judgement(name, None, note="not in the first file"))
        elif void:
            judgements.append(Judgement(name, Verdict.VOID, _change(before, after, name), note=void))
        elif not times.control:
            judgements.append(_judge(before.times[name], times, again.get(name), control))
    return judgements
