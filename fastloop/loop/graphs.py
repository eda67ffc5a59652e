# SPDX-License-Identifier: Apache-2.0
"""Whole windows as one CUDA graph: forward, backward, clipping and the optimizer's step, launched by a single call.

The first WARM_UP full windows of one shape run as always, on a stream of their own; the next one is captured, and all
later ones of that shape are replayed: their batches are copied into the buffers that the graph reads, the learning
rates into scalars on the device. Everything else (other shapes, the short last window, evaluation) runs as without a
graph, on the same parameters. Gradients belong to neither: a graph makes its own in its own memory, and `.grad` is None
between windows, so neither sees the other's.

Python runs at the capture alone. What it decides is decided then; what it reads of the host is a constant.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastloop.loop.backward import Backward
from fastloop.loop.core import TAKEN, Window
from fastloop.loop.data import _map, samples_in
from fastloop.loop.forward import forward_backward
from fastloop.loop.update import Scalar
from fastloop.optim.base import FusedOptimizer

if TYPE_CHECKING:
    from fastloop.loop.fitting import Fitting

DEVICES = ("cuda",)
WARM_UP = 3  # windows of a shape before it is captured, as torch's notes on CUDA graphs advise
WATCHED = 100  # windows after which few replays are worth a warning

Result = tuple[list[Scalar], Scalar, Scalar]  # totals, gradient norm, skipped

logger = logging.getLogger("fastloop.loop")


def check(
    device: torch.device,
    optimizer: torch.optim.Optimizer,
    *,
    strategy: str | None,
    auto_microbatch: bool,
    activation_checkpointing: Any,
) -> None:
    """Raise ValueError for what a graph cannot hold."""
    problem = None
    if device.type not in DEVICES:
        problem = f"needs a CUDA device, got {device}"
    elif strategy is not None:
        problem = f'is for one process, got strategy="{strategy}": collectives are not captured'
    elif auto_microbatch:
        problem = "has static batches, which auto_microbatch=True would split; leave one of them out"
    elif activation_checkpointing is not None:
        problem = "cannot read random states while it captures, as activation_checkpointing does; leave one of them out"
    elif isinstance(optimizer, FusedOptimizer):
        if optimizer.defaults.get("error_if_nonfinite"):
            problem = 'cannot ask the device, as error_if_nonfinite=True does; use nonfinite="raise" of Loop'
    elif not (
        getattr(optimizer, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in optimizer.param_groups)
    ):
        problem = (
            f"needs an optimizer that skips a step on the device, and {type(optimizer).__name__} as it is does not; "
            "use one of fastloop, or torch's with fused=True"
        )
    if problem is not None:
        raise ValueError(f"[Loop] cuda_graph=True {problem}")


class CudaGraph:
    """One captured function; replaying it writes anew into the tensors that it returned."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._result: Any = None

    def capture(self, function: Callable[[], Any]) -> None:
        # A loader's thread may pin memory meanwhile, which in the default mode would end the capture.
        with torch.cuda.device(self._device), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._result = function()

    def replay(self) -> Any:
        self._graph.replay()
        return self._result


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """What warms up for a capture must not run on the default stream."""
    main, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        main.wait_stream(side)


