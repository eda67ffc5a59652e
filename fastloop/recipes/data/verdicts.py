# SPDX-License-Identifier: Apache-2.0
"""What an analysis finds wrong, with a remedy each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastloop.findings import Finding
from fastloop.recipes.data.columns import Seen
from fastloop.texts import number

IMBALANCE = 3.0  # largest class over smallest, of which the source documents warn
IGNORED = -100  # torch's ignore_index
FAR = 3.0  # a mean beyond it, or a standard deviation beyond it or below its inverse squared, is no unit variance
SCALES = 100.0  # largest standard deviation of a feature over the smallest


def of_labels(
    counts: Mapping[Any, int], imbalance: float | None, classes: int | None, single: bool, looked: int, partial: bool
) -> Iterator[Finding]:
    """Of classes: text, out of range, missing, one alone, unequal."""
    known = {label: count for label, count in counts.items() if label != IGNORED}
    if not known:
        return
    if any(isinstance(label, str) for label in known):
        yield Finding("error", "labels", "labels are text", "map them to 0, 1, 2, ...")
        return
    lowest, highest = min(known), max(known)
    if lowest < 0:
        yield Finding(
            "error",
            "labels",
            f"label {lowest} is below 0 ({sum(n for k, n in known.items() if k < 0)} of them)",
            f"map labels to 0, 1, 2, ...; targets that do not count are {IGNORED}",
        )
    if classes is not None and highest >= classes:
        outside = sum(n for label, n in known.items() if label >= classes)
        yield Finding(
            "error",
            "labels",
            f"label {highest} is not below the number of classes, {classes} ({outside} of them)",
            "give the model as many outputs as there are classes, or map the labels to 0 to classes-1",
        )
    if len(known) == 1:
        remedy = "there is nothing to learn; take data of all classes"
        yield Finding("error", "labels", f"all samples are of class {lowest}", remedy)
        return
    if not single:
        return  # tokens and masks: classes that are rare or missing are their nature
    missing = [label for label in range(classes or highest + 1) if label not in known] if highest < 10**6 else []
    if missing:
        named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        yield Finding(
            "note" if partial else "warning",
            "labels",
            f"{len(missing)} of {classes or highest + 1} classes have no sample: {named}",
            "look at more samples" if partial else "map the labels to 0, 1, 2, ..., or take data that have them",
        )
    if imbalance is not None and imbalance > IMBALANCE:
        yield Finding(
            "warning",
            "labels",
            f"classes are unequal, {number(imbalance)} to 1",
            "weigh the loss, draw rare classes more often, or take FocalLoss: balance(dataset); look at metrics by "
            "class, not at the accuracy alone",
        )


def of_input(name: str, seen: Seen) -> Iterator[Finding]:
    """Of one input: what is not finite, shapes, constants, scale."""
    yield from _not_finite(name, seen)
    if not seen.numbers:
        kinds = ", ".join(sorted(seen.dtypes))
        yield Finding("note", name, f"samples are {kinds}, not numbers", "they were not looked into")
        return
    if len(seen.shapes) > 1:
        yield Finding(
            "note",
            name,
            f"samples have {len(seen.shapes)} different shapes",
            "bring them to one size, or give the DataLoader a collate_fn that pads",
        )
    if len(seen.dtypes) > 1:
        yield Finding("warning", name, f"samples are of several dtypes: {', '.join(sorted(seen.dtypes))}", "convert")
    constant = seen.constant()
    elements = len(seen.minimum)
    if constant:
        everything = len(constant) == elements
        named = ", ".join(map(str, constant[:5])) + (", ..." if len(constant) > 5 else "")
        yield Finding(
            "error" if everything else "note",
            name,
            f"{len(constant)} of {elements} features are the same in all samples: {named}",
            "the inputs tell nothing; look at how they are read" if everything else "leave them out if they cost much",
        )
    if not seen.integers and "bool" not in seen.dtypes:
        yield from _scale(name, seen)


def of_target(seen: Seen) -> Iterator[Finding]:
    """Of targets that are numbers."""
    yield from _not_finite("target", seen)
    summary = seen.summary()
    if seen.samples > 1 and summary["std"] == 0:
        remedy = "there is nothing to learn; look at how they are read"
        yield Finding("error", "target", f"all targets are {number(summary['mean'])}", remedy)
    elif _far(summary):
        yield Finding(
            "note",
            "target",
            f"targets have mean {number(summary['mean'])} and standard deviation {number(summary['std'])}",
            "standardize them for the training, and scale predictions back",
        )


def of_duplicates(duplicates: int, conflicts: int, looked: int, discrete: bool) -> Iterator[Finding]:
    """Of samples that are there twice; discrete ones, as short pieces of text, may well be."""
    if duplicates:
        yield Finding(
            "warning" if duplicates > 0.01 * looked and not discrete else "note",
            "samples",
            f"{duplicates} of {looked} have the same inputs as an earlier one",
            "leave them out, or keep copies in one part: split(groups=...)",
        )
    if conflicts and not discrete:
        yield Finding(
            "warning",
            "samples",
            f"inputs occur with several targets, {conflicts} times",
            "no model can fit both; correct the labels",
        )


def _not_finite(name: str, seen: Seen) -> Iterator[Finding]:
    for kind, count in (("NaN", seen.nan), ("infinite", seen.infinite)):
        if count:
            yield Finding(
                "error",
                name,
                f"{count} values are {kind}, in {seen.bad_samples} of {seen.samples} samples",
                "repair these samples or leave them out: the loss would not be finite",
            )


def _scale(name: str, seen: Seen) -> Iterator[Finding]:
    summary = seen.summary()
    mean, std = number(summary["mean"]), number(summary["std"])
    if _far(summary):
        yield Finding(
            "warning",
            name,
            f"values are not normalized: mean {mean}, standard deviation {std}",
            "normalize by the training data: fit_normalization(train)",
        )
    elif summary["mean"] is not None and summary["std"] and (abs(summary["mean"]) > 0.25 or summary["std"] < 0.5):
        yield Finding("note", name, f"mean {mean}, standard deviation {std}", "fit_normalization(train) gives 0 and 1")
    if seen.moments is None or not seen.by_element or any(len(shape) > 1 for shape in seen.shapes):
        return
    own = seen.moments.std[(seen.moments.count > 1) & ~seen.moments.constant()]
    if len(own) > 1 and float(own.max()) > SCALES * float(own.min()):
        yield Finding(
            "warning",
            name,
            f"features have standard deviations from {number(float(own.min()))} to {number(float(own.max()))}",
            'give each its own: fit_normalization(train, dims="feature")',
        )


def _far(summary: Mapping[str, float | None]) -> bool:
    mean, std = summary["mean"], summary["std"]
    if mean is None or std is None or std == 0:
        return False
    return abs(mean) > FAR or not FAR**-2 <= std <= FAR
