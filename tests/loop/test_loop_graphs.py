# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of CUDA graphs, without a GPU: a stand-in records the window and replays it by calling it again.

What a window computes on its static buffers must be what it computes on its own batches, and everything around it must
not notice: schedules, short windows, odd shapes, skipped windows, checkpoints. test_loop_gpu.py has the real graphs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import batches, cross_entropy, network
from torch import Tensor, nn

import fastloop
from fastloop.loop import graphs
from fastloop.loop.graphs import WARM_UP, CudaGraph


class Recorded:
    """Stands for CudaGraph: a capture runs nothing, a replay everything."""

    made: list[Recorded] = []

    def __init__(self, device: torch.device) -> None:
        self.replays = 0
        self.made.append(self)

    def capture(self, function: Callable[[], Any]) -> None:
        self.function = function

    def replay(self) -> Any:
        self.replays += 1
        return self.function()


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    monkeypatch.setattr(graphs, "CudaGraph", Recorded)
    monkeypatch.setattr(graphs, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "on_side_stream", lambda device: nullcontext())
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fastloop.AdamW": lambda params: fastloop.AdamW(params, lr=0.05, weight_decay=0.1),
    "fastloop.SGD": lambda params: fastloop.SGD(params, lr=0.05, momentum=0.9),
    # Its learning rate is float32 on the device: a power of two is the same there.
    "torch.AdamW": lambda params: torch.optim.AdamW(params, lr=2.0**-5, weight_decay=0.1, fused=True),
}
# Full windows, then one batch of another size, full ones again, and an end that fills no window.
SIZES = [4] * 13 + [2] + [4] * 8 + [3]


def halving(step: int) -> float:
    return 0.5 ** (step // 3)


def with_metrics(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    output = model(batch[0])
    loss = nn.functional.cross_entropy(output, batch[1])
    return loss, {"right": (output.argmax(1) == batch[1]).double().mean()}, 2.0 * len(batch[1])


def loop_of(make: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["fastloop.AdamW"], **options: Any) -> Any:
    model = options.pop("model", None) or network()
    loss_fn = options.pop("loss_fn", cross_entropy)
    settings = {"log_every": 1, "progress": False, "curves": False, **options}
    return fastloop.Loop(model, make(model.parameters()), loss_fn, **settings)


MACHINE = ("lr", "grad_norm", "train/loss", "train/right", "val/loss")


def outcome(loop: fastloop.Loop) -> Any:
    """Weights, states and the whole history: what must not depend on graphs."""
    state = loop.optimizer.state_dict()["state"]
    return (
        [p.detach().tolist() for p in loop.model.parameters()],
        [{key: torch.as_tensor(value).tolist() for key, value in s.items()} for s in state.values()],
        {name: loop.history[name] for name in MACHINE if name in loop.history},
        loop.global_step,
        loop._reporter.ledger.skipped,
    )


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_replayed_windows_train_as_eager_ones(optimizer: str, accumulation: int, recorded: list[Recorded]) -> None:
    options = {"accumulation_steps": accumulation, "max_grad_norm": 0.5, "schedule": halving}
    done = []
    for cuda_graph in (False, True):
        loop = loop_of(OPTIMIZERS[optimizer], cuda_graph=cuda_graph, **options)
        loop.fit(batches(SIZES), batches([4, 4]), epochs=2)
        done.append(outcome(loop))
    assert done[0] == done[1]
    full = [SIZES[i : i + accumulation] for i in range(0, len(SIZES), accumulation)] * 2
    assert [graph.replays for graph in recorded] == [full.count([4] * accumulation) - WARM_UP]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "bf16-pure"])
def test_every_precision(precision: str, recorded: list[Recorded]) -> None:
    done = []
    for cuda_graph in (False, True):
        loop = loop_of(cuda_graph=cuda_graph, precision=precision, accumulation_steps=2, schedule=halving)
        loop.fit(batches([4] * 20), epochs=1)
        done.append((outcome(loop), None if loop._update.scaler is None else loop._update.scaler.state_dict()))
    assert done[0] == done[1]
    assert recorded[0].replays == 10 - WARM_UP


