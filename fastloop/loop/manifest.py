# SPDX-License-Identifier: Apache-2.0
"""A checkpoint's folder as a reader sees it: manifest, damages, documents, tensors. Nothing in it is ever unpickled.

    step-000000100/
        manifest.json                 name, size and SHA-256 of every file below, and what the checkpoint is
        <document>.json               JSON
        rank-00000.safetensors        the tensors, each process's part
        ranks/rank-00000.json         JSON of one process
        ranks/rank-00000.safetensors  tensors of one process, e.g. random states

The manifest carries the hash of itself. JSON is Python's: NaN and Infinity may stand where numbers do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastloop.loop.safetensors_writer import CHUNK, stored_form

FORMAT, VERSION = "fastloop-checkpoint", 1
MANIFEST = "manifest.json"
MAX_MANIFEST = 64 << 20  # bytes; the manifest of 10 000 processes has 4 MB
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*")
FILE_NAME = re.compile(r"(ranks/)?[A-Za-z0-9_][A-Za-z0-9_.=+-]*")
PART_NAME = re.compile(  # of a folder being written or deleted; a document is any .json
    r"rank-[0-9]{5,}\.safetensors|[A-Za-z0-9_][A-Za-z0-9_.=+-]*\.json"
    r"|ranks/rank-[0-9]{5,}\.(json|safetensors|part|done|failed)"
)
_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str, "number": int, "step": int, "reason": str, "time": (int, float), "size": int, "metrics": dict,
    "versions": dict, "world_size": int, "session": str, "info": dict, "forms": dict, "files": dict,
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete or no checkpoint, or does not hold what was asked of it."""


def rank_stem(rank: int) -> str:
    """Name of a process's files without their ending."""
    return f"rank-{rank:05d}"


