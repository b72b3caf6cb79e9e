"""The least time that a layer can take: bytes over the copy rate, operations over the matrix rate.

Weights of the experts that are hit are read once, in the checkpoint's own width, scales of NVFP4
included; hidden states are read and written once in bf16. The copy rate counts a copy's reads and
writes; a kernel that only reads can pass it by a few percent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moe_backend.bench.shapes import Shape

BYTES_PER_WEIGHT = {"fp8_block": 1.0, "nvfp4": 0.5625, "bf16": 2.0}


@dataclass(frozen=True)
class Rates:
    """What a GPU does at most: bytes per second of a copy, operations per second of a GEMM."""

    copy: float
    fp8: float
    bf16: float

    def operations(self, format_name: str) -> float:
        return self.fp8 if format_name == "fp8_block" else self.bf16


# Measured once on the GPU named, so that floors of different days can be compared.
KNOWN = {"NVIDIA H200": Rates(4.3e12, 1583e12, 790e12)}


def floor_us(shape: Shape, topk_ids: torch.Tensor, rates: Rates) -> float:
    """Microseconds for these `[T, top_k]` global ids on the rank that has the first experts."""
    hit = topk_ids[(topk_ids >= 0) & (topk_ids < shape.local)]
    weight = 3 * shape.intermediate * shape.hidden
    moved = hit.unique().numel() * weight * BYTES_PER_WEIGHT[shape.format]
    moved += topk_ids.shape[0] * shape.hidden * 4
    operations = 2 * hit.numel() * weight
    return max(moved / rates.copy, operations / rates.operations(shape.format)) * 1e6


def rates() -> Rates:
    """Of the current GPU: the known ones, or measured now."""
    return KNOWN.get(torch.cuda.get_device_name()) or measured()


def measured() -> Rates:
    """Copy a GiB; multiply square matrices of 8192 in bf16 and FP8."""
    from triton.testing import do_bench

    def seconds(call: Callable[[], object]) -> float:
        return float(do_bench(call, warmup=50, rep=200, return_mode="median")) / 1e3

    source, target = torch.empty(2, 2**30, device="cuda", dtype=torch.uint8)
    copy = 2 * source.numel() / seconds(lambda: target.copy_(source))
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    bf16 = 2 * size**3 / seconds(lambda: a @ a)
    one = torch.ones((), device="cuda")
    try:
        f = a.to(torch.float8_e4m3fn)
        fp8 = (
            2
            * size**3
            / seconds(lambda: torch._scaled_mm(f, f.t(), one, one, out_dtype=torch.bfloat16))
        )
    except RuntimeError:  # no FP8 matrix instructions: FP8 weights are multiplied in bf16
        fp8 = bf16
    return Rates(copy, fp8, bf16)
