# SPDX-License-Identifier: Apache-2.0
"""Everything that clips by the global norm and takes one AdamW step: ours, torch's ways, and installed others.

torch's `clip_grad_norm_` writes the clipped gradients back, so that from the second step on the norm is already
`max_norm` and the clip factor about 1; it multiplies all the same, so a repeated step does the work of a first one.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastloop.bench.checks import LR, MAX_NORM

WEIGHT_DECAY = 1e-2  # torch's default, said because outside optimizers have others
COMPILED_TENSORS = 200  # inductor's compile time grows with the tensors: seconds for 6, minutes for 1000


@dataclass(frozen=True)
class Stepper:
    """One contender at work on its own parameters."""

    step: Callable[[], object]
    optimizer: Any


@dataclass(frozen=True)
class Contender:
    """A way to clip and step. `unavailable` gives the reason it cannot run here for so many tensors, or None."""

    name: str
    title: str
    build: Callable[[list[Tensor]], Stepper]
    unavailable: Callable[[int], str | None] = lambda tensors: None
    torch_norm: bool = True  # whether its clip factor has the error of torch's norm
    outside: bool = False  # another project's: a different result leaves it out, it is not our failure


def _ours(parameters: list[Tensor]) -> Stepper:
    # Through the module's attribute, so that what is measured is what a user's import gets.
    optimizer = import_module("fastloop").AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM)
    return Stepper(optimizer.step, optimizer)


def _clip_then(optimizer: Any, parameters: list[Tensor]) -> Stepper:
    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    return Stepper(step, optimizer)


def _torch(**options: Any) -> Callable[[list[Tensor]], Stepper]:
    def build(parameters: list[Tensor]) -> Stepper:
        optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, **options)
        return _clip_then(optimizer, parameters)

    return build


def _grad_scale(parameters: list[Tensor]) -> Stepper:
    """The clip folded into the fused step: it divides the gradients by `grad_scale` = max(norm/max_norm, 1)."""
    optimizer: Any = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    optimizer.found_inf = torch.zeros((), device=parameters[0].device)

    def step() -> None:
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer.grad_scale = (norm.float() / MAX_NORM).clamp_(min=1.0)
        optimizer.step()

    return Stepper(step, optimizer)


def _compiled(parameters: list[Tensor]) -> Stepper:
    import torch._inductor.config as inductor

    # Dynamo warns that it leaves the optimizer's profiler record out of the graph: nothing that is measured here.
    torch._logging.set_logs(dynamo=logging.ERROR)
    inductor.compile_threads = 1  # no pool of compiler processes left behind beside the measurement
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY)
    eager = _clip_then(optimizer, parameters)
    return Stepper(torch.compile(eager.step), optimizer)


def _no_compiler(tensors: int) -> str | None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        return "torch.compile needs a C++ compiler, and none was found"
    if tensors > COMPILED_TENSORS:
        return f"torch.compile of {tensors} tensors takes minutes; measured up to {COMPILED_TENSORS}"
    return None


@cache
def import_problem(module: str) -> str | None:
    if find_spec(module) is None:
        return f"{module} is not installed"
    try:
        import_module(module)
    except Exception as error:  # an outside package may fail in any way at import; the row says how
        return f"{module} does not import: {type(error).__name__}: {error}"
    return None


def _outside(name: str, title: str, attribute: str) -> Contender:
    """A contender from the package `name`, whose optimizer class has the dotted path `attribute`."""
    module, _, class_name = attribute.rpartition(".")

    def build(parameters: list[Tensor]) -> Stepper:
        optimizer_class = getattr(import_module(module), class_name)
        return _clip_then(optimizer_class(parameters, lr=LR, weight_decay=WEIGHT_DECAY), parameters)

    return Contender(name, title, build, lambda tensors: import_problem(name), outside=True)


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("fastloop", "fastloop.AdamW(max_grad_norm)", _ours, torch_norm=False),
        Contender("torch-fused", "clip_grad_norm_ + AdamW(fused=True)", _torch(fused=True)),
        Contender("torch-foreach", "clip_grad_norm_ + AdamW(foreach=True)", _torch(foreach=True)),
        Contender("torch-default", "clip_grad_norm_ + AdamW()", _torch()),
        Contender("torch-grad-scale", "get_total_norm, folded into AdamW(fused=True).grad_scale", _grad_scale),
        Contender("torch-compile", "torch.compile(clip_grad_norm_ + AdamW())", _compiled, _no_compiler),
        _outside("apex", "clip_grad_norm_ + apex FusedAdam", "apex.optimizers.FusedAdam"),
        _outside("deepspeed", "clip_grad_norm_ + DeepSpeedCPUAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam"),
        _outside("bitsandbytes", "clip_grad_norm_ + bitsandbytes AdamW", "bitsandbytes.optim.AdamW"),
    )
}
