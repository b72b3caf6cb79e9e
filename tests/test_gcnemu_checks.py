"""The emulator's checks: kernels with a known bug, compiled for real, are each caught by name."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from gcnemu import build

try:
    build.compiler()
except build.NoCompiler as missing:
    pytest.skip(str(missing), allow_module_level=True)

import gcnemu_ir as ir
import gcnemu_kernels as kernels
from gcnemu import llvm, triton_driver
from gcnemu.asm import Unsupported
from gcnemu.program import ALL, ONE
from gcnemu.translate import UnsupportedInstructions

from moe_backend.verify.sparse import sparse

ARCHS = ("gfx942", "gfx950")
pytestmark = pytest.mark.parametrize("arch", ARCHS)
GIB = 1 << 30


def kinds(found: list) -> set[str]:
    return {f.kind for f in found}


# --- weights beyond 4 GiB: zeros that nobody has written occupy no memory ---
def last_expert(
    arch: str, wide: int, experts: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor, list]:
    """What a kernel reads of the last expert, what it should read, and the findings."""
    weights = sparse((experts * stride,), torch.uint8)
    weights[(experts - 1) * stride : (experts - 1) * stride + 256] = torch.arange(
        256, dtype=torch.uint8
    )
    out = torch.zeros(256, dtype=torch.uint8)
    which = torch.tensor([experts - 1], dtype=torch.int32)
    with triton_driver.active(arch, strict=False) as driver:
        kernels.expert_row[(1,)](weights, which, out, stride, 256, WIDE=wide, BLOCK=256)
    expected = torch.arange(256, dtype=torch.uint8)
    return out, expected, driver.launches[0].found


def test_weights_beyond_4_gib(arch: str):
    out, expected, found = last_expert(arch, 2, 9, GIB // 2 + 4096)
    assert torch.equal(out, expected)
    assert found == []


def test_offset_cut_to_32_bits_is_caught(arch: str):
    """Must fail: past 4 GiB the offset starts again at 0. The memory is live, the data is wrong."""
    out, expected, found = last_expert(arch, 0, 9, GIB // 2 + 4096)
    assert found == []
    assert not torch.equal(out, expected)


def test_product_in_32_bits_is_caught(arch: str):
    """Must fail: past 2^31 elements the offset is negative, and the address before the tensor."""
    out, expected, found = last_expert(arch, 1, 6, GIB // 2)
    assert not torch.equal(out, expected)
    assert kinds(found) == {"outside-tensor"}
    assert "bytes before the start of torch.uint8 [3221225472]" in str(found[0])
    assert "4 GiB higher is inside" in str(found[0])
    assert found[0].source.startswith("gcnemu_kernels.py:")


# --- global memory ---
def test_write_past_the_end_is_caught(arch: str):
    """Must fail: without a mask the last program leaves its tensors; nothing is written there."""
    storage = torch.zeros(4096)
    x, y = torch.ones(1000), torch.ones(1000)
    out = torch.zeros(1000)
    with triton_driver.active(arch, strict=False) as driver:
        kernels.add_without_mask[(4,)](x, y, out, BLOCK=256)
    found = driver.launches[0].found
    assert kinds(found) == {"outside-tensor"}
    assert any("store" in f.instruction for f in found)
    assert all("past the end of torch.float32 [1000]" in str(f) for f in found)
    assert torch.equal(out, x + y)
    assert (storage == 0).all()


def test_read_past_the_end_is_caught(arch: str):
    """Must fail: one element too many, in a read whose result may even be unused."""
    x, out = torch.ones(1000), torch.zeros(1000)
    with pytest.raises(triton_driver.Faulty, match=r"gcnemu_kernels.py:\d+.*0 bytes past the end"):
        with triton_driver.active(arch):
            kernels.read_past_the_end[(4,)](x, out, 1000, BLOCK=256)


def test_values_nobody_wrote_are_caught(arch: str):
    """Must fail: lanes that a mask switched off have no value."""
    x, out = torch.ones(100), torch.zeros(256)
    with triton_driver.active(arch, schedules=ALL, strict=False) as driver:
        kernels.uninitialised[(1,)](x, out, 100, BLOCK=256)
    found = driver.launches[0].found
    # A compiler may give such lanes a value; then there is nothing to find.
    assert kinds(found) <= {"uninitialised", "buffer-read-zero"}
    assert torch.equal(out[:100], x)


# --- LDS ---
def reverse(arch: str, schedules=ALL, **how) -> tuple[torch.Tensor, torch.Tensor, list]:
    x, out = torch.randn(256), torch.zeros(256)
    kernel = llvm.Kernel.from_ir(ir.reverse(**how), arch)
    found = kernel.launch((1,), (256,), x, out, schedules=schedules)
    return out, x.flip(0), found


def test_barrier(arch: str):
    out, expected, found = reverse(arch)
    assert torch.equal(out, expected)
    assert found == []


def test_missing_barrier_is_caught(arch: str):
    """Must fail: named as a race at the instruction; the orders tell it from a wrong result."""
    _, _, found = reverse(arch, barrier=False)
    assert {"lds-race", "order-dependent"} <= kinds(found)
    assert any("no barrier in between" in str(f) and "ds_read" in f.instruction for f in found)
    # One order alone also sees it, by who touched what.
    assert "lds-race" in kinds(reverse(arch, ONE, barrier=False)[2])


def test_write_past_lds_is_caught(arch: str):
    """Must fail: the last 8 of 256 floats lie beyond the 1024 bytes."""
    _, _, found = reverse(arch, shift=8)
    outside = next(f for f in found if f.kind == "outside-lds")
    assert "ds_write" in outside.instruction
    assert "LDS bytes 1024 to 1027 of 1024" in str(outside)
    assert outside.count == 8


def test_lds_dma(arch: str):
    x, out = torch.randn(256), torch.zeros(256)
    found = llvm.Kernel.from_ir(ir.copy(), arch).launch((1,), (256,), x, out, schedules=ALL)
    assert torch.equal(out, x)
    assert found == []


def test_wrong_wait_before_lds_dma_data_is_caught(arch: str):
    """Must fail: lgkmcnt does not count the copy into LDS, so its data is still on its way."""
    x, out = torch.randn(256), torch.zeros(256)
    kernel = llvm.Kernel.from_ir(ir.copy(ir.WAIT_LGKM), arch)
    found = kernel.launch((1,), (256,), x, out, schedules=ALL)
    assert {"lds-dma-early", "uninitialised"} <= kinds(found)
    assert not torch.equal(out, x)
    assert any("s_waitcnt vmcnt is missing or too weak" in str(f) for f in found)


def test_removed_wait_is_caught(arch: str):
    """Must fail: any load's data lands when s_waitcnt says so, not before."""
    x, y, out = torch.randn(256), torch.randn(256), torch.zeros(256)
    with triton_driver.active(arch) as driver:
        kernels.add[(1,)](x, y, out, 256, BLOCK=256)
    assembly = driver.launches[0].assembly
    weakened = assembly.replace("s_waitcnt vmcnt(0)", "s_nop 0").replace(
        "s_waitcnt vmcnt(1)", "s_nop 0"
    )
    assert weakened != assembly
    kernel = llvm.Kernel(weakened, arch)
    arguments = [x, y, out, 256, 0, 0][
        : len([a for a in kernel.metadata.arguments if not a.kind.startswith("hidden_")])
    ]
    found = kernel.launch((1,), (256,), *arguments, schedules=ALL)
    assert "uninitialised" in kinds(found)
    assert not torch.equal(out, x + y)


