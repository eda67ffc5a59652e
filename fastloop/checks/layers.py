# SPDX-License-Identifier: Apache-2.0
"""Layers that do not go together, or not with the batch: normalization by batch size, order, modes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastloop.findings import Finding

FEW, SOME = 16, 32  # samples that BatchNorm's statistics are of: below FEW they are poor, below SOME not good
ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid,
    nn.Softplus, nn.Hardswish, nn.Hardtanh,
)  # fmt: skip
AFFINE = (nn.Linear, nn.modules.conv._ConvNd)
DROPOUTS = nn.modules.dropout._DropoutNd
NAMED = 4  # layers in a finding; of others the number


def check_normalization(model: nn.Module, batch_size: int) -> list[Finding]:
    """BatchNorm in train mode whose statistics would be of few samples.

    Fewer than 16 are a warning, fewer than 32 a note (Wu and He 2018, figure 1, has errors grow below 16). With one,
    BatchNorm1d raises where there is no length to take the statistics over.

    Args:
        model: BatchNorm in eval mode inside of a model in train mode is frozen, and does not count.
        batch_size: of a micro-batch on one rank; accumulation does not make it larger. SyncBatchNorm takes that of all
            ranks, so give that.

    Raises:
        ValueError: a batch size below 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"[checks] batch_size must be an integer of at least 1, got {batch_size!r}")
    found = batchnorms(model)
    if not found or batch_size >= SOME:
        return []
    remedy = "use larger batches, or GroupNorm: fastloop.recipes.replace_batchnorm(model)"
    where = named(name for name, _ in found)
    if batch_size >= FEW:
        what = f"BatchNorm over {batch_size} samples: its statistics get better up to {SOME}"
        return [Finding("note", where, what, remedy)]
    raises = batch_size == 1 and any(isinstance(module, nn.BatchNorm1d) for _, module in found)
    what = f"BatchNorm over {batch_size} sample{'s' * (batch_size > 1)}: its statistics are mostly noise"
    if raises:
        what += "; BatchNorm1d of [1, channels] raises in train mode"
    return [Finding("error" if raises else "warning", where, what, remedy)]


def check_layer_order(model: nn.Module) -> list[Finding]:
    """What follows what in nn.Sequential: BatchNorm after an activation or dropout, a bias before BatchNorm.

    In other modules the order of execution cannot be seen. All are notes: they work, and cost something.
    """
    findings: list[Finding] = []
    for first, second in _neighbours(model):
        (name, layer), (next_name, next_layer) = first, second
        if not isinstance(next_layer, _BatchNorm):
            continue
        kind = type(layer).__name__
        if isinstance(layer, ACTIVATIONS):
            what = f"BatchNorm after {kind}: it was made to stand before the activation (Ioffe and Szegedy 2015)"
            findings.append(
                Finding("note", next_name, what, "put it between the layer and its activation, or compare both")
            )
        elif isinstance(layer, DROPOUTS):
            what = f"BatchNorm after {kind}: the variance that it learns in training is another one in evaluation"
            findings.append(Finding("note", next_name, what, "put dropout after the last BatchNorm (Li et al. 2019)"))
        elif isinstance(layer, AFFINE) and layer.bias is not None:
            what = f"the bias of {kind} before BatchNorm is subtracted again with the mean"
            findings.append(Finding("note", name, what, "bias=False saves it"))
    return findings


def check_modes(model: nn.Module) -> list[Finding]:
    """Modes in which the training would begin: parts in eval mode."""
    if not model.training:
        what = "the model is in eval mode: it would train without dropout, and BatchNorm would not learn its statistics"
        return [Finding("warning", "model", what, "call model.train(); `fit` does")]
    findings = []
    frozen = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm) and not module.training]
    if frozen:
        findings.append(Finding("note", named(frozen), "BatchNorm is in eval mode: its statistics are frozen"))
    off = [name for name, m in model.named_modules() if isinstance(m, DROPOUTS) and not m.training and m.p > 0]
    if off:
        findings.append(Finding("note", named(off), "dropout is in eval mode: it drops nothing", "call model.train()"))
    return findings


def batchnorms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Those whose statistics are of the batch: in train mode, or all of a model that is in eval mode as a whole."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    return [(name, module) for name, module in found if module.training or not model.training]


def named(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    all_of_them = [name or "the model" for name in names]
    more = len(all_of_them) - NAMED
    return ", ".join(all_of_them[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _neighbours(model: nn.Module) -> Iterator[tuple[tuple[str, nn.Module], tuple[str, nn.Module]]]:
    """Layers that follow each other in a Sequential, those inside of others included, each pair once."""
    inside = {
        id(child)
        for module in model.modules() if isinstance(module, nn.Sequential)
        for child in module if isinstance(child, nn.Sequential)
    }  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential) and id(module) not in inside:
            chain = list(_chain(name, module))
            yield from itertools.pairwise(chain)


def _chain(prefix: str, module: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        full = f"{prefix}.{name}" if prefix else name
        if isinstance(child, nn.Sequential):
            yield from _chain(full, child)
        elif not isinstance(child, nn.Identity):
            yield full, child
