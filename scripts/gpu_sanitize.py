# SPDX-License-Identifier: Apache-2.0
"""A few steps of every kind on both GPU backends, for compute-sanitizer: odd sizes, tails, unaligned addresses."""

from __future__ import annotations

import torch

import fastloop

SIZES = (1, 7, 255, 8191, 8192, 8193, 20_001)


def parameters(dtype: torch.dtype) -> list[torch.Tensor]:
    """Each size at an aligned address and one element past it."""
    whole = [torch.randn(size + first, device="cuda").to(dtype)[first:] for size in SIZES for first in (0, 1)]
    return [tensor.requires_grad_(True) for tensor in whole]


def steps(kind: type[torch.optim.Optimizer], dtype: torch.dtype, **options: object) -> None:
    tensors = parameters(dtype)
    optimizer = kind(tensors, **options)
    for step in range(3):
        for index, tensor in enumerate(tensors):
            if step != 1 or index % 3:  # in the second step some have no gradient
                tensor.grad = torch.randn_like(tensor)
            else:
                tensor.grad = None
        optimizer.step()
    torch.cuda.synchronize()
    assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def main() -> None:
    for backend in ("cuda", "triton"):
        status = fastloop.backends()[backend]
        if not status["available"]:
            print(f"skipped: {backend}: {status['reason']}")
            continue
        shared = {"lr": 1e-3, "max_grad_norm": 1.0, "backend": backend}
        steps(fastloop.AdamW, torch.float32, **shared)
        steps(fastloop.AdamW, torch.float32, amsgrad=True, ema_decay=0.9, zero_grads=True, **shared)
        steps(fastloop.AdamW, torch.bfloat16, master_weights=True, ema_decay=0.9, **shared)
        steps(fastloop.AdamW, torch.float16, **shared)
        steps(fastloop.AdamW, torch.float64, **shared)
        steps(fastloop.SGD, torch.float32, momentum=0.9, **shared)
        steps(fastloop.SGD, torch.bfloat16, **shared)
        print(f"{backend}: done")


if __name__ == "__main__":
    main()
