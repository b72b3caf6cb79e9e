"""Device code for FP8 with many tokens per expert: warp-specialised grouped GEMMs, in Gluon.

Slots are sorted by expert and their quantised activations laid out in that order
(`sort_device.py`), so that the tensor memory accelerator brings tokens as well as weights. A
program has three roles: one warp that issues the copies, and two warp groups that multiply, each
64 of a tile's 128 tokens with its two halves of weight rows (for the first GEMM the gate half and
the up half). Each partial sum of at most 128 products is scaled in fp32; while one warp group does
that, the tensor cores work for the other.

Tokens are the first operand here, unlike in `device.py`: a thread then holds two tokens' scales per
step and not those of 32, and tiles are full anyway.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_backend.kernels.triton.device import _activate

TOKENS: tl.constexpr = tl.constexpr(128)  # of a tile
HALF_TOKENS: tl.constexpr = tl.constexpr(64)  # of a warp group
WIDE: tl.constexpr = tl.constexpr(64)  # weight rows of one product
E4M3_MAX: tl.constexpr = tl.constexpr(448.0)
# Triton 3.6 has `async_copy_global_to_shared` and `_reinterpret`, 3.9 these under other names.
_load = getattr(tma, "async_load", tma.async_copy_global_to_shared)
RENAMED: tl.constexpr = tl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))

_activate_gluon = gluon.jit(_activate.fn)


@gluon.jit
def _view_as(buffer, DTYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The same shared memory as numbers of another kind or in another shape."""
    if RENAMED:
        return buffer.reinterpret(DTYPE, SHAPE, LAYOUT)
    else:
        return buffer._reinterpret(DTYPE, SHAPE, LAYOUT)


@gluon.jit
def _work(t, tiles, blocks):
    """Block of weight rows, expert, first and end position of tile `t`; row blocks go fastest."""
    row = tiles + 1 + t // blocks * 3
    return t % blocks, gl.load(row), gl.load(row + 1), gl.load(row + 2)


@gluon.jit
def _weight_rows(e, block, N, HALF: gl.constexpr, GATED: gl.constexpr):
    """First rows of a tile's two halves, all experts' rows counted through."""
    if GATED:
        return 2 * e * N + block * HALF, (2 * e + 1) * N + block * HALF
    return e * N + block * 2 * HALF, e * N + block * 2 * HALF + HALF


