# SPDX-License-Identifier: Apache-2.0
"""What a save in the background costs the training: steps while a state of 500 MB is written, against steps without.

One training, saved again and again. Each save makes a pair: the mean step while it runs, and that of as many steps
after it. The step that a save begins in also holds the copy of the state; it is compared with a step and a copy.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory, gettempdir
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.bench import checks, env, measure, stats
from fastloop.bench.loop_cases import GROUP, lacking
from fastloop.bench.loops import Batch, Endless, loss_of, our_optimizer
from fastloop.bench.results import Row
from fastloop.bench.runner import SPARE_BYTES, Plan, Progress, record

UNSAVED, COPY = "not-saving", "step-and-copy"
TITLES = {
    UNSAVED: "the same training's steps while nothing is saved",
    COPY: "one such step, and one copy of the state from memory to memory",
}
# A step that begins a save may take as long as a step and a copy do, within what a control may move.
GOALS = {UNSAVED: 1 / 1.05, COPY: 1 / (1 + stats.CONTROL_MOVED)}
PAIRS = 10
FEWEST_PAIRS = 5
WARM_UP = 3
LONGEST_SAVE = 30.0  # seconds; 500 MB take one or two on most disks


class CannotMeasure(Exception):
    """This machine's disk or memory does not hold the case."""


@dataclass(frozen=True)
class Size:
    """Square linear layers. 4 of 3232: 41.8 M parameters, with both moments of AdamW 501 MB."""

    width: int = 3232
    layers: int = 4
    batch: int = 32

    @property
    def elements(self) -> int:
        return self.layers * self.width**2

    @property
    def bytes(self) -> int:
        """Of the state: parameters and both moments in fp32."""
        return 12 * self.elements

    def model(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [nn.Linear(self.width, self.width, bias=False) for _ in range(self.layers)]
            return nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1])

    def data(self) -> Batch:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(self.batch, self.width, generator=generator)
        return inputs, torch.randint(self.width, (self.batch,), generator=generator)


@dataclass
class Cycle:
    """Seconds of the steps around one save: the one that it begins in, those while it runs, and as many after it."""

    first: float
    during: list[float]
    after: list[float]


@dataclass(frozen=True)
class SaveCase:
    """Both rows come from one training; see the module."""

    name: str
    title: str
    threads: int
    goals_count: bool = True
    size: Size = Size()
    pairs: int = PAIRS
    peers: tuple[str, ...] = (UNSAVED, COPY)
    extra_peers: tuple[str, ...] = ()
    small: bool = False

    def run(self, plan: Plan, progress: Progress) -> list[Row]:
        """Measure the rows of `peers`. What was saved is compared, bit for bit, before anything is timed."""
        rows = [self._row(name) for name in self.peers]
        reason = lacking(self.threads, plan) or self._lacking_room()
        if reason is None:
            try:
                with measure.quiet_interpreter(self.threads):
                    self._measure(rows, plan, progress)
            except CannotMeasure as error:
                reason = str(error)
            except checks.WrongResult as error:
                for row in rows:
                    row.status, row.reason = "wrong", str(error)
        if reason is not None:
            for row in rows:
                row.status, row.reason = "skipped", reason
        return rows

    def _row(self, peer: str) -> Row:
        return Row(
            case=self.name,
            peer=peer,
            group=GROUP,
            title=self.title,
            tensors=self.size.layers,
            elements=self.size.elements,
            dtype="float32",
            threads=self.threads,
            goal=GOALS[peer] if self.goals_count else None,
        )

    def _lacking_room(self) -> str | None:
        """The disk holds one checkpoint and the next; memory the state, gradients, the staged and the timed copy."""
        free, needed = shutil.disk_usage(gettempdir()).free, 3 * self.size.bytes
        if free < needed:
            return f"needs {needed / 2**30:.1f} GiB on the disk of temporary files, {free / 2**30:.1f} GiB are free"
        available, needed = env.available_bytes(), 5 * self.size.bytes + SPARE_BYTES
        if available is not None and available < needed:
            return f"needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are available"
        return None

    def _measure(self, rows: list[Row], plan: Plan, progress: Progress) -> None:
        deadline = min(perf_counter() + plan.headline.seconds, plan.deadline)
        progress(f"{self.title}: check", 0)
        stopped, done = "decided", []
        with TemporaryDirectory(prefix="fastloop-bench-") as folder:
            training = Training(self.size, Path(folder))
            with closing(training.cycles()) as cycles:  # closed before the folder is deleted
                for cycle in islice(cycles, self.pairs):
                    done.append(cycle)
                    progress(self.title, len(done))
                    if len(done) >= FEWEST_PAIRS and perf_counter() > deadline:
                        stopped = "deadline"
                        break
            copies = training.copy_seconds(len(done))
        sides = {
            UNSAVED: ([mean(each.after) for each in done], [mean(each.during) for each in done]),
            COPY: ([mean(c.after) + copy for c, copy in zip(done, copies, strict=True)], [c.first for c in done]),
        }
        for row in rows:
            peer, ours = sides[row.peer]
            record(row, measure.Pairs(tuple(peer), tuple(ours), (1, 1), stopped))
            row.cost = stats.difference_interval(row.ours_seconds, row.peer_seconds)


