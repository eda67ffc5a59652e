# SPDX-License-Identifier: Apache-2.0
"""Rules about data: what was looked at, how it is loaded, normalized, augmented and balanced."""

from __future__ import annotations

import math
from typing import Any

from fastloop.recipes.checklist.answers import (
    Answer,
    done,
    no_description,
    not_applicable,
    not_done,
    practised,
    stated,
    unknown,
)
from fastloop.recipes.checklist.practices import how
from fastloop.recipes.tracking.run_folder import RunFolder

CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
BALANCED = 1.5  # largest class over smallest, up to which nobody weighs classes
WAITING = 0.1  # share of the time spent waiting for the loader, from which workers are too few

analyzed = practised("analyze", also="size")


def visualized(run: RunFolder) -> Answer:
    for name in ("data visualized", "augmentation_grid"):
        if name in run.practices:
            return done(f"{name!r} is recorded")
    pictures = sorted((run.path / "images").glob("**/*.png"))
    plain = [path for path in pictures if not path.with_suffix(".json").exists()]  # no confusion matrices
    if plain:
        return unknown(f"{len(plain)} pictures in images/, of whatever, as {plain[0].name}", how("data visualized"))
    return not_done("no picture of samples is recorded", f"{how('augmentation_grid')}; or {how('data visualized')}")


def normalized(run: RunFolder) -> Answer:
    about = [each for each in run.checks or () if each.get("where") in ("normalization", "inputs")]
    errors = [each for each in about if each.get("level") in ("error", "warning")]
    if errors:
        return not_done(f"checks.json: {errors[0].get('what')}", str(errors[0].get("remedy")))
    if "fit_normalization" in run.practices:
        return done("fit_normalization is recorded")
    if not run.start:
        return no_description(run)
    layers = run.start["model"]["layers"]
    if "Normalization" in layers:
        return done("the model has a Normalization layer")
    if "Normalize" in _data(run).get("transforms", ()):
        return done("the training data's transforms have Normalize")
    if "Embedding" in layers and not any(name in layers for name in CONVOLUTIONS):
        return not_applicable("the model has an Embedding: its inputs are tokens")
    return not_done("no Normalize among the transforms, none recorded", how("fit_normalization"))


