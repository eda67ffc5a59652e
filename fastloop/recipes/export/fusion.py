# SPDX-License-Identifier: Apache-2.0
"""BatchNorm folded into the layer before it, for inference."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# By exact type: a subclass, as timm's BatchNormAct2d, may compute something else besides.
BEFORE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ROUNDINGS = 64  # of the products' sums, in units of the dtype's epsilon over the largest output


@dataclass
class Fusion:
    """What was fused: `errors` by the pair's names, largest difference over the largest output; `left` with the
    reason."""

    errors: dict[tuple[str, str], float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """A copy in eval mode in which each BatchNorm right after a convolution or Linear is folded into it.

    w' = w * gamma / sqrt(var + eps), b' = (b - mean) * gamma / sqrt(var + eps) + beta, computed in fp64 and rounded
    once. The BatchNorm's place is taken by nn.Identity: names and structure stay. Which follows which comes from
    torch.fx, where that can follow the forward, of the model or of its parts, and from the neighbours in nn.Sequential
    elsewhere; it must be so with the forward's optional arguments given and left out. Layers that are used twice, under
    hooks or parametrized, and BatchNorm without running statistics stay as they are. Each fused layer is compared with
    its pair on random inputs. The copy is for inference: its `fusion` says what was done; compare it with
    `verify_copy`. After a Linear, BatchNorm1d is folded for inputs [n, features]: others raise ValueError in its place.

    Raises:
        TypeError: no module.
        RuntimeError: a fused layer that differs from its pair by more than rounding.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015, section 3.1.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[fuse_conv_bn] model must be an nn.Module, got {type(model).__name__}")
    made = copy.deepcopy(model).eval()
    uses = Counter(id(module) for _, module in made.named_modules(remove_duplicate=False))
    done = Fusion()
    for pair in _names_of_pairs(made):
        layer, norm = (made.get_submodule(name) for name in pair)
        reason = _why_not(layer, norm, uses)
        if reason:
            done.left[pair[1]] = reason
            continue
        fused = _fused(layer, norm)
        done.errors[pair] = _error(layer, norm, fused, pair)
        _replace(made, pair[0], fused)
        _replace(made, pair[1], Folded(pair[1]) if isinstance(layer, nn.Linear) else nn.Identity())
    for name, module in made.named_modules():
        if type(module) in NORMS:
            done.left.setdefault(name, "no convolution or Linear of its own right before it was found")
    made.fusion = done  # type: ignore[assignment]
    return made


class Folded(nn.Identity):
    """In the place of a BatchNorm1d after a Linear: dimension 1, which it normalizes, must be the features."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, input: Tensor) -> Tensor:
        """The input, of two dimensions."""
        if input.dim() != 2:
            raise ValueError(
                f"[fuse_conv_bn] {self.name} was folded for inputs [n, features], got {tuple(input.shape)}, of which "
                "it normalizes dimension 1; use the model without fusion"
            )
        return input


def _names_of_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of (layer, BatchNorm) that follow each other. Of a copy, for tracing may leave its proxies in a model."""
    traced = copy.deepcopy(model)
    names = {id(module): name for name, module in traced.named_modules()}
    return [(names[id(layer)], names[id(norm)]) for layer, norm in _pairs(traced)]


def _pairs(module: nn.Module) -> list[tuple[Any, Any]]:
    """(layer, BatchNorm) that follow each other, found as far down as torch.fx needs it."""
    if not any(type(each) in NORMS for each in module.modules()):
        return []
    try:
        parameters = inspect.signature(module.forward).parameters.values()
        defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
        found = [list(_of_graph(module, fx.Tracer().trace(module)))]
        if defaults:
            found.append(list(_of_graph(module, fx.Tracer().trace(module, concrete_args=defaults))))
    except Exception:  # whatever the forward does that tracing cannot follow
        own = list(_neighbours(module))
        return own + [pair for child in module.children() for pair in _pairs(child)]
    return [pair for pair in found[0] if pair in found[-1]]


def _of_graph(module: nn.Module, graph: fx.Graph) -> Iterator[tuple[Any, Any]]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    # A weight that the forward takes itself, as in F.linear(x, self.layer.weight), is a use of its layer too.
    calls.update(str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr")
    for node in graph.nodes:
        if node.op != "call_module" or type(module.get_submodule(str(node.target))) not in NORMS:
            continue
        before = node.args[0] if node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
            continue
        if calls[str(node.target)] == calls[str(before.target)] == 1:
            layer = module.get_submodule(str(before.target))
            if type(layer) in BEFORE:
                yield layer, module.get_submodule(str(node.target))


def _neighbours(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    if type(module).forward is not nn.Sequential.forward:
        return
    children = list(module.children())
    for layer, norm in pairwise(children):
        if type(layer) in BEFORE and type(norm) in NORMS:
            yield layer, norm


def _why_not(layer: Any, norm: Any, uses: Counter[int]) -> str:
    """Why a pair stays as it is; "" where it can be fused."""
    width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics: it takes those of each batch"
    if uses[id(layer)] > 1 or uses[id(norm)] > 1:
        return "the layer or the BatchNorm is used in several places"
    if any(is_lazy(p) for each in (layer, norm) for p in each.parameters()):
        return "its parameters are not there yet: run one batch through the model first"
    if any(each._forward_hooks or each._forward_pre_hooks for each in (layer, norm)):
        return "there are hooks on the layer or on the BatchNorm"
    if layer._parameters.get("weight") is None or type(layer.weight.data) is not Tensor:
        return "the layer's weight is parametrized, quantized or sharded"
    if not layer.weight.is_floating_point() or norm.num_features != width:
        return f"it normalizes {norm.num_features} features, the layer before has {width}"
    if isinstance(layer, TRANSPOSED) and layer.groups > 1:
        return "the layer is a transposed convolution with groups"
    return ""


def _fused(layer: Any, norm: Any) -> Any:
    exact, statistics = (copy.deepcopy(each).double().eval() for each in (layer, norm))
    if isinstance(layer, nn.Linear):
        made: Any = fuse_linear_bn_eval(exact, statistics)
    else:
        made = fuse_conv_bn_eval(exact, statistics, transpose=isinstance(layer, TRANSPOSED))
    return made.to(layer.weight.dtype).eval()


@torch.no_grad()
def _error(layer: Any, norm: Any, fused: Any, pair: tuple[str, str]) -> float:
    """Largest difference of the fused layer from its pair, over the largest output, on standard normal inputs."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (8, layer.in_features)
    else:
        spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        shape = (2, layer.in_channels, *(span + 4 for span in spans))
    x = torch.randn(shape, generator=generator).to(layer.weight)
    expected = copy.deepcopy(norm).double()(layer(x).double())
    largest = float(expected.abs().max())
    error = float((fused(x).double() - expected).abs().max()) / largest if largest else 0.0
    limit = ROUNDINGS * torch.finfo(layer.weight.dtype).eps * max(1.0, _cancelling(layer, norm, largest))
    if not error <= limit:
        raise RuntimeError(
            f"[fuse_conv_bn] {pair[0]} and {pair[1]} fused differ from the pair by {error:.3g} of the largest output, "
            f"rounding explains {limit:.2g}; look at their running statistics and weights"
        )
    return error


def _cancelling(layer: Any, norm: Any, largest: float) -> float:
    """How much larger than the outputs are the terms that add up to them: the bias and the running mean, normalized."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    terms = norm.running_mean.double() * scale
    if layer.bias is not None:
        terms = torch.maximum(terms.abs(), (layer.bias.double() * scale).abs())
    return float(terms.abs().max()) / largest if largest else 1.0


def _replace(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, last, made)
