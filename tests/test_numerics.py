# SPDX-License-Identifier: Apache-2.0
"""What a correct implementation handles: every entry of the specification's list, under its name."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from cases import CASES
from support import (
    assert_norm,
    bits,
    bits_of,
    checked_step,
    example,
    make,
    number,
    parameters,
    set_grads,
    torch_class,
    torch_twin,
    values,
    wide,
)

every_optimizer = pytest.mark.parametrize("name", CASES)
OPTIONS = {"max_grad_norm": 0.5, "ema_decay": 0.9}


def optimizer(name, params, backend, **settings):
    return make(name, params, backend=backend, **(OPTIONS | example(name) | settings))


def two_checked_steps(opt, grads=None) -> None:
    params = [p for group in opt.param_groups for p in group["params"]]
    for _ in range(2):
        if grads is None:
            set_grads(params)
        else:
            for p, grad in zip(params, grads(), strict=True):
                p.grad = grad
        checked_step(opt)


# -- which tensors -------------------------------------------------------------------------------------------


@every_optimizer
def test_parameters_without_a_gradient(name, backend):
    params = parameters(((3,), (4, 2), (5,)))
    opt = optimizer(name, params, backend)
    set_grads(params)
    params[1].grad = None
    frozen = bits(params[1])
    checked_step(opt)
    assert bits(params[1]) == frozen
    assert not opt.state.get(params[1])
    set_grads(params)
    params[0].grad = None  # one that had a gradient has none now, one that had none has
    counts = [number(opt.state[p].get("step", 0)) for p in (params[0], params[2])]
    checked_step(opt)
    if "step" in opt.state[params[0]]:
        assert [number(opt.state[p]["step"]) for p in params] == [counts[0], 1, counts[1] + 1]


@every_optimizer
def test_no_gradient_at_all(name, backend):
    params = parameters(((3,), (4, 2)))
    opt = optimizer(name, params, backend)
    before = bits_of(opt)
    opt.step()
    assert bits_of(opt) == before
    assert opt.grad_norm.item() == 0
    assert opt.skipped_steps.item() == 0


@every_optimizer
@pytest.mark.parametrize(
    "shapes",
    [((0,),), ((),), ((), (0, 3), (2,)), ((5,), (0,)), ((0,), (5,), (0,), (0,)), ((0,), (0, 2))],
    ids=["empty", "0-dim", "mixed", "last empty", "empties around", "all empty"],
)
def test_zero_size_and_zero_dim_tensors_and_an_empty_last_tensor(name, shapes, backend):
    two_checked_steps(optimizer(name, parameters(shapes), backend))


@pytest.mark.parametrize(
    "sizes",
    [[2**33 + 5], [3, 2**31, 0, 2**31 + 1, 7], [2**32 - 1, 0], [0, 2**35, 0]],
    ids=["above 2^33", "several around 2^31", "last empty", "2^35"],
)
def test_tensors_above_2_31_elements(sizes):
    """The offset arithmetic without the memory: the chunks tile every tensor, once, in order."""
    native = pytest.importorskip("fastloop._native", reason="the native module was not built (FASTLOOP_NATIVE=OFF)")
    chunks = native.chunk_map(sizes)
    reached = [0] * len(sizes)
    previous = -1
    for tensor, offset, length in chunks:
        assert tensor >= previous, "tensors in order"
        assert offset == reached[tensor], "no gap and no overlap"
        assert length > 0
        reached[tensor] += length
        previous = tensor
    assert reached == sizes


def test_chunk_boundaries_depend_on_sizes_alone():
    native = pytest.importorskip("fastloop._native", reason="the native module was not built (FASTLOOP_NATIVE=OFF)")
    sizes = [100, 1_000_003, 0, 5]
    alone = [native.chunk_map([size]) for size in sizes]
    together = native.chunk_map(sizes)
    for i, chunks in enumerate(alone):
        assert [(o, n) for t, o, n in together if t == i] == [(o, n) for _, o, n in chunks]


# -- strides -------------------------------------------------------------------------------------------------


def channels_last():
    return values((4, 3, 5, 6)).to(memory_format=torch.channels_last)


def transposed():
    return values((7, 5)).t()


def permuted():
    return values((3, 4, 5)).permute(2, 0, 1)


def with_gaps():
    return values((6, 10))[:, ::2]


def narrowed():
    return values((6, 10))[1:5, 2:9]


def expanded_unit():
    return values((5, 1, 3)).as_strided((5, 1, 3), (3, 99, 1))  # a stride that no element ever uses


def offset_in_storage():
    return values((65,))[1:]  # four bytes off any alignment


LAYOUTS = [channels_last, transposed, permuted, with_gaps, narrowed, expanded_unit, offset_in_storage]


def with_layout_of(layout: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """`data` in memory laid out as `layout` is, gaps included."""
    span = sum((n - 1) * s for n, s in zip(layout.shape, layout.stride(), strict=True)) + 1
    out = torch.full((span,), math.nan, dtype=data.dtype).as_strided(layout.shape, layout.stride())
    return out.copy_(data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@every_optimizer
def test_non_contiguous_channels_last_and_transposed_parameters(name, layout, dtype, backend):
    model = layout().to(dtype)
    data = with_layout_of(layout(), values(model.shape, dtype))
    assert data.stride() == layout().stride()
    p = torch.nn.Parameter(data)
    assert p.stride() == layout().stride()
    opt = optimizer(name, [p, torch.nn.Parameter(values((3,), dtype))], backend)
    two_checked_steps(opt, lambda: [with_layout_of(layout(), values(p.shape, dtype)), values((3,), dtype)])


@pytest.mark.parametrize("layout", LAYOUTS)
@every_optimizer
def test_strides_of_parameter_and_gradient_that_differ(name, layout, backend):
    """Dense parameter with a strange gradient, and the other way round."""
    strange = layout()
    dense = torch.nn.Parameter(values(strange.shape))
    odd = torch.nn.Parameter(with_layout_of(strange, values(strange.shape)))
    opt = optimizer(name, [dense, odd], backend)
    two_checked_steps(opt, lambda: [with_layout_of(strange, values(strange.shape)), values(strange.shape)])


@every_optimizer
def test_memory_in_the_gaps_of_a_parameter_is_left_alone(name, backend):
    memory = values((6, 10))
    odd_columns = memory[:, 1::2].clone()
    p = torch.nn.Parameter(memory[:, ::2])
    two_checked_steps(optimizer(name, [p], backend))
    assert bits(memory[:, 1::2]) == bits(odd_columns)


@every_optimizer
def test_disjoint_views_of_one_memory_are_fine(name, backend):
    """Interleaved columns share a range of addresses but no element."""
    memory = values((6, 10))
    params = [torch.nn.Parameter(memory[:, ::2]), torch.nn.Parameter(memory[:, 1::2])]
    flat = values((20,))
    params += [torch.nn.Parameter(flat[:8]), torch.nn.Parameter(flat[8:])]
    two_checked_steps(optimizer(name, params, backend))


@every_optimizer
def test_a_gradient_that_is_expanded(name, backend):
    p = torch.nn.Parameter(values((5, 4)))
    two_checked_steps(optimizer(name, [p], backend), lambda: [values((5, 1)).expand(5, 4)])


@pytest.mark.parametrize("overlap", ["same", "shifted", "expanded"])
@every_optimizer
def test_views_that_overlap_raise(name, overlap, backend):
    memory = values((12,))
    views = {
        "same": [memory, memory.view(3, 4)],
        "shifted": [memory[:8], memory[7:]],
        "expanded": [memory[:1].expand(5)],
    }[overlap]
    params = [torch.nn.Parameter(view) for view in views]
    before = bits(memory)
    for p in params:
        p.grad = values(p.shape)
    with pytest.raises((ValueError, RuntimeError), match=rf"\[{name}\].*overlap"):
        optimizer(name, params, backend).step()
    assert bits(memory) == before


# -- kinds of parameters -------------------------------------------------------------------------------------


@every_optimizer
def test_mixed_dtypes_in_one_optimizer(name, backend):
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    params = [torch.nn.Parameter(values((9, 3), dtype)) for dtype in dtypes for _ in range(2)]
    two_checked_steps(make(name, params, backend=backend, ema_decay=0.9, **example(name)))


@every_optimizer
def test_mixed_dtypes_share_one_norm(name, backend):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    params = [torch.nn.Parameter(values((9, 3), dtype)) for dtype in dtypes for _ in range(2)]
    two_checked_steps(optimizer(name, params, backend))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@every_optimizer
def test_complex_parameters_as_pairs_of_reals(name, dtype, choice):
    opt = optimizer(name, parameters(((3, 4), (), (0,)), dtype), choice)
    two_checked_steps(opt)
    for p in opt.param_groups[0]["params"]:
        for key in CASES[name].states:
            assert opt.state[p][key].dtype == dtype


@pytest.mark.parametrize("choice", ["auto", "reference"])
@every_optimizer
def test_complex_beside_real_parameters_and_conjugated_gradients(name, choice):
    params = [torch.nn.Parameter(values((3, 4), torch.complex64)), torch.nn.Parameter(values((5,)))]
    opt = optimizer(name, params, choice)
    two_checked_steps(opt, lambda: [values((3, 4), torch.complex64).conj(), values((5,))])


@every_optimizer
def test_a_gradient_with_the_negative_bit(name, backend):
    """`x.conj().imag` is a lazily negated view: its memory holds the opposite of its values."""
    p = torch.nn.Parameter(values((4,)))

    def negated():
        grad = values((4,), torch.complex64).conj().imag
        assert grad.is_neg()
        return [grad]

    two_checked_steps(optimizer(name, [p], backend), negated)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.sparse])
def test_sparse_gradients_raise_a_clear_error(name, backend):
    params = parameters(((4, 2), (3,)))
    opt = optimizer(name, params, backend)
    set_grads(params)
    params[0].grad = torch.sparse_coo_tensor([[1, 3]], values((2, 2)), (4, 2))
    before = [bits(p) for p in params]
    with pytest.raises(RuntimeError, match=rf"\[{name}\].*sparse"):
        opt.step()
    assert [bits(p) for p in params] == before


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sparse])
def test_sparse_gradients_are_stepped_where_torchs_are(name, backend):
    params = parameters(((4, 2), (3,)))
    settings = {"lr": 0.1, "momentum": 0.9}
    ours = make(name, params, backend="auto" if backend == "cpu" else backend, **settings)
    theirs = torch_twin(ours, settings)
    for _ in range(3):
        set_grads(params)
        params[0].grad = torch.sparse_coo_tensor([[1, 3]], values((2, 2)), (4, 2))
        for p, twin in zip(params, theirs.param_groups[0]["params"], strict=True):
            twin.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, twin in zip(params, theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-6)


@every_optimizer
def test_a_generator_given_as_params(name, backend):
    params = parameters(((3,), (4, 2)))
    opt = optimizer(name, (p for p in params), backend)
    two_checked_steps(opt)
    opt = optimizer(name, [{"params": (p for p in params)}], backend)
    assert opt.param_groups[0]["params"] == params
    two_checked_steps(opt)


# -- hyperparameters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,)])
@every_optimizer
def test_tensor_lr_is_read_anew(name, shape, backend):
    lr = torch.full(shape, 0.01, dtype=torch.float64)
    opt = optimizer(name, parameters(((3,), (4, 2))), backend, lr=lr)
    two_checked_steps(opt)
    assert opt.param_groups[0]["lr"] is lr
    lr.fill_(0.125)
    two_checked_steps(opt)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "betas" in case.defaults])
def test_tensor_betas_are_read_anew(name, backend):
    betas = (torch.tensor(0.5), torch.tensor(0.75))
    opt = optimizer(name, parameters(((3,), (4, 2))), backend, betas=betas)
    two_checked_steps(opt)
    for beta in opt.param_groups[0]["betas"]:
        assert isinstance(beta, torch.Tensor), "as in torch, tensor betas stay tensors"
        beta.mul_(0.5)
    two_checked_steps(opt)
    opt.param_groups[0]["betas"] = (0.25, 0.5)
    two_checked_steps(opt)


@every_optimizer
def test_lr_zero(name, backend):
    opt = optimizer(name, parameters(), backend, lr=0.0)
    params = opt.param_groups[0]["params"]
    before = [bits(p) for p in params]
    two_checked_steps(opt)
    assert [bits(p) for p in params] == before


@every_optimizer
def test_weight_decay_zero(name, backend):
    two_checked_steps(optimizer(name, parameters(), backend, weight_decay=0.0))


@every_optimizer
def test_weight_decay_zero_does_not_read_an_infinite_parameter_into_a_nan(name, backend):
    """0 * inf is NaN: without decay the term must not be there."""
    p = torch.nn.Parameter(torch.tensor([-math.inf, 1.0, math.inf]))
    opt = make(name, [p], backend=backend, **(example(name) | {"weight_decay": 0.0}))
    p.grad = torch.ones(3)
    opt.step()
    assert p[0] == -math.inf
    assert p[2] == math.inf


@every_optimizer
def test_maximize_is_minimizing_the_opposite(name, backend):
    def run(maximize: bool):
        torch.manual_seed(3)
        opt = optimizer(name, parameters(), backend, maximize=maximize)
        params = opt.param_groups[0]["params"]
        for _ in range(2):
            set_grads(params)
            for p in params:
                p.grad = p.grad if maximize else -p.grad
            opt.step()
        return bits_of(opt, grads=False)

    assert run(maximize=True) == run(maximize=False)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if "amsgrad" in case.defaults])
def test_amsgrad_keeps_the_maximum(name, backend):
    opt = optimizer(name, parameters(((3, 4),)), backend, amsgrad=True, betas=(0.9, 0.1), weight_decay=0.0)
    (p,) = opt.param_groups[0]["params"]
    maxima = []
    for scale in (10.0, 0.1, 0.01):
        set_grads([p], scale)
        checked_step(opt)
        maxima.append(opt.state[p]["max_exp_avg_sq"].clone())
    assert (maxima[1] >= maxima[0]).all()
    assert (maxima[2] > opt.state[p]["exp_avg_sq"]).all()


@every_optimizer
def test_hyperparameters_are_rounded_once(name, backend):
    """1 - float(0.9999) is off by 1e-4 of itself: the second moment shows it."""
    if "betas" not in CASES[name].defaults:
        pytest.skip(f"{name} has no difference of hyperparameters near 1")
    p = torch.nn.Parameter(torch.zeros(1))
    opt = make(name, [p], backend=backend, lr=1e-3, betas=(0.9, 0.9999))
    for _ in range(3):
        p.grad = torch.ones(1)
        checked_step(opt)
    assert opt.state[p]["exp_avg_sq"].item() == pytest.approx(1 - 0.9999**3, rel=3 * 2**-24)


# -- groups --------------------------------------------------------------------------------------------------


def groups_of(name: str) -> list[dict]:
    settings = [dict(s) for s in CASES[name].settings.values()]
    return [{"params": parameters(((5, 3), (4,))), **s} for s in settings]


@every_optimizer
def test_several_param_groups_with_their_own_settings(name, backend):
    two_checked_steps(make(name, groups_of(name), backend=backend, max_grad_norm=1.0))


@every_optimizer
def test_our_settings_may_differ_between_groups(name, backend):
    groups = [
        {"params": parameters(((5, 3), (4,)))},
        {"params": parameters(((5, 3), (4,))), "ema_decay": None},
        {"params": parameters(((5, 3), (4,)), torch.bfloat16), "ema_decay": 0.5},
        {"params": parameters(((5, 3), (4,))), "max_grad_value": 0.01},
    ]
    opt = make(name, groups, backend=backend, **OPTIONS, **example(name))
    two_checked_steps(opt)
    assert "ema" not in opt.state[groups[1]["params"][0]]
    assert "ema" in opt.state[groups[0]["params"][0]]


@every_optimizer
def test_groups_left_out_of_the_global_norm(name, backend):
    inside, outside = parameters(((5, 3), (4,))), parameters(((6,),))
    groups = [{"params": inside}, {"params": outside, "max_grad_norm": None}]
    opt = make(name, groups, backend=backend, max_grad_norm=0.1, **example(name))
    two_checked_steps(opt)
    set_grads(inside + outside)
    outside[0].grad.fill_(1e9)
    checked_step(opt)
    assert opt.grad_norm.item() < 1e8
    set_grads(inside + outside)
    outside[0].grad[0] = math.nan  # outside the norm: acts as in torch, and skips nothing
    opt.step()
    assert opt.skipped_steps.item() == 0
    assert outside[0][0].isnan()
    assert all(p.isfinite().all() for p in inside)


@every_optimizer
def test_add_param_group_after_steps(name, backend):
    opt = optimizer(name, parameters(((5, 3), (4,))), backend)
    two_checked_steps(opt)
    opt.add_param_group({"params": parameters(((7,),), torch.bfloat16), "lr": 0.05})
    opt.add_param_group({"params": parameters(((2, 2),)), "max_grad_norm": None})
    two_checked_steps(opt)


# -- addresses -----------------------------------------------------------------------------------------------


@every_optimizer
def test_gradients_whose_address_changes_between_steps(name, backend):
    params = parameters(((300,), (4, 5)))
    opt = optimizer(name, params, backend)
    kept = []
    for _ in range(4):
        set_grads(params)
        kept.append([p.grad for p in params])  # old gradients stay alive, so the addresses must differ
        checked_step(opt)
    assert len({grads[0].data_ptr() for grads in kept}) == 4


@every_optimizer
def test_a_gradient_replaced_by_hand(name, backend):
    params = parameters(((300,), (4, 5)))
    opt = optimizer(name, params, backend)
    set_grads(params)
    checked_step(opt)
    params[0].grad = values((300,))
    params[1].grad = values((5, 4)).t()
    checked_step(opt)
    params[1].grad.data = values((4, 5))  # the same object, another memory
    checked_step(opt)


@every_optimizer
def test_parameters_moved_after_construction(name, backend):
    params = parameters(((300,), (4, 5)))
    opt = optimizer(name, params, backend)
    two_checked_steps(opt)
    old = params[0].data
    kept = bits(old)
    params[0].data = values((300,))
    params[1].data = values((5, 4)).t()
    two_checked_steps(opt)
    assert bits(old) == kept, "the memory that the parameter has left must not be written"


@every_optimizer
def test_parameters_that_change_their_dtype_before_the_first_step(name, backend):
    model = torch.nn.Linear(5, 3)
    opt = optimizer(name, model.parameters(), backend)
    model.to(torch.bfloat16)
    for p in model.parameters():
        p.grad = values(p.shape, torch.bfloat16)
    checked_step(opt)


@every_optimizer
def test_parameters_that_change_their_dtype_after_a_step(name, backend):
    """As torch, which goes on with the states it has: no silent reinterpretation of their memory."""
    model = torch.nn.Linear(5, 3)
    opt = make(name, model.parameters(), backend=backend, **example(name))
    for p in model.parameters():
        p.grad = values(p.shape)
    checked_step(opt)
    model.to(torch.float64)
    for p in model.parameters():
        p.grad = values(p.shape, torch.float64)
    opt.step()
    for p in model.parameters():
        assert p.dtype == torch.float64
        assert p.isfinite().all()
        assert p.abs().max() < 10


@every_optimizer
def test_parameters_swapped_after_construction(name, backend):
    """torch.utils.swap_tensors exchanges two tensors under their names, as `module.to` may."""
    params = parameters(((40,), (4, 5)))
    opt = optimizer(name, params, backend)
    two_checked_steps(opt)
    for p in params:
        p.grad = None
    other = torch.nn.Parameter(values((40,)))
    torch.utils.swap_tensors(params[0], other)
    two_checked_steps(opt)


# -- state_dict, copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_optimizer
def test_load_state_dict_from_and_into_torch_keeps_dtypes(name, dtype, backend):
    torch_settings = example(name)
    ours = make(name, parameters(dtype=dtype), backend=backend, state_dtype=torch.float32, **torch_settings)
    params = ours.param_groups[0]["params"]
    set_grads(params)
    ours.step()
    again = make(name, params, backend=backend, state_dtype=torch.float32, **torch_settings)
    again.load_state_dict(ours.state_dict())
    for p in params:
        for key in CASES[name].states:
            assert again.state[p][key].dtype == torch.float32
            assert bits(again.state[p][key]) == bits(ours.state[p][key])
        if "step" in again.state[p]:
            assert again.state[p]["step"].dtype == torch.float32
            assert again.state[p]["step"].device.type == "cpu"
    theirs = torch_class(name)(params, **torch_settings)
    theirs.load_state_dict(ours.state_dict())
    set_grads(params)
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    set_grads(params)
    checked_step(ours)


@every_optimizer
def test_step_is_a_float32_scalar_on_the_cpu(name, backend):
    opt = optimizer(name, parameters(((3,), (4, 2)), torch.bfloat16), backend)
    two_checked_steps(opt)
    for state in opt.state.values():
        if CASES[name].torch_name != "SGD":
            assert bits(state["step"]) == bits(torch.tensor(2.0))


@every_optimizer
def test_step_counts_far_beyond_what_bf16_counts(name, backend):
    """bf16 cannot count beyond 256; nor may the counter be derived from one that was stored so."""
    if CASES[name].torch_name == "SGD":
        pytest.skip("SGD keeps no step in its state")
    opt = make(name, parameters(((3,),), torch.bfloat16), backend=backend, **example(name))
    params = opt.param_groups[0]["params"]

    last = 300
    params[0].grad = torch.full((3,), 1e-3, dtype=torch.bfloat16)
    opt.step()
    if backend == "triton":  # an interpreted step takes a twentieth of a second: it counts from 250 on
        opt.state[params[0]]["step"].fill_(250)
        last = 260
    for _ in range(last - int(opt.state[params[0]]["step"])):
        params[0].grad = torch.full((3,), 1e-3, dtype=torch.bfloat16)
        opt.step()
    set_grads(params)
    checked_step(opt)
    assert opt.state[params[0]]["step"].item() == last + 1


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"]
)
@every_optimizer
def test_deepcopy_and_pickle_continue_bitwise(name, copier, backend):
    opt = optimizer(name, parameters(dtype=torch.bfloat16), backend, master_weights=True)
    two_checked_steps(opt)
    other = copier(opt)
    theirs = other.param_groups[0]["params"]
    ours = opt.param_groups[0]["params"]
    assert not {p.data_ptr() for p in theirs if p.numel()} & {p.data_ptr() for p in ours if p.numel()}
    for seed in (5, 6):
        for both in (ours, theirs):
            set_grads(both, seed=seed)
        checked_step(opt)
        other.step()
        assert bits_of(other) == bits_of(opt)
        assert bits(other.grad_norm) == bits(opt.grad_norm)


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@every_optimizer
def test_denormals(name, dtype, backend):
    tiny = torch.finfo(dtype).smallest_normal
    p = torch.nn.Parameter((torch.linspace(-1, 1, 67, dtype=torch.float64) * tiny).to(dtype))
    opt = make(name, [p], backend=backend, **example(name))
    for _ in range(3):
        p.grad = (torch.linspace(1, -1, 67, dtype=torch.float64) * tiny).to(dtype)
        checked_step(opt)
    assert (p != 0).sum() > 60


@every_optimizer
def test_denormal_half_precision(name, backend):
    p = torch.nn.Parameter((torch.arange(1, 200) * 2.0**-24).to(torch.float16))
    opt = make(name, [p], backend=backend, max_grad_norm=1.0, **example(name))
    for _ in range(2):
        p.grad = (torch.arange(200, 1, -1) * 2.0**-24).to(torch.float16)
        checked_step(opt)


@every_optimizer
def test_fp16_gradients_whose_squares_overflow(name, backend):
    p = torch.nn.Parameter(values((1000,), torch.float16))
    opt = optimizer(name, [p], backend)
    p.grad = torch.full((1000,), 60000.0, dtype=torch.float16)
    checked_step(opt)
    assert opt.grad_norm.item() == pytest.approx(60000 * 1000**0.5, rel=1e-6)
    assert opt.skipped_steps.item() == 0
    assert p.isfinite().all()


@every_optimizer
def test_every_bit_pattern_of_16_bit_gradients_is_read_exactly(name, backend):
    """All finite bf16 and fp16 numbers as gradients: conversion must be exact, subnormals included."""
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = patterns[patterns.isfinite()]
        if dtype == torch.bfloat16:
            finite = finite[finite.abs() < 1e15]  # squares beyond are another test
        p = torch.nn.Parameter(torch.zeros(finite.numel()))
        p.grad_dtype = dtype
        p.grad = finite.clone()
        opt = make(name, [p], backend=backend, **(example(name) | {"maximize": False, "weight_decay": 0.0}))
        checked_step(opt)
        moment = CASES[name].states[0]
        if moment == "momentum_buffer":
            assert (opt.state[p][moment] == finite.float()).all()


@every_optimizer
def test_every_bit_pattern_of_16_bit_parameters_survives(name, backend):
    """With lr 0 a parameter is read, converted and written back: every number comes back, infinities too."""
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        numbers = patterns[~patterns.isnan()].clone()
        p = torch.nn.Parameter(numbers.clone())
        opt = make(name, [p], backend=backend, **(example(name) | {"lr": 0.0, "weight_decay": 0.0}))
        p.grad = torch.zeros_like(numbers)
        opt.step()
        assert (p == numbers).all()


@every_optimizer
def test_16_bit_parameters_are_rounded_to_nearest_even(name, backend):
    """Updates of the size of an ulp: ties and near-ties, against torch's own conversion of the master."""
    for dtype in (torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        start = torch.ones(400, dtype=dtype)
        p = torch.nn.Parameter(start.clone())
        opt = make(name, [p], backend=backend, master_weights=True, lr=eps, weight_decay=0.0)
        for i in range(4):
            p.grad = torch.linspace(-2, 2, 400).to(dtype) * (i + 1)
            checked_step(opt)  # asserts param == master.to(dtype), bit by bit


@every_optimizer
def test_a_nan_gradient_becomes_a_nan_parameter_not_a_number(name, backend):
    """Without clipping torch lets a NaN through; the 16-bit conversions must not turn it into an infinity."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        p = torch.nn.Parameter(torch.ones(40, dtype=dtype))
        opt = make(name, [p], backend=backend, **example(name))
        p.grad = torch.full((40,), math.nan, dtype=dtype)
        opt.step()
        assert p.isnan().all()


@every_optimizer
def test_clip_by_value_lets_a_nan_through_as_torch_does(name, backend):
    p = torch.nn.Parameter(torch.ones(40))
    opt = make(name, [p], backend=backend, max_grad_value=0.5, **example(name))
    p.grad = torch.ones(40)
    p.grad[17] = math.nan
    opt.step()
    assert p.isnan().nonzero().tolist() == [[17]]


@every_optimizer
def test_the_norm_of_a_step_of_many_elements(name, backend):
    p = torch.nn.Parameter(torch.zeros(1_000_003))
    opt = make(name, [p], backend=backend, max_grad_norm=1.0)
    p.grad = values(p.shape)
    opt.step()
    expected = (wide(p.grad) ** 2).sum() ** 0.5
    assert_norm(opt.grad_norm, expected, p.numel(), torch.float32)


# -- autograd ------------------------------------------------------------------------------------------------


@every_optimizer
def test_a_stale_graph_raises_after_the_step(name, backend):
    p = torch.nn.Parameter(values((5,)))
    opt = optimizer(name, [p], backend)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_optimizer
def test_the_version_counters_of_parameters_move(name, backend):
    params = parameters(((3,), (4, 2)))
    opt = optimizer(name, params, backend, zero_grads=True)
    for _ in range(2):
        set_grads(params)
        versions = [(p._version, p.grad._version) for p in params]
        opt.step()
        for p, (of_param, of_grad) in zip(params, versions, strict=True):
            assert p._version > of_param
            assert p.grad._version > of_grad, "zeroed in place"


@every_optimizer
def test_gradients_that_are_not_written_keep_their_version(name, backend):
    params = parameters(((3,), (4, 2)))
    opt = optimizer(name, params, backend)
    set_grads(params)
    versions = [p.grad._version for p in params]
    opt.step()
    assert [p.grad._version for p in params] == versions
