"""Device code for NVFP4 with many tokens per expert: warp-specialised grouped GEMMs, in Gluon.

As in `prefill_device.py`, slots are sorted by expert, one warp issues copies of weights and tokens
and two warp groups multiply. Here weights are the first operand, from registers: each warp group
decodes 128 of a tile's 256 weight rows, 64 at a time, once for all of its up to 128 tokens. While
the tensor cores multiply with what is decoded, it decodes the next.

Of an MMA's 64 rows, each warp has two eights, and a thread one row of either. For the first GEMM
these are a gate row and its up row; and a warp group's four warps take hidden columns 64 apart,
which lie side by side in the order in which the second GEMM reads them (`device._nvfp4_position`).
The accelerator sees the weights in groups of rows such that one copy brings an MMA's 64 rows.
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

from moe_backend.kernels.hopper.device import _bf16_scales, _decoded_words
from moe_backend.kernels.hopper.prefill_device import _activate_gluon, _load, _view_as, _work

TOKENS: tl.constexpr = tl.constexpr(128)  # of a tile, at most; boxes of half and a quarter as well
ROWS: tl.constexpr = tl.constexpr(256)  # weight rows of a tile; of the first GEMM half are up rows
STEP: tl.constexpr = tl.constexpr(256)  # columns of a step; even and odd ones, and halves of these
PART: tl.constexpr = tl.constexpr(64)  # columns of a product
WORDS: tl.constexpr = tl.constexpr(32)  # of eight codes, in a step
GROUPS: tl.constexpr = tl.constexpr(16)  # of scales, in a step
# Thread t of four has words 8t..8t+7 of two rows eight apart, and the scales of their four groups.
_ROWS_OF_LANES = [[1, 0], [2, 0], [4, 0]]
_ROWS_OF_WARPS = [[16, 0], [32, 0]]
X_LAYOUT: tl.constexpr = tl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
W_LAYOUT: tl.constexpr = tl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
CODES: tl.constexpr = tl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 8], [0, 16], *_ROWS_OF_LANES], _ROWS_OF_WARPS, [],
        [64, 32],
    )
)  # fmt: skip
SCALES: tl.constexpr = tl.constexpr(
    gl.SliceLayout(
        2,
        gl.DistributedLinearLayout(
            [[0, 0, 1], [0, 1, 0], [0, 2, 0], [8, 0, 0]],
            [[0, 4, 0], [0, 8, 0], *[[*b, 0] for b in _ROWS_OF_LANES]],
            [[*b, 0] for b in _ROWS_OF_WARPS], [], [64, 16, 2],
        ),
    )
)  # fmt: skip

_bf16_scales_gluon = gluon.jit(_bf16_scales.fn)
_decoded_words_gluon = gluon.jit(_decoded_words.fn)


@gluon.jit
def _first_row(quarter, warp, block, GATED: gl.constexpr):
    """In its matrix, the first of the two eights of rows that a warp has of a quarter of a tile.

    The second are the up rows of these gate rows, or for the second GEMM the next eight.
    """
    if GATED:
        return block // 2 * 256 + warp * 64 + block % 2 * 32 + quarter * 8
    else:
        return block * 256 + quarter * 64 + warp * 16


@gluon.jit
def _hidden_position(quarter, j, block):
    """`device._nvfp4_position` of a quarter's 32 hidden columns, in the order of positions.

    The j-th is that of warp `j % 8 // 2` and row `j % 2 * 4 + j // 8 % 2 * 2 + j // 16` of eight.
    """
    return block // 2 * 256 + j // 16 * 128 + block % 2 * 64 + quarter * 16 + j % 16


@gluon.jit
def _copy_tokens(
    x, x_smem, full, empty, i, m0, k0, N_TOKENS: gl.constexpr, X_SLOTS: gl.constexpr,
):  # fmt: skip
    """Both halves of a step's tokens, even and odd columns each."""
    for half in gl.static_range(2):
        s = (2 * i + half) % X_SLOTS
        bar = full.index(s)
        mbarrier.wait(empty.index(s), (((2 * i + half) // X_SLOTS) & 1) ^ 1)
        mbarrier.expect(bar, 2 * 2 * N_TOKENS * PART)
        for odd in gl.static_range(2):
            to = x_smem.index(2 * s + odd)
            if N_TOKENS < TOKENS:
                to = _view_as(to, to.dtype, [N_TOKENS, PART], X_LAYOUT)
            _load(x, [m0, k0 + odd * 128 + half * PART], bar, to)


@gluon.jit
def _copy(
    x_all, x_half, x_quarter, w, x_smem, w_smem, x_full, x_empty, w_full, w_empty, tiles, blocks,
    N, K, X_SLOTS: gl.constexpr, W_SLOTS: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The copying warp: for each step, four times 64 weight rows and the tokens in four parts."""
    total = gl.load(tiles) * blocks
    i = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block, e, m0, last = _work(t, tiles, blocks)
        for k0 in range(0, K, STEP):
            s = i % W_SLOTS
            bar = w_full.index(s)
            mbarrier.wait(w_empty.index(s), ((i // W_SLOTS) & 1) ^ 1)
            mbarrier.expect(bar, 4 * ROWS * WORDS)
            for quarter in gl.static_range(4):
                n = _first_row(quarter, 0, block, GATED)
                to = w_smem.index(s * 4 + quarter)
                if GATED:
                    _load(w, [2 * e * N // 64 + n // 64, 0, n % 64, k0 // 8], bar, to)
                else:
                    _load(w, [e * N // 16 + n // 16, 0, 0, k0 // 8], bar, to)
            if m0 + TOKENS // 2 < last:
                _copy_tokens(x_all, x_smem, x_full, x_empty, i, m0, k0, TOKENS, X_SLOTS)
            elif m0 + TOKENS // 4 < last:
                _copy_tokens(x_half, x_smem, x_full, x_empty, i, m0, k0, TOKENS // 2, X_SLOTS)
            else:
                _copy_tokens(x_quarter, x_smem, x_full, x_empty, i, m0, k0, TOKENS // 4, X_SLOTS)
            i += 1


@gluon.jit
def _scale_rows(quarter, w_scale, e, block, N, rows, scale_columns, GATED: gl.constexpr):
    """Where the scales of a quarter's rows begin, and which rows are below `rows`."""
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, SCALES))
    n = _first_row(quarter, r // 16, block, GATED) + r % 8
    second = r % 16 // 8
    if GATED:
        row = (2 * e + second) * N + n
    else:
        n += second * 8
        row = e * N + n
    return w_scale + row.to(gl.int64)[:, None] * scale_columns, n < rows


@gluon.jit
def _scales(row, inside, step, scale_columns):
    """The scales of a step; 0 outside the matrix."""
    group = step * GROUPS + gl.arange(0, GROUPS, layout=gl.SliceLayout(0, SCALES))
    inside = inside[:, None] & (group < scale_columns)[None, :]
    return gl.load(row + group[None, :], mask=inside, other=0.0)


@gluon.jit
def _first_scales(who, w_scale, e, block, N, rows, scale_columns, GATED: gl.constexpr):
    """Of a tile's first step, for both quarters of a warp group."""
    row0, inside0 = _scale_rows(2 * who, w_scale, e, block, N, rows, scale_columns, GATED)
    row1, inside1 = _scale_rows(2 * who + 1, w_scale, e, block, N, rows, scale_columns, GATED)
    scale0 = _scales(row0, inside0, 0, scale_columns)
    return scale0, _scales(row1, inside1, 0, scale_columns)


@gluon.jit
def _spread(scale):
    """A step's scales as bf16, one for each word of codes."""
    spread = _bf16_scales_gluon(scale)
    return gl.convert_layout(
        gl.expand_dims(spread, 2).broadcast_to([64, GROUPS, 2]).reshape(64, WORDS),
        CODES,
        assert_trivial=True,
    )


@gluon.jit
def _halves(words):
    """Of each thread's eight words of a row, the first and the last four."""
    return gl.split(words.reshape(64, 4, 2, 4).permute(0, 1, 3, 2))


@gluon.jit
def _settled(operand):
    """The same, computed here.

    An operand that is still being computed behind the fence that precedes an MMA makes the
    assembler wait for each MMA before the next.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [operand], dtype=gl.bfloat16, is_pure=False, pack=2
    )


@gluon.jit
def _decode(words, spread, A: gl.constexpr):
    """[64, PART] even and odd columns of half a step."""
    e0, e2, e1, e3, o0, o2, o1, o3 = _decoded_words_gluon(words, spread)
    even = gl.join(gl.join(e0, e1), gl.join(e2, e3))  # bytes 0, 2, 1, 3
    odd = gl.join(gl.join(o0, o1), gl.join(o2, o3))
    even = even.permute(0, 2, 3, 1, 4).reshape(64, PART)
    odd = odd.permute(0, 2, 3, 1, 4).reshape(64, PART)
    even = gl.convert_layout(even, A, assert_trivial=True)
    return _settled(even), _settled(gl.convert_layout(odd, A, assert_trivial=True))


@gluon.jit
def _tokens_of_half(x_smem, slot, N_TOKENS: gl.constexpr):
    """Even and odd columns of half a step, as the second operand of MMAs."""
    even = _view_as(x_smem.index(2 * slot), gl.bfloat16, [N_TOKENS, PART], X_LAYOUT)
    odd = _view_as(x_smem.index(2 * slot + 1), gl.bfloat16, [N_TOKENS, PART], X_LAYOUT)
    return even.permute((1, 0)), odd.permute((1, 0))


@gluon.jit
def _product(
    WHO: gl.constexpr, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
    limit, alpha, beta, i, block, e, m0, last, scale0, scale1, next_block, next_e, next_rows,
    N, K, scale_columns, width,
    N_TOKENS: gl.constexpr, X_SLOTS: gl.constexpr, W_SLOTS: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A warp group's two quarters of a tile of up to N_TOKENS tokens, from step `i` on.

    `scale0` and `scale1` are those of its first step; those of the next tile's are returned.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N_TOKENS, 16]
    )
    A: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=MMA, k_width=2)
    # Whether registers are left to decode while the tensor cores multiply for this warp group, too.
    # Where they are not, the assembler would wait for every single MMA.
    DEEP: gl.constexpr = N_TOKENS < 128
    row0, inside0 = _scale_rows(2 * WHO, w_scale, e, block, N, N, scale_columns, GATED)
    row1, inside1 = _scale_rows(2 * WHO + 1, w_scale, e, block, N, N, scale_columns, GATED)
    acc0 = gl.zeros([64, N_TOKENS], gl.float32, layout=MMA)
    acc1 = acc0
    for k0 in range(0, K, STEP):
        # The scales of the next step are on their way while this is multiplied.
        next0 = _scales(row0, inside0, k0 // STEP + 1, scale_columns)
        next1 = _scales(row1, inside1, k0 // STEP + 1, scale_columns)
        s = i % W_SLOTS
        xs = (2 * i) % X_SLOTS
        ys = (2 * i + 1) % X_SLOTS
        mbarrier.wait(w_full.index(s), (i // W_SLOTS) & 1)
        codes = w_smem.index(s * 4 + 2 * WHO)
        codes = _view_as(codes, gl.int32, [64, WORDS], W_LAYOUT).load(CODES)
        codes_x, codes_y = _halves(codes)
        spread_x, spread_y = _halves(_spread(scale0))
        even, odd = _decode(codes_x, spread_x, A)
        mbarrier.wait(x_full.index(xs), ((2 * i) // X_SLOTS) & 1)
        xe, xo = _tokens_of_half(x_smem, xs, N_TOKENS)
        acc0 = warpgroup_mma(even, xe, acc0, is_async=True)
        acc0 = warpgroup_mma(odd, xo, acc0, is_async=True)
        if not DEEP:
            acc0, even, odd = warpgroup_mma_wait(0, deps=[acc0, even, odd])
        even1, odd1 = _decode(codes_y, spread_y, A)
        mbarrier.wait(x_full.index(ys), ((2 * i + 1) // X_SLOTS) & 1)
        ye, yo = _tokens_of_half(x_smem, ys, N_TOKENS)
        acc0 = warpgroup_mma(even1, ye, acc0, is_async=True)
        acc0 = warpgroup_mma(odd1, yo, acc0, is_async=True)
        if not DEEP:
            acc0, even1, odd1 = warpgroup_mma_wait(0, deps=[acc0, even1, odd1])
        codes = w_smem.index(s * 4 + 2 * WHO + 1)
        codes = _view_as(codes, gl.int32, [64, WORDS], W_LAYOUT).load(CODES)
        # Else the accelerator may overwrite codes before they are read: the barrier alone orders
        # its writes behind its own reads only. Seen on an H200: a few rows wrong in most calls.
        fence_async_shared()
        mbarrier.arrive(w_empty.index(s), count=1)
        codes_x, codes_y = _halves(codes)
        spread_x, spread_y = _halves(_spread(scale1))
        if DEEP:
            even, odd = warpgroup_mma_wait(2, deps=[even, odd])
        even, odd = _decode(codes_x, spread_x, A)
        acc1 = warpgroup_mma(even, xe, acc1, is_async=True)
        acc1 = warpgroup_mma(odd, xo, acc1, is_async=True)
        if DEEP:
            acc0, even1, odd1 = warpgroup_mma_wait(2, deps=[acc0, even1, odd1])
        else:
            acc1, even, odd = warpgroup_mma_wait(0, deps=[acc1, even, odd])
        even1, odd1 = _decode(codes_y, spread_y, A)
        acc1 = warpgroup_mma(even1, ye, acc1, is_async=True)
        acc1 = warpgroup_mma(odd1, yo, acc1, is_async=True)
        if DEEP:
            even, odd = warpgroup_mma_wait(2, deps=[even, odd])
        mbarrier.arrive(x_empty.index(xs), count=1)
        acc1, even1, odd1 = warpgroup_mma_wait(0, deps=[acc1, even1, odd1])
        mbarrier.arrive(x_empty.index(ys), count=1)
        scale0 = next0
        scale1 = next1
        i += 1
    # And so are the first ones of the next tile.
    scale0, scale1 = _first_scales(
        WHO, w_scale, next_e, next_block, N, next_rows, scale_columns, GATED
    )
    _store(
        acc0, 2 * WHO, w_global, out, limit, alpha, beta, block, e, m0, last, N, width, N_TOKENS,
        GATED, ACTIVATION,
    )  # fmt: skip
    _store(
        acc1, 2 * WHO + 1, w_global, out, limit, alpha, beta, block, e, m0, last, N, width,
        N_TOKENS, GATED, ACTIVATION,
    )  # fmt: skip
    return i, scale0, scale1


@gluon.jit
def _store(
    acc, quarter, w_global, out, limit, alpha, beta, block, e, m0, last, N, width,
    N_TOKENS: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """What a quarter's sums with all tokens become. The decoder leaves out 2**8."""
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
        p = _hidden_position(quarter, j, block)
        gl.store(out + m.to(gl.int64)[:, None] * width + p[None, :], h, mask=(m < last)[:, None])
    else:
        y = (acc * (gl.load(w_global + e) * 256.0)).to(gl.bfloat16).permute((1, 0))
        # Every warp's 16 columns stay with it, 32 bytes of memory: no barrier between warps.
        LINES: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, 4], [1, 0])
        y = gl.convert_layout(y, LINES)
        m = m0 + gl.arange(0, N_TOKENS, layout=gl.SliceLayout(1, LINES))
        n = block * 256 + quarter * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, LINES))
        gl.store(
            out + m.to(gl.int64)[:, None] * width + n[None, :], y,
            mask=(m < last)[:, None] & (n < N)[None, :],
        )  # fmt: skip


