"""The native W4A4 kernel around a model of vLLM's grouped GEMM: layout, offsets, padding, answers.

No Blackwell GPU was at hand: the op itself has not run here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nvfp4_integers import integers
from nvfp4_vllm_op import model_op

from moe_backend.formats.nvfp4_activations import ActivationScale
from moe_backend.fused_moe import FusedMoE
from moe_backend.kernels import nvfp4_gemm, registry
from moe_backend.kernels.nvfp4_gemm import grouped_gemm
from moe_backend.kernels.nvfp4_native import Nvfp4NativeKernel, pad_experts
from moe_backend.kernels.nvfp4_rows import quantize_rows
from moe_backend.layout.routing import plan_routing
from moe_backend.verify.metrics import difference
from moe_backend.verify.problems import ACTIVATIONS, Case, build
from moe_backend.verify.w4a4 import CASE, quantised_problem, w4a4_cases

KERNEL = Nvfp4NativeKernel(model_op)


# --- The adapter ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_adapter_is_exact_on_integers(seed):
    *arguments, expected = integers(seed, k=(64, 128, 192)[seed % 3], n=(128, 256)[seed % 2])
    out = grouped_gemm(*arguments, model_op)
    kept = int(arguments[0].scales.offsets.tensor[-1])
    assert torch.equal(out[:kept], expected[:kept].bfloat16())


def with_offsets(change):
    """The op, given other offsets than the adapter's."""

    def op(out, a, b, sa, sb, alphas, sizes, starts, sf_starts):
        model_op(out, a, b, sa, sb, alphas, sizes, *change(starts, sf_starts, sizes))

    return op


WRONG = {
    "END offsets for START": lambda s, f, sizes: (s + sizes[:, 0], f),
    "END scale offsets": lambda s, f, sizes: (s, f + (sizes[:, 0] + 127) // 128 * 128),
    "unpadded scale offsets": lambda s, f, sizes: (s, s // 128 * 128),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_offsets_show(name):
    """Several experts with tokens: a convention mixed up does not pass."""
    caught = 0
    for seed in range(40):
        *arguments, expected = integers(seed)
        counts = arguments[0].scales.offsets.counts()
        if int((counts > 0).sum()) < 2:
            continue
        offsets = WRONG[name]
        kept = int(counts.sum())
        try:
            out = grouped_gemm(*arguments, with_offsets(offsets))
        except (RuntimeError, IndexError, AssertionError):
            caught += 1
            continue
        assert not torch.equal(out[:kept], expected[:kept].bfloat16())
        caught += 1
    assert caught > 5


@pytest.mark.parametrize(("k", "n"), [(80, 128), (64, 160), (32, 64)])
def test_sizes_that_the_op_would_misread_are_refused(k, n):
    """The op leaves padding out of its addresses; seen failing below."""
    *arguments, _ = integers(3, k, n)
    with pytest.raises(ValueError, match=rf"weight \[{n}, {k}\] found; rows must be a multiple"):
        grouped_gemm(*arguments, model_op)


def test_without_the_refusal_the_answer_is_wrong(monkeypatch):
    monkeypatch.setattr(nvfp4_gemm, "K_MULTIPLE", 16)
    monkeypatch.setattr(nvfp4_gemm, "N_MULTIPLE", 16)
    *arguments, expected = integers(3, k=128, n=160)
    kept = int(arguments[0].scales.offsets.tensor[-1])
    assert int((arguments[0].scales.offsets.counts() > 0).sum()) > 1
    try:
        out = grouped_gemm(*arguments, model_op)
    except (AssertionError, RuntimeError):
        return
    assert not torch.equal(out[:kept], expected[:kept].bfloat16())


# --- The kernel -----------------------------------------------------------------------------------

CASES = [
    CASE,  # 176 and 160: padded to 256 and 192
    *(replace(CASE, activation=a, hidden_size=128, intermediate_size=64) for a in ACTIVATIONS),
    replace(CASE, layout="ep"),
    replace(CASE, layout="dropped", tokens=200, num_experts=4),
    replace(CASE, tokens=1),
]


def run(p, kernel=KERNEL):
    return kernel.apply(
        p.layer, kernel.prepare(p.weights), p.x, p.topk_weights, p.topk_ids, p.expert_map
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_kernel_computes_the_quantised_experts(case):
    """The bf16 output of the first GEMM rounds some activations to a neighbouring code."""
    p = quantised_problem(case)
    assert difference(run(p), p.reference).within(0.05, norm=0.01)


def test_kernel_without_tokens():
    p = quantised_problem(replace(CASE, layout="ep"))
    empty = replace(p, x=p.x[:0], topk_ids=p.topk_ids[:0], topk_weights=p.topk_weights[:0])
    assert run(empty).shape == (0, 176)
    elsewhere = replace(p, topk_ids=torch.full_like(p.topk_ids, -1))
    assert not run(elsewhere).any()


def test_nan_of_a_token_stays_with_it():
    p = quantised_problem()
    x = p.x.clone()
    x[3] = torch.nan
    out = run(replace(p, x=x))
    assert out[3].isnan().all()
    others = torch.arange(len(x)) != 3
    assert torch.equal(out[others], run(p)[others])


def test_padding_keeps_every_value():
    w = build(Case("nvfp4", ACTIVATIONS[0], hidden_size=176, intermediate_size=160)).weights
    padded = pad_experts(w)
    assert (padded.hidden_size, padded.intermediate_size) == (256, 192)
    padded.validate()
    for e in range(w.num_experts):
        (w13, w2), (p13, p2) = w.expert(e, torch.float32), padded.expert(e, torch.float32)
        assert torch.equal(p13.view(2, 192, 256)[:, :160, :176].reshape(320, 176), w13)
        assert torch.equal(p2[:176, :160], w2)
        assert p13.count_nonzero() == w13.count_nonzero()
        assert p2.count_nonzero() == w2.count_nonzero()
    whole = build(Case("nvfp4", ACTIVATIONS[0])).weights
    same = pad_experts(whole)
    assert (same.w13.data_ptr(), same.w2.data_ptr()) == (whole.w13.data_ptr(), whole.w2.data_ptr())
    turned = replace(whole, w2=whole.w2.transpose(1, 2).contiguous().transpose(1, 2))
    assert pad_experts(turned).w2.is_contiguous()
    assert torch.equal(pad_experts(turned).w2, whole.w2)


def test_nothing_is_read_back():
    """The whole layer on tensors without data; the op too."""
    p = quantised_problem()
    tensors = [t.to("meta") for t in KERNEL.prepare(p.weights)]
    out = Nvfp4NativeKernel(lambda *arguments: None).apply(
        p.layer, tensors, p.x.to("meta"), p.topk_weights.to("meta"), p.topk_ids.to("meta"), None
    )
    assert out.shape == p.x.shape


def test_rows_on_a_cpu_are_the_plain_operations():
    p = quantised_problem()
    plan = plan_routing(p.topk_ids, p.weights.num_experts)
    rows = quantize_rows(p.x, plan, 2, ActivationScale(per_token=True))
    assert rows.factor(torch.tensor(2.0)).shape == (p.topk_ids.numel(), 1)


# --- When it runs ---------------------------------------------------------------------------------


def test_it_is_never_chosen_by_itself():
    layer = build(Case("nvfp4", ACTIVATIONS[0])).layer
    assert registry.select(layer).kernel.name == "reference"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "bf16"}, "it takes NVFP4 weights, not bf16"),
        ({"dtype": "float16"}, "it takes bf16 activations"),
        ({"apply_router_weight_on_input": True}, "routing weights on the input"),
        ({}, "Blackwell GPUs only"),
    ],
)
def test_refusals(change, reason):
    layer = replace(build(Case("nvfp4", ACTIVATIONS[0])).layer, **change)
    assert reason in Nvfp4NativeKernel().refusal(layer)


