# SPDX-License-Identifier: Apache-2.0
"""Weights set to zero: the smallest of the model, or whole output channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastloop.findings import Finding, listed
from fastloop.recipes.results import Result
from fastloop.texts import columns

METHODS = ("magnitude", "random")
PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # weights [outputs, ...]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class PruneReport(Result):
    """What has been set to zero.

    Attributes:
        sparsity: by layer, the share of its weights that are zero now.
        pruned, total: weights that are zero now, and all of the pruned layers.
    """

    practice: ClassVar[str] = "prune"
    amount: float
    method: str
    structured: bool
    pruned: int
    total: int
    sparsity: dict[str, float]
    findings: list[Finding] = field(default_factory=list)
    masks: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False)  # (parameter, what is zero)

    def table(self) -> str:
        """Sparsity by layer."""
        rows: list[tuple[str, float]] = [*self.sparsity.items(), ("all", self.pruned / self.total)]
        return f"{columns(('layer', 'share of zeros'), rows)}\n{listed(self.findings)}"

    def apply(self) -> None:
        """Set what was pruned to zero again."""
        with torch.no_grad():
            for parameter, zero in self.masks:
                parameter.masked_fill_(zero if zero.device == parameter.device else zero.to(parameter.device), 0)

    def keep(self, optimizer: torch.optim.Optimizer) -> Any:
        """Keep it zero in further training: `apply` after each step of `optimizer`; returns a handle with `remove()`.

        Exact: what runs between two steps sees zeros only. The pruned weights' gradients still count in max_grad_norm.

        Raises:
            ValueError: the optimizer has none of the pruned weights.
        """
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(parameter) in stepped for parameter, _ in self.masks):
            raise ValueError(
                "[prune] keep needs the optimizer of the pruned model, this one has none of its weights; pass "
                "the one that trains it"
            )

        def after_step(*_: Any) -> None:
            self.apply()

        return optimizer.register_step_post_hook(after_step)


def prune(
    model: nn.Module,
    amount: float,
    *,
    method: str = "magnitude",
    structured: bool = False,
    only: str | Sequence[str] | None = None,
) -> PruneReport:
    """Set a share of the weights of linear and convolution layers to zero, in place and for good.

    Unstructured, `amount` of all their weights together goes: those of the smallest |w|, or random ones. Structured,
    that share of each layer's output channels goes: those of the smallest norm ||w_i||_2, with their biases; shapes
    stay. The model's last layer is left out then, unless `only` names it: its channels are the answers.

    Args:
        model: changed in place; parameters stay the same objects, so that optimizers go on. No reparametrization is
            left in it.
        amount: in (0, 1); weights that are zero already count.
        method: "magnitude", or "random", which draws from torch's global generator.
        structured: zero output channels instead of single weights.
        only: patterns of layer names, as "blocks.*"; None: all.

    Raises:
        ValueError: an amount or method out of range, no layer to prune, a pattern that fits none, weights that are not
            finite, not in memory as plain tensors (sharded or quantized), or not there yet.
        TypeError: no module.
        NotImplementedError: structured pruning of transposed convolutions that `only` names.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015; Li et al., "Pruning
    Filters for Efficient ConvNets", 2017.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[prune] model must be an nn.Module, got {type(model).__name__}")
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 < amount < 1:
        raise ValueError(f"[prune] amount must be a share in (0, 1), got {amount!r}; 0.5 prunes half of the weights")
    if method not in METHODS:
        raise ValueError(f"[prune] method must be one of {METHODS}, got {method!r}")
    patterns = None if only is None else [only] if isinstance(only, str) else list(only)
    layers, findings = _layers(model, patterns, structured)
    _check_weights(layers)
    masks = _channel_masks(layers, amount, method) if structured else _weight_masks(layers, amount, method)
    sparsity: dict[str, float] = {}
    report = PruneReport(float(amount), method, structured, 0, 0, sparsity, findings, masks)
    report.apply()
    for name, layer in layers:
        zeros, size = int((layer.weight == 0).sum()), layer.weight.numel()
        sparsity[name] = zeros / size
        report.pruned, report.total = report.pruned + zeros, report.total + size
    advice = "build a narrower model of what is left" if structured else "compress the file, or use sparse kernels"
    what = "dense kernels compute with zeros as with other numbers: the model is neither faster nor smaller in memory"
    findings.append(Finding("note", "speed", what, advice))
    findings.append(
        Finding("note", "accuracy", "pruning costs accuracy", "measure it; train on with report.keep(optimizer)")
    )
    return report


