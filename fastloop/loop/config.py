# SPDX-License-Identifier: Apache-2.0
"""A training described by a TOML or JSON file: what to build, how to train it, for how long.

    target = "my_project.tasks:digits"      # a function; what it returns is trained
    [arguments]                             # its own arguments
    width = 64
    [loop]                                  # Loop's options
    precision = "bf16"
    run_dir = "runs/digits"
    schedule = {name = "warmup_cosine", warmup_steps = 100}
    [loader]                                # the target's train_loader is rebuilt with these
    num_workers = 4
    [fit]                                   # fit's options
    epochs = 10
    [tuned]                                 # by `python -m fastloop.bench tune --apply`
    fingerprint = "..."                     # a run elsewhere warns that the settings may not be the fastest there

A key that nobody takes is an error that names the file, the line and the key that was meant.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import json
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, IterableDataset

from fastloop import machine, schedules
from fastloop.loop.loader import LoaderSettings, with_settings
from fastloop.loop.random_state import seed_everything

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from fastloop.loop.loop import Loop
    from fastloop.loop.metrics import History

Keys = tuple[str, ...]

logger = logging.getLogger("fastloop.loop")

TABLES = ("arguments", "loop", "loader", "fit", "tuned")
NEEDED = ("model", "optimizer", "loss_fn", "train_loader")
RETURNED = (*NEEDED, "val_loader", "callbacks")
NOTHING = "none"  # TOML has no null


class ConfigError(ValueError):
    """A config that cannot be used; the text says where in it, and what to write."""


@dataclass(frozen=True)
class Training:
    """What a config with a target describes; `fit()` does it."""

    config: Config

    loop: Loop
    train_loader: Any
    val_loader: Any
    options: dict[str, Any]  # of fit

    def check(self) -> None:
        """Look at the table [fit], before anything is trained.

        Raises:
            ConfigError: an option that cannot be, with where it stands.
        """
        try:
            self.loop._check_fit(self.val_loader, **self.options)
        except (ValueError, TypeError, RuntimeError) as error:
            raise _located(self.config, error, "fit") from error

    def fit(self) -> History:
        """`Loop.fit` with the loaders of the target and the options of the table [fit]."""
        return self.loop.fit(self.train_loader, self.val_loader, **self.options)


@dataclass
class Config:
    """Tables as they were read, and where each key stands.

    Args:
        values: the tables.
        name: of the file, for errors.
        text: of the file, "" for a dict.
    """

    values: dict[str, Any]
    name: str = "config"
    text: str = ""
    _set: dict[Keys, str] = field(default_factory=dict)  # keys that were set from outside, and how

    def table(self, name: str) -> dict[str, Any]:
        """The table of that name; {} if there is none."""
        return self.values.get(name, {})

    def set(self, assignment: str) -> None:
        """Set a value as `--set loop.precision=bf16` does: TOML where it is TOML, else the text itself.

        Raises:
            ConfigError: no "=", or a key inside of a value.
        """
        key, equals, text = assignment.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"[--set] wanted table.key=value, got {assignment!r}; write e.g. loop.precision=bf16")
        table = self.values
        for part in path[:-1]:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"[--set {assignment}] {part!r} is a value in {self.name}, and no table")
        table[path[-1]] = _value(text.strip())
        self._set[path] = f"[--set {assignment}]"

    def error(self, keys: Keys, problem: str) -> ConfigError:
        """The error about the key, with where it stands."""
        for i in range(len(keys), 0, -1):
            if keys[:i] in self._set:
                return ConfigError(f"{self._set[keys[:i]]} {problem}")
        line = line_of(self.text, keys, self.name.endswith(".json")) if self.text else None
        return ConfigError(f"[{self.name}{'' if line is None else f':{line}'}] {problem}")


# ---- reading -----------------------------------------------------------------------------------------


def read(given: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """The config of a TOML file, a JSON file (named *.json) or a dict.

    Args:
        given: a path, or the tables.
        overrides: "table.key=value", applied in their order.

    Raises:
        ConfigError: a file that cannot be read, no TOML or JSON, or a key that nobody takes.
    """
    if isinstance(given, Mapping):
        config = Config(copy.deepcopy(dict(given)))
    else:
        path = Path(given)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"[{path}] cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"[{path}] is not UTF-8: {error}") from None
        config = Config(_parsed(path, text), str(path), text)
    for assignment in overrides:
        config.set(assignment)
    _check_tables(config)
    return config


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"[{path}] {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"[{path}] wanted an object of tables, got {type(values).__name__}")
    return values


def _value(text: str) -> Any:
    try:
        value = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return value["value"] if len(value) == 1 else text


def _check_tables(config: Config) -> None:
    for key, value in config.values.items():
        _known(config, (key,), ("target", *TABLES), "tables are")
        if key in TABLES and not isinstance(value, dict):
            raise config.error((key,), f"{key} must be a table, got {value!r}; write [{key}] and its keys below")
    target = config.values.get("target", "a:b")
    if not isinstance(target, str) or not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise config.error(("target",), f'target must be "package.module:function", got {target!r}')
    if "arguments" in config.values and "target" not in config.values:
        raise config.error(("arguments",), 'the table [arguments] is of a target; write target = "package.module:name"')


def line_of(text: str, keys: Keys, is_json: bool = False) -> int | None:
    """The line where the key begins, or the nearest key that it stands in; None if neither is there."""
    where = _json_lines(text) if is_json else {}
    for i in range(len(keys), 0, -1):
        line = where.get(keys[:i]) if is_json else _toml_line(text, keys[:i])
        if line is not None:
            return line
    return None


def _toml_line(text: str, keys: Keys) -> int | None:
    """The first beginning of the text that parses and has the key ends with it."""
    lines = text.splitlines(keepends=True)
    begin = 1
    for end in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("".join(lines[:end]))
        except tomllib.TOMLDecodeError:  # in the middle of a value of several lines
            continue
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return begin
        begin = end + 1
    return None


def _json_lines(text: str) -> dict[Keys, int]:
    """Line of each key, by its path through the objects."""
    lines: dict[Keys, int] = {}
    path: list[str] = []  # a key for each object that is open, "" for a list
    last, key, line = "", "", 1
    for token in re.findall(r'"(?:[^"\\]|\\.)*"|[{}\[\]:\n]', text):
        if token == "\n":
            line += 1
        elif token == ":":
            key = json.loads(last)
            lines.setdefault((*path[1:], key), line)
        elif token in "{[":
            path.append(key)
            key = ""
        elif token in "}]":
            path.pop()
        else:
            last = token
    return lines


# ---- checks ------------------------------------------------------------------------------------------


def _known(config: Config, keys: Keys, allowed: Iterable[str], what: str) -> None:
    names = list(allowed)
    if keys[-1] in names:
        return
    close = difflib.get_close_matches(keys[-1], names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"{what} {', '.join(sorted(names)) or 'none'}"
    raise config.error(keys, f"unknown key {'.'.join(keys)!r}; {hint}")


def options_of(config: Config, table: str, function: Callable[..., Any], without: Iterable[str]) -> dict[str, Any]:
    """The table as keyword arguments of `function`, checked by its signature and annotations.

    Raises:
        ConfigError: a key that is no argument, or a value of another type.
    """
    hints = typing.get_type_hints(function)
    allowed = [name for name in inspect.signature(function).parameters if name not in {"self", *without}]
    result = {}
    for key, value in config.table(table).items():
        _known(config, (table, key), allowed, "keys are")
        hint = hints.get(key, Any)
        if value == NOTHING and _fits(None, hint):
            value = None
        if not _fits(value, hint):
            none = ' ("none" for None)' if _fits(None, hint) and hint is not Any else ""
            raise config.error(
                (table, key), f"{table}.{key} must be {_readable(hint)}{none}, got {value!r} ({type(value).__name__})"
            )
        result[key] = value
    return result


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of TOML or JSON may be passed where `hint` is annotated."""
    if hint is Any:
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    kind = origin or hint
    if kind is types.NoneType:
        return value is None
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is float:
        return isinstance(value, (int, float))
    if isinstance(value, (list, tuple)):
        return _is_sequence(kind) and all(_fits(each, part) for each in value for part in parts[:1])
    if isinstance(value, str) and _is_sequence(kind):
        return False
    return isinstance(kind, type) and isinstance(value, kind)


