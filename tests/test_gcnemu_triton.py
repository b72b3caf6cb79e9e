"""Whole Triton kernels, compiled for both AMD targets and emulated, against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from gcnemu import build

try:
    build.compiler()
except build.NoCompiler as missing:
    pytest.skip(str(missing), allow_module_level=True)

import gcnemu_kernels as kernels
from gcnemu import triton_driver
from gcnemu.program import ALL
from gcnemu_numbers import decode

ARCHS = ("gfx942", "gfx950")
FP4 = torch.tensor([decode(code, "fp4") for code in range(16)])


def clean(driver: triton_driver.EmulatorDriver) -> None:
    """Every launch ran, in every order of waves, without a finding."""
    assert driver.launches
    for launch in driver.launches:
        assert launch.ran
        assert [str(f) for f in launch.found] == []


@pytest.mark.parametrize("arch", ARCHS)
def test_vector_add(arch: str):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.full((1024,), 7.0)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.add[(4,)](x, y, out, 1000, BLOCK=256)
    clean(driver)
    assert torch.equal(out[:1000], x + y)
    assert (out[1000:] == 7).all()


@pytest.mark.parametrize("arch", ARCHS)
def test_softmax(arch: str):
    x = torch.randn(5, 1000) * 10
    out = torch.empty_like(x)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.softmax[(5,)](x, out, 1000, BLOCK=1024)
    clean(driver)
    torch.testing.assert_close(out, x.softmax(-1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("arch", ARCHS)
def test_atomics(arch: str):
    x = torch.randint(0, 50, (3000,), dtype=torch.int32)
    out = torch.zeros(50, dtype=torch.int32)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.count[(12,)](x, out, 3000, BLOCK=256)
    clean(driver)
    assert torch.equal(out, torch.bincount(x, minlength=50).int())


@pytest.mark.parametrize("arch", ARCHS)
def test_scans(arch: str):
    x = torch.randn(512)
    sums, ordered = torch.empty(512), torch.empty(512)
    places = torch.empty(2, dtype=torch.int32)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.scans[(1,)](x, sums, ordered, places, BLOCK=512)
    clean(driver)
    torch.testing.assert_close(sums, x.cumsum(0), rtol=1e-5, atol=1e-4)
    assert torch.equal(ordered, x.sort().values)
    assert places.tolist() == [x.argmax().item(), x.argmin().item()]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64])
def test_integers(arch: str, dtype: torch.dtype):
    limit = 100 if dtype == torch.int8 else 3000
    x = torch.randint(-limit, limit, (256,)).to(dtype)
    y = torch.randint(1, 50, (256,)).to(dtype)
    out = torch.empty(5, 256, dtype=dtype)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.integers[(1,)](x, y, out, BLOCK=256)
    clean(driver)
    quotient = torch.div(x, y, rounding_mode="trunc")
    expected = [quotient, torch.fmod(x, y), x * y, (x >> 3) ^ (y << 2), torch.maximum(x, y)]
    assert torch.equal(out, torch.stack(expected))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_division(arch: str, dtype: torch.dtype):
    x, y = torch.randn(512).to(dtype), torch.randn(512).to(dtype)
    out = torch.empty(512, dtype=dtype)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.divide[(1,)](x, y, out, BLOCK=512)
    clean(driver)
    torch.testing.assert_close(out, x / y)


SMALL = [
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", SMALL)
def test_conversions(arch: str, dtype: torch.dtype):
    """There and back, by an instruction where the target has one, by the compiler's code else."""
    x = torch.cat(
        [
            torch.randn(500) * 4,
            torch.tensor([0.0, -0.0, 1e-4, -1e-4, 2e-3, 3e-3, 100, -200] + [1.0] * 4),
        ]
    )
    small, back = torch.empty(512, dtype=dtype), torch.empty(512)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.convert[(1,)](x, small, BLOCK=512)
        kernels.convert[(1,)](small, back, BLOCK=512)
    clean(driver)
    expected = x.to(dtype)
    assert torch.equal(small.float(), expected.float())
    assert torch.equal(back, expected.float())


DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "fp8_fnuz": torch.float8_e4m3fnuz,
    "bf8": torch.float8_e5m2,
}
GEMMS = [
    ("gfx942", "bf16", 16), ("gfx942", "bf16", 32), ("gfx942", "fp16", 16), ("gfx942", "fp8", 16),
    ("gfx942", "fp8_fnuz", 16), ("gfx942", "fp8_fnuz", 32),
    ("gfx950", "bf16", 16), ("gfx950", "bf16", 32), ("gfx950", "fp16", 32), ("gfx950", "fp8", 16),
    ("gfx950", "fp8", 32), ("gfx950", "bf8", 16),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "dtype", "size"), GEMMS)
