"""The host side of both GEMMs in one launch, weights first. Safe in a CUDA graph."""

from __future__ import annotations

from pathlib import Path

import torch

from moe_backend.formats import Fp8BlockWeights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import Kernel, TensorMap, launch
from moe_backend.kernels.hopper.sorted_tokens import SortedTokens, combine, sort, sort_at_once
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import SHARED_BYTES, Flow, flow_needs, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SOURCES = Path(__file__).parent / "cuda"
AT_ONCE = 4096  # slots up to which one launch sorts them
WHOLE = 1 << 20  # tokens of a "tile" in the list of tiles: experts are listed whole
NVFP4_THREADS = 576


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
    fp8 = layer.format == Fp8BlockWeights.name
    # The next item, what is done of the first GEMM, and of that what for each expert.
    counters = torch.empty(2 + layer.num_local_experts, dtype=torch.int32, device=x.device)
    given = layer, x, topk_weights, topk_ids, expert_map, WHOLE, counters
    at_once = slots <= AT_ONCE
    ordered = (sort_at_once if at_once else sort)(*given)
    gemms = _fp8 if fp8 else _nvfp4
    partial = gemms(layer, tensors, ordered, counters, 4 if at_once else 3, choice)
    return combine(layer, ordered, partial)


def _fp8(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    ordered: SortedTokens,
    counters: torch.Tensor,
    stride: int,
    choice: Flow,
) -> torch.Tensor:
    """`[positions, H]`: both GEMMs."""
    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    device, positions = w13.device, len(ordered.operand)
    hidden = torch.empty(positions, i, dtype=w13.dtype, device=device)
    groups = cdiv(i, 32 * choice.groups * choice.blocks)
    hidden_scale = torch.empty(groups, positions, dtype=torch.float32, device=device)
    partial = torch.empty(positions, h, dtype=layer.torch_dtype, device=device)
    turns_of_eight = TensorMap(
        w13, (h, 8, 2, i // 8, e), (h, i * h, 8 * h, 2 * i * h), (128, 8, 2, 4, 1)
    )
    constants = {
        "WARP_GROUPS": choice.groups,
        "BLOCKS": choice.blocks,
        "MOST": choice.tokens,
        "STAGES": choice.stages,
        "EXPERTS": e,
        "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        **dict(zip(("N13", "K13", "N2", "K2"), layer.w13_block + layer.w2_block, strict=True)),
    }
    launch(
        _kernel("flow.cu", "flow", constants), multiprocessors(device),
        128 * (choice.groups + 1),
        [turns_of_eight, _rows(w2.view(-1, i), 64), _rows(ordered.operand, 32),
         _rows(ordered.operand, 8), _rows(hidden, 32), _rows(hidden, 8), w13_scale, w2_scale,
         ordered.scale, ordered.tiles, counters, hidden, hidden_scale, partial, *_constants(layer),
         stride, h, i, positions, w13_scale.shape[1] // 2, w13_scale.shape[2], w2_scale.shape[1],
         w2_scale.shape[2]],
    )  # fmt: skip
    return partial


def _nvfp4(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    ordered: SortedTokens,
    counters: torch.Tensor,
    stride: int,
    choice: Flow,
) -> torch.Tensor:
    """`[positions, H]`: both GEMMs."""
    h, i = layer.hidden_size, layer.intermediate_size
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    device, positions = w13.device, len(ordered.operand)
    hidden = torch.empty(positions, i, dtype=layer.torch_dtype, device=device)
    partial = torch.empty(positions, h, dtype=layer.torch_dtype, device=device)
    constants = {
        "MOST": choice.tokens,
        "STAGES": choice.stages,
        "STRIDE": stride,
        "ACTIVATION": ACTIVATIONS[layer.activation.kind],
    }
    launch(
        _kernel("flow_nvfp4.cu", "flow_nvfp4_kernel", constants), multiprocessors(device),
        NVFP4_THREADS,
        [_rows(w13.view(-1, h // 2), 64), _rows(w13_scale.view(-1, h // 16), 64, 16),
         _rows(w2.view(-1, i // 2), 64), _rows(w2_scale.view(-1, i // 16), 64, 16),
         _rows(ordered.operand, 8), _rows(hidden, 8), w13_global, w2_global, hidden, partial,
         ordered.tiles, counters, *_constants(layer), h, i],
    )  # fmt: skip
    return partial


def _kernel(source: str, name: str, constants: dict[str, int]) -> Kernel:
    constants = {**constants, "SHARED_BYTES": SHARED_BYTES}
    return Kernel(SOURCES / source, name, tuple(constants.items()), SHARED_BYTES)


def _rows(matrix: torch.Tensor, rows: int, columns: int = 128) -> TensorMap:
    """Boxes of so many rows and bytes."""
    width = matrix.shape[1] * matrix.element_size()
    return TensorMap(matrix, (width, len(matrix)), (width,), (columns, rows))


def _constants(layer: LayerConfig) -> tuple[float, float, float]:
    return layer.activation.limit or 0.0, layer.activation.alpha, layer.activation.beta


def check(layer: LayerConfig, choice: Flow) -> None:
    """Raises ValueError for what the device code cannot take."""
    for holds, wanted in flow_needs(layer, choice):
        require(holds, wanted)
