# SPDX-License-Identifier: Apache-2.0
"""The memory tuner: bytes by part against numbers by hand, estimates against measurements, remedies, words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tune_sizes import CLASSES, HIDDEN, INPUTS, perceptron

import fastloop
from fastloop.tune import child, memory_words, parts, peaks, trial
from fastloop.tune.memory import memory, parts_table, remedies
from fastloop.tune.memory_trial import measure_memory
from fastloop.tune.phases import split_by_phase
from fastloop.tune.target import TargetError, resolve

FLOAT, LONG = 4, 8
BATCH = 32
PARAMETERS = FLOAT * (INPUTS * HIDDEN + HIDDEN + HIDDEN * CLASSES + CLASSES)
TENSORS = 4
STATES = 2 * PARAMETERS + FLOAT * TENSORS  # two moments, and torch's count of steps for each tensor


def activations(samples: int) -> int:
    """The hidden layer, once for ReLU and for the layer above it; log_softmax; the weight that the loss divides by."""
    return FLOAT * samples * HIDDEN + FLOAT * samples * CLASSES + FLOAT


def inputs(samples: int) -> int:
    return FLOAT * samples * INPUTS + LONG * samples


def measured(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(notes, result) of a memory trial in this process."""
    notes: dict[str, Any] = {}
    arguments = {
        "options": {}, "split": 1, "state_dtype": None, "keep_gradients": False, "batches": 2, "seconds": 0.01,
        "memory_limit": None,
    }  # fmt: skip
    given = changes.pop("arguments", {})
    spec = resolve("tune_sizes:perceptron", arguments=given).spec()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(child, "note", lambda **values: notes.update(values))
        return notes, measure_memory(spec, **{**arguments, **changes})


@pytest.fixture(scope="module")
def plain() -> tuple[dict[str, Any], dict[str, Any]]:
    """Without any remedy."""
    return measured()


# ---- by hand


def test_every_part_of_a_perceptron_is_the_number_by_hand(plain: Any) -> None:
    notes, result = plain
    by_hand = {
        "parameters": PARAMETERS, "buffers": 0, "gradients": PARAMETERS, "states": STATES, "inputs": inputs(BATCH),
        "activations": activations(BATCH),
    }  # fmt: skip
    assert notes["estimate"] == by_hand
    assert result["parts"] == {**by_hand, "activations": activations(BATCH) + FLOAT}  # and the loss
    assert notes["estimated_peak"] == PARAMETERS + STATES + inputs(BATCH) + PARAMETERS
    assert result["phases"]["ends"] == {
        "earlier micro-batches": 0, "forward": activations(BATCH) + FLOAT, "backward": PARAMETERS, "step": 0,
    }  # fmt: skip
    rows = memory_words.rows(result["parts"], result["allocated"])
    assert sum(rows.values()) == result["allocated"]


def test_torchs_optimizer_is_estimated_too() -> None:
    notes, result = measured(arguments={"optimizer": "torch"})
    assert notes["estimate"]["states"] == result["parts"]["states"] == STATES
    assert not notes["facts"]["ours"]


def test_half_micro_batches_halve_activations_and_keep_the_losses(plain: Any) -> None:
    _, whole = plain
    notes, halves = measured(split=2)
    assert notes["estimate"]["activations"] == activations(BATCH // 2)
    assert halves["parts"]["activations"] == activations(BATCH // 2) + FLOAT
    assert halves["parts"]["inputs"] == inputs(BATCH // 2)
    assert notes["estimated_peak"] == 2 * PARAMETERS + STATES + inputs(BATCH // 2) + activations(BATCH // 2)
    assert halves["phases"]["ends"]["earlier micro-batches"] == PARAMETERS  # gradients of the first half
    assert halves["losses"] == pytest.approx(whole["losses"], rel=1e-5)


def test_bf16_states_take_half() -> None:
    notes, result = measured(state_dtype="bfloat16")
    assert notes["estimate"]["states"] == result["parts"]["states"] == PARAMETERS + FLOAT * TENSORS


def test_bf16_weights_bring_masters() -> None:
    notes, result = measured(options={"precision": "bf16-pure"})
    assert result["parts"]["parameters"] == result["parts"]["gradients"] == PARAMETERS // 2
    assert notes["estimate"]["gradients"] == PARAMETERS // 2
    assert notes["estimate"]["states"] == result["parts"]["states"] == STATES + PARAMETERS


def test_kept_gradients_are_there_in_the_forward(plain: Any) -> None:
    _, freed = plain
    _, kept = measured(keep_gradients=True)
    assert kept["phases"]["ends"]["forward"] == freed["phases"]["ends"]["forward"] + PARAMETERS
    assert kept["losses"] == freed["losses"]


def test_checkpointed_blocks_keep_their_inputs_only(plain: Any) -> None:
    notes, result = measured(options={"activation_checkpointing": 1})
    assert notes["estimate"]["activations"] <= plain[1]["parts"]["activations"]
    assert result["losses"] == plain[1]["losses"]


# ---- parts


def states_of(optimizer: torch.optim.Optimizer) -> int:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    return parts.resident_bytes(parts.tensors_in(list(optimizer.state.values())))


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, lr=0.1),
        lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: torch.optim.Adam(ps, amsgrad=True),
        lambda ps: torch.optim.Adagrad(ps),
        lambda ps: torch.optim.RMSprop(ps, momentum=0.9),
        lambda ps: fastloop.SGD(ps, lr=0.1, momentum=0.9),
        lambda ps: fastloop.AdamW(ps, ema_decay=0.99, amsgrad=True),
        lambda ps: fastloop.AdamW([{"params": ps[:1], "amsgrad": True}, {"params": ps[1:]}]),
    ],
)
def test_states_are_foretold(make: Any) -> None:
    params = [nn.Parameter(torch.randn(17, 33)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3, 2, 7, 1))]
    optimizer = make(params)
    before = len(optimizer.state)  # some make states before the first step
    foretold = parts.estimated_states(optimizer)
    assert len(optimizer.state) == before
    assert all(p.grad is None for p in params)
    assert foretold == states_of(optimizer)


