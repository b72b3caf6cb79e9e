"""The host side of NVFP4's GEMMs for a few tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from moe_backend.formats import Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper import wide
from moe_backend.kernels.hopper.sorted_tokens import PDL, combine, sort_at_once, view
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import STREAM_STAGES, Stream, code_needs, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SHARED_BYTES = 113 * 1024  # half of what a multiprocessor has
ADDED = 4608  # bytes of it beside the ring: barriers, and what the compiler adds
PARTS = 2  # in which a program hands over its sums of a tile, see `share_device.py`
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
    from moe_backend.kernels.hopper import stream_nvfp4_device

    check(layer, choice)
    h, i, device = layer.hidden_size, layer.intermediate_size, x.device
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    programs = 2 * multiprocessors(device)
    # Of tiles that several programs work on.
    flags = torch.empty(2, programs, PARTS, dtype=torch.int32, device=device)
    sums = torch.empty(programs, PARTS, 64, choice.tokens, dtype=torch.float32, device=device)
    ordered = sort_at_once(layer, x, topk_weights, topk_ids, expert_map, choice.tokens, flags)
    positions = len(ordered.operand)
    hidden = torch.empty(positions, cdiv(i, 256) * 256, dtype=layer.torch_dtype, device=device)
    partial = torch.empty(positions, h, dtype=layer.torch_dtype, device=device)
    activation = layer.activation
    constants = activation.limit or 0.0, activation.alpha, activation.beta
    shared: dict[str, Any] = {
        "TOKENS": choice.tokens, "ACTIVATION": ACTIVATIONS[activation.kind], **REGISTERS, **PDL,
    }  # fmt: skip
    stream_nvfp4_device.gemm_kernel[(programs,)](
        view(ordered.operand, choice.tokens, 64), wide.gate_up_words(w13), w13_scale, w13_global,
        hidden, ordered.tiles, sums, flags[0], *constants, i, h, w13_scale.shape[2],
        hidden.shape[1], STAGES=choice.stages13, GATED=True, **shared,
    )  # fmt: skip
    stream_nvfp4_device.gemm_kernel[(programs,)](
        view(hidden, choice.tokens, 64), wide.down_words(w2), w2_scale, w2_global,
        partial, ordered.tiles, sums, flags[1], *constants, h, i, w2_scale.shape[2], h,
        STAGES=choice.stages2, GATED=False, **shared,
    )  # fmt: skip
    return combine(layer, ordered, partial)


def most_stages(tokens: int) -> int:
    """So that two programs share a multiprocessor."""
    return (SHARED_BYTES - ADDED) // (128 * 128 + tokens * 512)  # codes, tokens of a step


def check(layer: LayerConfig, choice: Stream) -> None:
    """Raises ValueError for what the device code cannot take."""
    require(layer.format == Nvfp4Weights.name, "NVFP4")
    require(choice.tokens in STREAM_STAGES, f"tiles of {sorted(STREAM_STAGES)} tokens")
    for holds, wanted in code_needs(layer):
        require(holds, wanted)
