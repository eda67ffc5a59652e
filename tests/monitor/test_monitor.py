# SPDX-License-Identifier: Apache-2.0
"""The host for real, the background thread, forks, summaries, and the cause of an idle GPU."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastloop.monitor import Monitor, Sample, host, likely_cause, sample
from fastloop.monitor.record import NUMBERS, Readings, summarize

MEGABYTE = 1 << 20
needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")


def wait_for(true: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def read(of: host.Host) -> Sample:
    readings = Readings()
    of.read(readings)
    return readings.sample(0.0)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that other tests have left, multiprocessing's own too, may end at any time: they do not count."""
    others, real = {process.pid for process in host.tree()[1:]}, host._alive
    monkeypatch.setattr(host, "_alive", lambda pid: None if pid in others else real(pid))


# ---- The host


@needs_proc
def test_the_host_says_everything() -> None:
    got = sample(device="cpu")
    assert abs(got.time - time.time()) < 60
    assert got.host_rss_bytes is not None
    assert got.host_rss_bytes > 50 * MEGABYTE  # torch alone is more
    assert got.host_available_bytes is not None
    assert got.cpu_utilization is not None
    assert 0 <= got.cpu_utilization <= 1
    assert got.process_cpu is not None
    assert got.gpu_utilization is None
    assert set(got.reasons) == {name for name in vars(got) if name.startswith("gpu_")}


@needs_proc
def test_a_working_thread_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = host.Host()
    used = time.process_time()
    while time.process_time() < used + 0.3:
        pass
    elapsed_at_least = 0.3
    got = read(reader).process_cpu
    assert got is not None
    assert got > 0
    assert got <= (os.cpu_count() or 1) + 1 / elapsed_at_least  # ticks of 10 ms in at least 0.3 s


