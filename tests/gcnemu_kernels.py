"""Triton kernels for the emulator's tests: right ones, and ones with a known bug."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@triton.jit
def softmax(x, out, columns, BLOCK: tl.constexpr):
    """Rows of a matrix: exp, reductions across lanes and waves, division."""
    i = tl.arange(0, BLOCK)
    row = tl.program_id(0) * columns
    values = tl.load(x + row + i, mask=i < columns, other=float("-inf"))
    e = tl.exp(values - tl.max(values, 0))
    tl.store(out + row + i, e / tl.sum(e, 0), mask=i < columns)


@triton.jit
def matmul(
    a, b, c, M, N, K, stride_a, stride_b, stride_c,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """c[m, n] = sum of a[m, k] b[n, k] in float32."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * stride_a + (k + rk)[None, :], mask=rm[:, None] < M, other=0.0)
        y = tl.load(b + (k + rk)[:, None] + rn[None, :] * stride_b, mask=rn[None, :] < N, other=0.0)
        acc = tl.dot(x, y, acc)
    where = c + rm[:, None] * stride_c + rn[None, :]
    tl.store(where, acc, mask=(rm[:, None] < M) & (rn[None, :] < N))


@triton.jit
def matmul_nn(
    a, b, c, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """c[m, n] = sum of a[m, k] b[k, n]: b is transposed on its way to the matrix instruction."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        x = tl.load(a + rm[:, None] * stride_a + (k + rk)[None, :])
        y = tl.load(b + (k + rk)[:, None] * stride_b + rn[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(c + rm[:, None] * stride_c + rn[None, :], acc)


@triton.jit
def scaled_matmul(
    a, a_scale, b, b_scale, c,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, A_PACK: tl.constexpr, B_PACK: tl.constexpr,
):  # fmt: skip
    """One tile of dot_scaled: a [M, K / A_PACK], b [K / B_PACK, N], E8M0 scales per 32 values."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    ka, kb, ks = tl.arange(0, K // A_PACK), tl.arange(0, K // B_PACK), tl.arange(0, K // 32)
    x = tl.load(a + m[:, None] * (K // A_PACK) + ka[None, :])
    y = tl.load(b + kb[:, None] * N + n[None, :])
    sx = tl.load(a_scale + m[:, None] * (K // 32) + ks[None, :])
    sy = tl.load(b_scale + n[:, None] * (K // 32) + ks[None, :])
    d = tl.dot_scaled(x, sx, A_FORMAT, y, sy, B_FORMAT)
    tl.store(c + m[:, None] * N + n[None, :], d)


@triton.jit
def count(x, out, n, BLOCK: tl.constexpr):
    """Atomic adds from every workgroup."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + tl.load(x + i, mask=i < n, other=0), 1, mask=i < n)


@triton.jit
def gather(x, index, out, BLOCK: tl.constexpr):
    """Offsets of 64 bits, one per lane."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + tl.load(index + i)))


@triton.jit
def scans(x, sums, ordered, places, BLOCK: tl.constexpr):
    """Running sums, a sort, and where the extremes are: exchanges between lanes and waves."""
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(sums + i, tl.cumsum(v, 0))
    tl.store(ordered + i, tl.sort(v))
    tl.store(places, tl.argmax(v, 0))
    tl.store(places + 1, tl.argmin(v, 0))


@triton.jit
def integers(x, y, out, BLOCK: tl.constexpr):
    """Quotient, remainder, product, shifts, larger one."""
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a // b)
    tl.store(out + BLOCK + i, a % b)
    tl.store(out + 2 * BLOCK + i, a * b)
    tl.store(out + 3 * BLOCK + i, (a >> 3) ^ (b << 2))
    tl.store(out + 4 * BLOCK + i, tl.where(a > b, a, b))


@triton.jit
def convert(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def divide(x, y, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) / tl.load(y + i))


# --- kernels with a known bug ---
@triton.jit
def expert_row(weights, experts, out, stride_e, K, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The first BLOCK weights of this program's expert. WIDE says how the offset is computed."""
    expert = tl.load(experts + tl.program_id(0))
    if WIDE == 0:  # bug: bytes past 4 GiB are lost in a 32-bit offset
        offset = (expert.to(tl.int64) * stride_e).to(tl.uint32).to(tl.int64)
    elif WIDE == 1:  # bug: the product is taken in 32 bits, and widened too late
        offset = (expert * stride_e.to(tl.int32)).to(tl.int64)
    else:
        offset = expert.to(tl.int64) * stride_e
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * BLOCK + i, tl.load(weights + offset + i, mask=i < K, other=0))


@triton.jit
def add_without_mask(x, y, out, BLOCK: tl.constexpr):
    """Bug: the last program reads and writes past the end of its tensors."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def read_past_the_end(x, out, n, BLOCK: tl.constexpr):
    """Bug: reads one element further than x goes; writes are in place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i + 1, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def uninitialised(x, out, n, BLOCK: tl.constexpr):
    """Bug: masked-off loads have no value, and the value is used."""
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n))
