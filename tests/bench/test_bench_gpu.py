# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark without a GPU: every row's construction and check on CPU tensors, the file, the page made of it.

What is written here is fake and stays in temporary folders: a result of a GPU comes from `make gpu` alone.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import programs
import pytest
import torch

import fastloop
from fastloop.bench import chargpt, cli, gpu, gpu_device, gpu_record, measure
from fastloop.bench.commands import shared
from fastloop.bench.gpu_record import SPECS, GpuRow, GpuRun, Spec
from fastloop.bench.results import BadResult
from fastloop.bench.stats import Interval

ROOT = Path(__file__).resolve().parents[2]
GRAPHED = ("1000x1024-graph/fused", "1m-cold/fused", "1m-hot/fused")
FAKE_DEVICE = "Fake GPU 9000"
GPT = chargpt.Size(layers=1, width=8, heads=2, context=8, batch=2, vocabulary=11, tied=True)
TINY = gpu.Sizes(((40, 3), (7,)), ((9,), (5,)), ((8, 8),), ((6,),) * 5, ((2,),) * 7, stream=64, gpt=GPT)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> gpu.Bench:
    """The rows at sizes that take no time, on the CPU, in 5 pairs of one call each."""
    monkeypatch.setattr(measure, "calibrate", lambda side, sampler=None: 1)
    clock = partial(gpu.host_clock, wait=lambda: None)
    names = ("reference", "reference")
    return gpu.Bench(torch.device("cpu"), TINY, seconds=60.0, pairs=(5,), backends=names, clocks=(clock, clock))


def ceiling() -> dict[str, gpu_device.Ceiling]:
    patterns = {name: (moved, build) for name, moved, build in gpu_device.patterns(64, torch.device("cpu"))}
    moved, build = patterns["copy"]
    return {"copy": gpu_device.Ceiling(build, moved, [1e-6])}


# ---- Rows


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_every_row_is_built_checked_and_timed(spec: Spec, bench: gpu.Bench) -> None:
    row = bench.run(spec, ceiling())
    if spec.name in GRAPHED:
        assert (row.status, row.reason) == ("skipped", "needs CUDA graphs")
        return
    assert row.status == "ok", row.reason
    assert row.ratio is not None
    assert len(row.ours_seconds) == len(row.peer_seconds) == 5
    if spec.ceiling_goal is not None:
        assert row.ceiling_kind == "copy"
        assert row.ceiling is not None
        assert len(row.ceiling_ratios) == 20
        assert row.gbps is not None


class Unclipped(fastloop.AdamW):
    """An AdamW that forgets to clip."""

    def __init__(self, tensors: Any, **options: Any) -> None:
        super().__init__(tensors, **{**options, "max_grad_norm": None})


@pytest.mark.parametrize(
    "spec",
    [spec for spec in SPECS if spec.name not in (*GRAPHED, gpu_record.CONTROL)],
    ids=lambda spec: spec.name,
)
def test_a_wrong_result_is_never_timed(spec: Spec, bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloop, "AdamW", Unclipped)
    row = bench.run(spec, {})
    assert row.status == "wrong"
    assert row.ratio is None
    assert row.ours_seconds == []


