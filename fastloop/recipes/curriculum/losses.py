# SPDX-License-Identifier: Apache-2.0
"""The loss of each example, once and again during a training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fastloop.loop import random_state
from fastloop.loop.data import samples_in, sliced
from fastloop.loop.evaluate import Supervised, parts
from fastloop.loop.loader import generators_of, iterate, rebuilt
from fastloop.loop.probe import device_of, eval_mode, moved
from fastloop.loop.strategy import Ranks, unwrapped
from fastloop.recipes.curriculum.samplers import ByLoss

Losses = Callable[[nn.Module, Any], Tensor]  # of a batch: fp64 [samples]


def example_losses(model: nn.Module, loss_fn: Any, dataset: Any, *, batch_size: int = 256) -> Tensor:
    """The loss that each example has as a batch of its own, in eval mode and without gradients.

    A criterion with a `reduction` is asked for the losses of a batch at once; of one without, and of a function, which
    give a batch's mean, each example is a forward of its own. A function may return a loss [samples] in evaluation,
    which is taken as it is.

    Args:
        model: its modes, the random states and the loader's generators are put back.
        loss_fn: as `Loop` takes it.
        dataset: map-style; or a DataLoader, whose data set, collate_fn and workers are taken, in the data set's order.
            Without augmentation, or the losses are those of one draw of it.
        batch_size: examples of a forward.

    Returns:
        fp64 [examples], on the CPU. Not finite where the loss is not.

    Raises:
        TypeError: a data set without an index, or a loss_fn that is neither criterion nor function.
        ValueError: an empty data set, or a batch_size below 1.
    """
    model = unwrapped(model)
    return _losses(model, _by_example(loss_fn), dataset, batch_size, range(_size(dataset)), device_of(model)).cpu()


class UpdateLosses:
    """A callback: after an epoch the sampler gets the losses that the model has now.

        loop = fastloop.Loop(model, optimizer, criterion, callbacks=[UpdateLosses(sampler, dataset)])

    The ranks share the examples, and all get all losses. A loss that is not finite leaves the example's earlier one
    where it was, with a warning. The losses are the sampler's state, and so in the checkpoint of that epoch.

    Args:
        sampler: `LossCurriculum` or `HardExamples`, of the training's DataLoader.
        dataset: the examples, as for `example_losses`.
        every_epochs: epochs between two updates.
        batch_size: examples of a forward, on each rank.

    Raises:
        TypeError: a sampler without losses.
        ValueError: a data set of another size than the sampler's, or a number below 1.
    """

    def __init__(self, sampler: ByLoss, dataset: Any, *, every_epochs: int = 1, batch_size: int = 256) -> None:
        if not isinstance(sampler, ByLoss):
            raise TypeError(
                f"[curriculum] sampler must go by losses, as LossCurriculum and HardExamples do, got "
                f"{type(sampler).__name__}"
            )
        if _size(dataset) != len(sampler.losses):
            raise ValueError(
                f"[curriculum] dataset must have the sampler's {len(sampler.losses)} examples, got {_size(dataset)}; "
                "pass the one that the losses are of"
            )
        self.sampler, self.dataset = sampler, dataset
        self.every_epochs = _positive("every_epochs", every_epochs)
        self.batch_size = _positive("batch_size", batch_size)

    def on_epoch_end(self, loop: Any) -> None:
        """Called by `Loop`."""
        if loop.epoch % self.every_epochs:
            return
        losses = self._shared(loop)
        wrong = ~losses.isfinite()
        if wrong.any():
            warnings.warn(
                f"[curriculum] after epoch {loop.epoch} the losses of {int(wrong.sum())} of {len(losses)} examples are "
                f"not finite, the first at index {int(wrong.nonzero()[0])}: these keep their earlier ones",
                stacklevel=2,
            )
            losses = torch.where(wrong, self.sampler.losses, losses)
        self.sampler.update(losses)

    def _shared(self, loop: Any) -> Tensor:
        """The losses of all examples, each computed by one rank."""
        ranks: Ranks = loop.ranks
        count = _size(self.dataset)
        # Under FSDP2 a forward is a collective, so all ranks make as many; DDP's own would send buffers around.
        model = unwrapped(loop.model)
        ranks.same_buffers(model)
        own = [(ranks.rank + i * ranks.size) % count for i in range(-(-count // ranks.size))]
        found = _losses(
            model, _by_example(loop.loss_fn), self.dataset, self.batch_size, own, ranks.device, loop.autocast
        )
        whole = torch.zeros(count, dtype=torch.float64, device=ranks.device)
        real = len(range(ranks.rank, count, ranks.size))  # what is left was added so that ranks have equal numbers
        whole[own[:real]] = found[:real]
        return ranks.sum(whole).cpu()


# ---- one pass


def _losses(
    model: nn.Module,
    losses: Losses,
    dataset: Any,
    batch_size: int,
    indices: Any,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Of the examples `indices`, in that order, on the device."""
    loader = _loader(dataset, indices, _positive("batch_size", batch_size))
    generators = generators_of(dataset)
    kept = random_state.capture(generators)
    try:
        with eval_mode(model):
            found = []
            for batch in iterate(loader):
                with autocast():
                    found.append(losses(model, moved(batch, device)))
    finally:
        random_state.restore(kept, generators)
    return torch.cat(found)


