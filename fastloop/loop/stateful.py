# SPDX-License-Identifier: Apache-2.0
"""A loop's state: what is in it, saving and loading it, between two windows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastloop.loop import own_state, saver
from fastloop.loop import strategy as distributed
from fastloop.loop.checkpoint import Store
from fastloop.loop.core import Core
from fastloop.loop.data import Feed, Position
from fastloop.loop.rates import Rates
from fastloop.loop.reporter import Reporter
from fastloop.loop.state import as_captured
from fastloop.loop.watch import EarlyStopping

if TYPE_CHECKING:
    from fastloop.loop.graphs import Graphs


class Stateful(Core):
    """A core whose state can be saved and loaded; what `Loop` sets up for it."""

    precision: str
    strategy: str | None
    nonfinite: str
    seed: int | None
    device: torch.device
    config: Mapping[str, Any] | None
    run_dir: Path | None
    stop_reason: str | None
    monitors: dict[str, str]  # mode by metric
    _on: dict[str, list[Any]]  # callbacks by event
    _callbacks: own_state.Objects  # those with a state
    _active: bool  # windows are being handed out
    _rates: Rates
    _reporter: Reporter
    _saver: saver.Saver
    _stopper: EarlyStopping | None
    _feed: Feed | None
    _position: Position
    _between_epochs: bool
    _best: dict[str, float]
    _evaluated_at: int  # the step
    _owes_evaluation: bool  # a signal has cut it short
    _last_metrics: dict[str, float]  # of evaluations at step _metrics_at
    _metrics_at: int
    _graphs: Graphs | None
    _parts: int  # of a micro-batch, under auto_microbatch

    # ---- where the run is

    def _position_now(self, feed: Feed) -> Position:
        return feed.position_before(self.epoch) if self._between_epochs else feed.position()

    def _boundary_position(self) -> Position:
        """Where the last whole window ended."""
        if self._feed is None:
            return self._position
        running = self._feed.begun and self._feed._iterator is not None
        if not running and (self._position.now is not None or self._position.skip):
            known = self._position.own or {}  # inside of a window not of all: they may have drawn from its data
            if not known or not self._feed.resumed:  # of another loader's parts
                return self._position
            return replace(self._position, own={**known, **_only(known, self._feed.own() or {})})
        if self._between_epochs:
            return self._position_now(self._feed)
        return self._feed.position_of_last_window()

    # ---- saving and loading

    def save(self, path: str | os.PathLike[str] | None = None, *, weights_only: bool = False) -> Path:
        """Save now, and wait until it is written. Every rank calls it, between two windows.

        Args:
            path: a new folder, or a checkpoint to be replaced; None for the run's own folder of checkpoints.
            weights_only: the model's weights alone, which is what inference needs; not resumable.

        Raises:
            ValueError: no path and no run_dir.
            FileExistsError: there is something else at the path.
            OSError: why it could not be written.
        """
        store, name = self._saver.store, None
        if path is not None:
            target = Path(path)
            if target.exists() and not (target / "manifest.json").is_file() and not _is_empty(target):
                raise FileExistsError(
                    f"[Loop] save() to {target} would replace what is no checkpoint; pass a new folder"
                )
            name, store = (
                target.name,
                Store(target.parent, rank=self.ranks.rank, world_size=self.ranks.size, keep_last=None, owner=False),
            )
        if store is None:
            raise ValueError("[Loop] save() needs a path, since the loop has no run_dir")
        self._reporter.take(all_of_them=True)
        return self._saver.save_now(store, name, self._boundary_position(), weights_only)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint: "latest", "best", "final", a name in run_dir, or a path. Every rank calls it.

        Raises:
            FileNotFoundError, CheckpointError: it is not there, or damaged.
            RuntimeError: it is of another model or optimizer.
        """
        if self._active:
            raise RuntimeError(
                "[Loop] load() while windows are handed out would move the weights and not the data; end the run first"
            )
        store = self._saver.store or Store(
            Path(path).parent, rank=self.ranks.rank, world_size=self.ranks.size, owner=False
        )
        found = saver.find(self, store, os.fspath(path))
        assert found is not None
        self._restore(found)

    def _restore(self, checkpoint: Any) -> None:
        self._reporter.take(all_of_them=True)  # of the run before
        self._position = saver.restore(self, checkpoint)
        self._continue(f"goes on from {checkpoint.path}, step {self.global_step}")

    def _continue(self, news: str) -> None:
        """State and position are loaded: the next run goes on from them."""
        self._feed, self._between_epochs = None, self._position.start is None and not self._position.skip
        if self._graphs is not None:
            self._graphs.begin()
        self._reporter.resumed(self.global_step, news)
        self._saver.last_step = self.global_step

    def state_dict(self) -> dict[str, Any]:
        """Model, optimizer and the loop's own state, for a checkpoint format of your own."""
        self._reporter.take(all_of_them=True)
        return {
            "model": distributed.unwrapped(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loop": {
                **self._progress_state(),
                "position": asdict(self._boundary_position()),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` returned, under the same number of ranks."""
        saver.check_version(state["loop"])
        self._reporter.take(all_of_them=True)
        distributed.unwrapped(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(as_captured(self.optimizer, state["optimizer"]))
        self._load_progress(state["loop"])
        self._position = Position(**state["loop"]["position"])
        self._continue(f"goes on from a state_dict, step {self.global_step}")

    def _progress_state(self) -> dict[str, Any]:
        """The same on every rank."""
        scaler = self._update.scaler
        return {
            "version": saver.STATE_VERSION,
            "global_step": self.global_step,
            "epoch": self.epoch,
            "nominal": self._nominal,
            "schedule": self._rates.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "report": self._reporter.state_dict(),
            "stopper": None if self._stopper is None else self._stopper.state_dict(),
            "best": dict(self._best),
            "evaluated_at": self._evaluated_at,
            "owes_evaluation": self._owes_evaluation,
            "metrics_at": self._metrics_at,
            "last_metrics": dict(self._last_metrics),
            "seed": self.seed,
            "parts": self._parts,
            "callbacks": own_state.capture(self._callbacks),
        }

    def _load_progress(self, state: Mapping[str, Any]) -> None:
        self.global_step, self.epoch = state["global_step"], state["epoch"]
        self._nominal = state["nominal"]
        self._update.settle()
        self._rates.load_state_dict(state["schedule"])
        if self._update.scaler is not None and state["scaler"]:
            self._update.scaler.load_state_dict(state["scaler"])
        self._reporter.load_state_dict(state["report"])
        if self._stopper is not None and state["stopper"]:
            self._stopper.load_state_dict(state["stopper"])
        self._best, self._evaluated_at = dict(state["best"]), state["evaluated_at"]
        self._owes_evaluation = state.get("owes_evaluation", False)
        self._last_metrics, self._metrics_at = dict(state["last_metrics"]), state["metrics_at"]
        self._parts = state["parts"]
        callbacks = state.get("callbacks", {})
        own_state.warn_of_missing(self._callbacks, callbacks, "callback")
        own_state.give(self._callbacks, callbacks)
        self.seed = self.seed if self.seed is not None else state["seed"]


def _only(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name in known}


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
