"""Sum over ranks = unsharded, for any mix of tensor and expert parallelism; and what must not be.

Everything runs in fp32 through the reference kernel. The exhaustive test takes every intermediate
size that is a multiple of 32 up to 1280 with every tp, ep and format; the property test takes
routings, placements, block shapes and layouts at random.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_layout_shards import (
    HIDDEN,
    SIZES,
    TPS,
    one_thread,  # noqa: F401  (a fixture)
    weights_of,
)

from moe_backend.activation import Activation
from moe_backend.formats import Fp8BlockWeights, Weights
from moe_backend.kernels.reference import fused_experts
from moe_backend.layout.check import check_conserved_over_ranks, check_maps
from moe_backend.layout.ownership import (
    ExpertMap,
    ExpertPlacement,
    contiguous,
    physical,
    round_robin,
    with_redundancy,
)
from moe_backend.layout.routing import plan_routing
from moe_backend.layout.shards import TpPlan, plan_tp, shard, take_experts
from moe_backend.verify.metrics import Difference, difference

EXPERTS = 8
STEP = Activation.from_name("swiglustep")
REL_L2 = 1e-6


def tp_plan(weights: Weights, tp: int, whole: int | None = None) -> TpPlan:
    """The even split; for NVFP4 sizes that have none, whole blocks of 16."""
    size = weights.intermediate_size
    if weights.name == "nvfp4" and whole is None and size // tp % 16:
        whole = 16
    block = weights.w13_block if isinstance(weights, Fp8BlockWeights) else None
    return plan_tp(weights.name, HIDDEN, size, tp, block, whole_blocks_of=whole)


def run(
    weights: Weights, routing: tuple[torch.Tensor, ...], expert_map: ExpertMap | None = None
) -> torch.Tensor:
    x, topk_weights, topk_ids = routing
    table = None if expert_map is None else expert_map.tensor
    return fused_experts(x, weights, topk_weights, topk_ids, STEP, table)


def sum_over_ranks(
    shards: list[Weights],
    placement: ExpertPlacement,
    routing: tuple[torch.Tensor, ...],
    maps: list[ExpertMap] | None = None,
) -> torch.Tensor:
    """Every rank of the ep x tp grid computes from its own tensors alone; fp32 sum."""
    x = routing[0]
    total = torch.zeros(x.shape)
    for rank in range(placement.num_ranks):
        expert_map = placement.expert_map(rank) if maps is None else maps[rank]
        if not expert_map.num_local_experts:
            continue
        for part in shards:
            local = take_experts(part, placement.local_experts(rank))
            total += run(local, routing, expert_map)
    return total


def make_routing(topk_ids: torch.Tensor, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(topk_ids.shape[0], HIDDEN, generator=g)
    return x, torch.rand(topk_ids.shape, generator=g) + 0.1, topk_ids.int()


def agrees(found: Difference) -> bool:
    return found.within(REL_L2, norm=REL_L2)


# --- every size, tp, ep and format ----------------------------------------------------------------

# Three tokens, four experts in use: 0, 3 and 4 lie on different ranks at ep 2, 4 and 8; expert 7
# is last; the others are empty.
FIXED = torch.tensor([[0, 3], [4, 7], [3, -1]])


@pytest.mark.parametrize("tp", TPS)
@pytest.mark.parametrize("name", ["bf16", "fp8_block", "nvfp4"])
def test_every_mix_gives_the_unsharded_result(name, tp):
    routing = make_routing(FIXED)
    wrong = []
    for size in SIZES:
        weights = weights_of(name, size, experts=EXPERTS)
        expected = run(weights, routing)
        plan = tp_plan(weights, tp)
        shards = [shard(weights, plan, r) for r in range(tp)]
        for ep in (1, 2, 4, 8):
            place = round_robin if size // 32 % 2 else contiguous
            found = difference(sum_over_ranks(shards, place(EXPERTS, ep), routing), expected)
            if not agrees(found):
                wrong.append((size, ep, found))
    assert wrong == []


# --- routings, placements, layouts ----------------------------------------------------------------


@st.composite
def routed_ids(draw):
    """Distinct experts within a token, as a router gives them, and -1."""
    top_k = draw(st.sampled_from([1, 2, 3, EXPERTS]))
    kind = draw(st.sampled_from(["any", "one token", "one expert", "few experts"]))
    tokens = 1 if kind == "one token" else draw(st.integers(1, 6))
    order = list(range(EXPERTS))
    rows = []
    for _ in range(tokens):
        if kind != "one expert":
            order = draw(st.permutations(order))
        rows.append(list(order[:top_k]))
    ids = torch.tensor(rows)
    if kind == "one expert":
        ids[:, 1:] = -1
    if kind == "few experts":
        ids[ids >= 3] = -1  # experts 3 to 7 are empty
    if draw(st.booleans()):
        ids[torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))] = -1
    return ids


@st.composite
def placements(draw):
    ranks = draw(st.sampled_from([1, 2, 3, 4, 8]))
    kind = draw(st.sampled_from(["contiguous", "round_robin", "redundant", "shuffled"]))
    if kind == "contiguous":
        return contiguous(EXPERTS, ranks)
    if kind == "round_robin":
        return round_robin(EXPERTS, ranks)
    if kind == "redundant":
        return with_redundancy(EXPERTS, draw(st.integers(1, 9)), ranks)
    extra = draw(st.lists(st.integers(0, EXPERTS - 1), max_size=6))
    return physical(draw(st.permutations([*range(EXPERTS), *extra])), EXPERTS, ranks)


def to_physical(ids: torch.Tensor, placement: ExpertPlacement) -> torch.Tensor:
    """What EPLB's router does: some copy of each expert, here in turn by token."""
    out = ids.clone()
    for t in range(ids.shape[0]):
        for k, e in enumerate(ids[t].tolist()):
            if e >= 0:
                copies = [p for p, logical in enumerate(placement.logical_of) if logical == e]
                out[t, k] = copies[t % len(copies)]
    return out


