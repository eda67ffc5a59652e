# SPDX-License-Identifier: Apache-2.0
"""A trained model as files that other programs run, each compared with the model before it is put in place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from fastloop.bench.stats import Interval
from fastloop.extras import need
from fastloop.findings import Finding, listed
from fastloop.loop import random_state
from fastloop.loop.probe import device_of, eval_mode
from fastloop.recipes.export.comparing import (
    Arguments,
    Difference,
    batch_of,
    difference,
    latency_ratio,
    of_batch,
    other_values,
    stored_bytes,
)
from fastloop.recipes.export.formats import ENDINGS, Exporter, Loaded
from fastloop.recipes.export.quiet import quiet
from fastloop.recipes.export.verification import check_tolerance, shown, why_not
from fastloop.recipes.results import Result
from fastloop.texts import columns

REASON = 400  # characters of torch's reasons, which can be pages
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass
class ExportRow:
    """One format.

    Attributes:
        path: of the file; None where it has not passed, and then an earlier file of that name is still there.
        bytes: of the file, and of the file of weights beside it where there is one.
        max_abs_error: largest difference of an output from the model's; max_rel_error: over the largest output, at
            most `tolerance` where it has passed.
        latency: time over the model's own, with its 98 % interval.
    """

    format: str
    tolerance: float
    passed: bool = False
    path: str | None = None
    bytes: int | None = None
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    reason: str = ""
    latency: Interval | None = None


@dataclass
class ExportReport(Result):
    """What was written. `model_bytes` are parameters and buffers; `batch_sizes` those that were compared."""

    practice: ClassVar[str] = "export_model"
    rows: list[ExportRow]
    model_bytes: int
    batch_sizes: list[int]
    findings: list[Finding] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether all formats have."""
        return all(row.passed for row in self.rows)

    def __getitem__(self, kind: str) -> ExportRow:
        for row in self.rows:
            if row.format == kind:
                return row
        raise KeyError(
            f"[export_model] the report has none of format {kind!r}, only {[row.format for row in self.rows]}"
        )

    def table(self) -> str:
        """A line for each format."""
        head = ("format", "", "bytes", "largest error", "of the output", "tolerance", "time over the model's", "path")
        rows = [
            (
                *(r.format, "passed" if r.passed else "FAILED", r.bytes, r.max_abs_error, r.max_rel_error, r.tolerance),
                *(shown(r.latency), r.path),
            )
            for r in self.rows
        ]
        text = columns(head, rows)
        return f"{text}\n{listed(self.findings)}" if self.findings else text


def export_model(
    model: nn.Module,
    example: Any,
    folder: str | os.PathLike[str],
    *,
    formats: str | Sequence[str] = ("program", "onnx"),
    tolerance: float = 1e-4,
    dynamic_batch: bool = True,
    name: str = "model",
) -> ExportReport:
    """Export the model in eval mode, load each file again, and compare what it computes with the model.

    max |file(x) - model(x)| <= tolerance * max |model(x)| for each output, for the example, for other values and, with
    `dynamic_batch`, for other batch sizes, 1 among them. A file is put in place, in one rename, after it has passed.
    A format that fails is a row with its reason; the others go on.

    Args:
        model: stays as it is, its modes too.
        example: the input; a tuple is positional arguments, a dict keyword arguments (for a model that takes one dict:
            a tuple of it). With `dynamic_batch` the tensors whose first dimension is as large as the first tensor's
            have the batch there.
        folder: made if it is not there.
        formats: "program" (torch.export, NAME.pt2), "onnx" (NAME.onnx, run by onnxruntime), "torchscript" (traced,
            NAME.torchscript.pt; deprecated by torch).
        tolerance: relative to the largest output; 1e-4 suits fp32.
        dynamic_batch: leave the batch size open.
        name: of the files.

    Raises:
        MissingExtra: "onnx" without its packages.
        ValueError: an unknown format, a name with a folder in it, no tensor in the example, an empty batch, a
            model that takes no other batch size than the example's where the batch is to be dynamic.
        TypeError: `model` is no module.
        OSError: the folder cannot be written.
        What the model itself raises on the example.
    """
    kinds = _checked(model, formats, tolerance, name)
    given = Arguments.of(example).to(device_of(model))
    batch = batch_of(given)
    if batch is None or batch == 0:
        raise ValueError(
            f"[export_model] example must be a batch of tensors, got {'an empty one' if batch == 0 else 'none'}"
        )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with random_state.unmoved(), eval_mode(model):
        trials = _trials(given, batch, dynamic_batch)
        expected = [_output(model, trial, batch) for trial in trials]
        findings = _steady(trials, expected, model, tolerance)
        # torch.export takes a size of 1 for a constant.
        traced = of_batch(given, 2) if dynamic_batch and batch == 1 else given.fresh()
        exporter = Exporter(model, traced, dynamic_batch)
        rows = [_row(kind, exporter, trials, expected, target, name, tolerance) for kind in kinds]
    sizes = sorted({size for trial in trials if (size := batch_of(trial)) is not None})
    made = ExportReport(rows, stored_bytes(model), sizes, findings)
    made.findings += _findings(made, exporter)
    return made


