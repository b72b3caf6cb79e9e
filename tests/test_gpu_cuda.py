"""The methods in CUDA C++ on a Hopper GPU: every activation and layout, repeats, graphs."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from gpu_problems import answer, but_for_one_token, routed, small
from test_gpu_matrix import FEW, LAYOUTS, REL_L2_FEW, STEP, experts

from moe_backend.kernels.cuda import build
from moe_backend.kernels.hopper import kernel as hopper
from moe_backend.kernels.hopper import once, tiles
from moe_backend.kernels.hopper.tiles import Once
from moe_backend.kernels.registry import kernel_named
from moe_backend.verify.metrics import difference
from moe_backend.verify.problems import ACTIVATIONS, Case
from moe_backend.verify.run import expected, passes

NARROW = {"w13_block": (32, 128), "w2_block": (128, 32)}
ONCE = (
    Case("fp8_block", STEP, hidden_size=1024, intermediate_size=640),
    Case("fp8_block", STEP, hidden_size=512, intermediate_size=160, **NARROW),
    Case("nvfp4", STEP, hidden_size=1024, intermediate_size=512),
    Case("bf16", STEP, hidden_size=1056, intermediate_size=352),
)
FLOW = (
    Case("fp8_block", STEP, hidden_size=1024, intermediate_size=640),
    Case("fp8_block", STEP, hidden_size=1024, intermediate_size=160, **NARROW),
)
TILES = (
    *((8, 2, 2), (8, 3, 2), (8, 4, 1), (16, 3, 2), (32, 2, 2), (64, 2, 3), (64, 3, 2)),
    *((128, 2, 2), (128, 3, 1)),
)
NVFP4 = Case("nvfp4", STEP, hidden_size=1024, intermediate_size=512)
PAIRS = (
    Case("fp8_block", STEP, hidden_size=1024, intermediate_size=640),
    Case(
        *("fp8_block", STEP), hidden_size=1024, intermediate_size=320, w13_block=(64, 128),
        w2_block=(128, 64),
    ),
    Case("fp8_block", STEP, hidden_size=512, intermediate_size=160, **NARROW),
    NVFP4,
    Case("nvfp4", STEP, hidden_size=768, intermediate_size=320),
    Case("bf16", STEP, hidden_size=1064, intermediate_size=360),
    Case("bf16", STEP, hidden_size=768, intermediate_size=640),
)  # fmt: skip
PADDED = Case("nvfp4", STEP, hidden_size=512, intermediate_size=320)
NVFP4_TILES = (
    *((8, 4, 1), (8, 2, 2), (8, 2, 1), (16, 4, 1), (16, 2, 2), (32, 4, 1), (64, 4, 1), (64, 2, 2)),
    *((96, 2, 2), (128, 2, 1)),
)


@pytest.fixture(autouse=True)
def possible():
    refusal = kernel_named("hopper").refusal(small(ONCE[0]).layer) or build.missing()
    if refusal is not None:
        pytest.skip(refusal)


def faults(problem, choice, counts):
    """What is wrong with calls of these token counts, each run three times and replayed."""
    found = []
    tensors = kernel_named("hopper").prepare(problem.weights)
    groups = choice.activation_groups(problem.layer)
    for tokens in counts:
        p = routed(problem, tokens)
        given = p.x, p.topk_weights, p.topk_ids, p.expert_map
        outputs = [hopper.run(p.layer, tensors, *given, choice) for _ in range(3)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(hopper.run(p.layer, tensors, *given, choice))
        outputs[-1].fill_(float("nan"))
        graph.replay()
        p = replace(p, reference=answer(p))
        wanted = expected(p, groups)
        error = difference(outputs[0], wanted)
        right = passes(error, p.case, quantised=groups is not None)
        if groups is not None and not right:
            right = error.within(REL_L2_FEW, norm=3e-2) and (
                tokens < FEW
                or passes(but_for_one_token(outputs[0], wanted), p.case, quantised=True)
            )
        if not right:
            found.append(f"{p.case.name} {choice}: {error}")
        if not all(torch.equal(out, outputs[0]) for out in outputs):
            found.append(f"{p.case.name} {choice}: not repeated")
    return found


@pytest.mark.parametrize("case", ONCE, ids=lambda c: f"{c.format}-{c.intermediate_size}")
def test_once(case):
    found = []
    for activation in ACTIVATIONS:
        for layout in LAYOUTS:
            problem = small(replace(case, activation=activation, **experts(layout)))
            found += faults(problem, Once(1), range(1, 9))
    assert found == []


@pytest.mark.parametrize(
    ("case", "tile"),
    [
        *product(FLOW, TILES),
        *product((NVFP4,), NVFP4_TILES),
        *product((PADDED,), ((8, 2, 1), (32, 4, 1), (96, 2, 2))),
    ],
    ids=lambda c: f"{c.format}-{c.intermediate_size}" if isinstance(c, Case) else str(c),
)
def test_flow(case, tile):
    """From one token to several tiles for an expert."""
    found = []
    for activation in ACTIVATIONS if tile == TILES[0] else ACTIVATIONS[:1]:
        for layout in LAYOUTS:
            problem = small(replace(case, activation=activation, **experts(layout)))
            choice = tiles.flow(problem.layer, *tile)
            found += faults(problem, choice, (1, 7, 16, 76, 304, 1000, 4096))
    assert found == []


@pytest.mark.parametrize("tile", [(8, 3, 2), (32, 3, 2), (16, 3, 2)], ids=str)
def test_flow_with_gemms_interleaved(tile):
    """More experts than blocks: items of the second GEMM come between those of the first."""
    case = replace(FLOW[1], hidden_size=512, num_experts=400, top_k=8)
    problem = small(case)
    choice = tiles.flow(problem.layer, *tile)
    assert faults(problem, choice, (60, 200, 500, 2000)) == []
    tensors = kernel_named("hopper").prepare(problem.weights)
    p = routed(problem, 500)
    given = p.x, p.topk_weights, p.topk_ids, p.expert_map
    wanted = hopper.run(p.layer, tensors, *given, choice)
    for _ in range(300):
        assert torch.equal(hopper.run(p.layer, tensors, *given, choice), wanted)


@pytest.mark.parametrize("case", PAIRS, ids=lambda c: f"{c.format}-{c.intermediate_size}")
def test_pairs(case):
    """From one token to several pairs of tiles for an expert, with blocks of rows left over."""
    found = []
    for activation in ACTIVATIONS if case in (PAIRS[0], NVFP4, PAIRS[-1]) else ACTIVATIONS[:1]:
        for layout in LAYOUTS:
            problem = small(replace(case, activation=activation, **experts(layout)))
            found += faults(
                problem, tiles.pairs(problem.layer), (1, 7, 64, 129, 304, 1000, 4096, 8209)
            )
    assert found == []


@pytest.mark.parametrize("case", [PAIRS[1], *PAIRS[4:6]], ids=lambda c: c.format)
def test_pairs_repeat_many_times(case):
    """A second GEMM of a few steps: what the blocks of a pair promise each other comes often."""
    problem = small(replace(case, **experts("ep")))
    tensors = kernel_named("hopper").prepare(problem.weights)
    p = routed(problem, 4096)
    given = p.x, p.topk_weights, p.topk_ids, p.expert_map
    wanted = hopper.run(p.layer, tensors, *given, tiles.pairs(p.layer))
    for _ in range(2000):
        assert torch.equal(hopper.run(p.layer, tensors, *given, tiles.pairs(p.layer)), wanted)


def test_counters_outlive_what_pytorch_gives_back():
    """As vLLM has it: weights are loaded into a pool of their own, and discarded in its sleep."""
    pool, device = torch.cuda.MemPool(), torch.device("cuda", 0)
    once._rooms.pop(device, None)
    before = torch.cuda.memory_reserved()
    with torch.cuda.use_mem_pool(pool):
        once.make_room(device)
    assert torch.cuda.memory_reserved() == before
    room = once._rooms[device]
    assert room.shape == (once.ROOM, once.COUNTERS)
    assert (room == 0).all()
    assert not pool.snapshot()


def test_once_counts_for_each_stream():
    """Calls of one layer that run beside each other on two streams."""
    problem = small(replace(ONCE[0], **experts("ep")))
    tensors = kernel_named("hopper").prepare(problem.weights)
    p = routed(problem, 8)
    given = p.x, p.topk_weights, p.topk_ids, p.expert_map
    wanted = hopper.run(p.layer, tensors, *given, Once(1))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    outputs = []
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(hopper.run(p.layer, tensors, *given, Once(1)))
    torch.cuda.synchronize()
    assert all(torch.equal(out, wanted) for out in outputs)
