# SPDX-License-Identifier: Apache-2.0
"""Cases that a project writes for itself: the decorator, and finding what it marked.

This module imports nothing of fastloop: a worker loads it beside a build of fastloop that is older than it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

MARK = "__fastloop_case__"


class CaseError(Exception):
    """A case that cannot be run: it raised, or did not return what its options promise."""


class WrongCase(CaseError):
    """A case whose own check found its result wrong: its time would mean nothing."""


@dataclass(frozen=True)
class UserCase:
    """A marked function and its options, as `case` takes them."""

    name: str
    function: Callable[[], Any]
    title: str = ""
    peer: str | None = None
    check: Callable[[Any], object] | None = None
    floor: float | None = None
    goal: float | None = None
    setup: bool = False
    bytes: int | None = None
    control: bool = False


def case(
    function: Callable[[], Any] | None = None,
    /,
    *,
    name: str | None = None,
    peer: str | None = None,
    check: Callable[[Any], object] | None = None,
    floor: float | None = None,
    goal: float | None = None,
    setup: bool = False,
    bytes: int | None = None,
    control: bool = False,
) -> Any:
    """Mark a function without arguments as a case of `python -m fastloop.bench ab` and `ci`; it stays what it is.

    Args:
        name: default: the function's, with dashes.
        peer: another case's name; its time over this one's is the ratio that `floor` and `goal` are about.
        check: called with the result before anything is timed; raises if that is wrong.
        floor: the least ratio against the peer: below it, `ci` fails.
        goal: a ratio to be reached, reported only.
        setup: the function is a factory, called once in each process: it returns what is timed, or (that, result).
            Otherwise the function itself is timed, and its result is that of the first call.
        bytes: that one call must move; the report shows bytes per second.
        control: code that no change touches. Where it moves by more than 2 %, the run is void.

    Raises:
        TypeError, ValueError: an option that does not fit.
    """
    if function is None:
        return lambda marked: case(
            marked, name=name, peer=peer, check=check, floor=floor, goal=goal, setup=setup, bytes=bytes, control=control
        )
    if not callable(function) or not hasattr(function, "__name__"):
        raise TypeError(f"[bench.case] wanted a function, got {function!r}; write @fastloop.bench.case above a def")
    own = name or function.__name__.strip("_").replace("_", "-")
    _check_options(own, function, peer, check, {"floor": floor, "goal": goal, "bytes": bytes})
    title = (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")
    marked = UserCase(own, function, title, peer, check, floor, goal, setup, bytes, control)
    setattr(function, MARK, marked)
    return function


def _check_options(name: str, function: Any, peer: Any, check: Any, numbers: dict[str, Any]) -> None:
    needed = [
        each.name
        for each in inspect.signature(function).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        raise TypeError(f"[bench.case] {name} must work without arguments, it needs {', '.join(needed)}")
    if check is not None and not callable(check):
        raise TypeError(f"[bench.case] {name}: check must be a function of the result, got {check!r}")
    for option, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"[bench.case] {name}: {option} must be a number above 0, got {value!r}")
    if peer is None and (numbers["floor"] is not None or numbers["goal"] is not None):
        raise ValueError(f"[bench.case] {name}: floor and goal are ratios against a peer; pass peer='name of a case'")


def collect(module: ModuleType) -> list[UserCase]:
    """The marked functions of a module, in the order of their definition.

    Raises:
        CaseError: none at all, two of one name, or a peer that is not there.
    """
    found = list({id(value): getattr(value, MARK) for value in vars(module).values() if hasattr(value, MARK)}.values())
    if not found:
        raise CaseError(f"[bench] {module.__name__} has no case; mark a function with @fastloop.bench.case")
    names = [each.name for each in found]
    double = {name for name in names if names.count(name) > 1}
    if double:
        raise CaseError(f"[bench] {module.__name__} has two cases named {', '.join(sorted(double))}; pass name=")
    for each in found:
        if each.peer is not None and (each.peer == each.name or each.peer not in names):
            raise CaseError(
                f"[bench] {each.name}: peer={each.peer!r} must be another case; they are {', '.join(names)}"
            )
    return found


def prepared(chosen: UserCase, check: bool = True) -> Callable[[], Any]:
    """What is timed: set up, called once and, unless `check` is False, checked.

    Raises:
        WrongCase: its check raised.
        CaseError: anything else that it raised, or a factory that returned no function.
    """
    try:
        call = chosen.function()
        result: Any = None
        if chosen.setup:
            given = isinstance(call, tuple) and len(call) == 2
            call, result = call if given else (call, None)
            if not callable(call):
                raise TypeError(f"setup=True: wanted a function or (function, result) from it, got {call!r}")
            first = call()
            result = result if given else first
        else:
            call, result = chosen.function, call
    except Exception as error:
        raise CaseError(f"[bench] case {chosen.name}: {type(error).__name__}: {error}") from error
    if check and chosen.check is not None:
        try:
            chosen.check(result)
        except Exception as error:
            raise WrongCase(f"[bench] case {chosen.name}: {type(error).__name__}: {error}") from error
    return call  # type: ignore[no-any-return]
