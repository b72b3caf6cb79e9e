"""Scalar arithmetic: ISA "SOP1", "SOP2", "SOPK", "SOPC Instructions"."""

from __future__ import annotations

from gcnemu.asm import Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.table import Emitter, add

SOP1, SOP2, SOPK, SOPC = (f"{n} Instructions" for n in ("SOP1", "SOP2", "SOPK", "SOPC"))
NONZERO = "w->scc = d != 0; "


def _scalar(
    expression: str, signature: str, scc: str = "", reads_destination: bool = False
) -> Emitter:
    """`d` from a, b; signature: types of the result and of the sources; scc: C that sets it."""
    result, *sources = signature.split()
    c_type = {"32": "u32", "64": "u64"}

    def emit(shape: Shape) -> str:
        destination = shape.sgpr(0)
        operands = shape.operands[1:]
        if reads_destination:
            operands = [shape.operands[0], *operands]
        if len(operands) != len(sources):
            raise Unsupported(f"{len(operands)} sources")
        body = ""
        for k, (operand, type) in enumerate(zip(operands, sources, strict=True)):
            raw = shape.bits(operand, "b64" if type == "64" else "b32")
            body += f"const {c_type[type]} {'ab'[k]} = {raw}; "
        body += f"const {c_type[result]} d = {expression}; "
        store = f"set64(w, {destination}, d); " if result == "64" else f"w->s[{destination}] = d; "
        return f"{body}{scc}{store}return NEXT;"

    return emit


def _enter(name: str, source: str, signature: str, expression: str, scc: str = "") -> None:
    add(name, "scalar", source, _scalar(expression, signature, scc))


# --- two sources ---
_enter("s_add_u32", SOP2, "32 32 32", "a + b", "w->scc = d < a; ")
_enter("s_sub_u32", SOP2, "32 32 32", "a - b", "w->scc = a < b; ")
_OVERFLOW = "i32 t; w->scc = __builtin_{0}_overflow((i32)a, (i32)b, &t); "
_enter("s_add_i32", SOP2, "32 32 32", "a + b", _OVERFLOW.format("add"))
_enter("s_sub_i32", SOP2, "32 32 32", "a - b", _OVERFLOW.format("sub"))
_enter(
    "s_addc_u32", SOP2, "32 32 32", "a + b + w->scc", "w->scc = ((u64)a + b + w->scc) >> 32 & 1; "
)
_enter(
    "s_subb_u32", SOP2, "32 32 32", "a - b - w->scc", "w->scc = ((u64)a - b - w->scc) >> 32 & 1; "
)
for bits, t in (("32", "u32"), ("64", "u64")):
    for name, expression in {
        "and": "a & b", "or": "a | b", "xor": "a ^ b", "andn2": "a & ~b", "orn2": "a | ~b",
        "nand": "~(a & b)", "nor": "~(a | b)", "xnor": "~(a ^ b)",
    }.items():  # fmt: skip
        _enter(f"s_{name}_b{bits}", SOP2, f"{bits} {bits} {bits}", expression, NONZERO)
    last = int(bits) - 1
    _enter(f"s_lshl_b{bits}", SOP2, f"{bits} {bits} 32", f"a << (b & {last})", NONZERO)
    _enter(f"s_lshr_b{bits}", SOP2, f"{bits} {bits} 32", f"a >> (b & {last})", NONZERO)
    _enter(
        f"s_ashr_i{bits}", SOP2, f"{bits} {bits} 32", f"({t})((i{bits})a >> (b & {last}))", NONZERO
    )
    one = "1u" if bits == "32" else "1ull"
    _enter(
        f"s_bfm_b{bits}", SOP2, f"{bits} 32 32", f"(({one} << (a & {last})) - 1) << (b & {last})"
    )
