"""The fused gather, quantisation and scatter over random routings, on the CPU or a GPU.

    TRITON_INTERPRET=1 python tests/nvfp4_triton.py ROUTINGS [FIRST]

Prints how many routings were checked.
"""

from __future__ import annotations

import sys

import torch
from nvfp4_routings import check_against_loop, random_routing

from moe_backend.formats import nvfp4
from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.kernels.triton.nvfp4_quantize import quantize_routed
from moe_backend.layout.blocked_scales import padded_columns
from moe_backend.layout.routing import plan_routing
from moe_backend.layout.scale_assembly import max_scale_rows

SCALES = (
    ActivationScale(),
    ActivationScale(per_token=True),
    ActivationScale(torch.tensor([1e-3])),  # too small: block scales saturate at 448
    ActivationScale(torch.tensor([1e4])),  # too large: they reach the smallest subnormal
)


def check(seed: int, device: str = "cpu", block_m: int = 16) -> None:
    """One routing, random activations, poisoned buffers; raises AssertionError."""
    ids, experts, scales = random_routing(seed)
    tokens, top_k = ids.shape
    columns = scales.shape[1]
    g = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.randint(-12, 6, (tokens, columns, 1), generator=g).float())
    x = (torch.randn(tokens, columns, 16, generator=g) * size).flatten(1).bfloat16()
    x[::7] = 0
    x[(ids < 0).all(1)] = torch.nan  # a token that no expert here takes is not read
    if seed % 3 == 0:
        x[5::11, 3] = torch.nan  # stays in its block
    scale = SCALES[seed % 4]
    if scale.static is None and not scale.per_token:
        scale = ActivationScale(nvfp4.global_scale_of(x.float().nan_to_num().abs().sum())[None])
    held = scale if scale.static is None else ActivationScale(scale.static.to(device))
    slots = ids.numel()
    plan = plan_routing(ids.to(device), experts)
    rows = max_scale_rows(slots, experts)
    packed = torch.full((slots, 8 * columns), 0xAA, dtype=torch.uint8, device=device)
    data = torch.full((rows * padded_columns(columns),), 0x7F, dtype=torch.uint8, device=device)
    out = quantize_routed(
        x.to(device),
        plan,
        top_k,
        held,
        packed=packed,
        scale_data=data.view(torch.float8_e4m3fn),
        block_m=block_m,
    )
    expected = scale.quantize(x[torch.arange(slots) // top_k])
    kept = int(plan.expert_offsets[-1])
    order = plan.slots[:kept].cpu()
    byte = expected.scale.view(torch.uint8)
    # Codes under a scale of NaN do not matter.
    known = (byte != 0x7F).repeat_interleave(8, 1)[order]
    assert torch.equal(packed[:kept].cpu()[known], expected.packed[order][known])
    assert (packed[kept:] == 0xAA).all()
    check_against_loop(data.cpu(), ids, experts, byte)
    written = int((data != 0x7F).sum()) + int((byte[order] == 0x7F).sum())
    assert written == kept * padded_columns(columns)  # and nothing else
    if scale.per_token:
        assert torch.equal(out.global_scale[:kept].cpu(), expected.global_scale[order])


def main() -> None:
    torch.set_num_threads(1)
    routings = int(sys.argv[1])
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    for seed in range(first, first + routings):
        check(seed, block_m=512 if seed % 10 else 16)
    print(routings)


if __name__ == "__main__":
    main()
