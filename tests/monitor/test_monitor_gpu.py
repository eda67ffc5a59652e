# SPDX-License-Identifier: Apache-2.0
"""What NVML says, and what it does not say, against a module that answers as pynvml does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_nvml import FakeNvml

from fastloop.monitor import Sample, sample
from fastloop.monitor.nvidia import Gpu, cuda_index, locate
from fastloop.monitor.record import FIELDS, GPU_FIELDS, Readings

Use = Callable[..., FakeNvml]


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Put a fake pynvml in place, under a torch that seems to be built for CUDA and has not started it."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def use(*arguments: Any, **options: Any) -> FakeNvml:
        fake = FakeNvml(*arguments, **options)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return use


def start_cuda(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=uuids[index]))


def read(index: int | None = 0) -> Sample:
    gpu, readings = Gpu(index), Readings()
    gpu.read(readings)
    gpu.close()
    return readings.sample(0.0)


def test_every_field_is_read_in_its_unit(nvml: Use) -> None:
    fake = nvml(mask=0x4 | 0x40 | 0x1)
    got = read()
    assert got.reasons == {}
    assert (got.gpu_utilization, got.gpu_memory_utilization, got.gpu_memory_bytes) == (0.93, 0.40, 5 << 30)
    assert (got.gpu_clock_hz, got.gpu_memory_clock_hz) == (1.98e9, 3.201e9)
    assert (got.gpu_power_watts, got.gpu_temperature) == (412.5, 61.0)
    assert got.gpu_throttle == ("idle", "power cap", "thermal, by hardware")
    assert (fake.started, fake.ended) == (1, 1)


def test_no_reason_of_throttling_is_an_empty_tuple_and_an_unknown_one_shows_its_bit(nvml: Use) -> None:
    fake = nvml()
    assert read().gpu_throttle == ()
    fake.mask = 0x8000
    assert read().gpu_throttle == ("0x8000",)


def test_a_mig_instance_says_none_with_the_reason_and_never_0(nvml: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(mig=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    got = read()
    assert got.gpu_memory_bytes == 5 << 30
    silent = [name for name in GPU_FIELDS if name != "gpu_memory_bytes"]
    assert [getattr(got, name) for name in silent] == [None] * len(silent)
    assert {got.reasons[name] for name in silent} == {"Not Supported (a MIG instance)"}


def test_a_whole_gpu_with_mig_on_is_not_taken_for_the_instance(nvml: Use) -> None:
    nvml(mig=True)
    got = read()
    assert got.gpu_memory_bytes is None
    assert "name it in CUDA_VISIBLE_DEVICES" in got.reasons["gpu_memory_bytes"]


def test_the_uuid_that_cuda_tells_of_an_instance_is_found(nvml: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = nvml(mig=True)
    start_cuda(monkeypatch, "9999")
    assert locate(fake, 0) == ("MIG-9999", True, True)


@pytest.mark.parametrize("failing", ["nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetUUID"])
def test_an_instance_is_found_where_the_devices_cannot_be_listed(
    nvml: Use, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    fake = nvml(mig=True, fails={failing: "Insufficient Permissions"})
    start_cuda(monkeypatch, "9999")
    assert locate(fake, 0) == ("MIG-9999", True, True)


def test_what_the_environment_says_after_cuda_has_started_is_not_asked(
    nvml: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = nvml({"GPU-a": "H200", "GPU-b": "H200"}, mig=False)
    start_cuda(monkeypatch, "b")
    for changed in ("", "GPU-a", "MIG-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", changed)
        assert locate(fake, 0) == ("GPU-b", False, True)


def test_one_error_stops_no_other_field(nvml: Use) -> None:
    nvml(fails={"nvmlDeviceGetPowerUsage": "GPU is lost"}, lacks=("nvmlDeviceGetTemperature",))
    got = read()
    assert set(got.reasons) == {"gpu_power_watts", "gpu_temperature"}
    assert got.reasons["gpu_power_watts"] == "GPU is lost"
    assert (got.gpu_power_watts, got.gpu_temperature, got.gpu_utilization) == (None, None, 0.93)


@pytest.mark.parametrize(
    "how",
    [
        {"lacks": ("nvmlDeviceGetCurrentClocksEventReasons",)},
        {"fails": {"nvmlDeviceGetCurrentClocksEventReasons": "Function Not Found"}},
    ],
)
def test_the_older_name_of_the_reasons_serves(nvml: Use, how: dict[str, Any]) -> None:
    nvml(mask=0x8, **how)
    assert read().gpu_throttle == ("hardware slowdown",)


def test_cuda_has_started_and_its_uuid_finds_the_gpu_whatever_the_order(
    nvml: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = nvml({"GPU-a": "T4", "GPU-b": "H200"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    start_cuda(monkeypatch, "b", "a")
    assert locate(fake, 0) == ("GPU-b", False, True)
    assert locate(fake, 1) == ("GPU-a", False, True)


def test_a_place_found_before_cuda_started_is_looked_for_again(nvml: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = nvml({"GPU-a": "H200", "GPU-b": "H200"})
    gpu = Gpu(0)
    gpu.read(Readings())
    assert set(fake.asked) == {"GPU-a"}
    start_cuda(monkeypatch, "b")
    fake.asked.clear()
    gpu.read(Readings())
    assert set(fake.asked) == {"GPU-b"}


@pytest.mark.parametrize(
    ("visible", "index", "expected"),
    [
        (None, 1, "GPU-bb-2"),
        ("1", 0, "GPU-bb-2"),
        ("1,0", 1, "GPU-aa-1"),
        ("GPU-bb-2", 0, "GPU-bb-2"),
        ("GPU-b", 0, "GPU-bb-2"),
    ],
)
def test_the_variable_says_which_before_cuda_starts(
    nvml: Use, monkeypatch: pytest.MonkeyPatch, visible: str | None, index: int, expected: str
) -> None:
    fake = nvml({"GPU-aa-1": "H200", "GPU-bb-2": "H200"})
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert locate(fake, index) == (expected, False, False)


@pytest.mark.parametrize(
    ("visible", "wanted"),
    [
        ("", "shows no device 0"),
        ("-1", "shows no device 0"),
        ("7", "none of number 7"),
        ("GPU-x", "0 devices of UUID GPU-x"),
    ],
)
def test_a_device_that_is_not_there_is_a_reason(
    nvml: Use, monkeypatch: pytest.MonkeyPatch, visible: str, wanted: str
) -> None:
    nvml()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    got = read()
    assert all(wanted in got.reasons[name] for name in GPU_FIELDS)


def test_gpus_that_differ_are_not_guessed_at(nvml: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml({"GPU-a": "T4", "GPU-b": "H200"})
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in read().reasons["gpu_utilization"]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert read().gpu_utilization == 0.93


def test_no_driver_no_package_no_cuda_are_reasons(nvml: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml(fails={"nvmlInit": "Driver Not Loaded"})
    assert read().reasons["gpu_utilization"] == "Driver Not Loaded"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'fastloop[monitor]'" in read().reasons["gpu_utilization"]
    assert read(None).reasons["gpu_utilization"] == "the device is not a CUDA device"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "without CUDA" in read().reasons["gpu_utilization"]


def test_a_whole_sample_has_every_field_or_its_reason(nvml: Use) -> None:
    fake = nvml(lacks=("nvmlDeviceGetMemoryInfo",))
    got = sample()
    assert all((getattr(got, name) is None) == (name in got.reasons) for name in FIELDS)
    assert got.gpu_utilization == 0.93
    assert (fake.started, fake.ended) == (1, 1)


@pytest.mark.parametrize(
    ("device", "index"), [(3, 3), ("cuda:2", 2), (torch.device("cuda", 1), 1), ("cpu", None), (None, 0), ("cuda", 0)]
)
def test_devices(device: Any, index: int | None) -> None:
    assert cuda_index(device) == index


@pytest.mark.parametrize(
    ("device", "error"), [(True, TypeError), (1.5, TypeError), (-1, ValueError), ("gpu", ValueError)]
)
def test_what_is_not_a_device_is_an_error(device: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"\[monitor\]"):
        cuda_index(device)
