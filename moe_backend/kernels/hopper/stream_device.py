"""Device code for FP8 with a few tokens per expert: warp-specialised grouped GEMMs, in Gluon.

One warp streams weights through a ring of buffers and two warp groups multiply, as in
`prefill_device.py`; but here time goes by bytes of weights, so weights are the first operand, 64
rows of an MMA, and the few tokens of an expert its narrow side. Two programs share a
multiprocessor: while one waits, the other multiplies.

First GEMM: a tile is 64 hidden columns, two MMAs of 32 gate and 32 up rows. The accelerator brings
gate and up rows in turns of eight, so a thread has both of a hidden column. The warp groups take
steps of 128 columns in turn; the second hands its sums to the first, which does the rest: the
columns of a tile stay in one place, and share a scale. Second GEMM: each warp group has 64 of a
tile's 128 rows.
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

from moe_backend.kernels.hopper.prefill_device import E4M3_MAX, _activate_gluon, _load, _view_as
from moe_backend.kernels.hopper.share_device import (
    _add_the_rest,
    _hand_over,
    _piece,
    _pieces,
    _tile,
)

STEP: tl.constexpr = tl.constexpr(128)  # columns
ROWS: tl.constexpr = tl.constexpr(64)  # of an MMA
COLUMNS: tl.constexpr = tl.constexpr(64)  # hidden columns of a tile, which share a scale
# Tokens of whose scales a copy brings a step's: 128 bytes, as the accelerator wants addresses.
SCALE_TOKENS: tl.constexpr = tl.constexpr(32)
W_LAYOUT: tl.constexpr = tl.constexpr(gl.NVMMASharedLayout(128, 8, 2))


@gluon.jit
def _copy_gate_up(
    x, x_scale, w, x_smem, s_smem, w_smem, full, empty, tiles, blocks, K,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp: for each step twice 64 weight rows, the tokens and their scales."""
    steps = gl.cdiv(K, STEP)
    first, end, left, pieces = _pieces(gl.load(tiles) * blocks, steps)
    i = 0
    for n in range(pieces):
        t, begin, stop = _piece(n, first, end, left, steps)
        block, e, m0, _ = _tile(t, tiles, blocks, TOKENS)
        for k in range(begin, stop):
            s = i % STAGES
            bar = full.index(s)
            mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (2 * ROWS + TOKENS) * STEP + 4 * SCALE_TOKENS)
            for half in gl.static_range(2):
                row = block * (COLUMNS // 8) + half * 4
                _load(w, [e, row, 0, 0, k * STEP], bar, w_smem.index(2 * s + half))
            _load(x, [m0, k * STEP], bar, x_smem.index(s))
            _load(x_scale, [k, m0], bar, s_smem.index(s))
            i += 1


@gluon.jit
def _scale_of(base, row, columns, step, SCALE_K: gl.constexpr):
    """The scale of a row of scales for a step."""
    return gl.load(base + row * columns + step * STEP // SCALE_K)


@gluon.jit
def _sums_of_steps(
    WHO: gl.constexpr, x_smem, s_smem, w_smem, full, empty, w_scale, i, begin, stop, block, e,
    steps, scale_rows, scale_columns,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
):  # fmt: skip
    """Every other step of `begin` to `stop`: sums of a tile's two halves, `[64, TOKENS]` each.

    The ring's even buffers are the first warp group's, its odd ones the second's.
    """
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32]
    )
    # Of 16 rows the first eight are gate rows.
    up = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA)) % 16 // 8 == 1
    zero = gl.zeros([ROWS, TOKENS], gl.float32, layout=MMA)
    acc0 = zero
    acc1 = zero
    # A half past the last row needs no scale of its own, but an address.
    row0 = gl.minimum(block * COLUMNS // SCALE_N, scale_rows - 1)
    row1 = gl.minimum((block * COLUMNS + 32) // SCALE_N, scale_rows - 1)
    gate = w_scale + 2 * e * scale_rows * scale_columns
    rest = gate + scale_rows * scale_columns
    own = (i + WHO) % 2
    first = gl.minimum(begin + own, steps - 1)
    g0 = _scale_of(gate, row0, scale_columns, first, SCALE_K)
    g1 = _scale_of(gate, row1, scale_columns, first, SCALE_K)
    u0 = _scale_of(rest, row0, scale_columns, first, SCALE_K)
    u1 = _scale_of(rest, row1, scale_columns, first, SCALE_K)
    for k in range(begin + own, stop, 2):
        nth = i + k - begin
        s = nth % STAGES
        mbarrier.wait(full.index(s), (nth // STAGES) & 1)
        x = x_smem.index(s).permute((1, 0))
        a0 = _view_as(w_smem.index(2 * s), gl.float8e4nv, [ROWS, STEP], W_LAYOUT)
        a1 = _view_as(w_smem.index(2 * s + 1), gl.float8e4nv, [ROWS, STEP], W_LAYOUT)
        part0 = warpgroup_mma(a0, x, zero, use_acc=False, is_async=True)
        part1 = warpgroup_mma(a1, x, zero, use_acc=False, is_async=True)
        sx = s_smem.index(s).slice(0, TOKENS, 1).load(MMA)
        # The scales of the next step are on their way while this one is multiplied.
        n = gl.minimum(k + 2, steps - 1)
        next_g0 = _scale_of(gate, row0, scale_columns, n, SCALE_K)
        next_g1 = _scale_of(gate, row1, scale_columns, n, SCALE_K)
        next_u0 = _scale_of(rest, row0, scale_columns, n, SCALE_K)
        next_u1 = _scale_of(rest, row1, scale_columns, n, SCALE_K)
        sw0 = gl.where(up, u0, g0)
        sw1 = gl.where(up, u1, g1)
        part0, part1 = warpgroup_mma_wait(0, deps=[part0, part1])
        fence_async_shared()  # the tokens' scales are read before others are copied there
        mbarrier.arrive(empty.index(s), count=1)
        acc0 += part0 * (sw0[:, None] * sx)
        acc1 += part1 * (sw1[:, None] * sx)
        g0 = next_g0
        g1 = next_g1
        u0 = next_u0
        u1 = next_u1
    return acc0, acc1


@gluon.jit
def _hidden_of(acc, n0, N, limit, alpha, beta, TOKENS: gl.constexpr, ACTIVATION: gl.constexpr):
    """`[TOKENS, 32]` hidden columns of a half's sums, zeros past the last column."""
    gate, up = gl.split(acc.reshape(4, 2, 8, TOKENS).permute(0, 2, 3, 1))
    h = _activate_gluon(gate, up, limit, alpha, beta, ACTIVATION)
    h = h.permute(2, 0, 1).reshape(TOKENS, 32)
    LINES: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    h = gl.convert_layout(h, LINES)
    n = n0 + gl.arange(0, 32, layout=gl.SliceLayout(0, LINES))
    return gl.where((n < N)[None, :], h, 0.0)


@gluon.jit
def _store_half(to, h, scale, n0, m0, last, N, TOKENS: gl.constexpr):
    LINES: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    m = m0 + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, LINES))
    n = n0 + gl.arange(0, 32, layout=gl.SliceLayout(0, LINES))
    h = (h / scale[:, None]).to(to.dtype.element_ty)
    gl.store(
        to + m.to(gl.int64)[:, None] * N + n[None, :],
        h,
        mask=(m < last)[:, None] & (n < N)[None, :],
    )


@gluon.jit
def _multiply_gate_up(
    WHO: gl.constexpr, x_smem, s_smem, w_smem, given, full, empty, handed, taken, w_scale, out,
    out_scale, tiles, sums, flags, limit, alpha, beta, blocks, N, K, scale_rows, scale_columns,
    scale_stride,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group; the first one (0) goes on with the sums of both."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32]
    )
    steps = gl.cdiv(K, STEP)
    total = gl.load(tiles) * blocks
    first, end, left, pieces = _pieces(total, steps)
    i = 0
    phase = 0
    for n in range(pieces):
        t, begin, stop = _piece(n, first, end, left, steps)
        block, e, m0, last = _tile(t, tiles, blocks, TOKENS)
        acc0, acc1 = _sums_of_steps(
            WHO, x_smem, s_smem, w_smem, full, empty, w_scale, i, begin, stop, block, e, steps,
            scale_rows, scale_columns, TOKENS, STAGES, SCALE_N, SCALE_K,
        )  # fmt: skip
        i += stop - begin
        if WHO == 1:
            mbarrier.wait(taken, phase ^ 1)
            given.index(0).store(acc0)
            given.index(1).store(acc1)
            mbarrier.arrive(handed, count=1)
        else:
            mbarrier.wait(handed, phase)
            acc0 += given.index(0).load(MMA)
            acc1 += given.index(1).load(MMA)
            mbarrier.arrive(taken, count=1)
            if begin > 0:
                _hand_over(sums, flags, (acc0, acc1), 0, 2)
            else:
                acc0, acc1 = _add_the_rest(
                    sums, flags, (acc0, acc1), 0, 2, t * steps + stop, (t + 1) * steps, total,
                    steps,
                )  # fmt: skip
                n0 = block * COLUMNS
                h0 = _hidden_of(acc0, n0, N, limit, alpha, beta, TOKENS, ACTIVATION)
                h1 = _hidden_of(acc1, n0 + 32, N, limit, alpha, beta, TOKENS, ACTIVATION)
                amax = gl.maximum(gl.max(gl.abs(h0), 1), gl.max(gl.abs(h1), 1))
                scale = gl.where(amax > 0, amax / E4M3_MAX, 1.0)
                LINES: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
                m = m0 + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, LINES))
                gl.store(out_scale + block * scale_stride + m, scale, mask=m < last)
                _store_half(out, h0, scale, n0, m0, last, N, TOKENS)
                _store_half(out, h1, scale, n0 + 32, m0, last, N, TOKENS)
        phase ^= 1


