# SPDX-License-Identifier: Apache-2.0
"""benchmarks/train_gpt.py, the program of docs/training.md: it trains, goes on and evaluates."""

from __future__ import annotations

import json
import re
import sys

import programs
import pytest
import torch

SMALL = [
    "--layers",
    "1",
    "--width",
    "8",
    "--context",
    "16",
    "--batch",
    "64",
    "--save-every",
    "2",
    "--evaluate-every",
    "100",
    "--log-every",
    "1",
]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    """A function that runs it with the arguments of its command line."""
    module = programs.program("benchmarks/train_gpt.py", monkeypatch)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train_gpt.py", *SMALL, *arguments])
        module.main()

    run.module = module
    return run


def test_train_go_on_and_evaluate(program, tmp_path, capsys):
    run = ("--run-dir", str(tmp_path / "run"))
    program(*run, "--steps", "3")
    program(*run, "--steps", "5")
    trained = re.search(r"step 5: val/loss (\d\.\d+)", capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "lr" in row] == [1, 2, 3, 4, 5]
    program(*run, "--steps", "5", "--evaluate", "--prompt", "def ", "--characters", "20")
    said, *text = capsys.readouterr().out.splitlines()
    assert said.startswith("step 5: ")
    assert f"loss {trained[1]}" in said
    assert "\n".join(text).startswith("def ")


def test_every_character_is_trained_on_or_held_out_and_none_is_both(program):
    text = torch.arange(1000)
    train, held_out = (program.module.Windows(text, 9, held_out=which) for which in (False, True))
    assert (len(train), len(held_out)) == (95, 5)
    both = torch.cat([window for part in (train, held_out) for window in part])
    assert torch.equal(both.sort().values, text)


def test_the_alphabet_is_that_of_the_codes(program):
    codes = program.module.encode("".join(program.module.ALPHABET[:-1]))
    assert codes.tolist() == list(range(len(program.module.ALPHABET) - 1))
