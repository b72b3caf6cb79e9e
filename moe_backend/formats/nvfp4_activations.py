"""Activations in NVFP4: where their global scale comes from, and the one object that carries it.

A W4A4 kernel quantises with a global scale and multiplies its sums by the same number. When the
two differ by a factor, cosine similarity does not see it (13 times off: 0.996). So the scale is
resolved once and both sides take it from the result: `factor` is the only way to an epilogue
factor.

The global scale only places the block scales in E4M3's range. With `b` the largest value of a
block, every scale in `[max(b) / 2688, 28672 * min(b) / 2688]` gives the same error; below it block
scales saturate at 448, which is ruinous, above it small blocks fade gradually. Hence a static
scale gets headroom, and the scales of several experts are reduced with MAX, never with a mean.
(Measured with normalised activations: flat from 1 to 2**9 times amax / 2688; 13 times too small
leaves 6 dB of 21. nvidia-modelopt reaches the same range.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.formats.checks import expect_positive
from moe_backend.formats.nvfp4 import global_scale_of, quantize

# Inputs of w2 vary most from token to token: from 8 on, their small blocks begin to fade.
HEADROOM = 4.0
# A scale of 1 stands for activations of up to 2688 (some modelopt recipes pin it): room enough.
LARGEST_WITH_HEADROOM = 1.0


@dataclass(frozen=True)
class QuantizedActivations:
    """Rows in NVFP4.

    Attributes:
        packed: `[rows, K/2]` uint8.
        scale: `[rows, K/16]` float8_e4m3fn, linear.
        global_scale: `[1]`, or `[rows, 1]` per token; float32, decode direction.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor

    def factor(self, weight_global_scale: torch.Tensor) -> torch.Tensor:
        """What the sums of a GEMM over these rows and unscaled weights are multiplied by."""
        return self.global_scale * weight_global_scale


@dataclass(frozen=True)
class ActivationScale:
    """Where the global scale of one GEMM's activations comes from.

    Attributes:
        static: `[1]` float32 in decode direction, used for every input; None measures each input.
        per_token: measure each row by itself instead of the whole tensor.
    """

    static: torch.Tensor | None = None
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.static is not None and self.per_token:
            raise ValueError("a static activation scale is one number; per_token measures each row")

    @classmethod
    def from_checkpoint(
        cls, input_scale: torch.Tensor | None, *, headroom: float = HEADROOM, name: str = "input"
    ) -> ActivationScale:
        """A checkpoint's `input_scale`, or dynamic per tensor where it has none.

        Args:
            input_scale: decode direction, one per expert or already reduced; the MAX is taken, so
                that no expert's activations saturate. With experts on several ranks the caller
                reduces over those first: a token is quantised before it is known where it goes.
            headroom: multiplies it, for activations larger than the calibration saw; not beyond a
                scale of 1.

        Raises:
            ValueError: a scale is missing, zero, negative or not finite, or headroom is below 1.
        """
        if headroom < 1:
            raise ValueError(f"headroom {headroom} makes {name} scales saturate; use 1 or more")
        if input_scale is None:
            return cls()
        expect_positive(f"{name} scale", input_scale)
        return cls(with_headroom(input_scale.float().amax().reshape(1), headroom))

    @classmethod
    def from_engine(cls, input_scale: torch.Tensor | None) -> ActivationScale:
        """`from_checkpoint` of a scale that was reduced and validated at load; no host read."""
        if input_scale is None:
            return cls()
        return cls(with_headroom(input_scale))

    def resolve(self, x: torch.Tensor) -> torch.Tensor:
        """The global scale for rows `x` `[rows, K]`: `[1]` or `[rows, 1]` float32."""
        if self.static is not None:
            return self.static
        if self.per_token:
            return global_scale_of(x.float().abs().amax(-1, keepdim=True))
        if x.numel() == 0:
            return torch.ones(1, dtype=torch.float32, device=x.device)
        return global_scale_of(x.float().abs().amax()).reshape(1)

    def quantize(self, x: torch.Tensor) -> QuantizedActivations:
        """Rows `x` `[rows, K]` in NVFP4; K must be a multiple of 16."""
        scale = self.resolve(x)
        packed, blocks = quantize(x, scale)
        return QuantizedActivations(packed, blocks, scale)


def with_headroom(scale: torch.Tensor, headroom: float = HEADROOM) -> torch.Tensor:
    """`scale * headroom`, but not beyond 1, where there is room enough already."""
    return torch.maximum(scale, (scale * headroom).clamp(max=LARGEST_WITH_HEADROOM))
