"""Local data share: ISA "Local Data Share" and "LDS & GDS Instructions".

Data of reads lands when lgkmcnt says so. Atomics act at once; what they return lands.
"""

from __future__ import annotations

import re

from gcnemu.asm import Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.memory import Access, gather
from gcnemu.isa.table import CDNA4, Emitter, add

SOURCE = "LDS & GDS Instructions"

READS = {
    "b32": Access(4), "b64": Access(8), "b96": Access(12), "b128": Access(16),
    "u8": Access(1, "F_U8"), "i8": Access(1, "F_I8"), "u16": Access(2, "F_U16"),
    "i16": Access(2, "F_I16"), "u16_d16": Access(2, "F_D16"), "u16_d16_hi": Access(2, "F_D16_HI"),
    "u8_d16": Access(1, "F_D16"), "u8_d16_hi": Access(1, "F_D16_HI"),
    "i8_d16": Access(1, "F_D16_I8"), "i8_d16_hi": Access(1, "F_D16_I8_HI"),
}  # fmt: skip
WRITES = {
    "b8": Access(1), "b16": Access(2), "b32": Access(4), "b64": Access(8), "b96": Access(12),
    "b128": Access(16), "b8_d16_hi": Access(1, shift=16), "b16_d16_hi": Access(2, shift=16),
}  # fmt: skip
_EACH = "for (int l = 0; l < 64; l++) if (ex >> l & 1) { "


def _begin(form: str, d: str, size: int) -> str:
    return f"Pending *p = pending(w, &w->lgkm, P_VGPR, {form}, {d}, {size}); p->lanes = ex; "


def _read(access: Access) -> Emitter:
    def emit(shape: Shape) -> str:
        d, a = shape.vgpr(0), shape.vgpr(1)
        fixed = shape.constant(shape.number("offset"))
        return (
            f"{_begin(access.form, d, access.size)}{_EACH}"
            f"lds_read(w, l, w->v[{a}][l] + (u32){fixed}, p->data[l], {access.size}); }} "
            f"landed(w, &w->lgkm, p); return NEXT;"
        )

    return emit


def _write(access: Access) -> Emitter:
    def emit(shape: Shape) -> str:
        a, source = shape.vgpr(0), shape.vgpr(1)
        fixed = shape.constant(shape.number("offset"))
        return (
            f"count_only(w, &w->lgkm); {_EACH}u32 data[4]; {gather(source, access)}"
            f"lds_write(w, l, w->v[{a}][l] + (u32){fixed}, data, {access.size}); }} return NEXT;"
        )

    return emit


def _read2(size: int, unit: int) -> Emitter:
    """Two elements, at offset0 and offset1 in units of the element (st64: of 64 elements)."""

    def emit(shape: Shape) -> str:
        d, a = shape.vgpr(0), shape.vgpr(1)
        x, y = (shape.constant(shape.number(n) * unit) for n in ("offset0", "offset1"))
        return (
            f"{_begin('F_DWORDS', d, 2 * size)}{_EACH}const u32 at = w->v[{a}][l]; "
            f"lds_read(w, l, at + (u32){x}, p->data[l], {size}); "
            f"lds_read(w, l, at + (u32){y}, p->data[l] + {size}, {size}); }} "
            f"landed(w, &w->lgkm, p); return NEXT;"
        )

    return emit


def _write2(size: int, unit: int) -> Emitter:
    def emit(shape: Shape) -> str:
        a, first, second = shape.vgpr(0), shape.vgpr(1), shape.vgpr(2)
        x, y = (shape.constant(shape.number(n) * unit) for n in ("offset0", "offset1"))
        access = Access(size)
        return (
            f"count_only(w, &w->lgkm); {_EACH}const u32 at = w->v[{a}][l]; u32 data[4]; "
            f"{gather(first, access)}lds_write(w, l, at + (u32){x}, data, {size}); "
            f"{gather(second, access)}lds_write(w, l, at + (u32){y}, data, {size}); }} return NEXT;"
        )

    return emit


for name, access in READS.items():
    add(f"ds_read_{name}", "LDS", SOURCE, _read(access))
for name, access in WRITES.items():
    add(f"ds_write_{name}", "LDS", SOURCE, _write(access))
for size in (4, 8):
    for infix, many in (("", 1), ("st64", 64)):
        add(f"ds_read2{infix}_b{8 * size}", "LDS", SOURCE, _read2(size, size * many))
        add(f"ds_write2{infix}_b{8 * size}", "LDS", SOURCE, _write2(size, size * many))

