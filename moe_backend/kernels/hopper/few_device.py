"""Device code for few tokens on Hopper: two launches of matrix-vector products.

There is nothing to share between a handful of tokens, so there is no tile to bring to shared
memory: each group of LANES threads multiplies two weight rows with one token's activations,
straight from memory to registers in pieces of 16 bytes a thread, products and sums in fp32. FP8
codes and NVFP4 codes are exact in fp32; activations are as they are (W8A16, W4A16). An MMA for
NVFP4 saved most of the decoding, and took twice as long.

Every program reads the routing itself: there are few ids, and a launch costs more than they do.
The second launch overlaps the first: its weights are on their way before it waits for the hidden
columns. Sums are in a fixed order, with no atomics: repeated runs are bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moe_backend.kernels.hopper.device import _codes_of
from moe_backend.kernels.triton.device import BF16, FP8_BLOCK, NVFP4, _activate, _e2m1

# Four bytes, a word of eight e2m1 codes in the order of `codes.py`, to fp32: those of even columns
# to $0..$3, those of odd ones to $4..$7. As bf16 they read as their values times 2**-126.
_DECODE: tl.constexpr = tl.constexpr(
    """
    {
    .reg .b32 c, f;
    mov.b32 f, 0x7E807E80;
    and.b32 c, $8, 0x81C081C0;
    mul.rn.bf16x2 c, c, f;
    shl.b32 $0, c, 16;
    and.b32 $2, c, 0xFFFF0000;
    shf.l.wrap.b32 c, $8, $8, 10;
    and.b32 c, c, 0x81C081C0;
    mul.rn.bf16x2 c, c, f;
    shl.b32 $4, c, 16;
    and.b32 $6, c, 0xFFFF0000;
    shf.l.wrap.b32 c, $8, $8, 13;
    and.b32 c, c, 0x81C081C0;
    mul.rn.bf16x2 c, c, f;
    shl.b32 $1, c, 16;
    and.b32 $3, c, 0xFFFF0000;
    and.b32 c, $8, 0x001B001B;
    mul.lo.u32 c, c, 0x4108;
    and.b32 c, c, 0x81C081C0;
    mul.rn.bf16x2 c, c, f;
    shl.b32 $5, c, 16;
    and.b32 $7, c, 0xFFFF0000;
    }
    """
)


@triton.jit
def _local_slots(
    ids, expert_map, first, num, IDS: tl.constexpr, HAS_MAP: tl.constexpr, SLOTS: tl.constexpr
):
    """Of `num` slots from `first`: `(key, number, count)`.

    `number` is the running number of a local slot (-1 of a dropped one; ids from IDS on are
    dropped), `count` their number, `key` the slot (from 0) times 2**16 plus its local expert.
    """
    slot = tl.arange(0, SLOTS)
    expert = tl.load(ids + first + slot, mask=slot < num, other=-1)
    expert = tl.where(expert < IDS, expert, -1)  # left out, as -1
    if HAS_MAP:
        expert = tl.load(expert_map + expert, mask=expert >= 0, other=-1)
    local = (expert >= 0).to(tl.int32)
    number = tl.where(expert >= 0, tl.cumsum(local, 0) - 1, -1)
    return slot * 65536 + expert, number, tl.sum(local, 0)


@triton.jit
def _take(key, number, wanted):
    """Slot and local expert with the running number `wanted`; zeros where there is none."""
    found = tl.sum(tl.where(number == wanted, key, 0), 0)
    return found // 65536, (found % 65536).to(tl.int64)


@triton.jit
def _halves(pair, HALF: tl.constexpr):
    """Even (low) and odd columns of pairs of 16-bit numbers in one word, in fp32."""
    if HALF:
        even = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = ((pair >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        even = (pair << 16).to(tl.float32, bitcast=True)
        odd = (pair & -65536).to(tl.float32, bitcast=True)
    return even, odd


@triton.jit
def _quarters(piece, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """`[GROUPS, LANES, 16]` as four of `[GROUPS, LANES, 4]`, all in the same threads."""
    low, high = tl.split(tl.reshape(piece, (GROUPS, LANES, 4, 2, 2)))
    a, b = tl.split(low)
    c, d = tl.split(high)
    return a, b, c, d


@triton.jit
def _decode(w, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """Values of even and of odd columns, of bytes in the order of `codes.py`; without PTX."""
    even, odd = tl.split(tl.reshape(w.to(tl.uint32), (GROUPS, LANES * 4, 2, 2)))
    b0, b2 = tl.split(even)
    b1, b3 = tl.split(odd)
    c0, c1, c2, c3, c4, c5, c6, c7 = _codes_of(b0 | b1 << 8 | b2 << 16 | b3 << 24)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6)).reshape(GROUPS, LANES * 16)
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7)).reshape(GROUPS, LANES * 16)
    return _e2m1(even, tl.float32), _e2m1(odd, tl.float32)


@triton.jit
def _add_products(
    acc,
    w,
    x,
    scale,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    PTX: tl.constexpr,
    HALF: tl.constexpr,
):
    """`acc` `[GROUPS, LANES, 4]` plus the products of each thread's piece, times its scale.

    `w` are codes, NVFP4 two a byte; `x` activations, with NVFP4 two a word. Sums are chains of
    four: one instruction a product.
    """
    if FORMAT == BF16:
        w0, w1 = tl.split(tl.reshape(w.to(tl.float32), (GROUPS, LANES, 4, 2)))
        x0, x1 = tl.split(tl.reshape(x.to(tl.float32), (GROUPS, LANES, 4, 2)))
        acc += w0 * x0
        acc += w1 * x1
    elif FORMAT == FP8_BLOCK:
        w0, w1, w2, w3 = _quarters(w.to(tl.float32), GROUPS, LANES)
        x0, x1, x2, x3 = _quarters(x.to(tl.float32), GROUPS, LANES)
        acc += (w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3) * scale[:, :, None]
    else:
        if PTX:
            # A thread has 16 neighbouring bytes of a row (what `_scale` counts on as well), so each
            # four that the assembler text is given are a word.
            even, odd = tl.inline_asm_elementwise(
                _DECODE, "=r,=r,=r,=r,=r,=r,=r,=r,r", [w],
                dtype=(tl.float32, tl.float32), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            even, odd = _decode(w, GROUPS, LANES)
        x_even, x_odd = _halves(x, HALF)
        # Bytes 0..7 share one scale, bytes 8..15 the next: they must stay apart in the last axis.
        e0, e1 = tl.split(tl.reshape(even, (GROUPS, LANES, 2, 4, 2)))
        o0, o1 = tl.split(tl.reshape(odd, (GROUPS, LANES, 2, 4, 2)))
        a0, a1 = tl.split(tl.reshape(x_even, (GROUPS, LANES, 2, 4, 2)))
        b0, b1 = tl.split(tl.reshape(x_odd, (GROUPS, LANES, 2, 4, 2)))
        part = e0 * a0 + e1 * a1 + o0 * b0 + o1 * b1
        part *= tl.reshape(scale, (GROUPS, LANES, 2, 1))
        acc += tl.sum(part, 2)
    return acc


@triton.jit
def _scale(
    base,
    row,
    inside,
    column,
    K: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Scales of the pieces that begin at `column` of a row (`[GROUPS]`); 0 outside.

    Args:
        base: of its expert's scales.
        row: its number; with NVFP4, whose pieces have two scales each, `_place_of_row`.
    """
    if FORMAT == FP8_BLOCK:
        at = row // SCALE_N * ((K + SCALE_K - 1) // SCALE_K)
        lane = column + tl.arange(0, LANES) * 16
        mask = inside[:, None] & (lane < K)[None, :]
        scale = tl.load(base + at[:, None] + (lane // SCALE_K)[None, :], mask=mask, other=0.0)
    elif FORMAT == NVFP4:
        piece = column // 32 + tl.arange(0, LANES)
        mask = inside[:, None] & (piece < K // 32)[None, :]
        inside_step = piece % 8 // 2 * 8 + piece % 2 * 2
        where = row[:, None] + (piece // 8 * 256 + inside_step)[None, :]
        two = tl.load((base + where).to(tl.pointer_type(tl.uint16)), mask=mask, other=0)
        low = (two & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        high = (two >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        scale = tl.join(low, high)
    else:
        scale = 1.0
    return scale


@triton.jit
def _place_of_row(n, second, unit, K: tl.constexpr):
    """Where a row's block scales begin among its expert's (`codes.rearranged_scales`).

    Args:
        n: its number, of 8 rows; second: whether it is the one that goes with another.
        unit: number of its 16 rows.
    """
    return unit * ((K + 255) // 256 * 256) + n % 8 * 32 + second * 4


@triton.jit(do_not_specialize=["num_slots"])
def gate_up_kernel(
    x,
    w13,
    w13_scale,
    w13_global,
    topk_weights,
    ids,
    expert_map,
    hidden,
    limit,
    alpha,
    beta,
    num_slots,
    H: tl.constexpr,
    I: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    IDS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    PTX: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """`hidden[slot] = act(gate, up)`: GROUPS hidden columns of one local slot a tile."""
    if PDL:
        gdc_launch_dependents()
    PIECE: tl.constexpr = 8 if FORMAT == BF16 else 16  # elements (bytes of NVFP4) in 16 bytes
    PACKED: tl.constexpr = 2 if FORMAT == NVFP4 else 1
    ZERO: tl.constexpr = 0 if FORMAT == NVFP4 else 0.0
    WIDTH: tl.constexpr = H // PACKED
    CHUNK: tl.constexpr = LANES * PIECE
    BLOCKS: tl.constexpr = (I + GROUPS - 1) // GROUPS
    scale_rows = (I + SCALE_N - 1) // SCALE_N
    scale_columns = (H + SCALE_K - 1) // SCALE_K
    key, number, count = _local_slots(ids, expert_map, 0, num_slots, IDS, HAS_MAP, SLOTS)
    group = tl.arange(0, GROUPS)
    # LANES threads beside each other take CHUNK columns of a row: the compiler lays it out so.
    piece = tl.arange(0, CHUNK)[None, :] + tl.zeros((GROUPS, 1), tl.int32)
    for t in range(tl.program_id(0), count * BLOCKS, tl.num_programs(0)):
        slot, e = _take(key, number, t // BLOCKS)
        token = slot // TOP_K
        i = t % BLOCKS * GROUPS + group
        inside = i < I
        row = x + token.to(tl.int64) * WIDTH
        gate_row = w13 + e * (2 * I * WIDTH) + i[:, None] * WIDTH
        up_row = gate_row + I * WIDTH
        if FORMAT == NVFP4:
            gate_at = _place_of_row(i, 0, i // 8, H)
            gate_scale = w13_scale + e * (I // 8 * ((H + 255) // 256 * 256))
            up_scale, up_at = gate_scale, gate_at + 4
        else:
            gate_at, up_at = i, i
            gate_scale = w13_scale + e * (2 * scale_rows * scale_columns)
            up_scale = gate_scale + scale_rows * scale_columns
        gate = tl.zeros((GROUPS, LANES, 4), tl.float32)
        up = tl.zeros((GROUPS, LANES, 4), tl.float32)
        for first in range(0, WIDTH, CHUNK * UNROLL):
            gates = ()
            ups = ()
            gate_scales = ()
            up_scales = ()
            for u in tl.static_range(UNROLL):
                column = first + u * CHUNK + piece
                k = (first + u * CHUNK) * PACKED
                mask = inside[:, None] & (column < WIDTH)
                gates += (tl.load(gate_row + column, mask=mask, other=ZERO),)
                ups += (tl.load(up_row + column, mask=mask, other=ZERO),)
                sg = _scale(
                    gate_scale, gate_at, inside, k, H, FORMAT, SCALE_N, SCALE_K, GROUPS, LANES
                )  # fmt: skip
                su = _scale(
                    up_scale, up_at, inside, k, H, FORMAT, SCALE_N, SCALE_K, GROUPS, LANES
                )  # fmt: skip
                gate_scales += (sg,)
                up_scales += (su,)
            # The assembler would move loads down to where their values are used.
            tl.debug_barrier()
            for u in tl.static_range(UNROLL):
                column = first + u * CHUNK + piece
                a = tl.load(row + column, mask=column < WIDTH, other=ZERO)
                gate = _add_products(
                    gate, gates[u], a, gate_scales[u], FORMAT, GROUPS, LANES, PTX, HALF
                )
                up = _add_products(up, ups[u], a, up_scales[u], FORMAT, GROUPS, LANES, PTX, HALF)
        gate_sum = tl.sum(tl.sum(gate, 2), 1)
        up_sum = tl.sum(tl.sum(up, 2), 1)
        if FORMAT == NVFP4:
            gate_sum *= tl.load(w13_global + e * 2)
            up_sum *= tl.load(w13_global + e * 2 + 1)
        if WEIGHT_ON_INPUT:
            weight = tl.load(topk_weights + slot)
            gate_sum *= weight
            up_sum *= weight
        h = _activate(gate_sum, up_sum, limit, alpha, beta, ACTIVATION)
        tl.store(hidden + slot * I + i, h.to(hidden.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["programs"])
def down_kernel(
    hidden,
    w2,
    w2_scale,
    w2_global,
    topk_weights,
    ids,
    expert_map,
    out,
    programs,
    H: tl.constexpr,
    I: tl.constexpr,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,
    IDS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    FORMAT: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    PTX: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    """`out[token]`: 2 * GROUPS columns a tile, summed over the token's local slots in order of k.

    The tiles of a token are dealt to `programs` programs.
    The routing was complete before the first launch began, so it and the weights that it names may
    be read before the wait for the hidden columns.
    """
    PIECE: tl.constexpr = 8 if FORMAT == BF16 else 16
    PACKED: tl.constexpr = 2 if FORMAT == NVFP4 else 1
    ZERO: tl.constexpr = 0 if FORMAT == NVFP4 else 0.0
    WIDTH: tl.constexpr = I // PACKED
    CHUNK: tl.constexpr = LANES * PIECE
    CHUNKS: tl.constexpr = (WIDTH + CHUNK - 1) // CHUNK
    BLOCKS: tl.constexpr = (H + 2 * GROUPS - 1) // (2 * GROUPS)
    scale_elements = (H + SCALE_N - 1) // SCALE_N * ((I + SCALE_K - 1) // SCALE_K)
    if FORMAT == NVFP4:
        scale_elements = H // 16 * ((I + 255) // 256 * 256)
    token = tl.program_id(0) // programs
    key, number, count = _local_slots(ids, expert_map, token * TOP_K, TOP_K, IDS, HAS_MAP, SLOTS)
    # LANES threads beside each other take CHUNK columns of a row: the compiler lays it out so.
    piece = tl.arange(0, CHUNK)[None, :] + tl.zeros((GROUPS, 1), tl.int32)
    for block in range(tl.program_id(0) % programs, BLOCKS, programs):
        if FORMAT == NVFP4 and GROUPS < 8:
            # Scales of rows eight apart lie side by side.
            EIGHTH: tl.constexpr = 8 // GROUPS
            n = block // EIGHTH * 16 + block % EIGHTH * GROUPS + tl.arange(0, GROUPS)
            m = n + 8
        else:
            n = block * (2 * GROUPS) + tl.arange(0, GROUPS)
            m = n + GROUPS
        acc = tl.zeros((GROUPS, LANES, 4), tl.float32)
        other = tl.zeros((GROUPS, LANES, 4), tl.float32)
        for first in range(0, count * CHUNKS, UNROLL):
            codes = ()
            other_codes = ()
            scales = ()
            other_scales = ()
            factors = ()
            for u in tl.static_range(UNROLL):
                k, e = _take(key, number, (first + u) // CHUNKS)
                used = first + u < count * CHUNKS
                start = (first + u) % CHUNKS * CHUNK
                rows = tl.where(used, H, 0)
                column = start + piece
                row = w2 + e * (H * WIDTH) + column
                mask = (n < rows)[:, None] & (column < WIDTH)
                other_mask = (m < rows)[:, None] & (column < WIDTH)
                codes += (tl.load(row + n[:, None] * WIDTH, mask=mask, other=ZERO),)
                other_codes += (tl.load(row + m[:, None] * WIDTH, mask=other_mask, other=ZERO),)
                scale = w2_scale + e * scale_elements
                n_at, m_at = n, m
                if FORMAT == NVFP4:
                    n_at = _place_of_row(n, n // 8 % 2, n // 16, I)
                    m_at = _place_of_row(m, m // 8 % 2, m // 16, I)
                k0 = start * PACKED
                s = _scale(
                    scale, n_at, n < rows, k0, I, FORMAT, SCALE_N, SCALE_K, GROUPS, LANES
                )  # fmt: skip
                o = _scale(
                    scale, m_at, m < rows, k0, I, FORMAT, SCALE_N, SCALE_K, GROUPS, LANES
                )  # fmt: skip
                scales += (s,)
                other_scales += (o,)
                factor = 1.0
                if not WEIGHT_ON_INPUT:
                    factor = tl.load(topk_weights + token * TOP_K + k, mask=used, other=0.0)
                if FORMAT == NVFP4:
                    factor *= tl.load(w2_global + e, mask=used, other=0.0)
                factors += (factor,)
            if PDL:
                gdc_wait()
            for u in tl.static_range(UNROLL):
                k, _ = _take(key, number, (first + u) // CHUNKS)
                used = first + u < count * CHUNKS
                slot = token * TOP_K + k
                column = (first + u) % CHUNKS * CHUNK + piece
                width = tl.where(used, WIDTH, 0)
                a = tl.load(hidden + slot * WIDTH + column, mask=column < width, other=ZERO)
                zero = tl.zeros((GROUPS, LANES, 4), tl.float32)
                part = _add_products(zero, codes[u], a, scales[u], FORMAT, GROUPS, LANES, PTX, HALF)
                other_part = _add_products(
                    zero, other_codes[u], a, other_scales[u], FORMAT, GROUPS, LANES, PTX, HALF
                )
                acc += part * factors[u]
                other += other_part * factors[u]
        if PDL:
            gdc_wait()  # this launch must not end before the first, also where nothing is local
        total = tl.sum(tl.sum(acc, 2), 1)
        other_total = tl.sum(tl.sum(other, 2), 1)
        where = out + token.to(tl.int64) * H
        tl.store(where + n, total.to(out.dtype.element_ty), mask=n < H)
        tl.store(where + m, other_total.to(out.dtype.element_ty), mask=m < H)