@pytest.mark.parametrize("loss_fn", [with_metrics, nn.CrossEntropyLoss()], ids=["metrics", "criterion"])
def test_metrics_and_weights(loss_fn: Any, recorded: list[Recorded]) -> None:
    done = []
    for cuda_graph in (False, True):
        loop = loop_of(cuda_graph=cuda_graph, loss_fn=loss_fn, accumulation_steps=2)
        loop.fit(batches([4] * 16), max_steps=7)
        loop.fit(batches([4] * 16), max_steps=14)  # captures anew, with the metrics of the run before
        done.append(outcome(loop))
    assert done[0] == done[1]
    assert len(recorded) == 2


def test_random_numbers_are_drawn_in_the_same_order(recorded: list[Recorded]) -> None:
    done = []
    for cuda_graph in (False, True):
        model = nn.Sequential(network(), nn.Dropout(0.5))
        loop = loop_of(model=model, cuda_graph=cuda_graph, seed=0)
        loop.fit(torch.utils.data.DataLoader(batches([4] * 9), batch_size=None, shuffle=True), epochs=2)
        done.append(outcome(loop))
    assert done[0] == done[1]
    assert recorded[0].replays == 18 - WARM_UP


def test_a_window_that_is_not_finite_is_skipped_in_a_replay(recorded: list[Recorded]) -> None:
    data = batches([4] * 12)
    data[8][0][1, 2] = torch.nan
    done = []
    for cuda_graph in (False, True):
        loop = loop_of(cuda_graph=cuda_graph)
        loop.fit(data, epochs=1)
        done.append(repr(outcome(loop)))  # NaN is not equal to itself
        assert loop._reporter.ledger.skipped == 1
    assert done[0] == done[1]
    assert recorded[0].replays == 12 - WARM_UP


@pytest.mark.parametrize("first", [False, True], ids=["eager first", "a graph first"])
def test_resume(first: bool, tmp_path: Path, recorded: list[Recorded]) -> None:
    data = batches(SIZES)

    def trained(folder: str, cuda_graph: bool, max_steps: int | None = None) -> Any:
        loop = loop_of(
            cuda_graph=cuda_graph, run_dir=tmp_path / folder, save_every_steps=5, accumulation_steps=2,
            schedule=halving, loggers=(),
        )  # fmt: skip
        loop.fit(data, epochs=2, max_steps=max_steps)
        return outcome(loop)

    whole = trained("whole", False)
    trained("parts", first, 8)
    assert trained("parts", True) == whole
    assert sum(graph.replays for graph in recorded) > 0


def test_a_load_captures_anew(tmp_path: Path, recorded: list[Recorded]) -> None:
    loop = loop_of(cuda_graph=True, run_dir=tmp_path)
    loop.fit(batches([4] * 6), epochs=1)
    kept = outcome(loop)
    loop.fit(batches([4] * 6), epochs=2)
    loop.load("epoch-000001" if (tmp_path / "checkpoints" / "epoch-000001").exists() else "step-000000006")
    assert loop._graphs._graph is None
    assert outcome(loop)[:2] == kept[:2]


