# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, made to prepare for a launch once instead of once a function."""

from __future__ import annotations

import functools
import importlib
from typing import Any


def replace_the_language_once_a_launch() -> None:
    """What the kernels compute stays; an interpreted step takes about half the time.

    A launch replaces the functions of triton.language by functions on arrays. Triton 3.7 does so again at every call of
    a function from a kernel, 5 ms each, though nothing is left to replace.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):
        return  # another version of Triton, which replaces in another way
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    launches: list[set[tuple[bool, bool]]] = []  # that are under way: which modules have been replaced

    def replace_once(fn: Any) -> Any:
        modules = _language_modules(fn)
        if launches and modules in launches[-1]:
            return interpreter._LangPatchScope()  # of nothing
        if launches:
            launches[-1].add(modules)
        return replace(fn)

    @functools.wraps(launch)
    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(set())
        try:
            return launch(self, *args, **kwargs)
        finally:
            launches.pop()

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launch_once


@functools.cache
def _language_modules(fn: Any) -> tuple[bool, bool]:
    """Whether the function knows triton.language, and triton.language.core: what is replaced for it."""
    language: Any = importlib.import_module("triton.language")
    known = [id(value) for value in fn.__globals__.values()]
    return id(language) in known, id(language.core) in known
