# SPDX-License-Identifier: Apache-2.0
"""SGD, the drop-in for torch.optim.SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastloop.optim.base import FusedOptimizer
from fastloop.optim.hooks import hooked_step
from fastloop.optim.settings import check_number


class SGD(FusedOptimizer):
    r"""Stochastic gradient descent with momentum, clipping, AMP unscaling, EMA and master weights in one sweep.

    .. code-block:: text

        g = grad / grad_scale * min(1, max_grad_norm / (norm + 1e-6)), then |g| <= max_grad_value
        g = g + weight_decay*p
        b = momentum*b + (1-dampening)*g           b = g at the first step
        d = g + momentum*b (nesterov)  or  b  or, without momentum, g
        p = p - lr*d

    Replaces :class:`torch.optim.SGD` and exchanges state_dicts with it. Arguments up to `fused` are torch's and mean
    what they mean there; ours are described in :class:`fastloop.AdamW`. A sparse gradient is stepped as its dense form
    on the reference backend.

    Source: Sutskever et al., "On the importance of initialization and momentum in deep learning", 2013.
    """

    _hyper = (("lr", -1), ("momentum", -1), ("dampening", -1), ("weight_decay", -1), ("nesterov", -1))
    _structure = ("momentum", "differentiable", "ema_decay")
    _counts_steps = False
    _serves_sparse = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
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
        where = type(self).__name__
        check_number(where, "lr", lr, 0.0, None, "1e-3")
        check_number(where, "momentum", momentum, 0.0, None, "0.9")
        check_number(where, "weight_decay", weight_decay, 0.0, None, "1e-4")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(
                f"[{where}] Nesterov momentum requires a momentum and zero dampening, got momentum={momentum!r}, "
                f"dampening={dampening!r}; pass e.g. momentum=0.9, dampening=0"
            )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            params,
            defaults,
            max_grad_norm=max_grad_norm,
            max_grad_value=max_grad_value,
            error_if_nonfinite=error_if_nonfinite,
            norm_group=norm_group,
            ema_decay=ema_decay,
            state_dtype=state_dtype,
            master_weights=master_weights,
            zero_grads=zero_grads,
            backend=backend,
        )

    def _rule(self, group: dict[str, Any]) -> str:
        return "sgd_momentum" if group["momentum"] else "sgd"

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("nesterov", False)

    @hooked_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters once; see :meth:`fastloop.Adam.step`."""
        return self._run_step(closure)
