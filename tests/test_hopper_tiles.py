"""The table of tiles for the Hopper kernels, and the check that no tile mixes scales."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.cuda import build as cuda_build
from moe_backend.kernels.hopper import methods
from moe_backend.kernels.hopper.kernel import HopperKernel, shape_refusal
from moe_backend.kernels.hopper.tiled import check_tiles
from moe_backend.kernels.hopper.tiles import (
    FEW_TOKENS_NARROW,
    PAIRS_STAGES,
    Flow,
    Once,
    Pairs,
    Tile,
    choose,
    few,
    tiles,
)
from moe_backend.kernels.registry import Selection
from moe_backend.verify.problems import ACTIVATIONS as KINDS
from moe_backend.verify.problems import Case, build

TOKENS = (1, 3, 8, 64, 256, 1024, 4096, 2**17)
GRID = (128, 128)
BLOCKS = [((n, k), (m, j)) for n, k, m, j in itertools.product((32, 64, 128), repeat=4)]


def layer(name, intermediate, blocks=(None, None), experts=(288, 36)):
    base = build(Case(name, KINDS[0])).layer
    return replace(
        base, intermediate_size=intermediate, hidden_size=4096, top_k=8, num_experts=experts[0],
        num_local_experts=experts[1], w13_block=blocks[0], w2_block=blocks[1],
    )  # fmt: skip


@pytest.mark.parametrize("missing", [None, "no compiler"], ids=["cuda", "without"])
@pytest.mark.parametrize("intermediate", [96, 160, 192, 256, 320, 384, 1280, 2048])
def test_every_choice_is_sound(intermediate, missing, monkeypatch):
    monkeypatch.setattr(cuda_build, "missing", lambda: missing)
    layers = [layer("bf16", intermediate), layer("nvfp4", intermediate)]
    layers += [layer("fp8_block", intermediate, blocks) for blocks in BLOCKS]
    for one, tokens in itertools.product(layers, TOKENS):
        assert shape_refusal(one) is None
        made = tiles(one, tokens)
        check_tiles(one, made.gate_up, made.down)
        chosen = choose(one, tokens)
        if chosen not in (made, few(one, tokens)):
            methods.check(one, tokens, chosen)
        assert missing is None or not isinstance(chosen, Once | Flow | Pairs)


@pytest.mark.parametrize(
    ("name", "intermediate", "lanes", "unroll"),
    [
        ("fp8_block", 160, 16, 4), ("fp8_block", 256, 16, 4), ("fp8_block", 320, 32, 4),
        ("fp8_block", 512, 32, 4), ("fp8_block", 1280, 16, 5), ("fp8_block", 1536, 16, 6),
        ("fp8_block", 2048, 16, 4), ("bf16", 1536, 16, 6),
    ],
)  # fmt: skip
def test_reads_of_a_row_by_few_are_dealt_out_evenly(name, intermediate, lanes, unroll):
    """As they were the fastest on an H200 with FP8, but for 512 columns, which were not timed."""
    down = few(layer(name, intermediate, (GRID, GRID)), 1).down
    assert (down.lanes, down.unroll) == (lanes, unroll)


PAIRS = layer("fp8_block", 1280, (GRID, GRID))
CODES = layer("nvfp4", 1280)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (layer("bf16", 1284), "sizes in eights"),
        (replace(CODES, hidden_size=4224), "a hidden size that is a multiple of 256"),
        (replace(CODES, intermediate_size=1312), "an intermediate size that is a multiple of 64"),
        (replace(CODES, num_experts=2700, num_local_experts=2700), "room for two steps of codes"),
        (replace(PAIRS, hidden_size=4104), "sizes in 16s"),
        (replace(PAIRS, intermediate_size=1288), "sizes in 16s"),
        (replace(PAIRS, w13_block=(96, 128)), "w13"),
        (replace(PAIRS, w2_block=(192, 128)), "w2"),
        (replace(PAIRS, w2_block=(128, 16)), "columns"),
        (replace(PAIRS, num_experts=600, num_local_experts=600, top_k=513), "512 slots"),
    ],
    ids=str,
)
def test_pairs_refuse_what_they_are_not_written_for(refused, said, monkeypatch):
    monkeypatch.setattr(cuda_build, "missing", lambda: None)
    for one, stages in ((PAIRS, 4), (CODES, 4), (layer("bf16", 1288), 3)):
        methods.check(one, 4096, Pairs(stages))
        with pytest.raises(ValueError, match="stages"):
            methods.check(one, 4096, Pairs(stages + 1))
    with pytest.raises(ValueError, match=said):
        methods.check(refused, 4096, Pairs(PAIRS_STAGES[refused.format]))
    assert not isinstance(choose(refused, 16384), Pairs)


def test_pairs_are_for_where_they_can_be_compiled(monkeypatch):
    monkeypatch.setattr(cuda_build, "missing", lambda: None)
    assert methods.sound(PAIRS, 4096, Pairs(4))
    assert not methods.sound(PAIRS, 4096, Pairs(5))
    monkeypatch.setattr(cuda_build, "missing", lambda: "no compiler")
    assert not methods.sound(PAIRS, 4096, Pairs(4))


def test_tiles_are_wide_where_there_are_many():
    """At 64 tokens: with all experts here wide ones still give every multiprocessor several."""
    spread, whole = (layer("fp8_block", 1280, (GRID, GRID), e) for e in ((288, 36), (288, 288)))
    assert tiles(spread, 64).gate_up.n == 64
    assert tiles(whole, 64).gate_up.n == 128
    assert tiles(whole, 1).gate_up.n == 64


@pytest.mark.parametrize(
    ("name", "blocks", "first", "second"),
    [
        ("nvfp4", (None, None), Tile(16, 64, 256, 4, 3, 2, split=True), Tile(16, 64, 256, 4, 3, 2)),
        ("fp8_block", ((32, 128), (128, 128)), Tile(16, 64, 128, 4, 3, 2, split=True), None),
        ("fp8_block", ((128, 64), (128, 128)), Tile(16, 64, 128, 4, 3, 2), None),
        ("fp8_block", ((128, 128), (128, 32)), Tile(16, 64, 128, 4, 3, 2), None),
        ("fp8_block", ((128, 128), (128, 128)), Tile(16, 32, 128, 4, 3, 2), None),
    ],
    ids=["nvfp4-split", "split-over-scales", "step-over-w13", "step-over-w2", "step-over-hidden"],
)
def test_a_tile_that_mixes_scales_is_refused(name, blocks, first, second):
    with pytest.raises(ValueError, match=" expected$"):
        check_tiles(layer(name, 1280, blocks), first, second or Tile(16, 128, 64, 4, 3, 2))


def test_the_log_says_which_calls_quantise(monkeypatch):
    monkeypatch.setattr(cuda_build, "missing", lambda: "no compiler")
    problem = build(Case("fp8_block", KINDS[0]))
    fused = FusedMoE(problem.layer, problem.weights, kernel="reference")
    fused.selection = Selection(HopperKernel(), "asked for")
    said = "activations=not quantised with few tokens, else fp8 1x128, hidden 1x64 (asked for)"
    assert said in fused.describe()
    assert HopperKernel().activation_groups(problem.layer, FEW_TOKENS_NARROW) is None
    assert HopperKernel().activation_groups(problem.layer, FEW_TOKENS_NARROW + 1) == (128, 64)
