# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: `run_dir/images/NAME-STEP.png`, and the same pixels for every logger that takes them."""

from __future__ import annotations

import json
import logging
import re
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray
from torch import Tensor

from fastloop import drawing
from fastloop.extras import MissingExtra
from fastloop.loop.files import replace_file

if TYPE_CHECKING:
    from fastloop.loop.loop import Loop

FOLDER = "images"
NUMBERED = 20  # classes of a confusion matrix up to which each cell says its number
NAMED = 60  # classes up to which each row has its name
ROUNDED = 1e-3  # by which floats may leave [0, 1]: a normalization that is undone does by roundings
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*(/[A-Za-z0-9_][A-Za-z0-9_.=+-]*)*")

logger = logging.getLogger("fastloop.loop")


def log_image(loop: Loop, name: str, image: Any) -> None:
    """What `Loop.log_image` does."""
    _check_name(name)
    if loop.ranks.rank != 0:
        return
    _keep(loop, name, as_rgb(image))


def log_confusion_matrix(loop: Loop, name: str, matrix: Any, classes: Sequence[Any] | None) -> None:
    """What `Loop.log_confusion_matrix` does."""
    _check_name(name)
    counts, names = as_confusion(matrix, classes)
    if loop.ranks.rank != 0:
        return
    content = {"name": name, "step": loop.global_step, "classes": names, "matrix": counts.tolist()}
    _write(loop, name, ".json", json.dumps(content).encode() + b"\n")
    try:
        pixels = rendered(draw_confusion(counts, names))
    except MissingExtra as error:
        logger.info("%s: the numbers are written, there is no picture: %s", name, error)
        return
    _keep(loop, name, pixels)


def _keep(loop: Loop, name: str, pixels: NDArray[numpy.uint8]) -> None:
    _write(loop, name, ".png", png(pixels))
    loop._reporter.picture(name, pixels)


def _write(loop: Loop, name: str, ending: str, content: bytes) -> None:
    """A disk that is full is no reason to lose a training."""
    if loop.run_dir is None:
        return
    try:
        replace_file(loop.run_dir / FOLDER / f"{name}-{loop.global_step:09d}{ending}", content)
    except OSError as error:
        logger.warning("%s%s of step %d is not written: %s", name, ending, loop.global_step, error)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(
            f"[log_image] name must be made of letters, digits and _.=+-, with / between folders, got {name!r}; pass "
            "e.g. 'val/confusion'"
        )


# ---- pixels


def as_rgb(image: Any) -> NDArray[numpy.uint8]:
    """The image as uint8 [height, width, 3].

    Args:
        image: a tensor [channels, height, width], an array [height, width, channels] (or either in the other's order
            where one end alone is 1 or 3), [height, width] in greys, or what NumPy makes one of, as an image of PIL.
            Floats in [0, 1], integers in [0, 255], or booleans.

    Raises:
        ValueError: other dimensions, or values outside.
    """
    if getattr(image, "mode", None) == "P":  # PIL's numbers of a palette are no greys
        image = image.convert("RGB")
    array = image.detach().float().cpu().numpy() if _is_float(image) else numpy.asarray(_on_host(image))
    if array.ndim == 3:
        array = _channels_at_end(array, isinstance(image, Tensor))
    elif array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise ValueError(
            f"[log_image] an image must have the shape [height, width], [height, width, 1 or 3] or "
            f"[1 or 3, height, width], got {tuple(numpy.shape(array))}; log one "
            "image of a batch, or a grid of them, without transparency"
        )
    if array.dtype == bool:
        array = array.astype(numpy.uint8) * 255
    elif numpy.issubdtype(array.dtype, numpy.floating):
        array = _in_range(array, 1.0, "floats", ROUNDED).clip(0.0, 1.0) * 255.0 + 0.5
    elif numpy.issubdtype(array.dtype, numpy.integer):
        array = _in_range(array, 255, "integers")
    else:
        raise ValueError(f"[log_image] an image must be made of numbers, got {array.dtype}; pass uint8 or floats")
    return numpy.ascontiguousarray(numpy.broadcast_to(array.astype(numpy.uint8), (*array.shape[:2], 3)))


def _is_float(image: Any) -> bool:
    return isinstance(image, Tensor) and image.is_floating_point()  # bfloat16 too, which NumPy does not have


