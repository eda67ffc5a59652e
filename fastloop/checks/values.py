# SPDX-License-Identifier: Apache-2.0
"""The numbers of a batch: not finite, or far from the unit scale that layers are initialized for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastloop.findings import Finding, Level

FAR = 30.0  # mean or standard deviation of inputs; bytes as floats have 128 and 74, normalized ones 0 and 1


def check_values(batch: Any, name: str = "the batch") -> list[Finding]:
    """NaN and infinities; tensors of 0 and -inf alone are masks."""
    findings = []
    for place, tensor in _tensors(batch):
        if not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.numel() == 0:
            continue
        values = tensor.detach()
        finite = values.isfinite()
        if not bool(finite.all()) and not _is_mask(values):
            nan = int(values.isnan().sum())
            what = f"{nan} NaN and {int((~finite).sum()) - nan} infinities among {values.numel()} values of {name}"
            findings.append(Finding("error", place, what, "find the samples: fastloop.recipes.analyze(dataset)"))
    return findings


def lowered(findings: list[Finding], level: Level, why: str = "") -> list[Finding]:
    """The findings, errors and warnings among them at another level."""
    return [f if f.level == "note" else Finding(level, f.where, f.what + why, f.remedy) for f in findings]


def check_scale(values: Tensor | None, as_used: tuple[float, float] | None = None) -> list[Finding]:
    """Inputs that are not normalized.

    Args:
        values: the batch's first tensor.
        as_used: deviation and mean of what the first layer with weights is given: the model may normalize by itself.
    """
    if values is None or not values.is_floating_point() or values.numel() < 2:
        return []
    std, mean = (float(each) for each in torch.std_mean(values.detach().float()))
    if not max(abs(mean), std) > FAR or (as_used is not None and not max(map(abs, as_used)) > FAR):
        return []
    what = f"the inputs have mean {mean:.3g} and standard deviation {std:.3g}: layers are initialized for 0 and 1"
    return [Finding("warning", "inputs", what, "normalize them: fastloop.recipes.fit_normalization(train)")]


def _is_mask(values: Tensor) -> bool:
    return bool(((values == 0) | (values == -torch.inf)).all())


def _tensors(batch: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors with where they are: "[0]", "['mask']"."""
    if isinstance(batch, Tensor):
        yield f"batch{place}", batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from _tensors(value, f"{place}[{key!r}]")
    elif isinstance(batch, (list, tuple)):
        for number, value in enumerate(batch):
            yield from _tensors(value, f"{place}[{number}]")
