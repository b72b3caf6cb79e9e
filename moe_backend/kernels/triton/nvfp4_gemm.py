"""The grouped NVFP4 GEMM in Triton: stands in for vLLM's op where there is none.

Same arguments, same conventions (`kernels/nvfp4_gemm.py`). Compiled for sm_100a it is
`tcgen05.mma` with block scales, for which no GPU was at hand. On other GPUs the kernel decodes
operands to bf16, exactly, which is how its addressing is checked there (`test_gpu_nvfp4.py`).
"""

from __future__ import annotations

import torch


def grouped_gemm_op(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_scales: torch.Tensor,
    b_scales: torch.Tensor,
    alphas: torch.Tensor,
    sizes: torch.Tensor,
    starts: torch.Tensor,
    scale_starts: torch.Tensor,
    *,
    interpreted: bool = False,
) -> None:
    """`out[slots of e] = alphas[e] * a[slots of e] @ b[e].T`.

    Args:
        out: `[slots, N]`; N a multiple of 128.
        a, b: `[slots, K/2]` and `[E, N, K/2]` uint8; K a multiple of 64.
        a_scales, b_scales: E4M3 in 128x4 blocks.
        alphas: `[E]` float32.
        sizes: `[E, 3]` int32, rows, N and K of each expert.
        starts, scale_starts: `[E]` int32 START offsets of rows, and of rows of scales.
        interpreted: compute in fp32, for Triton's interpreter, which has no bf16.
    """
    import triton
    import triton.language as tl

    from moe_backend.kernels.triton.nvfp4_device import grouped_gemm_kernel

    (slots, n), experts, k = out.shape, len(starts), 2 * b.shape[2]
    if slots == 0:
        return
    # Each expert that is hit wastes less than one tile.
    tiles = slots // 128 + min(slots, experts)
    block_k = 128 if k % 128 == 0 else 64
    grouped_gemm_kernel[(tiles, n // 128)](
        out, a, b, a_scales, b_scales, alphas, sizes, starts, scale_starts, n, k,
        EXPERTS=experts, EXPERTS_POWER=triton.next_power_of_2(experts), BLOCK_K=block_k,
        SCALED_DOT=not interpreted and torch.cuda.get_device_capability()[0] == 10,
        COMPUTE=tl.float32 if interpreted else tl.bfloat16, num_warps=8, num_stages=3,
    )  # fmt: skip
