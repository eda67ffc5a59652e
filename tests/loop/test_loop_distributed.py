# SPDX-License-Identifier: Apache-2.0
"""Training of several processes: resumed by another number of them, data that do not divide, torchrun's restarts."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import textwrap
import time

import pytest
import ranks
import torch
from support import bits
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fastloop
from fastloop.loop.logs import read_rows

SAMPLES, BATCH = 46, 4
TIMES = ("steps/s", "samples/s", "data_wait", "memory/host")


class Numbered(Dataset):
    def __init__(self, count=SAMPLES):
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(count, 5, generator=generator), torch.randn(count, 2, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return index, self.x[index], self.y[index]


class Uneven(IterableDataset):
    """counts[rank] samples, numbered from 100 * rank."""

    def __init__(self, counts):
        self.counts = counts

    def __iter__(self):
        rank, known = torch.distributed.get_rank(), Numbered()
        for i in range(self.counts[rank]):
            yield 100 * rank + i, known.x[(rank + 2 * i) % SAMPLES], known.y[(rank + 2 * i) % SAMPLES]


def network(batchnorm):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if batchnorm else []
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def train(rank, run_dir, strategy, data=None, fit=None, batchnorm=False, optimizer="fastloop", scrambled=False, **more):
    """A run; what each rank has seen, by step, and what came out."""
    fastloop.loop.loop.plot_curves = lambda folder: None
    model, seen = network(batchnorm), []
    kind = fastloop if optimizer == "fastloop" else torch.optim
    opt = kind.AdamW(model.parameters(), lr=0.01)
    if scrambled:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1)

    def loss_fn(model, batch):
        index, x, y = batch
        if model.training:
            seen.append((loop.global_step, index.tolist(), loop._window is not None and loop._window._padding))
        return nn.functional.mse_loss(model(x), y)

    settings = {"log_every": 1, "seed": 3, "progress": False, "keep_last": 100, "save_every_epochs": None}
    loop = fastloop.Loop(model, opt, loss_fn, run_dir=run_dir, strategy=strategy, **settings | more)
    begin, at_start = loop.global_step, states(loop)
    loader = DataLoader(Numbered(), BATCH, shuffle=True) if data is None else data
    val = DataLoader(Numbered(11), 3)
    loop.fit(loader, val, **(fit or {"epochs": 2}))
    rows = []
    if rank == 0 and run_dir is not None:
        rows = [{k: v for k, v in r.items() if k not in TIMES} for r in read_rows(run_dir / "metrics.jsonl")]
    return {"begin": begin, "start": at_start, "end": states(loop), "seen": seen, "rows": rows,
            "history": loop.history, "steps": loop.global_step}  # fmt: skip


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def states(loop):
    """Bits of weights and optimizer states, whole ones."""
    inner = loop.model.module if hasattr(loop.model, "module") else loop.model
    found = {name: bits(full(t)) for name, t in inner.state_dict().items()}
    for name, p in inner.named_parameters():
        for key, value in sorted(loop.optimizer.state[p].items()):
            found[f"{name}.{key}"] = bits(full(value)) if isinstance(value, torch.Tensor) else value
    return found


def call(rank, keywords):
    return train(rank, **keywords)


def run(world, folder, **keywords):
    return ranks.run(call, world, folder, keywords)


def trained_on(results, epoch_steps=None):
    """All samples that weighed something, of all ranks."""
    return sorted(i for r in results for step, index, padding in r["seen"] if not padding for i in index)


# ---- another number of processes


@pytest.mark.parametrize(("strategy", "before", "after"), [("ddp", 2, 1), ("fsdp2", 2, 3), ("ddp", 1, 2)])
@pytest.mark.parametrize("stop", [3, pytest.param(6, marks=pytest.mark.slow)])  # within the epoch, at its end
def test_resharded(strategy, before, after, stop, tmp_path):
    """In the middle of an epoch and at its last window: states bitwise, each sample of the epoch once.

    46 samples: 2 ranks take 23 each, 6 windows; alone there are 12.
    """
    last = 6 if before == 2 else 12
    stop = stop if before == 2 else stop * 2
    first = run(before, tmp_path, run_dir=tmp_path / "run", strategy=strategy, fit={"max_steps": stop})
    second = run(after, tmp_path, run_dir=tmp_path / "run", strategy=strategy, fit={"epochs": 1}, scrambled=True)
    assert all(r["begin"] == stop for r in second)
    assert all(r["start"] == first[0]["end"] for r in second)
    assert trained_on(first + second) == list(range(SAMPLES))
    if stop == last:
        assert all(not r["seen"] for r in second)
    third = run(after, tmp_path, run_dir=tmp_path / "run", strategy=strategy, fit={"epochs": 2})
    assert sorted(set(trained_on(third))) == list(range(SAMPLES))


def test_resharded_and_killed_again(tmp_path):
    """2 processes, then 3 that stop in the same epoch, then 1."""
    one = run(2, tmp_path, run_dir=tmp_path / "run", strategy="ddp", fit={"max_steps": 2})
    two = run(3, tmp_path, run_dir=tmp_path / "run", strategy="ddp", fit={"max_steps": 3})
    again = run(3, tmp_path, run_dir=tmp_path / "run", strategy="ddp", fit={"max_steps": 4})
    three = run(1, tmp_path, run_dir=tmp_path / "run", strategy="ddp", fit={"epochs": 1})
    assert trained_on(one + two + again + three) == list(range(SAMPLES))


@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_few_samples_left_for_three(count, tmp_path):
    """Fewer than processes, and a number that they cannot share: each counts once all the same."""
    data = DataLoader(Numbered(8 + count), 4)
    one = run(2, tmp_path, run_dir=tmp_path / "run", strategy="ddp", data=data, fit={"max_steps": 1})
    two = run(3, tmp_path, run_dir=tmp_path / "run", strategy="ddp", data=data, fit={"epochs": 1})
    assert trained_on(one + two) == list(range(8 + count))


# ---- the same number


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_exact_resume(strategy, tmp_path):
    """From each step, with BatchNorm, whose buffers differ between ranks, and validation at every step."""
    fit = {"epochs": 1, "evaluate_every_steps": 1}
    keywords = {"strategy": strategy, "fit": fit, "batchnorm": True, "accumulation_steps": 2, "save_every_steps": 1}
    whole = run(2, tmp_path, run_dir=tmp_path / "whole", **keywords)
    for step in (1, 3):
        resumed = run(
            2, tmp_path, run_dir=tmp_path / f"run{step}", **keywords, scrambled=True,
            resume=str(tmp_path / "whole" / "checkpoints" / f"step-{step:09d}"),
        )  # fmt: skip
        for got, wanted in zip(resumed, whole, strict=True):
            assert got["begin"] == step
            assert got["seen"] == [s for s in wanted["seen"] if s[0] >= step]
            assert got["history"] == wanted["history"]
        assert resumed[0]["end"] == whole[0]["end"]


# ---- data that do not divide


@pytest.mark.parametrize("counts", [(9, 21), (21, 9), (8, 8)])
def test_iterable_data_of_different_length(counts, tmp_path):
    """Nobody knows the lengths; each sample counts once, and both ranks end with the same weights, also resumed."""
    keywords = {"strategy": "ddp", "accumulation_steps": 2, "save_every_steps": 1}
    data = DataLoader(Uneven(counts), BATCH)
    whole = run(2, tmp_path, run_dir=tmp_path / "whole", data=data, **keywords)
    each = [100 * r + i for r in (0, 1) for i in range(counts[r])]
    assert trained_on(whole) == sorted(2 * each)
    windows = math.ceil(math.ceil(max(counts) / BATCH) / 2)
    assert [r["steps"] for r in whole] == [2 * windows] * 2
    assert whole[0]["end"] == whole[1]["end"]
    resumed = run(
        2, tmp_path, run_dir=tmp_path / "run", data=data, **keywords, scrambled=True,
        resume=str(tmp_path / "whole" / "checkpoints" / f"step-{windows:09d}"),
    )  # fmt: skip
    assert [r["end"] for r in resumed] == [r["end"] for r in whole]


def test_a_rank_without_data_ends_the_run(tmp_path):
    """An error that says which rank, and no rank left waiting."""
    keywords = {"run_dir": tmp_path / "run", "strategy": "ddp", "data": DataLoader(Uneven((8, 0)), BATCH)}
    started = ranks.Started(call, 2, tmp_path, keywords)
    with pytest.raises(AssertionError, match=r"every rank needs at least one batch|rank 0"):
        started.results()
    started.wait(30)
    assert not started.alive()


# ---- torchrun

SCRIPT = """
    import os, pathlib, sys, torch
    sys.path[:0] = {paths!r}
    import test_loop_distributed as tests
    folder = pathlib.Path({folder!r})
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    rank = int(os.environ["RANK"])

    class Dies:
        def on_window(self, loop, record):
            if attempt < 2 and rank == attempt and record.step == 3 + 4 * attempt:
                os.kill(os.getpid(), 9)

    result = tests.train(rank, folder / "run", "ddp", callbacks=[Dies()], save_every_steps=1)
    torch.distributed.destroy_process_group()
    import hashlib
    end = hashlib.sha256(repr(sorted(result["end"].items())).encode()).hexdigest()
    (folder / f"rank-{{rank}}").write_text(f"{{attempt}} {{result['begin']}} {{result['steps']}} {{end}}")
"""


@pytest.mark.slow
def test_torchrun_restarts_after_a_rank_died(tmp_path):
    """Rank 0 dies in the first attempt, rank 1 in the second; the third ends as a run that nobody killed."""
    here = os.path.dirname(__file__)
    script = tmp_path / "script.py"
    paths = [here, os.path.dirname(here)]
    script.write_text(textwrap.dedent(SCRIPT.format(paths=paths, folder=str(tmp_path))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=500,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    got = [(tmp_path / f"rank-{rank}").read_text().split() for rank in (0, 1)]
    whole = run(2, tmp_path, run_dir=tmp_path / "whole", strategy="ddp")
    assert got[0] == got[1]
    attempt, begin, steps, end = got[0]
    assert attempt == "2"
    assert int(begin) >= 5  # of the second attempt's checkpoints
    assert int(steps) == whole[0]["steps"]
    assert end == hashlib.sha256(repr(sorted(whole[0]["end"].items())).encode()).hexdigest()
    assert time.monotonic() - began < 500  # no rank waited for a dead one until gloo's time limit, half an hour
