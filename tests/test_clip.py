# SPDX-License-Identifier: Apache-2.0
"""Clipping: the functions against torch.nn.utils and the oracle; max_grad_norm of an optimizer."""

from __future__ import annotations

import math
import warnings

import numpy as np
import oracle
import pytest
import torch
from cases import CASES
from support import (
    assert_norm,
    assert_within,
    bits,
    example,
    make,
    parameters,
    real_dtype,
    set_grads,
    threads,
    values,
    wide,
)
from tolerances import FORMATS, Rounded, Rounding, compute_dtype

import fastloop

every_optimizer = pytest.mark.parametrize("name", CASES)
NOT_EMPTY = ((33, 65), (7,), (), (2049,), (4, 3, 5, 5))  # torch has no inf-norm of an empty tensor
NORM_TYPES = (2.0, 1.0, math.inf, 3.0, 0.5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_norm = pytest.mark.parametrize("norm_type", NORM_TYPES)


def with_grads(dtype=torch.float32, **kwargs):
    params = parameters(dtype=dtype, **kwargs)
    set_grads(params)
    return params


def grads_of(params):
    return [p.grad for p in params if p.grad is not None]


def assert_total_norm(norm, grads, norm_type) -> None:
    """The norm against the oracle: in bound for 2, in a bound for that root and power for others."""
    registers = compute_dtype(real_dtype(grads[0]))
    expected = oracle.total_norm([wide(g) for g in grads], norm_type)
    count = sum(g.numel() for g in grads)
    assert norm.dim() == 0
    if norm_type == 2:
        assert_norm(norm, expected, count, registers)
        return
    assert norm.dtype == registers
    # |x|^p (2u each, p-fold for its argument), the sum (see norm_bound), all to the 1/p; then the root itself
    unit = 2.0 ** -FORMATS[registers][0]
    if math.isinf(norm_type):
        bound = 0.0
    else:
        bound = float(expected) * unit * ((min(count, 8 * count**0.5) + 2 * max(norm_type, 1)) / norm_type + 3)
    assert_within(wide(norm), np.asarray(expected), np.asarray(bound), f"{norm_type}-norm")


def assert_scaled(params, before, factor: Rounded, exact_factor) -> None:
    """grad * min(1, max_norm / (norm + 1e-6)) within its bound, stored in the gradient's dtype."""
    arithmetic = factor.rounding
    for p, old in zip(params, before, strict=True):
        bound = (Rounded.known(wide(old), arithmetic) * factor).stored(real_dtype(p.grad))
        assert_within(wide(p.grad), wide(old) * exact_factor, bound, f"clipped gradient of {tuple(p.shape)}")


# -- the functions -------------------------------------------------------------------------------------------


@every_dtype
@every_norm
def test_get_total_norm(norm_type, dtype):
    grads = grads_of(with_grads(dtype))
    assert_total_norm(fastloop.get_total_norm(grads, norm_type), grads, norm_type)
    assert_total_norm(fastloop.get_total_norm((g for g in grads), norm_type=norm_type), grads, norm_type)
    assert_total_norm(fastloop.get_total_norm(grads[0], norm_type), grads[:1], norm_type)


@pytest.mark.parametrize("max_norm", [0.1, 1e12])
@every_dtype
@every_norm
def test_clip_grad_norm(norm_type, dtype, max_norm):
    params = with_grads(dtype)
    before = [p.grad.clone() for p in params]
    addresses = [p.grad.data_ptr() for p in params]
    norm = fastloop.clip_grad_norm_(params, max_norm, norm_type)
    assert_total_norm(norm, before, norm_type)
    assert [p.grad.data_ptr() for p in params] == addresses
    known = np.longdouble(norm.item())
    arithmetic = Rounding.of(norm.dtype)
    factor = oracle.clip_factor(Rounded.within(known, arithmetic.unit, arithmetic), max_norm)
    assert_scaled(params, before, factor, oracle.clip_factor(known, max_norm))
    if max_norm == 1e12:
        assert [bits(p.grad) for p in params] == [bits(g) for g in before]


@every_norm
def test_clip_grad_norm_agrees_with_torchs(norm_type):
    params = with_grads(torch.float64, shapes=NOT_EMPTY)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.clone()
    ours = fastloop.clip_grad_norm_(params, 0.5, norm_type)
    theirs = torch.nn.utils.clip_grad_norm_(twins, 0.5, norm_type)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, twin.grad, rtol=1e-13, atol=0)


