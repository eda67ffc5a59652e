# SPDX-License-Identifier: Apache-2.0
"""The exponential moving average of the parameters: ema = d*ema + (1-d)*p, starting at p, in fp32."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from cases import CASES
from support import bits, bits_of, checked_step, example, make, parameters, set_grads, values

every_optimizer = pytest.mark.parametrize("name", CASES)


class Net(torch.nn.Module):
    """Parameters, a tied one, a frozen one, persistent and other buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(5, 3)
        self.norm = torch.nn.BatchNorm1d(3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


def net_and_optimizer(name, backend, **settings):
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    return net, make(name, trained, backend=backend, **(example(name) | {"ema_decay": 0.9} | settings))


def train(net, opt, steps=3):
    for step in range(steps):
        torch.manual_seed(step)
        net.zero_grad()
        net(torch.randint(0, 5, (16,))).square().mean().backward()
        opt.step()


@every_optimizer
def test_the_average_starts_at_the_parameter(name, backend):
    params = parameters(((5, 3), (4,)))
    opt = make(name, params, backend=backend, ema_decay=0.75, **(example(name) | {"lr": 0.0}))
    set_grads(params)
    opt.step()
    for p in params:
        torch.testing.assert_close(opt.state[p]["ema"], p.detach(), rtol=2**-22, atol=0)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
@every_optimizer
def test_the_formula(name, decay, backend):
    params = parameters()
    opt = make(name, params, backend=backend, ema_decay=decay, **(example(name) | {"lr": 0.1}))
    for _ in range(4):
        set_grads(params)
        checked_step(opt)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_optimizer
def test_the_average_is_fp32_with_16_bit_parameters(name, dtype, master, backend):
    """In bf16 an average at 0.9999 would never move: 1e-4 of a change is below half an ulp."""
    params = parameters(((50,),), dtype)
    opt = make(
        name,
        params,
        backend=backend,
        ema_decay=0.9999,
        master_weights=master,
        **(example(name) | {"lr": 0.5}),
    )
    set_grads(params)
    checked_step(opt)
    average = opt.state[params[0]]["ema"].clone()
    assert average.dtype == torch.float32
    set_grads(params)
    checked_step(opt)
    moved = opt.state[params[0]]["ema"] != average
    assert moved.float().mean() > 0.9


@every_optimizer
def test_a_skipped_step_leaves_the_average(name, backend):
    params = parameters(((5, 3), (4,)))
    opt = make(name, params, backend=backend, ema_decay=0.5, max_grad_norm=1.0, **example(name))
    set_grads(params)
    opt.step()
    before = [bits(opt.state[p]["ema"]) for p in params]
    set_grads(params)
    params[0].grad[0, 0] = math.nan
    opt.step()
    assert [bits(opt.state[p]["ema"]) for p in params] == before


@every_optimizer
def test_without_ema_decay_there_is_no_average(name, backend):
    net, opt = net_and_optimizer(name, backend, ema_decay=None)
    train(net, opt, 1)
    assert all("ema" not in state for state in opt.state.values())
    with pytest.raises(RuntimeError, match=rf"\[{name}\].*ema_decay"):
        opt.ema_state_dict(net)
    with pytest.raises(RuntimeError, match=rf"\[{name}\].*ema_decay"):
        opt.ema_weights().__enter__()


@every_optimizer
def test_ema_state_dict_has_the_models_keys(name, backend):
    net, opt = net_and_optimizer(name, backend)
    train(net, opt)
    averaged, plain = opt.ema_state_dict(net), net.state_dict()
    assert list(averaged) == list(plain)
    for key, value in plain.items():
        assert averaged[key].shape == value.shape
    for key, p in net.named_parameters(remove_duplicate=False):
        if p.requires_grad:
            assert bits(averaged[key]) == bits(opt.state[p]["ema"])
            assert bits(averaged[key]) != bits(p)
    assert bits(averaged["frozen"]) == bits(net.frozen)
    assert bits(averaged["norm.running_mean"]) == bits(net.norm.running_mean)
    other = Net()
    other.load_state_dict(averaged)
    assert bits(other.head.weight) == bits(opt.state[net.head.weight]["ema"])


@every_optimizer
def test_ema_state_dict_has_live_buffers(name, backend):
    """Statistics of batch norm are the model's current ones, not a copy from some earlier step."""
    net, opt = net_and_optimizer(name, backend)
    train(net, opt)
    net.norm.running_mean.fill_(7.0)
    averaged = opt.ema_state_dict(net)
    assert (averaged["norm.running_mean"] == 7).all()


@every_optimizer
def test_ema_state_dict_before_the_first_step_is_the_model(name, backend):
    net, opt = net_and_optimizer(name, backend)
    averaged = opt.ema_state_dict(net)
    assert {k: v.tolist() for k, v in averaged.items()} == {k: v.tolist() for k, v in net.state_dict().items()}


@every_optimizer
def test_training_on_does_not_change_a_state_dict_that_was_cloned(name, backend):
    net, opt = net_and_optimizer(name, backend)
    train(net, opt)
    saved = {k: v.clone() for k, v in opt.ema_state_dict(net).items()}
    train(net, opt)
    assert bits(saved["head.weight"]) != bits(opt.ema_state_dict(net)["head.weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_ema_weights_swaps_in_and_back(name, dtype, backend):
    net = Net().to(dtype)
    opt = make(name, [p for p in net.parameters() if p.requires_grad], backend=backend, ema_decay=0.9,
               master_weights=True, **example(name))  # fmt: skip
    train(net, opt)
    before, states = [bits(p) for p in net.parameters()], bits_of(opt)
    identities = [id(p) for p in net.parameters()]
    with opt.ema_weights():
        assert [id(p) for p in net.parameters()] == identities
        for p in net.parameters():
            if p.requires_grad:
                assert bits(p) == bits(opt.state[p]["ema"].to(dtype))
        net.eval()(torch.arange(5))
    assert [bits(p) for p in net.parameters()] == before
    assert bits_of(opt) == states


@every_optimizer
def test_ema_weights_swaps_back_after_an_exception(name, backend):
    net, opt = net_and_optimizer(name, backend)
    train(net, opt)
    before = bits_of(opt)
    with pytest.raises(ZeroDivisionError), opt.ema_weights():
        raise ZeroDivisionError
    assert bits_of(opt) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_training_continues_after_ema_weights_as_if_nothing_had_been(name, dtype, backend):
    """In particular no master copy is remade: the swap is not a change from outside."""
    outcomes = []
    for look in (False, True):
        net = Net().to(dtype)
        opt = make(name, [p for p in net.parameters() if p.requires_grad], backend=backend, ema_decay=0.9,
                   master_weights=True, **example(name))  # fmt: skip
        train(net, opt)
        if look:
            with opt.ema_weights():
                pass
        train(net, opt)
        outcomes.append(bits_of(opt))
    assert outcomes[0] == outcomes[1]


@every_optimizer
def test_the_average_survives_a_checkpoint(name, backend):
    net, opt = net_and_optimizer(name, backend)
    train(net, opt)
    other_net = copy.deepcopy(net)
    other = make(name, [p for p in other_net.parameters() if p.requires_grad], backend=backend, ema_decay=0.9,
                 **example(name))  # fmt: skip
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(net, opt)
    train(other_net, other)
    assert bits_of(other) == bits_of(opt)


@every_optimizer
def test_ema_of_parameters_without_gradient_is_the_parameter(name, backend):
    params = parameters(((3,), (4,)))
    opt = make(name, params, backend=backend, ema_decay=0.5, **example(name))
    params[0].grad = values((3,))
    opt.step()
    with opt.ema_weights():
        pass
    before = bits(params[1])
    with opt.ema_weights():
        assert bits(params[1]) == before
