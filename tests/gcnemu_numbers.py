"""Number formats from their definitions, in exact arithmetic: the tests' own, not the emulator's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Format:
    """A binary float. nan: "ieee" (infinities too), "all-ones" (e4m3fn), "fnuz" or "none"."""

    exponent: int
    mantissa: int
    bias: int
    nan: str

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa


FORMATS = {
    "f32": Format(8, 23, 127, "ieee"),
    "f16": Format(5, 10, 15, "ieee"),
    "bf16": Format(8, 7, 127, "ieee"),
    "fp8": Format(4, 3, 7, "all-ones"),
    "bf8": Format(5, 2, 15, "ieee"),
    "fp8_fnuz": Format(4, 3, 8, "fnuz"),
    "bf8_fnuz": Format(5, 2, 16, "fnuz"),
    "fp6": Format(2, 3, 1, "none"),
    "bf6": Format(3, 2, 3, "none"),
    "fp4": Format(2, 1, 1, "none"),
}


def decode(code: int, name: str) -> float:
    """The value of a code."""
    f = FORMATS[name]
    sign = -1.0 if code >> (f.bits - 1) & 1 else 1.0
    exponent = code >> f.mantissa & ((1 << f.exponent) - 1)
    mantissa = code & ((1 << f.mantissa) - 1)
    top = exponent == (1 << f.exponent) - 1
    if f.nan == "ieee" and top:
        return math.nan if mantissa else sign * math.inf
    if f.nan == "all-ones" and top and mantissa == (1 << f.mantissa) - 1:
        return math.nan
    if f.nan == "fnuz" and sign < 0 and exponent == 0 and mantissa == 0:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - f.bias - f.mantissa)
    return sign * math.ldexp((1 << f.mantissa) + mantissa, exponent - f.bias - f.mantissa)


def encode(value: float | Fraction, name: str, toward_zero: bool = False) -> int:
    """Nearest code, ties to the even one; beyond the range infinity or NaN, or the largest code."""
    f = FORMATS[name]
    sign_bit = 1 << (f.bits - 1)
    negative = math.copysign(1, value) < 0 if isinstance(value, float) else value < 0
    sign = sign_bit if negative else 0
    if isinstance(value, float) and math.isnan(value):  # small formats: all ones, with the sign
        quiet = sign_bit - 1 if f.mantissa < 7 else sign_bit - (1 << (f.mantissa - 1))
        return sign_bit if f.nan == "fnuz" else sign | quiet
    infinite = isinstance(value, float) and math.isinf(value)
    largest = sign_bit - 1
    if f.nan == "ieee":
        largest = ((1 << f.exponent) - 1 << f.mantissa) - 1
    elif f.nan == "all-ones":
        largest -= 1
    overflow = {
        "ieee": sign | (largest + 1),
        "all-ones": sign | (sign_bit - 1),
        "fnuz": sign_bit,
        "none": sign | largest,
    }[f.nan]
    if infinite:
        return overflow
    exact = abs(Fraction(value))
    if exact == 0:
        return 0 if f.nan == "fnuz" else sign
    # exponent of the value, not below that of subnormals
    e = exact.numerator.bit_length() - exact.denominator.bit_length()
    if exact < Fraction(2) ** e:
        e -= 1
    e = max(e, 1 - f.bias)
    units = exact / Fraction(2) ** (e - f.mantissa)
    whole = units.numerator // units.denominator
    rest = units - whole
    if not toward_zero and (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole & 1)):
        whole += 1
    code = (e - (1 - f.bias)) * (1 << f.mantissa) + whole
    if code > largest:
        return sign | largest if toward_zero else overflow
    return 0 if f.nan == "fnuz" and code == 0 else sign | code


def decode_array(codes: np.ndarray, name: str) -> np.ndarray:
    """float64 values of an array of codes."""
    table = np.array([decode(c, name) for c in range(1 << FORMATS[name].bits)])
    return table[codes.astype(np.int64)]


def largest(name: str) -> float:
    """The largest finite value."""
    f = FORMATS[name]
    return max(v for c in range(1 << (f.bits - 1)) if math.isfinite(v := decode(c, name)))


def encode_array(values: np.ndarray, name: str) -> np.ndarray:
    return np.array([encode(float(v), name) for v in values.ravel()], np.uint32).reshape(
        values.shape
    )


def fma(a: float, b: float, c: float, name: str) -> int:
    """Code of a * b + c, rounded once."""
    if not all(map(math.isfinite, (a, b, c))):
        with np.errstate(all="ignore"):
            return encode(float(np.float64(a) * np.float64(b) + np.float64(c)), name)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:  # zeros add with their signs; terms that cancel give plus zero
        return encode(a * b + c if a == 0 or b == 0 else 0.0, name)
    return encode(exact, name)
