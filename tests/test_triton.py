# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels over tables built by hand, against the oracle: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from cases import CASES
from support import LOW_PRECISION, assert_within, bits, values, wide
from tolerances import Rounded, Rounding, compute_dtype, norm_bound

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton's kernels are defined
triton = pytest.importorskip("triton", reason="needs the triton package")

from fastloop import triton_kernels  # noqa: E402
from fastloop.ops.launches import BucketSpec  # noqa: E402
from fastloop.triton_kernels import aot, layout  # noqa: E402

# The interpreter is numpy, which warns of what the tests are about: infinities, NaN, overflow.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

ROOT = Path(__file__).resolve().parent.parent
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
CHUNK = layout.CHUNK_ELEMENTS.value
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Several chunks, whole and not; whole 16-byte accesses and not; nothing at all.
SIZES = (2 * CHUNK + 40, 7, CHUNK, 0, 64)

RULES = {  # -> the case that knows the rule, its settings, its states, its hyperparameters in the kernel's order
    "adam": ("Adam", {}, ("exp_avg", "exp_avg_sq")),
    "adam_amsgrad": ("Adam", {"amsgrad": True}, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    "sgd": ("SGD", {}, ()),
    "sgd_momentum": ("SGD", {"momentum": 0.9}, ("momentum_buffer",)),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    param: torch.dtype = F32
    grad: torch.dtype = F32
    state: torch.dtype = F32
    master: bool = False
    ema: bool = False

    def __str__(self) -> str:
        names = [str(d).removeprefix("torch.") for d in (self.param, self.grad, self.state)]
        return "-".join(names + ["master"] * self.master + ["ema"] * self.ema)


STORAGES = [
    Storage(*dtypes, master, ema)
    for *dtypes, master, ema in itertools.product((F32, BF16, F16, F64), (F32, BF16, F16, F64), (F32, BF16, F16, F64),
                                                  (False, True), (False, True))
    if triton_kernels.serves("adam", *dtypes, master, ema)
]  # fmt: skip


def hypers(rule: str, s: Mapping[str, Any]) -> list[float]:
    """In the order of csrc/rules."""
    if rule.startswith("adam"):
        return [s["lr"], *s["betas"], s["eps"], s["weight_decay"], float(s["decoupled_weight_decay"])]
    return [s["lr"], s["momentum"], s["dampening"], s["weight_decay"], float(s["nesterov"])]


@dataclasses.dataclass
class Group:
    """A row of the table."""

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    in_norm: bool = True
    clip_value: float = math.inf
    ema_decay: float = 0.9
    tensors: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict)  # hyperparameters on the device


class Problem:
    """A bucket of tensors, its table, and one step held against the oracle."""

    def __init__(
        self,
        rule: str = "adam",
        storage: Storage = Storage(),
        sizes: Sequence[int] = SIZES,
        groups: Sequence[Group] | None = None,
        offset: int = 0,  # elements from an aligned address
        step_dtype: torch.dtype | None = F32,
        others: int = 0,  # tensors of another bucket before this one, of one chunk each
    ) -> None:
        self.rule, self.storage, self.groups = rule, storage, list(groups or [Group()])
        self.case_name, fixed, self.states = RULES[rule]
        self.case = CASES[self.case_name]
        self.settings = [{**self.case.defaults, **fixed, **g.settings} for g in self.groups]
        self.compute = compute_dtype(storage.param)
        self.params, self.grads, self.masters, self.emas, self.moments = [], [], [], [], []
        for n in sizes:

            def place(dtype: torch.dtype, start: torch.Tensor) -> torch.Tensor:
                room = torch.zeros(len(start) + offset, dtype=dtype, device=DEVICE)
                return room[offset:].copy_(start)

            start = values((n,))
            self.params.append(place(storage.param, start))
            self.masters.append(place(self.compute, start) if storage.master else None)
            self.emas.append(place(self.compute, values((n,))) if storage.ema else None)
            self.moments.append([place(storage.state, torch.zeros(n)) for _ in self.states])
            self.grads.append(place(storage.grad, values((n,))))
        self.offset = offset
        self.rows = [i % len(self.groups) for i in range(len(sizes))]
        self.active = [True] * len(sizes)
        self.counts = torch.zeros(len(sizes), dtype=torch.int64, device=DEVICE)
        self.steps = None if step_dtype is None else torch.zeros(len(sizes), dtype=step_dtype, device=DEVICE)
        self.zero_grads = False
        self.scale: torch.Tensor | None = None
        self.found_inf: torch.Tensor | None = None

        chunks = [c for t, n in enumerate(sizes) for c in [t + others << 32 | i for i in range(-(-n // CHUNK))]]
        self.layout = layout.TableLayout(len(self.groups), others + len(sizes), others + len(chunks))
        self.others, self.chunks = others, chunks
        self.table = torch.zeros(self.layout.all_words, dtype=torch.int64, device=DEVICE)
        grid = max(1, min(len(chunks), triton_kernels.blocks(DEVICE)))
        self.sums = torch.full((grid + 2, 2), math.nan, dtype=F64, device=DEVICE)[1:-1]
        self.ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        self.result = torch.full((2,), math.nan, dtype=F64, device=DEVICE)
        self.skipped = torch.zeros((), dtype=torch.int64, device=DEVICE)
        self.spec = BucketSpec(
            device=DEVICE, rule=rule, param=storage.param, grad=storage.grad, state=storage.state,
            master=storage.master, ema=storage.ema, rows=len(self.groups), tensors=self.layout.tensors,
            chunks=self.layout.chunks, first_tensor=others, bucket_tensors=len(sizes), first_chunk=others,
            bucket_chunks=len(chunks), table=self.table, sums=self.sums, ticket=self.ticket, result=self.result,
            skipped=self.skipped,
        )  # fmt: skip
        self.launches = triton_kernels.bucket(self.spec)

    def write_table(self, flags: int, max_norm: float) -> None:
        """The Python twin of DeviceTable."""
        word = {}

        def address(tensor: torch.Tensor | None) -> int:
            if tensor is None:
                return 0
            return tensor.data_ptr() | (layout.IS_DOUBLE.value if tensor.dtype == F64 and tensor.dim() == 0 else 0)

        word[layout.FLAGS.value] = flags
        word[layout.MAX_NORM.value] = as_bits(max_norm)
        word[layout.SCALE_ADDRESS.value] = address(self.scale)
        word[layout.FOUND_INF_ADDRESS.value] = address(self.found_inf)
        for r, (group, settings) in enumerate(zip(self.groups, self.settings, strict=True)):
            row = self.layout.row_words + r * layout.ROW_WORDS.value
            for k, value in enumerate(hypers(self.rule, settings)):
                word[row + layout.HYPER.value + k] = as_bits(value if k not in group.tensors else math.nan)
                word[row + layout.HYPER_ADDRESS.value + k] = address(group.tensors.get(k))
            word[row + layout.SIGN.value] = as_bits(-1.0 if settings["maximize"] else 1.0)
            word[row + layout.IN_NORM.value] = int(group.in_norm)
            word[row + layout.CLIP_VALUE.value] = as_bits(group.clip_value)
            word[row + layout.EMA_DECAY.value] = as_bits(group.ema_decay)
        for i, param in enumerate(self.params):
            t = self.others + i
            grad = self.grads[i].data_ptr() if len(param) else layout.EMPTY_GRAD.value
            word[self.layout.grad_words + t] = grad if self.active[i] else 0
            at = self.layout.tensor_words + t * layout.TENSOR_WORDS.value
            slots = {layout.PARAM: param, layout.MASTER: self.masters[i], layout.EMA: self.emas[i]}
            for slot, tensor in slots.items():
                word[at + slot.value] = address(tensor)
            for k, moment in enumerate(self.moments[i]):
                word[at + layout.STATE.value + k] = address(moment)
            word[at + layout.TENSOR_COUNT.value] = len(param)
            word[at + layout.TENSOR_ROW.value] = self.rows[i]
            word[at + layout.TENSOR_STEP.value] = 0 if self.steps is None else address(self.steps[i])
            word[at + layout.TENSOR_STEPS.value] = address(self.counts[i])
        for c, chunk in enumerate(self.chunks):
            word[self.layout.chunk_words + self.others + c] = chunk
        table = torch.zeros(self.layout.all_words, dtype=torch.int64)
        table[list(word)] = torch.tensor(list(word.values()), dtype=torch.int64)
        self.table.copy_(table)

    def run(self, max_norm: float | None = None, check_all: bool = False, others_sums: Any = None) -> None:
        """Both launches; max_norm=None does not measure."""
        flags = (layout.MEASURE.value if max_norm is not None else 0) | (layout.CHECK_ALL.value if check_all else 0)
        flags |= layout.ZERO_GRADS.value if self.zero_grads else 0
        self.write_table(flags, math.inf if max_norm is None else max_norm)
        self.launches.norm(0, 0)
        self.launches.update(self.sums)

    def tensors(self, i: int) -> list[torch.Tensor | None]:
        return [self.params[i], self.masters[i], self.emas[i], *self.moments[i], self.grads[i]]

    def step(self, max_norm: float | None = None, check_all: bool = False) -> bool:
        """A step, checked. Returns whether it was skipped, as it should have been."""
        indices = range(len(self.params))
        before = [[None if x is None else x.clone() for x in self.tensors(i)] for i in indices]
        done = self.done()
        skipped = int(self.skipped)
        scale = 1.0 if self.scale is None else float(self.scale)

        self.run(max_norm, check_all)

        read = [i for i in indices if self.active[i] and len(self.params[i])]
        normed = [wide(before[i][-1].cpu()) for i in read if self.groups[self.rows[i]].in_norm]
        seen = [wide(before[i][-1].cpu()) for i in read] if check_all else normed
        norm, clip, skip = np.longdouble(0), 1.0, self.found_inf is not None and float(self.found_inf) > 0
        if max_norm is not None:
            norm = oracle.total_norm(normed) / abs(np.longdouble(scale))
            skip = skip or not all(np.isfinite(g).all() for g in seen)
            if all(np.isfinite(g).all() for g in normed):
                registers = compute_dtype(self.storage.grad)
                bound = norm_bound(sum(g.size for g in normed), registers) * norm
                assert_within(np.asarray(self.result[0].cpu()), np.asarray(norm), np.asarray(bound), "norm")
            clip = oracle.clip_factor(np.longdouble(float(self.result[0])), max_norm)
        assert float(self.result[1]) == float(skip)
        assert int(self.skipped) == skipped + skip
        assert int(self.ticket) == 0

        for i in indices:
            updated = self.active[i] and not skip
            zeroed = self.active[i] and self.zero_grads
            wanted = torch.zeros_like(before[i][-1]) if zeroed else before[i][-1]
            assert bits(self.grads[i].cpu()) == bits(wanted.cpu()), f"gradient {i}"
            assert int(self.counts[i]) == done[i] + 1 if updated else self.done()[i] == done[i]
            if self.steps is not None:
                assert float(self.steps[i]) == (done[i] + 1 if updated else done[i])
            if updated:
                self._check(i, before[i], done[i] + 1, scale, clip if self.groups[self.rows[i]].in_norm else 1.0)
            else:
                for now, old in zip(self.tensors(i)[:-1], before[i][:-1], strict=True):
                    assert bits(None if now is None else now.cpu()) == bits(None if old is None else old.cpu())
        return bool(skip)

    def done(self) -> list[int]:
        """Steps done: ours, unless a hand changed torch's."""
        if self.steps is None:
            return self.counts.tolist()
        shown = self.counts.to(self.steps.dtype)
        return torch.where(shown == self.steps, self.counts, self.steps.to(torch.int64)).tolist()

    def _check(self, i: int, old: Sequence[Any], t: int, scale: float, clip: Any) -> None:
        arithmetic = Rounding.of(self.compute)
        group, settings = self.groups[self.rows[i]], self.settings[self.rows[i]]
        settings = {**settings, **tensor_settings(self.rule, group)}
        param, master, ema, *moments, grad = (None if x is None else x.cpu() for x in old)
        start = param if master is None else master
        stored = (self.params[i] if master is None else self.masters[i]).cpu()
        first = t == 1 and self.rule == "sgd_momentum"  # the oracle's first buffer is the gradient
        known_states = {} if first else dict(zip(self.states, map(wide, moments), strict=True))

        def evaluate(known: Any, scalar: Any) -> tuple[Any, Any, Any]:
            g = oracle.effective_gradient(
                known(wide(grad)),
                inv_scale=scalar(clip / np.longdouble(scale)),
                max_value=None if math.isinf(group.clip_value) else scalar(group.clip_value),
                maximize=settings["maximize"],
            )
            p, s = self.case.rule(
                known(wide(start)), g, {k: known(v) for k, v in known_states.items()}, t, settings, scalar
            )
            average = None
            if ema is not None:
                average = oracle.ema(known(wide(ema)), known(wide(stored)), group.ema_decay, scalar)
            return p, s, average

        with np.errstate(all="ignore"):
            exact = evaluate(lambda x: x, oracle.exact)
            bound = evaluate(lambda x: Rounded.known(x, arithmetic), Rounded.scalar(arithmetic))

            def check(name: str, tensor: torch.Tensor, exact: Any, bound: Rounded) -> None:
                tensor = tensor.cpu()
                what = f"{self.rule} {self.storage} tensor {i} of {len(tensor)}, t={t}: {name}"
                assert_within(wide(tensor), exact, bound.stored(tensor.dtype), what)

            check("parameter", stored, exact[0], bound[0])
            if master is not None:
                assert bits(self.params[i].cpu()) == bits(stored.to(self.storage.param)), "copy of its master"
            for k, name in enumerate(self.states):
                check(name, self.moments[i][k], exact[1][name], bound[1][name])
            if ema is not None:
                check("ema", self.emas[i], exact[2], bound[2])


def tensor_settings(rule: str, group: Group) -> dict[str, Any]:
    """The settings that lie on the device. Only lr is tried there."""
    return {"lr": group.tensors[0].item()} if 0 in group.tensors else {}


def as_bits(value: float) -> int:
    return struct.unpack("<q", struct.pack("<d", value))[0]


# ---- the table


def header_constants() -> dict[str, int]:
    """Every enumerator and constexpr integer of the headers that describe the table, by its name."""
    names: dict[str, int] = {}
    for header in ("csrc/core/kernels.h", "csrc/core/device_table.h"):
        text = re.sub(r"//[^\n]*", "", (ROOT / header).read_text(encoding="utf-8"))
        found = re.finditer(
            r"enum (?!class)\w+ : [\w:]+ \{(?P<enum>[^}]*)\};|constexpr [\w:]+ (?P<name>k\w+) = (?P<value>[^;]+);", text
        )
        for match in found:
            if match["name"]:
                names[match["name"]] = eval(match["value"], {}, names)
                continue
            following = 0
            for item in filter(None, map(str.strip, match["enum"].split(","))):
                name, _, value = map(str.strip, item.partition("="))
                names[name] = following = eval(value, {}, names) if value else following
                following += 1
    return names


def test_the_layout_is_the_headers() -> None:
    native = header_constants()
    short = {"CHUNK_ELEMENTS": "kDeviceChunkElements"}
    ours = {
        short.get(name, "k" + name.title().replace("_", "")): constant.value
        for name, constant in vars(layout).items()
        if isinstance(constant, triton.language.constexpr)
    }
    assert {name: native[name] for name in ours} == ours
    # What the kernels have no use for: where the slots begin (0), and sizes that the offsets imply.
    assert native.keys() - ours.keys() == {"kTensorSlot", "kSlots", "kMaxStates", "kRuleBytes"}


def test_the_parts_of_a_table_are_where_the_header_puts_them() -> None:
    text = (ROOT / "csrc/core/device_table.h").read_text(encoding="utf-8")
    parts = re.findall(r"std::int64_t (\w+_words)\(\) const \{ return ([^;]+); \}", text)
    assert len(parts) == 5
    rows, tensors, chunks = 3, 11, 29
    known = {"rows": rows, "tensors": tensors, "chunks": chunks, **header_constants()}
    for name, expression in parts:
        known[name] = eval(expression.replace("()", ""), {}, known)
        assert getattr(layout.TableLayout(rows, tensors, chunks), name) == known[name], name


# ---- which storages


@pytest.mark.parametrize("rule", RULES)
def test_it_serves_what_the_cpu_kernels_serve(rule: str) -> None:
    """The combinations of csrc/cpu/loops.h, spelled out."""
    served = set()
    for grad, state, master, ema in itertools.product((F32, BF16, F16), (F32, BF16), (False, True), (False, True)):
        for param in (F32, BF16, F16):
            if param != F32 and grad not in (param, F32):
                continue
            if master and (param == F32 or state != F32):
                continue
            served.add((param, grad, state, master, ema))
    served |= {(F64, F64, F64, False, ema) for ema in (False, True)}
    dtypes = (F32, BF16, F16, F64, torch.complex64, torch.int32)
    every = itertools.product(dtypes, dtypes, dtypes, (False, True), (False, True))
    assert {combination for combination in every if triton_kernels.serves(rule, *combination)} == served


def test_it_serves_no_rule_that_it_does_not_know() -> None:
    assert not triton_kernels.serves("lion", F32, F32, F32, False, False)


def test_its_rules_are_those_of_the_registry() -> None:
    registry = (ROOT / "csrc/rules/registry.h").read_text(encoding="utf-8")
    assert set(re.findall(r'FASTLOOP_RULE\("(\w+)"', registry)) == set(RULES) == set(triton_kernels.RULES)


# ---- steps against the oracle


SETTINGS = [(rule, name) for rule, (case, *_) in RULES.items() for name in CASES[case].settings]


def settings_of(rule: str, name: str) -> dict[str, Any]:
    """A case's settings, for this rule."""
    settings = dict(CASES[RULES[rule][0]].settings[name])
    settings.pop("amsgrad", None)
    if rule == "sgd":
        settings.update(momentum=0.0, dampening=0.0, nesterov=False)
    elif rule == "sgd_momentum":
        settings.setdefault("momentum", 0.9)
    return settings


@pytest.mark.parametrize(("rule", "name"), SETTINGS)
def test_settings(rule: str, name: str) -> None:
    problem = Problem(rule, groups=[Group(settings_of(rule, name))], sizes=(CHUNK + 40, 7))
    for _ in range(3):
        problem.step(max_norm=1.0)


# Every way in which the kernel's code depends on the storage, for rules other than the first.
SOME_STORAGES = [
    Storage(F64, F64, F64, ema=True),
    Storage(F32, F16, BF16, ema=True),
    Storage(BF16, BF16, F32, master=True, ema=True),
    Storage(BF16, BF16, BF16, ema=True),
    Storage(F16, F32, F32),
]


@pytest.mark.parametrize(
    ("rule", "storage"),
    [(rule, storage) for rule in RULES for storage in (STORAGES if rule == "adam" else SOME_STORAGES)],
    ids=str,
)
def test_storages(rule: str, storage: Storage) -> None:
    """Every combination that is served, with decay, clipping and values on both sides of a chunk's end."""
    problem = Problem(rule, storage, sizes=(CHUNK + 24, 5), groups=[Group(settings_of(rule, "decay"))])
    for _ in range(2):
        problem.step(max_norm=0.5)


@pytest.mark.parametrize("rule", RULES)
def test_many_steps(rule: str) -> None:
    """Bias corrections of later steps, in double for double parameters."""
    problem = Problem(rule, Storage(F64, F64, F64), sizes=(33,), groups=[Group(settings_of(rule, "all"))])
    for t in (1, 2, 3, 7, 100, 12_345, 40_000_000):
        problem.counts.fill_(t - 1)
        problem.steps.fill_(t - 1)
        problem.step()
        assert int(problem.counts[0]) == t


@pytest.mark.parametrize("t", [1, 2, 20, 1000, 10**6])
def test_bias_corrections_do_not_cancel(t: int) -> None:
    """1 - b^t to a few units for each bit of t. By way of b^t it would lose 1/(1 - b^t) units: 50 at t = 20."""
    problem = Problem("adam", Storage(F64, F64, F64), sizes=(1,), groups=[Group({"lr": 1.0, "eps": 0.0})])
    problem.counts.fill_(t - 1)
    problem.steps.fill_(t - 1)
    problem.params[0].zero_()
    problem.grads[0].fill_(1)
    problem.run()
    b1, b2 = map(np.longdouble, problem.settings[0]["betas"])
    correction1, correction2 = -np.expm1(t * np.log(b1)), -np.expm1(t * np.log(b2))
    wanted = -(1 - b1) / correction1 * np.sqrt(correction2 / (1 - b2))
    units = abs(wide(problem.params[0].cpu())[0] / wanted - 1) * 2**53
    assert units < 4 * t.bit_length() + 8


@pytest.mark.parametrize("offset", [1, 4])
@pytest.mark.parametrize("storage", [Storage(), Storage(BF16, BF16, F32, True, True)], ids=str)
def test_addresses_that_are_not_aligned(storage: Storage, offset: int) -> None:
    problem = Problem("adam", storage, sizes=(CHUNK + 16, 16, 3), offset=offset)
    for _ in range(2):
        problem.step(max_norm=1.0)


def test_alignment_changes_no_update() -> None:
    """Elements do not see their neighbours; the norm may differ in the order of its sum."""
    results = []
    for offset in (0, 1):
        torch.manual_seed(3)
        problem = Problem("adam", sizes=(CHUNK + 40,), offset=offset)
        problem.step()
        results.append([bits(x.cpu()) for x in problem.tensors(0) if x is not None])
    assert results[0] == results[1]


def test_the_norm_is_the_same_from_run_to_run() -> None:
    problem = Problem(sizes=SIZES)
    problem.run(max_norm=1.0)
    first = bits(problem.sums.cpu())
    problem.run(max_norm=1.0)
    assert bits(problem.sums.cpu()) == first


def test_launches_write_nothing_beside_their_sums() -> None:
    problem = Problem()
    problem.step(max_norm=1.0)
    around = problem.sums.storage_offset()
    storage = torch.tensor([], dtype=F64, device=DEVICE).set_(problem.sums.untyped_storage())
    assert storage[:around].isnan().all()
    assert storage[around + problem.sums.numel() :].isnan().all()


def test_a_bucket_that_is_not_the_first() -> None:
    """Other tensors and chunks lie before its own, whose words are never followed."""
    problem = Problem("adam", others=3)
    for _ in range(2):
        problem.step(max_norm=1.0)


# ---- controls


def test_rows_with_their_own_settings() -> None:
    groups = [
        Group({"lr": 1e-2, "weight_decay": 0.1}),
        Group({"lr": 1e-3, "maximize": True, "betas": (0.5, 0.7)}, in_norm=False),
        Group({"decoupled_weight_decay": True, "weight_decay": 0.3}, clip_value=0.01),
    ]
    problem = Problem("adam", groups=groups, sizes=(40, CHUNK + 8, 300, 16, 64, 0, 5))
    for _ in range(2):
        problem.step(max_norm=0.5)


def test_max_norm_infinity_measures_and_does_not_clip() -> None:
    problem, plain = Problem(sizes=(200,)), Problem(sizes=(200,))
    for mine, other in zip(problem.tensors(0), plain.tensors(0), strict=True):
        if mine is not None:
            other.copy_(mine)
    problem.step(max_norm=math.inf)
    plain.step()
    assert float(problem.result[0]) > 0
    assert [bits(x) for x in problem.tensors(0)] == [bits(x) for x in plain.tensors(0)]


def test_nothing_is_measured_when_it_is_not_wanted() -> None:
    problem = Problem(sizes=(200,))
    problem.sums.fill_(math.nan)
    assert not problem.step()
    assert float(problem.result[0]) == 0
    problem.grads[0][3] = math.inf
    problem.run()
    assert float(problem.result[1]) == 0
    assert problem.counts.tolist() == [2]


@pytest.mark.parametrize("scale", [2.0**16, 3.0, -4.0])
@pytest.mark.parametrize("scale_dtype", [F32, F64])
def test_the_gradient_scale(scale: float, scale_dtype: torch.dtype) -> None:
    problem = Problem("adam", Storage(F16, F16, F32, True), sizes=(CHUNK + 8, 7))
    problem.scale = torch.tensor(scale, dtype=scale_dtype, device=DEVICE)
    for _ in range(2):
        problem.step(max_norm=0.5)


@pytest.mark.parametrize("measure", [False, True])
def test_found_inf_skips(measure: bool) -> None:
    problem = Problem("adam", Storage(ema=True), sizes=(CHUNK + 8, 7, 0))
    max_norm = 1.0 if measure else None
    problem.step(max_norm)
    problem.found_inf = torch.ones((), device=DEVICE)
    assert problem.step(max_norm)
    problem.found_inf.zero_()
    assert not problem.step(max_norm)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, CHUNK + 3])
def test_a_gradient_that_is_not_finite_skips(value: float, where: int) -> None:
    problem = Problem("adam", sizes=(7, CHUNK + 8))
    problem.step(max_norm=1.0)
    problem.grads[1][where] = value
    assert problem.step(max_norm=1.0)


@pytest.mark.parametrize("check_all", [False, True])
def test_rows_outside_the_norm_are_looked_at_if_asked(check_all: bool) -> None:
    problem = Problem("sgd", groups=[Group(), Group(in_norm=False)], sizes=(9, 40))
    problem.grads[1][5] = math.nan
    assert problem.step(max_norm=1.0, check_all=check_all) == check_all
    assert problem.params[1].isnan().any() != torch.tensor(check_all)


@pytest.mark.parametrize("skip", [False, True])
def test_zeroed_gradients(skip: bool) -> None:
    """On a skipped step too; those of parameters that have none in this step are left alone."""
    problem = Problem("sgd_momentum", Storage(BF16, BF16, F32), sizes=(CHUNK + 8, 7, 0, 30))
    problem.zero_grads = True
    problem.active[3] = False
    if skip:
        problem.found_inf = torch.ones((), device=DEVICE)
    assert problem.step(max_norm=1.0) == skip


def test_parameters_without_a_gradient() -> None:
    problem = Problem("adam", sizes=(CHUNK + 8, 7, 0, 30))
    problem.active = [False, True, False, True]
    problem.grads[0].fill_(math.nan)  # never read
    problem.step(max_norm=1.0)
    problem.grads[0].fill_(1)
    problem.active = [True, False, True, True]
    problem.step(max_norm=1.0)
    assert problem.counts.tolist() == [1, 1, 1, 2]


def test_no_gradient_at_all() -> None:
    problem = Problem(sizes=(9, 8))
    problem.active = [False, False]
    assert not problem.step(max_norm=1.0)


def test_empty_parameters_alone() -> None:
    """No chunk; they are stepped all the same."""
    problem = Problem(sizes=(0, 0))
    assert not problem.step(max_norm=1.0)
    assert problem.counts.tolist() == [1, 1]


def test_a_nan_is_not_clipped_by_value() -> None:
    problem = Problem("sgd", groups=[Group(clip_value=0.5)], sizes=(40,))
    problem.params[0].fill_(1)
    problem.grads[0][:3] = torch.tensor([math.nan, math.inf, -math.inf])
    problem.run()
    lr = problem.settings[0]["lr"]
    first, *rest = problem.params[0][:3].tolist()
    assert math.isnan(first)
    assert rest == pytest.approx([1 - 0.5 * lr, 1 + 0.5 * lr], rel=2**-24)


@pytest.mark.parametrize("rule", RULES)
def test_no_decay_does_not_read_the_parameter_into_the_gradient(rule: str) -> None:
    problem = Problem(rule, sizes=(40,))
    problem.params[0][0] = -math.inf
    problem.step()
    assert float(problem.params[0][0]) == -math.inf
    assert all(moment.isfinite().all() for moment in problem.moments[0])


# ---- hyperparameters and counts on the device


@pytest.mark.parametrize("dtype", [F32, F64])
def test_lr_on_the_device(dtype: torch.dtype) -> None:
    lr = torch.tensor(0.05, dtype=dtype, device=DEVICE)
    problem = Problem("adam", groups=[Group(tensors={0: lr})], sizes=(70, 9))
    problem.step(max_norm=1.0)
    lr.fill_(0.003)
    problem.step(max_norm=1.0)


@pytest.mark.parametrize("step_dtype", [F32, F64, None])
def test_counts(step_dtype: torch.dtype | None) -> None:
    problem = Problem("adam", step_dtype=step_dtype, sizes=(33, 0))
    for t in (1, 2):
        problem.step()
        assert problem.counts.tolist() == [t, t]


@pytest.mark.parametrize("step_dtype", [F32, F64])
def test_a_count_changed_by_hand_holds(step_dtype: torch.dtype) -> None:
    problem = Problem("adam", step_dtype=step_dtype, sizes=(33, 5, 0))
    problem.step()
    problem.steps[0] = 10
    problem.steps[2] = 20
    problem.step()
    assert problem.counts.tolist() == [11, 2, 21]


def test_counts_beyond_the_exact_range_of_fp32() -> None:
    """2^24 + 1 shows as 2^24 in torch's fp32 scalar, which must not pull our count back."""
    problem = Problem("sgd", sizes=(33,))
    problem.counts.fill_(2**24 + 1)
    problem.steps.fill_(2**24)
    problem.run()
    assert problem.counts.tolist() == [2**24 + 2]


def test_many_tensors_are_counted() -> None:
    problem = Problem("sgd", sizes=(0,) * 700)
    problem.active[::3] = [False] * len(problem.active[::3])
    problem.step()
    assert problem.counts.tolist() == [int(active) for active in problem.active]


# ---- the ranges of the dtypes


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_beyond_the_range_of_fp32(dtype: torch.dtype, size: float) -> None:
    problem = Problem("sgd", Storage(dtype, dtype), sizes=(CHUNK + 8, 33))
    for grad in problem.grads:
        grad.mul_(size)
    assert not problem.step(max_norm=math.inf)
    assert 0 < float(problem.result[0]) < math.inf


def test_fp16_gradients_whose_squares_overflow() -> None:
    problem = Problem("sgd", Storage(F16, F16), sizes=(300,))
    problem.grads[0].fill_(60_000)
    assert not problem.step(max_norm=1.0)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_denormals(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    problem = Problem("sgd", Storage(dtype, dtype), groups=[Group({"lr": 1.0})], sizes=(64,))
    problem.params[0].copy_(torch.arange(64) / 64 * tiny)
    problem.grads[0].copy_(torch.arange(64).flip(0) / 64 * tiny)
    problem.step()


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_stores_round_to_nearest_even(dtype: torch.dtype) -> None:
    """p - lr*g halfway between two values, at every low bit, and over the end of the range."""
    step = torch.finfo(dtype).eps
    start = torch.cat([1 + step * torch.arange(16), torch.tensor([torch.finfo(dtype).max] * 2)])
    problem = Problem("sgd", Storage(dtype, F32), groups=[Group({"lr": 1.0})], sizes=(18,))
    problem.params[0].copy_(start)
    grads = -step / 2 * torch.ones(16)
    problem.grads[0].copy_(torch.cat([grads, -torch.finfo(dtype).max * torch.tensor([step / 8, step])]))
    problem.run()
    wanted = (start.to(dtype).to(F64) - problem.grads[0].cpu().to(F64)).to(F32).to(dtype)
    assert bits(problem.params[0].cpu()) == bits(wanted)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_a_nan_is_stored_as_one(dtype: torch.dtype) -> None:
    problem = Problem("sgd", Storage(dtype, dtype), sizes=(9,))
    problem.grads[0][4] = math.nan
    problem.step()
    assert problem.params[0].isnan().tolist() == [i == 4 for i in range(9)]


# ---- the interface


def test_it_delivers_no_words() -> None:
    assert triton_kernels.INLINE_WORDS == 0
    with pytest.raises(ValueError, match="delivers 0 words"):
        Problem(sizes=(3,)).launches.norm(1234, 5)


def test_launches_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(triton_kernels, "on_launch", lambda: next(count))
    Problem(sizes=(3,)).step(max_norm=1.0)
    assert next(count) == 2


def test_interpreted_kernels_take_cpu_tensors_alone() -> None:
    spec = Problem(sizes=(3,)).spec
    other = torch.device("cuda", 0) if DEVICE.type == "cpu" else torch.device("cpu")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        triton_kernels.bucket(dataclasses.replace(spec, device=other))


def test_another_bucket_reports() -> None:
    problem = Problem(sizes=(3,))
    problem.launches = triton_kernels.bucket(dataclasses.replace(problem.spec, skipped=None))
    problem.run(max_norm=1.0)
    assert problem.result.isnan().all()
    assert problem.counts.tolist() == [1]


def test_sums_of_other_buckets_are_added() -> None:
    """More rows than one program takes at once."""
    problem = Problem("sgd", sizes=(5,))
    sums = torch.zeros(600, 2, dtype=F64, device=DEVICE)
    sums[::2, 0], sums[1::2, 1] = 4.0, 1.0
    problem.write_table(layout.MEASURE.value, 1.0)
    problem.launches.update(sums)
    assert float(problem.result[0]) == math.sqrt(4.0 * 300)
    sums[599, 1] = math.inf
    problem.launches.update(sums)
    assert problem.result.tolist() == [math.sqrt(4.0 * 300), 1.0]


def test_nothing_else_imports_triton() -> None:
    code = "import sys, fastloop; sys.exit('fastloop.triton_kernels' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# ---- ahead of time

ARCHITECTURES = (80, 90, 100)


def compile_elsewhere(arch: int, names: Sequence[str], folder: Path) -> None:
    """In a process of its own: this one may interpret its kernels."""
    code = (
        "import sys; from pathlib import Path; from fastloop.triton_kernels import aot\n"
        "for c in aot.compile_all(int(sys.argv[1]), sys.argv[3:]):\n"
        "    Path(sys.argv[2], c.name + '.cubin').write_bytes(c.cubin)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code, str(arch), str(folder), *names], cwd=ROOT, env=env, check=True)


def machine_code(cubin: Path) -> tuple[str, str]:
    """(machine code, resources) of a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"needs {tool.name}, which this build of Triton does not bring along")
    out = [
        subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("-sass", "-res-usage")
    ]
    return out[0], out[1]


# Loads and stores of 16 bytes: one for each array of fp32, or of bf16 where all are.
WIDE = {
    "norm_fp32": (4, 0),
    "norm_bf16": (4, 0),
    "adam_fp32": (4, 4),  # p g m v, and g where it is zeroed
    "adam_fp32_ema": (5, 5),
    "adam_bf16_master": (3, 3),  # master m v; p and g are read and written in 8 bytes
    "adam_bf16": (4, 4),
    "adam_fp16_master": (3, 3),
    "adam_amsgrad_fp32": (5, 5),
    "sgd_fp32": (2, 2),
    "sgd_momentum_fp32": (3, 3),
}


@pytest.mark.parametrize(
    ("arch", "names"),
    [(90, ("norm_fp32", "adam_fp32"))] + [pytest.param(a, aot.NAMES, marks=pytest.mark.slow) for a in ARCHITECTURES],
    ids=lambda x: str(x) if isinstance(x, int) else f"{len(x)}_kernels",
)
def test_compiled_kernels_access_16_bytes_and_spill_nothing(arch: int, names: Sequence[str], tmp_path: Path) -> None:
    compile_elsewhere(arch, names, tmp_path)
    for name in names:
        code, resources = machine_code(tmp_path / f"{name}.cubin")
        assert (code.count("LDG.E.128"), code.count("STG.E.128")) == WIDE[name], (name, arch)
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} spills on sm_{arch}"
        assert re.findall(r"(?:STACK|LOCAL):\d+", resources) == ["STACK:0", "LOCAL:0"], (name, arch)


def test_an_interpreting_process_says_that_it_cannot_compile() -> None:
    if not aot.INTERPRETED.value:
        pytest.skip("needs TRITON_INTERPRET=1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_all(90)
