# SPDX-License-Identifier: Apache-2.0
"""The picture of a learning-rate range test. matplotlib is imported here only, when one is asked for."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastloop.extras import need

if TYPE_CHECKING:
    from fastloop.tune.lr_range import LRRange


def check(path: str | os.PathLike[str]) -> None:
    """Raise unless a plot can be drawn into this file: before the test, and not after it.

    Raises:
        MissingExtra: matplotlib is not installed.
        ValueError: a file name of no image format, or in a folder that is not there.
    """
    _canvas(path)
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"[tune] the plot's folder must exist, there is no {Path(path).parent}; make it first")


def draw(found: LRRange, path: str | os.PathLike[str]) -> None:
    """Losses and their moving average over the rate, what was read off it marked.

    Raises:
        MissingExtra: matplotlib is not installed.
        ValueError: no losses to draw, or a file name of no image format.
    """
    if not found.losses:
        raise ValueError("[tune] the range test has no losses to draw; its note says why")
    canvas, kind = _canvas(path)
    axes = canvas.figure.add_subplot()
    _curves(axes, found)
    _marks(axes, found)
    axes.set_xscale("log")
    ends = found.learning_rates[0], found.diverged_at or found.learning_rates[-1]
    axes.set_xlim(ends[0], ends[1] * (ends[1] / ends[0]) ** 0.02)
    axes.set_xlabel("learning rate (of the first parameter group)")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", framealpha=0.9)
    suggestion = "no suggestion" if found.suggestion is None else f"suggestion {found.suggestion:.2g}"
    axes.set_title(f"Learning-rate range test: {suggestion}")
    canvas.figure.savefig(path, dpi=120, format=kind)


def _canvas(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """A canvas, and the image format of the file."""
    figures = need("matplotlib.figure", "plots", "the plot of a range test")
    backend = need("matplotlib.backends.backend_agg", "plots", "the plot of a range test")
    # A Figure of its own instead of pyplot: no global state, and the program's own backend stays.
    canvas = backend.FigureCanvasAgg(figures.Figure(figsize=(9.0, 5.0), layout="constrained"))
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in canvas.get_supported_filetypes():
        raise ValueError(f"[tune] the plot must be an image, got {os.fspath(path)!r}; name it e.g. lr.png")
    return canvas, kind


def _curves(axes: Any, found: LRRange) -> None:
    rates = found.learning_rates[: len(found.losses)]
    axes.plot(rates, found.losses, color="tab:gray", alpha=0.5, linewidth=1, label="loss of each step")
    axes.plot(rates, found.smoothed, color="tab:blue", linewidth=2, label="moving average")
    # Losses on their way to infinity would press all others to the bottom.
    first, lowest = found.smoothed[0], min(found.smoothed)
    top = max(max(found.losses[: max(3, len(rates) // 10)]), first + 0.6 * (first - lowest))
    space = 0.08 * (top - lowest) or 1.0
    axes.set_ylim(min(lowest, *found.losses) - space, top + space)


def _marks(axes: Any, found: LRRange) -> None:
    names = {"steepest descent": found.steepest, "a tenth of the rate at the lowest loss": found.tenth_of_minimum}
    for (name, rate), color in zip(names.items(), ("tab:orange", "tab:purple"), strict=True):
        if rate is not None and rate != found.suggestion:
            axes.axvline(rate, color=color, linestyle="--", linewidth=1.5, label=f"{name}: {rate:.2g}")
    if found.suggestion is not None:
        which = next(name for name, rate in names.items() if rate == found.suggestion)
        text = f"suggestion: {found.suggestion:.2g}, {which}"
        axes.axvline(found.suggestion, color="tab:green", linewidth=2.5, alpha=0.8, label=text)
    if found.diverged_at is not None:
        axes.axvline(found.diverged_at, color="tab:red", linewidth=2, label=f"diverged: {found.diverged_at:.2g}")
