"""The grouped NVFP4 GEMM of the installed stack, behind one adapter.

vLLM's `cutlass_fp4_group_mm` is the target: it is in every CUDA build of vLLM for sm_100, takes the
128x4 scales that this package assembles, and applies a factor per expert in its epilogue. (torch's
`scaled_grouped_mm` takes NVFP4 only where it was built with MSLK, FlashInfer is an optional
package.) Read in source: vLLM 0.32 `_custom_ops.py cutlass_fp4_moe_mm` and
`csrc/libtorch_stable/quantization/fp4/nvfp4_blockwise_moe_kernel.cu` at commit 1c04eb1e. It has not
run here: no Blackwell GPU was at hand. `tests/test_nvfp4_native.py` runs everything around it
against a model of its address arithmetic.

Its conventions, which differ from torch's:

* `expert_offsets` and `sf_offsets` are START offsets, `[E]`: the leading zero and no total.
* Scales of expert `e` begin at byte `sf_offsets[e] * (K / 16)`, those of its weight at
  `e * N * (K / 16)`. Both leave padding out, so they are right only where there is none: K must be
  a multiple of 64 and N of 128. The addresses also have to be multiples of 128 bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_backend.formats.nvfp4 import GROUP
from moe_backend.kernels.nvfp4_rows import GroupedActivations
from moe_backend.layout.blocked_scales import BLOCK_COLUMNS, BLOCK_ROWS, BlockedScales

K_MULTIPLE = GROUP * BLOCK_COLUMNS
N_MULTIPLE = BLOCK_ROWS

# (out, a, b, a_scales, b_scales, alphas, problem_sizes, expert_offsets, sf_offsets) -> None
VllmOp = Callable[..., None]


def installed_op() -> VllmOp:
    """vLLM's op, or ours in Triton where vLLM's extension has none (another engine, or none)."""
    namespace = torch.ops._C
    if hasattr(namespace, "cutlass_fp4_group_mm"):
        return namespace.cutlass_fp4_group_mm  # type: ignore[no-any-return]
    from moe_backend.kernels.triton.nvfp4_gemm import grouped_gemm_op

    return grouped_gemm_op


def grouped_gemm(
    rows: GroupedActivations,
    weight: torch.Tensor,
    weight_scales: BlockedScales,
    alpha: torch.Tensor,
    op: VllmOp,
) -> torch.Tensor:
    """`alpha[e] * rows @ weight[e].T` for the rows of each expert.

    Args:
        rows: `[slots, K]`.
        weight: `[E, N, K/2]` uint8; K a multiple of 64, N of 128.
        weight_scales: `[E, N, K/16]` in 128x4 blocks.
        alpha: `[E]` float32.
        op: vLLM's op, or a model of it.
    Returns:
        `[slots, N]` bfloat16; rows of dropped slots hold anything.

    Raises:
        ValueError: a size that the op would address wrongly.
    """
    experts, n, k = weight.shape[0], weight.shape[1], 2 * weight.shape[2]
    if k % K_MULTIPLE or n % N_MULTIPLE:
        raise ValueError(
            f"grouped NVFP4 GEMM: weight [{n}, {k}] found; rows must be a multiple of {N_MULTIPLE} "
            f"and columns of {K_MULTIPLE}. Pad the weights (`nvfp4_native.pad_experts`)."
        )
    ends = rows.scales.offsets
    starts = ends.starts().tensor[:-1]
    scale_starts = rows.scales.padded_offsets().starts().tensor[:-1]
    sizes = ends.tensor.new_empty(experts, 3)
    sizes[:, 0] = ends.counts()
    sizes[:, 1].fill_(n)
    sizes[:, 2].fill_(k)
    out = torch.empty(len(rows.packed), n, dtype=torch.bfloat16, device=weight.device)
    op(
        out,
        rows.packed,
        weight,
        rows.scales.data.view(-1, k // GROUP),
        weight_scales.data.view(experts, n, k // GROUP),
        alpha,
        sizes,
        starts,
        scale_starts,
    )
    return out
