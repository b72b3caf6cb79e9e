"""What vector instructions do, from the ISA documents, in numpy.

`CASES` has every lane-wise instruction with register, scalar and constant operands, sign modifiers,
clamp and output modifiers, DPP and SDWA; each under a random EXEC mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from gcnemu_machine import Case, State
from gcnemu_numbers import decode, decode_array, encode, encode_array, fma, largest

BOTH, CDNA4 = ("gfx942", "gfx950"), ("gfx950",)
F32, F16, F64, U32, I32 = np.float32, np.float16, np.float64, np.uint32, np.int32
U64, I64 = np.uint64, np.int64
SPECIAL_F32 = np.array(
    [0x0, 0x80000000, 0x3F800000, 0xBF800000, 0x3F000000, 0x7F800000, 0xFF800000, 0x7FC00000,
     0x7F800001, 0xFFC12345, 0x1, 0x80000001, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x4B800001,
     0x477FE000, 0x477FF000, 0x477FEFFF, 0x33000000, 0x33800001, 0x4F000000, 0xCF000000, 0x4F800000,
     0x3FFFFFFF, 0x43E00000, 0x43E80000, 0x43E80001, 0x43700000, 0x43780000, 0x42FE0000],
    U32,
)  # fmt: skip
SPECIAL_F16 = np.array(
    [0x0, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 0x7C01, 0x1, 0x3FF, 0x400, 0x7BFF, 0xFBFF,
     0x3800, 0x3555, 0x6400], np.uint16,
)  # fmt: skip
SPECIAL_INT = np.array(
    [0, 1, 2, 31, 32, 33, 63, 64, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0xFFFFFF, 0x1000000,
     0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0xFFFFFFFE, 0x00800000, 0x12345678, 0x0D0C0B0A],
    U32,
)  # fmt: skip


# --- operands ---
def fill(state: State, r: int, type: str, gentle: bool = False) -> None:
    """Random data of a type in v[r] (and v[r + 1]): special values, ordinary ones, random bits."""
    rng = state.rng
    if type in ("f64", "u64", "i64", "b64"):
        x = rng.standard_normal(64) * 10.0 ** rng.integers(-3, 9, 64)
        bits = x.view(U64) if type == "f64" else rng.integers(0, 1 << 64, 64, dtype=U64)
        special = SPECIAL_INT.astype(U64) | SPECIAL_INT[::-1].astype(U64) << U64(32)
        if type == "f64":
            values = [
                0.0,
                -0.0,
                1.5,
                -1,
                math.inf,
                -math.inf,
                math.nan,
                5e-324,
                1e308,
                2**31,
                2**32,
                -(2.0**31),
            ]
            special = np.array(values, F64).view(U64)
        where = rng.integers(0, 64, len(special))
        bits[where] = special
        state.v[r], state.v[r + 1] = bits.astype(U32), (bits >> U64(32)).astype(U32)
        return
    if type in ("f32", "f16", "bf16"):
        ordinary = (rng.standard_normal(64) * 2.0 ** rng.integers(-8, 12, 64)).astype(F32)
        if type == "f16":
            halves = ordinary.astype(F16).view(np.uint16)
            if not gentle:
                halves[rng.integers(0, 64, 24)] = rng.choice(SPECIAL_F16, 24)
            state.v[r] = halves.astype(U32) | rng.permutation(halves).astype(U32) << 16
            return
        bits = ordinary.view(U32)
        if type == "bf16":
            state.v[r] = bits >> 16 | rng.permutation(bits) & U32(0xFFFF0000)
            return
        if not gentle:
            bits[rng.integers(0, 64, 32)] = rng.choice(SPECIAL_F32, 32)
            bits[rng.integers(0, 64, 8)] = rng.integers(0, 1 << 32, 8, dtype=U32)
        state.v[r] = bits
        return
    bits = rng.integers(0, 1 << 32, 64, dtype=U32)
    bits[rng.integers(0, 64, 32)] = rng.choice(SPECIAL_INT, 32)
    if type in ("u16", "i16", "b16"):
        bits[rng.integers(0, 64, 16)] &= U32(0x8000FFFF)
    state.v[r] = bits


def typed(bits: np.ndarray, type: str) -> np.ndarray:
    """Raw operand bits (64-bit ones joined) as numpy values."""
    dtypes = {"f32": F32, "u32": U32, "b32": U32, "i32": I32}
    if type in dtypes:
        return bits.astype(U32).view(dtypes[type])
    if type in ("f64", "u64", "i64", "b64"):
        return bits.view({"f64": F64, "i64": I64}.get(type, U64))
    if type == "bf16":
        return (bits.astype(U32) << 16).view(F32)
    return (
        (bits & 0xFFFF).astype(np.uint16).view({"f16": F16, "i16": np.int16}.get(type, np.uint16))
    )


def read(state: State, r: int, type: str) -> np.ndarray:
    if type in ("f64", "u64", "i64", "b64"):
        return typed(state.v[r].astype(U64) | state.v[r + 1].astype(U64) << U64(32), type)
    return typed(state.v[r].copy(), type)


def write(state: State, r: int, values: np.ndarray, type: str, keep_high: bool = False) -> None:
    """Store results in active lanes; 16-bit ones clear the other half unless it is kept."""
    on = state.active
    if type in ("f64", "u64", "i64", "b64"):
        bits = np.asarray(values).astype({"f64": F64, "i64": I64}.get(type, U64)).view(U64)
        state.v[r][on] = bits.astype(U32)[on]
        state.v[r + 1][on] = (bits >> U64(32)).astype(U32)[on]
        return
    if type in ("f16", "u16", "i16", "b16"):
        dtype = {"f16": F16, "i16": np.int16}.get(type, np.uint16)
        bits = np.asarray(values).astype(dtype).view(np.uint16).astype(U32)
        if keep_high:
            bits = bits | state.v[r] & U32(0xFFFF0000)
        state.v[r][on] = bits[on]
        return
    dtype = {"f32": F32, "i32": I32}.get(type, U32)
    state.v[r][on] = np.asarray(values).astype(dtype).view(U32)[on]


@dataclass(frozen=True)
class Op:
    """A lane-wise instruction: result type, source types, and what it computes."""

    name: str
    result: str
    sources: tuple[str, ...]
    compute: Callable[..., Any]
    ulp: int = 0
    archs: tuple[str, ...] = BOTH
    keep_high: bool = False
    accumulate: bool = False  # the destination is the last source
    gentle: bool = False
    vop2: bool = True  # takes DPP and SDWA
    third: bool = False
    extra: str = ""


OPS: list[Op] = []


def op(name: str, signature: str, compute: Callable[..., Any], **options: Any) -> None:
    result, *sources = signature.split()
    OPS.append(Op(name, result, tuple(sources), compute, **options))


def lanes(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """A scalar function applied lane by lane."""

    def apply(*arrays: np.ndarray) -> np.ndarray:
        return np.array([function(*row) for row in zip(*(a.tolist() for a in arrays), strict=True)])

    return apply


def codes(function: Callable[..., int], dtype: Any) -> Callable[..., np.ndarray]:
    """Like `lanes`, for functions that return bit patterns of `dtype`."""
    integer = {F32: U32, F16: np.uint16}[dtype]
    return lambda *a: np.array(
        [function(*r) for r in zip(*(x.tolist() for x in a), strict=True)], integer
    ).view(dtype)


def _number_max(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The larger; a quiet NaN loses, a signalling one comes out quiet; +0 over -0 (V_MAX)."""
    return _pick(a, b, larger=True)


