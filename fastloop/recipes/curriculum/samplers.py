# SPDX-License-Identifier: Apache-2.0
"""Samplers that choose the examples of each epoch by how hard they are.

Each says its order by `indices(epoch)` and its length by `length(epoch)`, so that the loop divides it among ranks and
knows the number of windows of the whole run (see `fastloop.loop.shares`). The order is a function of the seed, the
epoch and the losses; the global random generators are neither read nor moved.

    DataLoader(dataset, batch_size=32, sampler=LossCurriculum(losses, epochs=5))

Source: Bengio, Louradour, Collobert and Weston, "Curriculum Learning", ICML 2009.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastloop.recipes.sampling import EpochSampler, generator_of

Numbers = Sequence[float] | Tensor


class ByLoss(EpochSampler):
    """A sampler that goes by a loss of each example, which is its state."""

    def __init__(self, losses: Numbers, seed: int) -> None:
        super().__init__(seed)
        self._losses = _finite("losses", losses)

    @property
    def losses(self) -> Tensor:
        """Of each example: fp64 [examples], on the CPU."""
        return self._losses

    def update(self, losses: Numbers) -> None:
        """Take other losses of the same examples, from the next epoch on.

        Raises:
            ValueError: another number of losses, or one that is not finite.
        """
        new = _finite("losses", losses)
        if len(new) != len(self._losses):
            raise ValueError(
                f"[curriculum] losses must be of the sampler's {len(self._losses)} examples, got {len(new)}; make a "
                "new sampler for another data set"
            )
        self._losses = new

    def state_dict(self) -> dict[str, Any]:
        """The losses, for a checkpoint."""
        return {"losses": self._losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint.

        Raises:
            ValueError: losses of another number of examples.
        """
        self.update(state["losses"])


class LossCurriculum(ByLoss):
    """The easiest part of the examples first, all of them from epoch `epochs` on.

    Epoch e shows the ceil(n * min(1, start + (1 - start) * e / epochs)) examples of the smallest losses, shuffled.

    Args:
        losses: of each example, as `example_losses` gives them, or any other measure of difficulty.
        epochs: the first one that shows all examples.
        start: share of the examples in epoch 0, in (0, 1].
        seed: of the order.

    Raises:
        ValueError: an argument out of range, no losses, or losses that are not finite.
    """

    def __init__(self, losses: Numbers, *, epochs: int, start: float = 0.5, seed: int = 0) -> None:
        super().__init__(losses, seed)
        self.epochs = _whole("epochs", epochs, 1)
        self.start = _share("start", start)
        if self.start == 0.0:
            raise ValueError("[curriculum] start must lie in (0, 1], got 0: epoch 0 would be empty; pass e.g. 0.5")

    def length(self, epoch: int) -> int:
        """Examples of an epoch."""
        share = self.start + (1.0 - self.start) * epoch / self.epochs
        return len(self._losses) if epoch >= self.epochs else _part(len(self._losses), share)

    def indices(self, epoch: int) -> Tensor:
        """The examples of an epoch in order: int64 [length(epoch)]. Of equal losses the first examples are easier."""
        easiest = torch.argsort(self._losses, stable=True)[: self.length(epoch)]
        return _shuffled(easiest, generator_of(self.seed, epoch))


class HardExamples(ByLoss):
    """The hardest part of the examples in each epoch, and some of all others, so that these are not forgotten.

    Epoch e shows the ceil(n * share) examples of the largest losses and, drawn anew without replacement, the
    ceil(m * uniform) of the m others, all shuffled. The model then sees other frequencies than the data have.

    Args:
        losses: of each example; `UpdateLosses` keeps them those of the model as it is.
        share: of the examples that are the hardest, in (0, 1].
        uniform: share of the others, in [0, 1].
        seed: of the draws and of the order.

    Raises:
        ValueError: an argument out of range, no losses, or losses that are not finite.

    Source: Shrivastava, Gupta and Girshick, "Training Region-based Object Detectors with Online Hard Example Mining",
    CVPR 2016, where the choice is made in each batch.
    """

    def __init__(self, losses: Numbers, *, share: float = 0.5, uniform: float = 0.1, seed: int = 0) -> None:
        super().__init__(losses, seed)
        self.share = _share("share", share)
        self.uniform = _share("uniform", uniform)
        if self.share == 0.0:
            raise ValueError(
                "[curriculum] share must lie in (0, 1], got 0: there would be no hard examples; for uniform ones pass "
                "shuffle=True to the DataLoader"
            )

    def length(self, epoch: int) -> int:
        """Examples of an epoch: the same in each."""
        del epoch
        hard = _part(len(self._losses), self.share)
        return hard + _part(len(self._losses) - hard, self.uniform)

    def indices(self, epoch: int) -> Tensor:
        """The examples of an epoch in order: int64 [length(epoch)]."""
        count = _part(len(self._losses), self.share)
        order = torch.argsort(self._losses, descending=True, stable=True)
        hard, others = order[:count], order[count:]
        generator = generator_of(self.seed, epoch)
        drawn = others[torch.randperm(len(others), generator=generator)[: _part(len(others), self.uniform)]]
        return _shuffled(torch.cat([hard, drawn]), generator)


