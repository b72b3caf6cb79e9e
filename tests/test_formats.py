"""Encode and decode of every format, against definitions written from the bits."""

from __future__ import annotations

import math

import pytest
import torch

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, fp8_block, nvfp4, weights_from_tensors
from moe_backend.verify.naive import e2m1_value, e4m3fn_value, e4m3fnuz_value
from moe_backend.verify.problems import ACTIVATIONS, Case, build

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, NaN equal to NaN, zeros equal whatever their sign."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# --- E4M3 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float8_e4m3fn, e4m3fn_value), (torch.float8_e4m3fnuz, e4m3fnuz_value)],
    ids=["fn", "fnuz"],
)
def test_decode_of_all_256_bytes(dtype, value):
    expected = torch.tensor([value(b) for b in range(256)])
    assert same(fp8_block.decode(ALL_BYTES.view(dtype)), expected)


def test_fast_decode_of_all_finite_bytes():
    """Without a NaN among the codes the CPU takes the shifting path; signs of zero included."""
    finite = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]
    expected = torch.tensor([e4m3fn_value(int(b)) for b in finite])
    values = fp8_block.decode(finite.view(torch.float8_e4m3fn))
    assert torch.equal(values, expected)
    assert torch.equal(values.signbit(), expected.signbit())


def test_fast_decode_survives_flush_to_zero():
    codes = torch.arange(8, dtype=torch.uint8).view(torch.float8_e4m3fn)  # subnormals
    assert torch.set_flush_denormal(True)
    try:
        assert fp8_block.decode(codes).tolist() == [i * 2.0**-9 for i in range(8)]
    finally:
        torch.set_flush_denormal(False)


