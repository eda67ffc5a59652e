# SPDX-License-Identifier: Apache-2.0
"""What the process of one trial of flags does: the present options and others, on the same batches from the same seed.

First 10 windows of each, for the error; then both in turn on one cached batch, for the gain. What holds for the whole
process (threads, precision of matrix products) is switched before each sample.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing.connection import Connection
from time import perf_counter
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastloop import machine
from fastloop.bench.measure import measure_pairs
from fastloop.bench.stats import Interval, median_interval
from fastloop.loop import precision as modes
from fastloop.loop.data import map_tensors
from fastloop.loop.random_state import seed_everything
from fastloop.loop.restore import process_settings
from fastloop.loop.strategy import repeated_blocks
from fastloop.tune.loading import WON, bottleneck
from fastloop.tune.losses import Losses, relative_difference
from fastloop.tune.step import SEED, Steps, first_batches, measure, training

ERROR_WINDOWS = 10
PAIRS = (10, 20, 40)
BATCH_SECONDS = 3.0  # of reading batches for the windows that are compared: fewer batches then, again and again

Spec = Mapping[str, Any]
Options = Mapping[str, Any]
Process = tuple[bool, str, int]  # what holds for the whole process


class Side:
    """The target with some options, and batches that both sides of a comparison have.

    Args:
        spec: of the target, whose schedule is left out: at the beginning of one that has no end rates are almost 0,
            and so would be every difference. options: in place of its present ones.
        before: what holds for the process where the options do not say.
        batches: those of the other side, or how many it has; None: so many as the windows need.
    """

    def __init__(
        self, spec: Spec, options: Options, before: Process, batches: Sequence[Any] | int | None = None
    ) -> None:
        modes.set_process(*before)
        kept = {name: value for name, value in spec["options"].items() if name != "schedule"}
        made = training({**spec, "options": kept}, options)
        self.loop = made.loop
        self._process = process_settings()
        if batches is None:
            batches = first_batches(made.train_loader, ERROR_WINDOWS * self.loop.accumulation_steps, BATCH_SECONDS)
        elif isinstance(batches, int):
            batches = first_batches(made.train_loader, batches)
        self.batches = batches
        self._source = _Cycle(list(batches))
        self._steps = Steps(self.loop, self._source)
        self.samples = 0  # of a window on the cached batch

    def train(self, seed: int = SEED) -> dict[str, Any]:
        """Losses of the first windows, the norm of the parameters after them, seconds, whether random numbers went."""
        modes.set_process(*self._process)
        seed_everything(seed)
        states, heard = _random_states(), Losses(self.loop)
        start = perf_counter()
        for _ in range(ERROR_WINDOWS):
            self._steps.step()
        self._steps.wait()
        seconds = perf_counter() - start
        drew = not all(map(torch.equal, states, _random_states()))
        norms = torch.stack([p.detach().double().norm().cpu() for p in self.loop.model.parameters()])
        losses = list(heard.values)
        heard.close()
        return {"losses": losses, "norm": float(norms.norm()), "seconds": seconds, "drew": drew}

    def hold(self) -> None:
        """From here on one batch, on the device."""
        device = self.loop.device
        self._source.batches = [map_tensors(self._source.batches[0], lambda tensor: tensor.to(device))]
        self._source.next = 0
        self.samples = self._steps.step()

    def sample(self, repetitions: int) -> float:
        """Seconds of a window, over so many in a row."""
        modes.set_process(*self._process)
        self._steps.wait()
        start = perf_counter()
        for _ in range(repetitions):
            self._steps.step()
        self._steps.wait()
        return (perf_counter() - start) / repetitions

    def rates(self, seconds: float) -> list[float]:
        """Samples/s by itself."""
        return measure(self._steps, seconds).rates

    def facts(self) -> dict[str, Any]:
        """What decides which flags there are for this target."""
        model = self.loop.model
        batch = tree_leaves(self._source.batches[0])
        return {
            "device": self.loop.device.type,
            "convolutions": any(isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)) for m in model.modules()),
            "any_convolutions": any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()),
            "images": any(isinstance(t, Tensor) and t.dim() == 4 and t.is_floating_point() for t in batch),
            "blocks": len(repeated_blocks(model)),
            "bf16": self.loop.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False),
            "tf32": self.loop.device.type == "cuda" and torch.cuda.get_device_capability(self.loop.device) >= (8, 0),
            "precision": self.loop.precision,
            "cudnn_benchmark": self._process[0],
            "matmul_precision": self._process[1],
            "threads": self._process[2],
            "cpus": machine.usable_cpus(),
        }

    def close(self) -> None:
        """End the run, and let its memory go."""
        self._steps.close()
        self.batches, self._source.batches = [], []


class _Cycle:
    """Some batches, over and over."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.next = batches, 0

    def __iter__(self) -> _Cycle:
        return self

    def __next__(self) -> Any:
        batch = self.batches[self.next]
        self.next = (self.next + 1) % len(self.batches)
        return batch


