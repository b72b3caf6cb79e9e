"""Expert ownership: every expert owned as often as planned, and vLLM's own tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend.layout.check import check_maps
from moe_backend.layout.ownership import (
    ExpertMap,
    ExpertPlacement,
    contiguous,
    physical,
    round_robin,
    with_redundancy,
)
from moe_backend.layout.routing import plan_routing

BOUNDED = settings(max_examples=200, derandomize=True, deadline=None, database=None)


def maps(placement: ExpertPlacement) -> list[ExpertMap]:
    return [placement.expert_map(r) for r in range(placement.num_ranks)]


placements = st.one_of(
    st.builds(contiguous, st.integers(1, 40), st.integers(1, 9)),
    st.builds(round_robin, st.integers(1, 40), st.integers(1, 9)),
    st.builds(with_redundancy, st.integers(1, 40), st.integers(0, 50), st.integers(1, 9)),
)


@BOUNDED
@given(placements)
def test_every_expert_is_owned_as_planned(placement):
    placement.check()
    check_maps(maps(placement))
    loaded = [e for r in range(placement.num_ranks) for e in placement.local_experts(r)]
    assert sorted(loaded) == sorted(
        e for e, copies in enumerate(placement.copies) for _ in range(copies)
    )
    sizes = [len(ids) for ids in placement.rank_ids]
    assert sizes == sorted(sizes, reverse=True), "the first ranks take what does not come out even"
    assert max(sizes) - min(sizes) <= 1


@BOUNDED
@given(placements)
def test_map_and_mask_say_the_same(placement):
    for rank in range(placement.num_ranks):
        expert_map = placement.expert_map(rank)
        assert expert_map.tensor.dtype == torch.int32
        assert ExpertMap.of(expert_map.tensor).num_local_experts == len(placement.rank_ids[rank])
        for slot, i in enumerate(placement.rank_ids[rank]):
            assert expert_map.tensor[i] == slot
        flags = placement.expert_mask(rank, num_fused_shared_experts=2).with_sentinel()
        assert flags.dtype == torch.int32
        assert flags.tolist() == [*(expert_map.tensor >= 0).int().tolist(), 1, 1, 0]


def test_uneven_counts_by_hand():
    assert contiguous(5, 3).rank_ids == ((0, 1), (2, 3), (4,))
    assert round_robin(5, 3).rank_ids == ((0, 3), (1, 4), (2,))
    assert contiguous(2, 4).rank_ids == ((0,), (1,), (), ())
    redundant = with_redundancy(4, 2, 3)
    assert redundant.rank_ids == ((0, 1), (2, 3), (4, 5))
    assert [redundant.local_experts(r) for r in range(3)] == [(0, 1), (2, 3), (0, 1)]
    assert redundant.copies == (2, 2, 1, 1)


def test_a_dropped_expert_is_named():
    placement = contiguous(8, 4)
    dropped = replace(placement, rank_ids=((0, 1), (2,), (4, 5), (6, 7)))
    with pytest.raises(ValueError, match=r"expert 3 is owned by 0 of 4 ranks \(none\)"):
        dropped.check()
    with pytest.raises(ValueError, match=r"expert 3 is owned by 0 of 4"):
        check_maps(maps(dropped))


def test_an_expert_owned_twice_is_named_with_its_ranks():
    twice = replace(contiguous(8, 4), rank_ids=((0, 1), (2, 3), (4, 5), (6, 7, 1)))
    for check in (twice.check, lambda: check_maps(maps(twice))):
        with pytest.raises(ValueError, match=r"expert 1 is owned by 2 of 4 ranks \(ranks 0, 3\)"):
            check()


def test_ranks_with_different_settings_are_caught():
    """Rank 1 of 2 was started with round-robin placement, rank 0 was not."""
    held = [contiguous(4, 2).expert_map(0), round_robin(4, 2).expert_map(1)]
    with pytest.raises(ValueError, match="expert 1 is owned by 2 of 2"):
        check_maps(held)
    with pytest.raises(ValueError, match="differ in length"):
        check_maps([contiguous(4, 2).expert_map(0), contiguous(6, 2).expert_map(1)])


def test_a_redundancy_plan_that_is_not_met_is_named():
    with pytest.raises(ValueError, match=r"logical expert 2 has 0 copies"):
        physical([0, 1, 1, 3], 4, 2)
    with pytest.raises(
        ValueError, match=r"logical expert 1 has 2 copies \(ranks 0, 1\), 1 planned"
    ):
        physical([0, 1, 1, 3], 4, 2, copies=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="holds logical expert 4"):
        physical([0, 1, 2, 4], 4, 2, copies=[1, 1, 1, 1])
    with pytest.raises(ValueError, match="rank 0 owns expert 9"):
        replace(contiguous(2, 1), rank_ids=((0, 1, 9),)).check()


def test_a_mask_is_not_a_map():
    placement = contiguous(6, 2)
    mask = placement.expert_mask(1)
    ids = torch.tensor([[0, 5]])
    with pytest.raises(TypeError, match="ExpertMask"):
        plan_routing(ids, 3, mask)
    with pytest.raises(ValueError, match="0/1 expert mask is not a map"):
        ExpertMap.of(mask.flags)
    with pytest.raises(ValueError, match="int32"):
        ExpertMap.of(placement.expert_map(1).tensor.long())
    assert torch.equal(
        plan_routing(ids, 3, placement.expert_map(1)).slots,
        plan_routing(ids, 3, placement.expert_map(1).tensor).slots,
    )


# --- vLLM's tables --------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [contiguous, round_robin], ids=lambda f: f.__name__)
def test_vllm_places_experts_the_same_way(ours):
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.expert_map_manager import determine_expert_map

    strategy = {"contiguous": "linear", "round_robin": "round_robin"}[ours.__name__]
    for num_experts in (1, 7, 8, 60, 288):
        for ranks in (2, 3, 4, 8):
            if ours is round_robin and num_experts < ranks:
                continue  # vLLM 0.32 fails on it: torch.arange with its start past its end
            placement = ours(num_experts, ranks)
            for rank in range(ranks):
                count, table, mask = determine_expert_map(
                    ranks, rank, num_experts, strategy, return_expert_mask=True
                )
                assert count == len(placement.rank_ids[rank])
                assert torch.equal(placement.expert_map(rank).tensor, table)
                assert torch.equal(placement.expert_mask(rank).with_sentinel(), mask)


def test_vllm_manager_keeps_these_tables():
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager

    placement = contiguous(10, 4)
    for rank in range(4):
        config = replace(
            FusedMoEParallelConfig.make_no_parallel(), ep_size=4, ep_rank=rank, use_ep=True
        )
        manager = ExpertMapManager(
            max_num_batched_tokens=8,
            top_k=2,
            global_num_experts=10,
            num_redundant_experts=0,
            num_expert_group=None,
            moe_parallel_config=config,
            placement_strategy="linear",
            enable_eplb=False,
        )
        assert torch.equal(manager.expert_map, placement.expert_map(rank).tensor)
        assert manager.get_local_expert_ids() == list(placement.rank_ids[rank])


def test_vllm_starts_eplb_from_the_same_table():
    pytest.importorskip("vllm")
    from vllm.distributed.eplb.eplb_state import EplbState

    for experts, redundant in ((8, 0), (8, 3), (8, 8), (6, 20)):
        table = EplbState.build_initial_global_physical_to_logical_map(experts, redundant)
        assert with_redundancy(experts, redundant, 2).logical_of == tuple(table)
