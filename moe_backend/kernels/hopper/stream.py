"""The host side of the FP8 GEMMs for a few tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper.sorted_tokens import PDL, SortedTokens, combine, view
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import Stream, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SHARED_BYTES = 113 * 1024  # half of what a multiprocessor has
COLUMNS = 64  # hidden columns that share a scale
SCALE_TOKENS = 32  # of whose scales a copy brings a step's
CHUNK = 256  # slots that a program of the routing looks at together
MOST_SLOTS = 2048  # each program of the routing looks through all of them
# Two programs share a multiprocessor: 80 registers a thread when they start, of which the copying
# warp leaves most to those that multiply.
REGISTERS = {"maxnreg": 80, "CONSUMER_REGISTERS": 104, "COPY_REGISTERS": 24, "num_warps": 4}


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    choice: Stream,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`."""
    from moe_backend.kernels.hopper import stream_device

    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    check(layer, choice)
    ordered = _plan(layer, x, topk_weights, topk_ids, expert_map, choice.tokens)
    positions = len(ordered.operand)
    hidden = torch.empty(positions, i, dtype=w13.dtype, device=x.device)
    hidden_scale = torch.empty(cdiv(i, COLUMNS), positions, dtype=torch.float32, device=x.device)
    partial = torch.empty(positions, h, dtype=x.dtype, device=x.device)
    activation = layer.activation
    constants = activation.limit or 0.0, activation.alpha, activation.beta
    programs = 2 * multiprocessors(x.device)
    shared: dict[str, Any] = {"TOKENS": choice.tokens, **REGISTERS, **PDL}
    stream_device.gate_up_kernel[(programs,)](
        view(ordered.operand, choice.tokens, 128), view(ordered.scale, 1, SCALE_TOKENS, swizzle=0),
        _turns_of_eight(w13, e, i, h), w13_scale, hidden, hidden_scale, ordered.tiles, *constants,
        i, h, w13_scale.shape[1] // 2, w13_scale.shape[2], positions,
        STAGES=choice.stages13, SCALE_N=layer.w13_block[0], SCALE_K=layer.w13_block[1],
        ACTIVATION=ACTIVATIONS[activation.kind], **shared,
    )  # fmt: skip
    stream_device.down_kernel[(programs,)](
        view(hidden, choice.tokens, 128), view(hidden_scale, 1, SCALE_TOKENS, swizzle=0),
        view(w2.view(-1, i), 64, 128), w2_scale, partial, ordered.tiles, h, i, w2_scale.shape[1],
        w2_scale.shape[2], STAGES=choice.stages2, SUB=min(COLUMNS, layer.w2_block[1]),
        SCALE_N=layer.w2_block[0], SCALE_K=layer.w2_block[1], **shared,
    )  # fmt: skip
    return combine(layer, ordered, partial)


def shared_bytes(tokens: int, stages: int, first: bool) -> int:
    """Of one program: the ring, for the first GEMM what one warp group hands to the other, and what
    the compiler adds."""
    scales = 1 if first else 2
    step = (2 * 64 + tokens) * 128
    slots = cdiv(scales * stages, 8) * 8 * 4 * SCALE_TOKENS
    return stages * step + slots + (2 * 64 * tokens * 4 if first else 0) + 4608


def most_stages(tokens: int, first: bool) -> int:
    """So that two programs share a multiprocessor."""
    return max(n for n in range(1, 8) if shared_bytes(tokens, n, first) <= SHARED_BYTES)


def default(tokens: int) -> Stream:
    """Tiles of so many tokens, with as many stages as there is room for."""
    return Stream(tokens, min(6, most_stages(tokens, True)), min(6, most_stages(tokens, False)))


def _plan(
    layer: LayerConfig,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tile_tokens: int,
) -> SortedTokens:
    """As `sorted_tokens.sort`, in one launch."""
    import triton

    from moe_backend.kernels.hopper import sort_device

    tokens, top_k = topk_ids.shape
    e, h, slots = layer.num_local_experts, layer.hidden_size, tokens * top_k

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    positions = cdiv(slots + 3 * min(e, slots), 4) * 4
    position = empty(slots, dtype=torch.int32)
    tiles = empty(1 + 3 * min(slots, slots // tile_tokens + e), dtype=torch.int32)
    operand = empty(positions, h, dtype=torch.float8_e4m3fn)
    scale = empty(cdiv(h, 128), positions, dtype=torch.float32)
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    sort_device.plan_kernel[(1 + tokens,)](
        x.contiguous(), ids, ids if expert_map is None else expert_map, weights, operand, scale,
        position, tiles, slots, e if expert_map is None else layer.num_experts, e, h, positions,
        HAS_MAP=expert_map is not None, WEIGHT_ON_INPUT=layer.apply_router_weight_on_input,
        TOP_K=top_k, KS=triton.next_power_of_2(top_k), CHUNK=CHUNK,
        EXPERTS=triton.next_power_of_2(e), GROUPS=triton.next_power_of_2(cdiv(h, 128)),
        TOKENS=tile_tokens, PDL=True, num_warps=4,
    )  # fmt: skip
    return SortedTokens(operand, scale, position, tiles, weights)


def _turns_of_eight(w13: torch.Tensor, e: int, i: int, h: int) -> Any:
    """`[experts, I / 8, (gate, up), 8, H]`, in boxes of 32 gate and 32 up rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=5)
    strides = [2 * i * h, 8 * h, i * h, h, 1]
    return TensorDescriptor(w13, [e, i // 8, 2, 8, h], strides, [1, 4, 2, 8, 128], layout)


def check(layer: LayerConfig, choice: Stream) -> None:
    """Raises ValueError for what the device code cannot take."""
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (n13, k13), (n2, k2) = layer.w13_block, layer.w2_block
    require(choice.tokens in (8, 16, 32), "tiles of 8, 16 or 32 tokens")
    require(layer.hidden_size % 128 == 0, "a hidden size that is a multiple of 128")
    require(n13 % 32 == 0, "one scale of w13 for 32 rows")
    require(k13 % 128 == 0, "one scale of w13 for a step of 128 columns")
    require(n2 % 64 == 0, "one scale of w2 for 64 rows")
    require(k2 % 64 == 0 or k2 == 32, "scales of w2 for 32 columns or multiples of 64")
