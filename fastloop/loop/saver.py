# SPDX-License-Identifier: Apache-2.0
"""When a run is saved, what goes into the checkpoint, and how a run goes on from one."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from fastloop._version import __version__
from fastloop.loop import documents, own_state, random_state, state
from fastloop.loop.checkpoint import Store
from fastloop.loop.data import Position
from fastloop.loop.manifest import Checkpoint
from fastloop.loop.strategy import Ranks, unwrapped

if TYPE_CHECKING:
    from fastloop.loop.stateful import Stateful

STATE_VERSION = 1  # of what a checkpoint holds beside tensors

logger = logging.getLogger("fastloop.loop")


class Saver:
    """The checkpoints of one loop.

    Args:
        store: where they are; None for a run without a folder, which saves nothing.
        every_steps, every_minutes, every_epochs: None, or how often.
    """

    def __init__(
        self,
        loop: Stateful,
        store: Store | None,
        every_steps: int | None,
        every_minutes: float | None,
        every_epochs: int | None,
    ) -> None:
        self._loop = loop
        self.store = store
        self.every_steps = every_steps
        self.every_seconds = math.inf if every_minutes is None else every_minutes * 60.0
        self.every_epochs = every_epochs
        self.last_step = -1  # of the last save
        self._last_time = time.monotonic()

    @property
    def minutes_are_over(self) -> bool:
        """Whether this process's clock asks for a save."""
        return time.monotonic() - self._last_time >= self.every_seconds

    def due_at(self, step: int) -> bool:
        """Whether the count of steps asks for a save."""
        return self.every_steps is not None and step % self.every_steps == 0 and step != self.last_step

    def due_after(self, epoch: int) -> bool:
        """Whether the count of finished epochs asks for a save."""
        return self.every_epochs is not None and epoch % self.every_epochs == 0

    def lacks_final(self) -> bool:
        """Whether the run is at its end and has no checkpoint that says so: it was killed before that. Waits."""
        step = self._loop.global_step
        if self.store is None or step == 0:
            return False
        return not self._loop.ranks.from_first((self.store.folder / f"final-{step:09d}").exists())

    def save(self, position: Position, reason: str, wait: bool = False, folder: str = "step") -> Path | None:
        """Save the run at the end of a window; in the background, unless `wait`."""
        if self.store is None:
            return None
        loop = self._loop
        self.last_step = loop.global_step
        self._last_time = time.monotonic()
        loop._reporter.sync()
        name = f"{folder}-{loop.global_step:09d}"
        path = self._hand_over(self.store, name, contents(loop, position), reason, wait)
        for callback in loop._on["on_save"]:
            callback(loop, path)
        return path

    def save_now(self, store: Store, name: str | None, position: Position, weights_only: bool) -> Path:
        """What `Loop.save` does."""
        loop = self._loop
        if weights_only:
            tensors, rest = state.model_tensors(unwrapped(loop.model))
            parts = {"tensors": tensors, "documents": {"loop": documents.pack({"model": rest}, "loop", tensors)}}
        else:
            parts = contents(loop, position)
        name = name or f"{'weights' if weights_only else 'step'}-{loop.global_step:09d}"
        path = self._hand_over(store, name, parts, "weights" if weights_only else "asked", wait=True)
        loop.ranks.barrier()
        return path

    def _hand_over(self, store: Store, name: str, parts: dict[str, Any], reason: str, wait: bool) -> Path:
        loop = self._loop
        return store.save(
            name,
            step=loop.global_step,
            metrics=loop._last_metrics if loop._metrics_at == loop.global_step else {},
            reason=reason,
            wait=wait,
            info=self._info(tied=parts["documents"]["loop"]["model"]["shared"]),
            **parts,
        )

    def _info(self, tied: dict[str, str]) -> dict[str, Any]:
        loop = self._loop
        model = unwrapped(loop.model)
        config: Any = getattr(model, "config", None)
        arguments = config.to_dict() if hasattr(config, "to_dict") else getattr(model, "arguments", None)
        return {
            "model": f"{type(model).__module__}.{type(model).__qualname__}",
            "arguments": _plain(arguments),
            "parameters": sum(p.numel() for p in model.parameters()),
            "optimizer": f"{type(loop.optimizer).__module__}.{type(loop.optimizer).__qualname__}",
            "epoch": loop.epoch,
            "precision": loop.precision,
            "strategy": loop.strategy,
            "seed": loop.seed,
            "config": _plain(loop.config),
            "numpy": numpy.__version__,
            "fastloop": __version__,
            "inside_window": loop._window is not None,
            "tied": tied,
        }


