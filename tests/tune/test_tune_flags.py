# SPDX-License-Identifier: Apache-2.0
"""The tuner of flags: what it tries, what wins, what is dropped; and one real trial of each kind that a CPU has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastloop.bench.stats import Interval
from fastloop.tune import flag_trial, losses, trial
from fastloop.tune.flags import NAMES, PAYS_WITHIN, ROUNDING, candidates, flags, objection, windows_to_pay
from fastloop.tune.report import Report, Trial
from fastloop.tune.target import TargetError
from fastloop.tune.trial import Outcome

CPU = {
    "device": "cpu", "convolutions": False, "any_convolutions": False, "images": False, "blocks": 0, "bf16": True,
    "tf32": False, "precision": "fp32", "cudnn_benchmark": False, "matmul_precision": "highest", "threads": 8,
    "cpus": 12,
}  # fmt: skip
GPU = {
    **CPU,
    "device": "cuda",
    "tf32": True,
    "any_convolutions": True,
    "convolutions": True,
    "images": True,
    "blocks": 4,
}


# ---- which are tried


def tried(facts: Mapping[str, Any], **present: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """(options that are tried, name -> why it is skipped)."""
    found = candidates(facts, present)
    return [c.options for c in found if not c.skip], {next(iter(c.options)): c.skip for c in found if c.skip}


def test_on_a_cpu() -> None:
    options, skipped = tried(CPU)
    assert options == [
        {"threads": 1},
        {"threads": 2},
        {"threads": 4},
        {"threads": 12},
        {"precision": "bf16"},
        {"compile": True},
    ]
    assert set(skipped) == {
        "cudnn_benchmark",
        "channels_last",
        "matmul_precision",
        "activation_checkpointing",
        "cuda_graph",
    }
    for name in ("cudnn_benchmark", "matmul_precision", "cuda_graph"):
        assert skipped[name] == "needs a GPU"
    assert "no convolutions" in skipped["channels_last"]
    assert "several blocks" in skipped["activation_checkpointing"]


def test_on_a_gpu() -> None:
    options, skipped = tried(GPU)
    assert options == [
        {"cudnn_benchmark": True}, {"channels_last": True}, {"matmul_precision": "high"},
        {"matmul_precision": "medium"}, {"precision": "bf16"},
        {"precision": "fp16"}, {"activation_checkpointing": 1}, {"cuda_graph": True},
        {"compile": True},
    ]  # fmt: skip
    assert skipped == {"threads": "the steps run on a GPU"}


@pytest.mark.parametrize(
    ("facts", "present", "name", "reason"),
    [
        ({**GPU, "images": False}, {}, "channels_last", "the batches have no images, tensors of 4 dimensions"),
        (GPU, {"channels_last": True}, "channels_last", "is on already"),
        ({**GPU, "cudnn_benchmark": True}, {}, "cudnn_benchmark", "is on already"),
        (GPU, {"deterministic": True}, "cudnn_benchmark", "which deterministic rules out"),
        ({**GPU, "any_convolutions": False}, {}, "cudnn_benchmark", "the model has no convolutions"),
        ({**GPU, "tf32": False}, {}, "matmul_precision", "the GPU has no TF32"),
        ({**GPU, "matmul_precision": "medium"}, {}, "matmul_precision", "is medium already"),
        ({**CPU, "precision": "bf16"}, {}, "precision", "is bf16 already"),
        (CPU, {"compile": True}, "compile", "is on already"),
        (GPU, {"cuda_graph": True}, "cuda_graph", "is on already"),
        (GPU, {"auto_microbatch": True}, "cuda_graph", "does not go with auto_microbatch, which is on"),
        (GPU, {"strategy": "ddp"}, "cuda_graph", "does not go with strategy, which is on"),
        (GPU, {"activation_checkpointing": 1}, "cuda_graph", "does not go with activation_checkpointing, which is on"),
        (GPU, {"cuda_graph": True}, "activation_checkpointing", "does not go with cuda_graph"),
        ({**CPU, "blocks": 3}, {"activation_checkpointing": 2}, "activation_checkpointing", "is on already"),
        ({**CPU, "cpus": 1, "threads": 1}, {}, "threads", "there is one CPU to use, and 1 thread"),
    ],
)
def test_what_is_skipped_says_why(facts: Any, present: Any, name: str, reason: str) -> None:
    assert reason in tried(facts, **present)[1][name]


def test_a_gpu_without_bf16_tries_fp16_alone() -> None:
    assert {"precision": "bf16"} not in tried({**GPU, "bf16": False})[0]
    assert {"precision": "fp16"} in tried({**GPU, "bf16": False})[0]


# ---- what wins


def made(settings: dict[str, Any], low: float = 1.1, error: float | None = 0.0, **extra: Any) -> Trial:
    gain = {"median": low + 0.05, "low": low, "high": low + 0.1}
    return Trial(settings, rate=Interval(1.0, 1.0, 1.0), error=error, extra={"gain": gain, **extra})


@pytest.mark.parametrize(
    ("tried", "max_error", "noise", "says"),
    [
        (made({"threads": 2}), None, None, ""),
        (made({"threads": 2}, error=0.9 * ROUNDING), None, None, ""),
        (made({"threads": 2}, error=2 * ROUNDING), None, None, "differ by up to 2.0e-04, and 1.0e-04 is allowed"),
        (made({"threads": 2}, error=2 * ROUNDING), None, 1e-2, ""),  # dropout makes more
        (made({"threads": 2}, error=math.inf), 1.0, None, "losses differ by up to inf"),
        (made({"threads": 2}, error=None), None, None, "losses differ by up to inf"),
        (made({"threads": 2}, low=0.99), None, None, "no gain"),
        (made({"threads": 2}, low=0.96), None, None, "no gain"),
        (made({"precision": "bf16"}, error=1e-3), None, None, "yours to decide"),
        (made({"precision": "bf16"}, error=1e-9), None, None, "yours to decide"),
        (made({"matmul_precision": "high"}, error=1e-6), None, None, "yours to decide"),
        (made({"precision": "bf16"}, error=1e-3), 1e-2, None, ""),
        (made({"precision": "bf16"}, error=1e-3), 1e-4, None, "and 1.0e-04 is allowed"),
        (made({"threads": 2}, error=1e-5), 1e-6, None, "and 1.0e-06 is allowed"),
        (made({"compile": True}, pays_after=PAYS_WITHIN), None, None, ""),
        (made({"compile": True}, pays_after=PAYS_WITHIN + 1), None, None, "pays after 10,001 windows for compiling"),
        (made({"compile": True}, pays_after=None), None, None, "pays never"),
        (Trial({"threads": 2}, rate=Interval(9.0, 9.0, 9.0)), None, None, "measured apart"),
        (Trial({"compile": True}, "failed", "no compiler"), None, None, "failed: no compiler"),
    ],
)  # fmt: skip
def test_what_speaks_against_a_trial(tried: Trial, max_error: Any, noise: Any, says: str) -> None:
    against = objection(tried, max_error=max_error, noise=noise)
    assert says in against
    assert bool(says) == bool(against)


def test_a_gain_of_less_than_2_percent_is_none_however_sure() -> None:
    sure = Trial({"threads": 2}, error=0.0, extra={"gain": {"median": 1.015, "low": 1.014, "high": 1.016}})
    assert "no gain" in objection(sure, max_error=None, noise=None)


def test_after_how_many_windows_compiling_pays() -> None:
    assert windows_to_pay(30.0, 0.010, 0.007) == 10_001 or windows_to_pay(30.0, 0.010, 0.007) == 10_000
    assert windows_to_pay(0.0, 2.0, 1.0) == 1
    assert windows_to_pay(30.0, 0.010, 0.010) is None
    assert windows_to_pay(30.0, 0.010, 0.020) is None


# ---- the search, with trials that are made up

Rule = Callable[[dict[str, Any]], float]  # how fast these options are


class World:
    """Answers in place of processes: `speed` of options, whose ratio is the gain."""

    def __init__(self, speed: Rule, facts: Mapping[str, Any], **known: Any) -> None:
        self.speed, self.facts, self.known = speed, facts, known
        self.asked: list[tuple[dict[str, Any], dict[str, Any], bool]] = []

    def run(self, function: str, arguments: Mapping[str, Any], **_: Any) -> Outcome:
        kind = function.rpartition(":")[2]
        if kind == "present":
            rates = {"rates": [100.0] * 5, "wait_share": self.known.get("wait_share", 0.0)}
            limits = {"alone": rates, "cached": rates, "both": rates}
            return Outcome("ok", {"limits": limits, "facts": dict(self.facts), "noise": self.known.get("noise")})
        if kind == "alone":
            rate = 100.0 * self.speed(arguments["options"])
            return Outcome("ok", {"rate": {"median": rate, "low": rate, "high": rate}})
        base, flagged = arguments["base"], arguments["flagged"]
        self.asked.append((base, flagged, arguments["own_process"]))
        failing = self.known.get("failing", {}).get(next(iter(flagged)))
        if failing and len(flagged) == 1:
            return Outcome(failing, reason="as planned", traceback="Traceback ...", exit_code=1)
        gain = self.speed(flagged) / self.speed(base)
        error = max([self.known.get("errors", {}).get(name, 0.0) for name in flagged if name not in base], default=0.0)
        return Outcome("ok", {
            "ratios": [gain * (1 + 0.001 * (i - 4.5)) for i in range(10)], "rates": [100.0 * self.speed(flagged)] * 10,
            "seconds_base": 0.1, "error": error, "norm_error": 0.0,
            "overhead_seconds": self.known.get("overhead_seconds", 30.0),
        })  # fmt: skip


def product(**gains: float) -> Rule:
    return lambda options: math.prod(gains.get(name, 1.0) for name in options)


def search(monkeypatch: pytest.MonkeyPatch, world: World, **arguments: Any) -> Report:
    monkeypatch.setattr(trial, "run", world.run)
    return flags("some.where:task", fresh=True, **arguments)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_nothing_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(product(threads=0.5, compile=1.0, precision=1.01), CPU)
    report = search(monkeypatch, world)
    assert report.keep
    assert report.loop == {}
    assert report.gain is None
    assert report.best is report.present
    assert [base for base, _, _ in world.asked] == [{}] * 6


def test_one_wins_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(product(compile=1.5), CPU)
    report = search(monkeypatch, world)
    assert report.loop == {"compile": True}
    assert not report.keep
    assert report.gain is not None
    assert report.gain.median == pytest.approx(1.5)
    assert len(world.asked) == 6
    assert any("pays after" in each for each in report.findings)


def test_winners_are_combined_and_measured_together(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(product(compile=1.5, channels_last=1.2), {**CPU, "convolutions": True, "images": True})
    report = search(monkeypatch, world)
    assert report.loop == {"compile": True, "channels_last": True}
    assert report.gain is not None
    assert report.gain.median == pytest.approx(1.8)
    assert report.trials[-2].reason.endswith("on top of compile on")
    assert world.asked[-2:] == [
        ({"compile": True}, {"compile": True, "channels_last": True}, False),
        ({}, {"compile": True, "channels_last": True}, False),
    ]


def test_what_adds_nothing_to_the_others_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """compile brings what channels_last brings."""

    def speed(options: dict[str, Any]) -> float:
        return 1.5 if "compile" in options else 1.2 if "channels_last" in options else 1.0

    report = search(monkeypatch, World(speed, {**CPU, "convolutions": True, "images": True}))
    assert report.loop == {"compile": True}
    assert any("channels_last on wins alone" in each and "adds nothing" in each for each in report.findings)


def test_a_combination_slower_than_the_best_alone_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """In pairs with its base it looked faster; against the present options it is not."""
    world = World(product(compile=1.5, channels_last=1.2), {**CPU, "convolutions": True, "images": True})
    honest = world.run

    def moody(function: str, arguments: Mapping[str, Any], **more: Any) -> Outcome:
        found = honest(function, arguments, **more)
        if len(arguments.get("flagged", ())) == 2 and not arguments["base"]:
            found.result["ratios"] = [1.3] * 10
        return found

    monkeypatch.setattr(world, "run", moody)
    report = search(monkeypatch, world)
    assert report.loop == {"compile": True}
    assert report.gain is not None
    assert report.gain.median == pytest.approx(1.5)
    assert any("Recommended is compile on alone" in each for each in report.findings)


def test_of_several_values_the_best_is_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(options: dict[str, Any]) -> float:
        return {1: 1.1, 2: 1.3, 4: 1.2}.get(options.get("threads", 8), 1.0) * (1.4 if "compile" in options else 1.0)

    world = World(speed, CPU)
    assert search(monkeypatch, world).loop == {"compile": True, "threads": 2}
    assert all(flagged.get("threads") in (None, 2) for base, flagged, _ in world.asked[6:])


def test_fewer_bits_are_reported_and_recommended_only_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(product(precision=2.0), CPU, errors={"precision": 3e-3})
    report = search(monkeypatch, world)
    assert report.keep
    bf16 = next(t for t in report.trials if t.settings == {"precision": "bf16"})
    assert bf16.error == 3e-3
    assert bf16.reason == "2.00 times (1.99 to 2.01), error 3.0e-03"
    assert any("precision bf16" in each and "2.00 times" in each and "3.0e-03" in each for each in report.findings)
    assert search(monkeypatch, world, max_error=0.01).loop == {"precision": "bf16"}
    assert search(monkeypatch, world, max_error=0.001).keep


def test_an_error_no_larger_than_that_of_other_random_numbers_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(product(compile=1.5), CPU, errors={"compile": 4e-3}, noise=5e-3)
    report = search(monkeypatch, world)
    assert report.loop == {"compile": True}
    assert any("draws random numbers" in each and "5.0e-03" in each for each in report.findings)
    assert search(monkeypatch, World(product(compile=1.5), CPU, errors={"compile": 4e-3})).keep


def test_compiling_that_does_not_pay_is_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(product(compile=1.5), CPU, overhead_seconds=1e4)
    report = search(monkeypatch, world)
    assert report.keep
    assert any("Not recommended: compile on" in each for each in report.findings)


def test_a_trial_that_fails_is_reported_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    report = search(monkeypatch, World(product(precision=1.0, compile=2.0), CPU, failing={"threads": "timeout"}))
    assert [t.status for t in report.trials if "threads" in t.settings] == ["timeout"] * 4
    assert report.loop == {"compile": True}


def test_without_memory_for_both_it_is_measured_apart_and_not_recommended(monkeypatch: pytest.MonkeyPatch) -> None:
    report = search(monkeypatch, World(product(compile=2.0), CPU, failing={"compile": "out of memory"}))
    compiled = next(t for t in report.trials if "compile" in t.settings)
    assert compiled.status == "ok"
    assert "measured apart" in compiled.reason
    assert compiled.rate is not None
    assert compiled.rate.median == 200.0
    assert report.keep
    assert any("compile on: measured apart" in each for each in report.findings)


def test_cudnn_gets_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(product(cudnn_benchmark=1.2, channels_last=1.3), GPU)
    report = search(monkeypatch, world, only=["cudnn_benchmark", "channels_last"])
    assert report.loop == {"channels_last": True, "cudnn_benchmark": True}
    assert [own for _, flagged, own in world.asked] == ["cudnn_benchmark" in flagged for _, flagged, _ in world.asked]


def test_waiting_for_data_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    report = search(monkeypatch, World(product(), CPU, wait_share=0.6))
    assert any("waits for data 60 % of the time" in each for each in report.findings)


def test_a_spent_budget_skips_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastloop.tune.session import Session

    world = World(product(compile=2.0), CPU)
    monkeypatch.setattr(Session, "left", lambda self: 0.0)
    report = search(monkeypatch, world)
    assert world.asked == []
    assert report.keep
    assert sum("budget" in t.reason for t in report.trials) == 6


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"only": ["compile", "speed"]}, "only must name flags among"),
        ({"only": []}, "only must name flags among"),
        ({"max_error": -1.0}, "max_error must be a relative difference"),
        ({"max_error": math.nan}, "max_error must be a relative difference"),
        ({"budget": 0}, "budget must be a number above 0"),
        ({"options": {"no_such": 1}}, "no_such"),
    ],
)
def test_arguments_that_do_not_fit(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        flags("some.where:task", **arguments)


def test_an_error_that_is_no_number() -> None:
    with pytest.raises(TypeError, match="max_error must be a number"):
        flags("some.where:task", max_error="1e-3")  # type: ignore[arg-type]


def test_every_name_is_an_option_of_the_loop() -> None:
    import inspect

    from fastloop import Loop

    assert set(NAMES) <= set(inspect.signature(Loop).parameters)


# ---- in the process of a trial

TARGET = """
import torch

