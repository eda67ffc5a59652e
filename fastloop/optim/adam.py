# SPDX-License-Identifier: Apache-2.0
"""Adam, the drop-in for torch.optim.Adam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastloop.optim.base import FusedOptimizer
from fastloop.optim.hooks import hooked_step
from fastloop.optim.settings import check_number


class AdamBase(FusedOptimizer):
    """What Adam and AdamW share: all but the decay of the weights."""

    _hyper = (
        ("lr", -1),
        ("betas", 0),
        ("betas", 1),
        ("eps", -1),
        ("weight_decay", -1),
        ("decoupled_weight_decay", -1),
    )
    _structure = ("amsgrad", "differentiable", "ema_decay")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float | Tensor, float | Tensor],
        eps: float,
        weight_decay: float | Tensor,
        amsgrad: bool,
        torch_options: dict[str, Any],
        ours: dict[str, Any],
    ) -> None:
        where = type(self).__name__
        check_adam(where, lr, betas, eps, weight_decay, torch_options)
        defaults = {"lr": lr, "betas": tuple(map(_squeezed, betas)), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "amsgrad": amsgrad, **torch_options}, **ours)

    def _rule(self, group: dict[str, Any]) -> str:
        return "adam_amsgrad" if group["amsgrad"] else "adam"

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        names = ("exp_avg", "exp_avg_sq")
        return (*names, "max_exp_avg_sq") if group["amsgrad"] else names

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("amsgrad", False)
            group.setdefault("capturable", False)
            group.setdefault("decoupled_weight_decay", False)

    @hooked_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once.

        Args:
            closure: reevaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: sparse or mismatched gradients, overlapping parameters, or gradients that are not finite
                under error_if_nonfinite=True. Nothing has been changed then.
        """
        return self._run_step(closure)


class Adam(AdamBase):
    r"""Adam with gradient clipping, AMP unscaling, EMA and master weights in the same sweep over memory.

    .. code-block:: text

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6)), then |g| <= max_grad_value
        g = g + weight_decay*p                     (with decoupled_weight_decay: p = p * (1 - lr*weight_decay))
        m = m + (1-b1)*(g - m)
        v = b2*v + (1-b2)*g*g
        p = p - lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)

    Replaces :class:`torch.optim.Adam` and exchanges state_dicts with it. Arguments before the bar are torch's and mean
    what they mean there; ours are described in :class:`fastloop.AdamW`.

    Source: Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        error_if_nonfinite: bool = False,
        norm_group: Any = None,
        ema_decay: float | None = None,
        state_dtype: torch.dtype | None = None,
        master_weights: bool = False,
        zero_grads: bool = False,
        backend: str = "auto",
    ) -> None:
        torch_options = {
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        ours = {
            "max_grad_norm": max_grad_norm,
            "max_grad_value": max_grad_value,
            "error_if_nonfinite": error_if_nonfinite,
            "norm_group": norm_group,
            "ema_decay": ema_decay,
            "state_dtype": state_dtype,
            "master_weights": master_weights,
            "zero_grads": zero_grads,
            "backend": backend,
        }
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, torch_options, ours)


def check_adam(
    where: str,
    lr: Any,
    betas: Any,
    eps: Any,
    weight_decay: Any,
    torch_options: dict[str, Any],
) -> None:
    """Raise ValueError for hyperparameters that torch refuses too."""
    check_number(where, "lr", lr, 0.0, None, "1e-3")
    check_number(where, "eps", eps, 0.0, None, "1e-8")
    check_number(where, "weight_decay", weight_decay, 0.0, None, "0.01")
    if isinstance(betas, (str, Tensor)) or not hasattr(betas, "__getitem__") or len(betas) != 2:
        raise ValueError(f"[{where}] betas must be two numbers, got {betas!r}; pass e.g. (0.9, 0.999)")
    tensors = [isinstance(b, Tensor) for b in betas]
    if tensors[0] != tensors[1]:
        raise ValueError(f"[{where}] betas must be either both floats or both Tensors, got {betas!r}")
    for index, beta in enumerate(betas):
        if isinstance(beta, Tensor) and beta.numel() != 1:
            raise ValueError(f"[{where}] Tensor betas[{index}] must be 1-element, got shape {tuple(beta.shape)}")
        if not 0.0 <= _number(beta) < 1.0:
            raise ValueError(
                f"[{where}] Invalid beta parameter at index {index}: {_number(beta)}; betas must lie in [0, 1), "
                f"got {betas!r}; pass e.g. (0.9, 0.999)"
            )
    if torch_options["foreach"] and not torch_options["capturable"]:
        for name, value in (("lr", lr), ("betas[0]", betas[0]), ("betas[1]", betas[1])):
            if isinstance(value, Tensor):
                raise ValueError(
                    f"[{where}] {name} as a Tensor is not supported for capturable=False and foreach=True, as in "
                    "torch; drop foreach"
                )


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def _squeezed(beta: float | Tensor) -> float | Tensor:
    return beta.squeeze() if isinstance(beta, Tensor) and beta.dim() != 0 else beta