# --- FP8 blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(128, 128), (64, 64), (32, 32), (128, 64), (1, 128), (7, 5)])
@pytest.mark.parametrize("shape", [(256, 384), (160, 96), (1, 1), (3, 200)])
def test_blocks_round_trip(block, shape):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(2, *shape, generator=g) * torch.exp2(torch.randint(-8, 8, shape, generator=g))
    codes, scale = fp8_block.quantize_blocks(w, block)
    bn, bk = block
    assert scale.shape == (2, -(-shape[0] // bn), -(-shape[1] // bk))
    decoded = fp8_block.dequantize_blocks(codes, scale, block)
    for n in range(shape[0]):  # the definition, one element at a time along a diagonal
        k = n % shape[1]
        byte = int(codes.view(torch.uint8)[1, n, k])
        assert decoded[1, n, k].item() == pytest.approx(
            e4m3fn_value(byte) * scale[1, n // bn, k // bk].item(), rel=1e-6
        )
    # Half a step of three mantissa bits, or of the smallest subnormal next to a large block.
    limit = torch.maximum(w.abs() * 2**-4, fp8_block.spread_scale(scale, *shape, block) * 2**-10)
    assert ((decoded - w).abs() <= limit * 1.001).all()


def test_blocks_of_zeros_have_scale_one():
    codes, scale = fp8_block.quantize_blocks(torch.zeros(128, 256))
    assert scale.tolist() == [[1.0, 1.0]]
    assert (codes.float() == 0).all()


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 63, 129])
@pytest.mark.parametrize("k", [1, 96, 128, 160, 320, 1000])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz])
def test_group_quantisation_of_any_shape(rows, k, dtype):
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    codes, scale = fp8_block.quantize_per_group(x, 128, dtype)
    assert codes.shape == x.shape
    assert codes.dtype == dtype
    assert scale.shape == (rows, -(-k // 128))
    back = fp8_block.dequantize_per_group(codes, scale)
    for row in range(rows):
        for group in range(scale.shape[1]):
            part = slice(group * 128, (group + 1) * 128)
            amax = x[row, part].float().abs().max()
            error = (back[row, part] - x[row, part].float()).abs().max()
            assert error <= amax * 2**-4


# --- NVFP4 ----------------------------------------------------------------------------------------


def test_e2m1_rounds_to_nearest_even():
    for code in range(16):
        assert nvfp4.encode_e2m1(torch.tensor([e2m1_value(code)])).item() == code
    for low, high in zip(range(7), range(1, 8), strict=True):
        middle = (e2m1_value(low) + e2m1_value(high)) / 2
        even = low if low % 2 == 0 else high
        assert nvfp4.encode_e2m1(torch.tensor([middle])).item() == even
        assert nvfp4.encode_e2m1(torch.tensor([math.nextafter(middle, 0) * 0.999])).item() == low
        assert nvfp4.encode_e2m1(torch.tensor([middle * 1.001])).item() == high
    assert nvfp4.encode_e2m1(torch.tensor([100.0, -100.0])).tolist() == [7, 15]


def test_even_column_is_in_the_low_nibble():
    codes = torch.arange(16, dtype=torch.uint8)
    assert nvfp4.pack(codes).tolist() == [codes[2 * i] + 16 * codes[2 * i + 1] for i in range(8)]
    assert torch.equal(nvfp4.unpack(nvfp4.pack(codes)), codes)


def test_nvfp4_decode_of_all_bytes_and_scales():
    """Every byte with every finite scale, exactly, in bf16 and in fp32."""
    finite = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]
    packed = ALL_BYTES.view(1, 32, 8).expand(len(finite), -1, -1).contiguous()
    scale = finite.view(torch.float8_e4m3fn)[:, None, None].expand(-1, 32, 1).contiguous()
    low_high = torch.tensor(
        [[e2m1_value(b & 15), e2m1_value(b >> 4)] for b in range(256)], dtype=torch.float64
    )
    scales = torch.tensor([e4m3fn_value(int(b)) for b in finite], dtype=torch.float64)
    expected = (low_high.view(1, 32, 16) * scales[:, None, None]).flatten(1)
    for dtype in (torch.bfloat16, torch.float32):
        decoded = nvfp4.dequantize(packed, scale, None, dtype)
        assert torch.equal(decoded.double().flatten(1), expected)
    # Nothing is kept on the device, where it may be discarded while an engine sleeps.
    nvfp4.dequantize(packed.to("meta"), scale.to("meta"), None)
    assert {table().device.type for table in (nvfp4._pair_table, nvfp4._scale_table)} == {"cpu"}
    decoded = nvfp4.dequantize(packed, scale, torch.tensor(0.25))
    assert torch.equal(decoded.double().flatten(1), expected / 4)


def test_nvfp4_round_trip_error():
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    g = nvfp4.global_scale_of(w.abs().amax())
    packed, scale = nvfp4.quantize(w, g)
    error = (nvfp4.dequantize(packed, scale, g) - w).norm() / w.norm()
    assert 0.05 < error < 0.11  # 20 to 21 dB on Gaussian data


def test_nvfp4_scales_are_never_zero():
    x = torch.zeros(2, 32)
    x[1] = 1e-30
    packed, scale = nvfp4.quantize(x, torch.tensor(1.0))
    assert scale.float().tolist() == [[1.0, 1.0], [2.0**-9, 2.0**-9]]
    assert (packed & 0x77 == 0).all()


def test_nvfp4_keeps_a_nan_in_its_block():
    x = torch.ones(2, 32)
    x[0, 5] = torch.nan
    packed, scale = nvfp4.quantize(x, torch.tensor(0.5))
    values = nvfp4.dequantize(packed, scale, torch.tensor(0.5))
    assert values[0, :16].isnan().all()
    assert values[0, 16:].isfinite().all()
    assert values[1].isfinite().all()


def test_nvfp4_needs_groups_of_16():
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.quantize(torch.ones(2, 24), torch.tensor(1.0))


def test_mxfp4_cast_is_detected():
    scale = torch.tensor([[2.0, 2.0, 2.0**-9, 2.0**-9]]).to(torch.float8_e4m3fn)
    assert nvfp4.is_mxfp4_cast(scale, torch.tensor(0.25))
    assert not nvfp4.is_mxfp4_cast(scale, torch.tensor(0.3))
    assert not nvfp4.is_mxfp4_cast(
        scale.view(torch.uint8).add(1).view(scale.dtype), torch.tensor(1.0)
    )
    assert not nvfp4.is_mxfp4_cast(scale[:, [0, 2, 1, 3]], torch.tensor(0.25))


def test_encoder_agrees_with_compressed_tensors():
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.nvfp4.helpers",
        reason="compressed-tensors is not installed",
    )
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8)
    values = torch.tensor([e2m1_value(int(c)) for c in codes.flatten()]).view(4, 64)
    assert torch.equal(helpers.pack_fp4_to_uint8(values), nvfp4.pack(codes))


# --- Canonical forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "fp8_block", "nvfp4"])
def test_tensors_round_trip(name):
    weights = build(Case(name, ACTIVATIONS[0])).weights
    weights.validate()
    again = weights_from_tensors(name, weights.tensors(), (128, 128), (128, 128))
    assert type(again) is type(weights)
    for a, b in zip(again.tensors(), weights.tensors(), strict=True):
        assert a is b


def test_fp8_gate_and_up_have_their_own_scale_rows():
    """Intermediate size 192 in blocks of 128: two scale rows for gate, two for up."""
    weights = build(Case("fp8_block", ACTIVATIONS[0])).weights
    assert isinstance(weights, Fp8BlockWeights)
    assert weights.w13_scale.shape[1] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w13": torch.zeros(2, 64, 32)}, "w2_weight: dtype bfloat16 found, float32 accepted"),
        ({"w2": torch.zeros(2, 33, 32, dtype=torch.bfloat16)}, r"w2_weight: shape \(2, 33, 32\)"),
        ({"w13": torch.zeros(2, 64, 32).int()}, "w13_weight: dtype int32 found"),
    ],
)
def test_bf16_validation(change, message):
    good = {
        "w13": torch.zeros(2, 64, 32, dtype=torch.bfloat16),
        "w2": torch.zeros(2, 32, 32, dtype=torch.bfloat16),
    }
    Bf16Weights(**good).validate()
    with pytest.raises(ValueError, match=message):
        Bf16Weights(**{**good, **change}).validate()
