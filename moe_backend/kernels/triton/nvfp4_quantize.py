"""Routed activations in NVFP4, ready for a grouped GEMM: one kernel, no host read.

The plain form is in `kernels/nvfp4_rows.py`, which calls this one on a GPU.
"""

from __future__ import annotations

import torch

from moe_backend.formats.nvfp4 import GROUP
from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.kernels.nvfp4_rows import GroupedActivations
from moe_backend.layout.blocked_scales import padded_columns
from moe_backend.layout.offsets import EndOffsets
from moe_backend.layout.routing import RoutingPlan
from moe_backend.layout.scale_assembly import GroupedScales, empty_grouped_scales

# 16 rows of 256 columns a program: 8 KiB of bf16, and whole 16-byte pieces of the scale blocks.
BLOCK_M, BLOCK_K = 16, 256


def quantize_routed(
    x: torch.Tensor,
    plan: RoutingPlan,
    top_k: int,
    scale: ActivationScale,
    *,
    packed: torch.Tensor | None = None,
    scale_data: torch.Tensor | None = None,
    block_m: int = BLOCK_M,
) -> GroupedActivations:
    """Gather the rows of every kept slot, quantise them and place their scales.

    Args:
        x: `[T, K]`, any float dtype, K a multiple of 16.
        plan: the routing of `[T, top_k]` ids.
        top_k: slots per row; 1 where `x` has a row for every slot.
        scale: where the global scale comes from.
        packed, scale_data: buffers to write, of the shapes in `GroupedActivations`.
        block_m: slots that a program handles, a power of two.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    import triton

    from moe_backend.kernels.triton.nvfp4_device import quantize_kernel

    slots, (_, k) = plan.slots.numel(), x.shape
    if k % GROUP:
        raise ValueError(f"NVFP4 needs rows of a multiple of {GROUP} values, got {k}")
    offsets = EndOffsets(plan.expert_offsets)
    columns = k // GROUP
    if packed is None:
        packed = torch.empty(slots, k // 2, dtype=torch.uint8, device=x.device)
    if scale_data is None:
        scale_data = empty_grouped_scales(slots, offsets, columns).data
    x = x.contiguous()
    global_scale = scale.resolve(x)
    per_token = global_scale.ndim == 2
    if slots:
        experts = plan.expert_offsets.numel()
        width = padded_columns(columns) * GROUP
        grid = (triton.cdiv(slots, block_m), triton.cdiv(width, BLOCK_K))
        quantize_kernel[grid](
            x, global_scale, plan.slots, plan.expert_offsets, packed, scale_data.view(torch.uint8),
            k, padded_columns(columns), x.stride(0), 1 if per_token else 0,
            TOP_K=top_k, EXPERTS=experts, EXPERTS_POWER=triton.next_power_of_2(experts),
            BLOCK_M=block_m, BLOCK_K=BLOCK_K,
        )  # fmt: skip
    if per_token:
        global_scale = global_scale[plan.slots // top_k]
    return GroupedActivations(packed, GroupedScales(scale_data, offsets, columns), global_scale)
