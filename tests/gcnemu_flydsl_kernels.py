"""FlyDSL kernels for the emulator's tests: vector add, and a GEMM on matrix instructions."""

from __future__ import annotations

import flydsl.compiler as flyc
import flydsl.expr as fx
from flydsl.expr import range_constexpr
from flydsl.expr.typing import T


def _at(base, offset, type, alignment):
    pointer = fx.PointerType.get(type, address_space=fx.AddressSpace.Global, alignment=alignment)
    return fx.inttoptr(pointer, base + offset)


def vector_add(n: int):
    """out = x + y for n floats, raw addresses."""

    @flyc.kernel
    def add(out: fx.Int64, x: fx.Int64, y: fx.Int64, count: fx.Int32):
        i = fx.Int32(fx.block_idx.x) * fx.Int32(256) + fx.Int32(fx.thread_idx.x)
        if i < count:
            offset = fx.Int64(i) * fx.Int64(4)
            a = fx.Float32(fx.ptr_load(_at(x, offset, T.f32, 4), T.f32))
            b = fx.Float32(fx.ptr_load(_at(y, offset, T.f32, 4), T.f32))
            fx.ptr_store(a + b, _at(out, offset, T.f32, 4))

    @flyc.jit
    def launch(
        out: fx.Int64, x: fx.Int64, y: fx.Int64, count: fx.Int32,
        stream: fx.Stream = fx.Stream(None),  # noqa: B008
    ):  # fmt: skip
        add(out, x, y, count).launch(
            grid=((n + 255) // 256, 1, 1), block=(256, 1, 1), stream=stream
        )

    return launch


def gemm_fp8(m: int, n: int, k: int):
    """out [m, n] float32 = a [m, k] @ b [n, k].T in FP8; one wave per 16x16 tile, no LDS."""

    @flyc.kernel
    def gemm(out: fx.Int64, a: fx.Int64, b: fx.Int64):
        lane = fx.Int32(fx.thread_idx.x)
        row, group = lane % fx.Int32(16), lane // fx.Int32(16)
        m0, n0 = fx.Int32(fx.block_idx.x) * fx.Int32(16), fx.Int32(fx.block_idx.y) * fx.Int32(16)
        start = fx.Int64(group * fx.Int32(8))
        a_row = fx.Int64(m0 + row) * fx.Int64(k) + start
        b_row = fx.Int64(n0 + row) * fx.Int64(k) + start
        acc = fx.arith.constant_vector(0.0, T.f32x4)
        for step in range_constexpr(k // 32):
            x = fx.Int64(fx.ptr_load(_at(a, a_row + fx.Int64(32 * step), T.i64, 8), T.i64))
            y = fx.Int64(fx.ptr_load(_at(b, b_row + fx.Int64(32 * step), T.i64, 8), T.i64))
            acc = fx.rocdl.mfma_f32_16x16x32_fp8_fp8(
                T.f32x4, [x.ir_value(), y.ir_value(), acc, 0, 0, 0]
            )
        d = fx.Vector(acc)
        for r in range_constexpr(4):
            i = fx.Int64(m0 + group * fx.Int32(4) + fx.Int32(r)) * fx.Int64(n) + fx.Int64(n0 + row)
            fx.ptr_store(fx.Float32(d[r]), _at(out, i * fx.Int64(4), T.f32, 4))

    @flyc.jit
    def launch(
        out: fx.Int64,
        a: fx.Int64,
        b: fx.Int64,
        stream: fx.Stream = fx.Stream(None),  # noqa: B008
    ):
        gemm(out, a, b).launch(grid=(m // 16, n // 16, 1), block=(64, 1, 1), stream=stream)

    return launch
