# SPDX-License-Identifier: Apache-2.0
"""Data that can be learned, made in memory, to try a model and a loop on before the real ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset

from fastloop.recipes.data.apportion import apportioned
from fastloop.recipes.sampling import generator_of

AREA = "synthetic_data"
SHAPES: dict[str, tuple[int, ...]] = {
    "classification": (20,), "regression": (20,), "images": (3, 32, 32), "sequences": (16,)
}  # fmt: skip


def synthetic_data(
    kind: str = "classification",
    samples: int = 1000,
    *,
    shape: Sequence[int] | None = None,
    classes: int = 2,
    noise: float = 0.1,
    imbalance: float | None = None,
    seed: int = 0,
) -> TensorDataset:
    """Samples with targets that depend on them, but for the noise.

    - "classification": points around one centre for each class, with deviation 1; any shape, by default [20].
    - "regression": x of a normal distribution, y = w.x + noise, with var(w.x) = 1; target [1].
    - "images": in [0, 1], a smooth pattern for each class under pixel noise; [channels, height, width], by default
      [3, 32, 32].
    - "sequences": tokens below `classes` and the same one step ahead: a token follows from the one before; [length],
      by default [16].

    Args:
        samples: how many.
        classes: how many, or the size of the vocabulary; the default for "regression", which has none.
        noise: share of labels (of tokens) that are random, in [0, 1]; for "regression" a standard deviation.
        imbalance: largest class over smallest, at least 1; the classes between fall geometrically. None: all the same.
        seed: torch's own random state is neither read nor changed.

    Raises:
        ValueError: one of these out of range, or given to a kind that has no use for it.
    """
    shape = _checked(kind, samples, shape, classes, noise, imbalance)
    generator = generator_of(seed)
    if kind == "regression":
        x = torch.randn(samples, *shape, generator=generator)
        weight = F.normalize(torch.randn(math.prod(shape), generator=generator), dim=0)
        y = x.flatten(1) @ weight + noise * torch.randn(samples, generator=generator)
        return TensorDataset(x, y[:, None])
    if kind == "sequences":
        tokens = _tokens(samples, shape[0] + 1, classes, noise, generator)
        return TensorDataset(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    labels = _labels(samples, classes, imbalance or 1.0, generator)
    if kind == "images":
        inputs = _images(labels, shape, classes, generator)
    else:
        centres = F.normalize(torch.randn(classes, math.prod(shape), generator=generator), dim=1)
        distance = 4.0  # of a centre from 0: two of them are 4*sqrt(2) deviations apart
        inputs = torch.randn(samples, *shape, generator=generator) + distance * centres[labels].view(-1, *shape)
    return TensorDataset(inputs, _with_noise(labels, noise, generator))


def _checked(
    kind: str, samples: int, shape: Sequence[int] | None, classes: int, noise: float, imbalance: float | None
) -> tuple[int, ...]:
    """The shape of a sample."""
    if kind not in SHAPES:
        raise ValueError(f"[{AREA}] kind must be one of {', '.join(SHAPES)}, got {kind!r}")
    sizes = SHAPES[kind] if shape is None else tuple(shape) if isinstance(shape, Sequence) else ()
    dimensions = {"images": 3, "sequences": 1}.get(kind, len(sizes))
    if not sizes or len(sizes) != dimensions or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"[{AREA}] shape must be sizes of a sample as {SHAPES[kind]}, got {shape!r}")
    if kind == "regression" and classes != 2:
        raise ValueError(f'[{AREA}] classes are not for kind="regression", got {classes}; leave them out')
    least = 1 if kind in ("regression", "sequences") else classes
    if classes < 2 or samples < max(least, 1):
        raise ValueError(
            f"[{AREA}] classes must be at least 2 and samples at least one for each, got {classes} and {samples}"
        )
    if not (noise >= 0 and (noise <= 1 or kind == "regression") and math.isfinite(noise)):
        raise ValueError(f"[{AREA}] noise must lie in [0, 1] (regression: at least 0), got {noise}; pass e.g. 0.1")
    if imbalance is not None and (kind in ("regression", "sequences") or not 1 <= imbalance < math.inf):
        raise ValueError(
            f"[{AREA}] imbalance must be a ratio of at least 1, of kinds with a class for each sample, got {imbalance} "
            f'for kind="{kind}"'
        )
    return sizes


def _labels(samples: int, classes: int, imbalance: float, generator: torch.Generator) -> Tensor:
    counts = numpy.maximum(apportioned(samples, numpy.geomspace(imbalance, 1.0, classes)), 1)
    counts[0] -= counts.sum() - samples
    if counts[0] != counts.max():
        raise ValueError(
            f"[{AREA}] {samples} samples are too few for {classes} classes with imbalance {imbalance}; take more"
        )
    labels = torch.repeat_interleave(torch.arange(classes), torch.from_numpy(counts))
    return labels[torch.randperm(samples, generator=generator)]


def _with_noise(labels: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """A share of them dealt out anew among their samples: random, and each class has as many as before."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(noise * len(labels))]
    noisy = labels.clone()
    noisy[chosen] = labels[chosen[torch.randperm(len(chosen), generator=generator)]]
    return noisy


def _images(labels: Tensor, shape: tuple[int, ...], classes: int, generator: torch.Generator) -> Tensor:
    coarse = torch.randn(classes, shape[0], 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=shape[1:], mode="bilinear", align_corners=False)
    pixels = torch.randn(len(labels), *shape, generator=generator)
    return (0.5 + 0.15 * patterns[labels] + 0.1 * pixels).clamp_(0, 1)


def _tokens(samples: int, length: int, classes: int, noise: float, generator: torch.Generator) -> Tensor:
    """Chains: the next token is next_of[token], or with probability `noise` any."""
    cycle = torch.randperm(classes, generator=generator)
    next_of = torch.empty_like(cycle)
    next_of[cycle] = cycle.roll(-1)  # one cycle through all tokens: none is where chains end
    tokens = torch.randint(classes, (samples, length), generator=generator)
    random = torch.rand(samples, length, generator=generator) < noise
    for place in range(1, length):
        tokens[:, place] = torch.where(random[:, place], tokens[:, place], next_of[tokens[:, place - 1]])
    return tokens
