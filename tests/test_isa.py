# SPDX-License-Identifier: Apache-2.0
"""Every instruction set computes the same: norms to the bit, parameters within the bound."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

import fastloop

HERE = pathlib.Path(__file__).parent
KNOWN = ("baseline", "avx2", "avx512", "neon")


def supported() -> tuple[str, ...]:
    from fastloop.ops.backends import supported_isas

    return tuple(supported_isas())


def python(*arguments: str, isa: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "FASTLOOP_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@functools.cache
def probe(isa: str) -> dict:
    finished = python(str(HERE / "isa_probe.py"), isa=isa)
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout)


@pytest.mark.parametrize("isa", KNOWN)
def test_every_instruction_set(isa):
    if not fastloop.backends()["cpu"]["available"]:
        pytest.skip(f"backend 'cpu' is not available: {fastloop.backends()['cpu']['reason']}")
    if isa not in supported():
        pytest.skip(f"{isa} is not among what this build and machine have: {', '.join(supported())}")
    result = probe(isa)
    assert result["isa"] == isa
    assert result["norms"] == probe(supported()[0])["norms"]


def test_supported_instruction_sets_are_known_and_the_best_is_chosen():
    if not fastloop.backends()["cpu"]["available"]:
        pytest.skip(f"backend 'cpu' is not available: {fastloop.backends()['cpu']['reason']}")
    assert supported()
    assert set(supported()) <= set(KNOWN)
    assert "baseline" in supported()
    assert fastloop.backends()["cpu"]["isa"] == os.environ.get("FASTLOOP_ISA", supported()[-1])


STEP = """
import torch, fastloop
p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
opt = fastloop.AdamW([p], backend="cpu"); opt.step()
"""


@pytest.mark.parametrize("isa", ["nonsense", "AVX3", ""])
def test_an_unknown_instruction_set_gives_a_clear_error(isa):
    finished = python("-c", STEP, isa=isa)
    if isa == "":
        assert finished.returncode == 0, finished.stderr
        return
    assert finished.returncode == 1, "an error, not a crash"
    last = finished.stderr.strip().splitlines()[-1]
    assert "FASTLOOP_ISA" in last
    assert isa in last
    for known in supported():
        assert known in last


def test_an_instruction_set_that_this_machine_lacks_gives_a_clear_error():
    missing = [isa for isa in KNOWN if isa not in supported()]
    finished = python("-c", STEP, isa=missing[0])
    assert finished.returncode == 1
    last = finished.stderr.strip().splitlines()[-1]
    assert "FASTLOOP_ISA" in last
    assert missing[0] in last


def test_importing_with_a_wrong_instruction_set_is_no_error():
    """The variable is read when the native module is first used."""
    finished = python("-c", "import fastloop", isa="nonsense")
    assert finished.returncode == 0, finished.stderr
