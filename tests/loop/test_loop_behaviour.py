# SPDX-License-Identifier: Apache-2.0
"""What a Loop does around its steps, and what it says to those who use it wrongly."""

from __future__ import annotations

import functools
import gc
import logging
import math
import random
import signal
import weakref
from typing import Any

import numpy
import pytest
import torch
from by_hand import OPTIMIZERS, batches, cross_entropy, network
from support import bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop import Loop, schedules
from fastloop.loop.options import EVENTS

DATA = batches([4] * 6)


def looped(loss_fn: Any = cross_entropy, model: nn.Module | None = None, **options: Any) -> Loop:
    model = network() if model is None else model
    return Loop(model, fastloop.AdamW(model.parameters(), lr=0.05), loss_fn, **options)


def weights(model: nn.Module) -> list[Any]:
    return [bits(p) for p in model.parameters()]


def train(loop: Loop, window: Any) -> None:
    for batch in window:
        loop.backward(cross_entropy(loop.model, batch))


# ---- windows used wrongly


def over_windows(loop: Loop, body: Any) -> None:
    for window in loop.windows(DATA, epochs=1):
        body(window)


def test_step_outside_of_a_window_and_twice() -> None:
    loop = looped()
    with pytest.raises(RuntimeError, match=r"step\(\) outside of a window, or called twice"):
        loop.step()

    def twice(window: Any) -> None:
        train(loop, window)
        loop.step()
        loop.step()

    with pytest.raises(RuntimeError, match=r"called twice"):
        over_windows(loop, twice)


def test_a_window_left_without_step() -> None:
    loop = looped()
    with pytest.raises(RuntimeError, match=r"left without loop\.step\(\); call it once"):
        over_windows(loop, lambda window: train(loop, window))


@pytest.mark.parametrize("consumed", [0, 1])
def test_step_before_the_last_micro_batch(consumed: int) -> None:
    loop = looped(accumulation_steps=2)

    def early(window: Any) -> None:
        for batch in window if consumed else ():
            loop.backward(cross_entropy(loop.model, batch))
            break
        loop.step()

    with pytest.raises(RuntimeError, match=r"step\(\) before the window's last micro-batch; iterate over the whole"):
        over_windows(loop, early)


def test_step_without_backward() -> None:
    loop = looped()

    def idle(window: Any) -> None:
        for _ in window:
            pass
        loop.step()

    with pytest.raises(RuntimeError, match=r"calling loop\.backward\(loss\) for each batch"):
        over_windows(loop, idle)


def test_backward_twice_and_outside() -> None:
    loop = looped()
    with pytest.raises(RuntimeError, match=r"backward\(\) is called once for each batch of a window; add up"):
        loop.backward(torch.ones((), requires_grad=True))

    def twice(window: Any) -> None:
        for batch in window:
            loop.backward(cross_entropy(loop.model, batch))
            loop.backward(cross_entropy(loop.model, batch))

    with pytest.raises(RuntimeError, match=r"called once for each batch"):
        over_windows(loop, twice)


def test_a_window_is_iterated_over_once() -> None:
    loop = looped()

    def twice(window: Any) -> None:
        train(loop, window)
        train(loop, window)

    with pytest.raises(RuntimeError, match=r"iterated over once"):
        over_windows(loop, twice)


@pytest.mark.parametrize(
    ("loss_of", "reduction", "text"),
    [
        (lambda model, batch: model(batch[0]), "mean", r"the loss must be a scalar, got shape \(4, 3\); take its mean"),
        (cross_entropy, "max", 'reduction must be "mean" or "sum", got \'max\''),
    ],
)
def test_backward_of_what_is_no_mean_or_sum(loss_of: Any, reduction: str, text: str) -> None:
    loop = looped()

    def wrong(window: Any) -> None:
        for batch in window:
            loop.backward(loss_of(loop.model, batch), reduction=reduction)

    with pytest.raises(ValueError, match=text):
        over_windows(loop, wrong)


@pytest.mark.parametrize("weight", [-1, math.nan, torch.tensor(-2)])
def test_a_weight_below_zero(weight: Any) -> None:
    loop = looped(lambda model, batch: (cross_entropy(model, batch), {}, weight))
    with pytest.raises(ValueError, match=r"the weight must be at least 0, got (-1|-2|nan)"):
        loop.fit(DATA, epochs=1)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "torch.AdamW"])
