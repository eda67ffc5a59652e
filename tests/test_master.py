# SPDX-License-Identifier: Apache-2.0
"""Master weights: fp32 copies of 16-bit parameters, made at the first step, remade where those changed."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import CASES
from support import bits, bits_of, checked_step, example, make, parameters, set_grads, values

every_optimizer = pytest.mark.parametrize("name", CASES)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def optimizer(name, params, backend, **settings):
    return make(name, params, backend=backend, master_weights=True, **(example(name) | settings))


def train(opt, seeds):
    params = [p for group in opt.param_groups for p in group["params"]]
    for seed in seeds:
        set_grads(params, seed=seed)
        checked_step(opt)


@every_dtype
@every_optimizer
def test_made_at_the_first_step_from_the_parameter(name, dtype, backend):
    params = parameters(dtype=dtype)
    opt = optimizer(name, params, backend)
    assert not opt.state
    train(opt, [1])
    for p in params:
        master = opt.state[p]["master_param"]
        assert master.dtype == torch.float32
        assert master.stride() == p.stride()
        assert bits(master.to(dtype)) == bits(p)


@every_dtype
@every_optimizer
def test_small_updates_add_up(name, dtype, backend):
    """Each update is below half an ulp of the parameter: without a master it would never move."""
    outcomes = {}
    for master in (True, False):
        p = torch.nn.Parameter(torch.ones(64, dtype=dtype))
        plain = {"lr": torch.finfo(dtype).eps / 8, "weight_decay": 0.0}  # a quarter of an ulp below 1
        opt = make(name, [p], backend=backend, master_weights=master, **plain)
        for _ in range(8):
            p.grad = torch.ones(64, dtype=dtype)
            opt.step()
        outcomes[master] = p.detach().float()
    assert (outcomes[False] == 1).all()
    assert (outcomes[True] < 1).all()


@every_optimizer
def test_states_are_fp32(name, backend):
    params = parameters(dtype=torch.bfloat16)
    opt = optimizer(name, params, backend)
    train(opt, [1])
    for p in params:
        assert all(opt.state[p][key].dtype == torch.float32 for key in CASES[name].states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_optimizer
def test_wide_parameters_have_no_master(name, dtype, backend):
    params = parameters(dtype=dtype)
    opt = optimizer(name, params, backend)
    train(opt, [1, 2])
    assert all("master_param" not in state for state in opt.state.values())


@every_dtype
@every_optimizer
def test_remade_when_the_parameter_was_changed_from_outside(name, dtype, backend):
    params = parameters(dtype=dtype)
    opt = optimizer(name, params, backend)
    train(opt, [1, 2])
    kept = bits(opt.state[params[1]]["master_param"])
    old = params[0].detach().clone()
    with torch.no_grad():
        params[0].copy_(values(params[0].shape, dtype))
    new = params[0].detach().clone()
    set_grads(params)
    for p in params:
        p.grad.zero_()
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    master = opt.state[params[0]]["master_param"]
    assert bits(master.to(dtype)) == bits(new)
    assert bits(master[new != old]) == bits(new[new != old].float())
    assert bits(opt.state[params[1]]["master_param"]) == kept, "one that did not change keeps its low bits"


@every_dtype
@every_optimizer
def test_elements_that_did_not_change_keep_their_low_bits(name, dtype, backend):
    """A mask applied to the parameter changes some elements; the others' masters are still right."""
    params = parameters(((64,),), dtype)
    opt = optimizer(name, params, backend)
    train(opt, [1, 2])
    master = opt.state[params[0]]["master_param"].clone()
    assert (master != master.to(dtype).float()).any(), "there are low bits to keep"
    with torch.no_grad():
        params[0][::2] = 0
    opt.param_groups[0]["lr"] = 0.0
    params[0].grad = torch.zeros_like(params[0])
    opt.step()
    now = opt.state[params[0]]["master_param"]
    assert (now[::2] == 0).all()
    assert bits(now[1::2].contiguous()) == bits(master[1::2].contiguous())


