# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a model's training step and peak FLOP/s of a device: the two halves of model FLOPs utilization (MFU)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from fastloop.loop.probe import call

LossFn = Callable[[Any, Any], Any]


class Peak(NamedTuple):
    """TFLOP/s, dense: data sheets since Hopper print twice as much, with sparsity. None: not in hardware."""

    fp32: float
    tf32: float | None
    half: float  # float16, and bfloat16 where there is TF32; fp32 accumulation


# Public data sheets of NVIDIA. First match counts; names are those of torch.cuda.get_device_name().
_PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bMIG\b", Peak(0.0, None, 0.0)),  # a slice of a GPU has a part of its peak
    (r"\bGB200\b", Peak(80.0, 1250.0, 2500.0)),
    (r"\bB200\b", Peak(75.0, 1125.0, 2250.0)),
    (r"\bGH200\b", Peak(67.0, 494.5, 989.5)),
    (r"\bH200 NVL\b", Peak(60.0, 417.5, 835.5)),
    (r"\bH200\b", Peak(67.0, 494.5, 989.5)),
    (r"\bH100 NVL\b", Peak(60.0, 417.5, 835.5)),
    (r"\bH100 PCIe\b", Peak(51.0, 378.0, 756.5)),
    (r"\bH100\b", Peak(67.0, 494.5, 989.5)),
    (r"\bA100\b", Peak(19.5, 156.0, 312.0)),
    (r"\bA30\b", Peak(10.3, 82.0, 165.0)),
    (r"\bA40\b", Peak(37.4, 74.8, 149.7)),
    (r"\bA10\b", Peak(31.2, 62.5, 125.0)),
    (r"\bL40S\b", Peak(91.6, 183.0, 362.0)),
    (r"\bL40\b", Peak(90.5, 90.5, 181.0)),
    (r"\bL4\b", Peak(30.3, 60.0, 121.0)),
    (r"\bV100-PCIE\b", Peak(14.0, None, 112.0)),
    (r"\bV100-SXM", Peak(15.7, None, 125.0)),
    (r"\bT4\b", Peak(8.1, None, 65.0)),
)


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of dense matrix products on a device, from its public data sheet; None where none is known.

    Args:
        device: a device, or the name that torch.cuda.get_device_name() gives it.
        dtype: of the products: float16, bfloat16, or float32, which is TF32's peak while torch allows TF32 in
            products (`torch.set_float32_matmul_precision` not "highest").
    """
    device = torch.device(device) if isinstance(device, str) and re.match(r"(cpu|cuda|meta|mps)\b", device) else device
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    peak = next((each for pattern, each in _PEAKS if re.search(pattern, device)), None)
    if peak is None or not peak.half:
        return None
    tera: float | None = None
    if dtype is torch.float32:
        fast = peak.tf32 is not None and torch.get_float32_matmul_precision() != "highest"
        tera = peak.tf32 if fast else peak.fp32
    elif dtype is torch.float16 or (dtype is torch.bfloat16 and peak.tf32 is not None):
        tera = peak.half
    return None if tera is None else tera * 1e12


def model_flops(model: nn.Module, batch: Any, loss_fn: LossFn | None = None) -> int | None:
    """FLOPs of forward and backward for one batch, counted on tensors without data; None where that cannot be done.

    Matrix products, convolutions and attention count, two FLOPs a multiply-add; what needs no gradient costs no
    backward. Nothing is computed: no memory is taken, no random number is drawn, no gradient or buffer changes. Model
    code that looks at values (`if x.sum() > 0`) cannot be followed and gives None, as does a model with forward hooks,
    which could keep such tensors, and one with nn.LSTM, nn.GRU or nn.RNN, whose products torch does not count.

    Args:
        model: before it is wrapped (DDP, FSDP) or told to recompute activations, which this would count.
        batch: tensors in lists, tuples and dicts, on any device; divide by its samples for FLOPs per sample.
        loss_fn: `loss_fn(model, batch)`, giving the loss or a tuple that begins with it. None: the model is called with
            the batch, or, if that is a list or tuple, with its first element, and all its floating outputs are summed.

    Source: torch.utils.flop_counter; the definition of MFU is that of Chowdhery et al., "PaLM", 2022, appendix B.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # these take 0.2 s to import
    from torch.utils.flop_counter import FlopCounterMode

    hooks = [len(each) for module in model.modules() for each in (module._forward_hooks, module._forward_pre_hooks)]
    if any(hooks) or any(isinstance(each, nn.RNNBase) for each in model.modules()):
        return None
    counter = FlopCounterMode(display=False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            # `detach` first: a parameter's gradient and its hooks stay out of it.
            empty = {name: _empty(fake, each) for name, each in tensors.items()}
            inputs = tree_map(lambda each: _empty(fake, each) if isinstance(each, Tensor) else each, batch)
            with torch.enable_grad(), counter:
                loss = _loss(_Stateless(model, empty), inputs, loss_fn)
                if loss is not None and loss.requires_grad:
                    loss.backward()
    except Exception:  # whatever the model's own code raises on tensors without data
        logging.getLogger("fastloop").debug("[flops] the model cannot be counted", exc_info=True)
        return None
    return int(counter.get_total_flops())


def _empty(fake: Any, tensor: Tensor) -> Tensor:
    like: Tensor = fake.from_tensor(tensor.detach())
    return like.requires_grad_(tensor.requires_grad)


def _loss(model: Any, batch: Any, loss_fn: LossFn | None) -> Tensor | None:
    if loss_fn is not None:
        found = loss_fn(model, batch)
        return found[0] if isinstance(found, tuple) else found
    outputs = call(model, batch)
    floating = [each.sum() for each in tree_leaves(outputs) if isinstance(each, Tensor) and each.is_floating_point()]
    return torch.stack([each.float() for each in floating]).sum() if floating else None


class _Stateless:
    """The model called with other tensors than its own; what else is asked of it is the model's."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        self._model, self._tensors = model, tensors

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._model, self._tensors, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