@gluon.jit
def _multiply(
    WHO: gl.constexpr, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
    tiles, limit, alpha, beta, blocks, N, K, scale_columns, width,
    X_SLOTS: gl.constexpr, W_SLOTS: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group: half of each tile's weight rows with all its tokens."""
    total = gl.load(tiles) * blocks
    i = 0
    t = gl.program_id(0)
    block, e, m0, last = _work(gl.maximum(gl.minimum(t, total - 1), 0), tiles, blocks)
    rows = gl.where(t < total, N, 0)
    scale0, scale1 = _first_scales(WHO, w_scale, e, block, N, rows, scale_columns, GATED)
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
                next_rows, N, K, scale_columns, width, TOKENS, X_SLOTS, W_SLOTS, GATED,
                ACTIVATION,
            )  # fmt: skip
        elif m0 + TOKENS // 4 < last:
            i, scale0, scale1 = _product(
                WHO, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
                limit, alpha, beta, i, block, e, m0, last, scale0, scale1, next_block, next_e,
                next_rows, N, K, scale_columns, width, TOKENS // 2, X_SLOTS, W_SLOTS,
                GATED, ACTIVATION,
            )  # fmt: skip
        else:
            i, scale0, scale1 = _product(
                WHO, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out,
                limit, alpha, beta, i, block, e, m0, last, scale0, scale1, next_block, next_e,
                next_rows, N, K, scale_columns, width, TOKENS // 4, X_SLOTS, W_SLOTS,
                GATED, ACTIVATION,
            )  # fmt: skip
        block = next_block
        e = next_e
        m0 = next_m0
        last = next_last


