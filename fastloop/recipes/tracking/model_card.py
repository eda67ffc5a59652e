# SPDX-License-Identifier: Apache-2.0
"""A model card in Markdown, of what the run's folder knows (Mitchell et al., https://arxiv.org/abs/1810.03993)."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from fastloop import texts
from fastloop.loop.files import replace_file
from fastloop.loop.plain import flattened
from fastloop.recipes.tracking.run_folder import RunFolder

FILE = "MODEL_CARD.md"
MOST = 200  # characters of a cell
Rows = list[list[Any]]


def model_card(
    run_dir: str | os.PathLike[str],
    *,
    name: str | None = None,
    intended_use: str | None = None,
    limitations: str | None = None,
    results: Mapping[str, Any] | None = None,
) -> str:
    """Write `run_dir/MODEL_CARD.md` and return its text.

    What the run's folder knows is filled in: model, training data, hyperparameters, results, baselines, error analysis,
    how to load the weights. What nobody has said is named as missing, so that a reader does not take it for nothing.

    Args:
        run_dir: of a run.
        name: of the model; None for the folder's.
        intended_use, limitations: in the author's words; Markdown.
        results: of evaluations outside of the run, as {"test/accuracy": 0.93}.

    Raises:
        FileNotFoundError: no such run.
        OSError: the card cannot be written.
    """
    run = RunFolder(run_dir)
    sections: dict[str, Callable[[], str]] = {
        "Model": lambda: _model(run),
        "Intended use": lambda: intended_use or _missing("intended use", "intended_use="),
        "Limitations": lambda: _limitations(run, limitations),
        "Training data": lambda: _data(run),
        "Training": lambda: _training(run),
        "Hyperparameters": lambda: _hyperparameters(run),
        "Evaluation": lambda: _evaluation(run, results or {}),
        "Error analysis": lambda: _errors(run),
        "How to load the weights": lambda: _loading(run),
        "What was done": lambda: _practices(run),
    }
    title = name or run.path.absolute().name
    text = f"# {title}\n\n" + "\n".join(f"## {head}\n\n{_tried(body)}\n" for head, body in sections.items())
    replace_file(run.path / FILE, text)
    return text


def _tried(section: Callable[[], str]) -> str:
    """A file may be whole JSON and still not be as the loop writes it."""
    try:
        return section().rstrip()
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        return f"Unknown: the run's files are not as fastloop writes them ({type(error).__name__}: {error})."


def _missing(what: str, argument: str) -> str:
    return f"Not stated: nobody has written down the {what} (`model_card(..., {argument})`)."


def _unknown(file: str) -> str:
    return f"Unknown: the run's folder has no {file} that can be read."


def _table(head: list[str], rows: Rows) -> str:
    cut = [
        [cell[: MOST - 3] + "..." if isinstance(cell, str) and len(cell) > MOST else cell for cell in r] for r in rows
    ]
    return texts.markdown(head, cut)


def _model(run: RunFolder) -> str:
    model = run.start.get("model")
    if model is None:
        info = run.checkpoints[0].manifest["info"] if run.checkpoints else None
        if info is None:
            return _unknown("run.json")
        return _table(["", ""], [["class", info.get("model")], ["parameters", info.get("parameters")]])
    layers = ", ".join(f"{count} {name}" for name, count in model["layers"].items())
    rows: Rows = [
        ["class", model["class"]],
        ["parameters", model["parameters"]],
        ["of these trained", model["trainable"]],
        ["bytes", model["bytes"]],
        ["layers", layers],
    ]
    return _table(["", ""], rows)


def _limitations(run: RunFolder, given: str | None) -> str:
    parts = [given or _missing("limitations", "limitations=")]
    found = [each for each in run.checks or () if each.get("level") in ("error", "warning")]
    if found:
        parts.append("The checks before the training found:")
        parts.append("\n".join(f"- {each.get('where', '')}: {each.get('what', '')}" for each in found))
    return "\n\n".join(parts)


def _data(run: RunFolder) -> str:
    if not run.start:
        return _unknown("run.json")
    rows: Rows = []
    for title, key in (("training", "train_loader"), ("validation", "val_loader")):
        loader = run.start.get(key)
        if loader is None:
            rows.append([title, None, None, None, None, None])
            continue
        data = loader.get("dataset") or {}
        transforms = ", ".join(data.get("transforms", ())) or None
        cells = [data.get("class", loader["class"]), data.get("length"), loader.get("batch_size"), loader["shuffle"]]
        rows.append([title, *cells, transforms])
    text = _table(["part", "data set", "samples", "batch size", "shuffled", "transforms"], rows)
    analysis = run.practices.get("analyze")
    if analysis:
        shown = {key: value for key, value in analysis.items() if key in ("size", "shapes", "labels", "imbalance")}
        text += "\n\nAnalysis of the data set: " + f"`{json.dumps(shown)[: 3 * MOST]}`"
    return text


def _training(run: RunFolder) -> str:
    start = run.start
    if not start:
        return _unknown("run.json")
    first, ended = run.starts[0], start.get("end") or {}
    hardware = start.get("gpu") or start["device"]
    versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items() if version)
    rows: Rows = [
        ["begun", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(first["time"]))],
        ["ended by", ended.get("reason", "nothing: it was killed, or runs still")],
        ["starts (resumed runs have several)", len(run.starts) + first.get("left_out", {}).get("starts", 0)],
        ["windows (optimizer steps)", run.steps],
        ["epochs", ended.get("epoch")],
        ["seconds", run.seconds],
        ["hardware", f"{start['ranks']} x {hardware}"],
        ["precision", start["precision"]],
        ["versions", versions],
    ]
    return _table(["", ""], rows)


def _hyperparameters(run: RunFolder) -> str:
    start = run.start
    rows: Rows = []
    if start:
        optimizer, options = start["optimizer"], start["options"]
        rows.append(["optimizer", optimizer["class"]])
        for i, group in enumerate(optimizer["groups"]):
            prefix = "" if len(optimizer["groups"]) == 1 else f"group {i}: "
            settings = {"lr": group.get("initial_lr", group.get("lr"))}
            settings |= {key: group.get(key) for key in ("betas", "momentum", "eps", "weight_decay", "parameters")}
            rows += [[prefix + key, _cell(value)] for key, value in settings.items() if value is not None]
        named = ("schedule", "accumulation_steps", "max_grad_norm", "max_grad_value", "patience", "seed", "monitor")
        rows += [[name, _cell(options.get(name))] for name in named]
        rows.append(["loss", _cell(start["loss"])])
        rows += [["epochs asked for", start["epochs"]], ["windows asked for", start["max_steps"]]]
    rows += [[f"config: {key}", _cell(value)] for key, value in flattened(run.config).items()]
    return _table(["setting", "value"], rows) if rows else _unknown("run.json or config.json")


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list)) else value


def _evaluation(run: RunFolder, results: Mapping[str, Any]) -> str:
    parts = []
    rows: Rows = []
    for metric in (name for name in run.metrics if name.partition("/")[0] in ("train", "val", "test")):
        points = [(step, value) for step, value in run.points(metric) if math.isfinite(value)]
        if points:
            low, high = min(points, key=_value), max(points, key=_value)
            rows.append([metric, points[-1][1], points[-1][0], low[1], low[0], high[1], high[0]])
    if rows:
        parts.append(_table(["metric", "last", "at step", "lowest", "at step", "highest", "at step"], rows))
    for metric, mode in (run.start.get("monitors") or {}).items():
        best = run.best_checkpoint(metric, mode)
        if best is not None:
            values = ", ".join(f"{key} {texts.number(float(v))}" for key, v in sorted(best.manifest["metrics"].items()))
            parts.append(f"Best checkpoint by {metric} ({mode}): `{best.name}` ({values}).")
    if results:
        parts.append("Of evaluations outside of the run:")
        parts.append(_table(["metric", "value"], [[key, _cell(value)] for key, value in results.items()]))
    tested = run.practices.get("test set evaluated")
    if tested:
        parts.append("On the test set: `" + json.dumps(_without_time(tested))[: 3 * MOST] + "`")
    parts.append(_baselines(run))
    return "\n\n".join(parts)


def _value(point: tuple[int, float]) -> float:
    return point[1]


def _baselines(run: RunFolder) -> str:
    scores = run.practices.get("baselines", {}).get("scores")
    if not isinstance(scores, dict) or not scores:
        return "Baselines: none are recorded (`baselines(train, test).record(run_dir)`)."
    kinds = sorted({kind for each in scores.values() if isinstance(each, dict) for kind in each})
    rows = [[name, *(each.get(kind) for kind in kinds)] for name, each in scores.items() if isinstance(each, dict)]
    return "Baselines:\n\n" + _table(["baseline", *kinds], rows)


def _errors(run: RunFolder) -> str:
    details = run.practices.get("error_analysis")
    if details is None:
        return "None is recorded (`error_analysis(model, data).record(run_dir)`)."
    numbers = {"samples": details.get("samples"), **(details.get("metrics") or {})}
    numbers = {key: value for key, value in numbers.items() if isinstance(value, (int, float))}
    findings = [each for each in details.get("findings") or () if isinstance(each, dict)]
    parts = [_table(["", ""], [[key, value] for key, value in numbers.items()])] if numbers else []
    parts += ["\n".join(f"- {each.get('where', '')}: {each.get('what', '')}" for each in findings)] if findings else []
    groups = details.get("groups")
    if groups:
        parts.append("By group: `" + json.dumps(groups)[: 3 * MOST] + "`")
    return "\n\n".join(parts) or "Recorded, without numbers."


def _loading(run: RunFolder) -> str:
    if not run.checkpoints:
        return "There is no whole checkpoint in this folder."
    monitors = run.start.get("monitors") or {}
    found = (run.best_checkpoint(metric, mode) for metric, mode in monitors.items())
    chosen = next((each for each in found if each is not None), run.checkpoints[0])
    return (
        f"```\npython -m fastloop.loop export checkpoints/{chosen.name} -o model.safetensors\n```\n\n"
        "```python\nfrom safetensors.torch import load_file\n\n"
        'model.load_state_dict(load_file("model.safetensors"))\nmodel.eval()\n```'
    )


def _practices(run: RunFolder) -> str:
    rows = [[practice, _day(details)] for practice, details in run.practices.items()]
    return _table(["practice", "recorded"], rows) if rows else "Nothing is recorded in practices.jsonl."


def _day(details: Mapping[str, Any]) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(details["time"]))


def _without_time(details: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in details.items() if key != "time"}
