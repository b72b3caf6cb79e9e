"""Slots sorted, tokens quantised or reordered, and the sum.

The first by `route.cu`, or by `sort.cu` and `spread.cu`, both after `count.cu` with many slots; the
sum by `combine.cu`.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from cuda_host import driver

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

E4M3 = torch.float8_e4m3fn
POISON = 0x7F  # NaN
THREADS = 512


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Case:
    tokens: int
    top_k: int
    experts: int  # of all ranks
    local: int
    h: int
    each: int  # tokens of a block
    long_ids: bool = False
    mapped: bool = True
    weight_on_input: bool = False
    quantised: bool = True
    reordered: bool = True  # if not quantised: columns in the order of the NVFP4 decoder
    chunks: int = 0  # that a launch of its own counts
    pieces: int = 1  # of 256 columns
    sorted: bool = False  # tokens go to the positions of their slots
    tile: int = 0  # tokens of an item at most; the list: experts with larger items first


CASES = {
    "one token": Case(1, 8, 16, 16, 256, 1, mapped=False),
    "a block for each": Case(7, 4, 12, 5, 192, 1),
    "left out": Case(40, 2, 8, 3, 128, 9, long_ids=True),
    "gathered": Case(33, 8, 24, 24, 4224, 7, mapped=False, pieces=4),
    "many experts": Case(20, 6, 700, 600, 64, 20),
    "rounds": Case(150, 8, 20, 11, 64, 140),
    "nothing here": Case(5, 2, 300, 1, 128, 2),
    "many slots": Case(6, 40, 64, 64, 64, 4, mapped=False),
    "long rows": Case(3, 8, 1024, 1024, 8256, 2, mapped=False),
    "chunks": Case(150, 8, 20, 11, 192, 7, chunks=5, sorted=True, pieces=4),
    "few chunks filled": Case(9, 4, 600, 600, 128, 2, long_ids=True, mapped=False, chunks=8),
    "one block in chunks": Case(3, 2, 4, 3, 128, 3, chunks=4, sorted=True),
    "nothing to spread": Case(5, 2, 300, 1, 128, 2, chunks=2, sorted=True),
    "weights first": Case(9, 1, 4, 4, 192, 4, mapped=False, weight_on_input=True),
    "reordered": Case(20, 4, 12, 5, 512, 3, quantised=False),
    "reordered long": Case(3, 2, 4, 4, 4352, 2, mapped=False, quantised=False),
    "reordered and sorted": Case(
        20, 4, 12, 5, 1280, 3, quantised=False, chunks=3, sorted=True, pieces=4
    ),
    "many by their items": Case(
        600, 12, 600, 600, 64, 200, mapped=False, chunks=2, sorted=True, pieces=4, tile=16
    ),
    "by items of several tiles": Case(
        150, 3, 9, 9, 64, 30, mapped=False, chunks=2, sorted=True, pieces=4, tile=48
    ),
    "sorted rounds": Case(150, 8, 20, 3, 64, 140, chunks=2, sorted=True),
    "sorted, many slots": Case(6, 40, 64, 2, 1088, 4, chunks=2, sorted=True, pieces=2),
    "sorted weights": Case(9, 1, 4, 3, 192, 4, chunks=3, sorted=True, weight_on_input=True),
    "reordered weights": Case(9, 1, 4, 3, 256, 4, weight_on_input=True, quantised=False),
    "as they are": Case(
        20, 4, 12, 5, 1288, 3, quantised=False, reordered=False, chunks=3, sorted=True, pieces=4
    ),
}
CASES["as they are but for weights"] = replace(
    CASES["sorted weights"], quantised=False, reordered=False
)


def ids_of(case: Case) -> torch.Tensor:
    """Different experts for a token; some are -1, some beyond the last."""
    n = case.experts
    ids = torch.stack([torch.randperm(n)[: case.top_k] for _ in range(case.tokens)])
    ids[torch.rand(ids.shape) < 0.1] = -1
    ids[torch.rand(ids.shape) < 0.1] = n + 3
    return ids.long() if case.long_ids else ids.int()


def share(tokens: int, most: int) -> int:
    """Tokens of an item, where an expert's are split evenly, in eights."""
    return 8 * cdiv(tokens, 8 * cdiv(tokens, most))


