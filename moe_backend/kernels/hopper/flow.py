"""The host side of both GEMMs in one launch, weights first. Safe in a CUDA graph."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from moe_backend.formats import Fp8BlockWeights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import (
    Argument,
    Kernel,
    Memory,
    TensorMap,
    carve,
    launch,
    packed,
)
from moe_backend.kernels.hopper.route import CHUNKS, Routed, combine, positions_of, route
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import SHARED_BYTES, Flow, flow_needs, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, FORMATS, unpack

SOURCE = Path(__file__).parent / "cuda" / "flow.cu"
# Tokens of a tile from which `streams` counts. Below FP8 gains a hundredth among layers of a model
# (four with skewed routing), and loses four where L2 is full of what has to be written back.
STREAMED_FROM = {Fp8BlockWeights.name: 32}


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    choice: Flow,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`."""
    tokens, slots = len(x), topk_ids.numel()
    if slots == 0:
        return torch.empty_like(x)
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    sms = multiprocessors(w13.device)
    x, ids, weights = packed(x), topk_ids.contiguous(), packed(topk_weights.float())
    kernel = _kernel(layer, choice)
    positions = positions_of(layer, slots)
    if layer.format == Fp8BlockWeights.name:
        wide, columns, scales = 1, i, cdiv(h, 128)  # bytes of an activation; a hidden row's columns
        groups = cdiv(i, 32 * choice.groups * choice.blocks)  # scales of a token, of a hidden row
        weight_scales: list[Argument] = [w13_scale, w2_scale]
        sides = w13_scale.shape[1] // 2, w13_scale.shape[2], w2_scale.shape[1], w2_scale.shape[2]
    else:
        wide, columns, scales, groups = 2, padded(i), 0, 0
        streamed = _streams(layer, choice)
        weight_scales = [
            gate_up_scales(w13_scale, choice.groups * choice.blocks, streamed),
            down_scales(w2_scale, choice.groups * choice.blocks, streamed),
        ]
        sides = 0, 0, 0, 0
    counters = 1 + e  # the next item, and how much of each expert's hidden columns is done
    whole, arrays = carve(
        w13.device, wide * tokens * h, 4 * scales * tokens, 4 * slots, 4 * positions,
        4 * (1 + 3 * e), 4 * CHUNKS * e, 4 * counters, wide * positions * columns,
        4 * groups * positions, 2 * positions * h,
    )  # fmt: skip
    operand, scale, position, token_of, experts, found, zeros, hidden, hidden_scale, partial = (
        arrays
    )
    out = torch.empty(tokens, h, dtype=x.dtype, device=x.device)
    to = Routed(operand, scale, position, token_of, experts, zeros, found)
    route(layer, x, weights, ids, expert_map, to, counters, sms)
    activation = layer.activation
    launch(
        kernel, sms, 128 * (choice.groups + 1),
        [*_maps(layer, choice, w13, w2, hidden, positions), *weight_scales, w13_global, w2_global,
         operand, scale, experts, token_of, zeros, hidden, hidden_scale, partial,
         activation.limit or 0.0, activation.alpha, activation.beta, h, columns, tokens, positions,
         *sides],
    )  # fmt: skip
    combine(layer, partial, position, weights, out, sms)
    del whole  # what is allocated next on this stream comes after these launches
    return out


@lru_cache
def _kernel(layer: LayerConfig, choice: Flow) -> Kernel:
    check(layer, choice)
    constants = {
        "FORMAT": FORMATS[layer.format],
        "WARP_GROUPS": choice.groups,
        "BLOCKS": choice.blocks,
        "MOST": choice.tokens,
        "STAGES": choice.stages,
        "EXPERTS": layer.num_local_experts,
        "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        "SHARED_BYTES": SHARED_BYTES,
        "STREAMED": int(_streams(layer, choice)),
    }
    if layer.format == Fp8BlockWeights.name:
        assert layer.w13_block is not None
        assert layer.w2_block is not None
        blocks = layer.w13_block + layer.w2_block
        constants |= zip(("N13", "K13", "N2", "K2"), blocks, strict=True)
        # Pays where an expert's hidden columns are one item: 1 to 3 % with 160 columns and 64 to
        # 2,048 tokens; with more items 1 to 4 % slower.
        columns = 32 * choice.groups * choice.blocks
        constants["INTERLEAVED"] = int(layer.intermediate_size <= columns)
    else:
        constants["INTERLEAVED"] = 0
    return Kernel(SOURCE, "flow", tuple(constants.items()), SHARED_BYTES)


