"""The device code: two grouped GEMMs and a reduction.

A *tile* is up to BLOCK_M slots of one expert. Weights stay in the checkpoint's width until they are
in registers, where codes become bf16 exactly; block scales multiply fp32 partial sums (FP8) or the
codes (NVFP4, where the product is exact in bf16), and NVFP4's global scales the final sums. Every
weight address is 64 bits wide: `w13` of MiniMax-M3 alone is 9 GiB.
"""

from __future__ import annotations

import triton
import triton.language as tl

BF16: tl.constexpr = tl.constexpr(0)
FP8_BLOCK: tl.constexpr = tl.constexpr(1)
NVFP4: tl.constexpr = tl.constexpr(2)

SILU: tl.constexpr = tl.constexpr(0)
SWIGLUSTEP: tl.constexpr = tl.constexpr(1)
CLAMPED_SILU: tl.constexpr = tl.constexpr(2)
SWIGLUOAI: tl.constexpr = tl.constexpr(3)


@triton.jit
def _activate(gate, up, limit, alpha, beta, KIND: tl.constexpr):
    """The formulas of `moe_backend.activation`, in fp32."""
    if KIND == CLAMPED_SILU or KIND == SWIGLUOAI:  # noqa: SIM109 (device code)
        gate = tl.minimum(gate, limit)
    if KIND != SILU:
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if KIND == SWIGLUOAI:
        return gate * tl.sigmoid(alpha * gate) * (up + beta)
    hidden = gate * tl.sigmoid(gate)
    if KIND == SWIGLUSTEP:
        hidden = tl.minimum(hidden, limit)
    return hidden * up


@triton.jit
def _e2m1(code, COMPUTE: tl.constexpr):
    """Value of E2M1 codes 0..15; exact in COMPUTE."""
    magnitude = (code & 7).to(tl.int32)
    # Twice the value: 0 1 2 3 4 6 8 12.
    doubled = tl.where(
        magnitude < 4, magnitude, tl.where(magnitude < 6, 2 * magnitude - 4, 4 * magnitude - 16)
    )
    value = doubled.to(tl.float32) * 0.5
    return tl.where((code & 8) != 0, -value, value).to(COMPUTE)