def _number_min(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _pick(a, b, larger=False)


def _signalling(x: np.ndarray) -> np.ndarray:
    if x.dtype == F32:
        return np.isnan(x) & (x.view(U32) >> 22 & 1 == 0)
    if x.dtype == F16:
        return np.isnan(x) & (x.view(np.uint16) >> 9 & 1 == 0)
    return np.zeros(x.shape, bool)


def _pick(a: np.ndarray, b: np.ndarray, larger: bool) -> np.ndarray:
    a_first = (a > b) | ((a == b) & (np.signbit(b) | ~np.signbit(a)))
    if not larger:
        a_first = (a < b) | ((a == b) & (np.signbit(a) | ~np.signbit(b)))
    out = np.where(a_first | np.isnan(b), a, b)
    out = np.where(np.isnan(a), b, out)
    return np.where(_signalling(a) | _signalling(b), np.array(np.nan, a.dtype), out)


def _median(a, b, c):
    """ISA: without the operand that equals the largest, the larger of the other two."""
    top = _number_max(_number_max(a, b), c)
    out = np.where(
        top == a, _number_max(b, c), np.where(top == b, _number_max(a, c), _number_max(a, b))
    )
    with_nan = _number_min(_number_min(a, b), c)
    return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), with_nan, out)


def _wins(a, b, larger):
    out = np.where((a > b) == larger, a, b)
    same = a == b
    sign = np.signbit(a) & np.signbit(b) if larger else np.signbit(a) | np.signbit(b)
    out = np.where(
        same & (a == 0), np.where(sign, np.array(-0.0, a.dtype), np.array(0.0, a.dtype)), out
    )
    return np.where(np.isnan(a) | np.isnan(b), np.array(np.nan, a.dtype), out)


# --- float ---
for name, f in {
    "v_add_f32": lambda a, b: a + b,
    "v_sub_f32": lambda a, b: a - b,
    "v_subrev_f32": lambda a, b: b - a,
    "v_mul_f32": lambda a, b: a * b,
    "v_mul_legacy_f32": lambda a, b: np.where((a == 0) | (b == 0), F32(0), a * b),
    "v_max_f32": _number_max,
    "v_min_f32": _number_min,
}.items():
    op(name, "f32 f32 f32", f)
FMA32 = codes(lambda a, b, c: fma(a, b, c, "f32"), F32)
FMA16 = codes(lambda a, b, c: fma(a, b, c, "f16"), F16)
op("v_fmac_f32", "f32 f32 f32 f32", FMA32, accumulate=True)
op("v_fma_f32", "f32 f32 f32 f32", FMA32, vop2=False)
op("v_max3_f32", "f32 f32 f32 f32", lambda a, b, c: _number_max(_number_max(a, b), c), vop2=False)
op("v_min3_f32", "f32 f32 f32 f32", lambda a, b, c: _number_min(_number_min(a, b), c), vop2=False)
op("v_med3_f32", "f32 f32 f32 f32", _median, vop2=False)
op(
    "v_maximum3_f32",
    "f32 f32 f32 f32",
    lambda a, b, c: _wins(_wins(a, b, True), c, True),
    archs=CDNA4,
    vop2=False,
)
op(
    "v_minimum3_f32",
    "f32 f32 f32 f32",
    lambda a, b, c: _wins(_wins(a, b, False), c, False),
    archs=CDNA4,
    vop2=False,
)
op(
    "v_ldexp_f32",
    "f32 f32 i32",
    lambda a, b: np.ldexp(a.astype(F64), np.clip(b, -400, 400)).astype(F32),
    vop2=False,
)
op("v_ldexp_f64", "f64 f64 i32", lambda a, b: np.ldexp(a, np.clip(b, -3000, 3000)), vop2=False)
op(
    "v_ldexp_f16",
    "f16 f16 i16",
    lambda a, b: np.ldexp(a.astype(F64), np.clip(b, -60, 60).astype(int)).astype(F16),
)


def wide(
    function: Callable[[np.ndarray], np.ndarray], dtype: Any = F32
) -> Callable[..., np.ndarray]:
    return lambda a: function(a.astype(F64)).astype(dtype)


def _fract(a):
    out = a - np.floor(a)
    out = np.where(out >= 1, np.nextafter(F32(1), F32(0)), out)
    return np.where(np.isfinite(a), out, F32(np.nan))


for name, f, ulp in (
    ("v_exp_f32", wide(np.exp2), 1),
    ("v_log_f32", wide(np.log2), 1),
    ("v_rcp_f32", wide(lambda a: 1 / a), 0),
    ("v_rcp_iflag_f32", wide(lambda a: 1 / a), 0),
    ("v_rsq_f32", wide(lambda a: 1 / np.sqrt(a)), 0),
    ("v_sqrt_f32", np.sqrt, 0),
    ("v_floor_f32", np.floor, 0),
    ("v_ceil_f32", np.ceil, 0),
    ("v_trunc_f32", np.trunc, 0),
    ("v_rndne_f32", np.rint, 0),
    ("v_fract_f32", _fract, 0),
    ("v_frexp_mant_f32", lambda a: np.where(np.isfinite(a), np.frexp(a)[0], a), 0),
):
    op(name, "f32 f32", f, ulp=ulp)
