"""The host side of the FP8 GEMMs for many tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch

from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import Prefill
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

TILE_TOKENS = 128
CHUNK = 1024  # slots that one program of the routing sorts


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
    import triton
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from moe_backend.kernels.hopper import prefill_device, sort_device

    tokens, top_k = topk_ids.shape
    x = x.contiguous()
    out = torch.empty_like(x)
    e, h, i, slots = (
        layer.num_local_experts, layer.hidden_size, layer.intermediate_size, tokens * top_k,
    )  # fmt: skip
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    check(layer, choice)
    half, outputs = choice.hidden, choice.outputs // 2
    on_input = layer.apply_router_weight_on_input
    # The first launch waits for what came before it, as launches do, since it reads the routing at
    # once. (Overlapping it was seen to crash in an engine: it read ids that were still to come.)
    pdl: dict[str, Any] = {"PDL": True, "launch_pdl": True}

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    # Slots by expert, every expert from a multiple of 4 on.
    positions = cdiv(slots + 3 * min(e, slots), 4) * 4
    chunks = cdiv(slots, CHUNK)
    bins = triton.next_power_of_2(e + 1)
    columns = min(64, bins)
    local, rank, position = empty(3, slots, dtype=torch.int32)
    counts, base = empty(2, chunks, bins, dtype=torch.int32)
    tiles = empty(1 + 3 * (slots // TILE_TOKENS + e), dtype=torch.int32)
    operand = empty(positions, h, dtype=w13.dtype)
    operand_scale = empty(cdiv(h, 128), positions, dtype=torch.float32)
    hidden = empty(positions, i, dtype=w13.dtype)
    hidden_scale = empty(cdiv(i, half), positions, dtype=torch.float32)
    partial = empty(positions, h, dtype=x.dtype)
    ids = topk_ids.contiguous()
    weights = topk_weights.float().contiguous()
    sort_device.rank_kernel[(chunks,)](
        ids, ids if expert_map is None else expert_map, local, rank, counts, slots,
        HAS_MAP=expert_map is not None, CHUNK=CHUNK, BINS=bins, num_warps=4, PDL=True,
    )  # fmt: skip
    sort_device.place_kernel[(cdiv(e, columns),)](
        counts, base, tiles, e, chunks, CHUNKS=triton.next_power_of_2(chunks), BINS=bins,
        COLUMNS=columns, TOKENS=TILE_TOKENS, num_warps=8, **pdl,
    )  # fmt: skip
    sort_device.permute_kernel[(tokens,)](
        x, weights, local, rank, base, position, operand, operand_scale, h, positions,
        WEIGHT_ON_INPUT=on_input, TOP_K=top_k, CHUNK=CHUNK, BINS=bins,
        GROUPS=triton.next_power_of_2(cdiv(h, 128)), num_warps=4, **pdl,
    )  # fmt: skip

    def view(tensor: torch.Tensor, *box: int) -> Any:
        """What the accelerator reads, with the box of one copy."""
        bits = 8 * tensor.element_size()
        swizzle = 128 if bits == 8 else 0
        layout = NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=2)
        return TensorDescriptor.from_tensor(tensor, list(box), layout)

    activation = layer.activation
    constants = activation.limit or 0.0, activation.alpha, activation.beta
    programs = multiprocessors(x.device)
    shared = {
        "STEP": 128, "ACTIVATION": ACTIVATIONS[activation.kind],
        "CONSUMER_REGISTERS": 240, "COPY_REGISTERS": 24, "num_warps": 4, **pdl,
    }  # fmt: skip
    prefill_device.gemm_kernel[(programs,)](
        view(operand, 64, 128), view(operand_scale, 1, TILE_TOKENS),
        view(w13.view(-1, h), half, 128), w13_scale, hidden, hidden_scale, tiles, *constants, i, h,
        w13_scale.shape[1] // 2, w13_scale.shape[2], positions,
        HALF=half, SUB=min(128, layer.w13_block[1]), STAGES=choice.stages13, GATED=True, GROUP=128,
        SCALE_N=layer.w13_block[0], SCALE_K=layer.w13_block[1], **shared,
    )  # fmt: skip
    prefill_device.gemm_kernel[(programs,)](
        view(hidden, 64, 128), view(hidden_scale, 1, TILE_TOKENS),
        view(w2.view(-1, i), outputs, 128), w2_scale, partial, hidden_scale, tiles, *constants,
        h, i, w2_scale.shape[1], w2_scale.shape[2], positions,
        HALF=outputs, SUB=min(half, layer.w2_block[1]), STAGES=choice.stages2, GATED=False,
        GROUP=half, SCALE_N=layer.w2_block[0], SCALE_K=layer.w2_block[1], **shared,
    )  # fmt: skip
    block = min(4096, triton.next_power_of_2(h))
    sort_device.combine_kernel[(tokens, cdiv(h, block))](
        partial, position, weights, out, h, TOP_K=top_k, WEIGHT_ON_INPUT=on_input, BLOCK=block,
        num_warps=8, **pdl,
    )  # fmt: skip
    return out


def check(layer: LayerConfig, choice: Prefill) -> None:
    """Tiles that the device code would multiply with the wrong scale."""
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    (n13, k13), (n2, k2) = layer.w13_block, layer.w2_block
    assert choice.hidden in (64, 128)
    assert choice.outputs in (128, 256)
    for wide, rows in ((choice.hidden, n13), (choice.outputs // 2, n2)):
        # 64 rows have one scale or several whole ones; 128 rows share those of their first half.
        assert rows % wide == 0 or (wide == 64 and 64 % rows == 0), "scales of a tile's rows"
    for columns in (k13, k2):
        assert columns % 128 == 0 or 128 % columns == 0, "one scale for a part of a step"