def _layers(
    model: nn.Module, patterns: list[str] | None, structured: bool
) -> tuple[list[tuple[str, Any]], list[Finding]]:
    """Layers whose weights are parameters of their own, each weight once."""
    found: list[tuple[str, Any]] = []
    findings, seen = [], set()
    for name, module in model.named_modules():
        if not isinstance(module, PLAIN + TRANSPOSED):
            continue
        weight = module._parameters.get("weight")
        if weight is None:
            findings.append(
                Finding("warning", name, "left out: its weight is computed from others", "remove the parametrization")
            )
        elif id(weight) not in seen:
            seen.add(id(weight))
            found.append((name, module))
    named = [pair for pair in found if patterns is None or any(fnmatchcase(pair[0], pattern) for pattern in patterns)]
    for pattern in patterns or ():
        if not any(fnmatchcase(name, pattern) for name, _ in found):
            names = ", ".join(name or "the model itself" for name, _ in found[:8])
            raise ValueError(
                f"[prune] only={pattern!r} fits no linear or convolution layer; they are: {names or 'none'}"
            )
    if structured:
        named, more = _structured(named, found, patterns is not None)
        findings += more
    if not named:
        raise ValueError("[prune] the model has no linear or convolution layer to prune; look at its layers")
    return named, findings


def _structured(
    named: list[tuple[str, Any]], every: list[tuple[str, Any]], chosen: bool
) -> tuple[list[tuple[str, Any]], list[Finding]]:
    transposed = [name for name, module in named if isinstance(module, TRANSPOSED)]
    if transposed and chosen:
        raise NotImplementedError(f"[prune] structured pruning of transposed convolutions is not built: {transposed}")
    findings = [Finding("note", name, "left out: a transposed convolution") for name in transposed]
    last = None if chosen or not every else every[-1][0]
    if last is not None and last not in transposed:
        findings.append(
            Finding("note", last, "left out: the last layer's channels are the answers", f"only={[last]!r} takes it")
        )
    return [pair for pair in named if pair[0] != last and pair[0] not in transposed], findings


def _check_weights(layers: list[tuple[str, Any]]) -> None:
    for name, layer in layers:
        if is_lazy(layer.weight):
            raise ValueError(f"[prune] {name or 'the model'} has no weights yet; run one batch through the model first")
        if type(layer.weight.data) is not Tensor or not layer.weight.is_floating_point():
            kind = type(layer.weight.data).__name__
            raise ValueError(
                f"[prune] {name or 'the model'}'s weight must be a plain tensor, got {kind}; prune before "
                "sharding or quantizing"
            )
        if not layer.weight.isfinite().all():
            raise ValueError(
                f"[prune] {name or 'the model'}'s weights must be finite, some are not; look at the training"
            )


def _weight_masks(layers: list[tuple[str, Any]], amount: float, method: str) -> list[tuple[Tensor, Tensor]]:
    """Over all layers together: exactly round(amount * weights), of equal ones the first."""
    weights = [layer.weight.detach() for _, layer in layers]
    total = sum(weight.numel() for weight in weights)
    count = round(amount * total)
    if method == "random":
        chosen = torch.randperm(total)[:count]
    else:
        sizes = torch.cat([weight.abs().float().flatten().cpu() for weight in weights])
        chosen = torch.sort(sizes, stable=True).indices[:count]
    zero = torch.zeros(total, dtype=torch.bool)
    zero[chosen] = True
    parts = zero.split([weight.numel() for weight in weights])
    return [
        (layer.weight, part.view(weight.shape).to(weight.device))
        for (_, layer), weight, part in zip(layers, weights, parts, strict=True)
    ]


def _channel_masks(layers: list[tuple[str, Any]], amount: float, method: str) -> list[tuple[Tensor, Tensor]]:
    """In each layer round(amount * channels) of them, but never all."""
    masks: list[tuple[Tensor, Tensor]] = []
    for _, layer in layers:
        weight = layer.weight.detach()
        channels = weight.shape[0]
        count = min(round(amount * channels), channels - 1)
        if method == "random":
            chosen = torch.randperm(channels)[:count]
        else:
            chosen = torch.sort(weight.flatten(1).double().norm(dim=1).cpu(), stable=True).indices[:count]
        zero = torch.zeros(channels, dtype=torch.bool)
        zero[chosen] = True
        zero = zero.to(weight.device)
        masks.append((layer.weight, zero.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)))
        if layer.bias is not None:
            masks.append((layer.bias, zero))
    return masks