def _checked(model: nn.Module, formats: str | Sequence[str], tolerance: float, name: str) -> list[str]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"[export_model] model must be an nn.Module, got {type(model).__name__}")
    check_tolerance(tolerance, "export_model")
    kinds = [formats] if isinstance(formats, str) else list(dict.fromkeys(formats))
    unknown = [kind for kind in kinds if kind not in ENDINGS]
    if unknown or not kinds:
        raise ValueError(f"[export_model] formats must be among {tuple(ENDINGS)}, got {unknown or 'none'}")
    if not name or Path(name).name != name:
        raise ValueError(
            f"[export_model] name must be a file name without an ending, got {name!r}; folders go into folder"
        )
    for kind in kinds:
        for module in NEEDED.get(kind, ()):
            need(module, "export", f'format "{kind}"')
    return kinds


def _trials(given: Arguments, batch: int, dynamic: bool) -> list[Arguments]:
    """The inputs on which files are compared with the model, the example first."""
    if not dynamic:
        return [given, other_values(given)]
    return [given, *(other_values(of_batch(given, size), seed) for seed, size in enumerate((batch, batch + 3, 1)))]


def _output(model: nn.Module, trial: Arguments, batch: int) -> Any:
    size = batch_of(trial)
    try:
        return trial.fresh().call(model)
    except Exception as error:
        if size == batch:
            raise
        raise ValueError(
            f"[export_model] the model itself fails with a batch of {size}: {_short(error)}; pass "
            f"dynamic_batch=False to export it for batches of {batch} only"
        ) from error


def _steady(trials: list[Arguments], expected: list[Any], model: nn.Module, tolerance: float) -> list[Finding]:
    """A model that differs from itself cannot be compared with."""
    found = difference(expected[0], trials[0].fresh().call(model))
    if found.relative <= tolerance:
        return []
    return [
        Finding(
            "error",
            "model",
            f"two calls with the same input differ by up to {found.absolute:.3g} in eval mode",
            "take the randomness out of its forward: dropout as nn.Dropout, or F.dropout(..., training=self.training)",
        )
    ]


def _row(
    kind: str,
    exporter: Exporter,
    trials: list[Arguments],
    expected: list[Any],
    folder: Path,
    name: str,
    tolerance: float,
) -> ExportRow:
    row = ExportRow(kind, tolerance)
    temporary = Path(tempfile.mkdtemp(prefix=".export-", dir=folder))
    try:
        file = temporary / (name + ENDINGS[kind])
        with quiet():
            try:
                loaded = exporter.write(kind, file)
                found = Difference()
                for trial, output in zip(trials, expected, strict=True):
                    found = found.worse(_compared(loaded, trial, output))
            except Exception as error:
                row.reason = _short(error)
                return row
            row.max_abs_error, row.max_rel_error = found.absolute, found.relative
            row.reason = why_not(found, tolerance)
            if row.reason:
                return row
            row.latency = _latency(kind, exporter.model, loaded, trials[0].fresh())
        written = sorted(temporary.iterdir(), key=lambda path: path == file)  # the weights first, then what names them
        row.bytes = sum(path.stat().st_size for path in written)
        for path in written:
            os.replace(path, folder / path.name)
        row.path, row.passed = str(folder / file.name), True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return row


def _compared(loaded: Loaded, trial: Arguments, expected: Any) -> Difference:
    try:
        return difference(expected, loaded(trial.fresh()))
    except Exception as error:
        raise RuntimeError(f"with a batch of {batch_of(trial)}: {error}") from error


def _latency(kind: str, model: nn.Module, loaded: Loaded, given: Arguments) -> Interval | None:
    device = device_of(model)
    if kind == "onnx" and device.type != "cpu":
        return None  # onnxruntime runs on the CPU here
    return latency_ratio(lambda: loaded(given), lambda: given.call(model), device)


def _short(error: Exception) -> str:
    """What went wrong, in a line or two: torch's reasons come first in its messages."""
    text = " ".join(str(error).split("For more information")[0].split()) or "no reason given"
    why = "the forward branches on values of its tensors: " if "data-dependent" in text else ""
    return f"{why}{type(error).__name__}: {text[:REASON]}" + (" ..." if len(text) > REASON else "")


def _findings(report: ExportReport, exporter: Exporter) -> list[Finding]:
    found = []
    for row in report.rows:
        if not row.passed:
            of_batch = exporter.dynamic and any(word in row.reason for word in ("with a batch of", "Constraint"))
            advice = "dynamic_batch=False exports for one batch size" if of_batch else "no file was written"
            found.append(Finding("error", row.format, row.reason, advice))
        if row.format == "torchscript" and row.passed:
            advice = 'use the format "program" for new services'
            found.append(Finding("note", "torchscript", "torch has deprecated TorchScript", advice))
        if row.format == "torchscript" and exporter.baked:
            what = f"tracing has baked in branches of the example in {len(exporter.baked)} places: {exporter.baked[0]}"
            advice = 'use the format "program", which refuses what it cannot follow'
            found.append(Finding("warning", "torchscript", what[:REASON], advice))
    return found
