# SPDX-License-Identifier: Apache-2.0
"""The oracle and its bounds, tested themselves: against torch.optim, and by mistakes they must notice."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
import support
import torch
from cases import CASES
from support import checked_step, parameters, set_grads, torch_class, values, wide
from tolerances import Rounded, Rounding, norm_bound, ulp

EVERY_SETTING = [
    pytest.param(name, settings, id=f"{name}-{label}")
    for name, case in CASES.items()
    if case.torch_name
    for label, settings in case.settings.items()
]


def torch_optimizer(name: str, settings: dict, dtype: torch.dtype = torch.float32):
    return torch_class(name)(parameters(dtype=dtype), foreach=False, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "settings"), EVERY_SETTING)
def test_torch_is_within_the_bounds_of_the_oracle(name, settings, dtype):
    opt = torch_optimizer(name, settings, dtype)
    for scale in (1.0, 100.0, 1e-3):
        set_grads(opt.param_groups[0]["params"], scale)
        checked_step(opt)


@pytest.mark.parametrize(("name", "settings"), EVERY_SETTING)
def test_the_defaults_of_a_case_are_torchs(name, settings):
    assert torch_class(name)(parameters()).defaults.items() >= dict(CASES[name].defaults).items()


def test_the_oracle_follows_torch_over_a_trajectory_with_clipping_and_ema():
    params = parameters(((5, 3), (4,)), torch.float64)
    opt = torch.optim.AdamW(params, lr=0.01)
    model = oracle.Oracle(
        oracle.adam, {str(i): wide(p) for i, p in enumerate(params)}, CASES["AdamW"].defaults | {"lr": 0.01},
        max_norm=0.5, ema_decay=0.9,
    )  # fmt: skip
    averages = [p.detach().clone() for p in params]
    for _ in range(10):
        set_grads(params)
        grads = {str(i): wide(p.grad) for i, p in enumerate(params)}
        norm = torch.nn.utils.clip_grad_norm_(params, 0.5)
        opt.step()
        for average, p in zip(averages, params, strict=True):
            average.mul_(0.9).add_(p.detach(), alpha=0.1)
        model.step(grads)
        assert float(model.norm) == pytest.approx(float(norm), rel=1e-13)
    for i, p in enumerate(params):
        np.testing.assert_allclose(model.params[str(i)].astype(float), p.detach().numpy(), rtol=1e-12)
        np.testing.assert_allclose(model.averages[str(i)].astype(float), averages[i].numpy(), rtol=1e-12)


# -- mistakes that the bounds must notice --------------------------------------------------------------------


def _hyperparameters_in_fp32(p, g, state, t, s, scalar=oracle.exact):
    return oracle.adam(p, g, state, t, s | {"betas": tuple(map(np.float32, s["betas"]))}, scalar)


def _eps_inside_the_root(p, g, state, t, s, scalar=oracle.exact):
    return oracle.adam(p, g, state, t, s | {"eps": s["eps"] * (1 - s["betas"][1] ** t) ** 0.5}, scalar)


def _step_off_by_one(p, g, state, t, s, scalar=oracle.exact):
    return oracle.adam(p, g, state, t + 1, s, scalar)


def _decay_after_the_update(p, g, state, t, s, scalar=oracle.exact):
    p, after = oracle.adam(p, g, state, t, s | {"weight_decay": 0.0}, scalar)
    return p * scalar(1 - np.longdouble(s["lr"]) * s["weight_decay"]), after


MISTAKES = {
    "hyperparameters rounded to fp32 too early": (_hyperparameters_in_fp32, {}),
    "eps before the bias correction": (_eps_inside_the_root, {"eps": 1e-3}),
    "bias correction of the next step": (_step_off_by_one, {}),
    "decay after the update": (_decay_after_the_update, {"lr": 0.1, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("label", MISTAKES)
def test_the_bounds_notice(label, monkeypatch):
    rule, settings = MISTAKES[label]
    monkeypatch.setitem(support.CASES, "AdamW", dataclasses.replace(CASES["AdamW"], rule=rule))
    opt = torch_optimizer("AdamW", settings)

    def three_steps():
        for _ in range(3):
            set_grads(opt.param_groups[0]["params"])
            checked_step(opt)

    with pytest.raises(AssertionError, match="elements off"):
        three_steps()


def test_the_bounds_notice_one_ulp_too_many():
    """A parameter three units in its last place off is out of bound: the update is small beside it."""
    opt = torch_optimizer("AdamW", {})
    set_grads(opt.param_groups[0]["params"])

    def step():
        opt.step()
        p = opt.param_groups[0]["params"][0].detach()
        p[0, 0] += 3 * float(ulp(p[0, 0].item(), torch.float32))

    with pytest.raises(AssertionError, match="parameter: 1 of"):
        checked_step(opt, step)


# -- the arithmetic of the bounds ----------------------------------------------------------------------------

FORMULAS = {
    "sum": lambda a, b, c: a + b - c,
    "product": lambda a, b, c: a * b * c,
    "quotient": lambda a, b, c: a / b + c / b,
    "root": lambda a, b, c: np.sqrt(a * a + b * b) * c,
    "extrema": lambda a, b, c: np.maximum(a * b, c) + np.minimum(-a, b * c),
    "cancellation": lambda a, b, c: (a + b) * (a - b) - (a * a - b * b) + c,
}


@pytest.mark.parametrize("label", FORMULAS)
def test_rounding_errors_stay_inside_their_bound_and_come_near_it(label):
    formula = FORMULAS[label]
    a, b, c = (values((20000,)).numpy() for _ in range(3))
    arithmetic = Rounding.of(torch.float32)
    rounded = formula(*(Rounded.known(x.astype(np.float64), arithmetic) for x in (a, b, c)))
    computed = formula(a, b, c)
    assert computed.dtype == np.float32
    off = np.abs(computed.astype(np.float64) - rounded.value)
    assert (off <= rounded.error).all()
    assert (off / rounded.error).max() > 0.3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storing_adds_half_an_ulp(dtype):
    x = values((20000,)).double() * 10.0 ** (torch.rand(20000) * 8 - 6)
    bound = Rounded.known(x.numpy(), Rounding.of(torch.float32)).stored(dtype)
    off = (x.float().to(dtype).double() - x).abs().numpy()
    assert (off <= bound + x.abs().numpy() * 2**-24).all()
    assert (off / bound).max() > 0.95


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("x", [1.0, 1.9375, 2.0, 1000.0, 1e-3, 0.0])
def test_ulp_is_the_distance_to_the_next_number(dtype, x):
    here = torch.tensor(x, dtype=dtype)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[here.element_size()]
    above = (here.view(integer) + 1).view(dtype)
    assert ulp(here.double().item(), dtype) == above.double().item() - here.double().item()


def test_a_divisor_that_may_be_zero_has_no_bound():
    arithmetic = Rounding.of(torch.float32)
    with pytest.raises(ValueError, match="divisor may be zero"):
        Rounded.known(1.0, arithmetic) / Rounded(1e-9, -1e-8, 1e-8, arithmetic)


@pytest.mark.parametrize("count", [1, 10, 1000, 100_000])
def test_a_naive_fp32_norm_is_within_its_bound(count):
    x = values((count,)).numpy()
    naive = np.sqrt(np.add.accumulate(x * x, dtype=np.float32)[-1])
    exact = oracle.total_norm([x.astype(np.float64)])
    assert abs(naive - exact) <= norm_bound(count, torch.float32) * exact