def graphs_compiled() -> int:
    """By torch.compile, in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _random_states() -> list[Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpus]


# ---- trials


def present(spec: Spec, seconds: float) -> dict[str, Any]:
    """The present options: what limits it, what the target is, how far other random numbers move its losses."""
    limits = bottleneck(spec, seconds)
    before = process_settings()
    side = Side(spec, {}, before)
    found, facts = side.train(), side.facts()
    side.close()
    noise = None
    if found["drew"]:
        del side
        other = Side(spec, {}, before)
        noise = relative_difference(found["losses"], other.train(SEED + 1)["losses"])
        other.close()
    return {"limits": limits, "facts": facts, "noise": noise}


def compare(spec: Spec, base: Options, flagged: Options, seconds: float, own_process: bool = False) -> dict[str, Any]:
    """Gain and error of `flagged` over `base`, both on top of the target's present options.

    Args:
        seconds: of taking pairs; at least 5 are taken.
        own_process: the flagged side runs in a process of its own: they cannot be told apart in one.
    """
    with ExitStack() as opened:
        before = process_settings()
        a = Side(spec, base, before)
        opened.callback(a.close)
        ours = a.train()
        b: Side | Remote = (
            Remote(spec, flagged, len(a.batches)) if own_process else Side(spec, flagged, before, a.batches)
        )
        opened.callback(b.close)
        compiled = graphs_compiled()
        theirs = b.train()
        if flagged.get("compile") and not own_process and graphs_compiled() == compiled:
            raise RuntimeError(
                "[tune] torch.compile compiled nothing of this model, so there is no gain to measure; "
                "TORCH_LOGS=graph_breaks shows why"
            )
        sides = (a, b)
        for side in sides:
            side.hold()
        pairs = measure_pairs(
            0, 1, decided=decided, pairs=PAIRS, deadline=perf_counter() + seconds,
            sampler=lambda side, repetitions: sides[side].sample(repetitions),
        )  # fmt: skip
    steady = sorted(pairs.b)[len(pairs.b) // 2]
    return {
        "ratios": list(pairs.ratios),
        "rates": [b.samples / each for each in pairs.b],
        "seconds_base": sorted(pairs.a)[len(pairs.a) // 2],
        "overhead_seconds": max(theirs["seconds"] - ERROR_WINDOWS * steady, 0.0),
        "error": relative_difference(ours["losses"], theirs["losses"]),
        "norm_error": relative_difference([ours["norm"]], [theirs["norm"]]),
    }


def alone(spec: Spec, options: Options, seconds: float) -> dict[str, Any]:
    """Samples/s with these options by themselves, where two do not fit."""
    side = Side(spec, options, process_settings())
    side.hold()
    try:
        return {"rate": asdict(median_interval(side.rates(seconds)))}
    finally:
        side.close()


def decided(gain: Interval) -> bool:
    """Whether more pairs could not change that it wins, or that it does not."""
    return gain.low > WON or gain.high < WON


# ---- a side in a process of its own


class Remote:
    """A `Side` in another process, which waits while it is not asked.

    cuDNN keeps the algorithm that it used first for a shape, whether it was measured or not, for the whole process.
    """

    def __init__(self, spec: Spec, options: Options, batches: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork does not survive CUDA
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, dict(spec), dict(options), batches))
        self._process.start()  # no daemon: its loader may have workers
        other.close()
        self.samples = 0
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def train(self) -> dict[str, Any]:
        return self._ask("train")  # type: ignore[no-any-return]

    def hold(self) -> None:
        self.samples = self._ask("hold")

    def sample(self, repetitions: int) -> float:
        return self._ask("sample", repetitions)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._connection.close()  # it ends when it finds nobody there
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, *request: Any) -> Any:
        self._connection.send(request)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, value = self._connection.recv()
        except EOFError:
            self._process.join(5.0)
            raise RuntimeError(
                f"[tune] the process with the flag on ended with exit code {self._process.exitcode}"
            ) from None
        if kind == "error":
            raise RuntimeError(value)
        return value


def _serve(connection: Connection, spec: Spec, options: Options, batches: int) -> None:
    try:
        side = Side(spec, options, process_settings(), batches)
        connection.send(("made", None))
        while True:
            name, *arguments = connection.recv()
            value = getattr(side, name)(*arguments)
            connection.send((name, side.samples if name == "hold" else value))
    except EOFError:
        return
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))
