"""Arithmetic that gives the same bits on a CPU and on a GPU."""

from __future__ import annotations

import torch


def divide(values: torch.Tensor, by: float) -> torch.Tensor:
    """`values / by`, correctly rounded.

    By a Python number (or a tensor of one element on the CPU) torch multiplies CUDA tensors with
    the inverse, which rounds twice (`aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu`).
    """
    return values / torch.full((), by, dtype=values.dtype, device=values.device)
