# SPDX-License-Identifier: Apache-2.0
"""Rules about what is set up before the training: model, loss, optimizer, schedule, precision, seed, baselines."""

from __future__ import annotations

import math
from typing import Any

from fastloop import texts
from fastloop.recipes.checklist.answers import (
    Answer,
    done,
    no_description,
    not_applicable,
    not_done,
    practised,
    unknown,
)
from fastloop.recipes.checklist.practices import how
from fastloop.recipes.tracking.run_folder import RunFolder

RECURRENT = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
OF_THE_LOSS = ("loss", "targets", "output", "softmax", "sigmoid")  # in the place of a finding or in what it says

baselines_there = practised("baselines", also="task")


def overfits_a_batch(run: RunFolder) -> Answer:
    details = run.practices.get("overfit_one_batch")
    if details is None:
        return not_done("overfit_one_batch is not recorded", how("overfit_one_batch"))
    if details.get("passed") is False:
        return not_done(f"overfit_one_batch did not pass: {details.get('verdict')}", "diagnose(model, loss_fn, batch)")
    return done(f"overfit_one_batch passed after {details.get('steps')} steps")


def rate_found(run: RunFolder) -> Answer:
    if "lr_range_test" in run.practices:
        rate = run.practices["lr_range_test"].get("lr")
        return done("lr_range_test is recorded" + (f", learning rate {texts.number(rate)}" if _number(rate) else ""))
    best = (run.practices.get("search", {}).get("best") or {}).get("settings") or {}
    for key, rate in best.items():
        if key.rpartition(".")[2] in ("lr", "learning_rate", "max_lr"):
            return done(f"search is recorded, best {key} {texts.number(rate)}")
    return not_done("neither lr_range_test nor a search of the learning rate is recorded", how("lr_range_test"))