def test_an_optimizer_of_another_model(optimizer: str, precision: str) -> None:
    """Which would train nothing and look well."""
    loop = Loop(network(), OPTIMIZERS[optimizer](network().parameters()), cross_entropy, precision=precision)
    with pytest.raises(RuntimeError, match=r"reach no parameter of the optimizer; make it with the parameters"):
        loop.fit(DATA, epochs=1)


def test_batches_may_be_anything() -> None:
    seen: list[Any] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return cross_entropy(model, DATA[0])

    items = [None, 3, "text", {"x": None}, [DATA[0][0], "y"]]
    looped(loss_fn, accumulation_steps=2).fit(items, epochs=1)
    assert all(a is b for a, b in zip(seen, items, strict=True))


def test_a_batch_may_be_left_out() -> None:
    """One process needs no backward for each micro-batch: the window is that of the others."""
    models = []
    for drop in (True, False):
        loop = looped(accumulation_steps=3)
        data = DATA[:3] if drop else DATA[:2]
        for window in loop.windows(data, epochs=1):
            for i, batch in enumerate(window):
                if i < 2:
                    loop.backward(cross_entropy(loop.model, batch))
            loop.step()
        models.append(weights(loop.model))
    assert models[0] == models[1]


@pytest.mark.parametrize(
    ("second", "text"),
    [({}, r"got \[\] after \['a'\]"), ({"b": 1.0}, r"got \['b'\] after \['a'\]"),
     ({"a": 1.0, "b": 2.0}, r"got \['a', 'b'\] after \['a'\]")],
)  # fmt: skip
@pytest.mark.parametrize("accumulation", [1, 2])
def test_metrics_are_the_same_for_every_batch(second: Any, text: str, accumulation: int) -> None:
    """What came for the second would be taken for another number: the gradient norm, say."""
    metrics = iter([{"a": 1.0}, second])
    loop = looped(lambda model, batch: (cross_entropy(model, batch), next(metrics)), accumulation_steps=accumulation)
    with pytest.raises(ValueError, match=f"metrics must have the same names for every batch, {text}; return all"):
        loop.fit(DATA, epochs=1)


def test_a_metric_that_is_named_loss() -> None:
    """It would be added to the loss in the log."""
    with pytest.raises(ValueError, match=r'a metric is named "loss"'):
        looped(lambda model, batch: (cross_entropy(model, batch), {"loss": 1.0})).fit(DATA, epochs=1)


def test_metrics_in_another_order() -> None:
    given = iter([{"a": 1.0, "b": torch.tensor(3.0)}, {"b": 5.0, "a": 2}] * 3)
    loop = looped(lambda model, batch: (cross_entropy(model, batch), next(given)), log_every=2)
    history = loop.fit(DATA, epochs=1)
    assert [v for _, v in history["train/a"]] == [1.5] * 3
    assert [v for _, v in history["train/b"]] == [4.0] * 3


# ---- the run's length, and going on


def test_a_run_needs_an_end() -> None:
    for start in (looped().windows, looped().fit):
        with pytest.raises(ValueError, match=r"how long[?] pass epochs= or max_steps="):
            start(DATA)
    for length in ({"epochs": -1}, {"epochs": 1.5}, {"max_steps": True}):
        with pytest.raises(ValueError, match=r"must be an integer of at least 0"):
            looped().fit(DATA, **length)  # type: ignore[arg-type]


def test_a_loader_without_batches() -> None:
    with pytest.raises(ValueError, match=r"epoch 0: the loader gave no batch"):
        looped().fit([], epochs=1)
    with pytest.raises(ValueError, match=r"epoch 1: the loader gave no batch"):  # an iterator is used up
        looped().fit(iter(DATA), epochs=2)


def test_leaving_a_loop_and_coming_back_goes_on_behind_the_last_step() -> None:
    """Also out of the middle of a window, whose gradients are not those of the next."""
    loop, whole = looped(), looped()
    whole.fit(DATA, epochs=1)
    for window in loop.windows(DATA, epochs=1):
        train(loop, window)
        loop.step()
        if loop.global_step == 2:
            break
    for window in loop.windows(DATA, epochs=1):
        train(loop, window)
        break
    loop.fit(DATA, epochs=1)
    assert loop.global_step == 6
    assert loop.epoch == 1
    assert weights(loop.model) == weights(whole.model)


def test_gradients_from_before_do_not_count() -> None:
    loop, other = looped(), looped()
    cross_entropy(loop.model, DATA[3]).backward()
    for each in (loop, other):
        each.fit(DATA, epochs=1)
    assert weights(loop.model) == weights(other.model)


