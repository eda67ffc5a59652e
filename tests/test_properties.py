# SPDX-License-Identifier: Apache-2.0
"""hypothesis over shapes, dtypes, strides and settings: whatever the model, each step is within its bound."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import oracle
import pytest
import torch
from cases import CASES
from hypothesis import HealthCheck, given, settings
from support import assert_norm, bits_of, checked_step, make, threads, values, wide

import fastloop

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
quick = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
# Most of it on the CPU kernels: their loops have the most shapes, one for each instruction set.
AT_LENGTH = {"cpu": 1500, "reference": 300, "cuda": 200, "triton": 150}

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.integers(0, 3000).map(lambda n: (n,))
unit = st.floats(0, 0.9999)


@st.composite
def layouts(draw: Any, shape: tuple[int, ...]) -> tuple[torch.Size, tuple[int, ...], int]:
    """Strides without overlap: any order of dimensions, a gap after each, an offset into the memory."""
    strides, span = [0] * len(shape), 1
    for dim in draw(st.permutations(range(len(shape)))):
        strides[dim] = span
        span *= max(shape[dim], 1) * draw(st.sampled_from((1, 1, 1, 2)))
    return torch.Size(shape), tuple(strides), draw(st.sampled_from((0, 0, 1, 3)))


def in_layout(layout: tuple[torch.Size, tuple[int, ...], int], dtype: torch.dtype) -> torch.Tensor:
    shape, strides, offset = layout
    span = 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    memory = torch.full((offset + span,), math.nan, dtype=dtype)
    return memory.as_strided(shape, strides, offset).copy_(values(shape, dtype))


@st.composite
def models(draw: Any, max_tensors: int = 6) -> list[dict[str, Any]]:
    """Tensors in one or two dtypes, gradients laid out as their parameter or otherwise."""
    dtypes = draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=2))
    tensors = []
    for shape in draw(st.lists(shapes, min_size=1, max_size=max_tensors)):
        param = draw(layouts(shape))
        dtype = draw(st.sampled_from(dtypes))
        grad_dtype = draw(st.sampled_from((dtype, dtype, torch.float32)))
        grad = draw(st.one_of(st.just(param), layouts(shape)))
        tensors.append({"param": param, "grad": grad, "dtype": dtype, "grad_dtype": grad_dtype})
    return tensors


RULE_SETTINGS = {
    oracle.adam: st.fixed_dictionaries(
        {
            "lr": st.floats(0, 0.1),
            "betas": st.tuples(unit, unit),
            "eps": st.floats(1e-8, 1),
            "weight_decay": st.sampled_from((0.0, 0.01)) | st.floats(0, 1),
            "amsgrad": st.booleans(),
            "maximize": st.booleans(),
        }
    ),
    oracle.sgd: st.fixed_dictionaries(
        {
            "lr": st.floats(0, 0.1),
            "momentum": st.sampled_from((0.0, 0.9)) | unit,
            "dampening": st.sampled_from((0.0, 0.5)) | unit,
            "weight_decay": st.sampled_from((0.0, 0.01)) | st.floats(0, 1),
            "maximize": st.booleans(),
        }
    ),
}
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "max_grad_norm": st.floats(1e-3, 1e3) | st.just(math.inf),
        "max_grad_value": st.floats(1e-3, 10),
        "ema_decay": unit,
        "zero_grads": st.booleans(),
        "master_weights": st.booleans(),
        "state_dtype": st.sampled_from((None, torch.float32, torch.bfloat16)),
    },
).filter(lambda options: not (options.get("master_weights") and options.get("state_dtype") == torch.bfloat16))


def build(model: list[dict[str, Any]], name: str, arguments: dict[str, Any]) -> Any:
    params = []
    for tensor in model:
        p = torch.nn.Parameter(in_layout(tensor["param"], tensor["dtype"]))
        p.grad_dtype = tensor["grad_dtype"]
        params.append(p)
    return make(name, params, **arguments)


def fresh_grads(opt: Any, model: list[dict[str, Any]], present: list[bool]) -> None:
    for p, tensor, has in zip(opt.param_groups[0]["params"], model, present, strict=True):
        p.grad = in_layout(tensor["grad"], tensor["grad_dtype"]) if has else None


def check_any_model(data: Any, name: str, backend: str) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    model = data.draw(models(), label="model")
    rule = data.draw(RULE_SETTINGS[CASES[name].rule], label="settings")
    options = data.draw(OPTIONS, label="options")
    if "nesterov" in CASES[name].defaults:
        rule["nesterov"] = rule["momentum"] > 0 and rule["dampening"] == 0
    mixed = any(t["dtype"] == torch.float64 or t["grad_dtype"] == torch.float64 for t in model)
    if mixed and not all(t["dtype"] == t["grad_dtype"] == torch.float64 for t in model):
        options.pop("max_grad_norm", None)  # what a norm over fp64 and others is kept in is tested on its own
    opt = build(model, name, rule | options | {"backend": backend})
    for _ in range(2):
        present = st.lists(st.sampled_from((True, True, True, False)), min_size=len(model), max_size=len(model))
        fresh_grads(opt, model, data.draw(present, label="has gradient"))
        checked_step(opt)


@pytest.mark.parametrize("name", CASES)
@quick
@given(data=st.data())
def test_any_model_any_settings(name, backend, data):
    check_any_model(data, name, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_any_model_any_settings_at_length(name, backend):
    @settings(quick, max_examples=AT_LENGTH[backend])
    @given(data=st.data())
    def check(data):
        check_any_model(data, name, backend)

    check()


@pytest.mark.parametrize("name", CASES)
@settings(quick, max_examples=25)
@given(seed=st.integers(0, 2**31), model=models(), counts=st.permutations((1, 2, 3)))
def test_any_model_gives_the_same_bits_for_every_thread_count(name, backend, seed, model, counts):
    outcomes = []
    for count in counts:
        torch.manual_seed(seed)
        with threads(count):
            opt = build(model, name, {"backend": backend, "max_grad_norm": 0.5, "ema_decay": 0.9})
            for _ in range(2):
                fresh_grads(opt, model, [True] * len(model))
                opt.step()
        outcomes.append(bits_of(opt))
    assert outcomes[0] == outcomes[1] == outcomes[2]


@quick
@given(seed=st.integers(0, 2**31), layout=shapes.flatmap(layouts), dtype=st.sampled_from(DTYPES))
def test_any_layout_has_the_norm_of_its_elements(seed, layout, dtype):
    torch.manual_seed(seed)
    grad = in_layout(layout, dtype)
    registers = torch.float64 if dtype == torch.float64 else torch.float32
    assert_norm(fastloop.get_total_norm([grad]), oracle.total_norm([wide(grad)]), grad.numel(), registers)


@quick
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 200_000) | st.integers(0, 40), min_size=1, max_size=6),
    where=st.floats(0, 1, exclude_max=True),
    bad=st.sampled_from((math.nan, math.inf, -math.inf)),
)
def test_a_nonfinite_element_anywhere_makes_the_norm_nonfinite(seed, sizes, where, bad):
    torch.manual_seed(seed)
    grads = [torch.randn(n) for n in sizes]
    total = sum(sizes)
    if total == 0:
        assert fastloop.get_total_norm(grads).item() == 0
        return
    position = int(where * total)
    for grad in grads:
        if position < grad.numel():
            grad[position] = bad
            break
        position -= grad.numel()
    for norm_type in (2.0, 1.0, math.inf):
        assert not fastloop.get_total_norm(grads, norm_type).isfinite()


@quick
@given(sizes=st.lists(st.integers(0, 2**40) | st.integers(0, 10_000_000), max_size=5))
def test_chunks_tile_any_sizes(sizes):
    native = pytest.importorskip("fastloop._native", reason="the native module was not built (FASTLOOP_NATIVE=OFF)")
    sizes = [n if n < 2**34 else n % 2**34 for n in sizes]
    reached = [0] * len(sizes)
    for tensor, offset, length in native.chunk_map(sizes):
        assert length > 0
        assert offset == reached[tensor]
        reached[tensor] += length
    assert reached == sizes
