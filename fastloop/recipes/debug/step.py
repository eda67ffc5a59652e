# SPDX-License-Identifier: Apache-2.0
"""Why a loss does not fall: outputs, loss, gradients by layer, learning rate, and a step on its own batch."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastloop.checks.layers import check_modes
from fastloop.checks.look import Look, look, norm, wanted
from fastloop.checks.on_batch import check_batch, check_gradients_exist
from fastloop.checks.optimizers import check_parameters, check_rates
from fastloop.checks.targets import check_initial_loss, examine, expected_loss
from fastloop.checks.undisturbed import model_kept
from fastloop.findings import Finding, listed, ordered
from fastloop.loop import random_state
from fastloop.loop.probe import device_of, first_batch, loss_of, moved
from fastloop.recipes.debug.recording import Activations, first_odd, outputs_of, recorded_layers, weights_norm
from fastloop.recipes.results import Result
from fastloop.texts import columns, number

AREA = "diagnose"
LOW, HIGH = 1e-7, 100.0  # norm of a parameter's gradient, as the documents have it
APART = 1e3  # median gradient of the last third of the weights over that of the first third, or the other way
LARGE_UPDATE, SMALL_UPDATE = 0.2, 1e-7  # of a step, over the norm of the weight
TINY_WEIGHT = 1e-3  # root mean square of one that begins near 0 on purpose: it is to change by much
CAREFUL = 0.01  # of the learning rate: a step that lowers any loss whose gradient is right
SHOWN = 12  # parameters in the table


@dataclass
class Diagnosis(Result):
    """Attributes:

    outputs: "shape", "minimum", "maximum", "mean", "std", "nan", "infinite" of the model's output; {} for no tensor.
    loss, expected_loss: of the batch in train mode; of equal probabilities, log(classes), None without classes.
    gradient_norms: by parameter, fp64.
    learning_rates: of each of the optimizer's groups.
    loss_after_step: of the same batch, in the same mode and with the same random numbers; None without an optimizer.
    update_ratios: by weight, norm of the step over norm of the weight.
    """

    practice: ClassVar[str] = AREA
    findings: list[Finding]
    outputs: dict[str, Any]
    loss: float | None
    expected_loss: float | None
    gradient_norms: dict[str, float]
    learning_rates: list[float]
    loss_after_step: float | None
    update_ratios: dict[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """Findings, then outputs, losses and the gradients by parameter."""
        parts = [listed(self.findings)]
        if self.outputs:
            parts.append("outputs: " + ", ".join(f"{name} {number(value)}" for name, value in self.outputs.items()))
        losses = (
            ("loss", self.loss),
            ("of equal probabilities", self.expected_loss),
            ("after a step", self.loss_after_step),
        )
        parts.append(", ".join(f"{name} {number(value)}" for name, value in losses if value is not None))
        if self.learning_rates:
            parts.append("learning rates: " + ", ".join(f"{rate:g}" for rate in self.learning_rates))
        names = list(self.gradient_norms)
        rows = [[name, self.gradient_norms[name], self.update_ratios.get(name)] for name in names[:SHOWN]]
        if rows:
            parts.append(columns(["parameter", "gradient norm", "update / weight"], rows))
        if len(names) > SHOWN:
            parts.append(f"... and {len(names) - SHOWN} more")
        return "\n".join(part for part in parts if part)


def diagnose(
    model: nn.Module, loss_fn: Any, batch: Any, optimizer: Optimizer | None = None, *, classes: int | None = None
) -> Diagnosis:
    """Looks at one batch, and takes one step that is taken back.

    1. The batch: NaN, scale. 2. Outputs: NaN (and the first layer that has it), the same for all samples. 3. The loss:
    what it was given, against log(classes). 4. Gradients: none, not finite, outside of 1e-7..100, 1e3 times apart
    between the first and the last layers. 5. Learning rates out of the usual for the optimizer. 6. A step: the loss of
    the same batch before and after it, in train mode with the same random numbers, so that dropout is no difference;
    where the loss rises, a hundredth of the step tells a learning rate that is too high from a gradient that is wrong.

    Args:
        model, loss_fn: as `Loop` takes them. The model is looked at in train mode.
        batch: or a loader, whose first batch is taken.
        optimizer: whose step is tried; model, optimizer and random states come back bit for bit.
        classes: where the loss does not tell.

    Raises:
        TypeError: a model, loss_fn or optimizer that is none.
        ValueError: classes below 2, a loader without any batch, or parameters without values.
    """
    wanted(model, loss_fn, optimizer)
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 2):
        raise ValueError(f"[{AREA}] classes must be an integer of at least 2, got {classes!r}")
    batch = first_batch(batch)
    findings = [f for f in check_modes(model) if f.where != "model"]
    with model_kept(model, loss_fn, optimizer) as inner, recorded_layers(inner) as activations:
        seen = look(inner, loss_fn, batch, examine=examine)
    expected = math.log(classes) if classes else next((e for c in seen.calls if (e := expected_loss(c))), None)
    norms = {name: norm(gradient) for name, gradient in seen.gradients.items() if gradient is not None}
    findings = (
        check_batch(batch, seen) + findings + seen.findings + _outputs(seen, activations, norms) + _loss(seen, expected)
    )
    if seen.loss is not None and bool(seen.loss.isfinite().all()):
        findings += check_gradients_exist(seen.gradients) + _norms(norms, dict(model.named_parameters()))
    made = Diagnosis([], _described(seen.outputs), _number(seen.loss), expected, norms, [], None)
    if optimizer is not None:
        made.learning_rates = [float(group["lr"]) for group in optimizer.param_groups]
        findings += check_parameters(model, optimizer) + check_rates(optimizer)
        if any(norms.values()) and seen.error is None:
            try:
                findings += _step(made, model, loss_fn, batch, optimizer)
            except Exception as error:
                what = f"could not be tried: {type(error).__name__}: {error}"
                findings.append(Finding("note", "step", what))
    made.findings = ordered(dict.fromkeys(findings))
    return made


# ---- outputs and loss


def _described(outputs: Any) -> dict[str, Any]:
    tensor = next(iter(outputs_of(outputs)), None)
    if tensor is None or tensor.numel() == 0:
        return {}
    values = tensor.detach().double()
    std, mean = torch.std_mean(values, correction=0)
    return {
        "shape": list(values.shape), "minimum": float(values.min()), "maximum": float(values.max()),
        "mean": float(mean), "std": float(std), "nan": int(values.isnan().sum()), "infinite": int(values.isinf().sum()),
    }  # fmt: skip


def _outputs(seen: Look, activations: dict[str, Activations], norms: dict[str, float]) -> list[Finding]:
    layer = first_odd(activations)
    if layer is not None:
        odd, count = activations[layer].odd, activations[layer].count
        what = f"{odd} of its {count} outputs are not finite, the first layer with any"
        return [
            Finding("error", layer, what, "look at its weights and inputs: a range that overflows, a division by 0")
        ]
    tensor = next(iter(outputs_of(seen.outputs)), None)
    if tensor is None or tensor.dim() < 2 or tensor.shape[0] < 2 or not bool((tensor == tensor[:1]).all()):
        return []
    what = f"the outputs are the same for all {tensor.shape[0]} samples"
    if any(value for name, value in norms.items() if name.rpartition(".")[2] != "bias"):
        return [Finding("note", "outputs", what, "right for a last layer that begins at 0: its weight gets a gradient")]
    remedy = "look for dead activations, weights of 0 and inputs that are all equal"
    return [Finding("warning", "outputs", f"{what}, and no weight gets a gradient", remedy)]


def _loss(seen: Look, expected: float | None) -> list[Finding]:
    if seen.error is not None and not seen.explained:
        return [Finding("error", "loss", f"could not be computed: {type(seen.error).__name__}: {seen.error}")]
    if seen.loss is None:
        return []
    value = _number(seen.loss)
    if value is None:
        return [Finding("error", "loss", f"is a tensor {list(seen.loss.shape)}", "take its mean")]
    if not math.isfinite(value):
        return [Finding("error", "loss", f"is {value:g}", "look for log(0), a division by 0, outputs that overflow")]
    findings = check_initial_loss(seen.calls)
    if expected and not findings and abs(value - expected) < 0.02 * expected:
        what = f"{value:.4g} is that of a guess ({expected:.4g}): right for a model that has not been trained"
        findings.append(Finding("note", "loss", what))
    return findings


# ---- gradients


def _norms(norms: dict[str, float], parameters: dict[str, Tensor]) -> list[Finding]:
    findings = []
    # a bias before BatchNorm gets none but for rounding
    weak = [name for name, value in norms.items() if value < LOW and parameters[name].dim() > 1]
    strong = [name for name, value in norms.items() if HIGH < value < math.inf]
    matrices = [name for name in norms if parameters[name].dim() > 1]
    if weak and any(norms.values()):
        what = f"the gradient's norm is {norms[weak[0]]:.3g}" + _more(weak)
        remedy = "initialize_weights, residual connections, normalization; right behind layers that begin at 0"
        most = 2 * len([name for name in weak if norms[name]]) >= len(matrices)
        findings.append(Finding("warning" if most else "note", weak[0], what, remedy))
    if strong:
        what = f"the gradient's norm is {norms[strong[0]]:.3g}" + _more(strong)
        remedy = "normalize inputs, initialize_weights, clip (max_grad_norm=1.0), a lower learning rate"
        findings.append(Finding("warning", strong[0], what, remedy))
    ratio = _last_over_first([norms[name] for name in matrices if 0 < norms[name] < math.inf])
    if not 1 / APART < ratio < APART:
        way = "vanishes" if ratio > 1 else "explodes"
        what = f"the gradient {way} on its way to the first layers: their norm is {1 / ratio:.3g} of the last ones'"
        remedy = "initialize_weights, normalization layers, residual connections; for recurrent layers max_grad_norm"
        findings.append(Finding("warning", "gradients", what, remedy))
    return findings


def _last_over_first(values: list[float]) -> float:
    """Median of the last third over that of the first; 1 for fewer than three."""
    third = len(values) // 3
    return statistics.median(values[-third:]) / statistics.median(values[:third]) if third else 1.0


def _more(names: list[str]) -> str:
    return f", and so small or large in {len(names) - 1} more" if len(names) > 1 else ""


# ---- a step


def _step(made: Diagnosis, model: nn.Module, loss_fn: Any, batch: Any, optimizer: Optimizer) -> list[Finding]:
    before, after, made.update_ratios = _stepped(model, loss_fn, batch, optimizer, 1.0)
    made.loss_after_step = after
    findings = _ratios(made.update_ratios)
    if not math.isfinite(after):
        what = f"the loss of the same batch is {after:g} after one step, {before:.4g} before"
        return [*findings, Finding("error", "step", what, "lower the learning rate: lr_range_test finds one")]
    if after == before and not any(made.update_ratios.values()):
        remedy = "is the learning rate 0, does the optimizer have these parameters, do they get gradients?"
        return [*findings, Finding("warning", "step", "a step changes nothing", remedy)]
    if after < before:
        return findings
    _, careful, _ = _stepped(model, loss_fn, batch, optimizer, CAREFUL)
    what = f"a step raises the loss of its own batch from {before:.5g} to {after:.5g}"
    if careful < before:
        what += (
            f", and one of a hundredth of the learning rate lowers it to {careful:.5g}: the learning rate is too high"
        )
        return [*findings, Finding("warning", "step", what, "lower it: lr_range_test finds one; or warm up")]
    what += f", and a hundredth of it too ({careful:.5g}): the gradient is wrong, or nothing is left to learn"
    return [*findings, Finding("warning", "step", what, "check_gradients compares backward with differences")]


def _stepped(
    model: nn.Module, loss_fn: Any, batch: Any, optimizer: Optimizer, factor: float
) -> tuple[float, float, dict[str, float]]:
    """Loss before and after a step of `factor` times the learning rate, and each weight's relative change."""
    loss = loss_of(loss_fn)
    with model_kept(model, loss_fn, optimizer) as inner, torch.enable_grad():
        if not inner.training:
            inner.train()
        batch = moved(batch, device_of(inner))
        state = random_state.capture()
        value = loss(inner, batch)[0]
        value.backward()
        weights = {name: p.detach().clone() for name, p in inner.named_parameters() if p.dim() > 1}
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        optimizer.step()
        random_state.restore(state)
        with torch.no_grad():
            after = float(loss(inner, batch)[0])
        ratios = {
            name: weights_norm(p.detach() - weights[name]) / size
            for name, p in inner.named_parameters()
            if name in weights and (size := weights_norm(weights[name])) > TINY_WEIGHT * p.numel() ** 0.5
        }
        return float(value.detach()), after, ratios


def _ratios(ratios: dict[str, float]) -> list[Finding]:
    large = [name for name, value in ratios.items() if value > LARGE_UPDATE]
    if large:
        what = f"a step changes it by {ratios[large[0]]:.2g} of its norm" + (
            f", {len(large) - 1} more so" * (len(large) > 1)
        )
        remedy = "1e-3 is usual, more in the first steps of Adam: lower the learning rate, or warm up"
        return [Finding("warning", large[0], what, remedy)]
    moving = [value for value in ratios.values() if value > 0]
    if moving and max(moving) < SMALL_UPDATE:
        what = f"a step changes no weight by more than {max(moving):.2g} of its norm"
        return [Finding("note", "step", what, "raise the learning rate: lr_range_test finds one")]
    return []


def _number(value: Tensor | None) -> float | None:
    return None if value is None or value.dim() else float(value)
