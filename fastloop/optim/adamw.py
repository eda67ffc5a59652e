# SPDX-License-Identifier: Apache-2.0
"""AdamW, the drop-in for torch.optim.AdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastloop.optim.adam import AdamBase


class AdamW(AdamBase):
    r"""AdamW with gradient clipping, AMP unscaling, EMA and master weights in the same sweep over memory.

    .. code-block:: text

        norm = sqrt(sum over all parameters of (grad / grad_scale)^2)
        g    = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6)), then |g| <= max_grad_value
        p    = p * (1 - lr*weight_decay)
        m    = m + (1-b1)*(g - m)
        v    = b2*v + (1-b2)*g*g
        p    = p - lr/(1-b1^t) * m / (sqrt(v)/sqrt(1-b2^t) + eps)
        ema  = ema_decay*ema + (1-ema_decay)*p

    computed in float32 registers whatever the storage (float64 for float64 parameters), hyperparameters in double and
    rounded once. Replaces :class:`torch.optim.AdamW` and exchanges state_dicts with it.

    Args:
        params: parameters, named parameters or groups, of any shape; float32, bfloat16, float16 or float64 on a CPU
            run on the kernels, others (complex, other devices) on the reference backend.
        lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused: as in torch;
            `fused=True` and `foreach=True` change nothing here.
        max_grad_norm: bound of the global norm, as `torch.nn.utils.clip_grad_norm_`; None measures nothing, inf
            measures and never clips. A group of its own with None is left out of norm and clip. The gradients stay as
            backward left them. If the norm is not finite the step is skipped and counted in `skipped_steps`.
        max_grad_value: bound of each element of the gradient, applied after the norm.
        error_if_nonfinite: raise RuntimeError instead of skipping; nothing is changed then.
        norm_group: process group over which the norm is summed, where this process holds a part of the parameters.
        ema_decay: keep a moving average of the parameters, see `ema_state_dict` and `ema_weights`.
        state_dtype: torch.float32 or torch.bfloat16 for the moments; None is the parameter's dtype, but float32 for
            float16 parameters.
        master_weights: keep float32 copies of bfloat16 and float16 parameters, with float32 moments.
        zero_grads: zero the gradients in place in the same sweep, on a skipped step too.
        backend: "auto", "cpu", "cuda", "triton" or "reference".

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
        RuntimeError: a backend that cannot run here.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
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
            "decoupled_weight_decay": True,
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # whatever was loaded: AdamW's decay is decoupled