@gluon.jit(do_not_specialize=["scale_stride"])
def gate_up_kernel(
    x, x_scale, w, w_scale, out, out_scale, tiles, sums, flags, limit, alpha, beta, N, K,
    scale_rows, scale_columns, scale_stride,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
    ACTIVATION: gl.constexpr, PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """`out[position] = act(gate, up)`, e4m3, with a scale for each 64 columns.

    Args:
        x: accelerator's view of `[positions, K]` e4m3 activations, in boxes of TOKENS rows.
        x_scale: of `[K / 128, positions]` fp32, in boxes of 1 and SCALE_TOKENS.
        w: of `[experts, N / 8, (gate, up), 8, K]` e4m3, in boxes of 1, 4, 2, 8 and 128.
        w_scale: fp32, `[experts, (gate, up), scale_rows, scale_columns]`.
        out_scale: `[N / 64, scale_stride]` fp32.
        sums, flags: as in `share_device.py`, two parts a program.
        N: hidden columns.
        STAGES: even, see `_sums_of_steps`: else a warp group would wait for every second filling
            of a buffer, which a barrier's one bit of phase cannot tell from the one before.
    """
    x_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TOKENS, STEP], x.layout)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, 1, 4, 2, 8, STEP], w.layout)
    # 128 bytes of scales a step, at addresses that only swizzled buffers are sure to have.
    ROOM: gl.constexpr = (STAGES + 7) // 8 * 8
    spare = gl.allocate_shared_memory(gl.float8e4nv, [1, ROOM, STEP], W_LAYOUT)
    SCALES: gl.constexpr = x_scale.layout
    s_smem = _view_as(spare.index(0), gl.float32, [ROOM, 1, SCALE_TOKENS], SCALES)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    given = gl.allocate_shared_memory(gl.float32, [2, ROWS, TOKENS], PLAIN)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    handed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    mbarrier.init(handed, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()
    blocks = gl.cdiv(N, COLUMNS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply_gate_up, (
                0, x_smem, s_smem, w_smem, given, full, empty, handed, taken, w_scale, out,
                out_scale, tiles, sums, flags, limit, alpha, beta, blocks, N, K, scale_rows,
                scale_columns, scale_stride, TOKENS, STAGES, SCALE_N, SCALE_K, ACTIVATION,
            )),
            (_multiply_gate_up, (
                1, x_smem, s_smem, w_smem, given, full, empty, handed, taken, w_scale, out,
                out_scale, tiles, sums, flags, limit, alpha, beta, blocks, N, K, scale_rows,
                scale_columns, scale_stride, TOKENS, STAGES, SCALE_N, SCALE_K, ACTIVATION,
            )),
            (_copy_gate_up, (
                x, x_scale, w, x_smem, s_smem, w_smem, full, empty, tiles, blocks, K, TOKENS,
                STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _copy_down_weights(w, w_smem, full, s, e, block, k, N, TOKENS: gl.constexpr):
    """Twice 64 weight rows of a step; what else its barrier is going to wait for."""
    bar = full.index(s)
    mbarrier.expect(bar, (2 * ROWS + TOKENS) * STEP + 2 * 4 * SCALE_TOKENS)
    for half in gl.static_range(2):
        row = e * N + block * 2 * ROWS + half * ROWS
        _load(w, [row, k * STEP], bar, w_smem.index(2 * s + half))


@gluon.jit
def _copy_down(
    x, x_scale, w, x_smem, s_smem, w_smem, full, empty, tiles, ahead, blocks, N, K,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `_copy_gate_up`, but for the weights of the steps `ahead`; two scales of each token."""
    steps = gl.cdiv(K, STEP)
    total = gl.load(tiles) * blocks
    first, end, left, pieces = _pieces(total, steps)
    i = 0
    for n in range(pieces):
        t, begin, stop = _piece(n, first, end, left, steps)
        block, e, m0, _ = _tile(t, tiles, blocks, TOKENS)
        for k in range(begin, stop):
            s = i % STAGES
            if i >= ahead:
                mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
                _copy_down_weights(w, w_smem, full, s, e, block, k, N, TOKENS)
            _load(x, [m0, k * STEP], full.index(s), x_smem.index(s))
            for g in gl.static_range(2):
                at = [k * (STEP // COLUMNS) + g, m0]
                _load(x_scale, at, full.index(s), s_smem.index(2 * s + g))
            i += 1


@gluon.jit
def _down_scales(
    w_scale, e, n0, k0, scale_rows, scale_columns,
    SUB: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
):  # fmt: skip
    """One row's scales of four parts of a step, or of two in turns."""
    row = w_scale + (e * scale_rows + n0 // SCALE_N) * scale_columns
    last = scale_columns - 1
    s0 = gl.load(row + gl.minimum(k0 // SCALE_K, last))
    s1 = gl.load(row + gl.minimum((k0 + SUB) // SCALE_K, last))
    if SUB == 32:
        s2 = gl.load(row + gl.minimum((k0 + 2 * SUB) // SCALE_K, last))
        s3 = gl.load(row + gl.minimum((k0 + 3 * SUB) // SCALE_K, last))
        return s0, s1, s2, s3
    else:
        return s0, s1, s0, s1


@gluon.jit
def _multiply_down(
    WHO: gl.constexpr, x_smem, s_smem, w_smem, full, empty, w_scale, out, tiles, sums, flags,
    blocks, N, K, scale_rows, scale_columns,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SUB: gl.constexpr, SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group: 64 rows of each tile, SUB columns between scales."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TOKENS, 32]
    )
    zero = gl.zeros([ROWS, TOKENS], gl.float32, layout=MMA)
    steps = gl.cdiv(K, STEP)
    total = gl.load(tiles) * blocks
    first, end, left, pieces = _pieces(total, steps)
    i = 0
    if pieces > 0:
        t, begin, stop = _piece(0, first, end, left, steps)
        block, e, m0, last = _tile(t, tiles, blocks, TOKENS)
        n0 = block * 2 * ROWS + WHO * ROWS
        s0, s1, s2, s3 = _down_scales(
            w_scale, e, n0, begin * STEP, scale_rows, scale_columns, SUB, SCALE_N, SCALE_K
        )
        for n in range(pieces):
            # What the next tile is, and then its first scales, is on its way with this tile's end.
            after = gl.minimum(n + 1, pieces - 1)
            next_t, next_begin, next_stop = _piece(after, first, end, left, steps)
            next_block, next_e, next_m0, next_last = _tile(next_t, tiles, blocks, TOKENS)
            next_n0 = next_block * 2 * ROWS + WHO * ROWS
            acc = zero
            for k in range(begin, stop):
                s = i % STAGES
                mbarrier.wait(full.index(s), (i // STAGES) & 1)
                x = x_smem.index(s)
                a = w_smem.index(2 * s + WHO)
                parts = ()
                for j in gl.static_range(STEP // SUB):
                    xj = x.slice(j * SUB, SUB, 1).permute((1, 0))
                    aj = a.slice(j * SUB, SUB, 1)
                    parts += (warpgroup_mma(aj, xj, zero, use_acc=False, is_async=True),)
                sx = ()
                for g in gl.static_range(2):
                    sx += (s_smem.index(2 * s + g).slice(0, TOKENS, 1).load(MMA),)
                # The scales of the next step are on their way while this one is multiplied.
                more = k + 1 < stop
                k1 = gl.where(more, k + 1, 0) * STEP
                e1 = gl.where(more, e, next_e)
                n1 = gl.where(more, n0, next_n0)
                sw = (s0, s1, s2, s3)
                s0, s1, s2, s3 = _down_scales(
                    w_scale, e1, n1, k1, scale_rows, scale_columns, SUB, SCALE_N, SCALE_K
                )
                parts = warpgroup_mma_wait(0, deps=parts)
                fence_async_shared()  # the tokens' scales are read before others are copied there
                mbarrier.arrive(empty.index(s), count=1)
                for j in gl.static_range(STEP // SUB):
                    acc += parts[j] * (sx[j * SUB // COLUMNS] * sw[j])
                i += 1
            if begin > 0:
                _hand_over(sums, flags, (acc,), WHO, 2)
            else:
                (acc,) = _add_the_rest(
                    sums, flags, (acc,), WHO, 2, t * steps + stop, (t + 1) * steps, total, steps
                )  # fmt: skip
                y = acc.to(gl.bfloat16).permute((1, 0))
                # Every warp's 16 columns stay with it, 32 bytes of memory: no barrier between
                # warps.
                LINES: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, 4], [1, 0])
                y = gl.convert_layout(y, LINES)
                m = m0 + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, LINES))
                column = n0 + gl.arange(0, ROWS, layout=gl.SliceLayout(0, LINES))
                to = out + m.to(gl.int64)[:, None] * N + column[None, :]
                gl.store(to, y, mask=(m < last)[:, None])
            t = next_t
            begin = next_begin
            stop = next_stop
            e = next_e
            n0 = next_n0
            m0 = next_m0
            last = next_last


@gluon.jit
def down_kernel(
    x, x_scale, w, w_scale, out, tiles, sums, flags, N, K, scale_rows, scale_columns,
    TOKENS: gl.constexpr, STAGES: gl.constexpr, SUB: gl.constexpr, SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr, PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """`out[position] = x @ w.T`, bf16.

    Args:
        x: accelerator's view of `[positions, K]` e4m3 hidden columns, in boxes of TOKENS rows.
        x_scale: of `[K / 64, positions]` fp32, in boxes of 1 and SCALE_TOKENS.
        w: of `[experts' rows, K]` e4m3, in boxes of 64 and 128.
        w_scale: fp32, `[experts, scale_rows, scale_columns]`.
        sums, flags: as in `share_device.py`, two parts a program.
        N: output columns, a multiple of 128.
        SUB: columns that one scale of x and one of w cover.
    """
    x_smem = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, TOKENS, STEP], x.layout)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, ROWS, STEP], w.layout)
    ROOM: gl.constexpr = (2 * STAGES + 7) // 8 * 8
    spare = gl.allocate_shared_memory(gl.float8e4nv, [1, ROOM, STEP], W_LAYOUT)
    SCALES: gl.constexpr = x_scale.layout
    s_smem = _view_as(spare.index(0), gl.float32, [ROOM, 1, SCALE_TOKENS], SCALES)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    blocks = N // (2 * ROWS)
    # Weights do not wait for the first GEMM; the tiles are listed since before it began.
    steps = gl.cdiv(K, STEP)
    first, end, left, pieces = _pieces(gl.load(tiles) * blocks, steps)
    t, begin, stop = _piece(0, first, end, left, steps)
    ahead = gl.where(pieces > 0, gl.minimum(stop - begin, STAGES), 0)
    block, e, _, _ = _tile(gl.where(pieces > 0, t, 0), tiles, blocks, TOKENS)
    for j in range(ahead):
        _copy_down_weights(w, w_smem, full, j, e, block, begin + j, N, TOKENS)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_multiply_down, (
                0, x_smem, s_smem, w_smem, full, empty, w_scale, out, tiles, sums, flags, blocks,
                N, K, scale_rows, scale_columns, TOKENS, STAGES, SUB, SCALE_N, SCALE_K,
            )),
            (_multiply_down, (
                1, x_smem, s_smem, w_smem, full, empty, w_scale, out, tiles, sums, flags, blocks,
                N, K, scale_rows, scale_columns, TOKENS, STAGES, SUB, SCALE_N, SCALE_K,
            )),
            (_copy_down, (
                x, x_scale, w, x_smem, s_smem, w_smem, full, empty, tiles, ahead, blocks, N, K,
                TOKENS, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
