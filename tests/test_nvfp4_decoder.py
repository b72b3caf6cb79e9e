"""The instructions of the Hopper NVFP4 decoder, modelled one by one, over every code and scale.

Semantics are those of the PTX ISA: `prmt` without sign replication, 32-bit logic and shifts, the
low word of `mul.lo`, and `mul.rn.bf16x2`, which takes and gives subnormal numbers (PTX ISA 8.7,
"Half Precision Floating Point Instructions: mul": "By default, subnormal numbers are supported").
"""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl

from moe_backend.formats.nvfp4 import E2M1_VALUES, dequantize
from moe_backend.kernels.hopper import device
from moe_backend.kernels.hopper.codes import rearranged

WORD = 2**32 - 1


def halves(word):
    """The bf16 numbers of a 32-bit word, low one first, as float64 (exact)."""
    bits = torch.stack([word & 0xFFFF, word >> 16])
    return (bits << 16).to(torch.int32).view(torch.float32).double()


def rounded(value):
    """The 32-bit word of two numbers in bf16, rounded to nearest even from an exact product."""
    # Products of two bf16 numbers are exact in fp32 unless subnormal; torch's CPU cast keeps those.
    bits = value.float().bfloat16().view(torch.int16).long() & 0xFFFF
    return bits[0] | bits[1] << 16


def byte_permute(a, b, selector):
    out = torch.zeros_like(a)
    for i in range(4):
        which = selector >> 4 * i & 15
        assert which < 8, "sign replication is not modelled"
        source = a if which < 4 else b
        out |= (source >> 8 * (which % 4) & 0xFF) << 8 * i
    return out


def execute(code, given):
    """Run inline PTX; `given` has the input operands by name, int64 tensors. Gives all values."""
    values = dict(given)
    pattern = re.compile(r"\s*([\w.]+)\s+(.*)")

    def operand(text):
        if text.startswith("{"):
            low, high = (values[t.strip()] for t in text[1:-1].split(","))
            return low | high << 16
        return values[text] if text in values else torch.tensor(int(text, 0))

    for line in code.replace("\n", " ").strip().strip("{}").split(";"):
        match = pattern.fullmatch(line)
        if match is None or match[1] == ".reg":
            continue
        name = match[1]
        arguments = re.findall(r"\{[^}]*\}|[^,\s]+", match[2])
        target, sources = arguments[0], [operand(a) for a in arguments[1:]]
        if name == "prmt.b32":
            result = byte_permute(sources[0], sources[1], int(sources[2]))
        elif name == "and.b32":
            result = sources[0] & sources[1]
        elif name == "shl.b32":
            result = sources[0] << sources[1] & WORD
        elif name == "shf.l.wrap.b32":
            assert 0 < sources[2] < 32
            result = (sources[0] >> 32 - sources[2] | sources[1] << sources[2]) & WORD
        elif name == "mul.lo.u32":
            result = sources[0] * sources[1] & WORD
        elif name == "mul.rn.bf16x2":
            result = rounded(halves(sources[0]) * halves(sources[1].expand_as(sources[0])))
        elif name == "mov.b32":
            result = sources[0]
        else:
            raise AssertionError(f"not modelled: {name}")
        if target.startswith("{"):
            low, high = (t.strip() for t in target[1:-1].split(","))
            values[low], values[high] = result & 0xFFFF, result >> 16
        else:
            values[target] = result
    return values


def scale_words():
    """bf16 bits of every scale times 2**118, by the decoder's instructions."""
    codes = torch.arange(128)  # 0x7F is NaN, and fills the last word
    words = codes[::4] | codes[1::4] << 8 | codes[2::4] << 16 | codes[3::4] << 24
    out = execute(device._DECODE_SCALES.value, {"$2": words})
    parts = [out["$0"] & 0xFFFF, out["$0"] >> 16, out["$1"] & 0xFFFF, out["$1"] >> 16]
    return torch.stack(parts, 1).flatten()[:127]


def test_scales():
    want = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).double() * 2.0**118
    assert torch.equal(halves(scale_words())[0], want)


def test_a_scale_of_minus_zero_is_zero():
    out = execute(device._DECODE_SCALES.value, {"$2": torch.tensor([0x80808080])})
    assert out["$0"].item() == out["$1"].item() == 0


def as_bytes(words):
    """`[1, 1, ...]` uint8 of 32-bit words."""
    parts = [words >> 8 * i & 0xFF for i in range(4)]
    return torch.stack(parts, -1).to(torch.uint8).reshape(1, 1, -1)


@pytest.mark.parametrize("nibble", range(8))
def test_codes_times_scales(nibble):
    """Each code in each of the eight places of a word, beside all-ones and beside zeros."""
    scales = scale_words()
    code = torch.arange(16)[:, None, None]
    others = torch.tensor([0, WORD & ~(15 << 4 * nibble)])[:, None]
    word = (code << 4 * nibble | others).expand(16, 2, 127)
    word = rearranged(as_bytes(word)).view(16, 2, 127).long() & WORD
    out = execute(device._DECODE.value, {"$8": word, "$9": scales.expand(16, 2, 127)})
    place = {0: 0, 4: 1, 2: 2, 6: 3, 1: 4, 5: 5, 3: 6, 7: 7}[nibble]
    found = halves(out[f"${place}"])[0]
    values = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
    real = torch.arange(127).to(torch.uint8).view(torch.float8_e4m3fn).double()
    want = values[:, None, None] * real / 256
    assert torch.equal(found, want.expand(16, 2, 127))


@triton.jit
def _column(position):
    """The inverse of `_nvfp4_position`."""
    p = position % 128
    byte = (p % 8) // 2 * 32 + p // 16 * 4 + p % 2 * 2 + (p % 16) // 8
    return position // 256 * 256 + 2 * byte + (position % 256) // 128


def test_columns_and_positions_are_inverse():
    column = torch.arange(1024)
    position = device._nvfp4_position.fn(column)
    assert torch.equal(position.sort().values, column)
    assert torch.equal(_column.fn(position), column)


@triton.jit
def _decoder(words, scales, out):
    row, word, group = tl.arange(0, 64), tl.arange(0, 32), tl.arange(0, 16)
    packed = tl.load(words + row[:, None] * 32 + word[None, :])
    scale = tl.load(scales + row[:, None] * 16 + group[None, :])
    even, odd = device._decode_nvfp4(packed, scale, 64, True, tl.bfloat16)
    place = tl.arange(0, 128)
    tl.store(out + row[:, None] * 256 + _column(place)[None, :], even)
    tl.store(out + row[:, None] * 256 + _column(place + 128)[None, :], odd)


@pytest.mark.gpu
def test_decoder_on_a_gpu():
    """Every code with every scale, in the columns that the position function says."""
    if torch.version.hip:
        pytest.skip("the decoder is PTX")
    g = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(16, generator=g) for _ in range(64 * 16)])
    codes = (order[:, ::2] | order[:, 1::2] << 4).to(torch.uint8).reshape(64, 128)
    scales = (torch.arange(64 * 16) % 127).to(torch.uint8).view(torch.float8_e4m3fn).reshape(64, 16)
    out = torch.zeros(64, 256, dtype=torch.bfloat16, device="cuda")
    _decoder[(1,)](rearranged(codes.cuda()[None]), scales.cuda(), out)
    want = dequantize(codes, scales, torch.ones(1), torch.float32)
    assert torch.equal(out.cpu().float() * 256, want)
