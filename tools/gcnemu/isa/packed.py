"""Packed instructions: two 16-bit or two 32-bit results. ISA "VOP3P Instructions".

op_sel and op_sel_hi pick, for the low and the high result, which half of each source is read.
"""

from __future__ import annotations

from gcnemu.asm import Operand, Unsupported
from gcnemu.emit import C_TYPES, Shape
from gcnemu.isa.table import CDNA4, Emitter, add

SOURCE = "VOP3P Instructions"


def _modifiers(shape: Shape, n: int) -> tuple[list[int], list[int], list[int], list[int]]:
    return (
        shape.vector("op_sel", n, 0), shape.vector("op_sel_hi", n, 1),
        shape.vector("neg_lo", n, 0), shape.vector("neg_hi", n, 0),
    )  # fmt: skip


def _packed_32(expression: str, float_type: bool = True) -> Emitter:
    def emit(shape: Shape) -> str:
        d, sources = shape.vgpr(0), shape.operands[1:]
        low, high, neg_low, neg_high = _modifiers(shape, len(sources))
        clamp = "d = clamp01(d); " if shape.flag("clamp") else ""
        code = "u32 out[2][64]; for (int l = 0; l < 64; l++) { "
        for half, (select, negate) in enumerate(((low, neg_low), (high, neg_high))):
            code += "{ "
            for k, operand in enumerate(sources):
                raw = _dword(shape, operand, select[k])
                raw = f"({raw} ^ 0x80000000u)" if negate[k] else raw
                code += f"const float {'abc'[k]} = F({raw}); "
            code += f"float d = {expression}; {clamp}out[{half}][l] = U(d); }} "
        return code + f"}} put(w, {d}, out[0], ex); put(w, {d} + 1, out[1], ex); return NEXT;"

    return emit


def _dword(shape: Shape, operand: Operand, which: int) -> str:
    if operand.count >= 2:
        pair = Operand(operand.text, operand.kind, operand.index + which)
        return shape.bits(pair)
    if which and operand.kind in ("const", "s"):
        # A constant or a lone SGPR has no high dword; compilers clear op_sel_hi for them.
        raise Unsupported(f"high half of {operand.text}")
    return shape.bits(operand, "b32")


add("v_pk_add_f32", "packed", SOURCE, _packed_32("a + b"))
add("v_pk_mul_f32", "packed", SOURCE, _packed_32("a * b"))
add("v_pk_fma_f32", "packed", SOURCE, _packed_32("fmaf(a, b, c)"))


def _pk_mov(shape: Shape) -> str:
    """The low result from source 0 by op_sel[0], the high one from source 1 by op_sel[1]."""
    d = shape.vgpr(0)
    select = shape.vector("op_sel", 2, 0)
    shape.vector("op_sel_hi", 2, 1)
    a = _dword(shape, shape.operands[1], select[0])
    b = _dword(shape, shape.operands[2], select[1])
    return (
        f"u32 lo[64], hi[64]; for (int l = 0; l < 64; l++) {{ lo[l] = {a}; hi[l] = {b}; }} "
        f"put(w, {d}, lo, ex); put(w, {d} + 1, hi, ex); return NEXT;"
    )


add("v_pk_mov_b32", "packed", SOURCE, _pk_mov)


SATURATING = ("v_pk_add_", "v_pk_sub_")  # integer clamp saturates


def _packed_16(name: str, type: str, expression: str) -> Emitter:
    def emit(shape: Shape) -> str:
        d, sources = shape.vgpr(0), shape.operands[1:]
        low, high, neg_low, neg_high = _modifiers(shape, len(sources))
        is_float = type in ("f16", "bf16")
        if not is_float and (any(neg_low) or any(neg_high)):
            raise Unsupported("negation of packed integers")
        clamp = saturate = ""
        if name.startswith(SATURATING) and shape.flag("clamp"):
            low_end, high_end = (-32768, 32767) if type == "i16" else (0, 65535)
            saturate = f"d = d < {low_end} ? {low_end} : d > {high_end} ? {high_end} : d; "
        if is_float and shape.flag("clamp"):
            clamp = "d = clamp01d(d); "
        code = "u32 out[64]; for (int l = 0; l < 64; l++) { u32 halves[2]; "
        for half, (select, negate) in enumerate(((low, neg_low), (high, neg_high))):
            code += "{ "
            for k, operand in enumerate(sources):
                operand = Operand(
                    operand.text, operand.kind, operand.index, 1, operand.value,
                    bool(negate[k]) != operand.negated,
                )  # fmt: skip
                raw = shape.bits(operand, type if operand.kind == "const" else "b32")
                code += f"const {C_TYPES[type]} {'abc'[k]} = {shape.value(operand, type, raw, select[k])}; "
            if is_float:
                encode = {"f16": "half_d(w, d)", "bf16": "f2b((float)d)"}[type]
                code += f"double d = {expression}; {clamp}halves[{half}] = {encode}; }} "
            else:
                code += f"i64 d = {expression}; {saturate}halves[{half}] = (u16)d; }} "
        return code + f"out[l] = halves[0] | halves[1] << 16; }} put(w, {d}, out, ex); return NEXT;"

    return emit