def test_a_parameter_that_is_not_its_rounded_master_is_wrong(bench: gpu.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale(fastloop.AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][1][2] += 0.5

    monkeypatch.setattr(fastloop, "AdamW", Stale)
    row = bench.run(next(spec for spec in SPECS if spec.name.startswith("gpt-1b-bf16")), {})
    assert row.status == "wrong"


def test_fresh_gradients_are_at_new_addresses_with_the_same_values() -> None:
    tensors = gpu.parameters(TINY.many, torch.float32, torch.device("cpu"))
    before = gpu.gradients(tensors)
    gpu._fresh([tensors])()
    after = gpu.gradients(tensors)
    assert {x.data_ptr() for x in before}.isdisjoint({x.data_ptr() for x in after})
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_what_prepares_is_not_timed() -> None:
    order: list[str] = []
    side = gpu.Side([lambda: order.append("step")] * 2, lambda: order.append("prepare"), 2)
    gpu.host_clock(side, 2, wait=lambda: order.append("wait"))
    assert order == ["prepare", "wait", "step", "step", "wait"] * 2


def test_the_hardest_ceiling_counts(bench: gpu.Bench) -> None:
    slow = ceiling()["copy"]
    both = {"slow": replace(slow, seconds=[1.0]), "fast": slow}
    assert bench.run(SPECS[0], both).ceiling_kind == "fast"


def test_the_1b_model_has_its_parameters() -> None:
    elements = sum(torch.Size(shape).numel() for shape in gpu.FULL.large)
    assert 1.0e9 < elements < 1.03e9


def test_the_stream_kernels_move_what_they_declare() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    script = (
        "import torch; from fastloop.bench import gpu_stream\n"
        "g, p, m, v = before = [torch.randn(5000) for _ in range(4)]\n"
        "after = [x.clone() for x in before]\n"
        "gpu_stream.build(after)()\n"
        "for got, wanted in zip(after, (g, g + p, m + (g + p), v - (g + p))): torch.testing.assert_close(got, wanted)\n"
    )
    environment = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# ---- The file


def fake_run(**change: Any) -> GpuRun:
    rows = [
        GpuRow(
            spec.name,
            ratio=Interval(1.5, 1.4, 1.6),
            ours_seconds=[0.01, 0.02, 0.03],
            peer_seconds=[0.03] * 3,
            bytes=10**9 if spec.ceiling_goal else 0,
            ceiling=Interval(0.92, 0.91, 0.93) if spec.ceiling_goal else None,
            ceiling_kind="copy" if spec.ceiling_goal else "",
        )
        for spec in SPECS
        if spec.name != gpu_record.CONTROL
    ]
    rows.append(GpuRow(gpu_record.CONTROL, ratio=Interval(1.001, 0.999, 1.003)))
    state = {"clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "throttling": []}
    run = GpuRun(
        created="2026-01-02T03:04:05+00:00",
        device=FAKE_DEVICE,
        commit="0123456789ab",
        environment={
            "torch": "0.0-fake",
            "triton": "0.0-fake",
            "torch_cuda": "13.0",
            "python": "3.12",
            "fastloop": "0",
        },
        clocks={"before": state, "loaded": state | {"driver_version": "580.0"}, "after": state},
        ceilings={"copy": {"bytes": 8, "gbps": 4000.0, "seconds": [1.0]}},
        rows=rows,
    )
    return replace(run, **change)


def test_a_run_is_written_and_read_back(tmp_path: Path) -> None:
    path = gpu_record.save(fake_run(), tmp_path)
    assert path == tmp_path / "fake-gpu-9000" / "0123456789ab.json"
    assert gpu_record.load(path) == fake_run()


@pytest.mark.parametrize("text", ["", "{}", '{"schema": "fastloop-bench/1"}', '{"schema": "fastloop-gpu/1"}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(BadResult, match=r"result\.json"):
        gpu_record.load(path)


def test_row_names_are_unique() -> None:
    assert len({spec.name for spec in SPECS}) == len(SPECS)


# ---- The command


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_device_it_stops_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", "--results", str(tmp_path)]) == shared.VOID
    assert "sees no CUDA device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, shared.OK),
        ({"rows": [GpuRow("gpt-1b/fused", "wrong", "differs")]}, shared.WRONG),
        ({"rows": [GpuRow(gpu_record.CONTROL, ratio=Interval(1.05, 1.04, 1.06))]}, shared.VOID),
    ],
)
def test_exit_codes(change: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "measure_all", lambda *arguments: fake_run(**change))
    assert cli.main(["gpu", "--results", str(tmp_path)]) == code
    assert (tmp_path / "fake-gpu-9000" / "0123456789ab.json").exists()


def test_an_unknown_row_is_wrong_usage() -> None:
    assert cli.main(["gpu", "-k", "no such row"]) == shared.USAGE


# ---- The page and the README's table


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return programs.program("scripts/gpu_results.py", monkeypatch)


def test_without_a_file_each_row_says_not_yet_measured(script: ModuleType) -> None:
    page = script.page([])
    assert page.count("not yet measured") == sum(spec.name != gpu_record.CONTROL for spec in SPECS)
    assert all(spec.title in page for spec in SPECS if spec.name != gpu_record.CONTROL)
    assert "not yet measured" in script.readme_table([])


def test_each_row_stands_with_its_figure(script: ModuleType, tmp_path: Path) -> None:
    gpu_record.save(fake_run(), tmp_path)
    runs = script.runs(tmp_path)
    page = script.page(runs)
    assert "not yet measured" not in page
    assert FAKE_DEVICE in page
    assert "1.50 (1.40 to 1.60)" in page
    assert "92 % of copy" in page
    assert "0123456789ab" in page


def test_a_row_that_was_skipped_is_not_yet_measured(script: ModuleType) -> None:
    run = fake_run()
    run.rows[0] = GpuRow(run.rows[0].name, "skipped", "not enough memory")
    assert script.page([run]).count("not yet measured: not enough memory") == 1


def test_the_newest_run_of_a_device_counts(script: ModuleType, tmp_path: Path) -> None:
    gpu_record.save(fake_run(), tmp_path)
    gpu_record.save(fake_run(commit="ba9876543210", created="2026-02-03T00:00:00+00:00"), tmp_path)
    assert [run.commit for run in script.runs(tmp_path)] == ["ba9876543210"]


@pytest.mark.parametrize(
    "change",
    [{"commit": "0123456789ab-dirty"}, {"rows": [GpuRow(gpu_record.CONTROL, ratio=Interval(1.05, 1.04, 1.06))]}],
)
def test_a_dirty_or_void_run_is_refused(change: dict[str, Any], script: ModuleType, tmp_path: Path) -> None:
    gpu_record.save(fake_run(**change), tmp_path)
    with pytest.raises(SystemExit):
        script.runs(tmp_path)


def test_the_check_finds_a_page_that_was_edited(script: ModuleType, tmp_path: Path) -> None:
    page, readme, results = tmp_path / "page.md", tmp_path / "README.md", tmp_path / "results"
    readme.write_text(f"before\n{script.BEGIN}{script.END}\nafter\n")
    script.write(page, readme, results, check=False)
    script.write(page, readme, results, check=True)
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("after\n")
    for path in (page, readme):
        written = path.read_text()
        path.write_text(written.replace("not yet measured", "infinitely fast", 1))
        with pytest.raises(SystemExit, match=path.name):
            script.write(page, readme, results, check=True)
        path.write_text(written)
