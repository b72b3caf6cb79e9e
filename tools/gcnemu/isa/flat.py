"""Global, flat and scratch memory: ISA "Flat Memory Instructions".

A flat address is taken as global: the apertures of LDS and scratch do not exist here.
"""

from __future__ import annotations

from gcnemu.asm import Operand, Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.memory import ATOMICS, LOADS, STORES, atomic, atomic_size, cache_policy, gather
from gcnemu.isa.table import BOTH, CDNA4, Emitter, add

SOURCE = "FLAT, Scratch and Global Instructions"


def _address(shape: Shape, vector: Operand, scalar: Operand | None) -> str:
    """64-bit VGPR pair, or SGPR pair plus a 32-bit VGPR offset; plus the signed constant."""
    fixed = shape.constant(shape.number("offset"))
    if scalar is None or scalar.kind == "off":
        if vector.count != 2:
            raise Unsupported(f"address {vector.text}")
        return f"v64(w, {shape.register(vector.index)}, l) + {fixed}"
    base = f"s64(w, {shape.register(scalar.index)})"
    if vector.kind == "off":
        return f"{base} + {fixed}"
    return f"{base} + w->v[{shape.register(vector.index)}][l] + {fixed}"


def _scalar_base(shape: Shape, at: int) -> Operand | None:
    return shape.operands[at] if len(shape.operands) > at else None


def _load(kind: str) -> Emitter:
    access = LOADS[kind]

    def emit(shape: Shape) -> str:
        cache_policy(shape)
        d = shape.vgpr(0)
        address = _address(shape, shape.operands[1], _scalar_base(shape, 2))
        return (
            f"Pending *p = pending(w, &w->vm, P_VGPR, {access.form}, {d}, {access.size}); "
            f"for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ p->lanes |= 1ull << l; "
            f"global_read(w, l, {address}, p->data[l], {access.size}); }} "
            f"landed(w, &w->vm, p); return NEXT;"
        )

    return emit


def _store(kind: str) -> Emitter:
    access = STORES[kind]

    def emit(shape: Shape) -> str:
        cache_policy(shape)
        address = _address(shape, shape.operands[0], _scalar_base(shape, 2))
        source = shape.vgpr(1)
        return (
            f"count_only(w, &w->vm); for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ u32 data[4]; "
            f"{gather(source, access)}global_write(w, l, {address}, data, {access.size}); }} return NEXT;"
        )

    return emit


def _atomic(kind: str) -> Emitter:
    size = atomic_size(kind)

    def emit(shape: Shape) -> str:
        returns = shape.flag("sc0")
        cache_policy(shape)
        first = 1 if returns else 0
        d = shape.vgpr(0) if returns else None
        address = _address(shape, shape.operands[first], _scalar_base(shape, first + 2))
        source = shape.vgpr(first + 1)
        begin = (
            f"Pending *p = pending(w, &w->vm, P_VGPR, F_DWORDS, {d}, {size}); "
            if returns
            else "count_only(w, &w->vm); "
        )
        body = atomic(kind, f"global_atomic(w, l, {address}, {size})", source, d)
        end = "landed(w, &w->vm, p); " if returns else ""
        return f"{begin}for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ {body}}} {end}return NEXT;"

    return emit


for kind in LOADS:
    add(f"global_load_{kind} flat_load_{kind}", "global", SOURCE, _load(kind))
for kind in STORES:
    add(f"global_store_{kind} flat_store_{kind}", "global", SOURCE, _store(kind))
for kind in ATOMICS:
    add(f"global_atomic_{kind} flat_atomic_{kind}", "global", SOURCE, _atomic(kind))


def _load_to_lds(kind: str) -> Emitter:
    """Each lane's data goes to LDS at M0 + offset + lane * size, when vmcnt says so."""
    access = LOADS[kind]

    def emit(shape: Shape) -> str:
        offset = shape.ins.modifiers.get("offset", "0")
        cache_policy(shape)
        address = _address(shape, shape.operands[0], _scalar_base(shape, 1))
        fixed = shape.constant(int(offset, 0))
        return (
            f"Pending *p = pending(w, &w->vm, P_LDS, 0, 0, {access.size}); "
            f"const u32 base = (w->s[S_M0] & 0x3ffff) + (u32){fixed}; "
            f"for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ p->lanes |= 1ull << l; "
            f"p->lds[l] = base + l * {access.size}; "
            f"global_read(w, l, {address}, p->data[l], {access.size}); }} "
            f"landed(w, &w->vm, p); return NEXT;"
        )

    return emit


LDS_DMA = "Memory Buffer Load to LDS"
for kind, archs in (("dword", BOTH), ("dwordx3", CDNA4), ("dwordx4", CDNA4)):
    add(f"global_load_lds_{kind}", "LDS-DMA", LDS_DMA, _load_to_lds(kind), archs)


# --- scratch: each lane's private memory ---
def _scratch_address(shape: Shape, vector: Operand, scalar: Operand | None) -> str:
    terms = [f"(i64){shape.constant(shape.number('offset'))}"]
    if vector.kind == "v":
        terms.append(f"(i64)w->v[{shape.register(vector.index)}][l]")
    if scalar is not None and scalar.kind == "s":
        terms.append(f"(i64)w->s[{shape.register(scalar.index)}]")
    return " + ".join(terms)


def _scratch_load(kind: str) -> Emitter:
    access = LOADS[kind]

    def emit(shape: Shape) -> str:
        cache_policy(shape)
        d = shape.vgpr(0)
        address = _scratch_address(shape, shape.operands[1], _scalar_base(shape, 2))
        return (
            f"Pending *p = pending(w, &w->vm, P_VGPR, {access.form}, {d}, {access.size}); "
            f"for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ p->lanes |= 1ull << l; "
            f"memcpy(p->data[l], scratch_at(w, l, {address}, {access.size}), {access.size}); }} "
            f"landed(w, &w->vm, p); return NEXT;"
        )

    return emit


def _scratch_store(kind: str) -> Emitter:
    access = STORES[kind]

    def emit(shape: Shape) -> str:
        cache_policy(shape)
        address = _scratch_address(shape, shape.operands[0], _scalar_base(shape, 2))
        source = shape.vgpr(1)
        return (
            f"count_only(w, &w->vm); for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ u32 data[4]; "
            f"{gather(source, access)}memcpy(scratch_at(w, l, {address}, {access.size}), data, {access.size}); }} "
            f"return NEXT;"
        )

    return emit


for kind in LOADS:
    add(f"scratch_load_{kind}", "scratch", SOURCE, _scratch_load(kind))
for kind in STORES:
    add(f"scratch_store_{kind}", "scratch", SOURCE, _scratch_store(kind))