def on_device(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    return done(f"the loop has moved the model to {run.start['device']}, and each batch")


def initialized(run: RunFolder) -> Answer:
    if "initialize_weights" in run.practices:
        return done("initialize_weights is recorded")
    details = run.practices.get("check_initial_gradients")
    if details is None:
        return unknown("nothing tells how the weights were made", how("check_initial_gradients"))
    bad = [each for each in details.get("findings") or () if each.get("level") in ("error", "warning")]
    if bad:
        return not_done(f"check_initial_gradients: {bad[0].get('what')}", how("initialize_weights"))
    return done("check_initial_gradients found the first gradients in range")


def counted(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    model = run.start["model"]
    return done(f"run.json: {model['class']}, {model['parameters']} parameters, {model['trainable']} of them trained")


def verified(run: RunFolder) -> Answer:
    passed = overfits_a_batch(run)
    if passed.status == "done":
        return passed
    if "model_summary" in run.practices:
        return done("model_summary is recorded")
    return not_done("neither model_summary nor a passed overfit_one_batch is recorded", how("model_summary"))


def loss_fits(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    name = (run.start["loss"] or {"class": "a loss of your own loop"})["class"]
    if run.checks is None:
        return unknown(f"{name}; no checks were run before the training", how("preflight"))
    errors = [each for each in run.checks if each.get("level") == "error"]
    errors = [each for each in errors if any(word in f"{each.get('where')} {each['what']}" for word in OF_THE_LOSS)]
    if errors:
        return not_done(f"checks.json: {errors[0].get('what')}", str(errors[0].get("remedy")))
    return done(f"{name}; the checks before the training found no error in it")


def optimizer(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    groups = run.start["optimizer"]["groups"]
    group = groups[0] if groups else {}
    rate = group.get("initial_lr", group.get("lr"))
    shown = {"lr": rate, **{name: group.get(name) for name in ("betas", "momentum", "weight_decay")}}
    text = ", ".join(f"{name} {texts.number(value)}" for name, value in shown.items() if value is not None)
    return done(f"{run.start['optimizer']['class'].rpartition('.')[2]}: {text}")


def groups(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    found = run.start["optimizer"]["groups"]
    if len(found) > 1:
        rates = ", ".join(texts.number(each.get("initial_lr", each.get("lr"))) for each in found)
        return done(f"{len(found)} groups, with learning rates {rates}")
    return not_applicable("one group for all parameters; parameter_groups(model, lr) makes several")


def scheduled(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    schedule = run.start["schedule"]
    rates = [value for _, value in run.points("lr") if math.isfinite(value)]
    name = schedule.get("name") if isinstance(schedule, dict) else schedule
    if len(set(rates)) > 1:
        by = name or "what the run itself did"
        return done(f"{by}: learning rates from {min(rates):.3g} to {max(rates):.3g}, the last {rates[-1]:.3g}")
    if name is None or name == "constant":
        return not_done(
            "the learning rate is constant", 'Loop(schedule={"name": "warmup_cosine", "warmup_steps": 0.05})'
        )
    if name == "plateau":
        return done("plateau is set; the metric has not stopped improving, so the rate was not lowered")
    if len(rates) > 3:
        return not_done(
            f"{name} is set, and the learning rate was {rates[0]:.3g} in all rows", "plot_schedule shows it"
        )
    return done(f"{name} is set; too few rows to see it")


def configured(run: RunFolder) -> Answer:
    """Optimizer and schedule."""
    rate = scheduled(run)
    return rate if rate.status != "done" else done(f"{optimizer(run).evidence}; {rate.evidence}")


def clipping(run: RunFolder) -> str | None:
    """The bounds of the gradients in words; None without any. Of a run with a description."""
    options = run.start["options"]
    found = {name: options.get(name) for name in ("max_grad_norm", "max_grad_value")}
    for group in run.start["optimizer"]["groups"]:
        for name in found:
            found[name] = found[name] if found[name] is not None else _finite(group.get(name))
    return ", ".join(f"{name}={value}" for name, value in found.items() if value is not None) or None


def clipped(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    bounds = clipping(run)
    return done(bounds) if bounds else not_done("gradients are not clipped", "Loop(max_grad_norm=1.0)")


def clipped_if_recurrent(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    found = [name for name in RECURRENT if name in run.start["model"]["layers"]]
    if clipping(run) or found:
        answer = clipped(run)
        return Answer(answer.status, answer.evidence + (f" (the model has {found[0]})" if found else ""))
    return not_applicable("the model has no recurrent layer, and gradients are not clipped")


def accumulated(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    steps, size = run.start["options"]["accumulation_steps"], run.start["train_loader"].get("batch_size")
    if steps == 1:
        return not_applicable(f"a window is one batch of {size}")
    return done(f"a window is {steps} batches of {size}")


def mixed_precision(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    precision, device = run.start["precision"], run.start["device"]
    if precision != "fp32":
        return done(f'precision="{precision}"')
    if device.partition(":")[0] == "cpu":
        return not_applicable("fp32 on a CPU, where lower precision is rarely faster")
    return not_done(f"fp32 on {run.start.get('gpu') or device}", 'Loop(precision="auto")')


def seeded(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    seed = run.start["options"]["seed"]
    if seed is None:
        return not_done("no seed is set", "Loop(seed=0), with deterministic=True for bitwise the same run on a GPU")
    also = ", deterministic algorithms" if run.start["options"]["deterministic"] else ""
    return done(f"seed={seed}{also}")


def early_stopping(run: RunFolder) -> Answer:
    if not run.start:
        return no_description(run)
    patience = run.start["options"]["patience"]
    if patience is None:
        return not_done("the run goes on to its end whatever the validation says", "Loop(patience=10)")
    metric = next(iter(run.start["monitors"]))
    ended = " (it ended the run)" if run.start.get("end", {}).get("reason") == "patience" else ""
    return done(f"patience={patience} evaluations of {metric}{ended}")


def compared_with_baselines(run: RunFolder) -> Answer:
    scores = run.practices.get("baselines", {}).get("scores")
    if not isinstance(scores, dict) or not scores:
        return not_done("no baselines are recorded", how("baselines"))
    for metric, pick in (("accuracy", max), ("mse", min), ("loss", min)):
        own = _own(run, metric, pick)
        if own is None and metric == "mse" and ((run.start.get("loss") or {}).get("class", "")).endswith(".MSELoss"):
            own = _own(run, "loss", pick)
        theirs = {name: each[metric] for name, each in scores.items() if _number(each.get(metric))}
        if own is None or not theirs:
            continue
        name = pick(theirs, key=lambda each: theirs[each])
        better = own > theirs[name] if pick is max else own < theirs[name]
        verdict = "better than" if better else "NOT better than"
        return done(f"{metric} {own:.4g} is {verdict} the best baseline, {name} with {theirs[name]:.4g}")
    return unknown("the run has logged no metric that the baselines have", "baselines(...).table(model={...})")


def _own(run: RunFolder, metric: str, pick: Any) -> float | None:
    for part in ("test", "val"):
        values = [value for _, value in run.points(f"{part}/{metric}") if math.isfinite(value)]
        if values:
            return float(pick(values))
    return None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> Any:
    return value if _number(value) and math.isfinite(value) else None