for name, expression in {
    "v_pk_add_f16": "(double)a + b",
    "v_pk_mul_f16": "(double)a * b",
    "v_pk_fma_f16": "fma((double)a, b, c)",
    "v_pk_max_f16": "max_f32(w, a, b)",
    "v_pk_min_f16": "min_f32(w, a, b)",
}.items():
    add(name, "packed", SOURCE, _packed_16(name, "f16", expression))
add(
    "v_pk_maximum3_f16", "packed", SOURCE,
    _packed_16("", "f16", "maximum(maximum(a, b), c)"), CDNA4,
)  # fmt: skip
add(
    "v_pk_minimum3_f16", "packed", SOURCE,
    _packed_16("", "f16", "minimum(minimum(a, b), c)"), CDNA4,
)  # fmt: skip
for name, type, expression in (
    ("v_pk_add_u16", "u16", "a + b"),
    ("v_pk_add_i16", "i16", "a + b"),
    ("v_pk_sub_u16", "u16", "a - b"),
    ("v_pk_sub_i16", "i16", "a - b"),
    ("v_pk_mul_lo_u16", "u16", "(u32)a * b"),
    ("v_pk_max_u16", "u16", "a > b ? a : b"),
    ("v_pk_min_u16", "u16", "a < b ? a : b"),
    ("v_pk_max_i16", "i16", "a > b ? a : b"),
    ("v_pk_min_i16", "i16", "a < b ? a : b"),
    ("v_pk_lshlrev_b16", "u16", "b << (a & 15)"),
    ("v_pk_lshrrev_b16", "u16", "b >> (a & 15)"),
    ("v_pk_ashrrev_i16", "i16", "b >> (a & 15)"),
    ("v_pk_mad_u16", "u16", "(u32)a * b + c"),
    ("v_pk_mad_i16", "i16", "(i32)a * b + c"),
):
    add(name, "packed", SOURCE, _packed_16(name, type, expression))


def _pack_f16(shape: Shape) -> str:
    """V_PACK_B32_F16: two halves side by side, bits untouched."""
    d = shape.vgpr(0)
    half = shape.vector("op_sel", 3, 0)
    a, b = (f"({shape.bits(o, 'f16' if o.kind == 'const' else 'b32')} >> {16 * half[k]} & 0xffff)"
            for k, o in enumerate(shape.operands[1:3]))  # fmt: skip
    if any(o.negated or o.absolute for o in shape.operands):
        raise Unsupported("sign modifier")
    return (
        f"u32 out[64]; for (int l = 0; l < 64; l++) out[l] = {a} | {b} << 16; "
        f"put(w, {d}, out, ex); return NEXT;"
    )


add("v_pack_b32_f16", "packed", "VOP3A & VOP3B Instructions", _pack_f16)


# --- dot products: exact products, one rounding at the end (hardware's order is not published) ---
def _dot2(type: str, accumulates: bool) -> Emitter:
    def emit(shape: Shape) -> str:
        d, (a, b) = shape.vgpr(0), shape.operands[1:3]
        third = shape.operands[0] if accumulates else shape.operands[3]
        c = shape.value(third, "f32")
        if not accumulates:
            low, high, neg_low, neg_high = _modifiers(shape, 3)
            if low != [0, 0, 0] or high[:2] != [1, 1] or any(neg_low) or any(neg_high):
                raise Unsupported("modifiers of a dot product")
        clamp = "d = clamp01(d); " if shape.flag("clamp") else ""
        a0, a1 = (shape.value(a, type, half=h) for h in (0, 1))
        b0, b1 = (shape.value(b, type, half=h) for h in (0, 1))
        return (
            f"u32 out[64]; for (int l = 0; l < 64; l++) {{ float d = (float)((double){a0} * {b0} "
            f"+ (double){a1} * {b1} + (double){c}); {clamp}out[l] = U(d); }} "
            f"put(w, {d}, out, ex); return NEXT;"
        )

    return emit


add("v_dot2_f32_f16", "packed", SOURCE, _dot2("f16", False))
add("v_dot2_f32_bf16", "packed", SOURCE, _dot2("bf16", False), CDNA4)
add("v_dot2c_f32_f16", "packed", "VOP2 Instructions", _dot2("f16", True))
add("v_dot2c_f32_bf16", "packed", "VOP2 Instructions", _dot2("bf16", True), CDNA4)


def _dot4(type: str, accumulates: bool) -> Emitter:
    def emit(shape: Shape) -> str:
        d = shape.vgpr(0)
        a, b = (shape.value(o, "u32") for o in shape.operands[1:3])
        c = shape.value(shape.operands[0] if accumulates else shape.operands[3], "u32")
        if not accumulates and (
            shape.vector("op_sel", 3, 0) != [0] * 3 or shape.vector("op_sel_hi", 3, 1)[:2] != [1, 1]
        ):
            raise Unsupported("op_sel")
        return (
            f"u32 out[64]; for (int l = 0; l < 64; l++) {{ const u32 a = {a}, b = {b}; u32 d = {c}; "
            f"for (int q = 0; q < 32; q += 8) d += (u32)(({type})(a >> q) * ({type})(b >> q)); "
            f"out[l] = d; }} put(w, {d}, out, ex); return NEXT;"
        )

    return emit


add("v_dot4_i32_i8", "packed", SOURCE, _dot4("i8", False))
add("v_dot4_u32_u8", "packed", SOURCE, _dot4("u8", False))
add("v_dot4c_i32_i8", "packed", "VOP2 Instructions", _dot4("i8", True))