class Training:
    """A training at level 1 that is asked to save again and again, by signal, and that times its own steps."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.folder, self.batch, self.model = folder, size.data(), size.model()
        # A small step, so that a few hundred of them do not learn the batch by heart.
        self.optimizer = our_optimizer(self.model, lr=1e-7)
        self.loop = import_module("fastloop.loop").Loop(
            self.model,
            self.optimizer,
            max_grad_norm=checks.MAX_NORM,
            run_dir=folder,
            resume=False,
            save_every_epochs=None,
            keep_last=1,
            progress=False,
        )

    def cycles(self) -> Generator[Cycle]:
        """One for each save but the first, whose content is checked, and which takes the memory for the copy."""
        with closing(self._steps()) as steps:
            for _ in range(WARM_UP):
                next(steps)
            wanted = [parameter.detach().clone() for parameter in self.model.parameters()]
            path, _ = self._save(steps)
            self._check(path, wanted)
            while True:
                _, times = self._save(steps)
                next(steps)  # old checkpoints are being deleted
                during = times[1:-1] or times[1:] or times  # the last was only partly beside the save
                yield Cycle(times[0], during, [next(steps) for _ in during])

    def _save(self, steps: Iterator[float]) -> tuple[Path, list[float]]:
        """Ask for a save; where it is, and the seconds of the step that it begins in and of those until it is there."""
        path = self.folder / "checkpoints" / f"step-{self.loop.global_step:09d}"
        times: list[float] = []
        signal.raise_signal(signal.SIGUSR1)
        while not path.exists():
            times.append(next(steps))
            if sum(times) > LONGEST_SAVE:
                raise CannotMeasure(f"a save took longer than {LONGEST_SAVE:g} s on the disk of temporary files")
        return path, times

    def _steps(self) -> Generator[float]:
        """Takes steps, each with what comes between it and the one before; yields their seconds."""
        start = perf_counter()
        with closing(self.loop.windows(Endless([self.batch]), epochs=1)) as windows:
            for window in windows:
                for batch in window:
                    self.loop.backward(loss_of(self.loop.model, batch))
                self.loop.step()
                now = perf_counter()
                yield now - start
                start = perf_counter()

    def _check(self, path: Path, wanted: list[Tensor]) -> None:
        """Raise WrongResult unless the checkpoint is whole, and is of the step that it was made at."""
        checkpoint: Any = import_module("fastloop.loop.checkpoint").Checkpoint(path)
        damages = checkpoint.verify()
        got = {f"model.{name}": torch.empty_like(p) for name, p in self.model.named_parameters()}
        checkpoint.load(got)
        if damages or not all(map(torch.equal, got.values(), wanted)):
            raise checks.WrongResult(f"[bench] the checkpoint is not the state it was made of: {damages or 'weights'}")

    def copy_seconds(self, count: int) -> list[float]:
        """Of one copy of the whole state into memory that is there already, so many times."""
        states = self.optimizer.state
        tensors = [each.detach() for each in self.model.parameters()]
        tensors += [states[p][key] for p in self.model.parameters() for key in ("exp_avg", "exp_avg_sq")]
        copies = [tensor.clone() for tensor in tensors]

        def copy() -> None:
            for source, target in zip(tensors, copies, strict=True):
                target.copy_(source)

        return [measure.sample(copy, 1) for _ in range(count + 1)][1:]


CASES: tuple[SaveCase, ...] = (
    SaveCase("loop-save-1t", "training while 500 MB are saved, 1 thread", 1),
    SaveCase("loop-save-2t", "training while 500 MB are saved, 2 threads", 2, goals_count=False),
)