def test_weight_only_checkpoints_are_refused():
    p = quantised_problem()
    weights = replace(p.weights, w13_input_scale=None, w2_input_scale=None)
    with pytest.raises(ValueError, match=r"weight-only \(W4A16\). Use another kernel"):
        KERNEL.prepare(weights)


@pytest.fixture
def only(monkeypatch):
    """Make one kernel the only one, for the registry, the op and `verify`."""
    from moe_backend import fused_moe
    from moe_backend.verify import run as verify

    def install(kernel):
        for module in (registry, verify):
            monkeypatch.setattr(module, "kernels", lambda: [kernel])
        fused_moe._decode_plan.cache_clear()
        return verify

    yield install
    fused_moe._decode_plan.cache_clear()


def test_through_the_layer(only):
    """Chosen by name, prepared once, called as one op."""
    only(KERNEL)
    p = quantised_problem()
    fused = FusedMoE(p.layer, p.weights, kernel="nvfp4_native")
    out = fused(p.x, p.topk_weights, p.topk_ids)
    assert "activations=nvfp4" in fused.describe()
    assert difference(out, p.reference).within(0.05)


def test_verify_runs_it_on_problems_of_its_own(only):
    results = list(only(KERNEL).run_cases(quick=True))
    assert len(results) == len(w4a4_cases())
    assert all(r.ok for r in results)


def test_verify_flags_a_wrong_one(only, monkeypatch):
    verify = only(Nvfp4NativeKernel(with_offsets(WRONG["unpadded scale offsets"])))
    monkeypatch.setattr(verify, "w4a4_cases", lambda: [replace(CASE, layout="ep")])
    (result,) = verify.run_cases(quick=True)
    assert not result.ok
