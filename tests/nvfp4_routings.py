"""Random routings, and where each scale of them belongs, found one expert at a time."""

from __future__ import annotations

import torch

from moe_backend.layout.blocked_scales import BLOCK_ROWS, offset, padded_columns
from moe_backend.layout.scale_assembly import max_scale_rows


def random_routing(seed):
    """Token counts around the block of 128, empty experts anywhere, -1 slots, any top-k."""
    g = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=g))]

    tokens = pick(0, 1, 2, 5, 17, 64, 127, 128, 129, 200)
    experts = pick(1, 2, 3, 8, 32)
    top_k = pick(*[k for k in (1, 2, 4) if k <= experts])
    # A few experts take most tokens, some none.
    weight = torch.rand(experts, generator=g) ** 4 + 1e-9
    ids = torch.multinomial(weight.expand(max(tokens, 1), -1), top_k, generator=g)[:tokens]
    ids[torch.rand(ids.shape, generator=g) < pick(0.0, 0.0, 0.3, 1.0)] = -1
    columns = pick(1, 3, 4, 6, 9)
    scales = torch.randint(1, 127, (tokens * top_k, columns), dtype=torch.uint8, generator=g)
    return ids, experts, scales  # scales of the slots, unsorted


def expected_positions(ids, experts, scales):
    """`(buffer offset, byte)` of everything that must be written, one expert at a time."""
    columns = scales.shape[1]
    first_row = 0
    for e in range(experts):
        slots = (ids.flatten() == e).nonzero().flatten().tolist()
        for i, slot in enumerate(slots):
            for c in range(padded_columns(columns)):
                byte = int(scales[slot, c]) if c < columns else 0
                yield offset(first_row + i, c, columns), byte
        first_row += -(-len(slots) // BLOCK_ROWS) * BLOCK_ROWS
    assert first_row <= max_scale_rows(ids.numel(), experts)


def check_against_loop(data, ids, experts, scales):
    expected = list(expected_positions(ids, experts, scales))
    if expected:
        index, byte = torch.tensor(expected).T
        assert index.unique().numel() == len(index)
        assert torch.equal(data.view(torch.uint8)[index], byte.to(torch.uint8))
