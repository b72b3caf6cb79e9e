"""The inline PTX of the kernels for few tokens, carried out in numpy for one warp."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from moe_backend.formats.nvfp4 import E2M1_VALUES
from moe_backend.kernels.hopper import few_device
from moe_backend.kernels.hopper.codes import rearranged

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
        x = [read(n) for n in given]
        if name == "and.b32":
            result = x[0] & x[1]
        elif name == "mov.b32":
            result = x[0]
        elif name == "shl.b32":
            result = x[0] << x[1]
        elif name == "shf.l.wrap.b32":
            assert 0 < x[2] < 32
            result = x[0] >> (32 - x[2]) | x[1] << x[2]
        elif name == "mul.lo.u32":
            result = x[0] * x[1]
        elif name == "mul.rn.bf16x2":
            result = product_of_pairs(x[0], x[1])
        else:
            raise AssertionError(text)
        value[to] = result
    return value


def product_of_pairs(a, b):
    """Of two bf16 numbers each, exact here: nothing is left to round."""
    halves = []
    for shift in (16, 0):
        x, y = (((w << np.uint32(shift)) & np.uint32(0xFFFF0000)) for w in (a, b))
        product = x.view(np.float32) * y.view(np.float32)
        bits = product.view(np.uint32)
        assert not (bits & 0xFFFF).any()
        halves.append(bits)
    return halves[0] >> np.uint32(16) | halves[1]


def codes_of(words):
    """`[..., 8]` values of the e2m1 codes of a word, the lowest nibble first."""
    return VALUES[words[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15]


def test_decode():
    word = np.random.default_rng(0).integers(0, 2**32, WARP, dtype=np.uint32)
    codes = torch.from_numpy(word.view(np.uint8).copy()).view(1, 1, -1)
    own = rearranged(codes).numpy().view(np.uint32).reshape(WARP)
    value = carry_out(few_device._DECODE.value, {"$8": own})
    found = np.stack([value[f"${i}"].view(np.float32) for i in range(8)], -1)
    columns = codes_of(word)
    assert np.array_equal(found, np.concatenate([columns[:, 0::2], columns[:, 1::2]], -1))
