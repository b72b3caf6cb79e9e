"""FP8 with one fp32 scale per block: the format of DeepSeek-V3, Step-3.5-Flash-FP8 and their kin.

`value = code * scale[row // block_n, col // block_k]`. The checkpoint calls the scale
`weight_scale_inv`; despite its name it is the decode factor. Activations are quantised per token
in groups along the last dimension (per-1x128).

Byte layouts (all 256 values are tested): e4m3fn (OCP) has bias 7, maximum 448, NaN 0x7F and 0xFF.
e4m3fnuz (gfx942) has bias 8, maximum 240, one NaN 0x80 and no negative zero; so the same finite
byte means half the value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_backend.formats.checks import expect_dtype, expect_no_nan, expect_positive, expect_shape
from moe_backend.formats.rounding import divide

Block = tuple[int, int]

E4M3FN_MAX = 448.0
E4M3FNUZ_MAX = 240.0
_FP16_SIGN_AND_MAGNITUDE = 0xBF80 - 0x10000  # as a signed 16-bit integer


@dataclass(frozen=True)
class Fp8BlockWeights:
    """Canonical FP8 block-scaled experts.

    A checkpoint has one block shape. A tensor-parallel shard that does not begin and end on it
    has finer blocks along the split dimension I, which is w13's rows and w2's columns.

    Attributes:
        w13: `[E, 2I, H]` float8_e4m3fn, gate rows then up rows.
        w13_scale: `[E, 2*ceil(I/n), ceil(H/k)]` float32, `(n, k)` of `w13_block`; gate and up
            never share a scale row.
        w2: `[E, H, I]` float8_e4m3fn.
        w2_scale: `[E, ceil(H/n), ceil(I/k)]` float32, `(n, k)` of `w2_block`.
        w13_block, w2_block: rows and columns that one scale covers.
    """

    w13: torch.Tensor
    w13_scale: torch.Tensor
    w2: torch.Tensor
    w2_scale: torch.Tensor
    w13_block: Block
    w2_block: Block

    name = "fp8_block"

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
        """Check shapes, dtypes and scale values; raises ValueError naming `where` and tensor."""
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        for label, codes in (("w13_weight", self.w13), ("w2_weight", self.w2)):
            expect_dtype(where + label, codes, torch.float8_e4m3fn)
        expect_shape(f"{where}w13_weight", self.w13, (e, 2 * i, h), "gate and up rows")
        expect_shape(f"{where}w2_weight", self.w2, (e, h, i), f"w13_weight is {(e, 2 * i, h)}")
        expect_no_nan(f"{where}w13_weight", self.w13)
        expect_no_nan(f"{where}w2_weight", self.w2)
        (n13, k13), (n2, k2) = self.w13_block, self.w2_block
        for label, scale, shape, block in (
            ("w13", self.w13_scale, (e, 2 * cdiv(i, n13), cdiv(h, k13)), self.w13_block),
            ("w2", self.w2_scale, (e, cdiv(h, n2), cdiv(i, k2)), self.w2_block),
        ):
            name = f"{where}{label}_weight_scale_inv"
            expect_dtype(name, scale, torch.float32)
            expect_shape(name, scale, shape, f"blocks of {by(block)}")
            expect_positive(name, scale)

    def tensors(self) -> list[torch.Tensor | None]:
        return [self.w13, self.w13_scale, self.w2, self.w2_scale]

    def expert(self, e: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantised `(w13 [2I, H], w2 [H, I])` of expert `e` in `dtype`."""
        i, h = self.intermediate_size, self.hidden_size
        w13 = dequantize_blocks(
            self.w13[e].view(2, i, h),
            self.w13_scale[e].view(2, -1, self.w13_scale.shape[2]),
            self.w13_block,
            dtype,
        )
        w2 = dequantize_blocks(self.w2[e], self.w2_scale[e], self.w2_block, dtype)
        return w13.view(2 * i, h), w2


def by(block: Block) -> str:
    """A block shape in words: `32x128`."""
    return f"{block[0]}x{block[1]}"


