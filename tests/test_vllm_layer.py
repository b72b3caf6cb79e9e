"""Every format and activation through vLLM's own layer, loader and modular kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.usefixtures("vllm_world")

from vllm_layers import (
    DIALECTS,
    NVFP4_DIALECTS,
    checkpoint_tensors,
    format_of,
    make_layer,
    reload,
    reloadable,
    swap_experts,
)

from moe_backend.engines.vllm import load_kernels
from moe_backend.layout import shards
from moe_backend.verify.metrics import difference
from moe_backend.verify.naive import naive_experts
from moe_backend.verify.problems import ACTIVATIONS, Case, build
from moe_backend.verify.run import REL_L2


@pytest.fixture(autouse=True)
def _packed(monkeypatch):
    """NVFP4 as it is in the checkpoint; the other paths are in test_vllm_nvfp4.py."""
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "packed")


def case_of(dialect, activation=ACTIVATIONS[1]):
    return Case(format_of(dialect), activation, intermediate_size=384)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: str(a.kind))
@pytest.mark.parametrize("dialect", DIALECTS)
def test_layer_matches_reference(dialect, activation):
    problem = build(case_of(dialect, activation))
    layer = make_layer(problem, dialect)
    layer.load(problem.weights, dialect)
    layer.finish()
    out = layer(problem.x, problem.topk_weights, problem.topk_ids)
    assert difference(out, problem.reference).within(REL_L2)


@pytest.mark.parametrize("dialect", ["bf16", "fp8_block", "nvfp4_modelopt"])
def test_routing_weights_on_the_input_count_once(dialect):
    """As Llama 4 has it: vLLM multiplies the input before it calls the experts."""
    problem = build(replace(case_of(dialect), top_k=1))
    layer = make_layer(problem, dialect, apply_router_weight_on_input=True)
    layer.load(problem.weights, dialect)
    layer.finish()
    half = torch.full_like(problem.topk_weights, 0.5)
    ones = torch.ones_like(half)
    reference = naive_experts(
        problem.x * 0.5, problem.weights, ones, problem.topk_ids, problem.case.activation
    )
    out = layer(problem.x.clone(), half, problem.topk_ids)
    assert difference(out, reference).within(REL_L2)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_integer_data_is_exact(dialect):
    problem = build(replace(case_of(dialect), integer=True, layout="dropped"))
    layer = make_layer(problem, dialect)
    layer.load(problem.weights, dialect)
    layer.finish()
    out = layer(problem.x, problem.topk_weights, problem.topk_ids)
    assert torch.equal(out, problem.reference.bfloat16())


def test_nvfp4_dialects_agree_bit_for_bit():
    problem = build(Case("nvfp4", ACTIVATIONS[1], tokens=33))
    outputs = []
    for dialect in NVFP4_DIALECTS:
        layer = make_layer(problem, dialect)
        layer.load(problem.weights, dialect)
        layer.finish()
        outputs.append(layer(problem.x, problem.topk_weights, problem.topk_ids))
    # 1/(1/g) may differ from g in the last bit of fp32, which bf16 outputs do not show.
    assert all(torch.equal(out, outputs[0]) for out in outputs)


@pytest.mark.parametrize(
    ("dialect", "tp"), [*((dialect, 1) for dialect in DIALECTS), ("fp8_block", 4)]
)
def test_experts_moved_in_place_are_read_in_place(dialect, tp, monkeypatch):
    """EPLB swaps experts inside the parameters; the next call must see it."""
    problem = build(case_of(dialect))
    layer = make_layer(problem, dialect, **tensor_parallel(monkeypatch, tp, 0))
    layer.load(problem.weights, dialect)
    layer.finish()
    assert layer.experts.quant_method.supports_eplb
    before = layer(problem.x, problem.topk_weights, problem.topk_ids)
    swapped = swap_experts(layer, problem.topk_ids)
    assert not torch.equal(layer(problem.x, problem.topk_weights, problem.topk_ids), before)
    assert torch.equal(layer(problem.x, problem.topk_weights, swapped), before)


def tensor_parallel(patch, tp, rank):
    """vLLM's layers believe to be one rank of several; only collectives would notice."""
    import vllm.model_executor.layers.fused_moe.config as config
    import vllm.model_executor.layers.quantization.fp8 as fp8

    patch.setattr(config, "get_tensor_model_parallel_rank", lambda: rank)
    patch.setattr(fp8, "get_tensor_model_parallel_world_size", lambda: tp)
    return {"tp_size": tp}