def _on_host(image: Any) -> Any:
    return image.detach().cpu().numpy() if isinstance(image, Tensor) else image


def _channels_at_end(array: NDArray[Any], first: bool) -> NDArray[Any]:
    """`first`: where the channels are if both ends could be them."""
    begins, ends = array.shape[0] in (1, 3), array.shape[2] in (1, 3)
    return numpy.moveaxis(array, 0, 2) if begins and (first or not ends) else array


def _in_range(array: NDArray[Any], high: float, kind: str, beyond: float = 0.0) -> NDArray[Any]:
    low, top = array.min(), array.max()
    if not (low >= -beyond and top <= high + beyond):  # NaN too
        raise ValueError(
            f"[log_image] {kind} of an image must lie in [0, {high:g}], got values from {low:.4g} to {top:.4g}; undo "
            "the normalization, or scale it"
        )
    return array


def png(pixels: NDArray[numpy.uint8]) -> bytes:
    """uint8 [height, width, 3] as a PNG file (https://www.w3.org/TR/png-3/): 8 bits, RGB, rows without a filter."""
    height, width, _ = pixels.shape
    rows = numpy.zeros((height, 1 + 3 * width), numpy.uint8)  # each begins with its filter, 0 for none
    rows[:, 1:] = pixels.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


# ---- confusion matrices


def as_confusion(matrix: Any, classes: Sequence[Any] | None = None) -> tuple[NDArray[Any], list[str]]:
    """The matrix as an array [classes, classes], rows being the true classes, and the classes' names.

    Raises:
        ValueError: not square, negative or not finite values, or another number of names.
    """
    counts = numpy.asarray(_on_host(matrix))
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or counts.size == 0:
        raise ValueError(
            f"[log_confusion_matrix] matrix must be [classes, classes], true classes in rows and predicted ones in "
            f"columns, got the shape {counts.shape}"
        )
    if not (counts.dtype.kind in "iuf" and numpy.isfinite(counts).all() and counts.min() >= 0):
        raise ValueError("[log_confusion_matrix] matrix must hold counts or shares of at least 0, all of them finite")
    names = [str(each) for each in (range(len(counts)) if classes is None else classes)]
    if len(names) != len(counts):
        raise ValueError(
            f"[log_confusion_matrix] classes must name each of the {len(counts)} rows, got {len(names)} names"
        )
    return counts, names


def draw_confusion(counts: NDArray[Any], names: Sequence[str]) -> Any:
    """A matplotlib Figure: colours are shares of the row's sum, numbers what is given, where they can be read.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    shown = [name if len(name) <= 24 else name[:23] + "…" for name in names]
    longest = max(map(len, shown))
    # 0.42 inch a cell keeps numbers of four digits at 8 points apart.
    size = min(max(0.42 * len(names), 3.0), 12.0)
    figure = drawing.figure(size + 2.6 + 0.07 * longest, size + 0.9 + 0.05 * longest, "a confusion matrix")
    axes = figure.add_subplot()
    sums = counts.sum(axis=1, keepdims=True)
    shares = counts / numpy.where(sums > 0, sums, 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    figure.colorbar(picture, ax=axes, label="share of the true class", shrink=0.9, pad=0.02)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(names) <= NAMED:
        text = {"fontsize": 8 if len(names) <= NUMBERED else 6, "parse_math": False}  # a class may have a "$"
        axes.set_xticks(range(len(names)), shown, rotation=90 if longest > 3 else 0, **text)
        axes.set_yticks(range(len(names)), shown, **text)
    if len(names) <= NUMBERED:
        for (row, column), count in numpy.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.5 else "#888888" if count == 0 else "black"
            axes.text(column, row, _short(float(count)), ha="center", va="center", fontsize=8, color=colour)
    return figure


def _short(value: float) -> str:
    """Four characters or so."""
    if value < 10_000:
        return f"{value:.4g}" if value == int(value) else f"{value:.2g}" if value < 100 else f"{value:.0f}"
    return f"{value / 1000:.0f}k" if value < 1_000_000 else f"{value / 1e6:.0f}M"


def rendered(figure: Any) -> NDArray[numpy.uint8]:
    """The pixels of a figure of `fastloop.drawing`, uint8 [height, width, 3]."""
    figure.canvas.draw()
    return numpy.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy()
