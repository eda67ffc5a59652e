# SPDX-License-Identifier: Apache-2.0
"""Commands and exit codes, with cases that take no time and optimizers that are wrong on purpose."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastloop
from fastloop.bench import cases, ceiling, checks, cli, contenders, results, runner, session, stats, training
from fastloop.bench.results import Run
from fastloop.bench.runner import Effort, Plan

TINY = cases.step_case(
    "tiny", "three tensors", [(5, 7), (0,), (3,)], peers=("torch-fused", "torch-default"), small=True
)
TINY_BF16 = cases.step_case("tiny-bf16", "two tensors", [(33,), (3, 3)], dtype=torch.bfloat16, peers=("torch-fused",))
QUICK = Plan(Effort((5,)), Effort((5,)))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tiny cases exist, a sample lasts 1 ms, and the control is calm."""
    control = replace(cases.CONTROL, build=TINY.build, traffic=TINY.traffic)
    monkeypatch.setattr(cases, "CASES", (TINY,))
    monkeypatch.setattr(cases, "CONTROL", control)
    monkeypatch.setattr(cases.select, "__defaults__", ((TINY,),))
    monkeypatch.setattr("fastloop.bench.measure.calibrate", lambda call, sampler=None: 1)
    monkeypatch.setattr(stats, "CONTROL_MOVED", float("inf"))