def _streams(layer: LayerConfig, choice: Flow) -> bool:
    return streams(layer) and choice.tokens >= STREAMED_FROM.get(layer.format, 0)


def _maps(
    layer: LayerConfig,
    choice: Flow,
    w13: torch.Tensor,
    w2: torch.Tensor,
    hidden: torch.Tensor | Memory,
    positions: int,
) -> list[TensorMap]:
    """What the accelerator sees of w13, w2 and, twice, of the hidden columns; `cuda/flow.cu`."""
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    streamed = _streams(layer, choice)
    if layer.format == Fp8BlockWeights.name:
        turns_of_eight = TensorMap(
            w13, (h, 8, 2, i // 8, e), (h, i * h, 8 * h, 2 * i * h), (128, 8, 2, 4, 1), streamed
        )  # fmt: skip
        return [
            turns_of_eight, rows_of(w2, e * h, i, 64, streamed),
            rows_of(hidden, positions, i, 32), rows_of(hidden, positions, i, 8),
        ]  # fmt: skip
    columns = padded(i)
    # The last stride is less than the one before it. The CUDA driver takes that, though its header
    # wants strides that ascend.
    lines = TensorMap(hidden, (128, positions, columns // 64), (2 * columns, 128), (128, 8, 4))
    w2_rows = rows_of(w2, e * h, i // 2, 64, streamed)
    return [gate_up_codes(layer, w13, streamed), w2_rows, lines, lines]


def gate_up_codes(layer: LayerConfig, w13: torch.Tensor, streamed: bool) -> TensorMap:
    """What the accelerator sees of NVFP4's w13: of 32 hidden columns eight of each 64."""
    e, i, row = layer.num_local_experts, layer.intermediate_size, layer.hidden_size // 2
    strides = row, i * row, 64 * row, 2 * i * row
    return TensorMap(w13, (row, 64, 2, i // 64, e), strides, (128, 8, 2, 4, 1), streamed)


def gate_up_scales(scales: torch.Tensor, parts: int, streamed: bool) -> TensorMap:
    """Of w13's block scales (`codes.rearranged_scales`) those of an item's parts."""
    e, units, steps, size = scales.shape
    row = steps * size
    shape, strides = (size, units // 8, 8, steps, e), (8 * row, row, size, units * row)
    return TensorMap(scales, shape, strides, (size, 4, parts, 1, 1), streamed)


def down_scales(scales: torch.Tensor, parts: int, streamed: bool) -> TensorMap:
    """Of w2's block scales those of an item's rows."""
    e, units, steps, size = scales.shape
    shape, strides = (size, e * units, steps), (steps * size, size)
    return TensorMap(scales, shape, strides, (size, 4 * parts, 1), streamed)


def padded(columns: int) -> int:
    """Hidden columns as NVFP4's second GEMM reads them, in whole groups of the decoder's order."""
    return cdiv(columns, 256) * 256


def rows_of(
    matrix: torch.Tensor | Memory, rows: int, width: int, box: int, streamed: bool = False
) -> TensorMap:
    """Of rows of so many bytes, boxes of `box` rows and 128 bytes."""
    return TensorMap(matrix, (width, rows), (width,), (128, box), streamed)


def streams(layer: LayerConfig) -> bool:
    """Whether L2 gives FP8 or NVFP4 weights up first, so that tokens and outputs stay there.

    With experts spread over ranks: elsewhere each token has outputs of all its slots, more than L2
    holds (Step-3.5 on one rank with 4,096 tokens took 1 to 3 % longer). And where rows are whole
    lines of L2: in others neighbours share one, which is gone before the second wants it (up to
    16 % longer). Measured with experts over eight ranks.
    """
    codes = 1 if layer.format == Fp8BlockWeights.name else 2  # in a byte
    widths = layer.hidden_size // codes, layer.intermediate_size // codes
    return layer.expert_parallel and all(width % 128 == 0 for width in widths)


def check(layer: LayerConfig, choice: Flow) -> None:
    """Raises ValueError for what the device code cannot take."""
    for holds, wanted in flow_needs(layer, choice):
        require(holds, wanted)
