# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: its speed, its memory, and what its number formats can hold."""

from __future__ import annotations

from functools import partial

import torch

from fastloop.bench import chargpt
from fastloop.bench.checks import WrongResult
from fastloop.bench.claims import training
from fastloop.bench.claims.record import Claim, Finding, Here, Verdict, both, faster, gigabytes, times
from fastloop.bench.memory import resident_bytes

LOSS_ERROR = {torch.float16: 0.01, torch.bfloat16: 0.02}  # relative; some 10 roundings of 2^-11 and 2^-8 a layer
NEAR_HALF = 0.55
WIDE = chargpt.Size(layers=4, width=128, heads=4, context=128, batch=16)  # activations outweigh the weights' copies


def _check(step: training.Step, reference: training.Step, dtype: torch.dtype) -> None:
    low, full = float(step()), float(reference())
    if not abs(low - full) <= LOSS_ERROR[dtype] * full:
        raise WrongResult(f"[bench claims] the first loss under autocast to {dtype} is {low:.4f}, in fp32 {full:.4f}")


def speed(here: Here, dtype: torch.dtype) -> Finding:
    """A training step in fp32 over one under autocast."""
    full, _ = training.step(here, None)
    low, _ = training.step(here, dtype)
    _check(low, full, dtype)
    found, pairs = here.pairs(full, low, 2.0)
    return Finding(times(found), faster(found, 2.0), "a training step of a GPT", found, pairs.ratios)


def memory(here: Here, dtype: torch.dtype) -> Finding:
    """What a step takes on top, and with it all that the training holds."""
    on_top, held = {}, 0.0
    for name, each in (("fp32", None), ("low", dtype)):
        step, model = training.step(here, each, None if here.is_gpu else WIDE)
        on_top[name] = here.transient_bytes(step)
        held = 4.0 * resident_bytes(model.parameters())  # parameters, gradients and two moments, in fp32 in both
    activations = on_top["low"] / on_top["fp32"]
    whole = (on_top["low"] + held) / (on_top["fp32"] + held)
    verdict = Verdict.HOLDS if whole <= NEAR_HALF else Verdict.PARTLY if activations < 0.75 else Verdict.FAILS
    note = f"of {gigabytes(on_top['fp32'])}; parameters, gradients and states ({gigabytes(held)}) stay in fp32"
    words = f"{activations:.0%} of fp32's activations, {whole:.0%} of all memory"
    return Finding(words, verdict, note, numbers={"activations": activations, "whole": whole})


def fp16_limits(here: Here) -> Finding:
    """1e-8 becomes 0, 70000 infinite, and 1 + 1e-6 stays 1."""
    small, large, updated = (torch.tensor(value).half().item() for value in (1e-8, 70000.0, 1.0 + 1e-4 * 0.01))
    kept = [small == 0.0, large == float("inf"), updated == 1.0]
    words = f"1e-8 becomes {small:g}, 70000 becomes {large:g}, 1 + 1e-6 becomes {updated:g}"
    note = f"smallest above 0: {torch.finfo(torch.float16).smallest_normal * 2**-10:.2g}, largest: 65504"
    return Finding(words, Verdict.HOLDS if all(kept) else Verdict.FAILS, note)


def bf16_range(here: Here) -> Finding:
    """fp32's range, and about two decimal digits."""
    low, full = torch.finfo(torch.bfloat16), torch.finfo(torch.float32)
    same = low.smallest_normal == full.smallest_normal and 0.99 < low.max / full.max < 1
    words = f"{low.smallest_normal:.1e} to {low.max:.1e}, relative step {low.eps:.1e}"
    range_holds = Verdict.HOLDS if same else Verdict.FAILS
    digits = Verdict.HOLDS if 1e-3 < low.eps < 1e-2 else Verdict.FAILS  # 2^-7: 2.1 decimal digits
    return Finding(words, both(range_holds, digits))


CLAIMS = (
    Claim("amp-speed-fp16", "mixed precision, fp16", "2-3x faster", partial(speed, dtype=torch.float16), gpus=1),
    Claim("amp-speed-bf16", "mixed precision, bf16", "2-3x faster", partial(speed, dtype=torch.bfloat16)),
    Claim("amp-memory-fp16", "mixed precision, fp16", "half the memory", partial(memory, dtype=torch.float16), gpus=1),
    Claim("amp-memory-bf16", "mixed precision, bf16", "half the memory", partial(memory, dtype=torch.bfloat16)),
    Claim("fp16-limits", "numbers that fp16 loses", "1e-8 to 0, 70000 to inf, 1 + 1e-6 to 1", fp16_limits, on_cpu=True),
    Claim("bf16-range", "bf16's numbers", "fp32's range 1e-38 to 1e38, about 2 digits", bf16_range, on_cpu=True),
)
