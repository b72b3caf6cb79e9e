"""NVFP4 experts as FP8 block-scaled ones: the `folded` path.

FP8 has matrix instructions on GPUs that know nothing of NVFP4, and takes 1.78 times the memory.
E4M3 holds an E2M1 code times an E4M3 scale to about 31 dB next to one scale per 128x128 block; the
NVFP4 codes themselves are some 20 dB from the weights they stand for, so little is lost. Nothing is
lost at all where the NVFP4 tensor is an MXFP4 one in disguise (`nvfp4.is_mxfp4_cast`): with a block
scale that is a power of two every value is a code of E4M3, unless a block spans more than 16
octaves. So each matrix is tried with block scales of `amax / 448` and with powers of two, and keeps
the closer form. What was lost is measured on every weight, not assumed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moe_backend.formats import nvfp4
from moe_backend.formats.bf16 import Bf16Weights
from moe_backend.formats.fp8_block import (
    E4M3FN_MAX,
    Fp8BlockWeights,
    cdiv,
    dequantize_blocks,
    spread_scale,
)
from moe_backend.formats.nvfp4 import GROUP, Nvfp4Weights
from moe_backend.formats.rounding import divide

BLOCK = (128, 128)


@dataclass(frozen=True)
class FoldingCost:
    """What folding changed.

    Attributes:
        snr_db: power of the NVFP4 weights over the power of the difference; inf if none changed.
        exact: matrices (gate, up or down of one expert) that kept every value.
        matrices: how many there are.
    """

    snr_db: float
    exact: int
    matrices: int

    def __str__(self) -> str:
        if self.exact == self.matrices:
            return "lossless"
        return f"weights within {self.snr_db:.1f} dB, {self.exact} of {self.matrices} exact"


def fold(weights: Nvfp4Weights) -> tuple[Fp8BlockWeights, FoldingCost]:
    """Convert to FP8 with a scale per 128x128 block.

    One matrix at a time: beside both forms of the weights, a few fp32 copies of one matrix are the
    most that is allocated. Each gate and up is folded with its own global scale, so their block
    scales differ and no factor is left over.
    """
    e, h, i = weights.num_experts, weights.hidden_size, weights.intermediate_size
    bn, bk = BLOCK
    device = weights.w13.device
    w13 = torch.empty(e, 2, i, h, dtype=torch.float8_e4m3fn, device=device)
    s13 = torch.empty(e, 2, cdiv(i, bn), cdiv(h, bk), dtype=torch.float32, device=device)
    w2 = torch.empty(e, h, i, dtype=torch.float8_e4m3fn, device=device)
    s2 = torch.empty(e, cdiv(h, bn), cdiv(i, bk), dtype=torch.float32, device=device)
    p13, b13 = weights.w13.view(e, 2, i, -1), weights.w13_scale.view(e, 2, i, -1)
    found = []
    for x in range(e):
        for half in range(2):
            global_scale = weights.w13_global_scale[x, half]
            w13[x, half], s13[x, half], cost = _fold_matrix(
                p13[x, half], b13[x, half], global_scale
            )
            found.append(cost)
        w2[x], s2[x], cost = _fold_matrix(
            weights.w2[x], weights.w2_scale[x], weights.w2_global_scale[x, 0]
        )
        found.append(cost)
    folded = Fp8BlockWeights(w13.flatten(1, 2), s13.flatten(1, 2), w2, s2, BLOCK, BLOCK)
    power, error = torch.stack(found).T.double().cpu()
    total = error.sum().item()
    return folded, FoldingCost(
        snr_db=math.inf if total == 0 else 10 * math.log10(power.sum().item() / total),
        exact=int((error == 0).sum()),
        matrices=len(found),
    )


def _fold_matrix(
    packed: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `[N, K]`, block scales, and `[power, squared error]` of one matrix."""
    values = nvfp4.dequantize(packed, scale, global_scale)
    n, k = values.shape
    bn, bk = BLOCK
    padded = torch.nn.functional.pad(values, (0, -k % bk, 0, -n % bn))
    amax = padded.unflatten(-1, (-1, bk)).unflatten(0, (-1, bn)).abs().amax(dim=(1, 3))
    fitting = torch.where(amax > 0, divide(amax, E4M3FN_MAX), torch.ones_like(amax))
    fitting = fitting.clamp(min=torch.finfo(torch.float32).tiny)  # else the quotient overflows
    codes, error = _encode(values, fitting)
    blocks = _power_of_two_above(fitting)
    other_codes, other_error = _encode(values, blocks)
    closer = other_error < error
    codes = torch.where(closer, other_codes.view(torch.uint8), codes.view(torch.uint8))
    cost = torch.stack((values.square().sum(), torch.minimum(error, other_error)))
    return codes.view(torch.float8_e4m3fn), torch.where(closer, blocks, fitting), cost


def _encode(values: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes with given block scales, and the squared error."""
    n, k = values.shape
    spread = spread_scale(blocks, n, k, BLOCK)
    codes = (values / spread).clamp(-E4M3FN_MAX, E4M3FN_MAX).to(torch.float8_e4m3fn)
    error = dequantize_blocks(codes, blocks, BLOCK) - values
    return codes, error.square().sum()


def _power_of_two_above(scale: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below."""
    mantissa, exponent = torch.frexp(scale)
    return torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())


def unpack(weights: Nvfp4Weights, dtype: torch.dtype) -> Bf16Weights:
    """Decode to floating point, one expert at a time; each value is rounded once, to `dtype`.

    In bf16 that rounding is 54 dB below the weights: NVFP4 itself is 20 dB from its master.
    """
    e, h, i = weights.num_experts, weights.hidden_size, weights.intermediate_size
    w13 = torch.empty(e, 2 * i, h, dtype=dtype, device=weights.w13.device)
    w2 = torch.empty(e, h, i, dtype=dtype, device=weights.w13.device)
    for x in range(e):
        w13[x], w2[x] = weights.expert(x, dtype)
    return Bf16Weights(w13, w2)


def folded_bytes(num_experts: int, hidden_size: int, intermediate_size: int) -> tuple[int, int]:
    """Bytes of one layer's experts in NVFP4 and folded."""
    h, i = hidden_size, intermediate_size
    bn, bk = BLOCK
    packed = 3 * h * i // 2 + 3 * h * i // GROUP
    folded = 3 * h * i + 4 * (2 * cdiv(i, bn) * cdiv(h, bk) + cdiv(h, bn) * cdiv(i, bk))
    return num_experts * packed, num_experts * folded
