"""The host side of what comes before and after the GEMMs of `flow.py`: routing, and the sum."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from moe_backend.formats import Fp8BlockWeights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import Kernel, Memory, launch
from moe_backend.kernels.registry import LayerConfig

FOLDER = Path(__file__).parent / "cuda"
ROUTE_THREADS, COMBINE_THREADS = 512, 256
BLOCKS_PER_SM = 2  # of the routing, each with as many tokens: every block looks through all slots


class Routed(NamedTuple):
    """What `route` writes, in the caller's memory.

    Attributes:
        operand: `[tokens, H]`, of FP8 layers e4m3 with scale, fp32 `[H / 128, tokens]`; else bf16,
            columns in the order of `device._nvfp4_position`.
        position: int32 `[slots]`, -1 for slots that are left out.
        token_of: int32 `[positions]`; undefined where no slot is.
        experts: int32, how many were hit and of each expert, first position and end position.
        counters: int32, zeros.
    """

    operand: Memory
    scale: Memory
    position: Memory
    token_of: Memory
    experts: Memory
    counters: Memory


def route(
    layer: LayerConfig,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    to: Routed,
    counters: int,
    sms: int,
) -> None:
    """Sort a call's slots by expert and quantise its tokens or reorder their columns.

    The first five arguments are those of `registry.Kernel.apply`.

    Args:
        x, topk_weights (fp32): `launch.packed`; topk_ids: contiguous.
        to: where the results go.
        counters: how many.
        sms: multiprocessors of the GPU.
    """
    tokens, mapped = len(x), expert_map is not None
    each = cdiv(tokens, BLOCKS_PER_SM * sms)
    launch(
        _route(layer, mapped, topk_ids.dtype == torch.int64), cdiv(tokens, each) + 1,
        ROUTE_THREADS,
        [x, topk_ids, topk_ids if expert_map is None else expert_map, topk_weights, *to, counters,
         tokens, each, layer.hidden_size],
    )  # fmt: skip


def combine(
    layer: LayerConfig,
    partial: Memory,
    position: Memory,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`out` becomes sums over top_k of `partial`, bf16 `[positions, H]`, with the weights.

    Args:
        topk_weights: fp32, contiguous; out: `[tokens, H]`.
    """
    h = layer.hidden_size
    parts = cdiv(h, 16 * COMBINE_THREADS)
    launch(
        _combine(layer.top_k, layer.apply_router_weight_on_input), parts * len(out),
        COMBINE_THREADS, [partial, position, topk_weights, out, h],
    )  # fmt: skip


@lru_cache
def _route(layer: LayerConfig, mapped: bool, long_ids: bool) -> Kernel:
    quantised = layer.format == Fp8BlockWeights.name
    constants = {
        "EXPERTS": layer.num_local_experts,
        "NUM_IDS": layer.num_experts if mapped else layer.num_local_experts,
        "TOP_K": layer.top_k,
        "HAS_MAP": int(mapped),
        "IDS64": int(long_ids),
        "WEIGHT_ON_INPUT": int(layer.apply_router_weight_on_input),
        "QUANTISED": int(quantised),
    }
    slots = ROUTE_THREADS // layer.top_k * layer.top_k
    shared = 4 * (3 * layer.num_local_experts + slots + ROUTE_THREADS // 32) + 16
    shared += 512 * (1 if quantised else ROUTE_THREADS // 32)  # a warp's columns, to reorder
    return Kernel(FOLDER / "route.cu", "route", tuple(constants.items()), shared)


@lru_cache
def _combine(top_k: int, weight_on_input: bool) -> Kernel:
    constants = {"TOP_K": top_k, "WEIGHTED": int(not weight_on_input)}
    return Kernel(FOLDER / "combine.cu", "combine", tuple(constants.items()), 8 * top_k + 4)
