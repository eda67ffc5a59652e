# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics over a whole loader, each sample counted once however many processes share the work."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastloop.loop.data import END, Feed, Position, samples_in, sliced
from fastloop.loop.loader import distributed_sampler
from fastloop.loop.strategy import Ranks, unwrapped
from fastloop.loop.update import weighted
from fastloop.optim.base import FusedOptimizer

LossFunction = Callable[[nn.Module, Any], Any]


class Supervised:
    """A loss_fn from a criterion such as `torch.nn.CrossEntropyLoss()`: batches are (input, target).

    criterion(model(input), target), and in evaluation the accuracy where targets are classes. Cross entropy weighs as
    many targets as are not ignored (in training the sum of their class weights), other criteria as many samples.

    Args:
        criterion: with reduction="mean", or without any `reduction`.
        together: the losses of several batches make one gradient, and so have to be weighted exactly.

    Raises:
        ValueError: reduction="sum" or "none".
    """

    def __init__(self, criterion: nn.Module, together: bool = True) -> None:
        reduction = getattr(criterion, "reduction", "mean")
        if reduction in ("sum", "none"):
            raise ValueError(
                f'[Loop] a criterion must have reduction="mean", got {reduction!r}: the loop weights the means of '
                "batches so that they add up to the one large batch; for sums write a loop of your own with "
                'backward(loss, weight, reduction="sum")'
            )
        self.criterion = criterion
        self._together = together
        self._of_classes = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss))

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        try:
            inputs, target = batch
        except (TypeError, ValueError):
            raise TypeError(
                f"[Loop] a criterion as loss_fn needs batches of (input, target), got {type(batch).__name__}; pass a "
                "function loss_fn(model, batch)"
            ) from None
        output = model(inputs)
        loss = self.criterion(output, target)
        classes = not target.is_floating_point() and output.dim() == target.dim() + 1
        if model.training:
            exactly = self._of_classes and classes and (self._together or target.dim() > 1)
            return (loss, {}, self._weight(target)) if exactly else loss
        if not classes:
            return loss
        right = output.argmax(dim=1) == target
        if not self._of_classes:
            return loss, {"accuracy": right.double().mean()}
        counted = target != self.criterion.ignore_index
        count = counted.sum()
        return loss, {"accuracy": (right & counted).sum().double() / count}, count

    def _weight(self, target: Tensor) -> Tensor:
        """What the criterion has divided its sum by."""
        criterion: Any = self.criterion
        counted = target != criterion.ignore_index
        if criterion.weight is None:
            return counted.sum()
        # Not by a mask, whose length a GPU would have to be asked for.
        return cast(Tensor, (criterion.weight[target.masked_fill(~counted, 0)] * counted).sum())


def parts(result: Any, default_weight: float) -> tuple[Tensor, Mapping[str, Any], Any]:
    """Loss, metrics and weight of what loss_fn returned.

    Raises:
        TypeError: something else.
    """
    if isinstance(result, Tensor):
        return result, {}, default_weight
    if isinstance(result, tuple) and 2 <= len(result) <= 3 and isinstance(result[0], Tensor):
        metrics = result[1] or {}
        if isinstance(metrics, Mapping):
            return result[0], metrics, result[2] if len(result) == 3 else default_weight
    raise TypeError(
        "[Loop] loss_fn(model, batch) must return loss, (loss, metrics) or (loss, metrics, weight) with a loss tensor "
        f"and metrics by name, got {type(result).__name__}"
    )


class Interrupted(Exception):
    """The run is to stop, in the middle of an evaluation."""