# Field: offset in b[4:0] or b[5:0], width in b[22:16].
_FIELD = (
    "({{ u32 at = b & {last}, n = b >> 16 & 127; u{bits} t = n == 0 ? 0 : a >> at; "
    "if (n && n < {bits}) t = {cut}; t; }})"
)
for bits in ("32", "64"):
    one = "1u" if bits == "32" else "1ull"
    unsigned = f"t & (({one} << n) - 1)"
    signed = f"(u{bits})((i{bits})(t << ({bits} - n)) >> ({bits} - n))"
    for kind, cut in (("u", unsigned), ("i", signed)):
        expression = _FIELD.format(last=int(bits) - 1, bits=bits, cut=cut)
        if kind == "i":
            expression = expression.replace("a >> at", f"(u{bits})((i{bits})a >> at)")
        _enter(f"s_bfe_{kind}{bits}", SOP2, f"{bits} {bits} 32", expression, NONZERO)
for name, expression in {
    "s_mul_i32": "a * b",
    "s_mul_hi_u32": "(u32)((u64)a * b >> 32)",
    "s_mul_hi_i32": "(u32)((i64)(i32)a * (i32)b >> 32)",
    "s_pack_ll_b32_b16": "(a & 0xffff) | b << 16",
    "s_pack_lh_b32_b16": "(a & 0xffff) | (b & 0xffff0000)",
    "s_pack_hh_b32_b16": "a >> 16 | (b & 0xffff0000)",
}.items():
    _enter(name, SOP2, "32 32 32", expression)
for name, test in {
    "s_min_u32": "a < b",
    "s_max_u32": "a > b",
    "s_min_i32": "(i32)a < (i32)b",
    "s_max_i32": "(i32)a > (i32)b",
}.items():
    _enter(name, SOP2, "32 32 32", f"{test} ? a : b", f"w->scc = {test}; ")
for n in (1, 2, 3, 4):
    _enter(
        f"s_lshl{n}_add_u32", SOP2, "32 32 32", f"(a << {n}) + b",
        f"w->scc = (((u64)a << {n}) + b) >> 32 != 0; ",
    )  # fmt: skip
_enter("s_absdiff_i32", SOP2, "32 32 32", "(i32)(a - b) < 0 ? b - a : a - b", NONZERO)
_enter("s_cselect_b32", SOP2, "32 32 32", "w->scc ? a : b")
_enter("s_cselect_b64", SOP2, "64 64 64", "w->scc ? a : b")

# --- one source ---
for name, signature, expression, scc in (
    ("s_mov_b32", "32 32", "a", ""),
    ("s_mov_b64", "64 64", "a", ""),
    ("s_not_b32", "32 32", "~a", NONZERO),
    ("s_not_b64", "64 64", "~a", NONZERO),
    ("s_brev_b32", "32 32", "reverse32(a)", ""),
    ("s_brev_b64", "64 64", "reverse64(a)", ""),
    ("s_ff1_i32_b32", "32 32", "a ? (u32)__builtin_ctz(a) : ~0u", ""),
    ("s_ff1_i32_b64", "32 64", "a ? (u32)__builtin_ctzll(a) : ~0u", ""),
    ("s_flbit_i32_b32", "32 32", "a ? (u32)__builtin_clz(a) : ~0u", ""),
    ("s_flbit_i32_b64", "32 64", "a ? (u32)__builtin_clzll(a) : ~0u", ""),
    ("s_bcnt1_i32_b32", "32 32", "(u32)__builtin_popcount(a)", NONZERO),
    ("s_bcnt1_i32_b64", "32 64", "(u32)__builtin_popcountll(a)", NONZERO),
    ("s_bcnt0_i32_b32", "32 32", "(u32)__builtin_popcount(~a)", NONZERO),
    ("s_abs_i32", "32 32", "(i32)a < 0 ? 0 - a : a", NONZERO),
    ("s_sext_i32_i8", "32 32", "(u32)(i32)(i8)a", ""),
    ("s_sext_i32_i16", "32 32", "(u32)(i32)(i16)a", ""),
):
    _enter(name, SOP1, signature, expression, scc)