def test_states_that_cannot_be_foretold_are_not_known() -> None:
    params = [nn.Parameter(torch.randn(4, 4))]
    assert parts.estimated_states(torch.optim.SparseAdam(params)) is None
    guess = parts.estimate(nn.ParameterList(params), torch.optim.SparseAdam(params), torch.ones(2), 10)
    assert guess.states is None
    assert guess.peak(False) is None


def test_saved_storages_count_once_and_only_while_they_are_kept() -> None:
    x = torch.randn(64, requires_grad=True)

    def forward() -> torch.Tensor:
        hidden = x.exp()  # saved: 256 bytes
        dropped = x.detach().requires_grad_().exp()  # saved for a graph that nobody keeps
        del dropped
        return (hidden.view(8, 8) * hidden.view(8, 8)).sum()  # saved twice, the same storage

    assert parts.saved_bytes(forward, [x]) == 256


def test_extrapolation_is_a_line_through_two_small_batches() -> None:
    asked = []

    def bytes_of(samples: int) -> int:
        asked.append(samples)
        return 1000 + 24 * samples

    assert parts.extrapolated(bytes_of, 500) == 1000 + 24 * 500
    assert max(asked) <= 4
    assert parts.extrapolated(bytes_of, 3) == 1072


def test_the_phases_of_a_list_of_events() -> None:
    names = ("earlier micro-batches", "forward", "backward", "step")
    mark = [(f"fastloop.tune:{name}", 0) for name in names]
    events = [("a", 8), ("b", -8), mark[0], ("c", 100), ("d", 20), ("d", -20), mark[1], ("e", 30), ("f", -100), mark[2],
              ("g", 5), ("h", -35), mark[3]]  # fmt: skip
    ends, peaks = split_by_phase(events)
    assert list(ends.values()) == [0, 100, 30, 0]
    assert list(peaks.values()) == [8, 120, 130, 35]


# ---- peaks


def test_the_peak_of_a_process_is_read(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("VmPeak:\t9 kB\nVmHWM:\t   1234 kB\n")
    assert peaks.peak_rss(status) == 1234 * 1024
    assert (peaks.peak_rss(tmp_path / "none") or 0) > 2**20  # asked for in another way


def test_the_peak_of_a_gpu_is_what_is_reserved_and_what_others_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 40)
    found = peaks.peak(torch.device("cuda"), 7)
    assert (found.bytes, found.capacity) == (40 + 20, 100)


def test_nvml_says_why_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peaks.nvml_bytes(torch.device("cpu"), 1) == (None, "the device is no NVIDIA GPU")

    class Process:
        def __init__(self, pid: int, used: int | None) -> None:
            self.pid, self.usedGpuMemory = pid, used

    class Nvml:
        listed: list[Process] = []

        def nvmlInit(self) -> None:
            pass

        def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Process]:
            return self.listed

    nvml = Nvml()
    monkeypatch.setattr(peaks, "need", lambda *_: nvml)
    monkeypatch.setattr(peaks.nvidia, "locate", lambda *_: ("handle", False, True))
    device = torch.device("cuda:0")
    assert "does not list" in peaks.nvml_bytes(device, 5)[1]
    nvml.listed = [Process(4, 10), Process(5, 20)]
    assert peaks.nvml_bytes(device, 5) == (20, "")
    nvml.listed = [Process(5, None)]
    assert peaks.nvml_bytes(device, 5)[0] is None


# ---- remedies and words

FACTS = {
    "device": "cpu", "batch_size": 32, "samples": 32, "accumulation_steps": 1, "looked": "all alike",
    "precision": "fp32", "optimizer": "fastloop's AdamW", "ours": True, "state_dtype": "None",
    "blocks": 4, "bf16": True,
}  # fmt: skip


def skipped(options: dict[str, Any] | None = None, **facts: Any) -> dict[str, str]:
    return {each.name: each.skip for each in remedies({**FACTS, **facts}, options or {}) if each.skip}


