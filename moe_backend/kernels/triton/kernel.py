"""The host side of the Triton kernels: shapes, tiles, launches. Safe to capture in a CUDA graph.

Weights are multiplied in bf16 with activations as they are (W8A16, W4A16), so results agree with
the reference kernel to bf16 rounding.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_backend.activation import ActivationKind
from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights, Weights
from moe_backend.formats.fp8_block import by, cdiv
from moe_backend.kernels.registry import LayerConfig, in_rows
from moe_backend.kernels.variants import MULTIPLE, candidates
from moe_backend.layout.routing import RoutingPlan, local_ids, plan_routing

# Outputs before the sum over top-k are fp32; 2**27 of them are half a GiB, 4096 tokens of Step-3.5.
PARTIAL_ELEMENTS = 2**27

FORMATS = {Bf16Weights.name: 0, Fp8BlockWeights.name: 1, Nvfp4Weights.name: 2}
ACTIVATIONS = {
    ActivationKind.SILU: 0,
    ActivationKind.SWIGLUSTEP: 1,
    ActivationKind.CLAMPED_SILU: 2,
    ActivationKind.SWIGLUOAI_UNINTERLEAVE: 3,
}


def in_slices(
    run: Callable[..., torch.Tensor],
    elements: int,
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """`run` over slices of the tokens, so that outputs before the sum are at most `elements`."""
    step = slice_tokens(layer, elements)
    if len(x) <= step:
        return run(layer, tensors, x, topk_weights, topk_ids, expert_map)
    parts = zip(x.split(step), topk_weights.split(step), topk_ids.split(step), strict=True)
    return torch.cat([run(layer, tensors, *part, expert_map) for part in parts])


def slice_tokens(layer: LayerConfig, elements: int) -> int:
    """Tokens of one slice; a multiple of 16, so that every slice starts at an aligned address."""
    step = elements // (layer.top_k * layer.hidden_size)
    return max(1, step - step % MULTIPLE if step > MULTIPLE else step)


@dataclass(frozen=True)
class Blocks:
    """Tile sizes: slots, output columns, depth of each GEMM; and the launch's warps and stages."""

    m: int
    n: int
    k13: int
    k2: int
    warps: int
    stages: int


class TritonKernel:
    """`device.gate_up_kernel`, `down_kernel` and `sum_kernel` behind the registry's interface."""

    name = "triton"
    graph_safe = True
    activations = "not quantised"

    def refusal(self, layer: LayerConfig) -> str | None:
        if layer.device != "cuda":
            return "it runs on GPUs only"
        if torch.version.hip:
            return "it has not been checked on AMD GPUs"
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if layer.dtype not in ("bfloat16", "float16"):
            return f"it takes bf16 or fp16 activations, not {layer.dtype}"
        for block in (layer.w13_block, layer.w2_block):
            if block is not None and (block[1] < 16 or block[1].bit_count() != 1):
                return f"a block's columns must be a power of two from 16, not {by(block)}"
        return None

    def preference(self, layer: LayerConfig) -> str:
        return "Triton runs every format and activation, also in CUDA graphs"

    def activation_groups(self, layer: LayerConfig, tokens: int) -> tuple[int, int] | None:
        return None

    def warmup_tokens(self, layer: LayerConfig, max_tokens: int) -> list[int]:
        most = min(max_tokens, slice_tokens(layer, PARTIAL_ELEMENTS))
        return candidates(layer, most, lambda tokens: blocks(layer, tokens))

    def prepare(self, weights: Weights) -> list[torch.Tensor | None]:
        return in_rows(weights)

    def apply(
        self,
        layer: LayerConfig,
        tensors: list[torch.Tensor | None],
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        expert_map: torch.Tensor | None,
    ) -> torch.Tensor:
        return in_slices(
            run, PARTIAL_ELEMENTS, layer, tensors, x, topk_weights, topk_ids, expert_map
        )


def blocks(layer: LayerConfig, tokens: int) -> Blocks:
    """Tile sizes by the average number of slots that an expert gets."""
    per_expert = tokens * layer.top_k / layer.num_experts
    m = 16 if per_expert <= 16 else 32 if per_expert <= 48 else 64
    k13 = k2 = 64 if layer.format == Bf16Weights.name else 128
    if layer.w13_block is not None and layer.w2_block is not None:
        # One scale per depth step.
        k13, k2 = min(128, layer.w13_block[1]), min(128, layer.w2_block[1])
    return Blocks(m=m, n=64, k13=k13, k2=k2, warps=4, stages=3)


