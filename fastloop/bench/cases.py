# SPDX-License-Identifier: Apache-2.0
"""What is measured: each case declares its input, the bytes it must move, its peers and its check."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fastloop.bench import models
from fastloop.bench.checks import Check, check_step

HEADLINE = "torch-fused"
EVERY_PEER = (HEADLINE, "torch-foreach", "torch-default", "torch-grad-scale", "torch-compile")
OUTSIDE_PEERS = ("apex", "deepspeed", "bitsandbytes")


@dataclass(frozen=True)
class Pass:
    """One sweep over memory: so many streams only read, so many read and written in place."""

    reads: int
    updates: int


@dataclass(frozen=True)
class Traffic:
    """The bytes that a case cannot avoid: each input of a pass read once, each output written once.

    bytes = elements * itemsize * sum over passes of (reads + 2 * updates)
    """

    passes: tuple[Pass, ...]
    elements: int
    itemsize: int

    @property
    def bytes_per_element(self) -> int:
        return self.itemsize * sum(sweep.reads + 2 * sweep.updates for sweep in self.passes)

    @property
    def bytes(self) -> int:
        return self.elements * self.bytes_per_element


def clip_and_adamw(shapes: Sequence[models.Shape], dtype: torch.dtype) -> Traffic:
    """Pass 1 reads the gradients, pass 2 reads them again and updates parameter and both moments.

    32 bytes per fp32 parameter (8 streams of 4 bytes); `clip_grad_norm_` + `AdamW(fused=True)` moves 40, because
    it also writes the clipped gradients and reads them once more.
    """
    elements = sum(math.prod(shape) for shape in shapes)
    return Traffic((Pass(1, 0), Pass(1, 3)), elements, dtype.itemsize)


def _fill(tensor: Tensor, block: Tensor) -> None:
    flat, size = tensor.view(-1), block.numel()
    for start in range(0, flat.numel(), size):
        part = flat[start : start + size]
        part.copy_(block[: part.numel()])


def parameters(shapes: Sequence[models.Shape], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Parameters ~ N(0, 0.02) with gradients ~ N(0, 1), bitwise the same at every call.

    A block of 1 M + 3 random numbers is repeated: drawing 250 M of them would take longer than the measurement.
    """
    generator = torch.Generator().manual_seed(seed)
    size = min(2**20 + 3, max((math.prod(shape) for shape in shapes), default=0))
    values = torch.randn(size, generator=generator)
    gradients = torch.randn(size, generator=generator)
    result = []
    for shape in shapes:
        parameter, gradient = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        _fill(parameter, values)
        parameter.mul_(0.02)
        _fill(gradient, gradients)
        parameter.requires_grad_(True)
        parameter.grad = gradient
        result.append(parameter)
    return result


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    build returns parameters with gradients, the same ones at every call: each contender gets its own. check is
    called with what a contender made of them before anything is timed. goals are ratios that the project wants
    to reach against a peer. `small` cases fit a CI job; `ours` names the contender whose speed-up is reported.
    """

    name: str
    group: str
    title: str
    build: Callable[[], list[Tensor]]
    traffic: Traffic
    peers: tuple[str, ...] = (*EVERY_PEER, *OUTSIDE_PEERS)
    extra_peers: tuple[str, ...] = ()  # measured in the default run beside the headline, with fewer pairs
    check: Check = check_step
    ours: str = "fastloop"
    threads: int | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    small: bool = False

    @property
    def workspace_bytes(self) -> int:
        """Memory that measuring takes at most: ours, a peer and its temporaries (4 tensors each), the reference (3).

        Making the reference takes less: its 4 tensors and the copy of 3 are there before the others.
        """
        return 15 * self.traffic.elements * self.traffic.itemsize


def step_case(
    name: str,
    title: str,
    shapes: Sequence[models.Shape],
    *,
    dtype: torch.dtype = torch.float32,
    group: str = "clip+step",
    ours: str = "fastloop",
    peers: tuple[str, ...] = (*EVERY_PEER, *OUTSIDE_PEERS),
    extra_peers: tuple[str, ...] = (),
    threads: int | None = None,
    goals: Mapping[str, float] | None = None,
    small: bool = False,
) -> Case:
    """A case of clipping by the global norm and one AdamW step over parameters of the given shapes."""
    return Case(
        name=name,
        group=group,
        title=title,
        build=partial(parameters, list(shapes), dtype),
        traffic=clip_and_adamw(shapes, dtype),
        ours=ours,
        peers=peers,
        extra_peers=extra_peers,
        threads=threads,
        goals=goals or {},
        small=small,
    )


# The same code on both sides: what it shows is the machine's noise, never ours. A few larger tensors, because where a
# thousand small ones happen to lie on the heap is worth several per cent to one side.
CONTROL = step_case(
    "control",
    "torch against itself",
    [(2**19,)] * 4,
    group="control",
    ours=HEADLINE,
    peers=(HEADLINE,),
    small=True,
)

MLP = step_case(
    "mlp",
    "MLP 64-64-64-10, 6 tensors",
    models.mlp(64, 64, 64, 10),
    extra_peers=("torch-foreach", "torch-default", "torch-grad-scale", "torch-compile"),
    goals={HEADLINE: 12.0},
    small=True,
)
MANY_SMALL = step_case(
    "1000x1024",
    "1000 tensors of 1024",
    [(1024,)] * 1000,
    extra_peers=("torch-foreach", "torch-default", "torch-grad-scale"),
    goals={HEADLINE: 15.0},
    small=True,
)
RESNET = step_case("resnet-50", "ResNet-50", models.resnet50(), extra_peers=("torch-foreach", "torch-grad-scale"))
BERT = step_case("bert-base", "BERT-base", models.bert())
GPT2 = step_case(
    "gpt2-124m",
    "GPT-2 124M",
    models.gpt2(),
    extra_peers=("torch-grad-scale", "torch-default"),
    goals={HEADLINE: 1.6, "torch-default": 10.0},
)
GPT2_BF16 = step_case(
    "gpt2-124m-bf16",
    "GPT-2 124M, parameters and gradients in bf16",
    models.gpt2(),
    dtype=torch.bfloat16,
    goals={HEADLINE: 2.5},
)

CASES: tuple[Case, ...] = (MLP, MANY_SMALL, GPT2, GPT2_BF16, RESNET, BERT)


class Named(Protocol):
    @property
    def name(self) -> str: ...


AnyNamed = TypeVar("AnyNamed", bound=Named)


def select(pattern: str | None, cases: Sequence[AnyNamed] = CASES) -> list[AnyNamed]:  # type: ignore[assignment]
    """The cases whose name holds `pattern` or matches it as a shell pattern; all of them for None."""
    if pattern is None:
        return list(cases)
    return [case for case in cases if pattern in case.name or fnmatch.fnmatch(case.name, pattern)]
