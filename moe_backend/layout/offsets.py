"""Group offsets in the two conventions that grouped GEMMs use, as two types.

Handing START offsets to code that reads END offsets gives every expert its neighbour's tokens
(the first one none), and nothing crashes. So neither is passed as a bare tensor.

Read in source: END is what torch `scaled_grouped_mm`, CUTLASS's CuTe DSL grouped GEMM and MSLK
take; START, `E + 1` long with a leading zero, is what vLLM's `cutlass_fp4_moe_mm` and SGLang are
made from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EndOffsets:
    """`tensor` `[E]` int32: group `e` ends before `tensor[e]` and starts at `tensor[e - 1]`."""

    tensor: torch.Tensor

    def starts(self) -> StartOffsets:
        """The same groups by their starts."""
        return StartOffsets(torch.nn.functional.pad(self.tensor, (1, 0)))

    def counts(self) -> torch.Tensor:
        """`[E]` int32, rows of each group."""
        starts = self.starts().tensor
        return starts[1:] - starts[:-1]

    def padded(self, multiple: int) -> EndOffsets:
        """Each group rounded up to a multiple of rows; an empty group still takes none."""
        whole = (self.counts() + multiple - 1) // multiple * multiple
        return EndOffsets(whole.cumsum(0).int())


@dataclass(frozen=True)
class StartOffsets:
    """`tensor` `[E + 1]` int32: group `e` is `tensor[e]` to `tensor[e + 1]`; `tensor[0]` is 0."""

    tensor: torch.Tensor
