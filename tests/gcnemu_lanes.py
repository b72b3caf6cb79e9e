"""Compares, lane exchange, DPP, SDWA and packed instructions, from the ISA documents, in numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gcnemu_machine import Case, State
from gcnemu_numbers import encode, fma
from gcnemu_vector import (
    CDNA4,
    F16,
    F32,
    F64,
    SPECIAL_F16,
    SPECIAL_F32,
    U32,
    _number_max,
    _number_min,
    _wins,
    fill,
    read,
    reg,
    typed,
    write,
)

CASES: list[Case] = []
S16 = np.int16


# --- compares ---
def _lanes_to_int(bits: np.ndarray) -> int:
    return sum(int(x) << n for n, x in enumerate(bits.tolist()))


FLOAT: dict[str, Callable] = {
    "f": lambda a, b: np.zeros(64, bool),
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "lg": lambda a, b: (a < b) | (a > b),
    "ge": lambda a, b: a >= b,
    "o": lambda a, b: ~np.isnan(a) & ~np.isnan(b),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "nge": lambda a, b: np.isnan(a) | np.isnan(b) | (a < b),
    "nlg": lambda a, b: np.isnan(a) | np.isnan(b) | (a == b),
    "ngt": lambda a, b: np.isnan(a) | np.isnan(b) | (a <= b),
    "nle": lambda a, b: np.isnan(a) | np.isnan(b) | (a > b),
    "neq": lambda a, b: np.isnan(a) | np.isnan(b) | (a != b),
    "nlt": lambda a, b: np.isnan(a) | np.isnan(b) | (a >= b),
    "tru": lambda a, b: np.ones(64, bool),
}
INTEGER: dict[str, Callable] = {
    "f": FLOAT["f"], "lt": FLOAT["lt"], "eq": FLOAT["eq"], "le": FLOAT["le"], "gt": FLOAT["gt"],
    "ne": lambda a, b: a != b, "ge": FLOAT["ge"], "t": FLOAT["tru"],
}  # fmt: skip


def _compare_ready(type: str):
    def prepare(state: State) -> None:
        fill(state, 2, type), fill(state, 4, type)
        same = state.rng.integers(0, 2, 64) == 1
        for r in (0, 1):
            state.v[4 + r] = np.where(same, state.v[2 + r], state.v[4 + r])

    return prepare


def _compare(name: str, type: str, f: Callable, exec_too: bool) -> None:
    def result(state: State, a: np.ndarray, b: np.ndarray, to_vcc: bool) -> None:
        bits = _lanes_to_int(f(a, b)) & state.exec
        if to_vcc:
            state.vcc = bits
        else:
            state.set64(22, bits)
        if exec_too:
            state.exec = bits

    def pair(state: State) -> None:
        result(state, read(state, 2, type), read(state, 4, type), False)

    def vcc(state: State) -> None:
        result(state, read(state, 2, type), read(state, 4, type), True)

    ready = _compare_ready(type)
    operands = f"{reg(2, type)}, {reg(4, type)}"
    CASES.append(Case(name, f"{name}_e64 s[22:23], {operands}", pair, ready))
    CASES.append(Case(name, f"{name}_e32 vcc, {operands}", vcc, ready, seeds=1))
    if type[0] == "f":

        def signs(state: State) -> None:
            result(state, -read(state, 2, type), np.abs(read(state, 4, type)), False)

        text = f"{name}_e64 s[22:23], -{reg(2, type)}, |{reg(4, type)}|"
        CASES.append(Case(name, text, signs, ready, seeds=1))


def _class_of(x: np.ndarray) -> np.ndarray:
    """ISA V_CMP_CLASS: one of ten bits, from signalling NaN (0) to positive infinity (9)."""
    quiet = {F32: (U32, 22), F16: (np.uint16, 9), F64: (np.uint64, 51)}[x.dtype.type]
    is_quiet = x.view(quiet[0]) >> quiet[0](quiet[1]) & quiet[0](1) == 1
    negative, size = np.signbit(x), np.abs(x)
    normal = size >= np.finfo(x.dtype).tiny
    kind = np.select(
        [np.isnan(x) & ~is_quiet, np.isnan(x), np.isinf(x) & negative, np.isinf(x),
         (x == 0) & negative, x == 0, normal & negative, normal, negative],
        [0, 1, 2, 9, 5, 6, 3, 8, 4], 7,
    )  # fmt: skip
    return 1 << kind


def _class(name: str, type: str, exec_too: bool) -> None:
    def prepare(state: State) -> None:
        fill(state, 2, type)
        if type == "f32":
            state.v[2][:32] = SPECIAL_F32
        if type == "f16":
            state.v[2][:16] = SPECIAL_F16
        if type == "f64":
            for n in range(8):
                code = [
                    0x7FF0 << 48 | 1,
                    0x7FF8 << 48,
                    0xFFF0 << 48,
                    0x8000 << 48 | 5,
                    1 << 63,
                    0,
                    7,
                    0x7FF0 << 48,
                ][n]
                state.v[2][n], state.v[3][n] = code & 0xFFFFFFFF, code >> 32
        state.v[4] = 1 << state.rng.integers(0, 10, 64) | 1 << state.rng.integers(0, 10, 64)

    def expect(state: State) -> None:
        hit = _class_of(read(state, 2, type)) & state.v[4].astype(np.int64) & 1023 != 0
        bits = _lanes_to_int(hit) & state.exec
        state.set64(22, bits)
        if exec_too:
            state.exec = bits

    CASES.append(Case(name, f"{name}_e64 s[22:23], {reg(2, type)}, v4", expect, prepare))


for _prefix, _exec in (("v_cmp", False), ("v_cmpx", True)):
    for _type in ("f16", "f32", "f64"):
        for _name, _f in FLOAT.items():
            _compare(f"{_prefix}_{_name}_{_type}", _type, _f, _exec)
        _class(f"{_prefix}_class_{_type}", _type, _exec)
    for _type in ("i16", "u16", "i32", "u32", "i64", "u64"):
        for _name, _f in INTEGER.items():
            _compare(f"{_prefix}_{_name}_{_type}", _type, _f, _exec)


def case(text: str, expect: Callable[[State], None], prepare=None, **options) -> None:
    name = text.split()[0]
    for suffix in ("_e32", "_e64", "_dpp", "_sdwa"):
        name = name.removesuffix(suffix)
    CASES.append(Case(name, text, expect, prepare or (lambda state: None), **options))


def _literal(type: str, value: int):
    def expect(state: State) -> None:
        state.vcc = _lanes_to_int(value < read(state, 4, type)) & state.exec

    return expect


# A 32-bit literal of a 64-bit operand: extended with its sign, or with zeros; a float's high half.
case("v_cmp_lt_i64_e32 vcc, 0xfffe7960, v[4:5]", _literal("i64", -100000), _compare_ready("i64"))
case("v_cmp_lt_u64_e32 vcc, 0xfffe7960, v[4:5]", _literal("u64", 0xFFFE7960), _compare_ready("u64"))
case("v_cmp_lt_f64_e32 vcc, 0x40934800, v[4:5]", _literal("f64", 1234), _compare_ready("f64"))


# --- lanes and scalars ---
def _first(state: State) -> None:
    lane = (state.exec & -state.exec).bit_length() - 1 if state.exec else 0
    state.s[10] = state.v[2][lane]


def _maybe_empty(state: State) -> None:
    if state.rng.integers(0, 3) == 0:
        state.exec = 0


case("v_readfirstlane_b32 s10, v2", _first, _maybe_empty, seeds=8)


def _readlane(state: State) -> None:
    state.s[10] = state.v[2][int(state.s[20]) % 64]


def _readlane5(state: State) -> None:
    state.s[10] = state.v[2][5]


def _writelane(state: State) -> None:
    state.v[10][int(state.s[20]) % 64] = 0xFFFFFFFD


def _writelane5(state: State) -> None:
    state.v[10][5] = state.s[24]


case("v_readlane_b32 s10, v2, s20", _readlane)
case("v_readlane_b32 s10, v2, 5", _readlane5)
case("v_writelane_b32 v10, -3, s20", _writelane)
case("v_writelane_b32 v10, s24, 5", _writelane5)


def _mbcnt(low: bool):
    def expect(state: State) -> None:
        counts = []
        for lane, (mask, base) in enumerate(
            zip(state.v[2].tolist(), state.v[4].tolist(), strict=True)
        ):
            below = (1 << lane) - 1
            part = below & 0xFFFFFFFF if low else below >> 32
            counts.append((mask & part).bit_count() + base & 0xFFFFFFFF)
        write(state, 10, np.array(counts, U32), "u32")

    return expect


case("v_mbcnt_lo_u32_b32 v10, v2, v4", _mbcnt(True))
case("v_mbcnt_hi_u32_b32 v10, v2, v4", _mbcnt(False))


def _to_acc(state: State) -> None:
    state.v[256 + 3][state.active] = state.v[2][state.active]


def _from_acc(state: State) -> None:
    state.v[10][state.active] = state.v[256 + 3][state.active]


case("v_accvgpr_write_b32 a3, v2", _to_acc)
case("v_accvgpr_read_b32 v10, a3", _from_acc)


def _swap(state: State) -> None:
    on = state.active
    state.v[2][on], state.v[4][on] = state.v[4][on].copy(), state.v[2][on].copy()


case("v_swap_b32 v2, v4", _swap)


def _everyone(state: State) -> None:
    state.exec = (1 << 64) - 1


def _permlane(half: int):
    def expect(state: State) -> None:
        a, b = (state.v[r].reshape(-1, 2, half) for r in (2, 4))
        a[:, 1], b[:, 0] = b[:, 0].copy(), a[:, 1].copy()

    return expect


case("v_permlane16_swap_b32 v2, v4", _permlane(16), _everyone, archs=CDNA4)
case("v_permlane32_swap_b32 v2, v4", _permlane(32), _everyone, archs=CDNA4)

# --- DPP: source lane (-1: none) per control ---
DPP: dict[str, Callable[[int], int]] = {
    "quad_perm:[3,1,0,2]": lambda l: l // 4 * 4 + (3, 1, 0, 2)[l % 4],
    "row_shl:3": lambda l: l + 3 if l % 16 + 3 < 16 else -1,
    "row_shr:5": lambda l: l - 5 if l % 16 >= 5 else -1,
    "row_ror:4": lambda l: l // 16 * 16 + (l - 4) % 16,
    "wave_shl:1": lambda l: l + 1 if l < 63 else -1,
    "wave_rol:1": lambda l: (l + 1) % 64,
    "wave_shr:1": lambda l: l - 1,
    "wave_ror:1": lambda l: (l - 1) % 64,
    "row_mirror": lambda l: l // 16 * 16 + 15 - l % 16,
    "row_half_mirror": lambda l: l // 8 * 8 + 7 - l % 8,
    "row_bcast:15": lambda l: l // 16 * 16 - 1,
    "row_bcast:31": lambda l: 31 if l >= 32 else -1,
    "row_newbcast:6": lambda l: l // 16 * 16 + 6,
}


def _dpp(control: str, source: Callable[[int], int], rows: int, banks: int, bound: bool) -> None:
    def moved(state: State) -> tuple[np.ndarray, np.ndarray]:
        values, writes = np.zeros(64, U32), np.zeros(64, bool)
        for lane in range(64):
            at = source(lane)
            valid = at >= 0 and state.exec >> at & 1
            values[lane] = state.v[2][at] if valid else 0
            enabled = rows >> lane // 16 & 1 and banks >> lane // 4 % 4 & 1
            writes[lane] = bool(state.exec >> lane & 1 and enabled and (valid or bound))
        return values, writes

    def mov(state: State) -> None:
        values, writes = moved(state)
        state.v[10][writes] = values[writes]

    def add(state: State) -> None:
        values, writes = moved(state)
        with np.errstate(all="ignore"):
            out = (values.view(F32) + state.v[4].view(F32)).view(U32)
        state.v[10][writes] = out[writes]

    tail = f"{control} row_mask:{rows:#x} bank_mask:{banks:#x}" + (" bound_ctrl:0" if bound else "")
    case(f"v_mov_b32_dpp v10, v2 {tail}", mov, seeds=2)
    case(f"v_add_f32_dpp v10, v2, v4 {tail}", add, nan="f32", seeds=1)


for _control, _source in DPP.items():
    _dpp(_control, _source, 15, 15, True)
    _dpp(_control, _source, 10, 7, False)

# --- SDWA ---
_FIELDS = {
    "BYTE_0": (0, 8), "BYTE_1": (8, 8), "BYTE_2": (16, 8), "BYTE_3": (24, 8), "WORD_0": (0, 16),
    "WORD_1": (16, 16), "DWORD": (0, 32),
}  # fmt: skip


def _cut(x: np.ndarray, field: str, signed: bool = False) -> np.ndarray:
    at, width = _FIELDS[field]
    y = x.astype(np.int64) >> at & (1 << width) - 1
    if signed:
        y = np.where(y >> (width - 1) & 1 == 1, y - (1 << width), y)
    return y & 0xFFFFFFFF


for _field in _FIELDS:
    for _unused in ("UNUSED_PAD", "UNUSED_PRESERVE"):

        def _or(state: State, field: str = _field, unused: str = _unused) -> None:
            d = _cut(state.v[2], field) | _cut(state.v[4], "WORD_1")
            at, width = _FIELDS[field]
            mask = (1 << width) - 1
            kept = (
                state.v[10].astype(np.int64) & ~(mask << at) if unused.endswith("PRESERVE") else 0
            )
            out = (d & mask) << at | kept
            write(state, 10, out.astype(U32), "u32")

        case(
            f"v_or_b32_sdwa v10, v2, v4 dst_sel:{_field} dst_unused:{_unused} src0_sel:{_field} src1_sel:WORD_1",
            _or, seeds=1,
        )  # fmt: skip

    def _sext(state: State, field: str = _field) -> None:
        write(
            state,
            10,
            (_cut(state.v[2], field, True) + state.v[4]).astype(np.int64).astype(U32),
            "u32",
        )

    if _field != "DWORD":
        case(
            f"v_add_u32_sdwa v10, sext(v2), v4 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{_field} src1_sel:DWORD",
            _sext, seeds=1,
        )  # fmt: skip


def _cmp_sdwa(state: State) -> None:
    bits = _lanes_to_int(_cut(state.v[2], "BYTE_2") == _cut(state.v[4], "BYTE_0")) & state.exec
    state.vcc = bits


def _cmp_ready(state: State) -> None:
    state.v[2] &= U32(0xFF03FFFF)
    state.v[4] &= U32(0xFFFFFF03)


case("v_cmp_eq_u32_sdwa vcc, v2, v4 src0_sel:BYTE_2 src1_sel:BYTE_0", _cmp_sdwa, _cmp_ready)


# --- packed ---
def _pk16(
    name: str, type: str, f: Callable, n: int, archs=("gfx942", "gfx950"), clamp: bool = False
) -> None:
    is_float = type == "f16"

    def ready(state: State) -> None:
        for r in (2, 4, 6)[:n]:
            fill(state, r, type)

    def run(
        state: State, low: list[int], high: list[int], neg_low: list[int], neg_high: list[int]
    ) -> None:
        halves = []
        for select, negate in ((low, neg_low), (high, neg_high)):
            xs = [typed(state.v[r] >> 16 * select[k], type) for k, r in enumerate((2, 4, 6)[:n])]
            if is_float:
                xs = [-x if negate[k] else x for k, x in enumerate(xs)]
            with np.errstate(all="ignore"):
                d = f(*xs)
            halves.append(
                np.asarray(d).astype(np.int64).astype(np.uint16)
                if not is_float
                else np.asarray(d).astype(F16).view(np.uint16)
            )
        write(state, 10, halves[0].astype(U32) | halves[1].astype(U32) << 16, "u32")

    sources = ", ".join(f"v{r}" for r in (2, 4, 6)[:n])
    zeros, ones = [0] * n, [1] * n
    options = {"nan": "pk16" if is_float else "", "archs": archs}
    case(f"{name} v10, {sources}", lambda s: run(s, zeros, ones, zeros, zeros), ready, **options)
    low, high = [1, 0, 1][:n], [0, 1, 0][:n]
    text = f"{name} v10, {sources} op_sel:{low} op_sel_hi:{high}".replace(", ", ",").replace(
        ",v", ", v"
    )
    neg_low, neg_high = zeros, zeros
    if is_float:
        neg_low, neg_high = [1, 0, 1][:n], [0, 1, 1][:n]
        text += f" neg_lo:{neg_low} neg_hi:{neg_high}".replace(", ", ",")
    case(text, lambda s: run(s, low, high, neg_low, neg_high), ready, **options)


def _halves(f: Callable) -> Callable:
    """Rounded once to half precision."""
    return lambda *a: np.array(
        [encode(float(f(*map(F64, r))), "f16") for r in zip(*(x.tolist() for x in a), strict=True)],
        np.uint16,
    ).view(F16)


_pk16("v_pk_add_f16", "f16", _halves(lambda a, b: a + b), 2)
_pk16("v_pk_mul_f16", "f16", _halves(lambda a, b: a * b), 2)
_pk16(
    "v_pk_fma_f16",
    "f16",
    lambda a, b, c: np.array(
        [fma(*r, "f16") for r in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], np.uint16
    ).view(F16),
    3,
)
_pk16("v_pk_max_f16", "f16", _number_max, 2)
_pk16("v_pk_min_f16", "f16", _number_min, 2)
_pk16("v_pk_maximum3_f16", "f16", lambda a, b, c: _wins(_wins(a, b, True), c, True), 3, CDNA4)
_pk16("v_pk_minimum3_f16", "f16", lambda a, b, c: _wins(_wins(a, b, False), c, False), 3, CDNA4)
L = np.int64
for _name, _type, _f, _n in (
    ("v_pk_add_u16", "u16", lambda a, b: a.astype(L) + b, 2),
    ("v_pk_add_i16", "i16", lambda a, b: a.astype(L) + b, 2),
    ("v_pk_sub_u16", "u16", lambda a, b: a.astype(L) - b, 2),
    ("v_pk_sub_i16", "i16", lambda a, b: a.astype(L) - b, 2),
    ("v_pk_mul_lo_u16", "u16", lambda a, b: a.astype(L) * b, 2),
    ("v_pk_max_u16", "u16", np.maximum, 2),
    ("v_pk_min_u16", "u16", np.minimum, 2),
    ("v_pk_max_i16", "i16", np.maximum, 2),
    ("v_pk_min_i16", "i16", np.minimum, 2),
    ("v_pk_lshlrev_b16", "u16", lambda a, b: b.astype(L) << (a % 16).astype(L), 2),
    ("v_pk_lshrrev_b16", "u16", lambda a, b: b.astype(L) >> (a % 16).astype(L), 2),
    ("v_pk_ashrrev_i16", "i16", lambda a, b: b.astype(L) >> (a.astype(L) & 15), 2),
    ("v_pk_mad_u16", "u16", lambda a, b, c: a.astype(L) * b + c, 3),
    ("v_pk_mad_i16", "i16", lambda a, b, c: a.astype(L) * b + c, 3),
):
    _pk16(_name, _type, _f, _n)


def _pk_clamp(name: str, dtype, low: int, high: int, sign: int) -> None:
    def expect(state: State) -> None:
        out = np.zeros(64, U32)
        for at in (0, 16):
            a, b = (
                (state.v[r] >> at & 0xFFFF).astype(np.uint16).view(dtype).astype(L) for r in (2, 4)
            )
            out |= np.clip(a + sign * b, low, high).astype(dtype).view(np.uint16).astype(U32) << at
        write(state, 10, out, "u32")

    case(f"{name} v10, v2, v4 clamp", expect)


_pk_clamp("v_pk_add_u16", np.uint16, 0, 65535, 1)
_pk_clamp("v_pk_sub_u16", np.uint16, 0, 65535, -1)
_pk_clamp("v_pk_add_i16", np.int16, -32768, 32767, 1)
_pk_clamp("v_pk_sub_i16", np.int16, -32768, 32767, -1)


def _pk32(name: str, n: int, f: Callable) -> None:
    def ready(state: State) -> None:
        for r in range(2, 2 + 2 * n):
            fill(state, r, "f32")

    def run(state: State, low, high, neg_low, neg_high) -> None:
        on, results = state.active, []
        for select, negate in ((low, neg_low), (high, neg_high)):
            xs = [state.v[2 + 2 * k + select[k]].view(F32) for k in range(n)]
            xs = [-x if negate[k] else x for k, x in enumerate(xs)]
            with np.errstate(all="ignore"):
                results.append(np.asarray(f(*xs)).astype(F32).view(U32))
        for k in (0, 1):
            state.v[10 + k][on] = results[k][on]

    sources = ", ".join(f"v[{2 + 2 * k}:{3 + 2 * k}]" for k in range(n))
    zeros, ones = [0] * n, [1] * n
    case(
        f"{name} v[10:11], {sources}", lambda s: run(s, zeros, ones, zeros, zeros), ready, nan="f32"
    )
    low, high, nl, nh = [1, 0, 0][:n], [0, 1, 0][:n], [0, 1, 0][:n], [1, 0, 1][:n]
    tail = f"op_sel:{low} op_sel_hi:{high} neg_lo:{nl} neg_hi:{nh}".replace(", ", ",")
    case(
        f"{name} v[10:11], {sources} {tail}", lambda s: run(s, low, high, nl, nh), ready, nan="f32"
    )

    def scalar(state: State) -> None:
        """A scalar pair, and the low dword twice."""
        on = state.active
        b = [state.s[20].repeat(64).view(F32)] * 2
        rest = [[state.v[6 + j].view(F32) for j in (0, 1)]] if n == 3 else []
        with np.errstate(all="ignore"):
            for j in (0, 1):
                d = np.asarray(f(state.v[2 + j].view(F32), b[j], *[r[j] for r in rest])).astype(F32)
                state.v[10 + j][on] = d.view(U32)[on]

    names = ["v[2:3]", "s[20:21]", "v[6:7]"][:n]
    second_low = str([1, 0, 1][:n]).replace(" ", "")
    text = f"{name} v[10:11], {', '.join(names)} op_sel_hi:{second_low}"

    def plain_ready(state: State) -> None:
        ready(state)
        state.s[20] = F32(1.7).view(U32)

    case(text, scalar, plain_ready, nan="f32")


_pk32("v_pk_add_f32", 2, lambda a, b: a + b)
_pk32("v_pk_mul_f32", 2, lambda a, b: a * b)
_pk32(
    "v_pk_fma_f32",
    3,
    lambda a, b, c: np.array(
        [fma(*r, "f32") for r in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)], U32
    ).view(F32),
)


def _pk_mov(low: int, high: int):
    def expect(state: State) -> None:
        on = state.active
        a, b = state.v[2 + low].copy(), state.v[4 + high].copy()
        state.v[10][on], state.v[11][on] = a[on], b[on]

    return expect


case("v_pk_mov_b32 v[10:11], v[2:3], v[4:5] op_sel:[0,1]", _pk_mov(0, 1))
case("v_pk_mov_b32 v[10:11], v[2:3], v[4:5] op_sel:[1,0]", _pk_mov(1, 0))


def _pack(a_high: int, b_high: int):
    def expect(state: State) -> None:
        a, b = state.v[2] >> 16 * a_high & 0xFFFF, state.v[4] >> 16 * b_high & 0xFFFF
        write(state, 10, a | b << 16, "u32")

    return expect


case("v_pack_b32_f16 v10, v2, v4", _pack(0, 0))
case("v_pack_b32_f16 v10, v2, v4 op_sel:[1,1,0]", _pack(1, 1))


# --- dot products ---
def _dot2(type: str, accumulates: bool):
    def ready(state: State) -> None:
        for r in (2, 4):
            fill(state, r, type, gentle=True)
        fill(state, 10 if accumulates else 6, "f32", gentle=True)

    def expect(state: State) -> None:
        total = read(state, 10 if accumulates else 6, "f32").astype(F64)
        for at in (0, 16):
            a, b = (typed(state.v[r] >> at, type).astype(F64) for r in (2, 4))
            total = total + a * b
        write(state, 10, total.astype(F32), "f32")

    return ready, expect


for _text, _type, _archs in (
    ("v_dot2_f32_f16 v10, v2, v4, v6", "f16", ("gfx942", "gfx950")),
    ("v_dot2_f32_bf16 v10, v2, v4, v6", "bf16", CDNA4),
    ("v_dot2c_f32_f16 v10, v2, v4", "f16", ("gfx942", "gfx950")),
    ("v_dot2c_f32_bf16 v10, v2, v4", "bf16", CDNA4),
):
    _ready, _expect = _dot2(_type, "dot2c" in _text)
    case(_text, _expect, _ready, nan="f32", ulp=1, archs=_archs)


def _dot4(dtype, accumulates: bool):
    def expect(state: State) -> None:
        a, b = (state.v[r].view(dtype).reshape(64, 4).astype(np.int64) for r in (2, 4))
        c = state.v[10 if accumulates else 6].astype(np.int64)
        write(state, 10, ((a * b).sum(1) + c & 0xFFFFFFFF).astype(U32), "u32")

    return expect


case("v_dot4_i32_i8 v10, v2, v4, v6", _dot4(np.int8, False))
case("v_dot4_u32_u8 v10, v2, v4, v6", _dot4(np.uint8, False))
case("v_dot4c_i32_i8 v10, v2, v4", _dot4(np.int8, True))
