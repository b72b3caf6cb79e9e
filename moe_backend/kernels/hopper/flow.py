"""The host side of both GEMMs in one launch, weights first. Safe in a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import Kernel, TensorMap, launch
from moe_backend.kernels.hopper.sorted_tokens import (
    combine,
    sort,
    sort_at_once,
    sorted_positions,
)
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import SHARED_BYTES, Flow, flow_needs, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SOURCE = Path(__file__).parent / "cuda" / "flow.cu"
AT_ONCE = 4096  # slots up to which one launch sorts them
WHOLE = 1 << 30  # tokens of a "tile" in the list of tiles: experts are listed whole


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
    check(layer, choice)
    slots = topk_ids.numel()
    if slots == 0:
        return torch.empty_like(x)
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    device = w13.device

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    # The next item, and for each expert that is hit how much of its hidden columns is done.
    counters = empty(1 + e, dtype=torch.int32)
    gather = gathers(layer, slots)
    given = layer, x, topk_weights, topk_ids, expert_map, WHOLE, counters
    ordered = sort_at_once(*given) if slots <= AT_ONCE else sort(*given, in_place=gather)
    positions = sorted_positions(layer, slots)
    hidden = empty(positions, i, dtype=w13.dtype)
    groups = cdiv(i, 32 * choice.groups * choice.blocks)
    hidden_scale = empty(groups, positions, dtype=torch.float32)
    partial = empty(positions, h, dtype=layer.torch_dtype)
    activation = layer.activation
    turns_of_eight = TensorMap(
        w13, (h, 8, 2, i // 8, e), (h, i * h, 8 * h, 2 * i * h), (128, 8, 2, 4, 1)
    )
    launch(
        _kernel(layer, choice, gather), multiprocessors(device), 128 * (choice.groups + 1),
        [turns_of_eight, _rows(w2.view(-1, i), 64), _rows(ordered.operand, 32),
         _rows(ordered.operand, 8), _rows(hidden, 32), _rows(hidden, 8), w13_scale, w2_scale,
         ordered.operand, ordered.scale, ordered.tiles,
         ordered.position if ordered.token_of is None else ordered.token_of, counters, hidden,
         hidden_scale, partial, activation.limit or 0.0, activation.alpha, activation.beta,
         ordered.stride, h, i, len(x), positions, w13_scale.shape[1] // 2, w13_scale.shape[2],
         w2_scale.shape[1], w2_scale.shape[2]],
    )  # fmt: skip
    return combine(layer, ordered, partial)


def gathers(layer: LayerConfig, slots: int) -> bool:
    """Whether tokens are fetched from where they are, and not copied to all their positions first.

    Measured on an H200: from two slots a token on this rank on, and not with few slots.
    """
    return slots > AT_ONCE and layer.top_k * layer.num_local_experts >= 2 * layer.num_experts


def _kernel(layer: LayerConfig, choice: Flow, gather: bool = False) -> Kernel:
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    constants = {
        "WARP_GROUPS": choice.groups,
        "BLOCKS": choice.blocks,
        "MOST": choice.tokens,
        "GATHER": int(gather),
        "STAGES": choice.stages,
        "EXPERTS": layer.num_local_experts,
        "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        "SHARED_BYTES": SHARED_BYTES,
        **dict(zip(("N13", "K13", "N2", "K2"), layer.w13_block + layer.w2_block, strict=True)),
    }
    return Kernel(SOURCE, "flow", tuple(constants.items()), SHARED_BYTES)


def _rows(matrix: torch.Tensor, rows: int) -> TensorMap:
    """Boxes of so many rows and 128 bytes."""
    width = matrix.shape[1]
    return TensorMap(matrix, (width, len(matrix)), (width,), (128, rows))


def check(layer: LayerConfig, choice: Flow) -> None:
    """Raises ValueError for what the device code cannot take."""
    for holds, wanted in flow_needs(layer, choice):
        require(holds, wanted)