def test_norm_type_may_be_text_or_int_as_in_torch():
    grads = grads_of(with_grads())
    assert bits(fastloop.get_total_norm(grads, "inf")) == bits(fastloop.get_total_norm(grads, math.inf))
    assert bits(fastloop.get_total_norm(grads, 2)) == bits(fastloop.get_total_norm(grads, 2.0))
    params = with_grads()
    assert fastloop.clip_grad_norm_(params, "0.5", "2").item() > 0.5


@every_dtype
def test_clip_grads_with_norm(dtype):
    params = with_grads(dtype)
    before = [p.grad.clone() for p in params]
    assert fastloop.clip_grads_with_norm_(params, 0.75, torch.tensor(3.0)) is None
    arithmetic = Rounding.of(compute_dtype(dtype))
    known = np.longdouble(3)
    factor = oracle.clip_factor(Rounded.known(known, Rounding.of(torch.float32)), 0.75)
    factor = Rounded(factor.value, factor.low, factor.high, arithmetic)
    assert_scaled(params, before, factor, oracle.clip_factor(known, 0.75))


@every_dtype
def test_clip_grad_value(dtype):
    params = with_grads(dtype)
    expected = [p.grad.clamp(-0.05, 0.05) for p in params]
    addresses = [p.grad.data_ptr() for p in params]
    assert fastloop.clip_grad_value_(params, 0.05) is None
    assert [bits(p.grad) for p in params] == [bits(g) for g in expected]
    assert [p.grad.data_ptr() for p in params] == addresses


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_is_accepted_and_changes_nothing(foreach):
    results = []
    for chosen in (None, foreach):
        torch.manual_seed(1)
        params = with_grads()
        norm = fastloop.clip_grad_norm_(params, 0.5, foreach=chosen)
        fastloop.clip_grads_with_norm_(params, 0.25, norm, foreach=chosen)
        fastloop.clip_grad_value_(params, 0.01, foreach=chosen)
        results.append([bits(norm), bits(fastloop.get_total_norm(grads_of(params), foreach=chosen))])
        results[-1] += [bits(p.grad) for p in params]
    assert results[0] == results[1]


def test_an_empty_list():
    without_grads = parameters(((3,),))
    for params in ([], without_grads):
        assert bits(fastloop.clip_grad_norm_(params, 1.0)) == bits(torch.tensor(0.0))
        assert fastloop.clip_grad_value_(params, 1.0) is None
        assert fastloop.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0)) is None
    assert bits(fastloop.get_total_norm([])) == bits(torch.tensor(0.0))


def test_only_empty_tensors():
    params = parameters(((0,), (3, 0)))
    set_grads(params)
    assert fastloop.clip_grad_norm_(params, 1.0).item() == 0


def test_one_tensor_stands_for_a_list():
    p, twin = torch.nn.Parameter(values((50,))), torch.nn.Parameter(torch.zeros(50))
    p.grad = values((50,))
    twin.grad = p.grad.clone()
    norm = fastloop.clip_grad_norm_(p, 0.1)
    assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(twin, 0.1).item(), rel=1e-6)
    torch.testing.assert_close(p.grad, twin.grad, rtol=1e-6, atol=0)
    fastloop.clip_grad_value_(p, 1e-3)
    assert p.grad.abs().max() == torch.tensor(1e-3)


def test_a_generator_of_parameters():
    params = with_grads()
    norm = fastloop.clip_grad_norm_((p for p in params), 0.1)
    assert norm.item() > 0.1
    assert fastloop.get_total_norm(grads_of(params)).item() == pytest.approx(0.1, rel=1e-4)
    fastloop.clip_grad_value_((p for p in params), 1e-4)
    assert max(p.grad.abs().max() for p in params if p.numel()) == torch.tensor(1e-4)


