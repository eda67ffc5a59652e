# SPDX-License-Identifier: Apache-2.0
"""Packages that come with an extra of this project, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingExtra(ImportError):
    """A package that an extra of this project brings is not installed."""


def need(module: str, extra: str, what: str) -> Any:
    """The module, imported.

    Raises:
        MissingExtra: it is not installed; the error names the extra that brings it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"[{extra}] {what} needs {module.split('.')[0]}, which cannot be imported ({error}); "
            f"run `pip install 'fastloop[{extra}]'`"
        ) from error
