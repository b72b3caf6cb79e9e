"""Around the GEMMs of `flow.py` and `pairs.py`, on the host: slots sorted, and the sum."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from moe_backend.formats import Fp8BlockWeights, Nvfp4Weights
from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.cuda.launch import Kernel, Memory, launch
from moe_backend.kernels.hopper.tiles import PAIRS_TOKENS
from moe_backend.kernels.registry import LayerConfig

FOLDER = Path(__file__).parent / "cuda"
ROUTE_THREADS, SPREAD_THREADS, COMBINE_THREADS = 512, 256, 256
BLOCKS_PER_SM = 2  # of the routing, each with as many tokens
COMBINE_PER_SM = 3  # blocks of the sum that run together
# Slots of a call from which `route` has a launch of its own count them, in so many parts; below,
# every block looks through all. Measured on an H200 at 8,192 (2 us more) and 32,768 (8 less).
# `spread` always has.
MANY_SLOTS = 1 << 14
CHUNKS = 32
# Of 256 columns of a token, that a warp brings at once with many slots, or where tokens are copied
# to positions; else one.
PIECES = 4
LONE_PIECES = 2  # in the sum, if tokens with one slot are left out
MOST_LONE = 32  # slots of a token, of which the sum finds out whether it has one here


class Routed(NamedTuple):
    """What `route` writes, in the caller's memory.

    Attributes:
        operand: `[tokens, H]`, of FP8 layers e4m3 with scale, fp32 `[H / 128, tokens]`; else bf16,
            of NVFP4 layers columns in the order of `device._nvfp4_position`.
        position: int32 `[slots]`, -1 for slots that are left out.
        token_of: int32 `[positions]`; undefined where no slot is.
        experts: int32, how many were hit and of each expert, first position and end position, in
            ascending order of experts.
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


class Spread(NamedTuple):
    """What `spread` writes, in the caller's memory: as `Routed`, but with a row for each position.

    Attributes:
        operand, scale: `[positions, H]` and `[H / 128, positions]`.
        targets: (int32, fp32) `[positions]`, if `lone_slots`: the token, if it has no other slot
            here, and its routing weight; else -1 and 1.
        experts: but of FP8, with up to ROUTE_THREADS of them, those whose items have more tokens
            first.
    """

    operand: Memory
    scale: Memory
    position: Memory
    targets: Memory
    experts: Memory
    counts: Memory


def positions_of(layer: LayerConfig, slots: int) -> int:
    """Room for so many slots whichever experts they go to, each from a multiple of 4 on."""
    return cdiv(slots + 3 * min(layer.num_local_experts, slots), 4) * 4


def many(layer: LayerConfig, tokens: int) -> bool:
    """Whether `route` has a call's slots counted beforehand, and whether the sum works on more."""
    return tokens * layer.top_k >= MANY_SLOTS


def lone_slots(layer: LayerConfig, expert_map: torch.Tensor | None) -> bool:
    """Whether the GEMMs write sums of tokens with one slot here: where there may be many."""
    return expert_map is not None and layer.top_k <= MOST_LONE


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
    tokens, counted = len(x), many(layer, len(x))
    shares = _shares(layer, tokens, sms)
    expert_of = topk_ids if expert_map is None else expert_map
    slots = _slots(layer, expert_map is not None, topk_ids.dtype == torch.int64)
    if counted:
        _launch_count(slots, topk_ids, expert_of, to.counts, shares)
    launch(
        _route(layer, slots, counted), shares.blocks + 1, ROUTE_THREADS,
        [x, topk_ids, expert_of, topk_weights, *to, counters, tokens, shares.each, shares.chunk,
         layer.hidden_size],
    )  # fmt: skip


