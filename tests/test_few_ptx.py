"""The inline PTX of the kernels for few tokens, carried out in numpy for one warp."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from moe_backend.formats.nvfp4 import E2M1_VALUES
from moe_backend.kernels.hopper import few_device

WARP = 32
VALUES = np.array([*E2M1_VALUES, *(-v for v in E2M1_VALUES)])


def bf16(words):
    """`[..., 2]` numbers (low half first) that 32-bit words hold as bf16."""
    halves = np.stack([words << 16, words & 0xFFFF0000], -1).astype(np.uint32)
    return halves.view(np.float32).astype(np.float64)


def words_of(numbers):
    """The inverse; the numbers must be exact in bf16."""
    bits = numbers.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits[..., 0] >> 16) | bits[..., 1]


def mma(a, b, c):
    """m16n8k16 with bf16 operands; PTX ISA, "Matrix Fragments for mma.m16n8k16"."""
    left, right = np.zeros((16, 16)), np.zeros((16, 8))
    lane = np.arange(WARP)
    row, t = lane // 4, lane % 4
    for register, (down, across) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
        for half in range(2):
            left[row + down, 2 * t + across + half] = bf16(a[register])[:, half]
    for register in range(2):
        for half in range(2):
            right[2 * t + 8 * register + half, row] = bf16(b[register])[:, half]
    product = left @ right
    places = ((0, 0), (0, 1), (8, 0), (8, 1))
    return [c[i] + product[row + down, 2 * t + n] for i, (down, n) in enumerate(places)]


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
        if name.startswith("mma"):
            a, b, c = ([read(n.strip()) for n in group[1:-1].split(",")] for group in given)
            for target, result in zip(to[1:-1].split(","), mma(a, b, c), strict=True):
                value[target.strip()] = result
            continue
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
        elif name == "mul.lo.u32":
            result = (x[0].astype(np.uint64) * int(x[1]) & 0xFFFFFFFF).astype(np.uint32)
        elif name == "mul.rn.bf16x2":
            result = words_of(bf16(x[0]) * bf16(x[1]))
        elif name == "lop3.b32":
            assert x[3] == 0xEA  # (a & b) | c
            result = (x[0] & x[1]) | x[2]
        elif name == "prmt.b32":
            source = (x[0].astype(np.uint64)) | (x[1].astype(np.uint64) << np.uint64(32))
            picks = [int(x[2]) >> (4 * i) & 15 for i in range(4)]
            result = sum(
                (source >> np.uint64(8 * p) & np.uint64(255)) << np.uint64(8 * i)
                for i, p in enumerate(picks)
            ).astype(np.uint32)
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


def test_mma():
    g = np.random.default_rng(0)
    rows = g.integers(0, 2**32, (2, WARP), dtype=np.uint32)
    x = g.integers(-9, 10, (4, 8)).astype(np.float64)  # a lane's columns, for all groups the same
    x = x[np.arange(WARP) % 4]
    scales = torch.tensor(g.choice([0.5, 1.0, 2.0, 448.0, 0.001953125], (2, WARP)))
    scales = scales.to(torch.float8_e4m3fn).double().numpy()
    spread = words_of(np.stack([scales, scales], -1) * 2.0**118)
    start = g.integers(-99, 100, (4, WARP)).astype(np.float64)
    words = words_of(x.reshape(WARP, 4, 2))
    given = {"$4": rows[0], "$5": rows[1], "$10": spread[0], "$12": spread[1]}
    given |= {f"${6 + i}": words[:, i] for i in range(4)}
    given |= {f"${14 + i}": start[i] for i in range(4)}
    value = carry_out(few_device._MMA.value, given)
    for row in range(2):
        products = (codes_of(rows[row]) * x).sum(-1) * scales[row]
        expected = products.reshape(8, 4).sum(1).repeat(4)  # of each quartet, in all its lanes
        for column in range(2):
            found = value[f"${2 * row + column}"] - start[2 * row + column]
            np.testing.assert_allclose(found * 256, expected, rtol=0, atol=1e-9)
