# SPDX-License-Identifier: Apache-2.0
"""Reading machine code, and a check that fails when it should: recorded text and doctored numbers, nothing compiled.

`make aot` compiles the kernels and compares them with the golden file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastloop.bench import aot, cli
from fastloop.bench.commands import shared

NORM = "_ZN8fastloop6device4normIfLi1EEEvNS0_10NormParamsIXT0_EEE"
SGD = "_ZN8fastloop6device6updateINS0_3SgdIfLb1EEEfNS0_4BF16ES4_Lb0ELb0EEEvNS0_8StepArgsE"

# cuobjdump of CUDA 12.8 on sm_90, shortened.
RESOURCES = f"""
Resource usage:
 Common:
  GLOBAL:0
 Function {SGD}:
  REG:79 STACK:0 SHARED:3129 LOCAL:0 CONSTANT[0]:632 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {NORM}:
  REG:62 STACK:16 SHARED:4096 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
DISASSEMBLY = f"""
\tcode for sm_90
\t.target\tsm_90

\t\tFunction : {NORM}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                             /* 0x00000a00ff017b82 */
                                                                                      /* 0x000ff00000000800 */
        /*0020*/                   ULDC.64 UR8, c[0x0][0x208] ;                       /* 0x0000820000087ab9 */
        /*0030*/                   LDG.E R0, desc[UR8][R2.64] ;                       /* 0x0000000802007981 */
        /*0070*/               @P0 EXIT ;                                             /* 0x000000000000094d */
        /*0230*/                   LDG.E.64 R4, desc[UR8][R4.64+0x20] ;               /* 0x0000200804047981 */
        /*06c0*/                   LD.E.128 R8, desc[UR8][R58.64] ;                   /* 0x000000083a087980 */
        /*06d0*/              @!P1 LD.E.128 R12, desc[UR8][R58.64+0x800] ;            /* 0x000800083a0c7980 */
        /*06f0*/                   LDG.E.ENL2.256 R8, R12, desc[UR8][R58.64] ;        /* 0x000000083a087980 */
        /*0710*/                   STL.64 [R1], R8 ;                                  /* 0x0000000801007387 */
        /*0f50*/              @!P0 STS.64 [R0.X8+0x38], R2 ;                          /* 0x0000380200008388 */
        /*0f70*/                   LDS.128 R4, [R0] ;                                 /* 0x0000380200008388 */
        /*0fa0*/                   LDL.128 R4, [R1] ;                                 /* 0x0000380200008388 */
        /*10030*/                  STG.E.64 desc[UR8][R2.64], R4 ;                    /* 0x0000000402007986 */
\t\t..........

\t\tFunction : {SGD}
\t.headerflags\t@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   ATOMG.E.INC.STRONG.GPU PT, R3, desc[UR8][R2.64] ;  /* 0x00000003020379a8 */
        /*0010*/                   LDG.E.128.CONSTANT R8, desc[UR8][R2.64] ;          /* 0x0000000802007981 */
        /*0020*/                   LD.E.U16 R8, desc[UR8][R2.64] ;                    /* 0x0000000802007981 */
        /*0030*/              @!P0 ST.E.128 desc[UR8][R2.64], R4 ;                    /* 0x0000000402007985 */
        /*0040*/                   ST.E.U16 desc[UR8][R2.64], R4 ;                    /* 0x0000000402007985 */
\t\t..........
"""

GOOD = aot.Code(
    registers=62, stack=0, local=0, local_accesses=0, loads_128=4, loads_narrow=9, stores_128=3, stores_narrow=2
)  # fmt: skip
KEYS = ("cuda sm_90 norm<float, 1>", "triton sm_90 adam_fp32")


def test_both_outputs_of_cuobjdump_are_read() -> None:
    norm = aot.Code(
        registers=62, stack=16, local=0, local_accesses=2, loads_128=4, loads_narrow=2, stores_128=0, stores_narrow=1
    )
    sgd = aot.Code(
        registers=79, stack=0, local=0, local_accesses=0, loads_128=1, loads_narrow=1, stores_128=1, stores_narrow=1
    )
    assert aot.codes(RESOURCES, DISASSEMBLY) == {NORM: norm, SGD: sgd}


@pytest.mark.parametrize(("resources", "disassembly"), [("", ""), (RESOURCES, ""), ("", DISASSEMBLY)])
def test_what_cannot_be_read_is_not_a_kernel_without_faults(resources: str, disassembly: str) -> None:
    with pytest.raises(aot.Unavailable, match="cuobjdump"):
        aot.codes(resources, disassembly)


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void fastloop::device::norm<float, 1>(fastloop::device::NormParams<1>)", "norm<float, 1>"),
        (
            "void fastloop::device::update<fastloop::device::Adam<float, false>, fastloop::device::BF16, float, float, "
            "true, false>(fastloop::device::StepArgs)",
            "update<Adam<float, false>, BF16, float, float, true, false>",
        ),
        ("norm_kernel", "norm_kernel"),
    ],
)
def test_names_are_readable(demangled: str, name: str) -> None:
    assert aot.readable(demangled) == name


DOCTORED = {
    "a spill": ({"stack": 8}, "spills: 8 B of stack"),
    "local memory": ({"local": 8}, "8 B and 0 accesses of local memory"),
    "local accesses": ({"local_accesses": 2}, "0 B and 2 accesses of local memory"),
    "a lost load": ({"loads_128": 3}, "3 loads of 128 bits, 4 in the golden file"),
    "a lost store": ({"stores_128": 2}, "2 stores of 128 bits, 3 in the golden file"),
    "no wide load": ({"loads_128": 0}, "its accesses fell apart"),
    "registers": ({"registers": 71}, "71 registers, 62 in the golden file"),
}


