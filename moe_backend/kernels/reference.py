"""The experts in plain torch: the ground truth, and the default on a CPU.

Runs on any device and in any format. Tokens are grouped by expert; each expert that was hit is
dequantised once per call and multiplied as one matrix. It reads the group sizes back to the host,
so it cannot be captured in a CUDA graph.

Activations stay in `compute_dtype` unless `activation_quant` asks for the quantisation that W8A8
and W4A4 kernels do; that is how their results are predicted.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moe_backend.activation import Activation
from moe_backend.formats import Nvfp4Weights, Weights, weights_from_tensors
from moe_backend.kernels.registry import LayerConfig
from moe_backend.layout.routing import RoutingPlan, plan_routing

# Replaces activations `[rows, K]` by what a kernel that quantises them would see; the second
# argument is 1 for the input of w13, 2 for the input of w2.
ActivationQuant = Callable[[torch.Tensor, int], torch.Tensor]


def fused_experts(
    x: torch.Tensor,
    weights: Weights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    activation: Activation,
    expert_map: torch.Tensor | None = None,
    *,
    apply_router_weight_on_input: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    activation_quant: ActivationQuant | None = None,
    plan: RoutingPlan | None = None,
) -> torch.Tensor:
    """Sum over k of `topk_weights[t, k] * w2[e] @ act(w13[e] @ x[t])`, e = `topk_ids[t, k]`.

    Args:
        x: `[T, H]` float.
        topk_weights: `[T, top_k]` float32, already renormalised and scaled.
        topk_ids: `[T, top_k]` global ids; -1 is dropped.
        expert_map: `[num_experts]` global id to local slot or -1, None if all are local.
        apply_router_weight_on_input: multiply x instead of the output (top-1 models).
        compute_dtype: dtype of the matrix operands; sums are kept in fp32.
        activation_quant: what a kernel that quantises its activations would compute from.
        plan: the routing, if it is known already.
    Returns:
        `[T, H]` in the dtype of `x`.
    """
    tokens, top_k = topk_ids.shape
    if plan is None:
        plan = plan_routing(topk_ids, weights.num_experts, expert_map)
    out = torch.zeros(tokens, weights.hidden_size, dtype=torch.float32, device=x.device)
    operand = x.to(compute_dtype)
    slot_weights = topk_weights.float().flatten()
    start = 0
    for e, end in enumerate(plan.expert_offsets.tolist()):
        if start == end:
            continue
        slots = plan.slots[start:end]
        start = end
        rows = slots // top_k
        scale = slot_weights[slots, None]
        xe = operand[rows]
        if apply_router_weight_on_input:
            xe = (xe * scale).to(compute_dtype)
        ye = _expert(e, xe, weights, activation, activation_quant)
        out.index_add_(0, rows, ye if apply_router_weight_on_input else ye * scale)
    return out.to(x.dtype)


def _expert(
    e: int,
    xe: torch.Tensor,
    weights: Weights,
    activation: Activation,
    activation_quant: ActivationQuant | None,
) -> torch.Tensor:
    """One expert on `[rows, H]`; float32 `[rows, H]`."""
    dtype = xe.dtype
    if activation_quant is not None:
        xe = activation_quant(xe, 1).to(dtype)
    if isinstance(weights, Nvfp4Weights):
        # Exact decode; the global scales go into the epilogue, gate and up with their own.
        w13, w2 = weights.unscaled_expert(e, dtype)
        gate_scale, up_scale = weights.w13_global_scale[e]
        gate, up = F.linear(xe, w13).float().chunk(2, dim=-1)
        hidden = activation(gate * gate_scale, up * up_scale)
        out_scale = weights.w2_global_scale[e]
    else:
        w13, w2 = weights.expert(e, dtype)
        hidden = activation(*F.linear(xe, w13).chunk(2, dim=-1))
        out_scale = None
    if activation_quant is not None:
        hidden = activation_quant(hidden, 2)
    out = F.linear(hidden.to(dtype), w2).float()
    return out if out_scale is None else out * out_scale


class ReferenceKernel:
    """`fused_experts` behind the registry's interface, in the dtype of the activations."""

    name = "reference"
    graph_safe = False
    activations = "not quantised"

    def refusal(self, layer: LayerConfig) -> str | None:
        return None

    def preference(self, layer: LayerConfig) -> str:
        return "plain torch runs every format on every device"

    def activation_groups(self, layer: LayerConfig, tokens: int) -> tuple[int, int] | None:
        return None

    def warmup_tokens(self, layer: LayerConfig, max_tokens: int) -> list[int]:
        return []

    def prepare(self, weights: Weights) -> list[torch.Tensor | None]:
        return weights.tensors()

    def apply(
        self,
        layer: LayerConfig,
        tensors: list[torch.Tensor | None],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        return fused_experts(
            x,
            weights_from_tensors(layer.format, tensors, layer.w13_block, layer.w2_block),
            topk_weights,
            topk_ids,
            layer.activation,
            expert_map,
            apply_router_weight_on_input=layer.apply_router_weight_on_input,
            # NVFP4's products without their global scale overflow fp16's range.
            compute_dtype=torch.float32 if x.dtype == torch.float16 else x.dtype,
        )
