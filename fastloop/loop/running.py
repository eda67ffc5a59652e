# SPDX-License-Identifier: Apache-2.0
"""A run: its windows from where it is to its end, and what is due between them: logs, saves, evaluations, signals."""

from __future__ import annotations

import gc
import logging
import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from fastloop.loop import description, options, random_state
from fastloop.loop.core import Window
from fastloop.loop.data import Feed, Position
from fastloop.loop.signals import Signals
from fastloop.loop.stateful import Stateful
from fastloop.loop.update import Scalar

logger = logging.getLogger("fastloop.loop")
AnyRunning = TypeVar("AnyRunning", bound="Running")
GC_WINDOWS = 50  # between two collections of the youngest garbage; of the next older ones ten times as many


class Running(Stateful):
    """Hands out the windows of a run."""

    _channels_last: bool
    _auto_microbatch: bool
    _signals: Signals
    _save_asked: bool
    _improved: bool  # a monitored metric is better than ever: worth a checkpoint
    _evaluate_every: int  # windows; 0 for after epochs only
    _options: dict[str, Any]  # arguments of Loop, for run.json
    _fitted_with: dict[str, Any] | None = None  # arguments of `fit`, while it runs
    _described_at: float | None = None  # the time of its latest start in run.json

    def _evaluate_now(self) -> None:
        """What `fit` evaluates, unless that has been done at this step."""
        raise NotImplementedError

    def windows(
        self, train_loader: Any, *, epochs: int | None = None, max_steps: int | None = None
    ) -> Iterator[Window]:
        """The windows of the training, from where the run is to its end.

        Args:
            train_loader: a DataLoader, or anything that can be iterated over once for each epoch. Under a strategy, a
                DataLoader that shuffles or goes in order is divided among the ranks.
            epochs: of the whole run, those before a resume included.
            max_steps: windows of the whole run.

        Raises:
            ValueError: no end given, or a loader without any batch.
            RuntimeError: a window left without `step`.
        """
        options.run_length(epochs, max_steps)
        if self._graphs is not None:
            raise ValueError("[Loop] cuda_graph=True needs fit(): a loop of your own runs its Python for each window")
        if self._auto_microbatch:
            raise ValueError(
                "[Loop] auto_microbatch=True needs fit(): in a loop of your own the loop does not see the forward that "
                "ran out of memory"
            )
        return self._run(train_loader, epochs, max_steps)

    def _run(self, train_loader: Any, epochs: int | None, max_steps: int | None) -> Iterator[Window]:
        feed = self._feed_of(train_loader, epochs, max_steps)
        with self._running(feed, epochs, max_steps):
            if not self._goes_on(epochs, max_steps):  # killed at its end: what is left draws from the run's states
                feed.restore_random(self._position)
            if self._owes_evaluation and self._between_epochs:
                self._pay_evaluation(feed)
            while self._goes_on(epochs, max_steps):
                before = self.global_step
                feed.begin(self._position)
                self._between_epochs = False
                if self._owes_evaluation and self._pay_evaluation(feed):
                    break
                yield from self._windows_of_epoch(feed, max_steps)
                if self.stop_reason is not None or (max_steps is not None and self.global_step >= max_steps):
                    break
                if self.global_step == before and feed.batches == 0 and not feed.skip:
                    raise ValueError(f"[Loop] epoch {feed.epoch}: the loader gave no batch")
                self._finish_epoch(feed)
            self._finish(feed)

    def _pay_evaluation(self, feed: Feed) -> bool:
        """The evaluation that a signal has cut short, with the states that it would have had. True ends the run."""
        if self._between_epochs and self._position.now is not None:
            random_state.restore(self._position.now, feed.generators)
        self._evaluate_now()
        if self._between_epochs:
            self._call_at_epoch_end()
            self._position = feed.position_before(self.epoch)
        if self._improved:
            self._saver.save(self._boundary_position(), "best")
            self._improved = False
        return self.stop_reason is not None

    def _goes_on(self, epochs: int | None, max_steps: int | None) -> bool:
        return self._in_time(epochs, max_steps) and self.stop_reason is None

    def _in_time(self, epochs: int | None, max_steps: int | None) -> bool:
        return (epochs is None or self.epoch < epochs) and (max_steps is None or self.global_step < max_steps)

    def _feed_of(self, loader: Any, epochs: int | None, max_steps: int | None) -> Feed:
        """One feed for a loader, so that a second call goes on in the middle of an epoch."""
        if self._feed is None or self._feed._given is not loader:
            if self._feed is not None and self._feed.begun:  # other data: their first epoch begins here
                self._position, self._between_epochs = Position(self.epoch), True
            self._feed = Feed(loader, self.ranks, self._channels_last, self.seed or 0, trains=True)
        goes_on = self._in_time(epochs, max_steps) or (self._owes_evaluation and self._between_epochs)
        if not self._feed.resumed:
            self._feed.resume(self._position, is_over=not goes_on)
        return self._feed

    @contextmanager
    def _running(self, feed: Feed, epochs: int | None, max_steps: int | None) -> Iterator[None]:
        """What holds while windows are handed out: signals, logs, progress, no garbage collection in between."""
        if self._active:
            raise RuntimeError("[Loop] the loop is running already; leave its other windows() first")
        self.stop_reason = self._window = self._metric_names = None
        self._updating = False
        if self._stopper is not None and self._stopper.stop:  # killed before it could end
            self.stop_reason = "patience"
        self._clear_gradients()  # of a window that was left, or of a forward before the loop
        self._started_at = self.global_step
        if self._graphs is not None:
            self._graphs.begin()
        total = self._total_steps(feed, epochs, max_steps)
        self._rates.begin(self.global_step, total)
        self._reporter.begin(feed, total)
        description.begin(self, feed, epochs=epochs, max_steps=max_steps, total_steps=total)
        # What is there now is not looked at again: a full collection would take tenths of a second.
        collects, frozen = gc.isenabled(), gc.get_freeze_count()
        gc.freeze()
        gc.disable()
        ended_by: BaseException | None = None
        self._active = True
        try:
            with self._signals:
                yield
        except BaseException as error:
            ended_by = error
            raise
        finally:
            failed = isinstance(ended_by, Exception)
            if not frozen:
                gc.unfreeze()
            if collects:
                gc.enable()
            with suppress(Exception):  # rows of steps that are done, whatever ended the run
                self._reporter.take(all_of_them=self.ranks.size == 1, only_ready=self.ranks.size > 1)
            if self._graphs is not None:
                self._graphs.end()
            self._active = False
            self._position = self._boundary_position()  # also where the loop was left in the middle
            feed.close()
            if self._saver.store is not None:
                self._saver.store.close(failed)  # a save that failed has been warned about
            description.end(self, ended_by)
            ended_by = None  # it holds this frame, which would hold it
            self._reporter.end(feed.wait_seconds, failed)

    def _total_steps(self, feed: Feed, epochs: int | None, max_steps: int | None) -> int | None:
        """Windows of the whole run, None where nobody knows."""
        totals = [] if max_steps is None else [max_steps]
        enough = math.inf if max_steps is None else max_steps
        windows = None if epochs is None else feed.windows_of(epochs, self.accumulation_steps, enough)
        if windows is not None:
            totals.append(int(self.ranks.largest(windows)))
        return min(totals, default=None)

    # ---- after each window

    def _stepped(self, window: Window, totals: list[Scalar], norm: Scalar, skipped: Scalar) -> None:
        self.global_step += 1
        window._feed.batches_before = window._feed.batches
        lr = self._rates.shown
        self._rates.advance(self.global_step)
        self._updating = False
        self._reporter.stepped(window, window._feed, lr, [*totals, norm, skipped])

    def _agreed(self, stop: bool, save: bool) -> None:
        """What the ranks told each other."""
        if stop and self.stop_reason is None:
            self.stop_reason = "a signal" if self._signals.stop is None else self._signals.stop.name
        self._save_asked = self._save_asked or save

    def _flags(self) -> list[float]:
        stop = self._signals.stop is not None
        return [float(stop), float(self._signals.save or self._saver.minutes_are_over)]

    def _at_boundary(self, feed: Feed) -> bool:
        """Between two windows. True ends the run."""
        self._reporter.take()
        step = self.global_step
        if self.ranks.size == 1:
            if self._signals.stop is not None:
                self.stop_reason = self._signals.stop.name
            self._save_asked = self._signals.save or self._saver.minutes_are_over
        if self._evaluate_every and step % self._evaluate_every == 0:
            self._evaluate_now()
        due = self._saver.due_at(step)
        if due or self._save_asked or self._improved:
            self._reporter.take(all_of_them=True)  # a checkpoint knows all its steps
            self._saver.save(feed.position(), "steps" if due else "best" if self._improved else "asked")
            self._signals.save = self._save_asked = self._improved = False
        if step % GC_WINDOWS == 0:
            gc.collect(1 if step % (10 * GC_WINDOWS) == 0 else 0)
        return self.stop_reason is not None

    # ---- after an epoch, and at the end

    def _finish_epoch(self, feed: Feed) -> None:
        self._reporter.take(all_of_them=True)
        self.epoch = feed.epoch + 1
        self._position, self._between_epochs = Position(self.epoch), True
        self._evaluate_now()
        self._call_at_epoch_end()
        gc.collect()
        if self._saver.due_after(self.epoch):
            self._saver.save(self._position_now(feed), "epoch")
        elif self._improved:
            self._saver.save(self._position_now(feed), "best")
        self._improved = False

    def _call_at_epoch_end(self) -> None:
        """The callbacks, once the epoch's evaluation is there: one that a signal has cut short is owed first."""
        if not self._owes_evaluation:
            for callback in self._on["on_epoch_end"]:
                callback(self)

    def _finish(self, feed: Feed) -> None:
        """The end of the run, or of this part of it."""
        self._reporter.take(all_of_them=True)
        if self.stop_reason in (None, "patience"):
            self._evaluate_now()
        if self.stop_reason in (None, "patience"):
            if self.global_step > self._started_at or self._saver.lacks_final():
                self._saver.save(self._boundary_position(), self.stop_reason or "end", wait=True, folder="final")
        else:
            self._saver.save(self._boundary_position(), self.stop_reason, wait=True)
        self._improved = False
        if self.stop_reason is not None:
            logger.info("stopped at step %d: %s", self.global_step, self.stop_reason)
        stopped = self._signals.stop  # also one that came during the last evaluation and save
        self._signals.answered = stopped is not None
        if stopped == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped is not None or self.stop_reason == "a signal":
            raise SystemExit(128 + (stopped or signal.SIGTERM))

    # ---- errors

    def __enter__(self: AnyRunning) -> AnyRunning:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """After an error: save what there is. A run of one process only; of several, the others may be anywhere."""
        if error is not None:
            description.end(self, error)
        if error is None or isinstance(error, (SystemExit, GeneratorExit)) or self._feed is None:
            return
        stopped_at_boundary = isinstance(error, KeyboardInterrupt) and self.stop_reason is not None
        if stopped_at_boundary or self._saver.store is None or self.global_step == 0:
            return
        if self._updating:
            logger.info("%s: not saved, in the middle of the optimizer's step", type(error).__name__)
            return
        if self._saver.last_step == self.global_step:  # exact, which what is here is not: a window has begun
            return
        if self.ranks.size > 1:
            logger.info("%s: not saved, since other ranks may be anywhere", type(error).__name__)
            return
        try:
            self._saver.save(self._boundary_position(), f"{type(error).__name__}", wait=True)
        except Exception as second:
            logger.warning("after %s the run could not be saved: %s", type(error).__name__, second)