@gluon.jit
def _copy(
    a, a_scale, w, a_smem, s_smem, w_smem, full, empty, tiles, blocks, N, K,
    HALF: gl.constexpr, STEP: gl.constexpr, STAGES: gl.constexpr, GATED: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """The copying warp: for each step, two halves of tokens and two of weight rows."""
    GROUPS: gl.constexpr = STEP // GROUP
    ONE: gl.constexpr = (HALF_TOKENS + 2 * HALF) * STEP + 4 * TOKENS * GROUPS
    BOTH: gl.constexpr = (TOKENS + 2 * HALF) * STEP + 4 * TOKENS * GROUPS
    total = gl.load(tiles) * blocks
    i = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block, e, m0, last = _work(t, tiles, blocks)
        r0, r1 = _weight_rows(e, block, N, HALF, GATED)
        m1 = m0 + HALF_TOKENS
        for k0 in range(0, K, STEP):
            s = i % STAGES
            bar = full.index(s)
            mbarrier.wait(empty.index(s), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, BOTH, pred=m1 < last)
            mbarrier.expect(bar, ONE, pred=m1 >= last)
            _load(w, [r0, k0], bar, w_smem.index(2 * s))
            _load(a, [m0, k0], bar, a_smem.index(2 * s))
            for g in gl.static_range(GROUPS):
                to = s_smem.index(s * GROUPS + g)
                _load(a_scale, [k0 // GROUP + g, m0], bar, to)
            _load(w, [r1, k0], bar, w_smem.index(2 * s + 1))
            _load(a, [m1, k0], bar, a_smem.index(2 * s + 1), pred=m1 < last)
            i += 1


@gluon.jit
def _row_scales(pointer, rows, columns, column, SCALE_N: gl.constexpr, ROW: gl.constexpr):
    """Scales of WIDE weight rows for one step: a scalar, or one value per row.

    `pointer` is that of the first row's scale, and `rows` rows of scales are left from there on.
    """
    if SCALE_N >= WIDE:
        return gl.load(pointer + column)
    else:
        row = gl.arange(0, WIDE, layout=ROW)
        scale = gl.zeros([WIDE], gl.float32, layout=ROW) + gl.load(pointer + column)
        for j in gl.static_range(1, WIDE // SCALE_N):
            other = gl.load(pointer + gl.minimum(j, rows - 1) * columns + column)
            scale = gl.where(row // SCALE_N == j, other, scale)
        return scale


@gluon.jit
def _add_product(acc, last, a, w, zero, token, weight, SCALE_N: gl.constexpr):
    """`acc + a @ w.T`, scaled by token and by weight row; and `last`, the sums scaled before.

    Waiting for those with the product keeps the compiler from multiplying again and again before it
    scales any sums, until it runs out of registers.
    """
    part = warpgroup_mma(a, w.permute((1, 0)), zero, use_acc=False, is_async=True)
    part, last = warpgroup_mma_wait(0, deps=[part, last])
    if SCALE_N >= WIDE:
        return acc + part * (token * weight), last
    else:
        return acc + part * weight[None, :] * token, last


@gluon.jit
def _part(
    buffer, row: gl.constexpr, column: gl.constexpr, COLUMNS: gl.constexpr, STEP: gl.constexpr
):
    """WIDE rows and COLUMNS columns of a buffer in shared memory."""
    rows = buffer.slice(row, WIDE, 0)
    if COLUMNS < STEP:
        return rows.slice(column, COLUMNS, 1)
    else:
        return rows


@gluon.jit
def _store_rows(to, value, N, n0, m0, last):
    """A warp group's [64, WIDE] outputs, columns from n0 on, in whole lines of memory."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    value = gl.convert_layout(value.to(to.dtype.element_ty), LINES)
    m = m0 + gl.arange(0, HALF_TOKENS, layout=gl.SliceLayout(1, LINES))
    n = n0 + gl.arange(0, WIDE, layout=gl.SliceLayout(0, LINES))
    gl.store(
        to + m.to(gl.int64)[:, None] * N + n[None, :], value,
        mask=(m < last)[:, None] & (n < N)[None, :],
    )  # fmt: skip


@gluon.jit
def _half_of_rows(
    WHO: gl.constexpr, a_smem, s_smem, w_smem, full, empty, w_scale, out, i, block, e, m0, last,
    N, K, scale_rows, scale_columns,
    HALF: gl.constexpr, STEP: gl.constexpr, SUB: gl.constexpr, STAGES: gl.constexpr,
    GROUP: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
):  # fmt: skip
    """Of a second GEMM's tile with up to 64 tokens, half of the weight rows; the next step.

    Both warp groups have work then, and one stores while the other multiplies.
    """
    TWO: gl.constexpr = HALF // WIDE == 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 32]
    )
    ROW: gl.constexpr = gl.SliceLayout(0, MMA)
    zero = gl.zeros([HALF_TOKENS, WIDE], gl.float32, layout=MMA)
    n = (block * 2 + WHO) * HALF
    row = gl.minimum(n // SCALE_N, scale_rows - 1)
    left = scale_rows - row
    scales = w_scale + (e * scale_rows + row) * scale_columns
    acc = zero
    more = zero
    sw = _row_scales(scales, left, scale_columns, 0, SCALE_N, ROW)
    for k0 in range(0, K, STEP):
        s = i % STAGES
        mbarrier.wait(full.index(s), (i // STAGES) & 1)
        for j in gl.static_range(STEP // SUB):
            k1 = k0 + j * SUB
            if SUB == STEP or k1 < K:
                sa = s_smem.index(s * (STEP // GROUP) + j * SUB // GROUP).permute((1, 0))
                sa = sa.slice(0, HALF_TOKENS, 0).load(MMA)
                k2 = gl.minimum(k1 + SUB, K - 1) // SCALE_K
                next_sw = _row_scales(scales, left, scale_columns, k2, SCALE_N, ROW)
                aj = _part(a_smem.index(2 * s), 0, j * SUB, SUB, STEP)
                w = w_smem.index(2 * s + WHO)
                wj = _part(w, 0, j * SUB, SUB, STEP)
                acc, more = _add_product(acc, more, aj, wj, zero, sa, sw, SCALE_N)
                if TWO:
                    wj = _part(w, WIDE, j * SUB, SUB, STEP)
                    more, acc = _add_product(more, acc, aj, wj, zero, sa, sw, SCALE_N)
                sw = next_sw
        fence_async_shared()  # the tokens' scales are read before others are copied there
        mbarrier.arrive(empty.index(s), count=1)
        i += 1
    _store_rows(out, acc, N, n, m0, last)
    if TWO:
        _store_rows(out, more, N, n + WIDE, m0, last)
    return i


@gluon.jit
def _own_tokens(
    WHO: gl.constexpr, a_smem, s_smem, w_smem, full, empty, w_scale, out, out_scale, i, limit,
    alpha, beta, block, e, m0, last, N, K, scale_rows, scale_columns, scale_stride,
    HALF: gl.constexpr, STEP: gl.constexpr, SUB: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, GROUP: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A warp group's 64 tokens of a tile with both halves of weight rows; the next step.

    WIDE columns at a time: the compiler starts the next product before it has scaled the last one's
    sums, and with 128 columns the registers for that do not suffice.
    """
    TWO: gl.constexpr = HALF // WIDE == 2
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDE, 32]
    )
    ROW: gl.constexpr = gl.SliceLayout(0, MMA)
    zero = gl.zeros([HALF_TOKENS, WIDE], gl.float32, layout=MMA)
    m0 += WHO * HALF_TOKENS
    row0 = block * HALF // SCALE_N if GATED else block * 2 * HALF // SCALE_N
    row1 = row0
    if not GATED:  # a half past the last row needs no scale of its own, but an address
        row1 = gl.minimum((block * 2 * HALF + HALF) // SCALE_N, scale_rows - 1)
    left0 = scale_rows - row0
    left1 = scale_rows - row1
    s0 = ((2 * e if GATED else e) * scale_rows + row0) * scale_columns
    s1 = ((2 * e + 1 if GATED else e) * scale_rows + row1) * scale_columns
    acc0 = zero
    acc1 = zero
    more0 = zero
    more1 = zero
    if m0 < last:
        sw0 = _row_scales(w_scale + s0, left0, scale_columns, 0, SCALE_N, ROW)
        sw1 = _row_scales(w_scale + s1, left1, scale_columns, 0, SCALE_N, ROW)
        for k0 in range(0, K, STEP):
            s = i % STAGES
            mbarrier.wait(full.index(s), (i // STAGES) & 1)
            for j in gl.static_range(STEP // SUB):
                k1 = k0 + j * SUB
                if SUB == STEP or k1 < K:
                    sa = s_smem.index(s * (STEP // GROUP) + j * SUB // GROUP).permute((1, 0))
                    sa = sa.slice(WHO * HALF_TOKENS, HALF_TOKENS, 0).load(MMA)
                    # The scales of the next step are on their way while this is multiplied.
                    k2 = gl.minimum(k1 + SUB, K - 1) // SCALE_K
                    next_sw0 = _row_scales(w_scale + s0, left0, scale_columns, k2, SCALE_N, ROW)
                    next_sw1 = _row_scales(w_scale + s1, left1, scale_columns, k2, SCALE_N, ROW)
                    aj = _part(a_smem.index(2 * s + WHO), 0, j * SUB, SUB, STEP)
                    w = w_smem.index(2 * s)
                    wj = _part(w, 0, j * SUB, SUB, STEP)
                    if TWO:
                        acc0, more1 = _add_product(acc0, more1, aj, wj, zero, sa, sw0, SCALE_N)
                        wj = _part(w, WIDE, j * SUB, SUB, STEP)
                        more0, acc0 = _add_product(more0, acc0, aj, wj, zero, sa, sw0, SCALE_N)
                        w = w_smem.index(2 * s + 1)
                        wj = _part(w, 0, j * SUB, SUB, STEP)
                        acc1, more0 = _add_product(acc1, more0, aj, wj, zero, sa, sw1, SCALE_N)
                        wj = _part(w, WIDE, j * SUB, SUB, STEP)
                        more1, acc1 = _add_product(more1, acc1, aj, wj, zero, sa, sw1, SCALE_N)
                    else:
                        acc0, acc1 = _add_product(acc0, acc1, aj, wj, zero, sa, sw0, SCALE_N)
                        wj = _part(w_smem.index(2 * s + 1), 0, j * SUB, SUB, STEP)
                        acc1, acc0 = _add_product(acc1, acc0, aj, wj, zero, sa, sw1, SCALE_N)
                    sw0 = next_sw0
                    sw1 = next_sw1
            fence_async_shared()  # the tokens' scales are read before others are copied there
            mbarrier.arrive(empty.index(s), count=1)
            i += 1
        if GATED:
            n = block * HALF
            # Rows past the end of this expert's weights are the next one's.
            column = n + gl.arange(0, WIDE, layout=ROW)
            h = _activate_gluon(acc0, acc1, limit, alpha, beta, ACTIVATION)
            h = gl.where((column < N)[None, :], h, 0.0)
            amax = gl.max(gl.abs(h), 1)
            if TWO:
                g = _activate_gluon(more0, more1, limit, alpha, beta, ACTIVATION)
                g = gl.where((column + WIDE < N)[None, :], g, 0.0)
                amax = gl.maximum(amax, gl.max(gl.abs(g), 1))
            scale = gl.where(amax > 0, amax / E4M3_MAX, 1.0)
            m = m0 + gl.arange(0, HALF_TOKENS, layout=gl.SliceLayout(1, MMA))
            gl.store(out_scale + block * scale_stride + m, scale, mask=m < last)
            _store_rows(out, h / scale[:, None], N, n, m0, last)
            if TWO:
                _store_rows(out, g / scale[:, None], N, n + WIDE, m0, last)
        else:
            n = block * 2 * HALF
            _store_rows(out, acc0, N, n, m0, last)
            if TWO:
                _store_rows(out, more0, N, n + WIDE, m0, last)
            _store_rows(out, acc1, N, n + HALF, m0, last)
            if TWO:
                _store_rows(out, more1, N, n + HALF + WIDE, m0, last)
    else:
        for _ in range(0, K, STEP):
            s = i % STAGES
            mbarrier.wait(full.index(s), (i // STAGES) & 1)
            mbarrier.arrive(empty.index(s), count=1)
            i += 1
    return i


@gluon.jit
def _multiply(
    WHO: gl.constexpr, a_smem, s_smem, w_smem, full, empty, w_scale, out, out_scale, tiles, limit,
    alpha, beta, blocks, N, K, scale_rows, scale_columns, scale_stride,
    HALF: gl.constexpr, STEP: gl.constexpr, SUB: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, GROUP: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
    ACTIVATION: gl.constexpr,
):  # fmt: skip
    """A multiplying warp group: 64 tokens of each tile, or half of the rows where there are few."""
    total = gl.load(tiles) * blocks
    i = 0
    for t in range(gl.program_id(0), total, gl.num_programs(0)):
        block, e, m0, last = _work(t, tiles, blocks)
        if GATED:
            i = _own_tokens(
                WHO, a_smem, s_smem, w_smem, full, empty, w_scale, out, out_scale, i, limit, alpha,
                beta, block, e, m0, last, N, K, scale_rows, scale_columns, scale_stride, HALF, STEP,
                SUB, STAGES, GATED, GROUP, SCALE_N, SCALE_K, ACTIVATION,
            )  # fmt: skip
        else:
            if m0 + HALF_TOKENS < last:
                i = _own_tokens(
                    WHO, a_smem, s_smem, w_smem, full, empty, w_scale, out, out_scale, i, limit,
                    alpha, beta, block, e, m0, last, N, K, scale_rows, scale_columns, scale_stride,
                    HALF, STEP, SUB, STAGES, GATED, GROUP, SCALE_N, SCALE_K, ACTIVATION,
                )  # fmt: skip
            else:
                i = _half_of_rows(
                    WHO, a_smem, s_smem, w_smem, full, empty, w_scale, out, i, block, e, m0, last,
                    N, K, scale_rows, scale_columns, HALF, STEP, SUB, STAGES, GROUP, SCALE_N,
                    SCALE_K,
                )  # fmt: skip


@gluon.jit
def gemm_kernel(
    a, a_scale, w, w_scale, out, out_scale, tiles, limit, alpha, beta, N, K,
    scale_rows, scale_columns, scale_stride,
    HALF: gl.constexpr, STEP: gl.constexpr, SUB: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, GROUP: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
    ACTIVATION: gl.constexpr, PDL: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, COPY_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One GEMM of all experts.

    Args:
        a: accelerator's view of `[positions, K]` e4m3 activations, in boxes of 64 rows.
        a_scale: of `[K / GROUP, positions]` fp32 scales of `a`, in boxes of 1 and 128.
        w: accelerator's view of `[experts' rows, K]` e4m3 weights, in boxes of HALF rows.
        w_scale: fp32, `[experts, (gate, up), scale_rows, scale_columns]`, or without the pair.
        N: rows of an expert's gate (or up) for the first GEMM (GATED), of its w2 for the second.
        SUB: columns of a step that are multiplied before their sums are scaled.
    """
    a_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES, HALF_TOKENS, STEP], a.layout)
    w_smem = gl.allocate_shared_memory(gl.float8e4nv, [2 * STAGES + 1, HALF, STEP], w.layout)
    # The accelerator writes to multiples of 128 bytes, which only swizzled buffers are sure to be.
    SCALES: gl.constexpr = [STAGES * (STEP // GROUP), 1, TOKENS]
    LAYOUT: gl.constexpr = a_scale.layout
    s_smem = _view_as(w_smem.index(2 * STAGES), gl.float32, SCALES, LAYOUT)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    fence_async_shared()
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    blocks = gl.cdiv(N, HALF if GATED else 2 * HALF)
    gl.warp_specialize(
        [
            (_multiply, (
                0, a_smem, s_smem, w_smem, full, empty, w_scale, out, out_scale, tiles, limit,
                alpha, beta, blocks, N, K, scale_rows, scale_columns, scale_stride,
                HALF, STEP, SUB, STAGES, GATED, GROUP, SCALE_N, SCALE_K, ACTIVATION,
            )),
            (_multiply, (
                1, a_smem, s_smem, w_smem, full, empty, w_scale, out, out_scale, tiles, limit,
                alpha, beta, blocks, N, K, scale_rows, scale_columns, scale_stride,
                HALF, STEP, SUB, STAGES, GATED, GROUP, SCALE_N, SCALE_K, ACTIVATION,
            )),
            (_copy, (
                a, a_scale, w, a_smem, s_smem, w_smem, full, empty, tiles, blocks, N, K,
                HALF, STEP, STAGES, GATED, GROUP,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
