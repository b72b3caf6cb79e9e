"""Unquantised experts."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from moe_backend.formats.checks import expect_dtype, expect_no_nan, expect_shape

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Bf16Weights:
    """Canonical unquantised experts.

    Attributes:
        w13: `[E, 2I, H]`, gate rows then up rows; bfloat16, float16 or float32.
        w2: `[E, H, I]`, same dtype.
    """

    w13: torch.Tensor
    w2: torch.Tensor

    name = "bf16"

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.w13.shape[1] // 2

    def validate(self, where: str = "") -> None:
        """Check shapes and dtypes; raises ValueError naming `where` and the tensor."""
        expect_dtype(f"{where}w13_weight", self.w13, *DTYPES)
        expect_dtype(f"{where}w2_weight", self.w2, self.w13.dtype)
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        expect_shape(f"{where}w13_weight", self.w13, (e, 2 * i, h), "gate and up rows")
        expect_shape(f"{where}w2_weight", self.w2, (e, h, i), f"w13_weight is {(e, 2 * i, h)}")
        expect_no_nan(f"{where}w13_weight", self.w13)
        expect_no_nan(f"{where}w2_weight", self.w2)

    def tensors(self) -> list[torch.Tensor | None]:
        return [getattr(self, f.name) for f in fields(self)]

    def expert(self, e: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised `(w13 [2I, H], w2 [H, I])` of expert `e` in `dtype`."""
        return self.w13[e].to(dtype), self.w2[e].to(dtype)