def test_an_exhausted_generator_warns_as_torchs():
    def exhausted():
        return (p for p in ())

    with pytest.warns(UserWarning, match="generator") as theirs:
        torch.nn.utils.clip_grad_norm_(exhausted(), 1.0)
    with pytest.warns(UserWarning, match="generator") as ours:
        norm = fastloop.clip_grad_norm_(exhausted(), 1.0)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    assert ours[0].filename == __file__, "the warning points at the caller"
    assert norm.item() == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastloop.clip_grad_norm_([], 1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every_norm
def test_nonfinite_gradients_as_in_torch(norm_type, bad):
    params, twins = with_grads(shapes=NOT_EMPTY), parameters(NOT_EMPTY)
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad
    params[0].grad.view(-1)[5] = bad
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.clone()
    before = [bits(p.grad) for p in params]
    for function in (
        lambda: fastloop.clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True),
        lambda: fastloop.get_total_norm(grads_of(params), norm_type, error_if_nonfinite=True),
    ):
        with pytest.raises(RuntimeError, match="non-finite"):
            function()
    assert [bits(p.grad) for p in params] == before
    norm = fastloop.clip_grad_norm_(params, 1.0, norm_type)
    theirs = torch.nn.utils.clip_grad_norm_(twins, 1.0, norm_type)
    torch.testing.assert_close(norm, theirs, equal_nan=True)
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p.grad, twin.grad, equal_nan=True)


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("position", [0, 1, 7, 8, 31, 63, 64, 1030])
def test_one_nan_anywhere_is_seen(norm_type, position):
    """Vector lanes, remainders and max(): a NaN must survive each."""
    p = torch.nn.Parameter(torch.zeros(1031))
    p.grad = values((1031,))
    p.grad[position] = math.nan
    assert fastloop.get_total_norm([p.grad, values((9,))], norm_type).isnan()


@every_norm
def test_fp16_norm_comes_back_in_fp32_and_does_not_overflow(norm_type):
    grads = [torch.full((500,), 30000.0, dtype=torch.float16) for _ in range(2)]
    norm = fastloop.get_total_norm(grads, norm_type)
    assert_total_norm(norm, grads, norm_type)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_clipping_16_bit_gradients_of_any_size(dtype):
    p = torch.nn.Parameter(torch.zeros(500, dtype=dtype))
    p.grad = torch.full((500,), 30000.0, dtype=dtype)
    fastloop.clip_grad_norm_([p], 1.0)
    assert p.grad.float().norm().item() == pytest.approx(1.0, rel=2**-7)


def test_mixed_dtypes():
    params = [torch.nn.Parameter(values((40,), dtype)) for dtype in DTYPES]
    set_grads(params)
    before = [p.grad.clone() for p in params]
    norm = fastloop.clip_grad_norm_(params, 0.5)
    assert norm.item() == pytest.approx(float(oracle.total_norm([wide(g) for g in before])), rel=1e-6)
    for p, old in zip(params, before, strict=True):
        factor = 0.5 / (norm.item() + 1e-6)
        torch.testing.assert_close(
            p.grad.double(), (old.double() * factor), rtol=2 * 2.0 ** -min(FORMATS[p.dtype][0], 22), atol=1e-7
        )


STRANGE = {
    "transposed": lambda: values((7, 5)).t(),
    "channels_last": lambda: values((2, 3, 4, 5)).to(memory_format=torch.channels_last),
    "gaps": lambda: values((6, 10))[:, ::2],
    "expanded": lambda: values((5, 1)).expand(5, 4),
    "0-dim": lambda: values(()),
    "empty": lambda: values((0, 4)),
    "complex": lambda: values((4, 3), torch.complex64),
    "conjugated": lambda: values((4, 3), torch.complex64).conj(),
    "negated": lambda: values((5,), torch.complex64).conj().imag,
}


@pytest.mark.parametrize("layout", STRANGE)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_strange_gradients(norm_type, layout):
    """As torch on a dense copy; what lies in the gaps stays."""
    grad = STRANGE[layout]()
    dense = grad.clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()
    params = [torch.nn.Parameter(torch.zeros_like(dense)) for _ in range(2)]
    params[0].grad, params[1].grad = grad, dense
    ours = fastloop.get_total_norm([grad], norm_type)
    if layout == "empty":
        assert ours.item() == 0
        return
    torch.testing.assert_close(ours, torch.nn.utils.get_total_norm([dense], norm_type), rtol=1e-5, atol=0)
    if layout == "expanded":
        return  # an expanded gradient cannot be written in place, in torch neither
    fastloop.clip_grad_norm_(params[0], 0.1, norm_type)
    torch.nn.utils.clip_grad_norm_(params[1], 0.1, norm_type)
    torch.testing.assert_close(params[0].grad.resolve_conj().resolve_neg(), params[1].grad, rtol=1e-5, atol=0)


