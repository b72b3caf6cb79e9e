"""The methods in CUDA C++ as a layer calls them, with launches that run on a CPU.

What the kernels do alone is in test_once_host.py, test_route_host.py and test_flow_host.py; here
their arguments are those that `once.py`, `flow.py`, `pairs.py` and `route.py` give.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from cuda_host import driver

from moe_backend.activation import Activation
from moe_backend.kernels.cuda import launch
from moe_backend.kernels.hopper import flow, kernel, once, pairs, route, tiles
from moe_backend.kernels.hopper.tiles import Once, Pairs
from moe_backend.verify.metrics import difference
from moe_backend.verify.naive import naive_experts
from moe_backend.verify.problems import ACTIVATIONS, Case, build
from moe_backend.verify.run import expected, passes

prepare = kernel.HopperKernel().prepare
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

STEP = Activation.from_name("swiglustep")
NARROW = {"w13_block": (32, 128), "w2_block": (128, 32)}
SMS = 3
POISON = 0x7F
SPREAD = ["count", "sort", "spread"]


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that ran."""
    found = []

    def start(kernel, grid, threads, arguments):
        found.append(kernel.name)
        library = driver.compile(kernel.source, dict(kernel.constants))
        args = [encoded(argument) for argument in arguments]
        # Boxes of hidden columns reach into the next expert's.
        changing = kernel.name == "flow"
        driver.launch(
            library, kernel.name, grid, threads, kernel.shared, args, len(found),
            sources_may_change=changing, cluster=kernel.cluster,
        )  # fmt: skip

    def carve(device, *sizes):
        arrays = [torch.full((max(size, 1),), POISON, dtype=torch.uint8) for size in sizes]
        return None, arrays

    for module in (flow, once, pairs, route):
        monkeypatch.setattr(module, "launch", start)
    for module in (flow, once, pairs):
        monkeypatch.setattr(module, "multiprocessors", lambda device: SMS)
    for module in (flow, pairs):
        monkeypatch.setattr(module, "carve", carve)
    counters = torch.zeros(once.COUNTERS, dtype=torch.int32)
    monkeypatch.setattr(once, "_counters", lambda w13: counters)
    return found


def encoded(argument):
    if not isinstance(argument, launch.TensorMap):
        return argument
    memory, shape, strides, box, _ = argument
    swizzle = 128 if box[0] == 128 else 0
    return driver.tensor_map(memory.view(torch.uint8), shape, strides, box, swizzle)


def check(problem, choice, **changes):
    given = {"x": problem.x, "topk_weights": problem.topk_weights, "topk_ids": problem.topk_ids}
    given |= {"expert_map": problem.expert_map, **changes}
    out = kernel.run(problem.layer, prepare(problem.weights), **given, choice=choice)
    groups = choice.activation_groups(problem.layer)
    found = difference(out, expected(problem, groups))
    assert passes(found, problem.case, quantised=groups is not None), found
    return out


def case(name, **more):
    return build(Case(name, STEP, **{"hidden_size": 256, "intermediate_size": 160, **more}))


@pytest.mark.parametrize("layout", ["unsharded", "ep", "dropped"])
def test_flow(launches, layout):
    problem = case("fp8_block", layout=layout, tokens=40, **NARROW)
    first = check(problem, tiles.flow(problem.layer, 16, 2, 1))
    assert launches == ["route", "flow", "combine"]
    again = check(problem, tiles.flow(problem.layer, 32, 2, 2), topk_ids=problem.topk_ids.long())
    assert difference(again, first).within(2e-2)


@pytest.mark.parametrize(
    ("layout", "tile", "sizes"),
    [
        ("unsharded", (8, 2, 2), (512, 256)),
        ("ep", (16, 2, 1), (256, 512)),
        ("dropped", (32, 4, 1), (768, 256)),
        ("ep", (64, 4, 1), (256, 256)),
        ("unsharded", (8, 4, 1), (512, 512)),
        ("ep", (8, 2, 2), (256, 192)),
        ("unsharded", (16, 4, 1), (512, 320)),
        ("dropped", (16, 2, 1), (256, 384)),
    ],
)
def test_flow_of_nvfp4(launches, layout, tile, sizes):
    hidden, intermediate = sizes
    problem = build(
        Case(
            "nvfp4", STEP, hidden_size=hidden, intermediate_size=intermediate, layout=layout,
            tokens=220 if tile[0] == 64 else 40,  # up to 64 columns of an MMA
        )
    )  # fmt: skip
    choice = tiles.flow(problem.layer, *tile)
    outputs = [check(problem, choice) for _ in range(2)]  # with other seeds
    assert launches == 2 * ["route", "flow", "combine"]
    assert torch.equal(*outputs)


