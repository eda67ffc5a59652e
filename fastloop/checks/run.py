# SPDX-License-Identifier: Apache-2.0
"""The checks of a run: `Loop(check=True)`. They end it, warn, or are logged, and are written to its folder."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fastloop.checks.before_training import CheckFailed, inspect
from fastloop.checks.trying import why_not
from fastloop.findings import Finding
from fastloop.loop.files import replace_file

if TYPE_CHECKING:
    from fastloop.loop.fitting import Fitting

FILE = "checks.json"
logger = logging.getLogger("fastloop.loop")


def check_run(loop: Fitting, batch: Any, train_loader: Any, val_loader: Any, epochs: int | None) -> None:
    """`preflight` of a run that is about to begin, on its own first batch: no loader is iterated over for it.

    Errors of any rank end all of them; a check that itself fails is a note. Warnings are warned of once each, notes go
    to the logger, and all findings of rank 0 to `run_dir/checks.json`.

    Args:
        batch: on the device; None on a rank that has none.

    Raises:
        CheckFailed: errors, here or on another rank.
    """
    loss_fn = _Within(loop)
    untried = _why_not(loop, loss_fn, batch)
    try:
        findings = inspect(
            loop.model, loss_fn, batch, train_loader, val_loader, loop.optimizer,
            schedule=loop._scheduled or None, epochs=epochs,
            patience=None if loop._stopper is None else loop._stopper.patience,
            fresh=loop.global_step == 0, world=loop.ranks.size, untried=untried,
        )  # fmt: skip
    except Exception as error:  # a bug of ours is no reason to lose a training
        findings = [Finding("note", "check", f"the checks failed: {type(error).__name__}: {error}")]
    if loop.run_dir is not None and loop.ranks.rank == 0:
        try:
            write(loop.run_dir / FILE, loop.global_step, findings)
        except OSError as error:
            logger.warning("no %s: %s", FILE, error)
    errors = any(finding.level == "error" for finding in findings)
    anywhere = bool(loop.ranks.largest(float(errors)))
    _tell([f for f in findings if f.level != "error"])
    if anywhere:
        raise CheckFailed(findings)


def _why_not(loop: Fitting, loss_fn: Any, batch: Any) -> str:
    """Why this rank tries no batch: all try one, or none, as a loss may have collectives."""
    try:
        reason = why_not(loop.model, loss_fn, batch, loop.optimizer, loop.ranks.size)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    anywhere = bool(loop.ranks.largest(float(bool(reason))))
    return reason or ("another rank cannot" if anywhere else "")


def write(path: Path, step: int, findings: list[Finding]) -> None:
    """Write the findings, in one rename.

    Raises:
        OSError: the file cannot be written.
    """
    counts = {level: sum(f.level == level for f in findings) for level in ("error", "warning", "note")}
    text = json.dumps({"step": step, **counts, "findings": [f.to_json() for f in findings]}, indent=1)
    replace_file(path, text + "\n")


def _tell(findings: list[Finding]) -> None:
    for finding in findings:
        if finding.level == "warning":
            warnings.warn(f"[checks] {str(finding).removeprefix('warning: ')}", stacklevel=2)
        else:
            logger.info("check: %s", finding)


class _Within:
    """The run's loss function, in its precision."""

    def __init__(self, loop: Fitting) -> None:
        self._loop, self.loss_fn = loop, loop.loss_fn

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        assert self.loss_fn is not None
        with self._loop.autocast():
            return self.loss_fn(model, batch)
