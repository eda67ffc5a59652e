# SPDX-License-Identifier: Apache-2.0
"""Figures without matplotlib's global state. matplotlib is imported here only, when one is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastloop.extras import need


def figure(width: float = 6.5, height: float = 4.0, what: str = "a plot") -> Any:
    """An empty matplotlib Figure, with the Agg canvas and constrained layout.

    Args:
        width, height: in inches, of 120 pixels each once it is saved.
        what: is drawn, for the error.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    figures = need("matplotlib.figure", "plots", what)
    backend = need("matplotlib.backends.backend_agg", "plots", what)
    # A Figure of its own instead of pyplot: no global state, and the program's own backend stays.
    made = figures.Figure(figsize=(width, height), layout="constrained")
    backend.FigureCanvasAgg(made)
    return made


def save(made: Any, path: str | os.PathLike[str]) -> Path:
    """Write the figure, in one rename, in the format of the name's ending (png without one); returns the path.

    Raises:
        ValueError: an ending of no image format, or a folder that is not there.
        OSError: why it could not be written.
    """
    target = Path(path)
    kind = target.suffix.lstrip(".").lower() or "png"
    kinds = made.canvas.get_supported_filetypes()
    if kind not in kinds:
        raise ValueError(f"[plots] the file's ending must be one of {', '.join(sorted(kinds))}, got {target.name!r}")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"[plots] the plot's folder must exist, there is no {target.parent}; make it first")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        made.savefig(temporary, dpi=120, format=kind)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
