# SPDX-License-Identifier: Apache-2.0
"""Is a changed copy of a model still the model, and what was won?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from fastloop.bench.stats import Interval
from fastloop.findings import Finding, listed
from fastloop.loop import random_state
from fastloop.loop.probe import device_of, eval_mode
from fastloop.recipes.export.comparing import (
    Arguments,
    Difference,
    difference,
    latency_ratio,
    other_values,
    stored_bytes,
)
from fastloop.recipes.results import Result
from fastloop.texts import columns


@dataclass
class Verification(Result):
    """A copy against its model.

    Attributes:
        max_abs: largest difference of an output.
        max_rel: the same over the largest |output| of its tensor; passed: it is at most `tolerance`.
        bytes_before, bytes: parameters and buffers as stored, of the model and of the copy.
        latency: time of the copy over that of the model, with its 98 % interval; None where it has not passed.
    """

    practice: ClassVar[str] = "verify_copy"
    passed: bool
    max_abs: float
    max_rel: float
    tolerance: float
    bytes_before: int
    bytes: int
    latency: Interval | None = None
    reason: str = ""
    findings: list[Finding] = field(default_factory=list)

    def table(self) -> str:
        """Differences, sizes, latency."""
        rows: list[tuple[str, Any]] = [
            ("verdict", "passed" if self.passed else f"failed: {self.reason}"),
            ("largest difference", self.max_abs),
            ("over the largest output", self.max_rel),
            ("tolerance", self.tolerance),
            ("bytes", f"{self.bytes_before} -> {self.bytes}"),
            ("time over the model's", shown(self.latency)),
        ]
        text = columns(("", ""), rows)
        return f"{text}\n{listed(self.findings)}" if self.findings else text


def verify_copy(model: nn.Module, other: nn.Module, example: Any, *, tolerance: float) -> Verification:
    """Compare a copy (fused, of half precision, quantized, pruned) with its model: outputs, size, latency.

    max |other(x) - model(x)| <= tolerance * max |model(x)| for each output, in eval mode, with x the example and other
    inputs of its shapes whose elements are drawn from the example's.

    Args:
        model, other: called in eval mode; their modes are put back. Each gets the inputs on its device.
        example: the input; a tuple is positional arguments, a dict keyword arguments.
        tolerance: relative to the largest output. Usual: 1e-5 for fused layers, 2e-2 for bf16, 5e-2 for int8.

    Raises:
        TypeError: no modules.
        ValueError: a tolerance below 0.
    """
    for each in (model, other):
        if not isinstance(each, nn.Module):
            raise TypeError(f"[verify_copy] both must be nn.Modules, got {type(each).__name__}")
    check_tolerance(tolerance, "verify_copy")
    given = Arguments.of(example)
    on_model, on_other = (given.to(device_of(each)) for each in (model, other))
    findings: list[Finding] = []
    with random_state.unmoved(), eval_mode(model), eval_mode(other):
        whole = Difference()
        for a, b in ((on_model, on_other), (other_values(on_model), other_values(on_other))):
            whole = whole.worse(difference(a.fresh().call(model), b.fresh().call(other)))
        reason = why_not(whole, tolerance)
        latency = None
        if not reason and device_of(model) == device_of(other):
            latency = latency_ratio(lambda: on_other.call(other), lambda: on_model.call(model), device_of(model))
        elif not reason:
            findings.append(Finding("note", "latency", "not compared: the two are on different devices"))
    made = Verification(
        not reason, whole.absolute, whole.relative, tolerance, stored_bytes(model), stored_bytes(other), latency, reason
    )
    if whole.largest == 0 and not whole.reason:
        findings.append(Finding("warning", "outputs", "all outputs are 0: nothing is shown", "pass another example"))
    made.findings = findings
    return made


def why_not(found: Difference, tolerance: float) -> str:
    """Why a copy has not passed; "" where it has."""
    if found.reason:
        return found.reason
    if found.relative <= tolerance:
        return ""
    return (
        f"outputs differ by up to {found.absolute:.3g}, {found.relative:.3g} of the largest: more than the "
        f"tolerance of {tolerance:g}"
    )


def check_tolerance(tolerance: float, where: str) -> None:
    """Raises ValueError for one that is no number of at least 0."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < float("inf"):
        raise ValueError(f"[{where}] tolerance must be a number of at least 0, got {tolerance!r}; pass e.g. 1e-4")


def shown(latency: Interval | None) -> str:
    """A ratio with its interval."""
    return "-" if latency is None else f"{latency.median:.3g} ({latency.low:.3g} to {latency.high:.3g})"
