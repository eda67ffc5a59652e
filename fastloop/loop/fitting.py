# SPDX-License-Identifier: Apache-2.0
"""Level 2: fit, and evaluation."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from fastloop.extras import MissingExtra
from fastloop.loop import evaluate as evaluation
from fastloop.loop import options, random_state
from fastloop.loop.core import Window
from fastloop.loop.curves import plot_curves
from fastloop.loop.forward import forward_backward
from fastloop.loop.loader import set_epoch
from fastloop.loop.metrics import History
from fastloop.loop.microbatch import run_in_parts
from fastloop.loop.running import Running

logger = logging.getLogger("fastloop.loop")


class Fitting(Running):
    """Trains and evaluates by itself, with a loss function."""

    loss_fn: evaluation.LossFunction | None
    _curves: bool
    _check: bool
    _scheduled: bool
    _keep_best: int
    _evaluator: Callable[[], Any] | None

    @property
    def history(self) -> History:
        """By metric, (step, value) of each row logged."""
        return self._reporter.history

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
            RuntimeError: every parameter is frozen.
            CheckFailed: `check=True`, and a check found an error.
            KeyboardInterrupt, SystemExit: after Ctrl-C and SIGTERM, once the run is saved.
        """
        self._check_fit(val_loader, epochs, max_steps, evaluate_every_steps, evaluate_ema)
        if val_loader is not None:
            to_stop = self._to_stop if self.ranks.size == 1 else None  # ranks would have to agree, at each batch
            self._evaluator = lambda: self._evaluate(val_loader, evaluate_ema, "val", to_stop)
            self._evaluate_every = evaluate_every_steps or 0
        self._fitted_with = {"val_loader": val_loader, "evaluate_every_steps": evaluate_every_steps}
        if not self.model.training:  # as models come that were loaded for inference
            self.model.train()
        try:
            with self:
                feed = self._feed_of(train_loader, epochs, max_steps)  # the states of its parts are what callbacks find
                for callback in self._on["on_fit_start"]:
                    callback(self)
                if not any(p.requires_grad for group in self.optimizer.param_groups for p in group["params"]):
                    raise RuntimeError(
                        "[Loop] no parameter of the optimizer requires a gradient; unfreeze what is to be trained"
                    )
                if val_loader is not None:
                    feed.also_keep(val_loader)
                unchecked = self._check
                for window in self._run(train_loader, epochs, max_steps):
                    if unchecked:
                        self._look_first(window, train_loader, val_loader, epochs)
                        unchecked = False
                    self._train(window)
        finally:
            self._evaluator, self._evaluate_every, self._fitted_with = None, 0, None
        for callback in self._on["on_fit_end"]:
            callback(self)
        self._plot()
        return self.history

    def _check_fit(
        self,
        val_loader: Any,
        epochs: int | None = None,
        max_steps: int | None = None,
        evaluate_every_steps: int | None = None,
        evaluate_ema: bool = False,
    ) -> None:
        """Raise for arguments of `fit` that cannot be, before anything is done."""
        if self.loss_fn is None:
            raise ValueError("[Loop] fit needs loss_fn=; pass it to Loop, or use windows() for a loop of your own")
        options.run_length(epochs, max_steps)
        options.positive("evaluate_every_steps", evaluate_every_steps)
        options.flag("evaluate_ema", evaluate_ema)
        if val_loader is None and evaluate_every_steps is not None:
            raise ValueError("[Loop] evaluate_every_steps needs a val_loader")
        if val_loader is None and evaluate_ema:
            raise ValueError("[Loop] evaluate_ema needs a val_loader")
        if val_loader is None and not self._on["on_window"] + self._on["on_epoch_end"]:  # these may evaluate
            if self._stopper is not None:
                raise ValueError("[Loop] patience needs evaluations; pass a val_loader to fit")
            if self._rates.follows_metric:
                raise ValueError(
                    "[Loop] schedule follows a metric and needs evaluations, got no val_loader; pass one to fit, or "
                    "take a schedule of the step"
                )
        evaluation.check_ema(self.optimizer, evaluate_ema)

    def _look_first(self, window: Window, train_loader: Any, val_loader: Any, epochs: int | None) -> None:
        """`check=True`: the checks, on the batch that the first window begins with."""
        from fastloop.checks.run import check_run  # which looks with parts of the loop

        check_run(self, window.first_batch, train_loader, val_loader, epochs)

    def _train(self, window: Window) -> None:
        """Forward and backward of a window's micro-batches, and the step."""
        if self._graphs is not None:
            self._graphs.run(window)
            return
        if self._auto_microbatch:
            run_in_parts(self, window)
        else:
            for batch in window:
                forward_backward(self, batch)
        self.step()

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

    def _evaluate(
        self, loader: Any, ema: bool, name: str | None, to_stop: Callable[[], bool] | None = None
    ) -> dict[str, float]:
        if self.loss_fn is None:
            raise ValueError("[Loop] evaluate needs loss_fn=; pass it to Loop")
        if self._active and self._feed is not None and self._feed.is_stateful(loader):
            raise ValueError("[Loop] the loader is being trained on and keeps its place; evaluate on one of its own")
        self._reporter.take(all_of_them=True)
        # The training goes on as if nothing had been evaluated, whatever the loader draws.
        with self._reporter.throughput.paused(), random_state.unmoved(), evaluation.ema_of(self.optimizer, ema):
            values = evaluation.evaluate(
                self.model, self.loss_fn, loader, self.ranks, self.autocast, self._channels_last, to_stop
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
            self._owes_evaluation = False  # nobody who could pay it: a run that goes on must not pay at a later step
            return
        before = [
            (generator, generator.get_state()) for generator in ([] if self._feed is None else self._feed.generators)
        ]
        earlier = self._evaluated_at, self._owes_evaluation
        self._evaluated_at, self._owes_evaluation = self.global_step, False  # now: a callback of it may save
        try:
            self._evaluator()
        except evaluation.Interrupted:  # as if it had not begun; the run that goes on makes it first
            for generator, state in before:
                generator.set_state(state)
            self._evaluated_at, self._owes_evaluation = earlier[0], True
            self.stop_reason = "a signal" if self._signals.stop is None else self._signals.stop.name
            return
        except BaseException:
            self._evaluated_at, self._owes_evaluation = earlier
            raise
        for metric in self.monitors:
            if metric not in self._last_metrics and metric.partition("/")[0] in ("val", "train", metric):
                raise ValueError(
                    f"[Loop] monitor {metric!r} is none of the metrics {sorted(self._last_metrics)}; name one of them"
                )

    def _to_stop(self) -> bool:
        return self._signals.stop is not None

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