def test_block_scales_at_the_lower_end(launches):
    """Zeros of both signs and subnormal numbers."""
    problem = case("nvfp4", tokens=8, intermediate_size=256)
    codes = torch.tensor([0x00, 0x80, *range(1, 16)], dtype=torch.uint8)
    shape = problem.weights.w2_scale.shape
    chosen = codes[torch.randint(len(codes), shape, generator=torch.Generator().manual_seed(0))]
    weights = replace(problem.weights, w2_scale=chosen.view(torch.float8_e4m3fn))
    reference = naive_experts(
        problem.x, weights, problem.topk_weights, problem.topk_ids, STEP, problem.expert_map
    )
    problem = replace(problem, weights=weights, reference=reference)
    check(problem, tiles.flow(problem.layer, 8, 2, 1))
    check(problem, Once(1))


def weights_on_input(name):
    more = NARROW if name == "fp8_block" else {}
    problem = case(name, layout="ep", tokens=30, top_k=1, intermediate_size=256, **more)
    layer = replace(problem.layer, apply_router_weight_on_input=True)
    weighed = (problem.x.float() * problem.topk_weights).bfloat16()
    reference = naive_experts(
        weighed, problem.weights, torch.ones_like(problem.topk_weights), problem.topk_ids, STEP,
        problem.expert_map,
    )  # fmt: skip
    return replace(problem, layer=layer, reference=reference)


def test_flow_with_routing_weights_on_the_input(launches):
    problem = weights_on_input("nvfp4")
    check(problem, tiles.flow(problem.layer, 16, 2, 1))


def test_flow_with_slots_counted_beforehand(launches, monkeypatch):
    monkeypatch.setattr(route, "MANY_SLOTS", 64)
    problem = case("fp8_block", layout="ep", tokens=40, **NARROW)
    check(problem, tiles.flow(problem.layer, 16, 2, 1))
    assert launches == ["count", "route", "flow", "combine"]


@pytest.mark.parametrize("layout", ["unsharded", "ep", "dropped"])
@pytest.mark.parametrize(
    ("blocks", "stages"), [(NARROW, 3), ({"w13_block": (128, 128), "w2_block": (128, 128)}, 4)]
)
def test_pairs(launches, layout, blocks, stages):
    """Up to three tiles an expert; a block of 32 hidden columns is left of 160."""
    problem = case("fp8_block", layout=layout, tokens=330, num_experts=4, **blocks)
    outputs = [check(problem, Pairs(stages)) for _ in range(2)]  # with other seeds
    said, other = (
        difference(outputs[0], expected(problem, (128, group))).rel_l2 for group in (128, 64)
    )
    assert said < other  # hidden columns have a scale for 128
    assert launches == 2 * [*SPREAD, "pairs_fp8", "pairs_fp8", "combine"]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("name", "layout", "sizes", "tokens", "stages", "activation"),
    [
        ("nvfp4", "unsharded", (512, 256), 330, 3, 0),  # up to three tiles an expert
        ("nvfp4", "ep", (256, 512), 90, 2, 1),  # an odd block of output rows
        ("nvfp4", "dropped", (768, 192), 200, 4, 2),  # hidden columns are padded to 256
        ("nvfp4", "unsharded", (256, 320), 40, 3, 3),
        ("bf16", "unsharded", (512, 256), 430, 3, 0),
        ("bf16", "ep", (288, 160), 90, 3, 1),  # last steps and blocks of rows are not full
        ("bf16", "dropped", (768, 320), 200, 2, 2),
        ("bf16", "unsharded", (264, 72), 40, 2, 3),
    ],
)
def test_pairs_of_nvfp4_and_bf16(
    launches, monkeypatch, name, layout, sizes, tokens, stages, activation
):
    monkeypatch.setattr(pairs, "multiprocessors", lambda device: 7)  # three pairs, one left over
    hidden, intermediate = sizes
    problem = build(
        Case(
            name, ACTIVATIONS[activation], hidden_size=hidden, intermediate_size=intermediate,
            layout=layout, tokens=tokens, num_experts=4,
        )
    )  # fmt: skip
    outputs = [check(problem, Pairs(stages)) for _ in range(2)]  # with other seeds
    assert launches == 2 * [*SPREAD, f"pairs_{name}", f"pairs_{name}", "combine"]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["nvfp4", "bf16"])
