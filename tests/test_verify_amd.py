"""The AMD ladder: compile, inspect, emulate, compare; and the command that climbs it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from gcnemu import build

try:
    build.compiler()
except build.NoCompiler as missing:
    pytest.skip(str(missing), allow_module_level=True)

import gcnemu_kernels as kernels

from moe_backend.cli import main
from moe_backend.verify import amd, amd_cases, amd_inspect
from moe_backend.verify.amd_triton import LDS_BYTES, recording

ARCHS = ("gfx942", "gfx950")


def matmul_case(dtype: torch.dtype, name: str = "case", **wrong) -> amd.KernelCase:
    torch.manual_seed(0)
    a, b = torch.randn(64, 128).to(dtype), torch.randn(64, 128).to(dtype)

    def run() -> torch.Tensor:
        c = torch.empty(64, 64)
        kernels.matmul[(1, 1)](a, b, c, 64, 64, 128, 128, 128, 64, BM=64, BN=64, BK=128)
        return c * wrong.get("factor", 1)

    return amd.KernelCase(name, run, lambda: a.float() @ b.float().T)


# --- inspection ---
@pytest.mark.parametrize(
    ("arch", "dtype", "op", "fallback"),
    [
        ("gfx942", torch.bfloat16, "_bf16", False),
        ("gfx950", torch.bfloat16, "_bf16", False),
        ("gfx942", torch.float8_e4m3fnuz, "_fp8_fp8", False),
        ("gfx942", torch.float8_e4m3fn, "_f16", True),
        ("gfx950", torch.float8_e4m3fn, "_f8f6f4", False),
    ],
)
def test_matrix_instructions(arch: str, dtype: torch.dtype, op: str, fallback: bool):
    """OCP FP8 on gfx942 has no instruction: the compiler takes f16 in silence, and we say so."""
    with recording(arch) as driver:
        matmul_case(dtype).run()
    launch = driver.launches[0]
    found = amd_inspect.inspect(
        launch.assembly, launch.binary, launch.name, dynamic_lds=launch.shared, types=launch.types
    )
    assert found.kernel == "matmul"
    assert found.arch == arch
    assert found.matrix_ops
    assert all(n.startswith("v_mfma") and n.endswith(op) for n in found.matrix_ops)
    assert found.f16_fallback == fallback
    assert 0 < found.vgpr <= 512
    assert found.sgpr > 0
    assert found.spills == found.scratch == 0
    assert found.lds > 0
    assert found.instructions == sum(found.mix.values())
    assert found.mix["matrix"] == sum(found.matrix_ops.values())
    assert found.loads
    problems = found.problems(LDS_BYTES[arch])
    assert problems == (["FP8 operands are multiplied in f16"] if fallback else [])
    assert "matmul" in amd_inspect.table([("a case", found)])


def test_addressing_width():
    """Small tensors are read through 32-bit offsets, those from 2 GiB with 64-bit addresses."""
    from moe_backend.verify.sparse import sparse

    kinds = []
    for size in (1 << 20, 3 << 30):
        x, out = sparse((size,), torch.uint8), torch.zeros(256, dtype=torch.uint8)
        index = torch.zeros(256, dtype=torch.int64)
        with recording("gfx950") as driver:
            kernels.gather[(1,)](x, index, out, BLOCK=256)
        launch = driver.launches[0]
        kinds.append(amd_inspect.inspect(launch.assembly, launch.binary, launch.name).loads)
    assert "64-bit" not in kinds[0], kinds
    assert "64-bit" in kinds[1], kinds


def test_spills_are_problems():
    case = matmul_case(torch.bfloat16)
    with recording("gfx950") as driver:
        case.run()
    launch = driver.launches[0]
    found = amd_inspect.inspect(launch.assembly, launch.binary, launch.name)
    bad = replace(found, spills=3, scratch=64, lds=200_000, vgpr=600)
    assert bad.problems(163_840) == [
        "3 vector registers are spilled",
        "64 bytes of scratch memory per lane",
        "200000 bytes of LDS; gfx950 has 163840",
        "600 VGPRs; a wave can have 512",
    ]
    with pytest.raises(ValueError, match="no kernel 'other'"):
        amd_inspect.inspect(launch.assembly, launch.binary, "other")


# --- the ladder ---
def test_climb():
    kernel = amd.KernelUnderTest("mm", (matmul_case(torch.bfloat16),))
    heard = []
    found = amd.climb([kernel], compile_for=ARCHS, emulate_on=["gfx950"], heard=heard.append)
    assert found.ok
    assert [(c.kernel, c.arch, c.ok) for c in found.compiled] == [
        ("mm/matmul", "gfx942", True),
        ("mm/matmul", "gfx950", True),
    ]
    assert [(e.kernel, e.arch, e.case, e.ok, e.faults) for e in found.emulated] == [
        ("mm", "gfx950", "case", True, ())
    ]
    assert found.emulated[0].rel_l2 < 1e-6
    assert len(heard) == 3
    as_json = json.loads(json.dumps(found.as_json()))
    assert {"kernel", "arch", "ok", "vgpr", "lds", "spills", "matrix_ops"} <= set(
        as_json["compiled"][0]
    )
    assert {"kernel", "arch", "case", "rel_l2", "faults", "ok"} <= set(as_json["emulated"][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_wrong_kernel_does_not_climb(dtype: torch.dtype):
    kernel = amd.KernelUnderTest("mm", (matmul_case(dtype, factor=0.25),))
    found = amd.climb([kernel], compile_for=[], emulate_on=["gfx942"])
    assert not found.ok
    assert not found.emulated[0].ok
    assert "1/4 of the reference" in found.emulated[0].message
    assert found.compiled[0].ok == (dtype == torch.bfloat16)


def test_a_faulty_kernel_does_not_climb():
    """The result is right; what the kernel did to get it is not."""
    x = torch.ones(1000)

    def run() -> torch.Tensor:
        out = torch.empty(1000)
        kernels.add_without_mask[(4,)](x, x, out, BLOCK=256)
        return out

    kernel = amd.KernelUnderTest(
        "add", (amd.KernelCase("no mask", run, lambda: x + x, exact=True),)
    )
    found = amd.climb([kernel], compile_for=[], emulate_on=["gfx950"])
    assert found.emulated[0].rel_l2 == 0
    assert not found.emulated[0].ok
    assert "outside-tensor" in found.emulated[0].faults[0]


def test_unwritten_results_show():
    x = torch.ones(1000)

    def run() -> torch.Tensor:
        out = torch.empty(1024)
        kernels.add[(4,)](x, x, out, 1000, BLOCK=256)
        return out

    kernel = amd.KernelUnderTest(
        "add", (amd.KernelCase("short", run, lambda: torch.full((1024,), 2.0)),)
    )
    found = amd.climb([kernel], compile_for=[], emulate_on=["gfx942"])
    assert "24 of 1024 results are not finite" in found.emulated[0].message


def test_what_does_not_compile_is_reported():
    def run() -> torch.Tensor:
        x = torch.ones(64)
        kernels.add[(1,)](x, x, x, 64, BLOCK=63)  # not a power of two
        return x

    found = amd.climb(
        [amd.KernelUnderTest("bad", (amd.KernelCase("63", run, lambda: torch.ones(64)),))]
    )
    assert [c.ok for c in found.compiled] == [False, False]
    assert "CompilationError" in found.compiled[0].problems[0]


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.5, "1/2 of the reference.*e4m3fnuz"),
        (8.0, "8 of the reference: a scale is lost or counted twice$"),
        (1.5, "wrong throughout"),
    ],
)
def test_diagnosis(scale: float, expected: str):
    reference = torch.randn(16, 16)
    seen = amd.compare(reference * scale, reference, 1e-3)
    assert not seen.ok
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(seen.message)


def test_diagnosis_names_rows():
    reference = torch.randn(16, 16)
    wrong = reference.clone()
    wrong[[3, 7]] = torch.randn(2, 16)
    assert amd.compare(wrong, reference, 1e-3).message == "2 of 16 rows are wrong, first [3, 7]"


def test_bad_input():
    with pytest.raises(ValueError, match="no AMD target 'gfx906'; known are gfx942, gfx950"):
        amd.climb([], compile_for=["gfx906"])
    with pytest.raises(ValueError, match="no kernel 'reference' for AMD targets"):
        amd_cases.own_kernels(only="reference")


def test_no_compiler_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GCNEMU_CC", "no-such-compiler")
    with pytest.raises(ValueError, match="install gcc or name a C compiler in GCNEMU_CC"):
        amd.climb([], compile_for=[], emulate_on=["gfx942"])


# --- the command ---
def test_command(tmp_path, capsys: pytest.CaptureFixture[str]):
    """This package's Triton kernel, every format, on both targets."""
    report = tmp_path / "report.json"
    arguments = [
        "verify",
        "--quick",
        "--compile",
        "gfx942",
        "--emulate",
        "gfx942",
        "--emulate",
        "gfx950",
    ]
    status = main([*arguments, "--json", str(report)])
    out = capsys.readouterr().out
    assert status == 0, out
    found = json.loads(report.read_text())
    assert {(e["arch"], e["ok"]) for e in found["emulated"]} == {("gfx942", True), ("gfx950", True)}
    assert all(e["rel_l2"] < 8e-3 and e["faults"] == [] for e in found["emulated"])
    assert {c["kernel"] for c in found["compiled"]} == {
        "triton/gate_up_kernel", "triton/down_kernel", "triton/sum_kernel"
    }  # fmt: skip
    assert all(c["ok"] and c["spills"] == 0 for c in found["compiled"])
    assert "0 wrong" in out
    assert main(["verify", "--compile", "gfx1250"]) == 1
    assert "no AMD target 'gfx1250'" in capsys.readouterr().err


@pytest.mark.emulate
@pytest.mark.parametrize("arch", ARCHS)
def test_every_small_case(arch: str):
    """Every small case of the package's own verification, on the machine code."""
    found = amd.climb(amd_cases.own_kernels(), compile_for=[], emulate_on=[arch])
    assert len(found.emulated) > 50
    assert [(e.case, e.rel_l2, e.faults, e.message) for e in found.emulated if not e.ok] == []
