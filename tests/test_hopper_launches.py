"""The launches of each Hopper method, in order, recorded without a GPU.

All but the first overlap the launch before them and wait for it on the device. The first reads what
other kernels have just written (hidden states, routing), so it must not overlap them: it does not
wait, and would read what is still to come. Kernels in CUDA C++ wait wherever they are, and overlap.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from moe_backend.kernels.cuda import launch
from moe_backend.kernels.hopper import few, flow, kernel, once, pairs, tiled, tiles
from moe_backend.kernels.hopper.tiles import Once
from moe_backend.verify.problems import ACTIVATIONS, Case, build

TILED = ["route_kernel", "gate_up_kernel", "down_kernel", "sum_kernel"]
FLOW = ["route", "flow", "combine"]
SPREAD = ["count", "sort", "spread"]
PAIRS_FP8, PAIRS_NVFP4, PAIRS_BF16 = (
    [*SPREAD, gemm, gemm, "combine"] for gemm in ("pairs_fp8", "pairs_nvfp4", "pairs_bf16")
)
CUDA = ("moe_once", *FLOW, *PAIRS_FP8)


@pytest.fixture
def launches(monkeypatch):
    found = []

    def record(self, *args, grid, warmup, **kwargs):
        found.append((self.fn.__name__, bool(kwargs.get("launch_pdl"))))

    monkeypatch.setattr(JITFunction, "run", record)
    for module in (few, flow, once, pairs, tiled):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
    with launch.instead_of_launching(lambda kernel: found.append((kernel.name, True))):
        yield found


@pytest.mark.parametrize("layout", ["unsharded", "ep"])
@pytest.mark.parametrize(
    ("name", "choice", "names"),
    [
        ("fp8_block", lambda layer: tiles.few(layer, 7), ["gate_up_kernel", "down_kernel"]),
        ("fp8_block", lambda layer: tiles.tiles(layer, 7), TILED),
        ("fp8_block", tiles.pairs, PAIRS_FP8),
        ("nvfp4", tiles.pairs, PAIRS_NVFP4),
        ("bf16", tiles.pairs, PAIRS_BF16),
        ("fp8_block", lambda layer: Once(1), ["moe_once"]),
        ("fp8_block", lambda layer: tiles.flow(layer, 8, 2, 2), FLOW),
        ("nvfp4", lambda layer: tiles.flow(layer, 8, 2, 2), FLOW),
        ("nvfp4", lambda layer: tiles.few(layer, 7), ["gate_up_kernel", "down_kernel"]),
        ("nvfp4", lambda layer: tiles.tiles(layer, 7), TILED),
        ("bf16", lambda layer: tiles.tiles(layer, 7), TILED),
    ],
    ids=[
        "fp8-few",
        "fp8-tiles",
        "fp8-pairs",
        "nvfp4-pairs",
        "bf16-pairs",
        "fp8-once",
        "fp8-flow",
        "nvfp4-flow",
        "nvfp4-few",
        "nvfp4-tiles",
        "bf16-tiles",
    ],
)
def test_only_the_first_waits_for_what_came_before(launches, layout, name, choice, names):
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    problem = build(Case(name, ACTIVATIONS[0], layout=layout, **sizes))
    layer = replace(problem.layer, device="cuda")
    prepared = kernel.HopperKernel().prepare(problem.weights)
    kernel.run(
        layer, prepared, problem.x, problem.topk_weights, problem.topk_ids,
        problem.expert_map, choice(layer),
    )  # fmt: skip
    assert launches == [(n, number > 0 or n in CUDA) for number, n in enumerate(names)]
