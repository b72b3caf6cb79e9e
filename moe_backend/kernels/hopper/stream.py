"""The host side of the GEMMs for a few tokens per expert. Safe in a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper import wide
from moe_backend.kernels.hopper.sorted_tokens import PDL, SortedTokens, combine, sort_at_once, view
from moe_backend.kernels.hopper.tiled import multiprocessors
from moe_backend.kernels.hopper.tiles import STREAM_STAGES, Stream, require, stream_needs
from moe_backend.kernels.registry import LayerConfig
from moe_backend.kernels.triton.kernel import ACTIVATIONS, unpack

SHARED_BYTES = 113 * 1024  # half of what a multiprocessor has
COLUMNS = 64  # hidden columns that share a scale
SCALE_TOKENS = 32  # of whose scales a copy brings a step's
PARTS = 2  # in which a program hands over its sums of a tile, see `share_device.py`
# Two programs share a multiprocessor: 80 registers a thread when they start, of which the copying
# warp leaves most to those that multiply.
REGISTERS = {"maxnreg": 80, "CONSUMER_REGISTERS": 104, "COPY_REGISTERS": 24, "num_warps": 4}


@dataclass(frozen=True)
class _Plan:
    """What the GEMMs of a call share.

    Attributes:
        ordered: tokens in the order of their experts.
        sums, flags: of tiles that several programs work on (`share_device.py`).
    """

    ordered: SortedTokens
    sums: torch.Tensor
    flags: torch.Tensor

    @property
    def programs(self) -> int:
        return len(self.sums)


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
    check(layer, choice)
    plan = _plan(layer, x, topk_weights, topk_ids, expert_map, choice.tokens)
    gemms = _fp8 if layer.format == Fp8BlockWeights.name else _nvfp4
    return combine(layer, plan.ordered, gemms(layer, tensors, plan, choice))


def _fp8(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    plan: _Plan,
    choice: Stream,
) -> torch.Tensor:
    """`[positions, H]`: both GEMMs."""
    from moe_backend.kernels.hopper import stream_device

    e, h, i = layer.num_local_experts, layer.hidden_size, layer.intermediate_size
    w13, w13_scale, _, w2, w2_scale, _ = unpack(layer, tensors)
    assert layer.w13_block is not None
    assert layer.w2_block is not None
    ordered, device = plan.ordered, w13.device
    positions = len(ordered.operand)
    hidden = torch.empty(positions, i, dtype=w13.dtype, device=device)
    hidden_scale = torch.empty(cdiv(i, COLUMNS), positions, dtype=torch.float32, device=device)
    partial = torch.empty(positions, h, dtype=layer.torch_dtype, device=device)
    shared: dict[str, Any] = {"TOKENS": choice.tokens, **REGISTERS, **PDL}
    stream_device.gate_up_kernel[(plan.programs,)](
        view(ordered.operand, choice.tokens, 128), view(ordered.scale, 1, SCALE_TOKENS, swizzle=0),
        _turns_of_eight(w13, e, i, h), w13_scale, hidden, hidden_scale, ordered.tiles, plan.sums,
        plan.flags[0], *_constants(layer), i, h, w13_scale.shape[1] // 2, w13_scale.shape[2],
        positions, STAGES=choice.stages13, SCALE_N=layer.w13_block[0], SCALE_K=layer.w13_block[1],
        ACTIVATION=ACTIVATIONS[layer.activation.kind], **shared,
    )  # fmt: skip
    stream_device.down_kernel[(plan.programs,)](
        view(hidden, choice.tokens, 128), view(hidden_scale, 1, SCALE_TOKENS, swizzle=0),
        view(w2.view(-1, i), 64, 128), w2_scale, partial, ordered.tiles, plan.sums, plan.flags[1],
        h, i, w2_scale.shape[1], w2_scale.shape[2], STAGES=choice.stages2,
        SUB=min(COLUMNS, layer.w2_block[1]), SCALE_N=layer.w2_block[0], SCALE_K=layer.w2_block[1],
        **shared,
    )  # fmt: skip
    return partial


def _nvfp4(
    layer: LayerConfig,
    tensors: list[torch.Tensor | None],
    plan: _Plan,
    choice: Stream,
) -> torch.Tensor:
    """`[positions, H]`: both GEMMs."""
    from moe_backend.kernels.hopper import stream_nvfp4_device

    h, i = layer.hidden_size, layer.intermediate_size
    w13, w13_scale, w13_global, w2, w2_scale, w2_global = unpack(layer, tensors)
    ordered, device = plan.ordered, w13.device
    positions = len(ordered.operand)
    hidden = torch.empty(positions, cdiv(i, 256) * 256, dtype=layer.torch_dtype, device=device)
    partial = torch.empty(positions, h, dtype=layer.torch_dtype, device=device)
    shared: dict[str, Any] = {
        "TOKENS": choice.tokens, "ACTIVATION": ACTIVATIONS[layer.activation.kind],
        **REGISTERS, **PDL,
    }  # fmt: skip
    constants = _constants(layer)
    stream_nvfp4_device.gemm_kernel[(plan.programs,)](
        view(ordered.operand, choice.tokens, 64), wide.gate_up_words(w13), w13_scale, w13_global,
        hidden, ordered.tiles, plan.sums, plan.flags[0], *constants, i, h, w13_scale.shape[2],
        hidden.shape[1], STAGES=choice.stages13, GATED=True, **shared,
    )  # fmt: skip
    stream_nvfp4_device.gemm_kernel[(plan.programs,)](
        view(hidden, choice.tokens, 64), wide.down_words(w2), w2_scale, w2_global,
        partial, ordered.tiles, plan.sums, plan.flags[1], *constants, h, i, w2_scale.shape[2], h,
        STAGES=choice.stages2, GATED=False, **shared,
    )  # fmt: skip
    return partial


def _constants(layer: LayerConfig) -> tuple[float, float, float]:
    return layer.activation.limit or 0.0, layer.activation.alpha, layer.activation.beta


def most_stages(layer: LayerConfig, tokens: int, first: bool) -> int:
    """So that two programs share a multiprocessor."""
    fit = (n for n in range(2, 8) if _shared(layer, tokens, n, first) <= SHARED_BYTES)
    return max(n for n in fit if n % 2 == 0 or not in_turns(layer, first))


def in_turns(layer: LayerConfig, first: bool) -> bool:
    """Whether warp groups take stages in turn, of which there must then be an even number."""
    return first and layer.format == Fp8BlockWeights.name


def _shared(layer: LayerConfig, tokens: int, stages: int, first: bool) -> int:
    """Of one program: the ring, and what the compiler adds.

    For FP8, also the tokens' scales, and what one warp group hands to the other in the first GEMM.
    """
    added = 4608
    if layer.format == Nvfp4Weights.name:
        return stages * (128 * 128 + tokens * 512) + added
    scales = cdiv((1 if first else 2) * stages, 8) * 8 * 4 * SCALE_TOKENS
    handed = 2 * 64 * tokens * 4 if first else 0
    return stages * (128 + tokens) * 128 + scales + handed + added


def _plan(
    layer: LayerConfig,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    tile_tokens: int,
) -> _Plan:
    programs = 2 * multiprocessors(x.device)
    flags = torch.empty(2, programs, PARTS, dtype=torch.int32, device=x.device)
    sums = torch.empty(programs, PARTS, 64, tile_tokens, dtype=torch.float32, device=x.device)
    ordered = sort_at_once(layer, x, topk_weights, topk_ids, expert_map, tile_tokens, flags)
    return _Plan(ordered, sums, flags)


def _turns_of_eight(w13: torch.Tensor, e: int, i: int, h: int) -> Any:
    """`[experts, I / 8, (gate, up), 8, H]`, in boxes of 32 gate and 32 up rows."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=5)
    strides = [2 * i * h, 8 * h, i * h, h, 1]
    return TensorDescriptor(w13, [e, i // 8, 2, 8, h], strides, [1, 4, 2, 8, 128], layout)


def check(layer: LayerConfig, choice: Stream) -> None:
    """Raises ValueError for what the device code cannot take."""
    require(layer.format in STREAM_STAGES, "FP8 or NVFP4")
    sizes = sorted(STREAM_STAGES[layer.format])
    require(choice.tokens in sizes, f"tiles of {sizes} tokens")
    for holds, wanted in stream_needs(layer):
        require(holds, wanted)
