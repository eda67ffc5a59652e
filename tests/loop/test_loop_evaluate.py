# SPDX-License-Identifier: Apache-2.0
"""Evaluation: means over samples, accuracy, averages of the weights, and a model that is left as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import batches, cross_entropy, network
from support import bits
from torch import Tensor, nn

import fastloop
from fastloop import Loop

DATA = batches([5, 2, 8, 1])
X, Y = torch.cat([x for x, _ in DATA]), torch.cat([y for _, y in DATA])


def looped(model: nn.Module, loss_fn: Any, **options: Any) -> Loop:
    return Loop(model, fastloop.AdamW(model.parameters(), lr=0.05, ema_decay=0.5), loss_fn, **options)


def test_loss_and_accuracy_are_those_of_all_samples() -> None:
    model = network().double()
    data = [(x.double(), y) for x, y in DATA]
    values = looped(model, nn.CrossEntropyLoss()).evaluate(data)
    with torch.no_grad():
        output = model(X.double())
    # 16 samples and a few dozen operations in float64 on values of size 1
    assert values["loss"] == pytest.approx(F.cross_entropy(output, Y).item(), rel=0, abs=1e-14)
    assert values["accuracy"] == (output.argmax(1) == Y).double().mean().item()
    assert list(values) == ["accuracy", "loss"]


def test_ignored_targets_count_nowhere() -> None:
    model = network().double()
    data = [(x.double(), y.clone()) for x, y in DATA]
    for (_, y), ignored in zip(data, [2, 2, 7, 0], strict=True):  # the second batch has nothing else
        y[:ignored] = -100
    target = torch.cat([y for _, y in data])
    values = looped(model, nn.CrossEntropyLoss()).evaluate(data)
    with torch.no_grad():
        output = model(X.double())
    counted = target != -100
    assert values["loss"] == pytest.approx(F.cross_entropy(output, target).item(), rel=0, abs=1e-14)
    assert values["accuracy"] == pytest.approx((output.argmax(1) == target)[counted].double().mean().item(), abs=1e-15)


def test_metrics_and_weights_of_a_loss_fn() -> None:
    """Means with the third value as the weight: tokens, say."""

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).sum() * 0 + 2.0, {"size": len(batch[1]), "one": torch.tensor(1.0)}, len(batch[1]) ** 2

    values = looped(network(), loss_fn).evaluate(DATA)
    assert values == {
        "loss": 2.0,
        "one": 1.0,
        "size": sum(n**3 for n in (5, 2, 8, 1)) / sum(n**2 for n in (5, 2, 8, 1)),
    }


def test_other_criteria_have_no_accuracy() -> None:
    model = nn.Linear(6, 2)
    data = [(x, torch.randn(len(x), 2)) for x, _ in DATA]
    values = looped(model, nn.MSELoss()).evaluate(data)
    assert list(values) == ["loss"]
    together = F.mse_loss(model(X), torch.cat([y for _, y in data])).item()
    assert values["loss"] == pytest.approx(together, rel=40 * 2.0**-24)  # 32 squares and the roundings of the output


def test_a_criterion_of_ones_own_is_a_criterion() -> None:
    class Focal(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (F.cross_entropy(output, target, reduction="none") ** 2).mean()

    loop = looped(network(), Focal())
    assert set(loop.evaluate(DATA)) == {"loss", "accuracy"}
    loop.fit(DATA, epochs=1)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(network(), nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[1].eval()  # frozen by its owner
    seen: list[Any] = []

    def loss_fn(called: nn.Module, batch: Any) -> Tensor:
        seen.append((torch.is_grad_enabled(), [m.training for m in called.modules()]))
        return cross_entropy(called, batch)

    loop = looped(model, loss_fn)
    before = [m.training for m in model.modules()], [bits(t) for t in model.state_dict().values()]
    loop.evaluate(DATA)
    assert seen == [(False, [False] * len(before[0]))] * len(DATA)
    assert ([m.training for m in model.modules()], [bits(t) for t in model.state_dict().values()]) == before

    def broken(called: nn.Module, batch: Any) -> Tensor:
        raise ZeroDivisionError

    loop.loss_fn = broken
    with pytest.raises(ZeroDivisionError):
        loop.evaluate(DATA)
    assert [m.training for m in model.modules()] == before[0]


def test_fit_trains_what_comes_in_eval_mode_and_keeps_what_is_frozen() -> None:
    model = nn.Sequential(network(), nn.Dropout(0.5)).eval()
    looped(model, cross_entropy).fit(DATA, epochs=1)
    assert all(m.training for m in model.modules())
    model[1].eval()
    looped(model, cross_entropy).fit(DATA, DATA, epochs=1)
    assert model.training
    assert not model[1].training


def test_ema_weights_in_evaluation_alone() -> None:
    model = network()
    loop = looped(model, cross_entropy)
    loop.fit(DATA, epochs=2)
    live = loop.evaluate(DATA)["loss"]
    before = [bits(p) for p in model.parameters()]
    averaged = loop.evaluate(DATA, ema=True)["loss"]
    assert [bits(p) for p in model.parameters()] == before
    optimizer: Any = loop.optimizer
    other = network()
    other.load_state_dict(optimizer.ema_state_dict(model))
    expected = looped(other, cross_entropy).evaluate(DATA)["loss"]
    assert averaged == expected != live


@pytest.mark.parametrize("make", [torch.optim.SGD, fastloop.SGD])
def test_ema_of_an_optimizer_without(make: Any) -> None:
    model = network()
    loop = Loop(model, make(model.parameters(), lr=0.1), cross_entropy)
    with pytest.raises(RuntimeError, match=r"keeps no moving average.*ema_decay="):
        loop.evaluate(DATA, ema=True)


def test_fit_evaluates_after_epochs_between_and_once_at_the_end() -> None:
    loop = looped(network(), cross_entropy)
    history = loop.fit(DATA, DATA[:1], epochs=2, evaluate_every_steps=3)
    assert [step for step, _ in history["val/loss"]] == [3, 4, 6, 8]
    loop = looped(network(), cross_entropy)
    assert [step for step, _ in loop.fit(DATA, DATA[:1], max_steps=6)["val/loss"]] == [4, 6]


def test_a_name_of_ones_own_and_none() -> None:
    rows: list[Any] = []

    class Rows:
        def on_log(self, loop: Loop, row: Any) -> None:
            rows.append(row)

    loop = looped(network(), cross_entropy, callbacks=[Rows()])
    values = loop.evaluate(DATA, name="test")
    assert rows == [{"step": 0, "epoch": 0, "test/loss": values["loss"]}]
    assert loop.history["test/loss"] == [(0, values["loss"])]
    assert loop.evaluate(DATA, name=None) == values
    assert len(rows) == 1


@pytest.mark.parametrize("data", [[], [(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))]])
def test_nothing_to_evaluate(data: Any) -> None:
    with pytest.raises(ValueError, match=r"the loader gave no batch"):
        looped(network(), cross_entropy).evaluate(data)


@pytest.mark.parametrize("result", [1.0, (1.0,), (torch.tensor(1.0), 2.0), "x", (torch.tensor(1.0), {}, 1.0, 1.0)])
def test_what_a_loss_fn_must_return(result: Any) -> None:
    loop = looped(network(), lambda model, batch: result)
    with pytest.raises(TypeError, match=r"must return loss, \(loss, metrics\) or \(loss, metrics, weight\)"):
        loop.evaluate(DATA)
    with pytest.raises(TypeError, match=r"must return"):
        loop.fit(DATA, epochs=1)


def test_a_criterion_needs_pairs() -> None:
    with pytest.raises(TypeError, match=r"batches of \(input, target\), got Tensor.*loss_fn\(model, batch\)"):
        looped(network(), nn.CrossEntropyLoss()).fit([X], epochs=1)


def test_evaluation_without_loss_fn() -> None:
    loop = looped(network(), None)
    with pytest.raises(ValueError, match=r"evaluate needs loss_fn="):
        loop.evaluate(DATA)
    with pytest.raises(ValueError, match=r"fit needs loss_fn="):
        loop.fit(DATA, epochs=1)


# ---- monitors, patience


def improving(values: list[float]) -> Any:
    """A loss_fn whose evaluations give these losses in turn."""
    given = iter(values)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) if model.training else torch.tensor(next(given))

    return loss_fn


@pytest.mark.parametrize(
    ("values", "mode", "epochs"),
    [
        ([3.0, 2.0, 2.5, 2.0, 9.0], "min", 4),
        ([1.0, 2.0, 3.0, 2.0, 2.0, 9.0], "max", 5),
        ([math.nan, math.nan, 1.0], "min", 2),
        ([5.0, 4.0, 3.0, 2.0, 1.0, 0.5], "min", 6),
    ],
)
def test_patience(values: list[float], mode: str, epochs: int) -> None:
    loop = looped(network(), improving(values), patience=2, mode=mode)
    loop.fit(DATA, DATA[:1], epochs=6)
    assert loop.epoch == epochs
    assert loop.stop_reason == ("patience" if epochs < 6 else None)


def test_patience_and_monitors_that_could_never_act_are_refused() -> None:
    with pytest.raises(ValueError, match=r"patience needs evaluations; pass a val_loader"):
        looped(network(), cross_entropy, patience=1).fit(DATA, epochs=1)
    loop = looped(network(), cross_entropy, monitor="val/acc")
    with pytest.raises(ValueError, match=r"monitor 'val/acc' is none of the metrics \['val/loss'\]"):
        loop.fit(DATA, DATA, epochs=1)
    loop.evaluate(DATA, name="test")  # another kind of evaluation, which is not monitored
    with pytest.raises(ValueError, match=r"evaluate_every_steps needs a val_loader"):
        looped(network(), cross_entropy).fit(DATA, epochs=1, evaluate_every_steps=2)
    with pytest.raises(ValueError, match=r"monitor must name a metric"):
        looped(network(), cross_entropy, monitor=[])
    with pytest.raises(ValueError, match=r'mode must be "min" or "max"'):
        looped(network(), cross_entropy, mode="best")


def test_plateau_takes_the_monitored_metric() -> None:
    model = network()
    optimizer = fastloop.SGD(model.parameters(), lr=1.0)
    schedule: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    loop = Loop(model, optimizer, improving([3.0, 4.0, 5.0, 1.0]), schedule=schedule)
    loop.fit(DATA, DATA[:1], epochs=4)
    assert optimizer.param_groups[0]["lr"] == 0.25
