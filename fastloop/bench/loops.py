# SPDX-License-Identifier: Apache-2.0
"""Whole training loops of one small model: ours, one written by hand, and those of installed frameworks.

All train the same model on the same batches with the same mathematics: cross-entropy, clipping by the global norm and
AdamW, the loss written down every 10 steps. Frameworks run without their progress bars, checkpoints and summaries.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field
from importlib import import_module
from itertools import cycle, pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from fastloop.bench.checks import LR, MAX_NORM
from fastloop.bench.contenders import WEIGHT_DECAY, import_problem

BATCH = 32
WIDTHS = (64, 64, 64, 10)
INPUT_SCALE = 2.5  # brings the gradients' norm to 0.9 .. 1.4: some steps are clipped to 1, some are not
LOG_EVERY = 10
WARM_UP = 10  # steps before the clock starts: states are made, caches filled, a framework's first step is its slowest
AFTER = 2  # steps after it has stopped: a loop that knows the length, or fetches ahead, ends its run untimed

Batch = tuple[Tensor, Tensor]


class Clock(Sampler[int]):
    """Indices in order; notes the time at which the first batch after the warm-up, and the last, are asked for.

    Between the two a loop takes `steps` whole steps, whichever number of batches it fetches ahead. Nobody's set-up
    is in it, and a framework that owns its loop is timed as one written by hand is.
    """

    def __init__(self, steps: int, per_batch: int = 1) -> None:
        self.steps, self.per_batch = steps, per_batch
        self.start = self.stop = 0

    def __len__(self) -> int:
        return (WARM_UP + self.steps + AFTER) * self.per_batch

    def __iter__(self) -> Iterator[int]:
        first, last = WARM_UP * self.per_batch, (WARM_UP + self.steps) * self.per_batch
        for index in range(len(self)):
            if index == first:
                self.start = perf_counter_ns()
            elif index == last:
                self.stop = perf_counter_ns()
            yield index

    @property
    def seconds(self) -> float:
        """Of one step."""
        assert self.stop, "the loop has not come to the end of its batches"
        return (self.stop - self.start) / self.steps * 1e-9


class Ready(Dataset[Batch]):
    """Batches that were made before the clock started: a loader has nothing to collate."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.batches = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        return self.batches[index]


def _only(batches: list[Batch]) -> Batch:
    return batches[0]


@dataclass(frozen=True)
class Endless:
    """A loader of batches that are ready, in turn and without end."""

    batches: Sequence[Batch]

    def __iter__(self) -> Iterator[Batch]:
        return cycle(self.batches)


@dataclass
class Task:
    """One run of one contender: one epoch, each batch one optimizer step. `folder` takes what it writes."""

    steps: int
    ready: bool
    folder: Path
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(self.steps, 1 if self.ready else BATCH)

    @property
    def total(self) -> int:
        """Steps of the whole run, the untimed ones included."""
        return WARM_UP + self.steps + AFTER

    def model(self) -> nn.Sequential:
        """MLP 64-64-64-10, bitwise the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise(WIDTHS):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            return nn.Sequential(*layers[:-1])

    def loader(self) -> DataLoader[Any]:
        """Normal inputs with the class that a random linear map gives them, bitwise the same at every call."""
        generator = torch.Generator().manual_seed(1)
        inputs = INPUT_SCALE * torch.randn(self.total * BATCH, WIDTHS[0], generator=generator)
        targets = (inputs @ torch.randn(WIDTHS[0], WIDTHS[-1], generator=generator)).argmax(dim=1)
        if self.ready:
            # Not `batch_size=None`: Accelerate cannot rebuild a loader without a batch sampler.
            return DataLoader(Ready(inputs, targets), sampler=self.clock, batch_size=1, collate_fn=_only)
        return DataLoader(TensorDataset(inputs, targets), sampler=self.clock, batch_size=BATCH)


@dataclass(frozen=True)
class Loop:
    """One contender: `train` runs a task to its end and returns the trained model.

    exact: it steps with torch's clipping and torch's AdamW, so its weights are those of the loop by hand, bit for bit.
    """

    name: str
    title: str
    train: Callable[[Task], nn.Module]
    exact: bool = True
    package: str | None = None  # what has to be installed
    needs: tuple[str, ...] = ()  # packages that it imports at use, and does not bring itself

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        wanted = () if self.package is None else (self.package, *self.needs)
        return next((problem for problem in map(import_problem, wanted) if problem is not None), None)


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def torch_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY, fused=True)


def our_optimizer(model: nn.Module, **options: Any) -> Any:
    # Through the module's attribute, so that what is measured is what a user's import gets.
    return import_module("fastloop").AdamW(model.parameters(), **{"lr": LR, "weight_decay": WEIGHT_DECAY, **options})


# ---- By hand


def by_hand(task: Task) -> nn.Module:
    """The bare loop: nothing but what training takes."""
    model = task.model()
    optimizer, parameters = torch_optimizer(model), list(model.parameters())
    losses = []
    for step, batch in enumerate(task.loader(), 1):
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            losses.append(loss.item())
    return model


def our_step_by_hand(task: Task) -> nn.Module:
    """Fetch, forward, backward and our step, nothing written down: what is left of a loop that costs nothing."""
    model = task.model()
    optimizer = our_optimizer(model, max_grad_norm=MAX_NORM)
    for batch in task.loader():
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# ---- Ours


class _Terminal(io.StringIO):
    """Takes a progress bar, which is drawn as on a terminal, and shows it to nobody."""

    def isatty(self) -> bool:
        return True


class _Finished(Exception):
    """The run is over, but for a picture of its curves, which takes longer to draw than the run."""


class _NoPicture:
    def on_fit_end(self, loop: Any) -> None:
        raise _Finished


def _our_loop(task: Task, model: nn.Module, *arguments: Any, **options: Any) -> Any:
    return import_module("fastloop.loop").Loop(
        model,
        our_optimizer(model),
        *arguments,
        max_grad_norm=MAX_NORM,
        run_dir=task.folder,
        resume=False,
        save_every_epochs=None,
        log_every=LOG_EVERY,
        progress=True,
        **options,
    )


def our_fit(task: Task) -> nn.Module:
    """Level 2, with clipping, the norm and the loss as metrics, progress, JSONL and CSV."""
    model = task.model()
    with redirect_stderr(_Terminal()), suppress(_Finished):
        _our_loop(task, model, loss_of, callbacks=[_NoPicture()]).fit(task.loader(), epochs=1)
    return model


def our_windows(task: Task) -> nn.Module:
    """Level 1: the same, in a loop of one's own."""
    model = task.model()
    with redirect_stderr(_Terminal()):
        loop = _our_loop(task, model)
        for window in loop.windows(task.loader(), epochs=1):
            for batch in window:
                with loop.autocast():
                    loss = loss_of(loop.model, batch)
                loop.backward(loss)
            loop.step()
    return model


