# SPDX-License-Identifier: Apache-2.0
"""The formats: each writes a file and gives back what that file, loaded again, computes."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastloop.extras import need
from fastloop.recipes.export.comparing import Arguments, batch_of, is_batched, stored_bytes

ENDINGS = {"program": ".pt2", "onnx": ".onnx", "torchscript": ".torchscript.pt"}
ONE_FILE = 1_500_000_000  # bytes of weights that fit into an .onnx file, which protobuf limits to 2 GiB

Loaded = Callable[[Arguments], Any]


class Exporter:
    """Writes one model in several formats; the torch.export of it is made once.

    Args:
        model: in eval mode.
        given: example arguments, of a batch of at least 2 where the batch is dynamic.
        dynamic: the batch size is left open.
    """

    def __init__(self, model: nn.Module, given: Arguments, dynamic: bool) -> None:
        self.model, self.given, self.dynamic = model, given, dynamic
        self.baked: list[str] = []  # what tracing has warned of
        self._exported: Any = None

    def write(self, kind: str, path: Path) -> Loaded:
        """Write the file of that format and load it again; may raise whatever torch raises."""
        write: Callable[[Path], Loaded] = {
            "program": self._program,
            "onnx": self._onnx,
            "torchscript": self._torchscript,
        }[kind]
        return write(path)

    def _export(self) -> Any:
        if self._exported is None:
            self._exported = torch.export.export(
                self.model, self.given.args, self.given.kwargs, dynamic_shapes=self._shapes()
            )
        return self._exported

    def _shapes(self) -> Any:
        """Which dimensions stay open, as torch.export wants it: by the names of the forward's parameters."""
        if not self.dynamic:
            return None
        batch, size = torch.export.Dim("batch"), batch_of(self.given)

        def shapes(value: Any) -> Any:
            if isinstance(value, Tensor):
                return {0: batch} if is_batched(value, size) else None
            if isinstance(value, Mapping):
                return {key: shapes(each) for key, each in value.items()}
            if isinstance(value, Sequence) and not isinstance(value, str):
                made = [shapes(each) for each in value]
                return made if isinstance(value, list) else tuple(made)
            return None

        if not self.given.kwargs:
            return shapes(self.given.args)
        bound = inspect.signature(self.model.forward).bind(*self.given.args, **self.given.kwargs)
        return {name: shapes(value) for name, value in bound.arguments.items()}

    def _program(self, path: Path) -> Loaded:
        torch.export.save(self._export(), path)
        loaded = torch.export.load(path).module()
        return lambda given: given.call(loaded)

    def _onnx(self, path: Path) -> Loaded:
        onnx, runtime = need("onnx", "export", 'format "onnx"'), need("onnxruntime", "export", 'format "onnx"')
        program: Any = torch.onnx.export(self._export(), dynamo=True, verbose=False)
        program.save(path, external_data=stored_bytes(self.model) > ONE_FILE)
        onnx.checker.check_model(str(path), full_check=True)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()  # as many as the model has: the latencies are compared
        options.log_severity_level = 3  # errors: a library never prints
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(given: Arguments) -> list[Tensor]:
            tensors = given.tensors()
            if len(tensors) != len(names):
                raise ValueError(f"the ONNX model takes {len(names)} inputs, the example has {len(tensors)} tensors")
            feed = {name: each.detach().cpu().numpy() for name, each in zip(names, tensors, strict=True)}
            return [torch.from_numpy(each) for each in session.run(None, feed)]

        return run

    def _torchscript(self, path: Path) -> Loaded:
        if not hasattr(torch.jit, "trace"):
            raise RuntimeError('this torch has no TorchScript any more; use the format "program"')
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            traced: Any = torch.jit.trace(
                self.model,
                self.given.args or None,
                example_kwarg_inputs=self.given.kwargs or None,
                check_trace=False,  # it compares the example only; the caller compares more
                strict=False,  # dicts and lists among the outputs
            )
        self.baked = [
            str(each.message).split("\n")[0] for each in caught if issubclass(each.category, torch.jit.TracerWarning)
        ]
        traced.save(str(path))
        loaded = torch.jit.load(str(path))
        return lambda given: given.call(loaded)
