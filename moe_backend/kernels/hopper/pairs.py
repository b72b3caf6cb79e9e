"""The host side of the GEMMs for many tokens, by pairs of blocks. Safe in a CUDA graph."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import Kernel, Memory, TensorMap, carve, launch, packed
from moe_backend.kernels.hopper.flow import (
    down_scales,
    gate_up_codes,
    gate_up_scales,
    padded,
    rows_of,
    streams,
)
from moe_backend.kernels.hopper.route import (
    CHUNKS,
    Spread,
    combine,
    lone_slots,
    positions_of,
    spread,
)
from moe_backend.kernels.hopper.tiled import multiprocessors, scale_shape
from moe_backend.kernels.hopper.tiles import (
    PAIRS_TOKENS,
    SHARED_BYTES,
    Pairs,
    pairs_code_stages,
    pairs_needs,
    require,
)
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

FOLDER = Path(__file__).parent / "cuda"
THREADS = 384
GROUP = 128  # hidden columns that share a scale
KERNELS = {
    Bf16Weights.name: "pairs_bf16",
    Fp8BlockWeights.name: "pairs_fp8",
    Nvfp4Weights.name: "pairs_nvfp4",
}
# Rows of a copy: with FP8, of NVFP4's w2, of tokens of the other formats, and of bf16's weights.
FP8_BOX, W2_BOX, TOKEN_BOX, BF16_ROWS = 64, 64, 16, 256
PARTS = 4  # of 64 weight rows, of an item with NVFP4
Arguments = tuple[list[Any], list[Any]]  # of the first and of the second GEMM's launch


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    choice: Pairs,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`."""
    tokens, slots = len(x), topk_ids.numel()
    if slots == 0:
        return torch.empty_like(x)
    quantised, nvfp4 = (layer.format == f.name for f in (Fp8BlockWeights, Nvfp4Weights))
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, *_ = tensors
    assert w13 is not None
    sms = multiprocessors(w13.device)
    x, ids, weights = packed(x), topk_ids.contiguous(), packed(topk_weights.float())
    positions = positions_of(layer, slots)
    wide = 1 if quantised else 2  # bytes of an activation
    columns = padded(i) if nvfp4 else i  # of a hidden row
    scales, groups = (cdiv(h, 128), cdiv(i, GROUP)) if quantised else (0, 0)  # of a row
    past = 4 * 128  # a tile's scales are copied whole, also where positions end
    whole, (operand, scale, position, targets, experts, count, hidden, hidden_scale, partial) = (
        carve(
            w13.device, wide * positions * h, 4 * scales * positions + past, 4 * slots,
            8 * positions, 4 * (1 + 3 * e), 4 * CHUNKS * e, wide * positions * columns,
            4 * groups * positions + past, 2 * positions * h,
        )
    )  # fmt: skip
    out = torch.empty(tokens, h, dtype=x.dtype, device=x.device)
    to = Spread(operand, scale, position, targets, experts, count)
    spread(layer, x, weights, ids, expert_map, to, sms, positions)
    between = Between(operand, scale, experts, hidden, hidden_scale, partial)
    given = ARGUMENTS[layer.format](layer, tensors, between, positions)
    alone = lone_slots(layer, expert_map)
    for kernel, its in zip(_kernels(layer, choice, alone), given, strict=True):
        launch(kernel, sms // 2 * 2, THREADS, [*its, targets, out])
    combine(layer, partial, position, weights, out, sms, alone)
    del whole  # what is allocated next on this stream comes after these launches
    return out


class Between(NamedTuple):
    """What lies between routing and sum: memory as `spread` writes it, and what the GEMMs make."""

    operand: Memory
    scale: Memory
    experts: Memory
    hidden: Memory
    hidden_scale: Memory
    partial: Memory


def _fp8_arguments(
    layer: LayerConfig, tensors: list[torch.Tensor | None], between: Between, positions: int
) -> Arguments:
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    operand, scale, experts, hidden, hidden_scale, partial = between
    constants, streamed = _constants(layer), streams(layer)
    return (
        [rows_of(operand, positions, h, FP8_BOX), _matrices(w13, 2 * e, i, h, FP8_BOX, streamed),
         scale, w13_scale, experts, hidden, hidden_scale, *constants, i, h, positions,
         *scale_shape(layer, w13_scale, 2)],
        [rows_of(hidden, positions, i, FP8_BOX), _matrices(w2, e, h, i, FP8_BOX, streamed),
         hidden_scale, w2_scale, experts, partial, hidden_scale, *constants, h, i, positions,
         *scale_shape(layer, w2_scale, 1)],
    )  # fmt: skip


def _bf16_arguments(
    layer: LayerConfig, tensors: list[torch.Tensor | None], between: Between, positions: int
) -> Arguments:
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, _, _, w2, _, _ = unpack(layer, tensors)
    operand, _, experts, hidden, _, partial = between
    constants, row = _constants(layer), 2 * h
    # Of an item's 128 hidden columns eight gate and eight up rows in turn.
    strides = row, i * row, 8 * row, 2 * i * row
    gate_up = TensorMap(w13, (row, 8, 2, i // 8, e), strides, (128, 8, 2, BF16_ROWS // 16, 1))
    return (
        [rows_of(operand, positions, row, TOKEN_BOX), gate_up, experts, hidden, *constants, i, h],
        [rows_of(hidden, positions, 2 * i, TOKEN_BOX), _matrices(w2, e, h, 2 * i, BF16_ROWS),
         experts, partial, *constants, h, i],
    )  # fmt: skip


def _nvfp4_arguments(
    layer: LayerConfig, tensors: list[torch.Tensor | None], between: Between, positions: int
) -> Arguments:
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    operand, _, experts, hidden, _, partial = between
    constants, columns, streamed = _constants(layer), padded(i), streams(layer)
    return (
        [rows_of(operand, positions, 2 * h, TOKEN_BOX), gate_up_codes(layer, w13, streamed),
         gate_up_scales(w13_scale, PARTS, streamed), w13_global, experts, hidden, *constants,
         columns, h],
        [rows_of(hidden, positions, 2 * columns, TOKEN_BOX),
         rows_of(w2, e * h, i // 2, W2_BOX, streamed), down_scales(w2_scale, PARTS, streamed),
         w2_global, experts, partial, *constants, h, columns],
    )  # fmt: skip


ARGUMENTS = {
    Bf16Weights.name: _bf16_arguments,
    Fp8BlockWeights.name: _fp8_arguments,
    Nvfp4Weights.name: _nvfp4_arguments,
}


def _constants(layer: LayerConfig) -> tuple[float, float, float]:
    """The activation's."""
    activation = layer.activation
    return activation.limit or 0.0, activation.alpha, activation.beta


@lru_cache
def _kernels(layer: LayerConfig, choice: Pairs, lone: bool) -> list[Kernel]:
    """Of the first and of the second GEMM; whether outputs have targets."""
    check(layer, choice)
    name = KERNELS[layer.format]
    constants = {
        "EXPERTS": layer.num_local_experts,
        "STAGES": choice.stages,
        "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        "SHARED_BYTES": SHARED_BYTES,
    }
    if layer.format in PAIRS_TOKENS:
        constants["TILE"] = PAIRS_TOKENS[layer.format]
    if layer.format != Bf16Weights.name:
        constants["STREAMED"] = int(streams(layer))
    if layer.format == Nvfp4Weights.name:
        constants["CODES"] = pairs_code_stages(layer, choice)
    kernels = []
    for gated, block in ((1, layer.w13_block), (0, layer.w2_block)):
        own = {"GATED": gated, "LONE": int(lone and not gated)}
        if layer.format == Fp8BlockWeights.name:
            assert block is not None
            own |= {"SCALE_N": block[0], "SCALE_K": block[1]}
        every = tuple((constants | own).items())
        kernels.append(Kernel(FOLDER / f"{name}.cu", name, every, SHARED_BYTES, cluster=2))
    return kernels


def _matrices(
    weights: torch.Tensor, count: int, rows: int, width: int, box: int, streamed: bool = False
) -> TensorMap:
    """Of several matrices of rows of so many bytes, boxes that end with their own matrix."""
    return TensorMap(weights, (width, rows, count), (width, rows * width), (128, box, 1), streamed)


def check(layer: LayerConfig, choice: Pairs) -> None:
    """Raises ValueError for what the device code cannot take."""
    for holds, wanted in pairs_needs(layer, choice):
        require(holds, wanted)