def _conditional_move(wide: bool) -> Emitter:
    def emit(shape: Shape) -> str:
        d = shape.sgpr(0)
        raw = shape.bits(shape.operands[1], "b64" if wide else "b32")
        store = f"set64(w, {d}, {raw})" if wide else f"w->s[{d}] = {raw}"
        return f"if (w->scc) {store}; return NEXT;"

    return emit


add("s_cmov_b32", "scalar", SOP1, _conditional_move(False))
add("s_cmov_b64", "scalar", SOP1, _conditional_move(True))


def _saveexec(expression: str) -> Emitter:
    """D = EXEC; EXEC = a op EXEC; SCC = EXEC is not 0. Here b is EXEC."""

    def emit(shape: Shape) -> str:
        d = shape.sgpr(0)
        raw = shape.bits(shape.operands[1], "b64")
        return (
            f"const u64 a = {raw}, b = ex, n = {expression}; set64(w, {d}, b); EXEC = n; "
            f"w->scc = n != 0; return NEXT;"
        )

    return emit


for name, expression in {
    "and": "a & b", "or": "a | b", "xor": "a ^ b", "andn2": "a & ~b", "orn2": "a | ~b",
    "andn1": "~a & b", "orn1": "~a | b", "nand": "~(a & b)", "nor": "~(a | b)", "xnor": "~(a ^ b)",
}.items():  # fmt: skip
    add(f"s_{name}_saveexec_b64", "scalar", SOP1, _saveexec(expression))

# --- a 16-bit constant, sign-extended ---
_enter("s_movk_i32", SOPK, "32 32", "(u32)(i32)(i16)a")
add(
    "s_addk_i32", "scalar", SOPK,
    _scalar(
        "a + (u32)(i32)(i16)b", "32 32 32",
        "i32 t; w->scc = __builtin_add_overflow((i32)a, (i32)(i16)b, &t); ", reads_destination=True,
    ),
)  # fmt: skip
add(
    "s_mulk_i32", "scalar", SOPK,
    _scalar("a * (u32)(i32)(i16)b", "32 32 32", reads_destination=True),
)  # fmt: skip
add("s_cmovk_i32", "scalar", SOPK, lambda shape: _cmovk(shape))


def _cmovk(shape: Shape) -> str:
    d, raw = shape.sgpr(0), shape.bits(shape.operands[1])
    return f"if (w->scc) w->s[{d}] = (u32)(i32)(i16)({raw}); return NEXT;"


add(
    "s_bitset0_b32", "scalar", SOP1,
    _scalar("a & ~(1u << (b & 31))", "32 32 32", reads_destination=True),
)  # fmt: skip
add(
    "s_bitset1_b32", "scalar", SOP1,
    _scalar("a | 1u << (b & 31)", "32 32 32", reads_destination=True),
)  # fmt: skip


# --- compares ---
def _compare(expression: str, type: str) -> Emitter:
    def emit(shape: Shape) -> str:
        wide = "b64" if "64" in type else "b32"
        a, b = (shape.bits(o, wide) for o in shape.operands)
        return f"const {type} a = ({type}){a}, b = ({type}){b}; w->scc = {expression}; return NEXT;"

    return emit


RELATIONS = {"eq": "==", "lg": "!=", "gt": ">", "ge": ">=", "lt": "<", "le": "<="}
for name, sign in RELATIONS.items():
    for type in ("i32", "u32"):
        add(f"s_cmp_{name}_{type}", "scalar", SOPC, _compare(f"a {sign} b", type))
        constant = "(i32)(i16)b" if type == "i32" else "(b & 0xffff)"
        add(f"s_cmpk_{name}_{type}", "scalar", SOPK, _compare(f"a {sign} {constant}", type))
add("s_cmp_eq_u64", "scalar", SOPC, _compare("a == b", "u64"))
add("s_cmp_lg_u64", "scalar", SOPC, _compare("a != b", "u64"))
for value in (0, 1):
    for width in (32, 64):
        bit = f"(a >> (b & {width - 1}) & 1) == {value}"
        add(f"s_bitcmp{value}_b{width}", "scalar", SOPC, _compare(bit, f"u{width}"))