def test_targets_of_several_items_of_a_block(launches, monkeypatch, name):
    """Two blocks have all of a layer."""
    monkeypatch.setattr(pairs, "multiprocessors", lambda device: 2)
    problem = build(
        Case(
            name, STEP, hidden_size=512, intermediate_size=256, layout="ep", tokens=500,
            num_experts=4,
        )
    )  # fmt: skip
    outputs = [check(problem, tiles.pairs(problem.layer)) for _ in range(2)]  # with other seeds
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "more",
    [
        {"hidden_size": 1280, "intermediate_size": 64, "tokens": 12},  # two parts of a token
        {"top_k": 40, "num_experts": 64, "tokens": 6},  # more slots than lanes
    ],
    ids=["long rows", "many slots"],
)
def test_pairs_of_spread_experts(launches, more):
    check(case("fp8_block", layout="ep", **NARROW | more), Pairs(3))


@pytest.mark.parametrize("name", ["fp8_block", "nvfp4", "bf16"])
def test_pairs_with_routing_weights_on_the_input(launches, name):
    problem = weights_on_input(name)
    choice = tiles.pairs(problem.layer)
    given = problem.x, problem.topk_weights, problem.topk_ids, problem.expert_map
    out = kernel.run(problem.layer, prepare(problem.weights), *given, choice)
    weighed = problem.x.float() * problem.topk_weights
    same = replace(problem, x=weighed, topk_weights=torch.ones_like(problem.topk_weights))
    found = difference(out, expected(same, choice.activation_groups(problem.layer)))
    assert found.within(2e-2), found


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        *(("nvfp4", tokens) for tokens in (1, 16, 33, 57, 65, 72, 112, 121, 128, 129)),
        *(("bf16", tokens) for tokens in (1, 16, 49, 72, 113, 128, 129, 145, 161, 177, 192, 193)),
    ],
)
def test_pairs_with_full_and_nearly_full_mmas(launches, name, tokens):
    """Both experts get all tokens."""
    problem = build(
        Case(
            name, STEP, hidden_size=256, intermediate_size=256, tokens=tokens, num_experts=2,
            top_k=2,
        )
    )  # fmt: skip
    check(problem, tiles.pairs(problem.layer))


def test_flow_of_what_lies_askew(launches):
    """Inputs that are not contiguous, begin between multiples of 16 bytes, or of other dtypes."""
    problem = case("fp8_block", layout="ep", tokens=9, **NARROW)
    shifted = torch.empty(problem.x.numel() + 1, dtype=problem.x.dtype)[1:].view(problem.x.shape)
    shifted.copy_(problem.x)
    weights = problem.topk_weights.repeat_interleave(2, 1)[:, ::2]
    check(
        problem, tiles.flow(problem.layer, 16, 2, 1), x=shifted, topk_weights=weights,
        topk_ids=problem.topk_ids.short(), expert_map=problem.expert_map.long(),
    )  # fmt: skip
    of_all_layers = torch.stack([problem.expert_map.flip(0), problem.expert_map], 1)
    check(problem, tiles.flow(problem.layer, 16, 2, 1), expert_map=of_all_layers[:, 1])


@pytest.mark.parametrize(
    ("name", "more"),
    [("fp8_block", NARROW), ("nvfp4", {"intermediate_size": 256}), ("bf16", {})],
    ids=["fp8_block", "nvfp4", "bf16"],
)
def test_once(launches, name, more):
    check(case(name, layout="ep", tokens=5, **more), Once(1))
    assert launches == ["moe_once"]


def test_once_with_a_wide_layer_on_all_multiprocessors(launches, monkeypatch):
    """Hidden states as wide as GLM's with FP8, where a block has 48 of an H200's output rows."""
    monkeypatch.setattr(once, "multiprocessors", lambda device: 132)
    more = {"hidden_size": 6144, "intermediate_size": 128, "num_experts": 16, "top_k": 4}
    check(case("fp8_block", layout="ep", tokens=5, **more), Once(1))
    assert launches == ["moe_once"]
