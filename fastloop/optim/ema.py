# SPDX-License-Identifier: Apache-2.0
"""Moving averages of the parameters: reading them, and evaluating with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fastloop.ops.reference import as_real


class AveragingOptimizer(Optimizer):
    """The part of FusedOptimizer that hands out moving averages; its kernels keep them in the state, as "ema"."""

    _swapped: bool = False  # the averages are in the parameters

    def ema_state_dict(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """`model.state_dict()` with the moving averages in the place of the parameters, and the live buffers.

        ema = ema_decay*ema + (1 - ema_decay)*p, kept in float32 (float64 for float64 parameters), starting at p.
        Averages come in that dtype, as copies; parameters without an average (frozen, or never stepped) as they are.

        Raises:
            RuntimeError: the optimizer was made without `ema_decay`.
        """
        self._check_has_ema()
        result = {}
        averaged = {id(p) for g in self.param_groups if g.get("ema_decay") is not None for p in g["params"]}
        for name, value in model.state_dict(keep_vars=True).items():
            ema = self.state.get(value, {}).get("ema") if id(value) in averaged else None
            if ema is not None:
                result[name] = (torch.view_as_complex(ema) if value.is_complex() else ema).clone()
            else:
                result[name] = value.detach() if isinstance(value, Tensor) else value
        return result

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """With the moving averages in the parameters; afterwards the parameters are as before, whatever happens.

        Raises:
            RuntimeError: the optimizer was made without `ema_decay`, or is inside this context already.
        """
        self._check_has_ema()
        if self._swapped:
            raise RuntimeError(f"[{type(self).__name__}] ema_weights() is active already")
        averaged = [
            p
            for g in self.param_groups
            if g.get("ema_decay") is not None
            for p in g["params"]
            if "ema" in self.state.get(p, ())
        ]
        with torch.no_grad():
            kept = [p.detach().clone() for p in averaged]
        self._swapped = True
        try:
            with torch.no_grad():
                for p in averaged:
                    as_real(p).copy_(self.state[p]["ema"])
            yield
        finally:
            with torch.no_grad():
                for p, before in zip(averaged, kept, strict=True):
                    p.copy_(before)
            self._swapped = False

    def _check_has_ema(self) -> None:
        if all(group.get("ema_decay") is None for group in self.param_groups):
            raise RuntimeError(f"[{type(self).__name__}] keeps no moving average; pass ema_decay=, e.g. 0.999")