@every_optimizer
def test_an_in_place_operation_without_effect_keeps_the_master(name, backend):
    """The version counter moves, the values do not."""
    params = parameters(((64,),), torch.bfloat16)
    opt = optimizer(name, params, backend)
    train(opt, [1, 2])
    master = bits(opt.state[params[0]]["master_param"])
    with torch.no_grad():
        params[0].mul_(1.0)
    opt.param_groups[0]["lr"] = 0.0
    params[0].grad = torch.zeros_like(params[0])
    opt.step()
    assert bits(opt.state[params[0]]["master_param"]) == master


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@every_dtype
@every_optimizer
def test_a_checkpoint_round_trip_in_either_order_continues_bitwise(name, dtype, order, backend, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5).to(dtype)
    opt = optimizer(name, model.parameters(), backend)
    train(opt, [1, 2, 3])
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.manual_seed(9)
    other_model = torch.nn.Linear(6, 5).to(dtype)
    other = optimizer(name, other_model.parameters(), backend)
    loads = [
        lambda: other_model.load_state_dict(saved["model"]),
        lambda: other.load_state_dict(saved["optimizer"]),
    ]
    for load in loads if order == "model first" else reversed(loads):
        load()
    train(opt, [4, 5])
    train(other, [4, 5])
    assert bits_of(other) == bits_of(opt)


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@every_optimizer
def test_a_checkpoint_loaded_into_an_optimizer_that_has_stepped(name, order, backend):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5).to(torch.bfloat16)
    opt = optimizer(name, model.parameters(), backend)
    train(opt, [1, 2])
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    train(opt, [3, 4])
    wanted = bits_of(opt)
    train(opt, [5])
    loads = [lambda: model.load_state_dict(weights), lambda: opt.load_state_dict(states)]
    for load in loads if order == "model first" else reversed(loads):
        load()
    train(opt, [3, 4])
    assert bits_of(opt) == wanted


@every_optimizer
def test_a_model_loaded_later_is_trained_from_what_it_holds(name, backend):
    """Only the model is loaded, after steps: the master of the old weights must not come back."""
    model = torch.nn.Linear(6, 5).to(torch.bfloat16)
    opt = optimizer(name, model.parameters(), backend)
    train(opt, [1, 2])
    model.load_state_dict({"weight": torch.full((5, 6), 3.0), "bias": torch.full((5,), -3.0)})
    set_grads(list(model.parameters()))
    opt.step()
    assert (model.weight - 3).abs().max() < 1
    assert (model.bias + 3).abs().max() < 1


@every_optimizer
def test_without_master_weights_a_checkpoint_with_masters_loads(name, backend):
    params = parameters(dtype=torch.bfloat16)
    opt = optimizer(name, params, backend)
    train(opt, [1, 2])
    plain = make(name, params, backend=backend, **example(name))
    plain.load_state_dict(opt.state_dict())
    set_grads(params)
    plain.step()
    assert all(p.isfinite().all() for p in params)


@every_optimizer
def test_torchs_checkpoint_gains_masters(name, backend):
    """bf16 training with torch.optim continues with master weights from here on."""
    params = parameters(dtype=torch.bfloat16)
    theirs = getattr(torch.optim, name)(params, **example(name))
    set_grads(params)
    theirs.step()
    opt = optimizer(name, params, backend)
    opt.load_state_dict(theirs.state_dict())
    set_grads(params)
    opt.step()
    for p in params:
        assert bits(opt.state[p]["master_param"].to(torch.bfloat16)) == bits(p)


@every_optimizer
def test_a_skipped_step_leaves_the_master(name, backend):
    params = parameters(dtype=torch.bfloat16)
    opt = optimizer(name, params, backend, max_grad_norm=1.0)
    train(opt, [1])
    before = bits_of(opt, grads=False)
    set_grads(params)
    params[1].grad[2] = float("nan")
    opt.step()
    assert bits_of(opt, grads=False) == before
