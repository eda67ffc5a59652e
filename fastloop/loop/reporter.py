# SPDX-License-Identifier: Apache-2.0
"""What becomes of each step's numbers: rows of the log, history, the progress bar, warnings."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray

from fastloop.loop.core import Window
from fastloop.loop.data import Feed
from fastloop.loop.flops import peak_flops
from fastloop.loop.logs import Loggers
from fastloop.loop.metrics import History, Ledger, Outbox, Record
from fastloop.loop.nonfinite import save_batches
from fastloop.loop.progress import Progress
from fastloop.loop.rank_log import RankLog
from fastloop.loop.update import Scalar
from fastloop.loop.usage import PREFIX, Usage
from fastloop.loop.watch import Spikes, Throughput, memory

if TYPE_CHECKING:
    from fastloop.loop.loop import Loop

# Of this machine and not of the training: not in the history.
MACHINE = ("memory/", "samples/", "tokens/", "steps/", PREFIX)
# fp16's scale overflows by design: about every 2000 windows, and at the start once for each factor of 2 by which 65536
# is too large. So many windows in a row are no matter of the scale.
OVERFLOWS = 20
LAST = 2**62  # a step that no row is after, within what TensorBoard counts in

logger = logging.getLogger("fastloop.loop")


class Reporter:
    """Takes the scalars of each window, and makes them known once they are on the host: on a GPU a step late.

    Args:
        loop: whose windows these are.
        loggers: where rows go.
        log_every: windows between two rows.
        progress: as for Loop.
        flops_per_sample: FLOPs of forward and backward of one sample, for "mfu".
        usage: of the machine, for rows; None for none.
    """

    def __init__(
        self,
        loop: Loop,
        loggers: Loggers,
        log_every: int,
        progress: bool | None,
        flops_per_sample: float | None,
        usage: Usage | None = None,
    ) -> None:
        self._loop, self._usage = loop, usage
        self._loggers, self._open = loggers, False
        self._resumed_step: int | None = None
        self._rows = 0  # logged in the whole run
        self._log_every, self._show_progress = log_every, progress
        self._on_device = loop.device.type != "cpu"
        self._outbox = Outbox(loop.device, loop.ranks.size > 1)
        self._fields: dict[str, Any] = {}
        self._news: str | None = None  # for the log of the rank, which is there once a run begins
        self._waited = 0.0
        self.history: History = {}
        self.ledger, self.spikes = Ledger(), Spikes()
        self.overflows = self._overflowed = 0  # windows skipped in a row, and the last one's step
        dtype = torch.float32 if loop.precision == "fp32" else torch.bfloat16
        self.throughput = Throughput(
            flops_per_sample=flops_per_sample, peak=peak_flops(loop.device, dtype), ranks=loop.ranks.size
        )

    # ---- of a run

    def begin(self, feed: Feed, total: int | None) -> None:
        """Before the first window."""
        loop = self._loop
        shown = self._show_progress if loop.ranks.rank == 0 else False
        self._progress = Progress(shown, total=total, initial=loop.global_step)
        self._rank_log = RankLog(loop.run_dir, loop.ranks.rank, self._progress.write if self._progress.active else None)
        if self._news is not None:
            logger.info(self._news)
            self._news = None
        self.open()
        self.throughput.restart()
        self._waited = feed.wait_seconds
        if self._usage is not None:
            self._usage.begin(self._waited)

    def open(self) -> None:
        """Open the loggers; rows of steps that the run has not made, or makes again, are dropped."""
        if not self._open:
            self._loggers.open(self._loop.run_dir, self._resumed_step, self._rows)
            self._open = True

    def end(self, waited: float, failed: bool) -> None:
        """After the last window, or an error; `waited` is the seconds for the loader in all."""
        try:
            if self._usage is not None:
                self._usage.end(waited, failed)  # first: what it warns of is for the log of the rank too
        finally:
            self._progress.close()
            self.close()
            self._rank_log.close()

    def close(self) -> None:
        """Close the loggers, until the next row."""
        if self._open:
            self._open, self._resumed_step = False, self._loop.global_step
            self._loggers.close()

    def sync(self) -> None:
        """Make durable what was logged, before a checkpoint that follows it."""
        self._loggers.sync()

    def resumed(self, step: int, news: str | None = None) -> None:
        """The run goes on from a checkpoint of this step; `news` is logged when it does."""
        self._resumed_step, self._news = step, news

    # ---- of a window

    def stepped(self, window: Window, feed: Feed, lr: float, values: list[Scalar]) -> None:
        """A window is done; `values` are its totals, gradient norm and whether it was skipped."""
        loop = self._loop
        record = Record(loop.global_step, loop.epoch, lr, window.samples, window.tokens, [], window.batches)
        self.throughput.add(window.samples, window.tokens, feed.wait_seconds - self._waited)
        self._waited = feed.wait_seconds
        if self._on_device:
            self._outbox.put(record, values)
        else:
            record.values = values  # type: ignore[assignment]
            self._arrived(record)

    def take(self, all_of_them: bool = False, only_ready: bool = False) -> None:
        """Make known what has come from the device; with `all_of_them` wait for the rest."""
        if self._on_device:
            for record in self._outbox.take(all_of_them, only_ready):
                self._arrived(record)

    def _arrived(self, record: Record) -> None:
        """A window's numbers are on the host."""
        loop, values = self._loop, record.values
        names = loop._metric_names or ()
        if loop.ranks.size > 1:
            rest = 2 + len(names)
            record.samples, record.tokens = int(values[rest]), int(values[rest + 1])
            loop._agreed(values[rest + 2] > 0, values[rest + 3] > 0)
        self.ledger.add(record, names)
        loss = values[1] / values[0] if values[0] else math.nan
        if not values[0]:
            logger.warning("step %d: the window weighs nothing, and nothing was updated", record.step)
        elif values[-1] or not math.isfinite(loss):
            self._not_finite(record, loss)
        elif self.spikes.update(loss):
            logger.warning("step %d: loss %.6g is a spike", record.step, loss)
        self._fields["loss"] = loss
        self._progress.update(record.step, self._fields)
        if record.step % self._log_every == 0:
            self.write(self._row(record))
        for callback in loop._on["on_window"]:
            callback(loop, record)

    def _row(self, record: Record) -> dict[str, Any]:
        usage = {} if self._usage is None else self._usage.row()
        return {
            "step": record.step, "epoch": record.epoch, **self.ledger.row(), "lr": record.lr,
            "spikes": self.spikes.count, **self.throughput.row(), **memory(self._loop.device), **usage,
        }  # fmt: skip

    def write(self, row: dict[str, Any]) -> None:
        """A row for the history, the loggers and the callbacks."""
        for name, value in row.items():
            if name in ("grad_norm", "lr") or ("/" in name and not name.startswith(MACHINE)):
                self.history.setdefault(name, []).append((row["step"], value))
        if self._open:
            self._loggers.log(row)
            self._rows += 1
        else:
            self._append(row)
        for callback in self._loop._on["on_log"]:
            callback(self._loop, row)

    def picture(self, name: str, pixels: NDArray[numpy.uint8]) -> None:
        """A picture for the loggers that take one, also outside of a run."""
        step = self._loop.global_step
        if self._open:
            self._loggers.log_image(name, pixels, step)
        elif self._loggers.take_images:
            with self._outside_of_a_run():
                self._loggers.log_image(name, pixels, step)

    @property
    def takes_config(self) -> bool:
        """Whether a logger wants what the run was configured with."""
        return self._loggers.take_config

    def config(self, config: dict[str, Any]) -> None:
        """What the run was configured with, for the loggers that take it."""
        self._loggers.log_config(config)

    def _append(self, row: dict[str, Any]) -> None:
        """A row outside of a run."""
        new = self._resumed_step is None
        with self._outside_of_a_run():
            self._loggers.log(row)
        if new:
            self._rows += 1

    @contextmanager
    def _outside_of_a_run(self) -> Iterator[None]:
        """What later steps have logged stays. What comes first in a new run makes the files anew."""
        new = self._resumed_step is None
        self._loggers.open(self._loop.run_dir, None if new else LAST)
        try:
            yield
        finally:
            self._loggers.close()
        if new:
            self._resumed_step = self._loop.global_step

    def _not_finite(self, record: Record, loss: float) -> None:
        loop = self._loop
        self.overflows = self.overflows + 1 if record.step == self._overflowed + 1 else 1
        self._overflowed = record.step
        if loop._update.scaler is not None and math.isfinite(loss) and self.overflows < OVERFLOWS:
            logger.info("step %d: the gradients overflowed at this loss scale, which is lowered", record.step)
            return
        where = None if loop.nonfinite == "skip" else save_batches(loop.run_dir, record, loop.ranks.rank)
        saved = "" if where is None else f"; its batches are in {where}"
        done = "nothing was updated" if record.values[-1] else "the weights were updated"
        text = f"step {record.step}: loss {loss:.6g}, gradient norm {record.values[-2]:.6g}, {done}{saved}"
        if loop.nonfinite == "raise":
            raise FloatingPointError(f"[Loop] {text}")
        logger.warning(text)
        if loop.nonfinite == "stop":
            loop.stop_reason = "nonfinite"

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: a resumed run's rows are those of a run that was never interrupted, but for times."""
        # As arrays: a long run has millions of numbers, and they are packed while the training waits.
        history = {name: numpy.asarray(points, dtype=numpy.float64) for name, points in self.history.items()}
        return {
            "ledger": self.ledger.state_dict(),
            "history": history,
            "spikes": self.spikes.state_dict(),
            "overflows": [self.overflows, self._overflowed],
            "rows": self._rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.ledger.load_state_dict(state["ledger"])
        self.history = {
            name: [(int(step), value) for step, value in points.tolist()] for name, points in state["history"].items()
        }
        self.spikes.load_state_dict(state["spikes"])
        self.overflows, self._overflowed = state["overflows"]
        self._rows = state["rows"]
