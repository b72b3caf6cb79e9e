"""Run by test_hopper_prefill.py with TRITON_INTERPRET=1: slots sorted, permuted, summed."""

from __future__ import annotations

import torch

from moe_backend.formats.fp8_block import cdiv
from moe_backend.kernels.hopper import sort_device

CHUNK, TILE = 64, 8


def nvfp4_position(column):
    """Of the column's byte among 128: eight words for each of four threads, bytes 0, 2, 1, 3."""
    first, (byte, odd) = column // 256 * 256, divmod(column % 256, 2)
    thread, word, low = byte // 32, byte % 32 // 4, byte % 4
    return first + 128 * odd + 16 * word + 8 * (low % 2) + 2 * thread + low // 2


def next_power(n):
    return 1 << (n - 1).bit_length()


def check(tokens, top_k, experts, local_experts, hidden, dtype=torch.int32):
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(dtype)
    ids[torch.rand(tokens, top_k) < 0.1] = -1
    beyond = torch.rand(tokens, top_k) < 0.1  # as some engines mark rows that they leave out
    expert_map = torch.full((experts,), -1, dtype=torch.int32)
    expert_map[torch.randperm(experts)[:local_experts]] = torch.arange(local_experts).int()
    x, slots = torch.randn(tokens, hidden).half(), tokens * top_k
    chunks, bins = cdiv(slots, CHUNK), next_power(local_experts + 1)
    positions = cdiv(slots + 3 * min(local_experts, slots), 4) * 4
    columns = min(64, bins)

    counts, base = torch.empty(2, chunks, bins, dtype=torch.int32)
    local, rank, position = torch.full((3, slots), -7, dtype=torch.int32)
    tiles = torch.full((1 + 3 * (slots // TILE + local_experts),), -9, dtype=torch.int32)
    sort_device.rank_kernel[(chunks,)](
        torch.where(beyond, experts, ids).to(dtype),
        expert_map,
        local,
        rank,
        counts,
        slots,
        experts,
        HAS_MAP=True,
        CHUNK=CHUNK,
        BINS=bins,
        PDL=False,
    )
    sort_device.place_kernel[(cdiv(local_experts, columns),)](
        counts, base, tiles, local_experts, chunks, CHUNKS=next_power(chunks), BINS=bins,
        COLUMNS=columns, TOKENS=TILE, PDL=False,
    )  # fmt: skip
    operand = torch.full((positions, hidden), float("nan"))
    scale = torch.full((cdiv(hidden, 128), positions), float("nan"))
    sort_device.permute_kernel[(tokens,)](
        x, x, local, rank, base, position, operand, scale, hidden, hidden, positions,
        QUANTISED=True, WEIGHT_ON_INPUT=False, TOP_K=top_k, CHUNK=CHUNK, BINS=bins,
        GROUPS=next_power(cdiv(hidden, 128)), PDL=False,
    )  # fmt: skip

    given = ids.clone()
    ids[beyond] = -1
    expert = torch.where(ids >= 0, expert_map[ids.long().clamp(min=0)], -1).flatten()
    expected, rows, start = torch.full((slots,), -1, dtype=torch.int32), [], 0
    for e in range(local_experts):
        own = torch.nonzero(expert == e).flatten()
        end = start + len(own)
        expected[own] = torch.arange(start, end, dtype=torch.int32)
        rows += [[e, first, end] for first in range(start, end, TILE)]
        start = cdiv(end, 4) * 4
    assert torch.equal(position, expected), "positions"
    assert tiles[0] == len(rows), "number of tiles"
    assert tiles[1 : 1 + 3 * len(rows)].view(-1, 3).tolist() == rows, "tiles"
    kept = torch.nonzero(expected >= 0).flatten()
    at = expected[kept].long()
    values = operand[at] * scale[:, at].T.repeat_interleave(128, 1)[:, :hidden]
    assert torch.allclose(values, x[kept // top_k].float(), rtol=1e-5), "activations"

    def planned(width):
        position = torch.full((slots,), -7, dtype=torch.int32)
        found = torch.full((1 + 4 * (slots // TILE + local_experts),), -9, dtype=torch.int32)
        flags = torch.full((CHUNK + 5,), 7, dtype=torch.int32)
        operand = torch.full((positions, width), float("nan"))
        sort_device.plan_kernel[(1 + tokens,)](
            x, torch.where(beyond, experts, given).to(dtype), expert_map, x, operand,
            position, found, flags, slots, experts, hidden, width, CHUNK + 4, HAS_MAP=True,
            WEIGHT_ON_INPUT=False, TOP_K=top_k, KS=next_power(top_k), CHUNK=CHUNK,
            EXPERTS=next_power(local_experts), GROUPS=next_power(cdiv(width, 128)), TOKENS=TILE,
            PDL=False,
        )  # fmt: skip
        assert torch.equal(position, expected), "positions in one launch"
        assert found[0] == len(rows), "number of tiles in one launch"
        listed = found[1 : 1 + 4 * len(rows)].view(-1, 4).tolist()
        of_expert: dict[int, list[int]] = {}  # its row of the list, where it starts and ends
        for n, (e, start, last) in enumerate(rows):
            of_expert.setdefault(e, [n, start, last])
        wanted = [[e, of_expert[e][1], of_expert[e][2], of_expert[e][0]] for e, _, _ in rows]
        assert listed == wanted, "tiles in one launch"
        assert flags.tolist() == [0] * (CHUNK + 4) + [7], "flags taken down in one launch"
        return operand

    width = cdiv(hidden, 256) * 256
    operand = torch.full((positions, width), float("nan"))
    sort_device.permute_kernel[(tokens,)](
        x, x, local, rank, base, position, operand, scale, hidden, width, positions,
        QUANTISED=False, WEIGHT_ON_INPUT=False, TOP_K=top_k, CHUNK=CHUNK, BINS=bins,
        GROUPS=next_power(cdiv(width, 128)), PDL=False,
    )  # fmt: skip
    values = operand[at][:, [nvfp4_position(c) for c in range(width)]]
    padded = torch.nn.functional.pad(x[kept // top_k].float(), (0, width - hidden))
    assert torch.equal(values, padded), "activations for NVFP4"
    assert torch.equal(planned(width)[at], operand[at]), "the same in one launch"

    out, weights = torch.empty(tokens, hidden), torch.rand(tokens, top_k)
    partial = torch.randn(positions, hidden)
    sort_device.combine_kernel[(tokens, cdiv(hidden, 128))](
        partial, position, weights, out, hidden,
        TOP_K=top_k, WEIGHT_ON_INPUT=False, BLOCK=128, PDL=False,
    )  # fmt: skip
    sums = torch.zeros(tokens, hidden)
    sums.index_add_(0, kept // top_k, partial[at] * weights.flatten()[kept, None])
    assert torch.allclose(out, sums, rtol=1e-4, atol=1e-5), "sums"


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for sizes in (
        (50, 4, 16, 5, 256),
        (33, 2, 8, 8, 192),
        (1, 1, 4, 2, 128),
        (90, 8, 300, 200, 128),
        (9, 2, 8, 4, 288),
    ):
        check(*sizes)
    check(50, 4, 16, 5, 256, torch.int64)
    print("right")