def render_manifest(fields: Mapping[str, Any]) -> bytes:
    """The manifest as it stands in its file: sorted, and with the hash of the rest under "sha256"."""
    rest = {key: value for key, value in fields.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return (json.dumps({**rest, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint's folder, its own hash and its fields checked.

    Raises:
        CheckpointError: what is wrong with it.
    """
    try:
        content = _read_regular(path / MANIFEST, MAX_MANIFEST)
        fields = json.loads(content)
        if not isinstance(fields, dict) or render_manifest(fields) != content:
            raise CheckpointError(f"{MANIFEST} differs from its own hash")
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{MANIFEST} is no JSON") from None
    if fields.get("format") != FORMAT or fields.get("version") != VERSION:
        got = f"{fields.get('format')!r} version {fields.get('version')!r}"
        raise CheckpointError(f"wanted the format {FORMAT!r} version {VERSION}, got {got}")
    wrong = [k for k, kind in _FIELDS.items() if not isinstance(fields.get(k), kind) or isinstance(fields[k], bool)]
    if not wrong and not all(isinstance(value, (int, float)) for value in fields["metrics"].values()):
        wrong.append("numbers for metrics")
    if not wrong and not all(isinstance(getattr(torch, str(d), None), torch.dtype) for d in fields["forms"].values()):
        wrong.append("dtypes for forms")
    if wrong:
        raise CheckpointError(f"{MANIFEST} lacks {', '.join(wrong)}")
    for name, file in fields["files"].items():
        if FILE_NAME.fullmatch(name) is None or name == MANIFEST:
            raise CheckpointError(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
        if not (isinstance(file, dict) and isinstance(file.get("size"), int) and isinstance(file.get("sha256"), str)):
            raise CheckpointError(f"{MANIFEST} lacks size or hash of {name}")
    return fields


def _open_regular(path: Path) -> int:
    """A handle for reading; neither a link nor a pipe, whose opening would wait for ever."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(0, "no regular file")
    return handle


def _read_regular(path: Path, limit: int) -> bytes:
    with open(_open_regular(path), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(0, f"larger than {limit} bytes")
    return content


def _hash_file(path: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(_open_regular(path), "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


class Checkpoint:
    """A folder with a whole manifest. Its other files are checked by `verify`, at the latest before they are parsed.

    Args:
        path: the folder.
        verified: another process has verified the folder, this one need not hash it again.

    Raises:
        CheckpointError: the manifest is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, verified: bool = False) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path)
        self._verified = verified

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step={self.step})"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def step(self) -> int:
        """global_step at the save."""
        return self.manifest["step"]

    @property
    def number(self) -> int:
        """Counts the saves into a folder, so that of two checkpoints the newer has the greater number.

        Not the step: who goes back to step 50 and trains on wants to resume from there, not from the old step 100.
        """
        return self.manifest["number"]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics handed to the save, NaN included."""
        return {name: float(value) for name, value in self.manifest["metrics"].items()}

    @property
    def info(self) -> dict[str, Any]:
        """What the save was told about the run: model class, arguments, config, ..."""
        return self.manifest["info"]

    def missing(self) -> list[str]:
        """Damages that need no reading: files absent, of a wrong size or kind, tensors that the manifest lacks."""
        found = []
        for name, file in self.manifest["files"].items():
            try:
                status = os.lstat(self.path / name)
            except OSError as error:
                found.append(f"{name}: {error.strerror}")
                continue
            if not stat.S_ISREG(status.st_mode):
                found.append(f"{name}: no regular file")
            elif status.st_size != file["size"]:
                found.append(f"{name}: {status.st_size} bytes instead of {file['size']}")
        # The reader takes every such file of the folder for a part.
        listed = self.manifest["files"]
        files = sorted(path.name for path in self.path.glob("*.safetensors"))
        found += [f"{name}: not in the manifest" for name in files if name not in listed]
        return found

    def verify(self) -> list[str]:
        """What is wrong with the folder, a line each; [] if every file is there and none differs from its hash."""
        found = self.missing()
        if not found:
            files = self.manifest["files"]
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the GIL
                for name, damage in zip(files, pool.map(self._differs, files), strict=True):
                    found += [f"{name}: {damage}"] if damage else []
        self._verified = not found
        return found

    def _differs(self, name: str) -> str | None:
        try:
            same = _hash_file(self.path / name) == self.manifest["files"][name]["sha256"]
        except OSError as error:
            return str(error.strerror)
        return None if same else "content differs from its hash"

    def require_whole(self) -> Checkpoint:
        """Itself. Hashes the files the first time only.

        Raises:
            CheckpointError: the damages.
        """
        damages = self.missing() if self._verified else self.verify()
        if damages:
            raise CheckpointError(f"[Checkpoint] {self.path} is damaged: {'; '.join(damages)}; load another one")
        return self

    # ---- JSON

    @property
    def documents(self) -> list[str]:
        """Names for `document`."""
        return [name[:-5] for name in self.manifest["files"] if name.endswith(".json") and "/" not in name]

    def document(self, name: str) -> Any:
        """The JSON document of this name.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        if f"{name}.json" not in self.manifest["files"]:
            raise CheckpointError(f"[Checkpoint] {self.path} has no document {name!r}, only {self.documents}")
        return self._parsed(f"{name}.json")

    def rank_document(self, name: str, rank: int) -> Any:
        """The JSON document of this name that process `rank` saved, None if it saved none."""
        file = f"ranks/{rank_stem(rank)}.json"
        saved = self._parsed(file) if file in self.manifest["files"] else {}
        return saved.get(name) if isinstance(saved, dict) else None

    def _parsed(self, file: str) -> Any:
        content = self._checked(file)
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise CheckpointError(f"[Checkpoint] {self.path / file} is no JSON; load another checkpoint") from None

    def _checked(self, file: str) -> bytes:
        """A small file's content, which is hashed before anything looks at it."""
        known = self.manifest["files"][file]
        try:
            content = _read_regular(self.path / file, known["size"])
        except OSError as error:
            raise CheckpointError(f"[Checkpoint] {self.path / file} cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != known["sha256"]:
            raise CheckpointError(f"[Checkpoint] {self.path / file} differs from its hash; load another checkpoint")
        return content

    # ---- tensors

    def tensors(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of every tensor, as it was when saved, from the files' headers.

        Raises:
            CheckpointError: damages, or parts that do not make up the whole.
        """
        self.require_whole()
        try:
            metadata = _reader(self.path).read_metadata()
            return {name: self._described(name, found) for name, found in metadata.state_dict_metadata.items()}
        except CheckpointError:
            raise
        except Exception as error:  # the headers are foreign input, and say so in many ways
            raise CheckpointError(f"[Checkpoint] the tensors of {self.path} have no sound header: {error!r}") from error

    def _described(self, name: str, found: Any) -> tuple[torch.Size, torch.dtype]:
        boxes = {(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in found.chunks}
        held = sum(torch.Size(sizes).numel() for _, sizes in boxes)
        if held != found.size.numel():
            raise CheckpointError(
                f"[Checkpoint] {self.path} holds {held} elements of {name!r}, whose shape is {tuple(found.size)}"
            )
        form = self.manifest["forms"].get(name)
        if form is None:
            return found.size, found.properties.dtype
        dtype = getattr(torch, form)
        return (found.size[:-1] if dtype.is_complex else found.size), dtype

    @torch.no_grad()
    def load(self, targets: Mapping[str, Tensor]) -> None:
        """Copy the tensors of these names into `targets`, in place; each process reads only what its DTensors need.

        Other numbers of processes and other placements than at the save are fine. No collectives: a process may load
        alone.

        Raises:
            CheckpointError: damages; a name that is not there; another shape or dtype. No target is changed then.
        """
        known = self.tensors()
        problems = []
        for name, target in targets.items():
            wanted = f"{tuple(target.shape)} {target.dtype}"
            if name not in known:
                problems.append(f"{name} is not in it")
            elif (target.shape, target.dtype) != known[name]:
                problems.append(f"{name} is {tuple(known[name][0])} {known[name][1]} there and {wanted} here")
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise CheckpointError(
                f"[Checkpoint] {self.path} does not fit: {'; '.join(problems[:5])}{more}; "
                "load it into what it was saved from"
            )
        if not targets:
            return
        from torch.distributed.checkpoint import DefaultLoadPlanner, load

        state = {name: _form_of(target.detach()) for name, target in targets.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(state, storage_reader=_reader(self.path), planner=planner, no_dist=True)

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """The tensors that process `rank` saved for itself, on the CPU; {} if it saved none."""
        file = f"ranks/{rank_stem(rank)}.safetensors"
        if file not in self.manifest["files"]:
            return {}
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return {name: self._original(f"{file}:{name}", t) for name, t in load(self._checked(file)).items()}
        except SafetensorError as error:
            raise CheckpointError(f"[Checkpoint] {self.path / file} is no safetensors file: {error}") from error

    def _original(self, name: str, stored: Tensor) -> Tensor:
        form = self.manifest["forms"].get(name)
        if form is None:
            return stored
        dtype = getattr(torch, form)
        return torch.view_as_complex(stored) if dtype.is_complex else stored.view(dtype)


def _reader(path: Path) -> Any:
    """Reads and reshards. No pickles: it parses safetensors headers and nothing else."""
    try:
        import safetensors  # noqa: F401
        from torch.distributed.checkpoint import HuggingFaceStorageReader
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"[Checkpoint] reading {path} needs {error.name}, which is not installed; run `pip install {error.name}`"
        ) from error
    return HuggingFaceStorageReader(str(path))


def _form_of(target: Tensor) -> Tensor:
    """`stored_form` of a tensor or DTensor."""
    if not hasattr(target, "_local_tensor"):
        return stored_form(target)
    from torch.distributed.tensor import DTensor

    local: Tensor = target._local_tensor
    form = stored_form(local)
    if form is local:
        return target
    more = form.shape[local.dim() :]  # (2,) for complex numbers
    shape = torch.Size([*target.shape, *more])
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]
    return DTensor.from_local(form, mesh, placements, run_check=False, shape=shape, stride=stride)


def holds_checkpoint_files(path: Path) -> bool:
    """Whether a folder holds nothing but files of a checkpoint, written or deleted by half: it may be empty."""
    try:
        for entry in path.iterdir():
            if entry.name == "ranks" and stat.S_ISDIR(entry.lstat().st_mode):
                inner = [(f"ranks/{file.name}", file.lstat()) for file in entry.iterdir()]
            else:
                inner = [(entry.name, entry.lstat())]
            if not all(PART_NAME.fullmatch(name) and stat.S_ISREG(status.st_mode) for name, status in inner):
                return False
    except OSError:  # not ours to read, or being removed
        return False
    return True


def folders(folder: Path) -> Iterator[Path]:
    """Folders that are, or were to be, checkpoints: with a manifest, or named as the loop names them."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or not path.is_dir():
            continue
        if (path / MANIFEST).exists() or path.name.startswith(("step-", "final-")):
            yield path


def scan(folder: Path) -> tuple[list[Checkpoint], dict[str, list[str]]]:
    """Checkpoints of a folder, newest first, and the damages of those that are not whole; nothing is hashed."""
    good, damaged = [], {}
    for path in folders(folder):
        try:
            checkpoint = Checkpoint(path)
            damages = checkpoint.missing()
        except CheckpointError as error:
            damages = [str(error)]
        if damages:
            damaged[path.name] = damages
        else:
            good.append(checkpoint)
    return sorted(good, key=lambda c: (c.number, c.step), reverse=True), damaged
