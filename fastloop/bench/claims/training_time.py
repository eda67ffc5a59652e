# SPDX-License-Identifier: Apache-2.0
"""The table of training times, projected from measured steps:

    time = samples * epochs * FLOP a sample / (FLOP/s of a measured training step)

FLOP a sample are those of matrix products and convolutions, forward and backward, 3 times the forward's. FLOP/s are
measured on ResNet-50 itself and on one transformer block of width 768. What the guides do not say is assumed below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastloop.bench import chargpt
from fastloop.bench.claims import resnet, training
from fastloop.bench.claims.record import Claim, Finding, Here, Verdict
from fastloop.bench.stats import Interval, median_interval

IMAGENET = 1_281_167
OPENWEBTEXT = 9_035_582_198  # GPT-2's tokens
GLUE = 949_733  # examples of the nine training sets
PEAK = 165.2e12  # FLOP/s of an RTX 4090 in 16-bit products with fp32 sums, dense: NVIDIA's data sheet
GPU = "RTX 4090"
HOUR, DAY = 3600.0, 86400.0
SAMPLES = 3  # at least


@dataclass(frozen=True)
class Training:
    """One line of the table. `assumed`: what the guides leave open."""

    name: str
    about: str
    claimed: str
    seconds: float
    samples: int
    epochs: float
    flops: Callable[[], float]  # of one sample, forward and backward
    convolutions: bool
    assumed: str

    @property
    def total(self) -> float:
        return self.samples * self.epochs * self.flops()


def transformer_flops(layers: int, width: int, tokens: int, outputs: int = 0) -> float:
    """FLOP of a training step on one sequence: 6 a weight and token, and attention's two products of tokens².

    outputs: columns of the output layer, which every token goes through.
    """
    weights = 12 * layers * width**2 + width * outputs
    return 6.0 * weights * tokens + 12.0 * layers * width * tokens**2


def counted(step: Callable[[], object]) -> float:
    """FLOP of one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


@cache
def resnet_flops() -> float:
    """Of one image, counted on tensors without data."""
    with torch.device("meta"):
        model, pixels = resnet.ResNet50(), torch.empty(2, 3, 224, 224)
    return counted(lambda: model(pixels).sum().backward()) / 2


def _step(here: Here, convolutions: bool) -> Callable[[], None]:
    """Forward and backward of ResNet-50 or of a block, with bf16 autocast on a GPU."""
    model: nn.Module
    if convolutions:
        model = resnet.ResNet50().to(here.device)
        inputs: Tensor = resnet.images(64 if here.is_gpu else 1, here.device)[0]
    else:
        model = chargpt.Block(chargpt.Size(width=768, heads=12)).to(here.device)
        inputs = torch.randn(32 if here.is_gpu else 1, 256, 768, device=here.device)

    def run() -> None:
        with training.autocast(here, torch.bfloat16 if here.is_gpu else None):
            loss = model(inputs).square().mean()
        loss.backward()

    return run


_rates: dict[tuple[torch.device, bool], Interval] = {}


def rate(here: Here, convolutions: bool) -> Interval:
    """FLOP/s of a training step here, measured once, whatever time later rows have for it."""
    key = here.device, convolutions
    if key not in _rates:
        _rates[key] = _measured_rate(here, convolutions)
    return _rates[key]


def _measured_rate(here: Here, convolutions: bool) -> Interval:
    """The first two steps, counted and warm-up, are left out."""
    step = here.timed(_step(here, convolutions))
    flops = counted(step)
    step()
    rates: list[float] = []
    deadline = perf_counter() + here.seconds
    while len(rates) < SAMPLES or perf_counter() < deadline:
        start = perf_counter()
        step()
        rates.append(flops / (perf_counter() - start))
    return median_interval(rates)


def duration(seconds: float) -> str:
    for unit, length in (("years", 365 * DAY), ("days", 2 * DAY), ("hours", HOUR)):
        if seconds >= length:
            return f"{seconds / (DAY if unit == 'days' else length):.3g} {unit}"
    return f"{seconds / 60:.2g} minutes"


def project(here: Here, of: Training) -> Finding:
    """How long it would take here, and how many FLOP/s the claim needs."""
    found = rate(here, of.convolutions)
    here_seconds, needed = of.total / found.median, of.total / of.seconds
    words = f"projected: {duration(here_seconds)} at {found.median * 1e-9:.3g} GFLOP/s"
    note = (
        f"{of.assumed}: {of.total:.2g} FLOP; the claim needs {needed * 1e-12:.3g} TFLOP/s, {needed / PEAK:.0%} of the "
        f"{GPU}'s peak"
    )
    numbers = {"flop": of.total, "flop/s here": found.median, "flop/s needed": needed, "seconds here": here_seconds}
    return Finding(words, _verdict(here, of, here_seconds, needed), note, found, numbers=numbers)


def _verdict(here: Here, of: Training, seconds: float, needed: float) -> Verdict:
    """More than the peak cannot be; what can be, only the GPU of the claim tells."""
    if needed > PEAK:
        return Verdict.FAILS
    if here.is_gpu and "4090" in torch.cuda.get_device_name(here.device):
        return Verdict.HOLDS if seconds <= 1.2 * of.seconds else Verdict.FAILS
    return Verdict.PROJECTED


TABLE = (
    Training("resnet50", "ResNet-50 on ImageNet", f"24 hours on an {GPU}", 24 * HOUR, IMAGENET, 90, resnet_flops, True,
             "90 epochs"),
    Training("vit-base", "ViT-Base on ImageNet", f"48 hours on an {GPU}", 48 * HOUR, IMAGENET, 300,
             lambda: transformer_flops(12, 768, 197), False, "300 epochs, patches of 16"),
    Training("gpt2", "GPT-2 124M on OpenWebText", f"7 days on an {GPU}", 7 * DAY, OPENWEBTEXT // 1024, 1,
             lambda: transformer_flops(12, 768, 1024, 50257), False, "1 epoch of 9.0e9 tokens"),
    Training("bert-base", "BERT-Base on GLUE", f"2 hours on an {GPU}", 2 * HOUR, GLUE, 3,
             lambda: transformer_flops(12, 768, 128), False, "all nine tasks, 3 epochs, 128 tokens"),
)  # fmt: skip

CLAIMS = tuple(
    Claim(f"time-{each.name}", each.about, f"about {each.claimed}", partial(project, of=each)) for each in TABLE
)