def _plain(value: Any) -> Any:
    """`value` as JSON for people to read; what is no JSON by its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def contents(loop: Stateful, position: Position) -> dict[str, Any]:
    """Everything that a resumed run needs, as `Store.save` takes it."""
    model = unwrapped(loop.model)
    tensors, model_rest = state.model_tensors(model)
    optimizer, optimizer_rest = state.optimizer_tensors(model, loop.optimizer)
    tensors |= optimizer
    rank_tensors: dict[str, Any] = {}
    everything = {"model": model_rest, "optimizer": optimizer_rest, **loop._progress_state()}
    return {
        "documents": {"loop": documents.pack(everything, "loop", tensors)},
        "tensors": tensors,
        "rank_documents": {"data": documents.pack(_given(position), "data", rank_tensors)},
        "rank_tensors": rank_tensors,
    }


def _given(position: Position) -> dict[str, Any]:
    """Without what is not there; states that are as when the epoch was begun are not written twice: None is there."""
    start = position.own_start or {}
    own = {
        name: None if name in start and own_state.same(state, start[name]) else state
        for name, state in (position.own or {}).items()
    }
    position = replace(position, own=own or None)  # type: ignore[arg-type]
    return {name: value for name, value in asdict(position).items() if value is not None}


def restore(loop: Stateful, checkpoint: Checkpoint) -> Position:
    """Bring the loop to where the checkpoint was made; returns where it was in its data."""
    model = unwrapped(loop.model)
    everything = state.unpacked(checkpoint, "loop", "loop")
    check_version(everything)
    world, rank = checkpoint.manifest["world_size"], loop.ranks.rank
    position = _position(checkpoint, rank if world == loop.ranks.size else 0)
    if world != loop.ranks.size:  # before anything is loaded: it may not be possible
        position.world = world
        position = position.for_ranks(loop.ranks.size)
        position.world = world
    state.load_model(model, checkpoint, everything["model"])
    state.load_optimizer(model, loop.optimizer, checkpoint, everything["optimizer"])
    loop._load_progress(everything)
    if world == loop.ranks.size:
        return position
    logger.info("%s was made by %d ranks and goes on with %d", checkpoint.path, world, loop.ranks.size)
    random_state.seed_everything((loop.seed or 0) ^ loop.global_step, rank)  # no rank's own states would be right
    return position


def set_aside(folder: Path, ranks: Ranks) -> None:
    """Checkpoints of an earlier run in the same folder stay, under another name: they are no part of this run."""
    if ranks.rank == 0 and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        stem, number = f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}", 1
        while (aside := folder.with_name(f"{stem}-{number}")).exists():
            number += 1
        folder.rename(aside)
    ranks.barrier()


def check_version(state: Mapping[str, Any]) -> None:
    """Raise RuntimeError, before anything is loaded, for a state that another fastloop laid out in another way."""
    if state.get("version") != STATE_VERSION:
        raise RuntimeError(
            f"[Loop] the state is of version {state.get('version')} and this fastloop reads {STATE_VERSION}; go on "
            "with the fastloop that saved it, or take the weights alone: python -m fastloop.loop export"
        )


def _resumable(checkpoint: Checkpoint) -> bool:
    """Not one of weights alone."""
    return checkpoint.manifest["reason"] != "weights"


def _position(checkpoint: Checkpoint, rank: int) -> Position:
    packed = checkpoint.rank_document("data", rank)
    position = Position(**documents.unpack(packed, checkpoint.rank_tensors(rank)))
    for name, written in (position.own or {}).items():
        if written is None:  # as when the epoch was begun
            position.own[name] = position.own_start[name]  # type: ignore[index]
    return position


def find(loop: Stateful, store: Store, resume: str | bool | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint to go on from, the same on every rank.

    Raises:
        FileNotFoundError or a CheckpointError: one was named, and is not there or damaged.
    """
    if resume is False:
        return None
    which = "auto" if resume is True else resume
    found, problem = None, None
    if loop.ranks.rank == 0:
        try:
            found = store.newest(_resumable) if which == "auto" else store.find(which)
        except Exception as error:
            problem = error
    path = loop.ranks.from_first(None if found is None else str(found.path))
    failed = loop.ranks.from_first(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    if failed is not None:
        raise RuntimeError(f"[Loop] rank 0: {failed}")
    return None if path is None else Checkpoint(path, verified=True)
