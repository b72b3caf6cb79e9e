"""The host side of the GEMMs for many tokens, by pairs of blocks. Safe in a CUDA graph."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import Kernel, Memory, TensorMap, carve, launch, packed
from moe_backend.kernels.hopper.flow import gate_up_codes, padded, rows_of
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
    SHARED_BYTES,
    Pairs,
    pairs_code_stages,
    pairs_needs,
    require,
)
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, FORMATS, unpack

FOLDER = Path(__file__).parent / "cuda"
THREADS = 384
GROUP = 128  # hidden columns that share a scale
# Rows of a copy: of weights, and of tokens in either kernel.
WEIGHT_BOX, TOKEN_BOX, NVFP4_BOX = 64, 64, 16
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
    arguments = _nvfp4_arguments if nvfp4 else _tokens_first_arguments
    given = arguments(layer, tensors, between, positions)
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


def _tokens_first_arguments(
    layer: LayerConfig, tensors: list[torch.Tensor | None], between: Between, positions: int
) -> Arguments:
    """Of FP8, and of bf16, which has no scales."""
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    operand, scale, experts, hidden, hidden_scale, partial = between
    constants, wide = _constants(layer), w13.element_size()
    return (
        [rows_of(operand, positions, wide * h, TOKEN_BOX), _matrices(w13, 2 * e, i, wide * h),
         scale, w13_scale, experts, hidden, hidden_scale, *constants, i, h, positions,
         *scale_shape(layer, w13_scale, 2)],
        [rows_of(hidden, positions, wide * i, TOKEN_BOX), _matrices(w2, e, h, wide * i),
         hidden_scale, w2_scale, experts, partial, hidden_scale, *constants, h, i, positions,
         *scale_shape(layer, w2_scale, 1)],
    )  # fmt: skip


def _nvfp4_arguments(
    layer: LayerConfig, tensors: list[torch.Tensor | None], between: Between, positions: int
) -> Arguments:
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    operand, _, experts, hidden, _, partial = between
    constants, columns = _constants(layer), padded(i)
    return (
        [rows_of(operand, positions, 2 * h, NVFP4_BOX), gate_up_codes(layer, w13), w13_scale,
         w13_global, experts, hidden, *constants, columns, h, w13_scale.shape[1] // 2,
         w13_scale.shape[2]],
        [rows_of(hidden, positions, 2 * columns, NVFP4_BOX),
         rows_of(w2, e * h, i // 2, WEIGHT_BOX), w2_scale, w2_global, experts, partial, *constants,
         h, columns, w2_scale.shape[1], w2_scale.shape[2]],
    )  # fmt: skip


def _constants(layer: LayerConfig) -> tuple[float, float, float]:
    """The activation's."""
    activation = layer.activation
    return activation.limit or 0.0, activation.alpha, activation.beta


@lru_cache
def _kernels(layer: LayerConfig, choice: Pairs, lone: bool) -> list[Kernel]:
    """Of the first and of the second GEMM; whether outputs have targets."""
    check(layer, choice)
    nvfp4 = layer.format == Nvfp4Weights.name
    name = "pairs_nvfp4" if nvfp4 else "pairs"
    constants = {
        "EXPERTS": layer.num_local_experts,
        "STAGES": choice.stages,
        "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        "SHARED_BYTES": SHARED_BYTES,
    }
    if nvfp4:
        constants |= {
            "CODES": pairs_code_stages(layer, choice),
            "PADDED": int(layer.intermediate_size != padded(layer.intermediate_size)),
        }
    else:
        constants["FORMAT"] = FORMATS[layer.format]
    kernels = []
    for gated, block in ((1, layer.w13_block), (0, layer.w2_block)):
        own = {"GATED": gated, "LONE": int(lone and not gated)}
        if layer.format == Fp8BlockWeights.name:
            assert block is not None
            own |= {"SCALE_N": block[0], "SCALE_K": block[1]}
        every = tuple((constants | own).items())
        kernels.append(Kernel(FOLDER / f"{name}.cu", name, every, SHARED_BYTES, cluster=2))
    return kernels


def _matrices(weights: torch.Tensor, count: int, rows: int, width: int) -> TensorMap:
    """Of several matrices of rows of so many bytes, boxes that end with their own matrix."""
    return TensorMap(weights, (width, rows, count), (width, rows * width), (128, WEIGHT_BOX, 1))


def check(layer: LayerConfig, choice: Pairs) -> None:
    """Raises ValueError for what the device code cannot take."""
    for holds, wanted in pairs_needs(layer, choice):
        require(holds, wanted)
