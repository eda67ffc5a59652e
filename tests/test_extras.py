# SPDX-License-Identifier: Apache-2.0
"""Packages of an extra: found, not installed, and installed but broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastloop.extras import MissingExtra, need


def test_a_module_is_imported() -> None:
    assert need("json.decoder", "plots", "a plot").JSONDecoder


def test_what_is_not_installed_names_the_extra() -> None:
    with pytest.raises(MissingExtra, match=r"\[search\] a search needs no_such_package.*'fastloop\[search\]'"):
        need("no_such_package.inner", "search", "a search")


def test_a_package_that_fails_when_it_is_imported_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchvision's does where its operators were built for another torch."""
    (tmp_path / "built_for_another.py").write_text("raise RuntimeError('operator a::b does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtra, match=r"is installed and fails.*operator a::b.*fits this Python") as e:
        need("built_for_another", "vision", "augmentation")
    assert isinstance(e.value.__cause__, RuntimeError)


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit"])
def test_what_ends_the_program_is_not_taken_for_a_missing_package(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"ends_{error.lower()}.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        need(f"ends_{error.lower()}", "vision", "augmentation")
