"""The host side of the GEMMs for a few tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper import wide
from moe_backend.kernels.hopper.sorted_tokens import PDL, SortedTokens, combine, view
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import Stream, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SHARED_BYTES = 113 * 1024  # half of what a multiprocessor has
COLUMNS = 64  # hidden columns that share a scale
SCALE_TOKENS = 32  # of whose scales a copy brings a step's
CHUNK = 256  # slots that a program of the routing looks at together
MOST_SLOTS = 8192  # each program of the routing looks through all of them
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
    check(layer, choice)
    ordered = _plan(layer, x, topk_weights, topk_ids, expert_map, choice.tokens)
    gemms = _fp8 if layer.format == Fp8BlockWeights.name else _nvfp4
    return combine(layer, ordered, gemms(layer, tensors, ordered, choice, x))


def _fp8(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    ordered: SortedTokens,
    choice: Stream,
    x: torch.Tensor,
) -> torch.Tensor:
    """`[positions, H]`: both GEMMs."""
    from moe_backend.kernels.hopper import stream_device

    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    positions = len(ordered.operand)
    hidden = torch.empty(positions, i, dtype=w13.dtype, device=x.device)
    hidden_scale = torch.empty(cdiv(i, COLUMNS), positions, dtype=torch.float32, device=x.device)
    partial = torch.empty(positions, h, dtype=x.dtype, device=x.device)
    programs = 2 * multiprocessors(x.device)
    shared: dict[str, Any] = {"TOKENS": choice.tokens, **REGISTERS, **PDL}
    stream_device.gate_up_kernel[(programs,)](
        view(ordered.operand, choice.tokens, 128), view(ordered.scale, 1, SCALE_TOKENS, swizzle=0),
        _turns_of_eight(w13, e, i, h), w13_scale, hidden, hidden_scale, ordered.tiles,
        *_constants(layer), i, h, w13_scale.shape[1] // 2, w13_scale.shape[2], positions,
        STAGES=choice.stages13, SCALE_N=layer.w13_block[0], SCALE_K=layer.w13_block[1],
        ACTIVATION=ACTIVATIONS[layer.activation.kind], **shared,
    )  # fmt: skip
    stream_device.down_kernel[(programs,)](
        view(hidden, choice.tokens, 128), view(hidden_scale, 1, SCALE_TOKENS, swizzle=0),
        view(w2.view(-1, i), 64, 128), w2_scale, partial, ordered.tiles, h, i, w2_scale.shape[1],
        w2_scale.shape[2], STAGES=choice.stages2, SUB=min(COLUMNS, layer.w2_block[1]),
        SCALE_N=layer.w2_block[0], SCALE_K=layer.w2_block[1], **shared,
    )  # fmt: skip
    return partial


def _nvfp4(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    ordered: SortedTokens,
    choice: Stream,
    x: torch.Tensor,
) -> torch.Tensor:
    """`[positions, H]`: both GEMMs."""
    from moe_backend.kernels.hopper import stream_nvfp4_device

    h, i = layer.hidden_size, layer.intermediate_size
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    positions = len(ordered.operand)
    hidden = torch.empty(positions, cdiv(i, 256) * 256, dtype=x.dtype, device=x.device)
    partial = torch.empty(positions, h, dtype=x.dtype, device=x.device)
    programs = 2 * multiprocessors(x.device)
    shared: dict[str, Any] = {
        "TOKENS": choice.tokens, "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        **REGISTERS, **PDL,
    }  # fmt: skip
    constants = _constants(layer)
    stream_nvfp4_device.gemm_kernel[(programs,)](
        view(ordered.operand, choice.tokens, 64), wide.gate_up_words(w13), w13_scale, w13_global,
        hidden, ordered.tiles, *constants, i, h, w13_scale.shape[2], hidden.shape[1],
        STAGES=choice.stages13, GATED=True, **shared,
    )  # fmt: skip
    stream_nvfp4_device.gemm_kernel[(programs,)](
        view(hidden, choice.tokens, 64), wide.down_words(w2), w2_scale, w2_global,
        partial, ordered.tiles, *constants, h, i, w2_scale.shape[2], h,
        STAGES=choice.stages2, GATED=False, **shared,
    )  # fmt: skip
    return partial


def _constants(layer: LayerConfig) -> tuple[float, float, float]:
    return layer.activation.limit or 0.0, layer.activation.alpha, layer.activation.beta


def most_stages(layer: LayerConfig, tokens: int, first: bool) -> int:
    """So that two programs share a multiprocessor."""
    return max(n for n in range(1, 8) if _shared(layer, tokens, n, first) <= SHARED_BYTES)


def _shared(layer: LayerConfig, tokens: int, stages: int, first: bool) -> int:
    """Of one program: the ring, and what the compiler adds.

    For FP8, also the tokens' scales, and what one warp group hands to the other in the first GEMM.
    """
    added = 4608
    if layer.format == Nvfp4Weights.name:
        return stages * (128 * 128 + tokens * 512) + added
    scales = cdiv((1 if first else 2) * stages, 8) * 8 * 4 * SCALE_TOKENS
    handed = 2 * 64 * tokens * 4 if first else 0
    return stages * (128 + tokens) * 128 + scales + handed + added


def default(layer: LayerConfig, tokens: int) -> Stream:
    """Tiles of so many tokens, with as many stages as there is room for, up to six."""
    first, second = (min(6, most_stages(layer, tokens, gated)) for gated in (True, False))
    return Stream(tokens, first, second)


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
    fp8 = layer.format == Fp8BlockWeights.name
    width = h if fp8 else cdiv(h, 256) * 256

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    positions = cdiv(slots + 3 * min(e, slots), 4) * 4
    position = empty(slots, dtype=torch.int32)
    tiles = empty(1 + 3 * min(slots, slots // tile_tokens + e), dtype=torch.int32)
    operand = empty(positions, width, dtype=torch.float8_e4m3fn if fp8 else x.dtype)
    scale = empty(cdiv(h, 128) if fp8 else 0, positions, dtype=torch.float32)
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    sort_device.plan_kernel[(1 + tokens,)](
        x.contiguous(), ids, ids if expert_map is None else expert_map, weights, operand, scale,
        position, tiles, slots, e if expert_map is None else layer.num_experts, e, h, width,
        positions, QUANTISED=fp8, HAS_MAP=expert_map is not None,
        WEIGHT_ON_INPUT=layer.apply_router_weight_on_input, TOP_K=top_k,
        KS=triton.next_power_of_2(top_k), CHUNK=CHUNK,
        EXPERTS=triton.next_power_of_2(e), GROUPS=triton.next_power_of_2(cdiv(width, 128)),
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
    require(choice.tokens in (8, 16, 32), "tiles of 8, 16 or 32 tokens")
    if layer.format == Nvfp4Weights.name:
        wide.check_sizes(layer)
        return
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (n13, k13), (n2, k2) = layer.w13_block, layer.w2_block
    require(layer.hidden_size % 128 == 0, "a hidden size that is a multiple of 128")
    require(n13 % 32 == 0, "one scale of w13 for 32 rows")
    require(k13 % 128 == 0, "one scale of w13 for a step of 128 columns")
    require(n2 % 64 == 0, "one scale of w2 for 64 rows")
    require(k2 % 64 == 0 or k2 == 32, "scales of w2 for 32 columns or multiples of 64")
