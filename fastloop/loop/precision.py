# SPDX-License-Identifier: Apache-2.0
"""What is set up once before a training: settings of torch, precision, memory layout, activation checkpointing."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastloop.amp import GradScaler
from fastloop.loop.data import map_tensors
from fastloop.loop.strategy import repeated_blocks
from fastloop.optim.base import FusedOptimizer

PRECISIONS = ("fp32", "bf16", "fp16", "bf16-pure", "auto")


def resolve(precision: str, device: torch.device) -> str:
    """`precision`, with "auto" as bf16 where the device has it and fp16 elsewhere.

    Raises:
        ValueError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"[Loop] precision must be one of {PRECISIONS}, got {precision!r}")
    if precision != "auto":
        return precision
    return "fp16" if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"


def set_process(cudnn_benchmark: bool | None, matmul_precision: str | None, threads: int | None) -> None:
    """Settings of torch for the whole process; None leaves one as it is."""
    if cudnn_benchmark is not None and torch.backends.cudnn.benchmark != cudnn_benchmark:  # torch can freeze the flag
        torch.backends.cudnn.benchmark = cudnn_benchmark
    if matmul_precision is not None:
        torch.set_float32_matmul_precision(matmul_precision)
    if threads is not None:
        torch.set_num_threads(threads)


def autocast(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context of a forward."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None:
        nothing = nullcontext()
        return lambda: nothing
    return partial(torch.autocast, device.type, dtype=dtype)


def scaler(precision: str, device: torch.device) -> GradScaler | None:
    """fp16's loss scale; the others need none."""
    return GradScaler(device.type) if precision == "fp16" else None


def to_pure_bf16(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Make the model's parameters bf16; returns their fp32 values by name, for `give_masters`.

    Raises:
        TypeError: an optimizer that keeps no master weights.
        RuntimeError: one that has stepped already without them.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f'[Loop] precision="bf16-pure" updates fp32 master weights, which {type(optimizer).__name__} of torch does '
            'not keep; use the optimizer of that name from fastloop, or precision="bf16"'
        )
    if optimizer.defaults["state_dtype"] == torch.bfloat16:
        raise ValueError(
            '[Loop] precision="bf16-pure" keeps fp32 master weights and states, and the optimizer has '
            "state_dtype=torch.bfloat16; leave that out"
        )
    if not optimizer.defaults["master_weights"] and any(optimizer.state.values()):
        raise RuntimeError(
            '[Loop] precision="bf16-pure" with an optimizer that has stepped without master weights; construct it with '
            "master_weights=True"
        )
    optimizer.defaults["master_weights"] = True
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.dtype == torch.float32}
    model.to(torch.bfloat16)
    model.register_forward_pre_hook(_inputs_in_bf16, with_kwargs=True)
    optimizer._forget_plan()
    return before


def compile_in_place(model: nn.Module) -> None:
    """As `model.compile()`, for containers too.

    torch.compile passes over frames of torch's own, nn.Sequential's forward among them, and compiles nothing then. A
    frame of ours around the call is one that it takes. Its code is a copy: what torch.compile keeps, up to 8 forms of
    one code, is of this model alone, and begins anew where the model is compiled again.
    """
    call = model._call_impl

    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    forward.__code__ = forward.__code__.replace()
    model._compiled_call_impl = torch.compile(forward)


def _inputs_in_bf16(module: nn.Module, args: Any, kwargs: Any) -> Any:
    del module
    return map_tensors((args, kwargs), lambda t: t.to(torch.bfloat16) if t.dtype == torch.float32 else t)


def give_masters(model: nn.Module, optimizer: torch.optim.Optimizer, masters: Mapping[str, Tensor]) -> None:
    """Master weights that start from the fp32 values and not from their roundings, sharded where the parameters are."""
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters: Iterable[tuple[str, Any]] = model.named_parameters()
    for name, p in parameters:
        if name not in masters or id(p) not in stepped or "master_param" in optimizer.state.get(p, {}):
            continue
        value = masters[name]
        if hasattr(p, "device_mesh"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, p.device_mesh, p.placements)
        optimizer.state[p]["master_param"] = value


def checkpoint_activations(model: nn.Module, which: Sequence[str] | int) -> list[str]:
    """Make the named layers compute their activations again in backward instead of keeping them.

    Args:
        model: changed in place; names of parameters stay.
        which: patterns of module names, such as "blocks.*", or n: every n-th of the repeated blocks.

    Returns:
        The names of the layers.

    Raises:
        ValueError: a pattern, or a number, that fits no layer.
    """
    names = {id(module): name for name, module in model.named_modules()}
    if isinstance(which, int) and not isinstance(which, bool):
        if which < 1:
            raise ValueError(f"[Loop] activation_checkpointing must be at least 1, got {which}; 1 is every block")
        chosen = repeated_blocks(model)[which - 1 :: which]
        if not chosen:
            raise ValueError(
                f"[Loop] activation_checkpointing={which}: the model has no ModuleList or Sequential of that many "
                'blocks; pass names, e.g. ["encoder.*"]'
            )
    elif isinstance(which, bool) or not which:
        raise ValueError(f"[Loop] activation_checkpointing must be names or a number, got {which!r}; 1 is every block")
    else:
        patterns = [which] if isinstance(which, str) else list(which)  # type: ignore[arg-type]
        chosen = []
        for pattern in patterns:
            fitting = [m for name, m in model.named_modules() if name and _fits(name, pattern)]
            if not fitting:
                raise ValueError(
                    f"[Loop] activation_checkpointing: no layer is named {pattern!r}; the model has "
                    f"{sorted(name for name in names.values() if name)[:20]}"
                )
            chosen += fitting
    outermost = _outermost(model, chosen)
    for module in outermost:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    return [names[id(module)] for module in outermost]


def _fits(name: str, pattern: str) -> bool:
    """As in a shell, but that `*` does not cross a dot: "blocks.*" is the blocks and not what is in them."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(p, w) for p, w in zip(parts, wanted, strict=True))


def _outermost(model: nn.Module, chosen: Sequence[nn.Module]) -> list[nn.Module]:
    """Without those inside others: what is recomputed once needs not be recomputed twice."""
    inside = {id(inner) for module in chosen for inner in module.modules() if inner is not module}
    unique = {id(module): module for module in chosen}
    return [module for key, module in unique.items() if key not in inside]
