"""Slots sorted and tokens quantised (`route.cu`), and the sum (`combine.cu`), run on the host."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

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
    gather: bool = False
    long_ids: bool = False
    mapped: bool = True
    weight_on_input: bool = False
    tile: int = 1 << 30


CASES = {
    "one token": Case(1, 8, 16, 16, 256, 1, mapped=False),
    "a block for each": Case(7, 4, 12, 5, 192, 1),
    "left out": Case(40, 2, 8, 3, 128, 9, long_ids=True),
    "gathered": Case(33, 8, 24, 24, 4224, 7, gather=True, mapped=False),
    "many experts": Case(20, 6, 700, 600, 64, 20, gather=True),
    "rounds": Case(150, 8, 20, 11, 64, 140),
    "tiles": Case(90, 4, 8, 5, 128, 30, tile=16),
    "weights first": Case(9, 1, 4, 4, 192, 4, mapped=False, weight_on_input=True),
}


def ids_of(case: Case) -> torch.Tensor:
    """Different experts for a token; some are -1, some beyond the last."""
    n = case.experts
    ids = torch.stack([torch.randperm(n)[: case.top_k] for _ in range(case.tokens)])
    ids[torch.rand(ids.shape) < 0.1] = -1
    ids[torch.rand(ids.shape) < 0.1] = n + 3
    return ids.long() if case.long_ids else ids.int()


def sorted_slots(case: Case, ids: torch.Tensor, expert_map: torch.Tensor) -> tuple[list[int], list]:
    """Position of each slot, and of each tile expert, first position and the expert's end."""
    known = [expert_map[id].item() if 0 <= id < case.experts else -1 for id in ids.flatten()]
    position, rows, start = [-1] * len(known), [], 0
    for expert in range(case.local):
        own = [slot for slot, e in enumerate(known) if e == expert]
        for n, slot in enumerate(own):
            position[slot] = start + n
        for n in range(0, len(own), case.tile):
            rows.append([expert, start + n, start + len(own)])
        start += cdiv(len(own), 4) * 4
    return position, rows


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
    rows = t if case.gather else room
    operand = torch.full((rows, h), POISON, dtype=torch.uint8)
    scale = torch.full((cdiv(h, 128), rows), float("nan"))
    position = torch.full((t * k,), -7, dtype=torch.int32)
    token_of = torch.full((room,), -7, dtype=torch.int32)
    listed = torch.full((1 + 3 * (case.local + t * k // case.tile),), -7, dtype=torch.int32)
    counters = torch.full((1000,), 7, dtype=torch.int32)
    defines = {
        "EXPERTS": case.local, "NUM_IDS": case.experts, "TOP_K": k, "HAS_MAP": int(case.mapped),
        "IDS64": int(case.long_ids), "GATHER": int(case.gather),
        "TILE": case.tile,
        "WEIGHT_ON_INPUT": int(case.weight_on_input),
    }  # fmt: skip
    shared = 4 * (3 * case.local + THREADS // k * k + THREADS // 32)
    driver.launch(
        driver.compile(driver.KERNELS / "route.cu", defines), "route", cdiv(t, case.each) + 1,
        THREADS, shared,
        [x, ids, expert_map, weights, operand, scale, position, token_of, listed, counters, 997, t,
         case.each, h, rows],
        seed,
    )  # fmt: skip

    wanted, tiles = sorted_slots(case, ids, expert_map)
    assert position.tolist() == wanted
    assert listed[: 1 + 3 * len(tiles)].tolist() == [len(tiles), *[n for row in tiles for n in row]]
    assert counters.tolist() == [0] * 997 + [7] * 3
    value = x.float() * weights if case.weight_on_input else x.float()
    grouped = torch.nn.functional.pad(value, (0, -h % 128)).view(t, -1, 128)
    amax = grouped.abs().amax(2)
    scales = torch.where(amax > 0, amax / 448, 1.0)
    codes = (grouped / scales[:, :, None]).to(E4M3).view(torch.uint8).flatten(1)[:, :h]
    written = torch.full_like(operand, POISON)
    written_scale = torch.full_like(scale, float("nan"))
    tokens = torch.full_like(token_of, -7)
    for slot, at in enumerate(wanted):
        if at >= 0:
            row = slot // k if case.gather else at
            written[row], written_scale[:, row] = codes[slot // k], scales[slot // k]
            tokens[at] = slot // k
    assert torch.equal(operand, written)
    assert torch.equal(scale.nan_to_num(-1), written_scale.nan_to_num(-1))
    assert torch.equal(token_of, tokens if case.gather else torch.full_like(token_of, -7))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(
    ("top_k", "h"), [(1, 64), (8, 2112), (11, 192)], ids=["one", "parts", "many slots"]
)
def test_combine(top_k: int, h: int, weighted: bool) -> None:
    torch.manual_seed(0)
    t = 9
    partial = torch.randn(t * top_k + 5, h).bfloat16()
    position = torch.randperm(len(partial))[: t * top_k].int().view(t, top_k)
    position[torch.rand(t, top_k) < 0.3] = -1
    position[3] = -1
    weights = torch.rand(t, top_k)
    weights[position < 0] = float("nan")
    out = torch.full((t, h), float("nan"), dtype=torch.bfloat16)
    library = driver.compile(
        driver.KERNELS / "combine.cu", {"TOP_K": top_k, "WEIGHTED": int(weighted)}
    )
    args = [partial, position, weights, out, h]
    driver.launch(library, "combine", t * cdiv(h, 2048), 256, 0, args, seed=1)
    scaled = weights.nan_to_num() if weighted else torch.ones_like(weights)
    rows = partial.double()[position.clamp(min=0)] * (position >= 0)[:, :, None]
    wanted = (rows * scaled.double()[:, :, None]).sum(1)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=1e-5)
