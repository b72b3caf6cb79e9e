"""Weight formats: canonical forms, encode and decode."""

from __future__ import annotations

import torch

from moe_backend.formats.bf16 import Bf16Weights
from moe_backend.formats.fp8_block import Block, Fp8BlockWeights
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
    name: str,
    tensors: list[torch.Tensor | None],
    w13_block: Block | None = None,
    w2_block: Block | None = None,
) -> Weights:
    """Inverse of `weights.tensors()`: the canonical form called `name` around its tensors.

    Args:
        w13_block, w2_block: of fp8_block.
    """
    given = tensors[:6] if name == Nvfp4Weights.name else tensors
    if any(t is None for t in given):
        raise ValueError(f"{name} weights have a missing tensor")
    if name == Bf16Weights.name:
        return Bf16Weights(*tensors)  # type: ignore[arg-type]
    if name == Fp8BlockWeights.name:
        assert w13_block is not None
        assert w2_block is not None
        w13, w13_scale, w2, w2_scale = tensors
        return Fp8BlockWeights(w13, w13_scale, w2, w2_scale, w13_block, w2_block)  # type: ignore[arg-type]
    if name == Nvfp4Weights.name:
        return Nvfp4Weights(*tensors)  # type: ignore[arg-type]
    raise ValueError(f"format {name!r} is unknown; accepted: {', '.join(FORMATS)}")