@contextmanager
def child(target: Callable[..., None], *arguments: Any) -> Iterator[Any]:
    """A forked process that runs `target(connection, *arguments)`; ended with the context."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments))
    process.start()
    theirs.close()  # ours says so if it ends
    try:
        yield ours
    finally:
        process.kill()
        process.join()


def _hold(connection: Any, bytes_: int) -> None:
    held = bytearray(os.urandom(1) * bytes_)
    connection.send(len(held))
    connection.recv()


@needs_proc
def test_memory_of_a_child_counts_and_what_it_shares_counts_once(alone: None) -> None:
    ballast = bytearray(os.urandom(1) * (256 * MEGABYTE))  # a fork shares these pages
    with child(_hold, 64 * MEGABYTE) as connection:
        connection.recv()
        processes = host.tree()
        assert len(processes) == 2
        both = read(host.Host()).host_rss_bytes
        each = [host._pss(process.pid) for process in processes]
    assert both is not None
    assert abs(both - sum(each)) < 16 * MEGABYTE
    assert both < sum(process.resident for process in processes) - 200 * MEGABYTE, "256 MB that both share count once"
    assert min(each) > 64 * MEGABYTE, "the child's own"
    assert len(ballast) == 256 * MEGABYTE


@needs_proc
def test_page_tables_are_not_walked_at_every_sample(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    walked: list[int] = []
    real = host._pss
    monkeypatch.setattr(host, "_pss", lambda pid: (walked.append(pid), real(pid))[1])
    with child(_hold, MEGABYTE) as connection:
        connection.recv()
        reader = host.Host()
        first = read(reader).host_rss_bytes
        assert len(walked) == 2
        reader._next_pss = float("inf")
        second = read(reader).host_rss_bytes
        assert len(walked) == 2
    assert first is not None
    assert second is not None
    assert abs(second - first) < 64 * MEGABYTE
    third = read(reader).host_rss_bytes  # the child is gone: its resident size must not be corrected any more
    assert third == pytest.approx(host.tree()[0].resident, abs=16 * MEGABYTE)


@needs_proc
def test_without_page_tables_and_without_the_kernels_list(monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    def refuse(pid: int) -> int:
        raise PermissionError("not yours")

    monkeypatch.setattr(host, "_pss", refuse)
    monkeypatch.setattr(host, "_kernel_lists_children", lambda: False)
    with child(_hold, 32 * MEGABYTE) as connection:
        connection.recv()
        processes = host.tree()
        assert len(processes) == 2
        got = read(host.Host()).host_rss_bytes
    assert got is not None
    assert got > processes[0].resident
    monkeypatch.setitem(sys.modules, "psutil", None)
    got_without = read(host.Host())
    assert got_without.host_rss_bytes is None
    assert "pip install 'fastloop[monitor]'" in got_without.reasons["host_rss_bytes"]
    assert got_without.host_available_bytes is not None


def test_cpus_that_a_container_numbers_anew_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = ["cpu  9 0 9 30 2 0 0 0 0 0", "cpu0 4 0 3 10 1 0 0 0 0 0", "cpu1 5 0 6 20 1 0 0 0 0 0", "intr 1 2"]
    (tmp_path / "stat").write_text("\n".join(rows))
    monkeypatch.setattr(host, "PROC", tmp_path)
    for affinity, expected in (({0, 1}, (18, 50)), ({1}, (11, 32)), ({6, 7}, (18, 50)), ({1, 2}, (18, 50))):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, found=affinity: found)
        assert host._cpu_times() == expected


def test_a_host_without_proc_gives_reasons(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host, "PROC", tmp_path)
    monkeypatch.setattr(host.machine, "available_bytes", lambda: None)
    monkeypatch.setitem(sys.modules, "psutil", None)
    got = read(host.Host())
    assert all(getattr(got, name) is None for name in NUMBERS)
    assert {"host_rss_bytes", "host_available_bytes", "cpu_utilization", "process_cpu"} <= set(got.reasons)


# ---- The thread


def test_it_samples_and_stops() -> None:
    seen: list[Sample] = []
    monitor = Monitor(0.01, device="cpu", on_sample=seen.append)
    assert monitor.latest is None
    assert monitor.samples == []
    with monitor:
        assert monitor.start() is monitor  # again: nothing happens
        wait_for(lambda: len(seen) >= 3)
        assert monitor.running
        thread = monitor._thread
        assert thread is not None
        assert thread.is_alive()
    count = len(monitor.samples)
    assert monitor.samples[:3] == seen[:3]
    assert monitor.latest is monitor.samples[-1]
    assert not thread.is_alive()
    monitor.stop()
    with monitor:
        wait_for(lambda: len(monitor.samples) > count)  # a second start goes on


def test_a_listener_that_raises_ends_nothing() -> None:
    def listener(taken: Sample) -> None:
        raise RuntimeError("mine")

    with Monitor(0.01, device="cpu", on_sample=listener) as monitor:
        wait_for(lambda: len(monitor.samples) >= 3)
    assert str(monitor.error) == "mine"


def test_a_listener_may_stop_it() -> None:
    monitor = Monitor(0.01, device="cpu", on_sample=lambda taken: monitor.stop())
    monitor.start()
    wait_for(lambda: not monitor.running)
    assert len(monitor.samples) == 1


@pytest.mark.parametrize("interval", [0, -1.0, 0.001, float("nan"), float("inf")])
def test_an_interval_that_cannot_be(interval: float) -> None:
    with pytest.raises(ValueError, match=r"\[monitor\] interval"):
        Monitor(interval)


@pytest.mark.parametrize("interval", [True, "1", None])
def test_an_interval_that_is_no_number(interval: Any) -> None:
    with pytest.raises(TypeError, match=r"\[monitor\] interval"):
        Monitor(interval)


def _report_of_a_fork(connection: Any, monitor: Monitor) -> None:
    before = len(monitor.samples)
    monitor.stop()  # of the parent's thread: does nothing here
    names = [each.name for each in threading.enumerate() if each.is_alive()]
    connection.send((monitor.running, names.count("fastloop-monitor"), before == len(monitor.samples)))
    connection.recv()


def test_a_fork_has_no_monitor_and_harms_none() -> None:
    with Monitor(0.01, device="cpu") as monitor:
        wait_for(lambda: monitor.samples)
        with child(_report_of_a_fork, monitor) as connection:
            assert connection.recv() == (False, 0, True)
        count = len(monitor.samples)
        wait_for(lambda: len(monitor.samples) > count)


def test_a_process_that_never_stops_it_ends() -> None:
    code = """
