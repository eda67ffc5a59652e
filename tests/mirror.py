# SPDX-License-Identifier: Apache-2.0
"""An optimizer over tensors that lie elsewhere, as `checked_step` reads one: plain tensors on the CPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch


class Mirror:
    """Shows parameters, gradients and states of `source` through `plain`, which brings one tensor to the CPU."""

    def __init__(self, source: Any, plain: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.source, self.plain = source, plain
        self.twins = {
            id(p): torch.nn.Parameter(plain(p).clone()) for group in source.param_groups for p in group["params"]
        }
        self.state: dict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        self.refresh()

    def __getattr__(self, name: str) -> Any:  # defaults, found_inf
        return getattr(self.source, name)

    def _brought(self, value: Any) -> Any:
        return self.plain(value).clone() if isinstance(value, torch.Tensor) else value

    def refresh(self) -> None:
        for group in self.source.param_groups:
            for p in group["params"]:
                twin = self.twins[id(p)]
                twin.data.copy_(self.plain(p))
                twin.grad = None
                if p.grad is not None:
                    twin.grad_dtype = p.grad.dtype
                    twin.grad = self.plain(p.grad).clone()
                if self.source.state.get(p):
                    self.state[twin] = {key: self._brought(value) for key, value in self.source.state[p].items()}
                else:
                    self.state.pop(twin, None)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {key: self._brought(value) for key, value in group.items() if key != "params"}
            | {"params": [self.twins[id(p)] for p in group["params"]]}
            for group in self.source.param_groups
        ]

    @property
    def grad_norm(self) -> torch.Tensor | None:
        return self._brought(self.source.grad_norm)

    @property
    def skipped_steps(self) -> torch.Tensor:
        return self._brought(self.source.skipped_steps)

    def step(self) -> Any:
        result = self.source.step()
        self.refresh()
        return result


def mirror(source: torch.optim.Optimizer, plain: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A Mirror with the class name of its source, by which the cases are found."""
    return type(type(source).__name__, (Mirror,), {})(source, plain)
