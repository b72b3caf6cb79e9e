"""Device code for dealing out tiles among programs evenly, and for adding up what they made of one.

Every program takes as many whole tiles as every other. Of the tiles that are left, fewer than
programs, all steps stand in a row, and each program takes as many of them as every other, first. A
tile whose steps lie with several programs is ended by the one that has its first steps: the others
leave their sums in memory and raise a flag, and it adds them in order, so that results repeat bit
for bit. (The method is stream-K with one data-parallel part: Osama et al., "Stream-K: work-centric
parallel decomposition for dense matrix-matrix multiplication on the GPU", 2023.)

What a program waits for is always the first thing that another does. Shares go from the last
program to the first, so that this one has started earlier: nothing waits for a program that has not
found room yet.

The buffers: `sums` fp32, `[programs, parts, 64, TOKENS]`; `flags` int32, `[programs, parts]`, zero
before the launch. Parts are handed over by different warp groups.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LEAST_STEPS: tl.constexpr = tl.constexpr(4)  # fewer take less time than handing over their sums


@triton.jit
def _share(program, total, steps):
    """First step of a program's share of the tiles that are left, and the first behind it."""
    left = total % tl.num_programs(0)
    shared = left * steps
    sharers = tl.minimum(tl.num_programs(0), tl.maximum(left, shared // LEAST_STEPS))
    nth = tl.num_programs(0) - 1 - program
    each = shared // tl.maximum(sharers, 1)
    more = shared - each * sharers
    first = tl.minimum(nth * each + tl.minimum(nth, more), shared)
    return first, tl.minimum(first + each + tl.where(nth < more, 1, 0), shared)


@triton.jit
def _pieces(total, steps):
    """This program's share, the number of tiles left, and of the pieces that it works on."""
    first, end = _share(tl.program_id(0), total, steps)
    left = total % tl.num_programs(0)
    shared = tl.where(first < end, tl.cdiv(end, steps) - first // steps, 0)
    return first, end, left, shared + total // tl.num_programs(0)


@triton.jit
def _piece(n, first, end, left, steps):
    """Tile of a program's n-th piece, its first step and the one behind its last."""
    shared = tl.where(first < end, tl.cdiv(end, steps) - first // steps, 0)
    t = first // steps + n
    begin = tl.maximum(first - t * steps, 0)
    stop = tl.minimum(end - t * steps, steps)
    whole = n >= shared
    t = tl.where(whole, left + (n - shared) * tl.num_programs(0) + tl.program_id(0), t)
    return t, tl.where(whole, 0, begin), tl.where(whole, steps, stop)


@triton.jit
def _tile(t, tiles, blocks, TOKENS: tl.constexpr):
    """Block of weight rows, expert, first and end position of tile `t`.

    The tiles of an expert's block follow each other: they read the same weights.
    """
    row = tiles + 1 + t // blocks * 4
    e = tl.load(row)
    start = tl.load(row + 1)
    last = tl.load(row + 2)
    inside = t - tl.load(row + 3) * blocks  # the expert's tiles
    each = tl.cdiv(last - start, TOKENS)
    return inside // each, e, start + inside % each * TOKENS, last


@gluon.jit
def _part(sums, program, part, acc, PARTS: gl.constexpr):
    """Where a program leaves a part like `acc`."""
    LAYOUT: gl.constexpr = acc.type.layout
    TOKENS: gl.constexpr = acc.shape[1]
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
    column = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, LAYOUT))
    return sums + ((program * PARTS + part) * 64 + row[:, None]) * TOKENS + column[None, :]


@gluon.jit
def _hand_over(sums, flags, accs, FIRST: gl.constexpr, PARTS: gl.constexpr):
    """This program's sums of a tile that another one ends, from part FIRST on."""
    program = gl.program_id(0)
    for n in gl.static_range(len(accs)):
        gl.store(_part(sums, program, FIRST + n, accs[n], PARTS), accs[n])
    tl.debug_barrier()  # all of the warp group have stored
    gl.atomic_xchg(flags + program * PARTS + FIRST, 1, sem="release")


@gluon.jit
def _add_the_rest(
    sums, flags, accs, FIRST: gl.constexpr, PARTS: gl.constexpr, at, end, total, steps,
):  # fmt: skip
    """The sums of a tile whose steps from `at` to `end`, of all shared ones, were others'."""
    program = gl.program_id(0)
    while at < end:
        program -= 1
        while gl.atomic_add(flags + program * PARTS + FIRST, 0, sem="acquire") == 0:
            pass
        tl.debug_barrier()
        added = ()
        for n in gl.static_range(len(accs)):
            theirs = _part(sums, program, FIRST + n, accs[n], PARTS)
            added += (accs[n] + gl.load(theirs, cache_modifier=".cg"),)
        accs = added
        _, at = _share(program, total, steps)
    return accs
