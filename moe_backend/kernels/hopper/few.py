"""The host side of the two launches for few tokens. Safe in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from moe_backend.formats import Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import Few, Part
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, FORMATS, unpack


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    few: Few,
    *,
    on_gpu: bool = True,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`.

    Args:
        few: how the rows are dealt out.
        on_gpu: False for Triton's interpreter: no PTX, no overlapped launches.
    """
    import triton

    from moe_backend.kernels.hopper import few_device

    tokens, top_k = topk_ids.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    if tokens == 0:
        return out
    h, i, slots = layer.hidden_size, layer.intermediate_size, tokens * top_k
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    n13, k13 = layer.w13_block or (1, 16)
    n2, k2 = layer.w2_block or (1, 16)
    hidden = torch.empty(slots, i, dtype=x.dtype, device=x.device)
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    table = ids if expert_map is None else expert_map
    pairs = x.dtype
    if layer.format == Nvfp4Weights.name:
        # Bytes of words of codes; each byte meets a word of two activations.
        w13, w2, pairs = w13.view(torch.uint8), w2.view(torch.uint8), torch.int32
    shared: dict[str, Any] = {
        "TOP_K": top_k,
        "IDS": layer.num_local_experts if expert_map is None else layer.num_experts,
        "HAS_MAP": expert_map is not None,
        "WEIGHT_ON_INPUT": layer.apply_router_weight_on_input,
        "FORMAT": FORMATS[layer.format],
        "PTX": on_gpu,
        "PDL": on_gpu,
        "HALF": x.dtype == torch.float16,
    }
    overlap: dict[str, Any] = {"launch_pdl": True} if on_gpu else {}
    activation = layer.activation
    blocks = cdiv(i, few.gate_up.groups)
    programs = few.per_sm * (multiprocessors(x.device) if on_gpu else 1)
    few_device.gate_up_kernel[(min(slots * blocks, programs),)](
        x.view(pairs), w13, w13_scale, w13_global, weights, ids, table, hidden,
        activation.limit or 0.0, activation.alpha, activation.beta, slots, h, i,
        SLOTS=max(32, triton.next_power_of_2(slots)), ACTIVATION=ACTIVATIONS[activation.kind],
        SCALE_N=n13, SCALE_K=k13, **_launch(few.gate_up), **shared,
    )  # fmt: skip
    programs = cdiv(cdiv(h, 2 * few.down.groups), few.repeat)
    few_device.down_kernel[(tokens * programs,)](
        hidden.view(pairs), w2, w2_scale, w2_global, weights, ids, table, out,
        programs, h, i,
        SLOTS=max(32, triton.next_power_of_2(top_k)), SCALE_N=n2, SCALE_K=k2,
        **_launch(few.down), **shared, **overlap,
    )  # fmt: skip
    return out


def _launch(part: Part) -> dict[str, int]:
    return {
        "GROUPS": part.groups,
        "LANES": part.lanes,
        "UNROLL": part.unroll,
        "num_warps": part.warps,
    }
