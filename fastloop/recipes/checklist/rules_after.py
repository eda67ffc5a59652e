# SPDX-License-Identifier: Apache-2.0
"""Rules about what follows the training: test set, errors, export, documents, production."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastloop.recipes.checklist.answers import Answer, done, not_done, practised, stated, unknown
from fastloop.recipes.checklist.practices import how
from fastloop.recipes.tracking.model_card import FILE as CARD
from fastloop.recipes.tracking.run_folder import RunFolder

SMALLER = ("quantize_int8", "prune")

errors_analyzed = practised("error_analysis")
compared = practised("compare_models")
updates_planned = stated("update planned")


def tested_once(run: RunFolder) -> Answer:
    names = [name for name in run.metrics if name.startswith("test/")]
    if any(name.startswith("test/") for name in run.start.get("monitors", {})):
        return not_done("a metric of the test set chooses the checkpoints", "monitor a metric of the validation set")
    if names:
        points = max((run.points(name) for name in names), key=len)
        if len(points) > 1:
            return not_done(
                f"the test set was evaluated {len(points)} times", "what is looked at while training is validation data"
            )
        step = points[0][0]
        if step < run.steps:
            return not_done(
                f"the test set was evaluated at step {step} of {run.steps}", "evaluate it after the training"
            )
        return done(f"{names[0]} {run.points(names[0])[0][1]:.4g}, evaluated once, after the training")
    if "test set evaluated" in run.practices:
        return stated("test set evaluated")(run)
    return not_done("no metric of a test set is logged", 'loop.evaluate(test_loader, name="test") after the training')


def fairness(run: RunFolder) -> Answer:
    groups = run.practices.get("error_analysis", {}).get("groups")
    if groups:
        return done(f"error_analysis is recorded with {len(groups)} groups")
    return stated("fairness checked")(run)


def exported(run: RunFolder) -> Answer:
    details = run.practices.get("export_model")
    if details is not None:
        failed = [row for row in _rows(details) if row.get("passed") is False]
        if failed and len(failed) == len(_rows(details)):
            return not_done(f"export_model failed: {failed[0].get('reason')}", how("export_model"))
        return done(f"export_model is recorded, with {len(_rows(details)) - len(failed)} formats that passed")
    if run.exported:
        return done(f"{len(run.exported)} exported files, as {run.exported[0].name}")
    return not_done("no exported file is there", how("export_model"))


def ready(run: RunFolder) -> Answer:
    """Exported, and verified against the model."""
    details = run.practices.get("export_model")
    if details is None and run.exported:
        return unknown(f"{run.exported[0].name} is there, compared with the model by nobody", how("export_model"))
    if details is None:
        return exported(run)
    rows = _rows(details)
    passed = [str(row.get("format")) for row in rows if row.get("passed")]
    if not passed:
        return not_done("no exported format is recorded as verified", how("export_model"))
    return done(f"exported and verified against the model: {', '.join(passed)}")


def documented(run: RunFolder) -> Answer:
    card = run.file(CARD)
    if card is None:
        return not_done(f"there is no {CARD}", "model_card(run_dir, intended_use=..., limitations=...)")
    newest = max((each.manifest["time"] for each in run.checkpoints), default=0.0)
    if card.stat().st_mtime < newest - 1.0:
        return not_done(f"{CARD} is older than the newest checkpoint", "model_card(run_dir) again")
    text = card.read_text(encoding="utf-8", errors="replace")
    missing = [name for name in ("intended use", "limitations") if f"written down the {name}" in text]
    return done(f"{CARD} is there" + (f"; nobody has stated {' and '.join(missing)}" if missing else ""))


def made_smaller(run: RunFolder) -> Answer:
    found = [name for name in SMALLER if name in run.practices]
    if found:
        return done(f"{', '.join(found)} recorded")
    return not_done("neither quantization nor pruning is recorded", f"{how('quantize_int8')}; or {how('prune')}")


def monitored(run: RunFolder) -> Answer:
    if "drift_report" in run.practices:
        return done("drift_report is recorded")
    return stated("production monitored")(run)


def deployment_documented(run: RunFolder) -> Answer:
    file = run.file("DEPLOYMENT.md", "deployment.md", "docs/deployment.md", "docs/deploying.md")
    return done(f"{file.name} is there") if file else stated("deployment documented")(run)


# ---- at the end of the training


def evaluated_at_end(run: RunFolder) -> Answer:
    names = [name for name in run.metrics if name.partition("/")[0] in ("val", "test")]
    if not names:
        return not_done("the run was never evaluated", "fit(train_loader, val_loader, ...)")
    last = {name: run.points(name)[-1] for name in names}
    shown = ", ".join(f"{name} {value:.4g}" for name, (_, value) in last.items())
    latest = max(step for step, _ in last.values())
    if latest < run.steps:
        return not_done(f"the last evaluation is of step {latest} of {run.steps}", "loop.evaluate(val_loader)")
    if any(not math.isfinite(value) for _, value in last.values()):
        return not_done(f"the last values are not finite: {shown}", "diagnose(model, loss_fn, batch, optimizer)")
    return done(f"at the last step: {shown}")


def curves_analyzed(run: RunFolder) -> Answer:
    for name in ("diagnose_curves", "diagnose_plateau"):
        if name in run.practices:
            return done(f"{name} is recorded")
    if (run.path / "training_curves.png").exists():
        return unknown(
            "training_curves.png is drawn; nobody has recorded that it was looked at", how("diagnose_curves")
        )
    return not_done("no curves are drawn", f"fit draws them with fastloop[plots]; {how('diagnose_curves')}")


def organized(run: RunFolder) -> Answer:
    there = {"run.json": run.starts, "metrics.jsonl": run.rows, "checkpoints": run.checkpoints}
    missing = [name for name, content in there.items() if not content]
    damaged = [*run.damaged, *run.damaged_checkpoints]
    if missing or damaged:
        text = "; ".join(
            [f"{name} is missing or empty" for name in missing] + [f"{name} is damaged" for name in damaged]
        )
        return not_done(text, "a run of fit() with run_dir= makes all of them")
    return done("settings, metrics and checkpoints are in one folder, and can be read")


def _rows(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The formats of an export, whatever the report calls them."""
    lists = [value for value in details.values() if isinstance(value, list)]
    return [row for rows in lists for row in rows if isinstance(row, dict) and "format" in row]
