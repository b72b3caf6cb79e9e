"""The Triton device code on the CPU, in Triton's interpreter.

fp16 operands: the interpreter truncates in-kernel casts to bf16. What bf16 and real hardware do is
`test_gpu.py`'s business.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CODE = """
import json
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
from moe_backend.formats import Bf16Weights
from moe_backend.kernels.hopper import tiled
from moe_backend.kernels.hopper.kernel import HopperKernel, shape_refusal
from moe_backend.kernels.hopper.tiles import Tile, Tiles
from moe_backend.kernels.triton import kernel as triton
from moe_backend.verify.metrics import difference
from moe_backend.verify.problems import build, cases
from moe_backend.verify.run import expected

unwritten = torch.empty


def poisoned(*shape, **options):
    made = unwritten(*shape, **options)
    return made.fill_(float("nan")) if made.is_floating_point() else made


torch.empty = poisoned  # columns that pad the hidden ones are read
results = {}
for number, case in enumerate(cases()):
    if case.tokens > 10 or case.hidden_size > 256 or number // 2 % 2 != int(sys.argv[1]):
        continue
    # Of each format every activation, layout and size, but not all of their combinations.
    odd = case.integer or not case.tokens or (case.w13_block, case.w2_block) != ((128, 128),) * 2
    if sys.argv[2] == "some" and number % 8 not in (0, 3) and not odd:
        continue
    p = build(case)
    weights = p.weights
    if isinstance(weights, Bf16Weights):
        weights = Bf16Weights(weights.w13.half(), weights.w2.half())
    layer = replace(p.layer, dtype="float16")
    # Ids beyond the last expert are dropped as -1 is.
    ids = torch.where(p.topk_ids < 0, case.num_experts + number % 2, p.topk_ids)
    args = weights.tensors(), p.x.half(), p.topk_weights, ids, p.expert_map
    reference = p.reference.half() if case.integer else p.reference

    # Two slices of five tokens where there are that many.
    triton.PARTIAL_ELEMENTS = 5 * case.top_k * case.hidden_size
    found = difference(triton.TritonKernel().apply(layer, *args), reference)
    ok = found.equal if case.integer else found.within(1e-3)
    results["triton " + case.name] = [found.rel_l2, ok]

    if shape_refusal(p.layer) is not None:
        continue
    fp8 = case.format == "fp8_block"
    k = 256 if case.format == "nvfp4" else 64
    k13, k2 = (min(128, case.w13_block[1]), min(32, case.w2_block[1])) if fp8 else (k, k)
    split = case.format != "nvfp4" and number % 2 == 0 and case.w13_block[0] % 64 == 0
    n = 64 if split else 32
    tiles = Tiles(Tile(16, n, k13, 4, 3, 1, split), Tile(16, 64, k2, 4, 3, 1))
    out = tiled.run(layer, HopperKernel().prepare(weights), *args[1:], tiles, on_gpu=False)
    if fp8:
        # The interpreter truncates casts to fp8, so this shows wrong indexing only.
        found = difference(out, expected(p, (128, n)))
        ok = found.finite and found.rel_l2 < 0.25
    else:
        found = difference(out, reference)
        ok = found.equal if case.integer else found.within(1e-3)
    results["hopper " + case.name] = [found.rel_l2, ok]
print(json.dumps(results))
"""

FEW = """
import json
import sys
from dataclasses import replace
import torch
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # what torch.empty returns is NaN
from moe_backend.formats import Bf16Weights
from moe_backend.kernels.hopper import few
from moe_backend.kernels.hopper.codes import rearranged, rearranged_scales
from moe_backend.kernels.hopper.kernel import HopperKernel, shape_refusal
from moe_backend.kernels.hopper.tiles import Few, Part
from moe_backend.kernels.reference import ReferenceKernel
from moe_backend.verify.metrics import difference
from moe_backend.verify.problems import ACTIVATIONS, Case, build, cases

