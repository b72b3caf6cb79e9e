"""Routed activations in NVFP4, as a grouped GEMM takes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.layout.offsets import EndOffsets
from moe_backend.layout.routing import RoutingPlan
from moe_backend.layout.scale_assembly import GroupedScales, assemble_scales


@dataclass(frozen=True)
class GroupedActivations:
    """Rows of the sorted slots in NVFP4.

    Attributes:
        packed: `[slots, K/2]` uint8; rows of dropped slots, at the end, hold anything.
        scales: their block scales in 128x4 blocks, with the experts' offsets.
        global_scale: `[1]`, or `[slots, 1]` per token; float32, decode direction.
    """

    packed: torch.Tensor
    scales: GroupedScales
    global_scale: torch.Tensor

    def factor(self, weight_global_scale: torch.Tensor) -> torch.Tensor:
        """What the sums of a GEMM over these rows and unscaled weights are multiplied by."""
        return self.global_scale * weight_global_scale


def quantize_rows(
    x: torch.Tensor, plan: RoutingPlan, top_k: int, scale: ActivationScale
) -> GroupedActivations:
    """Gather the rows of every slot, quantise them and place their scales; no host read.

    One Triton kernel on a GPU (`triton/nvfp4_quantize.py`), the same in torch operations elsewhere.

    Args:
        x: `[T, K]`, K a multiple of 16.
        plan: the routing of `[T, top_k]` ids.
        top_k: slots per row; 1 where `x` has a row for every sorted slot already.
    """
    if x.is_cuda:
        from moe_backend.kernels.triton.nvfp4_quantize import quantize_routed

        return quantize_routed(x, plan, top_k, scale)
    fixed = scale if scale.per_token else ActivationScale(scale.resolve(x))
    rows = fixed.quantize(x[plan.slots // top_k])
    scales = assemble_scales(rows.scale, EndOffsets(plan.expert_offsets))
    return GroupedActivations(rows.packed, scales, rows.global_scale)