formats = st.one_of(
    st.tuples(st.just("bf16"), st.just((128, 128))),
    st.tuples(st.just("nvfp4"), st.just((128, 128))),
    st.tuples(st.just("fp8_block"), st.sampled_from([(128, 128), (64, 128), (128, 64), (32, 32)])),
)


@settings(max_examples=600, derandomize=True, deadline=None, database=None)
@given(
    formats,
    st.sampled_from(SIZES),
    st.sampled_from(TPS),
    st.sampled_from([None, None, 128, 64]),
    placements(),
    routed_ids(),
)
@example(("fp8_block", (128, 128)), 1280, 8, None, contiguous(8, 8), torch.arange(8).view(1, 8))
@example(("fp8_block", (128, 128)), 1280, 4, None, contiguous(8, 2), FIXED)
@example(("fp8_block", (128, 128)), 1280, 8, 128, with_redundancy(8, 8, 4), FIXED)
@example(("nvfp4", (128, 128)), 1280, 8, None, round_robin(8, 4), torch.full((4, 1), 5))
@example(("nvfp4", (128, 128)), 32, 8, None, contiguous(8, 8), torch.full((4, 1), -1))
def test_any_routing_on_any_layout(kind, size, tp, whole, placement, ids):
    weights = weights_of(kind[0], size, kind[1], experts=EXPERTS)
    plan = tp_plan(weights, tp, whole)
    shards = [shard(weights, plan, r) for r in range(tp)]
    logical = make_routing(ids)
    routed = (*logical[:2], to_physical(ids, placement).int())
    maps = [placement.expert_map(r) for r in range(placement.num_ranks)]
    check_maps(maps)
    plans = [plan_routing(routed[2], m.num_local_experts, m) for m in maps]
    check_conserved_over_ranks(plans, routed[2])
    expected = run(weights, logical)
    found = difference(sum_over_ranks(shards, placement, routed), expected)
    assert agrees(found), (plan.describe(), found)


# --- must-fail controls ---------------------------------------------------------------------------


def step_3_5() -> tuple[Fp8BlockWeights, tuple[torch.Tensor, ...], torch.Tensor]:
    weights = weights_of("fp8_block", 1280, experts=EXPERTS)
    assert isinstance(weights, Fp8BlockWeights)
    routing = make_routing(FIXED)
    return weights, routing, run(weights, routing)


