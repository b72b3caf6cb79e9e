"""The host side of FP8's GEMMs for many tokens, by pairs of blocks. Safe in a CUDA graph."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import Kernel, Memory, TensorMap, carve, launch, packed
from moe_backend.kernels.hopper.route import CHUNKS, Routed, combine, route
from moe_backend.kernels.hopper.sorted_tokens import positions_of
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import SHARED_BYTES, Pairs, pairs_needs, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SOURCE = Path(__file__).parent / "cuda" / "pairs.cu"
THREADS = 384
GROUP = 128  # hidden columns that share a scale
BOX = 64  # rows of a copy


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
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    sms = multiprocessors(w13.device)
    x, ids, weights = packed(x), topk_ids.contiguous(), packed(topk_weights.float())
    positions = positions_of(layer, slots)
    past = 4 * 128  # a tile's scales are copied whole, also where positions end
    whole, (operand, scale, position, token_of, experts, count, hidden, hidden_scale, partial) = (
        carve(
            w13.device, positions * h, 4 * cdiv(h, 128) * positions + past, 4 * slots,
            4 * positions, 4 * (1 + 3 * e), 4 * CHUNKS * e, positions * i,
            4 * cdiv(i, GROUP) * positions + past, 2 * positions * h,
        )
    )  # fmt: skip
    out = torch.empty(tokens, h, dtype=x.dtype, device=x.device)
    to = Routed(operand, scale, position, token_of, experts, count, count)
    route(layer, x, weights, ids, expert_map, to, 0, sms, positions)
    activation, pairs = layer.activation, sms // 2
    constants = activation.limit or 0.0, activation.alpha, activation.beta
    first, second = _kernels(layer, choice)
    launch(
        first, 2 * pairs, THREADS,
        [_rows(operand, positions, h), _matrices(w13, 2 * e, i, h), scale, w13_scale, experts,
         hidden, hidden_scale, *constants, i, h, positions, w13_scale.shape[1] // 2,
         w13_scale.shape[2]],
    )  # fmt: skip
    launch(
        second, 2 * pairs, THREADS,
        [_rows(hidden, positions, i), _matrices(w2, e, h, i), hidden_scale, w2_scale, experts,
         partial, hidden_scale, *constants, h, i, positions, w2_scale.shape[1],
         w2_scale.shape[2]],
    )  # fmt: skip
    combine(layer, partial, position, weights, out, sms)
    del whole  # what is allocated next on this stream comes after these launches
    return out


@lru_cache
def _kernels(layer: LayerConfig, choice: Pairs) -> list[Kernel]:
    """Of the first and of the second GEMM."""
    check(layer, choice)
    kernels = []
    for gated, block in ((1, layer.w13_block), (0, layer.w2_block)):
        assert block is not None
        constants = {
            "GATED": gated,
            "STAGES": choice.stages,
            "EXPERTS": layer.num_local_experts,
            "ACTIVATION": ACTIVATIONS[layer.activation.kind],
            "SCALE_N": block[0],
            "SCALE_K": block[1],
            "SHARED_BYTES": SHARED_BYTES,
        }
        kernels.append(Kernel(SOURCE, "pairs", tuple(constants.items()), SHARED_BYTES, cluster=2))
    return kernels


def _rows(matrix: torch.Tensor | Memory, rows: int, width: int) -> TensorMap:
    """Of rows of so many bytes, boxes of 64 rows and 128 bytes."""
    return TensorMap(matrix, (width, rows), (width,), (128, BOX))


def _matrices(weights: torch.Tensor, count: int, rows: int, width: int) -> TensorMap:
    """The same of several matrices, so that a box ends with its own."""
    return TensorMap(weights, (width, rows, count), (width, rows * width), (128, BOX, 1))


def check(layer: LayerConfig, choice: Pairs) -> None:
    """Raises ValueError for what the device code cannot take."""
    for holds, wanted in pairs_needs(layer, choice):
        require(holds, wanted)
