# SPDX-License-Identifier: Apache-2.0
"""initialize_weights: measured standard deviations against the formula, and what each kind of layer gets."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from fastloop.recipes.model import initialize_weights


def std(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().std())


def within(tensor: torch.Tensor, wanted: float) -> bool:
    """5 standard errors of a normal's standard deviation."""
    return abs(std(tensor) / wanted - 1) < 5 / math.sqrt(2 * tensor.numel())


def test_convolutions_keep_the_gradients_and_linear_layers_the_activations() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.Conv2d(64, 32, 5, groups=4), nn.ConvTranspose2d(32, 16, 4, stride=2),
        nn.Linear(300, 200), nn.Linear(200, 100),
    )  # fmt: skip
    for module in model:
        nn.init.constant_(module.bias, 7.0)
    done = initialize_weights(model, seed=0)
    root2 = math.sqrt(2)
    assert within(model[0].weight, root2 / math.sqrt(64 * 9))
    assert within(model[1].weight, root2 / math.sqrt(32 // 4 * 25))  # torch's own fan_out forgets the groups
    assert within(model[2].weight, root2 / math.sqrt(32 * 16 / 4))
    assert within(model[3].weight, root2 / math.sqrt(300))
    assert within(model[4].weight, 1 / math.sqrt(200))  # no activation follows the last one
    assert all(not module.bias.any() for module in model)
    patches = nn.Sequential(nn.Conv2d(3, 192, 16, stride=16), nn.Linear(3, 3))
    initialize_weights(patches, seed=0)
    assert within(patches[0].weight, root2 / math.sqrt(192))  # a pixel is in one patch
    assert set(done) == dict(model.named_parameters()).keys()
    assert "fan_out 576" in done["0.weight"]
    assert "the last layer" in done["4.weight"]
    assert done["4.bias"] == "0"


@pytest.mark.parametrize("depth", [30])
def test_activations_of_a_deep_relu_network_keep_their_size(depth: int) -> None:
    """What He's rule is for; with torch's default the last of 30 layers would be 1e-7 of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[layer for _ in range(depth) for layer in (nn.Linear(256, 256), nn.ReLU())], nn.Linear(256, 1)
    )
    initialize_weights(model, seed=1)
    with torch.no_grad():
        hidden = model[:-1](torch.randn(128, 256))
    assert 0.3 < float(hidden.square().mean()) < 3


@pytest.mark.parametrize(("nonlinearity", "gain"), [("tanh", 5 / 3), ("gelu", math.sqrt(2)), ("linear", 1.0)])
def test_the_gain_follows_the_nonlinearity(nonlinearity: str, gain: float) -> None:
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 10))
    initialize_weights(model, nonlinearity=nonlinearity, seed=0)
    assert within(model[0].weight, gain / 20)


def test_norms_embeddings_and_what_is_not_known() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.full((3,), 5.0))
            self.embedding = nn.Embedding(500, 64, padding_idx=2)
            self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4)])
            self.plain = nn.BatchNorm1d(4, affine=False)

    model = Model()
    for norm in model.norms:
        nn.init.constant_(norm.weight, 3.0)
    done = initialize_weights(model, embedding_std=0.05, seed=0)
    assert all(bool((norm.weight == 1).all()) for norm in model.norms)
    assert not model.norms[1].bias.any()
    assert not model.embedding.weight[2].any()
    assert within(model.embedding.weight[3:], 0.05)
    assert bool((model.token == 5).all())
    assert done["token"] == "unchanged (Model)"
    assert set(done) == dict(model.named_parameters()).keys()


def test_gates_of_an_lstm() -> None:
    lstm = nn.LSTM(20, 16, num_layers=2, bidirectional=True)
    done = initialize_weights(lstm, seed=0)
    for name, parameter in lstm.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.detach().chunk(4):
                assert torch.allclose(gate @ gate.T, torch.eye(16), atol=1e-5)
        elif name.startswith("weight_ih"):
            bound = math.sqrt(6 / (parameter.shape[1] + 16))
            assert 0.95 * bound < float(parameter.detach().abs().max()) <= bound
        else:  # the two are added: the forget gate's sum is 1, and not 2
            wanted = torch.zeros(64)
            wanted[16:32] = float(name.startswith("bias_ih"))
            assert torch.equal(parameter.detach(), wanted)
    assert done["weight_hh_l1_reverse"] == "orthogonal, for each gate"


@pytest.mark.parametrize("kind", [nn.GRU, nn.RNN, nn.GRUCell, nn.LSTMCell])
def test_other_recurrent_layers(kind: type) -> None:
    layer = kind(6, 5)
    initialize_weights(layer, seed=0)
    hidden = next(p for n, p in layer.named_parameters() if n.startswith("weight_hh")).detach()
    assert torch.allclose(hidden[:5] @ hidden[:5].T, torch.eye(5), atol=1e-5)
    forget = 1.0 if kind is nn.LSTMCell else 0.0
    assert {float(p.detach().sum()) for n, p in layer.named_parameters() if "bias_ih" in n} == {5 * forget}
    assert {float(p.detach().sum()) for n, p in layer.named_parameters() if "bias_hh" in n} == {0.0}


def test_attention_is_xavier_by_projection() -> None:
    attention = nn.MultiheadAttention(48, 4)
    done = initialize_weights(attention, seed=0)
    bound = math.sqrt(6 / 96)
    for part in attention.in_proj_weight.detach().chunk(3):
        assert 0.95 * bound < float(part.abs().max()) <= bound
    assert done["out_proj.weight"] == "Xavier uniform"
    assert not attention.in_proj_bias.any()


# ---- residual branches


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None if inputs == outputs else nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        around = x if self.down is None else self.down(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += around
        return self.relu(out)


def test_residual_zero_finds_the_last_norm_of_each_branch_and_no_other() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Block(8, 8), Block(8, 16))
    done = initialize_weights(model, residual_zero=True, seed=0)
    zero = {name for name, p in model.named_parameters() if name.endswith("weight") and not p.any()}
    assert zero == {"2.bn2.weight", "3.bn2.weight"}
    assert done["2.bn2.weight"] == "0, residual"
    x = torch.rand(2, 8, 5, 5)
    assert torch.equal(model[2].eval()(x), x)  # the block begins as the identity
    again = nn.Sequential(Block(8, 8), Block(8, 8))
    initialize_weights(again, residual_zero=["1.bn*"])
    assert again[0].bn2.weight.all()
    assert not again[1].bn1.weight.any()
    assert not again[1].bn2.weight.any()


class DropPath(nn.Module):
    """As timm's: its forward is no operation that a norm could be looked for behind."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.new_empty(x.shape[0], 1).bernoulli_(0.9)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.linear, self.norm, self.drop = 0, nn.Linear(3, 3), nn.BatchNorm1d(3), DropPath()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen += 1
        return x + self.drop(self.norm(self.linear(x))) + torch.rand(1)


def test_residual_zero_follows_stochastic_depth_and_leaves_what_a_forward_changes() -> None:
    model, before = Counting(), torch.get_rng_state()
    assert initialize_weights(model, residual_zero=True, seed=0)["norm.weight"] == "0, residual"
    assert (model.calls, float(model.seen)) == (0, 0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_residual_zero_that_finds_nothing_says_so() -> None:
    with pytest.raises(ValueError, match=r"no residual branch ends with a normalization"):
        initialize_weights(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), residual_zero=True)
    with pytest.raises(ValueError, match=r"no normalization is called 'x\*'; there are 0\.bn1"):
        initialize_weights(nn.Sequential(Block(4, 4)), residual_zero=["x*"])
    with pytest.raises(TypeError, match=r"residual_zero must be"):
        initialize_weights(nn.Sequential(Block(4, 4)), residual_zero="bn2")

    class Deciding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"cannot follow this model's forward"):
        initialize_weights(Deciding(), residual_zero=True)


# ---- tied, frozen, parametrized, lazy


def test_tied_frozen_and_parametrized() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 400, bias=False)
            self.embedding = nn.Embedding(400, 64)
            self.head.weight = self.embedding.weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.normed = parametrizations.weight_norm(nn.Linear(100, 100))

    model = Model()
    before = copy.deepcopy(model.frozen.state_dict())
    done = initialize_weights(model, seed=0)
    assert model.head.weight is model.embedding.weight
    assert within(model.embedding.weight, 0.02)
    assert done["head.weight"] == "normal, std 0.02"
    assert done["embedding.weight"] == "tied to head.weight"
    assert done["frozen.weight"] == "unchanged (frozen)"
    assert all(torch.equal(before[key], value) for key, value in model.frozen.state_dict().items())
    assert within(model.normed.weight, 1 / 10)  # the last layer, through weight_norm's inverse
    assert "normed.parametrizations.weight.original0" in done

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Doubled())
    with pytest.raises(ValueError, match=r"parametrizations.weight.original belongs to a parametrization"):
        initialize_weights(layer)


