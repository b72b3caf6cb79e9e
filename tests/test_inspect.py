"""`moe-backend inspect`: each property of NVFP4 scales, made on purpose in both dialects."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_backend import cli
from moe_backend.checkpoint.inspect import inspect

LAYERS, EXPERTS = 4, 8  # of the tiny model
DIALECTS = ("nvfp4-modelopt", "nvfp4-ct")


@pytest.fixture(scope="module")
def converted(tiny, tmp_path_factory):
    root = tmp_path_factory.mktemp("inspect")
    for name in (*DIALECTS, "fp8-block"):
        assert cli.main(["convert", str(tiny), str(root / name), "--to", name]) == 0
    return root


@pytest.fixture
def changed(converted, tmp_path):
    """Copy a checkpoint and edit its tensors and config; returns the folder."""

    def make(dialect, change):
        folder = shutil.copytree(converted / dialect, tmp_path / dialect)
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        change(tensors, config)
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def scales(tensors, dialect, projection, kind):
    """Names of a projection's scales: `global` (weight) or `input`."""
    names = {
        ("nvfp4-modelopt", "global"): "weight_scale_2",
        ("nvfp4-modelopt", "input"): "input_scale",
        ("nvfp4-ct", "global"): "weight_global_scale",
        ("nvfp4-ct", "input"): "input_global_scale",
    }
    end = f"{projection}.{names[dialect, kind]}"
    return sorted(n for n in tensors if n.endswith(end) and "share_expert" not in n)


def multiply(tensors, dialect, name, expert, factor):
    """Multiply one expert's scale, in decode direction."""
    factor = factor if dialect == "nvfp4-modelopt" else 1 / factor
    tensor = tensors[name]
    if tensor.numel() > 1:
        tensor.view(-1)[expert] *= factor
    else:
        tensors[name] = tensor * factor


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_sound_checkpoint(dialect, converted, capsys):
    report = inspect(converted / dialect)
    assert report.formats == {dialect: 3 * LAYERS * EXPERTS}
    assert (report.layers, report.experts) == (LAYERS, EXPERTS)
    assert (report.pairs, report.mismatched) == (LAYERS * EXPERTS, 0)
    for name in ("w13", "w2"):
        found = report.inputs[name]
        assert (found.scales.smallest, found.scales.largest) == (1.0, 1.0)
        assert (found.missing, found.bad, found.layer_spread) == (0, 0, 1.0)
    assert report.sampled == 3 * LAYERS
    assert report.mxfp4_casts == 0
    assert 0 < report.saturated < 0.01  # the block of the largest weight
    assert report.warnings == []
    assert cli.main(["inspect", str(converted / dialect)]) == 0
    out = capsys.readouterr().out
    assert "4 MoE layers of 8 experts" in out
    assert "32 experts, all share one global scale" in out
    assert "saturates beyond activations of 2688, headroom included" in out


@pytest.mark.parametrize("dialect", DIALECTS)
def test_gate_and_up_with_different_scales(dialect, changed):
    def change(tensors, config):
        names = scales(tensors, dialect, "up_proj", "global")
        multiply(tensors, dialect, names[0], 0, 3.0)
        multiply(tensors, dialect, names[-1], 5, 0.5)

    report = inspect(changed(dialect, change))
    assert report.mismatched == 2
    assert report.mismatch.largest == pytest.approx(3.0, rel=1e-5)
    assert report.mismatch.smallest == pytest.approx(2.0, rel=1e-5)
    assert "in 2 of 32 experts, by up to 3 times" in report.warnings[0]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("projection", "name"), [("gate_proj", "w13"), ("down_proj", "w2")])
def test_activation_scales_far_apart(dialect, projection, name, changed):
    def change(tensors, config):
        multiply(tensors, dialect, scales(tensors, dialect, projection, "input")[0], 0, 64.0)

    report = inspect(changed(dialect, change))
    found = report.inputs[name]
    assert found.scales.largest == pytest.approx(64.0)
    assert found.layer_spread == pytest.approx(64.0)
    assert found.mean_loss > 4
    assert "a mean would be" in report.warnings[0]
    assert "layers.1" in found.worst_layer


@pytest.mark.parametrize("dialect", DIALECTS)
def test_missing_and_bad_activation_scales(dialect, changed):
    def change(tensors, config):
        names = scales(tensors, dialect, "down_proj", "input")
        del tensors[names[0]]
        tensors[names[1]] = tensors[names[1]] * float("nan")
        tensors[names[2]] = tensors[names[2]] * -1

    report = inspect(changed(dialect, change))
    per_tensor = EXPERTS if dialect == "nvfp4-modelopt" else 1
    assert report.inputs["w2"].missing == per_tensor
    assert report.inputs["w2"].bad == 2 * per_tensor
    assert report.inputs["w13"].missing == 0
    assert "Loading is refused" in report.warnings[0]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_weight_only(dialect, changed, capsys):
    def change(tensors, config):
        for name in [n for n in tensors if "input_" in n and "scale" in n]:
            del tensors[name]
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None

    folder = changed(dialect, change)
    report = inspect(folder)
    assert report.weight_only
    assert (report.inputs, report.warnings) == ({}, [])
    assert cli.main(["inspect", str(folder)]) == 0
    assert "not quantised (weight-only)" in capsys.readouterr().out


def test_saturated_block_scales(changed):
    def change(tensors, config):
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            values = tensors[name].float()
            tensors[name] = values.where(torch.rand(values.shape) > 0.1, 448.0).to(
                torch.float8_e4m3fn
            )

    report = inspect(changed("nvfp4-modelopt", change))
    assert 0.05 < report.saturated < 0.2
    assert "block scales are at E4M3's maximum" in report.warnings[0]


def test_mxfp4_in_disguise(changed, capsys):
    def change(tensors, config):
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            powers = torch.exp2(tensors[name].float().log2().round().clamp(-6, 8))
            powers[..., 1::2] = powers[..., 0::2]
            tensors[name] = powers.to(torch.float8_e4m3fn)
        for name in [n for n in tensors if n.endswith("weight_scale_2")]:
            tensors[name] = torch.exp2(tensors[name].log2().round())

    folder = changed("nvfp4-modelopt", change)
    report = inspect(folder, experts=3)
    assert report.sampled == report.mxfp4_casts == 3 * 3 * LAYERS
    assert cli.main(["inspect", str(folder)]) == 0
    assert "folding to FP8 loses nothing" in capsys.readouterr().out


@pytest.mark.parametrize(("dialect", "kind"), [("bf16", "bf16"), ("fp8-block", "fp8-block")])
def test_other_formats(dialect, kind, tiny, converted):
    report = inspect(tiny if dialect == "bf16" else converted / dialect)
    assert report.formats == {kind: 3 * LAYERS * EXPERTS}
    assert (report.pairs, report.inputs, report.sampled) == (0, {}, 0)


def test_findings_as_json(converted, tmp_path):
    out = tmp_path / "report.json"
    assert cli.main(["inspect", str(converted / "nvfp4-ct"), "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["pairs"] == LAYERS * EXPERTS
    assert report["inputs"]["w13"]["scales"]["largest"] == 1.0


def test_no_such_checkpoint(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "none")]) == 1
    assert "no such directory" in capsys.readouterr().err