class Wrong(fastloop.AdamW):
    """An AdamW that forgets to clip: at the first step its parameters are right all the same, its moments are not."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, **{**options, "max_grad_norm": None})


def run(*arguments: str | Path) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize("case", [TINY, TINY_BF16], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["fastloop", "torch-fused", "torch-foreach", "torch-default", "torch-grad-scale"])
def test_every_contender_gives_the_reference_result(case: cases.Case, name: str) -> None:
    runner.build_checked(case, name)


@pytest.mark.parametrize(
    "change", [{"lr": 1.001e-3}, {"betas": (0.9, 0.998)}, {"betas": (0.901, 0.999)}, {"max_grad_norm": 1.01}]
)
def test_the_check_finds_small_differences(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    original = fastloop.AdamW
    monkeypatch.setattr(fastloop, "AdamW", lambda tensors, **options: original(tensors, **{**options, **change}))
    with pytest.raises(checks.WrongResult):
        runner.build_checked(TINY)


def test_a_nan_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class Poisoned(fastloop.AdamW):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][2][1] = float("nan")

    monkeypatch.setattr(fastloop, "AdamW", Poisoned)
    with pytest.raises(checks.WrongResult, match=r"parameter of tensor 2.*got nan"):
        runner.build_checked(TINY)


def test_a_case_is_measured_against_each_peer() -> None:
    rows = runner.run_case(TINY, QUICK)
    assert [row.peer for row in rows] == ["torch-fused", "torch-default"]
    for row in rows:
        assert row.status == "ok"
        assert len(row.ratios) == 5
        assert row.ratio is not None
        assert row.ours_memory is not None


def test_an_outside_peer_that_fails_or_differs_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(parameters: list[torch.Tensor]) -> contenders.Stepper:
        raise RuntimeError("needs a device")

    def differ(parameters: list[torch.Tensor]) -> contenders.Stepper:
        optimizer = torch.optim.SGD(parameters, lr=1.0)
        return contenders.Stepper(optimizer.step, optimizer)

    for build, reason in ((fail, "needs a device"), (differ, "parameter of tensor")):
        peer = contenders.Contender("peer", "made up", build, outside=True)
        monkeypatch.setitem(contenders.CONTENDERS, "peer", peer)
        (row,) = runner.run_case(replace(TINY, peers=("peer",)), QUICK)
        assert row.status == "skipped"
        assert reason in row.reason


def test_too_little_memory_or_time_shows_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = runner.run_case(TINY, replace(QUICK, deadline=0.0))
    assert (row.status, "no time left" in row.reason) == ("skipped", True)
    monkeypatch.setattr("fastloop.bench.env.available_bytes", lambda: 2**20)
    (row,) = runner.run_case(TINY, QUICK)
    assert (row.status, "GiB of memory" in row.reason) == ("skipped", True)


def test_list_env_and_stream(tiny: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    streams = ceiling.streams(1024)
    monkeypatch.setattr("fastloop.bench.ceiling.streams", lambda: streams)
    assert run("list") == run("env") == run("stream") == 0
    out = capsys.readouterr().out
    for text in ("tiny", "chargpt", "torch-compile", "torch isa", "memory ceiling", "read 1, read and write 3"):
        assert text in out


@pytest.mark.parametrize("arguments", [["nonsense"], ["run", "--bogus"], ["compare", "one"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(*arguments)
    assert exit_info.value.code == 2


def test_a_pattern_without_a_case_is_wrong_usage(tiny: None, tmp_path: Path) -> None:
    assert run("--output", tmp_path, "run", "-k", "nothing") == 2


def test_run_writes_its_files(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--output", tmp_path, "run", "-k", "tiny", "--quick", "--json", tmp_path / "compact.json") == 0
    assert "tiny" in capsys.readouterr().out
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert "| tiny |" in (folder / "report.md").read_text()
    raw, compact = results.load(folder / "result.json"), results.load(tmp_path / "compact.json")
    assert len(raw.rows[0].ours_seconds) == 20
    assert len(compact.rows[0].ratios) == 20
    assert raw.control is not None
    assert run("compare", folder / "result.json", tmp_path / "compact.json", "--no-rerun") == 0


def test_a_wrong_result_exits_with_3(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastloop, "AdamW", Wrong)
    assert run("--output", tmp_path, "run", "-k", "tiny", "--quick") == 3
    (folder,) = tmp_path.iterdir()
    (row,) = (row for row in results.load(folder / "result.json").rows if row.case == "tiny")
    assert row.status == "wrong"
    assert not row.ratios


def saved(path: Path, ratio: float, control: bool = True) -> Path:
    row = runner.Row("tiny", "torch-fused", "clip+step", "tiny", ratios=[ratio] * 20, ours_seconds=[1.0] * 20)
    row.ratio = stats.median_interval(row.ratios)
    still = runner.Row("control", "torch-fused", "control", "control", ratios=[1.0] * 20, ours_seconds=[1.0] * 20)
    still.ratio = stats.median_interval(still.ratios)
    rows = [row, still] if control else [row]
    results.save(Run("2026-01-02T03:04:05+00:00", {"cpu": "made up", "file": path.name}, {}, rows), path)
    return path


def test_compare_exit_codes(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast, slow = saved(tmp_path / "fast.json", 2.0), saved(tmp_path / "slow.json", 1.0)
    assert run("compare", fast, fast) == 0
    assert run("compare", fast, slow, "--confirm", slow) == 2
    assert "same as A or B" in capsys.readouterr().err
    assert run("compare", fast, slow, "--confirm", saved(tmp_path / "bare.json", 1.0, control=False)) == 0
    assert "REGRESSED" not in capsys.readouterr().out
    assert run("compare", fast, slow, "--confirm", saved(tmp_path / "again.json", 1.0)) == 1
    assert "REGRESSED" in capsys.readouterr().out
    # Another machine's files: nothing here can confirm the change.
    assert run("compare", fast, slow) == 0
    assert "INCONCLUSIVE" in capsys.readouterr().out
    assert run("compare", slow, fast, "--confirm", saved(tmp_path / "faster.json", 2.0)) == 0
    assert "IMPROVED" in capsys.readouterr().out
    assert run("compare", tmp_path / "none.json", slow) == 5
    assert run("compare", fast, tmp_path / "none.json") == 2


def test_training_agrees_and_finds_a_wrong_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training.train(steps=12)["status"] == "ok"
    original = fastloop.AdamW
    off = {"lr": training.LR * (1 + 1e-3)}
    monkeypatch.setattr(fastloop, "AdamW", lambda tensors, **options: original(tensors, **{**options, **off}))
    found = training.train(steps=12)
    assert found["status"] == "wrong"
    assert "do not take the same steps" in found["reason"]


def test_a_wrong_training_exits_with_3(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = training.train

    def train(**options: Any) -> dict[str, Any]:
        return short(steps=8)

    monkeypatch.setattr(training, "train", train)
    assert run("--output", tmp_path / "right", "run", "-k", session.TRAINING) == 0
    monkeypatch.setattr(training, "MARGIN", 0.0)
    monkeypatch.setattr(fastloop, "AdamW", Wrong)
    assert run("--output", tmp_path / "wrong", "run", "-k", session.TRAINING) == 3


def test_a_missing_rich_names_the_extra(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from fastloop.bench.__main__ import main; sys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "fastloop[bench]" in done.stderr
