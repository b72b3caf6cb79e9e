"""The inline PTX of the kernels for few tokens, carried out in numpy for one warp."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")
from moe_backend.formats.nvfp4 import E2M1_VALUES
from moe_backend.kernels.hopper import few_device

WARP = 32
VALUES = np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])


def carry_out(asm, operands):
    """Run the text; operands are arrays over lanes, `$0...` by name. Returns all of them."""
    value = dict(operands)

    def read(name):
        return value[name] if name in value else np.uint32(int(name, 0))

    for statement in re.sub(r"\.reg[^;]*;", "", asm.strip()[1:-1]).split(";"):
        if not (text := " ".join(statement.split())):
            continue
        name, rest = text.split(" ", 1)
        operands = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        to, *given = operands
        if name == "mov.b32":
            low, high = to[1:-1].replace(" ", "").split(",")
            value[low], value[high] = read(given[0]) & 0xFFFF, read(given[0]) >> 16
            continue
        x = [read(n) for n in given]
        if name == "and.b32":
            result = x[0] & x[1]
        elif name == "shr.b32":
            result = x[0] >> x[1]
        elif name == "shl.b32":
            result = x[0] << x[1]
        elif name == "lop3.b32":
            assert x[3] == 0xEA  # (a & b) | c
            result = (x[0] & x[1]) | x[2]
        elif name == "cvt.f32.f16":
            result = x[0].astype(np.uint16).view(np.float16).astype(np.float64)
        else:
            raise AssertionError(text)
        value[to] = result
    return value


def codes_of(words):
    """`[..., 8]` values of the e2m1 codes of a word, the lowest nibble first."""
    return VALUES[words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15]


def test_decode():
    word = np.random.default_rng(0).integers(0, 2**32, WARP, dtype=np.uint32)
    value = carry_out(few_device._DECODE.value, {"$8": word})
    found = np.stack([value[f"${i}"] for i in range(8)], -1)
    columns = codes_of(word) * 2.0**-14
    assert np.array_equal(found, np.concatenate([columns[:, 0::2], columns[:, 1::2]], -1))
