# SPDX-License-Identifier: Apache-2.0
"""A model that is unfrozen layer by layer, from the head down."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fastloop.recipes.finetune.freezing import can_be_trained, set_trainable, settle_batchnorms
from fastloop.recipes.finetune.names import chosen, listed, named

WHERE = "GradualUnfreezing"


class GradualUnfreezing:
    """A callback of Loop: in epoch e what the patterns of all epochs up to e match is trained, the rest is frozen.

        Loop(model, AdamW(parameter_groups(model, 1e-4)), loss_fn, callbacks=[
            GradualUnfreezing({0: ["fc"], 5: ["layer4"], 10: ["*"]})])

    What is trained depends on the epoch alone, so a run that is resumed goes on exactly, and what was frozen by hand
    before is as the schedule says. The optimizer has all parameters from the start: those that are frozen have no
    gradient, and so no update, no weight decay and no state; their step counts begin when they are unfrozen. Under DDP
    `loop.model` is wrapped anew when the schedule changes what is trained.

    Args:
        schedule: patterns as of `freeze`, by epoch from 0, which it needs.
        batchnorm: BatchNorms without any trained parameter stay in eval mode, as in `freeze`.

    Raises:
        ValueError: an epoch that is none, no epoch 0, or no pattern. At the start of `fit`: a pattern that matches
            nothing, or a parameter that the optimizer does not have.
        RuntimeError: in `fit`: a CUDA graph, or a DistributedDataParallel that the caller made: they are built for what
            was trained before.

    Source: Howard and Ruder, "Universal Language Model Fine-tuning for Text Classification", 2018.
    """

    def __init__(self, schedule: Mapping[int, str | Iterable[str]], *, batchnorm: bool = True) -> None:
        if not isinstance(schedule, Mapping) or not schedule:
            raise ValueError(f"[{WHERE}] schedule must be patterns by epoch, got {schedule!r}; pass e.g. {{0: ['fc']}}")
        for epoch in schedule:
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
                raise ValueError(f"[{WHERE}] an epoch must be an integer of at least 0, got {epoch!r}")
        self.schedule = {epoch: listed(WHERE, schedule[epoch]) for epoch in sorted(schedule)}
        if not self.schedule.get(0):
            raise ValueError(f"[{WHERE}] something must be trained in epoch 0; add e.g. 0: ['head'] to the schedule")
        self.batchnorm = batchnorm

    def patterns(self, epoch: int) -> list[str]:
        """Of what is trained in that epoch."""
        return [pattern for start, every in self.schedule.items() if start <= epoch for pattern in every]

    def apply(self, model: nn.Module, epoch: int) -> list[str]:
        """Freeze and unfreeze in place as the schedule says for that epoch; returns the names of what is trained."""
        trained = chosen(WHERE, model, self.patterns(epoch))
        names = [name for name, p in named(model).items() if set_trainable(p, name in trained)]
        if self.batchnorm:
            settle_batchnorms(model, self.patterns(epoch))
        return names

    def on_fit_start(self, loop: Any) -> None:
        """Check, and freeze what is not trained yet at the epoch where the run is."""
        self._check(loop)
        self.apply(loop.model, loop.epoch)
        loop.requires_grad_changed()

    def on_epoch_end(self, loop: Any) -> None:
        """Unfreeze what is trained from the next epoch on."""
        self.apply(loop.model, loop.epoch)
        loop.requires_grad_changed()

    def _check(self, loop: Any) -> None:
        if loop._graphs is not None:
            raise RuntimeError(
                f"[{WHERE}] cuda_graph=True replays the backward of what was trained when it was captured; leave it out"
            )
        if not any(can_be_trained(p) for p in chosen(WHERE, loop.model, self.patterns(0)).values()):
            raise ValueError(f"[{WHERE}] no parameter is trained in epoch 0 by {self.patterns(0)}; add e.g. the head")
        every = chosen(WHERE, loop.model, self.patterns(max(self.schedule)))
        owned = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
        missing = [name for name, p in every.items() if id(p) not in owned and can_be_trained(p)]
        if missing:
            raise ValueError(
                f"[{WHERE}] the optimizer must have all parameters from the start, and lacks {len(missing)}, the first "
                f"is {missing[0]!r}; make it before anything is frozen, or call unfreeze(model) first"
            )
