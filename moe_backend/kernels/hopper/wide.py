"""The host side of the NVFP4 GEMMs for many tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

import torch

from moe_backend.formats import Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper.sorted_tokens import PDL, combine, sort, view
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import Wide
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack


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
        "ACTIVATION": ACTIVATIONS[activation.kind], "CONSUMER_REGISTERS": 232,
        "COPY_REGISTERS": 40, "num_warps": 4, **PDL,
    }  # fmt: skip
    wide_device.gemm_kernel[(programs,)](
        view(ordered.operand, 128, 128), view(ordered.operand, 64, 128), _words(w13), w13_scale,
        w13_global, hidden, ordered.tiles, *constants, i, h, w13_scale.shape[2], hidden.shape[1],
        X_SLOTS=choice.stages13, GATED=True, **shared,
    )  # fmt: skip
    wide_device.gemm_kernel[(programs,)](
        view(hidden, 128, 128), view(hidden, 64, 128), _words(w2), w2_scale,
        w2_global, partial, ordered.tiles, *constants, h, i, w2_scale.shape[2], h,
        X_SLOTS=choice.stages2, GATED=False, **shared,
    )  # fmt: skip
    return combine(layer, ordered, partial)


def _words(codes: torch.Tensor) -> object:
    """All experts' rows of codes in words of eight; a copy brings eight rows of 32 words."""
    words = codes.view(torch.int32)
    return view(words.view(-1, words.shape[-1]), 8, 32)


def check(layer: LayerConfig, choice: Wide) -> None:
    """What the device code cannot take."""
    assert layer.format == Nvfp4Weights.name, "it decodes NVFP4 and nothing else"
    # Rows of codes begin at multiples of 16 bytes.
    for size in (layer.hidden_size, layer.intermediate_size):
        assert size % 32 == 0, "sizes are multiples of 32"
    for stages in (choice.stages13, choice.stages2):
        assert 2 <= stages <= 5, "both halves of a step, and no more than shared memory holds"
