# SPDX-License-Identifier: Apache-2.0
"""`env`: what this machine is, and with `--watch` what it is doing."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from queue import SimpleQueue
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastloop.bench import env, report
from fastloop.bench.commands.shared import OK, USAGE, fail
from fastloop.monitor import Monitor, Sample, likely_cause
from fastloop.monitor.record import GPU_FIELDS

Show = Callable[[Monitor, Sample], None]


def share(value: float) -> str:
    return f"{value:.0%}"


# What is shown of a sample: its field, its name, how a value is written. Memory and CPUs of the process would be those
# of this command.
SHOWN: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("gpu_utilization", "GPU", share),
    ("gpu_memory_utilization", "GPU memory busy", share),
    ("gpu_memory_bytes", "GPU memory in use", report.size),
    ("gpu_clock_hz", "GPU clock", lambda value: f"{value / 1e6:.0f} MHz"),
    ("gpu_memory_clock_hz", "GPU memory clock", lambda value: f"{value / 1e6:.0f} MHz"),
    ("gpu_power_watts", "GPU power", lambda value: f"{value:.0f} W"),
    ("gpu_temperature", "GPU temperature", lambda value: f"{value:.0f} °C"),
    ("gpu_throttle", "GPU clocks held by", lambda value: ", ".join(value) or "nothing"),
    ("host_available_bytes", "host memory available", report.size),
    ("cpu_utilization", "usable CPUs", share),
)


def add(commands: Any) -> None:
    parser = commands.add_parser("env", help="show the environment; --watch: what it is doing, live")
    parser.add_argument(
        "--watch", nargs="?", type=_interval, const=1.0, metavar="SECONDS",
        help="a sample every SECONDS (default: 1) until Ctrl-C",
    )  # fmt: skip
    parser.add_argument("--count", type=_count, metavar="N", help="with --watch: end after N samples")
    parser.set_defaults(run=_env)


def _interval(text: str) -> float:
    try:
        Monitor(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted seconds from 0.01 on, e.g. 2, got {text!r}") from None
    return float(text)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted a number of samples from 1 on, got {text!r}")
    return int(text)


def _env(console: Console, args: argparse.Namespace) -> int:
    if args.watch is None and args.count is not None:
        fail("[bench env] --count is the number of samples of --watch, which is not given; try --watch --count 5")
        return USAGE
    if args.watch is None:
        console.print(report.environment_table(env.environment().as_dict()))
        return OK
    return watch(console, args.watch, args.count)


def watch(console: Console, interval: float, count: int | None = None) -> int:
    """Show a sample every `interval` seconds: live on a terminal, a line each elsewhere; Ctrl-C ends it."""
    # Not one of threading's: Ctrl-C may leave those locked, and the monitor's thread waiting for them.
    arrived: SimpleQueue[Sample] = SimpleQueue()
    monitor = Monitor(interval, on_sample=arrived.put)
    taken = 0
    try:
        with _view(console) as show, monitor:
            while count is None or taken < count:
                show(monitor, arrived.get())
                taken += 1
    except KeyboardInterrupt:
        pass  # how one ends it
    return OK


@contextmanager
def _view(console: Console) -> Iterator[Show]:
    if console.is_terminal:
        with Live(Text("the first sample is on its way"), console=console, auto_refresh=False) as live:
            yield lambda monitor, sample: live.update(table(monitor, sample), refresh=True)
    else:
        yield lambda monitor, sample: print(line(sample), flush=True)


def line(sample: Sample) -> str:
    """One sample on one line; a GPU that says nothing takes one entry."""
    told = [(field, name, write) for field, name, write in SHOWN if not _silent(sample) or field not in GPU_FIELDS]
    entries = [f"{name} {_written(sample, field, write)}" for field, name, write in told]
    entries = (["GPU n/a"] if _silent(sample) else []) + entries
    return f"{datetime.fromtimestamp(sample.time):%H:%M:%S}  " + "; ".join(entries)


def table(monitor: Monitor, sample: Sample) -> Group:
    """The sample, mean and peak of those before, why something is not known, and the likely cause of an idle GPU."""
    summary = monitor.summary()
    rows = Table("", "now", "mean", "peak", box=None, pad_edge=False)
    for field, name, write in SHOWN:
        mean, peak = summary.get(field), summary.get(f"{field}_peak")
        cells = [_written(sample, field, write)] + ["" if each is None else write(each) for each in (mean, peak)]
        rows.add_row(name, *map(Text, cells))
    notes = [f"n/a: {reason}" for reason in dict.fromkeys(sample.reasons.values())]
    cause = likely_cause(summary, None)
    head = f"{time.strftime('%H:%M:%S', time.localtime(sample.time))}, {len(monitor.samples)} samples; Ctrl-C ends"
    return Group(Text(head), rows, *map(Text, notes + ([cause] if cause else [])))


def _silent(sample: Sample) -> bool:
    return all(getattr(sample, field) is None for field in GPU_FIELDS)


def _written(sample: Sample, field: str, write: Callable[[Any], str]) -> str:
    value = getattr(sample, field)
    return "n/a" if value is None else write(value)
