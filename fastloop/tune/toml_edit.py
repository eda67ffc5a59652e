# SPDX-License-Identifier: Apache-2.0
"""Sets keys in a TOML text and leaves every other line as it is: comments, order, blank lines, other tables.

The result is parsed and compared with what was meant. A text that writes a table in a way that this editor does not
know (dotted keys, inline tables) is refused, never spoilt.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BARE = re.compile(r"[A-Za-z0-9_-]+")
Tables = Mapping[str, Mapping[str, Any]]


def parsed(text: str, name: str = "the file") -> dict[str, Any]:
    """Raises ValueError for what is no TOML."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"[tune] {name} is no TOML: {error}") from None


def edit(text: str, tables: Tables, name: str = "the file") -> str:
    """`text` with the keys set.

    Args:
        tables: keys and values by table, "" for the top; a table that is not there is added at the end.
        name: of the file, for errors.

    Raises:
        ValueError: no TOML, or written in a way that cannot be edited by line.
        TypeError: a value that TOML cannot hold.
    """
    before = parsed(text, name)
    wanted = _wanted(before, tables, name)
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = [line for line in re.split(r"(?<=\n)", text) if line]  # not at U+2028 and the like, as splitlines does
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += newline
    for table, keys in tables.items():
        for key, value in keys.items():
            if _get(before, table, key) is not value and not _same(_get(before, table, key), value):
                _set(lines, table, key, f"{_key(key)} = {value_text(value)}", newline)
    result = "".join(lines)
    try:
        right = _same(tomllib.loads(result), wanted)
    except tomllib.TOMLDecodeError:
        right = False
    if not right:
        keys_text = ", ".join(f"{table}.{key}".strip(".") for table, keys in tables.items() for key in keys)
        raise ValueError(
            f"[tune] {name} writes its tables in a way that cannot be edited by line; set by hand: {keys_text}"
        )
    return result


def value_text(value: Any) -> str:
    """As TOML, on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return (
            repr(value) if math.isfinite(value) else {True: "nan"}.get(value != value, "inf" if value > 0 else "-inf")
        )
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {value_text(v)}" for k, v in value.items()) + "}"
    raise TypeError(f"[tune] TOML has no {type(value).__name__}, got {value!r}")


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else value_text(str(key))


def _wanted(before: dict[str, Any], tables: Tables, name: str) -> dict[str, Any]:
    result = dict(before)
    for table, keys in tables.items():
        if not table:
            result.update(keys)
        elif not isinstance(before.get(table, {}), dict):
            raise ValueError(f"[tune] {table} is a value in {name}, and no table")
        elif keys:
            result[table] = {**before.get(table, {}), **keys}
    return result


_MISSING = object()


def _get(document: Mapping[str, Any], table: str, key: str) -> Any:
    return (document.get(table, {}) if table else document).get(key, _MISSING)


def _same(a: Any, b: Any) -> bool:
    """Equal, in type too: 1, 1.0 and true are three values; NaN is NaN."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def _set(lines: list[str], table: str, key: str, assignment: str, newline: str) -> None:
    """Replace the lines of the key, or add it at the end of its table, or the table at the end."""
    spans = list(_statements(lines))
    start = 0 if not table else next((i + 1 for i, (_, _, header) in enumerate(spans) if header == table), None)
    if start is None:
        if lines and lines[-1].strip():
            lines.append(newline)
        lines += [f"[{_key(table)}]{newline}", assignment + newline]
        return
    insert_at = spans[start - 1][1] if start else 0
    for begin, end, header in spans[start:]:
        if header is not None:
            break
        if _assigns(lines[begin:end], key):
            comment = _comment(lines[begin]) if end == begin + 1 else ""
            lines[begin:end] = [assignment + comment + newline]
            return
        insert_at = end
    lines.insert(insert_at, assignment + newline)


def _statements(lines: list[str]) -> list[tuple[int, int, str | None]]:
    """(first line, line after, name of the table that it opens or None) of each header and assignment.

    A statement ends with the first line after which it parses by itself.
    """
    found, i = [], 0
    while i < len(lines):
        stripped = lines[i].strip()
        if not stripped or stripped.startswith("#"):
            i += 1
            continue
        end = i + 1
        document = _document(lines[i:end])
        while document is None and end < len(lines):
            end += 1
            document = _document(lines[i:end])
        header = None
        if stripped.startswith("["):
            header = next(iter(document or {}), "")
            inner = (document or {}).get(header)
            if inner != {}:  # [a.b] or [[a]]: a header, but of no table that is set here
                header = ""
        found.append((i, end, header))
        i = end
    return found


def _document(lines: list[str]) -> dict[str, Any] | None:
    try:
        return tomllib.loads("".join(lines))
    except tomllib.TOMLDecodeError:
        return None


def _assigns(lines: list[str], key: str) -> bool:
    document = _document(lines)
    return document is not None and list(document) == [key]


def _comment(line: str) -> str:
    """The comment at the end of a line, with the blanks before it; "" where it cannot be told from a string."""
    for match in re.finditer(r"\s*#", line):
        head = line[: match.start()]
        if _document([head]) is not None:
            return line[match.start() :].rstrip("\r\n")
    return ""