@pytest.mark.parametrize(("tp", "rows"), [(2, 64), (4, 32)])
def test_fp8_shard_off_the_block_grid(tp, rows, monkeypatch):
    """384 rows over 2 or 4 ranks: vLLM's loader and our plan give the same tensors, bit for bit.

    vLLM repeats the scales along both axes; those of the hidden axis are taken back.
    """
    problem = build(replace(case_of("fp8_block"), hidden_size=256))
    plan = shards.plan_tp("fp8_block", 256, 384, tp, (128, 128))
    assert (plan.w13_block, plan.w2_block) == ((rows, 128), (128, rows))
    for rank in range(tp):
        layer = make_layer(problem, "fp8_block", **tensor_parallel(monkeypatch, tp, rank))
        before = layer.experts.w13_weight_scale_inv.shape[-1]
        layer.load(problem.weights, "fp8_block")
        layer.finish()
        experts = layer.experts.quant_method.moe_kernel.fused_experts
        config = experts.fused_moe.layer
        assert (config.w13_block, config.w2_block) == (plan.w13_block, plan.w2_block)
        assert before == 256 // rows  # else vLLM has learnt it and merging can go
        expected = shards.shard(problem.weights, plan, rank).tensors()
        for found, own in zip(experts.read_tensors(), expected, strict=True):
            assert torch.equal(found, own)
        layer(problem.x, problem.topk_weights, problem.topk_ids)


def test_fp8_scales_that_differ_within_a_block(monkeypatch):
    """A loader that bypasses the parameters' own, with other scales than a checkpoint can have."""
    problem = build(replace(case_of("fp8_block"), hidden_size=256))
    layer = make_layer(
        problem, "fp8_block", load_format="sharded_state", **tensor_parallel(monkeypatch, 4, 1)
    )
    layer.load(problem.weights, "fp8_block")
    layer.experts.w2_weight_scale_inv.data[3, 1] *= 2
    with pytest.raises(ValueError, match="w2_weight_scale_inv: scales were repeated from blocks"):
        layer.finish()