def cdiv(a: int, b: int) -> int:
    """Ceiling division."""
    return -(-a // b)


def quantize_blocks(
    weight: torch.Tensor, block_shape: tuple[int, int] = (128, 128)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise `[..., N, K]` to e4m3fn with `scale = amax / 448` per block.

    Args:
        weight: any float dtype; N and K need not be multiples of the block.
    Returns:
        codes `[..., N, K]` float8_e4m3fn and scale `[..., ceil(N/bn), ceil(K/bk)]` float32. A
        block of zeros gets scale 1.
    """
    bn, bk = block_shape
    n, k = weight.shape[-2:]
    values = weight.float()
    padded = torch.nn.functional.pad(values, (0, -k % bk, 0, -n % bn))
    blocks = padded.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bn))
    amax = blocks.abs().amax(dim=(-3, -1))
    scale = torch.where(amax > 0, divide(amax, E4M3FN_MAX), torch.ones_like(amax))
    codes = values / spread_scale(scale, n, k, block_shape)
    return codes.clamp(-E4M3FN_MAX, E4M3FN_MAX).to(torch.float8_e4m3fn), scale


def dequantize_blocks(
    codes: torch.Tensor,
    scale: torch.Tensor,
    block_shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Decode `[..., N, K]` codes (e4m3fn or e4m3fnuz) with their block scales.

    The product is formed in fp32 and rounded once to `dtype`.
    """
    n, k = codes.shape[-2:]
    bn, bk = block_shape
    values = decode(codes)
    if n % bn == 0 and k % bk == 0:
        # Broadcasting over the block view needs no expanded copy of the scales.
        values.unflatten(-1, (-1, bk)).unflatten(-3, (-1, bn)).mul_(scale[..., :, None, :, None])
    else:
        values *= spread_scale(scale, n, k, block_shape)
    return values.to(dtype)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 value of every code of an e4m3fn or e4m3fnuz tensor; right for all 256 bytes.

    Torch's own cast from e4m3fn takes about 4 ns per element on a CPU. There, an e4m3fn byte
    without its sign, shifted left by 7, is an fp16 number 2**8 times too small, subnormals
    included (fp16 conversions ignore the processor's flush-to-zero mode); that is ten times
    faster. The two NaN codes do not survive the shift, so a tensor that has one takes the cast.
    """
    if codes.device.type != "cpu" or codes.dtype != torch.float8_e4m3fn:
        return codes.float()
    byte = codes.view(torch.int8)
    if codes.numel() == 0 or int(byte.bitwise_and(0x7F).amax()) == 0x7F:
        return codes.float()
    bits = byte.to(torch.int16)  # sign-extended: bit 15 is the sign
    bits.bitwise_left_shift_(7).bitwise_and_(_FP16_SIGN_AND_MAGNITUDE)
    return bits.view(torch.float16).float().mul_(256.0)


def spread_scale(scale: torch.Tensor, n: int, k: int, block_shape: tuple[int, int]) -> torch.Tensor:
    """Repeat block scales `[..., ceil(N/bn), ceil(K/bk)]` to one per element, `[..., N, K]`."""
    bn, bk = block_shape
    return scale.repeat_interleave(bn, -2)[..., :n, :].repeat_interleave(bk, -1)[..., :k]


def quantize_per_group(
    x: torch.Tensor, group_size: int = 128, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise activations `[..., K]` per token and group of the last dimension.

    K need not be a multiple of the group: the last group is shorter (Step-3.5 at TP8 has K = 160).
    Any row count works, zero included.

    Args:
        dtype: torch.float8_e4m3fn or torch.float8_e4m3fnuz.
    Returns:
        codes `[..., K]` in `dtype`, scale `[..., ceil(K/group)]` float32 (`amax / max code`, 1 for
        a group of zeros).
    """
    maximum = E4M3FN_MAX if dtype == torch.float8_e4m3fn else E4M3FNUZ_MAX
    k = x.shape[-1]
    values = x.float()
    groups = torch.nn.functional.pad(values, (0, -k % group_size)).unflatten(-1, (-1, group_size))
    amax = groups.abs().amax(-1)
    scale = torch.where(amax > 0, divide(amax, maximum), torch.ones_like(amax))
    codes = (groups / scale[..., None]).clamp(-maximum, maximum)
    return codes.flatten(-2)[..., :k].to(dtype), scale


def dequantize_per_group(
    codes: torch.Tensor, scale: torch.Tensor, group_size: int = 128
) -> torch.Tensor:
    """Inverse of `quantize_per_group`, in fp32."""
    k = codes.shape[-1]
    return decode(codes) * scale.repeat_interleave(group_size, -1)[..., :k]
