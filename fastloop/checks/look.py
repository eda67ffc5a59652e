# SPDX-License-Identifier: Apache-2.0
"""One look at a batch: the loss and its gradient, and which functions of torch came to it with which tensors.

Losses are seen where they are computed, by a torch function mode: in a criterion, in a loss function of the user's own,
or inside of the model alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastloop.findings import Finding
from fastloop.loop import options
from fastloop.loop.probe import device_of, loss_of, moved

LOSSES: dict[Callable[..., Any], str] = {
    getattr(functional, name): name
    for name in (
        "cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "mse_loss",
        "l1_loss", "smooth_l1_loss", "huber_loss",
    )
}  # fmt: skip
LOG_SOFTMAX = (functional.log_softmax, torch.log_softmax, Tensor.log_softmax)
SUBTRACTIONS = (Tensor.sub, Tensor.__sub__, Tensor.__rsub__, torch.sub, torch.subtract)
DROPOUTS = {
    getattr(functional, name): name
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
}
WITH_WEIGHTS = (
    functional.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu
)  # fmt: skip
SHAPE_ONLY = (
    "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Clone", "ToCopy",
    "Alias", "Slice", "Select", "Index", "Expand",
)  # fmt: skip


@dataclass
class Call:
    """A loss that was computed: its function, and what it was given."""

    name: str
    input: Tensor
    target: Tensor | None
    options: dict[str, Any] = field(default_factory=dict)
    result: Tensor | None = None


Examine = Callable[[Call], "tuple[list[Finding], bool]"]


@dataclass
class Look:
    """What was seen.

    Attributes:
        loss: detached; None where it could not be computed.
        outputs: of the model's last call.
        inputs: standard deviation and mean of what its first layer with weights is given.
        calls: the losses, in order.
        gradients: by parameter; None for one that the loss does not depend on. Empty where none were asked for.
        findings: of `examine`.
        always_random: dropouts that drop in eval mode.
        error: that ended it.
        explained: the findings say why it ended.
    """

    loss: Tensor | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    outputs: Any = None
    inputs: tuple[float, float] | None = None
    calls: list[Call] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    always_random: list[str] = field(default_factory=list)
    error: Exception | None = None
    explained: bool = False


def wanted(model: Any, loss_fn: Any, optimizer: Any = None) -> None:
    """Raise TypeError unless they are what they are called, ValueError for a criterion that Loop does not take."""
    if optimizer is not None:
        options.objects(model, optimizer, loss_fn)
    elif not isinstance(model, nn.Module):
        raise TypeError(f"[checks] model must be a torch.nn.Module, got {type(model).__name__}")
    loss_of(loss_fn)


class _Unusable(Exception):
    """The loss cannot be computed of these tensors: on a GPU, trying would end the process's use of the device."""


def look(model: nn.Module, loss_fn: Any, batch: Any, *, training: bool = True, examine: Examine | None = None) -> Look:
    """The loss of a batch and its gradient; to be called inside of `model_kept`.

    Args:
        model: its modes stay if it is in train mode and `training`; else it is put into the mode wanted.
        loss_fn: as `Loop` takes it.
        training: with gradients. Without: in eval mode and without any.
        examine: is asked before each loss is computed, for findings and whether it may be computed.
    """
    seen = Look()
    if model.training is not training:
        model.train(training)
    recorder = _Recorder(seen, model, examine)
    try:
        with torch.enable_grad() if training else torch.no_grad():
            with recorder:
                loss, seen.metrics = loss_of(loss_fn)(model, moved(batch, device_of(model)))
            seen.loss = loss.detach()
            if training and loss.requires_grad and loss.dim() == 0:
                named = {name: p for name, p in model.named_parameters() if p.requires_grad}
                gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
                seen.gradients = dict(zip(named, gradients, strict=True))
            elif training:
                seen.gradients = {name: None for name, p in model.named_parameters() if p.requires_grad}
    except _Unusable:
        seen.explained = True
    except Exception as error:
        seen.error = error
        seen.explained = any(finding.level == "error" for finding in seen.findings)
    finally:
        recorder.remove()
    return seen


class _Recorder(TorchFunctionMode):
    def __init__(self, seen: Look, model: nn.Module, examine: Examine | None) -> None:
        super().__init__()
        self._seen, self._model, self._examine = seen, model, examine
        self._depth = 0  # of calls of the model
        self._hooks = [
            model.register_forward_pre_hook(self._entered),
            model.register_forward_hook(self._left, always_call=True),
        ]

    def _entered(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _left(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        self._seen.outputs = output

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self._call_of(func, args, kwargs)
        if call is not None and self._examine is not None:
            findings, can_be = self._examine(call)
            self._seen.findings += findings
            if not can_be:
                raise _Unusable
        result = func(*args, **kwargs)
        if call is not None:
            call.result = result.detach() if isinstance(result, Tensor) else None
            self._seen.calls.append(call)
        return result

    def _call_of(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Call | None:
        """The call, if it is one of a loss; dropouts are counted beside that."""
        if func in LOSSES:
            given = dict(zip(("input", "target", "weight"), args, strict=False)) | kwargs
            options = {key: value for key, value in given.items() if key not in ("input", "target")}
            return Call(LOSSES[func], given["input"], given["target"], options)
        if self._depth > 0 and self._seen.inputs is None and func in WITH_WEIGHTS and args:
            std, mean = torch.std_mean(args[0].detach().float())
            self._seen.inputs = float(std), float(mean)
        if not self._model.training:
            self._count_dropout(func, args, kwargs)
        if self._depth == 0 and func in LOG_SOFTMAX:
            return Call("log_softmax", args[0] if args else kwargs["input"], None)
        if self._depth == 0 and func in SUBTRACTIONS and len(args) > 1:
            both = isinstance(args[0], Tensor) and isinstance(args[1], Tensor)
            return Call("difference", args[0], args[1]) if both else None
        return None

    def _count_dropout(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        name, rate, on = None, 0.0, True
        if func in DROPOUTS:
            given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            name, rate, on = DROPOUTS[func], given.get("p", 0.5), given.get("training", True)
        elif func is functional.scaled_dot_product_attention:
            name, rate = "scaled_dot_product_attention", kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0)
        if name is not None and on and rate:
            self._seen.always_random.append(f"{name}(p={rate:g})")


def last_operation(tensor: Tensor) -> str:
    """Name of the operation that computed the values, as autograd calls it: "Softmax"; "" where nobody knows.

    What only changes shape, type or place is passed over.
    """
    node = tensor.grad_fn
    while node is not None:
        match = re.fullmatch(r"(\w+?)Backward\d*", node.name())
        if match is None:
            return ""
        if match[1] not in SHAPE_ONLY:
            return match[1]
        node = node.next_functions[0][0]
    return ""


def norm(gradient: Tensor | None) -> float:
    """Its Euclidean norm in fp64; 0 without one."""
    if gradient is None:
        return 0.0
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return float(torch.linalg.vector_norm(values.detach(), dtype=torch.float64 if _has_fp64(values) else None))


def _has_fp64(values: Tensor) -> bool:
    return values.device.type != "mps"
