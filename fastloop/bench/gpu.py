# SPDX-License-Identifier: Apache-2.0
"""Measure the GPU backends against torch on this machine's GPU: the rows of `gpu_record.SPECS`.

Built and checked as on a CPU, timed in pairs A B B A, by events on the device or by a clock on the host.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from time import perf_counter, perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from fastloop.bench import cases, chargpt, checks, contenders, env, gpu_device, gpu_loop, measure, models, stats
from fastloop.bench.checks import LR, MAX_NORM
from fastloop.bench.contenders import WEIGHT_DECAY, Stepper
from fastloop.bench.gpu_record import CONTROL, SPECS, GpuRow, GpuRun, Spec

Shapes = Sequence[models.Shape]
Progress = Callable[[str, int], None]

RESULTS = env.REPOSITORY / "benchmarks" / "results"
ROW_SECONDS = 20.0  # for the pairs of one row: 13 rows in under 5 minutes
CEILING_PAIRS = (20,)
LOSS_SCALE = 65536.0
COLD_COPIES = 32  # of 16 MB each: several times the largest L2 cache
HOST_COPIES = 8  # steps before the host waits; 80 MB or more, so that each finds its data out of the cache
LOOP_STEPS = 8
SPIN_CYCLES = 4_000_000  # about 2 ms, in which the host gets ahead of the device


class NoDevice(Exception):
    """torch sees no CUDA device."""


class Skipped(Exception):
    """A row that this machine cannot measure."""


@dataclass(frozen=True)
class Sizes:
    """Shapes of the rows; tests take small ones."""

    large: tuple[models.Shape, ...]
    medium: tuple[models.Shape, ...]
    small: tuple[models.Shape, ...]  # fits an L2 cache with gradients and states
    many: tuple[models.Shape, ...]
    most: tuple[models.Shape, ...]
    stream: int  # elements of one buffer of a ceiling
    gpt: chargpt.Size = gpu_loop.GPT2  # whole training steps


FULL = Sizes(
    large=tuple(models.gpt2(layers=18, width=2048, context=2048)),  # 1.01e9 parameters in 220 tensors
    medium=tuple(models.gpt2()),
    small=tuple(models.mlp(512, 512, 512, 512, 512)),
    many=((1024,),) * 1000,
    most=((64,),) * 10_000,
    stream=2**28,
)


@dataclass
class Side:
    """A contender at work. One call is `steps` in a row, after `prepare`, which is not timed."""

    steps: list[Callable[[], object]]
    prepare: Callable[[], object]
    per_call: int = 1  # steps of the optimizer in one call; a replayed graph holds several
    alive: object = None  # what a graph reads and writes without holding it


Clock = Callable[[Side, int], float]


# ---- Clocks: seconds of one call, over so many


def device_clock(side: Side, repetitions: int) -> float:
    """Time on the device between two events around each call, the host being ahead of it."""
    spans = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    torch.cuda._sleep(SPIN_CYCLES)
    for start, stop in spans:
        side.prepare()
        start.record()
        for step in side.steps:
            step()
        stop.record()
    torch.cuda.synchronize()
    return sum(start.elapsed_time(stop) for start, stop in spans) / repetitions * 1e-3


def host_clock(side: Side, repetitions: int, wait: Callable[[], object] = torch.cuda.synchronize) -> float:
    """Wall-clock time of each call, until the device is done."""
    total = 0
    for _ in range(repetitions):
        side.prepare()
        wait()
        start = perf_counter_ns()
        for step in side.steps:
            step()
        wait()
        total += perf_counter_ns() - start
    return total / repetitions * 1e-9


# ---- What is timed


def parameters(shapes: Shapes, dtype: torch.dtype, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Parameters ~ N(0, 0.02) with gradients ~ N(0, 1), drawn on the device, the same at every call."""
    generator = torch.Generator(device).manual_seed(seed)
    result = []
    for shape in shapes:
        parameter = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(0.02).requires_grad_(True)
        parameter.grad = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        result.append(parameter)
    return result


def gradients(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.grad for tensor in tensors if tensor.grad is not None]


Build = Callable[[list[Tensor]], Stepper]


def ours(backend: str, **options: Any) -> Build:
    """fastloop.AdamW on one backend."""

    def build(tensors: list[Tensor]) -> Stepper:
        kind = importlib.import_module("fastloop").AdamW
        optimizer = kind(tensors, lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=MAX_NORM, backend=backend, **options)
        return Stepper(optimizer.step, optimizer)

    return build


def fused(tensors: list[Tensor], **options: Any) -> Stepper:
    """clip_grad_norm_ + AdamW(fused=True)."""
    optimizer = torch.optim.AdamW(tensors, lr=LR, weight_decay=WEIGHT_DECAY, fused=True, **options)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(tensors, MAX_NORM)
        optimizer.step()

    return Stepper(step, optimizer)