def evaluate(
    model: nn.Module,
    loss_fn: LossFunction,
    loader: Any,
    ranks: Ranks,
    autocast: Callable[[], AbstractContextManager[Any]],
    channels_last: bool,
    to_stop: Callable[[], bool] | None = None,
) -> dict[str, float]:
    """Mean loss and metrics over the loader, weighted by samples (or by loss_fn's weight), over all ranks.

    In eval mode and without gradients; each module's mode is restored.

    Raises:
        ValueError: a loader without any batch.
        Interrupted: `to_stop`, asked before each batch, has said so.
    """
    sharded = model is not unwrapped(model) or ranks.size == 1
    called = unwrapped(model) if sharded else model  # DDP's own forward sends buffers around, and wants equal counts
    feed = Feed(loader, ranks, channels_last)
    ranks.same_buffers(model)
    sums: dict[str, Any] = {}
    total: Any = 0.0
    with eval_mode(model), torch.no_grad():
        for batch, repeated in _batches(feed, ranks, equal_counts=not sharded):
            if to_stop is not None and to_stop():
                feed.close()
                raise Interrupted
            with autocast():
                loss, metrics, weight = parts(loss_fn(called, batch), float(samples_in(batch)))
            if repeated:
                continue
            total = total + weight
            for name, value in {**metrics, "loss": loss}.items():
                value = value.detach().double() if isinstance(value, Tensor) else float(value)
                sums[name] = sums.get(name, 0.0) + weighted(value, weight)
    names = ranks.names_of_first(sorted(sums))
    values = [
        torch.as_tensor(v, dtype=torch.float64, device=ranks.device)
        for v in (total, *(sums.get(n, 0.0) for n in names))
    ]
    summed = ranks.sum(torch.stack(values)).tolist()
    if not summed[0]:
        raise ValueError("[Loop] evaluate: the loader gave no batch, or batches of weight 0")
    return {name: value / summed[0] for name, value in zip(names, summed[1:], strict=True)}


def _batches(feed: Feed, ranks: Ranks, equal_counts: bool) -> Iterator[tuple[Any, bool]]:
    """Batches without the samples that DistributedSampler repeats, and whether a whole batch is only a repetition."""
    repeated = _repeated_samples(feed.loader, ranks)
    length = feed.length()
    if equal_counts and ranks.largest(float(length is None)):
        raise ValueError(
            "[Loop] evaluate under fsdp2 needs a loader with a length on every rank, since each forward is a "
            "collective; give the data set a __len__"
        )
    feed.begin(Position())
    count = int(ranks.largest(float(length or 0))) if equal_counts else 0
    done = 0
    while (batch := feed.next()) is not END:
        done += 1
        if repeated and done == length:
            size = samples_in(batch)
            if size <= repeated:
                yield batch, True
                continue
            batch = sliced(batch, 0, size - repeated)
        yield batch, False
    for _ in range(count - done):
        yield feed.repeated(), True
    feed.close()


def _repeated_samples(loader: Any, ranks: Ranks) -> int:
    """How many samples at the end of this rank's share other ranks have too."""
    sampler = distributed_sampler(loader)
    if sampler is None or sampler.drop_last or getattr(loader.batch_sampler, "drop_last", False):
        return 0
    whole = len(sampler.dataset)  # type: ignore[arg-type]
    places = range(sampler.rank, sampler.total_size, sampler.num_replicas)
    return sum(1 for place in places[-(ranks.size + 1) :] if place >= whole)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Each module's mode is put back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_ema(optimizer: torch.optim.Optimizer, wanted: bool) -> None:
    """Raise RuntimeError where moving averages are wanted of an optimizer that keeps none."""
    if wanted and all(group.get("ema_decay") is None for group in optimizer.param_groups):
        raise RuntimeError(
            f"[Loop] evaluate_ema=True, or ema=True: {type(optimizer).__name__} keeps no moving average; use an "
            "optimizer of fastloop with ema_decay=, e.g. 0.999"
        )


def ema_of(optimizer: torch.optim.Optimizer, wanted: bool) -> AbstractContextManager[None]:
    """With the optimizer's moving averages in the model.

    Raises:
        RuntimeError: an optimizer that keeps none.
    """
    check_ema(optimizer, wanted)
    return cast(FusedOptimizer, optimizer).ema_weights() if wanted else nullcontext()
