"""Matrix instructions, from the ISA's "Matrix Arithmetic Instructions": operand layouts and products.

The layout is written here as index arrays and the product as a numpy matmul in float64. Integer data
is compared bit for bit, random data to a few units of the last place of a float32 sum.
"""

from __future__ import annotations

import re

import numpy as np
from gcnemu_machine import Case, State
from gcnemu_numbers import FORMATS, decode_array
from gcnemu_vector import CDNA4, F32, F64, U32, decode_scale

CASES: list[Case] = []
D, A, B, C = 32, 64, 96, 128  # registers; scales in v160, v161
SHAPES = re.compile(r"v_mfma_(?:scale_)?(?:f32|i32)_(\d+)x\d+x(\d+)_?(?:(\d+)b_)?(\w+)")


def bits_of(format: str) -> int:
    return 8 if format == "i8" else FORMATS[format].bits


def unpack(state: State, register: int, format: str, count: int) -> np.ndarray:
    """[lane, value]: the first `count` values of consecutive registers, low bits first."""
    width = bits_of(format)
    words = state.v[register : register + (count * width + 31) // 32].T.astype(np.uint64)
    out = np.zeros((64, count))
    for n in range(count):
        bit = n * width
        word, at = bit // 32, bit % 32
        value = words[:, word] >> np.uint64(at)
        if at + width > 32:
            value |= words[:, word + 1] << np.uint64(32 - at)
        code = value & np.uint64((1 << width) - 1)
        if format == "i8":
            out[:, n] = code.astype(np.uint8).view(np.int8)
        elif format == "f32":
            out[:, n] = code.astype(U32).view(F32)
        elif format in ("f16", "bf16"):
            out[:, n] = (
                code.astype(np.uint16).view(np.float16)
                if format == "f16"
                else (code.astype(U32) << 16).view(F32)
            )
        else:
            out[:, n] = decode_array(code, format)
    return out


def operand(
    state: State, register: int, format: str, m: int, k: int, blocks: int, interleaved: bool
):
    """[block, row, k]: lanes run through rows, then blocks, then groups of k."""
    groups = 64 // (m * blocks)
    share = k // groups
    values = unpack(state, register, format, share).reshape(groups, blocks, m, share)
    if interleaved:  # two runs of sixteen: one in each half of k
        halves = values.reshape(groups, blocks, m, 2, 16).transpose(1, 2, 3, 0, 4)
        return halves.reshape(blocks, m, k)
    return values.transpose(1, 2, 0, 3).reshape(blocks, m, k)


def result_index(m: int, blocks: int) -> tuple[np.ndarray, ...]:
    """Register and lane of every element [block, row, column] of C and D."""
    block, row, column = np.indices((blocks, m, m))
    if m == 4:
        return row, 4 * block + column
    if m == 16:
        return 4 * block + row % 4, row // 4 * 16 + column
    return 16 * block + row // 8 * 4 + row % 4, row // 4 % 2 * 32 + column


def matrix_case(name: str, format_a: str, format_b: str, archs: tuple[str, ...], text_tail: str = "", constant: bool = False, byte: tuple[int, int] = (0, 0)) -> None:  # fmt: skip
    match = SHAPES.fullmatch(name)
    assert match
    m, k, blocks = int(match[1]), int(match[2]), int(match[3] or 1)
    integer, scaled = "_i32_" in name, "_scale_" in name
    registers = blocks * m * m // 64
    groups = 64 // (m * blocks)

    def size(format: str) -> int:
        return max(1, k // groups * bits_of(format) // 32)

    def prepare(state: State) -> None:
        rng = state.rng
        for register, format in ((A, format_a), (B, format_b)):
            count = size(format) * 32
            if format == "f32":
                values = rng.integers(-8, 9, (size(format), 64)).astype(F32)
                state.v[register : register + size(format)] = values.view(U32)
            elif format in ("f16", "bf16"):
                values = (rng.integers(-8, 9, (2 * size(format), 64)) / 4).astype(F32)
                codes = (
                    values.astype(np.float16).view(np.uint16).astype(U32)
                    if format == "f16"
                    else values.view(U32) >> 16
                )
                state.v[register : register + size(format)] = codes[::2] | codes[1::2] << 16
            elif format != "i8":  # no NaN and no infinity
                width = bits_of(format)
                codes = rng.integers(0, 1 << width, (count // width + 1, 64))
                if width == 8:
                    codes = (
                        codes & 0xBB
                        if "bf8" in format
                        else codes & 0xF7 & ~np.where(codes & 0x7F == 0, 0x80, 0)
                    )
                    codes = np.where(codes == 0x80, 0, codes)
                total = np.zeros((64,), object)
                for n in range(count // width):
                    total = total + (codes[n].astype(object) << n * width)
                for n in range(size(format)):
                    state.v[register + n] = [int(t) >> 32 * n & 0xFFFFFFFF for t in total]
        if integer:
            state.v[C : C + registers] = rng.integers(0, 1 << 32, (registers, 64), dtype=U32)
        else:
            state.v[C : C + registers] = (
                rng.integers(-50, 50, (registers, 64)).astype(F32).view(U32)
            )
        for r in (160, 161):
            e = rng.integers(117, 138, (4, 64)).astype(U32)
            state.v[r] = e[0] | e[1] << 8 | e[2] << 16 | e[3] << 24

    def expect(state: State) -> None:
        a = operand(
            state,
            A,
            format_a,
            m,
            k,
            blocks,
            interleaved="f8f6f4" in name and bits_of(format_a) == 8,
        )
        b = operand(
            state,
            B,
            format_b,
            m,
            k,
            blocks,
            interleaved="f8f6f4" in name and bits_of(format_b) == 8,
        )
        if scaled:
            # Lane l scales row (or column) l mod m in k-block l div m.
            for x, r, n in ((a, 160, byte[0]), (b, 161, byte[1])):
                scale = decode_scale(state.v[r] >> 8 * n & 255).reshape(k // 32, m).T
                x *= np.repeat(scale, 32, axis=1)[None]
        product = a @ b.transpose(0, 2, 1)
        where = result_index(m, blocks)
        if integer:
            c = state.v[C + where[0], where[1]].view(np.int32).astype(np.int64)
            state.v[D + where[0], where[1]] = (product.astype(np.int64) + c & 0xFFFFFFFF).astype(
                U32
            )
            return
        c = 1.0 if constant else state.v[C + where[0], where[1]].view(F32).astype(F64)
        state.v[D + where[0], where[1]] = (product + c).astype(F32).view(U32)

    def reg(first: int, n: int) -> str:
        return f"v{first}" if n == 1 else f"v[{first}:{first + n - 1}]"

    addend = "1.0" if constant else reg(C, registers)
    text = f"{name} {reg(D, registers)}, {reg(A, size(format_a))}, {reg(B, size(format_b))}, {addend}{text_tail}"
    CASES.append(
        Case(
            name, text, expect, prepare, "f32", ulp=2 if scaled or "f8" in name else 0, archs=archs
        )
    )


for _type in ("f16", "bf16"):
    for _shape in ("32x32x8", "16x16x16", "4x4x4_16b", "32x32x4_2b", "16x16x4_4b"):
        matrix_case(f"v_mfma_f32_{_shape}_{_type}", _type, _type, ("gfx942", "gfx950"))
    for _shape in ("32x32x16", "16x16x32"):
        matrix_case(f"v_mfma_f32_{_shape}_{_type}", _type, _type, CDNA4)
matrix_case("v_mfma_f32_16x16x16_bf16", "bf16", "bf16", ("gfx942", "gfx950"), constant=True)
for _shape in ("32x32x2", "16x16x4", "32x32x1_2b", "16x16x1_4b", "4x4x1_16b"):
    matrix_case(f"v_mfma_f32_{_shape}_f32", "f32", "f32", ("gfx942", "gfx950"))
for _shape in ("32x32x16_i8", "16x16x32_i8", "4x4x4_16b_i8", "32x32x4_2b_i8", "16x16x4_4b_i8"):
    matrix_case(f"v_mfma_i32_{_shape}", "i8", "i8", ("gfx942", "gfx950"))
matrix_case("v_mfma_i32_32x32x32_i8", "i8", "i8", CDNA4)
matrix_case("v_mfma_i32_16x16x64_i8", "i8", "i8", CDNA4)
for _a in ("fp8", "bf8"):
    for _b in ("fp8", "bf8"):
        for _shape in ("32x32x16", "16x16x32"):
            _name = f"v_mfma_f32_{_shape}_{_a}_{_b}"
            matrix_case(_name, f"{_a}_fnuz", f"{_b}_fnuz", ("gfx942",))
            matrix_case(_name, _a, _b, CDNA4)
F8F6F4 = ("fp8", "bf8", "fp6", "bf6", "fp4")
for _i, _a in enumerate(F8F6F4):
    for _j, _b in enumerate(F8F6F4):
        for _shape in ("32x32x64", "16x16x128"):
            _tail = f" cbsz:{_i}" * (_i > 0) + f" blgp:{_j}" * (_j > 0)
            matrix_case(f"v_mfma_f32_{_shape}_f8f6f4", _a, _b, CDNA4, _tail)
            _name = f"v_mfma_scale_f32_{_shape}_f8f6f4"
            matrix_case(_name, _a, _b, CDNA4, f", v160, v161 op_sel_hi:[0,0]{_tail}")
            matrix_case(
                _name,
                _a,
                _b,
                CDNA4,
                f", v160, v161 op_sel:[1,0,0] op_sel_hi:[0,1,0]{_tail}",
                byte=(1, 2),
            )
