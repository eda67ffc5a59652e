# SPDX-License-Identifier: Apache-2.0
"""The three parts of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.utils.data import Subset

from fastloop.recipes.results import Result
from fastloop.texts import columns

PARTS = ("train", "validation", "test")


@dataclass
class Split(Result):
    """Parts of one data set without a sample in common; `train, validation, test = split(...)` takes them apart."""

    practice: ClassVar[str] = "split"
    train: Subset[Any] = field(repr=False)
    validation: Subset[Any] = field(repr=False)
    test: Subset[Any] = field(repr=False)
    sizes: dict[str, int]
    fractions: tuple[float, ...]
    seed: int
    stratified: bool
    grouped: bool
    classes: dict[str, dict[int, int]] | None = None  # samples of each class, by part; None without labels

    def __iter__(self) -> Iterator[Subset[Any]]:
        return iter((self.train, self.validation, self.test))

    def table(self) -> str:
        """A row for each part: its size, its share, and its classes where labels were given."""
        whole = sum(self.sizes.values())
        labels = [] if self.classes is None else list(self.classes["train"])
        rows = [
            [part, self.sizes[part], f"{self.sizes[part] / whole:.1%}"]
            + ([] if self.classes is None else [self.classes[part][label] for label in labels])
            for part in PARTS
        ]
        return columns(["part", "samples", "share", *(f"class {label}" for label in labels)], rows)