def test_the_graph_reads_buffers_of_its_own(recorded: list[Recorded]) -> None:
    seen: list[int] = []

    def watched(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        seen.append(batch[0].data_ptr())
        return cross_entropy(model, batch)

    data = batches([4] * 10)
    loop_of(cuda_graph=True, loss_fn=watched, accumulation_steps=2).fit(data * 2, epochs=1)
    assert seen[: 2 * WARM_UP] == [batch[0].data_ptr() for batch in data[: 2 * WARM_UP]]
    assert set(seen[2 * WARM_UP :]) == set(seen[2 * WARM_UP : 2 * WARM_UP + 2])
    assert len(set(seen[2 * WARM_UP :])) == 2


def test_a_setting_that_changes_is_captured_anew(recorded: list[Recorded]) -> None:
    class Decay:
        def on_window(self, loop: fastloop.Loop, record: Any) -> None:
            if record.step == 8:
                loop.optimizer.param_groups[0]["weight_decay"] = 0.5

    done = []
    for cuda_graph in (False, True):
        loop = loop_of(cuda_graph=cuda_graph, callbacks=[Decay()])
        loop.fit(batches([4] * 16), epochs=1)
        done.append(outcome(loop))
    assert done[0] == done[1]
    assert [graph.replays for graph in recorded] == [8 - WARM_UP, 8 - WARM_UP]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_states_that_a_callback_loads_are_captured_anew(optimizer: str, recorded: list[Recorded]) -> None:
    class Load:
        def on_window(self, loop: fastloop.Loop, record: Any) -> None:
            if record.step == 8:
                loop.optimizer.load_state_dict(copy.deepcopy(loop.optimizer.state_dict()))

    done = []
    for cuda_graph in (False, True):
        loop = loop_of(OPTIMIZERS[optimizer], cuda_graph=cuda_graph, callbacks=[Load()])
        loop.fit(batches([4] * 16), epochs=1)
        done.append(outcome(loop))
    assert done[0] == done[1]
    assert [graph.replays for graph in recorded] == [8 - WARM_UP, 8 - WARM_UP]


def test_a_state_dict_leaves_the_states_as_they_are() -> None:
    """A graph has the address of a momentum buffer, also where each step so far was skipped."""
    p = nn.Parameter(torch.ones(3))
    optimizer = fastloop.SGD([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer._device_counts = {id(p): torch.zeros((), dtype=torch.int64)}  # as a device would count
    assert "momentum_buffer" not in optimizer.state_dict()["state"][0]
    assert "momentum_buffer" in optimizer.state[p]


def test_no_capture_before_torch_has_its_momentum(recorded: list[Recorded]) -> None:
    data = batches([4] * 14)
    for x, _ in data[:5]:
        x[0, 0] = torch.nan
    done = []
    for cuda_graph in (False, True):
        loop = loop_of(
            lambda params: torch.optim.SGD(params, lr=2.0**-5, momentum=0.5, fused=True), cuda_graph=cuda_graph
        )
        loop.fit(data, epochs=1)
        done.append(repr(outcome(loop)))
    assert done[0] == done[1]
    assert [graph.replays for graph in recorded] == [14 - 5 - WARM_UP]


def test_settings_that_change_in_each_window_end_the_captures(
    recorded: list[Recorded], caplog: pytest.LogCaptureFixture
) -> None:
    class Betas:
        def on_window(self, loop: fastloop.Loop, record: Any) -> None:
            loop.optimizer.param_groups[0]["betas"] = (0.9 - 1e-3 * record.step, 0.99)

    done = []
    for cuda_graph in (False, True):
        loop = loop_of(cuda_graph=cuda_graph, callbacks=[Betas()])
        with caplog.at_level(logging.WARNING, "fastloop.loop"):
            loop.fit(batches([4] * 110), epochs=1)
        done.append(outcome(loop))
    assert done[0] == done[1]
    assert len(recorded) == graphs.WASTED
    assert [r.message.partition(",")[0] for r in caplog.records] == [
        "cuda_graph=True: settings of the optimizer change every few windows"
    ]


def test_after_a_run_nothing_of_the_graph_is_left(recorded: list[Recorded]) -> None:
    loop = loop_of(cuda_graph=True)
    loop.fit(batches([4] * 10), epochs=1)
    held = loop._graphs
    assert (held._graph, held._batches, held._rates, held._states, held._plan) == (None, [], [], [], None)
    assert held.replays == 10 - WARM_UP


def test_master_weights_follow_before_a_replay(recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    replay = Recorded.replay

    def watched(self: Recorded) -> Any:
        moved.append(loop.optimizer._masters_moved())  # what a replay would not notice
        return replay(self)

    class Halve:
        def on_window(self, loop: fastloop.Loop, record: Any) -> None:
            if record.step == 8:
                with torch.no_grad():
                    next(loop.model.parameters()).mul_(0.5)

    monkeypatch.setattr(Recorded, "replay", watched)
    loop = loop_of(cuda_graph=True, precision="bf16-pure", callbacks=[Halve()])
    loop.fit(batches([4] * 12), epochs=1)
    assert moved == [False] * (12 - WARM_UP)


def test_a_capture_that_fails_sets_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", found.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **options: nullcontext())
    monkeypatch.setattr(graphs, "_side_stream", lambda device: None)

    def fails() -> None:
        raise RuntimeError("not permitted")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaGraph(torch.device("cpu")).capture(fails)
    assert found == ["before"]


@pytest.mark.parametrize("through", ["a checkpoint", "a state_dict"])
def test_capturable_stays_that_of_the_run(through: str, tmp_path: Path) -> None:
    captured, plain = loop_of(), loop_of()
    captured.fit(batches([4] * 2), epochs=1)
    captured.optimizer.param_groups[0]["capturable"] = True  # as a loop with graphs sets it
    if through == "a checkpoint":
        plain.load(captured.save(tmp_path / "saved"))
    else:
        plain.load_state_dict(captured.state_dict())
    assert plain.optimizer.param_groups[0]["capturable"] is False
    assert outcome(plain)[0] == outcome(captured)[0]


def test_a_learning_rate_of_ones_own_on_the_device(recorded: list[Recorded]) -> None:
    done = []
    for cuda_graph in (False, True):
        loop = loop_of(
            lambda params: fastloop.AdamW(params, lr=torch.tensor(0.05)), cuda_graph=cuda_graph, schedule=halving
        )
        loop.fit(batches([4] * 12), epochs=1)
        done.append(outcome(loop))
    assert done[0] == done[1]
    assert recorded[0].replays == 12 - WARM_UP


def test_shapes_that_never_repeat_are_warned_about(
    recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "WATCHED", 10)
    with caplog.at_level(logging.WARNING, "fastloop.loop"):
        loop_of(cuda_graph=True).fit(batches(list(range(1, 13))), epochs=1)
    assert caplog.text.count("only 0 of 10 windows were replayed") == 1
    assert not recorded


def test_texts_in_a_batch_belong_to_its_shape(recorded: list[Recorded]) -> None:
    data = [{"x": x, "y": y, "name": "same" if i < 8 else f"{i}"} for i, (x, y) in enumerate(batches([4] * 12))]
    loop_of(cuda_graph=True, loss_fn=lambda model, batch: cross_entropy(model, (batch["x"], batch["y"]))).fit(
        data, epochs=1
    )
    assert recorded[0].replays == 8 - WARM_UP


def test_a_window_that_cannot_be_captured_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(self: Recorded, function: Callable[[], Any]) -> None:
        function()
        try:
            raise RuntimeError("operation not permitted when stream is capturing")
        finally:  # as the end of the capture does
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(Recorded, "capture", refuses)
    loop = loop_of(cuda_graph=True, run_dir=tmp_path)
    with pytest.raises(RuntimeError, match=r"cannot be captured \(operation not permitted.*\.item\(\).*new process"):
        loop.fit(batches([4] * 8), epochs=1)
    assert loop.global_step == WARM_UP
    assert all(p.grad is None for p in loop.model.parameters())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "auto_microbatch": ({"auto_microbatch": True}, "auto_microbatch=True would split"),
    "activation_checkpointing": ({"activation_checkpointing": ["0"]}, "read random states"),
    "an optimizer of torch": (
        {"make": lambda params: torch.optim.AdamW(params)}, "AdamW as it is does not.*fused=True"
    ),
    "one that waits": ({"make": lambda params: fastloop.AdamW(params, error_if_nonfinite=True)}, "error_if_nonfinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_what_a_graph_cannot_hold(case: tuple[dict[str, Any], str]) -> None:
    options, message = case
    with pytest.raises(ValueError, match=message):
        loop_of(cuda_graph=True, **options)


def test_a_cpu_has_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device, got cpu"):
        loop_of(cuda_graph=True, device="cpu")


def test_a_loop_of_ones_own_has_no_graphs() -> None:
    with pytest.raises(ValueError, match=r"needs fit\(\)"):
        loop_of(cuda_graph=True).windows(batches([4]), epochs=1)
