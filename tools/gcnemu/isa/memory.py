"""What loads, stores and atomics of every address space share: widths and how bytes meet registers."""

from __future__ import annotations

from dataclasses import dataclass

from gcnemu.asm import Unsupported
from gcnemu.emit import Shape


@dataclass(frozen=True)
class Access:
    size: int  # bytes per lane
    form: str = "F_DWORDS"  # how a load becomes a register, in gcn.h
    shift: int = 0  # a store takes the register from this bit


LOADS = {
    "ubyte": Access(1, "F_U8"), "sbyte": Access(1, "F_I8"), "ushort": Access(2, "F_U16"),
    "sshort": Access(2, "F_I16"), "dword": Access(4), "dwordx2": Access(8),
    "dwordx3": Access(12), "dwordx4": Access(16), "short_d16": Access(2, "F_D16"),
    "short_d16_hi": Access(2, "F_D16_HI"), "ubyte_d16": Access(1, "F_D16"),
    "ubyte_d16_hi": Access(1, "F_D16_HI"), "sbyte_d16": Access(1, "F_D16_I8"),
    "sbyte_d16_hi": Access(1, "F_D16_I8_HI"),
}  # fmt: skip
STORES = {
    "byte": Access(1), "byte_d16_hi": Access(1, shift=16), "short": Access(2),
    "short_d16_hi": Access(2, shift=16), "dword": Access(4), "dwordx2": Access(8),
    "dwordx3": Access(12), "dwordx4": Access(16),
}  # fmt: skip
# C of the new value from `old` and the operand `x` (for cmpswap: `x` new, `y` expected).
ATOMICS = {
    "add": ("u32", "old + x"), "sub": ("u32", "old - x"), "and": ("u32", "old & x"),
    "or": ("u32", "old | x"), "xor": ("u32", "old ^ x"), "swap": ("u32", "x"),
    "smin": ("u32", "(i32)x < (i32)old ? x : old"), "umin": ("u32", "x < old ? x : old"),
    "smax": ("u32", "(i32)x > (i32)old ? x : old"), "umax": ("u32", "x > old ? x : old"),
    "inc": ("u32", "old >= x ? 0 : old + 1"), "dec": ("u32", "old == 0 || old > x ? x : old - 1"),
    "cmpswap": ("u32", "old == y ? x : old"),
    "add_x2": ("u64", "old + x"), "and_x2": ("u64", "old & x"), "or_x2": ("u64", "old | x"),
    "swap_x2": ("u64", "x"), "cmpswap_x2": ("u64", "old == y ? x : old"),
    "add_f32": ("u32", "U(F(old) + F(x))"),
    "pk_add_f16": ("u32", "f2h(h2f(old & 0xffff) + h2f(x & 0xffff)) | f2h(h2f(old >> 16) + h2f(x >> 16)) << 16"),
    "pk_add_bf16": ("u32", "f2b(b2f(old & 0xffff) + b2f(x & 0xffff)) | f2b(b2f(old >> 16) + b2f(x >> 16)) << 16"),
    "add_f64": ("u64", "UD(D(old) + D(x))"),
    "min_f64": ("u64", "UD(fmin(D(old), D(x)))"), "max_f64": ("u64", "UD(fmax(D(old), D(x)))"),
}  # fmt: skip


def gather(register: str, access: Access) -> str:
    """C that puts a lane's store data into `data`."""
    if access.size <= 4:
        return f"data[0] = w->v[{register}][l] >> {access.shift}; "
    return f"for (u32 n = 0; n < {access.size // 4}; n++) data[n] = w->v[{register} + n][l]; "


def cache_policy(shape: Shape) -> None:
    """Scope and temporal hints change no result here."""
    for flag in ("sc0", "sc1", "nt"):
        shape.flag(flag)


def atomic(name: str, pointer: str, source: str, destination: str | None) -> str:
    """C of one lane's read-modify-write through `pointer` (null: outside, nothing happens)."""
    if name not in ATOMICS:
        raise Unsupported(f"atomic {name}")
    type, expression = ATOMICS[name]
    wide = type == "u64"
    read = (lambda r: f"v64(w, {r}, l)") if wide else (lambda r: f"w->v[{r}][l]")
    code = (
        f"{type} *cell = {pointer}; if (cell) {{ {type} old, next; memcpy(&old, cell, sizeof old); "
    )
    code += f"const {type} x = {read(source)}; "
    if name.startswith("cmpswap"):
        code += f"const {type} y = {read(f'{source} + {2 if wide else 1}')}; "
    code += f"next = {expression}; memcpy(cell, &next, sizeof next); "
    if destination:
        # Before-values wait in a queue like loaded data.
        code += "memcpy(p->data[l], &old, sizeof old); p->lanes |= 1ull << l; "
    return code + "} "


def atomic_size(name: str) -> int:
    return 8 if ATOMICS[name][0] == "u64" else 4
