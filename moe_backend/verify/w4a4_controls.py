"""Must-fail controls of the NVFP4 W4A4 pipeline: what went wrong in real ones, one fault each.

The sound pipeline equals the float64 definition to 1e-6 (`tests/test_w4a4.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_backend.formats.nvfp4_activations import ActivationScale, QuantizedActivations
from moe_backend.layout.blocked_scales import (
    BLOCK_ROWS,
    BlockedScales,
    offset,
    padded_columns,
    physical_size,
    to_blocked,
)
from moe_backend.layout.offsets import EndOffsets
from moe_backend.layout.scale_assembly import max_scale_rows
from moe_backend.verify.controls import Control
from moe_backend.verify.problems import Problem
from moe_backend.verify.w4a4 import (
    CASE,
    NAN_BYTE,
    Steps,
    activation_scales,
    calibrate,
    quantised_problem,
    w4a4_experts,
)


def _sound(p: Problem) -> torch.Tensor:
    return w4a4_experts(p, activation_scales(p))


def _with(steps: Steps) -> Callable[[Problem], torch.Tensor]:
    return lambda p: w4a4_experts(p, activation_scales(p), steps)


def _leading_zero(offsets: EndOffsets) -> torch.Tensor:
    """START offsets where END offsets are read: each expert gets its predecessor's tokens."""
    return offsets.starts().tensor[:-1]


def _rows_for_every_expert(scales: torch.Tensor, offsets: EndOffsets) -> torch.Tensor:
    """128 rows also for experts without tokens; the ones behind them are read too early."""
    counts = offsets.counts()
    whole = ((counts + BLOCK_ROWS - 1) // BLOCK_ROWS).clamp(min=1) * BLOCK_ROWS
    buffer = scales.new_zeros(int(whole.sum()), scales.shape[1])
    start = row = 0
    for count, rows in zip(counts.tolist(), whole.tolist(), strict=True):
        buffer[row : row + count] = scales[start : start + count]
        start, row = start + count, row + rows
    return to_blocked(buffer)


def _one_matrix(scales: torch.Tensor, offsets: EndOffsets) -> torch.Tensor:
    """All slots swizzled as one matrix, without a block of its own for each expert."""
    rows = max_scale_rows(len(scales), len(offsets.tensor))
    return to_blocked(torch.nn.functional.pad(scales, (0, 0, 0, rows - len(scales))))


def _poisoned(scales: torch.Tensor) -> torch.Tensor:
    """Only logical columns written into a buffer of NaN, one matrix per leading index."""
    *lead, rows, columns = scales.shape
    wide = padded_columns(columns)
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None]
    buffer = torch.full((*lead, physical_size(rows, columns)), NAN_BYTE, dtype=torch.uint8)
    buffer[..., offset(row, column, wide).flatten()] = scales.view(torch.uint8).flatten(-2)
    return buffer.view(scales.dtype)


def _logical_columns(scales: torch.Tensor, offsets: EndOffsets) -> torch.Tensor:
    """A scatter whose loop ends at the logical size leaves the padding columns as they were."""
    padded = offsets.padded(BLOCK_ROWS).starts().tensor.tolist()
    starts = offsets.starts().tensor.tolist()
    rows = scales.new_zeros(max_scale_rows(len(scales), len(padded) - 1), scales.shape[1])
    for e in range(len(padded) - 1):
        part = scales[starts[e] : starts[e + 1]]
        rows[padded[e] : padded[e] + len(part)] = part
    return _poisoned(rows)


def _logical_columns_of_weights(scales: torch.Tensor) -> BlockedScales:
    return BlockedScales(_poisoned(scales), scales.shape[1], scales.shape[2])


def _other_factor(rows: QuantizedActivations, weight: torch.Tensor) -> torch.Tensor:
    """An epilogue that takes a global scale 13 times the one that quantised."""
    return 13 * rows.global_scale * weight


def _scaled_by(factor: float) -> Callable[[Problem], torch.Tensor]:
    """Both sides agree on a global scale that is too small: block scales saturate."""

    def run(p: Problem) -> torch.Tensor:
        first, second = activation_scales(p)
        assert first.static is not None
        return w4a4_experts(p, (ActivationScale(first.static * factor), second))

    return run


def _mean_over_experts(p: Problem) -> torch.Tensor:
    first, second = (ActivationScale(scale.mean()[None]) for scale in calibrate(p))
    return w4a4_experts(p, (first, second))


def w4a4_controls() -> list[Control]:
    """Every control of the pipeline."""
    steps = {
        "leading zero in the offsets of a grouped GEMM": Steps(offsets=_leading_zero),
        "128 scale rows for every expert": Steps(assemble=_rows_for_every_expert),
        "slots swizzled as one matrix": Steps(assemble=_one_matrix),
        "quantiser and epilogue scales differ": Steps(factor=_other_factor),
        "padding columns of activation scales unwritten": Steps(assemble=_logical_columns),
        "padding columns of weight scales unwritten": Steps(
            weight_scales=_logical_columns_of_weights
        ),
    }
    runs = {
        **{name: _with(step) for name, step in steps.items()},
        "activations scaled by 13": _scaled_by(1 / 13),
        "mean instead of MAX over experts": _mean_over_experts,
    }
    return [Control(name, CASE, run, quantised_problem, _sound) for name, run in runs.items()]
