"""What runs in a live vLLM engine: the kernel and layout of every layer class, per worker."""

from __future__ import annotations

from typing import Any

from moe_backend.engines.vllm_experts import BlockscaleExperts


def describe_layers(worker: Any) -> dict[str, list[str]]:
    """Description to names of the layers that it holds for, in one worker.

    For `LLM.collective_rpc(describe_layers)`, which wants VLLM_ALLOW_INSECURE_SERIALIZATION=1
    where workers are processes of their own.
    """
    found: dict[str, list[str]] = {}
    for module in worker.model_runner.model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(method, "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if isinstance(experts, BlockscaleExperts) and experts.fused_moe is not None:
            found.setdefault(experts.fused_moe.describe(), []).append(module.layer_name)
    return found