def test_fit_in_parts_is_fit_at_once() -> None:
    data = DataLoader(TensorDataset(torch.cat([x for x, _ in DATA]), torch.cat([y for _, y in DATA])), 4, shuffle=True)
    models = []
    for lengths in ([{"epochs": 3}], [{"max_steps": 4}, {"epochs": 1}, {"max_steps": 11}, {"epochs": 3}]):
        torch.manual_seed(0)
        loop = looped(seed=0)
        for length in lengths:
            loop.fit(data, **length)
        assert (loop.global_step, loop.epoch) == (18, 3)
        models.append(weights(loop.model))
    assert models[0] == models[1]


def test_signals_and_garbage_collection_are_as_before() -> None:
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    inside = []

    class Look:
        def on_window(self, loop: Loop, record: Any) -> None:
            inside.append((gc.isenabled(), signal.getsignal(signal.SIGTERM) == handlers[0]))

    class Broken:
        def on_window(self, loop: Loop, record: Any) -> None:
            raise ZeroDivisionError

    looped(callbacks=[Look()]).fit(DATA, epochs=1)
    with pytest.raises(ZeroDivisionError):
        looped(callbacks=[Broken()]).fit(DATA, epochs=1)
    assert inside == [(False, False)] * 6
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == handlers


def test_a_loss_is_not_kept_with_its_graph() -> None:
    """transformers#6999 added up losses that held their graphs."""
    kept: list[Any] = []

    class Token:
        pass

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.token = Token()
            kept.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss = Through.apply(cross_entropy(model, batch))
        return loss, {"again": loss}

    alive = []

    class Look:
        def on_window(self, loop: Loop, record: Any) -> None:
            alive.append(sum(ref() is not None for ref in kept[:-2]))

    looped(loss_fn, accumulation_steps=2, callbacks=[Look()]).fit(DATA * 3, epochs=1)
    assert len(kept) == 18
    assert alive == [0] * 9


# ---- objects and options used wrongly


def test_lbfgs_needs_a_closure() -> None:
    model = network()
    with pytest.raises(TypeError, match=r"LBFGS.step needs a closure that evaluates the model several times"):
        Loop(model, torch.optim.LBFGS(model.parameters()))


def test_data_parallel() -> None:
    model = network()
    with pytest.raises(RuntimeError, match=r'DataParallel.*pass model.module and strategy="ddp".*torchrun'):
        Loop(nn.DataParallel(model), fastloop.AdamW(model.parameters()))


def test_what_is_no_model_optimizer_or_loss_fn() -> None:
    model = network()
    optimizer = fastloop.AdamW(model.parameters())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        Loop(cross_entropy, optimizer)  # type: ignore[arg-type]
    for wrong in (None, [optimizer], model):
        with pytest.raises(TypeError, match=r"optimizer must be one torch.optim.Optimizer, got"):
            Loop(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"loss_fn must be a function"):
        Loop(model, optimizer, "mse")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"accumulation_steps": 0}, "accumulation_steps must be an integer above 0"),
        ({"accumulation_steps": 2.0}, "accumulation_steps must be an integer above 0"),
        ({"log_every": 0}, "log_every must be an integer above 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be a number above 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be a number above 0"),
        ({"max_grad_value": -1.0}, "max_grad_value must be a number above 0"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"strategy": "dp"}, "strategy must be one of"),
        ({"save_every_steps": 5}, "saving and resuming need a folder; pass run_dir="),
        ({"save_every_minutes": 5}, "saving and resuming need a folder; pass run_dir="),
        ({"resume": "best"}, "saving and resuming need a folder; pass run_dir="),
        ({"keep_last": 0}, "keep_last must be an integer of at least 1, got 0"),
        ({"keep_best": -1}, "keep_best must be an integer of at least 0"),
        ({"patience": 0}, "patience must be at least 1"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"compile": "yes"}, "compile must be True or False, got 'yes'"),
        ({"channels_last": 1}, "channels_last must be True or False"),
        ({"progress": "bar"}, "progress must be True, False or None"),
        ({"loggers": ("wand",)}, "a logger must be one of"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"schedule": 0.1}, "schedule must be a name, a schedule of fastloop.schedules"),
        ({"schedule": schedules.cosine}, r"what makes a schedule; pass fastloop.schedules.cosine\(\.\.\.\)"),
        ({"schedule": torch.optim.lr_scheduler.StepLR}, r"is the class StepLR; pass StepLR\(optimizer"),
        ({"activation_checkpointing": True}, "activation_checkpointing must be names or a number, got True"),
        ({"activation_checkpointing": ["block.*"]}, "no layer is named 'block.*'"),
        ({"activation_checkpointing": 0}, "activation_checkpointing must be at least 1"),
        ({"activation_checkpointing": 9}, "the model has no ModuleList or Sequential of that many"),
        ({"callbacks": [object()]}, "must have methods among on_fit_start"),
        ({"cuda_graph": True}, "cuda_graph=True needs a CUDA device"),
    ],
)
def test_options(option: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=text):
        looped(**option)


