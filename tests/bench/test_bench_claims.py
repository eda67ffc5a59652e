# SPDX-License-Identifier: Apache-2.0
"""`claims`: what a scenario computes and checks, without its times; the rows; the command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from fastloop.bench import chargpt, claims, models
from fastloop.bench.checks import WrongResult
from fastloop.bench.claims import (
    Claim,
    Finding,
    Here,
    Verdict,
    activations,
    loading,
    memory_table,
    precision,
    quantized,
    record,
    resnet,
    training,
    training_time,
)
from fastloop.bench.commands import claims as command
from fastloop.bench.measure import Pairs
from fastloop.bench.stats import Interval

HERE = Here(torch.device("cpu"), 0.1)

# Every figure of the guides that says how fast, how large or how busy: (what, the claims that try it).
FIGURES = {
    "cudnn.benchmark 10-20 %": ["cudnn-benchmark"],
    "mixed precision 2-3x": ["amp-speed-fp16", "amp-speed-bf16"],
    "mixed precision, half the memory": ["amp-memory-fp16", "amp-memory-bf16"],
    "checkpointing, half the activations": ["checkpoint-second", "checkpoint-each"],
    "accumulation, less memory and slower": ["accumulation-memory", "accumulation-speed"],
    "4-8 workers": ["workers-waiting", "workers-computing"],
    "pinned memory": ["pin-memory"],
    "quantization 4x smaller": ["int8-size", "int8-size-conv"],
    "quantization 2-4x faster": ["int8-speed"],
    "what fp16 and bf16 hold": ["fp16-limits", "bf16-range"],
    "ResNet-50's memory": ["resnet50-weights", "resnet50-adam", "resnet50-activations-fp32",
                           "resnet50-activations-bf16", "resnet50-total", "resnet50-batch"],
    "training times": ["time-resnet50", "time-vit-base", "time-gpt2", "time-bert-base"],
    "GPU use of 90 %, and below 80 %": ["gpu-utilization", "gpu-starved"],
    "8 A100, 5-10x": ["eight-gpus"],
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let every paired measurement find this ratio; both sides are still run once."""

    def use(value: float) -> None:
        def pairs(here: Here, before: Any, after: Any, wanted: float) -> tuple[Interval, Pairs]:
            before()
            after()
            return Interval(value, value * 0.99, value * 1.01), Pairs((value,), (1.0,), (1, 1), "decided")

        monkeypatch.setattr(Here, "pairs", pairs)

    return use


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "gpu_count", lambda: 0)


# ---- The list


def test_every_figure_has_its_rows() -> None:
    names = [claim.name for claim in claims.CLAIMS]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(name for rows in FIGURES.values() for name in rows)


@pytest.mark.parametrize(("pattern", "found"), [("int8", 3), ("*-fp16", 2), ("cudnn-benchmark", 1), ("nothing", 0)])
def test_a_pattern_selects(pattern: str, found: int) -> None:
    assert len(claims.select(pattern)) == found
    assert len(claims.select(None)) == len(claims.CLAIMS)


def test_what_needs_a_gpu_says_so_and_is_not_tried(no_gpu: None) -> None:
    chosen = [claim for claim in claims.CLAIMS if claim.gpus]
    rows = claims.run(chosen)
    assert {row.finding.verdict for row in rows} == {Verdict.NEEDS}
    assert {row.device for row in rows} == {"needs a GPU", "needs 8 GPUs"}
    assert len(rows) == 7


def _raises(error: Exception) -> Callable[[Here], Finding]:
    def measure(here: Here) -> Finding:
        raise error

    return measure


def planted(*measures: Callable[[Here], Finding]) -> list[Claim]:
    return [Claim(f"planted-{i}", "a test", "1x", measure) for i, measure in enumerate(measures)]


def fine(here: Here) -> Finding:
    return Finding("1.00x", Verdict.HOLDS, interval=Interval(1.0, 0.9, 1.1), ratios=(1.0,))


def test_a_scenario_that_fails_gives_its_reason_and_ends_nothing(no_gpu: None) -> None:
    errors = [RuntimeError("broken"), claims.Unavailable("no such package"), WrongResult("differs")]
    rows = claims.run(planted(*map(_raises, errors), fine))
    assert [row.finding.verdict for row in rows] == [Verdict.ERROR, Verdict.ERROR, Verdict.WRONG, Verdict.HOLDS]
    assert [row.finding.note for row in rows] == ["RuntimeError: broken", "no such package", "differs", ""]


