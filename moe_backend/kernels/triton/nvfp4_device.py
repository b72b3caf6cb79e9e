"""Device code of NVFP4 activations: quantisation with placement, and a grouped GEMM.

`quantize_kernel` gathers rows, quantises them and scatters their scales into 128x4 blocks in one
pass. Arithmetic is spelled out where hardware and compilers differ: division is correctly rounded,
E4M3 is rounded to nearest even on the bits of fp32. The result equals `formats.nvfp4.quantize` bit
for bit, on a GPU and in Triton's interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _e4m3(value):
    """E4M3 code (as int32) nearest to fp32 `value` in [2**-9, 448], ties to even."""
    bits = value.to(tl.int32, bitcast=True)
    # Normal from 2**-6: 20 mantissa bits are rounded off, and the bias changes from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Subnormal: the spacing of fp32 at 2**14 is 2**-9, E4M3's smallest step.
    subnormal = (value + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(bits >= 0x3C800000, normal, subnormal)  # fp32 bits of 2**-6


@triton.jit
def _e4m3_value(code):
    """fp32 value of a non-negative E4M3 code."""
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code >= 8, normal, code.to(tl.float32) * 0.001953125)


@triton.jit
def _e2m1_code(value):
    """E2M1 code nearest to `value`, ties to the even code, saturating at 6."""
    size = tl.abs(value)
    code = (size > 0.25).to(tl.int32)
    code += (size >= 0.75).to(tl.int32)
    code += (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32)
    code += (size > 2.5).to(tl.int32)
    code += (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    sign = (value.to(tl.int32, bitcast=True) >> 28) & 8
    return code | sign


@triton.jit
def quantize_kernel(
    x,
    global_scale,
    slots,
    ends,
    packed,
    scales,
    K,
    columns,
    stride_x,
    stride_global,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_POWER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows of the sorted slots: codes to `packed[position]`, scales to their blocks.

    A program handles BLOCK_M slots and BLOCK_K columns. A dropped slot has no place and writes
    nothing. `columns` is K/16 rounded up to 4: the padding columns are written, with zeros.
    """
    expert_ids = tl.arange(0, EXPERTS_POWER)
    real = expert_ids < EXPERTS
    end = tl.load(ends + expert_ids, mask=real, other=2147483647)
    start = tl.load(ends + expert_ids - 1, mask=real & (expert_ids > 0), other=0)
    position = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    kept = position < tl.max(tl.where(real, end, 0), axis=0)
    # The experts whose slots all come earlier give the slot its place in the padded rows.
    before = end[None, :] <= position[:, None]
    blocks_before = tl.sum(tl.where(before, ((end - start + 127) // 128)[None, :], 0), axis=1)
    slots_before = tl.max(tl.where(before, end[None, :], 0), axis=1)
    row = blocks_before.to(tl.int64) * 128 + (position - slots_before)

    token = (tl.load(slots + position, mask=kept, other=0) // TOP_K).to(tl.int64)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tl.load(
        x + token[:, None] * stride_x + column[None, :],
        mask=kept[:, None] & (column < K)[None, :],
        other=0.0,
    ).to(tl.float32)
    scale_of_all = tl.load(global_scale + token * stride_global)[:, None]

    blocks = tl.reshape(values, (BLOCK_M, BLOCK_K // 16, 16))
    amax = tl.max(tl.abs(blocks), axis=2)
    raw = tl.div_rn(tl.div_rn(amax, 6.0), tl.broadcast_to(scale_of_all, amax.shape))
    raw = tl.minimum(tl.maximum(raw, 0.001953125), 448.0)
    code = tl.where(amax > 0, _e4m3(raw), 0x38)  # a block of zeros has scale 1
    has_nan = tl.max((blocks != blocks).to(tl.int32), axis=2) > 0
    step = _e4m3_value(code) * scale_of_all
    codes = _e2m1_code(tl.div_rn(blocks, tl.broadcast_to(step[:, :, None], blocks.shape)))
    low, high = tl.split(tl.reshape(codes, (BLOCK_M, BLOCK_K // 2, 2)))
    byte = tl.program_id(1) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    tl.store(
        packed + position.to(tl.int64)[:, None] * (K // 2) + byte[None, :],
        (low | (high << 4)).to(tl.uint8),
        mask=kept[:, None] & (byte < K // 2)[None, :],
    )

    group = tl.program_id(1) * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    first = row // 128 * columns * 128 + row % 32 * 16 + row % 128 // 32 * 4
    place = first[:, None] + (group // 4 * 512 + group % 4)[None, :]
    code = tl.where(has_nan, 0x7F, code)  # E2M1 has no NaN, the scale has
    code = tl.where((group < K // 16)[None, :], code, 0)
    tl.store(scales + place, code.to(tl.uint8), mask=kept[:, None] & (group < columns)[None, :])


@triton.jit
def _blocked_scales(base, BLOCKS_K: tl.constexpr):
    """`[128, 4 * BLOCKS_K]` scales of 128 rows, from BLOCKS_K neighbouring 128x4 blocks."""
    flat = tl.load(base + tl.arange(0, BLOCKS_K * 512))
    blocks = tl.reshape(flat, (BLOCKS_K, 32, 4, 4))  # block, row % 32, row // 32, column
    return tl.reshape(tl.permute(blocks, (2, 1, 0, 3)), (128, BLOCKS_K * 4))


@triton.jit
def _decoded(codes, scales, BLOCK_K: tl.constexpr):
    """fp32 `[128, BLOCK_K]` of packed codes `[128, BLOCK_K / 2]` times their scales."""
    code = tl.interleave(codes & 15, codes >> 4).to(tl.int32)  # the even column is the low nibble
    size = code & 7
    # Twice the value: 0 1 2 3 4 6 8 12.
    doubled = tl.where(size < 4, size, tl.where(size < 6, 2 * size - 4, 4 * size - 16))
    value = tl.where(code >= 8, -0.5, 0.5) * doubled.to(tl.float32)
    spread = tl.broadcast_to(scales.to(tl.float32)[:, :, None], (128, BLOCK_K // 16, 16))
    return value * tl.reshape(spread, (128, BLOCK_K))


@triton.jit
def grouped_gemm_kernel(
    out,
    a,
    b,
    a_scales,
    b_scales,
    alphas,
    sizes,
    starts,
    scale_starts,
    N,
    K,
    EXPERTS: tl.constexpr,
    EXPERTS_POWER: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED_DOT: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`alpha[e] * A @ B[e].T` of one expert's 128 rows and 128 columns; both operands NVFP4.

    Arguments as in `nvfp4_gemm.grouped_gemm`. The number of programs has a bound that depends on
    shapes alone; those beyond the last tile return. SCALED_DOT takes the block-scaled matrix
    instruction (on sm_100 `tcgen05.mma ... kind::mxf4nvf4.block_scale`); without it operands are
    decoded to COMPUTE first, which is exact in bf16. That is for Hopper, where Triton 3.6 cannot
    compile a scaled dot with E4M3 scales, and for the interpreter, whose scaled dot is wrong for
    them (3.9.0).
    """
    tile = tl.program_id(0)
    expert_ids = tl.arange(0, EXPERTS_POWER)
    counts = tl.load(sizes + 3 * expert_ids, mask=expert_ids < EXPERTS, other=0)
    tile_ends = tl.cumsum((counts + 127) // 128, axis=0)
    before = tile_ends <= tile
    expert = tl.sum(before.to(tl.int32), axis=0)
    if expert >= EXPERTS:
        return
    row_block = tile - tl.max(tl.where(before, tile_ends, 0), axis=0)
    count = tl.load(sizes + 3 * expert)
    row = row_block * 128 + tl.arange(0, 128)
    slot = (tl.load(starts + expert) + row).to(tl.int64)
    column_block = tl.program_id(1)
    column = column_block * 128 + tl.arange(0, 128)
    e = expert.to(tl.int64)

    # Blocks of 128 rows follow each other, K / 64 blocks of scales in each.
    first = (tl.load(scale_starts + expert) // 128 + row_block).to(tl.int64)
    a_scale = a_scales + first * (K // 64) * 512
    b_scale = b_scales + (e * (N // 128) + column_block) * (K // 64) * 512
    acc = tl.zeros((128, 128), tl.float32)
    for k in range(0, K, BLOCK_K):
        byte = k // 2 + tl.arange(0, BLOCK_K // 2)
        a_tile = tl.load(
            a + slot[:, None] * (K // 2) + byte[None, :], mask=(row < count)[:, None], other=0
        )
        b_tile = tl.load(b + (e * N + column[:, None]) * (K // 2) + byte[None, :])
        sa = _blocked_scales(a_scale + k // 64 * 512, BLOCK_K // 64)
        sb = _blocked_scales(b_scale + k // 64 * 512, BLOCK_K // 64)
        if SCALED_DOT:
            acc = tl.dot_scaled(a_tile, sa, "e2m1", tl.trans(b_tile), sb, "e2m1", acc)
        else:
            x, w = _decoded(a_tile, sa, BLOCK_K), _decoded(b_tile, sb, BLOCK_K)
            x, w = x.to(COMPUTE), w.to(COMPUTE)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    acc *= tl.load(alphas + expert)
    where = out + slot[:, None] * N + column[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=(row < count)[:, None])
