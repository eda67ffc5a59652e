# SPDX-License-Identifier: Apache-2.0
"""The public interface: names, signatures, defaults, docstrings."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from cases import CASES

import fastloop

OURS = """max_grad_norm=None, max_grad_value=None, error_if_nonfinite=False, norm_group=None, ema_decay=None,
          state_dtype=None, master_weights=False, zero_grads=False, backend='auto'"""

SIGNATURES = {
    "AdamW": f"""params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, amsgrad=False, *,
             maximize=False, foreach=None, capturable=False, differentiable=False, fused=None, {OURS}""",
    "clip_grad_norm_": "parameters, max_norm, norm_type=2.0, error_if_nonfinite=False, foreach=None",
    "clip_grad_value_": "parameters, clip_value, foreach=None",
    "get_total_norm": "tensors, norm_type=2.0, error_if_nonfinite=False, foreach=None",
    "clip_grads_with_norm_": "parameters, max_norm, total_norm, foreach=None",
    "backends": "",
}


def plain(signature: inspect.Signature) -> str:
    """Names, order, kinds and defaults; no annotations, no self."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(inspect.Signature(bare))[1:-1]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    wanted = re.sub(r"\s+", " ", SIGNATURES[name])
    assert plain(inspect.signature(getattr(fastloop, name))) == wanted


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.torch_name])
def test_optimizers_take_torchs_arguments_then_ours(name):
    """The positional ones in torch's order; all others by keyword, with torch's defaults."""
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    ours = inspect.signature(getattr(fastloop, name)).parameters
    positional = [p.name for p in theirs.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in ours.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD] == positional
    assert {n: ours[n].default for n in theirs} == {n: p.default for n, p in theirs.items()}
    extra = {n: p for n, p in ours.items() if n not in theirs}
    own = dict(item.split("=") for item in re.sub(r"\s+", "", OURS).split(","))
    assert {n: repr(p.default) for n, p in extra.items()} == own
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in extra.values())
    assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in ours.values()), "a typo must not vanish"


def test_exports():
    wanted = {"AdamW", "Adam", "SGD", "GradScaler", "clip_grad_norm_", "clip_grad_value_", "get_total_norm",
              "clip_grads_with_norm_", "backends", "__version__"}  # fmt: skip
    assert wanted <= set(fastloop.__all__)
    assert all(hasattr(fastloop, name) for name in fastloop.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fastloop.__version__)


@pytest.mark.parametrize("name", sorted(set(SIGNATURES) | set(CASES) | {"GradScaler"}))
def test_docstrings(name):
    doc = inspect.getdoc(getattr(fastloop, name))
    assert doc
    first, *rest = doc.splitlines()
    assert first.endswith("."), "one line of what it does"
    if rest:
        assert rest[0] == ""


@pytest.mark.parametrize("name", CASES)
def test_an_optimizers_docstring_has_its_formula_and_explains_every_argument(name):
    cls = getattr(fastloop, name)
    doc = inspect.getdoc(cls)
    assert re.search(r"^\s*p\s+= p", doc, re.MULTILINE), "the formula, in the names of the code"
    if name != "AdamW" and "fastloop.AdamW" in doc:
        doc += inspect.getdoc(fastloop.AdamW)  # where the arguments that all have are explained
    ours = re.findall(r"(\w+)=", OURS)
    undocumented = [n for n in inspect.signature(cls).parameters if n in ours and not re.search(rf"\b{n}\b", doc)]
    assert not undocumented
    assert "torch" in doc, "where torch's arguments are explained"


@pytest.mark.parametrize("name", CASES)
def test_public_methods_have_docstrings(name):
    cls = getattr(fastloop, name)
    for method in (
        "step",
        "ema_state_dict",
        "ema_weights",
        "nonfinite_parameters",
        "grad_norm",
        "skipped_steps",
    ):
        assert inspect.getdoc(getattr(cls, method)), method


def test_backends():
    status = fastloop.backends()
    assert list(status) == ["cpu", "cuda", "triton", "reference"]
    for entry in status.values():
        assert entry.keys() == {"available", "reason", "isa"}
        assert isinstance(entry["available"], bool)
        assert isinstance(entry["reason"], str)
        assert entry["reason"]
        assert entry["isa"] is None or isinstance(entry["isa"], str)
    assert status["reference"]["available"]
    assert status["reference"]["isa"] is None
    if status["cpu"]["available"]:
        assert status["cpu"]["isa"] in ("baseline", "avx2", "avx512", "neon")


def test_backends_returns_a_fresh_answer():
    fastloop.backends()["cpu"]["available"] = "tampered"
    assert fastloop.backends()["cpu"]["available"] != "tampered"


@pytest.mark.parametrize("name", CASES)
def test_auto_takes_the_native_backend_where_there_is_one(name):
    """The same bits as asked for by name: "auto" is a choice, not a third way."""
    chosen = "cpu" if fastloop.backends()["cpu"]["available"] else "reference"
    outcomes = []
    for backend in ("auto", chosen):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.randn(1000))
        opt = getattr(fastloop, name)([p], max_grad_norm=1.0, backend=backend)
        p.grad = torch.randn(1000)
        opt.step()
        outcomes.append((p.detach().numpy().tobytes(), opt.grad_norm.item()))
    assert outcomes[0] == outcomes[1]