def test_what_works_on_the_cpu_says_so_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "gpu_count", lambda: 1)
    monkeypatch.setattr("fastloop.machine.gpu_model", lambda: "some GPU")
    chosen = [Claim("here", "a test", "1x", fine), Claim("host", "a test", "1x", fine, on_cpu=True)]
    rows = claims.run(chosen)
    assert rows[0].device == "some GPU"
    assert rows[1].device.startswith("CPU, ")
    on_cpu = {claim.name for claim in claims.CLAIMS if claim.on_cpu}
    expected = ("workers-", "resnet50-", "int8-", "fp16-limits", "bf16-range")
    assert on_cpu == {claim.name for claim in claims.CLAIMS if claim.name.startswith(expected)}


def test_a_rate_is_measured_once_whatever_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[float] = []

    def once(here: Here, convolutions: bool) -> Interval:
        measured.append(here.seconds)
        return Interval(1.0, 0.9, 1.1)

    monkeypatch.setattr(training_time, "_rates", {})
    monkeypatch.setattr(training_time, "_measured_rate", once)
    for seconds in (4.0, 3.0, 2.0):
        training_time.rate(Here(torch.device("cpu"), seconds), True)
    assert measured == [4.0]


def test_an_interrupt_is_not_swallowed(no_gpu: None) -> None:
    def interrupted(here: Here) -> Finding:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        claims.run(planted(interrupted))


def test_more_threads_are_kept_only_where_they_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {1: 1.0, 4: 0.5}
    now, threads = [0.0], [4]

    def clock() -> float:
        now[0] += cost[threads[0]]
        return now[0]

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    monkeypatch.setattr(record, "perf_counter", clock)
    assert (record.useful_threads(), threads[0]) == (4, 4)
    cost[4] = 30.0
    assert (record.useful_threads(), threads[0]) == (1, 4)


def test_no_scenario_starts_when_the_time_is_spent(no_gpu: None) -> None:
    ticks: Iterator[int] = count()
    rows = claims.run(planted(fine, fine, fine, fine), budget=4, clock=lambda: float(next(ticks)))
    verdicts = [row.finding.verdict for row in rows]
    assert verdicts == [Verdict.HOLDS, Verdict.HOLDS, Verdict.ERROR, Verdict.ERROR]
    assert rows[-1].finding.note == "no time left of 4 s; `claims -k planted-3` tries it alone"


# ---- Verdicts


@pytest.mark.parametrize(
    ("found", "verdict"),
    [((2.1, 1.9, 2.3), Verdict.HOLDS), ((1.5, 1.2, 1.8), Verdict.PARTLY), ((1.5, 0.9, 2.5), Verdict.FAILS)],
)
def test_a_claim_of_speed(found: tuple[float, float, float], verdict: Verdict) -> None:
    assert record.faster(Interval(*found), 2.0) is verdict


def test_a_claim_of_an_amount_and_one_of_two_halves() -> None:
    assert record.about(9.0, 8.0) is Verdict.HOLDS
    assert record.about(2.7, 8.0) is Verdict.FAILS
    assert record.both(Verdict.HOLDS, Verdict.FAILS) is Verdict.PARTLY
    assert record.both(Verdict.WRONG, Verdict.HOLDS) is Verdict.WRONG
    assert record.both(Verdict.FAILS, Verdict.FAILS) is Verdict.FAILS


# ---- Scenarios


@pytest.mark.parametrize("wait", [True, False])
def test_workers(ratio: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, wait: bool) -> None:
    monkeypatch.setattr(loading, "SAMPLES", 16)
    monkeypatch.setattr(loading, "WORK", 2)
    threads = torch.get_num_threads()
    ratio(1.6)
    assert loading.workers(HERE, wait, 2).verdict is Verdict.HOLDS
    ratio(0.9)
    assert loading.workers(HERE, wait, 2).verdict is Verdict.FAILS
    assert torch.get_num_threads() == threads


def test_a_loader_that_changes_its_batches_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "SAMPLES", 16)
    monkeypatch.setattr(loading.Slow, "__getitem__", lambda self, index: torch.rand(4))
    with pytest.raises(WrongResult, match="no worker"):
        loading.workers(HERE, True, 1)


