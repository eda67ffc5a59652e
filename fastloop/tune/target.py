# SPDX-License-Identifier: Apache-2.0
"""The training that is tuned: a function by its name, its arguments, and the present options and loader settings."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fastloop.loop.config import Config, ConfigError, options_of, read
from fastloop.loop.loader import LoaderSettings

READY = "fastloop.tune.ready:text"
SETTINGS = tuple(LoaderSettings.__dataclass_fields__)  # of a loader
OF_A_RUN = (  # options of Loop that a trial leaves out: they say where a run goes, not how fast
    "run_dir", "resume", "save_every_steps", "save_every_minutes", "save_every_epochs", "keep_last", "keep_best",
    "keep_log_spaced", "best", "patience", "strategy", "auto_microbatch", "loggers", "log_every", "progress",
    "callbacks", "check", "config", "curves", "mode", "monitor",
    "system_every_seconds",
)  # fmt: skip
MOST_SOURCES = 2000  # files, and folders to look into
NO_SOURCES = ("site-packages", "dist-packages", "node_modules", "__pycache__")
_NAME = r"[^\W\d]\w*(\.[^\W\d]\w*)*"


class TargetError(RuntimeError):
    """The target cannot be imported, or its first trial fails.

    Attributes:
        traceback: the target's own, or what it wrote last; "" where there is none.
        exit_code: of the process it was tried in; None if it did not end by itself.
    """

    def __init__(self, text: str, traceback: str = "", exit_code: int | None = None) -> None:
        super().__init__(text)
        self.traceback, self.exit_code = traceback, exit_code


@dataclass(frozen=True)
class Target:
    """What a trial builds.

    Args:
        function: "package.module:function".
        arguments: of the function; of JSON.
        options: of Loop, the present ones; of JSON.
        loader: the present settings of the loader, where they differ from the function's own.
        folders: go before all others on the import path of a trial, the folder of the user's command first.
    """

    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    loader: dict[str, Any] = field(default_factory=dict)
    folders: tuple[str, ...] = ()

    def spec(self) -> dict[str, Any]:
        """As JSON, for a trial."""
        return asdict(self)

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Target:
        """From `spec`."""
        return cls(**{**spec, "folders": tuple(spec.get("folders", ()))})

    def tables(self, options: Mapping[str, Any] | None = None, loader: Mapping[str, Any] | None = None) -> dict:
        """The tables of a config: this target with some options and settings in place of the present ones."""
        result: dict[str, Any] = {"target": self.function}
        parts = {
            "arguments": self.arguments,
            "loop": {**self.options, **(options or {})},
            "loader": {**self.loader, **(loader or {})},
        }
        return result | {name: table for name, table in parts.items() if table}

    def sources(self) -> list[Path]:
        """The Python files of the function's package, or of its module's folder, and below; nothing is imported for it.

        At most 2000; installed packages, hidden folders and caches are left out.
        """
        first, *rest = self.function.partition(":")[0].split(".")
        for folder in map(Path, self.folders):
            if (folder / first).is_dir() and (rest or (folder / first / "__init__.py").exists()):
                return _python_files(folder / first)
            if (folder / f"{first}.py").exists():
                return _python_files(folder)
        return []

    def present(self, options: Mapping[str, Any] | None = None, loader: Mapping[str, Any] | None = None) -> Target:
        """The same with other present options and settings."""
        return replace(self, options={**self.options, **(options or {})}, loader={**self.loader, **(loader or {})})


def resolve(
    target: str | Callable[..., Any] | Target | None,
    *,
    arguments: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Target:
    """The target that is meant.

    Args:
        target: "package.module:function", a function that can be imported under its name, None for the ready one.
        arguments, options, settings: see `Target`; they go before those of a Target.

    Raises:
        TypeError: a function that a fresh process cannot import, or a value that is not of JSON.
        ValueError: a name, an option of Loop or a setting of the loader that does not exist or fit.
    """
    if isinstance(target, Target):
        base = target
    elif target is None or isinstance(target, str):
        base = Target(READY if target is None else target)
    elif callable(target):
        base = Target(_name_of(target))
    else:
        raise TypeError(
            f'[tune] target must be "package.module:function", a function or None, got {type(target).__name__}'
        )
    folders = base.folders or tuple(dict.fromkeys([str(Path.cwd()), *(os.path.abspath(p) for p in sys.path if p)]))
    made = Target(
        base.function,
        {**base.arguments, **(arguments or {})},
        {**base.options, **(options or {})},
        {**base.loader, **(settings or {})},
        folders,
    )
    _check(made)
    return made


def from_config(given: str | os.PathLike[str] | Mapping[str, Any], overrides: Iterable[str] = ()) -> Target:
    """The target of a TOML or JSON file or of such tables, with its arguments, options and loader settings.

    Raises:
        ConfigError: a file that cannot be read, a config that does not fit, or one without a target.
    """
    config = read(given, overrides)
    if "target" not in config.values:
        raise ConfigError(f'[{config.name}] has no target to tune; write target = "package.module:function" at its top')
    return resolve(
        config.values["target"],
        arguments=config.table("arguments"),
        options=config.table("loop"),
        settings=config.table("loader"),
    )


def _python_files(root: Path) -> list[Path]:
    found: list[Path] = []
    for visited, (folder, folders, files) in enumerate(os.walk(root)):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NO_SOURCES)
        found += [Path(folder, name) for name in sorted(files) if name.endswith(".py")]
        if len(found) >= MOST_SOURCES or visited >= MOST_SOURCES:
            break
    return found[:MOST_SOURCES]


def _name_of(function: Callable[..., Any]) -> str:
    """ "module:function", under which a fresh process finds the same function."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    problem = None
    if not module or not name:
        problem = f"{function!r} has no name that it could be imported under"
    elif module == "__main__":
        problem = f"{name} is of the script that is running, which a fresh process cannot import"
    elif "<" in name:
        problem = f"{module}.{name} is a lambda or inside of a function, and cannot be imported"
    else:
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not function:
            problem = f"{module}.{name} is not the function that was given"
    if problem is not None:
        raise TypeError(
            f"[tune] each trial runs in a process of its own, and {problem}; move it to the top of a module and pass "
            'it, or its name "package.module:function"'
        )
    return f"{module}:{name}"


def _check(target: Target) -> None:
    from fastloop.loop import Loop

    if not re.fullmatch(rf"{_NAME}:{_NAME}", target.function):
        raise ValueError(
            f'[tune] target must be "package.module:function", got {target.function!r}; write e.g. "my_project.tasks:a"'
        )
    for name in ("arguments", "options", "loader"):
        try:
            json.dumps(getattr(target, name))
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"[tune] {name} travel to another process as JSON, which these cannot ({error}); pass "
                "strings, numbers, booleans, lists and dicts"
            ) from None
    options_of(Config({"loop": target.options}, "options"), "loop", Loop.__init__, ("model", "optimizer", "loss_fn"))
    unknown = [key for key in target.loader if key not in SETTINGS]
    if unknown:
        raise ValueError(f"[tune] settings of a loader are {', '.join(SETTINGS)}; got {', '.join(map(str, unknown))}")
    LoaderSettings(**target.loader)
