# SPDX-License-Identifier: Apache-2.0
"""What an augmentation does to images, to be looked at before it is trained with."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastloop.drawing import figure, save
from fastloop.loop.random_state import seed_everything, unmoved
from fastloop.recipes.data.augmentation import StagedAugmentation, image_of
from fastloop.recipes.data.pictures import show
from fastloop.recipes.data.samples import as_dataset, with_index
from fastloop.recipes.sampling import generator_of

AREA = "augmentation_grid"


def augmentation_grid(
    dataset: Any, path: str | os.PathLike[str], *, samples: int = 8, draws: int = 4, seed: int = 0
) -> Path:
    """A picture of so many samples, each in a row: the original, then draws of the augmentation.

    Args:
        dataset: a `StagedAugmentation`, at its present epoch, or one of torchvision's with a `transform`; also a part
            of these. It is not changed.
        path: of the picture; its ending is the format.
        samples: rows, chosen at random; at most as many as there are.
        draws: of each.
        seed: of the choice and the draws; torch's own random state is not changed.

    Raises:
        TypeError: no data set, or one without an index.
        ValueError: a data set that does not augment, samples that are no images, numbers below 1.
        MissingExtra: matplotlib is not installed.
    """
    for name, value in (("samples", samples), ("draws", draws)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"[{AREA}] {name} must be an integer of at least 1, got {value!r}")
    data = with_index(as_dataset(dataset, AREA), AREA)
    original, drawn = _views(data)
    chosen = torch.randperm(len(data), generator=generator_of(seed))[:samples].tolist()
    made = figure(1.1 * (draws + 1), 1.15 * len(chosen), "a picture of the augmentation")
    axes = made.subplots(len(chosen), draws + 1, squeeze=False)
    with unmoved():
        for place, (row, index) in enumerate(zip(axes, chosen, strict=True)):
            show(row[0], image_of(original(index)), f"sample {index}")
            for draw in range(draws):
                seed_everything((seed + draw) % 2**32)
                show(row[draw + 1], image_of(drawn(index, seed + draw)), "" if place else f"draw {draw}")
    return save(made, path)


def _views(data: Any) -> tuple[Callable[[int], Any], Callable[[int, int], Any]]:
    """The original of an index, and a draw of it by a seed.

    Raises:
        ValueError: a data set that does not augment.
    """
    if isinstance(data, torch.utils.data.Subset):
        original, drawn = _views(data.dataset)
        places = data.indices
        return (lambda index: original(places[index])), (lambda index, seed: drawn(places[index], seed))
    if isinstance(data, StagedAugmentation):

        def draw(index: int, seed: int) -> Any:
            other = copy.copy(data)
            other.seed = seed
            return other[index]

        return data.dataset.__getitem__, draw
    if getattr(data, "transform", None) is not None:
        bare = copy.copy(data)
        bare.transform = None
        if getattr(bare, "transforms", None) is not None:  # torchvision's data sets keep it there too
            bare.transforms = None
        return bare.__getitem__, lambda index, seed: data[index]
    raise ValueError(
        f"[{AREA}] the data set must augment its images, {type(data).__name__} has neither a transform nor stages; "
        "pass a StagedAugmentation of it"
    )