op("v_sin_f32", "f32 f32", wide(lambda a: np.sin(a * 2 * np.pi)), ulp=1, gentle=True)
op("v_cos_f32", "f32 f32", wide(lambda a: np.cos(a * 2 * np.pi)), ulp=1, gentle=True)
op(
    "v_frexp_exp_i32_f32",
    "i32 f32",
    lambda a: np.where(np.isfinite(a), np.frexp(np.where(np.isfinite(a), a, 0))[1], 0),
)
for name, f in {
    "v_add_f16": lambda a, b: a + b,
    "v_sub_f16": lambda a, b: a - b,
    "v_subrev_f16": lambda a, b: b - a,
    "v_mul_f16": lambda a, b: a * b,
    "v_max_f16": _number_max,
    "v_min_f16": _number_min,
}.items():
    op(name, "f16 f16 f16", f)
for name, f, ulp in (
    ("v_exp_f16", wide(np.exp2, F16), 1),
    ("v_log_f16", wide(np.log2, F16), 1),
    ("v_rcp_f16", wide(lambda a: 1 / a, F16), 1),
    ("v_rsq_f16", wide(lambda a: 1 / np.sqrt(a), F16), 1),
    ("v_sqrt_f16", wide(np.sqrt, F16), 1),
    ("v_floor_f16", np.floor, 0),
    ("v_ceil_f16", np.ceil, 0),
    ("v_trunc_f16", np.trunc, 0),
    ("v_rndne_f16", np.rint, 0),
):
    op(name, "f16 f16", f, ulp=ulp)
op("v_fma_f16", "f16 f16 f16 f16", FMA16, keep_high=True, vop2=False)
op(
    "v_max3_f16",
    "f16 f16 f16 f16",
    lambda a, b, c: _number_max(_number_max(a, b), c),
    keep_high=True,
    vop2=False,
)
op(
    "v_min3_f16",
    "f16 f16 f16 f16",
    lambda a, b, c: _number_min(_number_min(a, b), c),
    keep_high=True,
    vop2=False,
)
op("v_med3_f16", "f16 f16 f16 f16", _median, keep_high=True, vop2=False)
for name, f in {
    "v_add_f64": lambda a, b: a + b,
    "v_mul_f64": lambda a, b: a * b,
    "v_max_f64": _number_max,
    "v_min_f64": _number_min,
}.items():
    op(name, "f64 f64 f64", f, vop2=False)


