"""Reading checkpoints and refusing broken ones, each fault made on purpose."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_backend.checkpoint import (
    Checkpoint,
    CheckpointError,
    convert,
    find_moe_layers,
    preflight,
)

EXPERTS, HIDDEN, INTERMEDIATE = 4, 160, 128  # the hidden size ends within an FP8 block
TARGETS = ("fp8-block", "nvfp4-modelopt", "nvfp4-ct")


def step_tensors(layers=(1, 2), seed=0):
    """A model with Step-3.5's names: layer 0 dense, `layers` with stacked experts."""
    make = torch.Generator().manual_seed(seed)

    def weight(*shape):
        return (torch.randn(shape, generator=make) / shape[-1] ** 0.5).bfloat16()

    tensors = {
        "model.embed_tokens.weight": weight(32, HIDDEN),
        "lm_head.weight": weight(32, HIDDEN),
    }
    for layer in (0, *layers):
        block = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "g_proj"):
            tensors[f"{block}.self_attn.{name}.weight"] = weight(HIDDEN, HIDDEN)
        tensors[f"{block}.input_layernorm.weight"] = weight(HIDDEN)
        for name, shape in projections():
            if layer:
                tensors[f"{block}.moe.{name}.weight"] = weight(EXPERTS, *shape)
                tensors[f"{block}.share_expert.{name}.weight"] = weight(*shape)
            else:
                tensors[f"{block}.mlp.{name}.weight"] = weight(*shape)
        if layer:
            tensors[f"{block}.moe.gate.weight"] = weight(EXPERTS, HIDDEN).float()
            tensors[f"{block}.moe.router_bias"] = weight(EXPERTS).float()
    return tensors


def projections():
    wide, narrow = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    return (("gate_proj", wide), ("up_proj", wide), ("down_proj", narrow))


def one_by_one(tensors):
    """The same experts under DeepSeek's names."""
    named = {}
    for name, tensor in tensors.items():
        block, _, rest = name.partition(".moe.")
        if tensor.ndim == 3:
            for expert in range(EXPERTS):
                named[f"{block}.mlp.experts.{expert}.{rest}"] = tensor[expert].clone()
        else:
            named[
                name.replace(".moe.", ".mlp.").replace(".share_expert", ".mlp.shared_experts")
            ] = tensor
    return named


