# SPDX-License-Identifier: Apache-2.0
"""What every exported optimizer must do, found by reflection: settings x dtypes x options x backends."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import CASES
from support import (
    bits,
    bits_of,
    checked_step,
    example,
    expected_state_dtype,
    make,
    parameters,
    set_grads,
    shapes_for,
    threads,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# parameter dtype, gradient dtype (None: the parameter's), arguments
STORAGE = {
    "fp32 with bf16 states": (torch.float32, None, {"state_dtype": torch.bfloat16}),
    "fp32 with fp32 states": (torch.float32, None, {"state_dtype": torch.float32}),
    "fp32 with bf16 gradients": (torch.float32, torch.bfloat16, {}),
    "fp32 with fp16 gradients": (torch.float32, torch.float16, {}),
    "fp32 with master weights": (torch.float32, None, {"master_weights": True}),
    "bf16 with fp32 states": (torch.bfloat16, None, {"state_dtype": torch.float32}),
    "bf16 with bf16 states": (torch.bfloat16, None, {"state_dtype": torch.bfloat16}),
    "bf16 with fp32 gradients": (torch.bfloat16, torch.float32, {}),
    "bf16 with master weights": (torch.bfloat16, None, {"master_weights": True}),
    "bf16 with master weights and fp32 gradients": (torch.bfloat16, torch.float32, {"master_weights": True}),
    "fp16 with fp32 states": (torch.float16, None, {"state_dtype": torch.float32}),
    "fp16 with bf16 states": (torch.float16, None, {"state_dtype": torch.bfloat16}),
    "fp16 with fp32 gradients": (torch.float16, torch.float32, {}),
    "fp16 with master weights": (torch.float16, None, {"master_weights": True}),
    "fp64 with fp32 gradients": (torch.float64, torch.float32, {}),
    "fp64 with master weights": (torch.float64, None, {"master_weights": True}),
}

OPTIONS = {
    "norm": {"max_grad_norm": 0.1},
    "norm that does not clip": {"max_grad_norm": 1e6},
    "norm measured": {"max_grad_norm": math.inf},
    "value": {"max_grad_value": 0.01},
    "norm and value": {"max_grad_norm": 1.0, "max_grad_value": 0.01},
    "ema": {"ema_decay": 0.99},
    "zero_grads": {"zero_grads": True},
    "all": {"max_grad_norm": 0.5, "max_grad_value": 0.02, "ema_decay": 0.9, "zero_grads": True},
}

every_optimizer = pytest.mark.parametrize("name", CASES)
every_setting = pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(name, settings, id=f"{name}-{label}")
        for name, case in CASES.items()
        for label, settings in case.settings.items()
    ],
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def test_every_exported_optimizer_has_a_case():
    import fastloop
    import fastloop.optim

    exported = {
        name
        for name, value in itertools.chain(vars(fastloop).items(), vars(fastloop.optim).items())
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and not name.startswith("_")
        if name != "FusedOptimizer" and value is not torch.optim.Optimizer
    }
    assert exported == set(CASES)


def steps(opt: torch.optim.Optimizer, count: int = 3) -> None:
    """Steps held against the oracle, with gradients of changing size."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for i in range(count):
        set_grads(params, scale=(1.0, 10.0, 0.1)[i % 3])
        checked_step(opt)


@every_dtype
@every_setting
def test_a_step_is_within_the_bound_of_the_oracle(name, settings, dtype, backend):
    opt = make(name, parameters(shapes_for(backend), dtype), backend=backend, **settings)
    for key, value in settings.items():
        assert opt.param_groups[0][key] == value
    steps(opt)


@pytest.mark.parametrize("storage", STORAGE)
@every_optimizer
def test_storage(name, storage, backend):
    dtype, grad_dtype, arguments = STORAGE[storage]
    params = parameters(shapes_for(backend), dtype, grad_dtype)
    opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, **arguments, **example(name))
    steps(opt)
    for p in params:
        masters = arguments.get("master_weights", False) and dtype in (torch.bfloat16, torch.float16)
        assert ("master_param" in opt.state[p]) == masters
        for key in CASES[name].states:
            assert opt.state[p][key].dtype == expected_state_dtype(p, opt.defaults, key)