# ---- Frameworks


@contextmanager
def _quiet(*loggers: str) -> Iterator[None]:
    """Without the warnings and greetings of a framework, which a terminal would take time to show."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def fabric(task: Task) -> nn.Module:
    """Lightning Fabric."""
    with _quiet("lightning.fabric"):
        framework = import_module("lightning").Fabric(accelerator="cpu", devices=1)
        module = task.model()
        model, optimizer = framework.setup(module, torch_optimizer(module))
        losses = []
        for step, batch in enumerate(framework.setup_dataloaders(task.loader()), 1):
            loss = loss_of(model, batch)
            framework.backward(loss)
            framework.clip_gradients(model, optimizer, max_norm=MAX_NORM, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            if step % LOG_EVERY == 0:
                losses.append(loss.item())
    return module


def accelerate(task: Task) -> nn.Module:
    """Hugging Face Accelerate."""
    accelerator = import_module("accelerate").Accelerator(cpu=True)
    module = task.model()
    model, optimizer, loader = accelerator.prepare(module, torch_optimizer(module), task.loader())
    losses = []
    for step, batch in enumerate(loader, 1):
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            losses.append(loss.item())
    return module


def lightning(task: Task) -> nn.Module:
    """Lightning Trainer, with its CSV logger."""
    package: Any = import_module("lightning")
    loggers = import_module("lightning.pytorch.loggers")

    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model()

        def training_step(self, batch: Batch, index: int) -> Tensor:
            loss = loss_of(self.model, batch)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch_optimizer(self.model)

    module = Module()
    with _quiet("lightning.pytorch", "lightning.fabric"):
        trainer = package.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=MAX_NORM,
            logger=loggers.CSVLogger(task.folder),
            log_every_n_steps=LOG_EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, task.loader())
    return module.model


def transformers(task: Task) -> nn.Module:
    """transformers.Trainer, its log kept in memory."""
    package: Any = import_module("transformers")

    class Trainer(package.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return self.accelerator.prepare(task.loader())

        def compute_loss(self, model: nn.Module, inputs: Batch, *_: object, **__: object) -> Tensor:
            return loss_of(model, inputs)

    model = task.model()
    arguments = package.TrainingArguments(
        output_dir=str(task.folder),
        use_cpu=True,
        num_train_epochs=1,
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="constant",
        logging_steps=LOG_EVERY,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    with _quiet("transformers"):
        trainer = Trainer(model, arguments, optimizers=(torch_optimizer(model), None))
        trainer.remove_callback(package.PrinterCallback)
        trainer.train()
    return model


BARE, OWN_STEP = "by-hand", "our-step-by-hand"
LOOPS: dict[str, Loop] = {
    loop.name: loop
    for loop in (
        Loop("fit", "fastloop.Loop.fit: clipping, metrics, progress, JSONL and CSV", our_fit, exact=False),
        Loop("windows", "fastloop.Loop.windows, the same", our_windows, exact=False),
        Loop(BARE, "a bare loop by hand, clip_grad_norm_ + AdamW(fused=True)", by_hand),
        Loop(OWN_STEP, "a bare loop by hand, fastloop.AdamW(max_grad_norm)", our_step_by_hand, exact=False),
        Loop("fabric", "Lightning Fabric", fabric, package="lightning"),
        Loop("accelerate", "Hugging Face Accelerate", accelerate, package="accelerate"),
        Loop("lightning", "Lightning Trainer", lightning, package="lightning"),
        Loop("transformers", "transformers.Trainer", transformers, package="transformers", needs=("accelerate",)),
    )
}
