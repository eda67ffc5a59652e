# SPDX-License-Identifier: Apache-2.0
"""A model tried on a batch: its loss and gradient in train mode, eval mode, and a last batch of one sample."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fastloop.checks.layers import batchnorms, named
from fastloop.checks.loaders import last_batch, shuffles
from fastloop.checks.look import Look, look, norm, wanted
from fastloop.checks.samples import dataset_of
from fastloop.checks.targets import ONE_CLASS, check_initial_loss, examine
from fastloop.checks.undisturbed import data_kept, model_kept
from fastloop.checks.values import check_scale, check_values, lowered
from fastloop.findings import Finding, ordered
from fastloop.loop.data import first_tensor, samples_in, sliced
from fastloop.loop.probe import first_batch

MOST_SAMPLES = 64  # of a validation batch


def check_output_activation(model: nn.Module, loss_fn: Any, batch: Any) -> list[Finding]:
    """Whether the model ends in what its loss expects: logits, log-probabilities or probabilities.

    Softmax or sigmoid before a loss that has one; none before a loss that needs one; labels outside of the classes,
    shapes that are broadcast, types. Seen where the loss is computed, in any criterion or function of
    torch.nn.functional: by the last operation of autograd's graph, and by values that are at least 0 and sum to 1.

    Args:
        model, loss_fn: as `Loop` takes them.
        batch: or a loader, whose first batch is taken.

    Raises:
        TypeError: a model or a loss_fn that is none.
        ValueError: a loader without any batch.
        Exception: of the model or the loss, where no finding explains it.
    """
    wanted(model, loss_fn)
    with model_kept(model, loss_fn) as inner:
        seen = look(inner, loss_fn, first_batch(batch), examine=examine)
    if seen.error is not None and not seen.explained:
        raise seen.error
    return ordered(dict.fromkeys(seen.findings))


# ---- batches


def batch_of(loader: Any, most: int | None = None) -> Any:
    """The first batch of a loader, made here from samples by their index; None for a loader that has none.

    Args:
        most: samples of it; None for all.
    """
    if isinstance(loader, (list, tuple)):
        return (loader[0] if most is None else sliced(loader[0], 0, most)) if loader else None
    data = dataset_of(loader) if isinstance(loader, DataLoader) else None
    if data is None or len(data) == 0:
        return None
    with data_kept(loader):
        first = next(iter(loader.sampler if loader.batch_sampler is None else loader.batch_sampler), None)
        if first is None:
            return None
        if loader.batch_sampler is None:  # the data set gives batches
            batch = loader.collate_fn(data[first])
            return batch if most is None else sliced(batch, 0, most)
        indices = list(first)[:most]
        together = getattr(data, "__getitems__", None)  # as torch fetches
        return loader.collate_fn(together(indices) if callable(together) else [data[i] for i in indices])


# ---- the model on a batch


def check_batches(
    model: nn.Module, loss_fn: Any, batch: Any, optimizer: Optimizer | None, train_loader: Any, val_loader: Any,
    fresh: bool, world: int,
) -> list[Finding]:  # fmt: skip
    """A training batch, one of validation in eval mode, a last batch of one sample; one copy of the model for all."""
    with model_kept(model, loss_fn, optimizer) as inner:
        findings = _training(inner, loss_fn, batch, fresh, shuffles(train_loader))
        try:
            given = None if val_loader is None else batch_of(val_loader, MOST_SAMPLES)
        except Exception as error:
            given = None
            what = f"no batch could be made: {type(error).__name__}: {error}"
            findings.append(Finding("note", "val_loader", what))
        findings += _in_eval_mode(inner, loss_fn, batch, given)
        return findings + (_last_batch(inner, loss_fn, batch, train_loader) if world == 1 else [])


def _training(model: nn.Module, loss_fn: Any, batch: Any, fresh: bool, shuffled: bool) -> list[Finding]:
    seen = look(model, loss_fn, batch, examine=examine)
    findings = [
        lowered([f], "note", ": they are rare, or the loss makes them")[0] if shuffled and ONE_CLASS in f.what else f
        for f in seen.findings
    ]
    findings += check_batch(batch, seen) + _first_loss(seen)
    return findings + (check_initial_loss(seen.calls) if fresh else [])


def check_batch(batch: Any, seen: Look) -> list[Finding]:
    """The numbers of a batch whose loss has been computed: with NaN that it can do with, and as the model scales it."""
    findings = check_values(batch)
    if findings:
        return _harmless(findings) if _is_finite(seen) else findings
    return check_scale(first_tensor(batch), seen.inputs)


def _harmless(findings: list[Finding]) -> list[Finding]:
    return lowered(findings, "note", "; the loss is finite all the same")


def _is_finite(seen: Look) -> bool:
    if seen.loss is None or not bool(seen.loss.isfinite().all()):
        return False
    return all(math.isfinite(norm(gradient)) for gradient in seen.gradients.values())


def _first_loss(seen: Look) -> list[Finding]:
    if seen.error is not None and not seen.explained:
        memory = isinstance(seen.error, torch.cuda.OutOfMemoryError)
        what = "the batch does not fit into memory" if memory else f"{type(seen.error).__name__}: {seen.error}"
        return [Finding("note", "loss", f"of the first batch could not be computed: {what}")]
    if seen.loss is None:
        return []
    if seen.loss.dim():
        what = f"the loss is a tensor {list(seen.loss.shape)}, not a number"
        return [Finding("error", "loss", what, "take its mean")]
    if not bool(seen.loss.isfinite()):
        what = f"of the first batch is {float(seen.loss):g}" + (
            ", as its outputs are" if _has_odd(seen.outputs) else ""
        )
        remedy = "look at the inputs' range, and for log(0), a division by 0 or an overflow of half precision"
        return [Finding("error", "loss", what, remedy)]
    return check_gradients_exist(seen.gradients)


def check_gradients_exist(gradients: dict[str, Tensor | None]) -> list[Finding]:
    """Parameters that the loss does not depend on, gradients that are not finite, or all 0."""
    without = [name for name, gradient in gradients.items() if gradient is None]
    if gradients and len(without) == len(gradients):
        what = "the loss depends on no parameter: it was detached, or computed from an argmax"
        return [
            Finding("error", "gradients", what, "compute it from the model's outputs, without detach, item or no_grad")
        ]
    findings = []
    if without:
        what = f"{len(without)} of {len(gradients)} parameters get no gradient from the first batch"
        remedy = "use them in forward, or requires_grad_(False); DDP waits for them in vain"
        findings.append(Finding("warning", named(without), what, remedy))
    norms = {name: norm(gradient) for name, gradient in gradients.items() if gradient is not None}
    odd = [name for name, value in norms.items() if not math.isfinite(value)]
    if odd:
        remedy = "look for sqrt(0), a norm of 0 or a division by 0 in what they come from"
        findings.append(Finding("error", named(odd), "the gradient of the first batch is not finite", remedy))
    elif norms and not any(norms.values()):
        remedy = "look at activations that are 0 everywhere, and at weights that are all 0"
        findings.append(Finding("warning", "gradients", "all gradients of the first batch are 0", remedy))
    return findings


def _in_eval_mode(model: nn.Module, loss_fn: Any, batch: Any, given: Any) -> list[Finding]:
    """A validation batch; where there is none, some samples of the training batch."""
    used = sliced(batch, 0, MOST_SAMPLES) if given is None else given
    seen = look(model, loss_fn, used, training=False, examine=examine)
    findings = []
    if given is not None:
        odd = check_values(given, "the validation batch")
        findings += _harmless(odd) if _is_finite(seen) else odd
        findings += [  # of one class are the first samples in order: no surprise
            Finding(f.level, f"{f.where} (validation)", f.what, f.remedy)
            for f in seen.findings if f.where == "targets" and ONE_CLASS not in f.what
        ]  # fmt: skip
        if seen.loss is not None and not bool(seen.loss.isfinite().all()):
            findings.append(Finding("error", "loss (validation)", f"of a batch is {float(seen.loss):g}"))
        if seen.error is not None and not seen.explained:
            what = f"of a batch could not be computed in eval mode: {type(seen.error).__name__}: {seen.error}"
            findings.append(Finding("note", "loss (validation)", what))
    if seen.always_random:
        what = f"drops in eval mode too: {named(dict.fromkeys(seen.always_random))}"
        remedy = "pass training=self.training (dropout_p=0.0 of attention in eval mode)"
        findings.append(Finding("warning", "evaluation", what, remedy))
    return findings


def _last_batch(model: nn.Module, loss_fn: Any, batch: Any, train_loader: Any) -> list[Finding]:
    """A last batch of one sample under BatchNorm: tried."""
    if last_batch(train_loader) != 1 or not batchnorms(model) or samples_in(batch) < 2:
        return []
    error = look(model, loss_fn, sliced(batch, 0, 1)).error
    remedy = "DataLoader(..., drop_last=True)"
    if error is not None and "more than 1 value per channel" in str(error):
        what = "the last batch of an epoch has 1 sample, which BatchNorm in train mode raises for"
        return [Finding("error", "train_loader", what, remedy)]
    what = "the last batch of an epoch has 1 sample: BatchNorm takes its statistics of that one"
    return [Finding("warning", "train_loader", what, remedy)]


def _has_odd(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and outputs.is_floating_point() and not bool(outputs.isfinite().all())
