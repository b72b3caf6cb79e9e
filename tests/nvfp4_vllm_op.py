"""A model of vLLM's `cutlass_fp4_group_mm`: its address arithmetic, on flat memory.

Transcribed from what `__get_group_gemm_starts` computes (vLLM
`csrc/libtorch_stable/quantization/fp4/nvfp4_blockwise_moe_kernel.cu`, commit 1c04eb1e): base
addresses from START offsets and unpadded sizes, problem sizes `(m, n, k)` per expert, CUTLASS's
scale-factor layout for both operands, `alpha` per expert in the epilogue.
"""

from __future__ import annotations

import torch

from moe_backend.layout.blocked_scales import offset, padded_columns
from moe_backend.verify.naive import e2m1_value


def _codes(byte):
    table = torch.tensor([e2m1_value(c) for c in range(16)])
    return torch.stack((table[(byte & 15).long()], table[(byte >> 4).long()]), -1).flatten(-2)


def _scales(memory, start, rows, columns):
    """`[rows, physical columns]` from the layout that begins at byte `start`; NaN past the end."""
    index = start + offset(
        torch.arange(rows)[:, None], torch.arange(padded_columns(columns))[None], columns
    )
    padded = torch.nn.functional.pad(memory, (0, 1), value=0x7F)
    byte = padded[index.clamp(max=len(memory))]
    return byte.view(torch.float8_e4m3fn).float()


def model_op(out, a, b, a_scales, b_scales, alphas, sizes, expert_offsets, sf_offsets):
    """Same arguments as the op; writes the rows that the problem sizes cover, NaN elsewhere."""
    experts = len(expert_offsets)
    assert len(sf_offsets) == len(sizes) == len(alphas) == experts
    for t, dtype in ((sizes, torch.int32), (expert_offsets, torch.int32), (alphas, torch.float32)):
        assert t.dtype == dtype
        assert t.is_contiguous()
    flat_a, flat_b = a.flatten(), b.flatten()
    flat_sa, flat_sb = (t.view(torch.uint8).flatten() for t in (a_scales, b_scales))
    flat_out = out.fill_(torch.nan).view(-1)
    for e in range(experts):
        m, n, k = sizes[e].tolist()
        assert (n, k) == (b.shape[1], 2 * b.shape[2])
        row, sf_start = int(expert_offsets[e]), int(sf_offsets[e]) * (k // 16)
        b_sf_start = e * n * (k // 16)
        assert sf_start % 128 == 0, "the tensor memory accelerator reads from multiples of 128"
        assert b_sf_start % 128 == 0
        if m == 0:
            continue
        x = _codes(flat_a[row * k // 2 : (row + m) * k // 2].view(m, -1))
        w = _codes(flat_b[e * n * k // 2 : (e + 1) * n * k // 2].view(n, -1))
        physical = padded_columns(k // 16)
        x = torch.nn.functional.pad(x, (0, 16 * physical - k))
        w = torch.nn.functional.pad(w, (0, 16 * physical - k))
        x = x * _scales(flat_sa, sf_start, m, k // 16).repeat_interleave(16, 1)
        w = w * _scales(flat_sb, b_sf_start, n, k // 16).repeat_interleave(16, 1)
        flat_out[row * n : (row + m) * n] = (alphas[e] * (x @ w.T)).to(out.dtype).flatten()
