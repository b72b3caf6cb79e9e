"""Device code for NVFP4 with a few tokens per expert: warp-specialised grouped GEMMs, in Gluon.

As in `wide_device.py` one warp streams weights through a ring of buffers, and two warp groups
decode them into registers, where they are the first operand; rows, columns and scales lie as there.
A tile is two of its quarters, 128 weight rows, one for each warp group, with an expert's few
tokens. Two programs share a multiprocessor, so that its schedulers have four warps each to choose
from: time goes by the decoder's instructions.
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

from moe_backend.kernels.hopper.prefill_device import _load, _view_as
from moe_backend.kernels.hopper.share_device import (
    _add_the_rest,
    _hand_over,
    _piece,
    _pieces,
    _tile,
)
from moe_backend.kernels.hopper.wide_device import (
    CODES,
    PART,
    STEP,
    W_LAYOUT,
    WORDS,
    _decode,
    _first_row,
    _halves,
    _scale_rows,
    _scales,
    _spread,
    _store,
)

ROWS: tl.constexpr = tl.constexpr(64)  # of a warp group


@gluon.jit
def _copy_weights(w, w_smem, full, s, e, block, k, N, TOKENS: gl.constexpr, GATED: gl.constexpr):
    """Twice 64 weight rows of a step; what else its barrier is going to wait for."""
    bar = full.index(s)
    mbarrier.expect(bar, 2 * 4 * ROWS * WORDS + 4 * 2 * TOKENS * PART)
    for who in gl.static_range(2):
        r = _first_row(block % 2 * 2 + who, 0, block // 2, GATED)
        word = k * (STEP // 8)
        if GATED:
            _load(w, [2 * e * N // 64 + r // 64, 0, r % 64, word], bar, w_smem.index(2 * s + who))
        else:
            _load(w, [e * N // 16 + r // 16, 0, 0, word], bar, w_smem.index(2 * s + who))


@gluon.jit
def _copy(
    x, w, x_smem, w_smem, full, empty, tiles, ahead, blocks, N, K,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The copying warp: for each step weights (but of those `ahead`), and tokens in four parts."""
    steps = gl.cdiv(K, STEP)
    first, end, left, pieces = _pieces(gl.load(tiles) * blocks, steps)
    i = 0
    for n in range(pieces):
        t, begin, stop = _piece(n, first, end, left, steps)
        block, e, m0, _ = _tile(t, tiles, blocks, TOKENS)
        for k in range(begin, stop):
            s = i % STAGES
            if i >= ahead:
                mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
                _copy_weights(w, w_smem, full, s, e, block, k, N, TOKENS, GATED)
            for part in gl.static_range(4):  # two halves of a step, even and odd columns each
                column = k * STEP + part % 2 * 128 + part // 2 * PART
                _load(x, [m0, column], full.index(s), x_smem.index(4 * s + part))
            i += 1