def test_unknown_options_are_python_errors() -> None:
    with pytest.raises(TypeError, match=r"acumulation_steps"):
        looped(acumulation_steps=2)


def test_a_callback_with_a_misspelt_event() -> None:
    class Misspelt:
        def on_step(self, loop: Loop) -> None: ...

    with pytest.raises(TypeError, match=r"callback Misspelt must have methods among .*, got on_step"):
        looped(callbacks=[Misspelt()])


def test_a_schedule_that_gives_no_number() -> None:
    with pytest.raises(TypeError, match=r"schedule must give a number for window 0, got None; pass a function"):
        looped(schedule=lambda step: None).fit(DATA, epochs=1)


def test_a_scheduler_of_another_optimizer() -> None:
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"a torch scheduler of another optimizer"):
        looped(schedule=torch.optim.lr_scheduler.StepLR(other, 2))


def test_a_schedule_without_a_length() -> None:
    with pytest.raises(ValueError, match=r"total_steps must be known.*pass total_steps= to the schedule or max_steps="):
        looped(schedule="cosine").fit((batch for batch in DATA), epochs=1)


# ---- clipping given in two places


@pytest.mark.parametrize("name", ["max_grad_norm", "max_grad_value"])
def test_two_bounds_that_differ(name: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=rf"{name}=0.5 here and \[1.0\] in the optimizer; give it in one place"):
        Loop(model, fastloop.AdamW(model.parameters(), **{name: 1.0}), **{name: 0.5})
    Loop(model, fastloop.AdamW(model.parameters(), **{name: 1.0}), **{name: 1.0})


def test_a_second_loop_on_an_optimizer_may_clip() -> None:
    model = network()
    optimizer = fastloop.AdamW(model.parameters())
    Loop(model, optimizer, cross_entropy).fit(DATA, epochs=1)
    assert Loop(model, optimizer, max_grad_norm=0.5).optimizer.param_groups[0]["max_grad_norm"] == 0.5


@pytest.mark.parametrize("optimizer", ["fastloop.AdamW", "torch.AdamW"])
@pytest.mark.parametrize("bounds", [(1e-3, None), (None, 1e-3), (1.0, 1e-3)])
def test_a_resumed_run_clips_as_it_is_told_now(bounds: tuple[Any, Any], optimizer: str, tmp_path: Any) -> None:
    """And not as the settings say that the checkpoint has of the optimizer."""

    def loop(bound: Any, folder: Any = None) -> Loop:
        model = network()
        made = OPTIMIZERS[optimizer](model.parameters())
        return Loop(model, made, cross_entropy, max_grad_norm=bound, run_dir=folder, loggers=())

    loop(bounds[0], tmp_path).fit(DATA, max_steps=2)
    resumed = loop(bounds[1], tmp_path)
    expected = loop(bounds[0])
    expected.fit(DATA, max_steps=2)
    if optimizer == "fastloop.AdamW":
        for group in expected.optimizer.param_groups:
            group["max_grad_norm"] = math.inf if bounds[1] is None else bounds[1]
    else:
        expected._update.max_norm = math.inf if bounds[1] is None else bounds[1]  # type: ignore[union-attr]
    for each in (resumed, expected):
        each.fit(DATA, epochs=1)
    assert weights(resumed.model) == weights(expected.model)


def test_a_group_that_is_added_has_the_schedule_too() -> None:
    model = network()
    optimizer = fastloop.SGD(model[0].parameters(), lr=1.0)

    class Unfreeze:
        def on_window(self, loop: Loop, record: Any) -> None:
            if loop.global_step == 2:
                optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.1})

    Loop(model, optimizer, cross_entropy, schedule=lambda step: 1 / (1 + step), callbacks=[Unfreeze()]).fit(
        DATA, epochs=1
    )
    assert [group["lr"] for group in optimizer.param_groups] == [1 / 7, 0.1 * (1 / 7)]
    assert weights(model[2]) != weights(network()[2])


