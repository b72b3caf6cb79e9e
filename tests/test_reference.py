"""The reference kernel beyond the case matrix: size, compile, selection, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from moe_backend import fused_moe
from moe_backend.activation import Activation
from moe_backend.formats import Bf16Weights, Fp8BlockWeights
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels import registry
from moe_backend.kernels.reference import fused_experts
from moe_backend.verify.metrics import difference
from moe_backend.verify.problems import ACTIVATIONS, Case, build

STEP = Activation.from_name("swiglustep")
GIB = 2**30
GRID = (128, 128)


def fused(problem, **kw):
    return FusedMoE(problem.layer, problem.weights, **kw)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, pytest.param(torch.float8_e4m3fn, marks=pytest.mark.long)],
    ids=str,
)
def test_weights_over_4_gib(dtype):
    """The last expert lies beyond 4 GiB in `w13`; only its pages are ever written."""
    hidden, intermediate = 4096, 4096
    size = 2 * intermediate * hidden * dtype.itemsize
    experts = int(4.25 * GIB) // size + 1
    last = experts - 1
    w13 = torch.zeros(experts, 2 * intermediate, hidden, dtype=dtype)
    w2 = torch.zeros(experts, hidden, intermediate, dtype=dtype)
    assert w13[last].data_ptr() - w13.data_ptr() > 4 * GIB
    g = torch.Generator().manual_seed(0)
    small13 = torch.randint(-2, 3, (2 * intermediate, hidden), generator=g).to(dtype)
    small2 = torch.randint(-2, 3, (hidden, intermediate), generator=g).to(dtype)
    w13[last], w2[last] = small13, small2

    def canonical(w13, w2):
        if dtype == torch.bfloat16:
            return Bf16Weights(w13, w2)
        ones = torch.full((w13.shape[0], 2 * intermediate // 128, hidden // 128), 2.0**-6)
        s2 = ones[:, : hidden // 128].clone()
        return Fp8BlockWeights(w13, ones, w2, s2, GRID, GRID)

    x = torch.randn(1, hidden, generator=g)
    weights, ids = torch.ones(1, 1), torch.tensor([[last]])
    out = fused_experts(x, canonical(w13, w2), weights, ids, STEP, compute_dtype=torch.bfloat16)
    alone = fused_experts(
        x,
        canonical(small13[None], small2[None]),
        weights,
        ids * 0,
        STEP,
        compute_dtype=torch.bfloat16,
    )
    assert out.abs().sum() > 0
    assert torch.equal(out, alone)


def test_one_opaque_op_under_compile():
    problem = build(Case("fp8_block", STEP))
    layer = fused(problem)
    compiled = torch.compile(
        lambda x, w, i: layer(x + 0, w, i) * 2, fullgraph=True, backend="aot_eager"
    )
    out = compiled(problem.x, problem.topk_weights, problem.topk_ids)
    assert torch.equal(out, layer(problem.x, problem.topk_weights, problem.topk_ids) * 2)


def test_compiled_code_sees_new_weights():
    """Weights are arguments of the op: an in-place reload reaches compiled code."""
    problem = build(Case("bf16", STEP))
    weights = Bf16Weights(problem.weights.w13.clone(), problem.weights.w2.clone())
    layer = FusedMoE(problem.layer, weights, kernel="reference")
    run = torch.compile(lambda x, w, i: layer(x, w, i), backend="aot_eager")
    before = run(problem.x, problem.topk_weights, problem.topk_ids)
    weights.w2.mul_(2)
    after = run(problem.x, problem.topk_weights, problem.topk_ids)
    assert torch.equal(after, before * 2)


def test_op_is_registered_soundly():
    # bf16: torch's schema check compares arguments with allclose, which has no fp8.
    problem = build(Case("bf16", STEP, layout="ep"))
    layer = fused(problem)
    arguments = (
        problem.x,
        problem.topk_weights,
        problem.topk_ids,
        problem.expert_map,
        layer.tensors,
        layer.plan,
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(fused_moe._fused_experts_op, arguments, test_utils=tests)
    turned = problem.x.T.contiguous().T  # dense, its rows not one after another
    arguments = (turned, *arguments[1:])
    torch.library.opcheck(fused_moe._fused_experts_op, arguments, test_utils=tests)


def test_router_weight_on_input():
    problem = build(Case("bf16", ACTIVATIONS[0], top_k=1, tokens=9))
    layer = replace(problem.layer, apply_router_weight_on_input=True)
    out = FusedMoE(layer, problem.weights, kernel="reference")(
        problem.x, problem.topk_weights, problem.topk_ids
    )
    expected = fused_experts(
        (problem.x.float() * problem.topk_weights).bfloat16().float(),
        problem.weights,
        torch.ones_like(problem.topk_weights),
        problem.topk_ids,
        ACTIVATIONS[0],
    )
    assert difference(out, expected).within(8e-3)


def test_plan_round_trips():
    for activation in ACTIVATIONS:
        layer = build(Case("fp8_block", activation)).layer
        again = registry.LayerConfig.from_dict(json.loads(json.dumps(layer.to_dict())))
        assert again == layer
        assert hash(again) == hash(layer)


def test_selection_says_why():
    layer = build(Case("bf16", STEP)).layer
    selection = registry.select(layer)
    assert selection.kernel.name == "reference"
    assert "not vllm_cpu: " in selection.reason


def test_kernel_can_be_forced(monkeypatch):
    layer = build(Case("bf16", ACTIVATIONS[0])).layer
    monkeypatch.setenv("MOE_BACKEND_KERNEL", "reference")
    assert registry.select(layer).reason == "MOE_BACKEND_KERNEL is set"
    monkeypatch.setenv("MOE_BACKEND_KERNEL", "vllm_cpu")
    with pytest.raises(
        ValueError, match=r"kernel .vllm_cpu. \(MOE_BACKEND_KERNEL is set\) cannot run"
    ):
        registry.select(build(Case("nvfp4", STEP)).layer)
    monkeypatch.setenv("MOE_BACKEND_KERNEL", "nonesuch")
    with pytest.raises(
        ValueError,
        match="'nonesuch' is unknown; accepted: hopper, triton, vllm_cpu, reference, nvfp4_native",
    ):
        registry.select(layer)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_local_experts", 16, "has experts 8, the model's configuration says 16"),
        ("hidden_size", 256, "has hidden size 128"),
        ("intermediate_size", 96, "has intermediate size 192"),
    ],
)
def test_sizes_must_match_the_configuration(field, value, message):
    problem = build(Case("bf16", STEP))
    layer = replace(problem.layer, **{field: value})
    with pytest.raises(ValueError, match=rf"model\.layers\.7\.w13_weight {message}"):
        FusedMoE(layer, problem.weights, where="model.layers.7.")


def test_bf16_weights_must_have_the_dtype_of_activations():
    problem = build(Case("bf16", STEP))
    weights = Bf16Weights(problem.weights.w13.half(), problem.weights.w2.half())
    with pytest.raises(ValueError, match=r"^layer\.w13_weight is torch\.float16, activations are"):
        FusedMoE(problem.layer, weights, where="layer.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.Tensor.half}, "x is torch.float16 x 40 x 128, the layer was prepared for"),
        ({"x": lambda x: x[:, :64]}, "x is torch.bfloat16 x 40 x 64"),
        ({"topk_ids": lambda ids: ids[:, :1]}, "topk_ids is 40 x 1, the layer .* for 40 x 2"),
        ({"topk_weights": lambda w: w[:5]}, "topk_weights is 5 x 2"),
    ],
)
def test_a_call_must_be_what_the_layer_was_prepared_for(change, message):
    problem = build(Case("bf16", STEP, tokens=40))
    given = {name: getattr(problem, name) for name in ("x", "topk_weights", "topk_ids")}
    given |= {name: of(given[name]) for name, of in change.items()}
    with pytest.raises(ValueError, match=message):
        fused(problem)(**given)


def test_errors_of_selection_name_the_layer():
    problem = build(Case("nvfp4", STEP))
    with pytest.raises(ValueError, match=r"^model\.layers\.7: kernel 'vllm_cpu' \(requested\)"):
        FusedMoE(problem.layer, problem.weights, kernel="vllm_cpu", where="model.layers.7.")


@pytest.mark.parametrize("name", ["bf16", "fp8_block", "nvfp4"])
def test_fp16_activations(name):
    """NVFP4 codes times block scales, without the global scale, overflow fp16."""
    problem = build(Case(name, STEP, hidden_size=1024))
    layer = replace(problem.layer, dtype="float16")
    weights = problem.weights
    if isinstance(weights, Bf16Weights):
        weights = Bf16Weights(weights.w13.half(), weights.w2.half())
    out = FusedMoE(layer, weights, kernel="reference")(
        problem.x.half(), problem.topk_weights, problem.topk_ids
    )
    assert out.dtype == torch.float16
    assert difference(out, problem.reference).within(2e-3)


def test_vllm_cpu_kernel_drops_negative_ids():
    """The op itself writes out of bounds for an id of -1."""
    pytest.importorskip("vllm")
    from moe_backend.engines.vllm import load_kernels

    load_kernels()
    problem = build(Case("bf16", ACTIVATIONS[0], layout="dropped"))
    assert (problem.topk_ids < 0).any()
    layer = fused(problem, kernel="vllm_cpu")
    out = layer(problem.x, problem.topk_weights, problem.topk_ids)
    assert difference(out, problem.reference).within(8e-3)
