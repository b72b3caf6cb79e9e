"""NVFP4 on a GPU: the fused quantisation, captured in a graph and replayed with other routings."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from nvfp4_routings import check_against_loop
from nvfp4_triton import SCALES, check

from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.kernels.triton.nvfp4_quantize import quantize_routed
from moe_backend.layout.offsets import EndOffsets
from moe_backend.layout.routing import plan_routing
from moe_backend.layout.scale_assembly import assemble_scales


@pytest.mark.parametrize("block", range(10))
def test_thousand_random_routings(block):
    for seed in range(100 * block, 100 * block + 100):
        check(seed, "cuda")


def routings(tokens, experts, top_k):
    """Very different ones: spread, all on one expert, half dropped, none at all."""
    g = torch.Generator().manual_seed(0)
    spread = torch.rand(tokens, experts, generator=g).argsort(1)[:, :top_k].int()
    one = torch.full_like(spread, experts - 1)
    half = torch.where(torch.rand(spread.shape, generator=g) < 0.5, -1, spread)
    return [spread, one, half, torch.full_like(spread, -1), spread.flip(0)]


@pytest.mark.parametrize("fused", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("scale", SCALES[:3], ids=["tensor", "token", "static"])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 8, 2), (64, 32, 4), (300, 8, 2)])
def test_graph_replays_with_other_routings(tokens, experts, top_k, scale, fused):
    """One capture; each replay is checked against a loop over experts, in poisoned buffers."""
    if scale.static is not None:
        scale = ActivationScale(scale.static.cuda())
    k = 176  # 11 scales a row: one padding column
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    ids = torch.zeros(tokens, top_k, dtype=torch.int32, device="cuda")

    def run():
        plan = plan_routing(ids, experts)
        if fused:
            out = quantize_routed(x, plan, top_k, scale)
            return plan, out.packed, out.scales
        rows = scale.quantize(x[plan.slots // top_k])
        return plan, rows.packed, assemble_scales(rows.scale, EndOffsets(plan.expert_offsets))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan, packed, scales = run()
    for seed, routing in enumerate(routings(tokens, experts, top_k)):
        fresh = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).bfloat16()
        x.copy_(fresh)
        ids.copy_(routing)
        packed.fill_(0xAA)
        scales.data.view(torch.uint8).fill_(0x7F)
        graph.replay()
        slots = torch.arange(tokens * top_k, device="cuda")
        # The torch form measures the rows of all slots, which are the rows of x.
        expected = scale if scale.per_token else ActivationScale(scale.resolve(x))
        quantised = expected.quantize(x[slots // top_k])
        kept = int(plan.expert_offsets[-1])
        assert torch.equal(packed[:kept], quantised.packed[plan.slots[:kept]])
        byte = quantised.scale.view(torch.uint8).cpu()
        check_against_loop(scales.data.cpu(), routing, experts, byte)
