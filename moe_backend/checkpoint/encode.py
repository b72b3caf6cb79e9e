"""One expert's weight into the tensors of a dialect, and back."""

from __future__ import annotations

import math

import torch

from moe_backend.checkpoint.dialects import Dialect
from moe_backend.formats import fp8_block, nvfp4

# Activations have to be seen to calibrate this scale. 1.0 stands for an amax of 2688, and block
# scales then still resolve blocks down to an amax of 0.1 without loss; it is what modelopt's
# recipe `nvfp4_experts_only_input_scale1` pins. Kernels that leave activations in 8 or 16 bits do
# not read it.
INPUT_SCALE = 1.0


def encode(dialect: Dialect, weight: torch.Tensor, amax: torch.Tensor) -> dict[str, torch.Tensor]:
    """Quantise one weight.

    Args:
        weight: `[rows, columns]`, any float dtype, finite.
        amax: scalar float32, at least the largest magnitude in `weight`; NVFP4's global scale
            follows from it. FP8 does not use it.
    Returns:
        the tensors of `dialect.tensors(rows, columns)`.
    """
    if dialect.name == "fp8-block":
        codes, scale = fp8_block.quantize_blocks(weight, dialect.block_shape)
        return {"weight": codes, "weight_scale_inv": scale}
    encode_scale, decode_scale = _global_scales(amax)
    codes, scale = nvfp4.quantize(weight, decode_scale)
    input_scale = torch.tensor(INPUT_SCALE)
    if dialect.name == "nvfp4-modelopt":
        return {
            "weight": codes,
            "weight_scale": scale,
            "weight_scale_2": decode_scale,
            "input_scale": input_scale,
        }
    return {
        "weight_packed": codes,
        "weight_scale": scale,
        "weight_global_scale": encode_scale.view(1),
        "input_global_scale": 1 / input_scale.view(1),
    }


def decode(dialect: Dialect, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight `[rows, columns]` float32 that an engine computes with."""
    codes = tensors[dialect.codes]
    if dialect.name == "fp8-block":
        return fp8_block.dequantize_blocks(codes, tensors["weight_scale_inv"], dialect.block_shape)
    if dialect.name == "nvfp4-modelopt":
        return nvfp4.dequantize(codes, tensors["weight_scale"], tensors["weight_scale_2"])
    return nvfp4.dequantize(codes, tensors["weight_scale"], 1 / tensors["weight_global_scale"])


def _global_scales(amax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The global scale in encode and in decode direction, scalars.

    The decode scale is the reciprocal of the rounded encode scale, as an engine computes it from
    the compressed-tensors dialect: at most a rounding away from `amax / 2688`, and then both
    dialects decode to the same bits.
    """
    tiny = torch.finfo(torch.float32).tiny  # a smaller scale has no finite reciprocal
    encode_scale = 1 / nvfp4.global_scale_of(amax).clamp(min=tiny)
    return encode_scale, 1 / encode_scale


def snr_db(weight: torch.Tensor, decoded: torch.Tensor) -> float:
    """Signal to noise of a quantised weight; infinite where it is exact."""
    signal = float(torch.linalg.vector_norm(weight.float()))
    noise = float(torch.linalg.vector_norm(weight.float() - decoded))
    return 20 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf
