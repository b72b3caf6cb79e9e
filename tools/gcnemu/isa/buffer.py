"""Buffer memory: ISA "Vector Memory Buffer Instructions".

Address: base + soffset + (voffset + offset modulo 2^32) + stride * index. Dwords outside num_records
read as 0 and are not written, as hardware does; both are noted, and both are what compilers use for
masked lanes. Resources with swizzle or add_tid are reported as not modelled.
"""

from __future__ import annotations

from gcnemu.asm import Unsupported
from gcnemu.emit import Shape
from gcnemu.isa.memory import ATOMICS, LOADS, STORES, atomic, atomic_size, cache_policy, gather
from gcnemu.isa.table import BOTH, CDNA4, Emitter, add

SOURCE = "MUBUF Instructions"
# The wrap modulo 2^32 is relied on by kernels that pass on hardware (FlyDSL's GEMMs).


def _setup(shape: Shape, first: int) -> tuple[str, str, int]:
    """C before the lanes, C per lane (`offset`, `index`, `at`), and whether an index is used."""
    vector, _, scalar = shape.operands[first : first + 3]
    offen, idxen = shape.flag("offen"), shape.flag("idxen")
    fixed = shape.constant(shape.number("offset"))
    resource = shape.sgpr(first + 1)
    before = f"const Resource b = resource(w, {resource}); const u32 so = {shape.bits(scalar)}; "
    voffset = index = "0u"
    if offen or idxen:
        if vector.kind != "v":
            raise Unsupported(f"address {vector.text}")
        r = shape.register(vector.index)
        index = f"w->v[{r}][l]" if idxen else "0u"
        if offen:
            voffset = f"w->v[{r} + 1][l]" if idxen else f"w->v[{r}][l]"
    lane = (
        f"const u32 offset = {voffset} + (u32){fixed}, index = {index}; "
        f"const u64 at = b.base + so + offset + (u64)b.stride * index; (void)at; "
    )
    return before, lane, int(idxen)


def _read(size: int, idxen: int, to: str) -> str:
    step = min(size, 4)
    return (
        f"for (u32 n = 0; n < {size}; n += {step}) "
        f"if (in_range(&b, offset + n, index, so, {step}, {idxen})) "
        f"global_read(w, l, at + n, {to} + n, {step}); "
        f"else {{ memset({to} + n, 0, {step}); if (offset < 0x80000000u) "
        f"report(w, BUFFER_READ_ZERO, l, at + n, {step}); }} "
    )


def _load(kind: str) -> Emitter:
    access = LOADS[kind]

    def emit(shape: Shape) -> str:
        cache_policy(shape)
        if shape.flag("lds"):
            return _load_to_lds(shape)
        d = shape.vgpr(0)
        before, lane, idxen = _setup(shape, 1)
        return (
            f"{before}Pending *p = pending(w, &w->vm, P_VGPR, {access.form}, {d}, {access.size}); "
            f"for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ p->lanes |= 1ull << l; {lane}"
            f"{_read(access.size, idxen, 'p->data[l]')}}} landed(w, &w->vm, p); return NEXT;"
        )

    def _load_to_lds(shape: Shape) -> str:
        if access.form != "F_DWORDS" or (access.size > 4 and shape.arch not in CDNA4):
            raise Unsupported(f"{kind} to LDS")
        fixed = shape.constant(int(shape.ins.modifiers.get("offset", "0"), 0))
        before, lane, idxen = _setup(shape, 0)
        return (
            f"{before}Pending *p = pending(w, &w->vm, P_LDS, 0, 0, {access.size}); "
            f"const u32 base = (w->s[S_M0] & 0x3ffff) + (u32){fixed}; "
            f"for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ p->lanes |= 1ull << l; {lane}"
            f"p->lds[l] = base + l * {access.size}; "
            f"{_read(access.size, idxen, 'p->data[l]')}}} landed(w, &w->vm, p); return NEXT;"
        )

    return emit


def _store(kind: str) -> Emitter:
    access = STORES[kind]
    step = min(access.size, 4)

    def emit(shape: Shape) -> str:
        cache_policy(shape)
        source = shape.vgpr(0)
        before, lane, idxen = _setup(shape, 1)
        return (
            f"{before}count_only(w, &w->vm); for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ {lane}"
            f"u32 data[4]; {gather(source, access)}"
            f"for (u32 n = 0; n < {access.size}; n += {step}) "
            f"if (in_range(&b, offset + n, index, so, {step}, {idxen})) "
            f"global_write(w, l, at + n, (u8 *)data + n, {step}); "
            f"else if (offset < 0x80000000u) report(w, BUFFER_WRITE_DROPPED, l, at + n, {step}); }} "
            f"return NEXT;"
        )

    return emit


def _atomic(kind: str) -> Emitter:
    size = atomic_size(kind)

    def emit(shape: Shape) -> str:
        returns = shape.flag("sc0")
        cache_policy(shape)
        source = shape.vgpr(0)
        before, lane, idxen = _setup(shape, 1)
        begin = (
            f"Pending *p = pending(w, &w->vm, P_VGPR, F_DWORDS, {source}, {size}); "
            if returns
            else "count_only(w, &w->vm); "
        )
        pointer = (
            f"in_range(&b, offset, index, so, {size}, {idxen}) ? "
            f"global_atomic(w, l, at, {size}) : (offset < 0x80000000u ? "
            f"report(w, BUFFER_WRITE_DROPPED, l, at, {size}), (void *)0 : (void *)0)"
        )
        # An atomic out of range returns 0.
        zero = (
            "memset(p->data[l], 0, sizeof p->data[l]); p->lanes |= 1ull << l; " if returns else ""
        )
        body = atomic(kind, pointer, source, source if returns else None)
        end = "landed(w, &w->vm, p); " if returns else ""
        return (
            f"{before}{begin}for (int l = 0; l < 64; l++) if (ex >> l & 1) {{ {lane}{zero}{body}}} "
            f"{end}return NEXT;"
        )

    return emit


for kind in LOADS:
    add(f"buffer_load_{kind}", "buffer", SOURCE, _load(kind))
for kind in STORES:
    add(f"buffer_store_{kind}", "buffer", SOURCE, _store(kind))
for kind in ATOMICS:
    archs = CDNA4 if kind == "pk_add_bf16" else BOTH
    add(f"buffer_atomic_{kind}", "buffer", SOURCE, _atomic(kind), archs)
