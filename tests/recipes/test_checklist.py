# SPDX-License-Identifier: Apache-2.0
"""The checklist: each line on a run where nothing was done, on one where everything was, and on what contradicts it."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import fastloop.recipes
from fastloop import AdamW, Loop
from fastloop.recipes.checklist import checklist, command, items, practices
from fastloop.recipes.checklist.answers import STATUSES, Answer, done, not_applicable, not_done, parts, unknown
from fastloop.recipes.evidence import record
from fastloop.recipes.results import Result
from fastloop.recipes.tracking import model_card
from fastloop.recipes.tracking.run_folder import NoSuchRun, RunFolder

# ---- two runs


class RandomFlip:
    def __call__(self, x: Any) -> Any:
        return x


class Normalize(RandomFlip):
    pass


class Images(TensorDataset):
    def __init__(self, *transforms: Any) -> None:
        super().__init__(torch.randn(16, 1, 4, 4), torch.arange(16) % 2)
        self.transform = list(transforms)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8, 2))


def trained_barely(run_dir: Path) -> None:
    """What a user gets who asks for nothing."""
    model = network()
    loss = torch.nn.CrossEntropyLoss()
    loop = Loop(
        model, AdamW(model.parameters()), loss, run_dir=run_dir, curves=False, save_every_epochs=None, log_every=1
    )
    loop.fit(DataLoader(Images(), batch_size=4), epochs=2)


def trained_well(run_dir: Path) -> None:
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 1e-3}, {"params": model[3].parameters()}]
    loop = Loop(
        model, AdamW(groups, lr=1e-2), torch.nn.CrossEntropyLoss(label_smoothing=0.1, weight=torch.ones(2)),
        run_dir=run_dir, curves=False, log_every=1, precision="bf16", accumulation_steps=2, max_grad_norm=1.0, seed=0,
        schedule={"name": "warmup_cosine", "warmup_steps": 1}, patience=9, monitor=["val/loss", "val/accuracy"],
        mode=["min", "max"], config={"width": 2},
    )  # fmt: skip
    train = DataLoader(Images(RandomFlip(), Normalize()), batch_size=4, shuffle=True)
    val = DataLoader(Images(Normalize()), batch_size=4)
    loop.fit(train, val, epochs=2)
    loop.log_image("samples", torch.zeros(1, 4, 4))
    loop.evaluate(val, name="test")
    (run_dir / "checks.json").write_text(json.dumps({"step": 0, "findings": []}))
    for practice, details in RECORDED.items():
        record(run_dir, practice, details)
    (run_dir / "training_curves.png").write_bytes(b"")
    model_card(run_dir, intended_use="Tests.", limitations="All.")


RECORDED: dict[str, dict[str, Any]] = {
    **{name: {} for name in practices.FUNCTIONS},
    **{name: {} for name in practices.FREE},
    "overfit_one_batch": {"passed": True, "steps": 40, "verdict": "by heart"},
    "baselines": {"task": "classification", "scores": {"majority": {"accuracy": 0.0}, "linear": {"accuracy": -1.0}}},
    "analyze": {"size": 16, "imbalance": 1.0},
    "lr_range_test": {"lr": 0.01},
    "export_model": {"rows": [{"format": "onnx", "passed": True}]},
    "error_analysis": {"groups": [{"name": "a"}]},
}


@pytest.fixture(scope="module")
def bare_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare") / "run"
    trained_barely(folder)
    return folder


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full") / "run"
    trained_well(folder)
    rows = folder / "metrics.jsonl"
    waits = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text(
        "".join(json.dumps(row | ({"data_wait": 0.01} if "data_wait" in row else {})) + "\n" for row in waits)
    )
    return folder


@pytest.fixture
def bare(bare_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bare_run, tmp_path / "bare"))


@pytest.fixture
def full(full_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(full_run, tmp_path / "full"))


def answers(folder: Path, **options: Any) -> dict[str, tuple[str, str]]:
    """By section and text."""
    found = checklist(folder, **options)
    return {f"{line.section} / {line.text}": (line.status, line.evidence) for line in found.items}


def named(folder: Path, text: str) -> tuple[str, str]:
    """The first line whose section and text contain `text`."""
    return next(answer for name, answer in answers(folder).items() if text in name)


# ---- the table


def test_every_line_is_there_once() -> None:
    lines = [(item.source, item.section, item.text) for item in items.ITEMS]
    assert len(set(lines)) == len(lines)
    count = {source: sum(line[0] == source for line in lines) for source, _, _ in lines}
    # 7 + 6 + 5 + 5; 5 + 5 + 4; 14 + 5 + 13 + 12 + 10 + 7 + 6, headings with boxes of their own among them
    assert count == {items.TIPS: 23, items.STRATEGIES: 14, items.TEMPLATES: 67}


GPU = ("pinned memory", "GPU is used", "memory of the GPU")


def test_where_everything_was_done(full: Path) -> None:
    open_lines = {name: answer for name, answer in answers(full).items() if answer[0] != "done"}
    assert {answer[0] for answer in open_lines.values()} == {"not applicable"}, open_lines
    assert all(any(words in name for words in GPU) for name in open_lines), open_lines
    assert len(open_lines) == 3


# What a run has that was asked for nothing: done by the loop itself, or by torch's defaults.
BY_ITSELF = (
    "NaN and infinities", "norms of the gradients", "experiments are tracked", "on the right device", "count of the",
    "optimizer and its parameters", "1. ", "2. ", "3. ", "4. ", "6. ", "8. ", "9. ", "13. ", "the last few kept",
    "before the system", "is interrupted", "memory runs out", "emergency checkpoints", "a folder for checkpoints",
    "logging is set up", "/ learning rate", "speed in samples", "sizes of the checkpoints", "signs of convergence",
    "everything of the run", "enough workers",
)  # fmt: skip


def test_where_nothing_was_done(bare: Path) -> None:
    found = answers(bare)
    surprising = {
        name: answer for name, answer in found.items() if answer[0] == "done" and not any(w in name for w in BY_ITSELF)
    }
    assert not surprising
    counts = checklist(bare).counts
    assert counts["not done"] > 40
    assert sum(counts.values()) == len(items.ITEMS)


def test_what_is_missing_says_how_it_is_done(bare: Path) -> None:
    for name, (status, evidence) in answers(bare).items():
        if status in ("not done", "unknown"):
            assert ": " in evidence, name
        assert evidence
        assert "\n" not in evidence


def test_every_line_can_be_done_and_not_done(bare: Path, full: Path) -> None:
    """No line is answered by a constant."""
    empty = bare.parent / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    for item in items.ITEMS:
        first, second = item.rule(RunFolder(empty)), item.rule(RunFolder(full))
        assert first.status in ("not done", "unknown"), (item, first)
        assert first != second, item


# ---- what contradicts


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another run.json."""

    def edit(folder: Path) -> None:
        path = folder / "run.json"
        content = json.loads(path.read_text())
        change(content["starts"][-1])
        path.write_text(json.dumps(content))

    return edit


