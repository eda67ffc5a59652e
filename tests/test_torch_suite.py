# SPDX-License-Identifier: Apache-2.0
"""torch's own list of what its optimizers must take, tried on torch's class and on ours: same results, same errors.

The list is `optim_db`, which comes with the torch that is installed, so that a new torch brings its new cases.
"""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from cases import CASES

import fastloop

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest, which is not installed")

from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
)

INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ in CASES}
STEPS = 6
LAYOUTS = ("contiguous", "with gaps", "transposed")


def inputs_of(name, dtype):
    """Arguments of the optimizer, each as plain, foreach and fused (torch has no fused kernels for complex numbers)."""
    skip = ("differentiable", "fused") if dtype.is_complex else ("differentiable",)
    return _get_optim_inputs_including_global_cliquey_kwargs("cpu", dtype, INFOS[name], skip=skip)


def every_input(*dtypes):
    for name in INFOS:
        for dtype in dtypes:
            for index, given in enumerate(inputs_of(name, dtype)):
                yield pytest.param(name, dtype, index, id=f"{name} {given.desc} {dtype}")


def every_schedule():
    for name, info in INFOS.items():
        for index, _ in enumerate(info.scheduler_inputs):
            yield pytest.param(name, index, id=f"{name} {index}")


def every_error():
    for name, info in INFOS.items():
        for index, error in enumerate(info.optim_error_inputs_func(device="cpu", dtype=torch.float32)):
            yield pytest.param(name, index, id=f"{name} {error.optimizer_error_input.desc or index}")


def new_parameters(layout, dtype):
    """A matrix, a vector, one element, none, and one that never has a gradient."""
    torch.manual_seed(0)
    shapes = ((10, 5), (10,), (), (0,), (3,))
    tensors = []
    for shape in shapes:
        if layout == "with gaps":
            tensors.append(torch.randn(*shape, 2, dtype=dtype)[..., 0])
        elif layout == "transposed" and len(shape) == 2:
            tensors.append(torch.randn(*shape[::-1], dtype=dtype).t())
        else:
            tensors.append(torch.randn(shape, dtype=dtype))
    return [torch.nn.Parameter(t) for t in tensors]


def set_grads(params, seed, sparse=False):
    torch.manual_seed(seed)
    for index, p in enumerate(params[:-1]):
        missing = (seed + index) % 4 == 3
        grad = torch.randn_like(p)
        p.grad = None if missing else grad.to_sparse() if sparse and p.dim() else grad


def both(name, kwargs):
    return ((torch_class, copy.deepcopy(kwargs)) for torch_class in (INFOS[name].optim_cls, getattr(fastloop, name)))


def assert_same(ours, torchs):
    """States and settings, ours against torch's; `fused` changes nothing of ours."""
    ours, torchs = ours.state_dict(), torchs.state_dict()
    assert ours["state"].keys() == torchs["state"].keys()
    for key, state in torchs["state"].items():
        assert ours["state"][key].keys() == state.keys()
        for entry, value in state.items():
            torch.testing.assert_close(ours["state"][key][entry], value, msg=lambda m, e=entry: f"{e}: {m}")
    for group, expected in zip(ours["param_groups"], torchs["param_groups"], strict=True):
        for key in expected.keys() - {"fused"}:
            assert group[key] == expected[key], key


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "dtype", "index"), every_input(torch.float32, torch.float64, torch.complex64))
def test_same_results(name, dtype, index, layout):
    optimizers, models = [], []
    for optimizer_class, kwargs in both(name, inputs_of(name, dtype)[index].kwargs):
        if optimizer_class is INFOS[name].optim_cls and layout != "contiguous":
            kwargs.pop("fused", None)  # torch's fused CPU kernels take every tensor for a contiguous one
        params = new_parameters(layout, dtype)
        models.append(params)
        groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.03}]
        optimizers.append(optimizer_class(groups, **kwargs))
        for seed in range(STEPS):
            set_grads(params, seed)
            optimizers[-1].step()
    torch.testing.assert_close(models[1], models[0])
    assert_same(optimizers[1], optimizers[0])


@pytest.mark.parametrize(("name", "index"), every_schedule())
def test_same_schedule(name, index):
    rates, models = [], []
    for optimizer_class, _ in both(name, {}):
        params = new_parameters("contiguous", torch.float32)
        opt = optimizer_class([{"params": params[:2]}, {"params": params[2:], "lr": 0.01}], lr=0.02)
        schedulers = [make_scheduler(opt) for make_scheduler in INFOS[name].scheduler_inputs[index]]
        rates.append([])
        for seed in range(2 * STEPS):
            set_grads(params, seed)
            opt.step()
            for scheduler in schedulers:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))
            rates[-1].append([group["lr"] for group in opt.param_groups])
        models.append(params)
    assert rates[1] == rates[0]
    torch.testing.assert_close(models[1], models[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "index"), every_error())
def test_same_errors(name, index):
    """torch's exception, and the words that torch's own tests look for."""
    outcomes = []
    for optimizer_class, _ in both(name, {}):
        error = INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)[index]
        given = error.optimizer_error_input
        constructs = error.error_on != OptimizerErrorEnum.CONSTRUCTION_ERROR
        with contextlib.nullcontext() if constructs else expects(error):
            opt = optimizer_class(given.params, **given.kwargs)
        if constructs:
            with expects(error):
                opt.step()
        outcomes.append(error.error_type)
    assert outcomes[0] is outcomes[1]


def expects(error):
    if issubclass(error.error_type, Warning):
        return pytest.warns(error.error_type, match=error.error_regex)
    return pytest.raises(error.error_type, match=error.error_regex)


@pytest.mark.parametrize(("name", "dtype", "index"), every_input(torch.float32))
def test_a_checkpoint_of_before_the_newer_settings(name, dtype, index):
    params = new_parameters("contiguous", dtype)
    kwargs = inputs_of(name, dtype)[index].kwargs
    older = INFOS[name].optim_cls(params, **copy.deepcopy(kwargs))
    set_grads(params, 0)
    older.step()
    saved = copy.deepcopy(older.state_dict())
    for group in saved["param_groups"]:
        for flag in INFOS[name].not_og_supported_flags:
            group.pop(flag, None)
    mine = copy.deepcopy(params)
    opt = getattr(fastloop, name)(mine, **copy.deepcopy(kwargs))
    for owner in (older, opt):
        owner.load_state_dict(copy.deepcopy(saved))  # torch keeps the tensors that it is given
    for owner, its in ((older, params), (opt, mine)):
        set_grads(its, 1)
        owner.step()
    torch.testing.assert_close(mine, params)
    assert_same(opt, older)


@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.supports_sparse])
def test_sparse_gradients(name):
    changes, _ = INFOS[name].metadata_for_sparse
    models = []
    for optimizer_class, kwargs in both(name, changes):
        params = new_parameters("contiguous", torch.float64)
        opt = optimizer_class(params, **kwargs)
        for seed in range(STEPS):
            set_grads(params, seed, sparse=True)
            opt.step()
        models.append(params)
    torch.testing.assert_close(models[1], models[0])
