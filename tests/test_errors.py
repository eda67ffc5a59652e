# SPDX-License-Identifier: Apache-2.0
"""Bad input gets a clear error before anything is written: where, what was wanted, what came, what to do."""

from __future__ import annotations

import math

import pytest
import torch
from cases import CASES
from support import bits, bits_of, checked_step, example, make, parameters, set_grads, values

import fastloop

every_optimizer = pytest.mark.parametrize("name", CASES)
NAN = math.nan

# argument, value, exception
OURS = [
    ("max_grad_norm", 0.0, ValueError),
    ("max_grad_norm", -1.0, ValueError),
    ("max_grad_norm", NAN, ValueError),
    ("max_grad_norm", "big", TypeError),
    ("max_grad_value", 0.0, ValueError),
    ("max_grad_value", -1.0, ValueError),
    ("max_grad_value", NAN, ValueError),
    ("ema_decay", -0.1, ValueError),
    ("ema_decay", 1.0, ValueError),
    ("ema_decay", NAN, ValueError),
    ("state_dtype", torch.int32, ValueError),
    ("state_dtype", torch.float16, ValueError),
    ("state_dtype", "bf16", (TypeError, ValueError)),
    ("backend", "gpu", ValueError),
    ("backend", None, (TypeError, ValueError)),
]
TORCHS = {
    "lr": [-1.0, NAN, torch.tensor([0.1, 0.2])],
    "eps": [-1e-8, NAN],
    "betas": [(1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN)],
    "weight_decay": [-0.1, NAN],
    "momentum": [-0.9, NAN],
}


@pytest.mark.parametrize(("argument", "value", "exception"), OURS, ids=lambda x: str(x))
@every_optimizer
def test_wrong_arguments_of_ours(name, argument, value, exception):
    with pytest.raises(exception, match=rf"^\[{name}\] .*{argument}.*got") as error:
        make(name, parameters(), **{argument: value})
    assert str(value) in str(error.value) or repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        pytest.param(name, argument, value, id=f"{name}-{argument}-{value}")
        for name, case in CASES.items()
        for argument, wrong in TORCHS.items()
        if argument in case.defaults
        for value in wrong
    ],
)
def test_wrong_hyperparameters(name, argument, value):
    """An error where torch raises one, and where torch lets a NaN through unseen."""
    with pytest.raises(ValueError, match=rf"^\[{name}\] .*{argument if argument != 'betas' else 'beta'}"):
        make(name, parameters(), **{argument: value})


def test_wrong_settings_of_one_group():
    with pytest.raises(ValueError, match=r"^\[AdamW\] .*max_grad_norm"):
        fastloop.AdamW([{"params": parameters(), "max_grad_norm": 0.0}])
    opt = fastloop.AdamW(parameters())
    with pytest.raises(ValueError, match=r"^\[AdamW\] .*ema_decay"):
        opt.add_param_group({"params": parameters(), "ema_decay": -1.0})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.5)])
def test_nesterov_needs_a_momentum_and_no_dampening(momentum, dampening):
    with pytest.raises(ValueError, match=r"^\[SGD\] .*[Nn]esterov"):
        fastloop.SGD(parameters(), momentum=momentum, dampening=dampening, nesterov=True)


def test_betas_of_one_tensor_and_one_float_raise_as_in_torch():
    with pytest.raises(ValueError, match="betas"):
        fastloop.AdamW(parameters(), betas=(torch.tensor(0.9), 0.999))


@every_optimizer
def test_a_misspelt_argument_is_a_type_error(name):
    with pytest.raises(TypeError, match="max_norm"):
        make(name, parameters(), max_norm=1.0)
    with pytest.raises(TypeError):
        make(name, parameters(), 1e-3, *([0] * 8))


@every_optimizer
def test_fused_and_foreach_are_accepted_and_change_nothing(name, backend):
    outcomes = []
    for flags in ({}, {"fused": True}, {"foreach": True}, {"fused": False, "foreach": False}):
        torch.manual_seed(0)
        params = parameters(((5, 3), (4,)))
        opt = make(name, params, backend=backend, **flags, **example(name))
        set_grads(params)
        opt.step()
        outcomes.append(bits_of(opt))
    assert all(outcome == outcomes[0] for outcome in outcomes)


def test_no_parameters():
    with pytest.raises(ValueError, match="empty"):
        fastloop.AdamW([])
    with pytest.raises(TypeError):
        fastloop.AdamW(torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(TypeError):
        fastloop.AdamW([1.0])


def test_a_parameter_in_two_groups():
    (p,) = parameters(((3,),))
    with pytest.raises(ValueError, match="more than one parameter group"):
        fastloop.AdamW([{"params": [p]}, {"params": [p]}])


@pytest.mark.parametrize(
    ("key", "value"),
    [("state_dtype", torch.float32), ("master_weights", True), ("zero_grads", True), ("backend", "cpu")],
)
@every_optimizer
def test_settings_of_the_whole_optimizer_in_one_group_raise(name, key, value):
    """Better than to be ignored."""
    with pytest.raises(ValueError, match=rf"^\[{name}\] {key} "):
        make(name, [{"params": parameters(), key: value}])


# -- backends ------------------------------------------------------------------------------------------------


@every_optimizer
def test_an_unknown_backend_names_the_known(name):
    with pytest.raises(ValueError, match=rf"^\[{name}\] .*backend.*auto.*cpu.*reference.*'gpu'"):
        make(name, parameters(), backend="gpu")


@pytest.mark.parametrize("wanted", ["cpu", "cuda", "triton"])
@every_optimizer
def test_an_unavailable_backend_raises_with_its_reason(name, wanted):
    status = fastloop.backends()[wanted]
    if status["available"]:
        pytest.skip(f"backend {wanted!r} is available here; this needs a machine that lacks it")
    with pytest.raises((RuntimeError, ValueError)) as error:
        make(name, parameters(), backend=wanted)
    assert str(error.value).startswith(f"[{name}]")
    assert wanted in str(error.value)
    assert status["reason"] in str(error.value)


def test_the_cpu_backend_refuses_what_it_cannot_serve():
    """Complex parameters run on the reference backend: asked for the other, they raise."""
    if not fastloop.backends()["cpu"]["available"]:
        pytest.skip(f"backend 'cpu' is not available: {fastloop.backends()['cpu']['reason']}")
    p = torch.nn.Parameter(values((3,), torch.complex64))
    before = bits(p)
    p.grad = values((3,), torch.complex64)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=r"\[AdamW\].*(complex|cpu)"):
        fastloop.AdamW([p], backend="cpu").step()
    assert bits(p) == before