# --- atomics ---
_ATOMICS = {
    "add_u32": ("u32", "old + x"), "sub_u32": ("u32", "old - x"),
    "rsub_u32": ("u32", "x - old"), "inc_u32": ("u32", "old >= x ? 0 : old + 1"),
    "dec_u32": ("u32", "old == 0 || old > x ? x : old - 1"),
    "min_i32": ("u32", "(i32)x < (i32)old ? x : old"), "max_i32": ("u32", "(i32)x > (i32)old ? x : old"),
    "min_u32": ("u32", "x < old ? x : old"), "max_u32": ("u32", "x > old ? x : old"),
    "and_b32": ("u32", "old & x"), "or_b32": ("u32", "old | x"), "xor_b32": ("u32", "old ^ x"),
    "add_f32": ("u32", "U(F(old) + F(x))"), "add_u64": ("u64", "old + x"),
    "min_f32": ("u32", "U(min_f32(w, F(old), F(x)))"), "max_f32": ("u32", "U(max_f32(w, F(old), F(x)))"),
    "or_b64": ("u64", "old | x"), "and_b64": ("u64", "old & x"),
    "add_f64": ("u64", "UD(D(old) + D(x))"),
    "pk_add_f16": ("u32", "f2h(h2f(old & 0xffff) + h2f(x & 0xffff)) | f2h(h2f(old >> 16) + h2f(x >> 16)) << 16"),
    "pk_add_bf16": ("u32", "f2b(b2f(old & 0xffff) + b2f(x & 0xffff)) | f2b(b2f(old >> 16) + b2f(x >> 16)) << 16"),
}  # fmt: skip


def _atomic(type: str, expression: str, returns: bool, operands: int = 1) -> Emitter:
    size = 8 if type == "u64" else 4

    def emit(shape: Shape) -> str:
        first = int(returns)
        d = shape.vgpr(0) if returns else ""
        a, x = shape.vgpr(first), shape.vgpr(first + 1)
        fixed = shape.constant(shape.number("offset"))
        read = (lambda r: f"v64(w, {r}, l)") if size == 8 else (lambda r: f"w->v[{r}][l]")
        second = f"const {type} y = {read(shape.vgpr(first + 2))}; " if operands == 2 else ""
        begin = _begin("F_DWORDS", d, size) if returns else "count_only(w, &w->lgkm); "
        keep = "memcpy(p->data[l], &old, sizeof old); " if returns else ""
        end = "landed(w, &w->lgkm, p); " if returns else ""
        return (
            f"{begin}{_EACH}const {type} x = {read(x)}; {second}{type} old = 0; "
            f"void *at = lds_atomic(w, l, w->v[{a}][l] + (u32){fixed}, {size}); if (at) {{ "
            f"memcpy(&old, at, {size}); const {type} next = {expression}; memcpy(at, &next, {size}); }} "
            f"{keep}}} {end}return NEXT;"
        )

    return emit


for name, (type, expression) in _ATOMICS.items():
    add(f"ds_{name}", "LDS", SOURCE, _atomic(type, expression, False))
    opcode, _, suffix = name.rpartition("_")
    add(f"ds_{opcode}_rtn_{suffix}", "LDS", SOURCE, _atomic(type, expression, True))
add("ds_wrxchg_rtn_b32", "LDS", SOURCE, _atomic("u32", "x", True))
# The compare value comes first, the new one second.
add("ds_cmpst_b32", "LDS", SOURCE, _atomic("u32", "old == x ? y : old", False, 2))
add("ds_cmpst_rtn_b32", "LDS", SOURCE, _atomic("u32", "old == x ? y : old", True, 2))


# --- between lanes through the LDS crossbar: no memory, no conflicts ---
def _bpermute(shape: Shape) -> str:
    """Lane l reads lane (address / 4) mod 64; an inactive source gives 0."""
    d, a, source = shape.vgpr(0), shape.vgpr(1), shape.vgpr(2)
    fixed = shape.constant(shape.number("offset"))
    return (
        f"{_begin('F_DWORDS', d, 4)}{_EACH}const u32 k = (w->v[{a}][l] + (u32){fixed}) >> 2 & 63; "
        f"const u32 x = ex >> k & 1 ? w->v[{source}][k] : 0; memcpy(p->data[l], &x, 4); }} "
        f"landed(w, &w->lgkm, p); return NEXT;"
    )


