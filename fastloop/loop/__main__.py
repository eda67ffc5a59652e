# SPDX-License-Identifier: Apache-2.0
"""`python -m fastloop.loop inspect|verify|export|curves`: look at checkpoints and take weights out of them.

Exit code: 0 good, 1 damaged, 2 wrong use.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastloop.loop.manifest import MANIFEST, Checkpoint, CheckpointError, folders, scan
from fastloop.loop.safetensors_writer import EXPORT_NAMES, Entry, header, in_file_order, write_file

GOOD, DAMAGED, WRONG_USE = 0, 1, 2


class WrongUse(Exception):
    """What was asked for cannot be done; the text says why."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except WrongUse as error:
        print(error, file=sys.stderr)
        return WRONG_USE
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return DAMAGED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fastloop.loop", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, text: str, where: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("folder", type=Path, metavar="DIR", help=where)
        sub.set_defaults(command=command)
        return sub

    where = "a run's folder, a folder of checkpoints, or one checkpoint"
    add("inspect", inspect, "list checkpoints, or what one holds", where)
    add("verify", verify, "compare every file with its hash", where)
    sub = add(
        "export", export, "write the weights of a checkpoint (the newest whole one) as one safetensors file", where
    )
    sub.add_argument("-o", "--output", type=Path, default=Path("model.safetensors"), help="default: %(default)s")
    sub.add_argument("--ema", action="store_true", help="averaged weights in place of those of the last step")
    sub.add_argument("--dtype", choices=sorted(DTYPES), help="of floating-point weights; default: as they are")
    sub.add_argument("--force", action="store_true", help="replace an output that is there")
    add("curves", curves, "draw the training curves of a run", "a run's folder")
    return parser


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints that DIR means.

    Raises:
        WrongUse: there are none.
    """
    if (folder / MANIFEST).exists():
        return [folder]
    for candidate in (folder / "checkpoints", folder):
        if found := list(folders(candidate)):
            return found
    raise WrongUse(f"no checkpoint in {folder}; give {_parser().prog} a run's folder or a checkpoint's")


# ---- inspect and verify


def inspect(options: argparse.Namespace) -> int:
    """A table of all checkpoints, or the content of one."""
    found = checkpoint_folders(options.folder)
    if found == [options.folder]:
        return _inspect_one(Checkpoint(options.folder))
    good, damaged = scan(found[0].parent)
    metrics = sorted({metric for checkpoint in good for metric in checkpoint.metrics})
    rows = []
    for c in good:
        values = [f"{c.metrics[m]:.6g}" if m in c.metrics else "" for m in metrics]
        age, size = _age(time.time() - c.manifest["time"]), _size(c.manifest["size"])
        rows.append([c.name, str(c.step), age, size, c.manifest["reason"], *values])
    _table(["checkpoint", "step", "age", "size", "reason", *metrics], rows)
    for name, damages in damaged.items():
        print(f"{name} is damaged: {'; '.join(damages)}")
    return DAMAGED if damaged else GOOD


def _inspect_one(checkpoint: Checkpoint) -> int:
    manifest = checkpoint.manifest
    saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest["time"]))
    facts = {
        "checkpoint": checkpoint.path, "step": checkpoint.step, "saved": saved, "reason": manifest["reason"],
        "size": _size(manifest["size"]), "processes": manifest["world_size"],
        **{f"{name} version": version for name, version in manifest["versions"].items()},
        **checkpoint.metrics, **checkpoint.info, "documents": ", ".join(checkpoint.documents),
    }  # fmt: skip
    _table(["", ""], [[str(key), str(value)] for key, value in facts.items()])
    tensors = checkpoint.tensors()
    rows = [[n, str(tuple(s)), _name(d), _size(s.numel() * d.itemsize)] for n, (s, d) in sorted(tensors.items())]
    _table(["tensor", "shape", "dtype", "size"], rows)
    return GOOD


def verify(options: argparse.Namespace) -> int:
    """A line for each checkpoint; what is damaged says how."""
    code = GOOD
    for path in checkpoint_folders(options.folder):
        try:
            damages = Checkpoint(path).verify()
        except CheckpointError as error:
            damages = [str(error)]
        print(f"{path.name}: {'; '.join(damages) if damages else 'good'}")
        code = DAMAGED if damages else code
    return code


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(head: list[str], rows: list[list[str]]) -> None:
    """With rich where it is installed, in plain columns elsewhere."""
    try:
        box, console, table = (import_module(f"rich.{part}") for part in ("box", "console", "table"))
    except ModuleNotFoundError:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in [head, *rows] if any(head) else rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    grid = table.Table(*head, box=box.SIMPLE, show_header=any(head))
    for row in rows:
        grid.add_row(*row)
    out = console.Console(markup=False, highlight=False)
    if not out.is_terminal:  # into a pipe or a file: no cell is cut
        out.width = max(out.width, out.measure(grid, options=out.options.update(max_width=1 << 20)).maximum)
    out.print(grid)


# ---- export

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def export(options: argparse.Namespace) -> int:
    """One file that `safetensors.torch.load_file` and `model.load_state_dict` take."""
    output: Path = options.output
    if output.exists() and not options.force:
        raise WrongUse(f"{output} is there already; give another --output or --force")
    if (output.absolute().parent / MANIFEST).exists():
        raise WrongUse(f"{output} would lie in a checkpoint, which a file more would damage; give another --output")
    checkpoint = _newest_whole(checkpoint_folders(options.folder))
    weights = model_weights(checkpoint, ema=options.ema, dtype=DTYPES.get(options.dtype))
    entries = in_file_order(Entry(n, t.dtype, tuple(t.shape), (0,) * t.dim()) for n, t in weights.items())
    head = header(entries, {"step": str(checkpoint.step)}, sharded=False)
    temporary = output.with_name(f".{output.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        write_file(temporary, [head, *(_bytes(weights[entry.name]) for entry in entries)])
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output}: {len(entries)} tensors of step {checkpoint.step}, {_size(output.stat().st_size)}")
    return GOOD


def _newest_whole(found: list[Path]) -> Checkpoint:
    if len(found) == 1:
        return Checkpoint(found[0]).require_whole()
    for checkpoint in scan(found[0].parent)[0]:
        damages = checkpoint.verify()
        if not damages:
            return checkpoint
        print(f"{checkpoint.name} is damaged and passed over: {'; '.join(damages)}", file=sys.stderr)
    raise CheckpointError(f"every checkpoint in {found[0].parent} is damaged")


def model_weights(checkpoint: Checkpoint, *, ema: bool = False, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The model's state_dict out of a checkpoint, on the CPU.

    Args:
        checkpoint: one that a Loop has saved. `info["tied"]`, {alias: name}, names tensors that were saved once.
        ema: averages in place of the parameters that have one, in the parameters' dtypes.
        dtype: of all floating-point tensors.

    Raises:
        WrongUse: there are no weights, or no averages.
    """
    known = checkpoint.tensors()
    sources = {name.removeprefix("model."): name for name in known if name.startswith("model.")}
    if not sources:
        raise WrongUse(f"{checkpoint.path} holds no weights of a model")
    if ema:
        averages = {name: f"optimizer.{name}.ema" for name in sources if f"optimizer.{name}.ema" in known}
        if not averages:
            raise WrongUse(f"{checkpoint.path} holds no averages; train with ema_decay, or leave --ema out")
        sources |= averages
    loaded = {source: torch.empty(known[source][0], dtype=known[source][1]) for source in sources.values()}
    checkpoint.load(loaded)
    weights = {}
    for name, source in sources.items():
        own = known[f"model.{name}"][1]
        weights[name] = loaded[source].to(dtype if dtype is not None and own.is_floating_point else own)
    for alias, name in checkpoint.info.get("tied", {}).items():
        weights[alias] = weights[name]
    unknown = sorted({_name(t.dtype) for t in weights.values() if t.dtype not in EXPORT_NAMES})
    if unknown:
        raise WrongUse(f"a safetensors file cannot hold {', '.join(unknown)}, which {checkpoint.path} has")
    return weights


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return memoryview(flat.numpy())  # type: ignore[arg-type]


# ---- curves


def curves(options: argparse.Namespace) -> int:
    """Draw training_curves.png from metrics.jsonl."""
    if not (options.folder / "metrics.jsonl").exists():
        raise WrongUse(f"no metrics.jsonl in {options.folder}; give {_parser().prog} a run's folder")
    print(import_module("fastloop.loop.curves").plot_curves(options.folder))
    return GOOD


if __name__ == "__main__":
    sys.exit(main())
