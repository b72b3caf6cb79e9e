"""The host side of `sort_device.py`: what the GEMMs for many tokens have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_backend.formats import Fp8BlockWeights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.registry import LayerConfig

TILE_TOKENS = 128
CHUNK = 512  # slots that one program of the routing sorts
CHUNK_AT_ONCE = 256  # slots that each program looks at together where one launch does it all
# Not for the first launch: it reads the routing at once, so it must wait for what came before it,
# as launches do. Overlapped, it may read ids that are still to come.
PDL: dict[str, Any] = {"PDL": True, "launch_pdl": True}


@dataclass(frozen=True)
class SortedTokens:
    """Slots by expert, every expert from a position that is a multiple of 4 on.

    Attributes:
        operand: `[positions, columns]`; e4m3 for FP8, else bf16 in the order of
            `device._nvfp4_position` and with zeros up to a multiple of 256 columns.
        scale: `[columns / 128, positions]` fp32 of an e4m3 operand.
        position: `[slots]` int32, -1 for dropped ones.
        tiles: int32, how many and of each three numbers: expert, first position, the expert's end
            position; from `sort_at_once` four: which of its expert's tiles came first of all.
        weights: `[tokens, top_k]` fp32 routing weights.
    """

    operand: torch.Tensor
    scale: torch.Tensor
    position: torch.Tensor
    tiles: torch.Tensor
    weights: torch.Tensor


def positions_of(layer: LayerConfig, slots: int) -> int:
    """Room for so many slots whichever experts they go to, each from a multiple of 4 on."""
    return cdiv(slots + 3 * min(layer.num_local_experts, slots), 4) * 4


def sort(
    layer: LayerConfig,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
) -> SortedTokens:
    """Tokens as the first GEMM wants them; arguments as in `registry.Kernel.apply`."""
    import triton

    from moe_backend.kernels.hopper import sort_device

    tokens, top_k = topk_ids.shape
    e, h, slots = layer.num_local_experts, layer.hidden_size, tokens * top_k
    fp8 = layer.format == Fp8BlockWeights.name

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    positions = positions_of(layer, slots)
    chunks = cdiv(slots, CHUNK)
    bins = triton.next_power_of_2(e + 1)
    columns = min(64, bins)
    width = h if fp8 else cdiv(h, 256) * 256
    local, rank, position = empty(3, slots, dtype=torch.int32)
    counts, base = empty(2, chunks, bins, dtype=torch.int32)
    tiles = empty(1 + 3 * (slots // TILE_TOKENS + e), dtype=torch.int32)
    operand = empty(positions, width, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    scale = empty(cdiv(h, 128) if fp8 else 0, positions, dtype=torch.float32)
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    sort_device.rank_kernel[(chunks,)](
        ids, ids if expert_map is None else expert_map, local, rank, counts, slots,
        e if expert_map is None else layer.num_experts, HAS_MAP=expert_map is not None,
        CHUNK=CHUNK, BINS=bins, num_warps=4, PDL=True,
    )  # fmt: skip
    sort_device.place_kernel[(cdiv(e, columns),)](
        counts, base, tiles, e, chunks, CHUNKS=triton.next_power_of_2(chunks), BINS=bins,
        COLUMNS=columns, TOKENS=TILE_TOKENS, num_warps=8, **PDL,
    )  # fmt: skip
    sort_device.permute_kernel[(tokens,)](
        x.contiguous(), weights, local, rank, base, position, operand, scale, h, width, positions,
        QUANTISED=fp8, WEIGHT_ON_INPUT=layer.apply_router_weight_on_input,
        TOP_K=top_k, CHUNK=CHUNK, BINS=bins, GROUPS=triton.next_power_of_2(cdiv(width, 128)),
        num_warps=4, **PDL,
    )  # fmt: skip
    return SortedTokens(operand, scale, position, tiles, weights)


def sort_at_once(
    layer: LayerConfig,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tile_tokens: int,
    flags: torch.Tensor,
) -> SortedTokens:
    """As `sort`, in one launch, for so few slots that each program may look through all; not FP8.

    Args:
        tile_tokens: tokens of a tile at most.
        flags: int32, zeros afterwards.
    """
    import triton

    from moe_backend.kernels.hopper import sort_device

    tokens, top_k = topk_ids.shape
    e, h, slots = layer.num_local_experts, layer.hidden_size, tokens * top_k
    width = cdiv(h, 256) * 256

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    positions = positions_of(layer, slots)
    position = empty(slots, dtype=torch.int32)
    tiles = empty(1 + 4 * min(slots, slots // tile_tokens + e), dtype=torch.int32)
    operand = empty(positions, width, dtype=x.dtype)
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    sort_device.plan_kernel[(1 + tokens,)](
        x.contiguous(), ids, ids if expert_map is None else expert_map, weights, operand, position,
        tiles, flags, slots, e if expert_map is None else layer.num_experts, h, width,
        flags.numel(), HAS_MAP=expert_map is not None,
        WEIGHT_ON_INPUT=layer.apply_router_weight_on_input, TOP_K=top_k,
        KS=triton.next_power_of_2(top_k), CHUNK=CHUNK_AT_ONCE,
        EXPERTS=triton.next_power_of_2(e), GROUPS=triton.next_power_of_2(cdiv(width, 128)),
        TOKENS=tile_tokens, PDL=True, num_warps=4,
    )  # fmt: skip
    return SortedTokens(operand, empty(0, positions, dtype=torch.float32), position, tiles, weights)


def combine(layer: LayerConfig, tokens: SortedTokens, partial: torch.Tensor) -> torch.Tensor:
    """`[T, H]` sums over top_k of `partial`, `[positions, H]`, with the routing weights."""
    import triton

    from moe_backend.kernels.hopper import sort_device

    h = layer.hidden_size
    count, top_k = tokens.weights.shape
    out = torch.empty(count, h, dtype=partial.dtype, device=partial.device)
    block = min(4096, triton.next_power_of_2(h))
    sort_device.combine_kernel[(count, cdiv(h, block))](
        partial, tokens.position, tokens.weights, out, h, TOP_K=top_k,
        WEIGHT_ON_INPUT=layer.apply_router_weight_on_input, BLOCK=block, num_warps=8, **PDL,
    )  # fmt: skip
    return out


def view(tensor: torch.Tensor, *box: int, swizzle: int = 128) -> Any:
    """What the memory accelerator reads, with the box of one copy."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(
        swizzle_byte_width=swizzle, element_bitwidth=8 * tensor.element_size(), rank=2
    )
    return TensorDescriptor.from_tensor(tensor, list(box), layout)
