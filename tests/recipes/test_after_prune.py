# SPDX-License-Identifier: Apache-2.0
"""prune: how many, which, for good, and zero through further training."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import fastloop
from fastloop.recipes.after import prune


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def test_the_smallest_of_all_layers_together() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    made = prune(model, 0.3)
    weights = torch.cat([before[f"{i}.weight"].flatten() for i in (0, 4, 6)])
    threshold = weights.abs().sort().values[round(0.3 * len(weights)) - 1]
    for i in (0, 4, 6):
        old, new = before[f"{i}.weight"], model[i].weight
        assert torch.equal(new, torch.where(old.abs() <= threshold, 0, old))
        assert made.sparsity[str(i)] == pytest.approx(float((old.abs() <= threshold).double().mean()))
        assert torch.equal(model[i].bias, before[f"{i}.bias"])
    assert torch.equal(model[1].weight, before["1.weight"])
    assert (made.pruned, made.total) == (round(0.3 * len(weights)), len(weights))
    assert list(map(id, model.parameters())) == parameters
    assert set(model.state_dict()) == set(before)  # nothing of a reparametrization
    assert len(set(made.sparsity.values())) > 1  # global: layers differ
    assert "share of zeros" in str(made)
    assert "masks" not in made.to_json()


def test_equal_weights_are_pruned_exactly_as_many() -> None:
    layer = nn.Linear(10, 10)
    nn.init.constant_(layer.weight, 0.5)
    assert prune(layer, 0.37).pruned == 37
    assert prune(layer, 0.5).pruned == 50  # those that are zero count
    assert prune(layer, 0.1).pruned == 50


def test_random_follows_the_global_seed() -> None:
    chosen = []
    for seed in (1, 1, 2):
        model = network()
        torch.manual_seed(seed)
        assert prune(model, 0.5, method="random").pruned == round(0.5 * (216 + 512 + 64))
        chosen.append(model[4].weight == 0)
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_channels_with_their_biases_and_not_the_last_layer() -> None:
    model = network()
    norms = model[0].weight.detach().flatten(1).norm(dim=1)
    last = model[6].weight.clone()
    made = prune(model, 0.25, structured=True)
    smallest = norms.argsort()[:2]
    zero = (model[0].weight == 0).flatten(1).all(1)
    assert set(zero.nonzero().flatten().tolist()) == set(smallest.tolist())
    assert (model[0].bias[zero] == 0).all()
    assert (model[0].bias[~zero] != 0).all()
    assert made.sparsity == {"0": 0.25, "4": 0.25}
    assert torch.equal(model[6].weight, last)
    assert any(f.where == "6" for f in made.findings)
    x = torch.randn(2, 3, 4, 4)
    assert (model[0](x)[:, zero] == 0).all()
    assert prune(model, 0.5, structured=True, only="6").sparsity == {"6": 0.5}
    assert prune(network(), 0.99, structured=True).sparsity["0"] == 7 / 8  # never all


def test_only_takes_patterns() -> None:
    assert set(prune(network(), 0.5, only=["4", "6"]).sparsity) == {"4", "6"}
    assert set(prune(network(), 0.5, only="[46]").sparsity) == {"4", "6"}
    with pytest.raises(ValueError, match=r"only='head\.\*' fits no .* they are: 0, 4, 6"):
        prune(network(), 0.5, only=["4", "head.*"])


def test_zeros_stay_zero_through_training() -> None:
    """In Loop, with momentum and fastloop's own optimizer, and in a loop of one's own with torch's."""
    x, y = torch.randn(32, 3, 4, 4), torch.randint(4, (32,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    model = network()
    optimizer = fastloop.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop = fastloop.Loop(model, optimizer, nn.CrossEntropyLoss(), run_dir=None)
    loop.fit(loader, epochs=1)
    made = prune(model, 0.6)
    zero, before = model[4].weight == 0, model[4].weight.clone()
    handle = made.keep(optimizer)
    loop.fit(loader, epochs=2)
    assert (model[4].weight[zero] == 0).all()
    assert (model[4].weight != before).any()
    handle.remove()
    loop.fit(loader, epochs=3)
    assert (model[4].weight[zero] != 0).any()

    model = network()
    plain = torch.optim.Adam(model.parameters(), lr=0.1)
    made = prune(model, 0.5, structured=True)
    made.keep(plain)
    zero = model[0].weight == 0
    for _ in range(3):
        nn.functional.cross_entropy(model(x), y).backward()
        plain.step()
        assert (model[0].weight[zero] == 0).all()


def test_keep_wants_the_optimizer_of_the_model() -> None:
    with pytest.raises(ValueError, match="none of its weights"):
        prune(network(), 0.5).keep(torch.optim.SGD(network().parameters(), lr=0.1))


def test_tied_and_computed_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight
            parametrizations.weight_norm(self.c)

    made = prune(Tied(), 0.5)
    assert (made.total, list(made.sparsity)) == (64, ["a"])
    assert any(f.where == "c" and "computed" in f.what for f in made.findings)


def test_transposed_convolutions() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.Linear(4, 4))
    assert prune(model, 0.5).total == 72 + 16
    made = prune(nn.Sequential(nn.Linear(4, 4), nn.ConvTranspose2d(2, 4, 3)), 0.5, structured=True)
    assert made.sparsity == {"0": 0.5}
    with pytest.raises(NotImplementedError, match="transposed"):
        prune(model, 0.5, structured=True, only="0")


@pytest.mark.parametrize("amount", [0, 1, -0.1, 1.5, 3, True, "0.5", math.nan])
def test_amount_is_a_share(amount: Any) -> None:
    with pytest.raises(ValueError, match="share in"):
        prune(network(), amount)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="method must be"):
        prune(network(), 0.5, method="l1")
    with pytest.raises(ValueError, match="no linear or convolution"):
        prune(nn.ReLU(), 0.5)
    with pytest.raises(ValueError, match="no linear or convolution"):
        prune(nn.Linear(2, 2), 0.5, structured=True)  # the last layer is all there is
    with pytest.raises(ValueError, match="run one batch"):
        prune(nn.LazyLinear(3), 0.5)
    broken = network()
    with torch.no_grad():
        broken[4].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="4's weights must be finite"):
        prune(broken, 0.5)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        prune(None, 0.5)
