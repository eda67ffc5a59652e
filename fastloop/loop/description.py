# SPDX-License-Identifier: Apache-2.0
"""`run_dir/run.json`: what a run was made of, written at its start: options, optimizer, schedule, loaders, model.

    {"format": "fastloop-run", "version": 1, "starts": [{...}, ...]}

A run that goes on from a checkpoint, or by another `fit`, adds a start. Each gets an "end" when it ends; one
without was killed, or runs still. Of more than 30 starts the first and the latest stay, and the first says how many are
"left_out", and their seconds. Nothing here raises: a training does not stop for its description.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastloop._version import __version__
from fastloop.loop import loader_description
from fastloop.loop.evaluate import Supervised
from fastloop.loop.files import replace_file
from fastloop.loop.plain import flattened, name_of, plain
from fastloop.loop.strategy import unwrapped

if TYPE_CHECKING:
    from fastloop.loop.data import Feed
    from fastloop.loop.running import Running

FILE, FORMAT, VERSION = "run.json", "fastloop-run", 1
MOST_STARTS = 30  # the file is read and written at each: a fit for every window must not become slower and slower
LEFT = "left"  # the reason of an end: a loop around `windows` was broken off, by `break` or by an error in its body
APART = ("model", "optimizer", "loss_fn", "config", "run_dir", "self")  # arguments of Loop that are described apart
logger = logging.getLogger("fastloop.loop")


# ---- the file


def begin(loop: Running, feed: Feed, **length: int | None) -> None:
    """Add a start to the file, and tell the loggers what was configured. Before the first window.

    Args:
        length: of the run: epochs, max_steps, total_steps.
    """
    if loop.ranks.rank != 0 or (loop.run_dir is None and not loop._reporter.takes_config):
        return
    try:
        start = plain(described(loop, feed, length))
        if loop.run_dir is not None:
            path = loop.run_dir / FILE
            earlier = _starts_so_far(path, fresh=loop.global_step == 0)
            _write(path, _shortened([*earlier, start]))
            loop._described_at = start["time"]
    except Exception as error:
        logger.warning("%s is not written: %s", FILE, error)
        return
    try:
        loop._reporter.config(configured(start))
    except Exception as error:
        logger.warning("a logger did not take what the run was configured with: %s", error)


def end(loop: Running, error: BaseException | None) -> None:
    """Say in the file how the last start has ended; once more for the error that a broken off loop was left by."""
    if loop._described_at is None or loop.run_dir is None:
        return
    try:
        path = loop.run_dir / FILE
        starts = read(path)
        if not starts or starts[-1]["time"] != loop._described_at:  # of another run, which may have been killed
            return
        if starts[-1].get("end", {}).get("reason", LEFT) != LEFT:
            return
        now = time.time()
        starts[-1]["end"] = {
            "time": now, "seconds": now - starts[-1]["time"], "step": loop.global_step, "epoch": loop.epoch,
            "reason": _reason(loop.stop_reason, error), "best": plain(loop._best),
        }  # fmt: skip
        _write(path, starts)
    except Exception as failure:
        logger.warning("%s does not get its end: %s", FILE, failure)


def _reason(stopped: str | None, error: BaseException | None) -> str:
    if isinstance(error, Exception) or (error is not None and stopped is None):
        return LEFT if isinstance(error, GeneratorExit) else type(error).__name__
    return stopped or "end"


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The starts of a run.json, oldest first; [] where there is none, or none that can be read."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        starts = content["starts"] if content["format"] == FORMAT and content["version"] == VERSION else []
        return [start for start in starts if isinstance(start, dict) and isinstance(start.get("time"), (int, float))]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _starts_so_far(path: Path, fresh: bool) -> list[dict[str, Any]]:
    earlier = [] if fresh else read(path)
    if not earlier and path.exists():  # of another run in the same folder, or damaged
        os.replace(path, path.with_name(path.name + ".old"))
    return earlier


def _shortened(starts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first, *rest = starts
    dropped = rest[: len(starts) - MOST_STARTS] if len(starts) > MOST_STARTS else []
    if not dropped:
        return starts
    before = first.get("left_out", {"starts": 0, "seconds": 0.0})
    seconds = sum(start.get("end", {}).get("seconds", 0.0) for start in dropped)
    left_out = {"starts": before["starts"] + len(dropped), "seconds": before["seconds"] + seconds}
    return [{**first, "left_out": left_out}, *rest[len(dropped) :]]


def _write(path: Path, starts: list[dict[str, Any]]) -> None:
    content = {"format": FORMAT, "version": VERSION, "starts": starts}
    replace_file(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


# ---- what it says


def described(loop: Running, feed: Feed, length: Mapping[str, int | None]) -> dict[str, Any]:
    """One start."""
    model, fitted = unwrapped(loop.model), loop._fitted_with
    val_loader = None if fitted is None else fitted["val_loader"]
    asked = options(loop._options)
    return {
        "time": time.time(),
        "step": loop.global_step,
        "epoch": loop.epoch,
        "by": "windows" if fitted is None else "fit",
        **length,
        "evaluate_every_steps": None if fitted is None else fitted["evaluate_every_steps"],
        "options": asked,
        "precision": loop.precision,
        "monitors": dict(loop.monitors),
        "loggers": [getattr(each, "name", type(each).__name__) for each in loop._reporter._loggers.loggers],
        "model": _model(model),
        "loss": _loss(getattr(loop, "loss_fn", None)),
        "optimizer": _optimizer(loop.optimizer),
        "schedule": asked.get("schedule"),
        "train_loader": loader_description.described(feed._given),
        "val_loader": None if val_loader is None else loader_description.described(val_loader),
        "ranks": loop.ranks.size,
        "strategy": getattr(loop, "strategy", None),
        "device": str(loop.ranks.device),
        "gpu": torch.cuda.get_device_name(loop.ranks.device) if loop.ranks.device.type == "cuda" else None,
        "config": getattr(loop, "config", None),
        "versions": {
            "fastloop": __version__, "torch": torch.__version__, "numpy": numpy.__version__,
            "python": platform.python_version(), "cuda": torch.version.cuda,
        },
    }  # fmt: skip


def kept(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of Loop without the objects that a description has a part for, and without the loop itself."""
    return {name: value for name, value in arguments.items() if name not in APART}


