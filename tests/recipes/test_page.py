# SPDX-License-Identifier: Apache-2.0
"""docs/recipes.md and docs/recipes-reference.md: every practice has a row, every name and every test in it exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from page_keys import COUNTS, KEYS

import fastloop
import fastloop.checks
import fastloop.recipes

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "recipes.md"
REFERENCE = ROOT / "docs" / "recipes-reference.md"
HEAD = ["key", "asks", "fastloop", "test", "where we differ, and why"]


class Row(NamedTuple):
    document: str
    chapter: str
    key: str
    asks: str
    fastloop: str
    test: str
    differs: str


def rows() -> list[Row]:
    found, document, chapter = [], "", ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            document = line[3:]
        elif line.startswith("### "):
            chapter = line[4:]
        elif line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]
            if cells != HEAD and set("".join(cells)) != {"-"}:
                assert len(cells) == len(HEAD), f"{document}: {line}"
                found.append(Row(document, chapter, *cells))
    return found


ROWS = rows()


def wanted() -> Iterator[tuple[str, str, str, str]]:
    """(document, chapter, sign, key) of every line of KEYS, the sign being "=", "☐" or ""."""
    document = chapter = ""
    for line in KEYS.strip().splitlines():
        if line.startswith("## "):
            document = line[3:]
        elif line.startswith("### "):
            chapter = line[4:]
        elif line.startswith("= "):
            yield document, chapter, "=", line[2:]
        else:
            yield document, chapter, line[0] if line[0] == "☐" else "", line


def test_every_practice_has_its_row_in_the_documents_order():
    assert [(row.document, row.chapter, row.key) for row in ROWS] == [(d, c, key) for d, c, _, key in wanted()]


@pytest.mark.parametrize("document", COUNTS)
def test_no_heading_and_no_line_of_a_checklist_is_missing(document):
    signs = [sign for d, _, sign, _ in wanted() if d == document]
    assert (signs.count("="), signs.count("☐")) == COUNTS[document]


def test_no_cell_is_empty():
    empty = [(row.key, name) for row in ROWS for name, cell in row._asdict().items() if not re.search(r"\w", cell)]
    assert not empty


# ---- Names --------------------------------------------------------------------------------------------------------


def resolved(name: str) -> Any:
    """What a name on a page stands for: of a loop, with its module, or of recipes, fastloop, checks."""
    first, _, rest = name.partition(".")
    places: list[Any] = [fastloop.recipes, fastloop, fastloop.checks]
    if first == "loop":
        places, name = [fastloop.Loop], rest
    elif first == "fastloop":
        places, name = [fastloop], rest
        for end in range(name.count("."), 0, -1):  # modules that fastloop itself does not import
            module = ".".join(["fastloop", *name.split(".")[:end]])
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
                break
    for place in places:
        found = place
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


def problem(span: str) -> str | None:
    """What is wrong with a piece of code on the page; None where nothing is."""
    command = re.fullmatch(r"python -m ([\w.]+)(?: (\w+))?", span)
    if command is not None:
        return None if command_exists(command[1], command[2]) else f"there is no command `{span}`"
    if re.fullmatch(r"[\w/.-]+/[\w/.-]+", span):
        return None if (ROOT / span).exists() else f"there is no file `{span}`"
    node = ast.parse(span, mode="eval").body
    name = ast.unparse(node.func if isinstance(node, ast.Call) else node)
    found = help if name == "help" else resolved(name)
    if found is None:
        return f"there is no {name}"
    if isinstance(node, ast.Call) and node.keywords:
        parameters = inspect.signature(found).parameters
        unknown = [keyword.arg for keyword in node.keywords if keyword.arg not in parameters]
        if unknown:
            return f"{name} takes no {', '.join(map(str, unknown))}"
    return None


def command_exists(module: str, subcommand: str | None) -> bool:
    if importlib.util.find_spec(module) is None:
        return False
    package = ROOT.joinpath(*module.split("."))
    sources = package.rglob("*.py") if package.is_dir() else [package.with_suffix(".py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    return subcommand is None or f'"{subcommand}"' in text


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("span", sorted({span for row in ROWS for span in spans(row.fastloop)}))
def test_what_a_row_names_is_there(span):
    assert problem(span) is None


def test_every_row_names_something_or_leads_to_a_page():
    missing = [row.key for row in ROWS if not spans(row.fastloop) and "](" not in row.fastloop]
    assert missing == ["Table of Contents"] * 2


@pytest.mark.parametrize(
    ("span", "says"),
    [
        ("no_such_function", "there is no no_such_function"),
        ("Loop(patiense=1)", "Loop takes no patiense"),
        ("fastloop.schedules.no_such", "there is no fastloop.schedules.no_such"),
        ("python -m fastloop.loop no_such", "there is no command"),
        ("benchmarks/no_such.py", "there is no file"),
    ],
)
def test_a_planted_name_is_found(span, says):
    assert problem(span).startswith(says)


# ---- Tests --------------------------------------------------------------------------------------------------------

FILES = {path.name: path for path in ROOT.glob("tests/**/test_*.py")}
NAMED = sorted({span for row in ROWS for span in spans(row.test)})


def test_every_row_names_a_test():
    assert not [row.key for row in ROWS if not spans(row.test)]


@pytest.mark.parametrize("test", NAMED)
def test_a_test_that_is_named_is_there(test):
    file, _, function = test.partition("::")
    assert file in FILES
    if function:
        assert re.search(rf"^def {function}\(", FILES[file].read_text(encoding="utf-8"), re.M)


# ---- The reference ------------------------------------------------------------------------------------------------


def signatures() -> Iterator[tuple[str, str]]:
    """(name, arguments) of what the reference's blocks of Python define."""
    for block in re.findall(r"^```python[^\n]*\n(.*?)^```", REFERENCE.read_text(encoding="utf-8"), re.M | re.S):
        code = re.sub(r"#[^\n]*", "", block)
        for call in re.finditer(r"^([\w.]+)(\()|; ([\w.]+)(\()|\), (\w+)(\()", code, re.M):
            name = call[1] or call[3] or call[5]
            depth, start = 1, call.end()
            for end in range(start, len(code)):
                depth += {"(": 1, ")": -1}.get(code[end], 0)
                if not depth:
                    yield name, " ".join(code[start:end].split())
                    break


