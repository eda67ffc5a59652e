# SPDX-License-Identifier: Apache-2.0
"""Weights to begin with: He's for layers in front of an activation, and what each other layer needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastloop.recipes.model.branches import NORMS, zeroed_norms
from fastloop.recipes.model.summary import check_model

WHERE = "[initialize_weights]"
NONLINEARITIES = ("relu", "gelu", "silu", "leaky_relu", "selu", "tanh", "sigmoid", "linear")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_WEIGHTED = (nn.Linear, *_CONVOLUTIONS)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class _Rule:
    """What becomes of one parameter: `draw` gives its values on the CPU; None leaves it as it is."""

    text: str
    draw: Callable[[Tensor, torch.Generator | None], Tensor] | None = None


def initialize_weights(
    model: nn.Module,
    *,
    nonlinearity: str = "relu",
    residual_zero: bool | Sequence[str] = False,
    embedding_std: float = 0.02,
    seed: int | None = None,
) -> dict[str, str]:
    """Initialize the parameters in place, each by the layer that it is in; what was done, by name of the parameter.

    | layer | weights | biases |
    | --- | --- | --- |
    | convolution | normal, std = gain / sqrt(fan_out); transposed: fan_in | 0 |
    | linear | normal, std = gain / sqrt(fan_in) | 0 |
    | the last of these, in the order of registration | the same with gain 1 and fan_in: no activation follows | 0 |
    | attention (nn.MultiheadAttention) | Xavier, for query, key, value and output each | 0 |
    | embedding | normal, std = embedding_std; padding 0 | |
    | LSTM, GRU, RNN | of the input Xavier, recurrent orthogonal, for each gate | 0, forget gate of an LSTM 1 |
    | normalization | 1 | 0 |

    fan_in keeps the variance of the activations from layer to layer, fan_out that of the gradients; over a whole
    network the two differ by the ratio of its widths alone. Behind a convolution there usually is a normalization,
    which sets the scale of the activations: what is left to keep is the gradient's. Behind a linear layer there often
    is none, nor behind the transposed ones of a decoder. A fan_out counts the outputs that an input reaches: those of
    its group, and 1 / stride of them; so does the fan_in of a transposed convolution with inputs.

    Left as they are: frozen parameters (pre-trained, it may be), buffers, and parameters of other modules, such as a
    class token. A tied weight is initialized once; one that an embedding has too is an embedding's. Only nn.LSTM and
    its kin are recognized as gates, and only nn.MultiheadAttention as attention: for attention made of linear layers
    nonlinearity="linear" is the milder choice.

    Args:
        nonlinearity: that follows the layers; gain is torch.nn.init.calculate_gain's, for "gelu" and "silu" that of
            "relu".
        residual_zero: zero the last normalization of each residual branch, so that each block begins as the identity
            (Goyal et al., 2017). The branches are found by torch.fx; or name the normalizations, by patterns such as
            "layer*.bn2".
        embedding_std: standard deviation of embeddings, at least 0.
        seed: of a generator of its own, which leaves the global ones alone; the values then are the same on every
            device. None draws from torch's.

    Returns:
        By name of each parameter, tied names too, what was done.

    Raises:
        ValueError: parameters without values (lazy, on "meta"), a parametrization that cannot be assigned to, a
            residual_zero that finds no normalization, or an argument out of range.

    Source: He et al., "Delving Deep into Rectifiers", 2015; Glorot and Bengio, 2010 (Xavier); Saxe et al., 2014
    (orthogonal); Jozefowicz et al., 2015 (forget gate).
    """
    _check(model, nonlinearity, embedding_std)
    zeroed = zeroed_norms(model, residual_zero)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    rules = _rules(model, nonlinearity, embedding_std, zeroed)
    done: dict[str, str] = {}
    first: dict[int, str] = {}  # name by parameter
    for prefix, module, name, weight in _weights(model):
        originals = {f"{prefix}.{key}" if prefix else key: each for key, each in _originals(module, name)}
        earlier = next((first[id(each)] for each in originals.values() if id(each) in first), None)
        rule = rules[id(next(iter(originals.values())))]
        if earlier is not None:
            rule = _Rule(f"tied to {earlier}")
        elif not all(each.requires_grad for each in originals.values()):
            rule = _Rule("unchanged (frozen)")
        if rule.draw is not None:
            _assign(module, name, weight, rule.draw(weight, generator), next(iter(originals)))
        for full, each in originals.items():
            first.setdefault(id(each), full)
            done[full] = rule.text
    return done


# ---- the rule of each parameter


def _rules(model: nn.Module, nonlinearity: str, embedding_std: float, zeroed: set[str]) -> dict[int, _Rule]:
    """By parameter. Embeddings last: theirs counts for a weight that is tied to one."""
    gain = nn.init.calculate_gain("relu" if nonlinearity in ("gelu", "silu") else nonlinearity)  # type: ignore[arg-type]
    last = next((m for m in reversed(list(model.modules())) if isinstance(m, _WEIGHTED)), None)
    projections = {id(each.out_proj) for each in model.modules() if isinstance(each, nn.MultiheadAttention)}
    rules: dict[int, _Rule] = {}
    embeddings: dict[int, _Rule] = {}
    for prefix, module, name, _ in _weights(model):
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and name == "weight":
            rule, target = _embedding(module, embedding_std), embeddings
        else:
            rule, target = _rule(module, name, gain, module is last, id(module) in projections, prefix in zeroed), rules
        for _, parameter in _originals(module, name):
            target.setdefault(id(parameter), rule)
    return {**rules, **embeddings}


def _rule(module: nn.Module, name: str, gain: float, last: bool, projection: bool, zeroed: bool) -> _Rule:
    if isinstance(module, NORMS) and name in ("weight", "bias"):
        return _constant(0.0 if name == "bias" or zeroed else 1.0, ", residual" if zeroed and name == "weight" else "")
    if isinstance(module, nn.MultiheadAttention):
        if name in ("bias_k", "bias_v"):  # an extra token, not a bias
            return _Rule(f"unchanged ({name} of attention)")
        if name == "in_proj_bias":
            return _constant(0.0)
        if name.endswith("proj_weight"):
            return _xavier(3 if name == "in_proj_weight" else 1)
    if isinstance(module, _RECURRENT) and name.startswith(("weight_", "bias_")):
        return _recurrent(module, name)
    if isinstance(module, _WEIGHTED) and name in ("weight", "bias"):
        if name == "bias":
            return _constant(0.0)
        return _xavier(1) if projection else _he(module, gain, last)
    return _Rule(f"unchanged ({type(module).__name__})")


def _he(module: nn.Module, gain: float, last: bool) -> _Rule:
    weight = module.weight
    assert isinstance(weight, Tensor)
    area = math.prod(weight.shape[2:])  # 1 for linear layers
    if isinstance(module, _TRANSPOSED):
        fan, kind = weight.shape[0] // module.groups * _reached(module), "fan_in"
    elif isinstance(module, nn.Linear) or last:
        fan, kind = float(weight.shape[1] * area), "fan_in"
    else:
        assert isinstance(module, _CONVOLUTIONS)
        fan, kind = weight.shape[0] // module.groups * _reached(module), "fan_out"
    gain = 1.0 if last else gain
    std = gain / math.sqrt(max(fan, 1.0))
    why = ", the last layer" if last else ""
    return _Rule(f"normal, std {std:.4g} (gain {gain:.4g}, {kind} {fan:g}{why})", _normal(std))


def _reached(module: Any) -> float:
    """Positions that one on the other side of the stride meets: of 16 x 16 with stride 16 a single one, not 256."""
    return math.prod(max(size / stride, 1.0) for size, stride in zip(module.kernel_size, module.stride, strict=True))


def _embedding(module: nn.Embedding | nn.EmbeddingBag, std: float) -> _Rule:
    padding = module.padding_idx

    def draw(weight: Tensor, generator: torch.Generator | None) -> Tensor:
        values = _normal(std)(weight, generator)
        if padding is not None:
            values[padding] = 0.0
        return values

    return _Rule(f"normal, std {std:.4g}" + ("" if padding is None else f", row {padding} is 0 (padding)"), draw)


def _recurrent(module: nn.Module, name: str) -> _Rule:
    gates = 4 if _is_lstm(module) else 3 if isinstance(module, (nn.GRU, nn.GRUCell)) else 1
    per_gate = ", for each gate" if gates > 1 else ""
    if name.startswith("weight_hh"):
        return _Rule(f"orthogonal{per_gate}", _stacked(nn.init.orthogonal_, gates))
    if name.startswith("weight"):  # of the input, or weight_hr: the projection of a hidden state
        return _xavier(gates if name.startswith("weight_ih") else 1, per_gate)
    if gates == 4 and name.startswith("bias_ih"):  # torch adds bias_ih and bias_hh: 1 in one of them
        return _Rule("0, 1 for the forget gate", _forget)
    return _constant(0.0)


def _is_lstm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LSTM, nn.LSTMCell))


# ---- values, drawn on the CPU in fp32, or fp64: the same for every device


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)


def _constant(value: float, why: str = "") -> _Rule:
    return _Rule(f"{value:g}{why}", lambda weight, generator: _empty(weight).fill_(value))


def _normal(std: float) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    return lambda weight, generator: _empty(weight).normal_(0.0, std, generator=generator)


def _xavier(parts: int, why: str = "") -> _Rule:
    more = why or (f", for each of {parts} projections" if parts > 1 else "")
    return _Rule(f"Xavier uniform{more}", _stacked(nn.init.xavier_uniform_, parts))


def _stacked(init: Callable[..., Tensor], parts: int) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    """For matrices that are stored as one: the fans of the whole would be those of none of them."""

    def draw(weight: Tensor, generator: torch.Generator | None) -> Tensor:
        values = _empty(weight)
        for part in values.chunk(parts):
            init(part, generator=generator)
        return values

    return draw


def _forget(weight: Tensor, generator: torch.Generator | None) -> Tensor:
    values = _empty(weight).zero_()
    quarter = len(values) // 4  # gates are input, forget, cell, output
    values[quarter : 2 * quarter] = 1.0
    return values


# ---- parameters as modules have them


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """(module's name, module, parameter's name, value), also of those that a parametrization computes."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, parametrize.ParametrizationList):
            continue  # its originals are those of the module that it is in
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:  # type: ignore[union-attr]
                if _originals(module, name):
                    yield prefix, module, name, getattr(module, name)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix, module, name, parameter


def _originals(module: nn.Module, name: str) -> list[tuple[str, Tensor]]:
    """The parameter of that name; where a parametrization computes it, those that it is computed from."""
    if name in module._parameters:
        return [(name, module._parameters[name])]  # type: ignore[list-item]
    computed: Any = module.parametrizations[name]  # type: ignore[index]
    return [(f"parametrizations.{name}.{key}", each) for key, each in computed.named_parameters(recurse=False)]


@torch.no_grad()
def _assign(module: nn.Module, name: str, weight: Tensor, values: Tensor, full: str) -> None:
    values = values.to(weight)
    if name in module._parameters:
        weight.copy_(values)
        return
    try:
        setattr(module, name, values)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{WHERE} {full} belongs to a parametrization that cannot be assigned to ({error}); initialize before "
            "registering it"
        ) from error


def _check(model: nn.Module, nonlinearity: str, embedding_std: float) -> None:
    check_model(model, WHERE)
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"{WHERE} nonlinearity must be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    if not 0.0 <= embedding_std < math.inf:
        raise ValueError(f"{WHERE} embedding_std must be at least 0, got {embedding_std}; pass e.g. 0.02")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{WHERE} {name} is on the device meta, without values; call model.to_empty() first")


__all__ = ["initialize_weights"]