def _loader(dataset: Any, indices: Any, batch_size: int) -> DataLoader[Any]:
    batches: Any = BatchSampler(indices, batch_size, False)
    if isinstance(dataset, DataLoader):
        return rebuilt(dataset, batches)
    return DataLoader(dataset, batch_sampler=batches)


def _size(dataset: Any) -> int:
    data = dataset.dataset if isinstance(dataset, DataLoader) else dataset
    if isinstance(data, IterableDataset) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"[curriculum] dataset must be map-style, with __len__ and __getitem__, got {type(data).__name__}; a loss "
            "belongs to an index"
        )
    if len(data) == 0:
        raise ValueError("[curriculum] dataset must have examples, got an empty one")
    return len(data)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"[curriculum] {name} must be an integer of at least 1, got {value!r}")
    return value


# ---- the losses of a batch


def _by_example(loss_fn: Any) -> Losses:
    """A function that gives the losses of a batch's examples, each as of a batch of its own."""
    if isinstance(loss_fn, nn.Module):
        loss_fn = Supervised(loss_fn)
    if not callable(loss_fn):
        raise TypeError(f"[curriculum] loss_fn must be a criterion or a function of (model, batch), got {loss_fn!r}")
    if isinstance(loss_fn, Supervised) and getattr(loss_fn.criterion, "reduction", None) in ("mean", "batchmean"):
        return _OfCriterion(loss_fn)

    def losses(model: nn.Module, batch: Any) -> Tensor:
        return torch.cat(list(_one_by_one(model, loss_fn, batch)))

    return losses


def _one_by_one(model: nn.Module, loss_fn: Any, batch: Any) -> Iterator[Tensor]:
    size = samples_in(batch)
    whole = None if isinstance(loss_fn, Supervised) else _unreduced(loss_fn(model, batch), size)
    if whole is not None:
        yield whole
        return
    for i in range(size):
        loss, _, _ = parts(loss_fn(model, sliced(batch, i, i + 1)), 1.0)
        yield loss.double().reshape(1)


def _unreduced(result: Any, size: int) -> Tensor | None:
    """The losses that a function has returned for each example, if it has."""
    loss = parts(result, 1.0)[0]
    return loss.double() if loss.dim() == 1 and loss.shape[0] == size else None


class _OfCriterion:
    """criterion(model(input), target), not reduced over the batch.

    As of a batch of one: cross entropy is the sum over the sum of its targets' weights, those of torch that average
    over elements are means over an example's own, and "batchmean" is the sum.
    """

    def __init__(self, supervised: Supervised) -> None:
        self._mean = supervised
        given: Any = supervised.criterion
        self._reduction = given.reduction
        self._criterion = copy.copy(given)
        self._criterion.reduction = "none"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            return torch.cat(list(_one_by_one(model, self._mean, batch)))  # raises, and says what it wants
        inputs, target = batch
        output = model(inputs)
        losses = self._criterion(output, target)
        if not isinstance(losses, Tensor) or losses.dim() == 0 or losses.shape[0] != samples_in(batch):
            return torch.cat(list(_one_by_one(model, self._mean, batch)))  # it reduces all the same
        sums = losses.double().flatten(1).sum(1) if losses.dim() > 1 else losses.double()
        if self._reduction == "batchmean":
            return sums
        return sums / self._weights(output, target, losses)

    def _weights(self, output: Tensor, target: Tensor, losses: Tensor) -> Any:
        """What the criterion divides the sum of an example by."""
        criterion = self._criterion
        classes = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) and not target.is_floating_point()
        if not classes:
            return losses[0].numel()
        counted = target != criterion.ignore_index
        if criterion.weight is None:
            weights = counted.double()
        else:
            weights = criterion.weight.double()[target.masked_fill(~counted, 0)] * counted
        return weights.flatten(1).sum(1) if weights.dim() > 1 else weights
