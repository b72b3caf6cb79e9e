"""Run by test_hopper_stream.py with TRITON_INTERPRET=1: each step of each tile is dealt out."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from moe_backend.kernels.hopper.share_device import LEAST_STEPS, _piece, _pieces, _tile

WIDTH: tl.constexpr = tl.constexpr(6)  # expert, block, first and end position, first and end step


@triton.jit
def deal_kernel(tiles, out, blocks, steps, MOST: tl.constexpr, TOKENS: tl.constexpr):
    """Of each program, its pieces in order."""
    first, end, left, pieces = _pieces(tl.load(tiles) * blocks, steps)
    for n in range(pieces):
        t, begin, stop = _piece(n, first, end, left, steps)
        block, e, m0, last = _tile(t, tiles, blocks, TOKENS)
        to = out + (tl.program_id(0) * MOST + n) * WIDTH
        tl.store(to, e)
        tl.store(to + 1, block)
        tl.store(to + 2, m0)
        tl.store(to + 3, last)
        tl.store(to + 4, begin)
        tl.store(to + 5, stop)


def check(counts, blocks, steps, programs, tile_tokens=8):
    """`counts`: slots of each expert."""
    rows, start, tile_row = [], 0, 0
    for e, count in enumerate(counts):
        each = -(-count // tile_tokens)
        rows += [[e, start, start + count, tile_row]] * each
        tile_row += each
        start += -(-count // 4) * 4
    tiles = torch.tensor([len(rows), *itertools.chain(*rows)], dtype=torch.int32)
    most = 2 + len(rows) * blocks
    out = torch.full((programs, most, WIDTH.value), -1, dtype=torch.int32)
    deal_kernel[(programs,)](tiles, out, blocks, steps, MOST=most, TOKENS=tile_tokens)
    dealt: dict[tuple[int, ...], list[tuple[int, int, int, int]]] = {}
    work = []
    for program, pieces in enumerate(out.tolist()):
        pieces = [p for p in pieces if p[0] >= 0]
        work.append(sum(p[5] - p[4] for p in pieces))
        for nth, (e, block, m0, last, begin, stop) in enumerate(pieces):
            assert stop > begin, "a piece without steps"
            dealt.setdefault((e, block, m0, last), []).append((begin, stop, program, nth))
            # What another program waits for is the first thing that this one does.
            assert begin == 0 or nth == 0, "the rest of a tile is not done first"
    first_slot = {e: start for e, start, _, _ in rows}
    wanted = {
        (e, block, first_slot[e] + m, first_slot[e] + counts[e])
        for e, block in itertools.product(range(len(counts)), range(blocks))
        for m in range(0, counts[e], tile_tokens)
    }
    assert set(dealt) == wanted, "not each tile"
    for parts in dealt.values():
        parts.sort()
        ends = [0, *(stop for _, stop, *_ in parts)]
        assert [begin for begin, *_ in parts] == ends[:-1], "steps missing or done twice"
        assert ends[-1] == steps, "the last steps are missing"
        # A tile's first steps are the latest program's: it waits for those before it.
        order = [program for _, _, program, _ in parts]
        assert order == list(range(order[0], order[0] - len(order), -1)), (
            "waits for a later program"
        )
    left = len(wanted) % programs
    most = 1 if left * steps >= programs * LEAST_STEPS.value else max(LEAST_STEPS.value, steps)
    assert max(work) - min(work) <= (most if left else 0), "not even"


if __name__ == "__main__":
    torch.manual_seed(0)
    for counts, blocks, steps, programs in (
        ([1, 0, 3, 9], 3, 5, 7),  # 15 tiles: two rounds and one tile for all
        ([1, 0, 3, 9], 3, 32, 13),
        ([2], 2, 16, 9),  # fewer tiles than programs
        ([1], 1, 2, 6),  # fewer steps than programs
        ([0, 0], 3, 4, 5),  # no work
        ([20, 1, 17], 4, 3, 16),  # several tiles of an expert's block
        ([8, 8], 4, 4, 8),  # nothing left
    ):
        check(counts, blocks, steps, programs)
    for _ in range(30):
        experts, programs = torch.randint(1, 8, (1,)).item(), torch.randint(1, 30, (1,)).item()
        counts = torch.randint(0, 30, (experts,)).tolist()
        blocks, steps = torch.randint(1, 6, (1,)).item(), torch.randint(1, 20, (1,)).item()
        check(counts, blocks, steps, programs)
    print("right")