@triton.jit
def _weight_tile(
    w,
    scale,
    rows,
    row_mask,
    k0,
    K,
    stride_n,
    stride_scale_n,
    FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Rows `rows` and columns `k0..k0+BLOCK_K` of one expert's matrix as `[BLOCK_K, BLOCK_N]`.

    NVFP4 tiles carry their block scales; FP8 tiles are bare codes.
    """
    if FORMAT == NVFP4:
        byte = tl.arange(0, BLOCK_K // 2)
        mask = row_mask[:, None] & (k0 + 2 * byte < K)[None, :]
        packed = tl.load(
            w + rows[:, None] * stride_n + (k0 // 2 + byte)[None, :], mask=mask, other=0
        )
        codes = tl.interleave(packed & 15, packed >> 4)  # the even column is the low nibble
        group = tl.arange(0, BLOCK_K // 16)
        scale_mask = row_mask[:, None] & (k0 + 16 * group < K)[None, :]
        scales = tl.load(
            scale + rows[:, None] * stride_scale_n + (k0 // 16 + group)[None, :],
            mask=scale_mask,
            other=0.0,
        ).to(COMPUTE)
        spread = tl.broadcast_to(scales[:, :, None], (BLOCK_N, BLOCK_K // 16, 16))
        values = _e2m1(codes, COMPUTE) * tl.reshape(spread, (BLOCK_N, BLOCK_K))
        return tl.trans(values)
    column = k0 + tl.arange(0, BLOCK_K)
    mask = (column < K)[:, None] & row_mask[None, :]
    tile = tl.load(w + rows[None, :] * stride_n + column[:, None], mask=mask, other=0.0)
    return tile.to(COMPUTE)


@triton.jit
def _tile_of_slots(slots, offsets, tile_expert, tile_first, BLOCK_M: tl.constexpr):
    """Expert, sorted positions, slots and mask of the tile that this program works on."""
    tile = tl.program_id(0)
    expert = tl.load(tile_expert + tile)
    position = tl.load(tile_first + tile) + tl.arange(0, BLOCK_M)
    end = tl.load(offsets + tl.maximum(expert, 0))
    mask = position < end
    slot = tl.load(slots + position, mask=mask, other=0)
    return expert, position, slot, mask


@triton.jit
def gate_up_kernel(
    x,
    w13,
    w13_scale,
    w13_global,
    topk_weights,
    hidden,
    slots,
    offsets,
    tile_expert,
    tile_first,
    limit,
    alpha,
    beta,
    H,
    I,
    stride_x,
    stride_e,
    stride_n,
    stride_scale_e,
    stride_scale_n,
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`hidden[position] = act(x @ gate.T, x @ up.T)` for the slots of one tile."""
    expert, position, slot, mask = _tile_of_slots(slots, offsets, tile_expert, tile_first, BLOCK_M)
    if expert < 0:
        return
    e = expert.to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = n < I
    gate_w = w13 + e * stride_e
    up_w = gate_w + I.to(tl.int64) * stride_n
    gate_s = w13_scale
    up_s = w13_scale
    if FORMAT == FP8_BLOCK:
        gate_s = w13_scale + e * stride_scale_e
        up_s = gate_s + tl.cdiv(I, SCALE_N) * stride_scale_n
    if FORMAT == NVFP4:
        gate_s = w13_scale + e * stride_scale_e
        up_s = gate_s + I.to(tl.int64) * stride_scale_n
    row = x + (slot // TOP_K).to(tl.int64)[:, None] * stride_x
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, H, BLOCK_K):
        column = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(row + column[None, :], mask=mask[:, None] & (column < H)[None, :], other=0.0)
        if WEIGHT_ON_INPUT:
            weight = tl.load(topk_weights + slot, mask=mask, other=0.0)
            a = (a.to(tl.float32) * weight[:, None]).to(a.dtype)
        a = a.to(COMPUTE)
        g = _weight_tile(
            gate_w, gate_s, n, row_mask, k0, H, stride_n, stride_scale_n,
            FORMAT, BLOCK_N, BLOCK_K, COMPUTE,
        )  # fmt: skip
        u = _weight_tile(
            up_w, up_s, n, row_mask, k0, H, stride_n, stride_scale_n,
            FORMAT, BLOCK_N, BLOCK_K, COMPUTE,
        )  # fmt: skip
        if FORMAT == FP8_BLOCK:
            block = (n // SCALE_N) * stride_scale_n + k0 // SCALE_K
            gs = tl.load(gate_s + block, mask=row_mask, other=0.0)
            us = tl.load(up_s + block, mask=row_mask, other=0.0)
            gate += tl.dot(a, g) * gs[None, :]
            up += tl.dot(a, u) * us[None, :]
        else:
            gate = tl.dot(a, g, gate)
            up = tl.dot(a, u, up)
    if FORMAT == NVFP4:
        gate *= tl.load(w13_global + 2 * e)
        up *= tl.load(w13_global + 2 * e + 1)
    out = _activate(gate, up, limit, alpha, beta, ACTIVATION)
    where = hidden + position.to(tl.int64)[:, None] * I + n[None, :]
    tl.store(where, out.to(hidden.dtype.element_ty), mask=mask[:, None] & row_mask[None, :])


@triton.jit
def down_kernel(
    hidden,
    w2,
    w2_scale,
    w2_global,
    topk_weights,
    partial,
    slots,
    offsets,
    tile_expert,
    tile_first,
    H,
    I,
    stride_e,
    stride_n,
    stride_scale_e,
    stride_scale_n,
    FORMAT: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    WEIGHT_ON_INPUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`partial[slot] = topk_weight * (hidden[position] @ down.T)` for the slots of one tile."""
    expert, position, slot, mask = _tile_of_slots(slots, offsets, tile_expert, tile_first, BLOCK_M)
    if expert < 0:
        return
    e = expert.to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = n < H
    down_w = w2 + e * stride_e
    down_s = w2_scale
    if FORMAT != BF16:
        down_s = w2_scale + e * stride_scale_e
    row = hidden + position.to(tl.int64)[:, None] * I
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, I, BLOCK_K):
        column = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(row + column[None, :], mask=mask[:, None] & (column < I)[None, :], other=0.0)
        w = _weight_tile(
            down_w, down_s, n, row_mask, k0, I, stride_n, stride_scale_n,
            FORMAT, BLOCK_N, BLOCK_K, COMPUTE,
        )  # fmt: skip
        if FORMAT == FP8_BLOCK:
            block = (n // SCALE_N) * stride_scale_n + k0 // SCALE_K
            s = tl.load(down_s + block, mask=row_mask, other=0.0)
            acc += tl.dot(a.to(COMPUTE), w) * s[None, :]
        else:
            acc = tl.dot(a.to(COMPUTE), w, acc)
    if FORMAT == NVFP4:
        acc *= tl.load(w2_global + e)
    if not WEIGHT_ON_INPUT:
        acc *= tl.load(topk_weights + slot, mask=mask, other=0.0)[:, None]
    where = partial + slot.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(where, acc, mask=mask[:, None] & row_mask[None, :])


@triton.jit
def sum_kernel(partial, ids, out, H, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """`out[token] = sum over k of partial[token, k]`, in order of k; dropped slots left out."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(TOP_K):
        local = tl.load(ids + token * TOP_K + k)
        where = partial + (token * TOP_K + k) * H + column
        # A dropped slot's row was never written.
        acc += tl.where(local >= 0, tl.load(where, mask=column < H, other=0.0), 0.0)
    tl.store(out + token * H + column, acc.to(out.dtype.element_ty), mask=column < H)
