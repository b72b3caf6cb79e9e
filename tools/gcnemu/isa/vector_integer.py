"""Lane-wise integers and bits: ISA sections "VOP1", "VOP2", "VOP3A & VOP3B"."""

from __future__ import annotations

from gcnemu.emit import Shape
from gcnemu.isa.table import CDNA4, Emitter, add, emit_valu, valu

VOP1, VOP2, VOP3 = "VOP1 Instructions", "VOP2 Instructions", "VOP3A & VOP3B Instructions"


def _saturating(plain: str, saturated: str) -> Emitter:
    """Integer clamp: the result saturates instead of wrapping (ISA "Clamp")."""

    def emit(shape: Shape) -> str:
        return emit_valu(shape, "u32", ["u32", "u32"], saturated if shape.flag("clamp") else plain)

    return emit


add("v_add_u32", "vector", VOP2, _saturating("a + b", "a + b < a ? 0xffffffffu : a + b"))
add("v_sub_u32", "vector", VOP2, _saturating("a - b", "a < b ? 0 : a - b"))
add("v_subrev_u32", "vector", VOP2, _saturating("b - a", "b < a ? 0 : b - a"))

for name, expression in {
    "v_and_b32": "a & b",
    "v_or_b32": "a | b",
    "v_xor_b32": "a ^ b",
    "v_xnor_b32": "~(a ^ b)",
    "v_lshlrev_b32": "b << (a & 31)",
    "v_lshrrev_b32": "b >> (a & 31)",
    "v_ashrrev_i32": "(u32)((i32)b >> (a & 31))",
    "v_min_u32": "a < b ? a : b",
    "v_max_u32": "a > b ? a : b",
    "v_min_i32": "(i32)a < (i32)b ? a : b",
    "v_max_i32": "(i32)a > (i32)b ? a : b",
    "v_mul_u32_u24": "(a & 0xffffff) * (b & 0xffffff)",
    "v_mul_hi_u32_u24": "(u32)((u64)(a & 0xffffff) * (b & 0xffffff) >> 32)",
    "v_mul_i32_i24": "(u32)(((i32)(a << 8) >> 8) * ((i32)(b << 8) >> 8))",
    "v_mul_hi_i32_i24": "(u32)((i64)((i32)(a << 8) >> 8) * ((i32)(b << 8) >> 8) >> 32)",
}.items():
    valu(name, "u32 u32 u32", expression, VOP2)
for name, expression in {
    "v_add_i32": "a + b",
    "v_sub_i32": "a - b",
    "v_mul_lo_u32": "a * b",
    "v_mul_hi_u32": "(u32)((u64)a * b >> 32)",
    "v_mul_hi_i32": "(u32)((i64)(i32)a * (i32)b >> 32)",
    "v_bfm_b32": "((1u << (a & 31)) - 1) << (b & 31)",
    "v_bcnt_u32_b32": "(u32)__builtin_popcount(a) + b",
    "v_cvt_pk_u16_u32": "(a > 65535 ? 65535 : a) | (b > 65535 ? 65535 : b) << 16",
    "v_cvt_pk_i16_i32": "(u16)((i32)a > 32767 ? 32767 : (i32)a < -32768 ? -32768 : (i32)a)"
    " | (u32)(u16)((i32)b > 32767 ? 32767 : (i32)b < -32768 ? -32768 : (i32)b) << 16",
}.items():
    valu(name, "u32 u32 u32", expression, VOP3)
for name, expression in {
    "v_mov_b32": "a",
    "v_not_b32": "~a",
    "v_bfrev_b32": "reverse32(a)",
    "v_ffbh_u32": "a ? (u32)__builtin_clz(a) : ~0u",
    "v_ffbl_b32": "a ? (u32)__builtin_ctz(a) : ~0u",
    "v_ffbh_i32": "(a == 0 || a == ~0u) ? ~0u : (u32)__builtin_clz((i32)a < 0 ? ~a : a)",
}.items():
    valu(name, "b32 b32", expression, VOP1)
for name, expression in {
    "v_add3_u32": "a + b + c",
    "v_lshl_add_u32": "(a << (b & 31)) + c",
    "v_add_lshl_u32": "(a + b) << (c & 31)",
    "v_lshl_or_b32": "(a << (b & 31)) | c",
    "v_and_or_b32": "(a & b) | c",
    "v_or3_b32": "a | b | c",
    "v_xad_u32": "(a ^ b) + c",
    "v_bfe_u32": "bfe_u(a, b, c)",
    "v_bfe_i32": "bfe_i(a, b, c)",
    "v_bfi_b32": "(a & b) | (~a & c)",
    "v_alignbit_b32": "(u32)(((u64)a << 32 | b) >> (c & 31))",
    "v_alignbyte_b32": "(u32)(((u64)a << 32 | b) >> 8 * (c & 3))",
    "v_perm_b32": "perm(a, b, c)",
    "v_mad_u32_u24": "(a & 0xffffff) * (b & 0xffffff) + c",
    "v_mad_i32_i24": "(u32)(((i32)(a << 8) >> 8) * ((i32)(b << 8) >> 8)) + c",
    "v_min3_u32": "({ u32 t = a < b ? a : b; t < c ? t : c; })",
    "v_max3_u32": "({ u32 t = a > b ? a : b; t > c ? t : c; })",
    "v_med3_u32": "({ u32 lo = a < b ? a : b, hi = a < b ? b : a; c < lo ? lo : c > hi ? hi : c; })",
    "v_sad_u32": "(a > b ? a - b : b - a) + c",
}.items():
    valu(name, "u32 u32 u32 u32", expression, VOP3)
