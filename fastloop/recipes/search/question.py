# SPDX-License-Identifier: Apache-2.0
"""Whether a search can be, seen before its first trial: its keys and ranges against what takes them."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastloop.loop import Loop
from fastloop.loop.config import Config, options_of
from fastloop.loop.loader import LoaderSettings
from fastloop.recipes.search.space import DEFAULT_SPACE, TABLES, Choice, Float, Int, Range, grid, samples
from fastloop.tune.target import SETTINGS, Target

OF_THE_SEARCH = ("run_dir", "resume", "callbacks", "config", "strategy")  # options of Loop
WITHOUT = {"loop": ("model", "optimizer", "loss_fn"), "fit": ("train_loader", "val_loader")}
TAKERS: dict[str, Callable[..., Any]] = {"loop": Loop.__init__, "fit": Loop.fit}


def default_space(target: Target) -> dict[str, Range]:
    """The part of DEFAULT_SPACE that the target takes; its batch size is an argument where it has one.

    Raises:
        ValueError: the target has none of these arguments.
    """
    names, any_name = _arguments(target)
    found = {}
    for key, given in DEFAULT_SPACE.items():
        table, _, name = key.partition(".")
        if name in names:
            found[f"arguments.{name}"] = given
        elif table == "loader" or any_name:
            found[key] = given
    fixed = {f"arguments.{name}" for name in target.arguments} | {f"loader.{name}" for name in target.loader}
    found = {key: given for key, given in found.items() if key not in fixed}
    if not any(key.startswith("arguments.") for key in found):
        wanted = ", ".join(key.partition(".")[2] for key in DEFAULT_SPACE)
        raise ValueError(
            f"[search] without a space the target must take some of {wanted} as arguments, {target.function} takes "
            f"{', '.join(names) or 'none'}; pass space="
        )
    return found


def checked(target: Target, space: dict[str, Range], fit: dict[str, Any], method: str) -> dict[str, Any]:
    """The options of `fit`.

    Raises:
        ValueError: a key that nobody takes, a value of another type, or a training without an end.
    """
    if not space:
        raise ValueError("[search] the space is empty; pass e.g. {'arguments.lr': Float(1e-5, 1e-1, log=True)}")
    names, any_name = _arguments(target)
    fixed = {"arguments": target.arguments, "loop": target.options, "loader": target.loader, "fit": fit}
    unknown = [name for name in target.arguments if name not in names]
    if unknown and not any_name:
        raise ValueError(f"[search] {target.function} takes no {unknown[0]!r}; {_close(unknown[0], names)}")
    for key, given in space.items():
        table, _, name = key.partition(".") if isinstance(key, str) else ("", "", "")
        if table not in TABLES or not name or "." in name:
            raise ValueError(
                f"[search] a key of the space must be one of {', '.join(f'{t}.NAME' for t in TABLES)}, got {key!r}"
            )
        if not isinstance(given, (Float, Int, Choice)):
            raise TypeError(f"[search] {key} must be a Float, an Int or a Choice, got {given!r}")
        if name in fixed[table]:
            raise ValueError(
                f"[search] {key} is in the space, and fixed to {fixed[table][name]!r}; leave one of them out"
            )
        _check_key(target, key, given, names, any_name)
    for name in target.options:
        _check_own(f"loop.{name}")
    length = options_of(Config({"fit": fit}, "search"), "fit", TAKERS["fit"], WITHOUT["fit"])
    if not {"fit.epochs", "fit.max_steps"} & {*space, *(f"fit.{name}" for name in length)}:
        raise ValueError("[search] how long is a trial? pass fit={'epochs': ...} or fit={'max_steps': ...}")
    if method == "grid":
        grid(space)
    return length


@contextmanager
def importing(folders: Sequence[str]) -> Iterator[None]:
    """With the import path of a trial."""
    before = list(sys.path)
    sys.path[:] = list(dict.fromkeys([*folders, *before]))
    try:
        yield
    finally:
        sys.path[:] = before


def _check_key(target: Target, key: str, given: Range, names: list[str], any_name: bool) -> None:
    table, _, name = key.partition(".")
    if table == "arguments":
        if name not in names and not any_name:
            raise ValueError(f"[search] {key}: {target.function} takes no {name!r}; {_close(name, names)}")
        return
    _check_own(key)
    if table == "loader":
        if name not in SETTINGS:
            raise ValueError(f"[search] {key}: a loader has no {name!r}; {_close(name, SETTINGS)}")
        for value in samples(given):
            LoaderSettings(**{name: value})
        return
    for value in samples(given):
        options_of(Config({table: {name: value}}, "search"), table, TAKERS[table], WITHOUT[table])


def _check_own(key: str) -> None:
    if key.partition("loop.")[2] in OF_THE_SEARCH:
        raise ValueError(f"[search] {key} is the search's own: each trial has its folder below folder=; leave it out")


def _arguments(target: Target) -> tuple[list[str], bool]:
    """Names of the target's arguments, and whether it takes any others."""
    module, _, path = target.function.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        parameters = inspect.signature(found).parameters.values()
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"[search] the target {target.function!r} cannot be imported: {error}") from error
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _close(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names) or 'none'}"