def spread(
    layer: LayerConfig,
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    to: Spread,
    sms: int,
    positions: int,
) -> None:
    """As `route`, but tokens go to the positions of all their slots, of so many.

    Args:
        topk_ids: at least one.
    """
    tokens, h, shares = len(x), layer.hidden_size, _shares(layer, len(x), sms)
    expert_of = topk_ids if expert_map is None else expert_map
    slots = _slots(layer, expert_map is not None, topk_ids.dtype == torch.int64)
    _launch_count(slots, topk_ids, expert_of, to.counts, shares)
    launch(
        _sort(layer, slots, lone_slots(layer, expert_map)), shares.blocks + 1, ROUTE_THREADS,
        [topk_ids, expert_of, topk_weights, to.position, to.targets, to.experts, to.counts, tokens,
         shares.each, shares.chunk],
    )  # fmt: skip
    jobs = tokens * cdiv(h, 256 * PIECES)  # of warps
    launch(
        _spread(layer), cdiv(jobs, SPREAD_THREADS // 32), SPREAD_THREADS,
        [x, to.position, topk_weights, to.operand, to.scale, tokens, positions, h],
    )  # fmt: skip


def combine(
    layer: LayerConfig,
    partial: Memory,
    position: Memory,
    topk_weights: torch.Tensor,
    out: torch.Tensor,
    sms: int,
    lone: bool = False,
) -> None:
    """`out` becomes sums over top_k of `partial`, bf16 `[positions, H]`, with the weights.

    Args:
        topk_weights: fp32, contiguous; out: `[tokens, H]`; sms: multiprocessors of the GPU.
        lone: rows of tokens with one slot are there already, and are left as they are.
    """
    tokens, h = out.shape
    pieces = (LONE_PIECES if lone else PIECES) if many(layer, tokens) else 1
    jobs = tokens * cdiv(h, 256 * pieces)  # of warps
    blocks = min(COMBINE_PER_SM * sms, cdiv(jobs, COMBINE_THREADS // 32))
    launch(
        _combine(layer.top_k, layer.apply_router_weight_on_input, pieces, lone), blocks,
        COMBINE_THREADS, [partial, position, topk_weights, out, tokens, h],
    )  # fmt: skip


class _Shares(NamedTuple):
    """How the routing deals out a call: tokens of a block, blocks, slots of a chunk, all slots."""

    each: int
    blocks: int
    chunk: int
    slots: int


def _shares(layer: LayerConfig, tokens: int, sms: int) -> _Shares:
    each = cdiv(tokens, BLOCKS_PER_SM * sms)
    blocks = cdiv(tokens, each)
    chunk = cdiv(blocks, CHUNKS) * each * layer.top_k
    return _Shares(each, blocks, chunk, tokens * layer.top_k)


Constants = tuple[tuple[str, int], ...]


@lru_cache
def _slots(layer: LayerConfig, mapped: bool, long_ids: bool) -> Constants:
    """Of `slots.cuh`, but CHUNKS."""
    constants = {
        "EXPERTS": layer.num_local_experts,
        "NUM_IDS": layer.num_experts if mapped else layer.num_local_experts,
        "TOP_K": layer.top_k,
        "HAS_MAP": int(mapped),
        "IDS64": int(long_ids),
    }
    return tuple(constants.items())


def _slots_bytes(layer: LayerConfig) -> int:
    """Of shared memory."""
    slots = ROUTE_THREADS // layer.top_k * layer.top_k
    return 4 * (3 * layer.num_local_experts + slots + ROUTE_THREADS // 32)


def _tokens(layer: LayerConfig, counted: bool) -> Constants:
    """Of `tokens.cuh`."""
    constants = {
        "QUANTISED": int(layer.format == Fp8BlockWeights.name),
        "REORDERED": int(layer.format == Nvfp4Weights.name),
        "WEIGHT_ON_INPUT": int(layer.apply_router_weight_on_input),
        "PIECES": PIECES if counted else 1,
    }
    return tuple(constants.items())


def _ordered_bytes(layer: LayerConfig, threads: int) -> int:
    """A warp's 256 columns, to reorder them, of a block."""
    return 512 * (threads // 32) if layer.format == Nvfp4Weights.name else 0


@lru_cache
def _count(slots: Constants) -> Kernel:
    experts = dict(slots)["EXPERTS"]
    return Kernel(FOLDER / "count.cu", "count", (*slots, ("CHUNKS", CHUNKS)), 4 * experts)


@lru_cache
def _route(layer: LayerConfig, slots: Constants, counted: bool) -> Kernel:
    constants = *slots, ("CHUNKS", CHUNKS if counted else 0), *_tokens(layer, counted)
    shared = _slots_bytes(layer) + 16 + max(4, _ordered_bytes(layer, ROUTE_THREADS))
    return Kernel(FOLDER / "route.cu", "route", constants, shared)


@lru_cache
def _sort(layer: LayerConfig, slots: Constants, lone: bool) -> Kernel:
    # A thread counts how many come before each of its experts, which takes long for many.
    few = layer.num_local_experts <= ROUTE_THREADS
    more = {
        "CHUNKS": CHUNKS,
        "TILE": PAIRS_TOKENS.get(layer.format, 0) if few else 0,
        "LONE": int(lone),
        "WEIGHT_ON_INPUT": int(layer.apply_router_weight_on_input),
    }
    return Kernel(FOLDER / "sort.cu", "sort", (*slots, *more.items()), _slots_bytes(layer))


@lru_cache
def _spread(layer: LayerConfig) -> Kernel:
    constants = ("TOP_K", layer.top_k), *_tokens(layer, True)
    shared = _ordered_bytes(layer, SPREAD_THREADS)
    return Kernel(FOLDER / "spread.cu", "spread", constants, shared)


@lru_cache
def _combine(top_k: int, weight_on_input: bool, pieces: int, lone: bool) -> Kernel:
    constants = {
        "TOP_K": top_k,
        "WEIGHTED": int(not weight_on_input),
        "PIECES": pieces,
        "LONE": int(lone),
    }
    return Kernel(FOLDER / "combine.cu", "combine", tuple(constants.items()), 0)


def _launch_count(
    slots: Constants,
    topk_ids: torch.Tensor,
    expert_of: torch.Tensor,
    counts: Memory,
    shares: _Shares,
) -> None:
    launch(
        _count(slots), CHUNKS, ROUTE_THREADS,
        [topk_ids, expert_of, counts, shares.slots, shares.chunk],
    )  # fmt: skip