def test_further_parameters_of_a_known_layer_stay_and_shared_layers_are_named() -> None:
    def more(layer: nn.Module) -> nn.Module:
        layer.extra = nn.Parameter(torch.full((3,), 0.25))
        return layer

    layers = [nn.LayerNorm(4), nn.LSTM(2, 2), nn.GRUCell(2, 2), nn.MultiheadAttention(4, 2), nn.Embedding(3, 2)]
    model = nn.ModuleList([more(layer) for layer in layers])
    done = initialize_weights(model, seed=0)
    for layer, name in zip(model, done, strict=False):
        assert bool((layer.extra == 0.25).all()), name
    assert [text for name, text in done.items() if name.endswith("extra")] == [
        f"unchanged ({type(layer).__name__})" for layer in layers
    ]
    shared = nn.Linear(3, 3)
    assert initialize_weights(nn.ModuleDict({"a": shared, "b": shared}))["b.weight"] == "tied to a.weight"


def test_what_cannot_be_initialized_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0.weight has no shape yet; call the model once"):
        initialize_weights(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"weight is on the device meta"):
        initialize_weights(nn.Linear(3, 3, device="meta"))
    with pytest.raises(ValueError, match=r"nonlinearity must be one of relu, .* got 'swish'"):
        initialize_weights(nn.Linear(3, 3), nonlinearity="swish")
    with pytest.raises(ValueError, match=r"embedding_std must be at least 0, got -1"):
        initialize_weights(nn.Linear(3, 3), embedding_std=-1)
    with pytest.raises(TypeError, match=r"model must be an nn.Module"):
        initialize_weights([nn.Linear(3, 3)])  # type: ignore[arg-type]


def test_a_seed_leaves_the_global_state_alone_and_gives_the_same_values_in_every_dtype() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.LSTM(4, 4), nn.Embedding(7, 3))
    half = copy.deepcopy(model).bfloat16()
    before = torch.get_rng_state()
    initialize_weights(model, seed=3)
    initialize_weights(half, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(model.parameters(), half.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)
    initialize_weights(model)
    assert not torch.equal(torch.get_rng_state(), before)