@pytest.mark.parametrize(
    ("dialect", "tp"), [*((dialect, 1) for dialect in DIALECTS), ("fp8_block", 4)]
)
def test_dummy_weights_give_finite_output(dialect, tp, monkeypatch):
    problem = build(case_of(dialect))
    layer = make_layer(
        problem, dialect, load_format="dummy", **tensor_parallel(monkeypatch, tp, tp - 1)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.experts.parameters():
        # As vLLM's dummy loader: small values of either sign, scales included.
        values = torch.empty(parameter.shape).uniform_(-1e-3, 1e-3, generator=generator)
        parameter.data.copy_(values.to(parameter.dtype))
    layer.finish()
    out = layer(problem.x, problem.topk_weights, problem.topk_ids)
    assert out.isfinite().all()


def test_other_backends_are_untouched():
    """The stock CPU experts still serve a layer that does not ask for us."""
    from moe_backend.engines.vllm import load_kernels

    load_kernels()
    if not hasattr(torch.ops._C, "prepack_moe_weight"):
        pytest.skip("this vLLM has no compiled code, so its own CPU experts cannot run")
    problem = build(Case("bf16", ACTIVATIONS[0]))
    layer = make_layer(problem, "bf16", backend="auto")
    assert layer.experts.quant_method.experts_cls.__module__.startswith("vllm.")
    layer.load(problem.weights, "bf16")
    layer.finish()
    out = layer(problem.x, problem.topk_weights, problem.topk_ids.abs())
    assert difference(out, problem.reference).within(2e-2)


def test_layer_says_what_it_runs(caplog):
    import logging

    from moe_backend.engines import vllm_methods

    vllm_methods._logged.clear()
    problem = build(case_of("fp8_block"))
    layer = make_layer(problem, "fp8_block")
    layer.load(problem.weights, "fp8_block")
    caplog.set_level(logging.INFO)
    logging.getLogger("vllm").propagate = True
    layer.finish()
    (line,) = {m for m in caplog.messages if "kernel=" in m}
    for part in ("fp8_block 128x128", "swiglustep(limit=7.0)", "kernel=reference", "8/8 experts"):
        assert part in line


# --- What is wrong with a checkpoint is said before serving --------------------------------------


def load_with(dialect, change):
    """Load a good checkpoint with one tensor changed (None drops it), then finish."""
    problem = build(case_of(dialect))
    layer = make_layer(problem, dialect)
    for name, shard, expert, tensor in checkpoint_tensors(problem.weights, dialect):
        changed = change(name, shard, expert, tensor.clone())
        if changed is not None:
            layer.load_one(name, shard, expert, changed)
    layer.finish()


def at(name, shard, expert, value):
    """A change of the one tensor `(name, shard, expert)`."""

    def change(n, s, e, tensor):
        return value(tensor) if (n, s, e) == (name, shard, expert) else tensor

    return change


SCALES = {
    "fp8_block": ["w13_weight_scale_inv", "w2_weight_scale_inv"],
    "nvfp4_modelopt": [
        "w13_weight_scale",
        "w13_weight_scale_2",
        "w13_input_scale",
        "w2_weight_scale_2",
    ],
    "nvfp4_ct": ["w13_weight_scale", "w13_weight_global_scale", "w2_input_global_scale"],
    "nvfp4_modelopt_a16": ["w13_weight_scale", "w2_weight_scale_2"],
    "nvfp4_ct_a16": ["w2_weight_scale", "w13_weight_global_scale"],
}
EVERY_SCALE = [(d, n) for d, names in SCALES.items() for n in names]


def shard_of(name):
    return "w2" if name.startswith("w2") else "w3"


@pytest.mark.parametrize(("dialect", "name"), EVERY_SCALE)
def test_missing_scale(dialect, name):
    with pytest.raises(ValueError, match=rf"{name}.*expert|{name}.*no .* tensor"):
        load_with(dialect, at(name, shard_of(name), 3, lambda t: None))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_missing_weight(dialect):
    name = "w13_weight_packed" if dialect.startswith("nvfp4_ct") else "w13_weight"
    with pytest.raises(ValueError, match=rf"{name}: the checkpoint has no up tensor .*\(5\)"):
        load_with(dialect, at(name, "w3", 5, lambda t: None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -1.0])
@pytest.mark.parametrize(("dialect", "name"), EVERY_SCALE)
def test_bad_scale_value(dialect, name, bad):
    if name.endswith("weight_scale") and bad in (0.0, float("inf")):
        pytest.skip("a zero block scale is legal in NVFP4, and E4M3 has no infinity")

    def spoil(t):
        t.view(-1)[-1] = bad
        return t

    with pytest.raises(ValueError, match=rf"{name.replace('weight_scale_2', '.*')}|scale"):
        load_with(dialect, at(name, shard_of(name), 2, spoil))


@pytest.mark.parametrize(("dialect", "name"), EVERY_SCALE)
def test_scale_slot_that_nothing_wrote(dialect, name):
    """A loader that bypasses the parameters' own: `--load-format sharded_state`, say."""
    problem = build(case_of(dialect))
    layer = make_layer(problem, dialect, load_format="sharded_state")
    layer.load(problem.weights, dialect, skip=(name,))
    with pytest.raises(ValueError, match="scales are not finite and positive.*nan"):
        layer.finish()


@pytest.mark.parametrize(("dialect", "name"), EVERY_SCALE)
def test_scale_of_wrong_shape(dialect, name):
    with pytest.raises(ValueError, match=f"{name}, shard w[23], expert 2: .*shape .* expected"):
        load_with(dialect, at(name, shard_of(name), 2, lambda t: t.new_ones(3, 7)))


@pytest.mark.parametrize(("dialect", "name"), EVERY_SCALE)
def test_scale_of_wrong_dtype(dialect, name):
    with pytest.raises(ValueError, match=f"{name}, shard w[23], expert 2: .*int32; accepted"):
        load_with(dialect, at(name, shard_of(name), 2, lambda t: t.to(torch.int32)))


@pytest.mark.parametrize("dialect", ["bf16", "fp8_block"])
def test_nan_weight(dialect):
    def spoil(t):
        t.view(-1)[7] = float("nan")
        return t

    with pytest.raises(ValueError, match=r"w2_weight: NaN or infinity in 1 of 8 experts.* is 5"):
        load_with(dialect, at("w2_weight", "w2", 5, spoil))


@pytest.mark.parametrize("dialect", ["bf16", "fp8_block"])
def test_incomplete_reload(dialect):
    """What an earlier load wrote does not count for the next one."""
    problem = build(case_of(dialect))
    layer = make_layer(problem, dialect)
    layer.load(problem.weights, dialect)
    layer.finish()
    layer.load(problem.weights, dialect)
    layer.finish()
    layer.load(problem.weights, dialect, skip=("w2_weight",))
    with pytest.raises(ValueError, match="w2_weight: the checkpoint has no down tensor"):
        layer.finish()


def prepacked():
    """bf16 experts on vLLM's CPU kernel: of the checkpoint's shape and dtype, reordered."""
    load_kernels()
    if not hasattr(torch.ops._C, "prepack_moe_weight"):
        pytest.skip("this vLLM has no compiled code")
    problem = build(case_of("bf16", ACTIVATIONS[0]))
    layer = reloadable(problem, "bf16")
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    assert fused.selection.kernel.name == "vllm_cpu"
    return layer, problem


def merged(patch):
    """An FP8 shard off the block grid: its scales are not those that vLLM's loader fills."""
    problem = build(replace(case_of("fp8_block"), hidden_size=256))
    return reloadable(problem, "fp8_block", **tensor_parallel(patch, 4, 1)), problem


def test_loading_into_prepacked_weights_is_refused():
    """Of the same shape and dtype: nothing else would tell, and the answers would be noise."""
    layer, problem = prepacked()
    before = layer(problem.x, problem.topk_weights, problem.topk_ids)
    with pytest.raises(
        ValueError, match=r"w13_weight is in the layout of kernel vllm_cpu .*reload_"
    ):
        layer.load(problem.weights, "bf16")
    assert torch.equal(layer(problem.x, problem.topk_weights, problem.topk_ids), before)


def test_loading_into_merged_scales_is_refused(monkeypatch):
    """And nothing is written beside them: the codes come first, and are no longer taken."""
    layer, problem = merged(monkeypatch)
    before = layer(problem.x, problem.topk_weights, problem.topk_ids)
    other = build(problem.case, seed=1)
    with pytest.raises(ValueError, match=r"w13_weight_scale_inv has merged .*reload_") as error:
        layer.load(other.weights, "fp8_block")
    assert "NVFP4" not in str(error.value)
    assert torch.equal(layer(problem.x, problem.topk_weights, problem.topk_ids), before)


@pytest.mark.parametrize("dialect", [d for d in DIALECTS if d.startswith("nvfp4")])
@pytest.mark.parametrize("stem", ["weight", "weight_scale"])
def test_nothing_of_nvfp4_is_written_where_one_scale_is_refused(dialect, stem, monkeypatch):
    """In whatever order a sender has them: codes or block scales before the others."""
    monkeypatch.setenv("MOE_BACKEND_NVFP4", "packed")
    problem = build(case_of(dialect))
    layer = reloadable(problem, dialect)
    before = layer(problem.x, problem.topk_weights, problem.topk_ids)
    names = {f"w{n}_{stem}{suffix}" for n in (13, 2) for suffix in ("", "_packed")}
    tensors = checkpoint_tensors(build(problem.case, seed=1).weights, dialect)
    refused = 0
    for name, *tensor in tensors:
        # One that vLLM renamed has no place any more, which its loader says.
        if name in names and hasattr(layer.experts, name):
            with pytest.raises(ValueError, match="reload_weights"):
                layer.load_one(name, *tensor)
            refused += 1
    assert refused or (stem == "weight" and dialect.startswith("nvfp4_ct"))
    assert torch.equal(layer(problem.x, problem.topk_weights, problem.topk_ids), before)


@pytest.mark.parametrize("dialect", ["bf16", "fp8_block"])
def test_a_plain_load_does_not_count_for_a_reload(dialect):
    problem = build(case_of(dialect))
    layer = reloadable(problem, dialect)
    fused = layer.experts.quant_method.moe_kernel.fused_experts.fused_moe
    if fused.selection.kernel.name == "vllm_cpu":
        pytest.skip("a plain load is refused")
    layer.load(problem.weights, dialect)  # as vLLM's sparse updates do, with no end that is told
    last = checkpoint_tensors(problem.weights, dialect)
    kept = [tensor for tensor in last if tensor[:3] != ("w2_weight", "w2", 5)]
    with pytest.raises(ValueError, match=r"w2_weight: the checkpoint has no down tensor .*\(5\)"):
        reload(layer, kept)


def test_fp8_codes_that_vllm_reads_as_gfx94xs_own(monkeypatch):
    """There vLLM makes e4m3fnuz of them and doubles the scales; here they are the checkpoint's."""
    from vllm.platforms import current_platform

    problem = build(case_of("fp8_block"))
    plain = reloadable(problem, "fp8_block")
    wanted = plain(problem.x, problem.topk_weights, problem.topk_ids)
    monkeypatch.setattr(type(current_platform), "is_fp8_fnuz", classmethod(lambda cls: True))
    layer = reloadable(problem, "fp8_block")
    experts = layer.experts.quant_method.moe_kernel.fused_experts
    for found, own in zip(experts.read_tensors(), problem.weights.tensors(), strict=True):
        assert found.dtype == own.dtype
        assert torch.equal(found.float(), own.float())  # -0 has become 0
    assert torch.equal(layer(problem.x, problem.topk_weights, problem.topk_ids), wanted)
    other = build(problem.case, seed=1)
    reload(layer, checkpoint_tensors(other.weights, "fp8_block"))
    assert not torch.equal(layer(problem.x, problem.topk_weights, problem.topk_ids), wanted)
    reload(layer, checkpoint_tensors(problem.weights, "fp8_block"))
    assert torch.equal(layer(problem.x, problem.topk_weights, problem.topk_ids), wanted)


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_nan_that_gfx94x_reads_as_a_number(byte, monkeypatch):
    from vllm.platforms import current_platform

    def spoil(tensor):
        tensor.view(torch.uint8).view(-1)[7] = byte
        return tensor

    monkeypatch.setattr(type(current_platform), "is_fp8_fnuz", classmethod(lambda cls: True))
    with pytest.raises(ValueError, match=r"w2_weight: NaN or infinity in 1 of 8 experts.* is 5"):
        load_with("fp8_block", at("w2_weight", "w2", 5, spoil))


def test_fp8_is_taken_under_either_platforms_name():
    from dataclasses import replace as changed

    from vllm.model_executor.layers.quantization.utils.quant_utils import (
        kFp8Dynamic128Sym,
        kFp8Static128BlockSym,
    )

    from moe_backend.engines.vllm_experts import Fp8BlockExperts

    for dtype, taken in (
        (torch.float8_e4m3fn, True), (torch.float8_e4m3fnuz, True), (torch.float8_e5m2, False),
    ):  # fmt: skip
        key = changed(kFp8Static128BlockSym, dtype=dtype)
        assert Fp8BlockExperts._supports_quant_scheme(key, kFp8Dynamic128Sym) == taken


@pytest.mark.parametrize("which", ["prepacked", "merged"])
def test_vllms_reload_goes_on_where_a_plain_load_is_refused(which, monkeypatch):
    """More than once: what is copied in place keeps the parameter, and its note."""
    layer, problem = prepacked() if which == "prepacked" else merged(monkeypatch)
    dialect = problem.case.format
    before = layer(problem.x, problem.topk_weights, problem.topk_ids)
    other = build(problem.case, seed=1)
    for weights in (other.weights, problem.weights):
        reload(layer, checkpoint_tensors(weights, dialect))
        after = layer(problem.x, problem.topk_weights, problem.topk_ids)
        assert torch.equal(after, before) == (weights is problem.weights)
        with pytest.raises(ValueError, match="reload_weights"):
            layer.load(weights, dialect)


def test_bf16_weights_in_a_quantised_checkpoint():
    with pytest.raises(ValueError, match=r"w2_weight, .*bfloat16; accepted: torch.float8_e4m3fn"):
        load_with("fp8_block", at("w2_weight", "w2", 0, lambda t: t.to(torch.bfloat16)))


def test_intermediate_size_off_the_block_grid():
    problem = build(Case("fp8_block", ACTIVATIONS[1], intermediate_size=192))
    with pytest.raises(ValueError, match="192 is not a multiple of its FP8 block 128"):
        make_layer(problem, "fp8_block")


def test_hidden_size_off_the_block_grid(monkeypatch):
    """vLLM loads it, but not where it repeats scales for a shard off the grid."""
    problem = build(replace(case_of("fp8_block"), hidden_size=192))
    make_layer(problem, "fp8_block")
    with pytest.raises(ValueError, match="hidden size 192 is not a multiple of its FP8 block"):
        make_layer(problem, "fp8_block", **tensor_parallel(monkeypatch, 4, 1))


def test_wrong_weight_shape():
    with pytest.raises(ValueError, match=r"w13_weight, shard w1, expert 0: .*\(100, 128\)"):
        load_with("bf16", at("w13_weight", "w1", 0, lambda t: t[:100]))


# --- What the backend cannot serve is refused ----------------------------------------------------


def test_unknown_activation():
    problem = build(Case("bf16", ACTIVATIONS[0]))
    with pytest.raises(ValueError, match=r"activation 'gelu'.*accepted: silu, swiglustep"):
        make_layer(problem, "bf16", activation="gelu")


def test_expert_bias():
    problem = build(Case("bf16", ACTIVATIONS[0]))
    with pytest.raises(ValueError, match="biases on the experts"):
        make_layer(problem, "bf16", has_bias=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_lora_enabled": True}, "LoRA on the experts is not supported"),
        ({"use_batched_activation_format": True}, "batched activation format .*allgather_reduce"),
    ],
)
def test_lora_and_batched_formats(changes, message):
    from types import SimpleNamespace

    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from moe_backend.engines.vllm_experts import refuse_unsupported

    facts = {"is_lora_enabled": False, "use_batched_activation_format": False, **changes}
    config = SimpleNamespace(
        is_lora_enabled=facts["is_lora_enabled"],
        moe_parallel_config=SimpleNamespace(
            use_batched_activation_format=facts["use_batched_activation_format"]
        ),
        has_bias=False,
        is_act_and_mul=True,
        activation=MoEActivation.SILU,
    )
    message = f"blockscale cannot serve model.layers.1 .*{message}"
    with pytest.raises(ValueError, match=message) as refused:
        refuse_unsupported("model.layers.1", None, config)
    assert "moe-backend convert" not in str(refused.value)  # no other format would help


def unsupported_configs():
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.mxfp4 import Mxfp4Config

    yield "per-tensor fp8", Fp8Config(True, "dynamic")
    yield "mxfp4", Mxfp4Config()
    from vllm.model_executor.layers.quantization.modelopt import ModelOptMxFp8Config

    yield (
        "mxfp8",
        ModelOptMxFp8Config.from_config(
            {
                "quantization": {
                    "quant_algo": "MXFP8",
                    "group_size": 32,
                    "kv_cache_quant_algo": None,
                    "exclude_modules": [],
                }
            }
        ),
    )


@pytest.mark.parametrize("which", range(3))
def test_unsupported_quantisation(which):
    _, config = list(unsupported_configs())[which]
    problem = build(Case("bf16", ACTIVATIONS[0]))
    with pytest.raises(
        ValueError,
        match=r"--moe-backend blockscale cannot serve .*Supported: bf16.* `moe-backend convert`",
    ):
        make_layer(problem, "bf16", quant_config=config)