results = {}
for number, case in enumerate(cases()):
    if number % 4 or number // 4 % 2 != int(sys.argv[1]):
        continue  # a part of them: two minutes otherwise
    p = build(case)
    if case.tokens > 10 or shape_refusal(p.layer) is not None:
        continue
    weights = p.weights
    if isinstance(weights, Bf16Weights):
        weights = Bf16Weights(weights.w13.half(), weights.w2.half())
    tensors = [t if t is None else t.clone() for t in weights.tensors()]
    local = p.topk_ids if p.expert_map is None else p.expert_map[p.topk_ids.long()]
    hit = local[(p.topk_ids >= 0) & (local >= 0)]
    for expert in set(range(case.num_experts)) - set(hit.tolist()):
        for t in tensors:
            if t is not None and t.is_floating_point() and expert < len(t):
                t[expert] = float("nan")
    # Ids beyond the last expert are dropped as -1 is.
    ids = torch.where(p.topk_ids < 0, case.num_experts, p.topk_ids)
    args = tensors, p.x.half(), p.topk_weights, ids, p.expert_map
    layer = replace(p.layer, dtype="float16")
    kind = number // 4 % 3
    deal = Few(
        Part((4, 2, 16)[kind], 1 + number % 2, (16, 8, 32)[kind]),
        Part((2, 4, 8)[kind], (3, 1, 4)[kind], (8, 16, 32)[kind]),
        2,
        1 + number % 2,
    )
    if case.format == "nvfp4":
        tensors[0], tensors[3] = rearranged(tensors[0]), rearranged(tensors[3])
        tensors[1] = rearranged_scales(tensors[1], gate_up=True)
        tensors[4] = rearranged_scales(tensors[4], gate_up=False)
    out = few.run(layer, tensors, *args[1:], deal, on_gpu=False)
    found = difference(out, p.reference.half() if case.integer else p.reference)
    results[case.name] = [found.rel_l2, found.equal if case.integer else found.within(1e-3)]
    if case.top_k == 2 and case.tokens == 7 and kind == 0 and case.layout == "unsharded":
        layer = replace(layer, top_k=1, apply_router_weight_on_input=True)
        first = p.topk_weights[:, :1], p.topk_ids[:, :1]
        out = few.run(
            layer, HopperKernel().prepare(weights), p.x.half(), *first, None, deal, on_gpu=False
        )
        layer = replace(layer, dtype="float32")
        expected = ReferenceKernel().apply(layer, weights.tensors(), p.x.float(), *first, None)
        found = difference(out, expected)
        results["on input " + case.name] = [found.rel_l2, found.within(1e-3)]
# As many rows as on a GPU: with two, rows eight apart are taken together.
for groups in (2, 8):
    case = Case("nvfp4", ACTIVATIONS[1], hidden_size=32, intermediate_size=32, tokens=1)
    p = build(case)
    deal = Few(Part(4, 1, 4), Part(32 // groups, 1, 1), 2, 2)
    assert deal.down.groups == groups
    layer = replace(p.layer, dtype="float16")
    args = p.x.half(), p.topk_weights, p.topk_ids, p.expert_map
    out = few.run(layer, HopperKernel().prepare(p.weights), *args, deal, on_gpu=False)
    found = difference(out, p.reference)
    results[f"{groups} rows"] = [found.rel_l2, found.within(1e-3)]
print(json.dumps(results))
"""


def interpreted(*commands, seconds=280):
    """What the commands print at last, all run at once with TRITON_INTERPRET set.

    Processes of their own: the variable is read when the kernels are defined.
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )
        for command in commands
    ]
    try:
        ended = [process.communicate(timeout=seconds) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, said) in zip(started, ended, strict=True):
        assert process.returncode == 0, said[-3000:]
    return [out.splitlines()[-1] for out, _ in ended]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "fewest"), [("some", 50), pytest.param("all", 120, marks=pytest.mark.long)]
)
def test_device_code_in_the_interpreter(share, fewest):
    halves = interpreted(("-c", CODE, "0", share), ("-c", CODE, "1", share), seconds=500)
    results = {name: found for half in halves for name, found in json.loads(half).items()}
    assert len(results) > fewest
    assert {name: r for name, (r, ok) in results.items() if not ok} == {}


@pytest.mark.slow
def test_few_tokens_in_the_interpreter():
    """Experts that no token hits hold NaN, and so does what is not written."""
    halves = interpreted(("-c", FEW, "0"), ("-c", FEW, "1"))
    results = {name: found for half in halves for name, found in json.loads(half).items()}
    assert len(results) > 15
    assert {name: r for name, (r, ok) in results.items() if not ok} == {}


@pytest.mark.slow
def test_fused_quantisation_over_random_routings():
    """Gather, quantisation and scatter in one kernel, 240 routings, poisoned buffers."""
    script = str(Path(__file__).with_name("nvfp4_triton.py"))
    assert interpreted((script, "120"), (script, "120", "120")) == ["120", "120"]


@pytest.mark.slow
def test_grouped_nvfp4_gemm_on_integers():
    """Addresses of rows, codes and blocked scales; scaled dots are not interpreted."""
    script = str(Path(__file__).with_name("nvfp4_triton_gemm.py"))
    assert interpreted((script, "12"), (script, "12", "12")) == ["12", "12"]