for name, expression in {
    "v_min3_i32": "({ i32 t = a < b ? a : b; t < c ? t : c; })",
    "v_max3_i32": "({ i32 t = a > b ? a : b; t > c ? t : c; })",
    "v_med3_i32": "({ i32 lo = a < b ? a : b, hi = a < b ? b : a; c < lo ? lo : c > hi ? hi : c; })",
}.items():
    valu(name, "i32 i32 i32 i32", expression, VOP3)


def _bitop3(shape: Shape) -> str:
    table = shape.constant(shape.number("bitop3"))
    return emit_valu(shape, "u32", ["u32", "u32", "u32"], f"bitop3(a, b, c, (u32){table})")


add("v_bitop3_b32", "vector", VOP3, _bitop3, CDNA4)


def _bitop3_16(shape: Shape) -> str:
    table = shape.constant(shape.number("bitop3"))
    return emit_valu(
        shape, "b16", ["b16", "b16", "b16"], f"(u16)bitop3(a, b, c, (u32){table})", keep_high=True
    )


add("v_bitop3_b16", "vector", VOP3, _bitop3_16, CDNA4)

# --- 16 bits ---
for name, expression in {
    "v_add_u16": "a + b",
    "v_sub_u16": "a - b",
    "v_subrev_u16": "b - a",
    "v_mul_lo_u16": "(u32)a * b",
    "v_lshlrev_b16": "b << (a & 15)",
    "v_lshrrev_b16": "b >> (a & 15)",
    "v_max_u16": "a > b ? a : b",
    "v_min_u16": "a < b ? a : b",
}.items():
    valu(name, "u16 u16 u16", expression, VOP2)
valu("v_ashrrev_i16", "i16 u16 i16", "b >> (a & 15)", VOP2)
valu("v_max_i16", "i16 i16 i16", "a > b ? a : b", VOP2)
valu("v_min_i16", "i16 i16 i16", "a < b ? a : b", VOP2)
valu("v_mad_u16", "u16 u16 u16 u16", "(u32)a * b + c", VOP3, keep_high=True)
valu("v_mad_i16", "i16 i16 i16 i16", "(i32)a * b + c", VOP3, keep_high=True)

# --- 64 bits ---
valu("v_mov_b64", "b64 b64", "a", VOP1)
valu("v_lshl_add_u64", "u64 u64 u32 u64", "(a << (b & 7)) + c", VOP3)
valu("v_lshlrev_b64", "u64 u32 u64", "b << (a & 63)", VOP3)
valu("v_lshrrev_b64", "u64 u32 u64", "b >> (a & 63)", VOP3)
valu("v_ashrrev_i64", "u64 u32 u64", "(u64)((i64)b >> (a & 63))", VOP3)


# --- carries: one bit per lane in a scalar pair; bits of inactive lanes are 0 ---
def _carry(expression: str, carry_in: bool) -> Emitter:
    def emit(shape: Shape) -> str:
        d, out = shape.vgpr(0), shape.sgpr(1)
        a, b = (shape.value(o, "u32") for o in shape.operands[2:4])
        carry = f"s64(w, {shape.sgpr(4)})" if carry_in else "0"
        return (
            f"u32 out[64]; u64 carry = 0; const u64 in = {carry}; for (int l = 0; l < 64; l++) {{ "
            f"const u64 a = {a}, b = {b}, ci = in >> l & 1; (void)ci; u64 d = {expression}; "
            f"out[l] = (u32)d; if ((ex >> l & 1) && d >> 32) carry |= 1ull << l; }} "
            f"put(w, {d}, out, ex); set64(w, {out}, carry); return NEXT;"
        )

    return emit


for name, expression in {
    "v_add_co_u32": "a + b",
    "v_sub_co_u32": "a - b",
    "v_subrev_co_u32": "b - a",
}.items():
    add(name, "vector", VOP2, _carry(expression, carry_in=False))
for name, expression in {
    "v_addc_co_u32": "a + b + ci",
    "v_subb_co_u32": "a - b - ci",
    "v_subbrev_co_u32": "b - a - ci",
}.items():
    add(name, "vector", VOP2, _carry(expression, carry_in=True))


def _mad_64(signed: bool) -> Emitter:
    """D = S0 * S1 + S2 in 64 bits and the carry out of 64 bits (for the signed form, of 65)."""

    def emit(shape: Shape) -> str:
        d, out = shape.vgpr(0), shape.sgpr(1)
        t32, wide = ("i32", "__int128") if signed else ("u32", "unsigned __int128")
        a, b = (shape.value(o, t32) for o in shape.operands[2:4])
        c = shape.value(shape.operands[4], "i64" if signed else "u64")
        return (
            f"u32 lo[64], hi[64]; u64 carry = 0; for (int l = 0; l < 64; l++) {{ "
            f"{wide} d = ({wide})({t32}){a} * ({t32}){b} + {c}; lo[l] = (u32)d; hi[l] = (u32)(d >> 32); "
            f"if ((ex >> l & 1) && (d >> 64 & 1)) carry |= 1ull << l; }} "
            f"put(w, {d}, lo, ex); put(w, {d} + 1, hi, ex); set64(w, {out}, carry); return NEXT;"
        )

    return emit


add("v_mad_u64_u32", "vector", VOP3, _mad_64(signed=False))
add("v_mad_i64_i32", "vector", VOP3, _mad_64(signed=True))


def _cndmask(shape: Shape) -> str:
    mask = f"s64(w, {shape.sgpr(3)})" if len(shape.operands) > 3 else "VCC"
    mask_operand = shape.operands[3:]
    shape.operands = shape.operands[:3]
    code = emit_valu(shape, "b32", ["b32", "b32"], "(mask >> l & 1) ? b : a")
    shape.operands += mask_operand
    return f"const u64 mask = {mask}; {code}"


add("v_cndmask_b32", "vector", VOP2, _cndmask)
