"""Routing plans: slots conserved, and nothing read back to the host."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from moe_backend.layout.check import check_conserved, check_conserved_over_ranks
from moe_backend.layout.ownership import contiguous, round_robin, with_redundancy
from moe_backend.layout.routing import RoutingPlan, plan_routing

BOUNDED = settings(max_examples=200, derandomize=True, deadline=None, database=None)


@st.composite
def routings(draw):
    """`(topk_ids, placement)`; ids may be -1 and may repeat within a token."""
    ranks = draw(st.integers(1, 8))
    place = draw(st.sampled_from([contiguous, round_robin, lambda e, r: with_redundancy(e, 3, r)]))
    placement = place(draw(st.integers(1, 12)), ranks)
    tokens, top_k = draw(st.integers(0, 9)), draw(st.integers(1, placement.num_experts))
    low = draw(st.sampled_from([-1, 0]))
    high = draw(st.sampled_from([0, placement.num_ids // 2, placement.num_ids - 1]))
    ids = draw(st.lists(st.integers(low, high), min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(ids, dtype=torch.int32).view(tokens, top_k), placement


@BOUNDED
@given(routings())
def test_slots_are_conserved(routing):
    ids, placement = routing
    plans = []
    for rank in range(placement.num_ranks):
        expert_map = placement.expert_map(rank)
        plan = plan_routing(ids, expert_map.num_local_experts, expert_map)
        check_conserved(plan, ids, expert_map.num_local_experts, expert_map)
        assert plan.expert_offsets.dtype == plan.expert_starts.dtype == torch.int32
        assert plan.expert_starts.tolist() == [0, *plan.expert_offsets.tolist()]
        wanted = [int((ids == i).sum()) for i in placement.rank_ids[rank]]
        assert plan.counts.tolist() == wanted
        plans.append(plan)
    check_conserved_over_ranks(plans, ids)
    kept = sum(int(plan.counts.sum()) for plan in plans)
    assert kept + int((ids < 0).sum()) == ids.numel()


def test_ids_beyond_the_last_expert_are_dropped():
    ids = torch.tensor([[2, 0], [4, 3], [1 << 30, -7]], dtype=torch.int32)
    dropped = torch.tensor([[2, 0], [-1, 3], [-1, -1]], dtype=torch.int32)
    for rank in (None, 0, 1):
        expert_map = None if rank is None else contiguous(4, 2).expert_map(rank)
        local = 4 if expert_map is None else 2
        found, expected = (plan_routing(i, local, expert_map) for i in (ids, dropped))
        assert torch.equal(found.slots, expected.slots)
        assert torch.equal(found.expert_offsets, expected.expert_offsets)


IDS = torch.tensor([[2, 0], [0, -1], [3, 2]], dtype=torch.int32)


def broken_plans() -> dict[str, RoutingPlan]:
    plan = plan_routing(IDS, 4)
    zero = plan.expert_offsets.new_zeros(1)
    slots = plan.slots
    return {
        "leading zero": RoutingPlan(slots, torch.cat((zero, plan.expert_offsets[:-1]))),
        "start offsets": RoutingPlan(slots, plan.expert_starts),
        "slot lost": RoutingPlan(slots[1:], plan.expert_offsets),
        "slot twice": RoutingPlan(torch.cat((slots[:1], slots[:-1])), plan.expert_offsets),
        "slots of two experts swapped": RoutingPlan(slots.roll(2), plan.expert_offsets),
        "dropped slot kept": RoutingPlan(slots, plan.expert_offsets + torch.tensor([0, 0, 0, 1])),
    }


@pytest.mark.parametrize("fault", broken_plans())
def test_a_broken_plan_is_caught(fault):
    check_conserved(plan_routing(IDS, 4), IDS, 4)
    with pytest.raises(ValueError):
        check_conserved(broken_plans()[fault], IDS, 4)


def test_a_dropped_expert_is_caught_over_ranks():
    placement = contiguous(4, 2)
    maps = [placement.expert_map(r).tensor.clone() for r in range(2)]
    maps[1][2] = -1
    plans = [plan_routing(IDS, 2, m) for m in maps]
    with pytest.raises(ValueError, match="token 0, expert 2: computed by 0 ranks"):
        check_conserved_over_ranks(plans, IDS)
    with pytest.raises(ValueError, match="expert 2: computed by 2 ranks"):
        check_conserved_over_ranks([plan_routing(IDS, 4)] * 2, IDS)


# --- no host read ---------------------------------------------------------------------------------

# Operators that copy a value or a data-dependent shape to the host.
READS = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "bincount",
    "unique",
    "_unique",
    "masked_select",
    "equal",
)


class Operators(TorchDispatchMode):
    """Lists the operators called, `index.bool` for indexing with a mask (it calls nonzero)."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("index", "index_put_") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            name += ".bool"
        self.names.append(name)
        return func(*args, **(kwargs or {}))

    def host_reads(self) -> list[str]:
        return [n for n in self.names if n.startswith(READS) or n.endswith(".bool")]


READERS = {
    "item": lambda ids: int(ids.max()),
    "bincount": lambda ids: torch.bincount(ids.flatten().clamp(min=0)),
    "nonzero": lambda ids: (ids >= 0).nonzero(),
    "mask": lambda ids: ids[ids >= 0],
    "unique": lambda ids: torch.unique(ids),
}


def test_no_operator_reads_the_host():
    expert_map = contiguous(4, 2).expert_map(1)
    with Operators() as seen:
        plan = plan_routing(IDS, 2, expert_map)
        _ = plan.counts
    assert seen.names
    assert seen.host_reads() == []


@pytest.mark.parametrize("reader", READERS)
def test_the_list_of_operators_shows_a_read(reader):
    with Operators() as seen:
        READERS[reader](IDS)
    assert seen.host_reads() != []


def test_planning_needs_no_data():
    """Fake tensors have shapes and no values: whatever runs on them reads none."""
    with FakeTensorMode() as mode:
        ids = mode.from_tensor(IDS)
        expert_map = mode.from_tensor(contiguous(4, 2).expert_map(1).tensor)
        plan = plan_routing(ids, 2, expert_map)
        shapes = [tuple(t.shape) for t in (plan.slots, plan.expert_offsets, plan.counts)]
        assert shapes == [(6,), (2,), (2,)]
        with pytest.raises(DynamicOutputShapeException):
            ids.nonzero()


@pytest.mark.gpu
def test_a_plan_is_captured_in_a_graph():
    ids = IDS.cuda()
    expert_map = contiguous(4, 2).expert_map(1).to("cuda")

    def step() -> list[torch.Tensor]:
        plan = plan_routing(ids, 2, expert_map)
        return [plan.slots, plan.expert_offsets, plan.expert_starts, plan.counts]

    step()  # warm-up: the first sort loads its kernel
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for other in (IDS.flip(0), torch.full_like(IDS, -1), torch.full_like(IDS, 3)):
        ids.copy_(other)
        graph.replay()
        for got, expected in zip(captured, step(), strict=True):
            assert torch.equal(got, expected)
