# SPDX-License-Identifier: Apache-2.0
"""Configs: what a TOML or JSON file builds, and the errors that say where in it something is wrong."""

from __future__ import annotations

import csv
import inspect
import json
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import fastloop
from fastloop import machine, train
from fastloop.loop.config import ConfigError, build, line_of, options_of, read

TASK = """
import dataclasses
import torch
import fastloop

def task(width, samples=32, lr=0.1):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 4, generator=generator), torch.randint(0, 3, (samples,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 3))
    data = torch.utils.data.TensorDataset(x, y)
    return {
        "model": model,
        "optimizer": fastloop.AdamW(model.parameters(), lr=lr),
        "loss_fn": torch.nn.CrossEntropyLoss(),
        "train_loader": torch.utils.data.DataLoader(data, 8, shuffle=True),
        "val_loader": torch.utils.data.DataLoader(data, 8),
    }

def with_data(**arguments):
    parts = task(8, **arguments)
    return {**parts, "train_loader": parts["train_loader"].dataset}

class Ready(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(task(8)["train_loader"])

def with_ready_batches():
    return {**task(8), "train_loader": Ready()}

@dataclasses.dataclass
class Parts:
    model: object
    optimizer: object
    loss_fn: object
    train_loader: object
    val_loader: object = None

def as_dataclass(**arguments):
    return Parts(**task(**arguments))

def forgets():
    return {name: part for name, part in task(8).items() if name != "optimizer"}

def too_much():
    return {**task(8), "valid_loader": None}

def a_list():
    return [1]

number = 3
"""

