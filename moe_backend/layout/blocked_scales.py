"""Block scales in the 128x4 order that Blackwell's block-scaled matrix instructions read.

A matrix of scales `[rows, columns]` (one column per 16 values of K) is padded to whole blocks of
128 rows and 4 columns. A block is 512 consecutive bytes: row `r` of it lies in chunk `r % 32`, at
place `r // 32` of four, and its four columns are neighbours. Blocks follow each other along K
first, so a block row of 128 rows is one contiguous piece and a taller buffer does not move it.

Source: CUTLASS `tile_atom_to_shape_SF` (nvidia-cutlass-dsl 4.8.1 `utils/blockscaled_layout.py`),
with which `tests/test_blocked_scales.py` compares every index; vLLM's `swizzle_blockscale` and
torch's `SWIZZLE_32_4_4` are the same order.

Which positions must be written: all columns of a row that is read, the padding columns included
(they meet zeros of the operand, and zero times NaN is NaN). Padding rows may hold anything: their
products are not stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

BLOCK_ROWS = 128
BLOCK_COLUMNS = 4
_BLOCK = BLOCK_ROWS * BLOCK_COLUMNS

Index = TypeVar("Index", int, torch.Tensor)


def padded_rows(rows: Index) -> Index:
    """`rows` rounded up to whole blocks; numbers or tensors of numbers."""
    return (rows + BLOCK_ROWS - 1) // BLOCK_ROWS * BLOCK_ROWS


def padded_columns(columns: int) -> int:
    """`columns` rounded up to whole blocks."""
    return -(-columns // BLOCK_COLUMNS) * BLOCK_COLUMNS


def physical_size(rows: int, columns: int) -> int:
    """Bytes that the scales of a `[rows, columns]` matrix take, padding included."""
    return padded_rows(rows) * padded_columns(columns)


def offset(row: Index, column: Index, columns: int) -> Index:
    """Byte offset of the scale at (`row`, `column`).

    Args:
        columns: logical columns of the matrix; rows above do not matter.
    """
    block = row // BLOCK_ROWS * (padded_columns(columns) // BLOCK_COLUMNS) + column // BLOCK_COLUMNS
    return (
        block * _BLOCK
        + row % 32 * 16
        + row % BLOCK_ROWS // 32 * BLOCK_COLUMNS
        + column % BLOCK_COLUMNS
    )


def to_blocked(scales: torch.Tensor) -> torch.Tensor:
    """`[..., rows, columns]` of any one-byte dtype to `[..., physical_size]`, padding zero.

    Leading dimensions are experts: each matrix is blocked by itself.
    """
    rows, columns = scales.shape[-2:]
    padding = (0, padded_columns(columns) - columns, 0, padded_rows(rows) - rows)
    byte = torch.nn.functional.pad(scales.view(torch.uint8), padding)
    blocks = byte.unflatten(-1, (-1, BLOCK_COLUMNS)).unflatten(-3, (-1, 4, 32))
    # ..., block row, place, chunk, block column, column -> block row, block column, chunk, place
    order = blocks.movedim((-5, -2, -3, -4, -1), (-5, -4, -3, -2, -1))
    return order.flatten(-5).contiguous().view(scales.dtype)


def from_blocked(data: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of `to_blocked`: `[..., rows, columns]`.

    Args:
        data: `[..., n]` with `n` at least `physical_size(rows, columns)`; a longer buffer is legal,
            as long as it is whole block rows.

    Raises:
        ValueError: the buffer is too short or not whole block rows.
    """
    wide = padded_columns(columns)
    size = data.shape[-1]
    if size < physical_size(rows, columns) or size % (BLOCK_ROWS * wide):
        raise ValueError(
            f"blocked scales: {size} bytes found for {rows} rows of {columns} scales; a multiple "
            f"of {BLOCK_ROWS * wide} from {physical_size(rows, columns)} on is accepted."
        )
    blocks = data.view(torch.uint8).unflatten(-1, (-1, wide // BLOCK_COLUMNS, 32, 4, BLOCK_COLUMNS))
    order = blocks.movedim((-5, -4, -3, -2, -1), (-5, -2, -3, -4, -1))
    linear = order.flatten(-2).flatten(-4, -2)
    return linear[..., :rows, :columns].contiguous().view(data.dtype)


@dataclass(frozen=True)
class BlockedScales:
    """Scales of one matrix per expert in the 128x4 order (the 3D side of a grouped GEMM).

    Attributes:
        data: `[E, physical_size(rows, columns)]` float8_e4m3fn.
        rows, columns: logical size of each expert's scales.
    """

    data: torch.Tensor
    rows: int
    columns: int

    @classmethod
    def of(cls, scales: torch.Tensor) -> BlockedScales:
        """From linear `[E, rows, columns]`."""
        return cls(to_blocked(scales), scales.shape[-2], scales.shape[-1])

    def linear(self) -> torch.Tensor:
        """`[E, rows, columns]`."""
        return from_blocked(self.data, self.rows, self.columns)