def task(dropout=0.0, rows=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 8, generator=generator)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(16, 4)
    )
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": lambda model, batch: (model(batch[0]) - 1.0).square().mean(),
        "train_loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 8, shuffle=True),
    }

def broken():
    raise LookupError("no data")
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "flag_target.py").write_text(TARGET, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = flag_trial.process_settings()
    yield {"function": "flag_target:task", "arguments": {}, "options": {}, "loader": {}, "folders": []}
    flag_trial.modes.set_process(*before)


def test_both_sides_begin_alike_and_see_the_same_batches(spec: Any) -> None:
    found = flag_trial.compare(spec, {"threads": 1}, {"threads": 2}, 0.0)
    assert found["error"] < ROUNDING
    assert found["norm_error"] < ROUNDING
    assert len(found["ratios"]) >= 5
    assert all(rate > 0 for rate in found["rates"])


def test_fewer_bits_have_an_error(spec: Any) -> None:
    found = flag_trial.compare(spec, {"threads": 1}, {"threads": 1, "precision": "bf16"}, 0.0)
    assert 1e-5 < found["error"] < 0.1


def test_the_error_is_not_that_of_a_schedule_without_an_end(spec: Any) -> None:
    plain = {**spec, "options": {"threads": 1}}
    scheduled = {**spec, "options": {"schedule": {"name": "cosine", "warmup_steps": 10}, "threads": 1}}
    changed = [flag_trial.compare(each, {}, {"precision": "bf16"}, 0.0)["error"] for each in (plain, scheduled)]
    assert changed[0] == changed[1]


def test_a_side_in_a_process_of_its_own_begins_alike_too(spec: Any) -> None:
    found = flag_trial.compare(spec, {"threads": 1}, {"threads": 1}, 0.0, own_process=True)
    assert found["error"] == 0.0
    assert found["norm_error"] == 0.0


@pytest.mark.slow
def test_a_side_in_a_process_of_its_own_says_why_it_failed(spec: Any) -> None:
    with pytest.raises(RuntimeError, match="no layer is named 'nowhere'"):
        flag_trial.compare(spec, {}, {"activation_checkpointing": ["nowhere"]}, 0.0, own_process=True)


def test_what_is_known_of_a_target(spec: Any) -> None:
    torch.set_num_threads(1)
    found = flag_trial.present({**spec, "arguments": {"dropout": 0.5}}, 0.05)
    assert found["noise"] > ROUNDING
    facts = found["facts"]
    assert (facts["device"], facts["threads"], facts["precision"], facts["blocks"]) == ("cpu", 1, "fp32", 2)
    assert not facts["convolutions"]
    assert not facts["images"]
    assert flag_trial.present(spec, 0.05)["noise"] is None


def test_what_is_known_of_a_convolutional_one(spec: Any) -> None:
    side = flag_trial.Side(spec, {"threads": 1}, flag_trial.process_settings())
    side.loop.model.append(nn.Conv2d(1, 1, 1))
    side._source.batches = [{"image": torch.zeros(2, 1, 4, 4), "label": torch.zeros(2)}]
    facts = side.facts()
    side.close()
    assert facts["convolutions"]
    assert facts["any_convolutions"]
    assert facts["images"]


def test_few_batches_come_again(spec: Any) -> None:
    found = flag_trial.compare({**spec, "arguments": {"rows": 16}}, {"threads": 1}, {"threads": 1}, 0.0)
    assert found["error"] == 0.0


def test_differences() -> None:
    difference = losses.relative_difference
    assert difference([1.0, 2.0], [1.0, 2.2]) == pytest.approx(0.1)
    assert difference([0.0], [0.0]) == 0.0
    assert difference([1.0], [math.nan]) == math.inf
    assert difference([1.0], [1.0, 2.0]) == math.inf


def test_of_a_target(tmp_path: Path) -> None:
    (tmp_path / "flag_target.py").write_text(TARGET, encoding="utf-8")
    heard: list[Trial] = []
    asked = {"options": {"threads": 1}, "only": ["precision", "cuda_graph"], "timeout": 120.0}
    report = flags("flag_target:task", **asked, on_trial=heard.append)
    assert [(t.settings, t.status) for t in report.trials] == [
        ({}, "ok"), ({"precision": "bf16"}, "ok"), ({"cuda_graph": True}, "skipped"),
    ]  # fmt: skip
    assert heard == report.trials
    assert report.trials[1].error is not None
    assert report.trials[1].error > 1e-5
    assert Report.from_json(report.to_json()) == report
    assert flags("flag_target:task", **asked).cached


@pytest.mark.slow
def test_of_a_target_that_is_broken(tmp_path: Path) -> None:
    (tmp_path / "flag_target.py").write_text(TARGET, encoding="utf-8")
    with pytest.raises(TargetError, match="no data"):
        flags("flag_target:broken", timeout=120.0)