@every_dtype
@pytest.mark.parametrize("options", OPTIONS)
@every_optimizer
def test_options(name, options, dtype, backend):
    opt = make(name, parameters(shapes_for(backend), dtype), backend=backend, **OPTIONS[options], **example(name))
    steps(opt)
    if "max_grad_norm" not in OPTIONS[options]:
        assert opt.grad_norm is None


@every_dtype
@pytest.mark.parametrize("scale", [1024.0, 3000.0])
@every_optimizer
def test_gradients_are_unscaled(name, scale, dtype, backend):
    if dtype == torch.float64 and scale == 3000.0:
        scale = 2.0**40
    opt = make(name, parameters(shapes_for(backend), dtype), backend=backend, max_grad_norm=1e-4, **example(name))
    opt.grad_scale, opt.found_inf = torch.tensor(scale), torch.tensor(0.0)
    steps(opt)


# -- the same bits whatever the run and the threads ----------------------------------------------------------

LARGE = ((60_001,), (500, 37), (5,), (20_000,), (), (0,), (1 << 14,))


def trajectory(name: str, backend: str, dtype: torch.dtype, count: int) -> list:
    with threads(count):
        torch.manual_seed(1)
        opt = make(name, parameters(LARGE, dtype), backend=backend, **OPTIONS["all"], **example(name))
        norms = []
        for _ in range(2):
            set_grads(opt.param_groups[0]["params"])
            opt.step()
            norms.append(bits(opt.grad_norm))
        return [bits_of(opt), norms]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_bitwise_the_same_from_run_to_run_and_for_every_thread_count(name, dtype, backend):
    first = trajectory(name, backend, dtype, 1)
    for count in (1,) if backend == "triton" else (1, 2, 3):  # interpreted kernels know no threads
        assert trajectory(name, backend, dtype, count) == first, f"{count} threads"


@every_optimizer
def test_tensors_larger_than_a_chunk_are_within_the_bound(name, backend):
    opt = make(name, parameters(LARGE), backend=backend, **OPTIONS["all"], **example(name))
    steps(opt, 1)


@every_optimizer
def test_many_small_tensors(name, backend):
    count = 30 if backend == "triton" else 300  # 20 ms a tensor; still several for each program of a launch
    opt = make(
        name,
        parameters([(1 + i % 7,) for i in range(count)]),
        backend=backend,
        max_grad_norm=1.0,
        **example(name),
    )
    steps(opt, 2)


# -- skipped steps -------------------------------------------------------------------------------------------

BAD = (math.nan, math.inf, -math.inf)


def poison(params, value: float) -> None:
    grad = params[3].grad.view(-1)
    grad[grad.numel() // 2] = value


@every_dtype
@pytest.mark.parametrize("bad", BAD)
@every_optimizer
def test_a_nonfinite_norm_skips_the_step(name, bad, dtype, backend):
    params = parameters(shapes_for(backend), dtype)
    opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, **example(name))
    steps(opt, 2)
    set_grads(params)
    poison(params, bad)
    checked_step(opt)
    assert not math.isfinite(opt.grad_norm.item())
    assert bits(opt.skipped_steps) == bits(torch.tensor(1, dtype=torch.int64))
    steps(opt, 2)
    assert opt.skipped_steps.item() == 1


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
@every_optimizer
def test_found_inf_skips_the_step(name, clip, with_scale, backend):
    params = parameters(shapes_for(backend))
    opt = make(name, params, backend=backend, max_grad_norm=clip, ema_decay=0.9, master_weights=True, **example(name))
    steps(opt, 1)
    set_grads(params)
    opt.grad_scale, opt.found_inf = torch.tensor(4.0) if with_scale else None, torch.tensor(1.0)
    checked_step(opt)
    opt.found_inf = torch.tensor(0.0)
    checked_step(opt)
    assert opt.skipped_steps.item() == 1