def fp32_copies(tensors: list[Tensor]) -> Stepper:
    """What is done without master weights in the optimizer: gradients to fp32, clip and step there, parameters back."""
    masters = [tensor.detach().float().requires_grad_(True) for tensor in tensors]
    for master in masters:
        master.grad = torch.empty_like(master)
    inner, copies = fused(masters), gradients(masters)
    low, full = [tensor.detach() for tensor in tensors], [master.detach() for master in masters]

    def step() -> None:
        torch._foreach_copy_(copies, gradients(tensors))
        inner.step()
        torch._foreach_copy_(low, full)

    return Stepper(step, inner.optimizer)


def scaled(scaler: Any, optimizer_of: Build, unscale: bool, tensors: list[Tensor]) -> Stepper:
    """Unscale + inf check + clip + step + update of a gradient scaler."""
    stepper = optimizer_of(tensors)
    optimizer = stepper.optimizer
    scaler.scale(torch.ones((), device=tensors[0].device))  # makes the scale, as the first loss would

    def step() -> None:
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(tensors, MAX_NORM)
        scaler.step(optimizer)
        scaler.update()

    return Stepper(step, optimizer)


def plain_fused(tensors: list[Tensor]) -> Stepper:
    optimizer = torch.optim.AdamW(tensors, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    return Stepper(optimizer.step, optimizer)


# ---- Correct before fast


def reference(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> tuple[checks.Outcome, float]:
    """What the checked steps must give, and the error of torch's norm. 16-bit parameters: of their fp32 copies."""
    low = parameters(shapes, dtype, device)
    full = [tensor.detach().float().requires_grad_(True) for tensor in low]
    for copy, tensor in zip(full, low, strict=True):
        assert tensor.grad is not None
        copy.grad = tensor.grad.float()
    error = checks.norm_error(gradients(full))
    return checks.reference(full), error


def checked(
    build: Build, shapes: Shapes, dtype: torch.dtype, device: torch.device,
    wanted: tuple[checks.Outcome, float], grad_factor: float = 1.0,
) -> tuple[Stepper, list[Tensor]]:  # fmt: skip
    """A contender two steps old, its results compared with the reference. Raises WrongResult."""
    tensors = parameters(shapes, dtype, device)
    original = [gradient.mul_(grad_factor).clone() for gradient in gradients(tensors)] if grad_factor != 1.0 else []
    stepper = build(tensors)
    for _ in range(checks.CHECKED_STEPS):
        if original:
            torch._foreach_copy_(gradients(tensors), original)
        stepper.step()
    state = stepper.optimizer.state
    # The peer keeps its masters as parameters of its own.
    keys = tensors if tensors[0] in state else [p for group in stepper.optimizer.param_groups for p in group["params"]]
    full = [state[key].get("master_param", key) for key in keys]
    got = checks.Outcome(full, [state[key]["exp_avg"] for key in keys], [state[key]["exp_avg_sq"] for key in keys])
    checks.check_step(got, wanted[0], wanted[1])
    if dtype != torch.float32:
        for index, (tensor, master) in enumerate(zip(tensors, full, strict=True)):
            if not torch.equal(tensor.detach(), master.detach().to(dtype)):
                raise checks.WrongResult(f"[bench gpu] tensor {index} is not its master copy, rounded")
    return stepper, tensors


# ---- Rows


def _nothing() -> None:
    pass


def _ignore(row: GpuRow) -> None:
    pass


def _silent(text: str, pairs: int) -> None:
    pass


def _fresh(copies: Sequence[Sequence[Tensor]]) -> Callable[[], None]:
    """New gradients at new addresses: the old ones are freed after the new ones are made."""

    def prepare() -> None:
        for tensors in copies:
            for tensor, gradient in zip(tensors, torch._foreach_mul(gradients(tensors), 1.0), strict=True):
                tensor.grad = gradient

    return prepare


def _graph(steppers: Sequence[Stepper]) -> Callable[[], object]:
    """One CUDA graph of all their steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for stepper in steppers:
            stepper.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for stepper in steppers:
            stepper.step()
    return graph.replay


@dataclass
class Bench:
    """Measures rows on one device. `clocks` and `backends` are replaced by tests that have no GPU."""

    device: torch.device
    sizes: Sizes = FULL
    seconds: float = ROW_SECONDS
    pairs: tuple[int, ...] = stats.PAIRS
    backends: tuple[str, str] = ("cuda", "triton")
    clocks: tuple[Clock, Clock] = (device_clock, host_clock)
    progress: Progress = _silent

    def run(self, spec: Spec, ceilings: dict[str, gpu_device.Ceiling]) -> GpuRow:
        """Measure one row; what cannot be measured here becomes a row that says why."""
        self.progress(f"{spec.name}: check", 0)
        row = GpuRow(spec.name)
        try:
            self._measure(spec, row, ceilings)
        except checks.WrongResult as error:
            row.status, row.reason = "wrong", str(error)
        except Skipped as error:
            row.status, row.reason = "skipped", str(error)
        except torch.OutOfMemoryError as error:
            row.status, row.reason = "skipped", f"not enough memory on the device: {str(error).splitlines()[0]}"
        finally:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return row

    def _measure(self, spec: Spec, row: GpuRow, ceilings: dict[str, gpu_device.Ceiling]) -> None:
        case = spec.name.partition("/")[0]
        sides = {
            "gpt-1b": self._large,
            "gpt-1b-bf16": self._bf16,
            "gpt-1b-scaler": self._scaler,
            "gpt-1b-triton": self._triton,
            CONTROL: self._control,
            "loop-gpt2-bf16": self._loop,
        }.get(case)
        mine, peer = sides(spec, row) if sides else self._small(spec)
        clock = self.clocks[spec.clock == "host"]
        pairs = measure.measure_pairs(
            peer,
            mine,
            decided=lambda ratio: 1.0 not in ratio and (spec.goal is None or spec.goal not in ratio),
            pairs=self.pairs,
            deadline=perf_counter() + self.seconds,
            on_pair=lambda count: self.progress(spec.name, count),
            sampler=clock,
        )
        row.ratio, row.repetitions, row.stopped = stats.median_interval(pairs.ratios), pairs.repetitions, pairs.stopped
        row.peer_seconds = [seconds / peer.per_call for seconds in pairs.a]
        row.ours_seconds = [seconds / mine.per_call for seconds in pairs.b]
        if spec.ceiling_goal is not None and ceilings:
            del peer
            self._against_ceiling(row, mine, ceilings)

    def _against_ceiling(self, row: GpuRow, mine: Side, ceilings: dict[str, gpu_device.Ceiling]) -> None:
        """Paired with whichever pattern moved most bytes per second: the ceiling that is hardest to reach."""
        kind, top = max(ceilings.items(), key=lambda item: item[1].gbps)
        side = Side([top.build()], _nothing)
        pairs = measure.measure_pairs(
            side, mine, pairs=CEILING_PAIRS, deadline=perf_counter() + self.seconds, sampler=self.clocks[0]
        )
        row.ceiling_kind = kind
        row.ceiling_ratios = [ratio * row.bytes / top.bytes for ratio in pairs.ratios]
        row.ceiling = stats.median_interval(row.ceiling_ratios)

    def _pair(self, mine: Build, peer: Build, shapes: Shapes, dtype: torch.dtype = torch.float32) -> tuple[Side, Side]:
        wanted = reference(shapes, dtype, self.device)
        sides = []
        for build in (mine, peer):
            stepper, _ = checked(build, shapes, dtype, self.device, wanted)
            sides.append(Side([stepper.step], _nothing))
        return sides[0], sides[1]

    def _large(self, spec: Spec, row: GpuRow) -> tuple[Side, Side]:
        row.bytes = cases.clip_and_adamw(self.sizes.large, torch.float32).bytes
        peer = contenders.CONTENDERS["torch-grad-scale"].build if spec.name.endswith("folded") else fused
        return self._pair(ours(self.backends[0]), peer, self.sizes.large)

    def _bf16(self, spec: Spec, row: GpuRow) -> tuple[Side, Side]:
        # Pass 1 reads g (2 bytes). Pass 2 reads g, master, m, v (14) and writes p, master, m, v (14).
        row.bytes = 30 * sum(map(math.prod, self.sizes.large))
        mine = ours(self.backends[0], master_weights=True)
        return self._pair(mine, fp32_copies, self.sizes.large, torch.bfloat16)

    def _triton(self, spec: Spec, row: GpuRow) -> tuple[Side, Side]:
        row.bytes = cases.clip_and_adamw(self.sizes.large, torch.float32).bytes
        return self._pair(ours(self.backends[1]), ours(self.backends[0]), self.sizes.large)

    def _control(self, spec: Spec, row: GpuRow) -> tuple[Side, Side]:
        return self._pair(fused, fused, self.sizes.medium)

    def _loop(self, spec: Spec, row: GpuRow) -> tuple[Side, Side]:
        """Several whole steps a call: a host that waits for each would be what is timed."""
        mine, peer = gpu_loop.checked(self.sizes.gpt, self.device)
        return tuple(Side([step] * LOOP_STEPS, _nothing, LOOP_STEPS) for step in (mine, peer))  # type: ignore[return-value]

    def _scaler(self, spec: Spec, row: GpuRow) -> tuple[Side, Side]:
        """The gradients are scaled again before each step: torch's scaler divides them in place."""
        shapes = self.sizes.large
        wanted = reference(shapes, torch.float32, self.device)
        kinds = (importlib.import_module("fastloop").GradScaler, torch.amp.GradScaler)
        builds = (ours(self.backends[0]), plain_fused)
        sides = []
        for theirs, (kind, build) in enumerate(zip(kinds, builds, strict=True)):
            scaler = kind(self.device.type, init_scale=LOSS_SCALE)
            whole = partial(scaled, scaler, build, bool(theirs))
            stepper, tensors = checked(whole, shapes, torch.float32, self.device, wanted, LOSS_SCALE)
            grads = gradients(tensors)
            original = [gradient.clone() for gradient in gradients(parameters(shapes, torch.float32, self.device))]
            torch._foreach_mul_(original, LOSS_SCALE)
            sides.append(Side([stepper.step], partial(torch._foreach_copy_, grads, original)))
        return sides[0], sides[1]

    def _small(self, spec: Spec) -> tuple[Side, Side]:
        """Many small tensors, or a small model: copies of it in turn, their gradients fresh or staying, or a graph."""
        case = spec.name.partition("/")[0]
        size, _, kind = case.partition("-")
        shapes = {"1000x1024": self.sizes.many, "10000x64": self.sizes.most, "1m": self.sizes.small}[size]
        graphed = kind not in ("fresh", "stay")
        if graphed and self.device.type != "cuda":
            raise Skipped("needs CUDA graphs")
        wanted = reference(shapes, torch.float32, self.device)
        options: dict[str, Any] = {"capturable": True} if graphed else {}
        sides = []
        builds: tuple[Build, Build] = (ours(self.backends[0], **options), partial(fused, **options))
        for build in builds:
            first, tensors = checked(build, shapes, torch.float32, self.device, wanted)
            steppers, copies = [first], [tensors]
            for _ in range({"cold": COLD_COPIES, "hot": 1}.get(kind, HOST_COPIES) - 1):
                copies.append(parameters(shapes, torch.float32, self.device))
                steppers.append(build(copies[-1]))
            if graphed:
                rounds = COLD_COPIES // len(steppers)
                sides.append(Side([_graph(steppers * rounds)], _nothing, rounds * len(steppers), alive=steppers))
            else:
                prepare = _fresh(copies) if kind == "fresh" else _nothing
                sides.append(Side([stepper.step for stepper in steppers], prepare, len(steppers)))
        return sides[0], sides[1]


# ---- Everything


def ceilings(bench: Bench) -> dict[str, gpu_device.Ceiling]:
    """Each pattern, 20 samples."""
    found = {}
    for name, moved, build in gpu_device.patterns(bench.sizes.stream, bench.device):
        bench.progress(f"ceiling: {name}", 0)
        side = Side([build()], _nothing)
        clock = bench.clocks[0]
        with measure.quiet_interpreter():
            repetitions = measure.calibrate(side, sampler=clock)
            found[name] = gpu_device.Ceiling(build, moved, [clock(side, repetitions) for _ in range(stats.PAIRS[0])])
    return found


def measure_all(
    bench: Bench, commit: str | None = None, specs: Sequence[Spec] = SPECS, on_row: Callable[[GpuRow], object] = _ignore
) -> GpuRun:
    """Ceilings and rows. Raises NoDevice before anything is built."""
    if not torch.cuda.is_available():
        raise NoDevice("[bench gpu] torch sees no CUDA device on this machine; run this where there is one")
    start = perf_counter()
    with torch.cuda.device(bench.device):
        around = {"before": gpu_device.clocks(bench.device.index or 0)}
        tops = ceilings(bench)
        around["loaded"] = gpu_device.clocks_under_load(bench.device, bench.sizes.stream)
        rows = []
        for spec in specs:
            rows.append(bench.run(spec, tops))
            on_row(rows[-1])
        around["after"] = gpu_device.clocks(bench.device.index or 0)
        where = gpu_device.environment(bench.device)
    return GpuRun(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=str(where["device"]),
        commit=commit or env.commit() or "unknown",
        environment=where,
        clocks=around,
        ceilings={name: {"bytes": top.bytes, "gbps": top.gbps, "seconds": top.seconds} for name, top in tops.items()},
        rows=rows,
        seconds=perf_counter() - start,
    )


def select(pattern: str | None) -> list[Spec]:
    """The rows whose name holds `pattern`; all for None."""
    return [spec for spec in SPECS if pattern is None or pattern in spec.name]
