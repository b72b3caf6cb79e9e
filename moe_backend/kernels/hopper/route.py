"""What comes around the GEMMs of `flow.py` and `pairs.py`, on the host: routing, and the sum."""

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
BLOCKS_PER_SM = 2  # of the routing, each with as many tokens
COMBINE_PER_SM = 3  # blocks of the sum that run together
# Slots of a call from which a launch of its own counts them, in so many parts; below, every block
# of the routing looks through all. Measured on an H200 at 8,192 (2 us more) and 32,768 (8 less).
MANY_SLOTS = 1 << 14
CHUNKS = 32
# Of 256 columns of a token, that a warp brings at once with many slots, or where tokens are copied
# to positions; else one.
PIECES = 4


class Routed(NamedTuple):
    """What `route` writes, in the caller's memory.

    Attributes:
        operand: `[rows, H]`, of FP8 layers e4m3 with scale, fp32 `[H / 128, rows]`; else bf16,
            columns in the order of `device._nvfp4_position`. Rows are tokens, or positions.
        position: int32 `[slots]`, -1 for slots that are left out.
        token_of: int32 `[positions]`; undefined where no slot is.
        experts: int32, how many were hit and of each expert, first position and end position; in
            ascending order of experts, or for `pairs_nvfp4.cu` with up to ROUTE_THREADS of them in
            descending order of their slots.
        counters: int32, zeros.
        counts: int32 `[CHUNKS, experts]`, for `route` itself if there are many slots.
    """

    operand: Memory
    scale: Memory
    position: Memory
    token_of: Memory
    experts: Memory
    counters: Memory
    counts: Memory


def many(layer: LayerConfig, tokens: int) -> bool:
    """Whether a call's slots are counted beforehand."""
    return tokens * layer.top_k >= MANY_SLOTS


def route(
    layer: LayerConfig,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    to: Routed,
    counters: int,
    sms: int,
    positions: int | None = None,
) -> None:
    """Sort a call's slots by expert and quantise its tokens or reorder their columns.

    The first five arguments are those of `registry.Kernel.apply`.

    Args:
        x, topk_weights (fp32): `launch.packed`; topk_ids: contiguous.
        to: where the results go.
        counters: how many.
        sms: multiprocessors of the GPU.
        positions: rows of the operand if tokens are to be copied to the positions of their slots.
    """
    tokens, mapped, sort = len(x), expert_map is not None, positions is not None
    each = cdiv(tokens, BLOCKS_PER_SM * sms)
    blocks, counted = cdiv(tokens, each), sort or many(layer, tokens)
    expert_of = topk_ids if expert_map is None else expert_map
    chunk = cdiv(blocks, CHUNKS) * each * layer.top_k  # slots
    kind = layer, mapped, topk_ids.dtype == torch.int64, counted, sort
    if counted:
        slots = tokens * layer.top_k
        launch(_count(*kind), CHUNKS, ROUTE_THREADS, [topk_ids, expert_of, to.counts, slots, chunk])
    launch(
        _route(*kind), blocks + 1, ROUTE_THREADS,
        [x, topk_ids, expert_of, topk_weights, *to, counters, tokens, positions or tokens, each,
         chunk, layer.hidden_size],
    )  # fmt: skip


def combine(
    layer: LayerConfig,
    partial: Memory,
    position: Memory,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
    sms: int,
) -> None:
    """`out` becomes sums over top_k of `partial`, bf16 `[positions, H]`, with the weights.

    Args:
        topk_weights: fp32, contiguous; out: `[tokens, H]`; sms: multiprocessors of the GPU.
    """
    tokens, h = out.shape
    pieces = PIECES if many(layer, tokens) else 1
    jobs = tokens * cdiv(h, 256 * pieces)  # of warps
    blocks = min(COMBINE_PER_SM * sms, cdiv(jobs, COMBINE_THREADS // 32))
    launch(
        _combine(layer.top_k, layer.apply_router_weight_on_input, pieces), blocks,
        COMBINE_THREADS, [partial, position, topk_weights, out, tokens, h],
    )  # fmt: skip


@lru_cache
def _count(layer: LayerConfig, *kind: bool) -> Kernel:
    return _route(layer, *kind)._replace(name="count", shared=4 * layer.num_local_experts)


@lru_cache
def _route(layer: LayerConfig, mapped: bool, long_ids: bool, counted: bool, sort: bool) -> Kernel:
    quantised = layer.format == Fp8BlockWeights.name
    constants = {
        "EXPERTS": layer.num_local_experts,
        "NUM_IDS": layer.num_experts if mapped else layer.num_local_experts,
        "TOP_K": layer.top_k,
        "HAS_MAP": int(mapped),
        "IDS64": int(long_ids),
        "WEIGHT_ON_INPUT": int(layer.apply_router_weight_on_input),
        "QUANTISED": int(quantised),
        "CHUNKS": CHUNKS if counted else 0,
        "SORTED": int(sort),
        # A thread counts how many have more for each of its experts, which takes long for many.
        "DESCENDING": int(sort and not quantised and layer.num_local_experts <= ROUTE_THREADS),
        "PIECES": PIECES if counted else 1,
    }
    slots = ROUTE_THREADS // layer.top_k * layer.top_k
    shared = 4 * (3 * layer.num_local_experts + slots + ROUTE_THREADS // 32) + 16
    shared += 512 * (1 if quantised else ROUTE_THREADS // 32)  # a warp's columns, to reorder
    return Kernel(FOLDER / "route.cu", "route", tuple(constants.items()), shared)


@lru_cache
def _combine(top_k: int, weight_on_input: bool, pieces: int) -> Kernel:
    constants = {"TOP_K": top_k, "WEIGHTED": int(not weight_on_input), "PIECES": pieces}
    return Kernel(FOLDER / "combine.cu", "combine", tuple(constants.items()), 0)