def test_what_lies_between_the_elements_of_a_gradient_stays():
    memory = values((6, 10))
    between = bits(memory[:, 1::2].clone())
    p = torch.nn.Parameter(torch.zeros(6, 5))
    p.grad = memory[:, ::2]
    fastloop.clip_grad_norm_([p], 0.1)
    fastloop.clip_grad_value_([p], 0.001)
    assert bits(memory[:, 1::2]) == between
    assert p.grad.abs().max() <= 0.001


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_bitwise_the_same_for_every_thread_count_and_run(dtype, norm_type):
    grads = [values(shape, dtype) for shape in ((1_000_003,), (7,), (70_001,), (0,), (300, 301))]
    norms = set()
    for count in (1, 2, 3, 1):
        with threads(count):
            norms |= {bits(fastloop.get_total_norm(grads, norm_type)) for _ in range(3)}
    assert len(norms) == 1
    expected = float(oracle.total_norm([wide(g) for g in grads], norm_type))
    assert fastloop.get_total_norm(grads, norm_type).item() == pytest.approx(expected, rel=1e-5)


def test_gradients_written_in_place_move_their_version():
    p = torch.nn.Parameter(values((5,)))
    p.grad = values((5,))
    for clip in (lambda: fastloop.clip_grad_norm_([p], 1e-3), lambda: fastloop.clip_grad_value_([p], 1e-6)):
        version = p.grad._version
        clip()
        assert p.grad._version > version


def test_clipping_works_while_gradients_are_recorded():
    """Called outside no_grad, as everybody does; the norm carries no graph."""
    p = torch.nn.Parameter(values((5,)))
    p.grad = values((5,)).requires_grad_()
    norm = fastloop.clip_grad_norm_([p], 0.1)
    assert not norm.requires_grad


# -- what max_grad_norm means to an optimizer ----------------------------------------------------------------


@every_optimizer
def test_grad_norm_is_none_if_not_asked_for(name, backend):
    opt = make(name, parameters(), backend=backend, **example(name))
    assert opt.grad_norm is None
    set_grads(opt.param_groups[0]["params"])
    opt.step()
    assert opt.grad_norm is None


@every_dtype
@every_optimizer
def test_grad_norm_is_the_norm_before_clipping(name, dtype, backend):
    params = parameters(dtype=dtype)
    opt = make(name, params, backend=backend, max_grad_norm=1e-3, **example(name))
    for scale in (1.0, 5.0):
        set_grads(params, scale)
        opt.step()
        assert opt.grad_norm.dim() == 0
        assert_total_norm(opt.grad_norm, grads_of(params), 2.0)
        if backend == "cpu":
            assert bits(opt.grad_norm) == bits(fastloop.get_total_norm(grads_of(params)))


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan, -math.inf])
@every_optimizer
def test_zero_and_negative_max_grad_norm_raise(name, bad, backend):
    with pytest.raises(ValueError, match=rf"\[{name}\] max_grad_norm .*got {bad}"):
        make(name, parameters(), backend=backend, max_grad_norm=bad)


@every_optimizer
def test_infinite_max_grad_norm_measures_and_never_clips(name, backend):
    results = []
    for max_norm in (math.inf, None):
        torch.manual_seed(5)
        params = parameters()
        opt = make(name, params, backend=backend, max_grad_norm=max_norm, **example(name))
        set_grads(params, 1e4)
        opt.step()
        results.append([bits(p) for p in params])
        if max_norm is not None:
            assert_total_norm(opt.grad_norm, grads_of(params), 2.0)
    assert results[0] == results[1]


@every_optimizer
def test_clip_and_step_give_what_clip_grad_norm_and_torchs_step_give(name, backend):
    settings = example(name)
    params = parameters(dtype=torch.float64)
    opt = make(name, params, backend=backend, max_grad_norm=0.3, max_grad_value=0.01, **settings)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    twin = getattr(torch.optim, name)(twins, **settings)
    for _ in range(3):
        set_grads(params)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_(twins, 0.3)
        torch.nn.utils.clip_grad_value_(twins, 0.01)
        opt.step()
        twin.step()
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-13, atol=0)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-11, atol=1e-13)


@every_optimizer
def test_max_grad_norm_changed_in_a_group_between_steps(name, backend):
    """Every hyperparameter is read anew: None leaves the group out from the next step on."""
    params, others = parameters(((5, 3),)), parameters(((4,),))
    opt = make(name, [{"params": params}, {"params": others}], backend=backend, max_grad_norm=0.1, **example(name))
    set_grads(params + others)
    opt.step()
    assert_total_norm(opt.grad_norm, grads_of(params + others), 2.0)
    opt.param_groups[1]["max_grad_norm"] = None
    set_grads(params + others)
    opt.step()
    assert_total_norm(opt.grad_norm, grads_of(params), 2.0)
