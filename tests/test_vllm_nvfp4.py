"""NVFP4 through vLLM's layer: activation scales, weight-only configurations, the folded path."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("vllm_world")

from vllm_layers import (
    NVFP4_DIALECTS,
    checkpoint_tensors,
    make_layer,
    quant_config,
    reload,
    reloadable,
    swap_experts,
)

from moe_backend.formats.folding import fold
from moe_backend.verify.metrics import difference
from moe_backend.verify.naive import naive_experts
from moe_backend.verify.problems import ACTIVATIONS, Case, build
from moe_backend.verify.run import REL_L2

CASE = Case("nvfp4", ACTIVATIONS[1], intermediate_size=384)


def loaded(problem, dialect, **kw):
    layer = make_layer(problem, dialect, **kw)
    layer.load(problem.weights, dialect)
    layer.finish()
    return layer


def inputs(problem):
    return problem.x, problem.topk_weights, problem.topk_ids


@pytest.fixture
def folded(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "folded")


@pytest.fixture
def packed(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "packed")


# --- Activation scales ----------------------------------------------------------------------------


def scales_of(layer):
    """`(w13_input_scale, w2_input_scale)` that kernels are given."""
    return layer.experts.quant_method.moe_kernel.fused_experts.read_tensors()[6:8]


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dialect", ["nvfp4_modelopt", "nvfp4_ct"])
def test_activation_scales_are_the_maximum_over_experts(dialect):
    problem = build(CASE)
    layer = make_layer(problem, dialect)
    for name, shard, expert, tensor in checkpoint_tensors(problem.weights, dialect):
        if "input" in name:
            decode = 2.0 ** (expert + (shard == "w3") - (shard == "w2"))
            tensor = torch.full_like(tensor, 1 / decode if "global" in name else decode)
        layer.load_one(name, shard, expert, tensor)
    layer.finish()
    w13, w2 = scales_of(layer)
    assert w13.tolist() == [2.0**8]  # expert 7's up
    assert w2.tolist() == [2.0**6]


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dialect", ["nvfp4_modelopt_a16", "nvfp4_ct_a16"])
def test_weight_only_layers_have_no_activation_scales(dialect):
    layer = loaded(build(CASE), dialect)
    assert scales_of(layer) == [None, None]


def test_modelopt_groups_without_activations_are_weight_only():
    """`quant_algo` NVFP4, and no group quantises activations: no tensor brings an input_scale."""
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    config = ModelOptNvFp4Config.from_config(
        {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4",
            "ignore": [],
            "config_groups": {
                "group_0": {
                    "weights": weights,
                    "input_activations": None,
                    "targets": ["Linear"],
                }
            },
        }
    )
    problem = build(CASE)
    layer = make_layer(problem, "nvfp4_modelopt", quant_config=config)
    layer.load(problem.weights, "nvfp4_modelopt_a16")
    layer.finish()
    assert difference(layer(*inputs(problem)), problem.reference).within(REL_L2)


@pytest.mark.usefixtures("packed")
def test_weight_only_layer_ignores_a_stray_activation_scale():
    """modelopt leaves `input_scale` in some W4A16 checkpoints."""
    problem = build(CASE)
    config = quant_config("nvfp4_modelopt_a16")
    layer = make_layer(problem, "nvfp4_modelopt", quant_config=config)
    layer.load(problem.weights, "nvfp4_modelopt")
    layer.finish()
    assert scales_of(layer) == [None, None]


# --- Folded ---------------------------------------------------------------------------------------


def reference(problem, weights=None):
    """Float64 answer of the problem's weights, or of others."""
    return naive_experts(
        problem.x,
        weights or problem.weights,
        problem.topk_weights,
        problem.topk_ids,
        problem.case.activation,
        problem.expert_map,
    )


def folded_reference(problem):
    return reference(problem, fold(problem.weights)[0])


