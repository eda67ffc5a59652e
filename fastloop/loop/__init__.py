# SPDX-License-Identifier: Apache-2.0
"""The training loop: windows of micro-batches, exact resume, checkpoints, torch.distributed."""

from fastloop.loop.core import StepResult, Window
from fastloop.loop.loop import Loop
from fastloop.loop.random_state import seed_everything
from fastloop.loop.seeded import SeededDataset

__all__ = ["Loop", "SeededDataset", "StepResult", "Window", "seed_everything"]