def pull_request_shard(weights: Fp8BlockWeights, tp: int, rank: int) -> Fp8BlockWeights:
    """The layout of ROCm/ATOM pull request 1091: even weights, whole-block scales.

    Rank r has rows [r I/tp, (r+1) I/tp), padded to whole blocks, and scale blocks [r c, (r+1) c)
    with c = ceil(blocks / tp); slots past the last block are zero.
    """
    size, block = weights.intermediate_size, weights.w13_block[0]
    blocks = size // block
    kept = -(-blocks // tp)
    own = size // tp
    rows = -(-own // block) * block

    def part(tensor: torch.Tensor, dim: int, start: int, count: int, stored: int) -> torch.Tensor:
        start = min(start, tensor.shape[dim])
        piece = tensor.narrow(dim, start, min(count, tensor.shape[dim] - start))
        shape = list(tensor.shape)
        shape[dim] = stored
        out = torch.zeros(shape).to(tensor.dtype)
        out.narrow(dim, 0, piece.shape[dim]).copy_(piece)
        return out

    def gate_up(tensor: torch.Tensor, start: int, count: int, stored: int) -> torch.Tensor:
        return part(tensor.unflatten(1, (2, -1)), 2, start, count, stored).flatten(1, 2)

    return Fp8BlockWeights(
        gate_up(weights.w13, rank * own, own, rows),
        gate_up(weights.w13_scale, rank * kept, kept, rows // block),
        part(weights.w2, 2, rank * own, own, rows),
        part(weights.w2_scale, 2, rank * kept, kept, rows // block),
        weights.w13_block,
        weights.w2_block,
    )


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


@pytest.mark.parametrize("tp", [4, 8])
def test_layout_of_the_pull_request_is_caught(tp):
    weights, routing, expected = step_3_5()
    shards: list[Weights] = [pull_request_shard(weights, tp, r) for r in range(tp)]
    out = sum_over_ranks(shards, contiguous(EXPERTS, 1), routing)
    found = difference(out, expected)
    assert not agrees(found)
    assert found.rel_l2 > 0.3
    assert cosine(out, expected) < 0.95


def test_layout_of_the_pull_request_is_right_on_the_grid():
    """At tp 2 its shards are whole blocks; so it is the split off the grid that is caught."""
    weights, routing, expected = step_3_5()
    shards: list[Weights] = [pull_request_shard(weights, 2, r) for r in range(2)]
    assert agrees(difference(sum_over_ranks(shards, contiguous(EXPERTS, 1), routing), expected))


def test_a_dropped_expert_is_caught():
    weights, routing, expected = step_3_5()
    placement = contiguous(EXPERTS, 4)
    maps = [placement.expert_map(r) for r in range(4)]
    assert agrees(difference(sum_over_ranks([weights], placement, routing, maps), expected))
    table = maps[1].tensor.clone()
    table[3] = -1
    maps[1] = ExpertMap(table, 2)
    assert not agrees(difference(sum_over_ranks([weights], placement, routing, maps), expected))
    with pytest.raises(ValueError, match="expert 3 is owned by 0 of 4 ranks"):
        check_maps(maps)


def test_an_expert_owned_twice_is_caught():
    weights, routing, expected = step_3_5()
    placement = contiguous(EXPERTS, 2)
    everywhere = replace(placement, rank_ids=(tuple(range(8)), placement.rank_ids[1]))
    assert not agrees(difference(sum_over_ranks([weights], everywhere, routing), expected))
    with pytest.raises(ValueError, match="expert 4 is owned by 2 of 2 ranks"):
        everywhere.check()


def wrong_plans() -> dict[str, TpPlan]:
    right = plan_tp("fp8_block", HIDDEN, 1280, 8, (128, 128))

    def moved(rank: int, by: int) -> tuple[tuple[int, int], ...]:
        start, end = right.parts[rank]
        return (*right.parts[:rank], (start + by, end + by), *right.parts[rank + 1 :])

    return {
        "64-row refinement": replace(right, w13_block=(64, 128), w2_block=(128, 64)),
        "128-row blocks": replace(right, w13_block=(128, 128), w2_block=(128, 128)),
        "33-row refinement": replace(right, w13_block=(33, 128), w2_block=(128, 33)),
        "one row late": replace(right, parts=moved(3, 1)),
        "one refined block late": replace(right, parts=moved(3, 32)),
        "a rank's rows twice": replace(right, parts=(right.parts[0], *right.parts[:-1])),
        "a rank left out": replace(right, parts=right.parts[:-1]),
    }


@pytest.mark.parametrize("fault", wrong_plans())
def test_a_wrong_plan_is_caught(fault):
    """By its own check at start-up, and by the sum."""
    weights, routing, expected = step_3_5()
    plan = wrong_plans()[fault]
    with pytest.raises(ValueError):
        plan.check()
    shards = [shard(weights, plan, r) for r in range(plan.tp)]
    assert not agrees(difference(sum_over_ranks(shards, contiguous(EXPERTS, 1), routing), expected))


@pytest.mark.parametrize("which", ["w13_scale", "w2_scale"])
def test_scales_of_the_neighbouring_block_are_caught(which):
    """One rank of eight takes its scales one refined block too late."""
    weights, routing, expected = step_3_5()
    plan = tp_plan(weights, 8)
    shards = [shard(weights, plan, r) for r in range(8)]
    part = shards[2]
    if which == "w13_scale":
        late = part.w13_scale.unflatten(1, (2, -1)).roll(-1, 2).flatten(1, 2)
        shards[2] = replace(part, w13_scale=late)
    else:
        shards[2] = replace(part, w2_scale=part.w2_scale.roll(-1, 2))
    assert not agrees(difference(sum_over_ranks(shards, contiguous(EXPERTS, 1), routing), expected))


def test_a_mask_taken_for_a_map_is_caught():
    weights, routing, expected = step_3_5()
    placement = contiguous(EXPERTS, 2)
    maps = [ExpertMap(placement.expert_mask(r).flags, 4) for r in range(2)]
    assert not agrees(difference(sum_over_ranks([weights], placement, routing, maps), expected))
    with pytest.raises(ValueError, match="0/1 expert mask is not a map"):
        check_maps(maps)


def test_nvfp4_scales_of_the_neighbouring_group_are_caught():
    weights = weights_of("nvfp4", 1280, experts=EXPERTS)
    routing = make_routing(FIXED)
    plan = tp_plan(weights, 8)
    shards = [shard(weights, plan, r) for r in range(8)]
    placement = contiguous(EXPERTS, 1)
    expected = run(weights, routing)
    assert agrees(difference(sum_over_ranks(shards, placement, routing), expected))
    late = shards[5].w2_scale.view(torch.uint8).roll(1, 2).view(torch.float8_e4m3fn)
    shards[5] = replace(shards[5], w2_scale=late)
    assert not agrees(difference(sum_over_ranks(shards, placement, routing), expected))