@gluon.jit
def _multiply(
    WHO: gl.constexpr, x_smem, w_smem, full, empty, w_scale, w_global, out, tiles, sums, flags,
    limit, alpha, beta, blocks, N, K, scale_columns, width,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group: one quarter of `wide_device`'s tiles, with all tokens."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    steps = gl.cdiv(K, STEP)
    total = gl.load(tiles) * blocks
    first, end, left, pieces = _pieces(total, steps)
    i = 0
    # A program without work, whose tile is none, reads no scales.
    t, begin, stop = _piece(0, first, end, left, steps)
    block, e, m0, last = _tile(gl.where(pieces > 0, t, 0), tiles, blocks, TOKENS)
    block = gl.where(pieces > 0, block, 0)
    quarter = block % 2 * 2 + WHO
    row, inside = _scale_rows(
        quarter, w_scale, e, block // 2, N, gl.where(pieces > 0, N, 0), scale_columns, GATED
    )
    scale = _scales(row, inside, begin, scale_columns)
    for n in range(pieces):
        acc = gl.zeros([ROWS, TOKENS], gl.float32, layout=MMA)
        for k in range(begin, stop):
            # The scales of the next step are on their way while this is multiplied.
            following = _scales(row, inside, k + 1, scale_columns)
            s = i % STAGES
            mbarrier.wait(full.index(s), (i // STAGES) & 1)
            codes = _view_as(w_smem.index(2 * s + WHO), gl.int32, [ROWS, WORDS], W_LAYOUT)
            codes_x, codes_y = _halves(codes.load(CODES))
            spread_x, spread_y = _halves(_spread(scale))
            even, odd = _decode(codes_x, spread_x, A)
            acc = warpgroup_mma(even, x_smem.index(4 * s).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(odd, x_smem.index(4 * s + 1).permute((1, 0)), acc, is_async=True)
            acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
            even, odd = _decode(codes_y, spread_y, A)
            acc = warpgroup_mma(even, x_smem.index(4 * s + 2).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(odd, x_smem.index(4 * s + 3).permute((1, 0)), acc, is_async=True)
            acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])
            # Codes are read by ordinary loads: see `wide_device._product`.
            fence_async_shared()
            mbarrier.arrive(empty.index(s), count=1)
            scale = following
            i += 1
        # What the next tile is, and its first scales, are on their way while this one is stored.
        after = gl.minimum(n + 1, pieces - 1)
        next_t, next_begin, next_stop = _piece(after, first, end, left, steps)
        next_block, next_e, next_m0, next_last = _tile(next_t, tiles, blocks, TOKENS)
        next_quarter = next_block % 2 * 2 + WHO
        row, inside = _scale_rows(
            next_quarter, w_scale, next_e, next_block // 2, N, N, scale_columns, GATED
        )
        scale = _scales(row, inside, 0, scale_columns)
        if begin > 0:
            _hand_over(sums, flags, (acc,), WHO, 2)
        else:
            (acc,) = _add_the_rest(
                sums, flags, (acc,), WHO, 2, t * steps + stop, (t + 1) * steps, total, steps
            )
            _store(
                acc, quarter, w_global, out, limit, alpha, beta, block // 2, e, m0, last, N, width,
                TOKENS, GATED, ACTIVATION,
            )  # fmt: skip
        t = next_t
        begin = next_begin
        stop = next_stop
        block = next_block
        e = next_e
        m0 = next_m0
        last = next_last
        quarter = next_quarter


@gluon.jit
def gemm_kernel(
    x, w, w_scale, w_global, out, tiles, sums, flags, limit, alpha, beta, N, K, scale_columns,
    width, TOKENS: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr,
    PDL: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One GEMM of all experts; x in boxes of TOKENS.

    Arguments as of `wide_device.gemm_kernel`; sums and flags as in `share_device.py`, two parts a
    program.
    """
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [4 * STAGES, TOKENS, PART], x.layout)
    w_smem = gl.allocate_shared_memory(gl.int32, [2 * STAGES, 4, 2, 8, WORDS], w.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    blocks = gl.cdiv(N, STEP) * 4 if GATED else gl.cdiv(N, 2 * ROWS)
    steps = gl.cdiv(K, STEP)
    ahead = 0
    if not GATED:  # weights do not wait for the first GEMM; the tiles were listed before it began
        first, end, left, pieces = _pieces(gl.load(tiles) * blocks, steps)
        t, begin, stop = _piece(0, first, end, left, steps)
        ahead = gl.where(pieces > 0, gl.minimum(stop - begin, STAGES), 0)
        block, e, _, _ = _tile(gl.where(pieces > 0, t, 0), tiles, blocks, TOKENS)
        for j in range(ahead):
            _copy_weights(w, w_smem, full, j, e, block, begin + j, N, TOKENS, GATED)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply, (
                0, x_smem, w_smem, full, empty, w_scale, w_global, out, tiles, sums, flags, limit,
                alpha, beta, blocks, N, K, scale_columns, width, TOKENS, STAGES, GATED, ACTIVATION,
            )),
            (_multiply, (
                1, x_smem, w_smem, full, empty, w_scale, w_global, out, tiles, sums, flags, limit,
                alpha, beta, blocks, N, K, scale_columns, width, TOKENS, STAGES, GATED, ACTIVATION,
            )),
            (_copy, (
                x, w, x_smem, w_smem, full, empty, tiles, ahead, blocks, N, K, TOKENS, STAGES,
                GATED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
