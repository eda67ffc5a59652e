# SPDX-License-Identifier: Apache-2.0
"""The machine's use in the log: what a row gets, when the sampler lives, and the warning at the end."""

from __future__ import annotations

import dataclasses
import logging
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fastloop
from fastloop.loop.logs import read_rows


@dataclasses.dataclass
class Sample:
    time: float = 0.0
    gpu_utilization: float | None = None
    gpu_throttle: tuple[str, ...] | None = None
    cpu_utilization: float | None = 0.5
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)


class Monitor:
    """Stands for the sampler; a sample is there once it was started."""

    made: list[Monitor] = []
    sample = Sample()

    def __init__(self, interval: float, *, device: Any = None, on_sample: Any = None) -> None:
        self.interval, self.device, self.calls = interval, device, []
        self.latest: Sample | None = None
        self.made.append(self)

    def start(self) -> None:
        self.calls.append("start")
        self.latest = self.sample

    def stop(self) -> None:
        self.calls.append("stop")

    def summary(self) -> dict[str, float | None]:
        return {"gpu_utilization": self.sample.gpu_utilization}


@pytest.fixture(autouse=True)
def monitor(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, float]]:
    """What likely_cause was asked."""
    asked: list[tuple[Any, float]] = []

    def likely_cause(summary: Any, wait_share: float) -> str | None:
        asked.append((summary, wait_share))
        return "the GPU waits for the loader" if (summary["gpu_utilization"] or 1.0) < 0.8 else None

    module = types.ModuleType("fastloop.monitor")
    module.Monitor, module.likely_cause = Monitor, likely_cause  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fastloop.monitor", module)
    monkeypatch.setattr(Monitor, "made", [])
    return asked


def loop_of(folder: Path, **options: Any) -> fastloop.Loop:
    model = torch.nn.Linear(2, 1)
    return fastloop.Loop(
        model, fastloop.SGD(model.parameters(), lr=0.1), lambda model, batch: model(batch).mean(), run_dir=folder,
        log_every=1, progress=False, curves=False, **options,
    )  # fmt: skip


DATA = [torch.ones(3, 2)] * 4


def test_rows_hold_the_latest_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Monitor, "sample", Sample(gpu_throttle=("power", "heat")))
    loop = loop_of(tmp_path, system_every_seconds=2.5)
    loop.fit(DATA, epochs=1)
    rows = read_rows(tmp_path / "metrics.jsonl")
    of_system = [{name: value for name, value in row.items() if name.startswith("system/")} for row in rows]
    expected = {"system/gpu_utilization": None, "system/gpu_throttle": "power, heat", "system/cpu_utilization": 0.5}
    assert of_system == [expected] * 4
    assert not [name for name in loop.history if name.startswith("system/")]
    assert [(each.interval, each.calls) for each in Monitor.made] == [(2.5, ["start", "stop"])]
    loop.fit(DATA, epochs=2)
    assert [each.calls for each in Monitor.made] == [["start", "stop"]] * 2


def test_a_training_on_the_cpu_asks_for_no_gpu(tmp_path: Path) -> None:
    loop_of(tmp_path, system_every_seconds=1.0, device="cpu")
    assert [torch.device(each.device).type for each in Monitor.made] == ["cpu"]


def test_a_monitor_that_fails_leaves_the_logs_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Monitor) -> None:
        raise OSError("no monitor")

    monkeypatch.setattr(Monitor, "stop", fail)
    loop = loop_of(tmp_path, system_every_seconds=1.0)
    with pytest.raises(OSError, match="no monitor"):
        loop.fit(DATA, epochs=1)
    assert not loop._reporter._open
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_without_the_option_nothing_is_sampled(tmp_path: Path) -> None:
    loop_of(tmp_path).fit(DATA, epochs=1)
    assert not Monitor.made


def test_an_error_ends_the_sampling(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken():
        yield DATA[0]
        raise OSError("the data are gone")

    with pytest.raises(OSError, match="gone"):
        loop_of(tmp_path, system_every_seconds=1.0).fit(broken(), epochs=1)
    assert Monitor.made[0].calls == ["start", "stop"]


@pytest.mark.parametrize(("utilization", "warned"), [(0.3, 1), (0.9, 0), (None, 0)])
def test_a_gpu_that_waits_is_warned_about(
    utilization: float | None, warned: int, tmp_path: Path, monitor, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Monitor, "sample", Sample(gpu_utilization=utilization))
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        loop_of(tmp_path, system_every_seconds=1.0).fit(DATA, epochs=1)
    assert caplog.text.count("the GPU waits for the loader") == warned
    [(summary, share)] = monitor
    assert summary == {"gpu_utilization": utilization}
    assert 0.0 <= share <= 1.0


def test_an_interval_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="system_every_seconds must be a number above 0, or None, got -1"):
        loop_of(tmp_path, system_every_seconds=-1)