CONFIG = """
target = "config_task:task"

[arguments]
width = 8

[loop]
run_dir = "run"
seed = 3
precision = "bf16"
schedule = {name = "warmup_cosine", warmup_steps = 2}
log_every = 1
loggers = [
    "csv",
]

[fit]
epochs = 2
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "config_task.py").write_text(TASK, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "config_task", raising=False)
    return tmp_path


def written(text: str, name: str = "config.toml") -> Path:
    path = Path(name)
    path.write_text(text, encoding="utf-8")
    return path


# ---- what is built


def test_every_table_arrives() -> None:
    training = build(fastloop.Loop, read(written(CONFIG)))
    loop = training.loop
    assert training.loop.model[0].out_features == 8  # type: ignore[index]
    assert (loop.seed, loop.precision, loop.run_dir) == (3, "bf16", Path("run"))
    history = training.fit()
    assert loop.epoch == 2
    assert len(history["train/loss"]) == 8
    assert "val/accuracy" in history
    warm = [lr for _, lr in history["lr"][:3]]
    assert warm == [0.1 * fastloop.schedules.warmup_cosine(2, 8)(step) for step in range(3)]


def test_the_same_from_toml_json_and_a_dict() -> None:
    config = read(written(CONFIG))
    as_json = written(json.dumps(config.values), "config.json")
    weights = []
    for given in (Path("config.toml"), as_json, config.values):
        training = build(fastloop.Loop, read(given), resume=False)
        training.fit()
        weights.append([p.detach().clone() for p in training.loop.model.parameters()])
    for other in weights[1:]:
        assert all(torch.equal(a, b) for a, b in zip(weights[0], other, strict=True))


def test_a_dataclass_serves_as_well_as_a_dict() -> None:
    values = {"target": "config_task:as_dataclass", "arguments": {"width": 5}, "fit": {"max_steps": 2}}
    training = build(fastloop.Loop, read(values))
    training.fit()
    assert training.loop.global_step == 2


def test_the_targets_loader_is_rebuilt_with_the_table_loader() -> None:
    given = build(fastloop.Loop, read({"target": "config_task:task", "arguments": {"width": 8}})).train_loader
    values = {
        "target": "config_task:task", "arguments": {"width": 8}, "loader": {"batch_size": 4, "prefetch_factor": "none"},
        "fit": {"epochs": 1},
    }  # fmt: skip
    training = build(fastloop.Loop, read(values))
    assert (training.train_loader.batch_size, given.batch_size) == (4, 8)
    assert isinstance(training.train_loader.sampler, torch.utils.data.RandomSampler)
    training.fit()
    assert training.loop.global_step == 8


def test_a_target_may_return_a_data_set() -> None:
    training = build(fastloop.Loop, read({"target": "config_task:with_data", "loader": {"batch_size": 16}}))
    assert [len(y) for _, y in training.train_loader] == [16, 16]
    with pytest.raises(ConfigError, match="batch_size is not given"):
        build(fastloop.Loop, read({"target": "config_task:with_data"}))


def test_ready_batches_are_taken_as_they_are() -> None:
    training = build(fastloop.Loop, read({"target": "config_task:with_ready_batches", "fit": {"epochs": 1}}))
    assert type(training.train_loader).__name__ == "Ready"
    assert [len(batch[0]) for batch in training.train_loader] == [8, 8, 8, 8]


def test_another_fingerprint_warns(caplog: pytest.LogCaptureFixture) -> None:
    values = {"target": "config_task:task", "arguments": {"width": 8}}
    here = {"fingerprint": machine.fingerprint(), "on": "2026-01-01"}
    build(fastloop.Loop, read({**values, "tuned": here}))
    assert not caplog.records
    build(fastloop.Loop, read({**values, "tuned": {"fingerprint": "an abacus"}}))
    assert f"other versions: an abacus, and here {machine.fingerprint()};" in caplog.text


def test_from_config_with_parts_of_ones_own_needs_no_target() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = fastloop.Loop.from_config({"loop": {"accumulation_steps": 3}}, model, optimizer, seed=5)
    assert loop.model is model
    assert loop.accumulation_steps == 3
    assert loop.seed == 5
    with pytest.raises(ConfigError, match="target = "):
        fastloop.Loop.from_config({"loop": {}}, model)


def test_options_of_the_call_go_before_the_files() -> None:
    loop = fastloop.Loop.from_config(written(CONFIG), precision="fp32", run_dir=None)
    assert loop.precision == "fp32"
    assert loop.run_dir is None


def test_the_weights_are_drawn_from_the_seed() -> None:
    first, second = (fastloop.Loop.from_config(written(CONFIG), run_dir=None) for _ in range(2))
    assert torch.equal(first.model[0].weight, second.model[0].weight)  # type: ignore[index]


def test_none_stands_for_null() -> None:
    values = read(
        written(CONFIG),
        ["loop.precision=fp32", "loop.save_every_epochs=none", "loop.strategy=none", "loop.keep_best=0"],
    ).values
    training = build(fastloop.Loop, read(values))
    training.fit()
    assert [path.name for path in Path("run/checkpoints").iterdir()] == ["final-000000008"]


def test_set_reads_toml_values_and_plain_words() -> None:
    overrides = ["loop.precision=bf16-pure", "loop.max_grad_norm=1e-1", "arguments.width=4", 'loop.loggers=["jsonl"]']
    values = read(written(CONFIG), overrides).values
    assert values["loop"]["precision"] == "bf16-pure"
    assert values["loop"]["max_grad_norm"] == 0.1
    assert values["arguments"] == {"width": 4}
    assert values["loop"]["loggers"] == ["jsonl"]


def test_the_checkpoint_keeps_the_config() -> None:
    training = build(fastloop.Loop, read(written(CONFIG), ["arguments.width=6"]))
    training.fit()
    manifest = json.loads(Path("run/checkpoints/final-000000008/manifest.json").read_text())
    assert manifest["info"]["config"]["arguments"] == {"width": 6}


# ---- errors

WRONG = {  # change of the config: file, line and text of the error
    "an option that is none": ("log_every = 1", "log_evry = 1", r"config.toml:12\].*'loop.log_evry'.*'log_every'"),
    "an option of another table": ("epochs = 2", "precision = 'fp32'", r"config.toml:18\].*'fit.precision'.*epochs"),
    "a table that is none": ("[fit]", "[fitt]", r"config.toml:17\].*'fitt'.*did you mean 'fit'"),
    "an argument that is none": ("width = 8", "widht = 8", r"config.toml:5\].*'arguments.widht'.*'width'"),
    "an argument missing": ("width = 8", "samples = 8", r"config.toml:4\].*config_task:task also needs width"),
    "another type": ("log_every = 1", "log_every = 1.5", r"config.toml:12\] loop.log_every must be an integer.*1.5"),
    "a bool for a number": ("seed = 3", "seed = true", r"config.toml:9\] loop.seed must be an integer \(\"none\""),
    "a number for an array": ("epochs = 2", "epochs = [2]", r"config.toml:18\] fit.epochs must be an integer"),
    "a value that Loop refuses": ('"bf16"', '"bf17"', r"config.toml:10\].*precision must be one of.*'bf17'"),
    "a schedule that is none": ("warmup_cosine", "warmup_cosin", r"config.toml:11\].*did you mean 'warmup_cosine'"),
    "an argument of the schedule": ("warmup_steps = 2", "warmup = 2", r"config.toml:11\].*warmup_cosine.*warmup_steps"),
    "a target without a colon": ("config_task:task", "config_task.task", r"config.toml:2\] target must be"),
    "a module that is none": ("config_task:", "config_tusk:", r"config.toml:2\] there is no module 'config_tusk'"),
    "a function that is none": (":task", ":tosk", r"config.toml:2\] config_task has no 'tosk'; did you mean 'task'"),
    "a target that is none": (":task", ":number", r"config.toml:2\] config_task:number must be a function"),
    "a setting of the loader that is none": (
        "[fit]",
        "[loader]\nworkers = 2\n[fit]",
        r"config.toml:18\].*'loader.workers'.*num_workers",
    ),
    "a setting of another type": (
        "[fit]",
        "[loader]\nnum_workers = 1.5\n[fit]",
        r"config.toml:18\] loader.num_workers must be an integer",
    ),
    "a setting out of range": (
        "[fit]",
        "[loader]\nnum_workers = -2\n[fit]",
        r"config.toml:18\].*num_workers must be .* at least 0",
    ),
    "a fingerprint that is none": ("[fit]", "[tuned]\nfingerprint = 3\n[fit]", r"config.toml:18\].*must be a string"),
    "options that exclude each other": (
        "log_every = 1",
        "deterministic = true\ncudnn_benchmark = true",
        r"config.toml:12\].*another algorithm",
    ),
    "a wrong logger": ('"csv"', '"json"', r"config.toml:13\].*'json'"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_error_says_where_and_what_was_meant(change: tuple[str, str, str]) -> None:
    before, after, message = change
    assert CONFIG.count(before) == 1
    with pytest.raises(ConfigError, match=message):
        build(fastloop.Loop, read(written(CONFIG.replace(before, after))))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("forgets", "must return model, optimizer, loss_fn, train_loader .*without optimizer"),
        ("too_much", "with 'valid_loader'"),
        ("a_list", "must return a dict or a dataclass .*got list"),
    ],
)
def test_a_target_that_returns_something_else(target: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(fastloop.Loop, read({"target": f"config_task:{target}"}))


def test_an_import_error_inside_of_the_target_is_its_own(folder: Path) -> None:
    (folder / "broken_task.py").write_text("import not_there_at_all\n", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="not_there_at_all"):
        build(fastloop.Loop, read({"target": "broken_task:task"}))


def test_no_toml_and_no_json() -> None:
    with pytest.raises(ConfigError, match=r"config.toml\].*line 2"):
        read(written("[loop]\nprecision = \n"))
    with pytest.raises(ConfigError, match=r"config.json\].*line 3"):
        read(written('{\n"loop": {\n}}}', "config.json"))
    with pytest.raises(ConfigError, match="object of tables"):
        read(written("[1]", "config.json"))
    with pytest.raises(ConfigError, match="loop must be a table, got 3"):
        read({"loop": 3})
    with pytest.raises(ConfigError, match=r"arguments.*target"):
        read({"arguments": {}})


def test_an_error_of_a_json_file_names_the_line() -> None:
    text = dedent("""\
        {
          "target": "config_task:task",
          "arguments": {"width": 8, "note": {"precision": "\\"precision\\":"}},
          "loop": {
            "precision": "bf17"
          }
        }""")
    with pytest.raises(ConfigError, match=r"config.json:3\].*'arguments.note'"):
        build(fastloop.Loop, read(written(text, "config.json")))
    assert line_of(text, ("loop", "precision"), is_json=True) == 5


def test_lines_of_keys_in_toml() -> None:
    text = 'a.b = 1\n\n# [c]\n[c]\nd = """\n[e]\nf = 1\n"""\n\nf = [\n 1,\n]\n[e.g]\nh = {i = 1}\n'
    found = {keys: line_of(text, tuple(keys.split("."))) for keys in ("a", "a.b", "c", "c.d", "c.f", "e.g.h.i", "x")}
    assert found == {"a": 1, "a.b": 1, "c": 4, "c.d": 5, "c.f": 10, "e.g.h.i": 14, "x": None}


def test_what_was_set_on_the_command_line_is_named_so() -> None:
    with pytest.raises(ConfigError, match=r"\[--set loop.precison=fp32\] unknown key 'loop.precison'"):
        build(fastloop.Loop, read(written(CONFIG), ["loop.precison=fp32"]))
    for wrong in ("loop.precision", "=3", "loop..precision=3"):
        with pytest.raises(ConfigError, match=r"table\.key=value"):
            read(written(CONFIG), [wrong])
    with pytest.raises(ConfigError, match="'seed' is a value"):
        read(written(CONFIG), ["loop.seed.x=3"])


def test_every_option_of_loop_can_be_written() -> None:
    """Only objects that no file can hold are left to the target and to Python."""
    not_in_files = {"self", "model", "optimizer", "loss_fn", "config", "callbacks"}
    for name, parameter in inspect.signature(fastloop.Loop.__init__).parameters.items():
        if name not in not_in_files:
            default = "none" if parameter.default is None else parameter.default
            table = {"loop": {name: list(default) if isinstance(default, tuple) else default}}
            assert name in options_of(read(table), "loop", fastloop.Loop.__init__, not_in_files)


# ---- the command


def test_the_command_trains_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    written(CONFIG)
    assert train.main(["config.toml", "--set", "fit.max_steps=3"]) == 0
    assert capsys.readouterr().out.startswith("step 3: train/loss ")
    assert train.main(["config.toml"]) == 0
    assert capsys.readouterr().out.startswith("step 8: ")
    with open("run/metrics.csv", encoding="utf-8") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["lr"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert train.main(["config.toml", "--resume", "never", "--set", "fit.max_steps=4"]) == 0
    assert capsys.readouterr().out.startswith("step 4: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.toml"], "[nowhere.toml] cannot be read"),
        (["config.toml", "--set", "loop.precison=fp32"], "did you mean 'precision'"),
        (["short.toml"], "how long?"),
        (["config.toml", "--set", "fit.epochs=-1"], "[--set fit.epochs=-1] [Loop] epochs must be an integer of at"),
        (["config.toml", "--set", "fit.evaluate_every_steps=0"], "evaluate_every_steps must be an integer above 0"),
        (["config.toml", "--set", "fit.evaluate_ema=true"], "AdamW keeps no moving average"),
        (["config.toml", "--resume", "step-000000007"], "no whole checkpoint 'step-000000007'"),
    ],
)
def test_wrong_use_is_told_in_a_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    written(CONFIG)
    written(CONFIG.replace("epochs = 2", ""), "short.toml")
    assert train.main(arguments) == train.WRONG_USE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_another_model_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    written(CONFIG)
    assert train.main(["config.toml", "--set", "fit.max_steps=2"]) == 0
    assert train.main(["config.toml", "--set", "arguments.width=9"]) == train.WRONG_USE
    assert "0.weight: (8, 4) in the checkpoint, (9, 4) in the model" in capsys.readouterr().err


def test_an_error_of_the_target_keeps_its_traceback() -> None:
    written(CONFIG)
    with pytest.raises(RuntimeError, match="negative dimension"):
        train.main(["config.toml", "--set", "arguments.width=-1"])


def test_the_command_in_a_process_of_its_own() -> None:
    written(CONFIG)
    command = [sys.executable, "-m", "fastloop.train", "config.toml", "--set", "fit.max_steps=2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("step 2: train/loss ")
