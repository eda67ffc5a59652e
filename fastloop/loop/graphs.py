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

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastloop.loop.backward import Backward
from fastloop.loop.core import TAKEN, Window
from fastloop.loop.data import map_tensors, samples_in
from fastloop.loop.forward import forward_backward
from fastloop.loop.update import Scalar, _lacks_momentum
from fastloop.optim.base import FusedOptimizer

if TYPE_CHECKING:
    from fastloop.loop.fitting import Fitting

DEVICES = ("cuda",)
WARM_UP = 3  # windows of a shape before it is captured, as torch's notes on CUDA graphs advise
WATCHED = 100  # windows after which few replays are worth a warning
FEW = 10  # replays of a graph: below that its capture was not worth it
WASTED = 3  # such graphs in a row, after which no more are captured

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
        before = torch.cuda.current_stream(self._device)
        # A loader's thread may pin memory meanwhile, which in the default mode would end the capture.
        graph = torch.cuda.graph(self._graph, stream=_side_stream(self._device), capture_error_mode="thread_local")
        try:
            with torch.cuda.device(self._device), graph:
                self._result = function()
        except BaseException:
            torch.cuda.set_stream(before)  # ending a capture that failed raises before torch sets it back
            raise

    def replay(self) -> Any:
        self._graph.replay()
        return self._result


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for warm-up and capture: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """What warms up for a capture must not run on the default stream."""
    main, side = torch.cuda.current_stream(device), _side_stream(device)
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
        self._graph: CudaGraph | None = None
        self._earlier_plans: tuple[Any, ...] = ()  # of a fastloop optimizer: those that graphs of others address
        self.begin()

    def begin(self) -> None:
        """Of a run, or after a load: states and settings may be others, and everything is captured anew."""
        self.end()
        self._wasted = 0  # graphs in a row that were dropped after few replays
        self._lacks_momentum = False
        self.windows = self.replays = 0
        if self._loop.device.type == "cuda":
            _make_capturable(self._loop.optimizer)

    def end(self) -> None:
        """Of a run: the graph goes, and what it has in memory; how often it was replayed stays."""
        self._drop()
        self._batches: list[Any] = []  # that the graph reads
        self._shape: Any = None
        self._settings: Any = None

    def _drop(self) -> None:
        """The graph, and what the optimizer has kept for it."""
        graph, self._graph = self._graph, None
        self._rates: list[Tensor] = []  # that the graph reads
        self._filled: list[Any] = []  # what they hold
        self._seen: dict[Any, int] = {}  # windows by shape, while there is no graph
        self._replays_of_graph = 0
        self._plan: Any = None  # of a fastloop optimizer, which knows the addresses of its states
        self._states: list[Tensor] = []  # whose addresses the graph has
        if graph is None:
            return
        if self._loop.device.type == "cuda":
            with suppress(RuntimeError):  # of a device that is lost; its error is on its way already
                torch.cuda.synchronize(self._loop.device)
        optimizer = self._loop.optimizer
        if isinstance(optimizer, FusedOptimizer):
            optimizer._forget_plan()
            optimizer._captured_plans = self._earlier_plans

    def run(self, window: Window) -> None:
        """Train on a window and step."""
        loop = self._loop
        batches = list(window)
        self.windows += 1
        if self.windows == WATCHED and self.replays < WATCHED // 2 and self._wasted < WASTED:
            logger.warning(
                "cuda_graph=True: only %d of %d windows were replayed, since shapes of batches or settings of the "
                "optimizer change; pad the batches to one shape, or leave cuda_graph out", self.replays, WATCHED,
            )  # fmt: skip
        shape = None if len(batches) < loop.accumulation_steps else _shape(batches)
        if self._graph is not None and not self._holds():
            self._wasted = self._wasted + 1 if self._replays_of_graph < FEW else 0
            if self._wasted == WASTED:
                logger.warning(
                    "cuda_graph=True: settings of the optimizer change every few windows, as the betas do with "
                    "cycle_momentum=True of a scheduler; the run goes on without a graph, leave one of them out"
                )
            self._drop()
        if shape is None or self._wasted >= WASTED or (self._graph is not None and shape != self._shape):
            self._eager(window, batches)
        elif self._graph is None and self._warm(shape) < WARM_UP:
            self._fill_rates()
            with on_side_stream(loop.device):
                result = self._trained(window, batches)
            self._seen[shape] += not self._lacks_momentum
            self._count(window, result)
        else:
            if self._graph is None:
                self._capture(shape, batches)
            self._replay(window, batches)

    def _holds(self) -> bool:
        """Whether the graph is still one of this optimizer: of its settings and of the tensors that it has."""
        optimizer = self._loop.optimizer
        if self._settings != _settings(optimizer):
            return False
        plan = optimizer.__dict__.get("_plan")
        if plan is not None and plan is self._plan:
            return True  # of no other states
        states = _states(optimizer)
        if len(states) != len(self._states) or any(a is not b for a, b in zip(states, self._states, strict=True)):
            return False
        self._plan = plan  # made anew over the same states
        return True

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
        self._batches = [map_tensors(batch, torch.empty_like) for batch in batches]
        self._fill(batches)
        self._fill_rates()
        optimizer = loop.optimizer
        self._earlier_plans = getattr(optimizer, "_captured_plans", ())
        _sync_masters(optimizer)
        graph = CudaGraph(loop.device)
        try:
            graph.capture(self._window)
        except (RuntimeError, TypeError) as error:
            raise RuntimeError(
                f"[Loop] cuda_graph=True: a window cannot be captured ({error.__context__ or error}); what waits for "
                "the device, as .item() does, has to go from the model and loss_fn, or cuda_graph from the options; "
                "then start a new process, since CUDA may be unusable in this one"
            ) from error
        finally:
            loop._window, loop._updating = None, False  # nothing has run on the device
            loop._clear_gradients()
        self._graph, self._shape, self._settings = graph, shape, _settings(optimizer)
        self._plan, self._states = optimizer.__dict__.get("_plan"), _states(optimizer)
        self._seen, self._replays_of_graph = {}, 0

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
        self._lacks_momentum = _lacks_momentum(self._loop.optimizer)
        self._loop._clear_gradients()
        return result

    def _replay(self, window: Window, batches: list[Any]) -> None:
        loop, graph = self._loop, self._graph
        assert graph is not None
        self._fill(batches)
        self._fill_rates()
        _sync_masters(loop.optimizer)
        loop._updating = True
        # The next replay writes over what this one returns, once the outbox has copied it on the same stream.
        self._count(window, graph.replay())
        self.replays += 1
        self._replays_of_graph += 1

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
                self._filled.append(None)
            if lr is not self._rates[i] and (isinstance(lr, Tensor) or lr != self._filled[i]):
                self._rates[i].fill_(lr)
                self._filled[i] = None if isinstance(lr, Tensor) else lr

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


def _states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors of an optimizer whose addresses a graph has."""
    found = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return [*found, *getattr(optimizer, "_device_counts", {}).values()]


def _sync_masters(optimizer: torch.optim.Optimizer) -> None:
    """Master weights follow parameters that somebody wrote, as in a step that Python runs."""
    if isinstance(optimizer, FusedOptimizer) and (optimizer._master_versions is None or optimizer._masters_moved()):
        optimizer._sync_masters()


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
    """In the order in which `map_tensors` finds them."""
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
