# SPDX-License-Identifier: Apache-2.0
"""What a model is made of: parameters, shapes, FLOPs and memory, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from fastloop.loop.flops import model_flops
from fastloop.loop.probe import call, device_of, eval_mode, first_batch, moved
from fastloop.loop.restore import restored
from fastloop.recipes.results import Result
from fastloop.texts import columns

WHERE = "[model_summary]"


@dataclass(frozen=True)
class Layer:
    """A module that has parameters of its own, or no parts.

    Args:
        name, kind: of the module; kind is the name of its class.
        parameters, trainable: elements that are its own and not counted in a layer above.
        tied: whether a layer above has one of its parameters too.
        outputs: shapes of the tensors that its first call gave; None without a batch, or if it was not called.
        calls: in one forward; None without a batch.
    """

    name: str
    kind: str
    parameters: int
    trainable: int
    tied: bool
    outputs: list[list[int]] | None
    calls: int | None


@dataclass(frozen=True)
class ModelSummary(Result):
    """The layers of a model, and their sums.

    Args:
        layers: in the order of their registration.
        parameters, trainable: elements, shared ones counted once.
        flops: of forward and backward of the batch; None without one, or where they cannot be counted, as those of
            nn.LSTM.
        bytes: of "parameters", "buffers", "gradients", and "adam state" and "momentum state", as torch's Adam and SGD
            keep them: two and one value for each trainable one, in its dtype. Activations come on top of these.
    """

    practice: ClassVar[str] = "model_summary"
    layers: list[Layer]
    parameters: int
    trainable: int
    flops: int | None
    bytes: dict[str, int]

    def table(self) -> str:
        """A row for each layer, and the sums below."""
        rows = [
            (each.name, each.kind, _shapes(each), each.parameters, "tied" if each.tied else _share(each))
            for each in self.layers
        ]
        memory = ", ".join(f"{name} {_mebibytes(size)}" for name, size in self.bytes.items())
        lines = [
            columns(("layer", "kind", "output", "parameters", "trained"), rows),
            "",
            f"parameters: {self.parameters:,}, of which {self.trainable:,} are trained",
            f"memory: {memory}; activations not included",
        ]
        if self.flops is not None:
            lines.append(f"FLOPs of forward and backward of the batch: {self.flops:,}")
        return "\n".join(lines)


def model_summary(model: nn.Module, batch: Any = None) -> ModelSummary:
    """Parameters by layer; with a batch, shapes of the outputs, calls and FLOPs as well.

    The model is called in eval mode, without gradients: with the batch by name if it is a dict, with the first element
    if it is a list or tuple, else with the batch itself. It is afterwards as it was, random states too.

    Args:
        batch: a batch, or a loader, whose first one is taken.

    Raises:
        ValueError: parameters without values; call the model once first.
    """
    check_model(model, WHERE)
    outputs: dict[str, tuple[list[list[int]], int]] = {}
    flops = None
    if batch is not None:
        given = moved(first_batch(batch), device_of(model))
        outputs, flops = _outputs(model, given), model_flops(model, given)
    counted: set[int] = set()
    layers = [_layer(n, m, outputs if batch is not None else None, counted) for n, m in _shown(model)]
    trained = [each for each in model.parameters() if each.requires_grad]
    return ModelSummary(
        layers,
        sum(each.numel() for each in model.parameters()),
        sum(each.numel() for each in trained),
        flops,
        {
            "parameters": _bytes(model.parameters()),
            "buffers": _bytes(model.buffers()),
            "gradients": _bytes(trained),
            "adam state": 2 * _bytes(trained),
            "momentum state": _bytes(trained),
        },
    )


def _shown(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that have parameters of their own, or no parts."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(each is not None for each in module._parameters.values()) or not any(module.children())
    ]


def _layer(
    name: str, module: nn.Module, outputs: dict[str, tuple[list[list[int]], int]] | None, counted: set[int]
) -> Layer:
    own = [each for each in module._parameters.values() if each is not None]
    new = [each for each in own if id(each) not in counted]
    counted.update(id(each) for each in own)
    shapes, calls = (None, None) if outputs is None else outputs.get(name, (None, 0))
    return Layer(
        name or "(model)",
        type(module).__name__,
        sum(each.numel() for each in new),
        sum(each.numel() for each in new if each.requires_grad),
        len(new) < len(own),
        shapes,
        calls,
    )


def _outputs(model: nn.Module, batch: Any) -> dict[str, tuple[list[list[int]], int]]:
    """By name of the module, shapes of its first call's output and how often it was called."""
    found: dict[str, tuple[list[list[int]], int]] = {}
    handles: list[RemovableHandle] = []

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def called(module: nn.Module, inputs: Any, output: Any) -> None:
            shapes, calls = found.get(name, (None, 0))
            if shapes is None:
                shapes = [list(each.shape) for each in tree_leaves(output) if isinstance(each, Tensor)]
            found[name] = shapes, calls + 1

        return module.register_forward_hook(called)

    with restored([model]), eval_mode(model):
        try:
            handles += [watch(name, module) for name, module in _shown(model)]
            call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return found


def check_model(model: Any, where: str) -> None:
    """Raise TypeError for what is no model, ValueError for one with parameters or buffers that have no shape yet."""
    check_module(model, where)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(f"{where} {name} has no shape yet; call the model once with a batch first")


def check_module(model: Any, where: str) -> None:
    """Raise TypeError for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where} model must be an nn.Module, got {type(model).__name__}; pass the model itself")


def _bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors)


def _shapes(layer: Layer) -> str:
    if layer.outputs is None:
        return "-" if layer.calls is None else "not called"
    text = ", ".join("x".join(map(str, shape)) for shape in layer.outputs)
    return text + (f" ({layer.calls} calls)" if layer.calls and layer.calls > 1 else "")


def _share(layer: Layer) -> str:
    if not layer.parameters:
        return "-"
    return "yes" if layer.trainable == layer.parameters else "no" if not layer.trainable else f"{layer.trainable}"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"


__all__ = ["Layer", "ModelSummary", "check_model", "check_module", "model_summary"]
