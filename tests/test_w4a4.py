"""The NVFP4 W4A4 pipeline against its definition, and the contract of activation scales."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_backend.formats import nvfp4
from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.verify.metrics import difference
from moe_backend.verify.naive import Nvfp4Quantiser, naive_experts
from moe_backend.verify.problems import ACTIVATIONS
from moe_backend.verify.w4a4 import (
    CASE,
    activation_scales,
    calibrate,
    quantised_problem,
    w4a4_experts,
)

CASES = [
    CASE,
    *(replace(CASE, activation=a) for a in ACTIVATIONS),
    replace(CASE, layout="ep"),
    replace(CASE, layout="dropped", tokens=200, num_experts=4),  # over 128 slots an expert
    replace(CASE, tokens=1),
    replace(CASE, num_experts=8, top_k=8, hidden_size=128, intermediate_size=64),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_pipeline_equals_float64(case):
    p = quantised_problem(case)
    out = w4a4_experts(p, activation_scales(p))
    assert difference(out, p.reference).within(1e-6, norm=1e-6)


def test_reference_is_the_experts_with_quantised_activations():
    p = quantised_problem()
    exact = naive_experts(
        p.x, p.weights, p.topk_weights, p.topk_ids, p.case.activation, p.expert_map
    )
    found = difference(p.reference, exact)
    assert 0.05 < found.rel_l2 < 0.35  # two quantisations to 4 bits
    assert abs(found.norm_ratio - 1) < 0.05


def test_quantiser_equals_the_definition():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.exp2(torch.arange(64) % 24 - 20)[:, None]
    x[5] = 0
    for scale in (nvfp4.global_scale_of(x.abs().amax()), torch.tensor(1e-4), torch.tensor(1e3)):
        packed, blocks = nvfp4.quantize(x, scale)
        expected = torch.stack([Nvfp4Quantiser(scale.item())(row.double()) for row in x])
        got = nvfp4.dequantize(packed, blocks, None).double() * scale.double()
        assert torch.equal(got, expected)


# --- Activation scales ----------------------------------------------------------------------------


def snr(out, exact):
    return -20 * torch.log10((out - exact).norm() / exact.norm()).item()


def heavy_tailed(tokens=64, k=1024):
    """Like the input of an expert: normalised, with outlier channels of up to 2**6."""
    g = torch.Generator().manual_seed(0)
    channel = torch.exp2(torch.randn(k, generator=g) * 1.5)
    return torch.randn(tokens, k, generator=g) * channel.clamp(max=64)


def quality(scale, x):
    rows = scale.quantize(x)
    return snr(nvfp4.dequantize(rows.packed, rows.scale, rows.global_scale), x)


def test_any_scale_in_the_range_is_as_good():
    x = heavy_tailed()
    dynamic = nvfp4.global_scale_of(x.abs().amax()).reshape(1)
    best = quality(ActivationScale(), x)
    assert best > 19
    for factor in (1, 4, 16, 64, 256):
        assert quality(ActivationScale(dynamic * factor), x) > best - 0.1
    assert quality(ActivationScale(per_token=True), x) > best - 0.1
    assert quality(ActivationScale(dynamic / 13), x) < best - 8


def test_static_scale_has_headroom():
    """A checkpoint calibrated on a quarter of the largest activation still does not saturate."""
    x = heavy_tailed()
    calibrated = nvfp4.global_scale_of(x.abs().amax() / 4).reshape(1)
    scale = ActivationScale.from_checkpoint(calibrated)
    assert quality(scale, x) > quality(ActivationScale(), x) - 0.1
    without = ActivationScale.from_checkpoint(calibrated, headroom=1)
    assert quality(without, x) < quality(scale, x) - 5


def test_quantiser_and_epilogue_share_one_scale():
    x = heavy_tailed(8)
    weight = torch.tensor([0.5, 3.0])
    for scale in (ActivationScale(), ActivationScale(torch.tensor([0.25]))):
        rows = scale.quantize(x)
        assert torch.equal(rows.factor(weight), scale.resolve(x) * weight)
    rows = ActivationScale(per_token=True).quantize(x)
    assert rows.global_scale.shape == (8, 1)
    assert rows.factor(weight).shape == (8, 2)


def test_experts_are_reduced_with_max():
    scales = torch.tensor([[0.0625, 0.125], [0.25, 0.03125]])
    assert ActivationScale.from_checkpoint(scales, headroom=2).static.tolist() == [0.5]


def test_headroom_ends_at_one():
    """modelopt recipes that pin `input_scale` to 1 have 2688 already."""
    for scale, expected in ((0.5, 1.0), (1.0, 1.0), (3.0, 3.0)):
        assert ActivationScale.from_checkpoint(torch.tensor([scale])).static.tolist() == [expected]


def test_without_activation_scales_it_is_dynamic():
    scale = ActivationScale.from_checkpoint(None)
    assert scale == ActivationScale()
    assert scale.resolve(torch.zeros(0, 16)).tolist() == [1.0]
    assert scale.resolve(torch.zeros(3, 16)).tolist() == [1.0]


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_scales_are_refused(bad):
    with pytest.raises(ValueError, match=r"w13 input scale: 1 of 3 scales are not finite and pos"):
        ActivationScale.from_checkpoint(torch.tensor([1.0, bad, 2.0]), name="w13 input")


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="headroom 0.5"):
        ActivationScale.from_checkpoint(torch.ones(1), headroom=0.5)
    with pytest.raises(ValueError, match="per_token"):
        ActivationScale(torch.ones(1), per_token=True)


def test_calibration_differs_between_experts():
    """Otherwise the control that takes their mean could not fail."""
    w13, w2 = calibrate(quantised_problem())
    assert w13.max() > 4 * w13.mean()
    assert w2.max() > 2 * w2.mean()
