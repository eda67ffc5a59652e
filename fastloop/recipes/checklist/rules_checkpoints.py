# SPDX-License-Identifier: Apache-2.0
"""Rules about checkpoints: their manifests are read, their tensors are not."""

from __future__ import annotations

import math

from fastloop.recipes.checklist.answers import (
    Answer,
    Rule,
    done,
    no_description,
    no_rows,
    not_applicable,
    not_done,
    unknown,
)
from fastloop.recipes.tracking.run_folder import RunFolder

ACCURACY = ("accuracy", "acc", "top1", "f1")


def none_saved(run: RunFolder) -> Answer:
    damaged = run.damaged_checkpoints
    found = f"no whole checkpoint; damaged: {', '.join(damaged)}" if damaged else "there is no checkpoint"
    return not_done(found, "Loop(run_dir=..., save_every_epochs=1)")


def regularly(run: RunFolder) -> Answer:
    if not run.checkpoints:
        return none_saved(run)
    kept = f"{len(run.checkpoints)} whole checkpoints" + _damaged(run)
    if not run.start:
        return done(kept) if len(run.checkpoints) > 1 else no_description(run)
    options = run.start["options"]
    often = {name: options[f"save_every_{name}"] for name in ("epochs", "steps", "minutes")}
    said = ", ".join(f"save_every_{name}={value:g}" for name, value in often.items() if value is not None)
    if not said:
        return not_done(f"{kept}, and none was asked for before the end", "Loop(save_every_steps=...)")
    return done(f"{said}; {kept}")


def each_epoch(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    if not run.checkpoints:
        return none_saved(run)
    every = run.start["options"]["save_every_epochs"]
    if every != 1:
        return not_done(f"save_every_epochs={every}", "Loop(save_every_epochs=1) where a run is critical")
    return done("save_every_epochs=1")


def last_kept(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    if not run.checkpoints:
        return none_saved(run)
    size = sum(each.manifest["size"] for each in run.checkpoints)
    return done(f"keep_last={run.start['options']['keep_last']}; {len(run.checkpoints)} there, {_bytes(size)}")


def folder_made(run: RunFolder) -> Answer:
    if (run.path / "checkpoints").is_dir():
        return done("run_dir/checkpoints is there")
    return not_done("there is no run_dir/checkpoints", "Loop(run_dir=...)")


def sizes_watched(run: RunFolder) -> Answer:
    if not run.checkpoints:
        return none_saved(run)
    sizes = [each.manifest["size"] for each in run.checkpoints]
    return done(f"each manifest has it: {_bytes(min(sizes))} to {_bytes(max(sizes))}, in all {_bytes(sum(sizes))}")


# ---- the best


def best_by_loss(run: RunFolder) -> Answer:
    return _best_by(run, "val/loss")


def best_by_accuracy(run: RunFolder) -> Answer:
    names = [name for name in run.metrics if name.startswith("val/") and name.rpartition("/")[2].lower() in ACCURACY]
    if not run.rows:
        return no_rows(run)
    if not names:
        return not_applicable("the run logs no accuracy")
    monitored = [name for name in names if name in run.start.get("monitors", {})]
    return _best_by(run, (monitored or names)[0])


def _best_by(run: RunFolder, metric: str) -> Answer:
    """Whether the checkpoint of the best value that the rows show is there."""
    if not run.start:
        return no_description(run)
    mode = run.start["monitors"].get(metric)
    values = [value for _, value in run.points(metric) if math.isfinite(value)]
    if not values:
        return not_done(f"{metric} is logged in no row", "fit(train_loader, val_loader, ...)")
    if mode is None or not run.start["options"]["keep_best"]:
        return not_done(
            f"{metric} is not what checkpoints are kept by", f"Loop(monitor=[..., {metric!r}], keep_best=1)"
        )
    best = run.best_checkpoint(metric, mode)
    if best is None:
        return not_done(f"no whole checkpoint has {metric}", "see which are damaged: python -m fastloop.loop inspect")
    value, wanted = best.manifest["metrics"][metric], (min if mode == "min" else max)(values)
    if value != wanted and not math.isclose(value, wanted, rel_tol=1e-9):
        return not_done(
            f"the best {metric} in the rows is {wanted:.6g}, the best checkpoint's is {value:.6g}",
            "its checkpoint is gone or damaged; Loop(keep_best=1) keeps it",
        )
    return done(f"{best.name} has the best {metric}, {value:.6g}")


def metrics_apart(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    monitors = run.start["monitors"]
    if len(monitors) > 1:
        return done(f"a best checkpoint for each of {', '.join(monitors)}, in folders of their own")
    names = [name for name in run.metrics if name.startswith("val/")]
    if len(names) < 2:
        return not_applicable("there is one metric of the validation, or none")
    return not_done(f"checkpoints are kept by {next(iter(monitors))} alone", f"Loop(monitor={names!r}, mode=[...])")


def best_with_config(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    answer = best_known(run)
    if answer.status != "done":
        return answer
    where = "config.json" if (run.path / "config.json").exists() else "run.json"
    return done(f"{answer.evidence}; the settings are in {where}")


def best_known(run: RunFolder) -> Answer:
    """The best by the first metric that checkpoints are kept by."""
    if not run.start:
        return no_description(run)
    return _best_by(run, next(iter(run.start["monitors"])))


# ---- in an emergency


def on_signal(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    if not run.checkpoints:
        return none_saved(run)
    stopped = [start["end"] for start in run.starts if start.get("end", {}).get("reason", "").startswith("SIG")]
    if stopped:
        saved = any(each.step >= stopped[-1]["step"] for each in run.checkpoints)
        if not saved:
            reason, step = stopped[-1]["reason"], stopped[-1]["step"]
            return not_done(f"{reason} came at step {step}, and no whole checkpoint is of it", "see logs/rank-0.log")
        return done(f"the run has met {stopped[-1]['reason']} at step {stopped[-1]['step']} and was saved")
    return done("SIGTERM, SIGINT and SIGUSR1 make the loop save at the end of the window")


def on_error(what: str) -> Rule:
    """A rule: done where an exception out of the training is followed by a save."""

    def rule(run: RunFolder) -> Answer:
        if not run.start:
            return no_description(run)
        if not run.checkpoints:
            return none_saved(run)
        if run.start["ranks"] > 1:
            return not_done(
                f"{what} of one rank is not saved, since the others may be anywhere", "save_every_minutes=10"
            )
        if run.start["by"] != "fit":
            return unknown("the loop around windows() is your own code", "put it inside of `with loop:`")
        return done(f"fit saves what there is after {what}, at the last whole window")

    return rule


def _damaged(run: RunFolder) -> str:
    return f", damaged: {', '.join(run.damaged_checkpoints)}" if run.damaged_checkpoints else ""


def _bytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
