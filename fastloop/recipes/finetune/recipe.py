# SPDX-License-Identifier: Apache-2.0
"""Optimizer settings, schedule and loss with which models of a kind are usually fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fastloop.recipes.finetune.depth import depth_of
from fastloop.recipes.finetune.groups import parameter_groups
from fastloop.recipes.finetune.head import head_parameters, is_timm, is_transformers
from fastloop.recipes.finetune.names import covering, inner, named
from fastloop.recipes.finetune.plan import HEAD_LR
from fastloop.schedules import Schedule, warmup_cosine, warmup_linear
from fastloop.texts import columns

WHERE = "finetuning_recipe"
RATES = {"timm": 1e-5, "transformers": 2e-5, "torch": 1e-4}
IGNORED = -100  # the label that transformers leaves out of a loss
_SHIFTED = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")  # the loss of position i is over label i + 1


@dataclass(frozen=True)
class FinetuningRecipe:
    """For `Loop(model, AdamW(recipe.groups), recipe.loss_fn, **recipe.options)`.

    Attributes:
        kind: "timm", "transformers" or "torch".
        groups: of parameters, see `parameter_groups`.
        schedule: warm-up, then cosine (transformers: linear) to 0.
        loss_fn: a criterion for batches of (input, target); of transformers a function for its batches.
        options: of Loop: the schedule, and a bound of the gradient's norm.
    """

    kind: str
    groups: list[dict[str, Any]]
    schedule: Schedule
    loss_fn: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """The groups: name, rate, decay, number of parameters."""
        rows = [
            [group["name"], group["lr"], group["weight_decay"], sum(p.numel() for p in group["params"])]
            for group in self.groups
        ]
        return f"{self.kind}\n{columns(('group', 'lr', 'weight decay', 'parameters'), rows)}"

    __str__ = table


def finetuning_recipe(
    model: nn.Module,
    *,
    total_steps: int | None = None,
    lr: float | None = None,
    weight_decay: float = 0.01,
    warmup: float = 0.1,
    layer_decay: float | None = None,
) -> FinetuningRecipe:
    """How a pre-trained model is usually fine-tuned, by the library that it is of.

        timm           lr 1e-5, the head 1e-3; warm-up, then cosine
        transformers   lr 2e-5 for all; warm-up, then linear; the loss is the model's own
        torch          lr 1e-5 for the lower half of the depths, 1e-4 for the upper, 1e-3 for the head; warm-up, cosine

    Call it after `replace_head` and `freeze`.

    Args:
        total_steps: windows of the training; None: those of `fit`.
        lr: in place of the above; torch's lower half has a tenth of it. The head's is 1e-3, or lr where that is more.
        weight_decay: of all but norms and biases.
        warmup: part of the steps, in [0, 1).
        layer_decay: rates fall by this factor with each layer from the head down, in place of torch's two halves.

    Raises:
        ValueError: a number out of range, or a model in which nothing is trained.
    """
    kind = "timm" if is_timm(model) else "transformers" if is_transformers(model) else "torch"
    if isinstance(warmup, bool) or not isinstance(warmup, (int, float)) or not 0 <= warmup < 1:
        raise ValueError(f"[{WHERE}] warmup must be a part of the steps in [0, 1), got {warmup!r}; pass e.g. 0.1")
    rate = RATES[kind] if lr is None else lr
    new = head_parameters(model) if kind != "transformers" else set()
    lower = _lower_half(model, new, rate) if kind == "torch" and layer_decay is None else {}
    groups = parameter_groups(
        model, rate, weight_decay=weight_decay, rates=lower, layer_decay=layer_decay,
        head_lr=max(HEAD_LR, rate) if new else None,
    )  # fmt: skip
    make = warmup_linear if kind == "transformers" else warmup_cosine
    schedule = make(float(warmup), total_steps)
    loss_fn = transformers_loss if kind == "transformers" else nn.CrossEntropyLoss()
    return FinetuningRecipe(kind, groups, schedule, loss_fn, {"schedule": schedule, "max_grad_norm": 1.0})


def transformers_loss(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """A loss_fn for `Loop`: the loss that a model of transformers computes itself from a batch with "labels".

    In evaluation with the accuracy where labels are classes (of the next token, for a causal language model). Weighted
    by the labels that count: those that are not -100.

    Raises:
        TypeError: a batch that is no mapping or has no labels.
    """
    if not hasattr(batch, "keys") or "labels" not in batch.keys():  # noqa: SIM118 - BatchEncoding is no Mapping
        got = f"keys {sorted(batch.keys())}" if hasattr(batch, "keys") else type(batch).__name__
        raise TypeError(f'[{WHERE}] a batch for transformers must be a mapping with "labels", got {got}')
    output = model(**batch)
    labels: Tensor = batch["labels"]
    if labels.is_floating_point():
        return output.loss
    logits: Tensor | None = getattr(output, "logits", None)
    if type(inner(model)).__name__.endswith(_SHIFTED):
        labels, logits = labels[:, 1:], None if logits is None else logits[:, :-1]
    counted = labels != IGNORED
    if model.training or logits is None or logits.shape[:-1] != labels.shape or logits.shape[-1] < 2:
        return output.loss, {}, counted.sum()
    right = (logits.argmax(dim=-1) == labels) & counted
    return output.loss, {"accuracy": right.sum().double() / counted.sum()}, counted.sum()


def _lower_half(model: nn.Module, head: set[str], rate: float) -> dict[str, float]:
    """A tenth of the rate for the parameters of the lower half of the depths, by pattern."""
    depth = depth_of(model)
    half = max(depth.values(), default=0) / 2
    below = {name for name, at in depth.items() if at < half} - head
    trained = {name for name, p in named(model).items() if p.requires_grad}
    if not trained.intersection(below):
        return {}
    return dict.fromkeys(covering(model, below), rate / 10)
