"""What scalar, branch and wait instructions do, from the ISA documents, with Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from gcnemu.state import AT_BARRIER, ENDED, TRAPPED
from gcnemu_machine import ALL_LANES, Case, State
from gcnemu_vector import SPECIAL_INT

M32, M64 = 0xFFFFFFFF, ALL_LANES
CASES: list[Case] = []
# (value, SCC or None to leave it) of a, b, SCC before.
Rule = Callable[[int, int, int], tuple[int, int | None]]


def signed(x: int, bits: int = 32) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def nonzero(f: Callable[[int, int], int], bits: int = 32) -> Rule:
    def rule(a: int, b: int, c: int) -> tuple[int, int | None]:
        d = f(a, b) & (1 << bits) - 1
        return d, int(d != 0)

    return rule


def plain(f: Callable[[int, int], int]) -> Rule:
    return lambda a, b, c: (f(a, b), None)


def overflow(f: Callable[[int, int], int]) -> Rule:
    def rule(a: int, b: int, c: int) -> tuple[int, int | None]:
        d = f(signed(a), signed(b))
        return d, int(not -(2**31) <= d < 2**31)

    return rule


def carry(f: Callable[[int, int, int], int]) -> Rule:
    def rule(a: int, b: int, c: int) -> tuple[int, int | None]:
        d = f(a, b, c)
        return d, int(not 0 <= d <= M32)

    return rule


def field(kind: str, bits: int) -> Rule:
    def rule(a: int, b: int, c: int) -> tuple[int, int | None]:
        at, n = b % bits, b >> 16 & 127
        d = (a if kind == "u" else signed(a, bits)) >> at
        if n < bits:
            d &= (1 << n) - 1
            if kind == "i" and n:
                d = signed(d, n)
        d = d if n else 0
        return d, int(d & (1 << bits) - 1 != 0)

    return rule


def pick(better: Callable[[int, int], bool]) -> Rule:
    return lambda a, b, c: (a, 1) if better(a, b) else (b, 0)


TWO: dict[str, tuple[int, int, int, Rule]] = {  # bits of result, a, b
    "s_add_u32": (32, 32, 32, carry(lambda a, b, c: a + b)),
    "s_sub_u32": (32, 32, 32, carry(lambda a, b, c: a - b)),
    "s_addc_u32": (32, 32, 32, carry(lambda a, b, c: a + b + c)),
    "s_subb_u32": (32, 32, 32, carry(lambda a, b, c: a - b - c)),
    "s_add_i32": (32, 32, 32, overflow(lambda a, b: a + b)),
    "s_sub_i32": (32, 32, 32, overflow(lambda a, b: a - b)),
    "s_mul_i32": (32, 32, 32, plain(lambda a, b: a * b)),
    "s_mul_hi_u32": (32, 32, 32, plain(lambda a, b: a * b >> 32)),
    "s_mul_hi_i32": (32, 32, 32, plain(lambda a, b: signed(a) * signed(b) >> 32)),
    "s_pack_ll_b32_b16": (32, 32, 32, plain(lambda a, b: a % 65536 | b % 65536 << 16)),
    "s_pack_lh_b32_b16": (32, 32, 32, plain(lambda a, b: a % 65536 | b >> 16 << 16)),
    "s_pack_hh_b32_b16": (32, 32, 32, plain(lambda a, b: a >> 16 | b >> 16 << 16)),
    "s_min_u32": (32, 32, 32, pick(lambda a, b: a < b)),
    "s_max_u32": (32, 32, 32, pick(lambda a, b: a > b)),
    "s_min_i32": (32, 32, 32, pick(lambda a, b: signed(a) < signed(b))),
    "s_max_i32": (32, 32, 32, pick(lambda a, b: signed(a) > signed(b))),
    "s_absdiff_i32": (32, 32, 32, nonzero(lambda a, b: abs(signed(signed(a) - signed(b))))),
    "s_cselect_b32": (32, 32, 32, lambda a, b, c: (a if c else b, None)),
    "s_cselect_b64": (64, 64, 64, lambda a, b, c: (a if c else b, None)),
    "s_bfm_b32": (32, 32, 32, plain(lambda a, b: ((1 << a % 32) - 1) << b % 32)),
    "s_bfm_b64": (64, 32, 32, plain(lambda a, b: ((1 << a % 64) - 1) << b % 64)),
}
for _bits in (32, 64):
    for _name, _f in {
        "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
        "andn2": lambda a, b: a & ~b, "orn2": lambda a, b: a | ~b, "nand": lambda a, b: ~(a & b),
        "nor": lambda a, b: ~(a | b), "xnor": lambda a, b: ~(a ^ b),
    }.items():  # fmt: skip
        TWO[f"s_{_name}_b{_bits}"] = (_bits, _bits, _bits, nonzero(_f, _bits))
    TWO[f"s_lshl_b{_bits}"] = (_bits, _bits, 32, nonzero(lambda a, b, n=_bits: a << b % n, _bits))
    TWO[f"s_lshr_b{_bits}"] = (_bits, _bits, 32, nonzero(lambda a, b, n=_bits: a >> b % n, _bits))
    TWO[f"s_ashr_i{_bits}"] = (
        _bits,
        _bits,
        32,
        nonzero(lambda a, b, n=_bits: signed(a, n) >> b % n, _bits),
    )
    for _kind in "ui":
        TWO[f"s_bfe_{_kind}{_bits}"] = (_bits, _bits, 32, field(_kind, _bits))
for _n in (1, 2, 3, 4):
    TWO[f"s_lshl{_n}_add_u32"] = (32, 32, 32, carry(lambda a, b, c, n=_n: (a << n) + b))

ONE: dict[str, tuple[int, int, Rule]] = {
    "s_mov_b32": (32, 32, plain(lambda a, b: a)),
    "s_mov_b64": (64, 64, plain(lambda a, b: a)),
    "s_not_b32": (32, 32, nonzero(lambda a, b: ~a)),
    "s_not_b64": (64, 64, nonzero(lambda a, b: ~a, 64)),
    "s_brev_b32": (32, 32, plain(lambda a, b: int(f"{a:032b}"[::-1], 2))),
    "s_brev_b64": (64, 64, plain(lambda a, b: int(f"{a:064b}"[::-1], 2))),
    "s_ff1_i32_b32": (32, 32, plain(lambda a, b: (a & -a).bit_length() - 1)),
    "s_ff1_i32_b64": (32, 64, plain(lambda a, b: (a & -a).bit_length() - 1)),
    "s_flbit_i32_b32": (32, 32, plain(lambda a, b: 32 - a.bit_length() if a else -1)),
    "s_flbit_i32_b64": (32, 64, plain(lambda a, b: 64 - a.bit_length() if a else -1)),
    "s_bcnt1_i32_b32": (32, 32, nonzero(lambda a, b: a.bit_count())),
    "s_bcnt1_i32_b64": (32, 64, nonzero(lambda a, b: a.bit_count())),
    "s_bcnt0_i32_b32": (32, 32, nonzero(lambda a, b: 32 - a.bit_count())),
    "s_abs_i32": (32, 32, nonzero(lambda a, b: abs(signed(a)))),
    "s_sext_i32_i8": (32, 32, plain(lambda a, b: signed(a, 8))),
    "s_sext_i32_i16": (32, 32, plain(lambda a, b: signed(a, 16))),
}


def reg(r: int, bits: int) -> str:
    return f"s{r}" if bits == 32 else f"s[{r}:{r + 1}]"


def get(state: State, r: int, bits: int) -> int:
    return int(state.s[r]) if bits == 32 else state.get64(r)


def put(state: State, r: int, bits: int, value: int) -> None:
    if bits == 32:
        state.s[r] = value & M32
    else:
        state.set64(r, value & M64)


def operands(state: State) -> None:
    """Special and random values in s20 to s23."""
    for r in (20, 21, 22, 23):
        if state.rng.integers(0, 4):
            state.s[r] = state.rng.choice(SPECIAL_INT)
    if state.rng.integers(0, 2):  # a field: offset and width
        state.s[22] = int(state.rng.integers(0, 64)) | int(state.rng.integers(0, 128)) << 16


def _enter(
    name: str, text: str, bits: tuple[int, int, int], rule: Rule, b_const: int | None = None
) -> None:
    def expect(state: State) -> None:
        a = get(state, 20, bits[1])
        b = get(state, 22, bits[2]) if b_const is None else b_const & (1 << bits[2]) - 1
        d, scc = rule(a, b, state.scc)
        put(state, 10, bits[0], d)
        state.scc = state.scc if scc is None else scc

    CASES.append(Case(name, text, expect, operands, seeds=12))


for _name, (_d, _a, _b, _rule) in TWO.items():
    _enter(_name, f"{_name} {reg(10, _d)}, {reg(20, _a)}, {reg(22, _b)}", (_d, _a, _b), _rule)
    _enter(_name, f"{_name} {reg(10, _d)}, {reg(20, _a)}, -7", (_d, _a, _b), _rule, -7)
for _name, (_d, _a, _rule) in ONE.items():
    _enter(_name, f"{_name} {reg(10, _d)}, {reg(20, _a)}", (_d, _a, 32), _rule)
# Literals: 32 bits, sign-extended for 64-bit operands.
_enter("s_and_b32", "s_and_b32 s10, s20, 0x89abcdef", (32, 32, 32), TWO["s_and_b32"][3], 0x89ABCDEF)
_enter(
    "s_or_b64",
    "s_or_b64 s[10:11], s[20:21], 0x12345678",
    (64, 64, 64),
    TWO["s_or_b64"][3],
    0x12345678,
)


def _case(name: str, text: str, expect: Callable[[State], None], **options: object) -> None:
    CASES.append(
        Case(name, text, expect, options.pop("prepare", operands), **{"seeds": 8, **options})
    )  # type: ignore


for _bits in (32, 64):

    def _cmov(state: State, bits: int = _bits) -> None:
        if state.scc:
            put(state, 10, bits, get(state, 20, bits))

    _case(f"s_cmov_b{_bits}", f"s_cmov_b{_bits} {reg(10, _bits)}, {reg(20, _bits)}", _cmov)


def _cmovk(state: State) -> None:
    if state.scc:
        state.s[10] = 0xFFFF8001


_case("s_cmovk_i32", "s_cmovk_i32 s10, 0x8001", _cmovk)


def _movk(state: State) -> None:
    state.s[10] = 0xFFFFFFF0


_case("s_movk_i32", "s_movk_i32 s10, 0xfff0", _movk)


def _addk(state: State) -> None:
    d = signed(int(state.s[20])) - 3
    state.s[20], state.scc = d & M32, int(d < -(2**31))


_case("s_addk_i32", "s_addk_i32 s20, 0xfffd", _addk)


def _mulk(state: State) -> None:
    state.s[20] = int(state.s[20]) * -3 & M32


_case("s_mulk_i32", "s_mulk_i32 s20, 0xfffd", _mulk)
for _v in (0, 1):

    def _bitset(state: State, v: int = _v) -> None:
        bit = 1 << int(state.s[22]) % 32
        state.s[20] = int(state.s[20]) | bit if v else int(state.s[20]) & ~bit & M32

    _case(f"s_bitset{_v}_b32", f"s_bitset{_v}_b32 s20, s22", _bitset)
    for _bits in (32, 64):

        def _bitcmp(state: State, v: int = _v, bits: int = _bits) -> None:
            state.scc = int(get(state, 20, bits) >> int(state.s[22]) % bits & 1 == v)

        _case(f"s_bitcmp{_v}_b{_bits}", f"s_bitcmp{_v}_b{_bits} {reg(20, _bits)}, s22", _bitcmp)

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b, "lg": lambda a, b: a != b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
}  # fmt: skip
for _name, _f in RELATIONS.items():
    for _type in ("i32", "u32"):

        def _cmp(state: State, f=_f, type=_type) -> None:
            a, b = int(state.s[20]), int(state.s[22])
            state.scc = int(f(signed(a), signed(b)) if type == "i32" else f(a, b))

        def _cmpk(state: State, f=_f, type=_type) -> None:
            a = int(state.s[20])
            state.scc = int(f(signed(a), -6) if type == "i32" else f(a, 0xFFFA))

        def _often_equal(state: State) -> None:
            operands(state)
            if state.rng.integers(0, 2):
                state.s[22] = state.s[20]
            if state.rng.integers(0, 3) == 0:
                state.s[20] = 0xFFFFFFFA if state.rng.integers(0, 2) else 0xFFFA

        _case(
            f"s_cmp_{_name}_{_type}", f"s_cmp_{_name}_{_type} s20, s22", _cmp, prepare=_often_equal
        )
        _case(
            f"s_cmpk_{_name}_{_type}",
            f"s_cmpk_{_name}_{_type} s20, 0xfffa",
            _cmpk,
            prepare=_often_equal,
        )
for _name in ("eq", "lg"):

    def _cmp64(state: State, f=RELATIONS[_name]) -> None:
        state.scc = int(f(state.get64(20), state.get64(22)))

    def _equal64(state: State) -> None:
        if state.rng.integers(0, 2):
            state.set64(22, state.get64(20))

    _case(f"s_cmp_{_name}_u64", f"s_cmp_{_name}_u64 s[20:21], s[22:23]", _cmp64, prepare=_equal64)

for _name, _g in {
    "and": lambda a, e: a & e, "or": lambda a, e: a | e, "xor": lambda a, e: a ^ e,
    "andn2": lambda a, e: a & ~e, "orn2": lambda a, e: a | ~e, "andn1": lambda a, e: ~a & e,
    "orn1": lambda a, e: ~a | e, "nand": lambda a, e: ~(a & e), "nor": lambda a, e: ~(a | e),
    "xnor": lambda a, e: ~(a ^ e),
}.items():  # fmt: skip

    def _saveexec(state: State, f=_g) -> None:
        before = state.exec
        state.exec = f(state.get64(20), before) & M64
        state.set64(10, before)
        state.scc = int(state.exec != 0)

    _case(f"s_{_name}_saveexec_b64", f"s_{_name}_saveexec_b64 s[10:11], s[20:21]", _saveexec)

# --- program control ---
_CONDITIONS: dict[str, Callable[[State], bool]] = {
    "s_branch": lambda s: True, "s_cbranch_scc0": lambda s: not s.scc,
    "s_cbranch_scc1": lambda s: bool(s.scc), "s_cbranch_vccz": lambda s: s.vcc == 0,
    "s_cbranch_vccnz": lambda s: s.vcc != 0, "s_cbranch_execz": lambda s: s.exec == 0,
    "s_cbranch_execnz": lambda s: s.exec != 0,
}  # fmt: skip
for _name, _cond in _CONDITIONS.items():

    def _branch(state: State, cond=_cond) -> None:
        if cond(state):
            state.pc = 77

    def _masks(state: State) -> None:
        state.exec = state.exec * int(state.rng.integers(0, 2))
        state.vcc = state.vcc * int(state.rng.integers(0, 2))

    _case(_name, f"{_name} .LBB0_1", _branch, prepare=_masks, labels={".LBB0_1": 77})


def _unchanged(state: State) -> None:
    pass


for _text in (
    "s_nop 3", "s_sleep 1", "s_setprio 2", "s_icache_inv", "s_wakeup", "s_dcache_inv", "s_dcache_wb",
    "s_incperflevel 1", "s_decperflevel 1", "s_ttracedata",
    "buffer_wbl2 sc1", "buffer_inv sc1", "ds_nop", "v_nop", "s_waitcnt vmcnt(3) lgkmcnt(0)",
    "s_waitcnt 0", "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 4, 4), 15",
):  # fmt: skip
    _case(_text.split()[0], _text, _unchanged)
for _text, _result in (("s_endpgm", ENDED), ("s_barrier", AT_BARRIER), ("s_trap 2", TRAPPED)):

    def _stops(state: State, result: int = _result) -> None:
        state.ended = result

    _case(_text.split()[0], _text, _stops)


def _overflow_on(state: State) -> None:
    state.overflow = 1


_case("s_setreg_imm32_b32", "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1", _overflow_on)


def _zero(state: State) -> None:
    state.s[10] = 0


_case("s_getreg_b32", "s_getreg_b32 s10, hwreg(HW_REG_XCC_ID)", _zero)

# --- scalar loads ---
from gcnemu_machine import BASE

for _n, _suffix in ((1, ""), (2, "x2"), (4, "x4"), (8, "x8"), (16, "x16")):
    _d = "s40" if _n == 1 else f"s[40:{39 + _n}]"

    def _pointer(state: State) -> None:
        state.set64(20, BASE + 4 * int(state.rng.integers(0, 1000)))
        state.s[24] = 4 * int(state.rng.integers(0, 100))

    def _load(state: State, n: int = _n, register: bool = False) -> None:
        at = state.get64(20) - BASE + (int(state.s[24]) if register else 0x40)
        state.s[40 : 40 + n] = state.memory[at : at + 4 * n].view(np.uint32)

    _case(
        f"s_load_dword{_suffix}",
        f"s_load_dword{_suffix} {_d}, s[20:21], 0x40",
        _load,
        prepare=_pointer,
    )
    _case(
        f"s_load_dword{_suffix}", f"s_load_dword{_suffix} {_d}, s[20:21], s24",
        lambda s, f=_load: f(s, register=True), prepare=_pointer,
    )  # fmt: skip

    def _resource(state: State) -> None:
        _pointer(state)
        state.s[21] &= 0xFFFF
        state.s[22], state.s[23] = 4096, 0

    _case(
        f"s_buffer_load_dword{_suffix}", f"s_buffer_load_dword{_suffix} {_d}, s[20:23], 0x40",
        _load, prepare=_resource,
    )  # fmt: skip

    def _short_resource(state: State) -> None:
        _resource(state)
        state.s[22] = 0x40

    def _zeros(state: State, n: int = _n) -> None:
        state.s[40 : 40 + n] = 0

    _case(
        f"s_buffer_load_dword{_suffix}", f"s_buffer_load_dword{_suffix} {_d}, s[20:23], 0x40",
        _zeros, prepare=_short_resource, notes=(6,),
    )  # fmt: skip


def _time(state: State) -> None:
    state.s[40], state.s[41] = 100, 0


_case("s_memtime", "s_memtime s[40:41]", _time)
_case("s_memrealtime", "s_memrealtime s[40:41]", _time)
