"""Scalar loads: ISA "Scalar Memory Operations". They return out of order: only lgkmcnt(0) waits."""

from __future__ import annotations

from gcnemu.emit import Shape
from gcnemu.isa.table import Emitter, add

SOURCE = "SMEM Instructions"


def _offset(shape: Shape) -> str:
    offset = shape.operands[2]
    register = f"(u64){shape.bits(offset)}" if offset.kind == "s" else None
    fixed = shape.number("offset")
    if offset.kind == "const":
        fixed += int(offset.value)
    constant = f"{shape.constant(fixed)}"
    return f"{register} + {constant}" if register else constant


def _load(dwords: int) -> Emitter:
    def emit(shape: Shape) -> str:
        d, base = shape.sgpr(0), shape.sgpr(1)
        for unused in ("glc", "nv"):
            shape.flag(unused)
        return (
            f"const u64 at = (s64(w, {base}) + {_offset(shape)}) & ~3ull; u32 data[16] = {{0}}; "
            f"global_read(w, 0, at, data, {4 * dwords}); "
            f"Pending *p = pending(w, &w->lgkm, P_SGPR, 0, {d}, {4 * dwords}); "
            f"memcpy(p->data, data, {4 * dwords}); landed(w, &w->lgkm, p); return NEXT;"
        )

    return emit


def _buffer_load(dwords: int) -> Emitter:
    """Dwords beyond num_records read as 0."""

    def emit(shape: Shape) -> str:
        d, r = shape.sgpr(0), shape.sgpr(1)
        shape.flag("glc")
        return (
            f"const Resource b = resource(w, {r}); const u64 at = ({_offset(shape)}) & ~3ull; "
            f"u32 data[16] = {{0}}; for (u32 n = 0; n < {dwords}; n++) "
            f"if (at + 4 * n + 4 <= b.records) global_read(w, 0, b.base + at + 4 * n, data + n, 4); "
            f"else report(w, BUFFER_READ_ZERO, 0, b.base + at + 4 * n, 4); "
            f"Pending *p = pending(w, &w->lgkm, P_SGPR, 0, {d}, {4 * dwords}); "
            f"memcpy(p->data, data, {4 * dwords}); landed(w, &w->lgkm, p); return NEXT;"
        )

    return emit


for dwords, suffix in ((1, ""), (2, "x2"), (4, "x4"), (8, "x8"), (16, "x16")):
    add(f"s_load_dword{suffix}", "scalar memory", SOURCE, _load(dwords))
    add(f"s_buffer_load_dword{suffix}", "scalar memory", SOURCE, _buffer_load(dwords))


def _clock(shape: Shape) -> str:
    d = shape.sgpr(0)
    return (
        f"Pending *p = pending(w, &w->lgkm, P_SGPR, 0, {d}, 8); w->g->clock += 100; "
        f"memcpy(p->data, &w->g->clock, 8); landed(w, &w->lgkm, p); return NEXT;"
    )


add("s_memtime s_memrealtime", "scalar memory", SOURCE, _clock)
add("s_dcache_inv s_dcache_wb", "scalar memory", SOURCE, lambda shape: "return NEXT;")