def test_matmul(arch: str, dtype: str, size: int):
    """`size` picks the matrix instruction, 16x16 or 32x32; the tiles hang over the edges."""
    torch.manual_seed(size)
    m, n, k = 100, 120, 384
    a, b = torch.randn(m, k).to(DTYPES[dtype]), torch.randn(n, k).to(DTYPES[dtype])
    c = torch.full((m, n + 8), -7.0)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.matmul[(2, 2)](
            a, b, c, m, n, k, k, k, n + 8, BM=64, BN=64, BK=128, matrix_instr_nonkdim=size
        )
    clean(driver)
    torch.testing.assert_close(c[:, :n], a.float() @ b.float().T, rtol=2e-5, atol=1e-4)
    assert (c[:, n:] == -7).all()


@pytest.mark.parametrize(
    ("arch", "dtype", "size", "instruction"),
    [
        ("gfx942", "bf16", 16, "ds_read"),
        ("gfx942", "fp8_fnuz", 32, "ds_read"),
        ("gfx950", "bf16", 16, "ds_read_b64_tr_b16"),
        ("gfx950", "bf16", 32, "ds_read_b64_tr_b16"),
        ("gfx950", "fp8", 16, "ds_read_b64_tr_b8"),
        ("gfx950", "fp8", 32, "ds_read_b64_tr_b8"),
    ],
)
def test_transposed_operand(arch: str, dtype: str, size: int, instruction: str):
    """b is stored k first: gfx950 turns it around with the transposing LDS reads."""
    torch.manual_seed(size)
    a, b = torch.randn(64, 256).to(DTYPES[dtype]), torch.randn(256, 128).to(DTYPES[dtype])
    c = torch.empty(64, 128)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.matmul_nn[(1, 2)](
            a, b, c, 256, 256, 128, 128, BM=64, BN=64, BK=128, matrix_instr_nonkdim=size
        )
    clean(driver)
    assert instruction in driver.launches[0].assembly
    torch.testing.assert_close(c, a.float() @ b.float(), rtol=2e-5, atol=1e-4)


def scaled_operand(kind: str, rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Packed codes [rows, k / pack], their values, and the pack."""
    if kind == "e2m1":
        codes = torch.randint(0, 16, (rows, k), dtype=torch.uint8)
        return codes[:, ::2] | codes[:, 1::2] << 4, FP4[codes.long()].float(), 2
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]
    values = torch.randn(rows, k).to(dtype)
    return values.view(torch.uint8), values.float(), 1


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("a_format", "b_format"),
    [("e4m3", "e4m3"), ("e2m1", "e2m1"), ("e4m3", "e2m1"), ("e5m2", "e4m3")],
)
@pytest.mark.parametrize("size", [16, 32])
def test_dot_scaled(arch: str, a_format: str, b_format: str, size: int):
    """Random E8M0 scales. gfx950 has the instruction; gfx942 multiplies upcast values."""
    torch.manual_seed(1)
    m, n, k = 32, 32, 256
    a, a_values, a_pack = scaled_operand(a_format, m, k)
    b, b_values, b_pack = scaled_operand(b_format, n, k)
    scales = [torch.randint(120, 135, (rows, k // 32), dtype=torch.uint8) for rows in (m, n)]
    if b_pack == 2:  # k runs along the first axis, two codes to a byte
        b = b.T.contiguous()
    else:
        b = b.T.contiguous()
    c = torch.empty(m, n)
    with triton_driver.active(arch, schedules=ALL) as driver:
        kernels.scaled_matmul[(1,)](
            a, scales[0], b, scales[1], c, m, n, k, a_format, b_format, a_pack, b_pack,
            matrix_instr_nonkdim=size,
        )  # fmt: skip
    clean(driver)
    wide = [(2.0 ** (s.double() - 127)).repeat_interleave(32, 1) for s in scales]
    expected = (a_values.double() * wide[0]) @ (b_values.double() * wide[1]).T
    torch.testing.assert_close(
        c.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )
    if arch == "gfx950":
        assert "v_mfma_scale_f32" in driver.launches[0].assembly