@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("dialect", NVFP4_DIALECTS)
def test_folded_layer(dialect):
    problem = build(CASE)
    layer = loaded(problem, dialect)
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    assert fused.layer.format == "fp8_block"
    assert "nvfp4=folded (MOE_BACKEND_NVFP4 is set)" in fused.describe()
    assert layer.experts.w13_weight.dtype == torch.float8_e4m3fn
    out = layer(*inputs(problem))
    assert difference(out, folded_reference(problem)).within(REL_L2)
    assert difference(out, problem.reference).within(0.07, norm=0.03)


@pytest.mark.usefixtures("folded")
def test_folding_drops_the_packed_weights():
    """The layer's parameters are the folded ones, and no other copy stays."""
    problem = build(CASE)
    layer = loaded(problem, "nvfp4_modelopt")
    size = sum(p.numel() * p.element_size() for p in layer.experts.parameters())
    e, h, i = CASE.num_experts, CASE.hidden_size, CASE.intermediate_size
    assert size < 1.02 * 3 * e * h * i
    quantised = layer.experts.quant_method.moe_quant_config
    assert (quantised.w1_scale, quantised.w2_scale) == (None, None)


CONVERTED = ("folded", "unpacked")


@pytest.mark.parametrize("path", CONVERTED)
def test_converted_experts_moved_in_place_are_read_in_place(path, monkeypatch):
    """EPLB swaps experts inside the parameters, their FP8 scales included."""
    monkeypatch.setenv("MOE_BACKEND_NVFP4", path)
    problem = build(CASE)
    layer = loaded(problem, "nvfp4_modelopt")
    before = layer(*inputs(problem))
    swapped = swap_experts(layer, problem.topk_ids)
    assert not torch.equal(layer(*inputs(problem)), before)
    assert torch.equal(layer(problem.x, problem.topk_weights, swapped), before)


@pytest.mark.usefixtures("packed")
def test_reload_writes_activation_scales_where_they_were():
    """A captured graph goes on reading them there."""
    problem = build(CASE)
    layer = reloadable(problem, "nvfp4_modelopt")
    before = scales_of(layer)
    tensors = checkpoint_tensors(problem.weights, "nvfp4_modelopt")
    reload(layer, [(n, s, e, t * 8 if "input" in n else t) for n, s, e, t in tensors])
    after = scales_of(layer)
    assert [t.data_ptr() for t in after] == [t.data_ptr() for t in before]
    assert [t.item() for t in after] == [8.0, 8.0]


@pytest.mark.parametrize("path", CONVERTED)
@pytest.mark.parametrize("dialect", ["nvfp4_modelopt", "nvfp4_ct"])
def test_reload_into_converted_layers(dialect, path, monkeypatch):
    """vLLM's reload: parameters as created, loaded and folded again, copied in place."""
    monkeypatch.setenv("MOE_BACKEND_NVFP4", path)
    first, second = build(CASE), build(CASE, seed=1)
    layer = reloadable(first, dialect)
    before = layer(*inputs(first))
    address = layer.experts.w13_weight.data_ptr()
    reload(layer, checkpoint_tensors(second.weights, dialect))
    assert layer.experts.w13_weight.data_ptr() == address
    problem = replace(first, weights=second.weights)
    after = layer(*inputs(first))
    assert not torch.equal(after, before)
    expected = folded_reference(problem) if path == "folded" else reference(problem)
    assert difference(after, expected).within(REL_L2)


