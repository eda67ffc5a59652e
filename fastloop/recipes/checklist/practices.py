# SPDX-License-Identifier: Apache-2.0
"""The names that `record(run_dir, name, details)` and `result.record(run_dir)` write down, and who writes them."""

from __future__ import annotations

# By name: how it comes to be recorded. Functions first, in the order in which a training meets them.
FUNCTIONS = {
    "analyze": "analyze(dataset).record(run_dir)",
    "split": "split(dataset).record(run_dir)",
    "fit_normalization": "fit_normalization(train).record(run_dir)",
    "balance": "balance(dataset).record(run_dir)",
    "augmentation_grid": 'augmentation_grid(dataset, path), then record(run_dir, "augmentation_grid", {"path": path})',
    "baselines": "baselines(train, test).record(run_dir)",
    "model_summary": "model_summary(model, batch).record(run_dir)",
    "initialize_weights": 'initialize_weights(model), then record(run_dir, "initialize_weights")',
    "check_initial_gradients": "check_initial_gradients(model, loss_fn, batch).record(run_dir)",
    "check_gradients": "check_gradients(model, loss_fn, batch).record(run_dir)",
    "layer_statistics": "layer_statistics(model, loss_fn, batch).record(run_dir)",
    "dead_relus": "dead_relus(model, batch).record(run_dir)",
    "overfit_one_batch": "overfit_one_batch(model, loss_fn, batch).record(run_dir)",
    "lr_range_test": '`python -m fastloop.bench tune lr`, then record(run_dir, "lr_range_test", {"lr": lr})',
    "search": "search(target, ...).record(run_dir)",
    "search_dropout": "search_dropout(build, train, validation, loss_fn=...).record(run_dir)",
    "suggest_finetuning": "suggest_finetuning(samples, similarity).record(run_dir)",
    "preflight": "Loop(check=True), which writes checks.json",
    "diagnose": "diagnose(model, loss_fn, batch, optimizer).record(run_dir)",
    "diagnose_curves": 'diagnose_curves(run_dir), then record(run_dir, "diagnose_curves", {"findings": ...})',
    "diagnose_plateau": "diagnose_plateau(run_dir).record(run_dir)",
    "compare_experiments": "compare_experiments(base).record(run_dir)",
    "error_analysis": "error_analysis(model, data).record(run_dir)",
    "compare_models": "compare_models(a, b, data).record(run_dir)",
    "export_model": "export_model(model, example, folder).record(run_dir)",
    "fuse_conv_bn": 'fuse_conv_bn(model), then record(run_dir, "fuse_conv_bn")',
    "half_precision": 'half_precision(model), then record(run_dir, "half_precision")',
    "quantize_int8": 'quantize_int8(model), then record(run_dir, "quantize_int8")',
    "verify_copy": "verify_copy(model, copy, example, tolerance=...).record(run_dir)",
    "prune": "prune(model, amount).record(run_dir)",
    "drift_report": "drift_report(reference, current).record(run_dir)",
    "checklist": "checklist(run_dir).record(run_dir)",
}

# What no function does: a person writes it down.
FREE = {
    "data visualized": "samples of the data set were looked at",
    "test set evaluated": "the model was evaluated on the test set, its scores being the details",
    "fairness checked": "the model was checked for bias between groups",
    "label smoothing considered": "label smoothing was weighed, and chosen or not",
    "memory estimated": "the GPU's memory was planned",
    "production monitored": "it is decided what is watched in production",
    "update planned": "it is decided how and when the deployed model is replaced",
    "deployment documented": "the deployment is described, and where",
}


def how(practice: str) -> str:
    """What to do so that the practice is recorded."""
    if practice in FUNCTIONS:
        return FUNCTIONS[practice]
    return f'record(run_dir, "{practice}", {{...}}) once {FREE[practice]}'
