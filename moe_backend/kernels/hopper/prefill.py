"""The host side of the FP8 GEMMs for many tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

import torch

from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper.sorted_tokens import PDL, TILE_TOKENS, combine, sort, view
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import Prefill, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    choice: Prefill,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`."""
    from moe_backend.kernels.hopper import prefill_device

    h, i = layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    check(layer, choice)
    half, outputs = choice.hidden, choice.outputs // 2
    ordered = sort(layer, x, topk_weights, topk_ids, expert_map)
    positions = len(ordered.operand)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    hidden = empty(positions, i, dtype=w13.dtype)
    hidden_scale = empty(cdiv(i, half), positions, dtype=torch.float32)
    partial = empty(positions, h, dtype=x.dtype)
    activation = layer.activation
    constants = activation.limit or 0.0, activation.alpha, activation.beta
    programs = multiprocessors(x.device)
    shared = {
        "STEP": 128, "ACTIVATION": ACTIVATIONS[activation.kind],
        "CONSUMER_REGISTERS": 240, "COPY_REGISTERS": 24, "num_warps": 4, **PDL,
    }  # fmt: skip
    prefill_device.gemm_kernel[(programs,)](
        view(ordered.operand, 64, 128), view(ordered.scale, 1, TILE_TOKENS, swizzle=0),
        view(w13.view(-1, h), half, 128), w13_scale, hidden, hidden_scale, ordered.tiles,
        *constants, i, h, w13_scale.shape[1] // 2, w13_scale.shape[2], positions,
        HALF=half, SUB=min(128, layer.w13_block[1]), STAGES=choice.stages13, GATED=True, GROUP=128,
        SCALE_N=layer.w13_block[0], SCALE_K=layer.w13_block[1], **shared,
    )  # fmt: skip
    prefill_device.gemm_kernel[(programs,)](
        view(hidden, 64, 128), view(hidden_scale, 1, TILE_TOKENS, swizzle=0),
        view(w2.view(-1, i), outputs, 128), w2_scale, partial, hidden_scale, ordered.tiles,
        *constants, h, i, w2_scale.shape[1], w2_scale.shape[2], positions,
        HALF=outputs, SUB=min(half, layer.w2_block[1]), STAGES=choice.stages2, GATED=False,
        GROUP=half, SCALE_N=layer.w2_block[0], SCALE_K=layer.w2_block[1], **shared,
    )  # fmt: skip
    return combine(layer, ordered, partial)


def check(layer: LayerConfig, choice: Prefill) -> None:
    """Raises ValueError for tiles that the device code would multiply with the wrong scale."""
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (n13, k13), (n2, k2) = layer.w13_block, layer.w2_block
    require(choice.hidden in (64, 128), "hidden of 64 or 128")
    require(choice.outputs in (128, 256), "outputs of 128 or 256")
    for wide, rows in ((choice.hidden, n13), (choice.outputs // 2, n2)):
        # 64 rows have one scale or several whole ones; 128 rows share those of their first half.
        whole = rows % wide == 0 or (wide == 64 and 64 % rows == 0)
        require(whole, "whole scales for a tile's rows")
    for columns in (k13, k2):
        require(columns % 128 == 0 or 128 % columns == 0, "one scale for a part of a step")