def test_mixed_precision(ratio: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    small = chargpt.Size(layers=2, width=64, heads=2, context=32, batch=8)
    monkeypatch.setattr(training, "size", lambda here: small)
    monkeypatch.setattr(precision, "WIDE", small)
    ratio(2.4)
    assert precision.speed(HERE, torch.bfloat16).verdict is Verdict.HOLDS
    found = precision.memory(HERE, torch.bfloat16)
    assert found.numbers["activations"] < found.numbers["whole"] < 1
    monkeypatch.setitem(precision.LOSS_ERROR, torch.bfloat16, 0.0)
    with pytest.raises(WrongResult, match="autocast"):
        precision.speed(HERE, torch.bfloat16)


def test_the_formats_are_as_ieee_and_bf16_say() -> None:
    assert precision.fp16_limits(HERE).verdict is Verdict.HOLDS
    assert precision.bf16_range(HERE).verdict is Verdict.HOLDS


@pytest.mark.parametrize(("every", "saved"), [(1, 0.5), (2, 0.3)])
def test_checkpointing(
    ratio: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, every: int, saved: float
) -> None:
    monkeypatch.setattr(activations, "DEEP", chargpt.Size(layers=6, width=64, heads=2, context=64, batch=4))
    ratio(1.3)
    found = activations.checkpointing(HERE, every)
    assert found.numbers["saved"] > saved
    assert "1.30x" in found.note


def test_accumulation(ratio: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "SHALLOW", chargpt.Size(layers=2, width=64, context=32, batch=32))
    ratio(1.2)
    memory, speed = activations.accumulation_memory(HERE), activations.accumulation_speed(HERE)
    assert memory.numbers["share"] < 0.3
    assert (memory.verdict, speed.verdict) == (Verdict.HOLDS, Verdict.HOLDS)
    ratio(0.9)
    assert activations.accumulation_speed(HERE).verdict is Verdict.FAILS


def test_gradients_that_differ_are_a_wrong_result() -> None:
    model = nn.Linear(4, 1)
    x = torch.ones(2, 4)
    activations.same_gradients(model, lambda: model(x).sum().backward(), lambda: model(x).sum().backward(), "here")
    with pytest.raises(WrongResult, match="here"):
        activations.same_gradients(
            model, lambda: model(x).sum().backward(), lambda: model(x * 1.01).sum().backward(), "here"
        )


def test_quantization(ratio: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantized.size_linear(HERE).verdict is Verdict.HOLDS
    conv = quantized.size_resnet(HERE)
    assert conv.verdict is Verdict.FAILS
    assert conv.numbers["ratio"] < 1.2
    ratio(2.5)
    assert quantized.speed(HERE).verdict is Verdict.HOLDS
    monkeypatch.setattr(quantized, "OUTPUT_ERROR", 1e-6)
    with pytest.raises(WrongResult, match="quantized"):
        quantized.size_linear(HERE)


def test_a_torch_without_quantization_is_a_reason(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    monkeypatch.delattr("torch.ao.quantization.quantize_dynamic")
    (row,) = claims.run(claims.select("int8-size-conv"))
    assert row.finding.verdict is Verdict.ERROR
    assert "quantize_dynamic" in row.finding.note


# ---- ResNet-50 and the tables


def test_resnet50_has_the_shapes_of_its_paper() -> None:
    with torch.device("meta"):
        model = resnet.ResNet50()
        assert model(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sorted(tuple(p.shape) for p in model.parameters()) == sorted(models.resnet50())


def _by_formula(batch: int, side: int) -> int:
    """Bytes that a forward in fp32 keeps: what each convolution and each BatchNorm reads; the ReLUs are in place."""
    side //= 2
    elements, normalized = 2 * 64 * side**2, 64  # read by the first BatchNorm, and by the pooling
    side //= 2
    elements += 3 * 64 * side**2  # the pooling's result, and its indices of 8 bytes
    channels = 64
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True)):
        for block in range(blocks):
            inner, outputs = side // (2 if stage > 0 and block == 0 else 1), 4 * width
            wide = 2 if block == 0 else 1  # with the projection
            elements += 2 * width * side**2 + 2 * width * inner**2  # the first two, before and after their ReLU
            elements += (wide + 1) * outputs * inner**2  # the third and the projection; the block's result
            normalized += 2 * width + wide * outputs
            side, channels = inner, outputs
    elements += channels + 1000  # read by the head; the loss's softmax
    return 4 * (batch * elements + 2 * normalized + 1)  # each BatchNorm's mean and deviation; the loss's weight


def test_activations_are_those_of_the_formula() -> None:
    found = memory_table.activations("fp32", batch=2, side=64)
    assert found == _by_formula(2, 64)
    half = memory_table.activations("bf16", batch=2, side=64) - memory_table.COPIES
    assert 0.49 < half / found < 0.55


def test_the_memory_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        memory_table, "_activations", {"fp32": 2_700_000_000, "bf16": 1_350_000_000 + memory_table.COPIES}.__getitem__
    )
    assert memory_table.weights(HERE).verdict is Verdict.HOLDS
    assert memory_table.adam(HERE).verdict is Verdict.HOLDS
    assert memory_table.saved(HERE, "fp32").verdict is Verdict.FAILS
    assert memory_table.batch_growth(HERE).numbers["x"] == pytest.approx(2.0, rel=0.03)
    total = memory_table.total(HERE)
    assert total.numbers["fp32"] == pytest.approx(2.7e9 + 16 * memory_table.PARAMETERS, rel=1e-3)


def test_flop_formulas_agree_with_torchs_count() -> None:
    with torch.device("meta"):
        block, x = chargpt.Block(chargpt.Size(width=768, heads=12)), torch.empty(1, 256, 768, requires_grad=True)
    found = training_time.counted(lambda: block(x).sum().backward())
    # torch counts the flash backward's recomputed product as well: 7 products of attention, not 6.
    assert found == pytest.approx(training_time.transformer_flops(1, 768, 256), rel=0.05)
    assert training_time.resnet_flops() == pytest.approx(3 * 2 * 4.09e9, rel=0.02)  # of its paper, forward: 4.1e9 pairs


@pytest.mark.parametrize(("name", "verdict"), [("resnet50", Verdict.PROJECTED), ("vit-base", Verdict.FAILS)])
def test_projections(monkeypatch: pytest.MonkeyPatch, name: str, verdict: Verdict) -> None:
    monkeypatch.setattr(training_time, "rate", lambda here, convolutions: Interval(1e11, 0.9e11, 1.1e11))
    (of,) = [each for each in training_time.TABLE if each.name == name]
    found = training_time.project(HERE, of)
    assert found.verdict is verdict
    assert found.measured.startswith("projected: ")
    assert found.numbers["seconds here"] == pytest.approx(of.samples * of.epochs * of.flops() / 1e11)


@pytest.mark.parametrize(("seconds", "words"), [(90, "1.5 minutes"), (7200, "2 hours"), (86400 * 3, "3 days"),
                                                (86400 * 730, "2 years")])  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert training_time.duration(seconds) == words


# ---- The command


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    args = parser.parse_args(["claims", *arguments])
    return int(args.run(Console(width=150), args))


def test_the_command_prints_and_writes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "claims.json"
    assert run_command("-k", "*-limits", "--json", str(path)) == 0
    shown = capsys.readouterr().out
    assert "fp16-limits" in shown
    assert "1 claims in" in shown
    written = json.loads(path.read_text())
    assert [row["name"] for row in written["rows"]] == ["fp16-limits"]
    assert written["rows"][0]["verdict"] == "holds"
    assert {"torch", "cpu", "commit", "threads"} <= set(written["environment"])


def test_wrong_use(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run_command("-k", "nothing") == 2
    assert "no claim matches 'nothing'; claims: workers-waiting" in capsys.readouterr().err
    assert run_command("-k", "*-limits", "--json", str(tmp_path / "no" / "x.json")) == 2
    assert "there is no folder" in capsys.readouterr().err
    for budget in ("0", "soon", "nan"):
        with pytest.raises(SystemExit):
            run_command("--budget", budget)


def test_a_wrong_result_is_the_commands_exit_code(monkeypatch: pytest.MonkeyPatch, no_gpu: None) -> None:
    monkeypatch.setattr(claims, "CLAIMS", tuple(planted(_raises(WrongResult("differs")))))
    assert run_command() == 3
    monkeypatch.setattr(claims, "CLAIMS", tuple(planted(_raises(RuntimeError("broken")), fine)))
    assert run_command() == 0