@pytest.mark.parametrize(("change", "message"), DOCTORED.values(), ids=DOCTORED)
def test_the_check_finds(
    change: dict[str, int],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    golden = golden_file(tmp_path)
    compiled(monkeypatch, dict.fromkeys(KEYS, GOOD) | {KEYS[1]: replace(GOOD, **change)})
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.REGRESSION
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"registers": 70}, {"registers": 40}, {"loads_narrow": 20}, {"loads_128": 8}, {"stores_narrow": 0}]
)
def test_the_check_passes(change: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_file(tmp_path)
    compiled(monkeypatch, dict.fromkeys(KEYS, GOOD) | {KEYS[0]: replace(GOOD, **change)})
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.OK


def test_a_norm_stores_nothing_wide() -> None:
    assert list(aot.faults({KEYS[0]: replace(GOOD, stores_128=0)})) == []
    assert len(list(aot.faults({KEYS[1]: replace(GOOD, stores_128=0)}))) == 1


def test_a_missing_and_a_new_kernel_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = golden_file(tmp_path)
    compiled(monkeypatch, {KEYS[0]: GOOD, "triton sm_90 adam_fp8": GOOD})
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.REGRESSION
    message = capsys.readouterr().err
    assert f"{KEYS[1]}: in the golden file and not compiled" in message
    assert "triton sm_90 adam_fp8: not in the golden file" in message


def test_a_spill_counts_outside_the_golden_file_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_file(tmp_path)
    key = "cuda sm_90 update<Sgd<double, true>, double, double, double, false, false>"
    assert not aot.is_representative(key)
    compiled(monkeypatch, dict.fromkeys(KEYS, GOOD) | {key: GOOD})
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.OK
    compiled(monkeypatch, dict.fromkeys(KEYS, GOOD) | {key: replace(GOOD, stack=8)})
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.REGRESSION


def test_other_compilers_are_not_comparable_but_spills_are_spills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    golden = golden_file(tmp_path)
    compiled(monkeypatch, {KEYS[0]: GOOD, KEYS[1]: replace(GOOD, registers=90)}, triton="9.9.9")
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.VOID
    assert "not comparable" in capsys.readouterr().err
    compiled(monkeypatch, {KEYS[0]: GOOD, KEYS[1]: replace(GOOD, stack=8)}, triton="9.9.9")
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.REGRESSION


def test_update_writes_what_check_then_accepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_file(tmp_path)
    worse = dict.fromkeys(KEYS, replace(GOOD, registers=90))
    compiled(monkeypatch, worse)
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.REGRESSION
    assert cli.main(["aot", "--update", "--golden", str(golden)]) == shared.OK
    assert cli.main(["aot", "--check", "--golden", str(golden)]) == shared.OK
    assert aot.load(golden) == (worse, COMPILERS)


def test_update_keeps_what_was_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_file(tmp_path)
    compiled(monkeypatch, {KEYS[1]: replace(GOOD, registers=90)})
    assert cli.main(["aot", "--update", "--backend", "triton", "--arch", "90", "--golden", str(golden)]) == shared.OK
    assert aot.load(golden)[0] == {KEYS[0]: GOOD, KEYS[1]: replace(GOOD, registers=90)}


def test_update_refuses_a_spill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = golden_file(tmp_path)
    before = golden.read_text()
    compiled(monkeypatch, dict.fromkeys(KEYS, replace(GOOD, stack=8)))
    assert cli.main(["aot", "--update", "--golden", str(golden)]) == shared.REGRESSION
    assert golden.read_text() == before


@pytest.mark.parametrize("text", [None, "", "{}", '{"schema": "other/1"}', '{"schema": "fastloop-aot/1"}'])
def test_no_golden_file(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "golden.json"
    if text is not None:
        path.write_text(text)
    compiled(monkeypatch, {})
    assert cli.main(["aot", "--check", "--golden", str(path)]) == shared.NO_BASELINE


def test_outside_a_checkout_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(aot, "ROOT", tmp_path)
    assert cli.main(["aot", "--backend", "cuda", "--golden", str(tmp_path / "none")]) == shared.VOID
    assert "run it in a checkout" in capsys.readouterr().err


def test_the_committed_golden_file_holds_both_backends_without_faults() -> None:
    kernels, compilers = aot.load(aot.GOLDEN)
    assert set(compilers) == {"nvcc", "triton"}
    assert {" ".join(key.split(" ")[:2]) for key in kernels} == {
        f"{backend} sm_{architecture}" for backend in ("cuda", "triton") for architecture in aot.ARCHITECTURES
    }
    assert all(map(aot.is_representative, kernels))
    assert list(aot.faults(kernels)) == []


COMPILERS = {"nvcc": "13.0.88", "triton": "3.6.0"}


def golden_file(folder: Path) -> Path:
    path = folder / "golden.json"
    path.write_text(aot.to_json(dict.fromkeys(KEYS, GOOD), COMPILERS))
    return path


def compiled(monkeypatch: pytest.MonkeyPatch, kernels: aot.Kernels, **compilers: str) -> None:
    """Takes the place of compiling: `kernels` are what the compilers made."""
    monkeypatch.setattr(aot, "measure", lambda backends, architectures: (kernels, COMPILERS | compilers))
