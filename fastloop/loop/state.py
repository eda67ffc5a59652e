# SPDX-License-Identifier: Apache-2.0
"""Model and optimizer as named tensors, so that a checkpoint can be read by another number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.loop import documents
from fastloop.loop.manifest import Checkpoint

# What groups say of the run that they are in. A loop with cuda_graph sets "capturable", which would slow one without.
NO_SETTINGS = ("params", "param_names", "capturable")


def model_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors as "model.<name>", each memory once, and what else there is: names that share memory, extra state."""
    tensors: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    shared: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            extra[name] = value
            continue
        local = getattr(value, "_local_tensor", value)
        key = (local.data_ptr(), local.dtype, local.shape, local.stride())
        if local.numel() and key in first:
            shared[name] = first[key]
        else:
            first[key] = name
            tensors[f"model.{name}"] = value
    return tensors, {"shared": shared, "extra": extra}


def load_model(model: nn.Module, checkpoint: Checkpoint, rest: Mapping[str, Any]) -> None:
    """Copy the checkpoint's weights into the model, in place.

    Raises:
        RuntimeError: names or shapes that differ, each of them named.
    """
    own = model.state_dict()
    stored = {
        name.removeprefix("model."): shape for name, (shape, _) in checkpoint.tensors().items() if _is_model(name)
    }
    targets, problems = {}, []
    for name, value in own.items():
        if not isinstance(value, Tensor):
            continue
        if name in stored:
            if tuple(stored[name]) != tuple(value.shape):
                problems.append(f"{name}: {tuple(stored[name])} in the checkpoint, {tuple(value.shape)} in the model")
            targets[f"model.{name}"] = value
        elif name not in rest["shared"]:
            problems.append(f"{name}: not in the checkpoint")
    problems += [f"{name}: not in the model" for name in stored if name not in own]
    if problems:
        raise RuntimeError(
            f"[Loop] {checkpoint.path} is of another model; pass resume=False or another run_dir, or make the model "
            "that was saved:\n  " + "\n  ".join(sorted(problems))
        )
    checkpoint.load(targets)
    with torch.no_grad():
        for name, source in rest["shared"].items():
            if name in own and source in own and own[name].data_ptr() != own[source].data_ptr():
                own[name].copy_(own[source])
    if rest["extra"]:
        model.load_state_dict({name: rest["extra"][name] for name in rest["extra"]}, strict=False)


def _is_model(name: str) -> bool:
    return name.startswith("model.")


def names_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The optimizer's parameters in its order, by their names in the model; others by their number."""
    known = {id(p): name for name, p in model.named_parameters()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [known.get(id(p), f"param{i}") for i, p in enumerate(params)]


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States as "optimizer.<parameter>.<key>", and the rest as what `documents.pack` takes."""
    names = names_of(model, optimizer)
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, values in saved["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{names[index]}.{key}"] = value
            else:
                numbers.setdefault(names[index], {})[key] = value
    groups = [{k: v for k, v in group.items() if k not in NO_SETTINGS} for group in saved["param_groups"]]
    members = [[names[i] for i in group["params"]] for group in saved["param_groups"]]
    return tensors, {"groups": groups, "members": members, "numbers": numbers, "keys": _keys(saved, names)}


def _keys(saved: Mapping[str, Any], names: list[str]) -> dict[str, list[str]]:
    return {names[i]: [k for k, v in values.items() if isinstance(v, Tensor)] for i, values in saved["state"].items()}


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint, rest: Mapping[str, Any]
) -> None:
    """Load states and settings; parameters are matched by their names.

    Raises:
        RuntimeError: other groups, or groups of other parameters.
    """
    names = names_of(model, optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {name: i for i, name in enumerate(names)}
    positions = iter(range(len(names)))
    members = [[next(positions) for _ in group["params"]] for group in optimizer.param_groups]
    if [[names[i] for i in group] for group in members] != [list(group) for group in rest["members"]]:
        raise RuntimeError(
            f"[Loop] {checkpoint.path} has parameter groups of "
            f"{[len(group) for group in rest['members']]} parameters, the optimizer has {[len(g) for g in members]}, "
            "or they are other ones; construct it as it was saved, or pass resume=False"
        )
    stored = checkpoint.tensors()
    targets: dict[str, Tensor] = {}
    for name, keys in rest["keys"].items():
        for key in keys:
            shape, dtype = stored[f"optimizer.{name}.{key}"]
            targets[f"optimizer.{name}.{key}"] = _target(params[index_of[name]], tuple(shape), dtype)
    checkpoint.load(targets)
    state: dict[int, dict[str, Any]] = {}
    for name in {**rest["keys"], **rest["numbers"]}:
        values = {key: targets[f"optimizer.{name}.{key}"] for key in rest["keys"].get(name, ())}
        state[index_of[name]] = {**values, **rest["numbers"].get(name, {})}
    own = optimizer.state_dict()["param_groups"]
    groups = [
        {**saved, **{k: mine[k] for k in NO_SETTINGS if k in mine}}
        for saved, mine in zip(rest["groups"], own, strict=True)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def as_captured(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A state_dict of an optimizer, with what `optimizer` itself says of "capturable"."""
    groups, own = saved["param_groups"], optimizer.param_groups
    if len(groups) != len(own):
        return saved  # torch raises its own error
    mine = [{"capturable": group["capturable"]} if "capturable" in group else {} for group in own]
    return {**saved, "param_groups": [{**group, **kept} for group, kept in zip(groups, mine, strict=True)]}


def _target(param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where a stored state of `param` is read to: sharded like it if it has its shape."""
    if tuple(param.shape) == shape and param.dim() > 0:
        return torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def unpacked(checkpoint: Checkpoint, name: str, prefix: str) -> Any:
    """A document, with the small tensors that were stored beside it under names that begin with `prefix`."""
    stored = {key: info for key, info in checkpoint.tensors().items() if key.startswith(prefix + ".")}
    tensors = {key: torch.empty(tuple(shape), dtype=dtype) for key, (shape, dtype) in stored.items()}
    if tensors:
        checkpoint.load(tensors)
    return documents.unpack(checkpoint.document(name), tensors)