def augmented(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    data = _data(run)
    if data.get("random"):
        return done(f"random transforms of the training data: {', '.join(data['transforms']) or data['class']}")
    if "augmentation_grid" in run.practices:
        return done("augmentation_grid is recorded")
    if not any(name in run.start["model"]["layers"] for name in CONVOLUTIONS) and not data.get("transforms"):
        return not_applicable("no transform and no convolution: augmentation is for images and sound")
    if data.get("random") is None:
        return unknown(f"{_named(data)} may augment, which cannot be seen from outside", how("augmentation_grid"))
    return not_done("no random transform is to be seen in the training data", 'e.g. augmentation("weak") as transform')


def augmented_in_training_only(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    train, val = _data(run).get("random"), _data(run, "val_loader").get("random")
    if val:
        names = ", ".join(_data(run, "val_loader")["transforms"])
        return not_done(f"the validation data have random transforms ({names})", "give its dataset a transform without")
    if run.start["val_loader"] is None:
        return not_applicable("there is no validation loader")
    if val is None:
        named = _named(_data(run, "val_loader"))
        return unknown(f"{named} of the validation may augment", "transforms of torchvision can be seen")
    if not train:
        return not_applicable("no random transform is to be seen")
    return done("the training data have random transforms, the validation data none")


def shuffled(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    loader = run.start["train_loader"]
    size = f"batch size {loader.get('batch_size')}"
    if loader["shuffle"]:
        return done(f"{size}, {_short(loader['sampler'])}")
    if loader["shuffle"] is False:
        return not_done(f"{size}, and the training data come in order", "DataLoader(..., shuffle=True)")
    sampler = _short(loader.get("batch_sampler") or loader.get("sampler") or loader["class"])
    return unknown(f"the order is {sampler}'s own", "see to it that it is another in each epoch")


def validation_in_order(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    loader = run.start["val_loader"]
    if loader is None:
        if any(name.startswith("val/") for name in run.metrics):
            return unknown("validation ran outside of fit", "fit(train_loader, val_loader) says how it is loaded")
        return not_done("there is no validation loader", "fit(train_loader, val_loader, ...)")
    if loader["shuffle"]:
        return not_done("the validation data are shuffled", "DataLoader(..., shuffle=False)")
    if loader["shuffle"] is None:
        return unknown("the order of the validation data is its loader's own", "take a DataLoader with shuffle=False")
    return done("the validation data come in order")


def workers(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    count = run.start["train_loader"].get("num_workers", "no")  # of a loader that is no DataLoader
    waits = [value for _, value in run.points("data_wait")[1:] if math.isfinite(value)]  # the first fills the queue
    if not waits:
        if count not in (0, "no"):
            return done(f"{count} workers; no row says how long the run waited for them")
        return unknown(f"{count} workers, and no row says how long the run waited", "log more rows (log_every=)")
    share = sum(waits) / len(waits)
    text = f"{count} workers, {share:.0%} of the time spent waiting for data"
    if share <= WAITING:
        return done(text)
    return not_done(text, "python -m fastloop.bench tune loader finds the number of workers")


def pinned(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    if run.start["device"].partition(":")[0] != "cuda":
        return not_applicable(f"the run is on {run.start['device']}")
    if run.start["train_loader"].get("pin_memory"):
        return done("pin_memory=True")
    return done("the loop pins each batch and copies it beside the computation; pin_memory=True saves it the work")


def loading_validated(run: RunFolder) -> Answer:
    checks, where = run.checks, "checks.json"
    if checks is None and "preflight" in run.practices:
        checks, where = run.practices["preflight"].get("findings") or [], "preflight is recorded"
    if checks is None:
        return not_done("no checks were run before the training", how("preflight"))
    errors = [each for each in checks if each.get("level") == "error"]
    if errors:
        what = f"{where}: {len(errors)} errors, as {errors[0].get('what')}"
        return not_done(what, str(errors[0].get("remedy")))
    return done(f"{where}: no error, {len(checks)} findings")


def classes_weighed(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    loss, sampler = run.start["loss"] or {}, str(run.start["train_loader"].get("sampler"))
    if loss.get("weighted") or "gamma" in loss or "Weighted" in sampler:
        used = "a weighted sampler" if "Weighted" in sampler else f"{_short(loss['class'])} with weights or focus"
        return done(f"the classes are balanced by {used}")
    imbalance = run.practices.get("analyze", {}).get("imbalance")
    if isinstance(imbalance, (int, float)):
        text = f"the largest class has {imbalance:.3g} times the samples of the smallest"
        if imbalance <= BALANCED:
            return not_applicable(text)
        return not_done(text, "balance(dataset), class_weights, weighted_sampler or FocalLoss")
    if loss.get("criterion") and "label_smoothing" not in loss and "weighted" not in loss:
        return not_applicable(f"{_short(loss['class'])} is no loss of classes")
    return unknown("nobody has counted the classes", how("analyze"))


def label_smoothing(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    loss = run.start["loss"] or {}
    if loss.get("label_smoothing"):
        return done(f"label_smoothing={loss['label_smoothing']}")
    if loss.get("criterion") and "label_smoothing" not in loss:
        return not_applicable(f"{_short(loss['class'])} has none")
    return stated("label smoothing considered")(run)


def _data(run: RunFolder, loader: str = "train_loader") -> dict[str, Any]:
    return (run.start.get(loader) or {}).get("dataset") or {}


def _named(data: dict[str, Any]) -> str:
    return ", ".join(data.get("transforms", ())) or _short(data.get("class", "the loader"))


def _short(name: str) -> str:
    return name.rpartition(".")[2]
