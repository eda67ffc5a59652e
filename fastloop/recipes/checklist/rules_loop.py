# SPDX-License-Identifier: Apache-2.0
"""Rules about the training itself: what the loop does by construction, and what its rows show."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
from fastloop.recipes.checklist.rules_model import clipping, scheduled
from fastloop.recipes.tracking.run_folder import RunFolder

SERVICES = ("tensorboard", "wandb", "mlflow")
BUSY = 0.9  # of the GPU, that the documents ask for


def by_construction(reason: str, with_fit_only: bool = False) -> Rule:
    """A rule: the loop does it in each window, so it is done where there were windows.

    Args:
        with_fit_only: in a loop around `windows()` it is the user's own code.
    """

    def rule(run: RunFolder) -> Answer:
        if run.steps == 0:
            return not_done("no window was trained", "loop.fit(train_loader, ...)")
        if with_fit_only:
            if not run.start:
                return no_description(run)
            if run.start["by"] != "fit":
                return unknown("the loop around windows() is your own code", "fit() does it")
        return done(f"{reason}; {run.steps} windows were trained")

    return rule


def loss_computed(run: RunFolder) -> Answer:
    losses = run.points("train/loss")
    if not losses:
        return no_rows(run)
    finite = [value for _, value in losses if math.isfinite(value)]
    if not finite:
        return not_done("no row has a finite train/loss", "diagnose(model, loss_fn, batch, optimizer)")
    return done(f"train/loss from {finite[0]:.4g} to {finite[-1]:.4g} in {len(losses)} rows")


def loss_scaled(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    steps = run.start["options"]["accumulation_steps"]
    if steps == 1:
        return not_applicable("a window is one batch")
    return done(f"loop.backward weighs each of the {steps} losses by its samples, in a shorter last window too")


def clipped_if_asked(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    bounds = clipping(run)
    if bounds is None:
        return not_applicable("no bound is set")
    return done(f"{bounds}, after the loss scale is divided out and before the update")


def updated(run: RunFolder) -> Answer:
    skipped = [value for _, value in run.points("skipped")]
    if run.steps == 0:
        return not_done("no window was trained", "loop.fit(train_loader, ...)")
    if skipped and skipped[-1] >= run.steps:
        return not_done(f"all {run.steps} windows were skipped", "diagnose(model, loss_fn, batch, optimizer)")
    left = f", {int(skipped[-1])} of them skipped" if skipped and skipped[-1] else ""
    return done(f"loop.step updates once a window; {run.steps} windows were trained{left}")


def evaluated(reason: str) -> Rule:
    """A rule: done by `evaluate`, where the run was evaluated."""

    def rule(run: RunFolder) -> Answer:
        names = [name for name in run.metrics if name.partition("/")[0] in ("val", "test")]
        if not names:
            return not_done("the run was never evaluated", "fit(train_loader, val_loader, ...)")
        return done(f"{reason}; {len(run.points(names[0]))} evaluations are logged")

    return rule


def schedule_stepped(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    answer = scheduled(run)
    if run.start["schedule"] is None and answer.status != "done":
        return not_applicable("no schedule is set")
    return answer


def logged_and_saved(run: RunFolder) -> Answer:
    if not run.rows:
        return no_rows(run)
    if not run.checkpoints:
        return not_done(f"{len(run.rows)} rows, and no whole checkpoint", "Loop(run_dir=..., save_every_epochs=1)")
    return done(f"{len(run.rows)} rows, {len(run.checkpoints)} checkpoints")


# ---- what is watched


def both_losses(run: RunFolder) -> Answer:
    train, val = run.points("train/loss"), run.points("val/loss")
    if not train:
        return no_rows(run)
    if not val:
        return not_done("train/loss is logged, val/loss is not", "fit(train_loader, val_loader, ...)")
    return done(f"train/loss {train[-1][1]:.4g}, val/loss {val[-1][1]:.4g}, in {len(train)} and {len(val)} rows")


def tracked(run: RunFolder) -> Answer:
    if not run.rows:
        return no_rows(run)
    services = [name for name in SERVICES if name in run.start.get("loggers", ())]
    if services:
        return done(f"{len(run.rows)} rows, in {', '.join(services)} too")
    if run.config:
        return done(f"{len(run.rows)} rows, and the config that made them")
    return not_done(
        f"{len(run.rows)} rows, and no config that tells runs apart", "Experiment(config), Loop(config=...)"
    )


def logging_set_up(run: RunFolder) -> Answer:
    if not run.rows:
        return no_rows(run)
    return done(f"{len(run.rows)} rows of {len(run.metrics)} metrics" + _damage(run, "metrics.jsonl"))


def nonfinite_watched(run: RunFolder) -> Answer:
    if not run.rows:
        return no_rows(run)
    skipped = max((value for _, value in run.points("skipped")), default=0.0)
    odd = [step for step, value in run.points("train/loss") if not math.isfinite(value)]
    found = (
        f", train/loss is not finite in {len(odd)} rows, first at step {odd[0]}" if odd else ", train/loss is finite"
    )
    return done(f"the loop looks at each window: {int(skipped)} were skipped{found}")


def gradients_watched(run: RunFolder) -> Answer:
    norms = run.points("grad_norm")
    if not norms:
        return not_done("no row has grad_norm", "Loop(log_every=...) below the number of windows")
    finite = [value for _, value in norms if math.isfinite(value)]
    if not finite:
        return not_done("grad_norm is finite in no row", "diagnose(model, loss_fn, batch, optimizer)")
    return done(f"grad_norm from {min(finite):.3g} to {max(finite):.3g} in {len(norms)} rows")


def rate_watched(run: RunFolder) -> Answer:
    rates = run.points("lr")
    return done(f"lr in {len(rates)} rows, the last {rates[-1][1]:.3g}") if rates else no_rows(run)


def memory_watched(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    if run.start["device"].partition(":")[0] != "cuda":
        return not_applicable(f"the run is on {run.start['device']}")
    peaks = [value for _, value in run.points("memory/peak")]
    return done(f"memory/peak is at most {max(peaks) / 2**30:.2f} GiB") if peaks else no_rows(run)


def memory_estimated(run: RunFolder) -> Answer:
    if "memory estimated" in run.practices:
        return done("'memory estimated' is recorded")
    return memory_watched(run)


def speed_watched(run: RunFolder) -> Answer:
    speeds = [value for _, value in run.points("samples/s") if math.isfinite(value)]
    if not speeds:
        return not_done("no row has samples/s", "Loop(log_every=...) below the number of windows")
    return done(f"samples/s in {len(speeds)} rows, the last {speeds[-1]:.4g}")


def gpu_used(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    if run.start["device"].partition(":")[0] != "cuda":
        return not_applicable(f"the run is on {run.start['device']}")
    shares = [value for _, value in run.points("system/gpu_utilization") if math.isfinite(value)]
    if not shares:
        return not_done("the GPU's utilization is not logged", "Loop(system_every_seconds=1.0)")
    text = f"the GPU was used {_mean(shares):.0%} of the time in {len(shares)} rows"
    return (
        done(text) if _mean(shares) >= BUSY else not_done(text, "python -m fastloop.bench tune finds what it waits for")
    )


def convergence(run: RunFolder) -> Answer:
    for name in ("diagnose_plateau", "diagnose_curves"):
        if name in run.practices:
            return done(f"{name} is recorded")
    for metric in ("val/loss", "train/loss"):
        values = [value for _, value in run.points(metric) if math.isfinite(value)]
        if len(values) > 1:
            return done(f"{metric} from {values[0]:.4g} to {values[-1]:.4g}, the lowest {min(values):.4g}")
    return not_done("fewer than two rows have a loss", "diagnose_plateau(run_dir) once there are more")


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _damage(run: RunFolder, name: str) -> str:
    return f" ({run.damaged[name]})" if name in run.damaged else ""
