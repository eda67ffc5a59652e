# SPDX-License-Identifier: Apache-2.0
"""The last layer of a model: found, and replaced for other outputs."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastloop.recipes.finetune.names import aliases, inner

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_timm(model: nn.Module) -> bool:
    """Whether it is one of timm's models, or made of one by inheritance."""
    return _made_by(model, "timm.")


def is_transformers(model: nn.Module) -> bool:
    """Whether it is one of transformers' models, or made of one by inheritance."""
    return _made_by(model, "transformers.")


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters of the layers that are new in a fine-tuning.

    timm's classifier; in transformers what the model for a task has beside its base model; else the last Linear (a
    convolution where there is none). Empty where nothing of the kind is there.
    """
    model = inner(model)
    if is_transformers(model):
        base = getattr(model, "base_model_prefix", "")
        if not base or not hasattr(model, base):
            return set()
        return {name for name, _ in model.named_parameters() if not name.startswith(f"{base}.")}
    name = _name_of_last(model)
    if name is None:
        return set()
    prefix = f"{name}." if name else ""  # the model may be the layer itself
    return {prefix + each for each, _ in model.get_submodule(name).named_parameters()}


def replace_head(model: nn.Module, outputs: int, *, name: str | None = None) -> str:
    """Put a new layer with so many outputs in the place of the last one, in place.

    timm's models do it themselves (`reset_classifier`). Of the others it is the layer `name`, or the last Linear in the
    order of registration (transformers: of what stands beside the base model; models without any Linear: the last
    convolution). Device, dtype and whether there is a bias stay; the weights are drawn anew by torch's default
    initialization, from torch's random generator, and are trained, whatever was frozen. Make the optimizer afterwards.

    Args:
        outputs: at least 1: classes, or numbers that are predicted.
        name: of a Linear or a convolution, as in `named_modules`.

    Returns:
        The layer's name.

    Raises:
        ValueError: outputs below 1, a layer that is not there or of another kind, or one whose weight is also
            another's, as an output layer that is tied to the embedding.
    """
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise ValueError(f"[replace_head] outputs must be an integer of at least 1, got {outputs!r}")
    model = inner(model)
    if name is None and is_timm(model) and hasattr(model, "reset_classifier"):
        return _reset(model, outputs)
    found = name if name is not None else _name_of_last(model)
    if found is None:
        raise ValueError(
            "[replace_head] the model has no Linear and no convolution; pass name= of the layer to replace"
        )
    old = dict(model.named_modules()).get(found)
    if not found or not isinstance(old, (nn.Linear, *_CONVOLUTIONS)):
        kind = "there is none of that name" if old is None else f"it is a {type(old).__name__}"
        likely = _name_of_last(model)
        remedy = "" if likely is None else f"; the last one is {likely!r}"
        raise ValueError(
            f"[replace_head] name must be that of a Linear or a convolution, got {found!r}: {kind}{remedy}"
        )
    shared = [each for each in aliases(model)[id(old.weight)] if each.rpartition(".")[0] != found]
    if shared:
        raise ValueError(
            f"[replace_head] the weight of {found!r} is also {shared[0]!r}, which would be untied; pass name= of "
            "another layer, or resize both by the model's own means (resize_token_embeddings in transformers)"
        )
    new = _like(old, outputs)
    parent, _, attribute = found.rpartition(".")
    setattr(model.get_submodule(parent), attribute, new)
    if is_transformers(model):
        _tell_transformers(model, outputs)
    return found


def _like(old: nn.Module, outputs: int) -> nn.Module:
    weight = cast(Tensor, old.weight)
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(old, nn.Linear):
        new: nn.Module = nn.Linear(old.in_features, outputs, old.bias is not None, **where)
    else:
        was = cast("nn.Conv1d | nn.Conv2d | nn.Conv3d", old)
        if was.groups != 1 or was.transposed:
            raise ValueError(f"[replace_head] a convolution with groups={was.groups} cannot have other outputs")
        new = type(was)(
            was.in_channels, outputs, was.kernel_size, was.stride, was.padding, was.dilation,  # type: ignore[arg-type]
            bias=was.bias is not None, padding_mode=was.padding_mode, **where,
        )  # fmt: skip
    return new.train(old.training)


def _reset(model: Any, outputs: int) -> str:
    """timm makes its layer on the CPU, in fp32."""
    near = next((p for p in reversed(list(model.parameters())) if p.is_floating_point()), torch.empty(0))
    model.reset_classifier(outputs)
    names = _classifiers(model)
    if not names:
        raise ValueError(f"[replace_head] {type(model).__name__}.reset_classifier made no layer; pass name=")
    for each in names:
        layer = model.get_submodule(each).to(device=near.device, dtype=near.dtype)
        layer.requires_grad_(True).train(model.training)
    return names[0]


def _classifiers(model: Any) -> list[str]:
    """Of a timm model; a distilled one has two."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, (tuple, list)) else (heads,)
    return [
        name
        for name, module in model.named_modules()
        if any(module is head for head in heads) and any(True for _ in module.parameters())
    ]


def _name_of_last(model: nn.Module) -> str | None:
    if is_timm(model) and hasattr(model, "get_classifier"):
        names = _classifiers(model)
        if names:
            return names[0]
    base = getattr(model, "base_model_prefix", "") if is_transformers(model) else ""
    modules = [(name, m) for name, m in model.named_modules() if not base or not f"{name}.".startswith(f"{base}.")]
    linears = [n for n, m in modules if isinstance(m, nn.Linear) and not isinstance(m, NonDynamicallyQuantizableLinear)]
    others = [n for n, m in modules if isinstance(m, _CONVOLUTIONS)]
    return next(reversed(linears or others), None)


def _tell_transformers(model: Any, outputs: int) -> None:
    """The config decides over the loss, and goes into what is saved."""
    was_of_one = getattr(model.config, "num_labels", None) == 1
    model.config.num_labels = outputs
    if hasattr(model, "num_labels"):
        model.num_labels = outputs
    if was_of_one != (outputs == 1):  # a kind of problem that was guessed from the old number
        model.config.problem_type = None


def _made_by(model: nn.Module, package: str) -> bool:
    return any(base.__module__.startswith(package) for base in type(inner(model)).__mro__)