@pytest.mark.usefixtures("folded")
@pytest.mark.parametrize("name", ["w13_weight", "w2_weight_scale"])
def test_loading_into_folded_parameters_is_refused(name):
    """Some callers hand new tensors straight to the parameters' weight loaders."""
    problem = build(CASE)
    layer = loaded(problem, "nvfp4_modelopt")
    (tensor,) = (
        (shard, t)
        for n, shard, e, t in checkpoint_tensors(problem.weights, "nvfp4_modelopt")
        if n == name and e == 2 and shard in ("w1", "w2")
    )
    with pytest.raises(ValueError, match=rf"{name} was converted from NVFP4 \(folded\)"):
        layer.load_one(name, tensor[0], 2, tensor[1])


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dialect", NVFP4_DIALECTS)
def test_scales_loaded_again_are_refused(dialect):
    """Their parameters may still be there, but nothing reads them any more."""
    problem = build(CASE)
    layer = loaded(problem, dialect)
    refused = set()
    for name, shard, expert, tensor in checkpoint_tensors(problem.weights, dialect):
        if hasattr(layer.experts, name) and not name.endswith(("weight", "weight_scale")):
            with pytest.raises(ValueError, match=f"{name} was prepared .*reload_weights"):
                layer.load_one(name, shard, expert, tensor)
            refused.add(name)
    assert len(refused) == (2 if dialect.endswith("_a16") else 4)


@pytest.mark.usefixtures("folded")
def test_cost_of_folding_is_logged_once(caplog):
    caplog.set_level(logging.DEBUG)
    logging.getLogger("vllm").propagate = True
    loaded(build(CASE), "nvfp4_modelopt")
    # A set: loggers that propagate show a record twice.
    found = {(r.levelno, r.message) for r in caplog.records if "folded to FP8 128" in r.message}
    ((level, message),) = found
    assert level == logging.INFO
    assert "weights within 3" in message


# --- Unpacked -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dialect", NVFP4_DIALECTS)
def test_a_cpu_unpacks_where_memory_allows(dialect):
    problem = build(CASE)
    layer = loaded(problem, dialect)
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    assert fused.layer.format == "bf16"
    assert "nvfp4=unpacked (a CPU decodes slowly, and 0.0 GiB fit)" in fused.describe()
    assert layer.experts.w13_weight.dtype == torch.bfloat16
    assert layer.experts.w13_weight_scale is None
    assert difference(layer(*inputs(problem)), problem.reference).within(REL_L2)


def test_a_cpu_without_room_keeps_them_packed(monkeypatch):
    from moe_backend.engines import vllm_nvfp4

    monkeypatch.setattr(vllm_nvfp4, "available_memory", lambda: 4000)
    layer = loaded(build(CASE), "nvfp4_modelopt")
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    assert "nvfp4=packed (unpacked weights take 0.0 GiB more and the room for it" in (
        fused.describe()
    )
    assert layer.experts.w13_weight.dtype == torch.uint8


def test_available_memory_is_what_the_machine_says():
    from moe_backend.engines.vllm_nvfp4 import available_memory

    found = available_memory()
    assert found is None or 2**20 < found < 2**50


def test_plain_silu_takes_the_fast_cpu_kernel():
    """Unpacked experts are bf16 ones to the registry, and vLLM's op is the faster one for those."""
    from moe_backend.engines.vllm import load_kernels

    load_kernels()
    problem = build(replace(CASE, activation=ACTIVATIONS[0]))
    layer = loaded(problem, "nvfp4_modelopt")
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    if not hasattr(torch.ops._C, "prepack_moe_weight"):
        pytest.skip("this vLLM has no compiled code")
    assert fused.selection.kernel.name == "vllm_cpu"
    assert difference(layer(*inputs(problem)), problem.reference).within(REL_L2)


# --- The choice -----------------------------------------------------------------------------------


def test_unknown_path_is_refused(monkeypatch):
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "halved")
    with pytest.raises(ValueError, match="'halved' is unknown; accepted: auto, packed, folded, un"):
        loaded(build(CASE), "nvfp4_modelopt")


def test_one_choice_for_all_layers_of_a_model(monkeypatch):
    from moe_backend.engines import vllm_nvfp4

    problem = build(CASE)
    layer = make_layer(problem, "nvfp4_modelopt")
    facts = layer.experts.moe_backend_model
    assert facts.layers == 1
    assert vllm_nvfp4.count_layer(layer.config) is facts
    assert facts.layers == 2
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "folded")
    layer.load(problem.weights, "nvfp4_modelopt")
    layer.finish()
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "packed")  # too late: reloads keep the path
    assert facts.choice.path == "folded"


