# SPDX-License-Identifier: Apache-2.0
"""Which fine-tuning suits which data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from fastloop.recipes.finetune.depth import depth_of
from fastloop.recipes.finetune.head import head_parameters
from fastloop.recipes.finetune.names import covering, named
from fastloop.recipes.results import Result
from fastloop.texts import columns, number

Range = tuple[float, float]
HEAD_LR = 1e-3
GUIDELINE: dict[tuple[str, str], tuple[str, Range | None]] = {  # (data, similarity): strategy, rates of the backbone
    ("small", "high"): ("feature extraction", None),
    ("small", "low"): ("top layers", (1e-5, 1e-4)),
    ("large", "high"): ("all layers", (1e-5, 1e-4)),
    ("large", "low"): ("all layers", (1e-4, 1e-3)),
}
SMALL = 10_000  # samples, where nothing is known of the model
PARAMETERS_PER_SAMPLE = 1000  # more than that is small data for the model ...
LEAST, MOST = 1_000, 100_000  # ... within these numbers of samples


@dataclass
class FinetuningPlan(Result):
    """What to train, and at which rates.

    Attributes:
        strategy: "feature extraction", "top layers" or "all layers".
        head_lr: of the new layers.
        backbone_lr: smallest and largest rate of pre-trained layers; None where these are frozen.
        freeze: patterns for `freeze`; where the model is not known, those of "feature extraction" are for before
            `replace_head`, and those of "top layers" are missing.
        text: why.
    """

    practice: ClassVar[str] = "suggest_finetuning"

    strategy: str
    head_lr: float
    backbone_lr: Range | None
    freeze: tuple[str, ...]
    text: str

    def table(self) -> str:
        """The plan, a line for each part, and why."""
        rates = "frozen" if self.backbone_lr is None else " to ".join(number(rate) for rate in self.backbone_lr)
        rows = [
            ["strategy", self.strategy],
            ["head's lr", number(self.head_lr)],
            ["backbone's lr", rates],
            ["freeze", ", ".join(self.freeze) or "nothing"],
        ]
        return f"{columns(('', ''), rows)}\n{self.text}"


def suggest_finetuning(samples: int, similarity: str, *, model: nn.Module | None = None) -> FinetuningPlan:
    """The usual strategy for a data set of that size, as like the data of the pre-training as that.

    Data are small below 10,000 samples; where the model is given, below one sample for 1000 of its parameters, within
    1,000 and 100,000. These bounds are ours: the field's tables say small and large only.

    Args:
        samples: of the training, at least 1.
        similarity: "high" or "low": of the data to those of the pre-training.
        model: names what to freeze: all but the head, or the lower half of the depths.

    Raises:
        ValueError: something else.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"[suggest_finetuning] samples must be an integer of at least 1, got {samples!r}")
    if similarity not in ("high", "low"):
        raise ValueError(f'[suggest_finetuning] similarity must be "high" or "low", got {similarity!r}')
    bound, why = SMALL, "where the model is not known"
    if model is not None:
        count = sum(p.numel() for p in named(model).values())
        bound = min(max(count // PARAMETERS_PER_SAMPLE, LEAST), MOST)
        why = f"for {count:,} parameters"
    size = "small" if samples < bound else "large"
    strategy, rates = GUIDELINE[size, similarity]
    text = f"{samples:,} samples are {size} data (below {bound:,} is small {why}), of {similarity} similarity."
    return FinetuningPlan(strategy, HEAD_LR, rates, _to_freeze(strategy, model), f"{text} {_ADVICE[strategy]}")


_ADVICE = {
    "feature extraction": "Freeze the backbone and train a new head: freeze(model), then replace_head(model, outputs).",
    "top layers": "Freeze the lower half of the layers; the others learn what is different here.",
    "all layers": "Train everything, the lower layers at the smallest rates: parameter_groups(..., layer_decay=0.75).",
}


def _to_freeze(strategy: str, model: nn.Module | None) -> tuple[str, ...]:
    if strategy == "all layers":
        return ()
    if model is None:
        return ("*",) if strategy == "feature extraction" else ()
    head = head_parameters(model)
    depth = depth_of(model)
    half = max(depth.values(), default=0) / 2
    lower = {name for name, at in depth.items() if at < half}
    return covering(model, (set(depth) if strategy == "feature extraction" else lower) - head)