@pytest.mark.parametrize("optimizer", ["fastloop.SGD", "torch.SGD"])
def test_a_run_without_a_schedule_goes_on_with_one(optimizer: str, tmp_path: Any) -> None:
    """The checkpoint's groups have no "initial_lr": their learning rate is it."""
    for schedule, steps in ((None, 2), (lambda step: 1 / (1 + step), 4)):
        model = network()
        made = OPTIMIZERS[optimizer](model.parameters())
        loop = Loop(model, made, cross_entropy, schedule=schedule, run_dir=tmp_path, loggers=(), log_every=1)
        history = loop.fit(DATA, max_steps=steps)
    assert history["lr"] == [(1, 0.05), (2, 0.05), (3, 0.05 / 3), (4, 0.05 / 4)]


# ---- callbacks, rows, history, progress


def test_events_come_in_order_and_with_the_loop(tmp_path: Any) -> None:
    events: list[tuple[str, int]] = []

    def listener(name: str) -> Any:
        def heard(self: Any, loop: Loop, *rest: Any) -> None:
            assert isinstance(loop, Loop)
            events.append((name, loop.global_step))

        return heard

    everything = type("Everything", (), {name: listener(name) for name in EVENTS})()
    loop = looped(callbacks=[everything], run_dir=tmp_path, log_every=4, loggers=())
    loop.fit(DATA, DATA[:1], epochs=1)
    assert events == [
        ("on_fit_start", 0), *(("on_window", i) for i in (1, 2, 3)), ("on_log", 4), ("on_window", 4),
        ("on_window", 5), ("on_window", 6), ("on_log", 6), ("on_evaluate", 6), ("on_epoch_end", 6), ("on_save", 6),
        ("on_save", 6), ("on_fit_end", 6),
    ]  # fmt: skip


def test_rows_are_means_over_the_windows_since_the_last() -> None:
    rows: list[Any] = []

    class Rows:
        def on_log(self, loop: Loop, row: Any) -> None:
            rows.append(row)

    sizes = [4, 1, 7, 2]
    loop = looped(lambda model, batch: (cross_entropy(model, batch) * 0 + len(batch[1]), {"n": len(batch[1])}),
                  log_every=2, callbacks=[Rows()])  # fmt: skip
    history = loop.fit(batches(sizes), epochs=1)
    means = [(4 * 4 + 1) / 5, (7 * 7 + 2 * 2) / 9]
    assert [row["train/loss"] for row in rows] == [row["train/n"] for row in rows] == means
    assert [row["step"] for row in rows] == [2, 4]
    assert [row["epoch"] for row in rows] == [0, 0]
    assert {"grad_norm", "skipped", "lr", "spikes", "steps/s", "samples/s", "data_wait", "memory/host"} <= rows[
        0
    ].keys()
    assert history["train/loss"] == list(zip([2, 4], means, strict=True))
    assert "samples/s" not in history
    assert "memory/host" not in history


def test_tokens_are_counted_where_the_first_tensor_is_of_integers() -> None:
    rows: list[Any] = []

    class Rows:
        def on_log(self, loop: Loop, row: Any) -> None:
            rows.append(row)

    model = nn.Embedding(5, 3)
    loop = looped(lambda m, b: m(b).mean(), model, log_every=1, callbacks=[Rows()])
    loop.fit([torch.zeros(2, 7, dtype=torch.int64)] * 2, epochs=1)
    assert rows[0]["tokens/s"] == pytest.approx(7 * rows[0]["samples/s"])


def test_the_step_returns_scalars() -> None:
    loop = looped(max_grad_norm=1e-4)
    for window in loop.windows(DATA, max_steps=1):
        expected = cross_entropy(network(), DATA[0])
        expected.backward()
        train(loop, window)
        result = loop.step()
    assert all(v.dim() == 0 for v in (result.loss, result.grad_norm, result.skipped))
    assert result.loss.item() == expected.item()
    assert result.skipped.item() == 0.0
    assert result.grad_norm.item() > 1e-4  # before clipping


def test_a_progress_line_where_there_is_no_terminal(capsys: Any) -> None:
    looped(progress=True).fit(DATA, epochs=1)
    assert "6/6" in capsys.readouterr().err
    looped(progress=None).fit(DATA, epochs=1)
    looped(progress=False).fit(DATA, epochs=1)
    assert capsys.readouterr().err == ""


