# SPDX-License-Identifier: Apache-2.0
"""Loop: sets up a training once, and does around the core's steps what a run needs: log, save, watch, stop."""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.loop import config as config_file
from fastloop.loop import evaluate as evaluation
from fastloop.loop import options, random_state, saver
from fastloop.loop import precision as modes
from fastloop.loop import strategy as distributed
from fastloop.loop.checkpoint import Store
from fastloop.loop.core import Core, Window
from fastloop.loop.curves import plot_curves
from fastloop.loop.data import Feed, Position, samples_in, set_epoch
from fastloop.loop.extras import MissingExtra
from fastloop.loop.logs import make_loggers
from fastloop.loop.metrics import History
from fastloop.loop.microbatch import run_in_parts
from fastloop.loop.rates import Given, Rates
from fastloop.loop.reporter import Reporter
from fastloop.loop.signals import Signals
from fastloop.loop.update import Scalar, updater
from fastloop.loop.watch import EarlyStopping

logger = logging.getLogger("fastloop.loop")
GC_WINDOWS = 50  # between two collections of the youngest garbage; of the next older ones ten times as many


class Loop(Core):
    """A training loop: windows of micro-batches, checkpoints that a run goes on from exactly, logs.

    Args:
        model: trained in place; call `loop.model`, which is where DDP is.
        optimizer: of fastloop or of torch, over the model's parameters.
        loss_fn: `loss_fn(model, batch)` returns loss, (loss, metrics) or (loss, metrics, weight); or a criterion such
            as `torch.nn.CrossEntropyLoss()` for batches of (input, target). Needed by `fit` and `evaluate`.
        precision: "fp32"; "bf16", "fp16": autocast; "bf16-pure": bf16 weights and inputs of the model, fp32 master
            weights in the optimizer; "auto": bf16 where the device has it, else fp16.
        accumulation_steps: micro-batches of a window.
        max_grad_norm, max_grad_value: bounds of the global norm and of each element of the gradient.
        schedule: name, mapping or object of `fastloop.schedules`, a scheduler of torch.optim, or a function of the step
            (its value times the initial learning rate).
        run_dir: folder of checkpoints and logs; None writes nothing.
        resume: "auto": from the newest good checkpoint in run_dir, if any; False; or a checkpoint's name or path.
        save_every_steps, save_every_minutes, save_every_epochs: when to save; None for never.
        keep_last, keep_best, keep_log_spaced: which checkpoints stay.
        monitor, mode: metric, or metrics, whose best checkpoints are kept, and "min" or "max".
        patience: evaluations without a better first monitored metric after which to stop.
        nonfinite: "skip": windows whose gradients are not finite update nothing and are counted; "stop": save and stop;
            "raise": FloatingPointError. The last two save the batch under run_dir/nonfinite.
        strategy: None, "ddp" or "fsdp2", under torchrun.
        device: None: the GPU of this process if there is one.
        seed: of every random generator, in each rank and worker; None leaves them as they are.
        deterministic: torch's deterministic algorithms.
        compile: torch.compile, in place.
        cuda_graph: not built; raises NotImplementedError.
        channels_last: model and images in that layout.
        activation_checkpointing: patterns of layer names, or n for every n-th block.
        auto_microbatch: `fit` halves the micro-batch where memory runs out, and keeps the window.
        loggers: "jsonl", "csv", "tensorboard", "wandb" or objects with the Logger protocol.
        log_every: windows between two rows.
        progress: a progress bar: None on a terminal only, True, False.
        callbacks: objects with methods among `options.EVENTS`, each called with the loop.
        flops_per_sample: FLOPs of forward and backward of a sample, for "mfu"; see `flops.model_flops`.
        config: anything of JSON, stored in each checkpoint.
        curves: draw run_dir/training_curves.png after `fit`, where matplotlib is installed.

    Attributes:
        model, optimizer, global_step (windows done), epoch (epochs finished), run_dir, device, ranks, history,
        stop_reason.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong type.
        RuntimeError: a strategy, a precision or a checkpoint that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: evaluation.LossFunction | nn.Module | None = None,
        *,
        precision: str = "fp32",
        accumulation_steps: int = 1,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        schedule: Given = None,
        run_dir: str | os.PathLike[str] | None = None,
        resume: str | bool | os.PathLike[str] = "auto",
        save_every_steps: int | None = None,
        save_every_minutes: float | None = None,
        save_every_epochs: int | None = 1,
        keep_last: int = 3,
        keep_best: int = 1,
        keep_log_spaced: bool = False,
        monitor: str | Sequence[str] = "val/loss",
        mode: str | Sequence[str] = "min",
        patience: int | None = None,
        nonfinite: str = "skip",
        strategy: str | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        deterministic: bool = False,
        compile: bool = False,
        cuda_graph: bool = False,
        channels_last: bool = False,
        activation_checkpointing: Sequence[str] | int | None = None,
        auto_microbatch: bool = False,
        loggers: Any = ("jsonl", "csv"),
        log_every: int = 10,
        progress: bool | None = None,
        callbacks: Iterable[Any] = (),
        flops_per_sample: float | None = None,
        config: Mapping[str, Any] | None = None,
        curves: bool = True,
    ) -> None:
        options.objects(model, optimizer, loss_fn)
        options.positive("accumulation_steps", accumulation_steps)
        options.positive("log_every", log_every)
        options.positive("save_every_steps", save_every_steps)
        options.positive("save_every_epochs", save_every_epochs)
        options.positive("save_every_minutes", save_every_minutes, whole=False)
        options.positive("max_grad_norm", max_grad_norm, whole=False)
        options.positive("max_grad_value", max_grad_value, whole=False)
        options.positive("flops_per_sample", flops_per_sample, whole=False)
        options.count("keep_last", keep_last, least=1)
        options.count("keep_best", keep_best, least=0)
        flags = {
            "keep_log_spaced": keep_log_spaced, "deterministic": deterministic, "compile": compile,
            "cuda_graph": cuda_graph, "channels_last": channels_last, "auto_microbatch": auto_microbatch,
        }  # fmt: skip
        for name, value in flags.items():
            options.flag(name, value)
        options.flag("progress", progress, none=True)
        options.one_of("nonfinite", nonfinite, options.NONFINITE)
        if run_dir is None and (save_every_steps or save_every_minutes or resume not in ("auto", False)):
            raise ValueError("[Loop] saving and resuming need a folder; pass run_dir=, e.g. run_dir='runs/a'")
        if auto_microbatch and strategy is not None:
            raise ValueError(
                "[Loop] auto_microbatch=True is for one process: other ranks cannot know what one has run out of"
            )
        if cuda_graph:
            raise NotImplementedError("[Loop] cuda_graph=True is not built; use compile=True, and leave cuda_graph out")
        self.monitors = options.monitors(monitor, mode)
        self._on = options.events(callbacks)
        self.accumulation_steps = accumulation_steps
        self.nonfinite, self.strategy, self.seed, self.config = nonfinite, strategy, seed, config
        self.run_dir = None if run_dir is None else Path(run_dir)
        self._curves = curves
        self._channels_last, self._auto_microbatch = channels_last, auto_microbatch

        place = None if device is None else torch.device(device)
        if deterministic:
            random_state.make_deterministic()  # before anything starts cuBLAS
        self.device, self.ranks = distributed.start(strategy, place, model)
        if isinstance(loss_fn, nn.Module):
            together = accumulation_steps > 1 or self.ranks.size > 1
            loss_fn = evaluation.Supervised(loss_fn.to(self.device), together)
        self.loss_fn = loss_fn
        if seed is not None:
            random_state.seed_everything(seed, self.ranks.rank)
        self.precision = modes.resolve(precision, self.device)
        self.optimizer = optimizer
        self.model = self._prepared(model, compile, activation_checkpointing)
        self.autocast = modes.autocast(self.precision, self.device)
        update = updater(optimizer, modes.scaler(self.precision, self.device), max_grad_norm, max_grad_value)
        self._start_core(update, distributed.gradient_sync(self.model) if self.ranks.size > 1 else None)
        self._keep_batches = self.run_dir is not None and nonfinite != "skip"
        self._rates = Rates(optimizer, schedule)

        self._stopper = None if patience is None else EarlyStopping(patience, next(iter(self.monitors.values())))
        self._reporter = Reporter(
            self, make_loggers(loggers, rank=self.ranks.rank), log_every, progress, flops_per_sample
        )
        self._signals = Signals()
        self.stop_reason: str | None = None
        self._save_asked = False
        self._last_metrics: dict[str, float] = {}  # of evaluations at step _metrics_at
        self._metrics_at = -1
        self._active = False  # windows are being handed out
        self._best: dict[str, float] = {}
        self._evaluated_at = -1
        self._parts = 1
        self._evaluator: Callable[[], Any] | None = None
        self._evaluate_every = 0
        self._improved = False  # a monitored metric is better than ever: worth a checkpoint
        self._between_epochs = True
        self._feed: Feed | None = None
        self._position = Position()
        store = None
        if self.run_dir is not None:
            if resume is False:
                saver.set_aside(self.run_dir / "checkpoints", self.ranks)
            store = Store(
                self.run_dir / "checkpoints", rank=self.ranks.rank, world_size=self.ranks.size, keep_last=keep_last,
                keep_best=keep_best, keep_log_spaced=keep_log_spaced, monitors=self.monitors,
            )  # fmt: skip
        self._keep_best = keep_best
        self._saver = saver.Saver(self, store, save_every_steps, save_every_minutes, save_every_epochs)
        if store is not None:
            found = saver.find(self, store, resume)
            if found is not None:
                self._restore(found)

    @property
    def history(self) -> History:
        """By metric, (step, value) of each row logged."""
        return self._reporter.history

    @classmethod
    def from_config(
        cls,
        given: str | os.PathLike[str] | Mapping[str, Any],
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss_fn: evaluation.LossFunction | nn.Module | None = None,
        **options: Any,
    ) -> Loop:
        """A Loop from a TOML or JSON file or a dict, as `fastloop.loop.config` describes it.

        Args:
            given: the config.
            model, optimizer, loss_fn: in place of what the config's target returns.
            options: of Loop, which go before those of the config.

        Raises:
            ConfigError: a key that nobody takes or a value that does not fit; it names file, line and key.
        """
        return config_file.build(cls, config_file.read(given), model, optimizer, loss_fn, **options).loop

    def _prepared(self, model: nn.Module, compile: bool, which: Sequence[str] | int | None) -> nn.Module:
        """The model on its device, in its precision and layout, spread over the ranks."""
        inner = distributed.unwrapped(model)
        if any(p.device != self.device for p in inner.parameters()) and any(self.optimizer.state.values()):
            raise RuntimeError(
                f"[Loop] the model moves to {self.device} and the optimizer has state elsewhere; make the Loop before "
                "the first step, or move the model before the optimizer is made"
            )
        inner.to(self.device)
        if self._channels_last:
            inner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        masters = modes.to_pure_bf16(inner, self.optimizer) if self.precision == "bf16-pure" else {}
        if which is not None:
            modes.checkpoint_activations(inner, which)
        called = distributed.spread(self.strategy, model, self.optimizer, self.ranks)
        modes.give_masters(inner, self.optimizer, masters)
        if compile:
            inner.compile()
        return called

    # ---- level 1

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
        if self._auto_microbatch:
            raise ValueError(
                "[Loop] auto_microbatch=True needs fit(): in a loop of your own the loop does not see the forward that "
                "ran out of memory"
            )
        return self._run(train_loader, epochs, max_steps)

    def _run(self, train_loader: Any, epochs: int | None, max_steps: int | None) -> Iterator[Window]:
        feed = self._feed_of(train_loader)
        with self._running(feed, epochs, max_steps):
            if not self._goes_on(epochs, max_steps):  # killed at its end: what is left draws from the run's states
                feed.restore_random(self._position)
            while self._goes_on(epochs, max_steps):
                before = self.global_step
                feed.begin(self._position)
                self._between_epochs = False
                yield from self._windows_of_epoch(feed, max_steps)
                if self.stop_reason is not None or (max_steps is not None and self.global_step >= max_steps):
                    break
                if self.global_step == before and feed.batches == 0 and not feed.skip:
                    raise ValueError(f"[Loop] epoch {feed.epoch}: the loader gave no batch")
                self._finish_epoch(feed)
            self._finish(feed)

    def _goes_on(self, epochs: int | None, max_steps: int | None) -> bool:
        in_time = (epochs is None or self.epoch < epochs) and (max_steps is None or self.global_step < max_steps)
        return in_time and self.stop_reason is None

    def _feed_of(self, loader: Any) -> Feed:
        """One feed for a loader, so that a second call goes on in the middle of an epoch."""
        if self._feed is None or self._feed._given is not loader:
            if self._feed is not None and self._feed.begun:  # other data: their first epoch begins here
                self._position, self._between_epochs = Position(self.epoch), True
            self._feed = Feed(loader, self.ranks, self._channels_last, self.seed or 0)
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
        total = self._total_steps(feed, epochs, max_steps)
        self._rates.begin(self.global_step, total)
        self._reporter.begin(feed, total)
        # What is there now is not looked at again: a full collection would take tenths of a second.
        collects, frozen = gc.isenabled(), gc.get_freeze_count()
        gc.freeze()
        gc.disable()
        failed = False
        self._active = True
        try:
            with self._signals:
                yield
        except Exception:
            failed = True
            raise
        finally:
            if not frozen:
                gc.unfreeze()
            if collects:
                gc.enable()
            with suppress(Exception):  # rows of steps that are done, whatever ended the run
                self._reporter.take(all_of_them=self.ranks.size == 1, only_ready=self.ranks.size > 1)
            self._active = False
            self._position = self._boundary_position()  # also where the loop was left in the middle
            feed.close()
            if self._saver.store is not None:
                self._saver.store.close(failed)  # a save that failed has been warned about
            self._reporter.end()

    def _total_steps(self, feed: Feed, epochs: int | None, max_steps: int | None) -> int | None:
        """Windows of the whole run, None where nobody knows."""
        totals = [] if max_steps is None else [max_steps]
        length = feed.full_length()
        if epochs is not None and length is not None:
            longest = int(self.ranks.largest(length))
            totals.append(epochs * math.ceil(longest / self.accumulation_steps))
        return min(totals, default=None)

    # ---- after each window

    def _stepped(self, window: Window, totals: list[Scalar], norm: Scalar, skipped: Scalar) -> None:
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
        for callback in self._on["on_epoch_end"]:
            callback(self)
        gc.collect()
        if self._saver.due_after(self.epoch):
            self._saver.save(self._position_now(feed), "epoch")
        elif self._improved:
            self._saver.save(self._position_now(feed), "best")
        self._improved = False

    def _position_now(self, feed: Feed) -> Position:
        return feed.position_before(self.epoch) if self._between_epochs else feed.position()

    def _finish(self, feed: Feed) -> None:
        """The end of the run, or of this part of it."""
        self._reporter.take(all_of_them=True)
        if self.stop_reason in (None, "patience"):
            self._evaluate_now()
            if self.global_step > self._started_at or self._saver.lacks_final():
                self._saver.save(self._boundary_position(), self.stop_reason or "end", wait=True, folder="final")
        else:
            self._saver.save(self._boundary_position(), self.stop_reason, wait=True)
        self._improved = False
        if self.stop_reason is not None:
            logger.info("stopped at step %d: %s", self.global_step, self.stop_reason)
        stopped = self._signals.stop  # also one that came during the last evaluation and save
        self._signals.answered = True
        if stopped == signal.SIGINT:
            raise KeyboardInterrupt
        if stopped is not None or self.stop_reason == "a signal":
            raise SystemExit(128 + (stopped or signal.SIGTERM))

    # ---- level 2

    def fit(
        self,
        train_loader: Any,
        val_loader: Any = None,
        *,
        epochs: int | None = None,
        max_steps: int | None = None,
        evaluate_every_steps: int | None = None,
        evaluate_ema: bool = False,
    ) -> History:
        """Train, from where the run is to its end; evaluate on `val_loader` after each epoch and at the end.

        A model in eval mode is put into train mode; one in train mode keeps the modes of its parts.

        Args:
            train_loader, epochs, max_steps: as for `windows`.
            val_loader: None for no evaluation.
            evaluate_every_steps: evaluate after so many windows too.
            evaluate_ema: with the optimizer's moving averages.

        Returns:
            By metric, (step, value) of each row logged: "train/loss", "val/loss", "lr", ...

        Raises:
            ValueError: no loss_fn, no end, or a loader without any batch.
            KeyboardInterrupt, SystemExit: after Ctrl-C and SIGTERM, once the run is saved.
        """
        if self.loss_fn is None:
            raise ValueError("[Loop] fit needs loss_fn=; pass it to Loop, or use windows() for a loop of your own")
        options.run_length(epochs, max_steps)
        options.positive("evaluate_every_steps", evaluate_every_steps)
        if val_loader is not None:
            self._evaluator = lambda: self._evaluate(val_loader, evaluate_ema, "val")
            self._evaluate_every = evaluate_every_steps or 0
        elif evaluate_every_steps is not None:
            raise ValueError("[Loop] evaluate_every_steps needs a val_loader")
        if self._stopper is not None and val_loader is None and not self._on["on_window"] + self._on["on_epoch_end"]:
            raise ValueError("[Loop] patience needs evaluations; pass a val_loader to fit")
        if not self.model.training:  # as models come that were loaded for inference
            self.model.train()
        try:
            with self:
                for callback in self._on["on_fit_start"]:
                    callback(self)
                if val_loader is not None:
                    self._feed_of(train_loader).also_keep(val_loader)
                train = run_in_parts if self._auto_microbatch else _train_window
                for window in self._run(train_loader, epochs, max_steps):
                    train(self, window)
                    self.step()
        finally:
            self._evaluator, self._evaluate_every = None, 0
        for callback in self._on["on_fit_end"]:
            callback(self)
        self._plot()
        return self.history

    def _plot(self) -> None:
        """training_curves.png, where matplotlib is installed."""
        if not self._curves or self.run_dir is None or self.ranks.rank != 0:
            return
        if not (self.run_dir / "metrics.jsonl").exists():
            return
        try:
            plot_curves(self.run_dir)
        except MissingExtra as error:
            logger.info("no training_curves.png: %s", error)
        except (ValueError, OSError) as error:  # no row yet, say: no reason to lose a training
            logger.warning("no training_curves.png: %s", error)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """After an error: save what there is. A run of one process only; of several, the others may be anywhere."""
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

    def _boundary_position(self) -> Position:
        """Where the last whole window ended."""
        if self._feed is None:
            return self._position
        running = self._feed.begun and self._feed._iterator is not None
        if not running and (self._position.now is not None or self._position.skip):
            return self._position
        if self._between_epochs:
            return self._position_now(self._feed)
        return self._feed.position_of_last_window()

    # ---- evaluation

    def evaluate(self, loader: Any, ema: bool = False, name: str | None = "val") -> dict[str, float]:
        """Mean loss and metrics over `loader`, weighted by samples, over all ranks; a criterion adds the accuracy.

        Args:
            loader: of batches as for `loss_fn`; under a strategy divided among the ranks, each sample counted once.
            ema: with the optimizer's moving averages in the model.
            name: the values are logged as "<name>/loss" and so on, and monitored; None for neither.

        Returns:
            By name, without the prefix.

        Raises:
            ValueError: no loss_fn, or no batch.
            RuntimeError: ema=True with an optimizer that keeps no averages.
        """
        values = self._evaluate(loader, ema, name)
        if self._improved:  # now, while the weights are those that were evaluated
            self._improved = False
            self._saver.save(self._boundary_position(), "best", wait=not self._active)
        return values

    def _evaluate(self, loader: Any, ema: bool, name: str | None) -> dict[str, float]:
        if self.loss_fn is None:
            raise ValueError("[Loop] evaluate needs loss_fn=; pass it to Loop")
        if self._active and self._feed is not None and self._feed.is_stateful(loader):
            raise ValueError("[Loop] the loader is being trained on and keeps its place; evaluate on one of its own")
        self._reporter.take(all_of_them=True)
        # The training goes on as if nothing had been evaluated, whatever the loader draws.
        with self._reporter.throughput.paused(), random_state.unmoved(), evaluation.ema_of(self.optimizer, ema):
            values = evaluation.evaluate(
                self.model, self.loss_fn, loader, self.ranks, self.autocast, self._channels_last
            )
        if self._feed is not None:
            set_epoch(self._feed.loader, self._feed.epoch)  # the data set may be the same
        if name is not None:
            self._evaluated({f"{name}/{key}": value for key, value in values.items()})
        for callback in self._on["on_evaluate"]:
            callback(self, values)
        return values

    def _evaluate_now(self) -> None:
        if self._evaluator is None or self._evaluated_at == self.global_step:
            return
        self._evaluated_at = self.global_step
        self._evaluator()
        for metric in self.monitors:
            if metric not in self._last_metrics and metric.partition("/")[0] in ("val", "train", metric):
                raise ValueError(
                    f"[Loop] monitor {metric!r} is none of the metrics {sorted(self._last_metrics)}; name one of them"
                )

    def _evaluated(self, values: dict[str, float]) -> None:
        earlier = self._last_metrics if self._metrics_at == self.global_step else {}
        self._metrics_at, self._last_metrics = self.global_step, {**earlier, **values}
        self._reporter.write({"step": self.global_step, "epoch": self.epoch, **values})
        for i, (metric, mode) in enumerate(self.monitors.items()):
            if metric not in values:
                if any(metric.partition("/")[0] == name.partition("/")[0] for name in values):
                    raise ValueError(
                        f"[Loop] monitor {metric!r} is none of the metrics {sorted(values)}; name one of them"
                    )
                continue
            value, best = values[metric], self._best.get(metric)
            if math.isfinite(value) and (best is None or (value < best if mode == "min" else value > best)):
                self._best[metric] = value
                self._improved = self._keep_best > 0
            if i == 0:
                self._rates.evaluated(value)
                if self._stopper is not None and self._stopper.update(value):
                    self.stop_reason = "patience"

    # ---- state

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
        self.optimizer.load_state_dict(state["optimizer"])
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
            "metrics_at": self._metrics_at,
            "last_metrics": dict(self._last_metrics),
            "seed": self.seed,
            "parts": self._parts,
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
        self._last_metrics, self._metrics_at = dict(state["last_metrics"]), state["metrics_at"]
        self._parts = state["parts"]
        self.seed = self.seed if self.seed is not None else state["seed"]


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _train_window(loop: Loop, window: Window) -> None:
    """Forward and backward of a window's micro-batches."""
    loss_fn, model = loop.loss_fn, loop.model
    assert loss_fn is not None
    for batch in window:
        with loop.autocast():
            result = loss_fn(model, batch)
        if type(result) is Tensor:
            loop.backward(result)
        else:
            loss, metrics, weight = evaluation.parts(result, samples_in(batch))
            loop.backward(loss, weight, metrics=metrics)
