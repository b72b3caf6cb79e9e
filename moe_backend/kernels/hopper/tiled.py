"""The host side of the tiled GEMMs: routing, gate and up, down, sum. Safe in a CUDA graph."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from moe_backend.formats import Bf16Weights, Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper.tiles import Tile, Tiles, require
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, FORMATS, unpack


@cache
def multiprocessors(device: torch.device) -> int:
    count = torch.cuda.get_device_properties(device).multi_processor_count
    assert isinstance(count, int)
    return count


def run(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tiles: Tiles,
    *,
    on_gpu: bool = True,
) -> torch.Tensor:
    """The experts of one layer; arguments as in `registry.Kernel.apply`.

    Args:
        tiles: of both GEMMs.
        on_gpu: False for Triton's interpreter: no PTX, no overlapped launches.
    """
    import triton

    from moe_backend.kernels.hopper import device

    tokens, top_k = topk_ids.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    if tokens == 0:
        return out
    first, second = tiles.gate_up, tiles.down
    check_tiles(layer, first, second)
    e, h, i, slots = (
        layer.num_local_experts, layer.hidden_size, layer.intermediate_size, tokens * top_k,
    )  # fmt: skip
    fp8, nvfp4 = layer.format == Fp8BlockWeights.name, layer.format == Nvfp4Weights.name
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    n13, k13 = layer.w13_block or (1, 16)
    n2, k2 = layer.w2_block or (1, 16)

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    code = torch.float8_e4m3fn if fp8 else x.dtype
    width = 256 if nvfp4 else 1
    operand, operand_scale = x, x
    prepared = layer.format != Bf16Weights.name or layer.apply_router_weight_on_input
    if prepared:
        operand = empty(tokens, cdiv(h, width) * width, dtype=code)
        operand_scale = empty(tokens, cdiv(h, 128) if fp8 else 0, dtype=torch.float32)
    hidden = empty(slots, cdiv(i, width) * width, dtype=code)
    hidden_scale = empty(slots, cdiv(i, first.n) if fp8 else 0, dtype=torch.float32)
    partial = empty(slots, h, dtype=x.dtype)
    plan = empty(slots + e, dtype=torch.int32)
    slot_list, ends = plan[:slots], plan[slots:]
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    has_map = expert_map is not None
    num_ids = layer.num_experts if has_map else e  # ids from there on mark rows that are left out
    table = ids if expert_map is None else expert_map

    overlap: dict[str, Any] = {"launch_pdl": True} if on_gpu else {}
    programs = multiprocessors(x.device) if on_gpu else 2
    device.route_kernel[(e + (tokens if prepared else 0),)](
        x, ids, table, weights, operand, operand_scale, slot_list, ends, slots, num_ids, e, h,
        HAS_MAP=has_map, WEIGHT_ON_INPUT=layer.apply_router_weight_on_input,
        FORMAT=FORMATS[layer.format], CHUNK=min(8192, max(128, triton.next_power_of_2(slots))),
        BLOCK_H=max(128, triton.next_power_of_2(cdiv(h, width) * width)), PDL=on_gpu,
        num_warps=16 if slots > 4096 else 4,
    )  # fmt: skip
    shared = {
        "FORMAT": FORMATS[layer.format],
        "EXPERTS": triton.next_power_of_2(e),
        "PTX": on_gpu,
        "PDL": on_gpu,
        **overlap,
    }
    activation = layer.activation
    scale_rows, scale_columns = scale_shape(layer, w13_scale, 2)
    device.gate_up_kernel[(programs * first.per_sm,)](
        operand, operand_scale, _w13_view(w13, first), w13_scale, w13_global, hidden, hidden_scale,
        slot_list, ends, activation.limit or 0.0, activation.alpha, activation.beta,
        e, h, i, operand.shape[1], hidden.shape[1], scale_rows, scale_columns,
        TOP_K=top_k, SCALE_N=n13, SCALE_K=k13,
        ACTIVATION=ACTIVATIONS[activation.kind], BLOCK_M=first.m, BLOCK_I=first.n,
        BLOCK_K=first.k, SPLIT=first.split, STAGES=first.stages, num_warps=first.warps, **shared,
    )  # fmt: skip
    scale_rows, scale_columns = scale_shape(layer, w2_scale, 1)
    device.down_kernel[(programs * second.per_sm,)](
        hidden, hidden_scale, _w2_view(w2, second), w2_scale, w2_global, weights, partial,
        slot_list, ends, e, h, i, hidden.shape[1], scale_rows, scale_columns,
        WEIGHT_ON_INPUT=layer.apply_router_weight_on_input, GROUP=first.n,
        SCALE_N=n2, SCALE_K=k2, BLOCK_M=second.m,
        BLOCK_H=second.n, BLOCK_K=second.k, STAGES=second.stages, num_warps=second.warps, **shared,
    )  # fmt: skip
    device.sum_kernel[(tokens, cdiv(h, 1024))](
        partial, ids, table, out, num_ids, h, HAS_MAP=has_map, TOP_K=top_k, BLOCK=1024,
        PDL=on_gpu, num_warps=4, **overlap,
    )  # fmt: skip
    return out


def check_tiles(layer: LayerConfig, first: Tile, second: Tile) -> None:
    """Raises ValueError for tiles that the device code would multiply with the wrong scale."""
    require(not (first.split and layer.format == Nvfp4Weights.name), "NVFP4 tiles not split")
    if layer.w13_block is None or layer.w2_block is None:
        return
    (rows, k13), k2 = layer.w13_block, layer.w2_block[1]
    require(not first.split or rows % first.n == 0, "one scale for a split tile's rows")
    require(128 % first.k == 0, "one scale of the input for a step")
    require(k13 % first.k == 0, "one scale of w13 for a step")
    require(first.n % second.k == 0, "one scale of the hidden columns for a step")
    require(k2 % second.k == 0, "one scale of w2 for a step")


def _w13_view(w13: torch.Tensor, tile: Tile) -> Any:
    """`w13` for the tensor memory accelerator, with the box of rows and columns of one step.

    Two boxes of gate and of up rows (`split`), or one with both in turns of eight.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    e, rows, width = w13.shape
    i = rows // 2
    if tile.split:
        return TensorDescriptor(
            w13, [2 * e, i, width], [i * width, width, 1], [1, tile.n, _columns(w13, tile)]
        )
    return TensorDescriptor(
        w13,
        [e, i // 8, 2, 8, width],
        [rows * width, 8 * width, i * width, width, 1],
        [1, tile.n // 8, 2, 8, _columns(w13, tile)],
    )


def _w2_view(w2: torch.Tensor, tile: Tile) -> Any:
    """`w2` for the tensor memory accelerator."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(w2, list(w2.shape), list(w2.stride()), [1, tile.n, _columns(w2, tile)])


def _columns(weight: torch.Tensor, tile: Tile) -> int:
    """Elements of a row that a step reads."""
    return tile.k // 8 if weight.dtype == torch.int32 else tile.k


def scale_shape(layer: LayerConfig, scale: torch.Tensor, parts: int) -> tuple[int, int]:
    """Rows of scales that one part (gate, up or down) has, and columns.

    Of NVFP4, whose scales lie in blocks (`codes.py`), the second is steps of 256 columns.
    """
    if layer.format == Bf16Weights.name:
        return 0, 0
    return scale.shape[1] // parts, scale.shape[2]