# -- gradients that do not fit -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.sparse])
def test_a_sparse_gradient_leaves_every_parameter(name, backend):
    params = parameters(((4, 2), (3,)))
    opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, **example(name))
    set_grads(params)
    checked_step(opt)
    set_grads(params)
    params[1].grad = torch.sparse_coo_tensor([[1]], [1.0], (3,))
    before = [(bits(p), {k: bits(v) for k, v in opt.state[p].items()}) for p in params]
    with pytest.raises(RuntimeError, match=rf"(?i){name}.*sparse"):
        opt.step()
    assert [(bits(p), {k: bits(v) for k, v in opt.state[p].items()}) for p in params] == before
    set_grads(params)
    checked_step(opt)


def mismatched_shape(p):
    p.grad = torch.zeros_like(p)
    p.data = values((4, 3))  # the gradient keeps the shape that the parameter had


def mismatched_device(p):
    p.grad_dtype = None
    p.grad = torch.zeros_like(p)
    p.data = torch.empty(p.shape, device="meta")


@pytest.mark.parametrize("mismatch", [mismatched_shape, mismatched_device])
@every_optimizer
def test_gradients_that_do_not_fit_raise_before_anything_is_written(name, mismatch, backend):
    params = parameters(((3,), (4, 2), (5,)))
    opt = make(name, params, backend=backend, max_grad_norm=1.0, **example(name))
    set_grads(params)
    try:
        mismatch(params[1])
    except RuntimeError as refusal:
        pytest.skip(f"torch itself refuses to make this mismatch: {refusal}")
    before = [bits(params[0]), bits(params[2])]
    with pytest.raises((RuntimeError, ValueError, TypeError), match=rf"\[{name}\]"):
        opt.step()
    assert [bits(params[0]), bits(params[2])] == before
    assert not any(opt.state.get(p) for p in (params[0], params[2]))


@every_optimizer
def test_an_integer_parameter(name, backend):
    p = torch.zeros(3, dtype=torch.int64)
    p.grad = torch.zeros(3, dtype=torch.int64)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=r"int64|Long|dtype|floating"):
        make(name, [p], backend=backend).step()


@every_optimizer
def test_a_parameter_that_requires_no_grad_is_skipped(name, backend):
    params = parameters(((3,), (4,)))
    params[1].requires_grad_(False)
    opt = make(name, params, backend=backend, **example(name))
    params[0].grad = values((3,))
    checked_step(opt)


@every_optimizer
def test_a_failure_in_the_middle_leaves_everything(name, backend):
    """A state that was replaced by one of a wrong shape: found before the first element is written."""
    params = parameters(((3,), (4, 2), (5,)))
    opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, zero_grads=True, **example(name))
    for _ in range(2):
        set_grads(params)
        opt.step()
    set_grads(params)
    key = CASES[name].states[0]
    opt.state[params[2]][key] = torch.zeros(7)
    before = bits_of(opt, skipped=True)
    with pytest.raises((RuntimeError, ValueError)) as error:
        opt.step()
    assert bits_of(opt, skipped=True) == before
    assert str(error.value).startswith(f"[{name}]")
    assert key in str(error.value)
    opt.state[params[2]][key] = torch.zeros(5)
    checked_step(opt)


@every_optimizer
def test_overlapping_parameters_in_two_groups(name, backend):
    memory = values((10,))
    first, second = torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[5:])
    before = bits(memory)
    first.grad, second.grad = values((6,)), values((5,))
    with pytest.raises((ValueError, RuntimeError), match=rf"\[{name}\].*overlap"):
        make(name, [{"params": [first]}, {"params": [second]}], backend=backend).step()
    assert bits(memory) == before


@every_optimizer
def test_parameters_that_come_to_overlap_after_construction(name, backend):
    params = parameters(((6,), (5,)))
    opt = make(name, params, backend=backend, **example(name))
    set_grads(params)
    checked_step(opt)
    memory = values((10,))
    params[0].data, params[1].data = memory[:6], memory[5:]
    before = bits(memory)
    set_grads(params)
    with pytest.raises((ValueError, RuntimeError), match=rf"\[{name}\].*overlap"):
        opt.step()
    assert bits(memory) == before


# -- clipping functions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_type", ["two", None])
def test_a_norm_type_that_is_no_number(norm_type):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError)):
        fastloop.clip_grad_norm_([p], 1.0, norm_type)
    assert bits(p.grad) == bits(torch.ones(3))


def test_sparse_gradients_in_clipping():
    """As torch, which has no norm of sparse tensors; the message names the reason."""
    p = torch.nn.Parameter(torch.zeros(4, 2))
    p.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (4, 2))
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.nn.utils.clip_grad_norm_([p], 1.0)
    with pytest.raises(RuntimeError, match=r"(?i)sparse"):
        fastloop.clip_grad_norm_([p], 1.0)
