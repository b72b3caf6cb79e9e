"""Block scales of routed activations, assembled for a grouped GEMM without a host read.

The scales of each expert's rows start on a block of 128 rows of their own (the 2D side of the
128x4 layout); an expert without tokens takes none. How many rows that makes is known on the device
only, so the buffer has the worst case's size and shapes do not depend on the routing.

This is the plain form; `kernels/triton/nvfp4_quantize.py` does gather, quantisation and this
scatter in one kernel. Everything here can be captured in a CUDA graph
(`tests/test_scale_assembly.py` shows that nothing is read back).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.layout.blocked_scales import (
    BLOCK_ROWS,
    from_blocked,
    padded_columns,
    to_blocked,
)
from moe_backend.layout.offsets import EndOffsets


def max_scale_rows(slots: int, num_experts: int) -> int:
    """Rows of the assembled scales in the worst routing of `slots` slots over `num_experts`.

    `128 * (n + (slots - n) // 128)` with `n = min(num_experts, slots)`: every expert that is hit
    opens a block with one slot, and only 128 further slots open another. It is attained.
    """
    hit = min(num_experts, slots)
    return BLOCK_ROWS * (hit + (slots - hit) // BLOCK_ROWS) if hit else 0


@dataclass(frozen=True)
class GroupedScales:
    """Scales of rows grouped by expert (the 2D side).

    Attributes:
        data: `[max_scale_rows(slots, E) * padded_columns(columns)]` float8_e4m3fn, 128x4 blocks.
            Row `i` of expert `e` is row `offsets.padded(128)[e - 1] + i`. Rows of no slot hold
            anything.
        offsets: END offsets of the experts' rows.
        columns: K / 16.
    """

    data: torch.Tensor
    offsets: EndOffsets
    columns: int

    def padded_offsets(self) -> EndOffsets:
        """END offsets of the experts' rows in `data`."""
        return self.offsets.padded(BLOCK_ROWS)

    def linear(self, slots: int) -> torch.Tensor:
        """`[slots, columns]` in the order of the sorted slots; rows of dropped slots are zero."""
        rows = self.data.numel() // padded_columns(self.columns)
        physical = from_blocked(self.data, rows, self.columns)
        row, kept = _row_of_position(self.offsets, slots)
        found = physical.view(torch.uint8)[row.clamp(max=max(rows - 1, 0))]
        return torch.where(kept[:, None], found, 0).view(self.data.dtype)


def empty_grouped_scales(slots: int, offsets: EndOffsets, columns: int) -> GroupedScales:
    """Room for the scales of any routing of `slots` slots, uninitialised."""
    size = max_scale_rows(slots, offsets.tensor.numel()) * padded_columns(columns)
    data = torch.empty(size, dtype=torch.float8_e4m3fn, device=offsets.tensor.device)
    return GroupedScales(data, offsets, columns)


def assemble_scales(scales: torch.Tensor, offsets: EndOffsets) -> GroupedScales:
    """Assemble the scales of sorted slots.

    Args:
        scales: `[slots, columns]` float8_e4m3fn in the order of `RoutingPlan.slots`; the rows of
            dropped slots, at the end, are not read.
        offsets: END offsets of the experts' rows.
    """
    slots, columns = scales.shape
    rows = max_scale_rows(slots, offsets.tensor.numel())
    if rows == 0:
        return GroupedScales(scales.new_empty(0), offsets, columns)
    # From each physical row to its slot, rather than the other way: then everything is written,
    # and the dropped slots need no place to go.
    ends = offsets.tensor.long()
    padded_ends = offsets.padded(BLOCK_ROWS).tensor.long()
    row = torch.arange(rows, device=scales.device)
    expert = torch.searchsorted(padded_ends, row, right=True)
    used = expert < len(ends)
    expert = torch.where(used, expert, 0)
    starts = torch.nn.functional.pad(ends, (1, 0))
    padded_starts = torch.nn.functional.pad(padded_ends, (1, 0))
    position = starts[expert] + row - padded_starts[expert]
    used = used & (position < ends[expert])
    byte = scales.view(torch.uint8)[torch.where(used, position, 0)]
    linear = torch.where(used[:, None], byte, 0).view(scales.dtype)
    return GroupedScales(to_blocked(linear), offsets, columns)


def _row_of_position(offsets: EndOffsets, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Physical row of each sorted slot, and whether the slot is kept."""
    ends = offsets.tensor.long()
    position = torch.arange(slots, device=ends.device)
    expert = torch.searchsorted(ends, position, right=True)
    kept = expert < len(ends)
    expert = torch.where(kept, expert, 0)
    starts = torch.nn.functional.pad(ends, (1, 0))
    padded_starts = torch.nn.functional.pad(offsets.padded(BLOCK_ROWS).tensor.long(), (1, 0))
    return padded_starts[expert] + position - starts[expert], kept