def _is_sequence(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(list, kind)


def _readable(hint: Any) -> str:
    words = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}
    found: list[str] = []
    for part in typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,):
        kind = typing.get_origin(part) or part
        if kind in words:
            found.append(words[kind])
        elif kind is Mapping:
            found.append("a table")
        elif _is_sequence(kind):
            found.append("an array")
    return " or ".join(dict.fromkeys(found))


# ---- building ----------------------------------------------------------------------------------------


def build(
    cls: type[Loop],
    config: Config,
    model: Any = None,
    optimizer: Any = None,
    loss_fn: Any = None,
    **options: Any,
) -> Training:
    """The loop that the config describes, with what its target returns or with the model and optimizer given.

    Args:
        cls: Loop.
        config: from `read`.
        model, optimizer, loss_fn: in place of a target.
        options: of Loop, which go before those of the config.

    Raises:
        ConfigError: a config that does not fit; also what Loop itself refuses, with where it stands.
    """
    table = options_of(config, "loop", cls.__init__, ("model", "optimizer", "loss_fn", "config", "callbacks"))
    of_fit = options_of(config, "fit", cls.fit, ("train_loader", "val_loader"))
    of_loader = options_of(config, "loader", LoaderSettings, ())
    _check_fingerprint(config)
    table |= options
    if model is not None and optimizer is not None:
        parts = {"model": model, "optimizer": optimizer, "loss_fn": loss_fn}
    elif model is not None or optimizer is not None or "target" not in config.values:
        raise ConfigError(
            f'[{config.name}] wanted a target = "package.module:function" in it, or a model and an optimizer beside it'
        )
    else:
        if table.get("seed") is not None:
            seed_everything(table["seed"])  # the same on every rank: they begin with the same weights
        parts = _returned(config)
        parts["train_loader"] = _loaded(config, parts["train_loader"], of_loader)
    callbacks = [*parts.get("callbacks", ()), *table.pop("callbacks", ())]
    table.setdefault("config", config.values)
    try:
        loop = cls(parts["model"], parts["optimizer"], parts.get("loss_fn"), callbacks=callbacks, **table)
    except (ValueError, TypeError) as error:
        raise _located(config, error) from error
    return Training(config, loop, parts.get("train_loader"), parts.get("val_loader"), of_fit)


