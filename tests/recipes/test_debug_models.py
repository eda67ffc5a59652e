# SPDX-License-Identifier: Apache-2.0
"""A batch and a step diagnosed, backward checked, layers counted: against closed forms and planted mistakes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Encoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.recipes.debug import check_gradients, diagnose, layer_statistics
from fastloop.recipes.evidence import recorded

CE = nn.CrossEntropyLoss()
X, Y = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)), torch.arange(32) % 3


pytestmark = pytest.mark.usefixtures("one_thread")


def mlp(*last: nn.Module, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, outputs), *last)


def said(made: Any, *levels: str) -> str:
    return "\n".join(str(f) for f in made.findings if f.level in (levels or ("error", "warning")))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


HEALTHY: dict[str, Any] = {
    "mlp": lambda: (mlp(), (X, Y), CE),
    "cnn": lambda: (cnn(), (torch.randn(32, 3, 8, 8), Y), CE),
    "transformer": lambda: (Encoder(), (torch.randn(32, 5, 16), Y), CE),
    "lstm": lambda: (Recurrent(), (torch.randn(32, 5, 8), Y), CE),
    "regression": lambda: (mlp(outputs=1), (X, X[:, :1]), nn.MSELoss()),
    "binary": lambda: (mlp(nn.Flatten(0), outputs=1), (X, (Y > 0).float()), nn.BCEWithLogitsLoss()),
}


# ---- diagnose


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, fastloop.AdamW])
def test_healthy_models_get_no_warning(name: str, optimizer: Any) -> None:
    model, batch, loss_fn = HEALTHY[name]()
    made = diagnose(model, loss_fn, batch, optimizer(model.parameters(), lr=1e-3))
    assert said(made) == ""
    assert made.loss_after_step < made.loss
    assert set(made.gradient_norms) == {name for name, _ in model.named_parameters()}


def test_numbers_are_those_computed_by_hand() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    made = diagnose(
        model, CE, DataLoader(TensorDataset(X, Y), batch_size=32), torch.optim.SGD(model.parameters(), lr=0.5)
    )
    loss = CE(model(X), Y)
    loss.backward()
    assert made.loss == loss.item()
    assert made.expected_loss == math.log(3)
    weight = model[0].weight
    assert made.gradient_norms["0.weight"] == pytest.approx(weight.grad.double().norm().item())
    assert made.learning_rates == [0.5]
    stepped = CE(F.linear(X, weight - 0.5 * weight.grad, model[0].bias - 0.5 * model[0].bias.grad), Y)
    assert made.loss_after_step == pytest.approx(stepped.item(), rel=1e-6)
    ratio = 0.5 * weight.grad.double().norm() / weight.double().norm()
    assert made.update_ratios == {"0.weight": pytest.approx(ratio.item(), rel=1e-5)}
    out = model(X).double()
    assert made.outputs["shape"] == [32, 3]
    assert made.outputs["nan"] == 0
    assert made.outputs["std"] == pytest.approx(out.std(correction=0).item())


def test_the_step_is_measured_with_the_same_random_numbers() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)  # no step at all, in effect
    made = diagnose(model, CE, (X, Y), optimizer)
    assert made.loss_after_step == pytest.approx(made.loss, abs=1e-9)  # other dropout would differ by 1e-2


def test_nothing_is_changed() -> None:
    model = mlp(nn.BatchNorm1d(3))
    optimizer = fastloop.AdamW(model.parameters(), lr=1e-3)
    CE(model(X), Y).backward()
    optimizer.step()
    model.eval()
    before = copy.deepcopy([model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict()])
    state = torch.get_rng_state()
    diagnose(model, CE, (X, Y), optimizer)
    layer_statistics(model, CE, (X, Y))
    check_gradients(model, CE, (X, Y))
    after = [model.state_dict(), [p.grad for p in model.parameters()], optimizer.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert str(before[2]) == str(after[2])
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training


def test_a_learning_rate_that_is_too_high_is_told_from_a_wrong_gradient() -> None:
    model = mlp()
    high = diagnose(model, CE, (X, Y), torch.optim.SGD(model.parameters(), lr=300.0))
    assert "the learning rate is too high" in said(high)
    assert "high for SGD" in said(high)

    class Reversed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return -gradient

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return Reversed.apply(F.cross_entropy(model(batch[0]), batch[1]))

    assert "the gradient is wrong" in said(diagnose(model, loss, (X, Y), torch.optim.SGD(model.parameters(), lr=0.01)))


def test_outputs_and_loss() -> None:
    broken = mlp()
    nn.init.constant_(broken[3].weight, torch.nan)
    made = diagnose(broken, CE, (X, Y), torch.optim.SGD(broken.parameters(), lr=0.1))
    assert "error: 3: 96 of its 96 outputs" in said(made)
    assert "error: loss: is nan" in said(made)
    assert made.to_json()["loss"] is None
    json.dumps(made.to_json(), allow_nan=False)
    zero, dead = nn.Sequential(nn.Linear(8, 3)), mlp()
    nn.init.zeros_(zero[0].weight)
    nn.init.constant_(dead[0].bias, -100.0)
    assert "the same for all 32 samples" in said(diagnose(zero, CE, (X, Y)), "note")
    assert "no weight gets a gradient" in said(diagnose(dead, CE, (X, Y)))
    assert "begins at" in said(diagnose(mlp(), CE, (1000 * X, Y)))
    assert "a softmax of its own" in said(diagnose(mlp(nn.Softmax(1)), CE, (X, Y)), "error")
    wrong = diagnose(nn.Linear(5, 3), CE, (X, Y))
    assert "could not be computed: RuntimeError" in said(wrong, "error")
    assert wrong.loss is None


def test_gradients_by_layer() -> None:
    deep = nn.Sequential(*[part for _ in range(12) for part in (nn.Linear(8, 8), nn.Sigmoid())], nn.Linear(8, 3))
    made = diagnose(deep, CE, (X, Y))
    assert "vanishes on its way to the first layers" in said(made)
    assert "note: 0.weight: the gradient's norm is" in said(made, "note")
    large = mlp()
    with torch.no_grad():
        large[0].weight.mul_(300)
        large[3].weight.mul_(300)
    assert "the gradient's norm is" in said(diagnose(large, CE, (X, Y)))


def test_steps_that_change_nothing_or_cannot_be_tried() -> None:
    model = mlp()
    still = diagnose(model, CE, (X, Y), torch.optim.SGD(model.parameters(), lr=0.0))
    assert "a step changes nothing" in said(still)
    assert "it is 0" in said(still)
    closure = diagnose(model, CE, (X, Y), torch.optim.LBFGS(model.parameters()))
    assert "could not be tried" in said(closure, "note")
    assert closure.loss_after_step is None
    assert diagnose(model, CE, (X, Y)).loss_after_step is None
    wild = diagnose(model, CE, (X, Y), torch.optim.Adam(model.parameters(), lr=1.0))
    assert "of its norm" in said(wild)


def test_classes_may_be_given_and_wrong_use_raises(tmp_path: Path) -> None:
    def focal(model: nn.Module, batch: Any) -> Tensor:
        p = model(batch[0]).softmax(1)[torch.arange(32), batch[1]]
        return -((1 - p) ** 2 * p.log()).mean()

    made = diagnose(mlp(), focal, (X, Y), classes=3)
    assert made.expected_loss == math.log(3)
    assert diagnose(mlp(), focal, (X, Y)).expected_loss is None
    made.record(tmp_path)
    assert "gradient_norms" in recorded(tmp_path)["diagnose"]
    assert "parameter" in str(made)
    assert "gradient norm" in str(made)
    for args, error in (
        (("model", CE, (X, Y)), TypeError), ((mlp(), "ce", (X, Y)), TypeError), ((mlp(), CE, (X, Y), "sgd"), TypeError),
        ((mlp(), CE, iter(())), ValueError),
    ):  # fmt: skip
        with pytest.raises(error):
            diagnose(*args)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classes must be"):
        diagnose(mlp(), CE, (X, Y), classes=True)


# ---- check_gradients


class WrongSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.01 * ctx.saved_tensors[0] * gradient


class Squared(nn.Module):
    def __init__(self, square: Any) -> None:
        super().__init__()
        self.first, self.second, self.square = nn.Linear(8, 4), nn.Linear(4, 3), square

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.square(self.first(x)))


@pytest.mark.parametrize("name", HEALTHY)
def test_backward_of_right_models_passes(name: str) -> None:
    model, batch, loss_fn = HEALTHY[name]()
    made = check_gradients(model, loss_fn, batch, elements=2)
    assert made.passed
    assert made.elements >= len(list(model.parameters()))
    assert max(made.differences.values()) <= 1e-4, made


def test_a_wrong_function_is_caught_in_the_parameters_before_it() -> None:
    made = check_gradients(Squared(WrongSquare.apply), CE, (X, Y))
    assert not made.passed
    wrong = {f.where for f in made.findings if f.level == "error"}
    assert wrong == {"first.weight", "first.bias"}
    assert made.differences["first.weight"] == pytest.approx(0.005, rel=0.05)  # 1 - 2/2.01
    assert "failed" in str(made)
    assert "wrong" in str(made)
    assert check_gradients(Squared(torch.square), CE, (X, Y)).passed


def test_a_detached_part_is_caught() -> None:
    class Detached(Squared):
        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).detach())

    made = check_gradients(Detached(None), CE, (X, Y))
    assert not made.passed
    assert "backward gives none" in str(made)


def test_kinks_are_reported_and_no_failure() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.relu(model(batch)).sum() + 0.5 * model(batch).sum()

    made = check_gradients(model, loss, torch.ones(3, 1))
    assert made.passed
    assert made.kinks == 1
    assert any(f.where == "kinks" for f in made.findings)


def test_what_cannot_be_compared_is_said() -> None:
    drawn = torch.Generator().manual_seed(0)

    def random(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch) * torch.rand(32, 3, generator=drawn)).mean()

    made = check_gradients(mlp(), random, X)
    assert not made.passed
    assert "differs between two forwards" in str(made)
    cast = check_gradients(mlp(), lambda model, batch: CE(model(batch[0]).float(), batch[1]), (X, Y))
    assert "differences are lost in its rounding" in str(cast)
    frozen = check_gradients(mlp().requires_grad_(False), CE, (X, Y))
    assert frozen.passed
    assert frozen.elements == 0
    assert "nothing was compared" in str(frozen)
    with pytest.raises(ValueError, match="must be a finite number"):
        check_gradients(mlp(), lambda model, batch: model(batch).mean() * torch.nan, X)
    for options in ({"elements": 0}, {"step": 0.0}, {"tolerance": 2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            check_gradients(mlp(), CE, (X, Y), **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be"):
        check_gradients("model", CE, (X, Y))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters without values"):
        check_gradients(nn.Sequential(nn.LazyLinear(3)), CE, (X, Y))


# ---- layer_statistics


def test_statistics_are_those_of_each_layers_outputs() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    made = layer_statistics(model, CE, (X, Y))
    hidden = model[0](X)
    expected = [hidden, hidden.relu(), model(X)]
    loss = CE(expected[2], Y)
    loss.backward()
    assert [row.layer for row in made.layers] == ["0", "1", "2"]
    assert made.loss == loss.item()
    for row, values in zip(made.layers, expected, strict=True):
        assert row.mean == pytest.approx(values.double().mean().item(), abs=1e-7)
        assert row.std == pytest.approx(values.double().std(correction=0).item(), rel=1e-6)
        assert row.zeros == pytest.approx((values == 0).double().mean().item())
    assert made.layers[1].gradient is None
    both = math.hypot(model[0].weight.grad.norm().item(), model[0].bias.grad.norm().item())
    assert made.layers[0].gradient == pytest.approx(both, rel=1e-5)
    assert made.findings == []


def test_a_layer_that_is_called_twice_is_counted_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x) + 50)

    model = Twice()
    row = layer_statistics(model, CE, (X, Y)).layers[0]
    first = model.layer(X)
    together = torch.cat([first, model.layer(first + 50)]).double()
    assert row.mean == pytest.approx(together.mean().item(), rel=1e-6)
    assert row.std == pytest.approx(together.std(correction=0).item(), rel=1e-6)


def test_parameters_that_a_layer_uses_without_calling_their_own_are_counted_with_it() -> None:
    model, batch = Encoder().eval(), (torch.randn(32, 5, 16), Y)
    rows = {row.layer: row for row in layer_statistics(model, CE, batch).layers}
    attention = rows["encoder.layers.0.self_attn"]
    assert attention.kind == "MultiheadAttention"
    assert attention.gradient > 0
    assert "encoder.layers.0.self_attn.out_proj" not in rows


def test_layers_that_are_dead_vanish_explode_or_overflow() -> None:
    def found(change: float, bias: float = 0.0) -> str:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        with torch.no_grad():
            model[0].weight.mul_(change)
            model[0].bias.fill_(bias)
        return said(layer_statistics(model, CE, (X, Y)))

    assert found(1.0) == ""
    assert "100% of its activations are 0" in found(1.0, -100)
    assert "explode" in found(1e6)
    assert "vanish" in found(1e-9)
    assert "not finite" in found(math.inf)


def test_the_picture(tmp_path: Path) -> None:
    made = layer_statistics(Encoder(), CE, (torch.randn(32, 5, 16), Y))
    path = made.plot(tmp_path / "layers.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="ending"):
        made.plot(tmp_path / "layers.txt")
    made.layers.clear()
    with pytest.raises(ValueError, match="no layer to draw"):
        made.plot(tmp_path / "none.png")
    with pytest.raises(TypeError, match="model must be"):
        layer_statistics(None, CE, (X, Y))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer_statistics(nn.Linear(3, 3), CE, (X, Y))
