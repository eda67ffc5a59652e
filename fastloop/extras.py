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
        MissingExtra: it is not installed, or it is and its import fails, whatever with: torchvision's raises a
            RuntimeError where it was built for another torch. The error names the extra that brings it.
    """
    package = module.split(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"[{extra}] {what} needs {package}, which cannot be imported ({error}); "
            f"run `pip install 'fastloop[{extra}]'`"
        ) from error
    except Exception as error:
        raise MissingExtra(
            f"[{extra}] {what} needs {package}, which is installed and fails when it is imported "
            f"({type(error).__name__}: {error}); install a build of it that fits this Python and this torch, from the "
            "index that torch came from"
        ) from error
