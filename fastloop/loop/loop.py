# SPDX-License-Identifier: Apache-2.0
"""Loop: its options, and how it sets up a training once; the rest is in the classes that it is made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastloop.loop import config as config_file
from fastloop.loop import description, graphs, images, options, own_state, random_state, saver
from fastloop.loop import evaluate as evaluation
from fastloop.loop import precision as modes
from fastloop.loop import strategy as distributed
from fastloop.loop.checkpoint import Store
from fastloop.loop.data import Feed, Position
from fastloop.loop.fitting import Fitting
from fastloop.loop.graphs import Graphs
from fastloop.loop.logs import make_loggers
from fastloop.loop.rates import Given, Rates
from fastloop.loop.reporter import Reporter
from fastloop.loop.signals import Signals
from fastloop.loop.update import updater
from fastloop.loop.usage import Usage
from fastloop.loop.watch import EarlyStopping


class Loop(Fitting):
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
        cudnn_benchmark: cuDNN measures its algorithms for each new shape and takes the fastest.
        matmul_precision: "highest", "high" or "medium": of fp32 matrix products, as torch.set_float32_matmul_precision.
        threads: of an operation on the CPU, as torch.set_num_threads. These three are of the whole process, and stay
            after the loop; None leaves them as they are.
        compile: torch.compile, in place.
        cuda_graph: `fit` replays windows of one shape as a CUDA graph; see `fastloop.loop.graphs`.
        channels_last: model and images in that layout.
        activation_checkpointing: patterns of layer names, or n for every n-th block.
        auto_microbatch: `fit` halves the micro-batch where memory runs out, and keeps the window.
        loggers: "jsonl", "csv", "tensorboard", "wandb", "mlflow" or objects with the Logger protocol.
        log_every: windows between two rows.
        system_every_seconds: between two samples of `fastloop.monitor`, which rows get as "system/..."; None for none.
        progress: a progress bar: None on a terminal only, True, False.
        callbacks: objects with methods among `options.EVENTS`, each called with the loop; the states of those with
            `state_dict` and `load_state_dict` are in the checkpoints.
        flops_per_sample: FLOPs of forward and backward of a sample, for "mfu"; see `flops.model_flops`.
        config: anything of JSON, stored in each checkpoint.
        curves: draw run_dir/training_curves.png after `fit`, where matplotlib is installed.
        check: `fit` looks for the usual mistakes before its first window; see `fastloop.checks.preflight`.

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
        cudnn_benchmark: bool | None = None,
        matmul_precision: str | None = None,
        threads: int | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        channels_last: bool = False,
        activation_checkpointing: Sequence[str] | int | None = None,
        auto_microbatch: bool = False,
        loggers: Any = ("jsonl", "csv"),
        log_every: int = 10,
        system_every_seconds: float | None = None,
        progress: bool | None = None,
        callbacks: Iterable[Any] = (),
        flops_per_sample: float | None = None,
        config: Mapping[str, Any] | None = None,
        curves: bool = True,
        check: bool = False,
    ) -> None:
        callbacks = tuple(callbacks)
        self._options = description.kept(locals())
        options.objects(model, optimizer, loss_fn)
        options.positive("accumulation_steps", accumulation_steps)
        options.positive("log_every", log_every)
        options.positive("save_every_steps", save_every_steps)
        options.positive("save_every_epochs", save_every_epochs)
        options.positive("save_every_minutes", save_every_minutes, whole=False)
        options.positive("threads", threads)
        options.positive("max_grad_norm", max_grad_norm, whole=False)
        options.positive("max_grad_value", max_grad_value, whole=False)
        options.positive("system_every_seconds", system_every_seconds, whole=False)
        options.positive("flops_per_sample", flops_per_sample, whole=False)
        options.count("keep_last", keep_last, least=1)
        options.count("keep_best", keep_best, least=0)
        flags = {
            "keep_log_spaced": keep_log_spaced, "deterministic": deterministic, "compile": compile,
            "cuda_graph": cuda_graph, "channels_last": channels_last, "auto_microbatch": auto_microbatch,
            "check": check,
        }  # fmt: skip
        for name, value in flags.items():
            options.flag(name, value)
        options.flag("progress", progress, none=True)
        options.flag("cudnn_benchmark", cudnn_benchmark, none=True)
        options.one_of("nonfinite", nonfinite, options.NONFINITE)
        options.one_of("matmul_precision", matmul_precision, options.MATMUL_PRECISIONS)
        if deterministic and cudnn_benchmark:
            raise ValueError(
                "[Loop] cudnn_benchmark=True may choose another algorithm in each run, which deterministic=True rules "
                "out; leave one of them out"
            )
        if run_dir is None and (save_every_steps or save_every_minutes or resume not in ("auto", False)):
            raise ValueError("[Loop] saving and resuming need a folder; pass run_dir=, e.g. run_dir='runs/a'")
        if auto_microbatch and strategy is not None:
            raise ValueError(
                "[Loop] auto_microbatch=True is for one process: other ranks cannot know what one has run out of"
            )
        self.monitors = options.monitors(monitor, mode)
        self._on, self._callbacks = options.events(callbacks), own_state.of_callbacks(callbacks)
        self.accumulation_steps = accumulation_steps
        self.nonfinite, self.strategy, self.seed, self.config = nonfinite, strategy, seed, config
        self.run_dir = None if run_dir is None else Path(run_dir)
        self._curves, self._check, self._scheduled = curves, check, schedule is not None
        self._compiles = compile
        self._channels_last, self._auto_microbatch = channels_last, auto_microbatch

        place = None if device is None else torch.device(device)
        if deterministic:
            random_state.make_deterministic()  # before anything starts cuBLAS
        modes.set_process(cudnn_benchmark, matmul_precision, threads)
        self.device, self.ranks = distributed.start(strategy, place, model)
        if cuda_graph:
            graphs.check(
                self.device, optimizer, strategy=strategy, auto_microbatch=auto_microbatch,
                activation_checkpointing=activation_checkpointing,
            )  # fmt: skip
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
        self._trained = distributed.trained(self.model)
        self._start_core(update, distributed.gradient_sync(self.model, self.ranks))
        self._keep_batches = self.run_dir is not None and nonfinite != "skip"
        self._rates = Rates(optimizer, schedule, next(iter(self.monitors.values())))

        self._stopper = None if patience is None else EarlyStopping(patience, next(iter(self.monitors.values())))
        self._reporter = Reporter(
            self, make_loggers(loggers, rank=self.ranks.rank), log_every, progress, flops_per_sample,
            None if system_every_seconds is None else Usage(system_every_seconds, self.device),
        )  # fmt: skip
        self._signals = Signals()
        self.stop_reason: str | None = None
        self._save_asked = False
        self._last_metrics: dict[str, float] = {}  # of evaluations at step _metrics_at
        self._metrics_at = -1
        self._active = False  # windows are being handed out
        self._best: dict[str, float] = {}
        self._evaluated_at = -1
        self._owes_evaluation = False
        self._parts = 1
        self._graphs = Graphs(self) if cuda_graph else None
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
            ConfigError: a file that cannot be read, a key that nobody takes or a value that does not fit; it names the
                file, the line and the key.
        """
        return config_file.build(cls, config_file.read(given), model, optimizer, loss_fn, **options).loop

    def requires_grad_changed(self) -> None:
        """Take up that parameters were frozen or unfrozen since the loop was made.

        It is called on each rank, between windows. Under DDP the model is wrapped anew, for what is trained now, and
        `loop.model` is another object; gradients are dropped, communication hooks stay (a state by buckets, as that of
        PowerSGD, does not fit the new ones). With `compile=True` it is compiled anew. Else nothing is done.

        Raises:
            RuntimeError: within a window, `cuda_graph=True`, a DistributedDataParallel that the caller made, or one
                without any parameter that is left to train.
        """
        now = distributed.trained(self.model)
        if now == self._trained:
            return
        if self._graphs is not None:
            raise RuntimeError(
                "[Loop] cuda_graph=True replays the backward of what was trained when it was captured; leave it out to "
                "freeze or unfreeze parameters during the run"
            )
        if self._active and self._window is not None and self._window.losses:
            raise RuntimeError(
                "[Loop] requires_grad_changed() within a window would drop the gradients of its first micro-batches; "
                "call it between windows"
            )
        self.model = distributed.spread_anew(self.model, self.ranks)
        self._trained = now
        if self._compiles:
            modes.compile_in_place(distributed.unwrapped(self.model))
        self._sync_gradients = distributed.gradient_sync(self.model, self.ranks)

    def log_image(self, name: str, image: Any) -> None:
        """Write a picture to `run_dir/images/NAME-STEP.png`, and hand it to each logger that takes pictures.

        Args:
            name: letters, digits and _.=+-, with / between folders.
            image: a tensor [1 or 3, height, width], an array [height, width, 1 or 3], [height, width], or an image of
                PIL; floats in [0, 1] or integers in [0, 255]. Rank 0's is taken.

        Raises:
            ValueError: another name, other dimensions or values.
        """
        images.log_image(self, name, image)

    def log_confusion_matrix(self, name: str, matrix: Any, classes: Sequence[Any] | None = None) -> None:
        """Write a confusion matrix to `run_dir/images/NAME-STEP.json`, and with matplotlib as a picture by `log_image`.

        Args:
            name: as for `log_image`.
            matrix: [classes, classes], counts or shares: true classes in rows, predicted ones in columns.
            classes: their names; None for their numbers.

        Raises:
            ValueError: another name, a matrix that is none, or another number of names.
        """
        images.log_confusion_matrix(self, name, matrix, classes)

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
            modes.compile_in_place(inner)
        return called
