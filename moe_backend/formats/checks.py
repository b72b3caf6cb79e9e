"""Checks that every format shares; each error names the tensor and the way out."""

from __future__ import annotations

import torch


def expect_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], why: str) -> None:
    """Raise ValueError unless `tensor` has exactly `shape`; `why` says what the shape follows."""
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name}: shape {tuple(tensor.shape)} found, {shape} expected ({why}). "
            "Check the checkpoint's config.json and the quantisation that wrote it."
        )


def expect_dtype(name: str, tensor: torch.Tensor, *dtypes: torch.dtype) -> None:
    """Raise ValueError unless `tensor` has one of `dtypes`."""
    if tensor.dtype not in dtypes:
        accepted = ", ".join(_short(d) for d in dtypes)
        raise ValueError(f"{name}: dtype {_short(tensor.dtype)} found, {accepted} accepted.")


def expect_positive(name: str, scale: torch.Tensor, *, allow_zero: bool = False) -> None:
    """Raise ValueError unless every scale is finite and positive.

    Args:
        scale: any shape, any float dtype (fp8 included).
        allow_zero: a zero block scale is legal where its whole block is zero.
    """

    def good(part: torch.Tensor) -> torch.Tensor:
        values = part.float()
        return torch.isfinite(values) & ((values >= 0) if allow_zero else (values > 0))

    # A few experts at a time: fp32 copies of all block scales would be half of an NVFP4 layer.
    which = torch.cat([good(part) for part in scale.split(4)]) if scale.ndim else good(scale)
    if bool(which.all()):
        return
    bad = (~which).nonzero()
    where = tuple(bad[0].tolist())
    raise ValueError(
        f"{name}: {len(bad)} of {scale.numel()} scales are not finite and positive; the first is "
        f"{scale[where].item()} at index {where}. The scale is missing from the checkpoint or "
        "corrupt: convert the checkpoint again (`moe-backend convert`)."
    )


def expect_no_nan(name: str, weight: torch.Tensor) -> None:
    """Raise ValueError if `[E, N, K]` weights hold a NaN or infinity, naming the first expert.

    One pass over the bytes, a few experts at a time, and one read-back.
    """
    bad = torch.cat([_has_nan(experts) for experts in weight.split(4)])
    if bool(bad.any()):
        which = bad.nonzero().flatten().tolist()
        raise ValueError(
            f"{name}: NaN or infinity in {len(which)} of {len(bad)} experts, the first is "
            f"{which[0]}. The checkpoint is corrupt: download or convert it again."
        )


def _has_nan(experts: torch.Tensor) -> torch.Tensor:
    if experts.dtype == torch.float8_e4m3fn:  # no infinity; NaN is 0x7F and 0xFF
        return (experts.view(torch.int8) & 0x7F).flatten(1).amax(1) == 0x7F
    return ~torch.isfinite(experts.flatten(1)).all(1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