def test_every_remedy_is_tried_where_it_can_be() -> None:
    assert skipped() == {}
    shown = [each.settings(FACTS) for each in remedies(FACTS, {})]
    assert shown[:2] == [
        {"batch_size": 16, "accumulation_steps": 2}, {"batch_size": 8, "accumulation_steps": 4}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "options", "named", "why"),
    [
        ({"batch_size": 7}, {}, {"half", "quarter"}, "equal parts"),
        ({"batch_size": None}, {}, {"half", "quarter"}, "the loader makes its batches"),
        ({"blocks": 0}, {}, {"checkpointing"}, "blocks"),
        ({}, {"activation_checkpointing": 2}, {"checkpointing"}, "already"),
        ({}, {"cuda_graph": True}, {"checkpointing"}, "does not go with cuda_graph"),
        ({"precision": "bf16"}, {}, {"autocast", "weights"}, "already"),
        ({"bf16": False}, {}, {"autocast", "weights"}, "does not compute"),
        ({"ours": False, "optimizer": "torch's AdamW"}, {}, {"weights", "states"}, "fastloop"),
        ({"state_dtype": "torch.bfloat16"}, {}, {"weights", "states"}, "state"),
    ],
)
def test_a_remedy_that_cannot_be_tried_says_why(facts: Any, options: Any, named: set[str], why: str) -> None:
    found = skipped(options, **facts)
    assert len(found) == len(named)
    assert all(any(word in name for word in named) for name in found)
    assert all(why in reason for reason in found.values())


@pytest.mark.parametrize("peak", [100, 21, 5])
def test_rows_add_up_to_the_peak(peak: int) -> None:
    known = dict(zip(memory_words.PARTS, range(1, 7), strict=True))
    rows = memory_words.rows(known, peak)
    assert sum(rows.values()) == peak
    assert rows[memory_words.REST] >= 0 >= rows[memory_words.NOT_AT_ONCE]


@pytest.mark.parametrize(("count", "text"), [(None, "n/a"), (0, "0 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")])
def test_sizes_in_words(count: int | None, text: str) -> None:
    assert memory_words.size(count) == text


# ---- the answer, with trials that are given


class Given:
    """In place of processes: which ones run out of memory."""

    def __init__(self, allocated: dict[str, int], limit: int = 1000) -> None:
        self.allocated, self.limit = allocated, limit

    def run(self, function: str, arguments: dict[str, Any], **_: Any) -> trial.Outcome:
        name = f"{arguments['split']} {arguments['options'].get('precision')} {arguments['state_dtype']}"
        taken = self.allocated.get(name, 2000)
        shape = dict.fromkeys(memory_words.PARTS, 10)
        notes = {"facts": FACTS, "estimate": shape, "estimated_peak": taken}
        if taken > self.limit:
            return trial.Outcome(trial.OUT_OF_MEMORY, notes=notes, reason="too much")
        return trial.Outcome(
            trial.OK, notes=notes,
            result={
                "losses": [1.0, 0.5], "batches": 2, "rates": [100.0], "parts": shape, "allocated": taken,
                "phases": {"ends": {}, "peaks": {}, "peak_phase": "backward"}, "reserved": None, "nvml": None,
                "nvml_reason": "no GPU", "peak": {"bytes": 5000, "capacity": 10000, "what": "given"},
            },
        )  # fmt: skip


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.chdir(tmp_path)

    def run(given: Given) -> Any:
        monkeypatch.setattr(trial, "run", given.run)
        return memory("json:loads", fresh=True)

    return run


def test_nothing_is_recommended_for_being_smaller(on: Any) -> None:
    report = on(Given({"1 None None": 900, "2 None None": 500, "1 bf16 None": 400}))
    assert report.keep
    assert report.best is report.present
    assert (report.loop, report.loader) == ({}, {})
    assert any("400 B less (-44%)" in each and "half" in each for each in report.findings)


def test_where_the_present_does_not_fit_the_least_change_that_does_is(on: Any) -> None:
    report = on(Given({"4 None None": 800, "1 bf16 None": 100}))
    assert report.present.status == "out of memory"
    assert not report.keep
    assert (report.loader, report.loop) == ({"batch_size": 8}, {"accumulation_steps": 4})


def test_a_state_format_is_told_and_not_recommended(on: Any) -> None:
    report = on(Given({"1 None bfloat16": 100}))
    assert report.keep
    assert any("none of the remedies" in each for each in report.findings)


def test_a_broken_target_is_told(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given({})
    monkeypatch.setattr(given, "run", lambda *_, **__: trial.Outcome(trial.TIMEOUT, reason="not done after 60 s"))
    with pytest.raises(TargetError, match="not done"):
        on(given)


# ---- a real process


def test_a_trial_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One only: the budget is spent when the first is done."""
    monkeypatch.chdir(tmp_path)
    report = memory(perceptron, budget=0.5, timeout=120.0, fresh=True)
    assert report.present.status == "ok"
    assert report.present.peak_bytes > 50 * 2**20
    assert report.present.extra["parts"]["states"] == STATES
    assert {t.status for t in report.trials[1:]} == {"skipped"}
    table = parts_table(report)
    assert "activations" in table
    assert "n/a" in table
