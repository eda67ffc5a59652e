# SPDX-License-Identifier: Apache-2.0
"""`env` and its live view."""

from __future__ import annotations

import argparse
import io
import signal
import subprocess
import sys

import pytest
from rich.console import Console

from fastloop.bench.commands import env
from fastloop.monitor import Monitor, Sample

BUSY = Sample(
    time=0.0, gpu_utilization=0.5, gpu_memory_bytes=3 << 30, gpu_clock_hz=1.98e9, gpu_power_watts=412.5,
    gpu_throttle=(), host_available_bytes=1 << 30, cpu_utilization=0.25, reasons={"gpu_temperature": "Not Supported"},
)  # fmt: skip


def run_command(console: Console, *arguments: str) -> int:
    parser = argparse.ArgumentParser()
    env.add(parser.add_subparsers())
    args = parser.parse_args(["env", *arguments])
    return int(args.run(console, args))


def test_without_watch_it_is_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Console(width=150)) == 0
    assert "torch" in capsys.readouterr().out


def test_elsewhere_than_a_terminal_it_is_a_line_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Console(width=150), "--watch", "0.02", "--count", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("usable CPUs" in line for line in lines)


def test_on_a_terminal_it_is_a_table() -> None:
    out = io.StringIO()
    assert run_command(Console(file=out, force_terminal=True, width=100), "--watch", "0.02", "--count", "2") == 0
    assert "Ctrl-C ends" in out.getvalue()
    assert "usable CPUs" in out.getvalue()


def test_what_the_device_does_not_say_is_never_0() -> None:
    line = env.line(BUSY)
    assert "GPU 50%" in line
    assert "GPU temperature n/a" in line
    assert "GPU clocks held by nothing" in line
    assert "GPU n/a" in env.line(Sample(time=0.0, cpu_utilization=0.5))
    assert "GPU clock" not in env.line(Sample(time=0.0))


def test_the_table_gives_reasons_and_the_cause_of_an_idle_gpu() -> None:
    monitor = Monitor(1.0, device="cpu")
    monitor._samples.append(BUSY)
    out = io.StringIO()
    Console(file=out, width=200).print(env.table(monitor, BUSY))
    assert "n/a: Not Supported" in out.getvalue()
    assert "The GPU is used 50% of the time." in out.getvalue()


@pytest.mark.parametrize("arguments", [["--watch", "0"], ["--watch", "x"], ["--watch", "1", "--count", "0"]])
def test_wrong_use(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run_command(Console(), *arguments)
    assert ended.value.code == 2


def test_a_count_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(Console(), "--count", "3") == 2
    assert "--watch" in capsys.readouterr().err


def test_an_interrupt_ends_it_with_0() -> None:
    code = (
        "from rich.console import Console; from fastloop.bench.commands.env import watch; "
        "raise SystemExit(watch(Console(), 0.02))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, b"")
