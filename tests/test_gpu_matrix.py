"""The kernels on a GPU after a warm-up: formats, activations, layouts, token counts, graphs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from gpu_problems import TOKENS, large, routed, run, small, wrong

from moe_backend.activation import Activation
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels.registry import kernel_named
from moe_backend.kernels.variants import candidates, variants_missing
from moe_backend.verify import controls as verify_controls
from moe_backend.verify.controls import controls
from moe_backend.verify.metrics import difference
from moe_backend.verify.problems import ACTIVATIONS, Case, build
from moe_backend.verify.run import passes, run_controls

STEP = Activation.from_name("swiglustep")
FORMATS = ("bf16", "fp8_block", "nvfp4")
LAYOUTS = ("unsharded", "ep", "dropped")
# vLLM's own list (config/vllm.py, cudagraph_capture_sizes), largest first as it captures them.
CAPTURE_SIZES = sorted([1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)], reverse=True)
MOST = max(TOKENS)


@pytest.fixture(params=["hopper", "triton"])
def kernel(request):
    layer = small(Case("bf16", STEP)).layer
    if (refusal := kernel_named(request.param).refusal(layer)) is not None:
        pytest.skip(refusal)
    return request.param


def experts(layout):
    """Eight on this rank in each layout, so that they share compiled kernels."""
    return {"layout": layout, "num_experts": 16 if layout == "ep" else 8}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_matrix(name, activation, kernel):
    """Every layout with every token count; nothing is compiled after the warm-up."""
    faults = []
    for layout in LAYOUTS:
        case = Case(name, activation, hidden_size=256, intermediate_size=256, **experts(layout))
        problem = small(case)
        fused = FusedMoE(problem.layer, problem.weights, kernel=kernel)
        fused.warm_up(MOST)
        for tokens in TOKENS if kernel == "hopper" else TOKENS[::3]:
            p = routed(problem, tokens)
            missing = variants_missing(partial(run, fused, p))
            faults += [f"T{tokens} compiles {v[1]} after the warm-up" for v in missing]
            if (fault := wrong(fused, p)) is not None:
                faults.append(fault)
    assert faults == []


# Of few tokens, single hidden columns that round to the next FP8 value weigh more: on an H200 every
# method that quantises is up to 3.6e-2 from the reference, and all by the same amount.
FEW, REL_L2_FEW = 16, 5e-2


REAL = (
    Case("fp8_block", STEP, hidden_size=4096, intermediate_size=1280),
    Case("fp8_block", STEP, hidden_size=4096, intermediate_size=160, w13_block=(32, 128),
         w2_block=(128, 32)),
    Case("fp8_block", STEP, hidden_size=4096, intermediate_size=320, w13_block=(64, 128),
         w2_block=(128, 64)),
    Case("nvfp4", ACTIVATIONS[2], hidden_size=4096, intermediate_size=2048),
    Case("bf16", ACTIVATIONS[3], hidden_size=6144, intermediate_size=3072),
)  # fmt: skip


@pytest.mark.parametrize("case", REAL, ids=lambda c: c.name)
def test_real_sizes(case, kernel):
    """Layers of Step-3.5 (EP, TP8, TP4), DeepSeek-V4-Flash, MiniMax-M3; fewer experts."""
    problem = large(replace(case, num_experts=32, top_k=8, layout="ep"))
    fused = FusedMoE(problem.layer, problem.weights, kernel=kernel)
    fused.warm_up(MOST)
    counts = (1, 8, 64, 304, 1000, 4096, 8209) if kernel == "hopper" else (1, 304, 4096)
    assert [w for t in counts if (w := wrong(fused, routed(problem, t))) is not None] == []


@pytest.mark.parametrize("name", FORMATS)
def test_each_method_is_bit_identical_when_repeated(name):
    """At the first token count of each choice that the table makes."""
    hopper = pytest.importorskip("moe_backend.kernels.hopper.tiles")
    problem = small(Case(name, STEP, hidden_size=256, intermediate_size=256))
    if (refusal := kernel_named("hopper").refusal(problem.layer)) is not None:
        pytest.skip(refusal)
    first: dict[object, int] = {}
    for tokens in range(1, MOST + 1):
        first.setdefault(hopper.choose(problem.layer, tokens), tokens)
    fused = FusedMoE(problem.layer, problem.weights, kernel="hopper")
    assert len(first) > 1
    for choice, tokens in first.items():
        p = routed(problem, tokens)
        out = run(fused, p)
        assert all(torch.equal(run(fused, p), out) for _ in range(10)), choice


@pytest.mark.parametrize("name", FORMATS)
def test_every_capture_size(name, kernel):
    """All of vLLM's sizes captured after the warm-up, then replayed with other inputs.

    A host read or an allocation outside of the graph's pool fails the capture by itself.
    """
    from triton import knobs

    problem = small(
        Case(name, STEP, "ep", num_experts=64, top_k=8, hidden_size=256, intermediate_size=256)
    )
    fused = FusedMoE(problem.layer, problem.weights, kernel=kernel)
    fused.warm_up(CAPTURE_SIZES[0])
    held = routed(problem, CAPTURE_SIZES[0])
    given = held.x, held.topk_weights, held.topk_ids
    out = torch.empty_like(held.x)
    compiled: list[str] = []

    def note(**found):
        compiled.append(found["repr"])

    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    knobs.runtime.jit_cache_hook = note
    try:
        for size in CAPTURE_SIZES:
            graphs[size] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[size], pool=pool):
                out[:size].copy_(fused(*(t[:size] for t in given), held.expert_map))
    finally:
        knobs.runtime.jit_cache_hook = None
    assert compiled == []
    for size in CAPTURE_SIZES:
        p = routed(problem, size, seed=1)
        for buffer, value in zip(given, (p.x, p.topk_weights, p.topk_ids), strict=True):
            buffer[:size].copy_(value)
        graphs[size].replay()
        assert torch.equal(out[:size], run(fused, p)), size
        if size in (1, 8, 64, 256, 512):
            assert wrong(fused, p, out[:size]) is None


def test_a_second_warm_up_of_the_process_finds_nothing(kernel):
    problem = small(Case("fp8_block", STEP, hidden_size=256, intermediate_size=256))
    fused = FusedMoE(problem.layer, problem.weights, kernel=kernel)
    fused.warm_up(300)
    assert fused.warm_up(300) is None
    counts = candidates(problem.layer, 300, lambda tokens: 0)
    given = {t: routed(problem, t) for t in counts[::7]}
    assert not any(variants_missing(partial(run, fused, p)) for p in given.values())


def test_every_control_is_caught():
    assert [c.name for c in run_controls("cuda") if not c.caught] == []


@pytest.mark.parametrize("control", controls(), ids=lambda c: c.name)
def test_control_is_right_but_for_its_fault(control):
    p = control.make(control.case).to("cuda")
    with torch.device("cuda"):
        assert passes(difference(control.sound(p), p.reference), p.case)


@pytest.mark.parametrize(
    "control", [c for c in controls() if c.make is build], ids=lambda control: control.name
)
def test_fault_of_a_control_is_caught_in_a_kernel(control, kernel, monkeypatch):
    """The kernel is given what the control gives the reference; without the fault it passes."""
    problem = build(control.case).to("cuda")
    through = []

    def experts_of(
        x, weights, topk_weights, topk_ids, activation, expert_map, plan=None, compute_dtype=None
    ):
        if plan is not None:
            pytest.skip("the fault is in a plan of the routing, and the kernel makes its own")
        tensors = {n: t.contiguous() for n, t in vars(weights).items() if torch.is_tensor(t)}
        layer = replace(
            problem.layer, activation=activation, intermediate_size=weights.intermediate_size
        )
        through.append(FusedMoE(layer, replace(weights, **tensors), kernel=kernel))
        return through[-1](x.bfloat16(), topk_weights, topk_ids, expert_map)

    monkeypatch.setattr(verify_controls, "fused_experts", experts_of)
    with torch.device("cuda"):
        sound = control.sound(problem)
        assert wrong(through[0], problem, sound) is None
        refused = pytest.raises(ValueError, match="scales are not finite and positive")
        with refused if "whole-block" in control.name else contextlib.nullcontext():
            assert wrong(through[0], problem, control.run(problem)) is not None
