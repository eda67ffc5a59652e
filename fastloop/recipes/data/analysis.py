# SPDX-License-Identifier: Apache-2.0
"""What is in a data set, before a model is trained on it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from fastloop.drawing import figure, save
from fastloop.findings import Finding, listed
from fastloop.recipes.data import verdicts
from fastloop.recipes.data.columns import Fingerprints, Seen
from fastloop.recipes.data.pictures import is_image, show
from fastloop.recipes.data.samples import as_dataset, batches, tensor_of
from fastloop.recipes.results import Result
from fastloop.recipes.sampling import generator_of
from fastloop.texts import columns, number

AREA = "analyze"
TARGET = "target"  # the name of numbers as targets, beside the inputs'
PICTURES = 16
BARS = 40  # classes of a plot with a name each


@dataclass
class Analysis(Result):
    """What `analyze` has seen. By input: "input" where there is one, and "target" for targets that are numbers."""

    practice: ClassVar[str] = AREA
    size: int  # samples of the data set; of a stream what it gave
    looked_at: int
    shapes: dict[str, list[tuple[int, ...]]]  # of a sample; several where they differ
    dtypes: dict[str, list[str]]
    labels: dict[Any, int]  # samples (or tokens) of each class; {} for numbers
    imbalance: float | None  # largest class over smallest; targets that are ignored (-100) are none
    mean: dict[str, float | None]
    std: dict[str, float | None]
    minimum: dict[str, float | None]
    maximum: dict[str, float | None]
    nan: dict[str, int]  # values
    infinite: dict[str, int]
    constant_features: dict[str, list[int]]  # of a flattened sample
    duplicates: int  # samples whose inputs were there before
    findings: list[Finding]
    pictures: list[tuple[Any, Any]] = field(default_factory=list, repr=False)  # image and label

    def table(self) -> str:
        """Sizes, a row for each input, the classes, then what was found."""
        head = ["", "shape", "dtype", "mean", "std", "minimum", "maximum", "NaN", "infinite", "constant"]
        rows = [
            [
                name,
                _some([" x ".join(map(str, shape)) or "single" for shape in self.shapes[name]]),
                _some(self.dtypes[name]),
                *(values[name] for values in (self.mean, self.std, self.minimum, self.maximum)),
                *(values[name] for values in (self.nan, self.infinite)),
                len(self.constant_features[name]),
            ]
            for name in self.shapes
        ]
        looked = "" if self.looked_at == self.size else f", {self.looked_at} of them looked at"
        lines = [f"{self.size} samples{looked}, {self.duplicates} duplicates", columns(head, rows)]
        if self.labels:
            whole = sum(self.labels.values())
            counted = sorted(self.labels.items(), key=lambda item: -item[1])
            classes = len(self.labels.keys() - {verdicts.IGNORED})
            lines.append(f"{classes} classes, imbalance {number(self.imbalance)}")
            lines.append(
                columns(["class", "count", "share"], [[str(k), n, f"{n / whole:.1%}"] for k, n in counted[:20]])
            )
            if len(counted) > 20:
                lines.append(f"... and {len(counted) - 20} more")
        return "\n".join([*lines, listed(self.findings)])

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """The classes' sizes, and for images some of them with their labels.

        Raises:
            ValueError: neither classes nor images to draw.
            MissingExtra: matplotlib is not installed.
        """
        if not self.labels and not self.pictures:
            raise ValueError("[analyze] there is nothing to draw: the samples have neither classes nor images")
        made = figure(9.0 if self.labels and self.pictures else 5.5, 4.5)
        parts = made.subfigures(1, 2, squeeze=False)[0] if self.labels and self.pictures else [made]
        if self.labels:
            self._bars(parts[0].subplots())
        if self.pictures:
            for axes in (grid := parts[-1].subplots(4, 4)).flat:
                axes.set_axis_off()
            for axes, (image, label) in zip(grid.flat, self.pictures, strict=False):
                axes.set_axis_on()
                show(axes, image, "" if label is None else str(label))
        return save(made, path)

    def _bars(self, axes: Any) -> None:
        names, counts = [str(name) for name in self.labels], list(self.labels.values())
        axes.bar(range(len(counts)), counts)
        if len(counts) <= BARS:
            axes.set_xticks(range(len(counts)), names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_xlabel("class")
        axes.set_ylabel("count")


def analyze(
    dataset: Any, *, samples: int | None = None, batch_size: int = 256, classes: int | None = None, seed: int = 0
) -> Analysis:
    """Sizes, distribution of the labels, statistics of the inputs, and what is wrong with them, with a remedy each.

    One pass, one batch in memory at a time, and 16 bytes for each sample (to find duplicates). Mean and standard
    deviation (of the population) in fp64, of the finite values. Found are: NaN and infinite values, labels outside of
    0 to classes-1 and classes without samples, one class alone, an imbalance above 3, constant features, values far
    from zero mean and unit variance, features of very different scales, duplicates, the same inputs with two targets,
    samples of different shapes.

    Args:
        dataset: of (input, target), of dicts, of inputs alone, a pair of tensors; of a `Split` the train part. Inputs
            are numbers, images (PIL's too), tokens; what is text is counted and not looked into.
        samples: how many to look at, chosen at random; None: all.
        batch_size: samples read at once.
        classes: how many there should be; None: as many as the labels tell.
        seed: of the choice.

    Raises:
        TypeError: a DataLoader, or no data set.
        ValueError: no samples; `samples` out of range, or given for a data set without an index.
    """
    data = as_dataset(dataset, AREA)
    if classes is not None and (isinstance(classes, bool) or not isinstance(classes, int) or classes < 1):
        raise ValueError(f"[{AREA}] classes must be an integer of at least 1, got {classes!r}")
    seen: dict[str, Seen] = {}
    target_seen, labels, prints = Seen(), Counter[Any](), Fingerprints()
    pictures = _Pictures()
    single, looked = True, 0
    for inputs, target in batches(data, batch_size, _chosen(data, samples, seed)):
        count = len(next(iter(inputs.values())))
        for name, values in inputs.items():
            seen.setdefault(name, Seen()).add(values)
        if target is not None:
            single &= _count(target, labels, target_seen)
        prints.add(inputs, target, count)
        pictures.add(inputs, target, count)
        looked += count
    if looked == 0:
        raise ValueError(f"[{AREA}] the data set has no samples; pass one that has")
    columns_seen = seen | ({TARGET: target_seen} if target_seen.samples else {})
    summaries = {name: each.summary() for name, each in columns_seen.items()}
    counts = dict(sorted(labels.items(), key=lambda item: (isinstance(item[0], str), item[0])))
    duplicates, conflicts = prints.duplicates()
    counted = [count for label, count in counts.items() if label != verdicts.IGNORED]
    imbalance = max(counted) / min(counted) if counted else None
    return Analysis(
        size=looked if isinstance(data, IterableDataset) else len(data),
        looked_at=looked,
        shapes={name: sorted(each.shapes) for name, each in columns_seen.items()},
        dtypes={name: sorted(each.dtypes) for name, each in columns_seen.items()},
        labels=counts,
        imbalance=imbalance,
        mean={name: each["mean"] for name, each in summaries.items()},
        std={name: each["std"] for name, each in summaries.items()},
        minimum={name: each["minimum"] for name, each in summaries.items()},
        maximum={name: each["maximum"] for name, each in summaries.items()},
        nan={name: each.nan for name, each in columns_seen.items()},
        infinite={name: each.infinite for name, each in columns_seen.items()},
        constant_features={name: each.constant() for name, each in columns_seen.items()},
        duplicates=duplicates,
        findings=[
            *verdicts.of_labels(counts, imbalance, classes, single, looked, partial=samples is not None),
            *(finding for name, each in seen.items() for finding in verdicts.of_input(name, each)),
            *(verdicts.of_target(target_seen) if target_seen.samples else ()),
            *verdicts.of_duplicates(duplicates, conflicts, looked, all(each.integers for each in seen.values())),
        ],
        pictures=pictures.kept,
    )


def _chosen(data: Any, samples: int | None, seed: int) -> Sequence[int] | None:
    if samples is None:
        return None
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"[{AREA}] samples must be an integer of at least 1, got {samples!r}; None looks at all")
    if isinstance(data, IterableDataset):
        raise ValueError(
            f"[{AREA}] samples={samples} needs a data set with an index, {type(data).__name__} is an IterableDataset; "
            "leave samples out"
        )
    chosen: list[int] = torch.randperm(len(data), generator=generator_of(seed))[:samples].sort().values.tolist()
    return chosen


def _count(target: Tensor | list[Any], labels: Counter[Any], numbers: Seen) -> bool:
    """Take the targets of a batch into one of the two; whether each sample has one class."""
    if isinstance(target, list) and not all(isinstance(each, Tensor) for each in target):
        labels.update(str(each) for each in target)
        return True
    for each in [target] if isinstance(target, Tensor) else target:
        if each.is_floating_point():
            numbers.add(each if isinstance(target, Tensor) else each[None])
        else:
            values, counts = each.detach().cpu().unique(return_counts=True)
            labels.update(dict(zip(map(int, values.tolist()), counts.tolist(), strict=True)))
    return isinstance(target, Tensor) and target.dim() == 1


class _Pictures:
    """Some images of all, each with the same chance: Vitter's reservoir."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, Any]] = []
        self._seen = 0
        self._draws = numpy.random.default_rng(0)

    def add(self, inputs: dict[str, Any], target: Any, count: int) -> None:
        column = next((each for each in inputs.values() if _drawable(each)), None)
        if column is None:
            return
        for i in range(count):
            self._seen += 1
            place = len(self.kept) if len(self.kept) < PICTURES else int(self._draws.integers(self._seen))
            if place < PICTURES:
                label = None if target is None else target[i]
                if isinstance(label, Tensor):
                    label = label.item() if label.numel() == 1 else None
                one = tensor_of(column[i])
                assert one is not None
                self.kept[place : place + 1] = [(one.detach().cpu().clone(), label)]


def _drawable(column: Any) -> bool:
    first = column[0]
    return isinstance(first, Tensor) and is_image(first.shape) and first.dtype != torch.int64


def _some(values: Sequence[str]) -> str:
    return ", ".join(values[:2]) + (f", ... ({len(values)})" if len(values) > 2 else "")
