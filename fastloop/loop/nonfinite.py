# SPDX-License-Identifier: Apache-2.0
"""The batches of a window whose loss or gradient was not finite, kept for inspection."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastloop.loop import documents
from fastloop.loop.metrics import Record

logger = logging.getLogger("fastloop.loop")


def save_batches(run_dir: Path | None, record: Record, rank: int) -> Path | None:
    """Write the window's batches to run_dir/nonfinite; `load_batches` reads them.

    Returns:
        The file; None without a folder, or where a batch is of more than tensors, numbers, texts and containers.
    """
    if run_dir is None or record.batches is None:
        return None
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    try:
        packed = documents.pack(record.batches, "batch", tensors)
    except TypeError as error:
        logger.warning("step %d: the batch could not be saved: %s", record.step, error)
        return None
    path = run_dir / "nonfinite" / f"step-{record.step:09d}-rank-{rank}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    apart = {name: t.cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(apart, path, metadata={"batches": json.dumps(packed)})  # which refuses tensors that share memory
    return path


def load_batches(path: str | Path) -> list[Any]:
    """The batches, one for each micro-batch, on the CPU."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return list(documents.unpack(json.loads(file.metadata()["batches"]), tensors))