def _loaded(config: Config, given: Any, settings: Mapping[str, Any]) -> Any:
    """The target's train_loader, loaded as [loader] says.

    A data set with an index needs that table; others may do without, and one that is iterable gives ready batches then.
    """
    if not settings and (not isinstance(given, Dataset) or isinstance(given, IterableDataset)):
        return given
    try:
        return with_settings(given, settings)
    except (ValueError, TypeError) as error:
        raise _located(config, error) from error


def _check_fingerprint(config: Config) -> None:
    """Warn where the settings were tuned on another machine or with other versions."""
    tuned = config.table("tuned").get("fingerprint")
    if tuned is None:
        return
    if not isinstance(tuned, str):
        raise config.error(("tuned", "fingerprint"), f"tuned.fingerprint must be a string, got {tuned!r}")
    here = machine.fingerprint()
    if tuned != here:
        logger.warning(
            "%s was tuned on another machine or with other versions: %s, and here %s; its settings may not be the "
            "fastest here, tune again with python -m fastloop.bench tune", config.name, tuned, here,
        )  # fmt: skip


def _located(config: Config, error: Exception, table: str = "loop") -> Exception:
    """Our error about an option of the config, with where this stands; others as they are."""
    text = str(error)
    where = text[1:].partition("]")[0]
    if where in ("loader", "Loop"):
        table = "loader" if where == "loader" else table
        named = [key for key in config.table(table) if re.search(rf"\b{key}\b", text.partition(", got")[0])]
        return config.error((table, *named[:1]), text) if named or table != "loop" else error
    named = ["loggers"] if where == "logs" else ["schedule"] if where in ("schedules", *schedules.names()) else []
    return config.error(("loop", named[0]), text) if named else error


def _returned(config: Config) -> dict[str, Any]:
    """What the target returns, by name."""
    function = _target(config)
    where, arguments = config.values["target"], config.table("arguments")
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in arguments:
            _known(config, ("arguments", key), parameters, f"{where} takes")
    missing = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and n not in arguments
    ]
    if missing:
        raise config.error(("arguments",), f"{where} also needs {', '.join(missing)}; write them in [arguments]")
    result = function(**arguments)
    if is_dataclass(result) and not isinstance(result, type):
        result = {each.name: getattr(result, each.name) for each in fields(result)}
    if not isinstance(result, Mapping):
        raise config.error(
            ("target",),
            f"{where} must return a dict or a dataclass of {', '.join(NEEDED)}, got {type(result).__name__}",
        )
    unknown, absent = [n for n in result if n not in RETURNED], [n for n in NEEDED if result.get(n) is None]
    if unknown or absent:
        problem = f"without {', '.join(absent)}" if absent else f"with {', '.join(map(repr, unknown))}"
        raise config.error(
            ("target",),
            f"{where} must return {', '.join(NEEDED)} and may return val_loader and callbacks; got one {problem}",
        )
    return dict(result)


def _target(config: Config) -> Callable[..., Any]:
    module_name, _, path = config.values["target"].partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise config.error(
            ("target",), f"there is no module {error.name!r}; start in the folder that has it, or install its package"
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            close = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise config.error(("target",), f"{module_name} has no {path!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise config.error(("target",), f"{module_name}:{path} must be a function, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]
