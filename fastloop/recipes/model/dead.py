# SPDX-License-Identifier: Apache-2.0
"""ReLUs that let nothing pass: units that were zero for every sample seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from fastloop.findings import Finding, listed, ordered
from fastloop.loop.data import samples_in
from fastloop.loop.probe import call, device_of, eval_mode, layers, moved
from fastloop.loop.restore import restored
from fastloop.recipes.model.summary import check_model
from fastloop.recipes.results import Result
from fastloop.texts import columns

WHERE = "[dead_relus]"
ALARMING = 0.1  # share of a layer's units
FEW_SAMPLES = 100  # a unit that 1 sample of 100 wakes is not dead, and would be missed by so few

_UNITS_FIRST = (_NormBase, nn.GroupNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_UNITS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase)
_FUNCTIONS = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)


@dataclass(frozen=True)
class DeadLayer:
    """A call of a ReLU: `name` of the module, "#2" for its second call in a forward, its units and the dead of them."""

    name: str
    units: int
    dead: list[int]

    @property
    def share(self) -> float:
        """Of the units that are dead."""
        return len(self.dead) / self.units if self.units else 0.0


@dataclass(frozen=True)
class DeadUnits(Result):
    """Dead units of each ReLU, over `samples` samples, in the order in which they were called."""

    practice: ClassVar[str] = "dead_relus"
    layers: list[DeadLayer]
    samples: int
    findings: list[Finding]

    def table(self) -> str:
        """Units and dead ones of each ReLU, and the findings below."""
        rows = [(each.name, each.units, len(each.dead), f"{each.share:.1%}") for each in self.layers]
        table = columns(("ReLU", "units", "dead", "share"), rows)
        return f"{table}\n\n{self.samples} samples\n{listed(self.findings)}"


def dead_relus(model: nn.Module, batch: Any, *, batches: int = 10) -> DeadUnits:
    """Units of nn.ReLU modules that are zero for all samples and positions; the share of them in each layer.

    A unit is a channel behind a convolution and a feature behind a linear layer. The model is called in eval mode, with
    the first element of a batch if that is a list or tuple, by name if a dict. It is afterwards as it was.

    Args:
        batch: one, or a loader or iterable of them; a list of batches that are lists, tuples or dicts too.
        batches: of a loader, at most so many.

    Raises:
        ValueError: batches below 1, or a loader without any batch.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"{WHERE} batches must be an integer of at least 1, got {batches!r}; pass e.g. 10")
    check_model(model, WHERE)
    watcher = _Watcher(model)
    samples = 0
    with restored([model]), eval_mode(model), watcher:
        device = device_of(model)
        for each in islice(_iterable(batch), batches):
            samples += samples_in(each)
            watcher.begin()
            call(model, moved(each, device))
    if not samples:
        raise ValueError(f"{WHERE} the loader must give a batch, got none; pass a loader of at least one sample")
    found = [
        DeadLayer(name, active.numel(), (~active).nonzero().flatten().tolist())
        for name, active in watcher.active.items()
    ]
    return DeadUnits(found, samples, ordered(_findings(found, samples, watcher)))


def _iterable(batch: Any) -> Iterable[Any]:
    several = isinstance(batch, list) and all(isinstance(each, (tuple, list, dict)) for each in batch)
    if isinstance(batch, (Tensor, tuple, list, dict)) and not several:
        return [batch]
    if not isinstance(batch, Iterable):
        raise TypeError(f"{WHERE} batch must be a batch or a loader, got {type(batch).__name__}")
    return batch


class _Watcher:
    """Sees what ReLU modules give, and counts the calls of F.relu and its kin, which belong to no module."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = layers(model)
        self._handles: list[Any] = []
        self._functions = _Functions()
        self._calls: dict[str, int] = {}  # of this forward
        self._units_last = False  # whether the layer that was called last has its units in the last dimension
        self._of_modules = self._forwards = 0
        self.active: dict[str, Tensor] = {}
        self.not_finite: set[str] = set()

    @property
    def functional(self) -> int:
        """Calls in a forward that were not those of a module."""
        return -(-(self._functions.count - self._of_modules) // max(self._forwards, 1))

    def __enter__(self) -> _Watcher:
        for name, module in self._layers:
            if isinstance(module, nn.ReLU):
                self._handles.append(module.register_forward_hook(self._seen(name)))
            elif isinstance(module, (*_UNITS_FIRST, *_CONVOLUTIONS, *_UNITS_LAST)):
                self._handles.append(module.register_forward_hook(self._passed))
        self._functions.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._functions.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def begin(self) -> None:
        """A new forward."""
        self._calls = {}
        self._forwards += 1

    def _passed(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._units_last = isinstance(module, _UNITS_LAST)

    def _seen(self, name: str) -> Any:
        def seen(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._of_modules += 1
            self._calls[name] = number = self._calls.get(name, 0) + 1
            key = name if number == 1 else f"{name}#{number}"
            if not bool(torch.isfinite(output).all()):
                self.not_finite.add(key)
            dim = -1 if self._units_last or output.dim() < 2 else 1
            positive = (output != 0).movedim(dim, 0).flatten(1).any(1).cpu()  # NaN is not zero
            earlier = self.active.get(key)
            self.active[key] = positive if earlier is None else earlier | positive

        return seen


class _Functions(TorchFunctionMode):
    """Counts the calls of ReLU's function."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in _FUNCTIONS
        return func(*args, **(kwargs or {}))


def _findings(found: list[DeadLayer], samples: int, watcher: _Watcher) -> list[Finding]:
    findings = []
    for each in found:
        what = f"{len(each.dead)} of {each.units} units ({each.share:.0%}) were zero for all {samples} samples"
        if each.name in watcher.not_finite:
            findings.append(
                Finding("error", each.name, "the output holds NaN or inf", "find the first layer that does")
            )
        elif each.share == 1.0:
            findings.append(
                Finding("error", each.name, what, "nothing passes: lower the learning rate, initialize anew")
            )
        elif each.share >= ALARMING:
            remedy = "lower the learning rate, initialize_weights, or take LeakyReLU or GELU"
            findings.append(Finding("warning", each.name, what, remedy))
        elif each.dead:
            findings.append(Finding("note", each.name, what))
    if watcher.functional:
        what = (
            f"F.relu, torch.relu or Tensor.relu, outside of modules, was not looked at: {watcher.functional} a forward"
        )
        findings.append(Finding("note", "", what, "use nn.ReLU modules to have them seen"))
    elif not found:
        findings.append(Finding("note", "", "no ReLU was called: nothing was looked at"))
    if found and samples < FEW_SAMPLES:
        findings.append(
            Finding("note", "", f"{samples} samples are few: a rarely active unit looks dead", "pass a loader")
        )
    return findings


__all__ = ["DeadLayer", "DeadUnits", "dead_relus"]