def _permute(shape: Shape) -> str:
    """Lane l writes lane (address / 4) mod 64; the highest writer wins, unwritten lanes get 0."""
    d, a, source = shape.vgpr(0), shape.vgpr(1), shape.vgpr(2)
    fixed = shape.constant(shape.number("offset"))
    return (
        f"{_begin('F_DWORDS', d, 4)}memset(p->data, 0, sizeof p->data); {_EACH}"
        f"const u32 k = (w->v[{a}][l] + (u32){fixed}) >> 2 & 63; "
        f"memcpy(p->data[k], &w->v[{source}][l], 4); }} landed(w, &w->lgkm, p); return NEXT;"
    )


def _swizzle_source(offset: str) -> str:
    """C of the source lane, from the named or the numeric form of the offset."""
    match = re.fullmatch(r"swizzle\((\w+)\s*,\s*(.*)\)", offset)
    if match is None:
        value = int(offset, 0)
        if value & 0x8000:
            return f"(l & ~3) | ({value & 255} >> 2 * (l & 3) & 3)"
        return f"(l & 32) | ((((l & 31) & {value & 31}) | {value >> 5 & 31}) ^ {value >> 10 & 31})"
    kind, rest = match[1], [x.strip().strip('"') for x in match[2].split(",")]
    if kind == "QUAD_PERM":
        return f"(l & ~3) | ({sum(int(x) << 2 * n for n, x in enumerate(rest))} >> 2 * (l & 3) & 3)"
    if kind == "SWAP":
        return f"l ^ {int(rest[0])}"
    if kind == "REVERSE":
        return f"l ^ {int(rest[0]) - 1}"
    if kind == "BROADCAST":
        return f"(l & ~{int(rest[0]) - 1}) | {int(rest[1])}"
    if kind == "BITMASK_PERM":  # per bit: 0, 1, p(reserve) or i(nvert)
        keep = force = flip = 0
        for n, char in enumerate(reversed(rest[0])):
            keep |= (char in "pi") << n
            force |= (char == "1") << n
            flip |= (char == "i") << n
        return f"(l & 32) | ((((l & 31) & {keep}) | {force}) ^ {flip})"
    raise Unsupported(f"swizzle {kind}")


def _swizzle(shape: Shape) -> str:
    d, source = shape.vgpr(0), shape.vgpr(1)
    lane = _swizzle_source(shape.take("offset", "0") or "0")
    return (
        f"{_begin('F_DWORDS', d, 4)}{_EACH}const u32 k = {lane}; "
        f"const u32 x = ex >> k & 1 ? w->v[{source}][k] : 0; memcpy(p->data[l], &x, 4); }} "
        f"landed(w, &w->lgkm, p); return NEXT;"
    )


add("ds_bpermute_b32", "LDS", SOURCE, _bpermute)
add("ds_permute_b32", "LDS", SOURCE, _permute)
add("ds_swizzle_b32", "LDS", SOURCE, _swizzle)
add("ds_nop", "LDS", SOURCE, lambda shape: "return NEXT;")


def _transposed(bits: int, size: int) -> Emitter:
    """CDNA4 "MFMA Transpose Load from LDS". Sixteen lanes each read a row of elements; together
    they are a matrix, read back in columns: element j of lane i is number 16 j + i.
    """
    per_lane = size * 8 // bits

    def emit(shape: Shape) -> str:
        d, a = shape.vgpr(0), shape.vgpr(1)
        fixed = shape.constant(shape.number("offset"))
        return (
            f"u8 rows[64][16] = {{{{0}}}}; {_EACH}"
            f"lds_read(w, l, w->v[{a}][l] + (u32){fixed}, rows[l], {size}); }} "
            f"{_begin('F_DWORDS', d, size)}memset(p->data, 0, sizeof p->data); {_EACH}"
            f"for (u32 j = 0; j < {per_lane}; j++) {{ const u32 n = 16 * j + (l & 15); "
            f"const u8 *row = rows[(l & ~15) + n / {per_lane}]; const u32 at = n % {per_lane} * {bits}; "
            f"u32 x = 0; for (u32 q = 0; q < {bits}; q++) x |= (u32)(row[(at + q) / 8] >> (at + q) % 8 & 1) << q; "
            f"for (u32 q = 0; q < {bits}; q++) p->data[l][(j * {bits} + q) / 8] |= (x >> q & 1) << (j * {bits} + q) % 8; }} }} "
            f"landed(w, &w->lgkm, p); return NEXT;"
        )

    return emit


TRANSPOSE = "MFMA Transpose Load from LDS"
add("ds_read_b64_tr_b16", "LDS", TRANSPOSE, _transposed(16, 8), CDNA4)
add("ds_read_b64_tr_b8", "LDS", TRANSPOSE, _transposed(8, 8), CDNA4)
add("ds_read_b64_tr_b4", "LDS", TRANSPOSE, _transposed(4, 8), CDNA4)
