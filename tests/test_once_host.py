"""The one-launch layer for few tokens (once.cu), run on the host against a reference in torch."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from once_cases import BF16, CLAMPED_SILU, FP8, NVFP4, SILU, SWIGLUOAI, SWIGLUSTEP, Case, Layer

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

STEP = Layer(FP8, 256, 256, SWIGLUSTEP)
SHARD = Layer(FP8, 256, 160, SWIGLUSTEP, n13=32, k2=32)
V4 = Layer(NVFP4, 768, 768, CLAMPED_SILU, top_k=4, blocks=6, chunk=128)
# The last of its blocks has no rows of the output.
M3 = Layer(BF16, 352, 160, SWIGLUOAI, num_ids=5, blocks=12, producers=1, consumers=4, chunk=256)
LAYERS = {
    "fp8": STEP,
    "fp8, chunks and slices": Layer(FP8, 384, 640, SILU, chunk=256),
    "fp8, shard": SHARD,
    "fp8, shard in slices": replace(SHARD, i=320, chunk=128),
    "fp8, equal parts": replace(STEP, consumers=2),
    "fp8, half a granule": replace(STEP, i=192, n2=64, wide_ids=True),
    "fp8, 16 tokens": replace(STEP, token_blocks=2),
    "bf16, 32 tokens": Layer(BF16, 160, 160, SWIGLUOAI, experts=36, num_ids=40, token_blocks=4),
    "nvfp4": V4,
    "bf16": M3,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    layer = LAYERS[name]
    for seed, tokens in enumerate((1, 8 * layer.token_blocks - 1, 8 * layer.token_blocks)):
        case = Case(layer, tokens, seed)
        case.ids[-1, -1] = (-1, layer.num_ids, 1 << 30)[seed]
        case.check(case.run(seed))


@pytest.mark.parametrize("layer", [STEP, V4, M3], ids=["fp8", "nvfp4", "bf16"])
def test_repeats_bit_for_bit(layer: Layer) -> None:
    case = Case(layer, 8)
    first = case.run(0)
    assert all(torch.equal(first, case.run(seed)) for seed in (1, 2))


@pytest.mark.parametrize("hits", [31, 32, 33, 64, 65, 70])
def test_a_counter_for_one_hit_or_for_several(hits: int) -> None:
    case = Case(Layer(FP8, 128, 256, SWIGLUSTEP, experts=70, num_ids=70, top_k=9), 8)
    case.ids = (torch.arange(72) % hits).view(8, 9)
    case.check(case.run(hits))


@pytest.mark.parametrize("resident", [1, 2])
def test_few_blocks_run_at_a_time(resident: int) -> None:
    case = Case(STEP, 8)
    assert torch.equal(case.run(), case.run(resident=resident))


def test_tokens_do_not_mix() -> None:
    case = Case(STEP, 4)
    before = case.run()
    case.x[1, 3] = float("nan")
    case.ids[2] = -1
    after = case.run()
    assert torch.equal(before[[0, 3]], after[[0, 3]])
    assert not after[2].any()


def test_no_expert_is_here() -> None:
    case = Case(STEP, 3)
    case.ids[:] = -1
    assert not case.run().any()


def test_an_expert_named_twice() -> None:
    case = Case(V4, 5)
    case.ids[:, 1] = case.ids[:, 0]
    case.check(case.run())


def test_weight_on_input() -> None:
    case = Case(replace(STEP, top_k=1, weight_on_input=True), 8)
    case.check(case.run())


def test_a_wrong_activation_is_seen() -> None:
    case = Case(STEP, 8)
    out = case.run()
    case.layer = replace(STEP, activation=SILU)
    with pytest.raises(AssertionError):
        case.check(out)
