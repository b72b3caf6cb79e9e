"""Tensor-parallel plans and shards: exact, as coarse as exactness allows, and what they store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import dequantize_blocks
from moe_backend.layout.check import check_start_up, check_written, empty_weights, place
from moe_backend.layout.ownership import contiguous
from moe_backend.layout.shards import (
    TpPlan,
    even_shard,
    lossless_block,
    merge_scale,
    plan_tp,
    shard,
    shard_of,
    take_experts,
    whole_block_shard,
)
from moe_backend.verify.problems import encode

SIZES = range(32, 1281, 32)
TPS = (1, 2, 4, 8)
HIDDEN = 128


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and waiting for them costs most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=16)
def largest(name: str, block: tuple[int, int], hidden: int, experts: int) -> Weights:
    """Random weights of intermediate size 1280, every scale different from its neighbours."""
    g = torch.Generator().manual_seed(0)
    size = SIZES[-1]
    w13 = torch.randn(experts, 2 * size, hidden, generator=g) / hidden**0.5 * 3
    w2 = torch.randn(experts, hidden, size, generator=g) / size**0.5
    steps = torch.exp2(torch.randint(-3, 4, (experts, 3, size // 32), generator=g))
    steps = steps.repeat_interleave(32, 2)
    w13 *= steps[:, :2].reshape(experts, 2 * size, 1)
    return encode(name, w13, w2 * steps[:, 2:], block)


def weights_of(
    name: str,
    size: int,
    block: tuple[int, int] = (128, 128),
    hidden: int = HIDDEN,
    experts: int = 2,
) -> Weights:
    """The first `size` rows of `largest`, cut by hand; the last scale block may be partial."""
    whole = largest(name, block, hidden, experts)

    def rows(tensor: torch.Tensor, per: int) -> torch.Tensor:
        return tensor.unflatten(1, (2, -1))[:, :, : -(-size // per)].flatten(1, 2)

    def columns(tensor: torch.Tensor, per: int) -> torch.Tensor:
        return tensor[:, :, : -(-size // per)].contiguous()

    if isinstance(whole, Nvfp4Weights):
        return replace(
            whole,
            w13=rows(whole.w13, 1),
            w13_scale=rows(whole.w13_scale, 1),
            w2=columns(whole.w2, 2),
            w2_scale=columns(whole.w2_scale, 16),
        )
    cut = replace(whole, w13=rows(whole.w13, 1), w2=columns(whole.w2, 1))
    if isinstance(cut, Fp8BlockWeights):
        n, k = block
        cut = replace(cut, w13_scale=rows(cut.w13_scale, n), w2_scale=columns(cut.w2_scale, k))
    return cut


def decoded(weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """`(w13 [E, 2, I, H], w2 [E, H, I])` in fp32."""
    both = [weights.expert(e, torch.float32) for e in range(weights.num_experts)]
    w13, w2 = (torch.stack(t) for t in zip(*both, strict=True))
    return w13.unflatten(1, (2, -1)), w2


def assert_exact(weights: Weights, plan: TpPlan) -> None:
    """The ranks' decoded rows, put together, are the checkpoint's bit for bit; padding is 0."""
    w13, w2 = decoded(weights)
    for rank, (start, end) in enumerate(plan.parts):
        part = shard(weights, plan, rank)
        part.validate()
        got13, got2 = decoded(part)
        own = end - start
        assert torch.equal(got13[:, :, :own], w13[:, :, start:end])
        assert torch.equal(got2[:, :, :own], w2[:, :, start:end])
        assert got13.shape[2] == got2.shape[2] == plan.rows
        assert not got13[:, :, own:].any()
        assert not got2[:, :, own:].any()


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("name", ["bf16", "fp8_block", "nvfp4"])
def test_every_size_is_exact_in_both_layouts(name, tp):
    for size in SIZES:
        weights = weights_of(name, size)
        block = (128, 128) if name == "fp8_block" else None
        assert_exact(weights, plan_tp(name, HIDDEN, size, tp, block, whole_blocks_of=128))
        if name == "nvfp4" and size // tp % 16:
            with pytest.raises(ValueError, match="multiples of 16"):
                plan_tp(name, HIDDEN, size, tp)
            assert_exact(weights, plan_tp(name, HIDDEN, size, tp, whole_blocks_of=16))
        else:
            plan = plan_tp(name, HIDDEN, size, tp, block)
            assert plan.layout == "even"
            assert plan.padding == 0
            assert_exact(weights, plan)


@pytest.mark.parametrize("block", [(64, 64), (32, 32), (64, 128), (128, 64), (96, 128)])
def test_other_block_shapes_are_exact(block):
    for size in (96, 160, 384, 416, 1280):
        weights = weights_of("fp8_block", size, block, hidden=192)  # the last k block is partial
        for tp in TPS:
            assert_exact(weights, plan_tp("fp8_block", 192, size, tp, block))
            assert_exact(weights, plan_tp("fp8_block", 192, size, tp, block, whole_blocks_of=128))


# --- refinement -----------------------------------------------------------------------------------


def is_lossless(block: int, refined: int, size: int, tp: int) -> bool:
    """Element by element: no refined block of any rank's shard touches two checkpoint blocks."""
    for rank in range(tp):
        touched: dict[int, set[int]] = {}
        for row in range(rank * size // tp, (rank + 1) * size // tp):
            local = (row - rank * size // tp) // refined
            touched.setdefault(local, set()).add(row // block)
        if any(len(blocks) > 1 for blocks in touched.values()):
            return False
    return True


@pytest.mark.parametrize(
    ("block", "sizes", "tps"),
    # Small odd sizes as well: shards that begin one row before a border.
    [(block, SIZES, TPS) for block in (128, 64, 96)]
    + [(block, range(1, 61), range(1, 9)) for block in (8, 6)],
)
def test_refined_block_is_the_coarsest_lossless_one(block, sizes, tps):
    for size in sizes:
        for tp in (tp for tp in tps if size % tp == 0):
            parts = plan_tp("bf16", HIDDEN, size, tp).parts
            divisors = [d for d in range(1, block + 1) if block % d == 0]
            coarsest = max(d for d in divisors if is_lossless(block, d, size, tp))
            assert lossless_block(block, parts) == coarsest, (size, tp)


@pytest.mark.parametrize(
    ("tp", "rows", "refined"), [(1, 1280, 128), (2, 640, 128), (4, 320, 64), (8, 160, 32)]
)
def test_step_3_5_splits_evenly(tp, rows, refined):
    plan = plan_tp("fp8_block", 4096, 1280, tp, (128, 128))
    assert (plan.layout, plan.rows, plan.padding) == ("even", rows, 0)
    assert plan.parts == tuple((r * rows, (r + 1) * rows) for r in range(tp))
    assert (plan.w13_block, plan.w2_block) == ((refined, 128), (128, refined))


def test_rank_that_begins_inside_a_block():
    """160 rows of 128-blocks: rank 1 is rows 160 to 319, in blocks 1 (3 times 32) and 2 (2)."""
    weights = weights_of("fp8_block", 1280)
    scale = weights.w13_scale.unflatten(1, (2, 10))
    got = even_shard(weights, 8, 1).w13_scale.unflatten(1, (2, 5))
    assert torch.equal(got, scale[:, :, [1, 1, 1, 2, 2]])


def test_hidden_axis_keeps_its_block():
    weights = weights_of("fp8_block", 1280, hidden=256)
    plan = plan_tp("fp8_block", 256, 1280, 8, (128, 128))
    w13, w2 = decoded(weights)
    for rank, (start, end) in enumerate(plan.parts):
        codes = shard_of(weights.w13.unflatten(1, (2, -1)), "gate", "weight", plan, rank)
        scale = shard_of(weights.w13_scale.unflatten(1, (2, -1)), "gate", "scale", plan, rank)
        assert scale.shape == (2, 2, 5, 2)
        assert torch.equal(dequantize_blocks(codes, scale, (32, 128)), w13[:, :, start:end])
        codes = shard_of(weights.w2, "down", "weight", plan, rank)
        scale = shard_of(weights.w2_scale, "down", "scale", plan, rank)
        assert scale.shape == (2, 2, 5)
        assert torch.equal(dequantize_blocks(codes, scale, (128, 32)), w2[:, :, start:end])
    part = shard(weights, plan, 3)
    assert (part.w13_block, part.w2_block) == ((32, 128), (128, 32))
    for own, empty in zip(part.tensors(), empty_weights(plan, 2).tensors(), strict=True):
        assert own.shape == empty.shape
    with pytest.raises(ValueError, match="32x128 and 128x32 found: these weights are a shard"):
        even_shard(part, 2, 0)


@pytest.mark.parametrize("columns", [256, 200, 128, 96])
def test_a_refinement_of_an_unsplit_axis_is_undone(columns):
    """What vLLM's loader repeats along the hidden axis; the last block may be partial."""
    scale = torch.rand(2, 5, -(-columns // 128))
    refined = scale.repeat_interleave(4, -1)[..., : -(-columns // 32)]
    assert torch.equal(merge_scale(refined, -1, 32, 128), scale)
    assert torch.equal(merge_scale(refined.mT, -2, 32, 128), scale.mT)
    refined[1, 2, 1] *= 2
    with pytest.raises(ValueError, match="layer.w13: scales were repeated from blocks of 128"):
        merge_scale(refined, -1, 32, 128, "layer.w13")
    with pytest.raises(ValueError, match="of one block differ"):
        merge_scale(refined.mT, -2, 32, 128)


# --- whole blocks ---------------------------------------------------------------------------------


def test_whole_blocks_of_step_3_5():
    """As vLLM lays them out: the first ranks own whole blocks, the last own less or nothing."""
    tp8 = plan_tp("fp8_block", 4096, 1280, 8, (128, 128), whole_blocks_of=128)
    assert (tp8.layout, tp8.rows) == ("whole_block", 256)
    assert [end - start for start, end in tp8.parts] == [256] * 5 + [0] * 3
    assert tp8.w13_block == tp8.w2_block == (128, 128)
    tp4 = plan_tp("fp8_block", 4096, 1280, 4, (128, 128), whole_blocks_of=128)
    assert (tp4.rows, [end - start for start, end in tp4.parts]) == (384, [384, 384, 384, 128])
    tp2 = plan_tp("fp8_block", 4096, 1280, 2, (128, 128), whole_blocks_of=128)
    assert (tp2.layout, tp2.rows) == ("even", 640)


def test_padding_is_zero_codes_with_scale_one():
    for name in ("bf16", "fp8_block", "nvfp4"):
        weights = weights_of(name, 384)
        part, idle = whole_block_shard(weights, 2, 1), whole_block_shard(weights, 4, 3)
        assert part.intermediate_size == 256  # 128 rows of its own and 128 of padding
        assert idle.intermediate_size == 128
        for shard_, first in ((part, 128), (idle, 0)):
            assert not shard_.w13.unflatten(1, (2, -1))[:, :, first:].float().any()
            assert not shard_.w2[:, :, first // (2 if name == "nvfp4" else 1) :].float().any()
        if not isinstance(idle, Bf16Weights):
            assert torch.equal(idle.w13_scale.float(), torch.ones(idle.w13_scale.shape))
            assert torch.equal(idle.w2_scale.float(), torch.ones(idle.w2_scale.shape))
        if isinstance(idle, Nvfp4Weights) and isinstance(weights, Nvfp4Weights):
            assert torch.equal(idle.w13_global_scale, weights.w13_global_scale)


def stored(name: str, tp: int, whole: int | None = None) -> int:
    """Bytes that one rank stores for one expert of Step-3.5."""
    block = (128, 128) if name == "fp8_block" else None
    plan = plan_tp(name, 4096, 1280, tp, block, whole_blocks_of=whole)
    weights = empty_weights(plan, 1, device="meta")
    return sum(t.nbytes for t in weights.tensors() if t is not None)


@pytest.mark.parametrize(
    ("name", "tp", "even", "whole"),
    [
        # 3 matrices of 4096 columns; FP8 scales are 5 x 128 of 4 bytes a matrix at tp 8.
        ("fp8_block", 8, 3 * 160 * 4096 + 3 * 5 * 32 * 4, 3 * 256 * 4096 + 3 * 2 * 32 * 4),
        ("fp8_block", 4, 3 * 320 * 4096 + 3 * 5 * 32 * 4, 3 * 384 * 4096 + 3 * 3 * 32 * 4),
        ("nvfp4", 8, 3 * 160 * 4096 * 9 // 16 + 12, 3 * 256 * 4096 * 9 // 16 + 12),
        ("nvfp4", 4, 3 * 320 * 4096 * 9 // 16 + 12, 3 * 384 * 4096 * 9 // 16 + 12),
        ("bf16", 8, 3 * 160 * 4096 * 2, 3 * 256 * 4096 * 2),
        ("bf16", 4, 3 * 320 * 4096 * 2, 3 * 384 * 4096 * 2),
    ],
)
def test_bytes_a_rank_stores(name, tp, even, whole):
    assert stored(name, tp) == even
    assert stored(name, tp, 128) == whole
    saved = 1 - even / whole
    assert saved > (0.37 if tp == 8 else 0.16)


def test_meta_bytes_are_those_of_a_real_shard():
    for name in ("bf16", "fp8_block", "nvfp4"):
        weights = weights_of(name, 320)
        for whole in (None, 128):
            block = (128, 128) if name == "fp8_block" else None
            plan = plan_tp(name, HIDDEN, 320, 2, block, whole_blocks_of=whole)
            empty = empty_weights(plan, 2, input_scales=True, device="meta")
            for a, b in zip(empty.tensors(), shard(weights, plan, 1).tensors(), strict=True):
                assert (a.shape, a.dtype) == (b.shape, b.dtype)


# --- a tensor at a time ---------------------------------------------------------------------------


def checkpoint_tensors(weights: Weights):
    """`(expert, projection, kind, tensor)` as a checkpoint stores them."""
    scale = not isinstance(weights, Bf16Weights)
    for e in range(weights.num_experts):
        for index, projection in enumerate(("gate", "up", "down")):
            down = projection == "down"

            def part(tensor, down=down, index=index, e=e):
                return tensor[e] if down else tensor[e].unflatten(0, (2, -1))[index]

            stem = "w2" if down else "w13"
            yield e, projection, "weight", part(getattr(weights, stem))
            if scale:
                yield e, projection, "scale", part(getattr(weights, f"{stem}_scale"))
            if isinstance(weights, Nvfp4Weights):
                yield e, projection, "global_scale", part(getattr(weights, f"{stem}_global_scale"))


def load(weights: Weights, plan: TpPlan, rank: int, skip: int = -1) -> Weights:
    """Stream into empty weights, leaving out the `skip`th tensor."""
    target = empty_weights(plan, weights.num_experts)
    for n, (e, projection, kind, tensor) in enumerate(checkpoint_tensors(weights)):
        if n != skip:
            place(target, e, projection, kind, shard_of(tensor, projection, kind, plan, rank))
    return target


@pytest.mark.parametrize("whole", [None, 128], ids=["even", "whole"])
@pytest.mark.parametrize("name", ["bf16", "fp8_block", "nvfp4"])
def test_streaming_gives_the_same_shard(name, whole):
    weights = weights_of(name, 320)
    block = (128, 128) if name == "fp8_block" else None
    plan = plan_tp(name, HIDDEN, 320, 2, block, whole_blocks_of=whole)
    for rank in range(2):
        streamed = load(weights, plan, rank)
        if name == "bf16":
            assert isinstance(streamed, Bf16Weights)
        check_written(streamed)
        for a, b in zip(decoded(streamed), decoded(shard(weights, plan, rank)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["fp8_block", "nvfp4"])
def test_a_scale_slot_left_unwritten_is_caught(name):
    """The control: leave out each scale of the checkpoint in turn."""
    weights = weights_of(name, 320)
    plan = plan_tp(name, HIDDEN, 320, 2, (128, 128) if name == "fp8_block" else None)
    skipped = 0
    for n, (e, projection, kind, _) in enumerate(checkpoint_tensors(weights)):
        if kind == "weight":
            continue
        skipped += 1
        stem = "w2" if projection == "down" else "w13"
        with pytest.raises(ValueError, match=rf"layer 3\.{stem}_{kind}: .* \(expert slot {e}\)"):
            check_written(load(weights, plan, 1, skip=n), "layer 3.")
    assert skipped == 2 * 3 * (2 if name == "nvfp4" else 1)


@pytest.mark.parametrize("name", ["bf16", "fp8_block", "nvfp4"])
def test_start_up_check_of_a_loaded_rank(name):
    weights = weights_of(name, 320)
    plan = plan_tp(name, HIDDEN, 320, 2, (128, 128) if name == "fp8_block" else None)
    placement = contiguous(6, 3)
    loaded = load(weights, plan, 0)
    for rank in range(3):
        check_start_up(placement, rank, plan, loaded, "layer 3.")
    with pytest.raises(ValueError, match=r"layer 3\..*experts.* the plan says \(.*, 3, 128, 160\)"):
        check_start_up(contiguous(6, 2), 0, plan, loaded, "layer 3.")
    dropped = replace(placement, rank_ids=((0, 1), (2, 3), (4,)))
    with pytest.raises(ValueError, match=r"layer 3\.expert 5 is owned by 0 of 3 ranks"):
        check_start_up(dropped, 0, plan, loaded, "layer 3.")
    with pytest.raises(ValueError, match=r"layer 3\.rank 1 of 2 owns rows 0 to 160"):
        check_start_up(placement, 0, replace(plan, parts=plan.parts[:1] * 2), loaded, "layer 3.")
    if name != "bf16":
        with pytest.raises(ValueError, match=r"layer 3\.w13_scale: .* never written"):
            check_start_up(placement, 0, plan, load(weights, plan, 0, skip=1), "layer 3.")


def test_input_scales_count_as_slots():
    plan = plan_tp("nvfp4", HIDDEN, 320, 2)
    weights = load(weights_of("nvfp4", 320), plan, 0)
    empty = replace(weights, w13_input_scale=torch.full((1,), torch.nan))
    with pytest.raises(ValueError, match="w13_input_scale: 1 of 1"):
        check_written(empty)


def test_place_refuses_what_copy_would_bend():
    plan = plan_tp("fp8_block", HIDDEN, 320, 2, (128, 128))
    target = empty_weights(plan, 2)
    assert isinstance(target, Fp8BlockWeights)
    with pytest.raises(ValueError, match=r"w13_scale, expert slot 1, up: .*\(1, 1\).*found"):
        place(target, 1, "up", "scale", torch.ones(1, 1))
    with pytest.raises(ValueError, match="w2, expert slot 0, down: torch.float32"):
        place(target, 0, "down", "weight", torch.ones(HIDDEN, 160))
    with pytest.raises(ValueError, match="fp8_block has no w13_global_scale"):
        place(target, 0, "gate", "global_scale", torch.ones(1))


# --- refusals -------------------------------------------------------------------------------------


def test_sizes_that_do_not_split_are_refused():
    with pytest.raises(ValueError, match="1280 does not split evenly over 3 ranks"):
        plan_tp("bf16", HIDDEN, 1280, 3)
    assert plan_tp("bf16", HIDDEN, 1280, 3, whole_blocks_of=128).rows == 512
    with pytest.raises(ValueError, match=r"multiples of 16 rows, 24 is none"):
        plan_tp("nvfp4", HIDDEN, 96, 4)
    with pytest.raises(ValueError, match="fp8_block needs one"):
        plan_tp("fp8_block", HIDDEN, 1280, 8)
    with pytest.raises(ValueError, match="fp8_block needs one"):
        plan_tp("bf16", HIDDEN, 1280, 8, (128, 128))
    with pytest.raises(ValueError, match="unknown; accepted: bf16"):
        plan_tp("int4", HIDDEN, 1280, 8)
    with pytest.raises(ValueError, match="at least 1"):
        plan_tp("bf16", HIDDEN, 1280, 0)


def test_tensors_of_another_model_are_refused():
    plan = plan_tp("fp8_block", HIDDEN, 1280, 8, (128, 128))
    weights = weights_of("fp8_block", 640)
    with pytest.raises(ValueError, match=r"gate weight: shape \(640, 128\) found, \(1280, 128\)"):
        shard(weights, plan, 0)
    with pytest.raises(ValueError, match="the plan is for fp8_block"):
        shard(weights_of("bf16", 32), plan, 0)
    with pytest.raises(ValueError, match="rank 8 found, 0 to 7"):
        shard(weights_of("fp8_block", 1280), plan, 8)
    with pytest.raises(ValueError, match="bf16 has no gate scale"):
        shard_of(torch.ones(1, 1), "gate", "scale", plan_tp("bf16", HIDDEN, 1280, 8), 0)


# --- controls: plans that are wrong by a little ---------------------------------------------------


STEP8 = plan_tp("fp8_block", HIDDEN, 1280, 8, (128, 128))
STEP8_FP4 = plan_tp("nvfp4", HIDDEN, 1280, 8)


def shifted(plan: TpPlan, rank: int, by: int) -> tuple[tuple[int, int], ...]:
    parts = list(plan.parts)
    parts[rank] = (parts[rank][0] + by, parts[rank][1] + by)
    return tuple(parts)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            replace(STEP8, w13_block=(64, 128)),
            "w13 rows: one scale of rank 1 would cover 224 to 287",
        ),
        (replace(STEP8, w2_block=(128, 64)), "w2 columns: one scale of rank 1"),
        (replace(STEP8, w13_block=(128, 128)), "w13 rows: one scale of rank 1"),
        (replace(STEP8, w13_block=(33, 128)), "w13 rows"),
        (replace(STEP8, w13_block=(32, 48)), "w13 columns: blocks of 48 do not divide"),
        (replace(STEP8, parts=shifted(STEP8, 3, 32)), "rank 3 of 8 .* must start at 480"),
        (replace(STEP8, parts=shifted(STEP8, 7, -1)), "rank 7 of 8"),
        (replace(STEP8, parts=STEP8.parts[:-1]), "rows 1120 to 1280 are owned by no rank"),
        (replace(STEP8, rows=128), "stores 128"),
        (replace(STEP8_FP4, parts=((0, 152), (152, 320), *STEP8_FP4.parts[2:])), "rank 1"),
        (replace(STEP8_FP4, rows=168), "168 is none"),
    ],
)
def test_a_wrong_plan_is_caught_at_start_up(plan, message):
    STEP8.check()
    STEP8_FP4.check()
    with pytest.raises(ValueError, match=message):
        plan.check()


@pytest.mark.parametrize(
    "plan",
    [
        replace(STEP8, w13_block=(64, 128), w2_block=(128, 64)),
        replace(STEP8, w13_block=(33, 128), w2_block=(128, 33)),
        replace(STEP8, parts=shifted(STEP8, 3, 32)),
        replace(STEP8, parts=shifted(STEP8, 3, 1)),
    ],
    ids=["64-row refinement", "33-row refinement", "32 rows late", "1 row late"],
)
def test_a_wrong_plan_gives_wrong_weights(plan):
    """The exactness test above fails on them, so it sees what it should."""
    weights = weights_of("fp8_block", 1280)
    assert_exact(weights, STEP8)
    w13, w2 = decoded(weights)
    wrong = []
    for rank in range(8):
        got13, got2 = decoded(shard(weights, plan, rank))
        own = slice(*STEP8.parts[rank])
        wrong.append(not torch.equal(got13, w13[:, :, own]) or not torch.equal(got2, w2[:, :, own]))
    assert any(wrong)


# --- small things ---------------------------------------------------------------------------------


def test_take_experts_repeats_and_reorders():
    for name in ("bf16", "fp8_block", "nvfp4"):
        weights = weights_of(name, 64)
        taken = take_experts(weights, (1, 0, 1))
        taken.validate()
        assert taken.num_experts == 3
        for slot, e in enumerate((1, 0, 1)):
            for a, b in zip(
                taken.expert(slot, torch.float32), weights.expert(e, torch.float32), strict=True
            ):
                assert torch.equal(a, b)


def test_an_unsplit_layer_is_not_copied():
    weights = weights_of("fp8_block", 384)
    same = even_shard(weights, 1, 0)
    for a, b in zip(same.tensors(), weights.tensors(), strict=True):
        assert a.data_ptr() == b.data_ptr()


def test_the_log_says_what_is_stored():
    assert plan_tp("bf16", 4096, 1280, 1).describe() == "not split"
    assert STEP8.describe() == (
        "tp 8, even split, 160 rows a rank, scale blocks 128x128 refined losslessly to 32x128 and "
        "128x32"
    )
    whole = plan_tp("fp8_block", 4096, 1280, 8, (128, 128), whole_blocks_of=128)
    assert whole.describe() == (
        "tp 8, whole blocks as the kernel insists, 256 rows a rank of which 256, 256, 256, 256, "
        "256, 0, 0, 0 are used (37.5% padding), scale blocks 128x128 kept"
    )


# --- vLLM -----------------------------------------------------------------------------------------


def test_vllm_refines_no_coarser_and_pads_alike():
    """vLLM refines to one number for both axes, and refuses below 32; ours is a multiple of it."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.oracle import fp8

    refined = 0
    for size in range(128, 1281, 128):
        for tp in (2, 4, 8):
            config = SimpleNamespace(
                intermediate_size=size,
                intermediate_size_per_partition=size // tp,
                hidden_dim=4096,
                tp_size=tp,
                ep_size=1,
                is_lora_enabled=False,
                has_bias=False,
            )
            ours = plan_tp("fp8_block", 4096, size, tp, (128, 128))
            theirs = fp8.refine_fp8_moe_block_shape(config, [128, 128])
            if theirs is not None:
                refined += 1
                assert ours.w13_block[0] % theirs[0] == 0
                assert ours.w2_block[1] % theirs[1] == 0
                if size == 1280:
                    assert [ours.w13_block[0], ours.w2_block[1]] == theirs
            if not hasattr(fp8, "pad_tp_shard_to_weight_blocks"):
                continue  # vLLM 0.30
            fp8.pad_tp_shard_to_weight_blocks(config, [128, 128])
            whole = plan_tp("fp8_block", 4096, size, tp, (128, 128), whole_blocks_of=128)
            assert whole.rows == config.intermediate_size_per_partition
    assert refined > 5
