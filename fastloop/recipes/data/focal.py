# SPDX-License-Identifier: Apache-2.0
"""Cross entropy that turns from what the model knows already to what it gets wrong."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.CrossEntropyLoss):
    """sum(w[y] * (1 - p[y])**gamma * -log p[y]) / sum(w[y]), p = softmax(input), over the targets y not ignored.

    The mean is weighted as that of `torch.nn.CrossEntropyLoss`, which it is with gamma=0. It is a subclass of it, so
    that `Loop` weighs it exactly under gradient accumulation and on several ranks. With label smoothing e over C
    classes each class k counts by q[k] = (1 - e)*(k == y) + e/C: sum(q[k] * w[k] * (1 - p[k])**gamma * -log p[k]).
    Computed from log p in at least fp32. Source: Lin et al., Focal Loss for Dense Object Detection (2017).

    Args:
        gamma: at least 0; 2 in the paper.
        weight: of each class, [C].
        label_smoothing: in [0, 1].
        ignore_index: of targets that do not count.
        reduction: "mean", or "none" for the terms of the sum, which are not divided.

    Shapes: input [N, C, ...] of logits, target [N, ...] of integers, or [C] and []; the loss is a scalar, or with
    reduction="none" of the target's shape.

    Raises:
        ValueError: gamma or label_smoothing out of range, or another reduction.
        TypeError: targets that are no integers.
        Of other shapes and classes what torch.nn.NLLLoss raises.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        weight: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> None:
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"[FocalLoss] gamma must be at least 0, got {gamma}; pass e.g. 2.0")
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"[FocalLoss] label_smoothing must lie in [0, 1], got {label_smoothing}; pass e.g. 0.1")
        if reduction not in ("mean", "none"):
            raise ValueError(f'[FocalLoss] reduction must be "mean" or "none", got {reduction!r}')
        super().__init__(weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)
        self.gamma = gamma

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch of logits."""
        if target.is_floating_point():
            raise TypeError(
                f"[FocalLoss] targets must be classes as integers, got {target.dtype}; for probabilities use "
                "torch.nn.CrossEntropyLoss"
            )
        if self.gamma == 0:
            return super().forward(input, target)
        axis = 1 if input.dim() > 1 else 0
        exact = torch.float64 if input.dtype == torch.float64 else torch.float32
        log_p = F.log_softmax(input, dim=axis, dtype=exact)
        weight = None if self.weight is None else self.weight.to(exact)
        # Also refuses shapes and classes that do not fit together, which gather and broadcasting would let pass.
        losses = F.nll_loss(log_p, target, weight, ignore_index=self.ignore_index, reduction="none")
        counted = target != self.ignore_index
        chosen = target.masked_fill(~counted, 0)
        of_target = counted.to(exact) if weight is None else weight[chosen] * counted
        losses = losses * self._hardness(log_p.gather(axis, chosen.unsqueeze(axis)).squeeze(axis))
        if self.label_smoothing > 0:
            each = self._hardness(log_p) * -log_p
            if weight is not None:
                each = each * weight.view(-1, *(1 for _ in range(input.dim() - axis - 1)))
            smooth = each.mean(axis) * counted
            losses = (1 - self.label_smoothing) * losses + self.label_smoothing * smooth
        return losses if self.reduction == "none" else losses.sum() / of_target.sum()

    def _hardness(self, log_p: Tensor) -> Tensor:
        """(1 - p)**gamma."""
        # 1 - exp(log p) would cancel for p near 1, where most samples end. At p = 1 the slope of x**gamma is infinite
        # for gamma < 1, and infinity times the 0 of the softmax's slope is NaN: the floor's slope is 0.
        rest = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
        return rest**self.gamma

    def extra_repr(self) -> str:
        """The options."""
        return f"gamma={self.gamma}, label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"