# --- number formats ---
def test_ocp_codes_read_as_fnuz_are_caught(arch: str):
    """Must fail: e4m3fn codes taken for e4m3fnuz are half as large; the comparison says so."""
    from moe_backend.verify.amd import compare

    torch.manual_seed(0)
    a, b = (torch.randn(64, 128).to(torch.float8_e4m3fn) for _ in range(2))
    c = torch.empty(64, 64)
    wrong = [t.view(torch.float8_e4m3fnuz) for t in (a, b)]
    with triton_driver.active(arch):
        kernels.matmul[(1, 1)](*wrong, c, 64, 64, 128, 128, 128, 64, BM=64, BN=64, BK=128)
    seen = compare(c, a.float() @ b.float().T, 1e-3)
    assert not seen.ok
    if seen.finite:
        assert "1/4 of the reference" in seen.message
        assert "fnuz" in seen.message


# --- what is refused, and what is only noted ---
def test_buffer_reads_that_hardware_answers_with_zero_are_notes(arch: str):
    text = ir.assembly(
        arch,
        """
  v_lshlrev_b32_e32 v1, 2, v0
  s_mov_b32 s8, s4
  s_mov_b32 s9, s5
  s_mov_b32 s10, 128
  s_mov_b32 s11, 0x27000
  buffer_load_dword v2, v1, s[8:11], 0 offen
  s_waitcnt vmcnt(0)
  global_store_dword v1, v2, s[6:7]""",
    )
    x, out = torch.randn(64), torch.full((64,), 5.0)
    found = llvm.Kernel(text, arch).launch((1,), (64,), x, out, schedules=ALL)
    assert [(f.kind, f.severity, f.count) for f in found] == [("buffer-read-zero", "note", 32)]
    assert torch.equal(out[:32], x[:32])
    assert (out[32:] == 0).all()


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        ("v_mov_b32 v1, 0\n global_store_dword v1, v1, s[0:1]", "read-only", "may only read"),
        ("v_mov_b32 v1, 64\n scratch_store_dword v1, v1, off", "outside-scratch", "scratch memory"),
        (
            "s_mov_b32 s8, s4\n s_or_b32 s9, s5, 0x80000000\n s_mov_b32 s10, 64\n"
            " s_mov_b32 s11, 0\n"
            " buffer_load_dword v1, off, s[8:11], 0",
            "buffer-resource",
            "swizzled",
        ),
        (
            "s_mov_b32 s8, s4\n s_mov_b32 s9, s5\n s_mov_b32 s10, 0\n s_mov_b32 s11, 0\n"
            " buffer_store_dword v0, off, s[8:11], 0",
            "buffer-write-dropped",
            "past num_records",
        ),
    ],
)
def test_rarer_findings(arch: str, body: str, kind: str, says: str):
    """Must fail: each of the other findings, seen once."""
    x, out = torch.zeros(64), torch.zeros(64)
    kernel = llvm.Kernel(ir.assembly(arch, body, scratch=64), arch)
    (found,) = kernel.launch((1,), (64,), x, out)
    assert (found.kind, found.count) == (kind, 1 if kind == "buffer-resource" else 64)
    assert says in str(found)