SIGNATURES = list(signatures())
IN_PARTS = ("Loop",)  # the page shows an option
OF_A_SAMPLER = ("set_epoch", "indices", "length")


def test_the_reference_is_read():
    names = {name for name, _ in SIGNATURES}
    assert {"overfit_one_batch", "baselines", "Int", "loop.log_confusion_matrix", "drift_report", "checklist"} <= names


@pytest.mark.parametrize(("name", "arguments"), SIGNATURES, ids=[name for name, _ in SIGNATURES])
def test_a_signature_is_that_of_the_reference(name, arguments):
    found = getattr(fastloop.recipes.LossCurriculum, name) if name in OF_A_SAMPLER else resolved(name)
    assert found is not None, f"there is no {name}"
    if name in IN_PARTS:
        return
    said = ast.parse(f"def f({arguments}): ...").body[0].args
    positional = [each.arg for each in said.args]
    keywords = [each.arg for each in said.kwonlyargs]
    parameters = [each for each in inspect.signature(found).parameters.values() if each.name != "self"]
    kinds = inspect.Parameter
    assert [p.name for p in parameters if p.kind is kinds.POSITIONAL_OR_KEYWORD] == positional
    assert [p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY] == keywords
    defaults = dict(zip(reversed(positional), map(ast.unparse, reversed(said.defaults)), strict=False))
    defaults |= {k: ast.unparse(v) for k, v in zip(keywords, said.kw_defaults, strict=True) if v is not None}
    actual = {p.name: repr(p.default) for p in parameters if p.default is not kinds.empty}
    assert actual == defaults


def test_every_function_is_on_the_reference_page():
    shown = {name.rpartition(".")[2] for name, _ in SIGNATURES}
    public = {name for name in fastloop.recipes.__all__ if inspect.isfunction(getattr(fastloop.recipes, name))}
    assert public - shown == set()


def test_names_without_arguments_are_there():
    for name in ("DEFAULT_SPACE", "PRIORITIES", "Finding", "preflight", "record"):
        assert resolved(name) is not None, name
