# SPDX-License-Identifier: Apache-2.0
"""An easy task first: a data set that is another one from some epoch on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset


class TaskStages(Dataset[Any]):
    """The data set of the stage that an epoch is in.

        stages = TaskStages({0: short_sums, 5: long_sums, 10: all_sums})
        DataLoader(stages, batch_size=32, shuffle=True)

    `Loop` tells it the epoch before it makes the epoch's iterator, so that workers have the right stage, and the length
    of the schedule is that of all stages. A loop of your own calls `set_epoch`.

    Args:
        stages: the first epoch of each stage, and its map-style data set. One stage begins at 0.

    Raises:
        ValueError: no stage at epoch 0, an epoch that is no integer of at least 0, or an empty data set.
        TypeError: a data set without a length or without `__getitem__`.
    """

    def __init__(self, stages: Mapping[int, Any]) -> None:
        self.stages = dict(sorted(_checked(stages).items()))
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch, from 0; told to the stages' data sets too, where these take it."""
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ValueError(f"[curriculum] epoch must be an integer of at least 0, got {epoch!r}")
        self.epoch = epoch
        for dataset in self.stages.values():
            told = getattr(dataset, "set_epoch", None)
            if callable(told):
                told(epoch)

    def at(self, epoch: int) -> Any:
        """The data set of an epoch."""
        return self.stages[max(first for first in self.stages if first <= epoch)]

    def length(self, epoch: int) -> int:
        """Examples of an epoch."""
        return len(self.at(epoch))

    def __len__(self) -> int:
        return self.length(self.epoch)

    def __getitem__(self, index: Any) -> Any:
        return self.at(self.epoch)[index]


def _checked(stages: Any) -> Mapping[int, Any]:
    if not isinstance(stages, Mapping) or not stages:
        raise ValueError(f"[curriculum] stages must be {{epoch: dataset, ...}}, got {stages!r}; pass e.g. {{0: easy}}")
    for first, dataset in stages.items():
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ValueError(f"[curriculum] a stage must begin at an epoch, an integer of at least 0, got {first!r}")
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
            raise TypeError(
                f"[curriculum] the stage of epoch {first} must be a map-style data set, got {type(dataset).__name__}, "
                "which lacks __len__ or __getitem__"
            )
        if len(dataset) == 0:
            raise ValueError(f"[curriculum] the stage of epoch {first} must have examples, got an empty data set")
    if 0 not in stages:
        raise ValueError(f"[curriculum] a stage must begin at epoch 0, got {sorted(stages)}; add {{0: dataset}}")
    return stages