@every_optimizer
def test_a_skipped_first_step_leaves_the_next_one_the_first(name, backend):
    def run(skip_first: bool):
        torch.manual_seed(2)
        params = parameters()
        settings = example(name) | ({"nesterov": False, "dampening": 0.5} if name == "SGD" else {})
        opt = make(name, params, backend=backend, max_grad_norm=1.0, ema_decay=0.9, **settings)
        if skip_first:
            set_grads(params, seed=3)
            poison(params, math.nan)
            checked_step(opt)
        for seed in (4, 5):
            set_grads(params, seed=seed)
            opt.step()
        return bits_of(opt)

    assert run(skip_first=True) == run(skip_first=False)


@every_optimizer
def test_a_skipped_step_zeroes_gradients_where_asked(name, backend):
    params = parameters()
    opt = make(name, params, backend=backend, max_grad_norm=1.0, zero_grads=True, **example(name))
    set_grads(params)
    poison(params, math.nan)
    checked_step(opt)
    assert all(bits(p.grad) == bits(torch.zeros_like(p)) for p in params)


@pytest.mark.parametrize("bad", BAD)
@every_optimizer
def test_error_if_nonfinite_raises_and_leaves_everything(name, bad, backend):
    params = parameters()
    opt = make(name, params, backend=backend, max_grad_norm=1.0, error_if_nonfinite=True, ema_decay=0.9,
               zero_grads=True, **example(name))  # fmt: skip
    steps(opt, 1)
    set_grads(params)
    poison(params, bad)
    before = bits_of(opt, skipped=True)
    with pytest.raises(RuntimeError, match=rf"\[{name}\].*(non-?|not )finite"):
        opt.step()
    assert bits_of(opt, skipped=True) == before
    set_grads(params)
    checked_step(opt)


@every_optimizer
def test_without_max_grad_norm_nonfinite_gradients_act_as_in_torch(name, backend):
    opt = make(name, parameters(), backend=backend, **example(name))
    params = opt.param_groups[0]["params"]
    set_grads(params)
    poison(params, math.nan)
    opt.step()
    assert opt.skipped_steps.item() == 0
    assert params[3].isnan().sum() == 1
    assert all(p.isfinite().all() for i, p in enumerate(params) if i != 3)


@every_optimizer
def test_nonfinite_parameters_are_named(name, backend):
    params = parameters()
    named = [(f"layer.{i}", p) for i, p in enumerate(params)]
    for given, wanted in ((named, "layer.3"), (params, 3)):
        opt = make(name, given, backend=backend, max_grad_norm=1.0, **example(name))
        set_grads(params)
        assert list(opt.nonfinite_parameters()) == []
        poison(params, math.inf)
        assert list(opt.nonfinite_parameters()) == [wanted]


@every_optimizer
def test_gradients_stay_where_they_are_and_as_they_are(name, backend):
    params = parameters()
    opt = make(name, params, backend=backend, max_grad_norm=0.01, max_grad_value=1e-4, **example(name))
    set_grads(params)
    opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(0.0)
    before = [(p.grad.data_ptr(), bits(p.grad)) for p in params]
    opt.step()
    assert [(p.grad.data_ptr(), bits(p.grad)) for p in params] == before


@every_optimizer
def test_zero_grads_zeroes_in_place(name, backend):
    params = parameters()
    opt = make(name, params, backend=backend, zero_grads=True, **example(name))
    set_grads(params)
    grads = [p.grad for p in params]
    checked_step(opt)
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert not any(grad.any() for grad in grads)


@every_optimizer
def test_backends_agree_on_the_decision_to_clip(name, backend):
    """At norm == max_norm exactly the factor is max_norm/(norm + 1e-6), a little below 1, as torch's."""
    p = torch.nn.Parameter(torch.zeros(4))
    opt = make(name, [p], backend=backend, max_grad_norm=2.0, **example(name))
    p.grad = torch.ones(4)
    checked_step(opt)
    assert opt.grad_norm.item() == 2.0