import os, time, torch
from fastloop.monitor import Monitor
monitor = Monitor(0.01).start()
while not monitor.samples: time.sleep(0.005)
if os.fork() == 0: raise SystemExit(0)   # runs the functions registered for the exit, in the fork
os.wait()
print("CUDA" if torch.cuda.is_initialized() else "no CUDA", len(monitor.samples) > 0)
"""
    python = [sys.executable, "-W", "ignore:This process:DeprecationWarning"]  # from 3.12 on, of a fork beside threads
    ended = subprocess.run([*python, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "no CUDA True", "")


# ---- Summaries


def _samples(**fields: list[Any]) -> list[Sample]:
    count = len(next(iter(fields.values())))
    return [Sample(time=0.0, **{name: values[i] for name, values in fields.items()}) for i in range(count)]


def test_means_and_extremes_leave_out_what_is_not_known() -> None:
    summary = summarize(
        _samples(
            gpu_utilization=[0.5, None, 1.0],
            host_available_bytes=[30, 10, 20],
            gpu_throttle=[("power cap", "idle"), None, ("thermal, by software",)],
        ),
        ranks=2,
    )
    assert (summary["samples"], summary["ranks"]) == (3, 2)
    assert (summary["gpu_utilization"], summary["gpu_utilization_peak"]) == (0.75, 1.0)
    assert (summary["host_available_bytes"], summary["host_available_bytes_least"]) == (20, 10)
    assert (summary["gpu_throttle_power"], summary["gpu_throttle_thermal"]) == (0.5, 0.5)
    assert summary["gpu_power_watts"] is None
    assert summary["gpu_power_watts_peak"] is None


def test_a_summary_of_nothing() -> None:
    summary = Monitor(1.0, device="cpu").summary()
    assert summary["samples"] == 0
    assert {value for name, value in summary.items() if name not in ("samples", "ranks")} == {None}


# ---- The cause


@pytest.mark.parametrize(
    ("summary", "wait", "wanted"),
    [
        ({"gpu_utilization": 0.5}, 0.45, ("50%", "the data", "tune loader", "workers and the prefetching")),
        ({"gpu_utilization": 0.5, "cpu_utilization": 0.97}, 0.45, ("more workers will not help", "97% busy")),
        (
            {"gpu_utilization": 0.5, "process_cpu": 1.0},
            0.01,
            ("not the data", "tune batch", "tune flags", "CUDA graphs"),
        ),
        ({"gpu_utilization": 0.5, "process_cpu": 0.2}, 0.01, ("waits itself", ".item()")),
        ({"gpu_utilization": 0.5}, None, ("is unknown", "tune loader")),
        ({"gpu_utilization": 0.5, "gpu_throttle_power": 0.6}, 0.0, ("Power held", "60%")),
        ({"gpu_utilization": 0.5, "gpu_throttle_thermal": 0.6}, 0.0, ("Heat held", "cooling")),
        ({"gpu_utilization": 0.5, "ranks": 8.0}, 0.0, ("Of 8 ranks", "accumulation")),
    ],
)
def test_an_idle_gpu_gets_its_cause_and_the_remedy(
    summary: dict[str, float | None], wait: float | None, wanted: tuple[str, ...]
) -> None:
    cause = likely_cause(summary, wait)
    assert cause is not None
    assert [each for each in wanted if each not in cause] == []


def test_causes_that_are_not_seen_are_not_named() -> None:
    cause = likely_cause({"gpu_utilization": 0.5, "gpu_throttle_power": 0.0, "ranks": 1.0}, 0.45)
    assert cause is not None
    assert not any(word in cause for word in ("Power", "Heat", "ranks", "launch"))


@pytest.mark.parametrize("used", [0.8, 1.0, None])
def test_a_busy_gpu_and_none_have_no_cause(used: float | None) -> None:
    assert likely_cause({"gpu_utilization": used}, 0.9) is None
    assert likely_cause({}, None) is None


@pytest.mark.parametrize("wait", [-0.1, 45.0, float("nan")])
def test_a_percentage_is_not_a_share(wait: float) -> None:
    with pytest.raises(ValueError, match="wait_share"):
        likely_cause({"gpu_utilization": 0.5}, wait)


def test_nothing_here_starts_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("CUDA was started"))
    sample()
    Monitor(1.0).summary()
