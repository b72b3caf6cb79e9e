"""NVFP4 folded into FP8 blocks: values, cost, the lossless case, memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_backend.formats import Nvfp4Weights, fp8_block, nvfp4
from moe_backend.formats.folding import fold, folded_bytes
from moe_backend.verify.problems import ACTIVATIONS, Case, build
from moe_backend.verify.w4a4 import CASE

SIZES = [
    Case("nvfp4", ACTIVATIONS[0]),
    Case("nvfp4", ACTIVATIONS[0], hidden_size=176, intermediate_size=160),
    CASE,
]


def difference_db(weights, folded):
    """SNR over all experts, decoded by each format's own definition."""
    error = power = 0.0
    for e in range(weights.num_experts):
        for a, b in zip(
            weights.expert(e, torch.float64), folded.expert(e, torch.float64), strict=True
        ):
            error += (a - b).square().sum().item()
            power += a.square().sum().item()
    return math.inf if error == 0 else 10 * math.log10(power / error)


@pytest.mark.parametrize("case", SIZES, ids=lambda c: c.name)
def test_folded_values_and_their_cost(case):
    weights = build(case).weights
    folded, cost = fold(weights)
    folded.validate()
    assert (folded.w13_block, folded.w2_block) == ((128, 128), (128, 128))
    assert (folded.num_experts, folded.hidden_size, folded.intermediate_size) == (
        weights.num_experts,
        weights.hidden_size,
        weights.intermediate_size,
    )
    found = difference_db(weights, folded)
    assert found > 29
    assert cost.snr_db == pytest.approx(found, abs=0.01)
    assert cost.matrices == 3 * weights.num_experts
    assert "dB" in str(cost)


def test_gate_and_up_keep_their_own_scale():
    """With 128 times the global scale on up, only up changes."""
    weights = build(SIZES[0]).weights
    other = replace(weights, w13_global_scale=weights.w13_global_scale * torch.tensor([1.0, 128.0]))
    i = weights.intermediate_size
    before, after = (
        fold(weights)[0].expert(0, torch.float32),
        fold(other)[0].expert(0, torch.float32),
    )
    assert torch.equal(before[0][:i], after[0][:i])
    assert torch.allclose(before[0][i:] * 128, after[0][i:])


def mxfp4_cast(spread=8, experts=2, h=256, i=128):
    """Random MXFP4 weights in NVFP4's clothes: scales are powers of two, equal in pairs."""
    g = torch.Generator().manual_seed(0)

    def matrix(*shape):
        codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=g)
        groups = (*shape[:-1], shape[-1] // 32)
        exponent = torch.randint(-spread // 2, spread // 2 + 1, groups, generator=g)
        scale = torch.exp2(exponent.float()).repeat_interleave(2, -1).to(torch.float8_e4m3fn)
        return codes, scale

    return Nvfp4Weights(
        *matrix(experts, 2 * i, h),
        torch.exp2(torch.tensor([[-7.0, -3.0]]).expand(experts, -1)).contiguous(),
        *matrix(experts, h, i),
        torch.full((experts, 1), 2.0**-9),
    )


def test_mxfp4_in_disguise_is_folded_without_loss():
    weights = mxfp4_cast()
    folded, cost = fold(weights)
    assert difference_db(weights, folded) == math.inf
    assert cost.snr_db == math.inf
    assert cost.exact == cost.matrices == 6
    assert nvfp4.is_mxfp4_cast(weights.w13_scale, weights.w13_global_scale)
    assert str(cost) == "lossless"
    mantissa, _ = torch.frexp(folded.w13_scale)
    assert (mantissa == 0.5).all()


def test_an_mxfp4_block_too_wide_for_e4m3_is_not_called_lossless():
    """Scales from 2**-9 to 2**8 in one block: with codes, 20 octaves."""
    weights = mxfp4_cast(spread=16)
    folded, cost = fold(weights)
    assert cost.exact < 6
    assert cost.snr_db > 60
    assert cost.snr_db == pytest.approx(difference_db(weights, folded), abs=0.1)
    assert "lossless" not in str(cost)


def test_fitting_scales_alone_would_lose():
    """A scale of amax / 448 for an MXFP4 tensor would lose: 31 dB instead of nothing."""
    weights = mxfp4_cast()
    values = weights.expert(0, torch.float32)[1]
    codes, scale = fp8_block.quantize_blocks(values)
    back = fp8_block.dequantize_blocks(codes, scale, (128, 128))
    assert not torch.equal(back, values)


def test_integers_are_folded_without_loss():
    weights = build(replace(SIZES[0], integer=True)).weights
    assert difference_db(weights, fold(weights)[0]) == math.inf


def test_zero_blocks_and_tiny_values():
    weights = build(SIZES[0]).weights
    w2 = weights.w2.clone()
    w2[0] = 0
    tiny = replace(weights, w2=w2, w2_global_scale=torch.full_like(weights.w2_global_scale, 1e-38))
    folded, cost = fold(tiny)
    folded.validate()
    assert not folded.expert(0, torch.float32)[1].any()
    assert cost.exact >= 1


def test_torch_default_dtype_does_not_matter():
    """vLLM sets it to bf16 while it loads."""
    weights = build(SIZES[0]).weights
    expected, _ = fold(weights)
    torch.set_default_dtype(torch.bfloat16)
    try:
        folded, _ = fold(weights)
    finally:
        torch.set_default_dtype(torch.float32)
    folded.validate()
    assert torch.equal(folded.w13_scale, expected.w13_scale)
    assert torch.equal(folded.w2.view(torch.uint8), expected.w2.view(torch.uint8))


def test_bytes_of_both_forms():
    weights = build(SIZES[1]).weights
    packed = sum(t.numel() for t in (weights.w13, weights.w13_scale, weights.w2, weights.w2_scale))
    folded = sum(t.numel() * t.element_size() for t in fold(weights)[0].tensors())
    e, h, i = weights.num_experts, weights.hidden_size, weights.intermediate_size
    assert folded_bytes(e, h, i) == (packed, folded)
    large = folded_bytes(288, 4096, 1280)
    assert large[1] / large[0] == pytest.approx(1.78, abs=0.01)


def test_one_matrix_at_a_time(monkeypatch):
    """What is decoded at once bounds the memory that folding takes beside the two forms."""
    decoded = []
    original = nvfp4.dequantize

    def dequantize(packed, *rest):
        decoded.append(packed.numel())
        return original(packed, *rest)

    monkeypatch.setattr(nvfp4, "dequantize", dequantize)
    weights = build(SIZES[0]).weights
    fold(weights)
    assert len(decoded) == 3 * weights.num_experts
    assert max(decoded) <= max(weights.w13[0].numel() // 2, weights.w2[0].numel())
