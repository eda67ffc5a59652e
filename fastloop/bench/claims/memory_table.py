# SPDX-License-Identifier: Apache-2.0
"""The memory table of ResNet-50: weights, activations of 32 images, Adam's states, and their sum.

Weights and states come from a model and an optimizer that has stepped; activations are what a forward saves for its
backward (saved-tensor hooks), at 2 and at 4 images, carried on to 32: they grow with each image by the same bytes.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import nn

from fastloop.bench.checks import WrongResult
from fastloop.bench.claims import resnet
from fastloop.bench.claims.record import Claim, Finding, Here, Verdict, about, both, gigabytes
from fastloop.bench.memory import resident_bytes, tensors_in
from fastloop.tune.parts import extrapolated, saved_bytes

PARAMETERS = 25_557_032
BATCH = 32
COPIES = 2 * PARAMETERS  # bytes of the weights in bf16, which autocast makes and the backward needs
GB, MB = 1e9, 1e6
CLAIMED_ACTIVATIONS = {"fp32": 8 * GB, "bf16": 4 * GB}
EXACT = 0.05  # what is claimed without a tilde may be off by its rounding


def activations(precision: str, batch: int = BATCH, side: int = 224) -> int:
    """Bytes that the forward of `batch` images saves, under autocast if `precision` is "bf16"."""
    model = resnet.ResNet50()
    if sum(p.numel() for p in model.parameters()) != PARAMETERS:
        raise WrongResult("[bench claims] this is not ResNet-50: the number of parameters differs")

    def of(count: int) -> int:
        pixels, classes = resnet.images(count, torch.device("cpu"), side)
        known = [pixels, classes, *model.parameters(), *model.buffers()]

        def forward() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
                return nn.functional.cross_entropy(model(pixels).float(), classes)

        return saved_bytes(forward, known)

    return extrapolated(of, batch)


_activations = cache(activations)  # several rows need them


def weights(here: Here) -> Finding:
    """In fp32, and in 16 bits; autocast keeps the former."""
    model = resnet.ResNet50()
    full = resident_bytes(model.parameters())
    half = resident_bytes(model.bfloat16().parameters())
    verdict = both(about(full, 100 * MB, EXACT), about(half, 50 * MB, EXACT))
    note = "autocast keeps the fp32 weights and adds 16-bit copies; only a model that is cast itself has half"
    return Finding(f"{gigabytes(full)}, {gigabytes(half)}", verdict, note, numbers={"fp32": full, "16 bits": half})


@cache
def _states() -> int:
    model = resnet.ResNet50()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return resident_bytes(tensors_in(list(optimizer.state.values())))


def adam(here: Here) -> Finding:
    """Two moments in fp32."""
    states = _states()
    return Finding(gigabytes(states), about(states, 200 * MB, EXACT), numbers={"bytes": states})


def saved(here: Here, precision: str) -> Finding:
    """Activations of 32 images."""
    found, claimed = _activations(precision), CLAIMED_ACTIVATIONS[precision]
    note = f"{gigabytes(found / BATCH)} an image of 224 by 224, from 2 and 4 images"
    return Finding(gigabytes(found), about(found, claimed), note, numbers={"bytes": found})


def _fixed() -> int:
    """Weights and states, as the table sums them up, and the gradients, which it leaves out."""
    return 2 * 4 * PARAMETERS + _states()


def total(here: Here) -> Finding:
    """What the table sums up, and the gradients."""
    full, half = (_fixed() + _activations(precision) for precision in ("fp32", "bf16"))
    verdict = both(about(full, 8.3 * GB), about(half, 4.25 * GB))
    note = f"with {gigabytes(4.0 * PARAMETERS)} of gradients, which the table leaves out; weights in fp32 in both"
    return Finding(f"{gigabytes(full)}, {gigabytes(half)}", verdict, note, numbers={"fp32": full, "bf16": half})


def batch_growth(here: Here) -> Finding:
    """Images that fit under autocast into the memory that 32 take in fp32."""
    images = (_activations("fp32") - COPIES) / ((_activations("bf16") - COPIES) / BATCH)
    growth = images / BATCH
    verdict = Verdict.HOLDS if growth >= 1.9 else Verdict.PARTLY if growth > 1.2 else Verdict.FAILS
    return Finding(
        f"{growth:.2f}x: {images:.0f} images", verdict, "computed from the activations", numbers={"x": growth}
    )


CLAIMS = (
    Claim("resnet50-weights", "ResNet-50's weights, fp32 and 16 bits", "100 MB, 50 MB", weights, on_cpu=True),
    Claim("resnet50-adam", "ResNet-50's Adam states", "200 MB", adam, on_cpu=True),
    Claim("resnet50-activations-fp32", "ResNet-50, batch 32, fp32", "about 8 GB of activations",
          partial(saved, precision="fp32"), on_cpu=True),
    Claim("resnet50-activations-bf16", "ResNet-50, batch 32, 16 bits", "about 4 GB of activations",
          partial(saved, precision="bf16"), on_cpu=True),
    Claim("resnet50-total", "ResNet-50's training, fp32 and 16 bits", "about 8.3 GB, 4.25 GB", total, on_cpu=True),
    Claim("resnet50-batch", "batch in the same memory, 16 bits", "twice as large (32 to 64)", batch_growth,
          on_cpu=True),
)  # fmt: skip
