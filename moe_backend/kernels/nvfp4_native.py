"""NVFP4 activations times NVFP4 weights on Blackwell (W4A4), in the precision of the checkpoint.

Route, quantise and place scales, GEMM, activation, quantise, GEMM, weigh and sum; no host read. The
GEMM is `nvfp4_gemm.grouped_gemm`. Gate and up have their own global scales, but the GEMM takes one
factor per expert: it gets the activations' scale, and the two weight scales multiply its output in
fp32 on the way into the activation. That costs the rounding of its bf16 output and nothing else.

Never chosen by itself: it has not run on hardware, and W4A16 is closer to the model.
`MOE_BACKEND_KERNEL=nvfp4_native` asks for it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from moe_backend.formats import Nvfp4Weights, Weights
from moe_backend.formats.nvfp4 import GROUP
from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.kernels.nvfp4_gemm import (
    K_MULTIPLE,
    N_MULTIPLE,
    VllmOp,
    grouped_gemm,
    installed_op,
)
from moe_backend.kernels.nvfp4_rows import quantize_rows
from moe_backend.kernels.registry import LayerConfig
from moe_backend.layout.blocked_scales import BlockedScales
from moe_backend.layout.routing import RoutingPlan, local_ids, plan_routing

W4A4 = "nvfp4"


class Nvfp4NativeKernel:
    """W4A4 behind the registry's interface."""

    name = "nvfp4_native"
    graph_safe = True
    activations = W4A4

    def __init__(self, op: VllmOp | None = None) -> None:
        """`op` stands in for vLLM's; None takes vLLM's where there is one."""
        self.op = op

    def refusal(self, layer: LayerConfig) -> str | None:
        if layer.format != Nvfp4Weights.name:
            return f"it takes NVFP4 weights, not {layer.format}"
        if layer.dtype != "bfloat16":
            return f"it takes bf16 activations, not {layer.dtype}"
        if layer.apply_router_weight_on_input:
            return "routing weights on the input are not wired to it"
        if self.op is not None:
            return None
        if layer.device != "cuda" or torch.version.hip:
            return "it runs on Blackwell GPUs only"
        if torch.cuda.get_device_capability()[0] != 10:
            return "it runs on GPUs of compute capability 10 only"
        return None

    def preference(self, layer: LayerConfig) -> str:
        return "weights and activations in 4 bits, as the checkpoint was calibrated"

    def activation_groups(self, layer: LayerConfig, tokens: int) -> tuple[int, int] | None:
        return None

    def warmup_tokens(self, layer: LayerConfig, max_tokens: int) -> list[int]:
        return []  # vLLM's operators in it cannot be run without the launches before them

    def prepare(self, weights: Weights) -> list[torch.Tensor | None]:
        """Padded weights with their scales in 128x4 blocks, in the order of `Weights.tensors()`.

        Raises:
            ValueError: the checkpoint quantises no activations, so this kernel would not compute
                what it was made for.
        """
        assert isinstance(weights, Nvfp4Weights)
        if weights.w13_input_scale is None or weights.w2_input_scale is None:
            raise ValueError(
                "kernel nvfp4_native quantises activations, and this checkpoint is weight-only "
                "(W4A16). Use another kernel."
            )
        w = pad_experts(weights)
        return replace(
            w,
            w13_scale=BlockedScales.of(w.w13_scale).data,
            w2_scale=BlockedScales.of(w.w2_scale).data,
        ).tensors()

    def apply(
        self,
        layer: LayerConfig,
        tensors: list[torch.Tensor | None],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        present: list[torch.Tensor] = [t for t in tensors if t is not None]
        w13, s13, g13, w2, s2, g2, input13, input2 = present
        op = self.op or installed_op()
        top_k = topk_ids.shape[1]
        hidden_size, padded_i = 2 * w13.shape[2], 2 * w2.shape[2]
        plan = plan_routing(topk_ids, len(w13), expert_map)
        ends = plan.expert_offsets
        position = torch.arange(len(plan.slots), device=x.device)
        kept = (position < ends[-1])[:, None]
        expert = torch.searchsorted(ends.long(), position, right=True).clamp(max=len(w13) - 1)

        padded = F.pad(x, (0, hidden_size - x.shape[1]))
        rows = quantize_rows(padded, plan, top_k, ActivationScale.from_engine(input13))
        blocks = BlockedScales(s13, w13.shape[1], hidden_size // GROUP)
        ones = torch.ones_like(g2[:, 0])
        sums = grouped_gemm(rows, w13, blocks, rows.factor(ones), op).float()
        gate, up = (sums * g13[expert].repeat_interleave(padded_i, 1)).chunk(2, dim=1)
        hidden = torch.where(kept, layer.activation(gate, up), 0.0)

        in_order = RoutingPlan(position, ends)
        rows = quantize_rows(hidden, in_order, 1, ActivationScale.from_engine(input2))
        blocks = BlockedScales(s2, w2.shape[1], padded_i // GROUP)
        sums = grouped_gemm(rows, w2, blocks, rows.factor(g2[:, 0]), op)

        # Back to the order of the tokens; in a fixed order of k, so that runs repeat bit for bit.
        by_slot = torch.empty_like(sums).index_copy_(0, plan.slots, sums)
        by_token = by_slot.view(*topk_ids.shape, w2.shape[1])[..., : layer.hidden_size].float()
        mine = local_ids(topk_ids, layer.num_local_experts, expert_map)[..., None] >= 0
        weighted = torch.where(mine, by_token * topk_weights.float()[..., None], 0.0)
        return weighted.sum(1).to(x.dtype)


def pad_experts(w: Nvfp4Weights) -> Nvfp4Weights:
    """Zero rows and columns up to sizes that the GEMM addresses rightly; in rows that lie one after
    another.

    The hidden size is a column count of w13 and a row count of w2, so it becomes a multiple of 128.
    The intermediate size becomes one of 64: w13 has two such row ranges. A padded gate and up are
    zero, and so is every activation of this package at zero: padded columns of w2 meet zeros.
    """
    assert N_MULTIPLE == 2 * K_MULTIPLE
    h, i = w.hidden_size, w.intermediate_size
    more_h, more_i = -h % N_MULTIPLE, -i % K_MULTIPLE
    if not more_h and not more_i:
        return replace(w, w13=w.w13.contiguous(), w2=w.w2.contiguous())

    def halves(t: torch.Tensor, columns: int) -> torch.Tensor:
        split = t.view(t.shape[0], 2, i, -1)
        return F.pad(split, (0, columns, 0, more_i)).flatten(1, 2)

    return replace(
        w,
        w13=halves(w.w13, more_h // 2),
        w13_scale=halves(w.w13_scale.view(torch.uint8), more_h // GROUP).view(w.w13_scale.dtype),
        w2=F.pad(w.w2, (0, more_i // 2, 0, more_h)),
        w2_scale=F.pad(w.w2_scale.view(torch.uint8), (0, more_i // GROUP, 0, more_h)).view(
            w.w2_scale.dtype
        ),
    )