@gluon.jit
def gemm_kernel(
    x_all, x_half, x_quarter, w, w_scale, w_global, out, tiles, limit, alpha, beta, N, K,
    scale_columns, width,
    X_SLOTS: gl.constexpr, W_SLOTS: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr, PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One GEMM of all experts.

    Args:
        x_all, x_half, x_quarter: accelerator's views of `[positions, K up to a multiple of 256]`
            bf16 activations, columns in the order of `device._nvfp4_position`, in boxes of PART
            columns and all, half, a quarter of TOKENS rows.
        w: of words of eight codes, `[groups of rows, (gate, up), rows of a group, K / 8]` for the
            first GEMM and `[groups of 16 rows, 2, 8, K / 8]` for the second, in boxes of 4, 2, 8
            and WORDS.
        w_scale: e4m3, `[experts' rows, scale_columns]`.
        w_global: fp32, `[experts, (gate, up)]`, or one per expert.
        out: `[positions, width]` bf16; for the first GEMM (GATED) columns as those of `x_all`.
        N: rows of an expert's gate (or up) for the first GEMM, of its w2 for the second.
        X_SLOTS, W_SLOTS: halves of steps of tokens, and steps of codes, that shared memory holds.
    """
    x_smem = gl.allocate_shared_memory(gl.bfloat16, [2 * X_SLOTS, TOKENS, PART], x_all.layout)
    w_smem = gl.allocate_shared_memory(gl.int32, [W_SLOTS * 4, 4, 2, 8, WORDS], w.layout)
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
    blocks = gl.cdiv(N, STEP) * 2 if GATED else gl.cdiv(N, ROWS)
    gl.warp_specialize(
        [
            (_multiply, (
                0, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out, tiles,
                limit, alpha, beta, blocks, N, K, scale_columns, width, X_SLOTS, W_SLOTS, GATED,
                ACTIVATION,
            )),
            (_multiply, (
                1, x_smem, w_smem, x_full, x_empty, w_full, w_empty, w_scale, w_global, out, tiles,
                limit, alpha, beta, blocks, N, K, scale_columns, width, X_SLOTS, W_SLOTS, GATED,
                ACTIVATION,
            )),
            (_copy, (
                x_all, x_half, x_quarter, w, x_smem, w_smem, x_full, x_empty, w_full, w_empty,
                tiles, blocks, N, K, X_SLOTS, W_SLOTS, GATED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
