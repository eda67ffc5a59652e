# SPDX-License-Identifier: Apache-2.0
"""Two models on the same inputs: how far their outputs are apart, how large and how fast they are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.bench import stats
from fastloop.bench.measure import measure_pairs
from fastloop.bench.memory import tensors_in
from fastloop.loop.data import map_tensors

PAIRS = 10  # of a latency ratio: 98 % of the interval is then about as wide as the second largest ratio
SECONDS = 5.0  # for them; 5 pairs at least
SEED = 0  # of inputs that the caller has not given


@dataclass(frozen=True)
class Arguments:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: Any) -> Arguments:
        """A tuple or list is the positional arguments, a dict the keyword arguments, anything else the one argument."""
        if isinstance(example, Mapping):
            return cls((), dict(example))
        if isinstance(example, (tuple, list)):
            return cls(tuple(example), {})
        return cls((example,), {})

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """With `function` applied to each tensor."""
        return Arguments(*map_tensors((self.args, self.kwargs), function))

    def to(self, device: torch.device) -> Arguments:
        """A copy on the device, without gradients: a forward that changes its inputs does not change the caller's."""
        return self.mapped(lambda tensor: tensor.detach().to(device, copy=True))

    def fresh(self) -> Arguments:
        """A copy for one call: each model gets the same inputs, whatever an earlier one has written into them."""
        return self.mapped(Tensor.clone)

    def tensors(self) -> list[Tensor]:
        """In the order in which an exported program takes them."""
        return list(tensors_in((self.args, self.kwargs)))

    def call(self, model: Callable[..., Any]) -> Any:
        """model(*args, **kwargs)."""
        return model(*self.args, **self.kwargs)


def batch_of(given: Arguments) -> int | None:
    """Size of the batch: of the first dimension of the first tensor that has one; None without any."""
    return next((tensor.shape[0] for tensor in given.tensors() if tensor.dim()), None)


def of_batch(given: Arguments, size: int) -> Arguments:
    """The same with another batch size: rows are repeated, or left out."""
    batch = batch_of(given)

    def rows(tensor: Tensor) -> Tensor:
        if not is_batched(tensor, batch):
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % tensor.shape[0]]

    return given.mapped(rows)


def is_batched(tensor: Tensor, batch: int | None) -> bool:
    """Whether the tensor's first dimension is the batch."""
    return batch is not None and tensor.dim() > 0 and tensor.shape[0] == batch


def other_values(given: Arguments, seed: int = SEED) -> Arguments:
    """Inputs of the same shapes, each element drawn from the elements of the same tensor: indices stay valid.

    Where all numbers of a tensor are the same, standard normal ones are added.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        flat = tensor.detach().cpu().flatten()
        made = flat[torch.randint(flat.numel(), (flat.numel(),), generator=generator)]
        if tensor.is_floating_point() and bool((flat == flat[0]).all()):
            made = made + torch.randn(flat.numel(), generator=generator).to(made.dtype)
        return made.view(tensor.shape).to(tensor.device)

    return given.mapped(drawn)


@dataclass(frozen=True)
class Difference:
    """Of two models' outputs. `relative` is to the largest |output| of the same tensor; `reason` says what does not
    fit."""

    absolute: float = 0.0
    relative: float = 0.0
    largest: float = 0.0
    reason: str = ""

    def worse(self, other: Difference) -> Difference:
        """The larger of both, number by number."""
        return Difference(
            max(self.absolute, other.absolute),
            max(self.relative, other.relative),
            max(self.largest, other.largest),
            self.reason or other.reason,
        )


def difference(expected: Any, got: Any) -> Difference:
    """How far `got` is from `expected`, tensor by tensor, in fp64; NaN and infinities must be in the same places."""
    wanted, found = (list(tensors_in(each)) for each in (expected, got))
    if not wanted:
        return Difference(math.inf, math.inf, reason="the model gives no tensor")
    if len(wanted) != len(found):
        return Difference(math.inf, math.inf, reason=f"{len(found)} outputs instead of {len(wanted)}")
    whole = Difference()
    for i, (a, b) in enumerate(zip(wanted, found, strict=True)):
        if a.shape != b.shape:
            reason = f"output {i} has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
            return Difference(math.inf, math.inf, reason=reason)
        whole = whole.worse(_of_tensors(a, b, i))
    return whole


def _of_tensors(a: Tensor, b: Tensor, i: int) -> Difference:
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b.to(a.dtype))
    a, b = (x.detach().cpu().double() for x in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    distance = torch.where(same, 0.0, (a - b).abs())
    if not bool(distance.isfinite().all()):
        return Difference(math.inf, math.inf, reason=f"output {i} is not finite where the model's is, or the reverse")
    finite = a[a.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    absolute = float(distance.max()) if distance.numel() else 0.0
    return Difference(absolute, absolute / largest if largest else (math.inf if absolute else 0.0), largest)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored, each once; of quantized ones the integers and scales."""
    seen: dict[tuple[Any, ...], int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            seen[storage.device, storage.data_ptr() or id(part)] = storage.nbytes()
    return sum(seen.values())


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that a tensor subclass holds; itself where it is one."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            part = getattr(tensor, name)
            if isinstance(part, Tensor):
                yield from _parts(part)
    else:
        yield tensor


def latency_ratio(other: Callable[[], Any], model: Callable[[], Any], device: torch.device) -> stats.Interval:
    """Time of `other` over that of `model`, in pairs in turn: below 1 where `other` is faster."""

    def finished(call: Callable[[], Any]) -> Callable[[], Any]:
        if device.type != "cuda":
            return call

        def waited() -> None:
            call()
            torch.cuda.synchronize(device)

        return waited

    deadline = perf_counter() + SECONDS
    pairs = measure_pairs(finished(other), finished(model), pairs=(PAIRS,), deadline=deadline)
    return stats.median_interval(pairs.ratios)
