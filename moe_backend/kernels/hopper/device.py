"""Device code for Hopper: one routing launch, two grouped GEMMs, one sum.

Weights are the first operand of every product: a tile of 64 to 256 weight rows is the wide side of
a warp-group MMA and the few tokens of an expert its narrow one, so one row per expert wastes
little. The tensor memory accelerator brings weight tiles from the checkpoint's own rows (NVFP4 in
the order of `codes.py`). It sees `w13` as `[E, I / 8, (gate, up), 8, H]`, so a tile holds gate and
up rows in turns of eight, and the accumulators of a gate row and of its up row lie in the same
thread.

FP8 weights meet activations quantised per token and 128 columns (the hidden ones per token and tile
of rows), each partial sum of at most 128 products scaled in fp32. NVFP4 codes become bf16 times
their block scale in registers, exactly, and meet bf16 activations.

Sums are in a fixed order, with no atomics: repeated runs are bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_backend.kernels.triton.device import BF16, FP8_BLOCK, NVFP4, _activate, _e2m1

E4M3_MAX: tl.constexpr = tl.constexpr(448.0)

# A word of eight e2m1 codes in the order of `codes.py`, to bf16 times the scale of their group, $9:
# codes 0, 4, 2, 6 to $0..$3, codes 1, 5, 3, 7 to $4..$7. The scales carry 2**118 and the caller
# the rest.
_DECODE: tl.constexpr = tl.constexpr(
    """
    {
    .reg .b32 c;
    .reg .b32 s;
    mov.b32 s, {$9, $9};
    and.b32 c, $8, 0x81C081C0;
    mul.rn.bf16x2 c, c, s;
    mov.b32 {$0, $1}, c;
    shf.l.wrap.b32 c, $8, $8, 10;
    and.b32 c, c, 0x81C081C0;
    mul.rn.bf16x2 c, c, s;
    mov.b32 {$4, $5}, c;
    shf.l.wrap.b32 c, $8, $8, 13;
    and.b32 c, c, 0x81C081C0;
    mul.rn.bf16x2 c, c, s;
    mov.b32 {$2, $3}, c;
    and.b32 c, $8, 0x001B001B;
    mul.lo.u32 c, c, 0x4108;
    and.b32 c, c, 0x81C081C0;
    mul.rn.bf16x2 c, c, s;
    mov.b32 {$6, $7}, c;
    }
    """
)

# Four e4m3 scales, none negative, to bf16 times 2**118: their bits four to the left are bf16 times
# 2**-120, subnormal or not. The sign of -0 is left out.
_DECODE_SCALES: tl.constexpr = tl.constexpr(
    """
    {
    .reg .b32 a, b, f;
    mov.b32 f, 0x7B007B00;
    prmt.b32 a, $2, 0, 0x4140;
    prmt.b32 b, $2, 0, 0x4342;
    and.b32 a, a, 0x007F007F;
    and.b32 b, b, 0x007F007F;
    shl.b32 a, a, 4;
    shl.b32 b, b, 4;
    mul.rn.bf16x2 a, a, f;
    mul.rn.bf16x2 b, b, f;
    mul.rn.bf16x2 $0, a, f;
    mul.rn.bf16x2 $1, b, f;
    }
    """
)


@triton.jit
def _nvfp4_position(k):
    """Where column `k` of an NVFP4 operand lies among the columns that the MMA sees.

    Of 128 bytes, 256 columns, thread t of four reads 32t..32t+31, with four whole groups of scales.
    The low nibbles of each four of them come to it as columns 2t, 2t+1, 2t+8, 2t+9 of 16, in the
    order of bytes 0, 2, 1, 3; the high ones 128 columns further on.
    """
    byte = (k % 256) // 2
    return (
        (k // 256) * 256 + (k % 2) * 128 + (byte % 32) // 4 * 16
        + byte % 2 * 8 + byte // 32 * 2 + (byte % 4) // 2
    )  # fmt: skip


@triton.jit
def _in_nvfp4_order(value, BLOCK: tl.constexpr):
    """`[BLOCK / 128, 128]` columns in the order of `_nvfp4_position`.

    Bits of the column from the highest of its 256 on: two that say which thread, three, one, one,
    and whether it is odd. Moved in registers, as reading two bytes here and there is slow.
    """
    bits = value.reshape(BLOCK // 256, 4, 8, 2, 2, 2)
    return bits.permute(0, 5, 2, 4, 1, 3).reshape(BLOCK // 128, 128)


@triton.jit
def route_kernel(
    x,
    ids,
    expert_map,
    topk_weights,
    operand,
    operand_scale,
    slots,
    ends,
    num_slots,
    num_ids,
    num_local,
    H,
    HAS_MAP: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    FORMAT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """Slots grouped by local expert, and activations as the first GEMM wants them.

    Program e < num_local lists the slots of local expert e in token order; the others take one
    token each. `slots` and `ends` are those of `layout.routing.RoutingPlan`, without the dropped.
    """
    if PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < num_local:
        count = 0
        position = 0
        for first in range(0, num_slots, CHUNK):
            slot = first + tl.arange(0, CHUNK)
            expert = tl.load(ids + slot, mask=slot < num_slots, other=-1)
            if HAS_MAP:
                known = (expert >= 0) & (expert < num_ids)
                expert = tl.load(expert_map + expert, mask=known, other=-1)
            position += tl.sum(((expert >= 0) & (expert < pid)).to(tl.int32), 0)
            count += tl.sum((expert == pid).to(tl.int32), 0)
        tl.store(ends + pid, position + count)
        if count > 0:
            for first in range(0, num_slots, CHUNK):
                slot = first + tl.arange(0, CHUNK)
                expert = tl.load(ids + slot, mask=slot < num_slots, other=-1)
                if HAS_MAP:
                    known = (expert >= 0) & (expert < num_ids)
                    expert = tl.load(expert_map + expert, mask=known, other=-1)
                hit = (expert == pid).to(tl.int32)
                tl.store(slots + position + tl.cumsum(hit, 0) - 1, slot, mask=hit > 0)
                position += tl.sum(hit, 0)
    elif FORMAT != BF16 or WEIGHT_ON_INPUT:
        token = (pid - num_local).to(tl.int64)
        group = tl.arange(0, BLOCK_H // 128)
        column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
        value = tl.load(x + token * H + column, mask=column < H, other=0.0).to(tl.float32)
        if WEIGHT_ON_INPUT:
            value *= tl.load(topk_weights + token)
        if FORMAT == FP8_BLOCK:
            amax = tl.max(tl.abs(value), 1)
            scale = tl.where(amax > 0, amax / E4M3_MAX, 1.0)
            value = value / scale[:, None]
            groups = tl.cdiv(H, 128)
            tl.store(operand_scale + token * groups + group, scale, mask=group < groups)
        code = value.to(operand.dtype.element_ty)
        width = H
        if FORMAT == NVFP4:
            code = _in_nvfp4_order(code, BLOCK_H)
            width = tl.cdiv(H, 256) * 256
        tl.store(operand + token * width + column, code, column < width)


@triton.jit
def _schedule(ends, num_local, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First and end position of every expert's slots, and the running number of its tiles."""
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < num_local, other=0)
    start = tl.load(ends + expert - 1, mask=(expert < num_local) & (expert > 0), other=0)
    return expert, start, end, tl.cumsum((end - start + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def _tile(t, blocks, expert, start, end, tiles, BLOCK_M: tl.constexpr):
    """Expert, first position, end position and row block of tile `t`.

    The tiles of an expert that share weights are neighbours.
    """
    e = tl.sum((tiles * blocks <= t).to(tl.int32), 0)
    own = expert == e
    first = tl.sum(tl.where(own, start, 0), 0)
    last = tl.sum(tl.where(own, end, 0), 0)
    after = tl.sum(tl.where(own, tiles, 0), 0)
    count = (last - first + BLOCK_M - 1) // BLOCK_M
    rest = t - (after - count) * blocks
    return e, first + (rest % count) * BLOCK_M, last, rest // count


@triton.jit
def _step_of_rows(rows, column, valid, K):
    """The columns of one step of activation rows; zeros past the end and in rows of no slot."""
    return tl.load(rows + column[None, :], mask=valid[:, None] & (column < K)[None, :], other=0.0)


@triton.jit
def _place_of_groups():
    """Where a row's 16 scales of a step lie, from its first on (`codes.rearranged_scales`)."""
    group = tl.arange(0, 16)
    return group // 4 * 8 + group % 4


@triton.jit
def _bf16_scales(scale):
    """e4m3 block scales as bf16, in the form that `_decoded_words` multiplies with."""
    return tl.inline_asm_elementwise(
        _DECODE_SCALES, "=r,=r,r", [scale.to(tl.uint8, bitcast=True)],
        dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _decoded_words(packed, spread):
    """Of each word codes 0, 4, 2, 6 times its scale, then 1, 5, 3, 7."""
    return tl.inline_asm_elementwise(
        _DECODE, "=h,=h,=h,=h,=h,=h,=h,=h,r,h", [packed, spread],
        dtype=(
            tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
            tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
        ),
        is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _codes_of(word):
    """The eight e2m1 codes of words in the order of `codes.py`, without PTX."""
    word = word.to(tl.uint32, bitcast=True)
    c0, c4 = _codes_of_pair(word)
    c1, c5 = _codes_of_pair(word << 10 | word >> 22)
    c2, c6 = _codes_of_pair(word << 13 | word >> 19)
    c3, c7 = _codes_of_pair((word & 0x001B001B) * 0x4108)
    return c0, c1, c2, c3, c4, c5, c6, c7


@triton.jit
def _codes_of_pair(pair):
    """Codes whose bits lie where bf16 wants them, in the low and in the high half of a word."""
    low = (pair >> 12 & 8) | (pair >> 6 & 7)
    high = (pair >> 28 & 8) | (pair >> 22 & 7)
    return low, high


@triton.jit
def _decode_nvfp4(packed, scale, ROWS: tl.constexpr, PTX: tl.constexpr, COMPUTE: tl.constexpr):
    """`[ROWS, 32]` words and `[ROWS, 16]` e4m3 scales as bf16 operands for even and odd columns.

    Columns are in the order of `_nvfp4_position`, values 2**-8 times what they stand for.
    """
    if PTX:
        spread = _bf16_scales(scale)
        spread = tl.broadcast_to(spread[:, :, None], (ROWS, 16, 2)).reshape(ROWS, 32)
        e0, e2, e1, e3, o0, o2, o1, o3 = _decoded_words(packed, spread)
    else:
        spread = scale.to(tl.float32) * 0.00390625
        spread = tl.broadcast_to(spread[:, :, None], (ROWS, 16, 2)).reshape(ROWS, 32)
        c0, c1, c2, c3, c4, c5, c6, c7 = _codes_of(packed)
        e0 = (_e2m1(c0, tl.float32) * spread).to(COMPUTE)
        o0 = (_e2m1(c1, tl.float32) * spread).to(COMPUTE)
        e1 = (_e2m1(c2, tl.float32) * spread).to(COMPUTE)
        o1 = (_e2m1(c3, tl.float32) * spread).to(COMPUTE)
        e2 = (_e2m1(c4, tl.float32) * spread).to(COMPUTE)
        o2 = (_e2m1(c5, tl.float32) * spread).to(COMPUTE)
        e3 = (_e2m1(c6, tl.float32) * spread).to(COMPUTE)
        o3 = (_e2m1(c7, tl.float32) * spread).to(COMPUTE)
    even = tl.join(tl.join(e0, e1), tl.join(e2, e3))  # codes 0, 4, 2, 6
    odd = tl.join(tl.join(o0, o1), tl.join(o2, o3))
    even = even.reshape(ROWS, 4, 8, 2, 2).permute(0, 2, 3, 1, 4).reshape(ROWS, 128)
    odd = odd.reshape(ROWS, 4, 8, 2, 2).permute(0, 2, 3, 1, 4).reshape(ROWS, 128)
    return even, odd


@triton.jit
def gate_up_kernel(
    operand,
    operand_scale,
    w13,
    w13_scale,
    w13_global,
    hidden,
    hidden_scale,
    slots,
    ends,
    limit,
    alpha,
    beta,
    num_local,
    H,
    I,
    operand_width,
    hidden_width,
    scale_rows,
    scale_columns,
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """`hidden[position] = act(gate, up)`: BLOCK_I hidden columns of up to BLOCK_M slots a tile."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ROWS: tl.constexpr = 2 * BLOCK_I
    blocks = tl.cdiv(I, BLOCK_I)
    steps = tl.cdiv(H, BLOCK_K)
    expert, start, end, tiles = _schedule(ends, num_local, EXPERTS, BLOCK_M)
    row = tl.arange(0, ROWS)
    up_row = (row // 8) % 2
    i_row = (row // 16) * 8 + row % 8
    k = tl.arange(0, BLOCK_K)
    for t in range(tl.program_id(0), tl.max(tiles, 0) * blocks, tl.num_programs(0)):
        e, m0, last, block = _tile(t, blocks, expert, start, end, tiles, BLOCK_M)
        m = m0 + tl.arange(0, BLOCK_M)
        valid = m < last
        token = tl.load(slots + m, mask=valid, other=0) // TOP_K
        x_row = operand + token.to(tl.int64)[:, None] * operand_width
        i = block * BLOCK_I + i_row
        inside = i < I
        if SPLIT:
            gate = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
            up = tl.zeros((BLOCK_I, BLOCK_M), tl.float32)
            if FORMAT == FP8_BLOCK:
                sx_row = operand_scale + token * tl.cdiv(H, 128)
                # A tile of rows lies within one block of scales.
                sg_row = w13_scale + e * 2 * scale_rows * scale_columns
                sg_row += block * BLOCK_I // SCALE_N * scale_columns
                su_row = sg_row + scale_rows * scale_columns
                sx = tl.load(sx_row, mask=valid, other=0.0)
                sg = tl.load(sg_row)
                su = tl.load(su_row)
                for step in tl.range(0, steps, num_stages=STAGES):
                    k0 = step * BLOCK_K
                    wg = w13.load([e * 2, block * BLOCK_I, k0]).reshape(BLOCK_I, BLOCK_K)
                    wu = w13.load([e * 2 + 1, block * BLOCK_I, k0]).reshape(BLOCK_I, BLOCK_K)
                    x = _step_of_rows(x_row, k0 + k, valid, H)
                    x = tl.trans(x)
                    gate_part = tl.dot(wg, x)
                    up_part = tl.dot(wu, x)
                    # The scales of the next step are on their way while this one is multiplied.
                    k1 = tl.minimum(step + 1, steps - 1) * BLOCK_K
                    next_sx = tl.load(sx_row + k1 // 128, mask=valid, other=0.0)
                    next_sg = tl.load(sg_row + k1 // SCALE_K)
                    next_su = tl.load(su_row + k1 // SCALE_K)
                    gate += gate_part * (sg * sx)[None, :]
                    up += up_part * (su * sx)[None, :]
                    sx = next_sx
                    sg = next_sg
                    su = next_su
            else:
                for step in tl.range(0, steps, num_stages=STAGES):
                    k0 = step * BLOCK_K
                    wg = w13.load([e * 2, block * BLOCK_I, k0]).reshape(BLOCK_I, BLOCK_K)
                    wu = w13.load([e * 2 + 1, block * BLOCK_I, k0]).reshape(BLOCK_I, BLOCK_K)
                    x = _step_of_rows(x_row, k0 + k, valid, H)
                    x = tl.trans(x)
                    gate = tl.dot(wg, x, gate)
                    up = tl.dot(wu, x, up)
            h = _activate(gate, up, limit, alpha, beta, ACTIVATION)
        else:
            acc = tl.zeros((ROWS, BLOCK_M), tl.float32)
            if FORMAT == FP8_BLOCK:
                sx_row = operand_scale + token * tl.cdiv(H, 128)
                sw_row = w13_scale + ((e * 2 + up_row) * scale_rows + i // SCALE_N) * scale_columns
                sx = tl.load(sx_row, mask=valid, other=0.0)
                sw = tl.load(sw_row, mask=inside, other=0.0)
                for step in tl.range(0, steps, num_stages=STAGES):
                    k0 = step * BLOCK_K
                    w = w13.load([e, block * (BLOCK_I // 8), 0, 0, k0]).reshape(ROWS, BLOCK_K)
                    x = _step_of_rows(x_row, k0 + k, valid, H)
                    part = tl.dot(w, tl.trans(x))
                    # The scales of the next step are on their way while this one is multiplied.
                    k1 = tl.minimum(step + 1, steps - 1) * BLOCK_K
                    next_sx = tl.load(sx_row + k1 // 128, mask=valid, other=0.0)
                    next_sw = tl.load(sw_row + k1 // SCALE_K, mask=inside, other=0.0)
                    acc += part * sw[:, None] * sx[None, :]
                    sx = next_sx
                    sw = next_sw
            elif FORMAT == NVFP4:
                group = _place_of_groups()
                unit = (e.to(tl.int64) * (I // 8) + i // 8) * scale_columns
                s_row = w13_scale + (unit * 256 + i % 8 * 32 + up_row * 4)[:, None]
                half = tl.arange(0, 128)
                for step in tl.range(0, steps, num_stages=STAGES):
                    packed = w13.load([e, block * (BLOCK_I // 8), 0, 0, step * 32]).reshape(
                        ROWS, 32
                    )
                    scale = tl.load(
                        s_row + (step * 256 + group)[None, :], mask=inside[:, None], other=0.0
                    )
                    x_even = tl.load(
                        x_row + (step * 256 + half)[None, :], valid[:, None], other=0.0
                    )
                    x_odd = tl.load(
                        x_row + (step * 256 + 128 + half)[None, :], valid[:, None], other=0.0
                    )
                    even, odd = _decode_nvfp4(packed, scale, ROWS, PTX, operand.dtype.element_ty)
                    acc = tl.dot(even, tl.trans(x_even), acc)
                    acc = tl.dot(odd, tl.trans(x_odd), acc)
                factor = tl.load(w13_global + e * 2 + up_row)
                acc *= factor[:, None] * 256.0  # 2**126 / 2**118
            else:
                for step in tl.range(0, steps, num_stages=STAGES):
                    k0 = step * BLOCK_K
                    w = w13.load([e, block * (BLOCK_I // 8), 0, 0, k0]).reshape(ROWS, BLOCK_K)
                    x = _step_of_rows(x_row, k0 + k, valid, H)
                    acc = tl.dot(w, tl.trans(x), acc)
            pair = acc.reshape(BLOCK_I // 8, 2, 8, BLOCK_M).permute(0, 2, 3, 1)
            gate, up = tl.split(pair)
            h = _activate(gate, up, limit, alpha, beta, ACTIVATION).reshape(BLOCK_I, BLOCK_M)
        n = block * BLOCK_I + tl.arange(0, BLOCK_I)
        if FORMAT == FP8_BLOCK:
            amax = tl.max(tl.abs(h), 0)
            scale = tl.where(amax > 0, amax / E4M3_MAX, 1.0)
            h = h / scale[None, :]
            tl.store(hidden_scale + m * blocks + block, scale, mask=valid)
        where = _nvfp4_position(n) if FORMAT == NVFP4 else n
        row_of = hidden + m.to(tl.int64)[:, None] * hidden_width
        tl.store(
            row_of + where[None, :],
            tl.trans(h.to(hidden.dtype.element_ty)),
            mask=valid[:, None] & (n < I)[None, :],
        )
        if FORMAT == NVFP4 and block == blocks - 1:
            # The second GEMM reads whole blocks of 256 columns.
            for first in range(I, hidden_width, BLOCK_I):
                n = first + tl.arange(0, BLOCK_I)
                tl.store(
                    row_of + _nvfp4_position(n)[None, :],
                    tl.zeros((BLOCK_M, BLOCK_I), hidden.dtype.element_ty),
                    mask=valid[:, None] & (n < hidden_width)[None, :],
                )


@triton.jit
def down_kernel(
    hidden,
    hidden_scale,
    w2,
    w2_scale,
    w2_global,
    topk_weights,
    partial,
    slots,
    ends,
    num_local,
    H,
    I,
    hidden_width,
    scale_rows,
    scale_columns,
    FORMAT: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PTX: tl.constexpr,
    PDL: tl.constexpr,
):
    """`partial[slot] = topk_weight * hidden[position] @ w2.T`: BLOCK_H columns of a tile.

    The routing was complete before the first GEMM began, so what it says may be read before the
    wait for the hidden columns.
    """
    UNIFORM: tl.constexpr = SCALE_N % BLOCK_H == 0  # one scale for all rows of a tile
    blocks = tl.cdiv(H, BLOCK_H)
    steps = tl.cdiv(I, BLOCK_K)
    expert, start, end, tiles = _schedule(ends, num_local, EXPERTS, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for t in range(tl.program_id(0), tl.max(tiles, 0) * blocks, tl.num_programs(0)):
        e, m0, last, block = _tile(t, blocks, expert, start, end, tiles, BLOCK_M)
        m = m0 + tl.arange(0, BLOCK_M)
        valid = m < last
        x_row = hidden + m.to(tl.int64)[:, None] * hidden_width
        n = block * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = n < H
        acc = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
        if FORMAT == FP8_BLOCK:
            sx_row = hidden_scale + m * tl.cdiv(I, GROUP)
            sw_row = w2_scale + e * scale_rows * scale_columns
            if UNIFORM:
                sw_row += block * BLOCK_H // SCALE_N * scale_columns
                sw = tl.load(sw_row)
            else:
                sw_row += n // SCALE_N * scale_columns
                sw = tl.load(sw_row, mask=inside, other=0.0)
            sx = tl.load(sx_row, mask=valid, other=0.0)
            for step in tl.range(0, steps, num_stages=STAGES):
                k0 = step * BLOCK_K
                w = w2.load([e, block * BLOCK_H, k0]).reshape(BLOCK_H, BLOCK_K)
                x = _step_of_rows(x_row, k0 + k, valid, I)
                part = tl.dot(w, tl.trans(x))
                k1 = tl.minimum(step + 1, steps - 1) * BLOCK_K
                next_sx = tl.load(sx_row + k1 // GROUP, mask=valid, other=0.0)
                if UNIFORM:
                    acc += part * (sx * sw)[None, :]
                    sw = tl.load(sw_row + k1 // SCALE_K)
                else:
                    next_sw = tl.load(sw_row + k1 // SCALE_K, mask=inside, other=0.0)
                    acc += part * sw[:, None] * sx[None, :]
                    sw = next_sw
                sx = next_sx
        elif FORMAT == NVFP4:
            group = _place_of_groups()
            unit = (e.to(tl.int64) * (H // 16) + n // 16) * scale_columns
            s_row = w2_scale + (unit * 256 + n % 8 * 32 + n // 8 % 2 * 4)[:, None]
            half = tl.arange(0, 128)
            for step in tl.range(0, steps, num_stages=STAGES):
                packed = w2.load([e, block * BLOCK_H, step * 32]).reshape(BLOCK_H, 32)
                scale = tl.load(
                    s_row + (step * 256 + group)[None, :], mask=inside[:, None], other=0.0
                )
                x_even = tl.load(x_row + (step * 256 + half)[None, :], valid[:, None], other=0.0)
                x_odd = tl.load(
                    x_row + (step * 256 + 128 + half)[None, :], valid[:, None], other=0.0
                )
                even, odd = _decode_nvfp4(packed, scale, BLOCK_H, PTX, hidden.dtype.element_ty)
                acc = tl.dot(even, tl.trans(x_even), acc)
                acc = tl.dot(odd, tl.trans(x_odd), acc)
            acc *= tl.load(w2_global + e) * 256.0
        else:
            for step in tl.range(0, steps, num_stages=STAGES):
                k0 = step * BLOCK_K
                w = w2.load([e, block * BLOCK_H, k0]).reshape(BLOCK_H, BLOCK_K)
                x = _step_of_rows(x_row, k0 + k, valid, I)
                acc = tl.dot(w, tl.trans(x), acc)
        slot = tl.load(slots + m, mask=valid, other=0)
        if not WEIGHT_ON_INPUT:
            acc *= tl.load(topk_weights + slot, mask=valid, other=0.0)[None, :]
        tl.store(
            partial + slot.to(tl.int64)[:, None] * H + n[None, :],
            tl.trans(acc.to(partial.dtype.element_ty)),
            mask=valid[:, None] & inside[None, :],
        )


@triton.jit
def sum_kernel(
    partial,
    ids,
    expert_map,
    out,
    num_ids,
    H,
    HAS_MAP: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """`out[token] = sum over k of partial[token, k]` in order of k, dropped slots left out."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = ()
    for k in tl.static_range(TOP_K):  # the routing may be read before the wait
        expert = tl.load(ids + token * TOP_K + k)
        expert = tl.where(expert < num_ids, expert, -1)
        if HAS_MAP:
            expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
        columns += (tl.where(expert >= 0, H, 0),)  # a dropped slot's row was never written
    if PDL:
        gdc_wait()
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        part = partial + (token * TOP_K + k) * H + column
        acc += tl.load(part, mask=column < columns[k], other=0.0).to(tl.float32)
    tl.store(out + token * H + column, acc.to(out.dtype.element_ty), mask=column < H)
