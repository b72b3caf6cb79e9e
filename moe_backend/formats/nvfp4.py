"""NVFP4: 4-bit E2M1 codes, an E4M3 scale per 16 values along K, an fp32 global scale per tensor.

`value = e2m1(code) * block_scale * global_scale`, the global scale always in this decode
direction. Two codes share a byte, the even column in the low nibble. Gate and up each have a
global scale of their own: w13's is `[E, 2]`.

Sources: byte order and formulas agree with nvidia-modelopt 0.47 `nvfp4_tensor.py`, vLLM
`nvfp4_emulation_utils.py` and compressed-tensors 0.17 `nvfp4_quantized.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from moe_backend.formats.checks import expect_dtype, expect_positive, expect_shape
from moe_backend.formats.rounding import divide

GROUP = 16
E2M1_MAX = 6.0
E4M3_MAX = 448.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Nvfp4Weights:
    """Canonical NVFP4 experts.

    Attributes:
        w13: `[E, 2I, H/2]` uint8, gate rows then up rows, even column in the low nibble.
        w13_scale: `[E, 2I, H/16]` float8_e4m3fn.
        w13_global_scale: `[E, 2]` float32, decode direction, (gate, up).
        w2: `[E, H, I/2]` uint8.
        w2_scale: `[E, H, I/16]` float8_e4m3fn.
        w2_global_scale: `[E, 1]` float32, decode direction.
        w13_input_scale, w2_input_scale: `[1]` float32, decode direction: the activation global
            scale that the checkpoint was calibrated for, the MAX over all experts; None for
            weight-only checkpoints.
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w13_global_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w2_global_scale: torch.Tensor
    w13_input_scale: torch.Tensor | None = None
    w2_input_scale: torch.Tensor | None = None

    name = "nvfp4"

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.w13.shape[2] * 2

    @property
    def intermediate_size(self) -> int:
        return self.w13.shape[1] // 2

    def validate(self, where: str = "") -> None:
        """Check shapes, dtypes and scale values; raises ValueError naming `where` and tensor."""
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        for label, size in (("hidden_size", h), ("intermediate_size", i)):
            if size % GROUP:
                raise ValueError(
                    f"{where}{label} is {size}; NVFP4 needs a multiple of {GROUP}. "
                    "Use a smaller tensor-parallel size or expert parallelism."
                )
        for label, codes, packed in (
            ("w13_weight", self.w13, (e, 2 * i, h // 2)),
            ("w2_weight", self.w2, (e, h, i // 2)),
        ):
            expect_dtype(where + label, codes, torch.uint8)
            expect_shape(where + label, codes, packed, "two codes a byte")
        for label, scale, shape in (
            ("w13_weight_scale", self.w13_scale, (e, 2 * i, h // GROUP)),
            ("w2_weight_scale", self.w2_scale, (e, h, i // GROUP)),
        ):
            expect_dtype(where + label, scale, torch.float8_e4m3fn)
            expect_shape(where + label, scale, shape, f"one scale per {GROUP} columns")
            # modelopt never writes a zero block scale, llm-compressor may for a zero block.
            expect_positive(where + label, scale, allow_zero=True)
        for label, scale, projections in (
            ("w13 global scale", self.w13_global_scale, 2),
            ("w2 global scale", self.w2_global_scale, 1),
        ):
            expect_dtype(where + label, scale, torch.float32)
            expect_shape(where + label, scale, (e, projections), "one per expert and projection")
            expect_positive(where + label, scale)
        for label, input_scale in (
            ("w13 input scale", self.w13_input_scale),
            ("w2 input scale", self.w2_input_scale),
        ):
            if input_scale is not None:
                expect_shape(where + label, input_scale, (1,), "one for all experts")
                expect_positive(where + label, input_scale)

    def tensors(self) -> list[torch.Tensor | None]:
        return [
            self.w13,
            self.w13_scale,
            self.w13_global_scale,
            self.w2,
            self.w2_scale,
            self.w2_global_scale,
            self.w13_input_scale,
            self.w2_input_scale,
        ]

    def expert(self, e: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised `(w13 [2I, H], w2 [H, I])` of expert `e` in `dtype`.

        In bf16 the product with the global scale rounds; `unscaled_expert` avoids that.
        """
        i, h = self.intermediate_size, self.hidden_size
        w13 = dequantize(
            self.w13[e].view(2, i, h // 2),
            self.w13_scale[e].view(2, i, h // GROUP),
            self.w13_global_scale[e].view(2, 1, 1),
            dtype,
        )
        w2 = dequantize(self.w2[e], self.w2_scale[e], self.w2_global_scale[e], dtype)
        return w13.view(2 * i, h), w2

    def unscaled_expert(self, e: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`(w13 [2I, H], w2 [H, I])` of expert `e` without the global scales.

        A code times a block scale has at most six significant bits, so this is exact in bf16 and
        fp32; the global scales belong in the epilogue.
        """
        return (
            dequantize(self.w13[e], self.w13_scale[e], None, dtype),
            dequantize(self.w2[e], self.w2_scale[e], None, dtype),
        )


def encode_e2m1(x: torch.Tensor) -> torch.Tensor:
    """E2M1 codes (uint8, 0..15) nearest to `x`, ties to the even code, saturating at +-6."""
    magnitude = x.float().abs()
    # A code is the number of midpoints below; one that is met exactly counts where the code above
    # it is the even one. (searchsorted does the same a hundred times slower.)
    code = (magnitude > 0.25).to(torch.uint8)
    code += magnitude >= 0.75
    code += magnitude > 1.25
    code += magnitude >= 1.75
    code += magnitude > 2.5
    code += magnitude >= 3.5
    code += magnitude > 5.0
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack `[..., K]` codes into `[..., K/2]` bytes, even column in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of `pack`."""
    return torch.stack((packed & 0x0F, packed >> 4), dim=-1).flatten(-2)


# Tables are kept on the CPU alone: what is first made while an engine loads weights may lie in
# memory that it discards when it sleeps (vLLM's sleep level 2).
@cache
def _pair_table() -> torch.Tensor:
    """`[256]` int32: the two E2M1 values of each byte as a pair of bf16 bit patterns."""
    half = torch.tensor(E2M1_VALUES)
    values = torch.cat((half, -half)).bfloat16()
    byte = torch.arange(256)
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1)
    return pairs.view(torch.int32).flatten()


@cache
def _scale_table() -> torch.Tensor:
    """`[256]` int32: each E4M3 value twice as a bf16 bit pattern (exact: 4 significant bits)."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).bfloat16()
    return torch.stack((values, values), -1).view(torch.int32).flatten()


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    global_scale: torch.Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Decode `[..., K/2]` bytes with `[..., K/16]` E4M3 scales to `[..., K]` in `dtype`.

    Values are looked up two at a time: a byte, and the scale of its block, each name a pair of
    bf16 numbers. (Broadcasting a scale over 16 columns instead is five times slower on a CPU.)

    Args:
        global_scale: float32, broadcast against `[..., N, K]`; None leaves it out, and the result
            is then exact in bf16.
    """
    device = packed.device
    pairs = _pair_table().to(device).index_select(0, packed.int().flatten())
    scales = _scale_table().to(device).index_select(0, scale.view(torch.uint8).int().flatten())
    values = pairs.view(torch.bfloat16)
    values *= scales.repeat_interleave(GROUP // 2).view(torch.bfloat16)
    decoded = values.view(*packed.shape[:-1], -1)
    if global_scale is None:
        return decoded.to(dtype)
    return (decoded.float() * global_scale).to(dtype)


def global_scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The decode-direction global scale that fits `amax`: `amax / (6 * 448)`; 1 for zero."""
    return torch.where(amax > 0, divide(amax.float(), E2M1_MAX * E4M3_MAX), torch.ones_like(amax))


def quantize(x: torch.Tensor, global_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `[..., K]` (K a multiple of 16) with a given global scale.

    Args:
        global_scale: float32, decode direction, broadcast against `[..., K/16]`.
    Returns:
        packed `[..., K/2]` uint8 and scale `[..., K/16]` float8_e4m3fn. A block too small for
        E4M3 next to its global scale gets the smallest subnormal, never zero; a block of zeros
        gets scale 1, as modelopt writes it. A block with a NaN gets the scale NaN: E2M1 has none,
        and a code alone would turn it into a number.

    Raises:
        ValueError: K is not a multiple of 16.
    """
    if x.shape[-1] % GROUP:
        raise ValueError(f"NVFP4 needs a last dimension that is a multiple of 16, got {x.shape}")
    blocks = x.float().unflatten(-1, (-1, GROUP))
    amax = blocks.abs().amax(-1)
    raw = (divide(amax, E2M1_MAX) / global_scale).clamp(2.0**-9, E4M3_MAX)
    scale = torch.where(amax == 0, torch.ones_like(raw), raw).to(torch.float8_e4m3fn)
    step = scale.float() * global_scale
    return pack(encode_e2m1(blocks / step[..., None]).flatten(-2)), scale


def is_mxfp4_cast(scale: torch.Tensor, global_scale: torch.Tensor) -> bool:
    """Whether NVFP4 scales carry an MXFP4 tensor bit for bit: powers of two, equal in pairs.

    MXFP4 has one scale for 32 values, so a tensor with an odd number of groups is none.
    """
    if scale.shape[-1] % 2:
        return False
    values = scale.float()
    # frexp rather than the mantissa bits: 2**-7 to 2**-9 are E4M3 subnormals.
    mantissa, _ = torch.frexp(values)
    global_mantissa, _ = torch.frexp(global_scale)
    powers = ((mantissa == 0.5) | (values == 0)).all() & (global_mantissa == 0.5).all()
    return bool(powers & (values[..., 0::2] == values[..., 1::2]).all())