class LengthCurriculum(EpochSampler):
    """Short sequences first: epoch e shows those of at most shortest + (longest - shortest) * min(1, e / epochs).

    Sequences longer than `longest` are never shown.

    Args:
        lengths: of each example, whatever form it has: `[len(text) for text, label in dataset]`,
            `[len(example["input_ids"]) for example in dataset]`.
        epochs: the first one that shows all lengths.
        shortest: largest length of epoch 0.
        longest: largest length from epoch `epochs` on; None for the longest sequence there is.
        seed: of the order.

    Raises:
        ValueError: an argument out of range, no lengths, or no sequence of at most `shortest`.
    """

    def __init__(
        self, lengths: Numbers, *, epochs: int, shortest: float, longest: float | None = None, seed: int = 0
    ) -> None:
        super().__init__(seed)
        self.lengths = _finite("lengths", lengths)
        self.epochs = _whole("epochs", epochs, 1)
        self._sorted = self.lengths.sort().values
        least, most = float(self._sorted[0]), float(self._sorted[-1])
        self.shortest = _number("shortest", shortest)
        self.longest = most if longest is None else _number("longest", longest)
        if shortest < least:
            raise ValueError(
                f"[curriculum] shortest must be at least the smallest length, {least:g}, got {shortest}: epoch 0 would "
                "be empty; pass a length that a good part of the sequences has"
            )
        if self.longest < shortest:
            raise ValueError(
                f"[curriculum] longest must be at least shortest, got {self.longest:g} and {shortest:g}; leave longest "
                "out for the longest sequence there is"
            )

    def bound(self, epoch: int) -> float:
        """The largest length of an epoch."""
        if epoch >= self.epochs:
            return self.longest
        return self.shortest + (self.longest - self.shortest) * epoch / self.epochs

    def length(self, epoch: int) -> int:
        """Examples of an epoch."""
        return int(torch.searchsorted(self._sorted, self.bound(epoch), right=True))

    def indices(self, epoch: int) -> Tensor:
        """The examples of an epoch in order: int64 [length(epoch)]."""
        short = torch.nonzero(self.lengths <= self.bound(epoch)).flatten()
        return _shuffled(short, generator_of(self.seed, epoch))


def _shuffled(chosen: Tensor, generator: torch.Generator) -> Tensor:
    return chosen[torch.randperm(len(chosen), generator=generator)]


# ---- arguments


def _part(count: int, share: float) -> int:
    """ceil(count * share), where rounding of the share makes no example more, and none of a share is empty."""
    return min(count, max(math.ceil(count * share - 1e-9 * count), 1 if share > 0 else 0))


def _finite(name: str, values: Any) -> Tensor:
    """`values` as fp64 [examples], a copy on the CPU."""
    found = torch.as_tensor(values).detach().to("cpu", torch.float64, copy=True)
    if found.dim() != 1 or len(found) == 0:
        raise ValueError(
            f"[curriculum] {name} must be one number for each example, got shape {tuple(found.shape)}; pass e.g. what "
            "example_losses gives"
        )
    wrong = torch.nonzero(~found.isfinite()).flatten()
    if len(wrong):
        raise ValueError(
            f"[curriculum] {name} must be finite, got {len(wrong)} of {len(found)} that are not, the first at index "
            f"{int(wrong[0])}; look at these examples, and leave them out"
        )
    return found


def _whole(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"[curriculum] {name} must be an integer of at least {least}, got {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"[curriculum] {name} must be a length, got {value!r}; pass e.g. 16")
    return float(value)


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise ValueError(f"[curriculum] {name} must lie in [0, 1], got {value!r}; pass e.g. 0.5")
    return float(value)
