"""NVFP4 on a GPU: the fused quantisation, captured in a graph and replayed with other routings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from nvfp4_integers import integers
from nvfp4_routings import check_against_loop
from nvfp4_triton import SCALES, check
from test_nvfp4_accuracy import exact_decode, setting, snr

from moe_backend.formats.folding import fold
from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.nvfp4_gemm import grouped_gemm
from moe_backend.kernels.nvfp4_native import Nvfp4NativeKernel
from moe_backend.kernels.nvfp4_rows import GroupedActivations
from moe_backend.kernels.triton.nvfp4_gemm import grouped_gemm_op
from moe_backend.kernels.triton.nvfp4_quantize import quantize_routed
from moe_backend.layout.blocked_scales import BlockedScales
from moe_backend.layout.offsets import EndOffsets
from moe_backend.layout.routing import plan_routing
from moe_backend.layout.scale_assembly import GroupedScales, assemble_scales
from moe_backend.nvfp4_paths import Nvfp4Path, PathChoice, prepare
from moe_backend.verify.metrics import difference
from moe_backend.verify.w4a4 import CASE, quantised_problem


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


# --- The grouped GEMM; on Hopper it decodes what Blackwell's instruction takes --------------------


@pytest.mark.parametrize("seed", range(24))
def test_grouped_gemm_is_exact_on_integers(seed):
    k, n = (64, 128, 192)[seed % 3], (128, 256)[seed // 3 % 2]
    rows, weight, scales, alpha, expected = integers(seed, k, n)
    s = rows.scales
    there = GroupedActivations(
        rows.packed.cuda(),
        GroupedScales(s.data.cuda(), EndOffsets(s.offsets.tensor.cuda()), s.columns),
        rows.global_scale.cuda(),
    )
    blocks = BlockedScales(scales.data.cuda(), scales.rows, scales.columns)
    out = grouped_gemm(there, weight.cuda(), blocks, alpha.cuda(), grouped_gemm_op)
    kept = int(s.offsets.tensor[-1])
    assert torch.equal(out[:kept].float().cpu(), expected[:kept])


NATIVE_CASES = [
    CASE,
    replace(CASE, layout="ep"),
    replace(CASE, layout="dropped", tokens=200, num_experts=4),
    replace(CASE, tokens=1),
]


def native(case):
    """`(kernel, problem, prepared tensors and inputs on the GPU)`."""
    p = quantised_problem(case)
    kernel = Nvfp4NativeKernel(grouped_gemm_op)
    tensors = [t.cuda() for t in kernel.prepare(p.weights)]
    expert_map = None if p.expert_map is None else p.expert_map.cuda()
    given = [p.x.cuda(), p.topk_weights.cuda(), p.topk_ids.cuda(), expert_map]
    return kernel, p, tensors, given


@pytest.mark.parametrize("case", NATIVE_CASES, ids=lambda c: c.name)
def test_native_kernel_computes_the_quantised_experts(case):
    kernel, p, tensors, given = native(case)
    out = kernel.apply(p.layer, tensors, *given)
    assert difference(out, p.reference).within(0.05, norm=0.01)
    assert torch.equal(kernel.apply(p.layer, tensors, *given), out)


def test_native_kernel_in_a_graph_with_other_routings():
    kernel, p, tensors, given = native(CASE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernel.apply(p.layer, tensors, *given)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernel.apply(p.layer, tensors, *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.apply(p.layer, tensors, *given)
    for routing in routings(CASE.tokens, CASE.num_experts, CASE.top_k):
        given[2].copy_(routing)
        graph.replay()
        replayed = out.clone()
        assert torch.equal(replayed, kernel.apply(p.layer, tensors, *given))
        assert replayed.isfinite().all()


# --- Packed and folded ----------------------------------------------------------------------------


def moved(weights):
    tensors = {n: t.cuda() for n, t in vars(weights).items() if isinstance(t, torch.Tensor)}
    return replace(weights, **tensors)


@pytest.mark.parametrize("path", list(Nvfp4Path))
def test_accuracy_of_each_path(path):
    """The thresholds of test_nvfp4_accuracy.py, with the kernel that a GPU gets."""
    p, _ = setting()
    layer = replace(p.layer, device="cuda")
    ready = prepare(layer, moved(p.weights), PathChoice(path, "test"))
    fused = FusedMoE(ready.layer, ready.weights)
    out = fused(p.x.cuda(), p.topk_weights.cuda(), p.topk_ids.cuda())
    allowed = 1.0 if path is Nvfp4Path.FOLDED else 0.1
    assert snr(out) > exact_decode() - allowed


def test_folding_is_the_same_and_takes_one_matrix_more():
    """Bit for bit what a CPU makes of it; beside both forms, a few fp32 copies of one matrix."""
    weights = setting()[0].weights
    expected, cost = fold(weights)
    on_gpu = moved(weights)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    folded, cost_there = fold(on_gpu)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    for there, here in zip(folded.tensors(), expected.tensors(), strict=True):
        assert torch.equal(there.cpu().view(torch.uint8), here.view(torch.uint8))
    assert cost_there.exact == cost.exact
    kept = sum(t.numel() * t.element_size() for t in folded.tensors())
    matrix = 4 * weights.hidden_size * weights.intermediate_size
    assert peak < kept + 16 * matrix
