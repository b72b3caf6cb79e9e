"""The host side of the NVFP4 GEMMs for many tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

import torch

from moe_backend.formats import Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper.sorted_tokens import PDL, TILE_TOKENS, combine, sort, view
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import Wide, code_needs, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SLOTS = 6  # of 32 KiB each; the rest of shared memory is for outputs on their way


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    choice: Wide,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`."""
    from moe_backend.kernels.hopper import wide_device

    check(layer, choice)
    h, i = layer.hidden_size, layer.intermediate_size
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    ordered = sort(layer, x, topk_weights, topk_ids, expert_map)
    positions = len(ordered.operand)
    hidden = torch.empty(positions, cdiv(i, 256) * 256, dtype=x.dtype, device=x.device)
    partial = torch.empty(positions, h, dtype=x.dtype, device=x.device)
    activation = layer.activation
    constants = activation.limit or 0.0, activation.alpha, activation.beta
    programs = multiprocessors(x.device)
    shared = {
        "X_SLOTS": choice.tokens, "W_SLOTS": choice.codes,
        "ACTIVATION": ACTIVATIONS[activation.kind], "CONSUMER_REGISTERS": 240,
        "COPY_REGISTERS": 24, "num_warps": 4, **PDL,
    }  # fmt: skip
    wide_device.gemm_kernel[(programs,)](
        *_tokens(ordered.operand), gate_up_words(w13), w13_scale, w13_global, hidden,
        ordered.tiles, *constants, i, h, w13_scale.shape[2], hidden.shape[1],
        GATED=True, **shared,
    )  # fmt: skip
    wide_device.gemm_kernel[(programs,)](
        *_tokens(hidden), down_words(w2), w2_scale, w2_global, partial,
        ordered.tiles, *constants, h, i, w2_scale.shape[2], h,
        GATED=False, **shared,
    )  # fmt: skip
    return combine(layer, ordered, partial)


def _tokens(operand: torch.Tensor) -> tuple[object, ...]:
    """Views with boxes for all tokens of a tile, half and a quarter of them."""
    most = TILE_TOKENS
    return tuple(view(operand, tokens, 64) for tokens in (most, most // 2, most // 4))


def gate_up_words(w13: torch.Tensor) -> object:
    """`[groups of 64 rows, (gate, up), 64, H / 8]` words, from an expert's gate rows on.

    Groups that would begin in the last expert's up rows have none 64 rows further on.
    """
    experts, rows, columns = w13.shape[0], w13.shape[1] // 2, w13.shape[2] // 4
    shape = [(2 * experts - 1) * rows // 64, 2, 64, columns]
    return _boxes(w13, shape, [64 * columns, rows * columns, columns, 1])


def down_words(w2: torch.Tensor) -> object:
    """`[groups of 16 rows, 2, 8, I / 8]` words."""
    columns = w2.shape[2] // 4
    shape = [w2.shape[0] * w2.shape[1] // 16, 2, 8, columns]
    return _boxes(w2, shape, [16 * columns, 8 * columns, columns, 1])


def _boxes(codes: torch.Tensor, shape: list[int], strides: list[int]) -> object:
    """Words of eight codes; a copy brings four groups of two times eight rows of 32."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=4)
    return TensorDescriptor(codes.view(torch.int32), shape, strides, [4, 2, 8, 32], layout)


def check(layer: LayerConfig, choice: Wide) -> None:
    """Raises ValueError for what the device code cannot take."""
    require(layer.format == Nvfp4Weights.name, "NVFP4")
    for holds, wanted in code_needs(layer):
        require(holds, wanted)
    require(choice.tokens >= 2, "room for both halves of a step's tokens")
    require(choice.codes >= 1, "room for a step's codes")
    require(choice.tokens + choice.codes <= SLOTS, f"room for at most {SLOTS} tokens and codes")
