"""NVFP4 codes in the order of bits that Hopper's decoders take."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from moe_backend.activation import Activation
from moe_backend.formats.nvfp4 import unpack
from moe_backend.kernels.hopper import codes, kernel
from moe_backend.kernels.hopper.tiles import Once
from moe_backend.verify.problems import Case, build

WORD = 2**32 - 1


def turned(words, by):
    return (words << by | words >> 32 - by) & WORD


def codes_of(words):
    """Codes of int32 words as bf16's mask finds them: `[..., 8]`, the first column first."""
    words = words.long() & WORD
    pairs = [words, turned(words, 10), turned(words, 13), (words & 0x001B001B) * 0x4108]
    found = [half >> 12 & 8 | half >> 6 & 7 for half in pairs]
    found += [half >> 28 & 8 | half >> 22 & 7 for half in pairs]
    return torch.stack(found, -1)


def scales_of_rows(blocks, gate_up, groups):
    """The inverse of `rearranged_scales`, for so many groups of a row."""
    e, units, steps, _ = blocks.shape
    apart = blocks.view(torch.uint8).view(e, units, steps, 8, 4, 2, 4)
    order = (0, 5, 1, 3, 2, 4, 6) if gate_up else (0, 1, 5, 3, 2, 4, 6)
    rows = apart.permute(order).reshape(e, units * 16, steps * 16)[..., :groups]
    return rows.contiguous().view(blocks.dtype)


@pytest.mark.parametrize("words_at_a_time", [2**21, 100])
def test_the_decoders_find_each_code_where_it_was(words_at_a_time, monkeypatch):
    monkeypatch.setattr(codes, "WORDS_AT_A_TIME", words_at_a_time)
    given = torch.randint(0, 256, (5, 6, 64), dtype=torch.uint8)
    words = codes.rearranged(given)
    assert words.dtype == torch.int32
    assert words.shape == (5, 6, 16)
    assert torch.equal(codes_of(words).flatten(-2), unpack(given).long())


def test_each_bit_has_a_place_of_its_own():
    bits = torch.ones(32, dtype=torch.long) << torch.arange(32)
    given = bits[:, None] >> torch.arange(0, 32, 8) & 255
    words = codes.rearranged(given.to(torch.uint8)[None]).long().flatten() & WORD
    assert sorted(words.tolist()) == bits.tolist()


def test_what_is_not_in_rows_is_read_as_it_is():
    given = torch.randint(0, 256, (3, 8, 32), dtype=torch.uint8)
    other = given.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(codes.rearranged(other), codes.rearranged(given))


@pytest.mark.parametrize("groups", [16, 48, 12])
@pytest.mark.parametrize("gate_up", [True, False])
def test_scales_lie_where_the_kernels_look(gate_up, groups):
    """Of each scale the row of 16, the step, and the place in the step, one by one."""
    rows = 64
    given = torch.randint(1, 127, (3, rows, groups), dtype=torch.uint8)
    found = codes.rearranged_scales(given.view(torch.float8_e4m3fn), gate_up).view(torch.uint8)
    steps = -(-groups // 16)
    assert found.shape == (3, rows // 16, steps, 256)
    assert found.count_nonzero() == given.numel()  # zeros beside them
    again = scales_of_rows(found.view(torch.float8_e4m3fn), gate_up, groups)
    assert torch.equal(again.view(torch.uint8), given)
    for row, group in product(range(rows), range(groups)):
        if gate_up:
            unit, second, g = row % (rows // 2) // 8, row // (rows // 2), row % 8
        else:
            unit, second, g = row // 16, row // 8 % 2, row % 8
        at = g * 32 + group % 16 // 4 * 8 + second * 4 + group % 4
        assert torch.equal(found[:, unit, group // 16, at], given[:, row, group])


def test_weights_in_the_checkpoints_order_are_refused():
    problem = build(Case("nvfp4", Activation.from_name("silu"), hidden_size=256))
    given = problem.x, problem.topk_weights, problem.topk_ids, problem.expert_map
    unprepared, prepared = (
        problem.weights.tensors(), kernel.HopperKernel().prepare(problem.weights)
    )  # fmt: skip
    for which in (0, 1):
        tensors = list(prepared)
        tensors[which] = unprepared[which]
        with pytest.raises(TypeError, match="in the checkpoint's order: `prepare` them first"):
            kernel.run(problem.layer, tensors, *given, Once(1))
