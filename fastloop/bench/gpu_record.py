# SPDX-License-Identifier: Apache-2.0
"""What is measured on a GPU, and the file that holds it: rows with their goals, raw samples, ceilings, clocks.

benchmarks/results/<device>/<commit>.json; scripts/gpu_results.py makes docs/gpu-results.md of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from fastloop.bench.results import BadResult
from fastloop.bench.stats import Interval, control_moved

SCHEMA = "fastloop-gpu/1"

FUSED = "`clip_grad_norm_` + `AdamW(fused=True)`"
FOLDED = "the norm folded into `AdamW(fused=True).grad_scale`"
CONTROL = "control"


@dataclass(frozen=True)
class Spec:
    """One row. Goals: the least ratio (the peer's time over ours), and the least part of the measured ceiling.

    cache: "cold", the data are larger than the L2 cache or rotated through more copies than fit; "hot", they fit.
    clock: "device", time between two events on the GPU; "host", wall-clock time until the GPU is done.
    """

    name: str
    title: str
    peer: str
    cache: str = "cold"
    clock: str = "device"
    goal: float | None = None
    ceiling_goal: float | None = None


SPECS: tuple[Spec, ...] = (
    Spec("gpt-1b/fused", "fp32, 1B parameters in GPT-like shapes", FUSED, goal=1.25, ceiling_goal=0.9),
    Spec("gpt-1b/folded", "the same", FOLDED, goal=1.12),
    Spec(
        "gpt-1b-bf16/copies",
        "bf16 parameters and gradients, fp32 states and fp32 master",
        f"fp32 copies of both, {FUSED}, and back",
        ceiling_goal=0.9,
    ),
    Spec("1000x1024-fresh/fused", "1000 tensors of 1024, gradients fresh each step", FUSED, clock="host", goal=8.0),
    Spec("10000x64-fresh/fused", "10 000 tensors of 64, gradients fresh each step", FUSED, clock="host", goal=8.0),
    Spec("1000x1024-stay/fused", "1000 tensors of 1024, gradients that stay", FUSED, clock="host", goal=20.0),
    Spec("10000x64-stay/fused", "10 000 tensors of 64, gradients that stay", FUSED, clock="host", goal=20.0),
    Spec("1000x1024-graph/fused", "1000 tensors of 1024, both replayed from a CUDA graph", FUSED),
    Spec(
        "gpt-1b-scaler/scaler",
        "unscale + inf check + clip + step, by `fastloop.GradScaler`, 1B parameters",
        f"`torch.amp.GradScaler` + {FUSED}",
        goal=1.6,
    ),
    Spec("gpt-1b-triton/cuda", "Triton, fp32, 1B parameters", "our CUDA kernels", goal=1 / 1.05),
    Spec("1m-cold/fused", "fp32, 1M parameters, both replayed from a CUDA graph, 32 copies in turn", FUSED),
    Spec("1m-hot/fused", "the same, one copy that stays in the L2 cache", FUSED, cache="hot"),
    Spec(
        "loop-gpt2-bf16/torch",
        "GPT-2 124M, bf16 autocast, batches of 8 x 1024: whole steps of `fastloop.Loop`",
        f"the same loop by hand, {FUSED}",
        clock="host",
    ),
    Spec(CONTROL, "torch against itself, GPT-2 124M", FUSED),
)


@dataclass
class GpuRow:
    """What was measured of one `Spec`. Samples are seconds of one step, in the order in which they were taken."""

    name: str
    status: str = "ok"  # "ok", "skipped" or "wrong"
    reason: str = ""
    ratio: Interval | None = None
    ours_seconds: list[float] = field(default_factory=list)
    peer_seconds: list[float] = field(default_factory=list)
    repetitions: tuple[int, int] = (0, 0)
    stopped: str = ""
    bytes: int = 0  # that a step must move; 0: not declared
    ceiling: Interval | None = None  # our bytes per second over the ceiling's
    ceiling_kind: str = ""
    ceiling_ratios: list[float] = field(default_factory=list)

    @property
    def gbps(self) -> float | None:
        return self.bytes / median(self.ours_seconds) * 1e-9 if self.bytes and self.ours_seconds else None


@dataclass
class GpuRun:
    """Everything that one invocation measured on one device."""

    created: str
    device: str
    commit: str
    environment: dict[str, Any]
    clocks: dict[str, dict[str, Any]]  # "before", "loaded", "after"
    ceilings: dict[str, dict[str, Any]]  # name -> bytes, seconds (raw), gbps (of the median)
    rows: list[GpuRow]
    seconds: float = 0.0
    schema: str = SCHEMA

    @property
    def void(self) -> bool:
        """Whether the control moved: nothing should be concluded from this run."""
        return any(row.name == CONTROL and row.ratio and control_moved(row.ratio) for row in self.rows)

    @property
    def path(self) -> Path:
        """Where the file lies under benchmarks/results."""
        return Path(slug(self.device)) / f"{slug(self.commit)}.json"


def line(row: GpuRow) -> str:
    """A row as one line of text."""
    if row.status != "ok" or row.ratio is None:
        return f"{row.name}: {row.status}: {row.reason}"
    text = f"{row.name}: {row.ratio.median:.2f}x ({row.ratio.low:.2f} .. {row.ratio.high:.2f})"
    text += f", {median(row.ours_seconds) * 1e6:.1f} us against {median(row.peer_seconds) * 1e6:.1f} us"
    if row.gbps:
        text += f", {row.gbps:.0f} GB/s"
    if row.ceiling:
        text += f", {row.ceiling.median:.1%} of {row.ceiling_kind}"
    return text


def slug(text: str) -> str:
    """`NVIDIA H200` as `nvidia-h200`."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unknown"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return value


def to_json(run: GpuRun) -> str:
    """The document, one row a line; every sample, to six digits."""
    document = _rounded(asdict(run))
    rows = ",\n  ".join(json.dumps(row) for row in document.pop("rows"))
    return json.dumps(document)[:-1] + ',\n "rows": [\n  ' + rows + "\n ]}\n"


def from_json(text: str) -> GpuRun:
    """Read a document back. Raises BadResult if it is not one of this schema."""
    try:
        document = json.loads(text)
        if document["schema"] != SCHEMA:
            raise BadResult(f"[bench gpu] wanted schema {SCHEMA}, got {document['schema']}; measure it anew")
        for row in document["rows"]:
            for name in ("ratio", "ceiling"):
                row[name] = Interval(**row[name]) if row[name] else None
            row["repetitions"] = tuple(row["repetitions"])
        return GpuRun(**{**document, "rows": [GpuRow(**row) for row in document["rows"]]})
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise BadResult(f"[bench gpu] not a GPU result: {type(error).__name__}: {error}") from error


def save(run: GpuRun, base: Path) -> Path:
    """Write the run under `base` (benchmarks/results), and say where."""
    path = base / run.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(run), encoding="utf-8")
    return path


def load(path: Path) -> GpuRun:
    """Read a saved run. Raises BadResult with the path if it cannot be one."""
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadResult(f"[bench gpu] cannot read {path}: {error}") from error
    except BadResult as error:
        raise BadResult(f"{error} ({path})") from error