class Graphs:
    """Runs the windows of a `fit`: by replay where there is a graph of their shape.

    Args:
        loop: whose windows these are.
    """

    def __init__(self, loop: Fitting) -> None:
        self._loop = loop
        self.begin()

    def begin(self) -> None:
        """Of a run, or after a load: states and settings may be others, and everything is captured anew."""
        self._graph: CudaGraph | None = None
        self._rates: list[Tensor] = []  # that the graph reads
        self._shape: Any = None
        self._batches: list[Any] = []  # that the graph reads
        self._settings: Any = None
        self._seen: dict[Any, int] = {}  # windows by shape, while there is no graph
        self.windows = self.replays = 0
        if self._loop.device.type == "cuda":
            _make_capturable(self._loop.optimizer)

    def run(self, window: Window) -> None:
        """Train on a window and step."""
        loop = self._loop
        batches = list(window)
        self.windows += 1
        if self.windows == WATCHED and self.replays < WATCHED // 2:
            logger.warning(
                "cuda_graph=True: only %d of %d windows were replayed, since shapes of batches or settings of the "
                "optimizer change; pad the batches to one shape, or leave cuda_graph out", self.replays, WATCHED,
            )  # fmt: skip
        shape = None if len(batches) < loop.accumulation_steps else _shape(batches)
        if self._graph is not None and self._settings != _settings(loop.optimizer):
            self._graph, self._rates, self._seen = None, [], {}
        if shape is None or (self._graph is not None and shape != self._shape):
            self._eager(window, batches)
        elif self._graph is None and self._warm(shape) < WARM_UP:
            self._fill_rates()
            with on_side_stream(loop.device):
                result = self._trained(window, batches)
            self._seen[shape] += 1
            self._count(window, result)
        else:
            if self._graph is None:
                self._capture(shape, batches)
            self._replay(window, batches)

    def _warm(self, shape: Any) -> int:
        if len(self._seen) > WATCHED:
            self._seen.clear()
        return self._seen.setdefault(shape, 0)

    def _eager(self, window: Window, batches: list[Any]) -> None:
        self._forward_backward(window, batches)
        self._loop.step()

    def _forward_backward(self, window: Window, batches: list[Any]) -> None:
        for batch in batches:
            self._loop._batch_samples = samples_in(batch)
            window.expect_backward()
            forward_backward(self._loop, batch)

    def _capture(self, shape: Any, batches: list[Any]) -> None:
        loop = self._loop
        self._batches = [_map(batch, torch.empty_like) for batch in batches]
        self._fill(batches)
        self._fill_rates()
        graph = CudaGraph(loop.device)
        try:
            graph.capture(self._window)
        except (RuntimeError, TypeError) as error:
            raise RuntimeError(
                f"[Loop] cuda_graph=True: a window cannot be captured ({error}); what waits for the device, as .item() "
                "does, has to go from the model and loss_fn, or cuda_graph from the options"
            ) from error
        finally:
            loop._window, loop._updating = None, False  # nothing has run on the device
            loop._clear_gradients()
        self._graph, self._shape, self._settings = graph, shape, _settings(loop.optimizer)
        self._seen = {}

    def _window(self) -> Result:
        """What is captured: a window on the static batches, with nothing of the loop's bookkeeping."""
        loop = self._loop
        assert loop._feed is not None
        window = Window(loop, loop._feed, TAKEN, 0)
        eager, loop._backward = loop._backward, Backward()  # it keeps a tensor, which has to be the graph's own
        loop._window = window
        try:
            return self._trained(window, self._batches)
        finally:
            loop._window, loop._backward = None, eager

    def _trained(self, window: Window, batches: list[Any]) -> Result:
        """Forward, backward and update, with the learning rates that the device has."""
        with self._rates_in_groups():
            self._forward_backward(window, batches)
            result = self._loop._update_weights(window)
        self._loop._clear_gradients()
        return result

    def _replay(self, window: Window, batches: list[Any]) -> None:
        loop, graph = self._loop, self._graph
        assert graph is not None
        self._fill(batches)
        self._fill_rates()
        loop._updating = True
        totals, norm, skipped = graph.replay()
        # The next replay writes over them.
        *totals, norm, skipped = [v.clone() if isinstance(v, Tensor) else v for v in (*totals, norm, skipped)]
        self._count(window, (totals, norm, skipped))
        self.replays += 1

    def _count(self, window: Window, result: Result) -> None:
        """What `step` does after the update."""
        self._loop._window = None
        window.stepped = True
        self._loop._stepped(window, *result)

    def _fill(self, batches: list[Any]) -> None:
        for static, batch in zip(_tensors(self._batches), _tensors(batches), strict=True):
            static.copy_(batch, non_blocking=True)

    def _fill_rates(self) -> None:
        """The groups' learning rates into scalars on the device; on the host they stay the numbers that they are."""
        dtype = torch.float64 if isinstance(self._loop.optimizer, FusedOptimizer) else torch.float32
        for i, group in enumerate(self._loop.optimizer.param_groups):
            lr = group["lr"]
            if i == len(self._rates):
                own = isinstance(lr, Tensor) and lr.device == self._loop.device  # the user's: the schedule fills it
                self._rates.append(lr if own else torch.empty((), dtype=dtype, device=self._loop.device))
            if lr is not self._rates[i]:
                self._rates[i].fill_(lr)

    @contextmanager
    def _rates_in_groups(self) -> Iterator[None]:
        groups = self._loop.optimizer.param_groups
        numbers = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, lr in zip(groups, numbers, strict=True):
                group["lr"] = lr


def _make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """Counts of steps on the device, as torch's `capturable=True` has them; also of states that were loaded."""
    if "capturable" not in optimizer.defaults:
        return
    optimizer.defaults["capturable"] = True
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # the warm-up is, on purpose
    for group in optimizer.param_groups:
        group["capturable"] = True
        for p in group["params"]:
            step = optimizer.state.get(p, {}).get("step")
            if isinstance(step, Tensor) and step.device != p.device:
                optimizer.state[p]["step"] = step.to(p.device, torch.float32)
    if isinstance(optimizer, FusedOptimizer):
        optimizer._forget_plan()


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What groups say beside their learning rates: constants of a graph."""
    return [
        {name: _constant(value) for name, value in group.items() if name not in ("lr", "params", "param_names")}
        for group in optimizer.param_groups
    ]


def _constant(value: Any) -> Any:
    if isinstance(value, Tensor):
        return id(value)
    return tuple(map(_constant, value)) if isinstance(value, (list, tuple)) else value


def _tensors(batch: Any) -> Iterator[Tensor]:
    """In the order in which `_map` finds them."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(item)


def _shape(batch: Any) -> Any:
    """What batches of one graph have in common: structure, shapes and dtypes, and all that is no tensor.

    None for what cannot be compared or copied.
    """
    try:
        shape = _parts(batch)
        hash(shape)
    except TypeError:
        return None
    return shape


def _parts(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        if batch.layout != torch.strided:
            raise TypeError
        return batch.shape, batch.dtype
    if isinstance(batch, Mapping):
        return type(batch), tuple((key, _parts(value)) for key, value in batch.items())
    if isinstance(batch, (list, tuple)):
        return type(batch), tuple(_parts(value) for value in batch)
    return batch


__all__ = ["CudaGraph", "Graphs", "check"]
