"""Device code around the GEMMs for many tokens: slots sorted by expert, and the sum at the end.

Positions are those of the sorted slots. Every expert's first position is a multiple of 4, so that
the accelerator can read fp32 scales from there (its rows must begin at multiples of 16 bytes).
Within an expert the order is that of the slots: no atomics, so repeated runs are bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_backend.kernels.hopper.device import _in_nvfp4_order

E4M3_MAX: tl.constexpr = tl.constexpr(448.0)


@triton.jit
def rank_kernel(
    ids, expert_map, local, rank, counts, num_slots, num_ids,
    HAS_MAP: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A chunk of slots: local expert (or -1) and rank among the chunk's slots of that expert.

    `counts[chunk, e]` gets the number of slots of each; its last bin takes the dropped ones.
    """
    if PDL:
        gdc_launch_dependents()
    chunk = tl.program_id(0)
    index = tl.arange(0, CHUNK)
    slot = chunk * CHUNK + index
    expert = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)  # int64 or int32
    expert = tl.where(expert < num_ids, expert, -1)  # left out, as -1
    if HAS_MAP:
        expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
    tl.store(local + slot, expert, mask=slot < num_slots)
    bin = tl.where(expert >= 0, expert, BINS - 1)
    found = tl.histogram(bin, BINS)
    tl.store(counts + chunk * BINS + tl.arange(0, BINS), found)
    key = tl.sort(bin * CHUNK + index)
    first = tl.cumsum(found, 0) - found
    mine = index - tl.gather(first, key // CHUNK, 0)
    slot = chunk * CHUNK + key % CHUNK
    tl.store(rank + slot, mine, mask=slot < num_slots)


@triton.jit
def _take_down(flags, num_flags, BLOCK: tl.constexpr):
    """Zeros, for launches that raise flags or count."""
    for first in range(0, num_flags, BLOCK):
        flag = first + tl.arange(0, BLOCK)
        tl.store(flags + flag, tl.zeros((BLOCK,), tl.int32), mask=flag < num_flags)


@triton.jit(do_not_specialize=["chunks"])
def place_kernel(
    counts, base, tiles, num_local, chunks,
    CHUNKS: tl.constexpr, BINS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`base[chunk, e]`: position of a chunk's first slot of expert e, for COLUMNS of the experts.

    `tiles` gets the number of tiles, then expert, first position and end position of each.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    chunk = tl.arange(0, CHUNKS)[:, None]
    own = tl.program_id(0)
    position = 0
    tile = 0
    for b in range(own):
        e = b * COLUMNS + tl.arange(0, COLUMNS)
        inside = (chunk < chunks) & (e < num_local)[None, :]
        total = tl.sum(tl.load(counts + chunk * BINS + e[None, :], mask=inside, other=0), 0)
        position += tl.sum((total + 3) // 4 * 4, 0)
        tile += tl.sum((total + TOKENS - 1) // TOKENS, 0)
    e = own * COLUMNS + tl.arange(0, COLUMNS)
    inside = (chunk < chunks) & (e < num_local)[None, :]
    found = tl.load(counts + chunk * BINS + e[None, :], mask=inside, other=0)
    total = tl.sum(found, 0)
    padded = (total + 3) // 4 * 4
    start = position + tl.cumsum(padded, 0) - padded
    before = tl.cumsum(found, 0) - found
    tl.store(base + chunk * BINS + e[None, :], start[None, :] + before, mask=inside)
    each = (total + TOKENS - 1) // TOKENS
    row = tile + tl.cumsum(each, 0) - each
    for t in range(tl.max(each, 0)):
        entry = tiles + 1 + (row + t) * 3
        tl.store(entry, e, mask=t < each)
        tl.store(entry + 1, start + t * TOKENS, mask=t < each)
        tl.store(entry + 2, start + total, mask=t < each)
    if own == tl.num_programs(0) - 1:
        tl.store(tiles, tile + tl.sum(each, 0))


@triton.jit
def _coded(value, DTYPE: tl.constexpr, QUANTISED: tl.constexpr, GROUPS: tl.constexpr):
    """A token's `[GROUPS, 128]` columns as the first GEMM reads them, and the scale of each row."""
    amax = tl.max(tl.abs(value), 1)
    scale = tl.where(amax > 0, amax / E4M3_MAX, 1.0)
    if QUANTISED:
        code = (value / scale[:, None]).to(DTYPE)
    else:
        code = _in_nvfp4_order(value.to(DTYPE), GROUPS * 128)
    return code, scale


@triton.jit
def permute_kernel(
    x, topk_weights, local, rank, base, position, operand, operand_scale, H, width, scale_stride,
    QUANTISED: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, TOP_K: tl.constexpr,
    CHUNK: tl.constexpr, BINS: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each token to the positions of its slots, which are -1 for dropped ones.

    QUANTISED per 128 columns, or as it is in the order of `device._nvfp4_position`, with zeros up
    to `width` columns.
    """
    token = tl.program_id(0).to(tl.int64)
    # Known since before the launch before this one; tokens without a local expert are not read.
    experts = ()
    ranks = ()
    most = -1
    for k in tl.static_range(TOP_K):
        experts += (tl.load(local + token * TOP_K + k),)
        ranks += (tl.load(rank + token * TOP_K + k),)
        most = tl.maximum(most, experts[k])
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    read = tl.where(most >= 0, H, 0)
    value = tl.load(x + token * H + column, mask=column < read, other=0.0).to(tl.float32)
    if WEIGHT_ON_INPUT:
        value *= tl.load(topk_weights + token)
    code, scale = _coded(value, operand.dtype.element_ty, QUANTISED, GROUPS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    groups = tl.cdiv(H, 128)
    for k in tl.static_range(TOP_K):
        slot = token * TOP_K + k
        expert = experts[k]
        first = tl.load(base + slot // CHUNK * BINS + expert, mask=expert >= 0, other=0)
        p = tl.where(expert >= 0, first + ranks[k], -1)
        tl.store(position + slot, p)
        if p >= 0:
            tl.store(operand + p.to(tl.int64) * width + column, code, mask=column < width)
            if QUANTISED:
                tl.store(operand_scale + group * scale_stride + p, scale, mask=group < groups)


@triton.jit(do_not_specialize=["num_slots", "num_ids", "num_flags"])
def plan_kernel(
    x, ids, expert_map, topk_weights, operand, position, tiles, flags, num_slots, num_ids, H,
    width, num_flags, HAS_MAP: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr,
    TOP_K: tl.constexpr, KS: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All of the above in one launch, for so few slots that each program looks through all.

    Program 0 lists the tiles, for `share_device._tile`, and takes the flags down; each other takes
    a token to the positions of its slots, as `permute_kernel` does where nothing is quantised.
    """
    if PDL:
        gdc_launch_dependents()
    token = tl.maximum(tl.program_id(0) - 1, 0).to(tl.int64)
    # On their way while the slots are counted; not worth waiting to know whether they are needed.
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    given = tl.load(x + token * H + column, mask=column < H, other=0.0)
    k = tl.arange(0, KS)
    own = tl.load(ids + token * TOP_K + k, mask=k < TOP_K, other=-1).to(tl.int32)
    own = tl.where(own < num_ids, own, -1)  # left out, as -1
    if HAS_MAP:
        own = tl.load(expert_map + own, mask=own >= 0, other=-1)
    found = tl.zeros((EXPERTS,), tl.int32)
    rank = tl.zeros((KS,), tl.int32)
    for first in range(0, num_slots, CHUNK):
        slot = first + tl.arange(0, CHUNK)
        expert = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
        expert = tl.where(expert < num_ids, expert, -1)
        if HAS_MAP:
            expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
        found += tl.histogram(tl.maximum(expert, 0), EXPERTS, mask=expert >= 0)
        before = (slot[None, :] < token * TOP_K + k[:, None]) & (expert[None, :] == own[:, None])
        rank += tl.sum(before.to(tl.int32), 1)
    padded = (found + 3) // 4 * 4
    start = tl.cumsum(padded, 0) - padded
    e = tl.arange(0, EXPERTS)
    if tl.program_id(0) == 0:
        each = (found + TOKENS - 1) // TOKENS
        row = tl.cumsum(each, 0) - each
        for t in range(tl.max(each, 0)):
            entry = tiles + 1 + (row + t) * 4
            tl.store(entry, e, mask=t < each)
            tl.store(entry + 1, start, mask=t < each)
            tl.store(entry + 2, start + found, mask=t < each)
            tl.store(entry + 3, row, mask=t < each)
        tl.store(tiles, tl.sum(each, 0))
        _take_down(flags, num_flags, CHUNK)
    else:
        value = given.to(tl.float32)
        if WEIGHT_ON_INPUT:
            value *= tl.load(topk_weights + token)
        code = _in_nvfp4_order(value.to(operand.dtype.element_ty), GROUPS * 128)
        first_of = tl.sum(tl.where(e[None, :] == own[:, None], start[None, :], 0), 1)
        place = tl.where(own >= 0, first_of + rank, -1)
        tl.store(position + token * TOP_K + k, place, mask=k < TOP_K)
        for j in tl.static_range(TOP_K):
            p = tl.sum(tl.where(k == j, place, 0), 0)
            if p >= 0:
                tl.store(operand + p.to(tl.int64) * width + column, code, mask=column < width)


@triton.jit
def combine_kernel(
    partial, position, topk_weights, out, H,
    TOP_K: tl.constexpr, WEIGHT_ON_INPUT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`out[token] = sum over k of topk_weight * partial[position]`, in order of k."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    positions = ()
    for k in tl.static_range(TOP_K):  # known since before the GEMMs
        positions += (tl.load(position + token * TOP_K + k).to(tl.int64),)
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        p = positions[k]
        if p >= 0:  # a dropped slot has no row
            row = tl.load(partial + p * H + column, mask=column < H, other=0.0).to(tl.float32)
            if not WEIGHT_ON_INPUT:
                row *= tl.load(topk_weights + token * TOP_K + k)
            acc += row
    tl.store(out + token * H + column, acc.to(out.dtype.element_ty), mask=column < H)