def options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What `kept` has left, as JSON: made when somebody is to read it."""
    return {name: _option(value) for name, value in arguments.items()}


def _option(value: Any) -> Any:
    try:
        return plain(value)
    except Exception:  # of an object that answers nothing, not even for its class
        return type(value).__name__


def configured(start: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a start that runs are compared by, the user's config over them; dotted names, no dicts."""
    optimizer, loader, chosen = start["optimizer"], start["train_loader"], start["options"]
    group = optimizer["groups"][0] if optimizer["groups"] else {}
    named = ("accumulation_steps", "max_grad_norm", "max_grad_value", "schedule", "seed", "patience")
    values = {
        "model": start["model"]["class"],
        "parameters": start["model"]["parameters"],
        "loss": None if start["loss"] is None else start["loss"]["class"],
        "optimizer": optimizer["class"],
        "lr": group.get("initial_lr", group.get("lr")),
        "weight_decay": group.get("weight_decay"),
        "batch_size": loader.get("batch_size"),
        "precision": start["precision"],
        **{name: chosen.get(name) for name in named},
    }
    return flattened({**values, **(start["config"] if isinstance(start["config"], Mapping) else {})})


def _model(model: nn.Module) -> dict[str, Any]:
    parameters = [p for p in model.parameters() if not is_lazy(p)]
    lazy = sum(is_lazy(p) for p in model.parameters())
    layers = Counter(type(module).__name__ for module in model.modules() if not any(True for _ in module.children()))
    return {
        "class": name_of(model),
        "parameters": sum(p.numel() for p in parameters),
        "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
        "layers": dict(layers),
        **({"lazy": lazy} if lazy else {}),  # tensors that get their shape from the first batch
    }


def _loss(loss_fn: Any) -> dict[str, Any] | None:
    if loss_fn is None:
        return None
    criterion = loss_fn.criterion if isinstance(loss_fn, Supervised) else loss_fn
    found: dict[str, Any] = {"class": name_of(criterion), "criterion": isinstance(loss_fn, Supervised)}
    for name in ("label_smoothing", "gamma", "ignore_index"):
        value = getattr(criterion, name, None)
        if isinstance(value, (int, float)):
            found[name] = value
    if hasattr(criterion, "weight"):
        found["weighted"] = criterion.weight is not None
    return found


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    groups = []
    for group in optimizer.param_groups:
        settings = {
            name: value
            for name, value in group.items()
            if name not in ("params", "param_names") and isinstance(value, (bool, int, float, str, tuple))
        }
        rate = group.get("lr")
        if isinstance(rate, torch.Tensor) and rate.device.type == "cpu":
            settings["lr"] = rate.item()
        count = sum(p.numel() for p in group["params"] if not is_lazy(p))
        groups.append({**settings, "tensors": len(group["params"]), "parameters": count})
    return {"class": name_of(optimizer), "groups": groups}