def _fma64(a: float, b: float, c: float) -> float:
    from fractions import Fraction

    if not all(map(math.isfinite, (a, b, c))) or a * b == 0 or math.isinf(a * b):
        return float(np.float64(a) * np.float64(b) + np.float64(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return exact.numerator / exact.denominator  # int division rounds once
    except OverflowError:
        return math.copysign(math.inf, exact)


op("v_fma_f64", "f64 f64 f64 f64", lanes(_fma64), vop2=False)
op("v_fmac_f64", "f64 f64 f64 f64", lanes(_fma64), accumulate=True, vop2=False)
for name, f in {
    "v_rcp_f64": lambda a: 1 / a,
    "v_rsq_f64": lambda a: 1 / np.sqrt(a),
    "v_sqrt_f64": np.sqrt,
    "v_floor_f64": np.floor,
    "v_ceil_f64": np.ceil,
    "v_trunc_f64": np.trunc,
    "v_rndne_f64": np.rint,
}.items():
    op(name, "f64 f64", f, vop2=False, ulp=1 if "rsq" in name else 0)

# --- integer ---
M32 = 0xFFFFFFFF
S = lambda x, bits=32: x - (1 << bits) if x >> (bits - 1) & 1 else x


def ints(function: Callable[..., int]) -> Callable[..., np.ndarray]:
    """Exact integer arithmetic on unsigned lanes, cut to 32 bits."""
    return lambda *a: np.array(
        [function(*r) & M32 for r in zip(*(x.tolist() for x in a), strict=True)], U32
    )


def _field_u(a, b, c):
    at, n = b & 31, c & 31
    return a >> at & ((1 << n) - 1)


def _field_i(a, b, c):
    at, n = b & 31, c & 31
    if n == 0:
        return 0
    return S(a >> at & ((1 << n) - 1), n) if at + n < 32 else S(a) >> at


def _perm(a, b, c):
    data = (a << 32 | b).to_bytes(8, "little")
    out = []
    for k in c.to_bytes(4, "little"):
        if k < 8:
            out.append(data[k])
        elif k < 12:
            out.append(255 if data[2 * (k - 8) + 1] & 128 else 0)
        else:
            out.append(0 if k == 12 else 255)
    return int.from_bytes(bytes(out), "little")


for name, f in {
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_subrev_u32": lambda a, b: b - a,
    "v_lshlrev_b32": lambda a, b: b << a % 32,
    "v_lshrrev_b32": lambda a, b: b >> a % 32,
    "v_ashrrev_i32": lambda a, b: S(b) >> a % 32,
    "v_min_u32": min,
    "v_max_u32": max,
    "v_min_i32": lambda a, b: min(S(a), S(b)),
    "v_max_i32": lambda a, b: max(S(a), S(b)),
    "v_mul_u32_u24": lambda a, b: a % 2**24 * (b % 2**24),
    "v_mul_hi_u32_u24": lambda a, b: a % 2**24 * (b % 2**24) >> 32,
    "v_mul_i32_i24": lambda a, b: S(a % 2**24, 24) * S(b % 2**24, 24),
    "v_mul_hi_i32_i24": lambda a, b: S(a % 2**24, 24) * S(b % 2**24, 24) >> 32,
}.items():
    op(name, "u32 u32 u32", ints(f))
for name, f in {
    "v_add_i32": lambda a, b: a + b,
    "v_sub_i32": lambda a, b: a - b,
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: a * b >> 32,
    "v_mul_hi_i32": lambda a, b: S(a) * S(b) >> 32,
    "v_bfm_b32": lambda a, b: ((1 << a % 32) - 1) << b % 32,
    "v_bcnt_u32_b32": lambda a, b: a.bit_count() + b,
    "v_cvt_pk_u16_u32": lambda a, b: min(a, 65535) | min(b, 65535) << 16,
    "v_cvt_pk_i16_i32": lambda a, b: (
        max(-32768, min(S(a), 32767)) & 0xFFFF | (max(-32768, min(S(b), 32767)) & 0xFFFF) << 16
    ),
}.items():
    op(name, "u32 u32 u32", ints(f), vop2=False)
for name, f in {
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: ~a,
    "v_bfrev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_ffbh_u32": lambda a: 32 - a.bit_length() if a else -1,
    "v_ffbl_b32": lambda a: (a & -a).bit_length() - 1,
    "v_ffbh_i32": lambda a: (
        -1 if a in (0, M32) else 32 - (a if a < 2**31 else ~a & M32).bit_length()
    ),
}.items():
    op(name, "b32 b32", ints(f))
for name, f in {
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_lshl_add_u32": lambda a, b, c: (a << b % 32) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) << c % 32,
    "v_lshl_or_b32": lambda a, b, c: (a << b % 32) | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfe_u32": _field_u,
    "v_bfe_i32": _field_i,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_alignbit_b32": lambda a, b, c: (a << 32 | b) >> c % 32,
    "v_alignbyte_b32": lambda a, b, c: (a << 32 | b) >> 8 * (c % 4),
    "v_perm_b32": _perm,
    "v_mad_u32_u24": lambda a, b, c: a % 2**24 * (b % 2**24) + c,
    "v_mad_i32_i24": lambda a, b, c: S(a % 2**24, 24) * S(b % 2**24, 24) + c,
    "v_min3_u32": min,
    "v_max3_u32": max,
    "v_med3_u32": lambda a, b, c: sorted((a, b, c))[1],
    "v_min3_i32": lambda a, b, c: min(S(a), S(b), S(c)),
    "v_max3_i32": lambda a, b, c: max(S(a), S(b), S(c)),
    "v_med3_i32": lambda a, b, c: sorted((S(a), S(b), S(c)))[1],
    "v_sad_u32": lambda a, b, c: abs(a - b) + c,
}.items():
    op(name, "u32 u32 u32 u32", ints(f), vop2=False)


def _table3(a: int, b: int, c: int, table: int, bits: int = 32) -> int:
    out = 0
    for n in range(bits):
        index = (a >> n & 1) << 2 | (b >> n & 1) << 1 | (c >> n & 1)
        out |= (table >> index & 1) << n
    return out


for name, f in {
    "v_add_u16": lambda a, b: a + b,
    "v_sub_u16": lambda a, b: a - b,
    "v_subrev_u16": lambda a, b: b - a,
    "v_mul_lo_u16": lambda a, b: a * b,
    "v_lshlrev_b16": lambda a, b: b << a % 16,
    "v_lshrrev_b16": lambda a, b: b >> a % 16,
    "v_ashrrev_i16": lambda a, b: S(b, 16) >> a % 16,
    "v_max_u16": max,
    "v_min_u16": min,
    "v_max_i16": lambda a, b: max(S(a, 16), S(b, 16)),
    "v_min_i16": lambda a, b: min(S(a, 16), S(b, 16)),
}.items():
    op(name, "u16 u16 u16", ints(f))
op("v_mad_u16", "u16 u16 u16 u16", ints(lambda a, b, c: a * b + c), keep_high=True, vop2=False)
op(
    "v_mad_i16",
    "u16 u16 u16 u16",
    ints(lambda a, b, c: S(a, 16) * S(b, 16) + S(c, 16)),
    keep_high=True,
    vop2=False,
)


def longs(function: Callable[..., int]) -> Callable[..., np.ndarray]:
    return lambda *a: np.array(
        [function(*r) & (1 << 64) - 1 for r in zip(*(x.tolist() for x in a), strict=True)], U64
    )


op("v_mov_b64", "u64 u64", longs(lambda a: a), vop2=False)
op("v_lshlrev_b64", "u64 u32 u64", longs(lambda a, b: b << a % 64), vop2=False)
op("v_lshrrev_b64", "u64 u32 u64", longs(lambda a, b: b >> a % 64), vop2=False)
op("v_ashrrev_i64", "u64 u32 u64", longs(lambda a, b: S(b, 64) >> a % 64), vop2=False)


# --- conversions ---
def _saturated(
    lo: int, hi: int, rounding: Callable[[float], float] = math.trunc
) -> Callable[..., np.ndarray]:
    def one(x: float) -> int:
        if math.isnan(x):
            return 0
        if math.isinf(x):
            return hi if x > 0 else lo
        return max(lo, min(hi, int(rounding(x))))

    return lanes(lambda x: one(x))


TO_U32, TO_I32 = _saturated(0, M32), _saturated(-(2**31), 2**31 - 1)
op("v_cvt_f32_u32", "f32 u32", lambda a: a.astype(F32))
op("v_cvt_f32_i32", "f32 i32", lambda a: a.astype(F32))
op("v_cvt_u32_f32", "u32 f32", TO_U32)
op("v_cvt_i32_f32", "i32 f32", TO_I32)
op("v_cvt_rpi_i32_f32", "i32 f32", _saturated(-(2**31), 2**31 - 1, lambda x: math.floor(x + 0.5)))
op("v_cvt_flr_i32_f32", "i32 f32", _saturated(-(2**31), 2**31 - 1, math.floor))
op("v_cvt_f32_f16", "f32 f16", lambda a: a.astype(F32))
op(
    "v_cvt_f16_f32",
    "f16 f32",
    lambda a: encode_array(a.astype(F64), "f16").astype(np.uint16).view(F16),
)
op("v_cvt_f16_u16", "f16 u16", lambda a: a.astype(F64).astype(F16))
op("v_cvt_f16_i16", "f16 i16", lambda a: a.astype(F64).astype(F16))
op("v_cvt_u16_f16", "u16 f16", _saturated(0, 65535))
op("v_cvt_i16_f16", "i16 f16", _saturated(-32768, 32767))
op("v_cvt_f64_f32", "f64 f32", lambda a: a.astype(F64), vop2=False)
op("v_cvt_f64_i32", "f64 i32", lambda a: a.astype(F64), vop2=False)
op("v_cvt_f64_u32", "f64 u32", lambda a: a.astype(F64), vop2=False)
op("v_cvt_f32_f64", "f32 f64", lambda a: a.astype(F32), vop2=False)
op("v_cvt_i32_f64", "i32 f64", TO_I32, vop2=False)
op("v_cvt_u32_f64", "u32 f64", TO_U32, vop2=False)
for n in range(4):
    op(f"v_cvt_f32_ubyte{n}", "f32 u32", lambda a, n=n: (a >> U32(8 * n) & U32(255)).astype(F32))
op("v_cvt_f32_bf16", "f32 bf16", lambda a: a, archs=CDNA4)


def pair(name: str, toward_zero: bool = False) -> Callable[..., np.ndarray]:
    return lanes(lambda a, b: encode(a, name, toward_zero) | encode(b, name, toward_zero) << 16)


op("v_cvt_pkrtz_f16_f32", "u32 f32 f32", pair("f16", True))
op("v_cvt_pk_f16_f32", "u32 f32 f32", pair("f16"), archs=CDNA4, vop2=False)
op("v_cvt_pk_bf16_f32", "u32 f32 f32", pair("bf16"), archs=CDNA4, vop2=False)
op("v_accvgpr_mov_b32", "b32 b32", lambda a: a, vop2=False, extra="accvgpr")


# --- from an Op to its cases ---
SOURCE_REGISTERS = (2, 4, 6)


def reg(r: int, type: str, letter: str = "v") -> str:
    return f"{letter}[{r}:{r + 1}]" if type in ("f64", "u64", "i64", "b64") else f"{letter}{r}"


def nan_kind(o: Op) -> str:
    if o.name.startswith(("v_cvt_pk", "v_cvt_pkrtz")) and o.result == "u32" and "f32" in o.sources:
        return "pk16"
    return {"f32": "f32", "f64": "f64", "f16": "f16", "bf16": "f16"}.get(o.result, "")


def _expect(o: Op, transform: Callable[[State, list[np.ndarray]], list[np.ndarray]] | None = None,
            after: Callable[[np.ndarray], np.ndarray] | None = None):  # fmt: skip
    def expect(state: State) -> None:
        registers = [*SOURCE_REGISTERS[: len(o.sources)]]
        if o.accumulate:
            registers[-1] = 10
        values = [read(state, r, t) for r, t in zip(registers, o.sources, strict=True)]
        if transform:
            values = transform(state, values)
        with np.errstate(all="ignore"):
            out = o.compute(*values)
            if after:
                out = after(out)
        write(state, 10, out, o.result, o.keep_high)

    return expect


def _prepare(o: Op):
    def prepare(state: State) -> None:
        for r, t in zip(SOURCE_REGISTERS, o.sources, strict=False):
            fill(state, r, t, o.gentle)
        if o.accumulate:
            fill(state, 10, o.sources[-1], o.gentle)

    return prepare


def _clamped(out: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(out) | (out <= 0), 0, np.minimum(out, 1)).astype(out.dtype)


def op_cases(o: Op) -> list[Case]:
    """Registers; then, where the instruction takes them, scalars, constants and modifiers."""
    written = o.sources[:-1] if o.accumulate else o.sources
    texts = [reg(r, t) for r, t in zip(SOURCE_REGISTERS, written, strict=False)]
    d = reg(10, o.result)
    common = {"prepare": _prepare(o), "nan": nan_kind(o), "ulp": o.ulp, "archs": o.archs}
    out = [Case(o.name, f"{o.name} {d}, {', '.join(texts)}", _expect(o), **common)]
    if o.extra == "accvgpr":
        out[0].text = f"{o.name} a1, a2"

        def copy(state: State) -> None:
            on = state.active
            state.v[257][on] = state.v[258][on]

        out[0].expect = copy
        return out

    # A scalar register as source 0.
    def from_scalar(state: State, values: list[np.ndarray]) -> list[np.ndarray]:
        low = np.full(64, state.s[20])
        if o.sources[0] in ("f64", "u64", "i64", "b64"):
            low = np.full(64, state.get64(20), U64)
        return [typed(low, o.sources[0]), *values[1:]]

    if o.name not in ("v_accvgpr_read_b32",):
        scalar_texts = [reg(20, o.sources[0], "s"), *texts[1:]]
        out.append(
            Case(
                o.name,
                f"{o.name} {d}, {', '.join(scalar_texts)}",
                _expect(o, from_scalar),
                **common,
            )
        )
    # An inline constant.
    first = o.sources[0]
    constant, value = ("1.0", 1.0) if first[0] == "f" else ("-5", -5)
    if first != "bf16":
        kinds = {"f32": F32, "f16": F16, "f64": F64, "i32": I32, "i16": np.int16, "i64": I64}

        def from_constant(state: State, values: list[np.ndarray]) -> list[np.ndarray]:
            if first in kinds:
                return [np.full(64, value, kinds[first]), *values[1:]]
            bits = {"u16": 16, "b16": 16, "u64": 64, "b64": 64}.get(first, 32)
            dtype = {16: np.uint16, 64: U64}.get(bits, U32)
            return [np.full(64, value & (1 << bits) - 1, dtype), *values[1:]]

        out.append(
            Case(
                o.name,
                f"{o.name} {d}, {', '.join([constant, *texts[1:]])}",
                _expect(o, from_constant),
                **common,
                seeds=1,
            )
        )
    floats = [n for n, t in enumerate(written) if t in ("f32", "f16", "f64")]
    if floats and o.name != "v_fract_f32":
        # Signs, absolute values; with a float result of 32 or 64 bits also output modifiers.
        marked = list(texts)
        for n in floats:
            marked[n] = (f"-|{texts[n]}|", f"|{texts[n]}|", f"-{texts[n]}")[n % 3]
        suffix = "_e64" if o.vop2 or len(written) == 1 else ""

        def signed(state: State, values: list[np.ndarray]) -> list[np.ndarray]:
            values = list(values)
            for n in floats:
                values[n] = (lambda x: -np.abs(x), np.abs, np.negative)[n % 3](values[n])
            return values

        out.append(
            Case(o.name, f"{o.name}{suffix} {d}, {', '.join(marked)}", _expect(o, signed), **common)
        )
        if o.result in ("f32", "f64") and not o.name.startswith(
            ("v_cvt", "v_frexp", "v_rcp_iflag")
        ):

            def after(out: np.ndarray) -> np.ndarray:
                return _clamped(out * out.dtype.type(0.5))

            out.append(
                Case(
                    o.name,
                    f"{o.name}{suffix} {d}, {', '.join(texts)} clamp div:2",
                    _expect(o, after=after),
                    **common,
                )
            )
    return out


def _madk() -> list[Case]:
    """V_FMAAK, V_FMAMK: a literal as addend, or as factor."""

    def prepare(state: State) -> None:
        fill(state, 2, "f32"), fill(state, 4, "f32")

    def aak(state: State) -> None:
        a, b = read(state, 2, "f32"), read(state, 4, "f32")
        write(state, 10, FMA32(a, b, np.full(64, 1.75, F32)), "f32")

    def amk(state: State) -> None:
        a, b = read(state, 2, "f32"), read(state, 4, "f32")
        write(state, 10, FMA32(a, np.full(64, 1.75, F32), b), "f32")

    return [
        Case("v_fmaak_f32", "v_fmaak_f32 v10, v2, v4, 0x3fe00000", aak, prepare, "f32"),
        Case("v_fmamk_f32", "v_fmamk_f32 v10, v2, 0x3fe00000, v4", amk, prepare, "f32"),
    ]


def _special_forms() -> list[Case]:
    """Saturation, select masks, bit tables, halves, half destinations."""
    out = []

    def two(type: str = "u32"):
        def prepare(state: State) -> None:
            for r in (2, 4, 6):
                fill(state, r, type)

        return prepare

    for name, f in (
        ("v_add_u32", lambda a, b: min(a + b, M32)),
        ("v_sub_u32", lambda a, b: max(a - b, 0)),
        ("v_subrev_u32", lambda a, b: max(b - a, 0)),
    ):

        def saturated(state: State, f=f) -> None:
            write(state, 10, ints(f)(read(state, 2, "u32"), read(state, 4, "u32")), "u32")

        out.append(Case(name, f"{name}_e64 v10, v2, v4 clamp", saturated, two()))

    def select(state: State) -> None:
        mask = np.array([state.get64(20) >> n & 1 for n in range(64)], bool)
        write(state, 10, np.where(mask, read(state, 4, "u32"), read(state, 2, "u32")), "u32")

    def select_vcc(state: State) -> None:
        mask = np.array([state.vcc >> n & 1 for n in range(64)], bool)
        write(state, 10, np.where(mask, read(state, 4, "u32"), read(state, 2, "u32")), "u32")

    def select_signed(state: State) -> None:
        mask = np.array([state.get64(20) >> n & 1 for n in range(64)], bool)
        a, b = read(state, 2, "u32") ^ U32(1 << 31), read(state, 4, "u32") & U32(M32 >> 1)
        write(state, 10, np.where(mask, b, a), "u32")

    out += [
        Case("v_cndmask_b32", "v_cndmask_b32_e64 v10, v2, v4, s[20:21]", select, two()),
        Case("v_cndmask_b32", "v_cndmask_b32_e32 v10, v2, v4, vcc", select_vcc, two()),
        Case("v_cndmask_b32", "v_cndmask_b32_e64 v10, -v2, |v4|, s[20:21]", select_signed, two()),
    ]
    for table in (0xEC, 0x96, 0x1B):

        def bits32(state: State, table=table) -> None:
            f = ints(lambda a, b, c: _table3(a, b, c, table))
            write(state, 10, f(*(read(state, r, "u32") for r in (2, 4, 6))), "u32")

        def bits16(state: State, table=table) -> None:
            f = ints(lambda a, b, c: _table3(a, b, c, table, 16))
            write(state, 10, f(*(read(state, r, "u16") for r in (2, 4, 6))), "u16", True)

        out.append(
            Case(
                "v_bitop3_b32",
                f"v_bitop3_b32 v10, v2, v4, v6 bitop3:{table:#x}",
                bits32,
                two(),
                archs=CDNA4,
            )
        )
        out.append(
            Case(
                "v_bitop3_b16",
                f"v_bitop3_b16 v10, v2, v4, v6 bitop3:{table:#x}",
                bits16,
                two(),
                archs=CDNA4,
            )
        )

    def shift_add(state: State) -> None:
        a, c = read(state, 2, "u64"), read(state, 6, "u64")
        write(state, 10, longs(lambda a, c: (a << 3) + c)(a, c), "u64")

    def longs_ready(state: State) -> None:
        fill(state, 2, "u64"), fill(state, 6, "u64")

    out.append(
        Case("v_lshl_add_u64", "v_lshl_add_u64 v[10:11], v[2:3], 3, v[6:7]", shift_add, longs_ready)
    )

    # op_sel: the upper halves of both sources, into the upper half of the destination.
    def halves(state: State) -> None:
        a, b, c = (typed(state.v[r] >> 16, "f16") for r in (2, 4, 6))
        with np.errstate(all="ignore"):
            bits = FMA16(a, b, c).view(np.uint16).astype(U32) << 16
        on = state.active
        state.v[10][on] = (bits | state.v[10] & U32(0xFFFF))[on]

    out.append(
        Case("v_fma_f16", "v_fma_f16 v10, v2, v4, v6 op_sel:[1,1,1,1]", halves, two("f16"), "pk16")
    )

    # Division: scaled operands, an unscaled quotient, a fixed-up result.
    return out


def _carries() -> list[Case]:
    out = []
    for name, f in {
        "v_add_co_u32": lambda a, b, c: a + b,
        "v_sub_co_u32": lambda a, b, c: a - b,
        "v_subrev_co_u32": lambda a, b, c: b - a,
        "v_addc_co_u32": lambda a, b, c: a + b + c,
        "v_subb_co_u32": lambda a, b, c: a - b - c,
        "v_subbrev_co_u32": lambda a, b, c: b - a - c,
    }.items():
        carry_in = name[2:].startswith(("addc", "subb"))
        for d, i in (("vcc", "vcc"), ("s[22:23]", "s[20:21]")):

            def expect(state: State, f=f, d=d, i=i) -> None:
                mask = state.vcc if i == "vcc" else state.get64(20)
                rows = zip(state.v[2].tolist(), state.v[4].tolist(), strict=True)
                exact = [f(a, b, mask >> n & 1) for n, (a, b) in enumerate(rows)]
                carries = sum((x < 0 or x > M32) << n for n, x in enumerate(exact)) & state.exec
                write(state, 10, np.array([x & M32 for x in exact], U32), "u32")
                if d == "vcc":
                    state.vcc = carries
                else:
                    state.set64(22, carries)

            def prepare(state: State) -> None:
                fill(state, 2, "u32"), fill(state, 4, "u32")

            suffix = "_e32" if d == "vcc" else "_e64"
            text = f"{name}{suffix} v10, {d}, v2, v4" + (f", {i}" if carry_in else "")
            out.append(Case(name, text, expect, prepare))
    for name, signed in (("v_mad_u64_u32", False), ("v_mad_i64_i32", True)):

        def mad(state: State, signed=signed) -> None:
            a, b, c = (read(state, r, t).tolist() for r, t in ((2, "u32"), (4, "u32"), (6, "u64")))
            if signed:
                a, b, c = [S(x) for x in a], [S(x) for x in b], [S(x, 64) for x in c]
            exact = [x * y + z for x, y, z in zip(a, b, c, strict=True)]
            write(state, 10, np.array([x & (1 << 64) - 1 for x in exact], U64), "u64")
            state.set64(22, sum((x >> 64 & 1) << n for n, x in enumerate(exact)) & state.exec)

        def wide_ready(state: State) -> None:
            fill(state, 2, "u32"), fill(state, 4, "u32"), fill(state, 6, "u64")

        out.append(Case(name, f"{name} v[10:11], s[22:23], v2, v4, v[6:7]", mad, wide_ready))
    return out


# --- fused multiply-add of mixed precision ---
def _mixed() -> list[Case]:
    out = []

    def prepare(state: State) -> None:
        fill(state, 2, "f16"), fill(state, 4, "f32", gentle=True), fill(state, 6, "f16")

    def operands(state: State) -> list[np.ndarray]:
        a = typed(state.v[2] >> 16, "f16").astype(F64)  # the upper half
        b = -read(state, 4, "f32").astype(F64)
        c = np.abs(read(state, 6, "f16").astype(F64))
        return [a, b, c]

    text = "v10, v2, -v4, |v6| op_sel:[1,0,0] op_sel_hi:[1,0,1]"

    def to_f32(state: State) -> None:
        with np.errstate(all="ignore"):
            write(
                state, 10, codes(lambda a, b, c: fma(a, b, c, "f32"), F32)(*operands(state)), "f32"
            )

    def half(state: State, high: bool) -> None:
        with np.errstate(all="ignore"):
            bits = codes(lambda a, b, c: fma(a, b, c, "f16"), F16)(*operands(state)).view(np.uint16)
        on, bits = state.active, bits.astype(U32)
        keep = U32(0xFFFF if high else 0xFFFF0000)
        state.v[10][on] = (bits << (16 if high else 0) | state.v[10] & keep)[on]

    out.append(Case("v_fma_mix_f32", f"v_fma_mix_f32 {text}", to_f32, prepare, "f32"))
    out.append(
        Case(
            "v_fma_mixlo_f16", f"v_fma_mixlo_f16 {text}", lambda s: half(s, False), prepare, "pk16"
        )
    )
    out.append(
        Case("v_fma_mixhi_f16", f"v_fma_mixhi_f16 {text}", lambda s: half(s, True), prepare, "pk16")
    )
    return out


# --- 8- and 4-bit floats ---
def _small(arch: str, kind: str) -> str:
    return f"{kind}_fnuz" if arch == "gfx942" else kind


def _small_conversions() -> list[Case]:
    out = []

    def bytes_ready(state: State) -> None:
        """Every code: lane and seed run through all 256."""
        start = int(state.rng.integers(0, 256))
        codes = (start + np.arange(256)) % 256
        packed = codes.reshape(64, 4).astype(U32)
        state.v[2] = packed[:, 0] | packed[:, 1] << 8 | packed[:, 2] << 16 | packed[:, 3] << 24

    def floats_ready(state: State) -> None:
        fill(state, 2, "f32"), fill(state, 4, "f32")
        # Halfway points of every pair of neighbours, and values just off them.
        grid = np.array([decode(c, "fp8") for c in range(0x7F)], F32)
        mid = (grid[1:] + grid[:-1]) / 2
        toward = np.where(state.rng.integers(0, 2, 32) == 1, np.inf, -np.inf).astype(F32)
        state.v[4][32:] = np.nextafter(state.rng.choice(mid, 32), toward).view(U32)
        state.v[2][32:] = (
            (state.rng.choice(mid, 32) * state.rng.choice([1, -1, 0.5, 2.0**-9], 32))
            .astype(F32)
            .view(U32)
        )

    for arch in BOTH:
        for kind in ("fp8", "bf8"):
            fmt = _small(arch, kind)
            for byte in range(4):

                def one(state: State, fmt=fmt, byte=byte) -> None:
                    write(state, 10, decode_array(state.v[2] >> 8 * byte & 255, fmt), "f32")

                sel = {0: "", 1: " src0_sel:BYTE_1", 2: " src0_sel:BYTE_2", 3: " src0_sel:BYTE_3"}[
                    byte
                ]
                text = (
                    f"v_cvt_f32_{kind} v10, v2"
                    if byte == 0
                    else f"v_cvt_f32_{kind}_sdwa v10, v2{sel}"
                )
                out.append(
                    Case(f"v_cvt_f32_{kind}", text, one, bytes_ready, "f32", archs=(arch,), seeds=4)
                )
            for high in (0, 1):

                def two(state: State, fmt=fmt, high=high) -> None:
                    code = state.v[2] >> 16 * high
                    on = state.active
                    for n in (0, 1):
                        values = decode_array(code >> 8 * n & 255, fmt).astype(F32).view(U32)
                        state.v[10 + n][on] = values[on]

                text = (
                    f"v_cvt_pk_f32_{kind} v[10:11], v2"
                    if not high
                    else f"v_cvt_pk_f32_{kind}_sdwa v[10:11], v2 src0_sel:WORD_1"
                )
                out.append(
                    Case(
                        f"v_cvt_pk_f32_{kind}",
                        text,
                        two,
                        bytes_ready,
                        "f32",
                        archs=(arch,),
                        seeds=4,
                    )
                )

                def pack(state: State, fmt=fmt, high=high) -> None:
                    a, b = (encode_array(read(state, r, "f32").astype(F64), fmt) for r in (2, 4))
                    bits = (a & 255 | (b & 255) << 8).astype(U32) << 16 * high
                    keep = U32(0xFFFF if high else 0xFFFF0000)
                    on = state.active
                    state.v[10][on] = (bits | state.v[10] & keep)[on]

                text = f"v_cvt_pk_{kind}_f32 v10, v2, v4" + (" op_sel:[0,0,1]" if high else "")
                out.append(
                    Case(
                        f"v_cvt_pk_{kind}_f32",
                        text,
                        pack,
                        floats_ready,
                        "nan8",
                        archs=(arch,),
                        seeds=6,
                    )
                )
    for c in out:
        if c.nan == "nan8":
            c.nan = ""
    return out


def _scaled_conversions() -> list[Case]:
    out = []

    def scale_of(state: State) -> np.ndarray:
        return decode_scale(state.v[6] >> 23 & 255)

    def ready(source: str, small: str):
        def prepare(state: State) -> None:
            fill(state, 2, source, gentle=True), fill(state, 4, source, gentle=True)
            state.v[6] = (
                state.rng.integers(117, 137, 64) << 23 | state.rng.integers(0, 1 << 23, 64)
            ).astype(U32)
            if small == "from":
                state.v[2] = state.rng.integers(0, 1 << 32, 64, dtype=U32)

        return prepare

    for small in ("fp8", "bf8", "fp4"):
        bits = 4 if small == "fp4" else 8
        for big in ("f32", "f16", "bf16"):
            for pick in range(4 if bits == 4 else 2):
                at = pick * (8 if bits == 4 else 16)

                def expand(state: State, small=small, big=big, at=at, bits=bits) -> None:
                    on, scale = state.active, scale_of(state)
                    values = [
                        decode_array(state.v[2] >> U32(at + bits * n) & U32((1 << bits) - 1), small)
                        * scale
                        for n in (0, 1)
                    ]
                    if big == "f32":
                        for n in (0, 1):
                            state.v[10 + n][on] = values[n].astype(F32).view(U32)[on]
                    else:
                        low, high = (encode_array(v, big) for v in values)
                        state.v[10][on] = (low | high << 16).astype(U32)[on]

                sel = f" op_sel:[{pick & 1},{pick >> 1}]" if bits == 4 else f" op_sel:[{pick},0]"
                if bits == 8:
                    sel = f" op_sel:[{pick},0,0]"
                elif pick:
                    sel = f" op_sel:[{pick & 1},{pick >> 1},0]"
                d = "v[10:11]" if big == "f32" else "v10"
                name = f"v_cvt_scalef32_pk_{big}_{small}"
                text = f"{name} {d}, v2, v6{sel if pick else ''}"
                nan = "f32" if big == "f32" else "pk16" if big == "f16" else "bf16"
                out.append(
                    Case(name, text, expand, ready("f32", "from"), nan, archs=CDNA4, seeds=2)
                )

                def shrink(state: State, small=small, big=big, at=at, bits=bits) -> None:
                    on, scale = state.active, scale_of(state)
                    if big == "f32":
                        pair = [read(state, r, "f32").astype(F64) for r in (2, 4)]
                    else:
                        pair = [typed(state.v[2] >> 16 * n, big).astype(F64) for n in (0, 1)]
                    a, b = (encode_array((v / scale).astype(F32).astype(F64), small) for v in pair)
                    field = (a | b << bits).astype(U32) << U32(at)
                    keep = U32(M32 ^ ((1 << 2 * bits) - 1) << at)
                    state.v[10][on] = (field | state.v[10] & keep)[on]

                name = f"v_cvt_scalef32_pk_{small}_{big}"
                sources = "v2, v4, v6" if big == "f32" else "v2, v6"
                n = 4 if big == "f32" else 3
                if bits == 4:
                    sel = f" op_sel:[0,0,{pick & 1},{pick >> 1}]"
                else:
                    sel = f" op_sel:[{','.join('0' * (n - 1))},{pick}]"
                text = f"{name} v10, {sources}{sel if pick else ''}"
                out.append(Case(name, text, shrink, ready(big, "to"), archs=CDNA4, seeds=2))
    for c in out:
        if c.nan == "bf16":
            c.nan = ""
            c.prepare = _without_nan(c.prepare, c.name)
    return out


def decode_scale(e: np.ndarray) -> np.ndarray:
    """E8M0: a power of two, 255 is NaN."""
    return np.where(e == 255, np.nan, 2.0 ** (e.astype(F64) - 127))


def _without_nan(prepare, name):
    """bf16 results of NaN codes have a payload that is not modelled: leave NaN codes out."""
    kind = name.rsplit("_", 1)[-1]

    def inner(state: State) -> None:
        prepare(state)
        if kind != "fp4":
            state.v[2] &= U32(0x3F3F3F3F if kind == "fp8" else 0x7B7B7B7B & 0x3B3B3B3B)

    return inner


def _overflow_mode() -> list[Case]:
    """MODE.FP16_OVFL: overflow gives the largest finite number; infinite operands keep theirs in f16."""
    out = []

    def ready(state: State) -> None:
        state.overflow = 1
        fill(state, 2, "f32"), fill(state, 4, "f32")
        state.v[2][:8] = np.array([500, -1e5, 3e38, 448, 464, 465, 57344, 65520], F32).view(U32)

    for arch in BOTH:
        for kind in ("fp8", "bf8"):
            fmt = _small(arch, kind)

            def pack(state: State, fmt=fmt) -> None:
                top = largest(fmt)
                a, b = (np.clip(read(state, r, "f32").astype(F64), -top, top) for r in (2, 4))
                bits = (encode_array(a, fmt) & 255 | (encode_array(b, fmt) & 255) << 8).astype(U32)
                on = state.active
                state.v[10][on] = (bits | state.v[10] & U32(0xFFFF0000))[on]

            name = f"v_cvt_pk_{kind}_f32"
            out.append(Case(name, f"{name} v10, v2, v4", pack, ready, archs=(arch,)))

    def to_half(state: State) -> None:
        a = read(state, 2, "f32").astype(F64)
        a = np.where(np.isinf(a), a, np.clip(a, -65504, 65504))
        write(state, 10, encode_array(a, "f16").astype(np.uint16).view(F16), "f16")

    out.append(Case("v_cvt_f16_f32", "v_cvt_f16_f32 v10, v2", to_half, ready, "f16"))

    def halves_ready(state: State) -> None:
        state.overflow = 1
        fill(state, 2, "f16"), fill(state, 4, "f16")

    def product(state: State) -> None:
        a, b = read(state, 2, "f16").astype(F64), read(state, 4, "f16").astype(F64)
        d = np.where(np.isinf(a) | np.isinf(b), a * b, np.clip(a * b, -65504, 65504))
        write(state, 10, encode_array(d, "f16").astype(np.uint16).view(F16), "f16")

    out.append(Case("v_mul_f16", "v_mul_f16 v10, v2, v4", product, halves_ready, "f16"))
    return out


def _fixup_f16() -> list[Case]:
    """V_DIV_FIXUP_F16: the quotient's sign and the special cases of a division."""

    def ready(state: State) -> None:
        for r in (2, 4, 6):
            fill(state, r, "f16")

    def expect(state: State) -> None:
        q, den, num = (read(state, r, "f16").astype(F64) for r in (2, 4, 6))
        sign = np.where(np.signbit(den) ^ np.signbit(num), -1.0, 1.0)
        out = np.abs(np.where(np.isnan(q), np.inf, q)) * sign
        out = np.where(np.isinf(den) | (num == 0), sign * 0.0, out)
        out = np.where((den == 0) | np.isinf(num), sign * np.inf, out)
        bad = (
            np.isnan(den)
            | np.isnan(num)
            | ((den == 0) & (num == 0))
            | (np.isinf(den) & np.isinf(num))
        )
        out = np.where(bad, np.nan, out).astype(F16)
        write(state, 10, out, "f16", keep_high=True)

    text = "v_div_fixup_f16 v10, v2, v4, v6"
    return [Case("v_div_fixup_f16", text, expect, ready, "f16")]


CASES: list[Case] = []
for _op in OPS:
    CASES += op_cases(_op)
CASES += _madk() + _special_forms() + _carries() + _mixed()
CASES += _small_conversions() + _scaled_conversions() + _overflow_mode() + _fixup_f16()
