"""Tensors larger than the machine's memory."""

from __future__ import annotations

import math
import mmap

import torch


def sparse(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros whose pages take memory only when they are written.

    `torch.zeros` touches every page; a weight of many GiB of which a test uses two experts does not
    need it.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)