def test_few_steps_with_a_run_dir_end_without_a_plot(tmp_path: Any) -> None:
    """Fewer windows than a row needs: nothing to draw, and nothing that a finished training should fail for."""
    looped(run_dir=tmp_path).fit(DATA, max_steps=2)
    assert (tmp_path / "checkpoints").is_dir()


# ---- options that change how a step is computed


class Blocks(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3)) for _ in range(depth))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("which", "saves"), [(1, 4), (2, 2), (["blocks.*"], 4), (["blocks.1", "blocks.3"], 2), ("blocks.0", 1)]
)
def test_activation_checkpointing_keeps_less_and_gives_the_same(which: Any, saves: int) -> None:
    results = []
    for checkpointing in (None, which):
        torch.manual_seed(0)
        loop = looped(cross_entropy, Blocks(), activation_checkpointing=checkpointing)
        kept: list[int] = []
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            cross_entropy(loop.model, DATA[0])
        torch.manual_seed(1)
        loop.fit(DATA, epochs=1)
        results.append((weights(loop.model), sum(kept), list(loop.model.state_dict())))
    assert results[0][0] == results[1][0]
    assert results[0][2] == results[1][2]
    # of a block Tanh's output, which Dropout's input is, and Dropout's mask, each 4 x 6, are not kept, its input is
    assert results[0][1] - results[1][1] >= saves * 4 * 6


def test_channels_last() -> None:
    layouts = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.conv(x).mean()

    model = Net()
    loop = looped(lambda m, b: m(b["image"]), model, channels_last=True)
    batch = {"image": torch.randn(2, 3, 5, 5), "label": torch.zeros(2)}
    loop.fit([batch], epochs=1)
    loop.evaluate([batch])
    assert layouts == [True, True]
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_compile_compiles_containers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13's own Module.compile() takes an nn.Sequential and compiles nothing."""
    taken: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        taken.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    looped(cross_entropy, model, compile=True).fit(batches([4] * 3), epochs=1)
    assert taken


def test_compile_trains_the_same() -> None:
    models = [network(), network()]
    for model, compiled in zip(models, (False, True), strict=True):
        looped(cross_entropy, model, compile=compiled).fit(batches([4] * 5 + [3]), epochs=2)
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        # Fused kernels round in another order, a few units of 2^-24 of values below 4 in each of 12 steps. Adam divides
        # by the gradient's size and so passes on its relative error, at most lr = 0.05 times that of a small element.
        assert (p - q).abs().max() < 12 * 0.05 * 2.0**-10
    assert weights(models[1]) != weights(network())


def test_seed_seeds_everything() -> None:
    drawn = []
    for seed in (3, 3, 4):
        looped(seed=seed)
        drawn.append((random.random(), float(numpy.random.rand()), torch.rand(()).item()))
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))
    model = network()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    looped(model=model)
    assert torch.equal(torch.get_rng_state(), before)


def test_deterministic_fails_where_it_cannot_hold() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return torch.nn.functional.max_unpool1d(
            model(batch[0]).reshape(1, 1, -1), torch.zeros(1, 1, 12, dtype=torch.int64), 2
        ).mean()

    try:
        loop = looped(loss_fn, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        with pytest.raises(RuntimeError, match=r"does not have a deterministic implementation"):
            loop.fit(DATA, epochs=1)
    finally:
        torch.use_deterministic_algorithms(False)


def test_state_dict_goes_on_in_another_loop() -> None:
    data = DataLoader(TensorDataset(torch.cat([x for x, _ in DATA]), torch.cat([y for _, y in DATA])), 4, shuffle=True)
    whole, first = looped(seed=0, log_every=1), looped(seed=0, log_every=1)
    torch.manual_seed(0)
    whole.fit(data, epochs=2)
    torch.manual_seed(0)
    first.fit(data, max_steps=4)
    second = looped(log_every=1)
    second.load_state_dict(first.state_dict())
    second.fit(data, epochs=2)
    assert weights(second.model) == weights(whole.model)
    assert second.history == whole.history


def test_warnings_go_to_the_log_and_not_to_the_console(capsys: Any, caplog: Any) -> None:
    """A library never prints."""
    with caplog.at_level(logging.INFO, "fastloop.loop"):
        looped().fit(DATA, epochs=1)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
