"""Loads, stores and atomics of every address space, from the ISA documents, on numpy bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from gcnemu_machine import BASE, LDS_BYTES, MEMORY_BYTES, Case, State
from gcnemu_numbers import encode
from gcnemu_vector import CDNA4, F16, F32, F64, U32, U64

CASES: list[Case] = []
WINDOW = MEMORY_BYTES - 4096


def case(
    text: str, expect: Callable[[State], None], prepare: Callable[[State], None], **options
) -> None:
    CASES.append(Case(text.split()[0], text, expect, prepare, **{"seeds": 2, **options}))


def on(state: State) -> Iterator[int]:
    return (lane for lane in range(64) if state.exec >> lane & 1)


# --- how loaded bytes meet a register, and stored ones leave it ---
def _keep_low(old: int, x: int) -> int:
    return old & 0xFFFF0000 | x & 0xFFFF


def _keep_high(old: int, x: int) -> int:
    return old & 0xFFFF | (x & 0xFFFF) << 16


LOADS: dict[str, tuple[int, bool, Callable[[int, int], int] | None]] = {  # bytes, signed, merge
    "ubyte": (1, False, None), "sbyte": (1, True, None), "ushort": (2, False, None),
    "sshort": (2, True, None), "dword": (4, False, None), "dwordx2": (8, False, None),
    "dwordx3": (12, False, None), "dwordx4": (16, False, None),
    "short_d16": (2, False, _keep_low), "short_d16_hi": (2, False, _keep_high),
    "ubyte_d16": (1, False, _keep_low), "ubyte_d16_hi": (1, False, _keep_high),
    "sbyte_d16": (1, True, _keep_low), "sbyte_d16_hi": (1, True, _keep_high),
}  # fmt: skip
STORES = {
    "byte": (1, 0), "byte_d16_hi": (1, 16), "short": (2, 0), "short_d16_hi": (2, 16),
    "dword": (4, 0), "dwordx2": (8, 0), "dwordx3": (12, 0), "dwordx4": (16, 0),
}  # fmt: skip
DS_NAMES = {
    "u8": "ubyte", "i8": "sbyte", "u16": "ushort", "i16": "sshort", "b32": "dword", "b64": "dwordx2",
    "b96": "dwordx3", "b128": "dwordx4", "u16_d16": "short_d16", "u16_d16_hi": "short_d16_hi",
    "u8_d16": "ubyte_d16", "u8_d16_hi": "ubyte_d16_hi", "i8_d16": "sbyte_d16",
    "i8_d16_hi": "sbyte_d16_hi",
}  # fmt: skip
DS_STORES = {
    "b8": "byte", "b16": "short", "b32": "dword", "b64": "dwordx2", "b96": "dwordx3",
    "b128": "dwordx4", "b8_d16_hi": "byte_d16_hi", "b16_d16_hi": "short_d16_hi",
}  # fmt: skip


def into(state: State, r: int, lane: int, data: bytes, kind: str) -> None:
    size, signed, merge = LOADS[kind]
    if size >= 4:
        state.v[r : r + size // 4, lane] = np.frombuffer(data, U32)
        return
    x = int.from_bytes(data, "little", signed=signed)
    state.v[r, lane] = merge(int(state.v[r, lane]), x) if merge else x & 0xFFFFFFFF


def outof(state: State, r: int, lane: int, kind: str) -> bytes:
    size, shift = STORES[kind]
    if size >= 4:
        return state.v[r : r + size // 4, lane].tobytes()
    return (int(state.v[r, lane]) >> shift).to_bytes(4, "little")[:size]


def vreg(r: int, size: int, letter: str = "v") -> str:
    n = max(1, size // 4)
    return f"{letter}{r}" if n == 1 else f"{letter}[{r}:{r + n - 1}]"


# --- addresses ---
def vector_address(state: State) -> None:
    """v[2:3]: somewhere in memory, another place for every lane."""
    places = BASE + 2048 + 16 * state.rng.permutation(WINDOW // 16 - 64)[:64].astype(U64)
    state.v[2], state.v[3] = places.astype(U32), (places >> U64(32)).astype(U32)


def scalar_address(state: State) -> None:
    """s[20:21] plus v2."""
    state.set64(20, BASE + 2048)
    state.v[2] = 16 * state.rng.permutation(WINDOW // 16 - 64)[:64]


def at_vector(state: State, lane: int, offset: int) -> int:
    return (int(state.v[2, lane]) | int(state.v[3, lane]) << 32) + offset - BASE


def at_scalar(state: State, lane: int, offset: int) -> int:
    return state.get64(20) + int(state.v[2, lane]) + offset - BASE


FORMS = (  # operands, offset, where it points, preparation
    ("v[2:3], off offset:-40", -40, at_vector, vector_address),
    ("v2, s[20:21] offset:24", 24, at_scalar, scalar_address),
)


def _split(form: str) -> tuple[str, str]:
    address, rest = form.split(", ", 1)
    return address, rest


for _kind, (_size, _, _) in LOADS.items():
    for _form, _offset, _at, _prepare in FORMS:

        def _load(state: State, kind=_kind, at=_at, offset=_offset, size=_size) -> None:
            for lane in on(state):
                p = at(state, lane, offset)
                into(state, 10, lane, state.memory[p : p + size].tobytes(), kind)

        case(f"global_load_{_kind} {vreg(10, _size)}, {_form}", _load, _prepare)

    def _flat(state: State, kind=_kind, size=_size) -> None:
        for lane in on(state):
            p = at_vector(state, lane, 8)
            into(state, 10, lane, state.memory[p : p + size].tobytes(), kind)

    case(f"flat_load_{_kind} {vreg(10, _size)}, v[2:3] offset:8", _flat, vector_address)
for _kind, (_size, _) in STORES.items():
    for _form, _offset, _at, _prepare in FORMS:
        _address, _rest = _split(_form)

        def _store(state: State, kind=_kind, at=_at, offset=_offset, size=_size) -> None:
            for lane in on(state):
                p = at(state, lane, offset)
                state.memory[p : p + size] = np.frombuffer(outof(state, 10, lane, kind), np.uint8)

        case(f"global_store_{_kind} {_address}, {vreg(10, _size)}, {_rest}", _store, _prepare)

    def _flat_store(state: State, kind=_kind, size=_size) -> None:
        for lane in on(state):
            p = at_vector(state, lane, 8)
            state.memory[p : p + size] = np.frombuffer(outof(state, 10, lane, kind), np.uint8)

    case(f"flat_store_{_kind} v[2:3], {vreg(10, _size)} offset:8", _flat_store, vector_address)


# --- atomics ---
def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def _as(dtype):
    width = {F32: "<I", F64: "<Q"}[dtype]

    def value(x: int) -> np.floating:
        return np.frombuffer(x.to_bytes(int(width == "<Q") * 4 + 4, "little"), dtype)[0]

    return value


def _float_bits(x, dtype) -> int:
    return int.from_bytes(np.array(x, dtype).tobytes(), "little")


def _halves_added(name: str) -> Callable[[int, int], int]:
    def both(old: int, x: int) -> int:
        out = 0
        for at in (0, 16):
            a, b = (old >> at & 0xFFFF, x >> at & 0xFFFF)
            if name == "f16":
                values = [float(np.array(v, np.uint16).view(F16)) for v in (a, b)]
            else:
                values = [float(np.array(v << 16, U32).view(F32)) for v in (a, b)]
            out |= encode(values[0] + values[1], name) << at
        return out

    return both


INTEGER_ATOMICS: dict[str, Callable[[int, int], int]] = {
    "add": lambda o, x: o + x, "sub": lambda o, x: o - x, "and": lambda o, x: o & x,
    "or": lambda o, x: o | x, "xor": lambda o, x: o ^ x, "swap": lambda o, x: x,
    "smin": lambda o, x: min(o, x, key=signed), "umin": min,
    "smax": lambda o, x: max(o, x, key=signed), "umax": max,
    "inc": lambda o, x: 0 if o >= x else o + 1,
    "dec": lambda o, x: x if o == 0 or o > x else o - 1,
}  # fmt: skip
ATOMICS: dict[str, tuple[int, Callable[[int, int], int]]] = {
    **{k: (4, f) for k, f in INTEGER_ATOMICS.items()},
    "add_x2": (8, lambda o, x: o + x),
    "and_x2": (8, lambda o, x: o & x),
    "or_x2": (8, lambda o, x: o | x),
    "swap_x2": (8, lambda o, x: x),
    "add_f32": (4, lambda o, x: _float_bits(_as(F32)(o) + _as(F32)(x), F32)),
    "add_f64": (8, lambda o, x: _float_bits(_as(F64)(o) + _as(F64)(x), F64)),
    "min_f64": (8, lambda o, x: _float_bits(min(_as(F64)(o), _as(F64)(x)), F64)),
    "max_f64": (8, lambda o, x: _float_bits(max(_as(F64)(o), _as(F64)(x)), F64)),
    "pk_add_f16": (4, _halves_added("f16")),
    "pk_add_bf16": (4, _halves_added("bf16")),
}


def _is_float(kind: str) -> bool:
    return "f" in kind.replace("cmpswap", "")


def tame(array: np.ndarray, kind: str) -> None:
    """Bits as ordinary floats: no NaN whose payload would matter."""
    if kind.endswith("f32"):
        array.view(U32)[:] = (array.view(U32) & 0x807FFFFF) | 0x3F800000
    elif kind.endswith("f64"):
        array.view(U64)[:] = (array.view(U64) & U64(0x800FFFFFFFFFFFFF)) | U64(0x3FF0000000000000)
    elif "pk_add_f16" in kind:
        array.view(U32)[:] = (array.view(U32) & 0x83FF83FF) | 0x3C003C00
    elif "pk_add_bf16" in kind:
        array.view(U32)[:] = (array.view(U32) & 0x807F807F) | 0x3F803F80


def _atomic_ready(kind: str, size: int, places: Callable[[State], None]):
    def prepare(state: State) -> None:
        places(state)
        tame(state.memory, kind)
        tame(state.lds, kind)
        pairs = np.ascontiguousarray(state.v[6:10].T).copy()
        tame(pairs, kind)
        state.v[6:10] = pairs.T
        if state.rng.integers(0, 2) and not _is_float(kind):
            state.memory[:] &= 3
            state.v[6] &= 3

    return prepare


def _modify(memory: np.ndarray, p: int, size: int, f: Callable[[int], int]) -> int:
    old = int.from_bytes(memory[p : p + size].tobytes(), "little")
    new = f(old) & (1 << 8 * size) - 1
    memory[p : p + size] = np.frombuffer(new.to_bytes(size, "little"), np.uint8)
    return old


def _operand(state: State, lane: int, size: int, r: int = 6) -> int:
    return int.from_bytes(state.v[r : r + size // 4, lane].tobytes(), "little")


def atomic(kind: str, size: int, f, at, offset: int, returns: bool, compare: bool = False):
    def expect(state: State) -> None:
        before = state.copy()
        for lane in on(state):
            x = _operand(before, lane, size)
            if compare:
                y = _operand(before, lane, size, 6 + size // 4)
                old = _modify(
                    state.memory,
                    at(before, lane, offset),
                    size,
                    lambda o, x=x, y=y: x if o == y else o,
                )
            else:
                old = _modify(state.memory, at(before, lane, offset), size, lambda o, x=x: f(o, x))
            if returns:
                state.v[12 : 12 + size // 4, lane] = np.frombuffer(
                    old.to_bytes(size, "little"), U32
                )

    return expect


def compare_ready(size: int, places: Callable[[State], None], at, offset: int):
    """Half of the lanes expect what is there."""

    def prepare(state: State) -> None:
        places(state)
        for lane in range(0, 64, 2):
            p = at(state, lane, offset)
            n = size // 4
            state.v[6 + n : 6 + 2 * n, lane] = np.frombuffer(
                state.memory[p : p + size].tobytes(), U32
            )

    return prepare


for _kind, (_size, _f) in ATOMICS.items():
    _ready = _atomic_ready(_kind, _size, vector_address)
    _x, _d = vreg(6, _size), vreg(12, _size)
    case(
        f"global_atomic_{_kind} v[2:3], {_x}, off offset:16",
        atomic(_kind, _size, _f, at_vector, 16, False),
        _ready,
    )
    case(
        f"global_atomic_{_kind} {_d}, v[2:3], {_x}, off offset:16 sc0",
        atomic(_kind, _size, _f, at_vector, 16, True), _ready,
    )  # fmt: skip
    case(
        f"flat_atomic_{_kind} v[2:3], {_x} offset:16",
        atomic(_kind, _size, _f, at_vector, 16, False),
        _ready,
    )
for _kind, _size in (("cmpswap", 4), ("cmpswap_x2", 8)):
    _ready = compare_ready(_size, vector_address, at_vector, 16)
    _x, _d = vreg(6, 2 * _size), vreg(12, _size)
    case(
        f"global_atomic_{_kind} {_d}, v[2:3], {_x}, off offset:16 sc0",
        atomic(_kind, _size, None, at_vector, 16, True, True), _ready,
    )  # fmt: skip
    case(
        f"flat_atomic_{_kind} v[2:3], {_x} offset:16",
        atomic(_kind, _size, None, at_vector, 16, False, True), _ready,
    )  # fmt: skip


# --- buffers ---
RECORDS = 8192


def buffer_ready(state: State) -> None:
    """s[20:23] a raw resource, s24 a scalar offset, v2 offsets: some beyond, some wrapping."""
    state.set64(20, BASE + 4096)
    state.s[22], state.s[23], state.s[24] = RECORDS, 0x00027000, 64
    state.v[2] = 16 * state.rng.permutation(RECORDS // 16 - 8)[:64]
    state.v[2][5] = RECORDS + 512  # beyond
    state.v[2][6] = RECORDS - 64 - 32 - 8  # the last dwords of a wide access lie beyond
    state.v[2][7] = 0xFFFFFFF0  # wraps around with the constant offset
    state.v[2][8] = 0x80000000  # how compilers mask a lane: beyond, and not worth a note
    state.exec |= 0xE0


def buffer_at(state: State, lane: int, offset: int) -> int:
    """Byte offset within the buffer, modulo 2^32 (without the scalar offset)."""
    return (int(state.v[2, lane]) + offset) & 0xFFFFFFFF


def inside(state: State, at: int, size: int) -> bool:
    return at + int(state.s[24]) + size <= int(state.s[22])


def buffer_read(state: State, lane: int, size: int, offset: int) -> bytes:
    """Dword by dword (or the whole of a smaller element); zero outside."""
    out, step = b"", min(size, 4)
    for n in range(0, size, step):
        at = buffer_at(state, lane, offset) + n
        p = 4096 + int(state.s[24]) + at
        out += state.memory[p : p + step].tobytes() if inside(state, at, step) else bytes(step)
    return out


for _kind, (_size, _, _) in LOADS.items():

    def _buffer_load(state: State, kind=_kind, size=_size) -> None:
        for lane in on(state):
            into(state, 10, lane, buffer_read(state, lane, size, 32), kind)

    case(
        f"buffer_load_{_kind} {vreg(10, _size)}, v2, s[20:23], s24 offen offset:32", _buffer_load,
        buffer_ready, notes=(6,),
    )  # fmt: skip
for _kind, (_size, _) in STORES.items():

    def _buffer_store(state: State, kind=_kind, size=_size) -> None:
        step = min(size, 4)
        for lane in on(state):
            data = outof(state, 10, lane, kind)
            for n in range(0, size, step):
                at = buffer_at(state, lane, 32) + n
                if inside(state, at, step):
                    p = 4096 + int(state.s[24]) + at
                    state.memory[p : p + step] = np.frombuffer(data[n : n + step], np.uint8)

    case(
        f"buffer_store_{_kind} {vreg(10, _size)}, v2, s[20:23], s24 offen offset:32", _buffer_store,
        buffer_ready, notes=(7,),
    )  # fmt: skip


def _structured(state: State) -> None:
    """Stride 48, 100 records, index in v2, offset in v3."""
    state.set64(20, BASE + 4096 | 48 << 48)
    state.s[22], state.s[23], state.s[24] = 100, 0x00027000, 0
    state.v[2] = state.rng.integers(0, 100, 64)
    state.v[2][9] = 100
    state.v[3] = 4 * state.rng.integers(0, 8, 64)
    state.exec |= 1 << 9


def _load_structured(state: State) -> None:
    for lane in on(state):
        p = 4096 + 48 * int(state.v[2, lane]) + int(state.v[3, lane]) + 8
        data = state.memory[p : p + 4].tobytes() if state.v[2, lane] < 100 else bytes(4)
        into(state, 10, lane, data, "dword")


case(
    "buffer_load_dword v10, v[2:3], s[20:23], s24 idxen offen offset:8",
    _load_structured,
    _structured,
    notes=(6,),
)


def buffer_atomic(kind: str, size: int, f, returns: bool, compare: bool = False):
    def expect(state: State) -> None:
        before = state.copy()
        for lane in on(state):
            at = buffer_at(before, lane, 32)
            old = 0
            if inside(state, at, size):
                x, y = _operand(before, lane, size), _operand(before, lane, size, 6 + size // 4)
                g = (
                    (lambda o, x=x, y=y: x if o == y else o)
                    if compare
                    else (lambda o, x=x: f(o, x))
                )
                old = _modify(state.memory, 4096 + int(state.s[24]) + at, size, g)
            if returns:
                state.v[6 : 6 + size // 4, lane] = np.frombuffer(old.to_bytes(size, "little"), U32)

    return expect


for _kind, (_size, _f) in {**ATOMICS, "cmpswap": (4, None), "cmpswap_x2": (8, None)}.items():
    _compare = _kind.startswith("cmpswap")
    _ready = _atomic_ready(_kind, _size, buffer_ready)
    if _compare:

        def _ready(state: State, size=_size) -> None:
            buffer_ready(state)
            for lane in range(0, 64, 2):
                p = 4096 + int(state.s[24]) + buffer_at(state, lane, 32)
                if p < MEMORY_BYTES - 8:
                    n = size // 4
                    state.v[6 + n : 6 + 2 * n, lane] = np.frombuffer(
                        state.memory[p : p + size].tobytes(), U32
                    )

    _x = vreg(6, _size * (2 if _compare else 1))
    _archs = CDNA4 if _kind == "pk_add_bf16" else ("gfx942", "gfx950")
    for _tail, _returns in (("", False), (" sc0", True)):
        case(
            f"buffer_atomic_{_kind} {_x}, v2, s[20:23], s24 offen offset:32{_tail}",
            buffer_atomic(_kind, _size, _f, _returns, _compare), _ready, notes=(7,), archs=_archs,
        )  # fmt: skip


# --- straight to LDS ---
def lds_at(state: State, lane: int, size: int, offset: int) -> int:
    return int(state.s[124]) + offset + lane * size


def _with_m0(places: Callable[[State], None]):
    def prepare(state: State) -> None:
        places(state)
        state.s[124] = 128

    return prepare


for _kind, _size, _archs in (
    ("dword", 4, ("gfx942", "gfx950")), ("dwordx3", 12, CDNA4), ("dwordx4", 16, CDNA4),
):  # fmt: skip

    def _dma(state: State, size=_size) -> None:
        for lane in on(state):
            p, q = at_vector(state, lane, 16), lds_at(state, lane, size, 16)
            state.lds[q : q + size] = state.memory[p : p + size]

    case(
        f"global_load_lds_{_kind} v[2:3], off offset:16",
        _dma,
        _with_m0(vector_address),
        archs=_archs,
    )

    def _buffer_dma(state: State, size=_size) -> None:
        for lane in on(state):
            q = lds_at(state, lane, size, 32)
            state.lds[q : q + size] = np.frombuffer(buffer_read(state, lane, size, 32), np.uint8)

    case(
        f"buffer_load_{_kind} v2, s[20:23], s24 offen offset:32 lds", _buffer_dma, _with_m0(buffer_ready),
        archs=_archs, notes=(6,),
    )  # fmt: skip

# --- scratch: 256 bytes per lane, filled with the first bytes of memory ---
for _kind, (_size, _, _) in LOADS.items():

    def _scratch_load(state: State, kind=_kind, size=_size) -> None:
        for lane in on(state):
            p = 256 * lane + 48 + int(state.v[2, lane])
            into(state, 10, lane, state.memory[p : p + size].tobytes(), kind)

    def _small_offset(state: State) -> None:
        state.v[2] = 16 * state.rng.integers(0, 8, 64)

    case(f"scratch_load_{_kind} {vreg(10, _size)}, v2, off offset:48", _scratch_load, _small_offset)
for _kind, (_size, _) in STORES.items():

    def _scratch_store(state: State, kind=_kind, size=_size) -> None:
        state.scratch = state.memory[: 64 * 256].copy()
        for lane in on(state):
            p = 256 * lane + 16 + int(state.s[20])
            state.scratch[p : p + size] = np.frombuffer(outof(state, 10, lane, kind), np.uint8)

    def _scalar_offset(state: State) -> None:
        state.s[20] = 64

    case(
        f"scratch_store_{_kind} off, {vreg(10, _size)}, s20 offset:16",
        _scratch_store,
        _scalar_offset,
    )


# --- LDS ---
def lds_address(state: State) -> None:
    state.v[2] = 16 * state.rng.permutation(LDS_BYTES // 16 - 64)[:64]


for _name, _kind in DS_NAMES.items():

    def _ds_read(state: State, kind=_kind) -> None:
        for lane in on(state):
            p = int(state.v[2, lane]) + 48
            into(state, 10, lane, state.lds[p : p + LOADS[kind][0]].tobytes(), kind)

    case(f"ds_read_{_name} {vreg(10, LOADS[_kind][0])}, v2 offset:48", _ds_read, lds_address)
for _name, _kind in DS_STORES.items():

    def _ds_write(state: State, kind=_kind) -> None:
        for lane in on(state):
            p = int(state.v[2, lane]) + 48
            data = outof(state, 10, lane, kind)
            state.lds[p : p + len(data)] = np.frombuffer(data, np.uint8)

    case(f"ds_write_{_name} v2, {vreg(10, STORES[_kind][0])} offset:48", _ds_write, lds_address)


def _outside(state: State) -> None:
    lds_address(state)
    state.v[2][3] = LDS_BYTES - 48
    state.exec |= 8


def _read_outside(state: State) -> None:
    for lane in on(state):
        p = int(state.v[2, lane]) + 48
        state.v[10, lane] = 0 if p + 4 > LDS_BYTES else state.lds[p : p + 4].view(U32)[0]


case("ds_read_b32 v10, v2 offset:48", _read_outside, _outside, notes=(2,))
for _size in (4, 8):
    for _infix, _unit in (("", _size), ("st64", 64 * _size)):
        _x, _y = (3, 1) if _infix else (9, 2)
        _n = _size // 4

        def _near(state: State, top=_x * _unit + 8) -> None:
            state.v[2] = 8 * state.rng.permutation((LDS_BYTES - top) // 8 - 8)[:64]

        def _read2(state: State, size=_size, unit=_unit, x=_x, y=_y) -> None:
            for lane in on(state):
                p = int(state.v[2, lane])
                both = [state.lds[p + k * unit : p + k * unit + size].tobytes() for k in (x, y)]
                state.v[10 : 10 + size // 2, lane] = np.frombuffer(b"".join(both), U32)

        def _write2(state: State, size=_size, unit=_unit, x=_x, y=_y) -> None:
            for lane in on(state):
                p = int(state.v[2, lane])
                for k, r in ((x, 10), (y, 14)):
                    data = state.v[r : r + size // 4, lane].tobytes()
                    state.lds[p + k * unit : p + k * unit + size] = np.frombuffer(data, np.uint8)

        _tail = f"offset0:{_x} offset1:{_y}"
        case(f"ds_read2{_infix}_b{8 * _size} v[10:{9 + 2 * _n}], v2 {_tail}", _read2, _near)
        case(
            f"ds_write2{_infix}_b{8 * _size} v2, {vreg(10, _size)}, {vreg(14, _size)} {_tail}",
            _write2,
            _near,
        )


def _number(f, value) -> Callable[[int, int], int]:
    return lambda o, x: _float_bits(f(value(o), value(x)), F32)


DS_ATOMICS: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "add_u32": (4, INTEGER_ATOMICS["add"]), "sub_u32": (4, INTEGER_ATOMICS["sub"]),
    "rsub_u32": (4, lambda o, x: x - o), "inc_u32": (4, INTEGER_ATOMICS["inc"]),
    "dec_u32": (4, INTEGER_ATOMICS["dec"]), "min_i32": (4, INTEGER_ATOMICS["smin"]),
    "max_i32": (4, INTEGER_ATOMICS["smax"]), "min_u32": (4, min), "max_u32": (4, max),
    "and_b32": (4, INTEGER_ATOMICS["and"]), "or_b32": (4, INTEGER_ATOMICS["or"]),
    "xor_b32": (4, INTEGER_ATOMICS["xor"]), "add_f32": ATOMICS["add_f32"],
    "min_f32": (4, _number(min, _as(F32))), "max_f32": (4, _number(max, _as(F32))),
    "add_u64": ATOMICS["add_x2"], "or_b64": ATOMICS["or_x2"], "and_b64": ATOMICS["and_x2"],
    "add_f64": ATOMICS["add_f64"], "pk_add_f16": ATOMICS["pk_add_f16"],
    "pk_add_bf16": ATOMICS["pk_add_bf16"],
}  # fmt: skip


def ds_atomic(size: int, f, returns: bool, operands: int = 1):
    def expect(state: State) -> None:
        before = state.copy()
        for lane in on(state):
            p = int(before.v[2, lane]) + 16
            x, y = _operand(before, lane, size), _operand(before, lane, size, 8)
            g = (lambda o, x=x, y=y: f(o, x, y)) if operands == 2 else (lambda o, x=x: f(o, x))
            old = _modify(state.lds, p, size, g)
            if returns:
                state.v[12 : 12 + size // 4, lane] = np.frombuffer(
                    old.to_bytes(size, "little"), U32
                )

    return expect


for _name, (_size, _f) in DS_ATOMICS.items():
    _ready = _atomic_ready(_name, _size, lds_address)
    case(f"ds_{_name} v2, {vreg(6, _size)} offset:16", ds_atomic(_size, _f, False), _ready)
    _op, _, _suffix = _name.rpartition("_")
    case(
        f"ds_{_op}_rtn_{_suffix} {vreg(12, _size)}, v2, {vreg(6, _size)} offset:16",
        ds_atomic(_size, _f, True),
        _ready,
    )
case("ds_wrxchg_rtn_b32 v12, v2, v6 offset:16", ds_atomic(4, lambda o, x: x, True), lds_address)


def _half_equal(state: State) -> None:
    lds_address(state)
    for lane in range(0, 64, 2):
        p = int(state.v[2, lane]) + 16
        state.v[6, lane] = state.lds[p : p + 4].view(U32)[0]


_swap = lambda o, compare, new: new if o == compare else o
case("ds_cmpst_b32 v2, v6, v8 offset:16", ds_atomic(4, _swap, False, 2), _half_equal)
case("ds_cmpst_rtn_b32 v12, v2, v6, v8 offset:16", ds_atomic(4, _swap, True, 2), _half_equal)


# --- the crossbar ---
def _bpermute(state: State) -> None:
    before = state.copy()
    for lane in on(state):
        k = (int(before.v[2, lane]) + 8) // 4 % 64
        state.v[10, lane] = before.v[4, k] if before.exec >> k & 1 else 0


def _permute(state: State) -> None:
    before, out = state.copy(), np.zeros(64, U32)
    for lane in on(state):
        out[(int(before.v[2, lane]) + 8) // 4 % 64] = before.v[4, lane]
    for lane in on(state):
        state.v[10, lane] = out[lane]


case("ds_bpermute_b32 v10, v2, v4 offset:8", _bpermute, lambda state: None)
case("ds_permute_b32 v10, v2, v4 offset:8", _permute, lambda state: None)
SWIZZLES: dict[str, Callable[[int], int]] = {
    "swizzle(QUAD_PERM, 3, 0, 2, 1)": lambda l: l // 4 * 4 + (3, 0, 2, 1)[l % 4],
    'swizzle(BITMASK_PERM, "01pi0")': lambda l: l // 32 * 32 + (8 | l & 4 | ~l & 2),
    "swizzle(SWAP, 4)": lambda l: l ^ 4,
    "swizzle(REVERSE, 8)": lambda l: l // 8 * 8 + 7 - l % 8,
    "swizzle(BROADCAST, 8, 5)": lambda l: l // 8 * 8 + 5,
    "0x801f": lambda l: l // 4 * 4 + (3, 3, 1, 0)[l % 4],
    "0x041f": lambda l: l ^ 1,
}
for _text, _source in SWIZZLES.items():

    def _swizzle(state: State, source=_source) -> None:
        before = state.copy()
        for lane in on(state):
            k = source(lane)
            state.v[10, lane] = before.v[4, k] if before.exec >> k & 1 else 0

    case(f"ds_swizzle_b32 v10, v4 offset:{_text}", _swizzle, lambda state: None)


# --- transposed reads ---
def transposed(bits: int, size: int):
    per_lane = 8 * size // bits

    def expect(state: State) -> None:
        for block in range(4):
            # Sixteen lanes' elements in reading order, as a matrix of rows of sixteen.
            elements = []
            for lane in range(16 * block, 16 * block + 16):
                p = int(state.v[2, lane]) + 16
                number = int.from_bytes(state.lds[p : p + size].tobytes(), "little")
                elements += [number >> bits * k & (1 << bits) - 1 for k in range(per_lane)]
            matrix = np.array(elements, object).reshape(per_lane, 16)
            for lane in range(16):
                number = sum(int(x) << bits * k for k, x in enumerate(matrix[:, lane]))
                state.v[10 : 10 + size // 4, 16 * block + lane] = np.frombuffer(
                    number.to_bytes(size, "little"), U32
                )

    return expect


def _all_lanes(state: State) -> None:
    lds_address(state)
    state.exec = (1 << 64) - 1


for _bits in (16, 8, 4):
    case(
        f"ds_read_b64_tr_b{_bits} v[10:11], v2 offset:16",
        transposed(_bits, 8),
        _all_lanes,
        archs=CDNA4,
    )
