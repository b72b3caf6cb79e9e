"""Weight formats: canonical forms, encode and decode."""

from __future__ import annotations

import torch

from moe_backend.formats.bf16 import Bf16Weights
from moe_backend.formats.fp8_block import Fp8BlockWeights
from moe_backend.formats.nvfp4 import Nvfp4Weights

Weights = Bf16Weights | Fp8BlockWeights | Nvfp4Weights

FORMATS = (Bf16Weights.name, Fp8BlockWeights.name, Nvfp4Weights.name)

__all__ = [
    "FORMATS",
    "Bf16Weights",
    "Fp8BlockWeights",
    "Nvfp4Weights",
    "Weights",
    "weights_from_tensors",
]


def weights_from_tensors(
    name: str, tensors: list[torch.Tensor | None], block_shape: tuple[int, int] | None = None
) -> Weights:
    """Inverse of `weights.tensors()`: the canonical form called `name` around its tensors."""
    given = tensors[:6] if name == Nvfp4Weights.name else tensors
    if any(t is None for t in given):
        raise ValueError(f"{name} weights have a missing tensor")
    if name == Bf16Weights.name:
        return Bf16Weights(*tensors)  # type: ignore[arg-type]
    if name == Fp8BlockWeights.name:
        assert block_shape is not None
        w13, w13_scale, w2, w2_scale = tensors
        return Fp8BlockWeights(w13, w13_scale, w2, w2_scale, block_shape)  # type: ignore[arg-type]
    if name == Nvfp4Weights.name:
        return Nvfp4Weights(*tensors)  # type: ignore[arg-type]
    raise ValueError(f"format {name!r} is unknown; accepted: {', '.join(FORMATS)}")
