# SPDX-License-Identifier: Apache-2.0
"""A GradScaler that lets the optimizer's own first pass look for infinities."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from fastloop.optim.base import FusedOptimizer


class GradScaler(torch.amp.GradScaler):
    """torch.amp.GradScaler without its extra pass over the gradients.

    .. code-block:: text

        step:    g = grad / scale inside the optimizer's step; not finite: the step is skipped
        update:  scale = scale * backoff_factor after a skipped step,
                 scale * growth_factor after growth_interval steps in a row without one

    torch's scaler reads all gradients once to look for infinities before the optimizer reads them again. With a
    fastloop optimizer the pass that computes the norm finds them. Other optimizers are stepped as torch does, and so is
    ours after an explicit `unscale_`. Same interface and state_dict as torch.amp.GradScaler.

    Args:
        device: "cuda" (as torch's default) or "cpu".
        init_scale, growth_factor, backoff_factor, growth_interval, enabled: as in torch.

    Source: torch.amp.GradScaler; Micikevicius et al., "Mixed Precision Training", 2018.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step the optimizer with unscaled gradients, unless they are not finite. Returns what its step returns.

        Raises:
            RuntimeError: called twice without `update`, with a closure, or before any `scale`.
        """
        ours = isinstance(optimizer, FusedOptimizer) and self._enabled
        state = self._per_optimizer_states[id(optimizer)] if ours else None
        if state is None or state["stage"] is not OptState.READY or "closure" in kwargs or self._scale is None:
            return super().step(optimizer, *args, **kwargs)
        assert isinstance(optimizer, FusedOptimizer)
        self._check_scale_growth_tracker("step")
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            raise AssertionError("No inf checks were recorded for this optimizer.")
        try:
            with optimizer.scaled_by(self._scale):
                return optimizer.step(*args, **kwargs)  # type: ignore[no-any-return]
        finally:  # error_if_nonfinite raises, and the scale has to go down all the same
            device = self._scale.device
            state["found_inf_per_device"] = {device: optimizer.found_inf_of_last_step(device)}
            state["stage"] = OptState.STEPPED
