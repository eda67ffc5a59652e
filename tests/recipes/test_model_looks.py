# SPDX-License-Identifier: Apache-2.0
"""model_summary, check_initial_gradients and dead_relus: what they see, and that they leave nothing behind."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastloop.recipes.model import check_initial_gradients, dead_relus, model_summary

IMAGES, CLASSES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])


pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.5),
        nn.Flatten(), nn.Linear(384, 3),
    )  # fmt: skip


def everything_of(model: nn.Module) -> list[Any]:
    """Values, gradients, modes, hooks and buffers, to be compared before and after."""
    tensors = {name: each.clone() for name, each in model.state_dict().items()}
    grads = [None if each.grad is None else each.grad.clone() for each in model.parameters()]
    flags = [(module.training, len(module._forward_hooks)) for module in model.modules()]
    return [tensors, grads, flags, torch.get_rng_state()]


def same(before: list[Any], after: list[Any]) -> bool:
    tensors = all(torch.equal(before[0][name], each) for name, each in after[0].items())
    grads = all(
        (a is None) == (b is None) and (a is None or torch.equal(a, b))
        for a, b in zip(before[1], after[1], strict=True)
    )
    return tensors and grads and before[2] == after[2] and torch.equal(before[3], after[3])


LOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "model_summary": lambda model: model_summary(model, (IMAGES, CLASSES)),
    "check_initial_gradients": lambda model: check_initial_gradients(model, nn.CrossEntropyLoss(), (IMAGES, CLASSES)),
    "dead_relus": lambda model: dead_relus(model, (IMAGES, CLASSES)),
}


@pytest.mark.parametrize("name", LOOKS)
def test_nothing_is_left_behind(name: str) -> None:
    model = network()
    nn.functional.cross_entropy(model(IMAGES), CLASSES).backward()
    model[1].eval()
    before = everything_of(model)
    result = LOOKS[name](model)
    assert same(before, everything_of(model))
    assert str(result) == result.table()
    assert json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize("name", LOOKS)
def test_nothing_is_left_behind_by_an_error(name: str) -> None:
    model = nn.Sequential(network(), nn.Linear(5, 5))  # the shapes do not fit
    before = everything_of(model)
    with pytest.raises(RuntimeError, match=r"mat1 and mat2"):
        LOOKS[name](model)
    assert same(before, everything_of(model))


# ---- model_summary


def test_summary_of_parameters_shapes_and_memory() -> None:
    model = network()
    model[5].bias.requires_grad_(False)
    summary = model_summary(model, (IMAGES, CLASSES))
    parameters = 3 * 6 * 9 + 12 + 384 * 3 + 3
    assert (summary.parameters, summary.trainable) == (parameters, parameters - 3)
    assert [each.outputs for each in summary.layers][::5] == [[[4, 6, 8, 8]], [[4, 3]]]
    assert [each.kind for each in summary.layers][:3] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert summary.bytes == {
        "parameters": 4 * parameters, "buffers": 4 * 12 + 8, "gradients": 4 * (parameters - 3),
        "adam state": 8 * (parameters - 3), "momentum state": 4 * (parameters - 3),
    }  # fmt: skip
    # Two FLOPs a multiply-add: the convolution's input needs no gradient, the linear layer's does.
    convolution, linear = 2 * 4 * 64 * 6 * 27, 2 * 4 * 384 * 3
    assert summary.flops == 2 * convolution + 3 * linear
    table = summary.table()
    assert "4x6x8x8" in table
    assert f"{parameters:,}" in table
    assert "1152" in table


def test_summary_counts_shared_weights_once_and_says_what_was_not_called() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(5))
            self.embedding = nn.Embedding(10, 5)
            self.head = nn.Linear(5, 10, bias=False)
            self.head.weight = self.embedding.weight
            self.same = nn.ReLU()
            self.unused = nn.Linear(5, 5)

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            hidden = self.same(self.same(self.embedding(tokens) + self.token))
            return {"logits": self.head(hidden), "hidden": hidden}

    summary = model_summary(Model(), {"tokens": torch.tensor([[1, 2]])})
    rows = {each.name: each for each in summary.layers}
    assert summary.parameters == 5 + 50 + 30 == sum(each.parameters for each in summary.layers)
    assert rows["head"].tied
    assert rows["head"].parameters == 0
    assert not rows["embedding"].tied
    assert rows["same"].calls == 2
    assert rows["unused"].calls == 0
    assert rows["(model)"].outputs == [[1, 2, 10], [1, 2, 5]]
    table = str(summary)
    assert "not called" in table
    assert "tied" in table
    assert "(2 calls)" in table
    plain = model_summary(Model())
    assert plain.flops is None
    assert {each.calls for each in plain.layers} == {None}
    assert plain.parameters == 85


def test_flops_of_recurrent_layers_are_unknown_and_not_0() -> None:
    summary = model_summary(nn.Sequential(nn.LSTM(3, 4)), torch.rand(5, 2, 3))
    assert summary.flops is None
    assert "FLOPs" not in str(summary)


@pytest.mark.parametrize("look", LOOKS.values())
def test_models_that_cannot_be_looked_at(look: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got int; pass the model itself"):
        look(3)
    lazy = nn.Sequential(nn.LazyBatchNorm2d(affine=False), nn.Conv2d(3, 3, 1))
    with pytest.raises(ValueError, match=r"0.running_mean has no shape yet; call the model once"):
        look(lazy)


def test_summary_of_a_loader_and_of_bad_input() -> None:
    loader = DataLoader(TensorDataset(IMAGES, CLASSES), batch_size=2)
    assert model_summary(network(), loader).layers[-1].outputs == [[2, 3]]
    with pytest.raises(ValueError, match=r"\[model_summary\] 0.weight has no shape yet"):
        model_summary(nn.Sequential(nn.LazyLinear(3)), IMAGES)
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got dict"):
        model_summary({}, IMAGES)  # type: ignore[arg-type]


# ---- check_initial_gradients


def test_gradient_norms_are_those_of_a_backward_by_hand() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    report = check_initial_gradients(model, nn.CrossEntropyLoss(), DataLoader(TensorDataset(x, y), batch_size=8))
    by_hand = copy.deepcopy(model)
    loss = F.cross_entropy(by_hand(x), y)
    loss.backward()
    assert report.loss == pytest.approx(loss.item())
    assert report.norms == {n: pytest.approx(float(p.grad.norm()), rel=1e-5) for n, p in by_hand.named_parameters()}
    assert report.findings == []
    assert report.passed
    assert "nothing found" in str(report)


def levels(report: Any) -> dict[str, str]:
    return {finding.where: finding.level for finding in report.findings}


def test_findings_of_vanishing_exploding_unconnected_and_dead() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large, self.unused = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 4)
            self.dead, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return 1e6 * self.large(x) + 1e-12 * self.small(x).sum() + torch.relu(self.dead(x) - 100).sum()

    report = check_initial_gradients(Model(), lambda model, x: model(x).mean(), torch.ones(3, 4))
    found = levels(report)
    assert found["large.weight"] == found["small.weight"] == found["unused.weight"] == found["dead.weight"] == "warning"
    text = str(report)
    assert "small.weight: gradient norm" in text
    assert "vanishing" in text
    assert "exploding" in text
    assert "unused.weight: no gradient" in text
    assert "dead.bias: the gradient is exactly 0" in text
    assert report.norms["unused.bias"] is None
    assert "frozen.weight" not in report.norms
    assert "2 frozen parameters" in text
    assert not report.passed
    relaxed = check_initial_gradients(Model(), lambda model, x: model(x).mean(), torch.ones(3, 4), low=1e-30, high=1e30)
    assert "large.weight" not in levels(relaxed)
    assert "small.weight" not in levels(relaxed)


def test_a_bias_in_front_of_a_batchnorm_is_no_vanishing_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    report = check_initial_gradients(model, nn.CrossEntropyLoss(), (torch.randn(4, 4).double(), CLASSES))
    assert levels(report) == {"0.bias": "note"}
    assert report.passed


def test_a_zeroed_residual_branch_is_as_it_should_be() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    nn.init.zeros_(model[1].weight)
    report = check_initial_gradients(model, nn.CrossEntropyLoss(), (torch.randn(4, 6), CLASSES))
    assert levels(report) == {"": "note"}
    assert "exactly 0, 0.weight the first" in str(report)


def test_a_zeroed_residual_branch_does_not_hide_a_dead_layer() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.branch, self.dead = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(self.branch(x)) + torch.relu(self.dead(x) - 100)

    model, x = Model(), torch.rand(3, 4)
    before = everything_of(model)
    report = check_initial_gradients(model, lambda model, x: model(x).square().mean(), x)
    assert levels(report) == {"dead.weight": "warning", "dead.bias": "warning", "": "note"}
    assert "2 gradients are exactly 0, branch.weight the first" in str(report)
    assert same(before, everything_of(model))


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = nn.Linear(2, 1)
    report = check_initial_gradients(model, lambda model, x: model(x).mean() / 0.0, torch.ones(3, 2))
    assert levels(report) == {"loss": "error", "weight": "error", "bias": "error"}
    assert report.to_json()["norms"]["weight"] is None
    assert report.to_json()["loss"] is None
    assert not math.isfinite(report.norms["weight"] or 0.0)


def test_gradients_that_cannot_be_looked_at() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"the loss must depend on the parameters"):
        check_initial_gradients(model, lambda model, x: model(x).detach().mean(), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"the loss must be a scalar, got shape \(3, 1\)"):
        check_initial_gradients(model, lambda model, x: model(x), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"0 <= low < high, got 1 and 0.5"):
        check_initial_gradients(model, nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)), low=1, high=0.5)
    with pytest.raises(ValueError, match=r"at least one parameter must be trained"):
        check_initial_gradients(nn.ReLU(), nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    with pytest.raises(TypeError, match=r"loss_fn must be"):
        check_initial_gradients(model, "mse", torch.ones(3, 2))


# ---- dead_relus


def test_dead_channels_and_features() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(216, 10), nn.ReLU())
    with torch.no_grad():
        model[0].bias[[1, 4]] = -1e3
        model[3].bias.fill_(5.0)
        model[3].weight[7], model[3].bias[7] = 0.0, -1.0
    found = dead_relus(model, DataLoader(TensorDataset(torch.rand(200, 3, 8, 8)), batch_size=64))
    assert [(each.name, each.units, each.dead) for each in found.layers] == [("1", 6, [1, 4]), ("4", 10, [7])]
    assert found.layers[0].share == 2 / 6
    assert found.samples == 200
    assert [(each.level, each.where) for each in found.findings] == [("warning", "1"), ("warning", "4")]


def test_a_unit_that_one_sample_wakes_is_not_dead() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[0].bias, 0.0)
    inputs = -torch.ones(150, 1)
    loader = DataLoader(TensorDataset(inputs), batch_size=15)
    assert dead_relus(model, loader).layers[0].dead == [0]
    inputs[149] = 1.0
    assert dead_relus(model, loader).layers[0].dead == []
    assert dead_relus(model, loader, batches=9).layers[0].dead == [0]  # of the first batches alone
    assert dead_relus(model, loader, batches=9).findings[0].level == "error"  # nothing passes


def test_a_shared_relu_and_features_of_sequences() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.relu = nn.Linear(4, 5), nn.Linear(5, 3), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.second(self.relu(self.first(x))))

    found = dead_relus(Model(), [torch.rand(2, 7, 4)])  # units are the last dimension behind a linear layer
    assert [(each.name, each.units) for each in found.layers] == [("relu", 5), ("relu#2", 3)]
    convolution = nn.Sequential(nn.Conv1d(4, 5, 1), nn.ReLU())
    assert dead_relus(convolution, [torch.rand(2, 4, 7)]).layers[0].units == 5
    assert "2 samples are few" in str(found)


def test_a_list_of_batches_and_units_behind_embeddings_and_recurrent_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    found = dead_relus(model, [(torch.rand(60, 4), torch.rand(60)), (torch.rand(40, 4), torch.rand(40))])
    assert (found.samples, found.layers[0].units) == (100, 5)
    tokens = torch.randint(9, (2, 7))
    assert dead_relus(nn.Sequential(nn.Embedding(9, 5), nn.ReLU()), tokens).layers[0].units == 5

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.gates, self.relu = nn.Conv1d(4, 4, 1), nn.GRU(7, 3, batch_first=True), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.gates(self.first(x))[0])

    assert dead_relus(Recurrent(), torch.rand(2, 4, 7)).layers[0].units == 3
    with pytest.raises(ValueError, match=r"must give a batch, got none"):
        dead_relus(model, [])


def test_functional_relus_are_counted_and_not_seen() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(torch.relu(self.module(x)).relu())

    found = dead_relus(Model(), [torch.rand(2, 7), torch.rand(2, 7)])
    assert "outside of modules, was not looked at: 3 a forward" in str(found)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)  # in eval mode it has a fused path
    assert "was not looked at: 1 a forward" in str(dead_relus(encoder, torch.rand(2, 3, 8)))
    assert "no ReLU was called" in str(dead_relus(nn.Linear(3, 3), torch.rand(2, 3)))


def test_dead_relus_of_nan_and_of_bad_input() -> None:
    found = dead_relus(nn.Sequential(nn.ReLU()), torch.full((200, 3), math.nan))
    assert found.findings[0].level == "error"
    assert "NaN" in found.findings[0].what
    assert not found.layers[0].dead
    with pytest.raises(ValueError, match=r"must give a batch, got none"):
        dead_relus(nn.ReLU(), DataLoader(TensorDataset(torch.rand(0, 3))))
    with pytest.raises(ValueError, match=r"batches must be an integer of at least 1, got 0"):
        dead_relus(nn.ReLU(), torch.rand(2, 3), batches=0)
    with pytest.raises(TypeError, match=r"batch must be a batch or a loader, got int"):
        dead_relus(nn.ReLU(), 3)