def test_trap_is_said(arch: str):
    body = "v_mov_b32 v1, 0\n v_mov_b32 v2, 1.0\n global_store_dword v1, v2, s[6:7]\n s_trap 2"
    kernel = llvm.Kernel(ir.assembly(arch, body), arch)
    out = torch.zeros(1)
    with pytest.raises(RuntimeError, match="k: stopped in workgroup .0, 0, 0.: s_trap"):
        kernel.launch((1,), (64,), torch.zeros(1), out, schedules=ALL)
    assert out.item() == 0  # what it wrote is undone
    with pytest.raises(RuntimeError, match="s_trap"):
        kernel.launch((1,), (64,), torch.zeros(1), out)
    assert out.item() == 1


def test_other_float_modes_are_refused(arch: str):
    text = ir.assembly(arch, "s_nop 0", extra="  .amdhsa_float_denorm_mode_32 0")
    with pytest.raises(Unsupported, match=r"amdhsa_float_denorm_mode_32 0: only 3 is modelled"):
        llvm.Kernel(text, arch)


def test_user_registers(arch: str):
    """Kernel arguments may come in registers; the workgroup's place follows the user registers."""
    body = """
  v_mov_b32_e32 v2, s2
  v_mov_b32_e32 v3, s12
  v_lshlrev_b32_e32 v1, 2, v0
  global_store_dword v1, v2, s[6:7]
  global_store_dword v1, v3, s[6:7] offset:256"""
    # s[0:1] point to the argument block, s[2:3] hold its first two dwords, s12 the workgroup.
    preload = "  .amdhsa_user_sgpr_kernarg_preload_length 2"
    text = ir.assembly(arch, body, extra=preload, user=12)
    x, out = torch.zeros(64), torch.zeros(128, dtype=torch.int32)
    found = llvm.Kernel(text, arch).launch((1,), (64,), x, out)
    assert found == []
    assert out[0].item() & 0xFFFFFFFF == x.data_ptr() & 0xFFFFFFFF
    assert out[64].item() == 0


def test_bad_launches(arch: str):
    kernel = llvm.Kernel(ir.assembly(arch, "s_nop 0"), arch)
    x = torch.zeros(1)
    with pytest.raises(ValueError, match="1 arguments for 2 parameters"):
        kernel.launch((1,), (64,), x)
    with pytest.raises(ValueError, match="1 to 1024 work-items"):
        kernel.launch((1,), (2048,), x, x)
    with pytest.raises(ValueError, match=r"grid \(0,\): one to three positive numbers"):
        kernel.launch((0,), (64,), x, x)
    with pytest.raises(ValueError, match="takes CPU tensors"):
        kernel.launch((1,), (64,), torch.zeros(1, device="meta"), x)


def test_unmodelled_instructions_are_listed(arch: str):
    x, out = torch.randn(256), torch.zeros(256)
    with triton_driver.active(arch) as driver:
        kernels.add[(1,)](x, x, out, 256, BLOCK=256)
    strange = driver.launches[0].assembly.replace(
        "s_endpgm", "v_msad_u8 v1, v2, v3, v4\n\ts_endpgm"
    )
    with pytest.raises(UnsupportedInstructions, match=rf"on {arch}: 1 kinds.*v_msad_u8"):
        llvm.Kernel(strange, arch)


def test_endless_loop_is_stopped(arch: str, monkeypatch: pytest.MonkeyPatch):
    from gcnemu import program

    monkeypatch.setattr(program, "INSTRUCTION_BUDGET", 10_000)
    text = """
define amdgpu_kernel void @spin(ptr addrspace(1) %x) {
entry:
  br label %loop
loop:
  %v = load volatile i32, ptr addrspace(1) %x
  %c = icmp eq i32 %v, 7
  br i1 %c, label %done, label %loop
done:
  ret void
}
"""
    kernel = llvm.Kernel.from_ir(text, arch)
    with pytest.raises(RuntimeError, match="spin: stopped in workgroup .* no end"):
        kernel.launch((1,), (64,), torch.zeros(1, dtype=torch.int32))


def test_compile_only(arch: str):
    """Without execution, launches are compiled and recorded, and memory is left alone."""
    x, out = torch.randn(256), torch.full((256,), 3.0)
    with triton_driver.active(arch, execute=False) as driver:
        kernels.add[(1,)](x, x, out, 256, BLOCK=256)
    assert not driver.launches[0].ran
    assert driver.launches[0].binary[:4] == b"\x7fELF"
    assert (out == 3).all()