def test_ranks_agree_on_the_path(monkeypatch):
    """EPLB moves experts between ranks: one that keeps them packed decides for all."""
    from moe_backend.engines import vllm_nvfp4

    monkeypatch.setenv("MOE_BACKEND_NVFP4", "folded")
    monkeypatch.setattr(vllm_nvfp4, "max_over_ranks", lambda layer, values: values.fill_(1.0))
    layer = loaded(build(CASE), "nvfp4_modelopt_a16")
    assert layer.experts.moe_backend_model.choice.path == "packed"
    assert layer.experts.w13_weight.dtype == torch.uint8


# --- Native ---------------------------------------------------------------------------------------


def test_native_layer_through_vllm(monkeypatch):
    """Padded weights and blocked scales take the parameters' place; EPLB and reload see them."""
    from nvfp4_vllm_op import model_op

    from moe_backend.kernels import registry
    from moe_backend.kernels.nvfp4_native import Nvfp4NativeKernel

    monkeypatch.setattr(registry, "kernels", lambda: [Nvfp4NativeKernel(model_op)])
    monkeypatch.setenv("MOE_BACKEND_KERNEL", "nvfp4_native")
    problem = build(replace(CASE, intermediate_size=160))
    layer = loaded(problem, "nvfp4_modelopt")
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    assert "kernel=nvfp4_native activations=nvfp4" in fused.describe()
    assert layer.experts.w2_weight.shape == (8, 128, 96)  # 160 columns padded to 192
    before = layer(*inputs(problem))
    assert difference(before, problem.reference).within(0.35, norm=0.05)
    swapped = swap_experts(layer, problem.topk_ids)
    assert torch.equal(layer(problem.x, problem.topk_weights, swapped), before)


# --- In the order of Hopper's decoders ------------------------------------------------------------


@pytest.mark.usefixtures("packed", "hopper")
@pytest.mark.parametrize("dialect", NVFP4_DIALECTS)
def test_layer_in_the_order_of_the_decoders(dialect):
    """Its words take the parameters' place; EPLB moves them, a reload writes there."""
    first, second = build(CASE), build(CASE, seed=1)
    layer = reloadable(first, dialect)
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    assert "kernel=hopper" in fused.describe()
    weight = layer.experts.w13_weight
    assert weight.dtype == torch.int32
    assert weight.nbytes == first.weights.w13.nbytes
    quantised = layer.experts.quant_method.moe_quant_config
    assert (quantised.w1_scale, quantised.w2_scale) == (None, None)  # no other copy stays
    before = layer(*inputs(first))
    assert difference(before, first.reference).within(REL_L2)
    swapped = swap_experts(layer, first.topk_ids)
    assert not torch.equal(layer(*inputs(first)), before)
    assert torch.equal(layer(first.x, first.topk_weights, swapped), before)
    reload(layer, checkpoint_tensors(second.weights, dialect))
    assert layer.experts.w13_weight.data_ptr() == weight.data_ptr()
    after = layer(*inputs(first))
    assert difference(after, reference(replace(first, weights=second.weights))).within(REL_L2)


@pytest.mark.usefixtures("packed", "hopper")
def test_codes_loaded_into_the_order_of_the_decoders_are_refused():
    problem = build(CASE)
    layer = loaded(problem, "nvfp4_modelopt")
    (tensor,) = (
        t
        for name, shard, expert, t in checkpoint_tensors(problem.weights, "nvfp4_modelopt")
        if (name, shard, expert) == ("w13_weight", "w1", 2)
    )
    with pytest.raises(ValueError, match="w13_weight is in the layout of kernel hopper"):
        layer.load_one("w13_weight", "w1", 2, tensor)