def tiles(
    plan: RoutingPlan, slots: int, num_local_experts: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert (-1 for unused tiles) and first sorted position of every tile; no host read.

    There are at most `slots // block_m + min(slots, num_local_experts)` tiles: each expert that is
    hit wastes less than one.
    """
    ends = plan.expert_offsets.long()
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    tile_ends = ((ends - starts + block_m - 1) // block_m).cumsum(0)
    count = slots // block_m + min(slots, num_local_experts)
    tile = torch.arange(count, device=ends.device)
    expert = torch.searchsorted(tile_ends, tile, right=True)
    used = expert < num_local_experts
    expert = torch.where(used, expert, 0)
    tile_starts = torch.cat((tile_ends.new_zeros(1), tile_ends[:-1]))
    first = starts[expert] + (tile - tile_starts[expert]) * block_m
    return torch.where(used, expert, -1).int(), torch.where(used, first, 0).int()


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`."""
    import triton.language as tl

    from moe_backend.kernels.triton import device

    tokens, top_k = topk_ids.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    if tokens == 0:
        return out
    h, i, slots = layer.hidden_size, layer.intermediate_size, tokens * top_k
    block = blocks(layer, tokens)
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    plan = plan_routing(topk_ids, layer.num_local_experts, expert_map)
    tile_expert, tile_first = tiles(plan, slots, layer.num_local_experts, block.m)
    weights = topk_weights.float().contiguous()
    hidden = torch.empty(slots, i, dtype=x.dtype, device=x.device)
    partial = torch.empty(slots, h, dtype=torch.float32, device=x.device)
    n13, s13 = layer.w13_block or (1, 16)
    n2, s2 = layer.w2_block or (1, 16)
    compute = tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    shared = {
        "FORMAT": FORMATS[layer.format],
        "WEIGHT_ON_INPUT": layer.apply_router_weight_on_input,
        "BLOCK_M": block.m,
        "BLOCK_N": block.n,
        "COMPUTE": compute,
        "num_warps": block.warps,
        "num_stages": block.stages,
    }
    activation = layer.activation
    device.gate_up_kernel[(len(tile_expert), cdiv(i, block.n))](
        x, w13, w13_scale, w13_global, weights, hidden,
        plan.slots, plan.expert_offsets, tile_expert, tile_first,
        activation.limit or 0.0, activation.alpha, activation.beta,
        h, i, x.stride(0), w13.stride(0), w13.stride(1), *_strides(w13_scale),
        TOP_K=top_k, ACTIVATION=ACTIVATIONS[activation.kind],
        SCALE_N=n13, SCALE_K=s13, BLOCK_K=block.k13, **shared,
    )  # fmt: skip
    device.down_kernel[(len(tile_expert), cdiv(h, block.n))](
        hidden, w2, w2_scale, w2_global, weights, partial,
        plan.slots, plan.expert_offsets, tile_expert, tile_first,
        h, i, w2.stride(0), w2.stride(1), *_strides(w2_scale),
        SCALE_N=n2, SCALE_K=s2, BLOCK_K=block.k2, **shared,
    )  # fmt: skip
    ids = local_ids(topk_ids, layer.num_local_experts, expert_map).contiguous()
    device.sum_kernel[(tokens, cdiv(h, 1024))](partial, ids, out, h, TOP_K=top_k, BLOCK=1024)
    return out


def unpack(layer: LayerConfig, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """w13, its scale and global scale, w2 likewise; absent ones stand for themselves by `w13`."""
    w13 = tensors[0]
    if layer.format == Bf16Weights.name:
        given = [w13, w13, w13, tensors[1], w13, w13]
    elif layer.format == Fp8BlockWeights.name:
        given = [w13, tensors[1], w13, tensors[2], tensors[3], w13]
    else:
        given = tensors[:6]
    assert all(t is not None for t in given)
    return given  # type: ignore[return-value]


def _strides(scale: torch.Tensor) -> tuple[int, int]:
    return scale.stride(0), scale.stride(1)
