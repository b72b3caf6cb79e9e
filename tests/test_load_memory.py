"""Memory while a model is loaded: the checkpoint's bytes and one layer more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from allocations import Allocations

from moe_backend.activation import Activation
from moe_backend.verify.problems import Case, build, encode

LAYERS = 3
STEP = Activation.from_name("swiglustep")
# Many experts, so that what is converted one expert at a time stays small beside a layer.
SIZES = {"num_experts": 32, "hidden_size": 256, "intermediate_size": 256, "tokens": 1}


def parameters(layer):
    return [p.data for p in layer.experts.parameters()]


def size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize(
    ("dialect", "path"),
    [
        ("bf16", "packed"),
        ("fp8_block", "packed"),
        ("nvfp4_modelopt", "packed"),
        ("nvfp4_ct", "packed"),
        ("nvfp4_modelopt", "folded"),
        ("nvfp4_ct", "folded"),
        ("nvfp4_modelopt", "unpacked"),
        ("nvfp4_modelopt", "ordered"),
        ("nvfp4_ct", "ordered"),
    ],
)
@pytest.mark.usefixtures("vllm_world")
def test_preparing_a_model_takes_one_layer_more(dialect, path, monkeypatch, request):
    """All layers loaded, then prepared one after another, as vLLM does."""
    pytest.importorskip("vllm")
    from vllm_layers import format_of, make_layer

    if path == "ordered":  # packed, in the order of Hopper's kernels
        request.getfixturevalue("hopper")
        monkeypatch.setattr("moe_backend.kernels.hopper.codes.WORDS_AT_A_TIME", 2**14)
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "packed" if path == "ordered" else path)
    problem = build(Case(format_of(dialect), STEP, **SIZES))
    layers = [make_layer(problem, dialect) for _ in range(LAYERS)]
    for layer in layers:
        layer.load(problem.weights, dialect)
    for layer in layers:
        before = size(parameters(layer))
        with Allocations() as counted:
            for each in layers:
                counted.know(*parameters(each))
            start = counted.now()
            layer.finish()
            kept = counted.now()
        after = size(layer.experts.quant_method.moe_kernel.fused_experts.read_tensors())
        assert kept - start <= after - before + 0.01 * after  # the old form is gone
        # Converted one matrix at a time, in fp32; validated a few experts at a time.
        matrix = 4 * SIZES["hidden_size"] * SIZES["intermediate_size"]
        assert counted.peak - start <= (0.5 * after if path == "packed" else after + 16 * matrix)


def test_counting_sees_a_copy_and_its_end():
    x = torch.zeros(1000)
    with Allocations() as counted:
        counted.know(x)
        y = x + 1
        assert counted.now() == counted.peak == 8000
        del y
        view = x[:10]
        assert counted.now() == 4000
    assert counted.peak == 8000
    assert len(view) == 10


def test_prepare_copies_nothing_that_is_contiguous():
    """But for NVFP4 codes and block scales, which Hopper's kernels want in an order of theirs."""
    from moe_backend.kernels.registry import kernels

    for name in ("bf16", "fp8_block", "nvfp4"):
        weights = build(Case(name, STEP)).weights
        for kernel in kernels():
            if kernel.name not in ("hopper", "triton", "reference"):
                continue
            changed = (0, 1, 3, 4) if (kernel.name, name) == ("hopper", "nvfp4") else ()
            pairs = zip(weights.tensors(), kernel.prepare(weights), strict=True)
            for number, (given, kept) in enumerate(pairs):
                same = kept is None or kept.data_ptr() == given.data_ptr()
                assert same == (number not in changed)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "path"),
    [("bf16", None), ("fp8_block", None), ("nvfp4", "packed"), ("nvfp4", "folded")],
)
def test_on_a_gpu(name, path):
    """Eight layers of DeepSeek-V4-Flash's expert size; each converted form replaces the old."""
    from moe_backend.fused_moe import FusedMoE
    from moe_backend.nvfp4_paths import Nvfp4Path, PathChoice, prepare

    case = Case(name, STEP, num_experts=16)
    template = build(replace(case, tokens=1)).layer
    layer = replace(template, device="cuda", hidden_size=4096, intermediate_size=2048)
    small = build(Case(name, STEP)).to("cuda")
    FusedMoE(small.layer, small.weights)  # what a GPU has once: the counters of `Once`, 3 MiB
    del small
    others = torch.cuda.memory_allocated()  # those, and tests before this one
    w13 = torch.randn(16, 4096, 4096, device="cuda") / 32
    w2 = torch.randn(16, 4096, 2048, device="cuda") / 32
    with torch.device("cuda"):
        first = encode(name, w13, w2)
    del w13, w2

    def copy(weights):
        fields = {n: t.clone() for n, t in vars(weights).items() if isinstance(t, torch.Tensor)}
        return replace(weights, **fields)

    loaded = [copy(first) for _ in range(8)]
    del first
    torch.cuda.empty_cache()
    checkpoint = torch.cuda.memory_allocated() - others
    served = []
    growth = worst = 0
    while loaded:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        weights, config = loaded.pop(), layer
        if path is not None:
            ready = prepare(config, weights, PathChoice(Nvfp4Path(path), "test"))
            config, weights = ready.layer, ready.weights
            del ready
        fused = FusedMoE(config, weights)
        served.append(fused)
        kept = size(fused.tensors)
        worst = max(worst, torch.cuda.max_memory_allocated() - start - kept)
        del weights, fused
        growth = torch.cuda.memory_allocated() - others - checkpoint
    print(
        f"{name} {path or ''}: checkpoint {checkpoint / 2**20:.0f} MiB, kept layer "
        f"{kept / 2**20:.0f}, growth {growth / 2**20:.0f}, peak over one layer {worst / 2**20:.0f}"
    )
    # Beside a whole layer in its final form: folding works on one expert at a time, in fp32.
    matrices = 3 * 4 * 4096 * 4096 if path == "folded" else 0
    assert worst <= 0.1 * kept + matrices
    assert growth <= 8 * kept - checkpoint + 2**20
