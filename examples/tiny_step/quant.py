"""Fake quantisation: round to a number format and back, with a straight-through gradient.

The formats are the ones quantised checkpoints use for expert weights. Rounding happens in fp32
and the result has the dtype of the input, as a kernel that dequantises to bf16 would see it.
"""

import torch
from torch import Tensor

FP8_MAX = 448.0  # largest e4m3 number
FP4_MAX = 6.0  # largest e2m1 number


def _straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `x`."""
    return x + (rounded.to(x.dtype) - x).detach()


def _e4m3(x: Tensor) -> Tensor:
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float()


def _e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even mantissa."""
    size = x.abs().clamp(max=FP4_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.round(size / step) * step * x.sign()


def fp8_weight(w: Tensor) -> Tensor:
    """e4m3 with one fp32 scale, amax / 448, for each 128x128 block; w is [E, 128 a, 128 b]."""
    e, rows, cols = w.shape
    blocks = w.detach().float().view(e, rows // 128, 128, cols // 128, 128)
    scale = blocks.abs().amax((2, 4), keepdim=True).clamp(min=1e-12) / FP8_MAX
    return _straight_through(w, (_e4m3(blocks / scale) * scale).view_as(w))


def fp8_activation(x: Tensor) -> Tensor:
    """e4m3 with one dynamic scale for each 128 channels of each token; x is [..., 128 a]."""
    groups = x.detach().float().unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return _straight_through(x, (_e4m3(groups / scale) * scale).view_as(x))


def nvfp4(x: Tensor, amax: Tensor) -> Tensor:
    """e2m1 with an e4m3 scale for each 16 channels and an fp32 scale, amax / 2688, above it.

    x is [..., 16 a]; amax broadcasts against [..., a, 16].
    """
    groups = x.detach().float().unflatten(-1, (-1, 16))
    outer = amax.float().clamp(min=1e-12) / (FP8_MAX * FP4_MAX)
    scale = _e4m3(groups.abs().amax(-1, keepdim=True) / FP4_MAX / outer) * outer
    rounded = _e2m1(groups / scale.clamp(min=1e-30)) * scale
    return _straight_through(x, rounded.view_as(x))


def nvfp4_weight(w: Tensor) -> Tensor:
    """NVFP4 with one fp32 scale for each expert; w is [E, out, in]."""
    return nvfp4(w, w.detach().abs().amax((1, 2)).view(-1, 1, 1, 1))


def nvfp4_activation(x: Tensor, used: Tensor) -> Tensor:
    """NVFP4 with one fp32 scale for the tensor; `used` masks the values that set it."""
    return nvfp4(x, torch.where(used, x.detach().abs(), 0).amax())
