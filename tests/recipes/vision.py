# SPDX-License-Identifier: Apache-2.0
"""torchvision for tests, also beside a torch that its compiled operators were not built for."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

# Libraries of operators live as long as the object that declared them.
DECLARED: list[Any] = []


def vision() -> Any:
    """torchvision, imported; the test is skipped, with the reason, where that cannot be.

    The wheel for CUDA cannot load its operators beside a torch for the CPU, and its import then fails at the first of
    them that it registers something for. Transforms and models need none of them (nms and roi_align are of detection),
    so their names are declared, without a kernel, and the import goes through.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        pytest.skip("needs torchvision, which is not installed")
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            pytest.skip(f"needs torchvision, which cannot be imported: {error}")
    _declare(Path(found.origin).parent / "_meta_registrations.py")
    try:
        return importlib.import_module("torchvision")
    except (RuntimeError, ImportError) as error:
        pytest.skip(f"needs torchvision, which cannot be imported: {error}")


def _declare(source: Path) -> None:
    """An operator without a kernel for each name that the file registers a fake for."""
    if not source.exists():
        pytest.skip("needs torchvision, which cannot be imported, and its operators' names are not where they were")
    names = re.findall(r'register_fake\("torchvision::(\w+)"\)', source.read_text(encoding="utf-8"))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in names:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    DECLARED.append(library)
