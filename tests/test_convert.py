"""Conversions, each against a decoder of its own and against the tools that define the dialect."""

from __future__ import annotations

import argparse
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file
from test_checkpoint import EXPERTS, HIDDEN, TARGETS, one_by_one, projections, step_tensors, write

from moe_backend.checkpoint import TARGETS as TARGET_DIALECTS
from moe_backend.checkpoint import (
    Checkpoint,
    CheckpointError,
    add_convert_arguments,
    convert,
    find_moe_layers,
    preflight,
    run_convert,
)
from moe_backend.checkpoint.command import parse_size
from moe_backend.checkpoint.configs import summarise, write_configs
from moe_backend.checkpoint.writer import CheckpointWriter, OutputTensor
from moe_backend.cli import main

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
NVFP4 = ("nvfp4-modelopt", "nvfp4-ct")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are too small to share out, and threads that wait cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    return write(tmp_path_factory.mktemp("source") / "bf16", step_tensors())


@pytest.fixture(scope="module")
def converted(bf16, tmp_path_factory):
    """Tensors of each dialect by name."""
    folder = tmp_path_factory.mktemp("converted")
    for target in TARGETS:
        convert(bf16, folder / target, target)
    return {target: load_file(folder / target / "model.safetensors") for target in TARGETS}


def experts():
    """Block, projection and expert of every routed weight."""
    for layer in (1, 2):
        for name, _ in projections():
            for expert in range(EXPERTS):
                yield f"model.layers.{layer}.moe", name, expert


# --- Values, decoded from the definitions ---------------------------------------------------------


