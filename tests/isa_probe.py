# SPDX-License-Identifier: Apache-2.0
"""Run by test_isa in a process of its own: every optimizer on the instruction set that FASTLOOP_ISA names.

Steps are held against the oracle here; what must agree between instruction sets is printed as JSON: the norms, but
those of float64 gradients. The square of a float64 is rounded where the set has no fused multiply-add, and exact
where it has one; squares of narrower numbers are exact in a float64 accumulator.
"""

from __future__ import annotations

import json

import torch
from cases import CASES
from support import bits, checked_step, example, make, parameters, set_grads, threads, values

import fastloop

SHAPES = ((33, 65), (7,), (), (70_001,), (0,), (1,), (15,), (16,), (17,), (31,), (63,))
STORAGE = (
    (torch.float32, None, {}),
    (torch.float32, None, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, None, {}),
    (torch.bfloat16, torch.float32, {"master_weights": True}),
    (torch.float16, None, {}),
    (torch.float16, None, {"master_weights": True}),
    (torch.float64, None, {}),
)


def every_finite_16_bit_number(dtype: torch.dtype) -> torch.Tensor:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()].clone()


def main() -> None:
    norms: dict[str, str] = {}
    for name in CASES:
        for index, (dtype, grad_dtype, arguments) in enumerate(STORAGE):
            params = parameters(SHAPES, dtype, grad_dtype)
            opt = make(name, params, backend="cpu", max_grad_norm=0.5, max_grad_value=0.02, ema_decay=0.9,
                       zero_grads=True, **arguments, **example(name))  # fmt: skip
            for _ in range(2):
                set_grads(params)
                grads = [p.grad.clone() for p in params]
                checked_step(opt)
                norms[f"{name} {index} step"] = repr(bits(opt.grad_norm))
            for norm_type in (2.0, 1.0, float("inf")):
                for count in (1, 2):
                    with threads(count):
                        norm = fastloop.get_total_norm(grads, norm_type)
                    key = f"{name} {index} {norm_type}"
                    assert norms.setdefault(key, repr(bits(norm))) == repr(bits(norm)), f"{count} threads"
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            fastloop.clip_grad_norm_(params, 0.1)
            fastloop.clip_grad_value_(params, 0.001)
            norms[f"{name} {index} clipped"] = repr(bits(fastloop.get_total_norm(grads)))
    for dtype in (torch.bfloat16, torch.float16):  # conversions, both ways
        numbers = every_finite_16_bit_number(dtype)
        p = torch.nn.Parameter(numbers.clone())
        opt = fastloop.SGD([p], lr=0.0, backend="cpu")
        p.grad = values((numbers.numel(),), dtype)
        opt.step()
        assert (p == numbers).all(), f"{dtype} there and back"
        p = torch.nn.Parameter(values((60_000,)).to(dtype))
        opt = fastloop.SGD([p], lr=0.1, momentum=0.5, master_weights=True, backend="cpu")
        for _ in range(2):
            p.grad = values((60_000,), dtype)
            checked_step(opt)
    comparable = {key: norm for key, norm in norms.items() if "torch.float64" not in norm}
    print(json.dumps({"isa": fastloop.backends()["cpu"]["isa"], "norms": comparable}))


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
