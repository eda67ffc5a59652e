# SPDX-License-Identifier: Apache-2.0
"""Where rows of metrics go: JSON lines, CSV, and any object with the Logger protocol."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import numbers
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy
from numpy.typing import NDArray

Value: TypeAlias = float | int | str | None
Row: TypeAlias = Mapping[str, Value]

NOT_FINITE = "not_finite"  # of a row in metrics.jsonl: {name: "nan" | "inf" | "-inf"} of the values that stand as null


@runtime_checkable
class Logger(Protocol):
    """A receiver of rows.

    `open(run_dir, resume_step)` is called once before the first row; resume_step is the step of the checkpoint that the
    run goes on from, None for a new run. Rows of later steps will be logged again: what the logger holds of them has to
    go. `log(row)` takes a row of numbers, texts and None, "step" always among them. `close()` ends it. A logger that
    has a `sync()` makes durable there what it was given; it is called before a checkpoint is written. One with
    `needs_run_dir = True` is left out of a run without a folder; others then get None for it. One with
    `log_image(name, image, step)` gets pictures, uint8 [height, width, 3]; one with `log_config(config)` gets what the
    run was configured with at its start, a dict of JSON with dotted names and no dicts in it.
    """

    def open(self, run_dir: Path | None, resume_step: int | None) -> None: ...

    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """`metrics.jsonl`: one JSON object a line, in the order of logging.

    A NaN or an infinity is no JSON: it stands as null, and the row's "not_finite" says which it was, as in
    {"step": 7, "train/loss": null, "not_finite": {"train/loss": "nan"}}. `read_rows` makes it a float again. A row is
    with the operating system when `log` returns, so that a killed process loses none.

    Raises:
        OSError: the disk is full or the file cannot be written; no part of the row stays in the file.
    """

    needs_run_dir = True
    name = "jsonl"

    def __init__(self) -> None:
        self.resume_rows: int | None = None
        self._file = AppendedFile(self.name)

    def open(self, run_dir: Path | None, resume_step: int | None) -> None:
        path = _in_folder(run_dir, "metrics.jsonl", self.name)
        if resume_step is None:
            _set_aside(path)
        elif path.exists():
            last = resume_step
            _replace(path, islice((line for row, line in _json_lines(path) if _step(row) <= last), self.resume_rows))
        self._file.open(path)

    def log(self, row: Row) -> None:
        try:
            text = _encode(row)
        except ValueError:  # not JSON: a NaN, rare enough to find out by the error
            odd = {name: str(_number(value)) for name, value in row.items() if not _finite(value)}
            text = _encode({**row, **dict.fromkeys(odd), NOT_FINITE: odd})
        self._file.write(text.encode() + b"\n")

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


class Csv:
    """`metrics.csv`: a header and a line a row; what a row does not have stays empty.

    The columns are "step" and the others in the order in which they first came with a value. A new one makes the file
    anew with a longer header, in one rename. NaN and the infinities are written nan, inf and -inf.

    Raises:
        OSError: as JsonLines.
    """

    needs_run_dir = True
    name = "csv"

    def __init__(self) -> None:
        self.resume_rows: int | None = None
        self._file = AppendedFile(self.name)
        self._columns: list[str] = []

    def open(self, run_dir: Path | None, resume_step: int | None) -> None:
        path = _in_folder(run_dir, "metrics.csv", self.name)
        self._columns = []
        if resume_step is None:
            _set_aside(path)
        elif path.exists():
            rows = [row for row in _csv_rows(path) if _step(row) <= resume_step][: self.resume_rows]
            # A column that only dropped rows had a value for did not exist yet.
            present = {name for row in rows for name in row}
            self._columns = [name for name in _csv_header(path) if name in present]
            _replace(path, self._lines(rows))
        self._file.open(path)

    def log(self, row: Row) -> None:
        new = [name for name, value in row.items() if name not in self._columns and _cell(value) != ""]
        if new:
            self._widen(sorted(new, key=lambda name: name != "step"))  # "step" is the first of all
        self._file.write(self._line([_cell(row.get(name)) for name in self._columns]))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()

    def _widen(self, new: list[str]) -> None:
        path = self._file.path
        before, self._columns = self._columns, self._columns + new
        try:
            _replace(path, self._lines(_csv_rows(path)))
        except OSError:
            self._columns = before
            raise
        self._file.close()
        self._file.open(path)

    def _lines(self, rows: Iterable[Mapping[str, str]]) -> Iterator[bytes]:
        if not self._columns:
            return
        yield self._line(self._columns)
        for row in rows:
            yield self._line([row.get(name, "") for name in self._columns])

    @staticmethod
    def _line(cells: Sequence[Any]) -> bytes:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue().encode()


class Loggers:
    """Several loggers as one. The rows of all that fails to be written because of the disk are lost, not the training.

    Args:
        loggers: objects with the Logger protocol, in the order in which they get a row.
    """

    def __init__(self, loggers: Sequence[Logger]) -> None:
        self.loggers = tuple(loggers)
        self._open: list[Logger] = []
        self._failed: set[int] = set()

    def open(
        self, run_dir: str | os.PathLike[str] | None, resume_step: int | None, resume_rows: int | None = None
    ) -> None:
        """Opens all. Without a run_dir those that write into one are left out.

        Args:
            run_dir, resume_step: as for a Logger.
            resume_rows: rows that the run had logged when the checkpoint was made, for loggers with such an attribute:
                a row of the checkpoint's own step may have come after it, and will be logged again.

        Raises:
            OSError: a file cannot be made or read; what was opened is closed again.
        """
        folder = None if run_dir is None else Path(run_dir)
        for logger in self.loggers:
            if folder is None and getattr(logger, "needs_run_dir", False):
                continue
            if hasattr(logger, "resume_rows"):
                logger.resume_rows = resume_rows
            try:
                logger.open(folder, resume_step)
            except BaseException:
                self.close()
                raise
            self._open.append(logger)

    def log(self, row: Row) -> None:
        """Hands the row to all. One that raises OSError is warned about once, and tried again with the next row."""
        for logger in self._open:
            try:
                logger.log(row)
            except OSError as error:
                self._warn(logger, row.get("step"), error)

    @property
    def take_images(self) -> bool:
        """Whether there is one for pictures."""
        return any(hasattr(logger, "log_image") for logger in self.loggers)

    @property
    def take_config(self) -> bool:
        """Whether there is one for what the run was configured with."""
        return any(hasattr(logger, "log_config") for logger in self.loggers)

    def log_image(self, name: str, image: NDArray[numpy.uint8], step: int) -> None:
        """Hands the picture to all that take one."""
        self._to_those_with("log_image", step, name, image, step)

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Hands what the run was configured with to all that take it."""
        self._to_those_with("log_config", None, config)

    def _to_those_with(self, method: str, step: int | None, *given: Any) -> None:
        for logger in self._open:
            try:
                getattr(logger, method, _nothing)(*given)
            except (OSError, ImportError) as error:  # services read pictures with Pillow, which not all of them bring
                self._warn(logger, step, error)

    def sync(self) -> None:
        """Makes durable what was logged, for loggers that can."""
        for logger in self._open:
            try:
                getattr(logger, "sync", _nothing)()
            except OSError as error:
                self._warn(logger, None, error)

    def close(self) -> None:
        """Closes all, also after one of them raised; the first error is raised then."""
        errors = []
        while self._open:
            try:
                self._open.pop(0).close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _warn(self, logger: Logger, step: Value, error: OSError | ImportError) -> None:
        if id(logger) in self._failed:
            return
        self._failed.add(id(logger))
        name = getattr(logger, "name", type(logger).__name__)
        at = "" if step is None else f" the row of step {step}"
        warnings.warn(
            f"[logs] {name!r} could not write{at}: {error}; the training goes on without it, make room or mend the "
            "folder and later rows are written again",
            RuntimeWarning,
            stacklevel=4,
        )


