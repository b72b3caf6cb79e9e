"""Device code for NVFP4 with many tokens per expert: warp-specialised grouped GEMMs, in Gluon.

As in `prefill_device.py`, slots are sorted by expert, one warp issues copies of weights and tokens
and two warp groups multiply. Here weights are the first operand, from registers: each warp group
decodes 64 of a tile's 128 weight rows once for all of its up to 128 tokens. While one decodes, the
tensor cores work for the other.

Weight rows come eight at a time, so that a tile may gather them from where it likes. Of an MMA's 64
rows, each warp has two eights, and a thread one row of either. For the first GEMM these are a gate
row and its up row; and a warp group's four warps take hidden columns 64 apart, which lie side by
side in the order in which the second GEMM reads them (`device._nvfp4_position`).
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_backend.kernels.hopper.device import _decode_nvfp4
from moe_backend.kernels.hopper.prefill_device import RENAMED, _activate_gluon, _load, _work

TOKENS: tl.constexpr = tl.constexpr(128)  # of a tile
ROWS: tl.constexpr = tl.constexpr(128)  # weight rows of a tile; of the first GEMM half are up rows
STEP: tl.constexpr = tl.constexpr(256)  # columns of a step; their even and odd ones are two halves
HALF_STEP: tl.constexpr = tl.constexpr(128)
WORDS: tl.constexpr = tl.constexpr(32)  # of eight codes, in a step
GROUPS: tl.constexpr = tl.constexpr(16)  # of scales, in a step
W_SLOTS: tl.constexpr = tl.constexpr(2)  # steps of codes that shared memory holds
# Thread t of four has words 8t..8t+7 of a row, and the scales of their four groups.
CODES: tl.constexpr = tl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
SCALES: tl.constexpr = tl.constexpr(
    gl.SliceLayout(2, gl.BlockedLayout([1, 4, 2], [8, 4, 1], [4, 1, 1], [2, 1, 0]))
)

_decode_gluon = gluon.jit(_decode_nvfp4.fn)


@gluon.jit
def _row(who, half, g, e, block, N, GATED: gl.constexpr):
    """Row within its matrix, and among all experts' rows, of row `g` of 32 of a warp group's half.

    Rows past the end of the matrix are another's.
    """
    if GATED:
        n = block // 4 * 256 + g // 8 * 64 + block % 4 * 16 + who * 8 + g % 8
        return n, (2 * e + half) * N + n
    else:
        n = block * 128 + who * 64 + g // 8 * 16 + half * 8 + g % 8
        return n, e * N + n


@gluon.jit
def _hidden_position(who, j, block):
    """`device._nvfp4_position` of a warp group's hidden columns, in the order of positions.

    The j-th is that of row `j % 8 // 2 * 8 + j % 2 * 4 + j // 8 % 2 * 2 + j // 16`.
    """
    return block // 4 * 256 + j // 16 * 128 + block % 4 * 32 + who * 16 + j % 16


@gluon.jit
def _view(buffer, SHAPE: gl.constexpr):
    """The same shared memory in another shape."""
    if RENAMED:
        return buffer.reinterpret(buffer.dtype, SHAPE, buffer.layout)
    else:
        return buffer._reinterpret(buffer.dtype, SHAPE, buffer.layout)


@gluon.jit
def _copy(
    x, x_few, w, x_smem, w_smem, x_full, x_empty, w_full, w_empty, tiles, blocks, N, K,
    X_SLOTS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The copying warp: for each step, sixteen times eight weight rows and two halves of tokens."""
    FEW: gl.constexpr = TOKENS // 2
    total = gl.load(tiles) * blocks
    i = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block, e, m0, last = _work(t, tiles, blocks)
        for k0 in range(0, K, STEP):
            s = i % W_SLOTS
            bar = w_full.index(s)
            mbarrier.wait(w_empty.index(s), ((i // W_SLOTS) & 1) ^ 1)
            mbarrier.expect(bar, 4 * ROWS * WORDS)
            for who in gl.static_range(2):
                for half in gl.static_range(2):
                    to = _view(w_smem.index((s * 2 + who) * 2 + half), [4, 8, WORDS])
                    for warp in gl.static_range(4):
                        _, row = _row(who, half, warp * 8, e, block, N, GATED)
                        _load(w, [row, k0 // 8], bar, to.index(warp))
            for odd in gl.static_range(2):
                s = (2 * i + odd) % X_SLOTS
                bar = x_full.index(s)
                to = x_smem.index(s)
                mbarrier.wait(x_empty.index(s), (((2 * i + odd) // X_SLOTS) & 1) ^ 1)
                if m0 + FEW < last:
                    mbarrier.expect(bar, 2 * TOKENS * HALF_STEP)
                    _load(x, [m0, k0 + odd * HALF_STEP], bar, to)
                else:
                    mbarrier.expect(bar, 2 * FEW * HALF_STEP)
                    few = _view(to, [FEW, HALF_STEP])
                    _load(x_few, [m0, k0 + odd * HALF_STEP], bar, few)
            i += 1


@gluon.jit
def _rows_of_mma(first, second, A: gl.constexpr):
    """[32, HALF_STEP] of both halves as the operand of an MMA, in turns of eight rows."""
    both = gl.join(first, second).reshape(4, 8, HALF_STEP, 2).permute(0, 3, 1, 2)
    return gl.convert_layout(both.reshape(64, HALF_STEP), A, assert_trivial=True)


@gluon.jit
def _scale_rows(who, w_scale, e, block, N, rows, scale_columns, GATED: gl.constexpr):
    """Where the scales of a warp group's two halves begin, and which of them are below `rows`."""
    g = gl.arange(0, 32, layout=gl.SliceLayout(1, SCALES))
    n0, row0 = _row(who, 0, g, e, block, N, GATED)
    n1, row1 = _row(who, 1, g, e, block, N, GATED)
    s0 = w_scale + row0.to(gl.int64)[:, None] * scale_columns
    s1 = w_scale + row1.to(gl.int64)[:, None] * scale_columns
    return s0, s1, n0 < rows, n1 < rows


@gluon.jit
def _scales(s0, s1, inside0, inside1, step, scale_columns):
    """Both halves' scales of a step; 0 outside the matrix."""
    group = step * GROUPS + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, SCALES))
    inside = (group < scale_columns)[None, :]
    scale0 = gl.load(s0 + group[None, :], mask=inside0[:, None] & inside, other=0.0)
    scale1 = gl.load(s1 + group[None, :], mask=inside1[:, None] & inside, other=0.0)
    return scale0, scale1


@gluon.jit
def _product(
    WHO: gl.constexpr, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
    limit, alpha, beta, i, block, e, m0, last, scale0, scale1, next_block, next_e, next_rows,
    N, K, scale_columns, width,
    N_TOKENS: gl.constexpr, X_SLOTS: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A warp group's part of a tile of up to N_TOKENS tokens, from step `i` on.

    `scale0` and `scale1` are those of its first step; those of the next tile's are returned.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N_TOKENS, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    s0, s1, inside0, inside1 = _scale_rows(WHO, w_scale, e, block, N, N, scale_columns, GATED)
    acc = gl.zeros([64, N_TOKENS], gl.float32, layout=MMA)
    for k0 in range(0, K, STEP):
        # The scales of the next step are on their way while this is multiplied.
        next0, next1 = _scales(s0, s1, inside0, inside1, k0 // STEP + 1, scale_columns)
        s = i % W_SLOTS
        mbarrier.wait(w_full.index(s), (i // W_SLOTS) & 1)
        codes0 = w_smem.index((s * 2 + WHO) * 2).load(CODES)
        codes1 = w_smem.index((s * 2 + WHO) * 2 + 1).load(CODES)
        mbarrier.arrive(w_empty.index(s), count=1)
        even0, odd0 = _decode_gluon(codes0, scale0, 32, True, gl.bfloat16)
        even1, odd1 = _decode_gluon(codes1, scale1, 32, True, gl.bfloat16)
        even = _rows_of_mma(even0, even1, A)
        odd = _rows_of_mma(odd0, odd1, A)
        xs = (2 * i) % X_SLOTS
        ys = (2 * i + 1) % X_SLOTS
        mbarrier.wait(x_full.index(xs), ((2 * i) // X_SLOTS) & 1)
        x = _view(x_smem.index(xs), [N_TOKENS, HALF_STEP])
        part = warpgroup_mma(even, x.permute((1, 0)), acc, is_async=True)
        mbarrier.wait(x_full.index(ys), ((2 * i + 1) // X_SLOTS) & 1)
        x = _view(x_smem.index(ys), [N_TOKENS, HALF_STEP])
        part = warpgroup_mma(odd, x.permute((1, 0)), part, is_async=True)
        even = warpgroup_mma_wait(1, deps=[even])
        mbarrier.arrive(x_empty.index(xs), count=1)
        acc, odd = warpgroup_mma_wait(0, deps=[part, odd])
        mbarrier.arrive(x_empty.index(ys), count=1)
        scale0 = next0
        scale1 = next1
        i += 1
    # And so are the first ones of the next tile.
    s0, s1, inside0, inside1 = _scale_rows(
        WHO, w_scale, next_e, next_block, N, next_rows, scale_columns, GATED
    )
    scale0, scale1 = _scales(s0, s1, inside0, inside1, 0, scale_columns)
    # The decoder leaves out 2**8.
    if GATED:
        gate, up = gl.split(acc.reshape(4, 2, 8, N_TOKENS).permute(0, 2, 3, 1))
        gate = gate * (gl.load(w_global + 2 * e) * 256.0)
        up = up * (gl.load(w_global + 2 * e + 1) * 256.0)
        h = _activate_gluon(gate, up, limit, alpha, beta, ACTIVATION).to(gl.bfloat16)
        # Rows past the end of the matrix have scales of 0, and zeros are what the second GEMM
        # wants there.
        h = h.reshape(4, 2, 2, 2, N_TOKENS).permute(4, 3, 2, 0, 1).reshape(N_TOKENS, 32)
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
        h = gl.convert_layout(h, LINES)
        m = m0 + gl.arange(0, N_TOKENS, layout=gl.SliceLayout(1, LINES))
        j = gl.arange(0, 32, layout=gl.SliceLayout(0, LINES))
        p = _hidden_position(WHO, j, block)
        gl.store(out + m.to(gl.int64)[:, None] * width + p[None, :], h, mask=(m < last)[:, None])
    else:
        y = (acc * (gl.load(w_global + e) * 256.0)).to(gl.bfloat16).permute((1, 0))
        # Every warp's 16 columns stay with it, 32 bytes of memory: no barrier between warps.
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, 4], [1, 0])
        y = gl.convert_layout(y, LINES)
        m = m0 + gl.arange(0, N_TOKENS, layout=gl.SliceLayout(1, LINES))
        n = block * 128 + WHO * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, LINES))
        gl.store(
            out + m.to(gl.int64)[:, None] * width + n[None, :], y,
            mask=(m < last)[:, None] & (n < N)[None, :],
        )  # fmt: skip
    return i, scale0, scale1


@gluon.jit
def _multiply(
    WHO: gl.constexpr, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
    tiles, limit, alpha, beta, blocks, N, K, scale_columns, width,
    X_SLOTS: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group: one half of each tile's weight rows with all of its tokens."""
    total = gl.load(tiles) * blocks
    i = 0
    t = gl.program_id(0)
    block, e, m0, last = _work(gl.maximum(gl.minimum(t, total - 1), 0), tiles, blocks)
    rows = gl.where(t < total, N, 0)
    s0, s1, inside0, inside1 = _scale_rows(WHO, w_scale, e, block, N, rows, scale_columns, GATED)
    scale0, scale1 = _scales(s0, s1, inside0, inside1, 0, scale_columns)
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        following = t + gl.num_programs(0)
        next_rows = gl.where(following < total, N, 0)
        next_block, next_e, next_m0, next_last = _work(
            gl.minimum(following, total - 1), tiles, blocks
        )
        if m0 + TOKENS // 2 < last:
            i, scale0, scale1 = _product(
                WHO, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
                limit, alpha, beta, i, block, e, m0, last, scale0, scale1, next_block, next_e,
                next_rows, N, K, scale_columns, width, TOKENS, X_SLOTS, GATED, ACTIVATION,
            )  # fmt: skip
        else:
            i, scale0, scale1 = _product(
                WHO, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
                limit, alpha, beta, i, block, e, m0, last, scale0, scale1, next_block, next_e,
                next_rows, N, K, scale_columns, width, TOKENS // 2, X_SLOTS, GATED, ACTIVATION,
            )  # fmt: skip
        block = next_block
        e = next_e
        m0 = next_m0
        last = next_last


@gluon.jit
def gemm_kernel(
    x, x_few, w, w_scale, w_global, out, tiles, limit, alpha, beta, N, K, scale_columns, width,
    X_SLOTS: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr, PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One GEMM of all experts.

    Args:
        x: accelerator's view of `[positions, K up to a multiple of 256]` bf16 activations, columns
            in the order of `device._nvfp4_position`, in boxes of 128 rows and columns.
        x_few: the same in boxes of 64 rows.
        w: accelerator's view of `[experts' rows, K / 8]` words of eight codes, in boxes of 8 rows.
        w_scale: e4m3, `[experts' rows, scale_columns]`.
        w_global: fp32, `[experts, (gate, up)]`, or one per expert.
        out: `[positions, width]` bf16; for the first GEMM (GATED) columns as those of `x`.
        N: rows of an expert's gate (or up) for the first GEMM, of its w2 for the second.
        X_SLOTS: halves of steps of tokens that shared memory holds.
    """
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [X_SLOTS, TOKENS, HALF_STEP], x.layout)
    w_smem = gl.allocate_shared_memory(gl.int32, [W_SLOTS * 4, 32, WORDS], w.layout)
    x_full = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_SLOTS, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_SLOTS, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [W_SLOTS, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(X_SLOTS):
        mbarrier.init(x_full.index(s), count=1)
        mbarrier.init(x_empty.index(s), count=2)
    for s in gl.static_range(W_SLOTS):
        mbarrier.init(w_full.index(s), count=1)
        mbarrier.init(w_empty.index(s), count=2)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = gl.cdiv(N, STEP) * 4 if GATED else gl.cdiv(N, ROWS)
    gl.warp_specialize(
        [
            (_multiply, (
                0, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out, tiles,
                limit, alpha, beta, blocks, N, K, scale_columns, width, X_SLOTS, GATED, ACTIVATION,
            )),
            (_multiply, (
                1, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out, tiles,
                limit, alpha, beta, blocks, N, K, scale_columns, width, X_SLOTS, GATED, ACTIVATION,
            )),
            (_copy, (
                x, x_few, w, x_smem, w_smem, x_full, x_empty, w_full, w_empty, tiles, blocks, N, K,
                X_SLOTS, GATED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
