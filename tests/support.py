# SPDX-License-Identifier: Apache-2.0
"""What the tests share: tensors to try, and `checked_step`, which holds one step against the oracle."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import oracle
import torch
from cases import CASES, Case
from tolerances import Rounded, Rounding, compute_dtype, norm_bound

SHAPES = ((33, 65), (7,), (), (2049,), (3, 0, 2), (4, 3, 5, 5), (0,))
# For interpreted kernels, which take 20 ms a tensor: several rounds with a tail, one element, none, less than a round.
INTERPRETED_SHAPES = ((33, 65), (), (3, 0, 2), (7,))
LOW_PRECISION = (torch.bfloat16, torch.float16)


class Encoder(torch.nn.Module):
    """Two layers of a transformer: [batch, length, 16] to [batch, 3]."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder, self.head = torch.nn.TransformerEncoder(layer, 2), torch.nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


# -- tensors -------------------------------------------------------------------------------------------------


def values(shape: Sequence[int], dtype: torch.dtype = torch.float32, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers whose magnitudes spread over three decades, as gradients' do."""
    if dtype.is_complex:
        return torch.complex(values(shape, dtype.to_real(), scale), values(shape, dtype.to_real(), scale))
    spread = torch.rand(shape, dtype=torch.float64) * 3 - 2
    return (torch.randn(shape, dtype=torch.float64) * 10**spread * scale).to(dtype)


def parameters(
    shapes: Sequence[Sequence[int]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(values(shape, dtype)) for shape in shapes]
    if grad_dtype is not None:
        for p in params:
            p.grad_dtype = grad_dtype
    return params


def shapes_for(backend: str) -> tuple[tuple[int, ...], ...]:
    """What a test of every setting, dtype and option steps."""
    return INTERPRETED_SHAPES if backend == "triton" and not torch.cuda.is_available() else SHAPES


def set_grads(params: Sequence[torch.Tensor], scale: float = 1.0, seed: int | None = None) -> None:
    """New gradients in new memory, dense, in the parameter's `grad_dtype` (its own dtype by default)."""
    if seed is not None:
        torch.manual_seed(seed)
    for p in params:
        p.grad = values(p.shape, getattr(p, "grad_dtype", None) or p.dtype, scale)


def bits(tensor: torch.Tensor | None) -> tuple[Any, ...] | None:
    """Everything of a tensor that must not change: dtype, shape and bit pattern (a NaN equals itself)."""
    if tensor is None:
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    # new memory: a dimension of one element may have any stride, even in a contiguous tensor
    plain = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return tensor.dtype, tuple(tensor.shape), plain.view(torch.uint8).numpy().tobytes()


def bits_of(opt: torch.optim.Optimizer, grads: bool = True, skipped: bool = False) -> list[Any]:
    """The bit patterns of an optimizer's parameters, gradients and states."""
    out: list[Any] = []
    for group in opt.param_groups:
        for p in group["params"]:
            state = opt.state.get(p, {})
            tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
            out.append((bits(p), bits(p.grad) if grads else None, {k: bits(v) for k, v in sorted(tensors.items())}))
    if skipped:
        out.append(bits(opt.skipped_steps))
    return out


def digest(opt: torch.optim.Optimizer) -> str:
    """The bit patterns of an optimizer in one line, to compare between processes."""
    return hashlib.sha256(repr(bits_of(opt)).encode()).hexdigest()


def wide(tensor: torch.Tensor) -> np.ndarray:
    """The elements, exactly: complex ones as pairs, float64 as longdouble (it must see their roundings)."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    array = tensor.to(torch.float64).numpy().copy()
    return array.astype(np.longdouble) if tensor.dtype == torch.float64 else array


def number(value: Any) -> float:
    return value.item() if isinstance(value, torch.Tensor) else float(value)


# -- one step against the oracle ------------------------------------------------------------------------------


def real_dtype(tensor: torch.Tensor) -> torch.dtype:
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def expected_state_dtype(param: torch.Tensor, settings: Mapping[str, Any], name: str) -> torch.dtype:
    """state_dtype=None is torch's choice, but fp32 for fp16 parameters; masters and averages are fp32."""
    dtype = param.dtype
    if name in ("master_param", "ema"):
        return compute_dtype(real_dtype(param))
    if settings.get("state_dtype") is not None and not dtype.is_complex:
        return settings["state_dtype"]
    if settings.get("master_weights") and dtype in LOW_PRECISION:
        return torch.float32
    return torch.float32 if dtype == torch.float16 else dtype


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray, what: str) -> None:
    """|actual - expected| <= bound in every element; non-finite values must be the same."""
    same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
    finite = np.isfinite(expected) & np.isfinite(actual)
    with np.errstate(invalid="ignore"):
        off = np.where(finite, np.abs(actual - expected), np.inf)
        wrong = ~same & ~(off <= bound)
    if wrong.any():
        bound = np.broadcast_to(bound, wrong.shape)
        i = np.unravel_index(np.argmax(np.where(wrong, off / np.maximum(bound, 5e-324), 0)), wrong.shape)
        raise AssertionError(
            f"{what}: {wrong.sum()} of {wrong.size} elements off; worst at {tuple(map(int, i))}: "
            f"{float(actual[i])!r}, wanted {float(expected[i])!r} +- {float(bound[i]):.3e}, "
            f"off by {float(off[i]):.3e} ({float(off[i] / bound[i]) if bound[i] else math.inf:.2f} bounds)"
        )


def clones(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in mapping.items()}


def rule_settings(case: Case, group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters that the rule reads, as the group has them now; tensors as their numbers."""
    out = {key: group[key] for key in case.defaults}
    out["lr"] = number(out["lr"])
    if "betas" in out:
        out["betas"] = tuple(map(number, out["betas"]))
    return out


def checked_step(opt: torch.optim.Optimizer, step: Callable[[], Any] | None = None) -> Any:
    """Take a step and hold every tensor that it may write against the oracle; returns what the step returned.

    Works for torch's own classes too, which is how the oracle itself is tested.
    """
    case = CASES[type(opt).__name__]
    inv_scale = getattr(opt, "grad_scale", None)
    scale = 1.0 if inv_scale is None else number(inv_scale)
    found_inf = getattr(opt, "found_inf", None)
    groups = [{**opt.defaults, **group} for group in opt.param_groups]
    work = [(group, p) for group in groups for p in group["params"] if p.grad is not None]
    before = [(p.detach().clone(), p.grad.clone(), clones(opt.state.get(p, {}))) for _, p in work]
    untouched = bits_of(opt)
    skipped_before = number(getattr(opt, "skipped_steps", 0))

    result = (step or opt.step)()

    max_norm = next((g["max_grad_norm"] for g in groups if g.get("max_grad_norm") is not None), None)
    clip, skip = None, found_inf is not None and number(found_inf) != 0
    if max_norm is not None:
        pairs = zip(work, before, strict=True)
        normed = [grad for (group, _), (_, grad, _) in pairs if group["max_grad_norm"] is not None]
        clip = _checked_clip(opt, normed, scale, max_norm)
        skip = skip or not math.isfinite(number(opt.grad_norm))
    if skip:
        _check_skipped(opt, untouched)
        assert number(opt.skipped_steps) == skipped_before + 1
    else:
        assert number(getattr(opt, "skipped_steps", 0)) == skipped_before

    for index, ((group, p), (old, grad, state)) in enumerate(zip(work, before, strict=True)):
        wanted = torch.zeros_like(grad) if group.get("zero_grads", False) else grad
        assert bits(p.grad) == bits(wanted), f"gradient {index} after the step"
        if skip:
            continue
        clips = group.get("max_grad_norm") is not None and math.isfinite(max_norm)
        _check_parameter(
            f"{case.optimizer} parameter {index} {p.dtype} {tuple(p.shape)}", case, group, opt.state[p], p,
            old, grad, state, scale if inv_scale is not None else None, clip if clips else None,
        )  # fmt: skip
    return result


def _check_skipped(opt: torch.optim.Optimizer, before: Sequence[Any]) -> None:
    """Nothing changed; a state that the skipped step made is as if no step had been."""
    params = [p for group in opt.param_groups for p in group["params"]]
    for (p_bits, _, old), (now_bits, _, now), p in zip(before, bits_of(opt), params, strict=True):
        assert now_bits == p_bits, "a skipped step changed a parameter"
        assert {k: now.get(k) for k in old} == old, "a skipped step changed a state"
        for name in now.keys() - old.keys():
            made = opt.state[p][name]
            start = p.detach() if name in ("ema", "master_param") else torch.zeros_like(made)
            assert bits(made) == bits(start.to(made.dtype)), f"a skipped first step left {name} changed"


def _checked_clip(opt: Any, grads: Sequence[torch.Tensor], scale: float, max_norm: float) -> Callable[[Any], Any]:
    """Check `opt.grad_norm` and return the clip factor that it implies, exact or with its rounding."""
    norm = opt.grad_norm
    params = [p for group in opt.param_groups for p in group["params"]]
    doubles = [compute_dtype(real_dtype(t)) == torch.float64 for t in (*params, *grads)]
    registers = torch.float64 if all(doubles) else torch.float32
    assert norm.dim() == 0
    assert norm.dtype == (torch.float64 if any(doubles[: len(params)]) else torch.float32)
    expected = oracle.total_norm([wide(g) for g in grads]) / np.longdouble(scale)
    assert_norm(norm.to(registers), expected, sum(g.numel() for g in grads), registers)

    def factor(rounded: Any, scalar: Any) -> Any:
        known = np.longdouble(number(norm))
        if rounded is None:
            return scalar(oracle.clip_factor(known, max_norm))
        arithmetic = Rounding.of(norm.dtype)
        return oracle.clip_factor(Rounded.within(known, arithmetic.unit, arithmetic), max_norm)

    return factor


def assert_norm(norm: torch.Tensor, expected: Any, count: int, registers: torch.dtype) -> None:
    assert norm.dtype == registers, f"the norm must be {registers}, got {norm.dtype}"
    bound = norm_bound(count, registers) * np.asarray(expected)
    assert_within(wide(norm), np.asarray(expected), np.asarray(bound), "norm")


def _check_parameter(
    what: str,
    case: Case,
    group: Mapping[str, Any],
    after: Mapping[str, Any],
    param: torch.Tensor,
    old: torch.Tensor,
    grad: torch.Tensor,
    state: Mapping[str, Any],
    scale: float | None,
    clip: Callable[[Any], Any] | None,
) -> None:
    arithmetic = Rounding.of(compute_dtype(real_dtype(param)))
    settings = rule_settings(case, group)
    master = group.get("master_weights", False) and param.dtype in LOW_PRECISION
    start = state.get("master_param", old) if master else old
    stored_param = after["master_param"] if master else param
    t = int(number(state.get("step", 0))) + 1
    moments = {k: wide(v) for k, v in state.items() if k in case.states and v is not None}

    def evaluate(known: Callable[[Any], Any], scalar: Callable[[Any], Any], rounded: Any) -> tuple[Any, Any, Any]:
        g = oracle.effective_gradient(
            known(wide(grad)),
            inv_scale=None if scale is None else scalar(1 / np.longdouble(scale)),
            clip=None if clip is None else clip(rounded, scalar),
            max_value=None if group.get("max_grad_value") is None else scalar(group["max_grad_value"]),
            maximize=settings["maximize"],
        )
        p, states = case.rule(known(wide(start)), g, {k: known(v) for k, v in moments.items()}, t, settings, scalar)
        average = None
        if group.get("ema_decay") is not None:  # of what the step stored
            average = known(wide(state.get("ema", start)))
            average = oracle.ema(average, known(wide(stored_param)), group["ema_decay"], scalar)
        return p, states, average

    scalar = oracle.double if arithmetic.wider is np.float64 else oracle.exact
    with np.errstate(all="ignore"):
        exact_p, exact_states, exact_average = evaluate(lambda x: x, scalar, None)
        bound_p, bound_states, bound_average = evaluate(
            lambda x: Rounded.known(x, arithmetic), Rounded.scalar(arithmetic), arithmetic
        )

        def check(name: str, tensor: torch.Tensor, exact: np.ndarray, bound: Rounded) -> None:
            assert_within(wide(tensor), exact, bound.stored(real_dtype(tensor)), f"{what}: {name}")

        check("parameter", stored_param, exact_p, bound_p)
        if master:
            assert bits(param) == bits(stored_param.to(param.dtype)), f"{what}: copy of its master"
        assert {k for k, v in after.items() if v is not None} <= {*case.states, "step", "master_param", "ema"}
        for name, exact in exact_states.items():
            stored = after[name]
            if state.get(name) is not None:
                assert stored.dtype == state[name].dtype, f"{what}: {name} changed its dtype"
            elif "max_grad_norm" in group:  # ours
                assert stored.dtype == expected_state_dtype(param, group, name), (what, name, stored.dtype)
            assert stored.shape == param.shape
            check(name, stored, exact, bound_states[name])
        if exact_average is not None:
            assert after["ema"].dtype == expected_state_dtype(param, group, "ema")
            check("ema", after["ema"], exact_average, bound_average)
        if "step" in after:
            assert number(after["step"]) == t


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make(name: str, params: Any, **settings: Any) -> Any:
    """The optimizer of ours with this name."""
    import fastloop

    return getattr(fastloop, name)(params, **settings)


def torch_class(name: str) -> type[torch.optim.Optimizer]:
    return getattr(torch.optim, CASES[name].torch_name or name)


def example(name: str) -> dict[str, Any]:
    """The richest settings of this optimizer's case."""
    return dict(CASES[name].settings[CASES[name].example])


def torch_twin(opt: torch.optim.Optimizer, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """torch's optimizer of the same name over copies of the parameters, with one group."""
    params = [torch.nn.Parameter(p.detach().clone()) for group in opt.param_groups for p in group["params"]]
    return torch_class(type(opt).__name__)(params, **settings)


def training_step(model: torch.nn.Module, opt: torch.optim.Optimizer) -> Callable[[torch.Tensor], torch.Tensor]:
    """Forward, backward, step and zero_grad as one function, as people compile it."""

    def step(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    return step