def logged(*rows: dict[str, Any], keep: bool = True) -> Callable[[Path], None]:
    """More rows, or others."""

    def log(folder: Path) -> None:
        path = folder / "metrics.jsonl"
        lines = path.read_text() if keep else ""
        path.write_text(lines + "".join(json.dumps(row) + "\n" for row in rows))

    return log


def checked(level: str, where: str, what: str) -> Callable[[Path], None]:
    finding = {"level": level, "where": where, "what": what, "remedy": "mend it"}
    return lambda folder: (folder / "checks.json").write_text(json.dumps({"findings": [finding]})) and None


def noted(practice: str, **details: Any) -> Callable[[Path], None]:
    return lambda folder: record(folder, practice, details)


def without(*names: str) -> Callable[[Path], None]:
    """Without these files, or without these records."""

    def remove(folder: Path) -> None:
        path = folder / "practices.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if json.loads(line)["practice"] not in names]
        path.write_text("".join(f"{line}\n" for line in kept))
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return remove


def damaged_checkpoints(which: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for manifest in folder.glob(f"checkpoints/{which}/manifest.json"):
            manifest.write_text("{}")

    return damage


def options(**values: Any) -> Callable[[Path], None]:
    return edited(lambda start: start["options"].update(values))


def on_gpu(**values: Any) -> Callable[[Path], None]:
    return edited(lambda start: start.update({"device": "cuda:0", "gpu": "H200", **values}))


def loss(**values: Any) -> Callable[[Path], None]:
    return edited(lambda start: start.update(loss={"class": "torch.nn.MSELoss", "criterion": True, **values}))


def ended(**values: Any) -> Callable[[Path], None]:
    return edited(lambda start: start["end"].update(values))


FLAT = [{"step": step, "lr": 0.1, "train/loss": 1.0} for step in range(1, 6)]
CONTRADICTED: dict[str, tuple[Any, str, str, str]] = {
    # of the run where everything was done: what is changed, the line, its status, words of the evidence
    "overfit failed": (noted("overfit_one_batch", passed=False, verdict="stuck"), "overfit one", "not done", "stuck"),
    "normalization leaks": (
        checked("error", "normalization", "statistics of more"), "inputs are normalized", "not done", "mend it",
    ),
    "validation augmented": (
        edited(lambda s: s["val_loader"]["dataset"].update(random=True)), "augmentation of the training data alone",
        "not done", "Normalize",
    ),
    "no schedule moves": (logged(*FLAT, keep=False), "follows a schedule", "not done", "was 0.1 in all rows"),
    "constant": (
        lambda f: [logged(*FLAT, keep=False)(f), edited(lambda s: s.update(schedule={"name": "constant"}))(f)],
        "follows a schedule", "not done", "constant",
    ),
    "recurrent unclipped": (
        lambda f: [options(max_grad_norm=None)(f), edited(_lstm)(f)], "recurrent networks", "not done", "LSTM",
    ),
    "test looked at twice": (logged({"step": 4, "test/loss": 1.0}), "test set was evaluated,", "not done", "2 times"),
    "test chooses": (
        edited(lambda s: s["monitors"].update({"test/loss": "min"})), "never used before", "not done", "chooses",
    ),
    "test too early": (
        logged({"step": 1, "test/loss": 1.0}, {"step": 9, "train/loss": 1.0}, keep=False), "once", "not done", "step 1",
    ),
    "export failed": (
        noted("export_model", rows=[{"format": "onnx", "passed": False, "reason": "no such op"}]), "model is exported",
        "not done", "no such op",
    ),
    "nothing verified": (
        noted("export_model", rows=[{"format": "onnx", "passed": False}]), "ready to be", "not done", "verified",
    ),
    "exported by hand": (
        lambda f: [without("export_model")(f), (f / "m.onnx").write_bytes(b"")], "ready to be", "unknown", "m.onnx",
    ),
    "card is old": (
        lambda f: os.utime(f / "MODEL_CARD.md", (1.0, 1.0)), "results are documented", "not done", "older",
    ),
    "worse than a baseline": (
        noted("baselines", scores={"linear": {"accuracy": 2.0}}), "compared with baselines", "done", "NOT better",
    ),
    "other baselines": (
        noted("baselines", scores={"mean": {"mse": 2.0}}), "compared with baselines", "unknown", "no metric",
    ),
    "checks found errors": (checked("error", "loss", "is NaN"), "the loss fits the task", "not done", "is NaN"),
    "data error": (checked("error", "leakage", "the same samples"), "loading of data", "not done", "the same samples"),
    "shuffled validation": (
        edited(lambda s: s["val_loader"].update(shuffle=True)), "validation data in order", "not done", "shuffled",
    ),
    "unknown order": (edited(lambda s: s["train_loader"].update(shuffle=None)), "shuffled", "unknown", "own"),
    "waiting": (logged(*({"step": n, "data_wait": 0.9} for n in (5, 6))), "workers", "not done", "of the time"),
    "pinned": (on_gpu(), "pinned", "done", "the loop pins"),
    "fp32 on a GPU": (on_gpu(precision="fp32"), "mixed precision", "not done", "fp32 on H200"),
    "GPU unseen": (on_gpu(), "GPU is used", "not done", "system_every_seconds"),
    "GPU idle": (
        lambda f: [on_gpu()(f), logged({"step": 5, "system/gpu_utilization": 0.4})(f)], "GPU is", "not done", "40%",
    ),
    "GPU busy": (
        lambda f: [on_gpu()(f), logged({"step": 5, "system/gpu_utilization": 0.95})(f)], "GPU is used", "done", "95%",
    ),
    "GPU memory": (
        lambda f: [on_gpu()(f), logged({"step": 5, "memory/peak": 2**30})(f)], "memory of the GPU", "done", "1.00 GiB",
    ),
    "first gradients vanish": (
        lambda f: [
            without("initialize_weights")(f),
            noted("check_initial_gradients", findings=[{"level": "error", "what": "vanish"}])(f),
        ],
        "weights initialized", "not done", "vanish",
    ),
    "regression": (loss(), "label smoothing", "not applicable", "MSELoss has none"),
    "regression's classes": (
        lambda f: [loss()(f), without("analyze")(f)], "classes of unequal", "not applicable", "no loss of classes",
    ),
    "imbalanced": (
        lambda f: [loss(label_smoothing=0.0, weighted=False)(f), noted("analyze", imbalance=9.0)(f)],
        "classes of unequal", "not done", "9 times",
    ),
    "weighted sampler": (
        lambda f: [loss()(f), edited(lambda s: s["train_loader"].update(sampler="a.WeightedRandomSampler"))(f)],
        "classes of unequal", "done", "weighted sampler",
    ),
    "own loop": (edited(lambda s: s.update(by="windows")), "1. train mode", "unknown", "your own code"),
    "own loop's errors": (edited(lambda s: s.update(by="windows")), "memory runs out", "unknown", "with loop"),
    "ranks": (edited(lambda s: s.update(ranks=2)), "memory runs out", "not done", "others may be anywhere"),
    "all skipped": (logged({"step": 4, "skipped": 4}), "8. parameters updated", "not done", "all 4 windows"),
    "never finite": (
        logged({"step": 1, "train/loss": None, "not_finite": {"train/loss": "nan"}}, keep=False), "4. loss", "not done",
        "no row has a finite",
    ),
    "NaN seen": (
        logged({"step": 4, "train/loss": None, "not_finite": {"train/loss": "nan"}}), "NaN and", "done", "in 1 rows",
    ),
    "SIGTERM not saved": (
        ended(reason="SIGTERM", step=99), "before the system", "not done", "SIGTERM came at step 99",
    ),
    "SIGTERM saved": (ended(reason="SIGTERM", step=4), "before the system", "done", "has met SIGTERM"),
    "patience ended it": (ended(reason="patience"), "early stopping", "done", "it ended the run"),
    "best is gone": (
        logged({"step": 3, "val/loss": 1e-6}), "by the loss of the validation", "not done", "best val/loss in the rows",
    ),
    "no best kept": (options(keep_best=0), "by the accuracy of the validation", "not done", "keep_best=1"),
    "all damaged": (damaged_checkpoints("*"), "checkpoints come regularly", "not done", "damaged: final-"),
    "one damaged": (damaged_checkpoints("final*"), "everything of the run", "not done", "final-000000004 is damaged"),
    "not at the end": (logged({"step": 9, "train/loss": 1.0}), "final model", "not done", "of step 4 of 9"),
    "curves not looked at": (
        without("diagnose_curves", "diagnose_plateau"), "curves were analyzed", "unknown", "is drawn",
    ),
    "no monitored loss": (
        edited(lambda s: s.update(monitors={"val/accuracy": "max"})), "by the loss of", "not done", "not what",
    ),
    "one metric": (
        edited(lambda s: s.update(monitors={"val/loss": "min"})), "apart for each metric", "not done", "val/loss alone",
    ),
    "pictures of something": (
        without("data visualized", "augmentation_grid"), "samples were looked at", "unknown", "of whatever",
    ),
    "another search": (
        lambda f: [without("lr_range_test")(f), noted("search", best={"settings": {"model.width": 8}})(f)],
        "learning rate was searched", "not done", "a search of the learning rate",
    ),
    "a search of the rate": (
        lambda f: [without("lr_range_test")(f), noted("search", best={"settings": {"optimizer.lr": 0.5}})(f)],
        "learning rate was searched", "done", "optimizer.lr 0.5",
    ),
    "plateau not reached": (
        lambda f: [logged(*FLAT, keep=False)(f), edited(lambda s: s.update(schedule={"name": "plateau"}))(f)],
        "follows a schedule", "done", "has not stopped improving",
    ),
    "bf16 and fusion are no quantization": (
        without("quantize_int8", "prune"), "quantized or pruned", "not done", "neither",
    ),
    "augmentation out of sight": (
        lambda f: [
            without("augmentation_grid")(f), edited(lambda s: s["train_loader"]["dataset"].update(random=None))(f),
        ],
        "training data are augmented", "unknown", "RandomFlip, Normalize may augment",
    ),
    "validation out of sight": (
        edited(lambda s: s["val_loader"]["dataset"].update(random=None, transforms=[])),
        "augmentation of the training data alone", "unknown", "Images of the validation",
    ),
    "checks recorded with an error": (
        lambda f: [
            (f / "checks.json").unlink(),
            noted("preflight", findings=[{"level": "error", "what": "labels are NaN"}])(f),
        ],
        "loading of data", "not done", "labels are NaN",
    ),
    "mse under the loss's name": (
        lambda f: [
            edited(lambda s: s.update(loss={"class": "torch.nn.modules.loss.MSELoss"}))(f),
            noted("baselines", scores={"mean": {"mse": 1e9}})(f),
        ],
        "compared with baselines", "done", "better than the best baseline, mean",
    ),
    "no DataLoader": (
        edited(lambda s: s.update(train_loader={"class": "builtins.list", "batches": 4, "shuffle": None})), "workers",
        "done", "no workers",
    ),
    "unfair": (noted("error_analysis", groups=[]), "bias", "done", "'fairness checked' is recorded"),
}  # fmt: skip


def _lstm(start: dict[str, Any]) -> None:
    start["model"]["layers"]["LSTM"] = 1
    for group in start["optimizer"]["groups"]:
        group.pop("max_grad_norm", None)


@pytest.mark.parametrize("case", CONTRADICTED)
def test_what_the_folder_says_goes_before_what_was_meant(full: Path, case: str) -> None:
    change, line, status, words = CONTRADICTED[case]
    before = named(full, line)
    change(full)
    found = named(full, line)
    assert (found[0], words in found[1]) == (status, True), found
    assert found != before


def test_tokens_need_no_normalization_and_dense_models_no_augmentation(bare: Path) -> None:
    edited(lambda s: s["model"].update(layers={"Embedding": 1, "Linear": 2}))(bare)
    assert named(bare, "inputs are normalized")[0] == "not applicable"
    assert named(bare, "training data are augmented")[0] == "not applicable"


def test_a_sampler_of_weights_is_seen_in_a_real_run(tmp_path: Path) -> None:
    model = network()
    loader = DataLoader(Images(), batch_size=4, sampler=WeightedRandomSampler(torch.ones(16), 16))
    Loop(model, AdamW(model.parameters()), torch.nn.CrossEntropyLoss(), run_dir=tmp_path, curves=False).fit(
        loader, max_steps=1
    )
    assert named(tmp_path, "classes of unequal") == ("done", "the classes are balanced by a weighted sampler")
    assert named(tmp_path, "training data shuffled")[0] == "done"


def test_another_run_s_export_is_not_of_this_one(bare: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    (project / "runs/other/checkpoints").mkdir(parents=True)
    (project / "runs/other/model.onnx").write_bytes(b"")
    (project / "web").mkdir()
    (project / "web/index.ts").write_text("export {}")
    assert answers(bare, project=project)[_line("the model is exported")][0] == "not done"
    (project / "model.torchscript.pt").write_bytes(b"")
    assert answers(bare, project=project)[_line("the model is exported")][0] == "done"


def _line(text: str) -> str:
    return next(f"{item.section} / {item.text}" for item in items.ITEMS if item.text == text)


def test_a_heading_is_the_sum_of_its_lines() -> None:
    def rules(*given: Answer) -> Any:
        return parts(*(lambda run, each=each: each for each in given))(None)  # type: ignore[arg-type, misc]

    yes, no, maybe, never = done("a"), not_done("a", "b"), unknown("a", "b"), not_applicable("a")
    assert rules(yes, yes, never).status == "done"
    assert rules(yes, maybe, no).status == "not done"
    assert rules(yes, maybe).status == "unknown"
    assert rules(never, never).status == "not applicable"
    assert rules(yes, no, never).evidence.startswith("1 of 2 parts")


# ---- folders that cannot be read


def test_damaged_files_leave_lines_unknown_and_are_named(full: Path) -> None:
    (full / "run.json").write_text("{")
    (full / "checks.json").write_text("no")
    found = checklist(full)
    assert set(found.damaged) == {"run.json", "checks.json"}
    assert "run.json cannot be read" in str(found)
    assert named(full, "random seeds")[0] == "unknown"
    assert "is damaged" in named(full, "random seeds")[1]
    assert named(full, "13. metrics logged")[0] == "done"


def test_json_of_another_shape_is_no_error(full: Path) -> None:
    content = {"format": "fastloop-run", "version": 1, "starts": [{"time": 1.0, "options": 3, "loss": []}]}
    (full / "run.json").write_text(json.dumps(content))
    found = checklist(full)
    assert len(found.items) == len(items.ITEMS)
    assert "not as fastloop writes them" in named(full, "random seeds")[1]


def test_a_project_s_records_count_too(bare: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    record(project, "analyze", {"size": 9})
    (project / "DEPLOYMENT.md").write_text("how")
    assert answers(bare)["Before training / labels and statistics of the data set are known"][0] == "not done"
    found = answers(bare, project=project)
    assert found["Before training / labels and statistics of the data set are known"][0] == "done"
    assert found["Production / the deployment is documented"] == ("done", "DEPLOYMENT.md is there")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(NoSuchRun, match="pass the run_dir of a Loop"):
        checklist(tmp_path)
    with pytest.raises(NoSuchRun, match="pass the run_dir of a Loop"):
        checklist(tmp_path / "none")


# ---- as text, JSON and a command


def test_text_markdown_and_json(full: Path) -> None:
    found = checklist(full)
    text = str(found)
    assert f"[x] {found.counts['done']} done" in text.splitlines()[0]
    assert text.count("[x]") == found.counts["done"] + 1
    assert all(line == line.rstrip() for line in text.splitlines())
    page = found.markdown()
    assert page.count("\n## ") == len({(line.source, line.section) for line in found.items})
    content = found.to_json()
    json.dumps(content, allow_nan=False)
    assert set(content["items"][0]) == {"source", "section", "text", "status", "evidence"}
    assert {line["status"] for line in content["items"]} <= set(STATUSES)
    found.record(full)
    assert RunFolder(full).practices["checklist"]["run"] == str(full)


def run_command(*arguments: str) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers(required=True))
    options = parser.parse_args([command.NAME, *arguments])
    return int(options.run(options))


def test_the_command(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data = tmp_path / "out" / "a.md", tmp_path / "a.json"
    assert run_command(str(bare), "--markdown", str(page), "--json", str(data)) == 0
    assert capsys.readouterr().out.startswith(f"{bare}: [x] ")
    assert page.read_text().startswith("# Checklist of")
    assert len(json.loads(data.read_text())["items"]) == len(items.ITEMS)
    assert run_command(str(tmp_path / "none")) == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pass the run_dir of a Loop" in captured.err
    with pytest.raises(SystemExit) as left:
        run_command()
    assert left.value.code == 2


def test_looking_changes_nothing(full: Path) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in full.rglob("*")}
    checklist(full)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in full.rglob("*")} == before


# ---- the names of practices


def test_every_result_that_can_be_recorded_is_listed() -> None:
    for module in pkgutil.walk_packages(fastloop.recipes.__path__, "fastloop.recipes."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    missing = {cls.practice for cls in _below(Result) if cls.__module__.startswith("fastloop.")} - set(
        practices.FUNCTIONS
    )
    assert not missing


def _below(cls: type[Any]) -> list[type[Any]]:
    return [each for direct in cls.__subclasses__() for each in (direct, *_below(direct))]


def test_how_a_practice_is_recorded_names_it() -> None:
    for name in practices.FREE:
        assert f'record(run_dir, "{name}"' in practices.how(name)
    for name, text in practices.FUNCTIONS.items():
        assert name in text or name in ("preflight", "lr_range_test")