def write(folder, tensors, **config):
    """A checkpoint directory with one file."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = {"num_hidden_layers": 3, "moe_num_experts": EXPERTS, **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


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
def quantised(bf16, tmp_path_factory):
    """Directory of each dialect by name; tests copy before they change anything."""
    folder = tmp_path_factory.mktemp("quantised")
    for target in TARGETS:
        convert(bf16, folder / target, target)
    return folder


@pytest.fixture
def sharded(tmp_path, bf16):
    convert(bf16, tmp_path / "sharded", "fp8-block", max_shard_bytes=100_000)
    return tmp_path / "sharded"


def changed(quantised, tmp_path, target, change):
    """A copy of a quantised checkpoint; `change(tensors, config)` edits it."""
    folder = shutil.copytree(quantised / target, tmp_path / "changed")
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- Reader ---------------------------------------------------------------------------------------


def test_tensors_are_what_the_library_reads(tmp_path):
    dtypes = ("bool", "uint8", "int64", "float16", "bfloat16", "float32", "float64")
    tensors = {d: torch.arange(12).view(3, 4).to(getattr(torch, d)) for d in dtypes}
    tensors["fp8"] = torch.randn(3, 4).to(torch.float8_e4m3fn)
    tensors["scalar"] = torch.tensor(1.5)
    tensors["empty"] = torch.empty(0, 4)
    checkpoint = Checkpoint.open(write(tmp_path / "c", tensors))
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        loaded = checkpoint.load(name)
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded.float(), tensor.float())
    assert torch.equal(checkpoint.load_part("int64", 2), tensors["int64"][2])
    assert checkpoint.config["moe_num_experts"] == EXPERTS


def test_shards_with_and_without_index(sharded):
    with_index = Checkpoint.open(sharded)
    assert len(with_index.files) > 3
    (sharded / "model.safetensors.index.json").unlink()
    without = Checkpoint.open(sharded)
    assert without.tensors == with_index.tensors


def test_index_decides_between_two_files(tmp_path):
    folder = write(tmp_path / "c", {"a": torch.zeros(2)})
    save_file({"a": torch.ones(2)}, folder / "other.safetensors")
    third = {"a": torch.zeros(2), "b": torch.ones(2)}
    save_file(third, folder / "third.safetensors")
    index = {"weight_map": {"a": "other.safetensors", "b": "third.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.load("a").tolist() == [1, 1]
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"third.safetensors: tensor a is also in other"):
        Checkpoint.open(folder)


def test_truncated_file_is_named_with_both_sizes(bf16, tmp_path):
    folder = shutil.copytree(bf16, tmp_path / "c")
    file = folder / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 7)
    with pytest.raises(CheckpointError, match=f"{file}: truncated: {size - 7} bytes .* {size}"):
        preflight(folder)
    with file.open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(CheckpointError, match="truncated: 100 bytes found, its header end"):
        preflight(folder)


def test_file_that_shrinks_after_opening(bf16, tmp_path):
    folder = shutil.copytree(bf16, tmp_path / "c")
    checkpoint = Checkpoint.open(folder)
    name = list(checkpoint.tensors)[-1]
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(checkpoint.tensors[name].offset + 1)
    with pytest.raises(CheckpointError, match=f"ends within tensor {name}: 1 of"):
        checkpoint.load(name)


def file_with(header, data=b"\0" * 8):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, of which the first 8 give a header of 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (file_with(b"{'a': 1}"), "its header of 8 bytes is damaged"),
        (file_with(b"\xff\xfe{}"), "is damaged"),
        (file_with([1]), "is damaged"),
        (file_with({"a": {"dtype": "F32", "shape": [2]}}), "damaged .*data_offsets"),
        (file_with({"a": {**ENTRY, "shape": [-2]}}), "damaged"),
        (file_with({"a": {**ENTRY, "data_offsets": [0, 4]}}), "tensor a, F32 of shape .2,., takes"),
        (file_with({"a": {**ENTRY, "data_offsets": [8, 16]}}, b"\0" * 16), "takes 8 bytes from 0"),
        (file_with({"a": {**ENTRY, "dtype": "F3"}}), "dtype 'F3'; known: BOOL"),
        (file_with({"a": ENTRY}, b"\0" * 9), "tensors end at"),
    ],
)
def test_damaged_file(tmp_path, content, message):
    folder = write(tmp_path / "c", {"a": torch.zeros(2)})
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint.open(folder)
    assert str(folder / "model.safetensors") in str(error.value)


def test_file_that_the_index_names_is_missing(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file}: no such file, but .* places tensor"):
        Checkpoint.open(sharded)


def test_tensor_that_the_index_names_is_missing(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = next(iter(content["weight_map"].values()))
    content["weight_map"]["model.ghost"] = file
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{sharded / file}: has no tensor model.ghost"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors.index.json", "{}", "has no weight_map"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "file beside the index"),
        ("model.safetensors.index.json", "{", "cannot be read as JSON"),
        ("config.json", "[]", "a list found, a JSON object expected"),
        ("config.json", None, "config.json: no such file"),
        ("model.safetensors", None, "neither model.safetensors nor"),
    ],
)
def test_other_files(tmp_path, name, content, message):
    folder = write(tmp_path / "c", {"a": torch.zeros(2)})
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_no_directory_and_no_tensor(bf16, tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint.open(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no tensor model.ghost"):
        Checkpoint.open(bf16).load("model.ghost")


# --- Names ----------------------------------------------------------------------------------------


def test_stacked_experts_are_found():
    layers = find_moe_layers(step_tensors(layers=(10, 9)))
    assert [layer.block for layer in layers] == ["model.layers.9.moe", "model.layers.10.moe"]
    assert all(layer.stacked for layer in layers)
    assert [m.projection for m in layers[0].modules] == ["gate", "up", "down"]
    assert layers[0].modules[0].tensors == {"weight": "model.layers.9.moe.gate_proj.weight"}


def test_single_experts_are_found():
    names = [
        f"layers.0.block_sparse_moe.experts.{e}.{p}.{kind}"
        for e in (10, 2)
        for p in ("w2", "w3", "w1")
        for kind in ("weight", "weight_scale_inv")
    ]
    names += ["layers.0.mlp.shared_experts.up_proj.weight", "layers.0.mlp.gate.weight"]
    (layer,) = find_moe_layers(names)
    assert not layer.stacked
    assert layer.experts("up") == {2, 10}
    assert [(m.expert, m.projection) for m in layer.modules[:4]] == [
        (2, "gate"),
        (2, "up"),
        (2, "down"),
        (10, "gate"),
    ]
    assert layer.modules[0].tensors.keys() == {"weight", "weight_scale_inv"}


def test_both_styles_in_one_layer():
    names = ["layers.3.moe.gate_proj.weight", "layers.3.moe.experts.0.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"layers.3.moe: holds experts both stacked and one"):
        find_moe_layers(names)


# --- Preflight ------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("style", ["stacked", "one by one"])
def test_good_checkpoint(tmp_path, target, style):
    tensors = step_tensors() if style == "stacked" else one_by_one(step_tensors())
    source = write(tmp_path / "bf16", tensors)
    assert preflight(source)[1] == f"2 MoE layer(s) of {EXPERTS} experts"
    convert(source, tmp_path / "quantised", target)
    facts = "; ".join(preflight(tmp_path / "quantised"))
    assert f"in {target}, each with its scales" in facts
    assert "finite and positive" in facts


def test_dense_model_passes(tmp_path):
    tensors = {n: t for n, t in step_tensors().items() if ".moe." not in n}
    assert preflight(write(tmp_path / "c", tensors))[-1] == "no routed experts"


STACK = "model.layers.2.moe.down_proj"
SINGLE = "model.layers.2.moe.experts.3.down_proj"


def drop(name):
    return lambda tensors, config: tensors.pop(name)


def replace(name, make):
    return lambda tensors, config: tensors.update({name: make(tensors[name])})


def value(number):
    def make(tensor):
        flat = tensor.clone().flatten()
        flat[-1] = number
        return flat.view(tensor.shape)

    return make


def configure(**values):
    return lambda tensors, config: config.update(values)


FAULTS = [
    # missing
    ("fp8-block", drop(f"{STACK}.weight_scale_inv"), f"{STACK}.weight_scale_inv: not in the"),
    ("nvfp4-modelopt", drop(f"{STACK}.weight_scale"), f"{STACK}.weight_scale: not in the"),
    ("nvfp4-modelopt", drop(f"{STACK}.weight_scale_2"), f"{STACK}.weight_scale_2: not in the"),
    ("nvfp4-modelopt", drop(f"{STACK}.input_scale"), f"{STACK}.input_scale: not in the"),
    ("nvfp4-ct", drop(f"{SINGLE}.weight_global_scale"), f"{SINGLE}.weight_global_scale: not in"),
    ("nvfp4-ct", drop(f"{SINGLE}.input_global_scale"), f"{SINGLE}.input_global_scale: not in the"),
    ("nvfp4-ct", drop(f"{SINGLE}.weight_packed"), f"{SINGLE}.weight_packed: not in the checkpoint"),
    # shape
    (
        "fp8-block",
        replace(f"{STACK}.weight_scale_inv", lambda t: t[:, :1].clone()),
        r"weight_scale_inv: shape \(4, 1, 1\) found, \(4, 2, 1\) expected",
    ),
    (
        "nvfp4-modelopt",
        replace(f"{STACK}.weight_scale", lambda t: t[..., :2].clone()),
        r"weight_scale: shape \(4, 160, 2\) found, \(4, 160, 8\) expected",
    ),
    (
        "nvfp4-modelopt",
        replace(f"{STACK}.weight_scale_2", lambda t: t[:3].clone()),
        r"weight_scale_2: shape \(3,\) found, \(4,\) expected",
    ),
    (
        "nvfp4-ct",
        replace(f"{SINGLE}.weight_packed", lambda t: t[:, :-1].clone()),
        "weight_packed: 126 columns found, a multiple of 16 accepted",
    ),
    (
        "nvfp4-ct",
        replace(f"{SINGLE}.weight_packed", lambda t: t.view(4, -1, t.shape[1])),
        "weight_packed: shape .* found, 2 dimensions expected",
    ),
    (
        "fp8-block",
        replace("model.layers.2.moe.up_proj.weight", lambda t: t[:, :32].clone()),
        r"up_proj: weight \[32, 160\] found, but .*gate_proj has intermediate size 128 and hidden",
    ),
    # dtype
    (
        "fp8-block",
        replace(f"{STACK}.weight_scale_inv", lambda t: t.to(torch.float8_e4m3fn)),
        "weight_scale_inv: dtype float8_e4m3fn found, float32 or bfloat16",
    ),
    (
        "fp8-block",
        replace(f"{STACK}.weight", lambda t: t.bfloat16()),
        "down_proj.weight: dtype bfloat16 found, float8_e4m3fn accepted",
    ),
    (
        "nvfp4-modelopt",
        replace(f"{STACK}.weight_scale", lambda t: t.float()),
        "weight_scale: dtype float32 found, float8_e4m3fn accepted",
    ),
    (
        "nvfp4-ct",
        replace(f"{SINGLE}.weight_packed", lambda t: t.view(torch.int8)),
        "weight_packed: dtype int8 found, uint8 accepted",
    ),
    # value
    ("fp8-block", replace(f"{STACK}.weight_scale_inv", value(float("nan"))), "inv: 1 of 8 scales"),
    ("fp8-block", replace(f"{STACK}.weight_scale_inv", value(0)), r"inv: .* 0.0 at index \(3, 1"),
    (
        "nvfp4-modelopt",
        replace(f"{STACK}.weight_scale_2", value(float("inf"))),
        "_2: 1 of 4 scales",
    ),
    ("nvfp4-modelopt", replace(f"{STACK}.input_scale", value(0)), "input_scale: 1 of 4 scales"),
    (
        "nvfp4-ct",
        replace(f"{SINGLE}.weight_global_scale", value(-1)),
        "global_scale: 1 of 1 scales",
    ),
    # experts
    (
        "fp8-block",
        configure(moe_num_experts=5),
        "gate_proj: 4 experts found, config.json moe_num_experts has 5",
    ),
    (
        "fp8-block",
        configure(moe_num_experts=None, text_config={"n_routed_experts": 3}),
        "4 experts found, config.json text_config.n_routed_experts has 3",
    ),
    (
        "nvfp4-ct",
        lambda tensors, config: [tensors.pop(n) for n in list(tensors) if n.startswith(SINGLE)],
        r"down_proj: 3 experts found \(missing: 3\)",
    ),
    (
        "nvfp4-ct",
        lambda tensors, config: [
            tensors.update({n.replace("experts.3", "experts.7"): tensors.pop(n)})
            for n in list(tensors)
            if n.startswith(SINGLE)
        ],
        r"down_proj: 4 experts found \(missing: 3\), config.json moe_num_experts has 4",
    ),
    (
        "fp8-block",
        lambda tensors, config: [tensors.pop(n) for n in list(tensors) if n.startswith(STACK)],
        "model.layers.2.moe: has no down projection",
    ),
    # config.json
    (
        "nvfp4-modelopt",
        lambda tensors, config: config["quantization_config"]["ignore"].append(
            "model.layers.2.moe.experts*"
        ),
        "model.layers.2.moe.gate_proj.weight: dtype uint8 found, bfloat16 or",
    ),
    ("fp8-block", configure(quantization_config=None), "has no quantization_config, makes this"),
    ("fp8-block", configure(quantization_config=["fp8"]), "is not a JSON object"),
]


@pytest.mark.parametrize(("target", "change", "message"), FAULTS)
def test_fault_is_refused(quantised, tmp_path, target, change, message):
    folder = changed(quantised, tmp_path, target, change)
    with pytest.raises(CheckpointError, match=message):
        preflight(folder)


def layer_1_in_bf16(*entries):
    def change(tensors, config):
        for name in [n for n in tensors if n.startswith("model.layers.1.moe.")]:
            if name.endswith("_proj.weight"):
                tensors[name] = torch.randn(tensors[name].shape[0], *projection_shape(name))
            elif "scale" in name:
                del tensors[name]
        found = config["quantization_config"]
        found["modules_to_not_convert" if "fmt" in found else "ignore"] += entries

    return change


def projection_shape(name):
    return dict(projections())[name.split(".")[-2]]


@pytest.mark.parametrize(
    ("target", "entry"),
    [
        ("fp8-block", "model.layers.1.moe.experts"),
        ("fp8-block", "model.layers.1.moe.experts.0.gate_proj"),
        ("nvfp4-modelopt", "model.layers.1.moe.experts*"),
        ("nvfp4-modelopt", "model.layers.1.moe"),
        ("nvfp4-modelopt", "model.layers.1*"),
    ],
)
def test_layer_left_out_of_quantisation(quantised, tmp_path, target, entry):
    folder = changed(quantised, tmp_path, target, layer_1_in_bf16(entry))
    assert any("3 expert projection(s) in bf16" in fact for fact in preflight(folder))


def test_compressed_tensors_ignore_and_targets(quantised, tmp_path):
    def change(tensors, config):
        for name in [n for n in tensors if n.startswith("model.layers.1.moe.experts")]:
            packed = tensors.pop(name)
            if name.endswith("weight_packed"):
                weight = torch.zeros(packed.shape[0], packed.shape[1] * 2).bfloat16()
                tensors[name.replace("_packed", "")] = weight
        config["quantization_config"]["ignore"].append(r"re:.*\.layers\.1\..*")

    assert any(
        "12 expert projection(s) in bf16" in f for f in preflight_of(quantised, tmp_path, change)
    )

    def target_layer_2(tensors, config):
        config["quantization_config"]["ignore"].pop()
        group = config["quantization_config"]["config_groups"]["group_0"]
        group["targets"] = [r"re:.*\.layers\.2\..*"]

    shutil.rmtree(tmp_path / "changed")
    both = [change, target_layer_2]
    facts = preflight_of(quantised, tmp_path, lambda *args: [edit(*args) for edit in both])
    assert any("12 expert projection(s) in bf16" in fact for fact in facts)


def preflight_of(quantised, tmp_path, change, target="nvfp4-ct"):
    return preflight(changed(quantised, tmp_path, target, change))


@pytest.mark.parametrize("target", TARGETS)
def test_entries_that_do_not_mean_experts(quantised, tmp_path, target):
    """vLLM quantises these experts in spite of the entries, so they are checked."""

    def change(tensors, config):
        found = config["quantization_config"]
        entries = ["model.layers.1.moe.gate", "model.layers.1.moe.shared_experts.up_proj"]
        if target != "nvfp4-modelopt":  # there, any part of the name will do
            entries += ["model.layers.1.moe", "model.layers.1"]
        found["modules_to_not_convert" if "fmt" in found else "ignore"] += entries

    assert not any("bf16" in fact for fact in preflight_of(quantised, tmp_path, change, target))


def test_router_pattern_does_not_mean_the_stacked_gate_projection(quantised, tmp_path):
    def change(tensors, config):
        config["quantization_config"]["ignore"] = ["lm_head", "*.moe.gate*"]

    assert any("6 expert" in f for f in preflight_of(quantised, tmp_path, change, "nvfp4-modelopt"))


@pytest.mark.parametrize("target", ["nvfp4-modelopt", "nvfp4-ct"])
def test_weight_only_nvfp4_needs_no_input_scales(quantised, tmp_path, target):
    def change(tensors, config):
        for name in [n for n in tensors if "input_" in n and "scale" in n]:
            del tensors[name]
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None

    assert preflight_of(quantised, tmp_path, change, target)


def test_modelopt_config_in_its_own_file(quantised, tmp_path):
    """modelopt up to 0.29 wrote hf_quant_config.json only."""
    folder = changed(quantised, tmp_path, "nvfp4-modelopt", configure(quantization_config=None))
    assert any("nvfp4-modelopt" in fact for fact in preflight(folder))


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"},
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        },
    ],
)
def test_other_quantisations_are_left_to_the_engine(quantised, tmp_path, config):
    folder = changed(quantised, tmp_path, "fp8-block", configure(quantization_config=config))
    assert "not checked" in preflight(folder)[-1]


def test_expert_count_not_stated(bf16, tmp_path):
    folder = shutil.copytree(bf16, tmp_path / "c")
    (folder / "config.json").write_text("{}")
    assert "2 MoE layer(s) of 4 experts" in preflight(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.moe.up_proj.weight"] = torch.zeros(3, INTERMEDIATE, HIDDEN)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"up_proj: 3 experts found, model.layers.1.moe, the"):
        preflight(folder)
