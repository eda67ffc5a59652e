# SPDX-License-Identifier: Apache-2.0
"""Reports, the editor of TOML files that they are applied with, and the cache of answers."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import targets
from hypothesis import given, settings
from hypothesis import strategies as st

from fastloop.bench.stats import Interval
from fastloop.loop import Loop
from fastloop.loop.config import read
from fastloop.tune import cache, toml_edit
from fastloop.tune.report import Report, Trial, fastest
from fastloop.tune.session import Session
from fastloop.tune.target import Target, from_config, resolve

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = """\
# my training
target = "targets:slow"   # the one

[arguments]
seconds = 0.0     # no waiting

[loop]
precision = "fp32" # exact
max_grad_norm = 1.0
betas = [
    0.9,  # first
    0.999,
]

# how it is loaded
[loader]
num_workers = 0

[fit]
epochs = 3
"""


# ---- toml


def test_only_the_keys_change() -> None:
    edited = toml_edit.edit(FILE, {"loop": {"precision": "bf16", "threads": 2}, "loader": {"num_workers": 4}})
    assert edited == FILE.replace('"fp32" # exact', '"bf16" # exact').replace("]\n\n#", "]\nthreads = 2\n\n#").replace(
        "num_workers = 0", "num_workers = 4"
    )


def test_a_value_of_several_lines_is_replaced() -> None:
    edited = toml_edit.edit(FILE, {"loop": {"betas": [0.8, 0.9]}})
    assert tomllib.loads(edited)["loop"]["betas"] == [0.8, 0.9]
    assert "# first" not in edited
    assert edited.count("\n") == FILE.count("\n") - 3


def test_new_tables_go_to_the_end_and_top_keys_to_the_top() -> None:
    edited = toml_edit.edit("a = 1\n[b]\nc = 2", {"": {"target": "x:y"}, "tuned": {"fingerprint": 'a "b"'}})
    assert edited == 'a = 1\ntarget = "x:y"\n[b]\nc = 2\n\n[tuned]\nfingerprint = "a \\"b\\""\n'


def test_what_is_there_already_is_not_touched() -> None:
    assert toml_edit.edit(FILE, {"loop": {"betas": [0.9, 0.999]}, "loader": {"num_workers": 0}}) == FILE


def test_lines_keep_their_ends() -> None:
    assert toml_edit.edit("[loop]\r\na = 1\r\n", {"loop": {"a": 2, "b": 3}}) == "[loop]\r\na = 2\r\nb = 3\r\n"


@pytest.mark.parametrize("separator", ["\x85", "\u2028"])
def test_a_line_ends_where_toml_says(separator: str) -> None:
    text = toml_edit.edit("", {"": {"a": f"x{separator}y"}}).replace("\n", " # mine\n")
    assert toml_edit.edit(text, {"": {"a": 1}}) == "a = 1 # mine\n"


@pytest.mark.parametrize("text", ["loop = {a = 1}\n", "loop.a = 1\n", 'loop = "a value"\n', "a = = 1\n"])
def test_what_cannot_be_edited_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^\[tune\]"):
        toml_edit.edit(text, {"loop": {"b": 2}})


def test_a_value_without_toml() -> None:
    with pytest.raises(TypeError, match="NoneType"):
        toml_edit.edit("", {"loop": {"a": None}})


KEYS = st.text("abcd-_", min_size=1, max_size=3) | st.text(min_size=1, max_size=3)
VALUES = st.recursive(
    st.booleans() | st.integers(-(2**62), 2**62) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
TABLES = st.dictionaries(st.sampled_from(["", "loop", "loader", "a b"]), st.dictionaries(KEYS, VALUES, max_size=3))
COMMENTS = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"], exclude_characters="\x85"), max_size=6)


@settings(max_examples=150, deadline=None)
@given(before=TABLES, change=TABLES, comment=COMMENTS)
def test_what_is_meant_is_what_is_parsed(before: dict[str, Any], change: dict[str, Any], comment: str) -> None:
    tables = {"", "loop", "loader", "a b"}
    before, change = ({t: {k: v for k, v in keys.items() if k not in tables} for t, keys in each.items()}
                      for each in (before, change))  # fmt: skip
    text = toml_edit.edit("", before).replace("\n", f" # {comment}\n")
    assert toml_edit.edit(text, before) == text
    edited = toml_edit.edit(text, change)  # raises unless it parses as meant
    assert edited.count(f"# {comment}") >= text.count(f"# {comment}")


# ---- reports


def report(**more: Any) -> Report:
    trials = [
        Trial({"num_workers": 0}, rate=Interval(10.0, 9.0, 11.0), wait_share=0.6, peak_bytes=2**30, seconds=1.0),
        Trial({"num_workers": 2}, rate=Interval(20.0, 19.0, 21.0), wait_share=0.1, extra={"a": [1]}),
        Trial({"num_workers": 4}, "failed", "KeyError: 'x'", "Traceback ...", exit_code=1),
    ]
    given = {
        "fingerprint": "a machine", "arguments": {"seconds": 0.0}, "options": {"max_grad_norm": 1.0},
        "settings": {"batch_size": 16}, "trials": trials, "present": trials[0], "best": trials[1],
        "gain": Interval(2.0, 1.9, 2.1), "keep": False, "loader": {"num_workers": 2}, "loop": {"threads": 1},
        "findings": ["the loader is slow"], **more,
    }  # fmt: skip
    return Report("loader", "targets:slow", **given)


def test_json_and_back() -> None:
    before = report()
    after = Report.from_json(before.to_json())
    assert after == before
    assert after.best is after.trials[1]
    assert after.present is after.trials[0]


def test_what_is_no_number_is_null() -> None:
    found = report()
    found.trials[0].error, found.trials[1].extra["pays_after"] = math.inf, [math.nan, 1.0]
    text = found.to_json()
    assert "Infinity" not in text
    assert "NaN" not in text
    after = Report.from_json(text)
    assert (after.trials[0].error, after.trials[1].extra["pays_after"]) == (None, [None, 1.0])


def test_the_sentence_is_true() -> None:
    failed = Trial({}, "out of memory")
    nothing = {"keep": True, "loop": {}, "loader": {}, "gain": None}
    assert report(**nothing).summary().startswith("Keep yours")
    assert "do not run" in report(present=failed, **nothing).summary()
    assert "do not run" in report(present=failed, gain=None).summary()
    memory = report(**nothing)
    memory.kind = "memory"
    assert memory.summary() == "Nothing to change: the present settings fit."


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": "fastloop-tune/0"}', '{"schema": "fastloop-tune/1"}'])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="wanted a report"):
        Report.from_json(text)


def test_the_table_has_every_trial() -> None:
    lines = report().table().splitlines()
    assert len(lines) == 4
    assert lines[1].endswith("<- present")
    assert lines[2].endswith("<- best")
    assert "failed: KeyError: 'x'" in lines[3]


def test_the_snippet_is_python() -> None:
    text = report().snippet()
    compile(text, "snippet", "exec")
    assert "num_workers=2" in text
    assert "threads=1" in text
    assert "DataLoader(dataset" not in text  # its other arguments are the target's
    assert "fit()" not in text
    graph = report(loop={"cuda_graph": True}).snippet()
    compile(graph, "snippet", "exec")
    assert "needs fit()" in graph
    assert report(keep=True, loop={}, loader={}).snippet().startswith("#")


def test_fastest_is_of_those_that_ended_well() -> None:
    failed = Trial({}, "failed", rate=Interval(99.0, 98.0, 100.0))
    assert fastest([*report().trials, failed]).settings == {"num_workers": 2}
    assert fastest([failed]) is None


def test_applied_to_a_file_that_a_loop_loads(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(FILE.replace("betas", "#betas").replace("    0", "#   0").replace("]\n\n#", "\n#"))
    report().apply(file)
    text = file.read_text()
    assert "# no waiting" in text
    assert "epochs = 3" in text
    assert read(file).table("loader") == {"num_workers": 2, "batch_size": 16}
    loop = Loop.from_config(file)
    assert loop.accumulation_steps == 1


def test_the_ends_of_a_files_lines_stay(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(b'# mine\r\ntarget = "targets:slow"\r\n')
    report().apply(file)
    lines = file.read_bytes().split(b"\n")
    assert len(lines) > 5
    assert all(line.endswith(b"\r") for line in lines[:-1])


def test_written_from_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "config.toml"
    report().apply(file)
    assert file.read_text() == report().toml()
    assert from_config(file).loader == {"batch_size": 16, "num_workers": 2}
    assert from_config(file).options == {"max_grad_norm": 1.0, "threads": 1}


def test_only_what_was_measured_is_stamped(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    old = 'target = "targets:slow"\n[loop]\nprecision = "bf16"\nrun_dir = "runs"\n'
    kept = report(keep=True, loop={}, loader={})
    file.write_text(old)
    kept.apply(file)
    assert "fingerprint" not in file.read_text()
    file.write_text(old.replace('precision = "bf16"\n', ""))
    kept.apply(file)
    assert "fingerprint" in file.read_text()
    file.write_text(old)
    report().apply(file)
    assert "fingerprint" in file.read_text()


def test_another_targets_file_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('target = "other:thing"\n')
    with pytest.raises(ValueError, match="other:thing"):
        report().apply(file)
    assert file.read_text() == 'target = "other:thing"\n'


# ---- targets


def test_targets_that_can_be_imported() -> None:
    assert resolve(targets.slow).function == "targets:slow"
    assert resolve(None).function == "fastloop.tune.ready:text"
    assert resolve("a.b:c", arguments={"x": 1}).arguments == {"x": 1}
    assert resolve("a:b").folders[0] == str(Path.cwd())


def test_targets_that_cannot() -> None:
    def inner() -> None: ...

    main = type(inner)(inner.__code__, {})
    main.__module__, main.__qualname__ = "__main__", "main"
    for function in (inner, lambda: None, main, 3.5):
        with pytest.raises(TypeError, match=r"^\[tune\]"):
            resolve(function)


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"target": "no colon"}, ValueError),
        ({"target": "a:b", "options": {"presicion": "bf16"}}, ValueError),
        ({"target": "a:b", "options": {"threads": "two"}}, ValueError),
        ({"target": "a:b", "settings": {"workers": 2}}, ValueError),
        ({"target": "a:b", "settings": {"num_workers": -1}}, ValueError),
        ({"target": "a:b", "arguments": {"x": object()}}, TypeError),
    ],
)
def test_wrong_arguments(given: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^\["):
        resolve(given.pop("target"), **given)


# ---- cache


def session(**more: Any) -> Session:
    return Session("loader", "targets:slow", **{"budget": 10.0, "timeout": 5.0, **more})


def test_an_answer_is_kept_and_voided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    first = session()
    assert first.cached is None
    first.report.findings.append("found")
    first.finish()
    kept = session().cached
    assert kept is not None
    assert kept.cached
    assert kept.findings == ["found"]
    assert session(fresh=True).cached is None
    assert session(arguments={"seconds": 0.1}).cached is None
    assert session(options={"threads": 1}).cached is None
    assert session(settings={"num_workers": 1}).cached is None
    assert session(question={"largest": 8}).cached is None
    assert session(budget=20.0).cached is None
    for name in cache.VARIABLES:
        with monkeypatch.context() as other:
            other.setenv(name, "7")
            assert session().cached is None
    with monkeypatch.context() as other:
        other.setattr("torch.get_num_threads", lambda: 77)
        assert session().cached is None
    with monkeypatch.context() as other:
        other.setattr("fastloop.machine.fingerprint", lambda: "another machine")
        assert session().cached is None
    cache.path("loader", first.target).write_text("{")
    assert session().cached is None


def test_a_changed_source_voids_an_answer(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("")
    (tmp_path / "mine" / "helper.py").write_text("x = 1\n")
    target = Target("mine.task:build", folders=(str(tmp_path),))
    before = cache.key("loader", target, {})
    assert cache.key("loader", target, {}) == before
    (tmp_path / "mine" / "helper.py").write_text("x = 2\n")
    assert cache.key("loader", target, {}) != before
    assert "mine" not in sys.modules


def test_sources_are_those_below_and_not_installed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("task.py", "parts/net.py", ".venv/lib/a.py", "env/site-packages/b.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    target = Target("task:build", folders=(str(tmp_path),))
    assert target.sources() == [tmp_path / "task.py", tmp_path / "parts" / "net.py"]
    monkeypatch.setattr("fastloop.tune.target.MOST_SOURCES", 1)
    assert target.sources() == [tmp_path / "task.py"]


@pytest.mark.parametrize("wrong", [{"budget": 0}, {"timeout": -1.0}, {"memory_limit": 0}])
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^\[tune\]"):
        session(**wrong)


@pytest.mark.parametrize("wrong", [{"budget": "2m"}, {"memory_limit": 0.5}, {"on_trial": 3}])
def test_numbers_of_another_type(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"^\[tune\]"):
        session(**wrong)
