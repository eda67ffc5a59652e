# SPDX-License-Identifier: Apache-2.0
"""Activations and gradients of each layer on one batch, as numbers and as a picture."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from fastloop import drawing
from fastloop.checks.look import look, norm, wanted
from fastloop.checks.undisturbed import model_kept
from fastloop.findings import Finding, listed, ordered
from fastloop.loop.probe import first_batch
from fastloop.recipes.debug.recording import Activations, recorded_layers
from fastloop.recipes.results import Result
from fastloop.texts import columns

AREA = "layer_statistics"
DEAD = 0.99  # share of zeros
FLAT, HUGE = 1e-4, 1e3  # standard deviation of the activations
ENDS = ((math.floor, min, -0.1), (math.ceil, max, 0.1))  # of an axis in whole decades
MOST_BARS = 60  # layers in the picture
THIN_OUT = ("Dropout", "Identity", "Embedding")  # zeros of theirs are meant, or no sign


@dataclass
class LayerRow:
    """One layer: its class, mean, standard deviation and share of zeros of its activations, norm of its gradients.

    `gradient` is the norm over the layer's own parameters; None without any.
    """

    layer: str
    kind: str
    mean: float
    std: float
    zeros: float
    gradient: float | None


@dataclass
class LayerStatistics(Result):
    """Attributes:

    layers: in the order in which they were first called.
    loss: of the batch.
    """

    practice: ClassVar[str] = AREA
    layers: list[LayerRow]
    loss: float
    findings: list[Finding] = field(default_factory=list)

    def table(self) -> str:
        """A row for each layer, then the findings."""
        rows = [[row.layer, row.kind, row.mean, row.std, f"{row.zeros:.0%}", row.gradient] for row in self.layers]
        head = ["layer", "kind", "mean", "std", "zeros", "gradient norm"]
        return "\n".join(part for part in (columns(head, rows), listed(self.findings, "")) if part)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Activations, zeros and gradients by layer, the first layer at the top, at most 60; returns the path.

        Raises:
            MissingExtra: matplotlib is not installed.
            ValueError: no layer, an ending of no image format, or a folder that is not there.
        """
        if not self.layers:
            raise ValueError(f"[{AREA}] there is no layer to draw; the model called none")
        rows = self.layers[:MOST_BARS]
        figure = drawing.figure(11.0, 1.6 + 0.24 * len(rows), what=AREA)
        activations, zeros, gradients = figure.subplots(1, 3, sharey=True)
        places = range(len(rows))
        finite = [(p, r.mean, r.std) for p, r in enumerate(rows) if math.isfinite(r.mean) and math.isfinite(r.std)]
        if finite:
            at, means, stds = zip(*finite, strict=True)
            activations.errorbar(means, at, xerr=stds, fmt="o", markersize=4, capsize=2, linewidth=1)
        activations.axvline(0, color="0.7", linewidth=0.8)
        activations.set_title("activations: mean ± deviation", fontsize="medium")
        zeros.barh(places, [100 * r.zeros for r in rows], height=0.6)
        zeros.set_xlim(0, 100)
        zeros.set_title("zeros, %", fontsize="medium")
        positive = [(p, r.gradient) for p, r in enumerate(rows) if r.gradient and math.isfinite(r.gradient)]
        if positive:
            at, norms = zip(*positive, strict=True)
            gradients.plot(norms, at, "o", markersize=4)
            gradients.set_xscale("log")
            gradients.set_xlim(*(10.0 ** (end(math.log10(edge(norms))) + side) for end, edge, side in ENDS))
            gradients.minorticks_off()
        gradients.set_title("gradient norm", fontsize="medium")
        activations.set_yticks(list(places), [f"{r.layer} ({r.kind})" for r in rows], fontsize="small")
        activations.set_ylim(len(rows) - 0.5, -0.5)
        for axes in (activations, zeros, gradients):
            axes.grid(alpha=0.3)
        return drawing.save(figure, path)


def layer_statistics(model: nn.Module, loss_fn: Any, batch: Any) -> LayerStatistics:
    """Mean, standard deviation and zeros of each layer's activations, norm of its gradients, on a batch in train mode.

    Layers are modules without children or with parameters of their own; what is computed by functions between them does
    not show. Statistics in fp64.

    Args:
        model, loss_fn: as `Loop` takes them; the model comes back bit for bit.
        batch: or a loader, whose first batch is taken.

    Raises:
        TypeError: a model or loss_fn that is none.
        ValueError: a loader without any batch, or parameters without values.
        Exception: of the model or the loss on this batch.
    """
    wanted(model, loss_fn)
    batch = first_batch(batch)
    with model_kept(model, loss_fn) as inner, recorded_layers(inner) as found:
        seen = look(inner, loss_fn, batch)
    if seen.error is not None:
        raise seen.error
    gradients: dict[str, float] = {}
    for name, gradient in seen.gradients.items():
        layer = _called(name.rpartition(".")[0], found)
        gradients[layer] = math.hypot(gradients.get(layer, 0.0), norm(gradient))
    rows = [
        LayerRow(name, each.kind, each.mean, each.std, each.zero_share, gradients.get(name))
        for name, each in found.items()
    ]
    assert seen.loss is not None
    return LayerStatistics(rows, float(seen.loss.mean()), ordered(_findings(found)))


def _called(layer: str, found: dict[str, Activations]) -> str:
    """The layer, or the one that uses its parameters without calling it, as attention does its output projection."""
    while layer and layer not in found and "." in layer:
        layer = layer.rpartition(".")[0]
    return layer or "the model"


def _findings(found: dict[str, Activations]) -> list[Finding]:
    findings = []
    odd = next((name for name, each in found.items() if each.odd), None)
    if odd is not None:
        findings.append(
            Finding("error", odd, "its activations are not finite, the first layer with any", "see diagnose")
        )
        return findings
    for name, each in found.items():
        if each.kind.startswith(THIN_OUT) or each.count == 0:
            continue
        if each.zero_share >= DEAD:
            remedy = "a lower learning rate, initialize_weights, LeakyReLU; dead_relus looks at several batches"
            findings.append(Finding("warning", name, f"{each.zero_share:.0%} of its activations are 0", remedy))
        elif each.std < FLAT and abs(each.mean) < FLAT:
            remedy = "initialize_weights, or a normalization layer before it"
            findings.append(
                Finding("warning", name, f"its activations vanish: standard deviation {each.std:.2g}", remedy)
            )
        elif each.std > HUGE:
            remedy = "normalize the inputs, initialize_weights, or a normalization layer"
            findings.append(
                Finding("warning", name, f"its activations explode: standard deviation {each.std:.2g}", remedy)
            )
    return findings