def make_loggers(loggers: str | Logger | Iterable[str | Logger], *, rank: int = 0) -> Loggers:
    """Loggers from names and objects.

    Args:
        loggers: names ("jsonl", "csv", "tensorboard", "wandb", "mlflow") or objects with the Logger protocol, or one
            of these.
        rank: of this process; those above 0 log nothing.

    Raises:
        ValueError: no such name, or the same one twice.
        TypeError: an object without the protocol.
    """
    listed = [loggers] if isinstance(loggers, (str, Logger)) else list(loggers)
    made = [_one(each) for each in listed]
    for name in [each for each in listed if isinstance(each, str)]:
        if listed.count(name) > 1:
            raise ValueError(f"[logs] loggers must differ, got {name!r} twice; remove one")
    return Loggers(made if rank == 0 else ())


def _one(given: Any) -> Logger:
    if isinstance(given, str):
        from fastloop.loop import trackers  # it describes services that few runs use

        known: dict[str, Callable[[], Logger]] = {
            "jsonl": JsonLines,
            "csv": Csv,
            "tensorboard": trackers.TensorBoard,
            "wandb": trackers.Wandb,
            "mlflow": trackers.Mlflow,
        }
        if given not in known:
            raise ValueError(f"[logs] a logger must be one of {', '.join(map(repr, known))}, got {given!r}; pass one")
        return known[given]()
    if not isinstance(given, Logger) or isinstance(given, type):
        raise TypeError(
            f"[logs] a logger must have open, log and close, got {given!r}; pass a name or an object with the protocol "
            "fastloop.loop.logs.Logger"
        )
    return given


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, with NaN and the infinities as floats; a half-written last line is left out.

    Raises:
        OSError: the file cannot be read.
    """
    rows = []
    for row, _ in _json_lines(Path(path)):
        odd = row.pop(NOT_FINITE, {})
        rows.append({**row, **{name: float(text) for name, text in odd.items()}})
    return rows


class AppendedFile:
    """A file that whole lines are appended to, without a buffer: a forked child has nothing to write a second time."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._descriptor: int | None = None
        self.path = Path()

    def open(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def write(self, line: bytes) -> None:
        if self._descriptor is None:
            raise ValueError(f"[{self._where}] the log must be open to take a row, it is closed; call open first")
        written = os.write(self._descriptor, line)
        if written != len(line):  # the disk became full in the middle: half a line would spoil the file
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes could be written", str(self.path))

    def sync(self) -> None:
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


# ---- rows and files ----------------------------------------------------------------------------------


def _nothing(*given: Any) -> None:
    pass


def _number(value: Any) -> int | float:
    """For json: NumPy's scalars as Python's. A tensor is no numbers.Real, and reading one would wait for its device."""
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise TypeError(
        f"[logs] a row holds numbers, texts and None, got {value!r} ({type(value).__name__}); "
        "log its value once it has arrived on the host"
    )


_encode = json.JSONEncoder(allow_nan=False, check_circular=False, default=_number).encode


def _finite(value: Any) -> bool:
    return not isinstance(value, numbers.Real) or isinstance(value, numbers.Integral) or math.isfinite(value)


def _cell(value: Any) -> int | float | str:
    if value is None:
        return ""
    return value if isinstance(value, (int, float, str)) else _number(value)


def _step(row: Mapping[str, Any]) -> float:
    return float(row["step"])  # raises KeyError, TypeError or ValueError where a line is no row


def _in_folder(run_dir: Path | None, file: str, where: str) -> Path:
    if run_dir is None:
        raise ValueError(f"[{where}] {file} needs a folder, got run_dir=None; pass run_dir= to the loop")
    return Path(run_dir) / file


def _set_aside(path: Path) -> None:
    """A new run in a used folder: the rows of the run before stay, in one file beside."""
    if path.exists() and path.stat().st_size:
        os.replace(path, path.with_name(path.name + ".old"))


def _json_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Rows with their lines. A last line without its end was being written when the process died: it is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                _step(row)
            except (ValueError, KeyError, TypeError):
                _warn_of_line(path, number)
                continue
            yield row, line


def _csv_cells(path: Path) -> Any:
    """A csv.reader of the whole lines; the half-written last one is left out."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    return csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline=""))


def _csv_header(path: Path) -> list[str]:
    return next(_csv_cells(path), [])


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """Rows of the values that are there, as texts."""
    reader = _csv_cells(path)
    header: list[str] = next(reader, [])
    for cells in reader:
        row = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
        try:
            _step(row)
        except (KeyError, ValueError):
            _warn_of_line(path, reader.line_num)
            continue
        yield row


def _warn_of_line(path: Path, number: int) -> None:
    warnings.warn(
        f"[logs] line {number} of {path} must be a row with a step, it is damaged; it is left out",
        RuntimeWarning,
        stacklevel=4,
    )


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    """Makes the file anew in one rename: whoever reads it, or a kill in between, finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