def sorted_slots(case: Case, ids: torch.Tensor, expert_map: torch.Tensor) -> tuple[list[int], list]:
    """Position of each slot, and of each expert hit its number, first and end position."""
    known = [expert_map[id].item() if 0 <= id < case.experts else -1 for id in ids.flatten()]
    position, rows, start = [-1] * len(known), [], 0
    for expert in range(case.local):
        own = [slot for slot, e in enumerate(known) if e == expert]
        for n, slot in enumerate(own):
            position[slot] = start + n
        if own:
            rows.append([expert, start, start + len(own)])
        start += cdiv(len(own), 4) * 4
    if case.tile:  # of equal ones the first stays first
        given = [*rows]
        by_slots = sorted(rows, key=lambda row: row[1] - row[2])
        rows.sort(key=lambda row: -share(row[2] - row[1], case.tile))
        assert rows not in (given, by_slots)  # or the case shows nothing
    return position, rows


def check_codes(operand: torch.Tensor, scale: torch.Tensor, value: torch.Tensor) -> None:
    """Routed tokens in e4m3."""
    h = value.shape[1]
    grouped = torch.nn.functional.pad(value, (0, -h % 128)).view(len(value), cdiv(h, 128), 128)
    amax = grouped.abs().amax(2)
    scales = torch.where(amax > 0, amax / 448, 1.0)
    codes = (grouped / scales[:, :, None]).to(E4M3).view(torch.uint8).flatten(1)[:, :h]
    torch.testing.assert_close(scale, scales, rtol=1e-6, atol=0)
    same = (operand == codes).float()
    # All but those on the edge, where 448 / amax rounds.
    assert same.numel() == 0 or same.mean() > 0.995
    spread = scales.repeat_interleave(128, 1)[:, :h].double()
    coded = operand.view(E4M3).double() * spread
    torch.testing.assert_close(coded, value.double(), rtol=0.07, atol=0.01)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_route(name: str, seed: int) -> None:
    case = CASES[name]
    torch.manual_seed(seed)
    t, k, h = case.tokens, case.top_k, case.h
    x, weights = torch.randn(t, h).bfloat16(), torch.rand(t, k)
    x[t // 2] = 0
    ids = ids_of(case)
    expert_map = torch.arange(case.experts).int()
    if case.mapped:
        expert_map.fill_(-1)
        expert_map[torch.randperm(case.experts)[: case.local]] = torch.arange(case.local).int()
    room = cdiv(t * k + 3 * min(case.local, t * k), 4) * 4
    bytes_each = 1 if case.quantised else 2
    rows = room if case.sorted else t
    operand = torch.full((rows, bytes_each * h), POISON, dtype=torch.uint8)
    scale = torch.full((cdiv(h, 128), rows), float("nan"))
    position = torch.full((t * k,), -7, dtype=torch.int32)
    token_of = torch.full((room,), -7, dtype=torch.int32)
    targets = torch.full((room, 2), -7.0)  # of each an int32 and a number
    listed = torch.full((1 + 3 * case.local,), -7, dtype=torch.int32)
    counters = torch.full((1000,), 7, dtype=torch.int32)
    slots = {
        "EXPERTS": case.local, "NUM_IDS": case.experts, "TOP_K": k, "HAS_MAP": int(case.mapped),
        "IDS64": int(case.long_ids), "CHUNKS": case.chunks,
    }  # fmt: skip
    on_input = {"WEIGHT_ON_INPUT": int(case.weight_on_input)}
    reordered = case.reordered and not case.quantised
    tokens = on_input | {
        "QUANTISED": int(case.quantised), "REORDERED": int(reordered), "PIECES": case.pieces,
    }  # fmt: skip
    shared = 4 * (3 * case.local + THREADS // k * k + THREADS // 32)
    ordered = 512 // 32 if reordered else 0  # bytes for a thread
    blocks = cdiv(t, case.each)
    each_chunk = cdiv(blocks, case.chunks or 1) * case.each * k
    counts = torch.full((case.chunks, case.local), -7, dtype=torch.int32)

    def launch(name, grid, threads, shared, defines, args):
        library = driver.compile(driver.KERNELS / f"{name}.cu", defines)
        driver.launch(library, name, grid, threads, shared, args, seed)

    if case.chunks:
        args = [ids, expert_map, counts, t * k, each_chunk]
        launch("count", case.chunks, THREADS, 4 * case.local, slots, args)
    if case.sorted:
        launch(
            "sort", blocks + 1, THREADS, shared,
            slots | on_input | {"TILE": case.tile, "LONE": 1},
            [ids, expert_map, weights, position, targets, listed, counts, t, case.each, each_chunk],
        )  # fmt: skip
        launch(
            "spread", cdiv(t * cdiv(h, 256 * case.pieces), 8), 256, 256 * ordered,
            tokens | {"TOP_K": k}, [x, position, weights, operand, scale, t, rows, h],
        )  # fmt: skip
    else:
        launch(
            "route", blocks + 1, THREADS, shared + 20 + THREADS * ordered, slots | tokens,
            [x, ids, expert_map, weights, operand, scale, position, token_of, listed, counters,
             counts, 997, t, case.each, each_chunk, h],
        )  # fmt: skip

    wanted, hit = sorted_slots(case, ids, expert_map)
    assert position.tolist() == wanted
    assert listed[: 1 + 3 * len(hit)].tolist() == [len(hit), *[n for row in hit for n in row]]
    value = x.float() * weights if case.weight_on_input else x.float()
    routed = (position.view(t, k) >= 0).any(1)
    if case.sorted:
        token = torch.tensor([wanted.index(p) // k if p in wanted else -1 for p in range(rows)])
        value, routed = value[token], token >= 0
    assert (operand[~routed] == POISON).all()
    if case.quantised:
        check_codes(operand[routed], scale[:, routed].T, value[routed])
    else:
        found = operand.view(torch.bfloat16)[routed]
        if reordered:
            device = pytest.importorskip("moe_backend.kernels.hopper.device")
            found = found[:, device._nvfp4_position.fn(torch.arange(h))]
        assert torch.equal(found, value[routed].bfloat16())
    assert scale[:, ~routed].isnan().all()
    if case.sorted:
        check_targets(targets, wanted, weights, case)
        return
    assert counters.tolist() == [0] * 997 + [7] * 3
    found = torch.full_like(token_of, -7)
    for slot, at in enumerate(wanted):
        if at >= 0:
            found[at] = slot // k
    assert torch.equal(token_of, found)


def check_targets(
    targets: torch.Tensor, position: list[int], weights: torch.Tensor, case: Case
) -> None:
    """Of a token's only slot here its row and its weight."""
    seen = 0
    for slot, at in enumerate(position):
        if at < 0:
            continue
        token = slot // case.top_k
        own = position[token * case.top_k : (token + 1) * case.top_k]
        alone = sum(p >= 0 for p in own) == 1
        seen += alone
        weight = weights.flatten()[slot] if alone and not case.weight_on_input else 1
        assert targets.view(torch.int32)[at, 0] == (token if alone else -1)
        assert targets[at, 1] == weight
    routed = torch.zeros(len(targets), dtype=torch.bool)
    routed[[at for at in position if at >= 0]] = True
    assert (targets[~routed] == -7).all()
    if case.mapped and case.local * 2 < case.experts:
        assert seen or case.local == 1  # cases with a few experts of many have some


@pytest.mark.parametrize(
    ("top_k", "h", "lone", "weighted", "pieces"),
    [
        (1, 64, 1, True, 1),
        (1, 64, 1, False, 4),
        (8, 4160, 0, True, 4),
        (8, 4160, 0, False, 1),
        (8, 4160, 1, True, 1),
        (8, 4160, 1, False, 4),
        (11, 192, 0, True, 4),
        (11, 192, 0, False, 1),
        (40, 64, 0, True, 1),
        (40, 64, 0, False, 4),
    ],
)
def test_combine(top_k: int, h: int, lone: int, weighted: bool, pieces: int) -> None:
    torch.manual_seed(0)
    t, blocks = 19, 2
    partial = torch.randn(t * top_k + 5, h).bfloat16()
    position = torch.randperm(len(partial))[: t * top_k].int().view(t, top_k)
    position[torch.rand(t, top_k) < 0.3] = -1
    position[3] = -1
    position[5, :-1] = position[6, 1:] = -1
    weights = torch.rand(t, top_k)
    weights[position < 0] = float("nan")
    out = torch.full((t, h), float("nan"), dtype=torch.bfloat16)
    defines = {"TOP_K": top_k, "WEIGHTED": int(weighted), "PIECES": pieces, "LONE": lone}
    library = driver.compile(driver.KERNELS / "combine.cu", defines)
    args = [partial, position, weights, out, t, h]
    driver.launch(library, "combine", blocks, 256, 0, args, seed=1)
    scaled = weights.nan_to_num() if weighted else torch.ones_like(weights)
    rows = partial.double()[position.clamp(min=0)] * (position >= 0)[:, :, None]
    wanted = (rows * scaled.double()[:, :, None]).sum(1)
    written = torch.full_like(wanted, False, dtype=torch.bool)
    written[:] = ((position >= 0).sum(1) != 1)[:, None] if lone else True
    assert out[~written].isnan().all()
    torch.testing.assert_close(out[written].double(), wanted[written], rtol=2**-8, atol=1e-5)
