"""Matrix instructions: ISA "Matrix Arithmetic Instructions" and "VOP3P Instructions".

EXEC is ignored, as hardware does. Products are exact and sums are rounded once, at the end; the
order in which hardware rounds is not published, so results differ in the last bits.
"""

from __future__ import annotations

import re

from gcnemu.asm import Operand, Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.table import BOTH, CDNA3, CDNA4, add

SOURCE = "Matrix Arithmetic Instructions"
# Operand formats of f8f6f4 by the cbsz (A) and blgp (B) modifiers.
F8F6F4 = ["FMT_FP8", "FMT_BF8", "FMT_FP6", "FMT_BF6", "FMT_FP4"]
NAME = re.compile(r"v_mfma_(?:scale_)?(f32|i32)_(\d+)x\d+x(\d+)_?(?:(\d+)b_)?(\w+)")


def _addend(shape: Shape, count: int) -> str:
    """C as rows of 64 lanes: registers, or a constant in every element."""
    c = shape.operands[3]
    if c.kind == "v":
        return f"const u32 *c = w->v[{shape.register(c.index)}]; "
    return (
        f"u32 c_[{count}][64]; const u32 k_ = {shape.bits(c, 'f32')}; "
        f"for (u32 n = 0; n < {count * 64}; n++) c_[0][n] = k_; const u32 *c = c_[0]; "
    )


def _check_size(operand: Operand, dwords: int) -> None:
    if operand.kind != "v" or operand.count != dwords:
        raise Unsupported(f"operand {operand.text}: {dwords} registers expected")


def _mfma(shape: Shape) -> str:
    match = NAME.fullmatch(shape.ins.opcode)
    assert match is not None
    m, k, blocks, type = int(match[2]), int(match[3]), int(match[4] or 1), match[5]
    registers = blocks * m * m // 64
    _check_size(shape.operands[0], registers)
    scaled = "_scale_" in shape.ins.opcode
    fnuz = "_FNUZ" if shape.arch in CDNA3 else ""
    layout = 0
    if type == "f8f6f4":
        a_format, b_format = F8F6F4[shape.number("cbsz")], F8F6F4[shape.number("blgp")]
        layout = ("8" in a_format) | ("8" in b_format) << 1
    elif type in ("i8",):
        a_format = b_format = ""
    else:
        words = {"fp8": f"FMT_FP8{fnuz}", "bf8": f"FMT_BF8{fnuz}"}
        pair = type.removesuffix("_1k").split("_")
        pair = pair * 2 if len(pair) == 1 else pair
        a_format, b_format = (words.get(p, f"FMT_{p.upper()}") for p in pair)
    d, a, b = (shape.vgpr(n) for n in range(3))
    c = _addend(shape, registers)
    if type == "i8":
        return f"{c}mfma_i8(w, {m}, {k}, {blocks}, {d}, {a}, {b}, c); return NEXT;"
    scales, tail = "", "0, 0, 0, 0"
    if scaled:
        # The byte of A's and of B's scale; LLVM prints a third entry, which is always 0.
        low, high = shape.vector("op_sel", 3, 0), shape.vector("op_sel_hi", 3, 0)
        if low[2] or high[2]:
            raise Unsupported("op_sel of the addend")
        scales = "u32 sa[64], sb[64]; for (int l = 0; l < 64; l++) { "
        for name, operand in zip(("sa", "sb"), shape.operands[4:6], strict=True):
            # In vector registers every lane has its own scales.
            scales += f"{name}[l] = {shape.bits(operand)}; "
        scales += "} "
        tail = f"sa, sb, {low[0] + 2 * high[0]}, {low[1] + 2 * high[1]}"
    return (
        f"{c}{scales}mfma(w, {m}, {k}, {blocks}, {a_format}, {b_format}, {d}, {a}, {b}, c, "
        f"{layout}, {tail}); return NEXT;"
    )


def _enter(names: str, archs: frozenset[str] = BOTH) -> None:
    add(names, "matrix", SOURCE, _mfma, archs)


_enter("v_mfma_f32_32x32x8_f16 v_mfma_f32_16x16x16_f16 v_mfma_f32_4x4x4_16b_f16")
_enter("v_mfma_f32_32x32x4_2b_f16 v_mfma_f32_16x16x4_4b_f16")
_enter("v_mfma_f32_32x32x8_bf16 v_mfma_f32_16x16x16_bf16 v_mfma_f32_4x4x4_16b_bf16")
_enter("v_mfma_f32_32x32x4_2b_bf16 v_mfma_f32_16x16x4_4b_bf16")
_enter("v_mfma_f32_32x32x2_f32 v_mfma_f32_16x16x4_f32")
_enter("v_mfma_f32_32x32x1_2b_f32 v_mfma_f32_16x16x1_4b_f32 v_mfma_f32_4x4x1_16b_f32")
_enter("v_mfma_i32_32x32x16_i8 v_mfma_i32_16x16x32_i8 v_mfma_i32_4x4x4_16b_i8")
_enter("v_mfma_i32_32x32x4_2b_i8 v_mfma_i32_16x16x4_4b_i8")
for _a in ("fp8", "bf8"):
    for _b in ("fp8", "bf8"):
        _enter(f"v_mfma_f32_32x32x16_{_a}_{_b} v_mfma_f32_16x16x32_{_a}_{_b}")
_enter("v_mfma_f32_32x32x16_f16 v_mfma_f32_16x16x32_f16", CDNA4)
_enter("v_mfma_f32_32x32x16_bf16 v_mfma_f32_16x16x32_bf16", CDNA4)
_enter("v_mfma_i32_32x32x32_i8 v_mfma_i32_16x16x64_i8", CDNA4)
_enter("v_mfma_f32_32x32x64_f8f6f4 v_mfma_f32_16x16x128_f8f6f4", CDNA4)
_enter("v_mfma_scale_f32_32x32x64_f8f6f4 v_mfma_scale_f32_16x16x128_f8f6f4", CDNA4)
