"""Grouped GEMM problems whose every sum is an integer that bf16 holds."""

from __future__ import annotations

import torch
from nvfp4_routings import random_routing

from moe_backend.formats import nvfp4
from moe_backend.kernels.nvfp4_rows import GroupedActivations
from moe_backend.layout.blocked_scales import BlockedScales
from moe_backend.layout.offsets import EndOffsets
from moe_backend.layout.routing import plan_routing
from moe_backend.layout.scale_assembly import assemble_scales


def integers(seed, k=192, n=128):
    """A routing: `(rows, weight, its scales, alpha, expected)`; rows of no expert are NaN."""
    ids, experts, _ = random_routing(seed)
    g = torch.Generator().manual_seed(seed)

    def operand(*shape):
        value = torch.randint(-1, 2, shape, generator=g).float()
        value *= torch.rand(shape, generator=g) < 0.2
        scale = torch.randint(1, 3, (*shape[:-1], shape[-1] // 16), generator=g).float()
        decoded = value * scale.repeat_interleave(16, -1)
        return nvfp4.pack(nvfp4.encode_e2m1(value)), scale.to(torch.float8_e4m3fn), decoded

    packed, scale, rows = operand(ids.numel(), k)
    weight, weight_scale, w = operand(experts, n, k)
    plan = plan_routing(ids, experts)
    offsets = EndOffsets(plan.expert_offsets)
    grouped = GroupedActivations(packed, assemble_scales(scale, offsets), torch.ones(1))
    alpha = torch.exp2(torch.randint(-1, 2, (experts,), generator=g).float())
    expected = torch.full((len(rows), n), torch.nan)
    start = 0
    for e, end in enumerate(offsets.tensor.tolist()):
        expected[start:end] = alpha[e] * (rows[start:end] @ w[e].T)
        start = end
    return grouped, weight, BlockedScales.of(weight_scale), alpha, expected
