# SPDX-License-Identifier: Apache-2.0
"""fastloop: drop-in optimizers and gradient clipping for PyTorch, at the speed of the memory."""

from fastloop import schedules
from fastloop._version import __version__
from fastloop.amp import GradScaler
from fastloop.clip import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from fastloop.loop import Loop, seed_everything
from fastloop.ops.backends import backends
from fastloop.ops.launches import count_launches
from fastloop.optim import SGD, Adam, AdamW

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "GradScaler",
    "Loop",
    "__version__",
    "backends",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "count_launches",
    "get_total_norm",
    "schedules",
    "seed_everything",
]