def decode_fp8(codes, scale):
    rows, columns = (torch.arange(n) // 128 for n in codes.shape)
    return codes.float() * scale[rows[:, None], columns]


def decode_nvfp4(packed, scale, global_scale):
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    sign = 1 - 2 * (codes >> 3).float()
    values = sign * E2M1[(codes & 7).long()]
    return values * (scale.float().repeat_interleave(16, -1) * global_scale)


def decode_expert(target, tensors, block, name, expert):
    if target == "nvfp4-ct":
        found = {k: tensors[f"{block}.experts.{expert}.{name}.{k}"] for k in CT_KINDS}
        scale = 1 / found["weight_global_scale"]
        return decode_nvfp4(found["weight_packed"], found["weight_scale"], scale)
    stem = f"{block}.{name}"
    codes = tensors[f"{stem}.weight"][expert]
    if target == "fp8-block":
        return decode_fp8(codes, tensors[f"{stem}.weight_scale_inv"][expert])
    scale, scale_2 = (
        tensors[f"{stem}.{kind}"][expert] for kind in ("weight_scale", "weight_scale_2")
    )
    return decode_nvfp4(codes, scale, scale_2)


CT_KINDS = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


@pytest.mark.parametrize(("target", "snr"), [("fp8-block", 30), *((t, 19) for t in NVFP4)])
def test_decoded_values_are_close_to_the_source(converted, target, snr):
    source = step_tensors()
    for block, name, expert in experts():
        weight = source[f"{block}.{name}.weight"][expert].float()
        decoded = decode_expert(target, converted[target], block, name, expert)
        noise = (decoded - weight).norm() / weight.norm()
        assert noise < 10 ** (-snr / 20)
        assert 0.99 < decoded.norm() / weight.norm() < 1.01


def test_fp8_scales_are_amax_over_448(converted):
    source = step_tensors()
    for block, name, expert in experts():
        weight = source[f"{block}.{name}.weight"][expert].float().abs()
        scale = converted["fp8-block"][f"{block}.{name}.weight_scale_inv"]
        assert scale.dtype == torch.float32
        for row in range(scale.shape[1]):
            for column in range(scale.shape[2]):
                block_values = weight[
                    128 * row : 128 * row + 128, 128 * column : 128 * column + 128
                ]
                assert scale[expert, row, column] == block_values.amax() / 448


def test_both_nvfp4_dialects_hold_the_same_bits(converted):
    modelopt, ct = (converted[target] for target in NVFP4)
    for block, name, expert in experts():
        stem, single = f"{block}.{name}", f"{block}.experts.{expert}.{name}"
        assert torch.equal(modelopt[f"{stem}.weight"][expert], ct[f"{single}.weight_packed"])
        scale = modelopt[f"{stem}.weight_scale"][expert]
        assert torch.equal(scale.float(), ct[f"{single}.weight_scale"].float())
        assert torch.equal(*(decode_expert(t, converted[t], block, name, expert) for t in NVFP4))


@pytest.mark.parametrize("sync", [True, False])
def test_global_scales(bf16, tmp_path, sync):
    """Decode direction in modelopt, inverse in compressed-tensors; gate and up alike if synced."""
    loaded = []
    for target in NVFP4:
        convert(bf16, tmp_path / target, target, sync_gate_up=sync)
        loaded.append(load_file(tmp_path / target / "model.safetensors"))
    modelopt, ct = loaded
    source = step_tensors()
    for block, name, expert in experts():
        names = ("gate_proj", "up_proj") if sync and name != "down_proj" else (name,)
        amax = max(source[f"{block}.{n}.weight"][expert].float().abs().amax() for n in names)
        scale = modelopt[f"{block}.{name}.weight_scale_2"]
        inverse = ct[f"{block}.experts.{expert}.{name}.weight_global_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, (EXPERTS,))
        assert (inverse.dtype, inverse.shape) == (torch.float32, (1,))
        torch.testing.assert_close(scale[expert], amax / 2688, rtol=3e-7, atol=0)
        torch.testing.assert_close(inverse[0], 2688 / amax, rtol=3e-7, atol=0)
        # Engines take the reciprocal; it has to be the same number to the bit.
        assert 1 / inverse[0] == scale[expert]
    different = [
        not torch.equal(*(modelopt[f"{b}.{n}.weight_scale_2"] for n in ("gate_proj", "up_proj")))
        for b in ("model.layers.1.moe", "model.layers.2.moe")
    ]
    assert different == [not sync] * 2


def test_input_scales_are_one(converted):
    modelopt, ct = (converted[target] for target in NVFP4)
    for block, name, expert in experts():
        assert modelopt[f"{block}.{name}.input_scale"].tolist() == [1.0] * EXPERTS
        assert ct[f"{block}.experts.{expert}.{name}.input_global_scale"].tolist() == [1.0]


@torch.compiler.set_stance("force_eager")  # the library compiles its rounding
def test_against_compressed_tensors_own_code(converted):
    """Its decoder reads our codes, and its encoder makes the same ones from our scales."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4 import pack_fp4_to_uint8, unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.quant_scheme import NVFP4 as PRESET

    source = step_tensors()
    for block, name, expert in list(experts())[::3]:
        weight = source[f"{block}.{name}.weight"][expert].float()
        packed, scale, global_scale, _ = (
            converted["nvfp4-ct"][f"{block}.experts.{expert}.{name}.{kind}"] for kind in CT_KINDS
        )
        scale = scale.float()
        codes = unpack_fp4_from_uint8(packed, *weight.shape, dtype=torch.float32)
        decoded = dequantize(codes, scale, global_scale=global_scale, dtype=torch.float32)
        ours = decode_expert("nvfp4-ct", converted["nvfp4-ct"], block, name, expert)
        torch.testing.assert_close(decoded, ours, rtol=1e-6, atol=0)
        values = quantize(weight, scale, None, PRESET["weights"], global_scale=global_scale)
        assert torch.equal(pack_fp4_to_uint8(codes), packed)
        # bf16 weights often lie midway between two codes, where the last bit of the step decides.
        step = scale.repeat_interleave(16, -1) / global_scale
        midway = ((values - weight / step).abs() - (codes - weight / step).abs()).abs() < 1e-5
        assert ((values == codes) | midway).all()
        assert (values != codes).float().mean() < 5e-3


def test_weights_of_zeros_and_tiny_weights(tmp_path):
    tensors = step_tensors()
    tensors["model.layers.1.moe.up_proj.weight"][:] = 0
    tensors["model.layers.1.moe.gate_proj.weight"][1] = 0
    tensors["model.layers.2.moe.down_proj.weight"][2] = 2.0**-133  # the smallest bf16
    source = write(tmp_path / "bf16", tensors)
    for target in TARGETS:
        convert(source, tmp_path / target, target)
        loaded = load_file(tmp_path / target / "model.safetensors")
        decoded = decode_expert(target, loaded, "model.layers.1.moe", "up_proj", 1)
        assert decoded.abs().amax() == 0
        tiny = decode_expert(target, loaded, "model.layers.2.moe", "down_proj", 2)
        assert tiny.abs().amax() <= 2.0**-132


# --- Names, dtypes, everything else ---------------------------------------------------------------


def test_one_by_one_source(bf16, converted, tmp_path):
    """DeepSeek's names: the same numbers as from stacked experts, names kept."""
    source = write(tmp_path / "bf16", one_by_one(step_tensors()))
    for target in TARGETS:
        convert(source, tmp_path / target, target)
        found = load_file(tmp_path / target / "model.safetensors")
        expected = converted[target]
        if target != "nvfp4-ct":
            expected = one_by_one({n: t for n, t in expected.items() if t.ndim == 3}) | {
                f"{n.partition('.moe.')[0]}.mlp.experts.{e}.{n.partition('.moe.')[2]}": t[e]
                for n, t in expected.items()
                if n.endswith(("weight_scale_2", "input_scale"))
                for e in range(EXPERTS)
            }
        else:
            expected = {
                n.replace(".moe.", ".mlp."): t for n, t in expected.items() if "experts" in n
            }
        experts_found = {n for n in found if ".experts." in n}
        assert experts_found == expected.keys()
        for name in experts_found:
            assert (found[name].dtype, found[name].shape) == (
                expected[name].dtype,
                expected[name].shape,
            )
            assert torch.equal(found[name].float(), expected[name].float())


@pytest.mark.parametrize("target", TARGETS)
def test_everything_else_is_copied_to_the_byte(converted, target):
    for name, tensor in step_tensors().items():
        if tensor.ndim < 3:
            copy = converted[target][name]
            assert copy.dtype == tensor.dtype
            assert torch.equal(copy.view(torch.uint8), tensor.view(torch.uint8))
        else:
            assert (name in converted[target]) == (target != "nvfp4-ct")


def test_other_files(bf16, tmp_path):
    source = shutil.copytree(bf16, tmp_path / "bf16")
    for name in ("tokenizer.json", "code/model.py", "pytorch_model.bin", ".cache/x", "a.gguf"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(name)
    (source / "tokenizer.json").chmod(0o400)
    convert(source, tmp_path / "out", "nvfp4-modelopt")
    found = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    ours = {"config.json", "hf_quant_config.json", "model.safetensors"}
    assert found == {*ours, "tokenizer.json", "code/model.py"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "tokenizer.json"


def configuration(folder):
    return json.loads((folder / "config.json").read_text())


def test_fp8_config(bf16, tmp_path):
    convert(bf16, tmp_path / "out", "fp8-block")
    found = configuration(tmp_path / "out")
    stated = found.pop("quantization_config")
    assert found == configuration(bf16)
    modules = stated.pop("modules_to_not_convert")
    assert stated == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    attention = {f"self_attn.{n}_proj" for n in ("q", "k", "v", "o", "g", "qkv")}
    mlp = {"gate_proj", "up_proj", "gate_up_proj", "down_proj"}
    dense = attention | {f"mlp.{n}" for n in mlp}
    sparse = attention | {f"share_expert.{n}" for n in mlp} | {"moe.gate"}
    expected = {f"model.layers.0.{n}" for n in dense} | {"lm_head"}
    expected |= {f"model.layers.{layer}.{n}" for layer in (1, 2) for n in sparse}
    assert set(modules) == expected
    assert len(modules) == len(expected)


def test_modelopt_configs(bf16, tmp_path):
    convert(bf16, tmp_path / "out", "nvfp4-modelopt")
    stated = configuration(tmp_path / "out")["quantization_config"]
    four_bits = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    ignored = [
        "lm_head",
        "model.layers.0*",
        *(
            f"model.layers.{layer}.{name}"
            for layer in (1, 2)
            for name in ("moe.gate", "self_attn*", "share_expert*")
        ),
    ]
    assert stated["quant_method"] == "modelopt"
    assert stated["quant_algo"] == "NVFP4"
    assert stated["ignore"] == ignored
    assert stated["config_groups"] == {
        "group_0": {"input_activations": four_bits, "weights": four_bits, "targets": ["Linear"]}
    }
    nested = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert nested["producer"]["name"] == "modelopt"
    assert nested["quantization"] == {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ignored,
    }


def test_exclusions_never_cover_a_quantised_module():
    """Layer 1 is dense and 10 is not, so neither `model.layers.1*` nor its parents may be used."""
    quantised = {"model.layers.10.moe.gate_proj", "model.layers.10.moe.experts"}
    modules = [
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
        "model.layers.10.moe.gate",
        "lm_head",
    ]
    assert summarise(modules, quantised) == [
        "lm_head",
        "model.layers.1.*",
        "model.layers.10.moe.gate",
        "model.layers.2*",
    ]


def test_compressed_tensors_config(bf16, tmp_path):
    """Read by the library itself, it is the preset that llm-compressor uses."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4 as PRESET

    convert(bf16, tmp_path / "out", "nvfp4-ct")
    stated = configuration(tmp_path / "out")["quantization_config"]
    parsed = QuantizationConfig.model_validate(stated)
    scheme = QuantizationScheme(**PRESET, targets=["Linear"], format="nvfp4-pack-quantized")
    assert parsed.config_groups == {"group_0": scheme}
    assert parsed.format == stated["format"] == "nvfp4-pack-quantized"
    assert stated["quant_method"] == "compressed-tensors"
    assert parsed.quantization_status.value == "compressed"
    assert "model.layers.1.share_expert.up_proj" in parsed.ignore
    assert "model.layers.1.moe.gate" in parsed.ignore
    assert not any("gate_proj" in name and ".moe." in name for name in parsed.ignore)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("style", ["stacked", "one by one"])
def test_vllm_quantises_experts_and_nothing_else(tmp_path, target, style):
    """vLLM's own matching of names, layers of a multi-token-prediction block included."""
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
    from vllm.model_executor.models.step3p5 import Step3p5ForCausalLM

    fused = Step3p5ForCausalLM.packed_modules_mapping
    tensors = step_tensors(layers=(1, 2, 10, 11))
    if style == "one by one":
        tensors = one_by_one(tensors)
    source = Checkpoint.open(write(tmp_path / "bf16", tensors, num_hidden_layers=11))
    write_configs(source, find_moe_layers(tensors), TARGET_DIALECTS[target], tmp_path)
    stated = configuration(tmp_path)["quantization_config"]

    def skipped(prefix):
        if target == "fp8-block":
            return is_layer_skipped(prefix, stated["modules_to_not_convert"], fused)
        if target == "nvfp4-ct":
            name = f"{prefix}.0.up_proj" if prefix.endswith(".experts") else prefix
            return should_ignore_layer(name, stated["ignore"], fused)
        config = ModelOptNvFp4Config.from_config(stated)
        config.packed_modules_mapping = fused
        return config.is_layer_excluded(prefix)

    block, shared = ("moe", "share_expert") if style == "stacked" else ("mlp", "mlp.shared_experts")
    for layer in ("0", "1", "2", "10", "11.mtp_block"):
        prefix = f"model.layers.{layer}"
        assert skipped(f"{prefix}.self_attn.qkv_proj")
        assert skipped(f"{prefix}.self_attn.o_proj")
        if layer != "0":
            assert skipped(f"{prefix}.{block}.gate")
            assert skipped(f"{prefix}.{shared}.gate_up_proj")
            assert skipped(f"{prefix}.{shared}.down_proj")
            assert not skipped(f"{prefix}.{block}.experts")
    assert skipped("model.layers.0.mlp.gate_up_proj")
    assert skipped("lm_head")


def test_heads_of_prediction_layers_have_vllm_names(tmp_path):
    tensors = step_tensors()
    tensors["model.layers.3.transformer.shared_head.output.weight"] = torch.zeros(4, HIDDEN)
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(HIDDEN, 2 * HIDDEN)
    convert(write(tmp_path / "bf16", tensors), tmp_path / "out", "nvfp4-ct")
    ignored = configuration(tmp_path / "out")["quantization_config"]["ignore"]
    assert "model.layers.3.shared_head.head" in ignored
    assert "model.layers.3.eh_proj" in ignored


# --- Streaming, shards, failure -------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("style", ["stacked", "one by one"])
def test_one_weight_in_memory(tmp_path, monkeypatch, target, style):
    """Whenever a tensor is read, the one before is gone; none holds more than one expert."""
    tensors = step_tensors() if style == "stacked" else one_by_one(step_tensors())
    source = write(tmp_path / "bf16", tensors)
    alive, sizes = [], []
    read = Checkpoint._read

    def spy(self, name, *args):
        assert not any(ref() is not None for ref in alive), f"{name} read before the last was freed"
        tensor = read(self, name, *args)
        alive[:] = [weakref.ref(tensor)]
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(Checkpoint, "_read", spy)
    convert(source, tmp_path / "out", target)
    assert len(sizes) > 24
    assert max(sizes) == max(rows * columns for _, (rows, columns) in projections())


@pytest.mark.parametrize("target", TARGETS)
def test_shards(bf16, converted, tmp_path, target):
    report = convert(bf16, tmp_path / "out", target, max_shard_bytes=60_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    assert [f.name for f in files] == names
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report.bytes_after
    merged = {}
    for file in files:
        tensors = load_file(file)
        size = sum(t.nbytes for t in tensors.values())
        assert size <= 60_000 or len(tensors) == 1
        assert all(index["weight_map"][name] == file.name for name in tensors)
        merged |= tensors
    assert merged.keys() == converted[target].keys() == index["weight_map"].keys()
    for name, tensor in converted[target].items():
        assert torch.equal(merged[name].float(), tensor.float())


def test_files_are_aligned_and_marked(tmp_path):
    """Readers that map a file need each tensor at a multiple of its element size."""
    shapes = {"a": ("uint8", (3,)), "b": ("float32", (1,)), "c": ("bfloat16", (3,))}
    planned = [OutputTensor(n, getattr(torch, d), shape) for n, (d, shape) in shapes.items()]
    writer = CheckpointWriter(tmp_path, planned, 100)
    for tensor in planned:
        writer.write(tensor.name, torch.ones(tensor.shape, dtype=tensor.dtype))
    writer.finish()
    (tmp_path / "config.json").write_text("{}")
    for info in Checkpoint.open(tmp_path).tensors.values():
        assert info.offset % info.dtype.itemsize == 0
    loaded = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        "a": [1] * 3,
        "b": [1],
        "c": [1] * 3,
    }
    raw = (tmp_path / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


def leftovers(folder):
    return sorted(f.name for f in folder.iterdir())


@pytest.mark.parametrize(
    ("target", "bad"),
    [("fp8-block", float("nan")), ("nvfp4-modelopt", float("inf")), ("nvfp4-ct", -float("inf"))],
)
def test_weight_that_is_not_finite_is_named(tmp_path, target, bad):
    tensors = step_tensors()
    tensors["model.layers.2.moe.down_proj.weight"][3, 5, 7] = bad
    source = write(tmp_path / "bf16", tensors)
    with pytest.raises(CheckpointError, match=r"2.moe.down_proj.weight: 1 values of expert 3 are"):
        convert(source, tmp_path / "out", target)
    assert leftovers(tmp_path) == ["bf16"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(bf16, tmp_path, monkeypatch, error):
    calls = []
    write_tensor = CheckpointWriter.write

    def fail_late(self, *args):
        calls.append(args)
        if len(calls) == 20:
            raise error
        write_tensor(self, *args)

    monkeypatch.setattr(CheckpointWriter, "write", fail_late)
    (tmp_path / "out").mkdir()  # empty, so it may be used
    with pytest.raises(type(error)):
        convert(bf16, tmp_path / "out", "nvfp4-modelopt")
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(tmp_path / "out") == []
    monkeypatch.undo()
    convert(bf16, tmp_path / "out", "nvfp4-modelopt")
    assert preflight(tmp_path / "out")


def test_unwritten_tensor_is_noticed(tmp_path):
    planned = [OutputTensor("a", torch.float32, (2,)), OutputTensor("b", torch.uint8, (3,))]
    writer = CheckpointWriter(tmp_path, planned, 100)
    writer.write("a", torch.ones(2))
    with pytest.raises(RuntimeError, match="1 tensors were not written, first b"):
        writer.finish()
    with pytest.raises(ValueError, match="planned"):
        writer.write("b", torch.ones(3))


def test_refusals(bf16, tmp_path):
    def refused(message, src=bf16, dst=tmp_path / "out", to="fp8-block"):
        before = leftovers(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            convert(src, dst, to)
        assert leftovers(tmp_path) == before

    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    refused("full: exists and is not empty", dst=full)
    refused("file: exists and is not empty", dst=full / "file")
    refused("is inside the source", dst=bf16 / "out")
    refused("is inside the source", dst=bf16)
    refused("no such directory; create it", dst=tmp_path / "a" / "b")
    refused("target 'int4' is unknown; accepted: fp8-block, nvfp4-", to="int4")

    convert(bf16, tmp_path / "fp8", "fp8-block")
    refused("quantised already .config.json quantization_config: fp8", src=tmp_path / "fp8")
    config = configuration(tmp_path / "fp8")
    del config["quantization_config"]
    (tmp_path / "fp8/config.json").write_text(json.dumps(config))
    refused("dtype float8_e4m3fn found, bfloat16 or", src=tmp_path / "fp8")

    dense = {n: t for n, t in step_tensors().items() if ".moe." not in n}
    refused("no routed experts found", src=write(tmp_path / "dense", dense))

    biased = step_tensors() | {"model.layers.1.moe.up_proj.bias": torch.zeros(EXPERTS, 48)}
    refused("up_proj.bias: found beside", src=write(tmp_path / "biased", biased))

    odd = step_tensors()
    for name in [n for n in odd if n.endswith("moe.down_proj.weight")]:
        odd[name] = odd[name][..., :40].clone()
    for name in [n for n in odd if n.endswith(("moe.gate_proj.weight", "moe.up_proj.weight"))]:
        odd[name] = odd[name][:, :40].clone()
    source = write(tmp_path / "odd", odd)
    for target in NVFP4:
        refused("down_proj.weight: 40 columns found, NVFP4 needs a multi", src=source, to=target)
    refused("gate_proj.weight: intermediate size 40 found; engines load FP8", src=source)


def test_full_disk_is_noticed_first(bf16, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1000 bytes are free, "):
        convert(bf16, tmp_path / "out", "fp8-block")


# --- Command --------------------------------------------------------------------------------------


def parse(*args):
    parser = argparse.ArgumentParser()
    add_convert_arguments(parser)
    return parser.parse_args([str(arg) for arg in args])


def test_command_prints_a_summary(bf16, tmp_path, capsys):
    out = tmp_path / "out"
    words = [bf16, out, "--to", "nvfp4-ct", "--max-shard-size", "100KB", "--no-sync-gate-up"]
    args = parse(*words)
    assert run_convert(args) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"wrote       {out} (nvfp4-ct)" in printed.out
    assert "converted   24 expert weights, " in printed.out
    assert "weight SNR  20." in printed.out
    assert len(list(out.glob("*.safetensors"))) > 1
    assert main(["convert", *map(str, words)]) == 1
    assert capsys.readouterr().err.startswith("moe-backend convert: ")


def test_sizes():
    assert [parse_size(t) for t in ("5GB", "1.5mb", "7")] == [5 * 10**9, 1_500_000, 7]
    for text in ("0GB", "5XB", "-1"):
        with pytest.raises(argparse.ArgumentTypeError):
            parse_size(text)
