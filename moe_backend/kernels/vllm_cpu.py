"""vLLM's own CPU kernel, called through the op that its extension registers.

It handles bf16 and silu without expert parallelism, which is a small part of what this package
serves, but there it decodes faster than plain torch (`benchmarks/cpu_kernels.py`). The op is
found by name, so this module needs no vLLM import. Read in source: vLLM 0.32
`model_executor/layers/fused_moe/experts/cpu_moe.py`; an id of -1 makes the op write outside its
buffers (seen: heap corruption), so dropped slots are sent to expert 0 with weight 0.
"""

from __future__ import annotations

import torch

from moe_backend.activation import ActivationKind
from moe_backend.formats import Bf16Weights, Weights
from moe_backend.kernels.registry import LayerConfig

ALIGNMENT = 32


class VllmCpuKernel:
    """`torch.ops._C.cpu_fused_moe` on prepacked weights."""

    name = "vllm_cpu"
    graph_safe = False
    activations = "not quantised"

    def refusal(self, layer: LayerConfig) -> str | None:
        if layer.device != "cpu":
            return "it runs on CPUs only"
        if not (
            hasattr(torch.ops._C, "cpu_fused_moe") and hasattr(torch.ops._C, "prepack_moe_weight")
        ):
            return "vLLM's CPU extension is not loaded"
        if layer.format != Bf16Weights.name or layer.dtype != "bfloat16":
            return f"it takes bf16 weights and activations, not {layer.format} and {layer.dtype}"
        if layer.activation.kind is not ActivationKind.SILU:
            return f"it has no {layer.activation.kind}"
        if layer.expert_parallel:
            return "it has no expert map"
        if layer.apply_router_weight_on_input:
            return "routing weights on the input are not wired to it"
        if layer.hidden_size % ALIGNMENT or layer.intermediate_size % ALIGNMENT:
            return f"hidden and intermediate sizes must be multiples of {ALIGNMENT}"
        return None

    def preference(self, layer: LayerConfig) -> str:
        return "vLLM's CPU kernel is the faster one for bf16 silu up to 30 tokens per expert"

    def activation_groups(self, layer: LayerConfig, tokens: int) -> tuple[int, int] | None:
        return None

    def warmup_tokens(self, layer: LayerConfig, max_tokens: int) -> list[int]:
        return []

    def prepare(self, weights: Weights) -> list[torch.Tensor | None]:
        assert isinstance(weights, Bf16Weights)
        return [_prepack(weights.w13), _prepack(weights.w2)]

    def apply(
        self,
        layer: LayerConfig,
        tensors: list[torch.Tensor | None],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        assert expert_map is None
        weights, ids = topk_weights.float().contiguous(), topk_ids.int().contiguous()
        dropped = (ids < 0) | (ids >= layer.num_experts)
        if bool(dropped.any()):
            weights = weights.masked_fill(dropped, 0.0)
            ids = ids.masked_fill(dropped, 0)
        x = x.contiguous()
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(
            out,
            x,
            tensors[0],
            tensors[1],
            None,
            None,
            weights,
            ids,
            False,
            "silu",
            _isa(),
        )
        return out


def _isa() -> str:
    """The instruction set whose micro-kernels fit this processor, in vLLM's words."""
    return "amx" if torch.cpu._is_amx_tile_supported() else "vec"


def _prepack(weight: torch.Tensor) -> torch.Tensor:
    packed = torch.empty_like(weight)
    torch.ops._C.prepack_moe_weight(weight.contiguous(), packed, _isa())
    return packed
