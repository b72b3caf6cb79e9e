"""FlyDSL kernels, launched through FlyDSL's own interface on CPU tensors, on both targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("flydsl", reason="flydsl is not installed")
from gcnemu import build

try:
    build.compiler()
except build.NoCompiler as missing:
    pytest.skip(str(missing), allow_module_level=True)

import gcnemu_flydsl_kernels as kernels
from gcnemu import flydsl_driver
from gcnemu.program import ALL

from moe_backend.verify import amd, amd_inspect

pytestmark = pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


def test_vector_add(arch: str):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1024,), 5.0)
    launch = kernels.vector_add(1000)
    with flydsl_driver.active(arch, schedules=ALL) as driver:
        launch(out.data_ptr(), x.data_ptr(), y.data_ptr(), 1000)
    assert [str(f) for f in driver.launches[0].found] == []
    assert torch.equal(out[:1000], x + y)
    assert (out[1000:] == 5).all()


def test_gemm(arch: str):
    torch.manual_seed(0)
    a, b = torch.randn(48, 256).to(FP8[arch]), torch.randn(32, 256).to(FP8[arch])
    out = torch.full((48, 32), float("nan"))
    launch = kernels.gemm_fp8(48, 32, 256)
    with flydsl_driver.active(arch, schedules=ALL) as driver:
        launch(out.data_ptr(), a.data_ptr(), b.data_ptr())
    (seen,) = driver.launches
    assert [str(f) for f in seen.found] == []
    torch.testing.assert_close(out, a.float() @ b.float().T, rtol=1e-5, atol=1e-4)
    found = amd_inspect.inspect(seen.assembly, seen.binary, seen.name, types=("*fp8",))
    assert list(found.matrix_ops) == ["v_mfma_f32_16x16x32_fp8_fp8"]
    assert not found.f16_fallback


def test_write_past_the_end_is_caught(arch: str):
    """Must fail: the count is larger than the tensors."""
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    launch = kernels.vector_add(1024)
    with pytest.raises(RuntimeError, match="outside-tensor"):
        with flydsl_driver.active(arch):
            launch(out.data_ptr(), x.data_ptr(), y.data_ptr(), 1_000_000)


def test_assembly_must_be_the_code_objects(arch: str):
    """Must fail: a text that assembles to other bytes than the code object's is not run."""
    x, out = torch.randn(256), torch.zeros(256)
    launch = kernels.vector_add(256)
    with flydsl_driver.active(arch) as driver:
        launch(out.data_ptr(), x.data_ptr(), x.data_ptr(), 256)
        blob = driver.launches[0].binary
        for path in Path(driver.dumps).rglob("*final_isa.s"):
            path.write_text(path.read_text().replace("v_add_f32", "v_sub_f32"))
        with pytest.raises(RuntimeError, match="assembly dumps is the code of"):
            driver._assembly_of(blob)


def test_ladder(arch: str):
    """A FlyDSL kernel climbs the same ladder as a Triton one."""
    x, y = torch.randn(512), torch.randn(512)

    def run() -> torch.Tensor:
        out = torch.empty(512)
        kernels.vector_add(512)(out.data_ptr(), x.data_ptr(), y.data_ptr(), 512)
        return out

    case = amd.KernelCase("512", run, lambda: x + y, exact=True)
    kernel = amd.KernelUnderTest("flydsl", (case,), "flydsl")
    found = amd.climb([kernel], compile_for=[arch], emulate_on=[arch])
    assert found.ok, found
    assert found.compiled[0].inspection is not None
    assert len(found.emulated) == 1
