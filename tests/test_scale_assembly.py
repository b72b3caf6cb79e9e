"""Assembly of routed scales: against a loop over experts, without host reads, in tight buffers."""

from __future__ import annotations

import pytest
import torch
from nvfp4_routings import check_against_loop, random_routing
from torch.utils._python_dispatch import TorchDispatchMode

from moe_backend.layout.blocked_scales import padded_columns
from moe_backend.layout.offsets import EndOffsets, StartOffsets
from moe_backend.layout.routing import plan_routing
from moe_backend.layout.scale_assembly import assemble_scales, max_scale_rows


@pytest.mark.parametrize("block", range(10))
def test_thousand_random_routings(block):
    for seed in range(100 * block, 100 * block + 100):
        ids, experts, scales = random_routing(seed)
        plan = plan_routing(ids, experts)
        offsets = EndOffsets(plan.expert_offsets)
        poisoned = scales.clone()
        poisoned[ids.flatten() < 0] = 0x7F  # NaN, where nothing may read
        grouped = assemble_scales(poisoned[plan.slots].view(torch.float8_e4m3fn), offsets)
        rows = max_scale_rows(ids.numel(), experts)
        assert grouped.data.numel() == rows * padded_columns(scales.shape[1])
        assert not grouped.data.float().isnan().any()
        check_against_loop(grouped.data, ids, experts, scales)
        back = grouped.linear(ids.numel()).view(torch.uint8)
        kept = int(offsets.tensor[-1])
        assert torch.equal(back[:kept], scales[plan.slots][:kept])
        assert not back[kept:].any()


def rows_of(counts):
    return sum(-(-c // 128) * 128 for c in counts)


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_buffer_is_tight(experts):
    """The bound is attained, and no split of the slots exceeds it."""
    for slots in [*range(9), 127, 128, 129, 130, 131, 256, 257, 260, 383, 384, 385]:
        hit = min(experts, slots)
        if hit:
            blocks = (slots - hit) // 128
            first = 1 + 128 * blocks
            worst = [first] + [1] * (hit - 1)
            assert sum(worst) <= slots
            assert rows_of(worst) == max_scale_rows(slots, experts)
        g = torch.Generator().manual_seed(slots)
        for _ in range(200):
            ids = torch.randint(experts, (slots,), generator=g)
            assert rows_of(ids.bincount(minlength=experts).tolist()) <= max_scale_rows(
                slots, experts
            )


def test_ends_as_starts_counts_and_padded():
    ends = EndOffsets(torch.tensor([3, 3, 131, 131, 260], dtype=torch.int32))
    starts = ends.starts()
    assert starts.tensor.tolist() == [0, 3, 3, 131, 131, 260]
    assert isinstance(starts, StartOffsets)
    assert ends.counts().tolist() == [3, 0, 128, 0, 129]
    assert ends.padded(128).tensor.tolist() == [128, 128, 256, 256, 512]
    assert ends.padded(128).tensor.dtype == torch.int32


# --- Nothing is read back to the host ------------------------------------------------------------


def assemble(ids, scales, experts):
    plan = plan_routing(ids, experts)
    return assemble_scales(scales[plan.slots], EndOffsets(plan.expert_offsets)).data


def reads_size(ids, scales, experts):
    return scales[: int(plan_routing(ids, experts).expert_offsets[-1])]


def counts_with_bincount(ids, scales, experts):
    return torch.bincount(ids.flatten(), minlength=experts)


def selects_by_mask(ids, scales, experts):
    return scales[ids.flatten() >= 0]


def copies_to_host(ids, scales, experts):
    return plan_routing(ids, experts).expert_offsets.cpu()


class Trace(TorchDispatchMode):
    """Names of the ops that ran."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def without_data(function):
    """Run on meta tensors, which have no data: whatever would read a value raises."""
    with Trace() as trace:
        ids = torch.empty(33, 4, dtype=torch.int32, device="meta")
        scales = torch.empty(132, 7, dtype=torch.float8_e4m3fn, device="meta")
        assert function(ids, scales, 8).device.type == "meta"
    return trace.ops


def test_assembly_reads_nothing_back():
    ops = without_data(assemble)
    assert len(ops) > 20
    assert set(ops) & {"_local_scalar_dense", "item", "nonzero", "bincount", "is_nonzero"} == set()


@pytest.mark.parametrize(
    "function", [reads_size, counts_with_bincount, selects_by_mask, copies_to_host]
)
def test_the_trace_flags_host_reads(function):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta|Meta"):
        without_data(function)
