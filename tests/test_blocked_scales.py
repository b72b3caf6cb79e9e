"""The 128x4 scale layout, index by index against CUTLASS's own layout algebra and against ours."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_backend.layout.blocked_scales import (
    BlockedScales,
    from_blocked,
    offset,
    padded_columns,
    padded_rows,
    physical_size,
    to_blocked,
)

# Rows and K/16: whole blocks, one short of and one past a block, K not a multiple of 64.
SIZES = [(128, 4), (1, 1), (127, 3), (129, 5), (300, 7), (256, 12), (40, 10), (384, 2)]


def cute_layout(shape, stride, coordinate):
    """CuTe's definition: a coordinate is split over nested modes, first mode fastest."""
    if isinstance(shape, int):
        return coordinate * stride
    total = 0
    for s, d in zip(shape, stride, strict=True):
        size = cute_size(s)
        total += cute_layout(s, d, coordinate % size)
        coordinate //= size
    return total


def cute_size(shape):
    if isinstance(shape, int):
        return shape
    product = 1
    for part in shape:
        product *= cute_size(part)
    return product


def by_hand(rows, columns):
    """The scale-factor layout, written out from its atom.

    One atom covers 128 rows, shape (32, 4), and four vectors of 16 values along K, shape (16, 4),
    strides ((16, 4), (0, 1)): the 16 values of a vector share a scale. Atoms are tiled along K
    first, then along the rows.
    """
    wide = -(-columns // 4)
    row_mode = (((32, 4), -(-rows // 128)), ((16, 4), 512 * wide))
    column_mode = (((16, 4), wide), ((0, 1), 512))
    return torch.tensor(
        [
            [cute_layout(*row_mode, r) + cute_layout(*column_mode, 16 * c) for c in range(columns)]
            for r in range(rows)
        ]
    )


def ours(rows, columns):
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    return offset(row, column, columns)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_offset_equals_layout_algebra(rows, columns):
    assert torch.equal(ours(rows, columns), by_hand(rows, columns))


@pytest.mark.skipif(
    importlib.util.find_spec("cutlass") is None,
    reason="nvidia-cutlass-dsl is not installed (requirements/dev.txt; Linux on x86-64 only)",
)
def test_offset_equals_cutlass():
    shapes = [(rows, columns, experts) for rows, columns in SIZES for experts in (1, 3)]
    script = Path(__file__).with_name("blocked_scales_cutlass.py")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), json.dumps(shapes)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert len(found) == len(shapes)
    for (rows, columns, experts), (index, size) in zip(shapes, found, strict=True):
        each = physical_size(rows, columns)
        assert size == experts * each
        for e in range(experts):
            assert torch.equal(torch.tensor(index[e]), ours(rows, columns) + e * each)


@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_to_blocked_puts_every_scale_at_its_offset(rows, columns):
    g = torch.Generator().manual_seed(rows)
    scales = torch.randint(1, 256, (2, rows, columns), dtype=torch.uint8, generator=g)
    blocked = to_blocked(scales)
    assert blocked.shape == (2, physical_size(rows, columns))
    index = ours(rows, columns)
    expected = torch.zeros_like(blocked)
    expected[:, index.flatten()] = scales.flatten(1)  # and zeros in every padding position
    assert torch.equal(blocked, expected)
    assert torch.equal(from_blocked(blocked, rows, columns), scales)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 40))
def test_offsets_are_distinct_and_inside(rows, columns):
    index = ours(rows, columns).flatten()
    assert index.unique().numel() == index.numel()
    assert 0 <= int(index.min()) <= int(index.max()) < physical_size(rows, columns)
    assert physical_size(rows, columns) == padded_rows(rows) * padded_columns(columns)


def test_a_taller_buffer_changes_no_offset():
    """The stride of a block row depends on the columns alone; so a worst-case buffer is legal."""
    scales = torch.randint(0, 256, (130, 6), dtype=torch.uint8)
    taller = torch.cat((to_blocked(scales), torch.zeros(128 * 8, dtype=torch.uint8)))
    assert torch.equal(from_blocked(taller, 130, 6), scales)


@pytest.mark.parametrize("size", [128 * 8, 256 * 8 + 4, 256 * 7])
def test_buffers_of_the_wrong_size_are_refused(size):
    with pytest.raises(ValueError, match=rf"{size} bytes found for 130 rows of 6 scales"):
        from_blocked(torch.zeros(size, dtype=torch.uint8), 130, 6)


def test_experts_are_blocked_one_by_one():
    scales = torch.rand(3, 200, 5).to(torch.float8_e4m3fn)
    blocked = BlockedScales.of(scales)
    assert blocked.data.dtype == torch.float8_e4m3fn
    for e in range(3):
        alone = BlockedScales.of(scales[e : e + 1])
        assert torch.equal(blocked.data[e].view(torch.uint8), alone.data[0].view(torch.uint8))
    assert torch.equal(blocked.linear().view(torch.uint8), scales.view(torch.uint8))
